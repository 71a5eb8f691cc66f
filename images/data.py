"""Data sets of images: what they hold, which part is scored, in which order images are seen.

Small images are one uint8 tensor in memory: torchvision's data sets, the rendered `shapes`, and
folders of small images of one size. Other folders are read by the workers of a DataLoader, which
decode each image once and crop it straight to the sides that the encoder reads. For a score both
ways give the same pixels (`center`).

    train + val, or valid, validation, test     beside each other, in any case
    CLASS/image.jpg                             one tree: a tenth is scored
    pictures alone                              to pretrain on, without a score

Shapes: b batch, n images, c channels, h w image, s side of a view. Images are uint8 (b c h w).

    data = load('shapes')
    kinds = recipe('moco', 32)
    steps = ((keys, kinds) for keys in batch_keys(len(data), 128, seed=0))
    for images, labels in data.batches(steps):                      # images: a batch for each view
        view1, view2 = (make_view(x, kind, None, data.cropped) for x, kind in zip(images, kinds))
"""
import hashlib
import itertools
import math
import multiprocessing.util
import os
import re
import signal
import unicodedata
from functools import lru_cache, partial

import torch
from einops import rearrange
from PIL import Image, PngImagePlugin
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

from images.shapes import SHAPES, render_shapes
from images.views import IMAGENET_MEAN, IMAGENET_STD, crop_boxes, keyed_generator, resize, uniform

TORCHVISION = dict(
    fashion_mnist=datasets.FashionMNIST,
    cifar10=datasets.CIFAR10,
    cifar100=datasets.CIFAR100)
DATASETS = ('shapes', *TORCHVISION, 'folder')

# Pillow goes by the content of a file and not by its name. On PostScript it starts Ghostscript.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'TIFF', 'PPM', 'GIF', 'AVIF', 'JPEG2000')
EXTENSIONS = tuple(name for name, kind in Image.registered_extensions().items() if kind in FORMATS)
PngImagePlugin.MAX_TEXT_CHUNK = 2 ** 30     # the pixels of a file with long comments are fine

SMALL = 64                                  # pixels: folders of such images are held in memory,
MEMORY_LIMIT = 2e9                          # in bytes


# ---------------------------------------------------------------- order and subsets

def batch_keys(n, batch_size, seed, start_step=0, rank=0, world=1):
    """Endless batches, each a list of (index, epoch), from a step on.

    batch_size counts the images of all ranks; the last partial batch of an epoch is dropped. The
    order of an epoch depends on (seed, epoch) alone, so that a resumed run finds its place again.
    """
    if n < batch_size:
        raise ValueError(f'batch size {batch_size} is larger than the {n} images; '
                         f'lower --batch-size')
    steps = n // batch_size
    share = batch_size // world

    @lru_cache(maxsize=1)
    def order(epoch):
        generator = keyed_generator(seed, 'order', epoch)
        return torch.randperm(n, generator=generator).tolist()

    def batch(step):
        epoch, place = divmod(step, steps)
        first = place * batch_size + rank * share
        return [(index, epoch) for index in order(epoch)[first:first + share]]

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


def labelled(labels, limit=None):
    """Positions of labels (n) that are not -1, sorted. With a limit, a stratified random subset."""
    ids = (labels >= 0).nonzero()[:, 0]
    if limit and limit < len(ids):
        ids = ids[stratified(labels[ids], limit)]
    return ids


# ---------------------------------------------------------------- pixels of a file

def to_rgb(image):
    """An opened file as RGB, 8 bits a channel. ValueError if it does not say what is white."""
    if image.mode == 'F' or (image.mode == 'I' and image.format == 'TIFF'):
        raise ValueError('32-bit pixels do not say which value is white; save 8 or 16 bits')
    if image.mode.startswith('I'):                      # 16 bits: convert('L') would cut off at 255
        image = image.convert('I').point(lambda value: value / 257 + 0.5).convert('L')
    return image if image.mode == 'RGB' else image.convert('RGB')


def read_crops(path, epoch, views, seed, root=''):
    """A random crop for each Augmentation, mirrored half of the time: a list of uint8 (3 s s).

    The draws depend on seed, epoch and name alone, so that any number of workers makes the same.
    """
    generator = keyed_generator(seed, epoch, name_below(root, path))
    low, high = torch.tensor([view.scale for view in views]).T[..., None]
    with Image.open(path, formats=FORMATS) as image:
        w, h = image.size
        boxes = crop_boxes(len(views), h, w, (low, high), generator)
        boxes = torch.stack(boxes, dim=1)                                     # views 4
        # a JPEG is decoded at 1/2, 1/4 or 1/8 where each crop keeps twice the side that it needs
        spare = math.inf
        for (_, _, *sides), view in zip(boxes.tolist(), views):
            spare = min(spare, min(sides) / (2 * view.rendered))
        if spare > 1:
            smaller = int(w / spare) + 1, int(h / spare) + 1
            image.draft('RGB', smaller)
        image = to_rgb(image)
        boxes = boxes * torch.tensor([image.height / h, image.width / w] * 2)
        flips = uniform(len(views), 0, 1, generator) < 0.5
        crops = []
        for view, (top, left, height, width), flip in zip(views, boxes.tolist(), flips):
            shrinks = view.side != view.rendered       # bicubic is nearest to the least squares
            filter = Image.Resampling['BICUBIC' if shrinks else view.interpolation.upper()]
            right = min(left + width, image.width)
            bottom = min(top + height, image.height)
            box = (left, top, right, bottom)
            side = (view.rendered, view.rendered)
            crop = pil_to_tensor(image.resize(side, filter, box, reducing_gap=2))
            crops.append(crop.flip(2) if flip else crop)
    return crops


def center(images, side, img_size):
    """What is scored of uint8 images (b c h w): float32 (b c side side) in [0, 1].

    The central square; 7/8 of it where the image is larger than img_size, the nominal side. This is
    the usual Resize(256) and CenterCrop(224), and small images are seen as a whole.
    """
    h, w = images.shape[2:]
    square = min(h, w)
    if square > img_size:
        square = max(1, round(square * 7 / 8))
    top = (h - square) // 2
    left = (w - square) // 2
    images = images[:, :, top:top + square, left:left + square]
    return resize(images, side)


def read_center(path, side, img_size):
    """`center` of a file: a list of one float32 (c side side).

    A JPEG is decoded at 1/2, 1/4 or 1/8 where what is scored keeps twice the side.
    """
    enough = math.ceil(2 * side * 8 / 7)
    return list(center(read_pixels(path, enough)[None], side, img_size))


def read_pixels(path, enough=None):
    """A whole file: uint8 (3 h w). Of a JPEG, `enough` pixels along each axis may do."""
    with Image.open(path, formats=FORMATS) as image:
        if enough:
            image.draft('RGB', (enough, enough))
        return pil_to_tensor(to_rgb(image))


def name_below(root, path):
    """What stays the same when a data set moves, to another file system too."""
    return unicodedata.normalize('NFC', os.path.relpath(path, root or '.'))


class Reader(Dataset):
    """Item (index, ...) -> (read(path, ...), index that was read, {unreadable path: reason}).

    A file that cannot be read is replaced by the next one that can.
    """

    def __init__(self, files, read):
        self.files = files
        self.read = read

    def __getitem__(self, item):
        index, *arguments = item
        unreadable = {}
        for i in range(index, index + len(self.files)):
            path = self.files[i % len(self.files)]
            try:
                return self.read(path, *arguments), i % len(self.files), unreadable
            except Exception as error:     # Pillow's decoders raise almost anything
                unreadable[path] = str(error) or type(error).__name__
        raise ValueError(f'no image can be read; the last is {path!a}: {unreadable[path]}')


def stacked(items):
    """Of a batch of items: a tensor (b c s s) for each view, the indices (b), what is unreadable.

    A few large tensors leave a worker faster than many small ones.
    """
    results, indices, unreadable = zip(*items)
    views = [torch.stack(view) for view in zip(*results)]
    return views, torch.tensor(indices), unreadable


def finish_first(worker):
    """Signals reach all processes of a job; the main one finishes its step, and needs workers."""
    for number in STOPS:
        signal.signal(number, signal.SIG_IGN)


def end_workers():
    """At exit Python sends workers SIGTERM, which they ignore, and waits for them."""
    if hasattr(signal, 'SIGCHLD'):                     # torch raises when a worker is killed
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for worker in multiprocessing.active_children():
        if worker.daemon:
            worker.kill()


multiprocessing.util.Finalize(None, end_workers, exitpriority=0)       # before that, after Pools


STOPS = [getattr(signal, name) for name in ('SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1')
         if hasattr(signal, name)]                     # Windows has the first two


# ---------------------------------------------------------------- a data set

class Images:
    """Training and scored images. split is 'train' or 'test'.

    labels[split]  (n), -1: not labelled, or held out of the training labels
    files[split]   paths; () for sets without files
    pixels[split]  uint8 (n c h w), or None: the images stay in their files
    mean, std      by channel of the training images in [0, 1]; those of ImageNet for files
    fingerprint    a short hash of the names: another set of training images has another
    """

    def __init__(self, name, classes, labels, pixels=None, files=None,  # noqa: PLR0913
                 root='', say=print):
        self.name = name
        self.root = root
        self.classes = tuple(classes)
        self.labels = labels
        self.files = files or dict(train=(), test=())
        self.say = say
        self.unreadable = dict(train={}, test={})              # path: reason, of those met so far
        names = [name_below(root, path) for path in self.files['train']]
        text = repr((name, self.classes, len(self), names)).encode()
        self.fingerprint = hashlib.blake2b(text, digest_size=8).hexdigest()
        self.pixels = None
        self.channels = 3
        self.mean = IMAGENET_MEAN
        self.std = IMAGENET_STD
        if pixels:
            self.hold(pixels)

    def hold(self, pixels):
        """Keeps the images of both splits in memory, and takes mean and std from them."""
        self.pixels = pixels
        self.channels = pixels['train'].shape[1]
        # 10,000 at random, since the images may be sorted by class
        order = torch.randperm(len(self), generator=keyed_generator('mean and std'))
        sample = pixels['train'][order[:10_000]] / 255
        mean = sample.mean(dim=(0, 2, 3))
        std = sample.std(dim=(0, 2, 3)).clamp(min=1 / 255)     # a channel may be empty
        self.mean = tuple(mean.tolist())
        self.std = tuple(std.tolist())

    def __len__(self):
        return len(self.labels['train'])

    @property
    def cropped(self):
        """Whether `batches` gives random crops: workers make them of files."""
        return not self.pixels

    def transform(self, side, img_size):
        """How `center` prepares an image, as the arguments of timm.data.create_transform.

        crop_pct is that of images in files larger than img_size; smaller ones are seen as a whole.
        """
        small = self.pixels and min(self.pixels['train'].shape[2:]) <= img_size
        return dict(
            input_size=(self.channels, side, side),
            interpolation='bicubic',
            crop_pct=1.0 if small else 7 / 8,
            mean=self.mean,
            std=self.std)

    def labelled_ids(self, split, limit=None):
        """The ids (n) of the labelled images, sorted. With a limit, a stratified random subset."""
        return labelled(self.labels[split], limit)

    def batches(self, steps, seed=0, workers=0):
        """([uint8 images of each view], labels (b)) for each (keys, Augmentations) of steps.

        keys: (index, epoch) of each image. Images in memory come whole (b c h w), the same for all
        views; those of files come `cropped` (b c s s), others for each view.
        """
        if self.pixels:
            for keys, views in steps:
                ids = torch.tensor([index for index, _ in keys])
                pixels = self.pixels['train'][ids]
                if torch.cuda.is_initialized():                # a copy from there does not wait
                    pixels = pixels.pin_memory()
                yield [pixels] * len(views), self.labels['train'][ids]
            return
        items = ([(*key, views) for key in keys] for keys, views in steps)
        read = partial(read_crops, seed=seed, root=self.root)
        for crops, ids, _ in self.read('train', items, read, workers):
            yield crops, self.labels['train'][ids]

    def scored(self, split, ids, side, img_size=None, workers=0):
        """Batches of pictures (b c side side) in [0, 1] with their ids (b), in the order of ids.

        Unreadable images are missing; afterwards `unreadable[split]` names them.
        """
        img_size = img_size or side
        parts = ids.split(250)                                 # stays in the allocator's pool
        if self.pixels:
            for part in parts:
                yield center(self.pixels[split][part], side, img_size), part
            return
        items = ([(index,) for index in part.tolist()] for part in parts)
        read = partial(read_center, side=side, img_size=img_size)
        for (pictures,), ids, intact in self.read(split, items, read, workers):
            if intact.any():
                yield pictures[intact], ids[intact]

    def read(self, split, items, read, workers):
        """(what was read, indices, whether each is the one asked for) of each batch of items."""
        loader = DataLoader(
            Reader(self.files[split], read),
            batch_sampler=items,
            collate_fn=stacked,
            num_workers=workers,
            worker_init_fn=finish_first,
            pin_memory=torch.cuda.is_initialized(),
            generator=torch.Generator())                       # leaves the global one as it is
        for results, indices, unreadable in loader:
            for paths in unreadable:
                self.report(split, paths)
            yield results, indices, torch.tensor([not paths for paths in unreadable])

    def report(self, split, paths):
        """Names unreadable files (path: reason) once. Stops the run at two or more, if over 1 %."""
        known = self.unreadable[split]
        for path in paths.keys() - known.keys():
            known[path] = paths[path]
            self.say(f'unreadable image {len(known)} skipped: {path!a}: {paths[path]!a}')
        total = len(self.files[split])
        if len(known) > max(1, 0.01 * total):
            raise ValueError(f'{len(known)} of {total} images cannot be read, over 1 %; replace or '
                             f'remove them')


# ---------------------------------------------------------------- folders

def list_images(root, say):
    """(names relative to root, sorted; how many other files there are). Links are followed.

    Folders that cannot be listed are said.
    """
    names = []
    others = 0
    for folder, folders, files in os.walk(root, onerror=say, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith('.')]
        for name in files:
            if name.startswith('.') or not name.lower().endswith(EXTENSIONS):
                others += 1
            else:
                path = os.path.join(folder, name)
                names.append(os.path.relpath(path, root))
    return sorted(names), others


def find_splits(folders):
    """(training folder, scored folder) among the first folders of a tree.

    The whole tree is '', and None says that no folder is scored.

    Folders that look like splits under other names are refused: as classes they would give a score.
    """
    split = re.compile('(train|trn|val|valid|validation|test|tst|eval|dev|holdout)(ing|set)?')

    def alike(text):
        return split.fullmatch(text.lower())

    by_name = {folder.lower(): folder for folder in folders}
    scored = [name for name in ('val', 'valid', 'validation', 'test') if name in by_name]
    if 'train' in by_name and (scored or len(folders) == 1):
        return by_name['train'], by_name[scored[0]] if scored else None
    # a word of the name: seg_train, trainA; one such folder may be a class, train_station
    some = [folder for folder in folders
            if any(map(alike, re.findall('[A-Z]?[a-z]+|[A-Z]+', folder)))]
    if any(map(alike, folders)) or len(some) > 1 or some == list(folders) != []:
        raise ValueError(f'the folders {", ".join(map(ascii, some))} look like splits; rename '
                         f'them to train and val, or to names of classes')
    return '', None


def first_folder(name):
    """The first folder of a relative name, '' without one. NFC: one class has one spelling."""
    folder, slash, _ = name.partition(os.sep)
    return unicodedata.normalize('NFC', folder) if slash else ''


def load_folder(root, say=print):
    """The Images of a tree of files."""
    found, others = list_images(root, say)
    if not found:
        raise FileNotFoundError(f'no images below {str(root)!a}; looked for {" ".join(EXTENSIONS)}')
    folders = {name.partition(os.sep)[0] for name in found if os.sep in name}
    train, test = find_splits(sorted(folders))

    def below(folder):
        """Names within a split."""
        prefix = os.path.join(folder, '')
        return [name.removeprefix(prefix) for name in found if name.startswith(prefix)]

    names = dict(train=below(train), test=below(test) if test else [])
    files = {}
    for split, folder in (('train', train), ('test', test)):
        files[split] = [os.path.join(root, folder, name) for name in names[split]]
    classes = sorted({first_folder(name) for name in names['train']} - {''})
    classes = classes if len(classes) > 1 else []
    index = {name: i for i, name in enumerate(classes)}
    labels = {}
    for split in names:
        numbers = [index.get(first_folder(name), -1) for name in names[split]]
        labels[split] = torch.tensor(numbers, dtype=torch.long)
    if classes and not test:
        # a stratified tenth is scored; the network is pretrained on it too, without its labels
        count = int((labels['train'] >= 0).sum())
        held = labelled(labels['train'], math.ceil(count / 10))
        files['test'] = [files['train'][i] for i in held]
        labels['test'] = labels['train'][held]
        labels['train'] = labels['train'].index_fill(0, held, -1)

    say(f'{str(root)!a}: {len(files["train"]):,} training images in {len(classes)} classes, '
        f'{len(files["test"]):,} to score')
    outside = len(found) - len(names['train']) - len(names['test'])
    unlabelled = int((labels['test'] < 0).sum()) if classes else 0
    for count, what in ((others, 'other files are left out'),
                        (outside, 'images beside the splits are left out'),
                        (unlabelled, 'images are not scored: no training image has their class')):
        if count:
            say(f'  {count:,} {what}')
    return in_memory_if_small(Images('folder', classes, labels, None, files, root, say))


def in_memory_if_small(data):
    """The same Images in memory, if all have one size of at most 64 px and there is room."""
    total = sum(map(len, data.files.values()))
    shape = None
    pixels = {}
    kept = {}
    for split, files in data.files.items():
        reader = Reader(files, read_pixels)
        decoded = {}
        for i in tqdm(range(len(files)), f'decoding, {split}', leave=False, disable=None):
            image, _, unreadable = reader[i,]
            data.report(split, unreadable)
            shape = shape or image.shape
            large = max(shape) > SMALL or total * image.numel() > MEMORY_LIMIT
            if large or image.shape != shape:
                return data
            if not unreadable:
                decoded[i] = image
        kept[split] = list(decoded)
        if decoded:
            pixels[split] = torch.stack(list(decoded.values()))
    for split, ids in kept.items():
        data.labels[split] = data.labels[split][ids]
        data.files[split] = [data.files[split][i] for i in ids]
    data.hold(pixels)
    return data


# ---------------------------------------------------------------- loading

def load(name, root='data', say=print):
    """A data set by name. torchvision's are fetched into `root` if they are not there."""
    if name == 'folder':
        return load_folder(root, say)
    if name == 'shapes':
        train, train_labels = render_shapes(12_000, seed=0)
        test, test_labels = render_shapes(2_400, seed=1)
        classes = SHAPES
    elif name in TORCHVISION:
        train, train_labels, classes = from_torchvision(name, root, train=True)
        test, test_labels, _ = from_torchvision(name, root, train=False)
    else:
        raise ValueError(f"data set '{name}' is not one of {', '.join(DATASETS)}")
    labels = dict(train=train_labels, test=test_labels)
    return Images(name, classes, labels, dict(train=train, test=test), say=say)


def from_torchvision(name, root, train):
    """(images uint8 (n c h w), labels (n), classes)"""
    try:
        part = TORCHVISION[name](root, train, download=True)
    except RuntimeError as error:                              # of a download that failed
        raise OSError(f'{name} is not in {str(root)!a} and cannot be fetched: {error}') from None
    images = torch.as_tensor(part.data)
    pattern = 'n h w -> n 1 h w' if images.ndim == 3 else 'n h w c -> n c h w'
    images = rearrange(images, pattern).contiguous()
    return images, torch.as_tensor(part.targets).long(), part.classes


def self_check():
    # labels are index % 12: evenly spaced, a third of the images holds 4 of the 12 classes
    labels = torch.arange(600) % 12
    spaced = labels[::3].unique()
    counts = labels[labelled(labels, limit=200)].bincount()
    print(f'200 of 600 images: {len(spaced)} classes if evenly spaced, {len(counts)} if stratified')
    assert len(spaced) == 4 and set(counts.tolist()) == {16, 17}

    later = batch_keys(600, 128, seed=0, start_step=5)
    assert next(later) == next(itertools.islice(batch_keys(600, 128, seed=0), 5, None))
    print('step 5 is found again')
    print('data.py: all claims hold')


if __name__ == '__main__':
    self_check()
