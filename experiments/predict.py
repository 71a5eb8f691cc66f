"""Does the measured gradient error predict which strategy trains best?

    python experiments/predict.py run --seeds 0 1 2 --jobs 2 -- --dataset fashion_mnist --data-root data --budget 0.025
    python experiments/predict.py table

From checkpoints of runs under each SOURCE strategy, at each of POINTS of the budget, training goes on under each of STRATEGIES
for the same further share of it, MORE. Then 20-NN accuracy and the uncompressed loss (both with all tokens) tell which
strategy was best in fact. Three predictions of that order, each for several horizons H and both metrics:

    along p4    CA-MSE measured in the uncompressed run at the checkpoint (the paper's procedure)
    along p8    the same in the run at patch 8, for the order of its own continuations (what --schedule auto does)
    adapted     from the uncompressed checkpoint, after ADAPT of the budget under the strategy that is judged (each then has
                weights of its own, and a norm^2 too noisy to divide by: the plain CA-MSE)

`run` writes a line per continuation to experiments/results/predict.jsonl, and goes on where it was interrupted; `table`
prints Spearman's rank correlation of predicted and real order, mean and spread over seeds and points, and writes predict.md.
"""
import argparse
import json
import math
import shlex
import shutil
import statistics
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import data as datasets  # noqa: E402
import train  # noqa: E402
from eval import knn_accuracy  # noqa: E402
from reproduce import call, read_lines  # noqa: E402
from schedule import cost_adjusted_mse  # noqa: E402

SOURCES, POINTS = ('p4', 'p8'), (0.2, 0.5)
STRATEGIES = ('p4', 'p4-drop0.50', 'p8', 'p8-drop0.50', 'p16')
MORE, ADAPT, HORIZONS = 0.1, 0.02, (1, 4, 16, 64)
RESULTS = ROOT / 'experiments' / 'results'


def read_checkpoint(folder):
    return torch.load(folder / 'checkpoint.pt', weights_only=True)


def steps_for(checkpoint, strategy, share):
    """Steps under a strategy that cost this share of the budget."""
    args = checkpoint['args']
    return math.ceil(share * args['budget'] * 1e6 / args['batch_size'] / checkpoint['cost'][strategy])


def prefix(source, seed, flags, threads):
    """Folders of the run's states at POINTS, each with the errors measured there."""
    run, folders = f'predict-{source}-seed{seed}', []
    common = ['--name', run, '--schedule', source, '--seed', str(seed), '--grid', ','.join(STRATEGIES), '--metric', 'euclidean', 'adam',
              '--gradstats', ','.join(map(str, POINTS)), '--eval-every', '2', *flags]
    for point in POINTS:
        folder = Path('runs') / f'{run}-at{point}'
        if not folder.exists():
            if not (Path('runs') / run).exists():
                call('train.py', [*common, '--max-steps', '1'], threads)  # tells the costs
            steps = steps_for(read_checkpoint(Path('runs') / run), source, point) + 1  # measured at the start of the last
            call('train.py', ['--resume', f'runs/{run}', '--max-steps', str(steps)], threads)
            shutil.copytree(Path('runs') / run, folder)
        folders.append(folder)
    return folders


def branch(folder, source, point, seed, strategy, flags, threads):
    """Goes on from a state under another strategy; a line of predict.jsonl."""
    run = Path('runs') / f'{folder.name}-{strategy}'
    if run.exists():
        shutil.rmtree(run)
    shutil.copytree(folder, run)
    (run / 'gradstats.jsonl').write_text('')
    state = read_checkpoint(run)
    progress = state['units'] / state['args']['budget'] / 1e6
    state['stages'] = [(0.0, source), (progress, strategy)] if strategy != source else [(0.0, source)]
    state['points'] = [progress + ADAPT] if source == SOURCES[0] else []
    state['args'].update(grid=strategy, probe_batches=16, metric=['euclidean', 'adam'])
    train.save(state, run / 'checkpoint.pt')
    call('train.py', ['--resume', str(run), '--max-steps', str(state['step'] + steps_for(state, strategy, MORE))], threads)
    before = [r for r in read_lines(folder / 'gradstats.jsonl') if r['strategy'] == strategy and r['progress'] == point]
    after = [r for r in read_lines(run / 'gradstats.jsonl') if r['strategy'] == strategy]
    result = dict(flags=shlex.join(flags), source=source, point=point, seed=seed, strategy=strategy, **quality(run), before=before, adapted=after)
    shutil.rmtree(run)
    return result


@torch.no_grad()
def quality(run):
    """20-NN accuracy and loss of a run's last state, uncompressed, on fixed images and views."""
    state = read_checkpoint(run)
    args = argparse.Namespace(**state['args'])
    data = datasets.load(args.dataset, args.data_root)
    method = train.build_method(args, train.build_encoder(args, data.channels))
    method.load_state_dict(state['method'])
    knn = knn_accuracy(method.encoder, data, args.img_size, torch.device('cpu'), bank_limit=5_000, query_limit=5_000)[0][20]
    recipe = datasets.recipe(args.method, args.img_size < 64, args.local_crops)
    keys = [[(0, i) for i in torch.randperm(len(data), generator=datasets.keyed_generator('loss', k))[:args.batch_size].tolist()] for k in range(16)]
    losses = []
    for k, images in enumerate(data.batches(keys, recipe, None, 0, 'cpu')):
        generator = datasets.keyed_generator('loss views', k)
        views = datasets.make_views(images, recipe, [args.local_size if v.local else args.img_size for v in recipe], generator)
        losses.append(method([datasets.normalize(v, data.mean, data.std) for v in views], args.patch_size, 0.0, generator)[0].item())
    return dict(knn=knn, loss=statistics.mean(losses))


def run(args, flags):
    threads = 1 if args.jobs > 1 else None
    path = RESULTS / 'predict.jsonl'
    done = read_lines(path) if path.exists() else []
    if any(r['flags'] != shlex.join(flags) for r in done):
        sys.exit(f'predict.py: error: {path} holds a study with other flags, {done[0]["flags"]}; move it away first')
    done = {(r['source'], r['point'], r['seed'], r['strategy']) for r in done}
    torch.set_num_threads(threads or torch.get_num_threads())

    def study(source, seed):
        if {(source, point, seed, strategy) for point in POINTS for strategy in STRATEGIES} <= done:
            return
        for folder, point in zip(prefix(source, seed, flags, threads), POINTS):
            for strategy in STRATEGIES:
                if (source, point, seed, strategy) not in done:
                    line = branch(folder, source, point, seed, strategy, flags, threads)
                    with open(path, 'a') as file:
                        file.write(json.dumps(line) + '\n')
                    print(f'{source} seed {seed} at {point}, on with {strategy}: 20-NN {line["knn"]:.2f} %, loss {line["loss"]:.3f}', flush=True)

    with ThreadPoolExecutor(args.jobs) as pool:
        for job in [pool.submit(study, source, seed) for seed in args.seeds for source in SOURCES]:
            job.result()


def spearman(a, b):
    """Rank correlation; ties share their mean rank."""
    def ranks(values):
        return [sum(v < x for v in values) + (sum(v == x for v in values) - 1) / 2 for x in values]
    a, b = ranks(a), ranks(b)
    return statistics.correlation(a, b) if len(set(a)) > 1 and len(set(b)) > 1 else 0.0


def table():
    lines = read_lines(RESULTS / 'predict.jsonl')
    forks = {}
    for line in lines:
        forks.setdefault((line['source'], line['point'], line['seed']), {})[line['strategy']] = line
    forks = {key: branches for key, branches in forks.items() if len(branches) == len(STRATEGIES)}
    seeds = sorted({seed for _, _, seed in forks})
    out = [f'Fork states: {len(forks)}, seeds {seeds}. What training on gave (mean and standard deviation over seeds):', '']
    for source in SOURCES:
        for point in POINTS:
            group = [branches for (s, p, _), branches in forks.items() if (s, p) == (source, point)]
            if len(group) > 1:
                out += [f'From the {source} run at {point:.0%}, {MORE:.0%} more of the budget:', '',
                        '| on with | 20-NN % | uncompressed loss | CA-MSE, euclidean | CA-MSE, adam |', '|---|---|---|---|---|']
                for strategy in STRATEGIES:
                    cells = [cell([b[strategy]['knn'] for b in group]), cell([b[strategy]['loss'] for b in group], 3)]
                    cells += [cell([error(b[strategy], 'before', metric, 1) for b in group]) for metric in ('euclidean', 'adam')]
                    out.append(f'| {strategy} | {" | ".join(cells)} |')
                out.append('')
    out += ["Spearman's rank correlation of predicted and real order (1: the same, 0: none), mean and standard deviation over seeds and points:", '',
            '| measured | metric | H | states | with 20-NN | with the loss | 20-NN of the choice, points below the best |', '|---|---|---|---|---|---|---|']
    for label, source, when in (('along p4', 'p4', 'before'), ('along p8', 'p8', 'before'), ('adapted', 'p4', 'adapted')):
        for metric in ('euclidean', 'adam'):
            group = [branches for (s, _, _), branches in forks.items() if s == source
                     and all(metric in [row['metric'] for row in line[when]] for line in branches.values())]
            for h in HORIZONS:
                with_knn, with_loss, regret = [], [], []
                for b in group:
                    predicted = [error(b[s], when, metric, h) for s in STRATEGIES]
                    knn = [b[s]['knn'] for s in STRATEGIES]
                    with_knn.append(spearman(predicted, [-k for k in knn]))
                    with_loss.append(spearman(predicted, [b[s]['loss'] for s in STRATEGIES]))
                    regret.append(max(knn) - knn[predicted.index(min(predicted))])
                out.append(f'| {label} | {metric} | {h} | {len(group)} | {cell(with_knn)} | {cell(with_loss)} | {cell(regret)} |')
    text = '\n'.join(out) + '\n'
    print(text)
    (RESULTS / 'predict.md').write_text('`python experiments/predict.py table`, from predict.jsonl\n\n' + text)


def error(line, when, metric, horizon):
    row = next(r for r in line[when] if r['metric'] == metric)
    return cost_adjusted_mse(row['bias2'], row['variance'], row['cost'], horizon) / (row['norm2'] if when == 'before' else 1)


def cell(values, digits=2):
    return f'{statistics.mean(values):.{digits}f} +- {statistics.stdev(values):.{digits}f}' if len(values) > 1 else f'{values[0]:.{digits}f}'


if __name__ == '__main__':
    argv = sys.argv[1:]
    split = argv.index('--') if '--' in argv else len(argv)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('what', choices=('run', 'table'))
    parser.add_argument('--seeds', type=int, nargs='+', default=[0, 1, 2])
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; more than one: one thread each')
    arguments = parser.parse_args(argv[:split])
    run(arguments, argv[split + 1:]) if arguments.what == 'run' else table()
