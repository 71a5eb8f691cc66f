"""Compress the token sequence of a ViT: fewer patches of the image, or larger ones.

"Accelerating Augmentation Invariance Pretraining" (NeurIPS 2024), the two compressions:

    token dropout    keep k = round(n (1 - drop_rate)) random patch tokens of each image
    patch scaling    cut the image into q x q instead of p x p patches, with one trained p x p kernel w,
                     resized inside the forward pass as FlexiViT does (arXiv 2212.08013, section 3.4):
                         w_q = pinv(B^T) w,      B: the linear map that resizes a p x p patch to q x q
                     so that <B x, w_q> = <x, w> for every patch x when q >= p

A pair (patch size, drop rate) is a strategy, and `sample_cost` says what a training sample costs under it.

Shapes: b batch, n patch tokens, k kept tokens, d width, c channels, p old patch side, q new patch side, h w grid.

    ids = random_keep(b, n, drop_rate=0.75)              # b k
    kept = drop_tokens(tokens, ids)                      # b n d -> b k d
    kernel = pi_resize(proj.weight, new_size=24)         # d c 16 16 -> d c 24 24
"""
import re
from dataclasses import dataclass
from functools import lru_cache

import torch
import torch.nn.functional as F
from einops import rearrange, repeat


@dataclass(frozen=True)
class Compression:
    """A strategy: patch side in pixels and the fraction of patch tokens that the gradient's branch drops."""
    patch_size: int
    drop_rate: float = 0.0

    def __post_init__(self):
        if int(self.patch_size) != self.patch_size or self.patch_size < 1:
            raise ValueError(f'patch size {self.patch_size} is not a whole number of pixels >= 1')
        if not 0 <= self.drop_rate < 1:
            raise ValueError(f'drop rate {self.drop_rate} is outside [0, 1)')

    def __str__(self):
        if not self.drop_rate:
            return f'p{self.patch_size}'
        two_digits = f'{self.drop_rate:.2f}'
        exact = two_digits if float(two_digits) == self.drop_rate else repr(float(self.drop_rate))
        return f'p{self.patch_size}-drop{exact}'

    @classmethod
    def parse(cls, text):
        """The inverse of str(): 'p24' or 'p24-drop0.50'."""
        match = re.fullmatch(r'p(\d+)(?:-drop(\d*\.?\d+(?:e-?\d+)?))?', text.strip())
        if not match:
            raise ValueError(f"'{text}' is not a compression; write p24 or p24-drop0.50")
        return cls(int(match[1]), float(match[2] or 0))


# ---------------------------------------------------------------- token dropout

def num_keep(n, drop_rate):
    """Tokens kept of n. Rounded, since int(225 * (1 - 0.8)) is 44: the product is 44.99999999999999."""
    return max(1, round(n * (1 - drop_rate)))


def random_keep(b, n, drop_rate, generator=None, device=None):
    """Indices (b k) of the tokens to keep: per sample, uniform, without replacement.

    A generator draws on its own device, so that a CPU generator gives the same tokens on every device.
    """
    draw_on = generator.device if generator is not None else device
    noise = torch.rand(b, n, generator=generator, device=draw_on)
    return noise.topk(num_keep(n, drop_rate), dim=1, sorted=False).indices.to(device)


def drop_tokens(tokens, ids):
    """(b n d), ids (b k) -> (b k d). Kept tokens are not rescaled (as in MAE, FLIP, PatchDropout)."""
    return tokens.gather(1, repeat(ids, 'b k -> b k d', d=tokens.shape[2]))


# ---------------------------------------------------------------- patch scaling

@lru_cache(maxsize=None)
def resize_matrix(old, new, interpolation='bilinear', antialias=False):
    """B (new*new, old*old), float64: vec(resize(x)) = B vec(x). Column i is the resized i-th unit patch.

    'bilinear' without antialias is FlexiViT's reference; timm's default, 'bicubic' with antialias, moves the
    kernel by 5 to 28 %. Half-pixel centres (align_corners=False).
    """
    with torch.inference_mode(False):  # the cached matrix must stay usable under autograd
        unit_patches = rearrange(torch.eye(old * old, dtype=torch.float64), 'i (y x) -> i 1 y x', y=old)
        resized = F.interpolate(unit_patches, (new, new), mode=interpolation, antialias=antialias)
        return rearrange(resized, 'i 1 y x -> (y x) i')


@lru_cache(maxsize=None)
def _pi_matrix(old, new, interpolation, antialias, device, dtype):
    with torch.inference_mode(False):
        matrix = torch.linalg.pinv(resize_matrix(old, new, interpolation, antialias).T)  # (q*q, p*p), float64
        return matrix.to(device=device, dtype=dtype)


def pi_resize(kernel, new_size, interpolation='bilinear', antialias=False):
    """FlexiViT's pseudo-inverse resize of a patch kernel (d c p p) -> (d c q q).

    Linear in the kernel, hence differentiable: one trained kernel serves every patch size. For q < p the patch
    has less information than the kernel asks for and the result is the least-squares one.
    Computed in float32 or wider: a bfloat16 product is off by 3e-3.
    """
    old_size = kernel.shape[-1]
    if new_size == old_size:
        return kernel
    wide = torch.promote_types(kernel.dtype, torch.float32)
    matrix = _pi_matrix(old_size, new_size, interpolation, antialias, kernel.device, wide)
    with torch.autocast(kernel.device.type, enabled=False):
        resized = rearrange(kernel.to(wide), 'd c y x -> d c (y x)') @ matrix.T
    return rearrange(resized, 'd c (y x) -> d c y x', y=new_size).to(kernel.dtype)


def resize_pos_embed(pos, old_grid, new_grid, interpolation='bicubic', antialias=False):
    """Interpolate a position table of patch tokens (1 n d), n = h*w, to another grid (h', w'), in float32.

    Always by size, never by scale factor; the class token's row is the caller's to keep apart. Without
    antialias the table is sampled at the new patch centres (DINO, MAE); with it, averaged (timm).
    """
    if tuple(old_grid) == tuple(new_grid):
        return pos
    h, w = old_grid
    table = rearrange(pos.float(), '1 (h w) d -> 1 d h w', h=h, w=w)
    table = F.interpolate(table, tuple(new_grid), mode=interpolation, antialias=antialias)
    return rearrange(table, '1 d h w -> 1 (h w) d').to(pos.dtype)


def local_side(nominal, patch_size):
    """Side of DINO's local crop: the multiple of the patch size nearest to the nominal one, at least one patch.

    The crop's field of view does not change, only the resolution that it is resized to.
    """
    return max(1, int(nominal / patch_size + 0.5)) * patch_size


# ---------------------------------------------------------------- what a strategy costs

def forward_flops(tokens, embed_dim, depth, mlp_ratio=4.0, patch_dim=0):
    """FLOPs (2 per multiply-add) of one image of `tokens` kept patches: (patch projection, blocks).

    Per block and N = tokens + 1 (class token): qkv, proj 4 N d^2; mlp 2 r N d^2; q k^T and a v 2 N^2 d.
    patch_dim = c p p; the tokens that are dropped are never embedded. ViT-B/16 at 224 px: 2 x 17.56 G.
    """
    n, d = tokens + 1, embed_dim
    blocks = depth * ((4 + 2 * mlp_ratio) * n * d * d + 2 * n * n * d)
    return 2 * tokens * patch_dim * d, 2 * blocks


def head_flops(widths):
    """FLOPs of a stack of linear layers of these widths on one vector."""
    return 2 * sum(a * b for a, b in zip(widths, widths[1:]))


def training_flops(method, sizes, compression, symmetric=False, drop_branch='query',
                   projector=(), predictor=(), local_crops=0, local_size=0):
    """FLOPs of training on one sample: its forward and backward passes in all branches, heads included.

    method: 'moco', 'simclr' or 'dino'; sizes: the arguments of the ViT (ViT.sizes); drop_branch: 'query'
    (query, student or SimCLR's first view alone drops tokens) or 'both'; projector, predictor: layer widths;
    local_crops of nominal side local_size: DINO's. Backward costs two forwards, but images need no gradient,
    so the patch projection costs one, or none when it is frozen.
    """
    patch_grads = 0 if sizes.get('freeze_patch_embed') else 1

    def branch(grad, dropped, head, side=None):
        p = compression.patch_size
        n = ((side or sizes['img_size']) // p) ** 2
        tokens = num_keep(n, compression.drop_rate) if dropped else n
        patch, blocks = forward_flops(tokens, sizes['embed_dim'], sizes['depth'], sizes.get('mlp_ratio', 4.0),
                                      sizes.get('in_chans', 3) * p * p)
        if grad:
            return (1 + patch_grads) * patch + 3 * (blocks + head_flops(head))
        return patch + blocks + head_flops(head)

    target_drops = drop_branch == 'both'
    directions = 2 if symmetric else 1
    if method == 'moco':  # per direction: query with gradient, key without
        query = branch(True, True, projector) + 3 * head_flops(predictor)
        return directions * (query + branch(False, target_drops, projector))
    if method == 'simclr':  # both views carry gradient, whichever of them are anchors
        return branch(True, True, projector) + branch(True, target_drops, projector)
    if method == 'dino':  # student: global crops (one or both) and the local ones; teacher: global crops
        side = local_side(local_size, compression.patch_size)
        student = directions * branch(True, True, projector) + local_crops * branch(True, True, projector, side)
        return student + directions * branch(False, target_drops, projector)
    raise ValueError(f"method '{method}' is not one of moco, simclr, dino")


def sample_cost(method, sizes, compression, base, **settings):
    """c(tau): cost of a training sample under `compression` relative to `base` (paper, "sample cost").

    Analytic, in FLOPs; settings as in `training_flops`. The paper does not say whether backward counts: here
    it does, and 1 unit is one uncompressed training sample.
    """
    return (training_flops(method, sizes, compression, **settings)
            / training_flops(method, sizes, base, **settings))


if __name__ == '__main__':
    torch.manual_seed(0)
    kernel, patch = torch.randn(8, 3, 16, 16), torch.randn(32, 3, 16, 16)
    token = torch.einsum('b c y x, d c y x -> b d', patch, kernel)
    for q in (20, 24, 30, 40, 48):
        large = F.interpolate(patch, (q, q), mode='bilinear')
        error = torch.einsum('b c y x, d c y x -> b d', large, pi_resize(kernel, q)) - token
        error = (error.norm() / token.norm()).item()
        print(f'patch 16 -> {q}: tokens of enlarged patches change by {error:.1e}')
        assert error < 1e-5
    counts = torch.bincount(random_keep(20_000, 49, 0.75).flatten(), minlength=49)
    z = (counts - 20_000 * 12 / 49) / (20_000 * 12 / 49 * 37 / 49) ** 0.5
    print(f'token dropout: 12 of 49 kept, largest deviation from uniform {z.abs().max():.1f} sigma')
    assert z.abs().max() < 4.5
    vit_base = dict(img_size=240, embed_dim=768, depth=12)
    for text in ('p16', 'p16-drop0.75', 'p24', 'p24-drop0.50', 'p48-drop0.90'):
        cost = sample_cost('moco', vit_base, Compression.parse(text), Compression(16))
        print(f'{text:>13}: a MoCo-v3 ViT-B sample at 240 px costs {cost:.3f}')
    assert cost < 0.1 and str(Compression.parse('p24-drop0.50')) == 'p24-drop0.50'
    print('compress.py: all claims hold')
