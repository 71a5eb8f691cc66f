"""Compress the token sequence of a ViT: fewer patches of the image, or larger ones.

"Accelerating Augmentation Invariance Pretraining" (NeurIPS 2024), the two compressions:

    token dropout    keep k = round(n (1 - drop_rate)) random patch tokens of each image
    patch scaling    cut the image into q x q instead of p x p patches. One p x p kernel w is
                     trained, and the forward pass resizes it as FlexiViT does
                     (arXiv 2212.08013, section 3.4):
                         w_q = pinv(B^T) w
                     B is the linear map that resizes a p x p patch to q x q, so that
                     <B x, w_q> = <x, w> for every patch x when q >= p

What patch scaling is. <x, pinv(B^T) w> = <pinv(B) x, w>: the token of a large patch x is the token
of its least-squares p x p picture, read by the trained kernel. So the encoder sees p^2 numbers of a
patch and nothing else, and a view for larger patches needs no more pixels than those.

A pair (patch size, drop rate) is a strategy, and `sample_cost` says what it saves.

Shapes: b batch, n patch tokens, k kept tokens, d width, c channels, p old patch side, q new patch
side, h w grid.

    ids = random_keep(b, n, drop_rate=0.75)              # b k
    kept = drop_tokens(tokens, ids)                      # b n d -> b k d
    kernel = pi_resize(proj.weight, new_size=24)         # d c 16 16 -> d c 24 24
"""
import re
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from einops import rearrange


@dataclass(frozen=True)
class Compression:
    """A strategy: patch side in pixels, and the fraction of tokens that are dropped."""
    patch_size: int
    drop_rate: float = 0.0

    def __post_init__(self):
        if not isinstance(self.patch_size, int) or self.patch_size < 1:
            raise ValueError(f'patch size {self.patch_size} is not a whole number of pixels >= 1')
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f'drop rate {self.drop_rate} is outside [0, 1)')

    def __str__(self):
        if not self.drop_rate:
            return f'p{self.patch_size}'
        rate = f'{self.drop_rate:.2f}'
        if float(rate) != self.drop_rate:
            # names are read back, so a rate with more digits keeps them all
            rate = self.drop_rate
        return f'p{self.patch_size}-drop{rate}'

    @classmethod
    def parse(cls, text):
        """The inverse of str(): 'p24' or 'p24-drop0.50'."""
        match = re.fullmatch(r'p(\d+)(-drop(\d*\.?\d+(e-\d+)?))?', text.strip())
        if not match:
            raise ValueError(f"'{text}' is not a compression; write p24 or p24-drop0.50")
        patch_size, _, drop_rate, _ = match.groups()
        return cls(int(patch_size), float(drop_rate or 0))


# ---------------------------------------------------------------- token dropout

def num_keep(n, drop_rate):
    """Tokens kept of n. Rounded: int(225 * (1 - 0.8)) is 44, since the product is 44.999."""
    if not 0 <= drop_rate < 1:
        raise ValueError(f'drop rate {drop_rate} is outside [0, 1)')
    return max(1, round(n * (1 - drop_rate)))


def random_keep(b, n, drop_rate, generator=None, device=None):
    """Indices (b k) of the tokens to keep: per sample, uniform, without replacement.

    A generator draws on its own device, so that a CPU generator gives the same tokens everywhere.
    """
    draw_on = generator.device if generator else device
    noise = torch.rand(b, n, generator=generator, device=draw_on)
    # the k largest of n independent uniform numbers sit at a uniform random set of places
    k = num_keep(n, drop_rate)
    ids = noise.topk(k, sorted=False).indices
    return ids.to(device)


def drop_tokens(tokens, ids):
    """(b n d), ids (b k) -> (b k d). Kept tokens are not rescaled (as in MAE, FLIP,
    PatchDropout)."""
    return torch.take_along_dim(tokens, ids[:, :, None], dim=1)


# ---------------------------------------------------------------- patch scaling

def patches_per_side(side, patch_size):
    """Patches along the side of a view: it keeps its field of view and changes its resolution.

    So any patch size can be used: at 224 px, patch 30 makes 7 x 7 patches, of 210 px. A tie goes
    up. At least one patch remains.
    """
    return max(1, int(side / patch_size + 0.5))


@cache
def resize_matrix(old, new, interpolation='bilinear', antialias=False):
    """B (new*new, old*old), float64: vec(resize(x)) = B vec(x). Column i resizes unit patch i.

    'bilinear' without antialias is FlexiViT's reference; timm's default, 'bicubic' with antialias,
    changes the tokens of enlarged patches by 5 to 28 %. Half-pixel centres (align_corners=False).
    """
    with torch.inference_mode(False):  # the cached matrix must stay usable under autograd
        unit_patches = torch.eye(old * old, dtype=torch.float64)
        unit_patches = unit_patches.view(-1, 1, old, old)
        resized = F.interpolate(unit_patches, new, mode=interpolation, antialias=antialias)
        return resized.flatten(1).T


@cache
def _pi_matrix(old, new, interpolation, antialias, device, dtype):
    """pinv(B^T), (new*new, old*old): computed in float64, then cast."""
    with torch.inference_mode(False):
        matrix = resize_matrix(old, new, interpolation, antialias)
        inverse = torch.linalg.pinv(matrix.T)
        return inverse.to(device, dtype)


def pi_resize(kernel, new_size, interpolation='bilinear', antialias=False):
    """FlexiViT's pseudo-inverse resize of a patch kernel (d c p p) -> (d c q q).

    Linear in the kernel, hence differentiable: one trained kernel serves every patch size. For q
    < p the patch has less information than the kernel asks for, and the result is the
    least-squares one. Computed in float32 or wider: a bfloat16 product is off by 3e-3.
    """
    old_size = kernel.shape[-1]
    if new_size == old_size:
        return kernel
    dtype = torch.promote_types(kernel.dtype, torch.float32)
    device = kernel.device
    matrix = _pi_matrix(old_size, new_size, interpolation, antialias, device, dtype)
    with torch.autocast(device.type, enabled=False):
        resized = kernel.to(dtype).flatten(2) @ matrix.T                      # d c (y x)
    resized = rearrange(resized, 'd c (y x) -> d c y x', y=new_size)
    return resized.to(kernel.dtype)


def resize_pos_embed(pos, old_grid, new_grid):
    """Interpolate patch positions (1 n d), n = h w, to another grid (h', w'), in float32.

    Always by size, never by scale factor. The caller keeps the class token's row apart. The table
    is sampled at the new patch centres (as in MAE); timm's antialias would average it.
    """
    if tuple(old_grid) == tuple(new_grid):
        return pos
    h, w = old_grid
    table = rearrange(pos.float(), '1 (h w) d -> 1 d h w', h=h, w=w)
    table = F.interpolate(table, tuple(new_grid), mode='bicubic')
    table = rearrange(table, '1 d h w -> 1 (h w) d')
    return table.to(pos.dtype)


# ---------------------------------------------------------------- what a strategy costs

def pass_flops(tokens, patch_dim, embed_dim, depth, mlp_ratio=4.0,  # noqa: PLR0913
               head=(), trains=False, frozen_patches=False):
    """FLOPs (2 per multiply-add) of one image of `tokens` kept patches through encoder and head.

    Multiply-adds of a block, with N = tokens + 1 (class token) and r = mlp_ratio: qkv and proj
    4 N d^2, the MLP 2 r N d^2, q k^T and a v 2 N^2 d. patch_dim = c p p. head: widths of its linear
    layers. Dropped tokens are never embedded. ViT-B/16 at 224 px: 2 x 17.56 G.

    trains: forward and backward. The paper's unit of cost is a forward pass of the uncompressed
    encoder, so that a trained pass costs about 3 units and the key's pass 1.
    """
    n = tokens + 1
    linear_layers = (4 + 2 * mlp_ratio) * n * embed_dim ** 2
    attention = 2 * n ** 2 * embed_dim
    projection = 2 * tokens * patch_dim * embed_dim
    blocks = 2 * depth * (linear_layers + attention)
    for a, b in zip(head, head[1:]):
        blocks += 2 * a * b
    if not trains:
        return projection + blocks
    # backward costs two forwards: the gradient of the weights and that of the input.
    # Images need no gradient, and a frozen patch projection needs neither.
    return projection * (1 if frozen_patches else 2) + 3 * blocks


def sample_cost(method, views, strategy):
    """c(tau): a training sample in forward passes of the uncompressed encoder, the paper's unit.

    method: of losses.py, around a vit.ViT. views: an Augmentation for each view (images/views.py).
    """
    config = method.encoder.config
    base = config['patch_size']

    def flops(side, patch_size, pixels, drop_rate=0.0, head=(), trains=False):
        tokens = num_keep(patches_per_side(side, patch_size) ** 2, drop_rate)
        return pass_flops(tokens, config['in_chans'] * pixels ** 2, config['embed_dim'],
                          config['depth'], config['mlp_ratio'], head, trains,
                          config['freeze_patch_embed'])

    total = 0.0
    for branch, view, trains, head in method.passes():
        p, drop_rate = method.compression(branch, strategy.patch_size, strategy.drop_rate)
        p = p or base
        large, small = views[view].patches                 # (1, 1), or (q, p) of a small view
        total += flops(views[view].side, p, p // large * small, drop_rate, head, trains)
    return total / flops(config['img_size'], base, base)


def self_check():
    torch.manual_seed(0)
    kernel = torch.randn(8, 1, 16, 16)
    patch = torch.randn(32, 48 * 48)                       # noise: no enlarged small patch
    token = patch @ pi_resize(kernel, 48).flatten(1).T
    shrink = torch.linalg.pinv(resize_matrix(16, 48)).float()
    picture = patch @ shrink.T                             # b 16*16, by least squares
    wanted = picture @ kernel.flatten(1).T
    error = (token - wanted).norm() / wanted.norm()
    print(f'patch 48: its token is that of its least-squares picture of 16 x 16, to {error:.1e}')
    assert error < 1e-5

    unit = pass_flops(196, 768, 768, 12)
    cost = pass_flops(49, 768, 768, 12, trains=True) / unit
    print(f'ViT-B at 224 px: a step on 49 of 196 patches costs {cost:.2f} forward passes, not 3')
    assert cost < 3 / 4
    print('compress.py: all claims hold')


if __name__ == '__main__':
    self_check()
