"""Speed tables: views, the loop around the encoder, compressed steps against their cost, the encoder against timm.

    python experiments/bench.py                       # all tables, about 6 minutes on 2 cores
    python experiments/bench.py views step

Whatever is compared runs in turns in one process; the figures are medians, the ratios are ratios of medians.
"""
import argparse
import statistics
import sys
import time
from pathlib import Path

import torch
import torchvision.transforms as T
from torchvision.transforms.functional import to_pil_image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import data  # noqa: E402
import losses  # noqa: E402
from compress import Compression, sample_cost  # noqa: E402
from train import build_optimizer  # noqa: E402
from vit import ViT  # noqa: E402

MEAN, STD = (0.5,) * 3, (0.25,) * 3


def in_turns(functions, rounds):
    """{name: median seconds} after one warm-up round; on a GPU each call is waited for."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def views(device):
    """Both views of a batch of small images: data.make_views against torchvision.transforms, image by image."""
    print('\n| images | recipe | batched, images/s | torchvision per image, images/s | ratio |\n|---|---|---|---|---|')
    torch.ones(7_500_000)  # 30 MB, freed at once: from here on glibc keeps what is freed, as it does from the first training step on
    for side, channels in ((28, 1), (28, 3), (32, 3), (40, 3)):
        images = torch.randint(0, 256, (256, channels, side, side), dtype=torch.uint8)
        pil = [to_pil_image(image) for image in images[:64]]
        mean, std = MEAN[:channels], STD[:channels]
        for name in ('moco', 'simclr'):
            recipe = data.recipe(name, small=True)
            generator = data.keyed_generator(0, device=device)
            on_device = images.to(device)

            def torchvision_view(view):
                jitter = T.ColorJitter(*view.jitter)
                steps = [T.RandomResizedCrop(side, view.scale, interpolation=T.InterpolationMode(view.interpolation)),
                         T.RandomApply([jitter], view.jitter_p), T.RandomGrayscale(view.gray_p)]
                if view.solarize_p:
                    steps.append(T.RandomSolarize(128, view.solarize_p))
                return T.Compose([*steps, T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(mean, std)])
            transforms = [torchvision_view(view) for view in recipe]

            def batched():  # four times 256 images, about as long as 64 one by one
                for _ in range(4):
                    made = [data.normalize(view, mean, std) for view in data.make_views(on_device, recipe, [side] * 2, generator)]
                return made

            def per_image():
                return [torch.stack([transform(image) for image in pil]) for transform in transforms]
            seconds = in_turns({'batched': batched, 'per image': per_image}, 9)
            ours, theirs = 4 * 256 / seconds['batched'], 64 / seconds['per image']
            print(f'| {side} px{", grey" if channels == 1 else ""} | {name} | {ours:,.0f} | {theirs:,.0f} | {ours / theirs:.1f} |', flush=True)


def step(device):
    """A whole MoCo-v3 training step under each strategy, in turns: cost, wall clock, share outside encoder and heads."""
    torch.manual_seed(0)
    encoder = ViT(img_size=36, patch_size=4, embed_dim=192, depth=6, num_heads=3)
    method = losses.MoCo(encoder, hidden=512).to(device)
    optimizer = build_optimizer(method, argparse.Namespace(method='moco'), torch.device(device))
    images = torch.randint(0, 256, (128, 3, 36, 36), dtype=torch.uint8, device=device)
    recipe, generator = data.recipe('moco', small=True), data.keyed_generator(0, device=device)
    fixed = [torch.randn(128, 3, 36, 36, device=device) for _ in range(2)]
    base = Compression(4)
    strategies = [base, *map(Compression.parse, ('p4-drop0.50', 'p4-drop0.75', 'p6', 'p6-drop0.50', 'p9', 'p9-drop0.50', 'p12'))]

    def network(compression):
        optimizer.zero_grad(set_to_none=True)
        method(fixed, compression.patch_size, compression.drop_rate, generator)[0].backward()

    def whole(compression):
        made = [data.normalize(view, MEAN, STD) for view in data.make_views(images, recipe, [36, 36], generator)]
        loss, metrics = method(made, compression.patch_size, compression.drop_rate, generator)
        loss.item()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        method.update_teacher(0.99)

    functions = {}
    for compression in strategies:
        functions['whole', compression] = lambda c=compression: whole(c)
        functions['network', compression] = lambda c=compression: network(c)
    seconds = in_turns(functions, 7)
    print('\nMoCo-v3, ViT of width 192, depth 6, 36 px, patch 4 (81 tokens), batch 128\n')
    print('| strategy | sample_cost | step, ms | relative | relative / sample_cost | outside encoder and heads |\n|---|---|---|---|---|---|')
    for compression in strategies:
        cost = sample_cost('moco', encoder.sizes, compression, base, **method.cost_settings)
        time_whole, time_network = seconds['whole', compression], seconds['network', compression]
        relative = time_whole / seconds['whole', base]
        print(f'| {compression} | {cost:.3f} | {1e3 * time_whole:.0f} | {relative:.3f} | {relative / cost:.2f} | '
              f'{100 * (1 - time_network / time_whole):.0f} % |', flush=True)


def encoder(device):
    """Forward and backward of the encoder against timm's ViT of the same size."""
    try:
        import timm
    except ImportError:
        return print('\nencoder: timm is not installed (pip install -r tests/requirements.txt)')
    print('\n| encoder | batch | ours, ms | timm, ms | ratio |\n|---|---|---|---|---|')
    for batch, sizes in ((128, dict(img_size=36, patch_size=4, embed_dim=192, depth=6, num_heads=3)),
                         (16, dict(img_size=240, patch_size=16, embed_dim=192, depth=12, num_heads=3))):
        ours, theirs = ViT(**sizes).to(device), timm.models.VisionTransformer(num_classes=0, **sizes).to(device)
        images = torch.randn(batch, 3, sizes['img_size'], sizes['img_size'], device=device)
        seconds = in_turns({name: (lambda m=model: m(images).square().mean().backward())
                            for name, model in (('ours', ours), ('timm', theirs))}, 9)
        print(f'| {sizes["img_size"]} px, patch {sizes["patch_size"]}, width {sizes["embed_dim"]}, depth {sizes["depth"]} | {batch} | '
              f'{1e3 * seconds["ours"]:.0f} | {1e3 * seconds["timm"]:.0f} | {seconds["ours"] / seconds["timm"]:.2f} |', flush=True)


if __name__ == '__main__':
    tables = dict(views=views, step=step, encoder=encoder)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('tables', nargs='*', default=list(tables), help='views, step, encoder')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args()
    unknown = set(args.tables) - set(tables)
    if unknown:
        parser.error(f'unknown table {", ".join(unknown)}; choose from {", ".join(tables)}')
    print(f'torch {torch.__version__}, {args.device}, {torch.get_num_threads()} threads')
    for name in args.tables:
        tables[name](args.device)
