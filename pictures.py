"""Everything that draws: each picture is a command that writes one PNG.

    python pictures.py compression --image photo.jpg    # tokens, patches
    python pictures.py views --image photo.jpg          # views of each recipe
    python pictures.py curves runs/A runs/B             # loss, 20-NN, strategy
    python pictures.py neighbours --weights runs/A/backbone.pt
    python pictures.py cost                             # of a training sample
    python pictures.py gradstats runs/A/gradstats.jsonl # bias, variance

A picture has the name of its command and is made to be read 800 pixels wide.
The colours stay apart for colour-blind readers; where lines cross, they also
differ in their markers. matplotlib is imported only when something is drawn,
so that training goes on without it.

Shapes: b batch, n patches or images, m images in the bank, c channels, d width,
h w grid or image, y x pixels of a patch, s side of a thumbnail, k neighbours.
"""
import json
import math
import textwrap
from functools import lru_cache
from itertools import groupby
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from PIL import Image, ImageOps
from torchvision.transforms.functional import pil_to_tensor
from tqdm import tqdm

import data as datasets
from commandline import Parser, fail, pick_device
from compress import (
    Compression,
    random_keep,
    rendered_side,
    resize_matrix,
    sample_cost,
    tokens_of,
)
from eval import extract_features
from files import read_image
from losses import MoCo
from schedule import ca_mse, load_table
from shapes import render_shapes
from views import keyed_generator, make_views, recipe, resize
from vit import ViT, vit_base
from weights import load_backbone, quoted, replacing

# Okabe and Ito's colours without their yellow, which is too pale for a line on white.
PALETTE = ('#0072B2', '#D55E00', '#009E73', '#CC79A7', '#E69F00', '#56B4E9', '#000000')
MARKERS = 'os^DvPX*'
STYLE = {
    'font.size': 9,
    'axes.titlesize': 9,
    'axes.titleweight': 'bold',
    'figure.titlesize': 9,
    'figure.titleweight': 'bold',
    'figure.labelsize': 8,      # notes at the foot
    'axes.spines.top': False,
    'axes.spines.right': False,
    'lines.linewidth': 1.3,
    'lines.markersize': 4,
    'legend.frameon': False,
    'savefig.dpi': 150,
}
WIDTH = 8                       # inches; shown 800 pixels wide, text of 9 points is 12 pixels high

SIDE = 224                      # pixels, the paper's
BASE = 16                       # the paper's base patch size
PATCH_SIZES = (16, 20, 24, 30, 40, 48)


# ---------------------------------------------------------------- what all pictures share

def new_figure(height, width=WIDTH):
    """An empty figure in the common style, sizes in inches. It needs no screen."""
    import matplotlib
    from matplotlib.figure import Figure
    matplotlib.rcParams.update(STYLE)
    size = (width, height)
    return Figure(size, layout='constrained')


def save_figure(figure, path):
    with replacing(path) as file:
        figure.savefig(file, format='png')


def looks(names):
    """{name: its colour and marker}. No pair repeats among 56 names."""
    look = {}
    for i, name in enumerate(names):
        color = PALETTE[i % len(PALETTE)]
        marker = MARKERS[i % len(MARKERS)]
        look[name] = dict(color=color, marker=marker)
    return look


def show(axis, image, **options):
    """Draw an image (c h w), grey or RGB, without ticks and frame."""
    rgb = image.expand(3, -1, -1)
    pixels = rearrange(rgb, 'c h w -> h w c')
    axis.imshow(pixels.numpy(), **options)
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)


def square_image(path=None, side=2 * SIDE):
    """The central square of an image file, or a rendered image: float (1 3 side side) in [0, 1]."""
    if path is None:
        images, _ = render_shapes(12, seed=0, side=side)
        return images[5:6] / 255
    size = (side, side)
    photo, reason = read_image(path)
    if photo is None:
        raise ValueError(f'{quoted(path)} cannot be read: {reason}')
    square = ImageOps.fit(photo, size, Image.Resampling.BICUBIC)
    return pil_to_tensor(square)[None] / 255


@lru_cache(maxsize=None)
def moco_of(patch_branch):
    """MoCo-v3 with a ViT-B on the meta device: it has no weights, but it can list its passes."""
    with torch.device('meta'):
        encoder = vit_base(img_size=SIDE)
        return MoCo(encoder, patch_branch=patch_branch)


def moco_cost(tau, patch_branch='both'):
    """Units per training sample. One unit is one forward pass of the uncompressed encoder."""
    method = moco_of(patch_branch)
    passes = method.passes(tau.patch_size, tau.drop_rate)
    sides = [SIDE, SIDE]
    return sample_cost(passes, sides, method.encoder.config)


def read_lines(path):
    """The records of a file of JSON lines, without a broken one at the end.

    It is still being written, or the disk was full.
    """
    records = []
    lines = Path(path).read_text().splitlines(keepends=True)
    for line in lines:
        try:
            records.append(json.loads(line))
        except ValueError:
            if records and not line.endswith('\n'):
                break
            raise ValueError(f'{quoted(path)} is not a file of JSON lines') from None
    return records


# ---------------------------------------------------------------- compression

def seen(photo, tau):
    """What the tokens of a strategy hold of a photo (1 c side side): (c 16*h 16*w).

    A patch x of q x q pixels meets the trained 16 x 16 kernel w as <x, pinv(B^T) w>, which equals
    <pinv(B) x, w>. So pinv(B) x, of 16 x 16 pixels, is all that its token holds. Dropped patches
    are white.
    """
    q = tau.patch_size
    side = rendered_side(SIDE, q)
    image = resize(photo, side)
    patches = rearrange(image, '1 c (h y) (w x) -> (h w) c (y x)', y=q, x=q)
    shrink = torch.linalg.pinv(resize_matrix(BASE, q))       # (16 16) (q q)
    patches = patches @ shrink.T.float()                     # n c (16 16)
    generator = keyed_generator('picture', str(tau))
    kept = random_keep(1, len(patches), tau.drop_rate, generator)[0]
    white = torch.ones_like(patches)
    patches = white.index_copy(0, kept, patches[kept])
    h = side // q
    image = rearrange(patches, '(h w) c (y x) -> c (h y) (w x)', h=h, y=BASE)
    return image.clamp(0, 1)


def draw_strategies(part, photo, title, names):
    """The photo under each strategy, with the borders of its patches, in a part of a figure."""
    axes = part.subplots(1, len(names), squeeze=False)[0]
    for axis, name in zip(axes, names):
        tau = Compression.parse(name)
        h = rendered_side(SIDE, tau.patch_size) // tau.patch_size
        show(axis, seen(photo, tau), extent=(0, h, h, 0))
        borders = range(1, h)
        axis.set(xticks=borders, yticks=borders, xticklabels=[], yticklabels=[])
        axis.tick_params(length=0)
        axis.grid(color='white', linewidth=0.7)
        # the paper counts the class token: 50 tokens are 49 patches
        tokens = 1 + tokens_of(SIDE, tau.patch_size, tau.drop_rate)
        axis.set_xlabel(f'{name}\n{tokens} tokens, {moco_cost(tau):.2f} units')
    axes[len(names) // 2].set_title(title)


def compression(image=None):
    """An image as the network sees it: whole, with tokens dropped, in larger patches."""
    photo = square_image(image)
    figure = new_figure(height=5.4)
    left, right = figure.subfigures(1, 2, width_ratios=(1, 3))
    top, bottom = right.subfigures(2, 1)
    dropout = 'token dropout: a random part of the patches'
    scaling = 'patch scaling: larger patches, each read as 16 x 16 pixels'
    draw_strategies(left, photo, 'uncompressed', ['p16'])
    # p16-drop0.75 and p30 leave the same number of tokens, as in the paper's table 3
    draw_strategies(top, photo, dropout, ['p16-drop0.50', 'p16-drop0.75', 'p16-drop0.90'])
    draw_strategies(bottom, photo, scaling, ['p24', 'p30', 'p48'])
    figure.supxlabel('tokens with the class token; units of compute per training sample of '
                     'MoCo-v3, ViT-B at 224 px')
    return figure


# ---------------------------------------------------------------- views

RECIPES = dict(
    moco=('MoCo-v3: a query and a key', ['query', 'key']),
    simclr=('SimCLR: two views alike', ['view 1', 'view 2']),
    dino=('DINO: two global crops, and local ones for the student alone',
          ['global 1', 'global 2', 'local']),
)


def views(image=None, columns=7):
    """A contact sheet of the random views that each recipe makes of one image."""
    photo = square_image(image)
    copies = repeat(photo, '1 c h w -> b c h w', b=columns)
    figure = new_figure(height=7.6)
    parts = figure.subfigures(3, 1, height_ratios=(2, 2, 3))
    for part, method in zip(parts, RECIPES):
        title, labels = RECIPES[method]
        kinds = recipe(method, SIDE, local_crops=len(labels) - 2)
        batches = make_views(copies, kinds, keyed_generator('picture', method))
        axes = part.subplots(len(kinds), 1 + columns)
        for row, batch, label in zip(axes, batches, labels):
            row[0].axis('off')
            row[1].set_ylabel(label)
            for axis, view in zip(row[1:], batch):
                show(axis, view)
        part.suptitle(title)
        if method == 'moco':
            show(axes[0, 0], photo[0])
    figure.supxlabel('top left: the whole image')
    return figure


# ---------------------------------------------------------------- curves

def read_log(folder):
    """(training lines, score lines) of the log of a run."""
    path = Path(folder) / 'log.jsonl'
    if not path.is_file():
        raise FileNotFoundError(f'no log at {quoted(path)}; give the folder of a run')
    lines = read_lines(path)
    steps = [line for line in lines if 'loss' in line]
    scores = [line for line in lines if 'knn' in line]
    return steps, scores


def stages_of(steps):
    """[(strategy, progress at which it begins, at which it ends), ...] of training lines."""
    stages = []
    start = 0.0
    for name, lines in groupby(steps, key=lambda line: line['query']):
        *_, last = lines
        end = last['progress']
        stages.append((name, start, end))
        start = end
    return stages


def draw_line(axis, lines, key, marker=''):
    """One value of the lines of a log over progress."""
    x = [line['progress'] for line in lines]
    y = [line[key] for line in lines]
    axis.plot(x, y, color='black', marker=marker, clip_on=False)


def curves(runs):
    """Loss, 20-NN accuracy, learning rate and strategy of runs, side by side."""
    logs = [read_log(run) for run in runs]
    tokens = {}
    for steps, _ in logs:
        for line in steps:
            tokens[line['query']] = line['tokens']
    look = looks(sorted(tokens, key=tokens.get, reverse=True))

    # a column for each run; they share their axes, so that heights compare
    width = max(WIDTH, 2.2 * len(runs))
    figure = new_figure(6, width)
    axes = figure.subplots(4, len(runs), squeeze=False, sharex=True, sharey='row',
                           height_ratios=(0.15, 1, 1, 0.6))
    bands = {}
    for run, (steps, scores), column in zip(runs, logs, axes.T):
        strategy, loss, accuracy, rate = column
        name = Path(run).resolve().name
        strategy.set_title(textwrap.fill(name, 24))
        strategy.axis('off')
        for name, start, end in stages_of(steps):
            style = dict(color=look[name]['color'], linewidth=0)
            bands[name] = strategy.axvspan(start, end, **style)
            for axis in (loss, accuracy, rate):
                axis.axvspan(start, end, alpha=0.12, **style)
        draw_line(loss, steps, 'loss')
        draw_line(accuracy, scores, 'knn', marker='o')
        draw_line(rate, steps, 'lr')
        if scores:
            accuracy.set_title(f'last: {scores[-1]["knn"]:.1f} %')
        rate.set(xlabel='progress: spent / budget', xlim=(0, 1), xticks=(0, 0.5, 1))
    for axis, label in zip(axes[1:, 0], ('loss', '20-NN accuracy, %', 'learning rate')):
        axis.set_ylabel(label)
    figure.align_ylabels()
    handles = [bands[name] for name in look]
    figure.legend(handles, list(look), title='strategy', loc='outside lower center', ncols=4)
    return figure


@lru_cache(maxsize=None)
def has_matplotlib():
    """Whether anything can be drawn. If not, it says so, once: the answer is kept."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        tqdm.write('no curves.png: matplotlib is missing; pip install matplotlib')
        return False
    return True


def curves_of_run(folder):
    """Write curves.png into the folder of a run. A full disk does not end the training."""
    if not has_matplotlib():
        return
    figure = curves([folder])
    try:
        save_figure(figure, Path(folder) / 'curves.png')
    except OSError as error:
        tqdm.write(f'warning: {error}')


# ---------------------------------------------------------------- neighbours

BANK = 5_000                    # images among which neighbours are looked for
THUMBNAIL = 64                  # pixels


def queries_and_bank(data, count=8):
    """Two pairs (split, ids): images to ask about, and those among which neighbours are found."""
    queries = data.labelled_ids('test', count)
    if len(queries):
        return ('test', queries), ('train', data.labelled_ids('train', BANK))
    # without labels no image is held out, so some of the training images are kept out of the bank
    order = torch.randperm(len(data), generator=keyed_generator('picture'))
    queries = order[:count].sort().values
    bank = order[count:BANK].sort().values
    return ('train', queries), ('train', bank)


def look_up(encoder, data, split, ids, info):
    """(features (n d) of unit length, thumbnails uint8 (n c s s), labels (n)) of some images."""
    side = encoder.config['img_size']
    thumbnails = []

    def batches():
        # data leaves out unreadable files, so the images are kept as they come
        for images, labels in data.labelled(split, ids, side):
            small = resize(images, min(side, THUMBNAIL))
            thumbnails.append((255 * small).byte())
            yield images, labels

    mean = info['mean'] or data.mean
    std = info['std'] or data.std
    device = pick_device('auto')
    features, labels = extract_features(encoder.to(device), batches(), mean, std, device)
    return F.normalize(features, dim=1), torch.cat(thumbnails), labels


def draw_neighbours(axes, queries, bank, title):
    """The nearest images of the bank, a row for each query. A frame marks another class."""
    features, images, labels = bank
    k = axes.shape[1]
    cosines = queries[0] @ features.T                        # n m
    nearest = cosines.topk(k, dim=1).indices                 # n k
    same = labels[nearest] == queries[2][:, None]
    labelled = bool((queries[2] >= 0).all())
    for row, ids, matches in zip(axes, nearest, same):
        for axis, i, match in zip(row, ids, matches):
            show(axis, images[i])
            if labelled and not match:
                axis.spines[:].set(visible=True, color=PALETTE[1], linewidth=2.5)
    if labelled:
        title += f': {int(same.sum())} of {same.numel()} of the same class'
    axes[0, k // 2].set_title(title)


def neighbours(weights, dataset=None, data_root='data'):
    """Test images and their neighbours, under a random and under the trained network."""
    trained, info = load_backbone(weights)
    name = dataset or info['dataset']
    if name is None:
        raise ValueError(f'{quoted(weights)} does not name its data set; add --dataset')
    data = datasets.load(name, data_root)
    channels = info['config']['in_chans']
    if data.channels != channels:
        raise ValueError(f'{quoted(weights)} takes images of {channels} channels, those of {name} '
                         f'have {data.channels}; choose another --dataset')
    torch.manual_seed(0)        # the same random network each time
    random = ViT(**info['config'])

    asked, among = queries_and_bank(data)
    figure = new_figure(height=6.2)
    left, middle, right = figure.subfigures(1, 3, width_ratios=(1.15, 5, 5))
    for part, encoder, title in ((middle, random, 'random'), (right, trained, 'trained')):
        queries = look_up(encoder, data, *asked, info)
        bank = look_up(encoder, data, *among, info)
        axes = part.subplots(len(queries[0]), 5, squeeze=False)
        draw_neighbours(axes, queries, bank, f'{title} network')
    axes = left.subplots(len(queries[0]), 1, squeeze=False)
    for axis, image in zip(axes[:, 0], queries[1]):
        show(axis, image)
    axes[0, 0].set_title('image')
    if data.classes:
        figure.supxlabel('framed: a neighbour of another class', color=PALETTE[1])
    return figure


# ---------------------------------------------------------------- cost

def cost():
    """The cost of a training sample of MoCo-v3 over patch sizes and drop rates."""
    rates = [i / 10 for i in range(10)]
    figure = new_figure(height=5.4)
    axes = figure.subplots(1, 2, sharey=True)
    titles = dict(query='key uncompressed, as in the paper', both='key with the same patch size')
    base = moco_cost(Compression(BASE))
    for axis, branch in zip(axes, titles):
        table = torch.zeros(len(rates), len(PATCH_SIZES))
        for i, rate in enumerate(rates):
            for j, patch_size in enumerate(PATCH_SIZES):
                value = moco_cost(Compression(patch_size, rate), branch)
                table[i, j] = value
                # cividis is light at its upper end
                color = 'black' if value > base / 2 else 'white'
                axis.text(j, i, f'{value:.2f}\n{100 * value / base:.0f} %', color=color,
                          ha='center', va='center', fontsize=8)
        axis.imshow(table.numpy(), aspect='auto', cmap='cividis', vmin=0, vmax=base)
        axis.set(title=titles[branch], xlabel='patch size, pixels')
        axis.set_xticks(range(len(PATCH_SIZES)), PATCH_SIZES)
        axis.set_yticks(range(len(rates)), rates)
        axis.tick_params(length=0)
    axes[0].set_ylabel('drop rate of the query')
    figure.supxlabel('units of compute per training sample of MoCo-v3, ViT-B at 224 px, and '
                     'percent of the uncompressed cost')
    return figure


# ---------------------------------------------------------------- gradstats

def gradient_errors(row):
    """Pairs (value, standard error) for the three panels, as fractions of the squared norm."""
    scale = 1 / row['norm2']
    bias2 = (scale * row['bias2'], scale * row['bias2_sem'])
    scale *= row['cost']
    noise = (scale * row['variance'], scale * row['variance_sem'])
    return bias2, noise, ca_mse(row)


def draw_errors(axes, rows):
    """The three errors of each strategy over progress."""
    costs = {row['strategy']: row['cost'] for row in rows}
    look = looks(sorted(costs, key=costs.get, reverse=True))
    for name, style in look.items():
        mine = [row for row in rows if row['strategy'] == name]
        mine.sort(key=lambda row: row['progress'])
        progress = [row['progress'] for row in mine]
        label = f'{name} (cost {costs[name]:.2f})'
        for axis, pairs in zip(axes, zip(*map(gradient_errors, mine))):
            # an estimate of no bias has no place on a log scale
            values = [value if value > 0 else math.nan for value, _ in pairs]
            errors = [error for _, error in pairs]
            axis.errorbar(progress, values, errors, label=label, elinewidth=0.8, **style)

    # a ring around the least CA-MSE of each progress
    for progress in sorted({row['progress'] for row in rows}):
        least = min(ca_mse(row)[0] for row in rows if row['progress'] == progress)
        axes[2].plot(progress, least, 'ok', markersize=9, fillstyle='none')


def gradstats(file):
    """Squared bias, cost-adjusted variance and CA-MSE over progress; the least is ringed."""
    load_table(file)            # raises for what is not such a file
    metrics = list(dict.fromkeys(row['metric'] for row in read_lines(file)))
    figure = new_figure(height=2.6 * len(metrics) + 1)
    grid = figure.subplots(len(metrics), 3, squeeze=False, sharex=True, sharey='row')
    notes = []
    for axes, metric in zip(grid, metrics):
        rows = load_table(file, metric)
        # a fraction of the true gradient means nothing where that is lost in noise
        lost = {row['progress'] for row in rows if row['norm2'] <= row['norm2_sem']}
        draw_errors(axes, [row for row in rows if row['progress'] not in lost])
        if lost:
            points = ', '.join(f'{progress:g}' for progress in sorted(lost))
            notes.append(f'{metric}: the gradient is lost in noise at progress {points}')
        axes[0].set_ylabel(f'{metric} metric, relative to\nthe squared true gradient')
        for axis in axes:
            axis.set(yscale='log', xlim=(-0.03, 1.03), xticks=(0, 0.5, 1))
            axis.grid(color='0.9')
    for axis, title in zip(grid[0], ('squared bias', 'cost-adjusted variance', 'CA-MSE')):
        axis.set_title(title)
    for axis in grid[-1]:
        axis.set_xlabel('progress')
    figure.suptitle('\n'.join(notes), fontsize=8, fontweight='normal')
    handles, labels = grid[-1, 0].get_legend_handles_labels()
    figure.legend(handles, labels, loc='outside lower center', ncols=3)
    return figure


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = Parser(__doc__)
    pictures = parser.add_subparsers(required=True, metavar='PICTURE')
    commands = {}
    for draw in (compression, views, curves, neighbours, cost, gradstats):
        name = draw.__name__
        command = pictures.add_parser(name, description=draw.__doc__, help=draw.__doc__)
        command.add_argument('-o', '--output', default=f'{name}.png', help='the PNG to write')
        command.set_defaults(draw=draw)
        commands[name] = command

    for name in ('compression', 'views'):
        commands[name].add_argument('--image', help='a photo (default: a rendered image)')
    commands['curves'].add_argument('runs', nargs='+', help='folders of runs, such as runs/A')
    command = commands['neighbours']
    command.add_argument('--weights', required=True, help='backbone.pt of a run, or foreign ones')
    command.add_argument('--dataset', choices=datasets.DATASETS,
                         metavar='NAME', help='default: as the weights were trained')
    command.add_argument('--data-root', default='data', help='folder of the data set')
    commands['gradstats'].add_argument('file', help='gradstats.jsonl of a run')
    return parser.parse_args(argv)


def main(argv=None):
    options = vars(parse_args(argv))
    draw = options.pop('draw')
    output = options.pop('output')
    figure = draw(**options)
    save_figure(figure, output)
    print(quoted(output))


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, ImportError) as error:
        fail(f'pictures.py: error: {error}')
