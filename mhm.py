"""MHM: Multi-head Modularization (Lee, Park, Yun, Chang, AAAI 2022).
https://doi.org/10.1609/aaai.v36i7.20698

A network is cut into uni-modal embeddings theta, a multi-modal embedding phi and a head psi. Heads
with training data of their own take turns: first phi is frozen while the head learns, then the head
while phi learns to suit it, on data that this head has not seen. Theta learns in both phases. One
head is deployed. Method joint is the paper's ETE, one network trained end to end.

    python mhm.py                                               # bundled digits, a minute on a CPU
    python mhm.py --dataset av-digits --method joint mhm --heads 3 --seeds 0 1 2
    python -m experiments.mhm table3 --seeds 0 1 2 3 4          # Table 3 of the paper

Every run leaves its configuration, metrics, predictions, curves and checkpoints in
runs/mhm/<dataset>/<method>-<fusion>[-<knob>=<value>]-seed<k>/. See docs/mhm.md.

Differs from the paper, or settles what it leaves open (no code or supplement was at hand):
- An epoch is a round, one pass over the data, phi on a K-th of it; after head K comes head 1: ours.
- Folds are drawn once; their sizes differ by one if K does not divide the data: ours.
- Every module has its own optimizer, whose moments rest while the module is frozen: ours.
- Frozen BatchNorm keeps and uses its running statistics; frozen dropout stays on: ours.
- Deployed is the best head on validation after a cycle of K epochs, else the last trained: ours.
- Ensembles average probabilities; network k of ensemble learns from H^k: ours.
- The E-phase of head-ensemble is on E^k, with all heads frozen: ours.
- MMM swaps phi^k: frozen in the H-phase, and deployed by the rule for heads: ours.
- Shake-shake has two branches, with weights drawn for each sample: ours.
- GS is the mean over ordered pairs of networks, or from their mean: the paper names no pairing.
- By epoch error, gap, GS (of 1,000 items) and GS-harness are on validation, not on test data;
  missing and hitting ratio are shares of all test items: ours.
- None of its tasks is here (AVE second by second, THUMOS14, CMU-MOSEI): videos are classified as
  wholes. K = 4 is the paper's for AVE. Networks and the rest: see EMBEDDING_DIM and RECIPES, ours.
"""

from common.command_line import Command, Script, run_command
from common.datasets import split_folds
from common.device import autocast
from common.errors import UserError
from common.evaluation import Totals, arrays, collect, count_correct, probe_encoders
from common.flags import number
from common.metrics import accuracy, count_parameters
from common.networks.encoders import initialize
from common.networks.fusion import FUSIONS
from common.networks.multimodal import build_encoders, seed_module
from common.networks.shake_shake import ShakeShake
from common.optimizer import build_optimizer
from common.run import Run
from common.seeding import make_generator
from common.tasks import Classification

# isort: split
# ---- Method ----

import math
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

KINDS = ("theta", "phi", "psi")  # uni-modal embeddings, multi-modal embedding, head


class Phase(NamedTuple):
    """A part of an epoch: a pass over some samples, in which some modules learn."""

    samples: torch.Tensor  # (n,) positions in the training split
    paths: list  # of (i, j, k): networks psi_k(phi_j(theta_i(x))); several outputs are averaged
    trained: set  # the kinds of modules that learn; the others are frozen


def phases(method, epoch, folds):
    """What an epoch trains: a round, together one pass over the data, K - 1 for the ensemble.

    folds: K pairs (H^k, E^k) of positions: all folds but the k-th, and the k-th."""
    variant, k = variant_of(method), epoch % len(folds)
    if method == "mhm":
        head_set, embedding_set = folds[k]
        return [
            Phase(head_set, [(0, 0, k)], {"theta", "psi"}),  # H-phase, Eq. (2): phi frozen
            Phase(embedding_set, [(0, 0, k)], {"theta", "phi"}),  # E-phase, Eq. (3): psi^k frozen
        ]
    networks, everything = members(method, len(folds)), set(KINDS)
    if variant is PLAIN:
        return [Phase(torch.cat(folds[0]).sort().values, networks, everything)]
    if method == "ensemble":  # independent networks, each on its head-specific set
        return [Phase(folds[i][0], [path], everything) for i, path in enumerate(networks)]
    path = networks[k % len(networks)]
    head_set, embedding_set = folds[0 if variant.one_set else k]
    trained = ({"theta", "psi"}, {"theta", "phi"}) if variant.freezing else (everything, everything)
    averaged = networks if variant.averaged else [path]
    return [Phase(head_set, [path], trained[0]), Phase(embedding_set, averaged, trained[1])]


class Variant(NamedTuple):
    """How a method of Sec. 5 differs from MHM."""

    several: tuple = ("psi",)  # the kinds of modules of which there are K instead of one
    freezing: bool = True  # of phi in the H-phase, of psi in the E-phase
    one_set: bool = False  # every round has (H^1, E^1), not the next (H^k, E^k)
    averaged: bool = False  # all members predict together; the E-phase learns from their average


VARIANTS = {
    "mhm": Variant(),
    "mhm-no-freeze": Variant(freezing=False),
    "ensemble": Variant(several=KINDS, freezing=False, averaged=True),
    "one-head-one-set": Variant(several=(), one_set=True),
    "one-head-k-sets": Variant(several=()),
    "k-heads-one-set": Variant(one_set=True),
    "head-ensemble": Variant(averaged=True),
    "mmm": Variant(several=("phi",)),
}
PLAIN = Variant(several=())  # joint training, alone, with dropout or shake-shake


def variant_of(method):
    """How `method` differs from MHM; ValueError for one that there is not."""
    plain = method in ("joint", "dropout", "shake-shake") or method.startswith("unimodal-")
    if not plain and method not in VARIANTS:
        raise ValueError(f"there is no method {method!r}")
    return PLAIN if plain else VARIANTS[method]


def members(method, num_folds):
    """Every network (i, j, k) that one run of `method` trains, in the order of the rounds."""
    several = variant_of(method).several
    count = num_folds if several else 1
    return [tuple(n if kind in several else 0 for kind in KINDS) for n in range(count)]


def modules(paths, kinds=KINDS):
    """Names of the modules of `kinds` on the paths (i, j, k), e.g. {"theta-0", "psi-2"}."""
    on_path = {pair for path in paths for pair in zip(KINDS, path, strict=True)}
    return {f"{kind}-{n}" for kind, n in on_path if kind in kinds}


def deploy(method, scores, epoch):
    """Numbers of the members that predict after `epoch` (from 0): one, or all if averaged.

    At the end of a cycle the best on validation, before it the last trained; the paper only says
    that one head is selected. scores: of each member on validation, None without such data."""
    count, last = len(scores), epoch % len(scores)
    if variant_of(method).averaged:
        return list(range(count))
    if last < count - 1 or None in scores:
        return [last]
    return [max(range(count), key=lambda k: (scores[k], k))]


def set_trainable(module, trainable):
    """Training mode, frozen or not. Gradients still flow through a frozen module to its input.

    Its optimizer must not step: momentum and weight decay would move it even by zero gradients.
    Frozen BatchNorm keeps its running statistics; dropout goes on, as in joint training."""
    module.train()
    module.requires_grad_(trainable)
    for part in module.modules():
        if not trainable and isinstance(part, nn.modules.batchnorm._NormBase):
            part.eval()


def pairwise_divergence(log_p):
    """GS in nats: mean of KL(p_i || p_j) over ordered pairs i != j and over items.

    log_p: (R, N, C) logarithms of R >= 2 distributions for each of N items, of networks from
    several runs, or for GS-harness from one; p counts as 1e-12 at least."""
    log_p = log_p.double().clamp_min(math.log(1e-12))
    runs, items, _ = log_p.shape
    cross = torch.einsum("inc,jnc->ij", log_p.exp(), log_p)  # sum of p_i log p_j
    divergences = cross.diagonal().unsqueeze(1) - cross
    return divergences.sum().item() / (runs * (runs - 1) * items)


def divergence_from_mean(log_p):
    """GS read otherwise: mean of KL(p_i || mean of all p_j) in nats; at most log R."""
    log_p = log_p.double().clamp_min(math.log(1e-12))
    mean = log_p.exp().mean(dim=0).log()
    return (log_p.exp() * (log_p - mean)).sum(dim=2).mean().item()


GS = {"pairwise": pairwise_divergence, "mean": divergence_from_mean}


def missing_ratio(correct, unimodal_correct):
    """Share of the items that the network misses and any uni-modal one gets right, Sec. 5.2.

    correct: (N,) bool; unimodal_correct: (M, N) bool.
    """
    return (~correct & unimodal_correct.any(dim=0)).double().mean().item()


def hitting_ratio(correct, unimodal_correct):
    """Share of the items that the network gets right and all uni-modal ones miss, Sec. 5.2."""
    return (correct & ~unimodal_correct.any(dim=0)).double().mean().item()


# ---- Model ----

EMBEDDING_DIM = 128  # width of phi's output: ours


class ModularNet(nn.Module):
    """psi_k(phi_j(theta_i(x))), with one or several of each module.

    theta: inputs (modality -> (B, ...)) -> features; phi: features -> embedding; psi -> logits."""

    def __init__(self, theta, phi, psi):
        super().__init__()
        self.theta, self.phi, self.psi = (nn.ModuleList(part) for part in (theta, phi, psi))

    def forward(self, inputs, paths):
        """A list of logits (B, C), one for each path (i, j, k)."""
        features = {i: self.theta[i](inputs) for i in {i for i, _, _ in paths}}
        embeddings = {(i, j): self.phi[j](features[i]) for i, j in {path[:2] for path in paths}}
        return [self.psi[k](embeddings[i, j]) for i, j, k in paths]

    def parts(self):
        """Every module by its name, such as "psi-2"."""
        return {f"{kind}-{n}": x for kind in KINDS for n, x in enumerate(getattr(self, kind))}


class UnimodalEmbeddings(nn.ModuleDict):
    """theta: modality -> encoder, applied each to its own input."""

    def forward(self, inputs):
        return {m: encoder(inputs[m]) for m, encoder in self.items()}


class OnlyModality(nn.Module):
    """The place of phi in a uni-modal network, which has none: hands its features on."""

    def forward(self, features):
        (z,) = features.values()
        return z


def build_phi(config, dims, number):
    """The multi-modal embedding of features, modality -> (B, dims[modality])."""
    seed_module(config, f"phi-{number}")
    if len(dims) == 1:
        return OnlyModality()
    return nn.Sequential(FUSIONS[config.fusion](dims, EMBEDDING_DIM), nn.ReLU())


def build_psi(config, width, number):
    """A head: one linear layer on an embedding (B, width), with dropout, or several branches."""
    seed_module(config, f"psi-{number}")
    branches = config.branches if config.method == "shake-shake" else 1
    heads = nn.ModuleList(nn.Linear(width, config.num_classes) for _ in range(branches))
    heads.apply(initialize)
    if config.method == "shake-shake":
        return ShakeShake(heads)
    if config.method == "dropout":
        return nn.Sequential(nn.Dropout(0.5), heads[0])
    return heads[0]


def build_model(config, splits):
    """As many copies of each module as the method has, each with a start of its own."""
    networks = members(config.method, config.heads)
    thetas, phis, psis = (len(set(numbers)) for numbers in zip(*networks, strict=True))
    theta = [UnimodalEmbeddings(build_encoders(config, splits, n)) for n in range(thetas)]
    dims = {m: encoder.dim for m, encoder in theta[0].items()}
    width = EMBEDDING_DIM if len(dims) > 1 else dims[config.modalities[0]]
    phi = [build_phi(config, dims, n) for n in range(phis)]
    psi = [build_psi(config, width, n) for n in range(psis)]
    return ModularNet(theta, phi, psi).to(config.device, memory_format=torch.channels_last)


# ---- Training ----


def train(run, model, splits, config):
    """Sec. 4. An optimizer rests, moments included, while its module is frozen or swapped out."""
    order = torch.randperm(len(splits.train), generator=make_generator(config.seed, "folds"))
    folds = split_folds(order, config.heads)
    optimizers = {
        name: build_optimizer(module.parameters(), config)
        for name, module in model.parts().items()
        if list(module.parameters())
    }
    trace = Trace(config, splits)
    samples = sum(len(phase.samples) for phase in phases(config.method, 0, folds))
    for epoch in run.epochs({"model": model, "trace": trace, **optimizers}, samples):
        totals = Totals(("loss", "accuracy"), config.device)
        for part, phase in enumerate(phases(config.method, epoch, folds)):
            learners = modules(phase.paths, phase.trained)
            for name, module in model.parts().items():
                set_trainable(module, name in learners)
            learning = [x for name, x in optimizers.items() if name in learners]
            subset = splits.train.subset(phase.samples)
            for inputs, labels, _ in run.batches(subset, *optimizers.values(), part=(part,)):
                logits = Classification.average(forward(model, inputs, phase.paths, config))
                loss = F.cross_entropy(logits, labels)  # Eq. (1), (2) or (3)
                for optimizer in learning:
                    optimizer.zero_grad()
                loss.backward()
                for optimizer in learning:
                    optimizer.step()
                totals.add(len(labels), loss, count_correct(logits, labels))
        measured, logits = measure(model, splits, epoch, config)
        trace.write(epoch, logits)
        run.end_epoch({"train": totals.means(), **measured})


def forward(model, inputs, paths, config):
    """A list of logits (B, C) of the networks `paths`, in float32."""
    with autocast(config):
        outputs = model(inputs, paths)
    return [logits.float() for logits in outputs]


class Trace(nn.Module):
    """What the deployed network predicts after every epoch, on up to 1000 validation items."""

    def __init__(self, config, splits):
        super().__init__()
        shape = (config.epochs, min(len(splits.val), 1000), config.num_classes)
        self.register_buffer("log_p", torch.zeros(shape, device=config.device))

    def write(self, epoch, logits):
        self.log_p[epoch] = logits[: self.log_p.shape[1]].log_softmax(dim=1)


def predict(model, split, paths, config):
    """`members` (P, N, C), the logits of the networks `paths`, their average `logits` (N, C),
    `labels` and `index` of a whole split, in evaluation mode."""

    def look(inputs):
        return {"members": torch.stack(forward(model, inputs, paths, config), dim=1)}

    model.eval()
    outputs = collect(look, split)
    outputs["members"] = outputs["members"].transpose(0, 1)
    return outputs | {"logits": Classification.average(list(outputs["members"]))}


def measure(model, splits, epoch, config):
    """What is logged after an epoch, and the deployed logits (N, C) on validation.

    gap: the generalization gap of Sec. 5.2, error on val_iid minus error on as many training items.
    gs_harness: the divergence among the members of this run on validation, by both definitions.
    """
    outputs = predict(model, splits.val, members(config.method, config.heads), config)
    each, labels = outputs["members"], outputs["labels"]
    deployed = deploy(config.method, [accuracy(logits, labels) for logits in each], epoch)
    logits = Classification.average([each[k] for k in deployed])
    seen = splits.train.head(len(splits.val_iid))
    seen, unseen = (evaluate(model, split, deployed, config)[0] for split in (seen, splits.val_iid))
    measured = {
        "val": Classification.measure(logits, labels),
        "gap": seen["accuracy"] - unseen["accuracy"],
        "deployed": deployed,
    }
    if len(each) > 1:
        log_p = each.log_softmax(dim=2)
        measured["gs_harness"] = {name: divergence(log_p) for name, divergence in GS.items()}
    return measured, logits


def evaluate(model, split, deployed, config):
    """Metrics of a split by the deployed network, and its outputs."""
    networks = members(config.method, config.heads)
    outputs = predict(model, split, [networks[k] for k in deployed], config)
    metrics = Classification.measure(outputs["logits"], outputs["labels"])
    if len(config.modalities) == 1:
        metrics[config.modalities[0]] = {"alone": metrics["accuracy"]}
    return metrics, outputs


@torch.no_grad()
def test(run, model, splits, config):
    """The test split, looked at here only: by the best network on validation, and by the last."""
    trace = Trace(config, splits)
    run.restore({"model": model}, "best.pt")  # and the history up to that epoch
    best, _ = evaluate(model, splits.test, run.history[-1]["deployed"], config)
    run.restore({"model": model, "trace": trace}, "last.pt")
    end = run.history[-1]
    last, outputs = evaluate(model, splits.test, end["deployed"], config)
    seen, _ = evaluate(model, splits.train, end["deployed"], config)
    paths = [members(config.method, config.heads)[k] for k in end["deployed"]]
    for m, found in probe(model.theta[paths[0][0]], splits, config).items():
        last.setdefault(m, {})["probe"] = found
    deployed = [model.parts()[name] for name in modules(paths)]
    summary = run.summarize(last, best) | {"parameters": count_parameters(*deployed)}
    summary["gap"] = {"val_iid": end["gap"], "test": seen["accuracy"] - last["accuracy"]}
    summary |= {"heads": run.arguments.get("heads"), "deployed": end["deployed"]}
    if "gs_harness" in end:
        summary["gs_harness"] = end["gs_harness"]
    return summary, arrays(outputs) | {"val_trace": trace.log_p}, CURVES


def probe(theta, splits, config):
    """Linear probes of the encoders of one theta, in evaluation mode, modality -> percent."""

    def encode(inputs):
        with autocast(config):
            features = theta(inputs)
        return {m: z.float() for m, z in features.items()}

    return probe_encoders(encode, splits)


CURVES = {  # panel -> label -> where the number stands in an entry of the history
    "accuracy (%)": {"train": "train.accuracy", "validation": "val.accuracy"},
    "generalization gap (points)": {"val_iid - train": "gap"},
    "GS-harness (nats)": {"validation": "gs_harness.pairwise"},
}

# ---- Command line ----

# Defaults by dataset, all ours: the paper has none of these but AVE, and leaves the numbers for it
# to a supplement.
COMMON = {"batch_size": 64, "momentum": 0.9, "weight_decay": 1e-4}
SMALL = {**COMMON, "epochs": 20, "lr": 0.01, "schedule": "none"}
LARGE = {**COMMON, "epochs": 100, "lr": 1e-3, "schedule": "step"}
RECIPES = {
    "digits": SMALL,
    "cg-mnist": LARGE,
    "av-digits": {**SMALL, "schedule": "step"},
    "synthetic": {**SMALL, "epochs": 30, "lr": 0.05, "schedule": "cosine"},
    "features": SMALL,
    **dict.fromkeys(("crema-d", "ave", "vggsound", "modelnet40"), LARGE),
}
METHODS = {  # and the flags that decide their results
    **dict.fromkeys(VARIANTS, ("heads",)),
    "joint": (),
    "dropout": (),
    "shake-shake": ("branches",),
    "unimodal": (),
}


def add_flags(add):
    several = number(int, 2)
    heads = "heads and folds; paper: 4 on AVE, 2 on THUMOS14, 3 on CMU-MOSEI (%(default)s)"
    add("--heads", type=several, default=4, metavar="K", help=heads)
    add(
        "--branches",
        type=number(int, 2, 64),
        default=2,
        metavar="N",
        help="of shake-shake (%(default)s)",
    )


COLUMNS = {  # of the table: title -> where the number stands in a summary
    "test": "test.accuracy",
    "macro-F1": "test.macro_f1",
    "best": "best.test.accuracy",
    "gap (iid)": "gap.val_iid",
    "gap (test)": "gap.test",
    "GS-harness": "gs_harness.pairwise",
}
DIGITS = {"GS-harness": 3}  # decimals

COMPARED = ("joint", "mhm-no-freeze", "mhm")
PHIS = ("concat", "sum", "film", "gated")
SCRIPT = Script("mhm", __doc__, METHODS, COMPARED, PHIS, RECIPES, add_flags)


def main(argv=None):
    """Run the command line; returns the summary of the run, or {"runs": ..., "table": ...}."""
    command = Command(SCRIPT, argv)
    heads, count = command.args.heads, len(command.splits.train)
    if heads > count:
        raise UserError(f"{count} training samples do not make {heads} folds; lower --heads.")
    summaries = []
    for config in command.configs():
        run = Run(config)
        if run.summary is None or config.eval_only:  # a finished run is reported, not trained again
            model = build_model(config, command.splits)
            if not config.eval_only:
                train(run, model, command.splits, config)
            run.finish(*test(run, model, command.splits, config))
        summaries.append(run.summary)
    return command.report(summaries, COLUMNS, DIGITS)


if __name__ == "__main__":
    run_command(main)
