"""The scripts of experiments/: what is run, what is collected, the numbers and pictures of it."""
import json
import sys
from math import inf

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import pictures
import reproduce
import train
from compress import Compression, pi_resize

# A train.py that leaves the files of a finished run, or fails in the run of seed 1.
STUB = '''
import json, pathlib, sys
flags = dict(zip(sys.argv[1::2], sys.argv[2::2]))
if flags['--seed'] == '1':
    print('a line before')
    sys.exit('train.py: error: no such data')
folder = pathlib.Path('runs') / flags['--name']
step = dict(step=5, progress=1.0, loss=1.0, strategy=flags['--schedule'])
score = dict(progress=1.0, units=80.0, seconds=2.0, nn=50.0, knn=55.0)
log = [dict(score, progress=0.0, knn=30.0), step, score]
(folder / 'log.jsonl').write_text(''.join(json.dumps(line) + chr(10) for line in log))
(folder / 'args.json').write_text('{"batch_size": 4}')
print('trained', flags['--budget'])
'''


@pytest.fixture
def stub(tmp_path, monkeypatch):
    """reproduce.py in an empty folder, without results, with the stub in the place of train.py."""
    (tmp_path / 'stub.py').write_text(STUB)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(reproduce, 'TRAIN', [sys.executable, str(tmp_path / 'stub.py')])
    monkeypatch.setattr(reproduce, 'RESULTS', tmp_path / 'runs.jsonl')
    return tmp_path


def verdict(flags):
    """Four runs for each seed: p8 and p8-drop0.50, small and full."""
    reproduce.main(f'run verdict --datasets shapes --budgets 0.08 {flags}'.split())


def record(schedule, budget, seed, knn, **others):
    """A record of runs.jsonl. A thousand units take an uncompressed run 1 s and others 2 s."""
    units = 1e6 * budget
    seconds = units / (1000 if schedule == 'none' else 500)
    views = '' if schedule == 'none' else 'full'
    return dict(dict(dataset='shapes', method='moco', schedule=schedule, variant='', views=views,
                     budget=budget, seed=seed, units=units, seconds=seconds, knn=knn,
                     curve=[dict(knn=30.0)]), **others)


def searched(scores, seeds=(10, 11)):
    """Records of a search of p8: {recipe: 20-NN of each seed}."""
    return [record('p8', 0.08, seed, knn, variant=recipe, views='small')
            for recipe, by_seed in scores.items() for seed, knn in zip(seeds, by_seed)]


# ---- speed-up

@pytest.mark.parametrize('points, target, x', [
    ([(10, 50.0), (40, 60.0)], 55.0, 20),                   # half of log 4: twice 10
    ([(1, 0.0), (100, 1.0), (400, 9.0)], 5.0, 200),         # in the second piece
    ([(1, 2.0), (4, 6.0), (16, 4.0), (64, 8.0)], 4.0, 2),   # the first time, before it falls again
    ([(10, 50.0), (40, 60.0)], 50.0, -inf),                 # no lower budget was run
    ([(10, 50.0), (40, 60.0)], 60.1, inf),                  # nothing is extrapolated
])
def test_crossing_is_linear_in_the_logarithm(points, target, x):
    assert reproduce.crossing(points, target) == pytest.approx(x)


@pytest.mark.parametrize('outcomes, text', [
    ([('', 8.0)], '8.0'),
    ([('', 8.0), ('', 10.0)], '9.0 +- 1.4'),
    ([('>', 16.0), ('>', 9.5)], '> 9.5'),
    ([('not reached', 0.0), ('not reached', 0.0)], 'not reached'),
    ([('', 8.0), ('>', 16.0), ('not reached', 0.0)], '8.0, > 16.0, not reached'),
])
def test_bounds_are_not_averaged(outcomes, text):
    assert reproduce.speed_up_text(dict(enumerate(outcomes))) == text


def test_speed_up_divides_whole_runs_of_the_same_seed():
    """50 % is half way in log 4 from 40 to 60, at 0.16 M: 1.28 / 0.16 = 8, in seconds half of it.

    Seed 1 has no compressed run and is not compared; a longer compressed run is none either.
    """
    base = {1.28: {seed: record('none', 1.28, seed, 50.0) for seed in (0, 1, 2)}}
    fast = {0.08: {0: record('p8', 0.08, 0, 40.0)}, 0.32: {0: record('p8', 0.32, 0, 60.0)},
            2.56: {2: record('p8', 2.56, 2, 90.0)}}
    assert reproduce.speed_ups(base, fast, 1.28) == {0: ('', pytest.approx(8))}
    assert reproduce.speed_ups(base, fast, 1.28, 'seconds') == {0: ('', pytest.approx(4))}


def test_best_recipe_is_that_of_each_seed_that_all_recipes_have():
    """At 0.08 M one recipe was run: nothing is compared. At 0.32 M batch64 has no seed 2."""
    scores = {('', 0.08): (40.0,), ('', 0.32): (50.0, 60.0, 90.0), ('batch64', 0.32): (55.0, 45.0)}
    records = [record('none', budget, seed, knn, variant=variant)
               for (variant, budget), by_seed in scores.items() for seed, knn in enumerate(by_seed)]
    best = reproduce.best_of(records, 'shapes')
    assert {budget: {seed: run['knn'] for seed, run in by_seed.items()}
            for budget, by_seed in best.items()} == {0.32: {0: 55.0, 1: 60.0}}


# ---- protocol

def test_the_recipe_with_the_best_mean_of_the_search_is_chosen():
    """The best single run (batch64, 60) does not win; other seeds are not counted."""
    scores = {'': (50, 50), 'batch64': (60, 45), 'jitter2': (54, 53), 'crop0.6': (1, 1)}
    records = searched({**scores, 'jitter2-batch64': (2, 2)})
    records += searched({'': (99, 99)}, seeds=(0, 1))
    assert reproduce.chosen(records, 'shapes', 'p8') == 'jitter2'
    assert reproduce.chosen(records, 'shapes', 'p8@0,p4@0.5') == 'jitter2'
    with pytest.raises(ValueError, match='jitter2-batch64 on shapes is not in the results'):
        reproduce.chosen(searched(scores), 'shapes', 'p8')


def test_both_sides_of_the_search_have_the_same_runs_and_other_seeds_judge(monkeypatch):
    search = reproduce.runs_of('search')
    sides = [{run._replace(schedule='', views='') for run in search if run.schedule == schedule}
             for schedule in ('none', 'p8', 'p8-drop0.50')]
    assert sides[0] == sides[1] == sides[2] and len(sides[0]) == 5 * 2 * 3
    monkeypatch.setattr(reproduce, 'chosen', lambda *key: 'jitter2')
    judge = reproduce.runs_of('judge')
    assert {run.variant for run in judge} == {'jitter2'}
    assert not {run.seed for run in judge} & {run.seed for run in search}
    assert {run.variant for run in reproduce.runs_of('width')} == {'width192-jitter2'}


@pytest.mark.parametrize('study', reproduce.STUDIES)
def test_commands_are_those_of_train_and_none_runs_twice(study, monkeypatch):
    monkeypatch.setattr(reproduce, 'chosen', lambda *key: 'jitter2-batch64')
    runs = reproduce.runs_of(study)
    assert len(set(map(reproduce.name_of, runs))) == len(runs)
    for run in runs[::7]:
        args, _ = train.parse_args(reproduce.flags_of(run))
        assert (args.budget, args.seed, args.method) == (run.budget, run.seed, run.method)
        assert args.views == (run.views or 'small')


# ---- run and collect

def test_finished_and_recorded_runs_are_skipped(stub, capsys):
    verdict('--seeds 0 --jobs 2')
    out = capsys.readouterr().out
    assert '0 runs are finished, 4 to do' in out
    assert 'shapes-moco-p8-0.08M-seed0-small: trained 0.08' in out
    verdict('--seeds 0')
    assert capsys.readouterr().out == '4 runs are finished, 0 to do\n'
    reproduce.main(['collect'])
    (stub / 'runs').rename(stub / 'elsewhere')
    verdict('--seeds 0')
    assert '4 runs are finished, 0 to do' in capsys.readouterr().out


def test_collecting_adds_lines_and_leaves_the_others_as_they_are(stub):
    old = '{"name": "a run of the past", "schedule": "p8",   "budget": 1}'
    (stub / 'runs.jsonl').write_text(old + '\n')
    verdict('--seeds 0')
    log = stub / 'runs' / 'shapes-moco-p8-0.08M-seed0' / 'log.jsonl'
    log.write_text('\n'.join(log.read_text().splitlines()[:-1]) + '\n{"progr')    # killed
    for _ in range(2):
        reproduce.main(['collect'])
        lines = (stub / 'runs.jsonl').read_text().splitlines()
        assert lines[0] == old and len(lines) == 1 + 3
    new = json.loads(lines[1])
    assert new['name'] == 'shapes-moco-p8-0.08M-seed0-small' and new['views'] == 'small'
    assert new['command'] == ('python train.py --method moco --schedule p8 --views small '
                              '--budget 0.08 --seed 0 --eval-every 1')
    assert (new['samples'], new['knn'], new['strategies']) == (20, 55.0, {'p8': 1.0})
    assert [point['knn'] for point in new['curve']] == [30.0, 55.0]
    assert [run['views'] for run in reproduce.load_results()] == ['full', 'small', 'full', 'small']


def test_a_run_that_fails_is_named_and_the_others_finish(stub, capsys):
    with pytest.raises(SystemExit, match='4 of 8 failed'):
        verdict('--seeds 1 0')
    out = capsys.readouterr().out
    assert 'shapes-moco-p8-0.08M-seed1: failed: train.py: error: no such data' in out
    assert out.count('trained') == 4


def test_a_search_that_is_missing_is_one_line(stub):
    with pytest.raises(SystemExit, match='run it, then collect'):
        reproduce.main(['run', 'judge'])


# ---- tables

def test_small_and_full_views_are_compared_seed_by_seed():
    """Gains of 1 and 3: 2 +- sqrt(2) / sqrt(2). Seed 5 has no partner."""
    records = [record('p8', 0.08, seed, 50.0 + seed) for seed in (0, 1)]
    records += [record('p8', 0.08, seed, knn, views='small')
                for seed, knn in ((0, 51.0), (1, 54.0), (5, 99.0))]
    assert '| p8 | 0.08 | +2.0 +- 1.0 (2) |  |  |' in reproduce.verdict_table(records)


def test_the_table_of_runs_has_means_and_scores_of_eval():
    records = [record('none', 0.32, seed, knn) for seed, knn in ((0, 50.0), (1, 52.0))]
    records[0]['eval'] = dict(linear=60.0)
    line = '| moco | none |  |  | 0.32 | 51.0 (2), LP 60.0 (1) |  |  |'
    assert line in reproduce.score_table(records)


def test_the_first_table_takes_the_chosen_recipes_once_they_are_judged(monkeypatch):
    records = [record('none', 0.32, 0, 50.0), record('none', 0.32, 0, 55.0, variant='jitter2'),
               record('p8', 0.32, 0, 70.0)]
    base, fast = reproduce.sides(records, 'shapes')
    assert (base[0.32][0]['knn'], fast[0.32][0]['knn']) == (55.0, 70.0)
    monkeypatch.setattr(reproduce, 'chosen', lambda *key: 'batch64')
    records += [record('none', 0.32, 0, 53.0, variant='batch64'),
                record('p8', 0.32, 0, 71.0, variant='batch64', views='small')]
    base, fast = reproduce.sides(records, 'shapes')
    assert (base[0.32][0]['knn'], fast[0.32][0]['knn']) == (53.0, 71.0)


def test_the_page_is_that_of_the_recorded_runs(tmp_path, monkeypatch):
    page = (ROOT / 'experiments' / 'results' / 'README.md').read_text()
    (tmp_path / 'runs.jsonl').write_text(reproduce.RESULTS.read_text())
    monkeypatch.setattr(reproduce, 'RESULTS', tmp_path / 'runs.jsonl')
    reproduce.main(['tables'])
    assert (tmp_path / 'README.md').read_text() == page


# ---- pictures

def test_seen_pixels_give_the_tokens_of_the_large_patches():
    """A kernel of 16 x 16 on the drawn pixels equals the resized kernel on the photo."""
    photo = torch.rand(1, 3, 240, 240) * 0.2 + 0.4           # smooth enough to stay in [0, 1]
    photo = F.avg_pool2d(photo, 5, stride=1, padding=2, count_include_pad=False)
    kernel = torch.randn(4, 3, 16, 16)
    drawn = pictures.seen(photo, Compression(48))
    assert drawn.shape == (3, 80, 80)                        # 5 x 5 patches of 16 pixels
    tokens = F.conv2d(drawn[None], kernel, stride=16)
    expected = F.conv2d(photo, pi_resize(kernel, 48), stride=48)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-3)
    share = (pictures.seen(photo, Compression(16, 0.75)) < 1).all(dim=0).float().mean()
    assert share == 49 / 196


def test_neighbours_are_the_nearest_and_other_classes_are_framed():
    """Queries along two axes of the plane; near the first, one image is of another class."""
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.3, 1.4, 1.5, 1.62])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 0, 7, 0, 1, 1, 1, 1])
    images = torch.arange(8).view(8, 1, 1, 1)
    axes = pictures.Figure().subplots(2, 3)
    pictures.draw_neighbours(axes, (torch.eye(2), labels[[0, 4]]), (features, labels, images), 'so')
    drawn = [axis.images[0].get_array()[0, 0, 0] for axis in axes.flat]
    framed = [axis.spines['left'].get_visible() for axis in axes.flat]
    assert drawn == [0, 1, 2, 7, 6, 5]
    assert framed == [False, False, True, False, False, False]
    assert axes[0, 2].get_title() == 'so: 5 of 6 of the same class'


def test_curves_say_how_much_sooner_the_lower_final_accuracy_is_reached(tmp_path):
    """60 % is half way from 40 to 80: at 20 of 40 seconds, where the other takes 100."""
    for name, points in (('slow', [(0, 30), (100, 60)]), ('fast', [(0, 40), (40, 80)])):
        (tmp_path / name).mkdir()
        lines = [dict(loss=1.0, strategy='p8')]
        lines += [dict(seconds=x, units=3 * x, knn=y) for x, y in points]
        text = ''.join(json.dumps(line) + '\n' for line in lines)
        (tmp_path / name / 'log.jsonl').write_text(text)
    figure = pictures.curves([tmp_path / 'slow', tmp_path / 'fast'])
    texts = [axis.texts[-1].get_text() for axis in figure.axes]
    assert texts == ['5.0 times fewer seconds', '5.0 times fewer units']


@pytest.mark.parametrize('command', ['compression', 'headline', 'gradstats'])
def test_pictures_are_written(command, tmp_path):
    words = [command, '-o', str(tmp_path / 'picture.png')]
    if command == 'gradstats':
        words.append(str(ROOT / 'experiments' / 'results' / 'gradstats.jsonl'))
    pictures.main(words)
    assert (tmp_path / 'picture.png').read_bytes()[:4] == b'\x89PNG'


# ---- lightly

@pytest.mark.parametrize('plain', [True, False])
def test_the_marked_lines_train_lightlys_loop(plain):
    """Three steps; all parameters of the query side get a gradient, none of the key side."""
    with_lightly = pytest.importorskip('with_lightly')
    model = with_lightly.MoCo(plain, width=64, depth=1)
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(3):
        loss = model(*torch.randn(2, 8, 3, 64, 64))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert 0 < loss < 12
    assert all(p.grad is not None for p in (*model.vit.parameters(), *model.head.parameters()))
    assert all(p.grad is None for p in model.key_vit.parameters())
