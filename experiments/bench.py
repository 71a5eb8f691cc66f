"""Speed tables: CPU time, one thread, what is compared in turns in one process, medians.

    python experiments/bench.py step                      # a training step, beside lightly's
    python experiments/bench.py loader --image photo.jpg  # views of photos; cores for one GPU
    python experiments/bench.py lightly                   # with_lightly.py with and without

--rounds 1 --batch-size 8 is a quick look.
"""
import argparse
import statistics
import tempfile
import time
from itertools import product

import torch
from lightly.transforms import BYOLTransform, MoCoV2Transform
from lightly.transforms.byol_transform import BYOLView1Transform, BYOLView2Transform
from PIL import Image
from torchvision.transforms.functional import to_pil_image

import with_lightly
from pictures import units
from compress import Compression, pass_flops, patches_per_side
from images.data import read_crops
from images.views import make_view, make_views, recipe
from losses import MoCo
from vit import ViT

GPU = 400e12                            # FLOP/s that a large GPU may reach in training: assumed


def in_turns(functions, rounds):
    """{name: median CPU milliseconds} after a round to warm up."""
    times = {name: [] for name in functions}
    for _ in range(rounds + 1):
        for name, function in functions.items():
            start = time.process_time()
            function()
            times[name].append(1e3 * (time.process_time() - start))
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def row(*cells):
    print('|', ' | '.join(f'{cell:,.3g}' if isinstance(cell, float) else str(cell)
                          for cell in cells), '|', flush=True)


def kinds_of(side, base, tau, views):
    """The Augmentations of MoCo-v3 for a strategy, rendered full or small."""
    patches = (tau.patch_size, base) if views == 'small' else (1, 1)
    rendered = patches_per_side(side, tau.patch_size) * tau.patch_size
    return [kind.at(rendered, patches) for kind in recipe('moco', side)]


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
    print('| width | strategy | views | ms | ms a unit, relative | times faster than lightly |\n'
          '|---|---|---|---|---|---|')
    for width, depth in ((64, 4), (192, 6)):
        method = MoCo(ViT(32, 4, 3, width, depth, max(2, width // 64)), hidden=512)
        usual = with_lightly.MoCo(True, 32, 4, width, depth)

        def loss_of(tau, views):
            method.update_teacher(0.99)
            made = make_views(images, kinds_of(32, 4, tau, views))
            return method(made, tau.patch_size if views == 'full' else 4, tau.drop_rate)[0]

        ours = trainer(method, loss_of)
        theirs = trainer(usual, lambda: usual(*map(torch.stack, zip(*map(transform, photos)))))
        base = Compression(4), 'full'
        cases = [base, *product((Compression(8), Compression(8, 0.5)), ('full', 'small'))]
        ms = in_turns({case: lambda case=case: ours(*case) for case in cases}
                      | {theirs: theirs}, args.rounds)
        row(width, 'lightly and timm', '', ms[theirs], '', 1)
        for case in cases:
            share = units(case[0], 32, 4, width, depth) / units(base[0], 32, 4, width, depth)
            row(width, *case, ms[case], ms[case] / ms[base] / share, ms[theirs] / ms[case])


def loader(args):
    """Both views of JPEGs at 224 px: in a worker and on the device, and cores that feed one GPU."""
    print('| JPEG | strategy | views | worker, ms an image | device, ms | times faster than '
          "torchvision's transforms | images/s of ViT-B on one GPU (computed) | cores that feed it "
          '(computed) | of torchvision |\n|---|---|---|---|---|---|---|---|---|')
    usual = BYOLTransform(BYOLView1Transform(224), BYOLView2Transform(224))
    smooth = to_pil_image(torch.rand(3, 24, 32))
    photo = Image.open(args.image).convert('RGB') if args.image else smooth
    n = range(args.batch_size)
    for size in ((500, 375), (2000, 1500)):
        file = tempfile.NamedTemporaryFile(suffix='.jpg')
        photo.resize(size, Image.Resampling.BICUBIC).save(file.name, quality=90)
        functions = {'usual': lambda: [usual(Image.open(file.name).convert('RGB')) for _ in n]}
        cases = [(Compression(16), 'full'), *product(
            (Compression(p, 0.5) for p in (24, 30, 48)), ('full', 'small'))]
        for case in cases:
            def worker(kinds=kinds_of(224, 16, *case)):
                return [read_crops(file.name, epoch, kinds, 0) for epoch in n]

            def device(kinds=kinds_of(224, 16, *case), crops=list(zip(*worker()))):
                return [make_view(torch.stack(view), kind, cropped=True)
                        for view, kind in zip(crops, kinds)]

            functions |= {(case, 'worker'): worker, (case, 'device'): device}
        ms = {name: value / len(n) for name, value in in_turns(functions, args.rounds).items()}
        for case in cases:
            rate = GPU / units(case[0]) / pass_flops(196, 768, 768, 12)
            worker, device = ms[case, 'worker'], ms[case, 'device']
            row('{} x {}'.format(*size), *case, worker, device, ms['usual'] / (worker + device),
                rate, rate * worker / 1e3, rate * ms['usual'] / 1e3)


def lightly(args):
    """The step of with_lightly.py on views that are there: without and with its marked lines."""
    views = torch.randn(2, args.batch_size, 3, 64, 64)
    models = {'usual': with_lightly.MoCo(True), 'marked lines': with_lightly.MoCo(),
              "timm's patch_drop_rate": with_lightly.MoCo(True, patch_drop_rate=0.5)}
    steps = {name: trainer(model, lambda model=model: model(*views))
             for name, model in models.items()}
    ms = in_turns(steps, args.rounds)
    print('| step | ms | times faster |\n|---|---|---|')
    for name in ms:
        row(name, ms[name], ms['usual'] / ms[name])


def main(argv=None):
    tables = dict(step=step, loader=loader, lightly=lightly)
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('table', choices=tables)
    parser.add_argument('--rounds', type=int, default=7, help='after one to warm up')
    parser.add_argument('--batch-size', type=int, default=128)
    parser.add_argument('--image', help='a large photo for loader (default: a smooth picture)')
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    print(f'torch {torch.__version__}, CPU time of one thread, batches of {args.batch_size}\n')
    tables[args.table](args)


if __name__ == '__main__':
    main()
