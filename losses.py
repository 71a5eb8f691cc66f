"""Augmentation-invariance objectives: MoCo-v3 (arXiv 2104.02057), SimCLR (2002.05709), DINO
(2104.14294).

Each is a pure loss function and a module that wires two branches around one encoder f, f' its EMA
copy. x1, x2 are two views of each image:

    MoCo-v3   q = predictor(projector(f(x1))), k = projector'(f'(x2)), both L2-normalized
              L = 2T mean_i -log exp(q_i k_i / T) / sum_j exp(q_i k_j / T)
    SimCLR    z = projector(f(x)); every view against the 2N - 1 others, one of them its positive:
              L = mean_i -log exp(z_i z_pos(i) / T) / sum_{j != i} exp(z_i z_j / T)
    DINO      L = mean over pairs (teacher's global view g, student's view v != g) of
              mean_i -sum_o P_t log P_s,
              P_t = softmax((t - center) / T_t),  P_s = softmax(s / T_s)

The query branch (MoCo's query, DINO's student, SimCLR's first view) is always compressed. The key
branch (key, teacher, second view) sees every token, and by default the same patch size (paper:
asymmetric token dropout, symmetric patch scaling). drop_branch='both' drops tokens in the key
branch too, and patch_branch='query' leaves the key branch at the base patch size (paper:
"uncompressed key sequences").

Any module with an `embed_dim` is an encoder. Uncompressed, it is called with images alone; under a
strategy as encoder(images, patch_size, drop_rate, generator), see vit.py.

Shapes: b batch per process, the same in all, d embedding, o DINO outputs. Losses are float32 or
wider under any autocast.

    method = MoCo(encoder)
    loss, metrics = method([view1, view2], patch_size=24, drop_rate=0.5)
    loss.backward(); optimizer.step(); method.update_teacher(momentum=0.99)

In all three, `student` is the encoder that trains, `teacher` its EMA copy (SimCLR has none), and
`encoder` the one to export. A forward changes buffers alone (BatchNorm's running statistics, DINO's
last batch mean); only `update_teacher` moves the EMA copy and the center. Under a process group the
losses gather across ranks, so that the mean of the ranks' losses and gradients, which is what
DistributedDataParallel forms, is that of one process on the joined embeddings. The heads' BatchNorm
joins the batches only as SyncBatchNorm (convert_sync_batchnorm).
"""
import copy
import math

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F


# ---------------------------------------------------------------- across processes

def world_size():
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size()
    return 1


def rank():
    return dist.get_rank() if world_size() > 1 else 0


class Gather(torch.autograd.Function):
    """(b d) of each rank -> (world*b d), with gradient.

    A plain all_gather returns constants: a contrastive loss then trains with a gradient that is
    off by tens of percent, and nothing shows it. Every rank's loss depends on this rank's rows,
    hence the sum in backward.
    """

    @staticmethod
    def forward(ctx, x):
        gathered = [torch.empty_like(x) for _ in range(world_size())]
        dist.all_gather(gathered, x.contiguous())
        return torch.cat(gathered)

    @staticmethod
    def backward(ctx, grad):
        total = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        of_ranks = total.chunk(world_size())
        return of_ranks[rank()]


def gather(x):
    return Gather.apply(x) if world_size() > 1 else x


def mean_over_ranks(x):
    """The mean of a tensor over all processes. The tensor itself stays as it is."""
    if world_size() == 1:
        return x
    total = x.clone()
    dist.all_reduce(total)
    return total / world_size()


# ---------------------------------------------------------------- losses: tensors in, scalar out

def upcast(x):
    """float32 or wider: half precision is too coarse for a softmax over thousands of logits."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def own_rows(x):
    """Where the rows of this process stand among those of all."""
    b = len(x)
    return torch.arange(b, device=x.device) + rank() * b


def check_input(a, b, temperature):
    if a.shape != b.shape:
        raise ValueError(f'the two views have the shapes {tuple(a.shape)} and {tuple(b.shape)}')
    if not temperature > 0:
        raise ValueError(f'temperature {temperature} must be above 0')


def info_nce(q, k, temperature=0.2):
    """MoCo-v3's InfoNCE of queries (b d) against the keys (b d) of the other view; one direction.

    Keys get no gradient, and the negatives are the other images' keys. The factor 2T is
    MoCo-v3's: it keeps |grad| nearly independent of the temperature. Collapsed features give
    2T ln N, N the joined batch.
    """
    check_input(q, k, temperature)
    with torch.autocast(q.device.type, enabled=False):
        q = F.normalize(upcast(q))
        k = F.normalize(upcast(k.detach()))
        logits = q @ gather(k).T / temperature                                # b world*b
        return 2 * temperature * F.cross_entropy(logits, own_rows(q))


def nt_xent(z1, z2, temperature=0.1):
    """SimCLR's NT-Xent of two views (b d): the mean over the 2N anchors, as in SLIP and lightly.

    SimCLR's own code returns twice that. Collapsed features give ln(2N - 1).
    """
    check_input(z1, z2, temperature)
    with torch.autocast(z1.device.type, enabled=False):
        z = F.normalize(upcast(torch.cat([z1, z2])))                          # 2b d
        z1, z2 = z.chunk(2)
        all_z = torch.cat([gather(z1), gather(z2)])                           # 2N d
        n = len(all_z) // 2
        own = own_rows(z1)
        itself = torch.cat([own, own + n])                                    # 2b
        positives = (itself + n) % (2 * n)
        logits = z @ all_z.T / temperature                                    # 2b 2N
        logits = logits.scatter(1, itself[:, None], -math.inf)                # not its own negative
        return F.cross_entropy(logits, positives)


def dino_loss(student, teacher, center, teacher_temp, student_temp=0.1):
    """DINO's cross entropy between raw logits: lists of (b o), one entry a view, and center (1 o).

    student[v] and teacher[v] are the same view and are not compared. Uniform outputs give ln o.

    Near uniform outputs, a pattern in the logits (less the center) whose two views correlate by r
    changes by the factor r G, G = student_temp / teacher_temp, as the student learns it and the
    teacher follows. If this is below 1 for every pattern, outputs become uniform: raise
    student_temp. The mean output is a pattern with r = 1, the same for all images, and only the
    center holds it back. That works while (1 - m) (G - 1) < 1 - center_momentum, where m is the
    teacher's momentum. This is our analysis; on shapes both collapses happened.
    """
    with torch.autocast(center.device.type, enabled=False):
        centered = [upcast(t.detach()) - center for t in teacher]
        targets = [F.softmax(t / teacher_temp, dim=1) for t in centered]
        terms = []
        for v, logits in enumerate(student):
            log_p = F.log_softmax(upcast(logits) / student_temp, dim=1)
            for g, target in enumerate(targets):
                if g != v:
                    cross_entropy = -(target * log_p).sum(dim=1)
                    terms.append(cross_entropy.mean())
        return sum(terms) / len(terms)


# ---------------------------------------------------------------- parts of the branches

def mlp_head(widths, last_norm):
    """Linear, BatchNorm, ReLU, ..., Linear.

    last_norm: as in MoCo-v3, a BatchNorm without affine part follows. Then no layer has a bias:
    the BatchNorm after it would subtract it again.
    """
    layers = []
    for a, b in zip(widths, widths[1:]):
        layers.append(nn.Linear(a, b, bias=not last_norm))
        layers.append(nn.BatchNorm1d(b))
        layers.append(nn.ReLU(inplace=True))
    layers = layers[:-2]                                                      # the last is linear
    if last_norm:
        layers.append(nn.BatchNorm1d(widths[-1], affine=False))
    return nn.Sequential(*layers)


class DINOHead(nn.Module):
    """d -> hidden -> hidden -> bottleneck (GELU), L2-normalized, -> prototypes of unit length.

    The official head's weight norm with its gain fixed at 1 (norm_last_layer): |logit| <= 1. Under
    bfloat16 autocast the logits are rounded to 8 bits, more coarsely than in DINO's float16 (11).
    """

    def __init__(self, embed_dim, hidden=2048, bottleneck=256, out_dim=65536):
        super().__init__()
        self.mlp = nn.Sequential(
            nn.Linear(embed_dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, hidden),
            nn.GELU(),
            nn.Linear(hidden, bottleneck),
        )
        self.last_layer = nn.Linear(bottleneck, out_dim, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 1:
                nn.init.zeros_(parameter)                                     # a bias
            else:
                nn.init.trunc_normal_(parameter, std=0.02)

    def forward(self, x):
        x = F.normalize(self.mlp(x))
        prototypes = F.normalize(self.last_layer.weight)
        return F.linear(x, prototypes)


def ema_copy(module):
    """The teacher: a copy without gradient, so load weights first. It stays in train mode, as in
    the official codes; drop-path would act in it too, which in DINO's it does not."""
    return copy.deepcopy(module).requires_grad_(False)


@torch.no_grad()
def ema_update(teacher, student, momentum):
    """teacher <- momentum * teacher + (1 - momentum) * student; parameters only, not buffers.

    Of float32 weights: in bfloat16 a small step rounds to nothing, and the teacher stands still.
    """
    if not 0 <= momentum <= 1:
        raise ValueError(f'momentum {momentum} is outside [0, 1]')
    for slow, fast in zip(teacher.parameters(), student.parameters()):
        slow.lerp_(fast, 1 - momentum)


class Branches(nn.Module):
    """Which branch is compressed: the query always, the key as drop_branch and patch_branch say.

    What a sample costs (compress.sample_cost) follows from `passes` of each method, a list of the
    encoder's passes over it: (branch, view, trains, widths of the head).
    """

    def __init__(self, encoder, drop_branch='query', patch_branch='both'):
        super().__init__()
        if not {drop_branch, patch_branch} <= {'query', 'both'}:
            raise ValueError(f'branches {drop_branch} and {patch_branch} are not query or both')
        self.student = encoder
        self.drop_branch = drop_branch
        self.patch_branch = patch_branch

    @property
    def encoder(self):
        """The network to export."""
        return self.student

    def compression(self, branch, patch_size, drop_rate):
        """(patch size, drop rate) of 'query' or 'key'; patch size None is the encoder's own."""
        if self.patch_branch not in (branch, 'both'):
            patch_size = None
        if self.drop_branch not in (branch, 'both'):
            drop_rate = 0.0
        return patch_size, drop_rate

    def encode(self, encoder, images, branch, patch_size, drop_rate, generator):
        patch_size, drop_rate = self.compression(branch, patch_size, drop_rate)
        if patch_size is None and not drop_rate:
            return encoder(images)
        if patch_size and self.patch_branch == 'query':
            images = tiled(images, patch_size)
        return encoder(images, patch_size, drop_rate, generator)


def tiled(images, patch_size):
    """Views of the uncompressed key (224 px), resized to a whole number of patches (30: 210 px)."""
    # rounded as compress.patches_per_side does it; to the same sides nothing changes
    sides = []
    for side in images.shape[2:]:
        patches = max(1, int(side / patch_size + 0.5))
        sides.append(patches * patch_size)
    return F.interpolate(images, sides, mode='bilinear', antialias=True)


# ---------------------------------------------------------------- methods: views in, loss out

class MoCo(Branches):
    """MoCo-v3. By default view 1 is the query and view 2 the key (the paper's, as far as known).

    symmetric=True adds the other direction, a sum as in the official code.
    """

    def __init__(self, encoder, hidden=4096, out_dim=256, temperature=0.2, symmetric=False,
                 **branches):
        super().__init__(encoder, **branches)
        self.widths = (encoder.embed_dim, hidden, hidden, out_dim)
        self.projector = mlp_head(self.widths, last_norm=True)
        self.predictor = mlp_head((out_dim, hidden, out_dim), last_norm=True)
        self.teacher = ema_copy(encoder)
        self.teacher_projector = ema_copy(self.projector)
        self.temperature = temperature
        self.directions = 2 if symmetric else 1

    def forward(self, views, patch_size=None, drop_rate=0.0, generator=None):
        strategy = (patch_size, drop_rate, generator)
        x1, x2 = views
        loss, metrics = self.direction(x1, x2, strategy)
        if self.directions == 2:
            swapped, _ = self.direction(x2, x1, strategy)
            loss = loss + swapped
        return loss, metrics

    def direction(self, x1, x2, strategy):
        """(loss, metrics) of queries from x1 against keys from x2."""
        features = self.encode(self.student, x1, 'query', *strategy)
        q1 = self.predictor(self.projector(features))
        with torch.no_grad():
            k2 = self.encode(self.teacher, x2, 'key', *strategy)
            k2 = self.teacher_projector(k2)
        loss = info_nce(q1, k2, self.temperature)
        return loss, monitors(features, q1, k2)

    def passes(self):
        hidden, out_dim = self.widths[-2:]
        with_predictor = (*self.widths, hidden, out_dim)
        passes = []
        for view in range(self.directions):
            passes.append(('query', view, True, with_predictor))
            passes.append(('key', 1 - view, False, self.widths))
        return passes

    def update_teacher(self, momentum):
        ema_update(self.teacher, self.student, momentum)
        ema_update(self.teacher_projector, self.projector, momentum)

    def chance_loss(self, batch_size):
        """The loss when all features are equal; batch_size over all processes."""
        return self.directions * 2 * self.temperature * math.log(batch_size)


class SimCLR(Branches):
    """SimCLR with SLIP's head for a ViT. Both views carry gradient; the first alone drops tokens.

    The head runs once per view, since the views can differ in tokens.
    """

    def __init__(self, encoder, hidden=4096, out_dim=256, temperature=0.1, **branches):
        super().__init__(encoder, **branches)
        self.widths = (encoder.embed_dim, hidden, hidden, out_dim)
        self.projector = mlp_head(self.widths, last_norm=False)
        self.temperature = temperature

    def forward(self, views, patch_size=None, drop_rate=0.0, generator=None):
        strategy = (patch_size, drop_rate, generator)
        x1, x2 = views
        features = self.encode(self.student, x1, 'query', *strategy)
        z1 = self.projector(features)
        z2 = self.encode(self.student, x2, 'key', *strategy)
        z2 = self.projector(z2)
        loss = nt_xent(z1, z2, self.temperature)
        return loss, monitors(features, z1, z2)

    def passes(self):
        return [
            ('query', 0, True, self.widths),
            ('key', 1, True, self.widths),
        ]

    def update_teacher(self, momentum):
        """SimCLR has no teacher: both branches are the trained encoder."""

    def chance_loss(self, batch_size):
        return math.log(2 * batch_size - 1)


class DINO(Branches):
    """DINO. Views: two global crops, then the local ones. It exports the teacher.

    The teacher sees the global crops, the student all. Dropout applies to every crop of the
    student. The defaults are DINO's, teacher_temp that of its longer recipes; train.py has another
    student_temp and center_momentum (see dino_loss). In each step, set_progress comes first and
    before_step between backward and the optimizer.
    """

    def __init__(self, encoder, hidden=2048, bottleneck=256, out_dim=65536,  # noqa: PLR0913
                 teacher_temp=(0.04, 0.07), student_temp=0.1, center_momentum=0.9, local_crops=0,
                 **branches):
        super().__init__(encoder, **branches)
        self.widths = (encoder.embed_dim, hidden, hidden, bottleneck, out_dim)
        self.student_head = DINOHead(encoder.embed_dim, hidden, bottleneck, out_dim)
        self.teacher = ema_copy(encoder)
        self.teacher_head = ema_copy(self.student_head)
        self.register_buffer('center', torch.zeros(1, out_dim))
        # the mean logit of the last forward waits here until update_teacher takes it
        self.register_buffer('batch_center', torch.zeros(1, out_dim), persistent=False)
        self.teacher_temps = teacher_temp
        self.student_temp = student_temp
        self.center_momentum = center_momentum
        self.local_crops = local_crops
        self.set_progress(0.0)

    @property
    def encoder(self):
        return self.teacher

    def forward(self, views, patch_size=None, drop_rate=0.0, generator=None):
        strategy = (patch_size, drop_rate, generator)
        # one pass of the encoder for each resolution: no layer of a ViT mixes samples
        resolutions = [torch.cat(views[:2])]
        if views[2:]:
            resolutions.append(torch.cat(views[2:]))
        with torch.no_grad():
            features = self.encode(self.teacher, resolutions[0], 'key', *strategy)
            teacher = self.teacher_head(features)
        features = [self.encode(self.student, x, 'query', *strategy) for x in resolutions]
        student = self.student_head(torch.cat(features))
        student = student.chunk(len(views))
        temperatures = (self.teacher_temp, self.student_temp)
        loss = dino_loss(student, teacher.chunk(2), self.center, *temperatures)

        teacher = upcast(teacher)
        self.batch_center.copy_(teacher.mean(dim=0, keepdim=True))
        centered = teacher - self.center
        log_p = F.log_softmax(centered / self.teacher_temp, dim=1)
        entropy = -(log_p.exp() * log_p).sum(dim=1)
        # less the center, which all images share; the student's last view is not the teacher's
        b = len(views[0])
        outputs = student[-1] - self.center
        metrics = monitors(features[0][:b], outputs, centered[:b])
        return loss, dict(teacher_entropy=entropy.mean(), **metrics)

    def passes(self):
        views = range(2 + self.local_crops)
        student = [('query', v, True, self.widths) for v in views]
        teacher = [('key', v, False, self.widths) for v in views[:2]]
        return student + teacher

    def set_progress(self, progress):
        """The teacher's temperature rises for the first 30 % (DINO's longer recipe: 30 epochs), and
        the last layer is frozen for the first 1 % (DINO: 1 epoch of 100)."""
        cold, warm = self.teacher_temps
        warmed = min(1.0, progress / 0.3)
        self.teacher_temp = cold + (warm - cold) * warmed
        self.last_layer_frozen = progress < 0.01

    @torch.no_grad()
    def before_step(self, largest=3.0):
        """Clips the gradient of each parameter by its own norm; a frozen last layer gets none."""
        for parameter in self.parameters():
            if parameter.grad is not None:
                factor = largest / (parameter.grad.norm() + 1e-6)
                parameter.grad *= factor.clamp(max=1)
        if self.last_layer_frozen:
            self.student_head.last_layer.weight.grad = None  # neither moved nor decayed

    def update_teacher(self, momentum):
        ema_update(self.teacher, self.student, momentum)
        ema_update(self.teacher_head, self.student_head, momentum)
        # the center moves after the loss has used the old one
        batch_center = mean_over_ranks(self.batch_center)
        self.center.lerp_(batch_center, 1 - self.center_momentum)

    def chance_loss(self, batch_size):
        return math.log(self.center.shape[1])


# ---------------------------------------------------------------- learning, or collapsed?

@torch.no_grad()
def monitors(features, a, b):
    """Numbers for the log, over this process's batch.

    feature_spread: standard deviation of the unit-length features (b d) over the batch, times
    sqrt(d): 1 when they fill the sphere evenly, 0 when all images have the same feature
    (collapse). positive_similarity, negative_similarity: mean cosine of matching rows of a and b
    (b d), and of the others.
    """
    features, a, b = [F.normalize(upcast(x)) for x in (features, a, b)]
    spread = features.std(dim=0).mean() * features.shape[1] ** 0.5
    n = len(a)
    positive = (a * b).sum(dim=1).mean()
    # the mean cosine over all n^2 pairs is the product of the two mean vectors
    means = a.mean(dim=0) * b.mean(dim=0)
    every_pair = means.sum()
    negative = (n * every_pair - positive) / max(1, n - 1)
    return dict(feature_spread=spread, positive_similarity=positive, negative_similarity=negative)


def self_check():
    same = torch.ones(512, 1000)
    collapsed = dict(
        info_nce=(info_nce(same, same), 2 * 0.2 * math.log(512)),
        nt_xent=(nt_xent(same, same), math.log(2 * 512 - 1)),
        dino_loss=(dino_loss([same, same], [same, same], same[:1], 0.04), math.log(1000)),
    )
    for name, (loss, chance) in collapsed.items():
        print(f'{name}, all images alike: {loss:.5f}, in closed form {chance:.5f}')
        assert abs(loss - chance) < 1e-5
    print('losses.py: all claims hold')


if __name__ == '__main__':
    self_check()
