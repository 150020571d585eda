"""Tables 1 and 2 of the MHM paper, the toy study, beside the paper's numbers.

    python -m experiments.toy_projection tables
    python -m experiments.toy_projection tables --regime overtrained --seeds 0 1 2

All flags of toy_projection.py. rows.csv (one line a run), table.json and figures (data with lines,
decision regions, errors as bars) go to runs/toy_projection/<regime>[-<knob>=<value>]/.
"""

import argparse
import math
import sys
import time

import torch

import toy_projection as toy
from common.command_line import run_command
from common.device import environment
from common.errors import UserError
from common.storage import read_json, refuse_another, write_figure, write_json
from common.tables import format_text, spread, tabulate

from .grid import paper_rows, write_rows
from .toy_figures import draw_error_bars, draw_lines, draw_regions


def summarize(runs):
    """Rows of runs, as in rows.csv -> rows of "table1", "table2" and "differences"."""
    runs = [
        {**run, "gap": run["test"] - run["train"], "fresh gap": run["fresh"] - run["train"]}
        for run in runs
    ]
    return {
        "table1": paper_table([run for run in runs if run["method"] == "joint"]),
        "table2": paper_table([run for run in runs if run["set"] != "C"]),
        "differences": compare_with_joint(runs),
    }


def paper_table(runs):
    """A row for each cell: our errors, those that the paper has too beside the paper's."""
    paper = paper_errors()
    rows = []
    for found in tabulate(runs, {name: name for name in toy.ERRORS}, by=toy.CELL):
        row = {name: found[name] for name in toy.CELL}
        for name in ("test", "train", "gap"):
            row[name] = found[name]
            row[f"paper's {name}"] = paper.get((*(row[part] for part in toy.CELL), name))
        rows.append({**row, "fresh": found["fresh"], "fresh gap": found["fresh gap"]})
    return rows


def paper_errors():
    """(dataset, set, fusion, method, error) -> what the paper prints, "a or b" where it contradicts
    itself: Table 1 and Table 2 differ, or a printed gap is not test minus train error."""
    printed = {}
    for row in paper_rows("toy_tables"):
        key = tuple(row[name] for name in toy.CELL)
        for name in ("test", "train", "gap"):
            if row[name]:
                printed.setdefault((*key, name), []).append(row[name])
        if row["train"]:
            difference = f"{float(row['test']) - float(row['train']):.1f}"
            printed[(*key, "gap")].append(difference)
    return {key: " or ".join(dict.fromkeys(values)) for key, values in printed.items()}


def compare_with_joint(runs):
    """What MHM and its variant change in Table 2, paired by seed, with the standard error."""
    found = {}
    for run in runs:
        found.setdefault(tuple(run[name] for name in toy.CELL), []).append(run)
    rows = []
    for (*place, method), own in found.items():
        joint = found.get((*place, "joint"))
        if joint and method != "joint":
            row = dict(zip(toy.CELL, (*place, method), strict=True))
            for name in ("test", "fresh", "fresh gap"):
                pairs = zip(own, joint, strict=True)  # in the order of the seeds
                change = spread([run[name] - other[name] for run, other in pairs])
                change["std"] /= math.sqrt(change["n"])
                row[f"{name} - joint's"] = change
            rows.append(row)
    return rows


# ---- Figures ----


def draw_figures(record, networks, args):
    """name -> figure: the data with its lines, decision regions of the first seed, errors."""
    figures = {"errors": draw_error_bars(record["table1"] + record["table2"])}
    for dataset in args.dataset:
        noise = toy.REGIMES[args.regime][dataset]["noise"]
        x, y = (part[0] for part in toy.draw_splits(dataset, noise, args.seeds[:1])["train"])
        lines = {f"{dataset}, set {name}": lines for name, lines in toy.SETS[dataset].items()}
        figures[f"{dataset}-data"] = draw_lines(x.numpy(), y.numpy(), lines)
        panels = []
        for (found, name, fusion, method), (network, head) in networks.items():
            if found == dataset and fusion == "intermediate":
                t = toy.project(x, toy.SETS[dataset][name]).float()
                panels.append((f"set {name}, {method}", t, y, regions(network, head, t)))
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


# ---- Command line ----

TITLES = {f"table{i}": f"Table {i}: errors in percent, mean ± std over seeds" for i in (1, 2)}
TITLES["differences"] = "Differences, paired by seed, mean ± standard error"


def arguments_of(args):
    return {knob: getattr(args, knob) for knob in toy.KNOBS}


def read_tables(path, args):
    """The record in table.json; UserError if it is of other arguments or another version."""
    record = read_json(path)
    try:
        refuse_another(path, record["arguments"], arguments_of(args))
        format_tables(record)
        [row[name] for part in TITLES for row in record[part] for name in toy.CELL]
        return record
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is of another version ({error}); start again by --overwrite."
        ) from error


def format_tables(record):
    """The parts that have rows, as text below their titles."""
    shown = {title: record[part] for part, title in TITLES.items()}
    return [f"\n{title}\n\n{format_text(rows)}" for title, rows in shown.items() if rows]


def run_tables(words, args, folder):
    """Train all cells; write rows.csv, figures and, last of all, table.json. Returns its record."""
    start = time.perf_counter()
    result = toy.main([*words, "--overwrite"])  # the figures need the networks
    record = {
        "arguments": arguments_of(args),
        **environment(args.device),
        "seconds": round(time.perf_counter() - start, 1),
        **summarize(result["runs"]),
    }
    gaps = ("gap", "fresh gap")  # the test or fresh error less that in training
    runs = [{k: v for k, v in run.items() if k not in gaps} for run in result["runs"]]
    write_rows(folder / "rows.csv", runs)
    for name, figure in draw_figures(record, result["networks"], args).items():
        write_figure(folder / f"{name}.png", figure)
    write_json(folder / "table.json", record)
    return record


def main(argv=None):
    """Run the command line; returns the record in table.json."""
    parser = argparse.ArgumentParser(
        prog="python -m experiments.toy_projection",
        description="Tables 1 and 2. All flags of toy_projection.py, too: "
        "python toy_projection.py --help.",
        allow_abbrev=False,
    )
    parser.add_argument("experiment", choices=["tables"])
    _, words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    args = toy.parse_args(words)
    folder = toy.folder_of(args)
    if (folder / "table.json").exists() and not args.overwrite:
        record = read_tables(folder / "table.json", args)
    else:
        record = run_tables(words, args, folder)
    print("\n".join(format_tables(record)))
    print(f"\nTables and figures: {folder}")
    return record


if __name__ == "__main__":
    run_command(main)
