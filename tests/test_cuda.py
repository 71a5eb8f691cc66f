"""What a GPU may do differently: its kernels, bfloat16, compiled blocks, NCCL.

Skipped without a CUDA device. The CPU is the oracle where both can compute the same: the draws of
views and tokens then come from generators on the CPU, since those of a GPU give other numbers.
"""
import json
import math

import pytest
import torch
import torch.distributed as dist
from conftest import SMALL, log_of, torchrun

import losses
import train
from compress import Compression
from gradstats import flat_gradient
from runs import join_processes
from views import keyed_generator, make_views, normalize, recipe
from weights import load_backbone

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a CUDA device')

METHODS = ('moco', 'simclr', 'dino')
STRONG = Compression(8, 0.5)
CPU = torch.device('cpu')


@pytest.fixture
def start(tmp_path, monkeypatch, tiny_fashion):
    """start(method, device, *flags) sets a small run up and returns it; nothing is trained yet."""
    monkeypatch.chdir(tmp_path)

    def set_up(method, device, *flags):
        common = [*SMALL, '--data-root', str(tiny_fashion), '--budget', '0.01']
        args, _ = train.parse_args([*common, '--method', method, '--device', device, *flags])
        return train.set_up(args, None)
    return set_up


def images_of(run):
    return run.data.images[:16].to(run.device)


def inputs_of(run):
    """A batch for run.method under strong compression; views and tokens are drawn on the CPU."""
    images = run.data.images[:16]
    views, _, generator = train.render_views(run.plan, images, STRONG, ('cuda test',), CPU)
    views = [normalize(view, run.data.mean, run.data.std) for view in views]
    dtype = run.parameters[0].dtype
    views = [view.to(run.device, dtype) for view in views]
    return views, STRONG.patch_size, STRONG.drop_rate, generator


def gradient_of(run):
    """(loss, gradient), on the CPU."""
    loss, _ = run.method(*inputs_of(run))
    return loss.item(), flat_gradient(loss, run.parameters).cpu()


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def losses_of(folder):
    return [line['loss'] for line in log_of(folder) if 'loss' in line]


def differences(a, b):
    return [abs(x - y) for x, y in zip(a, b, strict=True)]


# ---------------------------------------------------------------- equal to the CPU

@pytest.mark.parametrize('method', METHODS)
def test_views_are_those_of_the_cpu(method):
    """1 pixel in 1000 may differ: at the threshold of solarization the last bit decides."""
    images = torch.rand(64, 3, 32, 32)
    views = recipe(method, 32, local_crops=1)
    on_cpu = make_views(images, views, keyed_generator(0))
    on_gpu = make_views(images.cuda(), views, keyed_generator(0))
    for a, b in zip(on_cpu, on_gpu, strict=True):
        assert b.is_cuda
        wrong = (a - b.cpu()).abs() > 1e-4
        assert wrong.float().mean() < 1e-3


@pytest.mark.parametrize('method', METHODS)
def test_loss_and_gradient_are_those_of_the_cpu(method, start):
    """float32 on both: 1e-4 of the loss and 1e-3 of the norm of the gradient."""
    loss, gradient = gradient_of(start(method, 'cpu'))
    gpu_loss, gpu_gradient = gradient_of(start(method, 'cuda'))
    assert gpu_loss == pytest.approx(loss, rel=1e-4)
    assert relative(gpu_gradient, gradient) < 1e-3


@pytest.mark.parametrize('method', METHODS)
def test_float64_loss_and_gradient_are_those_of_the_cpu(method, start):
    """In float64 only the order of sums differs: a wrong device or kernel has no place to hide."""
    results = []
    for device in ('cpu', 'cuda'):
        run = start(method, device)
        run.method.double()
        results.append(gradient_of(run))
    (loss, gradient), (gpu_loss, gpu_gradient) = results
    assert gradient.dtype == torch.float64
    assert gpu_loss == pytest.approx(loss, rel=1e-9)
    assert relative(gpu_gradient, gradient) < 1e-8


# ---------------------------------------------------------------- bfloat16

@pytest.mark.parametrize('method', METHODS)
def test_bfloat16_moves_the_loss_by_less_than_two_percent(method, start):
    """The same draws in both. bfloat16 has 8 bits, 0.4 % a rounding; the losses are float32."""
    run = start(method, 'cuda')
    if not run.half:
        pytest.skip('this GPU has no bfloat16')
    half, _ = train.loss_of(run, run.method, images_of(run), STRONG, 0)
    run.half = False
    full, _ = train.loss_of(run, run.method, images_of(run), STRONG, 0)
    assert half.dtype == torch.float32
    assert 0 < abs(half - full) < 0.02 * full


# ---------------------------------------------------------------- whole runs

@pytest.mark.parametrize('method', METHODS)
def test_run_ends_and_its_backbone_opens_on_the_cpu(method, run):
    folder = run('--method', method, '--device', 'cuda', '--budget', '0.004', '--name', 'a') / 'a'
    lines = log_of(folder)
    assert lines[-1]['progress'] == 1 and 0 <= lines[-1]['knn'] <= 100
    assert all(math.isfinite(loss) for loss in losses_of(folder))
    encoder, _ = load_backbone(str(folder / 'backbone.pt'))
    assert all(parameter.device == CPU for parameter in encoder.parameters())


# Training is chaotic: rounding that differs by 1e-7 has grown to 1e-2 after 50 steps of these small
# batches. So only the first 12 steps are compared: 8 under one strategy, 4 under the other.
TWELVE_STEPS = ['--device', 'cuda', '--precision', 'float32', '--budget', '0.002',
                '--schedule', 'p8-drop0.50@0,p4@0.05', '--max-steps', '12']


def test_resumed_run_is_the_uninterrupted_one(run):
    """To 1e-3, since some sums on a GPU have no fixed order."""
    runs = run(*TWELVE_STEPS, '--name', 'whole')
    run(*TWELVE_STEPS, '--max-steps', '5', '--name', 'parts')
    run('--resume', 'runs/parts', '--max-steps', '12', small=False)
    whole = log_of(runs / 'whole')
    parts = log_of(runs / 'parts')
    assert whole[-1]['step'] == parts[-1]['step'] == 12
    assert whole[-1]['units'] == parts[-1]['units']
    assert max(differences(losses_of(runs / 'whole'), losses_of(runs / 'parts'))) < 1e-3


def test_compiled_blocks_give_the_same_losses(run):
    """To 1e-3 (on a CPU: 2e-7). Each length of the sequence has a graph of its own."""
    runs = run(*TWELVE_STEPS, '--name', 'eager')
    run(*TWELVE_STEPS, '--name', 'compiled', '--compile')
    torch._dynamo.reset()
    tokens = {line['tokens'] for line in log_of(runs / 'eager') if 'loss' in line}
    assert len(tokens) == 2
    assert max(differences(losses_of(runs / 'eager'), losses_of(runs / 'compiled'))) < 1e-3


# ---------------------------------------------------------------- gradient probe

@pytest.mark.parametrize('method', METHODS)
def test_probe_measures_and_changes_nothing(method, start):
    run = start(method, 'cuda', '--gradstats', '0', '--grid', 'p8,p8-drop0.50',
                '--metric', 'euclidean', '--probe-batches', '8')
    before = {name: value.clone() for name, value in run.method.state_dict().items()}
    train.measure_gradients(run, point=0.0)
    written = (run.folder / 'gradstats.jsonl').read_text().splitlines()
    rows = [json.loads(line) for line in written]
    assert [row['strategy'] for row in rows] == ['p4', 'p8', 'p8-drop0.50']
    assert rows[0]['bias2'] == 0 and rows[0]['cost'] == 1
    assert all(row['variance'] > 0 and math.isfinite(row['mse']) for row in rows)
    for name, value in run.method.state_dict().items():
        assert torch.equal(value, before[name]), name


# ---------------------------------------------------------------- NCCL

@pytest.fixture
def nccl(monkeypatch):
    """A process group of this process alone, made as train.py makes it."""
    for name, value in dict(RANK='0', WORLD_SIZE='1', MASTER_ADDR='localhost',
                            MASTER_PORT='0').items():      # 0: any port that is free
        monkeypatch.setenv(name, value)
    torch.cuda.set_device(0)
    join_processes(torch.device('cuda'))
    yield
    dist.destroy_process_group()


def test_gather_over_nccl_keeps_values_and_gradient(nccl):
    """One process: the gathered rows are its own, and the gradient is that of the sum, the weights.
    """
    x = torch.randn(4, 3, device='cuda', requires_grad=True)
    weights = torch.randn(4, 3, device='cuda')
    gathered = losses.Gather.apply(x)
    (gathered * weights).sum().backward()
    assert torch.equal(gathered, x)
    assert torch.equal(x.grad, weights)


@pytest.mark.parametrize('method', METHODS)
def test_distributed_wrapper_has_the_gradient_of_the_bare_method(method, start, nccl):
    run = start(method, 'cuda')
    _, bare = gradient_of(run)
    torch.nn.SyncBatchNorm.convert_sync_batchnorm(run.method)
    model = torch.nn.parallel.DistributedDataParallel(run.method, device_ids=[0])
    loss, _ = model(*inputs_of(run))
    loss.backward()
    gradient = torch.cat([parameter.grad.flatten() for parameter in run.parameters])
    assert relative(gradient.cpu(), bare) < 1e-4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason='NCCL needs a GPU for each process')
@pytest.mark.parametrize('method', METHODS)
def test_two_gpus_train(method, tmp_path, tiny_fashion):
    flags = [*SMALL, '--data-root', tiny_fashion, '--device', 'cuda', '--method', method]
    done = torchrun(2, 'train.py', *flags, '--budget', '0.002', '--name', 'a', cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert log_of(tmp_path / 'runs' / 'a')[-1]['progress'] == 1
