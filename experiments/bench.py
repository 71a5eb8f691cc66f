"""Speed tables: views, training steps, the encoder against timm, whole runs.

    python experiments/bench.py              # all, about 15 minutes on 2 cores
    python experiments/bench.py views step

What is compared runs in turns; whole runs are processes of their own. The
numbers are medians, the ratios those of medians.
"""
import argparse
import statistics
import subprocess
import time

import torch
import torchvision.transforms as T
from torchvision.transforms.functional import to_pil_image

from reproduce import logged_steps
import losses
from commandline import Parser, fail, pick_device
from compress import Compression
from train import build_optimizer, strategy_costs
from views import keyed_generator, make_views, normalize, recipe
from vit import ViT

MEAN = (0.5, 0.5, 0.5)
STD = (0.25, 0.25, 0.25)


def in_turns(functions, rounds):
    """{name: median seconds} after a round to warm up; on a GPU each call is waited for."""
    times = {name: [] for name in functions}
    for i in range(rounds + 1):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if i > 0:
                times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def torchvision_view(view, mean, std):
    """The transform of one PIL image that draws from the distribution of a View without blur."""
    interpolation = T.InterpolationMode(view.interpolation)
    steps = [
        T.RandomResizedCrop(view.side, view.scale, interpolation=interpolation),
        T.RandomHorizontalFlip(),
        T.RandomApply([T.ColorJitter(*view.jitter)], view.jitter_p),
        T.RandomGrayscale(view.gray_p),
        T.RandomSolarize(128, view.solarize_p),
        T.ToTensor(),
        T.Normalize(mean, std),
    ]
    return T.Compose(steps)


def views(device):
    """Both views of a batch of small images: make_views against torchvision, image by image."""
    print('\n| images | recipe | batched, images/s | torchvision, images/s | ratio |')
    print('|---|---|---|---|---|')
    # 30 MB, freed at once: from then on glibc keeps what is freed, as it does in training
    torch.ones(7_500_000)
    for side, channels in ((28, 1), (32, 3)):
        images = torch.randint(0, 256, (256, channels, side, side), dtype=torch.uint8)
        pil = [to_pil_image(image) for image in images[:64]]
        images = images.to(device)
        mean = MEAN[:channels]
        std = STD[:channels]
        for method in ('moco', 'simclr'):
            generator = keyed_generator(0, device=device)
            pair = recipe(method, side)
            transforms = [torchvision_view(view, mean, std) for view in pair]

            def batched():
                for _ in range(4):     # about as long as 64 images one by one
                    for view in make_views(images, pair, generator):
                        normalize(view, mean, std)

            def per_image():
                for transform in transforms:
                    torch.stack([transform(image) for image in pil])

            seconds = in_turns(dict(batched=batched, per_image=per_image), 9)
            ours = 4 * 256 / seconds['batched']
            theirs = 64 / seconds['per_image']
            colours = 'grey' if channels == 1 else 'colour'
            print(f'| {side} px, {colours} | {method} | {ours:,.0f} | {theirs:,.0f} | '
                  f'{ours / theirs:.1f} |', flush=True)


def step(device):
    """A whole MoCo-v3 step under each strategy: cost, seconds, and the share of the rest.

    The rest is what a step does besides the passes of encoder and heads: views, optimizer, teacher.
    """
    torch.manual_seed(0)
    encoder = ViT(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3)
    method = losses.MoCo(encoder, hidden=512).to(device)
    optimizer = build_optimizer(method, argparse.Namespace(method='moco'), device)
    images = torch.randint(0, 256, (128, 3, 32, 32), dtype=torch.uint8, device=device)
    pair = recipe('moco', 32)
    generator = keyed_generator(0, device=device)
    fixed = [torch.randn(128, 3, 32, 32, device=device) for _ in pair]
    names = ('p4', 'p4-drop0.50', 'p4-drop0.75', 'p8', 'p8-drop0.50', 'p16')
    base, *others = [Compression.parse(name) for name in names]

    def passes(made, tau):
        loss, _ = method(made, tau.patch_size, tau.drop_rate, generator)
        optimizer.zero_grad()
        loss.backward()

    def whole(tau):
        made = [normalize(view, MEAN, STD) for view in make_views(images, pair, generator)]
        passes(made, tau)
        optimizer.step()
        method.update_teacher(0.99)

    functions = {}
    for tau in (base, *others):
        functions['whole', tau] = lambda tau=tau: whole(tau)
        functions['passes', tau] = lambda tau=tau: passes(fixed, tau)
    seconds = in_turns(functions, 7)
    costs = strategy_costs(method, [base, *others], [32, 32], encoder.config)
    print('\nMoCo-v3, ViT of width 192, depth 6, 32 px, patch 4 (64 tokens), batch 128\n')
    print('| strategy | units/sample | relative | ms | relative | seconds / units | the rest |')
    print('|---|---|---|---|---|---|---|')
    for tau, units in costs.items():
        cost = units / costs[base]
        relative = seconds['whole', tau] / seconds['whole', base]
        rest = 1 - seconds['passes', tau] / seconds['whole', tau]
        print(f'| {tau} | {units:.3f} | {cost:.3f} | {1e3 * seconds["whole", tau]:.0f} | '
              f'{relative:.3f} | {relative / cost:.2f} | {100 * rest:.0f} % |', flush=True)


def encoder(device):
    """Forward and backward of the encoder against timm's ViT of the same size."""
    try:
        import timm
    except ImportError:
        print('\nencoder: timm is not installed (pip install -r tests/requirements.txt)')
        return
    small = dict(img_size=32, patch_size=4, embed_dim=192, depth=6, num_heads=3)
    large = dict(img_size=224, patch_size=16, embed_dim=192, depth=12, num_heads=3)
    print('\n| encoder | batch | ours, ms | timm, ms | ratio |')
    print('|---|---|---|---|---|')
    for batch, sizes in ((128, small), (16, large)):
        side = sizes['img_size']
        ours = ViT(**sizes).to(device)
        theirs = timm.models.VisionTransformer(num_classes=0, **sizes).to(device)
        images = torch.randn(batch, 3, side, side, device=device)

        def backward(model):
            model(images).square().mean().backward()

        seconds = in_turns(dict(ours=lambda: backward(ours), timm=lambda: backward(theirs)), 9)
        ratio = seconds['ours'] / seconds['timm']
        print(f'| {side} px, patch {sizes["patch_size"]}, width 192, depth {sizes["depth"]} | '
              f'{batch} | {1e3 * seconds["ours"]:.0f} | {1e3 * seconds["timm"]:.0f} | '
              f'{ratio:.2f} |', flush=True)


def runs(device):
    """Whole runs of train.py with its default network: how long a unit takes under a schedule.

    The first steps, which are slow, count.
    """
    pairs = [('moco', 'none'), ('moco', 'p8'), ('moco', 'p8-drop0.50'),
             ('simclr', 'none'), ('simclr', 'p8-drop0.50'),
             ('dino', 'none'), ('dino', 'p8-drop0.50')]
    times = {pair: [] for pair in pairs}
    for _ in range(3):
        for method, schedule in pairs:
            flags = ['--method', method, '--schedule', schedule, '--budget', '0.02',
                     '--device', device.type]
            last = logged_steps(flags, stdout=subprocess.DEVNULL)[-1]
            times[method, schedule].append(1e3 * last['seconds'] / last['units'])
    print('\n| method | schedule | ms / unit, three runs | median | relative |')
    print('|---|---|---|---|---|')
    for (method, schedule), values in times.items():
        median = statistics.median(values)
        relative = median / statistics.median(times[method, 'none'])
        listed = ', '.join(f'{value:.3f}' for value in values)
        print(f'| {method} | {schedule} | {listed} | {median:.3f} | {relative:.2f} |', flush=True)


def main(argv=None):
    all_tables = dict(views=views, step=step, encoder=encoder, runs=runs)
    parser = Parser(__doc__)
    parser.add_argument('tables', nargs='*', metavar='TABLE', help='views, step, encoder, runs')
    parser.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda', 'mps'))
    args = parser.parse_args(argv)
    unknown = [name for name in args.tables if name not in all_tables]
    if unknown:
        parser.error(f'no table {", ".join(unknown)}; choose from {", ".join(all_tables)}')
    try:
        device = pick_device(args.device)
    except ValueError as error:
        fail(f'bench.py: error: {error}')
    print(f'torch {torch.__version__}, {device}, {torch.get_num_threads()} threads')
    try:
        for name in args.tables or all_tables:
            all_tables[name](device)
    except subprocess.CalledProcessError as error:
        fail(f'bench.py: error: {error}')


if __name__ == '__main__':
    main()
