"""losses.py against lightly, closed forms, loops by hand, and two processes against one."""
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
from methods import METHODS, SIZES, STEPS, build, each_method, one_step, refused, views_of, worker
from timm.models import VisionTransformer
from torchvision.models import resnet18
from torchvision.transforms.v2.functional import resize

from losses import DINOHead, dino_loss, info_nce, mlp_head, monitors, nt_xent, tiled
from vit import ViT

# ---------------------------------------------------------------- losses

def test_closed_forms():
    """Equal pairs, orthogonal to each other; then all features equal: the losses by chance."""
    eye = torch.eye(8, dtype=torch.float64)
    assert info_nce(eye, eye, 0.2).item() == pytest.approx(0.4 * math.log(1 + 7 * math.exp(-5)))
    same = torch.ones(8, 64)
    collapsed = info_nce(same, same), nt_xent(same, same), dino_loss([same] * 2, [same], same, 0.04)
    chance = [build(name).chance_loss(8) for name in METHODS]
    assert torch.stack(collapsed).tolist() == pytest.approx(chance)


def test_nt_xent_and_its_gradient_equal_lightly():
    ours = torch.randn(2, 16, 8, requires_grad=True)
    theirs = ours.detach().clone().requires_grad_()
    loss = nt_xent(*ours, 0.1)
    reference = NTXentLoss(0.1)(*theirs)
    loss.backward()
    reference.backward()
    assert error(loss, reference) < 1e-6
    assert error(ours.grad, theirs.grad) < 1e-7


def test_dino_loss_equals_lightlys():
    """2 global views against 5, before and after lightly's center has moved."""
    theirs = DINOLoss(64)
    for temperature in (0.04, 0.07):
        teacher = torch.randn(2, 8, 64)
        student = torch.randn(5, 8, 64)
        loss = dino_loss(student, teacher, theirs.center.view(1, 64), temperature)
        reference = theirs(list(teacher), list(student), teacher_temp=temperature)
        assert error(loss, reference) < 5e-6


def test_autocast_does_not_change_a_loss_and_keys_get_no_gradient():
    q, k = torch.randn(2, 8, 16)
    assert not info_nce(q, k.clone().requires_grad_()).requires_grad
    for loss in (info_nce, nt_xent, lambda q, k: dino_loss([q, k], [k], k[:1], 0.04)):
        plain = loss(q, k)
        with torch.autocast('cpu', torch.bfloat16):
            assert torch.equal(loss(q, k), plain)


def test_unequal_views_and_a_temperature_of_0_are_refused():
    x = torch.randn(4, 8)
    for loss in (info_nce, nt_xent):
        refused(lambda arguments: loss(*arguments), [
            ((x, x[:2]), 'the two views have the shapes .4, 8. and .2, 8.'),
            ((x, x, 0.0), 'temperature 0.0 must be above 0')])


# ---------------------------------------------------------------- heads and monitors

def test_heads_equal_lightly():
    """The last BatchNorm of MoCo's has no affine part, lightly's is 1 and 0 at its start."""
    dino, moco = DINOHead(32, 64, 16, 48), mlp_head((32, 64, 64, 16), True)
    lightly_dino = DINOProjectionHead(32, 64, 16, 48)
    lightly_dino.layers.load_state_dict(dino.mlp.state_dict())
    lightly_dino.last_layer.weight_v.data = dino.last_layer.weight.data
    lightly_moco = MoCoProjectionHead(32, 64, 16, num_layers=3, batch_norm=True)
    lightly_moco.layers.load_state_dict(moco.state_dict(), strict=False)
    x = torch.randn(50, 32)
    assert error(dino(x), lightly_dino(x)) < 1e-6
    assert error(moco(x), lightly_moco(x)) < 1e-6


def test_monitors():
    a, b = torch.randn(2, 6, 4)
    cosines = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    spread, positive, negative = monitors(torch.randn(5000, 64), a, b).values()
    assert abs(spread - 1) < 0.01                             # the whole sphere: 1 +- 0.002
    assert monitors(torch.ones(4, 8), a, b)['feature_spread'] < 1e-6
    assert error(positive, cosines.diag().mean()) < 1e-6
    assert error(negative, cosines[~torch.eye(6, dtype=torch.bool)].mean()) < 1e-6


# ---------------------------------------------------------------- which branch sees what

class Recorder(nn.Module):
    """An encoder that writes down, per image, (side, arguments of the call, with gradient)."""
    embed_dim = 48

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x, *strategy):
        CALLS.extend([(x.shape[-1], strategy[:2], torch.is_grad_enabled())] * len(x))
        return F.adaptive_avg_pool2d(x, 4).flatten(1) * self.scale


CALLS = []


@pytest.mark.parametrize('title', STEPS)
def test_who_sees_which_view_how_compressed(title):
    """Views of different sides tell which was seen; DINO joins those of one side."""
    name = title.split(',')[0]
    sides = (16, 16, 8, 8) if name == 'dino' else (16, 24)
    for branches, query, key in (
            ({}, (8, 0.5), (8, 0.0)),
            (dict(drop_branch='both'), (8, 0.5), (8, 0.5)),
            (dict(patch_branch='query', drop_branch='both'), (8, 0.5), (None, 0.5)),
            (dict(patch_branch='query'), (8, 0.5), ()),
            ({}, (), ())):                                    # images alone, for any encoder
        method = build(name, Recorder(), **STEPS[title], **branches)
        CALLS.clear()
        method([torch.randn(2, 3, side, side) for side in sides], *query)
        q = [(side, query, True) for side in sides]
        k = [(side, key, False) for side in sides[1::-1]]
        assert Counter(CALLS) == Counter(2 * {
            'moco': [q[0], k[0]], 'moco, both directions': q + k,
            'simclr': [q[0], (sides[1], key, True)], 'dino': q + k}[title])


def test_a_query_that_its_patches_do_not_tile_is_resized():
    """A picture of 224 px in patches of 30 becomes one of 210; the key stays as it is."""
    CALLS.clear()
    build('moco', Recorder(), patch_branch='query')(views_of('moco', 2), 6)
    assert CALLS[::2] == [(18, (6, 0.0), True), (16, (), False)]
    images = torch.randn(2, 3, 224, 100)
    assert error(tiled(images, 30), resize(images, [210, 90], antialias=True)) < 1e-6
    assert torch.equal(tiled(images, 4), images)


# ---------------------------------------------------------------- each method by hand

def test_moco_v3_equals_its_algorithm_box():
    """q from student, projector and predictor, k from the EMA copies. test_train.py steps."""
    for symmetric in (False, True):
        method = build('moco', temperature=0.5, symmetric=symmetric)
        for parameter in method.parameters():
            nn.init.normal_(parameter)                        # so that the branches differ
        views = views_of('moco')
        by_hand = 0
        for x, y in [views, views[::-1]][:1 + symmetric]:
            q = F.normalize(method.predictor(method.projector(method.student(x))))
            k = F.normalize(method.teacher_projector(method.teacher(y)))
            by_hand += 2 * 0.5 * F.cross_entropy(q @ k.T / 0.5, torch.arange(8))
        assert error(method(views)[0], by_hand) < 1e-6


def test_dino_equals_its_official_form_view_by_view():
    """Then 0.1 of the batch's mean enters the center."""
    method = build('dino', student_temp=0.2)
    method.set_progress(1)
    views = views_of('dino')
    nn.init.normal_(method.teacher_head.mlp[0].weight)        # so that the branches differ
    nn.init.normal_(method.teacher.norm.bias)
    center = nn.init.normal_(method.center, std=0.1).clone()
    teacher = [method.teacher_head(method.teacher(view)) for view in views[:2]]
    student = [method.student_head(method.student(view)) for view in views]
    loss, metrics = method(views)
    assert error(loss, dino_loss(student, teacher, center, 0.07, 0.2)) < 1e-5
    teacher = torch.cat(teacher)
    targets = torch.softmax((teacher - center) / 0.07, dim=1)
    entropy = torch.distributions.Categorical(targets).entropy().mean()
    assert error(metrics['teacher_entropy'], entropy) < 1e-5
    method.update_teacher(1.0)
    assert error(method.center, 0.9 * center + 0.1 * teacher.mean(dim=0)) < 1e-6


def test_dino_clips_each_gradient_and_lets_the_last_layer_rest():
    """For the first 1 % of training; the teacher's temperature rises for 30 %."""
    method = build('dino')
    trained = [p for p in method.parameters() if p.requires_grad]
    last = method.student_head.last_layer.weight
    for progress, temperature in ((0, 0.04), (0.01, 0.041), (0.15, 0.055), (1, 0.07)):
        method.set_progress(progress)
        assert method.teacher_temp == pytest.approx(temperature)
        for i, parameter in enumerate(trained):
            parameter.grad = torch.randn_like(parameter) * 10 ** (i % 3 - 1)
        clipped = {p: p.grad * min(1, 3 / (p.grad.norm() + 1e-6)) for p in trained}
        method.before_step()
        if progress == 0:
            assert last.grad is None                          # an optimizer leaves it alone
            del clipped[last]
        for parameter, gradient in clipped.items():
            assert error(parameter.grad, gradient) < 1e-6


# ---------------------------------------------------------------- what a step changes

def any_encoders():
    """(encoder, compression): all that it needs is an embed_dim."""
    resnet = resnet18()
    resnet.fc = nn.Identity()
    resnet.embed_dim = 512
    timm = VisionTransformer(**SIZES, num_classes=0, dynamic_img_size=True)
    return (ViT(**SIZES, pos_embed='learned'), (8, 0.5)), (resnet, ()), (timm, ())


@each_method
def test_gradients_move_the_student_and_the_student_the_teacher(name):
    """When the student has moved by 1, momentum 0.75 moves the weights of the teacher by 0.25."""
    for encoder, compression in any_encoders():
        method = build(name, encoder)
        weights = dict(method.named_parameters())
        before = copy.deepcopy(weights)
        method(views_of(name), *compression)[0].backward()
        for title, value in weights.items():
            trains = not title.startswith('teacher')
            reached = value.grad is not None and value.grad.abs().sum() > 0
            assert value.requires_grad == reached == trains, title
            assert torch.equal(value, before[title])
            value.data += trains
        method.update_teacher(0.75)
        for title, value in weights.items():
            moved = 0.25 if title.startswith('teacher') else 1
            assert error(value, before[title] + moved) < 1e-6, title
        assert method.encoder is (method.teacher if name == 'dino' else encoder)


# ---------------------------------------------------------------- two processes against one

def test_two_processes_equal_one(tmp_path):
    """Means over the processes, in float64: those of one process on the joined batch."""
    torch.multiprocessing.spawn(worker, (2, str(tmp_path)), nprocs=2)
    for rank in (0, 1):
        for title, results in torch.load(tmp_path / f'{rank}.pt').items():
            for one, two in zip(one_step(title), results):
                assert (one - two).norm() <= 1e-13 * one.norm(), title
