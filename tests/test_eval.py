import argparse
import copy
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch
import torch.nn.functional as F
from lightly.utils.benchmarking.knn import knn_predict as lightly_knn

import data
import eval as evaluation
from eval import Classifier, extract_features, fit_linear, knn_predict, layer_groups, linear_sweep, load_backbone
from vit import Block, ViT, sincos_table


def clusters(n, seed, d=32, classes=10, noise=2.5):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    return centers[labels] + noise * torch.randn(n, d, generator=g), labels


@pytest.mark.parametrize('k', (1, 10, 20, 200))
def test_knn_predictions_equal_lightlys(k):
    (bank, labels), (queries, truth) = clusters(2000, 0), clusters(500, 1)
    ours = knn_predict(queries, bank, labels, 10, k, 0.07)
    normal = torch.nn.functional.normalize
    theirs = lightly_knn(normal(queries, dim=1), normal(bank, dim=1).T, labels, 10, k, 0.07)[:, 0]
    assert torch.equal(ours, theirs)
    assert 0.3 < (ours == truth).float().mean() < 0.99


def test_votes_do_not_overflow_at_a_low_temperature():
    (bank, labels), (queries, _) = clusters(300, 0), clusters(99, 1)
    assert torch.equal(knn_predict(queries, bank, labels, 10, 20, 1e-3), knn_predict(queries, bank, labels, 10, 1))


@pytest.mark.parametrize('chunk', (1, 7, 99, 10_000))
def test_knn_does_not_depend_on_the_chunk(chunk):
    (bank, labels), (queries, _) = clusters(300, 0), clusters(99, 1)
    assert torch.equal(knn_predict(queries, bank, labels, 10, chunk=chunk), knn_predict(queries, bank, labels, 10))


def test_nearest_copy_is_always_right_and_shuffled_labels_are_chance():
    bank, labels = clusters(5000, 0)
    assert torch.equal(knn_predict(bank, bank, labels, 10, k=1), labels)
    shuffled = labels[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    queries, truth = clusters(2000, 1)
    accuracy = (knn_predict(queries, bank, shuffled, 10) == truth).float().mean()
    assert abs(accuracy - 0.1) < 4 * (0.09 / 2000) ** 0.5


def test_vote_weights_by_hand():
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.9, 0.435889894], [0.9, -0.435889894]]), dim=1)
    # one copy votes exp(1/T), two neighbours at cosine 0.9 vote 2 exp(.9/T): the copy wins below T = .1/ln 2
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0]])
    assert knn_predict(query, bank, labels, 2, 3, temperature=0.07).item() == 0
    assert knn_predict(query, bank, labels, 2, 3, temperature=0.2).item() == 1


def test_features_are_of_all_tokens_and_leave_the_mode():
    encoder = ViT(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    images = torch.rand(5, 3, 16, 16)
    features, labels = extract_features(encoder, [(images, torch.arange(5))], (0.5,) * 3, (0.2,) * 3, 'cpu')
    assert encoder.training and torch.equal(labels, torch.arange(5))
    assert (features - encoder((images - 0.5) / 0.2)).abs().max() < 1e-6


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    encoder = ViT(img_size=28, patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=2)
    path = tmp_path / 'backbone.pt'
    torch.save(dict(model=encoder.state_dict(), sizes=encoder.sizes, mean=(0.3,), std=(0.3,), dataset='fashion_mnist'), path)
    return path


def run(monkeypatch, *flags):
    monkeypatch.setattr('sys.argv', ['eval.py', *map(str, flags)])
    evaluation.main()


def test_command_line(backbone, tiny_fashion, monkeypatch, capsys):
    run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--k', 10, 20)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ('28 px', 'patch size 4', '49 tokens', 'bank 320', '60 test images', 'T 0.07', '20-NN'))
    lines = [json.loads(line) for line in backbone.with_name('eval.jsonl').read_text().splitlines()]
    assert [line['k'] for line in lines] == [1, 10, 20] and all(0 <= line['score'] <= 100 for line in lines)
    run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--patch-size', 7, '--protocol', 'nn')
    assert '16 tokens' in capsys.readouterr().out


def lines_of(backbone):
    return [json.loads(line) for line in backbone.with_name('eval.jsonl').read_text().splitlines()]


def test_half_bank_moves_few_predictions():
    (bank, labels), (queries, _) = clusters(2000, 0), clusters(500, 1)
    full, half = (knn_predict(queries, bank, labels, 10, half=half) for half in (False, True))
    assert (full == half).float().mean() > 0.98


# ---------------------------------------------------------------- linear probe

def test_batched_sgd_equals_torchs():
    """The closed-form gradient of all rates at once against autograd and torch.optim.SGD, one rate at a time."""
    features, labels = clusters(300, 0, d=8)
    rates = [0.01, 0.3]
    ours = fit_linear(features, labels, 10, rates, epochs=3, batch_size=64)
    for rate, weight in zip(rates, ours):
        layer = torch.nn.Linear(8, 10, bias=False)
        torch.nn.init.zeros_(layer.weight)
        sgd = torch.optim.SGD(layer.parameters(), lr=rate * 64 / 256, momentum=0.9)
        cosine = torch.optim.lr_scheduler.CosineAnnealingLR(sgd, T_max=15)
        for epoch in range(3):
            for part in torch.randperm(300, generator=data.keyed_generator(0, 'probe', epoch)).split(64):
                sgd.zero_grad()
                F.cross_entropy(layer(features[part]), labels[part]).backward()
                # SGD scales the velocity by today's rate, as ours does
                sgd.step()
                cosine.step()
        assert (weight - layer.weight).abs().max() < 1e-5
    assert (ours[0] - ours[1]).abs().max() > 0.01


def test_linear_sweep_finds_the_classes_that_ridge_finds():
    """Against the closed form (X^T X + I)^-1 X^T Y, on features of very unequal scale, as backbones have them."""
    scale = torch.logspace(-3, 2, 32)
    (x, labels), (queries, truth) = clusters(2000, 0, noise=0.8), clusters(1000, 1, noise=0.8)
    ones = torch.nn.functional.pad
    ridge = torch.linalg.solve(ones(x, (0, 1), value=1.0).T @ ones(x, (0, 1), value=1.0) + torch.eye(33),
                               ones(x, (0, 1), value=1.0).T @ F.one_hot(labels, 10).float())
    predicted = (ones(queries, (0, 1), value=1.0) @ ridge).argmax(dim=1)
    closed_form = 100 * (predicted == truth).float().mean().item()
    score, best, held_out = linear_sweep((x * scale, labels), (queries * scale, truth), [], 10, evaluation.PROBE_RATES, 20, 256, 'cpu')
    assert closed_form > 99 and score > 99 and set(held_out) == set(evaluation.PROBE_RATES) and held_out[best] > 98
    shuffled = labels[torch.randperm(2000, generator=torch.Generator().manual_seed(0))]
    score, *_ = linear_sweep((x, shuffled), (queries, truth), [x], 10, [0.1], 5, 256, 'cpu')
    assert score < 30  # chance is 10; a linear classifier fits some of the noise


@pytest.mark.parametrize('recipe', ('sweep', 'moco-v3'))
def test_linear_probe_leaves_the_backbone_alone(recipe, backbone, tiny_fashion, monkeypatch, capsys):
    before = backbone.read_bytes()
    more = ('--probe-crops', 1) if recipe == 'sweep' else ()
    run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--protocol', 'linear', '--probe-recipe', recipe,
        '--probe-epochs', 8, '--probe-batch', 32, '--patch-size', 4, 14, *more)
    printed = capsys.readouterr().out
    assert 'unchanged, bit for bit' in printed and before == backbone.read_bytes()
    lines = lines_of(backbone)
    assert [(line['patch_size'], line['tokens'], line['cost'] < 1) for line in lines] == [(4, 49, False), (14, 4, True)]
    if recipe == 'sweep':
        assert lines[0]['score'] > 25  # the square's place is the class, which crops hide; chance is 10 +- 3.9
        assert len(lines[0]['held_out']) == 10 and 'rate 0.01 ' in printed
    else:
        assert lines[0]['losses'][-1] < lines[0]['losses'][0]


def test_a_probe_that_moves_the_backbone_is_stopped(backbone, tiny_fashion, monkeypatch):
    def careless(encoder, *args, **kwargs):
        encoder.norm.bias.data += 1e-7
        return Classifier(encoder, 10, 4), [0.0]
    monkeypatch.setattr(evaluation, 'probe_moco', careless)
    with pytest.raises(RuntimeError, match='changed the backbone'):
        run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--protocol', 'linear', '--probe-recipe', 'moco-v3')


# ---------------------------------------------------------------- fine-tuning

def test_finetuning_loss_falls(backbone, tiny_fashion, monkeypatch, capsys):
    run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--protocol', 'finetune', '--epochs', 6, '--batch-size', 16,
        '--lr', 0.1, '--crop-scale', 1)
    losses = lines_of(backbone)[0]['losses']
    assert losses[-1] < losses[0] - 0.3 and lines_of(backbone)[0]['score'] > 30
    assert 'training loss by epoch' in capsys.readouterr().out


def test_all_of_deits_augmentations_run(backbone, tiny_fashion, monkeypatch, capsys):
    run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--protocol', 'finetune', '--epochs', 1, '--mixup', 0.8,
        '--cutmix', 1, '--randaugment', 9, '--erasing', 0.25, '--ema', 0.5, '--batch-size', 16, '--layer-decay', 0.65, '--patch-size', 7, '--limit', 100)
    line = lines_of(backbone)[0]
    assert line['bank'] == 100 and line['mixup'] == 0.8 and 1 < line['losses'][0] < 4
    assert 'grey images' in capsys.readouterr().out


def test_augmentations_of_an_image_depend_on_seed_epoch_and_image_alone():
    from torchvision.transforms import v2
    image, augment = torch.randint(0, 255, (3, 16, 16), dtype=torch.uint8), v2.RandAugment(2, 27)
    before = torch.random.get_rng_state()
    draws = [evaluation.augmented(image, augment, *key) for key in ((0, 1, 2), (0, 1, 2), (0, 2, 2), (0, 1, 3), (1, 1, 2))]
    assert torch.equal(torch.random.get_rng_state(), before) and torch.equal(draws[0], draws[1])
    assert sum(torch.equal(draws[0], other) for other in draws[2:]) < 2


def test_drop_path_leaves_out_whole_branches_and_only_in_training():
    torch.manual_seed(0)
    block, x = Block(16, 2, 4.0), torch.randn(400, 5, 16)
    block.attn = torch.nn.Identity()
    block.norm1 = torch.nn.Identity()
    torch.nn.init.zeros_(block.mlp.fc2.weight)
    torch.nn.init.zeros_(block.mlp.fc2.bias)
    plain = block(x)
    block.drop_path = 0.25
    dropped = block(x)
    assert torch.equal(plain, 2 * x) and torch.equal(block.eval()(x), plain)
    factor = (dropped / x - 1).mean(dim=(1, 2))          # per sample: 0 or 1 / 0.75
    kept = factor > 0.5
    assert (factor[kept] - 4 / 3).abs().max() < 1e-3 and factor[~kept].abs().max() < 1e-3
    assert abs(kept.float().mean() - 0.75) < 4 * (0.25 * 0.75 / 400) ** 0.5


def test_layer_decay_and_weight_decay_by_name():
    model = Classifier(ViT(img_size=16, patch_size=4, embed_dim=32, depth=3, num_heads=2), 10, 4)
    groups = layer_groups(model, 0.05, 0.5)
    of = {id(p): (group['scale'], group['weight_decay']) for group in groups for p in group['params']}
    named = {name: of[id(p)] for name, p in model.named_parameters()}
    assert named['head.weight'] == (1, 0.05) and named['head.bias'] == (1, 0) and named['encoder.norm.weight'] == (1, 0)
    assert named['encoder.blocks.2.attn.qkv.weight'] == (0.5, 0.05) and named['encoder.blocks.0.mlp.fc1.bias'] == (0.125, 0)
    assert named['encoder.patch_embed.proj.weight'] == (0.0625, 0.05) and named['encoder.cls_token'] == named['encoder.pos_embed'] == (0.0625, 0)


# ---------------------------------------------------------------- weights in and out

def timm_vit(embed_dim=128, num_heads=2, **settings):
    torch.manual_seed(0)
    return timm.create_model('vit_tiny_patch16_224', img_size=32, patch_size=8, embed_dim=embed_dim, depth=2, num_heads=num_heads,
                             **{**dict(num_classes=0), **settings}).eval()


def prefixed(prefix, tensors):
    return {prefix + key: value for key, value in tensors.items()}


MOCO_HEAD = {f'head.{i}': torch.zeros(4) for i in ('0.weight', '1.weight', '1.bias', '1.running_mean', '3.weight', '6.weight')}
DINO_HEAD = {f'head.{i}': torch.zeros(4) for i in ('mlp.0.weight', 'mlp.0.bias', 'last_layer.weight_g', 'last_layer.weight_v')}


def layouts(tensors):
    """The files as they are released: known keys, other parts with wrong weights where a loader could take them."""
    wrong = {key: value + 1 for key, value in tensors.items()}
    moco = {**prefixed('module.base_encoder.', {**tensors, **MOCO_HEAD}), **prefixed('module.momentum_encoder.', {**wrong, **MOCO_HEAD}),
            **prefixed('module.predictor.', {'0.weight': torch.zeros(4)})}
    dino = dict(student={**prefixed('module.backbone.', wrong), **prefixed('module.', DINO_HEAD)},
                teacher={**prefixed('backbone.', tensors), **DINO_HEAD}, epoch=100, dino_loss=dict(center=torch.zeros(1, 4)))
    return dict(timm=tensors, with_head={**tensors, 'head.weight': torch.zeros(5, 128), 'head.bias': torch.zeros(5)},
                moco=dict(epoch=300, arch='vit_small', state_dict=moco, optimizer=dict(state={})), dino=dino,
                student=dict(student=prefixed('module.backbone.', tensors)), mae=dict(model=tensors),
                lincls=dict(state_dict=prefixed('module.', {**tensors, 'head.weight': torch.zeros(5, 128)})))


@pytest.mark.parametrize('layout', ('timm', 'with_head', 'moco', 'dino', 'student', 'mae', 'lincls'))
def test_foreign_layouts(layout, tmp_path, capsys):
    theirs, images = timm_vit(), torch.randn(4, 3, 32, 32)
    path = tmp_path / 'weights.pth'
    torch.save(layouts(theirs.state_dict())[layout], path)
    encoder, saved = load_backbone(path, say=print)
    assert '30 tensors loaded, 0 missing, 0 unexpected' in capsys.readouterr().out
    assert encoder.sizes['pos_embed'] == 'learned' and torch.equal(encoder.pos_embed, theirs.pos_embed)
    assert saved['mean'] == data.IMAGENET_MEAN and saved['dataset'] is None
    with torch.no_grad():
        assert (encoder.eval()(images) - theirs(images)).abs().max() < 1e-5


def test_heads_and_the_fixed_position_table(tmp_path):
    def loaded(saved, *args):
        torch.save(saved, tmp_path / 'w.pth')
        return load_backbone(tmp_path / 'w.pth', *args)[0]
    tensors = timm_vit(embed_dim=384, num_heads=6).state_dict()
    assert loaded(tensors).sizes['num_heads'] == 6 and loaded(tensors, 3).sizes['num_heads'] == 3
    table = torch.cat([torch.zeros(1, 1, 384), sincos_table(4, 4, 384)], dim=1)
    moco = loaded(dict(state_dict=prefixed('module.base_encoder.', {**tensors, 'pos_embed': table})))
    assert moco.sizes['num_heads'] == 12 and moco.sizes['pos_embed'] == 'sincos' and not moco.pos_embed.requires_grad
    half = {key: value.half() for key, value in {**tensors, 'pos_embed': table}.items()}
    probed = loaded(dict(state_dict=prefixed('module.', half)))  # main_lincls.py
    assert probed.sizes['num_heads'] == 12 and probed.sizes['pos_embed'] == 'sincos'
    assert loaded(timm_vit(embed_dim=1280, num_heads=16).state_dict()).sizes['num_heads'] == 16  # ViT-H


def test_round_trip_through_timm(backbone):
    ours, _ = load_backbone(backbone)
    theirs = timm.create_model('vit_tiny_patch16_224', img_size=28, patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=2, num_classes=0)
    theirs.load_state_dict(torch.load(backbone, weights_only=True)['model'], strict=True)
    images = torch.randn(4, 1, 28, 28)
    with torch.no_grad():
        assert (ours.eval()(images) - theirs.eval()(images)).abs().max() < 1e-5
    torch.save(theirs.state_dict(), backbone.with_name('back.pth'))
    back, _ = load_backbone(backbone.with_name('back.pth'), num_heads=2)
    assert back.sizes == {**ours.sizes} and all(torch.equal(a, b) for a, b in zip(back.parameters(), ours.parameters()))


def without(tensors, *keys):
    return {key: value for key, value in tensors.items() if key not in keys}


def test_weights_that_do_not_fit(tmp_path):
    path, tensors = tmp_path / 'w.pth', timm_vit().state_dict()

    def refused(saved, match, **settings):
        torch.save(saved, path)
        with pytest.raises(ValueError, match=match) as error:
            load_backbone(path, **settings)
        assert '\n' not in str(error.value) and str(path) in str(error.value)
    refused(without(tensors, 'blocks.1.mlp.fc1.weight', 'norm.bias'), '28 tensors loaded, 2 missing, 0 unexpected.*blocks.1.mlp.fc1.weight')
    refused({**tensors, 'blocks.0.ls1.gamma': torch.ones(128)}, '1 unexpected.*another architecture.*ls1')
    refused({**tensors, 'norm.bias': torch.full((128,), float('nan'))}, 'norm.bias is not finite')
    refused({**tensors, 'norm.bias': [1], 3: 4}, '1 missing.*norm.bias')
    refused({**tensors, 'patch_embed.proj.weight': torch.ones(128, 48)}, '2 dimensions')
    refused(dict(model=tensors, sizes=dict(width=3), mean=None, std=None), 'not those of a backbone.pt')
    refused({**tensors, 'blocks.1.attn.qkv.weight': torch.ones(384, 64)}, r'qkv.weight is \(384, 64\), not \(384, 128\)')
    refused({**tensors, 'pos_embed': torch.zeros(1, 16, 128)}, 'pos_embed has the shape')
    refused({'state_dict': {'conv1.weight': torch.zeros(4)}}, 'no ViT in the file')
    refused([1, 2], 'not a dict')
    refused(tensors, '3 heads do not divide width 128', num_heads=3)
    refused(dict(teacher=prefixed('backbone.', tensors), args=argparse.Namespace(arch='vit')), 'argparse.Namespace.*--trust-checkpoint')
    assert load_backbone(path, trust=True)[0].embed_dim == 128
    path.write_text('not weights')
    with pytest.raises(ValueError, match='truncated'):
        load_backbone(path)


# ---------------------------------------------------------------- whole runs

def test_several_processes_give_the_same_scores(backbone, tmp_path, monkeypatch):
    """1400 training and 1200 test images: three blocks of at most 500 of each, which two processes share unevenly."""
    raw = tmp_path / 'FashionMNIST' / 'raw'
    raw.mkdir(parents=True)
    g = torch.Generator().manual_seed(0)
    for part, count in (('train', 1400), ('t10k', 1200)):
        labels = torch.arange(count, dtype=torch.uint8) % 10
        images = torch.randint(0, 160, (count, 28, 28), generator=g, dtype=torch.uint8) + 9 * labels[:, None, None]
        (raw / f'{part}-images-idx3-ubyte').write_bytes(struct.pack('>IIII', 2051, count, 28, 28) + images.numpy().tobytes())
        (raw / f'{part}-labels-idx1-ubyte').write_bytes(struct.pack('>II', 2049, count) + labels.numpy().tobytes())
    flags = ['--weights', str(backbone), '--data-root', str(tmp_path), '--probe-epochs', '5', '--probe-crops', '1', '--device', 'cpu',
             '--epochs', '2', '--lr', '0.1', '--patch-size', '7', '--protocol', 'nn', 'knn', 'linear', 'finetune']
    two = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', evaluation.__file__, *flags],
                         capture_output=True, text=True, timeout=120)
    assert two.returncode == 0, two.stderr[-2000:]
    run(monkeypatch, *flags)
    lines = lines_of(backbone)
    assert [line['protocol'] for line in lines] == ['nn', 'knn', 'linear', 'finetune'] * 2  # written by one process
    for shared, alone in zip(lines[:3], lines[4:7]):
        clock = dict(seconds=0, feature_seconds=0)
        assert {**shared, **clock} == {**alone, **clock}
    assert lines[0]['score'] > 12 and lines[3]['losses'][1] < lines[3]['losses'][0]


@pytest.mark.skipif(not Path('/proc/self/task').exists(), reason='reads the names of threads as Linux has them')
def test_no_thread_of_the_process_group_outlives_it(tmp_path):
    """One that did aborted about every fiftieth run of two processes, while Python shut down."""
    (tmp_path / 'script.py').write_text('''
import os, torch, torch.distributed as dist, eval
def threads():
    return sum('gloo' in open(f'/proc/self/task/{t}/comm').read() for t in os.listdir('/proc/self/task'))
eval.join_processes(torch.device('cpu'))
torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(2, 2))(torch.ones(1, 2)).sum().backward()
before = threads()
dist.destroy_process_group()
print(before > 0, threads())
''')
    done = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '1', tmp_path / 'script.py'],
                          env={**os.environ, 'PYTHONPATH': str(Path(evaluation.__file__).parent)}, capture_output=True, text=True, timeout=120)
    assert done.stdout == 'True 0\n', done.stdout + done.stderr[-2000:]


def test_folder_of_images(tmp_path, monkeypatch, capsys):
    from torchvision.utils import save_image
    torch.manual_seed(0)
    for split, count in (('train', 24), ('val', 8)):
        for name, shift in (('dark', 0.0), ('light', 0.5)):
            (tmp_path / split / name).mkdir(parents=True)
            for i in range(count):
                save_image(torch.rand(3, 30, 40) * 0.5 + shift, tmp_path / split / name / f'{i}.png')
    torch.save(timm_vit().state_dict(), tmp_path / 'weights.pth')
    run(monkeypatch, '--weights', tmp_path / 'weights.pth', '--dataset', 'folder', '--data-root', tmp_path, '--protocol', 'nn', 'linear',
        'finetune', '--probe-crops', 1, '--probe-epochs', 10, '--probe-batch', 16, '--epochs', 4, '--batch-size', 8, '--randaugment', 2, '--workers', 0)
    scores = {line['protocol']: line['score'] for line in lines_of(tmp_path / 'weights.pth')}
    assert scores['linear'] > 90 and scores['finetune'] >= 50 and '16 test images' in capsys.readouterr().out


def test_a_random_network_is_called_one(backbone, tiny_fashion, monkeypatch, capsys):
    run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--random-init', '--protocol', 'nn')
    assert capsys.readouterr().out.count('RANDOM NETWORK') == 2 and lines_of(backbone)[0]['random'] is True


def test_held_out_images_take_the_place_of_the_test_images(backbone, tiny_fashion, monkeypatch, tmp_path):
    full = data.load('fashion_mnist', tiny_fashion)
    part = evaluation.hold_out(full)
    held = sorted({*range(320)} - {*part.labelled_ids('train').tolist()})
    assert len(held) == 32 and torch.equal(part.test_images, full.images[held]) and torch.equal(part.test_labels, full.labels[held])
    assert part.images is full.images and (full.labels >= 0).all()
    run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--validate', '--protocol', 'nn')
    line = lines_of(backbone)[0]
    assert (line['bank'], line['queries'], line['scored_on']) == (288, 32, 'held-out training images')

    from PIL import Image
    for i in range(40):
        (tmp_path / 'tree' / 'ab'[i % 2]).mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (8, 8)).save(tmp_path / 'tree' / 'ab'[i % 2] / f'{i}.png')
    tree = data.load('folder', tmp_path / 'tree')  # 36 of them the bank
    part = evaluation.hold_out(tree)
    bank, queries = part.labelled_ids('train'), part.labelled_ids('test')
    assert len(queries) == 4 and sorted([*bank.tolist(), *queries.tolist()]) == tree.bank.tolist()


def test_test_images_in_folders_of_other_names(tmp_path, monkeypatch, capsys):
    from torchvision.utils import save_image
    torch.save(timm_vit().state_dict(), tmp_path / 'w.pth')
    for name in ('train/a', 'train/b', 'val/a', 'val/c'):
        (tmp_path / name).mkdir(parents=True)
        for i in range(3):
            save_image(torch.rand(3, 32, 32), tmp_path / name / f'{i}.png')
    flags = ('--weights', tmp_path / 'w.pth', '--dataset', 'folder', '--data-root', tmp_path, '--protocol', 'nn', '--workers', 0, '--mean', 0.5, 0.5, 0.5)
    run(monkeypatch, *flags)
    assert 'left out: 3 test images' in capsys.readouterr().out and lines_of(tmp_path / 'w.pth')[0]['mean'] == [0.5] * 3
    (tmp_path / 'val' / 'a').rename(tmp_path / 'val' / 'd')
    with pytest.raises(ValueError, match='labelled test images.*--validate'):
        run(monkeypatch, *flags)


def test_data_without_usable_labels(backbone, tiny_fashion, monkeypatch):
    full = data.load('fashion_mnist', tiny_fashion)
    for labels, match in ((torch.full_like(full.labels, -1), 'needs labelled'), (torch.zeros_like(full.labels), 'all of one class')):
        broken = copy.copy(full)
        broken.labels = labels
        monkeypatch.setattr(data, 'load', lambda *_: broken)
        with pytest.raises(ValueError, match=match):
            run(monkeypatch, '--weights', backbone)


def test_bad_input(backbone, tiny_fashion, monkeypatch):
    with pytest.raises(ValueError, match='patch size 5 does not divide'):
        run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--patch-size', 5)
    with pytest.raises(ValueError, match='k = 999 is more than the 320 images'):
        run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--k', 999)
    with pytest.raises(ValueError, match='takes 1 channels, the images of shapes have 3'):
        run(monkeypatch, '--weights', backbone, '--dataset', 'shapes')
    for flags, match in ((('--limit', 10), 'k = 20 is more than the 10 images'), (('--half-bank', '--device', 'cpu'), 'for GPUs'),
                         (('--k', 0), '--k 0 must be above 0'), (('--drop-path', 1), '--drop-path 1.0 must be at least 0'),
                         (('--num-heads', 4), 'the file says 2'), (('--mean', 0.5, 0.5), '1 numbers each'),
                         (('--protocol', 'finetune', '--epochs', 1, '--ema', 0.99996), 'than the 5 of this run'),
                         (('--protocol', 'linear', '--probe-rates', 1e38, '--probe-epochs', 2), 'diverged')):
        with pytest.raises((ValueError, FloatingPointError), match=match):
            run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, *flags)
    torch.save(dict(method={}), backbone.with_name('checkpoint.pt'))
    with pytest.raises(ValueError, match='take the backbone.pt beside it'):
        load_backbone(backbone.with_name('checkpoint.pt'))
    torch.save(timm_vit().state_dict(), backbone.with_name('foreign.pth'))
    with pytest.raises(ValueError, match='add --dataset'):
        run(monkeypatch, '--weights', backbone.with_name('foreign.pth'))
    with pytest.raises(FileNotFoundError, match='no weights at'):
        run(monkeypatch, '--weights', backbone.with_name('none.pt'))
    backbone.write_bytes(backbone.read_bytes()[:1000])
    with pytest.raises(ValueError, match='truncated'):
        load_backbone(backbone)
