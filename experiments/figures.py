"""Figures of experiments: bars, trends, distributions."""

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch


def draw_distributions(title, panels):
    """A panel for each quantity, with the values of every method as points and their mean.

    panels: quantity -> method -> values.
    """
    figure = Figure(figsize=(4 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, values_by_method) in zip(axes, panels.items(), strict=True):
        for x, values in enumerate(values_by_method.values()):
            shifts = np.linspace(-0.3, 0.3, len(values)) if len(values) > 1 else [0]
            axis.scatter(x + np.array(shifts), values, s=8, color=f"C{x}", alpha=0.7)
            axis.hlines(np.mean(values), x - 0.4, x + 0.4, color="k")
        axis.axhline(0, color="gray", linewidth=0.5)
        axis.set_xticks(range(len(values_by_method)), list(values_by_method))
        axis.set_ylabel(name)
    figure.suptitle(title)
    return figure


def draw_trends(title, rows, knobs):
    """Columns of a table against its knobs, a line for each method, the other knobs being equal.

    A row of panels for each knob; a panel for every column that is a mean with its standard
    deviation. Where the rows do not form a grid, a line is of the most frequent other knobs.
    """
    columns = dict.fromkeys(
        k for row in rows for k, value in row.items() if isinstance(value, dict)
    )
    figure = Figure(figsize=(3.5 * len(columns), 3 * len(knobs)), layout="constrained")
    axes = figure.subplots(len(knobs), len(columns), squeeze=False)
    for line, knob in zip(axes, knobs, strict=True):
        others = [tuple(row[k] for k in knobs if k != knob) for row in rows]
        most = max(others, key=others.count)
        along = [row for row, other in zip(rows, others, strict=True) if other == most]
        along.sort(key=lambda row: row[knob])
        smallest = min((row[knob] for row in along if row[knob] > 0), default=1)
        for axis, column in zip(line, columns, strict=True):
            for method in dict.fromkeys(row["method"] for row in along):
                own = [row for row in along if row["method"] == method and row[column]]
                means, stds = ([row[column][k] for row in own] for k in ("mean", "std"))
                x = [row[knob] for row in own]
                axis.errorbar(x, means, stds, marker="o", capsize=3, label=method)
            axis.set_xscale("symlog", linthresh=smallest)
            axis.set(xlabel=knob, ylabel=column)
            axis.legend(fontsize="small")
    figure.suptitle(title)
    return figure


def draw_scatter(title, rows, x, y):
    """A labelled point for every row of a table that has columns `x` and `y`, with their errors."""
    rows = [row for row in rows if row[x] and row[y]]
    figure = Figure(figsize=(8, 6), layout="constrained")
    axis = figure.subplots()
    axis.margins(x=0.2, y=0.3)  # room for names
    networks = list(dict.fromkeys(row["network"] for row in rows))
    names = []
    for row in rows:
        color = f"C{networks.index(row['network'])}"
        name = row["method"] if row["method"] != "joint" else f"joint ({row['fusion']})"
        point, errors = zip(
            *((row[k]["mean"], row[k]["standard_error"]) for k in (x, y)), strict=True
        )
        axis.errorbar(*point, xerr=errors[0], yerr=errors[1], fmt="o", color=color, elinewidth=0.7)
        names.append((point, name, color))
    write_beside(axis, names)
    handles = [
        Line2D([], [], marker="o", linestyle="", color=f"C{i}") for i in range(len(networks))
    ]
    figure.legend(handles, networks, title="network", loc="outside right upper")
    axis.set(xlabel=f"{x} (%)", ylabel=f"{y} accuracy (%)", title=title)
    axis.grid(alpha=0.3)
    return figure


def write_beside(axis, names):
    """Write every name of (point, name, color) beside its point, above the names in its way."""
    axis.autoscale_view()
    taken = []  # (left, right, bottom) of names, in shares of the axes
    for point, name, color in sorted(names, key=lambda item: item[0][1]):
        x, bottom = axis.transLimits.transform(point)
        left, right, bottom = x + 0.01, x + 0.01 + 0.012 * len(name), bottom + 0.006
        for other in sorted(y for start, end, y in taken if start < right and left < end):
            if abs(other - bottom) < 0.026:
                bottom = other + 0.026
        taken.append((left, right, bottom))
        axis.text(left, bottom, name, transform=axis.transAxes, fontsize="small", color=color)


def draw_bars(title, rows, columns, fields=()):
    """A panel for each column: bars with their standard deviation, a color for each method.

    Rows are grouped by their `fields` and fusion. Diamonds are the paper's numbers for `test`.
    """
    methods = list(dict.fromkeys(row["method"] for row in rows))
    palette = colormaps["tab10" if len(methods) <= 10 else "tab20"].colors
    colors = {method: palette[i % len(palette)] for i, method in enumerate(methods)}
    columns = [column for column in columns if any(row[column] for row in rows)]
    width = 2 + 0.5 * len(rows)
    figure = Figure(figsize=(width * len(columns), 4), layout="constrained")
    axes = figure.subplots(1, len(columns), squeeze=False)[0]
    for axis, column in zip(axes, columns, strict=True):
        draw_bar_panel(axis, [row for row in rows if row[column]], column, colors, fields)
    figure.suptitle(title)
    handles = [Patch(color=color) for color in colors.values()]
    figure.legend(handles, methods, ncols=3, loc="outside lower center")
    return figure


def draw_bar_panel(axis, rows, column, colors, fields):
    """The bars of one column of a table, see `draw_bars`."""
    ticks, x, last = {}, 0.0, None
    for row in rows:
        parts = [f"{field} {row[field]}" for field in fields] + [row["fusion"] or "alone"]
        group = "\n".join(parts)
        x += 1 if group == last else 1.6
        last = group
        mean, std, digits = row[column]["mean"], row[column]["std"], row[column].get("digits", 0)
        bar = axis.bar(x, mean, 0.9, yerr=std, color=colors[row["method"]], capsize=3)
        axis.bar_label(bar, [f"{mean:.{digits}f}"], label_type="center", fontsize="small")
        if column == "test" and row.get("paper") is not None:
            axis.plot(x, row["paper"], "kD", markersize=5)
        ticks.setdefault(group, []).append(x)
    axis.set_xticks([sum(xs) / len(xs) for xs in ticks.values()], list(ticks))
    axis.set_ylabel(column if any("digits" in row[column] for row in rows) else f"{column} (%)")
    low, high = axis.get_ylim()
    axis.set_ylim(min(low, 0), 105 if high > 60 else high)
