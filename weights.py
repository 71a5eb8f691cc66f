"""Weights in and out: files that are never half written, and the ViT of any file that holds one.

Files of a ViT differ only in the path in front of the keys, so it is found by the ends of its keys:

    ours          model.blocks.0.attn.qkv.weight          beside config, mean, std, dataset
    timm          blocks.0.attn.qkv.weight
    MoCo-v3       state_dict.module.base_encoder.blocks.0.attn.qkv.weight
    DINO          teacher.backbone.blocks.0.attn.qkv.weight
    MAE           model.blocks.0.attn.qkv.weight          beside a decoder, which is left out
    wrappers      state_dict_ema.   _orig_mod.   module.   backbone.   encoder.

Reading never runs code from the file, and compares the checksums of its records. torch.load skips
them: after a flipped bit on the disk it returns a slightly different network.

    save(dict(model=encoder.state_dict(), config=encoder.config), 'backbone.pt')
    encoder, info = load_backbone('backbone.pt')
    print(info['report'])
"""
import argparse
import math
import os
import pickle
import re
import sys
import zipfile
from contextlib import contextmanager, suppress
from pathlib import Path

import torch

from views import IMAGENET_MEAN, IMAGENET_STD
from vit import ViT, sincos_table

LANDMARK = 'patch_embed.proj.weight'    # under timm's names, every ViT has exactly one

# Parts of a model that follow the encoder or, in MAE, stand beside it.
NOT_ENCODER = ('head', 'pre_logits', 'decoder', 'mask_token', 'projector', 'predictor')

# Where a file holds two encoders, its authors evaluate the left one.
PREFERRED = (('teacher', 'student'),                    # DINO
             ('base_encoder', 'momentum_encoder'),      # MoCo-v3
             ('state_dict_ema', 'state_dict'),          # timm: averaged weights, raw weights
             ('model_ema', 'model'))

# Heads by embed_dim, where a head is not 64 wide: ViT-H, ViT-g and ViT-G of timm.
WIDE_HEADS = {1280: 16, 1408: 16, 1664: 16}


# ---------------------------------------------------------------- writing

@contextmanager
def replacing(path):
    """An open file that takes the place of `path` once complete, and otherwise leaves no trace.

    The bytes go to PATH.partial and reach the disk before the rename, so a crash at any moment
    leaves the old file whole. Raises OSError with a one-line reason.
    """
    partial = Path(f'{path}.partial')
    try:
        with open(partial, 'wb') as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, 'strerror', None) or first_line(error)
        if 'unexpected pos' in reason:      # torch.save's words for a file that stopped growing
            reason = 'no space left on the disk'
        raise OSError(f'{quoted(path)} cannot be written: {reason}') from None
    finally:
        with suppress(OSError):             # after the rename there is nothing to remove
            partial.unlink()


def save(value, path):
    """Write a string as text, anything else as torch.save does. See `replacing`."""
    with replacing(path) as file:
        if isinstance(value, str):
            file.write(value.encode())
        else:
            torch.save(value, file)


# ---------------------------------------------------------------- reading

def quoted(path):
    """The name of a file or a tensor for a message, in characters that every terminal can show."""
    return ascii(str(path))


def first_line(error):
    lines = str(error).splitlines()
    return lines[0] if lines else type(error).__name__


def read(path):
    """The contents of a file of torch.save or safetensors, with all tensors on the CPU.

    Besides tensors and plain values it may hold argparse.Namespace, as files of MoCo-v3 and DINO
    do. Raises FileNotFoundError, or ValueError for files that are damaged or hold other classes.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'there is no file {quoted(path)}')
    if path.suffix == '.safetensors':
        return read_safetensors(path)
    check_records(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            return torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        # torch's text is not repeated: it recommends to read the file unsafely
        found = re.search(r'GLOBAL ([\w.]+)', str(error))
        if isinstance(error, pickle.UnpicklingError) and found:
            raise ValueError(f'{quoted(path)} holds an object of class {found[1]}, and making one '
                             f'could run code from the file; save the tensors (its state_dict) '
                             f'alone, where you trust it') from None
        raise ValueError(f'{quoted(path)} is truncated, damaged or not a checkpoint '
                         f'({type(error).__name__})') from None


def read_safetensors(path):
    try:
        from safetensors.torch import load_file     # optional: no file of ours needs it
    except ImportError:
        raise ValueError(f'to read {quoted(path)}, pip install safetensors') from None
    warn_unchecked(path)
    try:
        return load_file(path)
    except Exception as error:
        raise ValueError(f'{quoted(path)} is truncated or damaged ({first_line(error)})') from None


def check_records(path):
    """Compare the CRC-32 that torch.save writes for every record of its zip archive."""
    with open(path, 'rb') as file:
        is_zip = file.read(4) == b'PK\x03\x04'
    if not is_zip:                                  # torch before 1.6: a bare pickle
        warn_unchecked(path)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            records = archive.infolist()
            if not any(record.CRC for record in records):
                warn_unchecked(path)                # torch.serialization.set_crc32_options(False)
                return
            # torch reads nothing, and says nothing, where a bit marks a record as a folder
            folders = [record.filename for record in records if record.external_attr & 0x10]
            damaged = archive.testzip() or next(iter(folders), None)
    except Exception as error:                      # of many kinds, by the place of the damage
        raise ValueError(f'{quoted(path)} is truncated or damaged ({first_line(error)})') from None
    if damaged:
        raise ValueError(f'{quoted(path)} is damaged in its record {damaged!r}; take another copy '
                         f'of the file')


def warn_unchecked(path):
    print(f'{quoted(path)} has no checksums, so damage would go unnoticed', file=sys.stderr)


# ---------------------------------------------------------------- which tensors are the encoder

def flatten(nested, path=''):
    """All tensors of nested dicts, by their keys joined with dots."""
    flat = {}
    for key, value in nested.items():
        if isinstance(value, dict):
            flat.update(flatten(value, f'{path}{key}.'))
        elif torch.is_tensor(value):
            flat[f'{path}{key}'] = value
    return flat


def find_encoder(saved, prefix=None):
    """(prefix, the encoder's tensors by their keys without it, names of the parts left out).

    prefix: which encoder to take, where a file holds several. By default PREFERRED decides.
    """
    if not isinstance(saved, dict):
        raise ValueError(f'it holds a {type(saved).__name__}, not a dict of tensors')
    if 'method' in saved and 'optimizer' in saved:
        raise ValueError('it is the checkpoint of a run; take the backbone.pt beside it')
    flat = flatten(saved)
    paths = [key.removesuffix(LANDMARK) for key in flat if f'.{key}'.endswith(f'.{LANDMARK}')]
    if not paths:
        raise ValueError(f'there is no ViT in it: none of its {len(flat)} tensors is called '
                         f'{LANDMARK} ({", ".join(map(quoted, list(flat)[:3]))} ...)')
    chosen = preferred(paths)
    if prefix is not None:
        chosen = [path for path in paths if path.rstrip('.') == prefix.rstrip('.')]
    if len(chosen) != 1:
        raise ValueError(f'it holds several encoders: save one of them alone, or choose it by '
                         f'--encoder-prefix of eval.py: {", ".join(map(quoted, paths))}')

    prefix = chosen[0]
    inside = {key.removeprefix(prefix): flat[key] for key in flat if key.startswith(prefix)}
    tensors = {key: inside[key] for key in inside if not key.startswith(NOT_ENCODER)}
    left_out = flat.keys() - {prefix + key for key in tensors}
    return prefix, tensors, sorted({part_of(key, prefix) for key in left_out})


def preferred(paths):
    """The paths without those of which the file holds a better version."""
    for better, worse in PREFERRED:
        if any(better in path.split('.') for path in paths):
            paths = [path for path in paths if worse not in path.split('.')]
    return paths


def part_of(key, prefix):
    """Where a key leaves the path of the encoder: 'a.b.head.0', prefix 'a.b.' -> 'a.b.head'."""
    depth = os.path.commonprefix([key, prefix]).count('.')
    return '.'.join(key.split('.')[:depth + 1])


def config_of(tensors, prefix='', num_heads=None):
    """The arguments of the ViT that the tensors belong to, from their shapes.

    Shapes do not tell the number of heads. It is given, known for a width, or 64 channels make one.
    """
    kernel = tensors[LANDMARK]
    if kernel.ndim != 4:
        raise ValueError(f'{LANDMARK} has {kernel.ndim} dimensions, a patch projection has 4')
    embed_dim, in_chans, patch_size, _ = kernel.shape
    pos = tensors.get('pos_embed', torch.zeros(1, 0, 0))
    grid = math.isqrt(max(0, pos.shape[1] - 1))
    if grid < 1 or pos.shape != (1, 1 + grid * grid, embed_dim):
        raise ValueError(f'pos_embed has the shape {tuple(pos.shape)}, not (1, 1 + a square grid, '
                         f'{embed_dim}): this is another architecture')
    blocks = [int(key.split('.')[1]) for key in tensors if re.match(r'blocks\.\d+\.', key)]
    hidden = tensors.get('blocks.0.mlp.fc1.bias', torch.zeros(4 * embed_dim)).numel()

    # at other patch sizes MoCo-v3's fixed table is computed anew, a learned one interpolated
    sincos = is_sincos(pos[0, 1:], grid)
    heads = WIDE_HEADS.get(embed_dim, max(1, embed_dim // 64))
    if sincos and embed_dim == 384 and prefix.startswith('state_dict.module.'):
        heads = 12                                  # MoCo-v3's ViT-S; those of timm and DINO have 6
    return dict(
        img_size=grid * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=1 + max(blocks, default=-1),
        num_heads=num_heads or heads,
        mlp_ratio=hidden / embed_dim,
        pos_embed='sincos' if sincos else 'learned')


def is_sincos(pos, grid):
    """Whether positions (n d) are MoCo-v3's table, up to the rounding of their type."""
    if pos.shape[1] % 4:
        return False
    rounding = 1e-5 if pos.dtype == torch.float32 else 5e-3
    return torch.allclose(pos.float(), sincos_table(grid, grid, pos.shape[1])[0], atol=rounding)


# ---------------------------------------------------------------- the encoder

def check_tensors(encoder, tensors):
    """All tensors must be there and finite: half an encoder would be scored as if it were whole."""
    wanted = encoder.state_dict()
    missing = sorted(wanted.keys() - tensors.keys())
    unexpected = sorted(tensors.keys() - wanted.keys())
    misshapen = [key for key in wanted.keys() & tensors.keys()
                 if wanted[key].shape != tensors[key].shape]
    if missing or unexpected or misshapen:
        examples = [f'missing {key}' for key in missing]
        examples += [f'unexpected {quoted(key)}' for key in unexpected]
        examples += [f'{key} is {tuple(tensors[key].shape)}, not {tuple(wanted[key].shape)}'
                     for key in sorted(misshapen)]
        raise ValueError(f'{len(missing)} tensors are missing, {len(unexpected)} unexpected, '
                         f'{len(misshapen)} of another shape: this is another architecture, or a '
                         f'part of one ({"; ".join(examples[:3])})')
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ValueError(f'{len(broken)} of {len(tensors)} tensors are not finite, the first is '
                         f'{broken[0]}: the run diverged; take an earlier checkpoint')


def load_backbone(path, num_heads=None, prefix=None):
    """(ViT, info) of a backbone.pt of train.py, or of a checkpoint of timm, MoCo-v3, DINO or MAE.

    info: config, mean, std, dataset, and report, a line on what was found. mean, std and dataset
    are None where the file does not say; foreign RGB weights get ImageNet's mean and std.
    num_heads, prefix: see config_of, find_encoder. Raises as `read` does.
    """
    saved = read(path)
    try:
        prefix, tensors, left_out = find_encoder(saved, prefix)
        config = saved.get('config', saved.get('sizes'))    # 'sizes': files of the first version
        ours = isinstance(config, dict)
        if ours and num_heads not in (None, config.get('num_heads')):
            raise ValueError(f'it says that it has {config.get("num_heads")} heads, not '
                             f'{num_heads}')
        encoder = ViT(**(config if ours else config_of(tensors, prefix, num_heads)))
        check_tensors(encoder, tensors)
    except TypeError as error:
        raise ValueError(f'{quoted(path)}: its config is not that of a ViT of this version '
                         f'({first_line(error)})') from None
    except ValueError as error:
        raise ValueError(f'{quoted(path)}: {error}') from None
    encoder.load_state_dict(tensors)

    info = dict(config=encoder.config, mean=None, std=None, dataset=None)
    if ours:
        info.update(mean=saved.get('mean'), std=saved.get('std'), dataset=saved.get('dataset'))
    elif encoder.config['in_chans'] == 3:
        info.update(mean=IMAGENET_MEAN, std=IMAGENET_STD)
    assumed = '' if ours or num_heads else ' (assumed, see --num-heads)'
    report = (f'{quoted(path)}: {len(tensors)} tensors of {quoted(prefix)}, '
              f'width {encoder.embed_dim}, depth {len(encoder.blocks)}, '
              f'{encoder.config["num_heads"]} heads{assumed}, '
              f'{encoder.config["pos_embed"]} positions')
    if left_out:
        report += f'; left out: {", ".join(map(quoted, left_out))}'
    return encoder, dict(info, report=report)
