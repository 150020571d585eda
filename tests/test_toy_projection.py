"""toy_projection.py: projections, data, the batch axis of runs, MHM's phases, tables, figures."""

import itertools
import json
import re

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import toy_projection as toy
from common.errors import UserError
from common.seeding import make_generator

CPU = torch.device("cpu")
SMALL = {"noise": 0.2, "hidden": 8, "optimizer": "sgd", "lr": 0.1, "batch_size": 16, "epochs": 3}
FULL = {**SMALL, "optimizer": "adam", "lr": 0.01, "batch_size": None, "epochs": 6}


# ---- Projection and data ----


@pytest.mark.parametrize("dataset", list(toy.SETS))
@pytest.mark.parametrize("name", ["C", "A", "B"])
def test_the_foot_of_the_projection_is_orthogonal(dataset, name):
    lines = toy.SETS[dataset][name]
    x, _ = toy.draw_points(dataset, 20, 0.1, seed=0)
    t = toy.project(x, lines)
    assert t.shape == (len(x), len(lines))
    for i, (p, v) in enumerate(lines):
        p, v = torch.tensor(p, dtype=x.dtype), torch.tensor(v, dtype=x.dtype)
        foot = p + t[:, i : i + 1] * v
        torch.testing.assert_close((x - foot) @ v, torch.zeros(len(x), dtype=x.dtype))


def test_projection_by_hand():
    t = toy.project(torch.tensor([[3.0, 1.0]]), [((1, 0), (-1, 1)), ((0, 0), (2, 1))])
    assert t.tolist() == [pytest.approx([-0.5, 1.4])]  # (-2 + 1) / 2 and (6 + 1) / 5


def test_the_sets_are_those_of_the_paper():
    a, b = toy.SETS["moons"]["A"], toy.SETS["moons"]["B"]
    assert a == [((1, 0), (-1, 1)), ((0, 0), (1, 0))]
    assert b == [((1, 0), (-1, 1)), ((0, 0), (2, 1))]
    a, b = toy.SETS["swiss-roll"]["A"], toy.SETS["swiss-roll"]["B"]
    assert a == [((1, 0, 0), (0, -1, 0)), ((1, 0, 0), (1, 0, -1)), ((0, 1, 0), (0, 1, -1))]
    assert b == [((0, 0, 0), v) for v in ((1, 1, 1), (1, 2, 1), (1, 4, 1))]
    x, _ = toy.draw_points("swiss-roll", 5, 0.0, seed=0)
    assert torch.equal(toy.project(x, toy.SETS["swiss-roll"]["C"]), x)  # Cartesian


def test_only_set_b_of_the_swiss_roll_loses_information():
    ranks = {
        (dataset, name): int(torch.linalg.matrix_rank(torch.tensor([v for _, v in lines]) * 1.0))
        for dataset, sets in toy.SETS.items()
        for name, lines in sets.items()
    }
    assert ranks.pop(("swiss-roll", "B")) == 2
    assert all(rank == len(toy.SETS[dataset]["C"]) for (dataset, _), rank in ranks.items())


@pytest.mark.parametrize(("dataset", "classes"), [("moons", 2), ("swiss-roll", 4)])
def test_class_and_split_sizes(dataset, classes):
    splits = toy.draw_splits(dataset, 0.1, [0, 1, 2], CPU)
    for part, per_class in {"train": 90, "test": 10, "fresh": 500}.items():
        x, y = splits[part]
        assert x.shape == (3, classes * per_class, classes if classes == 2 else 3)
        assert all(torch.bincount(run).tolist() == [per_class] * classes for run in y)
    joined = torch.cat([splits["train"][0], splits["test"][0]], dim=1)
    assert all(len(run.unique(dim=0)) == classes * 100 for run in joined)
    assert not torch.equal(joined[0], joined[1])
    assert torch.equal(splits["test"][0][2], toy.draw_splits(dataset, 0.1, [2], CPU)["test"][0][0])


def test_swiss_roll_classes_are_quarters_of_the_angle():
    x, y = toy.draw_points("swiss-roll", 50, 0.0, seed=3)
    angle = x[:, :2].norm(dim=1)
    quarter = ((angle - 1.5 * torch.pi) / (0.75 * torch.pi)).floor().long()
    assert torch.equal(quarter, y)
    assert x[:, 2].min() >= 0 and x[:, 2].max() <= 21
    torch.testing.assert_close(x[:, 0], angle * angle.cos())


# ---- Folds and phases ----


@pytest.mark.parametrize("heads", [2, 3, 4, 5])
@pytest.mark.parametrize("samples", [20, 23])
def test_fold_algebra(heads, samples):
    order = torch.randperm(samples)
    pairs = toy.split_folds(order, heads)
    assert len(pairs) == heads
    sizes = [len(embedding) for _, embedding in pairs]
    assert max(sizes) - min(sizes) <= 1
    for head_set, embedding_set in pairs:
        assert sorted(torch.cat([head_set, embedding_set]).tolist()) == list(range(samples))
    assert sorted(torch.cat([embedding for _, embedding in pairs]).tolist()) == list(range(samples))


def make(fusion="intermediate", heads=3, seeds=(0,), dtype=torch.float64):
    """A network and its training data on set A of the moons."""
    lines = toy.SETS["moons"]["A"]
    network = toy.build_network(fusion, lines, "moons", 8, heads, list(seeds), CPU, dtype)
    x, y = toy.draw_splits("moons", 0.2, list(seeds), CPU)["train"]
    return network, toy.project(x, lines).to(dtype), y


def test_phases_follow_eq_2_and_eq_3():
    network, *_ = make(heads=3)
    sets = [(torch.full((1, 2), k), torch.full((1, 1), k + 10)) for k in range(3)]
    theta, phi, psi = network.theta, network.phi, network.psi
    for epoch in range(5):
        k = epoch % 3
        (head, members, trained), (head2, members2, trained2) = toy.phases(
            "mhm", network, sets, epoch
        )
        assert head == head2 == k
        assert (members[0, 0], members2[0, 0]) == (k, k + 10)
        assert trained == [theta, psi[k]] and trained2 == [theta, phi]
        assert [p[2] for p in toy.phases("mhm-no-freeze", network, sets, epoch)] == [
            [theta, phi, psi[k]]
        ] * 2


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_frozen_modules_do_not_move_by_one_bit(monkeypatch, optimizer):
    network, t, y = make(heads=3)
    snapshots = []
    original = toy.phases

    def spy(method, network, sets, epoch):
        plan = original(method, network, sets, epoch)
        for phase in plan:
            snapshots.append({n: p.clone() for n, p in network.named_parameters()})
            yield phase

    monkeypatch.setattr(toy, "phases", spy)
    toy.train(network, "mhm", t, y, {**SMALL, "optimizer": optimizer}, [0])
    snapshots.append({n: p.clone() for n, p in network.named_parameters()})
    moved = [
        {name.rpartition(".")[0] for name in a if not torch.equal(a[name], b[name])}
        for a, b in itertools.pairwise(snapshots)
    ]
    expected = [s for k in range(3) for s in ({"theta", f"psi.{k}"}, {"theta", "phi"})]
    assert moved == expected


# ---- The batch axis of runs ----


@pytest.mark.parametrize("regime", [SMALL, FULL], ids=["batches", "full batch"])
@pytest.mark.parametrize("method", toy.METHODS)
@pytest.mark.parametrize("fusion", toy.FUSIONS)
def test_runs_together_equal_runs_alone_bit_for_bit(fusion, method, regime):
    seeds = [0, 3, 8]
    heads = 1 if method == "joint" else 2
    together, t, y = make(fusion, heads, seeds, torch.float32)
    toy.train(together, method, t, y, regime, seeds)
    for run, seed in enumerate(seeds):
        alone, t1, y1 = make(fusion, heads, [seed], torch.float32)
        assert torch.equal(t1[0], t[run])
        toy.train(alone, method, t1, y1, regime, [seed])
        for (name, many), one in zip(together.named_parameters(), alone.parameters(), strict=True):
            assert torch.equal(many[run], one[0]), name


class PlainToy(nn.Module):
    """The three toy networks as anybody would write them for one run."""

    def __init__(self, fusion, modalities, hidden, classes, heads):
        super().__init__()
        groups = 1 if fusion == "early" else modalities
        branches = modalities if fusion == "late" else 1
        self.fusion = fusion
        self.theta = nn.ModuleList(nn.Linear(modalities // groups, hidden) for _ in range(groups))
        self.phi = nn.ModuleList(
            nn.Linear(hidden * groups // branches, hidden) for _ in range(branches)
        )
        self.psi = nn.ModuleList(
            nn.ModuleList(nn.Linear(hidden, classes) for _ in range(branches)) for _ in range(heads)
        )

    def forward(self, t, head):
        parts = [t] if self.fusion == "early" else list(t.split(1, dim=1))
        z = [F.relu(layer(part)) for layer, part in zip(self.theta, parts, strict=True)]
        if self.fusion == "intermediate":
            z = [torch.cat(z, dim=1)]
        z = [F.relu(layer(part)) for layer, part in zip(self.phi, z, strict=True)]
        logits = [layer(part) for layer, part in zip(self.psi[head], z, strict=True)]
        return torch.stack(logits).mean(dim=0)


def copy_weights(network, plain):
    for mine, theirs in [
        (network.theta, plain.theta),
        (network.phi, plain.phi),
        *zip(network.psi, plain.psi, strict=True),
    ]:
        for group, layer in enumerate(theirs):
            with torch.no_grad():
                layer.weight.copy_(mine.weight[0, group].T)
                layer.bias.copy_(mine.bias[0, group, 0])


@pytest.mark.parametrize("method", ["joint", "mhm"])
@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("fusion", toy.FUSIONS)
def test_a_plain_module_trained_alone_is_the_same(fusion, optimizer, method):
    """float64, 50 epochs of full-batch steps or more, to 1e-10."""
    heads = 1 if method == "joint" else 2
    network, t, y = make(fusion, heads)
    plain = PlainToy(fusion, 2, 8, 2, heads).double()
    copy_weights(network, plain)
    regime = {**FULL, "optimizer": optimizer, "epochs": 50, "lr": 0.05}
    toy.train(network, method, t, y, regime, [0])

    build = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam}[optimizer]
    modules = [plain.theta, plain.phi, *plain.psi]
    optimizers = [build(module.parameters(), lr=0.05) for module in modules]
    order = torch.randperm(180, generator=make_generator(0, "folds"))
    first, second = order.tensor_split(2)
    for epoch in range(50):
        k = epoch % heads
        head_set, embedding_set = ((second, first), (first, second))[k]
        plan = [(head_set, {0, 2 + k}), (embedding_set, {0, 1})]
        if method == "joint":
            plan = [(order, {0, 1, 2})]
        for members, trained in plan:
            plain.zero_grad()
            F.cross_entropy(plain(t[0, members], k), y[0, members]).backward()
            for i in trained:
                optimizers[i].step()
    expected = PlainToy(fusion, 2, 8, 2, heads).double()
    copy_weights(network, expected)
    for mine, theirs in zip(expected.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=1e-10)


def test_initialisation_is_torchs_default():
    network, *_ = make("intermediate", seeds=range(200))
    weight = network.phi.weight.detach()  # 16 inputs
    bound = 1 / 16**0.5
    assert weight.abs().max() <= bound
    assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.02)


# ---- Tables, figures, command line ----


@pytest.fixture
def run(tmp_path):
    def call(*argv):
        tiny = ["--epochs", "2", "--seeds", "0", "1", "--out", str(tmp_path)]
        return toy.main([*tiny, *argv])

    return call


@pytest.mark.parametrize("regime", list(toy.REGIMES))
def test_every_cell_and_figure_of_both_regimes(run, tmp_path, capsys, regime):
    record = run("--regime", regime)
    assert len(record["table1"]) == 2 * 3 * 3 and len(record["table2"]) == 2 * 2 * 3 * 3
    (folder,) = (tmp_path / "toy_projection").iterdir()
    assert folder.name == f"{regime}-epochs=2-seeds=0-1"
    names = {f"{d}-{kind}.png" for d in toy.SETS for kind in ("data", "regions")}
    assert {path.name for path in folder.iterdir()} == names | {"errors.png", "table.json"}
    assert json.loads((folder / "table.json").read_text()) == record
    out = capsys.readouterr().out
    assert "Table 1" in out and "Table 2" in out and "27.5 or 17.5" in out
    for cell in record["runs"]:
        assert len(cell["test"]) == 2
        assert cell["gap"] == [a - b for a, b in zip(cell["test"], cell["train"], strict=True)]


def test_a_finished_study_is_reported_and_not_trained_again(run, monkeypatch):
    flags = ["--dataset", "moons", "--method", "joint"]
    record = run(*flags)
    assert len(record["table1"]) == 9 and len(record["table2"]) == 6
    monkeypatch.setattr(toy, "train_all", lambda *args: pytest.fail("trained again"))
    assert run(*flags) == record
    with pytest.raises(pytest.fail.Exception):
        run(*flags, "--overwrite")


def test_both_printed_values_where_the_paper_contradicts_itself():
    paper = toy.paper_errors()
    assert paper["moons", "A", "late", "joint", "test"] == "27.5 or 17.5"
    assert paper["swiss-roll", "B", "intermediate", "joint", "gap"] == "6.7 or 7.7"
    double = [key for key, value in paper.items() if " or " in value]
    assert len(double) == 2
    assert paper["swiss-roll", "B", "late", "mhm", "test"] == "23.4"
    assert ("moons", "C", "early", "mhm", "test") not in paper


def test_figures_show_the_values_of_the_table(run):
    record = run("--dataset", "moons")
    rows = record["table1"] + record["table2"]
    (axis,) = toy.draw_error_bars(rows).axes
    heights = {round(bar.get_height(), 9) for bar in axis.patches}
    assert heights == {round(row["test"]["mean"], 9) for row in rows}
    diamonds = sorted(line.get_ydata()[0] for line in axis.lines if line.get_marker() == "D")
    printed = set()
    for row in rows:
        for value in (row["paper's test"] or "").split(" or "):
            if value:
                printed.add((row["set"], row["fusion"], row["method"], float(value)))
    assert diamonds == sorted(value for *_, value in printed)


def test_regions_keep_the_third_coordinate_at_its_mean():
    lines = toy.SETS["swiss-roll"]["B"]
    network = toy.build_network("early", lines, "swiss-roll", 4, 1, [0, 1], CPU, torch.float32)
    t = torch.randn(30, 3, generator=torch.Generator().manual_seed(0))
    x, y, classes = toy.regions(network, 0, t, size=7)
    point = torch.tensor([[x[2], y[5], t[:, 2].mean()]])
    assert classes[5, 2] == network(point.expand(2, 1, 3))[0].argmax()


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--heads", "1"], "must be a whole number at least 2, not '1'"),
        (["--epochs", "0"], "must be a whole number at least 1, not '0'"),
        (["--dataset", "circles"], "invalid choice: 'circles'"),
        (["--regime", "none"], "invalid choice: 'none'"),
    ],
)
def test_bad_flags_are_refused_by_name(run, capsys, argv, sentence):
    with pytest.raises(SystemExit) as exit_info:
        run(*argv)
    assert exit_info.value.code == 2
    assert sentence in capsys.readouterr().err


def test_an_unwritable_folder_is_one_sentence(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match="Cannot make the folder"):
        run("--out", str(tmp_path / "file"))


def test_method_block_runs_when_cut_out():
    text = (ROOT / "toy_projection.py").read_text()
    block = re.search(r"# ---- Method ----\n(.*?)# ---- Data ----", text, re.DOTALL)[1]
    names = {"torch": torch, "nn": nn, "F": F, "math": __import__("math")}
    exec(block, names)
    network = names["ToyNetwork"]("late", 2, 3, 4, 5, heads=2)
    assert network(torch.zeros(2, 6, 3), head=1).shape == (2, 6, 4)


@pytest.mark.slow
def test_what_the_study_shows_safely(tmp_path):
    """Swiss set B is far worse than C; over-training leaves MHM a smaller gap than joint has."""
    seeds = [str(seed) for seed in range(8)]
    out = ["--out", str(tmp_path), "--seeds", *seeds]
    rows = toy.main([*out, "--dataset", "swiss-roll", "--method", "joint"])["table1"]
    fresh = {(row["set"], row["fusion"]): row["fresh"]["mean"] for row in rows}
    assert all(fresh["B", fusion] > fresh["C", fusion] + 10 for fusion in toy.FUSIONS)
    rows = toy.main([*out, "--dataset", "moons", "--regime", "overtrained"])["table2"]
    gap = {(row["set"], row["fusion"], row["method"]): row["fresh gap"]["mean"] for row in rows}
    for name in ("A", "B"):
        assert gap[name, "intermediate", "mhm"] < gap[name, "intermediate", "joint"]
