"""The scripts of experiments/: what is run, what is collected, and the numbers made from it."""
import json
import sys

import pytest

import figures
import reproduce
import tables
import train

DYNAMIC = reproduce.DYNAMIC
INF = float('inf')

# A train.py that writes the log of a finished run, or fails in the run of seed 1.
STUB = '''
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags['--seed'] == '1':
    print('a line before')
    sys.exit('train.py: error: no such data')
folder = pathlib.Path('runs') / flags['--name']
folder.mkdir(parents=True)
step = dict(progress=1.0, samples=20, query='p8')
score = dict(progress=1.0, units=80.0, seconds=2.0, nn=50.0, knn=55.0)
log = [dict(score, progress=0.0, knn=30.0), step, score]
(folder / 'log.jsonl').write_text(''.join(json.dumps(line) + chr(10) for line in log))
print('trained', flags['--budget'])
'''


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """reproduce.py in an empty folder, with the stub in the place of train.py."""
    script = tmp_path / 'stub.py'
    script.write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, 'TRAIN', [sys.executable, str(script)])
    return tmp_path


def headline(flags):
    command = f'run headline --datasets shapes --budgets 0.08 {flags}'
    reproduce.main(command.split())


def collect():
    reproduce.main(['collect', '--results', 'runs.jsonl'])
    with open('runs.jsonl') as file:
        return [json.loads(line) for line in file]


def record(schedule, budget, seed, knn, dataset='shapes'):
    """A line of runs.jsonl. A thousand units take an uncompressed run 1 s and others 2 s."""
    units = 1e6 * budget
    seconds = units / (1000 if schedule == 'none' else 500)
    return dict(study='headline', dataset=dataset, method='moco', schedule=schedule, variant='',
                budget=budget, seed=seed, machine=dict(runs_at_once=1), samples=1000, units=units,
                seconds=seconds, nn=knn, knn=knn, curve=[dict(knn=30.0)])


@pytest.fixture
def two_seeds(tmp_path):
    """runs.jsonl: uncompressed 50 and 45 % at 1.28 M; p8 40 and 60 % at 0.08 and 0.32 M.

    On another data set there are constant strategies alone.
    """
    records = [record('none', 1.28, 0, 50.0), record('none', 1.28, 1, 45.0),
               record('p8', 0.08, 0, 41.0, 'cifar10'), record('p8', 0.32, 0, 42.0, 'cifar10')]
    for seed in (0, 1):
        records += [record('p8', 0.08, seed, 40.0), record('p8', 0.32, seed, 60.0)]
    path = tmp_path / 'runs.jsonl'
    path.write_text(''.join(json.dumps(line) + '\n' for line in records))
    return path


# ---- speed-up

@pytest.mark.parametrize('points, target, x', [
    ([(10, 50.0), (40, 60.0)], 55.0, 20),                   # half of log 4: twice 10
    ([(1, 0.0), (100, 1.0), (400, 9.0)], 5.0, 200),         # in the second piece
    ([(10, 50.0), (40, 60.0)], 60.0, 40),                   # at the last point
    ([(1, 2.0), (4, 6.0), (16, 4.0), (64, 8.0)], 4.0, 2),   # the first time, before it falls again
    ([(10, 50.0), (40, 60.0)], 50.0, -INF),                 # no lower budget was run
    ([(10, 50.0), (40, 60.0)], 60.1, INF),                  # nothing is extrapolated
    ([(10, 50.0)], 55.0, INF),
])
def test_crossing_is_linear_in_the_logarithm(points, target, x):
    assert tables.crossing(points, target) == pytest.approx(x)


@pytest.mark.parametrize('outcomes, text', [
    ([('', 8.0)], '8.0'),
    ([('>', 16.0), ('>', 15.5)], '> 15.5'),
    ([('not reached', 0.0), ('not reached', 0.0)], 'not reached'),
    ([('', 8.0), ('>', 16.0), ('not reached', 0.0)], '8.0, > 16.0, not reached'),
])
def test_bounds_are_not_averaged(outcomes, text):
    assert tables.speed_up_text(dict(enumerate(outcomes))) == text


def test_a_seed_without_shorter_runs_is_not_compared():
    """Seed 1 has no compressed run, so its 20 % do not enter the accuracy beside n = 1."""
    records = [record('none', 1.28, 0, 50.0), record('none', 1.28, 1, 20.0),
               record('p8', 0.32, 0, 50.0)]
    rows = [reproduce.Row('moco', 'none'), reproduce.Row('moco', 'p8')]
    line = tables.speed_up_table(records, 'shapes', rows).splitlines()[-1]
    assert line == '| moco | p8 | none | 1.28 | 50.00 | 1 | > 4.0 | > 2.0 |'


@pytest.mark.parametrize('sharing, seconds', [((), '3.0 +- 1.4'), ((1,), '2.0'), ((0, 1), '-')])
def test_seconds_are_those_of_runs_that_had_the_machine_to_themselves(sharing, seconds):
    """Seed 0 needs all of 0.32 M, seed 1 half a step of log 4: 4 and 8 times fewer units."""
    rows = [reproduce.Row('moco', 'none'), reproduce.Row('moco', 'p8')]
    records = [record('none', 1.28, 0, 50.0), record('none', 1.28, 1, 45.0)]
    for seed in (0, 1):
        records += [record('p8', 0.08, seed, 40.0), record('p8', 0.32, seed, 50.0)]
    for one in records:
        one['machine']['runs_at_once'] = 2 if one['seed'] in sharing else 1
    line = tables.speed_up_table(records, 'shapes', rows).splitlines()[-1]
    assert line == f'| moco | p8 | none | 1.28 | 47.50 +- 3.54 | 2 | 6.0 +- 2.8 | {seconds} |'


def test_best_recipe_is_that_of_each_seed_that_all_rows_have():
    """At 0.08 M p8 has no run: nothing is compared. At 0.32 M it has no seed 2."""
    scores = {('none', 0.08): (40.0,), ('none', 0.32): (50.0, 60.0, 90.0),
              ('p8', 0.32): (55.0, 45.0)}
    records = [record(name, budget, seed, score)
               for (name, budget), row in scores.items() for seed, score in enumerate(row)]
    rows = [reproduce.Row('moco', 'none'), reproduce.Row('moco', 'p8')]
    best = tables.best_of(records, 'shapes', rows)
    assert list(best) == [0.32]
    assert {seed: run['knn'] for seed, run in best[0.32].items()} == {0: 55.0, 1: 60.0}


def test_short_runs_are_judged_by_the_long_runs_of_other_seeds():
    """Long runs: p8 has 70 and 50, p8-drop0.50 60 and 90. Seed 0 chooses p8, and seed 1 judges that
    it loses 90 - 50 points. Seed 1 chooses p8-drop0.50, and loses 70 - 60 on seed 0.
    """
    rows = [reproduce.Row('moco', name) for name in ('p8', 'p8-drop0.50', DYNAMIC)]
    scores = {('p8', 0.08): (40.0, 30.0), ('p8-drop0.50', 0.08): (30.0, 40.0),
              ('p8', 0.32): (70.0, 50.0), ('p8-drop0.50', 0.32): (60.0, 90.0),
              ('p8', 1.28): (99.0,), (DYNAMIC, 0.08): (99.0, 99.0)}
    records = [record(name, budget, seed, score)
               for (name, budget), pair in scores.items() for seed, score in enumerate(pair)]
    table = tables.pilot_table(records, 'shapes', rows).splitlines()
    assert table[2:] == ['| 0.32 | p8, p8-drop0.50 | 40.0, 10.0 | 40.0, 0.0 | 0.0, 10.0 |']
    assert tables.pilot_table(records, 'cifar10', rows) == ''


def test_page_has_index_speed_up_and_scores(two_seeds):
    """Seed 0: 50 is half way from 40 to 60, so b = 0.08 * 4^(1/2) = 0.16 M, and 1.28 / 0.16 = 8.

    Seed 1: 45 is a quarter, b = 0.08 * 4^(1/4), and 1.28 / b = 11.31. 9.66 +- 3.31 / sqrt(2) units,
    and half of it in seconds.
    """
    reproduce.main(['tables', '--results', str(two_seeds)])
    page = two_seeds.with_name('README.md').read_text()
    assert '- [runs.jsonl](runs.jsonl)' in page
    assert 'before training: shapes 30.0 %' in page
    speed_up = '1.28 | 47.50 +- 3.54 | 2 | 9.7 +- 2.3 | 4.8 +- 1.2 |'
    assert f'| moco | p8 | none | {speed_up}' in page
    assert '| moco | none | 1.28 | 2 | 1,000 +- 0 | 1,280 +- 0 | 47.50 +- 3.54 |' in page
    assert '`python experiments/reproduce.py run headline --datasets shapes`' in page


def test_headline_shows_means_and_the_speed_up_of_the_page(two_seeds):
    axis = figures.headline(two_seeds).axes[0]
    uncompressed, compressed, random = axis.get_lines()
    assert uncompressed.get_xydata().tolist() == [[1.28e6, 47.5]]
    assert compressed.get_xydata().tolist() == [[0.08e6, 40.0], [0.32e6, 60.0]]
    assert set(random.get_ydata()) == {30.0}
    assert axis.texts[-1].get_text() == '9.7 +- 2.3 times fewer'


@pytest.mark.parametrize('figure', ['headline', 'decay'])
def test_figures_are_written(figure, two_seeds, tmp_path):
    output = tmp_path / 'figure.png'
    figures.main([figure, '--results', str(two_seeds), '-o', str(output)])
    assert output.read_bytes()[:4] == b'\x89PNG'


# ---- run and collect

def test_finished_runs_are_skipped_and_collected_once(stub, capsys):
    headline('--seeds 0 --jobs 2')
    out = capsys.readouterr().out
    assert '0 runs are finished, 4 to do' in out
    assert 'shapes-moco-none-0.08M-seed0: trained 0.08' in out
    headline('--seeds 0')                                   # the stub fails if its folder exists
    assert capsys.readouterr().out == '4 runs are finished, 0 to do\n'

    for new in (4, 0):
        lines = collect()
        assert f'has 4, {new} of them new' in capsys.readouterr().out
    assert [line['schedule'] for line in lines] == ['none', 'p8', 'p8-drop0.50', DYNAMIC]
    assert lines[0]['command'] == ('python train.py --method moco --schedule none --budget 0.08 '
                                   '--seed 0 --eval-every 1')
    assert lines[0]['knn'] == 55.0 and lines[0]['samples'] == 20
    assert [point['knn'] for point in lines[0]['curve']] == [30.0, 55.0]
    assert lines[0]['strategies'] == {'p8': 1.0}

    # scores of eval.py that come later replace the line
    scores = stub / 'runs' / lines[0]['name'] / 'eval.jsonl'
    scores.write_text('{"name": "linear", "score": 61.234}')
    lines = collect()
    assert len(lines) == 4 and lines[0]['eval'] == {'linear': 61.23}


def test_eval_gives_each_run_the_scores_that_it_lacks(stub, monkeypatch):
    """A stub of eval.py; one run has a linear score already."""
    script = stub / 'stub_eval.py'
    script.write_text("""
import json, pathlib, sys
protocol, flags = sys.argv[1], sys.argv[2:]
weights = pathlib.Path(flags[flags.index('--weights') + 1])
with weights.with_name('eval.jsonl').open('a') as file:
    file.write(json.dumps(dict(name=protocol, score=50, flags=flags)) + chr(10))
""")
    monkeypatch.setattr(reproduce, 'EVAL', [sys.executable, str(script)])
    headline('--seeds 0')
    halfway = stub / 'runs' / 'shapes-moco-p8-0.08M-seed0'
    (halfway / 'eval.jsonl').write_text('{"name": "linear", "score": 70, "flags": []}\n')
    for _ in range(2):
        headline('--seeds 0 --eval')
    assert tables.scores_of(halfway) == {'linear': 70, 'finetune': 50}
    for run in stub.glob('runs/*'):
        lines = [json.loads(text) for text in (run / 'eval.jsonl').read_text().splitlines()]
        assert [line['name'] for line in lines] == ['linear', 'finetune']
        assert lines[1]['flags'][:2] == ['--limit', '10000']
        assert '--limit' not in lines[0]['flags']


def test_failure_is_one_line_and_cancels_the_rest(stub, capsys):
    with pytest.raises(SystemExit):
        headline('--seeds 1 0')
    captured = capsys.readouterr()
    assert captured.err == ('reproduce.py: error: shapes-moco-none-0.08M-seed1 failed: train.py: '
                            'error: no such data (exit status 1; 0 stopped, 3 not begun)\n')
    assert captured.out.count('trained') == 4               # seed 0 comes first


def test_unfinished_runs_are_not_collected(stub, capsys):
    headline('--seeds 0')
    log = stub / 'runs' / 'shapes-moco-p8-0.08M-seed0' / 'log.jsonl'
    lines = log.read_text().splitlines()
    log.write_text('\n'.join(lines[:-1]) + '\n{"step": 1, "progr')    # killed in the last line
    assert len(collect()) == 3


def test_runs_that_two_studies_share_have_one_name():
    """All four rows on two sets, 3 seeds at 0.08 and 0.32 M."""
    one, other = [{run.name: run.flags() for run in reproduce.runs_of(study)}
                  for study in ('headline', 'schedules')]
    shared = one.keys() & other.keys()
    assert len(shared) == 4 * 2 * (3 + 3)
    assert all(one[name] == other[name] for name in shared)


@pytest.mark.parametrize('study', reproduce.STUDIES)
def test_commands_are_those_of_train_and_none_runs_twice(study):
    runs = reproduce.runs_of(study)
    assert len({run.name for run in runs}) == len(runs)
    for run in runs:
        args, _ = train.parse_args([*run.flags(), '--name', run.name])
        assert (args.budget, args.seed, args.name) == (run.budget, run.seed, run.name)


def test_speed_leaves_out_the_first_lines_of_each_strategy():
    """p8-drop0.50 spends 300 units at 10 a second, p8 as many at 30: 600 units in 40 s."""
    def lines(query, units, seconds):
        return [dict(query=query, units=u, seconds=s) for u, s in zip(units, seconds)]

    steps = lines('p8-drop0.50', (100, 200, 250, 300), (60, 90, 95, 100))
    steps += lines('p8', (360, 480, 540, 600), (170, 198, 200, 202))
    assert reproduce.steady_speed(steps) == pytest.approx(600 / (30 + 10))
    assert reproduce.steady_speed(steps[:4]) == pytest.approx(10)


@pytest.mark.parametrize('command, message', [
    ('run headline --jobs 0', 'argument --jobs: 0 must be at least 1'),
    ('run headline --budgets 0', 'argument --budgets: 0 must be above 0'),
    ('run headlines', "argument STUDY: invalid choice: 'headlines'"),
    ('collect --results none.jsonl', "no finished run of a study below 'runs'"),
    ('tables --results none.jsonl', "no results at 'none.jsonl'"),
    ('tables --results empty.jsonl', "'empty.jsonl' holds no runs"),
    ('tables --results stub.py', "'stub.py' is not a file of JSON lines"),
])
def test_errors_are_one_line(stub, capsys, command, message):
    (stub / 'empty.jsonl').touch()
    with pytest.raises(SystemExit):
        reproduce.main(command.split())
    error = capsys.readouterr().err
    assert message in error and error.count('\n') == 1
