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
from views import View, keyed_generator, make_views, recipe

CROPS = View(32, jitter_p=0, gray_p=0)


# ---------------------------------------------------------------- order

def take(count, n=22, batch_size=6, **place):
    return list(islice(batch_keys(n, batch_size, seed=1, **place), count))


def test_an_epoch_sees_each_image_once():
    """22 images, batches of 6: 3 batches an epoch, and 4 images are left out of it."""
    batches = take(7)
    assert [epoch for batch in batches for epoch, _ in batch] == [0] * 18 + [1] * 18 + [2] * 6
    first = [index for batch in batches[:3] for _, index in batch]
    second = [index for batch in batches[3:6] for _, index in batch]
    assert len(set(first)) == 18 and len(set(second)) == 18 and first != second


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
    with pytest.raises(ValueError, match='batch size 30 is larger than the 22 images'):
        batch_keys(22, 30, seed=0)


# ---------------------------------------------------------------- subsets

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
    assert len(ids) == count and len(ids.unique()) == count
    assert torch.equal(ids, ids.sort().values)
    classes = int(labels.max()) + 1
    shares = labels.bincount() * count / 1_200
    found = labels[ids].bincount(minlength=classes)
    assert (found - shares).abs().max() < 1


def test_subsets_are_random_within_a_class_and_repeat():
    """Evenly spaced ids of 0 to 999 would have one gap; random ones have many."""
    labels = torch.zeros(1_000, dtype=torch.long)
    ids = stratified(labels, 100)
    assert torch.equal(ids, stratified(labels, 100))
    assert len(ids.diff().unique()) > 10
    assert abs(ids.float().mean() - 499.5) < 3 * 29            # 1000 / sqrt(12 * 100) = 29


def test_the_bank_of_shapes_holds_every_class():
    """10,000 / 12 = 833.3. Evenly spaced images would halve four of the classes."""
    labels = torch.arange(12_000) % 12
    sizes = labels[stratified(labels, 10_000)].bincount().tolist()
    assert sorted(sizes) == [833] * 8 + [834] * 4


# ---------------------------------------------------------------- images in memory

def test_shapes_are_deterministic_and_balanced():
    images, labels = render_shapes(24, seed=0)
    assert images.shape == (24, 3, 32, 32) and images.dtype == torch.uint8
    assert labels.bincount().tolist() == [2] * 12 and len(SHAPES) == 12
    assert torch.equal(images, render_shapes(24, seed=0)[0])
    assert not torch.equal(images, render_shapes(24, seed=1)[0])


@pytest.fixture(scope='module')
def shapes():
    images, labels = render_shapes(600, seed=0)
    labels[5] = -1
    return MemoryImages(images, labels, *render_shapes(60, seed=1), SHAPES)


def test_interface_of_images_in_memory(shapes):
    assert len(shapes) == 600 and shapes.channels == 3 and shapes.classes == SHAPES
    assert shapes.ids('train').tolist() == list(range(600))
    assert shapes.labelled_ids('train').tolist() == [i for i in range(600) if i != 5]
    assert len(shapes.labelled_ids('train', 120)) == 120
    pixels = shapes.images.double() / 255
    assert shapes.mean == pytest.approx(pixels.mean(dim=(0, 2, 3)).tolist(), abs=1e-5)
    assert shapes.std == pytest.approx(pixels.std(dim=(0, 2, 3)).tolist(), abs=1e-5)


def test_mean_and_std_do_not_depend_on_the_order_of_the_classes():
    """20,000 images, dark ones first: the mean is 1/2, that of the first 10,000 is 0."""
    images = torch.zeros(20_000, 1, 2, 2, dtype=torch.uint8)
    images[10_000:] = 255
    labels = torch.zeros(20_000, dtype=torch.long)
    mean, = MemoryImages(images, labels, images[:1], labels[:1], ('x',)).mean
    assert abs(mean - 0.5) < 3 * 0.5 / 100


def test_labelled_images_come_in_the_order_of_the_ids(shapes):
    ids = torch.tensor([7, 3, 40])
    (images, labels), = shapes.labelled('test', ids, side=32)
    assert torch.equal(images, shapes.test_images[ids] / 255)
    assert torch.equal(labels, shapes.test_labels[ids])
    (images, _), = shapes.labelled('test', ids, side=20)
    assert images.shape == (3, 3, 20, 20)


def test_batches_of_images_in_memory(shapes):
    keys = [[(0, 4), (0, 9)], [(1, 9), (1, 0)]]
    first, second = shapes.batches(keys, recipe('moco', 32), 0, 'cpu')
    assert torch.equal(first, shapes.images[[4, 9]])
    assert torch.equal(second, shapes.images[[9, 0]])


def test_train_batches_depend_on_seed_epoch_and_ids(shapes):
    parts = [torch.tensor([1, 2]), torch.tensor([3, 4])]

    def batches(epoch, seed, parts=parts):
        return [images for images, _ in shapes.train_batches(parts, epoch, CROPS, seed)]

    first = batches(0, 0)
    assert torch.equal(first[1], batches(0, 0, parts[1:])[0])
    assert not torch.equal(first[0], batches(1, 0)[0])
    assert not torch.equal(first[0], batches(0, 1)[0])
    assert [labels.tolist() for _, labels in shapes.train_batches(parts, 0, CROPS, 0)] \
        == [[1, 2], [3, 4]]
    assert first[0].dtype == torch.float32 and 0 <= first[0].min() and first[0].max() <= 1


def test_fingerprint_tells_data_sets_apart(shapes):
    def remade(images=shapes.images, labels=shapes.labels):
        return MemoryImages(images, labels, shapes.test_images, shapes.test_labels, SHAPES)

    assert remade().fingerprint == shapes.fingerprint
    last_bit = shapes.images.clone()
    last_bit[:, 0, 0, 0] ^= 1
    assert remade(images=last_bit).fingerprint == shapes.fingerprint
    assert remade(images=shapes.images.flip(0)).fingerprint != shapes.fingerprint
    assert remade(images=shapes.images[:599], labels=shapes.labels[:599]).fingerprint \
        != shapes.fingerprint
    assert remade(labels=shapes.labels.flip(0)).fingerprint != shapes.fingerprint


def test_fashion_mnist_through_torchvision(tiny_fashion):
    fashion = load('fashion_mnist', tiny_fashion)
    assert fashion.images.shape == (320, 1, 28, 28) and fashion.test_images.shape[0] == 60
    assert fashion.channels == 1 and len(fashion.classes) == 10
    assert fashion.labels[:12].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]
    assert shrink_note(fashion, side=7) is None
    assert 'images of about 28 px are shrunk 7.0 times to 4 px' in shrink_note(fashion, side=4)


def test_what_is_not_there_is_said(tiny_fashion, tmp_path):
    with pytest.raises(FileNotFoundError, match='cifar10 is not whole in .*--download'):
        load('cifar10', tiny_fashion)
    with pytest.raises(ValueError, match="'mnist' is not one of shapes, fashion_mnist"):
        load('mnist')
    with pytest.raises(FileNotFoundError, match='no folder .*nowhere'):
        load('folder', tmp_path / 'nowhere')
    (tmp_path / 'notes.txt').touch()
    with pytest.raises(FileNotFoundError, match='no images below .*, left out: 1 other extension'):
        load('folder', tmp_path)


# ---------------------------------------------------------------- images in folders

def save_images(root, folders, count, size=(70, 50)):
    """`count` images of random pixels in each of the folders."""
    for folder in folders:
        (root / folder).mkdir(parents=True)
        for i in range(count):
            generator = keyed_generator(folder, i)
            pixels = torch.randint(256, (size[1], size[0], 3), generator=generator)
            image = Image.fromarray(pixels.to(torch.uint8).numpy())
            image.save(root / folder / f'{i:03}.jpg')


@pytest.fixture
def photos(tmp_path):
    save_images(tmp_path, ('train/cat', 'train/dog/deep'), 60)
    save_images(tmp_path, ('val/cat', 'val/dog', 'val/fox'), 5)
    return tmp_path


def crops_of(folder, count=3, workers=0, start=0):
    keys = batch_keys(len(folder), 8, seed=0, start_step=start)
    return list(islice(folder.batches(keys, recipe('moco', 32), 0, 'cpu', workers), count))


def same(first, second):
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_folder_with_splits(photos, capsys):
    """A fox is in no class of the training images: its 5 images are not scored."""
    folder = load('folder', photos)
    assert len(folder) == 120 and folder.classes == ('cat', 'dog') and folder.channels == 3
    assert folder.labels.tolist() == [0] * 60 + [1] * 60
    assert folder.test_labels.tolist() == [0] * 5 + [1] * 5 + [-1] * 5
    assert len(folder.labelled_ids('test')) == 10
    said = capsys.readouterr().out
    assert "120 training images in 'train', 2 classes" in said
    assert "15 images to score, in 'val'; left out: nothing" in said


def test_with_val_and_test_the_first_is_scored_and_the_other_counted(photos, capsys):
    save_images(photos, ('Test/cat', 'Test/dog'), 2)
    assert len(load('folder', photos).test_files) == 15
    assert "in 'val'; left out: 4 outside of the splits" in capsys.readouterr().out


def test_a_folder_without_splits_holds_a_stratified_tenth_out(photos):
    """6 of the 60 cats and 6 of the 60 dogs."""
    folder = load('folder', photos / 'train')
    assert len(folder) == 120 and len(folder.ids('train')) == 120
    assert folder.labels[folder.labelled_ids('train')].bincount().tolist() == [54, 54]
    assert folder.test_labels.bincount().tolist() == [6, 6]
    bank = {folder.files[i] for i in folder.labelled_ids('train')}
    assert len(bank) == 108 and not bank & set(folder.test_files)


def test_an_unlabelled_folder_trains_and_gives_features(photos):
    folder = load('folder', photos / 'train' / 'cat')
    assert folder.classes == () and folder.test_files == []
    assert len(folder.labelled_ids('train')) == 0 and len(folder.ids('train')) == 60
    (images, labels), = folder.labelled('train', folder.ids('train'), side=32)
    assert images.shape == (60, 3, 32, 32) and labels.tolist() == [-1] * 60
    assert crops_of(folder)[0][0].shape == (8, 3, 32, 32)


def test_crops_do_not_depend_on_workers_pieces_or_the_past(photos, monkeypatch):
    torch.manual_seed(5)
    folder = load('folder', photos)
    plain = crops_of(folder)
    monkeypatch.setattr(data, 'SHARED_MEMORY', 3 * 4 * 6_144)  # 3 crops a piece with two workers
    for again in (crops_of(folder, workers=2), crops_of(folder, workers=1)):
        assert all(same(a, b) for a, b in zip(plain, again, strict=True))
    assert same(plain[2], crops_of(folder, 1, workers=2, start=2)[0])
    assert plain[0][0].shape == (8, 3, 32, 32) and plain[0][0].dtype == torch.uint8
    assert torch.rand(1) == torch.rand(1, generator=torch.Generator().manual_seed(5))
    views = make_views(plain[0], [view.at(24) for view in recipe('moco', 32)], keyed_generator(0))
    assert views[1].shape == (8, 3, 24, 24)


def test_pieces_in_flight_fit_into_the_shared_memory_of_docker(photos, monkeypatch):
    """Two pieces for each of 4 workers at 224 px, at 150,528 bytes an image, are below 64 MB."""
    made = []

    class Loader(data.DataLoader):
        def __init__(self, decoder, batch_sampler, **settings):
            made.append(settings['prefetch_factor'])
            made.extend(len(piece) for piece in batch_sampler)
            raise InterruptedError

    monkeypatch.setattr(data, 'DataLoader', Loader)
    folder = load('folder', photos)
    with pytest.raises(InterruptedError):
        next(folder.labelled('train', folder.ids('train'), side=224, workers=4))
    prefetch, *pieces = made
    assert sum(pieces) == 120 and max(pieces) * prefetch * 4 * 150_528 < 40e6


def test_labelled_images_are_center_crops_in_the_order_of_the_ids(photos):
    folder = load('folder', photos)
    ids = torch.tensor([70, 3, 100])
    (images, labels), = folder.labelled('train', ids, side=32, workers=1)
    image = Image.open(photos / folder.files[3])
    assert torch.equal(images[1], data.center_crop(image, None, 32)[0] / 255)
    assert labels.tolist() == [1, 0, 1]


def test_train_batches_of_a_folder(photos):
    folder = load('folder', photos)
    parts = torch.arange(20).split(8)
    first, again, later = (list(folder.train_batches(parts, epoch, CROPS, 0, workers))
                           for epoch, workers in ((0, 0), (0, 2), (1, 0)))
    assert [images.shape[0] for images, _ in first] == [8, 8, 4]
    assert all(same(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first[0][0], later[0][0])
    crops = data.random_crops(Image.open(photos / folder.files[9]), (0, 9), [CROPS], 0)
    assert torch.equal(first[1][0][1], crops[0] / 255)


def test_shrink_note_of_a_folder(photos):
    """50 px on the shorter side: 4 times 12.5."""
    folder = load('folder', photos)
    assert shrink_note(folder, side=13) is None
    assert '50 px are shrunk 4.2 times to 12 px' in shrink_note(folder, side=12)


def test_fingerprint_of_a_folder_follows_names_count_and_sizes(photos):
    before = load('folder', photos).fingerprint
    assert load('folder', photos).fingerprint == before
    path = photos / 'train/cat/000.jpg'
    path.rename(path.with_name('renamed.jpg'))
    renamed = load('folder', photos).fingerprint
    path.with_name('renamed.jpg').unlink()
    removed = load('folder', photos).fingerprint
    path.with_name('001.jpg').write_bytes(b'other')
    assert len({before, renamed, removed, load('folder', photos).fingerprint}) == 4


# ---------------------------------------------------------------- damaged files and dead workers

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
    assert len(images) == 59 and len(labels) == 59
    (images, labels), = folder.train_batches([torch.tensor([0, 1, 2])], 0, CROPS, 0)
    assert len(images) == 2

    (photos / folder.files[1]).write_bytes(b'')
    with pytest.raises(ValueError, match='2 of 120 images cannot be read, over 1 %'):
        crops_of(load('folder', photos), count=30)


def test_a_folder_without_one_readable_image_is_said(photos):
    folder = load('folder', photos / 'train')
    for name in folder.files:
        (photos / 'train' / name).write_bytes(b'')
    with pytest.raises(ValueError, match='no image below .* can be read; the last is'):
        crops_of(folder)


def test_a_killed_worker_is_one_line_that_names_the_flag(photos):
    folder = load('folder', photos)
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


def test_a_worker_that_hangs_is_one_line_too(photos, monkeypatch):
    monkeypatch.setattr(data, 'TIMEOUT', 1)
    folder = load('folder', photos)
    with pytest.raises(OSError, match='timed out after 1 seconds.*--workers 0.*--shm-size'):
        next(folder.loaded('train', [[(0, 0)]], sleep, [32], workers=1))


# ---------------------------------------------------------------- small folders in memory

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
    assert memory.images.shape == (120, 3, 24, 32) and memory.test_images.shape == (10, 3, 24, 32)
    expected = torch.stack([pil_to_tensor(image) for image, _ in ImageFolder(icons / 'train')])
    assert torch.equal(memory.images, expected)
    assert torch.equal(memory.labels, folder.labels)
    assert torch.equal(memory.test_labels, folder.test_labels)
    assert memory.classes == folder.classes and memory.fingerprint == folder.fingerprint
    assert list(memory.files) == folder.files and list(memory.test_files) == folder.test_files
    assert memory.mean == pytest.approx((expected / 255).mean(dim=(0, 2, 3)).tolist(), abs=1e-5)


def test_small_images_without_splits_or_labels(icons):
    memory = load('folder', icons / 'train')
    folder = load('folder', icons / 'train', in_memory=False)
    assert torch.equal(memory.labels, folder.labels) and len(memory.test_images) == 12
    first = memory.files.index(folder.test_files[0])
    assert torch.equal(memory.test_images[0], memory.images[first])
    memory = load('folder', icons / 'train' / 'cat')
    assert memory.classes == () and len(memory) == 60 and len(memory.test_images) == 0
    assert len(next(memory.labelled('train', memory.ids('train'), side=24))[0]) == 60


def test_other_sizes_stay_on_disk(icons, photos):
    assert isinstance(load('folder', photos / 'val'), FolderImages)
    Image.new('RGB', (32, 25)).save(icons / 'test' / 'dog' / 'z.png')
    assert isinstance(load('folder', icons), FolderImages)


def test_the_memory_limit_is_said(icons, monkeypatch, capsys):
    """130 images of 24 x 32 x 3 bytes are 0.3 MB."""
    monkeypatch.setattr(data, 'MEMORY_LIMIT', 2e5)
    assert isinstance(load('folder', icons), FolderImages)
    assert 'would take 0.0 GB of memory, over the limit of 0.0:' in capsys.readouterr().out


def test_unreadable_small_images_are_named_and_left_out(icons, capsys):
    (icons / 'train/cat/000.jpg').write_bytes(b'')
    memory = load('folder', icons)
    assert len(memory) == 119 and memory.labels.bincount().tolist() == [59, 60]
    assert memory.files[0] == 'train/cat/001.jpg'
    assert "unreadable image 1 skipped: 'train/cat/000.jpg'" in capsys.readouterr().out
    (icons / 'train/cat/001.jpg').write_bytes(b'')
    with pytest.raises(ValueError, match='2 of 120 images cannot be read, over 1 %'):
        load('folder', icons)
