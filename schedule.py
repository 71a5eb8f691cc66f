"""What happens when: curves over training progress, and how much to compress at which progress.

Progress is spent budget / total budget, in [0, 1]. Every schedule runs on it, so that runs with
different compression stay comparable (paper, "training budget").

    cosine       (1 + cos(pi p)) / 2
    polynomial   1 - p^alpha            alpha = 2 keeps a higher rate for longer than cosine
    ramp         end + (start - end) cosine(p)

The acceleration schedule (paper, "optimal acceleration schedule", as we read it) comes from a table
of gradient errors (gradstats.py). The compute of one uncompressed batch pays for 1 / c(tau) batches
of tau, whose average has a smaller variance and the same bias:

    CA-MSE(tau, p) = bias^2(tau, p) + c(tau) variance(tau, p)
    schedule       = argmin over paths tau(p) of  sum_p CA-MSE(tau(p), p) / norm2(p),
                     c(tau(p)) never falling

The sum over p and the cost that never falls are our choice. So are the ties: what the error bars
cannot tell from the best counts as equal to it, and the cheaper one wins.

Here c(tau) is the sample cost relative to the uncompressed one. RULES holds a second rule, ours:
best-length foretells the uncompressed loss better, 20-NN no better (experiments/predict.py).

    python schedule.py runs/NAME/gradstats.jsonl       # the table, the path, what it predicts

    schedule = Schedule.parse('p8-drop0.50@0,p4@0.7')
    schedule.at(0.3)                                   # Compression(8, 0.5)
    schedule = solve(rows)                             # one row per strategy and progress
"""
import argparse
import json
import math
import sys
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path

from compress import Compression


def check_progress(p):
    if not 0 <= p <= 1:
        raise ValueError(f'progress {p} is outside [0, 1]')


def cosine(p):
    """1 at p = 0, 0 at p = 1."""
    check_progress(p)
    return 0.5 * (1 + math.cos(math.pi * p))


def polynomial(p, alpha=2):
    """1 at p = 0, 0 at p = 1, above cosine in between for alpha = 2."""
    check_progress(p)
    return 1 - p ** alpha


def warmup(p, length):
    """Linear from 0 to 1 over the first `length` of progress, then 1."""
    return min(1.0, p / length) if length > 0 else 1.0


def ramp(start, end, p):
    """Cosine from start to end: MoCo-v3's momentum, DINO's momentum and weight decay."""
    return end + (start - end) * cosine(p)


@dataclass(frozen=True)
class Schedule:
    """Stages ((progress at which it begins, strategy), ...), the first at 0, in order."""
    stages: tuple

    def __post_init__(self):
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0:
            begin = starts[0] if starts else 'nowhere'
            raise ValueError(f'a schedule begins at progress 0, not {begin}')
        if not all(a < b for a, b in zip(starts, [*starts[1:], 1])):
            raise ValueError(f'stages must begin at increasing progress below 1, not at {starts}')

    @classmethod
    def parse(cls, text):
        """'p8' or 'p8-drop0.50@0,p4@0.7', as str() writes it."""
        stages = []
        for part in text.split(','):
            name, _, start = part.partition('@')
            try:
                start = float(start or 0)
            except ValueError:
                raise ValueError(f"stage '{part}' of the schedule is not NAME@PROGRESS, "
                                 f"such as p8@0.3") from None
            stages.append((start, Compression.parse(name)))
        return cls(tuple(stages))

    def __str__(self):
        # all digits: a resumed run reads its schedule from this text
        starts = [f'{start:g}' if float(f'{start:g}') == start else f'{start}'
                  for start, _ in self.stages]
        return ','.join(f'{tau}@{start}' for start, (_, tau) in zip(starts, self.stages))

    def at(self, progress):
        """The strategy at a progress in [0, 1]."""
        check_progress(progress)
        return [strategy for start, strategy in self.stages if start <= progress][-1]


# ---------------------------------------------------------------- gradient errors -> schedule

def ca_mse(row):
    """(value, standard error): the paper's criterion as we read it, relative to the true norm^2.

    A negative estimate of bias^2 means that no bias could be seen: it counts as 0.
    """
    value = max(row['bias2'], 0.0) + row['cost'] * row['variance']
    error = math.hypot(row['bias2_sem'], row['cost'] * row['variance_sem'])
    return value / row['norm2'], error / row['norm2']


def best_length(row):
    """CA-MSE of the gradient at its best length: min over s of |s E g - E g0|^2 + c s^2 variance.

    A gradient that is only too short or too long costs nothing here, since Adam undoes its length.
    One that points backwards, whose best s would be negative, counts as more than 1.
    """
    power = row['mean2'] + row['cost'] * row['variance']
    value = 1 - row['inner'] * abs(row['inner']) / (row['norm2'] * power)
    error = 2 * abs(row['inner']) * row['inner_sem'] / (row['norm2'] * power)
    return value, error


# What is to be least: (value, standard error) of a row of gradstats.jsonl.
RULES = {'ca-mse': ca_mse, 'best-length': best_length}


def check_table(rows):
    """(points of progress, {strategy: cost}) of a table, or an error that says what is missing."""
    points = sorted({row['progress'] for row in rows})
    costs = {row['strategy']: row['cost'] for row in rows}
    measured = {(row['progress'], row['strategy']) for row in rows}
    if len(rows) != len(measured) or len(measured) != len(points) * len(costs):
        raise ValueError(f'the table has {len(rows)} rows; it needs every strategy '
                         f'({", ".join(map(str, costs))}) once at every progress ({points})')
    if not any(math.isclose(cost, 1) for cost in costs.values()):
        raise ValueError('the uncompressed strategy is missing: the one with cost 1')
    for row in rows:
        if not row['norm2'] > max(0, row.get('norm2_sem', 0)):
            raise ValueError(f'norm2 is {row["norm2"]:.3g} +- {row.get("norm2_sem", 0):.3g} at '
                             f'progress {row["progress"]}: the true gradient is lost in noise; '
                             f'measure more batches (--probe-batches)')
    return points, costs


def errors_over_progress(rows, rule='ca-mse', points=101):
    """(grid, {strategy: [(value of the rule, its standard error), ...]}) over progress.

    Between measurements the logarithm of each is linear in progress; outside it is constant.
    """
    measured, costs = check_table(rows)
    logs = {}
    for row in rows:
        values = [max(x, 1e-30) for x in RULES[rule](row)]
        logs[row['progress'], row['strategy']] = [math.log(x) for x in values]

    grid = [i / (points - 1) for i in range(points)]
    errors = {strategy: [] for strategy in costs}
    for p in grid:
        right = min(bisect_right(measured, p), len(measured) - 1)
        left = max(right - 1, 0)
        gap = measured[right] - measured[left]
        w = min(max((p - measured[left]) / gap, 0.0), 1.0) if gap else 0.0
        for strategy in costs:
            before = logs[measured[left], strategy]
            after = logs[measured[right], strategy]
            between = [(1 - w) * a + w * b for a, b in zip(before, after)]
            errors[strategy].append(tuple(math.exp(x) for x in between))
    return grid, errors


def level_ties(errors):
    """{strategy: [error, ...]}: what the error bars cannot tell from the best equals the best."""
    values = {strategy: [] for strategy in errors}
    for i in range(len(next(iter(errors.values())))):
        best, best_error = min(column[i] for column in errors.values())
        for strategy, column in errors.items():
            value, error = column[i]
            tied = value - best <= math.hypot(error, best_error)
            values[strategy].append(best if tied else value)
    return values


def best_path(values, costs, monotone=True):
    """One strategy per grid point with the least sum of values; ties go to the cheaper.

    monotone: the cost never falls along the path. The optimum is global, by dynamic programming.
    """
    order = sorted(values, key=costs.get)             # min() keeps the first, the cheapest
    length = len(values[order[0]])
    if not monotone:
        return [min(order, key=lambda s: values[s][i]) for i in range(length)]
    best = {s: (values[s][0], [s]) for s in order}    # the best path that ends in s: (sum, path)
    for i in range(1, length):
        extended = {}
        for s in order:
            reachable = [best[before] for before in order if costs[before] <= costs[s]]
            total, path = min(reachable, key=lambda pair: pair[0])
            extended[s] = (total + values[s][i], [*path, s])
        best = extended
    return min((best[s] for s in order), key=lambda pair: pair[0])[1]


def solve(table, monotone=True, rule='ca-mse'):
    """The schedule of a table of gradient errors.

    table: rows (lines of gradstats.jsonl) with progress, strategy, cost and the statistics, every
    strategy at every progress. CA-MSE reads bias2, variance, their errors and norm2. The stages
    hold the values of row['strategy'], which in a file are names.
    """
    grid, errors = errors_over_progress(table, rule)
    costs = {row['strategy']: row['cost'] for row in table}
    path = best_path(level_ties(errors), costs, monotone)
    stages = []
    for p, strategy in zip(grid, path):
        if p < 1 and (not stages or stages[-1][1] != strategy):
            stages.append((p, strategy))
    return Schedule(tuple(stages))


# ---------------------------------------------------------------- command line

def load_table(path, metric=None):
    """Rows of a gradstats.jsonl, those of one metric if the file has several."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'no table at {path}; train.py --gradstats 0.05,0.25,0.5,0.75,1 '
                                f'writes runs/NAME/gradstats.jsonl')
    try:
        rows = [json.loads(line) for line in Path(path).read_text().splitlines()]
        metrics = [row['metric'] for row in rows]
    except (ValueError, KeyError, TypeError):
        raise ValueError(f'{path} is not a gradstats.jsonl of train.py') from None
    if any('slope' not in row for row in rows):
        raise ValueError(f'{path} is of an earlier version, which counted other units and had no '
                         f'cosine and slope; measure again')
    if metric and metric not in metrics:
        found = ', '.join(sorted(set(metrics)))
        raise ValueError(f'{path} has no rows in the {metric} metric, only {found}')
    return [row for row in rows if row['metric'] == (metric or metrics[0])]


def print_table(rows, schedule):
    """In fractions of the true squared norm. gain: how much faster than without compression the
    uncompressed loss falls for the same compute.
    """
    print(f'progress       strategy   cost        bias^2  cost x var         CA-MSE         '
          f'cosine       gain   ({rows[0]["metric"]} metric)')
    for row in sorted(rows, key=lambda row: (row['progress'], -row['cost'])):
        bias2 = row['bias2'] / row['norm2']
        bias2_sem = row['bias2_sem'] / row['norm2']
        noise = row['cost'] * row['variance'] / row['norm2']
        error, error_sem = ca_mse(row)
        gain = row['slope'] / row['slope0'] / row['cost']
        chosen = '  <-' if schedule.at(row['progress']) == row['strategy'] else ''
        print(f'{row["progress"]:8.2f} {row["strategy"]:>14} {row["cost"]:6.3f} '
              f'{bias2:6.2f} +-{bias2_sem:5.2f} {noise:9.2f} {error:8.2f} +-{error_sem:5.2f} '
              f'{row["cosine"]:6.2f} +-{row["cosine_sem"]:5.2f} {gain:8.2f}{chosen}')


def main():
    parser = argparse.ArgumentParser(description='gradient errors -> compression schedule',
                                     allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('stats', help='gradstats.jsonl of a run')
    parser.add_argument('--metric', choices=('euclidean', 'adam'), help='if the table has several')
    parser.add_argument('--rule', choices=RULES, default='ca-mse',
                        help="ca-mse is the paper's, as we read it")
    parser.add_argument('--pointwise', action='store_true',
                        help='the best at each progress; the cost may fall again')
    args = parser.parse_args()

    rows = load_table(args.stats, args.metric)
    schedule = solve(rows, not args.pointwise, args.rule)
    print_table(rows, schedule)
    costs = {row['strategy']: row['cost'] for row in rows}
    base = min(costs, key=lambda s: abs(costs[s] - 1))
    grid, errors = errors_over_progress(rows, args.rule)
    samples = sum(1 / costs[schedule.at(p)] for p in grid) / len(grid)
    chosen = sum(errors[schedule.at(p)][i][0] for i, p in enumerate(grid)) / len(grid)
    alone = sum(value for value, _ in errors[base]) / len(grid)
    print(f'{samples:.2f} times as many samples as uncompressed; mean {args.rule} {chosen:.3f}, '
          f'uncompressed {alone:.3f}')
    print(f'--schedule {schedule}')


def self_check():
    for p in (0.25, 0.5, 0.75):
        print(f'progress {p}: cosine {cosine(p):.4f}, polynomial {polynomial(p):.4f}, '
              f'MoCo-v3 momentum {ramp(0.99, 1, p):.6f}')
        assert polynomial(p) > cosine(p)
    # bias grows against the shrinking gradient: compress while variance dominates, then stop
    rows = [dict(progress=p, strategy=s, cost=cost, bias2=bias2 * (1 + 9 * p), bias2_sem=0.01,
                 variance=2, variance_sem=0.01, norm2=1)
            for p in (0, 0.5, 1)
            for s, cost, bias2 in (('p16', 1, 0), ('p24', 0.4, 0.3), ('p48', 0.1, 0.9))]
    schedule = solve(rows)
    print(f'a made-up table gives {schedule}')
    assert [s for _, s in schedule.stages] == ['p48', 'p24', 'p16']
    assert str(Schedule.parse(str(schedule))) == str(schedule)
    print('schedule.py: all claims hold')


if __name__ == '__main__':
    if len(sys.argv) == 1:
        self_check()
    else:
        try:
            main()
        except (ValueError, OSError) as error:
            sys.exit(f'schedule.py: error: {error}')
