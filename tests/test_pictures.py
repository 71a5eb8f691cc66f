"""Each picture as its command draws it, the claims that it makes, and colours that stay apart."""
import itertools
import json
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT
from PIL import Image

import pictures
from compress import Compression, pi_resize
from pictures import SIDE, looks, main, moco_cost, seen, square_image, stages_of
from vit import ViT
from weights import save


def line(progress, query):
    """A training line of log.jsonl, with what the picture reads of it."""
    tokens = dict(p4=64, p8=16)[query]
    return dict(progress=progress, loss=2 - progress, lr=1e-3, query=query, tokens=tokens)


def write_lines(path, lines):
    path.write_text(''.join(json.dumps(line) + '\n' for line in lines))


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / 'moco-0'
    folder.mkdir()
    scores = [dict(progress=p, knn=30 + 40 * p, nn=30.0) for p in (0.0, 0.5, 1.0)]
    steps = [line(0.2, 'p8'), line(0.5, 'p8'), line(0.7, 'p4'), line(1.0, 'p4')]
    write_lines(folder / 'log.jsonl', [*scores, *steps])
    return folder


@pytest.fixture
def table(tmp_path):
    """gradstats.jsonl in two metrics. In the second the gradient of progress 0 is lost in noise.

    One bias is negative: an estimate of no bias.
    """
    path = tmp_path / 'gradstats.jsonl'
    rows = []
    for metric, progress in itertools.product(('euclidean', 'adam'), (0.0, 0.5, 1.0)):
        norm2 = 0.01 if (metric, progress) == ('adam', 0.0) else 4.0
        for strategy, cost, bias2 in (('p4', 1, 0.0), ('p8', 0.3, 2.0), ('p16', 0.2, -0.1)):
            rows.append(dict(progress=progress, strategy=strategy, cost=cost, metric=metric,
                             bias2=bias2, bias2_sem=0.05, variance=8.0, variance_sem=0.1,
                             norm2=norm2, norm2_sem=0.1, slope=1.0))
    write_lines(path, rows)
    return path


def size_of(path):
    """Width and height in pixels of a whole PNG on which something is drawn."""
    image = Image.open(path, formats=['PNG'])
    low, high = image.convert('L').getextrema()
    assert low < 100 and high > 200
    return image.size


# ---- the commands

def test_every_command_writes_a_png_of_readme_width(run, table, tiny_fashion, tmp_path):
    """800 pixels on a page, at 1.5 dots each to be sharp on most screens."""
    photo = tmp_path / 'photo.jpg'
    Image.radial_gradient('L').resize((300, 200)).save(photo)
    backbone = tmp_path / 'backbone.pt'
    encoder = ViT(img_size=16, patch_size=4, in_chans=1, embed_dim=16, depth=1, num_heads=2)
    save(dict(model=encoder.state_dict(), config=encoder.config, mean=(0.3,), std=(0.3,),
              dataset='fashion_mnist'), backbone)
    output = tmp_path / 'picture.png'
    for command in (['compression', '--image', photo],
                    ['views'],
                    ['curves', run, run],
                    ['neighbours', '--weights', backbone, '--data-root', tiny_fashion],
                    ['cost'],
                    ['gradstats', table]):
        main([str(word) for word in [*command, '-o', output]])
        width, height = size_of(output)
        assert width == 1200 and 450 < height < 1300, command
        output.unlink()


def test_neighbours_are_the_nearest_and_other_classes_are_framed():
    """Queries along two axes of the plane; near the first, one image is of another class."""
    angles = torch.tensor([0.0, 0.1, 0.2, 0.3, 1.3, 1.4, 1.5, 1.62])
    features = torch.stack([angles.cos(), angles.sin()], dim=1)
    labels = torch.tensor([0, 0, 7, 0, 1, 1, 1, 1])
    images = torch.arange(8).byte().view(8, 1, 1, 1)
    queries = (torch.eye(2), images[:2], torch.tensor([0, 1]))
    axes = pictures.new_figure(2).subplots(2, 3)
    pictures.draw_neighbours(axes, queries, (features, images, labels), 'network')

    drawn = [axis.images[0].get_array()[0, 0, 0] for axis in axes.flat]
    framed = [axis.spines['left'].get_visible() for axis in axes.flat]
    assert drawn == [0, 1, 2, 7, 6, 5]
    assert framed == [False, False, True, False, False, False]
    assert axes[0, 1].get_title() == 'network: 5 of 6 of the same class'


def test_images_without_labels_are_asked_about_each_other():
    class Unlabelled(list):
        def labelled_ids(self, split, limit=None):
            return torch.tensor([], dtype=torch.long)

    (split, asked), (other, among) = pictures.queries_and_bank(Unlabelled([0] * 100))
    assert split == other == 'train' and len(asked) == 8
    assert sorted(torch.cat([asked, among]).tolist()) == list(range(100))


def test_a_broken_last_line_is_still_being_written(tmp_path):
    log = tmp_path / 'log.jsonl'
    for end in ('', '\n', '\n{"st'):
        log.write_text('{"step": 1}\n{"step": 2}' + end)
        assert pictures.read_lines(log) == [dict(step=1), dict(step=2)]
    log.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(ValueError, match='is not a file of JSON lines'):
        pictures.read_lines(log)


@pytest.mark.parametrize('words, message', [
    ('curves NOWHERE', 'no log at'),
    ('curves EMPTY', 'not a file of JSON lines'),
    ('gradstats NOWHERE', 'no table at'),
    ('compression --image NOWHERE', 'No such file'),
    ('neighbours --weights NOWHERE', 'there is no file'),
])
def test_bad_paths_are_named(words, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'EMPTY').mkdir()
    (tmp_path / 'EMPTY' / 'log.jsonl').write_text('step 1')
    with pytest.raises((OSError, ValueError), match=message):
        main(words.split())
    assert not list(tmp_path.glob('*.png*')), 'a partial file is left behind'


# ---- what the network sees

def test_seen_pixels_give_the_tokens_of_the_large_patches():
    """A kernel of 16 x 16 on the drawn pixels equals the resized kernel on the photo."""
    photo = torch.rand(1, 3, 240, 240) * 0.2 + 0.4           # smooth enough to stay in [0, 1]
    photo = F.avg_pool2d(photo, 5, stride=1, padding=2, count_include_pad=False)
    kernel = torch.randn(4, 3, 16, 16)
    drawn = seen(photo, Compression(48))
    assert drawn.shape == (3, 80, 80)                        # 5 x 5 patches of 16 pixels
    tokens = F.conv2d(drawn[None], kernel, stride=16)
    expected = F.conv2d(photo, pi_resize(kernel, 48), stride=48)
    torch.testing.assert_close(tokens, expected, rtol=1e-4, atol=1e-3)


def test_seen_uncompressed_is_the_image_and_dropout_leaves_a_share_of_it():
    photo = square_image(side=SIDE) * 0.9                    # no pixel is white
    torch.testing.assert_close(seen(photo, Compression(16)), photo[0], rtol=0, atol=1e-5)
    drawn = seen(photo, Compression(16, 0.75))
    assert (drawn < 1).all(dim=0).float().mean() == 49 / 196


def test_costs_are_the_papers_units():
    """Query forward and backward are 3 units, key forward is 1: all that is left at the end."""
    assert moco_cost(Compression(16)) == pytest.approx(4, abs=0.02)
    assert 1 < moco_cost(Compression(48, 0.9), 'query') < 1.1
    assert moco_cost(Compression(48, 0.9), 'both') < 0.2


# ---- curves

def test_stages_follow_the_training_lines():
    steps = [line(0.1, 'p8'), line(0.4, 'p8'), line(0.6, 'p4'), line(1.0, 'p8')]
    assert stages_of(steps) == [('p8', 0.0, 0.4), ('p4', 0.4, 0.6), ('p8', 0.6, 1.0)]


def test_curves_show_the_log(run):
    figure = pictures.curves([run])
    strategy, loss, accuracy, rate = figure.axes
    assert strategy.get_title() == 'moco-0'
    assert accuracy.get_title() == 'last: 70.0 %'
    assert loss.lines[0].get_xydata().tolist() == [[0.2, 1.8], [0.5, 1.5], [0.7, 1.3], [1.0, 1.0]]
    assert accuracy.lines[0].get_ydata().tolist() == [30, 50, 70]
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ['p4', 'p8'], 'the strategy with most tokens comes first'


@pytest.mark.parametrize('lines', [
    [dict(progress=0.0, knn=30.0)],                          # the first score, before any step
    [line(1.0, 'p4')],                                       # images without labels: no score
    [],
])
def test_curves_of_an_unfinished_or_unscored_run(lines, run):
    write_lines(run / 'log.jsonl', lines)
    pictures.curves_of_run(run)
    assert size_of(run / 'curves.png') == (1200, 900)


def test_a_full_disk_does_not_end_the_training(run, monkeypatch, capsys):
    def full(path):
        raise OSError(f'{path.name} cannot be written')

    monkeypatch.setattr(pictures, 'replacing', full)
    pictures.curves_of_run(run)
    assert capsys.readouterr().out == 'warning: curves.png cannot be written\n'


def test_without_matplotlib_training_goes_on_and_says_so_once(run):
    code = ("import sys; sys.modules['matplotlib'] = None; import pictures; "
            "pictures.curves_of_run(sys.argv[1]); pictures.curves_of_run(sys.argv[1])")
    result = subprocess.run([sys.executable, '-c', code, run], cwd=ROOT, text=True,
                            capture_output=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout == 'no curves.png: matplotlib is missing; pip install matplotlib\n'


def test_gradstats_shows_fractions_of_the_squared_norm_where_noise_leaves_one(table):
    """p8, norm2 = 4: bias^2 2 / 4 = 0.5, cost x variance 0.3 * 8 / 4 = 0.6, CA-MSE their sum."""
    figure = pictures.gradstats(table)
    assert figure.get_suptitle() == 'adam: the gradient is lost in noise at progress 0'
    points = [[0, 0.5, 1]] * 3 + [[0.5, 1]] * 3              # of three panels for each metric
    for axis, progress, value in zip(figure.axes, points, [0.5, 0.6, 1.1] * 2):
        p4, p8, p16 = [container.lines[0] for container in axis.containers]
        assert p8.get_ydata() == pytest.approx(value)
        assert p8.get_xdata().tolist() == progress


# ---- colours

# Linear RGB as it is seen without one kind of cone, Machado et al. 2009, severity 1.
VISION = dict(
    normal=[[1, 0, 0], [0, 1, 0], [0, 0, 1]],
    protanopia=[[0.152286, 1.052583, -0.204868],
                [0.114503, 0.786281, 0.099216],
                [-0.003882, -0.048116, 1.051998]],
    deuteranopia=[[0.367322, 0.860646, -0.227968],
                  [0.280085, 0.672501, 0.047413],
                  [-0.011820, 0.042940, 0.968881]],
    tritanopia=[[1.255528, -0.076749, -0.178779],
                [-0.078411, 0.930809, 0.147602],
                [0.004733, 0.691367, 0.303900]],
)


def lab(color, vision='normal'):
    """CIE L*a*b* of '#RRGGBB' under a kind of vision, by the standard formulas for sRGB and D65."""
    srgb = torch.tensor([int(color[i:i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = torch.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)
    linear = (torch.tensor(VISION[vision]).float() @ linear).clamp(0, 1)
    to_xyz = torch.tensor([[0.4124, 0.3576, 0.1805],
                           [0.2126, 0.7152, 0.0722],
                           [0.0193, 0.1192, 0.9505]])
    x, y, z = (to_xyz @ linear) / torch.tensor([0.9505, 1.0, 1.0890])
    f = [t ** (1 / 3) if t > 0.008856 else 7.787 * t + 16 / 116 for t in (x, y, z)]
    return torch.tensor([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize('vision, distance', [
    ('normal', 26), ('protanopia', 20), ('deuteranopia', 17), ('tritanopia', 16),
])
def test_colours_stay_apart(vision, distance):
    """Delta E (CIE 1976) of the closest pair, on white too; 2 can just be told apart."""
    assert lab('#FF0000').tolist() == pytest.approx([53.2, 80.1, 67.2], abs=0.2)
    colors = [lab(color, vision) for color in (*pictures.PALETTE, '#FFFFFF')]
    closest = min((a - b).norm() for a, b in itertools.combinations(colors, 2))
    assert closest > distance


def test_many_strategies_keep_looks_of_their_own():
    pairs = {(style['color'], style['marker']) for style in looks(range(56)).values()}
    assert len(pairs) == 56
