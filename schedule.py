"""What happens when: curves over training progress, and how much to compress at which progress.

Progress is spent budget / total budget, in [0, 1]. Every schedule runs on it, so that runs with different
compression stay comparable (paper, "training budget").

    cosine       (1 + cos(pi p)) / 2
    polynomial   1 - p^alpha            alpha 2 keeps a higher rate for longer than cosine, as the paper says of
                                        its own; (1 - p)^alpha, also called polynomial, does the opposite
    ramp         end + (start - end) cosine(p)

The acceleration schedule (paper, "optimal acceleration schedule") comes from a table of gradient errors
(gradstats.py). For the compute of one uncompressed batch, 1 / c(tau) batches of tau can be averaged:

    CA-MSE(tau, p) = bias^2(tau, p) + c(tau) variance(tau, p) / H
    schedule       = argmin over paths tau(p) of  sum_p CA-MSE(tau(p), p) / norm2(p),   c(tau(p)) never falling

H = 1 is the paper's, as far as known; H > 1 weighs bias more, since noise averages out over successive steps and
bias does not.

    python schedule.py runs/NAME/gradstats.jsonl -o schedule.json      # the table, the path and what it predicts

    schedule = Schedule.parse('p8-drop0.50@0,p4@0.7')
    schedule.at(0.3)                                                   # 'p8-drop0.50'
    schedule = solve(rows)                                             # rows: dicts, one per strategy and progress
"""
import argparse
import json
import math
import sys
from bisect import bisect_right
from dataclasses import dataclass
from pathlib import Path


def cosine(p):
    """1 at p = 0, 0 at p = 1."""
    return 0.5 * (1 + math.cos(math.pi * p))


def polynomial(p, alpha=2):
    """1 at p = 0, 0 at p = 1, above cosine in between for alpha = 2."""
    return 1 - p ** alpha


def warmup(p, length):
    """Linear from 0 to 1 over the first `length` of progress, then 1."""
    return min(1.0, p / length) if length > 0 else 1.0


def ramp(start, end, p):
    """Cosine from start to end: MoCo-v3's momentum, DINO's momentum and weight decay."""
    return end + (start - end) * cosine(p)


@dataclass(frozen=True)
class Schedule:
    """Stages ((progress at which it begins, strategy), ...), the first at 0, in order. A strategy is any value;
    in JSON and in text it is its name."""
    stages: tuple

    def __post_init__(self):
        starts = [start for start, _ in self.stages]
        if not starts or starts[0] != 0:
            raise ValueError(f'a schedule begins at progress 0, not {starts[0] if starts else "nowhere"}')
        if not all(a < b for a, b in zip(starts, [*starts[1:], 1])):
            raise ValueError(f'stages must begin at increasing progress below 1, not at {starts}')

    def at(self, progress):
        """The strategy at a progress in [0, 1]."""
        return [strategy for start, strategy in self.stages if start <= progress][-1]

    def map(self, function):
        """The same stages with function(strategy)."""
        return Schedule(tuple((start, function(strategy)) for start, strategy in self.stages))

    @classmethod
    def parse(cls, text):
        """'p8' or 'p8-drop0.50@0,p4@0.7'."""
        stages = []
        for part in text.split(','):
            name, _, start = part.partition('@')
            try:
                stages.append((float(start or 0), name.strip()))
            except ValueError:
                raise ValueError(f"stage '{part}' of the schedule is not NAME@PROGRESS, such as p8@0.3") from None
        return cls(tuple(stages))

    @staticmethod
    def points(text):
        """Progress points '0,0.25,1' as a sorted list."""
        try:
            points = sorted({float(part) for part in text.split(',')})
        except ValueError:
            points = []
        if not points or not all(0 <= point <= 1 for point in points):
            raise ValueError(f"'{text}' is not a list of progress points in [0, 1], such as 0,0.25,0.5,0.75,1")
        return points

    def __str__(self):
        return ','.join(f'{strategy}@{start:g}' for start, strategy in self.stages)

    def to_json(self):
        return json.dumps({'stages': [[start, str(strategy)] for start, strategy in self.stages]}) + '\n'

    @classmethod
    def from_json(cls, text):
        try:
            stages = tuple((float(start), str(strategy)) for start, strategy in json.loads(text)['stages'])
        except (KeyError, TypeError, ValueError):
            raise ValueError('a schedule file holds {"stages": [[0, "p8"], [0.7, "p4"]]}, as schedule.py writes it') from None
        return cls(stages)


# ---------------------------------------------------------------- from gradient errors to a schedule

NUMBERS = ('progress', 'cost', 'bias2', 'bias2_sem', 'variance', 'variance_sem', 'norm2')


def cost_adjusted_mse(bias2, variance, cost, horizon=1):
    """CA-MSE. A negative estimate of bias^2 means no bias that could be seen, and counts as zero."""
    return max(bias2, 0.0) + cost * variance / horizon


def check_table(rows):
    """Refuses a table that cannot be solved, naming the row: every strategy once at every progress, finite
    numbers, costs above 0 and the same throughout, one base strategy (cost 1), a gradient that is not all noise."""
    seen, costs = {}, {}
    for i, row in enumerate(rows, 1):
        i = row.get('line', i)
        where = f'row {i} ({row.get("strategy")} at progress {row.get("progress")})'
        if not isinstance(row.get('strategy'), str):
            raise ValueError(f'{where}: strategy must be a name, such as p8-drop0.50')
        for key in NUMBERS:
            if not isinstance(row.get(key), (int, float)) or not math.isfinite(row[key]):
                raise ValueError(f'{where}: {key} is {row.get(key)}, not a finite number')
        if row['cost'] <= 0 or row['variance'] < 0:
            raise ValueError(f'{where}: cost {row["cost"]} must be above 0 and variance {row["variance"]} at least 0')
        if row['norm2'] <= max(0, row.get('norm2_sem', 0)):
            raise ValueError(f'{where}: norm2 is {row["norm2"]:.3g} +- {row.get("norm2_sem", 0):.3g}: the true gradient is lost in noise; '
                             f'measure more batches')
        if not 0 <= row['progress'] <= 1:
            raise ValueError(f'{where}: progress is outside [0, 1]')
        key = row['progress'], row['strategy']
        if key in seen:
            raise ValueError(f'{where}: measured before, in row {seen[key]}; keep one of the two')
        if not math.isclose(costs.setdefault(row['strategy'], row['cost']), row['cost']):
            raise ValueError(f'{where}: cost {row["cost"]}, but {costs[row["strategy"]]} at another progress')
        seen[key] = i
    points = sorted({progress for progress, _ in seen})
    if not points:
        raise ValueError('the table is empty')
    for progress in points:
        for strategy in costs:
            if (progress, strategy) not in seen:
                raise ValueError(f'{strategy} is missing at progress {progress}, but measured elsewhere')
    if not any(math.isclose(cost, 1) and all(row['bias2'] == 0 for row in rows if row['strategy'] == strategy)
               for strategy, cost in costs.items()):
        raise ValueError('the base strategy is missing: one with cost 1 and bias2 0, no compression')
    return points, costs


def errors_over_progress(rows, horizon=1, points=101):
    """(grid, {strategy: [(CA-MSE, its standard error), ...]}), as fractions of norm2, on a grid of progress.

    Between measurements the logarithm of the CA-MSE and of its error is linear in progress; outside, constant.
    """
    measured, costs = check_table(rows)
    lookup = {(row['progress'], row['strategy']): row for row in rows}

    def at(progress, strategy):
        row = lookup[progress, strategy]
        value = cost_adjusted_mse(row['bias2'], row['variance'], row['cost'], horizon)
        error = math.hypot(row['bias2_sem'], row['cost'] * row['variance_sem'] / horizon)
        return [math.log(max(x / row['norm2'], 1e-30)) for x in (value, error)]

    grid = [i / (points - 1) for i in range(points)]
    errors = {strategy: [] for strategy in costs}
    for p in grid:
        right = min(bisect_right(measured, p), len(measured) - 1)
        left = max(right - 1, 0)
        gap = measured[right] - measured[left]
        w = min(max((p - measured[left]) / gap, 0.0), 1.0) if gap else 0.0
        for strategy in costs:
            a, b = at(measured[left], strategy), at(measured[right], strategy)
            errors[strategy].append(tuple(math.exp((1 - w) * x + w * y) for x, y in zip(a, b)))
    return grid, errors


def level_ties(errors):
    """{strategy: [CA-MSE, ...]} in which whatever cannot be told from the best by the error bars equals the best."""
    values = {strategy: [] for strategy in errors}
    for i in range(len(next(iter(errors.values())))):
        best, best_error = min(column[i] for column in errors.values())
        for strategy, column in errors.items():
            value, error = column[i]
            values[strategy].append(best if value - best <= math.hypot(error, best_error) else value)
    return values


def best_path(values, costs, monotone=True):
    """One strategy per grid point with the least sum of values; ties go to the cheaper. monotone: cost never falls,
    the global optimum by dynamic programming; else the minimum at each point."""
    order = sorted(values, key=costs.get)
    length = len(values[order[0]])
    if not monotone:
        return [min(order, key=lambda s: values[s][i]) for i in range(length)]  # min keeps the first, the cheapest
    dearest = [max(j for j, other in enumerate(order) if costs[other] <= costs[s]) for s in order]  # of those that cost no more
    total, origin = [values[s][0] for s in order], []
    for i in range(1, length):
        came_from = [min(range(dearest[k] + 1), key=total.__getitem__) for k in range(len(order))]  # the first, if equal
        total = [total[came_from[k]] + values[s][i] for k, s in enumerate(order)]
        origin.append(came_from)
    k = total.index(min(total))
    path = [k]
    for came_from in reversed(origin):
        path.append(came_from[path[-1]])
    return [order[k] for k in reversed(path)]


def solve(table, monotone=True, horizon=1):
    """The schedule of a table of gradient errors: rows with progress, strategy, cost, bias2, bias2_sem, variance,
    variance_sem, norm2 (lines of gradstats.jsonl), every strategy at every progress. ValueError names a bad row."""
    grid, errors = errors_over_progress(table, horizon)
    costs = {row['strategy']: row['cost'] for row in table}
    path = best_path(level_ties(errors), costs, monotone)
    return Schedule(tuple((p, s) for p, s, before in zip(grid, path, [None, *path]) if s != before and p < 1))


def load_table(path, metric=None):
    """Rows of a gradstats.jsonl, those of one metric if the file has several."""
    if not Path(path).is_file():
        raise FileNotFoundError(f'no table at {path}; train.py --gradstats 0,0.25,0.5,0.75,1 writes runs/NAME/gradstats.jsonl')
    rows = []
    for i, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        try:
            rows.append({**json.loads(line), 'line': i})
        except (TypeError, ValueError) as error:
            raise ValueError(f'{path} line {i} is not a JSON object: {error}') from None
    found = list(dict.fromkeys(row.get('metric') for row in rows))
    if metric and metric not in found:
        raise ValueError(f'{path} has no rows in the {metric} metric, only {", ".join(map(str, found))}')
    return [row for row in rows if row.get('metric') == (metric or found[0])]


def main():
    parser = argparse.ArgumentParser(description='CA-MSE table -> compression schedule', allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('stats', help='gradstats.jsonl of a run')
    parser.add_argument('-o', '--output', help='where to write the schedule (JSON), for train.py --schedule')
    parser.add_argument('--horizon', type=float, default=1, help='H in bias^2 + c variance / H; 1: the paper')
    parser.add_argument('--pointwise', action='store_true', help='the minimum at each progress; cost may fall again')
    parser.add_argument('--metric', choices=('euclidean', 'adam'), help='if the table has several; default: its first')
    parser.add_argument('--budget', type=float, default=1, help='millions of units, to count samples and steps')
    parser.add_argument('--batch-size', type=int, default=128, help='images per step, to count steps')
    args = parser.parse_args()
    if not 0 < args.horizon < math.inf or not 0 < args.budget < math.inf or args.batch_size < 1:
        raise ValueError('--horizon, --budget and --batch-size must be above 0')
    if args.output and (not Path(args.output).parent.is_dir() or Path(args.output).resolve() == Path(args.stats).resolve()):
        raise ValueError(f'-o {args.output}: its folder must exist, and it must not be the table itself')

    rows = load_table(args.stats, args.metric)
    schedule = solve(rows, not args.pointwise, args.horizon)
    print(f'{"progress":>8} {"strategy":>14} {"cost":>6} {"bias^2":>16} {"cost x variance":>17} {"CA-MSE":>16}   (fractions of norm^2, {rows[0].get("metric", "euclidean")} metric, H {args.horizon:g})')
    for progress in sorted({row['progress'] for row in rows}):
        for row in sorted((r for r in rows if r['progress'] == progress), key=lambda r: -r['cost']):
            n, scale = row['norm2'], row['cost'] / row['norm2']
            value = cost_adjusted_mse(row['bias2'], row['variance'], row['cost'], args.horizon) / n
            error = math.hypot(row['bias2_sem'], row['cost'] * row['variance_sem'] / args.horizon) / n
            mark = '  <-' if schedule.at(progress) == row['strategy'] else ''
            print(f'{progress:8.2f} {row["strategy"]:>14} {row["cost"]:6.3f} {row["bias2"] / n:8.3f} +-{row["bias2_sem"] / n:6.3f} '
                  f'{scale * row["variance"]:9.3f} +-{scale * row["variance_sem"]:6.3f} {value:8.3f} +-{error:6.3f}{mark}')

    costs = {row['strategy']: row['cost'] for row in rows}
    grid, errors = errors_over_progress(rows, args.horizon)
    base = next(s for s in costs if math.isclose(costs[s], 1) and all(r['bias2'] == 0 for r in rows if r['strategy'] == s))
    samples, ends = 0.0, [start for start, _ in schedule.stages[1:]] + [1.0]
    print(f'\nschedule: {schedule}')
    for (start, strategy), end in zip(schedule.stages, ends):
        units = (end - start) * args.budget * 1e6
        samples += units / costs[strategy]
        print(f'  {100 * start:3.0f} to {100 * end:3.0f} %: {strategy:14} {units:12,.0f} units, {units / costs[strategy]:12,.0f} samples, '
              f'{units / costs[strategy] / args.batch_size:10,.0f} steps of {args.batch_size}')
    chosen = sum(errors[schedule.at(p)][i][0] for i, p in enumerate(grid)) / len(grid)
    alone = sum(value for value, _ in errors[base]) / len(grid)
    print(f'{samples:,.0f} samples for {args.budget * 1e6:,.0f} units: {samples / args.budget / 1e6:.2f} times as many as uncompressed')
    print(f'predicted mean CA-MSE {chosen:.3f} of norm^2, {alone:.3f} uncompressed: {alone / chosen:.2f} times lower')
    if args.output:
        Path(args.output).write_text(schedule.to_json())


def self_check():
    for p in (0.25, 0.5, 0.75):
        print(f'progress {p}: cosine {cosine(p):.4f}, polynomial {polynomial(p):.4f}, MoCo-v3 momentum {ramp(0.99, 1, p):.6f}')
        assert polynomial(p) > cosine(p)
    # bias grows as the gradient shrinks: compress while variance dominates, stop when bias does
    rows = [dict(progress=p, strategy=s, cost=c, bias2=b * (1 + 9 * p), bias2_sem=0.01, variance=2, variance_sem=0.01, norm2=1)
            for p in (0, 0.5, 1) for s, c, b in (('p16', 1, 0), ('p24', 0.4, 0.3), ('p48', 0.1, 0.9))]
    schedule = solve(rows)
    print(f'a made-up table gives {schedule}')
    assert [s for _, s in schedule.stages] == ['p48', 'p24', 'p16']
    assert Schedule.from_json(schedule.to_json()) == Schedule.parse(str(schedule)) == schedule
    print('schedule.py: all claims hold')


if __name__ == '__main__':
    if len(sys.argv) == 1:
        self_check()
    else:
        try:
            main()
        except (ValueError, OSError) as error:
            sys.exit(f'schedule.py: error: {error}')
