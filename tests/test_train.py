"""train.py: what a run computes. What happens to its folder is in test_runs.py."""
import copy
import json
import math
import re
import shlex

import pytest
import timm
import torch
from conftest import SMALL, log_of, steps_of, torchrun

import pictures
import reproduce
import train
from compress import Compression
from data import batch_keys, load
from losses import DINO, dino_loss
from views import keyed_generator, make_views, normalize, recipe
from vit import ViT
from weights import read

CURVES = pictures.curves_of_run
STAGES = 'p8-drop0.50@0,p4@0.6'


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch):
    """Drawing takes longer than training here; one test does it."""
    monkeypatch.setattr(pictures, 'curves_of_run', lambda folder: None)


def without_time(lines):
    return [{name: value for name, value in line.items() if 'seconds' not in name}
            for line in lines]


def same(a, b):
    """Equal to the last bit: tensors, or containers and plain values with tensors in them."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[name], b[name]) for name in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(a, b):
    """Two run folders with the same weights, optimizer, state and lines, but for the seconds."""
    one = read(a / 'checkpoint.pt')
    other = read(b / 'checkpoint.pt')
    assert same(one['method'], other['method'])
    assert same(one['optimizer'], other['optimizer'])
    states = without_time([one['state'], other['state']])
    assert states[0] == states[1]
    assert without_time(log_of(a)) == without_time(log_of(b))
    assert rows_of(a) == rows_of(b)


def rows_of(folder):
    path = folder / 'gradstats.jsonl'
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------- every method and strategy

UNCOMPRESSED = dict(moco=4.043, simclr=6.009, dino=10.666)      # units a sample, heads included


@pytest.mark.parametrize('method', UNCOMPRESSED)
@pytest.mark.parametrize('strategy', ('p4', 'p4-drop0.50', 'p8', 'p8-drop0.50'))
def test_every_combination_trains_and_resumes(run, method, strategy):
    """16 px at patch 4 are 16 patches, at patch 8 four, and dropout halves them: 16, 8, 4, 2.

    MoCo pays 3 for the query and 1 for the key, SimCLR 3 + 3. A batch of 16 spends 16 times that.
    """
    flags = ['--method', method, '--schedule', strategy, '--budget', 0.0008, '--eval-every', 0]
    runs = run(*flags, '--name', 'a', '--max-steps', 2)
    run('--resume', runs / 'a', small=False)
    lines = steps_of(runs / 'a')
    cost = lines[0]['units'] / 16
    assert [line['step'] for line in lines] == list(range(1, len(lines) + 1))
    assert lines[-1]['units'] >= 800 > lines[-2]['units']
    patches = {'p4': 16, 'p4-drop0.50': 8, 'p8': 4, 'p8-drop0.50': 2}
    assert lines[0]['query'] == strategy and lines[0]['tokens'] == 1 + patches[strategy]
    if strategy == 'p4':
        assert cost == pytest.approx(UNCOMPRESSED[method], rel=1e-3)
    else:
        assert cost < 0.9 * UNCOMPRESSED[method]
    assert all(math.isfinite(line['loss']) for line in lines)


def test_what_a_run_leaves(run, monkeypatch):
    monkeypatch.setattr(pictures, 'curves_of_run', CURVES)
    runs = run('--budget', 0.001, '--schedule', 'p8@0,p4@0.5')
    folder = runs / 'moco-fashion_mnist-0'
    files = {path.name for path in folder.iterdir()}
    assert files == {'args.json', 'log.jsonl', 'checkpoint.pt', 'backbone.pt', 'curves.png'}
    steps = steps_of(folder)
    wanted = ('step progress units samples loss lr momentum query key tokens seconds seconds_data '
              'feature_spread positive_similarity negative_similarity')
    assert set(wanted.split()) <= set(steps[0])
    assert [line['query'] for line in (steps[0], steps[-1])] == ['p8', 'p4']
    scores = [line for line in log_of(folder) if 'knn' in line]
    assert [score['step'] for score in scores] == [0, steps[-1]['step']]
    assert json.loads((folder / 'args.json').read_text())['schedule'] == 'p8@0,p4@0.5'
    run('--budget', 0.0001)                           # a second run does not touch the first
    assert (runs / 'moco-fashion_mnist-1').is_dir()


def test_timm_loads_the_backbone(run):
    runs = run('--budget', 0.0005, '--schedule', 'p8', '--name', 'a', '--eval-every', 0)
    saved = read(runs / 'a' / 'backbone.pt')
    model = timm.models.VisionTransformer(img_size=16, patch_size=4, in_chans=1, embed_dim=32,
                                          depth=1, num_heads=1, num_classes=0)
    model.load_state_dict(saved['model'])
    images = torch.rand(2, 1, 16, 16)
    ours = ViT(**saved['config'])
    ours.load_state_dict(saved['model'])
    assert torch.allclose(model(images), ours(images), atol=1e-5)


@pytest.mark.parametrize('flags, message', [
    (['--method', 'moco'], '(default: 0.99)'),
    (['--method', 'simclr'], '(default: 0.1)'),
    (['--method', 'dino'], '(default: 0.98)'),
])
def test_help_shows_the_defaults_and_fits_80_columns(flags, message, capsys, monkeypatch):
    monkeypatch.setattr('sys.argv', ['train.py'])
    with pytest.raises(SystemExit):
        train.main([*flags, '--help'])
    text = capsys.readouterr().out
    assert message in text
    assert [line for line in text.splitlines() if len(line) > 80] == []


# ---------------------------------------------------------------- the clock and the curves

def test_curves_follow_progress(run):
    """MoCo: lr 0.0016 x 16 / 256 = 1e-4 at its peak; momentum from 0.9 to 1 by half a cosine."""
    runs = run('--budget', 0.002, '--schedule', 'none', '--warmup', 0.1, '--lr', 0.0016,
               '--lr-schedule', 'polynomial', '--momentum', 0.9, '--name', 'a', '--eval-every', 0)
    progress = 0.0
    for line in steps_of(runs / 'a'):
        risen = min(1, progress / 0.1)
        falling = 1 - (max(0, progress - 0.1) / 0.9) ** 2
        assert line['lr'] == pytest.approx(1e-4 * risen * falling, abs=1e-12)
        momentum = 1 - 0.1 * 0.5 * (1 + math.cos(math.pi * progress))
        assert line['momentum'] == pytest.approx(momentum)
        progress = line['progress']


def test_clip_each_clips_each_tensor_alone():
    parameters = []
    for norm in (6.0, 4.0, 1.0):
        parameters.append(torch.nn.Parameter(torch.zeros(4)))
        parameters[-1].grad = torch.full((4,), norm / 2)
    train.clip_each(parameters, 3.0)
    norms = [round(parameter.grad.norm().item(), 4) for parameter in parameters]
    assert norms == [3, 3, 1]


# ---------------------------------------------------------------- DINO, step by step

def dino_by_hand(data, progress, world):
    """DINO's weights after len(progress) steps, written out for `world` processes.

    It takes the loop's data and draws, and does by hand AdamW with its two groups, clipping by
    tensor, the resting last layer, the teacher, the center, and every curve.
    """
    torch.manual_seed(0)
    encoder = ViT(img_size=16, patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=1)
    method = DINO(encoder, hidden=32, out_dim=32, local_crops=2)
    trained = {name: p for name, p in method.named_parameters() if p.requires_grad}
    orders = [batch_keys(len(data), 16, 0, 0, rank, world) for rank in range(world)]
    center = torch.zeros(1, 32)
    moments = {name: (0.0, 0.0, 0) for name in trained}
    for step, p in enumerate(progress):
        falls = 0.5 * (1 + math.cos(math.pi * p))     # from 1 to 0
        rate = p / 0.1 if p < 0.1 else 0.5 * (1 + math.cos(math.pi * (p - 0.1) / 0.9))
        lr = 1e-3 * 16 / 256 * rate
        decay = 0.4 + (0.04 - 0.4) * falls
        temperature = 0.04 + 0.03 * min(1, p / 0.3)
        gradients, logits = [], []
        for rank in range(world):
            images = data.images[[index for _, index in next(orders[rank])]]
            loss, teacher = dino_loss_by_hand(method, images, data, center, temperature,
                                              (0, rank, step))
            gradients.append(torch.autograd.grad(loss, list(trained.values())))
            logits.append(teacher)
        with torch.no_grad():
            for name, *of_ranks in zip(trained, *gradients):
                if 'last_layer' in name and p < 0.01:
                    continue
                mean = sum(of_ranks) / world
                mean = mean * min(1, 3 / (mean.norm().item() + 1e-6))
                moments[name] = adamw_by_hand(trained[name], mean, moments[name], lr, decay)
            momentum = 1 - 0.02 * falls
            for name, q in method.named_parameters():
                if name.startswith('teacher'):
                    student = trained.get(name.replace('teacher', 'student'), q)
                    q.copy_(momentum * q + (1 - momentum) * student)
            center = 0.5 * center + 0.5 * torch.cat(logits).mean(dim=0, keepdim=True)
    return {**{name: p.detach() for name, p in method.named_parameters()}, 'center': center}


def dino_loss_by_hand(method, images, data, center, temperature, key):
    """(loss, the teacher's logits) of the four views of a batch, one view at a time."""
    views = []
    for i, view in enumerate(recipe('dino', 16, 2, 8)):
        image, = make_views(images, [view], keyed_generator(*key, i))
        views.append(normalize(image, data.mean, data.std))
    teacher = [method.teacher_head(method.teacher(view)).detach() for view in views[:2]]
    student = [method.student_head(method.student(view)) for view in views]
    return dino_loss(student, teacher, center, temperature, 0.4), torch.cat(teacher)


def adamw_by_hand(parameter, gradient, moments, lr, decay):
    """One step in place: betas 0.9 and 0.999; biases and norms do not decay."""
    first, second, count = moments
    count += 1
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient ** 2
    size = (second / (1 - 0.999 ** count)).sqrt() + 1e-8
    decayed = lr * decay if parameter.ndim > 1 else 0
    parameter.copy_(parameter * (1 - decayed) - lr * first / (1 - 0.9 ** count) / size)
    return first, second, count


@pytest.mark.parametrize('world', (1, 2))
def test_dino_steps_equal_those_written_out_by_hand(run, tiny_fashion, tmp_path, world):
    """A step costs 16 x 10.67 = 171 of 16,000 units, 1.07 %: the last layer rests for one."""
    flags = ['--method', 'dino', '--schedule', 'none', '--budget', '0.016', '--max-steps', '15',
             '--lr', '1e-3', '--name', 'a', '--eval-every', '0']
    if world == 1:
        run(*flags)
    else:
        flags = [*SMALL, '--data-root', tiny_fashion, *flags]
        done = torchrun(2, 'train.py', *flags, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count('is chance') == 1    # one of the processes speaks
    data = load('fashion_mnist', tiny_fashion)
    folder = tmp_path / 'runs' / 'a'
    checkpoint = read(folder / 'checkpoint.pt')
    saved = checkpoint['method']
    progress = [0.0, *[line['progress'] for line in steps_of(folder)]][:15]
    start = dino_by_hand(data, [], world)
    expected = dino_by_hand(data, progress, world)
    assert set(expected) == set(saved)
    for name, value in expected.items():
        moved = (value - start[name]).norm()
        # Adam's first steps divide rounding by rounding
        assert (saved[name] - value).norm() <= 2e-2 * moved + 1e-5, name
    last = 'student_head.last_layer.weight'
    assert torch.equal(dino_by_hand(data, [0.0], world)[last], start[last])
    assert not torch.equal(expected[last], start[last])
    # the decay is too small to be seen in the weights after 15 steps
    decay = 0.04 + 0.36 * 0.5 * (1 - math.cos(math.pi * progress[-1]))
    groups = checkpoint['optimizer']['param_groups']
    assert [group['weight_decay'] for group in groups] == [pytest.approx(decay), 0]


# ---------------------------------------------------------------- what the draws depend on

def test_draws_depend_on_their_key_alone():
    """The same key renders the same views and keeps the same tokens; another key draws others."""
    args, _ = train.parse_args([*SMALL, '--schedule', 'p8-drop0.50'])
    plan = train.make_plan(args, 1, 320)
    images = torch.randint(256, (16, 1, 28, 28), dtype=torch.uint8)

    def drawn(*key):
        views, _, generator = train.render_views(plan, images, Compression(8, 0.5), key, 'cpu')
        return [*views, torch.rand(4, generator=generator)]
    assert same(drawn(0, 0, 5), drawn(0, 0, 5))
    for other in ((1, 0, 5), (0, 1, 5), (0, 0, 6)):   # another seed, process or step
        assert not any(map(same, drawn(0, 0, 5), drawn(*other)))


@pytest.mark.parametrize('flags, sides, scales', [
    ([], [224, 224, 96], [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)]),
    (['--crop-scale', '0.5'], [224, 224, 96], [(0.5, 1.0), (0.5, 1.0), (0.05, 0.4)]),
    (['--local-size', '64'], [224, 224, 64], [(0.4, 1.0), (0.4, 1.0), (0.05, 0.4)]),
])
def test_views_of_dino(flags, sides, scales):
    """Local views keep DINO's share of the side, 96 of 224, and crops of their own."""
    common = ['--method', 'dino', '--img-size', '224', '--local-crops', '1']
    args, _ = train.parse_args([*common, *flags])
    views = train.build_views(args)
    assert [view.side for view in views] == sides
    assert [view.scale for view in views] == scales


def test_jitter_scales_all_strengths_of_every_view():
    args, _ = train.parse_args(['--method', 'dino', '--local-crops', '1', '--jitter', '2'])
    assert [view.jitter for view in train.build_views(args)] == 3 * [(0.8, 0.8, 0.4, 0.2)]


# ---------------------------------------------------------------- patch sizes by branch

def test_patch_branch_query_renders_each_branch_at_its_own_side(run, capsys):
    """At 16 px and patch 12 the query is 12 px wide and one patch, the key 16 px and 16 patches.

    A view that no branch reads is not made: MoCo's query is view 1 and its key is view 2.
    """
    flags = ['--schedule', 'p12', '--patch-branch', 'query', '--name', 'a', '--budget', 0.001]
    args, _ = train.parse_args([*SMALL, *map(str, flags)])
    plan = train.make_plan(args, 1, 320)
    images = torch.zeros(16, 1, 28, 28, dtype=torch.uint8)
    views, key_views, _ = train.render_views(plan, images, Compression(12), (0,), 'cpu')
    assert [view is None for view in views] == [False, True]
    assert [view is None for view in key_views] == [True, False]
    assert views[0].shape[-1] == 12 and key_views[1].shape[-1] == 16
    line = steps_of(run(*flags) / 'a')[0]
    assert (line['query'], line['key'], line['tokens']) == ('p12', 'p4', 2)
    # the key branch costs 1, the query's one patch and class token about 3 x 2 / 17
    assert 1 < line['units'] / 16 < 1 + 3 * 3 / 17


# ---------------------------------------------------------------- gradient errors

GRADSTATS = ['--probe-batches', 4, '--grid', 'p8,p4-drop0.50', '--metric', 'euclidean']


@pytest.mark.parametrize('method', UNCOMPRESSED)
def test_measuring_changes_nothing_in_the_run(run, method):
    flags = ['--method', method, '--budget', 0.001, '--schedule', STAGES, '--eval-every', 0]
    runs = run(*flags, '--name', 'plain')
    run(*flags, '--name', 'measured', '--gradstats', '0,0.5,1', *GRADSTATS)
    rows = rows_of(runs / 'measured')
    (runs / 'measured' / 'gradstats.jsonl').unlink()
    assert_same_run(runs / 'plain', runs / 'measured')
    measured = [(row['progress'], row['strategy']) for row in rows]
    assert measured == [(p, s) for p in (0, 0.5, 1) for s in ('p4', 'p8', 'p4-drop0.50')]
    assert all(row['variance'] > 0 and row['num_batches'] == 4 for row in rows)
    assert rows[0]['cost'] == 1 > rows[1]['cost']     # relative to the uncompressed sample


def test_probe_gradient_is_that_of_a_training_step(run, monkeypatch, tiny_fashion):
    """The probe's flat gradient is what backward leaves in .grad, on views made here by hand."""
    seen = []

    def compare(grad_fn, strategies, base, batches, groups, scale):
        index = keyed_generator(0, 'probe order', 0, 0)
        images = data.images[torch.randperm(320, generator=index)[:16]]
        views = [make_views(images, [view], keyed_generator(0, 0, 'probe', 0, 0, i))[0]
                 for i, view in enumerate(recipe('moco', 16))]
        views = [normalize(view, data.mean, data.std) for view in views]
        method = copy.deepcopy(methods[0])
        method(views)[0].backward()
        grads = [p.grad.flatten() for p in method.parameters() if p.requires_grad]
        seen.append(torch.equal(grad_fn(0, Compression(4)), torch.cat(grads)))
        return {}

    data = load('fashion_mnist', tiny_fashion)
    methods = []
    build = train.build_method
    monkeypatch.setattr(train, 'build_method', lambda *a: methods.append(build(*a)) or methods[0])
    monkeypatch.setattr(train, 'gradient_stats', compare)
    run('--schedule', 'none', '--gradstats', '0', *GRADSTATS, '--budget', 0.0001)
    assert seen == [True]


# ---------------------------------------------------------------- resume

@pytest.mark.parametrize('flags', [
    ['--method', 'moco', '--schedule', STAGES, '--budget', 0.001],
    ['--method', 'dino', '--schedule', STAGES, '--budget', 0.002],
    ['--schedule', 'p8', '--gradstats', '0.25,0.5,1', *GRADSTATS, '--budget', 0.0006],
], ids=('moco', 'dino', 'gradstats'))
def test_resume_is_bit_exact(run, flags):
    flags = [*flags, '--eval-every', 0.25]
    runs = run(*flags, '--name', 'whole')
    run(*flags, '--name', 'parts', '--max-steps', 9)
    run('--resume', runs / 'parts', small=False)
    assert len(steps_of(runs / 'whole')) > 15
    assert_same_run(runs / 'whole', runs / 'parts')


def test_a_schedule_given_anew_takes_over(run):
    flags = ['--budget', 0.002, '--eval-every', 0, '--name', 'a']
    runs = run(*flags, '--schedule', 'p8', '--max-steps', 3)
    run('--resume', runs / 'a', '--schedule', 'p4-drop0.50@0', '--max-steps', 6, small=False)
    run('--resume', runs / 'a', '--max-steps', 8, small=False)
    queries = [line['query'] for line in steps_of(runs / 'a')]
    assert queries == ['p8'] * 3 + ['p4-drop0.50'] * 5


# ---------------------------------------------------------------- what would it cost?

def test_the_commands_of_the_paper_run_dry(capsys, tmp_path, monkeypatch):
    """Three methods under three schedules. An uncompressed sample of MoCo-v3 costs 4 units."""
    monkeypatch.chdir(tmp_path)
    reproduce.main(['run', 'paper', '--budgets', '1537', '--dry-run'])
    commands = capsys.readouterr().out.splitlines()
    assert len(commands) == 9
    for command in commands:
        train.main([*shlex.split(command)[2:], '--dry-run', '--num-images', '1281167'])
        text = capsys.readouterr().out
        cost = float(re.search(r'p16 .* ([\d.]+)$', text, re.M)[1])
        assert cost == pytest.approx(dict(moco=4, simclr=6, dino=12.4)[text.split()[2]], rel=0.005)
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_the_paper(capsys):
    """1,537 M units are 300 epochs of 1,281,167 images at 4 units, heads aside. 14^2 + 1 = 197."""
    flags = '--arch vit_base --img-size 224 --patch-size 16 --budget 1537 --num-images 1281167'
    schedule = 'p30@0,p16@0.5'
    train.main([*flags.split(), '--schedule', schedule, '--hidden', '4096', '--dry-run'])
    text = capsys.readouterr().out
    assert 'images at 224 px' in text
    epochs = float(re.search(r'([\d.]+) uncompressed epochs', text)[1])
    assert epochs == pytest.approx(300, rel=0.02)
    columns = [line.split() for line in text.splitlines() if line.startswith('  p')]
    assert columns[0][:4] == ['p16', '197', '197', '224']
    assert columns[1][:4] == ['p30', '50', '50', '210']
