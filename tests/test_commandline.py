"""commandline.py: what a flag accepts, what --help shows, where a message goes."""
import argparse

import pytest
import torch

from commandline import (Parser, count, count_or_zero, fail, fraction, not_negative, pick_device,
                         pick_precision, positive, rate, size)

GOOD_VALUES = [
    (positive, '1e-3', 0.001),
    (not_negative, '0', 0.0),
    (fraction, '1', 1.0),
    (rate, '0', 0.0),
    (count, '1281167', 1_281_167),
    (count_or_zero, '0', 0),
    (size, '224', 224),
]
BAD_VALUES = [
    (positive, '0', '0 must be above 0'),
    (positive, 'nan', 'nan must be above 0'),
    (positive, 'inf', 'inf must be above 0 and at most'),
    (positive, 'fast', "'fast' is not a number"),
    (not_negative, '-1', '-1 must be at least 0'),
    (fraction, '1.5', '1.5 must be at least 0 and at most 1'),
    (rate, '1', '1 must be at least 0 and at most 0.999999'),
    (count, '0', '0 must be at least 1'),
    (count, '2.5', "'2.5' is not a whole number"),
    (count_or_zero, '-1', '-1 must be at least 0'),
    (size, '0', '0 must be at least 1'),
    (size, '1000000', '1000000 must be at least 1 and at most 10000'),
]


@pytest.mark.parametrize('flag_type, text, value', GOOD_VALUES)
def test_values_that_a_flag_accepts(flag_type, text, value):
    assert flag_type(text) == value
    assert type(flag_type(text)) is type(value)


@pytest.mark.parametrize('flag_type, text, message', BAD_VALUES)
def test_values_that_a_flag_refuses(flag_type, text, message):
    with pytest.raises(argparse.ArgumentTypeError, match=message):
        flag_type(text)


@pytest.fixture
def parser():
    parser = Parser('What it does.\n\n    python train.py', prog='train.py')
    parser.add_argument('--lr', type=positive, default=0.004, help='peak learning rate')
    parser.add_argument('--name', help='folder below runs/')
    parser.add_argument('--dry-run', action='store_true', help='do nothing')
    return parser


def test_help_shows_the_text_as_written_and_each_default_once(parser):
    text = parser.format_help()
    assert 'What it does.\n\n    python train.py\n' in text
    assert 'peak learning rate (default: 0.004)' in text
    assert text.count('default') == 1                         # not those that are None or False
    assert max(map(len, text.splitlines())) <= 80


@pytest.mark.parametrize('flags, message', [
    (['--lr', 'nan'], 'train.py: error: argument --lr: nan must be above 0'),
    (['--dry'], 'train.py: error: unrecognized arguments: --dry'),
])
def test_a_wrong_flag_is_one_line(parser, flags, message, capsys):
    with pytest.raises(SystemExit) as stop:
        parser.parse_args(flags)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith(message)


@pytest.mark.parametrize('rank, local_rank, world, printed', [
    ('0', '0', '4', 'the reason\n'),
    ('1', '1', '4', ''),
    ('2', '0', '4', 'the reason  [process 2]\n'),           # the first of another machine
    ('1', '1', '1', 'the reason\n'),                        # left over in the environment
    ('1', '1', '', 'the reason\n'),
])
def test_processes_that_have_not_joined_fail_with_one_voice(rank, local_rank, world, printed,
                                                            monkeypatch, capsys):
    monkeypatch.setenv('RANK', rank)
    monkeypatch.setenv('LOCAL_RANK', local_rank)
    monkeypatch.setenv('WORLD_SIZE', world)
    with pytest.raises(SystemExit) as stop:
        fail('the reason')
    assert stop.value.code == 1
    assert capsys.readouterr().err == printed


def test_a_device_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: False)
    with pytest.raises(ValueError, match='--device cuda is not there; use --device cpu'):
        pick_device('cuda')


def test_more_processes_than_gpus(monkeypatch):
    """The process that has a GPU meets the error too; else it would wait for the others."""
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 2)
    monkeypatch.setenv('LOCAL_RANK', '0')
    monkeypatch.setenv('LOCAL_WORLD_SIZE', '3')
    with pytest.raises(ValueError, match=r'3 processes .* 2 GPU\(s\); lower --nproc_per_node'):
        pick_device('cuda')


@pytest.mark.parametrize('name, device, in_hardware, expected', [
    ('auto', 'cuda', True, torch.bfloat16),
    ('auto', 'cuda', False, torch.float32),
    ('float32', 'cuda', True, torch.float32),
    ('auto', 'cpu', True, torch.float32),
])
def test_bfloat16_needs_a_gpu_that_has_it(name, device, in_hardware, expected, monkeypatch):
    """torch counts emulation unless it is told not to."""
    def supported(including_emulation=True):
        return including_emulation or in_hardware

    monkeypatch.setattr(torch.cuda, 'is_bf16_supported', supported)
    assert pick_precision(name, torch.device(device)) == expected
