"""Characterizing and Overcoming the Greedy Nature of Learning in Multi-modal Deep Neural Networks
(Wu, Jastrzebski, Cho, Geras, ICML 2022). https://arxiv.org/abs/2202.05306

A multi-modal network leans on the modality that it learns from fastest. How much each branch uses
the other modality is measured after training (conditional utilization rate), how fast it learns to
do so during training (conditional learning speed); guided training evens the speeds out.

    python greedy_balance.py                                    # bundled digits, a minute on a CPU
    python greedy_balance.py --dataset cg-mnist --method guided --seeds 0 1 2
    python -m experiments.greedy_balance table1 --seeds 0 1 2   # Table 1 of the paper

Every run leaves its configuration, metrics, predictions, curves and checkpoints in
runs/greedy_balance/<dataset>/<method>-mmtm[-<knob>=<value>]-seed<k>/. See docs/greedy_balance.md.

Differs from the paper:
- Modality 0 is the dataset's first (gray). The paper counts the color first: d has the other sign.
- d_util may leave [-1, 1]: a branch may be better when cut off. Def. 5.1: norms squared, theta
  before the step, log10, sums over all regular steps: released code.
- Eq. (13), (14): means of the gates, as in the released code; the text rather reads as gates of the
  mean activations (--gate-mean before). Released code: each batch weighs the same, re-balancing,
  validation and test batches are in the means, and modality 1 gets those of modality 0.
- A window begins one step after its check, and a regular step parts two windows: released code.
- Validation and test: a regular pass (released code: as the last training step left it). Of more
  than two modalities the one with the largest s is curated: ours.
- MMTM after the last three of four convolutions, BatchNorm after all: ours. After layer2, layer3,
  layer4 of a ResNet: released code; the text has "the three final residual blocks".
- The number of epochs is fixed; the paper trains up to 100 % training accuracy (--until-fitted).
  As there, all but `test` in the table is of the epoch best on validation.
- A replaced excite layer stays still; by zero gradients momentum would move it: ours. Eq. (6) is
  over images as they are; released code: flipped at random.
- Colored MNIST has 50,000 / 10,000 / 10,000 images; the paper 60,000 / 10,000, and reports what it
  selects on. d_util (iid) is on validation items that are colored as in training: ours.
- RUBi masks by features that MMTM has mixed, of the branch with the higher u on val_iid: ours.
- ModelNet40 is normalised, and flipped in training, all views alike; text: no pre-processing.
- Initialisation, threshold of `sparsity`, what Sec. 6 lacks: ours, RECIPES. NVGesture is not here.
"""

from common.command_line import Command, Script, run_command
from common.device import autocast
from common.errors import UserError
from common.evaluation import Totals, arrays, collect, count_correct, probe_encoders
from common.flags import SIZE, number
from common.metrics import accuracy, count_parameters
from common.networks.encoders import initialize
from common.networks.mmtm import MMTM, SE
from common.networks.multimodal import build_encoders, seed_module
from common.networks.rubi import RUBi
from common.optimizer import build_optimizer
from common.run import Run
from common.tasks import Classification

# isort: split
# ---- Method ----

import math

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.nn.utils import get_total_norm


def fuse(logits):
    """Eq. (3): the mean of the branches' logits, modality -> (B, C)."""
    return torch.stack(list(logits.values())).mean(dim=0)


def difference(values):
    """d of Def. 4.1 and 5.1: value of modality 0 minus that of modality 1; of more than two
    modalities the two most different (Sec. 6.4), the larger minus the smaller; NaN if one is."""
    if len(values) == 2:
        return values[0] - values[1]
    return math.nan if any(map(math.isnan, values)) else max(values) - min(values)


def utilization(accuracy, accuracy_cut):
    """Conditional utilization rate, Eq. (9) and (10): (A(f_k) - A(f_k')) / A(f_k).

    What the other modalities add to the accuracy of branch k, relative to it: for branch 0 of two
    this is u(m1 | m0). Negative where the branch is better without them, so not bounded by -1."""
    return (accuracy - accuracy_cut) / accuracy if accuracy > 0 else 0.0


def cut_off(block, maps, means):
    """Eq. (7): every branch goes through `block` with its own squeezed features h and the means of
    the others over the training data (Eq. 6), modality -> (C,); only its own gate is kept.
    block: (maps, squeezed) -> gated maps first; maps: modality -> (B, C, *space)."""
    others = {m: {k: mean for k, mean in means.items() if k != m} for m in maps}
    return {m: block(maps, squeezed=others[m])[0][m] for m in maps}


def effective_update(parameters):
    """mu(theta; i) of Def. 5.1, before the step: ||gradient||^2 / ||theta||^2, all of `parameters`
    as one vector. Paper: "norm". Released code: squares."""
    gradients = [p.grad for p in parameters]
    return (get_total_norm(gradients) / get_total_norm(parameters)).square()


class LearningSpeed(nn.Module):
    """Conditional learning speed s of every modality's branch, Eq. (11) and (12).

    own, cross: sums over regular steps of mu(theta_k) and mu(theta_k'): parameters of the branch,
    and of the fusion blocks that feed it (shared squeeze layers and its own excite layers)."""

    def __init__(self, num_modalities):
        super().__init__()
        self.register_buffer("own", torch.zeros(num_modalities, dtype=torch.float64))
        self.register_buffer("cross", torch.zeros(num_modalities, dtype=torch.float64))

    @torch.no_grad()
    def update(self, groups):
        """Add a step, after backward and before the optimizer; groups: (theta_k, theta_k'), ..."""
        self.own += torch.stack([effective_update(own) for own, _ in groups])
        self.cross += torch.stack([effective_update(cross) for _, cross in groups])

    def speeds(self):
        """(M,) s_k = log10(sum of mu(theta_k') / sum of mu(theta_k)). Base 10: released code."""
        return (self.cross / self.own).log10()


class GateMeans(nn.Module):
    """Mean gates over all samples of the regular training steps so far, for Eq. (13) and (14).

    channels: for each fusion block, modality -> C. `block.gate` makes gates of activations w.
    after:    the mean of the gates; else the gate of the mean activation, another reading."""

    def __init__(self, channels, after=True):
        super().__init__()
        self.after = after
        self.samples = 0
        self.sums = nn.ModuleList(nn.Module() for _ in channels)
        for sums, block in zip(self.sums, channels, strict=True):
            for m, c in block.items():
                sums.register_buffer(m, torch.zeros(c, dtype=torch.float64))

    def get_extra_state(self):
        return self.samples

    def set_extra_state(self, samples):
        self.samples = samples

    @torch.no_grad()
    def update(self, blocks, activations):
        """Add a regular step; activations: for each block, modality -> (B, C)."""
        for block, sums, w in zip(blocks, self.sums, activations, strict=True):
            for m in w:
                values = block.gate(w[m].float()) if self.after else w[m].float()
                getattr(sums, m).add_(values.sum(dim=0))
        self.samples += len(next(iter(activations[0].values())))

    def gates(self, blocks, modality):
        """For each block {modality: mean gate (C,)}: what a step that curates `modality` uses.
        ValueError before the first regular step."""
        if self.samples == 0:
            raise ValueError("mean gates need a regular step first")
        means = [getattr(sums, modality) / self.samples for sums in self.sums]
        if not self.after:
            means = [block.gate(mean) for block, mean in zip(blocks, means, strict=True)]
        return [{modality: mean.float()} for mean in means]


class Guided:
    """Algorithm 1: which modality the next step curates (accelerates), None in a regular step.

    Past the warm-up, after a regular step with |d_speed| above `tolerance`, the branch that learns
    fastest from the others gets mean gates for `window` steps, so that it has to learn from its own
    modality; at least one regular step follows (released code)."""

    def __init__(self, modalities, tolerance, window):
        self.modalities, self.tolerance, self.window = modalities, tolerance, window
        self.chosen, self.left = None, 0

    @property
    def curated(self):
        return self.chosen if self.left else None

    def after_step(self, speed, warm_up):
        """Decide on the next step."""
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

    def after_step(self, speed, warm_up): ...


# ---- Model ----


class GreedyNet(nn.Module):
    """A branch for each modality, and after each of its last three stages (an MLP has two) a fusion
    block (Fig. 1): MMTM, or SE in the uni-modal network that the paper compares with."""

    def __init__(self, encoders, num_classes, factor=1.0):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        heads = {m: nn.Linear(encoder.dim, num_classes) for m, encoder in encoders.items()}
        self.heads = nn.ModuleDict(heads).apply(initialize)
        block = MMTM if len(encoders) > 1 else SE
        last = zip(*(e.channels[-3:] for e in encoders.values()), strict=True)
        self.channels = [dict(zip(encoders, widths, strict=True)) for widths in last]
        self.blocks = nn.ModuleList(block(widths, factor=factor) for widths in self.channels)

    def forward(self, inputs, gates=None, means=None):
        """Logits (B, K) and features (B, D) by modality; of each block h and w of Eq. (1), (B, C).

        gates: for each block, modality -> gate (C,) in place of the computed one, Eq. (13), (14).
        means: for each block, modality -> (C,): the branches are cut off from each other, (7)."""
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
        return logits, features, squeezed, activations

    def parameter_groups(self):
        """(theta_k, theta_k') for each modality, see `LearningSpeed`."""
        squeeze = [p for block in self.blocks for p in block.squeeze.parameters()]
        groups = []
        for m, encoder in self.encoders.items():
            own = [*encoder.parameters(), *self.heads[m].parameters()]
            excite = [p for block in self.blocks for p in block.excite[m].parameters()]
            groups.append((own, squeeze + excite))
        return groups


def build_model(config, splits):
    """The network of a run, its modules started by `seed_module`."""
    encoders = build_encoders(config, splits, dim=None, batch_norm=True)
    seed_module(config, "heads and blocks")
    model = GreedyNet(encoders, config.num_classes, config.gate_factor)
    return model.to(config.device, memory_format=torch.channels_last)


def forward(model, inputs, config, **options):
    """`GreedyNet.forward` with its options, logits and features in float32."""
    with autocast(config):
        logits, features, *rest = model(inputs, **options)
    logits, features = ({m: x.float() for m, x in found.items()} for found in (logits, features))
    return logits, features, *rest


# ---- Training ----


def train(run, model, splits, config):
    """Algorithm 1. `joint`, `rubi` and `unimodal-*` are the same loop with regular steps only."""
    modalities, groups = config.modalities, model.parameter_groups()
    speed = LearningSpeed(len(modalities))
    gate_means = GateMeans(model.channels, after=config.gate_mean == "after")
    policies = {"guided": Guided, "random": Random}
    policy = policies.get(config.method, Regular)(modalities, config.tolerance, config.window)
    balance = nn.ModuleDict({"speed": speed, "gate_means": gate_means}).to(config.device)
    state = {"model": model, "balance": balance, "policy": policy}
    parameters = list(model.parameters())
    if config.method == "rubi":
        biased = biased_modality(config)
        seed_module(config, "rubi")
        state["rubi"] = rubi = RUBi(model.encoders[biased].dim, config.num_classes)
        parameters += rubi.to(config.device).parameters()
    state["optimizer"] = optimizer = build_optimizer(parameters, config)
    for epoch in run.epochs(state):
        if config.until_fitted and epoch and run.history[-1]["train"]["accuracy"] == 100:
            break
        totals = Totals(("loss", "accuracy", *(f"{m} accuracy" for m in modalities)), config.device)
        curated, speeds = [], []
        model.train()
        for inputs, labels, _ in run.batches(splits.train, optimizer):
            chosen = policy.curated  # None: a regular step
            gates = gate_means.gates(model.blocks, chosen) if chosen else None  # Eq. (13), (14)
            logits, features, _, activations = forward(model, inputs, config, gates=gates)
            if config.method == "rubi":
                loss = rubi(features[biased], list(logits.values()), labels)
            else:
                loss = sum(F.cross_entropy(x, labels) for x in logits.values())  # Eq. (4)
            if config.l1 > 0:  # Sec. 6.3
                loss = loss + config.l1 * sum(p.abs().sum() for p in model.parameters())
            optimizer.zero_grad()
            loss.backward()
            if chosen is None and len(modalities) > 1:
                speed.update(groups)
                gate_means.update(model.blocks, activations)
            optimizer.step()
            policy.after_step(speed, warm_up=epoch == 0)
            correct = [count_correct(x, labels) for x in (fuse(logits), *logits.values())]
            totals.add(len(labels), loss, *correct)
            curated.append(chosen)
            speeds.append(speed.speeds())
        validation, _ = evaluate(model, splits.val, config)
        entry = epoch_entry(totals.means(), modalities, curated, speeds)
        run.end_epoch(entry | {"val": validation})


def biased_modality(config):
    """RUBi's: the one named, or the one with the higher u on val_iid under joint training."""
    if config.biased:
        return config.biased
    (joint,) = config.needs
    first, second = config.modalities
    u = [Run(joint).number(f"val_iid.{m}.u") for m in config.modalities]
    return second if u[0] > u[1] else first  # u of 0 is u(m1 | m0)


def epoch_entry(train, modalities, curated, speeds):
    """What the history keeps: means of an epoch's totals, and by step what was curated and s."""
    train |= {m: {"branch": train.pop(f"{m} accuracy")} for m in modalities}
    if len(modalities) == 1:
        return {"train": train}
    speeds = torch.stack(speeds).tolist()  # until now on the device
    d_speed = [difference(s) for s in speeds]
    last = {"speed": dict(zip(modalities, speeds[-1], strict=True)), "d_speed": d_speed[-1]}
    return {"train": train, **last, "steps": {"d_speed": d_speed, "curated": curated}}


@torch.no_grad()
def squeezed_means(model, split, config):
    """Eq. (6): for each fusion block, modality -> mean of h over `split` (C,), evaluation mode."""
    model.eval()
    sums = [dict.fromkeys(model.encoders, 0) for _ in model.blocks]
    for inputs, _, _ in split.batches(256):
        for total, h in zip(sums, forward(model, inputs, config)[2], strict=True):
            for m in h:
                total[m] = total[m] + h[m].double().sum(dim=0)
    return [{m: (x / len(split)).float() for m, x in total.items()} for total in sums]


def predict(model, split, config, means=None):
    """Logits of the branches, `labels` and `index` of a whole split, in evaluation mode."""
    model.eval()
    return collect(lambda inputs: forward(model, inputs, config, means=means)[0], split)


def evaluate(model, split, config, means=None):
    """Metrics of a split, and its outputs; the loss is that of Eq. (4).

    Of each branch: its accuracy A(f_k) (`branch`); with the training means also that cut off from
    the others, A(f_k') (`cut`), what they add to it (`u`), and `d_util` (Def. 4.1)."""
    outputs = predict(model, split, config)
    labels, logits = outputs["labels"], {m: outputs[m] for m in model.encoders}
    outputs["logits"] = fuse(logits)
    metrics = Classification.measure(outputs["logits"], labels)
    metrics["loss"] = sum(F.cross_entropy(x, labels).item() for x in logits.values())
    if len(logits) == 1:
        return metrics | {m: {"alone": metrics["accuracy"]} for m in logits}, outputs
    metrics |= {m: {"branch": accuracy(x, labels)} for m, x in logits.items()}
    if means:
        cut = predict(model, split, config, means)
        for m in logits:
            metrics[m]["cut"] = accuracy(cut[m], labels)
            metrics[m]["u"] = utilization(metrics[m]["branch"], metrics[m]["cut"])
        metrics["d_util"] = difference([metrics[m]["u"] for m in logits])
    return metrics, outputs


@torch.no_grad()
def test(run, model, splits, config):
    """The test split, looked at here only: by the best network on validation, and by the last."""
    found, iid = {}, {}
    for name in ("best.pt", "last.pt"):
        run.restore({"model": model}, name)
        means = squeezed_means(model, splits.train, config)
        found[name], outputs = evaluate(model, splits.test, config, means)
        iid[name], _ = evaluate(model, splits.val_iid, config, means)
    probes = probe_encoders(lambda x: forward(model, x, config, means=means)[1], splits)
    for m, value in probes.items():  # of the branches, cut off from each other
        found["last.pt"][m]["probe"] = value
    summary = run.summarize(found["last.pt"], found["best.pt"])
    summary |= {"parameters": count_parameters(model), "epochs": len(run.history)}
    small = sum((p.abs() < 1e-3).sum().item() for p in model.parameters())  # threshold: ours
    summary |= {"sparsity": small / summary["parameters"], "val_iid": iid["last.pt"]}
    summary["best"]["val_iid"] = iid["best.pt"]
    if len(config.modalities) > 1:
        summary |= {name: run.history[-1][name] for name in ("d_speed", "speed")}
        summary["best"]["d_speed"] = run.history[run.best["epoch"]]["d_speed"]
    if config.method == "rubi":
        summary["biased"] = biased_modality(config)
    predictions = arrays(outputs) | {f"logits_{m}": outputs[m] for m in model.encoders}
    return summary, predictions, *curves(run.history, config)


def curves(history, config):
    """For curves.png: accuracies by epoch; d_speed and the curated modality by step."""
    paths = {"train": "train.accuracy", "validation": "val.accuracy"}
    panels = {"accuracy (%)": paths | {f"{m} branch": f"val.{m}.branch" for m in config.modalities}}
    if len(config.modalities) == 1:
        return panels, None
    names = ("d_speed", "curated")
    return panels, {name: [x for entry in history for x in entry["steps"][name]] for name in names}


# ---- Command line ----

# Defaults, and by dataset what differs. [P] paper, Sec. 6; the rest is ours. The color variance is
# inferred: at 0.02 the baseline published with this coloring has the paper's 41 % of color alone.
COMMON = {
    "batch_size": 128,  # [P] for colored-and-gray MNIST
    "lr": 0.01,  # [P]
    "momentum": 0.9,  # [P]
    "weight_decay": 0.0,
    "schedule": "none",
    "tolerance": 0.1,  # [P]
    "window": 5,  # [P]
}
CLIPS = {**COMMON, "epochs": 100, "batch_size": 64, "lr": 1e-3, "num_frames": 1}  # ours
VIEWS = {"batch_size": 8, "lr": 0.1, "momentum": 0.0, "tolerance": 0.01}  # [P]
RECIPES = {
    **{key: {**COMMON, "epochs": 30, "color_variance": 0.02} for key in ("digits", "cg-mnist")},
    "synthetic": {**COMMON, "epochs": 30},
    **{key: {**COMMON, "epochs": 20} for key in ("av-digits", "features")},
    **dict.fromkeys(("crema-d", "ave", "vggsound"), CLIPS),
    "modelnet40": {**COMMON, **VIEWS, "epochs": 50},
}
SHARED = ("duplicate", "gate_factor", "l1", "until_fitted")
METHODS = {  # and the flags that decide their results
    "guided": (*SHARED, "tolerance", "window", "gate_mean"),
    "random": (*SHARED, "gate_mean"),
    "joint": SHARED,  # the paper's vanilla
    "rubi": (*SHARED, "biased"),
    "unimodal": SHARED,
}


def add_flags(add):
    add("--tolerance", type=SIZE, metavar="X", help="alpha: largest |d_speed| let be")
    add("--window", type=number(int, 1), metavar="N", help="Q: re-balancing steps in a row")
    means = {"choices": ["after", "before"], "default": "after"}
    add("--gate-mean", **means, help="Eq. (13): mean after or before the sigmoid (%(default)s)")
    factor = {"type": number(float, 0, open_low=True), "default": 1.0, "metavar": "X"}
    add("--gate-factor", **factor, help="of the sigmoid (1)")
    add("--biased", metavar="MODALITY", help="for rubi; default: the more used one under joint")
    add("--duplicate", metavar="MODALITY", help="train on this modality twice, named m and m-2")
    add("--l1", type=SIZE, default=0.0, metavar="X", help="weight of the L1 norm (0)")
    add("--until-fitted", action="store_true", help="stop at 100 %% training accuracy")


def columns(modalities, epoch="best."):
    """Columns of the table: title -> where the number stands in a summary; all but `test` of the
    best epoch on validation (Sec. 5.1), or with an `epoch` of "" of the last."""
    found = {"test": "test.accuracy", "best": "best.test.accuracy"}
    for m in modalities:
        others = " ".join(other for other in modalities if other != m)
        found[f"{m} branch"] = f"{epoch}test.{m}.branch"
        found[f"u({others}|{m})"] = f"{epoch}test.{m}.u"
    rates = {"d_util": "test.d_util", "d_util (iid)": "val_iid.d_util", "d_speed": "d_speed"}
    return found | {title: epoch + path for title, path in rates.items()}


def prepare(args, splits):
    """The splits, with one modality twice in place of all where --duplicate asks for it."""
    if args.duplicate and args.biased:
        raise UserError("With --duplicate no modality is the biased one; leave out --biased.")
    return splits.doubled(args.duplicate) if args.duplicate else splits


SCRIPT = Script(
    *("greedy_balance", __doc__, METHODS, ("joint", "random", "guided"), ("mmtm",), RECIPES),
    add_flags,
    needs={"rubi": lambda args: () if args.biased else ("joint",)},
    naming={"biased": (), "duplicate": ()},
    prepare=prepare,
)


def main(argv=None):
    """Run the command line; returns the summary of the run, or {"runs": ..., "table": ...}."""
    command = Command(SCRIPT, argv)
    args, modalities = command.args, command.splits.modalities
    if len(modalities) == 1 and METHODS.keys() & set(command.methods):
        raise UserError(
            f"{args.dataset} has one modality, and nothing to balance; "
            f"use --method unimodal-{modalities[0]}."
        )
    if "rubi" in command.methods and len(modalities) != 2 and not args.biased:
        raise UserError(f"Of {len(modalities)} modalities, name the biased one by --biased.")
    summaries = []
    for config in command.configs():
        run = Run(config)
        if run.summary is None or config.eval_only:  # a finished run is reported, not trained again
            model = build_model(config, command.splits)
            if not config.eval_only:
                train(run, model, command.splits, config)
            run.finish(*test(run, model, command.splits, config))
        summaries.append(run.summary)
    shown = columns(modalities)
    rates = [title for title in shown if title.startswith(("u(", "d_"))]
    return command.report(summaries, shown, dict.fromkeys(rates, 3))


if __name__ == "__main__":
    run_command(main)
