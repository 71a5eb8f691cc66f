"""schedule.py against timm, brute force and hand-made tables of gradient errors."""
import itertools
import json
import math
import random

import pytest
import torch
from methods import refused
from timm.scheduler import CosineLRScheduler, PolyLRScheduler

import schedule as schedule_file
from compress import Compression
from schedule import Schedule, ca_mse, cosine, polynomial, solve

P4, P8, DROPPED = Compression(4), Compression(8), Compression(8, 0.5)


def test_curves_equal_timms():
    optimizer = torch.optim.SGD([torch.zeros(1)], lr=1.0)
    for ours, theirs in (
            (cosine, CosineLRScheduler(optimizer, 100)),
            (polynomial, PolyLRScheduler(optimizer, 100, power=1.0, k_decay=2))):
        for t in range(100):
            theirs.step(t)
            assert ours(t / 100) == pytest.approx(optimizer.param_groups[0]['lr'], abs=1e-9)
        assert ours(1) == 0


def test_a_stage_begins_at_its_progress():
    schedule = Schedule.parse('p8-drop0.50@0, p8@0.25,p4@0.7')
    assert [schedule.at(p) for p in (0, 0.2499, 0.25, 0.6999, 0.7, 1)] == [
        DROPPED, DROPPED, P8, P8, P4, P4]
    assert schedule.spans() == [(0, 0.25, DROPPED), (0.25, 0.7, P8), (0.7, 1, P4)]


def test_the_text_of_a_schedule_is_read_back():
    """To the last digit: a resumed run reads the text."""
    for start in (0.25, 1 / 3, 1e-7, 0.9999999):
        schedule = Schedule(((0.0, DROPPED), (start, P4)))
        assert Schedule.parse(str(schedule)) == schedule


def test_wrong_schedules_are_refused():
    refused(Schedule.parse, [
        ('p8@x', "stage 'p8@x' of the schedule is not NAME@PROGRESS"),
        ('p8@0.1', r'begins at progress 0 .* not at \[0.1\]'),
        ('p8@0,p4@0.9,p2@0.5', r'not at \[0.0, 0.9, 0.5\]'),
        ('p8@0,p4@nan', r'not at \[0.0, nan\]')])


# ---- the solver

def table(points, strategies, sem=0.0):
    """Rows of gradient errors, norm2 = variance = 1.

    strategies: {strategy: (cost, [bias2 for each point of progress])}
    """
    return [dict(progress=progress, strategy=strategy, cost=cost, norm2=1.0, norm2_sem=0.1,
                 bias2=bias2[i], bias2_sem=sem, variance=1.0, variance_sem=sem,
                 cosine=1.0, cosine_sem=0.0, metric='adam')
            for i, progress in enumerate(points)
            for strategy, (cost, bias2) in strategies.items()]


def test_the_solver_equals_brute_force():
    """Over all paths of a cost that never falls. Every progress has the errors of the measured
    point that is nearest to it, here counted on a fine grid."""
    grid = [(i + 0.5) / 400 for i in range(400)]
    for seed in range(20):
        rng = random.Random(seed)
        num_points = 1 + seed % 5
        points = sorted(rng.sample([i / 20 for i in range(21)], num_points))
        costs = {strategy: rng.random() for strategy in ('p1', 'p2', 'p3', 'p4')}
        rows = table(points, {s: (costs[s], [rng.random() for _ in points]) for s in costs})
        values = {(row['progress'], row['strategy']): row['bias2'] + row['cost'] for row in rows}
        nearest = [min(points, key=lambda point: abs(point - p)) for p in grid]

        cheapest_first = sorted(costs, key=costs.get)
        paths = itertools.combinations_with_replacement(cheapest_first, num_points)
        paths = [dict(zip(points, path)) for path in paths]
        least = min(sum(values[p, path[p]] for p in nearest) for path in paths)
        found = [str(solve(rows).at(p)) for p in grid]
        assert found == sorted(found, key=costs.get)
        assert sum(values[p, s] for p, s in zip(nearest, found)) == pytest.approx(least)


def test_ca_mse_by_hand():
    """(0.2 + 0.25 1) / 0.5 = 0.9, +- hypot(0.3, 0.25 1.6) / 0.5 = 1. A negative bias^2 is 0."""
    row = dict(bias2=0.2, bias2_sem=0.3, variance=1, variance_sem=1.6, cost=0.25, norm2=0.5)
    assert ca_mse(row) == pytest.approx((0.9, 1))
    assert ca_mse(dict(row, bias2=-0.1))[0] == pytest.approx(0.5)


def test_what_the_error_bars_cannot_tell_apart_goes_to_the_cheaper():
    """p4 0 + 1 +- 1.41 sem, p8 0.8 + 0.25 +- 1.03 sem: a difference of 0.05 +- 1.75 sem."""
    for sem, chosen in ((0, 'p4'), (0.025, 'p4'), (0.035, 'p8')):
        rows = table((0, 1), {'p4': (1, [0, 0]), 'p8': (0.25, [0.8, 0.8])}, sem)
        assert str(solve(rows)) == f'{chosen}@0'


GOOD = table((0.25, 0.75), {'p4': (1, [0, 0]), 'p8': (0.25, [0.1, 2])})


def test_a_wrong_table_is_refused():
    *others, last = GOOD
    refused(solve, [
        (others, r'has 3 rows; it needs every strategy \(p4, p8\) once'),
        ([*others, dict(last, norm2=0.1, norm2_sem=0.2)],
         r'norm2 is 0.1 \+- 0.2 at progress 0.75: the true gradient is lost in noise'),
        ([*others, dict(last, norm2=math.nan)], 'norm2 is nan')])


# ---- the command

def test_the_command_prints_a_schedule_for_train(tmp_path, monkeypatch, capsys):
    """0.5 / 0.25 + 0.5 is 2.5 times as many samples."""
    path = tmp_path / 'gradstats.jsonl'
    path.write_text('\n'.join(map(json.dumps, GOOD)))
    monkeypatch.setattr('sys.argv', ['schedule.py', str(path)])
    schedule_file.main()
    assert capsys.readouterr().out.splitlines()[-2:] == [
        '2.50 times as many samples as uncompressed', '--schedule p8@0,p4@0.5']
