"""Figures of the toy study: the data with its lines, decision regions, errors as bars."""

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

COLORS = {"joint": "C0", "mhm": "C1", "mhm-no-freeze": "C2"}


def draw_lines(points, labels, lines_by_title):
    """Points (N, 2 or 3) by class, one panel for each set of lines p + t v, (p, v) in a list."""
    space = points.shape[1]
    figure = Figure(figsize=(4.2 * len(lines_by_title), 4), layout="constrained")
    center, reach = points.mean(axis=0), np.ptp(points, axis=0).max() / 2
    for i, (title, lines) in enumerate(lines_by_title.items(), start=1):
        projection = "3d" if space == 3 else None
        axis = figure.add_subplot(1, len(lines_by_title), i, projection=projection)
        axis.scatter(*points.T, c=[f"C{label}" for label in labels], s=8, alpha=0.6)
        for number, (p, v) in enumerate(lines, start=1):
            p, v = np.array(p, dtype=float), np.array(v, dtype=float)
            foot = p + (center - p) @ v / (v @ v) * v
            ends = foot + np.outer([-reach, reach], v / np.linalg.norm(v))
            axis.plot(*ends.T, "k-", linewidth=1)
            axis.text(*ends[1], f"$t_{number}$")
        axis.set_title(title)
        if space == 2:
            axis.set_aspect("equal")
    return figure


def draw_regions(panels):
    """Decision regions: panels are (title, t (N, M), labels (N,), (x, y, classes (Y, X)))."""
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(4 * columns, 3.4 * rows), layout="constrained")
    for i, (title, t, labels, (x, y, classes)) in enumerate(panels, start=1):
        axis = figure.add_subplot(rows, columns, i)
        colors = ListedColormap([f"C{k}" for k in range(int(labels.max()) + 1)])
        axis.pcolormesh(x, y, classes, cmap=colors, vmin=0, vmax=colors.N - 1, alpha=0.3)
        axis.scatter(t[:, 0], t[:, 1], c=[f"C{label}" for label in labels], s=6)
        axis.set(title=title, xlabel="$t_1$", ylabel="$t_2$")
    return figure


def draw_error_bars(rows):
    """Test error of the toy tables' `rows`, ours with its spread; diamonds are the paper's."""
    datasets = list(dict.fromkeys(row["dataset"] for row in rows))
    figure = Figure(figsize=(14, 4.5 * len(datasets)), layout="constrained")
    for i, dataset in enumerate(datasets, start=1):
        axis = figure.add_subplot(len(datasets), 1, i)
        seen = {}
        for row in rows:  # joint stands in both tables
            if row["dataset"] == dataset:
                seen[row["method"], row["set"], row["fusion"]] = row
        for x, row in enumerate(seen.values()):
            color = COLORS[row["method"]]
            axis.bar(x, row["test"]["mean"], yerr=row["test"]["std"], color=color, capsize=3)
            for value in (row["paper's test"] or "").split(" or "):
                if value:
                    axis.plot(x, float(value), "kD", markersize=5)
        axis.set_xticks(range(len(seen)), [f"{name} {fusion}" for _, name, fusion in seen])
        axis.tick_params(axis="x", rotation=60)
        axis.set(title=dataset, ylabel="test error (%)")
        handles = [Patch(color=color) for color in COLORS.values()]
        handles.append(Line2D([], [], color="k", marker="D", linestyle=""))
        axis.legend(handles, [*COLORS, "paper"])
    return figure
