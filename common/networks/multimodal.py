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


def seed_module(config, name):
    """Let the module `name` start from (seed, modalities of its network, name).

    So modules that methods share start equal, whatever else a method has; and but for pretrained
    weights no encoder starts where one of another network did: a student never at its teacher's.
    """
    seed_phase(config.seed, "initialisation", *config.modalities, name)


def build_encoders(config, splits, copy=0, **options):
    """The encoders of `config.modalities`, in order; options: see `encoders.build_encoder`.

    copy: its number, where a network has several of them with starts of their own.
    """
    options["pretrained"] = config.pretrained
    encoders = {}
    for m in config.modalities:
        seed_module(config, f"{m}-{copy}" if copy else m)
        encoders[m] = build_encoder(config.dataset, splits.shapes[m], **options)
    return encoders


def build_model(config, splits):
    """The network of a run, every module started by `seed_module`.

    The head is `config.fusion`; of a single modality it is a linear classifier.
    """
    encoders = build_encoders(config, splits)
    dims = {m: encoder.dim for m, encoder in encoders.items()}
    seed_module(config, "head")
    head = FUSIONS[config.fusion] if config.fusion else Sum
    model = MultimodalNet(encoders, head(dims, splits.num_classes))
    return model.to(config.device, memory_format=torch.channels_last)
