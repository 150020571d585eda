"""Shared by all tests: one thread, the repository on the path, and real data where it is."""

import os
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1)

DATA_ROOT = Path(os.environ.get("DATA_ROOT", ROOT / "data"))
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
