"""What happens when: curves over training progress, and which compression to use at which progress.

Progress is spent budget / total budget, in [0, 1]. Every schedule runs on it, so that runs with different
compression stay comparable (paper, "training budget").

    cosine       (1 + cos(pi p)) / 2
    polynomial   1 - p^alpha            alpha 2 keeps a higher rate for longer than cosine, as the paper says of
                                        its own; (1 - p)^alpha, also called polynomial, does the opposite
    ramp         end + (start - end) cosine(p)

    schedule = Schedule.parse('p8-drop0.50@0,p4@0.7')
    schedule.at(0.3)                                     # 'p8-drop0.50'
"""
import json
import math
from dataclasses import dataclass


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

    def __str__(self):
        return ','.join(f'{strategy}@{start:g}' for start, strategy in self.stages)

    def to_json(self):
        return json.dumps({'stages': [[start, str(strategy)] for start, strategy in self.stages]})

    @classmethod
    def from_json(cls, text):
        return cls(tuple((start, strategy) for start, strategy in json.loads(text)['stages']))


if __name__ == '__main__':
    for p in (0.25, 0.5, 0.75):
        print(f'progress {p}: cosine {cosine(p):.4f}, polynomial {polynomial(p):.4f}, MoCo-v3 momentum {ramp(0.99, 1, p):.6f}')
        assert polynomial(p) > cosine(p)
    schedule = Schedule.parse('p8-drop0.50@0,p4@0.7')
    assert Schedule.from_json(schedule.to_json()) == schedule and schedule.at(0.7) == 'p4'
    print('schedule.py: all claims hold')
