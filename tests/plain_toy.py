"""The toy networks of one run, as anybody would write and train them, full batch."""

import torch
import torch.nn.functional as F


def copy_weights(network):
    """Of theta, phi and each psi: the first run's (weight, bias)."""
    layers = (network.theta, network.phi, *network.psi)
    return [[p[0].detach().clone().requires_grad_() for p in m.parameters()] for m in layers]


def logits_of(fusion, t, theta, phi, psi):
    """A module has (weight, bias) for each modality, or one for all."""
    x = [t] if fusion == "early" else t.split(1, dim=1)
    z = [F.relu(x @ weight + bias) for x, weight, bias in zip(x, *theta, strict=True)]
    z = [torch.cat(z, dim=1)] if fusion == "intermediate" else z
    z = [F.relu(z @ weight + bias) for z, weight, bias in zip(z, *phi, strict=True)]
    return sum(z @ weight + bias for z, weight, bias in zip(z, *psi, strict=True)) / len(z)


def train_plain(fusion, method, modules, t, y, order, optimizer, lr, epochs):
    """Joint training, or MHM with two heads; modules: theta, phi and each psi, changed in place.

    order: the samples in the order in which they are cut into folds.
    """
    build = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    optimizers = [build(module, lr=lr) for module in modules]
    theta, phi, *heads = range(len(modules))
    folds = order.tensor_split(2)
    for epoch in range(epochs):
        k = epoch % len(heads)
        plan = [(folds[1 - k], (theta, heads[k])), (folds[k], (theta, phi))]
        for samples, learning in plan if method == "mhm" else [(order, range(3))]:
            for each in optimizers:
                each.zero_grad()
            logits = logits_of(fusion, t[samples], modules[0], modules[1], modules[2 + k])
            F.cross_entropy(logits, y[samples]).backward()
            for i in learning:
                optimizers[i].step()
