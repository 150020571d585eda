"""Splits of a dataset that fits in memory: tensors on the device, a batch is an index into them."""

from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from itertools import combinations

import torch

from ..errors import warn


class TensorSplit:
    """Samples of one split, all on one device.

    tensors: raw storage, name -> (N, ...); several samples share whatever `render` derives.
    labels:  (N,) int64.
    render:  turns raw rows, name -> (B, ...), into inputs, modality -> (B, C, H, W) float in
             [0, 1] or any other range: every encoder for images starts with a BatchNorm of them.
    augment: (inputs, generator) -> inputs with random changes, for training; None: there are none.
    slices:  name -> (N,) bool, named parts of the split that results are reported for.
    """

    def __init__(
        self,
        tensors: dict,
        labels: torch.Tensor,
        render: Callable,
        index=None,
        augment: Callable | None = None,
        slices: dict | None = None,
    ):
        self.tensors, self.all_labels, self.render = tensors, labels, render
        self.index = torch.arange(len(labels), device=labels.device) if index is None else index
        self.augment, self.all_slices = augment, slices or {}

    def __len__(self):
        return len(self.index)

    @property
    def labels(self):
        """(len(self),) int64, in the order of `batches` without a generator."""
        return self.all_labels[self.index]

    @property
    def augmented(self):
        """Whether training batches differ from epoch to epoch."""
        return self.augment is not None

    @property
    def slices(self):
        """name -> (len(self),) bool, in the same order."""
        return {name: mask[self.index] for name, mask in self.all_slices.items()}

    def subset(self, positions):
        """The samples at `positions` of this split; their `index` stays that of the parent."""
        positions = torch.as_tensor(positions, device=self.index.device)
        return self.stored(lambda tensor: tensor, self.index[positions])

    def head(self, count):
        """A split of the first `count` samples, which the loaders store in no order of classes."""
        return self.stored(lambda tensor: tensor[:count])

    def to(self, device):
        """The same split with its storage on `device`."""
        return self.stored(lambda tensor: tensor.to(device), self.index.to(device))

    def stored(self, change, index=None, render=None):
        """This split with `change` applied to whatever it stores, and perhaps another `render`."""
        split = copy(self)
        split.tensors = {name: change(tensor) for name, tensor in self.tensors.items()}
        split.all_slices = {name: change(mask) for name, mask in self.all_slices.items()}
        split.all_labels, split.render = change(self.all_labels), render or self.render
        if index is None:
            index = torch.arange(len(split.all_labels), device=split.all_labels.device)
        split.index = index
        return split

    def shuffled(self, generator):
        """`index`, in a random order if a CPU `generator` is given."""
        if generator is None:
            return self.index
        order = torch.randperm(len(self), generator=generator)
        return self.index[order.to(self.index.device)]

    def batches(self, batch_size, generator=None, augment=False):
        """Yield (inputs, labels, index), shuffled if a CPU `generator` is given.

        inputs: modality -> (B, ...); labels, index: (B,) int64, index = position in the split
        (of the parent for a `subset`). `augment`: with the split's random changes, if it has any.
        """
        for index in self.shuffled(generator).split(batch_size):
            rows = {name: tensor[index] for name, tensor in self.tensors.items()}
            inputs = self.render(rows)
            if augment and self.augment:
                inputs = self.augment(inputs, generator)
            yield inputs, self.all_labels[index], index


@dataclass
class Splits:
    """Train, validation and test of one dataset.

    val follows the test distribution; val_iid holds the same items under the training rule, where
    the two differ (colors), and is `val` itself elsewhere. data: a name for what a user brought,
    another one as soon as a file is changed.
    """

    train: TensorSplit
    val: TensorSplit
    val_iid: TensorSplit
    test: TensorSplit
    modalities: tuple[str, ...]
    num_classes: int
    loader: object = None  # of a dataset that stays in files: has the number of workers
    data: str | None = None

    NAMES = ("train", "val", "val_iid", "test")

    @property
    def sizes(self):
        """Samples in each split."""
        return {name: len(getattr(self, name)) for name in self.NAMES}

    @property
    def shapes(self):
        """Shape of one input of each modality, e.g. {"gray": (1, 28, 28)}."""
        inputs, _, _ = next(iter(self.train.batches(1)))
        return {modality: tuple(x.shape[1:]) for modality, x in inputs.items()}

    def capped(self, train_samples):
        """At most `train_samples` training samples, and the other splits in proportion."""
        share = min(1.0, train_samples / len(self.train))
        return self.map(lambda split: split.head(max(1, round(share * len(split)))))

    def map(self, function):
        """Apply `function` to every split."""
        return replace(self, **{name: function(getattr(self, name)) for name in self.NAMES})

    def doubled(self, modality):
        """The same splits with `modality` and its copy, named `<modality>-2`, in place of all."""
        names = (modality, f"{modality}-2")

        def twice(inputs):
            return dict.fromkeys(names, inputs[modality])

        def double(split):
            found = split.stored(
                lambda tensor: tensor, split.index, lambda x: twice(split.render(x))
            )
            if split.augment:  # changes at random, the same ones in both
                found.augment = lambda inputs, generator: twice(
                    split.augment({modality: inputs[modality]}, generator)
                )
            return found

        return replace(self.map(double), modalities=names)


def warn_of_shared(what, members):
    """Say which of `what` are in two splits; members: split -> their names."""
    for one, other in combinations(members, 2):
        if shared := sorted({*members[one]} & {*members[other]}):
            warn(
                f"{len(shared):,} of the {what} are in {one} and in {other}, such as {shared[0]}; "
                "what is measured there says little about unseen ones."
            )


def split_folds(order, num_folds):
    """K pairs (all folds but the k-th, fold k); sizes of folds differ by one at most.

    order: (N,) samples in random order. The second parts are disjoint and together everything.
    """
    folds = order.tensor_split(num_folds)
    return [(torch.cat(folds[:k] + folds[k + 1 :]), folds[k]) for k in range(num_folds)]
