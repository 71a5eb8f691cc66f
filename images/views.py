"""Augmented views: the recipes of MoCo-v3 (from BYOL), SimCLR and DINO as batched operations.

"Accelerating Augmentation Invariance Pretraining" (NeurIPS 2024) makes training steps short.
Views that are made image by image would take longer than such a step, so here every operation
treats the whole batch. Its parameters are drawn at once, one value per image, and the operation
is its formula:

    crop, resize, flip    rows image cols^T            rows, cols: antialiased filter weights
    brightness            f image                      f: a random factor for each image
    contrast              f image + (1 - f) mean(luminance)
    saturation            f image + (1 - f) luminance
    hue                   hue + turns                  in HSV
    blur                  G image G^T                  G: Gaussian weights
    solarize              1 - image                    where image >= 128 / 255

Ranges, clamping and the random order of the colour changes are those of torchvision.

A large patch of q pixels shows the encoder no more than its least-squares picture of p x p pixels,
p the base patch size (the lemma of compress.py). Crop, resize and least squares are linear, and
separable: one product of two matrices renders that picture, with (p / q)^2 of the pixels to colour.

    rows_small = blockdiag(S) rows           S = pinv of the p -> q enlargement of an axis

Shapes: b batch, c channels (1 or 3), h w image, s side of the view. Parameters of the colour
operations have the shape b 1 1 1: one value per image, the same for all its pixels.

    kinds = recipe('moco', side=32)
    view1, view2 = make_views(images, kinds)                # b c h w in [0, 1] -> b c 32 32
    kinds = [kind.at(32, patches=(8, 4)) for kind in kinds]
    view1, view2 = make_views(images, kinds)                # b c 16 16, for 4 x 4 patches of 8 px
"""
import hashlib
import math
from dataclasses import dataclass, replace
from functools import cache

import torch
import torch.nn.functional as F


# Photos and foreign weights are normalized by these, unless somebody says otherwise.
IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def keyed_generator(*key, device='cpu'):
    """A random generator seeded by a hash of the key, for example (seed, rank, step).

    The draws of a step then do not depend on earlier steps, so a resumed run draws the same.
    The hash has 4 bytes because a generator on the CPU reads only 32 bits of its seed.
    """
    text = repr(key).encode()
    digest = hashlib.blake2b(text, digest_size=4).digest()
    seed = int.from_bytes(digest, 'little')
    return torch.Generator(device).manual_seed(seed)


def uniform(shape, low, high, generator):
    """Uniform draws on the CPU: every device sees the same, and we wait for none."""
    return low + (high - low) * torch.rand(shape, generator=generator)


def onto(images, *draws):
    """Draws on the device of the images, without waiting for it."""
    return [values.to(images.device, non_blocking=True) for values in draws]


# ---------------------------------------------------------------- recipes

@dataclass(frozen=True)
class Augmentation:
    """The distribution of a view. The defaults are MoCo-v3's, without blur."""
    side: int                             # in pixels, before `patches`
    scale: tuple = (0.08, 1.0)            # area of the crop, as a fraction of the image's
    interpolation: str = 'bilinear'       # or 'bicubic'
    jitter: tuple = (0.4, 0.4, 0.2, 0.1)  # strength of brightness, contrast, saturation, hue
    jitter_p: float = 0.8
    gray_p: float = 0.2
    blur_p: float = 0.0
    solarize_p: float = 0.0
    blur_sigma: tuple = (0.1, 2.0)        # range, in pixels of the view
    patches: tuple = (1, 1)               # (q, p): each q x q patch as its p x p picture

    def __post_init__(self):
        smallest, largest = self.scale
        if not 0 < smallest <= largest <= 1 or min(self.jitter) < 0:
            raise ValueError(f'crops of {self.scale} of the area and jitter of {self.jitter}: an '
                             f'area is above 0 and at most 1, a strength not below 0')

    @property
    def rendered(self):
        """The side of the picture that is made, in pixels."""
        large, small = self.patches
        return self.side // large * small

    def at(self, side, patches=(1, 1)):
        """The same view at another resolution: the blur covers the same part of the image."""
        view = replace(self, side=side, patches=patches)
        zoom = view.rendered / self.rendered
        low, high = self.blur_sigma
        return replace(view, blur_sigma=(low * zoom, high * zoom))


def recipe(method, side, local_crops=0):
    """The Augmentations of a method: 'moco', 'simclr' or 'dino', which alone has local crops.

    Below 64 px the crops are larger and nothing is blurred. This is our choice: 8 % of an image
    of 32 px is 9 x 9 pixels.
    """
    if method == 'moco':  # MoCo-v3 main_moco.py
        view = Augmentation(side)
    elif method == 'simclr':  # SimCLR data_util.py, colour strength 1
        strong = (0.8, 0.8, 0.8, 0.2)
        view = Augmentation(side, interpolation='bicubic', jitter=strong, blur_p=0.5)
    elif method == 'dino':  # DINO main_dino.py; 0.14 is its --help's, for no local crops
        smallest = 0.4 if local_crops else 0.14
        view = Augmentation(side, scale=(smallest, 1.0), interpolation='bicubic')
    else:
        raise ValueError(f"method '{method}' is not one of moco, simclr, dino")
    views = [view, view]
    if method != 'simclr':  # from BYOL: the two views differ
        views = [
            replace(view, blur_p=1.0),
            replace(view, blur_p=0.1, solarize_p=0.2),
        ]
    if method == 'dino':
        local_side = round(side * 96 / 224)
        local = replace(view, side=local_side, scale=(0.05, 0.4), blur_p=0.5)
        views += [local] * local_crops
    if side < 64:
        views = [for_small_images(view) for view in views]
    return views


def for_small_images(view):
    larger = {0.05: 0.15, 0.08: 0.2, 0.14: 0.2, 0.4: 0.4}
    low, high = view.scale
    return replace(view, scale=(larger[low], high), blur_p=0.0)


# ---------------------------------------------------------------- crop, resize, flip

def crop_boxes(b, h, w, scale, generator):
    """The boxes of RandomResizedCrop: top, left, height, width, each (b) whole floats.

    scale: smallest and largest area as fractions of the image, numbers or (b 1). As in torchvision,
    the first of ten random areas and aspect ratios that fits is taken. If none fits, the box is
    central: the whole image, cut to the nearest ratio in range.
    """
    narrow = 3 / 4                                           # width / height
    wide = 4 / 3
    tries = (b, 10)
    area = h * w * uniform(tries, *scale, generator)
    log_aspect = uniform(tries, math.log(narrow), math.log(wide), generator)
    place = uniform((2, b), 0, 1, generator)                 # from top to bottom, left to right

    # both axes at once: of an array (2 ...) the first is the vertical one
    aspect = log_aspect.exp()
    sizes = torch.stack([area / aspect, area * aspect])      # 2 b 10
    sizes = sizes.sqrt().round()
    largest = torch.tensor([h, w])[:, None, None]
    fits = (sizes >= 1) & (sizes <= largest)
    fits = fits.all(dim=0)
    first = fits.float().argmax(dim=1)
    found = fits.any(dim=1)
    size = sizes[:, torch.arange(b), first]                  # 2 b
    central = [min(h, round(w / narrow)), min(w, round(h * wide))]
    size = torch.where(found, size, torch.tensor(central)[:, None])

    # anywhere in the image, both borders included; the central box is in the middle
    room = largest[:, 0] - size
    corner = torch.where(found, place * (room + 1), room / 2)
    return *corner.floor(), *size


def cubic_filter(x):
    """Bicubic weights at x >= 0, a = -0.5 as in PIL: two cubics meet at 1, the second ends at 2."""
    x = x.clamp(max=2)
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, far)


def filter_matrix(start, length, size_in, size_out, interpolation):
    """Weights (b size_out size_in) that resize the part [start, start + length) of an axis.

    start, length: (b) in pixels. The filter is antialiased as in PIL: where the axis shrinks, it
    widens to reach all pixels between two outputs.
    """
    device = start.device
    start = start[:, None]
    length = length[:, None]
    step = length / size_out                                 # input pixels per output pixel
    reach = step.clamp(min=1)                                # distances are in units of these
    centers = torch.arange(size_out, device=device) + 0.5
    centers = (start + step * centers) / reach               # b size_out
    pixels = torch.arange(size_in, device=device) + 0.5
    inside = (pixels > start) & (pixels < start + length)
    pixels = torch.where(inside, pixels / reach, math.inf)   # b size_in; those outside weigh 0
    distance = pixels[:, None, :] - centers[:, :, None]      # b size_out size_in
    x = distance.abs()
    if interpolation == 'bilinear':
        weights = (1 - x).clamp(min=0)
    else:
        weights = cubic_filter(x)
    return weights / weights.sum(dim=2, keepdim=True)


@cache
def shrink_matrix(large, small):
    """S (small large) in float32: the least-squares picture of an axis of a patch."""
    with torch.inference_mode(False):
        pixels = torch.eye(small, dtype=torch.float64)[:, None]
        enlarged = F.interpolate(pixels, large, mode='linear')
        matrix = enlarged[:, 0].T                                             # large small
        return torch.linalg.pinv(matrix).float()


def shrink(weights, patches):
    """blockdiag(S) weights: (b s n) -> (b s' n), patch by patch of the axis."""
    if patches[0] == patches[1]:
        return weights
    matrix = shrink_matrix(*patches).to(weights.device, non_blocking=True)
    by_patch = weights.unflatten(1, (-1, patches[0]))                         # b patches q n
    return (matrix @ by_patch).flatten(1, 2)


def separable(images, rows, cols):
    """rows image cols^T for each image and channel."""
    return torch.einsum('bsh,bchw,btw->bcst', rows, images, cols)


def crop_and_flip(images, view, draws):
    """The drawn boxes of float images, resized to the view's side, half of them mirrored."""
    h, w = images.shape[2:]
    box, flip = onto(images, draws['box'], draws['flip'])
    top, left, height, width = box.unbind(dim=1)
    rows = filter_matrix(top, height, h, view.side, view.interpolation)
    cols = filter_matrix(left, width, w, view.side, view.interpolation)
    cols = torch.where(flip, cols.flip(1), cols)
    rows = shrink(rows, view.patches)
    cols = shrink(cols, view.patches)
    return separable(images, rows, cols)


def to_float(images):
    """uint8 (0 to 255) or float (0 to 1) -> float32 (0 to 1)."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    return images.float()


def resize(images, side):
    """Whole images, antialiased bicubic: uint8 or float in [0, 1] -> float32 (b c side side)."""
    images = to_float(images)
    if images.shape[2:] == (side, side):
        return images
    images = F.interpolate(images, side, mode='bicubic', antialias=True)
    return images.clamp(0, 1)


def normalize(images, mean, std):
    """(images - mean) / std of images in [0, 1], with one number of each for every channel."""
    mean, std = by_channel(tuple(mean), tuple(std), images.device)
    return (images - mean) / std


@cache
def by_channel(mean, std, device):
    """(2 c 1 1), made once: copying numbers to a GPU waits for it."""
    with torch.inference_mode(False):
        return torch.tensor([mean, std], device=device)[:, :, None, None]


# ---------------------------------------------------------------- colour

def luminance(images):
    """b c h w -> b 1 h w, as in PIL (ITU-R BT.601). A grey image is its own luminance."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)
    return 0.299 * red + 0.587 * green + 0.114 * blue


def blend(images, operation, factor):
    """f image + (1 - f) reference. The operation is 0 brightness, 1 contrast or 2 saturation."""
    operation, factor = onto(images, operation, factor)
    light = luminance(images)
    mean = light.mean(dim=(2, 3), keepdim=True)
    reference = torch.where(operation == 1, mean, light)
    reference = torch.where(operation == 0, 0.0, reference)   # brightness: black
    return torch.lerp(reference, images, factor).clamp(0, 1)


def turn_hue(images, turns):
    """Turns the hue by turns of the colour circle. Grey images have no hue."""
    if images.shape[1] == 1:
        return images
    red, green, blue = images.split(1, dim=1)                # b 1 h w each
    low, high = images.aminmax(dim=1, keepdim=True)
    chroma = high - low
    span = chroma.clamp(min=1e-8)                            # grey pixels: do not divide by 0

    # the hue in sextants of the circle: red is at 0, green at 2, blue at 4
    near_green = 2 + (blue - red) / span
    near_blue = 4 + (red - green) / span
    hue = torch.where(high == green, near_green, near_blue)
    hue = torch.where(high == red, (green - blue) / span, hue)
    turns, = onto(images, turns)
    circle = hue / 6 + turns
    hue = 6 * (circle - circle.floor())

    # back to RGB: a channel is full (1) near its own hue and empty (0) opposite to it
    red = (hue - 3).abs() - 1
    green = 2 - (hue - 2).abs()
    blue = 2 - (hue - 4).abs()
    full = torch.cat([red, green, blue], dim=1)
    return low + chroma * full.clamp(0, 1)


def color_jitter(images, operations, factors, hue_place, turns):
    """Brightness, contrast, saturation and hue. Each image has its own order of the four."""
    for place in range(3):
        images = apply_where(hue_place == place, turn_hue, images, turns)
        images = blend(images, operations[:, place], factors[:, place])
    return apply_where(hue_place == 3, turn_hue, images, turns)


def grayscale(images):
    return luminance(images).expand_as(images)


def blur_matrix(sigma, size):
    """Gaussian weights (b size size), sigma (b 1 1) in pixels. They sum to 1 at the border too."""
    pixels = torch.arange(size, device=sigma.device)
    distance = pixels[:, None] - pixels
    x = distance / sigma
    weights = torch.exp(-0.5 * x ** 2)
    return weights / weights.sum(dim=2, keepdim=True)


def blur(images, sigma):
    sigma, = onto(images, sigma)
    matrix = blur_matrix(sigma[:, 0], images.shape[3])
    return separable(images, matrix, matrix)


def solarize(images):
    return torch.where(images >= 128 / 255, 1 - images, images)


def apply_where(chosen, function, images, *parameters):
    """function(images, *parameters) for the chosen images; the others cost nothing."""
    ids = chosen.flatten().nonzero()[:, 0]                   # on the CPU: no wait for a GPU
    if len(ids) == 0:
        return images
    parameters = [values[ids] for values in parameters]
    ids = ids.to(images.device, non_blocking=True)
    changed = function(images[ids], *parameters)
    return images.index_copy(0, ids, changed)


def recolor(images, draws):
    """Jitter, grayscale, blur and solarization, in this order."""
    jitter = [draws[name] for name in ('operations', 'factors', 'hue_place', 'turns')]
    images = apply_where(draws['jitter'], color_jitter, images, *jitter)
    images = apply_where(draws['gray'], grayscale, images)
    images = apply_where(draws['blur'], blur, images, draws['sigma'])
    return apply_where(draws['solarize'], solarize, images)


# ---------------------------------------------------------------- views

PIXELS_AT_ONCE = 2 ** 17  # on a CPU they stay in its cache: 1.9 x faster for 2000 images of 32 px


def draw(b, h, w, view, generator):
    """All random parameters of one view of b images: a dictionary of tensors (b ...).

    They are drawn whether or not the view uses them, and do not depend on its side (sigma is
    scaled by it). So the same seed gives the same crops and colours at every resolution.
    """
    def draws(low=0.0, high=1.0):
        return uniform((b, 1, 1, 1), low, high, generator)

    def factor(strength):
        return draws(max(0, 1 - strength), 1 + strength)

    box = crop_boxes(b, h, w, view.scale, generator)
    flip = uniform((b, 1, 1), 0, 1, generator) < 0.5
    *blends, hue = view.jitter                               # brightness, contrast, saturation
    factors = [factor(strength) for strength in blends]
    factors = torch.stack(factors, dim=1)                    # b 3 1 1 1

    # a random order of four: the first three are shuffled, the hue is put in at a random place
    order = [draws(), draws(), draws()]
    operations = torch.stack(order, dim=1).argsort(dim=1)
    return dict(
        box=torch.stack(box, dim=1),                         # b 4
        flip=flip,
        jitter=draws() < view.jitter_p,
        operations=operations,
        factors=factors.gather(1, operations),
        hue_place=draws(0, 4).floor(),
        turns=draws(-hue, hue),
        gray=draws() < view.gray_p,
        blur=draws() < view.blur_p,
        sigma=draws(*view.blur_sigma),
        solarize=draws() < view.solarize_p,
    )


def make_view(images, view, generator=None, cropped=False):
    """One view of each image: float32 (b c s s) in [0, 1], s = view.rendered.

    cropped: the images are random crops of this side already, and are only recoloured. Least
    squares overshoots [0, 1] at edges, and the encoder of the full picture sees that too: what
    lies outside is taken off before the colours change, and added again afterwards.
    """
    check_images(images)
    b, _, h, w = images.shape
    draws = draw(b, h, w, view, generator)
    on_cpu = images.device.type == 'cpu'
    at_once = max(1, PIXELS_AT_ONCE // view.rendered ** 2) if on_cpu else b
    parts = []
    for start in range(0, b, at_once):
        part = slice(start, start + at_once)
        its_draws = {name: values[part] for name, values in draws.items()}
        pixels = to_float(images[part])
        if not cropped:
            pixels = crop_and_flip(pixels, view, its_draws)
        inside = pixels.clamp(0, 1)
        colored = recolor(inside, its_draws)
        if view.rendered != view.side:
            colored = colored + (pixels - inside)
        parts.append(colored)
    return torch.cat(parts)


def check_images(images):
    """Raises ValueError for what is not a batch of uint8 images, or float images in [0, 1]."""
    if images.ndim != 4 or images.shape[1] not in (1, 3):
        raise ValueError(f'images have shape {tuple(images.shape)}; give (b, c, h, w), c = 1 or 3')
    if images.dtype == torch.uint8:
        return
    low, high = images.aminmax()
    if not (images.is_floating_point() and low >= 0 and high <= 1):  # also raised for NaN
        raise ValueError(f'{images.dtype} images from {low:g} to {high:g}; give uint8, or float '
                         f'in [0, 1], before normalization')


def make_views(images, views, generator=None):
    """One augmented batch for each Augmentation: a list of float32 (b c s s).

    images: uint8 or float in [0, 1], (b c h w). The draws depend on the generator (a CPU one; None:
    torch's own), the batch size and the image size. With the same seed, the same views at other
    sides (`Augmentation.at`) show the same crops and colours. Call it outside of autocast.
    """
    return [make_view(images, view, generator) for view in views]


def self_check():
    images = torch.rand(256, 3, 32, 32)
    kind = Augmentation(32, jitter_p=0, gray_p=0)
    large = make_view(images, kind, keyed_generator(0))
    small = make_view(images, kind.at(32, patches=(8, 4)), keyed_generator(0))
    axis = torch.block_diag(*[shrink_matrix(8, 4)] * 4)                       # 16 32
    error = (small - axis @ large @ axis.T).abs().max()
    print(f'patches of 8 px rendered at 4 x 4: their least-squares picture, to {error:.1e}')
    assert error < 1e-5
    print('views.py: all claims hold')


if __name__ == '__main__':
    self_check()
