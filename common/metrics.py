"""What is measured on predictions, and a pass over a split to make them."""

import math

import torch
from sklearn.metrics import f1_score


def accuracy(logits, labels):
    """Percent of the rows of `logits` (B, C) whose largest entry is at `labels` (B,)."""
    return 100 * ((logits.argmax(dim=1) == labels).sum().item() / len(labels))


def macro_f1(logits, labels):
    """F1 in percent, averaged over the classes that occur in labels or predictions."""
    predicted = logits.argmax(dim=1).cpu()
    return 100 * float(f1_score(labels.cpu(), predicted, average="macro", zero_division=0))


def pairwise_divergence(log_p):
    """Mean of KL(p_i || p_j) over ordered pairs i != j and over items, in nats; 0 if all agree.

    log_p: (R, N, C) logarithms of R >= 2 distributions for each of N items; p counts as 1e-12 at
    least.
    """
    log_p = log_p.double().clamp_min(math.log(1e-12))
    runs, items, _ = log_p.shape
    cross = torch.einsum("inc,jnc->ij", log_p.exp(), log_p)  # sum of p_i log p_j
    divergences = cross.diagonal().unsqueeze(1) - cross
    return divergences.sum().item() / (runs * (runs - 1) * items)


def divergence_from_mean(log_p):
    """Mean of KL(p_i || their mean) over runs and items, in nats; at most log R.

    log_p: as for `pairwise_divergence`.
    """
    log_p = log_p.double().clamp_min(math.log(1e-12))
    mean = log_p.exp().mean(dim=0).log()
    return (log_p.exp() * (log_p - mean)).sum(dim=2).mean().item()


def missing_ratio(correct, unimodal_correct):
    """Share of items that the multi-modal network misses and any uni-modal one gets right.

    correct: (N,) bool; unimodal_correct: (M, N) bool. Lee et al., AAAI 2022, Sec. 5.2.
    """
    return (~correct & unimodal_correct.any(dim=0)).double().mean().item()


def hitting_ratio(correct, unimodal_correct):
    """Share of items that the multi-modal network gets right and all uni-modal ones miss."""
    return (correct & ~unimodal_correct.any(dim=0)).double().mean().item()


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
