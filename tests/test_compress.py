import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, strategies as st
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.layers.patch_dropout import PatchDropoutWithIndices
from torch.utils.flop_counter import FlopCounterMode

from compress import (Compression, drop_tokens, forward_flops, local_side, num_keep, pi_resize, random_keep, resize_matrix,
                      resize_pos_embed, sample_cost, training_flops)
from losses import DINO, MoCo, SimCLR
from vit import ViT

SIZES = (20, 24, 30, 40, 48)


# ---- Compression

@given(st.integers(1, 500), st.floats(0, 0.999, allow_subnormal=False))
def test_compression_prints_and_parses(patch_size, drop_rate):
    compression = Compression(patch_size, drop_rate)
    assert Compression.parse(str(compression)) == compression


def test_compression_names():
    assert str(Compression(24, 0.5)) == 'p24-drop0.50'
    assert str(Compression(24)) == 'p24'
    assert Compression.parse('p24-drop0.5') == Compression(24, 0.5)
    assert len({Compression(24, 0.5), Compression.parse('p24-drop0.50')}) == 1


@pytest.mark.parametrize('text', ['', '24', 'p', 'p24-0.5', 'p24-drop', 'p24-drop1', 'p24-drop1.5', 'p0', 'p24-drop-0.1', 'p2.5'])
def test_compression_refuses(text):
    with pytest.raises(ValueError, match='compression|outside|whole number'):
        Compression.parse(text)


# ---- token dropout

@given(st.integers(1, 1000), st.integers(0, 99))
def test_num_keep_is_the_exact_rounded_product(n, percent):
    hundredths = n * (100 - percent)  # exact
    kept = num_keep(n, percent / 100)
    assert kept == 1 or abs(100 * kept - hundredths) <= 50  # the nearest whole number; halves may go either way
    assert kept >= 1 and (kept > 1 or hundredths <= 150)


def test_num_keep_where_truncation_loses_a_token():
    assert [num_keep(n, p) for n, p in ((225, 0.8), (100, 0.8), (100, 0.9), (25, 0.8), (9, 0.99))] == [45, 20, 10, 5, 1]


def test_random_keep_is_uniform_without_replacement():
    ids = random_keep(20_000, 49, 0.75, torch.Generator().manual_seed(0))
    assert ids.shape == (20_000, 12)
    assert (ids.sort(dim=1).values.diff(dim=1) > 0).all()
    counts = torch.bincount(ids.flatten(), minlength=49).double()
    p = 12 / 49
    z = (counts - 20_000 * p) / math.sqrt(20_000 * p * (1 - p))
    assert z.abs().max() < 3.5
    # pairs too: a cyclic shift of one fixed set would pass the test above
    both = ((ids == 3).any(1) & (ids == 4).any(1)).double().mean()
    expected = 12 * 11 / (49 * 48)
    assert abs(both - expected) < 3.5 * math.sqrt(expected * (1 - expected) / 20_000)


def test_random_keep_repeats_with_the_generator():
    draws = [random_keep(4, 100, 0.5, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)]
    assert torch.equal(draws[0], draws[1]) and not torch.equal(draws[0], draws[2])


def test_drop_tokens_agrees_with_timm():
    tokens = torch.randn(8, 1 + 36, 5)
    kept, ids = PatchDropoutWithIndices(prob=0.5, num_prefix_tokens=1)(tokens)
    assert torch.equal(drop_tokens(tokens[:, 1:], ids), kept[:, 1:])


# ---- patch scaling

@pytest.mark.parametrize('interpolation, antialias', [('bilinear', False), ('bilinear', True), ('bicubic', False), ('bicubic', True)])
@pytest.mark.parametrize('size', (8, 12, 20, 24, 30, 40, 48))
def test_pi_resize_equals_timm(size, interpolation, antialias):
    kernel = torch.randn(8, 3, 16, 16)
    ours = pi_resize(kernel, size, interpolation, antialias)
    theirs = resample_patch_embed(kernel, [size, size], interpolation, antialias)
    assert (ours - theirs).abs().max() < 1e-5 * max(1, theirs.abs().max())  # timm inverts in float32


@pytest.mark.parametrize('size', SIZES)
def test_tokens_of_enlarged_patches_are_preserved(size):
    kernel, patch = torch.randn(64, 3, 16, 16), torch.randn(100, 3, 16, 16)
    token = F.conv2d(patch, kernel).flatten(1)
    large = F.interpolate(patch, (size, size), mode='bilinear')
    assert (F.conv2d(large, pi_resize(kernel, size)).flatten(1) - token).norm() < 1e-5 * token.norm()


@pytest.mark.parametrize('size', (8, 24, 40))
def test_resized_kernel_sees_the_least_squares_patch(size):
    # <x, w_q> = <B+ x, w> for every x at size q, by an independent least-squares solve
    kernel, patch = torch.randn(4, 1, 16, 16, dtype=torch.float64), torch.randn(10, 1, size, size, dtype=torch.float64)
    small = torch.linalg.lstsq(resize_matrix(16, size), patch.flatten(1).T, driver='gelsd').solution.T
    expected = small @ kernel.flatten(1).T
    assert (patch.flatten(1) @ pi_resize(kernel, size).flatten(1).T - expected).abs().max() < 1e-10


def test_resize_matrix_is_the_resize():
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    matrix = resize_matrix(6, 9)
    assert matrix.dtype == torch.float64 and matrix.shape == (81, 36)
    assert torch.allclose(matrix.sum(1), torch.ones(81, dtype=torch.float64))
    assert (matrix @ x.flatten() - F.interpolate(x, (9, 9), mode='bilinear').flatten()).abs().max() < 1e-14
    assert resize_matrix(6, 9) is matrix


def test_pi_resize_gradient_identity_and_precision():
    kernel = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w: pi_resize(w, 6), kernel)
    assert pi_resize(kernel, 4) is kernel
    single = kernel.detach().float()
    with torch.autocast('cpu', torch.bfloat16):
        assert (pi_resize(single, 6) - pi_resize(kernel, 6)).abs().max() < 1e-5


def test_matrices_built_under_inference_mode_train_later():
    with torch.inference_mode():
        pi_resize(torch.randn(1, 1, 5, 5), 7)
    kernel = torch.randn(1, 1, 5, 5, requires_grad=True)
    pi_resize(kernel, 7).sum().backward()
    assert kernel.grad.abs().sum() > 0


@pytest.mark.parametrize('antialias', (False, True))
def test_resize_pos_embed_equals_timm(antialias):
    pos = torch.randn(1, 15 * 15, 32)
    for grid in ((10, 10), (5, 5), (20, 12)):
        theirs = resample_abs_pos_embed(pos, list(grid), [15, 15], num_prefix_tokens=0, antialias=antialias)
        assert (resize_pos_embed(pos, (15, 15), grid, antialias=antialias) - theirs).abs().max() < 1e-6
    rectangle = torch.arange(6.0).reshape(1, 6, 1)
    assert resize_pos_embed(rectangle, (2, 3), (2, 3)) is rectangle


def test_local_side():
    assert [local_side(96, p) for p in (16, 20, 24, 30, 40, 48)] == [96, 100, 96, 90, 80, 96]
    assert local_side(16, 48) == 48


# ---- cost

def test_forward_flops_of_vit_base():
    for side, macs in ((224, 17.56e9), (240, 20.27e9)):
        tokens = (side // 16) ** 2
        assert abs(sum(forward_flops(tokens, 768, 12, patch_dim=3 * 256)) / 2 - macs) < 0.01e9


@pytest.mark.parametrize('text, expected', [('p16-drop0.50', .492), ('p16-drop0.90', .103), ('p20', .633), ('p24-drop0.50', .223),
                                            ('p30-drop0.90', .036), ('p40', .163), ('p48-drop0.90', .019)])
def test_relative_forward_cost_of_vit_base(text, expected):
    def flops(c):
        tokens = num_keep((240 // c.patch_size) ** 2, c.drop_rate)
        return sum(forward_flops(tokens, 768, 12, patch_dim=3 * c.patch_size ** 2))
    ratio = flops(Compression.parse(text)) / flops(Compression(16))
    if 'drop' not in text:  # the reference figures are of dense forwards, the dropped tokens embedded
        assert abs(ratio - expected) < 6e-4
    else:
        assert expected - 0.02 < ratio < expected + 6e-4


METHODS = {
    'moco': lambda e, **kw: MoCo(e, hidden=96, out_dim=32, **kw),
    'simclr': lambda e, **kw: SimCLR(e, hidden=96, out_dim=32, **kw),
    'dino': lambda e, **kw: DINO(e, hidden=96, bottleneck=32, out_dim=128, local_crops=2, local_size=16, **kw),
}


@pytest.mark.parametrize('frozen', (False, True))
@pytest.mark.parametrize('drop_branch', ('query', 'both'))
@pytest.mark.parametrize('symmetric', (False, True))
@pytest.mark.parametrize('name', METHODS)
def test_training_flops_equal_torchs_counter(name, symmetric, drop_branch, frozen):
    encoder = ViT(img_size=48, patch_size=4, in_chans=1, embed_dim=64, depth=2, num_heads=2, freeze_patch_embed=frozen)
    method = METHODS[name](encoder, symmetric=symmetric, drop_branch=drop_branch)
    b = 2
    for compression in (Compression(4), Compression(4, 0.75), Compression(8), Compression(12, 0.4)):
        side = local_side(16, compression.patch_size)
        views = [torch.randn(b, 1, 48, 48)] * 2 + [torch.randn(b, 1, side, side)] * (2 if name == 'dino' else 0)
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            method(views, compression.patch_size, compression.drop_rate)[0].backward()
        counted = counter.get_total_flops() / b
        analytic = training_flops(name, encoder.sizes, compression, **method.cost_settings)
        # the counter also sees the resized kernel (per step, not per sample), the cosines of the b samples and the
        # gradient that the first block sends to the position table
        assert abs(counted / analytic - 1) < (0.15 if compression.patch_size != 4 else 5e-3)


def test_sample_cost_branches():
    sizes = dict(img_size=240, embed_dim=768, depth=12)
    base, dropped = Compression(16), Compression(16, 0.9)
    cost = {s: sample_cost('moco', sizes, dropped, base, symmetric=s) for s in (False, True)}
    assert cost[False] == cost[True]  # both directions cost double under every strategy
    assert 0.25 < cost[False] < 0.35  # the key's full forward, a quarter of a step, stays
    assert sample_cost('moco', sizes, dropped, base, drop_branch='both') < 0.11
    assert 0.5 < sample_cost('simclr', sizes, dropped, base) < 0.56  # the other view is trained at all tokens
    for method in ('moco', 'simclr', 'dino'):
        assert sample_cost(method, sizes, base, base) == 1
    with pytest.raises(ValueError, match='byol.*moco, simclr, dino'):
        sample_cost('byol', sizes, base, base)
