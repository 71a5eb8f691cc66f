"""A data set that is rendered in a few seconds: wallpapers of glyphs, one class for each glyph.

It needs no download, and it is made for augmentation invariance. The class survives every view: the
glyph repeats, so that each crop has some of it, and it stays the same glyph in a mirror. Each glyph
of an image has a colour of its own. Colour therefore tells neither the class nor, after a crop, the
image: what two views share is the form. Turn, size, position, brightness and noise are random.

A glyph is drawn by the distance of each pixel to its outline, negative inside:

    image = paper + (ink - paper) cover,    cover = clip(0.5 - distance in pixels, 0, 1)

Shapes: n images, h w pixels. Images are uint8 (n 3 h w), labels (n).

    images, labels = render_shapes(1_200, seed=0)
"""
import math

import torch
from einops import rearrange, repeat
from torch import hypot, maximum, minimum, remainder

from images.views import keyed_generator

SHAPES = (
    'disk', 'ring', 'square', 'frame',
    'triangle', 'plus', 'star', 'crescent',
    'bar', 'half disk', 'two dots', 'corner')


def glyph_distance(kind, x, y):
    """Distance of the points (x, y) to the outline of a glyph of radius about 1, negative inside.

    The maximum of two distances is the intersection of two forms, the minimum is their union.
    """
    r = hypot(x, y)
    right = x.abs()
    up = y.abs()
    square = maximum(right, up)
    match kind:
        case 'disk':
            return r - 0.9
        case 'ring':
            return (r - 0.75).abs() - 0.22
        case 'square':
            return square - 0.8
        case 'frame':
            return (square - 0.7).abs() - 0.2
        case 'triangle':
            sides = right * 0.866 + y * 0.5
            return maximum(sides, -y) - 0.5
        case 'plus':
            bars = minimum(right, up) - 0.28
            return maximum(square - 1.0, bars)
        case 'star':
            turn = torch.atan2(x, y)
            spike = remainder(turn, 0.4 * math.pi)
            spike = (spike - 0.2 * math.pi).abs()
            edge = (spike * 1.6).cos()
            edge = edge.clamp(min=0.2)
            return r * edge - 0.62 + 0.5 * (r - 0.62) * spike
        case 'crescent':
            bite = hypot(x - 0.5, y)
            return maximum(r - 1.0, 0.85 - bite)
        case 'bar':
            return maximum(right - 1.0, up - 0.28)
        case 'half disk':
            return maximum(r - 1.0, -x)
        case 'two dots':
            return hypot(right - 0.62, y) - 0.42
        case 'corner':
            notch = minimum(x, y) + 0.25
            return maximum(square - 0.85, notch)


def rotate(x, y, angle):
    """(2 n h w): the points (x, y) in turned axes."""
    cos = angle.cos()
    sin = angle.sin()
    along = cos * x + sin * y
    across = -sin * x + cos * y
    return torch.stack([along, across])


def render_shapes(count, seed, side=32):
    """Images (count 3 side side), uint8, and labels (count).

    The classes take turns: label i is i % 12. The same (count, seed, side) gives the same images.
    """
    generator = keyed_generator('shapes', seed)

    def draw(low, high, *shape):
        return torch.empty(count, *shape).uniform_(low, high, generator=generator)

    # the wallpaper: a grid of square cells, turned and shifted
    axis = torch.arange(side) - (side - 1) / 2
    turn = draw(0, 2 * math.pi, 1, 1)
    cell = draw(0.26, 0.42, 1, 1) * side                       # the side of a cell in pixels
    shift = draw(0, 1, 2, 1, 1).transpose(0, 1)
    place = rotate(axis, axis[:, None], turn)                  # 2 n h w
    place = place / cell + shift                               # in cells
    corner = place.floor()

    # the glyph in the middle of each cell, of one radius and one spin for all cells of an image
    radius = draw(0.32, 0.44, 1, 1)
    spin = draw(0, 2 * math.pi, 1, 1)
    x, y = place - corner - 0.5
    x, y = rotate(x, y, spin) / radius
    distance = torch.empty(count, side, side)
    for i, kind in enumerate(SHAPES):
        mine = slice(i, None, len(SHAPES))
        distance[mine] = glyph_distance(kind, x[mine], y[mine])
    cover = (0.5 - distance * radius * cell).clamp(0, 1)       # an edge is one pixel wide

    # 36 colours in turn, so that neighbours differ; ink is darker than paper, so that each shows
    colours = draw(0, 1, 36, 3)
    colours = colours * draw(0.3, 0.6, 1, 1)
    column, row = corner % 6
    which = column * 6 + row
    which = repeat(which.long(), 'n h w -> n (h w) c', c=3)
    ink = colours.gather(1, which)                             # the same colour for a whole cell
    ink = rearrange(ink, 'n (h w) c -> n c h w', h=side)
    paper = draw(0.7, 0.95, 1, 1, 1)
    noise = 0.04 * torch.randn(count, 3, side, side, generator=generator)
    images = paper + (ink - paper) * cover[:, None] + noise
    images = images.clamp(0, 1) * 255
    labels = torch.arange(count) % len(SHAPES)
    return images.round().to(torch.uint8), labels


if __name__ == '__main__':
    images, labels = render_shapes(600, seed=0)
    # colour must not tell the class: class means of the colours differ little beside single images
    colours = images.float().mean(dim=(2, 3))
    chroma = colours - colours.mean(dim=1, keepdim=True)
    by_class = chroma.view(50, 12, 3)                          # the classes take turns
    between = by_class.mean(dim=0).std(dim=0)
    ratio = (between / chroma.std(dim=0)).max()
    print(f'spread of the class means of the colours: {ratio:.2f} of the spread of the images')
    assert ratio < 0.3                                         # by chance: 1 / sqrt(50) = 0.14
    print('shapes.py: all claims hold')
