"""PMR: Prototypical Modal Rebalance for Multimodal Learning (Fan et al., CVPR 2023).
https://arxiv.org/abs/2211.07089

Trained jointly, the modality that learns fast holds back the slow one. The centroids of the classes
in each modality's features (prototypes) tell, without any head, which one is slow. That one is
pulled towards its prototypes; early in training the other one is kept from settling too soon.

    python pmr.py                                               # bundled digits, a minute on a CPU
    python pmr.py --dataset cg-mnist --fusion film --seeds 0 1 2
    python -m experiments.pmr table1 --seeds 0 1 2 3 4          # Table 1 of the paper

Every run leaves its configuration, metrics, predictions, curves and checkpoints in
runs/pmr/<dataset>/<method>-<fusion>[-<knob>=<value>]-seed<k>/. See docs/pmr.md.

Differs from the paper:
- Eq. (8) prints p without a class: that of the true class is meant, as in Eq. (5).
- Eq. (13) prints z^0 and c_y in both entropies: the second is of z^1, and over all c_k, as meant.
- E_r, "the first training few epochs" of PER, is the first fifth of them: ours.
- D_s is drawn once, from training data, and seen in evaluation mode, unaugmented. Released code:
  anew in each epoch; for AVE the validation set, for CG-MNIST labelled test images.
- First prototypes: without momentum, from a copy of the network whose BatchNorms have seen D_s. A
  class that D_s misses keeps its prototype; before it has one it is in no softmax: ours.
- Modality 0 is the dataset's first (gray, audio), as in Table 1; Sec. 5.1 has the color first. In
  film and gated it conditions modality 1: released code.
- --coefficients clip is Eq. (11); the released code has 0 or 1 in place of it (binary).
- The CNN and all initialisation are the released code's (common/networks/encoders.py), but for a
  BatchNorm after each convolution on digits and av-digits, and no max-pool on digits. ResNet-18 is
  plain; released code: with a bottleneck. The MLP for vectors is ours. Hyper-parameters: RECIPES.
- Validation data are cut from the training data (CG-MNIST 50,000 + 10,000, CREMA-D a tenth), and
  both the last epoch and the best on validation are reported: ours.
- Figures 2 and 4 (a, b), Tables 3 (MMTM, CentralNet) and 4 (localization) are not here; Table 2's
  rules: baselines.py.
"""

import copy
import math

from common.command_line import Command, Script, run_command
from common.device import autocast, forward
from common.errors import UserError
from common.evaluation import Totals, arrays, count_correct, measure, predict, probe_encoders
from common.flags import SIZE, number
from common.metrics import accuracy, count_parameters
from common.networks.multimodal import build_model
from common.optimizer import build_optimizer
from common.run import Run
from common.seeding import make_generator

# isort: split
# ---- Method ----

import torch
import torch.nn as nn
import torch.nn.functional as F


def class_means(z, labels, num_classes):
    """New prototypes, Eq. (6): the mean feature of each class.

    z: (N, D) features of the subset D_s; labels: (N,).
    Returns means (K, D), zero for a class without samples, and whether it has any (K,) bool.
    """
    members = F.one_hot(labels, num_classes).to(z.dtype)  # (N, K)
    counts = members.sum(dim=0)
    return (members.T @ z) / counts.clamp_min(1).unsqueeze(1), counts > 0


class Prototypes(nn.Module):
    """The prototypes c_k of one modality, with momentum from epoch to epoch, Eq. (12).

    A class that has never had a sample is not `known` and takes no part in any softmax.
    """

    def __init__(self, num_classes, dim):
        super().__init__()
        self.register_buffer("centers", torch.zeros(num_classes, dim))
        self.register_buffer("known", torch.zeros(num_classes, dtype=torch.bool))

    @torch.no_grad()
    def update(self, means, present, epsilon):
        """c_old <- epsilon c_old + (1 - epsilon) c_new; a class not `present` keeps its c_old.

        The paper leaves the first epoch open: a class seen for the first time takes c_new.
        """
        momentum = torch.where(self.known, epsilon, 0.0).unsqueeze(1)
        mixed = momentum * self.centers + (1 - momentum) * means
        self.centers.copy_(torch.where(present.unsqueeze(1), mixed, self.centers))
        self.known.logical_or_(present)

    def forward(self, z):
        """(B, D) features -> (B, K) logits of the posterior of Eq. (7)."""
        return prototype_logits(z, self.centers, self.known)


def prototype_logits(z, centers, known):
    """-d(z, c_k) with the Euclidean distance d: the logits whose softmax is Eq. (7).

    z: (B, D); centers: (K, D); known: (K,) bool. Always in the precision of `centers`, and by
    differences: cdist's faster mode by matrix products loses digits where z is near c_k.
    """
    distances = torch.cdist(
        z.to(centers.dtype), centers, compute_mode="donot_use_mm_for_euclid_dist"
    )
    return (-distances).masked_fill(~known, -1e9)  # finite: -inf would make 0 * inf in the entropy


def imbalance_ratio(logits0, logits1, labels, known):
    """rho_t, Eq. (8): summed probability of the true class, modality 0 over modality 1.

    logits0, logits1: (B, K) prototype logits; labels: (B,); known: (K,) bool. Eq. (8) prints p
    without a class; the true class is meant, as in Eq. (5).
    """

    def true_class_sum(logits):
        probability = logits.softmax(dim=1).gather(1, labels.unsqueeze(1)).squeeze(1)
        return (probability * known[labels]).sum().clamp_min(1e-12)  # never 0 / 0

    return true_class_sum(logits0) / true_class_sum(logits1)


def pce(logits, labels, known):
    """Prototypical cross-entropy, Eq. (9), over the samples whose class has a prototype.

    logits: (B, K) prototype logits; labels: (B,); known: (K,) bool.
    """
    has_prototype = known[labels]
    losses = F.cross_entropy(logits, labels, reduction="none")
    return (losses * has_prototype).sum() / has_prototype.sum().clamp_min(1)


def coefficients(rho, rule="clip"):
    """beta and gamma, Eq. (11): how much to accelerate modality 0 and modality 1.

    Paper, `clip`: beta = clip(0, 1/rho - 1, 1) if rho < 1, gamma = clip(0, rho - 1, 1) if rho >= 1;
    the clip alone makes the other one 0. Released code, `binary`: 1 for the slower modality.
    """
    if rule == "binary":
        return (rho < 1).to(rho.dtype), (rho > 1).to(rho.dtype)
    return (1 / rho - 1).clamp(0, 1), (rho - 1).clamp(0, 1)


def entropy(logits):
    """H(softmax(logits)) in nats, averaged over the batch."""
    log_p = logits.log_softmax(dim=1)
    return -(log_p.exp() * log_p).sum(dim=1).mean()


def pmr_loss(cross_entropy, logits0, logits1, labels, known, alpha, mu=0.0, rule="clip"):
    """L_acc, Eq. (10), and with mu > 0 L_final, Eq. (13). Returns the loss and rho.

    cross_entropy:    L_CE of the fused prediction, Eq. (2).
    logits0, logits1: (B, K) prototype logits of the two modalities; labels: (B,); known: (K,) bool.
    No gradient flows through rho, beta and gamma, nor through the prototypes.
    """
    with torch.no_grad():
        rho = imbalance_ratio(logits0, logits1, labels, known)
        beta, gamma = coefficients(rho, rule)
    loss = cross_entropy + alpha * beta * pce(logits0, labels, known)
    loss = loss + alpha * gamma * pce(logits1, labels, known)
    if mu > 0:
        # The coefficients are crossed: the entropy of the modality that is ahead is raised.
        # Paper: z^0 in both terms. Only z^1 makes sense in the second, with prototypes c^1.
        loss = loss - mu * gamma * entropy(logits0) - mu * beta * entropy(logits1)
    return loss, rho


# ---- Model ----

# `build_model` of common/networks: an encoder phi^m for each modality, z^m = phi^m(x^m), and a head
# on their features; concat is Eq. (1), sum Eq. (4), late fusion by one linear layer each.
FUSIONS = ("concat", "sum", "film", "gated")

# ---- Training ----


def draw_subset(split, config):
    """D_s: a fixed random share of the training data. Released code: drawn anew each epoch."""
    size = max(1, round(config.subset_fraction * len(split)))
    order = torch.randperm(len(split), generator=make_generator(config.seed, "subset"))
    return split.subset(order[:size])


def settled(model, subset, config):
    """A copy of an untrained network whose BatchNorms know D_s: ours. At their starting statistics
    the features, and so the first prototypes, would hardly differ from class to class."""
    model = copy.deepcopy(model)
    with autocast(config):
        torch.optim.swa_utils.update_bn((inputs for inputs, _, _ in subset.batches(256)), model)
    return model


def subset_means(model, subset, config):
    """Eq. (6) in every modality: modality -> (means, present); none where there is but one."""
    if len(config.modalities) == 1:
        return {}
    outputs = predict(model, subset, config)
    return {
        m: class_means(outputs[m], outputs["labels"], config.num_classes) for m in model.encoders
    }


def train(run, model, splits, config):
    """Algorithm 1. Joint training watches rho and pulls nothing; one modality has no prototypes.

    `run.batches` sets the epoch's learning rate, `run.end_epoch` keeps the best on validation.
    """
    subset = draw_subset(splits.train, config)
    prototypes = nn.ModuleDict()  # state of the run, not of the network
    if len(config.modalities) == 2:
        for m, encoder in model.encoders.items():
            prototypes[m] = Prototypes(config.num_classes, encoder.dim).to(config.device)
    optimizer = build_optimizer(model.parameters(), config)
    means = None
    for epoch in run.epochs({"model": model, "prototypes": prototypes, "optimizer": optimizer}):
        if prototypes and means is None:  # at the start, and once more after a --resume
            source = model if epoch else settled(model, subset, config)
            means = subset_means(source, subset, config)
        for m in prototypes:
            prototypes[m].update(*means[m], config.momentum_epsilon)  # Eq. (12)
        per = config.method == "pmr" and epoch < config.per_epochs  # in the first E_r epochs
        names = ("loss", "accuracy", "rho") if prototypes else ("loss", "accuracy")
        totals = Totals(names, config.device)
        model.train()
        for inputs, labels, _ in run.batches(splits.train, optimizer):
            logits, features = forward(model, inputs, config)
            loss = F.cross_entropy(logits, labels)  # Eq. (2)
            loss, *rho = rebalance(loss, features, labels, prototypes, config, per)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals.add(len(labels), loss, count_correct(logits, labels), *rho)
        means = subset_means(model, subset, config)
        validation, _ = evaluate(model, splits.val, means, config)
        run.end_epoch({"train": totals.means(), "val": validation})


def rebalance(loss, features, labels, prototypes, config, per):
    """The loss with the terms of the run's method and, where there are prototypes, rho."""
    if not prototypes:
        return (loss,)
    known = next(iter(prototypes.values())).known  # one subset, so equal in both modalities
    with torch.set_grad_enabled(config.method != "joint"):
        logits0, logits1 = (prototypes[m](features[m]) for m in config.modalities)
    if config.method == "joint":
        return loss, imbalance_ratio(logits0, logits1, labels, known)
    mu = config.mu if per else 0.0
    return pmr_loss(loss, logits0, logits1, labels, known, config.alpha, mu, config.coefficients)


def evaluate(model, split, means, config):
    """Metrics of a split, and its outputs. In each of several modalities also `prototype`: the
    accuracy of the nearest of the class `means` of D_s, which every fusion has."""
    outputs = predict(model, split, config)
    metrics = measure(model, outputs, split)
    for m in means:
        nearest = prototype_logits(outputs[m], *means[m])
        metrics[m]["prototype"] = accuracy(nearest, outputs["labels"])
    return metrics, outputs


@torch.no_grad()
def test(run, model, splits, config):
    """The test split, looked at here only: by the best network on validation, and by the last."""
    subset, found = draw_subset(splits.train, config), {}
    for name in ("best.pt", "last.pt"):
        run.restore({"model": model}, name)
        means = subset_means(model, subset, config)
        found[name], outputs = evaluate(model, splits.test, means, config)
    last = found["last.pt"]
    for m, probe in probe_encoders(lambda x: forward(model, x, config)[1], splits).items():
        last[m]["probe"] = probe
    summary = run.summarize(last, found["best.pt"]) | {"parameters": count_parameters(model)}
    if len(config.modalities) == 2:
        summary["rho"] = run.history[-1]["train"]["rho"]  # mean over the last epoch
    return summary, arrays(outputs), curves(config)


def curves(config):
    """Panels of curves.png: accuracies, and the imbalance ratio (Fig. 4)."""
    accuracies = {"train": "train.accuracy", "validation": "val.accuracy"}
    accuracies |= {f"{m} prototypes": f"val.{m}.prototype" for m in config.modalities}
    ratio = f"imbalance ratio rho ({' / '.join(config.modalities)})"
    return {"accuracy (%)": accuracies, ratio: {"training": "train.rho"}}


# ---- Command line ----

# Defaults, and by dataset what differs. [P] paper, Sec. 5.2; [C] released code; [B] the commands
# logged beside it; the rest is ours, fixed before a test split was read.
COMMON = {
    "batch_size": 64,  # [P]
    "lr": 1e-3,  # [P], decays to 1e-4
    "momentum": 0.9,  # [P]
    "weight_decay": 1e-4,  # [P]
    "schedule": "step",  # [C] from epoch 70 a tenth; here for the last 30 percent
    "epochs": 100,
    "alpha": 1.0,  # [P] 1 or 2, by dataset
    "mu": 0.01,  # [P] 1e-2 or 1e-3, by dataset; which for which: ours
    "momentum_epsilon": 0.2,  # [C]; [B] mostly 0
    "subset_fraction": 0.1,  # [P]
    "per_epochs": lambda args: math.ceil(args.epochs / 5),
}
RECIPES = {
    "digits": {**COMMON, "epochs": 20, "lr": 0.01, "schedule": "none"},
    "cg-mnist": {**COMMON, "color_variance": 0.03},  # epochs and alpha [B], variance [C]
    "av-digits": {**COMMON, "epochs": 20, "lr": 0.01},
    "synthetic": {**COMMON, "epochs": 30, "lr": 0.05, "schedule": "cosine"},
    "features": {**COMMON, "epochs": 20, "lr": 0.01, "schedule": "none"},
    "crema-d": {**COMMON, "alpha": 2.0},  # alpha [B] 2 or 3; epochs [B] 130 or 150
    "ave": {**COMMON, "alpha": 2.0},  # alpha [B] 0.5 to 2; epochs [B] 130
    "vggsound": COMMON,
    "modelnet40": COMMON,
}
WATCH = ("subset_fraction", "momentum_epsilon")
METHODS = {  # and the flags that decide their results
    "pmr": (*WATCH, "alpha", "coefficients", "mu", "per_epochs"),
    "pmr-no-per": (*WATCH, "alpha", "coefficients"),
    "joint": WATCH,
    "unimodal": (),
}


def add_flags(add):
    add("--alpha", type=SIZE, metavar="X", help="weight of PCE, Eq. (10)")
    add("--mu", type=SIZE, metavar="X", help="weight of PER, Eq. (13)")
    add("--momentum-epsilon", type=number(float, 0, 1), metavar="X", help="epsilon of Eq. (12)")
    add("--per-epochs", type=number(int, 0), metavar="N", help="E_r; default: first fifth")
    share = number(float, 0, 1, open_low=True)
    add("--subset-fraction", type=share, metavar="X", help="D_s, a share of the training data")
    rules = {"choices": ["clip", "binary"], "default": "clip"}
    add("--coefficients", **rules, help="Eq. (11) or the released code's 0 and 1 (%(default)s)")


def columns(modalities):
    """Columns of the table: title -> where the number stands in a summary.

    head: accuracy of a modality's share of the fused logits; prototypes: see `evaluate`.
    """
    found = {"test": "test.accuracy", "macro-F1": "test.macro_f1", "best": "best.test.accuracy"}
    for m in modalities:
        found |= {f"{m} head": f"test.{m}.head", f"{m} prototypes": f"test.{m}.prototype"}
    return found


SCRIPT = Script(
    *("pmr", __doc__, METHODS, ("joint", "pmr"), FUSIONS, RECIPES, add_flags),
    legend="Prototypes: how often the nearest class mean in a modality's features alone is right.",
)


def main(argv=None):
    """Run the command line; returns the summary of the run, or {"runs": ..., "table": ...}."""
    command = Command(SCRIPT, argv)
    count = len(command.splits.modalities)
    if {"pmr", "pmr-no-per"} & set(command.methods) and count != 2:
        raise UserError(
            f"PMR's equations compare two modalities; {command.args.dataset} has {count}. "
            "Use joint."
        )
    summaries = []
    for config in command.configs():
        run = Run(config)
        if run.summary is None or config.eval_only:  # a finished run is reported, not trained again
            model = build_model(config, command.splits)
            if not config.eval_only:
                train(run, model, command.splits, config)
            run.finish(*test(run, model, command.splits, config))
        summaries.append(run.summary)
    return command.report(summaries, columns(command.splits.modalities))


if __name__ == "__main__":
    run_command(main)
