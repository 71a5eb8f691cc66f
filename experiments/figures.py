"""The paper's figures, from the logs of runs.

    python experiments/figures.py budgets runs/fashion_mnist-moco-*  # accuracy over budget, mean and spread over seeds
    python experiments/figures.py gradstats runs/NAME/gradstats.jsonl
    python experiments/figures.py cost [runs/NAME/gradstats.jsonl]  # heat map of a sample's cost, ViT-B at 240 px; beside it the measured
    python experiments/figures.py schedule runs/NAME                # strategy, tokens and accuracy over the budget of a run
    python experiments/figures.py predict                           # CA-MSE against what training on gave (predict.py)
    python experiments/figures.py decay

Each writes experiments/results/FIGURE.png, or what -o says.
"""
import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import matplotlib
matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
from compress import Compression, sample_cost  # noqa: E402
from schedule import cosine, cost_adjusted_mse, load_table, polynomial  # noqa: E402


def read(path):
    if not Path(path).is_file():
        sys.exit(f'figures.py: error: no file {path}')
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def budgets(paths):
    """Final 20-NN accuracy over the budget: one line per (method, schedule), spread over seeds."""
    scores, random = defaultdict(lambda: defaultdict(list)), []
    for path in paths:
        args = json.loads((Path(path) / 'args.json').read_text())
        lines = [line for line in read(Path(path) / 'log.jsonl') if 'knn' in line]
        if lines[-1]['progress'] < 1:
            sys.exit(f'figures.py: error: {path} has not finished')
        scores[args['method'], args['schedule']][args['budget']].append(lines[-1]['knn'])
        random.append(lines[0]['knn'])
    figure, axis = plt.subplots(figsize=(7, 4.2))
    for (method, schedule), points in sorted(scores.items()):
        x = sorted(points)
        mean = [statistics.mean(points[b]) for b in x]
        spread = [statistics.stdev(points[b]) if len(points[b]) > 1 else 0 for b in x]
        star = dict(marker='*', markersize=12, color='black') if schedule == 'none' else dict(marker='o')
        label = f'{method}, {"uncompressed" if schedule == "none" else schedule}'
        axis.errorbar([1e3 * b for b in x], mean, spread, capsize=3, label=label, **star)
    axis.axhline(statistics.mean(random), color='gray', linestyle=':', label='random network')
    axis.set(xscale='log', xlabel='training budget (thousands of units; 1 unit = one uncompressed sample)', ylabel='20-NN accuracy, uncompressed (%)')
    ticks = sorted({1e3 * b for points in scores.values() for b in points})
    axis.set_xticks(ticks, [f'{t:g}' for t in ticks])
    axis.minorticks_off()
    axis.legend()
    return figure


def gradstats(paths):
    """Squared bias, cost-adjusted variance and CA-MSE per strategy over progress, as fractions of the true gradient's
    squared norm; a row of panels for each metric in the file."""
    metrics = list(dict.fromkeys(row['metric'] for row in read(paths[0])))
    figure, grid = plt.subplots(len(metrics), 3, figsize=(14, 4 * len(metrics)), sharex=True, squeeze=False, layout='constrained')
    for axes, metric in zip(grid, metrics):
        rows = load_table(paths[0], metric)
        noise = sorted({row['progress'] for row in rows if row['norm2'] <= row['norm2_sem']})
        if noise:
            print(f'left out, the true gradient is lost in noise: {metric}, progress {noise}')
        rows = [row for row in rows if row['progress'] not in noise]
        strategies = sorted({row['strategy'] for row in rows}, key=lambda s: -next(r['cost'] for r in rows if r['strategy'] == s))
        for i, strategy in enumerate(strategies):
            mine = sorted((row for row in rows if row['strategy'] == strategy), key=lambda row: row['progress'])
            x, color = [row['progress'] for row in mine], plt.cm.viridis(i / max(1, len(strategies) - 1))
            columns = (
                ([row['bias2'] / row['norm2'] for row in mine], [row['bias2_sem'] / row['norm2'] for row in mine]),
                ([row['cost'] * row['variance'] / row['norm2'] for row in mine], [row['cost'] * row['variance_sem'] / row['norm2'] for row in mine]),
                ([cost_adjusted_mse(row['bias2'], row['variance'], row['cost']) / row['norm2'] for row in mine],
                 [math.hypot(row['bias2_sem'], row['cost'] * row['variance_sem']) / row['norm2'] for row in mine]))
            for axis, (y, error) in zip(axes, columns):
                axis.errorbar(x, y, error, marker='o', capsize=2, color=color, label=f'{strategy} (cost {mine[0]["cost"]:.2f})')
        for axis, title in zip(axes, ('squared bias', 'cost-adjusted variance', 'CA-MSE')):
            axis.set(title=f'{title}, {metric} metric', yscale='symlog' if title == 'squared bias' else 'log')
        axes[0].set_ylabel('fraction of the squared norm\nof the true gradient')
        axes[2].legend(fontsize=8, loc='center left', bbox_to_anchor=(1, 0.5))
    for axis in grid[-1]:
        axis.set_xlabel('progress')
    return figure


def cost(paths):
    """c(tau) over drop rate x patch size; beside it the measured costs of a gradstats.jsonl against the analytic ones."""
    sizes, rates = (16, 20, 24, 30, 40, 48), [i / 10 for i in range(10)]
    table = [[sample_cost('moco', dict(img_size=240, embed_dim=768, depth=12), Compression(p, r), Compression(16),
                          projector=(768, 4096, 4096, 256), predictor=(256, 4096, 256)) for p in sizes] for r in rates]
    figure, axes = plt.subplots(1, 1 + bool(paths), figsize=(6 + 5 * bool(paths), 4.6), squeeze=False)
    axis = axes[0][0]
    axis.imshow(table, aspect='auto', cmap='viridis')
    for i, row in enumerate(table):
        for j, value in enumerate(row):
            axis.text(j, i, f'{value:.2f}', ha='center', va='center', fontsize=8, color='black' if value > 0.5 else 'white')
    axis.set_xticks(range(len(sizes)), sizes)
    axis.set_yticks(range(len(rates)), rates)
    axis.set(xlabel='patch size', ylabel='drop rate', title='sample cost, MoCo-v3 ViT-B at 240 px (FLOPs)')
    if paths:
        rows = {row['strategy']: row for row in read(paths[0])}.values()
        if all(row['cost'] == row['cost_analytic'] for row in rows):
            sys.exit(f'figures.py: error: the costs of {paths[0]} are analytic; measure them by train.py --cost measured')
        axis = axes[0][1]
        axis.plot([0, 1], [0, 1], color='gray', linestyle=':')
        for row in rows:
            axis.plot(row['cost_analytic'], row['cost'], 'o', color='C0')
            axis.annotate(row['strategy'], (row['cost_analytic'], row['cost']), fontsize=8, xytext=(4, -8), textcoords='offset points')
        axis.set(xlabel='analytic cost', ylabel='measured cost', title=Path(paths[0]).parent.name)
    return figure


def schedule(paths):
    """Tokens of the gradient's branch, and accuracy, over the budget of a run."""
    lines = read(Path(paths[0]) / 'log.jsonl')
    steps, scores = [line for line in lines if 'loss' in line], [line for line in lines if 'knn' in line]
    figure, axis = plt.subplots(figsize=(7, 4.2))
    units = [line['units'] / 1e3 for line in steps]
    axis.step(units, [line['tokens'] for line in steps], where='post', color='C0')
    names = [str(Compression(line['patch_size'], line['drop_rate'])) for line in steps]
    for i, name in enumerate(names):
        if i == 0 or name != names[i - 1]:
            axis.annotate(name, (units[i], steps[i]['tokens']), xytext=(4, 4), textcoords='offset points', color='C0')
    axis.set(xlabel='spent budget (thousands of units)', ylabel='tokens of the branch with gradient',
             ylim=(0, 1.15 * max(line['tokens'] for line in steps)))
    right = axis.twinx()
    right.plot([line['units'] / 1e3 for line in scores], [line['knn'] for line in scores], 'o--', color='C1')
    right.set_ylabel('20-NN accuracy, uncompressed (%)', color='C1')
    return figure


def predict(paths):
    """What training on gave, against the CA-MSE measured before, both relative to the best strategy of the fork state."""
    forks = defaultdict(list)
    for line in read(paths[0] if paths else ROOT / 'experiments' / 'results' / 'predict.jsonl'):
        forks[line['source'], line['point'], line['seed']].append(line)
    strategies = [line['strategy'] for line in next(iter(forks.values()))]
    figure, axes = plt.subplots(1, 4, figsize=(15, 4), sharex=True, sharey=True)
    for axis, (metric, source) in zip(axes, [(m, s) for m in ('euclidean', 'adam') for s in ('p4', 'p8')]):
        for fork, lines in forks.items():
            if fork[0] == source:
                rows = [next(row for row in line['before'] if row['metric'] == metric) for line in lines]
                errors = [cost_adjusted_mse(row['bias2'], row['variance'], row['cost']) for row in rows]
                least = min(line['loss'] for line in lines)
                for line, error in zip(lines, errors):
                    axis.plot(error / min(errors), line['loss'] - least, 'o', color=f'C{strategies.index(line["strategy"])}')
        axis.set(title=f'{metric} metric,\nmeasured along a {source} run', xlabel='CA-MSE / that of the choice', xscale='log')
        axis.set_xticks([1, 2, 4, 8], ['1', '2', '4', '8'])
        axis.minorticks_off()
    for i, strategy in enumerate(strategies):
        axes[-1].plot([], [], 'o', color=f'C{i}', label=strategy)
    axes[0].set_ylabel('uncompressed loss after training on,\nabove that of the best')
    axes[-1].legend(loc='center left', bbox_to_anchor=(1, 0.5))
    return figure


def decay(paths):
    """Cosine and polynomial learning-rate decay."""
    x = [i / 200 for i in range(201)]
    figure, axis = plt.subplots(figsize=(6, 3.8))
    axis.plot(x, [cosine(p) for p in x], label='cosine')
    axis.plot(x, [polynomial(p) for p in x], label='polynomial, 1 - p^2')
    axis.set(xlabel='progress', ylabel='learning rate / peak')
    axis.legend()
    return figure


if __name__ == '__main__':
    figures = dict(budgets=budgets, gradstats=gradstats, cost=cost, schedule=schedule, predict=predict, decay=decay)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('figure', choices=figures)
    parser.add_argument('paths', nargs='*', help='runs or gradstats.jsonl files')
    parser.add_argument('-o', '--output')
    args = parser.parse_args()
    if not args.paths and args.figure in ('budgets', 'gradstats', 'schedule'):
        parser.error(f'{args.figure} needs the path of a run')
    output = args.output or ROOT / 'experiments' / 'results' / f'{args.figure}.png'
    figures[args.figure](args.paths).savefig(output, dpi=130, bbox_inches='tight')
    print(output)
