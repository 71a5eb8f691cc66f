"""Images and their augmented views.

A view is a random crop, colour changes, blur and solarization, each drawn per image. All of it is batched: the
parameters of b images are drawn at once and applied by a few tensor operations on the device of the images, so
that the views do not eat what a compressed step saves. Crop, resize and flip are two small matrices per image,
    view = rows image cols^T,         rows (b s h), cols (b s w): antialiased filter weights (as PIL has them)
brightness, contrast and saturation are one blend with per-image coefficients, blur is two matrices again. In between,
images are planes (c b s s), channels first, so that red of the whole batch is one piece of memory.

Recipes: MoCo-v3 (= BYOL), SimCLR, DINO (multi-crop), each with a variant for small images without blur.
Data sets: fashion_mnist cifar10 cifar100 stl10 (torchvision), folder (any tree of images), and shapes, which
this file renders. Small images stay in memory as one uint8 tensor; a folder's are decoded in DataLoader workers.

Shapes: b batch, c channels, h w image, s side of the view. Images are uint8, views float32 in [0, 1], b c h w.

    data = load('shapes')
    views = make_views(data.images[:128], recipe('moco', small=True), [32, 32], generator)
"""
import hashlib
import itertools
import math
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def keyed_generator(*key, device='cpu'):
    """A generator seeded by a key such as (seed, rank, step): the draws of a step do not depend on the past, so
    a resumed run and a repeated gradient probe see the same ones. Hashed, since a CPU generator reads 32 bits."""
    digest = hashlib.blake2b(repr(key).encode(), digest_size=4).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest, 'little'))


def uniform(shape, low, high, generator, device):
    return torch.empty(shape, device=generator.device).uniform_(low, high, generator=generator).to(device)


# ---------------------------------------------------------------- recipes

@dataclass(frozen=True)
class View:
    """One view's distribution. jitter: brightness, contrast, saturation, hue strengths."""
    scale: tuple = (0.08, 1.0)            # of the image's area
    interpolation: str = 'bilinear'
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0                   # sigma uniform in 0.1 to 2 pixels
    solarize_p: float = 0.0               # threshold 128 of 255
    local: bool = False                   # DINO's small crops


def recipe(method, small=False, local_crops=8):
    """The views of a method: list of View. small: for images under 64 px, no blur and larger crops (ours)."""
    if method == 'moco':  # MoCo-v3 main_moco.py, BYOL: asymmetric blur and solarization
        views = [View(blur_p=1.0), View(blur_p=0.1, solarize_p=0.2)]
    elif method == 'simclr':  # SimCLR data_util.py, strength 1
        views = [View(interpolation='bicubic', jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.5)] * 2
    elif method == 'dino':  # DINO main_dino.py; its README: global scale 0.14 without local crops
        glob = View(scale=(0.4 if local_crops else 0.14, 1.0), interpolation='bicubic')
        views = [replace(glob, blur_p=1.0), replace(glob, blur_p=0.1, solarize_p=0.2)]
        views += [replace(glob, scale=(0.05, 0.4), blur_p=0.5, local=True)] * local_crops
    else:
        raise ValueError(f"recipe '{method}' is not one of moco, simclr, dino")
    if small:
        larger = {0.08: 0.2, 0.14: 0.2, 0.05: 0.15}  # 8 % of 32 px is a square of 9 pixels
        views = [replace(v, blur_p=0.0, scale=(larger.get(v.scale[0], v.scale[0]), v.scale[1])) for v in views]
    return views


# ---------------------------------------------------------------- crop, resize, flip

def crop_boxes(b, h, w, scale, generator, device, ratio=(3 / 4, 4 / 3)):
    """RandomResizedCrop's boxes: (top, left, height, width), each (b) float with whole numbers.

    As torchvision: ten tries of area and log-uniform aspect ratio, the first that fits, else a central crop.
    """
    area = h * w * uniform((b, 10), *scale, generator, device)
    aspect = uniform((b, 10), math.log(ratio[0]), math.log(ratio[1]), generator, device).exp()
    place = uniform((b, 2), 0, 1, generator, device)
    widths, heights = (area * aspect).sqrt().round(), (area / aspect).sqrt().round()
    fits = (widths >= 1) & (widths <= w) & (heights >= 1) & (heights <= h)
    first = fits.float().argmax(dim=1, keepdim=True)
    found = fits.any(dim=1)
    central_w, central_h = min(w, round(h * ratio[1])), min(h, round(w / ratio[0]))
    width = torch.where(found, widths.gather(1, first)[:, 0], central_w)
    height = torch.where(found, heights.gather(1, first)[:, 0], central_h)
    top, left = (place[:, 0] * (h - height + 1)).floor(), (place[:, 1] * (w - width + 1)).floor()
    top = torch.where(found, top, (h - central_h) // 2)
    left = torch.where(found, left, (w - central_w) // 2)
    return top, left, height, width


def filter_matrix(start, length, size_in, size_out, interpolation, flip=None):
    """(b size_out size_in): resizes the interval [start, start + length) of an axis, antialiased as PIL does.

    flip (b) bool mirrors the result.
    """
    step = (length / size_out)[:, None]                                        # b 1, input pixels per output
    reach = step.clamp(min=1)                                                  # of the filter, in input pixels
    index = torch.arange(size_out, device=start.device) + 0.5
    if flip is not None:
        index = torch.where(flip[:, None], size_out - index, index)
    centers = (start[:, None] + index * step) / reach                          # b out
    pixels = torch.arange(size_in, device=start.device) + 0.5
    inside = (pixels > start[:, None]) & (pixels < (start + length)[:, None])
    pixels = torch.where(inside, pixels / reach, math.inf)                     # b in, those outside out of reach
    x = (pixels[:, None] - centers[:, :, None]).abs_()                         # b out in
    if interpolation == 'bilinear':
        weights = x.sub_(1).clamp_(max=0)                                      # -(1 - x); the sign leaves with the sum
    else:  # bicubic with a = -0.5, times -2: t (t - 1)^2, and where t < 0 less 2 t^2 (2 t + 1); t = min(x, 2) - 1
        t = x.clamp_(max=2).sub_(1)
        near, rest = t.clamp(max=0), t - 1
        weights = t.mul_(rest).mul_(rest).sub_(torch.add(near, 0.5, out=rest).mul_(near).mul_(near), alpha=4)
    return weights.div_(weights.sum(dim=2, keepdim=True))


def separable(images, rows, cols, out=None):
    """rows image cols^T for every image and channel: (b c h w), (b s h), (b t w) -> planes (c b s t), in `out` if given."""
    b, c, h, w = images.shape
    lines = torch.bmm(images.reshape(b, c * h, w), cols.transpose(1, 2)).view(b, c, h, cols.shape[1])
    out = lines.new_empty(c, b, rows.shape[1], cols.shape[1]) if out is None else out
    for i in range(c):
        torch.bmm(rows, lines[:, i], out=out[i])
    return out


def crop_matrices(b, h, w, view, side, generator, device):
    """Random resized crops, flipped with probability 1/2, and [0, 255] -> [0, 1]: rows (b side h), cols (b side w)."""
    top, left, height, width = crop_boxes(b, h, w, view.scale, generator, device)
    flip = uniform(b, 0, 1, generator, device) < 0.5
    return (filter_matrix(top, height, h, side, view.interpolation).div_(255),
            filter_matrix(left, width, w, side, view.interpolation, flip))


def random_crop(images, matrices, out=None):
    """By `crop_matrices`: uint8 (b c h w) -> planes (c b s s) in [0, 1]."""
    return separable(images.float(), *matrices, out).clamp_(0, 1)               # bicubic overshoots, bilinear rounds


def resize(images, side):
    """Whole images, antialiased bicubic: uint8 or float (b c h w) -> float32 in [0, 1] (b c side side)."""
    images = images.float() / 255 if images.dtype == torch.uint8 else images
    if images.shape[2:] == (side, side):
        return images
    return F.interpolate(images, (side, side), mode='bicubic', antialias=True).clamp(0, 1)


# ---------------------------------------------------------------- colour

def luminance(planes):
    """(c b h w) -> a new (b h w)."""
    if len(planes) == 1:
        return planes[0].clone()
    r, g, b = planes
    return (0.299 * r).add_(g, alpha=0.587).add_(b, alpha=0.114)


def turn_hue(planes, turns):
    """Turns the hue of RGB planes (3 b h w), in place, by turns (b 1 1) of the colour circle; exact in HSV. Grey
    planes (1 b h w) have none."""
    if len(planes) == 1:
        return
    r, g, b = planes
    value, low = torch.maximum(torch.maximum(r, g), b), torch.minimum(torch.minimum(r, g), b)
    chroma = (value - low).clamp_(min=1e-8)                                     # grey: nothing to divide by
    is_r, is_g = (torch.eq(value, channel, out=torch.empty_like(value)) for channel in (r, g))  # 0 or 1
    hue = r - g
    hue.lerp_(torch.sub(b, r, out=r), is_g).lerp_(torch.sub(g, b, out=g), is_r).div_(chroma)  # r and g are not needed again
    hue.add_(is_g.sub_(2).mul_(is_r.sub_(1)), alpha=2)                          # + 0, 2 or 4 sextants
    hue.div_(6).add_(1 + turns).frac_().mul_(6)
    for plane, sextant in zip(planes, (3, 2, 4)):
        torch.sub(hue, sextant, out=plane)
    way = planes.abs_().clamp_(1, 2)                                            # 1 to 2: low to value (r), value to low (g, b)
    torch.addcmul(low.sub_(chroma), chroma, way[0], out=r)
    torch.addcmul(value.add_(chroma), chroma, way[1:], value=-1, out=planes[1:])
    planes.clamp_(0, 1)                                                         # rounding


def draw_colors(b, view, generator, device):
    """What `recolor` does to b images, each (... b 1 1): weights of three blends in a row, 1 where a blend is contrast,
    1 where it is saturation (else it is brightness), turns of the hue, 1 where all colour goes."""
    applied = uniform(b, 0, 1, generator, device) < view.jitter_p
    factors = torch.stack([uniform(b, max(0, 1 - s), 1 + s, generator, device) for s in view.jitter[:3]])
    turns = uniform(b, -view.jitter[3], view.jitter[3], generator, device) * applied
    order = uniform((3, b), 0, 1, generator, device).argsort(dim=0)             # 0 brightness 1 contrast 2 saturation
    weights = (1 - factors.gather(0, order)) * applied
    gray = uniform(b, 0, 1, generator, device) < view.gray_p
    return [drawn.float()[..., None, None] for drawn in (weights, order == 1, order == 2, turns, gray)]


def recolor(planes, hue_place, weights, contrast, saturation, turns, gray):
    """Colour jitter and grayscale, in place, of planes (c b s s) in [0, 1], by the draws of `draw_colors`.

    Jitter is brightness, contrast, saturation and hue in random order. The first three are blends,
    f x + (1 - f) reference, with reference 0, the mean luminance and the luminance of the pixel: one operation with
    per-image coefficients. Hue comes after hue_place of them, 0 to 3, for all images of the call. Grey images (c = 1)
    have no saturation, hue and grayscale: these do nothing.
    """
    for place, (weight, is_contrast, is_saturation) in enumerate(zip(weights, contrast, saturation)):
        if place == hue_place:
            turn_hue(planes, turns)
        light = luminance(planes)
        mean = light.mean(dim=(1, 2), keepdim=True)
        planes.lerp_(light.mul_(is_saturation).add_(is_contrast * mean), weight).clamp_(0, 1)
    if hue_place == 3:
        turn_hue(planes, turns)
    if len(planes) == 3:
        planes.lerp_(luminance(planes), gray)


def blur_matrix(sigma, size):
    """(b size size): Gaussian blur of an axis with sigma (b) pixels; weights renormalized at the border."""
    distance = torch.arange(size, device=sigma.device)
    distance = (distance[:, None] - distance).float()
    weights = torch.exp(-0.5 * (distance / sigma[:, None, None]) ** 2)
    return weights / weights.sum(dim=2, keepdim=True)


def finish(planes, view, generator):
    """Blur and solarization, the last steps, in place, of planes (c b s s)."""
    _, b, side, _ = planes.shape

    def chosen(probability):
        return uniform(b, 0, 1, generator, planes.device)[:, None, None] < probability

    if view.blur_p:
        matrix = blur_matrix(uniform(b, 0.1, 2.0, generator, planes.device), side)
        blurred = separable(planes.transpose(0, 1), matrix, matrix)
        planes.lerp_(blurred, chosen(view.blur_p).float()).clamp_(0, 1)         # rounding
    if view.solarize_p:
        threshold = torch.where(chosen(view.solarize_p), 128 / 255, 2.0)        # no pixel is as bright as 2
        for plane in planes:
            bright = torch.ge(plane, threshold, out=torch.empty_like(plane))
            plane.lerp_(1 - plane, bright)


def normalize(images, mean, std):
    """(images - mean) / std by channel."""
    out = torch.empty_like(images, memory_format=torch.contiguous_format)
    for i in range(images.shape[1]):
        torch.sub(images[:, i], mean[i], out=out[:, i]).div_(std[i])
    return out


def make_views(batch, views, sides, generator):
    """The augmented views, list of float32 (b c s s) in [0, 1] (in memory c b s s), of a batch from `batches`: uint8
    images (b c h w), or a folder's crops, one uint8 (b c s' s') per view, s' by the kind of view. sides: the side of each view.

    Neighbouring views that differ in blur and solarization alone are one batch until then: fewer, larger operations.
    It is dealt out at random over the four places that hue can have in the order of the colour changes, a quarter each
    (as evenly as can be), so that a place is a slice. On a CPU, parts of about 2^18 pixels stay in its cache.
    """
    given = not torch.is_tensor(batch)                                          # crops
    images = batch[0] if given else batch
    b, c, device = len(images), images.shape[1], images.device
    kinds = [(replace(view, blur_p=0.0, solarize_p=0.0), side) for view, side in zip(views, sides)]

    def slices(n, pieces, side):
        """n views in equal pieces, and these in parts of at most 2^18 pixels: [(piece, slice)]."""
        parts = math.ceil(n / pieces * side ** 2 / 2 ** 18) if device.type == 'cpu' else 1
        edges = [n * i // (pieces * parts) for i in range(pieces * parts + 1)]
        return [(i // parts, slice(*edges[i:i + 2])) for i in range(pieces * parts)]

    made = []
    for (kind, side), members in itertools.groupby(range(len(views)), key=kinds.__getitem__):
        members = list(members)
        n = b * len(members)
        if given:
            images = torch.cat([batch[i] for i in members])
        else:
            matrices = crop_matrices(n, *images.shape[2:], kind, side, generator, device)
        colors, dealt = draw_colors(n, kind, generator, device), uniform(n, 0, 1, generator, device).argsort()
        done = torch.empty(c, n, side, side, device=device)
        for hue_place, part in slices(n, 4, side):
            some, planes = images.index_select(0, dealt[part] % len(images)), done[:, part]
            if given:
                planes.copy_(rearrange(resize(some, side), 'b c h w -> c b h w'))
            else:
                random_crop(some, [matrix[part] for matrix in matrices], out=planes)
            recolor(planes, hue_place, *(drawn[..., part, :, :] for drawn in colors))
        for i, places in zip(members, dealt.argsort().split(b)):
            planes = torch.empty_like(done[:, :b])
            for plane, of_all in zip(planes, done):
                torch.index_select(of_all, 0, places, out=plane)
            for _, part in slices(b, 1, side):
                finish(planes[:, part], views[i], generator)
            made.append(rearrange(planes, 'c b h w -> b c h w'))
    return made


# ---------------------------------------------------------------- data sets

SHAPES = ('disk', 'ring', 'square', 'frame', 'triangle', 'plus', 'star', 'crescent', 'bar', 'half disk', 'two dots',
          'corner')


def glyph_distance(kind, x, y):
    """Distance of points to the outline of a glyph of radius about 1, negative inside."""
    r, square = torch.hypot(x, y), torch.maximum(x.abs(), y.abs())
    if kind == 'disk':
        return r - 0.9
    if kind == 'ring':
        return (r - 0.75).abs() - 0.22
    if kind == 'square':
        return square - 0.8
    if kind == 'frame':
        return (square - 0.7).abs() - 0.2
    if kind == 'triangle':
        return torch.maximum(x.abs() * 0.866 + y * 0.5, -y) - 0.5
    if kind == 'plus':
        return torch.maximum(square - 1.0, torch.minimum(x.abs(), y.abs()) - 0.28)
    if kind == 'star':
        angle = torch.remainder(torch.atan2(x, y), 2 * math.pi / 5) - math.pi / 5
        return r * (angle.abs() * 1.6).cos().clamp(min=0.2) - 0.62 + 0.5 * (r - 0.62) * angle.abs()
    if kind == 'crescent':
        return torch.maximum(r - 1.0, 0.85 - torch.hypot(x - 0.5, y))
    if kind == 'bar':
        return torch.maximum(x.abs() - 1.0, y.abs() - 0.28)
    if kind == 'half disk':
        return torch.maximum(r - 1.0, -x)
    if kind == 'two dots':
        return torch.hypot(x.abs() - 0.62, y) - 0.42
    if kind == 'corner':
        return torch.maximum(square - 0.85, torch.minimum(x, y) + 0.25)


def render_shapes(count, seed, side=32):
    """Images (count 3 side side) uint8 and labels: wallpapers, each of one glyph, which is its class.

    The class survives crops (the glyph repeats) and flips. Every glyph of an image has a colour of its own, so
    colour tells neither the class nor, after a crop, the image: what two views share is the form. Turn, size, place,
    brightness and noise are random. Deterministic in (count, seed, side).
    """
    generator = keyed_generator('shapes', seed)

    def draw(low, high, *shape):
        return uniform((count, *shape), low, high, generator, 'cpu')

    labels = torch.arange(count) % len(SHAPES)
    axis = torch.arange(side) - (side - 1) / 2
    turn, cell = draw(0, 2 * math.pi, 1, 1), draw(0.26, 0.42, 1, 1) * side
    shift = draw(0, 1, 2, 1, 1)
    x = (turn.cos() * axis + turn.sin() * axis[:, None]) / cell + shift[:, 0]   # in cells, n h w
    y = (-turn.sin() * axis + turn.cos() * axis[:, None]) / cell + shift[:, 1]
    u, v = x - x.floor() - 0.5, y - y.floor() - 0.5                             # within the cell
    radius, spin = draw(0.32, 0.44, 1, 1), draw(0, 2 * math.pi, 1, 1)
    u, v = (spin.cos() * u + spin.sin() * v) / radius, (-spin.sin() * u + spin.cos() * v) / radius
    distance = torch.empty(count, side, side)
    for kind, name in enumerate(SHAPES):
        distance[kind::len(SHAPES)] = glyph_distance(name, u[kind::len(SHAPES)], v[kind::len(SHAPES)])
    cover = (0.5 - distance * radius * cell).clamp(0, 1)[:, None]               # one pixel of antialiasing

    cells = (x.floor() % 6 * 6 + y.floor() % 6).long()                          # 36 colours in turn
    colours = draw(0, 1, 36, 3) * draw(0.3, 0.6, 1, 1)
    ink = colours.gather(1, repeat(cells, 'n h w -> n (h w) c', c=3))
    ink = rearrange(ink, 'n (h w) c -> n c h w', h=side)
    paper = draw(0.7, 0.95, 1, 1, 1)
    images = paper + (ink - paper) * cover + 0.04 * torch.randn(count, 3, side, side, generator=generator)
    return (images.clamp(0, 1) * 255).round().to(torch.uint8), labels


@dataclass
class MemoryImages:
    """Small images as uint8 tensors (n c h w); label -1: unlabelled."""
    images: torch.Tensor
    labels: torch.Tensor
    test_images: torch.Tensor
    test_labels: torch.Tensor
    classes: tuple
    mean: tuple = None
    std: tuple = None

    def __post_init__(self):
        if self.mean is None:
            sample = self.images[:10_000].float() / 255
            self.mean = tuple(sample.mean(dim=(0, 2, 3)).tolist())
            self.std = tuple(sample.std(dim=(0, 2, 3)).tolist())

    def __len__(self):
        return len(self.images)

    @property
    def channels(self):
        return self.images.shape[1]

    def batches(self, keys, views, sides, seed, device, workers=0):
        """Batches for `make_views`: one for each list of (epoch, index) pairs that `keys` yields."""
        images = self.images.to(device)
        for batch in keys:
            yield images[torch.tensor([index for _, index in batch], device=device)]

    def labelled_ids(self, split):
        return torch.nonzero((self.labels if split == 'train' else self.test_labels) >= 0)[:, 0]

    def labelled(self, split, limit, side, workers=0):
        """Batches of (float images (b c side side) in [0, 1], labels) of the labelled train or test images."""
        images, labels = (self.images, self.labels) if split == 'train' else (self.test_images, self.test_labels)
        for part in spread(self.labelled_ids(split), limit).split(500):
            yield resize(images[part], side), labels[part]


def spread(indices, limit):
    """At most `limit` of the indices, evenly spaced: every class of a sorted folder stays in."""
    if not limit or len(indices) <= limit:
        return indices
    return indices[torch.linspace(0, len(indices) - 1, limit).round().long()]


EXTENSIONS = ('.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff', '.ppm', '.gif')


PIL_FILTER = dict(bilinear=2, bicubic=3)  # PIL.Image.Resampling


def to_tensor(image):
    """RGB PIL image -> uint8 (3 h w)."""
    from torchvision.transforms.functional import pil_to_tensor
    return pil_to_tensor(image)


def pil_crops(image, key, views, sides, seed):
    """The crops of an opened image, list of uint8 (3 s s); the same draws whatever the number of workers."""
    generator = keyed_generator(seed, *key)
    width, height = image.size
    crops = []
    for view, side in zip(views, sides):
        top, left, h, w = (int(v) for v in crop_boxes(1, height, width, view.scale, generator, 'cpu'))
        crop = image.crop((left, top, left + w, top + h)).resize((side, side), PIL_FILTER[view.interpolation])
        flip = uniform(1, 0, 1, generator, 'cpu') < 0.5
        crops.append(to_tensor(crop).flip(2) if flip else to_tensor(crop))
    return crops


def pil_center_crop(image, key, side):
    """The field's evaluation view: shorter side to 256/224 of the side (bicubic), central square."""
    shorter = round(side * 256 / 224)
    scale = shorter / min(image.size)
    image = image.resize([max(shorter, round(n * scale)) for n in image.size], PIL_FILTER['bicubic'])
    left, top = (image.width - side) // 2, (image.height - side) // 2
    return [to_tensor(image.crop((left, top, left + side, top + side)))]


class Decoder(torch.utils.data.Dataset):
    """Item (epoch, index) -> (list of uint8 images, label, unreadable paths met); `views_of` makes the images."""

    def __init__(self, paths, labels, views_of):
        self.paths, self.labels, self.views_of = paths, labels, views_of

    def __getitem__(self, key):
        from PIL import Image
        epoch, index = key
        unreadable = []
        for attempt in range(100):
            i = (index + attempt) % len(self.paths)
            try:
                with Image.open(self.paths[i]) as image:
                    if image.mode.startswith('I'):  # 16 bits a pixel, which convert() would cut off at 255
                        image = image.convert('I').point(lambda value: value * (1 / 257)).convert('L')
                    label = torch.tensor(-1) if unreadable else self.labels[i]  # a replacement has no label
                    return self.views_of(image.convert('RGB'), (epoch, i)), label, unreadable
            except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's for damaged files
                unreadable.append(f'{self.paths[i]}: {error}')
        raise ValueError(f'100 images in a row cannot be read, the last: {unreadable[-1]}')

    @staticmethod
    def collate(items):
        views, labels, unreadable = zip(*items)
        return [torch.stack(view) for view in zip(*views)], torch.stack(labels), sum(unreadable, [])


class FolderImages:
    """Any tree of images. ROOT/train and ROOT/val (valid, validation, test) if they are there; otherwise all of
    ROOT (or ROOT/train) pretrains and every tenth image is held out of the nearest-neighbour bank to test on.

    Labels are the first-level folders, if there are at least two. Unreadable files are named, counted and
    replaced by the next one; over 1 % of them stop the run.
    """
    channels, mean, std = 3, IMAGENET_MEAN, IMAGENET_STD

    def __init__(self, root):
        root = Path(root)
        test_root = next((root / name for name in ('val', 'valid', 'validation', 'test') if (root / name).is_dir()), None)
        train_root = root / 'train' if (root / 'train').is_dir() else root
        split = test_root is not None and train_root != root
        self.paths = self.images_below(train_root)
        folders = {path.relative_to(train_root).parts[0] for path in self.paths if path.parent != train_root}
        self.classes = tuple(sorted(folders)) if len(folders) > 1 else ()
        self.labels = self.labels_of(self.paths, train_root)
        everything = torch.arange(len(self.paths))
        if split:
            self.test_paths = self.images_below(test_root)
            self.test_labels = self.labels_of(self.test_paths, test_root)
            self.bank, self.queries = everything, torch.arange(len(self.test_paths))
        else:
            self.test_paths, self.test_labels = self.paths, self.labels
            self.bank, self.queries = everything[everything % 10 > 0], everything[::10]
        self.unreadable = {}  # list of paths -> what was met in it

    @staticmethod
    def images_below(root):
        if not root.is_dir():
            raise FileNotFoundError(f'no folder {root}; set --data-root to a folder of images')
        paths = sorted(path for path in root.rglob('*') if path.suffix.lower() in EXTENSIONS)
        if not paths:
            raise FileNotFoundError(f'no images below {root}; looked for {" ".join(EXTENSIONS)}')
        return paths

    def labels_of(self, paths, root):
        lookup = {name: i for i, name in enumerate(self.classes)}
        return torch.tensor([lookup.get(path.relative_to(root).parts[0], -1) for path in paths])

    def __len__(self):
        return len(self.paths)

    def labelled_ids(self, split):
        ids, labels = (self.bank, self.labels) if split == 'train' else (self.queries, self.test_labels)
        return ids[labels[ids] >= 0]

    def loaded(self, decoder, keys, workers):
        """(images, labels) batches of the decoder; tells about unreadable files."""
        loader = torch.utils.data.DataLoader(decoder, batch_sampler=keys, num_workers=workers,
                                             collate_fn=decoder.collate, pin_memory=torch.cuda.is_available(),
                                             generator=torch.Generator(),  # all draws are keyed; the global one stays
                                             prefetch_factor=4 if workers else None)
        known = self.unreadable.setdefault(id(decoder.paths), [])
        for images, labels, unreadable in loader:
            for line in dict.fromkeys(unreadable):
                if line not in known:
                    known.append(line)
                    print(f'unreadable image {len(known)} skipped: {line}', flush=True)
            if len(known) > 0.01 * len(decoder.paths):
                raise ValueError(f'{len(known)} of {len(decoder.paths)} images cannot be read, over 1 %; remove or '
                                 f'replace them, the last is {known[-1]}')
            yield images, labels

    def batches(self, keys, views, sides, seed, device, workers=0):
        """Batches for `make_views`: one for each list of (epoch, index) pairs that `keys` yields."""
        decoder = Decoder(self.paths, self.labels, partial(pil_crops, views=views, sides=sides, seed=seed))
        for crops, _ in self.loaded(decoder, keys, workers):
            yield [crop.to(device, non_blocking=True) for crop in crops]

    def labelled(self, split, limit, side, workers=0):
        """Batches of (float images (b c side side) in [0, 1], labels) of the labelled train or test images."""
        paths, labels = (self.paths, self.labels) if split == 'train' else (self.test_paths, self.test_labels)
        decoder = Decoder(paths, labels, partial(pil_center_crop, side=side))
        keys = [[(0, i) for i in part.tolist()] for part in spread(self.labelled_ids(split), limit).split(250)]
        for (images,), labels in self.loaded(decoder, keys, workers):
            yield images[labels >= 0].float() / 255, labels[labels >= 0]


def batch_keys(n, batch_size, seed, start_step=0, rank=0, world=1):
    """Endless batches of (epoch, index) from a step on; batch_size over all ranks, the last partial one dropped.

    The order of an epoch depends on (seed, epoch) alone, so a run resumes at its place in the data.
    """
    steps, share = n // batch_size, batch_size // world
    if steps < 1:
        raise ValueError(f'batch size {batch_size} is larger than the {n} images; lower --batch-size')

    @lru_cache(maxsize=1)
    def order(epoch):
        return torch.randperm(n, generator=keyed_generator(seed, 'order', epoch)).tolist()

    def batch(step):
        epoch, place = divmod(step, steps)
        first = place * batch_size + rank * share
        return [(epoch, index) for index in order(epoch)[first:first + share]]

    return map(batch, itertools.count(start_step))


DATASETS = ('shapes', 'fashion_mnist', 'cifar10', 'cifar100', 'stl10', 'folder')


def load(name, root='data', download=False):
    """A data set by name, as MemoryImages or FolderImages. Files are looked for in `root`, and fetched only if
    they are not there and download is allowed."""
    if name == 'shapes':
        return MemoryImages(*render_shapes(12_000, seed=0), *render_shapes(2_400, seed=1), SHAPES)
    if name == 'folder':
        return FolderImages(root)
    from torchvision import datasets  # here: the views and the rendered images need torch and einops alone
    kinds = dict(fashion_mnist=datasets.FashionMNIST, cifar10=datasets.CIFAR10, cifar100=datasets.CIFAR100,
                 stl10=datasets.STL10)
    if name not in kinds:
        raise ValueError(f"data set '{name}' is not one of {', '.join(DATASETS)}")

    def part(train, download=False):
        split = dict(split='train+unlabeled' if train else 'test') if name == 'stl10' else dict(train=train)
        return kinds[name](root, download=download, **split)

    def tensors(dataset):
        images = torch.as_tensor(dataset.data)
        images = images[:, None] if images.ndim == 3 else images
        images = rearrange(images, 'n h w c -> n c h w') if images.shape[-1] == 3 else images
        labels = dataset.labels if name == 'stl10' else dataset.targets
        return images.contiguous(), torch.as_tensor(labels).long()

    try:
        train, test = part(True), part(False)
    except (RuntimeError, AssertionError, ValueError, OSError) as error:  # torchvision: not found, or damaged
        reason = str(error).splitlines()[0] if str(error) else 'a file is damaged'
        if not download:
            raise FileNotFoundError(f'{name} is not in {root} or not whole ({reason}); set --data-root to the folder '
                                    f'that holds it, or add --download to fetch it there') from None
        try:
            train, test = part(True, True), part(False, True)
        except (RuntimeError, OSError) as error:
            raise OSError(f'{name} cannot be fetched ({str(error).splitlines()[0]}); put its files into {root} by hand '
                          f'(torchvision.datasets says where), without --download') from None
    return MemoryImages(*tensors(train), *tensors(test), tuple(test.classes))


if __name__ == '__main__':
    import time
    start = time.perf_counter()
    data = load('shapes')
    print(f'shapes: {len(data)} images of {len(data.classes)} classes rendered in {time.perf_counter() - start:.1f} s')
    images, generator = data.images[:512], keyed_generator('self-check')

    five, twenty = torch.full((512,), 5.0), torch.full((512,), 20.0)
    for side in (12, 48):
        matrix = filter_matrix(five, twenty, 32, side, 'bilinear')
        crop = separable(images / 255, matrix, matrix).transpose(0, 1)
        expected = F.interpolate(images[:, :, 5:25, 5:25] / 255, (side, side), mode='bilinear', antialias=True)
        error = (crop - expected).abs().max()
        print(f'crop 20 x 20 and resize to {side}, as two matrices: {error:.1e} from torch\'s antialiased resize')
        assert error < 1e-5

    for name in ('moco', 'simclr', 'dino'):
        views = recipe(name, small=True, local_crops=2)
        sides = [16 if view.local else 32 for view in views]
        start = time.perf_counter()
        made = make_views(images, views, sides, generator)
        rate = len(images) / (time.perf_counter() - start)
        print(f'{name}: {len(made)} views of each image, {rate:,.0f} images/s')
        assert all(view.isfinite().all() and 0 <= view.min() and view.max() <= 1 for view in made)
    print('data.py: all claims hold')
