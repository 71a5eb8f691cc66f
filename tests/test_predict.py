"""experiments/predict.py: the comparison on made-up states, and one tiny state from end to end."""
import json
from itertools import product

import pytest
from conftest import fails

import predict

STRATEGIES = predict.STRATEGIES


def made_up_lines():
    """The later a strategy stands in STRATEGIES, the better it trains.

    The gain, slope / cost, says so too. CA-MSE says the opposite, since bias^2 rises.
    """
    lines = []
    places = range(len(STRATEGIES))
    for dataset, point, seed, i in product(('shapes', 'fashion_mnist'), (0.1, 0.4), (0, 1), places):
        row = dict(cost=1 / (1 + i), bias2=i, bias2_sem=0, variance=0, variance_sem=0, norm2=1,
                   mean2=1, inner=1, inner_sem=0, cosine=1 - 0.1 * i, slope=1)
        lines.append(dict(
            dataset=dataset, variant='default', source='p4', budget=0.06, point=point, seed=seed,
            strategy=STRATEGIES[i], euclidean=row, adam=row, rollout=dict(student=i, teacher=-i),
            student=1.9 - 0.1 * i, teacher=1.9 - 0.1 * i, error=50 - i))
    return lines


@pytest.fixture
def results(tmp_path, monkeypatch):
    """predict.jsonl in a folder of its own, with the made-up lines."""
    path = tmp_path / 'predict.jsonl'
    monkeypatch.setattr(predict, 'RESULTS', tmp_path)
    monkeypatch.setattr(predict, 'LINES', path)
    path.write_text('\n'.join(map(json.dumps, made_up_lines())))
    return path


@pytest.fixture
def states(results):
    return predict.read_states()


def set_truth(states, losses):
    for state in states:
        for line, loss in zip(state.lines.values(), losses, strict=True):
            line['student'] = loss


def judge(name, states):
    return predict.judge(predict.PREDICTORS[name], states, 'student')


def test_spearman_by_hand():
    """Ranks 0 1 2 3 4 and 1 0 3 2 4: 1 - 6 sum d^2 / (n (n^2 - 1)) = 1 - 6 * 4 / 120 = 0.8."""
    assert predict.ranks([3, 1, 1, 7]) == [2, 0.5, 0.5, 3]
    assert predict.spearman([1, 2, 3, 4, 5], [20, 10, 40, 30, 50]) == pytest.approx(0.8)
    assert predict.spearman([1, 2, 3], [9, 8, 7]) == pytest.approx(-1)
    assert predict.spearman([1, 2, 3], [5, 5, 5]) == 0


@pytest.mark.parametrize('name', predict.PREDICTORS)
def test_an_order_is_right_or_wrong(states, name):
    correlation, regret = 1, 0
    if name.startswith(('CA-MSE', 'rollout, EMA', 'baseline: most expensive')):
        correlation, regret = -1, 1
    if name.startswith('best length'):
        # 1 - inner^2 / (norm2 mean2) = 0 for all: it tells nothing apart, and takes the first, p4
        correlation, regret = 0, 1
    verdicts = judge(name, states)
    assert len(verdicts) == len(states) == 8
    for verdict in verdicts.values():
        assert verdict.correlation == pytest.approx(correlation)
        assert verdict.regret == pytest.approx(regret)


def test_noise_in_a_common_scale_turns_no_order_around(states):
    for line in states[0].lines.values():
        line['adam']['norm2'] = -1
    verdicts = judge('CA-MSE, Adam', states)
    assert verdicts[states[0].key] == verdicts[states[1].key]


def test_a_slope_that_rises_comes_last(states):
    states[0].lines[STRATEGIES[0]]['adam']['slope'] = -1
    values = predict.PREDICTORS['gain'](states[0], states, 'student')
    assert values[0] == max(values) > 1


def test_regret_is_a_share_of_the_spread(states):
    """The gain takes the last strategy. With losses 3 1 3 3 5 2 this is (2 - 1) / (5 - 1)."""
    set_truth(states, [3, 1, 3, 3, 5, 2])
    for verdict in judge('gain', states).values():
        assert verdict.regret == pytest.approx(1 / 4)


def test_other_seeds_are_the_judges(states):
    """Seed 0 is the other way round than seed 1, and no order may profit from its own seed."""
    first = [state for state in states if state.seed == 0]
    set_truth(first, range(6))
    for (*_, seed, _), verdict in judge('gain', states).items():
        assert verdict.correlation == pytest.approx(-1 if seed else 1)
    for verdict in judge(predict.CEILING, states).values():
        assert verdict.correlation == pytest.approx(-1)
    # a seed alone judges itself, and has no ceiling
    for verdict in judge('gain', first).values():
        assert verdict.correlation == pytest.approx(-1)
    assert not judge(predict.CEILING, first)


def test_the_floor_comes_from_the_other_data_set(states):
    """On shapes the last strategies, of cosines below 0.75, are bad; the others need no floor."""
    set_truth([state for state in states if state.dataset == 'shapes'], [1.9, 1.8, 1.7, 5, 6, 7])
    for verdict in judge('gain, floor on the cosine', states).values():
        if verdict.dataset == 'shapes':
            assert verdict.regret == 1         # takes the last, as without a floor
        else:
            assert verdict.regret > 0          # the floor that shapes needs does harm


def test_the_constant_order_does_not_know_its_own_group(states):
    mine = states[0]
    set_truth([state for state in states if state.group == mine.group], range(6))
    verdicts = judge(predict.CONSTANT, states)
    assert verdicts[mine.key].correlation == pytest.approx(-1)


def test_a_state_with_a_missing_line_does_not_count(results):
    text, _, _ = results.read_text().rpartition('\n')
    results.write_text(text)
    assert len(predict.read_states()) == 7


def test_table_and_figure(results, capsys):
    predict.main(['table'])
    assert '| gain | 8 | 1.00 +- 0.00 |' in capsys.readouterr().out
    assert '## By 20-NN' in results.with_name('predict.md').read_text()
    predict.main(['figure'])
    assert results.with_name('predict.png').read_bytes().startswith(b'\x89PNG')


def test_run_goes_on_where_it_was_stopped(results, tmp_path, tiny_fashion, monkeypatch):
    """Two states of a tiny run. The second, made again alone, has the same lines."""
    small = dict(SOURCES=('p8-drop0.50',), STRATEGIES=('p4', 'p16'), POINTS=(0.2, 0.5), PROBES=4,
                 HELD_OUT=1, BANK=100, QUERIES=60)
    for name, value in small.items():
        monkeypatch.setattr(predict, name, value)
    flags = '--batch-size 16 --arch 16,1,1 --hidden 16'
    monkeypatch.setitem(predict.VARIANTS, 'default', flags.split())
    monkeypatch.chdir(tmp_path)
    trained = set()
    loss_of = predict.train.loss_of

    def spy(run, model, images, tau, *key):
        if isinstance(key[0], int):            # the key of a training step
            trained.add(str(tau))
        return loss_of(run, model, images, tau, *key)

    monkeypatch.setattr(predict.train, 'loss_of', spy)
    results.unlink()
    command = ['run', '--datasets', 'fashion_mnist', '--data-root', str(tiny_fashion),
               '--seeds', '0', '--budget', '0.0005']
    predict.main(command)
    text = results.read_text()
    lines = text.splitlines(keepends=True)
    assert len(lines) == 4
    assert trained == {'p8-drop0.50', 'p4', 'p16'}
    assert [state.point for state in predict.read_states()] == [0.2, 0.5]

    first = json.loads(lines[0])
    assert first['adam']['cost'] == 1          # of p4, relative to itself
    assert first['before']['student'] != first['student']
    for kept in (lines, lines[:2]):            # nothing is missing, or the second state
        results.write_text(''.join(kept))
        predict.main(command)
        assert results.read_text() == text


def test_another_budget_is_another_study(results, capsys):
    message = fails(capsys, lambda: predict.main(['run', '--budget', '0.01']))
    assert 'states of the budgets {0.06}, not 0.01; move it away first' in message
