import math

import pytest
import torch

from gradstats import gradient_stats

D = 50


def quadratic(seed, count=24, bias2=2.0, noise=1.0, own=0.5):
    """Batches and a gradient with known statistics: shared noise in the pair, own noise of the strategy, a bias."""
    g = torch.Generator().manual_seed(seed)
    batches = [(torch.randn(D, generator=g, dtype=torch.float64), torch.randn(D, generator=g, dtype=torch.float64)) for _ in range(count)]
    truth, bias = torch.full((D,), 0.2, dtype=torch.float64), torch.zeros(D, dtype=torch.float64)
    bias[3] = math.sqrt(bias2)

    def grad_fn(batch, strategy):
        shared, private = batch
        return truth + noise * shared + (0 if strategy == 'base' else bias + own * private)
    return grad_fn, batches


def naive(grad_fn, batches, strategy, groups):
    """Stores everything; double loops over pairs."""
    n = len(batches) // groups
    out = []
    for k in range(groups):
        part = batches[k * n:(k + 1) * n]
        g = [grad_fn(b, strategy).double() for b in part]
        g0 = [grad_fn(b, 'base').double() for b in part]
        pairs = [(i, j) for i in range(n) for j in range(n) if i != j]
        bias2 = sum(((g[i] - g0[i]) @ (g[j] - g0[j])).item() for i, j in pairs) / len(pairs)
        norm2 = sum((g0[i] @ g0[j]).item() for i, j in pairs) / len(pairs)
        mean = sum(g) / n
        variance = sum((x - mean).square().sum().item() for x in g) / (n - 1)
        out.append((bias2, variance, bias2 + variance, norm2))
    columns = list(zip(*out))
    return [(sum(c) / groups, torch.tensor(c, dtype=torch.float64).std().item() / groups ** 0.5) for c in columns]


@pytest.mark.parametrize('groups', (2, 4))
@pytest.mark.parametrize('dtype', (torch.float64, torch.float32))
def test_equals_the_naive_implementation(groups, dtype):
    grad_fn, batches = quadratic(0)
    narrow = lambda batch, strategy: grad_fn(batch, strategy).to(dtype)
    stats = gradient_stats(narrow, ['base', 'other', 'third'], 'base', batches, groups)
    assert list(stats) == ['base', 'other', 'third']
    for strategy in stats:
        s = stats[strategy]
        ours = [(s.bias2, s.bias2_sem), (s.variance, s.variance_sem), (s.mse, s.mse_sem), (s.norm2, s.norm2_sem)]
        for a, b in zip(ours, naive(narrow, batches, strategy, groups)):
            assert a == pytest.approx(b, rel=1e-9, abs=1e-11)
        assert s.num_batches == 24
    assert stats['base'].bias2 == stats['base'].bias2_sem == 0


def test_known_values_are_met_without_bias_over_200_repeats():
    """The mean over repeats meets the truth within its own error, where the naive ||mean||^2 is off by far."""
    repeats = [gradient_stats(*(lambda g, b: (g, ['base', 's'], 'base', b))(*quadratic(seed)))['s'] for seed in range(200)]
    truth = dict(bias2=2.0, variance=D * 1.25, norm2=D * 0.04, mse=2 + D * 1.25)
    for key, true in truth.items():
        values = torch.tensor([getattr(r, key) for r in repeats], dtype=torch.float64)
        assert abs(values.mean() - true) < 3.5 * values.std() / 200 ** 0.5, key
    # error bars: with 4 groups a Student t of 3 degrees of freedom; P(|t| < 1) = 0.609, P(|t| < 3.182) = 0.95
    for key in ('bias2', 'variance', 'norm2'):
        z = torch.tensor([abs(getattr(r, key) - truth[key]) / getattr(r, key + '_sem') for r in repeats])
        for limit, expected in ((1.0, 0.609), (3.182, 0.95)):
            share = (z < limit).double().mean().item()
            assert abs(share - expected) < 3.5 * math.sqrt(expected * (1 - expected) / 200) + 0.02, (key, limit, share)


def test_no_bias_is_estimated_around_zero_and_may_be_negative():
    values = [gradient_stats(*(lambda g, b: (g, ['s'], 'base', b))(*quadratic(seed, 8, bias2=0.0)))['s'].bias2 for seed in range(100)]
    assert min(values) < 0 < max(values)
    assert abs(sum(values) / 100) < 3.5 * torch.tensor(values).std().item() / 10


def test_time_and_pairing():
    calls = []

    def grad_fn(batch, strategy):
        calls.append((batch, strategy))
        return torch.full((3,), float(batch) + (strategy == 'b'))
    stats = gradient_stats(grad_fn, ['a', 'b', 'b'], 'a', range(8))
    assert sorted(calls) == sorted([(i, s) for i in range(8) for s in 'ab'])  # one gradient per strategy and batch
    assert stats['b'].bias2 == pytest.approx(3) and stats['b'].bias2_sem == pytest.approx(0)


def test_cached_gradients_are_left_alone():
    cache = {s: torch.randn(5) for s in 'ab'}
    before = {s: g.clone() for s, g in cache.items()}
    gradient_stats(lambda batch, s: cache[s], ['a', 'b'], 'a', range(8))
    assert all(torch.equal(before[s], cache[s]) for s in cache)


@pytest.mark.parametrize('count, groups', [(0, 4), (4, 4), (7, 4), (9, 4), (8, 1)])
def test_too_few_batches(count, groups):
    with pytest.raises(ValueError, match=f'{count} batches do not make {groups} groups'):
        gradient_stats(lambda b, s: torch.ones(2), ['a'], 'a', range(count), groups)
