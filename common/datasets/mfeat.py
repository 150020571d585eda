"""Multiple Features: handwritten digits as six views, each a set of features of the same image.

The digits are from Dutch utility maps; R.P.W. Duin made the views, UCI publishes them.
"""

from pathlib import Path

import numpy as np

from ..errors import UserError
from ..flags import Dial
from . import features
from .base import Splits
from .colored_digits import split_classes

VIEWS = {  # view -> numbers of a digit
    "fac": 216,  # profile correlations
    "fou": 76,  # Fourier coefficients of the shape
    "kar": 64,  # Karhunen-Loeve coefficients
    "mor": 6,  # morphological features
    "pix": 240,  # pixels, averages over windows of 2x3
    "zer": 47,  # Zernike moments
}
LABELS = np.arange(2000) // 200  # the order of the files
DIALS = {"views": Dial("fou,mor", str, f"modalities, of {', '.join(VIEWS)}; two or more (fou,mor)")}


def load(root, data_seed, views) -> Splits:
    """1,200 train, 200 val and 600 test digits of `root`/mfeat, each class in proportion.

    views: names with commas, such as "fou,zer,mor": the modalities in this order.
    """
    chosen = views.split(",")
    if len(set(chosen)) != len(chosen) or len(chosen) < 2 or not set(chosen) <= VIEWS.keys():
        known = ", ".join(VIEWS)
        raise UserError(f"--views takes two or more different ones of {known}, not {views!r}.")
    folder = Path(root) / "mfeat"
    arrays = {"labels": LABELS} | {view: read_view(folder, view) for view in chosen}
    parts = split_classes(LABELS, val=200, test=600, data_seed=data_seed)
    arrays = {f"{part}_{name}": x[i] for part, i in parts.items() for name, x in arrays.items()}
    return features.split_arrays(arrays, folder, data_seed)


def read_view(folder, view):
    """(2000, D) numbers of a file as data/prepare.py writes it: a header, the class at the end."""
    path = folder / f"mfeat-{view}.csv"
    command = f"`python data/prepare.py mfeat --out {folder}`"
    if not path.is_file():
        raise UserError(
            f"There is no {path}; run {command}, or name the folder above mfeat by --data-root."
        )
    try:
        lines = path.read_text(encoding="ascii").splitlines()[1:]
        table = np.array([line.split(",") for line in lines], dtype=float)
        if table.shape != (len(LABELS), VIEWS[view] + 1) or (table[:, -1] != LABELS).any():
            raise ValueError(f"not 2000 digits in order with {VIEWS[view]} numbers and the class")
    except (OSError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}); delete {folder}, run {command}.") from error
    return table[:, :-1]
