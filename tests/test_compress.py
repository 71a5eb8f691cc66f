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

from compress import (Compression, drop_tokens, forward_flops, num_keep, pass_flops, pi_resize,
                      random_keep, rendered_side, resize_matrix, resize_pos_embed, sample_cost,
                      tokens_of)
from losses import DINO, MoCo, SimCLR
from vit import ViT, vit_base

PATCH_SIZES = (20, 24, 30, 40, 48)                    # the paper's, beside the base size 16


# ---- names of strategies

def test_a_name_is_read_back():
    for patch_size in (1, 16, 500):
        for thousandths in range(1000):
            strategy = Compression(patch_size, thousandths / 1000)
            assert Compression.parse(str(strategy)) == strategy


def test_names():
    assert str(Compression(24)) == 'p24'
    assert str(Compression(24, 0.5)) == 'p24-drop0.50'
    assert str(Compression(24, 0.125)) == 'p24-drop0.125'
    assert Compression.parse(' p24-drop0.5') == Compression(24, 0.5)


@pytest.mark.parametrize('text, message', [
    ('', "'' is not a compression; write p24 or p24-drop0.50"),
    ('24', "'24' is not"),
    ('p', "'p' is not"),
    ('p2.5', "'p2.5' is not"),
    ('p24-0.5', "'p24-0.5' is not"),
    ('p24-drop-0.1', 'drop rate -0.1 is outside'),
    ('p24-drop1', 'drop rate 1.0 is outside'),
    ('p24-drop75', 'drop rate 75.0 is outside'),
    ('p0', 'patch size 0 is not'),
])
def test_a_wrong_name_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        Compression.parse(text)


# ---- token dropout

def test_num_keep_is_the_nearest_whole_number():
    """In exact fractions. Truncation would keep 44 of 225 (1 - 0.8) = 45. One always stays."""
    for n in range(1, 257):
        for percent in range(100):
            exact = Fraction(n * (100 - percent), 100)
            kept = num_keep(n, percent / 100)
            assert abs(kept - max(exact, 1)) <= 0.5


def test_random_keep_is_uniform_without_replacement():
    """12 of 49 tokens: each with p = 12/49, each pair with 12 11 / (49 48), in 20,000 draws."""
    ids = random_keep(20_000, 49, 0.75, torch.Generator().manual_seed(0))
    assert ids.shape == (20_000, 12)
    kept = F.one_hot(ids, 49).sum(dim=1).double()             # 20,000 49: 1 where a token stays
    assert kept.max() == 1

    single = kept.mean(dim=0)
    pair = (kept[:, 3] * kept[:, 4]).mean()
    p_single = 12 / 49
    p_pair = p_single * 11 / 48
    for share, p in ((single, p_single), (pair, p_pair)):
        sigma = math.sqrt(p * (1 - p) / 20_000)
        assert (share - p).abs().max() < 3.5 * sigma


def test_random_keep_repeats_with_the_generator():
    first = random_keep(4, 100, 0.5, torch.Generator().manual_seed(1))
    again = random_keep(4, 100, 0.5, torch.Generator().manual_seed(1))
    other = random_keep(4, 100, 0.5, torch.Generator().manual_seed(2))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_drop_tokens_equals_timm():
    tokens = torch.randn(8, 1 + 36, 5)
    kept, ids = PatchDropoutWithIndices(prob=0.5, num_prefix_tokens=1)(tokens)
    assert torch.equal(drop_tokens(tokens[:, 1:], ids), kept[:, 1:])


# ---- patch scaling

@pytest.mark.parametrize('antialias', (False, True))
@pytest.mark.parametrize('interpolation', ('bilinear', 'bicubic'))
def test_pi_resize_equals_timm(interpolation, antialias):
    """timm inverts in float32. Measured: 3e-6 of the largest weight."""
    kernel = torch.randn(8, 3, 16, 16)
    for size in (8, 12, *PATCH_SIZES):
        ours = pi_resize(kernel, size, interpolation, antialias)
        theirs = resample_patch_embed(kernel, [size, size], interpolation, antialias)
        assert error(ours, theirs) < 1e-5 * max(1, theirs.abs().max())


@pytest.mark.parametrize('size', (8, 24, 40))
def test_a_resized_kernel_sees_the_least_squares_patch(size):
    """<x, w_q> = <B+ x, w> for every x of q pixels, B+ x by a solver. Measured: 2e-13."""
    kernel = torch.randn(4, 1, 16, 16, dtype=torch.float64)
    patch = torch.randn(10, 1, size, size, dtype=torch.float64)
    b = resize_matrix(16, size)
    small = torch.linalg.lstsq(b, patch.flatten(1).T, driver='gelsd').solution.T
    tokens = patch.flatten(1) @ pi_resize(kernel, size).flatten(1).T
    assert error(tokens, small @ kernel.flatten(1).T) < 1e-12


def test_resize_matrix_is_the_resize():
    x = torch.randn(1, 1, 6, 6, dtype=torch.float64)
    resized = F.interpolate(x, (9, 9), mode='bilinear')
    assert error(resize_matrix(6, 9) @ x.flatten(), resized.flatten()) < 1e-14
    assert resize_matrix(6, 9) is resize_matrix(6, 9)                          # cached


def test_pi_resize_has_a_gradient():
    kernel = torch.randn(2, 1, 4, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(pi_resize, (kernel, 6))
    assert pi_resize(kernel, 4) is kernel


def test_pi_resize_stays_float32_under_autocast():
    """A bfloat16 product would be off by 3e-3."""
    kernel = torch.randn(2, 1, 4, 4)
    exact = pi_resize(kernel.double(), 6)
    with torch.autocast('cpu', torch.bfloat16):
        assert error(pi_resize(kernel, 6), exact) < 1e-6


def test_a_matrix_cached_by_inference_trains_later():
    with torch.inference_mode():
        pi_resize(torch.randn(1, 1, 5, 5), 7)
    kernel = torch.randn(1, 1, 5, 5, requires_grad=True)
    pi_resize(kernel, 7).sum().backward()
    assert kernel.grad.abs().sum() > 0


@pytest.mark.parametrize('antialias', (False, True))
@pytest.mark.parametrize('grid', ((10, 10), (5, 5), (20, 12)))
def test_resize_pos_embed_equals_timm(grid, antialias):
    pos = torch.randn(1, 15 * 15, 32)
    ours = resize_pos_embed(pos, (15, 15), grid, antialias=antialias)
    theirs = resample_abs_pos_embed(pos, list(grid), [15, 15], 0, antialias=antialias)
    assert error(ours, theirs) < 1e-6
    assert resize_pos_embed(pos, (25, 9), (25, 9)) is pos


# ---- the side of a view

def test_views_and_tokens_at_224_px():
    """The paper's sequences: patch 30 and 75 % dropout both leave 50 tokens, class token included.

    210 / 30 = 7 and 7 7 + 1 = 50; round(196 / 4) + 1 = 50.
    """
    sizes = (16, *PATCH_SIZES)
    assert [rendered_side(224, p) for p in sizes] == [224, 220, 216, 210, 240, 240]
    assert [tokens_of(224, p) + 1 for p in sizes] == [197, 122, 82, 50, 37, 26]
    assert tokens_of(224, 16, 0.75) + 1 == 50


def test_a_view_is_rendered_at_the_nearest_multiple_of_the_patch():
    """Brute force over all multiples; a tie goes up: 72 between 48 and 96 gives 96."""
    for patch_size in (1, 7, 16, 48):
        for nominal in range(1, 250):
            candidates = range(patch_size, 400, patch_size)
            nearest = min(candidates, key=lambda side: (abs(side - nominal), -side))
            assert rendered_side(nominal, patch_size) == nearest


# ---- what a strategy costs

def test_forward_flops_of_vit_base():
    """The literature's 17.56 G multiply-adds at 224 px; timm counts 20.27 G at 240 px."""
    for tokens, multiply_adds in ((196, 17.56e9), (225, 20.27e9)):
        flops = sum(forward_flops(tokens, 768, 12, patch_dim=768))
        assert flops / 2 == pytest.approx(multiply_adds, rel=5e-4)


def counted_flops(method, tau, sides, b):
    """torch's count of a training step on b images, views and key views at their own sides."""
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
    """Of 4 images less 2, over 2: what a step does once, such as the kernel's resize, cancels.

    DINO is exact. The logits of MoCo and SimCLR, b^2 products, are up to 2e-4 here.
    """
    encoder = ViT(img_size=48, patch_size=4, in_chans=1, embed_dim=64, depth=2, num_heads=2,
                  freeze_patch_embed=frozen)
    method = build(name, encoder, **branches)
    sides = [48, 48, 16, 16] if name == 'dino' else [48, 48]
    for text in ('p4', 'p4-drop0.75', 'p8', 'p12-drop0.40'):
        tau = Compression.parse(text)
        four = counted_flops(method, tau, sides, 4)
        two = counted_flops(method, tau, sides, 2)
        passes = method.passes(tau.patch_size, tau.drop_rate)
        units = sample_cost(passes, sides, encoder.config)
        flops = units * pass_flops(encoder.config, 48)
        assert flops == pytest.approx((four - two) / 2, rel=3e-4), text


def paper_cost(method, text='p16', **options):
    """Units per sample of a strategy, ViT-B and the paper's heads, at 224 px and 8 local crops."""
    with torch.device('meta'):
        method = method(vit_base(), **options)
    tau = Compression.parse(text)
    passes = method.passes(tau.patch_size, tau.drop_rate)
    return sample_cost(passes, [224, 224] + [96] * 8, method.encoder.config)


@pytest.mark.parametrize('epochs, millions', [
    (60, 307),
    (120, 615),
    (200, 1025),
    (300, 1537),
    (600, 3075),
    (1200, 6150),
])
def test_budgets_of_the_paper(epochs, millions):
    """MoCo-v3 in one direction: query forward 1, its backward 2, key forward 1.

    60 epochs of 1,281,167 images at 4 units are 307.5 M units. The heads add 0.0051 to the 4, and
    that images need no gradient takes off 0.0066.
    """
    assert paper_cost(MoCo) == pytest.approx(4 + 0.0051 - 0.0066, abs=1e-4)
    units = epochs * 1_281_167 * paper_cost(MoCo)
    assert units == pytest.approx(millions * 1e6, rel=2e-3)


def test_cost_of_both_directions_and_of_simclr():
    """Twice one direction. SimCLR trains both views, 3 + 3; its head is 0.1 % of each pass."""
    assert paper_cost(MoCo, symmetric=True) == pytest.approx(2 * paper_cost(MoCo))
    assert paper_cost(SimCLR) == pytest.approx(6, rel=2e-3)


def test_cost_of_dino_by_hand():
    """Multiply-adds of ViT-B/16, d = 768: a block takes 12 N d^2 + 2 N^2 d for N tokens.

    Global view: N = 197, patches 196 d^2. Local view of 96 px: N = 37, patches 36 d^2. Head:
    d 2048 + 2048^2 + 2048 256 + 256 65536. The student takes 3 times each pass, but 2 times the
    patches, whose input needs no gradient. The teacher sees both global views, once.
    """
    d = 768
    blocks = 12 * (12 * 197 * d ** 2 + 2 * 197 ** 2 * d)
    local_blocks = 12 * (12 * 37 * d ** 2 + 2 * 37 ** 2 * d)
    head = d * 2048 + 2048 ** 2 + 2048 * 256 + 256 * 65536
    unit = blocks + 196 * d ** 2
    teacher = 2 * (unit + head)
    student = 2 * (3 * (blocks + head) + 2 * 196 * d ** 2)
    local = 8 * (3 * (local_blocks + head) + 2 * 36 * d ** 2)
    by_hand = (teacher + student + local) / unit
    assert by_hand == pytest.approx(12.377, abs=1e-3)
    assert paper_cost(DINO, local_crops=8) == pytest.approx(by_hand, rel=1e-12)


def test_an_uncompressed_key_is_a_quarter_of_the_cost():
    """However strong the compression of the query, the key's forward remains: 1 of 4 units."""
    base = paper_cost(MoCo)
    key_at_base_patch = paper_cost(MoCo, 'p48-drop0.90', patch_branch='query')
    key_with_all_tokens = paper_cost(MoCo, 'p16-drop0.90')
    assert 0.25 < key_at_base_patch / base < 0.27
    assert 0.25 < key_with_all_tokens / base < 0.35
    assert paper_cost(MoCo, 'p48-drop0.90', drop_branch='both') / base < 0.03


# ---- arguments out of range

BAD_ARGUMENTS = [
    (Compression, (0,), 'patch size 0'),
    (Compression, (2.5,), 'patch size 2.5'),
    (Compression, (16, 75), 'drop rate 75'),
    (num_keep, (196, 1.0), 'drop rate 1.0'),
    (num_keep, (196, -0.1), 'drop rate -0.1'),
    (num_keep, (196, math.nan), 'drop rate nan'),
    (random_keep, (2, 196, 75), 'drop rate 75'),
    (rendered_side, (224, 0), 'patch size 0'),
    (tokens_of, (224, 16, 75), 'drop rate 75'),
    (pi_resize, (torch.ones(1, 1, 4, 4), 0), 'patch sizes 4 and 0'),
    (pass_flops, (ViT(depth=0).config, 224, 0), 'patch size 0'),
]


@pytest.mark.parametrize('function, arguments, message', BAD_ARGUMENTS)
def test_arguments_out_of_range(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
