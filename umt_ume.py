"""On Uni-Modal Feature Learning in Supervised Multi-Modal Learning (Du et al., ICML 2023).
https://arxiv.org/abs/2305.01233

Trained jointly, a network stops once the easy features have fitted the training data, and learns
each modality worse than a network of its own would ("modality laziness"). Two cures: average the
uni-modal networks (UME), or train jointly and distil their features (UMT); and a rule to choose.

    python umt_ume.py                                           # synthetic data, a minute on a CPU
    python umt_ume.py --dataset av-digits --method auto --seeds 0 1 2
    python umt_ume.py --dataset cg-mnist --device cuda --precision bf16

Every run leaves its configuration, metrics, predictions, curves and checkpoints in
runs/umt_ume/<dataset>/<method>-<fusion>[-<knob>=<value>]-seed<k>/. See docs/umt_ume.md.
"""

import math
import sys
from functools import partial
from pathlib import Path
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
from common.datasets.synthetic import CONFIGURATIONS
from common.encoders import build_encoder
from common.errors import UserError
from common.experiments import (
    as_flags,
    experiment_folder,
    format_text,
    paired_differences,
    print_table,
    run_experiment,
    tabulate,
    trends,
    without_flag,
)
from common.fusion import LATE_FUSIONS, Sum, average_probabilities
from common.metrics import (
    accuracy,
    collect,
    count_parameters,
    linear_probe,
    macro_f1,
    probe_encoders,
)
from common.progress import Progress
from common.rebalance import RIVALS, build_rival, check_rivals, rival_knobs
from common.seeding import seed_phase
from common.training import (
    Run,
    autocast,
    build_optimizer,
    changed_knobs,
    forward,
    make_folder,
    pick_device,
    scheduled_lr,
    set_lr,
    write_json,
)

# ---- Method ----


def distillation(features, targets):
    """UMT: the sum over modalities of the mean squared distance between student and teacher.

    features, targets: modality -> (B, D), z_m before fusion and t_m of the frozen uni-modal
    encoder; means are over batch and dimensions, so the weight does not depend on the width.
    """
    return sum(F.mse_loss(features[m], targets[m]) for m in targets)


def average_logits(outputs):
    """UME by logits: (B, C) of every modality -> their mean."""
    return torch.stack(outputs).mean(dim=0)


class Teachers(nn.ModuleDict):
    """The uni-modal encoders, modality -> encoder: frozen, in evaluation mode for good."""

    def __init__(self, encoders):
        super().__init__(encoders)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode=True):
        return self

    @torch.no_grad()
    def forward(self, inputs):
        """modality -> t_m (B, D)."""
        return {m: encoder(inputs[m]) for m, encoder in self.items()}


def paired_difference(correct, reference):
    """Points by which one classifier is right more often than another, and their standard error.

    correct, reference: (S, N) bool, the same N items for each of S seeds. The difference of an item
    is averaged over the seeds; the standard error is over items.
    """
    difference = 100 * (correct.double() - reference.double()).mean(dim=0)
    error = difference.std() / math.sqrt(len(difference)) if len(difference) > 1 else 0.0
    return float(difference.mean()), float(error)


def choose(linear_correct, ensemble_correct):
    """UMT or UME? A linear classifier on the frozen uni-modal features, all of them together, that
    beats the ensemble by more than a standard error has found something that only they tell
    together: then UMT. Both (S, N), see `paired_difference`, on validation data."""
    mean, error = paired_difference(linear_correct, ensemble_correct)
    return "umt" if mean > error else "ume"


# ---- Model ----


class LateFusion(nn.Module):
    """An encoder for each modality, and a fusion head.

    inputs -> logits (B, C) and features before fusion, modality -> (B, D).
    """

    def __init__(self, encoders, fusion):
        super().__init__()
        self.encoders = nn.ModuleDict(encoders)
        self.fusion = fusion

    def forward(self, inputs):
        features = {m: encoder(inputs[m]) for m, encoder in self.encoders.items()}
        return self.fusion(features), features


def build_model(config, splits):
    """The network of a method, initialised from the run's seed; what methods share starts equal."""
    seed_phase(config.seed, "initialisation")
    modalities = splits.modalities
    if config.method.startswith("unimodal-"):
        modalities = (config.method.removeprefix("unimodal-"),)
    encoders = {
        m: build_encoder(config.dataset, splits.shapes[m], pretrained=config.pretrained)
        for m in modalities
    }
    dims = {m: encoder.dim for m, encoder in encoders.items()}
    head = LATE_FUSIONS[config.fusion] if config.fusion else Sum  # of one modality: a classifier
    model = LateFusion(encoders, head(dims, splits.num_classes))
    return model.to(config.device, memory_format=torch.channels_last)


# ---- Training ----


def train(run, model, teachers, splits, config):
    """One loop for all methods. UMT adds the distance to the teachers to joint training's loss; see
    common/rebalance.py for the rivals."""
    rival = build_rival(model, splits.train, splits.num_classes, config)
    targets = find_targets(teachers, splits.train, config) if teachers else None

    def new_optimizer(parameters):
        return build_optimizer(config.optimizer, parameters, config.lr, config.weight_decay)

    def batches(phase, epoch, optimizer):
        generator = seed_phase(config.seed, phase, epoch)
        set_lr(optimizer, scheduled_lr(config.schedule, config.lr, epoch, config.epochs))
        return rival.data.batches(config.batch_size, generator, augment=True)

    optimizer = new_optimizer([*model.parameters(), *rival.parameters()])
    state = {"model": model, "rival": rival, "optimizer": optimizer}
    first_epoch = run.start(state)
    steps = math.ceil(len(rival.data) / config.batch_size)
    progress = Progress(run.label, config.epochs, steps, first_epoch)
    look = partial(forward, config=config)
    for epoch in range(first_epoch, config.epochs):
        rival.start_epoch(epoch, config.epochs, model, look, new_optimizer, batches)
        seen = progress(batches("train", epoch, optimizer))
        training = train_epoch(model, rival, targets, optimizer, seen, config)
        validation, _ = evaluate(model, splits.val, config)
        hint = "--lr or --distill-weight" if targets else "--lr"
        run.check_finite(training["loss"] + validation["loss"], hint)
        if config.method == "g-blending":
            training["weights"] = rival.weights.tolist()
        run.end_epoch({"train": training, "val": validation}, state)
    progress.close()


def find_targets(teachers, split, config):
    """A function (inputs, index) -> teacher features of the batch, modality -> (B, D).

    Without augmentation they are computed once and looked up; else the teachers see what the
    student sees.
    """

    def look(inputs):
        with autocast(config.device, config.precision):
            return {m: t.float() for m, t in teachers(inputs).items()}

    if split.augmented:
        return lambda inputs, index: look(inputs)
    table = collect(look, split)
    return lambda inputs, index: {m: table[m][index] for m in teachers}


def train_epoch(model, rival, targets, optimizer, batches, config):
    """One pass over the training data. Totals stay on the device until its end."""
    model.train()
    totals = torch.zeros(3, device=config.device)  # samples, summed loss, correct
    for inputs, labels, index in batches:
        logits, features = forward(model, inputs, config)
        loss = rival.loss(logits, features, labels)
        if targets:
            loss = loss + config.distill_weight * distillation(features, targets(inputs, index))
        optimizer.zero_grad()
        loss.backward()
        rival.modulate(model, features, labels)
        optimizer.step()
        with torch.no_grad():
            samples = torch.full_like(loss, len(labels))
            correct = (logits.argmax(dim=1) == labels).sum()
            totals += torch.stack([samples, samples * loss, correct])
    samples, loss, correct = totals.tolist()
    return {"loss": loss / samples, "accuracy": 100 * correct / samples}


def forward_split(model, split, config):
    """Logits, features and labels of a whole split, in evaluation mode."""

    def look(inputs):
        logits, features = forward(model, inputs, config)
        return {"logits": logits, **features}

    model.eval()
    return collect(look, split)


def measure(logits, split):
    """Accuracy and macro-F1 in percent, the loss, and the accuracy in every slice of the split."""
    labels = split.labels
    metrics = {
        "accuracy": accuracy(logits, labels),
        "macro_f1": macro_f1(logits, labels),
        "loss": F.cross_entropy(logits, labels).item(),
    }
    slices = {name: mask for name, mask in split.slices.items() if mask.any()}
    if slices:
        metrics["slices"] = {
            name: accuracy(logits[mask], labels[mask]) for name, mask in slices.items()
        }
    return metrics


def evaluate(model, split, config):
    """Metrics of `split` and logits; where the head can be split also of each modality's part.

    head: accuracy of that part of the fused logits. Not a probe: it was never trained to classify
    alone.
    """
    outputs = forward_split(model, split, config)
    logits, labels = outputs["logits"], outputs["labels"]
    metrics = measure(logits, split)
    modalities = list(model.encoders)
    if len(modalities) == 1:
        metrics[modalities[0]] = {"alone": metrics["accuracy"]}
    elif config.fusion == "concat":
        with torch.no_grad():
            parts = model.fusion.unimodal_logits(outputs)
        metrics |= {m: {"head": accuracy(part, labels)} for m, part in parts.items()}
    return metrics, logits


def test(run, model, splits, config):
    """The summary: the test split read once, by the last network and the best on validation."""
    run.restore({"model": model}, "best.pt")
    best, _ = evaluate(model, splits.test, config)
    run.restore({"model": model}, "last.pt")
    last, logits = evaluate(model, splits.test, config)
    with torch.no_grad():
        probes = probe_encoders(lambda x: forward(model, x, config)[1], splits.train, splits.test)
    for m, found in probes.items():
        last.setdefault(m, {})["probe"] = found
    summary = run.summarize(last, best)
    summary["parameters"] = count_parameters(model)
    _, val_logits = evaluate(model, splits.val, config)
    return summary, predictions(splits.test, logits, val_logits)


def predictions(split, logits, val_logits):
    """What predictions.npz holds: of the test split, and the logits of validation."""
    arrays = {"index": split.index, "label": split.labels, "logits": logits}
    arrays["val_logits"] = val_logits
    return {name: tensor.cpu().numpy() for name, tensor in arrays.items()}


def curves(history):
    """Panels of curves.png; none for a method that trains no network."""
    names = {"train": "train", "val": "validation"}
    lines = {name: [epoch[key]["accuracy"] for epoch in history] for key, name in names.items()}
    return {"accuracy (%)": lines} if history else {}


# ---- Assembled from the uni-modal networks: UME, and the linear classifier of the choice ----


def assemble(models, method, splits, config):
    """Logits on validation and test, by name: of UME (`ume` averages probabilities, `ume-logits`
    logits), or of the linear classifier on the concatenated frozen features (`linear`)."""

    def outputs(name):
        return [forward_split(model, getattr(splits, name), config) for model in models.values()]

    def features(name):
        found = outputs(name)
        return torch.cat([x[m] for m, x in zip(models, found, strict=True)], dim=1)

    if method == "linear":
        classify = linear_probe(features("train"), splits.train.labels, splits.num_classes)
        return {name: classify(features(name)) for name in ("val", "test")}
    average = average_probabilities if method == "ume" else average_logits
    return {name: average([x["logits"] for x in outputs(name)]) for name in ("val", "test")}


class Study:
    """The runs of one command: each method and seed once, uni-modal networks as they are needed."""

    def __init__(self, args, defaults):
        self.args, self.defaults = args, defaults
        self.device = pick_device(args.device)
        self.splits = load_splits(args, self.device)
        self.methods = choose_methods(args, self.splits.modalities)
        self.runs, self.val_logits = {}, {}

    def config(self, method, seed):
        chosen = {"method": method, "seed": seed, "device": self.device}
        config = SimpleNamespace(**{**vars(self.args), **chosen})
        if method.startswith("unimodal-") or method in ASSEMBLED:
            config.fusion = None
        return config

    def run(self, method, seed):
        """The `Run` of one method and seed, trained and tested; a finished one as it is.

        Uni-modal networks that it needs come first. --overwrite is for the methods that were named.
        """
        if (method, seed) in self.runs:
            return self.runs[method, seed]
        args = self.args
        if method in ASSEMBLED or (method == "umt" and not args.eval_only):
            for m in self.splits.modalities:
                self.run(f"unimodal-{m}", seed)
        if args.overwrite and not {method, "auto"} & set(self.methods):
            args = SimpleNamespace(**{**vars(args), "overwrite": False, "resume": True})
        if method == "umt" and args.overwrite:  # a damaged teacher must not cost the student
            self.unimodal_models(seed, "last.pt")
        config = self.config(method, seed)
        arguments = {"script": "umt_ume", "seed": seed}
        arguments |= {knob: getattr(config, knob) for knob in knobs_of(config)}
        run = Run(arguments, self.defaults, self.splits.sizes, self.device, args)
        self.runs[method, seed] = run
        if run.summary is None or self.args.eval_only:
            work = self.assemble if method in ASSEMBLED else self.train
            summary, predictions = work(run, config)
            self.val_logits[method, seed] = predictions["val_logits"]
            if self.args.eval_only:
                run.summary = summary
            else:
                run.finish(summary, predictions, curves(run.history))
        return run

    def train(self, run, config):
        """Train, unless there is only to evaluate, and test."""
        model = build_model(config, self.splits)
        if not self.args.eval_only:
            teachers = None
            if config.method == "umt":
                models = self.unimodal_models(config.seed, "last.pt")
                teachers = Teachers({m: model.encoders[m] for m, model in models.items()})
            train(run, model, teachers, self.splits, config)
        return test(run, model, self.splits, config)

    def unimodal_models(self, seed, checkpoint):
        """modality -> the network trained on it alone, at `checkpoint`."""
        models = {}
        for m in self.splits.modalities:
            run = self.run(f"unimodal-{m}", seed)
            models[m] = build_model(self.config(f"unimodal-{m}", seed), self.splits)
            run.restore({"model": models[m]}, checkpoint)
        return models

    def assemble(self, run, config):
        """Test a method that trains no network of its own; its best epochs are its networks'."""
        found = {}
        for checkpoint in ("best.pt", "last.pt"):
            models = self.unimodal_models(config.seed, checkpoint)
            logits = assemble(models, config.method, self.splits, config)
            found[checkpoint] = {
                name: measure(x, getattr(self.splits, name)) for name, x in logits.items()
            }
        named = ("script", "dataset", "method", "fusion", "seed", "epochs")
        summary = {key: run.arguments[key] for key in named}
        summary |= {"seconds": round(run.seconds, 1), **found["last.pt"]}
        summary["best"] = {"epoch": None, **found["best.pt"]}
        if config.method != "linear":
            summary["parameters"] = count_parameters(*models.values())
        return summary, predictions(self.splits.test, logits["test"], logits["val"])

    def read_val_logits(self, method, seed):
        """(N, C) of a run on validation, just evaluated or from its folder."""
        run = self.run(method, seed)
        if (method, seed) not in self.val_logits:
            self.val_logits[method, seed] = run.read_predictions()["val_logits"]
        return torch.from_numpy(self.val_logits[method, seed])

    def decide(self, seeds):
        """UMT or UME, by `choose` on validation, and whether joint training is better than both.

        `umt` is compared if it was named or is chosen.
        """
        labels = self.splits.val.labels.cpu()

        def correct(method):
            logits = torch.stack([self.read_val_logits(method, seed) for seed in seeds])
            return logits.argmax(dim=2) == labels

        right = {method: correct(method) for method in ("linear", "ume", "joint")}
        choice = choose(right["linear"], right["ume"])
        if "umt" in (choice, *self.methods):
            right["umt"] = correct("umt")
        pairs = [("linear", "ume"), *(("joint", m) for m in ("ume", "umt") if m in right)]
        evidence = []
        for method, reference in pairs:
            mean, error = paired_difference(right[method], right[reference])
            evidence.append({"method": method, "reference": reference, "points": mean})
            evidence[-1]["standard_error"] = error
        single = [choose(right["linear"][i:][:1], right["ume"][i:][:1]) for i in range(len(seeds))]
        return {
            "choice": choice,
            "by_seed": ", ".join(f"{single.count(m)} {m}" for m in sorted(set(single))),
            "joint_is_better": all(row["points"] > row["standard_error"] for row in evidence[1:]),
            "validation": {m: 100 * float(x.double().mean()) for m, x in right.items()},
            "evidence": evidence,
        }


# ---- Command line ----

# Defaults, and by dataset what differs. The paper's settings are lost; those of the datasets that
# pmr.py has too are its own. The distillation weights that are not 10 were chosen on validation.
COMMON = {"batch_size": 64, "lr": 0.01, "weight_decay": 1e-4, "schedule": "none", "epochs": 20}
COMMON |= {"distill_weight": 10.0}
LARGE = {**COMMON, "lr": 1e-3, "schedule": "step", "epochs": 100}
RECIPES = {
    "synthetic": {**COMMON, "lr": 0.05, "schedule": "cosine", "epochs": 30, "distill_weight": 1.0},
    "digits": {**COMMON, "distill_weight": 100.0},
    "cg-mnist": LARGE,
    "av-digits": {**COMMON, "schedule": "step", "distill_weight": 1.0},
    "features": COMMON,
    **dict.fromkeys(("crema-d", "ave", "vggsound", "modelnet40"), LARGE),
}
WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0)  # of the distillation, to choose from
ASSEMBLED = ("ume", "ume-logits", "linear")
METHODS = (*ASSEMBLED, "joint", "umt")
# In the configuration Q; without paired features first.
DIAL = [
    {"configuration": "Q", "pair_size": size, "pair_only": share}
    for share, size in [(0.0, 0.0), (0.05, 5.0), (0.1, 5.0), (0.2, 5.0), (0.4, 5.0)]
]


def knobs_of(config):
    """Names of the arguments that decide a run's result, by method."""
    own = ["distill_weight"] if config.method in ("umt", "auto") else rival_knobs(config.method)
    return shared_knobs(config.dataset) + own


def parse_args(argv=None):
    """The command line with the dataset's recipe filled in, and the defaults of all flags."""
    parser = build_parser(
        __doc__,
        method_help=f"{', '.join((*METHODS, *RIVALS))}, unimodal-<modality>, auto (validation "
        "chooses between umt and ume); default: a comparison and the choice, on large data auto",
        fusions=list(LATE_FUSIONS),
        experiments=["methods", "dial", "weights"],
    )
    parser.set_defaults(dataset="synthetic")
    add = parser.add_argument_group("UMT").add_argument
    add("--distill-weight", type=number(float, 0), metavar="X", help="lambda, default: by dataset")
    add_rival_flags(parser)
    args = parser.parse_args(argv)
    defaults = fill_from_recipe(parser, args, recipe_for(args.dataset, RECIPES))
    args.fusion = args.fusion or "concat"
    return args, defaults


def choose_methods(args, modalities):
    """The methods to run: those named, else a comparison, or the choice where data are large."""
    unimodal = [f"unimodal-{m}" for m in modalities]
    compared = [*unimodal, "ume", "ume-logits", "joint", "aux-ce", "umt", "auto"]
    methods = args.method or (compared if DATASETS[args.dataset].small else ["auto"])
    check_rivals(methods, args.fusion, modalities)
    return check_methods(methods, (*METHODS, *RIVALS, "auto", *unimodal), args.dataset)


def columns_of(splits):
    """Columns of the tables: title -> where the number stands in a summary."""
    columns = {"test": "test.accuracy", "macro-F1": "test.macro_f1", "best": "best.test.accuracy"}
    columns |= {"val": "val.accuracy"}
    columns |= {f"{m} probe": f"test.{m}.probe" for m in splits.modalities}
    return columns | {name: f"test.slices.{name}" for name in splits.test.slices}


def run_all(argv):
    """Run every method with every seed: {"runs": summaries, "table": rows, "decision": ...}."""
    args, defaults = parse_args(argv)
    study = Study(args, defaults)
    methods, decision = study.methods, None
    if "auto" in methods:
        decision = study.decide(args.seeds)
        used = ["ume", "linear", "joint", decision["choice"]]
        methods = list(dict.fromkeys([*(m for m in methods if m != "auto"), *used]))
    runs = [study.run(method, seed).summary for seed in args.seeds for method in methods]
    table = tabulate(runs, columns_of(study.splits))
    print_table(table, "umt_ume", args)
    if decision:
        report(decision, args, defaults)
    return {"runs": runs, "table": table, "decision": decision}


def report(decision, args, defaults):
    """Print the choice with its evidence and write it as decision.json."""
    print(f"\nChoice, by validation accuracy: {decision['choice']}. Paired, with standard error:")
    for row in decision["evidence"]:
        points = f"{row['points']:+.2f} ± {row['standard_error']:.2f} points"
        print(f"  {row['method']} - {row['reference']}: {points}")
    if decision["joint_is_better"]:
        print("Plain joint training is better there than all that it was compared with.")
    if args.eval_only:
        return
    config = SimpleNamespace(**{**vars(args), "method": "umt"})
    arguments = {knob: getattr(config, knob) for knob in knobs_of(config)}
    name = "-".join(["auto", args.fusion, *changed_knobs(arguments, defaults)])
    folder = Path(args.out) / "umt_ume" / args.dataset / name
    make_folder(folder)
    record = {"arguments": {**arguments, "method": "auto", "seeds": args.seeds}, **decision}
    write_json(folder / "decision.json", record)


def plan_experiment(args):
    """Methods, grid, columns and figure. `methods`: all of them and the choice, on `synthetic` in
    every configuration. `dial`: accuracy as the share of samples with only paired features grows.
    `weights`: validation accuracy of UMT by its weight, which `RECIPES` is chosen by.
    """
    own = args.dataset == "synthetic"
    configurations = [{"configuration": name} for name in CONFIGURATIONS] if own else [{}]
    if args.experiment == "weights":
        grid = [{**c, "distill_weight": weight} for c in configurations for weight in WEIGHTS]
        return ["umt"], grid, ["val"], draw_weights
    if args.experiment == "methods":
        modalities = load_splits(args, torch.device("cpu")).modalities
        ogm = args.fusion == "concat" and len(modalities) > 1  # see check_rivals
        rivals = [m for m in RIVALS if m != "ogm-ge" or ogm]
        methods = [*(f"unimodal-{m}" for m in modalities), *METHODS, *rivals, "auto"]
        return methods, configurations, None, None
    if not own:
        raise UserError("--experiment dial turns dials of synthetic; leave out --dataset.")
    return ["ume", "joint", "aux-ce", "umt"], DIAL, ["test"], trends(["pair_only"])


def draw_weights(title, rows, runs):
    """Validation accuracy by weight, a line for each configuration."""
    lines = [{**row, "method": row.get("configuration", row["method"])} for row in rows]
    return trends(["distill_weight"])(title, lines, runs)


def experiment(args, defaults, argv):
    """Run a grid and write its table and figure, and what `auto` decided in each of its parts."""
    methods, grid, columns, figure = plan_experiment(args)
    turned = [knob for knob in grid[-1] if getattr(args, knob) != defaults[knob]]
    if turned:
        flag = turned[0].replace("_", "-")
        raise UserError(f"--experiment {args.experiment} sets --{flag} itself; leave it out.")
    methods = args.method or methods
    argv = without_flag(sys.argv[1:] if argv is None else argv, "--experiment")
    argv = [*argv, "--method", *methods]  # of a flag that is there twice the last one counts
    configs = [SimpleNamespace(**{**vars(args), "method": method}) for method in methods]
    knobs = dict.fromkeys(knob for config in configs for knob in knobs_of(config))
    arguments = {knob: getattr(args, knob) for knob in knobs if knob not in grid[-1]}
    folder = experiment_folder("umt_ume", args, arguments, defaults)
    arguments |= {"method": methods, "seeds": args.seeds}
    decisions = []

    def run_part(part):
        result = run_all(part)
        decisions.append(result["decision"])
        return result

    title = f"{args.experiment} on {args.dataset}"
    result = run_experiment(
        run_part,
        [(fields, [*argv, *as_flags(fields)]) for fields in grid],
        arguments,
        folder,
        title,
        columns=columns,
        pairs=[(m, "joint") for m in ("umt", *RIVALS) if m in methods],
        figure=figure,
    )
    if "auto" in methods:
        rows = [judge(*part, result["runs"]) for part in zip(grid, decisions, strict=True)]
        titles = dict.fromkeys(title for row in rows for title in row)
        rows = [{title: row.get(title) for title in titles} for row in rows]
        record = {"title": f"The choice, {title}", "arguments": arguments, "rows": rows}
        write_json(folder / "decisions.json", {**record, "decisions": decisions})
        print(f"\n{format_text(rows)}")
    return result


def judge(fields, decision, runs):
    """A row on one decision: its evidence on validation, and what the test data say of it.

    It is right if the other choice is not better on test by more than a standard error (over
    seeds).
    """
    runs = [run for run in runs if all(run[name] == value for name, value in fields.items())]
    row = {**fields, "choice": decision["choice"], "of single seeds": decision["by_seed"]}
    for found in decision["evidence"]:
        pair = f"{found['method']} - {found['reference']}"
        row[f"{pair} (val)"] = f"{found['points']:+.2f} ± {found['standard_error']:.2f}"
    other = "ume" if decision["choice"] == "umt" else "umt"
    for method, reference in ((decision["choice"], other), ("joint", decision["choice"])):
        found = paired_differences(runs, method, reference, groups=tuple(fields))
        if found:
            points, error = found[0]["mean"], found[0]["standard_error"]
            title = "choice - other (test)" if reference == other else "joint - choice (test)"
            row[title] = f"{points:+.2f}" + ("" if error is None else f" ± {error:.2f}")
            if reference == other and error is not None:
                row["right"] = "yes" if points >= -error else "no"
    return row


def main(argv=None):
    """Run the command line; returns the summary of the run, or {"runs": ..., "table": ...}."""
    args, defaults = parse_args(argv)
    if args.experiment:
        return experiment(args, defaults, argv)
    result = run_all(argv)
    return result["runs"][0] if len(result["runs"]) == 1 else result


if __name__ == "__main__":
    run_command(main)
