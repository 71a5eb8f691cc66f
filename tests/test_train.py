"""A run from its flags to its end: what a step does, what it costs, how it stops and goes on."""
import argparse
import json
import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import timm
import torch
from conftest import ROOT, SMALL, error, log_of, steps_of, torchrun
from PIL import Image

import train
from compress import Compression
from gradstats import flat_gradient
from images.views import keyed_generator
from schedule import cosine
from vit import ViT, load_backbone, read


def started(*flags, root, checkpoint=None):
    """A run that is set up and has not begun."""
    args, _ = train.parse_args([*SMALL, '--data-root', str(root), *map(str, flags)])
    return train.set_up(args, checkpoint)


def weights_of(folder):
    """All tensors of a checkpoint's method, and its state without the clocks."""
    checkpoint = read(folder / 'checkpoint.pt')
    clocks = ('seconds', 'waiting', 'events')
    state = {name: value for name, value in checkpoint['state'].items() if name not in clocks}
    return checkpoint['method'], state


def assert_equal_runs(a, b):
    """To the last bit: weights, what is left of the state, losses and scores."""
    (weights, state), (others, other_state) = weights_of(a), weights_of(b)
    assert state == other_state
    assert weights.keys() == others.keys()
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    kept = ('step', 'loss', 'units', 'knn', 'strategy')
    lines = [[{name: line.get(name) for name in kept} for line in log_of(x)] for x in (a, b)]
    assert lines[0] == lines[1]


@pytest.fixture(scope='session')
def photos(tmp_path_factory):
    """Two classes of 30 pictures of several sizes, and one that cannot be read."""
    root = tmp_path_factory.mktemp('photos with a blank')
    for i in range(60):
        folder = root / ('cat', 'dog')[i % 2]
        folder.mkdir(exist_ok=True)
        picture = torch.rand(60 + i % 3, 80, 3, generator=keyed_generator(i)) * 255
        Image.fromarray(picture.byte().numpy()).save(folder / f'{i}.jpg')
    (root / 'cat' / 'broken.jpg').write_bytes(b'no picture')
    return root


# ---------------------------------------------------------------- a step

@pytest.mark.parametrize('flags', [
    ('--method', 'simclr'), ('--method', 'dino', '--local-crops', 2),
    ('--symmetric', '--patch-branch', 'query'), ('--drop-branch', 'both', '--views', 'full'),
    ('--freeze-patch-embed', '--lr-schedule', 'polynomial', '--schedule', 'p4@0,p8-drop0.25@0.5')])
def test_every_variant_trains(run, flags):
    folder = run(*flags, '--budget', 0.001, '--name', 'a') / 'a'
    losses = [line['loss'] for line in steps_of(folder)]
    assert len(losses) > 5 and all(map(math.isfinite, losses))


def test_one_step_of_moco_by_hand(run, tiny_fashion):
    """The loss, AdamW's step and the teacher's, written out beside the first step of a run."""
    flags = ('--schedule', 'p8-drop0.50', '--warmup', 0, '--budget', 0.000014)
    saved = run(*flags, '--name', 'a', '--eval-every', 0) / 'a'
    ours = started(*flags, '--name', 'b', root=tiny_fashion)
    method, tau = ours.method, Compression(8, 0.5)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    ids = torch.randperm(320, generator=keyed_generator(0, 'order', 0))[:16]
    views = train.views_of(ours, ours.data.pixels['train'][ids], tau, 0)
    loss, _ = method(views, None, 0.5, keyed_generator(0, 0, 0, 'tokens'))
    gradients = torch.autograd.grad(loss, ours.parameters)
    assert loss.item() == pytest.approx(steps_of(saved)[0]['loss'], abs=1e-6)

    after, _ = weights_of(saved)
    lr = 2e-3 * 16 / 256
    named = {name: p for name, p in method.named_parameters() if p.requires_grad}
    for (name, p), g in zip(named.items(), gradients):
        # Adam's first step is lr g / (|g| + eps), after a decay of 0.1 lr
        wanted = before[name] * (1 - 0.1 * lr) - lr * g / (g.abs() + 1e-8)
        assert error(after[name], wanted) < 1e-6, name
        slow = name.replace('student', 'teacher').replace('projector', 'teacher_projector')
        if slow in after and slow != name:
            wanted = 0.99 * before[slow] + 0.01 * after[name]
            assert error(after[slow], wanted) < 1e-6, slow


def test_curves_follow_progress(run):
    lines = steps_of(run('--schedule', 'p8', '--budget', 0.003, '--name', 'a') / 'a')
    cost = lines[0]['units']
    for line in lines:
        p = (line['units'] - cost) / 3000
        warm = min(1, p / 0.1) * cosine(max(0, p - 0.1) / 0.9)
        assert line['lr'] == pytest.approx(2e-3 * 16 / 256 * warm)
        assert line['momentum'] == pytest.approx(1 - 0.01 * cosine(p))
        assert line['tokens'] == 1 + 4 and line['strategy'] == 'p8'


def test_a_sample_of_moco_costs_query_3_and_key_1(tiny_fashion, tmp_path, monkeypatch):
    """Uncompressed, without heads; images need no gradient. Symmetric: twice that."""
    monkeypatch.chdir(tmp_path)
    for flags, factor in (((), 1), (('--symmetric',), 2)):
        run = started('--hidden', 1, '--out-dim', 1, '--arch', '64,12,1', *flags, root=tiny_fashion)
        assert run.cost[Compression(4)] == pytest.approx(4 * factor, rel=0.005)


def test_small_views_cost_the_projection_of_small_patches(tiny_fashion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    small, full = (started('--schedule', 'p8', '--views', views, root=tiny_fashion)
                   for views in ('small', 'full'))
    tau, pixels = Compression(8), 4 * 32 * (64 - 16)
    unit = train.pass_flops(16, 16, 32, 1)
    # 4 tokens: the query's projection forward and for its weights, the key's forward
    assert full.cost[tau] - small.cost[tau] == pytest.approx(2 * 3 * pixels / unit)


@pytest.mark.parametrize('flags, sides', [
    (('--schedule', 'p8'), [16, 16]),
    (('--schedule', 'p8', '--views', 'full'), [32, 32]),
    (('--schedule', 'p12'), [12, 12]),                     # 3 x 3 patches of 12 px, of 36 in all
    (('--schedule', 'p12', '--views', 'full'), [36, 36]),
    (('--schedule', 'p12', '--patch-branch', 'query'), [32, 32]),
    (('--schedule', 'p2'), [32, 32]),                      # smaller patches need all pixels
    (('--schedule', 'p8', '--method', 'dino', '--local-crops', '1'), [16, 16, 8])])
def test_views_have_the_pixels_that_the_encoder_reads(flags, sides):
    args, _ = train.parse_args([*flags])
    tau = train.build_schedule(args).at(0)
    kinds = train.augmentations(args, train.build_recipe(args), tau)
    assert [kind.rendered for kind in kinds] == sides


def test_jitter_and_crop_scale_change_the_recipe():
    args, _ = train.parse_args(['--jitter', '2', '--crop-scale', '0.6'])
    for kind in train.build_recipe(args):
        assert kind.jitter == (0.8, 0.8, 0.4, 0.2) and kind.scale == (0.6, 1.0)


# ---------------------------------------------------------------- gradient errors

def test_measuring_changes_nothing_in_the_run(run):
    flags = ('--schedule', 'p8', '--budget', 0.002, '--probe-batches', 4)
    folder = run(*flags, '--name', 'a')
    run(*flags, '--name', 'b', '--gradstats', '0.5,1', '--grid', 'p8,p8-drop0.50')
    weights, _ = weights_of(folder / 'a')
    others, _ = weights_of(folder / 'b')
    assert all(torch.equal(weights[name], others[name]) for name in weights)
    rows = [json.loads(line) for line in (folder / 'b' / 'gradstats.jsonl').open()]
    assert [(row['progress'], row['strategy']) for row in rows] == [
        (p, name) for p in (0.5, 1) for name in ('p4', 'p8', 'p8-drop0.50')]
    assert rows[0]['cost'] == 1 and rows[0]['bias2'] == 0


def test_the_probe_measures_the_gradient_of_a_training_step(tiny_fashion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = started('--gradstats', 1, '--grid', 'p8-drop0.50', '--probe-batches', 4, '--metric',
                  'euclidean', root=tiny_fashion)
    seen = []

    def gradient_stats(grad_fn, grid, base, batches, groups, scale):
        seen.extend(grad_fn(i, tau) for i in range(2) for tau in grid)
        return {}
    monkeypatch.setattr(train, 'gradient_stats', gradient_stats)
    train.measure(run, 1.0)
    order = torch.randperm(320, generator=keyed_generator(0, 'probe order', 0, 1))[:16]
    tau, key = Compression(8, 0.5), ('probe', 0, 1)
    views = train.views_of(run, run.data.pixels['train'][order], tau, *key)
    loss, _ = train.loss_of(run, run.method, views, tau, *key)
    assert torch.equal(seen[3], flat_gradient(loss, run.parameters))


def test_the_default_grid_has_no_patch_larger_than_the_image():
    args, _ = train.parse_args(['--img-size', '16', '--patch-size', '8'])
    assert list(map(str, train.build_grid(args))) == [
        'p8', 'p8-drop0.50', 'p16', 'p16-drop0.50']


# ---------------------------------------------------------------- stop and go on

@pytest.mark.parametrize('flags', [
    (), ('--method', 'dino', '--local-crops', 2), ('--gradstats', '0.4,0.8', '--probe-batches', 4)])
def test_a_stopped_run_goes_on_bit_exactly(run, stop_at, flags):
    flags = (*flags, '--schedule', 'p8-drop0.50@0,p4@0.6', '--budget', 0.002, '--eval-every', 0.3)
    folder = run(*flags, '--name', 'whole')
    stop_at(7)
    run(*flags, '--name', 'parts')
    assert steps_of(folder / 'parts')[-1]['step'] == 7
    run('--resume', folder / 'parts', small=False)
    assert_equal_runs(folder / 'whole', folder / 'parts')
    if '--gradstats' in flags:
        a, b = ((folder / name / 'gradstats.jsonl').read_text() for name in ('whole', 'parts'))
        assert a == b


def test_photos_stop_and_go_on_with_other_workers(run, stop_at, photos, capsys):
    """The blank in the path is quoted where the run says how to go on; the broken file is named."""
    flags = ('--dataset', 'folder', '--data-root', photos, '--budget', 0.002)
    folder = run(*flags, '--workers', 0, '--name', 'whole')
    stop_at(5)
    run(*flags, '--workers', 2, '--name', 'two parts'.replace(' ', '-'))
    printed = capsys.readouterr().out
    assert 'go on with python train.py --resume ' in printed and printed.count('skipped') == 2
    run('--resume', folder / 'two-parts', '--workers', 1, small=False)
    assert_equal_runs(folder / 'whole', folder / 'two-parts')
    assert f"--data-root '{photos}'" in capsys.readouterr().out


def launch(*flags, cwd, root, **options):
    command = [sys.executable, str(ROOT / 'train.py'), *SMALL, '--data-root', str(root), *flags]
    return subprocess.Popen(command, cwd=cwd, env=dict(os.environ, OMP_NUM_THREADS='1'), text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options)


def wait_for(path):
    for _ in range(1000):
        if path.exists():
            return
        time.sleep(0.02)
    raise TimeoutError(path)


def test_a_killed_run_goes_on_bit_exactly(run, tmp_path, tiny_fashion):
    flags = ('--budget', '0.008', '--eval-every', '0.5')
    process = launch(*flags, '--name', 'killed', cwd=tmp_path, root=tiny_fashion)
    wait_for(tmp_path / 'runs' / 'killed' / 'checkpoint.pt')
    process.kill()
    process.wait()
    run('--resume', 'auto', '--name', 'killed', *flags)
    folder = run(*flags, '--name', 'whole')
    weights, state = weights_of(folder / 'killed')
    others, other_state = weights_of(folder / 'whole')
    assert state == other_state and all(torch.equal(weights[n], others[n]) for n in weights)


def test_a_closed_pipe_does_not_end_the_run(tmp_path, tiny_fashion):
    """As with `| head -1`: the reader goes, the run comes to its end."""
    process = launch('--budget', '0.002', '--name', 'a', cwd=tmp_path, root=tiny_fashion)
    process.stdout.readline()
    process.stdout.close()
    process.wait()
    assert log_of(tmp_path / 'runs' / 'a')[-1]['progress'] == 1


@pytest.mark.parametrize('name', ['SIGINT', 'SIGTERM', 'SIGHUP', 'SIGUSR1'])
def test_a_signal_finishes_the_step_and_saves(run, stop_at, capsys, name):
    before = signal.getsignal(getattr(signal, name))
    stop_at(3, getattr(signal, name))
    folder = run('--budget', 0.002, '--name', 'a') / 'a'
    assert read(folder / 'checkpoint.pt')['state']['step'] == 3
    assert 'go on with python train.py --resume runs/a' in capsys.readouterr().out
    assert signal.getsignal(getattr(signal, name)) == before


def test_a_second_signal_does_what_python_does():
    with pytest.raises(KeyboardInterrupt), train.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


def test_a_run_works_in_a_thread(run):
    """As in a notebook's or a server's: there Python takes no signal handlers."""
    thread = threading.Thread(target=run, args=('--budget', 0.001, '--name', 'a'))
    thread.start()
    thread.join()
    assert log_of(train.Path('runs/a'))[-1]['progress'] == 1


TWO_PROCESSES = '''
import os, signal, sys, train
train.LOG_EVERY = 1
log = train.log
disk, step = map(int, (sys.argv.pop(1), sys.argv.pop(1)))
def log_and_signal(run, *rest):
    log(run, *rest)
    if (run.state.step, run.rank) == (step, 1):           # one process alone receives it
        os.kill(os.getpid(), signal.SIGTERM)
train.log = log_and_signal
if disk and os.environ['RANK'] == '1':                    # a node with a disk of its own
    os.mkdir('disk')
    os.chdir('disk')
try:
    train.main()
except ValueError as error:
    print('refused:', error, flush=True)
'''


def test_two_processes_stop_and_go_on(tmp_path, tiny_fashion):
    """To the same bits; and a checkpoint that one process does not see is refused by both."""
    script = tmp_path / 'two.py'
    script.write_text(TWO_PROCESSES)

    def launch_two(disk, step, name):
        flags = [*SMALL, '--data-root', tiny_fashion, '--budget', '0.001', '--eval-every', '0.5']
        result = torchrun(2, script, disk, step, *flags, '--name', name, '--resume', 'auto',
                          cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        return result.stdout
    launch_two(0, 0, 'whole')
    assert 'go on with torchrun --nproc_per_node 2 train.py --resume' in launch_two(0, 4, 'parts')
    refused = launch_two(1, 0, 'parts')
    assert refused.count('refused: process') == 2 and 'disk that all processes share' in refused
    printed = launch_two(0, 0, 'parts')
    assert 'cpu, 2 processes,' in printed and 'goes on at step 4, ' in printed
    assert_equal_runs(tmp_path / 'runs' / 'whole', tmp_path / 'runs' / 'parts')


@pytest.mark.parametrize('changed, message', [
    (dict(processes=2), 'the run had processes 2, now it is 1'),
    (dict(images='320 (other)'), 'the run had images 320 (other), now it is 320'),
    (dict(patch_size=8), 'the run had patch_size 8, now it is 4')])
def test_other_data_processes_or_encoders_are_refused(run, changed, message):
    folder = run('--budget', 0.001, '--name', 'a') / 'a'
    checkpoint = read(folder / 'checkpoint.pt')
    checkpoint['identity'].update(changed)
    torch.save(checkpoint, folder / 'checkpoint.pt')
    with pytest.raises(ValueError) as error:
        run('--resume', folder, small=False)
    assert message in str(error.value)


def test_a_crash_repeats_no_line(run, stop_at):
    """Behind the checkpoint of step 4 stand a score and half a line: they are cut off."""
    flags = ('--budget', 0.001, '--eval-every', 0.3)
    whole = run(*flags, '--name', 'whole') / 'whole'
    stop_at(4)
    folder = run(*flags, '--name', 'parts') / 'parts'
    with open(folder / 'log.jsonl', 'a') as file:
        file.write('{"step": 4, "knn": 0.5, "progress": 0.3}\n{"step": 5, "lo')
    run('--resume', folder, small=False)
    assert_equal_runs(whole, folder)


def test_the_number_of_threads_goes_on_with_the_run(run, stop_at, monkeypatch):
    stop_at(2)
    folder = run('--budget', 0.001, '--name', 'a') / 'a'
    threads = []
    monkeypatch.setattr(torch, 'set_num_threads', threads.append)
    run('--resume', folder, small=False)
    assert threads == [1]


def test_a_finished_run_says_so(run, capsys):
    folder = run('--budget', 0.001, '--name', 'a') / 'a'
    capsys.readouterr()
    run('--resume', folder, small=False)
    assert capsys.readouterr().out.splitlines()[-1] == f'{folder} is finished'


def test_nothing_is_overwritten(run):
    run('--budget', 0.001, '--name', 'a')
    with pytest.raises(ValueError, match='runs/a exists; choose another --name'):
        run('--budget', 0.001, '--name', 'a')
    assert (run('--budget', 0.001) / 'moco-fashion_mnist-0').is_dir()
    assert (run('--budget', 0.001) / 'moco-fashion_mnist-1').is_dir()


# ---------------------------------------------------------------- what a run says and leaves

def test_timm_loads_the_backbone(run):
    folder = run('--budget', 0.001, '--name', 'a', '--arch', '64,2,2') / 'a'
    saved = torch.load(folder / 'backbone.pt', weights_only=True)
    names = ('img_size', 'patch_size', 'in_chans', 'embed_dim', 'depth', 'num_heads')
    config = {name: saved['config'][name] for name in names}
    model = timm.models.VisionTransformer(num_classes=0, **config)
    model.load_state_dict(saved['model'])
    images = torch.randn(4, 1, 16, 16)
    encoder, info = load_backbone(folder / 'backbone.pt')
    assert error(model(images), encoder(images)) < 1e-5
    assert info['transform']['input_size'] == (1, 16, 16) and len(info['mean']) == 1


def test_a_run_starts_from_weights(run, tmp_path):
    timm_vit = timm.models.VisionTransformer(img_size=16, patch_size=4, in_chans=1, embed_dim=32,
                                             depth=1, num_heads=1, num_classes=10)
    torch.save(timm_vit.state_dict(), tmp_path / 'timm.pt')
    with pytest.raises(ValueError, match='has embed_dim 32, not 64; set the flags'):
        run('--init', 'timm.pt', '--arch', '64,1,1')
    folder = run('--init', 'timm.pt', '--budget', 0.00005, '--lr', 1e-12, '--name', 'a') / 'a'
    kept = read(folder / 'backbone.pt')['model']['blocks.0.attn.qkv.weight']
    assert error(kept, timm_vit.blocks[0].attn.qkv.weight) < 1e-6


def test_epochs_set_the_budget(tiny_fashion, tmp_path, monkeypatch):
    """Two epochs of 320 images, half of the budget uncompressed."""
    monkeypatch.chdir(tmp_path)
    run = started('--epochs', 2, '--schedule', 'p8@0,p4@0.5', root=tiny_fashion)
    samples = sum(run.budget / 2 / run.cost[Compression(p)] for p in (8, 4))
    assert samples == pytest.approx(640)


def test_an_unlabelled_folder_trains_without_a_score(run, photos, capsys):
    folder = run('--dataset', 'folder', '--data-root', photos / 'dog', '--budget', 0.001)
    printed = capsys.readouterr().out
    assert 'score     none' in printed and '--export features.npz' in printed.splitlines()[-1]
    assert not any('knn' in line for line in log_of(folder / 'moco-folder-0'))


def test_no_gain_over_the_random_network_is_said(run, capsys, monkeypatch):
    monkeypatch.setattr(train, 'neighbours', lambda *a: ({1: 50.0, 20: 50.0}, 100, 400))
    run('--budget', 0.001, '--name', 'a')
    printed = capsys.readouterr().out
    assert 'no better than the random network, 50.00 %' in printed and '+- 2.5' in printed


@pytest.mark.parametrize('metrics, message', [
    (dict(feature_spread=0.001), 'nearly the same feature'),
    (dict(feature_spread=1, teacher_entropy=math.log(64)), 'outputs are uniform'),
    (dict(feature_spread=1, teacher_entropy=0.001), 'one and the same output'),
    (dict(feature_spread=1, teacher_entropy=2, positive_similarity=0.5,
          negative_similarity=0.5), 'move together')])
def test_collapse_is_said_in_plain_words(metrics, message):
    assert message in train.collapse(metrics, 64)
    healthy = dict(feature_spread=1, teacher_entropy=2, positive_similarity=0.5,
                   negative_similarity=0.1)
    assert train.collapse(healthy, 64) is None


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(run, stop_at, monkeypatch):
    stop_at(4)
    folder = run('--budget', 0.002, '--name', 'a') / 'a'
    monkeypatch.undo()
    monkeypatch.chdir(folder.parent.parent)
    loss_of = train.loss_of
    monkeypatch.setattr(train, 'LOG_EVERY', 1)
    monkeypatch.setattr(train, 'loss_of', lambda *a: (loss_of(*a)[0] * math.nan, {}))
    with pytest.raises(FloatingPointError, match='the loss is nan at step 5;.* lower --lr'):
        run('--resume', folder, small=False)
    assert read(folder / 'checkpoint.pt')['state']['step'] == 4


def test_weights_that_are_not_finite_are_never_saved(tiny_fashion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = started('--name', 'a', root=tiny_fashion)
    with torch.no_grad():
        run.method.projector[0].weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match='a weight is not finite at step 0'):
        train.save_run(run)
    assert not (run.folder / 'checkpoint.pt').exists()


# ---------------------------------------------------------------- flags

@pytest.mark.parametrize('flags, message', [
    (('--batch-size', 1), 'batch size 1 is not a multiple of 1 process'),
    (('--batch-size', 512), 'batch size 512 is larger than the 320 images'),
    (('--schedule', 'p32'), 'patch size 32 is larger than --img-size 16'),
    (('--budget', 1e-6), 'do not pay for a batch of 16'),
    (('--patch-size', 3), 'patch size 3 does not divide image size 16x16; use 2, 4'),
    (('--arch', '30,1,1'), 'width 30 must be a multiple of 4'),
    (('--gradstats', '0,1'), 'Adam has no second moment at progress 0'),
    (('--gradstats', '2'), 'are progress, from 0 to 1'),
    (('--probe-batches', 6), 'must be a multiple of 4'),
    (('--resume', 'auto'), 'give a --name')])
def test_a_wrong_combination_names_value_and_fix(run, flags, message):
    with pytest.raises(ValueError) as error:
        run(*flags)
    assert message in str(error.value) and not train.Path('runs').exists()


@pytest.mark.parametrize('flags, message', [
    (('--lr', '-1'), 'argument --lr: -1 is not above 0'),
    (('--arch', 'vit_huge'), 'argument --arch: invalid encoder_size value'),
    (('--schedule', 'p8-drop1.5'), 'drop rate 1.5 is outside [0, 1)'),
    (('--schedule', 'p0'), 'patch size 0 is not a whole number'),
    (('--budget', '1', '--epochs', '1'), 'not allowed with argument'),
    (('--methd', 'moco'), 'unrecognized arguments: --methd')])
def test_a_wrong_flag_is_argparses_own_line(capsys, flags, message):
    with pytest.raises(SystemExit):
        train.parse_args([*flags])
    assert message in capsys.readouterr().err


def test_help_shows_the_defaults_of_the_method(capsys):
    for method, shown in (('moco', '0.002'), ('simclr', '0.004')):
        with pytest.raises(SystemExit):
            train.parse_args(['--method', method, '--help'])
        assert f'(default: {shown})' in capsys.readouterr().out


def test_defaults_follow_the_method():
    args, _ = train.parse_args(['--method', 'dino', '--lr', '1'])
    assert args.lr == 1 and args.batch_size == 32 and args.out_dim == 1024
    assert isinstance(args, argparse.Namespace)
    assert ViT(**args.arch).embed_dim == 64
