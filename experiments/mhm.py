"""The tables of Sec. 5 of the MHM paper, and Figure 2, on a dataset of yours.

    python -m experiments.mhm table3 --dataset digits --seeds 0 1 2 3 4

Also table4, table5, table6 and figure2. All flags of mhm.py. rows.csv, table.json and figure.png go
to runs/mhm/<dataset>/<experiment>[-<knob>=<value>]/. Beside the numbers stand the paper's on AVE,
another task.
"""

import sys
from copy import copy
from statistics import fmean
from types import SimpleNamespace

import torch

import mhm
from common.command_line import run_command
from common.run import Run
from common.tables import lookup, spread

from .grid import Experiment, Grid, paper_columns

DIGITS = dict.fromkeys(("GS", "GS-harness", "missing", "hitting"), 3)  # decimals


# ---- Tables ----


def table3(experiment):
    """Table 3, for equal epochs and for K times as many: in an epoch of MHM phi learns from a K-th
    of the data, and a head, on average, from less."""
    methods = experiment.methods(["joint", "ensemble", "mhm-no-freeze", "mhm"])
    epochs, heads = experiment.args.epochs, experiment.args.heads
    return make_table(
        experiment,
        parts=[{"method": methods, "epochs": n} for n in (epochs, heads * epochs)],
        shown=["test", "gap (iid)", "gap (test)", "GS", "GS-harness"],
        fields=("epochs",),
        pairs=[*against("joint", methods), ("mhm", "mhm-no-freeze")],
    )


def table4(experiment):
    """Table 4: what joint training and MHM miss and hit, compared with each modality alone."""
    methods = experiment.methods(["unimodal", "joint", "mhm"])
    return make_table(
        experiment,
        parts=[{"method": methods}],
        shown=["test", "missing", "hitting"],
        pairs=against("joint", methods),
        derive=lambda run: missing_and_hitting(experiment, run, methods),
    )


def table5(experiment):
    """Table 5: the number of heads. One head is joint training."""
    experiment.refuse("heads")
    methods = experiment.methods(["mhm"])
    return make_table(
        experiment,
        parts=[{"method": ["joint"]}, *({"method": methods, "heads": k} for k in (2, 3, 4, 5))],
        shown=["test", "GS"],
        fields=("heads",),
        derive=lambda run: {"heads": run["heads"] or 1},
    )


def table6(experiment):
    """Table 6: MHM without several heads or sets, with averaged heads, with several phis."""
    simpler = ["one-head-one-set", "one-head-k-sets", "k-heads-one-set"]
    methods = experiment.methods(["joint", *simpler, "mhm", "head-ensemble", "mmm"])
    return make_table(
        experiment,
        parts=[{"method": methods}],
        shown=["test", "GS"],
        pairs=against("mhm", methods),
    )


def against(reference, methods):
    """Pairs of methods to compare seed by seed."""
    fused = [m for m in methods if not m.startswith("unimodal-")]
    return [(m, reference) for m in fused if m != reference]


def make_table(experiment, shown, fields=(), **options):
    """The grid of a table with the columns `shown`: those of the script, and what is missing,
    hitting and GS; and the paper's numbers."""
    paths = mhm.COLUMNS | {"GS-harness": f"gs_harness.{experiment.options.gs}"}

    def extend(row, runs):
        gs = {"GS": sensitivity(experiment, runs, fields)} if "GS" in shown else {}
        return gs | paper_columns("mhm_tables", experiment.name, row, "on AVE")

    return Grid(
        title=f"{experiment.name.replace('table', 'Table ')} on {experiment.args.dataset}",
        columns={title: paths[title] for title in shown if title in paths},
        shown=shown,
        digits=DIGITS,
        fields=fields,
        extend=extend,
        **options,
    )


# ---- What takes several networks ----


def finished(experiment, method, seed, **flags):
    """The run of a method and a seed, to be read; `flags` are those of its part of the grid."""
    command = copy(experiment.command)
    command.args = SimpleNamespace(**vars(command.args) | flags)
    config = command.config(method, seed)
    config.resume, config.overwrite = True, False
    return Run(config)


def sensitivity(experiment, runs, fields):
    """GS, Sec. 5.2: the divergence between the networks of different seeds on the test items."""
    if len(runs) == 1:
        return None
    logits = []
    for run in runs:
        flags = {field: run[field] for field in fields}
        there = finished(experiment, run["method"], run["seed"], **flags)
        logits.append(torch.from_numpy(there.read_predictions("logits")))
    divergence = mhm.GS[experiment.options.gs]
    return spread([divergence(torch.stack(logits).log_softmax(dim=2))], DIGITS["GS"])


def missing_and_hitting(experiment, run, methods):
    """Missing and hitting ratio, Table 4, against the uni-modal networks of the same seed."""

    def correct(method):
        there = finished(experiment, method, run["seed"])
        logits, label = (there.read_predictions(name) for name in ("logits", "label"))
        return torch.from_numpy(logits.argmax(axis=1) == label)

    alone = [m for m in methods if m.startswith("unimodal-")]
    if run["method"] in alone or len(alone) < 2:
        return {"missing": None, "hitting": None}
    right, others = correct(run["method"]), torch.stack([correct(m) for m in alone])
    return {
        "missing": mhm.missing_ratio(right, others),
        "hitting": mhm.hitting_ratio(right, others),
    }


# ---- Figure 2 ----


def figure2(experiment):
    """Fig. 2 by epoch, means over seeds, on validation in place of the paper's test data."""
    plain = ["joint", "ensemble", "dropout", "shake-shake"]
    methods = experiment.methods([*plain, "mhm-no-freeze", "mhm"])
    return Grid(
        title=f"Figure 2 on {experiment.args.dataset}",
        parts=[{"method": methods}],
        columns={"test": "test.accuracy"},
        curves=lambda runs: curves(experiment, methods),
    )


def curves(experiment, methods):
    """Panel -> method -> value by epoch; a single seed has no GS, a single head no GS-harness."""
    kind, seeds = experiment.options.gs, experiment.args.seeds
    panels = {"error (%)": {}, "generalization gap (points)": {}, "GS": {}, "GS-harness": {}}
    for method in methods:
        runs = [finished(experiment, method, seed) for seed in seeds]
        epochs = list(zip(*(run.read_history("val.accuracy", "gap") for run in runs), strict=True))
        right, gap = mean_by_epoch(epochs, "val.accuracy"), mean_by_epoch(epochs, "gap")
        panels["error (%)"][method] = [100 - accuracy for accuracy in right]
        panels["generalization gap (points)"][method] = gap
        if len(runs) > 1:
            traces = [torch.from_numpy(run.read_predictions("val_trace")) for run in runs]
            by_epoch = torch.stack(traces).unbind(dim=1)
            panels["GS"][method] = [mhm.GS[kind](log_p) for log_p in by_epoch]
        if "gs_harness" in epochs[0][0]:
            panels["GS-harness"][method] = mean_by_epoch(epochs, f"gs_harness.{kind}")
    return {panel: lines for panel, lines in panels.items() if lines}


def mean_by_epoch(epochs, path):
    """Means over runs of the number at `path`; epochs: entries of their histories, by epoch."""
    return [fmean(lookup(entry, path) for entry in entries) for entries in epochs]


# ---- Command line ----

EXPERIMENTS = {
    "table3": table3,
    "table4": table4,
    "table5": table5,
    "table6": table6,
    "figure2": figure2,
}


def add_flags(add):
    add(
        "--gs",
        choices=list(mhm.GS),
        default="pairwise",
        help="divergence that GS is: between pairs of networks, or from their mean (%(default)s)",
    )


def main(argv=None):
    """Run the command line; returns the record of the table or figure."""
    experiment = Experiment(mhm, EXPERIMENTS, argv, add_flags)
    if len(experiment.args.seeds) == 1:
        print("GS compares seeds: with a single one of --seeds it stays empty.", file=sys.stderr)
    return experiment.run(EXPERIMENTS[experiment.name](experiment))


if __name__ == "__main__":
    run_command(main)
