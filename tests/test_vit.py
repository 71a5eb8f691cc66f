"""vit.py against timm, lightly and MoCo-v3's formulas."""
import math

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import error
from einops import rearrange
from lightly.models.utils import get_2d_sine_cosine_positional_embedding
from timm.layers import build_sincos2d_pos_embed

from compress import pi_resize, random_keep
from vit import ViT, sincos_table, vit_base, vit_small, vit_tiny

SMALL = dict(img_size=48, patch_size=4, embed_dim=64, depth=2, num_heads=2)


def timm_vit(**sizes):
    return timm.models.VisionTransformer(**{**SMALL, **sizes}, num_classes=0)


def scrambled(encoder):
    """Random weights, since zero biases and unit norms would test nothing."""
    for parameter in encoder.parameters():
        nn.init.normal_(parameter, std=0.2)
    return encoder


# ---- the same network as timm's

@pytest.mark.parametrize('pos_embed', ('sincos', 'learned'))
def test_features_equal_timm(pos_embed):
    """Measured: 3e-6."""
    ours = scrambled(ViT(**SMALL, pos_embed=pos_embed))
    theirs = timm_vit()
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 48, 48)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    assert error(ours.forward_tokens(images), theirs.forward_features(images)) < 1e-5
    assert error(ours(images), theirs(images)) < 1e-5


def test_a_rectangle_equals_timm():
    """24 x 64 pixels are 6 rows of 16 patches. timm gets our table of this grid as its own."""
    ours = scrambled(ViT(**SMALL))
    weights = ours.state_dict()
    cls_code = ours.pos_embed[:, :1]
    weights['pos_embed'] = torch.cat([cls_code, ours.positions((6, 16))], dim=1)
    theirs = timm_vit(img_size=(24, 64))
    theirs.load_state_dict(weights)
    images = torch.randn(2, 3, 24, 64)
    assert error(ours.forward_tokens(images), theirs.forward_features(images)) < 1e-5


@pytest.mark.parametrize('name, build', [
    ('vit_tiny_patch16_224', vit_tiny),
    ('vit_small_patch16_224', vit_small),
    ('vit_base_patch16_224', vit_base),
])
def test_timm_loads_the_weights_of_its_models(name, build):
    with torch.device('meta'):
        theirs = timm.create_model(name, num_classes=0)
        ours = build()
    theirs.load_state_dict(ours.state_dict())
    assert theirs.blocks[0].attn.num_heads == ours.blocks[0].attn.num_heads


def test_parameter_counts():
    """MoCo-v3's ViT-S and ViT-B, the fixed table included."""
    with torch.device('meta'):
        small = vit_small(num_heads=12)
        base = vit_base()
    assert sum(p.numel() for p in small.parameters()) == 21_665_664
    assert sum(p.numel() for p in base.parameters()) == 85_798_656


def test_initialization_is_moco_v3s():
    """Uniform in +-sqrt(6 / (fan in + fan out)); q, k and v count as three maps 384 -> 384.

    qkv sqrt(6 / 768) = 0.08839, MLP sqrt(6 / 1920) = 0.05590, patches sqrt(6 / 1152) = 0.07217.
    """
    encoder = vit_small(depth=1)
    block = encoder.blocks[0]
    bounds = {block.attn.qkv: 0.08839, block.mlp.fc1: 0.05590, encoder.patch_embed.proj: 0.07217}
    for layer, bound in bounds.items():
        assert layer.weight.abs().max().item() == pytest.approx(bound, rel=1e-3)
        assert layer.bias.abs().max() == 0
    assert encoder.cls_token.std() < 2e-6
    assert encoder.pos_embed[:, 0].abs().max() == 0
    assert not encoder.pos_embed.requires_grad


# ---- compression

def test_no_compression_is_the_plain_forward():
    """Bit for bit, in train and in eval mode."""
    encoder = ViT(**SMALL)
    images = torch.randn(3, 3, 48, 48)
    plain = encoder(images)
    assert torch.equal(plain, encoder(images, 4, 0.0, torch.Generator()))
    assert torch.equal(plain, encoder.eval()(images))


@pytest.mark.parametrize('patch_size, drop_rate, tokens', [
    (4, 0, 144),
    (4, 0.5, 72),
    (8, 0, 36),
    (8, 0.75, 9),
    (12, 0.9, 2),
    (48, 0.5, 1),
])
def test_token_counts(patch_size, drop_rate, tokens):
    """Of 48 px: (48 / patch)^2 (1 - drop rate) rounded, at least 1, and the class token."""
    images = torch.randn(2, 3, 48, 48)
    out = ViT(**SMALL).forward_tokens(images, patch_size, drop_rate)
    assert out.shape == (2, tokens + 1, 64)


def test_dropping_before_the_projection_equals_dropping_after():
    """By hand: embed all 36 patches by a convolution, then keep 9 of each image."""
    encoder = ViT(**SMALL, pos_embed='learned')
    images = torch.randn(2, 3, 48, 48)
    out = encoder.forward_tokens(images, 8, 0.75, torch.Generator().manual_seed(3))

    ids = random_keep(2, 36, 0.75, torch.Generator().manual_seed(3))
    proj = encoder.patch_embed.proj
    x = F.conv2d(images, pi_resize(proj.weight, 8), proj.bias, stride=8)
    x = rearrange(x, 'b d h w -> b (h w) d') + encoder.positions((6, 6))
    x = torch.stack([x[i, ids[i]] for i in range(2)])
    cls = encoder.cls_token + encoder.pos_embed[:, :1]
    x = torch.cat([cls.expand(2, 1, 64), x], dim=1)
    for block in encoder.blocks:
        x = block(x)
    assert error(encoder.norm(x), out) < 1e-5


@pytest.mark.parametrize('size', (8, 12))
def test_enlarged_patches_give_the_same_features(size):
    """Each patch is enlarged on its own, so that no pixels mix across borders."""
    encoder = ViT(**{**SMALL, 'img_size': 16})
    images = torch.randn(4, 3, 16, 16)
    patches = rearrange(images, 'b c (h p) (w q) -> (b h w) c p q', p=4, q=4)
    patches = F.interpolate(patches, (size, size), mode='bilinear')
    large = rearrange(patches, '(b h w) c p q -> b c (h p) (w q)', h=4, w=4)
    assert error(encoder(images), encoder(large, patch_size=size)) < 1e-5


def test_the_base_kernel_trains_through_any_patch_size():
    images = torch.randn(2, 3, 48, 48)
    free = ViT(**SMALL)
    frozen = ViT(**SMALL, freeze_patch_embed=True)
    for encoder in (free, frozen):
        encoder(images, patch_size=8).sum().backward()
    assert free.patch_embed.proj.weight.grad.abs().sum() > 0
    assert frozen.patch_embed.proj.weight.grad is None


# ---- positions

def test_sincos_table_equals_timm_and_lightly():
    """lightly orders columns first, and each row of sines and cosines has length sqrt(d / 2)."""
    ours = sincos_table(14, 14, 768)[0]
    assert torch.equal(ours, build_sincos2d_pos_embed([14, 14], 768, interleave_sin_cos=True))
    theirs = get_2d_sine_cosine_positional_embedding(768, 14, cls_token=False)
    theirs = torch.as_tensor(theirs).float().reshape(196, 768)
    assert error(rearrange(ours, '(h w) d -> (w h) d', h=14), theirs) < 1e-5
    assert error(ours.norm(dim=1), torch.tensor(384.0).sqrt()) < 1e-5


def code_of_point(y, x, grid, dim=16):
    """The code of the point (y, x) of an image, 0 to 1 across it, by MoCo-v3's formula.

    The first patch centre of a grid of n, y = 0.5 / n, has the index 0.
    """
    code = []
    frequencies = [1 / 10000 ** (k / 4) for k in range(dim // 4)]
    for index in (y * grid - 0.5, x * grid - 0.5):
        code += [math.sin(index * f) for f in frequencies]
        code += [math.cos(index * f) for f in frequencies]
    return torch.tensor(code)


@pytest.mark.parametrize('patch_size, height, width', [
    (16, 224, 224),
    (30, 210, 210),
    (48, 240, 240),
    (20, 60, 160),
])
def test_the_code_of_an_image_point_does_not_depend_on_the_rendering(patch_size, height, width):
    """Base patch 16 at 224 px: every patch centre has the code of its place, whatever the side."""
    encoder = ViT(img_size=224, embed_dim=16, depth=0, num_heads=1)
    encoder.norm = nn.Identity()                              # tokens of black images are the codes
    black = torch.zeros(1, 3, height, width)
    tokens = encoder.forward_tokens(black, patch_size)[0, 1:]
    columns = width // patch_size
    for i, token in enumerate(tokens):
        y = (i // columns + 0.5) * patch_size / height
        x = (i % columns + 0.5) * patch_size / width
        assert error(token, code_of_point(y, x, grid=14)) < 1e-5


# ---- arguments out of range

def call(images=(1, 3, 224, 224), **compression):
    ViT(depth=0).forward_tokens(torch.zeros(images), **compression)


BAD_ARGUMENTS = [
    (call, dict(patch_size=20), 'size 20 does not divide image size 224x224; use 14, 16, 28, 32'),
    (call, dict(patch_size=0), 'patch size 0 must be at least 1'),
    (call, dict(images=(1, 3, 224, 200)), 'patch size 16 does not divide image size 224x200'),
    (call, dict(patch_size=448), 'patch size 448 does not divide'),
    (call, dict(drop_rate=75), 'drop rate 75'),
    (call, dict(drop_rate=-0.5), 'drop rate -0.5'),
    (call, dict(drop_rate=math.nan), 'drop rate nan'),
    (ViT, dict(img_size=100), 'patch size 16 does not divide image size 100x100; use 10, 20, 25'),
    (ViT, dict(embed_dim=64, num_heads=5), '5 heads do not divide width 64'),
    (ViT, dict(num_heads=0), '0 heads do not divide'),
    (ViT, dict(embed_dim=6), 'a width divisible by 4, not 6'),
    (ViT, dict(pos_embed='rope'), "'rope' is not one of sincos, learned"),
]


@pytest.mark.parametrize('function, arguments, message', BAD_ARGUMENTS)
def test_arguments_out_of_range(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)
