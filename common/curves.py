"""The picture that a run leaves of itself: curves by epoch."""

from itertools import groupby

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator


def draw_curves(title, panels, steps=None):
    """One panel for each entry of `panels`, y-label -> {legend: one value an epoch}.

    steps: for a last panel by training step, {"d_speed": values, "curated": modality or None}.
    """
    count = len(panels) + (steps is not None)
    figure = Figure(figsize=(5 * count, 3.5), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    if steps:
        draw_steps(axes[-1], **steps)
    for axis, (name, curves) in zip(axes, panels.items(), strict=False):
        for label, values in curves.items():
            axis.plot(range(1, len(values) + 1), values, label=label, marker=".")
        axis.set(xlabel="epoch", ylabel=name)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.3)
        axis.legend(fontsize="small")
    figure.suptitle(title)
    return figure


def draw_steps(axis, d_speed, curated):
    """d_speed by training step; the steps that curate a modality are shaded in its color."""
    axis.plot(range(1, len(d_speed) + 1), d_speed, "k", linewidth=1, label="d_speed")
    start = 0
    for modality, group in groupby(curated):
        end = start + len(list(group))
        if modality:
            color = f"C{sorted(set(filter(None, curated))).index(modality)}"
            known = axis.get_legend_handles_labels()[1]
            label = None if f"{modality} curated" in known else f"{modality} curated"
            axis.axvspan(start + 0.5, end + 0.5, color=color, alpha=0.25, linewidth=0, label=label)
        start = end
    axis.set(xlabel="step", ylabel="d_speed")
    axis.legend(fontsize="small")
