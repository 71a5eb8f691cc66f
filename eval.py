"""Score a pretrained backbone: nearest neighbour and weighted k-NN.

    python eval.py --weights runs/NAME/backbone.pt
    python eval.py --weights runs/NAME/backbone.pt --dataset fashion_mnist --data-root ROOT --protocol nn knn --k 10 20

The feature is the class token after the final norm, of all tokens: evaluation never drops any. Weighted k-NN is
DINO's (eval_knn.py): of the k training images with the highest cosine, each votes exp(cosine / T) for its class.
"""
import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

import data as datasets
from vit import ViT


def load_backbone(path):
    """(ViT, settings) of a `backbone.pt`: {'model': timm-named weights, 'sizes', 'mean', 'std', 'dataset'}."""
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f'no weights at {path}; --weights is the backbone.pt in the folder of a run')
    try:
        saved = torch.load(path, map_location='cpu', weights_only=True)
    except Exception as error:
        raise ValueError(f'{path} cannot be read, it is truncated or not a backbone: '
                         f'{str(error).splitlines()[0]}') from None
    if not isinstance(saved, dict) or not {'model', 'sizes', 'mean', 'std'} <= set(saved):
        raise ValueError(f'{path} is not a backbone.pt of train.py')
    encoder = ViT(**saved['sizes'])
    encoder.load_state_dict(saved['model'])
    return encoder, saved


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


@torch.no_grad()
def knn_predict(queries, bank, bank_labels, classes, k=20, temperature=0.07, chunk=1000):
    """Predicted class (n) of queries (n d) by weighted vote of the k nearest of bank (m d), m >= k.

    k = 1 is the plain nearest neighbour. The result does not depend on `chunk`, only the memory does.
    """
    bank = F.normalize(bank, dim=1)
    predictions = []
    for part in F.normalize(queries, dim=1).split(chunk):
        cosine, nearest = (part @ bank.T).topk(k, dim=1)                        # chunk k
        votes = torch.zeros(len(part), classes, device=part.device)
        votes.scatter_add_(1, bank_labels[nearest], (cosine / temperature).exp())
        predictions.append(votes.argmax(dim=1))
    return torch.cat(predictions)


def knn_accuracy(encoder, data, img_size, device, patch_size=None, ks=(1, 20), temperature=0.07, bank_limit=None,
                 query_limit=None, workers=0, mean=None, std=None):
    """({k: percent correct}, bank size, number of queries) on the labelled test images of a data set."""
    if len(data.classes) < 2:
        raise ValueError('nearest neighbour needs labels: images in at least two first-level folders')
    mean, std = mean or data.mean, std or data.std
    bank, query = (extract_features(encoder, data.labelled(split, limit, img_size, workers), mean, std, device,
                                    patch_size) for split, limit in (('train', bank_limit), ('test', query_limit)))
    if max(ks) > len(bank[0]):
        raise ValueError(f'k = {max(ks)} is more than the {len(bank[0])} images of the bank; lower --k')
    scores = {}
    for k in ks:
        predicted = knn_predict(query[0], *bank, len(data.classes), k, temperature)
        scores[k] = 100 * (predicted == query[1]).float().mean().item()
    return scores, len(bank[0]), len(query[0])


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument('--weights', required=True, help='backbone.pt of a run')
    parser.add_argument('--dataset', choices=datasets.DATASETS, help='default: the one that it was trained on')
    parser.add_argument('--data-root', default='data', help='folder of the data set')
    parser.add_argument('--download', action='store_true', help='fetch the data set if it is absent')
    parser.add_argument('--protocol', nargs='+', choices=('nn', 'knn'), default=['nn', 'knn'], help='what to measure')
    parser.add_argument('--k', nargs='+', type=int, default=[20], help='neighbours of the weighted k-NN')
    parser.add_argument('--temperature', type=float, default=0.07, help='of the vote exp(cosine / T)')
    parser.add_argument('--patch-size', type=int, help='score at another patch size (default: the base one)')
    parser.add_argument('--img-size', type=int, help='default: the one that it was trained at')
    parser.add_argument('--workers', type=int, default=2, help='loader processes (data set folder)')
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    return parser.parse_args()


def main():
    args = parse_args()
    if min(args.k) < 1 or args.temperature <= 0:
        raise ValueError(f'--k {args.k} must be at least 1 and --temperature {args.temperature} above 0')
    encoder, saved = load_backbone(args.weights)
    encoder.to(args.device)
    data = datasets.load(args.dataset or saved['dataset'], args.data_root, args.download)
    if data.channels != saved['sizes']['in_chans']:
        raise ValueError(f'the backbone takes {saved["sizes"]["in_chans"]} channels, the images have {data.channels}; '
                         f'choose another --dataset')
    img_size, patch_size = args.img_size or saved['sizes']['img_size'], args.patch_size or encoder.patch_size
    tokens = math.prod(encoder.grid(img_size, img_size, patch_size))
    ks = ([1] if 'nn' in args.protocol else []) + (args.k if 'knn' in args.protocol else [])
    start = time.time()
    scores, bank, queries = knn_accuracy(encoder, data, img_size, args.device, patch_size, ks, args.temperature,
                                         workers=args.workers, mean=saved['mean'], std=saved['std'])
    print(f'{args.weights}: class token, {img_size} px, patch size {patch_size}, {tokens} tokens, bank {bank}, '
          f'{queries} test images, T {args.temperature}, {time.time() - start:.1f} s')
    with open(Path(args.weights).with_name('eval.jsonl'), 'a') as file:
        for k, score in scores.items():
            error = (score * (100 - score) / queries) ** 0.5
            print(f'  {"nearest neighbour" if k == 1 else f"weighted {k}-NN":18} {score:6.2f} +- {error:.2f} %')
            file.write(json.dumps(dict(protocol='knn', k=k, temperature=args.temperature, score=score, error=error,
                                       dataset=args.dataset or saved['dataset'], img_size=img_size, tokens=tokens,
                                       patch_size=patch_size, bank=bank, queries=queries)) + '\n')



if __name__ == '__main__':
    try:
        main()
    except (ValueError, OSError) as error:
        sys.exit(f'eval.py: error: {error}')
