"""The scripts of experiments/: what is run, what is collected, the numbers and pictures of it."""
import json
import shlex
from math import inf

import pytest
import torch
import torch.nn.functional as F

import pictures
import reproduce
import train
from compress import Compression, pi_resize

# A train.py that leaves the log of a finished run, or fails at seed 1.
STUB = '''
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags['--seed'] == '1':
    print('a line before')
    sys.exit('train.py: error: no such data')
folder = pathlib.Path('runs') / flags['--name']
score = dict(progress=1.0, units=80.0, seconds=2.0, nn=50.0, knn=55.004)
log = [dict(score, progress=0.0, knn=30.0), dict(progress=1.0, loss=1.0), score]
(folder / 'log.jsonl').write_text(''.join(json.dumps(line) + chr(10) for line in log))
print('trained', flags['--budget'])
'''


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """reproduce.py in an empty folder, without results, with the stub in the place of train.py."""
    (tmp_path / 'train.py').write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, 'ROOT', tmp_path)
    monkeypatch.setattr(reproduce, 'RESULTS', tmp_path / 'runs.jsonl')
    return tmp_path


def verdict(*flags):
    """Four runs on shapes for each seed: p8 and p8-drop0.50, small and full."""
    reproduce.main(['run', 'verdict', '--only', 'shapes.*0.08M.*seed[01]', *flags])


def record(schedule, budget, seed, knn, **others):
    """A record of runs.jsonl."""
    views = '' if schedule == 'none' else 'full'
    return dict(dict(dataset='shapes', method='moco', schedule=schedule, variant='', views=views,
                     name='', budget=budget, seed=seed, units=1e6 * budget, knn=knn), **others)


# ---- speed-up

def test_crossing_is_linear_in_the_logarithm():
    """50 % to 60 % from 10 to 40: 55 % half way in log 4, twice 10. Nothing is extrapolated."""
    points = (10, 50.0), (40, 60.0)
    found = [reproduce.crossing(points, target) for target in (49.0, 50.0, 55.0, 60.1)]
    assert found == pytest.approx([10, 10, 20, inf])
    falls_again = (1, 2.0), (4, 6.0), (16, 4.0), (64, 8.0)
    assert reproduce.crossing(falls_again, 4.0) == pytest.approx(2)


def test_speed_up_divides_whole_runs_of_the_same_seed_and_bounds_are_not_averaged():
    """50 % is half way in log 4 from 0.08 to 0.32 M: 1.28 / 0.16 = 8; at 0.32 M: 4.

    Seed 3 has no compressed run, seed 4 a longer one alone: they are not compared.
    """
    base = {1.28: {seed: dict(units=1.28, knn=50.0) for seed in range(5)}}
    columns = {0.08: (40.0, 40.0, 50.0), 0.32: (60.0, 50.0, 60.0)}
    fast = {budget: {seed: dict(budget=budget, units=budget, knn=knn)
                     for seed, knn in enumerate(column)} for budget, column in columns.items()}
    fast[2.56] = {4: dict(budget=2.56, units=2.56, knn=90.0)}
    assert reproduce.speed_up(base, fast, 1.28) == '8.0, 4.0, > 16.0'
    del fast[0.08][2], fast[0.32][2]
    assert reproduce.speed_up(base, fast, 1.28) == '6.0 +- 2.8'
    assert reproduce.speed_up(base, fast, 1.28, factor=2) == '3.0 +- 1.4'
    del fast[0.32]
    assert reproduce.speed_up(base, fast, 1.28) == 'not reached, not reached'


def test_best_recipe_is_that_of_each_seed_that_all_recipes_have():
    """At 0.08 M one recipe was run: nothing is compared. At 0.32 M batch64 has no seed 1."""
    rows = (0.08, '', 0, 40.0), (0.32, '', 0, 50.0), (0.32, '', 1, 90.0), (0.32, 'batch64', 0, 55.0)
    records = [record('none', budget, seed, knn, variant=variant)
               for budget, variant, seed, knn in rows]
    best = reproduce.best_of(records, 'shapes')
    assert [(budget, by_seed[0]['knn'], len(by_seed)) for budget, by_seed in best.items()] == [
        (0.32, 55.0, 1)]


# ---- protocol

def test_the_recipe_with_the_best_mean_of_the_search_is_chosen():
    """The best single run (batch64, 60) does not win. Nothing is chosen from part of a search."""
    scores = {'': (50, 50), 'batch64': (60, 45), 'jitter2': (54, 53), 'crop0.6': (1, 1),
              'jitter2-batch64': (2, 2)}
    records = [dict(name=reproduce.name_of(run), knn=scores[run.variant][run.seed - 10])
               for run in reproduce.runs_of('search')]
    assert reproduce.chosen(records, 'shapes', 'p8@0,p4@0.5') == 'jitter2'
    part = [record for record in records if 'crop0.6' not in record['name']]
    with pytest.raises(ValueError, match='shapes-moco-p8-crop0.6-0.08M-seed10 is not'):
        reproduce.chosen(part, 'shapes', 'p8')


def test_both_sides_of_the_search_have_the_same_runs_and_other_seeds_judge(monkeypatch):
    sides = [{run[:2] + run[3:6] for run in reproduce.runs_of('search') if run.schedule == schedule}
             for schedule in ('none', 'p8', 'p8-drop0.50')]
    assert sides[0] == sides[1] == sides[2]
    monkeypatch.setattr(reproduce, 'chosen', lambda *key: 'jitter2')
    judge = {(run.variant, run.seed) for run in reproduce.runs_of('judge')}
    assert judge == {('jitter2', seed) for seed in (0, 1, 2)}


def test_commands_are_those_of_train_and_none_runs_twice(monkeypatch):
    monkeypatch.setattr(reproduce, 'chosen', lambda *key: 'jitter2-batch64')
    for study in reproduce.STUDIES:
        runs = reproduce.runs_of(study)
        assert len(set(map(reproduce.name_of, runs))) == len(runs)
        for run in runs[::7]:
            args, _ = train.parse_args(reproduce.flags_of(run))
            assert (args.budget, args.views) == (run.budget, run.views or 'full')


# ---- run and collect

def test_a_run_that_fails_is_named_and_finished_or_recorded_ones_are_skipped(stub, capsys):
    """Seed 1 fails again and again; seed 0 is finished, then only in the results."""
    for state in ('new', 'finished', 'recorded'):
        with pytest.raises(SystemExit, match='4 of'):
            verdict('--jobs', '2')
        out = capsys.readouterr().out
        assert 'shapes-moco-p8-0.08M-seed1: failed: train.py: error: no such data' in out
        assert ('shapes-moco-p8-0.08M-seed0-small: trained 0.08' in out) == (state == 'new')
        reproduce.main(['collect'])
        if state == 'finished':
            (stub / 'runs').rename(stub / 'elsewhere')


def test_collecting_adds_lines_and_leaves_the_others_as_they_are(stub):
    old = '{"name": "a run of the past", "schedule": "p8", "units": 1000000.0}'
    (stub / 'runs.jsonl').write_text(old + '\n')
    with pytest.raises(SystemExit):
        verdict()
    log = stub / 'runs' / 'shapes-moco-p8-0.08M-seed0' / 'log.jsonl'
    log.write_text(log.read_text()[:-9])                              # killed
    for _ in range(2):
        reproduce.main(['collect'])
        lines = (stub / 'runs.jsonl').read_text().splitlines()
        assert lines[0] == old and len(lines) == 4
    new = json.loads(lines[1])
    assert new['command'] == ('python train.py --method moco --schedule p8 --views small '
                              '--budget 0.08 --seed 0 --eval-every 1')
    assert [new['knn'], *(score['knn'] for score in new['curve'])] == [55.0, 30.0, 55.0]
    assert [run['views'] for run in reproduce.load_results()] == ['full', 'small', 'full', 'small']


def test_a_dry_run_prints_training_and_both_scores(stub, capsys):
    reproduce.main(['run', 'machine', '--only', 'cifar10.*seed0', '--dry-run', '--eval',
                    '--data-root', 'my data'])
    commands = list(map(shlex.split, capsys.readouterr().out.splitlines()))
    assert [command[1:4] for command in commands] == [
        ['train.py', '--dataset', 'folder'],
        ['eval.py', '--protocol', 'linear'],
        ['eval.py', '--protocol', 'finetune']]
    assert all('my data/cifar10' in command for command in commands)


# ---- tables

def test_small_and_full_views_are_compared_seed_by_seed():
    """Gains of 1 and 3: 2 +- sqrt(2) / sqrt(2). Seed 5 has no partner."""
    records = [record('p8', 0.08, seed, 50.0 + seed) for seed in (0, 1)]
    records += [record('p8', 0.08, seed, knn, views='small')
                for seed, knn in ((0, 51.0), (1, 54.0), (5, 99.0))]
    assert '| p8 | 0.08 | +2.0 +- 1.0 (2) |  |  |' in reproduce.verdict_table(records)


def test_the_table_of_runs_has_means_and_leaves_out_short_runs_and_single_seeds():
    records = [record('none', budget, seed, knn) for budget, seed, knn in (
        (0.32, 0, 50.0), (0.32, 1, 52.0), (4, 0, 70.0), (0.08, 0, 1.0), (0.08, 1, 1.0))]
    records[0]['linear'] = 60.0
    records.append(record('p8', 0.32, 0, 1.0))
    assert reproduce.score_table(records).splitlines()[2:] == [
        '| moco | none |  |  | 0.32 | 51.0 (2), LP 60.0 (1) |  |  |',
        '| moco | none |  |  | 4 | 70.0 (1) |  |  |']


def test_the_chosen_recipes_are_compared_once_they_are_judged(monkeypatch):
    records = [record('none', 0.32, 0, 50.0), record('none', 0.32, 0, 55.0, variant='jitter2'),
               record('p8', 0.32, 0, 70.0), record('none', 0.32, 0, 53.0, variant='batch64'),
               record('p8', 0.32, 0, 71.0, variant='batch64')]
    for chosen, scores in ((reproduce.chosen, [55, 70]), (lambda *key: 'batch64', [53, 71])):
        monkeypatch.setattr(reproduce, 'chosen', chosen)
        sides = reproduce.sides(records, 'shapes')
        assert [side[0.32][0]['knn'] for side in sides] == scores


def test_the_page_is_that_of_the_recorded_runs(tmp_path, monkeypatch):
    page = reproduce.RESULTS.with_name('README.md').read_text()
    (tmp_path / 'runs.jsonl').write_text(reproduce.RESULTS.read_text())
    monkeypatch.setattr(reproduce, 'RESULTS', tmp_path / 'runs.jsonl')
    reproduce.main(['tables'])
    assert (tmp_path / 'README.md').read_text() == page


# ---- pictures

def test_seen_pixels_give_the_tokens_of_the_large_patches():
    """A kernel of 16 x 16 on the drawn pixels equals the resized kernel on the photo."""
    photo = F.avg_pool2d(torch.rand(1, 3, 240, 240), 5, 1, 2)
    photo = 0.4 + 0.2 * photo                                # smooth enough to stay in [0, 1]
    kernel = torch.randn(4, 3, 16, 16)
    drawn = pictures.seen(photo, Compression(48))
    tokens = F.conv2d(drawn[None], kernel, stride=16)
    expected = F.conv2d(photo, pi_resize(kernel, 48), stride=48)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-3)


def test_neighbours_are_the_nearest_and_other_classes_are_framed():
    """Queries along two axes of the plane; near the first, one image is of another class."""
    angles = torch.tensor([0.0, 1.571, 0.0, 0.1, 0.2, 1.4, 1.5, 1.6])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 1, 0, 7, 0, 1, 1, 1])
    axes = pictures.Figure().subplots(2, 4)
    pictures.draw_neighbours(axes, features, labels, torch.arange(8).view(8, 1, 1, 1), 'so')
    drawn = [axis.images[0].get_array()[0, 0, 0] for axis in axes.flat]
    framed = [axis.spines['left'].get_visible() for axis in axes.flat]
    assert drawn == [0, 2, 3, 4, 1, 7, 6, 5] and [i for i in range(8) if framed[i]] == [2]


def test_curves_say_how_much_sooner_the_lower_final_accuracy_is_reached(tmp_path):
    """60 % is half way from 40 to 80: at 20 of 40 seconds, where the other takes 100."""
    for name, end, knn in (('slow', 100, (30, 60)), ('fast', 40, (40, 80))):
        (tmp_path / name).mkdir()
        lines = [dict(seconds=x, units=3 * x, knn=y) for x, y in zip((0, end), knn)]
        lines.append(dict(loss=1.0, strategy='p8'))
        (tmp_path / name / 'log.jsonl').write_text('\n'.join(map(json.dumps, lines)))
    figure = pictures.curves(tmp_path / 'slow', tmp_path / 'fast')
    titles = [axis.get_title() for axis in figure.axes]
    assert titles == ['5.0 times fewer seconds', '5.0 times fewer units']


@pytest.mark.parametrize('words', [
    ['compression'], ['headline'], ['gradstats', str(reproduce.RESULTS.with_name('gradstats.jsonl'))]])
def test_pictures_are_written(words, tmp_path):
    pictures.main([*words, '-o', str(tmp_path / 'picture.png')])
    assert (tmp_path / 'picture.png').read_bytes()[:4] == b'\x89PNG'


# ---- lightly

@pytest.mark.parametrize('plain', [True, False])
def test_the_marked_lines_train_lightlys_loop(plain):
    """Three steps; all parameters of the query side get a gradient."""
    bench = pytest.importorskip('bench')
    model = bench.with_lightly.MoCo(plain, width=64, depth=1)
    step = bench.trainer(model, model)
    for _ in range(3):
        step(*torch.randn(2, 8, 3, 64, 64))
    assert all(p.grad is not None for p in (*model.vit.parameters(), *model.head.parameters()))
