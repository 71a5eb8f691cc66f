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

from vit import ViT, sincos_table
from weights import find_encoder, load_backbone, read, save


def timm_vit(embed_dim=128, num_heads=2, **settings):
    """30 tensors: 4 of the embeddings, 12 of each of the two blocks, 2 of the last norm."""
    torch.manual_seed(0)
    settings = dict(dict(img_size=32, patch_size=8, depth=2, num_classes=0), **settings)
    vit = timm.models.VisionTransformer(embed_dim=embed_dim, num_heads=num_heads, **settings)
    return vit.eval()


def prefixed(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


def without(tensors, *keys):
    return {key: value for key, value in tensors.items() if key not in keys}


@pytest.fixture
def backbone(tmp_path):
    """A file as train.py leaves it, for 28-px grey images."""
    torch.manual_seed(0)
    encoder = ViT(img_size=28, patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=2)
    path = tmp_path / 'backbone.pt'
    save(dict(model=encoder.state_dict(), config=encoder.config, mean=(0.3,), std=(0.2,),
              dataset='fashion_mnist'), path)
    return path


# ---------------------------------------------------------------- writing

def test_save_and_read(tmp_path):
    value = dict(tensor=torch.randn(3), number=1.5, text='a', nested=dict(key=(1, 2)))
    save(value, tmp_path / 'value.pt')
    found = read(tmp_path / 'value.pt')
    assert torch.equal(found.pop('tensor'), value.pop('tensor')) and found == value
    save('text: ü', tmp_path / 'text')
    assert (tmp_path / 'text').read_text(encoding='utf-8') == 'text: ü'
    assert sorted(os.listdir(tmp_path)) == ['text', 'value.pt']


@contextlib.contextmanager
def full_disk():
    """No file of this process may grow over 10,000 bytes, as if the disk were full then.

    Not longer than it takes: pytest itself may write to a file.
    """
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
    assert path.read_text() == 'old' and os.listdir(tmp_path) == ['value.pt']


def test_a_short_file_noticed_by_torch_alone_names_the_file_too(tmp_path, monkeypatch):
    def torch_save(value, file):
        raise RuntimeError('[enforce fail at inline_container.cc:672] . unexpected pos 64 vs 0')
    monkeypatch.setattr(torch, 'save', torch_save)
    with pytest.raises(OSError, match=r"a.pt' cannot be written: no space left on the disk$"):
        save({}, tmp_path / 'a.pt')
    assert os.listdir(tmp_path) == []


def test_interrupted_save_leaves_nothing(tmp_path, monkeypatch):
    def torch_save(value, file):
        raise KeyboardInterrupt
    monkeypatch.setattr(torch, 'save', torch_save)
    with pytest.raises(KeyboardInterrupt):
        save({}, tmp_path / 'a.pt')
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize('path, reason', (
    ('missing/a.pt', 'No such file or directory'),
    ('file/a.pt', 'Not a directory'),
    ('folder', 'Is a directory'),
))
def test_save_says_why_it_cannot(path, reason, tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder').mkdir()
    with pytest.raises(OSError, match=f"{path}' cannot be written: {reason}$"):
        save('', tmp_path / path)
    assert sorted(os.listdir(tmp_path)) == ['file', 'folder']


# ---------------------------------------------------------------- damaged and foreign files

def flipped(content, position, bit):
    damaged = bytearray(content)
    damaged[position] ^= 1 << bit
    return bytes(damaged)


def records_of(path):
    with zipfile.ZipFile(path) as archive:
        return {record.filename.split('/', 1)[1]: record for record in archive.infolist()}


def test_every_flipped_bit_is_found_or_harmless(backbone, capsys):
    """Random bits of the whole file, and all bits of what the archive's index says of one record.

    The index gives each record 46 bytes and its name. Some, such as its date, do not matter.
    """
    content = backbone.read_bytes()
    before = read(backbone)['model']
    rng = random.Random(0)
    flips = [(rng.randrange(len(content)), rng.randrange(8)) for _ in range(500)]
    entry = content.rindex(b'PK\x01\x02', 0, content.rindex(b'archive/data/6'))
    flips += [(entry + i, bit) for i in range(60) for bit in range(8)]
    found = 0
    for position, bit in flips:
        backbone.write_bytes(flipped(content, position, bit))
        try:
            after = load_backbone(backbone)[0].state_dict()
        except ValueError as error:
            assert '\n' not in str(error) and 'backbone.pt' in str(error)
            found += 1
        else:
            assert all(torch.equal(before[key], after[key]) for key in before), (position, bit)
    assert found > 0.7 * len(flips)


def test_a_flipped_weight_names_its_record(backbone):
    record = records_of(backbone)['data/6']
    middle = record.header_offset + record.file_size // 2
    backbone.write_bytes(flipped(backbone.read_bytes(), middle, 3))
    with pytest.raises(ValueError, match="is damaged in its record 'archive/data/6'"):
        read(backbone)


@pytest.mark.parametrize('size', (0, 3, 10, 1000, -1000, -100, -1))
def test_truncated_files(size, backbone):
    backbone.write_bytes(backbone.read_bytes()[:size])
    with pytest.raises(ValueError, match="backbone.pt' is truncated") as error:
        read(backbone)
    assert '\n' not in str(error.value) and 'weights_only' not in str(error.value)


def test_files_without_checksums_are_read_with_a_warning(tmp_path, capsys):
    tensors = timm_vit().state_dict()
    torch.save(tensors, tmp_path / 'legacy.pth', _use_new_zipfile_serialization=False)
    torch.serialization.set_crc32_options(False)
    torch.save(tensors, tmp_path / 'unchecked.pth')
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
    with pytest.raises(ValueError, match=f"a.pt' holds an object of class {name}, ") as error:
        read(tmp_path / 'a.pt')
    assert '\n' not in str(error.value) and 'weights_only' not in str(error.value)


def test_the_namespace_of_released_files_is_read(tmp_path):
    args = argparse.Namespace(arch='vit_small', lr=[1e-3])
    torch.save(dict(model=timm_vit().state_dict(), args=args), tmp_path / 'a.pth')
    assert read(tmp_path / 'a.pth')['args'] == args
    assert load_backbone(tmp_path / 'a.pth')[0].embed_dim == 128


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip('safetensors.torch')
    theirs = timm_vit()
    path = tmp_path / 'model.safetensors'
    safetensors.save_file(theirs.state_dict(), path)
    assert torch.equal(load_backbone(path)[0].norm.bias, theirs.norm.bias)
    content = path.read_bytes()
    path.write_bytes(content[:-1])
    with pytest.raises(ValueError, match='is truncated or damaged'):
        read(path)
    monkeypatch.setitem(sys.modules, 'safetensors.torch', None)     # as if it were not installed
    with pytest.raises(ValueError, match='pip install safetensors'):
        read(path)


def test_control_characters_of_a_name_do_not_reach_the_terminal(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*\\x1b\[31m.pt'"):
        read(tmp_path / '\x1b[31m.pt')


# ---------------------------------------------------------------- finding the encoder

MOCO_HEAD = ('0.weight', '1.weight', '1.bias', '1.running_mean', '3.weight', '6.weight')
DINO_HEAD = ('mlp.0.weight', 'mlp.0.bias', 'last_layer.weight_g', 'last_layer.weight_v')
MAE_DECODER = ('mask_token', 'decoder_pos_embed', 'decoder_embed.weight', 'decoder_norm.bias',
               'decoder_blocks.0.attn.qkv.weight', 'decoder_pred.bias')


def zeros(prefix, keys):
    return {prefix + key: torch.zeros(4) for key in keys}


def layouts(right):
    """Files as they are released: their keys, and other values where a loader could go wrong."""
    wrong = {key: value + 1 for key, value in right.items()}
    head = {'head.weight': torch.zeros(5, 128), 'head.bias': torch.zeros(5)}
    moco = {
        **prefixed('module.base_encoder.', {**right, **zeros('head.', MOCO_HEAD)}),
        **prefixed('module.momentum_encoder.', {**wrong, **zeros('head.', MOCO_HEAD)}),
        **zeros('module.predictor.', MOCO_HEAD),
    }
    dino = dict(
        student={**prefixed('module.backbone.', wrong), **zeros('module.head.', DINO_HEAD)},
        teacher={**prefixed('backbone.', right), **zeros('head.', DINO_HEAD)},
        dino_loss=dict(center=torch.zeros(1, 4)),
    )
    lightning = {**prefixed('model.encoder.', right), **zeros('projector.', MOCO_HEAD)}
    return {
        'timm': right,
        'timm with head': {**right, **head},
        'timm with EMA': dict(state_dict=wrong, state_dict_ema=right, epoch=3),
        'DeiT with EMA': dict(model={**wrong, **head}, model_ema={**right, **head}, optimizer={}),
        'MoCo-v3': dict(epoch=300, arch='vit_small', state_dict=moco, optimizer=dict(state={})),
        'MoCo-v3 linear': dict(state_dict=prefixed('module.', {**right, **head})),
        'DINO': dino,
        'DINO student': dict(student=prefixed('module.backbone.', right)),
        'MAE': dict(model={**right, **zeros('', MAE_DECODER)}),
        'compiled': prefixed('_orig_mod.', right),
        'lightning': dict(state_dict=lightning),
    }


@pytest.mark.parametrize('name, prefix', (
    ('timm', ''),
    ('timm with head', ''),
    ('timm with EMA', 'state_dict_ema.'),
    ('DeiT with EMA', 'model_ema.'),
    ('MoCo-v3', 'state_dict.module.base_encoder.'),
    ('MoCo-v3 linear', 'state_dict.module.'),
    ('DINO', 'teacher.backbone.'),
    ('DINO student', 'student.module.backbone.'),
    ('MAE', 'model.'),
    ('compiled', '_orig_mod.'),
    ('lightning', 'state_dict.model.encoder.'),
))
def test_foreign_layouts(name, prefix, tmp_path):
    """The encoder is found in each, and its features are those of timm with the same weights."""
    theirs = timm_vit()
    images = torch.randn(4, 3, 32, 32)
    torch.save(layouts(theirs.state_dict())[name], tmp_path / 'a.pth')
    encoder, info = load_backbone(tmp_path / 'a.pth')
    assert f"30 tensors of '{prefix}', width 128, depth 2, 2 heads (assumed" in info['report']
    assert info['mean'] == (0.485, 0.456, 0.406) and info['dataset'] is None
    with torch.no_grad():
        assert (encoder.eval()(images) - theirs(images)).abs().max() < 1e-5


def test_what_was_left_out_is_named(tmp_path):
    def left_out(name):
        return find_encoder(layouts(timm_vit().state_dict())[name])[2]
    assert left_out('timm') == []
    assert left_out('DINO') == ['dino_loss', 'student', 'teacher.head']
    assert left_out('MoCo-v3') == ['state_dict.module.base_encoder.head',
                                   'state_dict.module.momentum_encoder',
                                   'state_dict.module.predictor']
    assert left_out('lightning') == ['state_dict.projector']
    assert left_out('timm with EMA') == ['state_dict']


def test_several_encoders_are_a_question(tmp_path):
    right = timm_vit().state_dict()
    wrong = {key: value + 1 for key, value in right.items()}
    torch.save(prefixed('encoder_q.', wrong) | prefixed('encoder_k.', right), tmp_path / 'a.pth')
    with pytest.raises(ValueError, match="prefix of eval.py: 'encoder_q.', 'encoder_k.'"):
        load_backbone(tmp_path / 'a.pth')
    for prefix in ('encoder_k', 'encoder_k.'):
        encoder, info = load_backbone(tmp_path / 'a.pth', prefix=prefix)
        assert torch.equal(encoder.norm.bias, right['norm.bias'])
        assert info['report'].endswith("left out: 'encoder_q'")


def test_number_of_heads(tmp_path):
    """64 channels a head, but 16 heads in ViT-H, and 12 in MoCo-v3's ViT-S with its fixed table."""
    def heads(saved, num_heads=None):
        torch.save(saved, tmp_path / 'a.pth')
        return load_backbone(tmp_path / 'a.pth', num_heads)[0].config['num_heads']
    small = timm_vit(embed_dim=384, num_heads=6).state_dict()
    table = torch.cat([torch.zeros(1, 1, 384), sincos_table(4, 4, 384)], dim=1)
    moco = {**small, 'pos_embed': table}
    half = {key: value.half() for key, value in moco.items()}
    assert heads(small) == 6 and heads(small, 3) == 3
    assert heads(dict(state_dict=prefixed('module.base_encoder.', moco))) == 12
    assert heads(dict(state_dict=prefixed('module.', half))) == 12
    assert heads(dict(state_dict=prefixed('module.', small))) == 6
    assert heads(timm_vit(embed_dim=1280, num_heads=16, depth=1).state_dict()) == 16


def test_fixed_positions_are_recognized(tmp_path):
    tensors = timm_vit().state_dict()
    tensors['pos_embed'] = torch.cat([torch.zeros(1, 1, 128), sincos_table(4, 4, 128)], dim=1)
    torch.save(tensors, tmp_path / 'a.pth')
    encoder, _ = load_backbone(tmp_path / 'a.pth')
    assert encoder.config['pos_embed'] == 'sincos' and not encoder.pos_embed.requires_grad


# ---------------------------------------------------------------- ours

def test_our_backbone(backbone):
    encoder, info = load_backbone(backbone)
    assert info['mean'] == (0.3,) and info['std'] == (0.2,) and info['dataset'] == 'fashion_mnist'
    assert info['config'] == encoder.config and encoder.config['num_heads'] == 2
    assert 'assumed' not in info['report'] and 'left out' not in info['report']


def test_files_of_the_first_version_load(backbone):
    saved = read(backbone)
    saved['sizes'] = saved.pop('config')
    save(saved, backbone)
    assert load_backbone(backbone)[1]['config'] == saved['sizes']


def test_our_backbone_in_timm_and_back(backbone):
    """The README's snippet: timm takes the weights as they are, and has the same features."""
    saved = torch.load(backbone, weights_only=True)
    config = without(saved['config'], 'pos_embed', 'freeze_patch_embed')
    theirs = timm.models.VisionTransformer(**config, num_classes=0).eval()
    theirs.load_state_dict(saved['model'])

    ours = load_backbone(backbone)[0].eval()
    images = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        assert (ours(images) - theirs(images)).abs().max() < 1e-5
    torch.save(theirs.state_dict(), backbone)
    back, _ = load_backbone(backbone, num_heads=2)
    assert back.config == ours.config
    assert all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters()))


TENSORS = timm_vit().state_dict()


@pytest.mark.parametrize('saved, message', (
    (without(TENSORS, 'norm.bias'), r'1 tensors are missing, 0 unexpected.*missing norm.bias'),
    (without(TENSORS, 'pos_embed'), r'pos_embed has the shape \(1, 0, 0\)'),
    ({**TENSORS, 'blocks.0.ls1.gamma': torch.ones(128)}, r"1 unexpected.*'blocks.0.ls1.gamma'"),
    ({**TENSORS, 'fc_norm.bias': torch.ones(128)}, r'1 unexpected.*fc_norm.bias'),
    ({**TENSORS, 'blocks.1.attn.qkv.weight': torch.ones(9, 9)}, r'is \(9, 9\), not \(384, 128\)'),
    ({**TENSORS, 'norm.bias': torch.full((128,), torch.nan)}, r'1 of 30 .* not finite.* norm.bias'),
    ({**TENSORS, 'norm.bias': [1], 3: 4}, r'1 tensors are missing, 0 unexpected'),
    ({**TENSORS, 'pos_embed': torch.zeros(1, 16, 128)}, r'pos_embed has the shape \(1, 16, 128\)'),
    ({**TENSORS, 'patch_embed.proj.weight': torch.ones(128, 48)}, r'has 2 dimensions'),
    (dict(model=TENSORS, config=dict(width=3)), r"not that of a ViT of this version.*'width'"),
    (dict(model=TENSORS, config=dict(num_heads=5)), r'5 heads do not divide width 384'),
    (dict(state_dict={'conv1.weight': torch.zeros(4)}), r'there is no ViT in it.*conv1.weight'),
    (dict(method={}, optimizer={}), r'take the backbone.pt beside it'),
    ([1, 2], r'it holds a list, not a dict'),
))
def test_weights_that_do_not_fit(saved, message, tmp_path):
    torch.save(saved, tmp_path / 'a.pth')
    with pytest.raises(ValueError, match=f"a.pth': .*{message}") as error:
        load_backbone(tmp_path / 'a.pth')
    assert '\n' not in str(error.value)


def test_a_contradicting_number_of_heads(backbone):
    with pytest.raises(ValueError, match='it has 2 heads, not 4'):
        load_backbone(backbone, num_heads=4)
    with pytest.raises(ValueError, match="choose it by --encoder-prefix of eval.py: 'model.'"):
        load_backbone(backbone, prefix='teacher')
