"""How wrong is the gradient of a compressed step? Its bias, variance and direction.

"Accelerating Augmentation Invariance Pretraining" (NeurIPS 2024), "gradient error analysis".
g_tau is the gradient of a random batch under strategy tau, tau0 no compression:

    bias^2(tau)   = || E g_tau - E g_tau0 ||^2
    variance(tau) = E || g_tau - E g_tau ||^2             over images, views and token draws

and, ours, how far it still points the right way:

    cosine(tau)   = <E g_tau0, E g_tau> / (|| E g_tau0 || || E g_tau ||)

All of these are made of products <E a, E b>. The naive product of two means over n batches is
biased by the noise that they share: with d = g_tau - g_tau0, || mean d ||^2 adds Var(d) / n, most
of what it reports late in training. Here the batches form G groups, and only means of different
groups meet, whose noise is independent:

    <E a, E b>  ~  mean over pairs k != l of  <mean_k a, mean_l b>      unbiased, can be negative

Every batch is measured under every strategy with the same images and views, so the noise that two
strategies share cancels in the difference. Error bars: leave one group out (jackknife). How
the paper normalizes we do not know: divide by `norm2`, the squared norm of the true gradient, to
compare stages of training.

    stats = gradient_stats(grad_fn, ['p4', 'p8'], 'p4', batches)    # grad_fn(batch, tau) -> flat
    stats['p8'].bias2, stats['p8'].bias2_sem

The gradient of any module and loss will do:

    def grad_fn(batch, strategy):
        return flat_gradient(loss_of(model, batch, strategy), parameters)

    with unchanged(model):                                           # puts BatchNorm's buffers back
        stats = gradient_stats(grad_fn, ..., scale=adam_scale(optimizer, parameters))
"""
import contextlib
import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class GradStats:
    """Estimates with their standard errors, in units of the squared gradient; cosine has no unit.

    norm2 = || E g_tau0 ||^2, for scale. cosine is NaN where a squared norm is lost in noise.
    """
    bias2: float
    bias2_sem: float
    variance: float
    variance_sem: float
    norm2: float
    norm2_sem: float
    cosine: float
    cosine_sem: float
    num_batches: int


def gradient_stats(grad_fn, strategies, reference, batches, groups=4, scale=None):
    """{strategy: GradStats} of `strategies`, which need not include the reference.

    grad_fn(batch, strategy) -> flat gradient of the loss on this batch. It must not change any
    state, and repeat its draws of views for the same batch. batches: a sequence, a multiple of
    `groups`. scale: a factor that multiplies each coordinate of the gradient (see adam_scale).

    Batches are visited in order, each under every strategy before the next.
    Time: one gradient per strategy and batch. Memory: groups + 2 gradients per strategy.
    """
    batches = list(batches)
    if groups < 3 or not batches or len(batches) % groups:
        raise ValueError(f'{len(batches)} batches do not make {groups} groups of equally many; '
                         f'use at least 3 groups and a multiple of {groups} batches')
    scale = 1.0 if scale is None else scale
    n = len(batches) // groups
    order = list(dict.fromkeys([reference, *strategies]))
    means = {s: [] for s in order}                     # the mean gradient of each group
    squares = {s: [] for s in order}                   # the mean of ||g||^2 of each group

    for first in range(0, len(batches), n):
        total = dict.fromkeys(order, 0.0)
        square = dict.fromkeys(order, 0.0)
        for batch in batches[first:first + n]:
            for s in order:
                gradient = grad_fn(batch, s)
                gradient = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
                scaled = gradient * scale
                square[s] += dot(scaled, scaled)
                total[s] = total[s] + gradient
        for s in order:
            means[s].append(total[s] / n)
            squares[s].append(square[s] / n)

    metric = scale ** 2
    true = pairs(means[reference], means[reference], metric)
    result = {}
    for s in strategies:
        own = pairs(means[s], means[s], metric)
        inner = pairs(means[reference], means[s], metric)
        square = torch.tensor(squares[s], dtype=torch.float64)
        result[s] = summary(own, inner, true, square, len(batches))
    return result


def pairs(a, b, metric):
    """(G G) products <a_k, b_l> of the mean gradients of the groups."""
    rows = []
    for x in a:
        scaled = x * metric
        rows.append([dot(scaled, y) for y in b])
    return torch.tensor(rows, dtype=torch.float64)


def summary(own, inner, true, square, num_batches):
    """GradStats from the products of the groups, with jackknife errors.

    own: of tau with itself; inner: of tau0 with tau; true: of tau0 with itself.
    """
    groups = len(square)

    def estimates(kept):
        """All estimates from these groups alone."""
        def across(products):
            """The mean product of two different groups."""
            products = products[kept][:, kept]
            total = products.sum() - products.diagonal().sum()
            count = len(kept) * (len(kept) - 1)
            return total.item() / count

        norm2 = across(true)
        own2 = across(own)
        product = across(inner)
        bias2 = own2 - 2 * product + norm2
        variance = square[kept].mean().item() - own2
        lost = norm2 <= 0 or own2 <= 0
        cosine = math.nan if lost else product / math.sqrt(norm2 * own2)
        return bias2, variance, norm2, cosine

    everything = list(range(groups))
    values = estimates(everything)
    without = []
    for left_out in everything:
        kept = [k for k in everything if k != left_out]
        without.append(estimates(kept))
    fields = []
    for value, replicates in zip(values, zip(*without)):
        center = sum(replicates) / groups
        spread = sum((x - center) ** 2 for x in replicates)
        error = math.sqrt((groups - 1) / groups * spread)
        fields += [math.nan if math.isnan(error) else value, error]
    return GradStats(*fields, num_batches)


def dot(a, b):
    """In float64, a million coordinates at a time."""
    total = 0
    for x, y in zip(a.split(2 ** 20), b.split(2 ** 20)):
        product = torch.dot(x.double(), y.double())
        total += product.item()
    return total


# ---------------------------------------------------------------- the gradient of a module

def flat_gradient(loss, parameters):
    """The gradient of a loss over a list of parameters, as one vector: 0 for those it does not use.

    No .grad is touched. Across processes it is this one's own: average it over them.
    """
    gradients = torch.autograd.grad(loss, parameters, materialize_grads=True)
    return torch.cat([gradient.flatten() for gradient in gradients])


def adam_scale(optimizer, parameters):
    """Adam's metric: what it multiplies each coordinate of the gradient by, 1 / (sqrt(v) + eps).

    v is the bias-corrected second moment. 0 where Adam has no state yet: such a parameter does
    not move.
    """
    eps = optimizer.defaults['eps']
    beta2 = optimizer.defaults['betas'][1]
    scales = []
    for parameter in parameters:
        state = optimizer.state.get(parameter)
        if not state:
            scales.append(torch.zeros_like(parameter).flatten())
            continue
        steps = state['step'].to(parameter.device)
        v = state['exp_avg_sq'] / (1 - beta2 ** steps)
        scale = 1 / (v.sqrt() + eps)
        scales.append(scale.flatten())
    return torch.cat(scales)


@contextlib.contextmanager
def unchanged(module):
    """Put back what a forward pass changes in a module: the buffers of BatchNorm and the like."""
    kept = [buffer.clone() for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(module.buffers(), kept):
            buffer.copy_(value)


def self_check():
    torch.manual_seed(0)
    bias = torch.full((64,), (2 / 64) ** 0.5)              # bias^2 = 2
    batches = torch.randn(400, 2, 64)

    def grad_fn(batch, strategy):  # the noise of the batch is shared, that of the token draw is not
        shared, own = batch
        return shared if strategy == 'none' else shared + bias + 0.5 * own

    stats = gradient_stats(grad_fn, ['biased'], 'none', batches, groups=8)['biased']
    differences = bias + 0.5 * batches[:8, 1]
    naive = differences.mean(dim=0).square().sum()         # 2 more than the truth, on average
    print(f'bias^2 {stats.bias2:.2f} +- {stats.bias2_sem:.2f}, true 2, naively {naive:.2f}')
    assert abs(stats.bias2 - 2) < 0.3
    print('gradstats.py: all claims hold')


if __name__ == '__main__':
    self_check()
