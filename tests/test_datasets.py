"""The datasets: sizes, splits that do not overlap, colors, degradation, and what is missing."""

import math
import random
import struct
import zlib
from collections import Counter
from functools import cache

import numpy as np
import pytest
import torch
import torchvision
from fake_clips import write_wav
from PIL import Image
from sklearn.datasets import load_digits as load_scikit_digits

from common.datasets import TensorSplit, av_digits, colored_digits, load_dataset
from common.datasets.files import read_image, read_wav
from common.errors import UserError

load = cache(load_dataset)  # for all tests here, which change nothing
FACTS = {  # sizes of train, val, val_iid and test; shapes
    "digits": ((1257, 180, 180, 360), {"gray": (1, 8, 8), "color": (3, 8, 8)}),
    "cg-mnist": ((50_000, *[10_000] * 3), {"gray": (1, 28, 28), "color": (3, 28, 28)}),
    "av-digits": ((2400, 300, 300, 300), {"audio": (1, 32, 32), "visual": (1, 28, 28)}),
    "synthetic": ((2000, 1000, 1000, 4000), {"first": (120,), "second": (120,)}),
    "mfeat": ((1200, 200, 200, 600), {"fou": (76,), "mor": (6,)}),
    "features": ((540, 60, 60, 120), {"left": (6,), "right": (9,)}),
}
BAD_VIEWS = ("", "fou", "fou,fou", "fou,hog", "fou, mor")
REAL = pytest.mark.slow  # data that are loaded in seconds
EACH = [pytest.param(n, marks=REAL if n in ("cg-mnist", "av-digits") else ()) for n in FACTS]


def first_batch(split, size=50):
    return next(iter(split.batches(size)))


# ---- What all datasets promise ----


@pytest.mark.parametrize("name", EACH)
def test_sizes_shapes_determinism_and_caps(name, require, root_of):
    require(name)
    (sizes, shapes), root = FACTS[name], root_of(name)
    splits = load(name, root)
    assert tuple(splits.sizes.values()) == sizes
    assert splits.shapes == shapes and splits.modalities == tuple(shapes)
    capped = load_dataset(name, root, train_samples=60)  # and determinism: it is loaded anew
    other = load_dataset(name, root, data_seed=1)
    for split, size in zip(("train", "val", "val_iid", "test"), sizes, strict=True):
        whole, part = getattr(splits, split), getattr(capped, split)
        assert len(part) == round(60 / sizes[0] * size)
        inputs, labels, index = first_batch(whole)
        assert index.tolist() == list(range(50)) and labels.dtype == torch.int64
        assert labels.unique().numel() > 5  # stored in random order
        fewer, *_ = first_batch(part)
        different, *_ = first_batch(getattr(other, split))
        for m in splits.modalities:
            assert inputs[m].dtype == torch.float32
            assert torch.equal(inputs[m][: len(part)], fewer[m])
        assert not all(torch.equal(inputs[m], different[m]) for m in inputs)


def test_each_view_has_its_numbers_in_the_order_of_the_others(mfeat_root):
    """The made files' first number is the row, the class is row // 200."""
    splits = load("mfeat", mfeat_root, views="zer,fou,mor")
    assert list(splits.shapes.items()) == [("zer", (47,)), ("fou", (76,)), ("mor", (6,))]
    numbers = {
        m: np.loadtxt(mfeat_root / f"mfeat/mfeat-{m}.csv", delimiter=",", skiprows=1)
        for m in splits.modalities
    }
    first = torch.cat(
        [getattr(splits, name).tensors["fou"][:, 0] for name in ("train", "val", "test")]
    )
    rows = first.argsort().argsort().split([1200, 200, 600])
    for name, chosen in zip(("train", "val", "test"), rows, strict=True):
        split = getattr(splits, name)
        assert torch.equal(split.labels, chosen // 200)
        assert split.labels.bincount().tolist() == [len(chosen) // 10] * 10
        for m, x in numbers.items():
            train, found = x[rows[0], :-1], x[chosen, :-1]
            expected = (found - train.mean(axis=0)) / train.std(axis=0)
            np.testing.assert_allclose(split.tensors[m], expected, atol=1e-4)


@pytest.mark.parametrize("content", ["", "0,1,0\n", "not,a,number\n" * 2, "0,0\n" + "1,0\n" * 2000])
def test_a_damaged_view_is_one_sentence(tmp_path, content):
    (tmp_path / "mfeat").mkdir()
    (tmp_path / "mfeat" / "mfeat-fou.csv").write_text(content)
    with pytest.raises(
        UserError, match=r"mfeat-fou\.csv is damaged \(.+\); delete .*prepare\.py mfeat"
    ) as info:
        load_dataset("mfeat", tmp_path)
    assert "\n" not in str(info.value)


def idx_file(*shape):
    """The bytes of an idx file of zeros, MNIST's format."""
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + bytes(math.prod(shape))


def test_errors_are_sentences(tmp_path, monkeypatch):
    def no_network(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    for name, dials, message in (
        ("cifar", {}, "no dataset 'cifar'; choose one of digits, cg-mnist"),
        ("digits", {"audio_snr": 3.0}, "digits has no dial --audio-snr"),
        ("av-digits", {}, r"lacks 3000 of the 3000 .*prepare.py fsdd --out \S+/fsdd"),
        ("cg-mnist", {}, r"train-images-idx3-ubyte .* not in \S+raw .*--data-root"),
        (
            "mfeat",
            {},
            r"no \S+mfeat-fou\.csv; run .*prepare\.py mfeat --out \S+/mfeat`, .*--data-root",
        ),
        *(
            ("mfeat", {"views": views}, f"two or more .* of fac, .* zer, not '{views}'")
            for views in BAD_VIEWS
        ),
        ("synthetic", {"configuration": "Z"}, r"No configuration 'Z'; choose from O, N, T, Q\."),
        ("synthetic", {"pair_type": "xor"}, r"No pair type 'xor'; choose from suppressor, sum-mod"),
    ):
        with pytest.raises(UserError, match=message):
            load_dataset(name, tmp_path, **dials)
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for kind in ("images-idx3", "labels-idx1"):  # torchvision reads nothing unless all are there
        (raw / f"t10k-{kind}-ubyte").touch()
    labels = idx_file(60_000)
    bad = (b"", b"<html>", b"\x00\x00\x08\x03 cut off", idx_file(60_000, 28, 28)[:-5])
    square, wide = idx_file(60_000, 28, 28), idx_file(60_000, 14, 56)
    cases = [(images, labels) for images in (*bad, idx_file(9, 28, 28), wide)]
    for images, digits in (*cases, (square, labels[:-1] + b"\x0a")):
        (raw / "train-labels-idx1-ubyte").write_bytes(digits)
        (raw / "train-images-idx3-ubyte").write_bytes(images)
        with pytest.raises(
            UserError, match=r"train-lab\S+ in \S+ is damaged \(.+\); delete both"
        ) as error_info:
            load_dataset("cg-mnist", tmp_path)
        assert not any(words in str(error_info.value) for words in ("\n", "not found"))


def test_batches_visit_everything_once_in_an_order_that_the_generator_decides():
    rows = torch.arange(10.0)
    split = TensorSplit({"x": rows}, torch.arange(10) % 3, lambda rows: {"m": rows["x"][:, None]})
    orders = []
    for seed in (0, 0, 1):
        batches = list(split.batches(4, torch.Generator().manual_seed(seed)))
        assert [len(labels) for _, labels, _ in batches] == [4, 4, 2]
        orders.append(torch.cat([index for *_, index in batches]).tolist())
        for inputs, labels, index in batches:
            assert inputs["m"].flatten().tolist() == index.tolist()
            assert labels.tolist() == (index % 3).tolist()
    assert orders[0] == orders[1] != orders[2] and sorted(orders[2]) == list(range(10))
    subset = split.subset([7, 2, 5])  # keeps the indices of its parent
    ((inputs, labels, index),) = subset.batches(8)
    assert index.tolist() == [7, 2, 5] == inputs["m"].flatten().tolist()
    assert labels.tolist() == subset.labels.tolist() == [1, 2, 2]
    assert subset.subset([2, 0]).index.tolist() == [5, 7] and len(subset) == 3
    assert len(load_dataset("digits", train_samples=10**9).train) == 1257


# ---- Colored digits ----


def test_the_pair_is_the_same_image_and_the_color_is_on_the_strokes():
    train = load("digits").train
    inputs, labels, _ = first_batch(train, 1257)
    gray, color = inputs["gray"], inputs["color"]
    assert gray.min() == 0 and gray.max() == 1 and color.max() <= 1
    torch.testing.assert_close(color, gray * train.tensors["color"][:, :, None, None])
    assert (color[(gray == 0).expand_as(color)] == 0).all()
    assert torch.equal(labels, train.labels)


def test_images_and_labels_are_scikit_learns_and_never_overlap():
    data, digits, seen = load_scikit_digits(), load("digits"), []
    known = dict(zip(map(tuple, data.data), data.target, strict=True))
    for split in (digits.train, digits.val, digits.test):
        images = (split.tensors["image"].double() * 16 / 255).round().flatten(1)
        keys = [tuple(image.tolist()) for image in images]
        assert [known[key] for key in keys] == split.labels.tolist()
        seen += keys
        assert torch.bincount(split.labels).min() >= 0.09 * len(split)  # stratified
    assert len(seen) == len(set(seen)) == len(known) == 1797
    assert torch.equal(digits.val.tensors["image"], digits.val_iid.tensors["image"])


def test_colors_tell_the_digit_in_training_and_nothing_in_the_test():
    means, digits = colored_digits.MEAN_COLORS, load("digits")
    assert (means[[0, 9]] * 255).tolist() == [[220, 20, 60], [128, 0, 0]]
    for name in ("train", "val_iid", "val", "test"):
        split = getattr(digits, name)
        distance = torch.cdist(split.tensors["color"], means).min(dim=1)
        share = (distance.indices == split.labels).double().mean()
        assert share > 0.5 if name in ("train", "val_iid") else share < 0.2
        assert 0.1 < distance.values.mean() < 0.25  # jitter: near a mean, not on it
    first = {tuple(s.tensors["color"][0].tolist()) for s in (digits.train, digits.val, digits.test)}
    assert len(first) == 3
    exact = load("digits", color_variance=0.0)
    assert torch.equal(exact.train.tensors["color"], means[exact.train.labels])
    drawn = torch.cdist(exact.test.tensors["color"], means).argmin(dim=1)
    counts = torch.bincount(drawn, minlength=10)  # uniform over the ten means, 36 expected of each
    assert counts.min() >= 15 and counts.max() <= 60

    digits = torch.full((20_000,), 1)  # (0, 128, 128): the middle of green and blue
    colors = colored_digits.draw_colors(digits, 0.02, torch.Generator().manual_seed(0))
    assert colors[:, 1].mean() == pytest.approx(128 / 255, abs=0.005)
    assert colors[:, 1].std() == pytest.approx(math.sqrt(0.02), abs=0.005)
    assert colors.min() >= 0 and colors.max() <= 1
    assert (colors[:, 0] == 0).double().mean() == pytest.approx(0.5, abs=0.02)  # cut at 0


def as_bytes(images):
    return [image.numpy().tobytes() for image in images]


@REAL
def test_cg_mnist_keeps_images_as_uint8_and_never_overlaps(require, data_root):
    require("cg-mnist")
    splits = load("cg-mnist", str(data_root))
    assert splits.train.tensors["image"].dtype == torch.uint8
    assert splits.train.tensors["color"].shape == (50_000, 3)
    keys = set(as_bytes(torchvision.datasets.MNIST(data_root, train=True).data))
    train, val = (set(as_bytes(s.tensors["image"])) for s in (splits.train, splits.val))
    assert train | val == keys and not train & val


# ---- Spoken and written digits ----


def test_noise_has_the_asked_ratio():
    waveform = torch.sin(torch.arange(4000) * 0.3)
    clean = av_digits.add_noise(waveform, math.inf, None)
    assert torch.equal(clean[:4000], waveform) and not clean[4000:].any() and len(clean) == 8000
    for snr in (-9.0, 10.0):
        noise = av_digits.add_noise(waveform, snr, torch.Generator().manual_seed(0)) - clean
        measured = 10 * torch.log10(waveform.square().mean() / noise.square().mean())
        assert measured.item() == pytest.approx(snr, abs=0.2)
    assert len(av_digits.add_noise(torch.ones(9000), math.inf, None)) == 8000


def test_log_mel_of_a_tone_is_largest_in_its_band():
    mel = av_digits.log_mel(torch.sin(2 * math.pi * 1000 * torch.arange(8000) / 8000)[None])
    assert mel.shape == (1, 32, 32)
    mels = [2595 * math.log10(1 + hz / 700) for hz in (1000, 4000)]
    center = mels[0] / mels[1] * 33 - 1  # 32 triangles between 0 and 4000 Hz
    assert abs(mel.mean(dim=2).argmax().item() - center) < 1


def test_pca_energy_against_numpy():
    images, held_out = (
        torch.rand(count, 28, 28, generator=torch.Generator().manual_seed(seed))
        for seed, count in enumerate((50, 5))
    )
    images *= torch.linspace(0, 1, 28)
    flat = images.flatten(1).double().numpy()
    mean = flat.mean(axis=0)
    _, singular, rows = np.linalg.svd(flat - mean)
    share = np.cumsum(singular**2) / np.sum(singular**2)
    basis = rows[: np.argmax(share >= 0.4) + 1]
    expected = (held_out.flatten(1).double().numpy() - mean) @ basis.T @ basis + mean
    found = av_digits.keep_energy(held_out, images, 0.4)
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-5)
    assert torch.equal(av_digits.keep_energy(held_out, images, 1.0), held_out)


@REAL
def test_degraded_digits(require, data_root, monkeypatch):
    """A quarter of MNIST's energy is four components, and these come from training images only."""
    require("av-digits")
    seen, original = [], av_digits.keep_energy

    def spy(images, train_images, energy):
        seen.append((len(images), train_images))
        return original(images, train_images, energy)

    monkeypatch.setattr(av_digits, "keep_energy", spy)
    visual = load_dataset("av-digits", data_root).train.tensors["visual"].flatten(1).double()
    assert torch.linalg.matrix_rank(visual - visual.mean(0), rtol=1e-5) == 4
    assert sorted(count for count, _ in seen) == [300, 300, 2400]
    assert all(len(train) == 2400 and torch.equal(train, seen[0][1]) for _, train in seen)


@REAL
def test_each_recording_has_an_image_of_its_own_and_both_are_of_its_digit(require, data_root):
    require("av-digits")
    clean = load_dataset("av-digits", data_root, visual_energy=1.0, audio_snr=math.inf)
    keys, used = {}, []
    for train in (True, False):
        mnist = torchvision.datasets.MNIST(data_root, train=train)
        keys[train] = dict(zip(as_bytes(mnist.data), mnist.targets.tolist(), strict=True))
    for name in ("train", "val", "test"):
        split = getattr(clean, name)
        found = as_bytes((split.tensors["visual"] * 255).round().byte())
        assert [keys[name != "test"][image] for image in found] == split.labels.tolist()
        used += found
    assert len(used) == len(set(used)) == 3000
    assert torch.equal(clean.val.labels, clean.val_iid.labels)
    # The nearest clean training sound knows the digit of most clean test sounds.
    train, test = (split.tensors["audio"].flatten(1) for split in (clean.train, clean.test))
    guess = clean.train.labels[torch.cdist(test, train).argmin(dim=1)]
    assert (guess == clean.test.labels).double().mean() > 0.7
    noisy = load("av-digits", str(data_root))
    assert not torch.equal(noisy.val.tensors["audio"], clean.val.tensors["audio"])


def test_bad_recordings_are_named(tmp_path):
    path, low = tmp_path / "3_a_7.wav", np.full(100, 1.1 / 32767)
    write_wav(path, low, 8000)
    assert read_wav(path, 8000)[0].item() == pytest.approx(1 / 32768)
    cut = path.read_bytes()[:-101]
    for arguments in ((low, 16000), (low, 8000, 2), (low[:0], 8000)):
        write_wav(path, *arguments)
        with pytest.raises(UserError, match=r"3_a_7.wav should be 16-bit mono at 8000 Hz"):
            read_wav(path, 8000)
    for content in (b"version https://git-lfs.github.com/spec/v1", cut):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"3_a_7.wav is no readable WAV"):
            read_wav(path, 8000)


def claim_size(path, width, height):
    """A PNG without pixels whose header says how many it has."""
    Image.new("L", (1, 1)).save(path)
    header = b"IHDR" + struct.pack(">II", width, height) + b"\x08\x00\x00\x00\x00"
    whole = path.read_bytes()
    path.write_bytes(whole[:12] + header + struct.pack(">I", zlib.crc32(header)) + whole[33:])


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_whatever_is_wrong_with_a_file_is_one_sentence_with_its_name(tmp_path):
    rng, image, refused = random.Random(0), Image.effect_noise((24, 24), 50), Counter()
    write_wav(tmp_path / "x.wav", np.random.default_rng(0).uniform(-1, 1, 200), 8000)
    image.save(tmp_path / "x.png"), image.save(tmp_path / "x.jpg")

    def look(path):
        try:
            read_wav(path, 8000) if path.suffix == ".wav" else read_image(path)
        except UserError as error:
            assert str(path) in str(error) and "\n" not in str(error)
            refused[path.suffix] += 1

    for path in [tmp_path / f"x.{kind}" for kind in ("wav", "png", "jpg")]:
        whole = path.read_bytes()
        look(path)
        assert refused[path.suffix] == 0
        for _ in range(200):
            damaged = bytearray(whole)
            for _ in range(rng.randint(1, 4)):
                damaged[rng.randrange(200 if path.suffix == ".jpg" else 60)] = rng.randrange(256)
            path.write_bytes(damaged[: rng.choice([len(whole), rng.randrange(len(whole))])])
            look(path)
        assert refused[path.suffix] > 80
    for side in (6_500, 30_000):
        claim_size(tmp_path / "large.png", side, side)
        with pytest.raises(
            UserError, match=r"large.png is no readable image \(DecompressionBombEr"
        ):
            read_image(tmp_path / "large.png")


def test_takes_decide_the_split_and_a_missing_recording_is_named(tmp_path):
    names = [av_digits.split_of_take(take) for take in range(50)]
    assert names == ["test"] * 5 + ["val"] * 5 + ["train"] * 40
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    for name in (f"{d}_{s}_{t}" for d in range(10) for s in av_digits.SPEAKERS for t in range(50)):
        (folder / f"{name}.wav").touch()
    found = {name: len(part) for name, part in av_digits.find_recordings(tmp_path).items()}
    assert found == {"train": 2400, "val": 300, "test": 300}
    (folder / "3_theo_7.wav").rename(folder / "3_theo_77.wav")
    with pytest.raises(UserError, match=r"lacks 1 of the 3000 recordings .*such as 3_theo_7.wav"):
        av_digits.find_recordings(tmp_path)
