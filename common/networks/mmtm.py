"""Fusion blocks between the stages of encoders: gates on channels, MMTM for several modalities and
SE for one."""

import torch
import torch.nn as nn


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
    factor:   2 as the MMTM paper is remembered to have it; released code: the plain sigmoid.
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
    with MMTM: the same block with one modality; no reduction of its width: released code."""

    def __init__(self, channels, factor=1.0):
        super().__init__(channels, ratio=2, factor=factor)
