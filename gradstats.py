"""How wrong is the gradient of a compressed step? Squared bias and variance, without bias of their own.

Paper, "Gradient error analysis". With g_tau the gradient of a random batch under strategy tau, tau0 uncompressed:

    bias^2(tau)   = || E g_tau - E g_tau0 ||^2
    variance(tau) = E || g_tau - E g_tau ||^2              over images, views and token draws

From n batches, each measured under every strategy (paired: d_i = g_tau,i - g_tau0,i of the same images and views):

    bias^2     ~  sum_{i != j} d_i . d_j / (n (n - 1))      a U-statistic: unbiased, and it can be negative
    variance   ~  sum_i || g_i - mean g ||^2 / (n - 1)

The naive || mean d ||^2 adds Var(d) / n, most of what it reports late in training. The paper does not give its
normalization: divide by `norm2`, the squared norm of the true uncompressed gradient, to compare stages.

A step under tau draws its tokens once, so this noise counts in the variance; the bias is that of the mean over
draws, and one draw per batch estimates it without bias.

    stats = gradient_stats(grad_fn, ['p4', 'p8'], 'p4', batches)      # grad_fn(batch, strategy) -> flat tensor
    stats['p8'].bias2, stats['p8'].bias2_sem
"""
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GradStats:
    """Estimates with their standard errors over independent groups of batches; in squared units of the gradient.

    mse = E || g_tau - E g_tau0 ||^2 = bias2 + variance; norm2 = || E g_tau0 ||^2, for scale.
    """
    bias2: float
    bias2_sem: float
    variance: float
    variance_sem: float
    mse: float
    mse_sem: float
    norm2: float
    norm2_sem: float
    num_batches: int


def gradient_stats(grad_fn, strategies, reference, batches, groups=4):
    """{strategy: GradStats} of `strategies`, the reference among them or not.

    grad_fn(batch, strategy) -> flat gradient of the loss on this batch; it must not change any state, and repeat
    its draws of views for the same batch. batches: a sequence, a multiple of `groups` and at least 2 per group.
    An estimate is the mean of those of the groups, its error their standard deviation / sqrt(groups).

    Time: one gradient per strategy and batch. Memory: two gradients, and a float64 sum per strategy.
    """
    batches = list(batches)
    if groups < 2 or len(batches) % groups or len(batches) < 2 * groups:
        raise ValueError(f'{len(batches)} batches do not make {groups} groups of equally many, at least 2; '
                         f'use a multiple of {groups} from {2 * groups} on')
    n = len(batches) // groups
    others = [s for s in dict.fromkeys(strategies) if s != reference]
    estimates = {s: [] for s in (*others, reference)}

    for group in range(groups):
        total = {}                                      # sum of g, float64
        squares = dict.fromkeys(estimates, 0.0)         # sum of ||g||^2
        differences = dict.fromkeys(others, 0.0)        # sum of ||g - g0||^2
        for batch in batches[group * n:(group + 1) * n]:
            base = grad_fn(batch, reference)
            base_square = dot(base, base)
            add(total, reference, base)
            squares[reference] += base_square
            for s in others:
                gradient = grad_fn(batch, s)
                square = dot(gradient, gradient)
                add(total, s, gradient)
                squares[s] += square
                differences[s] += square - 2 * dot(gradient, base) + base_square
        norm2 = u_statistic(total[reference], squares[reference], n)
        for s in estimates:
            variance = (squares[s] - dot(total[s], total[s]) / n) / (n - 1)
            bias2 = u_statistic(total[s].sub_(total[reference]), differences[s], n) if s != reference else 0.0
            estimates[s].append((bias2, variance, norm2))

    def summary(values):
        mean = sum(values) / groups
        return mean, math.sqrt(sum((v - mean) ** 2 for v in values) / (groups - 1) / groups)

    result = {}
    for s in strategies:
        bias2, variance, norm2 = zip(*estimates[s])
        mse = [a + b for a, b in zip(bias2, variance)]
        result[s] = GradStats(*summary(bias2), *summary(variance), *summary(mse), *summary(norm2), len(batches))
    return result


def dot(a, b):
    """In float64, a million coordinates at a time."""
    return sum(torch.dot(x.double(), y.double()).item() for x, y in zip(a.split(2 ** 20), b.split(2 ** 20)))


def add(total, key, vector):
    total[key] = total[key].add_(vector) if key in total else vector.to(torch.float64, copy=True)


def u_statistic(total, squares, n):
    """|| E v ||^2 from sum v_i and sum ||v_i||^2: the mean of v_i . v_j over i != j."""
    return (dot(total, total) - squares) / (n * (n - 1))


if __name__ == '__main__':
    generator = torch.Generator().manual_seed(0)
    truth, bias = torch.ones(64) / 4, torch.ones(64) * (2 / 64) ** 0.5     # bias^2 = 2, || E g ||^2 = 4
    batches = [(torch.randn(64, generator=generator), torch.randn(64, generator=generator)) for _ in range(400)]

    def grad_fn(batch, strategy):  # the noise of the batch is shared, that of the token draw is not
        shared, own = batch
        return truth + shared if strategy == 'none' else truth + shared + bias + 0.5 * own

    s = gradient_stats(grad_fn, ['none', 'biased'], 'none', batches)['biased']
    naive = (torch.stack([grad_fn(b, 'biased') - grad_fn(b, 'none') for b in batches[:8]]).mean(0).square().sum()).item()
    print(f'bias^2    {s.bias2:6.3f} +- {s.bias2_sem:.3f}   (true 2; the naive estimate from 8 batches: {naive:.2f}, expected 4)')
    print(f'variance  {s.variance:6.2f} +- {s.variance_sem:.2f}    (true 80)')
    print(f'norm^2    {s.norm2:6.3f} +- {s.norm2_sem:.3f}   (true 4)')
    assert abs(s.bias2 - 2) < 0.3 and abs(s.variance - 80) < 3 and abs(s.norm2 - 4) < 1
    print('gradstats.py: all claims hold')
