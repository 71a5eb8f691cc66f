"""What the commands share: types of flags, the layout of --help, the device, the last line.

A wrong value is caught where it enters, by the type of its flag: `argument --lr: nan must be
above 0`.
"""
import argparse
import math
import os
import sys

import torch
import torch.distributed as dist


def number(kind, low, high, above=False):
    """A flag's type: an int or float in [low, high], or in (low, high] if `above`."""
    def read(text):
        try:
            value = kind(text)
        except ValueError:
            word = 'a whole number' if kind is int else 'a number'
            raise argparse.ArgumentTypeError(f'{text!r} is not {word}') from None
        too_low = value <= low if above else value < low
        if math.isnan(value) or too_low or value > high:
            limits = f'{"above" if above else "at least"} {low:g}'
            if high < math.inf:
                limits += f' and at most {high:g}'
            raise argparse.ArgumentTypeError(f'{text} must be {limits}')
        return value
    return read


positive = number(float, 0, 1e12, above=True)
not_negative = number(float, 0, 1e12)
fraction = number(float, 0, 1)
count = number(int, 1, 10 ** 12)
count_or_zero = number(int, 0, 2 ** 62)
size = number(int, 1, 10_000)                     # pixels, a width, a number of blocks
rate = number(float, 0, 0.999999)                 # a fraction below 1


class Parser(argparse.ArgumentParser):
    """Shows the docstring as it is written, the default of each flag, and an error as one line."""

    def __init__(self, description, **options):
        super().__init__(description=description, allow_abbrev=False, formatter_class=Layout,
                         **options)

    def error(self, message):
        fail(f'{self.prog}: error: {message}', 2)


class Layout(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    def __init__(self, prog):
        super().__init__(prog, max_help_position=26, width=80)

    def _get_help_string(self, action):
        if action.default is None or action.default is False:
            return action.help
        return super()._get_help_string(action)


def pick_device(name):
    """The device of a flag. Under torchrun each process takes the GPU of its own number."""
    if name == 'auto':
        name = 'cpu'
        if torch.backends.mps.is_available():
            name = 'mps'
        if torch.cuda.is_available():
            name = 'cuda'
    present = dict(cpu=True, cuda=torch.cuda.is_available(),
                   mps=torch.backends.mps.is_available())
    if not present[name]:
        raise ValueError(f'--device {name} is not there; use --device cpu, or a torch built for it')
    if name != 'cuda':
        return torch.device(name)
    local_rank = int(os.environ.get('LOCAL_RANK', 0))
    processes = int(os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1))
    gpus = torch.cuda.device_count()
    if processes > gpus:               # also those that have one: they would wait for the others
        raise ValueError(f'{processes} processes on this machine, but {gpus} GPU(s); lower '
                         f'--nproc_per_node')
    torch.cuda.set_device(local_rank)
    return torch.device('cuda', local_rank)


def pick_precision(name, device):
    """bfloat16 on a GPU that has it in hardware, else float32: emulation, and bfloat16 on a CPU,
    are slower."""
    if name == 'auto' and device.type == 'cuda':
        if torch.cuda.is_bf16_supported(including_emulation=False):
            return torch.bfloat16
    return torch.float32


def note(line):
    """Print a warning, once of several processes."""
    if int(os.environ.get('RANK', 0)) == 0:
        print(f'warning: {line}', flush=True)


def fail(line, status=1):
    """End this process with a last line.

    Until the processes of torchrun have joined, those of one machine meet the same error, and the
    first of them says it.
    """
    rank = first = 0
    if int(os.environ.get('WORLD_SIZE') or 1) > 1:
        rank = int(os.environ.get('RANK', 0))
        first = rank - int(os.environ.get('LOCAL_RANK', rank))
    joined = dist.is_available() and dist.is_initialized()
    if rank == first or joined:
        process = f'  [process {rank}]' if rank else ''
        print(f'{line}{process}', file=sys.stderr, flush=True)
    sys.exit(status)
