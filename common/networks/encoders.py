"""Encoders as a list of stages and a pool, and which encoder a modality of a dataset gets."""

import inspect
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch.nn as nn
import torchvision

from ..errors import UserError


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
    """The four-convolution network of PMR's released code for CG-MNIST. The Greedy paper has "four
    convolutional layers" and no code for them: that they are these is ours.

    Released code: max-pool after the first convolution, Linear 64 -> 512 at the end. The PMR paper
    names "4 convolution layers and 1 average pool layer" (Sec. 5.2) only.

    in_channels: channels C of the input (B, C, H, W).
    dim:         width of the features; None leaves out the last Linear and gives 64.
    batch_norm:  BatchNorm after each convolution. Neither paper names it; few and small images need
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


class MLP(Encoder):
    """For vectors (B, inputs): two hidden layers with ReLU, each of them a stage.

    dim: width of the features; None is 64, as for `CNN`.
    """

    def __init__(self, inputs, dim=64, hidden=256):
        dim = dim or 64
        widths = (inputs, hidden, dim)
        stages = [nn.Sequential(nn.Linear(a, b), nn.ReLU()) for a, b in pairwise(widths)]
        super().__init__(stages, nn.Identity(), dim, channels=(hidden, dim))


class PerFrame(nn.Sequential):
    """Layers for images (B, C, H, W) that also take several at a time, (B, C, N, H, W)."""

    def forward(self, x):
        if x.dim() == 4:
            return super().forward(x)
        maps = super().forward(x.transpose(1, 2).flatten(0, 1))  # (B N, C', H', W')
        return maps.unflatten(0, (x.shape[0], x.shape[2])).transpose(1, 2)


class MeanPool(nn.Module):
    """(B, C, *space) -> (B, C): the mean over positions, and over frames where there are any."""

    def forward(self, maps):
        return maps.mean(dim=tuple(range(2, maps.dim())))


class ResNet18(Encoder):
    """torchvision's ResNet-18 without its classifier: spectrograms, images, or frames of a clip.

    in_channels: C of the input (B, C, H, W) or (B, C, N, H, W); features are (B, 512).
    pretrained:  start from torchvision's ImageNet weights; released codes: from scratch. For one
                 channel the first convolution's weights are summed over the colors.
    """

    def __init__(self, in_channels, pretrained=False):
        weights = torchvision.models.ResNet18_Weights.IMAGENET1K_V1 if pretrained else None
        try:
            network = torchvision.models.resnet18(weights=weights)
        except (OSError, RuntimeError) as error:
            raise UserError(
                f"The ImageNet weights of ResNet-18 cannot be downloaded ({error}); train from "
                f"scratch, or put {weights.url.split('/')[-1]} into torch's hub/checkpoints folder."
            ) from error
        if in_channels != 3:
            first = nn.Conv2d(in_channels, 64, 7, stride=2, padding=3, bias=False)
            nn.init.kaiming_normal_(first.weight, mode="fan_out", nonlinearity="relu")
            if pretrained:
                first.weight.data = network.conv1.weight.data.sum(1, keepdim=True) / in_channels
                first.weight.data = first.weight.data.repeat(1, in_channels, 1, 1)
            network.conv1 = first
        stages = [
            PerFrame(network.conv1, network.bn1, network.relu, network.maxpool),
            *(PerFrame(*getattr(network, f"layer{i}")) for i in (1, 2, 3, 4)),
        ]
        super().__init__(stages, MeanPool(), 512, channels=(64, 64, 128, 256, 512))


def initialize(module):
    """PMR's released initialisation (the paper has none); use it as `model.apply(initialize)`."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_normal_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


# What a modality of a dataset is encoded by: a function of the number of input channels
# or, for vectors, of their width.
ENCODERS: dict[str, Callable] = {
    "digits": partial(CNN, batch_norm=True, first_pool=False),
    "cg-mnist": CNN,
    "av-digits": partial(CNN, batch_norm=True),
    "synthetic": MLP,
    "features": MLP,
    "mfeat": MLP,
    **dict.fromkeys(("crema-d", "ave", "vggsound", "modelnet40"), ResNet18),
}


def encoder_options(dataset):
    """Names of the keyword arguments that the encoder of `dataset` has."""
    return set(inspect.signature(ENCODERS[dataset]).parameters)


def build_encoder(dataset, shape, **options):
    """The encoder for one modality of `dataset`, whose inputs have `shape` (C, ...) or (D,).

    options: as for the encoder's class, in place of the dataset's; one that it lacks is left out.
    """
    known = encoder_options(dataset)
    chosen = {name: value for name, value in options.items() if name in known}
    return ENCODERS[dataset](shape[0], **chosen)
