"""images/views.py against torchvision with the draws in hand; its draws against their laws."""
import lightly.transforms as lightly
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from conftest import error
from methods import each_method, refused, shrunk

from images import views
from images.shapes import render_shapes
from images.views import Augmentation, crop_boxes, draw, keyed_generator, make_view, recipe

PLAIN = Augmentation(16, jitter_p=0, gray_p=0)                # crop and flip only


def rand_bytes(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def assert_frequency(chosen, p):
    """The share of n draws lies within 4 standard errors, sqrt(p (1 - p) / n), of p."""
    bound = 4 * (p * (1 - p) / chosen.numel()) ** 0.5
    assert abs(chosen.float().mean() - p) < bound


def assert_uniform(values, low, high):
    """As the mean, within 4 standard errors, w / sqrt(12 n); values reach both limits, nearly."""
    u = (values - low) / (high - low)
    assert 0 <= u.min() < 0.01 and 0.99 < u.max() <= 1
    assert abs(u.mean() - 0.5) < 4 / (12 * values.numel()) ** 0.5


def test_colours_of_small_pictures_are_nearly_those_of_full_ones():
    """In parts of the contrast they differ by 0.10; with the overshoot coloured too by 0.23."""
    images, _ = render_shapes(240, seed=0)
    kind = recipe('moco', 32)[0]
    full = shrunk(make_view(images, kind, keyed_generator(7)), 8, 4)
    small = make_view(images, kind.at(32, (8, 4)), keyed_generator(7))
    contrast = (full - full.mean(dim=(2, 3), keepdim=True)).norm()
    assert (small - full).norm() / contrast < 0.11
    assert small.min() < -0.1 and small.max() > 1.1


# ---- crops

def test_crop_and_flip_equals_torchvision():
    """Boxes at each border of a rectangle, shrunk and enlarged. The second is mirrored."""
    images = torch.rand(4, 3, 40, 30, dtype=torch.float64)
    boxes = [(0, 0, 40, 30), (3, 2, 20, 21), (0, 17, 9, 13), (32, 10, 8, 8)]
    flip = torch.tensor([False, True, False, False]).view(4, 1, 1)
    draws = dict(box=torch.tensor(boxes, dtype=torch.float64), flip=flip)
    for side, mode in ((8, 'bilinear'), (20, 'bicubic'), (48, 'bicubic')):
        ours = views.crop_and_flip(images, Augmentation(side, interpolation=mode), draws)
        ours[1] = ours[1].flip(2)
        for i, box in enumerate(boxes):
            theirs = TF.resized_crop(images[i], *box, [side, side], T.InterpolationMode(mode))
            assert error(ours[i], theirs) < 1e-12


def test_boxes_are_distributed_as_torchvisions():
    n, size, scale = 10_000, (48, 64), (0.08, 1.0)
    ours = torch.stack(crop_boxes(n, *size, scale, keyed_generator(0)), dim=1)
    crop = T.RandomResizedCrop(1, scale)
    image = torch.empty(3, *size)
    theirs = [crop.get_params(image, scale, crop.ratio) for _ in range(n)]
    theirs = torch.tensor(theirs).float()
    for a, b in ((ours, theirs), (ours ** 2, theirs ** 2)):
        standard_error = ((a.var(dim=0) + b.var(dim=0)) / n).sqrt()
        assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * standard_error).all()


# ---- the picture that the encoder reads of a large patch

def test_a_patch_is_rendered_as_its_least_squares_picture():
    """argmin over x of |patch - enlarge(x)|, solved in two dimensions and float64.

    Such pictures overshoot: some pixels lie outside of [0, 1].
    """
    images = torch.rand(12, 3, 40, 30)
    for large, small in ((8, 4), (5, 3)):
        full = make_view(images, PLAIN.at(4 * large), keyed_generator(0))
        ours = make_view(images, PLAIN.at(4 * large, (large, small)), keyed_generator(0))
        assert error(ours, shrunk(full, large, small)) < 1e-5
        assert ours.min() < 0 and ours.max() > 1


# ---- colour

def torchvision_colors(image, draws, i):
    blends = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    if draws['jitter'][i]:
        drawn = zip(draws['operations'][i], draws['factors'][i])
        steps = [(blends[k], factor) for k, factor in drawn]
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
    """Every operation, in every order; 300 images are made in two parts, the first tenth is grey.

    A pixel at the threshold of solarization may fall to either side: 0.1 % of them may differ.
    torchvision weighs red by 0.2989, we and PIL by 0.299.
    """
    view = Augmentation(24, jitter=(0.8, 0.8, 0.8, 0.2), blur_p=0.5, solarize_p=0.2)
    images = rand_bytes(300, 3, 20, 26)
    images[:30] = images[:30, :1]
    before = images.clone()
    ours = make_view(images, view, keyed_generator(1))
    draws = draw(300, 20, 26, view, keyed_generator(1))
    pixels = views.crop_and_flip(images / 255, view, draws).double()
    theirs = torch.stack([torchvision_colors(pixels[i], draws, i) for i in range(300)])
    assert ((ours - theirs).abs() > 1e-3).double().mean() < 1e-3
    assert torch.equal(images, before)


def test_blur_equals_torchvision_inside():
    """At the border torchvision reflects. Ours keeps a constant image constant."""
    images = torch.rand(2, 3, 32, 32)
    images[1] = 0.7
    ours = views.blur(images, torch.full((2, 1, 1, 1), 2.0))
    difference = ours - TF.gaussian_blur(images, 21, 2.0)
    assert difference[:, :, 10:-10, 10:-10].abs().max() < 1e-6
    assert error(ours[1], images[1]) < 1e-6


def test_crops_that_are_given_are_recoloured_alone():
    crops = rand_bytes(3, 3, 12, 12)
    view = Augmentation(24, jitter_p=0, gray_p=1, patches=(8, 4))
    gray = TF.rgb_to_grayscale(crops / 255, 3)
    assert error(make_view(crops, view, cropped=True), gray) < 1e-4


# ---- draws

def test_draws_follow_the_law_of_the_view():
    """A strength of 1.5 gives factors of 0 to 2.5: none is negative."""
    probabilities = dict(jitter_p=0.8, gray_p=0.2, blur_p=0.1, solarize_p=0.3)
    view = Augmentation(32, jitter=(1.5, 0.4, 0.2, 0.1), **probabilities)
    draws = draw(20_000, 32, 32, view, keyed_generator(0))
    for name, p in probabilities.items():
        assert_frequency(draws[name.removesuffix('_p')], p)
    assert_frequency(draws['flip'], 0.5)
    for operation, limits in enumerate([(0, 2.5), (0.6, 1.4), (0.8, 1.2)]):
        assert_uniform(draws['factors'][draws['operations'] == operation], *limits)
    assert_uniform(draws['turns'], -0.1, 0.1)
    assert_uniform(draws['sigma'], 0.1, 2.0)
    first, second, _ = draws['operations'].flatten(1).T
    order = draws['hue_place'].flatten() * 9 + first * 3 + second
    assert len(order.unique()) == 24
    for one in order.unique():
        assert_frequency(order == one, 1 / 24)


def test_no_device_is_waited_for():
    """'meta' stands for a GPU: its tensors have no values, so that reading one would raise."""
    images = torch.empty(6, 3, 20, 26, dtype=torch.uint8, device='meta')
    view = Augmentation(24, blur_p=0.5, solarize_p=0.5, patches=(8, 4))
    assert make_view(images, view, keyed_generator(0)).shape == (6, 3, 12, 12)


# ---- recipes

THEIRS = dict(
    moco=[lightly.BYOLView1Transform(), lightly.BYOLView2Transform()],
    simclr=lightly.SimCLRTransform().transforms,
    dino=lightly.DINOTransform(n_local_views=2).transforms)


@each_method
def test_recipes_are_lightlys(name):
    for view, transform in zip(recipe(name, 224, 2), THEIRS[name], strict=True):
        steps = {type(step).__name__: step for step in transform.transform.transforms}
        crop, jitter = steps['RandomResizedCrop'], steps['RandomApply']
        color = jitter.transforms[0]
        upper = (color.brightness[1], color.contrast[1], color.saturation[1], 1 + color.hue[1])
        assert [1 + strength for strength in view.jitter] == pytest.approx(upper)
        assert (view.side, view.scale) == (crop.size[0], tuple(crop.scale))
        assert (view.jitter_p, view.gray_p) == (jitter.p, steps['RandomGrayscale'].p)
        for step, p in (('GaussianBlur', view.blur_p), ('RandomSolarization', view.solarize_p)):
            assert p == (steps[step].prob if step in steps else 0)


def test_blur_follows_the_side():
    """2 pixels of 224 are 1 of 112, and of 5 x 5 patches of 48 px rendered at 16."""
    view = recipe('moco', 224)[0]
    assert view.at(112).blur_sigma == (0.05, 1.0)
    assert view.at(240, patches=(48, 16)).blur_sigma == pytest.approx((0.1 * 80 / 224, 160 / 224))


# ---- what goes in and comes out

def test_views_are_float32_in_0_1_of_bytes_and_of_floats():
    images = rand_bytes(6, 1, 24, 30)
    kind = recipe('simclr', 64)[0]
    view, = views.make_views(images, [kind], keyed_generator(0))
    assert view.dtype == torch.float32 and view.shape == (6, 1, 64, 64)
    assert 0 <= view.min() and view.max() <= 1
    assert error(view, make_view(images.double() / 255, kind, keyed_generator(0))) < 1e-5


def test_bad_images_are_refused():
    refused(lambda value: make_view(torch.full((2, 3, 8, 8), value), PLAIN), [
        (127.5, 'float32 images from 127.5 to 127.5; give uint8, or float'),
        (float('nan'), 'from nan to nan')])
