"""experiments/compare.py: what it runs, its table from hand-made runs, a method of one's own."""

import json
import runpy

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_pmr import no_probes, quick  # noqa: F401

import baselines
import greedy_balance
import mhm
import umt_ume
from common.errors import UserError
from experiments import compare
from experiments.figures import draw_scatter
from experiments.grid import RESULTS, read_rows
from experiments.pages import format_markdown

TINY = ["--epochs", "1", "--train-samples", "60", "--device", "cpu"]


def made(method, seed, test, a=None, b=None, network="late", fusion="concat", cpu=10.0):
    """A row of a run before `complete`; a, b: probes of two modalities, in percent."""
    run = {"network": network, "method": method, "fusion": fusion, "seed": seed, "test": test}
    run |= {"best": 50.0, "macro-F1": test - 1, "a probe": a, "b probe": b}
    return run | {"cpu_seconds": cpu, "parameters": 1234}


MADE = [
    run
    for seed, shift in ((0, 0.0), (1, 2.0))
    for run in (
        made("unimodal-a", seed, 60 + shift, 80, fusion=None, cpu=4.0),
        made("unimodal-b", seed, 40.0, None, 50, fusion=None, cpu=6.0),
        made("ume", seed, 75.0, fusion=None),
        made("joint", seed, 70 + shift, 80, 25),
        made("umt", seed, 74 + 2 * shift, 76, 50, cpu=11.0),
        made("unimodal-a", seed, 60.0, 50, None, "mmtm", None),
        made("unimodal-b", seed, 40.0, None, 100, "mmtm", None),
        made("joint", seed, 50.0, 40, 90, "mmtm", "mmtm", 20.0),
        made("guided", seed, 53 - shift, 50, 50, "mmtm", "mmtm", 30.0),
        made("joint", seed, 45.0, 80, 50, "modular"),
        made("mhm", seed, 50.0, 40, 50, "modular"),
    )
]
RUNS = compare.complete(MADE, ("a", "b"))


def test_table_of_hand_made_runs():
    rows = {(row["network"], row["method"]): row for row in compare.tabulate(RUNS)}
    joint, umt, ume = (rows["late", m] for m in ("joint", "umt", "ume"))
    guided, mhm = rows["mmtm", "guided"], rows["modular", "mhm"]
    assert len(rows) == 11
    assert joint["test"] == {"mean": 71.0, "standard_error": pytest.approx(1.0), "n": 2}
    assert joint["- joint"] is None and rows["late", "unimodal-a"]["- joint"] is None
    differences = [row["- joint"] for row in (umt, ume, guided, mhm)]  # each in its network
    assert differences == ["+5.0 ± 1.0", "+4.0 ± 1.0", "+2.0 ± 1.0", "+5.0 ± 0.0"]
    balances = [row["balance"]["mean"] for row in (joint, umt, ume, rows["mmtm", "joint"], guided)]
    assert balances == [50, 95, 100, 80, 50]  # against the same network alone
    assert mhm["balance"]["mean"] == 50  # modular has no such; its encoders are those of late
    assert rows["late", "unimodal-a"]["balance"] is None and ume["b probe"]["mean"] == 50
    assert [row["time"] for row in (umt, ume, guided)] == pytest.approx([2.1, 1.0, 3.0])
    assert (umt["best"]["mean"], umt["macro-F1"]["mean"]) == (50, 75)
    single = compare.readable(compare.tabulate([run for run in RUNS if run["seed"] == 0]))
    assert "| umt | concat | 74.0 | +4.0 |" in format_markdown(single)
    assert all(row["parameters"] == "1,234" for row in single)
    (axis,) = draw_scatter("title", list(rows.values()), "balance", "test").axes
    points = [tuple(container.lines[0].get_xydata()[0]) for container in axis.containers]
    shown = [row for row in rows.values() if row["balance"]]
    assert points == [(row["balance"]["mean"], row["test"]["mean"]) for row in shown]
    names = {text.get_text() for text in axis.texts}
    assert names == {"guided", "joint (concat)", "joint (mmtm)", "mhm", "umt", "ume"}


def test_no_balance_where_an_encoder_alone_gets_nothing_right():
    runs = [made("unimodal-a", 0, 60.0, 0.0), made("unimodal-b", 0, 40.0, None, 50)]
    runs = compare.complete([*runs, made("joint", 0, 70.0, 10, 25)], ("a", "b"))
    assert [run["balance"] for run in runs] == [None] * 3


def test_three_modalities_leave_out_what_compares_two():
    methods = {(network, m) for network, *_, names in compare.plan("abc") for m in names}
    assert ("late", "pmr") not in methods and ("mmtm", "rubi") not in methods
    fusions = {fusion for network, _, fusion, _ in compare.plan("abc") if network == "late"}
    assert fusions == {"concat", "sum"}
    assert {("mmtm", f"unimodal-{m}") for m in "abc"} <= methods
    assert {("late", "umt"), ("mmtm", "guided"), ("modular", "mhm")} <= methods


@pytest.mark.usefixtures("no_probes")
def test_three_views_in_the_scripts_that_take_more_than_two(tmp_path, mfeat_root):
    views = ("fou", "zer", "mor")
    flags = {"dataset": "mfeat", "data_root": mfeat_root, "views": ",".join(views), "epochs": 1}
    flags |= {"train_samples": 60, "batch_size": 20, "device": "cpu", "out": tmp_path}
    guided = greedy_balance.main({**flags, "method": ["guided"], "tolerance": 0.0, "window": 1})
    u = [guided["test"][m]["u"] for m in views]
    assert guided["test"]["d_util"] == pytest.approx(max(u) - min(u))
    assert umt_ume.main({**flags, "method": ["ume"]})["method"] == "ume"  # trains each alone
    assert mhm.main({**flags, "method": ["mhm"]})["heads"] == 4
    runs = [path.name for path in tmp_path.glob("*/mfeat/*")]
    assert all("-views=fou,zer,mor-" in name for name in runs)
    alone = {name.split("-")[1] for name in runs if name.startswith("unimodal-")}
    assert alone == set(views)


@pytest.mark.slow
def test_all_methods_on_digits_interrupted_and_again_without_training(tmp_path, monkeypatch):
    """Stopped in the middle of the third script, then given again: as if it had never stopped."""
    argv = [*TINY, "--out"]
    whole = compare.main([*argv, str(tmp_path / "whole")])
    steps, step = [], torch.optim.SGD.step

    def stop(optimizer, *rest):
        steps.append(0)
        if len(steps) == 25:
            raise KeyboardInterrupt
        return step(optimizer, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(torch.optim.SGD, "step", stop)
        with pytest.raises(KeyboardInterrupt):
            compare.main([*argv, str(tmp_path)])
    assert not (tmp_path / "compare").exists() and list(tmp_path.glob("umt_ume/*/*"))
    record = compare.main([*argv, str(tmp_path)])
    for one, other in zip(whole["rows"], record["rows"], strict=True):
        assert {**one, "time": 0} == {**other, "time": 0}
    folder = tmp_path / "compare" / "digits-train-samples=60-epochs=1"
    assert json.loads((folder / "table.json").read_text()) == json.loads(json.dumps(record))
    rows = compare.readable(compare.tabulate(read_rows(folder / "rows.csv")))
    assert rows == record["rows"] and "runs" not in record
    assert record["arguments"]["epochs"] == 1 and record["arguments"]["lr"] == 0.01
    assert (folder / "table.md").read_text() == format_markdown(rows) + "\n"
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    alone, rules = ("unimodal-gray", "unimodal-color"), ("joint", "aux-ce", "g-blending", "ogm-ge")
    wanted = {
        "late": {*alone, *rules, "modality-dropout", "umt", "ume", "pmr"},
        "mmtm": {*alone, "joint", "rubi", "random", "guided"},
        "modular": {"joint", "ensemble", "mhm"},
    }
    for network, methods in wanted.items():
        assert {row["method"] for row in rows if row["network"] == network} == methods
    fusions = {row["fusion"] for row in rows if row["method"] == "joint"}
    assert fusions == {"concat", "sum", "film", "gated", "mmtm"}
    for row in rows:
        assert row["test"]["n"] == 1 and (row["balance"] or "unimodal" in row["method"])
    shared, settings = ("epochs", "batch_size", "lr", "momentum", "weight_decay", "schedule"), set()
    for path in tmp_path.glob("*/digits/*/config.json"):
        found = json.loads(path.read_text())["arguments"]
        settings.add(tuple(found[k] for k in (*shared, "color_variance")))
    assert len(settings) == 1
    monkeypatch.setattr(torch.Tensor, "backward", lambda *_, **__: pytest.fail("trains again"))
    again = compare.main([*argv, str(tmp_path), "--seeds", "0", "0"])
    assert again["rows"] == record["rows"]
    with pytest.raises(pytest.fail.Exception, match="trains again"):
        compare.main([*argv, str(tmp_path), "--overwrite"])


def test_a_method_of_ones_own_gets_a_row(tmp_path, monkeypatch):
    for names in (baselines.RULES, baselines.METHODS):
        monkeypatch.setitem(names, "half-speed", None)  # taken out again after the test
    runpy.run_path(str(ROOT / "examples" / "own_method.py"))
    late = [part for part in compare.plan(("first", "second")) if part[0] == "late"][:2]
    monkeypatch.setattr(compare, "plan", lambda modalities: late)
    record = compare.main(["--dataset", "synthetic", "--out", str(tmp_path), *TINY])
    rows = {row["method"]: row for row in record["rows"]}
    assert rows["half-speed"]["fusion"] == "concat" and rows["half-speed"]["- joint"]
    assert rows["half-speed"]["test"] != rows["joint"]["test"]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--no-such-flag", "unrecognized arguments: --no-such-flag"),
        ("--tolerance 1", "unrecognized arguments"),  # a flag of one script
        ("--audio-snr 3", "no dial --audio-snr"),
        ("--method joint", "The comparison runs all methods; leave out --method."),
        ("--fusion sum", "leave out --fusion"),
        ("--alpha 2", "leave out --alpha"),
        ("--eval-only", "leave out --eval-only"),
        ("--experiment table1", "a command of their own"),
        ("--join none.json", "none.json cannot be read"),
        ("--dataset features --data-root {one}", "two modalities at least, and there is one"),
    ],
)
def test_bad_input_is_one_sentence_before_any_training(tmp_path, capsys, words, sentence):
    arrays = {f"{part}_labels": [0, 1] * 10 for part in ("train", "test")}
    np.savez(tmp_path / "one.npz", **arrays, train_a=np.eye(20), test_a=np.eye(20))
    words = words.format(one=tmp_path / "one.npz").split()
    with pytest.raises((SystemExit, UserError)) as error:
        compare.main([*words, "--out", str(tmp_path / "runs")])
    assert sentence in capsys.readouterr().err + str(error.value)
    assert not (tmp_path / "runs").exists()


# ---- Datasets side by side ----


def write_made(tmp_path, dataset, runs):
    """A table.json of hand-made runs."""
    record = {"dataset": dataset, "rows": compare.readable(compare.tabulate(runs))}
    (tmp_path / f"{dataset}.json").write_text(json.dumps(record))
    return str(tmp_path / f"{dataset}.json")


def test_joined_tables(tmp_path, capsys):
    """The other dataset has other modalities, only one network, and no UMT."""
    names = {"unimodal-a": "unimodal-x", "unimodal-b": "unimodal-y"}
    other = [
        {k.replace("a probe", "x probe").replace("b probe", "y probe"): v for k, v in run.items()}
        | {"method": names.get(run["method"], run["method"])}
        for run in RUNS
        if run["network"] == "late" and run["method"] != "umt"
    ]
    files = [write_made(tmp_path, "one", RUNS), write_made(tmp_path, "two", other)]
    record = compare.main(["--join", *files, "--out", str(tmp_path)])
    folder = tmp_path / "compare"
    assert json.loads((folder / "table.json").read_text()) == record
    assert (folder / "table.md").read_text() == format_markdown(record["rows"]) + "\n"
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
    row = {"network": "late", "method": "joint", "- joint": None, "balance": None}
    rows = [[], [1], [{"test": 1}], [row | {"test": {"mean": np.nan, "standard_error": 0, "n": 1}}]]
    row |= {"fusion": None, "test": {"mean": 50, "standard_error": 0, "n": 1}}
    rows += [[row | {key: ["?"]}] for key in ("network", "method", "fusion")]
    rows += [[row | {"method": 3}], [row | {"test": {"mean": 10**400, "n": 1}}]]
    texts = [json.dumps({"dataset": name, "rows": [row]}) for name in (3, None, ["two"])]
    texts += [json.dumps({"dataset": "two", "rows": rows}) for rows in rows]
    for text in ("{", "[]", '{"rows": []}', "[" * 10**5, *texts):
        bad.write_text(text)
        sentence = r"bad\.json (cannot be read|is no table of a comp).*write it anew"
        with pytest.raises(UserError, match=sentence):
            compare.main(["--join", good, str(bad)])
    with pytest.raises(UserError, match="one file of a dataset, not those of one, one"):
        compare.main(["--join", good, good])


# ---- What the pages show ----


@pytest.mark.parametrize("dataset", ["digits", "av-digits", "synthetic"])
def test_rows_of_the_results_are_those_of_their_runs(dataset):
    record = json.loads((RESULTS / f"compare_{dataset}.json").read_text())
    rows = compare.readable(compare.tabulate(read_rows(RESULTS / f"compare_{dataset}.csv")))
    assert record["rows"] == rows and len(record["seeds"]) >= 5


def test_the_joined_table_of_the_results_is_that_of_its_parts():
    record = json.loads((RESULTS / "compare.json").read_text())
    files = [RESULTS / f"compare_{name}.json" for name in record["datasets"]]
    assert record["rows"] == compare.join([json.loads(path.read_text()) for path in files])
