"""UMT, UME and their rivals on a dataset of yours; the paper's own tables could not be read.

    python -m experiments.umt_ume methods --seeds 0 1 2      # all methods, and is the choice right
    python -m experiments.umt_ume dial --seeds 0 1 2         # as paired features come to matter
    python -m experiments.umt_ume weights --seeds 0 1 2      # what lambda of UMT is chosen by
    python -m experiments.umt_ume starts --seeds 0 1 2       # students that start at their teachers

All flags of umt_ume.py; the rivals are baselines.py's and train by the same settings. rows.csv,
table.json and figure.png go to runs/umt_ume/<dataset>/<experiment>[-<knob>=<value>]/, and what
`auto` chose, with its evidence, to decisions.json beside them.
"""

from itertools import groupby

import umt_ume
from common.command_line import run_command
from common.datasets.synthetic import CONFIGURATIONS
from common.errors import UserError
from common.storage import write_json
from common.tables import format_text

from .figures import draw_trends
from .grid import Experiment, Grid, paired_differences

RIVALS = ("aux-ce", "g-blending", "ogm-ge", "modality-dropout")  # of baselines.py
METHODS = ("unimodal", "ume", "ume-logits", "linear", "joint", "umt", "auto")
WEIGHTS = (0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0)  # of the distillation, to choose from
DIAL = [  # in the configuration Q, without paired features first
    {"configuration": "Q", "pair_size": size, "pair_only": share}
    for share, size in [(0.0, 0.0), (0.05, 5.0), (0.1, 5.0), (0.2, 5.0), (0.4, 5.0)]
]


def methods(experiment):
    """All methods and the choice, on `synthetic` in each configuration."""
    splits, args = experiment.command.splits, experiment.args
    ogm = args.fusion == "concat" and len(splits.modalities) > 1  # else it has no shares to compare
    rivals = [m for m in RIVALS if m != "ogm-ge" or ogm]
    return Grid(
        title=f"methods on {args.dataset}",
        parts=parts(experiment, [*METHODS, *rivals], configurations(experiment)),
        columns=umt_ume.columns(splits),
        fields=("configuration",) if args.dataset == "synthetic" else (),
        pairs=[(m, "joint") for m in ("umt", *rivals)],
    )


def dial(experiment):
    """Test accuracy as the share of samples grows that show nothing but paired features."""
    if experiment.args.dataset != "synthetic":
        raise UserError("dial turns dials of synthetic; leave out --dataset.")
    experiment.refuse(*DIAL[0])
    return Grid(
        title="dial on synthetic",
        parts=parts(experiment, ["ume", "joint", "aux-ce", "umt"], DIAL),
        columns={"test": "test.accuracy"},
        fields=tuple(DIAL[0]),
        pairs=[("umt", "joint"), ("aux-ce", "joint")],
        figure=lambda title, rows, runs: draw_trends(title, rows, ["pair_only"]),
    )


def weights(experiment):
    """Validation accuracy of UMT by its weight, which RECIPES of umt_ume.py is chosen by."""
    experiment.refuse("distill_weight")
    settings = [c | {"distill_weight": x} for c in configurations(experiment) for x in WEIGHTS]
    return Grid(
        title=f"weights on {experiment.args.dataset}",
        parts=parts(experiment, ["umt"], settings),
        columns={"test": "test.accuracy", "val": "val.accuracy"},
        shown=["val"],
        fields=tuple(settings[0]),
        figure=draw_weights,
    )


def starts(experiment):
    """What UMT owes to encoders that start where their teachers started: none, one, all of them."""
    experiment.refuse("shared_start")
    settings = [{"shared_start": name} for name in ("none", *experiment.modalities, "all")]
    return Grid(
        title=f"starts on {experiment.args.dataset}",
        parts=[
            *parts(experiment, ["joint", "aux-ce"], [{}]),
            *parts(experiment, ["umt"], settings),
        ],
        columns=umt_ume.columns(experiment.command.splits),
        fields=("shared_start",),
    )


def draw_weights(title, rows, runs):
    """A line for each configuration."""
    lines = [{**row, "method": row.get("configuration", row["method"])} for row in rows]
    return draw_trends(title, lines, ["distill_weight"])


def configurations(experiment):
    """Of `synthetic` its four, of other data nothing to set."""
    if experiment.args.dataset != "synthetic":
        return [{}]
    experiment.refuse("configuration")
    return [{"configuration": name} for name in CONFIGURATIONS]


def parts(experiment, default, settings):
    """For each of the settings a call of every script that has some of the methods, in order."""
    found = []
    for setting in settings:
        for rival, own in groupby(experiment.methods(default), key=lambda m: m in RIVALS):
            script = {"script": "baselines"} if rival else {}
            found.append({**setting, **script, "method": list(own)})
    return found


# ---- The choice ----


def write_decisions(experiment, grid, record):
    """What `auto` chose in each part, as a table and with all its evidence; returns the table."""
    rows, decisions = [], []
    for part, result in zip(grid.parts, record["results"], strict=True):
        if "decision" in result:
            fields = {field: part[field] for field in grid.fields}
            decisions.append(result["decision"])
            rows.append(judge(fields, result["decision"], record["runs"]))
    titles = dict.fromkeys(title for row in rows for title in row)
    rows = [{title: row.get(title) for title in titles} for row in rows]
    found = {"title": f"The choice, {record['title']}", "arguments": record["arguments"]}
    write_json(experiment.folder / "decisions.json", found | {"rows": rows, "decisions": decisions})
    print(f"\n{format_text(rows)}")
    return rows


def judge(fields, decision, runs):
    """A row on one decision: its evidence on validation, and what the test data say of it.

    It is right if the other choice is not better on test by more than a standard error (over
    seeds).
    """
    runs = [run for run in runs if all(run[name] == value for name, value in fields.items())]
    row = {**fields, "choice": decision["choice"], "of single seeds": decision["by_seed"]}
    for found in decision["evidence"]:
        pair = f"{found['method']} - {found['reference']}"
        row[f"{pair} (val)"] = f"{found['points']:+.2f} ± {found['standard_error']:.2f}"
    other = "ume" if decision["choice"] == "umt" else "umt"
    for method, reference in ((decision["choice"], other), ("joint", decision["choice"])):
        found = paired_differences(runs, method, reference, groups=tuple(fields))
        if found:
            points, error = found[0]["mean"], found[0]["standard_error"]
            title = "choice - other (test)" if reference == other else "joint - choice (test)"
            row[title] = f"{points:+.2f}" + ("" if error is None else f" ± {error:.2f}")
            if reference == other and error is not None:
                row["right"] = "yes" if points >= -error else "no"
    return row


EXPERIMENTS = {"methods": methods, "dial": dial, "weights": weights, "starts": starts}


def main(argv=None):
    """Run the command line; returns the record of the table, with `auto` also its "choices"."""
    experiment = Experiment(umt_ume, EXPERIMENTS, argv)
    grid = EXPERIMENTS[experiment.name](experiment)
    record = experiment.run(grid)
    if any("decision" in result for result in record["results"]):
        record["choices"] = write_decisions(experiment, grid, record)
    return record


if __name__ == "__main__":
    run_command(main)
