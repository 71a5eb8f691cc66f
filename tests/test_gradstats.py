"""gradstats.py against stored gradients, known truths, Adam by hand, and on a ResNet."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from gradstats import adam_scale, flat_gradient, gradient_stats, unchanged

D = 50


def noisy(seed, count=24, bias2=2.0):
    """(grad_fn, batches) of which all is known, in 50 dimensions.

    g_base = 0.2 + noise of the batch. g_biased adds sqrt(bias2) to one coordinate, and half of a
    noise of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randn(count, 2, D, generator=generator, dtype=torch.float64)
    bias = torch.zeros(D, dtype=torch.float64)
    bias[3] = math.sqrt(bias2)

    def grad_fn(batch, strategy):
        shared, own = batch
        if strategy == 'base':
            return 0.2 + shared
        return 0.2 + shared + bias + 0.5 * own
    return grad_fn, batches


def products(g, g0, group, slope_metric):
    """The estimates from stored gradients (batches, coordinates): products across groups."""
    across = group[:, None] != group[None, :]

    def inner(a, b):
        return (a @ b.T)[across].mean().item()

    bias2 = inner(g - g0, g - g0)
    norm2 = inner(g0, g0)
    mean2 = inner(g, g)
    power = g.square().sum(dim=1).mean().item()               # E ||g||^2
    cosine = 0.0                                              # lost in noise
    if norm2 > 0 and mean2 > 0:
        cosine = inner(g0, g) / math.sqrt(norm2 * mean2)
    return dict(
        bias2=bias2,
        variance=power - mean2,
        mse=bias2 + power - mean2,
        norm2=norm2,
        mean2=mean2,
        inner=inner(g0, g),
        cosine=cosine,
        slope=inner(g0 * slope_metric, g),
    )


def assert_by_hand(stats, grad_fn, batches, strategy, groups, scale=1.0, rel=1e-9):
    """Estimates, and the jackknife: sem^2 = (G - 1) / G sum (estimate without a group - mean)^2."""
    g = torch.stack([grad_fn(batch, strategy).double() for batch in batches])
    g0 = torch.stack([grad_fn(batch, 'base').double() for batch in batches])
    slope_metric = 1 / g.square().mean(dim=0).sqrt()
    slope_metric = slope_metric / scale ** 2                  # has no part in the scale
    g = g * scale
    g0 = g0 * scale
    group = torch.arange(len(g)) * groups // len(g)
    expected = products(g, g0, group, slope_metric)
    without = []
    for left_out in range(groups):
        kept = group != left_out
        without.append(products(g[kept], g0[kept], group[kept], slope_metric))
    for name, value in expected.items():
        values = torch.tensor([estimates[name] for estimates in without])
        sem = math.sqrt((groups - 1) * values.var(correction=0))
        assert getattr(stats, name) == pytest.approx(value, rel=rel, abs=rel), name
        assert getattr(stats, f'{name}_sem') == pytest.approx(sem, rel=1e-3, abs=1e-5), name


# ---- the estimates

@pytest.mark.parametrize('groups', (3, 4, 24))
def test_estimates_equal_stored_gradients(groups):
    grad_fn, batches = noisy(seed=0)
    stats = gradient_stats(grad_fn, ['base', 'biased'], 'base', batches, groups)
    assert list(stats) == ['base', 'biased']
    assert_by_hand(stats['biased'], grad_fn, batches, 'biased', groups)
    assert stats['biased'].slope0 == pytest.approx(stats['base'].slope)
    assert abs(stats['base'].bias2) < 1e-12
    assert stats['base'].cosine == pytest.approx(1)


def test_a_scale_is_a_metric():
    """That of the scaled gradients, but for slope, which has a metric of its own."""
    grad_fn, batches = noisy(seed=0)
    scale = torch.linspace(0.5, 2, D, dtype=torch.float64)
    stats = gradient_stats(grad_fn, ['biased'], 'base', batches, scale=scale)
    assert_by_hand(stats['biased'], grad_fn, batches, 'biased', groups=4, scale=scale)


def test_float32_gradients_lose_nothing():
    exact, batches = noisy(seed=0)

    def grad_fn(batch, strategy):
        return exact(batch, strategy).float()

    stats = gradient_stats(grad_fn, ['biased'], 'base', batches)['biased']
    assert_by_hand(stats, grad_fn, batches, 'biased', groups=4, rel=1e-6)


@pytest.fixture(scope='module')
def repeats():
    """200 independent estimates of what noisy() knows, of 8 groups of 3 batches."""
    results = []
    for seed in range(200):
        grad_fn, batches = noisy(seed)
        stats = gradient_stats(grad_fn, ['biased'], 'base', batches, groups=8)
        results.append(stats['biased'])
    return results


TRUTH = [
    ('bias2', 2.0),
    ('variance', D * 1.25),                                   # 1 shared, 0.25 of its own
    ('mse', 2 + D * 1.25),
    ('norm2', D * 0.04),
    ('inner', D * 0.04 + 0.2 * math.sqrt(2)),
    ('mean2', D * 0.04 + 0.4 * math.sqrt(2) + 2),
]


@pytest.mark.parametrize('name, truth', TRUTH)
def test_estimates_are_unbiased(name, truth, repeats):
    """The naive ||mean d||^2 of 24 batches would add 50 0.25 / 24 = 0.5 to bias^2."""
    values = torch.tensor([getattr(stats, name) for stats in repeats])
    assert abs(values.mean() - truth) < 3.5 * values.std() / math.sqrt(200)


@pytest.mark.parametrize('name, truth', TRUTH)
def test_error_bars_cover_the_truth(name, truth, repeats):
    """Eight groups: a Student t of 7 degrees, P(|t| < 1) = 0.649 and P(|t| < 2.365) = 0.95.

    200 repeats find these shares to 3.5 sqrt(p (1 - p) / 200), and 0.02 as no group is Gaussian.
    """
    values = torch.tensor([getattr(stats, name) for stats in repeats])
    sems = torch.tensor([getattr(stats, f'{name}_sem') for stats in repeats])
    t = (values - truth).abs() / sems
    for limit, p in ((1.0, 0.649), (2.365, 0.95)):
        share = (t < limit).double().mean().item()
        assert abs(share - p) < 3.5 * math.sqrt(p * (1 - p) / 200) + 0.02


def test_direction_by_closed_form():
    """cosine and slope are ratios, unbiased only for many batches: 4,000 here.

    Two kinds of coordinate: 49 of mean 0.2, one of mean m = 0.2 + sqrt(2); the true gradient is 0.2
    in each, the mean square of a coordinate its mean squared + 1.25.
    """
    grad_fn, batches = noisy(seed=0, count=4000)
    stats = gradient_stats(grad_fn, ['biased'], 'base', batches, groups=8)['biased']
    m = 0.2 + math.sqrt(2)
    inner = 49 * 0.04 + 0.2 * m
    mean2 = 49 * 0.04 + m ** 2
    cosine = inner / math.sqrt(2 * mean2)
    slope = 49 * 0.04 / math.sqrt(0.04 + 1.25) + 0.2 * m / math.sqrt(m ** 2 + 1.25)
    assert abs(stats.cosine - cosine) < 3 * stats.cosine_sem < 0.05
    assert abs(stats.slope - slope) < 3 * stats.slope_sem < 0.1


def test_one_gradient_for_each_strategy_and_batch():
    """A strategy named twice is measured once. b exceeds a by 1 in 3 coordinates: bias^2 = 3."""
    calls = []

    def grad_fn(batch, strategy):
        calls.append((batch, strategy))
        return torch.full((3,), float(batch) + (strategy == 'b'))

    stats = gradient_stats(grad_fn, ['a', 'b', 'b'], 'a', range(8))
    assert sorted(calls) == [(i, strategy) for i in range(8) for strategy in 'ab']
    assert stats['b'].bias2 == pytest.approx(3)
    assert stats['b'].bias2_sem == pytest.approx(0, abs=1e-6)


def test_gradients_of_the_caller_are_left_alone():
    gradients = {strategy: torch.randn(5) for strategy in 'ab'}
    before = {strategy: gradient.clone() for strategy, gradient in gradients.items()}

    def grad_fn(batch, strategy):
        return gradients[strategy]

    gradient_stats(grad_fn, ['a', 'b'], 'a', range(8))
    for strategy, gradient in gradients.items():
        assert torch.equal(gradient, before[strategy])


@pytest.mark.parametrize('count, groups', [
    (0, 4),
    (7, 4),
    (9, 4),
    (8, 2),
])
def test_too_few_batches(count, groups):
    with pytest.raises(ValueError, match=f'{count} batches do not make {groups} groups'):
        gradient_stats(None, ['a'], 'a', range(count), groups)


# ---- the gradient of a module

def small_model():
    return torch.nn.Sequential(torch.nn.Linear(6, 8), torch.nn.BatchNorm1d(8),
                               torch.nn.GELU(), torch.nn.Linear(8, 3))


def test_adam_scale_by_hand():
    """Gradients 3, then 4, beta2 = 0.5: v = (0.5 0.5 9 + 0.5 16) / (1 - 0.25) = 13.667."""
    parameter = torch.nn.Parameter(torch.zeros(1))
    resting = torch.nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.Adam([parameter, resting], betas=(0.9, 0.5), eps=0.1)
    for gradient in (3.0, 4.0):
        parameter.grad = torch.tensor([gradient])
        optimizer.step()
    scale = adam_scale(optimizer, [parameter, resting])
    moved = 1 / (math.sqrt(10.25 / 0.75) + 0.1)
    assert scale.tolist() == pytest.approx([moved, 0, 0])


def test_unchanged_puts_buffers_back_also_after_an_error():
    model = small_model()
    before = [buffer.clone() for buffer in model.buffers()]
    with pytest.raises(KeyError):
        with unchanged(model):
            model(torch.randn(5, 6))
            assert not torch.equal(before[0], model[1].running_mean)
            raise KeyError
    for old, new in zip(before, model.buffers()):
        assert torch.equal(old, new)


def test_a_resnet_that_sgd_trains():
    """The strategies are the sides of the images, and the oracle is .grad of backward.

    Of groups of one batch, the variance is the usual one. Measuring leaves no trace: no .grad, and
    BatchNorm's statistics are put back.
    """
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    batches = torch.randn(3, 4, 3, 32, 32)
    labels = torch.arange(4)

    def loss_of(images, side):
        images = F.interpolate(images, (side, side))
        return F.cross_entropy(model(images), labels)

    def grad_fn(batch, side):
        return flat_gradient(loss_of(batch, side), parameters)

    before = copy.deepcopy(model.state_dict())
    with unchanged(model):
        stats = gradient_stats(grad_fn, [16], 32, batches, groups=3)[16]
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in parameters)

    gradients = []
    for batch in batches:
        optimizer.zero_grad()
        loss_of(batch, 16).backward()
        gradients.append(torch.cat([p.grad.flatten() for p in parameters]).double())
    variance = torch.stack(gradients).var(dim=0).sum().item()
    assert stats.variance == pytest.approx(variance, rel=1e-6)
    assert torch.equal(grad_fn(batches[2], 16).double(), gradients[2])
