"""images/views.py against torchvision with the draws in hand; its draws against their laws."""
import lightly.transforms as lightly
import pytest
import torch
import torch.nn.functional as F
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from conftest import error
from einops import rearrange

from images import views
from images.views import Augmentation, crop_boxes, draw, keyed_generator, make_view, recipe
from vit import ViT

PLAIN = Augmentation(16, jitter_p=0, gray_p=0)                # crop and flip only


def rand_bytes(*shape):
    return torch.randint(256, shape, dtype=torch.uint8)


def assert_frequency(chosen, p):
    """The share of n draws lies within 4 standard errors, sqrt(p (1 - p) / n), of p."""
    bound = 4 * (p * (1 - p) / chosen.numel()) ** 0.5
    assert abs(chosen.float().mean() - p) < bound


def assert_uniform(values, low, high):
    """The mean lies within 4 standard errors, w / sqrt(12 n); values reach both limits, nearly."""
    width = high - low
    assert low <= values.min() < low + width / 100
    assert high - width / 100 < values.max() <= high
    assert abs(values.mean() - (low + high) / 2) < 4 * width / (12 * values.numel()) ** 0.5


# ---- crops

@pytest.mark.parametrize('interpolation', ('bilinear', 'bicubic'))
@pytest.mark.parametrize('side', (8, 20, 48))
def test_crop_and_flip_equals_torchvision(side, interpolation):
    """Boxes at each border of a rectangle, shrunk and enlarged. The second is mirrored."""
    images = torch.rand(4, 3, 40, 30, dtype=torch.float64)
    boxes = [(0, 0, 40, 30), (3, 2, 20, 21), (0, 17, 9, 13), (32, 10, 8, 8)]
    columns = torch.tensor(boxes, dtype=torch.float64).unbind(dim=1)
    draws = dict(zip(('top', 'left', 'height', 'width'), columns))
    draws['flip'] = torch.tensor([False, True, False, False]).view(4, 1, 1)
    ours = views.crop_and_flip(images, Augmentation(side, interpolation=interpolation), draws)
    ours[1] = ours[1].flip(2)
    mode = T.InterpolationMode(interpolation)
    for i, box in enumerate(boxes):
        theirs = TF.resized_crop(images[i], *box, [side, side], mode, antialias=True)
        assert error(ours[i], theirs.clamp(0, 1)) < 1e-12


def test_boxes_are_distributed_as_torchvisions():
    n, size, scale = 10_000, (48, 64), (0.08, 1.0)
    ours = torch.stack(crop_boxes(n, *size, scale, keyed_generator(0)), dim=1)
    image = torch.empty(3, *size)
    ratio = (3 / 4, 4 / 3)
    theirs = [T.RandomResizedCrop.get_params(image, scale, ratio) for _ in range(n)]
    theirs = torch.tensor(theirs).float()
    for a, b in ((ours, theirs), (ours ** 2, theirs ** 2)):
        standard_error = ((a.var(dim=0) + b.var(dim=0)) / n).sqrt()
        assert ((a.mean(dim=0) - b.mean(dim=0)).abs() < 4 * standard_error).all()


def test_a_box_is_central_if_nothing_fits():
    """The whole of 10 x 100 has ratio 10, so the box is 10 x 13 (4/3) at column (100 - 13) // 2."""
    box = torch.stack(crop_boxes(5, 10, 100, (1.0, 1.0), keyed_generator(0)), dim=1)
    assert box.tolist() == [[0, 43, 10, 13]] * 5


# ---- the picture that the encoder reads of a large patch

@pytest.mark.parametrize('patches', ((8, 4), (10, 4), (5, 3)))
def test_a_patch_is_rendered_as_its_least_squares_picture(patches):
    """argmin over x of |patch - enlarge(x)|, solved in two dimensions and float64.

    Such pictures overshoot: some pixels lie outside of [0, 1].
    """
    large, small = patches
    images = torch.rand(12, 3, 40, 30)

    def pixels(p, patches):
        """One column for each patch of p x p."""
        view = make_view(images, PLAIN.at(4 * large, patches), keyed_generator(0))
        return rearrange(view, 'b c (h p) (w q) -> (p q) (b c h w)', p=p, q=p)

    units = torch.eye(small ** 2, dtype=torch.float64).view(-1, 1, small, small)
    enlarge = F.interpolate(units, (large, large), mode='bilinear').flatten(1).T
    wanted = torch.linalg.lstsq(enlarge, pixels(large, (1, 1)).double()).solution
    ours = pixels(small, patches)
    assert error(ours, wanted) < 1e-5
    assert ours.min() < 0 and ours.max() > 1


def test_the_encoder_reads_the_same_of_the_small_picture():
    encoder = ViT(32, 4, embed_dim=32, depth=2, num_heads=2)
    images = torch.rand(4, 3, 40, 30)
    full = make_view(images, PLAIN.at(32), keyed_generator(0))
    small = make_view(images, PLAIN.at(32, patches=(8, 4)), keyed_generator(0))
    assert small.shape[2:] == (16, 16)
    assert error(encoder(full, patch_size=8), encoder(small)) < 1e-5


def test_draws_do_not_depend_on_the_resolution():
    """But sigma: it covers the same part of the image."""
    view = Augmentation(224, blur_p=0.5)
    first = draw(9, 40, 30, view, keyed_generator(0))
    second = draw(9, 40, 30, view.at(192, patches=(32, 16)), keyed_generator(0))
    first['sigma'] *= 96 / 224
    for name, values in first.items():
        torch.testing.assert_close(second[name], values, rtol=1e-6, atol=0)


# ---- colour

def torchvision_colors(image, draws, i):
    blends = (TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)
    if draws['jitter'][i]:
        operations = draws['operations'][i].flatten()
        steps = [(blends[k], factor) for k, factor in zip(operations, draws['factors'][i])]
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


@pytest.mark.parametrize('sigma', (0.3, 2.0))
def test_blur_equals_torchvision_inside(sigma):
    """At the border torchvision reflects. Ours keeps a constant image constant."""
    images = torch.rand(2, 3, 32, 32)
    images[1] = 0.7
    ours = views.blur(images, torch.full((2, 1, 1, 1), sigma))
    theirs = TF.gaussian_blur(images, 21, sigma)
    assert error(ours[:, :, 10:-10, 10:-10], theirs[:, :, 10:-10, 10:-10]) < 1e-6
    assert error(ours[1], images[1]) < 1e-6


def test_crops_that_are_given_are_recoloured_alone():
    crops = rand_bytes(3, 3, 12, 12)
    for gray_p, expected in ((0, crops / 255), (1, TF.rgb_to_grayscale(crops / 255, 3))):
        view = Augmentation(24, jitter_p=0, gray_p=gray_p, patches=(8, 4))
        assert error(make_view(crops, view, cropped=True), expected) < 1e-4


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
    images = rand_bytes(6, 3, 20, 26).to('meta')
    view = Augmentation(24, blur_p=0.5, solarize_p=0.5, patches=(8, 4))
    assert make_view(images, view, keyed_generator(0)).shape == (6, 3, 12, 12)


# ---- recipes

def test_byols_views_are_lightlys():
    pair = lightly.BYOLView1Transform(), lightly.BYOLView2Transform()
    for view, theirs in zip(recipe('moco', 224), pair):
        steps = {type(step).__name__: step for step in theirs.transform.transforms}
        jitter = steps['RandomApply'].transforms[0]
        upper = (jitter.brightness[1], jitter.contrast[1], jitter.saturation[1], jitter.hue[1] + 1)
        assert [1 + strength for strength in view.jitter] == pytest.approx(upper)
        assert view.scale == tuple(steps['RandomResizedCrop'].scale)
        assert (view.jitter_p, view.gray_p, view.blur_p, view.solarize_p) == (
            steps['RandomApply'].p, steps['RandomGrayscale'].p, steps['GaussianBlur'].prob,
            steps['RandomSolarization'].prob)


def test_simclr_and_dino_have_their_papers_constants():
    """DINO's README: without local crops, the global ones are smaller."""
    view, twin = recipe('simclr', 224)
    assert view == twin == Augmentation(224, (0.08, 1.0), 'bicubic', (0.8, 0.8, 0.8, 0.2),
                                        blur_p=0.5)
    first, second, *local = recipe('dino', 224, local_crops=8)
    assert first == Augmentation(224, (0.4, 1.0), 'bicubic', blur_p=1.0)
    assert second == Augmentation(224, (0.4, 1.0), 'bicubic', blur_p=0.1, solarize_p=0.2)
    assert local == [Augmentation(96, (0.05, 0.4), 'bicubic', blur_p=0.5)] * 8
    assert [view.scale for view in recipe('dino', 224)] == [(0.14, 1.0)] * 2
    assert recipe('dino', 32)[0] == Augmentation(32, (0.2, 1.0), 'bicubic')   # ours: no blur


# ---- what goes in and comes out

@pytest.mark.parametrize('channels', (1, 3))
def test_views_are_float32_in_0_1_of_bytes_and_of_floats(channels):
    images = rand_bytes(6, channels, 24, 30)
    kind = recipe('simclr', 64)[0]
    view, = views.make_views(images, [kind], keyed_generator(0))
    assert view.dtype == torch.float32 and view.shape == (6, channels, 64, 64)
    assert 0 <= view.min() and view.max() <= 1
    assert error(view, make_view(images.double() / 255, kind, keyed_generator(0))) < 1e-5


@pytest.mark.parametrize('value, message', (
    (127.5, 'float32 images from 127.5 to 127.5; give uint8, or float'),
    (-1.0, 'from -1 to -1'),
    (float('nan'), 'from nan to nan'),
    (1, 'torch.int64 images'),
))
def test_bad_images_are_refused(value, message):
    with pytest.raises(ValueError, match=message):
        make_view(torch.full((2, 3, 8, 8), value), PLAIN)
