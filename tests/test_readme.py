"""What the README shows is run as it stands there; what it promises is compared with the runs."""
import importlib
import re

import pytest
import torch
from conftest import ROOT

from vit import ViT

README = (ROOT / 'README.md').read_text()
PAGE, COPIES = re.findall(r'```python\n(.*?)```', README, re.DOTALL)
IMPORTS, *SNIPPETS = COPIES.split('\n\n')


def test_the_whole_method_runs_and_learns(capsys):
    """Random features have 32 %."""
    exec(compile(PAGE, 'README.md', 'exec'), {})
    assert float(re.search(r'20-NN: ([\d.]+) %', capsys.readouterr().out)[1]) > 40


@pytest.mark.parametrize('snippet', SNIPPETS, ids=[s.split(':')[0].strip('# ') for s in SNIPPETS])
def test_a_snippet_runs_as_it_is_shown(snippet, tmp_path, monkeypatch):
    """The run that the last one loads is there."""
    monkeypatch.chdir(tmp_path)
    encoder = ViT(img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    (tmp_path / 'runs' / 'fast').mkdir(parents=True)
    transform = dict(input_size=(3, 32, 32), crop_pct=1.0, interpolation='bicubic',
                     mean=(0.5,) * 3, std=(0.25,) * 3)
    torch.save(dict(model=encoder.state_dict(), config=encoder.config, transform=transform),
               'runs/fast/backbone.pt')
    exec(compile(f'{IMPORTS}\n{snippet}', 'README.md', 'exec'), {})


@pytest.mark.parametrize('name', ['compress', 'gradstats', 'losses', 'schedule', 'vit',
                                  'images.views', 'images.data'])
def test_a_file_proves_its_claims(name):
    importlib.import_module(name).self_check()


def test_the_first_table_is_that_of_the_page():
    page = (ROOT / 'experiments/results/README.md').read_text()
    assert re.search(r'\| 20-NN.*?\n\n', page, re.DOTALL)[0] in README


def test_pictures_and_files_are_there():
    for path in re.findall(r'\]\(([\w/.]+)\)', README):
        assert (ROOT / path).exists(), path


def test_the_page_is_short():
    """A newcomer reads it in ten minutes."""
    assert len(README.splitlines()) <= 130 and len(README.split()) <= 1200
