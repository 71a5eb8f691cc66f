"""The scripts of experiments/: what is run, what is collected, the numbers and pictures of it."""
import json
from math import inf

import pytest
import torch
import torch.nn.functional as F

import pictures
import reproduce
import train
from compress import Compression, pi_resize
from reproduce import select

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


def verdict(flags=''):
    """Four runs on shapes for each seed: p8 and p8-drop0.50, small and full."""
    reproduce.main(f'run verdict --only shapes.*0.08M.*seed[01] {flags}'.split())


def records(text):
    """Runs of MoCo-v3 on shapes, a line each: schedule, recipe, views, M, seed, 20-NN."""
    found = []
    for line in text.strip().splitlines():
        schedule, variant, views, budget, seed, knn = line.split()
        found.append(dict(
            dataset='shapes', method='moco', schedule=schedule, variant=variant.strip('-'),
            views=views, budget=float(budget), seed=int(seed),
            units=1e6 * float(budget), knn=float(knn)))
    return found


# ---- speed-up

def test_crossing_is_linear_in_the_logarithm():
    """55 % is first half way from 10 to 40 in log 4: twice 10. Nothing is extrapolated."""
    points = (10, 50.0), (40, 60.0), (90, 55.0)
    found = [reproduce.crossing(points, target) for target in (49.0, 55.0, 60.1)]
    assert found == pytest.approx([10, 20, inf])


@pytest.mark.parametrize('seeds, text', [
    ('014', '6.0 (2)'),
    ('012345', '8.0, 4.0, > 16.0, not reached'),
])
def test_speed_up_divides_whole_runs_of_the_same_seed(seeds, text):
    """Seed 0 has 50 % half way in log 4 from 0.08 to 0.32 M: 1.28 / 0.16 = 8; seed 1 at 0.32 M: 4.

    Seed 4 has a longer compressed run alone, seed 5 none that is as long: they are not compared.
    """
    runs = records("""
        none - full 1.28 0 50
        none - full 1.28 1 50
        none - full 1.28 2 50
        none - full 1.28 3 50
        none - full 1.28 4 50
        none - full 1.28 5 50
        p8 - full 0.08 0 40
        p8 - full 0.32 0 60
        p8 - full 0.08 1 40
        p8 - full 0.32 1 50
        p8 - full 0.08 2 50
        p8 - full 0.08 3 40
        p8 - full 2.56 4 90
        p8 - full 0.32 5 60
        p8 - full 0.08 5 40
        p8 - full 1.28 0 60
        p8 - full 1.28 1 60
        p8 - full 1.28 2 60
        p8 - full 1.28 3 45
    """)
    runs = [run for run in runs if str(run['seed']) in seeds]
    sides = [select(runs, 'shapes', 'moco', schedule) for schedule in ('none', 'p8')]
    assert reproduce.speed_up(*sides, 1.28) == text


# ---- protocol

def test_the_recipe_with_the_best_mean_of_the_search_is_chosen():
    """The best single run (batch64, 60) does not win. Nothing is chosen from part of a search."""
    scores = dict(jitter2=(54, 53), batch64=(60, 45))
    found = [dict(name=reproduce.name_of(run), knn=scores.get(run.variant, (50, 50))[run.seed - 10])
             for run in reproduce.runs_of('search')]
    assert reproduce.chosen(found, 'shapes', 'p8@0,p4@0.5') == 'jitter2'
    with pytest.raises(ValueError, match='shapes-moco-p8-.* is not in the results'):
        reproduce.chosen(found[:70], 'shapes', 'p8')


def test_commands_are_those_of_train_none_runs_twice_and_other_seeds_judge(monkeypatch):
    monkeypatch.setattr(reproduce, 'chosen', lambda *key: 'crop0.6')
    for study in reproduce.STUDIES:
        runs = reproduce.runs_of(study)
        assert len(set(map(reproduce.name_of, runs))) == len(runs)
        assert all((run.seed >= 10) == (study == 'search') for run in runs)
        for run in runs[::7]:
            args, _ = train.parse_args(reproduce.flags_of(run))
            assert (args.budget, args.views) == (run.budget, run.views or 'full')


# ---- run and collect

def test_a_run_that_fails_is_named_and_finished_or_recorded_ones_are_skipped(stub, capsys):
    """Seed 1 fails again and again; seed 0 is finished, then only in the results."""
    for state in ('new', 'finished', 'recorded'):
        with pytest.raises(SystemExit, match='4 of'):
            verdict('--jobs 2')
        out = capsys.readouterr().out
        assert 'shapes-moco-p8-0.08M-seed1: failed: train.py: error: no such data' in out
        assert ('shapes-moco-p8-0.08M-seed0-small: trained 0.08' in out) == (state == 'new')
        reproduce.main(['collect'])
        if state == 'finished':
            (stub / 'runs').rename(stub / 'elsewhere')


def test_collecting_adds_lines_and_leaves_the_others_as_they_are(stub):
    """One of the four runs was killed while it wrote its score."""
    old = '{"name": "a run of the past", "schedule": "p8", "units": 1000000.0}'
    (stub / 'runs.jsonl').write_text(old + '\n')
    with pytest.raises(SystemExit):
        verdict()
    log = stub / 'runs/shapes-moco-p8-0.08M-seed0/log.jsonl'
    log.write_text(log.read_text()[:-9])
    reproduce.main(['collect'])
    lines = (stub / 'runs.jsonl').read_text().splitlines()
    new = json.loads(lines[1])
    assert lines[0] == old and len(lines) == 4
    assert new['command'] == ('python train.py --method moco --schedule p8 --views small '
                              '--budget 0.08 --seed 0 --eval-every 1')
    assert (new['knn'], new['curve'][0]['knn']) == (55.0, 30.0)


def test_a_dry_run_prints_training_and_both_scores(stub, capsys):
    reproduce.main('run machine --only cifar10.*seed0 --dry-run --eval --data-root /d'.split())
    train_line, linear, finetune = capsys.readouterr().out.splitlines()
    data = '--dataset folder --data-root /d/cifar10'
    assert train_line.startswith(f'python train.py {data} --method moco --schedule none')
    assert 'eval.py --protocol linear' in linear and '--protocol finetune' in finetune
    assert linear.endswith(f'--weights runs/cifar10-moco-none-again-0.32M-seed0 {data}')


# ---- tables

def test_scores_are_those_of_the_chosen_recipe_with_spread_and_number_of_seeds(monkeypatch):
    """Three seeds have a deviation. Small views and seeds that choose are left out."""
    runs = records("""
        none - full 0.32 0 50
        none - full 0.32 1 52
        none - full 0.32 2 51
        none - full 0.32 10 99
        none - full 4 0 70
        none - full 4 1 71
        p8 batch64 full 0.32 0 1
        p8 - small 0.32 0 1
    """)
    runs[0]['linear'] = 60
    monkeypatch.setattr(reproduce, 'chosen', lambda *key: '')
    assert reproduce.score_table(runs).endswith("""--- |
| moco | none | 0.32 | 51.0 +- 1.0, LP 60.0 (1) |  |  |
| moco | none | 4.0 | 70.5 (2) |  |  |""")


def test_each_side_has_its_chosen_recipe_and_seconds_of_the_same_study(monkeypatch):
    """In hindsight the default is better. The least seconds of a unit are 40 / 0.08e6.

    Those of another study, made on another machine, do not count.
    """
    runs = records("""
        none -       full 0.32 0 55
        none batch64 full 0.32 0 53
        p8   -       full 0.32 0 70
        p8   batch64 full 0.32 0 71
        p8   -       full 0.08 0 60
        p8   -       full 0.02 0 55
    """)
    best = {('none',): 'batch64', ('none', 'hindsight'): '', ('p8',): ''}
    monkeypatch.setattr(reproduce, 'searched', lambda *key: [(best[key[2:5:2]], 1)])
    sides = *reproduce.tuned(runs, 'shapes', 'none', 'p8'), reproduce.hindsight(runs, 'shapes')
    assert [side[0.32][0]['knn'] for side in sides] == [53, 70, 55]
    for run, seconds, study in zip(runs[2:], (320, 1, 40, 2), 'search judge judge x'.split()):
        run.update(seconds=seconds, study=study)
    assert reproduce.unit_seconds(runs[2:], 'shapes', 'p8') == pytest.approx(5e-4)


def test_the_page_is_that_of_the_recorded_runs(stub):
    results = pictures.RESULTS
    (stub / 'runs.jsonl').write_text(results.read_text())
    reproduce.main(['tables'])
    assert (stub / 'README.md').read_text() == results.with_name('README.md').read_text()


# ---- pictures

def test_seen_pixels_give_the_tokens_of_the_large_patches():
    """A kernel of 16 x 16 on the drawn pixels equals the resized kernel on the photo."""
    smooth = F.avg_pool2d(torch.rand(1, 3, 240, 240), 5, 1, 2)
    photo = 0.4 + 0.2 * smooth                               # stays in [0, 1]
    kernel = torch.randn(4, 3, 16, 16)
    tokens = F.conv2d(pictures.seen(photo, Compression(48))[None], kernel, stride=16)
    expected = F.conv2d(photo, pi_resize(kernel, 48), stride=48)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-3)


def test_neighbours_are_the_nearest_and_other_classes_are_framed():
    """One query and three images; the second nearest is of another class."""
    angles = torch.tensor([0.0, 0.3, 0.1, 0.2])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 0, 0, 7])
    axes = pictures.Figure().subplots(1, 4, squeeze=False)
    pictures.draw_neighbours(axes, features, labels, torch.arange(4).view(4, 1, 1, 1), 'so')
    drawn = [axis.images[0].get_array()[0, 0, 0] for axis in axes[0]]
    framed = [axis.spines['left'].get_visible() for axis in axes[0]]
    assert drawn == [0, 2, 3, 1] and framed == [False, False, True, False]


SLOW = '''{"seconds": 0, "units": 0, "knn": 30}
{"loss": 1.0, "strategy": "p4"}
{"seconds": 100, "units": 300, "knn": 60}
'''
FAST = '''{"seconds": 0, "units": 0, "knn": 40}
{"loss": 1.0, "strategy": "p8"}
{"seconds": 40, "units": 120, "knn": 80}
'''


def test_curves_say_how_much_sooner_the_lower_final_accuracy_is_reached(tmp_path):
    """60 % is half way from 40 to 80: at 20 of 40 seconds, where the other takes 100."""
    for name, log in (('slow', SLOW), ('fast', FAST)):
        (tmp_path / name).mkdir()
        (tmp_path / name / 'log.jsonl').write_text(log)
    figure = pictures.curves(tmp_path / 'slow', tmp_path / 'fast')
    assert [axis.get_title() for axis in figure.axes] == [
        '5.0 times fewer seconds', '5.0 times fewer units']


@pytest.mark.parametrize('words', ['compression', 'headline', 'gradstats gradstats.jsonl'])
def test_pictures_are_written(words, tmp_path, monkeypatch):
    monkeypatch.chdir(pictures.RESULTS.parent)
    pictures.main(f'{words} -o {tmp_path}/picture.png'.split())
    assert (tmp_path / 'picture.png').read_bytes()[:4] == b'\x89PNG'


# ---- lightly

@pytest.mark.parametrize('plain', [True, False])
def test_the_marked_lines_train_lightlys_loop(plain):
    """All parameters of the query side get a gradient."""
    bench = pytest.importorskip('bench')
    model = bench.with_lightly.MoCo(plain, width=64, depth=1)
    bench.trainer(model, model)(*torch.randn(2, 8, 3, 64, 64))
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
