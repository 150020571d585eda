"""Numbers of several runs put together: means with their spread, and tables as text."""

import statistics


def lookup(summary, path):
    """The number at a dotted `path` such as "test.gray.head", or None; "|path|": its magnitude."""
    if path.startswith("|"):
        value = lookup(summary, path.strip("|"))
        return None if value is None else abs(value)
    for key in path.split("."):
        summary = summary.get(key) if isinstance(summary, dict) else None
    return summary


def spread(values, digits=None):
    """{"mean", "std", "n"} with the sample standard deviation (0 for one value), or None.

    digits: decimals to print, where they are not one; they go into the result.
    """
    if not values:
        return None
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    result = {"mean": statistics.fmean(values), "std": std, "n": len(values)}
    return result if digits is None else {**result, "digits": digits}


def tabulate(runs, columns, digits=None, by=("method", "fusion")):
    """One row for each value of `by`: those, and the `spread` over runs of each column.

    columns: title -> dotted path into a summary; digits: title -> decimals, where not one.
    """
    groups = {}
    for run in runs:
        groups.setdefault(tuple(run[name] for name in by), []).append(run)
    rows = []
    for key, group in groups.items():
        row = dict(zip(by, key, strict=True))
        for title, path in columns.items():
            values = [lookup(run, path) for run in group]
            row[title] = spread([x for x in values if x is not None], (digits or {}).get(title))
        rows.append(row)
    return rows


def describe(runs, methods):
    """What the test accuracies of `runs` say, as sentences: joint training beside the best modality
    alone, and beside it the first other one of `methods` that is there. Means over seeds."""
    rows = tabulate(runs, {"test": "test.accuracy"}, by=("method",))
    means = {row["method"]: row["test"]["mean"] for row in rows if row["test"]}

    def compare(method, other):
        points = round(means[method] - means[other], 1)
        return f"{abs(points)} points {'worse' if points < 0 else 'better'} than"

    alone = [method for method in means if method.startswith("unimodal-")]
    others = [method for method in methods if method in means and method != "joint"]
    if "joint" in means and len(alone) > 1:
        best = max(alone, key=means.get)
        name = best.removeprefix("unimodal-")
        yield f"Joint training is {compare('joint', best)} {name} alone, which it sees as well."
    if "joint" in means and others:
        yield f"{others[0]} is {compare(others[0], 'joint')} joint training."


def cell(value):
    """A table cell: `61.2 ± 0.8`, without the spread for a single run, or `-`.

    The spread is the standard deviation or, in a mean that has none, its standard error.
    """
    if value is None:
        return "-"
    if not isinstance(value, dict):
        return f"{value:.3g}" if isinstance(value, float) else str(value)
    digits = value.get("digits", 1)
    text = f"{value['mean']:.{digits}f}"
    spread = value["std"] if "std" in value else value["standard_error"]
    return text + f" ± {spread:.{digits}f}" if value["n"] > 1 else text


def format_text(rows):
    """Rows (dicts with equal keys) as aligned text."""
    lines = [list(rows[0]), *([cell(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip()
        for line in lines
    )


def made_up(data):
    """A warning to stand behind the name of a dataset that `data/prepare.py --fake` has made.

    data: what identifies the data, see `datasets.Splits`.
    """
    fake = str(data).startswith("fake-")
    return ", MADE-UP DATA: the numbers mean nothing" if fake else ""
