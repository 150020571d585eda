"""Shared by all tests: one thread, the repository on the path, and real data where it is."""

import os
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "data")]
torch.set_num_threads(1)

from common.networks import encoders  # noqa: E402

DATA_ROOT = Path(os.environ.get("DATA_ROOT", ROOT / "data"))
EVERY_DATASET = [  # every dataset, to parametrize end-to-end tests by
    *("digits", "synthetic", "features", "mfeat"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("cg-mnist", "av-digits")),
]
UNLISTED = {"mfeat"}  # datasets without a recipe: they have that of `features`
NEEDS = {
    "cg-mnist": DATA_ROOT / "MNIST" / "raw" / "train-images-idx3-ubyte",
    "av-digits": DATA_ROOT / "fsdd" / "recordings",
}


@pytest.fixture
def data_root():
    """Folder with the real data; `require` skips the test, with a reason, where it is absent."""
    return DATA_ROOT


@pytest.fixture
def require():
    def check(dataset):
        needed = [NEEDS[name] for name in NEEDS if name == dataset or dataset == "av-digits"]
        missing = [str(path) for path in needed if not path.exists()]
        if missing:
            pytest.skip(f"{dataset} needs {', '.join(missing)}; set DATA_ROOT")

    return check


@pytest.fixture(scope="session")
def features_file(tmp_path_factory):
    """A .npz for the dataset `features`: two modalities, ten classes."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, size in {"train": 600, "test": 120}.items():
        labels = rng.integers(10, size=size)
        codes = {"left": np.eye(6)[labels % 5], "right": np.eye(9)[labels % 9]}
        for m, code in codes.items():
            arrays[f"{split}_{m}"] = code + 0.3 * rng.standard_normal(code.shape)
        arrays[f"{split}_labels"] = labels
    path = tmp_path_factory.mktemp("features") / "small.npz"
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="session")
def mfeat_root(tmp_path_factory):
    """Views as data/prepare.py writes them, of noise; the first number is the digit's row."""
    rng, root = np.random.default_rng(0), tmp_path_factory.mktemp("views")
    (root / "mfeat").mkdir()
    for view, width in {"fou": 76, "mor": 6, "zer": 47}.items():
        rows = np.arange(2000)[:, None]
        table = np.hstack([rows, rng.standard_normal((2000, width - 1)), rows // 200])
        header, path = ",".join(map(str, [*range(width), 0])), root / "mfeat" / f"mfeat-{view}.csv"
        np.savetxt(path, table, "%.5G", ",", "\r\n", header, comments="")
    return root


@pytest.fixture
def root_of(data_root, features_file, mfeat_root):
    """dataset -> its `--data-root`."""
    return lambda dataset: str(
        {"features": features_file, "mfeat": mfeat_root}.get(dataset, data_root)
    )


class ThinResNet(encoders.Encoder):
    """In place of ResNet-18: as many stages, each of one convolution; features are (B, 16)."""

    def __init__(self, in_channels, pretrained=False):
        widths = (in_channels, 4, 4, 8, 8, 16)
        stages = [
            encoders.PerFrame(
                torch.nn.Conv2d(before, after, 3, stride=2, padding=1),
                torch.nn.BatchNorm2d(after),
                torch.nn.ReLU(),
            )
            for before, after in pairwise(widths)
        ]
        super().__init__(stages, encoders.MeanPool(), 16, widths[1:])


@pytest.fixture
def thin_resnet(monkeypatch):
    """Scripts train on clips and views in no time, and leave small checkpoints."""
    for name, encoder in list(encoders.ENCODERS.items()):
        if encoder is encoders.ResNet18:
            monkeypatch.setitem(encoders.ENCODERS, name, ThinResNet)
