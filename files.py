"""Image files: which files of a folder are images, which folders are splits, what the pixels are.

Folders come from other people's disks, so this file handles what turns up in them: links, side
files, splits under many names, 16-bit pixels, damaged files. Nothing is left out without being
counted, and nothing is read that does not say which value is white.

The pixels are those that torchvision's ImageFolder reads: EXIF rotation and transparency are
ignored, and an animation is its first frame. Grey files become RGB, 16 bits a channel become 8.

    left_out = Counter()
    names = list_images('photos', left_out)                    # 'train/cat/1.jpg', ...
    image, reason = read_image('photos/train/cat/1.jpg')       # a PIL image, or None and the reason
    crops = random_crops(image, key, views, seed)              # uint8 (3 s s) for each view
"""
import os
import re
import tempfile
import warnings
from collections import Counter

import torch
from PIL import Image
from torch.utils.data import Dataset
from torchvision.transforms.functional import pil_to_tensor

from views import crop_boxes, keyed_generator, uniform

# Pillow goes by the content of a file and not by its name. On PostScript it starts Ghostscript.
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP', 'DIB', 'TIFF', 'PPM', 'GIF', 'AVIF', 'JPEG2000')
REGISTERED = Image.registered_extensions().items()
EXTENSIONS = tuple(sorted(name for name, kind in REGISTERED if kind in FORMATS))

# Pillow warns of large images; read_image has a limit of its own.
warnings.simplefilter('ignore', Image.DecompressionBombWarning)

# Folders that systems make for themselves, beside those whose name starts with a dot.
SIDE_FOLDERS = ('@eaDir', '#recycle', '$RECYCLE.BIN', '__MACOSX', 'lost+found')

SPLITS = dict(
    train=('train', 'training', 'trainval', 'trn'),
    val=('val', 'valid', 'validation', 'validate', 'dev', 'eval', 'holdout', 'minival'),
    test=('test', 'testing', 'tst'))


# ---------------------------------------------------------------- trees

def list_images(root, left_out, below='', parents=()):
    """The names of the image files below root, relative to it, sorted. Links are followed.

    left_out: a Counter of what is not an image, by reason. below, parents: for the recursion, the
    folder to list and the real paths of the folders above it, which a link must not lead back to.
    """
    folder = os.path.join(root, below)
    real = os.path.realpath(folder)
    if real in parents:
        left_out['link loop'] += 1
        return []
    try:
        entries = list(os.scandir(folder))
    except OSError as error:
        raise OSError(f'the folder {ascii(folder)} cannot be read ({error.strerror}); '
                      f'change its permissions or move it away') from None
    entries.sort(key=lambda entry: entry.name)
    names = []
    for entry in entries:
        name = below + entry.name
        if entry.name.startswith('.') or entry.name in SIDE_FOLDERS:
            left_out['hidden or side file'] += 1
        elif entry.is_symlink() and not os.path.exists(entry.path):
            left_out['broken link'] += 1
        elif entry.is_dir():
            names += list_images(root, left_out, name + '/', (*parents, real))
        elif not name.lower().endswith(EXTENSIONS):
            left_out['other extension'] += 1
        elif entry.is_file():
            names.append(name)
        else:
            left_out['not a regular file'] += 1
    return names


def first_folder(name, base=''):
    """The folder below `base` that holds a file; '' if the file lies directly in `base`."""
    folder, slash, _ = name[len(base):].partition('/')
    return folder if slash else ''


def first_folders(names, base=''):
    """The different first folders of files, sorted."""
    folders = {first_folder(name, base) for name in names}
    return sorted(folders - {''})


def split_of(folder):
    """'train', 'val' or 'test' for names with such a word: 'Training', 'trainset', 'seg_train'."""
    words = re.findall('[a-z]+', re.sub(r'(set|split|images|data)$', '', folder.lower()))
    for split, names in SPLITS.items():
        if not set(names).isdisjoint(words):
            return split
    return None


def find_splits(folders):
    """The folders of the training and of the scored images among the first folders of a tree.

    None where there is no such folder. If some folder is no split, all are classes: a class may be
    called 'train'. With 'val' and 'test' both there, 'val' is scored.
    """
    found = {}
    for folder in folders:
        found.setdefault(split_of(folder), []).append(folder)
    train, *more_train = found.get('train', [None])
    scored, *more_scored = found.get('val', found.get('test', [None]))
    names = ', '.join(ascii(folder) for folder in folders)
    if None not in found and not more_train and not more_scored:
        if folders and not train:
            raise ValueError(f'the folders {names} have no training images beside them; '
                             f'set --data-root to one of them, or rename one to train')
        return train, scored
    # such as trainA and testA
    alike = all(re.match('train|test|val', folder.lower()) for folder in folders)
    if train and scored or alike and len(folders) > 1:
        raise ValueError(f'the folders {names} may be classes or splits; move away what is '
                         f'no split, or rename the classes')
    return None, None


def folder_with_splits(names):
    """The first folder of a tree that holds splits in its turn, or None."""
    below = {}
    for name in names:
        folder, _, rest = name.partition('/')
        if rest:
            below.setdefault(folder, set()).add(first_folder(rest))
    for folder, inner in below.items():
        splits = {split_of(name) for name in inner} - {None}
        # beside other folders, one may be the name of a class, such as train_station
        if len(splits) > 1 or splits and len(below) == 1:
            return folder
    return None


# ---------------------------------------------------------------- pixels

def is_deep(image):
    """True for 16 bits a channel. Of colours Pillow reads the upper 8; only its decoder tells."""
    if image.mode.startswith('I'):
        return True
    return any(';16' in str(tile[3]) for tile in image.tile)


def to_rgb(image):
    """An opened file as RGB, 8 bits a channel. ValueError if it does not say what is white."""
    deep = is_deep(image)
    if image.mode == 'F' or (image.mode == 'I' and image.format == 'TIFF'):
        raise ValueError('the 32-bit pixels do not say which value is white; save 8 or 16 bits')
    if image.mode.startswith('I'):
        # A TIFF may say that it uses 12 bits of 16. convert('L') alone would cut off at 255.
        tags = getattr(image, 'tag_v2', {})
        bits = tags.get(258, (16,))[0]
        scale = 255 / (2 ** bits - 1)
        image = image.convert('I')
        image = image.point(lambda value: value * scale + 0.5)
        image = image.convert('L')
    image = image.convert('RGB')
    if deep and max(high for _, high in image.getextrema()) <= 16:
        raise ValueError('a 16-bit file without a value above 4095 does not say which value is '
                         'white; save 8 bits, or use all 16')
    return image


def read_image(path):
    """(RGB image, None), or (None, reason) for a file that cannot be read.

    Above 2 PIL.Image.MAX_IMAGE_PIXELS, 179 million pixels, a file counts as one that cannot.
    """
    try:
        with Image.open(path, formats=FORMATS) as image:
            return to_rgb(image), None
    except Exception as error:  # Pillow's decoders raise almost anything for a damaged file
        return None, str(error) or type(error).__name__


def image_size(path):
    """(width, height) of an image file in pixels, from its header; None if it cannot be read."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            return image.size
    except Exception:
        return None


def random_crops(image, key, views, seed):
    """A random crop of an RGB image for each View, mirrored half of the time: uint8 (3 s s) each.

    The draws depend on (seed, key) alone, so that any number of workers makes the same crops.
    """
    generator = keyed_generator(seed, *key)
    crops = []
    for view in views:
        box = crop_boxes(1, image.height, image.width, view.scale, generator, 'cpu')
        top, left, height, width = [int(value) for value in box]
        crop = image.crop((left, top, left + width, top + height))
        resample = Image.Resampling[view.interpolation.upper()]
        crop = crop.resize((view.side, view.side), resample)
        crop = pil_to_tensor(crop)
        if uniform(1, 0, 1, generator, 'cpu') < 0.5:
            crop = crop.flip(2)
        crops.append(crop)
    return crops


def center_crop(image, key, side):
    """torchvision's Resize(256/224 side), bicubic, and CenterCrop(side): [uint8 (3 side side)].

    Only the square is resized, to the same pixels but for rounding. Resized whole, an image of
    1 x 20,000 pixels would become one of 256 x 5,120,000.
    """
    shorter = round(side * 256 / 224)
    width = shorter * image.width // min(image.size)
    height = shorter * image.height // min(image.size)
    left = round((width - side) / 2)
    top = round((height - side) / 2)

    # the same square in pixels of the file
    x = image.width / width
    y = image.height / height
    box = (left * x, top * y, (left + side) * x, (top + side) * y)
    crop = image.resize((side, side), Image.Resampling.BICUBIC, box=box)
    return [pil_to_tensor(crop)]


# ---------------------------------------------------------------- items of a DataLoader

class Decoder(Dataset):
    """Item (epoch, index) -> (images that `views_of` makes, label, unreadable files that it met).

    In the place of an unreadable file it takes the next that can be read.
    """

    def __init__(self, root, files, labels, views_of):
        self.root = root
        self.files = files
        self.labels = labels
        self.views_of = views_of

    def __getitem__(self, key):
        epoch, index = key
        unreadable = {}  # file: reason
        for attempt in range(len(self.files)):
            i = (index + attempt) % len(self.files)
            image, reason = read_image(os.path.join(self.root, self.files[i]))
            if image:
                views = self.views_of(image, (epoch, i))
                return views, self.labels[i], unreadable
            unreadable[self.files[i]] = reason
        raise ValueError(f'no image below {ascii(self.root)} can be read; '
                         f'the last is {ascii(self.files[i])}: {ascii(reason)}')

    @staticmethod
    def collate(items):
        views, labels, unreadable = zip(*items)
        views = [torch.stack(view) for view in zip(*views)]
        return views, torch.stack(labels), unreadable


if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as root:
        folder = f'{root}/train/cat'
        os.makedirs(f'{folder}/.thumbnails')
        os.symlink(root, f'{folder}/up')
        grey = Image.new('I;16', (256, 1))
        for value in range(256):
            grey.putpixel((value, 0), 257 * value)
        grey.save(f'{folder}/16bit.png')

        left_out = Counter()
        names = list_images(root, left_out)
        print(f'{names}, left out: {dict(left_out)}')
        assert names == ['train/cat/16bit.png']
        assert left_out == {'hidden or side file': 1, 'link loop': 1}

        image, _ = read_image(f'{folder}/16bit.png')
        print(f'16 bits, 0 to 65,535: read as {min(image.tobytes())} to {max(image.tobytes())}')
        assert image.tobytes()[::3] == bytes(range(256))

    crop, = center_crop(Image.new('RGB', (1, 20_000), 'white'), None, side=224)
    print(f'1 x 20,000 pixels: scored as {tuple(crop.shape)}')
    assert crop.min() == 255
    print('files.py: all claims hold')
