"""views.py against torchvision, with the random draws in hand; its draws against their laws."""
from dataclasses import replace

import lightly.transforms as lightly
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from conftest import error
from methods import METHODS

import views
from views import View, crop_boxes, draw, keyed_generator, make_views, recipe

PLAIN = View(16, jitter_p=0, gray_p=0)  # crop and flip only


def rand(*shape):
    """Random images, float64."""
    return torch.rand(shape, dtype=torch.float64)


def rand_bytes(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def smooth(b, side):
    """Images without fine detail, float32."""
    return F.interpolate(rand(b, 3, 4, 4).float(), (side, side), mode='bilinear')


def per_image(*values):
    """One value for each image, as the colour operations take it: b 1 1 1."""
    return torch.tensor(values, dtype=torch.float64)[:, None, None, None]


def assert_frequency(chosen, p):
    """The share of n draws lies within 4 standard errors, sqrt(p (1 - p) / n), of p."""
    bound = 4 * (p * (1 - p) / chosen.numel()) ** 0.5
    assert abs(chosen.double().mean().item() - p) < bound


def assert_uniform(values, low, high):
    """Mean and variance, within 4 standard errors: w / sqrt(12 n) and w^2 / sqrt(180 n)."""
    n, w = values.numel(), high - low
    assert low <= values.min() and values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 4 * w / (12 * n) ** 0.5
    assert abs(values.var() - w ** 2 / 12) < 4 * w ** 2 / (180 * n) ** 0.5


# ---- crops

@pytest.mark.parametrize('interpolation', ('bilinear', 'bicubic'))
@pytest.mark.parametrize('side', (8, 20, 48))
def test_crop_and_flip_equals_torchvision(side, interpolation):
    """Boxes at each border of a rectangle, shrunk and enlarged. Measured: 1e-14."""
    images = rand(5, 3, 40, 30)
    boxes = [(0, 0, 40, 30), (3, 2, 20, 21), (5, 0, 35, 30), (0, 17, 9, 13), (32, 10, 8, 8)]
    columns = torch.tensor(boxes, dtype=torch.float64).unbind(dim=1)
    draws = dict(zip(('top', 'left', 'height', 'width'), columns))
    draws['flip'] = torch.tensor([False, True, False, True, False])[:, None, None]
    ours = views.crop_and_flip(images, View(side, interpolation=interpolation), draws)
    mode = T.InterpolationMode(interpolation)
    for i, box in enumerate(boxes):
        theirs = TF.resized_crop(images[i], *box, [side, side], mode, antialias=True)
        theirs = theirs.flip(2) if draws['flip'][i] else theirs
        assert error(ours[i], theirs.clamp(0, 1)) < 1e-6


def test_boxes_are_distributed_as_torchvisions():
    n, size, scale = 10_000, (48, 64), (0.08, 1.0)
    ours = torch.stack(crop_boxes(n, *size, scale, keyed_generator(0), 'cpu'), dim=1)
    image = torch.empty(3, *size)
    crop = T.RandomResizedCrop(8, scale)
    theirs = torch.tensor([crop.get_params(image, scale, crop.ratio) for _ in range(n)]).float()
    for a, b in ((ours, theirs), (ours ** 2, theirs ** 2)):
        standard_error = ((a.var(dim=0) + b.var(dim=0)) / n).sqrt()
        assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * standard_error).all()


def test_boxes_lie_inside_and_touch_every_border():
    top, left, height, width = crop_boxes(5000, 12, 9, (0.2, 1.0), keyed_generator(0), 'cpu')
    assert top.min() == 0 and (top + height).max() == 12
    assert left.min() == 0 and (left + width).max() == 9


def test_box_is_central_if_nothing_fits():
    """The whole of 10 x 100 has ratio 10, so the box is 10 x 13 (4/3) at column (100 - 13) // 2."""
    box = torch.stack(crop_boxes(5, 10, 100, (1.0, 1.0), keyed_generator(0), 'cpu'), dim=1)
    assert box.tolist() == [[0, 43, 10, 13]] * 5


# ---- colour

BLENDS = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)


@pytest.mark.parametrize('operation', (0, 1, 2))
def test_blends_equal_torchvision(operation):
    """torchvision weighs red by 0.2989, PIL and we by 0.299: up to 1e-4 times |1 - factor|."""
    images = rand(4, 3, 7, 9)
    factors = (0.0, 0.6, 1.0, 1.7)
    ours = views.blend(images, per_image(*[operation] * 4), per_image(*factors))
    for i, factor in enumerate(factors):
        assert error(ours[i], BLENDS[operation](images[i], factor)) < 1.1e-4


def test_hue_equals_torchvision():
    """Also where a pixel is grey, so has no hue, or two channels are equal."""
    images = rand(5, 3, 7, 9)
    images[:, :, 0] = images[:, :1, 0]
    images[:, :2, 1] = images[:, 2:, 1] / 2 + 0.5
    turns = (-0.5, -0.1, 0.0, 0.08, 0.5)
    ours = views.turn_hue(images, per_image(*turns))
    for i, turn in enumerate(turns):
        assert error(ours[i], TF.adjust_hue(images[i], turn)) < 1e-6


@pytest.mark.parametrize('sigma', (0.3, 1.0, 2.0))
def test_blur_equals_torchvision_inside(sigma):
    """At the border torchvision reflects. Ours keeps a constant image constant."""
    images = rand(2, 3, 32, 32)
    images[1] = 0.7
    ours = views.blur(images, per_image(sigma, sigma))
    theirs = TF.gaussian_blur(images, 21, sigma)
    inside = slice(10, -10)
    assert error(ours[:, :, inside, inside], theirs[:, :, inside, inside]) < 1e-6
    assert error(ours[1], images[1]) < 1e-6


def test_solarize_equals_torchvision():
    """All 256 values: 127 stays, 128 becomes 127."""
    images = torch.arange(256).byte().reshape(1, 1, 16, 16)
    theirs = TF.solarize(images, 128)
    assert torch.equal((views.solarize(images / 255) * 255).round().byte(), theirs)


def torchvision_colors(image, draws, i):
    if draws['jitter'][i]:
        operations = draws['operations'][i].flatten()
        steps = [(BLENDS[k], factor) for k, factor in zip(operations, draws['factors'][i])]
        steps.insert(int(draws['hue_place'][i]), (TF.adjust_hue, draws['turns'][i]))
        for function, amount in steps:
            image = function(image, amount.item())
    if draws['gray'][i]:
        image = TF.rgb_to_grayscale(image, 3)
    if draws['blur'][i]:
        matrix = views.blur_matrix(draws['sigma'][i].double(), 24)[0]
        image = matrix @ image @ matrix.T
    if draws['solarize'][i]:
        image = TF.solarize(image, 128 / 255)
    return image


def test_views_equal_torchvision_image_by_image():
    """Every operation, in every order; 300 images are made in two parts.

    A pixel at the threshold of solarization may fall to either side: 0.1 % of them may differ.
    """
    view = View(24, jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.5, solarize_p=0.2)
    images = rand_bytes(300, 3, 20, 26)
    before = images.clone()
    ours, = make_views(images, [view], keyed_generator(1))
    draws = draw(300, 20, 26, view, keyed_generator(1), 'cpu')
    pixels = views.crop_and_flip(images / 255, view, draws).double()
    theirs = torch.stack([torchvision_colors(pixels[i], draws, i) for i in range(300)])
    assert ((ours - theirs).abs() > 1e-3).double().mean() < 1e-3
    assert torch.equal(images, before)


# ---- draws

def test_draws_follow_the_law_of_the_view():
    """A strength of 1.5 gives factors of 0 to 2.5: none is negative."""
    probabilities = dict(jitter_p=0.8, gray_p=0.2, blur_p=0.1, solarize_p=0.3)
    view = View(32, jitter=(1.5, 0.4, 0.2, 0.1), **probabilities)
    draws = draw(20_000, 32, 32, view, keyed_generator(0), 'cpu')
    for name, p in probabilities.items():
        assert_frequency(draws[name.removesuffix('_p')], p)
    assert_frequency(draws['flip'], 0.5)
    for operation, limits in enumerate([(0, 2.5), (0.6, 1.4), (0.8, 1.2)]):
        factors = draws['factors'][draws['operations'] == operation]
        assert len(factors) == 20_000
        assert_uniform(factors, *limits)
    assert_uniform(draws['turns'], -0.1, 0.1)
    assert_uniform(draws['sigma'], 0.1, 2.0)


def test_all_24_orders_of_the_jitter_are_equally_likely():
    draws = draw(24_000, 32, 32, View(32), keyed_generator(0), 'cpu')
    first, second, _ = draws['operations'].flatten(1).T
    code = draws['hue_place'].flatten() * 9 + first * 3 + second
    orders = code.unique()
    assert len(orders) == 24
    for order in orders:
        assert_frequency(code == order, 1 / 24)


@pytest.mark.parametrize('method', METHODS)
def test_same_seed_at_two_sides_gives_the_same_views(method):
    """Averaged to 32 px, views of 64 px are near those of 32 px; another seed's are not."""
    images = smooth(16, 64)
    large = [replace(view, solarize_p=0) for view in recipe(method, 64, 2, 64)]  # a threshold
    small = [view.at(32) for view in large]
    at_64 = make_views(images, large, keyed_generator(0))
    at_32 = make_views(images, small, keyed_generator(0))
    other = make_views(images, small, keyed_generator(1))
    for a, b, c in zip(at_64, at_32, other):
        a = F.avg_pool2d(a, 2)
        assert (a - b).abs().mean() < 0.01
        assert (a - c).abs().mean() > 0.1


def test_view_at_another_side_scales_the_blur():
    """2 pixels of 224 are 1 of 112; the rest of the view stays."""
    view = View(224, scale=(0.3, 0.9), blur_p=0.5)
    assert view.at(112) == replace(view, side=112, blur_sigma=(0.05, 1.0))


def test_views_do_not_depend_on_the_blur_of_those_before():
    images = smooth(4, 20)
    blurred = make_views(images, [replace(PLAIN, blur_p=1.0), PLAIN], keyed_generator(0))
    sharp = make_views(images, [PLAIN, PLAIN], keyed_generator(0))
    assert torch.equal(blurred[1], sharp[1])
    assert not torch.equal(blurred[0], sharp[0])


def test_generators_differ_in_every_part_of_the_key():
    keys = ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2 ** 32))
    draws = [torch.rand(4, generator=keyed_generator(*key)) for key in keys]
    assert len(torch.stack(draws).unique(dim=0)) == 5


# ---- recipes

def test_byols_views_are_lightlys():
    pair = lightly.BYOLView1Transform(), lightly.BYOLView2Transform()
    for view, theirs in zip(recipe('moco', 224), pair):
        steps = {type(step).__name__: step for step in theirs.transform.transforms}
        jitter = steps['RandomApply'].transforms[0]
        upper = (jitter.brightness[1] - 1, jitter.contrast[1] - 1, jitter.saturation[1] - 1)
        assert view.jitter == pytest.approx((*upper, jitter.hue[1]))
        assert view.jitter_p == steps['RandomApply'].p
        assert view.gray_p == steps['RandomGrayscale'].p
        assert view.blur_p == steps['GaussianBlur'].prob
        assert view.solarize_p == steps['RandomSolarization'].prob
        assert view.scale == tuple(steps['RandomResizedCrop'].scale)


def test_simclr_and_dino_have_their_papers_constants():
    """DINO's README: without local crops, the global ones are smaller."""
    one, two = recipe('simclr', 224)
    assert one == two
    assert (one.jitter, one.blur_p, one.scale) == ((0.8, 0.8, 0.8, 0.2), 0.5, (0.08, 1.0))
    dino = recipe('dino', 224, local_crops=8)
    assert [view.side for view in dino] == [224] * 2 + [96] * 8
    assert [view.scale for view in dino] == [(0.4, 1.0)] * 2 + [(0.05, 0.4)] * 8
    assert [view.blur_p for view in dino] == [1.0, 0.1] + [0.5] * 8
    assert [view.solarize_p for view in dino] == [0, 0.2] + [0] * 8
    assert all(view.interpolation == 'bicubic' for view in (one, *dino))
    assert [view.scale for view in recipe('dino', 224)] == [(0.14, 1.0)] * 2
    assert recipe('dino', 224, local_crops=1, local_side=64)[2].side == 64


@pytest.mark.parametrize('method', METHODS)
def test_small_images_have_larger_crops_and_no_blur(method):
    for small, large in zip(recipe(method, 63, 2), recipe(method, 64, 2)):
        assert small.blur_p == 0 < large.blur_p
        assert small.scale[0] >= 0.15
        assert small.solarize_p == large.solarize_p


# ---- make_views, resize, normalize

def test_grey_images_have_brightness_and_contrast_only():
    images = rand(64, 1, 16, 16).float()
    view = View(16, jitter_p=1.0)
    changed, = make_views([images], [view], keyed_generator(0))
    same, = make_views([images], [replace(view, jitter=(0, 0, 0.4, 0.1))], keyed_generator(0))
    assert error(changed, images) > 0.1
    assert error(same, images) < 1e-6


def test_crops_that_are_given_are_resized_and_recoloured_only():
    crops = [smooth(3, 16), smooth(3, 24)]
    same, resized = make_views(crops, [PLAIN, PLAIN], keyed_generator(0))
    assert torch.equal(same, crops[0])
    assert error(resized, TF.resize(crops[1], [16, 16], T.InterpolationMode.BICUBIC)) < 1e-6
    recolored, = make_views(crops[:1], [View(16, jitter_p=1.0)], keyed_generator(0))
    assert error(recolored, crops[0]) > 0.1


@pytest.mark.parametrize('channels', (1, 3))
def test_views_are_contiguous_float32_in_0_1(channels):
    """Of a rectangle, uint8 or float, whatever its layout in memory."""
    images = rand_bytes(6, 24, 30, channels).movedim(3, 1)
    view = recipe('simclr', 64)[0].at(16)
    from_bytes, = make_views(images, [view], keyed_generator(0))
    from_floats, = make_views(images.double() / 255, [view], keyed_generator(0))
    assert from_bytes.dtype == torch.float32
    assert from_bytes.shape == (6, channels, 16, 16)
    assert from_bytes.is_contiguous()
    assert 0 <= from_bytes.min() and from_bytes.max() <= 1
    assert error(from_bytes, from_floats) < 1e-5


def test_draws_move_to_the_device_of_the_images():
    """'meta' stands for a GPU: tensors there have a shape and no values."""
    assert views.uniform((2, 3), 0, 1, keyed_generator(0), 'meta').device.type == 'meta'


def test_resize_and_normalize_equal_torchvision():
    images = rand_bytes(2, 3, 20, 26)
    theirs = TF.resize(images / 255, [15, 15], T.InterpolationMode.BICUBIC).clamp(0, 1)
    assert error(views.resize(images, 15), theirs) < 1e-6
    mean, std = (0.1, 0.5, 0.3), (0.2, 0.7, 0.4)
    assert error(views.normalize(theirs, mean, std), TF.normalize(theirs, mean, std)) < 1e-6


FLOATS = torch.full((2, 3, 8, 8), 0.5)


@pytest.mark.parametrize('images, message', (
    (FLOATS * 255, r'range from 127.5 to 127.5; scale them to \[0, 1\]'),
    (FLOATS - 1, 'range from -0.5 to -0.5'),
    (FLOATS * float('nan'), 'range from nan to nan'),
    (FLOATS.long(), 'images are torch.int64; give uint8'),
    (FLOATS[:0], r'shape \(0, 3, 8, 8\)'),
    (FLOATS[0], r'shape \(3, 8, 8\)'),
    (FLOATS[:, :2], r'shape \(2, 2, 8, 8\)'),
    ([FLOATS], '1 batches of crops do not match 2 views'),
    ([FLOATS, FLOATS * 3], 'range from 1.5 to 1.5'),
))
def test_bad_images_are_refused(images, message):
    with pytest.raises(ValueError, match=message):
        make_views(images, [PLAIN, PLAIN], keyed_generator(0))


def test_unknown_recipes_are_refused():
    with pytest.raises(ValueError, match="'byol' is not one of moco, simclr, dino"):
        recipe('byol', 32)
    for scale in ((0, 1), (0.2, 30), (1, 0.2)):
        with pytest.raises(ValueError, match=r'of the area are outside \(0, 1\]'):
            View(32, scale=scale)
