"""The figures of the README, from experiments/results/runs.jsonl.

    python experiments/figures.py headline   # accuracy over budget
    python experiments/figures.py decay      # two decays of the learning rate

Each is written to experiments/results/NAME.png, or to what -o says. pictures.py
draws single runs.
"""
import math
import statistics
from pathlib import Path

from tables import RESULTS, TITLES, crossing, load_results, random_score, select
from reproduce import STUDIES
from commandline import Parser, fail
from pictures import looks, new_figure, save_figure
from schedule import cosine, polynomial
from weights import quoted

LOOKS = looks([row.schedule for row in STUDIES['headline'].rows])


def mean_curve(runs):
    """[(units, mean 20-NN, standard deviation over seeds)] of {budget: {seed: record}}."""
    curve = []
    for by_seed in runs.values():
        units = statistics.mean(run['units'] for run in by_seed.values())
        scores = [run['knn'] for run in by_seed.values()]
        spread = statistics.stdev(scores) if len(scores) > 1 else 0.0
        curve.append((units, statistics.mean(scores), spread))
    return curve


def draw_curve(axis, curve, name, look):
    units, means, spreads = zip(*curve)
    low = [mean - spread for mean, spread in zip(means, spreads)]
    high = [mean + spread for mean, spread in zip(means, spreads)]
    axis.plot(units, means, label=name, **look)
    axis.fill_between(units, low, high, color=look['color'], alpha=0.2, linewidth=0)


def reached_at(curve, accuracy):
    """(units at which a curve has an accuracy, '>' if its shortest run is better already)."""
    units = crossing([(units, mean) for units, mean, _ in curve], accuracy)
    return (curve[0][0], '> ') if units == -math.inf else (units, '')


def draw_speed_up(axis, base, fast, color):
    """An arrow from the longest uncompressed run to where the other curve has its accuracy."""
    units, target, _ = base[-1]
    reached, sign = reached_at(fast, target)
    if reached == math.inf:
        return
    arrow = dict(arrowstyle='->', color=color, linestyle='--')
    axis.annotate('', (reached, target), (units, target), arrowprops=arrow)
    axis.annotate(f'{sign}{units / reached:.1f} x less', (reached, target), xytext=(4, -11),
                  textcoords='offset points', color=color)


def draw_panel(axis, records, dataset):
    """The curves of one data set, those of them that have runs."""
    curves = {}
    for row in STUDIES['headline'].rows:
        curve = mean_curve(select(records, dataset, row))
        if curve:
            curves[row.schedule] = curve
            name = 'uncompressed' if row.schedule == 'none' else row.schedule
            draw_curve(axis, curve, name, LOOKS[row.schedule])
    base = curves.pop('none', None)
    if base and curves:
        # the one that needs least for the accuracy of the longest uncompressed run
        best = min(curves, key=lambda name: reached_at(curves[name], base[-1][1]))
        draw_speed_up(axis, base, curves[best], LOOKS[best]['color'])
    axis.set(title=TITLES[dataset], xlabel='budget, million units')

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
    """20-NN accuracy over budget on three data sets, mean and spread over seeds."""
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
