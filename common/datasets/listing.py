"""What lies in a folder of a dataset that stays in files: its samples, labels and splits.

A prepared folder has manifest.json, clips.csv, frames/<id>/0001.jpg, ... and audio/<id>.wav; see
data/README.md.
"""

import csv
import hashlib
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError
from .base import warn_of_shared

SHOWN = 5  # names in a sentence


class Listing(NamedTuple):
    """The samples of a dataset: all that grows with their number.

    audio: None where there is no sound; ids: (N,) strings; labels: (N,) int64; counts: (N,) frames
    of each; splits: name -> rows (n,); kind: how they were split; digest: changes with the lists
    and with the name, size or time of change of any file.
    """

    folder: Path
    frames: str
    audio: str | None
    classes: list
    ids: np.ndarray
    labels: torch.Tensor
    counts: np.ndarray
    splits: dict
    kind: str
    digest: str

    @property
    def data(self):
        """The name of the folder's content in the names of runs."""
        return f"{self.kind}-{self.digest[:8]}"


def is_community(folder):
    """Whether `folder` is the tree of OGM-GE's and PMR's users, not one of data/prepare.py."""
    return (folder / "Image-01-FPS").exists() and not (folder / "manifest.json").exists()


def read_listing(folder, name, audio="audio"):
    """The listing of a folder that `data/prepare.py` made of the dataset `name`."""
    command = f"`python data/prepare.py {name} --source DIR --out {folder}`"
    if not (folder / "manifest.json").exists():
        raise UserError(
            f"There is no prepared {name} in {folder}; run {command}, or name the folder above it "
            "by --data-root."
        )
    try:
        manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
        if (manifest["dataset"], manifest["format"]) != (name, 1):
            raise ValueError(f"it is of {manifest['dataset']}, format {manifest['format']}")
        classes = manifest["classes"]
        kind = "fake" if manifest.get("fake") else manifest.get("options", {}).get("split", "lists")
        if not re.fullmatch("[a-z]+", kind):  # it becomes part of a path
            raise ValueError(f"no rule of splitting is called {kind}")
        with open(folder / "clips.csv", newline="", encoding="utf-8") as file:
            clips = list(csv.DictReader(file))
        numbers = {str(number): number for number in range(len(classes))}
        labels = [numbers[clip["label"]] for clip in clips]
        counts = [int(clip["frames"]) for clip in clips]
        ids = [clip["id"] for clip in clips]
        split = np.array([clip["split"] for clip in clips])
        if unknown := set(split.tolist()) - {"train", "val", "test"}:
            raise ValueError(f"no split is called {unknown.pop()}")
    except Exception as error:  # a damaged file has many ways to fail
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"manifest.json or clips.csv in {folder} is damaged ({reason}); run {command} again."
        ) from error
    splits = {part: np.flatnonzero(split == part) for part in ("train", "val", "test")}
    layout, lists = ("frames", audio), ("manifest.json", "clips.csv")
    return make_listing(folder, layout, lists, classes, ids, labels, splits, kind, counts)


def make_listing(folder, layout, lists, classes, ids, labels, splits, kind="lists", counts=None):
    """A `Listing`; UserError for a split without samples or for files that are not there.

    layout: the folders of frames and of recordings; lists: names of the files that say the rest;
    counts: frames of each sample, None where no list has them.
    """
    frames, audio = layout
    for name, rows in splits.items():
        if len(rows) == 0:
            raise UserError(f"{folder} lists no {name} samples; prepare it anew.")
    ids = np.array(ids)
    warn_of_shared(f"samples of {folder}", {name: ids[rows] for name, rows in splits.items()})
    digest = hashlib.sha256(b"".join((folder / name).read_bytes() for name in lists))
    missing, found = [], []
    for row, id in enumerate(ids):
        images = describe_images(folder / frames / id)
        found.append(len(images))
        expected = max(1, counts[row] if counts else len(images))
        if len(images) != expected:
            missing.append(f"{frames}/{id} has {len(images)} of {expected} frames")
        digest.update(f"{id}{images}".encode())
        if audio:
            sound = describe_file(folder / audio / f"{id}.wav")
            missing += [] if sound else [f"no {audio}/{id}.wav"]
            digest.update(str(sound).encode())
    if missing:
        rest = f" and {len(missing) - SHOWN:,} more" if len(missing) > SHOWN else ""
        raise UserError(
            f"{folder} lacks {len(missing):,} of what its {len(ids):,} samples need: "
            f"{', '.join(missing[:SHOWN])}{rest}; prepare them anew, or take these samples out of "
            "the lists."
        )
    splits = {name: torch.as_tensor(rows) for name, rows in splits.items()}
    parts = ids, torch.tensor(labels), np.array(found), splits, kind, digest.hexdigest()[:16]
    return Listing(folder, *layout, classes, *parts)


def describe_file(path):
    """(size, time of change) of a file; None if it is not there, or empty."""
    with suppress(OSError, ValueError):  # ValueError: of a name that no file can have
        found = path.stat()
        return (found.st_size, found.st_mtime_ns) if found.st_size else None


def describe_images(folder):
    """Sorted [(name, size, time of change)] of the images in `folder`; none if it is not there."""
    with suppress(OSError, ValueError), os.scandir(folder) as entries:
        found = [(entry.name, entry.stat()) for entry in entries if is_image(entry.name)]
        return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found)
    return []


def is_image(name):
    """Whether a file's name is that of a frame: what begins with a dot is left by a system."""
    return name.lower().endswith((".jpg", ".jpeg", ".png")) and not name.startswith(".")


def frame_names(folder):
    """Sorted names of the images in `folder`; none if it is not there."""
    try:
        return sorted(filter(is_image, os.listdir(folder)))
    except OSError:
        return []
