"""toy_projection.py: projections, data, the axis of runs, MHM's phases, tables, figures."""

import json
import math
import re
from itertools import chain, pairwise, product
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from plain_toy import copy_weights, train_plain

import toy_projection as toy
from common.errors import UserError
from common.seeding import make_generator
from experiments import toy_projection as tables
from experiments.grid import read_rows

SMALL = {"dataset": "moons", "set": "A", "seeds": [0], "device": torch.device("cpu")}
SMALL |= toy.REGIMES["table1"]["moons"]
TINY = ["--epochs", "2", "--seeds", "0", "1"]


def make(fusion="intermediate", method="mhm", **settings):
    """A configuration, its network and its training data."""
    cell = {"fusion": fusion, "method": method, "heads": 1 if method == "joint" else 2}
    config = SimpleNamespace(**SMALL | cell | settings)
    splits = toy.draw_splits(config.dataset, config.noise, config.seeds)
    return config, toy.build_network(config), *toy.observe(splits, config)["train"]


def test_the_sets_are_those_of_the_paper():
    moons, roll = toy.SETS["moons"], toy.SETS["swiss-roll"]
    assert moons["A"] == [((1, 0), (-1, 1)), ((0, 0), (1, 0))]
    assert moons["B"] == [((1, 0), (-1, 1)), ((0, 0), (2, 1))]
    assert [p for p, _ in roll["A"]] == [(1, 0, 0), (1, 0, 0), (0, 1, 0)]
    assert [v for _, v in roll["A"]] == [(0, -1, 0), (1, 0, -1), (0, 1, -1)]
    assert roll["B"] == [((0, 0, 0), v) for v in ((1, 1, 1), (1, 2, 1), (1, 4, 1))]
    t = toy.project(torch.tensor([[3.0, 1.0]]), moons["B"])
    assert t.tolist() == [pytest.approx([-0.5, 1.4])]  # by hand: (-2 + 1) / 2 and (6 + 1) / 5


@pytest.mark.parametrize(("dataset", "name"), [*product(toy.SETS, "CAB")])
def test_the_foot_of_the_projection_is_orthogonal(dataset, name):
    lines = torch.tensor(toy.SETS[dataset][name], dtype=torch.float64)
    x, _ = toy.draw_points(dataset, 20, 0.1, seed=0)
    t = toy.project(x, toy.SETS[dataset][name])
    assert t.shape == (len(x), len(lines)) and torch.equal(t, x) == (name == "C")  # Cartesian
    for i, (p, v) in enumerate(lines):
        assert ((x - p - t[:, i : i + 1] * v) @ v).abs().max() < 1e-10
    lost = (dataset, name) == ("swiss-roll", "B")  # a dimension: the only set that loses any
    assert torch.linalg.matrix_rank(lines[:, 1]) == len(lines) - lost


@pytest.mark.parametrize(("dataset", "classes", "noise"), [("moons", 2, 0.1), ("swiss-roll", 4, 0)])
def test_splits_and_classes(dataset, classes, noise):
    splits = toy.draw_splits(dataset, noise, [0, 1, 2])
    for part, per_class in {"train": 90, "test": 10, "fresh": 500}.items():
        x, y = splits[part]
        assert x.shape == (3, classes * per_class, 2 if dataset == "moons" else 3)
        assert all(torch.bincount(run).tolist() == [per_class] * classes for run in y)
        if dataset == "swiss-roll":  # the classes are quarters of the angle
            angle = x[..., :2].norm(dim=2)
            assert torch.equal(((angle - 1.5 * torch.pi) / (0.75 * torch.pi)).floor().long(), y)
            assert x[..., 2].min() >= 0 and x[..., 2].max() <= 21
            torch.testing.assert_close(x[..., 0], angle * angle.cos())
    joined = torch.cat([splits["train"][0], splits["test"][0]], dim=1)
    assert all(len(run.unique(dim=0)) == classes * 100 for run in joined)
    assert not torch.equal(joined[0], joined[1])
    assert torch.equal(splits["test"][0][2], toy.draw_splits(dataset, noise, [2])["test"][0][0])


@pytest.mark.parametrize(("heads", "samples"), [*product([2, 3, 4, 5], [20, 23])])
def test_fold_algebra(heads, samples):
    sets = toy.draw_sets(samples, SimpleNamespace(**SMALL | {"heads": heads, "seeds": [3, 5]}))
    everything = torch.arange(samples).expand(2, -1)  # for both runs
    parts = [*map(torch.hstack, sets), torch.hstack([e for _, e in sets])]
    assert all(torch.equal(part.sort().values, everything) for part in parts)
    assert len(sets) == heads and not torch.equal(sets[0][1][0], sets[0][1][1])
    assert {e.shape[1] for _, e in sets} <= {samples // heads, samples // heads + 1}


def test_phases_follow_eq_2_and_eq_3():
    network, head_set, embedding_set = make()[1], torch.zeros(1, 2), torch.ones(1, 1)
    theta, phi = network.theta, network.phi
    for k, psi in enumerate(network.psi):
        sets, every = (network, head_set, embedding_set, k), [theta, phi, psi]
        assert toy.phases("mhm", *sets) == [(head_set, [theta, psi]), (embedding_set, [theta, phi])]
        assert toy.phases("mhm-no-freeze", *sets) == [(head_set, every), (embedding_set, every)]
        ((samples, learning),) = toy.phases("joint", *sets)
        assert samples.tolist() == [[0, 0, 1]] and learning == every


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_heads_take_turns_and_frozen_modules_do_not_move_by_one_bit(monkeypatch, optimizer):
    config, network, t, y = make(epochs=4, heads=3, optimizer=optimizer)
    phases, snapshots = toy.phases, []

    def before(phase):
        snapshots.append({n: p.clone() for n, p in network.named_parameters()})
        return phase

    monkeypatch.setattr(toy, "phases", lambda *args: map(before, phases(*args)))
    assert toy.train(network, t, y, config) == 0  # the head trained last
    pairs = pairwise([*snapshots, dict(network.named_parameters())])
    moved = [{n.rpartition(".")[0] for n in a if not torch.equal(a[n], b[n])} for a, b in pairs]
    assert moved == [s for k in (0, 1, 2, 0) for s in ({"theta", f"psi.{k}"}, {"theta", "phi"})]


@pytest.mark.parametrize(("optimizer", "batch_size"), [("sgd", 16), ("adam", None)])
@pytest.mark.parametrize(("method", "fusion"), [*product(toy.METHODS, toy.FUSIONS)])
def test_runs_together_equal_runs_alone_bit_for_bit(fusion, method, optimizer, batch_size):
    regime = {"optimizer": optimizer, "batch_size": batch_size, "epochs": 3}
    config, together, t, y = make(fusion, method, seeds=[0, 8], **regime)
    toy.train(together, t, y, config)
    for run, seed in enumerate(config.seeds):
        config, alone, t1, y1 = make(fusion, method, seeds=[seed], **regime)
        toy.train(alone, t1, y1, config)
        assert torch.equal(t1[0], t[run])
        for (name, many), one in zip(together.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(many[run], one[0]), name


@pytest.mark.parametrize(("method", "optimizer"), [*product(["joint", "mhm"], ["sgd", "adam"])])
@pytest.mark.parametrize("fusion", toy.FUSIONS)
def test_a_plain_network_trained_alone_is_the_same(fusion, optimizer, method):
    """float64, 30 full-batch steps or more, to 1e-10."""
    regime = {"optimizer": optimizer, "lr": 0.05, "epochs": 30, "batch_size": None}
    config, network, t, y = make(fusion, method, **regime)
    plain, t = copy_weights(network.double()), t.double()
    toy.train(network, t, y, config)
    order = torch.randperm(180, generator=make_generator(0, "folds"))
    train_plain(fusion, method, plain, t[0], y[0], order, optimizer, lr=0.05, epochs=30)
    for mine, theirs in zip(network.parameters(), chain(*plain), strict=True):
        torch.testing.assert_close(mine[0], theirs, rtol=0, atol=1e-10)


def test_initialisation_is_torchs_default():
    weight = make(seeds=range(100))[1].phi.weight.detach()  # 16 inputs
    assert weight.abs().max() <= 1 / 4
    assert weight.std() == pytest.approx(1 / 4 / 3**0.5, rel=0.02)


def test_every_cell_and_the_figure_of_its_errors(tmp_path):
    result = toy.main(["--regime", "overtrained", *TINY, "--out", str(tmp_path)])
    assert len(result["table"]) == 2 * (9 + 12) and len(result["runs"]) == 2 * 2 * (9 + 12)
    for run in result["runs"]:
        assert tuple(run) == (*toy.CELL, "seed", *toy.ERRORS)
        test, train, gap, fresh, fresh_gap = (run[name] for name in toy.ERRORS)
        assert (gap, fresh_gap) == (test - train, fresh - train)
    for (*_, method), (_, head) in result["networks"].items():
        assert head == (method != "joint")  # the one trained last, in the second of two epochs
    table1, table2, differences = tables.summarize(result["runs"]).values()
    assert (len(table1), len(table2), len(differences)) == (2 * 9, 2 * 2 * 9, 2 * 2 * 6)
    for axis in tables.draw_error_bars(table1 + table2).axes:
        rows = {tuple(row[name] for name in toy.CELL): row for row in table1 + table2}
        rows = [row for (dataset, *_), row in rows.items() if dataset == axis.get_title()]
        assert [bar.get_height() for bar in axis.patches] == [row["test"]["mean"] for row in rows]
        printed = re.findall(r"[\d.]+", " ".join(row["paper's test"] or "" for row in rows))
        diamonds = [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "D"]
        assert diamonds == [float(number) for number in printed]


def test_tables_are_written_once(tmp_path, capsys, monkeypatch):
    words = ["--method", "joint", "mhm", *TINY, "--out", str(tmp_path)]
    record = tables.main(["tables", *words])
    folder = tmp_path / "toy_projection" / "table1-method=joint,mhm-epochs=2-seeds=0-1"
    names = {f"{dataset}-{kind}.png" for dataset in toy.SETS for kind in ("data", "regions")}
    names |= {"errors.png", "errors.json", "rows.csv", "table.json"}
    assert {path.name for path in folder.iterdir()} == names
    assert json.loads((folder / "table.json").read_text()) == record and "runs" not in record
    runs = read_rows(folder / "rows.csv")
    assert record.items() >= tables.summarize(runs).items()
    monkeypatch.setattr(toy, "train", lambda *args: pytest.fail("trained again"))
    again = zip(toy.main(words)["runs"], runs, strict=True)
    assert all(run.items() >= row.items() for run, row in again)
    assert tables.main(["tables", *words]) == record
    printed = "Table 1.*27.5 or 17.5.*Table 2.*Differences"
    assert re.search(printed, capsys.readouterr().out, re.DOTALL)
    for main, name in ((toy.main, []), (tables.main, ["tables"])):
        with pytest.raises(pytest.fail.Exception):
            main([*name, *words, "--overwrite"])


def test_files_of_another_run_or_version_are_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(tables, "draw_figures", lambda *_: {})
    words = ["--dataset", "moons", "--method", "joint", *TINY, "--out", str(tmp_path)]
    tables.main(["tables", *words])
    missing = {"errors": ("runs", math.nan), "table": ("table2", {"mean": None, "n": 2})}
    for name, (part, value) in missing.items():
        (path,) = tmp_path.glob(f"toy_projection/*/{name}.json")
        record = json.loads(path.read_text())
        lacking = [{**row, "test": value} for row in record[part]]
        changes = [{"arguments": record["arguments"] | {"seeds": [7, 8]}}, {"arguments": None}]
        for change in [*changes, *({part: x} for x in (1, [1], [{}], lacking))]:
            path.write_text(json.dumps(record | change))
            with pytest.raises(UserError, match=rf"{name}.json .*another (ver|conf).*--overwrite"):
                toy.main(words) if name == "errors" else tables.main(["tables", *words])


def test_results_follow_from_their_runs_and_the_paper():
    for name in (f"toy_{regime}" for regime in toy.REGIMES):
        record = json.loads((ROOT / f"results/{name}.json").read_text())
        assert record.items() >= tables.summarize(read_rows(ROOT / f"results/{name}.csv")).items()
    paper = tables.paper_errors()  # both values where it contradicts itself
    assert paper["moons", "A", "late", "joint", "test"] == "27.5 or 17.5"
    assert paper["swiss-roll", "B", "intermediate", "joint", "gap"] == "6.7 or 7.7"
    assert sum(" or " in value for value in paper.values()) == 2
    assert paper["swiss-roll", "B", "late", "mhm", "test"] == "23.4"
    assert ("moons", "C", "early", "mhm", "test") not in paper


def test_regions_keep_the_third_coordinate_at_its_mean():
    _, network, (t, _), _ = make("early", dataset="swiss-roll", set="B", seeds=[0, 1])
    x, y, classes = tables.regions(network, 1, t, size=7)
    point = torch.tensor([[x[2], y[5], t[:, 2].mean()]])
    assert classes[5, 2] == network(point.expand(2, 1, 3), 1)[0].argmax()


def test_mistakes_are_named(capsys):
    sentences = {f"--heads {k}": f"at least 2 and at most 180, not '{k}'" for k in (1, 181)}
    sentences |= {"--epochs 0": "at least 1, not '0'"}
    sentences |= {f"--{k} none": "invalid choice: 'none'" for k in ("dataset", "method", "regime")}
    for words, sentence in sentences.items():
        with pytest.raises(SystemExit, match="2"):
            toy.main(words.split())
        assert sentence in capsys.readouterr().err
    refused = {f"--out={ROOT / 'LICENSE'}": "Cannot make the folder"}
    for word, sentence in (refused | {"--experiment=tables": "Tables have a command"}).items():
        with pytest.raises(UserError, match=sentence):
            toy.main([word])


@pytest.mark.slow
def test_set_b_of_the_roll_is_bad_and_overtrained_mhm_has_a_smaller_gap(tmp_path, monkeypatch):
    words = ["--seeds", *"01234567", "--out", str(tmp_path), "--method", "joint"]
    table = toy.main([*words, "--dataset", "swiss-roll", "--epochs", "30"])["table"]
    fresh = {(row["set"], row["fusion"]): row["fresh"]["mean"] for row in table}
    assert all(fresh["B", fusion] > fresh["C", fusion] + 10 for fusion in toy.FUSIONS)
    monkeypatch.setattr(toy, "FUSIONS", ["intermediate"])
    words += ["mhm", "--dataset", "moons", "--regime", "overtrained", "--epochs", "200"]
    table = toy.main(words)["table"]
    gap = {(row["set"], row["method"]): row["fresh gap"]["mean"] for row in table}
    assert all(gap[name, "mhm"] < gap[name, "joint"] for name in "AB")
