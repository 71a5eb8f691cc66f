"""The life of a run: its processes, its folder, how it stops and how it goes on.

A run leaves in runs/NAME/: args.json, log.jsonl (a line per log step or score), checkpoint.pt (all
that --resume needs), backbone.pt (the encoder in timm's names), curves.png and, if asked for,
gradstats.jsonl. A killed run goes on from its last checkpoint and computes the same bits: every
random draw has a key such as (seed, rank, step), so nothing depends on earlier draws.
"""
import dataclasses
import json
import math
import os
import signal
import sys
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from tqdm import tqdm

from data import STOPS, worker_error
from losses import mean_over_ranks
from weights import quoted, read

try:
    import fcntl
except ImportError:                                  # Windows: two processes can resume one run
    fcntl = None


@dataclass
class State:
    """How far a run has come. With the weights and the optimizer it is all that --resume needs."""
    step: int = 0
    samples: int = 0
    units: float = 0.0                               # spent of the budget
    seconds: float = 0.0
    seconds_data: float = 0.0                        # of these, waiting for data
    seen: float = -1.0                               # progress whose marks have been dealt with
    warned: list = field(default_factory=list)       # warnings that were said


def marks(every):
    """Points of progress 0, every, 2 every, ..., 1."""
    return [i * every for i in range(math.ceil(1 / every))] + [1.0]


# ---------------------------------------------------------------- processes

def process_numbers():
    """(rank, number of processes) that torchrun gives; (0, 1) without it."""
    world = int(os.environ.get('WORLD_SIZE') or 1)
    if world == 1:
        tasks = int(os.environ.get('SLURM_STEP_NUM_TASKS', 1))
        if tasks > 1:
            raise ValueError(f'srun started {tasks} processes that do not know of each other; '
                             f'start one per node and let it run torchrun (README: several nodes)')
        return 0, 1
    missing = [name for name in ('RANK', 'MASTER_ADDR', 'MASTER_PORT') if name not in os.environ]
    if missing:
        raise ValueError(f'WORLD_SIZE is {world}, but {", ".join(missing)} is not set; start with '
                         f'torchrun, or unset WORLD_SIZE')
    return int(os.environ['RANK']), world


def join_processes(device):
    # DistributedDataParallel imports this module. If it did so after the group exists, the threads
    # of gloo would outlive the group and could abort the process at exit (seen with torch 2.15).
    import torch._dynamo  # noqa: F401
    # the others wait while the first one downloads or scores, for which NCCL's 10 minutes are short
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo',
                            timeout=timedelta(hours=2))


def agree(loss, stop_number):
    """(mean loss, signal to stop) over all processes, so that they stop at the same step.

    If they have different signals, the first of STOPS counts.
    """
    signals = loss.new_tensor([float(stop_number == number) for number in STOPS])
    loss, *shares = mean_over_ranks(torch.cat([loss.detach()[None], signals])).tolist()
    return loss, next((number for number, share in zip(STOPS, shares) if share), 0)


class StopSignal:
    """Remembers a signal to stop, so that the step can be finished; a second one stops at once.

    Within two seconds it is the same signal twice: a scheduler sends it to all processes, and
    torchrun passes its own on. A process that has lost its torchrun stops as on SIGTERM.
    """

    def __init__(self):
        self.number = 0
        self.received_at = 0.0
        self.agent = os.getppid() if 'TORCHELASTIC_RUN_ID' in os.environ else None
        for number in STOPS:
            signal.signal(number, self.receive)

    def receive(self, number, frame):
        if not self.number:
            self.number = number
            self.received_at = time.monotonic()
        elif time.monotonic() - self.received_at > 2:
            os._exit(128 + number)

    def pending(self):
        orphaned = self.agent not in (None, os.getppid())
        return self.number or (signal.SIGTERM if orphaned else 0)


def exit_status(number):
    """0 for a scheduler's warning (SIGUSR1), else as a shell reports the signal: 143, 130."""
    usr1 = getattr(signal, 'SIGUSR1', None)
    return 0 if number in (0, usr1) else 128 + number


# ---------------------------------------------------------------- files of a run

def load_checkpoint(folder):
    path = folder / 'checkpoint.pt'
    if not path.is_file():
        raise FileNotFoundError(f'no checkpoint at {path}; --resume takes the folder of a run, '
                                f'such as runs/moco-shapes-0')
    checkpoint = read(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get('args'), dict):
        raise ValueError(f'{path} is no checkpoint of train.py')
    if 'state' not in checkpoint or 'schedule' in checkpoint['state']:
        raise ValueError(f'{path} is of an earlier version; finish it with that version')
    return checkpoint


def forget_after(path, state):
    """Cut off the lines that a resumed run writes again, and a broken one.

    Those are the lines of later steps, and the scores and measurements of this step whose mark of
    progress the checkpoint had not seen.
    """
    if not path.exists():
        return
    kept = 0
    with open(path, 'rb+') as file:
        for text in file:
            try:
                line = json.loads(text)
            except ValueError:
                break
            again = 'loss' not in line and line['progress'] > state.seen
            if line['step'] > state.step or again:
                break
            kept += len(text)
        file.truncate(kept)


def new_folder(args):
    if args.name:
        return Path('runs') / args.name              # a run that never saved starts again in it
    number = 0
    while True:
        folder = Path('runs') / f'{args.method}-{args.dataset}-{number}'
        if not folder.exists():
            return folder
        number += 1


def open_log(folder, new):
    """The log of a run, open for its lock; emptied if the run is new. `append` writes to it.

    It is locked, so that no second process goes on with the run. The lock ends with this process,
    however it ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log = open(folder / 'log.jsonl', 'a')
    if fcntl:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ValueError(f'{folder} is in use by another process; wait for it '
                             f'or stop it') from None
    if new:
        log.truncate(0)
        (folder / 'gradstats.jsonl').unlink(missing_ok=True)
    return log


def append(path, lines):
    """Add lines of JSON to a file. Raises OSError, with the name of the file, on a full disk."""
    try:
        with open(path, 'a') as file:
            file.writelines(json.dumps(line) + '\n' for line in lines)
    except OSError as error:                             # of a line, or of closing the file
        raise OSError(f'{quoted(path)} cannot be written: {error.strerror}') from None


def snapshot(run):
    """What checkpoint.pt holds: tensors and plain types only."""
    flags = {name: value for name, value in vars(run.args).items()
             if name not in ('resume', 'max_steps', 'dry_run')}
    return dict(args=flags, state=dataclasses.asdict(run.state), method=run.method.state_dict(),
                optimizer=run.optimizer.state_dict(), **run.identity)


def restore(run, checkpoint):
    """Put a checkpoint's weights, optimizer and state in place, and its files back to that step."""
    for name, now in run.identity.items():
        then = checkpoint.get(name)
        if then != now:
            raise ValueError(f'the run had {name} {then}, now it is {now}: resume '
                             f'with the original data, processes and encoder')
    try:
        run.method.load_state_dict(checkpoint['method'])
        run.optimizer.load_state_dict(checkpoint['optimizer'])
        run.state = State(**checkpoint['state'])
    except (RuntimeError, ValueError, TypeError, KeyError) as error:
        # torch names the class in the first line, what does not fit in the second
        lines = [line.strip() for line in str(error).splitlines()[:2]]
        raise ValueError(f'the checkpoint does not fit the flags of this run: '
                         f'{" ".join(lines)}') from None
    if run.rank == 0:
        forget_after(run.folder / 'log.jsonl', run.state)
        forget_after(run.folder / 'gradstats.jsonl', run.state)


def reason(error):
    """The line that an error ends the run with, or None for one that nobody expected."""
    text = str(error)
    if isinstance(error, (OSError, ValueError)):         # ours, that of a lost worker among them
        return text
    if 'closed by peer' in text:
        return 'another process of this run ended; its last line says why'
    if isinstance(error, MemoryError) or 'out of memory' in text or "can't allocate" in text:
        return 'out of memory; lower --batch-size or --img-size, or use more processes'
    if 'DataLoader worker' in text:
        return worker_error(error)
    if isinstance(error, RuntimeError):
        return None
    return text


# ---------------------------------------------------------------- what a person sees

class Progress:
    """A bar in a terminal; in a file a line a minute, without carriage returns."""

    def __init__(self, budget, state, shown):
        self.budget = budget
        self.terminal = sys.stderr.isatty()
        self.shown = shown
        self.tau = None
        self.line_at = time.perf_counter()
        self.bar = tqdm(total=100, disable=not (shown and self.terminal), ncols=80,
                        bar_format='{percentage:3.0f}% |{bar:8}| {postfix}')

    def update(self, state, loss, tau):
        if tau != self.tau:                            # the speed of the strategy in use
            self.tau = tau
            self.units = state.units
            self.seconds = state.seconds
        speed = (state.units - self.units) / max(1e-9, state.seconds - self.seconds)
        left = (self.budget - state.units) / speed if speed else 0
        text = (f'loss {loss:.3f}  {tau}  {state.samples / state.seconds:.0f} img/s  '
                f'{tqdm.format_interval(max(0, left))} left')
        percent = min(100, 100 * state.units / self.budget)
        self.bar.set_postfix_str(text, refresh=False)
        self.bar.update(percent - self.bar.n)
        if self.shown and not self.terminal and time.perf_counter() - self.line_at > 60:
            self.line_at = time.perf_counter()
            print(f'{percent:3.0f} %  {text}', flush=True)

    def close(self):
        self.bar.close()


def collapse_warning(metrics, outputs):
    """Plain words when the features say nothing about the images any more, or None."""
    if metrics['feature_spread'] < 0.01:
        return ('all images have nearly the same feature (spread below 0.01): collapsed. '
                'Lower --lr, lengthen --warmup, or --freeze-patch-embed')
    if 'teacher_entropy' not in metrics:                 # of DINO alone
        return None
    entropy = metrics['teacher_entropy']
    if entropy > 0.999 * math.log(outputs):
        return ("the teacher's outputs are uniform: collapsed. Raise --temperature (of the "
                "student), or lower --lr")
    if entropy < 0.01:
        return 'the teacher gives every image one and the same output: collapsed. Lower --lr'
    if abs(metrics['positive_similarity'] - metrics['negative_similarity']) < 1e-3:
        return ('the outputs of all images move together: collapsed. Lower --center-momentum, or '
                'raise --momentum (of the teacher)')
    return None


def waiting_warning(state, relative_cost):
    """Does waiting take a fifth of the time, or more than the compression saves? The numbers if so.
    """
    waiting = 1000 * state.seconds_data / state.step
    working = 1000 * state.seconds / state.step - waiting
    saved = working / relative_cost - working
    if waiting > 0.2 * (working + waiting) or (0 < saved < waiting):
        return (f'a step waits {waiting:.0f} ms for data and works {working:.0f} ms; compression '
                f'saves about {saved:.0f} ms of it. Raise --workers, or store smaller files')
    return None
