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
                from 64 px on label smoothing. For DeiT's stronger
                augmentations, load backbone.pt into timm

Each score is also a line of eval.jsonl, with all that it depends on.

Shapes: b batch, n images, m images of the bank, d width, c classes, r rates.
"""
import argparse
import copy
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


# From 64 px on: the numbers of DeiT's main.py with MoCo-v3's epochs and batches (not run here).
# Below: ours, to finish on a laptop; they were chosen on held-out training images.
LARGE = Recipe(
    epochs=150,
    batch_size=1024,
    lr=5e-4,
    warmup=1 / 30,
    crop_scale=0.08,
    smoothing=0.1)
SMALL = Recipe(
    epochs=5,
    batch_size=64,
    lr=1e-2,
    warmup=0.1,
    crop_scale=0.9,
    smoothing=0.0)


# ---------------------------------------------------------------- features

def say(text):
    """A line for the person who watches; `| head` may have closed the pipe, and work goes on."""
    try:
        tqdm.write(str(text))
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
    """The items, under a bar where a person watches."""
    return tqdm(items, title, total, leave=False, disable=None)


@torch.no_grad()
def features_of(encoder, data, split, ids, setting):
    """(class tokens (n d), float32 on the CPU; labels (n)) of the images `ids` that can be read."""
    was_training = encoder.training
    encoder.eval()
    features = []
    read = []
    batches = data.scored(split, ids, setting.side, setting.img_size, setting.workers)
    total = math.ceil(len(ids) / 250)
    for images, part in watched(batches, total, f'{split} features'):
        images = normalize(images.to(setting.device), setting.mean, setting.std)
        features.append(encoder(images, setting.patch_size).float().cpu())
        read.append(part)
    encoder.train(was_training)
    features = torch.cat(features)
    if not features.isfinite().all():    # NaN compares as false: every score would look like chance
        raise FloatingPointError('features are not finite; check the weights, mean and std')
    return features, data.labels[split][torch.cat(read)]


# ---------------------------------------------------------------- nearest neighbours

@torch.no_grad()
def knn_predict(queries, bank, bank_labels, classes, k=20, temperature=0.07, chunk=500):
    """The class (n) of queries (n d), by a vote of the k nearest of the bank (m d). Needs m >= k.

    A neighbour's vote is exp(cosine / temperature). `chunk` bounds the memory: chunk * m cosines.
    """
    if not 1 <= k <= len(bank):
        raise ValueError(f'{k} neighbours of a bank of {len(bank)} images; take more images')
    bank = F.normalize(bank.float(), dim=1)                                   # bfloat16: too coarse
    predictions = []
    for part in F.normalize(queries.float(), dim=1).split(chunk):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)                  # chunk k
        # relative to the nearest, so that no temperature overflows
        weights = ((similarity - similarity[:, :1]) / temperature).exp()
        votes = part.new_zeros(len(part), classes)
        votes.scatter_add_(1, bank_labels[nearest], weights)
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def percent_correct(predicted, labels):
    correct = predicted.cpu() == labels.cpu()
    return 100 * correct.sum().item() / len(labels)


# ---------------------------------------------------------------- linear probe

def fit_linear(x, y, classes, rates, epochs, seed=0, batch_size=256):
    """Linear classifiers (r c d) of features x (n d) with labels y (n), one for each rate.

    SGD with momentum 0.9 and cosine decay, without weight decay. All rates see the same batches,
    and start at zero, since the loss is convex. Its gradient is (softmax - one-hot) x^T / b.
    """
    batch_size = min(batch_size, len(x))
    rates = torch.tensor(rates, device=x.device) * batch_size / 256
    rates = rearrange(rates, 'r -> r 1 1')
    weight = x.new_zeros(len(rates), classes, x.shape[1])
    velocity = torch.zeros_like(weight)
    steps = epochs * math.ceil(len(x) / batch_size)
    step = 0
    for epoch in watched(range(epochs), epochs, 'linear probe, epochs'):
        order = torch.randperm(len(x), generator=keyed_generator(seed, 'probe', epoch))
        for ids in order.to(x.device).split(batch_size):
            logits = torch.einsum('b d, r c d -> r b c', x[ids], weight)
            error = logits.softmax(dim=2) - F.one_hot(y[ids], classes)
            error = error / len(ids)
            gradient = torch.einsum('r b c, b d -> r c d', error, x[ids])
            velocity = 0.9 * velocity + gradient
            weight = weight - rates * cosine(step / steps) * velocity
            step += 1
    return weight


RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)    # for batches of 256 features


def linear_sweep(train, test, classes, device, epochs=50, seed=0):
    """(percent correct on test, chosen rate, {rate: percent correct on held-out images}).

    train, test: (features (n d), labels (n)). The rate is chosen on a random tenth of the
    training images; the probe is then trained again, on all of them.
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
    order = torch.randperm(len(y), generator=keyed_generator(seed, 'held out'))
    tenth = max(1, len(order) // 10)
    held_out, kept = order.to(device).tensor_split([tenth])
    scores = {}
    weights = fit_linear(x[kept], y[kept], classes, RATES, epochs, seed)
    for rate, weight in zip(RATES, weights):
        predicted = (x[held_out] @ weight.T).argmax(dim=1)
        scores[rate] = percent_correct(predicted, y[held_out])
    best = max(scores, key=scores.get)

    weight, = fit_linear(x, y, classes, (best,), epochs, seed)               # c d
    predicted = (normalized(test[0]) @ weight.T).argmax(dim=1)
    return percent_correct(predicted, test[1]), best, scores


# ---------------------------------------------------------------- fine-tuning

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

    # two of them, since loader workers run ahead
    batches = data.batches(steps(), seed, setting.workers)
    for (keys, _), ((images,), labels) in zip(steps(), batches):
        index, epoch = keys[0]
        generator = keyed_generator(seed, epoch, index)
        images = images.to(setting.device, non_blocking=True)
        images = make_view(images, view, generator, data.cropped)
        labels = labels.to(setting.device, non_blocking=True)
        yield normalize(images, setting.mean, setting.std), labels


def finetune(encoder, data, ids, setting, recipe, seed=0):
    """(encoder, linear layer, mean loss of each epoch): a copy, trained on the images `ids`.

    All weights train, even a patch projection that pretraining kept fixed, but no sin-cos table.
    """
    encoder = copy.deepcopy(encoder).requires_grad_(True).train()
    encoder.pos_embed.requires_grad_(encoder.config['pos_embed'] == 'learned')
    head = nn.Linear(encoder.embed_dim, len(data.classes))
    generator = keyed_generator(seed, 'classifier')
    nn.init.normal_(head.weight, std=0.01, generator=generator)               # as in MoCo-v3
    nn.init.zeros_(head.bias)
    head.to(setting.device)

    # no weight decay on biases and norms (1 dimension), class token and positions (3)
    parameters = [*encoder.parameters(), *head.parameters()]
    matrices = [p for p in parameters if p.ndim in (2, 4)]
    others = [p for p in parameters if p.ndim in (1, 3)]
    optimizer = torch.optim.AdamW([
        dict(params=matrices, weight_decay=recipe.weight_decay),
        dict(params=others, weight_decay=0.0),
    ])
    peak = recipe.lr * recipe.batch_size / 512
    steps = recipe.epochs * (len(ids) // recipe.batch_size)
    batches = training_batches(data, ids, setting, recipe, seed)

    losses = []
    for step, (images, labels) in enumerate(watched(batches, steps, 'finetune, steps')):
        progress = step / steps
        for group in optimizer.param_groups:
            group['lr'] = peak * warmup(progress, recipe.warmup) * cosine(progress)
        logits = head(encoder(images, setting.patch_size))
        # -1: an image that stands in for an unreadable one and has no label
        loss = F.cross_entropy(logits, labels, ignore_index=-1, label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.detach())                 # not .item(), which waits for a GPU
    losses = torch.stack(losses).view(recipe.epochs, -1)
    if not losses.isfinite().all():
        raise FloatingPointError('the loss of fine-tuning is not finite; lower the lr of LARGE '
                                 'or SMALL in eval.py')
    return encoder, head, losses.mean(dim=1).tolist()


# ---------------------------------------------------------------- scores and features

def can_score(data):
    """Scores need two classes, 20 labelled images to learn from, and others to test on."""
    bank = len(data.labelled_ids('train'))
    queries = len(data.labelled_ids('test'))
    return len(data.classes) > 1 and bank >= 20 and queries > 0


def scores_of(encoder, data, setting, protocols, limit=None, test_limit=None):  # noqa: PLR0913
    """One dict after the other: name, score and error in percent, bank, queries, and more.

    train.py scores with it too. A limit takes a stratified subset. No random state changes.
    """
    train_ids = data.labelled_ids('train', limit)
    test_ids = data.labelled_ids('test', test_limit)
    classes = len(data.classes)
    device = setting.device

    def result(name, score, bank, queries, **more):
        error = (score * (100 - score) / queries) ** 0.5                      # binomial
        return dict(more, name=name, score=score, error=error, bank=bank, queries=queries)

    if set(protocols) - {'finetune'}:
        train = features_of(encoder, data, 'train', train_ids, setting)
        test = features_of(encoder, data, 'test', test_ids, setting)
        sizes = len(train[1]), len(test[1])

    for protocol, name, k in (('nn', 'NN', 1), ('knn', '20-NN', 20)):
        if protocol in protocols:
            bank, labels = train[0].to(device), train[1].to(device)
            predicted = knn_predict(test[0].to(device), bank, labels, classes, k)
            yield result(name, percent_correct(predicted, test[1]), *sizes)

    if 'linear' in protocols:
        score, best, held_out = linear_sweep(train, test, classes, device)
        shown = ', '.join(f'{rate:g}: {percent:.1f}' for rate, percent in held_out.items())
        say(f'  rates and percent correct on held-out images: {shown}')
        yield result('linear', score, *sizes, rate=best, held_out=held_out)

    if 'finetune' in protocols:
        recipe = LARGE if setting.img_size >= 64 else SMALL
        # a small data set has smaller batches, so that an epoch has 20 steps
        batch_size = min(recipe.batch_size, max(2, len(train_ids) // 20))
        recipe = replace(recipe, batch_size=batch_size)
        encoder, head, losses = finetune(encoder, data, train_ids, setting, recipe)
        say(f'  training loss {losses[0]:.3f} in the first epoch, {losses[-1]:.3f} in the last')
        features, labels = features_of(encoder, data, 'test', test_ids, setting)
        predicted = head(features.to(device)).argmax(dim=1)
        yield result('finetune', percent_correct(predicted, labels), len(train_ids), len(labels),
                     losses=losses, **asdict(recipe))


def export(encoder, data, setting, path):
    """Write the features of all images that can be read, as an .npz file of numpy.

    train_features (n d), train_labels (n; -1: none), train_files (n; of folders), the same for
    test, classes (c), patch_size, and transform, JSON for timm.data.create_transform. No image is
    in both.
    """
    output = open(f'{path}.partial', 'wb')           # first: a wrong path is found before any work
    transform = data.transform(setting.side, setting.img_size)
    transform.update(mean=setting.mean, std=setting.std)
    arrays = dict(
        classes=np.array(data.classes, dtype=str),
        transform=json.dumps(transform),
        patch_size=setting.patch_size)
    held_out = set(data.files['test'])
    for split in ('train', 'test'):
        files = data.files[split]
        ids = torch.arange(len(data.labels[split]))
        if split == 'train' and files:
            ids = torch.tensor([i for i, file in enumerate(files) if file not in held_out])
        if len(ids) == 0:
            continue
        features, labels = features_of(encoder, data, split, ids, setting)
        arrays[f'{split}_features'] = features.numpy()
        arrays[f'{split}_labels'] = labels.numpy()
        if files:
            read = [files[i] for i in ids if files[i] not in data.unreadable[split]]
            arrays[f'{split}_files'] = np.array(read)
    np.savez(output, **arrays)
    output.close()
    os.replace(output.name, path)
    say(f'{path} holds {", ".join(arrays)}')


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
    add('--export', metavar='FILE.npz', help='write the features of all images')
    add('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    args = parser.parse_args(argv)
    if Path(args.weights).is_dir():
        args.weights = str(Path(args.weights) / 'backbone.pt')
    return args


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
    if args.export and args.patch_size and len(args.patch_size) > 1:
        raise ValueError('--export writes the features of one --patch-size')

    protocols = args.protocol or ([] if args.export else ['nn', 'knn'])
    for patch_size in args.patch_size or [config['patch_size']]:
        start = time.perf_counter()
        setting = Setting(args.img_size or config['img_size'], patch_size, mean, std,
                          torch.device(args.device), args.workers)
        tokens = 1 + (setting.side // patch_size) ** 2
        say(f'images of {setting.side} px in patches of {patch_size}, {tokens} tokens; '
            f'mean {mean}, std {std}')
        if args.export:
            export(encoder, data, setting, args.export)
        for result in scores_of(encoder, data, setting, protocols, args.limit):
            seconds = time.perf_counter() - start
            result.update(weights=args.weights, dataset=data.name, tokens=tokens,
                          img_size=setting.img_size, patch_size=patch_size, mean=mean, std=std,
                          seconds=seconds)
            with open(Path(args.weights).with_name('eval.jsonl'), 'a') as file:
                file.write(json.dumps(result) + '\n')
            say(f'  {result["name"]}: {result["score"]:.2f} +- {result["error"]:.2f} % on '
                f'{result["queries"]} test images, {seconds:.0f} s')


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f'eval.py: error: {error}')
