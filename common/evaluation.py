"""Totals of an epoch, predictions of a whole split, and what is measured on them."""

from contextlib import suppress

import torch

from .device import forward
from .metrics import accuracy, linear_probe
from .tasks import Classification


class Totals:
    """Sums over the samples of an epoch, on the device until `means` is asked for.

    names: of what is added; what ends in "accuracy" is given as a number of correct samples, others
    as means over the batch.
    """

    def __init__(self, names, device):
        self.names, self.sums = names, torch.zeros(1 + len(names), device=device)

    @torch.no_grad()
    def add(self, count, *values):
        """A batch of `count` samples; `values` in the order of the names, () tensors."""
        samples = torch.full_like(values[0], count)
        parts = zip(self.names, values, strict=True)
        weighted = [x if name.endswith("accuracy") else samples * x for name, x in parts]
        self.sums += torch.stack([samples, *weighted])

    def means(self):
        """name -> mean over samples, accuracies in percent."""
        samples, *sums = self.sums.tolist()
        scales = [100 if name.endswith("accuracy") else 1 for name in self.names]
        parts = zip(self.names, scales, sums, strict=True)
        return {name: scale * x / samples for name, scale, x in parts}


def count_correct(logits, labels):
    """How many rows of (B, C) have their largest entry at `labels` (B,), as a tensor."""
    return (logits.argmax(dim=1) == labels).sum()


@torch.no_grad()
def collect(look, split, batch_size=256):
    """Run `look` (inputs -> dict of (B, ...) tensors) over `split`, in order.

    Returns that dict with the batches put together, and `labels` and `index` (N,). Whoever calls
    puts the network in evaluation mode. The whole tensors are made at the first batch: lists of
    small ones between the activations of large batches fragment the heap.
    """
    whole, done = {}, 0
    for inputs, labels, index in split.batches(batch_size):
        for name, tensor in {**look(inputs), "labels": labels, "index": index}.items():
            if name not in whole:
                whole[name] = tensor.new_empty(len(split), *tensor.shape[1:])
            whole[name][done : done + len(labels)] = tensor
        done += len(labels)
    return whole


def predict(model, split, config):
    """`logits`, the features of every modality, `labels` and `index` of a whole split, in
    evaluation mode."""

    def look(inputs):
        logits, features = forward(model, inputs, config)
        return {"logits": logits, **features}

    model.eval()
    return collect(look, split)


def score(logits, split):
    """The task's metrics of `logits` (N, C), and the accuracy in every slice of the split."""
    labels = split.labels
    metrics = Classification.measure(logits, labels)
    slices = {name: mask for name, mask in split.slices.items() if mask.any()}
    if slices:
        metrics["slices"] = {
            name: accuracy(logits[mask], labels[mask]) for name, mask in slices.items()
        }
    return metrics


@torch.no_grad()
def measure(model, outputs, split):
    """`score` of what `predict` gave, and by modality, where the fusion can be split, the accuracy
    of its share of the logits.

    head:  of a share of the fused logits. No probe: it was never trained to classify alone.
    alone: of the classifier of a network of one modality.
    """
    metrics = score(outputs["logits"], split)
    modalities = list(model.encoders)
    if len(modalities) == 1:
        return metrics | {modalities[0]: {"alone": metrics["accuracy"]}}
    metrics |= {m: {} for m in modalities}
    with suppress(NotImplementedError):
        for m, part in model.fusion.unimodal_logits(outputs).items():
            metrics[m]["head"] = accuracy(part, outputs["labels"])
    return metrics


def probe_encoders(encode, splits):
    """How much an encoder knows: test accuracy of a `linear_probe`, modality -> percent.

    encode: inputs -> modality -> features (B, D) of a frozen network in evaluation mode.
    """
    seen, unseen = collect(encode, splits.train), collect(encode, splits.test)
    labels, true = seen.pop("labels"), unseen["labels"]
    del seen["index"]
    num_classes = 1 + int(max(labels.max(), true.max()))
    return {
        m: accuracy(linear_probe(z, labels, num_classes)(unseen[m]), true) for m, z in seen.items()
    }


def arrays(outputs):
    """What predictions.npz holds: the position of each item, its label and its logits."""
    return {"index": outputs["index"], "label": outputs["labels"], "logits": outputs["logits"]}
