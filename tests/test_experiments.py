"""experiments/grid.py, figures.py and pages.py on hand-made runs; results/ against its own runs."""

import itertools
import json
import math
import re

import pytest
from conftest import ROOT

import pmr
import umt_ume
from common.curves import draw_curves
from common.errors import UserError
from common.parser import parse_flags
from common.tables import format_text, spread, tabulate
from experiments import figures, grid, pages
from experiments.grid import Experiment, Grid

RUNS = [
    {"method": m, "fusion": f, "seed": seed, "share": share, "test": test, "head": None}
    for m, f, seed, share, test in (
        ("joint", "concat", 0, 0.5, 50.0),
        ("joint", "concat", 1, 0.5, 54.0),
        ("pmr", "concat", 0, 0.5, 56.0),
        ("pmr", "concat", 1, 0.5, 58.0),
        ("pmr", "concat", 2, 0.5, 99.0),
        ("alone", None, 0, 0.5, 40.0),
    )
]
COLUMNS = {"test": "test", "head": "head"}
GRID = Grid("title", [], COLUMNS, pairs=[("pmr", "joint"), ("pmr", "other")])


def test_rows_are_spreads_and_differences_are_of_common_seeds():
    found = grid.summarize(GRID, RUNS)
    rows = found["rows"]
    names = [(row["method"], row["fusion"]) for row in rows]
    assert names == [("joint", "concat"), ("pmr", "concat"), ("alone", None)]
    assert rows[0]["test"] == {"mean": 52.0, "std": pytest.approx(math.sqrt(8)), "n": 2}
    assert rows[2]["test"] == {"mean": 40.0, "std": 0.0, "n": 1} and rows[0]["head"] is None
    (row,) = found["paired"]
    assert (row["mean"], row["standard_error"], row["n"]) == (5.0, pytest.approx(1.0), 2)  # 6, 4
    sentence = "pmr - joint (concat): +5.0 ± 1.0 points (paired, standard error, n = 2)"
    assert grid.describe_difference(row) == sentence
    (single,) = grid.paired_differences([RUNS[0], RUNS[2]], "pmr", "joint")
    assert single["standard_error"] is None and "+6.0 points" in grid.describe_difference(single)
    lines = format_text(rows).splitlines()
    assert lines[1] == "joint   concat  52.0 ± 2.8   -" and len(lines) == 4
    assert pages.format_markdown(rows).splitlines() == [
        "| method | fusion | test | head |",
        "| --- | --- | --- | --- |",
        "| joint | concat | 52.0 ± 2.8 | - |",
        "| pmr | concat | 71.0 ± 24.3 | - |",
        "| alone | - | 40.0 | - |",
    ]


def test_fields_part_the_rows_or_are_pooled():
    runs = RUNS[:4] + [{**run, "share": 1.0, "test": 2 + run["test"]} for run in RUNS[:4]]
    apart = grid.summarize(GRID._replace(fields=("share",)), runs)
    assert [(r["method"], r["share"], r["test"]["mean"]) for r in apart["rows"]] == [
        *(("joint", 0.5, 52), ("pmr", 0.5, 57), ("joint", 1.0, 54), ("pmr", 1.0, 59)),
    ]
    assert [(row["share"], row["n"]) for row in apart["paired"]] == [(0.5, 2), (1.0, 2)]
    assert "(concat, share 0.5)" in grid.describe_difference(apart["paired"][0])
    pooled = grid.summarize(GRID._replace(fields=("share",), pooled=True), runs)
    assert [row["test"]["n"] for row in pooled["rows"]] == [4, 4]
    assert [row["n"] for row in pooled["paired"]] == [4]
    extended = GRID._replace(extend=lambda row, own: {"runs": len(own)}, digits={"test": 3})
    rows = grid.summarize(extended, runs)["rows"]
    assert [row["runs"] for row in rows] == [4, 4] and rows[0]["test"]["digits"] == 3


def test_written_rows_are_read_again_as_they_were(tmp_path):
    runs = [{**run, "name": 'a "b", c', "x": 1e-17 + i / 3, "n": i} for i, run in enumerate(RUNS)]
    grid.write_rows(tmp_path / "rows.csv", runs)
    found = grid.read_rows(tmp_path / "rows.csv")
    assert found == runs and type(found[0]["n"]) is int and type(found[0]["test"]) is float


def test_a_script_gets_the_settings_that_it_has(tmp_path):
    """One that is not the experiment's gets its training settings, too."""
    words = ["table1", "--dataset", "synthetic", "--train-samples", "40", "--alpha", "3"]
    experiment = Experiment(pmr, {"table1": None}, [*words, "--out", str(tmp_path)])
    settings = experiment.given | {"method": ["umt"]}
    assert experiment.settings_of(pmr, settings) == settings
    found = experiment.settings_of(umt_ume, settings | {"batch_size": 7})
    assert "alpha" not in found and found.keys() <= vars(parse_flags(umt_ume.SCRIPT, [])).keys()
    recipe = pmr.RECIPES["synthetic"]
    assert {k: found[k] for k in ("epochs", "lr", "schedule")}.items() <= recipe.items()
    given = {name: found[name] for name in ("method", "train_samples", "batch_size")}
    assert given == {"method": ["umt"], "train_samples": 40, "batch_size": 7}
    name = "table1-train-samples=40-alpha=3.0"
    assert experiment.folder == tmp_path / "pmr" / "synthetic" / name
    experiment.refuse("lr")
    with pytest.raises(UserError, match="sets --train-samples itself; leave it out"):
        experiment.refuse("lr", "train_samples")
    with pytest.raises(UserError, match="--eval-only writes nothing and an experiment a table"):
        Experiment(pmr, {"table1": None}, [*words, "--eval-only"])
    with pytest.raises(SystemExit):
        Experiment(pmr, {"table1": None}, ["table9"])


# ---- Figures ----


def test_figures_plot_the_values_that_they_are_given():
    rows = tabulate(RUNS, COLUMNS)
    rows[0]["paper"] = 61.0
    (axis,) = figures.draw_bars("title", rows, ["test"]).axes
    assert [bar.get_height() for bar in axis.patches] == [52.0, 71.0, 40.0]
    assert [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "D"] == [61.0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["concat", "alone"]
    panels = {"accuracy (%)": {"train": [10, 20], "validation": [5, 6]}, "rho": {"rho": [0.5, 1]}}
    axes = draw_curves("a run", panels).axes
    drawn = [[list(line.get_ydata()) for line in axis.lines] for axis in axes]
    assert drawn == [[[10, 20], [5, 6]], [[0.5, 1]]]
    assert list(axes[0].lines[0].get_xdata()) == [1, 2]


# ---- Pages, and the results behind them ----


def test_renew_tables_fills_the_markers(tmp_path, monkeypatch):
    (tmp_path / "x.json").write_text(json.dumps(grid.summarize(GRID, RUNS)))
    monkeypatch.setattr(pages, "RESULTS", tmp_path)
    text = "a\n<!-- table x.json rows -->\nold\n<!-- end -->\nb\n<!-- table x.json paired -->\n"
    renewed = pages.renew_tables(text + "<!-- end -->\n")
    assert "old" not in renewed and "| joint | concat | 52.0 ± 2.8 | - |" in renewed
    assert "- pmr - joint (concat): +5.0" in renewed
    assert pages.renew_tables(renewed) == renewed and renewed.count("\n<!-- end -->\n") == 2


# Every table of runs; those of benches and of decisions have none, and compare.json joins others.
TABLES = [
    path
    for path in sorted((ROOT / "results").glob("*.json"))
    if not re.search("^compare$|^toy_|_bench$|_choice_", path.stem)
]


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_tables_of_the_results_follow_from_their_rows_exactly(path):
    """results/<name>.csv has a line for each run; <name>.json the means, spreads, differences."""
    record, file = json.loads(path.read_text()), path.with_suffix(".csv")
    if not file.exists() and "runs" in record:
        pytest.skip("its runs are still in the JSON")
    runs, rows = grid.read_rows(file), record["rows"]
    measured = {k for row in rows for k, value in row.items() if isinstance(value, dict)}
    fields = [k for k in runs[0] if k in rows[0] and k not in {*measured, "seed", "parameters"}]
    for row in rows:
        own = [run for run in runs if all(run[k] == (row[k], None)[row[k] == "-"] for k in fields)]
        for name in measured & runs[0].keys():
            found = spread([run[name] for run in own if run[name] is not None])
            if found:
                found["standard_error"] = found["std"] / math.sqrt(found["n"])
                found["digits"] = row[name].get("digits")
            assert row[name] == (found and {k: found[k] for k in row[name]})
    numbers = ("method", "reference", "mean", "standard_error", "n")
    for row in record.get("paired", []):
        groups = [k for k in row if k not in numbers]
        settings = itertools.takewhile(lambda k: k not in measured, runs[0])
        pairs = [k for k in settings if k not in (*groups, "method", "network")]
        found = grid.paired_differences(runs, row["method"], row["reference"], groups, pairs)
        assert row in found
