import copy
import json
import math
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking.knn import knn_predict as lightly_knn
from PIL import Image

import eval as evaluation
from data import MemoryImages, load
from eval import (Probe, Recipe, Setting, extract_features, finetune, fit_linear, knn_accuracy,
                  knn_predict, linear_sweep, split_features, training_batches)
from views import keyed_generator
from vit import ViT
from weights import save


def clusters(n, seed, d=32, noise=2.5):
    """n points (n d) around ten centers, and the labels (n) of their centers."""
    centers = torch.randn(10, d, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % 10
    spread = torch.randn(n, d, generator=torch.Generator().manual_seed(seed))
    return centers[labels] + noise * spread, labels


def shuffled(labels):
    return labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))]


def small_vit(**settings):
    torch.manual_seed(0)
    settings = dict(dict(img_size=28, patch_size=4, in_chans=1, depth=1), **settings)
    return ViT(embed_dim=32, num_heads=2, **settings)


@pytest.fixture(scope='module')
def fashion(tiny_fashion):
    """320 training and 60 test images of a bright square, whose place is the class."""
    return load('fashion_mnist', tiny_fashion)


def setting_of(data, **changes):
    values = dict(img_size=28, patch_size=4, mean=data.mean, std=data.std)
    return Setting(**dict(values, **changes), device=torch.device('cpu'))


# ---------------------------------------------------------------- nearest neighbours

@pytest.mark.parametrize('k', (1, 10, 20, 200))
def test_knn_equals_lightlys(k):
    bank, labels = clusters(2000, 0)
    queries, truth = clusters(500, 1)
    ours = knn_predict(queries, bank, labels, 10, k)
    their_bank = F.normalize(bank, dim=1).T
    theirs = lightly_knn(F.normalize(queries, dim=1), their_bank, labels, 10, k, 0.07)[:, 0]
    assert torch.equal(ours, theirs)
    assert 0.3 < (ours == truth).float().mean() < 0.99


def test_knn_equals_a_naive_loop():
    bank, labels = clusters(300, 0)
    queries, _ = clusters(50, 1)
    expected = []
    for query in queries.double():
        cosines = [float(F.cosine_similarity(query, row, dim=0)) for row in bank.double()]
        votes = [0.0] * 10
        for i in sorted(range(300), key=lambda i: -cosines[i])[:20]:
            votes[labels[i]] += math.exp(cosines[i] / 0.07)
        expected.append(votes.index(max(votes)))
    assert knn_predict(queries, bank, labels, 10).tolist() == expected


def test_votes_by_hand():
    """One copy votes exp(1 / T), two neighbours at a cosine of 0.9 vote 2 exp(0.9 / T).

    The copy wins where exp(0.1 / T) > 2, that is T < 0.144.
    """
    bank = torch.tensor([[1.0, 0.0], [0.9, 0.19 ** 0.5], [0.9, -0.19 ** 0.5]])
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[5.0, 0.0]])
    assert knn_predict(query, bank, labels, 2, k=3, temperature=0.14).item() == 0
    assert knn_predict(query, bank, labels, 2, k=3, temperature=0.15).item() == 1


def test_votes_do_not_overflow():
    """exp(1 / 0.001) is infinite in float32. At so low a temperature the nearest decides."""
    bank, labels = clusters(300, 0)
    queries, _ = clusters(99, 1)
    nearest = knn_predict(queries, bank, labels, 10, k=1)
    assert torch.equal(knn_predict(queries, bank, labels, 10, temperature=1e-3), nearest)


@pytest.mark.parametrize('chunk', (1, 7, 99, 10_000))
def test_knn_does_not_depend_on_the_chunk(chunk):
    bank, labels = clusters(300, 0)
    queries, _ = clusters(99, 1)
    expected = knn_predict(queries, bank, labels, 10)
    assert torch.equal(knn_predict(queries, bank, labels, 10, chunk=chunk), expected)


def test_the_nearest_copy_is_right_and_shuffled_labels_are_chance():
    bank, labels = clusters(5000, 0)
    assert torch.equal(knn_predict(bank, bank, labels, 10, k=1), labels)
    queries, truth = clusters(2000, 1)
    accuracy = (knn_predict(queries, bank, shuffled(labels), 10) == truth).float().mean()
    assert abs(accuracy - 0.1) < 4 * (0.1 * 0.9 / 2000) ** 0.5


# ---------------------------------------------------------------- features

def test_features_are_the_normalized_images_class_tokens():
    encoder = small_vit(in_chans=3)
    images = torch.rand(6, 3, 28, 28)
    labels = torch.arange(6)
    mean = (0.5, 0.4, 0.3)
    std = (0.2, 0.3, 0.4)
    channels = [(images[:, c] - mean[c]) / std[c] for c in range(3)]
    expected = encoder(torch.stack(channels, dim=1))
    for sizes in ([6], [1, 5], [2, 2, 2]):
        batches = zip(images.split(sizes), labels.split(sizes))
        features, found = extract_features(encoder, batches, mean, std, 'cpu')
        assert torch.equal(found, labels) and features.dtype == torch.float32
        assert (features - expected).abs().max() < 1e-6


def test_images_are_rendered_at_a_multiple_of_the_patch_size(fashion):
    """28 px at patch size 5 is 30 px, 36 tokens: the whole image, not 25 of its pixels."""
    encoder = small_vit()
    setting = setting_of(fashion, patch_size=5)
    assert setting.side == 30
    features, labels = split_features(encoder, fashion, 'test', torch.arange(60), setting)
    images = F.interpolate(fashion.test_images / 255, (30, 30), mode='bicubic', antialias=True)
    images = (images.clamp(0, 1) - fashion.mean[0]) / fashion.std[0]
    assert (features - encoder(images, patch_size=5)).abs().max() < 1e-5
    assert torch.equal(labels, fashion.test_labels)


@pytest.mark.parametrize('dtype, low, high', (
    (torch.float32, 0, 1e-6),
    (torch.bfloat16, 1e-4, 0.1),
))
def test_half_precision_changes_features_little(dtype, low, high, fashion):
    ids = torch.arange(60)
    encoder = small_vit()
    expected, _ = split_features(encoder, fashion, 'test', ids, setting_of(fashion))
    features, _ = split_features(encoder, fashion, 'test', ids, setting_of(fashion, dtype=dtype))
    assert features.dtype == torch.float32
    assert low <= (features - expected).abs().max() < high


def test_features_that_are_not_finite_stop(fashion):
    encoder = small_vit()
    encoder.norm.bias.data[3] = torch.nan
    with pytest.raises(FloatingPointError, match='of 320 of 320 images are not finite'):
        knn_accuracy(encoder, fashion, 28, 'cpu')


def random_states():
    numpy_state = np.random.get_state()[1].tolist()
    return random.getstate(), numpy_state, torch.get_rng_state().tolist()


@pytest.mark.parametrize('training', (True, False))
def test_scoring_during_a_run_leaves_no_trace(training, fashion):
    encoder = small_vit().train(training)
    before = copy.deepcopy(encoder.state_dict())
    states = random_states()
    found = knn_accuracy(encoder, fashion, 28, 'cpu', bank_limit=100, query_limit=30)
    assert random_states() == states
    assert found[1:] == (100, 30) and set(found[0]) == {1, 20}
    assert all(module.training == training for module in encoder.modules())
    assert all(torch.equal(before[key], value) for key, value in encoder.state_dict().items())


def test_knn_accuracy_counts_correct_predictions(fashion):
    """Bank and queries are the same images, so that the nearest neighbour is always right."""
    split = (fashion.images, fashion.labels)
    same = MemoryImages(*split, *split, fashion.classes)
    scores, bank, queries = knn_accuracy(small_vit(), same, 28, 'cpu', ks=(1, 5))
    assert scores[1] == 100 and 10 < scores[5] <= 100 and bank == queries == 320


@pytest.mark.parametrize('train, test, k, message', (
    ([-1, -1, -1], [0, 1], 1, 'the 0 labelled training images have fewer than two classes'),
    ([0, 0, -1], [0, 1], 1, 'the 2 labelled training images have fewer than two classes'),
    ([0, 1, 2], [-1, -1], 1, 'there are no labelled test images'),
    ([0, 1, 2], [0, 1], 4, 'k = 4 is more than the 3 images of the bank; lower --k'),
))
def test_data_that_cannot_be_scored(train, test, k, message):
    images = torch.zeros(3, 1, 28, 28, dtype=torch.uint8)
    data = MemoryImages(images, torch.tensor(train), images[:2], torch.tensor(test), tuple('abc'))
    with pytest.raises(ValueError, match=message):
        knn_accuracy(small_vit(), data, 28, 'cpu', ks=(1, k))


# ---------------------------------------------------------------- linear probe

def test_all_rates_at_once_equal_torchs_sgd():
    """The gradient in closed form against autograd and torch.optim.SGD, a rate at a time."""
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
        assert (weight - layer.weight).abs().max() < 1e-5
    assert (ours[0] - ours[1]).abs().max() > 0.01


def test_sweep_finds_the_classes_that_ridge_regression_finds():
    """(X^T X + I)^-1 X^T Y, on features of very unequal scales, as backbones have them."""
    x, labels = clusters(2000, 0, noise=0.8)
    queries, truth = clusters(1000, 1, noise=0.8)
    with_bias = F.pad(x, (0, 1), value=1.0)
    targets = F.one_hot(labels, 10).float()
    ridge = torch.linalg.solve(with_bias.T @ with_bias + torch.eye(33), with_bias.T @ targets)
    predicted = (F.pad(queries, (0, 1), value=1.0) @ ridge).argmax(dim=1)
    closed_form = 100 * (predicted == truth).float().mean().item()

    scale = torch.logspace(-3, 2, 32)
    probe = Probe(epochs=20)
    train = (x * scale, labels)
    test = (queries * scale, truth)
    score, best, held_out = linear_sweep(train, test, 10, probe, 'cpu')
    assert closed_form > 99 and score > 99
    assert tuple(held_out) == probe.rates and held_out[best] == max(held_out.values()) > 98


def test_sweep_chooses_without_the_test_images():
    x, labels = clusters(1000, 0)
    queries, truth = clusters(500, 1)
    probe = Probe(epochs=5)
    score, best, held_out = linear_sweep((x, labels), (queries, truth), 10, probe, 'cpu')
    chance, *chosen = linear_sweep((x, labels), (queries, shuffled(truth)), 10, probe, 'cpu')
    assert chosen == [best, held_out]
    assert score > 50 and abs(chance - 10) < 4 * (10 * 90 / 500) ** 0.5


def test_probe_and_finetuning_leave_the_backbone_alone(fashion):
    encoder = small_vit()
    before = copy.deepcopy(encoder.state_dict())
    ids = torch.arange(64)
    features = split_features(encoder, fashion, 'train', ids, setting_of(fashion))
    linear_sweep(features, features, 10, Probe(epochs=2, batch_size=32), 'cpu')
    model, _ = finetune(encoder, fashion, ids, setting_of(fashion), RECIPE)
    after = encoder.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert not encoder.pos_embed.requires_grad and model.encoder.pos_embed.requires_grad
    moved = {key for key, value in model.encoder.state_dict().items()
             if not torch.equal(value, before[key])}
    assert moved == set(before)


# ---------------------------------------------------------------- fine-tuning

RECIPE = Recipe(epochs=2, batch_size=16, lr=1e-2, warmup=0.25, crop_scale=0.9, smoothing=0.1)


def test_finetuning_learns_a_small_set_by_heart(fashion):
    recipe = Recipe(epochs=60, batch_size=20, lr=0.1, warmup=0.1, crop_scale=1.0, smoothing=0.0)
    ids = torch.arange(40)
    setting = setting_of(fashion, patch_size=7)
    model, losses = finetune(small_vit(depth=2), fashion, ids, setting, recipe)
    features, labels = split_features(model.encoder, fashion, 'train', ids, setting)
    assert 2 < losses[0] < 3 and losses[-1] < 0.1                             # ln 10 = 2.3
    assert torch.equal(model.head(features).argmax(dim=1), labels)


def test_finetuning_depends_on_its_seed_alone(fashion):
    def run(seed):
        torch.rand(1)                                                         # the global state
        ids = torch.arange(64)
        return finetune(small_vit(), fashion, ids, setting_of(fashion), RECIPE, seed)[1]
    assert run(0) == run(0) != run(1)


def test_finetunings_optimizer(fashion, monkeypatch):
    """64 images in batches of 16, 2 epochs: 8 steps. The highest rate is 1e-2 * 16 / 512 = 3.1e-4.

    It rises in the first quarter, 2 steps, and is multiplied by (1 + cos(pi step / 8)) / 2.
    """
    rates = []

    class Spy(torch.optim.AdamW):
        def step(self):
            rates.append([group['lr'] for group in self.param_groups])
            spies.append(self)
            return super().step()

    spies = []
    monkeypatch.setattr(torch.optim, 'AdamW', Spy)
    model, _ = finetune(small_vit(), fashion, torch.arange(64), setting_of(fashion), RECIPE)
    expected = [1e-2 * 16 / 512 * min(1, step / 2) * (1 + math.cos(math.pi * step / 8)) / 2
                for step in range(8)]
    assert rates == [[pytest.approx(rate)] * 2 for rate in expected]
    decay = {id(parameter): group['weight_decay'] for group in spies[0].param_groups
             for parameter in group['params']}
    decayed = {name for name, parameter in model.named_parameters() if decay[id(parameter)] == 0.05}
    assert decayed == {'encoder.patch_embed.proj.weight', 'encoder.blocks.0.attn.qkv.weight',
                       'encoder.blocks.0.attn.proj.weight', 'encoder.blocks.0.mlp.fc1.weight',
                       'encoder.blocks.0.mlp.fc2.weight', 'head.weight'}
    assert len(decay) == len(list(model.parameters()))


def test_an_epoch_shows_each_image_once_with_its_label():
    """Each image has a brightness that a crop keeps and jitter would not.

    50 images are 3 batches of 16, and two are left out.
    """
    brightness = torch.arange(50, dtype=torch.uint8) * 5
    images = brightness.view(50, 1, 1, 1).expand(50, 1, 28, 28).contiguous()
    data = MemoryImages(images, torch.arange(50), images, torch.arange(50), tuple('ab'))
    setting = setting_of(data, mean=(0.5,), std=(0.2,), patch_size=8)
    batches = list(training_batches(data, torch.arange(50), setting, RECIPE, seed=0))
    assert [tuple(crops.shape) for crops, _ in batches] == [(16, 1, 32, 32)] * 6
    for crops, labels in batches:
        shown = (crops * 0.2 + 0.5) * 255 / 5
        assert (shown - labels.view(-1, 1, 1, 1)).abs().max() < 0.01
    for epoch in (batches[:3], batches[3:]):
        assert len(torch.cat([labels for _, labels in epoch]).unique()) == 48
    assert not torch.equal(batches[0][1], batches[3][1])                      # another order
    assert batches[0][1].tolist() != sorted(batches[0][1].tolist())


def test_a_rate_that_is_too_high_stops_finetuning(fashion):
    recipe = Recipe(epochs=9, batch_size=16, lr=1e12, warmup=0.1, crop_scale=1.0, smoothing=0.0)
    with pytest.raises(FloatingPointError, match='the loss of step .* is nan; lower --lr'):
        finetune(small_vit(), fashion, torch.arange(64), setting_of(fashion), recipe)


# ---------------------------------------------------------------- command line

@pytest.fixture
def backbone(tmp_path):
    encoder = small_vit()
    path = tmp_path / 'backbone.pt'
    save(dict(model=encoder.state_dict(), config=encoder.config, mean=(0.3,), std=(0.3,),
              dataset='fashion_mnist'), path)
    return path


@pytest.fixture
def run(backbone, tiny_fashion, monkeypatch, capsys):
    """Runs eval.py with these flags, and returns what it printed and the lines of eval.jsonl."""
    def main(*flags, weights=backbone, root=tiny_fashion):
        flags = ['eval.py', '--weights', weights, '--data-root', root, '--device', 'cpu', *flags]
        monkeypatch.setattr('sys.argv', [str(flag) for flag in flags])
        evaluation.main()
        scores = weights.with_name('eval.jsonl')
        lines = scores.read_text().splitlines() if scores.is_file() else []
        captured = capsys.readouterr()
        return captured.out + captured.err, [json.loads(line) for line in lines]
    return main


def test_default_scores(run):
    printed, lines = run()
    assert [line['name'] for line in lines] == ['NN', '20-NN']
    assert 'patch size 4, 20-NN: ' in printed
    assert 'percent correct on 60 test images' in printed
    line = lines[1]
    assert line['score'] == pytest.approx(100 * round(line['score'] * 0.6) / 60)
    assert line['error'] == pytest.approx((line['score'] * (100 - line['score']) / 60) ** 0.5)
    depends_on = dict(k=20, temperature=0.07, img_size=28, patch_size=4, side=28, tokens=49, cost=1,
                      mean=[0.3], std=[0.3], precision='float32', dataset='fashion_mnist', bank=320,
                      queries=60, num_heads=2, seed=0)
    assert depends_on.items() <= line.items()


def test_table_over_patch_sizes(run):
    """28 px at 4, 7, 8: 7 x 7, 4 x 4 and, rendered at 32 px, 4 x 4 tokens."""
    printed, lines = run('--patch-size', 4, 7, 8, 7, '--protocol', 'knn', '--k', 5, 10)
    assert [(line['patch_size'], line['tokens'], line['side'], line['k']) for line in lines] == [
        (4, 49, 28, 5), (4, 49, 28, 10),
        (7, 16, 28, 5), (7, 16, 28, 10),
        (8, 16, 32, 5), (8, 16, 32, 10)]
    assert lines[0]['cost'] == 1 and 0.2 < lines[2]['cost'] < lines[4]['cost'] < 0.5
    table = [line.split() for line in printed.splitlines()[-4:]]
    assert table[0] == ['patch', 'tokens', 'cost', '5-NN', '10-NN']
    assert [row[0] for row in table[1:]] == ['4', '7', '8']
    assert table[3][3:] == [f'{lines[4]["score"]:.2f}', '+-', f'{lines[4]["error"]:.2f}',
                            f'{lines[5]["score"]:.2f}', '+-', f'{lines[5]["error"]:.2f}']


def test_trained_protocols(run):
    """The place of the square is the class: chance is 10 %, its standard error 3.9 %."""
    printed, lines = run('--protocol', 'linear', 'finetune', '--probe-epochs', 8, '--epochs', 4,
                         '--lr', 0.05, '--limit', 300, '--img-size', 32, '--seed', 3)
    linear, tuned = lines
    assert linear['score'] > 25 and tuned['score'] > 25
    assert linear['bank'] == 300 and len(linear['held_out']) == 10 and linear['epochs'] == 8
    assert str(linear['rate']) in linear['held_out'] and linear['side'] == 32
    assert tuned['losses'][-1] < tuned['losses'][0] and len(tuned['losses']) == 4
    assert tuned['batch_size'] == 64 and tuned['crop_scale'] == 0.9 and tuned['seed'] == 3
    assert 'training loss 2.' in printed


def test_output_elsewhere(run, tmp_path):
    _, beside = run('--protocol', 'nn', '-o', tmp_path / 'scores')
    assert beside == []
    run('--protocol', 'nn', '-o', tmp_path / 'scores')
    assert (tmp_path / 'scores').read_text().count('\n') == 2


def test_scores_that_cannot_be_written_are_printed(backbone, run):
    backbone.with_name('eval.jsonl').mkdir()
    printed, _ = run()
    assert 'NN            20-NN' in printed
    assert printed.count('cannot be written (Is a directory), so the scores are only printed') == 1


@pytest.mark.parametrize('flags, message', (
    (('--patch-size', 4, 29), '--patch-size 29 is larger than the images of 28 px'),
    (('--k', 999), 'k = 999 is more than the 320 images of the bank'),
    (('--limit', 10), 'k = 20 is more than the 10 images of the bank'),
    (('--num-heads', 4), 'it has 2 heads, not 4'),
    (('--mean', 0.5, 0.5), 'must be 1 numbers each'),
    (('--std', 1e-40), 'features of 320 of 320 images are not finite'),
    (('--export', 'a', '--patch-size', 4, 7), '--export writes the features of one --patch-size'),
    (('--export', '/nowhere/a.npz'), "'/nowhere/a.npz' cannot be written: No such file"),
    (('--encoder-prefix', 'teacher'), "--encoder-prefix of eval.py: 'model.'"),
))
def test_bad_input(flags, message, run):
    with pytest.raises((ValueError, FloatingPointError, OSError), match=message) as error:
        run(*flags)
    assert '\n' not in str(error.value)


@pytest.mark.parametrize('flags', (
    ('--k', 0),
    ('--std', 0),
    ('--std', 'nan'),
    ('--mean', 'nan'),
    ('--lr', 'inf'),
    ('--epochs', 1.5),
    ('--protocol', 'lda'),
    ('--patch-size', 0),
    ('--workers', -1),
    ('--precision', 'float16'),
))
def test_flags_of_the_wrong_type(flags, run, capsys):
    with pytest.raises(SystemExit) as error:
        run(*flags)
    assert error.value.code == 2
    assert f'argument {flags[0]}: ' in capsys.readouterr().err


def test_foreign_weights_need_a_data_set(run, tmp_path):
    torch.save(small_vit().state_dict(), tmp_path / 'timm.pth')
    with pytest.raises(ValueError, match='add --dataset, one of shapes, fashion_mnist'):
        run(weights=tmp_path / 'timm.pth')


# ---------------------------------------------------------------- folders and exported features

def make_tree(root, counts):
    """Grey images of a brightness of their own, counts: {'train/cat': 12, ...}."""
    shade = 0
    for folder, count in counts.items():
        (root / folder).mkdir(parents=True)
        for i in range(count):
            Image.new('RGB', (80, 70), (shade % 256,) * 3).save(root / folder / f'{i:03}.png')
            shade += 2
    return root


def rgb_vit():
    return small_vit(in_chans=3, img_size=32, pos_embed='learned')


@pytest.fixture
def rgb_weights(tmp_path):
    torch.save(rgb_vit().state_dict(), tmp_path / 'timm.pth')
    return tmp_path / 'timm.pth'


def test_images_of_other_channels(run, tmp_path):
    tree = make_tree(tmp_path / 'tree', {'a': 2, 'b': 2})
    with pytest.raises(ValueError, match='images of 1 channels, those of folder have 3'):
        run('--dataset', 'folder', root=tree)


def test_foreign_weights_on_a_folder(run, rgb_weights, tmp_path):
    folders = {'train/dark': 60, 'train/light': 60, 'val/dark': 4, 'val/light': 4}
    tree = make_tree(tmp_path / 'tree', folders)
    printed, lines = run('--dataset', 'folder', '--workers', 0, '--num-heads', 2,
                         '--protocol', 'nn', 'linear', 'finetune', '--probe-epochs', 10,
                         '--epochs', 2, '--batch-size', 16, weights=rgb_weights, root=tree)
    assert [line['name'] for line in lines] == ['NN', 'linear', 'finetune']
    assert lines[0]['mean'] == [0.485, 0.456, 0.406] and lines[0]['queries'] == 8
    assert '2 heads, learned positions' in printed


def test_export_of_a_set_in_memory(run, backbone, fashion, tmp_path):
    _, lines = run('--export', tmp_path / 'features.npz', '--patch-size', 7)
    assert lines == []                                                        # no scores
    found = np.load(tmp_path / 'features.npz')
    encoder = small_vit()
    setting = setting_of(fashion, patch_size=7, mean=(0.3,), std=(0.3,))
    for split in ('train', 'test'):
        expected, labels = split_features(encoder, fashion, split, fashion.ids(split), setting)
        assert np.array_equal(found[f'{split}_features'], expected.numpy())
        assert np.array_equal(found[f'{split}_labels'], labels.numpy())
    assert found['classes'].tolist() == list(fashion.classes) and 'train_files' not in found
    assert json.loads(str(found['settings']))['patch_size'] == 7


def test_export_of_an_unlabelled_tree_with_a_damaged_file(run, rgb_weights, tmp_path):
    tree = make_tree(tmp_path / 'tree', {'.': 0, 'photos': 120})
    (tree / 'photos' / '007.png').write_bytes(b'damaged')
    run('--export', tmp_path / 'features.npz', '--dataset', 'folder', '--workers', 0,
        '--num-heads', 2, weights=rgb_weights, root=tree)
    found = np.load(tmp_path / 'features.npz')
    names = found['train_files'].tolist()
    assert len(names) == 119 and 'photos/007.png' not in names and names[7] == 'photos/008.png'
    assert found['train_features'].shape == (119, 32) and set(found['train_labels']) == {-1}
    assert 'test_features' not in found

    # the features belong to the files beside them: image 8 has the brightness 16
    image = torch.full((1, 3, 32, 32), 16 / 255)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    expected = rgb_vit()((image - mean) / std)
    assert np.abs(found['train_features'][7] - expected[0].detach().numpy()).max() < 1e-5


def test_export_and_scores_together(run, tmp_path):
    _, lines = run('--export', tmp_path / 'features.npz', '--protocol', 'nn')
    assert [line['name'] for line in lines] == ['NN'] and (tmp_path / 'features.npz').exists()
