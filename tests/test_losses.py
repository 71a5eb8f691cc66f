"""losses.py against lightly, naive loops, closed forms, and two processes against one."""
import copy
import math
from collections import Counter
from operator import itemgetter

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
import vit
from gradstats import unchanged
from losses import (DINOHead, check_branches, dino_loss, ema_update, info_nce, mlp_head, monitors,
                    nt_xent)

ONE = torch.ones(4, 8)
EYE = torch.eye(8, dtype=torch.float64)

each_method = pytest.mark.parametrize('name', METHODS)


# ---- losses

@pytest.mark.parametrize('loss, features, temperature, expected', [
    (info_nce, torch.ones(4096, 8), 0.2, 0.4 * math.log(4096)),
    (info_nce, EYE, 0.2, 0.4 * math.log(1 + 7 * math.exp(-5))),
    (nt_xent, torch.ones(8, 4), 0.1, math.log(15)),
    (nt_xent, EYE, 0.5, math.log(1 + 14 * math.exp(-2))),
])
def test_closed_forms(loss, features, temperature, expected):
    assert loss(features, features, temperature).item() == pytest.approx(expected)


@pytest.mark.parametrize('temperature', (0.07, 0.2, 1.0))
def test_info_nce_equals_a_loop(temperature):
    q, k = torch.randn(2, 6, 5, dtype=torch.float64)
    k.requires_grad_()
    total = 0
    for i in range(6):
        cosines = [F.cosine_similarity(q[i], key, dim=0) for key in k]
        weights = [torch.exp(cosine / temperature) for cosine in cosines]
        total -= torch.log(weights[i] / sum(weights))
    expected = 2 * temperature * total / 6
    loss = info_nce(q, k, temperature)
    assert error(loss, expected) < 1e-14
    assert not loss.requires_grad                             # keys are constants


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


@pytest.mark.parametrize('student_temp', (0.1, 0.4))
def test_small_logits_of_dino_change_by_correlation_times_ratio_of_temperatures(student_temp):
    """Two noisy views of a pattern for each image. The student multiplies its own view by a scale.
    The loss of small logits is quadratic in it, so two slopes tell the best one.
    """
    pattern, noise, other_noise = 1e-4 * torch.randn(3, 200, 16, dtype=torch.float64)
    mine, theirs = (view - view.mean(dim=1, keepdim=True)
                    for view in (pattern + noise, pattern + other_noise))
    center = theirs.mean(dim=0, keepdim=True)
    scale = torch.tensor([0.0, 1.0], dtype=torch.float64, requires_grad=True)
    losses = [dino_loss([mine, s * mine], [theirs], center, 0.04, student_temp) for s in scale]
    at_0, at_1 = torch.autograd.grad(sum(losses), scale)[0]
    foretold = (mine * (theirs - center)).sum() / mine.square().sum()      # about one half
    assert error(at_0 / (at_0 - at_1), foretold * student_temp / 0.04) < 1e-3


class SameLogits(nn.Module):
    """A head that gives every image the same outputs."""

    def __init__(self):
        super().__init__()
        self.logits = nn.Parameter(1e-4 * torch.randn(1, 64, dtype=torch.float64))

    def forward(self, x):
        return self.logits.expand(len(x), -1)


@pytest.mark.parametrize('center_momentum, grows', [(0.9, True), (0.8, False), (0.5, False)])
def test_the_center_holds_the_mean_output_only_if_it_is_fast(center_momentum, grows):
    """With m = 0.98 and G = 0.4 / 0.04, (1 - m) (G - 1) = 0.18. The student always has the outputs
    of least loss, those whose softmax is the teacher's.
    """
    method = build('dino').double()
    method.student_head, method.teacher_head = SameLogits(), SameLogits()
    method.student_temp = 0.4
    method.center_momentum = center_momentum
    views = [view.double() for view in views_of('dino')]
    teacher = method.teacher_head.logits.data
    teacher -= teacher.mean()
    size = teacher.norm()
    for _ in range(100):
        targets = F.log_softmax((teacher - method.center) / 0.04, dim=1)
        method.student_head.logits.data = 0.4 * (targets - targets.mean())
        loss, _ = method(views)
        assert torch.autograd.grad(loss, method.student_head.logits)[0].abs().max() < 1e-12
        method.update_teacher(0.98)
    assert (teacher.norm() > size) == grows


def test_autocast_does_not_change_a_loss():
    q, k = torch.randn(2, 8, 16)
    for loss in (info_nce, nt_xent):
        plain = loss(q, k)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(loss(q, k), plain)


# ---- heads, the EMA copy, monitors

def test_heads_have_the_papers_sizes():
    """MoCo-v3's and its predictor for ViT-S, SLIP's for ViT-B, DINO's for ViT-S."""
    with torch.device('meta'):
        heads = [
            mlp_head((384, 4096, 4096, 256), False, True),
            mlp_head((256, 4096, 256), False, True),
            mlp_head((768, 4096, 4096, 256), True, False),
            DINOHead(384),
        ]
    sizes = [sum(p.numel() for p in head.parameters()) for head in heads]
    assert sizes == [19_415_040, 2_105_344, 20_996_352, 22_286_592]


def test_dino_head_equals_lightly():
    ours = DINOHead(384, out_dim=512)
    theirs = DINOProjectionHead(384, output_dim=512)
    theirs.layers.load_state_dict(ours.mlp.state_dict())
    theirs.last_layer.weight_v.data = ours.last_layer.weight.data
    x = torch.randn(4, 384)
    assert error(ours(x), theirs(x)) < 1e-6


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


def test_monitors():
    wide = torch.randn(5000, 64)                              # the whole sphere: 1 +- 0.002
    assert monitors(wide, wide, wide)['feature_spread'].item() == pytest.approx(1, abs=0.01)
    a, b = torch.randn(2, 6, 4)
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    spread, positive, negative = monitors(ONE, a, b).values()
    assert spread < 1e-6
    assert error(positive, cosines.diag().mean()) < 1e-6
    assert error(negative, cosines[~torch.eye(6, dtype=torch.bool)].mean()) < 1e-6


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


QUERIES_AND_KEYS = {                                          # the views that each branch sees
    'moco': ([0], [1]),
    'moco, both directions': ([0, 1], [0, 1]),
    'simclr': ([0], [1]),
    'dino': ([0, 1, 2, 3], [0, 1]),
}


@pytest.mark.parametrize('patch_branch, drop_branch, key', [
    ('both', 'query', (8, 0.0)),
    ('both', 'both', (8, 0.5)),
    ('query', 'query', (None, 0.0)),
    ('query', 'both', (None, 0.5)),
])
@pytest.mark.parametrize('title', STEPS)
def test_passes_are_the_calls_of_the_encoder(title, patch_branch, drop_branch, key):
    """By hand, as .passes() lists them, and as a forward makes them.

    The views of the two branches differ in side, so that the side tells which was seen.
    """
    queries, keys = QUERIES_AND_KEYS[title]
    grad = title == 'simclr'
    by_hand = [(view, 'query', 8, 0.5, True) for view in queries]
    by_hand += [(view, 'key', *key, grad) for view in keys]

    name = title.split(',')[0]
    options = dict(STEPS[title], drop_branch=drop_branch, patch_branch=patch_branch)
    method = build(name, Recorder(), **options)
    fields = itemgetter('view', 'branch', 'patch_size', 'drop_rate', 'grad')
    listed = map(fields, method.passes(8, 0.5))
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
    """k from the teacher and its projector, q from the student, its projector and the predictor.

    The symmetric loss is the sum of both directions.
    """
    method = build('moco')
    for parameter in method.teacher_projector.parameters():   # so that the branches differ
        nn.init.normal_(parameter)

    def direction(x1, x2):
        q = method.predictor(method.projector(method.student(x1)))
        k = method.teacher_projector(method.teacher(x2))
        return info_nce(q, k)

    x1, x2 = views_of('moco')
    assert error(method([x1, x2])[0], direction(x1, x2)) < 1e-6
    method.symmetric = True
    assert error(method([x1, x2])[0], direction(x1, x2) + direction(x2, x1)) < 1e-6


def test_dino_equals_its_official_form_view_by_view():
    """Then 0.1 of the batch's mean enters the center."""
    method = build('dino')
    views = views_of('dino')
    nn.init.normal_(method.teacher_head.mlp[0].weight)        # so that the branches differ
    center = nn.init.normal_(method.center, std=0.1).clone()
    teacher = [method.teacher_head(method.teacher(view)) for view in views[:2]]
    student = [method.student_head(method.student(view)) for view in views]
    loss, metrics = method(views)
    assert error(loss, dino_loss(student, teacher, center, 0.04)) < 1e-5
    teacher = torch.cat(teacher)
    targets = torch.softmax((teacher - center) / 0.04, dim=1)
    entropy = torch.distributions.Categorical(targets).entropy().mean()
    assert error(metrics['teacher_entropy'], entropy) < 1e-5
    method.update_teacher(1.0)
    assert error(method.center, 0.9 * center + 0.1 * teacher.mean(dim=0)) < 1e-6


def test_dino_over_training():
    method = build('dino')
    for progress, temperature in {0: 0.04, 0.15: 0.055, 0.3: 0.07, 1: 0.07}.items():
        method.set_progress(progress)
        assert method.teacher_temp == pytest.approx(temperature)
    method.set_progress(0.01)
    assert method.frozen() == []
    method.set_progress(0.009)
    frozen, = method.frozen()
    assert frozen is method.student_head.last_layer.weight


# ---- what a step changes

@each_method
def test_the_gradient_reaches_the_student_alone(name):
    method = build(name)
    loss, _ = method(views_of(name), 8, 0.5)
    loss.backward()
    for title, parameter in method.named_parameters():
        fixed = title.startswith('teacher') or title.endswith('pos_embed')
        reached = parameter.grad is not None and parameter.grad.abs().sum() > 0
        assert parameter.requires_grad == reached == (not fixed), title


@each_method
def test_a_forward_changes_only_what_it_overwrites(name):
    """BatchNorm's statistics and DINO's batch mean: no weight, no center. `unchanged` undoes it."""
    method = build(name)
    tensors = {**dict(method.named_parameters()), **dict(method.named_buffers())}
    before = copy.deepcopy(tensors)

    def changed():
        titles = [title for title in tensors if not torch.equal(tensors[title], before[title])]
        return {title.split('.')[-1] for title in titles}

    with unchanged(method):
        loss, _ = method(views_of(name), 8, 0.5)
        loss.backward()
        batch_norm = {'running_mean', 'running_var', 'num_batches_tracked'}
        assert changed() == ({'batch_center'} if name == 'dino' else batch_norm)
    assert changed() == set()


@each_method
def test_update_teacher(name):
    """The student moved by 1: with momentum 0.75, all of the teacher moves by 0.25.

    DINO exports the teacher, the others the student.
    """
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
    assert method.encoder is (method.teacher if name == 'dino' else method.student)


@each_method
def test_chance_loss_of_equal_features(name):
    """BatchNorm is in eval mode: it would blow up rounding noise."""
    method = build(name).eval()
    views = [view[:1].expand_as(view) for view in views_of(name)]
    views[1] = views[0]
    if name == 'dino':
        nn.init.zeros_(method.student_head.mlp[-1].weight)
        nn.init.zeros_(method.teacher_head.mlp[-1].weight)
    by_hand = dict(moco=0.4 * math.log(8), simclr=math.log(15), dino=math.log(64))[name]
    assert method.chance_loss(8) == pytest.approx(by_hand)
    assert method(views)[0].item() == pytest.approx(by_hand, abs=1e-5)
    if name == 'moco':
        method.symmetric = True
        assert method.chance_loss(8) == pytest.approx(2 * by_hand)


# ---- precision and devices

@each_method
def test_losses_stay_float32_under_bfloat16_autocast(name):
    method = build(name)
    with torch.autocast('cpu', torch.bfloat16):
        loss, metrics = method(views_of(name), 8, 0.5)
    loss.backward()
    assert loss.isfinite()
    for value in (loss, *metrics.values()):
        assert value.dtype == torch.float32


@pytest.fixture
def no_cached_matrices():
    """Fake matrices must not stay in the caches, nor real ones be found there."""
    def clear():
        compress.resize_matrix.cache_clear()
        compress._pi_matrix.cache_clear()
        vit.table_on.cache_clear()

    clear()
    yield
    clear()


@each_method
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


@pytest.mark.parametrize('function, arguments, message', [
    (info_nce, (ONE, ONE, 0), 'temperature 0 must be above 0'),
    (check_branches, ('query', 'key'), "branch 'key' is not one of query, both"),
    (info_nce, (ONE, ONE, math.nan), 'temperature nan'),
    (info_nce, (ONE, ONE[:3]), r'shapes \(4, 8\) and \(3, 8\)'),
    (nt_xent, (ONE, ONE, -0.1), 'temperature -0.1'),
    (nt_xent, (ONE, ONE[:, :3]), r'shapes \(4, 8\) and \(4, 3\)'),
    (dino_loss, ([ONE], [ONE], ONE[:1], 0), 'temperatures 0 and 0.1'),
    (dino_loss, ([ONE], [ONE], ONE[:1], 0.04, math.nan), 'temperatures 0.04 and nan'),
    (moco_at, (math.nan,), 'temperature nan'),
    (update, ('moco', 1.5), 'momentum 1.5'),
    (update, ('dino', math.nan), 'momentum nan'),
])
def test_arguments_out_of_range(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)
