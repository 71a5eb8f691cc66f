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

A pair (patch size, drop rate) is a strategy, and `pass_flops` says what it saves.

Shapes: b batch, n patch tokens, k kept tokens, d width, c channels, p old patch side, q new patch
side, h w grid.

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
        two_digits = f'{self.drop_rate:.2f}'
        # names are read back, so a rate with more digits keeps them all
        digits = two_digits if float(two_digits) == self.drop_rate else f'{self.drop_rate}'
        return f'p{self.patch_size}-drop{digits}'

    @classmethod
    def parse(cls, text):
        """The inverse of str(): 'p24' or 'p24-drop0.50'."""
        name, dropped, rate = text.strip().partition('-drop')
        if not re.fullmatch(r'p\d+', name) or (dropped and not re.fullmatch(r'[\d.e-]+', rate)):
            raise ValueError(f"'{text}' is not a compression; write p24 or p24-drop0.50")
        try:
            return cls(int(name[1:]), float(rate or 0))
        except ValueError as error:
            raise ValueError(f"'{text}' is not a compression: {error}") from None


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
    draw_on = generator.device if generator is not None else device
    noise = torch.rand(b, n, generator=generator, device=draw_on)
    # the k largest of n independent uniform numbers sit at a uniform random set of places
    return noise.topk(num_keep(n, drop_rate), dim=1, sorted=False).indices.to(device)


def drop_tokens(tokens, ids):
    """(b n d), ids (b k) -> (b k d). Kept tokens are not rescaled (as in MAE, FLIP,
    PatchDropout)."""
    return tokens.gather(1, repeat(ids, 'b k -> b k d', d=tokens.shape[2]))


# ---------------------------------------------------------------- patch scaling

def patches_per_side(side, patch_size):
    """Patches along the side of a view: it keeps its field of view and changes its resolution.

    So any patch size can be used: at 224 px, patch 30 makes 7 x 7 patches, of 210 px. A tie goes
    up. At least one patch remains.
    """
    return max(1, int(side / patch_size + 0.5))


@lru_cache(maxsize=None)
def resize_matrix(old, new, interpolation='bilinear', antialias=False):
    """B (new*new, old*old), float64: vec(resize(x)) = B vec(x). Column i resizes unit patch i.

    'bilinear' without antialias is FlexiViT's reference; timm's default, 'bicubic' with antialias,
    changes the tokens of enlarged patches by 5 to 28 %. Half-pixel centres (align_corners=False).
    """
    with torch.inference_mode(False):  # the cached matrix must stay usable under autograd
        unit_patches = torch.eye(old * old, dtype=torch.float64)
        unit_patches = rearrange(unit_patches, 'i (y x) -> i 1 y x', y=old)
        resized = F.interpolate(unit_patches, (new, new), mode=interpolation, antialias=antialias)
        return rearrange(resized, 'i 1 y x -> (y x) i')


@lru_cache(maxsize=None)
def _pi_matrix(old, new, interpolation, antialias, device, dtype):
    """pinv(B^T), (new*new, old*old): computed in float64, then cast."""
    with torch.inference_mode(False):
        matrix = torch.linalg.pinv(resize_matrix(old, new, interpolation, antialias).T)
        return matrix.to(device=device, dtype=dtype)


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
    matrix = _pi_matrix(old_size, new_size, interpolation, antialias, kernel.device, dtype)
    with torch.autocast(kernel.device.type, enabled=False):
        resized = rearrange(kernel.to(dtype), 'd c y x -> d c (y x)') @ matrix.T
    return rearrange(resized, 'd c (y x) -> d c y x', y=new_size).to(kernel.dtype)


def resize_pos_embed(pos, old_grid, new_grid, interpolation='bicubic', antialias=False):
    """Interpolate patch positions (1 n d), n = h w, to another grid (h', w'), in float32.

    Always by size, never by scale factor. The caller keeps the class token's row apart. Without
    antialias the table is sampled at the new patch centres (DINO, MAE); with it, averaged (timm).
    """
    if tuple(old_grid) == tuple(new_grid):
        return pos
    h, w = old_grid
    table = rearrange(pos.float(), '1 (h w) d -> 1 d h w', h=h, w=w)
    table = F.interpolate(table, tuple(new_grid), mode=interpolation, antialias=antialias)
    return rearrange(table, '1 d h w -> 1 (h w) d').to(pos.dtype)


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
    blocks += 2 * sum(a * b for a, b in zip(head, head[1:]))
    if not trains:
        return projection + blocks
    # backward costs two forwards: the gradient of the weights and that of the input.
    # Images need no gradient, and a frozen patch projection needs neither.
    return projection * (1 if frozen_patches else 2) + 3 * blocks


def self_check():
    torch.manual_seed(0)
    kernel, patch = torch.randn(8, 3, 16, 16), torch.randn(32, 3, 16, 16)
    token = torch.einsum('b c y x, d c y x -> b d', patch, kernel)
    for q in (20, 24, 30, 40, 48):
        large = F.interpolate(patch, (q, q), mode='bilinear')
        error = torch.einsum('b c y x, d c y x -> b d', large, pi_resize(kernel, q)) - token
        error = (error.norm() / token.norm()).item()
        print(f'patch 16 -> {q}: tokens of enlarged patches change by {error:.1e}')
        assert error < 1e-5

    large = torch.randn(32, 3, 48, 48)                     # noise: no enlarged small patch
    small = large.flatten(2) @ torch.linalg.pinv(resize_matrix(16, 48)).T.float()
    wanted = torch.einsum('b c y x, d c y x -> b d', large, pi_resize(kernel, 48))
    token = torch.einsum('b c i, d c i -> b d', small, kernel.flatten(2))
    error = ((token - wanted).norm() / wanted.norm()).item()
    print(f'patch 48: its token is that of its least-squares picture of 16 x 16, to {error:.1e}')
    assert error < 1e-5

    unit = pass_flops(196, 768, 768, 12)
    for name, k in (('uncompressed', 196), ('half of the tokens', 98), ('patches of 48 px', 25)):
        query = pass_flops(k, 768, 768, 12, trains=True)
        key = pass_flops(25 if k == 25 else 196, 768, 768, 12)
        print(f'ViT-B at 224 px, query 3 and key 1, {name}: {(query + key) / unit:.2f} units')
    print('compress.py: all claims hold')


if __name__ == '__main__':
    self_check()
