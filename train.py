"""Pretrain a ViT with a compressed token sequence.

    python train.py                                   # rendered images, minutes
    python train.py --schedule none                   # as much, uncompressed
    python train.py --dataset folder --data-root DIR  # your own images
    python train.py --arch vit_base --img-size 224 --patch-size 16 \\
        --num-images 1281167 --budget 1537 --dry-run  # what would this cost?

The clock of a run is its budget in units, the paper's: one unit is one forward
pass of the uncompressed encoder on one image. A sample under strategy tau
spends c(tau) units (compress.sample_cost). An uncompressed sample of MoCo-v3
spends about 4: query forward 1 and backward 2, key forward 1, and the heads.
The run ends when the budget is spent, and every schedule (learning rate,
momentum, weight decay, teacher temperature, compression) runs on progress =
spent / budget.

SIGTERM, SIGINT and SIGUSR1 finish the step, save, and end the run with the exit
status 143, 130 and 0; a second signal ends it at once.
"""
import dataclasses
import functools
import json
import math
import re
import shlex
import sys
import time
from argparse import ArgumentTypeError
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import losses
import pictures
from commandline import (Parser, count, count_or_zero, fail, fraction, not_negative, note, number,
                         pick_device, pick_precision, positive, rate, size)
from compress import Compression, rendered_side, sample_cost, tokens_of
from data import DATASETS, batch_keys, load, shrink_note, steps_per_epoch
from eval import knn_accuracy
from gradstats import adam_scale, flat_gradient, gradient_stats, unchanged
from losses import mean_over_ranks
from runs import (Progress, State, StopSignal, agree, append, collapse_warning, exit_status,
                  join_processes, load_checkpoint, marks, new_folder, open_log, process_numbers,
                  reason, restore, snapshot, waiting_warning)
from schedule import Schedule, cosine, polynomial, ramp, warmup
from views import keyed_generator, make_views, normalize, recipe
from vit import SIZES, Block, ViT
from weights import load_backbone, save

# What the three methods do differently: their papers' constants, but for sizes, batch, learning
# rate and much of DINO, which are ours for small images and short runs. DINO needs no large batch,
# since its loss is not contrastive, but many steps, since its teacher moves little at each. Its
# own temperature 0.1 and center momentum 0.9 may collapse here (see dino_loss), and of its local
# crops little is left: one has 16 patches at 32 px, and 2 tokens under p8-drop0.50.
METHODS = dict(
    moco=dict(out_dim=256, temperature=0.2, momentum=0.99, batch_size=128, lr=2e-3,
              weight_decay=0.1),
    simclr=dict(out_dim=256, temperature=0.1, momentum=0.0, batch_size=128, lr=4e-3,
                weight_decay=0.1),
    dino=dict(out_dim=1024, temperature=0.4, momentum=0.98, batch_size=32, lr=2e-3,
              weight_decay=0.04),
)
DINO_WEIGHT_DECAY_END = 0.4                          # DINO main_dino.py; the others keep theirs
DINO_CLIP = 3.0                                      # the largest norm of a parameter's gradient
ARCHS = dict(
    toy=dict(embed_dim=64, depth=4, num_heads=2),    # ours: minutes on a laptop
    **SIZES,
)
UNUSED = dict(moco=['--local-crops', '--local-size', '--center-momentum'],
              simclr=['--local-crops', '--local-size', '--symmetric', '--momentum',
                      '--center-momentum'],
              dino=['--symmetric'])
SAVE_EVERY = 0.05                                    # of the budget, beside --save-minutes
GROUPS = 4                                           # of probe batches, for the error bars


# ---------------------------------------------------------------- flags

def progress_points(text):
    """'0,0.25,1' -> [0.0, 0.25, 1.0]"""
    return sorted({fraction(part) for part in text.split(',')})


def strategies(text):
    """'p8,p8-drop0.50' -> names of strategies, each once."""
    try:
        return list(dict.fromkeys(str(Compression.parse(part)) for part in text.split(',')))
    except ValueError as error:
        raise ArgumentTypeError(error) from None


def schedule_text(text):
    if text in ('none', 'default'):
        return text
    if text.endswith('.json'):
        raise ArgumentTypeError(f'{text!r} is a file of an earlier version, which counted other '
                                f'units; a schedule is its text now, such as p8@0,p4@0.7')
    try:
        return str(Schedule.parse(text))
    except ValueError as error:
        raise ArgumentTypeError(error) from None


def groups_of_four(text):
    batches = count(text)
    if batches % GROUPS:
        raise ArgumentTypeError(f'{batches} must be a multiple of {GROUPS}: as many groups of '
                                f'batches give the error bars')
    return batches


def interval(text):
    every = fraction(text)
    if 0 < every < 0.001:
        raise ArgumentTypeError(f'{text} must be 0 or at least 0.001 of the budget')
    return every


def encoder_size(text):
    """'vit_base', or width, depth and heads: '768,12,12' -> sizes of the encoder"""
    if text in ARCHS:
        return ARCHS[text]
    parts = text.split(',')
    if len(parts) != 3:
        raise ArgumentTypeError(f'{text!r} is none of {", ".join(ARCHS)}, '
                                f'and not WIDTH,DEPTH,HEADS')
    return dict(zip(('embed_dim', 'depth', 'num_heads'), map(size, parts)))


def folder_name(text):
    if not re.fullmatch(r'[\w][\w.,@+-]*', text):
        raise ArgumentTypeError(f'{text!r} is no name for a folder; use letters, digits and . - _')
    return text


def build_parser():
    parser = Parser(__doc__)
    group = parser.add_argument_group('data')
    group.add_argument('--dataset', default='shapes', choices=DATASETS,
                       help='shapes is rendered, folder is any tree of images')
    group.add_argument('--data-root', default='data', help='folder of the data set')
    group.add_argument('--download', action='store_true', help='fetch the data set if absent')
    group.add_argument('--img-size', type=size, default=32,
                       help='side of the views in pixels (paper: 224)')
    group.add_argument('--local-crops', type=number(int, 0, 100), default=0,
                       help='DINO: number of local views (official: 8)')
    group.add_argument('--local-size', type=size,
                       help="DINO: side of the local views (default: 96/224 of --img-size)")
    group.add_argument('--crop-scale', type=number(float, 0.001, 1),
                       help="smallest area of a crop, but for DINO's local ones (default: the "
                            "recipe's)")
    group.add_argument('--jitter', type=number(float, 0, 2), default=1,
                       help="factor on the strength of the recipe's color jitter")
    group.add_argument('--workers', type=count_or_zero, default=2,
                       help='loader processes for images in files, of each training process')
    group.add_argument('--from-disk', action='store_true',
                       help='do not hold a folder of small images in memory')

    group = parser.add_argument_group('encoder')
    group.add_argument('--arch', type=encoder_size, default='toy',
                       help=f'{", ".join(ARCHS)} (paper), or WIDTH,DEPTH,HEADS (MoCo-v3 has '
                            f'384,12,12 for ViT-S)')
    group.add_argument('--patch-size', type=size, default=4,
                       help='patch side in pixels, uncompressed (paper: 16)')
    group.add_argument('--freeze-patch-embed', action='store_true',
                       help="MoCo-v3's stop-grad-conv1")
    group.add_argument('--init', metavar='WEIGHTS',
                       help='start from these weights (a backbone.pt, timm, MoCo-v3, DINO)')

    group = parser.add_argument_group('objective')
    group.add_argument('--method', default='moco', choices=METHODS,
                       help='the defaults shown are those of the method given')
    group.add_argument('--hidden', type=size, default=512,
                       help='hidden width of the heads (MoCo-v3: 4096, DINO: 2048)')
    group.add_argument('--out-dim', type=number(int, 1, 10 ** 7),
                       help='outputs of the heads (DINO: 65536)')
    group.add_argument('--temperature', type=positive,
                       help='of the loss; DINO: of the student (official: 0.1)')
    group.add_argument('--symmetric', action='store_true',
                       help='MoCo-v3: each view is the query once (doubles the cost)')
    group.add_argument('--momentum', type=rate,
                       help='of the EMA teacher at the start; 1 at the end (DINO: 0.996)')
    group.add_argument('--center-momentum', type=rate, default=0.5,
                       help="DINO: of the center of the teacher's outputs (official: 0.9)")

    group = parser.add_argument_group('compression')
    group.add_argument('--schedule', type=schedule_text, default='default',
                       help='none, a strategy (p8-drop0.50), stages (p8@0,p4@0.7), or default: '
                            'twice the patch size, half of the tokens')
    group.add_argument('--drop-branch', default='query', choices=('query', 'both'),
                       help='who drops tokens: query, student or first view alone, or both')
    group.add_argument('--patch-branch', default='both', choices=('query', 'both'),
                       help='who sees larger patches; query: the key stays uncompressed')
    group.add_argument('--budget', type=positive, default=0.16,
                       help='millions of units (paper: 25 to 200, ImageNet-1k 300 to 6150)')

    group = parser.add_argument_group('gradient errors')
    group.add_argument('--gradstats', type=progress_points, default=[], metavar='P,P,...',
                       help='measure them at these points of progress, beside the budget: '
                            '0.05,0.25,0.5,0.75,1')
    group.add_argument('--grid', type=strategies, metavar='TAU,TAU,...',
                       help='strategies to measure (default: 1, 2 and 4 times the patch size, '
                            'drop rates 0 and 0.5)')
    group.add_argument('--probe-batches', type=groups_of_four, default=24,
                       help='batches for each strategy and point, a multiple of 4')
    group.add_argument('--metric', default='adam', choices=('euclidean', 'adam'),
                       help='of the error; adam divides by the root of its second moment')

    group = parser.add_argument_group('optimization')
    group.add_argument('--batch-size', type=number(int, 2, 10 ** 6),
                       help='images per step, over all processes (MoCo-v3: 4096)')
    group.add_argument('--lr', type=positive,
                       help='peak learning rate per 256 images (MoCo-v3: 1.5e-4, DINO: 5e-4)')
    group.add_argument('--lr-schedule', default='cosine', choices=('cosine', 'polynomial'),
                       help='polynomial is 1 - p^2')
    group.add_argument('--warmup', type=rate, default=0.1,
                       help='progress over which the learning rate rises')
    group.add_argument('--weight-decay', type=not_negative,
                       help='DINO: at the start, 0.4 at the end')

    group = parser.add_argument_group('run')
    group.add_argument('--name', type=folder_name, help='folder below runs/')
    group.add_argument('--seed', type=count_or_zero, default=0,
                       help='of weights, data order, views and token draws')
    group.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda', 'mps'))
    group.add_argument('--precision', default='auto', choices=('auto', 'float32'),
                       help='auto: bfloat16 on a GPU that has it')
    group.add_argument('--compile', action='store_true', help='torch.compile the blocks')
    group.add_argument('--log-every', type=count, default=10, help='steps')
    group.add_argument('--eval-every', type=interval, default=0.25,
                       help='progress between nearest-neighbour scores; 0: none')
    group.add_argument('--save-minutes', type=number(float, 0.1, 1e6), default=10,
                       help='a checkpoint at least this often')
    group.add_argument('--max-steps', type=count, help='save and stop at this step')
    group.add_argument('--resume', metavar='RUN',
                       help='folder of a run to go on with; auto: that of --name, if it exists')
    group.add_argument('--dry-run', action='store_true',
                       help='say what the run would do, and do nothing')
    group.add_argument('--num-images', type=count,
                       help='of a --dry-run without its data set (ImageNet-1k: 1281167)')
    return parser


def parse_args(argv):
    """(flags, checkpoint to go on from or None).

    The defaults follow --method. Those of a resumed run are the flags that it had.
    """
    early = Parser(None, add_help=False)
    for flag in ('--method', '--resume', '--name'):
        early.add_argument(flag)
    known = early.parse_known_args(argv)[0]
    checkpoint = None
    saved = {}
    if known.resume == 'auto':
        if not known.name:
            raise ValueError('--resume auto goes on with the run of --name; give a --name')
        known.resume = Path('runs') / known.name
        if not (known.resume / 'checkpoint.pt').exists():
            known.resume = None
    if known.resume is not None:
        checkpoint = load_checkpoint(Path(known.resume))
        saved = checkpoint['args']
        if saved.get('init'):                        # the file may be gone; the backbone is not
            saved['init'] = str(Path(known.resume) / 'backbone.pt')

    parser = build_parser()
    parser.set_defaults(**METHODS.get(known.method or saved.get('method'), METHODS['moco']))
    parser.set_defaults(**saved)
    args = parser.parse_args(argv)
    if args.metric == 'adam' and 0 in args.gradstats:
        raise ValueError('Adam has no second moment at progress 0; start --gradstats later, or '
                         'take --metric euclidean')
    if args.num_images and not args.dry_run:
        raise ValueError('--num-images stands for the data set of a --dry-run; leave it out')
    if known.name and known.resume is not None and Path(known.resume).name != known.name:
        raise ValueError(f'--resume {known.resume} goes on in its own folder; leave out --name')
    if args.name and checkpoint is None and not args.dry_run:
        folder = new_folder(args)
        if (folder / 'checkpoint.pt').exists():
            raise FileExistsError(f'{folder} exists; choose another --name, or --resume {folder}')
    given = {word.partition('=')[0] for word in argv}
    unused = [flag for flag in UNUSED[args.method] if flag in given]
    if unused:
        note(f'{args.method} does not use {", ".join(unused)}')
    args.resume = str(known.resume) if known.resume is not None else None
    return args, checkpoint


# ---------------------------------------------------------------- set-up

def build_encoder(args, in_chans):
    """The encoder of the flags, or the one in --init, which must have the sizes of the flags."""
    config = dict(img_size=args.img_size, patch_size=args.patch_size, in_chans=in_chans,
                  freeze_patch_embed=args.freeze_patch_embed, **args.arch)
    if not args.init:
        return ViT(**config)
    with torch.device('cpu'):                        # in a dry run too, where 'meta' is the default
        encoder, _ = load_backbone(args.init, args.arch['num_heads'])
    for flag in ('img_size', 'patch_size', 'in_chans', 'embed_dim', 'depth'):
        found = encoder.config[flag]
        if found != config[flag]:
            raise ValueError(f'--init {args.init} has {flag} {found}, this run {config[flag]}; '
                             f'set the flags of the encoder to the sizes of the weights')
    encoder.config['freeze_patch_embed'] = args.freeze_patch_embed
    encoder.patch_embed.requires_grad_(not args.freeze_patch_embed)
    return encoder


def build_method(args, encoder):
    common = dict(hidden=args.hidden, out_dim=args.out_dim, drop_branch=args.drop_branch,
                  patch_branch=args.patch_branch)
    if args.method == 'moco':
        return losses.MoCo(encoder, temperature=args.temperature, symmetric=args.symmetric,
                           **common)
    if args.method == 'simclr':
        return losses.SimCLR(encoder, temperature=args.temperature, **common)
    return losses.DINO(encoder, student_temp=args.temperature, local_crops=args.local_crops,
                       center_momentum=args.center_momentum, **common)


def build_views(args):
    """The recipe of the method, at the nominal sides."""
    views = recipe(args.method, args.img_size, args.local_crops, args.local_size)
    views = [dataclasses.replace(view, jitter=tuple(args.jitter * s for s in view.jitter))
             for view in views]
    if args.crop_scale:
        views[:2] = [dataclasses.replace(view, scale=(args.crop_scale, 1.0)) for view in views[:2]]
    return views


def build_schedule(args):
    """The compression over progress; by default half of the tokens of twice the patch size."""
    p = args.patch_size
    if args.schedule == 'none':
        return Schedule(((0.0, Compression(p)),))
    if args.schedule == 'default':
        larger = min(2 * p, args.img_size)
        return Schedule(((0.0, Compression(larger, 0.5)),))
    return Schedule.parse(args.schedule)


def build_grid(args):
    """The strategies whose gradient is measured, the uncompressed one first."""
    base = Compression(args.patch_size)
    if args.grid:
        return list(dict.fromkeys([base, *map(Compression.parse, args.grid)]))
    sizes = [times * args.patch_size for times in (1, 2, 4)]
    return [Compression(p, rate) for p in sizes if p <= args.img_size for rate in (0.0, 0.5)]


def build_optimizer(method, args, device):
    """AdamW. MoCo-v3 decays every parameter, DINO and SimCLR all but biases and norms."""
    trainable = [p for p in method.parameters() if p.requires_grad]
    decayed = [p for p in trainable if args.method == 'moco' or p.ndim > 1]
    plain = [p for p in trainable if args.method != 'moco' and p.ndim <= 1]
    groups = [dict(params=decayed, decays=True)]
    if plain:
        groups.append(dict(params=plain, decays=False))
    return torch.optim.AdamW(groups, fused=device.type in ('cuda', 'cpu'))


@dataclass
class Plan:
    """What a run is going to do, and with what."""
    method: nn.Module
    views: list                                      # the recipe, at nominal sides
    schedule: Schedule
    grid: list                                       # strategies whose gradient is measured
    cost: dict                                       # strategy -> units per training sample
    base: Compression                                # no compression
    budget: float                                    # units
    num_images: int


def make_plan(args, in_chans, num_images):
    method = build_method(args, build_encoder(args, in_chans))
    views = build_views(args)
    base = Compression(args.patch_size)
    schedule = build_schedule(args)
    grid = build_grid(args)
    measured = grid if args.gradstats else []
    used = list(dict.fromkeys([base, *measured, *(tau for _, tau in schedule.stages)]))
    for tau in used:
        if tau.patch_size > args.img_size:
            raise ValueError(f'patch size {tau.patch_size} is larger than the image, '
                             f'--img-size {args.img_size}')
    sides = [view.side for view in views]
    cost = strategy_costs(method, used, sides, method.encoder.config)
    budget = args.budget * 1e6
    steps_per_epoch(num_images, args.batch_size)     # refuses a batch larger than the data set
    first = schedule.at(0.0)
    if budget < cost[first] * args.batch_size:
        raise ValueError(f'a budget of {budget:,.0f} units does not pay for one batch of '
                         f'{args.batch_size} under {first}, {cost[first] * args.batch_size:,.0f} '
                         f'units; raise --budget or lower --batch-size')
    return Plan(method, views, schedule, grid, cost, base, budget, num_images)


def key_strategy(plan, tau):
    """What the key branch sees while the query is under strategy tau."""
    patch_size, drop_rate = losses.key_compression(plan.method, tau.patch_size, tau.drop_rate)
    return Compression(patch_size or plan.base.patch_size, drop_rate)


def announce(args, plan):
    """Lines that say what the run is going to do: sizes, tokens, costs, samples and steps."""
    method = plan.method
    config = method.encoder.config
    parameters = sum(p.numel() for p in method.encoder.parameters())
    trained = sum(p.numel() for p in method.parameters() if p.requires_grad)
    still = sum(p.numel() for p in method.parameters()) - trained
    yield (f'encoder   {parameters:,} parameters: width {config["embed_dim"]}, depth '
           f'{config["depth"]}, {config["num_heads"]} heads, patch size {args.patch_size}')
    yield (f'memory    {(16 * trained + 4 * still) / 2 ** 30:.2f} GiB of weights, gradients and '
           f'optimizer; activations come on top')
    # with the class token, as the paper counts
    yield 'strategy        query tokens  key tokens  view, px   units/sample'
    for tau in sorted(plan.cost, key=plan.cost.get, reverse=True):
        key = key_strategy(plan, tau)
        key_tokens = tokens_of(args.img_size, key.patch_size, key.drop_rate)
        warning = '  more than uncompressed!' if plan.cost[tau] > plan.cost[plan.base] else ''
        yield (f'  {str(tau):14} {1 + tokens_of(args.img_size, tau.patch_size, tau.drop_rate):11} '
               f'{1 + key_tokens:11} {rendered_side(args.img_size, tau.patch_size):9} '
               f'{plan.cost[tau]:14.3f}{warning}')
    epochs = plan.budget / plan.cost[plan.base] / plan.num_images
    yield f'budget    {plan.budget:,.0f} units: {epochs:.2f} uncompressed epochs'
    samples = 0
    ends = [start for start, _ in plan.schedule.stages[1:]] + [1.0]
    for (start, tau), end in zip(plan.schedule.stages, ends):
        part = (end - start) * plan.budget / plan.cost[tau]
        samples += part
        yield (f'schedule  {100 * start:3.0f} to {100 * end:3.0f} %: {str(tau):12} '
               f'{part:14,.0f} samples, {part / args.batch_size:10,.0f} steps')
    yield (f'          {samples:,.0f} samples, {samples / plan.num_images:.2f} epochs, '
           f'{samples * plan.cost[plan.base] / plan.budget:.2f} times as many as uncompressed')
    yield (f'optimizer AdamW, peak learning rate {args.lr * args.batch_size / 256:.2e} = '
           f'{args.lr:g} x {args.batch_size} / 256, {args.lr_schedule}')
    chance = method.chance_loss(args.batch_size)
    yield f'loss      {chance:.3f} is chance: all features equal, or uniform outputs'


def strategy_costs(method, strategies, sides, config):
    """{strategy: units per training sample}"""
    return {tau: sample_cost(method.passes(tau.patch_size, tau.drop_rate), sides, config)
            for tau in strategies}


def clip_each(parameters, largest):
    """DINO clips the gradient of each parameter by its own norm, not all by the global one."""
    for parameter in parameters:
        if parameter.grad is not None:
            norm = parameter.grad.norm()
            parameter.grad *= (largest / (norm + 1e-6)).clamp(max=1)


# ---------------------------------------------------------------- training

def render_views(plan, images, tau, seed_key, device):
    """(views, key views or None, generator of the token draws) of a batch under strategy tau.

    Each view has its own generator, so the same seed key gives the same crop and colours at any
    side. Key views are the views at the side of the key branch, if that is another. A view that no
    pass of a branch reads is None.
    """
    def render(patch_size, seen):
        views = [None] * len(plan.views)
        for i in seen:
            view = plan.views[i].at(rendered_side(plan.views[i].side, patch_size))
            # a folder's images were cropped by a loader worker, once for each view
            crops = images if torch.is_tensor(images) else images[i:i + 1]
            generator = keyed_generator(*seed_key, i, device=device)
            views[i] = make_views(crops, [view], generator)[0]
        return views

    passes = plan.method.passes(tau.patch_size, tau.drop_rate)
    query_ids = {one['view'] for one in passes if one['branch'] == 'query'}
    key_ids = {one['view'] for one in passes if one['branch'] == 'key'}
    generator = keyed_generator(*seed_key, 'tokens', device=device)
    if plan.method.patch_branch == 'both':
        return render(tau.patch_size, query_ids | key_ids), None, generator
    views = render(tau.patch_size, query_ids)
    return views, render(plan.base.patch_size, key_ids), generator


def load_once(args, rank, world):
    """The data set; with --download one process fetches it and the others wait."""
    if world > 1 and args.download and rank:
        dist.barrier()
    say = tqdm.write if rank == 0 else lambda line: None
    data = load(args.dataset, args.data_root, args.download, not args.from_disk, say)
    if world > 1 and args.download and not rank:
        dist.barrier()
    return data


def dry_run(args):
    """Print what a run would do. Nothing is trained, and no weight takes memory."""
    if process_numbers()[0]:
        return                                       # under torchrun one process says it
    in_chans = 3
    num_images = args.num_images
    if num_images is None:
        data = load(args.dataset, args.data_root, args.download)
        in_chans = data.channels
        num_images = len(data)
    with torch.device('meta'):
        plan = make_plan(args, in_chans, num_images)
    print(f'dry run   {args.method} on {num_images:,} images at {args.img_size} px')
    for line in announce(args, plan):
        print(line)


# ---------------------------------------------------------------- a run and its parts

@dataclass
class Run:
    """What a step needs, made once by set_up."""
    args: object
    plan: Plan
    data: object
    method: nn.Module
    model: nn.Module                                 # the method, or its DistributedDataParallel
    optimizer: torch.optim.Optimizer
    parameters: list                                 # those that train
    device: torch.device
    half: bool                                       # bfloat16 autocast
    rank: int
    world: int
    state: State
    identity: dict                                   # what a resumed run must have in common
    folder: Path = None                              # of the main process alone, as the log
    log_file: object = None                          # open for its lock

    @property
    def progress(self):
        """The clock of every schedule: spent budget / budget."""
        return min(1.0, self.state.units / self.plan.budget)

    def due(self, marks):
        """The marks that progress has passed since the last step."""
        return [mark for mark in marks if self.state.seen < mark <= self.progress]

    def say(self, text):
        if self.rank == 0:
            tqdm.write(text)

    def write(self, line):
        if self.rank == 0:
            append(self.folder / 'log.jsonl', [line])


def loss_of(run, model, images, tau, *key):
    """(loss, metrics) of fresh views of these images under strategy tau.

    The key, such as the step, fixes crops, colours and tokens: a resumed run draws the same, and so
    does every strategy that a probe compares.
    """
    seed_key = (run.args.seed, run.rank, *key)
    views, key_views, generator = render_views(run.plan, images, tau, seed_key, run.device)

    def normalized(view):
        return None if view is None else normalize(view, run.data.mean, run.data.std)

    views = [normalized(view) for view in views]
    key_views = key_views and [normalized(view) for view in key_views]
    with torch.autocast('cuda', torch.bfloat16, enabled=run.half):
        return model(views, tau.patch_size, tau.drop_rate, generator, key_views)


def measure_gradients(run, point):
    """Add the gradient errors here and now to gradstats.jsonl, as those of this point of progress.

    The batches are random ones of their own, and nothing of the run changes.
    """
    args = run.args
    cost = run.plan.cost
    step = run.state.step
    keys = random_batches(run, args.probe_batches)
    images = run.data.batches(keys, run.plan.views, args.seed, run.device, args.workers)
    scale = adam_scale(run.optimizer, run.parameters) if args.metric == 'adam' else None

    @functools.lru_cache(maxsize=1)                  # one batch at a time, for all strategies
    def images_of(i):
        return next(images)

    def grad_fn(i, tau):
        loss, _ = loss_of(run, run.method, images_of(i), tau, 'probe', step, i)
        return mean_over_ranks(flat_gradient(loss, run.parameters))

    with unchanged(run.method):
        stats = gradient_stats(grad_fn, run.plan.grid, run.plan.base, range(args.probe_batches),
                               GROUPS, scale)
    rows = []
    for tau, stat in stats.items():
        if not math.isfinite(stat.mse):
            give_up(run, 'a gradient is not finite')
        # the cost is relative to the uncompressed strategy: how many batches one batch pays for
        rows.append(dict(progress=point, strategy=str(tau), cost=cost[tau] / cost[run.plan.base],
                         **dataclasses.asdict(stat), metric=args.metric, method=args.method,
                         batch_size=args.batch_size, step=step, units=run.state.units))
    if run.rank == 0:
        append(run.folder / 'gradstats.jsonl', rows)


def random_batches(run, batches):
    """Random images for a gradient probe: lists of (epoch, index), a share for each process."""
    share = run.args.batch_size // run.world
    step = run.state.step
    keys = []
    for i in range(batches):
        generator = keyed_generator(run.args.seed, 'probe order', step, i)
        order = torch.randperm(len(run.data), generator=generator)
        mine = order[run.rank * share:(run.rank + 1) * share]
        keys.append([(f'probe {step}', index) for index in mine.tolist()])
    return keys


def score(run):
    """Nearest neighbours among uncompressed features. The others wait for the main process."""
    state = run.state
    args = run.args
    scores, bank, queries = knn_accuracy(run.method.encoder, run.data, args.img_size, run.device,
                                         bank_limit=10_000, query_limit=5_000,
                                         workers=args.workers, progress=True)
    run.write(dict(step=state.step, progress=run.progress, units=state.units,
                   seconds=state.seconds, nn=scores[1], knn=scores[20], bank=bank, queries=queries))
    when = f'{100 * run.progress:.0f} % of the budget' if state.step else 'random network'
    run.say(f'{when}: {scores[20]:.2f} % 20-NN, {scores[1]:.2f} % NN, uncompressed, {bank} bank '
            f'and {queries} test images')
    pictures.curves_of_run(run.folder)


def save_run(run):
    if not all(torch.isfinite(parameter).all() for parameter in run.method.parameters()):
        give_up(run, 'a weight is not finite')
    if run.rank == 0:
        encoder = run.method.encoder
        # the backbone first: a run whose last checkpoint is there has its backbone too
        save(dict(model=encoder.state_dict(), config=encoder.config, mean=run.data.mean,
                  std=run.data.std, dataset=run.args.dataset), run.folder / 'backbone.pt')
        save(snapshot(run), run.folder / 'checkpoint.pt')


def give_up(run, what):
    if run.rank == 0:
        save(snapshot(run), run.folder / 'crash.pt')
    raise FloatingPointError(
        f'{what} at step {run.state.step}, progress {run.progress:.3f}. crash.pt holds this state '
        f'to look at; checkpoint.pt is the last that was finite. Start again with a lower --lr '
        f'(now {run.args.lr:g}), a longer --warmup or --freeze-patch-embed')


def log(run, loss, metrics, tau, curves):
    """A line of log.jsonl, and warnings in plain words."""
    state = run.state
    args = run.args
    run.write(dict(step=state.step, progress=run.progress, units=state.units,
                   samples=state.samples, loss=loss, **curves, query=str(tau),
                   key=str(key_strategy(run.plan, tau)),
                   tokens=1 + tokens_of(args.img_size, tau.patch_size, tau.drop_rate),
                   seconds=state.seconds, seconds_data=state.seconds_data, **metrics))
    if state.step >= 50:
        relative_cost = run.plan.cost[tau] / run.plan.cost[run.plan.base]
        warnings = dict(collapse=collapse_warning(metrics, args.out_dim),
                        waiting=waiting_warning(state, relative_cost))
        for kind, warning in warnings.items():
            if warning and kind not in state.warned:   # each kind once
                state.warned.append(kind)
                run.say(f'warning: step {state.step}: {warning}')


def scorable(data):
    """Nearest neighbours need labels, and a bank that holds the 20 of them."""
    bank = data.labelled_ids('train')
    return len(data.classes) > 1 and len(bank) >= 20 and len(data.labelled_ids('test')) > 0


def set_up(args, checkpoint):
    """Processes, device, data, networks and optimizer, in this order; and what is to happen."""
    rank, world = process_numbers()
    device = pick_device(args.device)
    if args.batch_size % world or args.batch_size // world < 2:
        raise ValueError(f'batch size {args.batch_size} cannot be shared by {world} process(es) as '
                         f'at least 2 images each; use a multiple of {world} from {2 * world} on')
    folder = log_file = None
    if world > 1:
        join_processes(device)

    data = load_once(args, rank, world)
    torch.manual_seed(args.seed)
    plan = make_plan(args, data.channels, len(data))
    if rank == 0:                                    # nothing is made before the flags are checked
        folder = Path(args.resume) if checkpoint else new_folder(args)
        log_file = open_log(folder, checkpoint is None)
    method = plan.method.to(device)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64    # one graph per sequence length and branch
        for module in method.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)
    model = method
    if world > 1:
        if device.type == 'cuda':                    # gloo cannot: there each process has its own
            nn.SyncBatchNorm.convert_sync_batchnorm(method)
        devices = [device.index] if device.type == 'cuda' else None
        model = DistributedDataParallel(method, device_ids=devices)
    optimizer = build_optimizer(method, args, device)
    half = pick_precision(args.precision, device) == torch.bfloat16
    parameters = [p for p in method.parameters() if p.requires_grad]
    images = f'{len(data):,} ({data.fingerprint})'
    identity = dict(world=world, images=images, **method.encoder.config)
    run = Run(args, plan, data, method, model, optimizer, parameters, device, half, rank, world,
              State(), identity, folder, log_file)
    if checkpoint:
        restore(run, checkpoint)

    run.say(f'run       {folder}   {device}, {world} process(es), '
            f'{"bfloat16" if half else "float32"}, seed {args.seed}, torch {torch.__version__}')
    run.say(f'data      {args.dataset}: {len(data):,} images, {data.channels} channel(s), '
            f'{len(data.classes)} classes; {len(plan.views)} views each')
    for line in announce(args, plan):
        run.say(line)
    if not scorable(data):
        run.say('score     none: it needs labels, and at least 20 labelled training images')
    shrunk = shrink_note(data, args.img_size)
    if shrunk:
        run.say(shrunk)
    if rank == 0:
        save(json.dumps(vars(args), indent=1), folder / 'args.json')
    return run


# ---------------------------------------------------------------- the loop

def train(run):  # noqa: PLR0915, C901 (the one long function: a loop is read from top to bottom)
    args = run.args
    plan = run.plan
    state = run.state
    decay = dict(cosine=cosine, polynomial=polynomial)[args.lr_schedule]
    weight_decay_end = DINO_WEIGHT_DECAY_END if args.method == 'dino' else args.weight_decay
    peak_lr = args.lr * args.batch_size / 256
    keys = batch_keys(len(run.data), args.batch_size, args.seed, state.step, run.rank, run.world)
    batches = run.data.batches(keys, plan.views, args.seed, run.device, args.workers)

    # every event has its marks of progress
    score_at = marks(args.eval_every) if args.eval_every and scorable(run.data) else []
    save_at = marks(SAVE_EVERY)
    stop = StopSignal()
    bar = Progress(plan.budget, state, run.rank == 0)
    saved_at = time.perf_counter()
    stopping = 0                                       # the signal that all processes know of

    while True:
        progress = run.progress                        # the clock of every schedule
        run.method.set_progress(progress)              # DINO: teacher temperature, last layer
        if stopping and progress < 1:                  # what is due here is left to --resume
            save_run(run)
            break

        # what comes now may take long, and a scheduler may not wait
        if run.due([*score_at, *args.gradstats]):
            save_run(run)

        # now and then, when progress passes a mark: score, measure, save
        if run.due(score_at) and run.rank == 0:
            score(run)
        for point in run.due(args.gradstats):
            measure_gradients(run, point)
        minutes = (time.perf_counter() - saved_at) / 60
        ends = progress == 1 or state.step >= (args.max_steps or math.inf)
        saves = run.due(save_at) or minutes > args.save_minutes
        state.seen = progress
        if saves or ends:
            save_run(run)
            saved_at = time.perf_counter()
        if ends:
            break

        # what this step does: how much to compress, and the curves
        tau = plan.schedule.at(progress)
        after_warmup = max(0, progress - args.warmup) / (1 - args.warmup)
        lr = peak_lr * warmup(progress, args.warmup) * decay(after_warmup)
        weight_decay = ramp(args.weight_decay, weight_decay_end, progress)
        momentum = ramp(args.momentum, 1.0, progress)
        for group in run.optimizer.param_groups:
            group['lr'] = lr
            group['weight_decay'] = weight_decay if group['decays'] else 0.0

        # the loss: the query sees few tokens, the key by default all of them
        start = time.perf_counter()
        images = next(batches)
        state.seconds_data += time.perf_counter() - start
        loss, metrics = loss_of(run, run.model, images, tau, state.step)
        mean_loss, stopping = agree(loss, stop.pending())
        if not math.isfinite(mean_loss):
            give_up(run, f'the loss is {mean_loss}')

        # the gradient moves the student, the student moves the teacher
        run.optimizer.zero_grad()
        loss.backward()
        if args.method == 'dino':
            clip_each(run.parameters, DINO_CLIP)
        for parameter in run.method.frozen():          # neither moved nor decayed
            parameter.grad = None
        run.optimizer.step()
        run.method.update_teacher(momentum)

        # the budget pays what the step cost
        state.step += 1
        state.samples += args.batch_size
        state.units += plan.cost[tau] * args.batch_size
        logs = state.step % args.log_every == 0 or state.units >= plan.budget
        if logs:                                       # waits for a GPU, hence before the clock
            metrics = {name: float(value) for name, value in metrics.items()}
        state.seconds += time.perf_counter() - start
        bar.update(state, mean_loss, tau)
        if logs:
            log(run, mean_loss, metrics, tau, dict(lr=lr, momentum=momentum))

    # the end: the budget is spent, or the run stops on the way
    bar.close()
    if run.world > 1:
        dist.barrier()                                 # nobody leaves while another listens
    if progress < 1:
        run.say(f'stopped at step {state.step}, {100 * progress:.0f} % of the budget; go on with '
                f'python train.py --resume {run.folder}')
        return exit_status(stopping)
    if run.rank == 0:
        pictures.curves_of_run(run.folder)
    root = f' --data-root {shlex.quote(args.data_root)}' if args.data_root != 'data' else ''
    run.say(f'{state.step:,} steps, {state.samples:,} samples for {state.units:,.0f} units in '
            f'{state.seconds:.0f} s, {100 * state.seconds_data / state.seconds:.0f} % of them '
            f'waiting for data; python eval.py --weights {run.folder}/backbone.pt{root} '
            f'{"scores it" if scorable(run.data) else "--export features.npz writes its features"}')
    return 0


def main(argv=None):
    # names of files that a console cannot write; each line at once, also into a file
    sys.stdout.reconfigure(errors='backslashreplace', line_buffering=True)
    status = 0
    try:
        args, checkpoint = parse_args(sys.argv[1:] if argv is None else argv)
        if args.dry_run:
            dry_run(args)
        else:
            status = train(set_up(args, checkpoint))
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        line = reason(error)
        if line is None:
            raise
        fail(f'train.py: error: {line}')
    except KeyboardInterrupt:                        # before the loop, which would finish its step
        fail('train.py: stopped before the first step', 130)
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
    if status:
        sys.exit(status)


if __name__ == '__main__':
    main()
