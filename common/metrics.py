"""What is measured: accuracy and macro-F1 in percent, and a pass over a split to measure it on."""

import torch
from sklearn.metrics import f1_score


def accuracy(logits, labels):
    """Percent of the rows of `logits` (B, C) whose largest entry is at `labels` (B,)."""
    return 100 * ((logits.argmax(dim=1) == labels).sum().item() / len(labels))


def macro_f1(logits, labels):
    """F1 in percent, averaged over the classes that occur in labels or predictions."""
    predicted = logits.argmax(dim=1).cpu()
    return 100 * float(f1_score(labels.cpu(), predicted, average="macro", zero_division=0))


@torch.no_grad()
def collect(forward, split, batch_size=256):
    """Run `forward` (inputs -> dict of (B, ...) tensors) over `split`, in order.

    Returns that dict with the batches put together, and `labels` and `index` (N,). Whoever calls
    puts the network in evaluation mode. The whole tensors are made at the first batch: lists of
    small ones between the activations of large batches fragment the heap.
    """
    whole, done = {}, 0
    for inputs, labels, index in split.batches(batch_size):
        for name, tensor in {**forward(inputs), "labels": labels, "index": index}.items():
            if name not in whole:
                whole[name] = tensor.new_empty(len(split), *tensor.shape[1:])
            whole[name][done : done + len(labels)] = tensor
        done += len(labels)
    return whole
