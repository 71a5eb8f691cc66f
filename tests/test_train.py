import hashlib
import itertools
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

import train

CODE = Path(train.__file__).parent
SMALL = ['--dataset', 'fashion_mnist', '--img-size', '16', '--embed-dim', '32', '--depth', '1', '--hidden', '32', '--out-dim', '32',
         '--batch-size', '16', '--log-every', '1', '--device', 'cpu', '--local-crops', '2', '--local-size', '8', '--eval-every', '1']


@pytest.fixture
def run(tmp_path, monkeypatch, tiny_fashion):
    """train.py's own main with flags, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*flags, small=True):
        train.main([*(SMALL + ['--data-root', str(tiny_fashion)] if small else []), *map(str, flags)])
        return tmp_path / 'runs'
    return call


def log_of(folder):
    return [json.loads(line) for line in (folder / 'log.jsonl').read_text().splitlines()]


def fails(capsys, call):
    with pytest.raises(SystemExit) as stop:
        call()
    message = str(stop.value.code) if isinstance(stop.value.code, str) else capsys.readouterr().err
    assert stop.value.code not in (0, None)
    return message


@pytest.mark.parametrize('method, schedule, symmetric', list(itertools.product(
    ('moco', 'simclr', 'dino'), ('none', 'p4-drop0.50', 'p8', 'p8-drop0.50'), ('--symmetric', '--no-symmetric'))))
def test_every_combination_trains_and_resumes(run, method, schedule, symmetric):
    flags = ['--method', method, '--schedule', schedule, symmetric, '--budget', '0.000064']
    runs = run(*flags, '--name', 'a', '--max-steps', 2)
    assert (runs / 'a' / 'checkpoint.pt').exists()
    run('--resume', runs / 'a', small=False)
    lines = [line for line in log_of(runs / 'a') if 'loss' in line]
    assert [line['step'] for line in lines] == list(range(1, len(lines) + 1)) and len(lines) > 2
    cost = lines[0]['units'] / 16
    assert cost == pytest.approx(1) if schedule == 'none' else cost < 0.95
    assert lines[-1]['units'] >= 64 > lines[-2]['units']


@pytest.mark.parametrize('method', ('moco', 'dino'))
def test_resume_is_bit_exact(run, method):
    flags = ['--method', method, '--schedule', 'p8-drop0.50@0,p4@0.6', '--budget', '0.0004']
    runs = run(*flags, '--name', 'whole')
    run(*flags, '--name', 'parts', '--max-steps', 5)
    run('--resume', runs / 'parts', small=False)
    whole, parts = (torch.load(runs / name / 'checkpoint.pt', weights_only=True) for name in ('whole', 'parts'))
    assert whole['step'] == parts['step'] > 15 and whole['units'] == parts['units']
    for key, value in whole['method'].items():
        assert torch.equal(value, parts['method'][key]), key
    for a, b in zip(whole['optimizer']['state'].values(), parts['optimizer']['state'].values()):
        assert all(torch.equal(a[k], b[k]) for k in a)
    timing = ('seconds', 'seconds_data')
    a, b = ([{k: v for k, v in line.items() if k not in timing} for line in log_of(runs / n) if 'loss' in line] for n in ('whole', 'parts'))
    assert a == b


def test_what_a_run_leaves(run):
    runs = run('--budget', '0.0002', '--schedule', 'p8@0,p4@0.5')
    folder = runs / 'moco-fashion_mnist-0'
    assert {p.name for p in folder.iterdir()} == {'args.json', 'log.jsonl', 'checkpoint.pt', 'backbone.pt'}
    lines = log_of(folder)
    steps = [line for line in lines if 'loss' in line]
    assert {'step', 'progress', 'units', 'loss', 'lr', 'momentum', 'patch_size', 'drop_rate', 'tokens', 'seconds', 'seconds_data',
            'feature_spread', 'positive_similarity', 'negative_similarity'} <= set(steps[0])
    assert [line['tokens'] for line in steps][:1] == [4] and steps[-1]['tokens'] == 16
    assert [('knn' in line) for line in lines].count(True) == 2
    saved = torch.load(folder / 'backbone.pt', weights_only=True)
    model = timm.models.VisionTransformer(img_size=16, patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=1, num_classes=0)
    model.load_state_dict(saved['model'], strict=True)
    assert json.loads((folder / 'args.json').read_text())['schedule'] == 'p8@0,p4@0.5'
    assert run('--budget', '0.0001') and (runs / 'moco-fashion_mnist-1').is_dir()  # a second run does not touch the first


def test_dino_exports_the_teacher(run):
    runs = run('--method', 'dino', '--budget', '0.0002', '--schedule', 'none', '--name', 'd')
    saved, checkpoint = (torch.load(runs / 'd' / name, weights_only=True) for name in ('backbone.pt', 'checkpoint.pt'))
    key = 'blocks.0.mlp.fc1.weight'
    assert torch.equal(saved['model'][key], checkpoint['method'][f'encoder.{key}'])
    assert not torch.equal(saved['model'][key], checkpoint['method'][f'student_encoder.{key}'])


def replay(data, steps, world):
    """DINO's first steps written out by hand for `world` processes, on the loop's own data and draws: AdamW's update,
    per-tensor clipping, the frozen last layer, weight decay groups, EMA, center, every schedule."""
    import data as datasets
    from losses import DINO, dino_loss
    from vit import ViT
    torch.manual_seed(0)
    method = DINO(ViT(img_size=16, patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=1), hidden=32, out_dim=32, student_temp=0.1)
    student = {n: p for n, p in method.named_parameters() if p.requires_grad}
    teacher = {n: p for n, p in method.named_parameters() if not n.startswith('student')}
    first, second = ({n: torch.zeros_like(p) for n, p in student.items()} for _ in range(2))
    recipe, share = datasets.recipe('dino', small=True, local_crops=2), 16 // world
    budget, center = 1600, torch.zeros(1, 32)
    orders = [datasets.batch_keys(len(data), 16, 0, 0, rank, world) for rank in range(world)]
    for step in range(steps):
        p = step * 16 / budget
        lr = 0.001 * 16 / 256 * (p / 0.1 if p < 0.1 else 0.5 * (1 + math.cos(math.pi * (p - 0.1) / 0.9)))
        momentum, decay = 1 - 0.02 * 0.5 * (1 + math.cos(math.pi * p)), 0.4 - 0.36 * 0.5 * (1 + math.cos(math.pi * p))
        temperature = 0.04 + 0.03 * min(1, p / 0.3)
        total, means = {n: 0 for n in student}, []
        for rank in range(world):
            images = data.images[[i for _, i in next(orders[rank])]]
            assert len(images) == share
            views = datasets.make_views(images, recipe, [16, 16, 8, 8], datasets.keyed_generator(0, rank, step))
            views = [(v - data.mean[0]) / data.std[0] for v in views]
            with torch.no_grad():
                t = [method.teacher_head(method.encoder(v, 4)) for v in views[:2]]
            s = [method.student_head(method.student_encoder(v, 4)) for v in views]
            grads = torch.autograd.grad(dino_loss(s, t, center, temperature, 0.1), list(student.values()))
            for n, g in zip(student, grads):
                total[n] = total[n] + g / world
            means.append(torch.cat(t).mean(0, keepdim=True))
        with torch.no_grad():
            for n, q in student.items():
                g = total[n] * min(1, 3 / (total[n].norm().item() + 1e-6))
                if 'last_layer' in n and p < 0.01:
                    continue
                count = step + 1 if 'last_layer' not in n else step  # 0.01 of the budget is one step
                first[n], second[n] = 0.9 * first[n] + 0.1 * g, 0.999 * second[n] + 0.001 * g * g
                q.mul_(1 - lr * (decay if q.ndim > 1 else 0))
                q.sub_(lr * first[n] / (1 - 0.9 ** count) / ((second[n] / (1 - 0.999 ** count)).sqrt() + 1e-8))
            for n, q in teacher.items():
                source = n.replace('encoder', 'student_encoder', 1) if n.startswith('encoder') else n.replace('teacher', 'student')
                original = student.get(source, dict(method.named_parameters())[source])
                q.copy_(momentum * q + (1 - momentum) * original)
            center = 0.9 * center + 0.1 * sum(means) / world
    return {**{n: p.detach() for n, p in method.named_parameters()}, 'center': center}


@pytest.mark.parametrize('world', (1, 2))
def test_dino_steps_equal_those_written_out_by_hand(run, tiny_fashion, tmp_path, world):
    flags = ['--method', 'dino', '--schedule', 'none', '--budget', '0.0016', '--max-steps', '20', '--lr', '1e-3', '--name', 'r']
    if world == 1:
        run(*flags)
    else:
        command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(CODE / 'train.py'), *SMALL,
                   '--data-root', str(tiny_fashion), *flags]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150, env={**os.environ, 'OMP_NUM_THREADS': '1'})
        assert done.returncode == 0, done.stdout + done.stderr
    import data as datasets
    saved = torch.load(tmp_path / 'runs' / 'r' / 'checkpoint.pt', weights_only=True)['method']
    expected = replay(datasets.load('fashion_mnist', tiny_fashion), 20, world)
    assert set(expected) == set(saved)
    start = replay(datasets.load('fashion_mnist', tiny_fashion), 0, world)
    for n, value in expected.items():
        moved = (value - start[n]).norm()
        assert (saved[n] - value).norm() <= 2e-2 * moved + 1e-5, n  # Adam's first steps divide rounding by rounding
    last = 'student_head.last_layer.weight'
    one = replay(datasets.load('fashion_mnist', tiny_fashion), 1, world)
    assert torch.equal(one[last], start[last]) and not torch.equal(expected[last], start[last])


def test_momentum_and_teacher_move(run):
    """MoCo: momentum of the log, and a teacher that follows the encoder."""
    runs = run('--schedule', 'none', '--budget', '0.0016', '--max-steps', '40', '--name', 'm', '--momentum', '0.9')
    for line in (line for line in log_of(runs / 'm') if 'loss' in line):
        assert line['momentum'] == pytest.approx(1 - 0.05 * (1 + math.cos(math.pi * (line['step'] - 1) * 16 / 1600)))
    saved = torch.load(runs / 'm' / 'checkpoint.pt', weights_only=True)['method']
    name = 'blocks.0.mlp.fc1.weight'
    torch.manual_seed(0)
    start = train.vit.ViT(img_size=16, patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=1).state_dict()[name]
    teacher, encoder = saved[f'teacher_encoder.{name}'], saved[f'encoder.{name}']
    assert 0.2 < (teacher - start).norm() / (encoder - start).norm() < 0.95


def test_weights_that_are_not_finite_are_never_saved(run, capsys):
    message = fails(capsys, lambda: run('--schedule', 'none', '--budget', '0.0004', '--name', 'a', '--lr', '1e30', '--warmup', '0', '--save-every', '0.01'))
    assert 'lower --lr' in message and ('not finite' in message or 'the loss is' in message)
    for saved in Path('runs/a').glob('[!c]*.pt'), Path('runs/a').glob('checkpoint.pt'):
        for path in saved:
            state = torch.load(path, weights_only=True)
            state = state.get('method', state.get('model'))
            assert all(value.isfinite().all() for name, value in state.items() if 'running' not in name), path


def test_clip_each_clips_each_tensor_alone():
    parameters = [torch.nn.Parameter(torch.zeros(4)) for _ in range(3)]
    for p, norm in zip(parameters, (6.0, 4.0, 1.0)):
        p.grad = torch.full((4,), norm / 2)
    train.clip_each(parameters, 3.0)
    assert [round(p.grad.norm().item(), 4) for p in parameters] == [3, 3, 1]


def test_weight_decay_groups():
    from losses import DINO, MoCo
    from vit import ViT
    encoder = dict(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    for method, build in (('moco', MoCo), ('dino', DINO)):
        module = build(ViT(**encoder), hidden=16, out_dim=8)
        optimizer = train.build_optimizer(module, type('', (), dict(method=method)), torch.device('cpu'))
        decayed = sum(p.numel() for g in optimizer.param_groups for p in g['params'] if g['decay'])
        total = sum(p.numel() for p in module.parameters() if p.requires_grad)
        assert sum(p.numel() for g in optimizer.param_groups for p in g['params']) == total
        assert decayed == total if method == 'moco' else decayed < total


def test_learning_rate_follows_progress(run):
    runs = run('--budget', '0.0016', '--schedule', 'none', '--warmup', '0.1', '--lr', '0.0016', '--name', 'lr', '--lr-schedule', 'polynomial')
    for line in (line for line in log_of(runs / 'lr') if 'loss' in line):
        p = (line['step'] - 1) * 16 / 1600
        expected = 1e-4 * (p / 0.1 if p < 0.1 else 1 - ((p - 0.1) / 0.9) ** 2)
        assert line['lr'] == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_schedule_file_and_epochs(run, tmp_path):
    from schedule import Schedule
    (tmp_path / 'schedule.json').write_text(Schedule.parse('p8@0,p4-drop0.25@0.5').to_json())
    runs = run('--schedule', 'schedule.json', '--epochs', '0.5', '--name', 'file')
    lines = [line for line in log_of(runs / 'file') if 'loss' in line]
    assert (lines[0]['patch_size'], lines[-1]['patch_size'], lines[-1]['drop_rate']) == (8, 4, 0.25)
    assert 160 <= lines[-1]['units'] < 176


def test_two_processes_train_and_agree(run, tiny_fashion, tmp_path):
    command = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', str(CODE / 'train.py'), *SMALL,
               '--data-root', str(tiny_fashion), '--budget', '0.0004', '--schedule', 'p8-drop0.50@0,p4@0.5', '--name', 'two', '--method', 'simclr']
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=150, env={**os.environ, 'OMP_NUM_THREADS': '1'})
    assert done.returncode == 0, done.stderr
    runs = run('--budget', '0.0004', '--schedule', 'p8-drop0.50@0,p4@0.5', '--name', 'one', '--method', 'simclr')
    two, one = ([line for line in log_of(runs / n) if 'loss' in line] for n in ('two', 'one'))
    assert [line['step'] for line in two] == [line['step'] for line in one]
    mean = [sum(line['loss'] for line in lines) / len(lines) for lines in (two, one)]
    assert abs(mean[0] - mean[1]) < 0.3  # other draws, the same run in kind
    assert done.stdout.count('chance') == 1


def test_without_compile_and_with(run):
    runs = run('--budget', '0.0001', '--schedule', 'p8-drop0.50', '--name', 'eager')
    run('--budget', '0.0001', '--schedule', 'p8-drop0.50', '--name', 'compiled', '--compile')
    a, b = ([line['loss'] for line in log_of(runs / n) if 'loss' in line] for n in ('eager', 'compiled'))
    assert a == pytest.approx(b, abs=1e-3)


# ---- gradient errors and auto

def digest(value):
    if torch.is_tensor(value):
        return hashlib.sha256(value.detach().numpy().tobytes()).hexdigest()
    if isinstance(value, dict):
        return {k: digest(v) for k, v in value.items()}
    return [digest(v) for v in value] if isinstance(value, (list, tuple)) else value


@pytest.mark.parametrize('method', ('moco', 'simclr', 'dino'))
def test_measuring_changes_nothing_in_the_run(run, method):
    flags = ['--method', method, '--budget', '0.0003', '--schedule', 'p8@0,p4@0.5']
    runs = run(*flags, '--name', 'plain')
    run(*flags, '--name', 'measured', '--gradstats', '0,0.5,1', '--probe-batches', 8, '--grid', 'p8,p4-drop0.50', '--metric', 'euclidean')
    a, b = (torch.load(runs / name / 'checkpoint.pt', weights_only=True) for name in ('plain', 'measured'))
    for part in ('method', 'optimizer', *train.COUNTERS[:-2]):
        assert digest(a[part]) == digest(b[part]), part
    losses = [[line['loss'] for line in log_of(runs / name) if 'loss' in line] for name in ('plain', 'measured')]
    assert losses[0] == losses[1]
    rows = [json.loads(line) for line in (runs / 'measured' / 'gradstats.jsonl').read_text().splitlines()]
    assert [(row['progress'], row['strategy']) for row in rows] == [(p, s) for p in (0, 0.5, 1) for s in ('p4', 'p8', 'p4-drop0.50')]
    assert all(row['variance'] > 0 and row['num_batches'] == 8 and row['batch_size'] == 16 for row in rows)


def test_probe_leaves_module_optimizer_and_generators_alone(run, monkeypatch):
    """Everything is hashed before and after each measurement."""
    original, seen = train.Probe.measure, []

    def state(probe):
        return digest([probe.method.state_dict(), probe.optimizer.state_dict(), torch.get_rng_state(),
                       [p.grad for p in probe.method.parameters() if p.grad is not None]])

    def hashed(probe, *a):
        before = state(probe)
        result = original(probe, *a)
        seen.append(before == state(probe) and getattr(probe.method, 'batch_center', None) is None)
        return result
    monkeypatch.setattr(train.Probe, 'measure', hashed)
    run('--method', 'dino', '--budget', '0.0003', '--schedule', 'p8', '--gradstats', '0.3,0.6', '--probe-batches', 8, '--metric', 'euclidean', 'adam')
    assert seen == [True] * 4


def test_probe_gradient_is_that_of_a_training_step(run, monkeypatch):
    """At step 0 the probe's mean gradient of the base strategy is the backward pass's, on the same batch."""
    captured = {}
    original = train.Probe.measure

    def check_it(probe, grid, count, groups, step, metric):
        images = next(probe.batches(1, step))
        flat = probe.gradient(images, train.Compression(4), (step, 0))
        generator = train.datasets.keyed_generator(0, 0, 'probe', step, 0)
        views = [train.datasets.normalize(v, probe.data.mean, probe.data.std)
                 for v in train.datasets.make_views(images, probe.views, probe.sides(train.Compression(4)), generator)]
        probe.method(views, 4, 0.0, generator)[0].backward()
        captured['equal'] = torch.equal(flat, torch.cat([p.grad.flatten() for p in probe.trainable]))
        probe.method.zero_grad()
        return original(probe, grid, count, groups, step, metric)
    monkeypatch.setattr(train.Probe, 'measure', check_it)
    run('--budget', '0.0001', '--schedule', 'none', '--gradstats', '0', '--probe-batches', 8)
    assert captured['equal']


def test_auto_measures_within_its_share_and_resumes_bit_exactly(run):
    flags = ['--schedule', 'auto', '--budget', '0.0024', '--auto-share', '0.25', '--grid', 'p8,p8-drop0.50']
    runs = run(*flags, '--name', 'whole')
    run(*flags, '--name', 'parts', '--max-steps', 30)
    run('--resume', runs / 'parts', small=False)
    whole, parts = (torch.load(runs / name / 'checkpoint.pt', weights_only=True) for name in ('whole', 'parts'))
    assert digest(whole['method']) == digest(parts['method']) and whole['units'] == parts['units'] and whole['stages'] == parts['stages']
    rows = [json.loads(line) for line in (runs / 'whole' / 'gradstats.jsonl').read_text().splitlines()]
    measured = sum(row['cost'] * row['num_batches'] * 16 for row in rows)
    assert len({row['progress'] for row in rows}) > 1 and 0.1 * 2400 < measured <= 0.25 * 2400
    assert {row['metric'] for row in rows} == {'adam'}
    steps = [line for line in log_of(runs / 'whole') if 'loss' in line]
    costs = {(row['patch_size'], row['drop_rate']): row['cost'] for row in rows}
    trained = [costs[line['patch_size'], line['drop_rate']] for line in steps]
    first = sum(line['progress'] <= 0.2 for line in steps)
    assert {(8, 0.5)} == {(line['patch_size'], line['drop_rate']) for line in steps[:first]}
    assert sum(trained) * 16 + measured == pytest.approx(whole['units'])  # the measuring is paid from the budget
    assert trained[first + 1:] == sorted(trained[first + 1:])  # never back to a cheaper strategy
    assert json.loads((runs / 'whole' / 'schedule.json').read_text())['stages'] == [list(stage) for stage in whole['stages']]
    assert run('--schedule', runs / 'whole' / 'schedule.json', '--budget', '0.0001')


def test_a_resumed_run_measures_and_scores_nothing_twice(run):
    """Also when the checkpoint is of the very step before which they were taken, and the crash cut off a line."""
    flags = ['--budget', '0.0016', '--gradstats', '0.25,0.5', '--grid', 'p4', '--probe-batches', 8, '--schedule', 'none', '--save-every', '0.25']
    runs = run(*flags, '--name', 'whole')
    run(*flags, '--name', 'killed', '--max-steps', 25)  # the checkpoint of step 25, at 25 %
    folder = runs / 'killed'
    checkpoint = (folder / 'checkpoint.pt').read_bytes()
    run('--resume', folder, '--max-steps', 30, small=False)
    (folder / 'checkpoint.pt').write_bytes(checkpoint)  # as if killed at step 30
    with open(folder / 'log.jsonl', 'a') as file:
        file.write('{"step": 31, "lo')
    run('--resume', folder, small=False)
    for name in ('log.jsonl', 'gradstats.jsonl'):
        rows = [[json.loads(line) for line in (runs / r / name).read_text().splitlines()] for r in ('whole', 'killed')]
        assert [(row['step'], row['progress'], 'loss' in row) for row in rows[0]] == [(row['step'], row['progress'], 'loss' in row) for row in rows[1]]


def test_auto_that_cannot_pay_says_so(run, capsys):
    runs = run('--schedule', 'auto', '--budget', '0.0003', '--name', 'a')
    assert 'cannot measure' in capsys.readouterr().out
    assert {line['patch_size'] for line in log_of(runs / 'a') if 'loss' in line} == {8}


def test_auto_chooses_the_lowest_error():
    from compress import Compression
    base, large, dropped = Compression(4), Compression(8), Compression(8, 0.5)
    rows = [dict(progress=0.3, strategy=s, cost=c, bias2=b, bias2_sem=0.0, variance=1.0, variance_sem=0.0, norm2=-1.0, norm2_sem=9.0)
            for s, c, b in (('p4', 1.0, 0.0), ('p8', 0.3, 0.1), ('p8-drop0.50', 0.2, 2.0))]
    start = train.Schedule(((0.0, large),))
    assert train.choose(start, rows, 0.3, 1) == start
    assert train.choose(start, rows, 0.3, 20).stages == ((0.0, large), (0.3, base))
    rows[1]['bias2_sem'] = rows[2]['bias2_sem'] = 5.0  # nothing can be told apart
    assert train.choose(start, rows, 0.3, 1) == start
    rows[2]['bias2_sem'] = 0.0
    rows[0]['variance'] = 0.39  # CA-MSE 0.39, p8 0.4
    rows[1]['bias2_sem'] = 0.0051
    assert train.choose(start, rows, 0.3, 1) == start  # within two standard errors
    rows[1]['bias2_sem'] = 0.0049
    assert train.choose(start, rows, 0.3, 1).at(0.3) == base
    rows[2]['bias2_sem'] = 5.0  # cannot be told from the lowest: of those, the cheapest
    assert train.choose(start, rows, 0.3, 1).at(0.3) == dropped
    assert train.choose(train.Schedule(((0.0, Compression(16)),)), rows, 0.3, 1).at(0.3) == dropped  # one that was not measured does not stay


def test_default_schedule_follows_the_base_patch_size(run):
    runs = run('--budget', '0.0002', '--name', 'a')
    assert {line['patch_size'] for line in log_of(runs / 'a') if 'loss' in line} == {8}
    run('--budget', '0.0001', '--name', 'b', '--patch-size', 16)
    assert {line['patch_size'] for line in log_of(runs / 'b') if 'loss' in line} == {16}


def test_measured_cost(run):
    runs = run('--budget', '0.0002', '--schedule', 'p8', '--cost', 'measured', '--name', 'a', '--gradstats', '0', '--probe-batches', 8)
    rows = [json.loads(line) for line in (runs / 'a' / 'gradstats.jsonl').read_text().splitlines()]
    assert rows[0]['cost'] == rows[0]['cost_analytic'] == 1
    assert all(row['cost'] > 0 for row in rows) and any(row['cost'] != row['cost_analytic'] for row in rows)


# ---- bad input: one line that names the value and the fix

@pytest.mark.parametrize('flags, message', [
    (['--method', 'byol'], 'byol'), (['--dataset', 'mnist'], 'mnist'), (['--arch', 'vit_huge'], 'vit_huge'),
    (['--schedule', 'p5'], 'patch size 5 does not divide image size 16x16; use 4, 8 or'),
    (['--patch-size', '6'], 'patch size 6 does not divide'), (['--schedule', 'p4-drop1.5'], 'drop rate 1.5 is outside'),
    (['--schedule', 'fast'], "'fast' is not a compression"), (['--schedule', 'p4@0.5'], 'begins at progress 0'),
    (['--schedule', 'bad.json'], 'a schedule file holds'), (['--schedule', 'none.json'], 'no schedule at none.json'), (['--batch-size', '400'], 'batch size 400 is larger than the 320 images'),
    (['--batch-size', '1'], 'batch size 1 cannot'), (['--num-heads', '5'], '5 heads do not divide width 32'), (['--lr', 'nan'], '--lr nan'),
    (['--budget', '0'], '--budget 0.0 must be above 0'), (['--warmup', '1.5'], '--warmup 1.5'), (['--data-root', 'nowhere'], 'not in nowhere'),
    (['--dataset', 'folder', '--data-root', 'nowhere'], 'no folder nowhere'), (['--resume', 'nowhere'], 'no checkpoint at nowhere'),
    (['--gradstats', '0,2'], "'0,2' is not a list"), (['--grid', 'p5'], 'patch size 5 does not divide'), (['--probe-batches', '9'], '--probe-batches 9'),
    (['--auto-share', '0'], '--auto-share 0.0'), (['--metric', 'adam', '--gradstats', '0'], 'no second moment at progress 0'), (['--device', 'gpu'], 'gpu'), (['--device', 'mps'], '--device mps is not there'),
])
def test_bad_input(run, capsys, tmp_path, flags, message):
    (tmp_path / 'bad.json').write_text('[1, 2]')
    assert message in fails(capsys, lambda: run(*flags))
    assert not (tmp_path / 'runs').exists()


def test_nothing_is_overwritten(run, capsys):
    flags = ['--budget', '0.0001', '--name', 'a']
    runs = run(*flags)
    before = (runs / 'a' / 'log.jsonl').read_bytes()
    assert 'runs/a exists' in fails(capsys, lambda: run(*flags))
    assert 'has spent its budget' in fails(capsys, lambda: run('--resume', runs / 'a', small=False))
    assert 'a resumed run keeps its flags' in fails(capsys, lambda: run('--resume', runs / 'a', '--lr', '3', small=False))
    shutil.copytree(runs / 'a', runs / 'b')
    (runs / 'b' / 'checkpoint.pt').write_bytes((runs / 'a' / 'checkpoint.pt').read_bytes()[:5000])
    assert 'truncated' in fails(capsys, lambda: run('--resume', runs / 'b', small=False))
    assert (runs / 'a' / 'log.jsonl').read_bytes() == before == (runs / 'b' / 'log.jsonl').read_bytes()


def test_another_world_or_data_set_is_not_resumed(run, capsys, tmp_path):
    runs = run('--budget', '0.0004', '--name', 'a', '--max-steps', 3, '--schedule', 'p8')
    checkpoint = torch.load(runs / 'a' / 'checkpoint.pt', weights_only=True)
    torch.save({**checkpoint, 'world': 2}, runs / 'a' / 'checkpoint.pt')
    assert 'it would be another run' in fails(capsys, lambda: run('--resume', runs / 'a', small=False))
    torch.save({'model': {}}, runs / 'a' / 'checkpoint.pt')
    assert 'is no checkpoint of a run' in fails(capsys, lambda: run('--resume', runs / 'a', small=False))
    assert 'no checkpoint at' in fails(capsys, lambda: run('--resume', '', small=False))


def test_a_schedule_file_that_changes_does_not_change_the_run(run, tmp_path):
    from schedule import Schedule
    (tmp_path / 's.json').write_text(Schedule.parse('p8').to_json())
    runs = run('--schedule', 's.json', '--budget', '0.0002', '--name', 'a', '--max-steps', 3)
    (tmp_path / 's.json').write_text(Schedule.parse('p4').to_json())
    run('--resume', runs / 'a', small=False)
    assert {line['patch_size'] for line in log_of(runs / 'a') if 'loss' in line} == {8}


def test_non_finite_loss_stops_with_the_step_and_keeps_the_checkpoint(run, capsys, monkeypatch):
    runs = run('--budget', '0.0004', '--name', 'a', '--max-steps', 3)
    checkpoint = (runs / 'a' / 'checkpoint.pt').read_bytes()
    monkeypatch.setattr(train.losses, 'info_nce', lambda q, k, temperature: q.sum() * float('nan'))
    message = fails(capsys, lambda: run('--resume', runs / 'a', small=False))
    assert 'the loss is nan at step 3' in message and '--lr' in message
    assert (runs / 'a' / 'checkpoint.pt').read_bytes() == checkpoint and (runs / 'a' / 'crash.pt').exists()


def test_unlabelled_folder_trains_without_a_score(run, tmp_path, capsys):
    from PIL import Image
    for i in range(24):
        Image.new('RGB', (40, 30), (10 * i, 99, 40)).save(tmp_path / f'{i}.png')
    runs = run('--dataset', 'folder', '--data-root', tmp_path, '--budget', '0.00006', '--name', 'f', '--workers', 0)
    assert 'score     none' in capsys.readouterr().out
    assert not any('knn' in line for line in log_of(runs / 'f'))


def test_collapse_is_said_in_plain_words():
    assert 'collapsed' in train.collapse_warning(dict(feature_spread=0.001), 256)
    assert 'uniform' in train.collapse_warning(dict(feature_spread=0.5, teacher_entropy=6.238), 512)
    assert 'one and the same' in train.collapse_warning(dict(feature_spread=0.5, teacher_entropy=0.001), 512)
    assert train.collapse_warning(dict(feature_spread=0.5, teacher_entropy=3.0), 512) is None


@pytest.mark.parametrize('leaf', ('compress', 'vit', 'losses', 'gradstats', 'schedule', 'data'))
def test_leaf_copied_alone_checks_itself(leaf, tmp_path):
    shutil.copy(CODE / f'{leaf}.py', tmp_path)
    if leaf == 'vit':
        shutil.copy(CODE / 'compress.py', tmp_path)
    blocked = "import sys; sys.modules.update(dict.fromkeys(('torchvision', 'PIL', 'numpy', 'timm', 'lightly', 'tqdm', 'matplotlib')))"
    code = f"{blocked}; import runpy; runpy.run_path('{leaf}.py', run_name='__main__')"
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert f'{leaf}.py: all claims hold' in done.stdout


@pytest.mark.parametrize('method', ('moco', 'simclr', 'dino'))
def test_help_shows_the_methods_defaults(method, capsys):
    with pytest.raises(SystemExit):
        train.main(['--method', method, '--help'])
    text = capsys.readouterr().out
    assert f'(default: {train.METHOD_DEFAULTS[method]["momentum"]})' in text and 'torchrun' in text
