"""The runs behind the numbers, and the page of results that is made from them.

    python experiments/reproduce.py run search --jobs 2     # train the runs of a study
    python experiments/reproduce.py collect                 # finished runs into runs.jsonl
    python experiments/reproduce.py tables                  # runs.jsonl into results/README.md

Protocol, written down before the runs. Both sides are tuned alike: one list of recipes, as many
runs, and the seeds that choose do not judge. The recipes are the default, batches of 64, twice the
color jitter, crops from 0.6 of the area on, and twice the jitter with batches of 64. `chosen` takes
one for each strategy and data set, that of the best mean 20-NN in `search`; a schedule that relaxes
takes the recipe of its first strategy. Budgets are in millions of units (M).

search          0.08 M, seeds 10 and 11: five recipes for none, p8 and p8-drop0.50, three sets
judge           seeds 0, 1, 2 with the chosen recipes: none at 0.32 M, the others at 0.02 to 0.32 M
width           the same on two sets at width 192, depth 6, from 0.04 M on; recipes of width 64
simclr-search   three recipes for none and p8-drop0.50: default, batches of 64, twice the jitter
simclr          none at 0.32 M and p8-drop0.50 at 0.04 to 0.16 M, with its own chosen recipes
long            1.28 M, chosen recipes: none, p8, p8-drop0.50, and tokens dropped in the first half
longest         4 M on CIFAR-10, two seeds
public          10 M on CIFAR-10, width 128, depth 6, beside numbers that others published
machine         none at 0.32 M once more: how far does the same command move on another day?
verdict         pictures of large patches rendered small or full, default recipe, seeds paired
gpu             ViT-Ti on a GPU
paper           ViT-B on ImageNet-1k at the paper's budgets, schedules of ours: never run here; in
                the commands of --dry-run put torchrun --nproc_per_node 8 in the place of python

What comes after a search needs it collected. Finished and recorded runs are skipped, interrupted
ones go on. shapes needs no files; below --data-root lie Fashion-MNIST as torchvision keeps it, and
CIFAR-10 as files, cifar10/train/CLASS/*.jpg and cifar10/test/CLASS/*.jpg.

The speed-up of compressed runs over an uncompressed one, for one seed:

    a0, b0        final 20-NN and budget of the uncompressed run
    a(b)          final 20-NN of the compressed run with budget b, linear in log b in between
    speed-up      b0 / b  at the smallest b with a(b) >= a0

Nothing is extrapolated: '> x' if even the shortest compressed run is better.
"""
import argparse
import json
import math
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections import namedtuple
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / 'experiments' / 'results' / 'runs.jsonl'
RUNS = Path('runs')
TRAIN = [sys.executable, str(ROOT / 'train.py')]
EVAL = [sys.executable, str(ROOT / 'eval.py'), '--protocol']
PROTOCOLS = (('linear',), ('finetune', '--limit', '10000'))    # 4 minutes on a core, not 20
TITLES = dict(shapes='shapes', fashion_mnist='Fashion-MNIST', cifar10='CIFAR-10')


# ---------------------------------------------------------------- studies

Run = namedtuple('Run', 'dataset method schedule variant budget seed views')

PAPER = ('--arch vit_base --img-size 224 --patch-size 16 --workers 12 --batch-size 4096 '
         '--hidden 4096 ')
PARTS = {                              # of the name of a variant, joined by '-': flags of train.py
    'batch64': '--batch-size 64',
    'jitter2': '--jitter 2',
    'crop0.6': '--crop-scale 0.6',
    'width192': '--arch 192,6,3',
    'width128': '--arch 128,6,4',
    'again': '',
    'vit_tiny': '--arch vit_tiny --batch-size 512 --lr 5e-4 --compile',
    'moco_v3': PAPER + '--lr 1.5e-4 --warmup 0.13 --freeze-patch-embed',
    'slip': PAPER + '--lr 2e-4',
    'dino_v1': PAPER + '--lr 5e-4 --batch-size 1024 --hidden 2048 --out-dim 65536 --local-crops 8 '
                       '--momentum 0.996 --center-momentum 0.9 --temperature 0.1',
}
RECIPES = dict(
    moco=('', 'batch64', 'jitter2', 'crop0.6', 'jitter2-batch64'),
    simclr=('', 'batch64', 'jitter2'),
)
RECORDED = dict(                                     # uncompressed, before `search`
    moco=('', 'batch64', 'jitter2'), simclr=('',),
    dino=('', 'center0.9-local4', 'center0.9-local4-temperature0.1'))
SEARCH_SEEDS = (10, 11)
RELAXED = 'p8-drop0.50@0,p8@0.5'                     # strong compression first
FAST = ('p8', 'p8-drop0.50')
REAL = ('fashion_mnist', 'cifar10')
# of p8 for a unit, relative to an uncompressed one, at width 64 with full views (one thread)
UNIT_SECONDS = dict(shapes=1.28, fashion_mnist=1.13, cifar10=1.21)


def grid(datasets, schedules, budgets, seeds=(0, 1, 2), variants=('',), method='moco',  # noqa: PLR0913
         views=('small',)):
    """The runs of all combinations. Uncompressed ones are the same under all views: ''."""
    runs = [Run(dataset, method, schedule, variant, budget, seed, side * (schedule != 'none'))
            for budget, seed, dataset, variant, schedule, side
            in product(budgets, seeds, datasets, variants, schedules, views)]
    return sorted(runs, key=lambda run: (run.budget, run.seed))


def search(method, schedules):
    return grid(TITLES, schedules, [0.08], SEARCH_SEEDS, RECIPES[method], method)


BOTH = dict(views=('small', 'full'))
STAGES = ('none', 'p30-drop0.50@0,p30@0.5,p16@0.9',
          'p48@0,p40@0.2,p30@0.4,p24@0.6,p20@0.8,p16@0.9')
STUDIES = {
    'search': search('moco', ('none', *FAST)),
    'judge': grid(TITLES, FAST, (0.02, 0.04, 0.08, 0.16, 0.32)) + grid(TITLES, ['none'], [0.32]),
    'width': grid(REAL, FAST, (0.04, 0.08, 0.16, 0.32), variants=['width192'])
    + grid(REAL, ['none'], [0.32], variants=['width192']),
    'simclr-search': search('simclr', ('none', 'p8-drop0.50')),
    'simclr': grid(TITLES, ['p8-drop0.50'], (0.04, 0.08, 0.16), method='simclr')
    + grid(TITLES, ['none'], [0.32], method='simclr'),
    'long': grid(TITLES, ('none', *FAST, RELAXED), [1.28]),
    'longest': grid(['cifar10'], ('none', 'p8', RELAXED), [4.0], (0, 1)),
    'public': grid(['cifar10'], [RELAXED], [10.0], [0], ['width128']),
    'machine': grid(('shapes', 'cifar10'), ['none'], [0.32], variants=['again']),
    'verdict': grid(['shapes'], FAST, [0.08], range(8), **BOTH)
    + grid(REAL, FAST, [0.08], range(4), **BOTH) + grid(TITLES, FAST, [0.32], **BOTH),
    'gpu': grid(['cifar10'], ('none', RELAXED), (1.0, 4.0, 16.0), [0], ['vit_tiny']),
    'paper': [run for method, variant in (('moco', 'moco_v3'), ('simclr', 'slip'),
                                          ('dino', 'dino_v1'))
              for run in grid(['imagenet'], STAGES, (309, 620, 1027, 1537), [0], [variant],
                              method)],
}
TUNED = ('judge', 'width', 'simclr', 'long', 'longest', 'public')


def runs_of(study, records=()):
    """The runs of a study; of a tuned one with the chosen recipes."""
    runs = STUDIES[study]
    if study not in TUNED:
        return runs
    recipes = [chosen(records, run.dataset, run.schedule, run.method) for run in runs]
    return [run._replace(variant='-'.join(filter(None, (run.variant, recipe))))
            for run, recipe in zip(runs, recipes)]


def chosen(records, dataset, schedule, method='moco'):
    """The recipe with the best mean 20-NN in the search, '' for the default."""
    schedule = schedule.split('@')[0]
    means = {}
    for recipe in RECIPES[method]:
        runs = select(records, dataset, method, schedule, recipe, 'small').get(0.08, {})
        if not set(SEARCH_SEEDS) <= set(runs):
            raise ValueError(f'the search of {method}, {schedule}, {recipe or "default"} on '
                             f'{dataset} is not in the results; run it, then collect')
        means[recipe] = statistics.mean(runs[seed]['knn'] for seed in SEARCH_SEEDS)
    return max(means, key=means.get)


def name_of(run):
    """The name of its folder."""
    small = 'small' if run.views == 'small' else ''
    words = (run.dataset, run.method, run.schedule, run.variant, f'{run.budget:g}M',
             f'seed{run.seed}', small)
    return '-'.join(filter(None, words))


def dataset_flags(name, root):
    return dict(
        shapes=[],
        fashion_mnist=['--dataset', 'fashion_mnist', '--data-root', root],
        cifar10=['--dataset', 'folder', '--data-root', f'{root}/cifar10'],
        imagenet=['--dataset', 'folder', '--data-root', f'{root}/imagenet'],
    )[name]


def flags_of(run, root='data'):
    """The flags of train.py, with the data sets below `root`."""
    variant = ' '.join(PARTS[part] for part in run.variant.split('-') if part).split()
    views = ['--views', run.views] if run.views else []
    return [*dataset_flags(run.dataset, root), '--method', run.method, '--schedule', run.schedule,
            *views, *variant, '--budget', f'{run.budget:g}', '--seed', str(run.seed),
            '--eval-every', '1']


# ---------------------------------------------------------------- run

def run_all(commands, jobs):
    """Run {name: command}, some at a time. One that fails is named; the others finish."""
    threads = dict(OMP_NUM_THREADS='1') if jobs > 1 else {}

    def call(name):
        result = subprocess.run(commands[name], env={**os.environ, **threads}, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        failed = 'failed: ' if result.returncode else ''
        lines = result.stdout.splitlines() or ['it printed nothing']
        print(f'{name}: {failed}{lines[-1]}', flush=True)
        return failed

    with ThreadPoolExecutor(jobs) as pool:           # Ctrl-C: what runs saves, nothing is begun
        failed = sum(map(bool, pool.map(call, commands)))
    if failed:
        raise RuntimeError(f'{failed} of {len(commands)} failed')


def describe(run, study, jobs):
    """What a reader needs to judge a result, in run.json: the command, versions, the machine."""
    models = [line.split(':')[1].strip() for line in lines_of(Path('/proc/cpuinfo'))
              if line.startswith('model name')]
    note = dict(
        name=name_of(run), study=study, **run._asdict(),
        command=shlex.join(['python', 'train.py', *flags_of(run)]),
        versions=dict(python=platform.python_version(), torch=version('torch')),
        machine=dict(device=(models or [platform.machine()])[0], cores=os.cpu_count(),
                     runs_at_once=jobs))
    folder = RUNS / name_of(run)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'run.json').write_text(json.dumps(note, indent=1))


def run_study(args):
    records = load_results()
    wanted = dict(dataset=args.datasets, budget=args.budgets, seed=args.seeds)
    runs = [run for run in runs_of(args.study, records)
            if all(getattr(run, key) in values for key, values in wanted.items() if values)]
    done = [] if args.again else [record['name'] for record in records]
    todo = [run for run in runs
            if name_of(run) not in done and not finished(RUNS / name_of(run))]
    commands = {name_of(run): [*flags_of(run, args.data_root), '--name', name_of(run)]
                for run in todo}
    if args.dry_run:
        for flags in commands.values():
            print(shlex.join(['python', 'train.py', *flags]))
        return
    print(f'{len(runs) - len(todo)} runs are finished, {len(todo)} to do', flush=True)
    for run in todo:
        describe(run, args.study, args.jobs)
    run_all({name: [*TRAIN, *flags, '--resume', 'auto'] for name, flags in commands.items()},
            args.jobs)
    if args.eval:
        run_all(evaluations(runs, args.data_root), args.jobs)


def evaluations(runs, root):
    """{name: command} of the scores that the runs in the folder lack."""
    commands = {}
    for run, protocol in product(runs, PROTOCOLS):
        folder = RUNS / name_of(run)
        weights = folder / 'backbone.pt'
        if weights.exists() and protocol[0] not in evaluated(folder):
            commands[f'{folder.name}, {protocol[0]}'] = [
                *EVAL, *protocol, '--weights', str(weights), *dataset_flags(run.dataset, root)]
    return commands


# ---------------------------------------------------------------- collect

def lines_of(path):
    return path.read_text().splitlines() if path.exists() else []


def read_log(folder):
    """(lines of steps, lines of scores) of a run; half a line at the end is left out."""
    lines = [json.loads(text) for text in lines_of(folder / 'log.jsonl') if text.endswith('}')]
    return [line for line in lines if 'loss' in line], [line for line in lines if 'knn' in line]


def finished(folder):
    _, scores = read_log(folder)
    return bool(scores) and scores[-1]['progress'] == 1


def evaluated(folder):
    """{protocol: score} of eval.py, in percent."""
    lines = map(json.loads, lines_of(folder / 'eval.jsonl'))
    return {line['name']: round(line['score'], 2) for line in lines}


def record_of(folder):
    """A line of runs.jsonl: what run.json says of the run, and its scores."""
    record = json.loads((folder / 'run.json').read_text())
    steps, scores = read_log(folder)
    batch_size = json.loads((folder / 'args.json').read_text())['batch_size']
    record['samples'] = steps[-1]['step'] * batch_size
    # over the budget, from the random network on
    record['curve'] = [{key: round(score[key], 2) for key in ('units', 'seconds', 'nn', 'knn')}
                       for score in scores]
    record.update(record['curve'][-1])
    record['strategies'] = {}                        # and the progress at which each is first seen
    for line in steps:
        record['strategies'].setdefault(line['strategy'], round(line['progress'], 3))
    if evaluated(folder):
        record['eval'] = evaluated(folder)
    return record


def collect(args):
    """Add the finished runs below runs/ to the results; a run is known by its name."""
    lines = {json.loads(line)['name']: line for line in lines_of(RESULTS)}
    done = [note.parent for note in RUNS.glob('*/run.json') if finished(note.parent)]
    lines.update((folder.name, json.dumps(record_of(folder))) for folder in done)
    partial = RESULTS.with_suffix('.partial')
    partial.write_text(''.join(lines[name] + '\n' for name in sorted(lines)))
    partial.replace(RESULTS)
    print(f'{len(done)} finished runs; {RESULTS.name} has {len(lines)}')


def load_results():
    """The records of runs.jsonl. views: '' of an uncompressed run, else 'small' or 'full'."""
    records = [json.loads(line) for line in lines_of(RESULTS)]
    for record in records:
        record['views'] = record.get('views', 'full') * (record['schedule'] != 'none')
    return records


KIND = ('dataset', 'method', 'schedule', 'variant', 'views')


def select(records, dataset, method, schedule, variant='', views='full'):  # noqa: PLR0913
    """{budget: {seed: record}}, by rising budget. Uncompressed runs do not differ in views."""
    wanted = [dataset, method, schedule, variant, views * (schedule != 'none')]
    found = {}
    for record in sorted(records, key=lambda record: (record['budget'], record['seed'])):
        if [record[key] for key in KIND] == wanted:
            found.setdefault(record['budget'], {})[record['seed']] = record
    return found


def best_of(records, dataset, method='moco'):
    """{budget: {seed: record}} of the best uncompressed run by 20-NN, chosen for each seed.

    Compared are the recipes that have runs at a budget, at least two, on the seeds that all have.
    """
    recipes = [select(records, dataset, method, 'none', variant) for variant in RECORDED[method]]
    best = {}
    for budget in sorted(set().union(*recipes)):
        compared = [by_budget[budget] for by_budget in recipes if budget in by_budget]
        seeds = sorted(set.intersection(*map(set, compared)))
        if len(compared) > 1 and seeds:
            best[budget] = {seed: max((by_seed[seed] for by_seed in compared), key=knn)
                            for seed in seeds}
    return best


def knn(record):
    return record['knn']


# ---------------------------------------------------------------- speed-up at equal accuracy

def crossing(points, target):
    """The x at which a curve through points (x, y), by rising x, first reaches y = target.

    Linear in log x between the points. -inf if the curve starts at or above the target, inf if it
    never gets there.
    """
    if points[0][1] >= target:
        return -math.inf
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 >= target:
            return x0 * (x1 / x0) ** ((target - y0) / (y1 - y0))
    return math.inf


def speed_ups(base, fast, budget, clock='units'):
    """{seed: (sign, ratio)} of the seeds with shorter runs; the sign is '', '>' or 'not reached'.

    base, fast: {budget: {seed: record}} of uncompressed and compressed runs; clock: or 'seconds'.
    """
    outcomes = {}
    for seed, reference in base.get(budget, {}).items():
        runs = [by_seed[seed] for by_seed in fast.values() if seed in by_seed]
        if not runs or runs[0]['budget'] >= budget:
            continue                                 # nothing shorter was run
        points = [(run[clock], run['knn']) for run in runs]
        x = crossing(points, reference['knn'])
        if x == math.inf:
            outcomes[seed] = ('not reached', 0.0)
        elif x == -math.inf:
            outcomes[seed] = ('>', reference[clock] / points[0][0])
        else:
            outcomes[seed] = ('', reference[clock] / x)
    return outcomes


def speed_up_text(outcomes, factor=1.0):
    """'6.1 +- 0.4' if every seed has a number; else the bound that all share, or what each says."""
    signs = {sign for sign, _ in outcomes.values()}
    ratios = [ratio / factor for _, ratio in outcomes.values()]
    if signs == {''}:
        deviation = f' +- {statistics.stdev(ratios):.1f}' if len(ratios) > 1 else ''
        return f'{statistics.mean(ratios):.1f}{deviation}'
    if signs == {'>'}:
        return f'> {min(ratios):.1f}'
    texts = [sign if sign == 'not reached' else f'{sign} {ratio:.1f}'.strip()
             for sign, ratio in zip((sign for sign, _ in outcomes.values()), ratios)]
    return ', '.join(texts if len(signs) > 1 else texts[:1])


# ---------------------------------------------------------------- tables

def table(head, rows, cell):
    """A line for each row, whose data sets have the texts cell(dataset, *row); none without any."""
    lines = [[*head, *TITLES.values()], ['---'] * (len(head) + len(TITLES))]
    for row in rows:
        cells = [cell(dataset, *row) for dataset in TITLES]
        if any(cells):
            lines.append([*row, *cells])
    return '\n'.join(f'| {" | ".join(map(str, line))} |' for line in lines)


def score_table(records):
    """Mean 20-NN (seeds) of all runs, with linear probe and fine-tuning where there are any."""
    order = ('moco', 'simclr', 'dino')
    rows = {(*(record[key] for key in KIND[1:]), record['budget']) for record in records}

    def cell(dataset, *row):
        runs = select(records, dataset, *row[:-1]).get(row[-1], {})
        scores = [dict(run.get('eval', {}), knn=run['knn']) for run in runs.values()]
        texts = []
        for key, title in (('knn', ''), ('linear', 'LP '), ('finetune', 'FT ')):
            values = [score[key] for score in scores if key in score]
            if values:
                texts.append(f'{title}{statistics.mean(values):.1f} ({len(values)})')
        return ', '.join(texts)

    head = ('method', 'strategy', 'recipe', 'views', 'M units')
    return table(head, sorted(rows, key=lambda row: (order.index(row[0]), row)), cell)


def speed_up_table(records):
    """Compressed runs of the default recipe against uncompressed ones: its own, or the best's."""
    compared = [('moco', 'p8'), ('moco', 'p8-drop0.50'), ('moco', RELAXED),
                ('simclr', 'p8-drop0.50'), ('simclr', RELAXED), ('dino', 'p8-drop0.50')]
    rows = [(*pair, *rest) for pair, *rest in product(
        compared, ('full', 'small'), ('default', 'best'), (0.08, 0.16, 0.32, 1.28, 4.0))]

    def cell(dataset, method, schedule, views, against, budget):
        base = select(records, dataset, method, 'none')
        if against == 'best':
            base = best_of(records, dataset, method)
        fast = select(records, dataset, method, schedule, '', views)
        return speed_up_text(speed_ups(base, fast, budget))

    return table(('method', 'strategy', 'views', 'against', 'M units'), rows, cell)


def sides(records, dataset, schedule='p8'):
    """(uncompressed runs, those of a strategy): of the chosen recipes once they are judged.

    Until then the best of three uncompressed recipes for each seed, and the default's strategy.
    """
    try:
        base, fast = [select(records, dataset, 'moco', one, chosen(records, dataset, one), 'small')
                      for one in ('none', schedule)]
    except ValueError:
        base, fast = {}, {}
    if set(base.get(0.32, ())) & set(fast.get(0.32, ())):
        return base, fast
    return best_of(records, dataset), select(records, dataset, 'moco', schedule)


def first_table(records):
    """Both sides at 0.32 M, and how many times fewer units and seconds p8 takes."""
    rows = ('uncompressed, tuned, %', '`p8`, the same budget, %',
            '`p8` is as good with so many times fewer units',
            'and so many times fewer seconds (estimate)', 'fewer units against the default alone')
    columns = {}
    for dataset in TITLES:
        base, fast = sides(records, dataset)
        units = speed_ups(base, fast, 0.32)
        default = speed_ups(select(records, dataset, 'moco', 'none'), fast, 0.32)
        columns[dataset] = [
            *(f'{statistics.mean(map(knn, side[0.32].values())):.1f}' for side in (base, fast)),
            speed_up_text(units), speed_up_text(units, UNIT_SECONDS[dataset]),
            speed_up_text(default)]
    return table(['20-NN, ViT of width 64, 0.32 million units, 3 seeds'], [[row] for row in rows],
                 lambda dataset, row: columns[dataset][rows.index(row)])


def verdict_table(records):
    """Small views minus full ones, paired by seed: mean +- standard error (number of pairs)."""
    def cell(dataset, schedule, budget):
        small, full = [select(records, dataset, 'moco', schedule, '', views).get(budget, {})
                       for views in ('small', 'full')]
        gains = [small[seed]['knn'] - full[seed]['knn'] for seed in small if seed in full]
        if len(gains) < 2:
            return ''
        error = statistics.stdev(gains) / len(gains) ** 0.5
        return f'{statistics.mean(gains):+.1f} +- {error:.1f} ({len(gains)})'

    return table(('strategy', 'M units'), product(FAST, (0.08, 0.32)), cell)


def tables(args):
    """Write the page beside the results."""
    records = load_results()
    random = {run['dataset']: {} for run in records}
    for run in records:
        if not run['variant']:                       # of another size, or of another batch order
            random[run['dataset']][run['seed']] = run['curve'][0]['knn']
    page = PAGE.format(
        random=', '.join(f'{title} {statistics.mean(random[dataset].values()):.1f}'
                         for dataset, title in TITLES.items()),
        runs=len(records), units=sum(run['units'] for run in records) / 1e6,
        hours=sum(run['seconds'] for run in records) / 3600,
        first=first_table(records), speed_ups=speed_up_table(records),
        verdict=verdict_table(records), scores=score_table(records))
    RESULTS.with_name('README.md').write_text(page)


PAGE = """# Results

`python experiments/reproduce.py tables` writes this page from runs.jsonl; edits are lost. {runs}
runs, {units:.1f} million units (M), {hours:.1f} hours of training on one or two cores. A unit is one
forward pass of the uncompressed encoder on one image. ViT of width 64 and depth 4, 32 px, patch 4
unless a recipe says otherwise; CIFAR-10 is a JPEG copy. 20-NN: percent of test images whose class
the 20 nearest training images name, with uncompressed features. The network before training:
{random}.
A score has a sampling error of 0.6 to 1.0 points; with 3 seeds a 95 % interval reaches 2.5 standard
deviations to each side. Runs up to commit 8693537 rendered all pixels (views full) and have their
commands in their lines; `python experiments/reproduce.py run STUDY` makes the later ones.

- [runs.jsonl](runs.jsonl): every run, a line each: command, versions, machine, scores
- [first-commands.log](first-commands.log): what the two commands at the top of the README print
- [headline.png](headline.png), [compression.png](compression.png), [gradstats.png](gradstats.png),
  [curves.png](curves.png), [neighbours.png](neighbours.png): `python experiments/pictures.py NAME`,
  the last two of the first commands; stars are single recipes and not joined
- [cat.jpg](cat.jpg): "Chelsea", CC0 by Stefan van der Walt, from scikit-image, at 224 px
- [gradstats.jsonl](gradstats.jsonl): gradient errors on CIFAR-10, uncompressed run of 0.3 M
- [bench.md](bench.md): speed, `python experiments/bench.py`
- [tuning.md](tuning.md): which settings were tried, and why DINO has its own

## The short answer

{first}

Best recipe: until `judge` is collected, that of each seed among the default, batches of 64 and twice
the color jitter, while p8 keeps the default; then one recipe for each side, chosen by other seeds.
Means, +- the standard deviation over seeds; several values are those of the seeds, `>`: the
shortest compressed run is better already. Seconds are units divided by what a unit of p8 takes,
1.28, 1.13, 1.21 times an uncompressed one. "> 16" is one seed, whose uncompressed run
has 60.2 at 0.16 M and 52.4 at 0.32 M; the same command on another day gave 56.2, and a factor of
7.6. Six commands that stand twice differ by up to 3.9 points on shapes: as much as a seed.

## Speed-up at equal accuracy, MoCo-v3, SimCLR, DINO

Budget of an uncompressed run over that at which the compressed runs of the same seed, default
recipe, reach its 20-NN, on a line in the logarithm of the budget. Against the default, or the best
recipe that all compared seeds have (MoCo-v3's three; at 1.28 M two of them; DINO's ours and two
with its own center and local crops). `not reached`: no compressed run, which may be shorter, is as
good.

{speed_ups}

Does the factor change with the budget? Only one set of recipes can tell: with the default and
batches of 64, seed 0, p8 has at 0.08, 0.32, 1.28 M on shapes > 4.0, 6.4, 4.8 (1.8 at 0.08 M against
momentum 0.95), on Fashion-MNIST 2.2, 4.7, 4.9, on CIFAR-10 1.0, 1.8, 3.3.

## Small views: a large patch as the p x p pixels that the encoder reads

20-NN with small views minus that with full ones, seeds paired, +- standard error (pairs).

{verdict}

## The paper's findings

| finding | here | numbers |
| --- | --- | --- |
| 4 times fewer units at equal accuracy | in part | the first table (theirs, read off their figure, by NN: 4.5, 4.4, 3.8, 3.0 for 309 to 1537 M) |
| the factor falls as the budget grows | no | one set of recipes, one seed: it rises on two sets |
| +9.8 points NN, +5.1 LP at equal budget | yes, less | p8 minus the default, NN at 0.32, 1.28 M: CIFAR-10 +4.0, +6.4, Fashion-MNIST +4.1, +4.4, shapes +33.5; minus the best recipe at 0.32 M +3.4, +3.3, +19.1; LP on CIFAR-10 +3.6, +6.8 (2 seeds) |
| constants win early and fall behind schedules | in part | p8-drop0.50@0,p8@0.5 minus the better constant at 0.08, 0.32, 1.28 M: CIFAR-10 +0.1, -0.7, +1.0, Fashion-MNIST -1.0, +0.1, +0.3, shapes -2.2, -2.3 |
| the schedule of least CA-MSE beats constants | by 0.9, one set | CIFAR-10, 0.32 M: 41.9 +- 1.0, p8 41.0 +- 0.8; the 0.3 M that measured it would gain more if spent on p8 |
| 3.3 times with SimCLR | yes, untuned | 4.1, 3.5, 3.1 with p8-drop0.50@0,p8@0.5, 2 seeds, one uncompressed recipe |
| 2.5 times with DINO | cannot tell | it learns little in so short a run |
| better LP and FT with three objectives | two | CIFAR-10, 0.32 M, p8-drop0.50: MoCo-v3 LP +4.1, FT +3.4, SimCLR +6.0, +5.9, DINO +2.6, +1.8 or +0.2, -0.2 by recipe (1 seed) |
| decay 1 - progress^2, not cosine | no difference | Fashion-MNIST: +0.4, +0.2 at 0.08 M, +0.8, -0.5 at 0.32 M (1 seed) |

Seconds are behind units at width 64: by 11 to 19 % with p8 and MoCo-v3, 15 to 25 % with
p8-drop0.50, 19 % with SimCLR, 29 % with DINO; at width 192 a unit costs the same. The second command
of the README ends at 50.2 to 60.4 %, the first at 80 to 86. Choosing among none, p8 and p8-drop0.50
by runs of a quarter of the budget loses 0.15 points on average at 0.32 M (0.22 without shapes),
always p8-drop0.50 0.3, always p8 0.02 on the two real sets; at 1.28 M, without shapes, the trials
lose 0.4 and always p8-drop0.50 0.1.

**Rules that left the project.** From 72 checkpoints (shapes, Fashion-MNIST, 3 seeds, four variants)
training went on under six strategies for 10 % of 0.06 M units, which is 11 uncompressed steps. Rank
correlation of a rule's order with the mean outcome of the other seeds of the same data set, source,
progress and variant, by 20-NN and by uncompressed loss: CA-MSE in Adam's metric 0.36, 0.26; best
length (CA-MSE after the gradient is scaled to its best length) 0.25, 0.80; one fixed order for each
data set 0.49, 0.88; the outcome of one other seed 0.39, 0.87. No rule beat the fixed order. The loss
misleads: on shapes it ranks uncompressed above p8-drop0.50 in 12 of 12 comparisons, 20-NN in 3.
`--schedule auto` measured half way and went on with the best by best length: of 18 runs it could
measure in 12, left p8-drop0.50 in 2, both for the worse, and came within one standard error of the
best constant in 3 of 6 cells, where 5 were the aim. Commit 378dcb8 has `auto`, 8693537 the rules,
`experiments/predict.py` and its table.

## All runs: mean 20-NN (seeds), linear probe (LP) and fine-tuning on 10,000 images (FT)

{scores}
"""  # noqa: E501 (rows of a table)


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser('run', help='train the runs of a study')
    command.set_defaults(action=run_study)
    add = command.add_argument
    add('study', choices=STUDIES)
    add('--datasets', nargs='+', help='only these of the study')
    add('--budgets', nargs='+', type=float, help='only these, in millions of units')
    add('--seeds', nargs='+', type=int, help='only these')
    add('--jobs', type=int, default=1, help='runs at a time; of several, each has one thread')
    add('--data-root', default='data', help='folder of the data sets')
    add('--again', action='store_true', help='also what is in the results')
    add('--eval', action='store_true', help='then score by linear probe and fine-tuning')
    add('--dry-run', action='store_true', help='print the commands')
    commands.add_parser('collect', help='finished runs -> results').set_defaults(action=collect)
    commands.add_parser('tables', help='results -> README.md').set_defaults(action=tables)
    args = parser.parse_args(argv)
    try:
        args.action(args)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f'reproduce.py: error: {error}')


if __name__ == '__main__':
    main()
