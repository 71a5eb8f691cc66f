"""Pretrain a ViT with a compressed token sequence.

    python train.py                                                  # rendered images, CPU, 2 to 3 minutes
    python train.py --dataset fashion_mnist --data-root data --download
    python train.py --gradstats 0.05,0.5,1 --metric adam --schedule none  # how wrong is each strategy's gradient, and when
    torchrun --nproc_per_node 8 train.py --dataset folder --data-root imagenet --img-size 240 --patch-size 16 \\
        --arch vit_small --schedule p48@0,p30@0.3,p24@0.5,p20@0.7,p16@0.85 --budget 100 ...   (whole in the README)

The clock of a run is its budget in units, a unit being the cost of one uncompressed training sample. A sample
under compression tau spends c(tau) units (compress.sample_cost); the run ends when the budget is spent, and every
schedule (learning rate, momentum, weight decay, teacher temperature, compression) runs on spent / budget.

--schedule auto needs no pilot run: at a few moments it measures the gradient error of each strategy
where the run then is (gradstats.py), solves (schedule.py), and goes on with the best. The measuring is paid from the budget.
"""
import argparse
import contextlib
import dataclasses
import json
import math
import os
import statistics
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

import data as datasets
import losses
import vit
from compress import Compression, forward_flops, local_side, num_keep, sample_cost, training_flops
from eval import Formatter, exit_with, join_processes, knn_accuracy, pick_device, read_file
from gradstats import gradient_stats
from schedule import Schedule, cosine, errors_over_progress, polynomial, ramp, solve, warmup

# What the three papers do differently. Head sizes, batch sizes and learning rates are ours, for small images and short runs;
# the papers': MoCo-v3 --hidden 4096, DINO --hidden 2048 --out-dim 65536 --momentum 0.996 --batch-size 1024. DINO's loss is
# not contrastive and needs no large batch, but its teacher needs many steps to move: 32 images learn far more than 128.
METHOD_DEFAULTS = dict(
    moco=dict(out_dim=256, temperature=0.2, symmetric=False, momentum=0.99, weight_decay=0.1, weight_decay_end=0.1,
              clip_grad=0.0, batch_size=128, lr=4e-3),
    simclr=dict(out_dim=256, temperature=0.1, symmetric=True, momentum=0.0, weight_decay=0.1, weight_decay_end=0.1,
                clip_grad=0.0, batch_size=128, lr=4e-3),
    dino=dict(out_dim=1024, temperature=0.1, symmetric=True, momentum=0.98, weight_decay=0.04, weight_decay_end=0.4,
              clip_grad=3.0, batch_size=32, lr=2e-3),
)
STATE = ('method', 'optimizer', 'args', 'points', 'moments', 'world', 'images', 'stages', 'cost')  # and, of a checkpoint,
COUNTERS = ('step', 'units', 'samples', 'next_eval', 'next_save', 'seconds', 'seconds_data')
CHANGEABLE = {'resume', 'data_root', 'download', 'device', 'workers', 'compile', 'max_steps'}  # flags that a resumed run may set anew


# ---------------------------------------------------------------- arguments

def build_parser(method):
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False,
                                     formatter_class=lambda prog: Formatter(prog, max_help_position=28, width=110))
    g = parser.add_argument_group('data')
    g.add_argument('--dataset', default='shapes', choices=datasets.DATASETS, help='shapes is rendered, folder is any tree of images')
    g.add_argument('--data-root', default='data', help='folder of the data set')
    g.add_argument('--download', action='store_true', help='fetch the data set if it is absent')
    g.add_argument('--img-size', type=int, default=32, help='side of the views in pixels (paper: 240)')
    g.add_argument('--local-crops', type=int, default=4, help='DINO: number of local views (paper: 8)')
    g.add_argument('--local-size', type=int, default=16, help='DINO: side of the local views in pixels (paper: 96)')
    g.add_argument('--workers', type=int, default=2, help='loader processes (data set folder)')

    g = parser.add_argument_group('encoder')
    g.add_argument('--arch', choices=('vit_tiny', 'vit_small', 'vit_base'), help='instead of the three sizes below')
    g.add_argument('--embed-dim', type=int, default=64, help='width')
    g.add_argument('--depth', type=int, default=4, help='blocks')
    g.add_argument('--num-heads', type=int, help='default: width / 32; with --arch its own, 64 wide (MoCo-v3 ViT-S: 12)')
    g.add_argument('--patch-size', type=int, default=4, help='base patch side in pixels, of no compression (paper: 16)')
    g.add_argument('--pos-embed', default='sincos', choices=('sincos', 'learned'), help='sincos is fixed')
    g.add_argument('--freeze-patch-embed', action='store_true', help="MoCo-v3's stop-grad-conv1")

    g = parser.add_argument_group('objective')
    g.add_argument('--method', default='moco', choices=tuple(METHOD_DEFAULTS), help='the defaults shown are those of the method given')
    g.add_argument('--hidden', type=int, default=512, help='width of the hidden layers of the heads (MoCo-v3: 4096)')
    g.add_argument('--out-dim', type=int, help='outputs of the heads (DINO paper: 65536)')
    g.add_argument('--temperature', type=float, help='of the loss; DINO: of the student')
    g.add_argument('--symmetric', action=argparse.BooleanOptionalAction, help='both views are query, anchor or target once, instead of one')
    g.add_argument('--momentum', type=float, help='of the EMA teacher at the start; 1 at the end, by a cosine (MoCo-v3: 0.99, DINO: 0.996)')
    g.add_argument('--teacher-temp', type=float, nargs=2, default=[0.04, 0.07], help='DINO: at the start, and from 30 %% of progress on')
    g.add_argument('--freeze-last-layer', type=float, default=0.01, help='DINO: progress until which the last layer stays (paper: 1 of 100 epochs)')

    g = parser.add_argument_group('compression')
    g.add_argument('--schedule', default='auto', help='auto (measures on the way what to do), none, a strategy (p8-drop0.50), stages (p8@0,p4@0.7), or the JSON file of schedule.py')
    g.add_argument('--drop-branch', default='query', choices=('query', 'both'), help='who drops tokens: query, student or first view alone, or both')
    g.add_argument('--budget', type=float, default=0.04, help='millions of units (paper: 25 to 200)')
    g.add_argument('--epochs', type=float, help='instead of --budget: uncompressed epochs that cost the same')

    g.add_argument('--cost', default='analytic', choices=('analytic', 'measured'), help='of a sample: FLOPs, or the time of a step on this machine')

    g = parser.add_argument_group('gradient errors')
    g.add_argument('--gradstats', metavar='P,P,...', help='measure them at these progress points, beside the run: 0,0.25,0.5,0.75,1 (paper)')
    g.add_argument('--grid', metavar='TAU,TAU,...', help='strategies to measure (default: patch sizes up to 4 times the base one, drop rates 0 and 0.5)')
    g.add_argument('--probe-batches', type=int, default=24, help='batches per strategy and point, a multiple of 4')
    g.add_argument('--metric', nargs='+', choices=('euclidean', 'adam'), help="of the error (default: --gradstats euclidean, as the paper, auto adam: coordinates divided by sqrt of Adam's second moment); auto takes the first")
    g.add_argument('--horizon', type=float, default=1.0, help='auto: H in bias^2 + c variance / H')
    g.add_argument('--auto-share', type=float, default=0.05, help='auto: largest share of the budget spent on measuring')

    g = parser.add_argument_group('optimization')
    g.add_argument('--batch-size', type=int, help='images per step, over all processes (paper: 1024 to 4096)')
    g.add_argument('--lr', type=float, help='peak learning rate per 256 images (MoCo-v3: 1.5e-4, DINO: 5e-4)')
    g.add_argument('--lr-schedule', default='cosine', choices=('cosine', 'polynomial'), help='polynomial is 1 - p^2')
    g.add_argument('--warmup', type=float, default=0.1, help='progress over which the learning rate rises (MoCo-v3: 40 of 300 epochs)')
    g.add_argument('--weight-decay', type=float, help='at the start')
    g.add_argument('--weight-decay-end', type=float, help='at the end, by a cosine')
    g.add_argument('--clip-grad', type=float, help="largest norm of each parameter's gradient, 0: none (DINO: 3)")

    g = parser.add_argument_group('run')
    g.add_argument('--name', help='folder below runs/ (default: METHOD-DATASET-NUMBER)')
    g.add_argument('--seed', type=int, default=0, help='of weights, data order, views and token draws')
    g.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda', 'mps'), help='auto: cuda if there, else mps, else cpu')
    g.add_argument('--compile', action='store_true', help='torch.compile the blocks, once per sequence length')
    g.add_argument('--log-every', type=int, default=10, help='steps')
    g.add_argument('--eval-every', type=float, default=0.25, help='progress between nearest-neighbour scores')
    g.add_argument('--save-every', type=float, default=0.05, help='progress between checkpoints')
    g.add_argument('--max-steps', type=int, help='save and stop after this many steps of the run; --resume goes on')
    g.add_argument('--resume', metavar='RUN', help='folder of a run to go on with, under its own flags')
    parser.set_defaults(**METHOD_DEFAULTS[method])
    return parser


def parse_args(argv):
    """Flags, and the checkpoint of the run to resume (or None)."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument('--method', default='moco')
    method = first.parse_known_args(argv)[0].method
    parser = build_parser(method if method in METHOD_DEFAULTS else 'moco')
    args = parser.parse_args(argv)
    if args.resume is not None:
        checkpoint = load_checkpoint(Path(args.resume) / 'checkpoint.pt')
        saved, given = checkpoint['args'], {a.split('=')[0] for a in argv if a.startswith('--')}
        for action in parser._actions:
            name = action.dest
            if given & set(action.option_strings) and name not in CHANGEABLE and getattr(args, name) != saved[name]:
                raise ValueError(f'{action.option_strings[0]} {getattr(args, name)} is not what the run has, '
                                 f'{saved[name]}; a resumed run keeps its flags, leave it out or start a new run')
        given_names = {action.dest for action in parser._actions if given & set(action.option_strings)}
        changed = {name: getattr(args, name) for name in CHANGEABLE if name in given_names or name in ('resume', 'max_steps')}
        args = argparse.Namespace(**{**saved, **changed})
        check(args)
        return args, checkpoint
    check(args)
    return args, None


def check(args):
    """Numbers that no later code would refuse in a way that names the flag."""
    for name in ('img_size', 'patch_size', 'embed_dim', 'depth', 'hidden', 'out_dim', 'batch_size', 'lr', 'temperature',
                 'log_every', 'eval_every', 'save_every', 'local_size', 'budget', 'horizon', 'num_heads', 'epochs', 'max_steps'):
        value = getattr(args, name)
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f'--{name.replace("_", "-")} {value} must be above 0')
    for name in ('weight_decay', 'weight_decay_end', 'clip_grad', 'workers', 'local_crops', 'seed'):
        if not 0 <= getattr(args, name) < 2 ** 63:
            raise ValueError(f'--{name.replace("_", "-")} {getattr(args, name)} must be at least 0')
    for name in ('momentum', 'warmup', 'freeze_last_layer'):
        if not 0 <= getattr(args, name) < 1:
            raise ValueError(f'--{name.replace("_", "-")} {getattr(args, name)} is a fraction in [0, 1)')
    if not 0 < args.auto_share <= 0.5:
        raise ValueError(f'--auto-share {args.auto_share} is a fraction in (0, 0.5]')
    if args.probe_batches < 8 or args.probe_batches % 4:
        raise ValueError(f'--probe-batches {args.probe_batches} must be a multiple of 4, at least 8: four groups give the error bars')
    if min(args.teacher_temp) <= 0:
        raise ValueError(f'--teacher-temp {args.teacher_temp} must be above 0')


# ---------------------------------------------------------------- set-up

def build_method(args, encoder):
    common = dict(hidden=args.hidden, out_dim=args.out_dim, symmetric=args.symmetric, drop_branch=args.drop_branch)
    if args.method == 'moco':
        return losses.MoCo(encoder, temperature=args.temperature, **common)
    if args.method == 'simclr':
        return losses.SimCLR(encoder, temperature=args.temperature, **common)
    return losses.DINO(encoder, student_temp=args.temperature, local_crops=args.local_crops,
                       local_size=args.local_size, **common)


def build_encoder(args, in_chans):
    sizes = dict(img_size=args.img_size, patch_size=args.patch_size, in_chans=in_chans, pos_embed=args.pos_embed,
                 freeze_patch_embed=args.freeze_patch_embed)
    if args.arch:
        heads = dict(num_heads=args.num_heads) if args.num_heads else {}
        return getattr(vit, args.arch)(**sizes, **heads)
    heads = args.num_heads or max(1, args.embed_dim // 32)
    return vit.ViT(embed_dim=args.embed_dim, depth=args.depth, num_heads=heads, **sizes)


def larger_patches(args):
    """Patch sizes from the base one to four times it that divide the image."""
    return [p for p in range(args.patch_size, 4 * args.patch_size + 1) if args.img_size % p == 0 and p < args.img_size] or [args.patch_size]


def build_schedule(args):
    """The compression over progress, as a Schedule of Compression; for auto, what it begins with: about twice the patch
    size, half the tokens. Early on cheap strategies learn the most (paper), and the first measurement corrects it."""
    if args.schedule == 'none':
        return Schedule(((0.0, Compression(args.patch_size)),))
    if args.schedule == 'auto':
        twice = min(larger_patches(args), key=lambda p: abs(p - 2 * args.patch_size))
        return Schedule(((0.0, Compression(twice, 0.5 if twice < args.img_size else 0.0)),))
    if not args.schedule.endswith('.json'):
        return Schedule.parse(args.schedule).map(Compression.parse)
    path = Path(args.schedule)
    if not path.is_file():
        raise FileNotFoundError(f'no schedule at {path}; --schedule takes none, p8-drop0.50, p8@0,p4@0.7, auto or a JSON file')
    try:
        return Schedule.from_json(path.read_text()).map(Compression.parse)
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None


def build_grid(args):
    """The strategies whose gradient is measured, the base one first."""
    if args.grid:
        return list(dict.fromkeys([Compression(args.patch_size), *map(Compression.parse, args.grid.split(','))]))
    return [Compression(p, rate) for p in larger_patches(args) for rate in ((0.0, 0.5) if p < args.img_size else (0.0,))]


def plan_auto(args, grid, cost, budget):
    """When auto measures, and with how many batches: ([progress, ...], batches), within its share of the budget.

    Up to 5 moments of up to 32 batches, evenly spaced, fewer moments before fewer than 8 batches. One moment, half way, of
    at least 4, since two groups of two are the least that gives an error bar, or ([], 0) if the share does not pay for it.
    """
    affordable = int(args.auto_share * budget / (args.batch_size * sum(cost[c] for c in grid)))
    count = min(5, max(affordable // 8, affordable >= 4))
    batches = min(32, affordable // count // 2 * 2) if count else 0
    return [i / (count + 1) for i in range(1, count + 1)], batches


def build_optimizer(method, args, device):
    """AdamW; weight decay on every parameter for MoCo-v3, on all but biases and norms for DINO and SimCLR."""
    trainable = [p for p in method.parameters() if p.requires_grad]
    decayed = [p for p in trainable if args.method == 'moco' or p.ndim > 1]
    plain = [p for p in trainable if args.method != 'moco' and p.ndim <= 1]
    groups = [dict(params=decayed, decay=True)] + ([dict(params=plain, decay=False)] if plain else [])
    return torch.optim.AdamW(groups, fused=device.type in ('cuda', 'cpu'))


def clip_each(parameters, largest):
    """DINO clips the gradient of each parameter tensor by its own norm, not all by the global one."""
    grads = [p.grad for p in parameters if p.grad is not None]
    norms = torch.stack(torch._foreach_norm(grads))
    torch._foreach_mul_(grads, list((largest / (norms + 1e-6)).clamp(max=1).unbind()))


# ---------------------------------------------------------------- gradient errors

class Probe:
    """Gradients of the loss for gradstats, on batches, views and token draws of their own, that change no state."""

    def __init__(self, args, method, optimizer, data, views, sides, device, rank, world, autocast):
        self.args, self.method, self.optimizer, self.data = args, method, optimizer, data
        self.views, self.sides, self.device, self.rank, self.world, self.autocast = views, sides, device, rank, world, autocast
        self.trainable = [p for p in method.parameters() if p.requires_grad]

    def gradient(self, images, strategy, key):
        """Flat gradient over all trainable parameters, that of the joined batch of all processes."""
        generator = datasets.keyed_generator(self.args.seed, self.rank, 'probe', *key, device=self.device)
        views = datasets.make_views(images, self.views, self.sides(strategy), generator)
        views = [datasets.normalize(view, self.data.mean, self.data.std) for view in views]
        with self.autocast:
            loss, _ = self.method(views, strategy.patch_size, strategy.drop_rate, generator)
        gradients = torch.autograd.grad(loss, self.trainable)
        return losses.mean_over_ranks(torch.cat([g.flatten() for g in gradients]))

    def scale(self, metric):
        """What each coordinate is multiplied by: 1, or 1 / sqrt(v) of Adam, v the second moment of the gradients that
        it was given (DINO: clipped ones); 0 for parameters that have not moved yet (DINO's last layer)."""
        if metric == 'euclidean':
            return 1.0
        eps, beta2 = self.optimizer.defaults['eps'], self.optimizer.defaults['betas'][1]
        states = [(p, self.optimizer.state.get(p)) for p in self.trainable]
        return torch.cat([1 / ((s['exp_avg_sq'] / (1 - beta2 ** s['step'].to(self.device))).sqrt() + eps).flatten()
                          if s else torch.zeros_like(p).flatten() for p, s in states])

    def batches(self, count, step):
        """Random images, the same for every strategy: pairs (number, batch)."""
        share = self.args.batch_size // self.world
        keys = []
        for i in range(count):
            order = torch.randperm(len(self.data), generator=datasets.keyed_generator(self.args.seed, 'probe order', step, i))
            keys.append([(f'probe {step}', index) for index in order[self.rank * share:(self.rank + 1) * share].tolist()])
        return self.data.batches(keys, self.views, self.sides(Compression(self.args.patch_size)), self.args.seed, self.device, 0)

    @contextlib.contextmanager
    def no_trace(self):
        """Puts back what a forward pass changes: BatchNorm's buffers, DINO's center."""
        kept = [buffer.clone() for buffer in self.method.buffers()]
        yield
        for buffer, value in zip(self.method.buffers(), kept):
            buffer.copy_(value)
        if self.args.method == 'dino':
            self.method.batch_center = None

    def measure(self, grid, count, groups, step, metric):
        """{strategy: GradStats} against the base strategy."""
        batches, scale, current = self.batches(count, step), self.scale(metric), {}

        def grad_fn(i, strategy):
            if i not in current:
                current.clear()
                current[i] = next(batches)
            gradient = self.gradient(current[i], strategy, (step, i)) * scale
            return gradient.cpu() if self.device.type == 'mps' else gradient  # MPS has no float64
        with self.no_trace():
            return gradient_stats(grad_fn, grid, Compression(self.args.patch_size), range(count), groups)

    def seconds(self, grid, repeats=5):
        """{strategy: median seconds of a gradient}, measured in turns after a warm-up."""
        images, times = next(self.batches(1, 'cost')), {c: [] for c in grid}
        with self.no_trace():
            for i in range(repeats + 1):
                for c in grid:
                    start = time.perf_counter()
                    self.gradient(images, c, ('cost', i))[0].item()
                    times[c].append(time.perf_counter() - start)
        return {c: statistics.median(values[1:]) for c, values in times.items()}


# ---------------------------------------------------------------- files of a run

def save(value, path):
    """Write to a temporary name, flush, rename: a crash leaves the old file whole."""
    partial = Path(f'{path}.partial')
    with open(partial, 'wb') as file:
        if isinstance(value, str):
            file.write(value.encode())
        else:
            torch.save(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)


def load_checkpoint(path):
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint at {path}; --resume takes the folder of a run, such as runs/moco-shapes-0')
    checkpoint = read_file(path)
    if not isinstance(checkpoint, dict) or not {*STATE, *COUNTERS} <= set(checkpoint):
        raise ValueError(f'{path} is no checkpoint of a run; --resume takes the folder that train.py made')
    return checkpoint


def forget_after(path, step):
    """Drops what a resumed run does again: the lines of later steps, a line cut off by the crash, and the scores and
    gradient errors of this very step, which are taken before it."""
    if not path.exists():
        return
    kept = []
    for text in path.read_text().splitlines(True):
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            break
        if line['step'] < step or (line['step'] == step and 'loss' in line):
            kept.append(text)
    save(''.join(kept), path)


def refuse_existing(args):
    if args.name and (folder := Path('runs') / args.name).exists():
        raise FileExistsError(f'{folder} exists; choose another --name, or --resume {folder}')


def new_folder(args):
    if args.name:
        folder = Path('runs') / args.name
    else:
        folder = next(f for i in range(10**6) if not (f := Path('runs') / f'{args.method}-{args.dataset}-{i}').exists())
    folder.mkdir(parents=True)
    return folder


# ---------------------------------------------------------------- training

def collapse_warning(metrics, outputs):
    """Plain words when the features say nothing about the images any more, or None."""
    if metrics['feature_spread'] < 0.01:
        return ('all images have nearly the same feature (spread below 0.01): collapsed. Lower --lr, lengthen --warmup, '
                'or --freeze-patch-embed')
    if 'teacher_entropy' in metrics and metrics['teacher_entropy'] > 0.999 * math.log(outputs):
        return "the teacher's outputs are uniform: collapsed. Lower --teacher-temp"
    if 'teacher_entropy' in metrics and metrics['teacher_entropy'] < 0.01:
        return 'the teacher gives every image one and the same output with certainty: collapsed. Raise --teacher-temp'
    return None


def choose(schedule, rows, progress, horizon):
    """The schedule so far and, from `progress` on, the strategy with the lowest CA-MSE, ties to the cheaper; but the one
    in use stays until it is two standard errors behind: a few batches err, and a wrong change costs more than a late one."""
    rows = [{**row, 'norm2': 1.0, 'norm2_sem': 0.0} for row in rows]  # at one progress the scale, the noisiest number, does not matter
    errors = {strategy: column[0] for strategy, column in errors_over_progress(rows, horizon)[1].items()}
    lowest, error = min(errors.values())
    now, now_error = errors.get(str(schedule.stages[-1][1]), (math.inf, 0.0))
    if now - lowest <= 2 * math.hypot(now_error, error):
        return schedule
    return Schedule((*schedule.stages, (progress, Compression.parse(solve(rows, horizon=horizon).at(0)))))


def train(args, checkpoint):
    # ---- processes and device
    distributed = 'WORLD_SIZE' in os.environ
    rank, world = int(os.environ.get('RANK', 0)), int(os.environ.get('WORLD_SIZE', 1))
    device = pick_device(args.device)
    if not checkpoint:
        refuse_existing(args)  # in every process, before they wait for each other
    if distributed:
        join_processes(device)
    if args.batch_size % world or args.batch_size // world < 2:
        raise ValueError(f'batch size {args.batch_size} cannot be shared by {world} process(es) as at least 2 images each; '
                         f'use a multiple of {world} from {2 * world} on')
    main_process = rank == 0
    say = print if main_process else (lambda *_, **__: None)
    torch.manual_seed(args.seed)

    # ---- data and views
    if distributed and args.download and rank:
        dist.barrier()  # one process fetches
    data = datasets.load(args.dataset, args.data_root, args.download)
    if distributed and args.download and not rank:
        dist.barrier()
    small = args.img_size < 64
    views = datasets.recipe(args.method, small, args.local_crops)
    scored = len(data.classes) > 1 and len(data.labelled_ids('train')) >= 20 and len(data.labelled_ids('test')) > 0

    # ---- encoder, objective, compression
    encoder = build_encoder(args, data.channels)
    method = build_method(args, encoder).to(device)
    base = Compression(args.patch_size)
    schedule, grid, auto = build_schedule(args), build_grid(args), args.schedule == 'auto'
    if checkpoint:
        if (checkpoint['world'], checkpoint['images']) != (world, len(data)):
            raise ValueError(f'the run had {checkpoint["world"]} process(es) and {checkpoint["images"]} images, now there are {world} and '
                             f'{len(data)}: it would be another run; resume it as it was')
        schedule = Schedule(tuple(checkpoint['stages'])).map(Compression.parse)  # auto's so far; a file may have changed since
    points = Schedule.points(args.gradstats) if args.gradstats is not None else []
    metrics_asked, auto_metric = list(dict.fromkeys(args.metric or ['euclidean'])), (args.metric or ['adam'])[0]
    if 'adam' in metrics_asked and 0 in points:
        raise ValueError('--metric adam: Adam has no second moment at progress 0; start --gradstats later')
    measured = grid if auto or points or args.grid else []
    used = list(dict.fromkeys([base, *measured, *(c for _, c in schedule.stages)]))
    for compression in used:
        encoder.grid(args.img_size, args.img_size, compression.patch_size)  # refuses a patch size that does not fit
    analytic = {c: sample_cost(args.method, encoder.sizes, c, base, **method.cost_settings) for c in used}
    budget = args.epochs * len(data) if args.epochs else args.budget * 1e6

    def sides(compression):
        local = local_side(args.local_size, compression.patch_size)
        return [local if view.local else args.img_size for view in views]

    # ---- optimizer, processes, precision
    optimizer = build_optimizer(method, args, device)
    peak_lr = args.lr * args.batch_size / 256
    decay_curve = dict(cosine=cosine, polynomial=polynomial)[args.lr_schedule]
    if args.compile:
        torch._dynamo.config.recompile_limit = 64  # one graph per sequence length and branch
        for module in method.modules():
            if isinstance(module, vit.Block):
                module.compile(dynamic=False)
    model = method
    if distributed:
        if device.type == 'cuda':
            method = nn.SyncBatchNorm.convert_sync_batchnorm(method)
        model = DistributedDataParallel(method, device_ids=[device.index] if device.type == 'cuda' else None)
    half = device.type == 'cuda' and torch.cuda.is_bf16_supported()
    autocast = torch.autocast('cuda', torch.bfloat16) if half else contextlib.nullcontext()

    keys = datasets.batch_keys(len(data), args.batch_size, args.seed, checkpoint['step'] if checkpoint else 0, rank, world)

    # ---- what a sample costs, when auto measures
    probe = Probe(args, method, optimizer, data, views, sides, device, rank, world, autocast)
    cost = analytic
    if checkpoint:
        cost = {c: checkpoint['cost'][str(c)] for c in used}
    elif args.cost == 'measured':
        timed = probe.seconds(used)
        cost = {c: losses.mean_over_ranks(torch.tensor(timed[c] / timed[base], device=device)).item() for c in used}
    planned, auto_batches = plan_auto(args, grid, cost, budget) if auto else ([], 0)
    moments = planned

    # ---- resume
    step, spent, samples, next_eval, next_save, seconds, seconds_data = 0, 0.0, 0, 0.0, args.save_every, 0.0, 0.0
    if checkpoint:
        method.load_state_dict(checkpoint['method'])
        optimizer.load_state_dict(checkpoint['optimizer'])
        step, spent, samples, next_eval, next_save, seconds, seconds_data = (checkpoint[key] for key in COUNTERS)
        points, moments = checkpoint['points'], checkpoint['moments']
        folder = Path(args.resume)
        if spent >= budget:
            raise ValueError(f'{folder} has spent its budget of {budget / 1e6:g}M units; start a new run for a longer one')
        if main_process:
            for name in ('log.jsonl', 'gradstats.jsonl'):
                forget_after(folder / name, step)
    else:
        folder = new_folder(args) if main_process else None

    # ---- what is going to happen
    unit = training_flops(args.method, encoder.sizes, base, **method.cost_settings)
    forward = sum(forward_flops(encoder.base_grid[0] * encoder.base_grid[1], encoder.embed_dim, encoder.sizes['depth'],
                                encoder.sizes['mlp_ratio'], data.channels * args.patch_size ** 2))
    say(f'run       {folder}   {device}, {world} process(es), {"bfloat16" if half else "float32"}, seed {args.seed}'
        + ('; gloo: BatchNorm statistics are per process' if distributed and device.type != 'cuda' else ''))
    say(f'data      {args.dataset}: {len(data):,} images, {data.channels} channel(s), {len(data.classes)} classes; '
        f'{len(views)} views of {args.img_size} px, {args.method} recipe{" for small images (no blur)" if small else ""}'
        + ('; grey images: no saturation, hue, grayscale' if data.channels == 1 else ''))
    say(f'encoder   {sum(p.numel() for p in encoder.parameters()):,} parameters, width {encoder.embed_dim}, depth '
        f'{encoder.sizes["depth"]}, {encoder.sizes["num_heads"]} heads, patch size {args.patch_size}, '
        f'{encoder.base_grid[0] * encoder.base_grid[1]} patches')
    say('cost      ' + ', '.join(f'{c} {cost[c]:.3f}' for c in sorted(used, key=cost.get)) + f' units per sample ({args.cost})')
    for c in {c for _, c in schedule.stages}:
        if cost[c] > 1:
            say(f'warning: {c} costs more than no compression, p{args.patch_size}; is --patch-size right?')
    say(f'budget    {budget:,.0f} units ({budget / len(data):.1f} uncompressed epochs; {budget * unit / forward / 1e6:.2f}M bare forward passes)')
    say(f'schedule  {schedule}')
    if moments:
        say(f'auto      measures {auto_batches} batches of each strategy at {", ".join(f"{100 * p:.0f} %" for p in moments)} of the budget, '
            f'in the {auto_metric} metric, and changes to a better one')
    elif auto and not checkpoint:
        say(f'auto      cannot measure: --auto-share {args.auto_share:g} of the budget does not pay for 4 batches of each of {len(grid)} '
            f'strategies, {4 * args.batch_size * sum(cost[c] for c in grid):,.0f} units; the schedule stays. Raise --budget or --auto-share')
    say(f'optimizer AdamW, peak learning rate {peak_lr:.2e} = {args.lr:g} x {args.batch_size} / 256, {args.lr_schedule}')
    say(f'loss      {method.chance_loss(args.batch_size):.3f} is chance: all features equal, or uniform outputs')
    if not scored:
        say('score     none: nearest neighbour needs labels (first-level folders) and at least 20 labelled training images')
    log = None
    if main_process:
        save(json.dumps(vars(args), indent=1), folder / 'args.json')
        log = open(folder / 'log.jsonl', 'a')

    def write(**line):
        if main_process:
            log.write(json.dumps(line) + '\n')
            log.flush()

    def state():
        counters = dict(zip(COUNTERS, (step, spent, samples, next_eval, next_save, seconds, seconds_data)))
        return dict(method=method.state_dict(), optimizer=optimizer.state_dict(), args=vars(args), points=points, moments=moments,
                    world=world, images=len(data), stages=[(start, str(c)) for start, c in schedule.stages], cost={str(c): value for c, value in cost.items()}, **counters)

    def save_run():
        if not all(torch.isfinite(p).all() for p in method.parameters()):
            stop('a weight is not finite', step, progress)
        if main_process:
            save(state(), folder / 'checkpoint.pt')
            save(dict(model=method.encoder.state_dict(), sizes=encoder.sizes, mean=data.mean, std=data.std,
                      dataset=args.dataset), folder / 'backbone.pt')

    def stop(what, step, progress):
        bar.close()
        if main_process:
            save(state(), folder / 'crash.pt')
        raise FloatingPointError(f'{what} at step {step}, progress {progress:.3f}; the state is saved as crash.pt to look at, and '
                                 f'checkpoint.pt, if there is one, is the last that was finite. Start again with a lower --lr (now '
                                 f'{args.lr:g}), a longer --warmup, --clip-grad 1 or --freeze-patch-embed')

    def measure(progress, grid, count, groups, metric):
        """Rows of gradstats.jsonl, one per strategy, appended to it."""
        stats = probe.measure(grid, count, groups, step, metric)
        rows = [dict(progress=progress, strategy=str(c), patch_size=c.patch_size, drop_rate=c.drop_rate, cost=cost[c],
                     cost_analytic=analytic[c], **dataclasses.asdict(s), metric=metric, method=args.method, symmetric=args.symmetric,
                     temperature=args.temperature, batch_size=args.batch_size, step=step, units=spent) for c, s in stats.items()]
        if not all(math.isfinite(value) for c in stats.values() for value in dataclasses.astuple(c)):
            stop('a gradient is not finite', step, progress)
        if main_process:
            with open(folder / 'gradstats.jsonl', 'a') as file:
                file.writelines(json.dumps(row) + '\n' for row in rows)
        return rows

    def score(when):
        if main_process and scored:  # the bare encoder, so that no other process is waited for
            scores, bank, queries = knn_accuracy(method.encoder, data, args.img_size, device, bank_limit=10_000,
                                                 query_limit=5_000, workers=args.workers)
            write(step=step, progress=spent / budget, units=spent, nn=scores[1], knn=scores[20])
            tqdm.write(f'{when}: {scores[20]:.2f} % 20-NN, {scores[1]:.2f} % NN, uncompressed, {bank} bank and {queries} test images')

    # ---- the loop
    bar = tqdm(total=round(budget), initial=round(spent), unit='unit', disable=not main_process, dynamic_ncols=True,
               bar_format='{percentage:3.0f}% |{bar:10}| {n_fmt}/{total_fmt} units, {elapsed}<{remaining} {postfix}')
    batches = data.batches(keys, views, sides(base), args.seed, device, args.workers)
    clock, warned = time.perf_counter(), set()
    while spent < budget:
        if spent / budget >= next_eval:
            score('random network' if step == 0 else f'{100 * spent / budget:.0f} % of the budget')
            while next_eval <= spent / budget:
                next_eval += args.eval_every
            clock = time.perf_counter()

        # schedules for this step
        progress = spent / budget
        lr = peak_lr * warmup(progress, args.warmup) * decay_curve(max(0, progress - args.warmup) / (1 - args.warmup))
        momentum = ramp(args.momentum, 1.0, progress)
        weight_decay = ramp(args.weight_decay, args.weight_decay_end, progress)
        for group in optimizer.param_groups:
            group['lr'], group['weight_decay'] = lr, weight_decay if group['decay'] else 0.0
        if args.method == 'dino':
            cold, warm = args.teacher_temp
            method.teacher_temp = cold + (warm - cold) * warmup(progress, 0.3)

        # gradient errors, where they are asked for
        if points and progress >= points[0]:
            for metric in metrics_asked:
                measure(points[0], grid, args.probe_batches, 4, metric)
            points = points[1:]
            clock = time.perf_counter()

        # compression for this step; auto measures where the run is now, and never goes back to a cheaper strategy
        if moments and progress >= moments[0]:
            first, now = moments[0] == planned[0], schedule.stages[-1][1]
            candidates = [c for c in grid if first or c == base or cost[c] >= cost[now]]
            moments = moments[1:]
            if len(candidates) > 1:  # else there is nothing to choose
                rows = measure(progress, candidates, auto_batches, 2, auto_metric)
                spent += auto_batches * args.batch_size * sum(cost[c] for c in candidates)
                chosen = choose(schedule, rows, progress, args.horizon)
                if first or cost[chosen.stages[-1][1]] >= cost[now]:
                    schedule = chosen
                if main_process:
                    verdict = (f'{now} stays: no cost-adjusted gradient error is two standard errors below its own' if schedule.at(progress) == now else
                               f'on with {schedule.at(progress)}, which has the lowest cost-adjusted gradient error, or is the cheapest within its error bar')
                    tqdm.write(f'{100 * progress:.0f} % of the budget: {verdict}')
                seconds, clock = seconds + time.perf_counter() - clock, time.perf_counter()
        compression = schedule.at(progress)

        # views
        generator = datasets.keyed_generator(args.seed, rank, step, device=device)
        images = datasets.make_views(next(batches), views, sides(compression), generator)
        images = [datasets.normalize(view, data.mean, data.std) for view in images]
        after_data = time.perf_counter()

        # loss
        with autocast:
            loss, metrics = model(images, compression.patch_size, compression.drop_rate, generator)
        mean_loss = losses.mean_over_ranks(loss.detach().clone()).item()
        if not math.isfinite(mean_loss):
            stop(f'the loss is {mean_loss}', step, progress)

        # backward and step
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if args.clip_grad:
            clip_each(probe.trainable, args.clip_grad)
        if args.method == 'dino' and progress < args.freeze_last_layer:
            method.student_head.last_layer.weight.grad = None  # neither moved nor decayed
        optimizer.step()

        # teacher
        method.update_teacher(momentum)
        step, samples, spent = step + 1, samples + args.batch_size, spent + cost[compression] * args.batch_size

        # log
        now = time.perf_counter()
        seconds, seconds_data = seconds + now - clock, seconds_data + after_data - clock
        bar.update(min(round(spent), bar.total) - bar.n)
        if step % args.log_every == 0 or spent >= budget:
            metrics = {key: float(value) for key, value in metrics.items()}
            patches = (args.img_size // compression.patch_size) ** 2
            write(step=step, progress=spent / budget, units=spent, samples=samples, loss=mean_loss, lr=lr, momentum=momentum,
                  patch_size=compression.patch_size, drop_rate=compression.drop_rate,
                  tokens=num_keep(patches, compression.drop_rate), seconds=seconds, seconds_data=seconds_data, **metrics)
            bar.set_postfix_str(f'loss {mean_loss:.3f}, lr {lr:.1e}, {compression}, {samples / seconds:.0f} img/s, '
                                f'data {100 * seconds_data / seconds:.0f} %', refresh=False)
            warning = collapse_warning(metrics, args.out_dim) if step >= 50 else None
            if warning is None and args.dataset == 'folder' and step >= 50 and seconds_data > 0.2 * seconds:
                warning = 'over 20 % of the time goes to the data; raise --workers, or store smaller files'
            if warning and warning not in warned:
                warned.add(warning)
                say(f'warning: step {step}: {warning}')
        if spent / budget >= next_save and spent < budget:
            while next_save <= spent / budget:
                next_save += args.save_every
            save_run()
        if args.max_steps and step >= args.max_steps and spent < budget:
            if distributed:
                dist.barrier()  # no process leaves while another still listens to it
            save_run()
            bar.close()
            say(f'stopped at step {step}, {100 * spent / budget:.0f} % of the budget; --resume goes on')
            return
        clock = time.perf_counter()

    bar.close()
    for point in points:  # those at the very end
        for metric in metrics_asked:
            measure(point, grid, args.probe_batches, 4, metric)
    points = []
    if distributed:
        dist.barrier()
    if auto and main_process:
        save(schedule.to_json(), folder / 'schedule.json')
    score('end')
    save_run()  # last: a run killed before goes on from an earlier checkpoint and is scored then
    say(f'{step} steps, {samples:,} samples for {spent:,.0f} units in {seconds:.0f} s, {100 * seconds_data / seconds:.0f} % of them '
        f'waiting for data; python eval.py --weights {folder}/backbone.pt scores it again')


def main(argv=None):
    try:
        train(*parse_args(sys.argv[1:] if argv is None else argv))
    except (ValueError, OSError, FloatingPointError) as error:
        place = error.__traceback__
        while place.tb_next:
            place = place.tb_next
        exit_with(f'train.py: error: {error}  [{Path(place.tb_frame.f_code.co_filename).name}:{place.tb_lineno}]')
    except KeyboardInterrupt:
        sys.exit('interrupted; --resume goes on from the last checkpoint')
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()


if __name__ == '__main__':
    main()
