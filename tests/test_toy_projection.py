"""toy_projection.py: projections, data, the axis of runs, MHM's phases, tables, figures."""

import json
import re
from itertools import pairwise, product
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT

import toy_projection as toy
from common.errors import UserError
from common.seeding import make_generator
from experiments import toy_projection as tables
from experiments.grid import read_rows
from experiments.toy_figures import draw_error_bars

SMALL = {"dataset": "moons", "set": "A", "fusion": "intermediate", "method": "mhm", "heads": 3}
SMALL |= {"seeds": [0], "device": torch.device("cpu"), **toy.REGIMES["table1"]["moons"]}
BATCHES = {"optimizer": "sgd", "epochs": 2}
FULL = {"optimizer": "adam", "epochs": 4, "lr": 0.01, "batch_size": None}
TINY = ["--epochs", "2", "--seeds", "0", "1"]


def make(**settings):
    """A configuration, its network and its training data."""
    config = SimpleNamespace(**SMALL | settings)
    splits = toy.draw_splits(config.dataset, config.noise, config.seeds)
    return config, toy.build_network(config), *toy.observe(splits, config)["train"]


# ---- Projection and data ----


def test_projection_by_hand():
    t = toy.project(torch.tensor([[3.0, 1.0]]), [((1, 0), (-1, 1)), ((0, 0), (2, 1))])
    assert t.tolist() == [pytest.approx([-0.5, 1.4])]  # (-2 + 1) / 2 and (6 + 1) / 5


def test_the_sets_are_those_of_the_paper():
    moons, roll = toy.SETS["moons"], toy.SETS["swiss-roll"]
    assert moons["A"] == [((1, 0), (-1, 1)), ((0, 0), (1, 0))]
    assert moons["B"] == [((1, 0), (-1, 1)), ((0, 0), (2, 1))]
    assert [p for p, _ in roll["A"]] == [(1, 0, 0), (1, 0, 0), (0, 1, 0)]
    assert [v for _, v in roll["A"]] == [(0, -1, 0), (1, 0, -1), (0, 1, -1)]
    assert roll["B"] == [((0, 0, 0), v) for v in ((1, 1, 1), (1, 2, 1), (1, 4, 1))]


@pytest.mark.parametrize(("dataset", "name"), [*product(toy.SETS, "CAB")])
def test_the_foot_of_the_projection_is_orthogonal(dataset, name):
    lines = torch.tensor(toy.SETS[dataset][name], dtype=torch.float64)
    x, _ = toy.draw_points(dataset, 20, 0.1, seed=0)
    t = toy.project(x, toy.SETS[dataset][name])
    assert t.shape == (len(x), len(lines)) and torch.equal(t, x) == (name == "C")  # Cartesian
    for i, (p, v) in enumerate(lines):
        assert ((x - p - t[:, i : i + 1] * v) @ v).abs().max() < 1e-10
    loses_information = (dataset, name) == ("swiss-roll", "B")
    assert torch.linalg.matrix_rank(lines[:, 1]) == len(lines) - loses_information


@pytest.mark.parametrize(("dataset", "classes", "space"), [("moons", 2, 2), ("swiss-roll", 4, 3)])
def test_class_and_split_sizes(dataset, classes, space):
    splits = toy.draw_splits(dataset, 0.1, [0, 1, 2])
    for part, per_class in {"train": 90, "test": 10, "fresh": 500}.items():
        x, y = splits[part]
        assert x.shape == (3, classes * per_class, space)
        assert all(torch.bincount(run).tolist() == [per_class] * classes for run in y)
    joined = torch.cat([splits["train"][0], splits["test"][0]], dim=1)
    assert all(len(run.unique(dim=0)) == classes * 100 for run in joined)
    assert not torch.equal(joined[0], joined[1])
    assert torch.equal(splits["test"][0][2], toy.draw_splits(dataset, 0.1, [2])["test"][0][0])


def test_swiss_roll_classes_are_quarters_of_the_angle():
    x, y = toy.draw_points("swiss-roll", 50, 0.0, seed=3)
    angle = x[:, :2].norm(dim=1)
    assert torch.equal(((angle - 1.5 * torch.pi) / (0.75 * torch.pi)).floor().long(), y)
    assert x[:, 2].min() >= 0 and x[:, 2].max() <= 21
    torch.testing.assert_close(x[:, 0], angle * angle.cos())


# ---- Folds and phases ----


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
        mhm = [(head_set, [theta, psi]), (embedding_set, [theta, phi])]
        assert toy.phases("mhm", *sets) == mhm
        assert toy.phases("mhm-no-freeze", *sets) == [(head_set, every), (embedding_set, every)]
        ((samples, learning),) = toy.phases("joint", *sets)
        assert samples.tolist() == [[0, 0, 1]] and learning == every


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_heads_take_turns_and_frozen_modules_do_not_move_by_one_bit(monkeypatch, optimizer):
    config, network, t, y = make(epochs=4, optimizer=optimizer)
    phases, snapshots = toy.phases, []

    def spy(*args):
        for phase in phases(*args):
            snapshots.append({n: p.clone() for n, p in network.named_parameters()})
            yield phase

    monkeypatch.setattr(toy, "phases", spy)
    assert toy.train(network, t, y, config) == 0  # the head trained last
    pairs = pairwise([*snapshots, dict(network.named_parameters())])
    moved = [{n.rpartition(".")[0] for n in a if not torch.equal(a[n], b[n])} for a, b in pairs]
    assert moved == [s for k in (0, 1, 2, 0) for s in ({"theta", f"psi.{k}"}, {"theta", "phi"})]


# ---- The axis of runs ----


@pytest.mark.parametrize("regime", [BATCHES, FULL], ids=["batches", "full batch"])
@pytest.mark.parametrize(("method", "fusion"), [*product(toy.METHODS, toy.FUSIONS)])
def test_runs_together_equal_runs_alone_bit_for_bit(fusion, method, regime):
    regime = {"fusion": fusion, "method": method, "heads": 1 + (method != "joint"), **regime}
    config, together, t, y = make(seeds=[0, 8], **regime)
    toy.train(together, t, y, config)
    for run, seed in enumerate(config.seeds):
        config, alone, t1, y1 = make(seeds=[seed], **regime)
        toy.train(alone, t1, y1, config)
        assert torch.equal(t1[0], t[run])
        for (name, many), one in zip(together.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(many[run], one[0]), name


def plain_logits(fusion, t, theta, phi, psi):
    """Of one run, as anybody would write it; a module has (weight, bias) for each modality."""
    x = [t] if fusion == "early" else t.split(1, dim=1)
    z = [F.relu(x @ weight + bias) for x, weight, bias in zip(x, *theta, strict=True)]
    z = [torch.cat(z, dim=1)] if fusion == "intermediate" else z
    z = [F.relu(z @ weight + bias) for z, weight, bias in zip(z, *phi, strict=True)]
    return sum(z @ weight + bias for z, weight, bias in zip(z, *psi, strict=True)) / len(z)


@pytest.mark.parametrize(("method", "optimizer"), [*product(["joint", "mhm"], ["sgd", "adam"])])
@pytest.mark.parametrize("fusion", toy.FUSIONS)
def test_a_plain_network_trained_alone_is_the_same(fusion, optimizer, method):
    """float64, 30 full-batch steps or more, to 1e-10."""
    heads = 1 if method == "joint" else 2
    regime = {**FULL, "optimizer": optimizer, "lr": 0.05, "epochs": 30, "heads": heads}
    config, network, t, y = make(fusion=fusion, method=method, **regime)
    layers, t = (network.double().theta, network.phi, *network.psi), t.double()
    plain = [[p[0].detach().clone().requires_grad_() for p in m.parameters()] for m in layers]
    toy.train(network, t, y, config)
    build = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    optimizers = [build(module, lr=0.05) for module in plain]
    order = torch.randperm(180, generator=make_generator(0, "folds"))
    first, second = order.tensor_split(2)
    for epoch in range(30):
        k = epoch % heads
        head_set, embedding_set = ((second, first), (first, second))[k]
        plan = [(head_set, {0, 2 + k}), (embedding_set, {0, 1})]
        for samples, learning in plan if method == "mhm" else [(order, {0, 1, 2})]:
            logits = plain_logits(fusion, t[0, samples], *plain[:2], plain[2 + k])
            for each in optimizers:
                each.zero_grad()
            F.cross_entropy(logits, y[0, samples]).backward()
            for i in learning:
                optimizers[i].step()
    for mine, theirs in zip(network.parameters(), sum(plain, []), strict=True):
        torch.testing.assert_close(mine[0], theirs, rtol=0, atol=1e-10)


def test_initialisation_is_torchs_default():
    config = SimpleNamespace(**SMALL | {"seeds": list(range(200))})
    weight = toy.build_network(config).phi.weight.detach()  # 16 inputs
    assert weight.abs().max() <= 1 / 4
    assert weight.std() == pytest.approx(1 / 4 / 3**0.5, rel=0.02)


# ---- Command line, tables, figures ----


def test_every_cell_and_the_figure_of_its_errors(tmp_path):
    result = toy.main(["--regime", "overtrained", *TINY, "--out", str(tmp_path)])
    assert len(result["table"]) == 2 * (9 + 12) and len(result["runs"]) == 2 * 2 * (9 + 12)
    for run in result["runs"]:
        assert tuple(run) == (*toy.CELL, "seed", *toy.ERRORS)
        assert run["gap"] == run["test"] - run["train"]
        assert run["fresh gap"] == run["fresh"] - run["train"]
    for (*_, method), (_, head) in result["networks"].items():
        assert head == (method != "joint")  # the one trained last, in the second of two epochs
    table1, table2, differences = tables.summarize(result["runs"]).values()
    assert (len(table1), len(table2), len(differences)) == (2 * 9, 2 * 2 * 9, 2 * 2 * 6)
    for axis in draw_error_bars(table1 + table2).axes:
        rows = [row for row in table1 + table2 if row["dataset"] == axis.get_title()]
        heights = {round(bar.get_height(), 9) for bar in axis.patches}
        assert heights == {round(row["test"]["mean"], 9) for row in rows}
        printed = {(r["set"], r["fusion"], r["method"], r["paper's test"] or "") for r in rows}
        values = [float(number) for *_, text in printed for number in re.findall(r"[\d.]+", text)]
        diamonds = [line.get_ydata()[0] for line in axis.lines if line.get_marker() == "D"]
        assert sorted(diamonds) == sorted(values)


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
    with monkeypatch.context() as patch:
        patch.setattr(toy, "train", lambda *args: pytest.fail("trained again"))
        assert toy.main(words)["runs"] == runs and tables.main(["tables", *words]) == record
        for main, name in ((toy.main, []), (tables.main, ["tables"])):
            with pytest.raises(pytest.fail.Exception):
                main([*name, *words, "--overwrite"])
    out = capsys.readouterr().out
    assert all(text in out for text in ("Table 1", "Table 2", "Differences", "27.5 or 17.5"))


@pytest.mark.parametrize("name", list(toy.REGIMES))
def test_results_follow_from_their_runs(name):
    record = json.loads((ROOT / f"results/toy_{name}.json").read_text())
    assert record.items() >= tables.summarize(read_rows(ROOT / f"results/toy_{name}.csv")).items()


def test_both_printed_values_where_the_paper_contradicts_itself():
    paper = tables.paper_errors()
    assert paper["moons", "A", "late", "joint", "test"] == "27.5 or 17.5"
    assert paper["swiss-roll", "B", "intermediate", "joint", "gap"] == "6.7 or 7.7"
    assert len([value for value in paper.values() if " or " in value]) == 2
    assert paper["swiss-roll", "B", "late", "mhm", "test"] == "23.4"
    assert ("moons", "C", "early", "mhm", "test") not in paper


def test_regions_keep_the_third_coordinate_at_its_mean():
    network = make(dataset="swiss-roll", set="B", fusion="early", seeds=[0, 1])[1]
    t = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    x, y, classes = tables.regions(network, 2, t, size=7)
    point = torch.tensor([[x[2], y[5], t[:, 2].mean()]])
    assert classes[5, 2] == network(point.expand(2, 1, 3), 2)[0].argmax()


def test_mistakes_are_named(tmp_path, capsys):
    for words, sentence in {
        "--heads 1": "must be a whole number at least 2, not '1'",
        "--epochs 0": "must be a whole number at least 1, not '0'",
        "--dataset circles": "invalid choice: 'circles'",
        "--regime none": "invalid choice: 'none'",
    }.items():
        with pytest.raises(SystemExit, match="2"):
            toy.main(words.split())
        assert sentence in capsys.readouterr().err
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="Cannot make the folder"):
        toy.main(["--out", str(tmp_path / "file")])


def test_method_block_runs_when_cut_out():
    text = (ROOT / "toy_projection.py").read_text()
    exec(re.search("# ---- Method ----(.*?)# ---- Data ----", text, re.DOTALL)[1], names := {})
    network = names["ToyNetwork"]("late", 2, 3, 4, 5, heads=2)
    assert network(torch.zeros(2, 6, 3), head=1).shape == (2, 6, 4)


@pytest.mark.slow
def test_what_the_study_shows_safely(tmp_path):
    """Swiss set B is far worse than C; over-training leaves MHM a smaller gap than joint has."""
    words = ["--seeds", *"01234567", "--out", str(tmp_path), "--dataset"]
    rows = toy.main([*words, "swiss-roll", "--method", "joint"])["table"]
    fresh = {(row["set"], row["fusion"]): row["fresh"]["mean"] for row in rows}
    assert all(fresh["B", fusion] > fresh["C", fusion] + 10 for fusion in toy.FUSIONS)
    rows = toy.main([*words, "moons", "--regime", "overtrained"])["table"]
    gap = {(row["set"], row["fusion"], row["method"]): row["fresh gap"]["mean"] for row in rows}
    for name in "AB":
        assert gap[name, "intermediate", "mhm"] < gap[name, "intermediate", "joint"]
