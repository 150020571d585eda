"""The network of pmr.py, umt_ume.py and baselines.py: encoders, and a fusion head on features."""

import torch
import torch.nn as nn

from ..seeding import seed_phase
from .encoders import build_encoder
from .fusion import FUSIONS, Sum


class MultimodalNet(nn.Module):
    """One encoder for each modality and a fusion head: inputs -> logits (B, C) and features.

    inputs: modality -> (B, C, ...); features before fusion: modality -> (B, D).
    """

    def __init__(self, encoders, fusion):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion

    def forward(self, inputs):
        features = {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}
        return self.fusion(features), features


def build_encoders(config, splits, **options):
    """The encoders of `config.modalities`, in order; options: see `encoders.build_encoder`."""
    options["pretrained"] = config.pretrained
    return {
        m: build_encoder(config.dataset, splits.shapes[m], **options) for m in config.modalities
    }


def build_model(config, splits):
    """The network of a run, initialised from its seed, so that what methods share starts equal.

    The head is `config.fusion`; of a single modality it is a linear classifier.
    """
    seed_phase(config.seed, "initialisation")
    encoders = build_encoders(config, splits)
    dims = {m: encoder.dim for m, encoder in encoders.items()}
    head = FUSIONS[config.fusion] if config.fusion else Sum
    model = MultimodalNet(encoders, head(dims, splits.num_classes))
    return model.to(config.device, memory_format=torch.channels_last)
