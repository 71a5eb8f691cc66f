"""losses.py against lightly, naive loops, closed forms, and two processes against one."""
import copy
import math
from collections import Counter

import pytest
import torch
import torch.multiprocessing
import torch.nn as nn
import torch.nn.functional as F
from conftest import error
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, MoCoProjectionHead
from lightly.models.utils import update_momentum
from methods import METHODS, STEPS, build, one_step, views_of, worker
from torch._subclasses import FakeTensorMode

import compress
from gradstats import unchanged
from losses import DINOHead, dino_loss, ema_update, info_nce, mlp_head, monitors, nt_xent

EYE = torch.eye(8, dtype=torch.float64)


def rand(*shape):
    return torch.randn(shape, dtype=torch.float64)


# ---- InfoNCE

@pytest.mark.parametrize('temperature', (0.07, 0.2, 1.0))
def test_info_nce_equals_a_loop(temperature):
    q, k = rand(2, 6, 5)
    total = 0
    for i in range(6):
        cosines = [F.cosine_similarity(q[i], key, dim=0) for key in k]
        weights = [torch.exp(cosine / temperature) for cosine in cosines]
        total -= torch.log(weights[i] / sum(weights))
    expected = 2 * temperature * total / 6
    assert error(info_nce(q, k, temperature), expected) < 1e-14


def test_info_nce_closed_forms():
    """T = 0.2. 4096 equal features: 2T ln 4096. q = k = I_8: 2T ln(1 + 7 e^-5)."""
    same = torch.ones(4096, 8)
    assert info_nce(same, same).item() == pytest.approx(3.327106)
    assert info_nce(EYE, EYE).item() == pytest.approx(0.018434845)


def test_info_nce_gradient_does_not_depend_on_the_temperature():
    """Thanks to 2T. Without it the norms at T = 0.2 and 1 would differ 5 times; measured: 1 %."""
    q = torch.randn(64, 16, requires_grad=True)
    k = torch.randn(64, 16, requires_grad=True)
    norms = []
    for temperature in (0.2, 1.0):
        q.grad = None
        info_nce(q, k, temperature).backward()
        norms.append(q.grad.norm().item())
    assert norms[0] == pytest.approx(norms[1], rel=0.05)
    assert k.grad is None                                     # keys are constants


# ---- NT-Xent

@pytest.mark.parametrize('temperature', (0.1, 0.5))
def test_nt_xent_and_its_gradient_equal_lightly(temperature):
    ours = torch.randn(2, 16, 8, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    loss = nt_xent(*ours, temperature)
    reference = NTXentLoss(temperature)(*theirs)
    loss.backward()
    reference.backward()
    assert error(loss, reference) < 1e-6
    assert error(ours.grad, theirs.grad) < 1e-7


def test_nt_xent_closed_forms():
    """2N = 16 equal features: ln 15. z1 = z2 = I_8, T = 0.5: 14 negatives, ln(1 + 14 e^-2)."""
    same = torch.ones(8, 4)
    assert nt_xent(same, same).item() == pytest.approx(2.708050)
    assert nt_xent(EYE, EYE, 0.5).item() == pytest.approx(1.062879)


# ---- DINO

def test_dino_loss_and_center_equal_lightly():
    """2 global views against 5. lightly's center moves by 0.1 a step, after the loss."""
    theirs = DINOLoss(64)
    center = torch.zeros(1, 64)
    for temperature in (0.04, 0.055, 0.07):
        teacher = torch.randn(2, 8, 64)
        student = torch.randn(5, 8, 64)
        loss = dino_loss(student, teacher, center, temperature)
        reference = theirs(list(teacher), list(student), teacher_temp=temperature)
        assert error(loss, reference) < 5e-6
        center = center.lerp(teacher.mean(dim=(0, 1))[None], 0.1)
        assert error(center, theirs.center.reshape(1, 64)) < 1e-6


def test_dino_head_equals_lightly():
    ours = DINOHead(384, out_dim=512)
    theirs = DINOProjectionHead(384, output_dim=512)
    theirs.layers.load_state_dict(ours.mlp.state_dict())
    theirs.last_layer.weight_v.data = ours.last_layer.weight.data
    x = torch.randn(4, 384)
    assert error(ours(x), theirs(x)) < 1e-6
    assert ours(x).abs().max() <= 1


def test_the_center_moves_in_update_teacher_alone():
    """Three steps with the same batch mean m, from 0: (1 - 0.9^3) m."""
    method = build('dino')
    views = views_of('dino')
    logits = [method.teacher_head(method.teacher(view)) for view in views[:2]]
    mean = torch.cat(logits).mean(dim=0)
    for _ in range(3):
        method(views)
        method.update_teacher(1.0)
    assert error(method.center[0], (1 - 0.9 ** 3) * mean) < 1e-6


def test_dino_over_training():
    """The temperature 0.04 to 0.07 over the first 30 %, the last layer at rest for 1 %."""
    method = build('dino')
    last_layer = method.student_head.last_layer.weight
    for progress, temperature in {0: 0.04, 0.15: 0.055, 0.3: 0.07, 1: 0.07}.items():
        method.at(progress)
        assert method.teacher_temp == pytest.approx(temperature)
    method.at(0.01)
    assert method.frozen() == []
    method.at(0.009)
    assert len(method.frozen()) == 1
    assert method.frozen()[0] is last_layer


# ---- heads, the EMA copy, monitors

def test_heads_have_the_papers_sizes():
    """MoCo-v3's for ViT-S and ViT-B, SLIP's for ViT-B, DINO's for ViT-S with 65,536 outputs."""
    def parameters(head):
        return sum(p.numel() for p in head.parameters())

    with torch.device('meta'):
        assert parameters(mlp_head((384, 4096, 4096, 256), False, True)) == 19_415_040
        assert parameters(mlp_head((768, 4096, 4096, 256), False, True)) == 20_987_904
        assert parameters(mlp_head((256, 4096, 256), False, True)) == 2_105_344
        assert parameters(mlp_head((768, 4096, 4096, 256), True, False)) == 20_996_352
        assert parameters(DINOHead(384)) == 22_286_592


def test_moco_head_equals_lightly():
    """Its last BatchNorm has no affine part, lightly's is 1 and 0 at its start."""
    ours = mlp_head((32, 64, 64, 16), bias=False, last_norm=True)
    theirs = MoCoProjectionHead(32, 64, 16, num_layers=3, batch_norm=True)
    theirs.layers.load_state_dict(ours.state_dict(), strict=False)
    x = torch.randn(50, 32)
    assert error(ours(x), theirs(x)) < 1e-6


def test_ema_equals_lightly_and_skips_buffers():
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ours = copy.deepcopy(student)
    theirs = copy.deepcopy(student)
    nn.init.normal_(student[0].weight)
    student(torch.randn(8, 4) + 3)                            # moves the running mean
    ema_update(ours, student, 0.9)
    update_momentum(student, theirs, 0.9)
    for a, b in zip(ours.parameters(), theirs.parameters()):
        assert error(a, b) < 1e-7
    assert ours[1].running_mean.abs().max() == 0


def test_feature_spread():
    """1 for features all over the sphere, 0 for one and the same. 5,000 draws of 64: 1 +- 0.002."""
    wide = torch.randn(5000, 64)
    same = torch.ones(50, 64)
    assert monitors(wide, wide, wide)['feature_spread'].item() == pytest.approx(1, abs=0.01)
    assert monitors(same, same, same)['feature_spread'] < 1e-6


def test_similarities_equal_the_means_of_all_pairs():
    a, b = torch.randn(2, 6, 4)
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    shown = monitors(a, a, b)
    off_diagonal = cosines[~torch.eye(6, dtype=torch.bool)]
    assert error(shown['positive_similarity'], cosines.diag().mean()) < 1e-6
    assert error(shown['negative_similarity'], off_diagonal.mean()) < 1e-6


# ---- which branch sees what

class Recorder(nn.Module):
    """An encoder that writes down, per image, (side, patch size, drop rate, with gradient)."""
    embed_dim = 48
    calls = []

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, patch_size, drop_rate, generator):
        call = (x.shape[-1], patch_size, drop_rate, torch.is_grad_enabled())
        self.calls.extend([call] * len(x))
        return F.adaptive_avg_pool2d(x, 4).flatten(1) * self.scale


def expected_passes(name, symmetric, key):
    """Rows (view, branch, patch size, drop rate, with gradient) under patch 8, drop rate 0.5."""
    def query(view):
        return view, 'query', 8, 0.5, True

    def target(view, grad=False):
        return view, 'key', *key, grad

    if name == 'simclr':
        return [query(0), target(1, grad=True)]
    if name == 'dino':
        return [query(0), query(1), query(2), query(3), target(0), target(1)]
    if symmetric:
        return [query(0), target(1), query(1), target(0)]
    return [query(0), target(1)]


@pytest.mark.parametrize('patch_branch, drop_branch, key', [
    ('both', 'query', (8, 0.0)),
    ('both', 'both', (8, 0.5)),
    ('query', 'query', (None, 0.0)),
    ('query', 'both', (None, 0.5)),
])
@pytest.mark.parametrize('title', STEPS)
def test_passes_are_the_calls_of_the_encoder(title, patch_branch, drop_branch, key):
    """By hand, as .passes() lists them, and as a forward makes them.

    Every view has a side of its own, also those for the key branch, so that the side tells which.
    """
    name = title.split(',')[0]
    options = dict(STEPS[title], drop_branch=drop_branch, patch_branch=patch_branch)
    method = build(name, Recorder(), **options)
    by_hand = expected_passes(name, 'symmetric' in options, key)
    fields = ('view', 'branch', 'patch_size', 'drop_rate', 'grad')
    listed = [tuple(one[field] for field in fields) for one in method.passes(8, 0.5)]
    assert Counter(listed) == Counter(by_hand)

    sides = dict(query=[16, 20], key=[24, 28])
    if name == 'dino':                                        # which joins views of one side
        sides = dict(query=[16, 16, 8, 8], key=[24, 24])
    views = [torch.randn(2, 3, side, side) for side in sides['query']]
    key_views = [torch.randn(2, 3, side, side) for side in sides['key']]
    Recorder.calls.clear()
    method(views, 8, 0.5, key_views=key_views)
    expected = [(sides[branch][view], *rest) for view, branch, *rest in by_hand]
    assert Counter(Recorder.calls) == Counter(expected * 2)


def test_moco_is_the_algorithm_box():
    """k from the teacher and its projector, q from the student, its projector and the predictor."""
    method = build('moco')
    x1, x2 = views_of('moco')
    for parameter in method.teacher_projector.parameters():   # so that the branches differ
        nn.init.normal_(parameter)
    q = method.predictor(method.projector(method.student(x1)))
    k = method.teacher_projector(method.teacher(x2))
    loss, _ = method([x1, x2])
    assert error(loss, info_nce(q, k)) < 1e-6


def test_symmetric_moco_is_the_sum_of_its_directions():
    method = build('moco')
    x1, x2 = views_of('moco')
    one, _ = method([x1, x2])
    other, _ = method([x2, x1])
    method.symmetric = True
    both, _ = method([x1, x2])
    assert error(both, one + other) < 1e-6


def test_dino_equals_its_official_form_view_by_view():
    method = build('dino')
    views = views_of('dino')
    nn.init.normal_(method.teacher_head.mlp[0].weight)        # so that the branches differ
    nn.init.normal_(method.center, std=0.1)
    teacher = [method.teacher_head(method.teacher(view)) for view in views[:2]]
    student = [method.student_head(method.student(view)) for view in views]
    loss, metrics = method(views)
    assert error(loss, dino_loss(student, teacher, method.center, 0.04)) < 1e-5
    targets = torch.softmax((torch.cat(teacher) - method.center) / 0.04, dim=1)
    entropy = torch.distributions.Categorical(targets).entropy().mean()
    assert error(metrics['teacher_entropy'], entropy) < 1e-5


@pytest.mark.parametrize('name, exported', [
    ('moco', 'student'),
    ('simclr', 'student'),
    ('dino', 'teacher'),
])
def test_the_encoder_that_is_exported(name, exported):
    method = build(name)
    assert method.encoder is getattr(method, exported)


# ---- what a step changes

@pytest.mark.parametrize('name', METHODS)
def test_the_gradient_reaches_the_student_alone(name):
    method = build(name)
    loss, _ = method(views_of(name), 8, 0.5)
    loss.backward()
    for title, parameter in method.named_parameters():
        fixed = title.startswith('teacher') or title.endswith('pos_embed')
        reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert parameter.requires_grad == reached == (not fixed), title


@pytest.mark.parametrize('name', METHODS)
def test_a_forward_changes_only_what_it_overwrites(name):
    """BatchNorm's statistics and DINO's batch mean: no weight, no center."""
    method = build(name)
    before = copy.deepcopy(method)
    loss, _ = method(views_of(name), 8, 0.5)
    loss.backward()
    for old, new in zip(before.parameters(), method.parameters()):
        assert torch.equal(old, new)
    changed = set()
    for (title, old), new in zip(before.named_buffers(), method.buffers()):
        if not torch.equal(old, new):
            changed.add(title.split('.')[-1])
    batch_norm = {'running_mean', 'running_var', 'num_batches_tracked'}
    assert changed == ({'batch_center'} if name == 'dino' else batch_norm)


@pytest.mark.parametrize('name', METHODS)
def test_unchanged_puts_the_buffers_back(name):
    method = build(name)
    before = copy.deepcopy(method)
    with unchanged(method):
        method(views_of(name), 8, 0.5)
    for old, new in zip(before.buffers(), method.buffers()):
        assert torch.equal(old, new)


@pytest.mark.parametrize('name', METHODS)
def test_update_teacher(name):
    """The student moved by 1: with momentum 0.75, all of the teacher moves by 0.25."""
    method = build(name)
    before = copy.deepcopy(method)
    with torch.no_grad():
        for parameter in method.parameters():
            parameter += parameter.requires_grad
    method.update_teacher(0.75)
    for (title, old), new in zip(before.named_parameters(), method.parameters()):
        if title.startswith('teacher') and not title.endswith('pos_embed'):
            assert error(new, old + 0.25) < 1e-6
        else:
            assert torch.equal(new, old + new.requires_grad)


@pytest.mark.parametrize('name', METHODS)
def test_chance_loss_of_equal_features(name):
    """MoCo 2T ln 8 = 0.83, SimCLR ln 15 = 2.71; DINO's uniform outputs ln 64 = 4.16.

    BatchNorm is in eval mode: it would blow up rounding noise.
    """
    method = build(name).eval()
    views = [view[:1].expand_as(view) for view in views_of(name)]
    views[1] = views[0]
    if name == 'dino':
        nn.init.zeros_(method.student_head.mlp[-1].weight)
        nn.init.zeros_(method.teacher_head.mlp[-1].weight)
    chances = dict(moco=0.4 * math.log(8), simclr=math.log(15), dino=math.log(64))
    by_hand = chances[name]
    assert method.chance_loss(8) == pytest.approx(by_hand)
    assert method(views)[0].item() == pytest.approx(by_hand, abs=1e-5)
    if name == 'moco':
        method.symmetric = True
        assert method.chance_loss(8) == pytest.approx(2 * by_hand)


# ---- precision and devices

@pytest.mark.parametrize('name', METHODS)
def test_losses_stay_float32_under_bfloat16_autocast(name):
    method = build(name)
    with torch.autocast('cpu', torch.bfloat16):
        loss, metrics = method(views_of(name), 8, 0.5)
    loss.backward()
    assert loss.isfinite()
    for value in (loss, *metrics.values()):
        assert value.dtype == torch.float32


def test_autocast_does_not_change_a_loss():
    q, k = torch.randn(2, 8, 16)
    for loss in (info_nce, nt_xent):
        plain = loss(q, k)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(loss(q, k), plain)


@pytest.fixture
def no_cached_matrices():
    """Fake matrices must not stay in the caches, nor real ones be found there."""
    caches = (compress.resize_matrix, compress._pi_matrix)
    for cache in caches:
        cache.cache_clear()
    yield
    for cache in caches:
        cache.cache_clear()


@pytest.mark.parametrize('name', METHODS)
def test_no_tensor_is_left_on_the_cpu(name, no_cached_matrices):
    """Fake tensors on a GPU that is not there complain of a tensor made on another device."""
    method = build(name)
    shapes = [view.shape for view in views_of(name)]
    generator = torch.Generator('cpu')
    with FakeTensorMode(), torch.device('cuda'):
        for module in method.modules():
            for key, p in list(module.named_parameters(recurse=False)):
                setattr(module, key, nn.Parameter(torch.empty(p.shape), p.requires_grad))
            for key, buffer in list(module.named_buffers(recurse=False)):
                setattr(module, key, torch.empty(buffer.shape, dtype=buffer.dtype))
        views = [torch.empty(shape) for shape in shapes]
        for patch_size, drop_rate in ((4, 0.0), (8, 0.5)):
            loss, metrics = method(views, patch_size, drop_rate, generator)
            for value in (loss, *metrics.values()):
                assert value.device.type == 'cuda'
        method.update_teacher(0.99)


# ---- two processes against one

@pytest.fixture(scope='module')
def two_processes(tmp_path_factory):
    """Losses, gradients and centers of two gloo processes, which share the batch."""
    folder = tmp_path_factory.mktemp('processes')
    torch.multiprocessing.spawn(worker, (2, str(folder)), nprocs=2)
    return torch.load(folder / 'results.pt')


@pytest.mark.parametrize('title', STEPS)
def test_two_processes_equal_one(title, two_processes):
    """Means over the processes, in float64: those of one process on the joined batch."""
    for one, two in zip(one_step(title), two_processes[title]):
        assert (one - two).norm() <= 1e-13 * one.norm()


# ---- arguments out of range

def moco_at(temperature):
    return build('moco', temperature=temperature)(views_of('moco'))


def update(name, momentum):
    build(name).update_teacher(momentum)


ONE = torch.ones(4, 8)
LOGITS = [ONE, ONE]
BAD_ARGUMENTS = [
    (info_nce, (ONE, ONE, 0), 'temperature 0 must be above 0'),
    (info_nce, (ONE, ONE, math.nan), 'temperature nan'),
    (info_nce, (ONE, ONE[:3]), r'shapes \(4, 8\) and \(3, 8\)'),
    (nt_xent, (ONE, ONE, -0.1), 'temperature -0.1'),
    (nt_xent, (ONE, ONE[:, :3]), r'shapes \(4, 8\) and \(4, 3\)'),
    (dino_loss, (LOGITS, LOGITS, ONE[:1], 0), 'temperatures 0 and 0.1'),
    (dino_loss, (LOGITS, LOGITS, ONE[:1], 0.04, math.nan), 'temperatures 0.04 and nan'),
    (moco_at, (math.nan,), 'temperature nan'),
    (update, ('moco', 1.5), 'momentum 1.5'),
    (update, ('dino', math.nan), 'momentum nan'),
]


@pytest.mark.parametrize('function, arguments, message', BAD_ARGUMENTS)
def test_arguments_out_of_range(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
