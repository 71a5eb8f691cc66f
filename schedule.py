"""What happens when: curves over training progress, and how much to compress at which progress.

Progress is spent budget / total budget, in [0, 1]. The budget is the paper's; that every schedule
runs on progress is ours, so that runs with different compression stay comparable.

    cosine       (1 + cos(pi p)) / 2
    polynomial   1 - p^alpha            our reading of the paper's name: for alpha = 2 higher than
                                        cosine, while the usual (1 - p)^alpha is lower
    ramp         end + (start - end) cosine(p)

The acceleration schedule (paper, "optimal acceleration schedule", as we read it) comes from a table
of gradient errors (gradstats.py). The compute of one uncompressed batch pays for 1 / c(tau) batches
of tau, whose average has a smaller variance and the same bias:

    CA-MSE(tau, p) = bias^2(tau, p) + c(tau) variance(tau, p)
    schedule       = argmin over paths tau(p) of  sum_p width(p) CA-MSE(tau(p), p) / norm2(p),
                     c(tau(p)) never falling

Here c(tau) is the sample cost relative to the uncompressed one. p runs over the measured points,
each of which stands for the progress nearest to it (width). The sum and the cost that never falls
are our choice. So are the ties: what the error bars cannot tell from the best counts as equal to
it, and the cheaper one wins.

    python schedule.py runs/NAME/gradstats.jsonl       # the table and the path

    schedule = Schedule.parse('p8-drop0.50@0,p4@0.7')
    schedule.at(0.3)                                   # Compression(8, 0.5)
    schedule = solve(rows)                             # one row per strategy and progress
"""
import argparse
import json
import math
import sys
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
        increasing = all(a < b for a, b in zip(starts, [*starts[1:], 1]))
        if starts[:1] != [0] or not increasing:
            raise ValueError(f'a schedule begins at progress 0 and its stages at increasing '
                             f'progress below 1, not at {starts}')

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
        stages = [f'{strategy}@{start}' for start, strategy in self.stages]
        return ','.join(stage.removesuffix('.0') for stage in stages)

    def spans(self):
        """(start, end, strategy) of each stage."""
        starts, strategies = zip(*self.stages)
        ends = [*starts[1:], 1.0]
        return list(zip(starts, ends, strategies))

    def at(self, progress):
        """The strategy at a progress in [0, 1]."""
        check_progress(progress)
        begun = [strategy for start, strategy in self.stages if start <= progress]
        return begun[-1]


# ---------------------------------------------------------------- gradient errors -> schedule

def ca_mse(row):
    """(value, standard error): the paper's criterion as we read it, relative to the true norm^2.

    A negative estimate of bias^2 means that no bias could be seen: it counts as 0. The error is
    for comparing strategies at one point: that of norm2, which they share, is left out.
    """
    value = max(row['bias2'], 0.0) + row['cost'] * row['variance']
    error = math.hypot(row['bias2_sem'], row['cost'] * row['variance_sem'])
    return value / row['norm2'], error / row['norm2']


def table_of(rows):
    """(points of progress, strategies from cheap to dear, {(progress, strategy): row})"""
    points = sorted({row['progress'] for row in rows})
    costs = {row['strategy']: row['cost'] for row in rows}
    table = {(row['progress'], row['strategy']): row for row in rows}
    if not len(rows) == len(table) == len(points) * len(costs):
        raise ValueError(f'the table has {len(rows)} rows; it needs every strategy '
                         f'({", ".join(map(str, costs))}) once at every progress ({points})')
    for row in rows:
        if not row['norm2'] > row['norm2_sem']:
            raise ValueError(f'norm2 is {row["norm2"]:.3g} +- {row["norm2_sem"]:.3g} at progress '
                             f'{row["progress"]}: the true gradient is lost in noise; measure more '
                             f'batches (--probe-batches)')
    return points, sorted(costs, key=costs.get), table


def solve(rows):
    """The schedule of a table of gradient errors (lines of gradstats.jsonl).

    Every strategy is there at every progress. The optimum is global, by dynamic programming: the
    best path that ends in a strategy extends one that ended in it or in a cheaper one.
    """
    points, strategies, table = table_of(rows)
    middles = [(a + b) / 2 for a, b in zip(points, points[1:])]
    starts = [0.0, *middles]
    ends = [*middles, 1.0]
    total = dict.fromkeys(strategies, 0.0)             # of the best path that ends in a strategy,
    path = dict.fromkeys(strategies, ())               # and its stages
    for p, start, end in zip(points, starts, ends):
        errors = {s: ca_mse(table[p, s]) for s in strategies}
        least, least_sem = min(errors.values())
        old_total, old_path = total, path
        total, path = {}, {}
        for i, s in enumerate(strategies):
            value, sem = errors[s]
            if value - least <= math.hypot(sem, least_sem):
                value = least                          # a tie
            # min keeps the first of equals, the cheapest
            before = min(strategies[:i + 1], key=old_total.get)
            total[s] = old_total[before] + (end - start) * value
            path[s] = old_path[before]
            if before != s or not path[s]:
                path[s] = (*path[s], (start, Compression.parse(s)))      # a stage begins
    best = min(strategies, key=total.get)
    return Schedule(path[best])


# ---------------------------------------------------------------- command line

def load_table(path):
    """Rows of a gradstats.jsonl."""
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def print_table(rows, schedule):
    """In fractions of the true squared norm; <- marks the strategies of the schedule."""
    print(f'progress       strategy   cost        bias^2  cost x var         CA-MSE'
          f'         cosine   ({rows[0]["metric"]} metric)')
    for row in sorted(rows, key=lambda row: (row['progress'], -row['cost'])):
        bias2 = row['bias2'] / row['norm2']
        bias2_sem = row['bias2_sem'] / row['norm2']
        noise = row['cost'] * row['variance'] / row['norm2']
        error, error_sem = ca_mse(row)
        chosen = '  <-' if str(schedule.at(row['progress'])) == row['strategy'] else ''
        print(f'{row["progress"]:8.2f} {row["strategy"]:>14} {row["cost"]:6.3f} '
              f'{bias2:6.2f} +-{bias2_sem:5.2f} {noise:9.2f} {error:8.2f} +-{error_sem:5.2f} '
              f'{row["cosine"]:6.2f} +-{row["cosine_sem"]:5.2f}{chosen}')


def main():
    parser = argparse.ArgumentParser(description='gradient errors -> compression schedule')
    parser.add_argument('stats', help='gradstats.jsonl of a run of train.py --gradstats')
    args = parser.parse_args()
    try:
        rows = load_table(args.stats)
        schedule = solve(rows)
    except (OSError, ValueError, LookupError) as error:
        sys.exit(f'schedule.py: error: {args.stats}: {error}')
    print_table(rows, schedule)
    costs = {row['strategy']: row['cost'] for row in rows}
    samples = sum((end - start) / costs[str(s)] for start, end, s in schedule.spans())
    print(f'{samples:.2f} times as many samples as uncompressed')
    print(f'--schedule {schedule}')


def self_check():
    # bias grows against the shrinking gradient: compress while variance dominates, then stop
    errors = dict(variance=2, norm2=1, bias2_sem=0.01, variance_sem=0.01, norm2_sem=0.01)
    rows = []
    for p, bias2 in ((0, 0.4), (0.3, 2), (1, 4)):
        rows.append(dict(errors, progress=p, strategy='p4', cost=1, bias2=0))
        rows.append(dict(errors, progress=p, strategy='p8', cost=0.2, bias2=bias2))
    schedule = solve(rows)
    print(f'a made-up table gives {schedule}')
    assert str(schedule) == 'p8@0,p4@0.15'
    print('schedule.py: all claims hold')


if __name__ == '__main__':
    if len(sys.argv) == 1:
        self_check()
    else:
        main()
