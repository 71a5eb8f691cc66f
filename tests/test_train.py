"""A run from its flags to its end: what a step does, what it costs, how it stops and goes on."""
import copy
import json
import math
import os
import re
import runpy
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from conftest import ROOT, SMALL, error, log_of, steps_of, torchrun
from PIL import Image

import train
from compress import Compression, pass_flops
from gradstats import adam_scale, flat_gradient
from images.views import keyed_generator
from schedule import cosine, polynomial
from vit import read


def started(*flags, root, checkpoint=None):
    """A run that is set up and has not begun."""
    args, _ = train.parse_args([*SMALL, '--data-root', str(root), *map(str, flags)])
    return train.set_up(args, checkpoint)


def weights_of(folder):
    return read(folder / 'checkpoint.pt')['method']


def assert_equal_weights(a, b):
    torch.testing.assert_close(weights_of(a), weights_of(b), rtol=0, atol=0)


def assert_equal_runs(a, b):
    """To the last bit: weights, the state but for its clocks, losses and scores."""
    assert_equal_weights(a, b)
    clocks = dict(seconds=0, waiting=0)
    state, other = (read(folder / 'checkpoint.pt')['state'] | clocks for folder in (a, b))
    assert state == other
    kept = ('step', 'loss', 'units', 'knn', 'strategy')
    lines, others = ([[line.get(name) for name in kept] for line in log_of(x)] for x in (a, b))
    assert lines == others


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
    ('--symmetric', '--patch-branch', 'query'),
    ('--drop-branch', 'both', '--views', 'small', '--freeze-patch-embed',
     '--schedule', 'p4@0,p8-drop0.25@0.5')])
def test_every_variant_trains(run, flags):
    folder = run(*flags, '--budget', 0.001, '--name', 'a') / 'a'
    losses = [line['loss'] for line in steps_of(folder)]
    assert len(losses) > 5 and all(map(math.isfinite, losses))


def test_one_step_of_moco_by_hand(run, tiny_fashion):
    """The loss, AdamW's step and the teacher's, written out beside the first step of a run."""
    flags = ('--schedule', 'p8-drop0.50', '--views', 'small', '--warmup', 0, '--budget', 0.000014,
             '--seed', 3)
    saved = run(*flags, '--name', 'a', '--eval-every', 0) / 'a'
    ours = started(*flags, '--name', 'b', root=tiny_fashion)
    assert torch.initial_seed() == 3
    method, tau = ours.method, Compression(8, 0.5)
    before = {name: value.clone() for name, value in method.state_dict().items()}
    ids = torch.randperm(320, generator=keyed_generator(3, 'order', 0))[:16]
    views = train.views_of(ours, [ours.data.pixels['train'][ids]] * 2, tau, 0)
    assert views[0].min() < -0.5                              # normalized
    loss, _ = method(views, None, 0.5, keyed_generator(3, 0, 0, 'tokens'))
    gradients = torch.autograd.grad(loss, ours.parameters)
    assert loss.item() == pytest.approx(steps_of(saved)[0]['loss'], abs=1e-6)

    after = weights_of(saved)
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


@pytest.mark.parametrize('decay', [cosine, polynomial])
def test_curves_follow_progress(run, decay):
    flags = ('--schedule', 'p8', '--budget', 0.003, '--lr-schedule', decay.__name__)
    lines = steps_of(run(*flags, '--name', 'a') / 'a')
    cost = lines[0]['units']
    for line in lines:
        p = (line['units'] - cost) / 3000
        warm = min(1, p / 0.1) * decay(max(0, p - 0.1) / 0.9)
        assert line['lr'] == pytest.approx(2e-3 * 16 / 256 * warm)
        assert line['momentum'] == pytest.approx(1 - 0.01 * cosine(p))
        assert line['tokens'] == 1 + 4 and line['strategy'] == 'p8'
        assert 0 < line['waiting'] < line['seconds']


def test_dinos_last_layer_rests_at_first_and_no_bias_decays(tiny_fashion, tmp_path, monkeypatch):
    """At 15 % of the budget the teacher's temperature has risen by a half."""
    monkeypatch.chdir(tmp_path)
    run = started('--method', 'dino', '--warmup', 0, '--eval-every', 0, root=tiny_fashion)
    run.budget = 16 * run.cost[run.schedule.at(0)]            # one step
    head = run.method.student_head
    before = copy.deepcopy(head.state_dict())
    assert train.train(run) and run.state.units == run.budget
    assert (run.method.student_temp, run.method.center_momentum) == (0.4, 0.5)
    assert torch.equal(head.last_layer.weight, before['last_layer.weight'])
    assert not torch.equal(head.mlp[0].weight, before['mlp.0.weight'])
    train.set_curves(run, 0.15)
    assert run.method.teacher_temp == pytest.approx(0.055)
    for group in run.optimizer.param_groups:
        decays = {parameter.ndim > 1 for parameter in group['params']}
        assert decays == {0.04 < group['weight_decay'] < 0.1}


def test_a_sample_costs_its_passes(tiny_fashion, tmp_path, monkeypatch):
    """MoCo: query 3 and key 1, without heads; images need no gradient. Symmetric: twice that.

    Small views save the projection of 4 large patches: of the query forward and for its weights,
    of the key forward.
    """
    monkeypatch.chdir(tmp_path)
    for flags, cost in (((), 4), (('--symmetric',), 8)):
        run = started('--hidden', 1, '--out-dim', 1, '--arch', '64,12,1', *flags, root=tiny_fashion)
        assert run.cost[Compression(4)] == pytest.approx(cost, rel=0.005)
    small, full = (started('--schedule', 'p8', '--views', views, root=tiny_fashion)
                   for views in ('small', 'full'))
    tau, pixels = Compression(8), 4 * 32 * (64 - 16)
    unit = pass_flops(16, 16, 32, 1)
    assert full.cost[tau] - small.cost[tau] == pytest.approx(2 * 3 * pixels / unit)


def test_views_have_the_pixels_that_the_encoder_reads():
    """3 x 3 patches of 12 px are 36 px. Smaller patches than the base need all pixels."""
    for flags, sides in (
            ('--schedule p12', [36, 36]),
            ('--schedule p12 --views small', [12, 12]),
            ('--schedule p12 --views small --patch-branch query', [32, 32]),
            ('--schedule p2 --views small', [32, 32]),
            ('--schedule p8 --views small --method dino --local-crops 1', [16, 16, 8])):
        args, _ = train.parse_args(flags.split())
        tau = train.build_schedule(args).at(0)
        kinds = train.augmentations(args, train.build_recipe(args), tau)
        assert [kind.rendered for kind in kinds] == sides, flags


def test_jitter_and_crop_scale_change_the_recipe():
    args, _ = train.parse_args(['--jitter', '2', '--crop-scale', '0.6'])
    for kind in train.build_recipe(args):
        assert kind.jitter == (0.8, 0.8, 0.4, 0.2) and kind.scale == (0.6, 1.0)


# ---------------------------------------------------------------- gradient errors

def test_measuring_and_scoring_change_nothing_in_the_run(run):
    flags = ('--schedule', 'p8', '--budget', 0.002, '--probe-batches', 4)
    folder = run(*flags, '--name', 'a')
    run(*flags, '--name', 'b', '--gradstats', '0.5,1', '--grid', 'p8,p8-drop0.50',
        '--eval-every', 0)
    assert_equal_weights(folder / 'a', folder / 'b')
    rows = [json.loads(line) for line in (folder / 'b' / 'gradstats.jsonl').open()]
    assert [(row['progress'], row['strategy']) for row in rows] == [
        (p, name) for p in (0.5, 1) for name in ('p4', 'p8', 'p8-drop0.50')]
    assert rows[0]['cost'] == 1 > rows[1]['cost']


def test_the_probe_measures_the_gradient_of_a_training_step(tiny_fashion, tmp_path, monkeypatch):
    """Of the second of two processes: the other half of each batch. In Adam's metric."""
    monkeypatch.chdir(tmp_path)
    flags = ('--gradstats', 1, '--grid', 'p8-drop0.50', '--probe-batches', 4)
    run = started(*flags, root=tiny_fashion)
    run.rank, run.world = 1, 2
    seen = []

    def gradient_stats(grad_fn, grid, base, batches, groups, scale):
        seen.extend(grad_fn(i, tau) for i in range(2) for tau in grid)
        assert torch.equal(scale, adam_scale(run.optimizer, run.parameters))
        return {}
    monkeypatch.setattr(train, 'gradient_stats', gradient_stats)
    train.measure(run, 1.0)
    order = torch.randperm(320, generator=keyed_generator(0, 'probe order', 0, 1))[8:16]
    tau, key = Compression(8, 0.5), ('probe', 0, 1)
    views = train.views_of(run, [run.data.pixels['train'][order]] * 2, tau, *key)
    assert torch.sub(*views).median() != 0                    # two crops of an image
    loss, _ = run.method(views, 8, 0.5, keyed_generator(0, 1, *key, 'tokens'))
    assert torch.equal(seen[3], flat_gradient(loss, run.parameters))


# ---------------------------------------------------------------- stop and go on

@pytest.mark.parametrize('flags', [
    (), ('--method', 'dino', '--local-crops', 2), ('--gradstats', '0.4,0.8', '--probe-batches', 4)])
def test_a_stopped_run_goes_on_bit_exactly(run, stop_at, flags, monkeypatch):
    """With as many threads. What a crash wrote behind the checkpoint is cut off."""
    flags = (*flags, '--schedule', 'p8-drop0.50@0,p4@0.6', '--budget', 0.002, '--eval-every', 0.3)
    folder = run(*flags, '--name', 'whole')
    stop_at(7)
    run(*flags, '--name', 'parts')
    assert steps_of(folder / 'parts')[-1]['step'] == 7
    for name in train.LINES:
        with open(folder / 'parts' / name, 'a') as file:
            file.write('{"step": 8, "knn": 0.5, "progress": 0.3}\n{"step": 8, "lo')
    threads = []
    monkeypatch.setattr(torch, 'set_num_threads', threads.append)
    run('--resume', folder / 'parts', small=False)
    assert threads == [1] and steps_of(folder / 'parts')[-1]['strategy'] == 'p4'
    assert_equal_runs(folder / 'whole', folder / 'parts')
    a, b = ((folder / name / 'gradstats.jsonl').read_text() for name in ('whole', 'parts'))
    assert a == b


def test_dino_is_measured_as_without_a_stop(run, stop_at):
    """A run stops where a measurement is due, and makes it when it goes on."""
    flags = ('--method', 'dino', '--budget', 0.001, '--gradstats', 0.5, '--grid', 'p8',
             '--metric', 'euclidean', '--probe-batches', 4, '--eval-every', 0)
    folder = run(*flags, '--name', 'whole')
    whole = (folder / 'whole' / 'gradstats.jsonl').read_text()
    stop_at(json.loads(whole.splitlines()[0])['step'])
    run(*flags, '--name', 'parts')
    run('--resume', folder / 'parts', small=False)
    assert (folder / 'parts' / 'gradstats.jsonl').read_text() == whole


def test_photos_stop_and_go_on_with_other_workers(run, stop_at, photos, capsys):
    """The blank in the path is quoted where the run says how to go on; the broken file is named."""
    flags = ('--dataset', 'folder', '--data-root', photos, '--budget', 0.001,
             '--schedule', 'p8@0,p4@0.05', '--views', 'small')
    folder = run(*flags, '--workers', 0, '--name', 'whole')
    stop_at(4)
    run(*flags, '--workers', 2, '--name', 'parts')
    printed = capsys.readouterr().out
    assert 'go on with python train.py --resume ' in printed and printed.count('skipped') == 2
    run('--resume', folder / 'parts', '--workers', 1, small=False)
    assert_equal_runs(folder / 'whole', folder / 'parts')
    assert f"--data-root '{photos}'" in capsys.readouterr().out


def test_a_killed_run_goes_on_bit_exactly(run, tmp_path, tiny_fashion):
    """kill -9. Before, the reader of its output goes, as in `| head -1`: this does not end it."""
    flags = ('--budget', '0.003', '--eval-every', '0.5')
    command = [sys.executable, ROOT / 'train.py', *SMALL, '--data-root', tiny_fashion, *flags]
    process = subprocess.Popen([*command, '--name', 'killed'], cwd=tmp_path, stdout=subprocess.PIPE,
                               env=dict(os.environ, OMP_NUM_THREADS='1'))
    process.stdout.readline()
    process.stdout.close()
    while not (tmp_path / 'runs' / 'killed' / 'checkpoint.pt').exists():
        assert process.poll() is None
        time.sleep(0.02)
    process.kill()
    process.wait()
    run('--resume', 'auto', '--name', 'killed', *flags)
    folder = run(*flags, '--name', 'whole')
    assert_equal_weights(folder / 'killed', folder / 'whole')


def test_a_run_killed_at_its_last_score_is_not_finished(run, monkeypatch):
    score = train.score

    def killed(started_run):
        if started_run.state.step:
            raise KeyboardInterrupt
        score(started_run)
    flags = ('--budget', 0.001, '--eval-every', 1)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(train, 'score', killed)
        run(*flags, '--name', 'killed')
    assert read('runs/killed/checkpoint.pt')['state']['units'] >= 1000
    run(*flags, '--name', 'killed', '--resume', 'auto')
    folder = run(*flags, '--name', 'whole')
    assert_equal_runs(folder / 'killed', folder / 'whole')


def test_a_signal_finishes_the_step_and_saves(run, stop_at, capsys):
    before = signal.default_int_handler
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, before)                         # under nohup SIGHUP is ignored
        stop_at(3, number)
        folder = run('--budget', 0.002, '--name', number.name) / number.name
        assert read(folder / 'checkpoint.pt')['state']['step'] == 3
        assert f'go on with python train.py --resume runs/{number.name}' in capsys.readouterr().out
        assert signal.getsignal(number) == before


def test_a_second_signal_does_what_python_does():
    with pytest.raises(KeyboardInterrupt), train.stop_signals() as received:
        os.kill(os.getpid(), signal.SIGINT)
        assert received == [signal.SIGINT]
        os.kill(os.getpid(), signal.SIGINT)


TWO_PROCESSES = '''
import functools, os, signal, sys, train
train.LOG_EVERY = 1
log, meet, rank = train.log, train.dist.init_process_group, int(os.environ['RANK'])
def log_and_signal(run, *rest):
    log(run, *rest)
    if (run.state.step, run.rank) == (stop, 1):           # one process alone receives it
        os.kill(os.getpid(), signal.SIGTERM)
train.log = log_and_signal
drawn, generator_of, keys_of = set(), train.keyed_generator, train.batch_keys
def drawn_once(*key, **options):                          # no step repeats the draws of another
    assert (name, key) not in drawn
    drawn.add((name, key))
    return generator_of(*key, **options)
def own_share(*place):
    assert place[-2:] == (rank, 2)
    return keys_of(*place)
train.keyed_generator, train.batch_keys = drawn_once, own_share
home = os.getcwd()
for start, (name, stop, disk) in enumerate([
        ('whole', 0, 0), ('parts', 4, 0), ('parts', 0, 1), ('parts', 0, 0)]):
    if start:                                             # torchrun's store is for one meeting
        train.dist.init_process_group = functools.partial(
            meet, init_method=f'file://{home}/meeting{start}', rank=rank, world_size=2)
    if disk and rank:                                     # a node with a disk of its own
        os.mkdir('disk')
        os.chdir('disk')
    try:
        train.main([*sys.argv[1:], '--resume', 'auto', '--name', name])
    except ValueError as error:
        print(f'refused: {error}', flush=True)        # in one piece, beside the other process
        train.dist.destroy_process_group()            # at other times its exit does this
    os.chdir(home)
'''


def test_two_processes_stop_and_go_on(tmp_path, tiny_fashion):
    """To the same bits; and a checkpoint that one process does not see is refused by both."""
    script = tmp_path / 'two.py'
    script.write_text(TWO_PROCESSES)
    result = torchrun(2, script, *SMALL, '--data-root', tiny_fashion, '--budget', '0.001',
                      '--eval-every', '0.5', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    printed = result.stdout
    assert 'go on with torchrun --nproc_per_node 2 train.py --resume' in printed
    assert 'refused: process' in printed and 'disk that all processes share' in printed
    assert 'cpu, 2 processes,' in printed and 'goes on at step 4, ' in printed
    assert_equal_runs(tmp_path / 'runs' / 'whole', tmp_path / 'runs' / 'parts')


def test_other_data_processes_or_encoders_are_refused(run):
    path = run('--budget', 0.0001, '--name', 'a') / 'a' / 'checkpoint.pt'
    checkpoint = read(path)
    for name, then, now in (
            ('processes', 2, 1), ('images', '320 (other)', '320'), ('patch_size', 8, 4)):
        torch.save(checkpoint | dict(identity=checkpoint['identity'] | {name: then}), path)
        with pytest.raises(ValueError, match=re.escape(f'had {name} {then}, now it is {now}')):
            run('--resume', path.parent, small=False)


def test_a_finished_run_says_so_and_nothing_is_overwritten(run, capsys):
    folder = run('--budget', 0.001, '--name', 'a') / 'a'
    capsys.readouterr()
    run('--resume', folder, small=False)
    assert capsys.readouterr().out.splitlines()[-1] == f'{folder} is finished'
    with pytest.raises(ValueError, match='runs/a exists; choose another --name'):
        run('--budget', 0.001, '--name', 'a')
    for name in ('moco-fashion_mnist-0', 'moco-fashion_mnist-1'):
        assert (run('--budget', 0.0001) / name).is_dir()


# ---------------------------------------------------------------- what a run says and leaves

def test_a_run_starts_from_weights_of_timm_and_gives_them_back(run, tmp_path):
    """At so low a rate they stay what they are."""
    sizes = dict(img_size=16, patch_size=4, in_chans=1, embed_dim=64, depth=2, num_heads=2)
    model, again = (timm.models.VisionTransformer(num_classes=0, **sizes) for _ in range(2))
    torch.save(model.state_dict(), tmp_path / 'timm.pt')
    with pytest.raises(ValueError, match='has embed_dim 64, not 32; set the flags'):
        run('--init', 'timm.pt', '--arch', '32,2,2')
    folder = run('--init', 'timm.pt', '--arch', '64,2,2', '--budget', 0.00005, '--lr', 1e-12)
    again.load_state_dict(read(folder / 'moco-fashion_mnist-0' / 'backbone.pt')['model'])
    images = torch.randn(4, 1, 16, 16)
    assert error(again(images), model(images)) < 1e-5


def test_an_unlabelled_folder_trains_without_a_score(run, photos, capsys, monkeypatch):
    """What was cropped when it was read is not cropped again."""
    monkeypatch.setattr('images.views.crop_and_flip', None)
    folder = run('--dataset', 'folder', '--data-root', photos / 'dog', '--budget', 0.001)
    printed = capsys.readouterr().out
    assert 'score     none' in printed and '--export features.npz' in printed.splitlines()[-1]
    assert not any('knn' in line for line in log_of(folder / 'moco-folder-0'))


def test_collapse_is_said_in_plain_words():
    healthy = dict(feature_spread=1, teacher_entropy=2, positive_similarity=0.5,
                   negative_similarity=0.1)
    assert train.collapse(healthy, 64) is None
    for metrics, message in (
            (dict(feature_spread=0.001), 'nearly the same feature'),
            (dict(teacher_entropy=math.log(64)), 'outputs are uniform'),
            (dict(teacher_entropy=0.001), 'one and the same output'),
            (dict(negative_similarity=0.5), 'move together')):
        assert message in train.collapse(healthy | metrics, 64)


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


def test_a_file_is_whole_whatever_happens(tmp_path, monkeypatch):
    path = tmp_path / 'x.pt'
    train.save([1], path)
    other = os.stat(path).st_ino

    def full_disk(value, partial):
        partial.write_bytes(b'half')
        assert torch.load(path) == [1]
        raise OSError('no space left')
    monkeypatch.setattr(torch, 'save', full_disk)
    with pytest.raises(OSError, match='x.pt cannot be written: no space left'):
        train.save([2], path)
    assert os.stat(path).st_ino == other and list(tmp_path.iterdir()) == [path]
    monkeypatch.undo()
    train.save([3], path)
    assert torch.load(path) == [3] and os.stat(path).st_ino != other      # renamed, not rewritten


def test_weights_that_are_not_finite_are_never_saved(tiny_fashion, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run = started('--name', 'a', root=tiny_fashion)
    with torch.no_grad():
        run.method.projector[0].weight[0, 0] = math.inf
    with pytest.raises(FloatingPointError, match='a weight is not finite at step 0'):
        train.save_run(run)
    assert not (run.folder / 'checkpoint.pt').exists()


# ---------------------------------------------------------------- flags

def test_a_wrong_combination_names_value_and_fix(run):
    for flags, message in (
            ('--batch-size 1', 'batch size 1 is not a multiple of 1 process'),
            ('--batch-size 512', 'batch size 512 is larger than the 320 images'),
            ('--schedule p8-drop1.5', 'drop rate 1.5 is outside [0, 1)'),
            ('--budget 1e-6', 'do not pay for a batch of 16'),
            ('--patch-size 3', 'patch size 3 does not divide image size 16x16; use an image size '
                               'that is a multiple of 3'),
            ('--gradstats 0,1', 'Adam has no second moment at progress 0'),
            ('--gradstats 2', 'are progress: from 0 to 1'),
            ('--local-crops 2', 'needs --method dino'),
            ('--resume auto', 'give a --name')):
        with pytest.raises(ValueError, match=re.escape(message)):
            run(*flags.split())
        assert not train.Path('runs').exists(), flags


def test_the_command_prints_one_line(monkeypatch):
    monkeypatch.setattr(sys, 'argv', ['train.py', '--probe-batches', '6'])
    with pytest.raises(SystemExit, match='^train.py: error: --probe-batches 6 must be a multiple'):
        runpy.run_path(str(ROOT / 'train.py'), run_name='__main__')


def test_a_wrong_flag_is_argparses_own_line(capsys):
    with pytest.raises(SystemExit):
        train.parse_args(['--budget', '0'])
    shown = capsys.readouterr().err.splitlines()[-1]
    assert 'argument --budget: 0 is not above 0' in shown
