"""The runs behind the README's numbers, each a public command of train.py.

    python experiments/reproduce.py run headline --datasets shapes --jobs 2
    python experiments/reproduce.py collect  # finished runs into runs.jsonl
    python experiments/reproduce.py tables   # the tables made from it
    python experiments/reproduce.py gpu      # at most 9 minutes on one GPU

headline    MoCo-v3 over budgets: uncompressed, under two constant strategies,
            and relaxed half way
tuned       MoCo-v3 against uncompressed runs with batches of 64, not 128, or with
            twice the color jitter
timed       MoCo-v3 with one run at a time, for the seconds
objectives  MoCo-v3, SimCLR and DINO: uncompressed, compressed, and relaxed half way
schedules   when to relax the compression: never, in stages, by the drop rate
            alone
solved      what schedule.py makes of the gradient errors on CIFAR-10
decay       cosine and polynomial decay of the learning rate
recipe      one setting at a time changed, uncompressed and compressed
simclr      SimCLR under other strategies, and with tokens dropped from both views
dino        DINO's own center, temperature and local crops, instead of ours; p8
gpu         MoCo-v3 with ViT-Ti, uncompressed and relaxed half way
paper       ViT-B on ImageNet-1k in ROOT/imagenet, at the paper's budgets, under
            schedules of ours: never run here. In the commands that
            `run paper --dry-run` prints, put torchrun --nproc_per_node 8 in the
            place of python

A finished run is skipped and an interrupted one goes on, so a study can be
stopped at any time. The runs lie in runs/, and a run that two studies need is
made once. shapes needs no files. With --data-root ROOT, Fashion-MNIST is in
ROOT as torchvision keeps it, and CIFAR-10 in ROOT/cifar10 as JPEG files,
train/CLASS/*.jpg and test/CLASS/*.jpg.
"""
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from tables import RESULTS, ROOT, collect, finished, read_log, scores_of, write_page
from commandline import Parser, count, count_or_zero, fail, positive

RUNS = Path('runs')
TRAIN = [sys.executable, str(ROOT / 'train.py')]
EVAL = [sys.executable, str(ROOT / 'eval.py'), '--protocol']
PROTOCOLS = (('linear',), ('finetune', '--limit', '10000'))    # 4 minutes on a core, not 20
DATASETS = ('shapes', 'fashion_mnist', 'cifar10')
GPU_MINUTES = 9


# ---------------------------------------------------------------- the table of runs

@dataclass(frozen=True)
class Row:
    """A line of a result table."""
    method: str
    schedule: str
    variant: str = ''                  # in a word, what else differs from the defaults
    flags: tuple = ()                  # the same as flags of train.py


@dataclass(frozen=True)
class Study:
    rows: list                         # uncompressed ones before those compared with their best
    datasets: tuple
    budgets: tuple                     # millions of units
    seeds: tuple = (0, 1, 2)           # from 1 M units on, the first two


BATCH_64 = ('batch64', ('--batch-size', '64'))
JITTER_2 = ('jitter2', ('--jitter', '2'))
UNCOMPRESSED = [Row('moco', 'none'), Row('moco', 'none', *BATCH_64), Row('moco', 'none', *JITTER_2)]
ALONE = 'alone'                        # no other flags: to be run one at a time, for the seconds
TEMPERATURE_01 = ('temperature0.1', ('--temperature', '0.1'))
POLYNOMIAL = ('polynomial', ('--lr-schedule', 'polynomial'))
VIT_TINY = ('vit_tiny', ('--arch', 'vit_tiny', '--batch-size', '512', '--lr', '5e-4', '--compile'))
RECIPES = (
    (),                                # variant and flags of the defaults
    ('crop0.4', ('--crop-scale', '0.4')),
    ('crop0.6', ('--crop-scale', '0.6')),
    ('jitter0.5', ('--jitter', '0.5')),
    JITTER_2,
    BATCH_64,
    ('batch256', ('--batch-size', '256')),
    ('crop0.4-batch64', ('--crop-scale', '0.4', '--batch-size', '64')),
    TEMPERATURE_01,
    ('momentum0.95', ('--momentum', '0.95')),
    ('momentum0.996', ('--momentum', '0.996')),
    ('warmup0.02', ('--warmup', '0.02')),
    ('lr0.001', ('--lr', '0.001')),    # half of the default
    ('lr0.004', ('--lr', '0.004')),
    ('batch64-lr0.004', ('--batch-size', '64', '--lr', '0.004')),
)
DROP_BOTH = ('dropboth', ('--drop-branch', 'both'))
CENTER_09 = ('center0.9', ('--center-momentum', '0.9'))          # DINO's own
LOCAL_4 = ('local4', ('--local-crops', '4'))                     # half of DINO's own
CENTER_09_LOCAL_4 = ('center0.9-local4', CENTER_09[1] + LOCAL_4[1])
DINO_OWN = ('center0.9-local4-temperature0.1', CENTER_09_LOCAL_4[1] + TEMPERATURE_01[1])
PAPER = ('--arch', 'vit_base', '--img-size', '224', '--patch-size', '16', '--workers', '12')
MOCO_V3 = ('--lr', '1.5e-4', '--batch-size', '4096', '--hidden', '4096', '--warmup', '0.13',
           '--freeze-patch-embed')
SLIP = ('--lr', '2e-4', '--batch-size', '4096', '--hidden', '4096')
DINO_V1 = ('--lr', '5e-4', '--batch-size', '1024', '--hidden', '2048', '--out-dim', '65536',
           '--local-crops', '8', '--local-size', '96', '--momentum', '0.996',
           '--center-momentum', '0.9', '--temperature', '0.1')
SOLVED = 'p16-drop0.50@0,p16@0.1,p8-drop0.50@0.25'   # schedule.py on results/gradstats.jsonl
RELAXED = 'p30-drop0.50@0,p30@0.5,p16@0.9'
DYNAMIC = 'p8-drop0.50@0,p8@0.5'       # strong compression first, relaxed half way
STAGES = (
    DYNAMIC,
    'p8-drop0.50@0,p8@0.4,p4@0.8',
    'p8-drop0.75@0,p8-drop0.50@0.33,p8@0.67',      # NaViT: a falling drop rate beats a fixed one
)
COMPRESSED = [Row('moco', schedule) for schedule in ('p8', 'p8-drop0.50', DYNAMIC)]
STUDIES = dict(
    headline=Study(
        [UNCOMPRESSED[0], *COMPRESSED],
        DATASETS, (0.02, 0.04, 0.08, 0.32, 1.28)),
    tuned=Study(
        [Row('moco', 'none', *BATCH_64), *COMPRESSED,
         Row('moco', 'none', *JITTER_2), *COMPRESSED, Row('moco', 'p8', *JITTER_2),
         *UNCOMPRESSED, *COMPRESSED],
        DATASETS, (0.32, 1.28)),
    timed=Study(
        [Row('moco', schedule, ALONE) for schedule in ('none', 'p8', 'p8-drop0.50')],
        DATASETS, (0.04, 0.08, 0.16, 0.32), seeds=(0,)),
    objectives=Study(
        [Row(method, schedule)
         for method in ('moco', 'simclr', 'dino')
         for schedule in ('none', 'p8-drop0.50', DYNAMIC)],
        DATASETS, (0.02, 0.04, 0.08, 0.32)),
    schedules=Study(
        [Row('moco', schedule) for schedule in ('none', 'p8', 'p8-drop0.50', *STAGES)],
        ('shapes', 'fashion_mnist'), (0.08, 0.16, 0.32)),
    solved=Study(
        [Row('moco', schedule) for schedule in ('none', 'p8', 'p8-drop0.50', SOLVED)],
        ('cifar10',), (0.32,)),
    decay=Study(
        [Row('moco', schedule, *decay)
         for schedule in ('none', 'p8-drop0.50') for decay in ((), POLYNOMIAL)],
        ('fashion_mnist',), (0.08, 0.32)),
    recipe=Study(
        [Row('moco', schedule, *recipe) for recipe in RECIPES for schedule in ('none', 'p8')],
        DATASETS, (0.08, 0.32), seeds=(0,)),
    simclr=Study(
        [*(Row('simclr', schedule) for schedule in ('none', 'p8', 'p8-drop0.50', SOLVED)),
         Row('simclr', 'p8-drop0.75'), Row('simclr', 'p8-drop0.50', *DROP_BOTH)],
        DATASETS, (0.08,), seeds=(0,)),
    dino=Study(
        [Row('dino', schedule) for schedule in ('none', 'p8-drop0.50', 'p8')]
        + [Row('dino', schedule, *compared)
           for recipe in (LOCAL_4, CENTER_09, CENTER_09_LOCAL_4, DINO_OWN)
           for schedule, compared in (('none', recipe), ('p8-drop0.50', recipe),
                                      ('p8-drop0.50', ()))]
        + [Row('dino', 'none', *recipe) for recipe in ((), CENTER_09_LOCAL_4, DINO_OWN)]
        + [Row('dino', 'p8-drop0.50')],
        DATASETS, (0.02, 0.04, 0.08, 0.32), seeds=(0,)),
    gpu=Study(
        [Row('moco', schedule, *VIT_TINY) for schedule in ('none', DYNAMIC)],
        ('cifar10',), (1.0, 4.0, 16.0), seeds=(0,)),
    paper=Study(
        [Row(method, schedule, '', PAPER + recipe)
         for method, recipe in (('moco', MOCO_V3), ('simclr', SLIP), ('dino', DINO_V1))
         for schedule in ('none', RELAXED, 'p48@0,p40@0.2,p30@0.4,p24@0.6,p20@0.8,p16@0.9')],
        ('imagenet',), (309, 620, 1027, 1537), seeds=(0,)),
)


@dataclass(frozen=True)
class Run:
    study: str
    dataset: str
    row: Row
    budget: float                      # millions of units
    seed: int

    @property
    def name(self):
        words = [self.dataset, self.row.method, self.row.schedule, self.row.variant,
                 f'{self.budget:g}M', f'seed{self.seed}']
        return '-'.join(word for word in words if word)

    @property
    def folder(self):
        return RUNS / self.name

    def flags(self, root='data'):
        """The flags of train.py, with the data sets below `root`."""
        return [*dataset_flags(self.dataset, root), '--method', self.row.method,
                '--schedule', self.row.schedule, *self.row.flags,
                '--budget', f'{self.budget:g}', '--seed', str(self.seed), '--eval-every', '1']


def dataset_flags(name, root):
    flags = dict(
        shapes=[],
        fashion_mnist=['--dataset', 'fashion_mnist', '--data-root', root],
        cifar10=['--dataset', 'folder', '--data-root', f'{root}/cifar10'],
        imagenet=['--dataset', 'folder', '--data-root', f'{root}/imagenet'],
    )
    return flags[name]


def runs_of(name, datasets=None, budgets=None, seeds=None):
    """The runs of a study, the cheap ones first."""
    study = STUDIES[name]
    runs = []
    for dataset in datasets or study.datasets:
        wanted = study.budgets
        if (name, dataset) == ('headline', 'cifar10'):
            wanted = (*wanted, 4.0)    # once, to see what a long run changes
        for budget in budgets or wanted:
            for seed in seeds or study.seeds[:3 if budget < 1 else 2]:
                runs += [Run(name, dataset, row, budget, seed) for row in study.rows]
    runs = dict.fromkeys(runs)         # a row that is compared twice runs once
    return sorted(runs, key=lambda run: (run.budget, run.seed))


# ---------------------------------------------------------------- run

def last_line(file):
    file.seek(0)
    lines = file.read().splitlines()
    return lines[-1] if lines else 'it printed nothing'


def run_jobs(commands, at_once, deadline=math.inf):
    """Run {name: command}, some at a time, and yield each name when its command has ended well.

    The first failure stops the others: train.py saves first, so that it can go on later. deadline:
    the time.monotonic() at which all are stopped.
    """
    environment = dict(os.environ)
    if at_once > 1:
        environment['OMP_NUM_THREADS'] = '1'
    waiting = list(commands)
    running = {}
    try:
        while waiting or running:
            while waiting and len(running) < at_once:
                name = waiting.pop(0)
                output = tempfile.TemporaryFile('w+')
                # in a session of its own, so that Ctrl-C reaches it once, through us
                process = subprocess.Popen(commands[name], env=environment, stdout=output,
                                           stderr=subprocess.STDOUT, start_new_session=True)
                running[name] = process, output
            time.sleep(0.1)
            ended = [name for name, (process, _) in running.items() if process.poll() is not None]
            for name in ended:
                process, output = running.pop(name)
                line = last_line(output)
                if process.returncode:
                    raise RuntimeError(f'{name} failed: {line} (exit status {process.returncode}; '
                                       f'{len(running)} stopped, {len(waiting)} not begun)')
                print(f'{name}: {line}', flush=True)
                yield name
            if time.monotonic() > deadline:
                raise RuntimeError(f'out of time; stopped: {", ".join([*running, *waiting])}')
    finally:
        for process, _ in running.values():
            process.terminate()
        for process, _ in running.values():
            process.wait()


def train_all(runs, root, at_once, deadline=math.inf):
    """Train what is not finished, and note in run.json beside each run how it was made."""
    by_name = {run.name: run for run in runs}
    commands = {}
    for name, run in by_name.items():
        if not finished(run.folder):
            commands[name] = [*TRAIN, *run.flags(root), '--name', name, '--resume', 'auto']
        elif not (run.folder / 'run.json').exists():       # this script was killed just before
            describe(run, at_once)
    print(f'{len(runs) - len(commands)} runs are finished, {len(commands)} to do', flush=True)
    for name in run_jobs(commands, at_once, deadline):
        describe(by_name[name], at_once)


def describe(run, at_once):
    """What a reader needs to judge a result: the command, the versions, the machine."""
    device = cpu_model()
    if torch.cuda.is_available():
        device = torch.cuda.get_device_name()
    note = dict(
        name=run.name,
        study=run.study,
        dataset=run.dataset,
        method=run.row.method,
        schedule=run.row.schedule,
        variant=run.row.variant,
        budget=run.budget,
        seed=run.seed,
        command=shlex.join(['python', 'train.py', *run.flags()]),
        versions=dict(python=platform.python_version(), torch=torch.__version__),
        machine=dict(device=device, cores=os.cpu_count(), runs_at_once=at_once),
    )
    (run.folder / 'run.json').write_text(json.dumps(note, indent=1))


def cpu_model():
    path = Path('/proc/cpuinfo')       # Linux; elsewhere Python knows
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith('model name'):
                return line.split(':')[1].strip()
    return platform.processor() or platform.machine()


def run_study(args):
    runs = runs_of(args.study, args.datasets, args.budgets, args.seeds)
    if args.dry_run:
        for run in runs:
            command = ['python', 'train.py', *run.flags(args.data_root), '--name', run.name]
            print(shlex.join(command))
        return
    train_all(runs, args.data_root, args.jobs)
    if args.eval:
        commands = {}
        for run in runs:
            weights = str(run.folder / 'backbone.pt')
            flags = dataset_flags(run.dataset, args.data_root)
            scores = scores_of(run.folder)
            for protocol in PROTOCOLS:
                if protocol[0] not in scores:
                    command = [*EVAL, *protocol, '--weights', weights, *flags]
                    commands[f'{run.name}, {protocol[0]}'] = command
        for _ in run_jobs(commands, args.jobs):
            pass                       # eval.py writes the scores beside the weights


# ---------------------------------------------------------------- gpu

def cuda_tests_pass(seconds):
    command = [sys.executable, '-m', 'pytest', '-q', 'tests/test_cuda.py']
    try:
        return subprocess.run(command, cwd=ROOT, timeout=seconds).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def logged_steps(flags, stdout=None):
    """The training lines of a run that is not scored and not kept."""
    command = [*TRAIN, *flags, '--name', 'speed', '--eval-every', '0']
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(command, cwd=folder, check=True, stdout=stdout)
        steps, _ = read_log(Path(folder) / 'runs' / 'speed')
    return steps


def steady_speed(steps):
    """Units per second of a run, from the last three lines in the log of each of its strategies.

    torch.compile works in the first steps of a strategy. gpu() sets time aside for them.
    """
    by_strategy = {}
    for step in steps:
        by_strategy.setdefault(step['query'], []).append(step)
    seconds = 0.0
    begun = 0                          # units spent before this strategy
    for lines in by_strategy.values():
        start, end = lines[-3], lines[-1]
        pace = (end['seconds'] - start['seconds']) / (end['units'] - start['units'])
        seconds += (end['units'] - begun) * pace
        begun = end['units']
    return begun / seconds


def gpu(args):
    """The CUDA tests, then the gpu study at the largest budget that the time pays for."""
    deadline = time.monotonic() + 60 * GPU_MINUTES
    passed = cuda_tests_pass(seconds=150)
    root = str(Path(args.data_root).resolve())
    none, fast = STUDIES['gpu'].rows
    trials = {row: Run('gpu', 'cifar10', row, budget=0.1, seed=0) for row in (none, fast)}
    speeds = {row: steady_speed(logged_steps(run.flags(root))) for row, run in trials.items()}

    # The speed-up is read off a curve of accelerated runs, so there are shorter ones as well. The
    # one that is least needed comes last. Each takes up to 40 seconds to start, to read the images
    # and to compile.
    parts = [(fast, 1 / 16), (none, 1), (fast, 1 / 4), (fast, 1)]
    seconds = deadline - time.monotonic() - 40 * len(parts)
    if seconds <= 0:
        raise RuntimeError('the tests and the timing left no time to train')
    budget = seconds / sum(part / speeds[row] for row, part in parts) / 1e6
    print(f'{speeds[none]:,.0f} units/s uncompressed, {speeds[fast]:,.0f} compressed: '
          f'the budget is {budget:.2g} M units', flush=True)
    for row, part in parts:
        run = Run('gpu', 'cifar10', row, float(f'{part * budget:.2g}'), seed=0)
        train_all([run], root, 1, deadline)
        collect(RUNS, args.results)
    if not passed:
        raise RuntimeError('the runs are done, but tests/test_cuda.py did not pass; see above')


# ---------------------------------------------------------------- command line

def parse_args(argv):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    command = commands.add_parser('run', description='Train the runs of a study.',
                                  help='train the runs of a study')
    command.add_argument('study', choices=STUDIES, metavar='STUDY', help=', '.join(STUDIES))
    command.add_argument('--datasets', nargs='+', choices=(*DATASETS, 'imagenet'), metavar='NAME',
                         help="shapes, fashion_mnist, cifar10, imagenet (default: the study's)")
    command.add_argument('--budgets', nargs='+', type=positive,
                         help="millions of units (default: the study's)")
    command.add_argument('--seeds', nargs='+', type=count_or_zero,
                         help="(default: the study's)")
    command.add_argument('--jobs', type=count, default=1,
                         help='runs at a time; with more than one, each has one thread')
    command.add_argument('--data-root', default='data', help='folder of the data sets')
    command.add_argument('--eval', action='store_true',
                         help='then score each by a linear classifier, and by fine-tuning on '
                              '10,000 images (eval.py)')
    command.add_argument('--dry-run', action='store_true', help='print the commands')
    command.set_defaults(action=run_study)

    command = commands.add_parser('collect', description='Add finished runs to the results.',
                                  help='add finished runs to the results')
    command.set_defaults(action=lambda args: collect(RUNS, args.results))
    command = commands.add_parser('tables', description='Write README.md beside the results.',
                                  help='write README.md beside the results')
    command.set_defaults(action=lambda args: write_page(STUDIES, args.results))
    command = commands.add_parser('gpu', description=gpu.__doc__, help='tests and runs on a GPU')
    command.add_argument('--data-root', default='data', help='folder of the data sets')
    command.set_defaults(action=gpu)
    for name in ('collect', 'tables', 'gpu'):
        commands.choices[name].add_argument('--results', type=Path, default=RESULTS)
    return parser.parse_args(argv)


def main(argv=None):
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    args = parse_args(argv)
    try:
        args.action(args)
    except (RuntimeError, OSError, ValueError, subprocess.CalledProcessError) as error:
        fail(f'reproduce.py: error: {error}')
    except KeyboardInterrupt:
        fail('reproduce.py: stopped; the same command goes on', 130)


if __name__ == '__main__':
    main()
