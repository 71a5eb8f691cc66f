"""The paper's experiments at a chosen scale: runs train.py over a grid, several seeds, and prints the table.

    python experiments/reproduce.py objectives --seeds 0 1 2 -- --dataset fashion_mnist --data-root data --budget 0.05
    python experiments/reproduce.py constants --budgets 0.02 0.05 0.1 -- --dataset fashion_mnist --data-root data

Everything after -- goes to train.py. A run that has finished is not run again, so an interrupted study goes on
where it was. --jobs N runs N at a time, each with one thread. The table is printed, and written with the command
to experiments/results/NAME.md.

budgets     MoCo-v3, uncompressed and compressed, over budgets (paper: accuracy over budget)
objectives  MoCo-v3, SimCLR, DINO: uncompressed and compressed (paper: table of NN, LP, FT, ImageNet-1k)
constants   constant patch sizes, constant drop rates, the stages of the default (paper: curves over the budget)
decay       cosine and polynomial learning-rate decay (paper: polynomial suits short budgets)
"""
import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
EXPERIMENTS = {
    'budgets': [(schedule, ['--schedule', schedule]) for schedule in ('none', 'two-stage')],
    'objectives': [(f'{method} {schedule}', ['--method', method, '--schedule', schedule])
                   for method in ('moco', 'simclr', 'dino') for schedule in ('none', 'two-stage')],
    'constants': [(schedule, ['--schedule', schedule]) for schedule in
                  ('none', 'p4-drop0.50', 'p4-drop0.75', 'p8', 'p8-drop0.50', 'p16', 'two-stage')],
    'decay': [(f'{schedule} {decay}', ['--schedule', schedule, '--lr-schedule', decay])
              for schedule in ('none', 'p8') for decay in ('cosine', 'polynomial')],
}


def train(name, flags, threads):
    """The last score of a run, which is trained first if it has not been."""
    log = Path('runs') / name / 'log.jsonl'
    if not log.exists():
        environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)} if threads else None
        done = subprocess.run([sys.executable, str(ROOT / 'train.py'), '--name', name, *flags], env=environment, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f'{name} failed: {done.stderr.splitlines()[-1]}')
        print(f'{name}: {done.stdout.splitlines()[-1]}', flush=True)
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    scores = [line for line in lines if 'knn' in line]
    steps = [line for line in lines if 'loss' in line]
    if not scores or scores[-1]['progress'] < 1:
        sys.exit(f'runs/{name} has not finished; resume or remove it')
    return dict(random=scores[0]['knn'], nn=scores[-1]['nn'], knn=scores[-1]['knn'], samples=steps[-1]['samples'], seconds=steps[-1]['seconds'])


def mean_and_spread(values, digits=2):
    spread = f' +- {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('experiment', choices=EXPERIMENTS)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--budgets', type=float, nargs='+', default=[0.05], help='millions of units')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; more than one: one thread each')
    argv = sys.argv[1:]
    split = argv.index('--') if '--' in argv else len(argv)
    args, flags = parser.parse_args(argv[:split]), argv[split + 1:]

    jobs = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            for budget in args.budgets:
                for label, own in EXPERIMENTS[args.experiment]:
                    name = f'{args.experiment}-{label.replace(" ", "-").replace(",", "_")}-{budget:g}M-seed{seed}'
                    run = [*flags, *own, '--budget', str(budget), '--seed', str(seed)]
                    jobs[label, budget, seed] = pool.submit(train, name, run, 1 if args.jobs > 1 else None)

    table = ['| run | budget (units) | samples | 20-NN % | NN % | random network, 20-NN % | seconds |', '|---|---|---|---|---|---|---|']
    for budget in args.budgets:
        for label, _ in EXPERIMENTS[args.experiment]:
            rows = [jobs[label, budget, seed].result() for seed in args.seeds]
            cells = [mean_and_spread([row[key] for row in rows], digits) for key, digits in
                     (('samples', 0), ('knn', 2), ('nn', 2), ('random', 2), ('seconds', 0))]
            table.append(f'| {label} | {budget * 1e6:,.0f} | {cells[0].split(" ")[0]} | {" | ".join(cells[1:])} |')
    command = f'python experiments/reproduce.py {shlex.join(argv)}'
    text = f'`{command}`\n\nMean +- standard deviation over seeds {args.seeds}.\n\n' + '\n'.join(table) + '\n'
    print(text)
    (ROOT / 'experiments' / 'results' / f'{args.experiment}.md').write_text(text)


if __name__ == '__main__':
    main()
