"""Datasets by name. `load_dataset` gives train, val, val_iid and test splits of aligned modalities.

A new dataset is a function `load(root, data_seed, **dials) -> Splits` and a line in `DATASETS`, and
one in `ENCODERS` of common/networks/encoders.py; docs/own_data.md shows it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from ..errors import UserError
from . import av_digits, clips, colored_digits, features, mfeat, synthetic, views
from .base import Splits, TensorSplit, split_folds

__all__ = ["DATASETS", "Dataset", "Splits", "TensorSplit", "load_dataset", "split_folds"]


class Dataset(NamedTuple):
    """A loader and what the command line must know of it.

    dials:     name -> Dial, the keyword arguments that a user may turn.
    small:     whether a script compares its methods here when none is named.
    own:       whether a user brings the data; `Splits.data` tells them apart.
    protocols: name -> flag -> what --protocol NAME sets it to.
    """

    load: Callable
    dials: dict
    small: bool = True
    own: bool = False
    protocols: dict = {}  # noqa: RUF012


def from_clips(name, num_frames, spectrogram):
    load, dials = partial(clips.load, name), clips.dials(num_frames, spectrogram)
    return Dataset(load, dials, small=False, own=True, protocols=clips.PROTOCOLS.get(name, {}))


DATASETS = {
    "digits": Dataset(colored_digits.load_digits, colored_digits.DIALS),
    "cg-mnist": Dataset(colored_digits.load_cg_mnist, colored_digits.DIALS, small=False),
    "av-digits": Dataset(av_digits.load, av_digits.DIALS),
    "synthetic": Dataset(synthetic.load, synthetic.DIALS),
    "mfeat": Dataset(mfeat.load, mfeat.DIALS),
    "features": Dataset(features.load, {}, own=True),
    "crema-d": from_clips("crema-d", num_frames=3, spectrogram="pmr-3s"),
    "ave": from_clips("ave", num_frames=4, spectrogram="pmr-10s"),
    "vggsound": from_clips("vggsound", num_frames=3, spectrogram="pmr-10s"),
    "modelnet40": Dataset(views.load, views.DIALS, small=False, own=True),
}


def load_dataset(
    name, root="data", data_seed=0, train_samples=None, device="cpu", num_workers=0, **dials
):
    """Load dataset `name` and put its splits on `device`.

    data_seed:     governs split, colors, pairing and noise; not the seed of a training run.
    train_samples: caps the training split, and the others in proportion.
    num_workers:   processes that read a dataset which stays in files; changes no result.
    dials:         see `DATASETS`; an unknown one raises UserError, as does an unknown name or data
                   that are not under `root`.
    """
    if name not in DATASETS:
        raise UserError(f"There is no dataset {name!r}; choose one of {', '.join(DATASETS)}.")
    unknown = set(dials) - set(DATASETS[name].dials)
    if unknown:
        flags = ", ".join("--" + dial.replace("_", "-") for dial in sorted(unknown))
        raise UserError(f"The dataset {name} has no dial {flags}; leave it out.")
    defaults = {dial: known.default for dial, known in DATASETS[name].dials.items()}
    splits = DATASETS[name].load(root, data_seed, **defaults | dials)
    if splits.loader is not None:
        splits.loader.num_workers = num_workers
    if train_samples is not None:
        splits = splits.capped(train_samples)
    return splits.map(lambda split: split.to(device))
