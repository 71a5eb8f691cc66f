"""eval.py against lightly, torch.optim and closed forms; its command on tiny data."""
import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import error
from lightly.utils.benchmarking.knn import knn_predict as lightly_knn
from PIL import Image

from data import MemoryImages, load
from eval import (Probe, Recipe, Setting, finetune, fit_linear, knn_accuracy, knn_predict,
                  linear_sweep, main, split_features, training_batches)
from views import keyed_generator
from vit import ViT
from weights import save

RECIPE = Recipe(epochs=2, batch_size=16, lr=1e-2, warmup=0.25, crop_scale=0.9, smoothing=0.1)


def clusters(n, seed, d=32, noise=2.5):
    """n points (n d) around ten centers, and the labels (n) of their centers."""
    centers = torch.randn(10, d, generator=keyed_generator('centers'))
    labels = torch.arange(n) % 10
    spread = torch.randn(n, d, generator=keyed_generator(seed))
    return centers[labels] + noise * spread, labels


def small_vit(in_chans=1, img_size=28, depth=1, **settings):
    """Every call gives the same weights."""
    torch.manual_seed(0)
    return ViT(img_size, 4, in_chans, embed_dim=32, depth=depth, num_heads=2, **settings)


@pytest.fixture(scope='module')
def fashion(tiny_fashion):
    """320 training and 60 test images of a bright square, whose place is the class."""
    return load('fashion_mnist', tiny_fashion)


def setting_of(data, **changes):
    setting = Setting(28, 4, data.mean, data.std, torch.device('cpu'))
    return replace(setting, **changes)


# ---- nearest neighbours

@pytest.mark.parametrize('k', (1, 10, 20, 200))
def test_knn_equals_lightlys(k):
    bank, labels = clusters(2000, 0)
    queries, truth = clusters(500, 1)
    ours = knn_predict(queries, bank, labels, 10, k)
    with pytest.raises(ValueError, match=f'k 0 must be from 1 to the {len(bank)} images'):
        knn_predict(queries, bank, labels, 10, 0)
    their_bank = F.normalize(bank, dim=1).T
    theirs = lightly_knn(F.normalize(queries, dim=1), their_bank, labels, 10, k, 0.07)[:, 0]
    assert torch.equal(ours, theirs)
    assert 0.3 < (ours == truth).float().mean() < 0.99


def test_votes_do_not_overflow_nor_depend_on_the_chunk():
    """exp(1 / 0.001) is infinite in float32. At so low a temperature the nearest decides."""
    bank, labels = clusters(300, 0)
    queries, _ = clusters(99, 1)
    nearest = knn_predict(queries, bank, labels, 10, k=1)
    assert torch.equal(knn_predict(queries, bank, labels, 10, temperature=1e-3), nearest)
    expected = knn_predict(queries, bank, labels, 10)
    for chunk in (1, 7, 99):
        assert torch.equal(knn_predict(queries, bank, labels, 10, chunk=chunk), expected)


# ---- features

def test_features_are_the_class_tokens_of_whole_normalized_images():
    """28 px at patch size 5 is 30 px, 36 tokens: the whole image, not 25 of its pixels.

    510 images are two batches.
    """
    encoder = small_vit(in_chans=3)
    images = torch.randint(256, (510, 3, 28, 28), dtype=torch.uint8)
    labels = torch.arange(510) % 10
    data = MemoryImages(images, labels, images, labels, tuple('ab'))
    setting = setting_of(data, patch_size=5, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.4))
    features, found = split_features(encoder, data, 'test', data.ids('test'), setting)
    rendered = F.interpolate(images / 255, (30, 30), mode='bicubic', antialias=True).clamp(0, 1)
    channels = [(rendered[:, c] - setting.mean[c]) / setting.std[c] for c in range(3)]
    expected = encoder(torch.stack(channels, dim=1), patch_size=5)
    assert error(features, expected) < 1e-5
    assert torch.equal(found, labels)


def test_half_precision_changes_features_little(fashion):
    encoder = small_vit()
    ids = torch.arange(60)
    half = setting_of(fashion, dtype=torch.bfloat16)
    expected, _ = split_features(encoder, fashion, 'test', ids, setting_of(fashion))
    features, _ = split_features(encoder, fashion, 'test', ids, half)
    assert features.dtype == torch.float32
    assert 1e-4 <= error(features, expected) < 0.1


def test_features_that_are_not_finite_stop(fashion):
    encoder = small_vit()
    encoder.norm.bias.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match='of 320 of 320 images are not finite; check'):
        knn_accuracy(encoder, fashion, 28, 'cpu')


@pytest.mark.parametrize('training', (True, False))
def test_scoring_during_a_run_counts_and_leaves_no_trace(training, fashion):
    """The 30 queries are images of the bank too, so that the nearest neighbour is always right."""
    split = (fashion.images, fashion.labels)
    same = MemoryImages(*split, *split, fashion.classes)
    encoder = small_vit().train(training)
    before = copy.deepcopy(encoder.state_dict())
    random_state = torch.get_rng_state()
    scores, *sizes = knn_accuracy(encoder, same, 28, 'cpu', bank_limit=100, query_limit=30)
    assert sizes == [100, 30]
    assert scores == {1: 100, 20: pytest.approx(50, abs=40)}
    assert torch.equal(torch.get_rng_state(), random_state)
    assert all(module.training == training for module in encoder.modules())
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


@pytest.mark.parametrize('train, test, message', (
    ([-1, -1, -1], [0, 1], 'the 0 labelled training images have fewer than two classes; put'),
    ([0, 0, -1], [0, 1], 'the 2 labelled training images have fewer than two classes; put'),
    ([0, 1, 2], [-1, -1], 'no labelled test images; their folders must have the names'),
    ([0, 1, 2], [0, 1], 'k = 4 is more than the 3 images of the bank; lower --k'),
))
def test_data_that_cannot_be_scored(train, test, message):
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    data = MemoryImages(images, torch.tensor(train), images[:2], torch.tensor(test), tuple('abc'))
    with pytest.raises(ValueError, match=message):
        knn_accuracy(small_vit(), data, 28, 'cpu', ks=(1, 4))


# ---- linear probe

def test_all_rates_at_once_equal_torchs_sgd():
    features, labels = clusters(300, 0, d=8)
    probe = Probe(rates=(0.01, 0.3), epochs=3, batch_size=64)
    ours = fit_linear(features, labels, 10, probe)
    for rate, weight in zip(probe.rates, ours):
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
    assert error(*ours) > 0.01


def test_sweep_finds_the_classes():
    """On features of very unequal scales, as backbones have them. Ridge regression finds 99 %."""
    scale = torch.logspace(-3, 2, 32)
    x, labels = clusters(2000, 0, noise=0.8)
    queries, truth = clusters(1000, 1, noise=0.8)
    test = (scale * queries, truth)
    score, best, held_out = linear_sweep((scale * x, labels), test, 10, Probe(epochs=20), 'cpu')
    assert score > 99
    assert tuple(held_out) == Probe.rates
    assert held_out[best] == max(held_out.values()) > 98


def test_sweep_chooses_without_the_test_images():
    train = clusters(1000, 0)
    queries, truth = clusters(500, 1)
    shuffled = truth[torch.randperm(500)]
    (score, *chosen), (chance, *again) = (
        linear_sweep(train, (queries, labels), 10, Probe(epochs=5), 'cpu')
        for labels in (truth, shuffled))
    assert again == chosen
    assert score > 50
    assert abs(chance - 10) < 4 * (10 * 90 / 500) ** 0.5


# ---- fine-tuning

def test_finetuning_learns_a_small_set_by_heart(fashion):
    """It moves all weights of a copy, but for the fixed table of positions."""
    encoder = small_vit(depth=2)
    before = copy.deepcopy(encoder.state_dict())
    recipe = Recipe(epochs=60, batch_size=20, lr=0.1, warmup=0.1, crop_scale=1.0, smoothing=0.0)
    ids = torch.arange(40)
    setting = setting_of(fashion, patch_size=7)
    model, losses = finetune(encoder, fashion, ids, setting, recipe)
    features, labels = split_features(model.encoder, fashion, 'train', ids, setting)
    assert 2 < losses[0] < 3                                                  # ln 10 = 2.3
    assert losses[-1] < 0.1
    assert torch.equal(model.head(features).argmax(dim=1), labels)
    assert not encoder.pos_embed.requires_grad
    tuned = model.encoder.state_dict()
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key])
        assert torch.equal(tuned[key], value) == (key == 'pos_embed'), key


def test_finetuning_depends_on_its_seed_alone(fashion):
    encoder = small_vit()

    def losses(seed):
        return finetune(encoder, fashion, torch.arange(64), setting_of(fashion), RECIPE, seed)[1]
    assert losses(0) == losses(0) != losses(1)


def test_finetunings_optimizer(fashion, monkeypatch):
    """64 images in batches of 16, 2 epochs: 8 steps. The highest rate is 1e-2 * 16 / 512 = 3.1e-4.

    It rises in the first quarter, 2 steps, and is multiplied by (1 + cos(pi step / 8)) / 2.
    """
    rates = []
    decay = {}

    class Spy(torch.optim.AdamW):
        def step(self):
            rates.append([group['lr'] for group in self.param_groups])
            for group in self.param_groups:
                decay.update({id(p): group['weight_decay'] for p in group['params']})
            return super().step()

    monkeypatch.setattr(torch.optim, 'AdamW', Spy)
    model, _ = finetune(small_vit(), fashion, torch.arange(64), setting_of(fashion), RECIPE)
    expected = [1e-2 * 16 / 512 * min(1, step / 2) * (1 + math.cos(math.pi * step / 8)) / 2
                for step in range(8)]
    assert rates == [[pytest.approx(rate)] * 2 for rate in expected]
    for name, parameter in model.named_parameters():
        is_matrix = name.endswith('weight') and 'norm' not in name
        assert decay[id(parameter)] == (0.05 if is_matrix else 0), name


def test_an_epoch_shows_each_image_once_with_its_label():
    """Each image has a brightness that a crop keeps. Of 50, 3 batches of 16 leave two out."""
    ids = torch.arange(50)
    brightness = 5 * ids.byte()
    images = brightness.view(50, 1, 1, 1).expand(50, 1, 28, 28).contiguous()
    data = MemoryImages(images, ids, images, ids, tuple('ab'))
    setting = setting_of(data, mean=(0.5,), std=(0.2,), patch_size=8)
    batches = list(training_batches(data, ids, setting, RECIPE, seed=0))
    assert [tuple(crops.shape) for crops, _ in batches] == [(16, 1, 32, 32)] * 6
    for crops, labels in batches:
        shown = (crops * 0.2 + 0.5) * 255 / 5
        assert error(shown, labels.view(-1, 1, 1, 1)) < 0.01
    first, second = torch.cat([labels for _, labels in batches]).split(48)
    assert len(first.unique()) == len(second.unique()) == 48
    assert not torch.equal(first, second)                                     # another order
    assert not torch.equal(first, first.sort().values)


def test_a_rate_that_is_too_high_stops_finetuning(fashion):
    recipe = replace(RECIPE, epochs=9, lr=1e12)
    with pytest.raises(FloatingPointError, match='the loss of step .* is nan; lower --lr'):
        finetune(small_vit(), fashion, torch.arange(64), setting_of(fashion), recipe)


# ---- command line

@pytest.fixture
def run(tmp_path, tiny_fashion, monkeypatch, capsys):
    """run(flags) calls eval.py beside a backbone.pt of ours and a timm.pth.

    It returns what was printed and the lines of eval.jsonl.
    """
    monkeypatch.chdir(tmp_path)
    encoder = small_vit()
    save(dict(model=encoder.state_dict(), config=encoder.config, mean=(0.3,), std=(0.3,),
              dataset='fashion_mnist'), 'backbone.pt')
    torch.save(rgb_vit().state_dict(), 'timm.pth')

    def call(flags='', weights='backbone.pt', root=tiny_fashion):
        argv = ['eval.py', '--weights', weights, '--data-root', str(root), '--device', 'cpu']
        monkeypatch.setattr('sys.argv', [*argv, *flags.split()])
        main()
        captured = capsys.readouterr()
        lines = []
        if Path('eval.jsonl').is_file():
            lines = [json.loads(line) for line in open('eval.jsonl')]
        return captured.out + captured.err, lines
    return call


def rgb_vit():
    return small_vit(in_chans=3, img_size=32, pos_embed='learned')


def test_default_scores(run):
    printed, lines = run()
    assert [line['name'] for line in lines] == ['NN', '20-NN']
    assert 'percent correct on 60 test images' in printed
    depends_on = dict(k=20, temperature=0.07, img_size=28, patch_size=4, side=28, tokens=50, cost=1,
                      mean=[0.3], std=[0.3], precision='float32', dataset='fashion_mnist', bank=320,
                      queries=60, num_heads=2, seed=0)
    assert depends_on.items() <= lines[1].items()
    share = lines[1]['score'] / 100
    assert share == pytest.approx(round(60 * share) / 60)
    assert lines[1]['error'] == pytest.approx(100 * (share * (1 - share) / 60) ** 0.5)


def test_table_over_patch_sizes(run):
    """28 px at 4, 7, 8: 7 x 7, 4 x 4 and, rendered at 32 px, 4 x 4 patches."""
    printed, lines = run('--patch-size 4 7 8 7 --protocol knn --k 5 10')
    sizes = [(line['patch_size'], line['tokens'], line['side']) for line in lines]
    assert sizes[::2] == sizes[1::2] == [(4, 50, 28), (7, 17, 28), (8, 17, 32)]
    assert lines[0]['cost'] == 1
    assert 0.2 < lines[2]['cost'] < lines[4]['cost'] < 0.5
    header, *rows = [line.split() for line in printed.splitlines()[-4:]]
    assert header == ['patch', 'tokens', 'cost', '5-NN', '10-NN']
    assert [row[0] for row in rows] == ['4', '7', '8']
    cells = [f'{line["score"]:.2f} +- {line["error"]:.2f}' for line in lines[4:]]
    assert rows[2][3:] == ' '.join(cells).split()


def test_trained_protocols(run):
    """The place of the square is the class: chance is 10 %, its standard error 3.9 %."""
    printed, (linear, tuned) = run('--protocol linear finetune --probe-epochs 8 --epochs 4 '
                                   '--lr 0.05 --limit 300 --img-size 32 --seed 3')
    assert dict(bank=300, epochs=8, side=32).items() <= linear.items()
    assert linear['score'] > 25
    assert len(linear['held_out']) == 10
    assert str(linear['rate']) in linear['held_out']
    assert dict(batch_size=64, crop_scale=0.9, seed=3).items() <= tuned.items()
    assert tuned['score'] > 25
    assert len(tuned['losses']) == 4
    assert tuned['losses'][-1] < tuned['losses'][0]
    assert 'training loss 2.' in printed


def test_output_elsewhere(run):
    for count in (1, 2):
        _, beside = run('--protocol nn -o scores')
        assert beside == []
        assert Path('scores').read_text().count('\n') == count


def test_scores_that_cannot_be_written_are_printed(run):
    Path('eval.jsonl').mkdir()
    printed, _ = run()
    assert 'NN            20-NN' in printed
    assert printed.count('cannot be written (Is a directory), so the scores are only printed') == 1


@pytest.mark.parametrize('flags, message', (
    ('--patch-size 4 29', '--patch-size 29 is larger .* lower it, or raise --img-size'),
    ('--k 999', 'k = 999 is more than the 320 images'),
    ('--limit 10', 'k = 20 is more than the 10 images'),
    ('--num-heads 4', 'it has 2 heads, not 4'),
    ('--mean 0.5 0.5', 'must be 1 numbers each'),
    ('--export a --patch-size 4 7', '--export writes the features of one --patch-size'),
    ('--export a --limit 10', '--limit is for the scores, --export writes all'),
    ('--export /nowhere/a.npz', "'/nowhere/a.npz' cannot be written: No such file"),
    ('--encoder-prefix teacher', "--encoder-prefix of eval.py: 'model.'"),
    ('--weights timm.pth', 'add --dataset, one of shapes, fashion_mnist'),
    ('--weights timm.pth --dataset fashion_mnist', '3 channels, .* 1; choose another --dataset'),
))
def test_bad_input(flags, message, run):
    with pytest.raises((ValueError, FloatingPointError, OSError), match=message) as failure:
        run(flags)
    assert '\n' not in str(failure.value)


@pytest.mark.parametrize('flags', (
    '--k 0', '--std 0', '--std nan', '--mean nan', '--lr inf', '--epochs 1.5', '--protocol lda',
    '--patch-size 0', '--workers -1', '--precision float16',
))
def test_flags_of_the_wrong_type(flags, run, capsys):
    with pytest.raises(SystemExit) as stop:
        run(flags)
    assert stop.value.code == 2
    assert f'argument {flags.split()[0]}: ' in capsys.readouterr().err


# ---- folders and exported features

def make_tree(counts):
    """Grey images of a brightness of their own, counts: {'train/cat': 12, ...}."""
    root = Path('tree')
    shade = 0
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (80, 70), (shade % 256,) * 3).save(root / folder / f'{i:03}.png')
            shade += 2
    return root


ON_FOLDER = '--dataset folder --workers 0 --num-heads 2 '


def test_foreign_weights_on_a_folder(run):
    tree = make_tree({'train/dark': 60, 'train/light': 60, 'val/dark': 4, 'val/light': 4})
    printed, lines = run(ON_FOLDER + '--protocol nn linear finetune --probe-epochs 10 '
                         '--epochs 2 --batch-size 16', 'timm.pth', tree)
    assert [line['name'] for line in lines] == ['NN', 'linear', 'finetune']
    assert lines[0]['mean'] == [0.485, 0.456, 0.406]
    assert lines[0]['queries'] == 8
    assert '2 heads, learned positions' in printed


def test_export_of_a_set_in_memory(run, fashion):
    _, lines = run('--export features.npz --patch-size 7 --protocol nn')
    assert [line['name'] for line in lines] == ['NN']
    found = np.load('features.npz')
    setting = setting_of(fashion, patch_size=7, mean=(0.3,), std=(0.3,))
    for split in ('train', 'test'):
        expected, labels = split_features(small_vit(), fashion, split, fashion.ids(split), setting)
        assert np.array_equal(found[f'{split}_features'], expected.numpy())
        assert np.array_equal(found[f'{split}_labels'], labels.numpy())
    assert found['classes'].tolist() == list(fashion.classes)
    assert 'train_files' not in found
    assert json.loads(str(found['settings']))['patch_size'] == 7


def test_export_of_an_unlabelled_tree_with_a_damaged_file(run):
    tree = make_tree({'photos': 120})
    (tree / 'photos' / '007.png').write_bytes(b'damaged')
    _, lines = run(ON_FOLDER + '--export features.npz', 'timm.pth', tree)
    assert lines == []                                                        # no scores
    found = np.load('features.npz')
    names = found['train_files'].tolist()
    assert len(names) == 119
    assert names[6:8] == ['photos/006.png', 'photos/008.png']
    assert found['train_features'].shape == (119, 32)
    assert set(found['train_labels']) == {-1}
    assert 'test_features' not in found

    # the features belong to the files beside them: image 8 has the brightness 16
    image = torch.full((1, 3, 32, 32), 16 / 255)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = rgb_vit()((image - mean) / std)
    assert error(torch.tensor(found['train_features'][7]), expected[0]) < 1e-5
