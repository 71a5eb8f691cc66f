"""Data sets of images: what they hold, which part is scored, and in which order images are seen.

MemoryImages holds small images as one uint8 tensor: torchvision's data sets, the rendered `shapes`,
and folders of small images. FolderImages holds a tree of image files of any size and decodes them
in the worker processes of a DataLoader. Both have one interface:

    len(data), channels, mean, std     of the training images; mean and std by channel, in [0, 1],
                                       those of ImageNet for files
    classes, labels, test_labels       label -1: not labelled, or held out of the training labels
    files, test_files                  names of the image files; () for sets without files
    fingerprint                        a short hash that tells sets of training images apart
    ids(split), labelled_ids(split)    which images there are; split is 'train' or 'test'
    batches(keys, views, ...)          training images for make_views, ordered by `batch_keys`
    labelled(split, ids, side)         whole images with their labels, to score or export features
    train_batches(parts, ...)          augmented images with their labels, to fine-tune on

Shapes: b batch, n images, c channels, h w image, s side of a view. Images are uint8 (b c h w).

    data = load('shapes')
    keys = batch_keys(len(data), batch_size=128, seed=0)
    for images in data.batches(keys, views, seed=0, device='cpu'):
        view1, view2 = make_views(images, views, generator)
"""
import contextlib
import hashlib
import itertools
import math
import multiprocessing
import os
import signal
import statistics
from collections import Counter
from dataclasses import dataclass
from functools import lru_cache, partial

import torch
from einops import rearrange
from torch.utils.data import DataLoader
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from files import EXTENSIONS, Decoder, center_crop, find_splits, first_folder, first_folders
from files import folder_with_splits, image_size, list_images, random_crops, read_image
from shapes import SHAPES, render_shapes
from views import IMAGENET_MEAN, IMAGENET_STD, keyed_generator, make_views, resize

TORCHVISION = dict(
    fashion_mnist=datasets.FashionMNIST,
    cifar10=datasets.CIFAR10,
    cifar100=datasets.CIFAR100,
    stl10=datasets.STL10)
DATASETS = ('shapes', *TORCHVISION, 'folder')


# ---------------------------------------------------------------- order and subsets

def steps_per_epoch(n, batch_size):
    """Whole batches of n images, at least one."""
    if n < batch_size:
        raise ValueError(f'batch size {batch_size} is larger than the {n} images; '
                         f'lower --batch-size')
    return n // batch_size


def batch_keys(n, batch_size, seed, start_step=0, rank=0, world=1):
    """Endless batches, each a list of (epoch, index), from a step on.

    batch_size counts the images of all ranks; the last partial batch of an epoch is dropped. The
    order of an epoch depends on (seed, epoch) alone, so that a resumed run finds its place again.
    """
    steps = steps_per_epoch(n, batch_size)
    share = batch_size // world

    @lru_cache(maxsize=1)
    def order(epoch):
        generator = keyed_generator(seed, 'order', epoch)
        return torch.randperm(n, generator=generator).tolist()

    def batch(step):
        epoch, place = divmod(step, steps)
        first = place * batch_size + rank * share
        indices = order(epoch)[first:first + share]
        return [(epoch, index) for index in indices]

    return map(batch, itertools.count(start_step))


def stratified(labels, count):
    """Positions of `count` of the labels (n), sorted. Each class keeps its share, within one image.

    Evenly spaced positions would not do, because labels that repeat with a period alias with the
    spacing. Which images of a class are chosen is random, but the same in every run.
    """
    n = len(labels)
    _, sizes = labels.unique(return_counts=True)

    # each class gets its share, rounded down; the largest remainders get what is left over
    quotas = sizes * count // n
    remainders = sizes * count % n
    left_over = count - int(quotas.sum())
    winners = remainders.argsort(descending=True, stable=True)[:left_over]
    quotas[winners] += 1

    # shuffle all, then sort by class: within a class the order is random
    order = torch.randperm(n, generator=keyed_generator('subset', n))
    order = order[labels[order].argsort(stable=True)]
    members = order.split(sizes.tolist())
    chosen = [ids[:quota] for ids, quota in zip(members, quotas.tolist())]
    return torch.cat(chosen).sort().values


def short_hash(*values):
    text = repr(values).encode()
    return hashlib.blake2b(text, digest_size=8).hexdigest()


class Images:
    """What both kinds of data set share."""
    unreadable = dict(train={}, test={})                       # {file: reason}, none in memory

    def __len__(self):
        return len(self.labels)

    def labels_of(self, split):
        return dict(train=self.labels, test=self.test_labels)[split]

    def files_of(self, split):
        return dict(train=self.files, test=self.test_files)[split]

    def ids(self, split):
        """The ids (n) of all images of a split, with or without a label."""
        return torch.arange(len(self.labels_of(split)))

    def labelled_ids(self, split, limit=None):
        """The ids (n) of the labelled images, sorted. With a limit, a stratified random subset."""
        labels = self.labels_of(split)
        ids = (labels >= 0).nonzero()[:, 0]
        if limit and limit < len(ids):
            ids = ids[stratified(labels[ids], limit)]
        return ids


def shrink_note(data, side):
    """A line that says so when images are shrunk more than 4 times, else None. side in pixels."""
    shorter = data.shorter_side()
    if shorter <= 4 * side:
        return None
    return (f'images of about {shorter:.0f} px are shrunk {shorter / side:.1f} times to {side} px; '
            f'raise --img-size to keep their detail')


# ---------------------------------------------------------------- images in memory

@dataclass(eq=False)
class MemoryImages(Images):
    """Small images as uint8 tensors (n c h w)."""
    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple
    files: tuple = ()
    test_files: tuple = ()
    fingerprint: str = ''                                      # by default, of the images

    def __post_init__(self):
        # 10,000 at random, since the images may be sorted by class
        order = torch.randperm(len(self), generator=keyed_generator('mean and std'))
        sample = self.images[order[:10_000]] / 255
        self.mean = tuple(sample.mean(dim=(0, 2, 3)).tolist())
        std = sample.std(dim=(0, 2, 3)).clamp(min=1 / 255)     # a channel may be empty
        self.std = tuple(std.tolist())
        self.fingerprint = self.fingerprint or self.image_hash()

    def image_hash(self):
        # The brightness of a hundred images, rounded: on another processor, a rendered image may
        # differ in the last bit.
        some = torch.linspace(0, len(self) - 1, 100).long()
        brightness = self.images[some].double().mean(dim=(1, 2, 3))
        brightness = brightness.round().tolist()
        labels = self.labels[some].tolist()
        return short_hash(*self.images.shape, brightness, labels)

    @property
    def channels(self):
        return self.images.shape[1]

    def shorter_side(self):
        return min(self.images.shape[2:])

    def batches(self, keys, views, seed, device, workers=0):
        """uint8 images (b c h w) on the device, for each list of (epoch, index) in keys.

        views, seed and workers are not needed here: make_views takes the crops.
        """
        images = self.images.to(device)
        for batch in keys:
            indices = torch.tensor([index for _, index in batch])
            if images.is_cuda:
                indices = indices.pin_memory()                 # so the copy waits for no other work
            yield images[indices.to(device, non_blocking=True)]

    def labelled(self, split, ids, side, workers=0):
        """Batches of whole images (b c side side) in [0, 1] and labels (b), in the order of ids."""
        images = dict(train=self.images, test=self.test_images)[split]
        labels = self.labels_of(split)
        for part in ids.split(500):
            yield resize(images[part], side), labels[part]

    def train_batches(self, parts, epoch, view, seed, workers=0):
        """Augmented training images (b c s s) in [0, 1] and labels (b), for each tensor of ids."""
        for part in parts:
            generator = keyed_generator(seed, epoch, int(part[0]))
            images, = make_views(self.images[part], [view], generator)
            yield images, self.labels[part]


# ---------------------------------------------------------------- images in folders

# Workers hand images over in shared memory, of which a docker container has 64 MB. A batch of 250
# images of 224 px takes 38 MB. So batches travel in pieces, and those in flight fill a third of it:
# a run that scores has two loaders.
PIECES_PER_WORKER = 2
SHARED_MEMORY = 20 * 2 ** 20   # bytes
TIMEOUT = 300                  # seconds without a piece


# A run finishes its step on these, and stops.
STOPS = [getattr(signal, name) for name in ('SIGTERM', 'SIGINT', 'SIGUSR1')
         if hasattr(signal, name)]                             # Windows has no SIGUSR1


def outlive_signals(worker):
    """They reach all processes of a job; the main one finishes its step, and needs its workers."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def kill_workers():
    """One that hangs would outlive us. PyTorch raises once for each that dies: here, not later."""
    for worker in multiprocessing.active_children():
        worker.kill()
        with contextlib.suppress(RuntimeError):
            worker.join()


def worker_error(error):
    """The error of a loader worker that was killed, hangs or raised: one line, with the remedy.

    PyTorch may raise 'DataLoader worker ... is killed' anywhere, even in the middle of a step.
    """
    reason = str(error).strip().splitlines()[-1]
    return OSError(f'a loader worker failed ({reason}). It may have run out of memory or of '
                   f'/dev/shm: set --workers 0, or start docker with --shm-size 8g')


class FolderImages(Images):
    """A tree of images: ROOT/train and ROOT/val, under these or other usual names, or one tree.

    Classes are the first folders, if there are at least two. Of one tree with classes, a stratified
    tenth is scored; the network is pretrained on it too, without its labels. Unreadable images are
    named, counted and replaced by the next; more than one and 1 % stop the run. say: prints a line.
    """
    channels = 3
    mean = IMAGENET_MEAN
    std = IMAGENET_STD

    def __init__(self, root, say=tqdm.write):
        self.root = str(root)
        self.say = say
        self.unreadable = dict(train={}, test={})              # file: reason, of those met so far
        if not os.path.isdir(self.root):
            raise FileNotFoundError(f'no folder {ascii(self.root)}; set --data-root to a folder '
                                    f'of images')
        left_out = Counter()
        found = list_images(self.root, left_out)
        folders = first_folders(found)
        train, test = find_splits(folders)
        nested = None if train else folder_with_splits(found)
        if nested:
            raise ValueError(f'{ascii(self.root)} holds splits in its folder {ascii(nested)}; '
                             f'set --data-root to that folder')
        base = f'{train}/' if train else ''
        self.files = [name for name in found if name.startswith(base)]
        self.test_files = [name for name in found if first_folder(name) == test]
        if train:
            taken = len(self.files) + len(self.test_files)
            left_out['outside of the splits'] = len(found) - taken
        reasons = [f'{count} {reason}' for reason, count in left_out.items() if count]
        reasons = ', '.join(reasons or ['nothing'])
        if not self.files:
            raise FileNotFoundError(f'no images below {ascii(self.root)}, left out: {reasons}; '
                                    f'looked for {" ".join(EXTENSIONS)}')

        folders = first_folders(self.files, base)
        self.classes = tuple(folders) if len(folders) > 1 else ()
        self.labels = self.label(self.files, base)
        self.test_labels = self.label(self.test_files, f'{test}/')
        if self.classes and not test:
            self.hold_out_a_tenth()
        say(f'{ascii(self.root)}: {len(self.files)} training images in {ascii(train or ".")}, '
            f'{len(self.classes)} classes')
        where = f'in {ascii(test)}' if test else 'held out of these'
        say(f'  {len(self.test_files)} images to score, {where}; left out: {reasons}')

    def label(self, files, base):
        index = {name: i for i, name in enumerate(self.classes)}
        labels = [index.get(first_folder(name, base), -1) for name in files]
        return torch.tensor(labels).long()

    def hold_out_a_tenth(self):
        count = math.ceil(len(self.labelled_ids('train')) / 10)
        held = self.labelled_ids('train', count)
        self.test_files = [self.files[i] for i in held]
        self.test_labels = self.labels[held]
        self.labels = self.labels.index_fill(0, held, -1)

    def path(self, name):
        return os.path.join(self.root, name)

    def some_paths(self, count):
        """The paths of about `count` training images, evenly spaced."""
        some = torch.linspace(0, len(self) - 1, count).long()
        return [self.path(self.files[i]) for i in some]

    @property
    def fingerprint(self):
        # other data may have the same names, such as 0/1.png, but hardly the same bytes
        some = []
        for path in self.some_paths(100):
            with open(path, 'rb') as file:
                some.append(file.read(20_000))
        return short_hash(*self.files, *some)

    def shorter_side(self):
        """The median over about twenty images, in pixels."""
        sizes = map(image_size, self.some_paths(20))
        sides = [min(size) for size in sizes if size]
        return statistics.median(sides or [0])

    def report(self, split, unreadable):
        """Names the files of a dictionary (file: reason) once. Stops the run at more than 1 %."""
        known = self.unreadable[split]
        for name, reason in unreadable.items():
            if name not in known:
                known[name] = reason
                self.say(f'unreadable image {len(known)} skipped: {ascii(name)}: {ascii(reason)}')
        total = len(self.files_of(split))
        if len(known) > max(1, 0.01 * total):
            raise ValueError(f'{len(known)} of {total} images cannot be read, over 1 %; replace or '
                             f'remove them, the last is {ascii(list(known)[-1])}')

    def loaded(self, split, keys, views_of, sides, device='cpu', workers=0):
        """(images, labels, intact) for each list of (epoch, index) in keys.

        images: those that views_of(image, key) makes, a uint8 (b 3 s s) for each of `sides`.
        intact (b): false where another image is in the place of an unreadable one.
        """
        image_bytes = 3 * sum(side ** 2 for side in sides)
        size = SHARED_MEMORY // (PIECES_PER_WORKER * max(1, workers) * image_bytes)
        size = min(max(1, size), 64)
        ahead, behind = itertools.tee(keys)
        pieces = (batch[i:i + size] for batch in ahead for i in range(0, len(batch), size))
        decoder = Decoder(self.root, self.files_of(split), self.labels_of(split), views_of)
        loader = DataLoader(
            decoder,
            batch_sampler=pieces,
            collate_fn=decoder.collate,
            worker_init_fn=outlive_signals,
            num_workers=workers,
            prefetch_factor=PIECES_PER_WORKER if workers else None,
            timeout=TIMEOUT if workers else 0,
            pin_memory=torch.cuda.is_available(),
            generator=torch.Generator())                       # leaves the global one as it is
        loader = iter(loader)
        for batch in behind:
            # the same number of pieces as `pieces` has made of this batch
            images = []
            labels = []
            intact = []
            for _ in range(0, len(batch), size):
                try:
                    piece, piece_labels, unreadable = next(loader)
                except (RuntimeError, OSError, ValueError) as error:
                    if not workers:
                        raise
                    kill_workers()
                    raise worker_error(error) from None
                for files in unreadable:
                    self.report(split, files)
                    intact.append(not files)
                # copied at once, because a piece takes shared memory for as long as it lives
                piece = [view.to(device, non_blocking=True, copy=True) for view in piece]
                images.append(piece)
                labels.append(piece_labels.clone())
            images = [torch.cat(view) for view in zip(*images)]
            yield images, torch.cat(labels), torch.tensor(intact)

    def batches(self, keys, views, seed, device, workers=0):
        """Crops for make_views, a uint8 (b 3 s s) for each view, for each list of keys."""
        views_of = partial(random_crops, views=views, seed=seed)
        sides = [view.side for view in views]
        for crops, _, _ in self.loaded('train', keys, views_of, sides, device, workers):
            yield crops

    def labelled(self, split, ids, side, workers=0):
        """Batches of center crops (b 3 side side) in [0, 1] and labels (b), in the order of ids.

        Unreadable images are missing; afterwards `unreadable[split]` names them.
        """
        keys = [[(0, i) for i in part.tolist()] for part in ids.split(250) if len(part)]
        views_of = partial(center_crop, side=side)
        loaded = self.loaded(split, keys, views_of, [side], workers=workers)
        for (images,), labels, intact in loaded:
            if intact.any():
                yield images[intact] / 255, labels[intact]

    def train_batches(self, parts, epoch, view, seed, workers=0):
        """Augmented training images (b 3 s s) in [0, 1] and labels (b), for each tensor of ids."""
        keys = [[(epoch, i) for i in part.tolist()] for part in parts]
        views_of = partial(random_crops, views=[view], seed=seed)
        loaded = self.loaded('train', keys, views_of, [view.side], workers=workers)
        for part, (crops, labels, intact) in zip(parts, loaded):
            generator = keyed_generator(seed, epoch, int(part[0]))
            images, = make_views(crops, [view], generator)
            if intact.any():
                yield images[intact], labels[intact]


# ---------------------------------------------------------------- small folders, in memory

SMALL = 64              # pixels
MEMORY_LIMIT = 2e9      # bytes


def decode_split(folder, split, size):
    """(images, labels, files) of a split, without unreadable ones; None if a size differs."""
    files = folder.files_of(split)
    width, height = size
    images = torch.empty(len(files), 3, height, width, dtype=torch.uint8)
    kept = []
    for i, name in enumerate(tqdm(files, desc=f'decoding, {split}', unit=' images', disable=None)):
        image, reason = read_image(folder.path(name))
        if image is None:
            folder.report(split, {name: reason})
        elif image.size != size:
            return None
        else:
            images[len(kept)] = pil_to_tensor(image)
            kept.append(i)
    images = images[:len(kept)]
    labels = folder.labels_of(split)[torch.tensor(kept).long()]
    return images, labels, tuple(files[i] for i in kept)


def in_memory_if_small(folder):
    """The MemoryImages of a folder whose images have one size of at most 64 px, else the folder."""
    sizes = map(image_size, map(folder.path, folder.files))
    size = next(filter(None, sizes), None)                     # of the first that can be read
    if size is None or max(size) > SMALL:
        return folder
    count = len(folder.files) + len(folder.test_files)
    needed = 3 * math.prod(size) * count
    if needed > MEMORY_LIMIT:
        folder.say(f'the images would take {needed / 1e9:.1f} GB of memory, over the limit of '
                   f'{MEMORY_LIMIT / 1e9:.1f}: they are read from their files in each epoch')
        return folder
    train = decode_split(folder, 'train', size)
    test = train and decode_split(folder, 'test', size)
    if not test:
        return folder
    images, labels, files = train
    test_images, test_labels, test_files = test
    return MemoryImages(images, labels, test_images, test_labels, folder.classes,
                        files, test_files, folder.fingerprint)


# ---------------------------------------------------------------- loading

def load(name, root='data', download=False, in_memory=True, say=tqdm.write):
    """A data set by name, as MemoryImages or FolderImages.

    Files are looked for in `root`; they are fetched if they are not there and download is allowed.
    in_memory: decode a folder of small images once, if it takes at most 2 GB.
    """
    if name == 'shapes':
        train = render_shapes(12_000, seed=0)
        test = render_shapes(2_400, seed=1)
        return MemoryImages(*train, *test, SHAPES)
    if name == 'folder':
        folder = FolderImages(root, say)
        return in_memory_if_small(folder) if in_memory else folder
    if name not in TORCHVISION:
        raise ValueError(f"data set '{name}' is not one of {', '.join(DATASETS)}")
    try:
        return from_torchvision(name, root, download)
    except (RuntimeError, AssertionError, ValueError, OSError) as error:  # not there, or damaged
        reason = (str(error) or 'a file is damaged').splitlines()[0]
        fix = 'put its files there by hand' if download else 'add --download to fetch it'
        raise FileNotFoundError(f'{name} is not whole in {ascii(str(root))} ({reason}); set '
                                f'--data-root to the folder that holds it, or {fix}') from None


def from_torchvision(name, root, download):
    parts = []
    for train in (True, False):
        if name == 'stl10':
            split = 'train+unlabeled' if train else 'test'
            part = datasets.STL10(root, split=split, download=download)
            labels = part.labels
        else:
            part = TORCHVISION[name](root, train=train, download=download)
            labels = part.targets
        images = torch.as_tensor(part.data)
        if images.ndim == 3:
            images = rearrange(images, 'n h w -> n 1 h w')
        elif images.shape[3] == 3:                             # CIFAR; STL-10 is n c h w
            images = rearrange(images, 'n h w c -> n c h w')
        parts += [images.contiguous(), torch.as_tensor(labels).long()]
    return MemoryImages(*parts, tuple(part.classes))


if __name__ == '__main__':
    images, labels = render_shapes(600, seed=0)
    data = MemoryImages(images, labels, images[:60], labels[:60], SHAPES)

    # labels are index % 12: evenly spaced, a third of the images holds 4 of the 12 classes
    spaced = labels[::3].unique().numel()
    counts = labels[data.labelled_ids('train', limit=200)].bincount().tolist()
    print(f'200 of 600 images: {spaced} classes if evenly spaced, {len(counts)} if stratified, '
          f'each {min(counts)} to {max(counts)} times')
    assert spaced == 4 and len(counts) == 12 and min(counts) == 16 and max(counts) == 17

    whole = list(itertools.islice(batch_keys(600, 128, seed=0), 9))
    later = list(itertools.islice(batch_keys(600, 128, seed=0, start_step=5), 4))
    first = {index for batch in whole[:4] for _, index in batch}
    print(f'an epoch of 4 batches holds {len(first)} different images; step 5 is found again')
    assert len(first) == 512 and whole[5:] == later

    scored = [len(batch) for _, batch in data.labelled('test', data.ids('test'), side=16)]
    print(f'mean {data.mean[0]:.2f}, std {data.std[0]:.2f}; {sum(scored)} images to score')
    assert sum(scored) == 60
    print('data.py: all claims hold')
