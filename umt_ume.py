"""On Uni-Modal Feature Learning in Supervised Multi-Modal Learning (Du et al., ICML 2023).
https://arxiv.org/abs/2305.01233

Trained jointly, a network stops once the easy features have fitted the training data, and learns
each modality worse than a network of its own would ("modality laziness"). Two cures: average the
uni-modal networks (UME), or train jointly and distil their features (UMT); and a rule to choose.

    python umt_ume.py                                           # synthetic data, a minute on a CPU
    python umt_ume.py --dataset av-digits --method auto --seeds 0 1 2
    python -m experiments.umt_ume methods --seeds 0 1 2         # every method, and what is chosen

Every run leaves its configuration, metrics, predictions, curves and checkpoints in
runs/umt_ume/<dataset>/<method>[-<fusion>][-<knob>=<value>]-seed<k>/, and the choice (`auto`) its
evidence in auto-<fusion>[-<knob>=<value>]/decision.json. See docs/umt_ume.md.

Differs from the paper (read: an earlier version, up to Sec. 3; no code of its authors was found):
- UMT's distance: mean squared error of the features before fusion, as in three public
  re-implementations. Its weight: 10 as in one of them, or chosen on validation, see RECIPES.
- A student starts from weights of its own, never where its teachers did but with pretrained ones;
  to share that start decides the result on digits, see docs/umt_ume.md: ours.
- Teachers: last epoch, frozen, in evaluation mode, on the augmented batch of the student: ours.
- UME's average could not be read: `ume` averages probabilities, `ume-logits` logits, of the last
  epoch, all weights equal: ours.
- The "empirical trick to decide which one to use": a linear classifier on frozen features against
  UME, on validation, paired by item, with a margin of a standard error: ours.
- That classifier and the probes (logistic regression), networks, the heads mlp and attention,
  RECIPES and the dataset synthetic are ours.
- Kinetics-400, UCF101 and Xiao et al. (2020) are not here. baselines.py has G-Blending and OGM-GE,
  greedy_balance.py has Wu et al. (2022).
"""

from pathlib import Path

from common.command_line import Command, Script, run_command
from common.device import autocast, forward
from common.evaluation import (
    Totals,
    arrays,
    collect,
    count_correct,
    measure,
    predict,
    probe_encoders,
    score,
)
from common.flags import SIZE
from common.metrics import count_parameters, linear_probe
from common.naming import changed_knobs, join_name
from common.networks.multimodal import build_model
from common.optimizer import build_optimizer
from common.run import Run
from common.storage import make_folder, write_json

# isort: split
# ---- Method ----

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


class Teachers(nn.ModuleDict):
    """The uni-modal encoders phi*_m, modality -> encoder: frozen, in evaluation mode for good."""

    def __init__(self, encoders):
        super().__init__(encoders)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode=True):
        return self

    @torch.no_grad()
    def forward(self, inputs):
        """Targets t_m = phi*_m(x_m): modality -> (B, D)."""
        return {m: encoder(inputs[m]) for m, encoder in self.items()}


def distillation(features, targets):
    """UMT: sum over modalities of the mean squared distance between student and teacher.

        L = CE(h(z_1, ..., z_M), y) + lambda * sum_m mean (z_m - t_m)^2

    features: modality -> z_m (B, D), before fusion; targets: modality -> t_m (B, D), see
    `Teachers`. The mean is over batch and dimensions, so lambda does not depend on the width.
    """
    return sum(F.mse_loss(features[m], targets[m]) for m in targets)


def average_probabilities(outputs):
    """Logits (B, C) of several networks -> log of their mean probability; one is left as it is."""
    if len(outputs) == 1:
        return outputs[0]
    log_p = torch.stack([logits.log_softmax(dim=1) for logits in outputs])
    return log_p.logsumexp(dim=0) - math.log(len(outputs))


def average_logits(outputs):
    """Logits (B, C) of several networks -> their mean."""
    return torch.stack(outputs).mean(dim=0)


def paired_difference(correct, reference):
    """Points by which one classifier is right more often than another, and their standard error.

    correct, reference: (S, N) bool, the same N items for each of S seeds. The difference of an item
    is averaged over the seeds; the standard error is over items.
    """
    difference = 100 * (correct.double() - reference.double()).mean(dim=0)
    error = difference.std() / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()), float(error)


def choose(linear_correct, ensemble_correct):
    """UMT or UME? "umt" if paired features show, which only the modalities together tell.

    They do if a linear classifier on the frozen uni-modal features, all of them together, beats the
    ensemble by more than a standard error. Both (S, N), on validation data, as in
    `paired_difference`.
    """
    points, error = paired_difference(linear_correct, ensemble_correct)
    return "umt" if points > error else "ume"


# ---- Model ----

# `build_model` of common/networks: an encoder phi_m for each modality, z_m = phi_m(x_m), and a
# head h on their features, late fusion: linear on the concatenation, mlp, or attention. A uni-modal
# network is an encoder phi*_m and a linear classifier.
FUSIONS = ("concat", "mlp", "attention")
ASSEMBLED = ("ume", "ume-logits", "linear")  # from uni-modal networks; they train nothing


def load_unimodal(config, splits, checkpoint):
    """modality -> the network trained on it alone with the same seed, at `checkpoint`."""
    models = {}
    for unimodal in config.needs:
        (m,) = unimodal.modalities
        models[m] = build_model(unimodal, splits)
        Run(unimodal).restore({"model": models[m]}, checkpoint)
    return models


def assemble(models, splits, config):
    """{"val": (N, C), "test": (N, C)} logits of the ensemble or, for `linear`, of a classifier on
    all frozen features together. models: modality -> uni-modal network."""

    def look(name):
        """Logits of every network on a split, and their features side by side (N, sum of D)."""
        outputs = {m: predict(model, getattr(splits, name), config) for m, model in models.items()}
        logits = [found["logits"] for found in outputs.values()]
        return logits, torch.cat([found[m] for m, found in outputs.items()], dim=1)

    held_out = {name: look(name) for name in ("val", "test")}
    if config.method == "linear":
        _, z = look("train")
        classify = linear_probe(z, splits.train.labels, config.num_classes)
        return {name: classify(z) for name, (_, z) in held_out.items()}
    average = average_probabilities if config.method == "ume" else average_logits
    return {name: average(logits) for name, (logits, _) in held_out.items()}


# ---- Training ----


def share_starts(model, splits, config):
    """--shared-start: the encoders that begin at the weights at which their teachers began."""
    for unimodal in config.needs:
        (m,) = unimodal.modalities
        if config.shared_start in (m, "all"):
            start = build_model(unimodal, splits).encoders[m]
            model.encoders[m].load_state_dict(start.state_dict())


def find_targets(teachers, split, config):
    """A function (inputs, index) -> targets of the batch, modality -> t_m (B, D).

    Without augmentation they are computed once and looked up; else the teachers see what the
    student sees.
    """

    def look(inputs):
        with autocast(config):
            return {m: t.float() for m, t in teachers(inputs).items()}

    if split.augmented:
        return lambda inputs, index: look(inputs)
    table = collect(look, split)
    return lambda inputs, index: {m: table[m][index] for m in teachers}


def train(run, model, splits, config):
    """Joint training of the run's modalities, be it one; UMT adds the distance to its teachers.

    `run.batches` sets the epoch's learning rate, `run.end_epoch` keeps the best on validation.
    """
    if config.method in ASSEMBLED:
        return
    targets = None
    if config.method == "umt":  # first of all: a damaged teacher must not cost a student's folder
        models = load_unimodal(config, splits, "last.pt")
        teachers = Teachers({m: models[m].encoders[m] for m in models})
        targets = find_targets(teachers, splits.train, config)
        share_starts(model, splits, config)
    optimizer = build_optimizer(model.parameters(), config)
    for _ in run.epochs({"model": model, "optimizer": optimizer}):
        totals = Totals(("loss", "accuracy"), config.device)
        model.train()
        for inputs, labels, index in run.batches(splits.train, optimizer):
            logits, features = forward(model, inputs, config)
            loss = F.cross_entropy(logits, labels)
            if targets:
                loss = loss + config.distill_weight * distillation(features, targets(inputs, index))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            totals.add(len(labels), loss, count_correct(logits, labels))
        validation, _ = evaluate(model, splits.val, config)
        run.end_epoch({"train": totals.means(), "val": validation})


def evaluate(model, split, config):
    """Metrics of a split, and its outputs."""
    outputs = predict(model, split, config)
    return measure(model, outputs, split), outputs


@torch.no_grad()
def test(run, model, splits, config):
    """The test split, looked at here only: by the best network on validation, and by the last."""
    if config.method in ASSEMBLED:
        return test_assembled(run, splits, config)
    run.restore({"model": model}, "best.pt")
    best, _ = evaluate(model, splits.test, config)
    run.restore({"model": model}, "last.pt")
    last, outputs = evaluate(model, splits.test, config)
    for m, found in probe_encoders(lambda x: forward(model, x, config)[1], splits).items():
        last[m]["probe"] = found  # lower than that of the uni-modal network's encoder: laziness
    summary = run.summarize(last, best) | {"parameters": count_parameters(model)}
    val_logits = predict(model, splits.val, config)["logits"]  # what `auto` decides on
    curves = {"accuracy (%)": {"train": "train.accuracy", "validation": "val.accuracy"}}
    return summary, arrays(outputs) | {"val_logits": val_logits}, curves


def test_assembled(run, splits, config):
    """The same of the uni-modal networks together, each at its own best epoch and at its last."""
    found = {}
    for checkpoint in ("best.pt", "last.pt"):
        models = load_unimodal(config, splits, checkpoint)
        logits = assemble(models, splits, config)
        found[checkpoint] = {name: score(x, getattr(splits, name)) for name, x in logits.items()}
    named = ("script", "dataset", "method", "fusion", "seed", "epochs")
    summary = {key: config.arguments[key] for key in named}
    summary |= {"seconds": round(run.seconds, 1), **found["last.pt"]}
    summary["best"] = {"epoch": None, **found["best.pt"]}  # every network has its own
    if config.method != "linear":  # whose classifier is no network
        summary["parameters"] = count_parameters(*models.values())
    predictions = {"index": splits.test.index, "label": splits.test.labels}
    return summary, predictions | {"logits": logits["test"], "val_logits": logits["val"]}


# ---- The choice ----


def configs(command):
    """A configuration for each run. `auto` is no run: it stands for those that it decides on, and
    for UMT if it chooses that."""
    auto = "auto" in command.methods
    runs = [x for m in command.methods for x in (command.needs(m) if m == "auto" else [m])]
    command.methods = list(dict.fromkeys(runs))
    yield from command.configs()
    undecided = auto and "umt" not in command.methods
    if undecided and choose(validate(command, "linear"), validate(command, "ume")) == "umt":
        command.methods.append("umt")
        for seed in command.args.seeds:
            yield command.config("umt", seed)


def validate(command, method):
    """Whether the finished runs of a method are right on validation, (S, N) bool for S seeds."""
    logits = []
    for seed in command.args.seeds:
        config = command.config(method, seed)
        config.overwrite = False  # it is only read
        logits.append(torch.from_numpy(Run(config).read_predictions("val_logits")))
    return torch.stack(logits).argmax(dim=2) == command.splits.val.labels.cpu()


def decide(command):
    """The choice on validation, its evidence, and whether joint training beats what was compared.

    `umt` is compared if it was named or is chosen.
    """
    methods = [m for m in ("linear", "ume", "joint", "umt") if m in command.methods]
    correct = {m: validate(command, m) for m in methods}
    pairs = [("linear", "ume"), ("joint", "ume")]
    pairs += [("joint", "umt")] if "umt" in methods else []
    evidence = []
    for method, reference in pairs:
        points, error = paired_difference(correct[method], correct[reference])
        evidence.append({"method": method, "reference": reference, "points": points})
        evidence[-1]["standard_error"] = error
    by_seed = zip(correct["linear"].split(1), correct["ume"].split(1), strict=True)
    single = [choose(linear, ensemble) for linear, ensemble in by_seed]
    return {
        "choice": choose(correct["linear"], correct["ume"]),
        "by_seed": ", ".join(f"{single.count(m)} {m}" for m in sorted(set(single))),
        "joint_is_better": all(
            row["points"] > row["standard_error"] for row in evidence if row["method"] == "joint"
        ),
        "validation": {m: 100 * float(x.double().mean()) for m, x in correct.items()},
        "evidence": evidence,
    }


def report(command):
    """Print the choice with its evidence and write it as decision.json; returns it."""
    args, decision = command.args, decide(command)
    print(f"\nChoice, by validation accuracy: {decision['choice']}. Paired, with standard error:")
    for row in decision["evidence"]:
        points = f"{row['points']:+.2f} ± {row['standard_error']:.2f} points"
        print(f"  {row['method']} - {row['reference']}: {points}")
    if decision["joint_is_better"]:
        print("Plain joint training is better there than all that it was compared with.")
    if not args.eval_only:
        config = command.config("auto", args.seeds[0])
        name = join_name("auto", args.fusion, *changed_knobs(config.arguments, config.defaults))
        folder = Path(args.out) / SCRIPT.name / args.dataset / name
        make_folder(folder)
        arguments = config.arguments | {"seeds": args.seeds}
        del arguments["seed"]
        write_json(folder / "decision.json", {"arguments": arguments, **decision})
    return decision


# ---- Command line ----

# Defaults, and by dataset what differs. The paper's settings could not be read: all of it is
# ours, fixed before a test split was read; datasets that pmr.py has too have its settings. Weights
# of the distillation that are not 10 were chosen on validation.
COMMON = {
    "batch_size": 64,
    "epochs": 20,
    "lr": 0.01,
    "momentum": 0.9,
    "weight_decay": 1e-4,
    "schedule": "none",
    "distill_weight": 10.0,  # re-implementations: 1 and 10
}
LARGE = {**COMMON, "epochs": 100, "lr": 1e-3, "schedule": "step"}
RECIPES = {
    "synthetic": {**COMMON, "epochs": 30, "lr": 0.05, "schedule": "cosine", "distill_weight": 1.0},
    "digits": {**COMMON, "distill_weight": 1000.0},
    "cg-mnist": LARGE,
    "av-digits": {**COMMON, "schedule": "step", "distill_weight": 0.3},
    "features": COMMON,
    "crema-d": LARGE,
    "ave": LARGE,
    "vggsound": LARGE,
    "modelnet40": LARGE,
}
METHODS = {  # and the flags that decide their results
    "auto": ("distill_weight", "shared_start"),  # validation chooses between umt and ume
    "umt": ("distill_weight", "shared_start"),
    "ume": (),
    "ume-logits": (),
    "linear": (),  # what the choice compares UME with
    "joint": (),
    "unimodal": (),
}
NEEDS = {  # the runs that a method starts from
    "auto": ("unimodal", "ume", "linear", "joint"),
    **dict.fromkeys(("umt", *ASSEMBLED), ("unimodal",)),
}


def add_flags(add):
    add("--distill-weight", type=SIZE, metavar="X", help="lambda of UMT; default: by dataset")
    start = "student encoders that start where their teachers did: a modality or all (none)"
    add("--shared-start", default="none", metavar="NAME", help=start)


def columns(splits):
    """Columns of the table: title -> where the number stands in a summary.

    probe: accuracy of a linear classifier trained anew on the frozen encoder.
    """
    found = {"test": "test.accuracy", "macro-F1": "test.macro_f1", "best": "best.test.accuracy"}
    found |= {"val": "val.accuracy"}
    found |= {f"{m} probe": f"test.{m}.probe" for m in splits.modalities}
    return found | {name: f"test.slices.{name}" for name in splits.test.slices}


SCRIPT = Script(
    name="umt_ume",
    doc=__doc__,
    methods=METHODS,
    compared=("ume", "ume-logits", "joint", "umt", "auto"),
    fusions=FUSIONS,
    recipes=RECIPES,
    add_flags=add_flags,
    unfused=("unimodal", *ASSEMBLED),
    needs=NEEDS,
    naming={"shared_start": ("none", "all")},
    dataset="synthetic",
)


def main(argv=None):
    """Run the command line; returns the summary of the run, or {"runs": ..., "table": ...}, and
    with `auto` also {"decision": ...}."""
    command = Command(SCRIPT, argv)
    auto = "auto" in command.methods
    summaries = []
    for config in configs(command):
        run = Run(config)
        if run.summary is None or config.eval_only:  # a finished run is reported, not trained again
            model = build_model(config, command.splits)
            if not config.eval_only:
                train(run, model, command.splits, config)
            run.finish(*test(run, model, command.splits, config))
        summaries.append(run.summary)
    result = command.report(summaries, columns(command.splits))
    return result | {"decision": report(command)} if auto else result


if __name__ == "__main__":
    run_command(main)
