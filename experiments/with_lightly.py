"""lightly's usual MoCo loop on a timm ViT, and the lines that make its steps several times cheaper.

    python experiments/with_lightly.py              # a minute of training, then 20-NN
    python experiments/with_lightly.py --plain      # as much time without the lines
"""
import copy
import sys
import time
from pathlib import Path

import timm
import torch
from lightly.loss import NTXentLoss
from lightly.models.modules import MoCoProjectionHead
from lightly.models.utils import update_momentum
from lightly.transforms import MoCoV2Transform
from lightly.utils.benchmarking import knn_predict
from torch.nn.functional import normalize
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from images.shapes import SHAPES, render_shapes  # noqa: E402
from vit import forward_features  # noqa: E402                                      # cheaper


class MoCo(torch.nn.Module):
    def __init__(self, plain=False, side=64, patch_size=8, width=192, depth=6, **options):
        super().__init__()
        self.plain = plain
        self.vit = timm.models.VisionTransformer(
            side, patch_size, num_classes=0, embed_dim=width, depth=depth,
            num_heads=max(2, width // 64), **options)
        self.head = MoCoProjectionHead(width, 512, 128)
        self.key_vit = copy.deepcopy(self.vit).requires_grad_(False)
        self.key_head = copy.deepcopy(self.head).requires_grad_(False)
        self.loss = NTXentLoss(temperature=0.2)

    def forward(self, x_query, x_key):
        update_momentum(self.vit, self.key_vit, 0.9)      # the run is short
        update_momentum(self.head, self.key_head, 0.9)
        if self.plain:
            query, key = self.vit(x_query), self.key_vit(x_key)
        else:
            # a quarter of the patches, and in the query half of them: 9 tokens, not 65
            query = forward_features(self.vit, x_query, 16, drop_rate=0.5)[:, 0]    # cheaper
            key = forward_features(self.key_vit, x_key, 16)[:, 0]                   # cheaper
        return self.loss(self.head(query), self.key_head(key))


def main(plain):
    torch.manual_seed(0)
    images, labels = render_shapes(2_400, seed=0, side=64)
    transform, model = MoCoV2Transform(64, gaussian_blur=0.0), MoCo(plain)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-4)             # at 1e-3 it collapses
    end = time.time() + 60
    while time.time() < end:
        photos = map(to_pil_image, images[torch.randint(2_000, (128,))])
        views = zip(*map(transform, photos))
        loss = model(*map(torch.stack, views))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():                            # the last 400 images are held out
        # about what the transform normalizes to
        features = normalize(model.vit.eval()(images / 57 - 2))
    bank, queries = features.split(2_000)
    known, asked = labels.split(2_000)
    nearest = knn_predict(queries, bank.T, known, len(SHAPES), 20, 0.07)[:, 0]
    print(f'loss {loss:.3f}, 20-NN {100 * (nearest == asked).float().mean():.1f} %')


if __name__ == '__main__':
    main(plain='--plain' in sys.argv)
