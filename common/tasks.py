"""What a kind of task is judged by: how outputs are averaged, and the metrics of a prediction."""

import math

import torch
import torch.nn.functional as F

from .metrics import accuracy, macro_f1


def average_probabilities(outputs):
    """Logits (B, C) of several networks -> log of their mean probability; one is left as it is."""
    if len(outputs) == 1:
        return outputs[0]
    log_p = torch.stack([logits.log_softmax(dim=1) for logits in outputs])
    return log_p.logsumexp(dim=0) - math.log(len(outputs))


class Classification:
    """One of C classes for each sample: outputs are logits (N, C), labels (N,) int64."""

    average = staticmethod(average_probabilities)

    @staticmethod
    def measure(logits, labels):
        """Accuracy and macro-F1 in percent, and the cross-entropy. Accuracy selects epochs."""
        return {
            "accuracy": accuracy(logits, labels),
            "macro_f1": macro_f1(logits, labels),
            "loss": F.cross_entropy(logits, labels).item(),
        }
