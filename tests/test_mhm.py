"""mhm.py and its experiments from the command line: every option, what they write and refuse."""

import copy
import functools
import itertools
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import EVERY_DATASET, UNLISTED
from fake_clips import FROM_FILES
from test_mhm_method import HEADS, PLAN, planned, sample_sets, slow_divergence
from test_pmr import MODALITIES, equal, history_of, tensors

import mhm
from common import command_line, tasks
from common import run as run_room
from common.command_line import Command
from common.datasets import DATASETS
from common.errors import UserError
from common.metrics import accuracy, macro_f1
from common.run import Run
from common.seeding import make_generator, seed_phase
from common.storage import read_json
from common.tables import lookup
from experiments import grid
from experiments import mhm as experiments_mhm

TINY = ["--dataset", "synthetic", "--train-samples", "40", "--epochs", "1", "--device", "cpu"]
DIGITS = ["--dataset", "digits"]
SEEDS = ["--seeds", "0", "1"]
AVERAGED = ("ensemble", "head-ensemble")
EVERY_METHOD = [m for m in mhm.METHODS if m != "unimodal"]
# How many thetas, phis and heads a method has with four heads, where it is not one of each.
COPIES = dict.fromkeys(["mhm", "mhm-no-freeze", "k-heads-one-set", "head-ensemble"], (1, 1, 4))
COPIES |= {"ensemble": (4, 4, 4), "mmm": (1, 4, 1)}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Loading, drawing, probes and F1 are tested elsewhere; here they would only take time. And
    whatever is trained here does not know the test split."""
    train = mhm.train

    def train_without_test(run, model, splits, config):
        names = ("train", "val", "val_iid")
        train(run, model, SimpleNamespace(**{x: getattr(splits, x) for x in names}), config)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mhm, "train", train_without_test)
        patch.setattr(command_line, "load_dataset", functools.cache(command_line.load_dataset))
        no_figure = SimpleNamespace(savefig=lambda file, **_: None)
        patch.setattr(run_room, "draw_curves", lambda *_: no_figure)
        patch.setattr(mhm, "probe_encoders", lambda encode, splits: {})
        patch.setattr(tasks, "macro_f1", lambda *_: 0.0)
        yield


@pytest.fixture
def run(tmp_path, data_root):
    """Run mhm.main on a tiny part of the data, with runs in a temporary folder; later flags win."""
    flags = [*TINY, "--out", str(tmp_path), "--data-root", str(data_root)]
    return lambda *argv: mhm.main([*flags, *argv])


def folder_of(out, method, seed=0, knobs=""):
    """The only folder under `out` of a method (with concat where there is fusion) and seed."""
    fusion = "" if method.startswith("unimodal-") else "-concat"
    (folder,) = out.glob(f"mhm/*/{method}{fusion}*{knobs}-seed{seed}")
    return folder


def predictions(folder):
    return dict(np.load(folder / "predictions.npz"))


def network_of(folder):
    """Name -> weight or buffer of the last network."""
    found = tensors(folder).items()
    return {key.removeprefix(".model."): x for key, x in found if key.startswith(".model.")}


def prepare(*argv):
    """The fresh network of the first method that is named, and the splits."""
    command = Command(mhm.SCRIPT, [*TINY, *argv])
    return mhm.build_model(next(command.configs()), command.splits), command.splits


def restored(folder, name, *argv):
    """The network in a checkpoint of a run, in evaluation mode, and the splits."""
    network, splits = prepare(*argv)
    network.load_state_dict(torch.load(folder / name, weights_only=True)["state"]["model"])
    return network.eval(), splits


@torch.no_grad()
def logits_of(network, split, head=0):
    """Output (N, C) of theta, phi and one head on all of a split, and the labels."""
    inputs, labels, _ = next(split.batches(10**6))
    return network.psi[head](network.phi[0](network.theta[0](inputs))), labels


# ---- Every method, dataset, fusion, optimizer; networks ----


@pytest.mark.slow
@pytest.mark.parametrize("dataset", EVERY_DATASET)
def test_every_method_with_every_dataset_fusion_and_optimizer(
    run, require, root_of, tmp_path, dataset
):
    """Each pair of them comes up; what is read from files is in test_clips.py."""
    assert {*MODALITIES, *FROM_FILES} == set(DATASETS) == {*mhm.RECIPES} | UNLISTED
    require(dataset)
    unimodal = [f"unimodal-{m}" for m in MODALITIES[dataset]]
    place = list(MODALITIES).index(dataset)
    for i, method in enumerate([*EVERY_METHOD, *unimodal], start=place):
        fusion, optimizer = mhm.PHIS[i % 4], ("sgd", "adam", "adagrad")[i % 3]
        argv = ["--dataset", dataset, "--data-root", root_of(dataset), "--optimizer", optimizer]
        summary = run(*argv, "--fusion", fusion, "--method", method)
        assert summary["deployed"] == ([0, 1, 2, 3] if method in AVERAGED else [0])
        assert ("gs_harness" in summary) == (method in COPIES)
        assert summary["heads"] == (4 if method in mhm.VARIANTS else None)
        assert summary["fusion"] == (None if method in unimodal else fusion)
        if method in unimodal:
            alone = summary["test"][method.removeprefix("unimodal-")]
            assert alone == {"alone": summary["test"]["accuracy"]}
        name = f"{method}-*" if method in unimodal else f"{method}-{fusion}-*"
        (folder,) = (tmp_path / "mhm" / dataset).glob(name)
        parts = {re.match(r"\w+\.\d", key)[0] for key in network_of(folder)}
        copies = zip(("theta", "phi", "psi"), COPIES.get(method, (1, 1, 1)), strict=True)
        expected = {f"{kind}.{n}" for kind, count in copies for n in range(count)}
        assert parts == expected - ({"phi.0"} if method in unimodal else set())


def test_folder_names_hold_the_knobs_of_the_method_alone():
    knobs = dict.fromkeys([*EVERY_METHOD, "unimodal-first"], "-heads=3")
    knobs |= {"shake-shake": "-branches=3", "joint": "", "dropout": "", "unimodal-first": ""}
    command = Command(mhm.SCRIPT, [*TINY, "--heads", "3", "--branches", "3", "--method", *knobs])
    for config, knob in zip(command.configs(), knobs.values(), strict=True):
        assert Run(config).label.endswith(f"-train-samples=40-epochs=1{knob}-seed0")


def test_methods_start_from_equal_modules_and_heads_from_different_ones():
    first = {method: prepare("--method", method)[0] for method in EVERY_METHOD}
    expected = first["joint"].state_dict()
    for method, network in first.items():
        shared = ("theta.0",) if method == "ensemble" else ("theta.0", "phi.0", "psi.0")
        shared = shared[:2] if method in ("mmm", "dropout", "shake-shake") else shared
        for name, tensor in network.state_dict().items():
            if name.startswith(shared):
                assert torch.equal(tensor, expected[name]), (method, name)
        for modules in (network.theta, network.phi, network.psi):
            weights = [next(w for w in module.parameters() if w.ndim > 1) for module in modules]
            for a, b in itertools.permutations(weights, 2):
                assert not torch.isclose(a, b).all()


def test_networks_of_dropout_shake_shake_and_a_single_modality():
    drop, linear = prepare("--method", "dropout")[0].psi[0]
    assert isinstance(drop, nn.Dropout) and drop.p == 0.5
    heads = prepare("--method", "shake-shake", "--branches", "3")[0].psi[0].heads
    assert len(heads) == 3 and not torch.isclose(heads[0].weight, heads[1].weight).any()
    assert all(isinstance(x, nn.Linear) for x in (linear, *heads, *prepare()[0].psi))
    network, splits = prepare("--method", "unimodal-second")
    inputs, _, _ = next(splits.val.batches(10**6))
    (output,) = network.eval()({**inputs, "first": None}, [(0, 0, 0)])
    expected = network.psi[0](network.theta[0]["second"](inputs["second"]))
    torch.testing.assert_close(output, expected)
    assert list(network.theta[0]) == ["second"] and not list(network.phi.parameters())


# ---- Whole runs against slow loops; freezing, bit by bit ----


class SmallTheta(nn.Sequential):
    def forward(self, inputs):
        return super().forward(torch.cat([x.flatten(1) for x in inputs.values()], dim=1))


def small_network():
    """Three thetas, phis and psis for digits, each with BatchNorm and dropout."""
    torch.manual_seed(0)

    def layers(kind, before, after):
        extras = nn.BatchNorm1d(after), nn.Dropout(0.5), nn.Tanh()
        return kind(nn.Linear(before, after), *extras)

    widths = [(SmallTheta, 4 * 8**2, 5), (nn.Sequential, 5, 6), (nn.Sequential, 6, 10)]
    return mhm.ModularNet(*([layers(*width) for _ in range(HEADS)] for width in widths))


def parts_of(network):
    kinds = zip(("theta", "phi", "psi"), network.children(), strict=True)
    return {f"{kind}-{n}": part for kind, copies in kinds for n, part in enumerate(copies)}


def state_of(state):
    """(module, tensor) -> a copy of every weight, buffer and moment of an optimizer."""
    found = {}
    for name, part in parts_of(state["model"]).items():
        found |= {(name, key): x.clone() for key, x in part.state_dict().items()}
        for i, moments in state[name].state_dict()["state"].items():
            found |= {(name, f"{i} {key}"): x.clone() for key, x in moments.items()}
    return found


def watch(patch):
    """A list to which every phase adds: what it moved, what got a gradient, all there is.

    Before a phase every gradient is zero, not None: momentum and weight decay would move a frozen
    module whose optimizer takes a step. Dropout is drawn from the number of the step.
    """
    batches, phases, last, seeds = Run.batches, [], {}, itertools.count()

    def watched(self, *args, **options):
        model, before = self.state["model"], state_of(self.state)
        assert all(
            torch.equal(before[key], x) for key, x in last.items()
        )  # measuring moves nothing
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter)
        for batch in batches(self, *args, **options):
            torch.manual_seed(next(seeds))
            yield batch
        last.update(state_of(self.state))
        moved = {k for k, x in last.items() if k not in before or not torch.equal(x, before[k])}
        parts = parts_of(model).items()
        graded = {name for name, x in parts if any(w.grad.any() for w in x.parameters())}
        phases.append((moved, graded, set(last)))

    patch.setattr(Run, "batches", watched)
    return phases


def slow_phase(network, batches, paths, learners, velocity, lr):
    """A phase by hand: gradients of the learners alone, SGD written out.

    Returns the summed loss of the mean probability of the networks, and how many are right.
    """
    total, right, weights = 0.0, 0, []
    for name, part in parts_of(network).items():
        part.train()
        part[1].train(name in learners)  # BatchNorm
        weights += part.parameters() if name in learners else []
    for inputs, labels in batches:
        ((theta, phi),) = {path[:2] for path in paths}
        z = network.phi[phi](network.theta[theta](inputs))
        p = sum(network.psi[k](z).softmax(dim=1) for _, _, k in paths) / len(paths)
        loss = -sum(row[y].log() for row, y in zip(p, labels, strict=True)) / len(labels)
        gradients = torch.autograd.grad(loss, weights)
        with torch.no_grad():
            for w, g in zip(weights, gradients, strict=True):
                velocity[w] = 0.9 * velocity.get(w, 0) + g + 0.1 * w
                w -= lr * velocity[w]
        total += len(labels) * loss.item()
        right += accuracy(p, labels) / 100 * len(labels)
    return total, right


SOLVED = [(m, "sgd") for m in PLAN] + [(m, "adam") for m in ("mhm", "head-ensemble", "mmm")]
SLOW = [pytest.param(*names, marks=pytest.mark.slow) for names in SOLVED[1:]]


@pytest.mark.parametrize(("method", "optimizer"), [SOLVED[0], *SLOW])
def test_a_whole_run_is_the_plan_and_what_is_frozen_stays_to_the_bit(
    run, tmp_path, monkeypatch, method, optimizer
):
    """Weights, BatchNorm's statistics, moments, over a cycle and a half; by SGD equal to a slow
    loop. The frozen get no gradient, but hand it on to theta; their dropout is on."""
    network, phases = small_network(), watch(monkeypatch)
    monkeypatch.setattr(mhm, "build_model", lambda *_: copy.deepcopy(network))
    argv = [*DIGITS, "--heads", "3", "--epochs", "5", "--batch-size", "8", "--weight-decay", "0.1"]
    argv += ["--train-samples", "20", "--schedule", "step", "--lr", "0.1", "--seeds", "3"]
    run(*argv, "--optimizer", optimizer, "--method", method)
    inputs, labels, _ = next(prepare(*argv)[1].train.batches(10**6))
    sets = sample_sets(torch.randperm(20, generator=make_generator(3, "folds")))
    phases, velocity, seeds, networks = iter(phases), {}, itertools.count(), set()

    def batches(samples, *key):
        shuffle = torch.randperm(len(samples), generator=seed_phase(3, "train", *key))
        for chosen in samples[shuffle].split(8):
            torch.manual_seed(next(seeds))
            yield {m: x[chosen] for m, x in inputs.items()}, labels[chosen]

    for epoch, logged in enumerate(history_of(folder_of(tmp_path, method, seed=3))):
        sums, lr = [], 0.01 if epoch == 4 else 0.1
        for part, (samples, paths, learners) in enumerate(planned(method, epoch)):
            moved, graded, known = next(phases)
            assert moved == {key for key in known if key[0] in learners}
            assert graded == learners
            networks |= set(paths)
            drawn = batches(sets[samples], epoch, part)
            sums.append(slow_phase(network, drawn, paths, learners, velocity, lr))
        loss, right = (
            sum(x) / (40 if method == "ensemble" else 20) for x in zip(*sums, strict=True)
        )
        if optimizer == "sgd":
            expected = {"loss": loss, "accuracy": 100 * right}
            assert logged["train"] == pytest.approx(expected, rel=1e-4)
    assert next(phases, None) is None and mhm.members(method, HEADS) == sorted(networks)
    if optimizer == "sgd":
        found = network_of(folder_of(tmp_path, method, seed=3))
        for key, expected in network.state_dict().items():
            torch.testing.assert_close(found[key], expected, rtol=1e-3, atol=1e-4)


@pytest.mark.slow
def test_killed_in_either_phase_or_between_them_and_resumed_is_the_same(run, tmp_path):
    """Of 60 samples and three heads, an epoch has four steps in its H- and two in its E-phase."""
    argv = ["--train-samples", "60", "--heads", "3", "--batch-size", "10", "--epochs", "3"]
    argv += ["--optimizer", "adam", "--method", "mhm", "--resume", "--out"]
    run(*argv, str(tmp_path / "whole"))
    whole, batches = folder_of(tmp_path / "whole", "mhm"), Run.batches
    for steps in (1, 4, 5, 8):
        left = [None] * steps

        def batches_until_death(*args, left=left, **options):
            for batch in batches(*args, **options):
                if not left:
                    raise KeyboardInterrupt
                yield left.pop() or batch

        with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(Run, "batches", batches_until_death)
            run(*argv, str(tmp_path / str(steps)))
        run(*argv, str(tmp_path / str(steps)))
        killed = folder_of(tmp_path / str(steps), "mhm")
        assert equal(tensors(killed), tensors(whole)) and history_of(killed) == history_of(whole)
        np.testing.assert_equal(predictions(killed), predictions(whole))


# ---- What a run reports and leaves behind ----


@pytest.mark.slow
@pytest.mark.parametrize(("epochs", "lr"), [("5", "0.1"), ("6", "0.07")])
def test_what_is_reported_follows_from_the_checkpoints(run, tmp_path, monkeypatch, epochs, lr):
    """Last in the middle of a cycle, with the head trained last, and at its end, with the best;
    best in another epoch, with another head."""

    def encoded(encode, splits):
        found = encode(next(splits.test.batches(7))[0])
        return {m: [str(z.dtype), *z.shape] for m, z in found.items()}

    monkeypatch.setattr(mhm, "probe_encoders", encoded)
    monkeypatch.setattr(tasks, "macro_f1", macro_f1)
    argv = [*DIGITS, "--train-samples", "120", "--heads", "3", "--method", "mhm"]
    argv += ["--epochs", epochs, "--lr", lr]
    summary, folder = run(*argv), folder_of(tmp_path, "mhm")
    history, found = history_of(folder), predictions(folder)
    network, splits = restored(folder, "best.pt", *argv)
    best = history[summary["best"]["epoch"]]
    assert best["deployed"] != summary["deployed"]
    assert best["val"]["accuracy"] == max(entry["val"]["accuracy"] for entry in history)
    logits, labels = logits_of(network, splits.test, *best["deployed"])
    assert summary["best"]["test"]["accuracy"] == pytest.approx(accuracy(logits, labels))

    network, splits = restored(folder, "last.pt", *argv)
    val = torch.stack([logits_of(network, splits.val, head)[0] for head in range(3)])
    scores = [accuracy(logits, splits.val.labels) for logits in val]
    deployed = 1 if epochs == "5" else max(range(3), key=lambda head: (scores[head], head))
    assert summary["deployed"] == [deployed]
    assert summary["val"]["accuracy"] == pytest.approx(scores[deployed])
    logits, labels = logits_of(network, splits.test, deployed)
    test, probes = summary["test"], {}
    for m, encoder in network.theta[0].items():
        probes[m] = {"probe": ["torch.float32", 7, encoder.dim]}
    assert test == probes | {
        "accuracy": pytest.approx(accuracy(logits, labels)),
        "macro_f1": pytest.approx(macro_f1(logits, labels)),
        "loss": pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5),
    }
    np.testing.assert_allclose(found["logits"], logits, rtol=1e-4, atol=1e-5)
    np.testing.assert_equal([found["index"], found["label"]], [np.arange(len(labels)), labels])
    parts = [network.theta, network.phi, network.psi[deployed]]
    assert summary["parameters"] == sum(w.numel() for x in parts for w in x.parameters())

    def right(split):
        return accuracy(*logits_of(network, split, deployed))

    seen = right(splits.train.head(len(splits.val)))
    assert len(splits.val) == len(splits.val_iid) < len(splits.train)
    assert summary["gap"]["val_iid"] == pytest.approx(seen - right(splits.val_iid))
    assert summary["gap"]["test"] == pytest.approx(right(splits.train) - test["accuracy"])
    for kind in mhm.GS:
        expected = pytest.approx(slow_divergence(val, kind), rel=1e-4)
        assert summary["gs_harness"][kind] == expected
    end = {"gap": summary["gap"]["val_iid"], "gs_harness": summary["gs_harness"]}
    assert history[-1] == history[-1] | end
    trace = torch.from_numpy(found["val_trace"])
    torch.testing.assert_close(trace[-1], val[deployed].log_softmax(dim=1), rtol=1e-4, atol=1e-5)
    accuracies = [accuracy(log_p, splits.val.labels) for log_p in trace]
    assert accuracies == pytest.approx([entry["val"]["accuracy"] for entry in history])
    paths = [path for lines in mhm.CURVES.values() for path in lines.values()]
    assert all(lookup(history[-1], path) is not None for path in paths)


@pytest.mark.parametrize("method", AVERAGED)
def test_the_average_of_all_members_is_tested(run, tmp_path, method):
    """Here with as many heads as samples."""
    argv = ["--train-samples", "5", "--heads", "5", "--method", method]
    run(*argv)
    network, splits = restored(folder_of(tmp_path, method), "last.pt", *argv)
    inputs, _, _ = next(splits.test.batches(10**6))
    with torch.no_grad():
        z = [phi(theta(inputs)) for theta, phi in zip(network.theta, network.phi, strict=True)]
        members = zip(z if method == "ensemble" else z * 5, network.psi, strict=True)
        p = sum(psi(z).softmax(dim=1) for z, psi in members) / 5
    found = predictions(folder_of(tmp_path, method))["logits"]
    np.testing.assert_allclose(np.exp(found), p, rtol=1e-4, atol=1e-6)


def test_the_default_is_a_comparison_and_eval_only_computes_it_anew(
    run, tmp_path, capsys, monkeypatch
):
    methods = ["unimodal-first", "unimodal-second", "joint", "mhm-no-freeze", "mhm"]
    trained = run("--epochs", "2", "--lr", "0.1")
    out = capsys.readouterr().out
    assert [row["method"] for row in trained["table"]] == methods
    assert list(trained["table"][0]) == ["method", "fusion", *mhm.COLUMNS]
    assert all(re.search(rf"^{method} ", out, re.MULTILINE) for method in methods)
    assert re.search(r"^Runs: .*mhm/synthetic$", out, re.MULTILINE)
    monkeypatch.setattr(mhm, "train", lambda *_: pytest.fail("trained again"))
    assert run("--epochs", "2", "--lr", "0.1") == trained
    for path in tmp_path.glob("mhm/*/*/summary.json"):
        path.write_text(json.dumps({**read_json(path), "test": {}, "gap": {}, "deployed": []}))
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert run("--epochs", "2", "--lr", "0.1", "--eval-only")["table"] == trained["table"]
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


# ---- Tables 3 to 6 and Figure 2 ----


RATIOS = {"missing": (False, True), "hitting": (True, False)}  # right, any modality alone right
SEVERAL = ["ensemble", "mhm-no-freeze", "mhm"]
SIMPLER = ["one-head-one-set", "one-head-k-sets", "k-heads-one-set"]
TABLES = {  # the methods in the paper's order, and the columns; for Tables 3 and 5 see `rows_of`
    "table3": (["joint", *SEVERAL], ["test", "gap (iid)", "gap (test)", "GS", "GS-harness"]),
    "table4": (["unimodal-first", "unimodal-second", "joint", "mhm"], ["test", *RATIOS]),
    "table5": (["joint", *["mhm"] * 4], ["test", "GS"]),
    "table6": (["joint", *SIMPLER, "mhm", "head-ensemble", "mmm"], ["test", "GS"]),
}
PAPER = {  # its numbers on AVE, in that order
    ("table3", "accuracy"): "75.6 77.2 77.2 78.5",
    ("table3", "GS"): "0.17 0.04 0.19 0.04",
    ("table3", "GS-harness"): "- 0.27 0.09 0.08",
    ("table4", "missing"): "- - 0.11 0.06",
    ("table4", "hitting"): "- - 0.03 0.08",
    ("table5", "accuracy"): "75.6 76.0 77.8 78.5 78.0",
    ("table5", "GS"): "0.17 0.11 0.05 0.04 0.04",
    ("table6", "accuracy"): "75.6 75.5 75.6 76.0 78.5 78.4 73.4",
}
FIGURE2 = ["joint", "ensemble", "dropout", "shake-shake", "mhm-no-freeze", "mhm"]


def rows_of(name):
    """What stands in a table, row by row: method, and what tells its parts apart."""
    methods = TABLES[name][0]
    if name == "table5":
        return [(method, {"heads": k}) for k, method in enumerate(methods, start=1)]
    parts = [{"epochs": 1}, {"epochs": 2}] if name == "table3" else [{}]
    return [(method, part) for part in parts for method in methods]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Function: words -> record, figure, folder. All share --out, so that one experiment reuses the
    runs of the others."""
    out = tmp_path_factory.mktemp("experiments")

    @functools.cache
    def call(name, *argv):
        drawn = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(grid, "write_figure", lambda path, figure: drawn.append((path, figure)))
            heads = [] if name == "table5" else ["--heads", "2"]
            words = [name, *TINY, "--noise", "2", *heads, "--out", str(out), *argv]
            record = experiments_mhm.main(words)
        ((path, figure),) = drawn
        assert {**record, **read_json(path.parent / "table.json")} == record
        assert grid.read_rows(path.parent / "rows.csv") == record["runs"]
        return SimpleNamespace(**record, figure=figure, folder=path.parent)

    return call


def folders_of(found, method, epochs=1, heads=2):
    """The runs of seeds 0 and 1 beside an experiment."""
    knobs = f"-epochs={epochs}"
    knobs += f"-heads={heads}" if method in mhm.VARIANTS and heads != 4 else ""
    out = found.folder.parent.parent.parent
    return [folder_of(out, method, seed, knobs) for seed in (0, 1)]


def share_of(found, method, seed, case):
    """Share of the test items of a case in RATIOS, by a loop."""
    names = ("unimodal-first", "unimodal-second", method)
    saved = [predictions(folders_of(found, name)[seed]) for name in names]
    items = zip(*(x["logits"].argmax(axis=1) == x["label"] for x in saved), strict=True)
    cases = [(bool(fused), bool(first or second)) for first, second, fused in items]
    return cases.count(case) / len(cases)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        *(pytest.param(name, "pairwise", marks=pytest.mark.slow) for name in TABLES),
        ("table3", "mean"),
    ],
)
def test_rows_columns_differences_and_bars_of_a_table(experiment, name, kind):
    found, (methods, shown) = experiment(name, *SEEDS, "--gs", kind), TABLES[name]
    knobs = ("" if name == "table5" else "-heads=2") + ("" if kind == "pairwise" else "-gs=mean")
    assert found.folder.name == f"{name}-train-samples=40-noise=2.0-epochs=1{knobs}"
    assert (found.arguments["seeds"], found.arguments["gs"]) == ([0, 1], kind)
    for i, (row, (method, part)) in enumerate(zip(found.rows, rows_of(name), strict=True)):
        paper = {f"{c} on AVE": numbers for (t, c), numbers in PAPER.items() if t == name}
        assert list(row) == ["method", *part, "fusion", *shown, *paper]
        assert row["method"] == method and row | part == row
        for title, numbers in paper.items():
            assert (row[title] or "-") == numbers.split()[i % len(methods)]
        folders = folders_of(found, method, **part)
        summaries = [read_json(folder / "summary.json") for folder in folders]
        logits = np.stack([predictions(folder)["logits"] for folder in folders])
        expected = {
            "test": [x["test"]["accuracy"] for x in summaries],
            "gap (iid)": [x["gap"]["val_iid"] for x in summaries],
            "gap (test)": [x["gap"]["test"] for x in summaries],
            "GS": [slow_divergence(logits, kind)],
            "GS-harness": [x["gs_harness"][kind] for x in summaries if "gs_harness" in x],
        }
        for title, case in RATIOS.items() if name == "table4" else ():
            seeds = (0, 1) if method in ("joint", "mhm") else ()
            expected[title] = [share_of(found, method, seed, case) for seed in seeds]
        for title in shown:
            values, cell = expected[title], row[title]
            assert (cell is None) == (not values)
            if values:
                assert (cell["mean"], cell["n"]) == (pytest.approx(np.mean(values)), len(values))
                assert any(values) and cell.get("digits") == (None if title[0] in "tg" else 3)
    reference = "mhm" if name == "table6" else "joint"
    pairs = {(m, reference) for m in methods if m != reference and "unimodal" not in m}
    pairs |= {("mhm", "mhm-no-freeze")} if name == "table3" else set()
    pairs = set() if name == "table5" else pairs  # its runs differ in K
    assert {(pair["method"], pair["reference"]) for pair in found.paired} == pairs
    for axis, title in zip(found.figure.axes, shown, strict=True):
        values = [row[title]["mean"] for row in found.rows if row[title]]
        assert [bar.get_height() for bar in axis.patches] == values
        assert axis.get_ylabel().startswith(title)


@pytest.mark.slow
@pytest.mark.parametrize("kind", mhm.GS)
def test_curves_of_figure2_are_means_over_seeds_by_epoch_and_its_lines(experiment, kind):
    found = experiment("figure2", "--epochs", "2", *SEEDS, "--gs", kind)
    assert [list(lines) for lines in found.panels.values()] == [*[FIGURE2] * 3, SEVERAL]
    assert [row["method"] for row in found.rows] == FIGURE2
    for method in FIGURE2:
        folders = folders_of(found, method, epochs=2)
        traces = np.stack([predictions(folder)["val_trace"] for folder in folders])
        for epoch, entries in enumerate(zip(*map(history_of, folders), strict=True)):
            numbers = {
                "error (%)": [100 - x["val"]["accuracy"] for x in entries],
                "generalization gap (points)": [x["gap"] for x in entries],
                "GS": [slow_divergence(traces[:, epoch], kind)],
            }
            if method in SEVERAL:
                numbers["GS-harness"] = [x["gs_harness"][kind] for x in entries]
            for panel, values in numbers.items():
                curve = found.panels[panel][method]
                assert curve[epoch] == pytest.approx(np.mean(values)) and len(curve) == 2
    for axis, (name, curves) in zip(found.figure.axes, found.panels.items(), strict=True):
        assert axis.get_ylabel() == name
        assert {line.get_label(): list(line.get_ydata()) for line in axis.lines} == curves


@pytest.mark.slow
@pytest.mark.parametrize("name", [*TABLES, "figure2"])
def test_an_experiment_of_a_single_seed_and_of_fewer_methods(experiment, capsys, name):
    chosen = ["mhm", "joint", "unimodal-first"]
    heads = [] if name == "table5" else ["--heads", "3"]
    found = experiment(name, "--seeds", "1", *heads, "--method", *chosen)
    note = "GS compares seeds: with a single one of --seeds it stays empty.\n"
    assert capsys.readouterr().err == note
    first, times = ["joint"] if name == "table5" else [], {"table3": 2, "table5": 4}.get(name, 1)
    assert [row["method"] for row in found.rows] == first + chosen * times
    if name == "table3":
        assert [row["epochs"] for row in found.rows] == [1, 1, 1, 3, 3, 3]
    if name == "figure2":
        assert list(found.panels) == ["error (%)", "generalization gap (points)", "GS-harness"]
    columns = ("GS", "missing", "hitting")  # the last two need every modality alone
    assert all(row.get(column) is None for row in found.rows for column in columns)
    assert all(row["standard_error"] is None for row in found.paired)


# ---- Bad input ----


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--heads 1", "must be a whole number at least 2, not '1'"),
        ("--branches 1", "must be a whole number at least 2 and at most 64, not '1'"),
        ("--gs mean", "unrecognized arguments: --gs mean"),
        ("--method mmh", "no method 'mmh' for synthetic; choose from mhm, mhm-no-freeze"),
        ("--heads 41", "40 training samples do not make 41 folds; lower --heads"),
        ("--train-samples 3", "3 training samples do not make 4 folds; lower --heads"),
        ("--method mhm --eval-only", "holds no run; train it first"),
        *((f"--lr 1e30 --method {m}", "in epoch 0; nothing was saved") for m in EVERY_METHOD),
        ("table1", "invalid choice: 'table1'"),
        ("table3 --gs nonsense", "invalid choice: 'nonsense'"),
        ("table5 --heads 2", "table5 sets --heads itself; leave it out"),
        ("table5 --train-samples 3", "3 training samples do not make 4 folds; lower --heads"),
        ("table6 --method mmh", "no method 'mmh' for synthetic"),
        ("figure2 --eval-only", "--eval-only writes nothing"),
    ],
)
def test_bad_input_is_a_sentence(tmp_path, capsys, argv, sentence):
    words, flags = argv.split(), [*TINY, "--out", str(tmp_path)]
    main = mhm.main if argv.startswith("-") else experiments_mhm.main
    place = 0 if main is mhm.main else 1
    with pytest.raises((SystemExit, UserError)) as stopped:
        main([*words[:place], *flags, *words[place:]])
    assert sentence in f"{stopped.value} {capsys.readouterr().err}"
    left = {path.name for path in tmp_path.rglob("*") if path.is_file()}
    assert "table.json" not in left and (place or left <= {"config.json"})
