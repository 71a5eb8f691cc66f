"""Everything that draws: each picture is a command that writes one PNG.

    python experiments/pictures.py compression photo.jpg             # what the network sees
    python experiments/pictures.py curves runs/A runs/B              # runs over each other
    python experiments/pictures.py neighbours runs/A                 # before and after training
    python experiments/pictures.py gradstats runs/A/gradstats.jsonl  # bias, variance, CA-MSE
    python experiments/pictures.py headline                          # accuracy over budget

Where no run is named, the newest are taken. A strategy has one colour in all pictures. They are 8
inches wide, to be shown at 800 pixels.

Shapes: n queries, m images of the bank, k neighbours, c channels, d width, h w image or grid.
"""
import argparse
import os
import statistics
import sys
from pathlib import Path

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from reproduce import RESULTS, ROOT, TITLES, load_results, read_log, select, sides
from reproduce import speed_up_text, speed_ups

sys.path.insert(0, str(ROOT))
from compress import Compression, num_keep, pass_flops, patches_per_side, random_keep  # noqa: E402
from images.data import load  # noqa: E402
from images.views import keyed_generator, normalize, resize, separable, shrink  # noqa: E402
from schedule import ca_mse, load_table  # noqa: E402
from vit import ViT, load_backbone  # noqa: E402

# Okabe and Ito's colours, for colour-blind readers; uncompressed is p4 at 32 px
COLORS = {
    'none': '#0072B2', 'p4': '#0072B2', 'p8': '#009E73', 'p8-drop0.50': '#D55E00',
    'p4-drop0.50': '#56B4E9', 'p16': '#E69F00', 'p16-drop0.50': '#000000',
}
OTHER = '#CC79A7'
MARKERS = 'os^Dv*XP'
matplotlib.rcParams.update({
    'font.size': 9, 'axes.titlesize': 9, 'axes.titleweight': 'bold', 'axes.spines.top': False,
    'axes.spines.right': False, 'axes.grid': True, 'grid.color': '0.92', 'lines.markersize': 4,
    'legend.frameon': False, 'savefig.dpi': 150, 'figure.constrained_layout.use': True,
})


def show(axis, image, **options):
    """Draw an image (c h w), grey or RGB, without ticks and frame."""
    axis.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), **options)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def legend(figure, columns):
    """That of the first axes, for all of them."""
    lines = figure.axes[0].get_legend_handles_labels()
    figure.legend(*lines, loc='outside lower center', ncols=columns)


# ---------------------------------------------------------------- compression

def seen(photo, tau, side=224, base=16):
    """What the tokens of a strategy hold of a photo (1 c h w): (c 16*h 16*w), dropped ones white.

    Of a patch of q x q pixels that is its least-squares picture of 16 x 16 (compress.py).
    """
    h = patches_per_side(side, tau.patch_size)
    rows = shrink(torch.eye(h * tau.patch_size)[None], (tau.patch_size, base))
    image = separable(resize(photo, h * tau.patch_size), rows, rows)[0].clamp(0, 1)
    kept = torch.zeros(h * h)
    kept[random_keep(1, h * h, tau.drop_rate, keyed_generator('picture', str(tau)))] = 1
    mask = torch.kron(kept.view(h, h), torch.ones(base, base))
    return torch.where(mask > 0, image, 1.0)


def units(tau, side=224, base=16, width=768, depth=12, heads=((), ())):  # noqa: PLR0913
    """Of a training sample of MoCo-v3: query forward and backward, key forward, and their heads."""
    sizes = 3 * base ** 2, width, depth
    n = patches_per_side(side, tau.patch_size) ** 2
    query = pass_flops(num_keep(n, tau.drop_rate), *sizes, head=heads[0], trains=True)
    key = pass_flops(n, *sizes, head=heads[1])
    return (query + key) / pass_flops((side // base) ** 2, *sizes)


def compression(image=RESULTS.with_name('cat.jpg')):
    """An image as the network sees it: with tokens dropped, in larger patches."""
    photo = pil_to_tensor(ImageOps.fit(Image.open(image).convert('RGB'), (448, 448)))[None]
    figure = Figure((8, 5.3))
    axes = figure.subplots(2, 4)
    # p16-drop0.75 and p30 leave the same number of tokens, as in the paper's table 3
    names = 'p16 p16-drop0.50 p16-drop0.75 p16-drop0.90 p24 p30 p40 p48'
    for axis, tau in zip(axes.flat, map(Compression.parse, names.split())):
        h = patches_per_side(224, tau.patch_size)
        show(axis, seen(photo, tau), extent=(0, h, h, 0))
        axis.hlines(range(1, h), 0, h, 'white', linewidth=0.6)
        axis.vlines(range(1, h), 0, h, 'white', linewidth=0.6)
        tokens = 1 + num_keep(h * h, tau.drop_rate)          # the paper counts the class token
        axis.set_xlabel(f'{tau}\n{tokens} tokens, {units(tau):.2f} units')
    axes[0, 0].set_ylabel('token dropout:\na random part of the patches')
    axes[1, 0].set_ylabel('patch scaling: larger patches,\neach read as 16 x 16 pixels')
    figure.supxlabel('units of compute of a training sample: MoCo-v3, ViT-B at 224 px', fontsize=8)
    return figure


# ---------------------------------------------------------------- curves

def newest(count):
    """The newest runs below runs/, the oldest of them first."""
    logs = sorted(Path('runs').glob('*/log.jsonl'), key=os.path.getmtime)
    return [path.parent for path in logs[-count:]]


def curves(*runs):
    """20-NN of runs over seconds and over units; how much sooner the better of two is as good."""
    runs = runs or newest(2)
    figure = Figure((8, 3.4))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, clock in zip(axes, ('seconds', 'units')):
        lines = []
        for run, marker in zip(runs, MARKERS):
            steps, scores = read_log(Path(run))
            label = ', then '.join(dict.fromkeys(step['strategy'] for step in steps))
            x = [score[clock] for score in scores]
            y = [score['knn'] for score in scores]
            lines.append((x, y))
            axis.plot(
                x,
                y,
                marker=marker,
                color=COLORS.get(label, OTHER),
                label=f'{Path(run).name}: {label}')
        target = min(y[-1] for _, y in lines[:2])
        ends = sorted(np.interp(target, np.maximum.accumulate(y), x) for x, y in lines[:2])
        axis.annotate('', (ends[0], target), (ends[-1], target),
                      arrowprops=dict(arrowstyle='-|>', color='0.2', shrinkA=2, shrinkB=0))
        axis.set_title(f'{ends[-1] / ends[0]:.1f} times fewer {clock}')
        axis.set_xlabel(clock)
        axis.locator_params(axis='x', nbins=4)
    axes[0].set_ylabel('20-NN accuracy, %')
    legend(figure, columns=2)
    return figure


# ---------------------------------------------------------------- neighbours

def draw_neighbours(axes, queries, bank, title):
    """The nearest images of the bank, a row for each query. A frame marks another class.

    queries: (features (n d), labels (n)); bank: the same of m images, and pictures (m c h w).
    """
    features, labels, pictures = bank
    cosines = F.normalize(queries[0], dim=1) @ F.normalize(features, dim=1).T      # n m
    nearest = cosines.topk(axes.shape[1], dim=1).indices                           # n k
    same = labels[nearest] == queries[1][:, None]
    for axis, i, match in zip(axes.flat, nearest.flatten(), same.flatten()):
        show(axis, pictures[i])
        axis.spines[:].set(visible=not match, color=COLORS['p8-drop0.50'], linewidth=2.5)
    axes[0, 2].set_title(f'{title}: {same.sum()} of {same.numel()} of the same class')


@torch.no_grad()
def neighbours(run=None, data_root='data'):
    """Test images and their neighbours, under a random and under the trained network."""
    trained, info = load_backbone(Path(run or newest(1)[0]) / 'backbone.pt')
    torch.manual_seed(0)                # the same random network each time
    random = ViT(**trained.config)
    data = load(info['dataset'], data_root)
    shown = []                          # (pictures in parts, labels) of the queries and the bank
    for split, count in (('test', 8), ('train', 5_000)):
        parts, ids = zip(*data.scored(split, data.labelled_ids(split, count),
                                       random.config['img_size']))
        shown.append((parts, data.labels[split][torch.cat(ids)]))
    (pictures,), bank = shown[0][0], torch.cat(shown[1][0])
    figure = Figure((8, 6.2))
    for part, encoder in zip(figure.subfigures(1, 2), (random, trained)):
        axes = part.subplots(8, 6)
        for axis, picture in zip(axes[:, 0], pictures):
            show(axis, picture)
        queries, found = [
            (torch.cat([encoder(normalize(part, info['mean'], info['std'])) for part in parts]),
             labels)
            for parts, labels in shown]
        title = 'trained' if encoder is trained else 'random'
        draw_neighbours(axes[:, 1:], queries, (*found, bank), title)
    figure.supxlabel('on the left test images; framed: a neighbour of another class', fontsize=8)
    return figure


# ---------------------------------------------------------------- gradstats

def gradstats(file):
    """Squared bias, cost-adjusted variance and their sum, CA-MSE, over progress."""
    rows = sorted(load_table(file), key=lambda row: row['progress'])
    costs = {row['strategy']: row['cost'] for row in rows}
    figure = Figure((8, 3.3))
    axes = figure.subplots(1, 3, sharey=True)
    for name, marker in zip(sorted(costs, key=costs.get, reverse=True), MARKERS):
        mine = [row for row in rows if row['strategy'] == name]
        unbiased = [dict(row, bias2=0.0, bias2_sem=0.0) for row in mine]
        exact = [dict(row, variance=0.0, variance_sem=0.0) for row in mine]
        for axis, errors in zip(axes, (exact, unbiased, mine)):
            axis.errorbar(
                [row['progress'] for row in mine],
                *zip(*map(ca_mse, errors)),
                marker=marker,
                color=COLORS.get(name, OTHER),
                label=f'{name} (cost {costs[name]:.2f})')
    for axis, title in zip(axes, ('squared bias', 'cost-adjusted variance', 'CA-MSE')):
        axis.set(title=title, xlabel='progress')
        axis.set_yscale('log', nonpositive='mask')           # an estimate of no bias
    axes[0].set_ylabel(f'{rows[0]["metric"]} metric, relative to\nthe squared true gradient')
    legend(figure, columns=3)
    return figure


# ---------------------------------------------------------------- headline

def headline():
    """20-NN accuracy over budget on three data sets, mean and deviation over seeds."""
    records = load_results()
    figure = Figure((8, 3.5))
    axes = figure.subplots(1, len(TITLES))
    for axis, (dataset, title) in zip(axes, TITLES.items()):
        base, fast = sides(records, dataset)
        _, dropped = sides(records, dataset, 'p8-drop0.50')
        default = select(records, dataset, 'moco', 'none')
        for runs, label, strategy, marker in (
            (default, 'uncompressed', 'none', 'o-'),
            (base, 'uncompressed, best recipe', 'none', '*'),
            (fast, 'p8', 'p8', 's-'),
            (dropped, 'p8-drop0.50', 'p8-drop0.50', '^-'),
        ):
            scores = [[run['knn'] for run in by_seed.values()] for by_seed in runs.values()]
            axis.errorbar(
                list(runs),
                list(map(statistics.mean, scores)),
                [statistics.stdev(score) if len(score) > 1 else 0 for score in scores],
                fmt=marker,
                markersize=9 if marker == '*' else 4,
                color=COLORS[strategy],
                label=label)
        factor = speed_up_text(speed_ups(base, fast, 0.32))
        axis.set(
            title=f'{title}\np8: {factor} times fewer',
            xlabel='million units',
            xscale='log')
        axis.set_xticks(list(default), list(default))
        axis.minorticks_off()
    axes[0].set_ylabel('20-NN accuracy, %')
    legend(figure, columns=4)
    return figure


def main(argv=None):
    pictures = dict(
        compression=compression,
        curves=curves,
        neighbours=neighbours,
        gradstats=gradstats,
        headline=headline)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('picture', choices=pictures)
    parser.add_argument('paths', nargs='*', help='as above; of neighbours also the data root')
    parser.add_argument('-o', '--output', help='the PNG')
    args = parser.parse_args(argv)
    try:
        figure = pictures[args.picture](*args.paths)
    except (TypeError, ValueError, OSError) as error:
        sys.exit(f'pictures.py: error: {error}')
    figure.savefig(args.output or f'{args.picture}.png')


if __name__ == '__main__':
    main()
