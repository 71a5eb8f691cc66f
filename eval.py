"""Score a backbone by nearest neighbours, a linear probe or fine-tuning; or export its features.

    python eval.py --weights runs/NAME/backbone.pt
    python eval.py --weights runs/NAME/backbone.pt --protocol linear finetune
    python eval.py --weights runs/NAME/backbone.pt --patch-size 4 8 16
    python eval.py --weights runs/NAME/backbone.pt --export features.npz
    python eval.py --weights vit-s-300ep.pth.tar --dataset folder --data-root .

The feature is the class token after the final norm. Evaluation drops no tokens,
but it can cut images into larger patches: with several patch sizes, the lines
show accuracy beside the number of tokens. Protocols (the paper's NN, LP and FT):

    nn, knn     of the k training images with the highest cosine, each votes for
                its class with the weight exp(cosine / 0.07), as in DINO's
                eval_knn.py; nn is k = 1, knn k = 20
    linear      a linear classifier of the frozen features, at ten learning
                rates; a tenth of the training images chooses the rate
    finetune    all weights train: AdamW, cosine decay, random crops and flips,
                label smoothing. For DeiT's stronger augmentations, load
                backbone.pt into timm

Each score is also a line of eval.jsonl, with all that it depends on.

Shapes: b batch, n images, m images of the bank, d width, c classes, r rates.
"""
import argparse
import copy
import itertools
import json
import math
import os
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

from compress import patches_per_side
from images.data import DATASETS, load
from images.views import IMAGENET_MEAN, IMAGENET_STD, Augmentation, keyed_generator, make_view
from images.views import normalize
from schedule import cosine, warmup
from vit import load_backbone


@dataclass(frozen=True)
class Setting:
    """How images reach the encoder. It is the same in every protocol."""
    img_size: int                       # nominal side of an image, in pixels
    patch_size: int
    mean: tuple                         # one number per channel, for images in [0, 1]
    std: tuple
    device: torch.device = torch.device('cpu')
    workers: int = 0                    # processes that decode the images of a folder

    @property
    def side(self):
        """The side at which images are rendered, a multiple of the patch size."""
        return patches_per_side(self.img_size, self.patch_size) * self.patch_size


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


# From 64 px on: the numbers of DeiT's main.py, which MoCo-v3 uses (not run here). Below: ours, to
# finish on a laptop; they were chosen on held-out training images.
LARGE = Recipe(epochs=150, batch_size=1024, lr=5e-4, warmup=1 / 30, crop_scale=0.08, smoothing=0.1)
SMALL = Recipe(epochs=5, batch_size=64, lr=1e-2, warmup=0.1, crop_scale=0.9, smoothing=0.0)


# ---------------------------------------------------------------- features

def say(text):
    """A line for the person who watches; `| head` may have closed the pipe, and work goes on."""
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)


def positive(kind):
    """A type of flag: an int or float above 0."""
    def number(text):
        value = kind(text)
        if not value > 0:
            raise argparse.ArgumentTypeError(f'{text} is not above 0')
        return value
    return number


def watched(items, total, title):
    """The items under a bar; where the output is a file, a line a minute with the time left."""
    start = said = time.time()
    for i, item in enumerate(tqdm(items, title, total, leave=False, disable=None)):
        yield item
        if not sys.stderr.isatty() and time.time() - said > 60:
            said = time.time()
            left = (said - start) / (i + 1) * (total - i - 1)
            say(f'{title}: {i + 1} of {total}, {tqdm.format_interval(left)} left')


@torch.no_grad()
def features_of(encoder, data, split, ids, setting):
    """(class tokens (n d), float32 on the CPU; labels (n)) of the images `ids` that can be read."""
    was_training = encoder.training
    encoder.eval()
    features = []
    read = []
    pictures = data.scored(split, ids, setting.side, setting.img_size, setting.workers)
    for images, part in watched(pictures, math.ceil(len(ids) / 250), f'{split} features'):
        images = normalize(images.to(setting.device), setting.mean, setting.std)
        features.append(encoder(images, setting.patch_size).float().cpu())
        read.append(part)
    encoder.train(was_training)
    features = torch.cat(features)
    broken = int((~features.isfinite().all(dim=1)).sum())
    if broken:  # NaN compares as false, so every score would look like chance
        raise FloatingPointError(f'the features of {broken} of {len(features)} images are not '
                                 f'finite; check the weights, mean and std')
    return features, data.labels[split][torch.cat(read)]


# ---------------------------------------------------------------- nearest neighbours

@torch.no_grad()
def knn_predict(queries, bank, bank_labels, classes, k=20, temperature=0.07, chunk=500):
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


def percent_correct(predicted, labels):
    correct = (predicted.cpu() == labels.cpu()).sum().item()
    return 100 * correct / len(labels)


def standard_error(percent, n):
    """Of a percentage of n images (binomial)."""
    return (percent * (100 - percent) / n) ** 0.5


def knn_score(train, test, classes, k, device):
    """Percent correct on test by the k nearest of train. Both are (features (n d), labels (n))."""
    bank = train[0].to(device)
    predicted = knn_predict(test[0].to(device), bank, train[1].to(device), classes, k)
    return percent_correct(predicted, test[1])


def neighbours(encoder, data, setting, bank_limit=None, query_limit=None):
    """({k: percent correct} for k = 1 and 20, size of the bank, number of queries).

    How train.py scores. A limit takes a stratified subset. Leaves all random states as they are.
    """
    bank_ids = data.labelled_ids('train', bank_limit)
    bank = features_of(encoder, data, 'train', bank_ids, setting)
    queries = features_of(encoder, data, 'test', data.labelled_ids('test', query_limit), setting)
    scores = {k: knn_score(bank, queries, len(data.classes), k, setting.device) for k in (1, 20)}
    return scores, len(bank[1]), len(queries[1])


def can_score(data):
    """Scores need two classes, 20 labelled images to learn from, and others to test on."""
    enough = len(data.labelled_ids('train')) >= 20 and len(data.labelled_ids('test')) > 0
    return len(data.classes) > 1 and enough


# ---------------------------------------------------------------- linear probe

def fit_linear(x, y, classes, rates, epochs, seed=0, batch_size=256):
    """Linear classifiers (r c d) of features x (n d) with labels y (n), one for each rate.

    SGD with momentum 0.9 and cosine decay, without weight decay. All rates see the same batches,
    and start at zero, since the loss is convex. Its gradient is (softmax - one-hot) x^T / b.
    """
    batch_size = min(batch_size, len(x))
    rates = torch.tensor(rates, device=x.device) * batch_size / 256
    rates = rearrange(rates, 'r -> r 1 1')
    weight = torch.zeros(len(rates), classes, x.shape[1], device=x.device)
    velocity = torch.zeros_like(weight)
    steps = epochs * math.ceil(len(x) / batch_size)
    step = 0
    for epoch in watched(range(epochs), epochs, 'linear probe, epochs'):
        order = torch.randperm(len(x), generator=keyed_generator(seed, 'probe', epoch))
        for ids in order.to(x.device).split(batch_size):
            logits = torch.einsum('b d, r c d -> r b c', x[ids], weight)
            error = (logits.softmax(dim=2) - F.one_hot(y[ids], classes)) / len(ids)
            gradient = torch.einsum('r b c, b d -> r c d', error, x[ids])
            velocity = 0.9 * velocity + gradient
            weight = weight - rates * cosine(step / steps) * velocity
            step += 1
    return weight


RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)    # per 256 normalized features


def linear_sweep(train, test, classes, device, epochs=50, seed=0):
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
    scores = {}
    for rate, weight in zip(RATES, fit_linear(x[kept], y[kept], classes, RATES, epochs, seed)):
        scores[rate] = percent_correct((x[held_out] @ weight.T).argmax(dim=1), y[held_out])
    best = max(scores, key=scores.get)

    weight, = fit_linear(x, y, classes, (best,), epochs, seed)               # c d
    predicted = (normalized(test[0]) @ weight.T).argmax(dim=1)
    return percent_correct(predicted, test[1]), best, scores


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
    view = Augmentation(setting.side, scale=(recipe.crop_scale, 1.0), interpolation='bicubic',
                        jitter_p=0.0, gray_p=0.0)
    whole = len(ids) - len(ids) % recipe.batch_size     # the last partial batch is left out

    def steps():
        for epoch in range(recipe.epochs):
            order = torch.randperm(len(ids), generator=keyed_generator(seed, 'order', epoch))
            for part in ids[order[:whole]].split(recipe.batch_size):
                yield [(index, epoch) for index in part.tolist()], [view]

    ahead, behind = itertools.tee(steps())
    loaded = data.batches(ahead, seed, setting.workers)
    for (keys, _), (images, labels) in zip(behind, loaded):
        generator = keyed_generator(seed, keys[0][1], keys[0][0])
        cropped = not torch.is_tensor(images)
        images = make_view(images[0] if cropped else images, view, generator, cropped)
        yield normalize(images.to(setting.device), setting.mean, setting.std), labels


def finetune(encoder, data, ids, setting, recipe, seed=0):
    """(Classifier, mean loss of each epoch): a copy of the encoder, trained on the images `ids`.

    All weights train, even a patch projection that pretraining kept fixed; a sin-cos table is none.
    """
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
    batches = watched(training_batches(data, ids, setting, recipe, seed), steps, 'finetune, steps')

    losses = []
    for step, (images, labels) in enumerate(batches):
        progress = step / steps
        for group in optimizer.param_groups:
            group['lr'] = peak * warmup(progress, recipe.warmup) * cosine(progress)
        logits = model(images)
        labels = labels.to(setting.device)
        loss = F.cross_entropy(logits, labels, label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    if not math.isfinite(losses[-1]):
        raise FloatingPointError(f'the loss is {losses[-1]}; lower --lr')
    by_epoch = torch.tensor(losses).view(recipe.epochs, -1)
    return model, by_epoch.mean(dim=1).tolist()


# ---------------------------------------------------------------- command line

def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter)
    add = parser.add_argument
    add('--weights', required=True,
        help='backbone.pt of a run, or a checkpoint of timm, MoCo-v3, DINO, DeiT or MAE')
    add('--num-heads', type=positive(int), help='of foreign weights (by default a head is 64 wide)')
    add('--mean', type=float, nargs='+', help="of each channel (foreign weights: ImageNet's)")
    add('--std', type=float, nargs='+', help='the same')
    add('--dataset', choices=DATASETS, help='default: that of the training')
    add('--data-root', default='data', help='folder of the data set')
    add('--img-size', type=positive(int), help='in pixels (default: as in training)')
    add('--workers', type=int, default=min(4, os.cpu_count()),
        help='processes that decode the images of a folder')
    add('--protocol', nargs='+', choices=('nn', 'knn', 'linear', 'finetune'),
        help='default: nn knn; none with --export')
    add('--limit', type=positive(int), help='score with this many training images, in proportion')
    add('--patch-size', type=positive(int), nargs='+', help='default: as in training')
    add('--epochs', type=positive(int),
        help=f'of finetune ({LARGE.epochs}; {SMALL.epochs} below 64 px)')
    add('--batch-size', type=positive(int),
        help=f'of finetune ({LARGE.batch_size}; {SMALL.batch_size})')
    add('--lr', type=positive(float),
        help=f'of finetune, per 512 images ({LARGE.lr:g}; {SMALL.lr:g})')
    add('--export', metavar='FILE.npz', help='write the features of all images')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(argv)
    if Path(args.weights).is_dir():
        args.weights = str(Path(args.weights) / 'backbone.pt')
    return args


def measure(encoder, data, setting, args):
    """One dict after the other: name, score in percent, queries, what the protocol depends on."""
    protocols = args.protocol or ['nn', 'knn']
    train_ids = data.labelled_ids('train', args.limit)
    test_ids = data.labelled_ids('test')
    classes = len(data.classes)
    if protocols != ['finetune']:
        train = features_of(encoder, data, 'train', train_ids, setting)
        test = features_of(encoder, data, 'test', test_ids, setting)
        common = dict(bank=len(train[1]), queries=len(test[1]))

    for protocol, name, k in (('nn', 'NN', 1), ('knn', '20-NN', 20)):
        if protocol in protocols:
            score = knn_score(train, test, classes, k, setting.device)
            yield dict(name=name, score=score, **common)

    if 'linear' in protocols:
        score, best, held_out = linear_sweep(train, test, classes, setting.device)
        shown = ', '.join(f'{rate:g}: {percent:.1f}' for rate, percent in held_out.items())
        say(f'  rates and percent correct on held-out images: {shown}')
        yield dict(name='linear', score=score, rate=best, held_out=held_out, **common)

    if 'finetune' in protocols:
        recipe = LARGE if setting.img_size >= 64 else SMALL
        # a small data set has smaller batches, so that an epoch has at least 20 steps
        recipe = replace(recipe, epochs=args.epochs or recipe.epochs, lr=args.lr or recipe.lr,
                         batch_size=min(args.batch_size or recipe.batch_size,
                                        max(1, len(train_ids) // 20)))
        model, losses = finetune(encoder, data, train_ids, setting, recipe)
        say(f'  training loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last; '
              f'batches of {recipe.batch_size}')
        features, labels = features_of(model.encoder, data, 'test', test_ids, setting)
        predicted = model.head(features.to(setting.device)).argmax(dim=1)
        yield dict(asdict(recipe), name='finetune', score=percent_correct(predicted, labels),
                   bank=len(train_ids), queries=len(labels), losses=losses)


def export(encoder, data, setting, path):
    """Write the features of all images that can be read, as an .npz file of numpy.

    train_features (n d), train_labels (n; -1: none), train_files (n; of folders), the same for
    test, classes (c), patch_size, and transform, JSON for timm.data.create_transform. No image is
    in both.
    """
    file = open(f'{path}.partial', 'wb')             # first: a wrong path is found before any work
    transform = dict(data.transform(setting.side, setting.img_size), mean=setting.mean,
                     std=setting.std)
    arrays = dict(classes=np.array(data.classes, dtype=str), transform=json.dumps(transform),
                  patch_size=setting.patch_size)
    held_out = set(data.files['test'])
    for split in ('train', 'test'):
        ids = data.ids(split)
        files = data.files[split]
        if split == 'train' and files:
            ids = torch.tensor([i for i in ids.tolist() if files[i] not in held_out])
        if len(ids) == 0:
            continue
        features, labels = features_of(encoder, data, split, ids, setting)
        arrays[f'{split}_features'] = features.numpy()
        arrays[f'{split}_labels'] = labels.numpy()
        if files:
            read = [files[i] for i in ids.tolist() if files[i] not in data.unreadable[split]]
            arrays[f'{split}_files'] = np.array(read)
    np.savez(file, **arrays)
    file.close()
    os.replace(file.name, path)
    say(f'{path} holds {", ".join(arrays)}')


def main(argv=None):
    args = parse_args(argv)
    encoder, info = load_backbone(args.weights, args.num_heads)
    encoder.to(args.device)
    config = encoder.config
    if not (args.dataset or info.get('dataset')):
        raise ValueError(f'{args.weights} does not say what it was trained on; add --dataset')
    data = load(args.dataset or info['dataset'], args.data_root)
    mean = tuple(args.mean or info.get('mean') or IMAGENET_MEAN)
    std = tuple(args.std or info.get('std') or IMAGENET_STD)
    if not config['in_chans'] == data.channels == len(mean) == len(std):
        raise ValueError(f'the weights are for {config["in_chans"]} channels, {data.name} has '
                         f'{data.channels}, --mean {len(mean)} and --std {len(std)}')
    if args.export is None and not can_score(data):
        raise ValueError('a score needs two classes, 20 labelled training images and labelled '
                         'test images; put each class into a folder, or take --export')
    settings = [Setting(args.img_size or config['img_size'], patch_size, mean, std,
                        torch.device(args.device), args.workers)
                for patch_size in args.patch_size or [config['patch_size']]]
    if args.export and len(settings) > 1:
        raise ValueError('--export writes the features of one --patch-size')
    if args.export:
        export(encoder, data, settings[0], args.export)
    if args.export and not args.protocol:
        return

    output = Path(args.weights).with_name('eval.jsonl')
    for setting in settings:
        start = time.perf_counter()
        tokens = 1 + (setting.side // setting.patch_size) ** 2
        say(f'images of {setting.side} px in patches of {setting.patch_size}, {tokens} tokens; '
            f'mean {mean}, std {std}')
        for result in measure(encoder, data, setting, args):
            error = standard_error(result['score'], result['queries'])
            result.update(weights=args.weights, dataset=data.name, tokens=tokens,
                          img_size=setting.img_size, patch_size=setting.patch_size, mean=mean,
                          std=std, error=error, seconds=time.perf_counter() - start)
            with open(output, 'a') as file:
                file.write(json.dumps(result) + '\n')
            say(f'  {result["name"]}: {result["score"]:.2f} +- {error:.2f} % on '
                f'{result["queries"]} test images, {result["seconds"]:.0f} s')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f'eval.py: error: {error}')
