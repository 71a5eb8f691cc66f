"""Speed tables: median CPU time of one thread; what is compared takes turns in one process.

    python experiments/bench.py step                      # a training step, beside lightly's
    python experiments/bench.py loader --image photo.jpg  # views of photos; cores for one GPU
    python experiments/bench.py lightly                   # with_lightly.py with and without

--rounds 1 --batch-size 8 is a quick look.
"""
import argparse
import tempfile
import time
from functools import partial
from statistics import median

import torch
from lightly.transforms import BYOLTransform, MoCoV2Transform
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import with_lightly
from pictures import RESULTS, units
from compress import Compression, pass_flops, patches_per_side, sample_cost
from images.data import read_crops
from images.views import make_view, make_views, recipe
from losses import MoCo
from vit import ViT

GPU = 400e12                            # FLOP/s that a large GPU may reach in training: assumed
SMALL = 'p4 full', 'p8 full', 'p8 small', 'p8-drop0.50 full', 'p8-drop0.50 small'
LARGE = ('p16 full', 'p24-drop0.50 full', 'p24-drop0.50 small', 'p30-drop0.50 full',
         'p30-drop0.50 small', 'p48-drop0.50 full', 'p48-drop0.50 small')


def in_turns(functions, rounds):
    """{name: median CPU milliseconds} after a round to warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: median(values[1:]) for name, values in times.items()}


def strategy_of(case):
    return Compression.parse(case.split()[0])


def kinds_of(side, base, case):
    """The Augmentations of MoCo-v3 for a strategy, rendered full or small."""
    q = strategy_of(case).patch_size
    patches = (q, base) if 'small' in case else (1, 1)
    return [kind.at(patches_per_side(side, q) * q, patches) for kind in recipe('moco', side)]


def trainer(model, loss_of):
    """A function that takes a step of training."""
    optimizer = torch.optim.AdamW(model.parameters(), fused=True)

    def step(*args):
        loss = loss_of(*args)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return step


def step(args):
    """A MoCo-v3 step at 32 px with its views, and that of lightly and timm at the same sizes."""
    images = torch.randint(0, 256, (args.batch_size, 3, 32, 32), dtype=torch.uint8)
    photos = list(map(to_pil_image, images))
    transform = MoCoV2Transform(32, gaussian_blur=0.0)
    print('| width | strategy, views | ms | ms a unit, relative | times faster than lightly |\n'
          '|---|---|---|---|---|')
    for width, depth in ((64, 4), (192, 6)):
        method = MoCo(ViT(32, 4, 3, width, depth, max(2, width // 64)), hidden=512)
        usual = with_lightly.MoCo(True, 32, 4, width, depth)

        def loss_of(case):
            method.update_teacher(0.99)
            views = make_views(images, kinds_of(32, 4, case))
            tau = strategy_of(case)
            return method(views, 4 if 'small' in case else tau.patch_size, tau.drop_rate)[0]

        def usual_loss():
            return usual(*map(torch.stack, zip(*map(transform, photos))))

        ours = trainer(method, loss_of)
        functions = {case: partial(ours, case) for case in SMALL}
        functions['usual'] = trainer(usual, usual_loss)
        ms = in_turns(functions, args.rounds)
        costs = {case: sample_cost(method, kinds_of(32, 4, case), strategy_of(case))
                 for case in SMALL}
        for case in SMALL:
            unit = ms[case] / ms['p4 full'] * costs['p4 full'] / costs[case]
            faster = ms['usual'] / ms[case]
            print(f'| {width} | {case} | {ms[case]:.1f} | {unit:.2f} | {faster:.2f} |')


def cut(path, kinds, n):
    """What a worker does for a batch: a list of crops for each view."""
    return list(zip(*(read_crops(path, epoch, kinds, 0) for epoch in range(n))))


def finish(crops, kinds):
    """What the device does with it."""
    for view, kind in zip(crops, kinds):
        make_view(torch.stack(view), kind, cropped=True)


def loader(args):
    """Both views of JPEGs at 224 px: in a worker and on the device, and cores that feed one GPU."""
    n = args.batch_size
    transform = BYOLTransform(BYOLView1Transform(224), BYOLView2Transform(224))
    photo = Image.open(args.image)
    print('| JPEG | strategy, views | worker, ms an image | device, ms | times faster than '
          "torchvision's transforms | images/s of ViT-B on one GPU (computed) | cores that feed it "
          '(computed) | with torchvision |\n|---|---|---|---|---|---|---|---|')
    for w, h in ((500, 375), (2000, 1500)):
        file = tempfile.NamedTemporaryFile(suffix='.jpg')
        photo.resize((w, h)).save(file.name, quality=90)

        def usual():
            for _ in range(n):
                transform(Image.open(file.name))

        functions = dict(usual=usual)
        for case in LARGE:
            kinds = kinds_of(224, 16, case)
            crops = cut(file.name, kinds, n)
            functions[case, 'worker'] = partial(cut, file.name, kinds, n)
            functions[case, 'device'] = partial(finish, crops, kinds)
        ms = {name: ms / n for name, ms in in_turns(functions, args.rounds).items()}
        for case in LARGE:
            worker, device = ms[case, 'worker'], ms[case, 'device']
            faster = ms['usual'] / (worker + device)
            rate = GPU / units(strategy_of(case)) / pass_flops(196, 768, 768, 12)
            cores = rate * worker / 1e3
            usual_cores = rate * ms['usual'] / 1e3
            print(f'| {w} x {h} | {case} | {worker:.2f} | {device:.2f} | {faster:.2f} | '
                  f'{rate:,.0f} | {cores:.1f} | {usual_cores:.1f} |')


def lightly(args):
    """The step of with_lightly.py on views that are there: without and with its marked lines."""
    views = torch.randn(2, args.batch_size, 3, 64, 64)
    models = {
        'usual': with_lightly.MoCo(True),
        'marked lines': with_lightly.MoCo(),
        "timm's patch_drop_rate": with_lightly.MoCo(True, patch_drop_rate=0.5),
    }
    steps = {name: partial(trainer(model, model), *views) for name, model in models.items()}
    ms = in_turns(steps, args.rounds)
    print('| step | ms | times faster |\n|---|---|---|')
    for name in ms:
        print(f'| {name} | {ms[name]:.1f} | {ms["usual"] / ms[name]:.2f} |')


def main(argv=None):
    tables = dict(step=step, loader=loader, lightly=lightly)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', choices=tables)
    parser.add_argument('--rounds', type=int, default=7, help='after one to warm up')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--image', default=RESULTS.with_name('cat.jpg'), help='of loader')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f'torch {torch.__version__}, CPU time of one thread, batches of {args.batch_size}\n')
    tables[args.table](args)


if __name__ == '__main__':
    main()
