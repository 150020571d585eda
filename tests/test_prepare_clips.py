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
import fake
import folder as prepared_folder
import media
import numpy as np
import prepare
import pytest
import sources
import torch
from conftest import DATA_ROOT, ROOT
from fake_clips import FROM_FILES, write_wav
from PIL import Image

from common.datasets import load_dataset

FORMATS = DATA_ROOT / "formats"
SMALL = ("--short-side", 32)
GARBLED = b"\xff\xd8" + bytes(100) + b"\xff\xd9"
needs_ffmpeg = pytest.mark.skipif(not shutil.which("ffmpeg"), reason="there is no program ffmpeg")


def public(name):
    folder = FORMATS / name
    return pytest.mark.skipif(not folder.exists(), reason=f"no {folder}; set DATA_ROOT")


def run(*arguments):
    return prepare.main([str(argument) for argument in arguments])


def read_csv(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def problems(out):
    return {row["id"]: row["problem"] for row in read_csv(out / "problems.csv")}


def read_tree(out):
    """Every file that a loader sees, by its path in the folder."""
    names = {path.relative_to(out): path for path in out.rglob("*") if path.is_file()}
    hidden = (".prepare", "source")
    return {name: path.read_bytes() for name, path in names.items() if name.parts[0] not in hidden}


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """(dataset, count) -> a folder with so many made-up clips, prepared; not to be changed."""
    if shutil.which("ffmpeg") is None:
        pytest.skip("there is no program ffmpeg")
    root = tmp_path_factory.mktemp("fakes")

    def make(name, count):
        out = root / str(count) / name
        if not out.exists():
            origin = ["--fake", count]
            if count < 24:  # fewer than the command line makes
                origin = ["--source", fake.write_fake(name, count, out / "source")]
            assert run(name, *origin, "--out", out, *SMALL) == 0
        return out

    return make


@pytest.fixture
def crema(made, tmp_path):
    """A copy of six clips of CREMA-D, one of each class, to be damaged."""
    return shutil.copytree(made("crema-d", 6), tmp_path / "crema-d")


def again(out, *more):
    """To prepare a folder of CREMA-D from the source in it."""
    return ["crema-d", "--source", out / "source", "--out", out, *SMALL, *more]


@pytest.fixture
def refused(capsys):
    """Run a command that fails with all of the words in one line on stderr; returns its stdout."""

    def check(arguments, *words):
        capsys.readouterr()
        assert run(*arguments) == 1
        output = capsys.readouterr()
        assert output.err.count("\n") == 1 and [w for w in words if w not in output.err] == []
        return output.out

    return check


# ---- The public lists ----


def list_rows(name, *arguments):
    """The listing that a command line asks for with its splits, as if all its files were there."""
    parser = clips.argparse.ArgumentParser()
    clips.add_parsers(parser.add_subparsers())
    args = parser.parse_args([name, "--source", *map(str, arguments)])
    listing = clips.list_rows(args)
    clips.split_rows(args, listing, listing.rows)
    return listing


def sizes(rows):
    return dict(Counter(row.split for row in rows))


@pytest.fixture
def clone(tmp_path):
    """An empty clone of CREMA-D."""
    for name in ("AudioWAV", "VideoFlash"):
        (tmp_path / "clone" / name).mkdir(parents=True)
    return tmp_path / "clone"


@public("crema-d")
def test_public_lists_of_crema_d(clone):
    listing = list_rows("crema-d", clone, "--splits", FORMATS / "crema-d")
    counts = clips.count_rows(listing.rows, listing.classes)
    assert listing.classes == ["NEU", "HAP", "SAD", "FEA", "DIS", "ANG"]
    assert list(counts["test"].values()) == [114, 123, 140, 133, 129, 105]
    both = [a + b for a, b in zip(counts["train"].values(), counts["val"].values(), strict=True)]
    assert both == [973, 1148, 1131, 1138, 1142, 1166]
    assert sum(counts["val"].values()) == 669  # a tenth of the public training list
    assert not listing.notes and not listing.missing
    actors = {(row.split, row.id[:4]) for row in listing.rows if row.split != "val"}
    assert Counter(split for split, _ in actors) == {"train": 91, "test": 91}


@pytest.mark.slow
@public("crema-d")
def test_drawn_splits_of_crema_d(clone):
    for split in ("train", "test"):
        for line in (FORMATS / "crema-d" / f"{split}.csv").read_text().split():
            (clone / "AudioWAV" / f"{line.split(',')[0]}.wav").touch()
    drawn, same, other = (list_rows("crema-d", clone, "--seed", seed).rows for seed in (0, 0, 1))
    assert sizes(drawn) == {"train": 6029, "val": 669, "test": 744}
    splits, same, other = ([row.split for row in rows] for rows in (drawn, same, other))
    assert splits == same != other
    whole = Counter(row.label for row in drawn)
    for label, count in Counter(row.label for row in drawn if row.split == "test").items():
        assert abs(count - whole[label] * 744 / 7442) < 1
    speakers = list_rows("crema-d", clone, "--split", "speakers").rows
    assert sizes(speakers) == {"train": 6061, "val": 655, "test": 726}
    actors = {(row.split, row.id[:4]) for row in speakers}
    assert Counter(split for split, _ in actors) == {"train": 74, "val": 8, "test": 9}
    assert len({actor for _, actor in actors}) == 91


@public("ave-classification")
def test_public_lists_of_ave(tmp_path):
    def read(*arguments):
        listing = list_rows("ave", tmp_path, "--splits", FORMATS / "ave-classification", *arguments)
        groups = defaultdict(set)
        for row in listing.rows:
            groups[row.split].add(row.group)
        return listing, groups, Counter(note.split(":")[0] for _, note in listing.notes)

    listing, groups, kinds = read()
    assert sizes(listing.rows) == {"train": 3339, "val": 402, "test": 402}
    assert len(listing.classes) == 28
    assert (listing.classes[0], listing.classes[-1]) == ("Church bell", "Mandolin")
    assert len({row.id for row in listing.rows}) == 4143
    assert [len(groups[split]) for split in sources.SPLITS] == [3312, 401, 402]
    assert len(groups["train"] & groups["test"]) == 8
    assert len(groups["train"] & groups["val"]) == 10
    assert kinds == {"duplicate": 45, "leak": 18, "empty segment": 1}
    clean, groups, kinds = read("--remove-leaks")
    assert not groups["train"] & (groups["val"] | groups["test"])
    assert sizes(clean.rows) == {"train": 3320, "val": 402, "test": 402}
    assert kinds["leak, removed"] == 18


def test_classes_of_ave_are_in_the_order_of_the_test_list(tmp_path):
    lists = {
        "train": "Horn Bark Accordion Train",
        "val": "Train Horn",
        "test": "Bark Horn Train Bark",
    }
    for split, labels in lists.items():
        lines = [f"{label}&{split}{i}&good&0&10\n" for i, label in enumerate(labels.split())]
        (tmp_path / f"{split}Set.txt").write_text("".join(lines))
    assert sources.read_ave(tmp_path, tmp_path).classes == ["Bark", "Horn", "Train", "Accordion"]


@public("ave")
def test_drawn_splits_of_ave_have_no_leak():
    listing = list_rows("ave", FORMATS / "ave")
    counts = sizes(listing.rows)
    assert sum(counts.values()) == len(sources.remove_leaks(listing.rows)) == 4143
    assert abs(counts["val"] - 402) <= 3 and abs(counts["test"] - 402) <= 3
    lists = list_rows("ave", FORMATS, "--splits", FORMATS / "ave-classification")
    numbered, same = (
        {row.id: (row.group, row.label) for row in found.rows} for found in (listing, lists)
    )
    assert numbered == same and lists.classes == listing.classes


@public("modelnet40-views")
@needs_ffmpeg
def test_real_views_are_prepared_and_loaded(tmp_path):
    source, out = FORMATS / "modelnet40-views", tmp_path / "modelnet40"
    assert run("modelnet40", "--source", source, "--out", out) == 0
    assert run("modelnet40", "--check", "--out", out) == 0
    rows = {row.pop("id"): row for row in read_csv(out / "clips.csv")}
    assert rows.keys() == {"airplane_0001", "airplane_0627", "bed_0001", "bed_0516"}
    assert rows["bed_0516"] == {"split": "test", "label": "1", "frames": "12", "seconds": ""}

    def original(view):
        name = f"airplane_0627.obj_whiteshaded_v{view:04d}.png"
        return source / "airplane" / "test" / name

    for view in range(12):  # without loss
        stored = out / "frames" / "airplane_0627" / f"{view + 1:04d}.png"
        assert stored.read_bytes() == original(view).read_bytes()
    splits = load_dataset("modelnet40", tmp_path)
    assert splits.shapes == {"front": (3, 224, 224), "rear": (3, 224, 224)}
    inputs, labels, _ = next(splits.test.batches(2))
    for view, name in ((0, "front"), (6, "rear")):
        image = inputs[name][labels.tolist().index(0)].permute(1, 2, 0)
        shown = (image * torch.tensor([0.229, 0.224, 0.225])) + torch.tensor([0.485, 0.456, 0.406])
        picture = torch.from_numpy(np.array(Image.open(original(view)).convert("RGB")))
        assert (255 * shown - picture).abs().mean() < 2


@public("crema-d")
@needs_ffmpeg
def test_real_lfs_pointers(clone, tmp_path, refused):
    pointer = next((FORMATS / "crema-d").glob("lfs-pointer-*"))
    shutil.copy(pointer, clone / "AudioWAV" / "1001_DFA_ANG_XX.wav")
    shutil.copy(pointer, clone / "VideoFlash" / "1001_DFA_ANG_XX.flv")
    arguments = ["crema-d", "--source", clone, "--out", tmp_path / "out"]
    refused(arguments, "none of the 1 clips can be read", "git lfs pull")


# ---- Made-up clips, end to end ----


@pytest.mark.slow
@pytest.mark.parametrize("name", FROM_FILES)
def test_fake_end_to_end(name, made, capsys):
    out, views = made(name, 24), name == "modelnet40"
    ending = "png" if views else "jpg"
    manifest = json.loads((out / "manifest.json").read_text())
    rates = {"crema-d": 4.0, "ave": 1.0, "vggsound": 1.0, "modelnet40": None}
    options = {"fps": rates[name], "short_side": 32, "sample_rate": None if views else 16000}
    options |= {"split": "stratified" if name in ("crema-d", "ave") else "source"}
    assert manifest["options"].items() >= options.items()
    assert (manifest["dataset"], manifest["format"], manifest["fake"]) == (name, 1, True)
    classes = manifest["classes"]
    assert len(classes) == (6 if name == "crema-d" else 4) and (out / "source/FAKE.txt").exists()
    rows = read_csv(out / "clips.csv")
    assert list(rows[0]) == ["id", "split", "label", "frames", "seconds"] and len(rows) == 24
    for split, counts in manifest["counts"].items():
        found = Counter(int(row["label"]) for row in rows if row["split"] == split)
        assert sum(counts.values()) > 0
        assert counts == {c: found[i] for i, c in enumerate(classes)}
    seen = defaultdict(list)  # label -> first frames
    for row in rows:
        folder = out / "frames" / row["id"]
        frames = sorted(path.name for path in folder.iterdir())
        assert frames == [f"{n:04d}.{ending}" for n in range(1, int(row["frames"]) + 1)]
        assert len(frames) == {"crema-d": 8, "modelnet40": 12}.get(name, 2)
        image = Image.open(folder / f"0001.{ending}").convert("RGB")
        assert min(image.size) == 32
        seen[row["label"]].append(np.asarray(image.resize((8, 8)), float).ravel())
        if not views:
            with wave.open(str(out / "audio" / f"{row['id']}.wav")) as file:
                assert file.getparams()[:3] == (1, 2, 16000)
                assert abs(file.getnframes() / 16000 - float(row["seconds"])) < 1e-3
            assert abs(float(row["seconds"]) - 2) < 0.2
    if views:
        assert {row["seconds"] for row in rows} == {""} and not (out / "audio").exists()
    assert run(name, "--check", "--out", out) == 0
    assert "all 24 clips" in capsys.readouterr().out

    # The class can be learned: the nearest class mean of the other clips is right far more often
    # than by chance, and the pitch rises from class to class.
    right = 0
    for label, images in seen.items():
        for i, image in enumerate(images):
            rest = {
                k: [x for j, x in enumerate(v) if (k, j) != (label, i)] for k, v in seen.items()
            }
            means = {k: np.linalg.norm(image - np.mean(v, axis=0)) for k, v in rest.items()}
            right += min(means, key=means.get) == label
    assert right / 24 > 2 / len(classes)
    if not views:
        pitches = defaultdict(list)
        for row in rows:
            samples = media.read_samples(out / "audio" / f"{row['id']}.wav")[:16000]
            pitches[row["label"]].append(np.abs(np.fft.rfft(samples)).argmax())
        medians = [np.median(pitches[label]) for label in sorted(pitches)]
        assert all(low * 1.2 < high for low, high in pairwise(medians))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "name"),
    [
        ("pmr", "crema-d"),
        ("greedy_balance", "modelnet40"),
        ("umt_ume", "ave"),
        ("mhm", "vggsound"),
        ("baselines", "crema-d"),
    ],
)
def test_scripts_train_on_fakes(script, name, made, tmp_path, thin_resnet):
    shutil.copytree(made(name, 24), tmp_path / name)  # a script leaves its cache there
    flags = ["--dataset", name, "--data-root", str(tmp_path), "--out", str(tmp_path / "runs")]
    flags += ["--epochs", "1", "--batch-size", "8", "--image-size", "32", "--train-samples", "16"]
    module = importlib.import_module(script)
    method = {"umt_ume": "umt"}.get(script, next(iter(module.METHODS)))
    summary = module.main([*flags, "--num-workers", "0", "--device", "cpu", "--method", method])
    assert summary["method"] == method and 0 <= summary["test"]["accuracy"] <= 100
    assert list(tmp_path.glob(f"runs/{script}/{name}/{method}-*/last.pt"))


@pytest.mark.slow
@needs_ffmpeg
@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_and_started_again(end, made, tmp_path):
    """Ended once some clips are finished; the result equals that of the uninterrupted run."""
    whole, out = made("crema-d", 6), tmp_path / "out"
    arguments = ["crema-d", "--source", whole / "source", "--out", out, *SMALL, "--workers", 1]
    command = list(map(str, [sys.executable, ROOT / "data" / "prepare.py", *arguments]))
    slow = tmp_path / "ffmpeg"  # so that the end comes in the middle
    slow.write_text(f'#!/bin/sh\nsleep 0.3\nexec {shutil.which("ffmpeg")} "$@"\n')
    slow.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    options = {"stderr": subprocess.PIPE, "text": True, "env": environment}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # else inherited
    process = subprocess.Popen(command, **options)
    journal = out / ".prepare" / "done.jsonl"
    while not journal.exists() or journal.read_text().count("\n") < 2:
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
    kept = [json.loads(line)["id"] for line in journal.read_text().splitlines()[:-1]]
    times = {path: path.stat().st_mtime_ns for path in (out / "audio").iterdir()}
    assert len(kept) < 6 and run(*arguments) == 0
    for path, before in times.items():
        assert path.stem not in kept or path.stat().st_mtime_ns == before
    assert read_tree(out) == read_tree(whole)


# ---- Bad clips ----


def cut_off(path, count=1000):
    path.write_bytes(path.read_bytes()[:-count])


def cut_in_half(path):
    cut_off(path, path.stat().st_size // 2)


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"


@needs_ffmpeg
@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (lambda sound, pictures: pictures.unlink(), "missing: no file"),
        (lambda sound, pictures: pictures.write_bytes(b""), "empty: "),
        (lambda sound, pictures: sound.write_bytes(POINTER), "git lfs pull"),
        (lambda sound, pictures: pictures.write_bytes(b"<html>" * 300), "unreadable: "),
        (lambda sound, pictures: cut_in_half(sound), "truncated: "),
        (lambda sound, pictures: cut_in_half(pictures), "truncated: "),
        (lambda sound, pictures: shutil.copy(sound, pictures), "no pictures"),
        (lambda sound, pictures: pictures.write_bytes(pictures.read_bytes()[:13]), "unreadable: "),
    ],
)
def test_a_bad_clip_is_reported(spoil, words, crema, refused):
    sound = min((crema / "source" / "AudioWAV").iterdir())
    name = sound.stem
    spoil(sound, crema / "source" / "VideoFlash" / f"{name}.flv")
    report = refused(again(crema), "1 of 6 clips are missing or damaged", "--allow-missing")
    assert words in problems(crema)[name] and name in report
    assert not (crema / "manifest.json").exists() and (crema / "frames" / name).exists()

    assert run(*again(crema, "--allow-missing")) == 0
    rows = {row["id"] for row in read_csv(crema / "clips.csv")}
    assert name not in rows and len(rows) == 5
    manifest = json.loads((crema / "manifest.json").read_text())
    assert sum(sum(counts.values()) for counts in manifest["counts"].values()) == 5
    assert run("crema-d", "--check", "--out", crema) == 0


@pytest.mark.slow
@needs_ffmpeg
def test_silent_clips_are_kept_and_short_ones_have_a_frame(crema, capsys):
    """A clip of 0.3 s has one frame at 1 per second, two at 4; 2 s have 10 at 5 per second."""
    source = crema / "source"
    silent, short, other = (path.stem for path in sorted((source / "AudioWAV").iterdir())[:3])
    write_wav(source / "AudioWAV" / f"{silent}.wav", np.zeros(32000))
    for path in (source / "VideoFlash" / f"{short}.flv", source / "AudioWAV" / f"{short}.wav"):
        long = path.rename(path.with_name("long" + path.suffix))
        media.run_ffmpeg(["-i", str(long), "-t", "0.3", str(path)], source, long)
        long.unlink()
    for _ in range(2):  # reported even after a restart
        assert run(*again(crema)) == 0
        assert problems(crema)[silent].startswith("silent: ")
        assert "silent (1)" in capsys.readouterr().out
    rows = {row["id"]: row for row in read_csv(crema / "clips.csv")}
    assert len(rows) == 6 and rows[short]["frames"] == "2"
    slow = crema.parent / "slow"
    assert run("crema-d", "--source", source, "--out", slow, "--fps", 1) == 0
    row = next(row for row in read_csv(slow / "clips.csv") if row["id"] == short)
    assert row["frames"] == "1" and abs(float(row["seconds"]) - 0.3) < 0.05
    assert min(Image.open(slow / "frames" / short / "0001.jpg").size) == 256
    inputs = [source / "VideoFlash" / f"{other}.flv", source / "AudioWAV" / f"{other}.wav"]
    assert media.extract_clip(inputs, None, crema.parent / "work", fps=5, short=32)[0] == 10


@pytest.mark.slow
@needs_ffmpeg
def test_segments_are_cut_out_and_repeated_ids_are_kept(tmp_path, capsys):
    source = fake.write_fake("ave", 6, tmp_path / "source")

    def prepare_lists(out, *arguments, **lists):
        for split, text in lists.items():
            lines = [line.replace(" ", "&fake000000", 1).replace(" ", "&good&") for line in text]
            (tmp_path / f"{split}Set.txt").write_text("\n".join(lines))
        arguments = ["--source", source, "--splits", tmp_path, "--out", tmp_path / out, *arguments]
        assert run("ave", *arguments, *SMALL) == 0
        return {row["id"]: row for row in read_csv(tmp_path / out / "clips.csv")}

    def sound(out, clip):
        return media.read_samples(tmp_path / out / "audio" / f"{clip}.wav")[:8000]

    train, val = ["Bark 2 0&1", "Goat 2 0&1", "Bark 1 0&2"], ["Goat 3 1&1", "Goat 3 1&1"]
    rows = prepare_lists("out", train=train, val=val, test=["Bark 4 0&2", "Goat 2 1&2"])
    found = {f"{name[10:]} {row['split']} {row['label']}" for name, row in rows.items()}
    assert found == {"1 train 0", "2 train 0", "2.2 train 1", "2.3 test 1", "3 val 1", "4 test 0"}
    assert abs(float(rows["fake0000002"]["seconds"]) - 1) < 0.1
    assert abs(float(rows["fake0000003"]["seconds"]) - 2) < 0.1
    assert not np.array_equal(sound("out", "fake0000002"), sound("out", "fake0000002.3"))
    report = capsys.readouterr().out
    assert all(kind in report for kind in ("duplicate (2)", "leak (1)", "empty segment (2)"))
    clean = prepare_lists("clean", "--remove-leaks").items()
    assert "leak, removed (1)" in capsys.readouterr().out
    splits = {name.removeprefix("fake000000"): row["split"] for name, row in clean}
    assert splits == {"1": "train", "2.3": "test", "3": "val", "4": "test"}
    prepare_lists("past", "--allow-missing", val=["Goat 3 5&9", "Goat 5 0&5"])
    assert "fake0000003.mp4 ends before the segment" in problems(tmp_path / "past")["fake0000003"]
    assert problems(tmp_path / "past")["fake0000005"].startswith("short: 2.0 of 5.0 s of ")
    before = sound("out", "fake0000002")  # a clip is made anew if its segment changed
    lists = {"train": ["Bark 2 1&2"], "val": ["Bark 3 0&1"], "test": ["Bark 4 0.5&1"]}
    rows = prepare_lists("out", **lists)
    assert abs(float(rows["fake0000004"]["seconds"]) - 0.5) < 0.1
    assert not np.array_equal(sound("out", "fake0000002"), before)


SILENT = "silent: there is nothing to hear in {}/one.wav"


def make_media(folder):
    """Tiny files of every kind that users have; a name says what is in it."""

    def make(name, *arguments):
        media.run_ffmpeg(["-threads", "1", *" ".join(arguments).split(), name], folder, folder)

    def film(seconds, more=""):
        return f"-f lavfi -i testsrc=s=32x32:r=5:d={seconds}{more}"

    def tone(seconds):
        return f"-f lavfi -i sine=d={seconds}"

    for name in ("p7s10.mp4", "p7s10.mkv", "p7s10.flv"):
        make(name, film(7), tone(10), "-ar 44100")
    make("p10s7.MP4", film(10), tone(7))
    make("late.mp4", film(10), "-itsoffset 3", tone(7))
    make("late.ts", film(10), "-itsoffset 3", tone(7))
    make("long.mp4", film(30), tone(30), "-movflags faststart")
    make("short.mp4", film(10), tone(2))
    make("film.avi", film(2.2))
    make("tone.wav", tone(3))
    make("one.wav", "-f lavfi -i sine=r=16000:d=1 -af atrim=end_sample=1")
    (folder / "s.srt").write_text("1\n00:00:00,000 --> 00:00:30,000\nhello\n")
    make("subtitle.mkv", "-i p10s7.MP4 -i s.srt -map 0 -map 1 -c copy -c:s srt")
    make("three.mp4", film(3, ",fps=1"), "-c:v mpeg4")
    hold = "-i three.mp4 -c copy -bsf:v setts=duration=8*16384"
    make("held.mp4", hold)
    make("held10.mp4", "-i held.mp4", tone(10), "-map 0 -map 1 -c:v copy")
    header = (folder / "tone.wav").read_bytes()
    at = header.index(b"data") + 4
    for name, size in (("zero.wav", bytes(4)), ("piped.wav", b"\xff" * 4)):
        (folder / name).write_bytes(header[:at] + size + header[at + 4 :])
    for name in ("p7s10.mkv", "p7s10.flv", "long.mp4", "tone.wav"):
        shutil.copy(folder / name, folder / f"cut.{name}")
        cut_in_half(folder / f"cut.{name}")


@pytest.fixture(scope="session")
def kinds(tmp_path_factory):
    folder = tmp_path_factory.mktemp("media")
    make_media(folder)
    return folder


@needs_ffmpeg
@pytest.mark.parametrize(
    ("names", "segment", "frames", "seconds", "notes"),
    [
        ("p7s10.mp4", None, 7, 10, []),
        ("p7s10.mkv", None, 7, 10, []),
        ("p7s10.flv", None, 7, 10, []),
        ("p10s7.MP4", None, 10, 7, []),
        ("subtitle.mkv", None, 10, 7, []),
        ("late.mp4", None, 10, 10, []),
        ("late.ts", None, 10, 10, []),
        ("late.mp4", (1, 5), 4, 4, []),
        ("late.mp4", (0, 4), 4, 4, ["short: 1.0 of 4.0 s of sound in {}/late.mp4"]),
        ("held10.mp4", None, 10, 10, []),
        ("held10.mp4", (5, 9), 4, 4, []),
        ("long.mp4", None, 10, 10, ["long: {}/long.mp4 has 30.0 s, the first 10 are used"]),
        ("long.mp4", (20, 23.5), 4, 3.5, []),
        ("cut.long.mp4", (0, 3), 3, 3, []),
        ("short.mp4", None, 10, 2, ["short: 2.0 of 10.0 s of sound in {}/short.mp4"]),
        ("film.avi zero.wav", None, 3, 3, []),
        ("film.avi piped.wav", None, 3, 3, []),
        ("film.avi one.wav", None, 3, 0, ["short: 0.0 of 2.2 s of sound in {}/one.wav", SILENT]),
    ],
)
def test_one_window_for_pictures_and_sound(names, segment, frames, seconds, notes, kinds, tmp_path):
    inputs = [kinds / name for name in names.split()]
    found = media.extract_clip(inputs, segment, tmp_path / "work", fps=1, short=32)
    assert found[0] == frames and abs(found[1] - seconds) < 0.05
    assert found[2] == [note.format(kinds) for note in notes]
    if names == "late.mp4":  # nothing is heard before 3 s
        first = np.flatnonzero(np.abs(media.read_samples(tmp_path / "work/audio.wav")) > 500)[0]
        assert abs(first / 16000 - (3 - (segment or (0,))[0])) < 0.1


@needs_ffmpeg
@pytest.mark.parametrize(
    ("names", "segment", "problem"),
    [
        ("cut.long.mp4", (20, 25), "truncated: "),
        ("cut.p7s10.mkv", None, "truncated: "),
        ("cut.p7s10.flv", None, "truncated: "),
        ("film.avi cut.tone.wav", None, "truncated: {} has 1."),
        ("p7s10.mp4", (12, 14), "no pictures: {} ends before the segment: pictures up to 7.0 s"),
        ("short.mp4", (5, 9), "no sound: {} ends before the segment: sound up to 2.0 s"),
        ("late.mp4", (0, 2), "no sound: {} has none from 0 to 2 s"),
        ("film.avi", None, "no sound: {} has none"),
        ("tone.wav", None, "no pictures: {} has none"),
        ("s.srt", None, "no pictures: {} has none"),
        ("film.avi held.mp4", None, "no sound: {} has none"),
    ],
)
def test_what_a_file_lacks_is_said_with_its_name(names, segment, problem, kinds, tmp_path):
    inputs = [kinds / name for name in names.split()]
    with pytest.raises(media.ClipError) as error:
        media.extract_clip(inputs, segment, tmp_path / "work", fps=1, short=32)
    assert str(error.value).startswith(problem.format(inputs[-1]))


@needs_ffmpeg
def test_bad_views_and_two_files_of_one_clip(tmp_path, refused):
    source = fake.write_fake("modelnet40", 3, tmp_path / "views")
    (source / "airplane/train/airplane_0000.obj_whiteshaded_v0003.png").unlink()
    cut_in_half(source / "bed" / "train" / "bed_0001.obj_whiteshaded_v0003.png")
    shutil.copy(next(source.glob("bed/train/*.png")), source / "bed" / "train" / "bed.png")
    refused(["modelnet40", "--source", source, "--out", tmp_path / "out"], "3 of 4 clips")
    found = problems(tmp_path / "out")
    assert "11 of 12 views" in found["airplane_0000"]
    cut = source / "bed" / "train" / "bed_0001.obj_whiteshaded_v0003.png"
    assert found["bed_0001"].startswith(f"damaged: {cut} is not a whole JPEG or PNG file")
    assert found["bed"].startswith("unknown name: ")
    source = fake.write_fake("vggsound", 1, tmp_path / "source")
    clip = min(source.rglob("*.mp4"))
    (source / "aaa").mkdir()
    shutil.copy(clip, source / "aaa")
    note = f"duplicate: 2 files: {source / 'aaa' / clip.name} is used, not {clip}"
    assert (clip.stem, note) in list_rows("vggsound", source).notes


def test_files_are_found_by_their_stem_and_names_with_a_dot_are_not_data(clone, tmp_path):
    sounds, films = clone / "AudioWAV", clone / "VideoFlash"
    for path in ("1001_DFA_ANG_XX.WAV", "._1001_DFA_ANG_XX.wav", "._1002_DFA_SAD_XX.wav"):
        (sounds / path).touch()
    for path in ("1001_DFA_ANG_XX.mkv", "1001_DFA_ANG_XX.webm", "1001_DFA_ANG_XX.txt"):
        (films / path).touch()
    listing = list_rows("crema-d", clone)
    name = "1001_DFA_ANG_XX"
    assert [row.inputs for row in listing.rows] == [[films / f"{name}.mkv", sounds / f"{name}.WAV"]]
    two = f"{films / name}.mkv is used, not {films / name}.webm"
    assert listing.notes == [(name, f"duplicate: 2 files: {two}")]
    (clone / "vggsound.csv").write_text("x,1,dog,train\ny,2,dog,test\n")
    (clone / ".Trashes").mkdir()
    for path in ("x_000001.MP4", "._x_000001.mp4", ".Trashes/x_000001.mp4", "x_000001.json"):
        (clone / path).touch()
    listing = list_rows("vggsound", clone)
    assert listing.notes == [] and listing.rows[0].inputs == [clone / "x_000001.MP4"]
    assert listing.rows[1].inputs == [clone / "y_000002.mp4"]  # reported as missing later
    (tmp_path / "bed" / "train").mkdir(parents=True)
    for view in range(12):
        for dot in ("", "._"):
            (tmp_path / "bed" / "train" / f"{dot}bed_0001_{view:03}.png").touch()
    listing = list_rows("modelnet40", tmp_path)
    assert len(listing.rows) == 1 and listing.missing == []


@needs_ffmpeg
def test_splits_are_drawn_from_what_is_there_or_an_empty_one_is_named(tmp_path, refused):
    source, rows = fake.write_fake("vggsound", 24, tmp_path / "source"), "Goat&{0}&good&0&1\n"
    arguments = ["vggsound", "--source", source, "--out", tmp_path / "out", *SMALL]
    ids = defaultdict(list)
    for row in list_rows("vggsound", source).rows:
        ids[row.split].append(row.id)
    keep = [*ids["train"][:3], ids["test"][0]]  # none of those first drawn for validation
    for path in source.rglob("*.mp4"):
        if path.stem not in keep:
            path.unlink()
    assert run(*arguments, "--allow-missing") == 0
    found = Counter(row["split"] for row in read_csv(tmp_path / "out" / "clips.csv"))
    assert found == {"train": 2, "val": 1, "test": 1}
    lists = tmp_path / "lists"
    lists.mkdir()
    for split, clip in zip(sources.SPLITS, (keep[0], "gone", keep[1]), strict=True):
        (lists / f"{split}Set.txt").write_text(rows.format(clip))
    arguments = ["ave", "--source", source, "--splits", lists, "--out", tmp_path / "ave"]
    refused([*arguments, "--allow-missing"], "none is for val", "leave --splits away")
    assert not (tmp_path / "ave" / "frames").exists()  # said at once


@needs_ffmpeg
@pytest.mark.parametrize("name", prepared_folder.NAMES)
def test_files_of_the_user_are_never_replaced(name, crema, tmp_path, refused):
    own = tmp_path / "own" / name / "9000_IEO_SAD_XX" / "0001.jpg"
    if "." in name:
        own = tmp_path / "own" / name
    own.parent.mkdir(parents=True)
    own.write_text("{}")
    for _ in range(2):
        arguments = ["crema-d", "--source", crema / "source", "--out", tmp_path / "own"]
        refused(arguments, f"{tmp_path / 'own' / name} is there and was not made", "another --out")
    assert [path.name for path in (tmp_path / "own").iterdir()] == [name]
    assert own.read_text() == "{}"


# ---- Prepared folders ----


def write_counts(out):
    manifest = json.loads((out / "manifest.json").read_text())
    manifest["counts"]["train"]["NEU"] += 1
    (out / "manifest.json").write_text(json.dumps(manifest))


def drop_validation(out):
    lines = (out / "clips.csv").read_text().splitlines()
    (out / "clips.csv").write_text("\n".join(line for line in lines if ",val," not in line))


def repeat_line(out):
    lines = (out / "clips.csv").read_text().splitlines()
    (out / "clips.csv").write_text("\n".join([*lines, lines[-1]]))


def change_lists(old, new):
    def change(out):
        text = (out / "clips.csv").read_text()
        (out / "clips.csv").write_text(text.replace(old, new, 1))

    return change


FRAME, SOUND = "frames/9000_IEO_ANG_XX/0002.jpg", "audio/9000_IEO_ANG_XX.wav"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda out: (out / FRAME).unlink(), "files, not 0001.jpg to 0008"),
        (lambda out: cut_off(out / FRAME, 10), "not a whole JPEG"),
        (lambda out: (out / FRAME).write_bytes(GARBLED), "not a whole JPEG"),
        (lambda out: (out / SOUND).unlink(), "missing: no file"),
        (lambda out: cut_off(out / SOUND), "samples"),
        (lambda out: write_wav(out / SOUND, np.ones(16000)), "s, not"),
        (lambda out: write_wav(out / SOUND, np.ones(32000), 8000), "has 8000 Hz, 1 channels, 16 b"),
        (lambda out: (out / SOUND).write_bytes(b"x"), "is no WAV file"),
        (write_counts, "counts"),
        (drop_validation, "no clip is for val"),
        (repeat_line, "an id is there twice"),
        (change_lists(",8,2.0", ",999999999999,2.0"), "has 8 files"),
        (change_lists(",8,2.0", ",8,nan"), "s, not nan"),
    ],
)
def test_check_finds_damage(damage, words, crema, refused):
    damage(crema)
    assert words in refused(["crema-d", "--check", "--out", crema], "1 problems", "again")


def test_check_of_a_damaged_manifest_or_another_dataset(crema, refused):
    refused(["ave", "--check", "--out", crema], "holds no ave")
    whole = (crema / "manifest.json").read_text()
    for text in (
        "",
        "{}",
        "[1]",
        '{"dataset": "crema-d"',
        "[" * 10**5,
        whole.replace('"NEU"', "[1]"),
    ):
        (crema / "manifest.json").write_text(text)
        refused(["crema-d", "--check", "--out", crema], "damaged")
    (crema / "manifest.json").write_text(whole)
    for old, new in ((",5,8,", ",-1,8,"), ("9000", "9" * 200_000)):
        change_lists(old, new)(crema)
        refused(["crema-d", "--check", "--out", crema], "damaged")


@needs_ffmpeg
def test_links_in_a_prepared_folder_cost_the_user_nothing(crema, made, tmp_path):
    own, frames = tmp_path / "own" / "0001.jpg", crema / "frames" / "9000_IEO_ANG_XX"
    own.parent.mkdir()
    own.write_text("mine")
    (own.parent / "my.rows").touch()
    shutil.rmtree(frames)
    for link in (frames, crema / "cache"):
        link.symlink_to(own.parent)
    (crema / ".prepare" / "lock").unlink()
    for name in ("clips.csv.part", ".prepare/lock"):
        (crema / name).symlink_to(own)
    assert run(*again(crema)) == 0 and own.read_text() == "mine"
    assert len(list(own.parent.iterdir())) == 2 and not frames.is_symlink()


@needs_ffmpeg
def test_running_again_repairs_damage_and_follows_the_source(crema, made):
    (crema / FRAME).unlink()
    (crema / FRAME.replace("ANG", "SAD")).write_bytes(GARBLED)
    assert run(*again(crema)) == 0
    assert read_tree(crema) == read_tree(made("crema-d", 6))
    (crema / "cache").mkdir()
    cached, sad = crema / "cache" / "ogm-ge-0.rows", "frames/9000_IEO_SAD_XX"
    own = [crema / "cache" / "notes", crema / sad / ".notes", crema / sad / "._0001.jpg"]
    for path in (cached, *own):
        path.touch()
    assert run(*again(crema)) == 0 and cached.exists()
    frames = {path: path.stat().st_mtime_ns for path in crema.glob("frames/*/0001.jpg")}
    films = crema / "source" / "VideoFlash"
    shutil.copy(films / "9000_IEO_ANG_XX.flv", films / "9000_IEO_SAD_XX.flv")
    assert run(*again(crema)) == 0 and not cached.exists()
    assert all(path.exists() for path in own)  # what is not made here stays
    remade = {path.parent.name for path, at in frames.items() if path.stat().st_mtime_ns != at}
    assert remade == {"9000_IEO_SAD_XX"}
    first, other = (crema / FRAME.replace("ANG", name) for name in ("SAD", "ANG"))
    assert first.read_bytes() == other.read_bytes()


@needs_ffmpeg
def test_another_preparation_or_other_options(crema, refused):
    pytest.importorskip("fcntl")
    before = read_tree(crema)
    with prepared_folder.locked(crema):
        words = f"another preparation is running in {crema}"
        refused(["crema-d", "--fake", 24, "--out", crema], words)
    for options, words in (("--short-side 64", "short_side 32"), ("--fps 2", "fps 4.0")):
        refused(again(crema, *options.split()), f"was begun with {words}")
    assert read_tree(crema) == before


@pytest.mark.slow
def test_another_split_keeps_the_files(made, tmp_path):
    out = shutil.copytree(made("crema-d", 24), tmp_path / "speakers")
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")}
    assert run(*again(out, "--split", "speakers")) == 0
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*.jpg")} == times
    assert json.loads((out / "manifest.json").read_text())["options"]["split"] == "speakers"
    actors = {(row["split"], row["id"][:4]) for row in read_csv(out / "clips.csv")}
    assert len(actors) == len({actor for _, actor in actors}) == 4


@needs_ffmpeg
def test_a_source_file_that_may_not_be_read(crema, monkeypatch, refused):
    def refuse(path, mode):
        if path.suffix == ".flv" and "SAD" in path.name:
            raise PermissionError(13, "Permission denied", str(path))
        return open(path, mode)

    monkeypatch.setattr(media, "open", refuse, raising=False)
    refused(again(crema), "1 of 6 clips are missing or damaged")
    assert all("unreadable: [Errno 13]" in problem for problem in problems(crema).values())


@needs_ffmpeg
def test_damage_of_what_tells_the_finished_clips(crema, made, refused):
    hidden = crema / ".prepare"
    for name, text in [
        *(("media.json", text) for text in ("", "[1]", '{"dataset": "crema-d"}')),
        *(("done.jsonl", text) for text in ("[1]\n", '{"id": "9000_IEO_SAD_XX"}\n')),
        *((name, "[" * 10**5) for name in ("media.json", "done.jsonl")),
        ("done.jsonl", '{"id": "x", "origin": [], "frames": 8, "seconds": 2.0, "notes": null}'),
    ]:
        before = (hidden / name).read_text()
        (hidden / name).write_text(text)
        refused(again(crema), f"{hidden / name} is damaged: delete it and")
        (hidden / name).write_text(before)
    (hidden / "done.jsonl").write_text(before.replace('"frames": 8', '"frames": "8"'))
    assert run(*again(crema)) == 0 and '"frames": 8' in (hidden / "done.jsonl").read_text()
    shutil.rmtree(hidden)
    refused(again(crema, "--short-side", 64), "was begun with short_side 32")
    assert run(*again(crema)) == 0 and read_tree(crema) == read_tree(made("crema-d", 6))


# ---- What is not there ----


def test_no_ffmpeg_and_a_full_disk(crema, tmp_path, monkeypatch, refused):
    program, out, path = tmp_path / "bin" / "ffmpeg", tmp_path / "out", os.environ["PATH"]
    program.parent.mkdir()
    monkeypatch.setenv("PATH", str(program.parent))
    arguments = ["crema-d", "--source", crema / "source", "--out", out]
    refused(arguments, "apt-get install ffmpeg", "brew install ffmpeg")
    assert not out.exists()
    assert run("crema-d", "--check", "--out", crema) == 0  # needs none
    program.write_text("#!/bin/sh\necho '[error] in some other words' >&2\nexit 1\n")
    program.chmod(0o755)
    refused(arguments, "no program ffprobe", "imageio-ffmpeg has no ffprobe")
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{path}")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(media.shutil, "disk_usage", lambda path: usage)
    refused(arguments, "is full", "are kept")
    assert not (out / "manifest.json").exists()


def test_disk_too_small_is_found_by_the_estimate(made, tmp_path, monkeypatch, refused):
    usage = shutil.disk_usage(tmp_path)._replace(free=100_000)
    monkeypatch.setattr(prepared_folder.shutil, "disk_usage", lambda path: usage)
    assert prepared_folder.SAMPLE_CLIPS == 8
    monkeypatch.setattr(prepared_folder, "SAMPLE_CLIPS", 2)
    source, out = made("crema-d", 6) / "source", tmp_path / "out"
    report = refused(["crema-d", "--source", source, "--out", out], "0.1 MB free", "--short-side")
    assert "6 clips to prepare take about" in report and len(list((out / "audio").iterdir())) == 2


@needs_ffmpeg
@pytest.mark.parametrize(
    ("name", "path", "text", "words"),
    [
        ("crema-d", None, "", "no folders AudioWAV and VideoFlash"),
        ("ave", None, "", "Annotations.txt"),
        ("ave", "Annotations.txt", "Bark&x&good&0", "line 1: not of the form Category&"),
        ("ave", "Annotations.txt", "Bark&x&good&0&ten", "line 1: not of the form"),
        ("ave", "Annotations.txt", "", "lists no clip"),
        ("ave", "Annotations.txt", "Bark&x&good&0&10", "missing: no file"),
        ("vggsound", None, "", "vggsound.csv"),
        ("vggsound", "vggsound.csv", "x,1,dog", "line 1: not of the form video,start"),
        ("vggsound", "vggsound.csv", "x,1,dog,validate", "line 1: not of the form"),
        ("vggsound", "vggsound.csv", f"x,{'9' * 5000},dog,train", "line 1: not of the form"),
        ("vggsound", "vggsound.csv", f"\n{'x' * 200_000},1,dog,train", "line 2: not of the form"),
        ("modelnet40", None, "", "no <class>/train"),
        ("modelnet40", "bed/train/bed_0001_001.png", "", "12 PNG views"),
    ],
)
def test_bad_source(name, path, text, words, tmp_path, refused):
    source = tmp_path / "source"
    source.mkdir()
    if path:
        (source / path).parent.mkdir(parents=True, exist_ok=True)
        (source / path).write_text(text)
    refused([name, "--source", source, "--out", tmp_path / "out"], words)
    assert [path.name for path in (tmp_path / "out").rglob("*")] == [".prepare", "lock"]


@needs_ffmpeg
def test_bad_lists_few_speakers_and_a_real_source(clone, tmp_path, refused):
    arguments = ["crema-d", "--source", clone, "--out", tmp_path / "out"]
    refused([*arguments, "--splits", tmp_path / "gone"], "CLIP,LABEL")
    (clone / "AudioWAV" / "1001_DFA_ANG_XX.wav").touch()
    with pytest.raises(media.PrepareError, match="needs 3 actors or more, the source has 1"):
        list_rows("crema-d", clone, "--split", "speakers")
    (clone / "AudioWAV" / "notes.wav").touch()
    listing = list_rows("crema-d", clone)
    assert len(listing.rows) == 1 and listing.missing[0][1].startswith("unknown label")
    clone.rename(tmp_path / "source")  # is not replaced by a fake one
    refused(["ave", "--fake", 24, "--out", tmp_path], "not a fake")
    assert (tmp_path / "source" / "AudioWAV" / "notes.wav").exists()


@pytest.mark.parametrize("clip", ["../victim", "a/b", "/victim", ".."])
def test_a_name_that_leads_elsewhere_is_a_problem(clip, clone):
    (clone / "train.csv").write_text(f"{clip},ANG\n,SAD\n1001_DFA_ANG_XX,ANG\n")
    (clone / "test.csv").touch()
    (clone / "Annotations.txt").write_text(f"Bark&{clip}&good&0&1\nBark&&good&0&1\n")
    (clone / "vggsound.csv").write_text(f"{clip}/,1,dog,train\n")
    listing = list_rows("crema-d", clone, "--splits", clone)
    assert [row.id for row in listing.rows] == ["1001_DFA_ANG_XX"]
    assert [name for name, _ in listing.missing] == [clip, ""]
    assert listing.missing[0][1] == f"unknown name: {clip!r} cannot name a file"
    for name, count in (("ave", 2), ("vggsound", 1)):
        listing = list_rows(name, clone)
        assert listing.rows == [] and len(listing.missing) == count


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("", "required: DATASET"),
        ("nothing", "invalid choice"),
        ("fsdd --url http://127.0.0.1/x --source x", "not allowed with"),
        ("ave", "one of the arguments --source --fake --check is required"),
        ("ave --check --fake 24", "not allowed with"),
        ("ave --check --splits x", "it does not take --splits"),
        ("vggsound --check --seed 1 --fps 2", "it does not take --fps, --seed"),
        ("ave --fake 3", "--fake: must be a whole number at least 24, not '3'"),
        ("ave --source x --fps 0", "--fps: must be a number at least 0.01 and at most 100"),
        ("modelnet40 --source x --fps 2", "unrecognized arguments"),
        ("crema-d --source x --splits y --split speakers", "not allowed with"),
    ],
)
def test_wrong_usage(arguments, words, capsys):
    with pytest.raises(SystemExit) as error:
        run(*arguments.split())
    output = capsys.readouterr().err
    assert error.value.code == 2 and "error: " in output and words in output
