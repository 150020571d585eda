"""Table 1 of the Greedy paper and the runs behind its figures, on a dataset of yours.

    python -m experiments.greedy_balance table1 --seeds 0 1 2 3 4
    python -m experiments.greedy_balance sweep --seeds 0 1 2 3        # Figures 2, 5, 7
    python -m experiments.greedy_balance l1 --seeds 0 1 2             # Figures 4, 8
    python -m experiments.greedy_balance sensitivity --seeds 0 1 2    # Figure 9

All flags of greedy_balance.py, and --rates N of the sweep. rows.csv, table.json and figure.png go
to runs/greedy_balance/<dataset>/<experiment>[-<knob>=<value>]/.
"""

from itertools import product

import greedy_balance
from common.command_line import run_command
from common.flags import number

from .figures import draw_bars, draw_distributions, draw_trends
from .grid import Experiment, Grid, correlate, log_uniform, paper_columns

# The paper's grids are lost, or only drawn: these are ours. RATES is the range to sample from.
RATES = (1e-3, 1e-1)
WEIGHTS = (0.0, *(10 ** (-7 + i / 2) for i in range(9)))  # of the L1 norm
TOLERANCES, WINDOWS = (0.01, 0.03, 0.1, 0.3, 1.0), (1, 2, 5, 10, 20)


def table1(experiment):
    """Table 1: each modality alone, joint training, RUBi, random and guided training."""
    methods = experiment.methods(["unimodal", "joint", "rubi", "random", "guided"])
    alone = [m for m in methods if m.startswith("unimodal-")]
    fused = [m for m in methods if m not in alone]
    found = make_grid(experiment, [{"method": part} for part in (alone, fused) if part])
    if experiment.args.dataset != "cg-mnist":  # the paper's
        return found
    return found._replace(extend=lambda row, runs: paper_columns("greedy_table1", "table1", row))


def draw_tests(title, rows, runs):
    return draw_bars(title, rows, ["test"])


def sweep(experiment):
    """Figures 2, 5 and 7: learning rates drawn at random. The table is over all rates and seeds:
    E[d_util] of Sec. 4.2 with its spread, and how d_speed and d_util go together."""
    experiment.refuse("lr")
    methods = experiment.methods(["joint", "random", "guided"])
    rates = log_uniform(experiment.options.rates, *RATES)
    parts = [{"lr": rate, "method": methods} for rate in rates]
    options = {"pooled": True, "extend": correlations, "figure": draw_rates}
    return make_grid(experiment, parts, fields=("lr",), **options)


def correlations(row, runs):
    return {
        "r(d_speed, d_util)": correlate(runs, "d_speed", "d_util"),
        "r(d_speed, d_util iid)": correlate(runs, "d_speed", "d_util (iid)"),
    }


def draw_rates(title, rows, runs):
    """Every run's d_util and d_speed, by method; a modality alone has none."""
    runs = [run for run in runs if run["d_speed"] is not None]
    panels = {name: {} for name in ("d_util", "d_util (iid)", "d_speed")}
    for name, by_method in panels.items():
        for run in runs:
            by_method.setdefault(run["method"], []).append(run[name])
    return draw_distributions(title, panels)


def l1(experiment):
    """Figures 4 and 8: the weight of the L1 norm."""
    experiment.refuse("l1")
    methods = experiment.methods(["joint"])
    parts = [{"l1": weight, "method": methods} for weight in WEIGHTS]
    return make_trends(experiment, parts, ["sparsity", "|d_util|", "|d_speed|", "test"], ("l1",))


def sensitivity(experiment):
    """Figure 9: tolerance and window of guided training in turn, the other one as it is."""
    args, methods = experiment.args, experiment.methods(["guided"])
    grid = [*product(TOLERANCES, [args.window]), *product([args.tolerance], WINDOWS)]
    parts = [{"tolerance": x, "window": q, "method": methods} for x, q in dict.fromkeys(grid)]
    return make_trends(experiment, parts, ["test", "d_util", "d_speed"], ("tolerance", "window"))


def make_trends(experiment, parts, shown, fields):
    """A grid whose figure has the columns `shown` against each of the fields."""
    grid, names = make_grid(experiment, parts, fields=fields), {x.strip("|") for x in shown}
    return grid._replace(
        columns={t: x for t, x in grid.columns.items() if t.removesuffix(" (last)") in names},
        shown=shown,
        figure=lambda title, rows, runs: draw_trends(title, rows, fields),
    )


def make_grid(experiment, parts, figure=draw_tests, **options):
    """A grid with the columns of the script, magnitudes of d_util and d_speed, and sparsity; in
    rows.csv also those of the last epoch."""
    columns = greedy_balance.columns(experiment.modalities)
    last = greedy_balance.columns(experiment.modalities, epoch="")
    last = {f"{title} (last)": path for title, path in last.items() if path != columns[title]}
    shown = [*columns, "|d_util|", "|d_speed|", "sparsity"]
    args = experiment.args
    twice = f", {args.duplicate} twice" if args.duplicate else ""
    return Grid(
        title=f"{experiment.name} on {args.dataset}{twice}",
        parts=parts,
        columns=columns | {"sparsity": "sparsity"} | last,
        shown=shown,
        digits={x: 3 for x in shown if x.startswith(("u(", "d_", "|d_", "sparsity"))},
        pairs=[("random", "joint"), ("guided", "joint"), ("guided", "random")],
        figure=figure,
        **options,
    )


EXPERIMENTS = {"table1": table1, "sweep": sweep, "l1": l1, "sensitivity": sensitivity}


def add_flags(add):
    rates = {"type": number(int, 1), "default": 20, "metavar": "N"}
    add("--rates", **rates, help="learning rates of the sweep (%(default)s)")


def main(argv=None):
    """Run the command line; returns the record of the table."""
    experiment = Experiment(greedy_balance, EXPERIMENTS, argv, add_flags)
    return experiment.run(EXPERIMENTS[experiment.name](experiment))


if __name__ == "__main__":
    run_command(main)
