"""Splits of a dataset that stays in files: processes read batches, the device makes them floats."""

import math
import shutil
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from itertools import islice

import torch
from torch.utils.data import DataLoader

from ..errors import UserError
from ..seeding import make_generator
from .base import Splits, TensorSplit
from .files import MORE_SHARED_MEMORY

AT_A_TIME = 64  # samples that a process reads; a larger batch is put together of several
AHEAD = 2  # such reads of each process wait for their turn
LONGEST_WAIT = 600  # seconds for a read
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

    def check_shared_memory(self):
        """UserError if not all that the processes read ahead fits into it."""
        reads = AHEAD * self.num_workers + 5  # evaluation puts a batch together of four
        count = min(AT_A_TIME, len(self.files.listing.ids))
        needed = reads * self.files.num_bytes(count) / 1e6
        with suppress(OSError):  # other systems have another place for it
            free = shutil.disk_usage("/dev/shm").free / 1e6
            if free < needed:
                raise UserError(
                    f"{self.num_workers} processes that read files need {needed:,.0f} MB of shared "
                    f"memory, and /dev/shm has {free:,.0f} MB free; {MORE_SHARED_MEMORY}"
                )

    def read(self, requests, pin_memory):
        """Yield `files[request]` for every one of `requests`, in order."""
        if self.num_workers:
            self.check_shared_memory()
        try:
            yield from self.pass_on(requests, pin_memory)
        except RuntimeError as error:
            if "timed out" not in str(error):
                raise
            self.shared = None
            raise UserError(
                f"Nothing came from the processes that read files for {LONGEST_WAIT} s; if not the "
                f"disk but shared memory is short, {MORE_SHARED_MEMORY}"
            ) from error

    def pass_on(self, requests, pin_memory):
        open_loader = partial(
            DataLoader,
            self.files,
            batch_size=None,  # a request is a whole batch
            num_workers=self.num_workers,
            prefetch_factor=AHEAD if self.num_workers else None,
            timeout=LONGEST_WAIT if self.num_workers else 0,
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
        parts = [p for b in torch.arange(len(self)).split(batch_size) for p in b.split(AT_A_TIME)]
        requests = ((rows[p].tolist(), None if seeds is None else seeds[p].tolist()) for p in parts)
        pieces = self.loader.read(requests, pin_memory=device.type == "cuda")
        for index in order.split(batch_size):
            found = list(islice(pieces, math.ceil(len(index) / AT_A_TIME)))
            if errors := [piece for piece in found if isinstance(piece, UserError)]:
                pieces.close()
                self.loader.shared = None  # ends its processes, which a traceback would keep
                raise errors[0]
            found = [{m: x.to(device, non_blocking=True) for m, x in p.items()} for p in found]
            batch = found[0]
            if len(found) > 1:
                batch = {name: torch.cat([piece[name] for piece in found]) for name in batch}
            yield self.render(batch), self.all_labels[index], index
        next(pieces, None)  # the pass is over


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
    classes, data = len(listing.classes), listing.data
    return Splits(train, val, val, test, modalities, classes, loader, data)
