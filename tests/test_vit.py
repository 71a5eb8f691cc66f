"""vit.py against timm and MoCo-v3's formulas."""
import math

import pytest
import timm
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import error
from einops import rearrange
from timm.layers import build_sincos2d_pos_embed

from compress import pi_resize, random_keep
from vit import ViT, sincos_table, vit_base, vit_small, vit_tiny

SMALL = dict(patch_size=4, embed_dim=64, depth=2, num_heads=2)


def small_vit(**options):
    return ViT(img_size=48, **SMALL, **options)


@pytest.mark.parametrize('pos_embed, height, width', [
    ('sincos', 48, 48),
    ('learned', 48, 48),
    ('sincos', 24, 64),
])
def test_features_equal_timm(pos_embed, height, width):
    """timm gets our codes of a rectangle's patches as its own. Measured: 3e-6."""
    ours = small_vit(pos_embed=pos_embed)
    for parameter in ours.parameters():
        nn.init.normal_(parameter, std=0.2)                   # zeros and ones would test nothing
    codes = [ours.pos_embed[:, :1], ours.positions((height // 4, width // 4))]
    weights = dict(ours.state_dict(), pos_embed=torch.cat(codes, dim=1))
    theirs = timm.models.VisionTransformer((height, width), num_classes=0, **SMALL)
    theirs.load_state_dict(weights)
    images = torch.randn(2, 3, height, width)
    assert error(ours.forward_tokens(images), theirs.forward_features(images)) < 1e-5
    assert error(ours(images), theirs(images)) < 1e-5


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


def test_initialization_is_moco_v3s():
    """Uniform in +-sqrt(6 / (fan in + fan out)); q, k and v count as three maps 384 -> 384."""
    encoder = vit_small(depth=1, num_heads=12)
    block = encoder.blocks[0]
    fans = {block.attn.qkv: 384 + 384, block.mlp.fc1: 384 + 1536,
            encoder.patch_embed.proj: 768 + 384}
    for layer, fan in fans.items():
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / fan), rel=1e-3)
        assert layer.bias.abs().max() == 0
    assert encoder.cls_token.std() < 2e-6
    assert encoder.pos_embed[:, 0].abs().max() == 0
    assert not encoder.pos_embed.requires_grad


def test_no_compression_is_the_plain_forward():
    """Bit for bit, in train and in eval mode."""
    encoder = small_vit()
    images = torch.randn(3, 3, 48, 48)
    plain = encoder(images)
    assert torch.equal(plain, encoder(images, 4, 0.0, torch.Generator()))
    assert torch.equal(plain, encoder.eval()(images))


def test_dropping_before_the_projection_equals_dropping_after():
    """By hand: embed all 36 patches by a convolution, then keep 9 of each image."""
    encoder = small_vit(pos_embed='learned')
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


def test_the_base_kernel_trains_through_any_patch_size_unless_frozen():
    for frozen in (False, True):
        encoder = small_vit(freeze_patch_embed=frozen)
        features = encoder(torch.randn(2, 3, 48, 48), patch_size=8)
        features[:, 0].sum().backward()      # LayerNorm holds the sum of all features at 0
        gradient = encoder.patch_embed.proj.weight.grad
        assert gradient is None if frozen else gradient.abs().max() > 1e-3


def test_sincos_table_equals_timm():
    theirs = build_sincos2d_pos_embed([14, 14], 768, interleave_sin_cos=True)
    assert torch.equal(sincos_table(14, 14, 768)[0], theirs)


def code_of_point(y, x):
    """MoCo-v3's formula; y = 0.5 / 14, the first patch centre of a grid of 14, has the index 0."""
    frequencies = torch.tensor([1, 0.1, 0.01, 0.001])
    rows = (14 * y - 0.5) * frequencies
    columns = (14 * x - 0.5) * frequencies
    return torch.cat([rows.sin(), rows.cos(), columns.sin(), columns.cos()])


@pytest.mark.parametrize('patch_size, height, width', [
    (16, 224, 224),
    (30, 210, 210),
    (48, 240, 240),
    (20, 60, 160),
])
def test_the_code_of_an_image_point_does_not_depend_on_the_rendering(patch_size, height, width):
    """Base patch 16 at 224 px: every patch centre has the code of its place."""
    encoder = ViT(img_size=224, embed_dim=16, depth=0, num_heads=1)
    encoder.norm = nn.Identity()                              # tokens of black images are the codes
    black = torch.zeros(1, 3, height, width)
    tokens = encoder.forward_tokens(black, patch_size)[0, 1:]
    columns = width // patch_size
    for i, token in enumerate(tokens):
        y = (i // columns + 0.5) * patch_size / height
        x = (i % columns + 0.5) * patch_size / width
        assert error(token, code_of_point(y, x)) < 1e-5


def call(height=224, width=224, **compression):
    ViT(depth=0).forward_tokens(torch.zeros(1, 3, height, width), **compression)


@pytest.mark.parametrize('function, arguments, message', [
    (call, dict(patch_size=20), 'size 20 does not divide image size 224x224; use 14, 16, 28, 32'),
    (call, dict(patch_size=0), 'patch size 0'),
    (call, dict(width=200), 'image size 224x200'),
    (call, dict(height=0), 'image size 0x224'),
    (call, dict(drop_rate=-0.5), 'drop rate -0.5'),
    (ViT, dict(img_size=100), 'image size 100x100; use 10, 20, 25'),
    (ViT, dict(num_heads=5), '5 heads do not divide width 384; choose another number'),
    (ViT, dict(num_heads=0), '0 heads do not divide'),
    (ViT, dict(embed_dim=6), 'a width divisible by 4, not 6'),
    (ViT, dict(pos_embed='rope'), "'rope' is not one of sincos, learned"),
])
def test_arguments_out_of_range(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(**arguments)
