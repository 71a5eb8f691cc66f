"""images/data.py: order and subsets, folders as they lie about, from a file to a picture."""
import unicodedata
from itertools import islice

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from conftest import error
from PIL import Image, JpegImagePlugin, PngImagePlugin
from torchvision.datasets import ImageFolder

from images import data
from images.data import batch_keys, center, find_splits, load, read_crops, stratified
from images.shapes import render_shapes
from images.views import Augmentation, crop_boxes, keyed_generator, recipe


# ---- order and subsets

def take(count, **place):
    return list(islice(batch_keys(22, 6, seed=1, **place), count))


def test_an_epoch_sees_each_image_once_and_resumes_and_is_shared_by_ranks():
    """22 images, batches of 6: 3 batches an epoch, and 4 images are left out of it."""
    batches = take(7)
    assert [epoch for batch in batches for _, epoch in batch] == [0] * 18 + [1] * 18 + [2] * 6
    first, second = [[index for batch in batches[i:i + 3] for index, _ in batch] for i in (0, 3)]
    assert len(set(first)) == len(set(second)) == 18
    assert first != second
    assert take(3, start_step=4) == batches[4:]
    halves = zip(take(7, rank=0, world=2), take(7, rank=1, world=2))
    assert [one + other for one, other in halves] == batches
    with pytest.raises(ValueError, match='batch size 30 is larger than the 22 images; lower'):
        batch_keys(22, 30, seed=0)


def test_each_class_keeps_its_share_within_one_image():
    """Of a class of s images in 1,200, the share of a subset of `count` is count s / 1,200."""
    sizes = torch.tensor([1_000, 150, 49, 1])
    labels = torch.repeat_interleave(torch.arange(4), sizes)
    for count in (1, 100, 1_199):
        ids = stratified(labels, count)
        assert torch.equal(ids, ids.unique()) and torch.equal(ids, stratified(labels, count))
        found = labels[ids].bincount(minlength=4)
        assert found.sum() == count and (found - sizes * count / 1_200).abs().max() < 1


def test_shapes_repeat():
    (images, _), (same, _), (other, _) = (render_shapes(24, seed) for seed in (0, 0, 1))
    assert torch.equal(images, same) and not torch.equal(images, other)


# ---- trees

def save_images(root, folders, count=12, size=(70, 50)):
    """`count` images of noise in each folder."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(count):
            pixels = torch.randint(256, (size[1], size[0], 3)).byte()
            Image.fromarray(pixels.numpy()).save(root / folder / f'{i:03}.png')


@pytest.fixture
def photos(tmp_path):
    """24 images to train with and 8 to score, too large to be held in memory."""
    save_images(tmp_path, ('train/cat', 'train/dog/deep'))
    save_images(tmp_path, ('val/cat', 'val/dog'), 4)
    return tmp_path


def test_splits_stand_beside_each_other():
    for folders, expected in (
            ('Train Valid', ('Train', 'Valid')),
            ('TEST train', ('train', 'TEST')),
            ('extra test train val', ('train', 'val')),
            ('train', ('train', None)),
            ('airplane train_station', ('', None)),            # classes
            ('', ('', None))):
        assert find_splits(folders.split()) == expected


def test_folders_that_look_like_splits_are_never_classes():
    for folders in ('testing training', 'testA trainA', 'test val', 'train_set val-set', 'seg_test',
                    'train tst', 'gallery train', 'cats TRAIN'):
        names = folders.split()
        with pytest.raises(ValueError, match=f'{names[-1]}.* look like splits; rename'):
            find_splits(names)


def test_a_folder_with_splits_says_what_it_leaves_out(photos):
    """A fox is in no class of the training images."""
    save_images(photos, ('val/fox', 'Test/cat', '.trash'), 2)
    (photos / 'train/notes.txt').touch()
    said = []
    folder = load('folder', photos, said.append)
    assert folder.classes == ('cat', 'dog')
    assert folder.files['train'] == [path for path, _ in ImageFolder(photos / 'train').samples]
    assert folder.labels['train'].tolist() == [0] * 12 + [1] * 12
    assert folder.labels['test'].tolist() == [0] * 4 + [1] * 4 + [-1] * 2
    assert folder.labelled_ids('test').tolist() == list(range(8))
    assert [line.split()[:2] for line in said[1:]] == [
        ['1', 'other'], ['2', 'images'], ['2', 'images']]


def test_a_folder_without_splits_holds_a_stratified_tenth_out(photos):
    """2.4 of 24 images, rounded up, are scored; they have no label in training."""
    folder = load('folder', photos / 'train')
    bank = {folder.files['train'][i] for i in folder.labelled_ids('train')}
    assert len(folder) == 24 and len(bank) == 21 and not bank & set(folder.files['test'])
    assert sorted(folder.labels['test'].bincount()) == [1, 2]


def test_one_class_has_one_spelling(tmp_path):
    """'é' is one character on Linux and two on a Mac."""
    composed, decomposed = (unicodedata.normalize(form, 'caf\u00e9') for form in ('NFC', 'NFD'))
    save_images(tmp_path, ('train/bar', f'train/{composed}', f'val/{decomposed}'), 2)
    folder = load('folder', tmp_path)
    assert folder.classes == ('bar', composed)
    assert folder.labels['test'].tolist() == [1, 1]


def test_the_fingerprint_is_of_names(photos):
    first = load('folder', photos).fingerprint
    photos = photos.rename(photos.with_name('moved'))
    assert load('folder', photos).fingerprint == first
    (photos / 'train/cat/000.png').rename(photos / 'train/cat/999.png')
    assert load('folder', photos).fingerprint != first


# ---- one way from a file to a scored picture

def pictures_of(folder):
    ids = torch.arange(len(folder.labels['test']))
    return torch.cat([pictures for pictures, _ in folder.scored('test', ids, 32)])


def test_memory_and_disk_score_the_same_pixels(tmp_path, monkeypatch):
    """And one picture of another size, which sends all to the disk, changes nothing for others."""
    save_images(tmp_path, ('train/cat', 'train/dog', 'val/cat', 'val/dog'), 3, (64, 32))
    memory = load('folder', tmp_path)
    monkeypatch.setattr(data, 'MEMORY_LIMIT', 0)
    disk = load('folder', tmp_path)
    monkeypatch.undo()
    Image.new('RGB', (50, 50)).save(tmp_path / 'val/dog/999.png')
    mixed = load('folder', tmp_path)
    assert memory.pixels and not disk.pixels and not mixed.pixels
    assert memory.fingerprint == disk.fingerprint and memory.files == disk.files
    expected = pictures_of(memory)
    assert torch.equal(pictures_of(disk), expected)
    assert torch.equal(pictures_of(mixed)[:6], expected)


def test_the_center_equals_torchvisions():
    """7/8 of 50 is 44; what is not larger than 32 is seen as a whole, and 32 px keep their bits."""
    for size, crop, side in (((70, 50), 44, 30), ((31, 40), 31, 30), ((32, 32), 32, 32)):
        images = torch.randint(256, (2, 3, *size), dtype=torch.uint8)
        theirs = TF.center_crop(images / 255, crop)
        theirs = TF.resize(theirs, [side, side], TF.InterpolationMode.BICUBIC).clamp(0, 1)
        assert error(center(images, side, 32), theirs) <= (0 if side == crop else 1e-6)


RAMP = np.arange(256, dtype=np.uint16).reshape(16, 16)


def test_16_bits_are_scaled_and_32_bits_refused(tmp_path):
    """White is 65,535 = 257 * 255, so that 257 v becomes v."""
    for name in ('x.png', 'x.tif', 'x.pgm'):
        Image.fromarray(257 * RAMP).save(tmp_path / name)
        assert np.array_equal(data.read_pixels(tmp_path / name)[1], RAMP)
    for kind in (np.int32, np.float32):
        Image.fromarray(RAMP.astype(kind)).save(tmp_path / 'x.tif')
        with pytest.raises(ValueError, match='32-bit pixels do not say which value is white'):
            data.read_pixels(tmp_path / 'x.tif')


def test_long_comments_do_not_hide_the_pixels(tmp_path):
    comment = PngImagePlugin.PngInfo()
    comment.add_text('prompt', 'x' * 2_000_000, zip=True)
    Image.new('RGB', (4, 4), 'white').save(tmp_path / 'x.png', pnginfo=comment)
    assert data.read_pixels(tmp_path / 'x.png').min() == 255


# ---- crops

def test_crops_equal_torchvisions_and_half_of_them_are_mirrored(photos):
    """But for the border, where Pillow also reads the pixels beside the box. 20 +- 4 * 3.2."""
    path = str(photos / 'train/cat/000.png')
    view = Augmentation(96, scale=(0.1, 0.4), interpolation='bicubic')
    inner = (..., slice(12, -12), slice(12, -12))
    mirrored = 0
    for epoch in range(40):
        ours, = read_crops(path, epoch, [view], 0, photos / 'train')
        boxes = crop_boxes(1, 50, 70, view.scale, keyed_generator(0, epoch, 'cat/000.png'))
        theirs = TF.pil_to_tensor(TF.resized_crop(Image.open(path), *map(int, boxes), [96, 96],
                                                  TF.InterpolationMode.BICUBIC))[inner]
        mirror = torch.equal(ours.flip(2)[inner], theirs)
        assert mirror or torch.equal(ours[inner], theirs)
        mirrored += mirror
    assert 8 < mirrored < 32


def apart(a, b):
    """The mean difference of two lists of crops, where white is 255."""
    return max((x.float() - y.float()).abs().mean() for x, y in zip(a, b))


def test_a_large_jpeg_is_decoded_small_with_nearly_the_same_crops(tmp_path, monkeypatch):
    """Spots of 40 pixels. Other draws are 20 and more apart."""
    path = str(tmp_path / 'x.jpg')
    spots = torch.randint(256, (12, 12, 3)).byte().numpy()
    Image.fromarray(spots).resize((480, 480), Image.Resampling.BICUBIC).save(path)
    views = recipe('dino', 32, 2)
    small = read_crops(path, 0, views, 0, tmp_path)
    assert apart(read_crops(path, 1, views, 0, tmp_path), small) > 20
    monkeypatch.setattr(JpegImagePlugin.JpegImageFile, 'draft', lambda *size: None)
    assert 0 < apart(read_crops(path, 0, views, 0, tmp_path), small) < 0.6


# ---- damaged files

def test_unreadable_images_are_named_once_and_never_scored(photos):
    """In training the next image takes the place, with its label; two of 24 stop the run."""
    said = []
    broken = photos / 'train/cat/011.png'
    broken.write_bytes(broken.read_bytes()[:200])
    folder = load('folder', photos, said.append)
    keys = [[(11, 0), (0, 0)], [(12, 0), (0, 0)]]
    kinds = recipe('moco', 32)
    (first, labels), (second, same) = folder.batches([(key, kinds) for key in keys])
    assert labels.tolist() == same.tolist() == [1, 0]
    assert all(map(torch.equal, first, second))
    (pictures, ids), = folder.scored('train', torch.arange(24), side=32)
    assert len(pictures) == 23 and 11 not in ids
    assert ['image 1 skipped' in line and str(broken) in line for line in said] == [False, True]
    (photos / 'train/dog/deep/000.png').write_bytes(b'')
    with pytest.raises(ValueError, match='2 of 24 images cannot be read, over 1 %; replace'):
        list(folder.scored('train', torch.arange(24), side=32))


def test_unreadable_images_are_left_out_of_memory(tmp_path):
    """PostScript under the name of a JPEG is not opened, or Ghostscript would run its code."""
    save_images(tmp_path, ('train/cat', 'train/dog', 'val/cat'), 4, (32, 32))
    path = tmp_path / 'train/cat/000.jpg'
    Image.new('RGB', (32, 32)).save(path, format='EPS')
    folder = load('folder', tmp_path)
    assert folder.pixels['train'].shape == (8, 3, 32, 32)
    assert folder.labels['train'].tolist() == [0] * 4 + [1] * 4
    assert 'cannot identify' in folder.unreadable['train'][str(path)]
    with pytest.raises(OSError, match='cannot identify'):
        read_crops(path, 0, recipe('moco', 32), 0, tmp_path)
