"""What lies in a folder of a dataset that stays in files: its samples, labels and splits.

A prepared folder has manifest.json, clips.csv, frames/<id>/0001.jpg, ... and audio/<id>.wav; see
data/README.md.
"""

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..errors import UserError
from ..seeding import derive_seed


class Listing(NamedTuple):
    """The samples of a dataset: all that grows with their number.

    ids: (N,) strings; labels: (N,) int64; counts: (N,) frames of each; splits: name -> rows (n,);
    version: changes with the files, where data/prepare.py does not look after the cache.
    """

    folder: Path
    frames: str
    audio: str
    classes: list
    ids: np.ndarray
    labels: torch.Tensor
    counts: np.ndarray
    splits: dict
    version: tuple = ()

    @property
    def digest(self):
        """Changes with the samples: part of the names of what is kept of them on disk."""
        return f"{derive_seed(*self.ids, *self.counts, *self.version):016x}"


def identify(name, root):
    """Tells folders apart: how they were split, and the start of their lists' SHA-256.

    None where there is nothing, or something damaged: `load` says what is wrong.
    """
    folder = Path(root) / name
    community = is_community(folder)
    lists = ("train.csv", "test.csv") if community else ("manifest.json", "clips.csv")
    try:
        contents = [(folder / file).read_bytes() for file in lists]
        manifest = {} if community else json.loads(contents[0])
        kind = "fake" if manifest.get("fake") else manifest.get("options", {}).get("split", "lists")
    except (OSError, ValueError, AttributeError):
        return None
    return f"{kind}-{hashlib.sha256(b''.join(contents)).hexdigest()[:8]}"


def is_community(folder):
    """Whether `folder` is the tree of OGM-GE's and PMR's users, not one of data/prepare.py."""
    return (folder / "Image-01-FPS").exists() and not (folder / "manifest.json").exists()


def read_listing(folder, name):
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
        with open(folder / "clips.csv", newline="", encoding="utf-8") as file:
            clips = list(csv.DictReader(file))
        numbers = {str(number): number for number in range(len(classes))}
        labels = [numbers[clip["label"]] for clip in clips]
        counts = [int(clip["frames"]) for clip in clips]
        ids = [clip["id"] for clip in clips]
        split = np.array([clip["split"] for clip in clips])
        if unknown := set(split.tolist()) - {"train", "val", "test"}:
            raise ValueError(f"no split is called {unknown.pop()}")
    except (OSError, ValueError, TypeError, KeyError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(
            f"manifest.json or clips.csv in {folder} is damaged ({reason}); run {command} again."
        ) from error
    splits = {part: np.flatnonzero(split == part) for part in ("train", "val", "test")}
    return make_listing(folder, "frames", "audio", classes, ids, labels, counts, splits)


def make_listing(folder, frames, audio, classes, ids, labels, counts, splits):
    """A `Listing`; UserError for a split without samples or a sample without frames."""
    for name, rows in splits.items():
        if len(rows) == 0:
            raise UserError(f"{folder} lists no {name} samples; prepare it anew.")
    empty = [id for id, count in zip(ids, counts, strict=True) if count < 1]
    if empty:
        raise UserError(
            f"{folder / frames} has no frames of {len(empty)} of {len(ids)} samples, such as "
            f"{empty[0]}; extract them, or take these samples out of the lists."
        )
    splits = {name: torch.as_tensor(rows) for name, rows in splits.items()}
    ids, counts = np.array(ids), np.array(counts)
    return Listing(folder, frames, audio, classes, ids, torch.tensor(labels), counts, splits)


def frame_names(folder):
    """Sorted names of the images in `folder`; none if it is not there."""
    try:
        names = os.listdir(folder)
    except OSError:
        return []
    return sorted(name for name in names if name.lower().endswith((".jpg", ".jpeg", ".png")))
