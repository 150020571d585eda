"""A dataset of your own, and its encoder, for any of the scripts: digits cut into two halves.

python examples/halves.py --epochs 5
"""

import sys
from functools import partial
from pathlib import Path

import torch
from sklearn.datasets import load_digits

sys.path.insert(0, str(Path(__file__).parent.parent))

import umt_ume
from common.command_line import run_command
from common.datasets import DATASETS, Dataset, Splits, TensorSplit
from common.networks.encoders import CNN, ENCODERS
from common.seeding import make_generator


def load(root, data_seed):
    """1,257 training, 180 validation and 360 test samples of 10 classes."""
    digits = load_digits()
    order = torch.randperm(len(digits.target), generator=make_generator(data_seed, "halves"))
    images = torch.from_numpy(digits.images).float().unsqueeze(1)[order] / 16
    labels = torch.from_numpy(digits.target).long()[order]

    def split(rows):
        halves = {"top": images[rows, :, :4], "bottom": images[rows, :, 4:]}  # (N, 1, 4, 8) each
        return TensorSplit(halves, labels[rows], render=dict)

    test, val, train = split(slice(360)), split(slice(360, 540)), split(slice(540, None))
    return Splits(train, val, val, test, modalities=("top", "bottom"), num_classes=10)


DATASETS["halves"] = Dataset(load, dials={})
ENCODERS["halves"] = partial(CNN, batch_norm=True, first_pool=False)

if __name__ == "__main__":
    run_command(lambda: umt_ume.main(["--dataset", "halves", *sys.argv[1:]]))
