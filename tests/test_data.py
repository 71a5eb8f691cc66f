"""Order and subsets, images in memory and in folders, and what goes wrong with loader workers."""
import os
import signal
import time
from itertools import islice

import pytest
import torch
from PIL import Image
from torchvision.datasets import ImageFolder
from torchvision.transforms.functional import pil_to_tensor

import data
from data import FolderImages, MemoryImages, batch_keys, load, shrink_note, stratified
from shapes import SHAPES, render_shapes
from views import View, keyed_generator, recipe

CROPS = View(32, jitter_p=0, gray_p=0)


# ---- order

def take(count, **place):
    return list(islice(batch_keys(22, 6, seed=1, **place), count))


def test_an_epoch_sees_each_image_once():
    """22 images, batches of 6: 3 batches an epoch, and 4 images are left out of it."""
    batches = take(7)
    assert [epoch for batch in batches for epoch, _ in batch] == [0] * 18 + [1] * 18 + [2] * 6
    first, second = [[index for batch in batches[i:i + 3] for _, index in batch] for i in (0, 3)]
    assert len(set(first)) == len(set(second)) == 18
    assert first != second


def test_order_is_that_of_earlier_versions():
    """Checkpoints resume by it."""
    batches = list(islice(batch_keys(10, 4, seed=3), 3))
    assert batches[0] == [(0, 7), (0, 4), (0, 5), (0, 3)]
    assert batches[2] == [(1, 7), (1, 0), (1, 2), (1, 4)]


def test_order_resumes_and_is_shared_by_ranks():
    whole = take(7)
    assert take(3, start_step=4) == whole[4:]
    halves = zip(take(7, rank=0, world=2), take(7, rank=1, world=2))
    assert [first + second for first, second in halves] == whole


def test_a_batch_larger_than_the_data_is_refused():
    with pytest.raises(ValueError, match='batch size 30 is larger than the 22 images; lower'):
        batch_keys(22, 30, seed=0)


# ---- subsets

LABELS = dict(
    turns=torch.arange(1_200) % 12,
    sorted=torch.arange(1_200) // 100,
    shuffled=torch.randperm(1_200, generator=torch.Generator().manual_seed(0)) % 12,
    imbalanced=torch.repeat_interleave(torch.arange(4), torch.tensor([1_000, 150, 49, 1])),
    one_class=torch.zeros(1_200, dtype=torch.long))


@pytest.mark.parametrize('name', LABELS)
@pytest.mark.parametrize('count', (1, 7, 100, 800, 1_000, 1_199, 1_200))
def test_each_class_keeps_its_share_within_one_image(name, count):
    """Of a class of s images in 1,200, the share of a subset of `count` is count s / 1,200."""
    labels = LABELS[name]
    ids = stratified(labels, count)
    assert len(ids) == count
    assert torch.equal(ids, ids.unique())
    sizes = labels.bincount()
    found = labels[ids].bincount(minlength=len(sizes))
    assert (found - sizes * count / 1_200).abs().max() < 1


def test_subsets_are_random_within_a_class_and_repeat():
    """Evenly spaced ids of 0 to 999 would have one gap; random ones have many."""
    labels = torch.zeros(1_000, dtype=torch.long)
    ids = stratified(labels, 100)
    assert torch.equal(ids, stratified(labels, 100))
    assert len(ids.diff().unique()) > 10
    assert abs(ids.float().mean() - 499.5) < 3 * 29            # 1000 / sqrt(12 * 100) = 29


# ---- images in memory

def test_shapes_are_deterministic_and_balanced():
    images, labels = render_shapes(24, seed=0)
    assert images.shape == (24, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [2] * 12 and len(SHAPES) == 12
    assert torch.equal(images, render_shapes(24, seed=0)[0])
    assert not torch.equal(images, render_shapes(24, seed=1)[0])


@pytest.fixture(scope='module')
def shapes():
    """600 images, of which number 5 has no label."""
    images, labels = render_shapes(600, seed=0)
    labels[5] = -1
    return MemoryImages(images, labels, *render_shapes(60, seed=1), SHAPES)


def test_interface_of_images_in_memory(shapes):
    assert (len(shapes), shapes.channels, shapes.classes) == (600, 3, SHAPES)
    assert shapes.ids('train').tolist() == list(range(600))
    assert shapes.labelled_ids('train').tolist() == [i for i in range(600) if i != 5]
    assert len(shapes.labelled_ids('train', 120)) == 120
    pixels = shapes.images.double() / 255
    assert shapes.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert shapes.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=1e-5)


def test_mean_and_std_do_not_depend_on_the_order_of_the_classes():
    """20,000 images, dark ones first: the mean is 1/2, that of the first 10,000 is 0."""
    labels = torch.arange(20_000) // 10_000
    images = 255 * labels.byte().view(-1, 1, 1, 1)
    mean, = MemoryImages(images, labels, images[:1], labels[:1], ('x', 'y')).mean
    assert abs(mean - 0.5) < 3 * 0.5 / 100


def test_images_come_in_the_order_that_is_asked_for(shapes):
    ids = torch.tensor([7, 3, 40])
    (images, labels), = shapes.labelled('test', ids, side=32)
    assert torch.equal(images, shapes.test_images[ids] / 255)
    assert torch.equal(labels, shapes.test_labels[ids])
    (images, _), = shapes.labelled('test', ids, side=20)
    assert images.shape == (3, 3, 20, 20)
    keys = [[(0, 4), (0, 9)], [(1, 9), (1, 0)]]
    first, second = shapes.batches(keys, recipe('moco', 32), 0, 'cpu')
    assert torch.equal(first, shapes.images[[4, 9]])
    assert torch.equal(second, shapes.images[[9, 0]])


def test_train_batches_depend_on_seed_epoch_and_ids(shapes):
    parts = [torch.tensor([1, 2]), torch.tensor([3, 4])]
    (first, labels), (second, more) = shapes.train_batches(parts, 0, CROPS, 0)
    assert labels.tolist() == [1, 2] and more.tolist() == [3, 4]
    (again, _), = shapes.train_batches(parts[1:], 0, CROPS, 0)
    assert torch.equal(again, second)
    for epoch, seed in ((1, 0), (0, 1)):
        (other, _), = shapes.train_batches(parts[:1], epoch, CROPS, seed)
        assert not torch.equal(other, first)


def test_fingerprint_tells_data_sets_apart(shapes):
    """Another last bit does not count: processors differ in it."""
    def remade(images=shapes.images, labels=shapes.labels):
        data = MemoryImages(images, labels, shapes.test_images, shapes.test_labels, SHAPES)
        return data.fingerprint

    last_bit = shapes.images.clone()
    last_bit[:, 0, 0, 0] ^= 1
    assert remade() == remade(last_bit) == shapes.fingerprint
    assert remade(shapes.images.flip(0)) != shapes.fingerprint
    assert remade(shapes.images[:599], shapes.labels[:599]) != shapes.fingerprint
    assert remade(labels=shapes.labels.flip(0)) != shapes.fingerprint


def test_fashion_mnist_through_torchvision(tiny_fashion):
    fashion = load('fashion_mnist', tiny_fashion)
    assert fashion.images.shape == (320, 1, 28, 28) and len(fashion.test_images) == 60
    assert fashion.channels == 1 and len(fashion.classes) == 10
    assert fashion.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert shrink_note(fashion, side=7) is None
    assert 'images of about 28 px are shrunk 7.0 times to 4 px' in shrink_note(fashion, side=4)


@pytest.mark.parametrize('name, root, error, message', (
    ('cifar10', '.', FileNotFoundError, 'cifar10 is not whole in .*--download'),
    ('mnist', '.', ValueError, "'mnist' is not one of shapes, fashion_mnist"),
    ('folder', 'nowhere', FileNotFoundError, 'no folder .*nowhere'),
    ('folder', '.', FileNotFoundError, 'no images below .*, left out: 1 other extension'),
))
def test_what_is_not_there_is_said(name, root, error, message, tmp_path):
    (tmp_path / 'notes.txt').touch()
    with pytest.raises(error, match=message):
        load(name, tmp_path / root)


# ---- images in folders

def save_images(root, folders, count, size=(70, 50)):
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(count):
            generator = keyed_generator(folder, i)
            pixels = torch.randint(256, (size[1], size[0], 3), generator=generator)
            image = Image.fromarray(pixels.byte().numpy())
            image.save(root / folder / f'{i:03}.jpg')


@pytest.fixture
def photos(tmp_path):
    save_images(tmp_path, ('train/cat', 'train/dog/deep'), 60)
    save_images(tmp_path, ('val/cat', 'val/dog', 'val/fox'), 5)
    return tmp_path


@pytest.fixture
def folder(photos):
    return load('folder', photos)


def crops_of(folder, count=3, workers=0, start=0):
    keys = batch_keys(len(folder), 8, seed=0, start_step=start)
    return list(islice(folder.batches(keys, recipe('moco', 32), 0, 'cpu', workers), count))


def same(first, second):
    for batch, other in zip(first, second, strict=True):
        if not all(torch.equal(a, b) for a, b in zip(batch, other, strict=True)):
            return False
    return True


def test_a_folder_with_splits(photos, capsys):
    """A fox is in no class of the training images. 'val' is scored, and Test only counted."""
    save_images(photos, ('Test/cat', 'Test/dog'), 2)
    folder = load('folder', photos)
    assert (len(folder), folder.channels, folder.classes) == (120, 3, ('cat', 'dog'))
    assert folder.labels.tolist() == [0] * 60 + [1] * 60
    assert folder.test_labels.tolist() == [0] * 5 + [1] * 5 + [-1] * 5
    assert folder.labelled_ids('test').tolist() == list(range(10))
    said = capsys.readouterr().out
    assert "120 training images in 'train', 2 classes" in said
    assert "15 images to score, in 'val'; left out: 4 outside of the splits" in said


@pytest.mark.parametrize('folders, inside', (
    (('imgs/train/cat', 'imgs/train/dog'), 'imgs'),
    (('bottle/test/good', 'bottle/train/good', 'cable/train/good'), 'bottle'),
))
def test_splits_further_below_are_no_classes(tmp_path, folders, inside):
    save_images(tmp_path, folders, 2)
    with pytest.raises(ValueError, match=f"holds splits in its folder '{inside}'; set --data-root"):
        load('folder', tmp_path)


def test_a_class_below_may_be_called_train(tmp_path):
    save_images(tmp_path, ('a/abbey', 't/tower', 't/train_station'), 4)
    assert load('folder', tmp_path).classes == ('a', 't')


def test_a_folder_without_splits_holds_a_stratified_tenth_out(photos):
    folder = load('folder', photos / 'train')
    assert len(folder) == len(folder.ids('train')) == 120
    assert folder.labels[folder.labelled_ids('train')].bincount().tolist() == [54, 54]
    assert folder.test_labels.bincount().tolist() == [6, 6]
    bank = {folder.files[i] for i in folder.labelled_ids('train')}
    assert len(bank) == 108 and not bank & set(folder.test_files)


def test_an_unlabelled_folder_trains_and_gives_features(photos):
    folder = load('folder', photos / 'train' / 'cat')
    assert folder.classes == () and folder.test_files == []
    assert len(folder.labelled_ids('train')) == 0
    (images, labels), = folder.labelled('train', folder.ids('train'), side=32)
    assert images.shape == (60, 3, 32, 32) and labels.tolist() == [-1] * 60
    assert crops_of(folder)[0][0].shape == (8, 3, 32, 32)


def test_crops_do_not_depend_on_workers_pieces_or_the_past(folder, monkeypatch):
    torch.manual_seed(5)
    plain = crops_of(folder)
    monkeypatch.setattr(data, 'SHARED_MEMORY', 3 * 4 * 6_144)  # 3 crops a piece with two workers
    assert same(plain, crops_of(folder, workers=2))
    assert same(plain, crops_of(folder, workers=1))
    assert same(plain[2:], crops_of(folder, 1, workers=2, start=2))
    assert plain[0][0].dtype == torch.uint8
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))


def test_pieces_in_flight_fit_into_the_shared_memory_of_docker(folder, monkeypatch):
    """Two pieces for each of 4 workers at 224 px, at 150,528 bytes an image, are below 64 MB."""
    made = []

    class Loader(data.DataLoader):
        def __init__(self, decoder, batch_sampler, **settings):
            made.append(settings['prefetch_factor'])
            made.extend(len(piece) for piece in batch_sampler)
            raise InterruptedError

    monkeypatch.setattr(data, 'DataLoader', Loader)
    with pytest.raises(InterruptedError):
        next(folder.labelled('train', folder.ids('train'), side=224, workers=4))
    prefetch, *pieces = made
    assert sum(pieces) == 120 and max(pieces) * prefetch * 4 * 150_528 < 40e6


def test_labelled_images_are_center_crops_in_the_order_of_the_ids(folder):
    (images, labels), = folder.labelled('train', torch.tensor([70, 3, 100]), side=32, workers=1)
    image = Image.open(folder.path(folder.files[3]))
    assert torch.equal(images[1], data.center_crop(image, None, 32)[0] / 255)
    assert labels.tolist() == [1, 0, 1]


def test_train_batches_of_a_folder(folder):
    def batches(epoch, workers):
        return list(folder.train_batches(torch.arange(20).split(8), epoch, CROPS, 0, workers))

    first = batches(0, 0)
    assert [len(images) for images, _ in first] == [8, 8, 4]
    assert same(first, batches(0, 2))
    assert not torch.equal(first[0][0], batches(1, 0)[0][0])
    crops = data.random_crops(Image.open(folder.path(folder.files[9])), (0, 9), [CROPS], 0)
    assert torch.equal(first[1][0][1], crops[0] / 255)


def test_shrink_note_of_a_folder(folder):
    """50 px on the shorter side: 4 times 12.5."""
    assert shrink_note(folder, side=13) is None
    assert '50 px are shrunk 4.2 times to 12 px' in shrink_note(folder, side=12)


def test_a_channel_that_is_empty_has_a_std(shapes):
    """Images of one dye have an empty blue channel; divided by 0 it would be NaN."""
    images = shapes.images.clone()
    images[:, 2] = 0
    dyed = MemoryImages(images, shapes.labels, images[:9], shapes.labels[:9], SHAPES)
    assert dyed.mean[2] == 0 and dyed.std[2] == pytest.approx(1 / 255)


def test_fingerprint_of_a_folder_follows_names_count_and_content(photos):
    def fingerprint():
        return load('folder', photos).fingerprint

    cats = photos / 'train/cat'
    found = [fingerprint(), fingerprint()]
    (cats / '000.jpg').rename(cats / 'renamed.jpg')
    found.append(fingerprint())
    (cats / 'renamed.jpg').unlink()
    found.append(fingerprint())
    size = (cats / '001.jpg').stat().st_size
    for content in (b'other', size * b'0', size * b'1'):
        (cats / '001.jpg').write_bytes(content)
        found.append(fingerprint())
    assert found[0] == found[1]
    assert len(set(found)) == 6


# ---- damaged files and dead workers

def test_unreadable_images_are_named_once_skipped_and_limited(photos, capsys):
    """1 of 120 is 0.8 %, 2 are 1.7 %. The next image takes the place, but is not scored for it."""
    path = photos / 'train/cat/000.jpg'
    path = path.rename(path.with_name('0 \x1b[31m \u00e9.jpg'))
    path.write_bytes(path.read_bytes()[:200])
    folder = load('folder', photos)
    batches = crops_of(folder, count=30, workers=2)            # two epochs
    assert all(len(views[0]) == 8 for views in batches)
    said = capsys.readouterr().out
    assert said.count('unreadable image') == 1
    assert "unreadable image 1 skipped: 'train/cat/0 \\x1b[31m \\xe9.jpg': " in said
    assert list(folder.unreadable['train']) == [folder.files[0]]

    (images, labels), = folder.labelled('train', folder.ids('train')[:60], side=32)
    assert len(images) == len(labels) == 59
    (images, labels), = folder.train_batches([torch.tensor([0, 1, 2])], 0, CROPS, 0)
    assert len(images) == len(labels) == 2

    (photos / folder.files[1]).write_bytes(b'')
    with pytest.raises(ValueError, match='2 of 120 images cannot be read, over 1 %; replace'):
        crops_of(load('folder', photos), count=30)


def test_a_folder_without_one_readable_image_is_said(folder):
    for name in folder.files:
        os.truncate(folder.path(name), 0)
    with pytest.raises(ValueError, match='no image below .* can be read; the last is'):
        crops_of(folder)


def test_a_killed_worker_is_one_line_that_names_the_flag(folder):
    batches = folder.batches(batch_keys(120, 8, seed=0), recipe('moco', 32), 0, 'cpu', workers=1)
    next(batches)
    for child in torch.multiprocessing.active_children():
        os.kill(child.pid, signal.SIGKILL)
    with pytest.raises(OSError, match='worker failed .*set --workers 0, .*--shm-size') as met:
        for _ in islice(batches, 30):
            time.sleep(0.05)
    assert '\n' not in str(met.value)


def sleep(image, key):
    time.sleep(2.5)


def test_a_worker_that_hangs_is_one_line_too(folder, monkeypatch):
    monkeypatch.setattr(data, 'TIMEOUT', 1)
    with pytest.raises(OSError, match='timed out after 1 seconds.*--workers 0.*--shm-size'):
        next(folder.loaded('train', [[(0, 0)]], sleep, [32], workers=1))


# ---- small folders in memory

@pytest.fixture
def icons(tmp_path):
    root = tmp_path / 'icons'
    save_images(root, ('train/cat', 'train/dog'), 60, size=(32, 24))
    save_images(root, ('test/cat', 'test/dog'), 5, size=(32, 24))
    return root


def test_small_images_of_one_size_are_kept_in_memory(icons):
    memory = load('folder', icons)
    folder = load('folder', icons, in_memory=False)
    assert isinstance(memory, MemoryImages) and isinstance(folder, FolderImages)
    expected = torch.stack([pil_to_tensor(image) for image, _ in ImageFolder(icons / 'train')])
    assert torch.equal(memory.images, expected)
    assert memory.test_images.shape == (10, 3, 24, 32)
    assert torch.equal(memory.labels, folder.labels)
    assert torch.equal(memory.test_labels, folder.test_labels)
    assert memory.classes == folder.classes and memory.fingerprint == folder.fingerprint
    assert list(memory.files) == folder.files and list(memory.test_files) == folder.test_files


def test_small_images_without_splits_or_labels(icons):
    memory = load('folder', icons / 'train')
    folder = load('folder', icons / 'train', in_memory=False)
    assert torch.equal(memory.labels, folder.labels) and len(memory.test_images) == 12
    first = memory.files.index(folder.test_files[0])
    assert torch.equal(memory.test_images[0], memory.images[first])
    memory = load('folder', icons / 'train' / 'cat')
    assert memory.classes == () and len(memory) == 60 and len(memory.test_images) == 0
    (images, _), = memory.labelled('train', memory.ids('train'), side=24)
    assert len(images) == 60


def test_large_and_many_and_mixed_images_stay_on_disk(icons, photos, monkeypatch, capsys):
    """130 images of 24 x 32 x 3 bytes are 0.3 MB."""
    assert isinstance(load('folder', photos / 'val'), FolderImages)
    monkeypatch.setattr(data, 'MEMORY_LIMIT', 2e5)
    assert isinstance(load('folder', icons), FolderImages)
    assert 'would take 0.0 GB of memory, over the limit of 0.0:' in capsys.readouterr().out
    monkeypatch.undo()
    Image.new('RGB', (32, 25)).save(icons / 'test' / 'dog' / 'z.png')
    assert isinstance(load('folder', icons), FolderImages)


def test_unreadable_small_images_are_named_and_left_out(icons, capsys):
    (icons / 'train/cat/000.jpg').write_bytes(b'')
    memory = load('folder', icons)
    assert memory.labels.bincount().tolist() == [59, 60]
    assert memory.files[0] == 'train/cat/001.jpg'
    assert "unreadable image 1 skipped: 'train/cat/000.jpg'" in capsys.readouterr().out
    (icons / 'train/cat/001.jpg').write_bytes(b'')
    with pytest.raises(ValueError, match='2 of 120 images cannot be read, over 1 %'):
        load('folder', icons)
