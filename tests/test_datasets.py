"""The datasets: sizes, splits that do not overlap, colors, degradation, and what is missing."""

import math
import wave

import numpy as np
import pytest
import torch
import torchvision
from sklearn.datasets import load_digits as load_scikit_digits

from common.datasets import TensorSplit, av_digits, colored_digits, load_dataset
from common.datasets.files import read_wav
from common.errors import UserError

SIZES = {
    "digits": (1257, 180, 180, 360),
    "cg-mnist": (50_000, 10_000, 10_000, 10_000),
    "av-digits": (2400, 300, 300, 300),
    "synthetic": (2000, 1000, 1000, 4000),
    "features": (540, 60, 60, 120),
}
SHAPES = {
    "digits": {"gray": (1, 8, 8), "color": (3, 8, 8)},
    "cg-mnist": {"gray": (1, 28, 28), "color": (3, 28, 28)},
    "av-digits": {"audio": (1, 32, 32), "visual": (1, 28, 28)},
    "synthetic": {"first": (120,), "second": (120,)},
    "features": {"left": (6,), "right": (9,)},
}


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits")


# ---- What all datasets promise ----


@pytest.mark.parametrize("name", list(SIZES))
def test_sizes_shapes_and_determinism(name, require, root_of):
    require(name)
    splits = load_dataset(name, root_of(name))
    assert tuple(splits.sizes.values()) == SIZES[name]
    assert splits.shapes == SHAPES[name]
    assert splits.modalities == tuple(SHAPES[name])
    again, other = (load_dataset(name, root_of(name), data_seed=seed) for seed in (0, 1))
    for split in ("train", "val", "val_iid", "test"):
        batches = [next(iter(getattr(s, split).batches(50))) for s in (splits, again, other)]
        (first, labels, index), (second, *_), (third, *_) = batches
        assert index.tolist() == list(range(50))
        assert labels.dtype == torch.int64
        assert labels.unique().numel() > 5  # stored in random order
        for m in splits.modalities:
            assert first[m].dtype == torch.float32
            assert torch.equal(first[m], second[m])
        assert not all(torch.equal(first[m], third[m]) for m in splits.modalities)


@pytest.mark.parametrize("name", list(SIZES))
def test_train_samples_caps_every_split_in_proportion(name, require, root_of):
    require(name)
    whole = load_dataset(name, root_of(name))
    capped = load_dataset(name, root_of(name), train_samples=60)
    assert len(capped.train) == 60
    for split in ("val", "val_iid", "test"):
        size = SIZES[name][("train", "val", "val_iid", "test").index(split)]
        assert len(getattr(capped, split)) == round(60 / SIZES[name][0] * size)
    first, one = (next(iter(s.train.batches(60)))[0] for s in (whole, capped))
    assert all(torch.equal(first[m], one[m]) for m in whole.modalities)
    assert len(load_dataset("digits", train_samples=10**9).train) == 1257


def test_errors_are_sentences(tmp_path):
    with pytest.raises(UserError, match="no dataset 'cifar'; choose one of digits, cg-mnist"):
        load_dataset("cifar")
    with pytest.raises(UserError, match="digits has no dial --audio-snr"):
        load_dataset("digits", audio_snr=3.0)
    with pytest.raises(UserError, match=r"lacks 3000 of the 3000 .*prepare.py fsdd --out \S+/fsdd"):
        load_dataset("av-digits", tmp_path)


def test_missing_mnist_is_one_sentence(tmp_path, monkeypatch):
    def no_network(self):
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz")

    monkeypatch.setattr(torchvision.datasets.MNIST, "download", no_network)
    with pytest.raises(UserError, match=r"train-images-idx3-ubyte .* not in \S+raw .*--data-root"):
        load_dataset("cg-mnist", tmp_path)


def idx_file(*shape):
    """The bytes of an idx file of zeros, MNIST's format."""
    header = bytes([0, 0, 8, len(shape)]) + b"".join(n.to_bytes(4, "big") for n in shape)
    return header + bytes(math.prod(shape))


@pytest.mark.parametrize(
    "images",
    [
        b"",
        b"<html>",
        b"\x00\x00\x08\x03 cut off",
        idx_file(60_000, 28, 28)[:-5],
        idx_file(9, 28, 28),
    ],
    ids=["empty", "a web page", "a header", "cut off", "of another size"],
)
def test_damaged_mnist_is_one_sentence(tmp_path, images):
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(images)
    (raw / "train-labels-idx1-ubyte").write_bytes(idx_file(60_000))
    with pytest.raises(UserError, match=r"is damaged \(.+\); delete both files") as error_info:
        load_dataset("cg-mnist", tmp_path)
    assert "\n" not in str(error_info.value)


# ---- Splits and batches ----


def tiny_split(count=10):
    tensors = {"x": torch.arange(count, dtype=torch.float32)}
    return TensorSplit(tensors, torch.arange(count) % 3, lambda rows: {"m": rows["x"][:, None]})


def test_batches_visit_everything_once_in_an_order_that_the_generator_decides():
    split = tiny_split()
    orders = []
    for seed in (0, 0, 1):
        batches = list(split.batches(4, torch.Generator().manual_seed(seed)))
        assert [len(labels) for _, labels, _ in batches] == [4, 4, 2]
        orders.append(torch.cat([index for *_, index in batches]).tolist())
        for inputs, labels, index in batches:
            assert inputs["m"].flatten().tolist() == index.tolist()
            assert labels.tolist() == (index % 3).tolist()
    assert orders[0] == orders[1] != orders[2]
    assert sorted(orders[2]) == list(range(10))


def test_a_subset_keeps_the_indices_of_its_parent():
    subset = tiny_split().subset([7, 2, 5])
    (inputs, labels, index), *rest = subset.batches(8)
    assert index.tolist() == [7, 2, 5] and inputs["m"].flatten().tolist() == [7, 2, 5]
    assert labels.tolist() == subset.labels.tolist() == [1, 2, 2] and not rest
    assert subset.subset([2, 0]).index.tolist() == [5, 7] and len(subset) == 3


# ---- Colored digits ----


def test_the_pair_is_the_same_image_and_the_color_is_on_the_strokes(digits):
    inputs, labels, _ = next(iter(digits.train.batches(1257)))
    gray, color = inputs["gray"], inputs["color"]
    assert gray.min() == 0 and gray.max() == 1 and color.max() <= 1
    flat = digits.train.tensors["color"]
    torch.testing.assert_close(color, gray * flat[:, :, None, None])
    assert (color[(gray == 0).expand_as(color)] == 0).all()
    assert torch.equal(labels, digits.train.labels)


def test_images_and_labels_are_scikit_learns_and_never_overlap(digits):
    data = load_scikit_digits()
    known = {
        tuple(image.flatten()): label for image, label in zip(data.images, data.target, strict=True)
    }
    assert len(known) == 1797
    seen = []
    for split in (digits.train, digits.val, digits.test):
        images = (split.tensors["image"].double() * 16 / 255).round().flatten(1)
        keys = [tuple(image.tolist()) for image in images]
        assert [known[key] for key in keys] == split.labels.tolist()
        seen += keys
        assert torch.bincount(split.labels).min() >= 0.09 * len(split)  # stratified
    assert len(seen) == len(set(seen)) == 1797
    assert torch.equal(digits.val.tensors["image"], digits.val_iid.tensors["image"])


def nearest_mean(colors):
    return torch.cdist(colors, colored_digits.MEAN_COLORS).argmin(dim=1)


def test_colors_tell_the_digit_in_training_and_nothing_in_the_test(digits):
    share = {
        name: (nearest_mean(split.tensors["color"]) == split.labels).double().mean().item()
        for name, split in vars(digits).items()
        if isinstance(split, TensorSplit)
    }
    assert share["train"] > 0.5 and share["val_iid"] > 0.5
    assert share["val"] < 0.2 and share["test"] < 0.2


def test_color_variance_and_mean_colors():
    assert (colored_digits.MEAN_COLORS[9] * 255).tolist() == [128, 0, 0]
    digits = torch.full((20_000,), 1)  # (0, 128, 128): the middle of green and blue
    colors = colored_digits.draw_colors(digits, 0.02, torch.Generator().manual_seed(0))
    assert colors[:, 1].mean() == pytest.approx(128 / 255, abs=0.005)
    assert colors[:, 1].std() == pytest.approx(math.sqrt(0.02), abs=0.005)
    assert colors.min() >= 0 and colors.max() <= 1
    assert (colors[:, 0] == 0).double().mean() == pytest.approx(0.5, abs=0.02)  # cut at 0
    exact = load_dataset("digits", color_variance=0.0)
    means = colored_digits.MEAN_COLORS[exact.train.labels]
    assert torch.equal(exact.train.tensors["color"], means)


def test_held_out_colors_have_the_jitter_of_training(digits):
    distance = torch.cdist(digits.test.tensors["color"], colored_digits.MEAN_COLORS).min(dim=1)
    assert 0.1 < distance.values.mean() < 0.25  # near a mean, not on it
    first = {name: getattr(digits, name).tensors["color"][0] for name in ("train", "val", "test")}
    assert len({tuple(color.tolist()) for color in first.values()}) == 3


def test_random_colors_are_uniform_over_the_ten_means():
    exact = load_dataset("digits", color_variance=0.0)
    counts = torch.bincount(nearest_mean(exact.test.tensors["color"]), minlength=10)
    assert counts.min() >= 15 and counts.max() <= 60  # 36 expected of each


def test_cg_mnist_keeps_images_as_uint8_and_never_overlaps(require, data_root):
    require("cg-mnist")
    splits = load_dataset("cg-mnist", data_root)
    assert splits.train.tensors["image"].dtype == torch.uint8
    assert splits.train.tensors["color"].shape == (50_000, 3)
    mnist = torchvision.datasets.MNIST(data_root, train=True)
    keys = {image.numpy().tobytes() for image in mnist.data}
    train = {image.numpy().tobytes() for image in splits.train.tensors["image"]}
    val = {image.numpy().tobytes() for image in splits.val.tensors["image"]}
    assert train | val == keys and not train & val


# ---- Spoken and written digits ----


def test_take_split_of_the_spoken_digits():
    names = [av_digits.split_of_take(take) for take in range(50)]
    assert names == ["test"] * 5 + ["val"] * 5 + ["train"] * 40


def test_noise_has_the_asked_ratio():
    waveform = torch.sin(torch.arange(4000) * 0.3)
    clean = av_digits.add_noise(waveform, math.inf, None)
    assert torch.equal(clean[:4000], waveform) and not clean[4000:].any() and len(clean) == 8000
    for snr in (-9.0, 10.0):
        noise = av_digits.add_noise(waveform, snr, torch.Generator().manual_seed(0)) - clean
        measured = 10 * torch.log10(waveform.square().mean() / noise.square().mean())
        assert measured.item() == pytest.approx(snr, abs=0.2)
    long = torch.ones(9000)
    assert len(av_digits.add_noise(long, math.inf, None)) == 8000


def test_log_mel_of_a_tone_is_largest_in_its_band():
    time = torch.arange(8000) / 8000
    mel = av_digits.log_mel(torch.sin(2 * math.pi * 1000 * time)[None])
    assert mel.shape == (1, 32, 32)
    mels = [2595 * math.log10(1 + hz / 700) for hz in (1000, 4000)]
    center = mels[0] / mels[1] * 33 - 1  # 32 triangles between 0 and 4000 Hz
    assert abs(mel.mean(dim=2).argmax().item() - center) < 1


def test_pca_energy_against_numpy():
    images = torch.rand(50, 28, 28, generator=torch.Generator().manual_seed(0))
    images *= torch.linspace(0, 1, 28)
    held_out = torch.rand(5, 28, 28, generator=torch.Generator().manual_seed(1))
    flat = images.flatten(1).double().numpy()
    mean = flat.mean(axis=0)
    _, singular, rows = np.linalg.svd(flat - mean)
    share = np.cumsum(singular**2) / np.sum(singular**2)
    count = np.argmax(share >= 0.4) + 1
    basis = rows[:count]
    expected = (held_out.flatten(1).double().numpy() - mean) @ basis.T @ basis + mean
    found = av_digits.keep_energy(held_out, images, 0.4)
    np.testing.assert_allclose(found.flatten(1).numpy(), expected, atol=1e-5)
    assert torch.equal(av_digits.keep_energy(held_out, images, 1.0), held_out)


def test_a_quarter_of_mnists_energy_is_four_components(require, data_root):
    require("av-digits")
    visual = load_dataset("av-digits", data_root).train.tensors["visual"].flatten(1)
    assert torch.linalg.matrix_rank(visual.double() - visual.double().mean(0), rtol=1e-5) == 4


def test_components_come_from_training_images_only(require, data_root, monkeypatch):
    require("av-digits")
    seen = []
    original = av_digits.keep_energy

    def spy(images, train_images, energy):
        seen.append((len(images), train_images))
        return original(images, train_images, energy)

    monkeypatch.setattr(av_digits, "keep_energy", spy)
    load_dataset("av-digits", data_root)
    assert sorted(count for count, _ in seen) == [300, 300, 2400]
    assert all(len(train) == 2400 and torch.equal(train, seen[0][1]) for _, train in seen)


def test_the_sound_of_a_pair_is_that_of_its_label(require, data_root):
    """The nearest clean training sound knows the digit of most clean test sounds."""
    require("av-digits")
    clean = load_dataset("av-digits", data_root, audio_snr=math.inf)
    train, test = (split.tensors["audio"].flatten(1) for split in (clean.train, clean.test))
    guess = clean.train.labels[torch.cdist(test, train).argmin(dim=1)]
    assert (guess == clean.test.labels).double().mean() > 0.7
    noisy = load_dataset("av-digits", data_root)
    assert not torch.equal(noisy.val.tensors["audio"], clean.val.tensors["audio"])


def test_each_recording_has_an_image_of_its_own_and_of_its_digit(require, data_root):
    require("av-digits")
    clean = load_dataset("av-digits", data_root, visual_energy=1.0, audio_snr=math.inf)
    mnist = {train: torchvision.datasets.MNIST(data_root, train=train) for train in (True, False)}
    keys = {}
    for train, data in mnist.items():
        keys[train] = {}
        for image, label in zip(data.data, data.targets.tolist(), strict=True):
            keys[train][image.numpy().tobytes()] = label
    used = []
    for name in ("train", "val", "test"):
        split = getattr(clean, name)
        images = (split.tensors["visual"] * 255).round().byte()
        found = [image.numpy().tobytes() for image in images]
        labels = [keys[name != "test"][image] for image in found]
        assert labels == split.labels.tolist()
        used += found
    assert len(used) == len(set(used)) == 3000
    assert clean.val_iid is not None and torch.equal(clean.val.labels, clean.val_iid.labels)


def write_wav(path, rate=8000, channels=1, frames=b"\x01\x00" * 100):
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, rate, 0, "NONE", ""))
        file.writeframes(frames)


def test_bad_recordings_are_named(tmp_path):
    path = tmp_path / "3_a_7.wav"
    write_wav(path)
    assert read_wav(path, 8000)[0].item() == pytest.approx(1 / 32768)
    for arguments in ({"rate": 16000}, {"channels": 2}, {"frames": b""}):
        write_wav(path, **arguments)
        with pytest.raises(UserError, match=r"3_a_7.wav should be 16-bit mono at 8000 Hz"):
            read_wav(path, 8000)
    write_wav(path)
    for content in (b"version https://git-lfs.github.com/spec/v1", path.read_bytes()[:-101]):
        path.write_bytes(content)
        with pytest.raises(UserError, match=r"3_a_7.wav is no readable WAV"):
            read_wav(path, 8000)


def test_a_missing_recording_is_named(tmp_path):
    folder = tmp_path / "fsdd" / "recordings"
    folder.mkdir(parents=True)
    for digit in range(10):
        for speaker in av_digits.SPEAKERS:
            for take in range(50):
                (folder / f"{digit}_{speaker}_{take}.wav").touch()
    paths = av_digits.find_recordings(tmp_path)
    assert {name: len(part) for name, part in paths.items()} == {
        "train": 2400,
        "val": 300,
        "test": 300,
    }
    (folder / "3_theo_7.wav").rename(folder / "3_theo_77.wav")
    with pytest.raises(UserError, match=r"lacks 1 of the 3000 recordings .*such as 3_theo_7.wav"):
        av_digits.find_recordings(tmp_path)
