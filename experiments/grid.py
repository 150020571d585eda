"""A grid of runs -> table, JSON and figure; and the tables that README.md and docs/ show.

    python -m common.experiments README.md data/README.md docs/*.md

renews every table that stands between `<!-- table FILE PART -->` and `<!-- end -->` from the JSON
in results/.
"""

import csv
import math
import re
import statistics
import sys
from pathlib import Path

import torch

from .figures import draw_bars, draw_curves, draw_distributions, draw_trends
from .seeding import make_generator
from .training import changed_knobs, make_folder, read_json, write_figure, write_json

RESULTS = Path(__file__).parent.parent / "results"


def paired_differences(runs, method, reference, groups=("fusion",), pairs=("seed",)):
    """`method` minus `reference` in test accuracy: mean over pairs of runs, standard error, n.

    groups, pairs: names of entries of a summary. There is a row for every value of the `groups`;
    within one, two runs are a pair if they agree in `pairs`.
    """
    found = {}
    for run in runs:
        values = found.setdefault(tuple(run[name] for name in groups), {method: {}, reference: {}})
        if run["method"] in values:
            pair = tuple(run[name] for name in pairs)
            values[run["method"]][pair] = lookup(run, "test.accuracy")
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


# ---- Text ----


def format_markdown(rows):
    """Rows (dicts with equal keys) as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    escaped = [[text.replace("|", r"\|") for text in line] for line in lines]
    return "\n".join("| " + " | ".join(line) + " |" for line in escaped)


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


# ---- An experiment of a paper ----


def without_flag(argv, flag):
    """`argv` without `flag` and its value, to call the same script for one part of a grid."""
    kept, skip = [], False
    for word in argv:
        if not skip and word != flag and not word.startswith(flag + "="):
            kept.append(word)
        skip = word == flag
    return kept


def paper_rows(name):
    """The rows of results/paper/<name>.csv, numbers as the paper prints them."""
    with open(RESULTS / "paper" / f"{name}.csv", newline="") as file:
        return list(csv.DictReader(file))


def paper_numbers(name):
    """The same by (method, fusion)."""
    return {(row["method"], row["fusion"] or None): row for row in paper_rows(name)}


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


def mean_by_epoch(histories, path):
    """Mean over runs of the number at `path` in their histories for each epoch; [] if not there."""
    epochs = zip(*histories, strict=True)
    values = [[lookup(entry, path) for entry in entries] for entries in epochs]
    return [] if None in values[0] else [statistics.fmean(value) for value in values]


def draw_experiment(result, panels, arguments, folder):
    """Write curves by epoch, panel -> method -> values: table.json and figure.png in `folder`."""
    title = f"{folder.name} on {arguments['dataset']}"
    record = {"title": title, "arguments": arguments, "panels": panels, "runs": result["runs"]}
    make_folder(folder)
    write_json(folder / "table.json", record)
    write_figure(folder / "figure.png", draw_curves(title, panels))
    print(f"\nCurves and their values: {folder}")
    return {"runs": result["runs"], "panels": panels}


def log_uniform(count, low, high):
    """`count` numbers from `low` to `high`, uniform in their logarithm; always the same ones."""
    draw = torch.rand(count, generator=make_generator("log-uniform"), dtype=torch.float64)
    return [float(f"{low * (high / low) ** x:.3g}") for x in draw.tolist()]


def as_flags(knobs):
    """{"pair_only": 0.1} -> ["--pair-only", "0.1"]."""
    pairs = [("--" + knob.replace("_", "-"), str(value)) for knob, value in knobs.items()]
    return [word for pair in pairs for word in pair]


def correlate(runs, path, other):
    """Pearson's correlation over runs of two numbers in their summaries; None if one is fixed."""
    pairs = [(lookup(run, path), lookup(run, other)) for run in runs]
    columns = list(zip(*(pair for pair in pairs if None not in pair), strict=True))
    if not columns or min(len(set(column)) for column in columns) < 2:
        return None
    return round(statistics.correlation(*columns), 2)


def distributions(paths):
    """For `run_experiment`: a figure of the numbers at `paths` of every run, by method."""

    def figure(title, rows, runs):
        methods = dict.fromkeys(run["method"] for run in runs)
        panels = {path: {} for path in paths}
        for path, values in panels.items():
            for m in methods:
                found = [lookup(run, path) for run in runs if run["method"] == m]
                if None not in found:
                    values[m] = found
        return draw_distributions(title, panels)

    return figure


def trends(knobs):
    """For `run_experiment`: a figure of the table's columns against each of its `knobs`."""
    return lambda title, rows, runs: draw_trends(title, rows, knobs)


def experiment_folder(script, args, arguments, defaults, fusion="concat"):
    """<out>/<script>/<dataset>/<experiment>[-<fusion>][-<knob>=<value>], both where not default."""
    named = [arguments["fusion"]] if arguments["fusion"] != fusion else []
    name = "-".join([args.experiment, *named, *changed_knobs(arguments, defaults)])
    return Path(args.out) / script / args.dataset / name


def run_experiment(
    run_all,
    calls,
    arguments,
    folder,
    title,
    columns=None,
    pairs=(),
    paper=None,
    pool=None,
    figure=None,
):
    """Run every part of a grid and write table.json and figure.png in `folder`.

    run_all:   argument list -> {"runs": summaries, "table": rows}.
    calls:     pairs (fields, argument list); fields such as {"epochs": 80} are put in its rows.
    arguments: what the table is of, written into table.json.
    columns:   the columns of its rows that are shown; default: all.
    pairs:     (method, reference) to compare seed by seed, for each of the fields' values; if the
               rows are pooled, over all of them.
    paper:     row -> columns with the paper's numbers, to stand at its end.
    pool:      summaries -> rows, in place of the rows of the parts.
    figure:    title, rows, summaries -> figure; default: bars of `columns`, or of `test`.
    Returns {"runs": summaries, "table": rows}.
    """
    runs, table = [], []
    for fields, argv in calls:
        result = run_all(argv)
        runs += [{**run, **fields} for run in result["runs"]]
        for row in result["table"]:
            shown = {key: row[key] for key in columns or row}
            row = {"method": row["method"], **fields, "fusion": row["fusion"], **shown}
            table.append({**row, **(paper(row) if paper else {})})
    table = pool(runs) if pool else table
    fields = tuple(calls[0][0])
    keys = (("fusion",), ("seed", *fields)) if pool else (("fusion", *fields), ("seed",))
    differences = [row for pair in pairs for row in paired_differences(runs, *pair, *keys)]
    record = {"title": title, "arguments": arguments, "rows": table, "paired": differences}
    record["runs"] = runs
    if figure:
        drawn = figure(title, table, runs)
    else:
        drawn = draw_bars(title, table, columns or ["test"], fields)
    make_folder(folder)
    write_json(folder / "table.json", record)
    write_figure(folder / "figure.png", drawn)
    print(f"\n{title}\n\n{format_text(table)}\n")
    for row in differences:
        print(describe_difference(row))
    print(f"\nTable and figure: {folder}")
    return {"runs": runs, "table": table}


# ---- Tables in the documents ----

MARKERS = re.compile(r"(<!-- table (\S+) (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)


def table_part(record, part):
    """Markdown of one part of an experiment's JSON: `paired` as a list, other rows as a table."""
    if part == "paired":
        return "\n".join(f"- {describe_difference(row)}" for row in record["paired"])
    return format_markdown(record[part])


def renew_tables(text):
    """`text` with every table between markers made anew from its JSON in results/."""

    def renew(match):
        table = table_part(read_json(RESULTS / match[2]), match[3])
        return f"{match[1]}{table}\n{match[4]}"

    return MARKERS.sub(renew, text)


if __name__ == "__main__":
    for name in sys.argv[1:]:
        Path(name).write_text(renew_tables(Path(name).read_text()))
