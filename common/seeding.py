"""Random generators named by what they are for, so that no generator state has to be stored."""

import hashlib

import torch


def derive_seed(*key):
    """A 63-bit seed that depends on every part of `key` (numbers and words)."""
    digest = hashlib.sha256("/".join(map(str, key)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def make_generator(*key):
    """A CPU generator for one purpose, e.g. `make_generator(data_seed, "colors", "train")`."""
    return torch.Generator().manual_seed(derive_seed(*key))


def seed_phase(*key):
    """Start a phase of a run, usually `(seed, phase, epoch)`, and return its generator.

    Also seeds torch's global generators, on which dropout and initialisation draw. Because every
    epoch starts this way, a resumed run draws exactly what the uninterrupted run would have drawn.
    """
    torch.manual_seed(derive_seed(*key, "global"))
    return make_generator(*key)
