"""Fusion heads: features of each modality -> logits.

Every head is built as `Head(dims, num_classes)` with dims = modality -> D, is called with
features = modality -> (B, D), and gives (B, C). `unimodal_logits` tells what each modality alone
adds to them, where the head can be split. Below them: fusion blocks between the stages of encoders,
and ways to put several heads together.
"""

import math

import torch
import torch.nn as nn
import torch.nn.functional as F

from .encoders import initialize
from .errors import UserError


class Fusion(nn.Module):
    """Base of the heads: keeps the order of the modalities."""

    def __init__(self, dims: dict, num_classes: int):
        super().__init__()
        self.modalities = tuple(dims)

    def unimodal_logits(self, features):
        """modality -> (B, C) logits that sum to `forward`; NotImplementedError if inseparable."""
        raise NotImplementedError(
            f"{type(self).__name__} mixes the modalities inside: its logits are no sum of one part "
            "for each modality."
        )


class Sum(Fusion):
    """Late fusion: W^0 z^0 + b^0 + W^1 z^1 + b^1 + ... (PMR, Eq. 4). One modality: a classifier."""

    def __init__(self, dims, num_classes):
        super().__init__(dims, num_classes)
        self.heads = nn.ModuleDict({m: nn.Linear(dim, num_classes) for m, dim in dims.items()})
        self.apply(initialize)

    def forward(self, features):
        return sum(self.unimodal_logits(features).values())

    def unimodal_logits(self, features):
        return {m: self.heads[m](features[m]) for m in self.modalities}


class Concat(Fusion):
    """W [z^0; z^1; ...] + b (PMR, Eq. 1)."""

    def __init__(self, dims, num_classes):
        super().__init__(dims, num_classes)
        self.linear = nn.Linear(sum(dims.values()), num_classes)
        self.widths = list(dims.values())
        self.apply(initialize)

    def forward(self, features):
        return self.linear(torch.cat([features[m] for m in self.modalities], dim=1))

    def unimodal_logits(self, features):
        """Each modality's columns of W, and an equal share of b."""
        columns = self.linear.weight.split(self.widths, dim=1)
        bias = self.linear.bias / len(self.modalities)
        return {
            m: F.linear(features[m], weight, bias)
            for m, weight in zip(self.modalities, columns, strict=True)
        }


class TwoModalityFusion(Fusion):
    """Base of the heads in which the first modality acts on the second, of equal width."""

    def __init__(self, dims, num_classes):
        super().__init__(dims, num_classes)
        if len(dims) != 2 or len(set(dims.values())) != 1:
            raise UserError(
                f"{type(self).__name__} joins two modalities of equal width, not {dict(dims)}; "
                "use sum or concat."
            )


class FiLM(TwoModalityFusion):
    """Perez et al., AAAI 2018: the first modality scales and shifts the second.

    (g, s) = halves of Linear(z^0); logits = Linear(g * z^1 + s). Released PMR code: g, not 1 + g.
    """

    def __init__(self, dims, num_classes):
        super().__init__(dims, num_classes)
        dim = dims[self.modalities[0]]
        self.condition = nn.Linear(dim, 2 * dim)
        self.head = nn.Linear(dim, num_classes)
        self.apply(initialize)

    def forward(self, features):
        first, second = (features[m] for m in self.modalities)
        scale, shift = self.condition(first).chunk(2, dim=1)
        return self.head(scale * second + shift)


class Gated(TwoModalityFusion):
    """Kiela et al., AAAI 2018: Linear(sigmoid(Linear(z^0)) * Linear(z^1))."""

    def __init__(self, dims, num_classes):
        super().__init__(dims, num_classes)
        dim = dims[self.modalities[0]]
        self.gate = nn.Linear(dim, dim)
        self.value = nn.Linear(dim, dim)
        self.head = nn.Linear(dim, num_classes)
        self.apply(initialize)

    def forward(self, features):
        first, second = (features[m] for m in self.modalities)
        return self.head(torch.sigmoid(self.gate(first)) * self.value(second))


class MLPHead(Fusion):
    """Linear, ReLU, Linear on the concatenated features."""

    def __init__(self, dims, num_classes, hidden=128):
        super().__init__(dims, num_classes)
        self.layers = nn.Sequential(
            nn.Linear(sum(dims.values()), hidden), nn.ReLU(), nn.Linear(hidden, num_classes)
        )

    def forward(self, features):
        return self.layers(torch.cat([features[m] for m in self.modalities], dim=1))


class AttentionHead(Fusion):
    """A transformer layer over one token for each modality, their mean, and a linear layer."""

    def __init__(self, dims, num_classes, width=64):
        super().__init__(dims, num_classes)
        self.tokens = nn.ModuleDict({m: nn.Linear(dim, width) for m, dim in dims.items()})
        self.layer = nn.TransformerEncoderLayer(width, 4, 2 * width, dropout=0, batch_first=True)
        self.linear = nn.Linear(width, num_classes)

    def forward(self, features):
        tokens = [self.tokens[m](features[m]) for m in self.modalities]
        return self.linear(self.layer(torch.stack(tokens, dim=1)).mean(dim=1))


FUSIONS = {"sum": Sum, "concat": Concat, "film": FiLM, "gated": Gated}
LATE_FUSIONS = {"concat": Concat, "mlp": MLPHead, "attention": AttentionHead}  # of umt_ume.py


# ---- Between stages ----


def spatial_mean(maps):
    """(B, C, *space) -> (B, C); vectors (B, C) as they are."""
    space = tuple(range(2, maps.dim()))
    return maps.mean(dim=space) if space else maps


class MMTM(nn.Module):
    """Multimodal transfer module (Joze et al., CVPR 2020): gates on the channels of every modality
    from the squeezed maps of all; Eq. (1) and (2) of Wu et al., ICML 2022.

        h_m = spatial mean of A_m;  [w_0; w_1; ...] = g([h_0; h_1; ...]);  A_m <- sigmoid(w_m) A_m

    channels: modality -> C_m. Maps may differ in channels and in spatial size.
    ratio:    g is Linear sum(C) -> 2 sum(C) / ratio, ReLU, and a Linear -> C_m for each modality.
    factor:   2 as in the MMTM paper; the code of both papers has the plain sigmoid.
    """

    def __init__(self, channels, ratio=4, factor=1.0):
        super().__init__()
        width = int(2 * sum(channels.values()) / ratio)
        self.squeeze = nn.Linear(sum(channels.values()), width)
        self.excite = nn.ModuleDict({m: nn.Linear(width, c) for m, c in channels.items()})
        self.factor = factor

    def gate(self, activation):
        """The factors on the channels, from activations w (..., C)."""
        return self.factor * activation.sigmoid()

    def forward(self, maps, gates=None, squeezed=None):
        """maps: modality -> (B, C, *space). Returns gated maps, squeezed h and activations w.

        Vectors (B, C) are their own squeezed features.

        gates, squeezed: modality -> (C,) or (B, C), used in place of the computed ones. A modality
        with a given gate has no activation, and its layer `excite` no part in the result.
        """
        gates, squeezed = gates or {}, squeezed or {}
        own = {m: spatial_mean(x) for m, x in maps.items()}
        h = {m: squeezed[m].expand_as(own[m]) if m in squeezed else own[m] for m in self.excite}
        joined = self.squeeze(torch.cat(list(h.values()), dim=1)).relu()
        w = {m: excite(joined) for m, excite in self.excite.items() if m not in gates}
        gates = {**gates, **{m: self.gate(activation) for m, activation in w.items()}}
        gated = {}
        for m, x in maps.items():
            gate = gates[m].to(x.dtype).expand_as(own[m])
            gated[m] = x * gate.unflatten(1, (-1, *(1,) * (x.dim() - 2)))
        return gated, own, w


class SE(MMTM):
    """Squeeze-and-excitation (Hu et al., CVPR 2018), as a uni-modal network is given it to compare
    with MMTM: the same block with one modality, and no reduction of its width."""

    def __init__(self, channels, factor=1.0):
        super().__init__(channels, ratio=2, factor=factor)


# ---- Several heads together ----


def average_probabilities(outputs):
    """Logits (B, C) of several networks -> log of their mean probability; one is left as it is."""
    if len(outputs) == 1:
        return outputs[0]
    log_p = torch.stack([logits.log_softmax(dim=1) for logits in outputs])
    return log_p.logsumexp(dim=0) - math.log(len(outputs))


class ShakeShake(nn.Module):
    """Gastaldi (2017) on parallel heads: their sum, weighted at random for each sample.

    The weights, uniform among those of sum one, are drawn anew for the backward pass, and equal in
    evaluation.
    """

    def __init__(self, heads):
        super().__init__()
        self.heads = nn.ModuleList(heads)

    def forward(self, z):
        outputs = torch.stack([head(z) for head in self.heads])  # (heads, B, C)
        if not self.training:
            return outputs.mean(dim=0)
        alpha, beta = (self.draw_weights(outputs) for _ in range(2))
        backward = (beta * outputs).sum(dim=0)
        return backward + ((alpha - beta) * outputs).sum(dim=0).detach()

    @staticmethod
    def draw_weights(outputs):
        """(heads, B, 1) weights: exponential draws over their sum."""
        shape = (*outputs.shape[:2], 1)
        draw = torch.empty(shape, dtype=outputs.dtype, device=outputs.device).exponential_()
        return draw / draw.sum(dim=0)
