"""Your own features: vectors of any number of modalities from one .npz file.

The file holds arrays `train_<modality>` (N, D) and `train_labels` (N,), whole numbers from 0, and
the same for `test`; `val_...` too, or a tenth of the training data is drawn for it: whole groups,
where `train_groups` (N,) says who or what a sample comes from. Modalities are in the order in which
the file names them.
"""

import hashlib
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from ..errors import UserError
from ..seeding import make_generator
from .base import Splits, TensorSplit, warn_of_shared

RESERVED = ("accuracy", "d_util", "index", "label", "logits", "loss", "macro_f1", "slices")
RESERVED += ("training",)
MAX_PACKED = 100  # times as large as its file may unpacked arrays be, of more than a gigabyte
FAR = 1e9  # standard deviations; the squares of a network's features stay finite


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
    data = identify(root)
    return replace(split_arrays(read(root), root, data_seed), data=data)


def split_arrays(arrays, root, data_seed):
    """Every feature is brought to mean 0 and variance 1 over the training data.

    Training samples are shuffled, so that a cap does not cut off classes; test stays in order.
    arrays: as a file holds them, by name; root: where they are from, for messages.
    """
    modalities = [name.removeprefix("train_") for name in arrays if name.startswith("train_")]
    modalities = tuple(m for m in modalities if m not in ("labels", "groups"))
    if not modalities:
        raise UserError(f"{root} holds no array train_<modality>.")
    for m in modalities:
        taken = m in RESERVED or m.startswith("_") or hasattr(nn.ModuleDict, m)
        if taken or not m.isidentifier():
            raise UserError(f"{m!r} in {root} cannot be a modality's name; call it something else.")
    names = (*modalities, "labels", "groups")
    known = {f"{part}_{name}" for part in ("train", "val", "test") for name in names}
    for name in arrays:
        if name not in known or (name.startswith("val_") and "val_labels" not in arrays):
            raise UserError(f"{root} holds an array {name} that belongs to no modality and split.")
    present = ["train", "val", "test"] if "val_labels" in arrays else ["train", "test"]
    parts = {name: read_split(arrays, name, modalities, root) for name in present}
    groups = {name: read_groups(arrays, name, parts[name]["labels"], root) for name in present}
    warn_of_shared(f"groups of {root}", groups)
    size = len(parts["train"]["labels"])
    order = torch.randperm(size, generator=make_generator(data_seed, "validation"))
    if "val" not in parts:
        own = groups["train"] or range(size)  # a group for every sample
        val = draw_groups([own[i] for i in order.tolist()])
        if val.all():
            noun = "group" if groups["train"] else "sample"
            raise UserError(f"{root} holds one training {noun}, and none for validation.")
        parts["val"] = {name: x[order[val]] for name, x in parts["train"].items()}
        order = order[~val]
    parts["train"] = {name: x[order] for name, x in parts["train"].items()}
    for m in modalities:
        standardize(parts, m, root)
    splits = {
        name: TensorSplit({m: part[m] for m in modalities}, part["labels"], dict)
        for name, part in parts.items()
    }
    classes = count_classes(splits, root)
    return Splits(**splits, val_iid=splits["val"], modalities=modalities, num_classes=classes)


def read(path):
    """The arrays of the file by name."""
    try:
        with np.load(path) as arrays:
            size = sum(member.file_size for member in arrays.zip.infolist())
            if size > max(1e9, MAX_PACKED * Path(path).stat().st_size):
                raise ValueError(f"it unpacks to {size:,} bytes; if that is right, use np.savez")
            found = dict(arrays)
        for name, x in found.items():
            if not isinstance(x, np.ndarray):  # numpy gives the bytes of any other file in the .zip
                raise ValueError(f"{name} in it is none")
        return found
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
        shape = (len(labels), *width)
        if x.dtype.kind not in "fiu" or x.ndim != 2 or x.shape != shape or x.size == 0:
            raise UserError(
                f"{split}_{m} in {path} must be numbers of shape ({len(labels)}, D), a row for "
                f"each label and as wide as train_{m}; it is {x.dtype} of shape {x.shape}."
            )
        with np.errstate(over="ignore"):
            part[m] = torch.from_numpy(x.astype(np.float32))
        if not part[m].isfinite().all():
            raise UserError(f"{split}_{m} in {path} holds NaN, infinite or too large numbers.")
    return part


def read_groups(arrays, split, labels, path):
    """Who or what each sample of a split comes from: (N,) numbers or words; () if not said."""
    if f"{split}_groups" not in arrays:
        return ()
    groups = arrays[f"{split}_groups"]
    if groups.shape != labels.shape or groups.dtype.kind not in "iuUS":
        raise UserError(
            f"{split}_groups in {path} must be whole numbers or words, one for each label."
        )
    return groups.tolist()


def standardize(parts, m, path):
    """Bring modality `m` of all parts to mean 0 and variance 1 over the training data, in place."""
    train = parts["train"][m]
    mean, std = train.double().mean(dim=0), train.double().std(dim=0, correction=0)
    std = torch.where(std > 0, std, 1.0)
    for name, part in parts.items():
        part[m] = ((part[m] - mean) / std).float()
        if part[m].abs().max() > FAR:
            raise UserError(
                f"{name}_{m} in {path} has a number more than {FAR:g} standard deviations of that "
                "feature's training data from their mean; correct it, or leave the feature out."
            )


def count_classes(splits, path):
    """C, where the labels of all splits together are 0 to C - 1; UserError for others."""
    labels = torch.cat([split.labels for split in splits.values()]).unique().tolist()
    count = len(labels)
    if labels[-1] != count - 1:
        shown = ", ".join(map(str, labels[:10])) + ", ..." * (count > 10)
        raise UserError(
            f"The labels in {path} are {shown}; number these {count} classes from 0 to "
            f"{count - 1}, as the second part of np.unique(labels, return_inverse=True) does."
        )
    return count


def draw_groups(groups):
    """(N,) bool: whole groups, in the order in which they come, that hold a tenth of the samples.

    Those that would make it more are left out; if all would, the smallest one is it.
    """
    sizes, chosen, left = Counter(groups), set(), max(1, len(groups) // 10)
    for group, size in sizes.items():
        if size <= left:
            chosen.add(group)
            left -= size
    chosen = chosen or {min(sizes, key=sizes.get)}
    return torch.tensor([group in chosen for group in groups])
