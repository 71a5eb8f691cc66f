"""Pretrain a ViT with a compressed token sequence.

    python train.py                                   # rendered images, minutes
    python train.py --schedule none                   # as much, uncompressed
    python train.py --dataset folder --data-root DIR  # your own images

The clock of a run is its budget in units, the paper's: one unit is one forward
pass of the uncompressed encoder on one image. A sample under strategy tau
spends c(tau) units. An uncompressed sample of MoCo-v3 spends about 4: query
forward 1 and backward 2, key forward 1, and the heads. The run ends when the
budget is spent, and every schedule (learning rate, momentum, weight decay,
teacher temperature, compression) runs on progress = spent / budget.

A run leaves in runs/NAME/: args.json, log.jsonl (a line for ten steps, or for a
score), checkpoint.pt (for --resume), backbone.pt (the encoder in timm's names)
and, if asked for, gradstats.jsonl. A killed run goes on from its last checkpoint
and, on CPUs, computes the same bits: every random draw has a key such as (seed,
rank, step). SIGTERM, SIGINT, SIGHUP and SIGUSR1 finish the step and save; a second
signal ends the run at once.
"""
import argparse
import contextlib
import dataclasses
import itertools
import json
import math
import os
import shlex
import signal
import sys
import threading
import time
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

# OpenMP's threads spin between the many small regions of a step. Beside one busy process that makes
# a step 4 to 8 times slower; with this bound 2 times. An idle machine loses at most a fifth.
os.environ.setdefault('GOMP_SPINCOUNT', '1000')

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from compress import Compression, num_keep, patches_per_side, sample_cost
from eval import Setting, can_score, positive, say, scores_of
from gradstats import adam_scale, flat_gradient, gradient_stats, unchanged
from images.data import DATASETS, STOPS, batch_keys, load
from images.views import keyed_generator, make_view, normalize, recipe
from losses import DINO, MoCo, SimCLR, mean_over_ranks
from schedule import Schedule, cosine, polynomial, ramp, warmup
from vit import SIZES, Block, ViT, load_backbone, read

# What the three methods do differently: their papers' constants, but for sizes, batch, learning
# rate and much of DINO, which are ours for small images and short runs. DINO needs no large batch,
# since its loss is not contrastive, but many steps, since its teacher moves little at each. Its
# own temperature 0.1 and center momentum 0.9 may collapse here (see dino_loss), and of its local
# crops little is left: one has 16 patches at 32 px, and 2 tokens under p8-drop0.50.
METHODS = dict(
    moco=dict(out_dim=256, temperature=0.2, momentum=0.99, batch_size=128, lr=2e-3),
    simclr=dict(out_dim=256, temperature=0.1, momentum=0.0, batch_size=128, lr=4e-3),
    dino=dict(out_dim=1024, temperature=0.4, momentum=0.98, batch_size=32, lr=2e-3),
)
WEIGHT_DECAY = dict(moco=(0.1, 0.1), simclr=(0.1, 0.1), dino=(0.04, 0.4))    # at start and end
ARCHS = dict(
    toy=dict(embed_dim=64, depth=4, num_heads=2),    # ours: minutes on a laptop
    **SIZES,
)
LOG_EVERY = 10                                       # steps
SAVE_EVERY = 0.05                                    # of the budget,
SAVE_MINUTES = 10                                    # and at least so often
GROUPS = 4                                           # of probe batches, for the error bars
LINES = ('log.jsonl', 'gradstats.jsonl')             # files that a run adds lines to


# ---------------------------------------------------------------- flags

def encoder_size(text):
    """'vit_base', or width, depth and heads: '768,12,12' -> sizes of the encoder"""
    if text in ARCHS:
        return ARCHS[text]
    embed_dim, depth, num_heads = map(int, text.split(','))
    return dict(embed_dim=embed_dim, depth=depth, num_heads=num_heads)


def points(text):
    """'0.05,0.5,1' -> points of progress"""
    return sorted(map(float, text.split(',')))


class Help(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    pass


def build_parser():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Help)
    add = parser.add_argument_group('data').add_argument
    add('--dataset', default='shapes', choices=DATASETS,
        help="shapes is rendered, folder is any tree of images, torchvision's are fetched")
    add('--data-root', default='data', help='folder of the data set')
    add('--img-size', type=positive(int), default=32, help='side of the views, px (paper: 224)')
    add('--local-crops', type=positive(int), default=0, help='number, of DINO alone (official: 8)')
    add('--crop-scale', type=positive(float), help='smallest area of a global crop')
    add('--jitter', type=float, default=1, help='factor on the strength of the colour jitter')
    add('--workers', type=int, default=2, help='loaders of each process, for images in files')

    add = parser.add_argument_group('encoder').add_argument
    add('--arch', type=encoder_size, default='toy',
        help=f'{", ".join(ARCHS)}, or WIDTH,DEPTH,HEADS (ViT-S of MoCo-v3: 384,12,12)')
    add('--patch-size', type=positive(int), default=4, help='px, uncompressed (paper: 16)')
    add('--freeze-patch-embed', action='store_true', help="MoCo-v3's stop-grad-conv1")
    add('--init', metavar='WEIGHTS', help='start from a backbone.pt, timm, MoCo-v3, DINO, MAE')

    add = parser.add_argument_group('objective').add_argument
    add('--method', default='moco', choices=METHODS, help='the defaults shown are those of moco')
    add('--hidden', type=positive(int), default=512, help='width of heads (MoCo-v3: 4096)')
    add('--out-dim', type=positive(int), help='outputs of the heads (DINO: 65536)')
    add('--temperature', type=positive(float), help="of the loss (DINO's student: 0.1)")
    add('--symmetric', action='store_true', help='MoCo-v3: both directions, twice the cost')
    add('--momentum', type=float, help='of the teacher at the start, 1 at the end')
    add('--center-momentum', type=float, default=0.5, help="of DINO's center (official: 0.9)")

    add = parser.add_argument_group('compression').add_argument
    add('--schedule', default='default',
        help='none, a strategy (p8-drop0.50), stages (p8@0,p4@0.7), or default: twice the patch '
             'size, half of the tokens')
    add('--views', default='full', choices=('full', 'small'),
        help='small: larger patches are rendered at the pixels that the encoder reads; faster')
    add('--drop-branch', default='query', choices=('query', 'both'),
        help='which branches drop tokens')
    add('--patch-branch', default='both', choices=('query', 'both'),
        help='which branches see larger patches; query: the key stays uncompressed')
    add('--budget', type=positive(float), default=0.16,
        help='millions of units (paper: 25 to 200, ImageNet-1k 300 to 6150)')

    add = parser.add_argument_group('gradient errors').add_argument
    add('--gradstats', type=points, default=[],
        metavar='P,P,...', help='measure them at these points of progress, outside the budget')
    add('--grid', metavar='TAU,TAU,...',
        help='strategies (default: 1, 2, 4 times the patch size, drop rates 0 and 0.5)')
    add('--probe-batches', type=positive(int), default=24, help='of a measurement, a multiple of 4')
    add('--metric', default='adam', choices=('euclidean', 'adam'),
        help='of the error; adam divides by the root of its second moment')

    add = parser.add_argument_group('optimization').add_argument
    add('--batch-size', type=positive(int), help='over all processes (MoCo-v3: 4096)')
    add('--lr', type=positive(float), help='peak, per 256 images (MoCo-v3: 1.5e-4, DINO: 5e-4)')
    add('--lr-schedule', default='cosine', choices=('cosine', 'polynomial'),
        help='polynomial: 1 - progress^2')
    add('--warmup', type=float, default=0.1, help='progress over which the rate rises')

    add = parser.add_argument_group('run').add_argument
    add('--name', help='folder below runs/')
    add('--seed', type=int, default=0, help='of weights, data order, views and token draws')
    add('--device', default='auto', choices=('auto', 'cpu', 'cuda'), help='of training')
    add('--compile', action='store_true', help='torch.compile the blocks')
    add('--eval-every', type=float, default=0.25, help='progress between scores; 0: none')
    add('--resume', metavar='RUN', help='folder of a run; auto: that of --name, if it exists')
    parser.set_defaults(**METHODS['moco'])
    return parser


def parse_args(argv=None):
    """(flags, checkpoint to go on from or None).

    The defaults follow --method. Those of a resumed run are the flags that it had.
    """
    parser = build_parser()
    args = parser.parse_args(argv)
    folder = Path('runs') / (args.name or '')
    exists = args.name and (folder / 'checkpoint.pt').exists()
    if args.resume == 'auto':
        if not args.name:
            raise ValueError('--resume auto goes on with the run of --name; give a --name')
        args.resume = str(folder) if exists else None
    elif exists and not args.resume:
        raise ValueError(f'{folder} exists; choose another --name, or add --resume auto')
    checkpoint = read(Path(args.resume) / 'checkpoint.pt') if args.resume else None
    parser.set_defaults(**(checkpoint['args'] if checkpoint else METHODS[args.method]))
    resume = args.resume
    args = parser.parse_args(argv)
    args.resume = resume
    if args.probe_batches % GROUPS:
        raise ValueError(f'--probe-batches {args.probe_batches} must be a multiple of {GROUPS}')
    if args.metric == 'adam' and 0 in args.gradstats:
        raise ValueError('Adam has no second moment at progress 0; start --gradstats later, or '
                         'take --metric euclidean')
    if not all(0 <= p <= 1 for p in args.gradstats) or not 0 <= args.warmup < 1:
        raise ValueError(f'--gradstats {args.gradstats} and --warmup {args.warmup} are progress: '
                         f'from 0 to 1, a warmup below 1')
    if args.local_crops and args.method != 'dino' or args.symmetric and args.method != 'moco':
        raise ValueError('--local-crops needs --method dino, --symmetric needs moco')
    return args, checkpoint


# ---------------------------------------------------------------- what is built from flags

def build_encoder(args, in_chans):
    """The encoder of the flags, or the one in --init, which must have the sizes of the flags."""
    config = dict(img_size=args.img_size, patch_size=args.patch_size, in_chans=in_chans,
                  freeze_patch_embed=args.freeze_patch_embed, **args.arch)
    if not args.init:
        return ViT(**config)
    # a resumed run reads its own backbone, since the file of --init may be gone
    weights = Path(args.resume) / 'backbone.pt' if args.resume else args.init
    encoder, _ = load_backbone(weights, args.arch['num_heads'])
    wrong = [f'{name} {encoder.config[name]}, not {config[name]}' for name in config
             if name != 'freeze_patch_embed' and encoder.config[name] != config[name]]
    if wrong:
        raise ValueError(f'--init {args.init} has {", ".join(wrong)}; set the flags of the encoder '
                         f'to the sizes of the weights')
    encoder.config['freeze_patch_embed'] = args.freeze_patch_embed
    encoder.patch_embed.requires_grad_(not args.freeze_patch_embed)
    return encoder


def build_method(args, encoder):
    common = dict(hidden=args.hidden, out_dim=args.out_dim, drop_branch=args.drop_branch,
                  patch_branch=args.patch_branch)
    if args.method == 'moco':
        return MoCo(encoder, temperature=args.temperature, symmetric=args.symmetric, **common)
    if args.method == 'simclr':
        return SimCLR(encoder, temperature=args.temperature, **common)
    return DINO(encoder, student_temp=args.temperature, local_crops=args.local_crops,
                center_momentum=args.center_momentum, **common)


def build_recipe(args):
    """The Augmentations of the method, at the nominal sides."""
    kinds = []
    for i, kind in enumerate(recipe(args.method, args.img_size, args.local_crops)):
        jitter = tuple(args.jitter * strength for strength in kind.jitter)
        kind = dataclasses.replace(kind, jitter=jitter)
        if args.crop_scale and i < 2:                # the global crops
            kind = dataclasses.replace(kind, scale=(args.crop_scale, 1.0))
        kinds.append(kind)
    return kinds


def build_optimizer(method, args):
    """AdamW. MoCo-v3 decays every parameter, DINO and SimCLR all but biases and norms."""
    decayed = []
    plain = []
    for parameter in method.parameters():
        if parameter.requires_grad:
            decays = args.method == 'moco' or parameter.ndim > 1
            (decayed if decays else plain).append(parameter)
    groups = [dict(params=decayed, decays=True)]
    if plain:
        groups.append(dict(params=plain, decays=False))
    return torch.optim.AdamW(groups, fused=True)


def build_schedule(args):
    """The compression over progress; by default half of the tokens of twice the patch size."""
    p = args.patch_size
    larger = min(2 * p, args.img_size)
    short = dict(none=f'p{p}', default=f'p{larger}-drop0.50')
    return Schedule.parse(short.get(args.schedule, args.schedule))


def build_grid(args):
    """The uncompressed strategy, and those whose gradient is measured beside it."""
    sizes = [times * args.patch_size for times in (1, 2, 4)]
    grid = [Compression(p, rate) for p in sizes if p <= args.img_size for rate in (0.0, 0.5)]
    if args.grid:
        grid = [Compression.parse(text) for text in args.grid.split(',')]
    return list(dict.fromkeys([Compression(args.patch_size), *grid]))


def renders_small(args, strategy):
    """Whether views are rendered at the pixels that the encoder reads of the larger patches."""
    larger = strategy.patch_size > args.patch_size
    return larger and args.views == 'small' and args.patch_branch == 'both'


def augmentations(args, kinds, strategy):
    """The recipe at the resolution of a strategy; for an uncompressed key, at that of the key."""
    p = args.patch_size if args.patch_branch == 'query' else strategy.patch_size
    patches = (p, args.patch_size) if renders_small(args, strategy) else (1, 1)
    sides = [patches_per_side(kind.side, p) * p for kind in kinds]
    return [kind.at(side, patches) for kind, side in zip(kinds, sides)]


# ---------------------------------------------------------------- the life of a run

@dataclass
class State:
    """How far a run has come. With weights and optimizer it is all that --resume needs."""
    step: int = 0
    units: float = 0.0                               # spent of the budget
    seen: float = -1.0                               # progress whose events have been dealt with
    seconds: float = 0.0                             # spent on steps,
    waiting: float = 0.0                             # of which waiting for data
    warned: bool = False                             # that the features have collapsed


def join_processes(device):
    """(rank, number of processes) that torchrun gives; (0, 1) without it."""
    world = int(os.environ.get('WORLD_SIZE', 1))
    if world > 1:
        # DistributedDataParallel imports this module. If it did so after the group exists, the
        # threads of gloo could outlive the group and abort the process at exit
        import torch._dynamo  # noqa: F401
        # the others wait while the first one scores, for which NCCL's 10 minutes are short
        backend = 'nccl' if device.type == 'cuda' else 'gloo'
        dist.init_process_group(backend, timeout=timedelta(hours=2))
    return int(os.environ.get('RANK', 0)), world


def pick_device(name):
    """The device of a flag. Under torchrun each process takes the GPU of its own number."""
    if name == 'cpu' or not torch.cuda.is_available() and name == 'auto':
        return torch.device('cpu')
    device = torch.device('cuda', int(os.environ.get('LOCAL_RANK', 0)))
    torch.cuda.set_device(device)
    return device


@contextlib.contextmanager
def stop_signals():
    """A list that receives the number of a signal to stop. A second signal ends the process.

    Not so under torchrun, which repeats a signal that a terminal has already sent to all.
    """
    received = []
    before = {}

    def receive(number, frame):
        received.append(number)
        if 'TORCHELASTIC_RUN_ID' not in os.environ:
            for number, handler in before.items():
                signal.signal(number, handler)

    if threading.current_thread() is threading.main_thread():
        for number in STOPS:
            if signal.getsignal(number) is not signal.SIG_IGN:       # nohup ignores SIGHUP
                before[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def save(value, path):
    """torch.save under a temporary name, then renamed: a crash leaves the old file whole."""
    partial = Path(f'{path}.partial')
    try:
        torch.save(value, partial)
        partial.replace(path)
    except (OSError, RuntimeError) as error:             # a full disk
        partial.unlink(missing_ok=True)
        raise OSError(f'{path} cannot be written: {error}') from None


def append(path, line):
    with open(path, 'a') as file:
        file.write(json.dumps(line) + '\n')


def collapse(metrics, outputs):
    """Plain words when the features say nothing about the images any more, or None."""
    if metrics['feature_spread'] < 0.01:
        return ('all images have nearly the same feature (spread below 0.01): collapsed. '
                'Lower --lr, lengthen --warmup, or --freeze-patch-embed')
    entropy = metrics.get('teacher_entropy')             # of DINO alone
    if entropy is None:
        return None
    if entropy > 0.999 * math.log(outputs):
        return ("the teacher's outputs are uniform: collapsed. Raise --temperature (of the "
                "student), or lower --lr")
    if entropy < 0.01:
        return 'the teacher gives every image one and the same output: collapsed. Lower --lr'
    if abs(metrics['positive_similarity'] - metrics['negative_similarity']) < 1e-3:
        return ('the outputs of all images move together: collapsed. Lower --center-momentum, or '
                'raise --momentum (of the teacher)')
    return None


# ---------------------------------------------------------------- set-up

def set_up(args, checkpoint=None):
    """All that a run needs, as one plain object, made in causal order."""
    run = SimpleNamespace(args=args, state=State(), budget=1e6 * args.budget)
    if checkpoint:                                   # other threads would give other bits
        torch.set_num_threads(checkpoint['threads'])
    run.device = pick_device(args.device)
    run.rank, run.world = join_processes(run.device)
    if args.batch_size % run.world or args.batch_size // run.world < 2:
        raise ValueError(f'batch size {args.batch_size} is not a multiple of {run.world} processes '
                         f'with at least 2 images each')
    if run.rank:
        dist.barrier()                               # the first process may fetch the data
    speaks = say if run.rank == 0 else lambda text: None
    run.data = load(args.dataset, args.data_root, speaks)
    if run.world > 1 and run.rank == 0:
        dist.barrier()
    run.data.say = say                               # each process names the files that it met

    # the network, and what a training sample costs under each strategy
    torch.manual_seed(args.seed)
    run.method = build_method(args, build_encoder(args, run.data.channels))
    run.kinds = build_recipe(args)
    run.schedule = build_schedule(args)
    run.base = Compression(args.patch_size)
    run.grid = build_grid(args)
    used = [*run.grid, *(tau for _, tau in run.schedule.stages)]
    run.cost = {tau: sample_cost(run.method, augmentations(args, run.kinds, tau), tau)
                for tau in used}
    if run.budget < run.cost[run.schedule.at(0)] * args.batch_size:
        raise ValueError(f'{run.budget:,.0f} units do not pay for a batch of {args.batch_size}; '
                         f'raise --budget or lower --batch-size')

    # onto the device, and across processes
    method = run.method.to(run.device)
    if args.compile:
        torch._dynamo.config.recompile_limit = 64    # one graph per sequence length and branch
        for module in method.modules():
            if isinstance(module, Block):
                module.compile(dynamic=False)
    run.model = method
    if run.world > 1:
        if run.device.type == 'cuda':                # on the CPU each has its own statistics
            nn.SyncBatchNorm.convert_sync_batchnorm(method)
        run.model = DistributedDataParallel(method)
    run.optimizer = build_optimizer(method, args)
    run.parameters = [p for p in method.parameters() if p.requires_grad]
    run.half = run.device.type == 'cuda' and torch.cuda.is_bf16_supported(
        including_emulation=False)

    # where a checkpoint left off
    run.identity = dict(
        method=args.method,
        hidden=args.hidden,
        out_dim=args.out_dim,
        processes=run.world,
        images=f'{len(run.data):,} ({run.data.fingerprint})',
        **method.encoder.config)
    if checkpoint:
        restore(run, checkpoint)
    step = torch.tensor(float(run.state.step), device=run.device)
    if mean_over_ranks(step).item() != run.state.step:
        raise ValueError(f'process {run.rank} is at step {run.state.step}, another is not: to go '
                         f'on, the folder of the run must be on a disk that all processes share')
    run.keys = batch_keys(
        len(run.data),
        args.batch_size,
        args.seed,
        run.state.step,
        run.rank,
        run.world)
    run.folder = Path(args.resume) if checkpoint else new_folder(args)
    if run.rank == 0:
        run.folder.mkdir(parents=True, exist_ok=True)
        (run.folder / 'args.json').write_text(json.dumps(vars(args), indent=1))
        for name in LINES:                           # forget what is going to be written again
            length = checkpoint['lengths'][name] if checkpoint else 0
            with open(run.folder / name, 'a') as file:
                file.truncate(length)
    return run


def restore(run, checkpoint):
    for name, now in run.identity.items():
        then = checkpoint['identity'][name]
        if then != now:
            raise ValueError(f'the run had {name} {then}, now it is {now}: resume with the '
                             f'original data, processes and encoder')
    run.method.load_state_dict(checkpoint['method'])
    run.optimizer.load_state_dict(checkpoint['optimizer'])
    run.state = State(**checkpoint['state'])


def new_folder(args):
    if args.name:
        return Path('runs') / args.name              # a run that never saved starts again in it
    folders = (Path('runs') / f'{args.method}-{args.dataset}-{i}' for i in itertools.count())
    return next(folder for folder in folders if not folder.exists())


def announce(run):
    """What the run is going to do: sizes, tokens, costs, samples and steps."""
    args = run.args
    say(f'run       {run.folder}   {run.device}, {run.world} process{"es" * (run.world > 1)}, '
        f'{torch.get_num_threads()} thread{"s" * (torch.get_num_threads() > 1)}, '
        f'{"bfloat16" if run.half else "float32"}, seed {args.seed}, torch {torch.__version__}')
    if run.state.step:
        say(f'          goes on at step {run.state.step:,}, {percent(run)} of the budget')
        return
    parameters = sum(p.numel() for p in run.method.encoder.parameters())
    say(f'encoder   {parameters:,} parameters, patch size {args.patch_size}; peak learning rate '
        f'{args.lr * args.batch_size / 256:.2e} = {args.lr:g} x {args.batch_size} / 256')
    samples = 0.0
    for start, end, tau in run.schedule.spans():
        share = (end - start) * run.budget / run.cost[tau]
        samples += share
        say(f'schedule  {100 * start:3.0f} to {100 * end:3.0f} %: {str(tau):12} '
            f'{tokens_of(args, tau)} tokens, {run.cost[tau]:.3f} units a sample, '
            f'{share / args.batch_size:,.0f} steps')
    say(f'budget    {run.budget:,.0f} units: {samples / len(run.data):.2f} epochs of '
        f'{len(run.data):,} images; uncompressed '
        f'{run.budget / run.cost[run.base] / len(run.data):.2f}')
    chance = run.method.chance_loss(args.batch_size)
    say(f'loss      {chance:.3f} is chance: all features equal, or uniform outputs')
    if not can_score(run.data):
        say('score     none: it needs two classes and 20 labelled training images')


def progress_of(run):
    """The clock of every schedule. The last step may spend a little more than the budget."""
    return min(1.0, run.state.units / run.budget)


def percent(run):
    return f'{100 * progress_of(run):.0f} %'


def tokens_of(args, strategy):
    """Tokens of the query, with the class token, as the paper counts."""
    n = patches_per_side(args.img_size, strategy.patch_size) ** 2
    return 1 + num_keep(n, strategy.drop_rate)


# ---------------------------------------------------------------- the parts of a step

def set_curves(run, progress):
    """What runs on progress besides the compression. Returns learning rate and momentum."""
    args = run.args
    decay = dict(cosine=cosine, polynomial=polynomial)[args.lr_schedule]
    after_warmup = max(0, progress - args.warmup) / (1 - args.warmup)
    peak = args.lr * args.batch_size / 256
    lr = peak * warmup(progress, args.warmup) * decay(after_warmup)
    weight_decay = ramp(*WEIGHT_DECAY[args.method], progress)
    for group in run.optimizer.param_groups:
        group['lr'] = lr
        group['weight_decay'] = weight_decay if group['decays'] else 0.0
    if args.method == 'dino':
        run.method.set_progress(progress)            # teacher's temperature, last layer
    return lr, ramp(args.momentum, 1.0, progress)


def upcoming(run):
    """(keys of the images, Augmentations) of each step from here on: loader workers run ahead."""
    units = run.state.units
    for batch in run.keys:
        strategy = run.schedule.at(min(1.0, units / run.budget))
        yield batch, augmentations(run.args, run.kinds, strategy)
        units += run.cost[strategy] * run.args.batch_size


def views_of(run, images, strategy, *key):
    """Normalized views of a batch; the key, such as the step, fixes crops and colours."""
    views = []
    for i, kind in enumerate(augmentations(run.args, run.kinds, strategy)):
        generator = keyed_generator(run.args.seed, run.rank, *key, i)
        pixels = images[i].to(run.device, non_blocking=True)
        view = make_view(pixels, kind, generator, run.data.cropped)
        views.append(normalize(view, run.data.mean, run.data.std))
    return views


def loss_of(run, model, views, strategy, *key):
    """(loss, metrics) of views under a strategy; the key fixes the tokens that are dropped."""
    patch_size = strategy.patch_size
    if patch_size == run.args.patch_size or renders_small(run.args, strategy):
        patch_size = None                            # the views have the pixels that are read
    generator = keyed_generator(run.args.seed, run.rank, *key, 'tokens', device=run.device)
    with torch.autocast('cuda', torch.bfloat16, enabled=run.half):
        return model(views, patch_size, strategy.drop_rate, generator)


# ---------------------------------------------------------------- now and then

def log(run, loss, metrics, strategy, lr, momentum):
    """A line of log.jsonl."""
    state = run.state
    if not math.isfinite(loss):
        raise FloatingPointError(f'the loss is {loss} at step {state.step}; checkpoint.pt is of an '
                                 f'earlier step. Start again with a lower --lr (now '
                                 f'{run.args.lr:g}), a longer --warmup or --freeze-patch-embed')
    if run.rank:
        return
    metrics = {name: float(value) for name, value in metrics.items()}
    append(run.folder / 'log.jsonl', dict(
        step=state.step,
        progress=progress_of(run),
        units=state.units,
        loss=loss,
        lr=lr,
        momentum=momentum,
        strategy=str(strategy),
        tokens=tokens_of(run.args, strategy),
        seconds=state.seconds,
        waiting=state.waiting,
        **metrics))
    warning = state.step >= 50 and not state.warned and collapse(metrics, run.args.out_dim)
    if warning:
        state.warned = True
        say(f'warning: step {state.step}: {warning}')
    speed = state.units / max(state.seconds, 1e-9)
    left = tqdm.format_interval(max(0, (run.budget - state.units) / speed))
    text = f'loss {loss:.3f}  {strategy}  {speed:,.0f} units/s  {left} left'
    run.bar.set_postfix_str(text, refresh=False)
    run.bar.update(100 * progress_of(run) - run.bar.n)
    if run.bar.disable and time.perf_counter() - run.said > 60:      # in a file, a line a minute
        run.said = time.perf_counter()
        say(f'{percent(run):>5}  {text}')


def score(run):
    """Nearest neighbours among uncompressed features. The others wait for the main process."""
    args, data, state = run.args, run.data, run.state
    setting = Setting(
        args.img_size,
        args.patch_size,
        data.mean,
        data.std,
        run.device,
        args.workers)
    nearest, vote = scores_of(run.method.encoder, data, setting, ('nn', 'knn'), 10_000, 5_000)
    append(run.folder / 'log.jsonl', dict(
        step=state.step,
        progress=progress_of(run),
        units=state.units,
        seconds=state.seconds,
        nn=nearest['score'],
        knn=vote['score'],
        bank=vote['bank'],
        queries=vote['queries']))
    when = f'{percent(run)} of the budget' if state.step else 'random network'
    say(f'{when}: {vote["score"]:.2f} % 20-NN, {nearest["score"]:.2f} % NN, uncompressed, '
        f'{vote["bank"]} bank and {vote["queries"]} test images, +- {vote["error"]:.1f}')


def measure(run, point):
    """Gradient errors here and now, as those of this point of progress; nothing changes."""
    args, state = run.args, run.state
    set_curves(run, progress_of(run))                # as for the next step, also after a resume
    share = args.batch_size // run.world

    def probes():
        """Random images of their own, each batch under every strategy before the next."""
        for i in range(args.probe_batches):
            generator = keyed_generator(args.seed, 'probe order', state.step, i)
            order = torch.randperm(len(run.data), generator=generator)
            mine = order[run.rank * share:(run.rank + 1) * share]
            keys = [(index, f'probe {state.step}') for index in mine.tolist()]
            for tau in run.grid:
                yield keys, augmentations(args, run.kinds, tau)

    batches = run.data.batches(probes(), args.seed, args.workers)

    def grad_fn(i, tau):
        images, _ = next(batches)
        key = ('probe', state.step, i)
        views = views_of(run, images, tau, *key)
        loss, _ = loss_of(run, run.method, views, tau, *key)
        return mean_over_ranks(flat_gradient(loss, run.parameters))

    scale = adam_scale(run.optimizer, run.parameters) if args.metric == 'adam' else None
    with unchanged(run.method):
        stats = gradient_stats(grad_fn, run.grid, run.base, range(args.probe_batches), GROUPS,
                               scale)
    if run.rank:
        return
    for tau, stat in stats.items():
        append(run.folder / 'gradstats.jsonl', dict(
            progress=point,
            strategy=str(tau),
            # of a batch; an uncompressed one costs 1 and pays for 1 / cost of these
            cost=run.cost[tau] / run.cost[run.base],
            **dataclasses.asdict(stat),
            metric=args.metric,
            method=args.method,
            batch_size=args.batch_size,
            step=state.step,
            units=state.units))


def save_run(run):
    if run.rank:
        return
    if not all(parameter.isfinite().all() for parameter in run.method.parameters()):
        raise FloatingPointError(f'a weight is not finite at step {run.state.step}; checkpoint.pt '
                                 f'is of an earlier step. Start again with a lower --lr')
    encoder, data, side = run.method.encoder, run.data, run.args.img_size
    backbone = dict(
        model=encoder.state_dict(),
        config=encoder.config,
        mean=data.mean,
        std=data.std,
        dataset=data.name,
        transform=data.transform(side, side))
    checkpoint = dict(
        args=dict(vars(run.args), resume=None),
        state=dataclasses.asdict(run.state),
        identity=run.identity,
        method=run.method.state_dict(),
        optimizer=run.optimizer.state_dict(),
        lengths={name: (run.folder / name).stat().st_size for name in LINES},
        threads=torch.get_num_threads())
    # the backbone first: a run whose last checkpoint is there has its backbone too
    save(backbone, run.folder / 'backbone.pt')
    save(checkpoint, run.folder / 'checkpoint.pt')


def now_and_then(run, stopping=False):
    """Scores, gradient errors and checkpoints that are due. A stop leaves the rest to --resume."""
    args, state = run.args, run.state
    progress = progress_of(run)

    def due(every):
        """Whether a multiple of it, or the end, has been reached since the last time."""
        return progress // every > state.seen // every or state.seen < progress == 1

    late = time.perf_counter() - run.saved_at > 60 * SAVE_MINUTES
    saving = stopping or late or state.step and due(SAVE_EVERY)
    if not stopping:
        # can_score goes through all labels, so it is asked last
        scoring = args.eval_every and due(args.eval_every) and can_score(run.data)
        measuring = [point for point in args.gradstats if state.seen < point <= progress]
        if state.step and (scoring or measuring):    # this may take long, and be killed
            save_run(run)
        if scoring and run.rank == 0:
            score(run)
        for point in measuring:
            measure(run, point)
        state.seen = progress
        saving = saving or measuring
    if saving:
        save_run(run)
        run.saved_at = time.perf_counter()


def any_process(run, received):
    """Whether one of the processes has received a signal."""
    if run.world == 1:
        return bool(received)
    count = torch.tensor(float(len(received)), device=run.device)
    return mean_over_ranks(count).item() > 0


# ---------------------------------------------------------------- the loop

def train(run):
    """Spends the budget, or stops at a signal. True if it came to the end."""
    args, state, method, optimizer = run.args, run.state, run.method, run.optimizer
    batches = run.data.batches(upcoming(run), args.seed, args.workers)
    run.said = run.saved_at = time.perf_counter()
    run.bar = tqdm(total=100, disable=None if run.rank == 0 else True, ncols=80,
                   bar_format='{percentage:3.0f}% |{bar:8}| {postfix}')
    with stop_signals() as received:
        stopping = False
        now_and_then(run)
        while state.units < run.budget and not stopping:
            start = time.perf_counter()
            progress = state.units / run.budget             # the clock of every schedule
            strategy = run.schedule.at(progress)            # how much to compress now
            lr, momentum = set_curves(run, progress)

            # ---- one step
            images, _ = next(batches)
            state.waiting += time.perf_counter() - start
            views = views_of(run, images, strategy, state.step)
            loss, metrics = loss_of(run, run.model, views, strategy, state.step)
            optimizer.zero_grad()
            loss.backward()
            if args.method == 'dino':
                method.before_step()                        # clip, let the last layer rest
            optimizer.step()                                # the gradient moves the student
            method.update_teacher(momentum)                 # the student moves the teacher

            # ---- the budget pays
            state.step += 1
            state.units += run.cost[strategy] * args.batch_size
            looking = state.step % LOG_EVERY == 0 or state.units >= run.budget
            if looking:                                     # here alone we wait for a GPU,
                loss = mean_over_ranks(loss.detach()).item()
            state.seconds += time.perf_counter() - start    # hence before the clock

            # ---- now and then: look, agree to stop, score, measure, save
            if looking:
                log(run, loss, metrics, strategy, lr, momentum)
            if looking or run.world == 1:                   # processes stop at the same step
                stopping = any_process(run, received) and state.units < run.budget
            now_and_then(run, stopping)
    run.bar.close()
    return not stopping


def last_words(run, finished):
    """What was done in which time, and the command that goes on from here."""
    state = run.state
    if not finished:
        launch = 'python' if run.world == 1 else f'torchrun --nproc_per_node {run.world}'
        say(f'stopped at step {state.step}, {percent(run)} of the budget; go on with {launch} '
            f'train.py --resume {shlex.quote(str(run.folder))}')
        return
    say(f'{state.step:,} steps for {state.units:,.0f} units in {state.seconds:.0f} s, '
        f'{100 * state.waiting / max(state.seconds, 1e-9):.0f} % of them waiting for data')
    weights = shlex.quote(str(run.folder / 'backbone.pt'))
    root = f' --data-root {shlex.quote(run.args.data_root)}' if run.args.data_root != 'data' else ''
    export = '' if can_score(run.data) else ' --export features.npz'
    say(f'python eval.py --weights {weights}{root}{export}')


def main(argv=None):
    args, checkpoint = parse_args(argv)
    run = set_up(args, checkpoint)
    if run.state.units >= run.budget and run.state.seen == 1:    # its last score is there
        say(f'{run.folder} is finished')
        return
    if run.rank == 0:
        announce(run)
    finished = train(run)
    if run.world > 1:
        dist.barrier()                               # nobody leaves while another listens
        dist.destroy_process_group()                 # not after an error: it waits for the others
    if run.rank == 0:
        last_words(run, finished)


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f'train.py: error: {error}')
