"""data/prepare.py for clips and views: the public lists, fake trees end to end, every bad input."""

import csv
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import wave
from collections import Counter, defaultdict
from itertools import pairwise

import clips
import media
import numpy as np
import prepare
import pytest
import sources
from conftest import DATA_ROOT, ROOT

from common.datasets.files import read_listing
from common.errors import UserError

FORMATS = DATA_ROOT / "formats"
NAMES = ["crema-d", "ave", "vggsound", "modelnet40"]
CLASSES = {"crema-d": 6, "ave": 4, "vggsound": 4, "modelnet40": 4}
ffmpeg = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="there is no program ffmpeg")


def public(name):
    folder = FORMATS / name
    return pytest.mark.skipif(not folder.exists(), reason=f"no {folder}; set DATA_ROOT")


def run(*arguments):
    return prepare.main([str(argument) for argument in arguments])


def read_clips(out):
    with open(out / "clips.csv", newline="") as file:
        return list(csv.DictReader(file))


def read_tree(out):
    """Every file that a loader sees, by its path in the folder."""
    files = [path for path in out.rglob("*") if path.is_file()]
    names = {path.relative_to(out): path for path in files}
    return {
        str(name): path.read_bytes()
        for name, path in names.items()
        if name.parts[0] not in (".prepare", "source")
    }


def problems(out):
    with open(out / "problems.csv", newline="") as file:
        return {row["id"]: row["problem"] for row in csv.DictReader(file)}


@pytest.fixture(scope="session")
def fakes(tmp_path_factory):
    """Every dataset, made up and prepared; tests that change one work on a copy."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("there is no program ffmpeg")
    root = tmp_path_factory.mktemp("fakes")
    for name in NAMES:
        assert run(name, "--fake", 24, "--out", root / name, "--short-side", 64) == 0
    return root


@pytest.fixture
def crema(fakes, tmp_path):
    return shutil.copytree(fakes / "crema-d", tmp_path / "crema-d")


def list_rows(name, *arguments):
    """The listing that a command line asks for, without preparing anything."""
    parser = clips.argparse.ArgumentParser()
    clips.add_parsers(parser.add_subparsers())
    return clips.list_rows(parser.parse_args([name, *map(str, arguments)]))


@pytest.fixture
def empty_clone(tmp_path):
    for name in ("AudioWAV", "VideoFlash"):
        (tmp_path / "clone" / name).mkdir(parents=True)
    return tmp_path / "clone"


@public("crema-d")
def test_public_lists_of_crema_d(empty_clone):
    listing = list_rows("crema-d", "--source", empty_clone, "--splits", FORMATS / "crema-d")
    counts = clips.count_rows(listing.rows, listing.classes)
    assert listing.classes == ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"]
    assert list(counts["test"].values()) == [114, 123, 140, 133, 129, 105]
    both = [a + b for a, b in zip(counts["train"].values(), counts["val"].values(), strict=True)]
    assert both == [973, 1148, 1131, 1138, 1142, 1166]
    assert sum(counts["val"].values()) == 669  # a tenth of the public training list
    assert not listing.notes and not listing.missing
    actors = defaultdict(set)
    for row in listing.rows:
        actors[row.split].add(row.id[:4])
    assert [len(actors[split]) for split in ("train", "test")] == [91, 91]


@public("crema-d")
def test_drawn_splits_of_crema_d(empty_clone):
    names = [
        line.split(",")[0]
        for split in ("train", "test")
        for line in (FORMATS / "crema-d" / f"{split}.csv").read_text().split()
    ]
    for name in names:
        (empty_clone / "AudioWAV" / f"{name}.wav").touch()
    drawn = list_rows("crema-d", "--source", empty_clone).rows
    assert Counter(row.split for row in drawn) == {"train": 6029, "val": 669, "test": 744}
    again = list_rows("crema-d", "--source", empty_clone).rows
    other = list_rows("crema-d", "--source", empty_clone, "--seed", 1).rows
    assert [row.split for row in drawn] == [row.split for row in again]
    assert [row.split for row in drawn] != [row.split for row in other]
    whole = Counter(row.label for row in drawn)
    for label, count in Counter(row.label for row in drawn if row.split == "test").items():
        assert abs(count - whole[label] * 744 / 7442) < 1

    speakers = list_rows("crema-d", "--source", empty_clone, "--split", "speakers").rows
    splits = defaultdict(set)
    for row in speakers:
        splits[row.id[:4]].add(row.split)
    assert len(speakers) == 7442 and all(len(found) == 1 for found in splits.values())
    actors = Counter(next(iter(found)) for found in splits.values())
    assert actors == {"train": 74, "val": 8, "test": 9}
    assert Counter(row.split for row in speakers) == {"train": 6061, "val": 655, "test": 726}


@public("ave-classification")
def test_public_lists_of_ave(tmp_path):
    lists = FORMATS / "ave-classification"
    listing = list_rows("ave", "--source", tmp_path, "--splits", lists)
    assert Counter(row.split for row in listing.rows) == {"train": 3339, "val": 402, "test": 402}
    assert len(listing.classes) == 28
    assert (listing.classes[0], listing.classes[-1]) == ("Church bell", "Mandolin")
    assert len({row.id for row in listing.rows}) == 4143
    groups = {
        split: Counter(row.group for row in listing.rows if row.split == split)
        for split in sources.SPLITS
    }
    assert {split: len(found) for split, found in groups.items()} == {
        "train": 3312,
        "val": 401,
        "test": 402,
    }
    assert len(groups["train"].keys() & groups["test"].keys()) == 8
    assert len(groups["train"].keys() & groups["val"].keys()) == 10
    kinds = Counter(note.split(":")[0] for _, note in listing.notes)
    assert kinds == {"duplicate": 45, "leak": 18, "empty segment": 1}

    clean = list_rows("ave", "--source", tmp_path, "--splits", lists, "--remove-leaks")
    groups = {split: {row.group for row in clean.rows if row.split == split} for split in groups}
    assert not groups["train"] & (groups["val"] | groups["test"])
    assert Counter(row.split for row in clean.rows) == {"train": 3320, "val": 402, "test": 402}
    kinds = Counter(note.split(":")[0] for _, note in clean.notes)
    assert kinds["leak, removed"] == 18


@public("ave")
def test_drawn_splits_of_ave_have_no_leak():
    listing = list_rows("ave", "--source", FORMATS / "ave")
    counts = Counter(row.split for row in listing.rows)
    assert sum(counts.values()) == 4143
    assert abs(counts["val"] - 402) <= 3 and abs(counts["test"] - 402) <= 3
    assert len(sources.remove_leaks(listing.rows)) == 4143
    numbered = {row.id: (row.group, row.label) for row in listing.rows}
    lists = list_rows("ave", "--source", FORMATS, "--splits", FORMATS / "ave-classification")
    assert {row.id: (row.group, row.label) for row in lists.rows} == numbered
    assert lists.classes == listing.classes


@public("modelnet40-views")
@ffmpeg
def test_real_views(tmp_path):
    arguments = ["--source", FORMATS / "modelnet40-views", "--out", tmp_path / "out"]
    assert run("modelnet40", *arguments) == 0
    assert run("modelnet40", "--check", "--out", tmp_path / "out") == 0
    rows = {row["id"]: row for row in read_clips(tmp_path / "out")}
    assert set(rows) == {"airplane_0001", "airplane_0627", "bed_0001", "bed_0516"}
    assert rows["bed_0516"] == {
        "id": "bed_0516",
        "split": "test",
        "label": "1",
        "frames": "12",
        "seconds": "",
    }
    from PIL import Image  # torchvision brings it along

    folder = FORMATS / "modelnet40-views" / "airplane" / "test"
    for view in (0, 6, 11):
        source = Image.open(folder / f"airplane_0627.obj_whiteshaded_v{view:04d}.png")
        stored = Image.open(tmp_path / "out" / "frames" / "airplane_0627" / f"{view + 1:04d}.jpg")
        assert stored.size == (224, 224)
        difference = np.asarray(source.convert("RGB"), float) - np.asarray(stored, float)
        assert np.abs(difference).mean() < 2


@public("crema-d")
@ffmpeg
def test_real_lfs_pointers(empty_clone, tmp_path, capsys):
    pointer = next((FORMATS / "crema-d").glob("lfs-pointer-*"))
    shutil.copy(pointer, empty_clone / "AudioWAV" / "1001_DFA_ANG_XX.wav")
    shutil.copy(pointer, empty_clone / "VideoFlash" / "1001_DFA_ANG_XX.flv")
    assert run("crema-d", "--source", empty_clone, "--out", tmp_path / "out") == 1
    error = capsys.readouterr().err
    assert "none of the 1 clips can be read" in error and "git lfs pull" in error


@pytest.mark.parametrize("name", NAMES)
def test_fake_end_to_end(name, fakes, capsys):
    out, views = fakes / name, name == "modelnet40"
    manifest = json.loads((out / "manifest.json").read_text())
    rule = "stratified" if name in ("crema-d", "ave") else "source"
    assert manifest["options"]["split"] == rule
    assert (manifest["dataset"], manifest["format"], manifest["fake"]) == (name, 1, True)
    rates = {"crema-d": 4.0, "ave": 1.0, "vggsound": 1.0, "modelnet40": None}
    assert manifest["options"]["fps"] == rates[name]
    assert manifest["options"]["sample_rate"] == (None if views else 16000)
    assert manifest["options"]["short_side"] == 64
    assert len(manifest["classes"]) == CLASSES[name]
    assert "FAKE.txt" in {path.name for path in (out / "source").iterdir()}
    rows = read_clips(out)
    assert list(rows[0]) == ["id", "split", "label", "frames", "seconds"] and len(rows) == 24
    for split, counts in manifest["counts"].items():
        found = Counter(int(row["label"]) for row in rows if row["split"] == split)
        assert sum(counts.values()) > 0
        assert counts == {c: found[i] for i, c in enumerate(manifest["classes"])}
    for row in rows:
        frames = sorted(path.name for path in (out / "frames" / row["id"]).iterdir())
        assert frames == [f"{n:04d}.jpg" for n in range(1, int(row["frames"]) + 1)]
        assert len(frames) == {"crema-d": 8, "modelnet40": 12}.get(name, 2)
        if views:
            assert row["seconds"] == "" and not (out / "audio").exists()
        else:
            with wave.open(str(out / "audio" / f"{row['id']}.wav")) as file:
                form = (file.getframerate(), file.getnchannels(), file.getsampwidth())
                assert form == (16000, 1, 2)
                assert abs(file.getnframes() / 16000 - float(row["seconds"])) < 1e-3
            assert abs(float(row["seconds"]) - 2) < 0.2
    assert run(name, "--check", "--out", out) == 0
    assert "all 24 clips" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(
    ("script", "method"),
    [("pmr", "pmr"), ("greedy_balance", "guided"), ("umt_ume", "umt"), ("mhm", "mhm")],
)
def test_every_script_trains_on_every_fake(script, method, name, fakes, tmp_path):
    shutil.copytree(fakes / name, tmp_path / name)  # a script leaves its cache there
    flags = ["--dataset", name, "--data-root", str(tmp_path), "--out", str(tmp_path / "runs")]
    flags += ["--epochs", "1", "--batch-size", "8", "--image-size", "64", "--lr", "1e-4"]
    flags += ["--num-workers", "0", "--device", "cpu", "--method", method, "--train-samples", "16"]
    summary = importlib.import_module(script).main(flags)
    assert summary["method"] == method and 0 <= summary["test"]["accuracy"] <= 100
    assert list(tmp_path.glob(f"runs/{script}/{name}/{method}-*/last.pt"))


@ffmpeg
def test_two_files_of_one_clip_are_reported(fakes, tmp_path, capsys):
    source = shutil.copytree(fakes / "vggsound" / "source", tmp_path / "source")
    clip = sorted(source.rglob("*.mp4"))[0]
    (source / "aaa").mkdir()
    shutil.copy(clip, source / "aaa")
    assert run("vggsound", "--source", source, "--out", tmp_path / "out", "--short-side", 64) == 0
    found = (tmp_path / "out" / "problems.csv").read_text()
    assert f"duplicate: 2 files of that name, {source / 'aaa' / clip.name} is used" in found


@pytest.mark.parametrize("name", NAMES)
def test_class_can_be_learned_from_the_fake(name, fakes):
    """The nearest class mean of the other clips is right far more often than chance."""
    from PIL import Image

    features, labels = [], []
    for row in read_clips(fakes / name):
        image = Image.open(fakes / name / "frames" / row["id"] / "0001.jpg")
        features.append(np.asarray(image.convert("RGB").resize((8, 8)), float).ravel())
        labels.append(int(row["label"]))
    features, labels = np.stack(features), np.array(labels)
    right = 0
    for held_out in range(len(labels)):
        rest = np.arange(len(labels)) != held_out
        means = [features[rest & (labels == label)].mean(0) for label in range(labels.max() + 1)]
        right += (
            np.argmin([np.linalg.norm(features[held_out] - m) for m in means]) == labels[held_out]
        )
    assert right / len(labels) > 2 / CLASSES[name]


def test_pitch_of_the_fake_tells_the_class(fakes):
    pitches = defaultdict(list)
    for row in read_clips(fakes / "ave"):
        samples = media.read_samples(fakes / "ave" / "audio" / f"{row['id']}.wav")[:16000]
        pitches[row["label"]].append(np.abs(np.fft.rfft(samples)).argmax())
    means = [np.median(pitches[label]) for label in sorted(pitches)]
    assert all(low * 1.2 < high for low, high in pairwise(means))


@ffmpeg
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_started_again(end, fakes, tmp_path):
    """Ended once some clips are finished; the result equals that of the uninterrupted run."""
    out = tmp_path / "out"
    arguments = ["crema-d", "--source", fakes / "crema-d" / "source", "--out", out]
    arguments += ["--short-side", 64, "--workers", 1]
    command = [sys.executable, ROOT / "data" / "prepare.py", *arguments]
    process = subprocess.Popen(list(map(str, command)), stderr=subprocess.PIPE, text=True)
    journal = out / ".prepare" / "done.jsonl"
    while not journal.exists() or journal.read_text().count("\n") < 3:
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(end)
    error = process.communicate(timeout=60)[1]
    assert process.returncode == (-9 if end == signal.SIGKILL else 1)
    if end == signal.SIGINT:
        assert "interrupted" in error and "are kept" in error and error.count("\n") == 1
    assert not (out / "manifest.json").exists() and not (out / "clips.csv").exists()
    assert run("crema-d", "--check", "--out", out) == 1
    with open(journal, "a") as file:
        file.write('{"id": "9000')  # a line that was cut as well
    kept = {line["id"] for line in map(json.loads, journal.read_text().splitlines()[:-1])}
    times = {name: (out / "audio" / f"{name}.wav").stat().st_mtime_ns for name in kept}
    assert len(kept) < 24
    assert run(*arguments) == 0
    for name, before in times.items():
        assert (out / "audio" / f"{name}.wav").stat().st_mtime_ns == before
    assert read_tree(out) == read_tree(fakes / "crema-d")


def break_clip(source, kind):
    """Spoils one clip of a fake CREMA-D; returns its id."""
    sound = sorted((source / "AudioWAV").iterdir())[0]
    pictures = source / "VideoFlash" / f"{sound.stem}.flv"
    if kind == "missing":
        pictures.unlink()
    elif kind == "empty":
        pictures.write_bytes(b"")
    elif kind == "pointer":
        sound.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    elif kind == "garbage":
        pictures.write_bytes(b"<html>not a film</html>" * 100)
    elif kind in ("half sound", "half pictures"):
        path = sound if kind == "half sound" else pictures
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2 + 1])
    elif kind == "no pictures":
        shutil.copy(sound, pictures)
    elif kind == "silent":
        with wave.open(str(sound), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(b"\0\0" * 32000)
    elif kind == "header":  # a header and nothing else
        pictures.write_bytes(pictures.read_bytes()[:13])
    return sound.stem


@ffmpeg
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("missing", "missing: no file"),
        ("empty", "empty: "),
        ("pointer", "git lfs pull"),
        ("garbage", "unreadable: "),
        ("half sound", "truncated: "),
        ("half pictures", "truncated: "),
        ("no pictures", "no pictures"),
        ("header", "unreadable: "),
    ],
)
def test_a_bad_clip_is_reported(kind, words, crema, capsys):
    name = break_clip(crema / "source", kind)
    arguments = ["crema-d", "--source", crema / "source", "--out", crema, "--short-side", 64]
    assert run(*arguments) == 1
    output = capsys.readouterr()
    assert words in problems(crema)[name]
    assert "1 of 24 clips are missing or damaged" in output.err and output.err.count("\n") == 1
    assert "--allow-missing" in output.err and name in output.out
    assert not (crema / "manifest.json").exists() and (crema / "frames" / name).exists()

    assert run(*arguments, "--allow-missing") == 0
    assert name not in {row["id"] for row in read_clips(crema)} and len(read_clips(crema)) == 23
    manifest = json.loads((crema / "manifest.json").read_text())
    assert sum(sum(counts.values()) for counts in manifest["counts"].values()) == 23
    assert run("crema-d", "--check", "--out", crema) == 0


@ffmpeg
def test_a_silent_clip_is_kept_and_reported_even_after_a_restart(crema, capsys):
    name = break_clip(crema / "source", "silent")
    arguments = ["crema-d", "--source", crema / "source", "--out", crema, "--short-side", 64]
    for _ in range(2):
        assert run(*arguments) == 0
        assert problems(crema)[name].startswith("silent: ")
        assert "silent (1)" in capsys.readouterr().out
    assert len(read_clips(crema)) == 24


@ffmpeg
def test_short_clips_and_the_frame_rate(crema):
    """A clip of 0.3 s has one frame at 1 per second, two at 4; 2 s have 10 at 5 per second."""
    source = crema / "source"
    name = sorted((source / "AudioWAV").iterdir())[0].stem
    for path in (source / "VideoFlash" / f"{name}.flv", source / "AudioWAV" / f"{name}.wav"):
        long = path.rename(path.with_name("long" + path.suffix))
        media.run_ffmpeg(["-i", str(long), "-t", "0.3", str(path)], source)
        long.unlink()
    out = crema.parent / "out"
    arguments = ["crema-d", "--source", source, "--out", out, "--short-side", 32]
    assert run(*arguments) == 0
    row = next(row for row in read_clips(out) if row["id"] == name)
    assert row["frames"] == "2"
    assert run(*arguments[:3], "--out", crema.parent / "slow", "--fps", 1) == 0
    row = next(row for row in read_clips(crema.parent / "slow") if row["id"] == name)
    assert row["frames"] == "1" and abs(float(row["seconds"]) - 0.3) < 0.05
    other = "9001_IEO_SAD_XX"
    inputs = [source / "VideoFlash" / f"{other}.flv", source / "AudioWAV" / f"{other}.wav"]
    frames, _, _ = media.extract_clip(inputs, None, crema.parent / "work", fps=5, short=32)
    assert frames == 10


@ffmpeg
def test_ave_segment_is_cut_out_and_repeated_ids_are_kept(fakes, tmp_path, capsys):
    source = shutil.copytree(fakes / "ave" / "source", tmp_path / "source")
    lists = {
        "train": "Bark&fake0000002&good&0&1\nGoat&fake0000002&good&0&1\n",
        "val": "Goat&fake0000003&good&1&1\nGoat&fake0000003&good&1&1\n",
        "test": "Bark&fake0000004&good&0&2\nGoat&fake0000002&good&1&2\n",
    }
    for split, text in lists.items():
        (tmp_path / f"{split}Set.txt").write_text(text)
    arguments = ["ave", "--source", source, "--splits", tmp_path, "--short-side", 64]
    assert run(*arguments, "--out", tmp_path / "out") == 0
    rows = {row["id"]: (row["split"], row["label"]) for row in read_clips(tmp_path / "out")}
    assert rows == {
        "fake0000002": ("train", "0"),
        "fake0000002.2": ("train", "1"),
        "fake0000002.3": ("test", "1"),
        "fake0000003": ("val", "1"),
        "fake0000004": ("test", "0"),
    }
    seconds = {row["id"]: float(row["seconds"]) for row in read_clips(tmp_path / "out")}
    assert abs(seconds["fake0000002"] - 1) < 0.1 and abs(seconds["fake0000003"] - 2) < 0.1
    first, last = (
        media.read_samples(tmp_path / "out" / "audio" / f"fake0000002{end}.wav")[:8000]
        for end in ("", ".3")
    )
    assert not np.array_equal(first, last)
    report = capsys.readouterr().out
    for kind in ("duplicate (2)", "leak (1)", "empty segment (2)"):
        assert kind in report

    assert run(*arguments, "--out", tmp_path / "clean", "--remove-leaks") == 0
    assert "leak, removed (1)" in capsys.readouterr().out
    clean = {row["id"]: row["split"] for row in read_clips(tmp_path / "clean")}
    assert clean == {"fake0000002.3": "test", "fake0000003": "val", "fake0000004": "test"}

    (tmp_path / "valSet.txt").write_text("Goat&fake0000003&good&5&9\nGoat&fake0000005&good&0&9\n")
    assert run(*arguments, "--out", tmp_path / "past", "--allow-missing") == 0
    assert problems(tmp_path / "past")["fake0000003"].startswith("no frames: ")
    assert problems(tmp_path / "past")["fake0000005"].startswith("short: the file has 2.0 s")


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        ("frame gone", "files, not 0001.jpg to 0008"),
        ("frame cut", "not a whole JPEG"),
        ("frame garbled", "not a whole JPEG"),
        ("sound gone", "missing: no file"),
        ("sound cut", "samples"),
        ("sound short", "s, not"),
        ("counts", "counts"),
        ("id twice", "an id is there twice"),
    ],
)
def test_check_finds_damage(damage, words, crema, capsys):
    row = read_clips(crema)[5]
    frame = crema / "frames" / row["id"] / "0002.jpg"
    sound = crema / "audio" / f"{row['id']}.wav"
    if damage == "frame gone":
        frame.unlink()
    elif damage == "frame cut":
        frame.write_bytes(frame.read_bytes()[:-10])
    elif damage == "frame garbled":
        frame.write_bytes(b"\xff\xd8" + bytes(100) + b"\xff\xd9")
    elif damage == "sound gone":
        sound.unlink()
    elif damage == "sound cut":
        sound.write_bytes(sound.read_bytes()[:-1000])
    elif damage == "sound short":
        with wave.open(str(sound), "wb") as file:
            file.setparams((1, 2, 16000, 0, "NONE", ""))
            file.writeframes(b"\1\1" * 16000)
    elif damage == "counts":
        manifest = json.loads((crema / "manifest.json").read_text())
        manifest["counts"]["train"]["NEU"] += 1
        (crema / "manifest.json").write_text(json.dumps(manifest))
    else:
        with open(crema / "clips.csv", "a") as file:
            file.write((crema / "clips.csv").read_text().splitlines()[-1] + "\n")
    assert run("crema-d", "--check", "--out", crema) == 1
    output = capsys.readouterr()
    assert words in output.out and "1 problems" in output.err and "again" in output.err


@ffmpeg
def test_running_again_repairs_damage(crema, fakes):
    gone, garbled = (crema / "frames" / row["id"] / "0002.jpg" for row in read_clips(crema)[5:7])
    gone.unlink()
    garbled.write_bytes(b"\xff\xd8" + bytes(100) + b"\xff\xd9")
    arguments = ["crema-d", "--source", crema / "source", "--out", crema, "--short-side", 64]
    assert run(*arguments) == 0
    assert read_tree(crema) == read_tree(fakes / "crema-d")


@ffmpeg
def test_a_clip_is_made_anew_if_its_source_changed_and_the_cache_goes(crema):
    arguments = ["crema-d", "--source", crema / "source", "--out", crema, "--short-side", 64]
    (crema / "cache").mkdir()
    assert run(*arguments) == 0 and (crema / "cache").exists()
    frames = {path: path.stat().st_mtime_ns for path in crema.glob("frames/*/0001.jpg")}
    changed = crema / "source" / "VideoFlash" / "9001_IEO_SAD_XX.flv"
    shutil.copy(crema / "source" / "VideoFlash" / "9001_IEO_ANG_XX.flv", changed)
    assert run(*arguments) == 0 and not (crema / "cache").exists()
    remade = {path for path, before in frames.items() if path.stat().st_mtime_ns != before}
    assert {path.parent.name for path in remade} == {changed.stem}
    folder = crema / "frames"
    first, other = (folder / f"9001_IEO_{name}_XX" / "0001.jpg" for name in ("SAD", "ANG"))
    assert first.read_bytes() == other.read_bytes()


@ffmpeg
def test_a_clip_is_made_anew_if_its_segment_changed(fakes, tmp_path):
    def prepare_segment(segment):
        for number, split in enumerate(sources.SPLITS):
            (tmp_path / f"{split}Set.txt").write_text(f"Bark&fake000000{number}&good&{segment}\n")
        arguments = ["--source", fakes / "ave" / "source", "--splits", tmp_path]
        assert run("ave", *arguments, "--out", tmp_path / "out", "--short-side", 32) == 0
        return (tmp_path / "out" / "audio" / "fake0000000.wav").read_bytes()

    assert prepare_segment("0&1") != prepare_segment("1&2")


@ffmpeg
def test_two_preparations_at_a_time(crema, capsys):
    pytest.importorskip("fcntl")
    before = read_tree(crema)
    with clips.locked(crema):
        assert run("crema-d", "--fake", 24, "--out", crema) == 1
    error = capsys.readouterr().err
    assert f"another preparation is running in {crema}" in error and error.count("\n") == 1
    assert read_tree(crema) == before


@ffmpeg
def test_a_source_file_that_may_not_be_read(crema, monkeypatch, capsys):
    def refuse(path, mode):
        if path.suffix == ".flv" and "SAD" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    monkeypatch.setattr(media, "open", refuse, raising=False)
    arguments = ["crema-d", "--source", crema / "source", "--out", crema, "--short-side", 64]
    assert run(*arguments) == 1
    assert "4 of 24 clips are missing or damaged" in capsys.readouterr().err
    assert all("unreadable: [Errno 13]" in problem for problem in problems(crema).values())


@ffmpeg
def test_damage_of_what_tells_the_finished_clips(crema, fakes, capsys):
    arguments = ["crema-d", "--source", crema / "source", "--out", crema]
    hidden = crema / ".prepare"
    for name, text in [
        ("media.json", ""),
        ("media.json", "[1]"),
        ("media.json", '{"dataset": "crema-d"}'),
        ("done.jsonl", "[1]\n"),
        ("done.jsonl", '{"id": "9000_IEO_SAD_XX"}\n'),
    ]:
        before = (hidden / name).read_text()
        (hidden / name).write_text(text)
        assert run(*arguments, "--short-side", 64) == 1
        error = capsys.readouterr().err
        assert f"{hidden / name} is damaged: delete {hidden} and" in error
        assert error.count("\n") == 1
        (hidden / name).write_text(before)
    shutil.rmtree(hidden)
    assert run(*arguments, "--short-side", 32) == 1
    assert "was begun with short_side 64" in capsys.readouterr().err
    assert run(*arguments, "--short-side", 64) == 0
    assert read_tree(crema) == read_tree(fakes / "crema-d")


def test_a_split_that_the_loader_does_not_know(crema):
    text = (crema / "clips.csv").read_text()
    (crema / "clips.csv").write_text(text.replace(",train,", ",trian,", 1))
    with pytest.raises(UserError, match=r"damaged .*no split is called trian"):
        read_listing(crema, "crema-d")


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"dataset": "crema-d"'])
def test_check_of_a_damaged_manifest(text, crema, capsys):
    (crema / "manifest.json").write_text(text)
    assert run("crema-d", "--check", "--out", crema) == 1
    assert "damaged" in capsys.readouterr().err


def test_check_of_another_dataset(fakes, capsys):
    assert run("ave", "--check", "--out", fakes / "vggsound") == 1
    assert "holds no ave" in capsys.readouterr().err


def test_other_options_are_refused(crema, capsys):
    arguments = ["crema-d", "--source", crema / "source", "--out", crema]
    before = read_tree(crema)
    assert run(*arguments) == 1
    assert "was begun with short_side 64" in capsys.readouterr().err
    assert read_tree(crema) == before


def test_another_split_keeps_the_files(crema):
    arguments = ["crema-d", "--source", crema / "source", "--out", crema, "--short-side", 64]
    before = {path: path.stat().st_mtime_ns for path in crema.rglob("*.jpg")}
    assert run(*arguments, "--split", "speakers") == 0
    assert {path: path.stat().st_mtime_ns for path in crema.rglob("*.jpg")} == before
    assert json.loads((crema / "manifest.json").read_text())["options"]["split"] == "speakers"
    splits = defaultdict(set)
    for row in read_clips(crema):
        splits[row["id"][:4]].add(row["split"])
    assert all(len(found) == 1 for found in splits.values())


def test_no_ffmpeg(fakes, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("PATH", str(tmp_path))
    arguments = ["--source", fakes / "ave" / "source", "--out", tmp_path / "out"]
    assert run("ave", *arguments) == 1
    error = capsys.readouterr().err
    assert "apt-get install ffmpeg" in error and "brew install ffmpeg" in error
    assert not (tmp_path / "out").exists()
    assert run("ave", "--check", "--out", fakes / "ave") == 0  # needs none


def test_full_disk(fakes, tmp_path, monkeypatch, capsys):
    """An ffmpeg that meets a full disk at once, as the real one would say it."""
    program = tmp_path / "bin" / "ffmpeg"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho '[error] No space left on device' >&2\nexit 1\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    arguments = ["--source", fakes / "ave" / "source", "--out", tmp_path / "out"]
    assert run("ave", *arguments) == 1
    error = capsys.readouterr().err
    assert "is full" in error and "are kept" in error and error.count("\n") == 1
    assert not (tmp_path / "out" / "manifest.json").exists()


@ffmpeg
def test_disk_too_small_is_found_by_the_estimate(fakes, tmp_path, monkeypatch, capsys):
    usage = clips.shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(clips.shutil, "disk_usage", lambda path: usage)
    arguments = ["--source", fakes / "ave" / "source", "--out", tmp_path / "out"]
    assert run("ave", *arguments) == 1
    output = capsys.readouterr()
    assert "0.1 MB free" in output.err and "--short-side" in output.err
    assert "24 clips to prepare take about" in output.out
    assert len(list((tmp_path / "out" / "audio").iterdir())) == clips.SAMPLE_CLIPS


@pytest.mark.parametrize(
    ("name", "files", "words"),
    [
        ("crema-d", {}, "no folders AudioWAV and VideoFlash"),
        ("ave", {}, "Annotations.txt"),
        ("ave", {"Annotations.txt": "Bark&x&good&0\n"}, "line 1: not of the form Category&"),
        ("ave", {"Annotations.txt": "Bark&x&good&0&ten\n"}, "line 1: not of the form"),
        ("ave", {"Annotations.txt": ""}, "lists no clip"),
        ("ave", {"Annotations.txt": "Bark&x&good&0&10\n"}, "missing: no file"),
        ("vggsound", {}, "vggsound.csv"),
        ("vggsound", {"vggsound.csv": "x,1,dog\n"}, "line 1: not of the form video,start"),
        ("vggsound", {"vggsound.csv": "x,1,dog,validate\n"}, "line 1: not of the form"),
        ("modelnet40", {}, "no <class>/train"),
        ("modelnet40", {"bed/train/bed_0001_001.png": ""}, "12 PNG views"),
    ],
)
@ffmpeg
def test_bad_source(name, files, words, tmp_path, capsys):
    (tmp_path / "source").mkdir()
    for path, text in files.items():
        (tmp_path / "source" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "source" / path).write_text(text)
    assert run(name, "--source", tmp_path / "source", "--out", tmp_path / "out") == 1
    output = capsys.readouterr()
    assert words in output.err and output.err.count("\n") == 1
    assert [path.name for path in (tmp_path / "out").rglob("*")] == [".prepare", "lock"]


@ffmpeg
def test_bad_lists_and_few_speakers(empty_clone, tmp_path, capsys):
    arguments = ["crema-d", "--source", empty_clone, "--out", tmp_path / "out"]
    assert run(*arguments, "--splits", tmp_path / "gone") == 1
    assert "CLIP,LABEL" in capsys.readouterr().err
    (empty_clone / "AudioWAV" / "1001_DFA_ANG_XX.wav").touch()
    assert run(*arguments, "--split", "speakers") == 1
    assert "needs 3 actors or more, the source has 1" in capsys.readouterr().err
    (empty_clone / "AudioWAV" / "notes.wav").touch()
    listing = list_rows("crema-d", "--source", empty_clone)
    assert len(listing.rows) == 1 and listing.missing[0][1].startswith("unknown label")


@pytest.mark.parametrize("clip", ["../victim", "a/b", "/victim", ".."])
def test_a_name_that_leads_elsewhere_is_a_problem(clip, empty_clone):
    (empty_clone / "train.csv").write_text(f"{clip},ANG\n,SAD\n1001_DFA_ANG_XX,ANG\n")
    (empty_clone / "test.csv").touch()
    (empty_clone / "Annotations.txt").write_text(f"Bark&{clip}&good&0&1\nBark&&good&0&1\n")
    (empty_clone / "vggsound.csv").write_text(f"{clip}/,1,dog,train\n")
    listing = list_rows("crema-d", "--source", empty_clone, "--splits", empty_clone)
    assert [row.id for row in listing.rows] == ["1001_DFA_ANG_XX"]
    assert [name for name, _ in listing.missing] == [clip, ""]
    assert listing.missing[0][1] == f"unknown name: {clip!r} cannot name a file"
    for name, count in (("ave", 2), ("vggsound", 1)):
        listing = list_rows(name, "--source", empty_clone)
        assert listing.rows == [] and len(listing.missing) == count


@ffmpeg
def test_a_view_that_is_missing_or_cut(fakes, tmp_path, capsys):
    source = shutil.copytree(fakes / "modelnet40" / "source", tmp_path / "source")
    (source / "airplane" / "train" / "airplane_0000.obj_whiteshaded_v0003.png").unlink()
    cut = source / "bed" / "train" / "bed_0001.obj_whiteshaded_v0003.png"
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size // 2])
    arguments = ["modelnet40", "--source", source, "--out", tmp_path / "out"]
    assert run(*arguments) == 1
    assert "2 of 24 clips" in capsys.readouterr().err
    assert "11 of 12 views" in problems(tmp_path / "out")["airplane_0000"]
    assert problems(tmp_path / "out")["bed_0001"].startswith("unreadable: ")


@ffmpeg
def test_fake_does_not_replace_a_real_source(tmp_path, capsys):
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "real.mp4").write_bytes(b"x")
    assert run("ave", "--fake", 24, "--out", tmp_path) == 1
    assert "not a fake" in capsys.readouterr().err
    assert (tmp_path / "source" / "real.mp4").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ["ave"],
        ["ave", "--check", "--fake", "24"],
        ["ave", "--check", "--splits", "x"],
        ["vggsound", "--check", "--seed", "1", "--fps", "2"],
        ["ave", "--fake", "3"],
        ["ave", "--source", "x", "--fps", "0"],
        ["modelnet40", "--source", "x", "--fps", "2"],
        ["crema-d", "--source", "x", "--splits", "y", "--split", "speakers"],
    ],
)
def test_wrong_usage(arguments, capsys):
    with pytest.raises(SystemExit) as error:
        prepare.main(arguments)
    assert error.value.code == 2
    assert "error: " in capsys.readouterr().err
