"""gradstats.py against stored gradients, known truths and Adam's own step."""
import copy
import math

import pytest
import torch
from conftest import error

from gradstats import adam_scale, flat_gradient, gradient_stats, unchanged

def noisy(seed, mean):
    """(grad_fn, 24 batches): g_base is the mean + noise of the batch, in 50 dimensions.

    g_biased adds 0.2 to each coordinate, and half of a noise of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randn(24, 2, 50, generator=generator, dtype=torch.float64)

    def grad_fn(batch, strategy):
        shared, own = batch
        return mean + shared + (0.2 + 0.5 * own) * (strategy == 'biased')
    return grad_fn, batches


def by_hand(g, g0, group):
    """bias2, variance, norm2, cosine from stored gradients (batches, coordinates)."""
    across = group[:, None] != group[None, :]

    def inner(a, b):
        return (a @ b.T)[across].mean().item()

    norm2 = inner(g0, g0)
    own2 = inner(g, g)
    variance = g.square().sum(dim=1).mean().item() - own2
    return inner(g - g0, g - g0), variance, norm2, inner(g0, g) / math.sqrt(norm2 * own2)


@pytest.mark.parametrize('groups, scale', [
    (24, None), (4, torch.linspace(0.5, 2, 50, dtype=torch.float64))])
def test_estimates_equal_stored_gradients(groups, scale):
    """The jackknife: sem^2 = (G - 1) / G sum (estimate without a group - mean)^2."""
    grad_fn, batches = noisy(0, mean=0.5)
    stats = gradient_stats(grad_fn, ['biased'], 'base', batches, groups, scale)
    factor = 1 if scale is None else scale
    g0, g = (torch.stack([grad_fn(batch, strategy) for batch in batches]) * factor
             for strategy in ('base', 'biased'))
    group = torch.arange(24) * groups // 24
    kept = [group != left_out for left_out in range(groups)]
    without = torch.tensor([by_hand(g[k], g0[k], group[k]) for k in kept])
    sems = (groups - 1) ** 0.5 * without.std(dim=0, correction=0)
    names = ('bias2', 'variance', 'norm2', 'cosine')
    for name, value, sem in zip(names, by_hand(g, g0, group), sems.tolist()):
        assert getattr(stats['biased'], name) == pytest.approx(value, rel=1e-9), name
        assert getattr(stats['biased'], f'{name}_sem') == pytest.approx(sem, rel=1e-4), name


def test_a_direction_that_is_lost_in_noise_is_not_a_number():
    """Gradients of mean 0: without one of the groups the squared norm comes out negative."""
    grad_fn, batches = noisy(6, mean=0)
    stats = gradient_stats(grad_fn, ['base'], 'base', batches)['base']
    assert stats.norm2 > 0 and math.isnan(stats.cosine) and math.isfinite(stats.norm2_sem)


def test_one_gradient_for_each_strategy_and_batch():
    """A strategy named twice is measured once. b exceeds a by 1 in 3 coordinates: bias^2 = 3."""
    calls = []

    def grad_fn(i, strategy):
        calls.append((i, strategy))
        return torch.full((3,), i + (strategy == 'b') + 0.0)

    stats = gradient_stats(grad_fn, ['b', 'b'], 'a', range(8))
    assert calls == [(i, s) for i in range(8) for s in 'ab']
    assert stats['b'].bias2 == pytest.approx(3)


def test_the_scale_is_what_adam_multiplies_the_gradient_by():
    """Without momentum a step is -lr scale gradient; a parameter without a state does not move."""
    moved, resting = torch.nn.Parameter(torch.randn(6)), torch.nn.Parameter(torch.randn(2))
    optimizer = torch.optim.Adam([moved, resting], lr=1.0, betas=(0.0, 0.9), eps=0.1)
    for _ in range(3):
        before = moved.detach().clone()
        moved.grad = torch.randn(6)
        optimizer.step()
    scale = adam_scale(optimizer, [moved, resting])
    assert error(scale[:6] * moved.grad, before - moved.detach()) < 1e-6
    assert scale[6:].tolist() == [0, 0]


def test_a_gradient_equals_backward_and_leaves_no_trace():
    """Zeros for what the loss does not use; BatchNorm is put back, also after an error."""
    model = torch.nn.BatchNorm1d(3)
    parameters = [*model.parameters(), torch.nn.Parameter(torch.ones(5))]
    images = torch.randn(8, 3)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), unchanged(model):
        gradient = flat_gradient(model(images).pow(3).sum(), parameters)
        raise KeyError
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in parameters)
    model(images).pow(3).sum().backward()
    wanted = torch.cat([model.weight.grad, model.bias.grad, torch.zeros(5)])
    assert torch.equal(gradient, wanted)
