"""Tables, paired differences and figures from hand-made runs; the tables that the pages show."""

import json
import math
import re

import pytest
from conftest import ROOT

from common import experiments, figures


def make_run(method, seed, accuracy, fusion="concat"):
    run = {"method": method, "fusion": fusion, "epochs": 20, "seed": seed}
    return {**run, "test": {"accuracy": accuracy}}


RUNS = [
    make_run("joint", 0, 50.0),
    make_run("joint", 1, 54.0),
    make_run("pmr", 0, 56.0),
    make_run("pmr", 1, 58.0),
    make_run("pmr", 2, 99.0),
    make_run("alone", 0, 40.0, fusion=None),
]
COLUMNS = {"test": "test.accuracy", "head": "test.gray.head"}


def test_tabulate_groups_and_spreads():
    rows = experiments.tabulate(RUNS, COLUMNS)
    assert [(row["method"], row["fusion"]) for row in rows] == [
        ("joint", "concat"),
        ("pmr", "concat"),
        ("alone", None),
    ]
    assert rows[0]["test"] == {"mean": 52.0, "std": pytest.approx(math.sqrt(8)), "n": 2}
    assert rows[2]["test"] == {"mean": 40.0, "std": 0.0, "n": 1}
    assert rows[0]["head"] is None


def test_paired_differences_use_common_seeds_only():
    (row,) = experiments.paired_differences(RUNS, "pmr", "joint")
    assert (row["mean"], row["n"]) == (5.0, 2)  # 6 and 4
    assert row["standard_error"] == pytest.approx(1.0)
    assert "pmr - joint (concat): +5.0 ± 1.0 points" in experiments.describe_difference(row)
    (single,) = experiments.paired_differences(RUNS[:1] + RUNS[2:3], "pmr", "joint")
    assert single["standard_error"] is None
    assert not experiments.paired_differences(RUNS, "pmr", "other")


def test_text_and_markdown_tables():
    rows = experiments.tabulate(RUNS, COLUMNS)
    assert experiments.format_markdown(rows).splitlines() == [
        "| method | fusion | test | head |",
        "| --- | --- | --- | --- |",
        "| joint | concat | 52.0 ± 2.8 | - |",
        "| pmr | concat | 71.0 ± 24.3 | - |",
        "| alone | - | 40.0 | - |",
    ]
    lines = experiments.format_text(rows).splitlines()
    assert lines[1] == "joint   concat  52.0 ± 2.8   -" and len(lines) == 4


def test_the_figure_plots_the_values_of_the_table():
    rows = experiments.tabulate(RUNS, COLUMNS)
    rows[0]["paper"] = 61.0
    (axis,) = figures.draw_bars("title", rows, ["test"]).axes
    assert [bar.get_height() for bar in axis.patches] == [52.0, 71.0, 40.0]
    assert [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "D"] == [61.0]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["concat", "alone"]


def test_without_flag():
    argv = ["--experiment", "table1", "--lr", "1", "--experiment=table1", "--seeds", "0"]
    assert experiments.without_flag(argv, "--experiment") == ["--lr", "1", "--seeds", "0"]


def test_renew_tables_fills_the_markers(tmp_path, monkeypatch):
    rows = experiments.tabulate(RUNS[:2], COLUMNS)
    record = {"rows": rows, "paired": experiments.paired_differences(RUNS, "pmr", "joint")}
    (tmp_path / "x.json").write_text(json.dumps(record))
    monkeypatch.setattr(experiments, "RESULTS", tmp_path)
    text = "a\n<!-- table x.json rows -->\nold\n<!-- end -->\nb\n<!-- table x.json paired -->\n"
    renewed = experiments.renew_tables(text + "<!-- end -->\n")
    assert "old" not in renewed and "| joint | concat | 52.0 ± 2.8 | - |" in renewed
    assert "- pmr - joint (concat): +5.0" in renewed
    assert experiments.renew_tables(renewed) == renewed


PAGES = [ROOT / "README.md", ROOT / "data" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_tables_on_the_pages_are_those_of_results(page):
    """If this fails: python -m common.experiments README.md data/README.md docs/*.md"""
    text = page.read_text()
    assert experiments.renew_tables(text) == text
    assert text.count("<!-- table ") == len(experiments.MARKERS.findall(text))


def test_every_table_of_numbers_in_the_results_sections_stands_between_markers():
    for page in PAGES:
        bare = experiments.MARKERS.sub("", page.read_text())
        assert not re.search(r"^\|.*\d ± \d", bare, re.MULTILINE), page


@pytest.mark.parametrize(
    "path", sorted((ROOT / "results").glob("pmr_table1_*.json")), ids=lambda path: path.name
)
def test_rows_of_the_results_follow_from_their_runs(path):
    record = json.loads(path.read_text())
    columns = {"test": "test.accuracy", "macro-F1": "test.macro_f1", "best": "best.test.accuracy"}
    for row, again in zip(
        record["rows"], experiments.tabulate(record["runs"], columns), strict=True
    ):
        assert {key: row[key] for key in again} == again
    again = []
    for pair in dict.fromkeys((row["method"], row["reference"]) for row in record["paired"]):
        again += experiments.paired_differences(record["runs"], *pair)
    assert record["paired"] == again


def test_curves_plot_one_value_an_epoch():
    panels = {"accuracy (%)": {"train": [10, 20], "validation": [5, 6]}, "rho": {"rho": [0.5, 1]}}
    figure = figures.draw_curves("a run", panels)
    drawn = [[list(line.get_ydata()) for line in axis.lines] for axis in figure.axes]
    assert drawn == [[[10, 20], [5, 6]], [[0.5, 1]]]
    assert list(figure.axes[0].lines[0].get_xdata()) == [1, 2]
