import json

import pytest
import torch
from lightly.utils.benchmarking.knn import knn_predict as lightly_knn

import data
import eval as evaluation
from eval import extract_features, knn_predict, load_backbone
from vit import ViT


def clusters(n, seed, d=32, classes=10, noise=2.5):
    g = torch.Generator().manual_seed(seed)
    centers = torch.randn(classes, d, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(n) % classes
    return centers[labels] + noise * torch.randn(n, d, generator=g), labels


@pytest.mark.parametrize('k', (1, 10, 20, 200))
def test_knn_predictions_equal_lightlys(k):
    (bank, labels), (queries, truth) = clusters(2000, 0), clusters(500, 1)
    ours = knn_predict(queries, bank, labels, 10, k, 0.07)
    normal = torch.nn.functional.normalize
    theirs = lightly_knn(normal(queries, dim=1), normal(bank, dim=1).T, labels, 10, k, 0.07)[:, 0]
    assert torch.equal(ours, theirs)
    assert 0.3 < (ours == truth).float().mean() < 0.99


@pytest.mark.parametrize('chunk', (1, 7, 99, 10_000))
def test_knn_does_not_depend_on_the_chunk(chunk):
    (bank, labels), (queries, _) = clusters(300, 0), clusters(99, 1)
    assert torch.equal(knn_predict(queries, bank, labels, 10, chunk=chunk), knn_predict(queries, bank, labels, 10))


def test_nearest_copy_is_always_right_and_shuffled_labels_are_chance():
    bank, labels = clusters(5000, 0)
    assert torch.equal(knn_predict(bank, bank, labels, 10, k=1), labels)
    shuffled = labels[torch.randperm(5000, generator=torch.Generator().manual_seed(0))]
    queries, truth = clusters(2000, 1)
    accuracy = (knn_predict(queries, bank, shuffled, 10) == truth).float().mean()
    assert abs(accuracy - 0.1) < 4 * (0.09 / 2000) ** 0.5


def test_vote_weights_by_hand():
    bank = torch.nn.functional.normalize(torch.tensor([[1.0, 0], [0.9, 0.435889894], [0.9, -0.435889894]]), dim=1)
    # one copy votes exp(1/T), two neighbours at cosine 0.9 vote 2 exp(.9/T): the copy wins below T = .1/ln 2
    labels = torch.tensor([0, 1, 1])
    query = torch.tensor([[1.0, 0]])
    assert knn_predict(query, bank, labels, 2, 3, temperature=0.07).item() == 0
    assert knn_predict(query, bank, labels, 2, 3, temperature=0.2).item() == 1


def test_features_are_of_all_tokens_and_leave_the_mode():
    encoder = ViT(img_size=16, patch_size=4, embed_dim=32, depth=1, num_heads=2)
    images = torch.rand(5, 3, 16, 16)
    features, labels = extract_features(encoder, [(images, torch.arange(5))], (0.5,) * 3, (0.2,) * 3, 'cpu')
    assert encoder.training and torch.equal(labels, torch.arange(5))
    assert (features - encoder((images - 0.5) / 0.2)).abs().max() < 1e-6


@pytest.fixture
def backbone(tmp_path):
    torch.manual_seed(0)
    encoder = ViT(img_size=28, patch_size=4, in_chans=1, embed_dim=32, depth=1, num_heads=2)
    path = tmp_path / 'backbone.pt'
    torch.save(dict(model=encoder.state_dict(), sizes=encoder.sizes, mean=(0.3,), std=(0.3,), dataset='fashion_mnist'), path)
    return path


def run(monkeypatch, *flags):
    monkeypatch.setattr('sys.argv', ['eval.py', *map(str, flags)])
    evaluation.main()


def test_command_line(backbone, tiny_fashion, monkeypatch, capsys):
    run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--k', 10, 20)
    printed = capsys.readouterr().out
    assert all(word in printed for word in ('28 px', 'patch size 4', '49 tokens', 'bank 320', '60 test images', 'T 0.07', '20-NN'))
    lines = [json.loads(line) for line in backbone.with_name('eval.jsonl').read_text().splitlines()]
    assert [line['k'] for line in lines] == [1, 10, 20] and all(0 <= line['score'] <= 100 for line in lines)
    run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--patch-size', 7, '--protocol', 'nn')
    assert '16 tokens' in capsys.readouterr().out


def test_bad_input(backbone, tiny_fashion, monkeypatch):
    with pytest.raises(ValueError, match='patch size 5 does not divide'):
        run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--patch-size', 5)
    with pytest.raises(ValueError, match='k = 999 is more than the 320 images'):
        run(monkeypatch, '--weights', backbone, '--data-root', tiny_fashion, '--k', 999)
    with pytest.raises(ValueError, match='takes 1 channels, the images of shapes have 3'):
        run(monkeypatch, '--weights', backbone, '--dataset', 'shapes')
    with pytest.raises(FileNotFoundError, match='no weights at'):
        run(monkeypatch, '--weights', backbone.with_name('none.pt'))
    backbone.write_bytes(backbone.read_bytes()[:1000])
    with pytest.raises(ValueError, match='truncated'):
        load_backbone(backbone)
