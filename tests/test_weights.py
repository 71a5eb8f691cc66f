"""Files that are never half written, damage that is found, and the ViT of files of others."""
import argparse
import contextlib
import os
import random
import resource
import sys
import zipfile

import numpy as np
import pytest
import timm
import torch
from conftest import error

from vit import ViT, sincos_table
from weights import load_backbone, read, save


def timm_vit(embed_dim=128, num_heads=2, depth=2):
    """30 tensors: 4 of the embeddings, 12 of each of the two blocks, 2 of the last norm."""
    torch.manual_seed(0)
    vit = timm.models.VisionTransformer(img_size=32, patch_size=8, embed_dim=embed_dim, depth=depth,
                                        num_heads=num_heads, num_classes=0)
    return vit.eval()


def prefixed(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def without(tensors, *keys):
    return {key: value for key, value in tensors.items() if key not in keys}


RIGHT = timm_vit().state_dict()
WRONG = {key: value + 1 for key, value in RIGHT.items()}


@pytest.fixture
def backbone(tmp_path):
    """A file as train.py leaves it, for 28-px grey images."""
    torch.manual_seed(0)
    encoder = ViT(img_size=28, patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=2)
    path = tmp_path / 'backbone.pt'
    save(dict(model=encoder.state_dict(), config=encoder.config, mean=(0.3,), std=(0.2,),
              dataset='fashion_mnist'), path)
    return path


@pytest.fixture
def loaded(tmp_path):
    """loaded(saved) is load_backbone of a file a.pth that holds this."""
    def load(saved, **options):
        torch.save(saved, tmp_path / 'a.pth')
        return load_backbone(tmp_path / 'a.pth', **options)
    return load


@contextlib.contextmanager
def refused(message):
    """ValueError with this message, one line, without torch's advice to read unsafely."""
    with pytest.raises(ValueError, match=message) as failure:
        yield
    assert '\n' not in str(failure.value)
    assert 'weights_only' not in str(failure.value)


# ---- writing

def test_save_and_read(tmp_path):
    value = dict(tensor=torch.randn(3), number=1.5, text='a', nested=dict(key=(1, 2)))
    save(value, tmp_path / 'value.pt')
    found = read(tmp_path / 'value.pt')
    assert torch.equal(found.pop('tensor'), value.pop('tensor'))
    assert found == value
    save('text: ü', tmp_path / 'text')
    assert (tmp_path / 'text').read_text(encoding='utf-8') == 'text: ü'
    assert sorted(os.listdir(tmp_path)) == ['text', 'value.pt']


@contextlib.contextmanager
def full_disk():
    """No file of this process, pytest's included, may grow over 10,000 bytes."""
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, unlimited[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)


@pytest.mark.parametrize('value', ('x' * 20_000, dict(tensor=torch.zeros(10_000))))
def test_full_disk_keeps_the_old_file(value, tmp_path):
    """Python's reason is 'File too large'. Sometimes torch notices first, in its own words."""
    path = tmp_path / 'value.pt'
    save('old', path)
    reason = '(File too large|no space left on the disk)'
    with pytest.raises(OSError, match=f"value.pt' cannot be written: {reason}$"), full_disk():
        save(value, path)
    assert path.read_text() == 'old'
    assert os.listdir(tmp_path) == ['value.pt']


@pytest.mark.parametrize('raised, seen, message', (
    (RuntimeError('unexpected pos 64 vs 0'), OSError, "a.pt' .*: no space left on the disk$"),
    (KeyboardInterrupt(), KeyboardInterrupt, None),
))
def test_a_save_that_fails_leaves_nothing(raised, seen, message, tmp_path, monkeypatch):
    def torch_save(value, file):
        raise raised
    monkeypatch.setattr(torch, 'save', torch_save)
    with pytest.raises(seen, match=message):
        save({}, tmp_path / 'a.pt')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('path, reason', (
    ('missing/a.pt', 'No such file or directory'),
    ('file/a.pt', 'Not a directory'),
    ('folder', 'Is a directory'),
))
def test_save_says_why_it_cannot(path, reason, tmp_path):
    (tmp_path / 'file').touch()
    (tmp_path / 'folder').mkdir()
    with pytest.raises(OSError, match=f"{path}' cannot be written: {reason}$"):
        save('', tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder']


# ---- damaged and foreign files

def flip(path, position, bit):
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def test_every_flipped_bit_is_found_or_harmless(backbone, capsys):
    """Random bits of the whole file, and all bits of a record in its index: 46 bytes and a name.

    Some of these, such as its date, do not matter.
    """
    content = backbone.read_bytes()
    before = read(backbone)['model']
    rng = random.Random(0)
    flips = [(rng.randrange(len(content)), rng.randrange(8)) for _ in range(500)]
    entry = content.rindex(b'PK\x01\x02', 0, content.rindex(b'archive/data/6'))
    flips += [(entry + i, bit) for i in range(60) for bit in range(8)]
    found = 0
    for position, bit in flips:
        flip(backbone, position, bit)
        try:
            after = load_backbone(backbone)[0].state_dict()
        except ValueError as failure:
            assert '\n' not in str(failure) and 'backbone.pt' in str(failure)
            found += 1
        else:
            assert all(torch.equal(before[key], after[key]) for key in before), (position, bit)
        flip(backbone, position, bit)
    assert found > 0.7 * len(flips)


def test_a_flipped_weight_names_its_record(backbone):
    with zipfile.ZipFile(backbone) as archive:
        record, = [one for one in archive.infolist() if one.filename.endswith('/data/6')]
    flip(backbone, record.header_offset + record.file_size // 2, 3)
    with refused("is damaged in its record 'archive/data/6'"):
        read(backbone)


@pytest.mark.parametrize('size', (0, 3, 10, 1000, -1000, -100, -1))
def test_truncated_files(size, backbone):
    backbone.write_bytes(backbone.read_bytes()[:size])
    with refused("backbone.pt' is truncated"):
        read(backbone)


def test_files_without_checksums_are_read_with_a_warning(tmp_path, capsys):
    torch.save(RIGHT, tmp_path / 'legacy.pth', _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    torch.save(RIGHT, tmp_path / 'unchecked.pth')
    torch.serialization.set_crc32_options(True)
    for name in ('legacy.pth', 'unchecked.pth'):
        assert load_backbone(tmp_path / name)[0].embed_dim == 128
        assert f"{name}' has no checksums" in capsys.readouterr().err


class Unknown:
    """Pickle can call anything by such an object."""
    def __reduce__(self):
        return os.mkdir, ('/nowhere/called',)


@pytest.mark.parametrize('value, name', (
    (Unknown(), r'\w+\.mkdir'),
    (torch.nn.Linear(2, 2), 'torch.nn.modules.linear.Linear'),
    (np.float64(1), r'numpy\.\S+'),
))
@pytest.mark.parametrize('as_zip', (True, False))
def test_objects_are_named_and_never_made(value, name, as_zip, tmp_path):
    saved = dict(model={}, value=value)
    torch.save(saved, tmp_path / 'a.pt', _use_new_zipfile_serialization=as_zip)
    with refused(f"a.pt' holds an object of class {name}, "):
        read(tmp_path / 'a.pt')


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip('safetensors.torch')
    path = tmp_path / 'model.safetensors'
    safetensors.save_file(RIGHT, path)
    assert torch.equal(load_backbone(path)[0].norm.bias, RIGHT['norm.bias'])
    path.write_bytes(path.read_bytes()[:-1])
    with refused('is truncated or damaged'):
        read(path)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)     # as if it were not installed
    with refused('pip install safetensors'):
        read(path)


def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*\\x1b\[31m.pt'"):
        read(tmp_path / '\x1b[31m.pt')


# ---- finding the encoder

def zeros(prefix, *keys):
    return {prefix + key: torch.zeros(4) for key in keys}


HEAD = zeros('head.', 'weight', 'bias')
MOCO_HEAD = zeros('head.', '0.weight', '1.bias', '1.running_mean', '3.weight')
MOCO = {
    **prefixed('module.base_encoder.', RIGHT | MOCO_HEAD),
    **prefixed('module.momentum_encoder.', WRONG | MOCO_HEAD),
    **zeros('module.predictor.', '0.weight'),
}
DINO = dict(
    student=prefixed('module.backbone.', WRONG) | zeros('module.head.', 'last_layer.weight_g'),
    teacher=prefixed('backbone.', RIGHT) | zeros('head.', 'mlp.0.weight', 'last_layer.weight_g'),
    dino_loss=zeros('', 'center'),
)
MAE = RIGHT | zeros('', 'mask_token', 'decoder_pos_embed', 'decoder_blocks.0.attn.qkv.weight')
LIGHTNING = prefixed('model.encoder.', RIGHT) | zeros('projector.', '0.weight')

# files as they are released, with wrong values where a loader could go wrong; the prefix of the
# encoder in them; what is left out
LAYOUTS = {
    'timm': (RIGHT, '', ''),
    'timm with head': (RIGHT | HEAD, '', "'head'"),
    'timm with EMA': (dict(state_dict=WRONG, state_dict_ema=RIGHT, epoch=3), 'state_dict_ema.',
                      "'state_dict'"),
    'DeiT with EMA': (dict(model=WRONG | HEAD, model_ema=RIGHT | HEAD, optimizer={}), 'model_ema.',
                      "'model', 'model_ema.head'"),
    'MoCo-v3': (dict(arch='vit_small', state_dict=MOCO), 'state_dict.module.base_encoder.',
                "'state_dict.module.base_encoder.head', 'state_dict.module.momentum_encoder', "
                "'state_dict.module.predictor'"),
    'MoCo-v3 linear': (dict(state_dict=prefixed('module.', RIGHT | HEAD)), 'state_dict.module.',
                       "'state_dict.module.head'"),
    'DINO': (DINO, 'teacher.backbone.', "'dino_loss', 'student', 'teacher.head'"),
    'DINO student': (dict(student=prefixed('module.backbone.', RIGHT)), 'student.module.backbone.',
                     ''),
    'MAE': (dict(model=MAE, args=argparse.Namespace(lr=[1e-3])), 'model.',
            "'model.decoder_blocks', 'model.decoder_pos_embed', 'model.mask_token'"),
    'compiled': (prefixed('_orig_mod.', RIGHT), '_orig_mod.', ''),
    'lightning': (dict(state_dict=LIGHTNING), 'state_dict.model.encoder.',
                  "'state_dict.projector'"),
}


@pytest.mark.parametrize('saved, prefix, left_out', LAYOUTS.values(), ids=LAYOUTS)
def test_foreign_layouts(saved, prefix, left_out, loaded):
    """The encoder is found in each, and its features are those of timm with the same weights."""
    encoder, info = loaded(saved)
    found, _, others = info['report'].partition('; left out: ')
    assert f"30 tensors of '{prefix}', width 128, depth 2, 2 heads (assumed" in found
    assert others == left_out
    assert info['mean'] == (0.485, 0.456, 0.406)
    assert info['dataset'] is None
    images = torch.randn(4, 3, 32, 32)
    assert error(encoder.eval()(images), timm_vit()(images)) < 1e-5


def test_several_encoders_are_a_question(loaded):
    saved = prefixed('encoder_q.', WRONG) | prefixed('encoder_k.', RIGHT)
    with refused("prefix of eval.py: 'encoder_q.', 'encoder_k.'"):
        loaded(saved)
    for prefix in ('encoder_k', 'encoder_k.'):
        encoder, info = loaded(saved, prefix=prefix)
        assert torch.equal(encoder.norm.bias, RIGHT['norm.bias'])
        assert info['report'].endswith("left out: 'encoder_q'")


def test_number_of_heads(loaded):
    """64 channels a head, but 16 heads in ViT-H, and 12 in MoCo-v3's ViT-S with its fixed table."""
    def found(saved, num_heads=None):
        encoder, _ = loaded(saved, num_heads=num_heads)
        assert encoder.pos_embed.requires_grad == (encoder.config['pos_embed'] == 'learned')
        return encoder.config['num_heads'], encoder.config['pos_embed']

    learned = timm_vit(384, 6).state_dict()
    table = torch.cat([torch.zeros(1, 1, 384), sincos_table(4, 4, 384)], dim=1)
    fixed = {**learned, 'pos_embed': table}
    half = {key: value.half() for key, value in fixed.items()}
    assert found(learned) == (6, 'learned')
    assert found(learned, 3) == (3, 'learned')
    assert found(fixed) == (6, 'sincos')
    assert found(dict(state_dict=prefixed('module.', learned))) == (6, 'learned')
    assert found(dict(state_dict=prefixed('module.base_encoder.', fixed))) == (12, 'sincos')
    assert found(dict(state_dict=prefixed('module.', half))) == (12, 'sincos')
    assert found(timm_vit(1280, 16, depth=1).state_dict()) == (16, 'learned')


# ---- ours

def test_our_backbone(backbone):
    """Files of the first version call the config 'sizes'."""
    encoder, info = load_backbone(backbone)
    assert (info['mean'], info['std'], info['dataset']) == ((0.3,), (0.2,), 'fashion_mnist')
    assert info['config'] == encoder.config
    assert encoder.config['num_heads'] == 2
    assert 'assumed' not in info['report'] and 'left out' not in info['report']
    saved = read(backbone)
    saved['sizes'] = saved.pop('config')
    save(saved, backbone)
    assert load_backbone(backbone)[1] == info


def test_our_backbone_in_timm_and_back(backbone, loaded):
    """The README's snippet: timm takes the weights as they are, and has the same features."""
    saved = torch.load(backbone, weights_only=True)
    config = without(saved['config'], 'pos_embed', 'freeze_patch_embed')
    theirs = timm.models.VisionTransformer(**config, num_classes=0).eval()
    theirs.load_state_dict(saved['model'])
    ours = load_backbone(backbone)[0].eval()
    images = torch.randn(4, 1, 28, 28)
    assert error(ours(images), theirs(images)) < 1e-5
    back, _ = loaded(theirs.state_dict(), num_heads=2)
    assert back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters()))


@pytest.mark.parametrize('saved, message', (
    (without(RIGHT, 'norm.bias'), r'1 tensors are missing, 0 unexpected.*missing norm.bias'),
    (without(RIGHT, 'pos_embed'), r'pos_embed has the shape \(1, 0, 0\)'),
    ({**RIGHT, 'blocks.0.ls1.gamma': torch.ones(128)}, r"1 unexpected.*'blocks.0.ls1.gamma'"),
    ({**RIGHT, 'fc_norm.bias': torch.ones(128)}, r'1 unexpected.*fc_norm.bias'),
    ({**RIGHT, 'blocks.1.attn.qkv.weight': torch.ones(9, 9)}, r'is \(9, 9\), not \(384, 128\)'),
    ({**RIGHT, 'norm.bias': torch.full((128,), torch.nan)}, r'1 of 30 .* not finite.* norm.bias'),
    ({**RIGHT, 'norm.bias': [1], 3: 4}, r'1 tensors are missing, 0 unexpected'),
    ({**RIGHT, 'pos_embed': torch.zeros(1, 16, 128)}, r'pos_embed has the shape \(1, 16, 128\)'),
    ({**RIGHT, 'patch_embed.proj.weight': torch.ones(128, 48)}, r'has 2 dimensions'),
    (dict(model=RIGHT, config=dict(width=3)), r"not that of a ViT of this version.*'width'"),
    (dict(model=RIGHT, config=dict(num_heads=5)), r'5 heads do not divide width 384'),
    (dict(state_dict={'conv1.weight': torch.zeros(4)}), r'there is no ViT in it.*conv1.weight'),
    (dict(method={}, optimizer={}), r'take the backbone.pt beside it'),
    ([1, 2], r'it holds a list, not a dict'),
))
def test_weights_that_do_not_fit(saved, message, loaded):
    with refused(f"a.pth': .*{message}"):
        loaded(saved)


@pytest.mark.parametrize('options, message', (
    (dict(num_heads=4), 'it has 2 heads, not 4'),
    (dict(prefix='teacher'), "choose it by --encoder-prefix of eval.py: 'model.'"),
))
def test_options_that_contradict_the_file(options, message, backbone):
    with refused(message):
        load_backbone(backbone, **options)
