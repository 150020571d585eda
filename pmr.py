"""PMR: Prototypical Modal Rebalance for Multimodal Learning (Fan et al., CVPR 2023).
https://arxiv.org/abs/2211.07089

Trained jointly, the modality that learns fast holds back the slow one. The centroids of the classes
in each modality's features (prototypes) tell, without any head, which one is slow. That one is
pulled towards its prototypes; early in training the other one is kept from settling too soon.

    python pmr.py                                               # bundled digits, a minute on a CPU
    python pmr.py --dataset cg-mnist --fusion film --seeds 0 1 2
    python pmr.py --dataset cg-mnist --device cuda --precision bf16

Every run leaves its configuration, metrics, predictions, curves and checkpoints in
runs/pmr/<dataset>/<method>-<fusion>[-<knob>=<value>]-seed<k>/. See docs/pmr.md.
"""

import math
import sys
from contextlib import suppress
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn as nn
import torch.nn.functional as F

from common.command_line import (
    add_rival_flags,
    build_parser,
    check_methods,
    fill_from_recipe,
    load_splits,
    number,
    recipe_for,
    run_command,
    shared_knobs,
)
from common.datasets import DATASETS
from common.encoders import build_encoder
from common.errors import UserError
from common.experiments import (
    experiment_folder,
    paper_numbers,
    print_table,
    run_experiment,
    tabulate,
    without_flag,
)
from common.fusion import FUSIONS, Sum
from common.metrics import accuracy, collect, count_parameters, macro_f1, probe_encoders
from common.progress import Progress
from common.rebalance import RIVALS, build_rival, check_rivals, rival_knobs
from common.seeding import make_generator, seed_phase
from common.training import (
    Run,
    build_optimizer,
    forward,
    pick_device,
    scheduled_lr,
    set_lr,
)

# ---- Method ----


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


class MultimodalNet(nn.Module):
    """One encoder for each modality, and a fusion head: inputs -> logits (B, C) and features."""

    def __init__(self, encoders, fusion):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion

    def forward(self, inputs):
        features = {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}
        return self.fusion(features), features


def build_model(config, splits):
    """The network of a method, initialised from the run's seed."""
    seed_phase(config.seed, "initialisation")
    modalities = splits.modalities
    if config.method.startswith("unimodal-"):
        modalities = (config.method.removeprefix("unimodal-"),)
    encoders = {
        m: build_encoder(config.dataset, splits.shapes[m], pretrained=config.pretrained)
        for m in modalities
    }
    dims = {m: encoder.dim for m, encoder in encoders.items()}
    head = FUSIONS[config.fusion] if config.fusion else Sum  # of one modality: a linear classifier
    model = MultimodalNet(encoders, head(dims, config.num_classes))
    return model.to(config.device, memory_format=torch.channels_last)


# ---- Training ----


def build_prototypes(model, config):
    """One `Prototypes` for each modality, none for a single one: state of the run, not the net."""
    encoders = model.encoders.items() if len(model.encoders) > 1 else ()
    return nn.ModuleDict(
        {m: Prototypes(config.num_classes, encoder.dim) for m, encoder in encoders}
    ).to(config.device)


def draw_subset(splits, config):
    """D_s: a fixed random share of the training data. Released code: drawn anew each epoch."""
    size = max(1, round(config.subset_fraction * len(splits.train)))
    order = torch.randperm(len(splits.train), generator=make_generator(config.seed, "subset"))
    return splits.train.subset(order[:size])


def forward_split(model, split, config):
    """Logits, features and labels of a whole split, in evaluation mode."""

    def look(inputs):
        logits, features = forward(model, inputs, config)
        return {"logits": logits, **features}

    model.eval()
    return collect(look, split)


def subset_means(model, subset, config):
    """Eq. (6) in every modality: modality -> (means, present)."""
    outputs = forward_split(model, subset, config)
    return {
        m: class_means(outputs[m], outputs["labels"], config.num_classes) for m in model.encoders
    }


def train(run, model, splits, config):
    """Algorithm 1. `joint` and `unimodal-*` are the same loop with the cross-entropy alone; see
    common/rebalance.py for the rivals."""
    subset = draw_subset(splits, config)
    prototypes = build_prototypes(model, config)
    rival = build_rival(model, splits.train, splits.num_classes, config)

    def new_optimizer(parameters):
        return build_optimizer(config.optimizer, parameters, config.lr, config.weight_decay)

    def batches(phase, epoch, optimizer):
        generator = seed_phase(config.seed, phase, epoch)
        set_lr(optimizer, scheduled_lr(config.schedule, config.lr, epoch, config.epochs))
        return rival.data.batches(config.batch_size, generator, augment=True)

    optimizer = new_optimizer([*model.parameters(), *rival.parameters()])
    state = {"model": model, "prototypes": prototypes, "rival": rival, "optimizer": optimizer}
    first_epoch = run.start(state)
    steps = math.ceil(len(rival.data) / config.batch_size)
    progress = Progress(run.label, config.epochs, steps, first_epoch)
    look = partial(forward, config=config)
    for epoch in range(first_epoch, config.epochs):
        rival.start_epoch(epoch, config.epochs, model, look, new_optimizer, batches)
        if prototypes:
            means = subset_means(model, subset, config)
            for m in prototypes:
                prototypes[m].update(*means[m], config.momentum_epsilon)
        mu = config.mu if epoch < config.per_epochs else 0.0  # PER in the first E_r epochs
        seen = progress(batches("train", epoch, optimizer))
        training = train_epoch(model, prototypes, rival, optimizer, seen, config, mu)
        validation, _ = evaluate(model, splits.val, subset, config)
        run.check_finite(training["loss"] + validation["loss"])
        run.end_epoch({"train": training, "val": validation}, state)
    progress.close()


def train_epoch(model, prototypes, rival, optimizer, batches, config, mu):
    """One pass over the training data. Totals stay on the device until its end."""
    model.train()
    totals = torch.zeros(4, device=config.device)  # samples, summed loss, correct, summed rho
    for inputs, labels, _ in batches:
        logits, features = forward(model, inputs, config)
        loss, rho = training_loss(logits, features, labels, prototypes, rival, config, mu)
        optimizer.zero_grad()
        loss.backward()
        rival.modulate(model, features, labels)
        optimizer.step()
        with torch.no_grad():
            samples = torch.full_like(loss, len(labels))
            correct = (logits.argmax(dim=1) == labels).sum()
            totals += torch.stack([samples, samples * loss, correct, samples * rho])
    samples, loss, correct, rho = totals.tolist()
    metrics = {"loss": loss / samples, "accuracy": 100 * correct / samples}
    return {**metrics, "rho": rho / samples} if len(prototypes) == 2 else metrics


def training_loss(logits, features, labels, prototypes, rival, config, mu):
    """The loss of the run's method, and rho, which joint training and the rivals only watch."""
    loss = rival.loss(logits, features, labels)  # Eq. (2), if the method is no rival
    if len(prototypes) != 2:
        return loss, torch.zeros_like(loss)
    pulls = config.method in ("pmr", "pmr-no-per")
    with torch.set_grad_enabled(pulls):
        logits0, logits1 = (prototypes[m](z) for m, z in features.items())
    known = next(iter(prototypes.values())).known  # one subset, so equal in both modalities
    if not pulls:
        return loss, imbalance_ratio(logits0, logits1, labels, known)
    return pmr_loss(loss, logits0, logits1, labels, known, config.alpha, mu, config.coefficients)


def evaluate(model, split, subset, config):
    """Accuracies and macro-F1 of `split` in percent, its loss, and what it predicts, as arrays.

    Each modality is read out by its share of the logits (`head`), where the fusion has one, and by
    the nearest class mean of the subset under the present encoder (`prototype`); a modality
    trained alone by its own classifier (`alone`).
    """
    outputs = forward_split(model, split, config)
    logits, labels = outputs["logits"], outputs["labels"]
    metrics = {
        "accuracy": accuracy(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "loss": F.cross_entropy(logits, labels).item(),
    }
    modalities = list(model.encoders)
    if len(modalities) == 1:
        metrics[modalities[0]] = {"alone": metrics["accuracy"]}
    else:
        means = subset_means(model, subset, config)
        metrics |= {
            m: {"prototype": accuracy(prototype_logits(outputs[m], *means[m]), labels)}
            for m in modalities
        }
        with torch.no_grad(), suppress(NotImplementedError):
            for m, part in model.fusion.unimodal_logits(outputs).items():
                metrics[m]["head"] = accuracy(part, labels)
    predictions = {"index": outputs["index"], "label": labels, "logits": logits}
    return metrics, {name: tensor.cpu().numpy() for name, tensor in predictions.items()}


def run_method(args, defaults, method, seed, splits, device):
    """Train and test one method with one seed; a finished run is reported, not trained again."""
    chosen = {"method": method, "seed": seed, "device": device, "num_classes": splits.num_classes}
    config = SimpleNamespace(**{**vars(args), **chosen})
    if method.startswith("unimodal-"):
        config.fusion = None
    if method == "pmr-no-per":
        config.mu = 0.0
    arguments = {"script": "pmr", "seed": seed, **{k: getattr(config, k) for k in knobs_of(config)}}
    run = Run(arguments, defaults, splits.sizes, device, args)
    if run.summary is not None and not args.eval_only:
        return run.summary
    model = build_model(config, splits)
    if args.eval_only:
        return test(run, model, splits, config)[0]
    train(run, model, splits, config)
    summary, predictions = test(run, model, splits, config)
    run.finish(summary, predictions, curves(run.history, list(model.encoders)))
    return summary


def test(run, model, splits, config):
    """The summary: the test split read once, by the last network and the best on validation."""
    subset = draw_subset(splits, config)
    run.restore({"model": model}, "best.pt")
    best, _ = evaluate(model, splits.test, subset, config)
    run.restore({"model": model}, "last.pt")
    last, predictions = evaluate(model, splits.test, subset, config)
    with torch.no_grad():
        probes = probe_encoders(lambda x: forward(model, x, config)[1], splits.train, splits.test)
    for m, found in probes.items():
        last[m]["probe"] = found
    summary = run.summarize(last, best)
    summary["parameters"] = count_parameters(model)
    if "rho" in run.history[-1]["train"]:
        summary["rho"] = run.history[-1]["train"]["rho"]
    return summary, predictions


def curves(history, modalities):
    """Panels of curves.png: accuracies, and the imbalance ratio where there is one (Fig. 4)."""
    accuracies = {
        "train": [epoch["train"]["accuracy"] for epoch in history],
        "validation": [epoch["val"]["accuracy"] for epoch in history],
    }
    if len(modalities) > 1:
        for m in modalities:
            accuracies[f"{m} prototypes"] = [epoch["val"][m]["prototype"] for epoch in history]
    panels = {"accuracy (%)": accuracies}
    if "rho" in history[0]["train"]:
        ratio = f"imbalance ratio rho ({modalities[0]} / {modalities[1]})"
        panels[ratio] = {"training": [epoch["train"]["rho"] for epoch in history]}
    return panels


# ---- Command line ----

# Defaults, and by dataset what differs. [P] paper, Sec. 5.2; [C] released code or its logged
# commands, where the paper leaves it open; the rest is ours, fixed before a test split was read.
COMMON = {
    "batch_size": 64,  # [P]
    "lr": 1e-3,  # [P], decays to 1e-4
    "weight_decay": 1e-4,  # [P]
    "schedule": "step",  # [C]
    "alpha": 1.0,  # [P] 1 or 2
    "mu": 0.01,  # [P] 1e-2 or 1e-3
    "momentum_epsilon": 0.2,  # [C]
    "subset_fraction": 0.1,  # [P]
}
RECIPES = {
    "digits": {**COMMON, "epochs": 20, "lr": 0.01, "schedule": "none"},
    "cg-mnist": {**COMMON, "epochs": 100},  # [C]
    "av-digits": {**COMMON, "epochs": 20, "lr": 0.01},
    "synthetic": {**COMMON, "epochs": 30, "lr": 0.05, "schedule": "cosine"},
    "features": {**COMMON, "epochs": 20, "lr": 0.01, "schedule": "none"},
    "crema-d": {**COMMON, "epochs": 100, "alpha": 2.0},  # [C]
    "ave": {**COMMON, "epochs": 100, "alpha": 2.0},  # [C]
    "vggsound": {**COMMON, "epochs": 100},
    "modelnet40": {**COMMON, "epochs": 100},
}
METHODS = ("pmr", "pmr-no-per", "joint")


def knobs_of(config):
    """Names of the arguments that decide a run's result, by method."""
    common = shared_knobs(config.dataset)
    if config.method.startswith("unimodal-"):
        return common
    common += ["subset_fraction", "momentum_epsilon"]  # all others watch prototypes too
    pull = ["alpha", "coefficients"]
    per = ["mu", "per_epochs"]
    own = {"pmr-no-per": pull, "pmr": pull + per}
    return common + own.get(config.method, rival_knobs(config.method))


def parse_args(argv=None):
    """The command line with the dataset's recipe filled in, and the defaults of all flags."""
    parser = build_parser(
        __doc__,
        method_help="pmr, pmr-no-per, joint (the paper's vanilla training), unimodal-<modality>; "
        f"rivals: {', '.join(RIVALS)}; default: pmr beside joint and each modality alone, on "
        "large data pmr",
        fusions=["concat", "sum", "film", "gated"],
        experiments=["table1"],
    )
    knobs = parser.add_argument_group("PMR")
    add = knobs.add_argument
    add("--alpha", type=number(float, 0), metavar="X", help="weight of PCE, Eq. (10)")
    add("--mu", type=number(float, 0), metavar="X", help="weight of PER, Eq. (13)")
    add("--momentum-epsilon", type=number(float, 0, 1), metavar="X", help="epsilon of Eq. (12)")
    add("--per-epochs", type=number(int, 0), metavar="N", help="E_r; default: first fifth")
    add(
        "--subset-fraction",
        type=number(float, 0, 1, open_low=True),
        metavar="X",
        help="share of the training data that prototypes are computed from",
    )
    add(
        "--coefficients",
        choices=["clip", "binary"],
        default="clip",
        help="Eq. (11) or the released code's 0 and 1 (%(default)s)",
    )
    add_rival_flags(parser)
    args = parser.parse_args(argv)
    defaults = fill_from_recipe(parser, args, recipe_for(args.dataset, RECIPES))
    defaults["per_epochs"] = math.ceil(args.epochs / 5)  # paper: "the first training few epochs"
    args.fusions = [args.fusion] if args.fusion else list(FUSIONS)
    args.fusion = args.fusion or "concat"
    if args.per_epochs is None:
        args.per_epochs = defaults["per_epochs"]
    return args, defaults


def choose_methods(args, modalities):
    """The methods to run: those named, else a comparison, or PMR alone where data are large."""
    unimodal = [f"unimodal-{m}" for m in modalities]
    methods = args.method or (
        [*unimodal, "joint", "pmr"] if DATASETS[args.dataset].small else ["pmr"]
    )
    methods = check_methods(methods, (*METHODS, *RIVALS, *unimodal), args.dataset)
    check_rivals(methods, args.fusion, modalities)
    if {"pmr", "pmr-no-per"} & set(methods) and len(modalities) != 2:
        raise UserError(
            f"PMR's equations compare two modalities; {args.dataset} has {len(modalities)}. "
            "Use joint."
        )
    return methods


def columns_of(modalities):
    """Columns of the tables: title -> where the number stands in a summary."""
    columns = {"test": "test.accuracy", "macro-F1": "test.macro_f1", "best": "best.test.accuracy"}
    for m in modalities:
        columns |= {f"{m} head": f"test.{m}.head", f"{m} prototypes": f"test.{m}.prototype"}
    return columns


def table1(args, defaults, argv):
    """Table 1: each modality alone, then every fusion with joint training, PMR without PER, PMR."""
    modalities = load_splits(args, torch.device("cpu")).modalities
    unimodal = [f"unimodal-{m}" for m in modalities]
    chosen = choose_methods(args, modalities) if args.method else [*unimodal, *METHODS]
    alone = [m for m in unimodal if m in chosen]
    fused = [m for m in reversed(METHODS) if m in chosen]
    argv = without_flag(sys.argv[1:] if argv is None else argv, "--experiment")
    calls = [({}, [*argv, "--method", *alone])] if alone else []
    if fused:
        calls += [({}, [*argv, "--fusion", f, "--method", *fused]) for f in args.fusions]
    paper = paper_numbers("pmr_table1")
    for i, m in enumerate(modalities, start=1):
        paper[f"unimodal-{m}", None] = paper[f"unimodal-{i}", None]
    printed = {key: float(row[args.dataset]) for key, row in paper.items() if args.dataset in row}
    config = SimpleNamespace(**{**vars(args), "method": "pmr"})
    arguments = {knob: getattr(config, knob) for knob in knobs_of(config)}
    folder = experiment_folder("pmr", args, arguments, defaults)
    arguments |= {"method": [*alone, *fused], "fusion": args.fusions, "seeds": args.seeds}
    return run_experiment(
        run_all,
        calls,
        arguments,
        folder,
        title=f"Table 1 on {args.dataset}, test accuracy in percent",
        pairs=[("pmr", "joint"), ("pmr-no-per", "joint")],
        paper=printed and (lambda row: {"paper": printed.get((row["method"], row["fusion"]))}),
    )


def run_all(argv):
    """Run every method with every seed: {"runs": summaries, "table": one row for each method}."""
    args, defaults = parse_args(argv)
    device = pick_device(args.device)
    splits = load_splits(args, device)
    methods = choose_methods(args, splits.modalities)
    runs = [
        run_method(args, defaults, method, seed, splits, device)
        for seed in args.seeds
        for method in methods
    ]
    table = tabulate(runs, columns_of(splits.modalities))
    print_table(table, "pmr", args)
    return {"runs": runs, "table": table}


def main(argv=None):
    """Run the command line; returns the summary of the run, or {"runs": ..., "table": ...}."""
    args, defaults = parse_args(argv)
    if args.experiment == "table1":
        return table1(args, defaults, argv)
    result = run_all(argv)
    return result["runs"][0] if len(result["runs"]) == 1 else result


if __name__ == "__main__":
    run_command(main)
