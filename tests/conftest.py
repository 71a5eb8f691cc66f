import struct
import sys
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope='session')
def tiny_fashion(tmp_path_factory):
    """A data root with the four raw files of Fashion-MNIST, 320 training and 60 test images of random squares."""
    root = tmp_path_factory.mktemp('data')
    raw = root / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    for part, count in (('train', 320), ('t10k', 60)):
        labels = np.arange(count, dtype=np.uint8) % 10
        images = rng.integers(0, 60, (count, 28, 28), dtype=np.uint8)
        for i, label in enumerate(labels):
            images[i, label:label + 12, 4:20] += 150
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 2051, count, 28, 28) + images.tobytes())
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 2049, count) + labels.tobytes())
    return root
