"""compress.py against timm, exact fractions, least squares and torch's FLOP counter."""
import math
from fractions import Fraction

import pytest
import torch
import torch.nn.functional as F
from conftest import error
from methods import METHODS, build
from timm.layers import resample_abs_pos_embed, resample_patch_embed
from timm.layers.patch_dropout import PatchDropoutWithIndices
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from compress import (Compression, drop_tokens, num_keep, pass_flops, pi_resize, random_keep,
                      rendered_side, resize_matrix, resize_pos_embed, sample_cost, tokens_of)
from losses import DINO, MoCo, SimCLR
from vit import ViT, vit_base

PATCH_SIZES = (16, 20, 24, 30, 40, 48)                # the paper's


def test_a_name_is_short_and_is_read_back():
    assert str(Compression(24)) == 'p24'
    assert str(Compression(24, 0.5)) == 'p24-drop0.50'
    assert Compression.parse(' p24-drop0.5') == Compression(24, 0.5)
    for thousandths in range(1000):
        strategy = Compression(16, thousandths / 1000)
        assert Compression.parse(str(strategy)) == strategy


def test_num_keep_is_the_nearest_whole_number():
    """In exact fractions. Truncation would keep 44 of 225 (1 - 0.8) = 45. One always stays."""
    for n in range(1, 257):
        for percent in range(100):
            exact = Fraction(n * (100 - percent), 100)
            assert abs(num_keep(n, percent / 100) - max(exact, 1)) <= 0.5


def test_random_keep_is_uniform_without_replacement():
    """12 of 49 tokens: each with p = 12/49, each pair with 12 11 / (49 48)."""
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    ids, again, other = [random_keep(20_000, 49, 0.75, generator) for generator in generators]
    assert torch.equal(ids, again) and not torch.equal(ids, other)
    kept = F.one_hot(ids, 49).sum(dim=1).double()             # 1 where a token stays
    assert kept.max() == 1 and kept.sum() == 20_000 * 12
    pair = kept[:, 3] * kept[:, 4]
    for share, p in ((kept.mean(dim=0), 12 / 49), (pair.mean(), 12 * 11 / (49 * 48))):
        sigma = math.sqrt(p * (1 - p) / 20_000)
        assert (share - p).abs().max() < 3.5 * sigma


def test_drop_tokens_equals_timm():
    tokens = torch.randn(8, 1 + 36, 5)
    kept, ids = PatchDropoutWithIndices(prob=0.5, num_prefix_tokens=1)(tokens)
    assert torch.equal(drop_tokens(tokens[:, 1:], ids), kept[:, 1:])


@pytest.mark.parametrize('antialias', (False, True))
@pytest.mark.parametrize('interpolation', ('bilinear', 'bicubic'))
def test_pi_resize_equals_timm(interpolation, antialias):
    """timm inverts in float32. Measured: 3e-6 of the largest weight."""
    kernel = torch.randn(8, 3, 16, 16)
    for size in (8, *PATCH_SIZES):
        ours = pi_resize(kernel, size, interpolation, antialias)
        theirs = resample_patch_embed(kernel, [size, size], interpolation, antialias)
        assert error(ours, theirs) < 1e-5 * max(1, theirs.abs().max())


@pytest.mark.parametrize('size', (8, 24, 40))
def test_a_resized_kernel_sees_the_least_squares_patch(size):
    """<x, w_q> = <B+ x, w> for every x of q pixels, B+ x by a solver. Measured: 2e-13."""
    unit_patches = torch.eye(256, dtype=torch.float64).view(256, 1, 16, 16)
    b = F.interpolate(unit_patches, (size, size), mode='bilinear').flatten(1).T
    assert error(resize_matrix(16, size), b) < 1e-14

    kernel = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    patch = torch.randn(10, size * size, dtype=torch.float64)
    small = torch.linalg.lstsq(b, patch.T, driver='gelsd').solution.T
    tokens = patch @ pi_resize(kernel, size).flatten(1).T
    assert error(tokens, small @ kernel.flatten(1).T) < 1e-12


def test_pi_resize_has_a_gradient_though_inference_cached_the_matrix():
    kernel = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    with torch.inference_mode():
        pi_resize(kernel, 7)
    assert torch.autograd.gradcheck(pi_resize, (kernel, 7))
    assert pi_resize(kernel, 4) is kernel
    assert resize_matrix(4, 7) is resize_matrix(4, 7)


def test_pi_resize_stays_float32_under_autocast():
    """A bfloat16 product would be off by 3e-3."""
    kernel = torch.randn(2, 1, 4, 4)
    with torch.autocast('cpu', torch.bfloat16):
        assert error(pi_resize(kernel, 6), pi_resize(kernel.double(), 6)) < 1e-6


@pytest.mark.parametrize('antialias', (False, True))
@pytest.mark.parametrize('grid', ((10, 10), (5, 5), (20, 12)))
def test_resize_pos_embed_equals_timm(grid, antialias):
    pos = torch.randn(1, 15 * 15, 32)
    ours = resize_pos_embed(pos, (15, 15), grid, antialias=antialias)
    theirs = resample_abs_pos_embed(pos, list(grid), [15, 15], 0, antialias=antialias)
    assert error(ours, theirs) < 1e-6
    assert resize_pos_embed(pos, (25, 9), (25, 9)) is pos


def test_views_and_tokens_of_the_paper():
    """With the class token, patch 30 and 75 % dropout both leave 50: (210 / 30)^2 = 196 / 4."""
    assert [rendered_side(224, p) for p in PATCH_SIZES] == [224, 220, 216, 210, 240, 240]
    assert [tokens_of(224, p) + 1 for p in PATCH_SIZES] == [197, 122, 82, 50, 37, 26]
    assert tokens_of(224, 16, 0.75) + 1 == 50


def test_a_view_is_rendered_at_the_nearest_multiple_of_the_patch():
    """A tie goes up: 72 between 48 and 96 gives 96."""
    for patch_size in (1, 7, 16, 48):
        multiples = range(patch_size, 400, patch_size)
        for nominal in range(1, 250):
            nearest = min(multiples, key=lambda side: (abs(side - nominal), -side))
            assert rendered_side(nominal, patch_size) == nearest



def counted_flops(method, tau, sides, b):
    """torch's count of a training step on b images."""
    rendered = [rendered_side(side, tau.patch_size) for side in sides]
    views = [torch.randn(b, 1, side, side) for side in rendered]
    key_views = None
    if method.patch_branch == 'query':
        key_views = [torch.randn(b, 1, side, side) for side in sides]
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss, _ = method(views, tau.patch_size, tau.drop_rate, key_views=key_views)
        loss.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize('frozen, branches', [
    (False, dict()),
    (False, dict(drop_branch='both')),
    (False, dict(patch_branch='query')),
    (True, dict()),
])
@pytest.mark.parametrize('name', METHODS)
def test_flops_equal_torchs_counter(name, frozen, branches):
    """Of 4 images less 2: what a step does once, such as the kernel's resize, cancels.

    DINO is exact. The logits of MoCo and SimCLR, b^2 products, are up to 2e-4 here.
    """
    encoder = ViT(img_size=48, patch_size=4, in_chans=1, embed_dim=64, depth=2, num_heads=2,
                  freeze_patch_embed=frozen)
    method = build(name, encoder, **branches)
    sides = [48, 48, 16, 16] if name == 'dino' else [48, 48]
    for text in ('p4', 'p4-drop0.75', 'p8', 'p12-drop0.40'):
        tau = Compression.parse(text)
        more = counted_flops(method, tau, sides, 4) - counted_flops(method, tau, sides, 2)
        passes = method.passes(tau.patch_size, tau.drop_rate)
        flops = sample_cost(passes, sides, encoder.config) * pass_flops(encoder.config, 48)
        assert 2 * flops == pytest.approx(more, rel=3e-4), text


def paper_cost(method, **options):
    """Units per sample: ViT-B and the paper's heads, at 224 px and with 8 local crops."""
    with torch.device('meta'):
        method = method(vit_base(), **options)
    return sample_cost(method.passes(), [224, 224] + [96] * 8, method.encoder.config)


def test_costs_and_budgets_of_the_paper():
    """MoCo-v3 in one direction: query forward 1, its backward 2, key forward 1.

    The heads add 0.0051 to the 4, and that images need no gradient takes off 0.0066. An epoch has
    1,281,167 images. SimCLR trains both views, 3 + 3; its head is 0.1 % of each pass.
    """
    moco = paper_cost(MoCo)
    assert moco == pytest.approx(4 + 0.0051 - 0.0066, abs=1e-4)
    budgets = {60: 307, 120: 615, 200: 1025, 300: 1537, 600: 3075, 1200: 6150}
    for epochs, millions in budgets.items():
        assert epochs * 1.281167 * moco == pytest.approx(millions, rel=2e-3)
    assert paper_cost(MoCo, symmetric=True) == pytest.approx(2 * moco)
    assert paper_cost(SimCLR) == pytest.approx(6, rel=2e-3)


def test_cost_of_dino_by_hand():
    """Multiply-adds of 12 blocks of ViT-B/16 on N tokens, of n patches, and of the head.

    The student takes 3 times each pass, but its patches 2 times, since images need no gradient.
    The teacher sees both global views, once.
    """
    def blocks(tokens):
        return 12 * (12 * tokens * 768 ** 2 + 2 * tokens ** 2 * 768)

    patches = 196 * 768 ** 2
    head = 768 * 2048 + 2048 ** 2 + 2048 * 256 + 256 * 65536
    unit = blocks(197) + patches
    assert unit == pytest.approx(17.56e9, rel=5e-4)           # as the literature has it
    assert pass_flops(vit_base().config, 224) == 2 * unit
    global_view = 4 * (blocks(197) + head) + 3 * patches
    local_view = 3 * (blocks(37) + head) + 2 * 36 * 768 ** 2
    by_hand = (2 * global_view + 8 * local_view) / unit
    assert paper_cost(DINO, local_crops=8) == pytest.approx(by_hand, rel=1e-12)


@pytest.mark.parametrize('function, arguments, message', [
    (Compression.parse, ['p8-drop'], "'p8-drop' is not a compression"),
    (Compression.parse, [''], "'' is not a compression; write p24 or p24-drop0.50"),
    (Compression.parse, ['p2.5'], "'p2.5' is not"),
    (Compression.parse, ['p24-0.5'], "'p24-0.5' is not"),
    (Compression.parse, ['p24-drop-0.1'], 'drop rate -0.1 is outside'),
    (Compression.parse, ['p0'], 'patch size 0 is not'),
    (Compression, [2.5], 'patch size 2.5 is not'),
    (num_keep, [196, 1.0], 'drop rate 1.0'),
    (num_keep, [196, math.nan], 'drop rate nan'),
    (rendered_side, [224, 0], 'patch size 0'),
    (pi_resize, [torch.ones(1, 1, 4, 4), 0], 'patch sizes 4 and 0'),
])
def test_arguments_out_of_range(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
