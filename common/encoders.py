"""Encoders as a list of stages and a pool, and which encoder a modality of a dataset gets."""

from collections.abc import Callable
from functools import partial

import torch.nn as nn


class Encoder(nn.Module):
    """`stages` map (B, C, H, W) to (B, C', H', W') in turn; `pool` ends in features (B, dim).

    The stages are a list so that a fusion block such as MMTM can stand between two of them;
    channels: C' after each stage.
    """

    def __init__(self, stages, pool, dim, channels):
        super().__init__()
        self.stages = nn.ModuleList(stages)
        self.pool = pool
        self.dim = dim
        self.channels = channels

    def forward(self, x):
        for stage in self.stages:
            x = stage(x)
        return self.pool(x)


class CNN(Encoder):
    """The four-convolution network that PMR's and the Greedy paper's code use for digits.

    Released code: max-pool after the first convolution, Linear 64 -> 512 at the end. The PMR paper
    names "4 convolution layers and 1 average pool layer" (Sec. 5.2) only.

    in_channels: channels C of the input (B, C, H, W).
    dim:         width of the features; None leaves out the last Linear and gives 64.
    batch_norm:  BatchNorm after each convolution. Neither paper has it; few and small images need
                 it, for without it the network does not leave chance in a few hundred steps.
    first_pool:  the max-pool after the first convolution; 8x8 images are too small for it.
    """

    def __init__(self, in_channels, dim=512, batch_norm=False, first_pool=True):
        def convolution(before, after, kernel, stride=1, pool=None):
            layers = [nn.Conv2d(before, after, kernel, stride, padding=kernel // 2)]
            if batch_norm:
                layers.append(nn.BatchNorm2d(after))
            if pool:  # before the ReLU: same values, same gradients, a quarter of the work
                layers.append(pool)
            return [*layers, nn.ReLU()]

        max_pool = nn.MaxPool2d(3, stride=2, padding=1) if first_pool else None
        stages = [  # a 28x28 input gives maps of 14, 14, 7, 7
            [nn.BatchNorm2d(in_channels), *convolution(in_channels, 32, kernel=5, pool=max_pool)],
            convolution(32, 32, kernel=3),
            convolution(32, 64, kernel=3, stride=2),
            convolution(64, 64, kernel=3),
        ]
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        if dim is not None:
            pool.append(nn.Linear(64, dim))
        stages = [nn.Sequential(*layers) for layers in stages]
        super().__init__(stages, pool, dim or 64, channels=(32, 32, 64, 64))
        self.apply(initialize)


def initialize(module):
    """PMR's released initialisation (the paper has none); use it as `model.apply(initialize)`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# What a modality of a dataset is encoded by: a function of the number of input channels.
ENCODERS: dict[str, Callable] = {
    "digits": partial(CNN, batch_norm=True, first_pool=False),
    "cg-mnist": CNN,
    "av-digits": partial(CNN, batch_norm=True),
}


def build_encoder(dataset, shape, **options):
    """The encoder for one modality of `dataset`, whose inputs have `shape` (C, H, W).

    options: as for the encoder's class, in place of the dataset's.
    """
    return ENCODERS[dataset](shape[0], **options)
