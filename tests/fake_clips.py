"""Prepared folders and community trees of made-up clips, for tests and for the benchmark."""

import csv
import json
import wave

import numpy as np
from PIL import Image

FROM_FILES = ("crema-d", "ave", "vggsound", "modelnet40")
EMOTIONS = ("NEU", "HAP", "SAD", "FEA", "DIS", "ANG")


def photograph(rng, height, width):
    """An image with broad shapes and fine grain, about as hard to compress as a photograph."""
    coarse = Image.fromarray(rng.integers(0, 256, (height // 20, width // 20, 3), dtype=np.uint8))
    broad = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=float)
    grain = rng.normal(0, 6, (height, width, 3))
    return Image.fromarray((0.9 * broad + grain).clip(0, 255).astype(np.uint8))


def write_wav(path, samples, sample_rate=16_000, channels=1):
    """samples: floats in [-1, 1]."""
    with wave.open(str(path), "wb") as file:
        file.setparams((channels, 2, sample_rate, 0, "NONE", "not compressed"))
        file.writeframes((samples * 32767).astype("<i2").tobytes())


def write_clip(frames, recording, rng, count, height, width, names="{:04}.jpg", seconds=0.5):
    """`count` frames in the folder `frames` and a noisy tone in the file `recording`, if any."""
    frames.mkdir(parents=True)
    for i in range(count):
        photograph(rng, height, width).save(frames / names.format(i + 1), quality=90)
    if recording:
        recording.parent.mkdir(parents=True, exist_ok=True)
        time = np.arange(round(seconds * 16_000)) / 16_000
        tone = np.sin(2 * np.pi * rng.uniform(200, 4000) * time)
        write_wav(recording, 0.5 * tone + rng.normal(0, 0.02, len(time)))


def write_prepared(
    root, name, sizes=(8, 4, 4), counts=(3, 1, 5), shape=(48, 64), classes=2, seconds=0.5
):
    """`root`/`name` as data/prepare.py makes it; counts: frames of the clips, in turn."""
    folder, rng = root / name, np.random.default_rng(0)
    labels = EMOTIONS if name == "crema-d" else [f"class {i}" for i in range(classes)]
    rows = [("id", "split", "label", "frames", "seconds")]
    for split, size in zip(("train", "val", "test"), sizes, strict=True):
        for i in range(size):
            clip, count = f"{split}_{i:05}", counts[i % len(counts)]
            sound = None if name == "modelnet40" else folder / "audio" / f"{clip}.wav"
            write_clip(folder / "frames" / clip, sound, rng, count, *shape, seconds=seconds)
            rows.append((clip, split, i % classes, count, seconds))
    with open(folder / "clips.csv", "w", newline="") as file:
        csv.writer(file).writerows(rows)
    manifest = {"dataset": name, "format": 1, "fake": True, "options": {}, "classes": labels}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def write_community(root, sizes=(20, 4), counts=(3, 1, 5), shape=(48, 64), seconds=0.5):
    """`root`/crema-d as users of OGM-GE's and PMR's code have it."""
    folder, rng = root / "crema-d", np.random.default_rng(0)
    for split, size in zip(("train", "test"), sizes, strict=True):
        rows = [(f"{split}{i:05}_DFA_{EMOTIONS[i % 2]}_XX", EMOTIONS[i % 2]) for i in range(size)]
        for i, (clip, _) in enumerate(rows):
            frames, sound = folder / "Image-01-FPS" / clip, folder / "AudioWAV" / f"{clip}.wav"
            count = counts[i % len(counts)]
            write_clip(frames, sound, rng, count, *shape, names="{:05}.jpg", seconds=seconds)
        with open(folder / f"{split}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    return folder
