"""Fusion heads: features of each modality -> logits.

Every head is built as `Head(dims, num_classes)` with dims = modality -> D, is called with
features = modality -> (B, D), and gives (B, C). `unimodal_logits` tells what each modality alone
adds to them, where the head can be split.
"""

import torch
import torch.nn as nn
import torch.nn.functional as F

from ..errors import UserError
from .encoders import initialize


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


FUSIONS = {
    "sum": Sum,
    "concat": Concat,
    "film": FiLM,
    "gated": Gated,
    "mlp": MLPHead,
    "attention": AttentionHead,
}
