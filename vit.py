"""A vision transformer whose forward takes a patch size and a drop rate.

Pre-norm ViT (arXiv 2010.11929) with MoCo-v3's initialization (arXiv 2104.02057). Compression is
an argument of the call and off by default, never module state, so evaluation cannot drop tokens
by accident:

    cut      images            b c (h p) (w p) -> b n (c p p)
    choose   k of n patches    -> b k (c p p)           dropped patches are never embedded
    embed    x = patches kernel(p)^T + bias + pos[ids]  kernel(p): pi_resize of the trained kernel
    blocks   [cls; x]          b 1+k d -> norm -> class token  b d

Shapes: b batch, c channels, p patch side, h w grid, n = h w patches, k kept patches, d width, a
heads.

    encoder = vit_base(img_size=224)
    features = encoder(images)                                 # b 3 224 224 -> b d, 196 patches
    features = encoder(images, patch_size=32, drop_rate=0.5)   # 24 of 49 patches

Parameters are named and shaped as in timm, so weights move to and from timm, MoCo-v3 and DINO as
they are.
"""
import math
from functools import lru_cache

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from compress import drop_tokens, pi_resize, random_keep, resize_pos_embed


def sincos_table(h, w, dim, base_grid=None):
    """MoCo-v3's fixed table (1 h*w dim): [sin(i f), cos(i f), sin(j f), cos(j f)], row i, column j.

    With base_grid (H, W) the table is evaluated at this grid's patch centres in units of the base
    grid, i = (row + 0.5) H / h - 0.5: a place in the image has the same code at every patch size.
    """
    base_h, base_w = base_grid or (h, w)
    frequencies = 1.0 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
    rows = (torch.arange(h) + 0.5) * (base_h / h) - 0.5
    cols = (torch.arange(w) + 0.5) * (base_w / w) - 0.5
    row_angles = repeat(torch.outer(rows, frequencies), 'h f -> (h w) f', w=w)
    col_angles = repeat(torch.outer(cols, frequencies), 'w f -> (h w) f', h=h)
    waves = [row_angles.sin(), row_angles.cos(), col_angles.sin(), col_angles.cos()]
    return torch.cat(waves, dim=1)[None]


@lru_cache(maxsize=None)
def table_on(h, w, dim, base_grid, device, dtype):
    """sincos_table on a device: made once, and on the CPU, so that a GPU has the same bits."""
    with torch.inference_mode(False), torch.device('cpu'):
        return sincos_table(h, w, dim, base_grid).to(device, dtype)


class Attention(nn.Module):
    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x)                                                     # b n (3 a e)
        q, k, v = rearrange(qkv, 'b n (three a e) -> three b a n e', three=3, a=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(x, 'b a n e -> b n (a e)'))


class Mlp(nn.Module):
    def __init__(self, dim, hidden):
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x):
        return self.fc2(F.gelu(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class PatchEmbed(nn.Module):
    """The one trained kernel (d c p p) under its name in timm; ViT.forward_tokens applies it."""

    def __init__(self, patch_size, in_chans, embed_dim):
        super().__init__()
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)


class ViT(nn.Module):
    """pos_embed: 'sincos' (MoCo-v3's fixed table) or 'learned'.

    freeze_patch_embed keeps the patch projection at its random start (MoCo-v3's
    --stop-grad-conv1). `config` holds the constructor's arguments: backbone.pt stores them,
    compress.sample_cost reads them.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=384,  # noqa: PLR0913
                 depth=12, num_heads=6, mlp_ratio=4.0, pos_embed='sincos',
                 freeze_patch_embed=False):
        super().__init__()
        self.config = dict(img_size=img_size, patch_size=patch_size, in_chans=in_chans,
                           embed_dim=embed_dim, depth=depth, num_heads=num_heads,
                           mlp_ratio=mlp_ratio, pos_embed=pos_embed,
                           freeze_patch_embed=freeze_patch_embed)
        if num_heads < 1 or embed_dim % num_heads:
            raise ValueError(f'{num_heads} heads do not divide width {embed_dim}; '
                             f'choose another number of heads')
        if pos_embed not in ('sincos', 'learned'):
            raise ValueError(f"position embedding '{pos_embed}' is not one of sincos, learned")
        if pos_embed == 'sincos' and embed_dim % 4:
            raise ValueError(f'a sin-cos position table needs a width divisible by 4, '
                             f'not {embed_dim}')
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        self.base_grid = self.grid(img_size, img_size, patch_size)
        n = self.base_grid[0] * self.base_grid[1]

        self.patch_embed = PatchEmbed(patch_size, in_chans, embed_dim)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        learned = pos_embed == 'learned'
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + n, embed_dim), requires_grad=learned)
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()
        if freeze_patch_embed:
            self.patch_embed.requires_grad_(False)

    @torch.no_grad()
    def init_weights(self):
        """MoCo-v3's: Xavier, with the fused qkv and the patch kernel taken as linear maps."""
        d = self.embed_dim
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear):
                # q, k and v are three maps d -> d; Xavier on the fused matrix is too narrow
                fan_in_out = 2 * d if name.endswith('qkv') else sum(module.weight.shape)
                bound = math.sqrt(6 / fan_in_out)
                module.weight.uniform_(-bound, bound)
                module.bias.zero_()
        proj = self.patch_embed.proj
        bound = math.sqrt(6 / (proj.weight[0].numel() + d))
        proj.weight.uniform_(-bound, bound)
        proj.bias.zero_()
        self.cls_token.normal_(std=1e-6)
        if self.config['pos_embed'] == 'sincos':
            # the class token's row stays zero
            self.pos_embed[:, 1:] = sincos_table(*self.base_grid, d)
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def grid(self, height, width, patch_size):
        """Patches per column and per row, or an error that names the patch sizes that fit."""
        if patch_size < 1:
            raise ValueError(f'patch size {patch_size} must be at least 1 pixel')
        if height % patch_size or width % patch_size or not height or not width:
            common = math.gcd(height, width)
            fitting = [p for p in range(1, common + 1) if common % p == 0]
            near = [p for p in fitting if patch_size / 2 <= p <= patch_size * 2] or fitting
            raise ValueError(f'patch size {patch_size} does not divide image size '
                             f'{height}x{width}; use {", ".join(map(str, near))} or an image '
                             f'size that is a multiple of {patch_size}')
        return height // patch_size, width // patch_size

    def positions(self, grid):
        """Position codes (1 h*w d) of the patches of a grid that spans the same image."""
        if grid == self.base_grid:
            return self.pos_embed[:, 1:]
        if self.config['pos_embed'] == 'sincos':
            return table_on(*grid, self.embed_dim, self.base_grid, self.pos_embed.device,
                            self.pos_embed.dtype)
        return resize_pos_embed(self.pos_embed[:, 1:], self.base_grid, grid)

    def forward_tokens(self, images, patch_size=None, drop_rate=0.0, generator=None):
        """(b c H W) -> (b 1+k d), the class token first, after the final norm.

        H and W: any multiples of the patch size.
        """
        p = self.patch_size if patch_size is None else patch_size
        b, c, height, width = images.shape
        grid = self.grid(height, width, p)
        patches = rearrange(images, 'b c (h p) (w q) -> b (h w) (c p q)', p=p, q=p)
        pos = self.positions(grid)                                            # 1 n d
        if drop_rate:
            # drop before the projection: a dropped patch costs nothing at all
            ids = random_keep(b, patches.shape[1], drop_rate, generator, images.device)
            patches = drop_tokens(patches, ids)                               # b k (c p q)
            pos = pos[0][ids]                                                 # b k d

        # a convolution with stride p is a linear map of each patch, for any resized kernel
        kernel = pi_resize(self.patch_embed.proj.weight, p)
        kernel = rearrange(kernel, 'd c p q -> d (c p q)')
        x = F.linear(patches, kernel, self.patch_embed.proj.bias) + pos       # b k d
        cls = repeat(self.cls_token + self.pos_embed[:, :1], '1 1 d -> b 1 d', b=b)
        x = torch.cat([cls, x], dim=1)                                        # b 1+k d
        for block in self.blocks:
            x = block(x)
        return self.norm(x)

    def forward(self, images, patch_size=None, drop_rate=0.0, generator=None):
        """(b c H W) -> (b d): the class token."""
        return self.forward_tokens(images, patch_size, drop_rate, generator)[:, 0]


SIZES = dict(
    vit_tiny=dict(embed_dim=192, depth=12, num_heads=3),
    vit_small=dict(embed_dim=384, depth=12, num_heads=6),  # as DINO and timm; MoCo-v3 has 12 heads
    vit_base=dict(embed_dim=768, depth=12, num_heads=12),
)


def vit_tiny(**sizes):
    return ViT(**{**SIZES['vit_tiny'], **sizes})


def vit_small(**sizes):
    """6 heads as DINO and timm have it; MoCo-v3's ViT-S is vit_small(num_heads=12)."""
    return ViT(**{**SIZES['vit_small'], **sizes})


def vit_base(**sizes):
    return ViT(**{**SIZES['vit_base'], **sizes})


if __name__ == '__main__':
    torch.manual_seed(0)
    encoder = ViT(img_size=48, patch_size=4, embed_dim=64, depth=2, num_heads=2).eval()
    images = torch.randn(2, 3, 48, 48)
    for p, rate in ((4, 0.0), (4, 0.75), (8, 0.0), (12, 0.5)):
        tokens = encoder.forward_tokens(images, p, rate)
        print(f'patch {p:2}, drop {rate:.2f}: {tokens.shape[1] - 1:3} patch tokens')
    assert torch.equal(encoder(images), encoder(images, patch_size=4, drop_rate=0.0))

    # enlarge every patch on its own, so that no pixels mix across the borders of patches
    small = ViT(img_size=16, patch_size=4, embed_dim=64, depth=2, num_heads=2)
    images = images[:, :, :16, :16]
    patches = rearrange(images, 'b c (h p) (w q) -> (b h w) c p q', p=4, q=4)
    patches = F.interpolate(patches, (8, 8), mode='bilinear')
    large = rearrange(patches, '(b h w) c p q -> b c (h p) (w q)', h=4, w=4)
    error = (small(images) - small(large, patch_size=8)).abs().max().item()
    print(f'each 4x4 patch enlarged to 8x8 and read at patch size 8: features move by {error:.1e}')
    assert error < 1e-4

    with torch.device('meta'):
        parameters = sum(p.numel() for p in vit_base(img_size=224).parameters())
    print(f'ViT-B/16 at 224 px: {parameters:,} parameters, position table included')
    assert parameters == 85_798_656
    print('vit.py: all claims hold')
