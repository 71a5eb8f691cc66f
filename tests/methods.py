"""Small MoCo, SimCLR and DINO; one step of each in one process or in several; shrunk images;
what is refused."""
import pytest
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange

from losses import DINO, MoCo, SimCLR
from vit import ViT

METHODS = ('moco', 'simclr', 'dino')
each_method = pytest.mark.parametrize('name', METHODS)
SIZES = dict(img_size=16, patch_size=4, embed_dim=32, depth=2, num_heads=2)
STEPS = {name: {} for name in METHODS} | {'moco, both directions': dict(symmetric=True)}


def build(name, encoder=None, **options):
    encoder = encoder or ViT(**SIZES)
    if name == 'dino':
        return DINO(encoder, hidden=48, bottleneck=16, out_dim=64, local_crops=2, **options)
    method = dict(moco=MoCo, simclr=SimCLR)[name]
    return method(encoder, hidden=48, out_dim=16, **options)


def views_of(name, b=8):
    """Two views of 16 px, and for DINO two local ones of 8 px: always the same ones."""
    generator = torch.Generator().manual_seed(0)
    sides = (16, 16, 8, 8) if name == 'dino' else (16, 16)
    return [torch.randn(b, 3, side, side, generator=generator) for side in sides]


def shrunk(images, large, small):
    """float64 images whose patches of `large` pixels are least-squares pictures of `small`."""
    unit_patches = torch.eye(small ** 2, dtype=torch.float64).view(-1, 1, small, small)
    enlarge = F.interpolate(unit_patches, (large, large), mode='bilinear').flatten(1).T
    b, c, height, width = images.shape
    patches = rearrange(images, 'b c (h y) (w x) -> (y x) (b c h w)', y=large, x=large)
    solution = torch.linalg.lstsq(enlarge, patches.double(), driver='gelsd').solution
    return rearrange(solution, '(y x) (b c h w) -> b c (h y) (w x)', b=b, c=c, y=small,
                     h=height // large)


def refused(function, cases):
    """Each case (argument, message) raises this ValueError."""
    for argument, message in cases:
        with pytest.raises(ValueError, match=message):
            function(argument)


# ---- in one process or in several

def without_batch_norm(method):
    """LayerNorm in place of BatchNorm, whose statistics gloo cannot share between processes."""
    for name, module in list(method.named_modules()):
        if isinstance(module, nn.BatchNorm1d):
            norm = nn.LayerNorm(module.num_features, elementwise_affine=False)
            method.set_submodule(name, norm)
    return method


def one_step(title, rank=0, world=1):
    """(loss, gradient, center) in float64 of 8 images, of which each process has its share.

    Loss and gradient are means over the processes, as DistributedDataParallel forms them. The
    center is this process's own.
    """
    name = title.split(',')[0]
    torch.manual_seed(0)
    method = without_batch_norm(build(name, **STEPS[title])).double()
    views = [view.double().chunk(world)[rank] for view in views_of(name)]
    loss, _ = method(views, patch_size=8)
    loss.backward()
    method.update_teacher(0.9)
    gradients = [p.grad.flatten() for p in method.parameters() if p.grad is not None]
    mean = torch.cat([loss.detach()[None], *gradients]) / world
    if world > 1:
        dist.all_reduce(mean)
    return mean[0], mean[1:], getattr(method, 'center', mean[:1])


def worker(rank, world, folder):
    """Process `rank` of `world` saves its results of every step."""
    meeting = f'file://{folder}/meeting'
    dist.init_process_group('gloo', init_method=meeting, rank=rank, world_size=world)
    results = {title: one_step(title, rank, world) for title in STEPS}
    torch.save(results, f'{folder}/{rank}.pt')
    dist.destroy_process_group()
