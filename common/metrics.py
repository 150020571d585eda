"""What is measured on predictions, and a pass over a split to make them."""

import math

import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def accuracy(logits, labels):
    """Percent of the rows of `logits` (B, C) whose largest entry is at `labels` (B,)."""
    return 100 * ((logits.argmax(dim=1) == labels).sum().item() / len(labels))


def macro_f1(logits, labels):
    """F1 in percent, averaged over the classes that occur in labels or predictions."""
    predicted = logits.argmax(dim=1).cpu()
    return 100 * float(f1_score(labels.cpu(), predicted, average="macro", zero_division=0))


def linear_probe(features, labels, num_classes):
    """A linear classifier trained anew on frozen features: scikit-learn's logistic regression.

    features: (N, D), labels: (N,), of the training split. Every feature is brought to mean 0 and
    variance 1 first. Returns a function (N, D) -> log-probabilities (N, C), of 1e-12 at least: what
    classes without a training sample have.
    """
    several = len(labels.unique()) > 1
    classifier = LogisticRegression(max_iter=1000) if several else DummyClassifier()
    classifier = make_pipeline(StandardScaler(), classifier)
    classifier.fit(features.cpu().numpy(), labels.cpu().numpy())

    def predict(z):
        found = torch.from_numpy(classifier.predict_proba(z.cpu().numpy()))
        p = z.new_zeros(len(z), num_classes)
        p[:, classifier.classes_] = found.to(z)
        return p.clamp_min(1e-12).log()

    return predict


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


def probe_encoders(encode, train, test):
    """How much an encoder knows: test accuracy of a `linear_probe`, modality -> percent.

    encode: inputs -> modality -> features (B, D) of a frozen network in evaluation mode.
    """
    seen, unseen = collect(encode, train), collect(encode, test)
    labels, true = seen.pop("labels"), unseen["labels"]
    del seen["index"]
    num_classes = 1 + int(max(labels.max(), true.max()))
    return {
        m: accuracy(linear_probe(z, labels, num_classes)(unseen[m]), true) for m, z in seen.items()
    }


def count_parameters(*modules):
    """Learnable numbers in all of the modules; shared ones count once."""
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})
