"""What the README shows is run: its snippets. What it promises is compared with the results."""
import re

import pytest
from conftest import ROOT

from reproduce import (ALONE, CENTER_09_LOCAL_4, DATASETS, DINO_OWN, DYNAMIC, UNCOMPRESSED,
                       Row)
from tables import best_of, load_results, select, speed_up_text, speed_ups
from vit import ViT
from weights import save

README = (ROOT / 'README.md').read_text()
COPY_ME = README[README.index('## Copy one file'):]
SNIPPETS = re.findall(r'```python\n(.*?)```', COPY_ME, re.DOTALL)


@pytest.mark.parametrize('snippet', SNIPPETS, ids=[s.split(':')[0].strip('# ') for s in SNIPPETS])
def test_a_snippet_runs_as_it_is_shown(snippet, tmp_path, monkeypatch):
    """The run that the snippet loads is there."""
    monkeypatch.chdir(tmp_path)
    encoder = ViT(img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    (tmp_path / 'runs' / 'a').mkdir(parents=True)
    save(dict(model=encoder.state_dict(), config=encoder.config, mean=(0.5,) * 3, std=(0.25,) * 3,
              dataset='shapes'), tmp_path / 'runs' / 'a' / 'backbone.pt')
    exec(compile(snippet, 'README.md', 'exec'), {})


def test_there_are_five_snippets():
    assert len(SNIPPETS) == 5


def test_the_first_commands_end_where_the_readme_says():
    """All seeds of the two commands, and what they printed on another day, with two threads."""
    results = ROOT / 'experiments' / 'results'
    promised = re.findall(r'100 % of the budget: (\d+) to (\d+) % 20-NN', README)
    printed = re.findall(r'100 % of the budget: ([\d.]+) %',
                         (results / 'first-commands.log').read_text())
    records = load_results()
    for schedule, limits, once in zip(('p8-drop0.50', 'none'), promised, printed, strict=True):
        runs = select(records, 'shapes', Row('moco', schedule))[0.16].values()
        scores = [run['knn'] for run in runs]
        assert len(scores) >= 3
        for score in (*scores, float(once)):
            assert int(limits[0]) <= round(score) <= int(limits[1])


def test_the_first_table_says_what_the_runs_say():
    """Times fewer units or seconds: the uncompressed rows and the compressed row of each line."""
    moco, simclr, dino = (Row(method, 'none') for method in ('moco', 'simclr', 'dino'))
    dinos = [dino, Row('dino', 'none', *DINO_OWN), Row('dino', 'none', *CENTER_09_LOCAL_4)]
    rows = [
        ([moco], Row('moco', 'p8'), 0.32),
        (UNCOMPRESSED, Row('moco', 'p8'), 0.32),           # the best of them, seed by seed
        ([Row('moco', 'none', ALONE)], Row('moco', 'p8', ALONE), 0.32),       # in seconds
        ([moco], Row('moco', 'p8-drop0.50'), 0.32),
        (UNCOMPRESSED, Row('moco', 'p8-drop0.50'), 0.32),
        (UNCOMPRESSED, Row('moco', DYNAMIC), 0.32),
        (UNCOMPRESSED, Row('moco', 'p8'), 1.28),
        (UNCOMPRESSED, Row('moco', DYNAMIC), 1.28),
        ([simclr], Row('simclr', DYNAMIC), 0.32),
        ([simclr], Row('simclr', 'p8-drop0.50'), 0.32),
        ([dino], Row('dino', 'p8-drop0.50'), 0.32),
        (dinos, Row('dino', 'p8-drop0.50'), 0.32),
    ]
    table = README[README.index('| times fewer units'):].split('\n\n')[0].splitlines()[2:]
    records = load_results()
    for line, (baselines, fast, budget) in zip(table, rows, strict=True):
        clock = 'seconds' if fast.variant == ALONE else 'units'
        for dataset, cell in zip(DATASETS, line.split(' | ')[1:]):
            slow = best_of(records, dataset, baselines)
            ratios = speed_ups(slow, select(records, dataset, fast), budget, clock)
            assert cell == speed_up_text(ratios), line
