"""What the tests share: a tiny data set, a small run of train.py, torchrun, a distance."""
import json
import os
import signal
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / 'experiments')]
torch.set_num_threads(1)                              # on tensors this small, threads only cost

# the flags of a run that takes a second: 16 tokens an image, one block, 20 steps an epoch
SMALL = [
    '--dataset', 'fashion_mnist', '--img-size', '16', '--arch', '32,1,1', '--hidden', '32',
    '--out-dim', '32', '--batch-size', '16', '--eval-every', '1', '--device', 'cpu',
]


def error(a, b):
    """The largest difference between two tensors."""
    return (a - b).abs().max().item()


@pytest.fixture(autouse=True)
def seeded():
    """Every test draws the same numbers, alone or after others."""
    torch.manual_seed(0)


@pytest.fixture(scope='session')
def tiny_fashion(tmp_path_factory):
    """A data root with Fashion-MNIST's four raw files: 320 and 60 images of squares in noise."""
    root = tmp_path_factory.mktemp('data')
    raw = root / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (('train', 320), ('t10k', 60)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for i, label in enumerate(labels):
            images[i, label:label + 12, 4:20] += 150
        header = struct.pack('>IIII', 2051, count, 28, 28)
        (raw / f'{part}-images-idx3-ubyte').write_bytes(header + images.tobytes())
        header = struct.pack('>II', 2049, count)
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(header + labels.tobytes())
    return root


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_fashion):
    """run(*flags) calls train.py's main in an empty folder and returns its folder of runs.

    Every step is logged. small=False leaves out the flags of the small run, as --resume needs it.
    """
    import train
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train, 'LOG_EVERY', 1)

    def call(*flags, small=True):
        small_flags = [*SMALL, '--data-root', str(tiny_fashion)] if small else []
        train.main([*small_flags, *map(str, flags)])
        return tmp_path / 'runs'
    return call


@pytest.fixture
def stop_at(monkeypatch):
    """stop_at(step) sends this process a signal when that step is logged."""
    import train
    log = train.log

    def arm(step, number=signal.SIGTERM):
        def log_and_signal(run, *rest):
            log(run, *rest)
            if run.state.step == step:
                os.kill(os.getpid(), number)
        monkeypatch.setattr(train, 'log', log_and_signal)
    return arm


def torchrun(processes, script, *flags, cwd, timeout=200):
    """A script run to its end in several processes: .returncode, .stdout, .stderr."""
    launcher = [sys.executable, '-m', 'torch.distributed.run', '--standalone']
    command = [*launcher, '--nproc_per_node', str(processes), str(ROOT / script), *map(str, flags)]
    environment = {name: value for name, value in os.environ.items()
                   if name not in ('RANK', 'LOCAL_RANK', 'WORLD_SIZE')}
    environment.update(OMP_NUM_THREADS='1', PYTHONPATH=str(ROOT))
    return subprocess.run(command, cwd=cwd, env=environment, timeout=timeout,
                          capture_output=True, text=True)


def log_of(folder):
    """The lines of a run's log.jsonl, as dictionaries."""
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def steps_of(folder):
    """The lines of training steps alone, without those of scores."""
    return [line for line in log_of(folder) if 'loss' in line]
