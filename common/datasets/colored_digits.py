"""Colored-and-gray digits: one digit image, seen in gray and on its own in one flat color.

The idea is that of Kim et al., "Learning Not to Learn" (CVPR 2019), whose MNIST version PMR and the
Greedy paper use; its generator was never released, and the rule here is the one commonly told. In
training a digit's color tells its class; in validation and test the mean color is drawn at random,
so that only the shape helps.
"""

import math
from pathlib import Path

import numpy as np
import torch
import torchvision
from sklearn.datasets import load_digits as load_scikit_digits
from sklearn.model_selection import train_test_split

from ..errors import UserError
from ..flags import SIZE, Dial
from ..seeding import derive_seed, make_generator
from .base import Splits, TensorSplit

MODALITIES = ("gray", "color")
DIALS = {"color_variance": Dial(0.03, SIZE, "variance of the colors (default: by script)")}

# RGB of the digits 0 to 9 in the authors' file, as its public users list them.
MEAN_COLORS = (
    torch.tensor(
        [
            (220, 20, 60),
            (0, 128, 128),
            (253, 233, 16),
            (0, 149, 182),
            (237, 145, 33),
            (145, 30, 188),
            (70, 240, 240),
            (250, 197, 187),
            (210, 245, 60),
            (128, 0, 0),
        ]
    )
    / 255
)


def render(rows):
    """uint8 images (B, H, W) and colors (B, 3) -> gray (B, 1, H, W) and color (B, 3, H, W)."""
    gray = rows["image"].unsqueeze(1) / 255
    return {"gray": gray, "color": gray * rows["color"][:, :, None, None]}


def draw_colors(digits, variance, generator):
    """One color per image, Normal(mean color of its digit, variance * I) cut to [0, 1]: (N, 3)."""
    noise = torch.randn(len(digits), 3, generator=generator)
    return (MEAN_COLORS[digits] + math.sqrt(variance) * noise).clamp(0, 1)


def color_splits(images, labels, variance, data_seed):
    """Color the images of train, val and test; `images` and `labels` are dicts by split name."""

    def split(name, rule):
        generator = make_generator(data_seed, "colors", name, rule)
        digits = labels[name]
        if rule == "random color":
            digits = torch.randint(0, 10, (len(digits),), generator=generator)
        colors = draw_colors(digits, variance, generator)
        return TensorSplit({"image": images[name], "color": colors}, labels[name], render)

    return Splits(
        train=split("train", "color of the digit"),
        val=split("val", "random color"),
        val_iid=split("val", "color of the digit"),
        test=split("test", "random color"),
        modalities=MODALITIES,
        num_classes=10,
    )


def split_classes(labels, val, test, data_seed):
    """split -> indices in random order, each class in proportion; val, test: their sizes."""
    seed = derive_seed(data_seed, "split") % 2**32
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=test, stratify=labels, random_state=seed
    )
    train, val = train_test_split(rest, test_size=val, stratify=labels[rest], random_state=seed)
    return {"train": train, "val": val, "test": test}


def load_digits(root, data_seed, color_variance):
    """scikit-learn's 1,797 handwritten digits of 8x8 pixels: 1,257 train, 180 val, 360 test.

    `root` is not used: the images come with scikit-learn.
    """
    data = load_scikit_digits()
    images = torch.from_numpy((data.images * 255 / 16).round().astype(np.uint8))
    labels = torch.from_numpy(data.target.astype(np.int64))
    parts = split_classes(labels, val=180, test=360, data_seed=data_seed)
    return color_splits(
        {name: images[part] for name, part in parts.items()},
        {name: labels[part] for name, part in parts.items()},
        color_variance,
        data_seed,
    )


def load_mnist(root, train):
    """torchvision's MNIST under `root`/MNIST/raw, downloaded there if it is missing.

    Returns uint8 images (N, 28, 28) and int64 labels (N,).
    """
    part, count = ("train", 60_000) if train else ("t10k", 10_000)
    raw = Path(root) / "MNIST" / "raw"
    names = [f"{part}-images-idx3-ubyte", f"{part}-labels-idx1-ubyte"]
    missing = [name for name in names if not (raw / name).exists()]
    try:
        mnist = torchvision.datasets.MNIST(root, train=train, download=bool(missing))
        if not len(mnist.data) == len(mnist.targets) == count:
            raise ValueError(f"{len(mnist.data)} images and {len(mnist.targets)} labels")
        if mnist.data.shape[1:] != (28, 28) or mnist.targets.max() > 9:
            raise ValueError("not digits of 28x28 pixels with labels from 0 to 9")
    except Exception as error:  # torchvision's reader raises nearly anything on damaged files
        reason = (str(error) or type(error).__name__).splitlines()[0]
        if missing:
            raise UserError(
                f"MNIST's {' and '.join(missing)} are not in {raw} and cannot be downloaded "
                f"({reason}); put the files there, or name the folder above MNIST by --data-root."
            ) from error
        raise UserError(
            f"MNIST's {' or '.join(names)} in {raw} is damaged ({reason}); delete both files and "
            "run again, or put good ones there."
        ) from error
    return mnist.data, mnist.targets


def load_cg_mnist(root, data_seed, color_variance):
    """Colored-and-gray MNIST: 50,000 train and 10,000 val of MNIST's training images, its test.

    Images stay uint8 and colors are one triple per image: a batch is colored when it is drawn.
    """
    images, labels = load_mnist(root, train=True)
    test_images, test_labels = load_mnist(root, train=False)
    order = torch.randperm(len(labels), generator=make_generator(data_seed, "split"))
    train, val = order[:50_000], order[50_000:]
    return color_splits(
        {"train": images[train], "val": images[val], "test": test_images},
        {"train": labels[train], "val": labels[val], "test": test_labels},
        color_variance,
        data_seed,
    )
