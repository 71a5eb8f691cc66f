"""The paper's experiments at a chosen scale: runs train.py over a grid, several seeds, and prints the table.

    python experiments/reproduce.py constants --seeds 0 1 2 -- --dataset fashion_mnist --data-root data
    python experiments/reproduce.py objectives --seeds 0 1 2 --eval "--protocol linear finetune --limit 10000" \\
        -- --dataset fashion_mnist --data-root data

Everything after -- goes to train.py. A run that has finished is not run again, and serves every experiment that has it, so
an interrupted study goes on where it was. --jobs N runs N at a time, each with one thread. --eval scores every backbone by
eval.py with these flags. The table is printed, and written with the command to experiments/results/NAME-DATASET.md.

budgets     MoCo-v3, uncompressed and in two stages, over budgets (paper: accuracy over budget)
objectives  MoCo-v3, SimCLR, DINO: uncompressed and compressed (paper: table of NN, LP, FT, ImageNet-1k)
constants   MoCo-v3: constant strategies and auto (paper: curves over the budget)
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


def runs_of(method, schedules, *flags):
    return [(' '.join((method, schedule, *flags[1::2])), ['--method', method, '--schedule', schedule, *flags]) for schedule in schedules]


EXPERIMENTS = {
    'budgets': runs_of('moco', ('none', 'p8@0,p4@0.7')),
    'objectives': [run for method in ('moco', 'simclr', 'dino') for run in runs_of(method, ('none', 'auto'))],
    'constants': runs_of('moco', ('none', 'p4-drop0.50', 'p8', 'p8-drop0.50', 'auto')),
    'decay': [run for decay in ('cosine', 'polynomial') for run in runs_of('moco', ('none', 'p8'), '--lr-schedule', decay)],
}


def call(script, flags, threads):
    environment = {**os.environ, 'OMP_NUM_THREADS': str(threads)} if threads else None
    done = subprocess.run([sys.executable, str(ROOT / script), *flags], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f'{script} {shlex.join(flags)}: {done.stderr.splitlines()[-1]}')
    return done.stdout.splitlines()[-1]


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def train(name, flags, eval_flags, threads):
    """The numbers of a run's row; it is trained and scored first if it has not been."""
    folder = Path('runs') / name
    if not folder.exists():
        print(f'{name}: {call("train.py", ["--name", name, *flags], threads)}', flush=True)
    lines = read_lines(folder / 'log.jsonl')
    scores = [line for line in lines if 'knn' in line]
    steps = [line for line in lines if 'loss' in line]
    if not scores or scores[-1]['progress'] < 1:
        raise RuntimeError(f'{folder} has not finished; resume or remove it')
    row = {'samples': steps[-1]['samples'], '20-NN %': scores[-1]['knn'], 'NN %': scores[-1]['nn'], 'random network, 20-NN %': scores[0]['knn'],
           'seconds': steps[-1]['seconds']}
    if eval_flags:
        if not (folder / 'eval.jsonl').exists():
            root = flags[flags.index('--data-root'):][:2] if '--data-root' in flags else []
            call('eval.py', ['--weights', str(folder / 'backbone.pt'), *root, *eval_flags], threads)
        for line in read_lines(folder / 'eval.jsonl'):
            row[f'{line["protocol"]} at p{line["patch_size"]} %'] = line['score']
    return row


def mean_and_spread(values, digits=2):
    spread = f' +- {statistics.stdev(values):.{digits}f}' if len(values) > 1 else ''
    return f'{statistics.mean(values):.{digits}f}{spread}'


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('experiment', choices=EXPERIMENTS)
    parser.add_argument('--seeds', type=int, nargs='+', default=[0])
    parser.add_argument('--budgets', type=float, nargs='+', default=[0.025], help='millions of units')
    parser.add_argument('--jobs', type=int, default=1, help='runs at a time; more than one: one thread each')
    parser.add_argument('--eval', type=shlex.split, default=[], metavar='FLAGS', help='of eval.py, in quotes')
    argv = sys.argv[1:]
    split = argv.index('--') if '--' in argv else len(argv)
    args, flags = parser.parse_args(argv[:split]), argv[split + 1:]
    dataset = flags[flags.index('--dataset') + 1] if '--dataset' in flags else 'shapes'

    jobs = {}
    with ThreadPoolExecutor(args.jobs) as pool:
        for seed in args.seeds:
            for budget in args.budgets:
                for label, own in EXPERIMENTS[args.experiment]:
                    name = f'{dataset}-{label.replace(" ", "-").replace(",", "_")}-{budget:g}M-seed{seed}'
                    run = [*flags, *own, '--budget', str(budget), '--seed', str(seed)]
                    jobs[label, budget, seed] = pool.submit(train, name, run, args.eval, 1 if args.jobs > 1 else None)

    table = []
    for budget in args.budgets:
        for label, _ in EXPERIMENTS[args.experiment]:
            rows = [jobs[label, budget, seed].result() for seed in args.seeds]
            columns = list(rows[0])
            cells = [mean_and_spread([row[key] for row in rows], 0 if key in ('samples', 'seconds') else 2) for key in columns]
            table.append(f'| {label} | {budget * 1e6:,.0f} | {" | ".join(cells)} |')
    head = ['run', 'budget (units)', *columns]
    command = f'python experiments/reproduce.py {shlex.join(argv)}'
    text = f'`{command}`\n\nMean +- standard deviation over seeds {args.seeds}.\n\n' + '\n'.join(
        [f'| {" | ".join(head)} |', '|---' * len(head) + '|', *table]) + '\n'
    print(text)
    (ROOT / 'experiments' / 'results' / f'{args.experiment}-{dataset}.md').write_text(text)


if __name__ == '__main__':
    main()
