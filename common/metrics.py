"""What is measured on predictions and features."""

import torch
import torch.nn.functional as F
from sklearn.metrics import f1_score


def accuracy(logits, labels):
    """Percent of the rows of `logits` (B, C) whose largest entry is at `labels` (B,)."""
    return 100 * ((logits.argmax(dim=1) == labels).sum().item() / len(labels))


def macro_f1(logits, labels):
    """F1 in percent, averaged over the classes that occur in labels or predictions."""
    predicted = logits.argmax(dim=1).cpu()
    return 100 * float(f1_score(labels.cpu(), predicted, average="macro", zero_division=0))


def linear_probe(features, labels, num_classes):
    """A linear classifier trained anew on frozen features: logistic regression, converged.

        min over W, b of  mean CE(W x + b, y) + ||W||^2 / (2 N)

    features: (N, D), labels: (N,), of the training split; x is z with mean 0 and variance 1 in
    every feature. Full-batch L-BFGS, which draws nothing, on the principal axes of x: those without
    variance, such as 448 of 512 behind a layer 64 -> 512, tell nothing and cost nothing, and
    axes of equal scale make it converge in tens of steps. Returns a function (N, D) ->
    log-probabilities (N, C).
    """
    mean, deviation = features.mean(dim=0), features.std(dim=0, correction=0)
    deviation = torch.where(deviation > 1e-6 * mean.abs(), deviation, torch.inf)  # x = 0
    x = (features - mean) / deviation
    variances, axes = torch.linalg.eigh((x.T @ x / len(x)).double())  # float32 may not converge
    keep = variances > 1e-6 * variances[-1]
    scale = (variances[keep] + 0.1).sqrt().to(x)
    axes = axes[:, keep].to(x) / scale
    x = x @ axes
    weight = x.new_zeros(x.shape[1], num_classes, requires_grad=True)
    bias = x.new_zeros(num_classes, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=500,
        history_size=20,
        tolerance_grad=2e-5,
        tolerance_change=1e-9,
        line_search_fn="strong_wolfe",
    )

    @torch.enable_grad()
    def loss():
        optimizer.zero_grad()
        penalty = (weight / scale.unsqueeze(1)).square().sum() / (2 * len(x))
        value = F.cross_entropy(x @ weight + bias, labels) + penalty
        value.backward()
        return value

    optimizer.step(loss)
    weight, bias = axes @ weight.detach(), bias.detach()
    return lambda z: ((z - mean) / deviation @ weight + bias).log_softmax(dim=1)


def count_parameters(*modules):
    """Learnable numbers in all of the modules; shared ones count once."""
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})
