"""A grid of runs -> table, JSON and figure; and the tables that README.md and docs/ show.

    python -m common.experiments README.md docs/*.md

renews every table that stands between `<!-- table FILE PART -->` and `<!-- end -->` from the JSON
in results/.
"""

import csv
import math
import re
import statistics
import sys
from pathlib import Path

from .figures import draw_bars
from .training import make_folder, read_json, write_figure, write_json

RESULTS = Path(__file__).parent.parent / "results"


def lookup(summary, path):
    """The number at a dotted `path` such as "test.gray.head", or None."""
    for key in path.split("."):
        summary = summary.get(key) if isinstance(summary, dict) else None
    return summary


def spread(values):
    """{"mean", "std", "n"} with the sample standard deviation (0 for one value), or None."""
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return {"mean": statistics.fmean(values), "std": std, "n": len(values)}


def tabulate(runs, columns):
    """One row for each method and fusion: its name and the `spread` over seeds of each column.

    columns: title -> dotted path into a summary.
    """
    groups = {}
    for run in runs:
        groups.setdefault((run["method"], run["fusion"]), []).append(run)
    rows = []
    for (method, fusion), group in groups.items():
        row = {"method": method, "fusion": fusion}
        for title, path in columns.items():
            values = [lookup(run, path) for run in group]
            row[title] = spread([value for value in values if value is not None])
        rows.append(row)
    return rows


def paired_differences(runs, method, reference, path="test.accuracy"):
    """`method` minus `reference` seed by seed, for each fusion: mean, standard error, n."""
    rows = []
    for fusion in dict.fromkeys(run["fusion"] for run in runs):
        by_seed = {
            name: {r["seed"]: lookup(r, path) for r in runs if (r["method"], r["fusion"]) == key}
            for name, key in {"a": (method, fusion), "b": (reference, fusion)}.items()
        }
        seeds = by_seed["a"].keys() & by_seed["b"].keys()
        difference = spread([by_seed["a"][seed] - by_seed["b"][seed] for seed in sorted(seeds)])
        if difference:
            error = difference["std"] / math.sqrt(difference["n"]) if difference["n"] > 1 else None
            rows.append(
                {
                    "method": method,
                    "reference": reference,
                    "fusion": fusion,
                    "mean": difference["mean"],
                    "standard_error": error,
                    "n": difference["n"],
                }
            )
    return rows


# ---- Text ----


def cell(value):
    """A table cell: `61.2 ± 0.8`, without the spread for a single run, or `-`."""
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return str(value)
    text = f"{value['mean']:.1f}"
    return text + f" ± {value['std']:.1f}" if value["n"] > 1 else text


def format_text(rows):
    """Rows (dicts with equal keys) as aligned text."""
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def format_markdown(rows):
    """Rows (dicts with equal keys) as a Markdown table."""
    lines = [list(rows[0]), ["---"] * len(rows[0])]
    lines += [[cell(value) for value in row.values()] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def describe_difference(row):
    """`pmr - joint (concat): +3.4 ± 0.8 points (paired, standard error, 5 seeds)`."""
    error = "" if row["standard_error"] is None else f" ± {row['standard_error']:.1f}"
    return (
        f"{row['method']} - {row['reference']} ({row['fusion']}): {row['mean']:+.1f}{error} points"
        f" (paired by seed, standard error, n = {row['n']})"
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


def run_experiment(main, argument_lists, arguments, folder, columns, pairs, title, paper=None):
    """Run `main` on every argument list and write table.json and figure.png in `folder`.

    arguments: what the table is of, written into table.json;
    columns: title -> dotted path; pairs: (method, reference) to compare seed by seed;
    paper: (method, fusion) -> the paper's number, shown beside ours.
    Returns {"runs": summaries, "table": rows}.
    """
    runs = []
    for argv in argument_lists:
        result = main(argv)
        runs += result.get("runs", [result])
    table = tabulate(runs, columns)
    if paper:
        for row in table:
            row["paper"] = paper.get((row["method"], row["fusion"]))
    differences = [row for pair in pairs for row in paired_differences(runs, *pair)]
    record = {"title": title, "arguments": arguments, "rows": table, "paired": differences}
    record["runs"] = runs
    make_folder(folder)
    write_json(folder / "table.json", record)
    write_figure(folder / "figure.png", draw_bars(title, table, next(iter(columns))))
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
