"""A grid of configurations -> runs -> rows.csv with a line a run, table.json and figure.png.

The runs are those of the scripts, in the folders that the scripts give them: what is finished is
not trained again, and an interrupted experiment goes on with --resume.
"""

import argparse
import csv
import importlib
import io
import math
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from common.command_line import Command
from common.curves import draw_curves
from common.errors import UserError
from common.naming import changed_knobs, join_name
from common.parser import given_flags, parse_flags, shared_knobs
from common.seeding import make_generator
from common.storage import make_folder, write_figure, write_json, write_text
from common.tables import format_text, lookup, made_up, spread, tabulate

from .figures import draw_bars

RESULTS = Path(__file__).parent.parent / "results"
NAMES = ("method", "fusion", "seed")  # of every run, in rows.csv


class Grid(NamedTuple):
    """The runs of an experiment, and what is shown of them.

    title:   of the table and the figure.
    parts:   settings of each call of a script; "script" names it where it is not the experiment's.
    columns: title -> path in a run's summary; "test", in percent, is among them.
    shown:   the titles that stand in the table and the figure, "|title|" for magnitudes; default:
             all in the table.
    digits:  title -> decimals, where not one.
    fields:  the settings that tell parts apart; they are columns, too.
    pooled:  whether a row of the table is over all values of the fields.
    pairs:   (method, reference), to be compared seed by seed.
    derive:  row of a run -> more of its columns, which are in no summary.
    extend:  (row of the table, its runs) -> more columns, such as the paper's numbers.
    curves:  runs -> panels of curves by epoch, for the record and the figure, see `draw_curves`.
    figure:  (title, table, runs) -> figure; default: bars of what is shown, or of `test`.
    """

    title: str
    parts: list
    columns: dict
    shown: list | None = None
    digits: dict = {}  # noqa: RUF012
    fields: tuple = ()
    pooled: bool = False
    pairs: list = []  # noqa: RUF012
    derive: Callable = lambda run: {}
    extend: Callable = lambda row, runs: {}
    curves: Callable | None = None
    figure: Callable | None = None


class Experiment:
    """The command line of an experiment: its name, the flags of its script, and flags of its own.

    argv:      words: the experiment's name, then flags.
    names:     the experiments there are, name -> function, whose docstring is shown by --help.
    add_flags: adds flags that only experiments have; they are in `options`.
    """

    def __init__(self, script, names, argv=None, add_flags=lambda add: None):
        self.script = script
        name = script.SCRIPT.name
        parser = argparse.ArgumentParser(
            prog=f"python -m experiments.{name}",
            description=f"All flags of {name}.py, too: python {name}.py --help.",
            epilog="\n".join(
                f"  {k:12}{(f.__doc__ or k).splitlines()[0]}" for k, f in names.items()
            ),
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
        )
        parser.add_argument("experiment", choices=list(names))
        add_flags(parser.add_argument)
        self.options, words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
        self.name = self.options.experiment
        del self.options.experiment
        self.own_defaults = {name: parser.get_default(name) for name in vars(self.options)}
        self.given = given_flags(script.SCRIPT, words)
        self.command = Command(script.SCRIPT, self.given)
        self.args, self.modalities = self.command.args, self.command.splits.modalities
        if self.args.eval_only:
            raise UserError("--eval-only writes nothing and an experiment a table; leave it out.")

    def methods(self, default):
        """The methods that were named, else those of the experiment."""
        return self.command.methods if self.args.method else self.command.expand(default)

    def refuse(self, *flags):
        """UserError for flags that the experiment sets itself."""
        for flag in flags:
            if flag in self.given:
                raise UserError(
                    f"{self.name} sets --{flag.replace('_', '-')} itself; leave it out."
                )

    def run(self, grid):
        """Run all parts, print and write the table. Returns its record with `runs` and `results`.

        runs: a flat row for each run, as in rows.csv; results: what `main` gave for each part.
        """
        results, runs = [], []
        for part in grid.parts:
            settings = self.given | part
            script = importlib.import_module(settings.pop("script", self.script.SCRIPT.name))
            results.append(script.main(self.settings_of(script, settings)))
            fields = {field: settings.get(field) for field in grid.fields}
            for run in results[-1].get("runs", [results[-1]]):
                row = {name: run[name] for name in NAMES} | fields
                row |= {title: lookup(run, path) for title, path in grid.columns.items()}
                runs.append(row | grid.derive(row))
        record = {"title": grid.title + made_up(self.args.data), "arguments": self.arguments(grid)}
        record |= summarize(grid, runs)
        if grid.curves:
            record["panels"] = grid.curves(runs)
        self.write(grid, record, runs)
        return record | {"runs": runs, "results": results}

    def settings_of(self, script, settings):
        """For another script only the flags that it has, with this one's training settings."""
        if script is self.script:
            return settings
        flags = vars(parse_flags(script.SCRIPT, ["--dataset", self.args.dataset]))
        shared = {knob: getattr(self.args, knob) for knob in shared_knobs(self.args.dataset)}
        del shared["method"]
        return {k: v for k, v in (shared | settings).items() if k in flags}

    def arguments(self, grid):
        """What the table is of: the flags that decide it, methods, fusions and seeds."""
        methods = list(dict.fromkeys(m for part in grid.parts for m in part["method"]))
        own = self.script.SCRIPT.methods
        kinds = ["unimodal" if m.startswith("unimodal-") else m for m in methods]
        knobs = [*shared_knobs(self.args.dataset), *(k for m in kinds for k in own.get(m, ()))]
        knobs = [knob for knob in dict.fromkeys(knobs) if knob not in grid.fields]
        found = {knob: getattr(self.args, knob) for knob in knobs}
        fusions = list(dict.fromkeys(part.get("fusion", self.args.fusion) for part in grid.parts))
        found["fusion"] = fusions[0] if len(fusions) == 1 else fusions
        return found | vars(self.options) | {"method": methods, "seeds": self.args.seeds}

    @property
    def folder(self):
        """<out>/<script>/<dataset>/<experiment>[-<fusion>][-method=<names>][-<knob>=<value>]."""
        args, script = self.args, self.script.SCRIPT
        named = [args.fusion] if "fusion" in self.given else []
        named += ["method=" + ",".join(args.method)] if "method" in self.given else []
        knobs = {knob: getattr(args, knob) for knob in shared_knobs(args.dataset)}
        knobs |= {k: getattr(args, k) for flags in script.methods.values() for k in flags}
        knobs |= vars(self.options)
        changed = changed_knobs(knobs, self.command.defaults | self.own_defaults)
        return Path(args.out) / script.name / args.dataset / join_name(self.name, *named, *changed)

    def write(self, grid, record, runs):
        """rows.csv, table.json and figure.png; and the table on the terminal."""
        make_folder(self.folder)
        write_rows(self.folder / "rows.csv", runs)
        write_json(self.folder / "table.json", record)
        if grid.curves:
            figure = draw_curves(grid.title, record["panels"])
        elif grid.figure:
            figure = grid.figure(grid.title, record["rows"], runs)
        else:
            figure = draw_bars(grid.title, record["rows"], grid.shown or ["test"], grid.fields)
        write_figure(self.folder / "figure.png", figure)
        print(f"\n{record['title']}\n\n{format_text(record['rows'])}\n")
        for row in record["paired"]:
            print(describe_difference(row))
        print(f"\nTable and figure: {self.folder}")


def summarize(grid, runs):
    """{"rows": a row for each method, fusion and value of the fields, "paired": differences}."""
    fields = () if grid.pooled else grid.fields
    titles = {title: title for title in grid.shown or grid.columns}
    rows = tabulate(runs, titles, grid.digits, by=("method", *fields, "fusion"))
    for row in rows:
        own = [run for run in runs if all(run[k] == row[k] for k in ("method", *fields, "fusion"))]
        row |= grid.extend(row, own)
    keys = (("fusion", *fields), ("seed", *(grid.fields if grid.pooled else ())))
    paired = [row for pair in grid.pairs for row in paired_differences(runs, *pair, *keys)]
    return {"rows": rows, "paired": paired}


def paired_differences(runs, method, reference, groups=("fusion",), pairs=("seed",)):
    """`method` minus `reference` in test accuracy: mean over pairs of runs, standard error, n.

    groups, pairs: names of columns. There is a row for every value of the `groups`; within one,
    two runs are a pair if they agree in `pairs`.
    """
    found = {}
    for run in runs:
        values = found.setdefault(tuple(run[name] for name in groups), {method: {}, reference: {}})
        if run["method"] in values:
            values[run["method"]][tuple(run[name] for name in pairs)] = run["test"]
    rows = []
    for key, values in found.items():
        both = sorted(values[method].keys() & values[reference].keys())
        difference = spread([values[method][pair] - values[reference][pair] for pair in both])
        if difference:
            row = {"method": method, "reference": reference, **dict(zip(groups, key, strict=True))}
            error = difference["std"] / math.sqrt(difference["n"]) if difference["n"] > 1 else None
            row |= {"mean": difference["mean"], "standard_error": error, "n": difference["n"]}
            rows.append(row)
    return rows


def describe_difference(row):
    """`pmr - joint (concat): +3.4 ± 0.8 points (paired, standard error, n = 5)`."""
    error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.1f}"
    numbers = ("method", "reference", "mean", "standard_error", "n")
    group = {name: value for name, value in row.items() if name not in numbers}
    words = [str(value) if name == "fusion" else f"{name} {value}" for name, value in group.items()]
    return (
        f"{row['method']} - {row['reference']} ({', '.join(words)}): {row['mean']:+.1f}{error} "
        f"points (paired, standard error, n = {row['n']})"
    )


# ---- One line a run ----


def write_rows(path, runs):
    """Dicts with equal keys as CSV; None is an empty cell."""
    file = io.StringIO()
    writer = csv.DictWriter(file, list(runs[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(runs)
    write_text(path, file.getvalue())


def read_rows(path):
    """The dicts of a CSV in results/: numbers are numbers again, an empty cell is None."""
    with open(path, newline="") as file:
        return [{k: read_cell(v) for k, v in row.items()} for row in csv.DictReader(file)]


def read_cell(text):
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            pass
    return text or None


# ---- Numbers of the papers, and of several runs ----


def paper_rows(name):
    """The rows of results/paper/<name>.csv, numbers as the paper prints them."""
    with open(RESULTS / "paper" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def paper_columns(name, table, row, note="(paper)"):
    """The numbers of results/paper/<name>.csv for a row of one of its tables, as columns.

    A line of the file belongs to a `table` and a `method`, and where it names `heads` to those.
    note: said in the columns' titles, e.g. that the numbers are of another dataset.
    """
    lines = [line for line in paper_rows(name) if line["table"] == table]
    key = (row["method"], str(row.get("heads", "")))
    found = next((line for line in lines if (line["method"], line["heads"]) == key), {})
    numbers = [column for column in lines[0] if any(line[column] for line in lines)]
    numbers = [column for column in numbers if column not in ("table", "method", "heads")]
    return {f"{column} {note}": found.get(column) or None for column in numbers}


def log_uniform(count, low, high):
    """`count` numbers from `low` to `high`, uniform in their logarithm; always the same ones."""
    draw = torch.rand(count, generator=make_generator("log-uniform"), dtype=torch.float64)
    return [float(f"{low * (high / low) ** x:.3g}") for x in draw.tolist()]


def correlate(runs, path, other):
    """Pearson's correlation over runs of two of their columns; None if one is fixed."""
    pairs = [(run[path], run[other]) for run in runs]
    columns = list(zip(*(pair for pair in pairs if None not in pair), strict=True))
    if not columns or min(len(set(column)) for column in columns) < 2:
        return None
    return round(statistics.correlation(*columns), 2)
