"""The figures of the README, from experiments/results/runs.jsonl.

    python experiments/figures.py headline     # accuracy over budget on three data sets
    python experiments/figures.py decay        # the two decays of the learning rate

Each is written to experiments/results/NAME.png, or to what -o says. pictures.py draws single runs.
"""
import math
import statistics
from pathlib import Path

from tables import RESULTS, TITLES, crossing, load_results, random_score, select
from reproduce import STUDIES
from commandline import Parser, fail
from pictures import PALETTE, new_figure, save_figure
from schedule import cosine, polynomial
from weights import quoted

LOOKS = {
    'uncompressed': dict(color=PALETTE[0], marker='o'),
    'best constant strategy': dict(color=PALETTE[2], marker='s'),
    'dynamic schedule': dict(color=PALETTE[1], marker='^'),
}


def mean_curve(runs):
    """[(units, mean 20-NN, standard deviation over seeds)] of {budget: {seed: record}}."""
    curve = []
    for by_seed in runs.values():
        units = statistics.mean(run['units'] for run in by_seed.values())
        scores = [run['knn'] for run in by_seed.values()]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        curve.append((units, statistics.mean(scores), spread))
    return curve


def best_constant(records, dataset, rows):
    """(strategy, curve) of the constant strategy with the best mean score over its budgets."""
    curves = {}
    for row in rows:
        runs = select(records, dataset, row)
        if runs:
            curves[row.schedule] = mean_curve(runs)
    if not curves:
        return None, []
    # over the budgets that all of them have, or the strategy with the longest run would win
    shared = min(len(curve) for curve in curves.values())

    def mean_score(name):
        return statistics.mean(score for _, score, _ in curves[name][:shared])

    best = max(curves, key=mean_score)
    return best, curves[best]


def draw_curve(axis, curve, name):
    units, means, spreads = zip(*curve)
    low = [mean - spread for mean, spread in zip(means, spreads)]
    high = [mean + spread for mean, spread in zip(means, spreads)]
    axis.plot(units, means, label=name, **LOOKS[name])
    axis.fill_between(units, low, high, color=LOOKS[name]['color'], alpha=0.2, linewidth=0)


def draw_speed_up(axis, base, fast, color):
    """An arrow from the longest uncompressed run to where the other curve has its accuracy."""
    units, target, _ = base[-1]
    reached = crossing([(x, y) for x, y, _ in fast], target)
    if reached == math.inf:
        return
    sign = ''
    if reached == -math.inf:           # the shortest run is better already
        reached = fast[0][0]
        sign = '> '
    arrow = dict(arrowstyle='->', color=color, linestyle='--')
    axis.annotate('', (reached, target), (units, target), arrowprops=arrow)
    middle = math.sqrt(reached * units)
    axis.annotate(f'{sign}{units / reached:.1f} x less', (middle, target), xytext=(0, -11),
                  textcoords='offset points', ha='center', color=color)


def draw_panel(axis, records, dataset):
    """The curves of one data set, those of them that have runs."""
    none, *constants, dynamic = STUDIES['headline'].rows
    base = mean_curve(select(records, dataset, none))
    fast = mean_curve(select(records, dataset, dynamic))
    strategy, constant = best_constant(records, dataset, constants)
    for curve, name in zip((base, constant, fast), LOOKS):
        if curve:
            draw_curve(axis, curve, name)
    if base and (fast or constant):
        # from the better one of the two curves at its end
        _, name, curve = max((curve[-1][1], name, curve)
                             for curve, name in zip((constant, fast), list(LOOKS)[1:]) if curve)
        draw_speed_up(axis, base, curve, LOOKS[name]['color'])
    title = TITLES[dataset]
    if strategy:
        title += f'\nbest constant: {strategy}'
    axis.set(title=title, xlabel='budget, million units')

    random = random_score(records, dataset)
    if random:
        axis.axhline(random, color='0.4', linestyle=':', label='random network')
    budgets = {record['budget'] for record in records
               if (record['dataset'], record['study']) == (dataset, 'headline')}
    if budgets:
        axis.set_xscale('log')
        axis.set_xticks([1e6 * budget for budget in budgets], [f'{b:g}' for b in budgets])
        axis.minorticks_off()


def headline(path):
    """20-NN accuracy over budget on three data sets: uncompressed, best constant, dynamic."""
    records = load_results(path)
    figure = new_figure(height=3.4)
    axes = figure.subplots(1, len(TITLES))
    handles = {}
    for axis, dataset in zip(axes, TITLES):
        draw_panel(axis, records, dataset)
        for handle, name in zip(*axis.get_legend_handles_labels()):
            handles[name] = handle
    axes[0].set_ylabel('20-NN accuracy, uncompressed, %')
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=4)
    return figure


def decay(path):
    """Cosine and polynomial decay of the learning rate over progress."""
    progress = [i / 200 for i in range(201)]
    figure = new_figure(height=2.6, width=4)
    axis = figure.subplots()
    axis.plot(progress, [cosine(p) for p in progress], label='cosine')
    axis.plot(progress, [polynomial(p) for p in progress], label='polynomial, 1 - p^2')
    axis.set(xlabel='progress p', ylabel='learning rate / peak')
    axis.legend()
    return figure


def main(argv=None):
    figures = dict(headline=headline, decay=decay)
    parser = Parser(__doc__)
    parser.add_argument('figure', choices=figures)
    parser.add_argument('--results', type=Path, default=RESULTS)
    parser.add_argument('-o', '--output', type=Path, help='the PNG to write')
    args = parser.parse_args(argv)
    output = args.output or RESULTS.with_name(f'{args.figure}.png')
    try:
        save_figure(figures[args.figure](args.results), output)
    except (ValueError, OSError) as error:
        fail(f'figures.py: error: {error}')
    print(quoted(output))


if __name__ == '__main__':
    main()
