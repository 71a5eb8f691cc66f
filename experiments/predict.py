"""Does a look at a state of training foretell which strategy trains best?

    python experiments/predict.py run --datasets shapes fashion_mnist
    python experiments/predict.py table
    python experiments/predict.py figure

A state is a run under a source strategy at some progress. From each state and
for each of STRATEGIES, `run` measures

    statistics   of the gradient, in both metrics: what the rules of schedule.py
                 read
    rollout      what training on for ROLLOUT of the budget gains, on other
                 batches than the truth
    truth        what training on for MORE of the budget leads to

The uncompressed loss is measured on the same HELD_OUT batches of test images
and views for all. It comes in two kinds: with the student's query, as in
training, and with the EMA teacher's encoder and projector in the query branch
too. The predictor has no EMA copy, so it is the student's. The gain of a
rollout is the loss that it took away per unit spent. The truth has 20-NN beside
the losses.

`table` lets every rule order the strategies, and compares the order with the
mean truth of the *other seeds* of the same data set, source and progress, which
no rule has seen. It shows Spearman's rank correlation, and the regret of the
first choice: 0 for the best strategy, 1 for the worst. One seed's own truth,
compared in the same way, is the ceiling. A state without other seeds is
compared with its own truth, and has no ceiling.

Shapes: t strategies, in the order of STRATEGIES.
"""
import contextlib
import copy
import functools
import io
import json
import shutil
import signal
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import asdict, dataclass
from functools import partial

import torch

from tables import ROOT, markdown
import pictures
import train
from commandline import Parser, count, count_or_zero, fail, positive
from data import load
from eval import knn_accuracy
from gradstats import adam_scale, flat_gradient, gradient_stats, unchanged
from losses import info_nce
from schedule import RULES, Schedule
from views import keyed_generator, make_views, normalize, recipe

STRATEGIES = ('p4', 'p4-drop0.50', 'p8', 'p8-drop0.50', 'p8-drop0.75', 'p16')
SOURCES = ('p4', 'p8-drop0.50')
POINTS = (0.1, 0.4, 0.8)        # progress
MORE = 0.1                      # of the budget, to know the truth
ROLLOUT = 0.01
PROBES = 16                     # batches for the statistics of each strategy
HELD_OUT = 8                    # batches for the loss, of 128 test images each
BANK = 2_500                    # images for 20-NN
QUERIES = 2_400
VARIANTS = {
    'default': ['--lr', '4e-3'],    # the rate of the states in predict.jsonl
    'half-lr': ['--lr', '2e-3'],
    'batch-64': ['--lr', '4e-3', '--batch-size', '64'],
}
FLOORS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
TRUTHS = {
    'student': 'uncompressed loss',
    'teacher': 'uncompressed loss of the EMA teacher',
    'error': '20-NN error, %',
}
RESULTS = ROOT / 'experiments' / 'results'
LINES = RESULTS / 'predict.jsonl'


# ---------------------------------------------------------------- a state and what follows from it

@functools.cache
def images_of(dataset, root):
    """A data set, read or rendered once for all runs of this process."""
    return load(dataset, root)


def silent():
    """A run says what it is going to do. Hundreds of short ones need not."""
    return contextlib.redirect_stdout(io.StringIO())


def new_run(args, dataset, source, seed):
    """A run at step 0. Its folder, runs/predict, is that of the next run too."""
    shutil.rmtree('runs/predict', ignore_errors=True)
    # --gradstats lets the run know the costs of the grid; nobody trains as far as 1
    text = (f'--name predict --dataset {dataset} --data-root {args.data_root} --device cpu '
            f'--seed {seed} --budget {args.budget} --schedule {source} --eval-every 0 '
            f'--gradstats 1 --grid {",".join(STRATEGIES)}')
    flags, _ = train.parse_args([*text.split(), *VARIANTS[args.variant]])
    train.load = lambda name, root, *rest: images_of(name, root)
    with silent():
        return train.set_up(flags, None)


def train_on(run, strategy, share):
    """Train on under one strategy for a share of the budget, in whole steps: at least one."""
    schedule = Schedule.parse(strategy)
    step_cost = run.plan.cost[schedule.at(0)] * run.args.batch_size
    steps = round(share * run.plan.budget / step_cost)
    run.plan.schedule = schedule
    run.args.max_steps = run.state.step + max(1, steps)
    with silent():
        status = train.train(run)
    # train finishes its step when it is told to stop; all else here may stop at once
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    if status:
        sys.exit('predict.py: stopped; the same command goes on')


def gradient_rows(run):
    """{strategy: {metric: row}}, rows as train.measure_gradients makes them.

    Here both metrics share the gradients, which take most of the time.
    """
    keys = train.random_batches(run, PROBES)
    batches = run.data.batches(keys, run.plan.views, run.args.seed, run.device)
    images = list(batches)

    @functools.cache
    def grad_fn(i, tau):
        key = ('probe', run.state.step, i)
        loss, _ = train.loss_of(run, run.method, images[i], tau, *key)
        return flat_gradient(loss, run.parameters)

    adam = adam_scale(run.optimizer, run.parameters)
    base = run.plan.base
    rows = defaultdict(dict)
    for metric, scale in dict(euclidean=None, adam=adam).items():
        with unchanged(run.method):
            stats = gradient_stats(grad_fn, run.plan.grid, base, range(PROBES), scale=scale)
        for tau, stat in stats.items():
            cost = run.plan.cost[tau] / run.plan.cost[base]
            rows[str(tau)][metric] = dict(cost=cost, **asdict(stat))
    return rows


@functools.cache
def held_out_views(dataset, root):
    """Batches of two views (128 c side side) of test images, the same for all states."""
    data = images_of(dataset, root)
    batches = []
    for i in range(HELD_OUT):
        generator = keyed_generator('predict', i)
        ids = torch.randperm(len(data.test_images), generator=generator)
        images = data.test_images[ids[:128]]
        views = make_views(images, recipe('moco', 32), generator)
        views = [normalize(view, data.mean, data.std) for view in views]
        batches.append(views)
    return batches


@torch.no_grad()
def held_out_losses(run):
    """Uncompressed loss with the student's query, and with the teacher's."""
    method = run.method
    student = []
    teacher = []
    # BatchNorm normalizes by the batch, as in training
    with unchanged(method):
        for x1, x2 in held_out_views(run.args.dataset, run.args.data_root):
            k = method.teacher_projector(method.teacher(x2))
            q = method.predictor(method.projector(method.student(x1)))
            student.append(info_nce(q, k, method.temperature).item())
            q = method.predictor(method.teacher_projector(method.teacher(x1)))
            teacher.append(info_nce(q, k, method.temperature).item())
    return dict(student=statistics.mean(student), teacher=statistics.mean(teacher))


def follow(run, start, strategy, before):
    """What comes of a strategy from the state `start`: rollout and truth."""
    seed = run.args.seed
    train.restore(run, copy.deepcopy(start))
    run.args.seed = seed + 1000             # other batches, views and token draws
    train_on(run, strategy, ROLLOUT)
    run.args.seed = seed
    after = held_out_losses(run)
    spent = run.state.units - start['state']['units']
    rollout = {name: (before[name] - after[name]) / spent for name in after}

    train.restore(run, copy.deepcopy(start))
    train_on(run, strategy, MORE)
    scores, _, _ = knn_accuracy(run.method.encoder, run.data, run.args.img_size, run.device,
                                bank_limit=BANK, query_limit=QUERIES)
    error = 100 - scores[20]
    return dict(rollout=rollout, error=error, **held_out_losses(run))


def study(args, dataset, source, seed, done):
    """Train one run to its last missing point, and add the lines of its missing states."""
    names = dict(dataset=dataset, variant=args.variant, source=source, seed=seed)
    missing = [point for point in POINTS if (*names.values(), point) not in done]
    if not missing:
        return
    run = new_run(args, dataset, source, seed)
    for point in POINTS:
        if point > missing[-1]:
            break
        train_on(run, source, point - run.progress)
        if point not in missing:
            continue
        began = time.perf_counter()
        start = copy.deepcopy(train.snapshot(run))
        rows = gradient_rows(run)
        before = held_out_losses(run)
        lines = []
        for tau in STRATEGIES:
            results = follow(run, start, tau, before)
            line = dict(names, point=point, budget=args.budget, strategy=tau, before=before)
            lines.append(dict(line, **rows[tau], **results))
        train.restore(run, copy.deepcopy(start))
        with open(LINES, 'a') as file:
            file.writelines(json.dumps(line) + '\n' for line in lines)
        seconds = time.perf_counter() - began
        losses = ', '.join(f'{line["strategy"]} {line["student"]:.3f}' for line in lines)
        print(f'{dataset} {source} seed {seed} at {point}, {seconds:.0f} s: {losses}', flush=True)


def run_states(args):
    """Train what is missing. The same command goes on where it was stopped."""
    states = read_states() if LINES.exists() else []
    budgets = {state.budget for state in states}
    if budgets - {args.budget}:
        raise ValueError(f'{LINES} has states of the budgets {budgets}, not {args.budget}; '
                         f'move it away first')
    done = {state.key for state in states}
    torch.set_num_threads(args.threads)
    for seed in args.seeds:
        for dataset in args.datasets:
            for source in args.sources:
                study(args, dataset, source, seed, done)


# ---------------------------------------------------------------- what the lines say of a state

@dataclass
class State:
    """A state, with what was measured for each strategy."""
    dataset: str
    variant: str
    source: str
    seed: int
    point: float
    budget: float
    lines: dict                     # {strategy: line}

    @property
    def key(self):
        return self.dataset, self.variant, self.source, self.seed, self.point

    @property
    def group(self):
        """What states have in common that differ in the seed alone."""
        return self.dataset, self.variant, self.source, self.point

    def column(self, *names):
        """One entry (t) of each strategy's line, names from the outside in."""
        entries = [self.lines[tau] for tau in STRATEGIES]
        for name in names:
            entries = [entry[name] for entry in entries]
        return entries


def read_states():
    """All states whose lines are complete."""
    states = {}
    for line in pictures.read_lines(LINES):
        names = ('dataset', 'variant', 'source', 'seed', 'point', 'budget')
        state = State(*[line[name] for name in names], lines={})
        states.setdefault(state.key, state)
        states[state.key].lines[line['strategy']] = line
    return [state for state in states.values() if len(state.lines) == len(STRATEGIES)]


def means(columns):
    """(t) from columns (n t)"""
    return [statistics.mean(entries) for entries in zip(*columns)]


def ranks(values):
    """0 for the least; equal values share their mean rank."""
    order = sorted(values)
    return [order.index(x) + (order.count(x) - 1) / 2 for x in values]


def spearman(a, b):
    """The correlation of the ranks; 0 if one side tells nothing apart."""
    if min(len(set(a)), len(set(b))) == 1:
        return 0.0
    return statistics.correlation(ranks(a), ranks(b))


# ---------------------------------------------------------------- rules, baselines and the ceiling
# Each takes (state, all states, name of the truth) and returns a value for each strategy
# (t), the least for its first choice, or None if it has nothing to go by.

def rule(name, metric, state, states, truth):
    # norm2 scales all strategies alike. Early on noise can make it negative, and a negative scale
    # would turn the order around.
    rows = [dict(row, norm2=1) for row in state.column(metric)]
    return [RULES[name](row)[0] for row in rows]


def cost_of_gain(state, states, truth):
    """Compute for the same first-order decrease of the wanted loss, up to a common factor.

    c(tau) / slope(tau): what is saved is spent on more steps, and not on larger batches.
    """
    costs = state.column('adam', 'cost')
    slopes = state.column('adam', 'slope')
    # a slope that is lost in noise or rises comes last
    return [cost / slope if slope > 0 else 1e9 for cost, slope in zip(costs, slopes)]


def gain_above(floor, state, states, truth):
    """The gain, but a gradient that points too far off comes after all others."""
    values = cost_of_gain(state, states, truth)
    cosines = state.column('adam', 'cosine')
    last = 1e12                             # above any value of a gain
    return [value + last * (cosine < floor) for value, cosine in zip(values, cosines)]


def gain_with_floor(state, states, truth):
    """The gain with that floor which does best on the other data sets."""
    others = [other for other in states if other.dataset != state.dataset]
    if not others:
        return None

    def score(floor):
        verdicts = judge(partial(gain_above, floor), others, truth)
        return statistics.mean(verdict.correlation for verdict in verdicts.values())

    best = max(FLOORS, key=score)
    return gain_above(best, state, states, truth)


def rollout(name, state, states, truth):
    return [-gain for gain in state.column('rollout', name)]


def cheapest_first(state, states, truth):
    return state.column('adam', 'cost')


def dearest_first(state, states, truth):
    return [-cost for cost in cheapest_first(state, states, truth)]


def constant_order(state, states, truth, same):
    """The mean ranks in the states that do not have this attribute in common."""
    orders = [ranks(other.column(truth)) for other in states
              if getattr(other, same) != getattr(state, same)]
    return means(orders) if orders else None


def order_of_data_set(state, states, truth):
    """The mean ranks in the other states of the same data set."""
    relatives = [other for other in states if other.dataset == state.dataset]
    return constant_order(state, relatives, truth, same='group')


def own_truth(state, states, truth):
    return state.column(truth) if other_seeds(state, states) else None


CONSTANT = 'baseline: constant order'
CEILING = 'ceiling: the truth of one seed'
PREDICTORS = {
    'CA-MSE, Euclidean': partial(rule, 'ca-mse', 'euclidean'),
    'CA-MSE, Adam': partial(rule, 'ca-mse', 'adam'),
    'best length, Euclidean': partial(rule, 'best-length', 'euclidean'),
    'best length, Adam': partial(rule, 'best-length', 'adam'),
    'gain': cost_of_gain,
    'gain, floor on the cosine': gain_with_floor,
    'rollout, student': partial(rollout, 'student'),
    'rollout, EMA teacher': partial(rollout, 'teacher'),
    CONSTANT: partial(constant_order, same='group'),
    'baseline: constant order, this data set': order_of_data_set,
    'baseline: of the other data set': partial(constant_order, same='dataset'),
    'baseline: cheapest first': cheapest_first,
    'baseline: most expensive first': dearest_first,
    CEILING: own_truth,
}


@dataclass
class Verdict:
    dataset: str
    correlation: float              # Spearman's, of an order with the truth
    regret: float                   # of its first choice


def other_seeds(state, states):
    return [other for other in states if other.group == state.group and other.seed != state.seed]


def judge(predictor, states, truth):
    """{key of the state: Verdict}, for those states in which the predictor says something."""
    verdicts = {}
    for state in states:
        values = predictor(state, states, truth)
        if values is None:
            continue
        witnesses = other_seeds(state, states) or [state]
        real = means([other.column(truth) for other in witnesses])
        choice = real[values.index(min(values))]
        regret = (choice - min(real)) / (max(real) - min(real))
        verdicts[state.key] = Verdict(state.dataset, spearman(values, real), regret)
    return verdicts


# ---------------------------------------------------------------- table

def cell(values, digits=2):
    """'mean +- standard deviation'"""
    values = list(values)
    if not values:
        return ''
    text = f'{statistics.mean(values):.{digits}f}'
    if len(values) > 1:
        text += f' +- {statistics.stdev(values):.{digits}f}'
    return text


def duel(verdicts, constant):
    """'a : b', the states in which an order is closer to the truth than the constant one, and
    those in which it is further away."""
    closer = 0
    further = 0
    for key, verdict in verdicts.items():
        if key in constant:
            difference = verdict.correlation - constant[key].correlation
            closer += difference > 1e-9
            further += difference < -1e-9
    return f'{closer} : {further}'


def compare(states, truth):
    """The table of all predictors against one truth."""
    datasets = sorted({state.dataset for state in states})
    constant = judge(PREDICTORS[CONSTANT], states, truth)
    rows = []
    for name, predictor in PREDICTORS.items():
        verdicts = judge(predictor, states, truth)
        row = [name, len(verdicts)]
        for some in (datasets, *([dataset] for dataset in datasets)):
            chosen = [v for v in verdicts.values() if v.dataset in some]
            row.append(cell(v.correlation for v in chosen))
            row.append(cell(v.regret for v in chosen))
        rows.append([*row, duel(verdicts, constant)])
    head = ['ordered by', 'states']
    for where in ('all', *datasets):
        head += [f'{where}: rank correlation', 'regret']
    return markdown([*head, 'closer : further than constant'], rows)


def truths(states, truth):
    """The table of what training on led to, over the seeds of each group; the best is bold."""
    digits = 1 if truth == 'error' else 3
    rows = []
    for group in sorted({state.group for state in states}):
        seeds = [state for state in states if state.group == group]
        columns = [state.column(truth) for state in seeds]
        cells = [cell(entries, digits) for entries in zip(*columns)]
        average = means(columns)
        best = average.index(min(average))
        cells[best] = f'**{cells[best]}**'
        rows.append([*group, len(seeds), *cells])
    return markdown(['data set', 'variant', 'from', 'progress', 'seeds', *STRATEGIES], rows)


def table(args):
    """Print the tables, and write them to experiments/results/predict.md."""
    states = read_states()
    about = __doc__.split('\n\n')[-2].replace('\n', ' ')
    parts = ['# Does a look at a state foretell which strategy trains best from there?',
             f'`python experiments/predict.py`, {len(states)} states. {about}',
             'The constant order is that of the mean ranks in all states but those of the same '
             'data set, source and progress; the last column counts the states in which a rank '
             'correlation is higher or lower than its. Means +- standard deviations over states.']
    for truth, title in TRUTHS.items():
        parts += [f'## By {title}', compare(states, truth),
                  f'After training on for {MORE:.0%} of the budget:', truths(states, truth)]
    text = '\n\n'.join(parts) + '\n'
    print(text)
    (RESULTS / 'predict.md').write_text(text)


# ---------------------------------------------------------------- figure

def draw(axis, states, measure, looks):
    """A row for each rule and baseline: a point for each state, a large one for their mean."""
    for row, name in enumerate(PREDICTORS):
        verdicts = judge(PREDICTORS[name], states, 'student')
        for i, (dataset, look) in enumerate(looks.items()):
            x = [getattr(v, measure) for v in verdicts.values() if v.dataset == dataset]
            if not x:                       # one seed has no ceiling
                continue
            y = row + 0.3 * i - 0.15
            label = dataset if row == 0 else None
            axis.plot(x, [y] * len(x), linestyle='', alpha=0.3, **look)
            axis.plot(statistics.mean(x), y, linestyle='', markersize=8, label=label, **look)
    rules = sum(':' not in name for name in PREDICTORS)
    axis.axhline(rules - 0.5, color='black', linewidth=1)
    axis.set_yticks(range(len(PREDICTORS)), PREDICTORS)


def figure(args):
    """Draw rules against the truth: experiments/results/predict.png."""
    states = read_states()
    looks = pictures.looks(sorted({state.dataset for state in states}))
    drawing = pictures.new_figure(5)
    left, right = drawing.subplots(1, 2, sharey=True)
    draw(left, states, 'correlation', looks)
    draw(right, states, 'regret', looks)
    left.set(xlabel='rank correlation with the loss later on', xlim=(-1.05, 1.05))
    right.set(xlabel='regret of the first choice', xlim=(-0.05, 1.05))
    left.invert_yaxis()
    handles, labels = left.get_legend_handles_labels()
    drawing.legend(handles, labels, loc='outside lower center', ncols=2)
    pictures.save_figure(drawing, RESULTS / 'predict.png')


# ---------------------------------------------------------------- command line

def parse_args(argv):
    parser = Parser(__doc__)
    commands = parser.add_subparsers(required=True, metavar='COMMAND')
    for name, action in (('run', run_states), ('table', table), ('figure', figure)):
        command = commands.add_parser(name, description=action.__doc__, help=action.__doc__)
        command.set_defaults(action=action)
    command = commands.choices['run']
    command.add_argument('--datasets', nargs='+', default=['shapes', 'fashion_mnist'])
    command.add_argument('--data-root', default='data', help='folder of the data sets')
    command.add_argument('--seeds', nargs='+', type=count_or_zero, default=[0, 1, 2])
    command.add_argument('--sources', nargs='+', default=SOURCES, choices=SOURCES)
    command.add_argument('--variant', choices=VARIANTS, default='default')
    command.add_argument('--budget', type=positive, default=0.06, help='millions of units')
    command.add_argument('--threads', type=count, default=1)
    return parser.parse_args(argv)


def main(argv=None):
    args = parse_args(argv)
    try:
        args.action(args)
    except (ValueError, OSError) as error:
        fail(f'predict.py: error: {error}')


if __name__ == '__main__':
    main()
