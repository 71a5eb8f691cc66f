"""Score a backbone by nearest neighbours, a linear probe or fine-tuning.

    python eval.py --weights runs/NAME/backbone.pt
    python eval.py --weights runs/NAME/backbone.pt --protocol linear finetune
    python eval.py --weights runs/NAME/backbone.pt --patch-size 4 8 16
    python eval.py --weights runs/NAME/backbone.pt --export features.npz
    python eval.py --weights vit-s-300ep.pth.tar --dataset folder --data-root .

The feature is the class token after the final norm. Evaluation drops no tokens,
but it can cut images into larger patches: with several patch sizes, the last
table shows accuracy beside the number of tokens and the cost. Protocols (the
paper's NN, LP and FT):

    nn, knn     of the k training images with the highest cosine, each votes for
                its class with the weight exp(cosine / 0.07), as in DINO's
                eval_knn.py; nn is k = 1
    linear      a linear classifier of the frozen features, at ten learning
                rates; a tenth of the training images chooses the rate
    finetune    all weights train: AdamW, cosine decay, random crops and flips,
                label smoothing. For DeiT's stronger augmentations, load
                backbone.pt into timm

Each score is also a line of eval.jsonl, with all that it depends on.

Shapes: b batch, n images, m images of the bank, d width, c classes, r rates.
"""
import copy
import json
import math
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from einops import rearrange
from tqdm import tqdm

from commandline import (Parser, count, count_or_zero, fail, fraction, pick_device, pick_precision,
                         positive, size)
from compress import rendered_side, sample_cost, tokens_of
from data import DATASETS, load, shrink_note
from runs import reason
from schedule import cosine, warmup
from views import View, keyed_generator, normalize
from weights import load_backbone, quoted, replacing

TEMPERATURE = 0.07      # of the votes, DINO's
CHUNK = 500             # queries that are compared with the bank at once


@dataclass(frozen=True)
class Setting:
    """How images reach the encoder. It is the same in every protocol."""
    img_size: int                       # nominal side of an image, in pixels
    patch_size: int
    mean: tuple                         # one number per channel, for images in [0, 1]
    std: tuple
    device: torch.device
    dtype: torch.dtype = torch.float32  # of the encoder's matrix products
    workers: int = 0                    # processes that decode the images of a folder
    progress: bool = False              # whether to show progress bars

    @property
    def side(self):
        """The side at which images are rendered, a multiple of the patch size."""
        return rendered_side(self.img_size, self.patch_size)

    def autocast(self):
        half = self.dtype == torch.bfloat16
        return torch.autocast(self.device.type, torch.bfloat16, enabled=half)


@dataclass(frozen=True)
class Probe:
    """The linear probe. Rates are per 256 images, and meant for normalized features."""
    rates: tuple = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
    epochs: int = 50
    batch_size: int = 256


@dataclass(frozen=True)
class Recipe:
    """Fine-tuning."""
    epochs: int
    batch_size: int
    lr: float                           # the highest, per 512 images
    warmup: float                       # share of the steps in which the rate rises
    crop_scale: float                   # smallest crop, as a share of the image's area
    smoothing: float                    # of the labels
    weight_decay: float = 0.05          # on matrices; not on biases, norms, class token, positions


# From 64 px on: the numbers of DeiT's main.py, which MoCo-v3 uses (not run here).
LARGE = Recipe(
    epochs=150,
    batch_size=1024,
    lr=5e-4,
    warmup=1 / 30,
    crop_scale=0.08,
    smoothing=0.1,
)

# Below: ours, to finish on a laptop. They were chosen on held-out training images.
SMALL = Recipe(
    epochs=5,
    batch_size=64,
    lr=1e-2,
    warmup=0.1,
    crop_scale=0.9,
    smoothing=0.0,
)


# ---------------------------------------------------------------- features

@torch.no_grad()
def extract_features(encoder, batches, mean, std, device, patch_size=None):
    """Class tokens (n d), float32 on the CPU, and labels (n).

    batches: pairs of images (b c h w) in [0, 1] and labels (b).
    """
    was_training = encoder.training
    encoder.eval()
    features = []
    labels = []
    for images, batch_labels in batches:
        images = normalize(images.to(device), mean, std)
        features.append(encoder(images, patch_size).float().cpu())
        labels.append(batch_labels.cpu())
    encoder.train(was_training)
    features = torch.cat(features)
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:  # NaN compares as false, so every score would look like chance
        raise FloatingPointError(f'the features of {broken} of {len(features)} images are not '
                                 f'finite; check the weights, mean {mean} and std {std}')
    return features, torch.cat(labels)


def split_features(encoder, data, split, ids, setting):
    """Features (n d) and labels (n) of the images `ids` of 'train' or 'test'."""
    batches = data.labelled(split, ids, setting.side, setting.workers)
    batches = counted(batches, len(ids), f'{split} features', setting.progress)
    with setting.autocast():
        return extract_features(encoder, batches, setting.mean, setting.std, setting.device,
                                setting.patch_size)


def counted(batches, total, title, show):
    """The batches (images, labels), under a progress bar that counts images."""
    with progress_bar(None, title, ' images', show, total) as bar:
        for images, labels in batches:
            yield images, labels
            bar.update(len(labels))


def progress_bar(items, title, unit, show, total=None):
    """A bar that vanishes at the end. It shows on a terminal, but not in a file."""
    disable = None if show else True
    return tqdm(items, title, total, leave=False, unit=unit, disable=disable)


# ---------------------------------------------------------------- nearest neighbours

@torch.no_grad()
def knn_predict(queries, bank, bank_labels, classes, k=20, temperature=TEMPERATURE, chunk=CHUNK):
    """The class (n) of queries (n d), by a vote of the k nearest of the bank (m d). Needs m >= k.

    A neighbour's vote is exp(cosine / temperature). `chunk` bounds the memory: chunk * m cosines.
    """
    if not 1 <= k <= len(bank) or not temperature > 0:
        raise ValueError(f'k {k} must be from 1 to the {len(bank)} images of the bank, and the '
                         f'temperature {temperature} above 0')
    bank = F.normalize(bank, dim=1)
    predictions = []
    for part in F.normalize(queries, dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)                  # chunk k
        # relative to the nearest, so that no temperature overflows
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = torch.zeros(len(part), classes, device=part.device, dtype=part.dtype)
        votes.scatter_add_(1, bank_labels[nearest], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_score(train, test, classes, k, device, progress=False):
    """Percent correct on test by the k nearest of train. Both are (features (n d), labels (n))."""
    bank = train[0].to(device)
    bank_labels = train[1].to(device)
    parts = test[0].to(device).split(10 * CHUNK)
    predicted = [knn_predict(part, bank, bank_labels, classes, k)
                 for part in progress_bar(parts, f'{k}-NN', ' batches', progress)]
    return percent_correct(torch.cat(predicted), test[1])


def percent_correct(predicted, labels):
    correct = (predicted.cpu() == labels.cpu()).sum().item()
    return 100 * correct / len(labels)


def knn_accuracy(encoder, data, img_size, device, patch_size=None, ks=(1, 20),  # noqa: PLR0913
                 bank_limit=None, query_limit=None, workers=0, progress=False):
    """({k: percent correct}, bank size, number of queries): how train.py scores during a run.

    Leaves the encoder and all random states as they are. A limit takes a stratified subset.
    """
    patch_size = patch_size or encoder.patch_size
    setting = Setting(img_size, patch_size, data.mean, data.std, torch.device(device),
                      workers=workers, progress=progress)
    bank_ids = data.labelled_ids('train', bank_limit)
    query_ids = data.labelled_ids('test', query_limit)
    check_labels(data, bank_ids, query_ids, max(ks))
    bank = split_features(encoder, data, 'train', bank_ids, setting)
    queries = split_features(encoder, data, 'test', query_ids, setting)
    classes = len(data.classes)
    scores = {k: knn_score(bank, queries, classes, k, device, progress) for k in ks}
    return scores, len(bank_ids), len(query_ids)


def check_labels(data, train_ids, test_ids, k=1):
    """Every score needs labelled images of two classes to learn from, and others to test on."""
    if len(data.classes) < 2 or len(data.labels[train_ids].unique()) < 2:
        raise ValueError(f'the {len(train_ids)} labelled training images have fewer than two '
                         f'classes; put the images of each class into a folder of their own, or '
                         f'take their features with --export')
    if len(test_ids) == 0:
        raise ValueError('there are no labelled test images; their folders must have the names of '
                         'the training classes')
    if k > len(train_ids):
        raise ValueError(f'k = {k} is more than the {len(train_ids)} images of the bank; lower --k')


# ---------------------------------------------------------------- linear probe

def fit_linear(x, y, classes, probe, seed=0, progress=False):
    """Linear classifiers (r c d) of features x (n d) with labels y (n), one for each rate.

    SGD with momentum 0.9 and cosine decay, without weight decay. All rates see the same batches,
    and start at zero, since the loss is convex. Its gradient is (softmax - one-hot) x^T / b.
    """
    rates = torch.tensor(probe.rates, device=x.device) * probe.batch_size / 256
    rates = rearrange(rates, 'r -> r 1 1')
    weight = torch.zeros(len(rates), classes, x.shape[1], device=x.device)
    velocity = torch.zeros_like(weight)
    steps = probe.epochs * math.ceil(len(x) / probe.batch_size)
    step = 0
    for epoch in progress_bar(range(probe.epochs), 'linear', ' epochs', progress):
        order = torch.randperm(len(x), generator=keyed_generator(seed, 'probe', epoch))
        for ids in order.to(x.device).split(probe.batch_size):
            logits = torch.einsum('b d, r c d -> r b c', x[ids], weight)
            error = (logits.softmax(dim=2) - F.one_hot(y[ids], classes)) / len(ids)
            gradient = torch.einsum('r b c, b d -> r c d', error, x[ids])
            velocity = 0.9 * velocity + gradient
            weight = weight - rates * cosine(step / steps) * velocity
            step += 1
    return weight


def linear_sweep(train, test, classes, probe, device, seed=0, progress=False):
    """(percent correct on test, chosen rate, {rate: percent correct on held-out images}).

    train, test: (features (n d), labels (n)). A random tenth of the training images chooses the
    rate, which then trains once more, on all of them.
    """
    mean = train[0].mean(dim=0)
    std = (train[0].var(dim=0) + 1e-6).sqrt()

    def normalized(features):
        """BatchNorm without affine, as in MAE's probe, and a constant feature for the bias.

        With unit variance, one range of rates serves all backbones.
        """
        features = (features - mean) / std
        return F.pad(features, (0, 1), value=1.0).to(device)

    x = normalized(train[0])
    y = train[1].to(device)
    order = torch.randperm(len(y), generator=keyed_generator(seed, 'held out')).to(device)
    held_out, kept = order.tensor_split([max(1, len(order) // 10)])
    held_out_scores = {}
    weights = fit_linear(x[kept], y[kept], classes, probe, seed, progress)
    for rate, weight in zip(probe.rates, weights):
        predicted = (x[held_out] @ weight.T).argmax(dim=1)
        held_out_scores[rate] = percent_correct(predicted, y[held_out])
    best = max(held_out_scores, key=held_out_scores.get)

    probe = replace(probe, rates=(best,))
    weight, = fit_linear(x, y, classes, probe, seed, progress)               # c d
    logits = normalized(test[0]) @ weight.T
    if not logits.isfinite().all():
        raise FloatingPointError(f'the linear probe diverged at rate {best}; use lower rates')
    return percent_correct(logits.argmax(dim=1), test[1]), best, held_out_scores


# ---------------------------------------------------------------- fine-tuning

class Classifier(nn.Module):
    """A backbone at one patch size, and a linear layer."""

    def __init__(self, encoder, classes, patch_size, generator=None):
        super().__init__()
        self.encoder = encoder
        self.patch_size = patch_size
        self.head = nn.Linear(encoder.embed_dim, classes)
        nn.init.normal_(self.head.weight, std=0.01, generator=generator)      # as in MoCo-v3
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        return self.head(self.encoder(images, self.patch_size))


def training_batches(data, ids, setting, recipe, seed):
    """Batches of all epochs: random crops (b c side side), normalized, and labels (b)."""
    view = View(setting.side, scale=(recipe.crop_scale, 1.0), interpolation='bicubic',
                jitter_p=0.0, gray_p=0.0)
    whole = len(ids) - len(ids) % recipe.batch_size     # the last partial batch is left out
    for epoch in range(recipe.epochs):
        order = torch.randperm(len(ids), generator=keyed_generator(seed, 'order', epoch))
        parts = ids[order[:whole]].split(recipe.batch_size)
        for images, labels in data.train_batches(parts, epoch, view, seed, setting.workers):
            images = normalize(images.to(setting.device), setting.mean, setting.std)
            yield images, labels.to(setting.device)


def finetune(encoder, data, ids, setting, recipe, seed=0):
    """(Classifier, mean loss of each epoch): a copy of the encoder, trained on the images `ids`.

    All weights train, even a patch projection that pretraining kept fixed; a sin-cos table is none.
    """
    recipe = replace(recipe, batch_size=min(recipe.batch_size, len(ids)))
    encoder = copy.deepcopy(encoder).requires_grad_(True)
    encoder.pos_embed.requires_grad_(encoder.config['pos_embed'] == 'learned')
    generator = keyed_generator(seed, 'classifier')
    model = Classifier(encoder, len(data.classes), setting.patch_size, generator)
    model.to(setting.device).train()

    # no weight decay on biases and norms (1 dimension), class token and positions (3)
    matrices = [p for p in model.parameters() if p.ndim in (2, 4)]
    others = [p for p in model.parameters() if p.ndim in (1, 3)]
    optimizer = torch.optim.AdamW([
        dict(params=matrices, weight_decay=recipe.weight_decay),
        dict(params=others, weight_decay=0.0),
    ])
    peak = recipe.lr * recipe.batch_size / 512
    steps = recipe.epochs * (len(ids) // recipe.batch_size)
    batches = training_batches(data, ids, setting, recipe, seed)
    batches = counted(batches, steps * recipe.batch_size, 'finetune', setting.progress)

    losses = []
    for step, (images, labels) in enumerate(batches):
        progress = step / steps
        for group in optimizer.param_groups:
            group['lr'] = peak * warmup(progress, recipe.warmup) * cosine(progress)
        with setting.autocast():
            logits = model(images)
        loss = F.cross_entropy(logits.float(), labels, label_smoothing=recipe.smoothing)
        if not loss.isfinite():
            raise FloatingPointError(f'the loss of step {step} is {loss.item()}; lower --lr')
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    by_epoch = torch.tensor(losses).view(recipe.epochs, -1)
    return model, by_epoch.mean(dim=1).tolist()


# ---------------------------------------------------------------- command line

def parse_args():
    parser = Parser(__doc__)
    group = parser.add_argument_group('weights')
    group.add_argument('--weights', required=True,
                       help='backbone.pt of a run, or a checkpoint of timm, MoCo-v3, DINO or MAE')
    group.add_argument('--encoder-prefix',
                       help='path of the keys of the encoder, for a file that holds several')
    group.add_argument('--num-heads', type=count, help='of foreign weights (default: by the width)')
    group.add_argument('--mean', type=fraction, nargs='+',
                       help="of each channel, for foreign weights (default: ImageNet's)")
    group.add_argument('--std', type=positive, nargs='+', help='the same')

    group = parser.add_argument_group('data')
    group.add_argument('--dataset', choices=DATASETS,
                       help='default: the one that the weights were trained on')
    group.add_argument('--data-root', default='data', help='folder of the data set')
    group.add_argument('--download', action='store_true', help='fetch the data set if it is absent')
    group.add_argument('--img-size', type=size, help='in pixels (default: as in training)')
    group.add_argument('--workers', type=count_or_zero, default=4,
                       help='processes that decode the images of a folder')

    group = parser.add_argument_group('what to measure')
    group.add_argument('--protocol', nargs='+', choices=('nn', 'knn', 'linear', 'finetune'),
                       metavar='NAME',
                       help='nn, knn, linear, finetune (default: nn knn; none with --export)')
    group.add_argument('--limit', type=count,
                       help='score with this many training images, all classes in proportion')
    group.add_argument('--patch-size', type=size, nargs='+', help='(default: as in training)')
    group.add_argument('--k', type=count, nargs='+', default=[20], help='neighbours that vote')
    group.add_argument('--probe-epochs', type=count, default=Probe.epochs, help='of linear')
    group.add_argument('--epochs', type=count,
                       help=f'of finetune (default: {LARGE.epochs}; {SMALL.epochs} below 64 px)')
    group.add_argument('--batch-size', type=count,
                       help=f'of finetune (default: {LARGE.batch_size}; {SMALL.batch_size})')
    group.add_argument('--lr', type=positive,
                       help=f'of finetune, per 512 images (default: {LARGE.lr:g}; {SMALL.lr:g})')

    group = parser.add_argument_group('run')
    group.add_argument('--export', metavar='FILE.npz', help='write the features of all images')
    group.add_argument('-o', '--output',
                       help='file of the scores (default: eval.jsonl beside the weights)')
    group.add_argument('--seed', type=count_or_zero, default=0,
                       help='of the held-out images and of the training')
    group.add_argument('--device', choices=('auto', 'cpu', 'cuda', 'mps'), default='auto',
                       help='auto: cuda if there is one, else mps, else cpu')
    group.add_argument('--precision', choices=('auto', 'float32'), default='auto',
                       help='auto: bfloat16 on a GPU that has it, else float32')
    args = parser.parse_args()
    if args.protocol is None:
        args.protocol = [] if args.export else ['nn', 'knn']
    if args.limit and not args.protocol:
        raise ValueError('--limit is for the scores, --export writes all images; leave it out')
    return args


def load_data(args, info):
    """The data set of the flags, or else that of the weights."""
    name = args.dataset or info['dataset']
    if name is None:
        raise ValueError(f'{quoted(args.weights)} does not say what it was trained on; '
                         f'add --dataset, one of {", ".join(DATASETS)}')
    data = load(name, args.data_root, args.download)
    channels = info['config']['in_chans']
    if data.channels != channels:
        raise ValueError(f'the weights are for images of {channels} channels, those of {name} have '
                         f'{data.channels}; choose another --dataset')
    return data


def settings_of(args, info, data, device):
    """A Setting for each patch size."""
    mean = tuple(args.mean or info['mean'] or data.mean)
    std = tuple(args.std or info['std'] or data.std)
    if not len(mean) == len(std) == data.channels:
        raise ValueError(f'--mean {mean} and --std {std} must be {data.channels} numbers each, one '
                         f'for each channel')
    img_size = args.img_size or info['config']['img_size']
    patch_sizes = args.patch_size or [info['config']['patch_size']]
    if args.export and len(patch_sizes) > 1:
        raise ValueError('--export writes the features of one --patch-size')
    if max(patch_sizes) > img_size:
        raise ValueError(f'--patch-size {max(patch_sizes)} is larger than the images of {img_size} '
                         f'px; lower it, or raise --img-size')
    dtype = pick_precision(args.precision, device)
    return [Setting(img_size, patch_size, mean, std, device, dtype, args.workers, progress=True)
            for patch_size in dict.fromkeys(patch_sizes)]


def described(setting):
    """What a score depends on of a setting, as plain values."""
    return dict(
        img_size=setting.img_size,
        patch_size=setting.patch_size,
        side=setting.side,
        mean=setting.mean,
        std=setting.std,
        precision=str(setting.dtype).removeprefix('torch.'),
    )


def numbers(values):
    return ' '.join(f'{value:.3g}' for value in values)


def measure(encoder, data, setting, args):
    """One dict after the other: name and score in percent, and what the protocol depends on."""
    train_ids = data.labelled_ids('train', args.limit)
    test_ids = data.labelled_ids('test')
    check_labels(data, train_ids, test_ids, max(args.k) if 'knn' in args.protocol else 1)
    classes = len(data.classes)
    if args.protocol != ['finetune']:
        train = split_features(encoder, data, 'train', train_ids, setting)
        test = split_features(encoder, data, 'test', test_ids, setting)

    ks = [1] if 'nn' in args.protocol else []
    if 'knn' in args.protocol:
        ks += args.k
    for k in dict.fromkeys(ks):
        score = knn_score(train, test, classes, k, setting.device, setting.progress)
        yield dict(name='NN' if k == 1 else f'{k}-NN', score=score, k=k, temperature=TEMPERATURE)

    if 'linear' in args.protocol:
        probe = Probe(epochs=args.probe_epochs, batch_size=min(Probe.batch_size, len(train_ids)))
        score, best, held_out = linear_sweep(train, test, classes, probe, setting.device,
                                             args.seed, setting.progress)
        print(f'  rates            {numbers(held_out)}')
        print(f'  held out, %      {numbers(held_out.values())}')
        if best in (min(held_out), max(held_out)):
            print(f'  the best rate, {best:g}, is at the edge of the sweep: widen Probe.rates')
        yield dict(asdict(probe), name='linear', score=score, rate=best, held_out=held_out)

    if 'finetune' in args.protocol:
        recipe = LARGE if setting.img_size >= 64 else SMALL
        given = dict(epochs=args.epochs, batch_size=args.batch_size, lr=args.lr)
        given = {key: value for key, value in given.items() if value is not None}
        recipe = replace(recipe, **given)
        model, losses = finetune(encoder, data, train_ids, setting, recipe, args.seed)
        print(f'  training loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last')
        features, labels = split_features(model.encoder, data, 'test', test_ids, setting)
        logits = model.head(features.to(setting.device))
        score = percent_correct(logits.argmax(dim=1), labels)
        yield dict(asdict(recipe), name='finetune', score=score, losses=losses)


def export(encoder, data, setting, path):
    """Write the features of all images, labelled or not, as an .npz file of numpy.

    train_features (n d), train_labels (n; -1: none), train_files (n; only of folders), the same
    for test, classes (c), and settings as JSON. In a folder without splits, the test images are
    also training images, without their labels.
    """
    classes = np.array(data.classes, dtype=str)
    arrays = dict(classes=classes, settings=json.dumps(described(setting)))
    with replacing(path) as file:       # opened first: a wrong path is found before any work
        for split in ('train', 'test'):
            ids = data.ids(split)
            if len(ids) == 0:
                continue
            features, labels = split_features(encoder, data, split, ids, setting)
            arrays[f'{split}_features'] = features.numpy()
            arrays[f'{split}_labels'] = labels.numpy()
            files = data.files_of(split)
            if len(files) > len(labels):
                files = [name for name in files if name not in data.unreadable[split]]
            if len(files) > 0:
                arrays[f'{split}_files'] = np.array(files)
            print(f'{split}_features: {len(features)} x {features.shape[1]}')
        np.savez(file, **arrays)
    print(f'written to {quoted(path)}')


def append(record, path):
    """Add a line to a file of scores. Returns the path, or None if it cannot be written."""
    try:
        with open(path, 'a') as file:
            file.write(json.dumps(record) + '\n')
    except OSError as error:
        print(f'{quoted(path)} cannot be written ({error.strerror}), so the scores are only '
              f'printed; -o chooses another file', file=sys.stderr)
        return None
    return path


def with_error(result):
    return f'{result["score"]:.2f} +- {result["error"]:.2f}'


def print_table(rows, queries):
    """rows: a list of results for each patch size."""
    print(f'percent correct on {queries} test images, +- standard error; '
          f'cost in forward passes at the base size')
    names = ''.join(f'{result["name"]:>17}' for result in rows[0])
    print(f'  patch  tokens   cost{names}')
    for results in rows:
        cells = ''.join(f'{with_error(result):>17}' for result in results)
        print('{patch_size:7}{tokens:8}{cost:7.3f}'.format(**results[0]) + cells)


def main():
    args = parse_args()
    device = pick_device(args.device)
    encoder, info = load_backbone(args.weights, args.num_heads, args.encoder_prefix)
    print(info['report'])
    encoder.to(device)
    data = load_data(args, info)
    settings = settings_of(args, info, data, device)
    first = settings[0]
    precision = described(first)['precision']
    print(f'images of {first.img_size} px, mean {numbers(first.mean)}, std {numbers(first.std)}; '
          f'{precision} on {device}')
    note = shrink_note(data, first.img_size)
    if note:
        print(note)
    if args.export:
        export(encoder, data, first, args.export)
    if not args.protocol:
        return

    bank = len(data.labelled_ids('train', args.limit))
    queries = len(data.labelled_ids('test'))
    common = dict(
        weights=args.weights,
        dataset=args.dataset or info['dataset'],
        bank=bank,
        queries=queries,
        num_heads=info['config']['num_heads'],
        seed=args.seed,
    )
    output = args.output or Path(args.weights).with_name('eval.jsonl')
    rows = []
    for setting in settings:
        passes = [dict(view=0, patch_size=setting.patch_size)]
        common.update(
            described(setting),
            tokens=1 + tokens_of(setting.img_size, setting.patch_size),    # the class token too
            cost=sample_cost(passes, [setting.img_size], info['config']),
        )
        rows.append([])
        start = time.perf_counter()
        for result in measure(encoder, data, setting, args):
            score = result['score']
            error = (score * (100 - score) / queries) ** 0.5                  # binomial
            seconds = time.perf_counter() - start
            result.update(common, error=error, seconds=seconds)
            rows[-1].append(result)
            print(f'  patch size {setting.patch_size}, {result["name"]}: '
                  f'{with_error(result)} % after {seconds:.1f} s', flush=True)
            if output:
                output = append(result, output)
    print_table(rows, queries)


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, FloatingPointError, MemoryError, RuntimeError) as error:
        line = reason(error)
        if line is None:
            raise
        fail(f'eval.py: error: {line}')
    except KeyboardInterrupt:
        fail('eval.py: interrupted', 130)
