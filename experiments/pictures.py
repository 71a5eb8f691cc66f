"""Everything that draws: each picture is a command that writes one PNG.

    python experiments/pictures.py compression photo.jpg             # what the network sees
    python experiments/pictures.py curves runs/A runs/B              # runs over each other
    python experiments/pictures.py neighbours runs/A                 # before and after training
    python experiments/pictures.py gradstats runs/A/gradstats.jsonl  # bias, variance, CA-MSE
    python experiments/pictures.py headline                          # accuracy over budget

A strategy has one colour in all pictures. They are 8 inches wide, to be shown at 800 pixels.

Shapes: n queries, m images of the bank, k neighbours, c channels, d width, h w image or grid.
"""
import argparse
import sys
from pathlib import Path
from statistics import mean, stdev

import matplotlib.style
import numpy as np
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from reproduce import RESULTS, ROOT, TITLES, hindsight, read, read_log, speed_up, tuned

sys.path.insert(0, str(ROOT))
from compress import Compression, num_keep, patches_per_side, random_keep, sample_cost  # noqa: E402
from images.data import load  # noqa: E402
from images.views import keyed_generator, normalize, recipe, resize, separable, shrink  # noqa: E402
from losses import MoCo  # noqa: E402
from schedule import ca_mse, load_table  # noqa: E402
from vit import ViT, load_backbone, vit_base  # noqa: E402

# Okabe and Ito's colours, for colour-blind readers; uncompressed is p4 at 32 px
COLORS = {
    'p4': '#0072B2', 'p8': '#009E73', 'p8-drop0.50': '#D55E00',
    'p4-drop0.50': '#56B4E9', 'p16': '#E69F00', 'p16-drop0.50': '#000000',
}
MARKERS = 'os^Dv*XP'
matplotlib.style.use(Path(__file__).with_suffix('.mplstyle'))


def show(axis, image, **options):
    """Draw an image (c h w), grey or RGB, without ticks and frame."""
    axis.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), **options)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def legend(figure, columns):
    """That of the first axes, for all of them."""
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc='outside lower center',
                  ncols=columns)


# ---------------------------------------------------------------- compression

def seen(photo, tau):
    """What the tokens of a strategy hold of a photo (1 c h w): (c 16*h 16*w), dropped ones white.

    Of a patch of q x q pixels that is its least-squares picture of 16 x 16 (compress.py).
    """
    h = patches_per_side(224, tau.patch_size)
    rows = shrink(torch.eye(h * tau.patch_size)[None], (tau.patch_size, 16))
    image = separable(resize(photo, h * tau.patch_size), rows, rows)[0].clamp(0, 1)
    kept = torch.zeros(h * h)
    kept[random_keep(1, h * h, tau.drop_rate, keyed_generator('picture', str(tau)))] = 1
    mask = torch.kron(kept.view(h, h), torch.ones(16, 16))
    return torch.where(mask > 0, image, 1.0)


def units(tau):
    """Cost of a training sample: MoCo-v3, ViT-B at 224 px, full views."""
    with torch.device('meta'):                               # sizes alone, without weights
        method = MoCo(vit_base())
    return sample_cost(method, recipe('moco', 224), tau)


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
        for draw_lines in (axis.hlines, axis.vlines):
            draw_lines(range(1, h), 0, h, 'white', linewidth=0.6)
        tokens = 1 + num_keep(h * h, tau.drop_rate)          # the paper counts the class token
        axis.set_xlabel(f'{tau}\n{tokens} tokens, {units(tau):.2f} units')
    axes[0, 0].set_ylabel('token dropout:\na random part of the patches')
    axes[1, 0].set_ylabel('patch scaling: larger patches,\neach read as 16 x 16 pixels')
    figure.supxlabel('units of compute of a training sample: MoCo-v3, ViT-B at 224 px')
    return figure


# ---------------------------------------------------------------- curves

def curves(*runs):
    """20-NN of runs over seconds and over units; how much sooner the better of two is as good."""
    figure = Figure((8, 3.4))
    axes = figure.subplots(1, 2, sharey=True)
    for axis, clock in zip(axes, ('seconds', 'units')):
        for folder, marker in zip(map(Path, runs), MARKERS):
            steps, scores = read_log(folder)
            label = ', then '.join(dict.fromkeys(step['strategy'] for step in steps))
            axis.plot(
                [score[clock] for score in scores],
                [score['knn'] for score in scores],
                marker=marker,
                color=COLORS.get(label),
                label=f'{folder.name}: {label}')
        lines = [line.get_data() for line in axis.lines[:2]]
        target = min(y[-1] for _, y in lines)
        ends = sorted(np.interp(target, np.maximum.accumulate(y), x) for x, y in lines)
        axis.annotate('', (ends[0], target), (ends[-1], target),
                      arrowprops=dict(arrowstyle='-|>', color='0.2', shrinkB=0))
        axis.set(title=f'{ends[-1] / ends[0]:.1f} times fewer {clock}', xlabel=clock)
        axis.locator_params(axis='x', nbins=4)
    axes[0].set_ylabel('20-NN accuracy, %')
    legend(figure, columns=2)
    return figure


# ---------------------------------------------------------------- neighbours

def draw_neighbours(axes, features, labels, pictures, title):
    """In each row a query and its nearest images of the bank. A frame marks another class.

    features (n+m d), labels (n+m), pictures (n+m c h w): of the queries, then of the bank.
    """
    n, columns = axes.shape
    features = F.normalize(features, dim=1)
    cosines = features[:n] @ features[n:].T                                    # n m
    nearest = n + cosines.topk(columns - 1, dim=1).indices                     # n k
    same = labels[nearest] == labels[:n, None]
    for axis, picture in zip(axes[:, 0], pictures):
        show(axis, picture)
    for axis, i, match in zip(axes[:, 1:].flat, nearest.flatten(), same.flatten()):
        show(axis, pictures[i])
        axis.spines[:].set(visible=not match, color=COLORS['p8-drop0.50'], linewidth=2.5)
    axes[0, 3].set_title(f'{title}: {same.sum()} of {same.numel()} of the same class')


@torch.no_grad()
def neighbours(run, data_root='data'):
    """Test images and their neighbours, under a random and under the trained network."""
    trained, info = load_backbone(Path(run) / 'backbone.pt')
    torch.manual_seed(0)                # the same random network each time
    random = ViT(**trained.config)
    data = load(info['dataset'], data_root)
    pictures, labels = [], []           # in parts: the queries, then the bank
    for split, count in (('test', 8), ('train', 5_000)):
        ids = data.labelled_ids(split, count)
        for part, ids in data.scored(split, ids, random.config['img_size']):
            pictures.append(part)
            labels.append(data.labels[split][ids])
    figure = Figure((8, 6.2))
    halves = figure.subfigures(1, 2)
    for half, title, encoder in zip(halves, ('random', 'trained'), (random, trained)):
        features = [encoder(normalize(part, info['mean'], info['std'])) for part in pictures]
        axes = half.subplots(len(pictures[0]), 6)
        draw_neighbours(axes, *map(torch.cat, (features, labels, pictures)), title)
    figure.supxlabel('on the left test images; framed: a neighbour of another class')
    return figure


# ---------------------------------------------------------------- gradstats

def gradstats(file):
    """Squared bias, cost-adjusted variance and their sum, CA-MSE, over progress."""
    rows = sorted(load_table(file), key=lambda row: row['progress'])
    costs = {row['strategy']: row['cost'] for row in rows}
    left_out = {
        'squared bias': dict(variance=0.0, variance_sem=0.0),
        'cost-adjusted variance': dict(bias2=0.0, bias2_sem=0.0),
        'CA-MSE': {},
    }
    figure = Figure((8, 3.3))
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, zeros) in zip(axes, left_out.items()):
        for name, marker in zip(sorted(costs, key=costs.get, reverse=True), MARKERS):
            mine = [dict(row, **zeros) for row in rows if row['strategy'] == name]
            axis.errorbar(
                [row['progress'] for row in mine],
                *zip(*map(ca_mse, mine)),
                marker=marker,
                color=COLORS.get(name),
                label=f'{name} (cost {costs[name]:.2f})')
        axis.set(title=title, xlabel='progress')
        axis.set_yscale('log', nonpositive='mask')           # an estimate of no bias
    axes[0].set_ylabel(f'{rows[0]["metric"]} metric, relative to\nthe squared true gradient')
    legend(figure, columns=3)
    return figure


# ---------------------------------------------------------------- headline

def headline():
    """20-NN accuracy over budget on three data sets, mean and deviation over seeds."""
    records = read(RESULTS)
    figure = Figure((8, 3.5))
    axes = figure.subplots(1, len(TITLES))
    for axis, (dataset, title) in zip(axes, TITLES.items()):
        slow, fast, dropped = tuned(records, dataset, 'none', 'p8', 'p8-drop0.50')
        best = hindsight(records, dataset)
        for runs, label, strategy, marker in (
            (slow, 'uncompressed, tuned', 'p4', 'o-'),
            (best, 'uncompressed, best recipe', 'p4', '*'),
            (fast, 'p8, tuned', 'p8', 's-'),
            (dropped, 'p8-drop0.50, tuned', 'p8-drop0.50', '^-'),
        ):
            scores = [[run['knn'] for run in by_seed.values()] for by_seed in runs.values()]
            axis.errorbar(
                list(runs),
                list(map(mean, scores)),
                [stdev(score) if len(score) > 1 else 0 for score in scores],
                fmt=marker,
                color=COLORS[strategy],
                label=label,
                markersize=9 if marker == '*' else 4)
        axis.set(
            title=f'{title}\n{speed_up(best, dropped, 0.32)} times fewer units',
            xlabel='million units',
            xscale='log')
        ticks = [0.02, 0.08, 0.32, 1.28, 4]
        axis.set_xticks(ticks, ticks)
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
    figure = pictures[args.picture](*args.paths)
    figure.savefig(args.output or f'{args.picture}.png')


if __name__ == '__main__':
    main()
