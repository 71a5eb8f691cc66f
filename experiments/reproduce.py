"""The runs behind the numbers, and the page of results that is made from them.

    python experiments/reproduce.py run search --jobs 2     # train the runs of a study
    python experiments/reproduce.py collect                 # finished runs into runs.jsonl
    python experiments/reproduce.py tables                  # runs.jsonl into results/README.md

Protocol, written down before the runs. Both sides are tuned alike: the same recipes, as many runs,
and the seeds that choose do not judge. The recipes are the default, batches of 64, twice the
colour jitter, crops of at least 0.6 of the area, and twice the jitter with batches of 64, taken
from earlier trials with seed 0 (tuning.md). `chosen` takes one for each strategy and data set, that
of the best mean 20-NN in `search`; a schedule of several stages takes that of its first strategy.
Budgets are in millions of units (M).

search          0.08 M, seeds 10 and 11: five recipes for none, p8 and p8-drop0.50, three sets;
                with SimCLR the first three recipes, without p8
judge           seeds 0, 1, 2 with the chosen recipes: none at 0.32 M, the others at 0.02 to 0.32 M
hindsight       none at 0.32 M with all recipes: was the best one chosen? (MoCo-v3: after judge)
width           judge on two sets at width 192, depth 6; recipes of width 64. Added when a run of
                0.04 M was better than the uncompressed one: 0.02 M, and none on CIFAR-10 with the
                recipe that is the best of width 64 in hindsight
simclr          p8-drop0.50 at 0.04 to 0.32 M with its chosen recipe; added later,
                0.02 M, and none (uncompressed) at 0.08 M
long            1.28 M, chosen recipes: none, p8, p8-drop0.50, and tokens dropped in the first half;
                added after judge, none at 0.08 M, for the factor there; added after the other
                runs, none at 1.28 M with the recipes that hindsight found to be better
longest         4 M on CIFAR-10, two seeds
public          10 M on CIFAR-10, width 128, depth 6, beside numbers that others published
machine         none at 0.32 M once more: how far does the same command move on another day?
                Added later, p8 and p8-drop0.50 on shapes, of the machine of the small views
verdict         pictures of large patches rendered small or full, default recipe, seeds paired
gpu             ViT-Ti on a GPU
paper           ViT-B on ImageNet-1k at the paper's budgets, schedules of ours, never run here:
                --launch 'torchrun --nproc_per_node 8', imagenet/{train,val}/CLASS/*.JPEG

By our arithmetic `paper` fits GPUs of 80 GB, uncompressed SimCLR only just. To keep busy, a GPU
needs 7 cores uncompressed and 43 under p30-drop0.50 (bench.md), and 4 GB of shared memory: with
fewer cores a compressed run saves units, not hours. moco_v3 is the official recipe. slip and
dino_v1 have their official rates, batches, heads and views, but our initialization, positions and
betas, a rate that ends at 0, and no drop path; `set_progress` says how DINO's temperature rises. A
score of training is of 10,000 and 5,000 images, one of eval.py of all.

Collect `search` before the studies that choose by it. Finished and recorded runs are skipped,
interrupted ones go on. shapes needs no files; below --data-root lie Fashion-MNIST as torchvision
keeps it, and CIFAR-10 as files, cifar10/train/CLASS/*.jpg and cifar10/test/CLASS/*.jpg.

The speed-up of compressed runs over an uncompressed one, for one seed:

    a0, b0        final 20-NN and units of the uncompressed run
    a(b)          final 20-NN of the compressed run of b units, linear in log b in between
    speed-up      b0 / b  at the smallest b with a(b) >= a0

Nothing is extrapolated: '> x' if even the shortest compressed run is better.
"""
import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
from collections import defaultdict, namedtuple
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from math import inf
from operator import itemgetter
from pathlib import Path
from statistics import mean, stdev

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'experiments' / 'results' / 'runs.jsonl'
RUNS = Path('runs')
TITLES = dict(shapes='shapes', fashion_mnist='Fashion-MNIST', cifar10='CIFAR-10')


# ---------------------------------------------------------------- studies

Run = namedtuple('Run', 'dataset method schedule variant budget seed views')

# A row is all combinations of what its columns list, which are the fields of Run. '-' is the
# default recipe, * the chosen one; others are parts joined by '-'. Views are full by default.
STUDIES = {
    'search': """
shapes fashion_mnist cifar10 | moco   | none p8 p8-drop0.50 | - batch64 jitter2       | 0.08 | 10 11
shapes fashion_mnist cifar10 | moco   | none p8 p8-drop0.50 | crop0.6 jitter2-batch64 | 0.08 | 10 11
shapes fashion_mnist cifar10 | simclr | none p8-drop0.50    | - batch64 jitter2       | 0.08 | 10 11
""",
    'judge': """
shapes fashion_mnist cifar10 | moco | none           | * | 0.32                     | 0 1 2
shapes fashion_mnist cifar10 | moco | p8 p8-drop0.50 | * | 0.02 0.04 0.08 0.16 0.32 | 0 1 2
""",
    'hindsight': """
shapes fashion_mnist cifar10 | moco simclr | none | - batch64 jitter2       | 0.32 | 0 1 2
shapes fashion_mnist cifar10 | moco        | none | crop0.6 jitter2-batch64 | 0.32 | 0 1 2
""",
    'width': """
fashion_mnist cifar10 | moco | none           | width192-* | 0.32                     | 0 1 2
fashion_mnist cifar10 | moco | p8 p8-drop0.50 | width192-* | 0.02 0.04 0.08 0.16 0.32 | 0 1 2
cifar10 | moco | none | width192-crop0.6 | 0.32 | 0 1 2
""",
    'simclr': """
shapes fashion_mnist cifar10 | simclr | none        | * | 0.08                     | 0 1 2
shapes fashion_mnist cifar10 | simclr | p8-drop0.50 | * | 0.02 0.04 0.08 0.16 0.32 | 0 1 2
""",
    'long': """
shapes fashion_mnist cifar10 | moco | none                                | * | 0.08 1.28 | 0 1 2
shapes fashion_mnist cifar10 | moco | p8 p8-drop0.50 p8-drop0.50@0,p8@0.5 | * | 1.28      | 0 1 2
shapes  | moco | none | jitter2 | 1.28 | 0 1 2
cifar10 | moco | none | crop0.6 | 1.28 | 0 1 2
""",
    'longest': 'cifar10 | moco | none p8 p8-drop0.50@0,p8@0.5 | * | 4 | 0 1',
    'public': 'cifar10 | moco | p8-drop0.50@0,p8@0.5 | width128-* | 10 | 0',
    'machine': """
shapes cifar10 | moco | none           | again | 0.32 | 0 1 2
shapes         | moco | p8 p8-drop0.50 | again | 0.32 | 0 1 2
""",
    'verdict': """
shapes                       | moco | p8 p8-drop0.50 | - | 0.08 | 0 1 2 3 4 5 6 7 | small full
fashion_mnist cifar10        | moco | p8 p8-drop0.50 | - | 0.08 | 0 1 2 3         | small full
shapes fashion_mnist cifar10 | moco | p8 p8-drop0.50 | - | 0.32 | 0 1 2           | small full
""",
    'gpu': 'cifar10 | moco | none p8-drop0.50@0,p8@0.5 | vit_tiny | 1 4 16 | 0',
    'paper': """
imagenet | moco   | none p30-drop0.50@0,p30@0.5,p16@0.9           | moco_v3 | 309 620 1027 1537 | 0
imagenet | moco   | p48@0,p40@0.2,p30@0.4,p24@0.6,p20@0.8,p16@0.9 | moco_v3 | 309 620 1027 1537 | 0
imagenet | moco   | none                                          | moco_v3 | 3088 6157         | 0
imagenet | simclr | none p30-drop0.50@0,p30@0.5,p16@0.9           | slip    | 309 620 1027 1537 | 0
imagenet | simclr | p48@0,p40@0.2,p30@0.4,p24@0.6,p20@0.8,p16@0.9 | slip    | 309 620 1027 1537 | 0
imagenet | dino   | none p30-drop0.50@0,p30@0.5,p16@0.9           | dino_v1 | 309 620 1027 1537 | 0
imagenet | dino   | p48@0,p40@0.2,p30@0.4,p24@0.6,p20@0.8,p16@0.9 | dino_v1 | 309 620 1027 1537 | 0
""",
}
PAPER = '--arch vit_base --img-size 224 --patch-size 16 --workers 12 '
LARGE = PAPER + '--batch-size 4096 --hidden 4096 '
PARTS = {                                            # of a recipe
    '': '',
    'batch64': '--batch-size 64',
    'jitter2': '--jitter 2',
    'crop0.6': '--crop-scale 0.6',
    'width192': '--arch 192,6,3',
    'width128': '--arch 128,6,4',
    'again': '',
    'vit_tiny': '--arch vit_tiny --batch-size 512 --lr 5e-4 --compile',
    'moco_v3': LARGE + '--lr 1.5e-4 --warmup 0.1333 --freeze-patch-embed',
    'slip': LARGE + '--lr 2e-4 --warmup 0.04 --jitter 0.5',
    'dino_v1': PAPER + '--lr 5e-4 --batch-size 1024 --hidden 2048 --out-dim 65536 --local-crops 8 '
                       '--momentum 0.996 --center-momentum 0.9 --temperature 0.1',
}
FILES = dict(
    shapes='',
    fashion_mnist='--dataset fashion_mnist --data-root {}',
    cifar10='--dataset folder --data-root {}/cifar10',
    imagenet='--dataset folder --data-root {}/imagenet',
)


def runs_of(study, records=()):
    """The runs of a study, short ones first, with the chosen recipes where its rows say so."""
    runs = {}                                        # one that two rows name is there once
    for row in STUDIES[study].strip().splitlines():
        columns = [cell.split() for cell in row.split('|')]
        for dataset, method, schedule, variant, budget, seed, *views in product(*columns):
            if '*' in variant:
                variant = chosen(records, dataset, schedule, method, variant.rstrip('-*'))
            runs[Run(dataset, method, schedule, variant.strip('-'), float(budget),
                     int(seed), *views or ['full'])] = None
    return sorted(runs, key=lambda run: (run.budget, run.seed))


def searched(records, dataset, schedule, method='moco', study='search'):
    """[(recipe, mean 20-NN)] of the runs of a study under a strategy, the best one first."""
    found = {record['name']: record['knn'] for record in records}
    scores = defaultdict(list)
    for run in runs_of(study):
        name = name_of(run)
        if run[:3] == (dataset, method, schedule):
            if name not in found:
                raise ValueError(f'{name} is not in the results; run its search, then collect')
            scores[run.variant].append(found[name])
    means = {variant: mean(scores[variant]) for variant in scores}
    return sorted(means.items(), key=itemgetter(1), reverse=True)


def chosen(records, dataset, schedule, method='moco', size=''):
    """The recipe with the best mean of its search, behind the size of a larger network."""
    recipe, _ = searched(records, dataset, schedule.split('@')[0], method)[0]
    return f'{size}-{recipe}'.strip('-')


def name_of(run):
    """The name of its folder."""
    small = run.views.replace('full', '')
    words = *run[:4], f'{run.budget:g}M', f'seed{run.seed}', small
    return '-'.join(filter(None, words))


def words_of(command, root):
    """A command line as a list; root, the folder of the data sets, may have spaces."""
    return [word.format(root) for word in command.split()]


def flags_of(run, root='data'):
    """The flags of train.py."""
    recipe = ' '.join(PARTS[part] for part in run.variant.split('-'))
    return words_of(f'{FILES[run.dataset]} --method {run.method} --schedule {run.schedule} '
                    f'--views {run.views} {recipe} --budget {run.budget:g} --seed {run.seed} '
                    '--eval-every 1', root)


# ---------------------------------------------------------------- run

def commands_of(run, args, recorded):
    """What a run lacks: its training and, with --eval, its scores."""
    folder = RUNS / name_of(run)
    commands = []
    if not finished(folder):
        if folder.name in recorded:
            return []
        flags = flags_of(run, args.data_root)
        commands.append(['train.py', *flags, '--name', folder.name, '--resume', 'auto'])
    # fine-tuning on 10,000 images takes 4 minutes on a core, on all of them 20
    for protocol, limit in (('linear', ''), ('finetune', '--limit 10000')):
        if args.eval and protocol not in evaluated(folder):
            command = (f'eval.py --protocol {protocol} {limit} --weights {folder} '
                       f'{FILES[run.dataset]}')
            commands.append(words_of(command, args.data_root))
    return commands


def describe(run, args):
    """What a reader needs to judge a result, in run.json: the command, versions, the machine."""
    folder = RUNS / name_of(run)
    info = Path('/proc/cpuinfo')                     # an ARM processor has no model name there
    named = re.search('model name.*: (.*)', info.read_text() if info.exists() else '')
    cpu = named[1] if named else platform.machine()
    note = dict(
        name=folder.name, study=args.study, **run._asdict(),
        command=shlex.join(['python', 'train.py', *flags_of(run)]),
        versions=dict(python=platform.python_version(), torch=version('torch')),
        machine=dict(device=cpu, cores=os.cpu_count(), runs_at_once=args.jobs))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'run.json').write_text(json.dumps(note))


def launcher(script, args, python):
    """The words in front of a script: only training runs in several processes."""
    return shlex.split(args.launch) if args.launch and script == 'train.py' else [python]


def call(run, args, recorded):
    """Run the commands of a run one after another. True if one fails; what follows it is left."""
    for script, *flags in commands_of(run, args, recorded):
        if script == 'train.py':
            describe(run, args)
        launch = launcher(script, args, sys.executable)
        result = subprocess.run([*launch, ROOT / script, *flags], text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        failed = result.returncode != 0
        last = result.stdout.strip().split('\n')[-1]
        print(f'{name_of(run)}: {"failed: " * failed}{last}', flush=True)
        if failed:
            return True
    return False


def run_study(args):
    """Train its runs, some at a time. One that fails is named; the others finish."""
    records = read(RESULTS)
    recorded = {record['name'] for record in records}
    runs = [run for run in runs_of(args.study, records) if re.search(args.only, name_of(run))]
    if args.dry_run:
        for run in runs:
            for command in commands_of(run, args, recorded):
                print(shlex.join([*launcher(command[0], args, 'python'), *command]))
        return
    if args.jobs > 1:
        os.environ['OMP_NUM_THREADS'] = '1'
    with ThreadPoolExecutor(args.jobs) as pool:      # Ctrl-C: what runs saves, nothing is begun
        failed = sum(pool.map(lambda run: call(run, args, recorded), runs))
    if failed:
        sys.exit(f'{failed} of {len(runs)} runs failed')


# ---------------------------------------------------------------- collect

def read(path):
    """The lines of a file of JSON, if it is there; half a line at its end is left out."""
    lines = path.read_text().splitlines() if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith('}')]


def read_log(folder):
    """(lines of steps, lines of scores) of a run."""
    lines = read(folder / 'log.jsonl')
    return [line for line in lines if 'loss' in line], [line for line in lines if 'knn' in line]


def finished(folder):
    """The scores of a run that has reached its end, else None."""
    _, scores = read_log(folder)
    if scores and scores[-1]['progress'] == 1:
        return scores


def evaluated(folder):
    """{protocol: score} of eval.py, in percent."""
    return {line['name']: round(line['score'], 2) for line in read(folder / 'eval.jsonl')}


def collect(args):
    """Add the finished runs below runs/ to the results; a run is known by its name."""
    records = {record['name']: record for record in read(RESULTS)}
    for path in RUNS.glob('*/run.json'):
        if scores := finished(path.parent):
            curve = [{key: round(score[key], 2) for key in ('units', 'seconds', 'nn', 'knn')}
                     for score in scores]            # from the random network on
            record = json.loads(path.read_text())
            record.update(curve[-1], curve=curve, **evaluated(path.parent))
            records[record['name']] = record
    RESULTS.write_text(''.join(json.dumps(records[name]) + '\n' for name in sorted(records)))
    print(f'{RESULTS.name} has {len(records)} runs')


def select(records, dataset, method, schedule, variant=''):
    """{budget: {seed: record}}, by rising budget."""
    kind = itemgetter('dataset', 'method', 'schedule', 'variant', 'views')
    wanted = dataset, method, schedule, variant, 'full'
    found = {}
    for record in sorted(records, key=itemgetter('budget', 'seed')):
        if kind(record) == wanted and record['seed'] < 10:    # those that choose do not judge
            found.setdefault(record['budget'], {})[record['seed']] = record
    return found


def tuned(records, dataset, *schedules, method='moco', size=''):
    """The runs under each of the strategies, with its chosen recipe."""
    return [select(records, dataset, method, one, chosen(records, dataset, one, method, size))
            for one in schedules]


# ---------------------------------------------------------------- speed-up at equal accuracy

def crossing(points, target):
    """The x at which a curve through points (x, y), by rising x, first reaches y = target.

    Linear in log x between the points. The first x if the curve starts at or above the target, inf
    if it never gets there.
    """
    if points[0][1] >= target:
        return points[0][0]
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 >= target:
            return x0 * (x1 / x0) ** ((target - y0) / (y1 - y0))
    return inf


def speed_up(base, fast, budget, factor=1.0):
    """`summary` if every seed has a number, else what each says: '> 4.0, 6.1, not reached'.

    base, fast: {budget: {seed: record}} of uncompressed and compressed runs. A seed counts if it
    has compressed runs that are shorter and one that is as long. The numbers are divided by factor.
    """
    exact, texts = [], []
    for seed, reference in base.get(budget, {}).items():
        runs = [by_seed[seed] for by_seed in fast.values() if seed in by_seed]
        if runs and runs[0]['budget'] < budget <= runs[-1]['budget']:
            points = [(run['units'], run['knn']) for run in runs]
            ratio = reference['units'] / crossing(points, reference['knn']) / factor
            bound = runs[0]['knn'] >= reference['knn']
            if ratio and not bound:
                exact.append(ratio)
            texts.append(f'{"> " * bound}{ratio:.1f}' if ratio else 'not reached')
    if exact and len(exact) == len(texts):
        return summary(exact)
    return ', '.join(texts)


def summary(values):
    """'6.1 +- 0.4': mean and standard deviation over seeds. '6.1 (2)' of fewer than three."""
    spread = f'+- {stdev(values):.1f}' if len(values) > 2 else f'({len(values)})'
    return f'{mean(values):.1f} {spread}'


# ---------------------------------------------------------------- tables

# (method, strategy, data set) of what the tables list
SIDES = [(*side.split(), dataset)
         for side in ('moco none', 'moco p8', 'moco p8-drop0.50', 'moco p8-drop0.50@0,p8@0.5',
                      'simclr none', 'simclr p8-drop0.50')
         for dataset in TITLES]


def table(head, cells):
    """The data sets as columns, without empty rows. cells: {(first columns, data set): text}"""
    head = [*head, *TITLES.values()]
    lines = [head, ['---'] * len(head)]
    for row in dict.fromkeys(key[:-1] for key in cells if cells[key]):
        lines.append([*map(str, row), *(cells.get((*row, dataset), '') for dataset in TITLES)])
    return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


def unit_seconds(records, dataset, schedule, size=''):
    """Of a unit with the chosen recipe: the least of the runs made together on one machine."""
    kind = 'moco', dataset, schedule, chosen(records, dataset, schedule, size=size)
    return min(run['seconds'] / run['units'] for run in records
               if run['study'] in ('search', 'judge', 'width')
               and itemgetter('method', 'dataset', 'schedule', 'variant')(run) == kind)


def mean_knn(by_seed):
    return mean(run['knn'] for run in by_seed.values())


def hindsight(records, dataset, method='moco'):
    """Uncompressed runs, from 0.32 M on, of the recipe that turns out to be the best there."""
    best, _ = searched(records, dataset, 'none', method, 'hindsight')[0]
    runs = select(records, dataset, method, 'none', best)
    return {budget: runs[budget] for budget in runs if budget >= 0.32}


def compared(records, dataset, schedule, size=''):
    """{row: text} of both sides at 0.32 M; nothing while runs are missing."""
    base, fast = tuned(records, dataset, 'none', schedule, size=size)
    if 0.32 not in fast:
        return {}
    base = {0.32: {seed: base[0.32][seed] for seed in fast[0.32]}}
    seconds = [unit_seconds(records, dataset, one, size) for one in (schedule, 'none')]
    return {
        'uncompressed, %': f'{mean_knn(base[0.32]):.1f}',
        'compressed, the same budget, %': f'{mean_knn(fast[0.32]):.1f}',
        'times fewer units at equal accuracy': speed_up(base, fast, 0.32),
        'times fewer seconds at equal accuracy (estimate)':
            speed_up(base, fast, 0.32, seconds[0] / seconds[1]),
    }


def first_table(records):
    """Without and with the default strategy, and against the best other side in hindsight."""
    cells = {}
    for dataset in TITLES:
        rows = compared(records, dataset, 'p8-drop0.50')
        fast, = tuned(records, dataset, 'p8-drop0.50')
        best = hindsight(records, dataset)
        rows['times fewer units than the best uncompressed recipe (its %)'] = (
            f'{speed_up(best, fast, 0.32)} ({mean_knn(best[0.32]):.1f})')
        for row in rows:
            cells[row, dataset] = rows[row]
    return table(['20-NN of MoCo-v3 without and with `p8-drop0.50`, 0.32 million units'], cells)


def width_table(records):
    """Width 64 / width 192."""
    cells = {}
    for schedule, dataset in product(('p8', 'p8-drop0.50'), TITLES):
        small, wide = [compared(records, dataset, schedule, size) for size in ('', 'width192')]
        for row in wide:
            cells[schedule, row, dataset] = f'{small[row]} / {wide[row]}'
    return table(['strategy', 'width 64 / 192'], cells)


def search_table(records):
    """Mean 20-NN of every recipe, the best one first: in the search, and in hindsight."""
    cells = {}
    for method, schedule, dataset in SIDES:
        for budget, study in ((0.08, 'search'), (0.32, 'hindsight')):
            cells[method, schedule, budget, dataset] = ', '.join(
                f'{recipe or "default"} {score:.1f}'
                for recipe, score in searched(records, dataset, schedule, method, study))
    return table(['method', 'strategy', 'M units'], cells)


def speed_up_table(records):
    """Chosen recipes on both sides / from 0.32 M on, against hindsight."""
    cells = {}
    for method, schedule, dataset in SIDES:
        if schedule == 'none':
            continue
        base, fast = tuned(records, dataset, 'none', schedule, method=method)
        best = hindsight(records, dataset, method)
        for budget in (0.08, 0.32, 1.28, 4.0):
            factors = [speed_up(slow, fast, budget) for slow in (base, best)]
            cells[method, schedule, budget, dataset] = ' / '.join(filter(None, factors))
    return table(['method', 'strategy', 'M units'], cells)


def score_table(records):
    """20-NN with the chosen recipe at every budget, and what else was scored."""
    cells = {}
    for method, schedule, dataset in SIDES:
        runs, = tuned(records, dataset, schedule, method=method)
        for budget, by_seed in runs.items():
            texts = []
            for score, title in (('knn', ''), ('linear', 'LP '), ('finetune', 'FT ')):
                values = [run[score] for run in by_seed.values() if score in run]
                if values:
                    texts.append(title + summary(values))
            cells[method, schedule, budget, dataset] = ', '.join(texts)
    return table(['method', 'strategy', 'M units'], cells)


def tables(args):
    """Write the page beside the results."""
    records = read(RESULTS)
    RESULTS.with_name('README.md').write_text(PAGE.format(
        runs=len(records),
        first=first_table(records),
        widths=width_table(records),
        search=search_table(records),
        speed_ups=speed_up_table(records),
        scores=score_table(records)))


PAGE = """# Results

`python experiments/reproduce.py tables` writes this page from {runs} runs; edits are lost.

A unit is one forward pass of the uncompressed encoder on one image; M is a million units. The
network is a ViT of width 64 and depth 4 at 32 px with patches of 4 px. 20-NN is the percentage of
test images whose class their 20 nearest training images name, with uncompressed features; NN goes
by the nearest one alone. Before training 20-NN is 34.1 on shapes, 67.9 on Fashion-MNIST and 30.0 on
CIFAR-10, here a JPEG copy. A score has a sampling error of at most 1.0 points. +- is the standard
deviation over seeds; with 3 seeds a 95 % interval reaches 2.5 of them to each side.

{first}

Each side takes, of five recipes, the one with the best mean over seeds 10 and 11 at 0.08 M; seeds 0
to 2 judge. Compressed runs match the uncompressed ones of 0.32 M at 0.05 to 0.17 M, near the budget
at which recipes were chosen, which favours them. The last row corrects for that: there, and below
wherever it says "in hindsight", the uncompressed side takes the recipe that is best on the judging
seeds themselves, here with its score in brackets.

How sure is a factor? The sampling error of the uncompressed score moves it by 4 % on shapes, a
fifth on CIFAR-10 and up to 36 % on Fashion-MNIST, where the three seeds give factors of 4.3, 5.8
and 1.9. The machine matters as much as the seed: six uncompressed runs, made again on another day
and five of them on another machine, differ by -0.8, +0.8, -0.7 on CIFAR-10 and by +2.1, -3.3, +0.6
on shapes; six compressed ones on shapes by -3.4 to +2.6. All runs of the table come from one kind
of machine.

Seconds: a compressed unit takes 1.29, 1.11 and 1.29 times as long as an uncompressed one (`p8`:
1.24, 1.07 and 1.16), by the fastest runs with the chosen recipes in the studies `search` and
`judge`. These ratios are good to about a tenth; bench.md, where both take turns in one process, has
1.19 (`p8`: 1.05).

## The paper's findings

Numbers are of shapes, Fashion-MNIST and CIFAR-10, of MoCo-v3 with chosen recipes, unless said
otherwise. LP is a linear probe, FT fine-tuning on 10,000 images.

| finding | here | numbers |
| --- | --- | --- |
| 4 times fewer units at equal accuracy | about | in hindsight: p8-drop0.50 4.2, 4.0, 3.3 at 0.32 \
M and 6.0, 8.7, 3.5 at 1.28 M, p8 3.9, 3.5, 3.0 and 5.0, 8.2, 3.2 (theirs, read off their figure, \
by NN: 4.5, 4.4, 3.8, 3.0 for 309 to 1537 M) |
| the factor falls as the budget grows | not with MoCo-v3 | the next table: from 0.08 to 1.28 M it \
stays or rises; at 4 M, on CIFAR-10 with 2 seeds, it is 3.2 with p8 and, by runs of up to 1.28 M, \
4.5 and 4.3 with p8-drop0.50; SimCLR, run to 0.32 M, may fall on CIFAR-10 |
| +9.8 points NN, +5.1 LP at equal budget | yes, less on real images | NN with p8-drop0.50: +42.4, \
+3.4, +5.0 at 0.32 M (in hindsight +29.1, +3.4, +4.6), +24.4, +6.2, +8.1 at 1.28 M (+8.7, +6.2, \
+7.6); LP on CIFAR-10: +8.6 at 1.28 M (2 seeds; in hindsight +7.5, 3 seeds), with p8 +7.3 at \
4 M (2 seeds; 20-NN +3.8) and, with the default recipe, +3.6 at 0.32 M, +6.8 at 1.28 M (2 seeds) |
| constants win early and fall behind schedules | not seen | p8-drop0.50@0,p8@0.5 minus \
p8-drop0.50, the better constant, at 1.28 M: +0.1, -0.5, +0.2; minus p8 at 4 M, where p8-drop0.50 \
was not run, on CIFAR-10: +0.9 and +2.7 (LP +0.1, +1.1); default recipe, minus the better \
constant, at 0.08, 0.32, 1.28 M: shapes -2.2, -2.3, Fashion-MNIST -1.0, +0.1, +0.3, CIFAR-10 +0.1, \
-0.7, +1.0 |
| the schedule of least CA-MSE beats constants | no | CIFAR-10, 0.32 M, default recipe: 41.9 +- \
1.0, p8 41.0 +- 0.8; with chosen recipes the constants reach 42.4 and 42.7, without the 0.3 M that \
measuring took |
| 3.3 times with SimCLR | about | p8-drop0.50, 0.32 M: 4.3, 3.3, 2.6, in hindsight 4.3, 2.7, 2.6; \
20-NN at equal budget +12.2, +1.9, +3.7 |
| 2.5 times with DINO | inconclusive | runs this short learn little on real images; p8-drop0.50, \
0.32 M, default recipe: > 16.0, > 16.0, 6.8 with seed 0, and 7.0, 8.6, not reached with seed 1 |
| better LP and FT with three objectives | with two | CIFAR-10, 0.32 M, p8-drop0.50, default \
recipe, seed 0: MoCo-v3 LP +4.1, FT +3.4, SimCLR +6.0, +5.9, DINO +2.6, +1.8 or, with another \
recipe on both sides, +0.2, -0.2 |
| decay 1 - progress^2, not cosine | no difference | Fashion-MNIST, none and p8-drop0.50: +0.4, \
+0.2 at 0.08 M (3 seeds), +0.8, -0.5 at 0.32 M (seed 0) |
| short trials choose a strategy (ours) | no use | at 0.32 and 1.28 M p8-drop0.50 beats none and \
p8 on every set with every seed; what is best at a quarter of the budget with the same seed loses \
0.6 points on average at 0.32 M, nothing at 1.28 M |

## Speed-up at equal accuracy: chosen recipes / best uncompressed recipe in hindsight

The units of an uncompressed run, divided by those with which compressed runs of the same seed reach
its 20-NN, interpolated in the logarithm of the units. With commas: a value for each seed; `>`: even
the shortest compressed run is better. Behind the slash, from 0.32 M on: against the recipe that
hindsight finds to be the best at 0.32 M. On shapes it reaches 89.8 +- 1.1 at 1.28 M, the chosen
recipe 77.2.

{speed_ups}

## Scores with the chosen recipes

Mean and standard deviation of 20-NN over seeds; (2): of two seeds. [runs.jsonl](runs.jsonl) has all
runs.

{scores}

## How the recipes were chosen

At 0.08 M: mean 20-NN of seeds 10 and 11, the chosen recipe first. At 0.32 M: uncompressed runs of
seeds 0 to 2, the best recipe in hindsight first. batch64: batches of 64 (default 128); jitter2:
colour jitter of twice the strength; crop0.6: crops of at least 0.6 of an image's area (default
0.2).

{search}

## Width 192, depth 6, with the recipes of width 64

{widths}

Three seeds, but p8 has seeds 0 and 1 on CIFAR-10 alone (seed 1 without 0.16 M). The factor does not
fall with the width. By seed that of p8-drop0.50 is 7.0, 5.6, 6.7 on Fashion-MNIST, at width 64 4.3,
5.8, 1.9, and 3.4, 8.3, 4.5 on CIFAR-10, at width 64 3.1, 3.4, 4.2. In part this is because the
uncompressed network gains nothing from the width (-1.1 and -0.6 points, p8-drop0.50 +0.8 and +1.1):
both sides keep the recipes of width 64. On CIFAR-10 crop0.6, the best recipe of width 64 in
hindsight, reaches 37.5, 37.3, 36.0 at width 192 (factors of 5.8, 3.5, 8.3), so the baseline is not
weak by its recipe alone. Seconds follow units: in the table by the fastest run of each side, and on
CIFAR-10 with seed 0, alone on the machine, a unit of p8 takes 0.98 to 1.05 times and one of
p8-drop0.50 1.04 to 1.14 times as long as an uncompressed one.

## Files

- [runs.jsonl](runs.jsonl): a line for each run: command, versions, machine, scores. Runs up to
  commit 8693537 belong to studies that `experiments/reproduce.py` no longer has
- [first-commands.log](first-commands.log): what the two commands at the top of the README print; on
  other machines the first ends at 80 to 86 %, the second at 50 to 61 %
- [headline.png](headline.png), [compression.png](compression.png), [gradstats.png](gradstats.png),
  [curves.png](curves.png), [neighbours.png](neighbours.png): `python experiments/pictures.py NAME`.
  A star in headline.png is the best uncompressed recipe in hindsight; its titles compare
  p8-drop0.50 with the star at 0.32 M; at 4 M are two seeds. The arrow in curves.png joins the
  points where the two curves first reach the final accuracy of the lower one
- [gradstats.jsonl](gradstats.jsonl): gradient errors of an uncompressed run of 0.16 M on CIFAR-10
- [bench.md](bench.md): speed. [tuning.md](tuning.md): which settings, schedules and rules were
  tried, and small views
- [cat.jpg](cat.jpg): "Chelsea", CC0 by Stefan van der Walt, from scikit-image, at 224 px
"""


def main(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser('run', help='train the runs of a study')
    command.set_defaults(action=run_study)
    add = command.add_argument
    add('study', choices=STUDIES)
    add('--only', default='', help='only runs whose names match this regular expression')
    add('--jobs', type=int, default=1, help='runs at a time; of several, each has one thread')
    add('--data-root', default='data', help='folder of the data sets')
    add('--launch', default='', help='of train.py, such as: torchrun --nproc_per_node 8')
    add('--eval', action='store_true', help='also score by linear probe and fine-tuning')
    add('--dry-run', action='store_true', help='print the commands')
    for action in (collect, tables):
        commands.add_parser(action.__name__, help=action.__doc__).set_defaults(action=action)
    args = parser.parse_args(argv)
    try:
        args.action(args)
    except ValueError as error:
        sys.exit(f'reproduce.py: error: {error}')


if __name__ == '__main__':
    main()
