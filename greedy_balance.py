"""Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep Neural Networks
(Wu, Jastrzebski, Cho, Geras, ICML 2022). https://arxiv.org/abs/2202.05306

A multi-modal network leans on the modality that it learns from fastest. How much each branch uses
the other modality is measured after training (conditional utilization rate), how fast it learns to
do so during training (conditional learning speed); guided training evens the speeds out.

    python greedy_balance.py                                    # bundled digits, a minute on a CPU
    python greedy_balance.py --dataset cg-mnist --method guided --seeds 0 1 2
    python greedy_balance.py --dataset cg-mnist --device cuda --precision bf16

Every run leaves its configuration, metrics, predictions, curves and checkpoints in
runs/greedy_balance/<dataset>/<method>-mmtm[-<knob>=<value>]-seed<k>/. See docs/greedy_balance.md.
"""

import math
import sys
from itertools import product
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm

from common.command_line import (
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
from common.encoders import build_encoder, initialize
from common.errors import UserError
from common.experiments import (
    as_flags,
    correlate,
    distributions,
    experiment_folder,
    log_uniform,
    paper_columns,
    print_table,
    run_experiment,
    tabulate,
    trends,
    without_flag,
)
from common.fusion import MMTM, SE
from common.metrics import accuracy, collect, count_parameters, macro_f1, probe_encoders
from common.progress import Progress
from common.rebalance import RUBi
from common.seeding import seed_phase
from common.training import (
    Run,
    autocast,
    build_optimizer,
    pick_device,
    scheduled_lr,
    set_lr,
)

# ---- Method ----


def difference(values):
    """d of Def. 4.1 and 5.1: value of modality 0 minus that of modality 1; of more than two
    modalities the two most different (Sec. 6.4), the larger minus the smaller."""
    return values[0] - values[1] if len(values) == 2 else max(values) - min(values)


def utilization(accuracy, accuracy_cut):
    """Conditional utilization rate, Eq. (9) and (10): (A(f_k) - A(f_k')) / A(f_k).

    What the other modalities add to the accuracy of branch k, relative to it: for branch 0 of two
    this is u(m1 | m0). Negative where the branch is better without them, so not bounded by -1.
    """
    return (accuracy - accuracy_cut) / accuracy if accuracy > 0 else 0.0


def cut_off(block, maps, means):
    """Eq. (7): every branch goes through `block` with its own squeezed features h and the means of
    the others over the training data (Eq. 6), modality -> (C,); only its own gate is kept."""
    gated = {}
    for m in maps:
        others = {other: mean for other, mean in means.items() if other != m}
        gated[m] = block(maps, squeezed=others)[0][m]
    return gated


def effective_update(parameters):
    """mu(theta; i) of Def. 5.1: ||gradient||^2 / ||theta||^2, both over all of `parameters`.

    The text says "norm"; that it is squared, and theta that before the step, is the released code.
    """
    gradients = [p.grad for p in parameters]
    return (get_total_norm(gradients) / get_total_norm(parameters)).square()


class LearningSpeed(nn.Module):
    """Conditional learning speed s of every modality's branch, Eq. (11) and (12).

    own, cross: sums over steps of mu(theta_k) and mu(theta_k'): the branch's own parameters, and
    those of the fusion blocks that feed it (shared squeeze layers and its own excite layers).
    """

    def __init__(self, num_modalities):
        super().__init__()
        self.register_buffer("own", torch.zeros(num_modalities, dtype=torch.float64))
        self.register_buffer("cross", torch.zeros(num_modalities, dtype=torch.float64))

    @torch.no_grad()
    def update(self, groups):
        """Add a step, after backward and before the optimizer's step.

        groups: a pair (theta_k, theta_k') of parameter lists for each modality. Nothing waits for
        the device here.
        """
        self.own += torch.stack([effective_update(own) for own, _ in groups])
        self.cross += torch.stack([effective_update(cross) for _, cross in groups])

    def speeds(self):
        """(M,) s_k = log10(sum of mu(theta_k') / sum of mu(theta_k)). Base 10: released code."""
        return (self.cross / self.own).log10()


class GateMeans(nn.Module):
    """Mean gates over all samples of the regular training steps so far, for Eq. (13) and (14).

    channels: for each fusion block, modality -> C.
    after:    mean of the gates, after the sigmoid; else sigmoid of the mean activation. Eq. (13)
              can be read either way; the released code takes the mean after.
    Released code: the means also take in re-balancing, validation and test batches, weigh batches
    and not samples, and for modality 1 are those of modality 0.
    """

    def __init__(self, channels, after=True):
        super().__init__()
        self.after = after
        self.register_buffer("samples", torch.zeros((), dtype=torch.float64))
        self.sums = nn.ModuleList(nn.Module() for _ in channels)
        for sums, block in zip(self.sums, channels, strict=True):
            for m, c in block.items():
                sums.register_buffer(m, torch.zeros(c, dtype=torch.float64))

    @torch.no_grad()
    def update(self, blocks, activations):
        """Add a regular step; activations: for each block, modality -> (B, C)."""
        for block, sums, w in zip(blocks, self.sums, activations, strict=True):
            for m in w:
                values = block.gate(w[m].float()) if self.after else w[m].float()
                getattr(sums, m).add_(values.sum(dim=0))
        self.samples += len(next(iter(activations[0].values())))

    def gates(self, blocks, modality):
        """For each block {modality: mean gate (C,)}: what a step that curates `modality` uses."""
        means = [getattr(sums, modality) / self.samples for sums in self.sums]
        if not self.after:
            means = [block.gate(mean) for block, mean in zip(blocks, means, strict=True)]
        return [{modality: mean.float()} for mean in means]


class Guided:
    """Algorithm 1: which modality the next step curates (accelerates), None in a regular step.

    After a regular step past the warm-up, if |d_speed| is above `tolerance`, the branch that learns
    fastest from the others gets mean gates, so that it has to learn from its own modality, for
    `window` steps; then at least one regular step follows.
    """

    def __init__(self, modalities, tolerance, window):
        self.modalities, self.tolerance, self.window = modalities, tolerance, window
        self.chosen, self.left = None, 0

    @property
    def curated(self):
        return self.chosen if self.left else None

    def after_step(self, speed, warm_up):
        """Decide on the next step; the one moment at which the device is waited for."""
        if self.left:
            self.left -= 1
        elif not warm_up:
            s = speed.speeds().tolist()
            if abs(difference(s)) > self.tolerance:  # not if d is NaN
                self.chosen, self.left = self.modalities[s.index(max(s))], self.window

    def state_dict(self):
        return {"chosen": self.chosen, "left": self.left}

    def load_state_dict(self, state):
        self.chosen, self.left = state["chosen"], state["left"]


class Random(Guided):
    """The variant of Sec. 6.4: past the warm-up, a regular step or one that curates one modality or
    another, all with equal probability. Draws on torch's global generator."""

    def after_step(self, speed, warm_up):
        choices = (None, *self.modalities)
        draw = 0 if warm_up else int(torch.randint(len(choices), ()))
        self.chosen, self.left = choices[draw], int(draw > 0)


class Regular(Guided):
    """Every step is a regular one."""

    def after_step(self, speed, warm_up):
        pass


# ---- Model ----


class Output(NamedTuple):
    """logits, features: modality -> (B, C) and (B, D); squeezed, activations: for each fusion block
    modality -> (B, C), h and w of Eq. (1)."""

    logits: dict
    features: dict
    squeezed: list
    activations: list


class GreedyNet(nn.Module):
    """A branch for each modality, and a fusion block after each of the last stages (Fig. 1).

    With one modality the blocks are `SE`: the uni-modal network that the paper compares with.
    """

    BLOCKS = 3

    def __init__(self, encoders, num_classes, factor=1.0):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.heads = nn.ModuleDict(
            {m: nn.Linear(encoder.dim, num_classes) for m, encoder in encoders.items()}
        )
        self.heads.apply(initialize)
        block = MMTM if len(encoders) > 1 else SE
        self.blocks = nn.ModuleList(
            block(dict(zip(encoders, channels, strict=True)), factor=factor)
            for channels in zip(
                *(e.channels[-self.BLOCKS :] for e in encoders.values()), strict=True
            )
        )

    def forward(self, inputs, gates=None, means=None):
        """gates: for each block, modality -> gate (C,) in place of the computed one, Eq. (13, 14).
        means: for each block, modality -> (C,): the branches are cut off from each other, Eq. (7).
        """
        maps, squeezed, activations = inputs, [], []
        stages = list(zip(*(encoder.stages for encoder in self.encoders.values()), strict=True))
        for i, stage in enumerate(stages, start=len(self.blocks) - len(stages)):
            maps = {m: convolve(maps[m]) for m, convolve in zip(self.encoders, stage, strict=True)}
            if i >= 0 and means:
                maps = cut_off(self.blocks[i], maps, means[i])
            elif i >= 0:
                maps, h, w = self.blocks[i](maps, gates=gates[i] if gates else None)
                squeezed.append(h)
                activations.append(w)
        features = {m: encoder.pool(maps[m]) for m, encoder in self.encoders.items()}
        logits = {m: head(features[m]) for m, head in self.heads.items()}
        return Output(logits, features, squeezed, activations)

    def parameter_groups(self):
        """(theta_k, theta_k') for each modality, see `LearningSpeed`."""
        squeeze = [p for block in self.blocks for p in block.squeeze.parameters()]
        return [
            (
                [*self.encoders[m].parameters(), *self.heads[m].parameters()],
                [*squeeze, *(p for block in self.blocks for p in block.excite[m].parameters())],
            )
            for m in self.encoders
        ]


def fuse(logits):
    """Eq. (3): the mean of the branches' logits."""
    return torch.stack(list(logits.values())).mean(dim=0)


def build_model(config, splits):
    """The network of a method, initialised from the run's seed.

    BatchNorm after every convolution, for the gates, a half each at first, shrink the maps three
    times.
    """
    seed_phase(config.seed, "initialisation")
    modalities = splits.modalities
    if config.method.startswith("unimodal-"):
        modalities = (config.method.removeprefix("unimodal-"),)
    options = {"dim": None, "batch_norm": True, "pretrained": config.pretrained}
    encoders = {m: build_encoder(config.dataset, splits.shapes[m], **options) for m in modalities}
    model = GreedyNet(encoders, splits.num_classes, config.gate_factor)
    return model.to(config.device, memory_format=torch.channels_last)


# ---- Training ----


class Balance(nn.Module):
    """What balanced training keeps beside the network: speeds and mean gates."""

    def __init__(self, model, config):
        super().__init__()
        self.speed = LearningSpeed(len(model.encoders))
        channels = [{m: e.out_features for m, e in b.excite.items()} for b in model.blocks]
        self.gate_means = GateMeans(channels, after=config.gate_mean == "after")


def train(run, model, splits, config):
    """Algorithm 1. `joint`, `rubi` and `unimodal-*` are the same loop with regular steps only."""
    balance = Balance(model, config).to(config.device)
    kind = {"guided": Guided, "random": Random}.get(config.method, Regular)
    policy = kind(list(model.encoders), config.tolerance, config.window)
    rubi = None
    if config.method == "rubi":
        rubi = RUBi(model.encoders[config.biased].dim, splits.num_classes).to(config.device)
    parameters = [*model.parameters(), *(rubi.parameters() if rubi else ())]
    momentum = 0.0 if config.dataset == "modelnet40" else 0.9  # [P]
    optimizer = build_optimizer(
        config.optimizer, parameters, config.lr, config.weight_decay, momentum
    )
    state = {"model": model, "balance": balance, "policy": policy, "optimizer": optimizer}
    if rubi:
        state["rubi"] = rubi
    first_epoch = run.start(state)
    steps = math.ceil(len(splits.train) / config.batch_size)
    progress = Progress(run.label, config.epochs, steps, first_epoch)
    for epoch in range(first_epoch, config.epochs):
        if config.until_fitted and epoch and run.history[-1]["train"]["accuracy"] == 100:
            break
        generator = seed_phase(config.seed, "train", epoch)
        set_lr(optimizer, scheduled_lr(config.schedule, config.lr, epoch, config.epochs))
        batches = progress(splits.train.batches(config.batch_size, generator, augment=True))
        warm_up = epoch == 0
        entry = train_epoch(model, balance, policy, rubi, optimizer, batches, config, warm_up)
        validation, _ = evaluate(model, splits.val, config)
        run.check_finite(entry["train"]["loss"] + validation["loss"])
        run.end_epoch({**entry, "val": validation}, state)
    progress.close()


def train_epoch(model, balance, policy, rubi, optimizer, batches, config, warm_up):
    """One pass over the training data; totals and speeds stay on the device until its end."""
    model.train()
    groups = model.parameter_groups()
    modalities = list(model.encoders)
    totals = torch.zeros(3 + len(modalities), device=config.device)
    curated, speeds = [], []
    for inputs, labels, _ in batches:
        chosen = policy.curated
        gates = balance.gate_means.gates(model.blocks, chosen) if chosen else None
        with autocast(config.device, config.precision):
            output = model(inputs, gates=gates)
        logits = {m: x.float() for m, x in output.logits.items()}
        loss = training_loss(model, logits, output.features, labels, rubi, config)
        optimizer.zero_grad()
        loss.backward()
        if chosen is None and len(modalities) > 1:  # a regular step
            balance.speed.update(groups)
            balance.gate_means.update(model.blocks, output.activations)
        optimizer.step()
        policy.after_step(balance.speed, warm_up)
        with torch.no_grad():
            predictions = [fuse(logits), *logits.values()]
            correct = [(x.argmax(dim=1) == labels).sum() for x in predictions]
            samples = torch.full_like(loss, len(labels))
            totals += torch.stack([samples, samples * loss, *correct])
            curated.append(chosen)
            speeds.append(balance.speed.speeds())
    samples, loss, *correct = totals.tolist()
    shares = [100 * count / samples for count in correct]
    branches = {m: {"branch": share} for m, share in zip(modalities, shares[1:], strict=True)}
    entry = {"train": {"loss": loss / samples, "accuracy": shares[0], **branches}}
    if len(modalities) > 1:
        speeds = torch.stack(speeds).tolist()
        entry["speed"] = dict(zip(modalities, speeds[-1], strict=True))
        entry["d_speed"] = difference(speeds[-1])
        entry["steps"] = {"d_speed": [difference(s) for s in speeds], "curated": curated}
    return entry


def training_loss(model, logits, features, labels, rubi, config):
    """Eq. (4): the sum of the branches' cross-entropies; masked by RUBi; with the L1 norm of all
    parameters if that has a weight (Sec. 6.3)."""
    if rubi:
        loss = rubi(features[config.biased].float(), list(logits.values()), labels)
    else:
        loss = sum(F.cross_entropy(x, labels) for x in logits.values())
    if config.l1 > 0:
        loss = loss + config.l1 * sum(p.abs().sum() for p in model.parameters())
    return loss


@torch.no_grad()
def squeezed_means(model, split, config):
    """Eq. (6): for each fusion block, modality -> mean of h over `split` (C,), evaluation mode."""
    model.eval()
    sums = [{} for _ in model.blocks]
    for inputs, _, _ in split.batches(256):
        with autocast(config.device, config.precision):
            squeezed = model(inputs).squeezed
        for total, h in zip(sums, squeezed, strict=True):
            for m in h:
                total[m] = total.get(m, 0) + h[m].double().sum(dim=0)
    return [{m: (x / len(split)).float() for m, x in total.items()} for total in sums]


def forward_split(model, split, config, means=None):
    """Logits of the branches and labels of a whole split, in evaluation mode and in float32.

    Always in regular mode. Released code: with the gates that the last training step left.
    """

    def forward(inputs):
        with autocast(config.device, config.precision):
            logits = model(inputs, means=means).logits
        return {m: x.float() for m, x in logits.items()}

    model.eval()
    return collect(forward, split)


def evaluate(model, split, config, means=None):
    """Accuracies and macro-F1 of `split` in percent, its loss, and what it predicts, as arrays.

    Of each branch: its accuracy A(f_k) (`branch`); with the training means also that cut off from
    the others, A(f_k') (`cut`), what they add to it (`u`), and `d_util` (Def. 4.1).
    """
    outputs = forward_split(model, split, config)
    labels, logits = outputs["labels"], {m: outputs[m] for m in model.encoders}
    fused = fuse(logits)
    metrics = {
        "accuracy": accuracy(fused, labels),
        "macro_f1": macro_f1(fused, labels),
        "loss": sum(F.cross_entropy(x, labels).item() for x in logits.values()),
    }
    if len(logits) == 1:
        metrics[next(iter(logits))] = {"alone": metrics["accuracy"]}
    else:
        metrics |= {m: {"branch": accuracy(x, labels)} for m, x in logits.items()}
    if means and len(logits) > 1:
        cut = forward_split(model, split, config, means)
        for m in logits:
            metrics[m]["cut"] = accuracy(cut[m], labels)
            metrics[m]["u"] = utilization(metrics[m]["branch"], metrics[m]["cut"])
        metrics["d_util"] = difference([metrics[m]["u"] for m in logits])
    predictions = {"index": outputs["index"], "label": labels, "logits": fused}
    predictions |= {f"logits_{m}": x for m, x in logits.items()}
    return metrics, {name: tensor.cpu().numpy() for name, tensor in predictions.items()}


def run_method(args, defaults, method, seed, splits, device):
    """Train and test one method with one seed; a finished run is reported, not trained again."""
    config = SimpleNamespace(**{**vars(args), "method": method, "seed": seed, "device": device})
    config.fusion = None if method.startswith("unimodal-") else "mmtm"
    arguments = {"script": "greedy_balance", "seed": seed}
    arguments |= {knob: getattr(config, knob) for knob in knobs_of(config)}
    if method == "rubi" and not config.biased:  # found by joint training, which is trained once
        again = SimpleNamespace(**{**vars(args), "overwrite": False, "resume": True})
        joint = run_method(again, defaults, "joint", seed, splits, device)
        config.biased = more_used(joint["val_iid"], splits.modalities)
    run = Run(arguments, defaults, splits.sizes, device, args)
    if run.summary is not None and not args.eval_only:
        return run.summary
    model = build_model(config, splits)
    if args.eval_only:
        return test(run, model, splits, config)[0]
    train(run, model, splits, config)
    summary, predictions = test(run, model, splits, config)
    run.finish(summary, predictions, *curves(run.history, list(model.encoders)))
    return summary


def more_used(metrics, modalities):
    """The modality with the higher conditional utilization rate, which RUBi takes for biased."""
    first, second = modalities
    return second if metrics[first]["u"] > metrics[second]["u"] else first  # u of 0 is u(m1 | m0)


def test(run, model, splits, config):
    """The summary: the test split read once, by the last network and the best on validation."""
    found = {}
    for name in ("best.pt", "last.pt"):
        run.restore({"model": model}, name)
        means = squeezed_means(model, splits.train, config)
        test, predictions = evaluate(model, splits.test, config, means)
        found[name] = (test, evaluate(model, splits.val_iid, config, means)[0])
    for m, value in probe(model, splits, config, means).items():
        found["last.pt"][0][m]["probe"] = value
    summary = run.summarize(found["last.pt"][0], found["best.pt"][0])
    summary["parameters"] = count_parameters(model)
    summary["epochs"] = len(run.history)
    summary["val_iid"] = found["last.pt"][1]
    summary["best"]["val_iid"] = found["best.pt"][1]
    if "d_speed" in run.history[-1]:
        summary["d_speed"] = run.history[-1]["d_speed"]
        summary["speed"] = run.history[-1]["speed"]
        summary["best"]["d_speed"] = run.history[run.best["epoch"]]["d_speed"]
    small = sum((p.abs() < SMALL).sum().item() for p in model.parameters())
    summary["sparsity"] = small / sum(p.numel() for p in model.parameters())
    if config.method == "rubi":
        summary["biased"] = config.biased
    return summary, predictions


@torch.no_grad()
def probe(model, splits, config, means):
    """Linear probes of the branches, cut off from each other, modality -> percent."""

    def encode(inputs):
        with autocast(config.device, config.precision):
            features = model(inputs, means=means).features
        return {m: z.float() for m, z in features.items()}

    model.eval()
    return probe_encoders(encode, splits.train, splits.test)


def curves(history, modalities):
    """Panels of curves.png by epoch, and d_speed by step with the curated modality of each step."""
    panel = {
        "train": [epoch["train"]["accuracy"] for epoch in history],
        "validation": [epoch["val"]["accuracy"] for epoch in history],
    }
    if len(modalities) == 1:
        return {"accuracy (%)": panel}, None
    for m in modalities:
        panel[f"{m} branch"] = [epoch["val"][m]["branch"] for epoch in history]
    steps = {
        name: [value for epoch in history for value in epoch["steps"][name]]
        for name in ("d_speed", "curated")
    }
    return {"accuracy (%)": panel}, steps


# ---- Command line ----

# Defaults, and by dataset what differs. [P] paper, Sec. 6; the rest is ours. The paper names no
# weight decay and no number of epochs (it trains until the training data are fitted).
COMMON = {
    "batch_size": 128,  # [P] for colored-and-gray MNIST
    "lr": 0.01,  # [P]
    "weight_decay": 0.0,
    "schedule": "none",
    "tolerance": 0.1,  # [P]
    "window": 5,  # [P]
}
CLIPS = {**COMMON, "epochs": 100, "batch_size": 64, "lr": 1e-3, "num_frames": 1}  # as in pmr.py
RECIPES = {
    "digits": {**COMMON, "epochs": 30, "color_variance": 0.02},
    "cg-mnist": {**COMMON, "epochs": 30, "color_variance": 0.02},
    "av-digits": {**COMMON, "epochs": 20},
    "synthetic": {**COMMON, "epochs": 30},
    "features": {**COMMON, "epochs": 20},
    **dict.fromkeys(("crema-d", "ave", "vggsound"), CLIPS),
    "modelnet40": {**COMMON, "epochs": 50, "batch_size": 8, "lr": 0.1, "tolerance": 0.01},  # [P]
}
METHODS = ("joint", "rubi", "random", "guided")
SMALL = 1e-3  # a parameter below counts as zero in `sparsity`; the paper's threshold is lost
# Grids of the experiments: the paper's are lost, or only drawn. RATES is the range to sample from.
RATES = (1e-3, 1e-1)
L1_GRID = [{"l1": x} for x in (0.0, *(10 ** (-7 + i / 2) for i in range(9)))]
TOLERANCES, WINDOWS = (0.01, 0.03, 0.1, 0.3, 1.0), (1, 2, 5, 10, 20)
EXPERIMENTS = ("table1", "sweep", "l1", "sensitivity")


def knobs_of(config):
    """Names of the arguments that decide a run's result, by method."""
    common = [*shared_knobs(config.dataset), "duplicate", "gate_factor", "l1", "until_fitted"]
    own = {"guided": ["tolerance", "window", "gate_mean"], "random": ["gate_mean"]}
    return common + {**own, "rubi": ["biased"]}.get(config.method, [])


def parse_args(argv=None):
    """The command line with the dataset's recipe filled in, and the defaults of all flags."""
    parser = build_parser(
        __doc__,
        method_help="joint (the paper's vanilla), random, guided, rubi, unimodal-<modality>; "
        "default: guided beside random, joint and each modality alone, on large data guided",
        fusions=["mmtm"],
        experiments=EXPERIMENTS,
    )
    add = parser.add_argument_group("Greedy").add_argument
    positive = number(float, 0, open_low=True)
    add("--tolerance", type=number(float, 0), metavar="X", help="alpha: largest |d_speed| let be")
    add("--window", type=number(int, 1), metavar="N", help="Q: re-balancing steps in a row")
    add(
        "--gate-mean",
        choices=["after", "before"],
        default="after",
        help="Eq. (13): mean after or before the sigmoid (%(default)s)",
    )
    add("--gate-factor", type=positive, default=1.0, metavar="X", help="MMTM paper: 2 (1)")
    add("--biased", metavar="MODALITY", help="for rubi; default: the more used one under joint")
    add("--duplicate", metavar="MODALITY", help="train on this modality twice, named m and m-2")
    add("--l1", type=number(float, 0), default=0.0, metavar="X", help="weight of the L1 norm (0)")
    add("--until-fitted", action="store_true", help="stop at 100 %% training accuracy")
    add("--rates", type=number(int, 1), default=20, metavar="N", help="of the sweep (%(default)s)")
    args = parser.parse_args(argv)
    if args.experiment == "sweep" and args.lr is not None:
        raise UserError("The sweep draws its own learning rates; leave out --lr.")
    if args.experiment == "l1" and args.l1 > 0:
        raise UserError("--experiment l1 has its own weights of the norm; leave out --l1.")
    defaults = fill_from_recipe(parser, args, recipe_for(args.dataset, RECIPES))
    return args, defaults


def load_modalities(args, device):
    """The splits, with one modality twice if that is asked for."""
    splits = load_splits(args, device)
    for flag in ("biased", "duplicate"):
        name = getattr(args, flag)
        if name is not None and name not in splits.modalities:
            raise UserError(
                f"There is no modality {name!r} in {args.dataset} for --{flag}; choose from "
                f"{', '.join(splits.modalities)}."
            )
    if args.duplicate is None:
        return splits
    if args.biased:
        raise UserError("With --duplicate no modality is the biased one; leave out --biased.")
    return duplicate(splits, args.duplicate)


def duplicate(splits, modality):
    """The same splits with `modality` and its copy in place of all modalities."""

    def twice(inputs):
        return {modality: inputs[modality], f"{modality}-2": inputs[modality]}

    def copy(split):
        doubled = split.stored(lambda tensor: tensor, split.index, lambda x: twice(split.render(x)))
        if split.augment:  # changes at random, the same ones in both
            doubled.augment = lambda inputs, generator: twice(
                split.augment({modality: inputs[modality]}, generator)
            )
        return doubled

    splits = splits.map(copy)
    splits.modalities = (modality, f"{modality}-2")
    return splits


def choose_methods(args, modalities):
    """The methods to run: those named, else a comparison, or guided alone where data are large."""
    unimodal = [f"unimodal-{m}" for m in modalities]
    compared = [*unimodal, "joint", "random", "guided"]
    methods = args.method or (compared if DATASETS[args.dataset].small else ["guided"])
    if len(modalities) == 1 and set(methods) & set(METHODS):
        raise UserError(
            f"{args.dataset} has one modality, and nothing to balance; use --method {unimodal[0]}."
        )
    if "rubi" in methods and len(modalities) != 2 and not args.biased:
        raise UserError(f"Of {len(modalities)} modalities, name the biased one by --biased.")
    return check_methods(methods, (*METHODS, *unimodal), args.dataset)


def columns_of(modalities):
    """Columns of the tables: title -> where the number stands in a summary."""
    columns = {"test": "test.accuracy", "best": "best.test.accuracy"}
    for m in modalities:
        others = " ".join(other for other in modalities if other != m)
        columns |= {f"{m} branch": f"test.{m}.branch", f"u({others}|{m})": f"test.{m}.u"}
    columns |= {"d_util": "test.d_util", "d_util (iid)": "val_iid.d_util", "d_speed": "d_speed"}
    columns |= {f"|{title}|": f"|{columns[title]}|" for title in ("d_util", "d_speed")}
    return {**columns, "sparsity": "sparsity"}


def tabulate_runs(runs, modalities):
    """A row for each method; rates and speeds with three decimals."""
    columns = columns_of(modalities)
    rates = [title for title in columns if title[:2] in ("u(", "d_", "|d", "sp")]
    return tabulate(runs, columns, dict.fromkeys(rates, 3))


def run_all(argv):
    """Run every method with every seed: {"runs": summaries, "table": one row for each method}."""
    args, defaults = parse_args(argv)
    device = pick_device(args.device)
    splits = load_modalities(args, device)
    methods = choose_methods(args, splits.modalities)
    runs = [
        run_method(args, defaults, method, seed, splits, device)
        for seed in args.seeds
        for method in methods
    ]
    table = tabulate_runs(runs, splits.modalities)
    shown = [{key: row[key] for key in list(row)[:-3]} for row in table]
    print_table(shown, "greedy_balance", args)
    return {"runs": runs, "table": table}


def experiment(args, defaults, argv):
    """Table 1, or the runs behind Figures 2, 5 and 7 (sweep), 4 and 8 (l1), 9 (sensitivity)."""
    modalities = load_modalities(args, torch.device("cpu")).modalities
    methods, grid, columns, figure = {
        "table1": ([*(f"unimodal-{m}" for m in modalities), *METHODS], [{}], None, None),
        "sweep": (
            ["joint", "random", "guided"],
            [{"lr": rate} for rate in log_uniform(args.rates, *RATES)],
            None,
            distributions(["test.d_util", "val_iid.d_util", "d_speed"]),
        ),
        "l1": (["joint"], L1_GRID, ["sparsity", "|d_util|", "|d_speed|", "test"], trends(["l1"])),
        "sensitivity": (
            ["guided"],
            sensitivity_grid(args),
            ["test", "d_util", "d_speed"],
            trends(["tolerance", "window"]),
        ),
    }[args.experiment]
    methods = args.method or methods
    argv = without_flag(sys.argv[1:] if argv is None else argv, "--experiment")
    argv = [*argv, "--method", *methods]  # of a flag that is there twice the last one counts
    args.fusion = "mmtm"
    configs = [SimpleNamespace(**{**vars(args), "method": method}) for method in methods]
    knobs = dict.fromkeys(knob for config in configs for knob in knobs_of(config))
    arguments = {knob: getattr(args, knob) for knob in knobs}
    folder = experiment_folder("greedy_balance", args, arguments, defaults, fusion="mmtm")
    arguments |= {"method": methods, "seeds": args.seeds}
    twice = f", {args.duplicate} twice" if args.duplicate else ""
    on_the_papers_data = (args.experiment, args.dataset) == ("table1", "cg-mnist")
    return run_experiment(
        run_all,
        [(knobs, [*argv, *as_flags(knobs)]) for knobs in grid],
        arguments,
        folder,
        title=f"{args.experiment} on {args.dataset}" + twice,
        columns=columns,
        pairs=[("random", "joint"), ("guided", "joint"), ("guided", "random")],
        paper=on_the_papers_data and (lambda row: paper_columns("greedy_table1", "table1", row)),
        pool=(lambda runs: pool(runs, modalities)) if args.experiment == "sweep" else None,
        figure=figure,
    )


def sensitivity_grid(args):
    """Each of tolerance and window in turn, the other one as it is."""
    grid = [*product(TOLERANCES, [args.window]), *product([args.tolerance], WINDOWS)]
    return [{"tolerance": x, "window": q} for x, q in dict.fromkeys(grid)]


def pool(runs, modalities):
    """A row for each method over all rates and seeds: E[d_util] of Sec. 4.2 with its spread, and
    how d_speed and d_util go together."""
    rows = tabulate_runs(runs, modalities)
    for row in rows:
        own = [run for run in runs if run["method"] == row["method"]]
        row["r(d_speed, d_util)"] = correlate(own, "d_speed", "test.d_util")
        row["r(d_speed, d_util iid)"] = correlate(own, "d_speed", "val_iid.d_util")
    return rows


def main(argv=None):
    """Run the command line; returns the summary of the run, or {"runs": ..., "table": ...}."""
    args, defaults = parse_args(argv)
    if args.experiment:
        return experiment(args, defaults, argv)
    result = run_all(argv)
    return result["runs"][0] if len(result["runs"]) == 1 else result


if __name__ == "__main__":
    run_command(main)
