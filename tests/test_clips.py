"""Clips and views from files: what is drawn, what is kept, what is refused; and ResNet-18."""

import json
import random
import re
import shutil
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import scipy.signal
import torch
import torchaudio
import torchvision
from fake_clips import FROM_FILES, write_community, write_prepared, write_wav
from PIL import Image
from test_training import without_seconds
from torchvision.transforms import functional as TF

import greedy_balance
import mhm
import pmr
import umt_ume
from common.command_line import DIALS, run_command
from common.datasets import DATASETS, clips, load_dataset
from common.datasets.clips import SPECTROGRAMS
from common.datasets.files import MEAN, STD, DiskRows, center_box, crop_box, cut, read_image, resize
from common.encoders import ResNet18, build_encoder
from common.errors import UserError
from common.seeding import make_generator

SMALL = {"image_size": 32, "spectrogram": "ogm-ge"}


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder above a prepared crema-d and modelnet40; not to be changed."""
    root = tmp_path_factory.mktemp("prepared")
    write_prepared(root, "crema-d")
    write_prepared(root, "modelnet40", counts=(12,), shape=(32, 32))
    return root


@pytest.fixture
def copied(prepared, tmp_path):
    """A copy of it to damage, without what is kept on disk."""
    shutil.copytree(prepared, tmp_path / "data", ignore=shutil.ignore_patterns("cache"))
    return tmp_path / "data"


def inputs_of(split, *arguments, **options):
    """All batches of a pass."""
    return list(split.batches(*arguments, **options))


def equal(one, other):
    """Whether two passes gave the same batches, bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(i, k)
        and torch.equal(labels, other_labels)
        and all(torch.equal(x[m], y[m]) for m in x)
        for (x, labels, i), (y, other_labels, k) in zip(one, other, strict=True)
    )


def pixels(visual):
    """Normalised frames (B, 3, N, H, W) back to 0 to 255."""
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (MEAN, STD))
    return 255 * (visual * std + mean)


# ---- What all splits promise ----


@pytest.mark.parametrize(
    ("name", "dials", "shapes"),
    [
        ("crema-d", SMALL, {"audio": (1, 257, 188), "visual": (3, 3, 32, 32)}),
        ("crema-d", {**SMALL, "num_frames": 1}, {"audio": (1, 257, 188), "visual": (3, 1, 32, 32)}),
        ("modelnet40", {"image_size": 32}, {"front": (3, 32, 32), "rear": (3, 32, 32)}),
        (
            "modelnet40",
            {"image_size": 40, "views": "6,3,0"},
            {"rear": (3, 40, 40), "view-3": (3, 40, 40), "front": (3, 40, 40)},
        ),
    ],
)
def test_inputs_labels_and_index_as_from_memory(prepared, name, dials, shapes):
    splits = load_dataset(name, prepared, **dials)
    assert splits.sizes == {"train": 8, "val": 4, "val_iid": 4, "test": 4}
    assert splits.shapes == shapes and splits.modalities == tuple(shapes)
    assert splits.num_classes == (6 if name == "crema-d" else 2)

    inputs, labels, index = zip(*splits.train.batches(3), strict=True)
    assert [len(part) for part in labels] == [3, 3, 2]
    assert torch.cat(index).tolist() == list(range(8))
    assert torch.equal(torch.cat(labels), splits.train.labels)
    assert all(x.dtype == torch.float32 for batch in inputs for x in batch.values())
    whole = {m: torch.cat([batch[m] for batch in inputs]) for m in shapes}

    half = splits.train.subset([5, 2, 7])
    ((inputs, labels, index),) = half.subset([2, 0]).batches(10)
    assert index.tolist() == [7, 5] and torch.equal(labels, splits.train.labels[[7, 5]])
    assert all(torch.equal(inputs[m], whole[m][[7, 5]]) for m in shapes)
    ((inputs, _, index),) = splits.train.head(2).batches(10)
    assert index.tolist() == [0, 1]
    assert all(torch.equal(inputs[m], whole[m][:2]) for m in shapes)
    assert load_dataset(name, prepared, train_samples=4, **dials).sizes["test"] == 2

    shuffled = torch.cat([i for _, _, i in splits.train.batches(3, make_generator("order"))])
    assert shuffled.tolist() != list(range(8)) and sorted(shuffled.tolist()) == list(range(8))
    other = load_dataset(name, prepared, data_seed=1, **dials)
    assert not equal(inputs_of(other.train, 8), inputs_of(splits.train, 8))


def test_labels_belong_to_their_clips(prepared):
    """The classes alternate in clips.csv; so do the numbers in the names."""
    split = load_dataset("crema-d", prepared, **SMALL).train
    ids = split.loader.files.listing.ids[split.tensors["row"]]
    assert split.labels.tolist() == [int(name[-1]) % 2 for name in ids]


# ---- What is drawn ----


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    """Clips of 10, 2 and 1 frames; a frame is gray by its number, darker in its left half."""
    root = tmp_path_factory.mktemp("numbered")
    folder = write_prepared(root, "crema-d", sizes=(6, 3, 3), counts=(10, 2, 1))
    for path in folder.glob("frames/*/*.jpg"):
        image = np.full((48, 64, 3), 24 * int(path.stem), dtype=np.uint8)
        image[:, :32] -= 8
        Image.fromarray(image).save(path, quality=95)
    return root


def frame_numbers(split, *arguments, **options):
    """Position in the split -> numbers of its frames, from 1."""
    found = {}
    for inputs, _, index in split.batches(2, *arguments, **options):
        brightest = pixels(inputs["visual"]).amax(dim=(1, 3, 4))  # (B, N): of the right half
        for i, numbers in zip(index.tolist(), (brightest / 24).round().int().tolist(), strict=True):
            found[i] = numbers
    return found


def test_frames_are_drawn_at_random_in_training(numbered):
    split = load_dataset("crema-d", numbered, **SMALL).train
    counts = split.loader.files.listing.counts[split.tensors["row"]]
    epochs = [frame_numbers(split, make_generator(epoch), augment=True) for epoch in range(25)]
    assert epochs[0] == frame_numbers(split, make_generator(0), augment=True)
    long = [i for i, count in enumerate(counts) if count == 10]
    for numbers in epochs:
        assert all(frames == sorted(frames) for frames in numbers.values())  # in time
        assert all(len(set(numbers[i])) == 3 for i in long)
    for i, count in enumerate(counts):  # every frame has its turn, also with replacement
        assert {n for numbers in epochs for n in numbers[i]} == set(range(1, count + 1))


def test_frames_are_even_in_evaluation(numbered):
    for num_frames, expected in ((3, [2, 6, 9]), (1, [6]), (2, [3, 8])):
        dials = {**SMALL, "num_frames": num_frames}
        split = load_dataset("crema-d", numbered, **dials).test
        counts = split.loader.files.listing.counts[split.tensors["row"]]
        numbers = frame_numbers(split)
        assert numbers == frame_numbers(split, make_generator("order"))
        assert numbers[list(counts).index(10)] == expected
        assert numbers[list(counts).index(1)] == [1] * num_frames


def test_one_flip_for_all_frames_of_a_clip(numbered):
    split = load_dataset("crema-d", numbered, **SMALL).train
    brighter = []
    for epoch in range(12):
        for inputs, _, _ in split.batches(8, make_generator(epoch), augment=True):
            gray = pixels(inputs["visual"]).mean(dim=(1, 3))  # (B, N, W)
            brighter += (gray[..., -1] - gray[..., 0]).tolist()
    signs = [{int(np.sign(round(x / 6))) for x in clip} for clip in brighter]
    assert all(not {1, -1} <= clip for clip in signs)  # a crop may show one half only: 0
    right, left = (sum(sign in clip for clip in signs) for sign in (1, -1))
    assert min(right, left) > 10
    for inputs, _, _ in split.batches(8):
        gray = pixels(inputs["visual"]).mean(dim=(1, 3))
        assert (gray[..., -1] > gray[..., 0] + 4).all()


def test_workers_change_no_result(prepared):
    """Nor does a pass that is left early, or one inside another, or what else is drawn."""
    alone = load_dataset("crema-d", prepared, **SMALL)
    helped = load_dataset("crema-d", prepared, num_workers=2, **SMALL)
    expected = [inputs_of(alone.train, 3, make_generator(e), augment=True) for e in (0, 1)]
    assert not equal(*expected)
    for epoch in (0, 1):
        random.seed(epoch), torch.manual_seed(epoch), np.random.seed(epoch)
        assert equal(
            inputs_of(helped.train, 3, make_generator(epoch), augment=True), expected[epoch]
        )
    processes = helped.train.loader.shared._iterator._workers
    left = iter(helped.train.batches(1, make_generator(5), augment=True))
    next(left)
    inside = inputs_of(helped.train, 3, make_generator(0), augment=True)
    del left
    after = inputs_of(helped.train, 3, make_generator(1), augment=True)
    assert equal(inside, expected[0]) and equal(after, expected[1])
    assert equal(inputs_of(helped.test, 3), inputs_of(alone.test, 3))
    assert helped.train.loader.shared._iterator._workers is processes  # the same all along


@pytest.mark.parametrize("num_workers", [0, 2])
def test_nothing_is_drawn_between_batches(prepared, num_workers):
    """Whoever draws on the generator there gets the same with any number of workers."""
    split = load_dataset("crema-d", prepared, num_workers=num_workers, **SMALL).train
    generator, before = make_generator(0), torch.get_rng_state()
    passing = split.batches(2, generator, augment=True)
    next(passing)
    state = generator.get_state()
    list(passing)
    assert torch.equal(generator.get_state(), state)
    assert torch.equal(torch.get_rng_state(), before)  # initialisation and dropout draw there


# ---- Crops ----


def test_training_crops_are_those_of_torchvision():
    rng = random.Random(0)
    torch.manual_seed(0)
    for height, width in ((360, 480), (100, 400), (400, 100)):
        boxes = np.array([crop_box(width / height, rng) for _ in range(3000)])
        assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-9).all()
        tall, wide = boxes[:, 2] * height, boxes[:, 3] * width
        assert (tall * wide / height / width).min() > 0.08 - 1e-9
        assert (wide / tall).min() > 3 / 4 - 1e-9 and (wide / tall).max() < 4 / 3 + 1e-9
        crop = torchvision.transforms.RandomResizedCrop.get_params
        image = torch.empty(3, height, width)
        theirs = np.array([crop(image, (0.08, 1), (3 / 4, 4 / 3)) for _ in range(3000)])
        theirs = theirs / [height, width, height, width]
        np.testing.assert_allclose(boxes.mean(axis=0), theirs.mean(axis=0), atol=0.015)
        np.testing.assert_allclose(boxes.std(axis=0), theirs.std(axis=0), atol=0.015)
    assert center_box(4, ratio=4 / 3) == pytest.approx((0, 1 / 3, 1, 1 / 3))


def test_pixels_are_those_of_torchvision(prepared):
    path = next(prepared.glob("crema-d/frames/*/0001.jpg"))
    image = read_image(path)
    assert torch.equal(image, torch.from_numpy(np.array(Image.open(path))))
    chw = image.permute(2, 0, 1)
    part = resize(cut(image, (0.25, 0.5, 0.5, 0.25)), 32, 32).permute(2, 0, 1)
    theirs = TF.resized_crop(chw, 12, 32, 24, 16, [32, 32], antialias=True)
    assert (part.int() - theirs.int()).abs().max() <= 1
    big = torch.randint(0, 256, (256, 342, 3), dtype=torch.uint8)
    center = cut(big, crop_box(342 / 256, None)).permute(2, 0, 1)
    assert torch.equal(center, TF.center_crop(big.permute(2, 0, 1), [224, 224]))


def test_the_loader_gives_uint8_and_the_split_imagenet_statistics(prepared):
    splits = load_dataset("crema-d", prepared, **SMALL)
    batch = splits.test.loader.files[splits.test.tensors["row"].tolist(), None]
    assert batch["frames"].dtype == torch.uint8 and batch["frames"].shape == (4, 3, 32, 32, 3)
    ((inputs, _, _),) = splits.test.batches(4)
    normalize = torchvision.transforms.Normalize(MEAN, STD)
    expected = normalize(batch["frames"].permute(0, 1, 4, 2, 3) / 255).transpose(1, 2)
    torch.testing.assert_close(inputs["visual"], expected)


# ---- Spectrograms ----


@pytest.mark.parametrize("length", [8000, 40_000, 200_000])
@pytest.mark.parametrize(("recipe", "seconds"), [("pmr-3s", 3), ("pmr-10s", 10)])
def test_pmr_spectrograms_are_scipys(recipe, seconds, length):
    waveform = torch.from_numpy(np.random.default_rng(0).normal(0.1, 0.5, length)).float()
    found = SPECTROGRAMS[recipe][0](waveform)
    samples = np.clip(np.tile(waveform.numpy().astype(float), 40)[: seconds * 16_000], -1, 1)
    _, _, power = scipy.signal.spectrogram(samples, 16_000, nperseg=512, noverlap=353)
    expected = np.log(power + 1e-7)
    expected = (expected - expected.mean()) / (expected.std() + 1e-9)
    assert found.shape == SPECTROGRAMS[recipe][1] == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-4)


@pytest.mark.parametrize("length", [8000, 40_000, 200_000])
def test_ogm_ge_spectrogram_is_scipys(length):
    waveform = torch.from_numpy(np.random.default_rng(0).normal(0, 0.5, length)).float()
    found = SPECTROGRAMS["ogm-ge"][0](waveform)
    samples = torchaudio.functional.resample(waveform, 16_000, 22_050).numpy().astype(float)
    samples = np.pad(np.clip(np.tile(samples, 7)[: 3 * 22_050], -1, 1), 256, mode="reflect")
    window = scipy.signal.get_window("hann", 512)
    frames = [window * samples[i : i + 512] for i in range(0, 3 * 22_050 + 1, 353)]
    expected = np.log(np.abs(scipy.fft.rfft(np.array(frames), axis=1)).T + 1e-7)
    assert found.shape == SPECTROGRAMS["ogm-ge"][1] == expected.shape
    np.testing.assert_allclose(found.numpy(), expected, atol=2e-2)
    np.testing.assert_allclose(found.numpy()[expected > -3], expected[expected > -3], atol=5e-3)


def test_resampling_keeps_the_pitch():
    tone = torch.sin(2 * torch.pi * 3000 * torch.arange(48_000) / 16_000)
    spectrum = SPECTROGRAMS["ogm-ge"][0](tone).mean(dim=1)
    assert spectrum.argmax().item() == round(3000 / 22_050 * 512)


# ---- What is kept on disk ----


def test_spectrograms_and_frames_are_computed_once(copied):
    folder, dials = copied / "crema-d", {**SMALL, "image_size": 224, "frame_cache": 1}
    direct = load_dataset("crema-d", copied, **{**dials, "frame_cache": 0})
    expected = inputs_of(direct.train, 8, make_generator(0), augment=True)
    first = load_dataset("crema-d", copied, **dials)
    found = inputs_of(first.train, 8, make_generator(0), augment=True)
    assert equal(found, expected)  # frames of 48 x 64 stay as they are
    keep = folder / "frames" / "train_00000" / "0001.jpg"  # the first one tells the size
    for path in (*folder.glob("audio/*.wav"), *folder.glob("frames/*/*.jpg")):
        if path.parent != keep.parent:
            path.unlink()
    again = load_dataset("crema-d", copied, **dials)
    found = inputs_of(again.train, 8, make_generator(0), augment=True)
    assert equal(found, expected)
    kept = again.train.loader.files
    assert isinstance(kept.cache.rows, np.memmap)
    assert isinstance(kept.spectrograms.kept.rows, np.memmap)


def test_a_row_counts_when_it_is_whole(tmp_path):
    """A kill between the values and their tag leaves a row that is computed anew."""
    rows = DiskRows(tmp_path / "cache" / "x.rows", 3, (2,), np.float32)
    rows.rows["values"][1] = 7
    assert rows.get(1, lambda: (2.5, torch.tensor([3.0, 4.0])))[1].tolist() == [3, 4]
    again = DiskRows(tmp_path / "cache" / "x.rows", 3, (2,), np.float32)
    tag, values = again.get(1, lambda: pytest.fail("it is there"))
    assert (tag, values.tolist()) == (2.5, [3, 4])
    assert again.get(0, lambda: (1, np.zeros(2)))[0] == 1


def test_a_clip_of_another_shape_is_cached_in_its_own_proportions(tmp_path):
    folder = write_prepared(tmp_path, "crema-d", counts=(1,), shape=(60, 80))
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    for path in folder.glob("frames/test*/*.jpg"):
        smooth.resize((120, 60), Image.Resampling.BICUBIC).save(path, quality=95)
    dials = {**SMALL, "num_frames": 1}
    direct, cached = (
        load_dataset("crema-d", tmp_path, frame_cache=cache, **dials) for cache in (0, 1)
    )
    for options in ({}, {"augment": True}):
        one, other = (
            pixels(inputs_of(s.test, 4, make_generator(0), **options)[0][0]["visual"])
            for s in (direct, cached)
        )
        assert (one - other).abs().mean() < 4 < one.std()


def test_new_samples_make_a_new_cache(copied):
    load_dataset("crema-d", copied, **SMALL)
    path = copied / "crema-d" / "clips.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    load_dataset("crema-d", copied, **SMALL)
    assert len(list((copied / "crema-d" / "cache").iterdir())) == 2


# ---- The community's tree, and real views ----


def test_the_tree_of_ogm_ge_and_pmr(tmp_path):
    write_community(tmp_path)
    splits = load_dataset("crema-d", tmp_path, **SMALL)
    assert splits.sizes == {"train": 18, "val": 2, "val_iid": 2, "test": 4}
    assert splits.num_classes == 6 and splits.modalities == ("audio", "visual")
    listing = splits.train.loader.files.listing
    rows = torch.cat([split.tensors["row"] for split in (splits.train, splits.val, splits.test)])
    assert rows.unique().tolist() == list(range(24))
    names = listing.ids[splits.train.tensors["row"]]
    assert [clips.EMOTIONS[label] for label in splits.train.labels] == [n[-6:-3] for n in names]
    (_, labels, _), *_ = splits.train.batches(8, make_generator(0), augment=True)
    assert labels.shape == (8,)
    assert sorted(splits.val.labels.tolist()) == [0, 1]  # a tenth of every class
    other = load_dataset("crema-d", tmp_path, data_seed=1, **SMALL)
    assert set(other.val.tensors["row"].tolist()) != set(splits.val.tensors["row"].tolist())


def test_changed_recordings_of_the_community_are_read_anew(tmp_path):
    folder = write_community(tmp_path)
    (before, *_), *_ = load_dataset("crema-d", tmp_path, **SMALL).test.batches(4)
    for path in folder.glob("AudioWAV/test*.wav"):
        write_wav(path, 0.1 * np.ones(8000))
    (after, *_), *_ = load_dataset("crema-d", tmp_path, **SMALL).test.batches(4)
    assert torch.equal(before["visual"], after["visual"])
    assert not torch.isclose(before["audio"], after["audio"]).all(dim=(1, 2, 3)).any()


def test_the_real_lists_of_crema_d(tmp_path, data_root):
    lists = data_root / "formats" / "crema-d"
    if not (lists / "train.csv").exists():
        pytest.skip(f"needs {lists}; set DATA_ROOT")
    (tmp_path / "crema-d" / "Image-01-FPS").mkdir(parents=True)
    for name in ("train.csv", "test.csv"):
        shutil.copy(lists / name, tmp_path / "crema-d")
    with pytest.raises(UserError, match="no frames of 7442 of 7442 samples, such as 1088_IOM"):
        load_dataset("crema-d", tmp_path)


def test_real_views(tmp_path, data_root):
    source = data_root / "formats" / "modelnet40-views"
    if not source.exists():
        pytest.skip(f"needs {source}; set DATA_ROOT")
    folder = write_prepared(tmp_path, "modelnet40", sizes=(2, 2, 2), counts=(12,), shape=(32, 32))
    for clip in folder.glob("frames/*"):
        split, number = clip.name.split("_")
        kind, part = ("airplane", "bed")[int(number)], "train" if split == "train" else "test"
        shutil.rmtree(clip)
        clip.mkdir()
        for i, path in enumerate(sorted((source / kind / part).glob("*.png"))):
            shutil.copy(path, clip / f"{i + 1:04}.png")
    splits = load_dataset("modelnet40", tmp_path)
    assert splits.shapes == {"front": (3, 224, 224), "rear": (3, 224, 224)}
    ((inputs, labels, _),) = splits.test.batches(2)
    for view, name in ((0, "front"), (6, "rear")):
        for image, label in zip(inputs[name], labels, strict=True):
            kind = ("airplane", "bed")[label]
            path = sorted((source / kind / "test").glob("*.png"))[view]
            theirs = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).float()
            assert theirs.shape == (224, 224, 3) and theirs.std() > 10
            torch.testing.assert_close(
                pixels(image[None, :, None])[0, :, 0].permute(1, 2, 0), theirs, atol=0.01, rtol=0
            )
    assert not torch.equal(inputs["front"], inputs["rear"])


# ---- What is refused ----


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        (
            "frames/train_00000/0002.jpg",
            lambda path: path.write_bytes(path.read_bytes()[:-400]),
            r"train_00000/0002.jpg is no readable image; fetch or prepare it anew",
        ),
        (
            "frames/train_00003/0001.jpg",
            Path.unlink,
            r"train_00003 holds 2 frames in place of 3; extract them anew",
        ),
        ("audio/train_00005.wav", Path.unlink, r"train_00005.wav is no readable WAV file"),
        (
            "audio/train_00005.wav",
            lambda path: write_wav(path, np.zeros(100), 44_100),
            r"train_00005.wav should be 16-bit mono at 16000 Hz",
        ),
    ],
)
def test_an_unreadable_clip_is_named(copied, num_workers, pattern, damage, message):
    damage(copied / "crema-d" / pattern)
    split = load_dataset("crema-d", copied, num_workers=num_workers, **SMALL).train
    for _ in range(2):
        with pytest.raises(UserError, match=message) as caught:
            inputs_of(split, 3, make_generator(0), augment=True)
        assert "\n" not in str(caught.value)


def test_a_killed_process_is_one_sentence():
    """torch raises it from a signal handler, so wherever the program happens to be."""

    def main():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(SystemExit, match=r"ended from outside; .* fewer --num-workers"):
        run_command(main)


def test_a_batch_of_one_too_small_for_batchnorm_is_one_sentence(run, prepared):
    flags = ["--num-workers", "0", "--method", "joint", "--batch-size", "7"]  # 8 clips: 7 and 1
    with pytest.raises(SystemExit, match=r"of one sample .* choose another --batch-size"):
        run_command(lambda: run(pmr, "modelnet40", *flags))


def change_manifest(**changes):
    def change(folder):
        manifest = json.loads((folder / "manifest.json").read_text())
        (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))

    return change


def rewrite_clips(old, new):
    def change(folder):
        path = folder / "clips.csv"
        path.write_text(path.read_text().replace(old, new))

    return change


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            shutil.rmtree,
            r"no prepared crema-d in \S+; run `python data/prepare.py crema-d --source DIR --out",
        ),
        (change_manifest(format=2), r"damaged \(ValueError: it is of crema-d, format 2\)"),
        (change_manifest(dataset="ave"), r"it is of ave, format 1"),
        (change_manifest(classes=["NEU"]), r"damaged \(KeyError: '1'\)"),
        (lambda folder: (folder / "manifest.json").write_text("{"), r"damaged \(JSONDecodeError"),
        (lambda folder: (folder / "clips.csv").unlink(), r"damaged \(FileNotFoundError"),
        (rewrite_clips(",val,", ",train,"), r"lists no val samples"),
        (rewrite_clips(",1,0.5", ",0,0.5"), r"no frames of 5 of 16 samples, such as train_00001"),
        (rewrite_clips(",1,0.5", ",many,0.5"), r"damaged \(ValueError"),
        (lambda folder: (folder / "cache").write_text(""), r"Cannot write \S+cache\S+ \("),
    ],
)
def test_a_damaged_folder_is_one_sentence(copied, damage, message):
    damage(copied / "crema-d")
    with pytest.raises(UserError, match=message) as caught:
        load_dataset("crema-d", copied, **SMALL)
    assert "\n" not in str(caught.value)


def test_damaged_lists_of_the_community_are_one_sentence(tmp_path):
    folder = write_community(tmp_path, sizes=(2, 1))
    (folder / "train.csv").write_text("a,NEU\nb,BORED\n")
    with pytest.raises(UserError, match=r"train.csv cannot be read .* lines such as 1001_DFA"):
        load_dataset("crema-d", tmp_path)


def test_empty_lists_of_the_community_are_one_sentence(tmp_path):
    folder = write_community(tmp_path, sizes=(2, 1))
    for name in ("train", "test"):
        (folder / f"{name}.csv").write_text("")
        with pytest.raises(UserError, match=r"lists no (train|val) samples"):
            load_dataset("crema-d", tmp_path)


@pytest.mark.parametrize("views", ["0", "0,0", "0,12"])
def test_bad_views(prepared, views):
    with pytest.raises(UserError, match="two or more different numbers below 12"):
        load_dataset("modelnet40", prepared, views=views)


def test_missing_views(tmp_path):
    write_prepared(tmp_path, "modelnet40", counts=(12, 11), shape=(32, 32))
    with pytest.raises(UserError, match=r"train_00001 in .* lacks some of its 12 views"):
        load_dataset("modelnet40", tmp_path)


@pytest.mark.parametrize(
    "flags",
    [("--views", "0;6"), ("--spectrogram", "mel"), ("--num-frames", "0"), ("--num-workers", "-1")],
)
def test_bad_dials_end_with_usage(flags, capsys):
    with pytest.raises(SystemExit):
        pmr.parse_args(["--dataset", "crema-d", *flags])
    assert flags[0] in capsys.readouterr().err


# ---- ResNet-18 ----


@pytest.mark.parametrize("shape", [(3, 64, 64), (1, 65, 47)])
def test_stages_are_torchvisions_network(shape):
    encoder = ResNet18(shape[0])
    network = torchvision.models.resnet18()
    network.conv1 = torch.nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)
    network.fc = torch.nn.Identity()
    weights = encoder.state_dict().values()
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    parameters = sum(p.numel() for p in encoder.parameters())
    assert parameters == {3: 11_176_512, 1: 11_170_240}[shape[0]]
    x = torch.randn(2, *shape)
    for mode in (True, False):
        encoder.train(mode), network.train(mode)
        torch.testing.assert_close(encoder(x), network(x))
    maps = x
    for stage, channels in zip(encoder.stages, encoder.channels, strict=True):
        maps = stage(maps)
        assert maps.shape[1] == channels
    assert encoder.dim == 512


def test_features_are_averaged_over_frames():
    encoder = ResNet18(3).eval()
    frames = torch.randn(2, 3, 4, 64, 64)
    expected = torch.stack([encoder(frames[:, :, n]) for n in range(4)]).mean(dim=0)
    torch.testing.assert_close(encoder(frames), expected)
    assert encoder.stages[0](frames).shape == (2, 64, 4, 16, 16)
    one = frames[:, :, :1]
    torch.testing.assert_close(encoder(one), encoder(one[:, :, 0]))


def test_pretrained_weights(monkeypatch):
    original = torchvision.models.resnet18

    def downloaded(weights=None):
        assert weights is torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        network = original()
        torch.nn.init.constant_(network.conv1.weight, 2.0)
        return network

    monkeypatch.setattr(torchvision.models, "resnet18", downloaded)
    assert (build_encoder("ave", (3, 1, 32, 32), pretrained=True).stages[0][0].weight == 2).all()
    assert (build_encoder("ave", (1, 257, 188), pretrained=True).stages[0][0].weight == 6).all()

    def refused(weights=None):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "resnet18", refused)
    with pytest.raises(UserError, match=r"cannot be downloaded .*; train from scratch, or put"):
        ResNet18(3, pretrained=True)


# ---- The scripts ----


@pytest.fixture
def run(prepared, tmp_path):
    """Run a script for one epoch on a prepared folder."""

    def call(script, dataset, *argv):
        own = ["--spectrogram", "ogm-ge"] if dataset == "crema-d" else []
        flags = ["--data-root", str(prepared), "--out", str(tmp_path), "--device", "cpu"]
        sizes = ["--image-size", "32", "--epochs", "1", "--batch-size", "4"]
        return script.main(["--dataset", dataset, *flags, *sizes, *own, *argv])

    return call


def test_pmr_on_clips_with_any_number_of_workers(run):
    first = run(pmr, "crema-d", "--num-workers", "0")
    assert first["method"] == "pmr" and first["rho"] > 0
    assert run(pmr, "crema-d", "--num-workers", "2") == first  # the same run: it is not trained
    again = run(pmr, "crema-d", "--num-workers", "2", "--overwrite")
    assert without_seconds(again) == without_seconds(first)


def test_mhm_on_clips(run):
    assert run(mhm, "crema-d", "--num-workers", "0", "--heads", "2")["deployed"] == [0]


@pytest.mark.parametrize("dataset", ["crema-d", "modelnet40"])
def test_umt_on_clips_and_views_never_caches_its_targets(run, dataset, monkeypatch):
    seen = []
    original = umt_ume.Teachers.forward

    def watch(teachers, inputs):
        seen.append(next(iter(inputs.values())).flatten()[0].item())
        return original(teachers, inputs)

    monkeypatch.setattr(umt_ume.Teachers, "forward", watch)
    run(umt_ume, dataset, "--num-workers", "0", "--method", "umt", "--epochs", "3")
    assert len(seen) == 3 * 2  # every batch of 8 clips, in every epoch


def test_prepared_folders_are_told_apart(prepared, run, tmp_path, capsys):
    name = DATASETS["crema-d"].identify(prepared)
    assert re.fullmatch(r"fake-[0-9a-f]{8}", name)
    run(pmr, "crema-d", "--num-workers", "0", "--method", "joint")
    assert "crema-d, MADE-UP DATA: the numbers mean nothing, test split" in capsys.readouterr().out
    (folder,) = (tmp_path / "pmr" / "crema-d").iterdir()
    assert f"-data={name}-" in folder.name
    assert DATASETS["crema-d"].identify(tmp_path) is None
    manifest = prepared / "crema-d" / "manifest.json"
    copy = tmp_path / "other" / "crema-d"
    copy.mkdir(parents=True)
    (copy / "manifest.json").write_text(manifest.read_text().replace("format", "version"))
    shutil.copy(manifest.with_name("clips.csv"), copy)
    assert DATASETS["crema-d"].identify(tmp_path / "other") not in (name, None)  # other pixels


def test_community_trees_are_told_apart(tmp_path):
    names = []
    for i in range(2):
        folder = tmp_path / str(i) / "crema-d"
        (folder / "Image-01-FPS").mkdir(parents=True)
        (folder / "train.csv").write_text(f"1001_DFA_ANG_X{i},ANG\n")
        (folder / "test.csv").write_text("1002_DFA_ANG_XX,ANG\n")
        names.append(DATASETS["crema-d"].identify(tmp_path / str(i)))
    assert names[0] != names[1] and all(name.startswith("lists-") for name in names)


def test_pretrained_is_of_resnets_only(run, monkeypatch):
    with pytest.raises(UserError, match="no pretrained weights for digits; leave out --pretrained"):
        pmr.parse_args(["--pretrained"])
    asked = []
    original = torchvision.models.resnet18
    monkeypatch.setattr(
        torchvision.models, "resnet18", lambda weights: asked.append(weights) or original()
    )
    run(pmr, "crema-d", "--num-workers", "0", "--method", "joint", "--pretrained")
    assert asked and all(w is torchvision.models.ResNet18_Weights.IMAGENET1K_V1 for w in asked)


@pytest.mark.parametrize(
    ("dataset", "flags", "modalities"),
    [
        ("crema-d", (), ("audio", "visual")),
        ("crema-d", ("--duplicate", "visual"), ("visual", "visual-2")),
        ("modelnet40", ("--views", "0,3,6"), ("front", "view-3", "rear")),
    ],
)
def test_greedy_balance_on_one_frame_and_on_views(run, dataset, flags, modalities):
    summary = run(greedy_balance, dataset, "--num-workers", "0", *flags)
    assert all(summary["test"][m].keys() == {"branch", "cut", "u", "probe"} for m in modalities)


def test_the_papers_settings():
    found = {}
    for script in (pmr, greedy_balance, mhm, umt_ume):
        for dataset in FROM_FILES:
            args, _ = script.parse_args(["--dataset", dataset])
            found[script.__name__, dataset] = args
    crema = found["pmr", "crema-d"]
    assert (crema.num_frames, crema.spectrogram, crema.image_size) == (3, "pmr-3s", 224)
    assert (crema.batch_size, crema.lr, crema.weight_decay, crema.alpha) == (64, 1e-3, 1e-4, 2)
    ave = found["pmr", "ave"]
    assert (ave.num_frames, ave.spectrogram) == (4, "pmr-10s")
    views = found["greedy_balance", "modelnet40"]
    assert (views.batch_size, views.lr, views.tolerance, views.views) == (8, 0.1, 0.01, "0,6")
    assert found["greedy_balance", "crema-d"].num_frames == 1


def test_every_dataset_from_files_is_tested_here():
    assert {name for name, data in DATASETS.items() if "frame_cache" in data.dials} == set(
        FROM_FILES
    )
    assert {dial for name in FROM_FILES for dial in DATASETS[name].dials} <= set(DIALS)


@pytest.mark.parametrize("name", ["ave", "vggsound"])
def test_ave_and_vggsound(tmp_path, name):
    write_prepared(tmp_path, name, sizes=(2, 1, 1))
    splits = load_dataset(name, tmp_path, image_size=32)
    frames = {"ave": 4, "vggsound": 3}[name]
    assert splits.shapes == {"audio": (1, 257, 1004), "visual": (3, frames, 32, 32)}
