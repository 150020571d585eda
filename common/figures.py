"""Figures: curves by epoch for a run, bars with their spread for an experiment."""

from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator


def draw_curves(title, panels):
    """One panel for each entry of `panels`, y-label -> {legend: one value an epoch}."""
    figure = Figure(figsize=(5 * len(panels), 3.5), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (name, curves) in zip(axes, panels.items(), strict=True):
        for label, values in curves.items():
            axis.plot(range(1, len(values) + 1), values, label=label, marker=".")
        axis.set(xlabel="epoch", ylabel=name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title)
    return figure


def draw_bars(title, rows, column):
    """Bars of `column` with its standard deviation, grouped by fusion; diamonds are the paper's."""
    rows = [row for row in rows if row[column]]
    methods = list(dict.fromkeys(row["method"] for row in rows))
    colors = {method: f"C{i % 10}" for i, method in enumerate(methods)}
    figure = Figure(figsize=(2 + 0.5 * len(rows), 4), layout="constrained")
    axis = figure.subplots()
    ticks, x, last = {}, 0.0, None
    for row in rows:
        x += 1 if row["fusion"] == last else 1.6
        last = row["fusion"]
        mean, std = row[column]["mean"], row[column]["std"]
        bar = axis.bar(x, mean, 0.9, yerr=std, color=colors[row["method"]], capsize=3)
        axis.bar_label(bar, [f"{mean:.0f}"], label_type="center", color="white")
        if row.get("paper") is not None:
            axis.plot(x, row["paper"], "kD", markersize=5)
        ticks.setdefault(row["fusion"] or "alone", []).append(x)
    axis.set_xticks([sum(xs) / len(xs) for xs in ticks.values()], list(ticks))
    axis.set(ylabel=f"{column} accuracy (%)", title=title, ylim=(0, 105))
    handles = [Patch(color=color) for color in colors.values()]
    figure.legend(handles, methods, ncols=3, loc="outside lower center")
    return figure
