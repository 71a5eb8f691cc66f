"""The figures of the README, from experiments/results/runs.jsonl.

    python experiments/figures.py headline   # accuracy over budget
    python experiments/figures.py decay      # two decays of the learning rate

Each is written to experiments/results/NAME.png, or to what -o says. pictures.py
draws single runs.
"""
import math
import statistics
from pathlib import Path

from tables import RESULTS, TITLES, best_of, crossing, load_results, random_score, select
from tables import speed_up_text, speed_ups
from reproduce import DYNAMIC, STUDIES, UNCOMPRESSED
from commandline import Parser, fail
from pictures import looks, new_figure, save_figure
from schedule import cosine, polynomial
from weights import quoted

LOOKS = looks(['none', DYNAMIC, 'p8', 'p8-drop0.50'])    # in the colours of gradstats.png
ARROW = 'p8'                           # the strategy whose speed-up is drawn, on every data set


def mean_curve(runs):
    """[(units, mean 20-NN, standard deviation over seeds)] of {budget: {seed: record}}."""
    curve = []
    for by_seed in runs.values():
        units = statistics.mean(run['units'] for run in by_seed.values())
        scores = [run['knn'] for run in by_seed.values()]
        spread = statistics.stdev(scores) if len(scores) > 1 else math.nan     # draws no band
        curve.append((units, statistics.mean(scores), spread))
    return curve


def draw_curve(axis, curve, name, look):
    units, means, spreads = zip(*curve)
    low = [mean - spread for mean, spread in zip(means, spreads)]
    high = [mean + spread for mean, spread in zip(means, spreads)]
    axis.plot(units, means, label=name, **look)
    axis.fill_between(units, low, high, color=look['color'], alpha=0.2, linewidth=0)
    for x, mean, spread in curve:
        if math.isnan(spread):         # one seed: an open marker
            axis.plot(x, mean, markerfacecolor='white', **look)


def draw_speed_up(axis, base, fast):
    """An arrow from the longest uncompressed runs with all seeds to where `fast` is as accurate.

    base, fast: {budget: {seed: record}}. The factor is that of the table, a mean over seeds; the
    arrow is drawn between the mean curves.
    """
    most = max(map(len, base.values()))
    budget = max(budget for budget, by_seed in base.items() if len(by_seed) == most)
    start, accuracy, _ = mean_curve({budget: base[budget]})[0]
    curve = mean_curve(fast)
    end = crossing([(units, mean) for units, mean, _ in curve], accuracy)
    if end == math.inf:
        return
    end = max(end, curve[0][0])        # the start, if that is better already
    color = LOOKS[ARROW]['color']
    arrow = dict(arrowstyle='->', color=color, linestyle='--')
    axis.annotate('', (end, accuracy), (start, accuracy), arrowprops=arrow)
    factors = speed_up_text(speed_ups(base, fast, budget, 'units'))
    # on the right and below all curves, which rise
    axis.text(0.97, 0.12, f'{factors} times fewer', transform=axis.transAxes, color=color,
              horizontalalignment='right')


def draw_panel(axis, records, dataset):
    """The curves of one data set, those of them that have runs."""
    runs = {row.schedule: select(records, dataset, row) for row in STUDIES['headline'].rows}
    runs = {schedule: by_budget for schedule, by_budget in runs.items() if by_budget}
    for schedule, by_budget in runs.items():
        name = 'uncompressed' if schedule == 'none' else schedule
        draw_curve(axis, mean_curve(by_budget), name, LOOKS[schedule])
    base = runs.get('none')
    best = best_of(records, dataset, UNCOMPRESSED)
    if best:
        look = dict(LOOKS['none'], linestyle='--', marker='*', markersize=9)
        draw_curve(axis, mean_curve(best), 'uncompressed, best recipe', look)
        base = best
    if base and ARROW in runs:
        draw_speed_up(axis, base, runs[ARROW])
    axis.set(title=TITLES[dataset], xlabel='budget, million units')

    random = random_score(records, dataset)
    if random:
        axis.axhline(random, color='0.4', linestyle=':', label='random network')
    ticks = {}                         # position: label
    last = 0
    for budget in sorted({budget for by_budget in runs.values() for budget in by_budget}):
        apart = budget > 3 * last      # closer labels would touch
        ticks[1e6 * budget] = f'{budget:g}' if apart else ''
        last = budget if apart else last
    if ticks:
        axis.set_xscale('log')
        axis.set_xticks(list(ticks), ticks.values())
        axis.minorticks_off()


def headline(path):
    """20-NN accuracy over budget on three data sets, mean and spread over seeds."""
    records = load_results(path)
    figure = new_figure(height=3.6)
    axes = figure.subplots(1, len(TITLES))
    handles = {}
    for axis, dataset in zip(axes, TITLES):
        draw_panel(axis, records, dataset)
        for handle, name in zip(*axis.get_legend_handles_labels()):
            handles[name] = handle
    axes[0].set_ylabel('20-NN accuracy, %')
    figure.legend(handles.values(), handles.keys(), loc='outside lower center', ncols=3,
                  columnspacing=1.2)
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
