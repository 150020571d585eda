"""What is measured on predictions and features."""

import torch
from sklearn.dummy import DummyClassifier
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler


def accuracy(logits, labels):
    """Percent of the rows of `logits` (B, C) whose largest entry is at `labels` (B,)."""
    return 100 * ((logits.argmax(dim=1) == labels).sum().item() / len(labels))


def macro_f1(logits, labels):
    """F1 in percent, averaged over the classes that occur in labels or predictions."""
    predicted = logits.argmax(dim=1).cpu()
    return 100 * float(f1_score(labels.cpu(), predicted, average="macro", zero_division=0))


def linear_probe(features, labels, num_classes):
    """A linear classifier trained anew on frozen features: scikit-learn's logistic regression.

    features: (N, D), labels: (N,), of the training split. Every feature is brought to mean 0 and
    variance 1 first. Returns a function (N, D) -> log-probabilities (N, C), of 1e-12 at least: what
    classes without a training sample have.
    """
    several = len(labels.unique()) > 1
    classifier = LogisticRegression(max_iter=1000) if several else DummyClassifier()
    classifier = make_pipeline(StandardScaler(), classifier)
    classifier.fit(features.cpu().numpy(), labels.cpu().numpy())

    def predict(z):
        found = torch.from_numpy(classifier.predict_proba(z.cpu().numpy()))
        p = z.new_zeros(len(z), num_classes)
        p[:, classifier.classes_] = found.to(z)
        return p.clamp_min(1e-12).log()

    return predict


def count_parameters(*modules):
    """Learnable numbers in all of the modules; shared ones count once."""
    return sum(p.numel() for p in {p for module in modules for p in module.parameters()})
