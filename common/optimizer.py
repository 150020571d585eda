"""Optimizers and their learning rates by epoch."""

import math

import torch


def build_optimizer(parameters, config):
    """SGD with `momentum`, Adam or AdaGrad with torch's other defaults.

    config: has optimizer, lr, weight_decay and, for SGD, momentum.
    """
    decay = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, momentum=config.momentum, **decay)
    optimizers = {"adam": torch.optim.Adam, "adagrad": torch.optim.Adagrad}
    return optimizers[config.optimizer](parameters, **decay)


def scheduled_lr(schedule, lr, epoch, epochs):
    """Learning rate of `epoch` (from 0): `none`; `step` and `cosine` end at a tenth of `lr`.

    step:    a tenth for the last 30 percent of the epochs.
    step-70: a tenth of it every 70 epochs, whatever their number: the released code of OGM-GE and
             PMR.
    cosine:  half a cosine from lr down to lr / 10.
    """
    if schedule == "step":
        return lr if epoch < 0.7 * epochs else lr / 10
    if schedule == "step-70":
        return lr * 0.1 ** (epoch // 70)
    if schedule == "cosine":
        return lr / 10 + 0.9 * lr * (1 + math.cos(math.pi * epoch / max(1, epochs - 1))) / 2
    return lr


def set_lr(optimizer, lr):
    """Give every parameter group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr
