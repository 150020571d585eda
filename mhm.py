"""MHM: Multi-head Modularization (Lee, Park, Yun, Chang, AAAI 2022).
https://doi.org/10.1609/aaai.v36i7.20698

A network is cut into uni-modal embeddings theta, a multi-modal embedding phi and a head psi. Heads
with training data of their own take turns: first phi is frozen while the head learns, then the head
while phi learns to suit it, on data that this head has not seen. Theta learns in both phases. One
head is deployed.

    python mhm.py                                               # bundled digits, a minute on a CPU
    python mhm.py --dataset av-digits --method joint mhm --heads 3 --seeds 0 1 2
    python mhm.py --dataset cg-mnist --device cuda --precision bf16

Every run leaves its configuration, metrics, predictions, curves and checkpoints in
runs/mhm/<dataset>/<method>-<fusion>[-<knob>=<value>]-seed<k>/. See docs/mhm.md.
"""

import math
import sys
from types import SimpleNamespace
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

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
    draw_experiment,
    experiment_folder,
    mean_by_epoch,
    paper_columns,
    print_table,
    run_experiment,
    spread,
    tabulate,
    without_flag,
)
from common.fusion import FUSIONS, ShakeShake, average_probabilities
from common.metrics import (
    accuracy,
    collect,
    count_parameters,
    divergence_from_mean,
    hitting_ratio,
    macro_f1,
    missing_ratio,
    pairwise_divergence,
    probe_encoders,
)
from common.progress import Progress
from common.seeding import make_generator, seed_phase
from common.training import (
    Run,
    autocast,
    build_optimizer,
    pick_device,
    scheduled_lr,
    set_lr,
)

# ---- Method ----

EVERYTHING = frozenset({"theta", "phi", "psi"})
AVERAGED = ("ensemble", "head-ensemble")  # whose prediction is the average of all members
SEVERAL_HEADS = ("mhm", "mhm-no-freeze", "k-heads-one-set", "head-ensemble")
ONE_HEAD = ("one-head-one-set", "one-head-k-sets")


def split_folds(order, num_folds):
    """K pairs (H^k, E^k), Sec. 4: the head-specific set is all folds but the k-th, E^k is fold k.

    order: (N,) the training samples in random order, as they are split once and for all.
    Sizes of folds differ by one at most. The E^k are disjoint and together everything.
    """
    folds = order.tensor_split(num_folds)
    return [(torch.cat(folds[:k] + folds[k + 1 :]), folds[k]) for k in range(num_folds)]


class Phase(NamedTuple):
    """A part of an epoch.

    samples: (n,) positions in the training split.
    paths:   [(i, j, k), ...], through theta_i, phi_j and psi_k; several outputs are averaged.
    trained: which kinds of modules learn, of "theta", "phi" and "psi"; the others are frozen.
    """

    samples: torch.Tensor
    paths: list
    trained: frozenset

    @property
    def learners(self):
        """Names of the modules that learn, e.g. {"theta-0", "psi-2"}."""
        numbers = [zip(("theta", "phi", "psi"), path, strict=True) for path in self.paths]
        return {f"{kind}-{n}" for path in numbers for kind, n in path if kind in self.trained}


def members(method, num_folds):
    """Every network (i, j, k) that one run of `method` trains, in the order of the rounds."""
    if method == "ensemble":
        return [(k, k, k) for k in range(num_folds)]
    if method == "mmm":
        return [(0, k, 0) for k in range(num_folds)]
    if method in SEVERAL_HEADS:
        return [(0, 0, k) for k in range(num_folds)]
    return [(0, 0, 0)]


def phases(method, epoch, folds):
    """What an epoch trains. An epoch is one round, H-phase and E-phase of one head: H^k and E^k
    together are one pass over the data, so epochs of all methods but the ensemble cost the same.

    mhm: Eq. (2), phi frozen, theta and psi^k on H^k; then Eq. (3), psi^k frozen, theta and phi on
    E^k; then the next head. The variants of Sec. 5 differ in what is swapped, frozen and averaged.
    """
    networks = members(method, len(folds))
    if method == "ensemble":  # independent networks, each on its head-specific set
        pairs = zip(networks, folds, strict=True)
        return [Phase(head_set, [path], EVERYTHING) for path, (head_set, _) in pairs]
    if method not in (*SEVERAL_HEADS, *ONE_HEAD, "mmm"):  # plain training, the paper's ETE
        return [Phase(torch.cat(folds[0]).sort().values, networks, EVERYTHING)]
    path = networks[epoch % len(networks)]
    one_set = method in ("one-head-one-set", "k-heads-one-set")
    head_set, embedding_set = folds[0 if one_set else epoch % len(folds)]
    if method == "mhm-no-freeze":
        return [Phase(head_set, [path], EVERYTHING), Phase(embedding_set, [path], EVERYTHING)]
    averaged = networks if method == "head-ensemble" else [path]
    return [
        Phase(head_set, [path], frozenset({"theta", "psi"})),
        Phase(embedding_set, averaged, frozenset({"theta", "phi"})),
    ]


def deploy(method, scores, epoch):
    """Numbers of the members that make the prediction after `epoch`: one, or all if averaged.

    At the end of a cycle it is the best on validation, in the middle of one the last trained; the
    paper only says that one head is selected. scores: of every member, on validation; None where
    there is no validation split.
    """
    count = len(scores)
    if method in AVERAGED:
        return list(range(count))
    last = epoch % count
    if last < count - 1 or None in scores:
        return [last]
    return [max(range(count), key=lambda k: (scores[k], k))]


def set_trainable(module, trainable):
    """Training mode, frozen or not. Gradients still flow through a frozen module to its input.

    Frozen parameters get no gradient, and their optimizer is not stepped: with zero gradients it
    would still move them by momentum or weight decay. Frozen BatchNorm uses and keeps its running
    statistics; dropout goes on, as the other modules meet it in joint training. The paper says
    nothing of either.
    """
    module.train()
    module.requires_grad_(trainable)
    for part in module.modules():
        if not trainable and isinstance(part, nn.modules.batchnorm._NormBase):
            part.eval()


# ---- Model ----

EMBEDDING_DIM = 128  # width of phi's output; the paper's sizes are in a supplement, not at hand


class ModularNet(nn.Module):
    """psi_k(phi_j(theta_i(x))), with one or several of each module.

    theta: inputs (modality -> (B, ...)) -> features; phi: features -> embedding; psi -> output.
    """

    def __init__(self, theta, phi, psi):
        super().__init__()
        self.theta, self.phi, self.psi = (nn.ModuleList(part) for part in (theta, phi, psi))

    def forward(self, inputs, paths):
        """A list of outputs, one for each path (i, j, k)."""
        features = {i: self.theta[i](inputs) for i in {i for i, _, _ in paths}}
        embeddings = {(i, j): self.phi[j](features[i]) for i, j in {path[:2] for path in paths}}
        return [self.psi[k](embeddings[i, j]) for i, j, k in paths]

    def parts(self):
        """Every module by its name, such as "psi-2"."""
        return {
            f"{kind}-{number}": module
            for kind in ("theta", "phi", "psi")
            for number, module in enumerate(getattr(self, kind))
        }


class UnimodalEmbeddings(nn.ModuleDict):
    """theta: modality -> encoder, applied each to its own input."""

    def forward(self, inputs):
        return {m: encoder(inputs[m]) for m, encoder in self.items()}


class OnlyModality(nn.Module):
    """The place of phi in a uni-modal network, which has none: hands its features on."""

    def forward(self, features):
        (z,) = features.values()
        return z


class Classification:
    """A task: theta, phi and psi, the loss, the average of several outputs, and what is measured.

    Another task that predicts classes is another class with the same methods; heads and epochs are
    selected by what its `evaluate` calls accuracy.
    """

    loss = staticmethod(F.cross_entropy)
    average = staticmethod(average_probabilities)

    def __init__(self, config, splits):
        self.config, self.splits = config, splits
        self.modalities = splits.modalities
        if config.method.startswith("unimodal-"):
            self.modalities = (config.method.removeprefix("unimodal-"),)

    def build_theta(self):
        config, shapes = self.config, self.splits.shapes
        theta = UnimodalEmbeddings(
            {
                m: build_encoder(config.dataset, shapes[m], pretrained=config.pretrained)
                for m in self.modalities
            }
        )
        self.dims = {m: encoder.dim for m, encoder in theta.items()}
        return theta

    def build_phi(self):
        if len(self.modalities) == 1:
            return OnlyModality()
        return nn.Sequential(FUSIONS[self.config.fusion](self.dims, EMBEDDING_DIM), nn.ReLU())

    def build_psi(self):
        width = self.dims[self.modalities[0]] if len(self.modalities) == 1 else EMBEDDING_DIM
        branches = self.config.branches if self.config.method == "shake-shake" else 1
        heads = nn.ModuleList(nn.Linear(width, self.splits.num_classes) for _ in range(branches))
        heads.apply(initialize)
        if self.config.method == "shake-shake":
            return ShakeShake(heads)
        if self.config.method == "dropout":
            return nn.Sequential(nn.Dropout(0.5), heads[0])
        return heads[0]

    @staticmethod
    def count_correct(output, labels):
        """How many of a batch (B, C) are right, as a tensor."""
        return (output.argmax(dim=1) == labels).sum()

    @staticmethod
    def evaluate(output, labels):
        """Metrics of an output (N, C) of the network or an average of several."""
        return {
            "accuracy": accuracy(output, labels),
            "macro_f1": macro_f1(output, labels),
            "loss": F.cross_entropy(output, labels).item(),
        }


def build_network(task, config):
    """As many copies of each module as the method has, initialised from the run's seed.

    Drawn in the order theta, phi, psi, so methods with a single theta and phi start from the same
    theta, phi and first head.
    """
    seed_phase(config.seed, "initialisation")
    networks = members(config.method, config.heads)
    thetas, phis, psis = (len(set(numbers)) for numbers in zip(*networks, strict=True))
    theta = [task.build_theta() for _ in range(thetas)]
    phi = [task.build_phi() for _ in range(phis)]
    psi = [task.build_psi() for _ in range(psis)]
    return ModularNet(theta, phi, psi).to(config.device, memory_format=torch.channels_last)


# ---- Training ----


class Trace(nn.Module):
    """What the deployed network predicts after every epoch, on up to 1000 validation items."""

    def __init__(self, epochs, items, classes):
        super().__init__()
        self.register_buffer("log_p", torch.zeros(epochs, min(items, 1000), classes))

    def write(self, epoch, output):
        self.log_p[epoch] = output[: self.log_p.shape[1]].log_softmax(dim=1)


def train(run, network, task, splits, config):
    """The method's phases, epoch by epoch. Every module keeps an optimizer of its own, which rests
    with its moments while the module is frozen or swapped out. Returns the trace."""
    order = torch.randperm(len(splits.train), generator=make_generator(config.seed, "folds"))
    folds = split_folds(order, config.heads)
    optimizers = {
        name: build_optimizer(config.optimizer, module.parameters(), config.lr, config.weight_decay)
        for name, module in network.parts().items()
        if list(module.parameters())
    }
    trace = Trace(config.epochs, len(splits.val), splits.num_classes).to(config.device)
    state = {"network": network, "trace": trace, **optimizers}
    first_epoch = run.start(state)
    first = phases(config.method, 0, folds)
    steps = sum(math.ceil(len(phase.samples) / config.batch_size) for phase in first)
    progress = Progress(run.label, config.epochs, steps, first_epoch)
    for epoch in range(first_epoch, config.epochs):
        for optimizer in optimizers.values():
            set_lr(optimizer, scheduled_lr(config.schedule, config.lr, epoch, config.epochs))
        totals = torch.zeros(3, device=config.device)  # samples, summed loss, correct
        for part, phase in enumerate(phases(config.method, epoch, folds)):
            generator = seed_phase(config.seed, "train", epoch, part)
            samples = splits.train.subset(phase.samples)
            batches = progress(samples.batches(config.batch_size, generator, augment=True))
            totals += train_phase(network, optimizers, task, phase, batches, config)
        samples, loss, correct = totals.tolist()
        training = {"loss": loss / samples, "accuracy": 100 * correct / samples}
        measured, output = measure(network, task, splits, epoch, config)
        run.check_finite(training["loss"] + measured["val"]["loss"])
        trace.write(epoch, output)
        run.end_epoch({"train": training, **measured}, state)
    progress.close()
    return trace


def train_phase(network, optimizers, task, phase, batches, config):
    """One pass over a phase's samples. Returns how many there were, their loss and the correct."""
    for name, module in network.parts().items():
        set_trainable(module, name in phase.learners)
    learning = [optimizer for name, optimizer in optimizers.items() if name in phase.learners]
    totals = torch.zeros(3, device=config.device)
    for inputs, labels, _ in batches:
        with autocast(config.device, config.precision):
            outputs = network(inputs, phase.paths)
        output = task.average([x.float() for x in outputs])
        loss = task.loss(output, labels)
        for optimizer in learning:
            optimizer.zero_grad()
        loss.backward()
        for optimizer in learning:
            optimizer.step()
        with torch.no_grad():
            samples = torch.full_like(loss, len(labels))
            totals += torch.stack([samples, samples * loss, task.count_correct(output, labels)])
    return totals


def predict(network, split, paths, config):
    """Outputs (P, N, C) of the networks `paths` in evaluation mode and float32, labels, index."""

    def forward(inputs):
        with autocast(config.device, config.precision):
            outputs = network(inputs, paths)
        return {"outputs": torch.stack([x.float() for x in outputs], dim=1)}

    network.eval()
    found = collect(forward, split)
    return found["outputs"].transpose(0, 1), found["labels"], found["index"]


def measure(network, task, splits, epoch, config):
    """What is logged after an epoch, and the deployed output (N, C) on validation.

    gap: the generalization gap of Sec. 5.2, error on val_iid minus error on as many training items.
    gs_harness: the divergence among the members of this run on validation, by both definitions.
    """
    networks = members(config.method, config.heads)
    outputs, labels, _ = predict(network, splits.val, networks, config)
    correct = [task.count_correct(output, labels).item() for output in outputs]
    deployed = deploy(config.method, correct, epoch)
    output = task.average([outputs[k] for k in deployed])
    seen = splits.train.head(len(splits.val_iid))
    seen, unseen = (
        evaluate(network, task, split, deployed, config)[0] for split in (seen, splits.val_iid)
    )
    measured = {
        "val": task.evaluate(output, labels),
        "gap": seen["accuracy"] - unseen["accuracy"],
        "deployed": deployed,
    }
    if len(networks) > 1:
        log_p = outputs.log_softmax(dim=2)
        measured["gs_harness"] = {name: function(log_p) for name, function in GS.items()}
    return measured, output


def evaluate(network, task, split, deployed, config):
    """Metrics of the deployed network on `split`, and what it predicts, as arrays."""
    networks = members(config.method, config.heads)
    outputs, labels, index = predict(network, split, [networks[k] for k in deployed], config)
    output = task.average(list(outputs))
    metrics = task.evaluate(output, labels)
    if len(task.modalities) == 1:
        metrics[task.modalities[0]] = {"alone": metrics["accuracy"]}
    predictions = {"index": index, "label": labels, "logits": output}
    return metrics, {name: tensor.cpu().numpy() for name, tensor in predictions.items()}


class Outcome(NamedTuple):
    """A run: its summary, the arrays of predictions.npz, and the entries of metrics.jsonl."""

    summary: dict
    predictions: dict
    history: list


def run_method(args, defaults, method, seed, splits, device):
    """Train and test one method with one seed; a finished run is reported, not trained again."""
    config = SimpleNamespace(**{**vars(args), "method": method, "seed": seed, "device": device})
    if method.startswith("unimodal-"):
        config.fusion = None
    arguments = {"script": "mhm", "seed": seed, **{k: getattr(config, k) for k in knobs_of(config)}}
    run = Run(arguments, defaults, splits.sizes, device, args)
    if run.summary is not None and not args.eval_only:
        return Outcome(run.summary, run.read_predictions(), run.read_history())
    task = Classification(config, splits)
    network = build_network(task, config)
    if args.eval_only:
        return Outcome(*test(run, network, task, splits, config), run.history)
    trace = train(run, network, task, splits, config)
    summary, predictions = test(run, network, task, splits, config)
    predictions["val_trace"] = trace.log_p.cpu().numpy()
    run.finish(summary, predictions, curves(run.history))
    return Outcome(summary, predictions, run.history)


def test(run, network, task, splits, config):
    """The summary: the test split read once, by the last network and the best on validation."""
    run.restore({"network": network}, "best.pt")
    best, _ = evaluate(network, task, splits.test, run.history[-1]["deployed"], config)
    run.restore({"network": network}, "last.pt")
    end = run.history[-1]
    last, predictions = evaluate(network, task, splits.test, end["deployed"], config)
    seen, _ = evaluate(network, task, splits.train, end["deployed"], config)
    paths = [members(config.method, config.heads)[k] for k in end["deployed"]]
    for m, found in probe(network.theta[paths[0][0]], splits, config).items():
        last.setdefault(m, {})["probe"] = found
    summary = run.summarize(last, best)
    deployed = {part for i, j, k in paths for part in (f"theta-{i}", f"phi-{j}", f"psi-{k}")}
    summary["parameters"] = count_parameters(*(network.parts()[name] for name in deployed))
    summary["gap"] = {"val_iid": end["gap"], "test": seen["accuracy"] - last["accuracy"]}
    summary |= {"heads": run.arguments.get("heads"), "deployed": end["deployed"]}
    if "gs_harness" in end:
        summary["gs_harness"] = end["gs_harness"]
    return summary, predictions


@torch.no_grad()
def probe(theta, splits, config):
    """Linear probes of the encoders of one theta, in evaluation mode, modality -> percent."""

    def encode(inputs):
        with autocast(config.device, config.precision):
            features = theta(inputs)
        return {m: z.float() for m, z in features.items()}

    return probe_encoders(encode, splits.train, splits.test)


def curves(history):
    """Panels of curves.png: accuracies, generalization gap, and GS-harness where there is one."""
    panels = {
        "accuracy (%)": {
            "train": [epoch["train"]["accuracy"] for epoch in history],
            "validation": [epoch["val"]["accuracy"] for epoch in history],
        },
        "generalization gap (points)": {"val_iid - train": [epoch["gap"] for epoch in history]},
    }
    if "gs_harness" in history[0]:
        values = [epoch["gs_harness"]["pairwise"] for epoch in history]
        panels["GS-harness (nats)"] = {"validation": values}
    return panels


# ---- Command line ----

COMMON = {"batch_size": 64, "lr": 0.01, "weight_decay": 1e-4, "schedule": "none", "epochs": 20}
LARGE = {**COMMON, "lr": 1e-3, "schedule": "step", "epochs": 100}
RECIPES = {  # as in pmr.py; the paper has none of these datasets
    "digits": COMMON,
    "cg-mnist": LARGE,
    "av-digits": {**COMMON, "schedule": "step"},
    "synthetic": {**COMMON, "lr": 0.05, "schedule": "cosine", "epochs": 30},
    "features": COMMON,
    **dict.fromkeys(("crema-d", "ave", "vggsound", "modelnet40"), LARGE),
}
METHODS = (
    *("joint", "mhm", "mhm-no-freeze", "ensemble", "dropout", "shake-shake"),
    *(*ONE_HEAD, "k-heads-one-set", "head-ensemble", "mmm"),
)
GS = {"pairwise": pairwise_divergence, "mean": divergence_from_mean}
DIGITS = {"GS-harness": 3, "GS": 3, "missing": 3, "hitting": 3}  # decimals in tables


def knobs_of(config):
    """Names of the arguments that decide a run's result, by method."""
    common = shared_knobs(config.dataset)
    if config.method == "shake-shake":
        return [*common, "branches"]
    if config.method in ("joint", "dropout") or config.method.startswith("unimodal-"):
        return common
    return [*common, "heads"]


def parse_args(argv=None):
    """The command line with the dataset's recipe filled in, and the defaults of all flags."""
    parser = build_parser(
        __doc__,
        method_help=f"{', '.join(METHODS)} (joint is the paper's ETE), unimodal-<modality>; "
        "default: mhm beside joint, mhm-no-freeze and each modality alone, on large data mhm",
        fusions=["concat", "sum", "film", "gated"],
        experiments=list(EXPERIMENTS),
    )
    add = parser.add_argument_group("MHM").add_argument
    heads = number(int, 2)
    add("--heads", type=heads, default=4, metavar="K", help="heads and folds (%(default)s)")
    add("--branches", type=heads, default=2, metavar="N", help="of shake-shake (%(default)s)")
    add(
        "--gs",
        choices=list(GS),
        default="pairwise",
        help="divergence that GS is: between pairs of networks, or from their mean (%(default)s)",
    )
    args = parser.parse_args(argv)
    defaults = fill_from_recipe(parser, args, recipe_for(args.dataset, RECIPES))
    args.fusion = args.fusion or "concat"
    return args, defaults


def choose_methods(args, splits):
    """The methods to run: those named, else a comparison, or MHM alone where data are large."""
    if args.heads > len(splits.train):
        raise UserError(
            f"{len(splits.train)} training samples do not make {args.heads} folds; lower --heads."
        )
    unimodal = [f"unimodal-{m}" for m in splits.modalities]
    compared = [*unimodal, "joint", "mhm-no-freeze", "mhm"]
    methods = args.method or (compared if DATASETS[args.dataset].small else ["mhm"])
    return check_methods(methods, (*METHODS, *unimodal), args.dataset)


def run_all(argv):
    """Run every method with every seed: {"runs": summaries, "table": rows, "outcomes": ...}."""
    args, defaults = parse_args(argv)
    device = pick_device(args.device)
    splits = load_splits(args, device)
    outcomes = {
        (method, seed): run_method(args, defaults, method, seed, splits, device)
        for seed in args.seeds
        for method in choose_methods(args, splits)
    }
    runs = [outcome.summary for outcome in outcomes.values()]
    columns = {
        "test": "test.accuracy",
        "macro-F1": "test.macro_f1",
        "best": "best.test.accuracy",
        "gap (iid)": "gap.val_iid",
        "gap (test)": "gap.test",
        "GS-harness": f"gs_harness.{args.gs}",
    }
    table = tabulate(runs, columns, DIGITS)
    for row in table:
        row |= compare_networks(row["method"], outcomes, args)
    print_table(table, "mhm", args)
    return {"runs": runs, "table": table, "outcomes": outcomes}


def compare_networks(method, outcomes, args):
    """The columns of a method that are about several networks and the same test items.

    GS (Sec. 5.2): the divergence between the networks that different seeds gave. Missing and
    hitting ratio (Table 4): seed by seed against the uni-modal networks, if they were run too.
    """
    predictions = {key: outcome.predictions for key, outcome in outcomes.items()}
    gs, missing, hitting = [], [], []
    if len(args.seeds) > 1:
        logits = [torch.from_numpy(predictions[method, seed]["logits"]) for seed in args.seeds]
        gs = [GS[args.gs](torch.stack(logits).log_softmax(dim=2))]
    correct = {
        key: torch.from_numpy(found["logits"].argmax(axis=1) == found["label"])
        for key, found in predictions.items()
    }
    for seed in args.seeds:
        alone = [right for (m, s), right in correct.items() if s == seed and "unimodal-" in m]
        if len(alone) > 1 and "unimodal-" not in method:
            missing.append(missing_ratio(correct[method, seed], torch.stack(alone)))
            hitting.append(hitting_ratio(correct[method, seed], torch.stack(alone)))
    measured = {"GS": gs, "missing": missing, "hitting": hitting}
    return {name: spread(values, DIGITS[name]) for name, values in measured.items()}


# What each table of Sec. 5 compares, and the columns that it shows.
EXPERIMENTS = {
    "table3": (
        ["joint", "ensemble", "mhm-no-freeze", "mhm"],
        ["test", "gap (iid)", "gap (test)", "GS", "GS-harness"],
    ),
    "table4": (["unimodal", "joint", "mhm"], ["test", "missing", "hitting"]),
    "table5": (["mhm"], ["test", "GS"]),
    "table6": (
        ["joint", *ONE_HEAD, "k-heads-one-set", "mhm", "head-ensemble", "mmm"],
        ["test", "GS"],
    ),
    "figure2": (["joint", "ensemble", "dropout", "shake-shake", "mhm-no-freeze", "mhm"], []),
}


def experiment(args, defaults, argv):
    """A table or figure of the paper on the chosen dataset; beside it the paper's numbers on AVE.

    Table 3 is made for equal epochs and for K times as many: in an epoch of MHM phi learns from a
    K-th of the data, and a head, on average, from less.
    """
    if len(args.seeds) == 1:
        print("GS compares seeds: with a single one of --seeds it stays empty.", file=sys.stderr)
    methods, columns = EXPERIMENTS[args.experiment]
    if "unimodal" in methods:
        modalities = load_splits(args, torch.device("cpu")).modalities
        methods = [*(f"unimodal-{m}" for m in modalities), *methods[1:]]
    methods = args.method or methods
    argv = without_flag(sys.argv[1:] if argv is None else argv, "--experiment")
    argv = [*argv, "--method", *methods]  # of a flag that is there twice the last one counts
    calls = [({}, argv)]
    if args.experiment == "table3":
        budgets = (args.epochs, args.heads * args.epochs)
        calls = [({"epochs": n}, [*argv, "--epochs", str(n)]) for n in budgets]
    if args.experiment == "table5":
        calls = [({"heads": k}, [*argv, "--heads", str(k)]) for k in (2, 3, 4, 5)]
        calls.insert(0, ({"heads": 1}, [*argv, "--method", "joint"]))
    configs = [SimpleNamespace(**{**vars(args), "method": method}) for method in methods]
    knobs = [*(knob for config in configs for knob in knobs_of(config)), "gs"]
    arguments = {knob: getattr(args, knob) for knob in dict.fromkeys(knobs)}
    if args.experiment == "table5":
        del arguments["heads"]
    folder = experiment_folder("mhm", args, arguments, defaults)
    arguments |= {"method": methods, "seeds": args.seeds}
    if args.experiment == "figure2":
        result = run_all(argv)
        return draw_experiment(result, figure2(result, args, methods), arguments, folder)
    return run_experiment(
        run_all,
        calls,
        arguments,
        folder,
        title=f"{args.experiment.replace('table', 'Table ')} on {args.dataset}",
        columns=columns,
        pairs=pairs_of(args.experiment, methods),
        paper=lambda row: paper_columns("mhm_tables", args.experiment, row, "on AVE"),
    )


def pairs_of(table, methods):
    """Which methods a table compares seed by seed: with joint training, in Table 6 with MHM."""
    if table == "table5":  # its runs differ in K
        return []
    reference = "mhm" if table == "table6" else "joint"
    freezing = [("mhm", "mhm-no-freeze")] if table == "table3" else []
    return [*((m, reference) for m in methods if m in METHODS and m != reference), *freezing]


def figure2(result, args, methods):
    """Fig. 2 by epoch, means over seeds, on validation in place of the paper's test data."""
    panels = {"error (%)": {}, "generalization gap (points)": {}, "GS": {}, "GS-harness": {}}
    for method in methods:
        outcomes = [result["outcomes"][method, seed] for seed in args.seeds]
        right, gap, harness = (
            mean_by_epoch([outcome.history for outcome in outcomes], path)
            for path in ("val.accuracy", "gap", f"gs_harness.{args.gs}")
        )
        traces = torch.stack([torch.from_numpy(x.predictions["val_trace"]) for x in outcomes])
        panels["error (%)"][method] = [100 - accuracy for accuracy in right]
        panels["generalization gap (points)"][method] = gap
        if len(outcomes) > 1:
            panels["GS"][method] = [GS[args.gs](log_p) for log_p in traces.unbind(dim=1)]
        if harness:
            panels["GS-harness"][method] = harness
    return {name: curves for name, curves in panels.items() if curves}


def main(argv=None):
    """Run the command line; returns the summary of the run, or {"runs": ..., "table": ...}."""
    args, defaults = parse_args(argv)
    if args.experiment:
        return experiment(args, defaults, argv)
    result = run_all(argv)
    del result["outcomes"]
    return result["runs"][0] if len(result["runs"]) == 1 else result


if __name__ == "__main__":
    run_command(main)
