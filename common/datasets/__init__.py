"""Datasets by name. `load_dataset` gives train, val, val_iid and test splits of aligned modalities.

A new dataset is a function `load(root, data_seed, **dials) -> Splits` and a line in `DATASETS`.
"""

from collections.abc import Callable
from typing import NamedTuple

from ..errors import UserError
from . import av_digits, colored_digits
from .base import Splits, TensorSplit

__all__ = ["DATASETS", "Dataset", "Splits", "TensorSplit", "load_dataset"]


class Dataset(NamedTuple):
    """A loader and its dials: the keyword arguments a user may turn, with their defaults."""

    load: Callable
    dials: dict


DATASETS = {
    "digits": Dataset(colored_digits.load_digits, {"color_variance": 0.03}),
    "cg-mnist": Dataset(colored_digits.load_cg_mnist, {"color_variance": 0.03}),
    "av-digits": Dataset(av_digits.load, {"visual_energy": 0.25, "audio_snr": -9.0}),
}


def load_dataset(name, root="data", data_seed=0, train_samples=None, device="cpu", **dials):
    """Load dataset `name` and put its splits on `device`.

    data_seed:     governs split, colors, pairing and noise; not the seed of a training run.
    train_samples: caps the training split, and the others in proportion.
    dials:         see `DATASETS`; an unknown one raises UserError, as does an unknown name or data
                   that are not under `root`.
    """
    if name not in DATASETS:
        raise UserError(f"There is no dataset {name!r}; choose one of {', '.join(DATASETS)}.")
    unknown = set(dials) - set(DATASETS[name].dials)
    if unknown:
        flags = ", ".join("--" + dial.replace("_", "-") for dial in sorted(unknown))
        raise UserError(f"The dataset {name} has no dial {flags}; leave it out.")
    splits = DATASETS[name].load(root, data_seed, **{**DATASETS[name].dials, **dials})
    if train_samples is not None:
        splits = splits.capped(train_samples)
    return splits.map(lambda split: split.to(device))
