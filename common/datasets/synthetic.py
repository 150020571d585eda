"""Synthetic features with dials: what one modality shows alone, and what only both show together.

Each modality is a vector of 120 numbers in which code vectors of the class may be added to noise:

    easy    large and often there, the same for training and test: learnt first
    hard    small, but there in nearly every sample: worth learning, and learnt last
    paired  tells the class only when both modalities are seen

    x_m = noise * N(0, I) + [u < easy_m] easy_size e_y + [u < hard] hard_size_m h_y + paired part

A network that stops learning once the easy features have fitted the training data never gets to the
hard ones ("modality laziness", Du et al., ICML 2023). The construction and its numbers are this
project's, not the paper's.
"""

import torch

from ..errors import UserError
from ..flags import SHARE, SIZE, Dial, number
from ..seeding import make_generator
from .base import Splits, TensorSplit

MODALITIES = ("first", "second")
CLASSES, WIDTH = 10, 120
HELD_OUT = {"val": 1000, "test": 4000}

# Named settings of the dials. O, N: paired features add little; T, Q: all that some samples show.
CONFIGURATIONS = {
    "O": {"samples": 1500, "easy": (0.8, 0.6), "hard": 0.95, "hard_size": (0.9, 0.9)}
    | {"pair_size": 0.5, "nuisance": 0.7, "pair_only": 0.0, "augment": 0.2},
    "N": {"samples": 2000, "easy": (0.9, 0.5), "hard": 0.9, "hard_size": (0.9, 1.1)}
    | {"pair_size": 0.8, "nuisance": 1.0, "pair_only": 0.0, "augment": 0.3},
    "T": {"samples": 2000, "easy": (0.7, 0.4), "hard": 0.95, "hard_size": (0.9, 1.0)}
    | {"pair_size": 6.0, "nuisance": 0.5, "pair_only": 0.05, "augment": 0.3},
    "Q": {"samples": 2500, "easy": (0.8, 0.6), "hard": 0.95, "hard_size": (0.9, 0.9)}
    | {"pair_size": 5.0, "nuisance": 0.7, "pair_only": 0.2, "augment": 0.3},
}
PAIRS = ("suppressor", "sum-mod")
COUNT = number(int, 1, 10**6)
FINE = {  # None: as the configuration says; each is a flag, too many for --help
    "easy_1": Dial(None, SHARE, "share of samples with the first modality's easy feature", False),
    "easy_2": Dial(None, SHARE, "and with the second's", False),
    "hard": Dial(None, SHARE, "share of samples with a modality's hard feature", False),
    "hard_size_1": Dial(None, SIZE, "size of the first modality's hard features", False),
    "hard_size_2": Dial(None, SIZE, "and of the second's", False),
    "nuisance": Dial(None, SIZE, "what hides a suppressor pair from one modality", False),
    "noise": Dial(0.4, SIZE, "standard deviation of the noise", False),
    "augment": Dial(None, SIZE, "that of fresh noise in every training batch", False),
    "easy_size": Dial(6.0, SIZE, "size of the easy features", False),
    "pair_size": Dial(None, SIZE, "size of the paired features", False),
    "samples": Dial(None, COUNT, "training samples", False),
}
DIALS = {
    "configuration": Dial(
        "N", str, "O, N, T or Q: sets all dials, also those that only synthetic.py lists (N)"
    ),
    "pair_type": Dial("suppressor", str, "suppressor or sum-mod (suppressor)"),
    "pair_only": Dial(None, SHARE, "share of samples with paired features only; 0: all have them"),
    **FINE,
}


def resolve(dials):
    """All dials with a value, those left at None from the configuration."""
    if dials["configuration"] not in CONFIGURATIONS:
        names = ", ".join(CONFIGURATIONS)
        raise UserError(f"No configuration {dials['configuration']!r}; choose from {names}.")
    if dials["pair_type"] not in PAIRS:
        raise UserError(f"No pair type {dials['pair_type']!r}; choose from {', '.join(PAIRS)}.")
    chosen = {}
    for name, value in CONFIGURATIONS[dials["configuration"]].items():
        if isinstance(value, tuple):
            chosen |= {f"{name}_{i}": x for i, x in enumerate(value, start=1)}
        else:
            chosen[name] = value
    return chosen | {name: value for name, value in dials.items() if value is not None}


def draw_codes(data_seed):
    """(3, C, 120) orthonormal code vectors for each modality: easy, hard and paired ones."""
    codes = []
    for m in MODALITIES:
        random = torch.randn(WIDTH, WIDTH, generator=make_generator(data_seed, "codes", m))
        orthonormal, _ = torch.linalg.qr(random)
        codes.append(orthonormal.T[: 3 * CLASSES].unflatten(0, (3, CLASSES)))
    return codes


def draw_split(name, size, codes, dials, data_seed):
    """One split, with the slices `no-easy` (no easy feature) and `pair-only` (nothing else)."""
    generator = make_generator(data_seed, name)

    def share(probability):
        return torch.rand(size, generator=generator) < probability

    y = torch.randint(CLASSES, (size,), generator=generator)
    pair_only = share(dials["pair_only"])
    has_pair = pair_only if dials["pair_only"] > 0 else torch.ones(size, dtype=torch.bool)
    pairs = draw_pairs(y, dials, generator)
    tensors, any_easy = {}, torch.zeros(size, dtype=torch.bool)
    for i, m in enumerate(MODALITIES):
        easy_code, hard_code, pair_code = codes[i]
        easy = share(dials[f"easy_{i + 1}"]) & ~pair_only
        hard = share(dials["hard"]) & ~pair_only
        x = dials["noise"] * torch.randn(size, WIDTH, generator=generator)
        x += dials["easy_size"] * easy.unsqueeze(1) * easy_code[y]
        x += dials[f"hard_size_{i + 1}"] * hard.unsqueeze(1) * hard_code[y]
        x += dials["pair_size"] * has_pair.unsqueeze(1) * (pairs[i] @ pair_code)
        tensors[m] = x
        any_easy |= easy
    slices = {"no-easy": ~any_easy & ~pair_only, "pair-only": pair_only}
    return TensorSplit(tensors, y, dict, augment=add_noise(dials["augment"]), slices=slices)


def draw_pairs(y, dials, generator):
    """Coefficients (N, C) of the pair codes in each modality.

    suppressor: (y + nuisance n, nuisance n) with n ~ N(0, I). The second alone is independent of y
                and tells what to subtract from the first, where n hides y: the more, the larger
                `nuisance`. A linear head on both can do it.
    sum-mod:    (s, y - s mod C) with s uniform: either alone is independent of y, and no linear
                head on both can add up to y.
    """
    if dials["pair_type"] == "sum-mod":
        s = torch.randint(CLASSES, y.shape, generator=generator)
        codes = torch.eye(CLASSES)
        return codes[s], codes[(y - s) % CLASSES]
    nuisance = dials["nuisance"] * torch.randn(len(y), CLASSES, generator=generator)
    return torch.eye(CLASSES)[y] + nuisance, nuisance


def add_noise(size):
    """The augmentation of training batches: fresh noise of standard deviation `size`, or None."""

    def augment(inputs, generator):
        return {
            m: x + size * torch.randn(x.shape, generator=generator).to(x.device)
            for m, x in inputs.items()
        }

    return augment if size > 0 else None


def load(root, data_seed, **dials):
    """Training samples as the dial `samples` says, 1,000 for validation and 4,000 for test."""
    dials = resolve(dials)
    codes = draw_codes(data_seed)
    splits = {
        name: draw_split(name, size, codes, dials, data_seed)
        for name, size in {"train": dials["samples"], **HELD_OUT}.items()
    }
    return Splits(**splits, val_iid=splits["val"], modalities=MODALITIES, num_classes=CLASSES)
