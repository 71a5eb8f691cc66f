import itertools
import json
import random

import pytest
import torch
from timm.scheduler import PolyLRScheduler

import schedule as schedule_file
from schedule import (Schedule, best_path, cosine, cost_adjusted_mse, errors_over_progress, polynomial, ramp, solve, warmup)


def test_curves():
    assert [round(polynomial(p), 4) for p in (0, .25, .5, .75, 1)] == [1, .9375, .75, .4375, 0]
    assert [round(cosine(p), 4) for p in (0, .25, .5, .75, 1)] == [1, .8536, .5, .1464, 0]
    assert all(polynomial(p / 100) > cosine(p / 100) for p in range(1, 100))
    # MoCo-v3's momentum at 0, 25, 50, 75, 100 %
    assert [round(ramp(0.99, 1, p), 8) for p in (0, .25, .5, .75, 1)] == [.99, .99146447, .995, .99853553, 1]
    # DINO's weight decay
    assert [round(ramp(0.04, 0.4, p), 6) for p in (0, .25, .5, .75)] == [.04, .092721, .22, .347279]
    assert [warmup(p, 0.2) for p in (0, 0.1, 0.2, 0.9)] == [0, 0.5, 1, 1] and warmup(0, 0) == 1


@pytest.mark.parametrize('alpha', (1, 2, 3))
def test_polynomial_equals_timm(alpha):
    scheduler = PolyLRScheduler(torch.optim.SGD([torch.zeros(1)], lr=1.0), t_initial=100, power=1.0, k_decay=alpha)
    for t in range(100):
        assert abs(scheduler._get_lr(t)[0] - polynomial(t / 100, alpha)) < 1e-9


def test_schedule_at_and_text():
    schedule = Schedule.parse('p8-drop0.50@0, p8@0.25,p4@0.7')
    assert [schedule.at(p) for p in (0, 0.2499, 0.25, 0.6999, 0.7, 1)] == ['p8-drop0.50', 'p8-drop0.50', 'p8', 'p8', 'p4', 'p4']
    assert Schedule.parse(str(schedule)) == schedule == Schedule.from_json(schedule.to_json())
    assert Schedule.parse('p8').at(0.5) == 'p8'


@pytest.mark.parametrize('text', ['p8@0.1', 'p8@0,p4@0', 'p8@0,p4@0.9,p2@0.5', 'p8@0,p4@1', 'p8@x', 'p8@0,p4@-1', 'p8@0,p4@nan'])
def test_schedule_refuses(text):
    with pytest.raises(ValueError, match='schedule|stages'):
        Schedule.parse(text)


# ---- the solver

def table(strategies, points=(0, 0.5, 1), error=0.0):
    """strategies: {name: (cost, bias2 per point, variance per point)}"""
    return [dict(progress=p, strategy=name, cost=c, bias2=b[i], bias2_sem=error, variance=v[i], variance_sem=error, norm2=1.0)
            for i, p in enumerate(points) for name, (c, b, v) in strategies.items()]


def random_values(rng, strategies, length):
    """Values by strategy, and costs, of which some are equal."""
    cost = lambda: rng.choice((0.2, 0.5, rng.uniform(0.1, 1)))
    return {f's{k}': [rng.uniform(0, 1) for _ in range(length)] for k in range(strategies)}, {f's{k}': cost() for k in range(strategies)}


@pytest.mark.parametrize('seed', range(60))
def test_best_path_equals_brute_force(seed):
    rng = random.Random(seed)
    values, costs = random_values(rng, rng.randint(1, 4), rng.randint(1, 6))
    if seed % 3 == 0:  # many exact ties
        values = {s: [round(v) for v in column] for s, column in values.items()}
    length = len(values['s0'])
    paths = list(itertools.product(values, repeat=length))
    total = lambda path: sum(values[s][i] for i, s in enumerate(path))
    rising = [path for path in paths if all(costs[a] <= costs[b] for a, b in zip(path, path[1:]))]
    found = best_path(values, costs)
    assert tuple(found) in rising and total(found) == pytest.approx(min(map(total, rising)))
    free = best_path(values, costs, monotone=False)
    assert total(free) == pytest.approx(min(map(total, paths)))
    for i, s in enumerate(free):  # a tie goes to the cheaper
        assert not any(values[t][i] == values[s][i] and costs[t] < costs[s] for t in values)


def test_monotone_optimum_is_global_not_greedy():
    # the pointwise minimum falls back at the end; taking 'b' early would forbid 'a' for good
    values = {'a': [1.0, 1.0, 0.0], 'b': [2.0, 0.9, 9.0]}
    assert best_path(values, {'a': 0.1, 'b': 1.0}) == ['a', 'a', 'a']
    assert best_path(values, {'a': 0.1, 'b': 1.0}, monotone=False) == ['a', 'b', 'a']


def test_ties_within_the_error_bars_go_to_the_cheaper():
    strategies = {'p4': (1, (0, 0, 0), (1, 1, 1)), 'p8': (0.25, (0.8, 0.8, 0.8), (1, 1, 1))}
    assert solve(table(strategies)).stages == ((0.0, 'p4'),)
    assert solve(table(strategies, error=0.1)).stages == ((0.0, 'p8'),)
    assert solve(table(strategies, error=0.02)).stages == ((0.0, 'p4'),)


def test_horizon_weighs_bias():
    strategies = {'p4': (1, (0, 0), (1, 1)), 'p8': (0.25, (0.2, 0.2), (1, 1))}
    rows = table(strategies, (0, 1))
    assert solve(rows).at(0.5) == 'p8' and solve(rows, horizon=10).at(0.5) == 'p4'
    assert cost_adjusted_mse(0.2, 1, 0.25) == pytest.approx(0.45) and cost_adjusted_mse(-0.1, 1, 0.25, 10) == pytest.approx(0.025)


def test_errors_are_log_linear_between_measurements():
    strategies = {'p4': (1, (0, 0), (1, 4)), 'p8': (0.5, (0, 0), (2, 8))}
    grid, errors = errors_over_progress(table(strategies, (0.2, 0.6)))
    values = dict(zip(grid, (v for v, _ in errors['p4'])))
    assert values[0.0] == values[0.2] == pytest.approx(1) and values[0.4] == pytest.approx(2) and values[0.8] == values[1.0] == pytest.approx(4)


def test_crossing_is_where_the_logarithms_cross():
    strategies = {'p4': (1, (0, 0), (1, 1)), 'p8': (0.5, (0, 0), (0.5, 8))}  # 0.25 -> 4 crosses 1 half way
    schedule = solve(table(strategies, (0, 1)))
    assert [s for _, s in schedule.stages] == ['p8', 'p4'] and schedule.stages[1][0] == pytest.approx(0.5, abs=0.011)


GOOD = {'p4': (1, (0, 0, 0), (1, 1, 1)), 'p8': (0.25, (0.1, 0.2, 0.3), (1, 1, 1))}


@pytest.mark.parametrize('change, message', [
    (lambda rows: rows.pop(3), 'p8 is missing at progress 0.5'),
    (lambda rows: [rows.remove(r) for r in rows[::2]], 'base strategy is missing'),
    (lambda rows: rows[2].update(bias2=float('nan')), r'row 3 \(p4 at progress 0.5\): bias2 is nan'),
    (lambda rows: rows[1].update(cost=0), r'row 2 \(p8 at progress 0\): cost 0'),
    (lambda rows: rows[1].update(cost=0.3), 'but 0.3 at another|cost 0.25, but'),
    (lambda rows: rows.append(dict(rows[1])), 'row 7 .*measured before, in row 2'),
    (lambda rows: rows[1].pop('variance'), 'row 2 .*variance is None'),
    (lambda rows: rows[0].update(norm2=-0.1), 'row 1 .*lost in noise'),
    (lambda rows: rows[1].update(norm2=0.1, norm2_sem=0.2), 'row 2 .*lost in noise'),
    (lambda rows: rows[1].pop('strategy'), 'row 2 .*strategy must be a name'),
    (lambda rows: rows[0].update(progress=1.2), 'outside'),
    (lambda rows: rows.clear(), 'empty'),
])
def test_bad_tables_are_refused(change, message):
    rows = table(GOOD)
    change(rows)
    with pytest.raises(ValueError, match=message):
        solve(rows)


def test_command_line(tmp_path, monkeypatch, capsys):
    (tmp_path / 'g.jsonl').write_text('\n'.join(json.dumps(row) for row in table(
        {'p4': (1, (0, 0, 0), (1, 1, 1)), 'p8': (0.25, (0.1, 0.4, 2), (1, 1, 1))})))
    monkeypatch.setattr('sys.argv', ['schedule.py', str(tmp_path / 'g.jsonl'), '-o', str(tmp_path / 's.json'), '--budget', '0.1'])
    schedule_file.main()
    printed = capsys.readouterr().out
    written = Schedule.from_json((tmp_path / 's.json').read_text())
    assert [s for _, s in written.stages] == ['p8', 'p4'] and str(written) in printed
    units = written.stages[1][0] * 1e5
    assert f'{units:,.0f} units, {units / 0.25:12,.0f} samples'.replace(' ', '') in printed.replace(' ', '')
    (tmp_path / 'g.jsonl').write_text('{"progress": 0}\nnonsense')
    with pytest.raises(ValueError, match='line 2 is not a JSON object'):
        schedule_file.main()


def test_points():
    assert Schedule.points('1,0,0.5') == [0, 0.5, 1]
    for text in ('', 'a', '0,2', '-0.1'):
        with pytest.raises(ValueError, match='progress points'):
            Schedule.points(text)
