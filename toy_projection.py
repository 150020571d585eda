"""Toy study of Multi-head Modularization (MHM; Lee et al., AAAI 2022), Sections 3 and 4.
https://doi.org/10.1609/aaai.v36i7.20698

A modality is a projection of the world: the points of two moons or of a swiss roll are seen only
through their coordinates on a few lines. How well does a network generalise when the lines change
(Table 1), and does it help to train one embedding against several heads in turn, MHM (Table 2)?

    python toy_projection.py                                # both datasets, 20 seeds, a minute
    python toy_projection.py --dataset moons --regime overtrained --seeds 0 1 2
    python -m experiments.toy_projection tables             # Tables 1 and 2 of the paper, figures

The seeds of a cell (dataset, set of lines, fusion, method) train at once, as a leading axis of
runs. The errors of every run are written to errors.json in
runs/toy_projection/<regime>[-<knob>=<value>]/. See docs/toy_projection.md.

Differs from the paper:
- Networks, optimizers and epochs are in a supplement that is not available: see REGIMES, ours.
- Noise, and the swiss roll's parameters and classes, are not given: see REGIMES, `draw_points`.
- An epoch of MHM is one round: H^k, then E^k, together one pass over the data. K = 4 is ours.
- There is no validation split and no rule for it: the head that was trained last is deployed.
- 500 fresh points a class are a second test: the paper's own test has 20 or 40 points.
- mhm-no-freeze, on the toy data, is ours: the paper has it in Sec. 5 only.
"""

import argparse
import sys
from itertools import product
from pathlib import Path
from types import SimpleNamespace

from common.command_line import run_command
from common.datasets import split_folds
from common.device import environment, pick_device
from common.errors import UserError
from common.flags import number
from common.naming import join_name
from common.optimizer import build_optimizer
from common.seeding import derive_seed, make_generator
from common.storage import make_folder, read_runs, write_json
from common.tables import format_text, tabulate

# isort: split
import numpy as np
from sklearn.datasets import make_moons
from tqdm import tqdm

# isort: split
# ---- Method ----

import math

import torch
import torch.nn as nn
import torch.nn.functional as F


def project(x, lines):
    """Coordinates on lines p + t v, Sec. 3: t_i = <x - p_i, v_i> / <v_i, v_i>.

    x: (..., D); lines: a pair (p, v) of D numbers each for every modality. Returns (..., M). The
    point p + t v is the foot of the perpendicular from x, whatever the length of v.
    """
    p, v = (torch.tensor(part, dtype=x.dtype, device=x.device) for part in zip(*lines, strict=True))
    return ((x.unsqueeze(-2) - p) * v).sum(dim=-1) / (v * v).sum(dim=-1)


class GroupedLinear(nn.Module):
    """R x G independent linear layers, (R, G, B, in) -> (R, G, B, out).

    R is the axis of the runs, G that of the modalities that are kept apart.
    """

    def __init__(self, runs, groups, width_in, width_out):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(runs, groups, width_in, width_out))
        self.bias = nn.Parameter(torch.zeros(runs, groups, 1, width_out))

    @torch.no_grad()
    def initialize(self, run, generator):
        """torch's default for Linear, Uniform(-1 / sqrt(in), 1 / sqrt(in)), for one run."""
        bound = 1 / math.sqrt(self.weight.shape[2])
        for parameter in (self.weight[run], self.bias[run]):
            draw = torch.rand(parameter.shape, generator=generator)
            parameter.copy_((2 * draw - 1) * bound)

    def forward(self, x):
        weight, bias = self.weight.flatten(0, 1), self.bias.flatten(0, 1)
        return torch.baddbmm(bias, x.flatten(0, 1), weight).unflatten(0, self.weight.shape[:2])


class ToyNetwork(nn.Module):
    """psi^k(phi(theta(t))) with ReLU between, for R runs at once and with K heads psi^k.

    early:        theta takes all coordinates as one input.
    intermediate: a theta_i for each modality; phi joins them.
    late:         theta_i, phi_i and psi_i for each modality; their logits are averaged.
    """

    def __init__(self, fusion, runs, modalities, classes, hidden, heads=1):
        super().__init__()
        self.fusion = fusion
        inputs = 1 if fusion == "early" else modalities  # groups of theta
        branches = modalities if fusion == "late" else 1  # groups of phi and psi
        self.theta = GroupedLinear(runs, inputs, modalities // inputs, hidden)
        self.phi = GroupedLinear(runs, branches, hidden * inputs // branches, hidden)
        self.psi = nn.ModuleList(
            GroupedLinear(runs, branches, hidden, classes) for _ in range(heads)
        )

    def forward(self, t, head=0):
        """(R, B, M) coordinates -> (R, B, C) logits of psi^head."""
        x = t.unsqueeze(1) if self.fusion == "early" else t.transpose(1, 2).unsqueeze(3)
        z = self.theta(x).relu()  # (R, G, B, h)
        if self.fusion == "intermediate":
            z = z.transpose(1, 2).flatten(2).unsqueeze(1)  # (R, 1, B, M h)
        psi = self.psi[head]
        return psi(self.phi(z).relu()).mean(dim=1)


def phases(method, network, head_set, embedding_set, k):
    """What an epoch trains, in order: pairs (samples (R, n), modules that learn from them).

    head_set, embedding_set: H^k and E^k, which together are all samples; k: the head's number.
    joint (the paper's ETE) and mhm-no-freeze, which has MHM's sets and heads, freeze nothing.
    """
    theta, phi, psi = network.theta, network.phi, network.psi[k]
    if method == "joint":
        everything = torch.cat([head_set, embedding_set], dim=1)
        return [(everything, [theta, phi, psi])]  # Eq. (1)
    if method == "mhm-no-freeze":
        return [(head_set, [theta, phi, psi]), (embedding_set, [theta, phi, psi])]
    return [
        (head_set, [theta, psi]),  # Eq. (2): phi is frozen
        (embedding_set, [theta, phi]),  # Eq. (3): psi^k is frozen
    ]


# ---- Data ----

SETS = {  # (p, v) of each modality; C, A and B as Tables 1 and 2 print them
    "moons": {
        "C": [((0, 0), (1, 0)), ((0, 0), (0, 1))],
        "A": [((1, 0), (-1, 1)), ((0, 0), (1, 0))],
        "B": [((1, 0), (-1, 1)), ((0, 0), (2, 1))],
    },
    "swiss-roll": {
        "C": [((0, 0, 0), (1, 0, 0)), ((0, 0, 0), (0, 1, 0)), ((0, 0, 0), (0, 0, 1))],
        "A": [((1, 0, 0), (0, -1, 0)), ((1, 0, 0), (1, 0, -1)), ((0, 1, 0), (0, 1, -1))],
        "B": [((0, 0, 0), (1, 1, 1)), ((0, 0, 0), (1, 2, 1)), ((0, 0, 0), (1, 4, 1))],
    },
}
CLASSES = {"moons": 2, "swiss-roll": 4}


def draw_points(dataset, per_class, noise, seed):
    """Points (N, D) in float64 and labels (N,), sorted by class.

    The swiss roll's classes are the quarters of its angle in [1.5 pi, 4.5 pi]; its height, uniform
    in [0, 21], is axis 2. The paper gives neither; with another axis for the height, its errors on
    set B would be below what any classifier can reach.
    """
    if dataset == "moons":
        points, labels = make_moons(2 * per_class, noise=noise or None, random_state=seed)
        order = labels.argsort(kind="stable")
        return torch.from_numpy(points[order]), torch.from_numpy(labels[order])
    random = np.random.default_rng(seed)
    labels = np.repeat(np.arange(4), per_class)
    angle = 1.5 * np.pi + 0.75 * np.pi * (labels + random.random(len(labels)))
    height = 21 * random.random(len(labels))
    points = np.stack([angle * np.cos(angle), angle * np.sin(angle), height], axis=1)
    points += noise * random.standard_normal(points.shape)
    return torch.from_numpy(points), torch.from_numpy(labels)


def draw_splits(dataset, noise, seeds):
    """90 training and 10 test points a class, and 500 fresh ones: name -> (x (R, N, D), y (R, N)).

    Every seed draws points and split anew.
    """
    parts = {"train": [], "test": [], "fresh": []}
    for seed in seeds:
        x, y = draw_points(dataset, 100, noise, derive_seed(seed, "points") % 2**32)
        ranks = [
            torch.randperm(100, generator=make_generator(seed, "split", c))
            for c in range(CLASSES[dataset])
        ]
        train = torch.cat(ranks) < 90
        parts["train"].append((x[train], y[train]))
        parts["test"].append((x[~train], y[~train]))
        fresh_seed = derive_seed(seed, "fresh") % 2**32
        parts["fresh"].append(draw_points(dataset, 500, noise, fresh_seed))
    return {
        name: tuple(torch.stack(tensors) for tensors in zip(*part, strict=True))
        for name, part in parts.items()
    }


def observe(splits, config):
    """What the networks see of `splits`: name -> coordinates (R, N, M) in float32, labels."""
    lines = SETS[config.dataset][config.set]
    return {
        name: (project(x, lines).float().to(config.device), y.to(config.device))
        for name, (x, y) in splits.items()
    }


# ---- Training ----


def build_network(config):
    """A network for all seeds; what a run draws depends on its own seed alone."""
    modalities = len(SETS[config.dataset][config.set])
    sizes = (modalities, CLASSES[config.dataset], config.hidden, config.heads)
    network = ToyNetwork(config.fusion, len(config.seeds), *sizes)
    for run, seed in enumerate(config.seeds):
        generator = make_generator(seed, "initialisation", config.fusion)
        for layer in (network.theta, network.phi, *network.psi):
            layer.initialize(run, generator)
    return network.to(config.device)


def draw_sets(samples, config):
    """(H^k, E^k) for every head, Sec. 4: all folds but the k-th, and fold k. Each is (R, n).

    The samples of each run are split once, in an order of its own.
    """
    folds = max(2, config.heads)  # joint training has one head and puts the two sets together
    runs = []
    for seed in config.seeds:
        order = torch.randperm(samples, generator=make_generator(seed, "folds"))
        runs.append(split_folds(order, folds))
    return [
        [torch.stack(part).to(config.device) for part in zip(*pairs, strict=True)]
        for pairs in zip(*runs, strict=True)
    ]


def split_batches(samples, epoch, config):
    """Batches (R, b) of the samples (R, n), in a random order of each run's own; or all at once."""
    count = samples.shape[1]
    size = config.batch_size or count
    if size < count:
        orders = [
            torch.randperm(count, generator=make_generator(seed, "order", epoch, count))
            for seed in config.seeds
        ]
        samples = samples.gather(1, torch.stack(orders).to(samples.device))
    return samples.split(size, dim=1)


def train(network, t, y, config):
    """Train all runs together; returns the number of the head that was trained last.

    t: (R, N, M), y: (R, N). An epoch is one pass over the data. Each module keeps an optimizer of
    its own, whose state rests while the module is frozen.
    """
    layers = [network.theta, network.phi, *network.psi]
    optimizers = {layer: build_optimizer(layer.parameters(), config) for layer in layers}
    sets = draw_sets(y.shape[1], config)
    runs = torch.arange(len(y), device=y.device).unsqueeze(1)
    for epoch in range(config.epochs):
        k = epoch % config.heads  # psi^k is replaced by psi^(k+1), and the last one by the first
        for samples, learning in phases(config.method, network, *sets[k], k):
            for layer in layers:
                layer.requires_grad_(layer in learning)
            for batch in split_batches(samples, epoch, config):
                logits = network(t[runs, batch], k).flatten(0, 1)
                loss = F.cross_entropy(logits, y[runs, batch].flatten(), reduction="sum")
                loss = loss / batch.shape[1]  # the sum over runs of their mean losses
                for layer in learning:
                    optimizers[layer].zero_grad()
                loss.backward()
                for layer in learning:
                    optimizers[layer].step()
    return k


@torch.no_grad()
def test(network, head, splits, config):
    """A row for each run: what it is, and its errors in percent."""
    errors = {}
    for name, (t, y) in splits.items():
        errors[name] = 100 * (network(t, head).argmax(dim=2) != y).double().mean(dim=1)  # (R,)
    errors["gap"] = errors["test"] - errors["train"]
    errors["fresh gap"] = errors["fresh"] - errors["train"]
    cell = {name: getattr(config, name) for name in CELL}
    return [
        {**cell, "seed": seed, **{name: errors[name][run].item() for name in ERRORS}}
        for run, seed in enumerate(config.seeds)
    ]


# ---- Command line ----

CELL = ("dataset", "set", "fusion", "method")
ERRORS = ("test", "train", "gap", "fresh", "fresh gap")
FUSIONS = ("early", "intermediate", "late")
METHODS = ("joint", "mhm", "mhm-no-freeze")

# All ours. `table1` trains for short, where the order of the sets shows; `overtrained` fits the
# training points. A batch_size of None is all samples.
COMMON = {"momentum": 0.0, "weight_decay": 0.0, "hidden": 16}
SGD, ADAM = {**COMMON, "optimizer": "sgd"}, {**COMMON, "optimizer": "adam"}
LONG = {**ADAM, "lr": 0.01, "batch_size": None, "epochs": 1000}
REGIMES = {
    "table1": {
        "moons": {**SGD, "lr": 0.1, "batch_size": 16, "epochs": 120, "noise": 0.2, "hidden": 8},
        "swiss-roll": {**ADAM, "lr": 0.003, "batch_size": 60, "epochs": 60, "noise": 0.0},
    },
    "overtrained": {
        "moons": {**LONG, "noise": 0.3, "hidden": 32},
        "swiss-roll": {**LONG, "noise": 0.5},
    },
}
KNOBS = ("regime", "dataset", "method", "heads", "epochs", "seeds")  # they decide the results


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--dataset", nargs="+", choices=list(SETS), default=list(SETS), help="default: both")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--regime", choices=list(REGIMES), default="table1", help="%(default)s")
    add("--heads", type=number(int, 2, 180), default=4, metavar="K", help="of MHM (%(default)s)")
    add("--epochs", type=number(int, 1), metavar="N", help="default: by regime and dataset")
    add("--seeds", type=number(int, 0), nargs="+", default=list(range(20)), help="default: 0 to 19")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="cpu", help="%(default)s")
    add("--out", default="runs", metavar="DIR", help="where results are written (%(default)s)")
    add("--overwrite", action="store_true", help="train again what is there already")
    args, rest = parser.parse_known_args(argv)
    if any(word.split("=")[0] == "--experiment" for word in rest):
        raise UserError("Tables have a command: python -m experiments.toy_projection --help.")
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.seeds = list(dict.fromkeys(args.seeds))  # a seed named twice is still one run
    args.device = pick_device(args.device)
    return args


def folder_of(args):
    """<out>/toy_projection/<regime>[-<knob>=<value> where not default]: overtrained-seeds=0-49."""
    default, changed = parse_args([]), []
    for knob in KNOBS[1:]:
        value = getattr(args, knob)
        if value != getattr(default, knob):
            if knob == "seeds" and value == list(range(value[0], value[-1] + 1)):
                value = f"{value[0]}-{value[-1]}"
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            changed.append(f"{knob}={text}")
    return Path(args.out) / "toy_projection" / join_name(args.regime, *changed)


def configs(args):
    """A configuration for each cell: the flags, and the numbers of its regime."""
    for dataset in args.dataset:
        for name, method, fusion in product(SETS[dataset], args.method, FUSIONS):
            if name == "C" and method != "joint":
                continue  # Table 2 has no set C
            cell = {"dataset": dataset, "set": name, "fusion": fusion, "method": method}
            config = SimpleNamespace(**vars(args) | REGIMES[args.regime][dataset] | cell)
            config.epochs = args.epochs or config.epochs
            config.heads = 1 if method == "joint" else args.heads
            yield config


def main(argv=None):
    """Run the command line; returns {"runs": a row for each, "table": a row for each cell,
    "networks": cell -> (network, deployed head), none if the runs were there already}."""
    args = parse_args(argv)
    file, arguments = folder_of(args) / "errors.json", {knob: getattr(args, knob) for knob in KNOBS}
    runs, networks = [], {}
    if file.exists() and not args.overwrite:  # finished: reported, not trained again
        runs = read_runs(file, arguments, (*CELL, "seed"), ERRORS)
    else:
        make_folder(file.parent)
        for config in tqdm(list(configs(args)), disable=not sys.stderr.isatty()):
            splits = observe(draw_splits(config.dataset, config.noise, config.seeds), config)
            network = build_network(config)
            head = train(network, *splits["train"], config)
            runs += test(network, head, splits, config)
            networks[tuple(getattr(config, name) for name in CELL)] = network, head
        write_json(file, {"arguments": arguments, **environment(args.device), "runs": runs})
    table = tabulate(runs, {name: name for name in ERRORS}, by=CELL)
    print(f"\n{args.regime}: errors in percent, mean ± std over {len(args.seeds)} seeds\n")
    print(f"{format_text(table)}\n\nErrors of every run: {file}")
    return {"runs": runs, "table": table, "networks": networks}


if __name__ == "__main__":
    run_command(main)
