"""The life of a run: how it stops and goes on, what it refuses, what it says."""
import errno
import gc
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from multiprocessing import get_context

import pytest
import torch
from conftest import ROOT, SMALL, fails, log_of, steps_of
from PIL import Image
from test_train import assert_same_run, no_pictures  # noqa: F401 (a fixture)

import runs as rooms
import train
from weights import read

LONG = ['--schedule', 'p8', '--budget', '0.003', '--eval-every', '0']      # about 130 steps


def wait_for_lines(path, count):
    deadline = time.time() + 60
    while not path.exists() or path.read_text().count('\n') < count:
        assert time.time() < deadline, f'{path} has no {count} lines'
        time.sleep(0.01)


# ---------------------------------------------------------------- signals

def test_a_signal_ends_the_step_and_the_run_goes_on_bit_exactly(run, tmp_path):
    """Three signals stop one run. 128 + the number, as a shell has it; 0 for SLURM's warning.

    A score is due at three of four steps. One that is due at the stop is left for later.
    """
    often = [*LONG, '--eval-every', '0.01']
    folder = tmp_path / 'runs' / 'parts'
    lines = step = 0
    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGUSR1, 0)):
        flags = (*often, '--name', 'parts', '--resume', 'auto')
        process = get_context('fork').Process(target=run, args=flags)    # starts at once
        process.start()
        wait_for_lines(folder / 'log.jsonl', lines + 3)
        os.kill(process.pid, number)
        process.join(30)
        assert process.exitcode == status
        assert read(folder / 'checkpoint.pt')['state']['step'] == len(steps_of(folder)) > step
        assert 'loss' in log_of(folder)[-1]
        step = len(steps_of(folder))
        lines = len(log_of(folder))
    run('--resume', folder, small=False)
    run(*often, '--name', 'whole')
    assert step < len(steps_of(folder))
    assert_same_run(tmp_path / 'runs' / 'whole', folder)


def test_a_second_signal_leaves_at_once(run, monkeypatch):
    monkeypatch.setattr(os, '_exit', sys.exit)
    stop = rooms.StopSignal()
    signal.raise_signal(signal.SIGTERM)
    assert stop.number == 15
    signal.raise_signal(signal.SIGTERM)               # at once: the same signal on another way
    stop.received_at -= 3
    with pytest.raises(SystemExit, match='143'):
        signal.raise_signal(signal.SIGTERM)


def test_output_in_a_file_is_flushed_and_has_no_carriage_returns(tmp_path, tiny_fashion):
    """A batch job's log: its lines are there while the run is going. Then it gets SIGTERM."""
    command = [sys.executable, ROOT / 'train.py', *SMALL, '--data-root', tiny_fashion]
    with open(tmp_path / 'out.txt', 'wb') as out:
        job = subprocess.Popen([*command, '--budget', '1', '--name', 'a'], cwd=tmp_path,
                               stdout=out, stderr=out)
    wait_for_lines(tmp_path / 'runs' / 'a' / 'log.jsonl', 3)
    text = (tmp_path / 'out.txt').read_bytes()
    assert b'random network: ' in text and b'is chance' in text
    job.terminate()
    assert job.wait(30) == 143
    text = (tmp_path / 'out.txt').read_bytes()
    assert b'go on with python train.py --resume runs/a' in text
    assert b'\r' not in text and b'Traceback' not in text


# ---------------------------------------------------------------- resume

def test_resume_auto_starts_or_goes_on(run, capsys, tmp_path):
    """The same command line for each try of a scheduler. Without a checkpoint it starts."""
    (tmp_path / 'runs' / 'a').mkdir(parents=True)
    (tmp_path / 'runs' / 'a' / 'log.jsonl').write_text('{"step": 0, "knn": 1}\n{"st')
    flags = [*LONG, '--resume', 'auto', '--name', 'a']
    runs = run(*flags, '--max-steps', 3)
    run(*flags, '--max-steps', 5)
    assert [line['step'] for line in log_of(runs / 'a')] == [1, 2, 3, 4, 5]
    assert 'give a --name' in fails(capsys, lambda: run('--resume', 'auto'))
    assert 'runs/a exists; choose another' in fails(capsys, lambda: run(*LONG, '--name', 'a'))
    other = ('--resume', runs / 'a', '--name', 'b')
    assert 'runs/a goes on in its own folder' in fails(capsys, lambda: run(*other, small=False))


def test_a_crash_repeats_no_line(run):
    """A checkpoint of step 4 with the lines of step 6 and half a line of step 7 behind it."""
    flags = ['--schedule', 'p8', '--budget', 0.0005, '--eval-every', 0.05, '--gradstats', '0.1,0.2',
             '--probe-batches', 4, '--grid', 'p8', '--name']
    runs = run(*flags, 'whole')
    run(*flags, 'killed', '--max-steps', 4)
    folder = runs / 'killed'
    checkpoint = (folder / 'checkpoint.pt').read_bytes()
    run('--resume', folder, '--max-steps', 6, small=False)
    (folder / 'checkpoint.pt').write_bytes(checkpoint)
    with open(folder / 'log.jsonl', 'a') as file:
        file.write('{"step": 7, "lo')
    run('--resume', folder, small=False)
    assert_same_run(runs / 'whole', folder)


def test_a_run_that_is_killed_in_a_score_makes_it_again(run, monkeypatch):
    """The checkpoint from just before it is there. The line of the score is written at its end."""
    flags = [*LONG, '--eval-every', '0.25', '--name']
    runs = run(*flags, 'whole')
    score = train.score

    def killed(state_of_run):
        score(state_of_run)
        if state_of_run.state.step:
            sys.exit('killed')
    monkeypatch.setattr(train, 'score', killed)
    fails_with = pytest.raises(SystemExit, match='killed')
    with fails_with as stop:
        run(*flags, 'killed')
    del stop, fails_with
    gc.collect()                                      # closes the log, which is the run's lock
    monkeypatch.setattr(train, 'score', score)
    assert 'knn' in log_of(runs / 'killed')[-1]
    saved = read(runs / 'killed' / 'checkpoint.pt')['state']
    assert saved['step'] == steps_of(runs / 'killed')[-1]['step'] and saved['seen'] < 0.25
    run('--resume', runs / 'killed', small=False)
    assert_same_run(runs / 'whole', runs / 'killed')


def test_the_second_process_on_one_run_stops(run, capsys):
    runs = run(*LONG, '--name', 'a', '--max-steps', 3)
    before = (runs / 'a' / 'log.jsonl').read_bytes()
    log = rooms.open_log(runs / 'a', new=False)     # the lock of another open file
    message = fails(capsys, lambda: run('--resume', runs / 'a', small=False))
    assert 'runs/a is in use by another process' in message
    log.close()
    assert (runs / 'a' / 'log.jsonl').read_bytes() == before
    run('--resume', runs / 'a', '--max-steps', 4, small=False)


def test_checkpoints_of_other_runs_and_versions(run, capsys, tmp_path):
    folder = run(*LONG, '--name', 'a', '--max-steps', 3) / 'a'
    checkpoint = read(folder / 'checkpoint.pt')
    flags = checkpoint['args']

    def refused(**changes):
        torch.save({**checkpoint, **changes}, folder / 'checkpoint.pt')
        return fails(capsys, lambda: run('--resume', folder, small=False))

    assert 'the run had world 2, now it is 1' in refused(world=2)
    assert 'the run had images other, now it is' in refused(images='other')
    assert 'does not fit the flags of this run' in refused(method={})
    assert 'Missing key' in refused(method={})
    wider = {**flags, 'arch': dict(flags['arch'], embed_dim=64)}
    assert 'the run had embed_dim 32, now it is 64' in refused(args=wider)
    assert 'is of an earlier version' in refused(state=dict(schedule='p8@0'))
    assert 'is no checkpoint of train.py' in refused(args=3)
    torch.save(dict(args=flags, step=3, units=100), folder / 'checkpoint.pt')
    message = fails(capsys, lambda: run('--resume', folder, small=False))
    assert 'is of an earlier version' in message
    # a flag that is gone is kept, one that is new has its default
    older = {name: value for name, value in flags.items() if name != 'save_minutes'}
    torch.save({**checkpoint, 'args': {**older, 'horizon': 3}}, folder / 'checkpoint.pt')
    run('--resume', folder, '--max-steps', 5, small=False)
    (folder / 'checkpoint.pt').write_bytes((folder / 'checkpoint.pt').read_bytes()[:5000])
    assert 'truncated' in fails(capsys, lambda: run('--resume', folder, small=False))


def test_nothing_is_overwritten(run, capsys):
    flags = ['--budget', 0.0001, '--schedule', 'p8', '--name', 'a']
    folder = run(*flags) / 'a'
    before = (folder / 'log.jsonl').read_bytes()
    assert 'runs/a exists' in fails(capsys, lambda: run(*flags))
    run('--resume', folder, small=False)               # finished: there is nothing left to do
    assert (folder / 'log.jsonl').read_bytes() == before


# ---------------------------------------------------------------- what goes wrong on the way

def test_a_full_disk_is_one_line_and_the_old_checkpoint_stays_whole(run, capsys, monkeypatch):
    folder = run(*LONG, '--name', 'a', '--max-steps', 3) / 'a'
    before = (folder / 'checkpoint.pt').read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with monkeypatch.context() as disk:
        disk.setattr(torch, 'save', full)
        message = fails(capsys, lambda: run('--resume', folder, small=False))
    assert 'backbone.pt' in message and 'No space left' in message
    assert (folder / 'checkpoint.pt').read_bytes() == before
    assert not list(folder.glob('*.partial'))
    run('--resume', folder, '--max-steps', 5, small=False)
    assert len(steps_of(folder)) == 5


@pytest.mark.skipif(not os.path.exists('/dev/full'), reason='a file of Linux that is always full')
def test_a_log_line_on_a_full_disk_names_its_file():
    with pytest.raises(OSError, match="'/dev/full' cannot be written: No space left"):
        rooms.append('/dev/full', [dict(step=1)])


def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(run, capsys, monkeypatch):
    folder = run(*LONG, '--name', 'a', '--max-steps', 3) / 'a'
    before = (folder / 'checkpoint.pt').read_bytes()
    monkeypatch.setattr(train.losses, 'info_nce', lambda q, k, temperature: q.sum() * math.nan)
    message = fails(capsys, lambda: run('--resume', folder, small=False))
    assert 'the loss is nan at step 3' in message and 'lower --lr' in message
    assert (folder / 'checkpoint.pt').read_bytes() == before
    assert (folder / 'crash.pt').exists()


def test_weights_that_are_not_finite_are_never_saved(run, capsys, tmp_path, monkeypatch):
    monkeypatch.setattr(train, 'SAVE_EVERY', 0.001)
    message = fails(capsys, lambda: run(*LONG, '--name', 'a', '--lr', '1e12', '--warmup', 0))
    assert 'not finite' in message or 'the loss is' in message
    saved = read(tmp_path / 'runs' / 'a' / 'checkpoint.pt')['method']
    assert all(value.isfinite().all() for value in saved.values())


def test_an_unlabelled_folder_trains_without_a_score(run, tmp_path, capsys):
    for i in range(24):
        Image.new('RGB', (80, 70), (10 * i, 99, 40)).save(tmp_path / f'{i}.png')
    folder = run('--dataset', 'folder', '--data-root', tmp_path, '--budget', 0.0003, '--schedule',
                 'p8', '--name', 'f', '--workers', 0, '--img-size', 16) / 'f'
    out = capsys.readouterr().out
    assert 'score     none' in out and f'--data-root {tmp_path} --export features.npz' in out
    assert 'images of about 70 px are shrunk 4.4 times to 16 px' in out
    assert steps_of(folder) == log_of(folder)


# ---------------------------------------------------------------- warnings

@pytest.mark.parametrize('metrics, outputs, message', [
    (dict(feature_spread=0.001), 256, 'nearly the same feature'),
    (dict(feature_spread=0.5, teacher_entropy=6.238), 512, 'uniform'),     # ln 512 = 6.238
    (dict(feature_spread=0.5, teacher_entropy=0.001), 512, 'one and the same'),
    (dict(feature_spread=0.5, teacher_entropy=3.0, positive_similarity=0.9512,
          negative_similarity=0.9511), 512, 'move together'),
])
def test_collapse_is_said_in_plain_words(metrics, outputs, message):
    assert message in rooms.collapse_warning(metrics, outputs)


def test_no_warning_where_nothing_is_wrong():
    healthy = dict(feature_spread=0.5, teacher_entropy=3.0, positive_similarity=0.9,
                   negative_similarity=0.8)
    assert rooms.collapse_warning(healthy, 512) is None
    assert rooms.collapse_warning(dict(feature_spread=0.5), 2) is None       # MoCo has no entropy
    state = rooms.State(step=100, seconds=10.0, seconds_data=0.1)
    assert rooms.waiting_warning(state, 0.25) is None


def test_waiting_that_costs_more_than_the_compression_saves():
    """100 ms a step, 20 of them waiting: at 0.9 of the cost, 80 / 0.9 - 80 = 9 ms are saved."""
    state = rooms.State(step=100, seconds=10.0, seconds_data=2.0)
    message = rooms.waiting_warning(state, 0.9)
    assert 'waits 20 ms for data and works 80 ms' in message and 'saves about 9 ms' in message
    assert rooms.waiting_warning(state, 0.5) is None


def test_a_warning_is_said_once(run, capsys, monkeypatch):
    """Its numbers change from step to step; that makes it no other warning."""
    monkeypatch.setattr(train, 'waiting_warning', lambda state, cost: f'waits {state.step} ms')
    run(*LONG, '--max-steps', 60)
    assert capsys.readouterr().out.count('warning: step') == 1


def test_flags_that_the_method_does_not_use_are_named(run, capsys):
    run('--method', 'simclr', '--symmetric', '--momentum', 0.9, *LONG, '--max-steps', 1)
    out = capsys.readouterr().out
    assert 'warning: simclr does not use --local-crops, --local-size, --symmetric, --mom' in out


# ---------------------------------------------------------------- bad input: the value and the fix

@pytest.mark.parametrize('flags, message', [
    ('--method byol', "invalid choice: 'byol'"),
    ('--dataset mnist', "invalid choice: 'mnist'"),
    ('--device mps', '--device mps is not there'),
    ('--data-root nowhere', 'nowhere'),
    ('--dataset folder --data-root nowhere', "no folder 'nowhere'"),
    ('--resume nowhere', 'no checkpoint at nowhere'),
    ('--num-images 9', '--num-images stands for the data set of a --dry-run'),
    ('--init nowhere.pt', "there is no file 'nowhere.pt'"),
    ('--name ../x', "'../x' is no name for a folder"),
    ('--name /tmp/x', "'/tmp/x' is no name for a folder"),
    ('--name .', "'.' is no name for a folder"),
    ('--name a\x1b[31m', "'a\\x1b[31m' is no name for a folder"),
    ('--img-size 1000000', '1000000 must be at least 1 and at most 10000'),
    ('--local-crops 1000000', '1000000 must be at least 0 and at most 100'),
    ('--lr nan', 'argument --lr: nan must be above 0'),
    ('--lr inf', 'argument --lr: inf must be above 0 and at most 1e+12'),
    ('--temperature nan', 'nan must be above 0'),
    ('--temperature 0', '0 must be above 0'),
    ('--momentum 1', '1 must be at least 0 and at most 0.999999'),
    ('--warmup 1.5', 'argument --warmup: 1.5'),
    ('--eval-every 1e-12', '1e-12 must be 0 or at least 0.001'),
    ('--batch-size 1', '1 must be at least 2'),
    ('--batch-size 400', 'batch size 400 is larger than the 320 images'),
    ('--batch-size 1e3', "'1e3' is not a whole number"),
    ('--budget 0', '0 must be above 0'),
    ('--budget 0.00001', 'a budget of 10 units does not pay for one batch of 16 under p8'),
    ('--arch resnet50', "'resnet50' is none of toy, vit_tiny, vit_small, vit_base"),
    ('--arch 64,4', "'64,4' is none of toy"),
    ('--arch 64,4,x', "'x' is not a whole number"),
    ('--arch 32,1,5', '5 heads do not divide width 32'),
    ('--patch-size 6', 'patch size 6 does not divide image size 16x16'),
    ('--schedule p32', 'patch size 32 is larger than the image'),
    ('--schedule p4-drop1.5', 'drop rate 1.5 is outside'),
    ('--schedule auto', "'auto' is not a compression"),
    ('--schedule schedule.json', 'of an earlier version, which counted other units'),
    ('--schedule p4@0.5', 'begins at progress 0'),
    ('--schedule p4@0,p8@nan', 'increasing progress below 1'),
    ('--gradstats 0,2', '2 must be at least 0 and at most 1'),
    ('--gradstats 0', 'no second moment at progress 0'),
    ('--gradstats 1 --grid p64', 'patch size 64 is larger than the image'),
    ('--grid p5x', "'p5x' is not a compression"),
    ('--probe-batches 9', '9 must be a multiple of 4'),
    ('--compress p8', 'unrecognized arguments: --compress'),
])
def test_bad_input_is_one_line_and_leaves_nothing(run, capsys, tmp_path, flags, message):
    line = fails(capsys, lambda: run(*flags.split()))
    assert message in line and ': error: ' in line
    assert not (tmp_path / 'runs').exists()


def test_processes_that_do_not_know_of_each_other(run, capsys, monkeypatch):
    monkeypatch.setenv('SLURM_STEP_NUM_TASKS', '4')
    assert 'srun started 4 processes' in fails(capsys, lambda: run())
    monkeypatch.setenv('WORLD_SIZE', '2')
    assert 'WORLD_SIZE is 2, but RANK' in fails(capsys, lambda: run())
    monkeypatch.delenv('SLURM_STEP_NUM_TASKS')
    monkeypatch.setenv('WORLD_SIZE', '1')             # left over: trains alone
    run(*LONG, '--max-steps', 1)


def test_a_default_grid_leaves_out_patches_larger_than_the_image():
    args, _ = train.parse_args([*SMALL, '--patch-size', '8'])
    assert [str(tau) for tau in train.build_grid(args)] == [
        'p8', 'p8-drop0.50', 'p16', 'p16-drop0.50']


# ---------------------------------------------------------------- leaves

LEAVES = dict(compress=[], gradstats=[], losses=[], schedule=['compress'], views=[],
              vit=['compress'], shapes=['views'], files=['views'],
              data=['views', 'files', 'shapes'])
PILLOW = ('files', 'data')                            # the rooms that read images


@pytest.mark.parametrize('pillow', (False, True))
def test_leaves_copied_alone_check_themselves(pillow, tmp_path):
    """Without the packages that they do not name; all in one process, to import torch once."""
    absent = ['timm', 'lightly', 'matplotlib']
    if not pillow:
        absent += ['PIL', 'torchvision', 'tqdm']
    leaves = [leaf for leaf in LEAVES if (leaf in PILLOW) == pillow]
    for leaf in leaves:
        (tmp_path / leaf).mkdir()
        for room in (leaf, *LEAVES[leaf]):
            shutil.copy(ROOT / f'{room}.py', tmp_path / leaf)
    code = f'''
import os, runpy, sys
sys.modules.update(dict.fromkeys({absent}))
for leaf in {leaves}:
    os.chdir(f'{tmp_path}/' + leaf)
    sys.path[0] = os.getcwd()
    for room in {list(LEAVES)}:
        sys.modules.pop(room, None)
    runpy.run_path(leaf + '.py', run_name='__main__')
'''
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    for leaf in leaves:
        assert f'{leaf}.py: all claims hold' in done.stdout
