"""Toy study of Multi-head Modularization (Lee et al., AAAI 2022), Sections 3 and 4.
https://doi.org/10.1609/aaai.v36i7.20698

A modality is a projection of the world: the points of two moons or of a swiss roll are seen only
through their coordinates on a few lines. Table 1 asks how networks generalise when the lines
change, Table 2 whether training one embedding against several heads in turn (MHM) helps them.

    python toy_projection.py                              # Tables 1 and 2, 20 seeds, figures
    python toy_projection.py --regime overtrained
    python toy_projection.py --dataset moons --seeds 0 1 2 --device cuda

All seeds of a configuration train at once, as a leading batch axis. The tables, their JSON and the
figures are written to runs/toy_projection/<regime>/. See docs/toy_projection.md.
"""

import argparse
import math
import sys
import time
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from sklearn.datasets import make_moons
from tqdm import tqdm

from common.command_line import number, run_command
from common.experiments import format_text, paper_rows, spread
from common.figures import draw_error_bars, draw_lines, draw_regions
from common.seeding import derive_seed, make_generator
from common.training import (
    build_optimizer,
    environment,
    make_folder,
    pick_device,
    read_json,
    write_figure,
    write_json,
)

# ---- Method ----


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
    """psi(phi(theta(x))) with ReLU between, for R runs at once and with K heads psi^k.

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
        return self.psi[head](self.phi(z).relu()).mean(dim=1)


def split_folds(order, heads):
    """K folds of one run, Sec. 4: H^k is all but fold k, E^k is fold k.

    order: (N,) the training samples in random order. Returns K pairs (H^k, E^k).
    """
    folds = order.tensor_split(heads)
    return [(torch.cat(folds[:k] + folds[k + 1 :]), folds[k]) for k in range(heads)]


def phases(method, network, sets, epoch):
    """What an epoch trains: a list of (head, samples (R, n), trained modules).

    joint (the paper's ETE): everything on all samples. MHM: the head of this round on its
    head-specific set with phi frozen, Eq. (2), then phi on the rest with the head frozen, Eq. (3);
    theta learns in both. mhm-no-freeze: the same two sets, nothing frozen.
    sets: the (H^k, E^k) for every k, each (R, n).
    """
    head = epoch % len(network.psi)
    theta, phi, psi = network.theta, network.phi, network.psi[head]
    head_set, embedding_set = sets[head]
    if method == "joint":
        everything = torch.cat([head_set, embedding_set], dim=1)
        return [(head, everything, [theta, phi, psi])]
    if method == "mhm-no-freeze":
        both = [theta, phi, psi]
        return [(head, head_set, both), (head, embedding_set, both)]
    return [(head, head_set, [theta, psi]), (head, embedding_set, [theta, phi])]


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


def draw_splits(dataset, noise, seeds, device):
    """90 training and 10 test points a class, and 500 fresh ones: name -> (x (R, N, D), y (R, N)).

    Every seed draws points and split anew.
    """
    parts = {"train": [], "test": [], "fresh": []}
    classes = CLASSES[dataset]
    for seed in seeds:
        x, y = draw_points(dataset, 100, noise, derive_seed(seed, "points") % 2**32)
        ranks = [
            torch.randperm(100, generator=make_generator(seed, "split", k)) for k in range(classes)
        ]
        train = torch.cat(ranks) < 90
        parts["train"].append((x[train], y[train]))
        parts["test"].append((x[~train], y[~train]))
        fresh = draw_points(dataset, 500, noise, derive_seed(seed, "fresh") % 2**32)
        parts["fresh"].append(fresh)
    return {
        name: tuple(torch.stack(tensors).to(device) for tensors in zip(*part, strict=True))
        for name, part in parts.items()
    }


# ---- Training ----


def build_network(fusion, lines, dataset, hidden, heads, seeds, device, dtype):
    """A network for all seeds; what a run draws depends on its own seed alone."""
    network = ToyNetwork(fusion, len(seeds), len(lines), CLASSES[dataset], hidden, heads)
    network.to(dtype)
    for run, seed in enumerate(seeds):
        generator = make_generator(seed, "initialisation", fusion)
        for layer in (network.theta, network.phi, *network.psi):
            layer.initialize(run, generator)
    return network.to(device)


def train(network, method, t, y, regime, seeds):
    """Train all runs together. t: (R, N, M), y: (R, N). An epoch is one pass over the data.

    Each module keeps an optimizer of its own, whose state rests while the module is frozen.
    """
    runs, samples = y.shape
    layers = [network.theta, network.phi, *network.psi]
    optimizers = {
        layer: build_optimizer(
            regime["optimizer"], layer.parameters(), regime["lr"], 0.0, momentum=0.0
        )
        for layer in layers
    }
    folds = [
        split_folds(
            torch.randperm(samples, generator=make_generator(seed, "folds")),
            max(2, len(network.psi)),
        )
        for seed in seeds
    ]
    sets = [
        [torch.stack(part).to(t.device) for part in zip(*pairs, strict=True)]
        for pairs in zip(*folds, strict=True)
    ]
    rows = torch.arange(runs, device=t.device).unsqueeze(1)
    for epoch in range(regime["epochs"]):
        for head, members, trained in phases(method, network, sets, epoch):
            for layer in layers:
                layer.requires_grad_(layer in trained)
            size = regime["batch_size"] or members.shape[1]
            if size < members.shape[1]:
                members = members.gather(1, shuffle(seeds, epoch, members))
            for batch in members.split(size, dim=1):
                logits = network(t[rows, batch], head)
                loss = F.cross_entropy(
                    logits.flatten(0, 1), y[rows, batch].flatten(), reduction="sum"
                )
                for layer in trained:
                    optimizers[layer].zero_grad()
                (loss / batch.shape[1]).backward()  # the sum over runs of their mean losses
                for layer in trained:
                    optimizers[layer].step()


def shuffle(seeds, epoch, members):
    """(R, n) permutations, each from its run's seed."""
    size = members.shape[1]
    orders = [
        torch.randperm(size, generator=make_generator(seed, "order", epoch, size)) for seed in seeds
    ]
    return torch.stack(orders).to(members.device)


@torch.no_grad()
def error(network, t, y, head):
    """Error in percent of each run: (R,)."""
    return 100 * (network(t, head).argmax(dim=2) != y).double().mean(dim=1)


def train_configuration(dataset, name, fusion, method, regime, args, device):
    """All seeds of one table cell: errors in percent by seed, and the network for the figures."""
    lines = SETS[dataset][name]
    splits = {
        part: (project(x, lines).float(), y)
        for part, (x, y) in draw_splits(dataset, regime["noise"], args.seeds, device).items()
    }
    heads = 1 if method == "joint" else args.heads
    network = build_network(
        fusion, lines, dataset, regime["hidden"], heads, args.seeds, device, torch.float32
    )
    train(network, method, *splits["train"], regime, args.seeds)
    last = (regime["epochs"] - 1) % heads  # no validation here: the head trained last is deployed
    errors = {part: error(network, *split, last) for part, split in splits.items()}
    errors["gap"] = errors["test"] - errors["train"]
    errors["fresh gap"] = errors["fresh"] - errors["train"]
    cell = {"dataset": dataset, "set": name, "fusion": fusion, "method": method}
    return {**cell, **{part: values.tolist() for part, values in errors.items()}}, (network, last)


# ---- Command line ----

# The paper's networks, optimizer and epochs are in a supplement that is not available. `table1`
# trains for short, where the order of the sets shows; `overtrained` fits the training points.
REGIMES = {
    "table1": {
        "moons": {
            "noise": 0.2,
            "hidden": 8,
            "optimizer": "sgd",
            "lr": 0.1,
            "batch_size": 16,
            "epochs": 120,
        },
        "swiss-roll": {
            "noise": 0.0,
            "hidden": 16,
            "optimizer": "adam",
            "lr": 0.003,
            "batch_size": 60,
            "epochs": 60,
        },
    },
    "overtrained": {
        "moons": {
            "noise": 0.3,
            "hidden": 32,
            "optimizer": "adam",
            "lr": 0.01,
            "batch_size": None,  # all samples
            "epochs": 1000,
        },
        "swiss-roll": {
            "noise": 0.5,
            "hidden": 16,
            "optimizer": "adam",
            "lr": 0.01,
            "batch_size": None,
            "epochs": 1000,
        },
    },
}
FUSIONS = ("early", "intermediate", "late")
METHODS = ("joint", "mhm", "mhm-no-freeze")


def parse_args(argv=None):
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--dataset", nargs="+", choices=list(SETS), default=list(SETS), help="default: both")
    add("--method", nargs="+", choices=METHODS, default=list(METHODS), help="default: all")
    add("--regime", choices=list(REGIMES), default="table1", help="%(default)s")
    add("--heads", type=number(int, 2), default=4, metavar="K", help="heads of MHM (%(default)s)")
    add("--epochs", type=number(int, 1), metavar="N", help="default: by regime and dataset")
    add("--seeds", type=number(int, 0), nargs="+", default=list(range(20)), help="default: 0 to 19")
    add("--device", choices=["auto", "cpu", "cuda", "mps"], default="cpu", help="%(default)s")
    add("--out", default="runs", metavar="DIR", help="where results are written (%(default)s)")
    add("--overwrite", action="store_true", help="train again what is there already")
    args = parser.parse_args(argv)
    args.seeds = list(dict.fromkeys(args.seeds))
    return args


def tabulate(cells, table):
    """Rows of Table 1 (joint, sets C, A, B) or 2 (sets A, B), the paper's numbers beside ours."""
    paper = paper_errors()
    rows = []
    for cell in cells:
        if (table == 1 and cell["method"] != "joint") or (table == 2 and cell["set"] == "C"):
            continue
        key = tuple(cell[name] for name in ("dataset", "set", "fusion", "method"))
        row = {name: cell[name] for name in ("dataset", "set", "fusion", "method")}
        for part in ("test", "train", "gap"):
            row[part] = spread(cell[part])
            row[f"paper's {part}"] = paper.get((*key, part))
        rows.append({**row, "fresh": spread(cell["fresh"]), "fresh gap": spread(cell["fresh gap"])})
    return rows


def compare_with_joint(cells):
    """What MHM and its variant change in Table 2, seed by seed, with the standard error."""
    key_of = itemgetter("dataset", "set", "fusion", "method")
    errors = {key_of(cell): cell for cell in cells}
    rows = []
    for key, cell in errors.items():
        joint = errors.get((*key[:3], "joint"))
        if joint and cell is not joint:
            row = dict(zip(("dataset", "set", "fusion", "method"), key, strict=True))
            for part in ("test", "fresh", "fresh gap"):
                change = spread([a - b for a, b in zip(cell[part], joint[part], strict=True)])
                change["std"] /= math.sqrt(change["n"])
                row[f"{part} - joint's"] = change
            rows.append(row)
    return rows


def paper_errors():
    """(dataset, set, fusion, method, part) -> what the paper prints, "a or b" where it contradicts
    itself: Table 1 and Table 2 differ, or a printed gap is not test minus train error."""
    printed = {}
    for row in paper_rows("toy_tables"):
        key = (row["dataset"], row["set"], row["fusion"], row["method"])
        for part in ("test", "train", "gap"):
            if row[part]:
                printed.setdefault((*key, part), []).append(row[part])
        if row["train"]:
            difference = f"{float(row['test']) - float(row['train']):.1f}"
            printed[(*key, "gap")].append(difference)
    return {key: " or ".join(dict.fromkeys(values)) for key, values in printed.items()}


def draw_figures(cells, networks, args):
    """name -> figure: the data with its lines, decision regions of seed 0, errors as bars."""
    figures = {"errors": draw_error_bars(tabulate(cells, 1) + tabulate(cells, 2))}
    for dataset in args.dataset:
        noise = REGIMES[args.regime][dataset]["noise"]
        x, y = draw_splits(dataset, noise, args.seeds[:1], torch.device("cpu"))["train"]
        lines = {f"{dataset}, set {name}": lines for name, lines in SETS[dataset].items()}
        figures[f"{dataset}-data"] = draw_lines(x[0].numpy(), y[0].numpy(), lines)
        panels = []
        for (found, name, fusion, method), (network, head) in networks.items():
            if found == dataset and fusion == "intermediate":
                t = project(x, SETS[dataset][name]).float()[0]
                panels.append((f"set {name}, {method}", t, y[0], regions(network, head, t)))
        figures[f"{dataset}-regions"] = draw_regions(panels)
    return figures


@torch.no_grad()
def regions(network, head, t, size=200):
    """Class that the first run's network gives on a grid over the first two coordinates of `t`.

    The third coordinate is kept at its mean. Returns the grid's axes and classes (size, size).
    """
    low, high = t.min(dim=0).values, t.max(dim=0).values
    margin = 0.1 * (high - low)
    axes = [torch.linspace(low[i] - margin[i], high[i] + margin[i], size) for i in (0, 1)]
    first, second = torch.meshgrid(*axes, indexing="xy")
    points = t.mean(dim=0).expand(size * size, -1).clone()
    points[:, 0], points[:, 1] = first.flatten(), second.flatten()
    runs = network.theta.weight.shape[0]
    points = points.to(network.theta.weight.device).expand(runs, -1, -1)
    classes = network(points, head)[0].argmax(dim=1).view(size, size)
    return axes[0].numpy(), axes[1].numpy(), classes.cpu().numpy()


def run_name(args):
    """<regime>[-<knob>=<value> where not default], e.g. overtrained-seeds=0-49."""
    default = parse_args([])
    parts = [args.regime]
    for knob in ("dataset", "method", "heads", "epochs", "seeds"):
        value = getattr(args, knob)
        if value != getattr(default, knob):
            if knob == "seeds" and value == list(range(value[0], value[-1] + 1)):
                value = f"{value[0]}-{value[-1]}"
            text = ",".join(map(str, value)) if isinstance(value, list) else value
            parts.append(f"{knob}={text}")
    return "-".join(parts)


def main(argv=None):
    """Run the command line; returns "runs" (errors by seed), "table1" and "table2" (rows)."""
    args = parse_args(argv)
    device = pick_device(args.device)
    folder = Path(args.out) / "toy_projection" / run_name(args)
    if (folder / "table.json").exists() and not args.overwrite:
        record = read_json(folder / "table.json")
    else:
        make_folder(folder)
        record = train_all(args, device, folder)
    for table in (1, 2):
        rows = record[f"table{table}"]
        if rows:
            print(f"\nTable {table}: errors in percent, mean ± std over {len(args.seeds)} seeds\n")
            print(format_text(rows))
    if record["differences"]:
        print("\nDifferences, paired by seed, mean ± standard error\n")
        print(format_text(record["differences"]))
    print(f"\nTables and figures: {folder}")
    return record


def train_all(args, device, folder):
    """Train every cell of the two tables; write figures and, last of all, table.json."""
    start = time.perf_counter()
    grid = [
        (dataset, name, fusion, method)
        for dataset in args.dataset
        for name in SETS[dataset]
        for method in args.method
        for fusion in FUSIONS
        if name != "C" or method == "joint"  # Table 2 has no set C
    ]
    cells, networks = [], {}
    for key in tqdm(grid, disable=not sys.stderr.isatty()):
        regime = dict(REGIMES[args.regime][key[0]])
        regime["epochs"] = args.epochs or regime["epochs"]
        cell, networks[key] = train_configuration(*key, regime, args, device)
        cells.append(cell)
    for name, figure in draw_figures(cells, networks, args).items():
        write_figure(folder / f"{name}.png", figure)
    record = {
        "arguments": {**vars(args), "out": None},
        **environment(device),
        "seconds": round(time.perf_counter() - start, 1),
        "table1": tabulate(cells, 1),
        "table2": tabulate(cells, 2),
        "differences": compare_with_joint(cells),
        "runs": cells,
    }
    write_json(folder / "table.json", record)
    return record


if __name__ == "__main__":
    run_command(main)
