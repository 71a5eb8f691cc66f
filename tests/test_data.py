import math
import time

import lightly.transforms as lt
import pytest
import torch
import torchvision.transforms as T
import torchvision.transforms.functional as TF
from PIL import Image

import data
from data import (View, batch_keys, blur_matrix, crop_boxes, crop_matrices, draw_colors, filter_matrix, finish, keyed_generator, load,
                  luminance, make_views, random_crop, recipe, recolor, render_shapes, separable, spread, turn_hue)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def planes_of(images):
    return images.transpose(0, 1).clone(memory_format=torch.contiguous_format)


def recolored(images, view, generator, hue_place=1):
    planes = planes_of(images)
    recolor(planes, hue_place, *draw_colors(len(images), view, generator, 'cpu'))
    return planes.transpose(0, 1)


def finished(images, view, generator):
    planes = planes_of(images)
    finish(planes, view, generator)
    return planes.transpose(0, 1)


# ---- crops

@pytest.mark.parametrize('interpolation', ('bilinear', 'bicubic'))
@pytest.mark.parametrize('side', (8, 20, 48))
def test_crop_and_resize_equal_torchvision(side, interpolation):
    images = torch.rand(6, 3, 40, 30)
    top, left = torch.tensor([0., 3, 5, 0, 9, 10]), torch.tensor([0., 2, 0, 7, 5, 10])
    height, width = torch.tensor([40., 20, 35, 9, 31, 8]), torch.tensor([30., 21, 30, 13, 25, 8])
    flip = torch.tensor([False, True] * 3)
    rows = filter_matrix(top, height, 40, side, interpolation)
    cols = filter_matrix(left, width, 30, side, interpolation, flip)
    ours = separable(images, rows, cols).transpose(0, 1)
    for i in range(6):
        theirs = TF.resized_crop(images[i], int(top[i]), int(left[i]), int(height[i]), int(width[i]), [side, side],
                                 T.InterpolationMode(interpolation), antialias=True)
        theirs = theirs.flip(2) if flip[i] else theirs
        assert (ours[i] - theirs).abs().max() < 1e-5


def test_crop_boxes_are_distributed_as_torchvisions():
    n, size = 20_000, (48, 64)
    top, left, height, width = crop_boxes(n, *size, (0.08, 1.0), generator(), 'cpu')
    torch.manual_seed(0)
    theirs = torch.tensor([T.RandomResizedCrop.get_params(torch.empty(3, *size), (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(n)]).float()
    ours = torch.stack([top, left, height, width], 1)
    assert (ours[:, 0] + ours[:, 2] <= 48).all() and (ours[:, 1] + ours[:, 3] <= 64).all() and (ours[:, :2] >= 0).all()
    for a, b in zip(ours.T, theirs.T):
        for q in (a, b), (a.square(), b.square()):
            error = (q[0].var() / n + q[1].var() / n).sqrt()
            assert abs(q[0].mean() - q[1].mean()) < 3.5 * error


def test_crop_boxes_fall_back_to_the_centre():
    boxes = torch.stack(crop_boxes(5, 10, 100, (1.0, 1.0), generator(), 'cpu'), 1)
    assert (boxes == torch.tensor([0., 43, 10, 13])).all()  # ratio 4/3 of the height, as torchvision


def test_random_crop_flips_half():
    images = (torch.arange(32.0).expand(4000, 1, 32, 32) * 8).to(torch.uint8)
    crops = random_crop(images, crop_matrices(4000, 32, 32, View(), 8, generator(), 'cpu'))
    flipped = (crops[0].diff(dim=2).mean(dim=(1, 2)) < 0).float().mean()
    assert abs(flipped - 0.5) < 3 * 0.5 / 4000 ** 0.5


# ---- colour

def test_hue_and_luminance_equal_torchvision():
    images = torch.rand(5, 3, 7, 9)
    shift = torch.tensor([-0.5, -0.1, 0.0, 0.08, 0.5])
    planes = planes_of(images)
    light = luminance(planes)
    turn_hue(planes, shift[:, None, None])
    for i in range(5):
        assert (planes[:, i] - TF.adjust_hue(images[i], float(shift[i]))).abs().max() < 2e-6
        assert (light[i] - TF.rgb_to_grayscale(images[i])[0]).abs().max() < 2e-4  # .2989 there
    gray = torch.cat([torch.rand(1, 1, 4, 4), torch.zeros(1, 1, 4, 4), torch.ones(1, 1, 4, 4)], 1).expand(3, 3, 4, 4)
    planes = gray.clone()
    turn_hue(planes, torch.full((3, 1, 1), 0.3))
    assert (planes - gray).abs().max() < 1e-7


def test_color_jitter_is_one_of_torchvisions_orders():
    """With the draws in hand, every image equals torchvision's four operations in the drawn order, hue in each place."""
    images = torch.rand(48, 3, 6, 6)
    colors = weights, contrast, saturation, turns, gray = draw_colors(48, View(jitter_p=1.0, gray_p=0.3), generator(), 'cpu')
    seen = set()
    for hue_place in range(4):
        planes = planes_of(images)
        recolor(planes, hue_place, *colors)
        for i in range(48):
            kinds = [1 if contrast[k, i] else 2 if saturation[k, i] else 0 for k in range(3)]
            assert sorted(kinds) == [0, 1, 2]
            steps = [((TF.adjust_brightness, TF.adjust_contrast, TF.adjust_saturation)[kind], 1 - float(weights[k, i])) for k, kind in enumerate(kinds)]
            steps.insert(hue_place, (TF.adjust_hue, float(turns[i])))
            x = images[i]
            for operation, amount in steps:
                x = operation(x, amount)
            x = TF.rgb_to_grayscale(x, 3) if gray[i] else x
            assert (planes[:, i] - x).abs().max() < 1e-3
            seen.add((*kinds, hue_place))
    assert len(seen) == 24


def test_color_draws_have_the_strengths_of_the_recipe():
    n = 20_000
    weights, contrast, saturation, turns, gray = draw_colors(n, View(jitter=(0.8, 0.4, 0.2, 0.1)), generator(), 'cpu')
    for mask, strength in ((1 - contrast - saturation, 0.8), (contrast, 0.4), (saturation, 0.2)):
        drawn = weights[mask.bool()]
        assert len(drawn) == n and 0.99 * strength < drawn.max() <= strength and -strength <= drawn.min() < -0.99 * strength
        assert abs(drawn.eq(0).float().mean() - 0.2) < 3 * (0.16 / n) ** 0.5
        assert abs(mask.mean(dim=1) - 1 / 3).max() < 3 * (2 / 9 / n) ** 0.5      # equally often in each place
    assert 0.099 < turns.max() <= 0.1 and -0.1 <= turns.min() < -0.099
    assert torch.equal(turns.eq(0).flatten(), weights.eq(0).all(dim=0).flatten())  # all of the jitter or none
    assert abs(gray.mean() - 0.2) < 3 * (0.16 / n) ** 0.5


def test_hue_takes_each_place_equally_often(monkeypatch):
    seen = []
    original = data.recolor
    monkeypatch.setattr(data, 'recolor', lambda planes, place, *a: seen.append((place, planes.shape[1])) or original(planes, place, *a))
    for b, side, parts in ((18, 8, 1), (1, 8, 1), (1200, 32, 3)):
        seen.clear()
        made = make_views(torch.zeros(b, 3, 8, 8, dtype=torch.uint8), recipe('moco', small=True), [side] * 2, generator())
        assert [tuple(view.shape) for view in made] == [(b, 3, side, side)] * 2
        assert [place for place, _ in seen] == [place for place in range(4) for _ in range(parts)]
        assert all(count in (2 * b // 4 // parts, -(-2 * b // 4 // parts)) for _, count in seen) and sum(count for _, count in seen) == 2 * b


def by_hand(batch, views, sides, generator):
    """make_views in float64 by torchvision, image by image, with the same draws."""
    import itertools
    from dataclasses import replace
    given, result = isinstance(batch, list), []
    kinds = [(replace(view, blur_p=0, solarize_p=0), side) for view, side in zip(views, sides)]
    for (kind, side), members in itertools.groupby(range(len(views)), key=kinds.__getitem__):
        members, b = list(members), len(batch[0]) if given else len(batch)
        n = b * len(members)
        if not given:
            top, left, height, width = crop_boxes(n, *batch.shape[2:], kind.scale, generator, 'cpu')
            flip = torch.rand(n, generator=generator) < 0.5
        weights, contrast, saturation, turns, gray = draw_colors(n, kind, generator, 'cpu')
        dealt = torch.rand(n, generator=generator).argsort().tolist()
        made = [None] * n
        for position, number in enumerate(dealt):
            source = batch[members[number // b]] if given else batch
            x = source[number % b].double() / 255
            if given:
                x = TF.resize(x, [side, side], T.InterpolationMode.BICUBIC).clamp(0, 1)
            else:
                box = [int(v[position]) for v in (top, left, height, width)]
                x = TF.resized_crop(x, *box, [side, side], T.InterpolationMode(kind.interpolation)).clamp(0, 1)
                x = x.flip(2) if flip[position] else x
            steps = []
            for k in range(3):
                operation = TF.adjust_contrast if contrast[k, position] else TF.adjust_saturation if saturation[k, position] else TF.adjust_brightness
                steps.append((operation, 1 - float(weights[k, position])))
            place = next(i for i in range(4) if position < n * (i + 1) // 4)
            for operation, amount in [*steps[:place], (TF.adjust_hue, float(turns[position])), *steps[place:]]:
                x = operation(x, amount)
            made[number] = TF.rgb_to_grayscale(x, 3) if gray[position] else x
        for i, images in zip(members, (made[j:j + b] for j in range(0, n, b))):
            images = torch.stack(images)
            if views[i].blur_p:
                sigma = torch.empty(b).uniform_(0.1, 2.0, generator=generator)
                for image, s, draw in zip(images, sigma, torch.rand(b, generator=generator)):
                    if draw < views[i].blur_p:
                        axis = torch.arange(side, dtype=torch.float64)
                        kernel = torch.exp(-((axis[:, None] - axis) / s.double()) ** 2 / 2)
                        kernel /= kernel.sum(1, keepdim=True)
                        image.copy_(kernel @ image @ kernel.T)
            if views[i].solarize_p:
                chosen = torch.rand(b, generator=generator) < views[i].solarize_p
                images = torch.where(chosen[:, None, None, None] & (images >= 128 / 255), 1 - images, images)
            result.append(images)
    return result


@pytest.mark.parametrize('name', ('moco', 'simclr', 'dino'))
@pytest.mark.parametrize('given', (False, True))
def test_views_equal_torchvision_image_by_image(name, given):
    views = recipe(name, local_crops=3)
    sides = [8 if view.local else 14 for view in views]
    pixels = torch.randint(0, 256, (7, 3, 20, 26), dtype=torch.uint8, generator=generator())
    batch = [pixels[:, :, i:i + side + 1, i:i + side + 1] for i, side in enumerate(sides)] if given else pixels
    before = pixels.clone()
    made, expected = (f(batch, views, sides, generator(3)) for f in (make_views, by_hand))
    assert torch.equal(pixels, before)
    for ours, theirs in zip(made, expected):
        # .2989 for .299 in torchvision's luminance; a pixel at the threshold of solarization falls to either side
        assert ours.shape == theirs.shape and ((ours - theirs).abs() > 1e-3).float().mean() < 1e-3


def test_grey_images_keep_one_channel():
    images = torch.rand(64, 1, 8, 8)
    out = recolored(images, View(), generator())
    assert out.shape == images.shape and not torch.equal(out, images)
    assert torch.equal(recolored(images, View(jitter=(0, 0, 0.4, 0.1)), generator()), images)  # no saturation, no hue, no grayscale


@pytest.mark.parametrize('sigma', (0.3, 1.0, 2.0))
def test_blur_equals_torchvision_inside(sigma):
    images = torch.rand(2, 3, 32, 32)
    matrix = blur_matrix(torch.full((2,), sigma), 32)
    theirs = TF.gaussian_blur(images, 21, sigma)
    assert (separable(images, matrix, matrix).transpose(0, 1) - theirs)[:, :, 10:-10, 10:-10].abs().max() < 2e-6


# ---- recipes

def test_recipe_constants_equal_lightlys():
    moco = recipe('moco')
    for view, theirs in zip(moco, (lt.BYOLView1Transform(), lt.BYOLView2Transform())):
        found = {type(t).__name__: t for t in theirs.transform.transforms}
        jitter = found['RandomApply']
        strengths = [getattr(jitter.transforms[0], part)[1] for part in ('brightness', 'contrast', 'saturation', 'hue')]
        assert view.jitter_p == jitter.p and view.jitter == pytest.approx([strengths[0] - 1, strengths[1] - 1, strengths[2] - 1, strengths[3]])
        assert view.scale == tuple(found['RandomResizedCrop'].scale)
        assert view.gray_p == found['RandomGrayscale'].p
        assert view.blur_p == found['GaussianBlur'].prob and view.solarize_p == found['RandomSolarization'].prob
    dino = recipe('dino')
    assert len(dino) == 10 and [v.local for v in dino] == [False] * 2 + [True] * 8
    assert [v.blur_p for v in dino[:3]] == [1.0, 0.1, 0.5] and [v.solarize_p for v in dino[:3]] == [0, 0.2, 0]
    assert dino[0].scale == (0.4, 1) and dino[2].scale == (0.05, 0.4) and recipe('dino', local_crops=0)[0].scale == (0.14, 1)
    simclr = recipe('simclr')
    assert simclr[0] == simclr[1] and simclr[0].jitter == (0.8, 0.8, 0.8, 0.2) and simclr[0].blur_p == 0.5
    assert all(v.blur_p == 0 and v.scale[0] >= 0.15 for name in ('moco', 'simclr', 'dino') for v in recipe(name, small=True))
    with pytest.raises(ValueError, match='byol.*moco'):
        recipe('byol')


def test_frequencies_of_each_operation():
    n = 10_000
    images = torch.rand(n, 3, 8, 8, generator=generator(1))
    quiet = View(jitter_p=0, gray_p=0)

    def frequency(view):
        if view.blur_p or view.solarize_p:
            out = finished(images, view, generator(2))
        else:
            out = recolored(images, view, generator(2))
        least = 0 if view.blur_p else 1e-5  # turning the hue by 0 rounds
        return (out - images).abs().amax(dim=(1, 2, 3)).gt(least).float().mean().item()

    from dataclasses import replace
    for field, p in (('jitter_p', 0.8), ('gray_p', 0.2), ('blur_p', 0.1), ('blur_p', 0.5), ('blur_p', 1.0), ('solarize_p', 0.2)):
        if field == 'blur_p':
            p *= 0.975  # a sigma under about 0.15 changes no float32 pixel: exp(-1 / (2 sigma^2)) is below its rounding
        assert abs(frequency(replace(quiet, **{field: round(p, 1)})) - p) < 3 * math.sqrt(p * (1 - p) / n) + 5e-3, field
    bright = torch.rand(100, 3, 4, 4)
    solarized = finished(bright, replace(quiet, solarize_p=1.0), generator())
    assert torch.equal(solarized, torch.where(bright >= 128 / 255, 1 - bright, bright))


def test_views_repeat_with_the_key_and_differ_between_images():
    images = torch.randint(0, 256, (1, 3, 20, 20), dtype=torch.uint8).expand(4, 3, 20, 20)
    made = [make_views(images, recipe('dino', small=True, local_crops=2), [16, 16, 8, 8], keyed_generator(*key)) for key in ((0, 0, 5), (0, 0, 5), (0, 0, 6))]
    assert [tuple(v.shape) for v in made[0]] == [(4, 3, 16, 16)] * 2 + [(4, 3, 8, 8)] * 2
    assert all(torch.equal(a, b) for a, b in zip(made[0], made[1])) and not torch.equal(made[0][0], made[2][0])
    assert not torch.equal(made[0][0][0], made[0][0][1])
    assert all(v.dtype == torch.float32 and 0 <= v.min() and v.max() <= 1 for v in made[0])


def test_normalize_equals_torchvision():
    images, mean, std = torch.rand(4, 3, 5, 6), (0.1, 0.5, 0.3), (0.2, 0.7, 0.4)
    for given in (images, images.transpose(0, 1).contiguous().transpose(0, 1)):
        out = data.normalize(given, mean, std)
        assert out.is_contiguous() and (out - TF.normalize(images, mean, std)).abs().max() < 1e-6


# ---- order of the data

def test_batch_keys_cover_each_epoch_once_over_ranks_and_resume():
    def take(count, **kw):
        return [batch for batch, _ in zip(batch_keys(22, 6, seed=1, **kw), range(count))]
    whole = take(7)
    assert all(len(b) == 6 for b in whole)
    first = [i for b in whole[:3] for _, i in b]
    assert len(set(first)) == 18 and [e for b in whole for e, _ in b] == [0] * 18 + [1] * 18 + [2] * 6
    assert [i for b in whole[3:6] for _, i in b] != first
    assert take(3, start_step=4) == whole[4:7]
    halves = [take(7, rank=r, world=2) for r in range(2)]
    assert [a + b for a, b in zip(*halves)] == whole
    with pytest.raises(ValueError, match='batch size 30 is larger than the 22 images'):
        batch_keys(22, 30, 0)


def test_keyed_generators_differ_in_every_part_of_the_key():
    draws = [torch.rand(4, generator=keyed_generator(*key)).tolist() for key in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1), (0, 0, 2 ** 32))]
    assert len({tuple(d) for d in draws}) == 5


# ---- data sets

def test_shapes_are_deterministic_balanced_and_ready():
    start = time.perf_counter()
    dataset = load('shapes')
    assert time.perf_counter() - start < 30  # about 4 s on two idle cores
    assert len(dataset) >= 10_000 and len(dataset.classes) >= 10 and dataset.images.dtype == torch.uint8
    assert torch.bincount(dataset.labels).tolist() == [1000] * 12
    images, labels = render_shapes(24, seed=0)
    assert torch.equal(images, render_shapes(24, seed=0)[0]) and not torch.equal(images, render_shapes(24, seed=1)[0])
    # colour does not tell the class: class means of the colours differ by little of the spread between images
    colours = dataset.images.float().mean(dim=(2, 3)) / 255
    chroma = colours - colours.mean(1, keepdim=True)
    means = torch.stack([chroma[dataset.labels == k].mean(0) for k in range(12)])
    assert means.std(0).max() < 0.1 * chroma.std(0).max()


def test_fashion_mnist_through_torchvision(tiny_fashion):
    dataset = load('fashion_mnist', tiny_fashion)
    assert dataset.images.shape == (320, 1, 28, 28) and dataset.channels == 1 and len(dataset.classes) == 10
    bank = list(dataset.labelled('train', 100, 32))
    assert sum(len(l) for _, l in bank) == 100 and bank[0][0].shape[1:] == (1, 32, 32)
    with pytest.raises(FileNotFoundError, match='cifar10 is not in .*--download'):
        load('cifar10', tiny_fashion)
    with pytest.raises(ValueError, match="'mnist' is not one of shapes, fashion_mnist"):
        load('mnist')


def test_spread_keeps_every_part():
    assert spread(torch.arange(10), 3).tolist() == [0, 4, 9] and spread(torch.arange(3), None).tolist() == [0, 1, 2]


@pytest.fixture
def photos(tmp_path):
    """train/val folders of two classes; one damaged file of 120."""
    g = torch.Generator().manual_seed(0)
    for split, count in (('train', 60), ('val', 10)):
        for kind in ('cat', 'dog'):
            (tmp_path / split / kind / 'deep').mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(0, 256, (50 + i % 7, 70, 3), generator=g, dtype=torch.uint8)
                Image.fromarray(pixels.numpy()).save(tmp_path / split / kind / 'deep' / f'{i:03}.jpg')
    return tmp_path


def folder_batches(dataset, count=3, workers=0, start=0):
    keys = batch_keys(len(dataset), 8, 0, start)
    batches = dataset.batches(keys, recipe('moco'), [32, 32], 0, 'cpu', workers)
    return [batch for batch, _ in zip(batches, range(count))]


def test_folder(photos):
    dataset = load('folder', photos)
    assert len(dataset) == 120 and dataset.classes == ('cat', 'dog')
    plain, workers, resumed = folder_batches(dataset), folder_batches(dataset, workers=2), folder_batches(dataset, 2, start=1)
    assert plain[0][0].shape == (8, 3, 32, 32) and plain[0][0].dtype == torch.uint8
    for a, b in zip(plain, workers):
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert all(torch.equal(x, y) for x, y in zip(plain[1], resumed[0]))
    views = make_views(plain[0], recipe('moco'), [32, 24], keyed_generator(0))
    assert views[1].shape == (8, 3, 24, 24)
    bank = list(dataset.labelled('train', None, 32))
    assert sum(len(l) for _, l in bank) == 120 and torch.cat([l for _, l in bank]).bincount().tolist() == [60, 60]


def test_folder_without_splits_or_labels(photos):
    whole = load('folder', photos / 'train')
    assert len(whole) == 120 and len(whole.labelled_ids('train')) == 108 and len(whole.labelled_ids('test')) == 12
    unlabelled = load('folder', photos / 'train' / 'cat')
    assert len(unlabelled) == 60 and unlabelled.classes == () and len(unlabelled.labelled_ids('train')) == 0


def test_unreadable_images_are_named_skipped_and_limited(photos, capsys):
    first = load('folder', photos).paths[0]
    first.write_bytes(first.read_bytes()[:200])
    dataset = load('folder', photos)
    batches = folder_batches(dataset, 30, workers=2)  # two epochs of 15 batches
    assert len(batches) == 30 and all(len(b[0]) == 8 for b in batches)
    printed = capsys.readouterr().out
    assert printed.count('unreadable image 1 skipped') == 1 and str(first) in printed
    dataset.paths[1].write_bytes(b'')
    with pytest.raises(ValueError, match='2 of 120 images cannot be read, over 1 %'):
        folder_batches(load('folder', photos), 30)


def test_missing_or_empty_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match='no folder .*nowhere'):
        load('folder', tmp_path / 'nowhere')
    with pytest.raises(FileNotFoundError, match='no images below'):
        load('folder', tmp_path)
