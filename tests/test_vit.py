"""vit.py against timm, MoCo-v3's formulas, and files in the layouts of others."""
import math
import os
from functools import partial

import pytest
import timm
import torch
import torch.nn as nn
from conftest import error
from methods import refused, shrunk
from timm.layers import build_sincos2d_pos_embed, resample_abs_pos_embed
from timm.models import VisionTransformer

from compress import random_keep
from vit import (ViT, config_of, forward_features, load_backbone, positions, read, sincos_table,
                 vit_small)

SMALL = dict(patch_size=4, embed_dim=64, depth=2, num_heads=2)


def normal(model):
    """Every weight drawn: zeros and ones, and LayerScale's 1e-5, would test nothing."""
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    return model.eval()


# ---------------------------------------------------------------- any ViT of timm's

ARCHITECTURES = {
    'ViT': {},
    'registers with positions': dict(reg_tokens=2),
    'norms everywhere': dict(qk_norm=True, embed_norm_layer=nn.LayerNorm, pre_norm=True),
    'deit3_small_patch16_224': {},                            # no_embed_class, LayerScale
    'vit_small_patch14_reg4_dinov2': {},
    'vit_base_patch32_clip_224': {},                          # no bias in the projection
}


def of_timm(name):
    """Two narrow blocks, and an image that is no square."""
    build = partial(timm.create_model, name) if '_' in name else VisionTransformer
    return normal(build(img_size=(24, 32), num_classes=0, **SMALL, **ARCHITECTURES[name]))


@pytest.mark.parametrize('name', ARCHITECTURES)
def test_compressed_tokens_are_timms_of_shrunk_images_less_the_dropped_ones(name):
    """6 x 10 patches of 8 px, where timm sees 4 px, its positions on that grid. Measured: 2e-6.

    Uncompressed ones are timm's as they are. Measured: 8e-7.
    """
    model = of_timm(name)
    images = torch.randn(2, 3, 24, 32)
    assert error(forward_features(model, images), model.forward_features(images)) < 3e-6
    images = torch.randn(2, 3, 48, 80)
    ours = forward_features(model, images, 8, 0.5, torch.Generator().manual_seed(3))
    ids = random_keep(2, 60, 0.5, torch.Generator().manual_seed(3))
    prefix = model.num_prefix_tokens

    def patch_drop(x):
        kept = [tokens[i] for tokens, i in zip(x[:, prefix:], ids)]
        return torch.cat([x[:, :prefix], torch.stack(kept)], dim=1)

    del model.patch_drop                                      # a module
    model.patch_drop = patch_drop
    rows = model.pos_embed.shape[1] - 6 * 8
    table = resample_abs_pos_embed(model.pos_embed, [6, 10], [6, 8], rows, antialias=False)
    model.pos_embed = nn.Parameter(table)
    model.patch_embed.strict_img_size = False
    assert error(ours, model.forward_features(shrunk(images, 8, 4).float())) < 5e-6


def test_what_would_come_out_wrong_is_refused_by_name():
    for name, what, options in (
            ('deit_tiny_distilled_patch16_224', 'a distillation token', SMALL),
            ('cait_xxs24_224', 'class attention', SMALL),
            ('convit_tiny', 'a late class token', {}),
            ('eva02_tiny_patch14_224', 'rotary positions', SMALL),
            ('beit_base_patch16_224', 'relative positions', SMALL),
            ('swin_tiny_patch4_window7_224', 'windows or stages', dict(embed_dim=24, depths=(1,))),
            ('resnet18', 'a hybrid stem', {}),
            ('vit_base_patch16_siglip_224', 'no class token', SMALL),
            ('vit_tiny_patch16_224', 'no table of positions', dict(SMALL, pos_embed='none'))):
        model = timm.create_model(name, **options)
        with pytest.raises(ValueError, match=f'^{type(model).__name__} has {what}; '):
            forward_features(model, torch.randn(1, 3, 224, 224))


# ---------------------------------------------------------------- ours

def test_our_compressed_tokens_are_those_of_timm_with_our_weights():
    """timm gets our codes of 6 x 12 patches as its own. Measured: no difference."""
    ours = normal(ViT(img_size=48, **SMALL))
    theirs = VisionTransformer((24, 48), num_classes=0, **SMALL)
    pos = torch.cat(positions(ours, (6, 12)), dim=1)
    theirs.load_state_dict(dict(ours.state_dict(), pos_embed=pos))
    images = torch.randn(2, 3, 48, 96)
    tokens = [forward_features(model, images, 8, 0.75, torch.Generator().manual_seed(3))
              for model in (ours, theirs)]
    assert error(*tokens) < 1e-6


def test_initialization_is_moco_v3s():
    """Uniform in +-sqrt(6 / (fan in + fan out)); q, k and v count as three maps 384 -> 384."""
    encoder = vit_small(depth=1, num_heads=12)
    block = encoder.blocks[0]
    for layer, fan in ((block.attn.qkv, 384 + 384), (block.mlp.fc1, 384 + 1536),
                       (encoder.patch_embed.proj, 768 + 384)):
        assert layer.weight.abs().max().item() == pytest.approx(math.sqrt(6 / fan), rel=1e-3)
        assert layer.bias.abs().max() == 0
    assert encoder.cls_token.std() < 2e-6 and not encoder.pos_embed.requires_grad


def test_sincos_table_equals_timm():
    theirs = build_sincos2d_pos_embed([14, 14], 768, interleave_sin_cos=True)
    assert torch.equal(sincos_table(14, 14, 768)[0], theirs)


def test_the_code_of_a_place_does_not_depend_on_the_patch_size():
    """A third or a fifth of a patch has its centre in the middle one."""
    encoder = vit_small(depth=0)
    _, fine = positions(encoder, (14 * 3, 14 * 5))
    middle = fine.view(14, 3, 14, 5, 384)[:, 1, :, 2]
    assert error(middle.reshape(1, 196, 384), encoder.pos_embed[:, 1:]) < 1e-5


def test_arguments_out_of_range():
    refused(lambda arguments: ViT(**arguments), [
        (dict(patch_size=20), 'size 20 does not divide image size 224x224; use .* multiple of 20'),
        (dict(num_heads=5), 'width 384 must be a multiple of 4, .* the 5 heads'),
        (dict(pos_embed='rope'), "'rope' is not one of sincos, learned")])


# ---------------------------------------------------------------- files of ours and of others

def model_of(width):
    return normal(VisionTransformer(32, 8, embed_dim=width, depth=1, num_heads=2, num_classes=0))


torch.manual_seed(0)
MODEL = model_of(128)
RIGHT = MODEL.state_dict()
WRONG = {name: value + 1 for name, value in RIGHT.items()}
HEAD = {'head.weight': torch.zeros(3, 128), 'head.bias': torch.zeros(3)}


def prefixed(prefix, tensors):
    return {prefix + name: value for name, value in tensors.items()}


# files as they are released, with wrong values where a loader could go wrong
FILES = {
    'timm': RIGHT | HEAD,
    'timm with EMA': dict(state_dict=WRONG, state_dict_ema=RIGHT, epoch=3),
    'MAE': dict(model=RIGHT | {'mask_token': torch.zeros(1, 1, 64),
                               'decoder_blocks.0.attn.proj.bias': torch.zeros(64)}),
    'MoCo-v3': dict(state_dict=prefixed('module.base_encoder.', RIGHT | HEAD)
                    | prefixed('module.momentum_encoder.', WRONG)
                    | {'module.predictor.0.weight': torch.zeros(4, 4)}),
    'DINO': dict(student=prefixed('module.backbone.', WRONG),
                 teacher=prefixed('backbone.', RIGHT) | {'head.mlp.0.bias': torch.zeros(4)}),
}


@pytest.fixture
def loaded(tmp_path):
    """loaded(saved) is load_backbone of a file that holds this."""
    def load(saved):
        torch.save(saved, tmp_path / 'a.pth')
        return load_backbone(tmp_path / 'a.pth')
    return load


def test_vit_h_has_16_heads():
    weights = {'patch_embed.proj.weight': torch.zeros(1280, 3, 14, 14),
               'pos_embed': torch.zeros(1, 257, 1280), 'blocks.0.mlp.fc1.bias': torch.zeros(5120)}
    config = config_of(weights, None, 'ours_mae_or_deit')
    assert (config['num_heads'], config['img_size'], config['mlp_ratio']) == (16, 224, 4)


def test_files_of_others_give_timms_features(loaded):
    images = torch.randn(4, 3, 32, 32)
    for author, saved in FILES.items():
        encoder, info = loaded(saved)
        assert error(encoder(images), MODEL(images)) < 1e-5, author
        assert info == {}


def test_our_file_gives_back_the_encoder_and_what_it_was_trained_on(loaded):
    ours = ViT(28, 4, in_chans=1, embed_dim=32, depth=1, num_heads=2, mlp_ratio=3.0,
               pos_embed='learned', freeze_patch_embed=True)
    info = dict(mean=(0.3,), std=(0.2,), dataset='fashion_mnist')
    encoder, found = loaded(dict(model=ours.state_dict(), config=ours.config, step=3, **info))
    assert found == info and encoder.config == ours.config
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(encoder(images), ours(images))


def test_number_of_heads_and_the_kind_of_positions(loaded):
    """64 channels a head, but 12 heads in MoCo-v3's ViT-S with its fixed table."""
    small = model_of(384).state_dict()
    table = torch.cat([torch.zeros(1, 1, 384), sincos_table(4, 4, 384)], dim=1)
    theirs = prefixed('module.base_encoder.', dict(small, pos_embed=table))
    for saved, expected in ((small, (6, 'learned')), (dict(state_dict=theirs), (12, 'sincos'))):
        config = loaded(saved)[0].config
        assert (config['num_heads'], config['pos_embed']) == expected


def test_weights_that_are_no_whole_vit_are_refused(loaded):
    kernel = 'patch_embed.proj.weight'
    refused(loaded, [
        (dict([*RIGHT.items()][:-1]), '(?s)Missing key.*norm.bias'),
        ({kernel: RIGHT[kernel]}, "a.pth holds no whole ViT: 'pos_embed'"),
        (RIGHT | {'blocks.0.ls1.gamma': torch.ones(128)}, '(?s)Unexpected key.*ls1.gamma'),
        (RIGHT | {'norm.bias': torch.full((128,), math.nan)}, 'a.pth: .* not finite'),
        ({'conv1.weight': torch.zeros(4)}, r'a.pth holds no ViT .*\(conv1.weight')])


def test_a_flipped_bit_is_found(loaded, tmp_path):
    """torch.load alone does not look."""
    loaded(RIGHT)
    path = tmp_path / 'a.pth'
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 8
    path.write_bytes(content)
    torch.load(path)
    with pytest.raises(ValueError, match='a.pth cannot be read: it is damaged'):
        read(path)


class Unknown:
    """Pickle can call anything by such an object."""

    def __reduce__(self):
        return os.mkdir, ('called',)


def test_reading_runs_no_code_of_the_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(Unknown(), 'a.pth')
    with pytest.raises(Exception, match='mkdir'):
        read('a.pth')
    assert os.listdir() == ['a.pth']
