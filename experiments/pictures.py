"""Everything that draws: each picture is a command that writes one PNG.

    python experiments/pictures.py compression --image photo.jpg     # what the network sees
    python experiments/pictures.py curves runs/A runs/B              # runs over each other
    python experiments/pictures.py neighbours --weights runs/A       # before and after training
    python experiments/pictures.py gradstats runs/A/gradstats.jsonl  # bias, variance, CA-MSE
    python experiments/pictures.py headline                          # accuracy over budget

curves without runs takes the newest two below runs/, neighbours the newest one. A strategy has one
colour in all pictures. Pictures are 8 inches wide, to be shown at 800 pixels.

Shapes: n queries, m images of the bank, c channels, d width, h w image or grid.
"""
import argparse
import statistics
import sys
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor

from reproduce import RESULTS, ROOT, TITLES, crossing, load_results, read_log, select, sides
from reproduce import speed_up_text, speed_ups

sys.path.insert(0, str(ROOT))
from compress import Compression, num_keep, pass_flops, patches_per_side, random_keep  # noqa: E402
from eval import Setting, features_of  # noqa: E402
from images.data import load  # noqa: E402
from images.views import keyed_generator, resize, separable, shrink  # noqa: E402
from schedule import ca_mse, load_table  # noqa: E402
from vit import ViT, load_backbone  # noqa: E402

# Okabe and Ito's colours, for colour-blind readers; uncompressed is p4 at 32 px
COLORS = {
    'none': '#0072B2', 'p4': '#0072B2', 'p8': '#009E73', 'p8-drop0.50': '#D55E00',
    'p4-drop0.50': '#56B4E9', 'p16': '#E69F00', 'p16-drop0.50': '#000000', 'other': '#CC79A7',
}
MARKERS = 'os^Dv*XP'
ARROW = dict(arrowstyle='-|>', color='0.2', shrinkA=2, shrinkB=0)
matplotlib.rcParams.update({
    'font.size': 9, 'axes.titlesize': 9, 'axes.titleweight': 'bold', 'axes.spines.top': False,
    'axes.spines.right': False, 'grid.color': '0.92', 'lines.markersize': 4,
    'legend.frameon': False, 'savefig.dpi': 150, 'figure.constrained_layout.use': True,
})


def color_of(strategy):
    return COLORS.get(strategy, COLORS['other'])


def show(axis, image, **options):
    """Draw an image (c h w), grey or RGB, without ticks and frame."""
    axis.imshow(image.expand(3, -1, -1).permute(1, 2, 0).numpy(), **options)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


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


def units(tau, side=224, base=16, width=768, depth=12):
    """Of a training sample of MoCo-v3: query forward and backward, key forward; without heads."""
    sizes = (3 * base ** 2, width, depth)
    n = patches_per_side(side, tau.patch_size) ** 2
    query = pass_flops(num_keep(n, tau.drop_rate), *sizes, trains=True)
    return (query + pass_flops(n, *sizes)) / pass_flops((side // base) ** 2, *sizes)


def compression(image):
    """An image as the network sees it: with tokens dropped, in larger patches."""
    square = ImageOps.fit(Image.open(image).convert('RGB'), (448, 448))
    photo = pil_to_tensor(square)[None]
    figure = Figure((8, 5.3))
    axes = figure.subplots(2, 4)
    axes[0, 0].set_ylabel('token dropout:\na random part of the patches')
    axes[1, 0].set_ylabel('patch scaling: larger patches,\neach read as 16 x 16 pixels')
    # p16-drop0.75 and p30 leave the same number of tokens, as in the paper's table 3
    names = 'p16 p16-drop0.50 p16-drop0.75 p16-drop0.90 p24 p30 p40 p48'
    for axis, tau in zip(axes.flat, map(Compression.parse, names.split())):
        h = patches_per_side(224, tau.patch_size)
        show(axis, seen(photo, tau), extent=(0, h, h, 0))
        axis.hlines(range(1, h), 0, h, 'white', linewidth=0.6)
        axis.vlines(range(1, h), 0, h, 'white', linewidth=0.6)
        tokens = 1 + num_keep(h * h, tau.drop_rate)          # the paper counts the class token
        axis.set_xlabel(f'{tau}\n{tokens} tokens, {units(tau):.2f} units')
    figure.supxlabel('units of compute of a training sample: MoCo-v3, ViT-B at 224 px', fontsize=8)
    return figure


# ---------------------------------------------------------------- curves

def newest(pattern, count):
    """The newest files below runs/, the oldest of them first."""
    found = sorted(Path('runs').glob(pattern), key=lambda path: path.stat().st_mtime)
    if len(found) < count:
        raise FileNotFoundError(f'runs/ has {len(found)} {pattern}; name the runs')
    return found[-count:]


def curves(runs):
    """20-NN of runs over seconds and over units; how much sooner the better of two is as good."""
    figure = Figure((8, 3.4))
    axes = figure.subplots(1, 2, sharey=True)
    folders = [Path(run) for run in runs] or [path.parent for path in newest('*/log.jsonl', 2)]
    for axis, clock, scale in zip(axes, ('seconds', 'units'), (1, 1e-3)):
        lines = []
        for folder, marker in zip(folders, MARKERS):
            steps, scores = read_log(folder)
            names = dict.fromkeys(step['strategy'] for step in steps)
            label = ', then '.join(names)
            lines.append([(scale * score[clock], score['knn']) for score in scores])
            axis.plot(*zip(*lines[-1]), marker=marker, color=color_of(label),
                      label=f'{folder.resolve().name}: {label}')
        target = min(line[-1][1] for line in lines[:2])
        ends = sorted(reach(line, target) for line in lines[:2])
        if ends[0] < ends[-1]:
            axis.annotate('', (ends[0], target), (ends[1], target), arrowprops=ARROW)
            axis.text(0.97, 0.05, f'{ends[1] / ends[0]:.1f} times fewer {clock}', ha='right',
                      transform=axis.transAxes, fontweight='bold')
        axis.set_xlabel('seconds' if scale == 1 else 'thousand units')
        axis.grid()
    axes[0].set_ylabel('20-NN accuracy, %')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=2)
    return figure


def reach(points, target):
    """The x at which straight lines through (x, y) first reach y = target."""
    for (x0, y0), (x1, y1) in zip(points, points[1:]):
        if y1 >= target:
            return x0 + (x1 - x0) * max(0, target - y0) / (y1 - y0)


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


def neighbours(weights, data_root):
    """Test images and their neighbours, under a random and under the trained network."""
    weights = Path(weights) if weights else newest('*/backbone.pt', 1)[0]
    trained, info = load_backbone(weights / 'backbone.pt' if weights.is_dir() else weights)
    data = load(info['dataset'], data_root)
    torch.manual_seed(0)                # the same random network each time
    random = ViT(**trained.config)
    setting = Setting(random.config['img_size'], random.patch_size, info['mean'], info['std'])
    asked = 'test', data.labelled_ids('test', 8)
    among = 'train', data.labelled_ids('train', 5_000)
    pictures, bank = [torch.cat([batch for batch, _ in data.scored(*ids, setting.side)])
                      for ids in (asked, among)]
    figure = Figure((8, 6.2))
    left, *parts = figure.subfigures(1, 3, width_ratios=(1.15, 5, 5))
    for part, encoder, title in zip(parts, (random, trained), ('random', 'trained')):
        queries = features_of(encoder, data, *asked, setting)
        features = features_of(encoder, data, *among, setting)
        draw_neighbours(part.subplots(len(pictures), 5), queries, (*features, bank), title)
    for axis, picture in zip(left.subplots(len(pictures), 1), pictures):
        show(axis, picture)
    figure.supxlabel('test images on the left; framed: a neighbour of another class', fontsize=8)
    return figure


# ---------------------------------------------------------------- gradstats

def gradstats(file):
    """Squared bias, cost-adjusted variance and CA-MSE over progress; the least is ringed."""
    rows = sorted(load_table(file), key=lambda row: row['progress'])
    costs = {row['strategy']: row['cost'] for row in rows}
    figure = Figure((8, 3.3))
    axes = figure.subplots(1, 3, sharey=True)
    for name, marker in zip(sorted(costs, key=costs.get, reverse=True), MARKERS):
        mine = [row for row in rows if row['strategy'] == name]
        bias2 = [(row['bias2'] / row['norm2'], row['bias2_sem'] / row['norm2']) for row in mine]
        noise = [(row['cost'] * row['variance'] / row['norm2'],
                  row['cost'] * row['variance_sem'] / row['norm2']) for row in mine]
        for axis, pairs in zip(axes, (bias2, noise, map(ca_mse, mine))):
            axis.errorbar([row['progress'] for row in mine], *zip(*pairs), elinewidth=0.8,
                          marker=marker, color=color_of(name),
                          label=f'{name} (cost {costs[name]:.2f})')
    for progress in {row['progress'] for row in rows}:
        least = min(ca_mse(row)[0] for row in rows if row['progress'] == progress)
        axes[2].plot(progress, least, 'ok', markersize=9, fillstyle='none')
    for axis, title in zip(axes, ('squared bias', 'cost-adjusted variance', 'CA-MSE')):
        axis.set(title=title, xlabel='progress', xlim=(-0.03, 1.03))
        axis.set_yscale('log', nonpositive='mask')           # an estimate of no bias
        axis.grid()
    axes[0].set_ylabel(f'{rows[0]["metric"]} metric, relative to\nthe squared true gradient')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=3)
    return figure


# ---------------------------------------------------------------- headline

def draw_scores(axis, runs, **look):
    """[(budget, mean 20-NN)] of {budget: {seed: record}}, drawn with the deviation over seeds."""
    scores = [[run['knn'] for run in by_seed.values()] for by_seed in runs.values()]
    means = [statistics.mean(score) for score in scores]
    errors = [statistics.stdev(score) if len(score) > 1 else 0 for score in scores]
    axis.errorbar(list(runs), means, errors, elinewidth=0.8, capsize=2, **look)
    return list(zip(runs, means))


def headline():
    """20-NN accuracy over budget on three data sets, mean and deviation over seeds."""
    records = load_results()
    figure = Figure((8, 3.5))
    axes = figure.subplots(1, len(TITLES))
    for axis, (dataset, title) in zip(axes, TITLES.items()):
        base, fast = sides(records, dataset)
        draw_scores(axis, select(records, dataset, 'moco', 'none'), label='uncompressed',
                    color=COLORS['none'], marker='o')
        best = draw_scores(axis, base, label='uncompressed, best recipe', color=COLORS['none'],
                           marker='*', markersize=9, linestyle='none')
        curve = draw_scores(axis, fast, label='p8', color=COLORS['p8'], marker='s')
        draw_scores(axis, sides(records, dataset, 'p8-drop0.50')[1], label='p8-drop0.50',
                    color=COLORS['p8-drop0.50'], marker='^')
        target = dict(best)[0.32]
        end = max(crossing(curve, target), curve[0][0])
        axis.annotate('', (end, target), (0.32, target), arrowprops=ARROW)
        text = speed_up_text(speed_ups(base, fast, 0.32))
        axis.set(title=f'{title}\np8: {text} times fewer', xlabel='million units', xscale='log')
        ticks = [tick for tick in (0.02, 0.08, 0.32, 1.28, 4) if tick <= curve[-1][0] or tick < 4]
        axis.set_xticks(ticks, ticks)
        axis.minorticks_off()
        axis.grid()
    axes[0].set_ylabel('20-NN accuracy, %')
    figure.legend(*axes[0].get_legend_handles_labels(), loc='outside lower center', ncols=4)
    return figure


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    flags = {draw: commands.add_parser(draw.__name__, help=draw.__doc__)
             for draw in (compression, curves, neighbours, gradstats, headline)}
    for draw, command in flags.items():
        command.set_defaults(draw=draw)
        command.add_argument('-o', '--output', default=f'{draw.__name__}.png', help='the PNG')
    flags[compression].add_argument('--image', default=RESULTS.with_name('cat.jpg'), help='a photo')
    flags[curves].add_argument('runs', nargs='*', help='folders of runs')
    flags[neighbours].add_argument('--weights', help='folder of a run, or a file of weights')
    flags[neighbours].add_argument('--data-root', default='data', help='folder of the data set')
    flags[gradstats].add_argument('file', help='gradstats.jsonl of a run')
    options = vars(parser.parse_args(argv))
    draw, output = options.pop('draw'), options.pop('output')
    try:
        draw(**options).savefig(output)
    except (ValueError, OSError) as error:
        sys.exit(f'pictures.py: error: {error}')


if __name__ == '__main__':
    main()
