"""schedule.py against timm, brute force and hand-made tables of gradient errors."""
import itertools
import json
import math
import random

import pytest
import torch
from timm.scheduler import PolyLRScheduler

import schedule as schedule_file
from compress import Compression
from schedule import (RULES, Schedule, best_path, cosine, errors_over_progress, load_table,
                      polynomial, ramp, solve, warmup)

P4, P8, DROPPED = Compression(4), Compression(8), Compression(8, 0.5)


def test_curves():
    waves = [cosine(p) for p in (0, 0.25, 0.5, 0.75, 1)]
    assert waves == pytest.approx([1, 0.8535534, 0.5, 0.1464466, 0])
    momentum = [ramp(0.99, 1, p) for p in (0, 0.25, 1)]                   # MoCo-v3's
    assert momentum == pytest.approx([0.99, 0.99146447, 1], abs=1e-8)
    assert [warmup(p, 0.2) for p in (0, 0.1, 0.2, 0.9)] == [0, 0.5, 1, 1]
    assert warmup(0, 0) == 1


@pytest.mark.parametrize('alpha', (1, 2, 3))
def test_polynomial_equals_timm(alpha):
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    scheduler = PolyLRScheduler(optimizer, t_initial=100, power=1.0, k_decay=alpha)
    for t in range(100):
        scheduler.step(t)
        theirs = optimizer.param_groups[0]['lr']
        assert polynomial(t / 100, alpha) == pytest.approx(theirs, abs=1e-9)
    assert polynomial(0.5) == 0.75


def test_a_stage_begins_at_its_progress():
    schedule = Schedule.parse('p8-drop0.50@0, p8@0.25,p4@0.7')
    assert schedule.at(0) == schedule.at(0.2499) == DROPPED
    assert schedule.at(0.25) == schedule.at(0.6999) == P8
    assert schedule.at(0.7) == schedule.at(1) == P4
    assert Schedule.parse('p8').at(0.5) == P8
    assert str(schedule) == 'p8-drop0.50@0,p8@0.25,p4@0.7'


@pytest.mark.parametrize('start', (1 / 3, 0.1 + 0.2, 1e-7, 0.9999999))
def test_the_text_of_a_schedule_is_read_back(start):
    """To the last digit: a resumed run reads the text."""
    schedule = Schedule(((0.0, DROPPED), (start, P4)))
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize('function, arguments, message', [
    (Schedule.parse, [''], "'' is not a compression"),
    (Schedule.parse, ['p8@x'], "stage 'p8@x' of the schedule is not NAME@PROGRESS"),
    (Schedule.parse, ['p8@0.1'], 'begins at progress 0, not 0.1'),
    (Schedule.parse, ['p8@0,p4@0'], r'not at \[0.0, 0.0\]'),
    (Schedule.parse, ['p8@0,p4@0.9,p2@0.5'], r'not at \[0.0, 0.9, 0.5\]'),
    (Schedule.parse, ['p8@0,p4@1'], r'not at \[0.0, 1.0\]'),
    (Schedule.parse, ['p8@0,p4@nan'], r'not at \[0.0, nan\]'),
    (Schedule, [()], 'begins at progress 0, not nowhere'),
    (Schedule.parse('p8').at, [1.5], 'progress 1.5'),
    (cosine, [math.nan], 'progress nan'),
    (polynomial, [-0.1], 'progress -0.1'),
])
def test_arguments_out_of_range(function, arguments, message):
    with pytest.raises(ValueError, match=message):
        function(*arguments)


# ---- the solver

def table(strategies, points=(0, 0.5, 1), sem=0.0):
    """Rows of gradient errors with norm2 = 1; strategies: {strategy: (cost, bias2, variance)}.

    bias2 and variance are numbers, or lists with one number for each point of progress.
    """
    rows = []
    for i, progress in enumerate(points):
        for strategy, (cost, *columns) in strategies.items():
            bias2, variance = [c[i] if isinstance(c, list) else c for c in columns]
            rows.append(dict(
                progress=progress, strategy=strategy, cost=cost, norm2=1.0,
                bias2=bias2, bias2_sem=sem, variance=variance, variance_sem=sem,
                cosine=1.0, cosine_sem=0.0, slope=1.0, slope0=1.0))
    return rows


@pytest.mark.parametrize('seed', range(60))
def test_best_path_equals_brute_force(seed):
    """A third of the tables have ties. Of equal ones, the pointwise path takes the cheaper."""
    rng = random.Random(seed)
    names = 'abcd'[:rng.randint(1, 4)]
    points = range(rng.randint(1, 6))
    digits = 0 if seed % 3 == 0 else 9
    values = {name: [round(rng.random(), digits) for _ in points] for name in names}
    costs = {name: rng.choice((0.2, 0.5, rng.random())) for name in names}

    def total(path):
        return sum(values[name][i] for i, name in enumerate(path))

    paths = itertools.product(names, repeat=len(points))
    rising = [path for path in paths if sorted(path, key=costs.get) == list(path)]
    found = tuple(best_path(values, costs))
    assert found in rising
    assert total(found) == pytest.approx(min(map(total, rising)))
    for i, name in enumerate(best_path(values, costs, monotone=False)):
        best = min((values[other][i], costs[other]) for other in names)
        assert (values[name][i], costs[name]) == best


def test_ca_mse_by_hand():
    """(0.2 + 0.25 1) / 0.5 = 0.9, +- hypot(0.3, 0.25 1.6) / 0.5 = 1. A negative bias^2 is 0."""
    row = dict(bias2=0.2, bias2_sem=0.3, variance=1, variance_sem=1.6, cost=0.25, norm2=0.5)
    assert RULES['ca-mse'](row) == pytest.approx((0.9, 1))
    assert RULES['ca-mse'](dict(row, bias2=-0.1))[0] == pytest.approx(0.5)


@pytest.mark.parametrize('sem, chosen', [(0, P4), (0.02, P4), (0.1, P8)])
def test_what_the_error_bars_cannot_tell_apart_goes_to_the_cheaper(sem, chosen):
    """CA-MSE: p4 0 + 1, p8 0.8 + 0.25 = 1.05, each +- sem: a difference of 0.05 +- 1.4 sem."""
    rows = table({P4: (1, 0, 1), P8: (0.25, 0.8, 1)}, sem=sem)
    assert solve(rows).stages == ((0.0, chosen),)


def test_errors_are_log_linear_between_measurements():
    """1 at 0.2 and 4 at 0.6: 2 half way between, constant outside."""
    rows = table({P4: (1, 0, [1, 4])}, points=(0.2, 0.6))
    _, errors = errors_over_progress(rows, points=6)
    values = [value for value, _ in errors[P4]]
    assert values == pytest.approx([1, 1, 2, 4, 4, 4])


GOOD = table({'p4': (1, 0, 1), 'p8': (0.25, 0.1, 1)})


def with_norm(**values):
    return [*GOOD[:2], dict(GOOD[2], **values), *GOOD[3:]]


@pytest.mark.parametrize('rows, message', [
    ([], 'the uncompressed strategy is missing'),
    (GOOD[1::2], 'the uncompressed strategy is missing'),
    (GOOD[:-1], r'has 5 rows; it needs every strategy \(p4, p8\) once'),
    (GOOD + GOOD[:1], 'has 7 rows'),
    (with_norm(norm2=-0.1), 'norm2 is -0.1 .* progress 0.5: the true gradient is lost in noise'),
    (with_norm(norm2=0.1, norm2_sem=0.2), r'norm2 is 0.1 \+- 0.2 at progress 0.5'),
    (with_norm(norm2=math.nan), 'norm2 is nan'),
])
def test_a_wrong_table_is_refused(rows, message):
    with pytest.raises(ValueError, match=message):
        solve(rows)


ROW = dict(cost=0.5, norm2=4, mean2=2, inner=2, inner_sem=0.1, variance=4)


def test_best_length_is_the_least_error_over_all_lengths():
    """min over s of |s g - g0|^2 + c s^2 variance, for vectors with the products of ROW.

    1 - 2^2 / (4 (2 + 0.5 4)) = 0.75, with the error 2 2 0.1 / 16.
    """
    g0 = torch.tensor([2.0, 0.0])
    g = torch.tensor([1.0, 1.0])
    s = torch.linspace(-2, 2, 4001)[:, None]
    errors = (s * g - g0).square().sum(dim=1) + 0.5 * 4 * s[:, 0] ** 2
    value, sem = RULES['best-length'](ROW)
    assert value == pytest.approx(errors.min().item() / 4) == 0.75
    assert sem == pytest.approx(0.025)
    assert RULES['best-length'](dict(ROW, inner=-2))[0] == 1.25           # points the wrong way


# ---- the command

def write_table(folder, rows):
    path = folder / 'gradstats.jsonl'
    path.write_text('\n'.join(map(json.dumps, rows)))
    return path


@pytest.mark.parametrize('metric, text', [('adam', 'p8@0,p4@0.68'), ('euclidean', 'p4@0')])
def test_the_command_prints_a_schedule_for_train(metric, text, tmp_path, monkeypatch, capsys):
    """In Adam's metric the CA-MSE of p8 rises from 0.65 to 2.25 in the second half, past p4's 1.

    The logarithms cross at 0.5 + 0.5 log(1 / 0.65) / log(2.25 / 0.65) = 0.673.
    """
    rows = []
    for name, bias2 in (('adam', [0.1, 0.4, 2]), ('euclidean', 9)):
        strategies = {'p4': (1, 0, 1), 'p8': (0.25, bias2, 1)}
        rows += [dict(row, metric=name) for row in table(strategies)]
    path = write_table(tmp_path, rows)
    monkeypatch.setattr('sys.argv', ['schedule.py', str(path), '--metric', metric])
    schedule_file.main()
    assert capsys.readouterr().out.splitlines()[-1] == f'--schedule {text}'


@pytest.mark.parametrize('row, message', [
    (dict(metric='adam', slope=1), 'has no rows in the euclidean metric, only adam'),
    (dict(metric='adam'), 'of an earlier version, which counted other units'),
    (dict(progress=0), 'is not a gradstats.jsonl'),
    ('nonsense', 'is not a gradstats.jsonl'),
])
def test_files_that_are_no_tables_are_refused(row, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        load_table(write_table(tmp_path, [row]), 'euclidean')
    with pytest.raises(FileNotFoundError, match='no table at nowhere; train.py --gradstats'):
        load_table('nowhere')
