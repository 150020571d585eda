"""RUBi, which the Greedy paper compares with."""

import torch.nn as nn
import torch.nn.functional as F


class RUBi(nn.Module):
    """Cadene et al., NeurIPS 2019: a modality that answers alone masks the predictions in training.

        q = MLP(stop-gradient z);  L = sum of CE(logits * sigmoid(q), y) + weight * CE(W q + c, y)

    Where the biased modality is right alone, the masked loss is small, and so is what the network
    learns from that sample. Trained beside the network and left out at test time.
    dim: width D of the biased modality's features z (B, D); hidden: ours, its authors have 1024 on
    4800 features.
    """

    def __init__(self, dim, num_classes, hidden=128):
        super().__init__()
        self.mlp = nn.Sequential(
            *(nn.Linear(dim, hidden), nn.ReLU()),
            *(nn.Linear(hidden, hidden), nn.ReLU()),
            nn.Linear(hidden, num_classes),
        )
        self.classifier = nn.Linear(num_classes, num_classes)

    def forward(self, z, predictions, labels, weight=1.0):
        """z: (B, D); predictions: list of logits (B, C); labels: (B,). Returns the loss."""
        q = self.mlp(z.detach())
        masked = sum(F.cross_entropy(logits * q.sigmoid(), labels) for logits in predictions)
        return masked + weight * F.cross_entropy(self.classifier(q), labels)
