"""Splits of a dataset that stays in files: processes read batches, the device makes them floats."""

from collections.abc import Callable
from functools import partial

import torch
from torch.utils.data import DataLoader

from ..errors import UserError
from ..seeding import make_generator
from .base import Splits, TensorSplit

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet, in RGB


class Pass:
    """The sampler of a DataLoader that is used again and again: the requests of the present pass.

    A cycle of references to the DataLoader would make its processes wait when they are to end.
    """

    requests = ()

    def __iter__(self):
        return iter(self.requests)


class Loader:
    """Reads requests from `files` in `num_workers` processes, which all splits share.

    The processes stay alive from epoch to epoch. Two passes at a time do not disturb each other:
    the second one starts its own.
    """

    def __init__(self, files):
        self.files, self.num_workers = files, 0
        self.current, self.shared, self.busy = Pass(), None, False

    def read(self, requests, pin_memory):
        """Yield `files[request]` for every one of `requests`, in order."""
        open_loader = partial(
            DataLoader,
            self.files,
            batch_size=None,  # a request is a whole batch
            num_workers=self.num_workers,
            pin_memory=pin_memory,
            generator=torch.Generator(),  # else it draws, for nothing, on torch's global one
        )
        if self.busy or self.num_workers == 0:
            yield from open_loader(sampler=requests)
            return
        if self.shared is None:
            self.shared = open_loader(sampler=self.current, persistent_workers=True)
        self.current.requests, self.busy = requests, True
        try:
            yield from self.shared
        finally:
            self.busy = False


class FileSplit(TensorSplit):
    """A split whose tensors only say which `row` of the files a sample is; see `TensorSplit`.

    render: what `Files` gives for a batch, on the device -> inputs, modality -> (B, C, ...) float.
    """

    augmented = True

    def __init__(self, loader, rows, labels, render: Callable):
        super().__init__({"row": rows}, labels, render)
        self.loader = loader

    def batches(self, batch_size, generator=None, augment=False):
        """As `TensorSplit.batches`; `augment` draws frames, crop and flip, also by `generator`."""
        order, device = self.shuffled(generator), self.index.device
        rows, seeds = self.tensors["row"][order].cpu(), None
        if augment:  # before the first batch: others may draw on the generator later
            seeds = torch.randint(2**62, (len(self),), generator=generator)
        parts = (slice(i, i + batch_size) for i in range(0, len(self), batch_size))
        requests = ((rows[p].tolist(), None if seeds is None else seeds[p].tolist()) for p in parts)
        batches = self.loader.read(requests, pin_memory=device.type == "cuda")
        for index, batch in zip(order.split(batch_size), batches, strict=True):
            if isinstance(batch, UserError):
                batches.close()
                self.loader.shared = None  # ends its processes, which a traceback would keep
                raise batch
            batch = {name: x.to(device, non_blocking=True) for name, x in batch.items()}
            yield self.render(batch), self.all_labels[index], index


def normalize_frames(frames):
    """(B, N, S, S, 3) uint8 -> (B, 3, N, S, S) float32 in ImageNet's mean and standard deviation.

    In memory the channels stay last.
    """
    shape = frames.shape
    x = frames.flatten(-2).float()  # (B, N, S, 3 S): rows are long enough for vector instructions
    mean, std = (x.new_tensor(value).mul(255).repeat(shape[3]) for value in (MEAN, STD))
    return x.sub_(mean).div_(std).view(shape).permute(0, 4, 1, 2, 3)


def make_splits(listing, files, render, modalities, data_seed):
    """Splits in random order, for `head` takes the first; val is val_iid."""
    loader = Loader(files)

    def split(name):
        rows = listing.splits[name]
        rows = rows[torch.randperm(len(rows), generator=make_generator(data_seed, name))]
        return FileSplit(loader, rows, listing.labels[rows], render)

    train, val, test = (split(name) for name in ("train", "val", "test"))
    return Splits(train, val, val, test, modalities, len(listing.classes), loader)
