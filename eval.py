"""Score a pretrained backbone: nearest neighbour, weighted k-NN, linear probe, fine-tuning.

    python eval.py --weights runs/NAME/backbone.pt
    python eval.py --weights runs/NAME/backbone.pt --protocol nn knn linear --patch-size 4 8 --k 10 20
    python eval.py --weights vit-s-300ep.pth.tar --dataset folder --data-root imagenet --protocol linear finetune
    torchrun --nproc_per_node 8 eval.py ...

The feature is the class token after the final norm, of all tokens: evaluation never drops any. With several patch
sizes the table shows accuracy against sequence length and cost. Each score is also a JSON line of eval.jsonl, beside
the weights. Protocols:

    nn, knn    DINO's eval_knn.py: of the k training images with the highest cosine, each votes exp(cosine / T)
    linear     sweep: a linear classifier on cached features, ten learning rates at once, chosen on held-out images
               moco-v3: main_lincls.py, a classifier on new random crops in every epoch
    finetune   all weights, DeiT's recipe as MoCo-v3 uses it from 64 px on, a short and mild one below

Shapes: n images, m images of the bank, d width, b batch, c classes, r learning rates.
"""
import argparse
import contextlib
import copy
import json
import math
import os
import pickle
import re
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

import data as datasets
from compress import forward_flops
from schedule import cosine, ramp
from vit import ViT, sincos_table

# Fine-tuning: (from 64 px on: DeiT's main.py; smaller images: ours, to finish on a laptop, chosen by --validate)
RECIPE = dict(epochs=(150, 5), batch_size=(1024, 64), lr=(5e-4, 1e-2), mixup=(0.8, 0.0), cutmix=(1.0, 0.0),
              randaugment=(9, 0), erasing=(0.25, 0.0), crop_scale=(0.08, 0.9), smoothing=(0.1, 0.0), drop_path=(0.1, 0.0))
PROBE_RATES = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)  # per 256 images, for normalized features
BLOCK = 500  # images per forward; processes share whole blocks, so any number of them rounds alike


# ---------------------------------------------------------------- weights

def read_file(path, trust=False):
    """The contents of a checkpoint; classes are unpickled only on demand, since that can run any code."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no weights at {path}; --weights is the backbone.pt in the folder of a run, or a '
                                f'checkpoint of timm, MoCo-v3 or DINO')
    try:
        return torch.load(path, map_location='cpu', weights_only=not trust)
    except Exception as error:
        if isinstance(error, pickle.UnpicklingError) and (needs := re.search(r'GLOBAL ([\w.]+)', str(error))):
            raise ValueError(f'{path} holds more than tensors ({needs[1]}), and loading that can run code; if you trust '
                             f'where it comes from, add --trust-checkpoint') from None
        raise ValueError(f'{path} cannot be read, it is truncated or no checkpoint: {type(error).__name__} '
                         f'{str(error).partition(chr(10))[0][:200]}') from None


def find_encoder(saved):
    """(layout, tensors under timm's names, number of other tensors in their dict), by the keys.

    Ours and MAE: 'model'; timm: the dict itself; MoCo-v3: 'state_dict' with module.base_encoder.*; DINO: 'teacher'
    (rather than 'student') with backbone.* or module.backbone.*.
    """
    if not isinstance(saved, dict):
        raise ValueError(f'the file holds a {type(saved).__name__}, not a dict of tensors')
    for container in ('teacher', 'student', 'state_dict', 'model', None):
        tensors = saved if container is None else saved.get(container)
        if not isinstance(tensors, dict):
            continue
        tensors = {key: value for key, value in tensors.items() if isinstance(key, str) and torch.is_tensor(value)}
        for prefix in ('module.base_encoder.', 'module.backbone.', 'backbone.', 'module.', ''):
            if f'{prefix}patch_embed.proj.weight' in tensors:
                found = {key[len(prefix):]: value for key, value in tensors.items() if key.startswith(prefix)}
                found = {key: value for key, value in found.items() if key.split('.')[0] not in ('head', 'head_dist')}
                return f'{container or "tensors"}: {prefix}*', found, len(tensors) - len(found)
    if 'method' in saved:
        raise ValueError('this is the checkpoint of a run; take the backbone.pt beside it')
    keys = [str(key) for key in next((saved[k] for k in ('state_dict', 'model') if isinstance(saved.get(k), dict)), saved)]
    raise ValueError(f'no ViT in the file: no patch_embed.proj.weight among the {len(keys)} keys {", ".join(keys[:3])} ...')


def sizes_of(tensors, num_heads=None, layout=''):
    """Arguments of the ViT that the tensors belong to. The number of heads leaves no trace in their shapes."""
    if tensors['patch_embed.proj.weight'].ndim != 4:
        raise ValueError(f'patch_embed.proj.weight has {tensors["patch_embed.proj.weight"].ndim} dimensions, not the 4 of a patch projection')
    embed_dim, in_chans, patch_size, _ = tensors['patch_embed.proj.weight'].shape
    pos = tensors.get('pos_embed', torch.zeros(1, 0, 0))
    grid = math.isqrt(max(0, pos.shape[1] - 1))
    if grid < 1 or pos.shape != (1, 1 + grid * grid, embed_dim):
        raise ValueError(f'pos_embed has the shape {tuple(pos.shape)}, not (1, 1 + a square grid, {embed_dim}): the '
                         f'weights are of another architecture')
    blocks = [int(match[1]) for key in tensors if (match := re.match(r'blocks\.(\d+)\.', key))]
    hidden = tensors.get('blocks.0.mlp.fc1.bias', torch.zeros(4 * embed_dim)).numel()
    rounding = 1e-5 if pos.dtype == torch.float32 else 5e-3
    fixed = embed_dim % 4 == 0 and torch.allclose(pos[0, 1:].float(), sincos_table(grid, grid, embed_dim)[0], atol=rounding)
    wide = {1280: 16, 1408: 16, 1664: 16}                                      # ViT-H, g, G; else 64 wide
    if fixed and layout.startswith('state_dict: module.'):
        wide[384] = 12                                                         # MoCo-v3's ViT-S, vits.py
    heads = num_heads or wide.get(embed_dim, max(1, embed_dim // 64))
    return dict(img_size=grid * patch_size, patch_size=patch_size, in_chans=in_chans, embed_dim=embed_dim,
                depth=1 + max(blocks, default=-1), num_heads=heads, mlp_ratio=hidden / embed_dim,
                pos_embed='sincos' if fixed else 'learned')


def load_backbone(path, num_heads=None, trust=False, say=lambda *_: None):
    """(ViT, dict of sizes, mean, std, dataset) of a backbone.pt of train.py or a checkpoint of timm, MoCo-v3 or DINO.

    The last three are None where the file does not say; ImageNet's mean and std for foreign RGB weights.
    """
    saved = read_file(path, trust)
    try:
        layout, tensors, others = find_encoder(saved)
        known = isinstance(saved.get('sizes'), dict) and {'mean', 'std'} <= saved.keys()
        if known and num_heads not in (None, saved['sizes'].get('num_heads')):
            raise ValueError(f'--num-heads {num_heads}: the file says {saved["sizes"]["num_heads"]}, leave the flag out')
        sizes = saved['sizes'] if known else sizes_of(tensors, num_heads, layout)
        try:
            encoder = ViT(**sizes)
        except TypeError as error:
            raise ValueError(f'its sizes are not those of a backbone.pt of train.py: {error}') from None
        sizes = encoder.sizes
        wanted = encoder.state_dict()
        missing, unexpected = sorted(wanted.keys() - tensors.keys()), sorted(tensors.keys() - wanted.keys())
        misshapen = [f'{key} is {tuple(tensors[key].shape)}, not {tuple(wanted[key].shape)}' for key in wanted
                     if key in tensors and tensors[key].shape != wanted[key].shape]
        counts = (f'{len(wanted) - len(missing) - len(misshapen)} tensors loaded, {len(missing)} missing, '
                  f'{len(unexpected)} unexpected')
        if missing or unexpected or misshapen:  # a part of an encoder would be scored as if it were trained
            some = [*(f'missing {key}' for key in missing), *(f'unexpected {key}' for key in unexpected), *misshapen]
            raise ValueError(f'{counts}: the weights are of another architecture, or a part of one ({"; ".join(some[:3])})')
        broken = [key for key, value in tensors.items() if not value.isfinite().all()]
        if broken:
            raise ValueError(f'{", ".join(broken[:3])} is not finite: the run that made it diverged; take an earlier checkpoint')
    except ValueError as error:
        raise ValueError(f'{path}: {error}') from None
    encoder.load_state_dict(tensors)
    assumed = '' if known or num_heads else ' (assumed, see --num-heads)'
    say(f'{path}: {counts}, {others} of heads and other parts left out; layout {layout}; width {sizes["embed_dim"]}, depth '
        f'{sizes["depth"]}, {sizes["num_heads"]} heads{assumed}, {sizes["pos_embed"]} positions')
    imagenet = (datasets.IMAGENET_MEAN, datasets.IMAGENET_STD) if sizes['in_chans'] == 3 else (None, None)
    mean, std = (saved['mean'], saved['std']) if known else imagenet
    return encoder, dict(sizes=sizes, mean=mean, std=std, dataset=saved.get('dataset') if known else None)


# ---------------------------------------------------------------- features

@torch.no_grad()
def extract_features(encoder, batches, mean, std, device, patch_size=None):
    """Class tokens (n d), float32 on the CPU, and labels (n) of (images in [0, 1], labels) batches."""
    was_training = encoder.training
    encoder.eval()
    features, labels = [], []
    for images, batch_labels in batches:
        images = datasets.normalize(images.to(device), mean, std)
        features.append(encoder(images, patch_size).float().cpu())
        labels.append(batch_labels)
    encoder.train(was_training)
    return torch.cat(features), torch.cat(labels)


def restrict(data, split, ids):
    """The data set with `ids` as the only labelled images of a split."""
    part = copy.copy(data)
    if isinstance(data, datasets.FolderImages):
        setattr(part, 'bank' if split == 'train' else 'queries', ids)
    else:
        name = 'labels' if split == 'train' else 'test_labels'
        labels = torch.full_like(getattr(data, name), -1)
        labels[ids] = getattr(data, name)[ids]
        setattr(part, name, labels)
    return part


def hold_out(data):
    """The data set with a random tenth of its labelled training images for test images, always the same."""
    ids = data.labelled_ids('train')
    order = ids[torch.randperm(len(ids), generator=datasets.keyed_generator('held-out images'))]
    held, kept = (part.sort().values for part in order.tensor_split([math.ceil(len(ids) / 10)]))
    part = restrict(data, 'train', kept)
    if isinstance(data, datasets.FolderImages):
        part.test_paths, part.test_labels, part.queries = data.paths, data.labels, held
    else:
        part.test_images, part.test_labels = data.images[held], data.labels[held]
    return part


def share_of(n, shard):
    """The slice of n images that is this process's part of the group; in whole blocks, which are then the same as
    those of one process, and so are the results."""
    rank, world = (dist.get_rank(), dist.get_world_size()) if shard else (0, 1)
    blocks = math.ceil(n / BLOCK)
    return slice(BLOCK * (blocks * rank // world), BLOCK * (blocks * (rank + 1) // world))


def from_all(value, shard):
    """The values of all processes of the group, in order."""
    values = [value] * (dist.get_world_size() if shard else 1)
    if shard:
        dist.all_gather_object(values, value)
    return values


def split_features(encoder, data, split, limit, img_size, device, patch_size=None, workers=0, mean=None, std=None,
                   crop=None, shard=False, progress=False, seed=0):
    """Features (n d) and labels (n) of at most `limit` labelled images of a split, by their center view.

    crop: instead of it, this number's random crop (of this seed) of each training image, in the same order. shard: every process
    of the group takes its part of the images, and all get all features.
    """
    ids = datasets.spread(data.labelled_ids(split), limit)
    ids = ids[share_of(len(ids), shard)]
    if crop is None:
        batches = restrict(data, split, ids).labelled(split, None, img_size, workers)
    else:
        view = datasets.View()  # RandomResizedCrop (0.08, 1), bilinear
        batches = crop_batches(data, ids.split(BLOCK), crop, view, img_size, f'probe {seed}', device, workers)
    batches = tqdm(batches, desc=f'features, {split}', unit=' batches', disable=not progress, leave=False)
    parts = [extract_features(encoder, batches, mean or data.mean, std or data.std, device, patch_size)] if len(ids) else []
    features, labels = zip(*sum(from_all(parts, shard), []))
    return torch.cat(features), torch.cat([part.cpu() for part in labels])


def crop_batches(data, parts, epoch, view, side, seed, device, workers=0, augment=None):
    """Random crops and flips of training images: (images (b c side side) in [0, 1], labels (b)) for each index tensor
    of `parts`. augment: a torchvision transform of one image, run where it is decoded.

    The draws depend on (seed, epoch, images) alone, not on the device or on what came before.
    """
    if isinstance(data, datasets.MemoryImages):
        for part in parts:
            generator = datasets.keyed_generator(seed, epoch, int(part[0]))
            images = data.images[part].to(device)
            matrices = datasets.crop_matrices(len(part), *images.shape[2:], view, side, generator, device)
            images = datasets.random_crop(images, matrices).transpose(0, 1)
            if augment:
                images = torch.stack([augmented(image, augment, seed, epoch, int(i)) for image, i in zip(images, part)])
            yield images, data.labels[part].to(device)
    else:
        crops_of = partial(augmented_crop, view=view, side=side, seed=seed, augment=augment)
        decoder = datasets.Decoder(data.paths, data.labels, crops_of)
        keys = [[(epoch, i) for i in part.tolist()] for part in parts]
        for (images,), labels in data.loaded(decoder, keys, workers):
            images, labels = images[labels >= 0], labels[labels >= 0]  # without replacements of unreadable files
            yield images.to(device, non_blocking=True).float() / 255, labels.to(device)


def augmented_crop(image, key, view, side, seed, augment):
    crops = datasets.pil_crops(image, key, [view], [side], seed)
    return [augmented(crop, augment, seed, *key) for crop in crops] if augment else crops


def augmented(image, augment, *key):
    """torchvision's transforms draw from the global generator; here from one of this image and epoch."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(datasets.keyed_generator('augment', *key).initial_seed())
        return augment(image)


# ---------------------------------------------------------------- nearest neighbours

@torch.no_grad()
def knn_predict(queries, bank, bank_labels, classes, k=20, temperature=0.07, chunk=BLOCK, half=False, progress=False):
    """Predicted class (n) of queries (n d) by weighted vote of the k nearest of bank (m d), m >= k.

    k = 1 is the plain nearest neighbour. But for rounding, only the memory depends on `chunk`. half: the bank
    takes half the memory, and cosines are rounded to 0.0005.
    """
    dtype = torch.float16 if half else queries.dtype
    bank, bank_labels = F.normalize(bank, dim=1).to(queries.device, dtype), bank_labels.to(queries.device)
    predictions = []
    parts = F.normalize(queries, dim=1).to(dtype).split(chunk)
    for part in tqdm(parts, desc=f'{k}-NN', unit=' batches', disable=not progress, leave=False):
        similarity, nearest = (part @ bank.T).topk(k, dim=1)                    # chunk k
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, bank_labels[nearest], ((similarity - similarity[:, :1]).float() / temperature).exp())  # no overflow
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_scores(bank, query, classes, ks, temperature, device='cpu', half=False, shard=False, progress=False):
    """{k: percent correct}. bank, query: (features, labels), the same in all processes if they share the queries."""
    mine = share_of(len(query[1]), shard)
    queries, labels = query[0][mine].to(device), query[1][mine]
    scores = {}
    for k in ks:
        predicted = knn_predict(queries, *bank, classes, k, temperature, half=half, progress=progress).cpu()
        scores[k] = 100 * sum(from_all((predicted == labels).sum().item(), shard)) / len(query[1])
    return scores


def percent(predicted, labels):
    return 100 * (predicted == labels).sum().item() / len(labels)


def classes_of(logits):
    """The predicted classes, on the CPU; NaN would pass for class 0."""
    if not logits.isfinite().all():
        raise FloatingPointError('the classifier diverged, its outputs are not finite; lower the learning rate')
    return logits.argmax(dim=1).cpu()


def knn_accuracy(encoder, data, img_size, device, patch_size=None, ks=(1, 20), temperature=0.07, bank_limit=None,
                 query_limit=None, workers=0):
    """({k: percent correct}, bank size, number of queries) on the labelled test images of a data set."""
    check_labels(data, bank_limit, max(ks))
    bank, query = (split_features(encoder, data, split, limit, img_size, device, patch_size, workers)
                   for split, limit in (('train', bank_limit), ('test', query_limit)))
    return knn_scores(bank, query, len(data.classes), ks, temperature, device), len(bank[0]), len(query[0])


def check_labels(data, limit=None, k=1):
    """Every protocol needs labels of at least two classes; k-NN needs k images."""
    ids = datasets.spread(data.labelled_ids('train'), limit)
    if len(data.classes) < 2 or not len(ids):
        raise ValueError('evaluation needs labelled training images: in at least two first-level folders')
    if not len(data.labelled_ids('test')):
        raise ValueError('evaluation needs labelled test images: in first-level folders named as those of the training images; '
                         'or score on a tenth of the training images by --validate')
    if len(data.labels[ids].unique()) < 2:
        raise ValueError(f'the {len(ids)} training images are all of one class; evaluation needs at least two classes')
    if k > len(ids):
        raise ValueError(f'k = {k} is more than the {len(ids)} images of the bank; lower --k')


# ---------------------------------------------------------------- linear probe on cached features

def fit_linear(x, y, classes, rates, epochs, batch_size, seed=0, progress=False):
    """Linear classifiers (r c d) of features x (n d) with labels y (n), one per learning rate, trained in one pass.

    SGD with momentum 0.9, no weight decay, cosine to 0. All rates see the same batches; the loss is convex, so they
    start at 0. The gradient of the mean cross entropy at the logits is (softmax - one-hot) / b.
    """
    rates = torch.tensor(rates, device=x.device)[:, None, None] * batch_size / 256
    weight = torch.zeros(len(rates), classes, x.shape[1], device=x.device)
    velocity = torch.zeros_like(weight)
    steps, step = epochs * math.ceil(len(x) / batch_size), 0
    for epoch in tqdm(range(epochs), desc='linear', unit=' epochs', disable=not progress, leave=False):
        order = torch.randperm(len(x), generator=datasets.keyed_generator(seed, 'probe', epoch)).to(x.device)
        for part in order.split(batch_size):
            logits = torch.einsum('b d, r c d -> r b c', x[part], weight)
            error = (logits.softmax(dim=2) - F.one_hot(y[part], classes)) / len(part)
            velocity = 0.9 * velocity + torch.einsum('r b c, b d -> r c d', error, x[part])
            weight -= rates * cosine(step / steps) * velocity
            step += 1
    return weight


def linear_sweep(train, test, crops, classes, rates, epochs, batch_size, device, seed=0, progress=False):
    """(percent correct on test, chosen rate, {rate: percent correct on the held-out tenth of the training images}).

    train, test: (features (n d), labels (n)) of center views; crops: list of (n d), more views of the same training
    images. The chosen rate then trains once more on all of them.
    """
    views, labels = torch.stack([train[0], *crops]).to(device), train[1].to(device)  # v n d
    mean, var = views.flatten(0, 1).mean(dim=0), views.flatten(0, 1).var(dim=0)

    def normalized(features):
        """BatchNorm without affine, then a constant feature for the bias. Frozen features have fixed statistics, so
        those of all training images take the place of a batch's; with them one range of rates serves all backbones."""
        return F.pad((features.to(device) - mean) / (var + 1e-6).sqrt(), (0, 1), value=1.0)

    def fit(ids, rates):
        return fit_linear(normalized(views[:, ids]).flatten(0, 1), labels[ids].repeat(len(views)), classes, rates, epochs,
                          batch_size, seed, progress)

    order = torch.randperm(len(labels), generator=datasets.keyed_generator(seed, 'held out')).to(device)
    held, kept = order.tensor_split([max(1, len(order) // 10)])
    x = normalized(views[0, held])
    outputs = {rate: x @ weight.T for rate, weight in zip(rates, fit(kept, rates))}
    scores = {rate: percent(logits.argmax(dim=1), labels[held]) if logits.isfinite().all() else 0.0 for rate, logits in outputs.items()}
    best = max(scores, key=scores.get)
    weight = fit(order, [best])[0]                                            # c d
    return percent(classes_of(normalized(test[0]) @ weight.T), test[1]), best, scores


# ---------------------------------------------------------------- trained by gradient: MoCo-v3's probe, fine-tuning

class Classifier(nn.Module):
    """Backbone at one patch size and a linear layer; one module, as DistributedDataParallel wants it."""

    def __init__(self, encoder, classes, patch_size):
        super().__init__()
        self.encoder, self.patch_size = encoder, patch_size
        self.head = nn.Linear(encoder.embed_dim, classes)
        nn.init.normal_(self.head.weight, std=0.01)  # MoCo-v3 main_lincls.py
        nn.init.zeros_(self.head.bias)

    def forward(self, images):
        return self.head(self.encoder(images, self.patch_size))


def train_classifier(model, optimizer, lr_at, data, ids, epochs, batch_size, view, img_size, mean, std, device, workers=0,
                     seed=0, frozen=False, smoothing=0.0, augment=None, mix=None, erase=None, ema=None, shard=False,
                     progress=False):
    """Trains on random crops of the images `ids` and returns the mean loss of each epoch (of this process's share).

    lr_at(epoch) is asked at fractional epochs; a parameter group may scale it. frozen: the backbone stays in eval
    mode. mix: MixUp or CutMix of a batch; erase: RandomErasing of one normalized image.
    """
    rank, world = (dist.get_rank(), dist.get_world_size()) if shard else (0, 1)
    parallel = DistributedDataParallel(model, device_ids=[device.index] if device.type == 'cuda' else None) if shard else model
    half = device.type == 'cuda' and torch.cuda.is_bf16_supported() and not frozen
    steps = len(ids) // batch_size  # the last partial batch is dropped
    bar = tqdm(total=epochs * steps, unit=' steps', disable=not progress, leave=False, dynamic_ncols=True)
    losses = []
    torch.manual_seed(seed + rank)  # drop path, mixup, erasing: other draws in every process
    for epoch in range(epochs):
        model.train()
        model.encoder.train(not frozen)
        order = ids[torch.randperm(len(ids), generator=datasets.keyed_generator(seed, 'order', epoch))]
        parts = [part[rank::world] for part in order.split(batch_size)[:steps]]
        total = 0.0
        for step, (images, labels) in enumerate(crop_batches(data, parts, epoch, view, img_size, seed, device, workers, augment)):
            for group in optimizer.param_groups:
                group['lr'] = lr_at(epoch + step / steps) * group.get('scale', 1.0)
            images = datasets.normalize(images, mean, std)
            if erase:
                images = torch.stack([erase(image) for image in images])
            if mix:
                images, labels = mix(images, labels)                           # labels become b c
            with torch.autocast('cuda', torch.bfloat16) if half else contextlib.nullcontext():
                logits = parallel(images)
            loss = F.cross_entropy(logits.float(), labels, label_smoothing=smoothing)
            if not loss.isfinite():
                raise FloatingPointError(f'the loss is {loss.item()} in epoch {epoch}; lower the learning rate')
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if ema:
                ema.update_parameters(model)
            total += loss.item()
            bar.update()
        losses.append(total / steps)
        bar.set_postfix_str(f'loss {losses[-1]:.3f}', refresh=False)
    bar.close()
    return losses


def layer_groups(model, weight_decay, layer_decay):
    """Parameter groups of AdamW. No weight decay on biases, norms, the class token and positions (DeiT); the learning
    rate of block i of L is scaled by layer_decay^(L - i), of the embeddings by layer_decay^(L + 1) (BEiT, MAE)."""
    depth, groups = len(model.encoder.blocks), {}
    for name, parameter in model.named_parameters():
        place = name.removeprefix('encoder.')
        layer = (int(place.split('.')[1]) + 1 if place.startswith('blocks.') else
                 0 if place.startswith(('cls_token', 'pos_embed', 'patch_embed')) else depth + 1)
        decay = weight_decay if parameter.ndim > 1 and place not in ('cls_token', 'pos_embed') else 0.0
        group = groups.setdefault((layer, decay), dict(params=[], weight_decay=decay, scale=layer_decay ** (depth + 1 - layer)))
        group['params'].append(parameter)
    return list(groups.values())


def finetune(encoder, classes, data, ids, patch_size, img_size, recipe, mean, std, device, weight_decay=0.05, layer_decay=1.0,
             ema_decay=0.0, workers=0, seed=0, shard=False, progress=False):
    """(classifier, mean loss of each epoch): a copy of the encoder, fine-tuned by DeiT's recipe as MoCo-v3 uses it.

    recipe: the numbers named in RECIPE. Everything trains, also a patch projection that was frozen, and the position
    table where the base patch size uses it. Left out of DeiT's: repeated augmentation, magnitude noise of RandAugment.
    """
    from torchvision.transforms import v2  # here: the frozen protocols need torch and einops alone
    torch.manual_seed(seed)
    model = Classifier(copy.deepcopy(encoder).requires_grad_(True), classes, patch_size).to(device)
    for i, block in enumerate(model.encoder.blocks):
        block.drop_path = recipe['drop_path'] * i / max(1, len(model.encoder.blocks) - 1)
    optimizer = torch.optim.AdamW(layer_groups(model, weight_decay, layer_decay))
    epochs, peak = recipe['epochs'], recipe['lr'] * recipe['batch_size'] / 512
    warm = min(5, epochs / 10)

    def lr_at(epoch):  # DeiT: from 1e-6 up, then cosine to 1e-5
        if epoch < warm:
            return 1e-6 + (peak - 1e-6) * epoch / warm
        return ramp(peak, min(peak, 1e-5), (epoch - warm) / (epochs - warm))

    # torchvision counts the magnitude in 31 steps, DeiT's rand-m9 in 10, and applies each of its two operations half the time
    magnitude = round(3 * recipe['randaugment'])
    augment = v2.Compose([v2.RandomApply([v2.RandAugment(1, magnitude)], p=0.5)] * 2) if magnitude else None
    mixes = [kind(alpha=recipe[name], num_classes=classes) for kind, name in ((v2.MixUp, 'mixup'), (v2.CutMix, 'cutmix'))
             if recipe[name]]
    erase = v2.RandomErasing(recipe['erasing'], value='random') if recipe['erasing'] else None
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(ema_decay)) if ema_decay else None
    view = datasets.View(scale=(recipe['crop_scale'], 1.0), interpolation='bicubic')
    losses = train_classifier(model, optimizer, lr_at, data, ids, epochs, recipe['batch_size'], view, img_size, mean, std, device,
                              workers, seed, smoothing=recipe['smoothing'], augment=augment, mix=v2.RandomChoice(mixes) if mixes else None,
                              erase=erase, ema=ema, shard=shard, progress=progress)
    return ema.module if ema else model, losses


def probe_moco(encoder, classes, data, ids, patch_size, img_size, epochs, batch_size, lr, mean, std, device, workers=0, seed=0,
               shard=False, progress=False):
    """(classifier, mean loss of each epoch): MoCo-v3's linear protocol, the frozen backbone seeing new crops each epoch."""
    torch.manual_seed(seed)
    model = Classifier(encoder.requires_grad_(False), classes, patch_size).to(device)
    optimizer = torch.optim.SGD(model.head.parameters(), lr=0.0, momentum=0.9)
    return model, train_classifier(model, optimizer, lambda epoch: lr * batch_size / 256 * cosine(int(epoch) / epochs), data, ids,
                                   epochs, batch_size, datasets.View(), img_size, mean, std, device, workers, seed, frozen=True,
                                   shard=shard, progress=progress)


# ---------------------------------------------------------------- command line

def pick_device(name):
    """The device of a --device flag; on CUDA, this process's own one of the machine."""
    if name == 'auto':
        name = 'cuda' if torch.cuda.is_available() else 'mps' if torch.backends.mps.is_available() else 'cpu'
    if (name == 'cuda' and not torch.cuda.is_available()) or (name == 'mps' and not torch.backends.mps.is_available()):
        raise ValueError(f'--device {name} is not there; use --device cpu, or a torch built for it')
    if name != 'cuda':
        return torch.device(name)
    local_rank, count = int(os.environ.get('LOCAL_RANK', 0)), torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f'process {local_rank} of this machine has no GPU, there are {count}; lower --nproc_per_node')
    torch.cuda.set_device(local_rank)
    return torch.device('cuda', local_rank)


def join_processes(device):
    """Joins the process group that torchrun's environment describes."""
    # DistributedDataParallel imports this. After the group it would keep the group alive, whose threads then outlive
    # destroy_process_group; one that frees a tensor while Python shuts down aborts the process (torch 2.15, gloo).
    import torch._dynamo  # noqa: F401
    dist.init_process_group('nccl' if device.type == 'cuda' else 'gloo')


def exit_with(line):
    """Ends this process with a line about what went wrong. Until the processes have joined they all meet the same error,
    and the first says it."""
    rank = os.environ.get('RANK', '0')
    if rank == '0':
        sys.exit(line)
    sys.exit(f'{line}  [process {rank}]' if dist.is_available() and dist.is_initialized() else 1)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False, formatter_class=Formatter)
    g = parser.add_argument_group('weights')
    g.add_argument('--weights', required=True, help='backbone.pt of a run, or a checkpoint of timm, MoCo-v3 or DINO')
    g.add_argument('--num-heads', type=int, help='of foreign weights (default: 64 wide; 16 for ViT-H, g, G; 12 for the ViT-S of MoCo-v3)')
    g.add_argument('--trust-checkpoint', action='store_true', help='unpickle classes in the file, which can run any code')
    g.add_argument('--mean', type=float, nargs='+', help="by channel, of foreign weights (default: ImageNet's; many of timm's: 0.5 0.5 0.5)")
    g.add_argument('--std', type=float, nargs='+', help='the same')
    g.add_argument('--random-init', action='store_true', help='keep the sizes, draw new weights: the score of no training')

    g = parser.add_argument_group('data')
    g.add_argument('--dataset', choices=datasets.DATASETS, help='default: the one that it was trained on')
    g.add_argument('--data-root', default='data', help='folder of the data set')
    g.add_argument('--download', action='store_true', help='fetch the data set if it is absent')
    g.add_argument('--limit', type=int, help='use this many training images, evenly spaced')
    g.add_argument('--img-size', type=int, help='side in pixels (default: the one that it was trained at)')
    g.add_argument('--workers', type=int, default=2, help='loader processes (data set folder)')

    g = parser.add_argument_group('what to measure')
    g.add_argument('--validate', action='store_true', help='score on a held-out tenth of the training images, to choose settings by')
    g.add_argument('--protocol', nargs='+', choices=('nn', 'knn', 'linear', 'finetune'), default=['nn', 'knn'], help='any of them')
    g.add_argument('--patch-size', nargs='+', type=int, help='score at these patch sizes (default: the base one)')
    g.add_argument('--k', nargs='+', type=int, default=[20], help='neighbours of the weighted k-NN')
    g.add_argument('--temperature', type=float, default=0.07, help='of the vote exp(cosine / T)')
    g.add_argument('--half-bank', action='store_true', help='keep the bank in half precision (GPU)')

    g = parser.add_argument_group('linear probe')
    g.add_argument('--probe-recipe', choices=('sweep', 'moco-v3'), default='sweep',
                   help='cached features and many rates, or new crops each epoch and one rate')
    g.add_argument('--probe-rates', nargs='+', type=float, help='per 256 images (default: sweep ten from 0.01 to 10, moco-v3 3)')
    g.add_argument('--probe-epochs', type=int, help='default: sweep 50, moco-v3 90')
    g.add_argument('--probe-batch', type=int, default=256, help='images per step, over all processes (MoCo-v3: 1024)')
    g.add_argument('--probe-crops', type=int, default=0, help='sweep: random crops of each image beside its center view (not for small images)')

    g = parser.add_argument_group('fine-tuning (two defaults: from 64 px on as DeiT, below)')
    for flag, text in (('epochs', 'passes over the training images'), ('batch-size', 'images per step, over all processes'),
                       ('lr', 'peak learning rate per 512 images'), ('mixup', 'alpha, 0: none'), ('cutmix', 'alpha, 0: none'),
                       ('randaugment', 'magnitude of 10, 0: none'), ('erasing', 'probability of random erasing'),
                       ('crop-scale', 'smallest area of a random crop'), ('smoothing', 'of the labels'),
                       ('drop-path', 'of the last block, rising linearly from 0')):
        large, small = RECIPE[flag.replace('-', '_')]
        g.add_argument(f'--{flag}', type=type(large), help=f'{text} (default: {large}, {small})')
    g.add_argument('--weight-decay', type=float, default=0.05, help='not on biases, norms, class token, positions')
    g.add_argument('--layer-decay', type=float, default=1.0, help='factor on the learning rate from block to block downwards (MAE: 0.65)')
    g.add_argument('--ema', type=float, default=0.0, help='decay of averaged weights, which are then scored; 0: none (DeiT: 0.99996)')

    g = parser.add_argument_group('run')
    g.add_argument('--seed', type=int, default=0, help="of the sweep's held-out tenth, crops, classifiers (--validate's tenth is always the same)")
    g.add_argument('--device', default='auto', choices=('auto', 'cpu', 'cuda', 'mps'), help='auto: cuda if there, else mps, else cpu')
    return parser.parse_args()


def numbers(values):
    return ' '.join(f'{value:.3g}' for value in values)


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Shows the docstring as it is written, and the default of each flag that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.default is False else super()._get_help_string(action)


def check(args):
    """Numbers that no later code would refuse in a way that names the flag."""
    for name in ('k', 'temperature', 'patch_size', 'img_size', 'limit', 'probe_rates', 'probe_epochs', 'probe_batch', 'epochs',
                 'batch_size', 'lr', 'num_heads', 'layer_decay', 'crop_scale'):
        value = getattr(args, name)
        for number in value if isinstance(value, list) else [value]:
            if number is not None and not 0 < number < math.inf:
                raise ValueError(f'--{name.replace("_", "-")} {number} must be above 0')
    for name, high in dict(drop_path=1, smoothing=1, ema=1, erasing=1.01, mixup=math.inf, cutmix=math.inf, randaugment=10.01,
                           weight_decay=math.inf, probe_crops=math.inf, workers=math.inf).items():
        value = getattr(args, name)
        if value is not None and not 0 <= value < high:
            limit = f' and below {high:g}' if high < 99 else ''
            raise ValueError(f'--{name.replace("_", "-")} {value} must be at least 0{limit}')
    if (args.crop_scale or 0) > 1 or args.layer_decay > 1:
        raise ValueError('--crop-scale and --layer-decay are at most 1')
    if args.probe_recipe == 'moco-v3' and (args.probe_crops or len(args.probe_rates or [3]) > 1):
        raise ValueError('--probe-recipe moco-v3 takes one --probe-rates and no --probe-crops')


def main():
    # ---- arguments, processes, device
    args = parse_args()
    check(args)
    shard = 'WORLD_SIZE' in os.environ
    device = pick_device(args.device)
    if args.half_bank and device.type != 'cuda':
        raise ValueError(f'--half-bank is for GPUs, --device {device.type} is slow in half precision; leave it out')
    if shard:
        join_processes(device)
    world, main_process = dist.get_world_size() if shard else 1, not shard or dist.get_rank() == 0
    say = print if main_process else (lambda *_, **__: None)

    # ---- backbone
    encoder, saved = load_backbone(args.weights, args.num_heads, args.trust_checkpoint, say)
    sizes = saved['sizes']
    if args.random_init:
        torch.manual_seed(args.seed)
        encoder = ViT(**sizes)
        say(f'RANDOM NETWORK: the weights of {args.weights} are not used, only its sizes')
    encoder.to(device)

    # ---- data
    dataset = args.dataset or saved['dataset']
    if dataset is None:
        raise ValueError(f'{args.weights} does not say what it was trained on; add --dataset, one of '
                         f'{", ".join(datasets.DATASETS)}')
    data = datasets.load(dataset, args.data_root, args.download)
    data = hold_out(data) if args.validate else data
    if data.channels != sizes['in_chans']:
        raise ValueError(f'the backbone takes {sizes["in_chans"]} channels, the images of {dataset} have {data.channels}; '
                         f'choose another --dataset')
    check_labels(data, args.limit, max(args.k) if 'knn' in args.protocol else 1)
    train_ids, queries = datasets.spread(data.labelled_ids('train'), args.limit), len(data.labelled_ids('test'))
    tested = 'held-out training images' if args.validate else 'test images'
    classes, mean, std = len(data.classes), args.mean or saved['mean'] or data.mean, args.std or saved['std'] or data.std
    if not len(mean) == len(std) == data.channels or min(std) <= 0:
        raise ValueError(f'--mean {mean} and --std {std} must be {data.channels} numbers each, those of --std above 0')
    img_size, patch_sizes = args.img_size or sizes['img_size'], list(dict.fromkeys(args.patch_size or [encoder.patch_size]))
    for patch_size in patch_sizes:
        encoder.grid(img_size, img_size, patch_size)  # refuses a patch size that does not fit, before any work

    # ---- settings of the trained protocols
    recipe = {key: pair[img_size < 64] if getattr(args, key) is None else getattr(args, key) for key, pair in RECIPE.items()}
    moco = args.probe_recipe == 'moco-v3'
    shares = world if moco else 1  # the sweep runs on cached features, which every process has
    recipe['batch_size'] = min(recipe['batch_size'], len(train_ids)) // world * world
    probe_batch = min(args.probe_batch, len(train_ids)) // shares * shares
    if not recipe['batch_size'] or not probe_batch:
        raise ValueError(f'--batch-size, --probe-batch and the {len(train_ids)} images must be at least the {world} processes')
    steps = recipe['epochs'] * (len(train_ids) // recipe['batch_size'])
    if 'finetune' in args.protocol and args.ema and steps * (1 - args.ema) < 3:
        raise ValueError(f'--ema {args.ema} averages over more steps than the {steps} of this run, and would score its first weights; '
                         f'lower it to {max(0, 1 - 3 / steps):.4f} or less, or leave it out')
    regularized = dict(weight_decay=args.weight_decay, layer_decay=args.layer_decay, ema_decay=args.ema)
    probe = dict(recipe=args.probe_recipe, epochs=args.probe_epochs or (90 if moco else 50), batch_size=probe_batch,
                 crops=args.probe_crops)
    rates = args.probe_rates or ([3.0] if moco else list(PROBE_RATES))
    assumed = '' if saved['dataset'] or args.mean else ' (assumed, see --mean)'
    say(f'{dataset}: class token, {img_size} px, bank {len(train_ids)}, {queries} {tested}, {classes} classes, '
        f'T {args.temperature}; mean {numbers(mean)}, std {numbers(std)}{assumed}; {device}, {world} process(es)')
    if isinstance(data, datasets.FolderImages) and (others := len(data.queries) - queries):
        say(f'left out: {others} test images in no folder with the name of a class')
    if 'finetune' in args.protocol:
        say('fine-tuning: ' + ', '.join(f'{key} {value}' for key, value in recipe.items())
            + ('; grey images: no colour operation in RandAugment' if data.channels == 1 and recipe['randaugment'] else ''))

    # ---- measure
    def flops(side, patch_size):
        return sum(forward_flops((side // patch_size) ** 2, sizes['embed_dim'], sizes['depth'], sizes['mlp_ratio'],
                                 sizes['in_chans'] * patch_size ** 2))

    table, columns = {}, []
    where = dict(mean=mean, std=std, device=device, workers=args.workers, shard=shard, progress=main_process)
    for patch_size in patch_sizes:
        tokens = (img_size // patch_size) ** 2
        cost = flops(img_size, patch_size) / flops(sizes['img_size'], encoder.patch_size)
        cells = table[patch_size] = [f'{patch_size:7}{tokens:8}{cost:7.3f}']

        def report(column, score, start, **settings):
            """A line on the screen, a line of eval.jsonl, a cell of the table."""
            seconds, error = time.perf_counter() - start, (score * (100 - score) / queries) ** 0.5  # binomial
            cells.append(f'{score:.2f} +- {error:.2f}')
            columns.extend([column] if patch_size == patch_sizes[0] else [])
            say(f'  patch size {patch_size}, {tokens} tokens, {column}: {score:.2f} +- {error:.2f} % in {seconds:.1f} s')
            if main_process:
                with open(Path(args.weights).with_name('eval.jsonl'), 'a') as file:
                    file.write(json.dumps(dict(
                        score=score, error=error, seconds=seconds, weights=args.weights, random=args.random_init, seed=args.seed,
                        dataset=dataset, img_size=img_size, num_heads=sizes['num_heads'], mean=mean, std=std,
                        patch_size=patch_size, tokens=tokens, cost=cost,
                        bank=len(train_ids), queries=queries, scored_on=tested, **settings)) + '\n')

        def features(split, crop=None, network=encoder):
            limit = args.limit if split == 'train' else None
            return split_features(network, data, split, limit, img_size, patch_size=patch_size, crop=crop, seed=args.seed, **where)

        def trained_score(model):
            """Percent correct of a Classifier on the test images."""
            inputs, labels = features('test', network=model.encoder)
            with torch.no_grad():
                return percent(classes_of(model.head(inputs.to(device))), labels)

        start = time.perf_counter()
        if {'nn', 'knn'} & set(args.protocol) or ('linear' in args.protocol and not moco):
            train, test = features('train'), features('test')
            extraction = time.perf_counter() - start
            say(f'  patch size {patch_size}, {tokens} tokens: features in {extraction:.1f} s')
        for k in dict.fromkeys([1] * ('nn' in args.protocol) + args.k * ('knn' in args.protocol)):
            start = time.perf_counter()
            score = knn_scores(train, test, classes, [k], args.temperature, device, args.half_bank, shard, main_process)[k]
            report('NN' if k == 1 else f'{k}-NN', score, start, protocol='nn' if k == 1 else 'knn', k=k,
                   temperature=args.temperature, half_bank=args.half_bank, feature_seconds=extraction)
        if 'linear' in args.protocol:
            start, before = time.perf_counter(), {key: value.clone() for key, value in encoder.state_dict().items()}
            if moco:
                model, losses = probe_moco(encoder, classes, data, train_ids, patch_size, img_size, probe['epochs'], probe_batch,
                                           rates[0], seed=args.seed, **where)
                score, found = trained_score(model), dict(rate=rates[0], losses=losses)
            else:
                crops = [features('train', crop)[0] for crop in range(args.probe_crops)]
                score, best, held_out = linear_sweep(train, test, crops, classes, rates, probe['epochs'], probe_batch, device,
                                                     args.seed, main_process)
                say('  held-out tenth: ' + ', '.join(f'rate {rate:g} {value:.2f} %' for rate, value in held_out.items()))
                if best in (min(rates), max(rates)) and len(rates) > 1:
                    say(f'  the best rate, {best:g}, is at the edge; widen --probe-rates')
                found = dict(rate=best, held_out=held_out, feature_seconds=extraction)
            after = encoder.state_dict()
            if not all(torch.equal(value, after[key]) for key, value in before.items()):
                raise RuntimeError('the linear probe changed the backbone')
            say(f'  {args.probe_recipe}, rate {found["rate"]:g} per 256, {probe["epochs"]} epochs, batch {probe_batch}; the backbone is unchanged, bit for bit')
            report('linear', score, start, protocol='linear', **probe, **found)
        if 'finetune' in args.protocol:
            start = time.perf_counter()
            model, losses = finetune(encoder, classes, data, train_ids, patch_size, img_size, recipe, seed=args.seed,
                                     **regularized, **where)
            say('  training loss by epoch: ' + ' '.join(f'{loss:.3f}' for loss in losses))
            report('finetune', trained_score(model), start, protocol='finetune', losses=losses, **recipe, **regularized)

    # ---- table
    say(('RANDOM NETWORK, ' if args.random_init else '') + f'percent correct on {queries} {tested}, +- standard error')
    say('  patch  tokens   cost' + ''.join(f'{column:>17}' for column in columns))
    for cells in table.values():
        say(cells[0] + ''.join(f'{cell:>17}' for cell in cells[1:]))


if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError, FloatingPointError) as error:
        exit_with(f'eval.py: error: {error}')
    finally:
        if dist.is_available() and dist.is_initialized():
            dist.destroy_process_group()
