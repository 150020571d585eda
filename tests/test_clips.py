"""Clips and views from files: what is drawn, what is kept, what is refused; and ResNet-18."""

import importlib
import json
import multiprocessing
import os
import random
import re
import shutil
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import scipy.signal
import torch
import torchvision
from conftest import DATA_ROOT
from fake_clips import FROM_FILES, write_community, write_prepared, write_wav
from PIL import Image
from torchvision.transforms import functional as TF

import pmr
from common.command_line import Command, run_command
from common.datasets import DATASETS, clips, file_splits, load_dataset
from common.datasets.clips import SPECTROGRAMS
from common.datasets.file_splits import MEAN, STD
from common.datasets.files import DiskRows, center_box, crop_box, cut, read_image, resize
from common.errors import UserError
from common.networks.encoders import ResNet18, build_encoder
from common.parser import parse_flags
from common.seeding import make_generator

SMALL = {"image_size": 32, "spectrogram": "ogm-ge"}
REAL_LISTS = DATA_ROOT / "formats" / "crema-d"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder above a prepared crema-d and modelnet40; not to be changed."""
    root = tmp_path_factory.mktemp("prepared")
    write_prepared(root, "crema-d")
    write_prepared(root, "modelnet40", counts=(12,), shape=(32, 32))
    return root


@pytest.fixture
def copied(prepared, tmp_path):
    """A copy of its crema-d to damage, without what is kept on disk."""
    ignore = shutil.ignore_patterns("cache")
    shutil.copytree(prepared / "crema-d", tmp_path / "data" / "crema-d", ignore=ignore)
    return tmp_path / "data"


def load(root, name="crema-d", **dials):
    return load_dataset(name, root, **{**(SMALL if name == "crema-d" else {}), **dials})


def training(split, epoch, batch_size=3):
    """All batches of a training epoch."""
    return list(split.batches(batch_size, make_generator(epoch), augment=True))


def equal(one, other):
    """Whether two passes gave the same batches, bit for bit."""
    return len(one) == len(other) and all(
        torch.equal(i, k) and torch.equal(a, b) and all(torch.equal(x[m], y[m]) for m in x)
        for (x, a, i), (y, b, k) in zip(one, other, strict=True)
    )


def pixels(visual):
    """Normalised frames (B, 3, N, H, W) back to 0 to 255."""
    mean, std = (torch.tensor(x).view(3, 1, 1, 1) for x in (MEAN, STD))
    return 255 * (visual * std + mean)


# ---- What all splits promise ----

AUDIO, FACES, OBJECT = (1, 257, 188), (3, 3, 32, 32), (3, 40, 40)


@pytest.mark.parametrize(
    ("name", "dials", "shapes"),
    [
        ("crema-d", SMALL, {"audio": AUDIO, "visual": FACES}),
        ("crema-d", {**SMALL, "num_frames": 1}, {"audio": AUDIO, "visual": (3, 1, 32, 32)}),
        ("modelnet40", {"image_size": 32}, {"front": (3, 32, 32), "rear": (3, 32, 32)}),
        (
            *("modelnet40", {"image_size": 40, "views": "6,3,0"}),
            {"rear": OBJECT, "view-3": OBJECT, "front": OBJECT},
        ),
    ],
)
def test_inputs_labels_and_index_as_from_memory(prepared, name, dials, shapes):
    splits = load(prepared, name, **dials)
    train = splits.train
    assert splits.sizes == {"train": 8, "val": 4, "val_iid": 4, "test": 4}
    assert splits.shapes == shapes and splits.modalities == tuple(shapes)
    assert splits.num_classes == (6 if name == "crema-d" else 2)

    inputs, labels, index = zip(*train.batches(3), strict=True)
    assert [len(part) for part in labels] == [3, 3, 2]
    assert torch.cat(index).tolist() == list(range(8))
    assert torch.equal(torch.cat(labels), train.labels)
    ids = train.loader.files.listing.ids[train.tensors["row"]]
    assert train.labels.tolist() == [int(i[-1]) % 2 for i in ids]  # as in clips.csv, in turn
    assert all(x.dtype == torch.float32 for batch in inputs for x in batch.values())
    whole = {m: torch.cat([batch[m] for batch in inputs]) for m in shapes}
    half = train.subset([5, 2, 7]).subset([2, 0])
    for part, rows in ((half, [7, 5]), (train.head(2), [0, 1])):
        ((inputs, labels, index),) = part.batches(10)
        assert index.tolist() == rows and torch.equal(labels, train.labels[rows])
        assert all(torch.equal(inputs[m], whole[m][rows]) for m in shapes)
    assert load(prepared, name, train_samples=4, **dials).sizes["test"] == 2

    shuffled = torch.cat([i for _, _, i in train.batches(3, make_generator("order"))])
    assert shuffled.tolist() != list(range(8)) and sorted(shuffled.tolist()) == list(range(8))
    other = load(prepared, name, data_seed=1, **dials).train
    assert not equal(list(other.batches(8)), list(train.batches(8)))


@pytest.mark.parametrize(("name", "frames"), [("ave", 4), ("vggsound", 3)])
def test_ave_and_vggsound(tmp_path, name, frames):
    write_prepared(tmp_path, name, sizes=(2, 1, 1))
    shapes = load(tmp_path, name, image_size=32).shapes
    assert shapes == {"audio": (1, 257, 1004), "visual": (3, frames, 32, 32)}
    assert {name for name, data in DATASETS.items() if "frame_cache" in data.dials} == {*FROM_FILES}


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


def counts_of(split):
    """How many frames the clips of a split have, in its order."""
    return split.loader.files.listing.counts[split.tensors["row"]].tolist()


def frame_numbers(batches):
    """Position in the split -> numbers of its frames, from 1."""
    found = {}
    for inputs, _, index in batches:
        brightest = pixels(inputs["visual"]).amax(dim=(1, 3, 4))  # (B, N): of the right half
        found |= zip(index.tolist(), (brightest / 24).round().int().tolist(), strict=True)
    return found


def test_frames_are_drawn_at_random_in_training_and_even_in_evaluation(numbered):
    split = load(numbered).train
    epochs = [frame_numbers(training(split, epoch)) for epoch in range(25)]
    assert epochs[0] == frame_numbers(training(split, 0))
    for i, count in enumerate(counts_of(split)):
        for numbers in epochs:
            assert numbers[i] == sorted(numbers[i])  # in time
            assert count < 10 or len(set(numbers[i])) == 3
        # Every frame has its turn, also with replacement.
        assert {n for numbers in epochs for n in numbers[i]} == set(range(1, count + 1))
    for inputs, _, index in training(split, 0):  # one crop and flip for a clip
        for i, frames in zip(index.tolist(), inputs["visual"].unbind(), strict=True):
            assert counts_of(split)[i] > 1 or torch.equal(frames[:, 0], frames[:, 1])
    for num_frames, expected in ((3, [2, 6, 9]), (1, [6]), (2, [3, 8])):
        split = load(numbered, num_frames=num_frames).test
        numbers, counts = frame_numbers(split.batches(2)), counts_of(split)
        assert numbers == frame_numbers(split.batches(2, make_generator("order")))
        assert numbers[counts.index(10)] == expected
        assert numbers[counts.index(1)] == [1] * num_frames


def test_one_flip_for_all_frames_of_a_clip(numbered):
    split, brighter = load(numbered).train, []

    def grays(batches):
        return [pixels(inputs["visual"]).mean(dim=(1, 3)) for inputs, _, _ in batches]  # (B, N, W)

    for epoch in range(12):
        for gray in grays(training(split, epoch, 8)):
            brighter += (gray[..., -1] - gray[..., 0]).tolist()
    signs = [{int(np.sign(round(x / 6))) for x in clip} for clip in brighter]
    assert all(not {1, -1} <= clip for clip in signs)  # a crop may show one half only: 0
    assert min(sum(sign in clip for clip in signs) for sign in (1, -1)) > 10
    assert all((gray[..., -1] > gray[..., 0] + 4).all() for gray in grays(split.batches(8)))


def test_workers_change_no_result(prepared):
    """Nor does a pass that is left early, or one inside another, or what else is drawn."""
    alone, helped = load(prepared), load(prepared, num_workers=2)
    expected = [training(alone.train, epoch) for epoch in (0, 1)]
    assert not equal(*expected)
    for epoch in (0, 1):
        random.seed(epoch), torch.manual_seed(epoch), np.random.seed(epoch)
        assert equal(training(helped.train, epoch), expected[epoch])
    processes = helped.train.loader.shared._iterator._workers
    left, outer = (helped.train.batches(1, make_generator(5), augment=True) for _ in range(2))
    next(left)
    inside = training(helped.train, 0)
    del left
    assert equal(inside, expected[0]) and equal(training(helped.train, 1), expected[1])
    first = next(outer)
    inside = training(helped.train, 0)
    assert equal([first, *outer], training(alone.train, 5, 1)) and equal(inside, expected[0])
    assert equal(list(helped.test.batches(3)), list(alone.test.batches(3)))
    assert helped.train.loader.shared._iterator._workers is processes  # the same all along
    for splits in (alone, helped):  # whoever draws between batches gets the same with any number
        generator, before = make_generator(0), torch.get_rng_state()
        passing = splits.train.batches(2, generator, augment=True)
        next(passing)
        state = generator.get_state()
        list(passing)
        assert torch.equal(generator.get_state(), state)
        assert torch.equal(torch.get_rng_state(), before)  # initialisation and dropout draw there


def test_processes_end_with_their_splits(prepared):
    splits = load(prepared, num_workers=1)
    list(splits.val.batches(4))
    shared = splits.val.loader.shared
    (process,), limit = shared._iterator._workers, shared.timeout
    assert process.is_alive() and limit == file_splits.LONGEST_WAIT > 0
    del splits, shared
    assert not process.is_alive()


def test_a_large_batch_is_put_together_of_several_reads(prepared, monkeypatch):
    expected = training(load(prepared).train, 0, 8)
    monkeypatch.setattr(file_splits, "AT_A_TIME", 3)
    split = load(prepared).train
    assert equal(training(split, 0, 8), expected) and not split.loader.busy


def test_too_little_shared_memory_is_one_sentence(prepared, monkeypatch):
    """9 reads of 16 samples, of 3 frames of 32 x 32 and a spectrogram each, are 29 MB."""
    hint = r".*docker run --shm-size.* --num-workers 0 needs none\.$"
    splits, free = load(prepared, num_workers=2), SimpleNamespace(free=29_000_000)
    monkeypatch.setattr(file_splits.shutil, "disk_usage", lambda path: free)
    for _ in range(2):
        with pytest.raises(
            UserError, match="^2 processes .* need 29 MB .* has 29 MB free; " + hint
        ):
            training(splits.train, 0)
    assert training(load(prepared).train, 0)
    free.free = 30_000_000

    def full(tensor):
        raise RuntimeError("unable to allocate shared memory(shm): No space left on device (28)")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "share_memory_", full)
        with pytest.raises(UserError, match="^Shared memory is full; " + hint):
            training(splits.train, 0)
    assert training(splits.train, 0)
    failing = iter([RuntimeError("DataLoader timed out after 600 seconds"), RuntimeError("bug")])
    monkeypatch.setattr(splits.loader, "pass_on", lambda *_: (_ for _ in ()).throw(next(failing)))
    with pytest.raises(UserError, match="^Nothing came from .* for 600 s; .* short, " + hint):
        training(splits.train, 0)
    with pytest.raises(RuntimeError, match="bug"):
        training(splits.train, 0)


# ---- Pixels ----


def test_training_crops_are_those_of_torchvision():
    rng, crop = random.Random(0), torchvision.transforms.RandomResizedCrop.get_params
    torch.manual_seed(0)
    for height, width in ((360, 480), (100, 400), (400, 100)):
        boxes = np.array([crop_box(width / height, rng) for _ in range(3000)])
        assert (boxes >= 0).all() and (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-9).all()
        tall, wide = boxes[:, 2] * height, boxes[:, 3] * width
        assert (tall * wide / height / width).min() > 0.08 - 1e-9
        assert (wide / tall).min() > 3 / 4 - 1e-9 and (wide / tall).max() < 4 / 3 + 1e-9
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
    part = resize(cut(image, (0.25, 0.5, 0.5, 0.25)), 32, 32).permute(2, 0, 1)
    theirs = TF.resized_crop(image.permute(2, 0, 1), 12, 32, 24, 16, [32, 32], antialias=True)
    assert (part.int() - theirs.int()).abs().max() <= 1
    big = torch.randint(0, 256, (256, 342, 3), dtype=torch.uint8)
    center = cut(big, crop_box(342 / 256, None)).permute(2, 0, 1)
    assert torch.equal(center, TF.center_crop(big.permute(2, 0, 1), [224, 224]))


def test_the_loader_gives_uint8_and_the_split_imagenet_statistics(prepared):
    test = load(prepared).test
    frames = test.loader.files[test.tensors["row"].tolist(), None]["frames"]
    assert frames.dtype == torch.uint8 and frames.shape == (4, 3, 32, 32, 3)
    ((inputs, _, _),) = test.batches(4)
    normalize = torchvision.transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    expected = normalize(frames.permute(0, 1, 4, 2, 3) / 255).transpose(1, 2)
    torch.testing.assert_close(inputs["visual"], expected)
    ids = test.loader.files.listing.ids[test.tensors["row"]].tolist()
    image = read_image(prepared / "crema-d/frames/test_00001/0001.jpg").permute(2, 0, 1)
    center = TF.resized_crop(image, 3, 11, 42, 42, [32, 32], antialias=True)  # of 48 x 64
    found = frames[ids.index("test_00001"), 0].permute(2, 0, 1)
    assert (found.int() - center.int()).abs().max() <= 1


# ---- Spectrograms ----


@pytest.mark.parametrize("length", [8000, 40_000, 200_000])
def test_spectrograms_are_scipys(length):
    noise = np.random.default_rng(0).normal(0.1, 0.5, length).astype(np.float32)
    waveform, whole = torch.from_numpy(noise), np.tile(noise.astype(float), 40)
    found = {name: recipe(waveform).numpy() for name, (recipe, _) in SPECTROGRAMS.items()}
    shapes = {"pmr-3s": (257, 299), "pmr-10s": (257, 1004), "ogm-ge": (257, 188)}
    assert {name: shape for name, (_, shape) in SPECTROGRAMS.items()} == shapes
    for name, seconds in (("pmr-3s", 3), ("pmr-10s", 10)):
        samples = np.clip(whole[: seconds * 16_000], -1, 1)
        _, _, power = scipy.signal.spectrogram(samples, 16_000, nperseg=512, noverlap=353)
        expected = np.log(power + 1e-7)
        expected = (expected - expected.mean()) / (expected.std() + 1e-9)
        np.testing.assert_allclose(found[name], expected, atol=1e-4)
    centered = waveform - 0.1
    found = SPECTROGRAMS["ogm-ge"][0](centered).numpy()
    kaiser = {"cutoff": 0.9475937 * 8000, "window": ("kaiser", 14.769656), "fs": 441 * 16_000}
    taps = scipy.signal.firwin(2 * int(64 * 441 / 0.9475937) + 1, **kaiser)
    samples = scipy.signal.resample_poly(centered.numpy().astype(float), 441, 320, window=taps)
    samples = np.pad(np.clip(np.tile(samples, 7)[: 3 * 22_050], -1, 1), 256)
    window = scipy.signal.get_window("hann", 512)
    frames = [window * samples[i : i + 512] for i in range(0, 3 * 22_050 + 1, 353)]
    expected = np.log(np.abs(scipy.fft.rfft(np.array(frames), axis=1)).T + 1e-7)
    loud = expected > -3
    np.testing.assert_allclose(found, expected, atol=1e-2)
    np.testing.assert_allclose(found[loud], expected[loud], atol=1e-3)


@pytest.mark.parametrize("peak", [70, 140, 163])
def test_ogm_ges_spectrogram_of_a_tone_and_of_a_constant(peak):
    """In the middle of a bin a tone of 0.5 gives half of it times the window's sum of 256, and half
    of that beside; nothing elsewhere, nor at 16 kHz less the tone, where the image of it lies."""
    time = torch.arange(48_000, dtype=torch.float64) / 16_000
    tone = 0.5 * torch.sin(2 * torch.pi * peak * 22_050 / 512 * time)
    inner = SPECTROGRAMS["ogm-ge"][0](tone.float())[:, 1:-1]
    expected = torch.tensor([32.0, 64, 32]).log()[:, None].expand(3, 186)
    torch.testing.assert_close(inner[peak - 1 : peak + 2], expected)
    assert torch.cat([inner[: peak - 1], inner[peak + 2 :]]).max() < -11  # of 4.2 at the peak
    constant = SPECTROGRAMS["ogm-ge"][0](torch.full((48_000,), 0.5))[0]
    assert constant[100].exp().item() == pytest.approx(128, abs=0.01)
    assert constant[0].exp().item() == pytest.approx(64.25, abs=0.1)  # half are zeros, not sound


# ---- What is kept on disk ----


def test_spectrograms_and_frames_are_computed_once(copied):
    folder, dials = copied / "crema-d", {"image_size": 224, "frame_cache": 1}
    expected = training(load(copied, image_size=224).train, 0, 8)
    assert equal(training(load(copied, **dials).train, 0, 8), expected)  # 48 x 64 stays as it is
    for path in (*folder.glob("audio/*.wav"), *folder.glob("frames/*/*.jpg")):
        if path.parent.name != "train_00000":  # the first one tells the size
            before = path.stat()
            path.write_bytes(bytes(before.st_size))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    again = load(copied, **dials)
    assert equal(training(again.train, 0, 8), expected)
    path = folder / "clips.csv"
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    load(copied)  # new samples make a new cache
    assert len(list(folder.glob("cache/ogm-ge-2-*"))) == 2  # not what older versions computed


def test_a_row_counts_when_it_is_whole(tmp_path):
    """A kill between the values and their tag leaves a row that is computed anew."""
    path = tmp_path / "cache" / "x.rows"
    rows = DiskRows(path, 3, (2,), np.float32)
    empty = path.read_bytes()
    assert rows.get(1, lambda: (2.5, torch.tensor([3.0, 4.0])))[1].tolist() == [3, 4]
    again = DiskRows(path, 3, (2,), np.float32)
    tag, values = again.get(1, lambda: pytest.fail("it is there"))
    assert (tag, values.tolist()) == (2.5, [3, 4])
    assert again.get(0, lambda: (1, np.zeros(2)))[0] == 1
    whole = path.read_bytes()
    for tag in (0, -1, np.nan, np.inf):  # of which none is ever written
        path.write_bytes(whole.replace(*(np.float32([x]).tobytes() for x in (2.5, tag))))
        assert again.get(1, lambda: (1, np.ones(2)))[1].tolist() == [1, 1]
    path.write_bytes(whole[:-20])  # cut in the middle of row 1 while it is in use
    assert again.get(1, lambda: (1, np.ones(2)))[1].tolist() == [1, 1]
    for content in (whole[:-5], bytes(len(whole)), whole.replace(b"version 1", b"version 0")):
        path.write_bytes(content)
        DiskRows(path, 3, (2,), np.float32)
        assert path.read_bytes() == empty


@pytest.mark.parametrize("link", [os.symlink, os.link])
def test_a_cache_file_that_is_a_link_is_replaced_and_what_it_points_to_stays(tmp_path, link):
    (tmp_path / "thesis").write_text("years of work")
    path = tmp_path / "cache" / "x.rows"
    path.parent.mkdir()
    link(tmp_path / "thesis", path)
    rows = DiskRows(path, 3, (2,), np.float32)
    assert rows.get(1, lambda: (1, np.ones(2)))[1].tolist() == [1, 1] and not path.is_symlink()
    path.unlink(), os.symlink(tmp_path / "thesis", path)  # and while it is in use
    with pytest.raises(UserError, match=r"Cannot write \S+x.rows"):
        rows.get(0, lambda: (1, np.ones(2)))
    assert (tmp_path / "thesis").read_text() == "years of work"
    assert {found.name for found in path.parent.iterdir()} == {"x.rows"}


def test_a_clip_of_another_shape_is_cached_in_its_own_proportions(tmp_path):
    folder = write_prepared(tmp_path, "crema-d", counts=(1,), shape=(60, 80))
    smooth = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    for path in folder.glob("frames/test*/*.jpg"):
        smooth.resize((120, 60), Image.Resampling.BICUBIC).save(path, quality=95)
    direct, cached = (load(tmp_path, num_frames=1, frame_cache=cache).test for cache in (0, 1))
    for augment in (False, True):
        one, other = (
            pixels(next(split.batches(4, make_generator(0), augment))[0]["visual"])
            for split in (direct, cached)
        )
        assert (one - other).abs().mean() < 4 < one.std()


# ---- The community's tree, and real data ----


def test_the_tree_of_ogm_ge_and_pmr(tmp_path, capsys):
    folder, splits = write_community(tmp_path), load(tmp_path)
    train, val, test = splits.train, splits.val, splits.test
    assert splits.sizes == {"train": 18, "val": 2, "val_iid": 2, "test": 4}
    assert splits.num_classes == 6 and splits.modalities == ("audio", "visual")
    rows = torch.cat([split.tensors["row"] for split in (train, val, test)])
    assert rows.unique().tolist() == list(range(24))
    names = train.loader.files.listing.ids[train.tensors["row"]]
    assert [clips.EMOTIONS[label] for label in train.labels] == [name[-6:-3] for name in names]
    assert training(train, 0, 8)[0][1].shape == (8,)
    assert sorted(val.labels.tolist()) == [0, 1]  # a tenth of every class
    other = load(tmp_path, data_seed=1)
    assert {*other.val.tensors["row"].tolist()} != {*val.tensors["row"].tolist()}
    assert capsys.readouterr().err == ""
    ((before, *_),) = test.batches(4)
    for path in folder.glob("AudioWAV/test*.wav"):
        write_wav(path, 0.1 * np.ones(8000))
    ((after, *_),) = load(tmp_path).test.batches(4)  # changed recordings are read anew
    assert torch.equal(before["visual"], after["visual"])
    assert not torch.isclose(before["audio"], after["audio"]).all(dim=(1, 2, 3)).any()
    rows = [line.split(",")[0] for line in (folder / "train.csv").read_text().splitlines()]
    lines = [f"{clip},{clips.EMOTIONS[i % 6]}\n" for i, clip in enumerate(rows)]
    (folder / "train.csv").write_text("".join(lines))
    with open(folder / "test.csv", "a") as file:
        file.write(lines[5] + lines[6])
    assert lines[5].endswith(",ANG\n")
    splits = load(tmp_path)
    assert splits.val.labels.sort().values.tolist() == [0, 1, 2, 3, 4, 5]
    assert torch.bincount(splits.train.labels).tolist() == [3, 3, 2, 2, 2, 2]
    assert re.fullmatch(
        "(warning: [12] of the samples of .* in (train|val) and in test, such as train.*\n){1,2}",
        capsys.readouterr().err,
    )


@pytest.mark.skipif(not REAL_LISTS.exists(), reason=f"needs {REAL_LISTS}; set DATA_ROOT")
def test_the_real_lists_of_crema_d(tmp_path):
    (tmp_path / "crema-d" / "Image-01-FPS").mkdir(parents=True)
    for name in ("train.csv", "test.csv"):
        shutil.copy(REAL_LISTS / name, tmp_path / "crema-d")
    sentence = r"lacks 14,884 of .* 7,442 samples need: Image-01-FPS/\w+ has 0 of 1 frames, no Aud"
    with pytest.raises(UserError, match=sentence):
        load_dataset("crema-d", tmp_path)


# ---- What is refused ----


def cut_off(path):
    path.write_bytes(path.read_bytes()[:-400])


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize(
    ("pattern", "damage", "message"),
    [
        (
            "frames/train_00000/0002.jpg",
            cut_off,
            r"0002.jpg is no readable image \(OSError\); fetch or prepare",
        ),
        ("frames/train_00003/0001.jpg", Path.unlink, r"3 holds 2 frames in place of 3; extract"),
        ("audio/train_00005.wav", Path.unlink, r"train_00005.wav is no readable WAV file"),
        (
            *("audio/train_00005.wav", lambda path: write_wav(path, np.zeros(100), 44_100)),
            r"train_00005.wav should be 16-bit mono at 16000 Hz",
        ),
    ],
)
def test_a_clip_that_becomes_unreadable_is_named(copied, num_workers, pattern, damage, message):
    split, before = (
        load(copied, num_workers=num_workers).train,
        {*multiprocessing.active_children()},
    )
    damage(copied / "crema-d" / pattern)
    for _ in range(2):
        with pytest.raises(UserError, match=message) as caught:
            training(split, 0)
        assert "\n" not in str(caught.value)
        assert {*multiprocessing.active_children()} <= before and split.loader.shared is None


LABELS, MADE_UP = json.dumps(clips.EMOTIONS)[1:-1], '"fake": true, "options": {'


def rewrite(name, old, new):
    def damage(folder):
        text = (folder / name).read_text()
        assert old in text
        (folder / name).write_text(text.replace(old, new))

    return damage


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            shutil.rmtree,
            r"no prepared crema-d in \S+; run `python data/prepare.py crema-d --source DIR --out",
        ),
        (rewrite("manifest.json", '"format": 1', '"format": 2'), "it is of crema-d, format 2"),
        (
            rewrite("manifest.json", "crema-d", "ave"),
            r"damaged \(ValueError: it is of ave, format 1",
        ),
        (rewrite("manifest.json", ', "HAP"', ', "HAP"]; ["'), r"damaged \(JSONDecodeError"),
        (rewrite("manifest.json", LABELS, '"NEU"'), r"damaged \(KeyError: '1'\)"),
        (lambda folder: (folder / "clips.csv").unlink(), r"damaged \(FileNotFoundError"),
        (rewrite("clips.csv", ",val,", ",train,"), r"lists no val samples"),
        (rewrite("clips.csv", ",train,", ",trian,"), r"damaged .*no split is called trian"),
        (
            rewrite("clips.csv", ",1,0.5", ",2,0.5"),
            r"lacks 5 of what its 16 samples need: frames/train_00001 has 1 of 2 frames, fram",
        ),
        (
            lambda folder: [path.unlink() for path in folder.glob("audio/t*.wav")],
            r"lacks 12 of .*: no audio/train_00000.wav, .* no audio/train_00004.wav and 7 more;",
        ),
        (lambda folder: (folder / "audio/test_00001.wav").write_bytes(b""), "no audio/test_00001"),
        (lambda folder: shutil.rmtree(folder / "frames/test_00003"), "test_00003 has 0 of 3 frame"),
        (rewrite("manifest.json", MADE_UP, '"options": {"split": "../up"'), r"is called \.\./up"),
        (lambda folder: (folder / "manifest.json").write_text("[" * 10**5), "damaged .Recursion"),
        (lambda folder: (folder / "clips.csv").write_text("id\n" + "a" * 140_000), "damaged .Err"),
        (rewrite("clips.csv", ",1,0.5", ",many,0.5"), r"damaged \(ValueError"),
        (lambda folder: (folder / "cache").write_text(""), r"Cannot write \S+cache\S+ \("),
    ],
)
def test_a_damaged_folder_is_one_sentence(copied, damage, message):
    damage(copied / "crema-d")
    with pytest.raises(UserError, match=message) as caught:
        load(copied)
    assert "\n" not in str(caught.value)


def test_bad_lists_and_views(prepared, tmp_path):
    folder, split = write_community(tmp_path, sizes=(2, 1)), "lists no (train|val) samples"
    for name, text, message in (
        ("train", "a,NEU\nb,BORED\n", r"train.csv cannot be read .* lines such as 1001_DFA"),
        ("train", "", split),
        ("test", "", split),
    ):
        (folder / f"{name}.csv").write_text(text)
        with pytest.raises(UserError, match=message):
            load(tmp_path)
    for views in ("0", "0,0", "0,12"):
        with pytest.raises(UserError, match="two or more different numbers below 12"):
            load(prepared, "modelnet40", views=views)
    write_prepared(tmp_path, "modelnet40", counts=(12, 11), shape=(32, 32))
    with pytest.raises(UserError, match=r"train_00001 in .* lacks some of its 12 views"):
        load(tmp_path, "modelnet40")
    next(tmp_path.glob("modelnet40/frames/val_00002/*")).unlink()
    with pytest.raises(UserError, match=r"lacks 1 .*: frames/val_00002 has 11 of 12 frames; prep"):
        load(tmp_path, "modelnet40")


@pytest.mark.parametrize(
    "flags",
    [("--views", "0;6"), ("--spectrogram", "mel"), ("--num-frames", "0"), ("--num-workers", "-1")],
)
def test_bad_dials_end_with_usage(flags, capsys):
    dataset = "modelnet40" if "--views" in flags else "crema-d"
    with pytest.raises(SystemExit):
        parse_flags(pmr.SCRIPT, ["--dataset", dataset, *flags])
    assert f"argument {flags[0]}: must be " in capsys.readouterr().err


def test_a_killed_process_is_one_sentence():
    """torch raises it from a signal handler, so wherever the program happens to be."""

    def main():
        raise RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed.")

    with pytest.raises(SystemExit, match=r"ended from outside; .* fewer --num-workers"):
        run_command(main)


# ---- ResNet-18 ----


@pytest.mark.parametrize(("shape", "count"), [((3, 64, 64), 11_176_512), ((1, 65, 47), 11_170_240)])
def test_stages_are_torchvisions_network(shape, count):
    encoder, network = ResNet18(shape[0]), torchvision.models.resnet18()
    network.conv1 = torch.nn.Conv2d(shape[0], 64, 7, stride=2, padding=3, bias=False)
    network.fc = torch.nn.Identity()
    weights = encoder.state_dict().values()
    network.load_state_dict(dict(zip(network.state_dict(), weights, strict=True)))
    assert sum(p.numel() for p in encoder.parameters()) == count and encoder.dim == 512
    maps = x = torch.randn(2, *shape)
    for mode in (True, False):
        encoder.train(mode), network.train(mode)
        torch.testing.assert_close(encoder(x), network(x))
    for stage, channels in zip(encoder.stages, encoder.channels, strict=True):
        maps = stage(maps)
        assert maps.shape[1] == channels


def test_features_are_averaged_over_frames():
    encoder, frames = ResNet18(3).eval(), torch.randn(2, 3, 4, 64, 64)
    expected = torch.stack([encoder(frames[:, :, n]) for n in range(4)]).mean(dim=0)
    torch.testing.assert_close(encoder(frames), expected)
    assert encoder.stages[0](frames).shape == (2, 64, 4, 16, 16)
    torch.testing.assert_close(encoder(frames[:, :, :1]), encoder(frames[:, :, 0]))


@pytest.fixture
def download(monkeypatch):
    """In place of torchvision's weights: a first convolution of twos."""
    original = torchvision.models.resnet18

    def resnet18(weights=None):
        assert weights is torchvision.models.ResNet18_Weights.IMAGENET1K_V1
        network = original()
        torch.nn.init.constant_(network.conv1.weight, 2.0)
        return network

    monkeypatch.setattr(torchvision.models, "resnet18", resnet18)


def test_pretrained_weights(download, monkeypatch):
    for shape, expected in (((3, 1, 32, 32), 2), ((1, 257, 188), 6)):
        assert (build_encoder("ave", shape, pretrained=True).stages[0][0].weight == expected).all()

    def refused(weights=None):
        raise URLError("no route to host")

    monkeypatch.setattr(torchvision.models, "resnet18", refused)
    with pytest.raises(UserError, match=r"cannot be downloaded .*; train from scratch, or put"):
        ResNet18(3, pretrained=True)
    with pytest.raises(UserError, match="no pretrained weights for digits; leave out --pretrained"):
        parse_flags(pmr.SCRIPT, ["--pretrained"])


# ---- The scripts ----


@pytest.fixture
def run(prepared, tmp_path):
    """Run a script for one epoch on a prepared folder; its runs do not stay, for they are large."""

    def call(script, dataset, *argv):
        own = ["--spectrogram", "ogm-ge"] if dataset == "crema-d" else []
        flags = ["--data-root", str(prepared), "--out", str(tmp_path / "runs"), "--device", "cpu"]
        sizes = ["--image-size", "32", "--epochs", "1", "--batch-size", "4", "--num-workers", "0"]
        main = importlib.import_module(script).main
        return main(["--dataset", dataset, *flags, *sizes, *own, *argv])

    yield call
    shutil.rmtree(tmp_path / "runs", ignore_errors=True)


def without_seconds(summary):
    return {key: value for key, value in summary.items() if "seconds" not in key}


def test_pmr_on_clips_with_any_number_of_workers(run, thin_resnet):
    first = run("pmr", "crema-d")
    assert first["method"] == "pmr" and first["rho"] > 0
    assert run("pmr", "crema-d", "--num-workers", "2") == first  # the same run: it is not trained
    again = run("pmr", "crema-d", "--num-workers", "2", "--overwrite")
    assert without_seconds(again) == without_seconds(first)


SHOWN = {"branch", "cut", "u", "probe"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "dataset", "flags", "expected"),
    [
        ("mhm", "crema-d", ["--heads", "2"], {"deployed": [0]}),
        ("greedy_balance", "crema-d", [], {"audio": SHOWN, "visual": SHOWN}),
        ("greedy_balance", "crema-d", ["--duplicate", "visual"], {"visual-2": SHOWN}),
        ("greedy_balance", "modelnet40", ["--views", "0,3,6"], {"view-3": SHOWN, "rear": SHOWN}),
        ("baselines", "modelnet40", ["--method", "ogm-ge"], {}),
        ("baselines", "crema-d", ["--method", "ogm-ge", "--protocol", "ogm-ge"], {}),
        # ResNet-18 itself; without momentum its checkpoints are smaller.
        ("pmr", "crema-d", ["--method", "joint", "--pretrained", "--momentum", "0"], {}),
        ("greedy_balance", "modelnet40", ["--pretrained", "--momentum", "0"], {}),
    ],
)
def test_scripts_on_clips_and_views(run, request, download, script, dataset, flags, expected):
    if "--pretrained" not in flags:
        request.getfixturevalue("thin_resnet")
    summary = run(script, dataset, *flags)
    assert 0 <= summary["test"]["accuracy"] <= 100
    for name, found in expected.items():
        value = summary.get(name) or summary["test"][name].keys()
        assert value == found


@pytest.mark.slow
@pytest.mark.parametrize("dataset", ["crema-d", "modelnet40"])
def test_umt_never_caches_its_targets(run, thin_resnet, dataset, monkeypatch):
    umt_ume, seen = importlib.import_module("umt_ume"), []
    original = umt_ume.Teachers.forward

    def watch(teachers, inputs):
        seen.append(len(inputs))
        return original(teachers, inputs)

    monkeypatch.setattr(umt_ume.Teachers, "forward", watch)
    run("umt_ume", dataset, "--method", "umt", "--epochs", "3")
    assert len(seen) == 3 * 2  # every batch of 8 clips, in every epoch


def test_a_batch_of_one_too_small_for_batchnorm_is_one_sentence(run, thin_resnet):
    flags = ["--method", "joint", "--batch-size", "7"]  # 8 clips: 7 and 1
    with pytest.raises(SystemExit, match=r"of one sample .* choose another --batch-size"):
        run_command(lambda: run("pmr", "modelnet40", *flags))


@pytest.mark.parametrize("write", [write_prepared, write_community])
def test_changed_files_behind_the_same_lists_make_another_run(tmp_path, write):
    folder = write(tmp_path, **({"name": "crema-d"} if write is write_prepared else {}))
    first, names = load(tmp_path), set()
    frame, sound = next(folder.glob("*/t*/*1.jpg")), next(folder.glob("*/t*.wav"))
    (frame.parent / "._0001.jpg").write_bytes(b"left by a Mac")
    (frame.parent / ".DS_Store").write_bytes(b"so is this")
    assert load(tmp_path, data_seed=1).data == first.data
    assert re.fullmatch(r"(fake|lists)-[0-9a-f]{8}", first.data)
    for path in (frame, sound):
        before = path.stat()
        os.utime(path, ns=(0, before.st_mtime_ns + 1))  # as an equal size may hide
        names.add(load(tmp_path).data)
        path.write_bytes(path.read_bytes() + b"0")
        os.utime(path, ns=(0, before.st_mtime_ns + 1))
        names.add(load(tmp_path).data)
    frame.rename(frame.with_name("a.jpg"))
    names.add(load(tmp_path).data)
    (path,) = [path for name in ("clips", "test") for path in folder.glob(f"{name}.csv")]
    path.write_text("\n".join(path.read_text().splitlines()[:-1]))
    names.add(load(tmp_path).data)
    assert len(names | {first.data}) == 7


def test_runs_name_the_folders_content(prepared, run, thin_resnet, tmp_path, capsys):
    run("pmr", "crema-d", "--method", "joint")
    assert "crema-d, MADE-UP DATA: the numbers mean nothing, test split" in capsys.readouterr().out
    (folder,) = (tmp_path / "runs" / "pmr" / "crema-d").iterdir()
    assert f"-data={load(prepared).data}-" in folder.name


EVERY_SCRIPT = ("pmr", "baselines", "umt_ume", "mhm", "greedy_balance")
RELEASED = {"batch_size": 64, "optimizer": "sgd", "lr": 1e-3, "momentum": 0.9}
RELEASED |= {"weight_decay": 1e-4, "schedule": "step-70"}
OGM_GE = {**RELEASED, "epochs": 100, "num_frames": 1, "spectrogram": "ogm-ge"}
PMR = {**RELEASED, "epochs": 130, "num_frames": 4, "spectrogram": "pmr-10s"}


@pytest.mark.parametrize(
    ("script", "dataset", "settings"),
    [
        ("pmr", "crema-d", {"num_frames": 3, "spectrogram": "pmr-3s", "image_size": 224}),
        ("pmr", "crema-d", {"batch_size": 64, "lr": 1e-3, "weight_decay": 1e-4, "alpha": 2}),
        ("pmr", "ave", {"num_frames": 4, "spectrogram": "pmr-10s"}),
        ("greedy_balance", "modelnet40", {"batch_size": 8, "lr": 0.1, "tolerance": 0.01}),
        ("greedy_balance", "modelnet40", {"views": "0,6"}),
        ("greedy_balance", "crema-d", {"num_frames": 1}),
        *((script, name, {}) for script in ("mhm", "umt_ume") for name in FROM_FILES),
        *((script, "crema-d --protocol ogm-ge", OGM_GE) for script in EVERY_SCRIPT),
        *((script, "ave --protocol pmr", PMR) for script in EVERY_SCRIPT),
        ("mhm", "ave --protocol ogm-ge", OGM_GE | {"num_frames": 3, "spectrogram": "pmr-10s"}),
        ("pmr", "crema-d --protocol pmr", PMR | {"num_frames": 3, "spectrogram": "pmr-3s"}),
        ("pmr", "crema-d --protocol pmr", {"per_epochs": 26, "alpha": 2, "image_size": 224}),
        ("mhm", "crema-d --protocol ogm-ge --epochs 8 --lr 1", OGM_GE | {"epochs": 8, "lr": 1}),
    ],
)
def test_the_papers_settings(script, dataset, settings):
    script = importlib.import_module(script).SCRIPT
    args = parse_flags(script, ["--dataset", *dataset.split()])
    Command.fill_in(SimpleNamespace(script=script), args, DATASETS[args.dataset])
    assert {name: getattr(args, name) for name in settings} == settings
