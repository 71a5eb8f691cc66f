"""What a GPU may do differently: its kernels, bfloat16, compiled blocks, NCCL.

Skipped without a CUDA device. The CPU is the oracle: views are drawn there on every device.
"""
import math

import pytest
import torch
from conftest import SMALL, log_of, steps_of, torchrun

import train
from compress import Compression
from gradstats import flat_gradient
from images.views import keyed_generator
from methods import METHODS
from vit import load_backbone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')

STRONG = Compression(8, 0.5)


@pytest.fixture
def start(tmp_path, monkeypatch, tiny_fashion):
    """start(method, device, *flags) sets a small run up and returns it; nothing is trained yet."""
    monkeypatch.chdir(tmp_path)

    def set_up(method, device, *flags):
        common = [*SMALL, '--data-root', str(tiny_fashion), '--budget', '0.01',
                  '--views', 'small']
        args, _ = train.parse_args([*common, '--method', method, '--device', device, *flags])
        return train.set_up(args)
    return set_up


def gradient_of(run):
    """(loss, gradient) of one batch on the CPU, its tokens drawn there."""
    views = train.views_of(run, [run.data.pixels['train'][:16]] * 2, STRONG, 'cuda test')
    with torch.autocast('cuda', torch.bfloat16, enabled=run.half):
        loss, _ = run.method(views, None, 0.5, keyed_generator('tokens'))
    return loss.item(), flat_gradient(loss, run.parameters).cpu()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize('method', METHODS)
def test_gradients_are_those_of_the_cpu(start, method):
    loss, gradient = gradient_of(start(method, 'cpu'))
    run = start(method, 'cuda')
    half_loss, half_gradient = gradient_of(run)
    run.half = False
    full_loss, full_gradient = gradient_of(run)
    assert abs(full_loss - loss) < 1e-4 and relative(full_gradient, gradient) < 0.02
    assert abs(half_loss - loss) < 0.05 and relative(half_gradient, gradient) < 0.5


@pytest.mark.parametrize('flags', [(), ('--compile',)])
@pytest.mark.parametrize('method', METHODS)
def test_a_run_trains_stops_and_goes_on(run, stop_at, method, flags):
    flags = ('--device', 'cuda', '--method', method, *flags, '--budget', 0.003)
    stop_at(5)
    folder = run(*flags, '--name', 'a', '--schedule', 'p8-drop0.50@0,p4@0.5') / 'a'
    run('--resume', folder, small=False)
    assert log_of(folder)[-1]['progress'] == 1
    assert all(math.isfinite(line['loss']) for line in steps_of(folder))
    encoder, _ = load_backbone(folder / 'backbone.pt')
    assert encoder.cls_token.device.type == 'cpu'


@pytest.mark.parametrize('method', METHODS)
def test_nothing_in_a_step_waits_for_the_gpu(start, method):
    run = start(method, 'cuda')
    batches = run.data.batches(train.upcoming(run))
    for step in range(3):
        if step == 2:
            torch.cuda.set_sync_debug_mode('error')
        try:
            images, _ = next(batches)
            views = train.views_of(run, images, STRONG, step)
            loss, _ = train.loss_of(run, run.model, views, STRONG, step)
            run.optimizer.zero_grad()
            loss.backward()
            if method == 'dino':
                run.method.before_step()
            run.optimizer.step()
            run.method.update_teacher(0.99)
        finally:
            torch.cuda.set_sync_debug_mode('default')


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='needs two GPUs')
def test_torchrun_on_two_gpus(tmp_path, tiny_fashion):
    """NCCL and SyncBatchNorm."""
    result = torchrun(2, 'train.py', *SMALL, '--device', 'cuda', '--data-root', tiny_fashion,
                      '--budget', 0.002, '--name', 'a', cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert log_of(tmp_path / 'runs' / 'a')[-1]['progress'] == 1
