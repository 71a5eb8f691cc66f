"""gradstats.py against stored gradients, known truths, Adam by hand, and on a ResNet."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torchvision.models.resnet import BasicBlock, ResNet

from gradstats import adam_scale, flat_gradient, gradient_stats, unchanged

D = 50


def noisy(seed, count=24, dtype=torch.float64):
    """(grad_fn, batches): g_base is 0.2 + noise of the batch, in 50 dimensions.

    g_biased adds sqrt(2) to one coordinate, and half of a noise of its own.
    """
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randn(count, 2, D, generator=generator, dtype=torch.float64)
    bias = torch.zeros(D)
    bias[3] = math.sqrt(2)

    def grad_fn(batch, strategy):
        shared, own = batch
        gradient = 0.2 + shared
        if strategy == 'biased':
            gradient = gradient + bias + 0.5 * own
        return gradient.to(dtype)
    return grad_fn, batches


def products(g, g0, group, metric, own_metric):
    """The estimates from stored gradients (batches, coordinates): products across groups."""
    across = group[:, None] != group[None, :]

    def inner(a, b, metric=metric):
        return (a * metric @ b.T)[across].mean().item()

    bias2 = inner(g - g0, g - g0)
    norm2 = inner(g0, g0)
    mean2 = inner(g, g)
    variance = (g.square() * metric).sum(dim=1).mean().item() - mean2
    lost = min(norm2, mean2) <= 0                             # in noise
    cosine = 0 if lost else inner(g0, g) / math.sqrt(norm2 * mean2)
    return dict(bias2=bias2, variance=variance, mse=bias2 + variance, norm2=norm2, mean2=mean2,
                inner=inner(g0, g), cosine=cosine, slope=inner(g0, g, own_metric))


@pytest.mark.parametrize('groups, dtype, scale, rel', [
    (3, torch.float64, None, 1e-9),
    (4, torch.float64, None, 1e-9),
    (24, torch.float64, None, 1e-9),
    (4, torch.float64, torch.linspace(0.5, 2, D, dtype=torch.float64), 1e-9),
    (4, torch.float32, None, 1e-6),
])
def test_estimates_equal_stored_gradients(groups, dtype, scale, rel):
    """The jackknife: sem^2 = (G - 1) / G sum (estimate without a group - mean)^2."""
    grad_fn, batches = noisy(0, dtype=dtype)
    stats = gradient_stats(grad_fn, ['base', 'biased'], 'base', batches, groups, scale)
    assert list(stats) == ['base', 'biased']
    assert stats['biased'].slope0 == pytest.approx(stats['base'].slope)
    assert abs(stats['base'].bias2) < 1e-12
    assert stats['base'].cosine == pytest.approx(1)

    g0 = torch.stack([grad_fn(batch, 'base').double() for batch in batches])
    g = torch.stack([grad_fn(batch, 'biased').double() for batch in batches])
    metric = torch.ones(D) if scale is None else scale.square()
    own_metric = 1 / g.square().mean(dim=0).sqrt()            # has no part in the scale
    group = torch.arange(len(g)) * groups // len(g)
    expected = products(g, g0, group, metric, own_metric)
    without = []
    for left_out in range(groups):
        kept = group != left_out
        without.append(products(g[kept], g0[kept], group[kept], metric, own_metric))
    for name, value in expected.items():
        values = torch.tensor([estimates[name] for estimates in without])
        sem = math.sqrt((groups - 1) * values.var(correction=0))
        assert getattr(stats['biased'], name) == pytest.approx(value, rel=rel, abs=rel), name
        found = getattr(stats['biased'], f'{name}_sem')
        assert found == pytest.approx(sem, rel=1e-3, abs=1e-5), name


@pytest.fixture(scope='module')
def repeats():
    """200 independent estimates of what noisy() knows, of 8 groups of 3 batches."""
    results = []
    for seed in range(200):
        grad_fn, batches = noisy(seed)
        stats = gradient_stats(grad_fn, ['biased'], 'base', batches, groups=8)
        results.append(stats['biased'])
    return results


@pytest.mark.parametrize('name, truth', [
    ('bias2', 2),
    ('variance', D * 1.25),                                   # 1 shared, 0.25 of its own
    ('mse', 2 + D * 1.25),
    ('norm2', D * 0.04),
    ('inner', D * 0.04 + 0.2 * math.sqrt(2)),
    ('mean2', D * 0.04 + 0.4 * math.sqrt(2) + 2),
])
def test_estimates_are_unbiased_and_error_bars_cover_the_truth(name, truth, repeats):
    """The naive ||mean d||^2 of 24 batches would add 50 0.25 / 24 = 0.5 to bias^2.

    Eight groups: a Student t of 7 degrees, P(|t| < 1) = 0.649 and P(|t| < 2.365) = 0.95, and 0.02
    as no group is Gaussian.
    """
    values = torch.tensor([getattr(stats, name) for stats in repeats])
    assert abs(values.mean() - truth) < 3.5 * values.std() / math.sqrt(200)
    sems = torch.tensor([getattr(stats, f'{name}_sem') for stats in repeats])
    t = (values - truth).abs() / sems
    for limit, p in ((1.0, 0.649), (2.365, 0.95)):
        share = (t < limit).double().mean().item()
        assert abs(share - p) < 3.5 * math.sqrt(p * (1 - p) / 200) + 0.02


def test_direction_by_closed_form():
    """Ratios are unbiased only for many batches.

    49 coordinates have the mean 0.2, one m = 0.2 + sqrt(2); the true gradient is 0.2 in each, the
    mean square of a coordinate its mean squared + 1.25.
    """
    grad_fn, batches = noisy(0, count=4000)
    stats = gradient_stats(grad_fn, ['biased'], 'base', batches, groups=8)['biased']
    m = 0.2 + math.sqrt(2)
    cosine = (49 * 0.04 + 0.2 * m) / math.sqrt(2 * (49 * 0.04 + m ** 2))
    slope = 49 * 0.04 / math.sqrt(0.04 + 1.25) + 0.2 * m / math.sqrt(m ** 2 + 1.25)
    assert abs(stats.cosine - cosine) < 3 * stats.cosine_sem < 0.05
    assert abs(stats.slope - slope) < 3 * stats.slope_sem < 0.1


def test_one_gradient_for_each_strategy_and_batch_is_left_as_it_was():
    """A strategy named twice is measured once. b exceeds a by 1 in 3 coordinates: bias^2 = 3."""
    gradients = {(i, s): torch.full((3,), i + (s == 'b') + 0.0) for i in range(8) for s in 'ab'}
    before = copy.deepcopy(gradients)
    calls = []

    def grad_fn(*call):
        calls.append(call)
        return gradients[call]

    stats = gradient_stats(grad_fn, ['a', 'b', 'b'], 'a', range(8))
    assert sorted(calls) == sorted(gradients)
    assert stats['b'].bias2 == pytest.approx(3)
    assert stats['b'].bias2_sem == pytest.approx(0, abs=1e-6)
    assert all(torch.equal(gradients[call], before[call]) for call in calls)


@pytest.mark.parametrize('count, groups', [(0, 4), (7, 4), (8, 2)])
def test_too_few_batches(count, groups):
    with pytest.raises(ValueError, match=f'{count} batches do not make {groups} groups'):
        gradient_stats(None, ['a'], 'a', range(count), groups)


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


def test_the_gradient_of_a_resnet_equals_backward_and_leaves_no_trace():
    """No .grad, and BatchNorm's statistics are put back, also after an error."""
    model = ResNet(BasicBlock, [1, 1, 1, 1], num_classes=10)
    parameters = list(model.parameters())
    images = torch.randn(4, 3, 32, 32)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError):
        with unchanged(model):
            loss = F.cross_entropy(model(images), torch.arange(4))
            gradient = flat_gradient(loss, parameters)
            assert model.bn1.num_batches_tracked == 1
            raise KeyError
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name])
    assert all(parameter.grad is None for parameter in parameters)

    F.cross_entropy(model(images), torch.arange(4)).backward()
    assert torch.equal(gradient, torch.cat([p.grad.flatten() for p in parameters]))
