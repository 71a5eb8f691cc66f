"""A vision transformer whose forward takes a patch size and a drop rate, and the same for timm's.

Pre-norm ViT (arXiv 2010.11929) with MoCo-v3's initialization (arXiv 2104.02057). Compression is
an argument of the call and off by default, never module state, so evaluation cannot drop tokens
by accident:

    cut      images            b c (h p) (w p) -> b n (c p p)
    choose   k of n patches    -> b k (c p p)           dropped patches are never embedded
    embed    x = patches kernel(p)^T + bias + pos[ids]  kernel(p): pi_resize of the trained kernel
    blocks   [cls; x]          b 1+k d -> norm -> class token  b d

Shapes: b batch, c channels, p patch side, h w grid, n = h w patches, k kept patches, d width, a
heads, r tokens before the patches (the class token, and registers).

    encoder = vit_base(img_size=224)
    features = encoder(images)                                 # b 3 224 224 -> b d, 196 patches
    features = encoder(images, patch_size=32, drop_rate=0.5)   # 24 of 49 patches

    model = timm.create_model('vit_small_patch16_224', num_classes=0)      # or another plain ViT
    tokens = forward_features(model, images, patch_size=32, drop_rate=0.5)

Parameters are named and shaped as in timm, so weights move to and from timm, MoCo-v3, DINO and MAE
as they are (`load_backbone`).
"""
import argparse
import math
import re
import zipfile
from collections import OrderedDict
from functools import cache, partial

import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange, repeat

from compress import drop_tokens, pi_resize, random_keep, resize_pos_embed


# ---------------------------------------------------------------- compression of any ViT

def forward_features(vit, images, patch_size=None, drop_rate=0.0, generator=None):
    """Tokens (b r+k d) of a ViT with timm's names, after the final norm; the class token first.

    images: (b c H W), H and W multiples of the patch size. Without compression, at the model's own
    image size and in eval mode, the result is that of timm's vit.forward_features, and
    vit.forward_head(tokens, pre_logits=True) pools it. Every dropped patch saves its share of the
    whole encoder. Raises ValueError for an architecture that would come out wrong.

    It calls the parts of the bare module, so call it inside the forward that DDP or FSDP wraps, and
    compile the blocks alone: Dynamo ignores @cache and would invert a matrix in every forward.
    """
    if not isinstance(vit, ViT):
        check_supported(vit)
    proj = vit.patch_embed.proj
    p = patch_size or proj.kernel_size[0]
    grid = grid_of(*images.shape[2:], p)
    patches = rearrange(images, 'b c (h p) (w q) -> b (h w) (c p q)', p=p, q=p)
    prefix_pos, pos = positions(vit, grid)                                    # 1 r d, 1 n d
    if drop_rate:
        # drop before the projection: a dropped patch costs nothing at all
        ids = random_keep(*patches.shape[:2], drop_rate, generator, images.device)
        patches = drop_tokens(patches, ids)                                   # b k (c p q)
        pos = pos[0][ids]                                                     # b k d

    # a convolution with stride p is a linear map of each patch, for any resized kernel
    kernel = pi_resize(proj.weight, p).flatten(1)                             # d (c p q)
    x = F.linear(patches, kernel, proj.bias)                                  # b k d
    norm = getattr(vit.patch_embed, 'norm', nn.Identity())
    x = norm(x) + pos
    prefix = vit.cls_token
    if getattr(vit, 'reg_token', None) is not None:
        prefix = torch.cat([prefix, vit.reg_token], dim=1)
    prefix = repeat(prefix + prefix_pos, '1 r d -> b r d', b=len(x))
    x = torch.cat([prefix, x], dim=1)                                         # b r+k d
    norm_pre = getattr(vit, 'norm_pre', nn.Identity())
    x = norm_pre(x)
    for block in vit.blocks:
        x = block(x)
    return vit.norm(x)


def grid_of(height, width, patch_size):
    """Patches per column and per row. ValueError for an image that would lose its border.

    Views are rendered at a multiple of the patch size (compress.patches_per_side).
    """
    if height % patch_size or width % patch_size:
        raise ValueError(f'patch size {patch_size} does not divide image size {height}x{width}; '
                         f'use an image size that is a multiple of {patch_size}')
    return height // patch_size, width // patch_size


def positions(vit, grid):
    """Position codes of the tokens before the patches (1 r d or 0) and of the patches (1 n d).

    A computed table is computed for the new grid; a learned one can only be interpolated.
    """
    table = vit.pos_embed
    side = math.isqrt(table.shape[1] - 1)
    base_grid = getattr(vit.patch_embed, 'grid_size', None) or (side, side)
    n = math.prod(base_grid)
    pos = table[:, -n:]
    prefix_pos = table[:, :-n] if table.shape[1] > n else 0       # timm's no_embed_class has none
    computed = isinstance(vit, ViT) and vit.config['pos_embed'] == 'sincos'
    if computed and grid != base_grid:
        pos = sincos_table(*grid, vit.embed_dim, base_grid, table.device)
        return prefix_pos, pos.to(table.dtype)
    return prefix_pos, resize_pos_embed(pos, base_grid, grid)


UNSUPPORTED = dict(
    dist_token='a distillation token',
    rope='rotary positions',
    layers='windows or stages',
    blocks_token_only='class attention',
    local_up_to_layer='a late class token',
    register_tokens='registers of another name')


def check_supported(vit):
    """Refuses a network that forward_features would compute wrongly, and names the reason."""
    found = [what for name, what in UNSUPPORTED.items() if getattr(vit, name, None) is not None]
    if re.search('rel_pos|relative_position', ' '.join(vit.state_dict())):
        found.append('relative positions')
    proj = getattr(getattr(vit, 'patch_embed', None), 'proj', None)
    if not isinstance(proj, nn.Conv2d) or hasattr(vit.patch_embed, 'backbone'):
        found.append('a hybrid stem')
    elif not proj.kernel_size == proj.stride == proj.kernel_size[::-1]:
        found.append('patches that overlap or are not square')
    if getattr(vit, 'cls_token', None) is None:
        found.append('no class token')
    if getattr(vit, 'pos_embed', None) is None:
        found.append('no table of positions')
    if found:
        raise ValueError(f'{type(vit).__name__} has {found[0]}; forward_features compresses a '
                         f'plain ViT: patch_embed.proj, cls_token, pos_embed, blocks, norm')


# ---------------------------------------------------------------- ours

@cache
def sincos_table(h, w, dim, base_grid=None, device='cpu'):
    """MoCo-v3's fixed table (1 h*w dim): [sin(i f), cos(i f), sin(j f), cos(j f)], row i, column j.

    With base_grid (H, W) the table is evaluated at this grid's patch centres in units of the base
    grid, i = (row + 0.5) H / h - 0.5: a place in the image has the same code at every patch size.
    A table is made once, and on the CPU, so that a GPU has the same bits.
    """
    base_h, base_w = base_grid or (h, w)
    with torch.inference_mode(False), torch.device('cpu'):
        frequencies = 1.0 / 10000 ** (torch.arange(dim // 4) / (dim // 4))
        rows = (torch.arange(h) + 0.5) * (base_h / h) - 0.5
        cols = (torch.arange(w) + 0.5) * (base_w / w) - 0.5
        places = torch.cartesian_prod(rows, cols)                             # (h w) 2
        angles = places[:, :, None] * frequencies                             # (h w) 2 f
        waves = torch.stack([angles.sin(), angles.cos()], dim=2)              # (h w) 2 2 f
        table = waves.flatten(1)[None]
        return table.to(device)


class Attention(nn.Module):
    """Every token reads from all tokens, in each head with weights of its own."""

    def __init__(self, dim, num_heads):
        super().__init__()
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, x):
        qkv = self.qkv(x)                                                     # b n (3 a e)
        q, k, v = rearrange(qkv, 'b n (three a e) -> three b a n e', three=3, a=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v)
        x = rearrange(x, 'b a n e -> b n (a e)')
        return self.proj(x)


class Block(nn.Module):
    """Attention moves information between tokens, the MLP works on each alone. Both read the
    normalized x and add to x itself (pre-norm), which keeps a deep network trainable."""

    def __init__(self, dim, num_heads, mlp_ratio):
        super().__init__()
        hidden = int(dim * mlp_ratio)
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = Attention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = nn.Sequential(OrderedDict(
            fc1=nn.Linear(dim, hidden),
            act=nn.GELU(),
            fc2=nn.Linear(hidden, dim),
        ))

    def forward(self, x):
        x = x + self.attn(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """pos_embed: 'sincos' (MoCo-v3's fixed table) or 'learned'.

    freeze_patch_embed keeps the patch projection at its random start (MoCo-v3's
    --stop-grad-conv1). `config` holds the constructor's arguments; backbone.pt stores them.
    """

    def __init__(self, img_size=224, patch_size=16, in_chans=3, embed_dim=384,  # noqa: PLR0913
                 depth=12, num_heads=6, mlp_ratio=4.0, pos_embed='sincos',
                 freeze_patch_embed=False):
        super().__init__()
        self.config = dict(
            img_size=img_size,
            patch_size=patch_size,
            in_chans=in_chans,
            embed_dim=embed_dim,
            depth=depth,
            num_heads=num_heads,
            mlp_ratio=mlp_ratio,
            pos_embed=pos_embed,
            freeze_patch_embed=freeze_patch_embed,
        )
        if embed_dim % num_heads or embed_dim % 4:
            raise ValueError(f'width {embed_dim} must be a multiple of 4, for sin-cos positions, '
                             f'and of the {num_heads} heads')
        if pos_embed not in ('sincos', 'learned'):
            raise ValueError(f"position embedding '{pos_embed}' is not one of sincos, learned")
        self.patch_size = patch_size
        self.embed_dim = embed_dim
        grid = grid_of(img_size, img_size, patch_size)

        # the one trained kernel (d c p p) under its name in timm; forward_features applies it
        self.patch_embed = nn.Module()
        self.patch_embed.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride=patch_size)
        self.patch_embed.grid_size = grid
        self.cls_token = nn.Parameter(torch.zeros(1, 1, embed_dim))
        table = torch.zeros(1, 1 + math.prod(grid), embed_dim)
        self.pos_embed = nn.Parameter(table, requires_grad=pos_embed == 'learned')
        self.blocks = nn.ModuleList(Block(embed_dim, num_heads, mlp_ratio) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim, eps=1e-6)
        self.init_weights()
        self.patch_embed.requires_grad_(not freeze_patch_embed)

    @torch.no_grad()
    def init_weights(self):
        """MoCo-v3's: Xavier, with the fused qkv and the patch kernel taken as linear maps."""
        d = self.embed_dim
        layers = [*self.blocks.named_modules(), ('proj', self.patch_embed.proj)]
        for name, layer in layers:
            if isinstance(layer, (nn.Linear, nn.Conv2d)):
                fan_out, fan_in = layer.weight.flatten(1).shape
                if name.endswith('qkv'):
                    # q, k and v are three maps d -> d; Xavier on the fused matrix is too narrow
                    fan_out = d
                bound = math.sqrt(6 / (fan_in + fan_out))
                layer.weight.uniform_(-bound, bound)
                layer.bias.zero_()
        self.cls_token.normal_(std=1e-6)
        if self.config['pos_embed'] == 'sincos':
            h, w = self.patch_embed.grid_size
            self.pos_embed[:, 1:] = sincos_table(h, w, d)           # the class token's stays zero
        else:
            nn.init.trunc_normal_(self.pos_embed, std=0.02)

    def forward_tokens(self, images, patch_size=None, drop_rate=0.0, generator=None):
        """(b c H W) -> (b 1+k d), the class token first, after the final norm."""
        return forward_features(self, images, patch_size, drop_rate, generator)

    def forward(self, images, patch_size=None, drop_rate=0.0, generator=None):
        """(b c H W) -> (b d): the class token."""
        return self.forward_tokens(images, patch_size, drop_rate, generator)[:, 0]


SIZES = dict(
    vit_tiny=dict(embed_dim=192, depth=12, num_heads=3),
    vit_small=dict(embed_dim=384, depth=12, num_heads=6),           # heads as in DINO and timm
    vit_base=dict(embed_dim=768, depth=12, num_heads=12),
)
vit_tiny = partial(ViT, **SIZES['vit_tiny'])
vit_small = partial(ViT, **SIZES['vit_small'])         # MoCo-v3's ViT-S: vit_small(num_heads=12)
vit_base = partial(ViT, **SIZES['vit_base'])


# ---------------------------------------------------------------- weights of others

# Where the encoder lies in a file: the path of the dictionaries, then the prefix of its names. The
# first match wins: of a file with two encoders, that is the one its authors evaluate.
LAYOUTS = dict(
    DINO=('teacher', 'backbone.'),
    moco_v3=('state_dict', 'module.base_encoder.'),
    timm_ema=('state_dict_ema', ''),
    timm=('state_dict', ''),
    ours_mae_or_deit=('model', ''),
)
NOT_ENCODER = ('head', 'fc_norm', 'decoder', 'mask_token')       # what follows it, or stands beside


def read(path):
    """The contents of a file of torch.save, on the CPU. It never runs code of the file.

    Compares the checksums, which torch.load skips: a flipped bit would be another network.
    """
    try:
        if zipfile.is_zipfile(path) and zipfile.ZipFile(path).testzip():
            raise ValueError('it is damaged; take another copy')
        with torch.serialization.safe_globals([argparse.Namespace]):          # DINO's and MAE's
            return torch.load(path, map_location='cpu', weights_only=True)
    except FileNotFoundError:
        raise
    except Exception as error:                      # of many kinds, by the place of the damage
        raise ValueError(f'{path} cannot be read: {error}') from None


def load_backbone(path, num_heads=None):
    """(ViT, info) of a backbone.pt of train.py, or of a file of timm, MoCo-v3, DINO, DeiT or MAE.

    info: what backbone.pt says besides the weights (mean, std, dataset, transform); empty for
    others. num_heads: shapes do not tell it; by default a head is 64 wide, in MoCo-v3's ViT-S 32
    and in ViT-H 80.
    """
    saved = read(path)
    if not isinstance(saved, dict):
        raise ValueError(f'{path} holds a {type(saved).__name__}, not a dictionary of tensors')
    for layout, (key, prefix) in LAYOUTS.items():
        tensors = saved.get(key, saved)             # a file may hold the tensors alone
        if isinstance(tensors, dict) and prefix + 'patch_embed.proj.weight' in tensors:
            break
    else:
        raise ValueError(f'{path} holds no ViT with the names of timm, MoCo-v3, DINO, DeiT or MAE '
                         f'({", ".join(map(str, list(saved)[:4]))} ...)')
    weights = {}
    for name, tensor in tensors.items():
        own_name = name.removeprefix(prefix)
        if name.startswith(prefix) and not own_name.startswith(NOT_ENCODER):
            weights[own_name] = tensor
    try:
        config = saved.get('config') or config_of(weights, num_heads, layout)
        encoder = ViT(**config)
        encoder.load_state_dict(weights)            # strict: half an encoder would get a score, too
    except (KeyError, RuntimeError) as error:
        raise ValueError(f'{path} holds no whole ViT: {error}') from None
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise ValueError(f'{path}: weights are not finite; take an earlier checkpoint')
    info = {name: saved[name] for name in ('mean', 'std', 'dataset', 'transform') if name in saved}
    return encoder, info


def config_of(weights, num_heads, layout):
    """The arguments of the ViT that the weights belong to, from their shapes."""
    embed_dim, in_chans, patch_size, _ = weights['patch_embed.proj.weight'].shape
    pos = weights['pos_embed'][:, 1:].float()
    grid = math.isqrt(pos.shape[1])
    # at other patch sizes MoCo-v3's fixed table is computed anew, a learned one interpolated
    table = sincos_table(grid, grid, embed_dim)
    sincos = pos.shape == table.shape and torch.allclose(pos, table, atol=5e-3)
    heads = max(1, embed_dim // 64)
    if embed_dim == 1280:                                           # ViT-H
        heads = 16
    if layout == 'moco_v3' and embed_dim == 384:
        heads = 12
    return dict(
        img_size=grid * patch_size,
        patch_size=patch_size,
        in_chans=in_chans,
        embed_dim=embed_dim,
        depth=sum(name.endswith('norm1.weight') for name in weights),
        num_heads=num_heads or heads,
        mlp_ratio=len(weights['blocks.0.mlp.fc1.bias']) / embed_dim,
        pos_embed='sincos' if sincos else 'learned',
    )


def self_check():
    torch.manual_seed(0)
    vit = ViT(img_size=32, patch_size=4, embed_dim=64, depth=2, num_heads=2)
    colours = torch.randn(4, 3, 4, 4)                      # one for each patch
    small = F.interpolate(colours, 16)
    large = F.interpolate(colours, 32)
    difference = vit(large, patch_size=8) - vit(small)
    error = difference.abs().max()
    print(f'a picture in flat patches of 8 px has the features of one in 4 px, to {error:.1e}')
    assert error < 1e-5
    print('vit.py: all claims hold')


if __name__ == '__main__':
    self_check()
