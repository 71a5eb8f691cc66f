import copy
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from lightly.loss import DINOLoss, NTXentLoss
from lightly.models.modules import DINOProjectionHead, MoCoProjectionHead
from lightly.models.utils import update_momentum

from losses import DINO, DINOHead, MoCo, SimCLR, dino_loss, ema_update, feature_spread, info_nce, mlp_head, nt_xent, similarities
from vit import ViT

SMALL = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
BUILD = {
    'moco': lambda **kw: MoCo(ViT(**SMALL), hidden=48, out_dim=16, **kw),
    'simclr': lambda **kw: SimCLR(ViT(**SMALL), hidden=48, out_dim=16, **kw),
    'dino': lambda **kw: DINO(ViT(**SMALL), hidden=48, bottleneck=16, out_dim=64, local_crops=2, local_size=8, **kw),
}


def views_for(name, b=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(b, 3, 16, 16, generator=g) for _ in range(2)] + \
        ([torch.randn(b, 3, 8, 8, generator=g) for _ in range(2)] if name == 'dino' else [])


# ---- InfoNCE

def test_info_nce_against_a_loop():
    q, k = torch.randn(6, 5, dtype=torch.float64), torch.randn(6, 5, dtype=torch.float64)
    for T in (0.07, 0.2, 1.0):
        total = 0
        for i in range(6):
            cosines = [float(q[i] @ k[j] / q[i].norm() / k[j].norm()) for j in range(6)]
            total -= math.log(math.exp(cosines[i] / T) / sum(math.exp(c / T) for c in cosines))
        assert abs(info_nce(q, k, T).item() - 2 * T * total / 6) < 1e-12


def test_info_nce_closed_forms():
    assert abs(info_nce(torch.ones(4096, 8), torch.ones(4096, 8)).item() - 3.327106) < 1e-5
    eye = torch.eye(8, dtype=torch.float64)
    assert abs(info_nce(eye, eye).item() - 0.018434845) < 1e-9


def test_info_nce_gradient():
    q = torch.randn(64, 16, requires_grad=True)
    k = torch.randn(64, 16, requires_grad=True)
    norms = []
    for T in (0.2, 1.0):
        q.grad = None
        info_nce(q, k, T).backward()
        norms.append(q.grad.norm().item())
    assert k.grad is None
    assert abs(norms[0] / norms[1] - 1) < 0.1  # 2T; without it the ratio is near 5


# ---- NT-Xent

@pytest.mark.parametrize('T', (0.1, 0.5))
def test_nt_xent_equals_lightly(T):
    z = [torch.randn(16, 8, requires_grad=True) for _ in range(2)]
    w = [x.detach().clone().requires_grad_() for x in z]
    ours, theirs = nt_xent(*z, T), NTXentLoss(T)(*w)
    assert abs(ours.item() - theirs.item()) < 1e-6
    ours.backward(), theirs.backward()
    assert max((a.grad - b.grad).abs().max() for a, b in zip(z, w)) < 1e-6


def test_nt_xent_closed_forms_and_directions():
    ones, eye = torch.ones(8, 4), torch.eye(8, dtype=torch.float64)
    assert abs(nt_xent(ones, ones).item() - math.log(15)) < 1e-6
    assert abs(nt_xent(eye, eye, 0.1).item() - math.log1p(14 * math.exp(-10))) < 1e-9
    assert abs(nt_xent(eye, eye, 0.5).item() - 1.062879) < 1e-6
    z1, z2 = torch.randn(2, 8, 4, dtype=torch.float64)
    one, other = nt_xent(z1, z2, symmetric=False), nt_xent(z2, z1, symmetric=False)
    assert abs(one - other) > 1e-3
    assert abs((one + other) / 2 - nt_xent(z1, z2)) < 1e-12


# ---- DINO

def test_dino_loss_and_center_equal_lightly():
    torch.manual_seed(0)
    theirs = DINOLoss(output_dim=64, warmup_teacher_temp=0.04, teacher_temp=0.07, warmup_teacher_temp_epochs=30)
    center = torch.zeros(1, 64)
    for epoch in (0, 15, 29, 60):
        teacher_temp = 0.04 + 0.03 * min(1, epoch / 29)
        teacher, student = [torch.randn(8, 64) for _ in range(2)], [torch.randn(8, 64) for _ in range(5)]
        ours = dino_loss(student, teacher, center, teacher_temp)
        assert abs(ours.item() - theirs(teacher, student, epoch=epoch).item()) < 5e-6
        center = center.lerp(torch.cat(teacher).mean(0, keepdim=True), 0.1)
        assert (center - theirs.center.reshape(1, 64)).abs().max() < 1e-6


def test_dino_loss_by_a_loop_and_its_pairs():
    teacher = [torch.randn(3, 7, dtype=torch.float64) for _ in range(2)]
    student = [torch.randn(3, 7, dtype=torch.float64) for _ in range(4)]
    center, terms = torch.randn(1, 7, dtype=torch.float64), []
    for g in range(2):
        for v in range(4):
            if g != v:
                p = torch.softmax((teacher[g] - center) / 0.05, 1)
                terms.append(-(p * torch.log_softmax(student[v] / 0.1, 1)).sum(1).mean())
    assert len(terms) == 6
    assert abs(dino_loss(student, teacher, center, 0.05) - sum(terms) / 6) < 1e-12
    assert abs(dino_loss([torch.zeros(2, 65536)] * 2, [torch.zeros(2, 65536)] * 2, torch.zeros(1, 65536), 0.04).item() - 11.090355) < 1e-5


def test_dino_head_equals_lightly():
    ours, theirs = DINOHead(384, out_dim=512), DINOProjectionHead(384, output_dim=512)
    theirs.load_state_dict({**{k.replace('mlp.', 'layers.'): v for k, v in ours.state_dict().items() if 'mlp' in k},
                            **{k: v for k, v in theirs.state_dict().items() if 'last' in k}})
    with torch.no_grad():
        dict(theirs.named_parameters())['last_layer.parametrizations.weight.original1' if hasattr(theirs.last_layer, 'parametrizations')
                                        else 'last_layer.weight_v'].copy_(ours.last_layer.weight)
    x = torch.randn(4, 384)
    assert (ours(x) - theirs(x)).abs().max() < 1e-6
    assert ours(x).abs().max() <= 1
    with torch.device('meta'):
        assert sum(p.numel() for p in DINOHead(384).parameters()) == 22_286_592


def test_dino_state_moves_in_update_teacher_alone():
    method = BUILD['dino']()
    before = copy.deepcopy(method.state_dict())
    method(views_for('dino'))[0].backward()
    assert all(torch.equal(before[k], v) for k, v in method.state_dict().items())
    features = torch.cat([method.teacher_head(method.encoder(v)) for v in views_for('dino')[:2]]).mean(0, keepdim=True)
    for _ in range(3):
        method(views_for('dino'))
        method.update_teacher(1.0)
    assert (method.center - (1 - 0.9 ** 3) * features).abs().max() < 1e-6


# ---- heads, EMA, monitors

def test_moco_heads():
    with torch.device('meta'):
        for width, count in ((384, 19_415_040), (768, 20_987_904)):
            assert sum(p.numel() for p in mlp_head((width, 4096, 4096, 256), False, True).parameters()) == count
        assert sum(p.numel() for p in mlp_head((256, 4096, 256), False, True).parameters()) == 2_105_344
        assert sum(p.numel() for p in mlp_head((768, 4096, 4096, 256), True, False).parameters()) == 20_996_352
    ours, theirs = mlp_head((32, 64, 64, 16), False, True), MoCoProjectionHead(32, 64, 16, num_layers=3, batch_norm=True)
    theirs.load_state_dict({**theirs.state_dict(), **{'layers.' + k: v for k, v in ours.state_dict().items()}})
    x = torch.randn(50, 32)
    assert (ours(x) - theirs(x)).abs().max() < 1e-6
    out = ours(x)
    assert out.mean(0).abs().max() < 1e-6 and (out.std(0, unbiased=False) - 1).abs().max() < 1e-3


def test_ema_equals_lightly_and_skips_buffers():
    student = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    ours, theirs = copy.deepcopy(student), copy.deepcopy(student)
    nn.init.normal_(student[0].weight)
    student(torch.randn(8, 4) + 3)
    ema_update(ours, student, 0.9), update_momentum(student, theirs, 0.9)
    assert all((a - b).abs().max() < 1e-7 for a, b in zip(ours.parameters(), theirs.parameters()))
    assert ours[1].running_mean.abs().max() == 0


def test_monitors():
    assert abs(feature_spread(torch.randn(5000, 64)).item() - 1) < 0.01
    assert feature_spread(torch.ones(50, 64)).item() < 1e-5
    a, b = torch.randn(2, 6, 4)
    m = F.normalize(a, dim=1) @ F.normalize(b, dim=1).T
    s = similarities(a, b)
    assert abs(s['positive_similarity'] - m.diag().mean()) < 1e-6
    assert abs(s['negative_similarity'] - m[~torch.eye(6, dtype=bool)].mean()) < 1e-6


# ---- the wiring of the branches

class Recorder(nn.Module):
    embed_dim = 48

    def __init__(self, calls):
        super().__init__()
        self.calls, self.scale = calls, nn.Parameter(torch.ones(1))

    def __deepcopy__(self, memo):
        return Recorder(self.calls)

    def forward(self, x, patch_size, drop_rate, generator):
        self.calls.append((x.shape[0], x.shape[-1], patch_size, drop_rate, torch.is_grad_enabled()))
        return F.adaptive_avg_pool2d(x, 4).flatten(1) * self.scale


@pytest.mark.parametrize('branch', ('query', 'both'))
@pytest.mark.parametrize('symmetric', (False, True))
@pytest.mark.parametrize('name', BUILD)
def test_who_drops_and_who_gets_the_gradient(name, symmetric, branch):
    calls = []
    kw = dict(hidden=16, out_dim=8, symmetric=symmetric, drop_branch=branch)
    method = {'moco': MoCo, 'simclr': SimCLR, 'dino': DINO}[name](Recorder(calls), **kw)
    method(views_for(name), 4, 0.5)
    other = 0.5 if branch == 'both' else 0.0
    if name == 'moco':
        expected = [(8, 16, 4, 0.5, True), (8, 16, 4, other, False)] * (2 if symmetric else 1)
    elif name == 'simclr':
        expected = [(8, 16, 4, 0.5, True), (8, 16, 4, other, True)]
    else:
        n = 16 if symmetric else 8
        expected = [(n, 16, 4, other, False), (n, 16, 4, 0.5, True), (16, 8, 4, 0.5, True)]
    assert sorted(calls) == sorted(expected)


def test_symmetric_moco_is_the_sum_of_its_directions():
    method, views = BUILD['moco'](), views_for('moco')
    one, other = method(views)[0], method(views[::-1])[0]
    method.symmetric = True
    assert abs(method(views)[0] - one - other) < 1e-5


def test_dino_module_equals_the_view_by_view_official_form():
    method, views = BUILD['dino'](), views_for('dino')
    teacher = [method.teacher_head(method.encoder(v)) for v in views[:2]]
    student = [method.student_head(method.student_encoder(v)) for v in views]
    expected = dino_loss(student, teacher, method.center, 0.04)
    assert abs(method(views)[0] - expected) < 1e-5
    method.symmetric = False  # targets: view 2 alone; student: view 1 and the local crops
    terms = [dino_loss([None, student[v]], teacher[1:], method.center, 0.04) for v in (0, 2, 3)]
    assert abs(method(views)[0] - sum(terms) / 3) < 1e-5


@pytest.mark.parametrize('name', BUILD)
def test_teacher_gets_no_gradient_and_moves_only_when_told(name):
    method = BUILD[name]()
    method(views_for(name), 4, 0.5)[0].backward()
    trained = {n for n, p in method.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    teacher = [n for n, _ in method.named_parameters() if n.startswith('teacher') or (name == 'dino' and n.startswith('encoder'))]
    assert trained and not trained & set(teacher)
    assert {n for n, p in method.named_parameters() if p.requires_grad} == trained
    with torch.no_grad():
        for n, p in method.named_parameters():
            if p.requires_grad:
                p.add_(1)
    if teacher:
        frozen = {n: p.clone() for n, p in method.named_parameters() if n in teacher and 'pos_embed' not in n}
        method.update_teacher(0.75)
        now = dict(method.named_parameters())
        assert all((now[n] - v - 0.25).abs().max() < 1e-5 for n, v in frozen.items())


@pytest.mark.parametrize('name', BUILD)
def test_losses_stay_float32_under_bfloat16_autocast(name):
    method = BUILD[name]()
    with torch.autocast('cpu', torch.bfloat16):
        loss, metrics = method(views_for(name), 8, 0.5)
    loss.backward()
    assert loss.dtype == torch.float32 and loss.isfinite()
    assert all(v.dtype == torch.float32 for v in metrics.values())
    q, k = torch.randn(2, 8, 16)
    with torch.autocast('cpu', torch.bfloat16):
        inside = info_nce(q, k), nt_xent(q, k), dino_loss([q], [k, k], q[:1], 0.04)
    assert inside == (info_nce(q, k), nt_xent(q, k), dino_loss([q], [k, k], q[:1], 0.04))


@pytest.mark.parametrize('name', BUILD)
def test_devices_match_with_fake_cuda_tensors(name):
    from torch._subclasses import FakeTensorMode

    import compress
    from data import make_views, recipe
    compress.resize_matrix.cache_clear(), compress._pi_matrix.cache_clear()
    method = BUILD[name]()
    try:
        with FakeTensorMode(), torch.device('cuda'):
            for module in method.modules():  # the real module's tensors become fake ones on a GPU that is not there
                for key, p in module._parameters.items():
                    module._parameters[key] = p if p is None else nn.Parameter(torch.empty(p.shape), p.requires_grad)
                for key, buffer in module._buffers.items():
                    module._buffers[key] = torch.empty(buffer.shape, dtype=buffer.dtype)
            generator = torch.Generator('cpu')
            images = torch.empty(8, 3, 20, 20, dtype=torch.uint8)
            views = recipe(name, local_crops=2)
            made = make_views(images, views, [8 if v.local else 16 for v in views], generator)
            assert all(v.device.type == 'cuda' for v in made)
            for patch_size, drop_rate in ((4, 0.0), (8, 0.5)):
                loss, metrics = method(made, patch_size, drop_rate, generator)
                assert loss.device.type == 'cuda' and all(v.device.type == 'cuda' for v in metrics.values())
            method.update_teacher(0.99)
    finally:  # fake matrices must not stay in the caches
        compress.resize_matrix.cache_clear(), compress._pi_matrix.cache_clear()


@pytest.mark.parametrize('name', BUILD)
def test_chance_loss(name):
    method = BUILD[name]()
    views = [v[:1].expand_as(v).contiguous() for v in views_for(name)]
    views[1] = views[0]
    if name == 'dino':
        nn.init.zeros_(method.student_head.mlp[-1].weight), nn.init.zeros_(method.teacher_head.mlp[-1].weight)
    else:  # equal features; BatchNorm would blow up rounding noise
        for module in method.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.eval()
    assert abs(method(views)[0].item() - method.chance_loss(8)) < 1e-4
    if name == 'moco':
        method.symmetric = True
        assert abs(method(views)[0].item() - method.chance_loss(8)) < 1e-4


# ---- two processes against one

WORKER = r'''
import os, sys, torch, torch.nn as nn, torch.distributed as dist
sys.path[:0] = [os.environ['CODE'], os.path.join(os.environ['CODE'], 'tests')]
from torch.nn.parallel import DistributedDataParallel as DDP
import test_losses as t
rank, world = int(os.environ['RANK']), int(os.environ['WORLD_SIZE'])
if world > 1:
    dist.init_process_group('gloo')
result = {}
for name in t.BUILD:
    for symmetric in (False, True):
        torch.manual_seed(0)
        method = t.without_batch_norm(t.BUILD[name](symmetric=symmetric)).double()
        views = [v.double() for v in t.views_for(name)]
        mine = [v.chunk(world)[rank] for v in views]
        model = DDP(method) if world > 1 else method
        loss, _ = model(mine, 8, 0.0, None)
        loss.backward()
        method.update_teacher(0.9)
        loss = loss.detach()
        if world > 1:
            dist.all_reduce(loss)
            loss /= world
        result[f'{name} {symmetric}'] = (loss, torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None]),
                                         getattr(method, 'center', torch.zeros(1)).clone())
if rank == 0:
    torch.save(result, sys.argv[1])
if world > 1:
    dist.destroy_process_group()
'''


def without_batch_norm(method):
    """gloo cannot synchronize BatchNorm: LayerNorm, which has no statistics across samples, stands in for it."""
    for module in list(method.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.BatchNorm1d):
                norm = nn.LayerNorm(child.num_features, elementwise_affine=False)
                setattr(module, name, norm)
    return method


def test_two_processes_equal_one(tmp_path):
    (tmp_path / 'worker.py').write_text(WORKER)
    environment = {**os.environ, 'CODE': str(Path(__file__).resolve().parent.parent), 'OMP_NUM_THREADS': '1'}
    for key in ('RANK', 'WORLD_SIZE'):
        environment.pop(key, None)
    one = subprocess.Popen([sys.executable, 'worker.py', 'one.pt'], cwd=tmp_path, env={**environment, 'RANK': '0', 'WORLD_SIZE': '1'})
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', 'worker.py', 'two.pt'],
                   cwd=tmp_path, env=environment, check=True, timeout=120)
    assert one.wait(timeout=120) == 0
    one, two = torch.load(tmp_path / 'one.pt'), torch.load(tmp_path / 'two.pt')
    assert set(one) == set(two) and len(one) == 6
    for key in one:
        for a, b in zip(one[key], two[key]):
            assert (a - b).norm() <= 1e-6 * a.norm(), key
