"""compress.py against timm, exact fractions, least squares and torch's FLOP counter."""
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import error
from methods import build, each_method, refused, shrunk
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress import (Compression, num_keep, pass_flops, patches_per_side, pi_resize,
                      random_keep, resize_matrix, resize_pos_embed, sample_cost)
from images.views import Augmentation, recipe
from losses import MoCo, SimCLR
from vit import ViT, vit_base

PATCH_SIZES = (16, 20, 24, 30, 40, 48)                # the paper's


def test_a_name_is_short_and_is_read_back():
    assert str(Compression(24, 0.5)) == 'p24-drop0.50'
    assert Compression.parse(' p24-drop0.5') == Compression(24, 0.5)
    for rate in (0, 0.125, 1 / 3, 1e-5):
        assert Compression.parse(str(Compression(16, rate))) == Compression(16, rate)


def test_num_keep_is_the_nearest_whole_number():
    """In exact fractions. Truncation would keep 44 of 225 (1 - 0.8) = 45. One always stays."""
    for n in (1, 49, 196, 225):
        for percent in range(100):
            exact = Fraction(n * (100 - percent), 100)
            assert abs(num_keep(n, percent / 100) - max(exact, 1)) <= 0.5


def test_random_keep_is_uniform_without_replacement():
    """12 of 49 tokens: each with p = 12/49, each pair with 12 11 / (49 48)."""
    kept = F.one_hot(random_keep(20_000, 49, 0.75), 49).sum(dim=1).double()     # 1: it stays
    assert kept.max() == 1 and kept.sum() == 20_000 * 12
    pair = kept[:, 3] * kept[:, 4]
    for share, p in ((kept.mean(dim=0), 12 / 49), (pair.mean(), 12 * 11 / (49 * 48))):
        sigma = math.sqrt(p * (1 - p) / 20_000)
        assert (share - p).abs().max() < 3.5 * sigma


def test_pi_resize_equals_timm():
    """timm inverts in float32. Measured: 3e-6 of the largest weight."""
    kernel = torch.randn(8, 3, 16, 16)
    for size in (8, *PATCH_SIZES):
        for how in (('bilinear', False), ('bicubic', True)):
            theirs = resample_patch_embed(kernel, [size, size], *how)
            largest = max(1, theirs.abs().max())
            assert error(pi_resize(kernel, size, *how), theirs) < 1e-5 * largest


def test_a_large_patch_is_read_as_its_least_squares_picture():
    """<x, w_q> = <pinv(B) x, w> for any x. Measured: 1e-14."""
    for old, new in [(4, 8), (4, 16), (16, 8), *((16, q) for q in PATCH_SIZES[1:])]:
        kernel = torch.randn(6, 1, old, old, dtype=torch.float64)
        patches = torch.randn(10, 1, new, new, dtype=torch.float64)
        truth = shrunk(patches, new, old).flatten(1) @ kernel.flatten(1).T
        tokens = patches.flatten(1) @ pi_resize(kernel, new).flatten(1).T
        assert (tokens - truth).norm() < 1e-13 * truth.norm()


def test_pi_resize_has_a_gradient_and_is_float32_under_autocast():
    """Though inference cached the matrix. A bfloat16 product would be off by 3e-3."""
    kernel = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        pi_resize(kernel, 7)
    assert torch.autograd.gradcheck(pi_resize, (kernel, 7))
    assert pi_resize(kernel, 4) is kernel and resize_matrix(4, 7) is resize_matrix(4, 7)
    with torch.autocast('cpu', torch.bfloat16):
        assert error(pi_resize(kernel.float(), 7), pi_resize(kernel, 7)) < 1e-6


def test_resize_pos_embed_equals_timm():
    pos = torch.randn(1, 15 * 15, 32)
    theirs = resample_abs_pos_embed(pos, [20, 12], [15, 15], 0, antialias=False)
    assert error(resize_pos_embed(pos, (15, 15), (20, 12)), theirs) < 1e-6
    assert resize_pos_embed(pos, (25, 9), (25, 9)) is pos


def test_tokens_of_the_paper():
    """Patch 30 and 75 % dropout both leave 49: (210 / 30)^2 = 196 / 4. A tie goes up."""
    assert [patches_per_side(224, p) for p in PATCH_SIZES] == [14, 11, 9, 7, 6, 5]
    assert [patches_per_side(side, 48) for side in (120, 16)] == [3, 1]


# ---------------------------------------------------------------- costs

def counted(method, sides, tau, b):
    """By torch, of a step on b images."""
    views = [torch.randn(b, 1, side, side) for side in sides]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        method(views, tau.patch_size, tau.drop_rate)[0].backward()
    return counter.get_total_flops()


@each_method
def test_flops_of_the_passes_equal_torchs_counter(name):
    """Of 4 images less 2: what a step does once, such as the kernel's resize, cancels.

    DINO is exact. The logits of MoCo and SimCLR, b^2 products, are up to 2e-4 here.
    """
    sides = [48, 48, 24, 24] if name == 'dino' else [48, 48]
    unit = pass_flops(81, 16, 64, 2)                 # uncompressed, forward
    for frozen, branches in ((False, dict(drop_branch='both')), (True, dict(patch_branch='query'))):
        encoder = ViT(img_size=36, patch_size=4, in_chans=1, embed_dim=64, depth=2, num_heads=2,
                      freeze_patch_embed=frozen)
        method = build(name, encoder, **branches)
        for tau in (Compression(4), Compression(12, 0.4)):
            more = counted(method, sides, tau, 4) - counted(method, sides, tau, 2)
            ours = 2 * sample_cost(method, list(map(Augmentation, sides)), tau) * unit
            assert ours == pytest.approx(more, rel=3e-4)


def paper_cost(method, **options):
    """Units per sample: ViT-B and the paper's heads, at 224 px."""
    with torch.device('meta'):
        method = method(vit_base(), **options)
    return sample_cost(method, recipe('moco', 224), Compression(16))


def test_costs_and_budgets_of_the_paper():
    """MoCo-v3 in one direction: query forward 1, its backward 2, key forward 1.

    The heads add 0.0051 to the 4, and that images need no gradient takes off 0.0066. An epoch has
    1,281,167 images. SimCLR trains both views, 3 + 3; its head is 0.1 % of each pass.
    """
    unit = pass_flops(196, 768, 768, 12)
    assert unit == pytest.approx(2 * 17.56e9, rel=5e-4)       # as the literature has it
    moco = paper_cost(MoCo)
    assert moco == pytest.approx(4 + 0.0051 - 0.0066, abs=1e-4)
    for epochs, millions in ((60, 307), (300, 1537), (1200, 6150)):
        assert epochs * 1.281167 * moco == pytest.approx(millions, rel=2e-3)
    assert paper_cost(MoCo, symmetric=True) == pytest.approx(2 * moco)
    assert paper_cost(SimCLR) == pytest.approx(6, rel=2e-3)


def test_wrong_names_are_refused():
    refused(Compression.parse, [
        ('p8-drop', "'p8-drop' is not a compression; write p24 or p24-drop0.50"),
        ('p2.5', "'p2.5' is not"),
        ('p8-drop0.5.5', 'is not'),
        ('p0', 'patch size 0 is not'),
        ('p24-drop1.0', 'drop rate 1.0 is outside')])
