"""Shake-Shake regularisation of parallel heads, which MHM's paper compares with."""

import torch
import torch.nn as nn


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
