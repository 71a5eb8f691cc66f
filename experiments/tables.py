"""From runs to results: one file of all runs, the tables made from it, and the speed-ups.

The speed-up of accelerated runs over an uncompressed one, for one seed:

    a0, b0        final accuracy and budget of the uncompressed run
    a(b)          final accuracy of the accelerated run with budget b, linear in log b in between
    speed-up      b0 / b  at the smallest b with a(b) >= a0

Each point of a(b) is a whole run with its own schedules, since half-way through a longer run the
learning rate is still high. Nothing is extrapolated: where even the shortest accelerated run is
better than a0, the speed-up is only known to be larger than that run's b0 / b, and where none is
as good, a0 is not reached. In seconds it is the same, with the seconds of the runs in place of b.

    crossing([(10, 50.0), (40, 60.0)], 55.0)         # 20: half way in the logarithm
"""
import json
import math
import statistics
import sys
from itertools import groupby
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from pictures import read_lines  # noqa: E402
from weights import quoted, save  # noqa: E402

RESULTS = ROOT / 'experiments' / 'results' / 'runs.jsonl'
TITLES = dict(shapes='shapes', fashion_mnist='Fashion-MNIST', cifar10='CIFAR-10 (JPEG copy)')


# ---------------------------------------------------------------- collect

def read_log(folder):
    """(training lines, score lines) of a run; both are empty before it begins."""
    path = folder / 'log.jsonl'
    steps = []
    scores = []
    if not path.is_file():
        return steps, scores
    for text in path.read_text().splitlines():
        try:
            line = json.loads(text)
        except ValueError:             # a crash left half a line
            break
        kind = scores if 'knn' in line else steps
        kind.append(line)
    return steps, scores


def finished(folder):
    _, scores = read_log(folder)
    return bool(scores) and scores[-1]['progress'] == 1


def record_of(folder):
    """A line of runs.jsonl: what run.json says of the run, and its scores."""
    record = json.loads((folder / 'run.json').read_text())
    steps, scores = read_log(folder)
    last = scores[-1]
    record['samples'] = steps[-1]['samples']
    for key in ('units', 'seconds', 'nn', 'knn'):
        record[key] = round(last[key], 2)
    # over the budget, from the random network on; accuracies in percent
    record['curve'] = [dict(units=round(line['units']), seconds=round(line['seconds'], 1),
                            nn=round(line['nn'], 2), knn=round(line['knn'], 2)) for line in scores]
    # the strategies, and the progress at which each is first in the log
    record['strategies'] = {}
    for line in steps:
        record['strategies'].setdefault(line['query'], round(line['progress'], 3))
    scores = scores_of(folder)
    if scores:
        record['eval'] = scores
    return record


def scores_of(folder):
    """{protocol: score} of eval.py, in percent."""
    path = folder / 'eval.jsonl'
    if not path.exists():
        return {}
    return {line['name']: round(line['score'], 2) for line in read_lines(path)}


def collect(runs, path):
    """Add the finished runs in the folder `runs` to the file of results.

    A run is known by its name: one that is there already is replaced by what its folder says now.
    """
    records = {}
    if path.exists():
        records = {record['name']: record for record in load_results(path)}
    before = len(records)
    done = 0
    for note in sorted(runs.glob('*/run.json')):
        if finished(note.parent):
            record = record_of(note.parent)
            records[record['name']] = record
            done += 1
    if not records:
        raise FileNotFoundError(f'no finished run of a study below {quoted(runs)}; begin with '
                                f'python experiments/reproduce.py run headline')
    text = ''.join(json.dumps(records[name]) + '\n' for name in sorted(records))
    save(text, path)
    print(f'{done} finished runs in {quoted(runs)}; {quoted(path)} has {len(records)}, '
          f'{len(records) - before} of them new')


def load_results(path=RESULTS):
    """The records of runs.jsonl."""
    if not path.is_file():
        raise FileNotFoundError(f'no results at {quoted(path)}; python experiments/reproduce.py '
                                f'collect makes them from finished runs')
    records = read_lines(path)
    if not records:
        raise ValueError(f'{quoted(path)} holds no runs')
    return records


def select(records, dataset, row):
    """{budget: {seed: record}} of a row of a study, by rising budget."""
    wanted = (dataset, row.method, row.schedule, row.variant)
    found = {}
    for record in sorted(records, key=lambda record: (record['budget'], record['seed'])):
        kind = tuple(record[key] for key in ('dataset', 'method', 'schedule', 'variant'))
        if kind == wanted:
            by_seed = found.setdefault(record['budget'], {})
            by_seed[record['seed']] = record
    return found


def best_of(records, dataset, rows):
    """{budget: {seed: record}} of the best run by 20-NN of each seed, whichever row it belongs to.

    Compared are the rows that have runs at a budget, on the seeds that all of these have. Where
    only one of several rows has any there is nothing to compare, and nothing is returned.
    """
    runs_of = [select(records, dataset, row) for row in rows]
    best = {}
    for budget in sorted(set().union(*runs_of)):
        compared = [by_budget[budget] for by_budget in runs_of if budget in by_budget]
        seeds = sorted(set.intersection(*map(set, compared)))
        if len(compared) >= min(2, len(rows)) and seeds:
            best[budget] = {seed: max((by_seed[seed] for by_seed in compared),
                                      key=lambda run: run['knn']) for seed in seeds}
    return best


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
            part = (target - y0) / (y1 - y0)
            return x0 * (x1 / x0) ** part
    return math.inf


def speed_ups(base, fast, budget, clock):
    """{seed: (sign, ratio)} of the seeds with shorter runs; the sign is '', '>' or 'not reached'.

    base, fast: {budget: {seed: record}} of the uncompressed and of the accelerated runs. budget:
    that of the uncompressed run. clock: 'units' or 'seconds'.
    """
    outcomes = {}
    for seed, reference in base[budget].items():
        runs = [by_seed[seed] for by_seed in fast.values() if seed in by_seed]
        if not runs or runs[0]['budget'] >= budget:
            continue                   # nothing shorter was run
        points = [(run[clock], run['knn']) for run in runs]
        x = crossing(points, reference['knn'])
        if x == math.inf:
            outcomes[seed] = ('not reached', 0.0)
        elif x == -math.inf:
            outcomes[seed] = ('>', reference[clock] / points[0][0])
        else:
            outcomes[seed] = ('', reference[clock] / x)
    return outcomes


def speed_up_text(outcomes):
    """'6.1 +- 0.4' if every seed has a number; else the bound that all share, or what each says."""
    outcomes = outcomes.values()
    signs = {sign for sign, _ in outcomes}
    ratios = [ratio for _, ratio in outcomes]
    if signs == {''}:
        return mean_and_spread(ratios, 1)
    if signs == {'>'}:
        return f'> {min(ratios):.1f}'
    if signs == {'not reached'}:
        return 'not reached'
    texts = [sign if sign == 'not reached' else f'{sign} {ratio:.1f}' for sign, ratio in outcomes]
    return ', '.join(text.strip() for text in texts)


def is_timed(run):
    """Whether the seconds of a run are worth something: no other run shared the machine."""
    return run['machine']['runs_at_once'] == 1


def timed(runs):
    """{budget: {seed: record}} of the timed ones alone."""
    return {budget: {seed: run for seed, run in by_seed.items() if is_timed(run)}
            for budget, by_seed in runs.items()}


def speed_up_lines(records, dataset, row, base, against):
    """A line for each budget of the uncompressed runs `base`, the largest first."""
    fast = select(records, dataset, row)
    for budget in sorted(base, reverse=True):
        units = speed_ups(base, fast, budget, 'units')
        seconds = speed_ups(timed(base), timed(fast), budget, 'seconds')
        if units:
            accuracy = mean_and_spread([base[budget][seed]['knn'] for seed in units])
            yield [row.method, label(row), against, f'{budget:g}', accuracy, len(units),
                   speed_up_text(units), speed_up_text(seconds) or '-']


def speed_up_table(records, dataset, rows):
    """Each accelerated row against the uncompressed one before it, or the best of those there."""
    lines = []
    for uncompressed, group in groupby(rows, key=lambda row: row.schedule == 'none'):
        group = list(group)
        if uncompressed:
            base = best_of(records, dataset, group)
            against = label(group[0]) if len(group) == 1 else 'the best recipe'
            continue
        for row in group:
            lines += speed_up_lines(records, dataset, row, base, against)
    head = ['method', 'schedule', 'against', 'its budget, M', 'its 20-NN, %', 'n',
            'times fewer units', 'times fewer seconds']
    return markdown(head, lines)


# ---------------------------------------------------------------- short runs as a rule

def constant_scores(records, dataset, rows):
    """{budget: {schedule: {seed: final 20-NN}}} of the strategies that never change."""
    scores = {}
    for row in rows:
        if '@' in row.schedule:
            continue
        for budget, by_seed in select(records, dataset, row).items():
            final = {seed: run['knn'] for seed, run in by_seed.items()}
            scores.setdefault(budget, {})[row.schedule] = final
    return scores


def points_lost(long, schedule, seed):
    """By how much a schedule is behind the best of the long runs, by those of the other seeds."""
    means = {name: statistics.mean(score for other, score in final.items() if other != seed)
             for name, final in long.items()}
    return max(means.values()) - means[schedule]


def pilot_table(records, dataset, rows):
    """What seeds lose that choose by a run of a quarter of the budget, or the same one always.

    A line for each budget at which all constant strategies have two seeds, as at its quarter.
    """
    schedules = [row.schedule for row in rows if '@' not in row.schedule]
    scores = constant_scores(records, dataset, rows)
    complete = [budget for budget, finals in scores.items()
                if len(finals) == len(schedules) and min(map(len, finals.values())) > 1]

    def points(long, chosen):
        """chosen: {seed: schedule}"""
        lost = [points_lost(long, schedule, seed) for seed, schedule in chosen.items()]
        return ', '.join(f'{value:.1f}' for value in lost)

    def choose(short, seed):
        return max(short, key=lambda schedule: short[schedule][seed])

    lines = []
    for budget in sorted(complete):
        if budget / 4 not in complete:               # exact: only the exponent differs
            continue
        short, long = scores[budget / 4], scores[budget]
        seeds = sorted(set.intersection(*map(set, short.values())))
        chosen = {seed: choose(short, seed) for seed in seeds}
        always = [points(long, dict.fromkeys(sorted(final), schedule))
                  for schedule, final in long.items()]
        lines.append([f'{budget:g}', ', '.join(chosen.values()), points(long, chosen), *always])
    head = ['budget, M', 'chosen, by each seed', 'points lost']
    return markdown([*head, *(f'always {schedule}' for schedule in schedules)], lines)


# ---------------------------------------------------------------- tables

def mean_and_spread(values, digits=2):
    text = f'{statistics.mean(values):,.{digits}f}'
    if len(values) > 1:
        text += f' +- {statistics.stdev(values):,.{digits}f}'
    return text


def markdown(head, lines):
    """A table, or nothing without lines."""
    if not lines:
        return ''
    rows = [head, ['---'] * len(head), *lines]
    return '\n'.join(f'| {" | ".join(map(str, row))} |' for row in rows)


def label(row):
    return f'{row.schedule}, {row.variant}' if row.variant else row.schedule


def score_table(records, dataset, rows):
    """A line for each row and budget. Scores of eval.py have columns if any run has them."""
    runs_of = {}
    for row in rows:
        for budget, by_seed in select(records, dataset, row).items():
            runs_of[row, budget] = list(by_seed.values())
    protocols = {name: None for runs in runs_of.values() for run in runs
                 for name in run.get('eval', {})}
    lines = []
    for (row, budget), runs in sorted(runs_of.items(), key=lambda item: item[0][1]):
        line = [row.method, label(row), f'{budget:g}', len(runs)]
        for key, digits in (('samples', 0), ('seconds', 0), ('nn', 2), ('knn', 2)):
            values = [run[key] for run in runs if key != 'seconds' or is_timed(run)]
            line.append(mean_and_spread(values, digits) if values else '-')
        for name in protocols:
            scores = [run['eval'][name] for run in runs if name in run.get('eval', {})]
            line.append(mean_and_spread(scores) if scores else '')
        lines.append(line)
    head = ['method', 'schedule', 'budget, M', 'n', 'samples', 'seconds', 'NN, %', '20-NN, %']
    return markdown([*head, *(f'{name}, %' for name in protocols)], lines)


def section(title, records, studies, table):
    """The tables of some studies, one for each data set, under their commands; '' without any."""
    parts = [f'## {title}']
    for name, study in studies.items():
        for dataset in study.datasets:
            # rows shared with another study do not make a table of their own
            if not any((r['study'], r['dataset']) == (name, dataset) for r in records):
                continue
            text = table(records, dataset, study.rows)
            if text:
                command = f'python experiments/reproduce.py run {name} --datasets {dataset}'
                parts += [f'{TITLES[dataset]}: `{command}`', text]
    return '\n\n'.join(parts) if parts[1:] else ''


def random_score(records, dataset):
    """20-NN of the toy network before training, in percent, mean over seeds; None without runs."""
    scores = {record['seed']: record['curve'][0]['knn'] for record in records
              if record['dataset'] == dataset and record['study'] != 'gpu'}
    return statistics.mean(scores.values()) if scores else None


FILES = {
    'runs.jsonl': 'every run, a line each: command, versions, machine, scores over the budget',
    'first-commands.log': 'what the two commands at the top of the README printed',
    'headline.png': '`python experiments/figures.py headline`; open markers: one seed',
    'decay.png': '`python experiments/figures.py decay`',
    'compression.png': '`python pictures.py compression`',
    'cost.png': '`python pictures.py cost`',
    'bench.md': '`python experiments/bench.py`: speed of the views, of a step, of the encoder, '
                'of whole runs',
    'gradstats.jsonl': '`python train.py --dataset folder --data-root data/cifar10 --schedule none '
                       '--gradstats 0.05,0.25,0.5,0.75,1`: gradient errors',
    'gradstats.png': '`python pictures.py gradstats experiments/results/gradstats.jsonl`',
    'tuning.md': 'which settings and schedules were tried, and why DINO has its own',
    'auto.md': 'a flag that measured half way and went on with the best: 18 runs, and why it left',
    'predict.jsonl': '`python experiments/predict.py`: which rule foretells the best strategy?',
    'predict.md': 'the same, its table',
    'predict.png': 'the same, its figure',
}

INTRODUCTION = """# Results

`python experiments/reproduce.py tables` writes this page from runs.jsonl; edits are lost. Above
each table stands the command that makes its runs; data sets with files need `--data-root` as well.
Budgets are in millions of units, forward passes of the uncompressed encoder on one image. NN and
20-NN are the percentages of test images whose class the nearest training images name, always with
uncompressed features. Numbers are means over n seeds, +- the standard deviation. Seconds are those
of training, without scoring, of runs that had the machine to themselves; `-`: there are none.
runs.jsonl has the machine of each run. linear: a linear classifier of the features; finetune: all
weights, on 10,000 labelled images (eval.py)."""

SPEED_UPS = """The budget of an uncompressed run, divided by the budget at which the accelerated
runs of the same seed have its final 20-NN accuracy, on a line in the logarithm of the budget. `>
x`: the shortest accelerated run is better already. `not reached`: the longest one, whose budget
may be smaller, is below. Several values in a cell are those of the seeds. Against the best recipe:
for each seed, the uncompressed run of the study with the highest 20-NN. Times fewer seconds: the
same on the seconds of training; few seeds were timed.

The authors' numbers for ImageNet-1k and ViT-B, read off their figure (+- 0.1 point), not run here.
From them follow 4.5, 4.4, 3.8 and 3.0 times fewer units by NN for the four accelerated runs, on
such lines between the uncompressed ones (5.2, 4.6, 4.1 and 3.2 on lines in the budget itself).

| theirs: MoCo-v3, M units | NN, LP | accelerated, M units | NN, LP |
| --- | --- | --- | --- |
| 1022 | 50.3, 70.3 | 309 | 52.8, 71.8 |
| 3088 | 59.1, 75.0 | 620 | 58.2, 74.3 |
| 6157 | 61.9, 76.0 | 1027 | 60.1, 75.4 |
| | | 1537 | 60.7, 75.9 |"""


PILOTS = """Each seed chooses the constant strategy whose run of a quarter of the budget has the
best 20-NN. The runs of the other seeds at the whole budget say how many points this loses, seed by
seed, and how many each strategy loses that is always taken, without a short run."""


def write_page(studies, path):
    """README.md beside the results: index, speed-ups, then the scores of each study."""
    records = load_results(path)
    files = [f'- [{name}]({name}): {what}' for name, what in FILES.items()
             if (path.parent / name).exists()]
    random = {TITLES[dataset]: random_score(records, dataset) for dataset in TITLES}
    random = [f'{title} {score:.1f} %' for title, score in random.items() if score]
    names = ('headline', 'tuned', 'timed', 'objectives', 'dino', 'gpu')
    compared = {name: studies[name] for name in names}
    page = [
        INTRODUCTION,
        f'20-NN of the network before training: {", ".join(random)}.',
        '\n'.join(files),
        section(f'Speed-up at equal accuracy\n\n{SPEED_UPS}', records, compared, speed_up_table),
    ]
    headline = {'headline': studies['headline']}
    page.append(section(f'Short runs as a rule\n\n{PILOTS}', records, headline, pilot_table))
    for name, study in studies.items():
        page.append(section(name, records, {name: study}, score_table))
    output = path.with_name('README.md')
    save('\n\n'.join(part for part in page if part) + '\n', output)
    print(quoted(output))
