"""compare.py: what it runs, the table from hand-made runs, and a method of one's own."""

import json
import math
import runpy
import statistics

import numpy as np
import pytest
import torch
from conftest import ROOT

import compare
from common.errors import UserError
from common.experiments import RESULTS, format_markdown
from common.figures import draw_scatter
from common.rebalance import RIVALS

TINY = ["--epochs", "1", "--train-samples", "60", "--device", "cpu"]


def made(method, seed, accuracy, probes, network="late", fusion="concat", cpu=10.0, best=50.0):
    """A summary as the scripts give it; probes: modality -> percent."""
    test = {"accuracy": accuracy, "macro_f1": accuracy - 1}
    test |= {m: {"probe": value} for m, value in probes.items()}
    summary = {"method": method, "fusion": fusion, "seed": seed, "network": network, "test": test}
    summary |= {"best": {"test": {"accuracy": best}}, "cpu_seconds": cpu, "parameters": 1234}
    return summary


RUNS = [
    run
    for seed, shift in ((0, 0.0), (1, 2.0))
    for run in (
        made("unimodal-a", seed, 60 + shift, {"a": 80}, fusion=None, cpu=4.0),
        made("unimodal-b", seed, 40.0, {"b": 50}, fusion=None, cpu=6.0),
        {k: v for k, v in made("ume", seed, 75.0, {}, fusion=None).items() if k != "cpu_seconds"},
        made("joint", seed, 70 + shift, {"a": 80, "b": 25}),
        made("umt", seed, 74 + 2 * shift, {"a": 76, "b": 50}, cpu=11.0),
        made("unimodal-a", seed, 60.0, {"a": 50}, "mmtm", fusion=None),
        made("unimodal-b", seed, 40.0, {"b": 100}, "mmtm", fusion=None),
        made("joint", seed, 50.0, {"a": 40, "b": 90}, "mmtm", "mmtm", cpu=20.0),
        made("guided", seed, 53 - shift, {"a": 50, "b": 50}, "mmtm", "mmtm", cpu=30.0),
        made("joint", seed, 45.0, {"a": 80, "b": 50}, "modular"),
        made("mhm", seed, 50.0, {"a": 40, "b": 50}, "modular"),
    )
]


def test_table_of_hand_made_runs():
    rows = {(row["network"], row["method"]): row for row in compare.tabulate(RUNS)}
    assert len(rows) == 11
    joint, umt, ume = rows["late", "joint"], rows["late", "umt"], rows["late", "ume"]
    assert joint["test"] == {"mean": 71.0, "standard_error": pytest.approx(1.0), "n": 2}
    assert joint["- joint"] is None and rows["late", "unimodal-a"]["- joint"] is None
    assert umt["- joint"] == "+5.0 ± 1.0"  # +4 and +6
    assert ume["- joint"] == "+4.0 ± 1.0"  # 75 - 70 and 75 - 72
    assert rows["mmtm", "guided"]["- joint"] == "+2.0 ± 1.0"  # against mmtm's joint training
    assert joint["balance"]["mean"] == 50 and umt["balance"]["mean"] == 95
    assert ume["balance"]["mean"] == 100 and ume["b probe"]["mean"] == 50
    assert rows["late", "unimodal-a"]["balance"] is None
    # against the same network alone; what is modular has no such, and the encoders of `late`
    assert rows["mmtm", "joint"]["balance"]["mean"] == 80
    assert rows["mmtm", "guided"]["balance"]["mean"] == 50
    assert rows["modular", "mhm"]["balance"]["mean"] == 50
    assert umt["time"] == pytest.approx(2.1) and ume["time"] == pytest.approx(1.0)
    assert rows["mmtm", "guided"]["time"] == pytest.approx(3.0)
    assert (umt["best"]["mean"], umt["macro-F1"]["mean"]) == (50, 75)


def test_no_balance_where_an_encoder_alone_gets_nothing_right():
    alone = {
        "a": made("unimodal-a", 0, 60.0, {"a": 0.0}),
        "b": made("unimodal-b", 0, 40.0, {"b": 50}),
    }
    runs = [*alone.values(), made("joint", 0, 70.0, {"a": 10, "b": 25})]
    assert [row["balance"] for row in compare.tabulate(runs)] == [None] * 3


def test_standard_error_is_that_of_the_mean():
    runs = [made("joint", seed, x, {}) for seed, x in enumerate((1.0, 4.0, 10.0))]
    found = compare.mean(runs, "test.accuracy")
    assert found["standard_error"] == pytest.approx(statistics.stdev((1, 4, 10)) / math.sqrt(3))
    assert compare.mean(runs, "test.a.probe") is None


def test_one_seed_has_no_error():
    rows = compare.readable(compare.tabulate([run for run in RUNS if run["seed"] == 0]))
    (umt,) = (row for row in rows if row["method"] == "umt")
    assert umt["- joint"] == "+4.0" and umt["parameters"] == "1,234"
    assert "| umt | concat | 74.0 | +4.0 |" in format_markdown(rows)


@pytest.mark.slow
def test_all_methods_on_digits_and_again_without_training(tmp_path, monkeypatch):
    argv = ["--seeds", "0", "1", "--out", str(tmp_path), *TINY]
    record = compare.main(argv)
    folder = tmp_path / "compare" / "digits-train-samples=60-epochs=1"
    assert json.loads((folder / "compare.json").read_text()) == json.loads(json.dumps(record))
    assert record["arguments"]["epochs"] == 1 and record["arguments"]["lr"] == 0.01
    assert (folder / "compare.md").read_text() == format_markdown(record["rows"]) + "\n"
    assert (folder / "compare.png").read_bytes().startswith(b"\x89PNG")
    wanted = {
        *(("late", m) for m in ("unimodal-gray", "unimodal-color", "joint", "umt", "ume", "pmr")),
        *(("late", m) for m in RIVALS),
        *(("mmtm", m) for m in ("unimodal-gray", "unimodal-color")),
        *(("mmtm", m) for m in ("joint", "rubi", "random", "guided")),
        *(("modular", m) for m in ("joint", "ensemble", "mhm")),
    }
    assert {(row["network"], row["method"]) for row in record["rows"]} == wanted
    heads = {row["fusion"] for row in record["rows"] if row["method"] == "joint"}
    assert heads == {"concat", "sum", "film", "gated", "mmtm"}
    for row in record["rows"]:
        assert row["test"]["n"] == 2 and (row["balance"] or "unimodal" in row["method"])
    settings = set()
    for path in tmp_path.glob("*/digits/*/config.json"):
        found = json.loads(path.read_text())["arguments"]
        settings.add(
            tuple(found[k] for k in ("epochs", "batch_size", "lr", "weight_decay", "schedule"))
        )
        assert found["color_variance"] == 0.03
    assert len(settings) == 1

    def refuse(*args, **kwargs):
        raise AssertionError("trains again")

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", refuse)
        assert compare.main([*argv, "--seeds", "0", "1", "0"])["rows"] == record["rows"]
        with pytest.raises(AssertionError, match="trains again"):
            compare.main([*argv, "--overwrite"])


def test_an_interrupted_command_goes_on(tmp_path, monkeypatch):
    """Stopped in the middle of the third script, then given again: as if it had never stopped."""
    argv = ["--dataset", "synthetic", *TINY]
    whole = compare.main([*argv, "--out", str(tmp_path / "whole")])
    steps, step = [], torch.optim.SGD.step

    def stop(optimizer, *rest):
        steps.append(0)
        if len(steps) == 40:
            raise KeyboardInterrupt
        return step(optimizer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            compare.main([*argv, "--out", str(tmp_path / "parts")])
    assert not list(tmp_path.glob("parts/compare/*")) and list(tmp_path.glob("parts/*/*/*"))
    again = compare.main([*argv, "--out", str(tmp_path / "parts")])
    for one, other in zip(whole["rows"], again["rows"], strict=True):
        assert {**one, "time": 0} == {**other, "time": 0}


def test_the_figure_shows_balance_and_accuracy_of_every_row_that_has_both():
    rows = compare.tabulate(RUNS)
    (axis,) = draw_scatter("title", rows, "balance", "test").axes
    points = [tuple(container.lines[0].get_xydata()[0]) for container in axis.containers]
    shown = [row for row in rows if row["balance"]]
    assert points == [(row["balance"]["mean"], row["test"]["mean"]) for row in shown]
    names = {text.get_text() for text in axis.texts}
    assert names == {"guided", "joint (concat)", "joint (mmtm)", "mhm", "umt", "ume"}


def test_three_modalities_leave_out_what_compares_two():
    methods = {(network, m) for network, *_, names in compare.plan("abc") for m in names}
    assert ("late", "pmr") not in methods and ("mmtm", "rubi") not in methods
    assert {("mmtm", f"unimodal-{m}") for m in "abc"} <= methods
    assert {("late", "umt"), ("mmtm", "guided"), ("modular", "mhm")} <= methods


def test_a_method_of_ones_own_gets_a_row(tmp_path, monkeypatch):
    monkeypatch.setattr(compare, "plan", lambda m: [row for row in PLAN(m) if row[0] == "late"][:1])
    monkeypatch.setitem(RIVALS, "half-speed", None)  # taken out again after the test
    runpy.run_path(str(ROOT / "examples" / "own_method.py"))
    record = compare.main(["--dataset", "synthetic", "--out", str(tmp_path), *TINY])
    (row,) = (row for row in record["rows"] if row["method"] == "half-speed")
    assert row["fusion"] == "concat" and row["- joint"]
    lines = (ROOT / "examples" / "own_method.py").read_text().splitlines()
    assert len(lines) < 40


PLAN = compare.plan


def test_unknown_flags_are_refused_by_the_scripts(tmp_path):
    with pytest.raises(SystemExit):
        compare.main(["--no-such-flag", "--out", str(tmp_path)])
    with pytest.raises(UserError, match="no dial --audio-snr"):
        compare.main(["--audio-snr", "3", "--out", str(tmp_path)])
    for flag in ("--method=joint", "--fusion", "--experiment", "--eval-only"):
        with pytest.raises(UserError, match=f"leave out {flag}"):
            compare.main([flag, "sum", "--out", str(tmp_path)])


@pytest.mark.parametrize("flag", ["--ogm-alpha", "--distill-weight", "--tolerance", "--heads"])
def test_a_flag_of_one_script_is_refused_before_any_training(tmp_path, flag):
    with pytest.raises(SystemExit):
        compare.main([flag, "1", "--out", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_one_modality_has_nothing_to_compare(tmp_path):
    arrays = {f"{part}_labels": [0, 1] * 10 for part in ("train", "test")}
    np.savez(tmp_path / "one.npz", **arrays, train_a=np.eye(20), test_a=np.eye(20))
    flags = ["--dataset", "features", "--data-root", str(tmp_path / "one.npz")]
    with pytest.raises(UserError, match="two modalities at least; features has one"):
        compare.main([*flags, "--out", str(tmp_path)])


# ---- Datasets side by side ----


def write_made(tmp_path, dataset, runs):
    """A compare.json of hand-made runs."""
    record = {"dataset": dataset, "rows": compare.readable(compare.tabulate(runs)), "runs": runs}
    (tmp_path / f"{dataset}.json").write_text(json.dumps(record))
    return str(tmp_path / f"{dataset}.json")


def test_joined_tables(tmp_path, capsys):
    other = [run for run in RUNS if run["network"] == "late" and run["method"] != "umt"]
    other = [
        {**run, "method": run["method"].replace("-a", "-x").replace("-b", "-y")} for run in other
    ]
    other = [
        {**run, "test": {{"a": "x", "b": "y"}.get(k, k): v for k, v in run["test"].items()}}
        for run in other
    ]
    files = [write_made(tmp_path, "one", RUNS), write_made(tmp_path, "two", other)]
    record = compare.main(["--join", *files, "--out", str(tmp_path)])
    folder = tmp_path / "compare"
    assert json.loads((folder / "compare.json").read_text()) == record
    assert (folder / "compare.md").read_text() == format_markdown(record["rows"]) + "\n"
    assert [row["method"] for row in record["rows"]][:2] == ["modality 1 alone", "modality 2 alone"]
    rows = {(row["network"], row["method"]): row for row in record["rows"]}
    assert len(rows) == 11
    ume, umt = rows["late", "ume"], rows["late", "umt"]
    assert ume["one test"] == ume["two test"] and ume["two test"]["mean"] == 75
    assert (umt["one - joint"], umt["two - joint"], umt["two test"]) == ("+5.0 ± 1.0", None, None)
    assert rows["late", "joint"]["two balance"]["mean"] == 50
    assert "one - joint" in capsys.readouterr().out


def test_bad_files_to_join(tmp_path):
    good, bad = write_made(tmp_path, "one", RUNS), tmp_path / "bad.json"
    for text in ("{", "[]", '{"rows": []}', '{"rows": [1]}', '{"rows": [{"test": 1}]}'):
        bad.write_text(text)
        with pytest.raises(UserError, match=r"bad.json is no compare.json \(.*write it anew"):
            compare.main(["--join", good, str(bad)])
    with pytest.raises(UserError, match=r"none.json is no compare.json"):
        compare.main(["--join", str(tmp_path / "none.json")])
    with pytest.raises(UserError, match="--join trains nothing; leave out --epochs 3"):
        compare.main(["--join", good, "--epochs", "3"])
    with pytest.raises(UserError, match="one file of a dataset, not those of one, one"):
        compare.main(["--join", good, good])


# ---- What the pages show ----


@pytest.mark.parametrize("dataset", ["digits", "av-digits", "synthetic"])
def test_rows_of_the_results_are_those_of_their_runs(dataset):
    record = json.loads((RESULTS / f"compare_{dataset}.json").read_text())
    again = compare.readable(compare.tabulate(record["runs"]))
    assert record["rows"] == json.loads(json.dumps(again))
    assert len(record["seeds"]) >= 5
    page = (ROOT / "docs" / "compare.md").read_text()
    assert f"<!-- table compare_{dataset}.json rows -->\n" in page


def test_the_table_of_the_readme_joins_the_results():
    record = json.loads((RESULTS / "compare.json").read_text())
    files = [RESULTS / f"compare_{name}.json" for name in record["datasets"]]
    joined = compare.join([json.loads(path.read_text()) for path in files])
    assert record["rows"] == json.loads(json.dumps(joined))
    assert "<!-- table compare.json rows -->\n" in (ROOT / "README.md").read_text()
