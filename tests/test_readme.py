"""What the README shows is run: its snippets, and its commands at the paper's scale as dry runs."""
import re
import shlex
from pathlib import Path

import pytest

import train
from vit import ViT
from weights import save

README = (Path(train.__file__).parent / 'README.md').read_text()
COPY_ME = README[README.index('## Copy one file'):]
SNIPPETS = re.findall(r'```python\n(.*?)```', COPY_ME, re.DOTALL)
PAPER = ' '.join(re.search(r'PAPER="(.*?)"', README, re.DOTALL)[1].split())
JOINED = README.replace('\\\n', ' ')                  # a command is one line for a shell
COMMANDS = re.findall(r'^    torchrun .*train\.py \$PAPER.*$', JOINED, re.MULTILINE)


@pytest.mark.parametrize('snippet', SNIPPETS, ids=[s.split(':')[0].strip('# ') for s in SNIPPETS])
def test_a_snippet_runs_as_it_is_shown(snippet, tmp_path, monkeypatch):
    """backbone.pt lies where the snippet is run."""
    monkeypatch.chdir(tmp_path)
    encoder = ViT(img_size=32, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    save(dict(model=encoder.state_dict(), config=encoder.config, mean=(0.5,) * 3, std=(0.25,) * 3,
              dataset='shapes'), tmp_path / 'backbone.pt')
    exec(compile(snippet, 'README.md', 'exec'), {})


def test_there_are_five_snippets():
    assert len(SNIPPETS) == 5 and len(COMMANDS) == 4


@pytest.mark.parametrize('command', COMMANDS)
def test_a_command_at_the_papers_scale_is_planned(command, capsys):
    """The base strategy of MoCo-v3 and SimCLR costs about 4 and 6 units."""
    flags = shlex.split(command.split('train.py', 1)[1].replace('$PAPER', PAPER))
    train.main([*flags, '--dry-run', '--num-images', '1281167'])
    printed = capsys.readouterr().out
    p16 = float(re.search(r'^  p16 .* (\d+\.\d+)', printed, re.MULTILINE)[1])
    method = flags[flags.index('--method') + 1] if '--method' in flags else 'moco'
    expected = dict(moco=4, simclr=6, dino=12)[method]
    assert p16 == pytest.approx(expected, rel=0.15), printed
