"""Augmentation-invariance objectives: MoCo-v3 (arXiv 2104.02057), SimCLR (2002.05709), DINO (2104.14294).

Each is a pure loss function and a module that wires two branches around one encoder. Views x1, x2 of each image:

    MoCo-v3   q = predictor(projector(f(x1))), k = projector'(f'(x2)), both L2-normalized, ' = EMA copy
              L = 2T mean_i -log exp(q_i k_i / T) / sum_j exp(q_i k_j / T)
    SimCLR    z = projector(f(x)); every view against the 2N - 1 others, its positive the other view:
              L = mean_i -log exp(z_i z_pos(i) / T) / sum_{j != i} exp(z_i z_j / T)
    DINO      L = mean over pairs (teacher's global view g, student's view v != g) of
              mean_i -sum_o P_t log P_s,   P_t = softmax((t - center) / T_t),  P_s = softmax(s / T_s)

The compression is asymmetric in tokens (only the branch with the gradient drops: query, student, SimCLR's first
view) and symmetric in patch size (both branches use the same), as in the paper.

Shapes: b batch per process, d embedding, o DINO outputs. Losses are float32 or wider under any autocast.

    method = MoCo(encoder)
    loss, metrics = method([view1, view2], patch_size=24, drop_rate=0.5)
    loss.backward(); optimizer.step(); method.update_teacher(momentum=0.99)

A forward changes nothing but BatchNorm's running buffers; `update_teacher` alone moves the EMA copy and the
center. Under a process group, losses gather across ranks, so that the mean of the ranks' losses and gradients
(which is what DistributedDataParallel forms) is that of one process on the joined batch.
"""
import copy
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------- across processes

def world_size():
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class Gather(torch.autograd.Function):
    """(b d) of each rank -> (world*b d), with gradient.

    A plain all_gather returns constants: a contrastive loss then trains with a gradient that is off by tens of
    percent, and nothing shows it. Every rank's loss depends on this rank's rows, hence the sum in backward.
    """

    @staticmethod
    def forward(ctx, x):
        gathered = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad):
        grad = grad.contiguous()
        dist.all_reduce(grad)
        return grad.chunk(world_size())[dist.get_rank()]


def gather(x):
    return Gather.apply(x) if world_size() > 1 else x


def first_row():
    """Where this rank's rows start in a gathered batch, in units of the per-process batch."""
    return dist.get_rank() if world_size() > 1 else 0


def wide(x):
    return x.to(torch.promote_types(x.dtype, torch.float32))


# ---------------------------------------------------------------- losses: tensors in, scalar out

def info_nce(q, k, temperature=0.2):
    """MoCo-v3's InfoNCE of queries (b d) against the keys (b d) of the other view; one direction.

    Keys get no gradient; the negatives are the other images' keys. The factor 2T is MoCo-v3's: it keeps |grad|
    independent of the temperature. Collapsed features give 2T ln N, N the batch over all processes.
    """
    with torch.autocast(q.device.type, enabled=False):
        q = F.normalize(wide(q), dim=1)
        k = gather(F.normalize(wide(k.detach()), dim=1))
        logits = q @ k.T / temperature                                        # b world*b
        positives = torch.arange(len(q), device=q.device) + first_row() * len(q)
        return 2 * temperature * F.cross_entropy(logits, positives)


def nt_xent(z1, z2, temperature=0.1, symmetric=True):
    """SimCLR's NT-Xent of two views (b d): mean over the 2N anchors, or over the first view's N alone.

    The mean, as in SLIP and lightly; SimCLR's own code returns twice that. Collapsed features give ln(2N - 1).
    """
    with torch.autocast(z1.device.type, enabled=False):
        z1, z2 = F.normalize(wide(z1), dim=1), F.normalize(wide(z2), dim=1)
        all_z = torch.cat([gather(z1), gather(z2)])                           # 2N d
        n = len(all_z) // 2
        itself = torch.arange(len(z1), device=z1.device) + first_row() * len(z1)
        anchors = z1
        if symmetric:
            anchors, itself = torch.cat([z1, z2]), torch.cat([itself, itself + n])
        logits = anchors @ all_z.T / temperature
        logits = logits.scatter(1, itself[:, None], float('-inf'))            # an anchor is not its own negative
        return F.cross_entropy(logits, (itself + n) % (2 * n))


def dino_loss(student, teacher, center, teacher_temp, student_temp=0.1):
    """DINO's cross entropy between raw logits: lists of (b o), one entry a view, center (1 o).

    student[v] and teacher[g] with the same index are the same view and are not compared. Uniform outputs give
    ln o.
    """
    with torch.autocast(center.device.type, enabled=False):
        targets = [F.softmax((wide(t.detach()) - center) / teacher_temp, dim=1) for t in teacher]
        total, pairs = 0, 0
        for v, logits in enumerate(student):
            if all(g == v for g in range(len(targets))):
                continue
            log_p = F.log_softmax(wide(logits) / student_temp, dim=1)
            for g, target in enumerate(targets):
                if g != v:
                    total = total - (target * log_p).sum(dim=1).mean()
                    pairs += 1
        return total / pairs


def mean_over_ranks(x):
    if world_size() > 1:
        dist.all_reduce(x)
        x = x / world_size()
    return x


# ---------------------------------------------------------------- parts of the branches

def mlp_head(widths, bias, last_norm):
    """Linear, BatchNorm, ReLU, ..., Linear; last_norm adds MoCo-v3's BatchNorm without affine at the end."""
    layers = []
    for i, (a, b) in enumerate(zip(widths, widths[1:])):
        layers.append(nn.Linear(a, b, bias=bias))
        if i < len(widths) - 2:
            layers += [nn.BatchNorm1d(b), nn.ReLU(inplace=True)]
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


class DINOHead(nn.Module):
    """d -> hidden -> hidden -> bottleneck (GELU), L2-normalized, -> prototypes of unit length.

    The official head's weight norm with its gain fixed at 1 (norm_last_layer): |logit| <= 1.
    """

    def __init__(self, embed_dim, hidden=2048, bottleneck=256, out_dim=65536):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(embed_dim, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
                                 nn.Linear(hidden, bottleneck))
        self.last_layer = nn.Linear(bottleneck, out_dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x):
        x = F.normalize(self.mlp(x), dim=-1)
        return F.linear(x, F.normalize(self.last_layer.weight, dim=-1))


def ema_copy(module):
    """The teacher: a copy without gradient. It stays in train mode, as the official codes have it."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student; parameters only, not BatchNorm's buffers."""
    torch._foreach_lerp_(list(teacher.parameters()), list(student.parameters()), 1 - momentum)


@torch.no_grad()
def feature_spread(features):
    """Standard deviation of the unit-length features (b d) over the batch, times sqrt(d): 1 when they fill the
    sphere evenly, 0 when all images have the same feature (collapse)."""
    return F.normalize(wide(features), dim=1).std(dim=0).mean() * features.shape[1] ** 0.5


@torch.no_grad()
def similarities(a, b):
    """Mean cosine of matching rows and of the others, over this process's batch (b d)."""
    a, b = F.normalize(wide(a), dim=1), F.normalize(wide(b), dim=1)
    positive = (a * b).sum(dim=1).mean()
    every_pair = (a.mean(dim=0) * b.mean(dim=0)).sum()
    n = len(a)
    return dict(positive_similarity=positive, negative_similarity=(n * every_pair - positive) / max(1, n - 1))


# ---------------------------------------------------------------- methods: views in, (loss, metrics) out

class MoCo(nn.Module):
    """MoCo-v3. symmetric=False is one direction, view 1 the query and view 2 the key (the paper's, as far as
    known); True adds the other direction, a sum as in the official code."""

    def __init__(self, encoder, hidden=4096, out_dim=256, temperature=0.2, symmetric=False, drop_branch='query'):
        super().__init__()
        self.encoder = encoder
        self.projector = mlp_head((encoder.embed_dim, hidden, hidden, out_dim), bias=False, last_norm=True)
        self.predictor = mlp_head((out_dim, hidden, out_dim), bias=False, last_norm=True)
        self.teacher_encoder, self.teacher_projector = ema_copy(encoder), ema_copy(self.projector)
        self.temperature, self.symmetric, self.drop_branch = temperature, symmetric, drop_branch
        self.cost_settings = dict(symmetric=symmetric, drop_branch=drop_branch,
                                  projector=(encoder.embed_dim, hidden, hidden, out_dim),
                                  predictor=(out_dim, hidden, out_dim))

    def forward(self, views, patch_size=None, drop_rate=0.0, generator=None):
        key_drop = drop_rate if self.drop_branch == 'both' else 0.0
        loss = 0
        for query, key in [(0, 1), (1, 0)] if self.symmetric else [(0, 1)]:
            features = self.encoder(views[query], patch_size, drop_rate, generator)
            q = self.predictor(self.projector(features))
            with torch.no_grad():
                k = self.teacher_projector(self.teacher_encoder(views[key], patch_size, key_drop, generator))
            loss = loss + info_nce(q, k, self.temperature)
        return loss, dict(feature_spread=feature_spread(features), **similarities(q, k))

    def update_teacher(self, momentum):
        ema_update(self.teacher_encoder, self.encoder, momentum)
        ema_update(self.teacher_projector, self.projector, momentum)

    def chance_loss(self, batch_size):
        """The loss when all features are equal; batch_size over all processes."""
        return (2 if self.symmetric else 1) * 2 * self.temperature * math.log(batch_size)


class SimCLR(nn.Module):
    """SimCLR with SLIP's head for a ViT. Both views carry gradient; the first one alone drops tokens.

    The head runs once per view, since the views can differ in tokens. symmetric=True: both views are anchors
    (NT-Xent as published); False: the first view alone.
    """

    def __init__(self, encoder, hidden=4096, out_dim=256, temperature=0.1, symmetric=True, drop_branch='query'):
        super().__init__()
        self.encoder = encoder
        widths = (encoder.embed_dim, hidden, hidden, out_dim)
        self.projector = mlp_head(widths, bias=True, last_norm=False)
        self.temperature, self.symmetric, self.drop_branch = temperature, symmetric, drop_branch
        self.cost_settings = dict(symmetric=symmetric, drop_branch=drop_branch, projector=widths)

    def forward(self, views, patch_size=None, drop_rate=0.0, generator=None):
        second_drop = drop_rate if self.drop_branch == 'both' else 0.0
        features = self.encoder(views[0], patch_size, drop_rate, generator)
        z1 = self.projector(features)
        z2 = self.projector(self.encoder(views[1], patch_size, second_drop, generator))
        loss = nt_xent(z1, z2, self.temperature, self.symmetric)
        return loss, dict(feature_spread=feature_spread(features), **similarities(z1, z2))

    def update_teacher(self, momentum):
        """SimCLR has no teacher: both branches are the trained encoder."""

    def chance_loss(self, batch_size):
        return math.log(2 * batch_size - 1)


class DINO(nn.Module):
    """DINO. Views: two global crops, then the local ones. `encoder` is the teacher's, which DINO exports;
    `student_encoder` is the one that trains.

    symmetric=True: both global crops are targets (as published); False: the second one alone, and the student
    sees the first one and the local crops. teacher_temp follows a schedule: the loop sets it.
    """

    def __init__(self, encoder, hidden=2048, bottleneck=256, out_dim=65536, teacher_temp=0.04, student_temp=0.1,
                 center_momentum=0.9, symmetric=True, drop_branch='query', local_crops=0, local_size=0):
        super().__init__()
        self.student_encoder = encoder
        self.student_head = DINOHead(encoder.embed_dim, hidden, bottleneck, out_dim)
        self.encoder, self.teacher_head = ema_copy(encoder), ema_copy(self.student_head)
        self.register_buffer('center', torch.zeros(1, out_dim))
        self.batch_center = None  # of the last forward, until update_teacher takes it
        self.teacher_temp, self.student_temp, self.center_momentum = teacher_temp, student_temp, center_momentum
        self.symmetric, self.drop_branch = symmetric, drop_branch
        self.cost_settings = dict(symmetric=symmetric, drop_branch=drop_branch, local_crops=local_crops,
                                  local_size=local_size,
                                  projector=(encoder.embed_dim, hidden, hidden, bottleneck, out_dim))

    def forward(self, views, patch_size=None, drop_rate=0.0, generator=None):
        teacher_drop = drop_rate if self.drop_branch == 'both' else 0.0
        targets = views[:2] if self.symmetric else views[1:2]
        with torch.no_grad():
            teacher = self.teacher_head(self.encoder(torch.cat(targets), patch_size, teacher_drop, generator))
        teacher = teacher.chunk(len(targets))

        # one pass of the encoder per resolution, one of the head; no layer mixes samples, so this equals view by view
        seen = views[:2] if self.symmetric else views[:1]
        features = [self.student_encoder(torch.cat(seen), patch_size, drop_rate, generator)]
        if views[2:]:
            features.append(self.student_encoder(torch.cat(views[2:]), patch_size, drop_rate, generator))
        student = self.student_head(torch.cat(features)).chunk(len(seen) + len(views[2:]))
        if not self.symmetric:
            student = [None, *student]  # teacher[0] is view 2, which the student does not see: keep the indices apart

        loss = dino_loss(student, teacher, self.center, self.teacher_temp, self.student_temp)
        with torch.no_grad():
            self.batch_center = wide(torch.cat(teacher)).mean(dim=0, keepdim=True)
            log_p = F.log_softmax((wide(torch.cat(teacher)) - self.center) / self.teacher_temp, dim=1)
            entropy = -(log_p.exp() * log_p).sum(dim=1).mean()
            spread = feature_spread(features[0].chunk(len(seen))[0])
            return loss, dict(feature_spread=spread, teacher_entropy=entropy,
                              **similarities(student[-1], teacher[0]))

    @torch.no_grad()
    def update_teacher(self, momentum):
        ema_update(self.encoder, self.student_encoder, momentum)
        ema_update(self.teacher_head, self.student_head, momentum)
        if self.batch_center is not None:  # of raw teacher logits, after the loss has used the old center
            self.center.lerp_(mean_over_ranks(self.batch_center), 1 - self.center_momentum)
            self.batch_center = None

    def chance_loss(self, batch_size):
        return math.log(self.center.shape[1])


if __name__ == '__main__':
    torch.manual_seed(0)
    same = torch.ones(4096, 16)
    print(f'InfoNCE, 4096 equal features, T=0.2: {info_nce(same, same).item():.6f} = 2T ln N = {0.4 * math.log(4096):.6f}')
    assert abs(info_nce(same, same).item() - 0.4 * math.log(4096)) < 1e-5
    eye = torch.eye(8, dtype=torch.float64)
    print(f'InfoNCE, q = k = I_8: {info_nce(eye, eye).item():.9f} = 0.4 ln(1 + 7 exp(-5))')
    assert abs(info_nce(eye, eye).item() - 0.4 * math.log1p(7 * math.exp(-5))) < 1e-12
    print(f'NT-Xent, z1 = z2 = I_8, T=0.5: {nt_xent(eye, eye, 0.5).item():.6f} = ln(1 + 14 exp(-2))')
    assert abs(nt_xent(eye, eye, 0.5).item() - math.log1p(14 * math.exp(-2))) < 1e-12
    zero = torch.zeros(4, 1000)
    uniform = dino_loss([zero] * 4, [zero] * 2, zero[:1], 0.04).item()
    print(f'DINO, uniform outputs: {uniform:.6f} = ln 1000')
    assert abs(uniform - math.log(1000)) < 1e-5

    encoder = nn.Flatten()  # any module with an embed_dim is an encoder; it gets the compression with each call
    encoder.forward = lambda x, patch_size, drop_rate, generator: x.flatten(1)
    encoder.embed_dim = 48
    views = [torch.randn(32, 3, 4, 4) for _ in range(2)]
    for method in (MoCo(encoder, 64, 32), SimCLR(encoder, 64, 32), DINO(encoder, 64, 32, 128)):
        loss, metrics = method(views)
        shown = ', '.join(f'{name} {value:.2f}' for name, value in metrics.items())
        print(f'{type(method).__name__}: unrelated views, loss {loss:.2f}, chance {method.chance_loss(32):.2f}; {shown}')
        assert torch.isfinite(loss)
    print('losses.py: all claims hold')
