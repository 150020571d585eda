"""Your own features: vectors of any number of modalities from one .npz file.

The file holds arrays `train_<modality>` (N, D) and `train_labels` (N,), whole numbers from 0, and
the same for `test`; `val_...` too, or a tenth of the training data is drawn for it. Modalities are
in the order in which the file names them.
"""

import hashlib
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from ..errors import UserError
from ..seeding import make_generator
from .base import Splits, TensorSplit

RESERVED = ("accuracy", "d_util", "index", "label", "logits", "loss", "macro_f1", "slices")
RESERVED += ("training",)


def identify(path):
    """<name of the file>-<start of its SHA-256>."""
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}); give a .npz file as --data-root."
        ) from error
    return f"{Path(path).stem}-{hashlib.sha256(content).hexdigest()[:8]}"


def load(root, data_seed):
    """The splits of the file `root`."""
    return split_arrays(read(root), root, data_seed)


def split_arrays(arrays, root, data_seed):
    """Every feature is brought to mean 0 and variance 1 over the training data.

    Training samples are shuffled, so that a cap does not cut off classes; test stays in order.
    arrays: as a file holds them, by name; root: where they are from, for messages.
    """
    modalities = [name.removeprefix("train_") for name in arrays if name.startswith("train_")]
    modalities = [m for m in modalities if m != "labels"]
    if not modalities:
        raise UserError(f"{root} holds no array train_<modality>.")
    for m in modalities:
        taken = m in RESERVED or m.startswith("_") or hasattr(nn.ModuleDict, m)
        if taken or not m.isidentifier():
            raise UserError(f"{m!r} in {root} cannot be a modality's name; call it something else.")
    known = {f"{part}_{m}" for part in ("train", "val", "test") for m in (*modalities, "labels")}
    for name in arrays:
        if name not in known or (name.startswith("val_") and "val_labels" not in arrays):
            raise UserError(f"{root} holds an array {name} that belongs to no modality and split.")
    present = ["train", "val", "test"] if "val_labels" in arrays else ["train", "test"]
    parts = {name: read_split(arrays, name, modalities, root) for name in present}
    size = len(parts["train"]["labels"])
    order = torch.randperm(size, generator=make_generator(data_seed, "validation"))
    if "val" not in parts:
        cut = max(1, size // 10)
        if cut == size:
            raise UserError(f"{root} holds one training sample, and none for validation.")
        parts["val"] = {name: x[order[:cut]] for name, x in parts["train"].items()}
        order = order[cut:]
    parts["train"] = {name: x[order] for name, x in parts["train"].items()}
    for m in modalities:
        train = parts["train"][m]
        mean, std = train.double().mean(dim=0), train.double().std(dim=0, correction=0)
        std = torch.where(std > 0, std, 1.0)
        for part in parts.values():
            part[m] = ((part[m] - mean) / std).float()
    splits = {
        name: TensorSplit({m: part[m] for m in modalities}, part["labels"], dict)
        for name, part in parts.items()
    }
    classes = max(int(split.labels.max()) for split in splits.values()) + 1
    if classes > sum(map(len, splits.values())):
        raise UserError(f"A label in {root} is {classes - 1}; number the classes without gaps.")
    return Splits(
        **splits, val_iid=splits["val"], modalities=tuple(modalities), num_classes=classes
    )


def read(path):
    """The arrays of the file by name."""
    try:
        with np.load(path) as arrays:
            return dict(arrays)
    except Exception as error:  # a file of another kind has many ways to fail
        raise UserError(f"{path} is not a .npz file of plain arrays ({error}).") from error


def read_split(arrays, split, modalities, path):
    """modality -> (N, D) float32, and `labels` (N,) int64."""

    def array(name):
        if name not in arrays:
            raise UserError(f"{path} holds no array {name}; it has {', '.join(arrays)}.")
        return arrays[name]

    labels = array(f"{split}_labels")
    whole = labels.ndim == 1 and labels.dtype.kind in "iu" and len(labels) > 0
    if not whole or labels.astype(np.int64).min() < 0:
        raise UserError(f"{split}_labels in {path} must be whole numbers from 0, one a sample.")
    part = {"labels": torch.from_numpy(labels.astype(np.int64))}
    for m in modalities:
        x = array(f"{split}_{m}")
        width = arrays[f"train_{m}"].shape[1:]
        if x.dtype.kind not in "fiu" or x.ndim != 2 or x.shape != (len(labels), *width):
            raise UserError(
                f"{split}_{m} in {path} must be numbers of shape ({len(labels)}, D), a row for "
                f"each label and as wide as train_{m}; it is {x.dtype} of shape {x.shape}."
            )
        with np.errstate(over="ignore"):
            part[m] = torch.from_numpy(x.astype(np.float32))
        if not part[m].isfinite().all():
            raise UserError(f"{split}_{m} in {path} holds NaN, infinite or too large numbers.")
    return part
