import math

import pytest
import timm
import torch
import torch.nn.functional as F
from einops import rearrange
from lightly.models.utils import get_2d_sine_cosine_positional_embedding
from timm.layers import build_sincos2d_pos_embed

from vit import ViT, sincos_table, vit_base, vit_small, vit_tiny

SMALL = dict(img_size=48, patch_size=4, embed_dim=64, depth=2, num_heads=2)


def timm_vit(**kw):
    return timm.models.VisionTransformer(num_classes=0, **kw)


@pytest.mark.parametrize('pos_embed', ('sincos', 'learned'))
def test_whole_vit_equals_timm(pos_embed):
    ours = ViT(**SMALL, pos_embed=pos_embed)
    for p in ours.parameters():  # biases and norms are constants at the start: give every weight a part in the test
        torch.nn.init.normal_(p, std=0.2)
    theirs = timm_vit(**SMALL)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict(), strict=True)
    images = torch.randn(2, 3, 48, 48)
    assert (ours.forward_tokens(images) - theirs.forward_features(images)).abs().max() < 1e-5
    assert (ours(images) - theirs(images)).abs().max() < 1e-5


def test_timm_named_models_load_strictly():
    for name, build in (('vit_tiny_patch16_224', vit_tiny), ('vit_small_patch16_224', vit_small)):
        model = timm.create_model(name, num_classes=0)
        model.load_state_dict(build().state_dict(), strict=True)
        assert model.blocks[0].attn.num_heads == build().blocks[0].attn.num_heads


def test_parameter_counts():
    assert sum(p.numel() for p in vit_small(num_heads=12).parameters()) == 21_665_664
    with torch.device('meta'):
        assert sum(p.numel() for p in vit_base().parameters()) == 85_798_656


def test_no_compression_is_bit_identical():
    encoder, images = ViT(**SMALL), torch.randn(3, 3, 48, 48)
    plain = encoder(images)
    assert torch.equal(plain, encoder(images, patch_size=4, drop_rate=0.0, generator=torch.Generator()))
    assert torch.equal(plain, encoder.train()(images)) and torch.equal(plain, encoder.eval()(images))


@pytest.mark.parametrize('patch_size, drop_rate, tokens', [(4, 0, 144), (4, 0.5, 72), (8, 0, 36), (8, 0.75, 9), (12, 0.9, 2), (48, 0.5, 1)])
def test_token_counts(patch_size, drop_rate, tokens):
    assert ViT(**SMALL).forward_tokens(torch.randn(2, 3, 48, 48), patch_size, drop_rate).shape == (2, 1 + tokens, 64)


def test_dropped_tokens_change_nothing():
    # the class token of the kept tokens equals that of an encoder which embeds all and then gathers
    encoder, images = ViT(**SMALL, pos_embed='learned'), torch.randn(2, 3, 48, 48)
    out = encoder.forward_tokens(images, 8, 0.75, torch.Generator().manual_seed(3))
    from compress import pi_resize, random_keep
    ids = random_keep(2, 36, 0.75, torch.Generator().manual_seed(3))
    x = F.conv2d(images, pi_resize(encoder.patch_embed.proj.weight, 8), encoder.patch_embed.proj.bias, stride=8)
    x = rearrange(x, 'b d h w -> b (h w) d') + encoder.positions((6, 6))
    x = torch.stack([x[i, ids[i]] for i in range(2)])
    x = torch.cat([(encoder.cls_token + encoder.pos_embed[:, :1]).expand(2, 1, 64), x], 1)
    for block in encoder.blocks:
        x = block(x)
    assert (encoder.norm(x) - out).abs().max() < 1e-5


@pytest.mark.parametrize('size', (8, 12))
def test_enlarged_patches_give_the_same_features(size):
    encoder = ViT(img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=2)
    images = torch.randn(4, 3, 16, 16)
    patches = rearrange(images, 'b c (h p) (w q) -> (b h w) c p q', p=4, q=4)
    large = rearrange(F.interpolate(patches, (size, size), mode='bilinear'), '(b h w) c p q -> b c (h p) (w q)', h=4, w=4)
    assert (encoder(images) - encoder(large, patch_size=size)).abs().max() < 1e-5


@pytest.mark.parametrize('pos_embed', ('sincos', 'learned'))
def test_rectangle_is_not_transposed(pos_embed):
    ours, theirs = ViT(**SMALL, pos_embed=pos_embed), timm_vit(**SMALL, dynamic_img_size=True)
    theirs.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 24, 64)
    tokens = ours.forward_tokens(images)
    assert tokens.shape == (2, 1 + 6 * 16, 64)
    if pos_embed == 'learned':  # timm averages (antialias) when it shrinks a table; widths that grow are the same
        images = torch.randn(2, 3, 48, 64)
        assert (ours.forward_tokens(images) - theirs.forward_features(images)).abs().max() < 1e-2
    # rows first: a patch in row 0, column 1 is token 2 (after the class token)
    flat = ViT(**{**SMALL, 'depth': 0}, pos_embed=pos_embed)
    blank, marked = torch.zeros(1, 3, 24, 64), torch.zeros(1, 3, 24, 64)
    marked[:, :, 0:4, 4:8] = 1
    changed = (flat.forward_tokens(marked) - flat.forward_tokens(blank)).abs().sum(2)[0]
    assert changed.nonzero().flatten().tolist() == [2]


def test_sincos_table_against_timm_and_lightly():
    ours = sincos_table(14, 14, 768)[0]
    assert torch.equal(ours, build_sincos2d_pos_embed([14, 14], 768, interleave_sin_cos=True))
    theirs = torch.as_tensor(get_2d_sine_cosine_positional_embedding(768, 14, cls_token=False)).float()
    transposed = rearrange(ours, '(h w) d -> (w h) d', h=14)
    assert (transposed - theirs.reshape(196, 768)).abs().max() < 1e-5
    assert torch.allclose(ours.square().sum(1), torch.full((196,), 384.0))


def test_sincos_table_at_another_grid_by_a_loop():
    table = sincos_table(2, 5, 16, base_grid=(15, 15))[0]
    for row in range(2):
        for col in range(5):
            i, j = (row + 0.5) * 15 / 2 - 0.5, (col + 0.5) * 15 / 5 - 0.5
            expected = [f(x / 10000 ** (k / 4)) for x in (i, j) for f in (math.sin, math.cos) for k in range(4)]
            assert (table[row * 5 + col] - torch.tensor(expected)).abs().max() < 2e-6


def test_moco_v3_initialization():
    for build, bound_qkv, bound_patch in ((vit_small, .0883883, .0721688),):
        encoder = build(num_heads=12)
        for block in encoder.blocks:
            assert 0.999 * bound_qkv < block.attn.qkv.weight.abs().max() < bound_qkv * 1.0001
            assert block.attn.qkv.bias.abs().max() == 0
        bound = math.sqrt(6 / (384 + 1536))
        assert 0.999 * bound < encoder.blocks[0].mlp.fc1.weight.abs().max() < bound * 1.0001
        assert 0.999 * bound_patch < encoder.patch_embed.proj.weight.abs().max() < bound_patch * 1.0001
        assert encoder.patch_embed.proj.bias.abs().max() == 0
        assert encoder.cls_token.std() < 2e-6
        assert encoder.pos_embed[:, 0].abs().max() == 0 and not encoder.pos_embed.requires_grad


def test_frozen_patch_projection_and_gradient_to_the_base_kernel():
    for frozen in (False, True):
        encoder = ViT(**SMALL, freeze_patch_embed=frozen)
        encoder(torch.randn(2, 3, 48, 48), patch_size=8).square().sum().backward()
        grad = encoder.patch_embed.proj.weight.grad
        assert (grad is None) if frozen else (grad.shape == (64, 3, 4, 4) and grad.abs().sum() > 0)


def test_errors_name_the_fix():
    encoder = ViT(img_size=224)
    with pytest.raises(ValueError, match='patch size 20 does not divide image size 224x224; use 14, 16, 28, 32'):
        encoder(torch.randn(1, 3, 224, 224), patch_size=20)
    with pytest.raises(ValueError, match='5 heads do not divide width 64'):
        ViT(embed_dim=64, num_heads=5)
    with pytest.raises(ValueError, match='rope'):
        ViT(pos_embed='rope')
