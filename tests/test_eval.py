"""eval.py against lightly, torch.optim and closed forms; its command on tiny data."""
import copy
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error, log_of
from lightly.utils.benchmarking.knn import knn_predict as lightly_knn
from PIL import Image
from timm.data import create_transform

from eval import (RATES, Recipe, Setting, features_of, finetune, fit_linear, knn_predict,
                  linear_sweep, main, training_batches)
from images.data import Images, load, read_crops
from images.views import Augmentation, keyed_generator
from vit import ViT


def clusters(n, seed, d=32, noise=2.5):
    """n points (n d) around ten centers, and the labels (n) of their centers."""
    centers = torch.randn(10, d, generator=keyed_generator('centers'))
    labels = torch.arange(n) % 10
    spread = torch.randn(n, d, generator=keyed_generator(seed))
    return centers[labels] + noise * spread, labels


def small_vit(in_chans=1, **settings):
    """Every call gives the same weights."""
    torch.manual_seed(0)
    return ViT(28, 4, in_chans, embed_dim=32, depth=1, num_heads=2, **settings)


@pytest.fixture(scope='module')
def fashion(tiny_fashion):
    """320 training and 60 test images of a bright square, whose place is the class."""
    return load('fashion_mnist', tiny_fashion)


# ---- nearest neighbours

def test_neighbours_vote_as_lightlys_in_chunks_of_any_size():
    bank, labels = clusters(2000, 0)
    queries, truth = clusters(500, 1)
    unit = [F.normalize(x, dim=1) for x in (queries, bank)]
    for k, chunk in ((1, 500), (20, 500), (20, 99)):
        theirs = lightly_knn(unit[0], unit[1].T, labels, 10, k, 0.07)[:, 0]
        assert torch.equal(knn_predict(queries, bank, labels, 10, k, chunk=chunk), theirs)
        assert 0.3 < (theirs == truth).float().mean() < 0.99


# ---- features

def test_features_are_the_class_tokens_of_whole_normalized_images():
    """28 px at patch size 5 are 30 px, 36 tokens. 310 images are two batches."""
    encoder = small_vit(in_chans=3)
    images = torch.randint(256, (310, 3, 28, 28), dtype=torch.uint8)
    data = Images('x', 'a', dict(train=torch.arange(1), test=torch.arange(310) % 10),
                  dict(train=images, test=images))
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    ids = torch.arange(310).flip(0)
    inputs = (encoder, data, 'test', ids, Setting(28, 5, mean, std))
    features, labels = features_of(*inputs)
    rendered = F.interpolate(images / 255, (30, 30), mode='bicubic', antialias=True).clamp(0, 1)
    channels = [(rendered[:, c] - mean[c]) / std[c] for c in range(3)]
    expected = encoder(torch.stack(channels, dim=1), patch_size=5)
    assert error(features, expected[ids]) < 1e-5
    assert torch.equal(labels, ids % 10)
    encoder.norm.bias.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match='features are not finite; check'):
        features_of(*inputs)


# ---- linear probe

def test_all_rates_at_once_equal_torchs_sgd():
    features, labels = clusters(300, 0, d=8)
    rates = (0.01, 0.3)
    for rate, weight in zip(rates, fit_linear(features, labels, 10, rates, 3, batch_size=64)):
        layer = torch.nn.Linear(8, 10, bias=False)
        torch.nn.init.zeros_(layer.weight)
        sgd = torch.optim.SGD(layer.parameters(), lr=rate * 64 / 256, momentum=0.9)
        decay = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=15)     # 3 times 5 batches
        for epoch in range(3):
            order = torch.randperm(300, generator=keyed_generator(0, 'probe', epoch))
            for ids in order.split(64):
                sgd.zero_grad()
                F.cross_entropy(layer(features[ids]), labels[ids]).backward()
                sgd.step()
                decay.step()
        assert error(weight, layer.weight) < 1e-5


def test_the_probe_finds_classes_and_chooses_its_rate_without_the_test_images():
    """On features of very unequal scales, as backbones have them. Ridge regression finds 99 %.

    Shuffled labels are met by chance, 10 +- 4 * 0.95 %. The images of one class alone, which have
    another mean than all, are met as well.
    """
    scale = torch.logspace(-3, 2, 32)
    x, labels = clusters(2000, 0, noise=0.8)
    queries, truth = clusters(1000, 1, noise=0.8)
    found = {}
    for name, some, y in (
        ('right', ..., truth),
        ('shuffled', ..., truth[torch.randperm(1000)]),
        ('alone', truth == 0, truth[truth == 0]),
    ):
        test = (scale * queries[some], y)
        found[name], best, held_out = linear_sweep((scale * x, labels), test, 10, 'cpu', 20)
        assert found.setdefault('chosen', (best, held_out)) == (best, held_out)
    assert found['right'] > 99 and found['alone'] > 97 and abs(found['shuffled'] - 10) < 4
    assert tuple(held_out) == RATES
    assert held_out[best] == max(held_out.values()) > 98


# ---- fine-tuning

def test_finetuning_learns_a_small_set_by_heart(fashion):
    """It moves all weights of a copy, frozen ones too, but for the fixed table of positions."""
    encoder = small_vit(freeze_patch_embed=True)
    before = copy.deepcopy(encoder.state_dict())
    recipe = Recipe(epochs=60, batch_size=20, lr=0.1, warmup=0.1, crop_scale=1.0, smoothing=0.0)
    ids = torch.arange(40)
    setting = Setting(28, 7, fashion.mean, fashion.std)
    tuned, head, losses = finetune(encoder, fashion, ids, setting, recipe)
    features, labels = features_of(tuned, fashion, 'train', ids, setting)
    assert 2 < losses[0] < 3                                                  # ln 10 = 2.3
    assert losses[-1] < 0.3
    assert torch.equal(head(features).argmax(dim=1), labels)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key])
        assert torch.equal(tuned.state_dict()[key], value) == (key == 'pos_embed'), key
    with pytest.raises(FloatingPointError, match='the loss of fine-tuning is not finite'):
        finetune(encoder, fashion, ids, setting, replace(recipe, epochs=2, lr=1e12))


# ---- command line

@pytest.fixture
def score(tmp_path, tiny_fashion, monkeypatch):
    """score(flags) calls eval.py beside a backbone.pt of ours and a timm.pth.

    It returns the lines of eval.jsonl.
    """
    monkeypatch.chdir(tmp_path)
    encoder = small_vit()
    torch.save(dict(model=encoder.state_dict(), config=encoder.config, mean=(0.3,), std=(0.3,),
                    dataset='fashion_mnist'), 'backbone.pt')
    torch.save(small_vit(in_chans=3, pos_embed='learned').state_dict(), 'timm.pth')

    def call(flags='', root=tiny_fashion):
        main(['--weights', 'backbone.pt', '--data-root', str(root), '--device', 'cpu',
              *flags.split()])
        return [json.loads(line) for file in Path().rglob('eval.jsonl') for line in file.open()]
    return call


def test_a_run_is_scored_as_in_training(run, score):
    """--weights takes the folder of a run. At such a rate the network hardly learns."""
    last = log_of(run('--budget', '0.0005', '--lr', '1e-6', '--name', 'a') / 'a')[-1]
    nearest, vote = score('--weights runs/a')
    assert (nearest['score'], vote['score']) == (last['nn'], last['knn'])
    assert last['knn'] < 100


def test_a_line_says_what_the_score_depends_on(score):
    """28 px in patches of 8: rendered at 32 px, 4 x 4 patches."""
    lines = score('--patch-size 4 8 --limit 100')
    assert [(line['name'], line['tokens']) for line in lines] == [
        ('NN', 50), ('20-NN', 50), ('NN', 17), ('20-NN', 17)]
    depends_on = dict(img_size=28, patch_size=8, mean=[0.3], std=[0.3], dataset='fashion_mnist',
                      weights='backbone.pt', bank=100, queries=60)
    assert depends_on.items() <= lines[3].items()


def test_what_cannot_be_scored_is_said(score):
    for flags, message in (
            ('--limit 19', '20 neighbours of a bank of 19 images; take more'),
            ('--weights timm.pth --num-heads 2', 'was trained on; add --dataset'),
            ('--patch-size 4 7 --export x.npz', 'features of one --patch-size')):
        with pytest.raises(ValueError, match=message):
            score(flags)


# ---- folders and exported features

def make_tree(*folders):
    """20 grey images in each folder, of a brightness of their own."""
    for i in range(20 * len(folders)):
        path = Path('tree', folders[i // 20], f'{i:03}.png')
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (80, 70), (3 * i,) * 3).save(path)
    return Path('tree')


FOLDER = '--weights timm.pth --num-heads 2 --dataset folder --workers 0 '


def test_finetuning_sees_the_crops_that_were_read(tmp_path):
    """One random crop an image, normalized, and nothing else."""
    path = tmp_path / 'x.png'
    Image.fromarray(torch.randint(256, (50, 70, 3)).byte().numpy()).save(path)
    labels = dict(train=torch.zeros(1, dtype=torch.long))
    data = Images('x', 'a', labels, files=dict(train=[path]), root=tmp_path)
    recipe = Recipe(epochs=1, batch_size=1, lr=1, warmup=0, crop_scale=0.5, smoothing=0)
    setting = Setting(32, 4, (0.5,) * 3, (0.1,) * 3)
    (images, _), = training_batches(data, torch.arange(1), setting, recipe, 0)
    view = Augmentation(32, scale=(0.5, 1.0), interpolation='bicubic')
    crop, = read_crops(path, 0, [view], 0, tmp_path)
    assert error(images[0], (crop / 255 - 0.5) / 0.1) < 1e-5


def test_scores_count_the_images_that_were_scored(score):
    """39 of 40 test images can be read."""
    tree = make_tree('train/a', 'train/b', 'val/a', 'val/b')
    (tree / 'val/b/069.png').write_bytes(b'')
    lines = score(FOLDER + '--protocol nn linear finetune', tree)
    assert [line['name'] for line in lines] == ['NN', 'linear', 'finetune']
    for line in lines:
        assert line['queries'] == 39 and line['mean'] == [0.485, 0.456, 0.406]
        assert line['score'] * 39 / 100 == pytest.approx(round(line['score'] * 39 / 100))


def test_export_of_a_folder_has_each_readable_image_once(score):
    """The features are of the files beside them, prepared as timm does by the transform."""
    tree = make_tree('a', 'b')
    (tree / 'a/007.png').write_bytes(b'damaged')
    assert score(FOLDER + '--export features.npz', tree) == []
    found = np.load('features.npz')
    files = [*found['train_files'], *found['test_files']]
    readable = {str(path) for path in tree.glob('*/*')} - {str(tree / 'a/007.png')}
    assert sorted(files) == sorted(readable)
    labels = [*found['train_labels'], *found['test_labels']]
    assert [Path(path).parent.name for path in files] == found['classes'][labels].tolist()
    transform = create_transform(**json.loads(str(found['transform'])))
    pictures = torch.stack([transform(Image.open(path)) for path in files])
    features = np.concatenate([found['train_features'], found['test_features']])
    encoder = small_vit(in_chans=3, pos_embed='learned')
    assert error(torch.tensor(features), encoder(pictures)) < 1e-5
