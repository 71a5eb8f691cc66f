"""Trees as they lie about on disks, and pixels of every kind."""
import os
import resource
import struct
import time
import zlib
from collections import Counter

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image
from torchvision.datasets import ImageFolder

import files
from files import center_crop, find_splits, list_images, random_crops, read_image, split_of
from views import View


def touch(root, names):
    """Empty files; listing goes by names alone."""
    for name in names.split():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()


def listed(root):
    left_out = Counter()
    names = list_images(root, left_out)
    return ' '.join(names), left_out


# ---- trees

def test_what_counts_as_an_image(tmp_path):
    images = 'a.jpg b.JPEG c.jfif d.pgm e.Tif f.avif g.jp2 h.jpg/1.jpg'
    touch(tmp_path, images)
    touch(tmp_path, 'x.txt y.eps z h.jpg/Thumbs.db')
    touch(tmp_path, 'h.jpg/._1.jpg .thumbnails/1.jpg @eaDir/1.jpg __MACOSX/1.jpg')
    os.mkfifo(tmp_path / 'pipe.jpg')
    left_out = {'other extension': 4, 'hidden or side file': 4, 'not a regular file': 1}
    assert listed(tmp_path) == (images, left_out)


def test_links_are_followed_but_not_in_a_loop(tmp_path):
    """A folder and a file by ln -s; `up` leads back, `self` and `gone` are no files."""
    touch(tmp_path, 'all/cat/1.jpg all/cat/2.jpg subset/dog/1.jpg')
    subset = tmp_path / 'subset'
    for link, target in (('cat', tmp_path / 'all/cat'), ('dog/2.jpg', tmp_path / 'all/cat/1.jpg'),
                         ('dog/up', subset), ('self', subset / 'self'), ('gone.jpg', 'nowhere')):
        (subset / link).symlink_to(target)
    names = 'cat/1.jpg cat/2.jpg dog/1.jpg dog/2.jpg'
    assert listed(subset) == (names, {'link loop': 1, 'broken link': 2})


def test_a_folder_that_cannot_be_read_is_named(tmp_path, monkeypatch):
    """Simulated, since root can read every folder."""
    touch(tmp_path, 'cat/1.jpg dog/1.jpg')
    scandir = os.scandir

    def refuse(path):
        if path.endswith('dog/'):
            raise PermissionError(13, 'Permission denied')
        return scandir(path)

    monkeypatch.setattr(os, 'scandir', refuse)
    with pytest.raises(OSError, match="folder '.*dog/' cannot be read .Permission denied.; change"):
        listed(tmp_path)


def test_listing_equals_image_folder_and_takes_at_most_twice_its_time(tmp_path):
    """Measured: 0.7 times on 60,000 files."""
    names = [f'{kind}/{i}.jpg' for kind in ('cat', 'dog', 'fox') for i in range(2_000)]
    touch(tmp_path, ' '.join(names))
    times = {}
    for function in (listed, ImageFolder) * 3:
        start = time.perf_counter()
        function(tmp_path)
        times.setdefault(function, []).append(time.perf_counter() - start)
    theirs = [os.path.relpath(path, tmp_path) for path, _ in ImageFolder(tmp_path).samples]
    assert listed(tmp_path)[0].split() == theirs
    assert min(times[listed]) < 2 * min(times[ImageFolder])


@pytest.mark.parametrize('split, folders', (
    ('train', 'train Training TRAIN train_set seg_train trainval TrainSplit trn'),
    ('val', 'val Valid validation val-images'),
    ('test', 'test Testing testset test_set'),
    (None, 'trains contest cat set')))
def test_names_of_splits(split, folders):
    assert {split_of(folder) for folder in folders.split()} == {split}


@pytest.mark.parametrize('folders, expected', (
    ('Testing Training', ('Training', 'Testing')),
    ('test train val', ('train', 'val')),                      # val is scored
    ('train', ('train', None)),
    ('boat car train', (None, None)),                          # a class that is called train
    ('cat dog', (None, None)),
    ('', (None, None))))
def test_splits_stand_beside_each_other(folders, expected):
    assert find_splits(folders.split()) == expected


@pytest.mark.parametrize('folders, message', (
    ('test val', "'test', 'val' have no training images beside them; set --data-root"),
    ('testA testB trainA trainB', 'may be classes or splits; move away'),
    ('extra test train', "'extra', 'test', 'train' may be classes or splits; move away")))
def test_splits_that_cannot_be_told_are_asked_for(folders, message):
    with pytest.raises(ValueError, match=message):
        find_splits(folders.split())


# ---- pixels

RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)
NOISE = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


NO_WHITE = '32-bit pixels do not say which value is white'


@pytest.mark.parametrize('pixels, extension, reason', (
    (257 * RAMP, 'png', None),
    (257 * RAMP, 'tif', None),
    (257 * RAMP, 'pgm', None),
    (RAMP, 'png', 'without a value above 4095'),
    (RAMP, 'tif', 'without a value above 4095'),
    (RAMP / np.float32(255), 'tif', NO_WHITE),
    (RAMP.astype(np.int32), 'tif', NO_WHITE)))
def test_pixels_are_scaled_to_8_bits_or_refused(tmp_path, pixels, extension, reason):
    """Of 16 bits white is 65,535 = 257 * 255, so that 257 v becomes v."""
    path = tmp_path / f'x.{extension}'
    Image.fromarray(pixels).save(path)
    image, found = read_image(path)
    if reason:
        assert image is None and reason in found
    else:
        assert np.array_equal(np.asarray(image), np.stack([RAMP] * 3, axis=2))


def test_a_tiff_says_how_many_bits_it_uses():
    """12 bits, white is 4,095: 4,095 v / 255, rounded, becomes v."""
    image = Image.fromarray(np.round(RAMP * (4095 / 255)).astype(np.uint16))
    image.tile = []
    image.tag_v2 = {258: (12,)}
    assert np.array_equal(np.asarray(files.to_rgb(image))[:, :, 0], RAMP)


def save_deep_colour(path, values):
    """A PNG of 16 bits a channel, which Pillow reads but does not write."""
    header = struct.pack('>IIBBBBB', 16, 16, 16, 2, 0, 0, 0)
    rows = np.repeat(values, 3, axis=1).astype('>u2')
    rows = b''.join(b'\0' + row.tobytes() for row in rows)
    data = b'\x89PNG\r\n\x1a\n'
    for kind, content in ((b'IHDR', header), (b'IDAT', zlib.compress(rows)), (b'IEND', b'')):
        body = kind + content
        data += struct.pack('>I', len(content)) + body + struct.pack('>I', zlib.crc32(body))
    path.write_bytes(data)


def test_16_bit_colours(tmp_path):
    path = tmp_path / 'x.png'
    save_deep_colour(path, 257 * RAMP)
    assert np.array_equal(np.asarray(read_image(path)[0])[:, :, 1], RAMP)
    save_deep_colour(path, RAMP)
    assert 'without a value above 4095' in read_image(path)[1]


@pytest.mark.parametrize('mode', ('1', 'L', 'P', 'LA', 'RGBA', 'CMYK', 'YCbCr'))
def test_every_mode_is_read_as_rgb(tmp_path, mode):
    """White stays white, and transparency is ignored."""
    Image.new('RGB', (4, 4), 'white').convert(mode).save(tmp_path / 'x.tif')
    image, _ = read_image(tmp_path / 'x.tif')
    assert image.mode == 'RGB' and image.getpixel((1, 1)) == (255, 255, 255)


def test_the_rotation_of_exif_is_ignored(tmp_path):
    exif = Image.Exif()
    exif[274] = 6                                              # to be turned by 90 degrees
    Image.new('RGB', (8, 4)).save(tmp_path / 'x.jpg', exif=exif)
    assert read_image(tmp_path / 'x.jpg')[0].size == (8, 4)


def test_postscript_named_jpg_is_not_opened(tmp_path):
    path = tmp_path / 'x.jpg'
    Image.new('RGB', (4, 4)).save(path, format='EPS')
    assert Image.open(path).format == 'EPS'
    image, reason = read_image(path)
    assert image is None and 'cannot identify' in reason


@pytest.mark.parametrize('extension', ('jpg', 'png', 'webp', 'tif', 'avif', 'jp2', 'gif'))
def test_damaged_files_have_a_reason(tmp_path, extension):
    path = tmp_path / f'x.{extension}'
    Image.fromarray(NOISE).save(path)
    assert read_image(path)[0].size == (80, 60)
    path.write_bytes(path.read_bytes()[:60])
    image, reason = read_image(path)
    assert image is None and reason


def test_too_many_pixels_count_as_unreadable(tmp_path, monkeypatch):
    Image.new('RGB', (40, 40)).save(tmp_path / 'x.png')
    monkeypatch.setattr(Image, 'MAX_IMAGE_PIXELS', 700)        # an error from twice that on
    assert 'exceeds limit of 1400 pixels' in read_image(tmp_path / 'x.png')[1]


# ---- crops

@pytest.mark.parametrize('size', ((70, 50), (50, 70), (333, 500), (64, 64), (3, 2)))
@pytest.mark.parametrize('side', (28, 224))
def test_center_crop_equals_torchvisions(size, side):
    """To a rounding. The contrast is low, so that bicubic does not overshoot 0 or 255."""
    pixels = np.random.default_rng(0).integers(100, 156, (*size[::-1], 3), dtype=np.uint8)
    image = Image.fromarray(pixels)
    crop, = center_crop(image, None, side)
    theirs = TF.resize(image, round(side * 256 / 224), TF.InterpolationMode.BICUBIC)
    theirs = TF.pil_to_tensor(TF.center_crop(theirs, side))
    assert (crop.int() - theirs.int()).abs().max() <= 1


def test_center_crop_of_a_long_strip_is_cheap():
    """Resized whole, 1 x 20,000 pixels would be 256 x 5,120,000 of 3 bytes, 3.9 GB."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for size in ((1, 20_000), (20_000, 1), (1, 1_000_000)):
        crop, = center_crop(Image.new('RGB', size, 'white'), None, 224)
        assert crop.shape == (3, 224, 224) and crop.min() == 255
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert after - before < 100_000                            # kB


def test_random_crops_depend_on_the_key_alone():
    views = [View(32), View(16, scale=(0.05, 0.2), interpolation='bicubic')]

    def crops(key=(3, 7), seed=0):
        return random_crops(Image.fromarray(NOISE), key, views, seed)

    large, small = crops()
    torch.rand(5)
    assert large.shape == (3, 32, 32) and torch.equal(large, crops()[0])
    assert small.shape == (3, 16, 16) and torch.equal(small, crops()[1])
    for other in (crops(key=(4, 7)), crops(key=(3, 8)), crops(seed=1)):
        assert not torch.equal(other[0], large)


def test_random_crops_are_mirrored_half_of_the_time():
    """The whole image, black on the left. 400 draws: 200 +- 3 * 10."""
    image = Image.new('RGB', (8, 8))
    image.paste('white', (4, 0, 8, 8))
    views = [View(8, scale=(1.0, 1.0))]
    crops = [random_crops(image, (0, i), views, seed=0)[0] for i in range(400)]
    mirrored = sum(int(crop[0, 0, 0] > 128) for crop in crops)
    assert abs(mirrored - 200) < 30
