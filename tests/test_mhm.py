"""mhm.py from its command line: every option, what it writes, and what it says to bad input."""

import functools
import json
import math
import re
import runpy
import sys
from itertools import permutations
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY_DATASET, ROOT
from fake_clips import FROM_FILES
from test_pmr import MODALITIES, tensors
from test_training import QuickFigure, damage, snapshot, without_seconds

import mhm
from common import command_line, experiments, figures, training
from common.datasets import DATASETS, TensorSplit
from common.errors import UserError
from common.fusion import FUSIONS
from common.metrics import macro_f1
from common.seeding import make_generator, seed_phase

TINY = ["--train-samples", "40", "--epochs", "1", "--device", "cpu"]
CPU = torch.device("cpu")
AVERAGED = ("ensemble", "head-ensemble")
# How many thetas, phis and heads a method has with four heads, where it is not one of each.
COPIES = {
    **dict.fromkeys(["mhm", "mhm-no-freeze", "k-heads-one-set", "head-ensemble"], (1, 1, 4)),
    "ensemble": (4, 4, 4),
    "mmm": (1, 4, 1),
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Loading, curves of a run and F1 are tested elsewhere; here they would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "load_dataset", functools.cache(command_line.load_dataset))
        patch.setattr(training, "draw_curves", QuickFigure)
        patch.setattr(mhm, "macro_f1", lambda *_: 0.0)
        yield


@pytest.fixture
def run(tmp_path, data_root):
    """Run mhm.main on a tiny part of the data, with runs in a temporary folder."""

    def call(*argv):
        return mhm.main([*TINY, "--out", str(tmp_path), "--data-root", str(data_root), *argv])

    return call


def folder_of(out, method, seed=0):
    """The only folder under `out` of a method (with concat where there is fusion) and seed."""
    fusion = "" if method.startswith("unimodal-") else "-concat"
    (folder,) = out.glob(f"mhm/*/{method}{fusion}*-seed{seed}")
    return folder


def read(path):
    return json.loads(path.read_text())


def history_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def prepare(method, *argv):
    """The fresh network of a method, the splits and the configuration."""
    args, _ = mhm.parse_args([*TINY, *argv])
    splits = mhm.load_splits(args, CPU)
    chosen = {"method": method, "seed": args.seeds[0], "device": CPU}
    config = SimpleNamespace(**{**vars(args), **chosen})
    return mhm.build_network(mhm.Classification(config, splits), config), splits, config


def restored(folder, name, method, *argv):
    """The network in a checkpoint of a run, in evaluation mode, and the splits."""
    network, splits, _ = prepare(method, *argv)
    checkpoint = torch.load(folder / name, weights_only=True)
    network.load_state_dict(checkpoint["state"]["network"])
    return network.eval(), splits


@torch.no_grad()
def logits_of(network, split, head=0):
    """Output (N, C) of theta, phi and one head on all of a split, and the labels."""
    inputs, labels, _ = next(split.batches(10**6))
    return network.psi[head](network.phi[0](network.theta[0](inputs))), labels


def percent_right(logits, labels):
    hits = [row.argmax() == y for row, y in zip(logits, labels, strict=True)]
    return 100 * sum(map(bool, hits)) / len(hits)


def slow_divergence(logits, kind):
    """GS by loops over runs, items and classes. logits: (R, N, C)."""
    runs = [[np.exp(x - max(x)) / np.exp(x - max(x)).sum() for x in run] for run in logits]
    values = []
    for items in zip(*runs, strict=True):
        mean = sum(items) / len(items)
        pairs = permutations(items, 2) if kind == "pairwise" else [(p, mean) for p in items]
        values += [sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in pairs]
    return sum(values) / len(values)


# ---- Every method, fusion, dataset, optimizer, and every other choice ----


@pytest.mark.parametrize("dataset", EVERY_DATASET)
@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_every_method_fusion_and_dataset(run, require, root_of, tmp_path, fusion, dataset):
    require(dataset)
    unimodal = [f"unimodal-{m}" for m in MODALITIES[dataset]] if fusion == "concat" else []
    methods = [*mhm.METHODS, *unimodal]
    arguments = ["--dataset", dataset, "--data-root", root_of(dataset), "--fusion", fusion]
    result = run(*arguments, "--method", *methods)
    assert [row["method"] for row in result["table"]] == methods
    for summary in result["runs"]:
        method = summary["method"]
        assert summary["deployed"] == ([0, 1, 2, 3] if method in AVERAGED else [0])
        assert ("gs_harness" in summary) == (method in COPIES)
        assert summary["fusion"] == (None if method in unimodal else fusion)
        name = f"{method}-*" if method in unimodal else f"{method}-{fusion}-*"
        (folder,) = (tmp_path / "mhm" / dataset).glob(name)
        parts = {re.match(r"\.network\.(\w+\.\d)", key)[1] for key in network_of(folder)}
        copies = zip(("theta", "phi", "psi"), COPIES.get(method, (1, 1, 1)), strict=True)
        expected = {f"{kind}.{n}" for kind, count in copies for n in range(count)}
        assert parts == expected - ({"phi.0"} if method in unimodal else set())


def network_of(folder):
    """Name -> weight or buffer of the last network."""
    return {key: x for key, x in tensors(folder).items() if key.startswith(".network.")}


def test_every_dataset_is_tested_here_or_in_test_clips():
    assert {*MODALITIES, *FROM_FILES} == set(DATASETS) == set(mhm.RECIPES)


SOME = ["--train-samples", "60", "--epochs", "4", "--method", "mhm"]


@pytest.fixture(scope="module")
def default_network(tmp_path_factory):
    """The weights that the default knobs of MHM give on 60 samples in 4 epochs."""
    out = tmp_path_factory.mktemp("default")
    mhm.main([*TINY, *SOME, "--out", str(out)])
    return network_of(folder_of(out, "mhm"))


@pytest.mark.parametrize(
    ("choice", "changes"),
    [
        (("--optimizer", "adam"), True),
        (("--optimizer", "adagrad"), True),
        (("--schedule", "step"), True),
        (("--schedule", "cosine"), True),
        (("--precision", "bf16"), True),
        (("--device", "auto"), False),
        (("--heads", "2"), True),
        (("--heads", "5"), True),
        (("--branches", "3"), False),
        (("--gs", "mean"), False),
        (("--color-variance", "0"), True),
        (("--batch-size", "8"), True),
        (("--weight-decay", "0"), True),
        (("--lr", "0.02"), True),
        (("--data-seed", "5"), True),
        (("--seeds", "5"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_every_other_choice_acts(run, tmp_path, default_network, choice, changes):
    if choice == ("--device", "auto") and torch.cuda.is_available():
        pytest.skip("auto is CUDA here, which is equal up to rounding only")
    run(*SOME, *choice)
    found = network_of(folder_of(tmp_path, "mhm", seed=5 if choice == ("--seeds", "5") else 0))
    assert same_tensors(found, default_network) != changes


def same_tensors(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[x], second[x]) for x in first)


def test_folder_names_hold_the_knobs_of_the_method_alone(run, tmp_path, monkeypatch):
    monkeypatch.setattr(mhm, "train", lambda *_: 1 / 0)  # the folder is there by then
    methods = [*mhm.METHODS, "unimodal-gray"]
    knobs = dict.fromkeys(methods, "-heads=3")
    knobs |= {"shake-shake": "-branches=3", "joint": "", "dropout": "", "unimodal-gray": ""}
    for method in methods:
        with pytest.raises(ZeroDivisionError):
            run("--heads", "3", "--branches", "3", "--gs", "mean", "--method", method)
        end = f"-train-samples=40-epochs=1{knobs[method]}-seed0"
        assert folder_of(tmp_path, method).name.endswith(end)


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_there_or_a_sentence(run, device):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if available[device]:
        assert run("--method", "mhm", "--device", device)["test"]["accuracy"] >= 0
    else:
        with pytest.raises(UserError, match=f"finds no {device} device"):
            run("--method", "mhm", "--device", device)


# ---- What the algorithm promises over a whole run ----


def test_methods_start_from_equal_modules_and_heads_from_different_ones():
    first = {method: prepare(method)[0] for method in mhm.METHODS}
    expected = first["joint"].state_dict()
    for method, network in first.items():
        shared = ("theta.0",) if method == "ensemble" else ("theta.0", "phi.0", "psi.0")
        shared = shared[:2] if method in ("mmm", "dropout", "shake-shake") else shared
        for name, tensor in network.state_dict().items():
            if name.startswith(shared):
                assert torch.equal(tensor, expected[name]), (method, name)
        for modules in (network.theta, network.phi, network.psi):
            weights = [next(iter(module.parameters())) for module in modules]
            for a, b in permutations([w for w in weights if w.ndim == 2], 2):
                assert not torch.isclose(a, b).all()


def test_heads_of_dropout_and_shake_shake():
    """Dropout 0.5 on the head's input, and the number of branches; a plain classifier elsewhere."""
    drop, linear = prepare("dropout")[0].psi[0]
    assert isinstance(drop, torch.nn.Dropout) and drop.p == 0.5
    assert all(isinstance(head, torch.nn.Linear) for head in (linear, *prepare("mhm")[0].psi))
    heads = prepare("shake-shake", "--branches", "3")[0].psi[0].heads
    assert [type(head) for head in heads] == [torch.nn.Linear] * 3
    assert not torch.isclose(heads[0].weight, heads[1].weight).any()


def test_a_unimodal_network_is_an_encoder_and_a_classifier():
    network, splits, _ = prepare("unimodal-color")
    inputs, _, _ = next(splits.val.batches(10**6))
    (encoder,) = network.eval().theta[0].values()
    (output,) = network({**inputs, "gray": None}, [(0, 0, 0)])
    expected = network.psi[0](encoder(inputs["color"]))
    torch.testing.assert_close(output, expected)
    assert not list(network.phi.parameters()) and output.shape == (len(splits.val), 10)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_joint_is_a_plain_training_loop_bit_for_bit(run, tmp_path, optimizer):
    argv = ["--train-samples", "100", "--epochs", "4", "--batch-size", "40"]
    argv += ["--schedule", "step", "--optimizer", optimizer]
    run("--method", "joint", *argv)
    network, splits, config = prepare("joint", *argv)
    arguments = {"lr": config.lr, "weight_decay": config.weight_decay}
    if optimizer == "sgd":
        stepper = torch.optim.SGD(network.parameters(), momentum=0.9, **arguments)
    else:
        stepper = torch.optim.Adam(network.parameters(), **arguments)
    for epoch in range(4):
        stepper.param_groups[0]["lr"] = config.lr / 10 if epoch == 3 else config.lr
        for inputs, labels, _ in splits.train.batches(40, seed_phase(0, "train", epoch, 0)):
            loss = F.cross_entropy(network.psi[0](network.phi[0](network.theta[0](inputs))), labels)
            stepper.zero_grad()
            loss.backward()
            stepper.step()
    saved = network_of(folder_of(tmp_path, "joint"))
    plain = {f".network.{name}": x for name, x in network.state_dict().items()}
    assert len(saved) > 30 and same_tensors(saved, plain)


def test_joint_and_unimodal_training_do_not_depend_on_the_heads_and_folds(run, tmp_path):
    for heads in ("2", "5"):
        out = ["--out", str(tmp_path / heads), "--epochs", "2"]
        run(*out, "--heads", heads, "--method", "joint", "unimodal-gray", "one-head-one-set")
    for method, same in (("joint", True), ("unimodal-gray", True), ("one-head-one-set", False)):
        found = [network_of(folder_of(tmp_path / heads, method)) for heads in ("2", "5")]
        assert same_tensors(*found) == same


def slow_mhm(network, splits, config):
    """Sec. 4 by hand: folds as lists, gradients of the learners alone, SGD written out."""
    inputs, labels, _ = next(splits.train.batches(10**6))
    order = torch.randperm(len(labels), generator=make_generator(config.seed, "folds")).tolist()
    folds = []
    for k in range(config.heads):
        size = len(labels) // config.heads + (k < len(labels) % config.heads)
        folds, order = [*folds, order[:size]], order[size:]
    (theta,), (phi,), heads = network.theta, network.phi, network.psi
    velocity = {parameter: torch.zeros_like(parameter) for parameter in network.parameters()}
    for epoch in range(config.epochs):
        k = epoch % config.heads
        lr = config.lr / 10 if epoch >= 0.7 * config.epochs else config.lr
        head_set = [i for fold in folds if fold is not folds[k] for i in fold]
        head_phase = (head_set, [theta, heads[k]])  # Eq. (2)
        embedding_phase = (folds[k], [theta, phi])  # Eq. (3)
        for part, (samples, learners) in enumerate([head_phase, embedding_phase]):
            shuffle = torch.randperm(
                len(samples), generator=seed_phase(config.seed, "train", epoch, part)
            )
            for batch in torch.tensor(samples)[shuffle].split(config.batch_size):
                logits = heads[k](phi(theta({m: x[batch] for m, x in inputs.items()})))
                p = logits.softmax(dim=1)
                loss = -sum(p[i, y].log() for i, y in enumerate(labels[batch])) / len(batch)
                learning = [w for module in learners for w in module.parameters()]
                gradients = torch.autograd.grad(loss, learning)
                with torch.no_grad():
                    for w, g in zip(learning, gradients, strict=True):
                        velocity[w] = 0.9 * velocity[w] + g + config.weight_decay * w
                        w -= lr * velocity[w]


def test_a_whole_run_equals_a_slow_mhm(run, tmp_path):
    """Three heads whose folds differ in size, over a cycle and a half, several steps a phase."""
    argv = ["--train-samples", "70", "--epochs", "5", "--heads", "3", "--batch-size", "15"]
    argv += ["--schedule", "step", "--seeds", "3"]
    run("--method", "mhm", *argv)
    network, splits, config = prepare("mhm", *argv)
    slow_mhm(network, splits, config)
    saved = network_of(folder_of(tmp_path, "mhm", seed=3))
    for name, weight in network.state_dict().items():
        torch.testing.assert_close(saved[f".network.{name}"], weight, rtol=1e-5, atol=1e-6)


def test_measuring_leaves_the_network_as_it_is():
    network, splits, config = prepare("mhm")
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    mhm.measure(network, mhm.Classification(config, splits), splits, 0, config)
    assert same_tensors(before, network.state_dict())


def test_training_never_reads_the_test_split(run, monkeypatch):
    """It is read after the last epoch only: by the best network, by the last, by the probes."""
    _, splits, _ = prepare("mhm")
    reads, epochs, original, original_end = [], [], TensorSplit.batches, mhm.Run.end_epoch

    def spy(self, *args, **kwargs):
        if self.all_labels.data_ptr() == splits.test.all_labels.data_ptr():
            reads.append(len(epochs))
        return original(self, *args, **kwargs)

    monkeypatch.setattr(TensorSplit, "batches", spy)
    monkeypatch.setattr(mhm.Run, "end_epoch", lambda *a: (epochs.append(1), original_end(*a)))
    run("--method", "mhm", "--epochs", "3", "--data-root", "data")
    assert reads == [3, 3, 3]


# ---- What a run reports and leaves behind ----

THREE_HEADS = ["--train-samples", "120", "--heads", "3", "--lr", "0.05"]


@pytest.mark.parametrize("epochs", [5, 6])
def test_gap_harness_and_deployed_head_follow_from_the_checkpoint(run, tmp_path, epochs):
    """In the middle of a cycle, with the head trained last, and at its end, with the best."""
    argv = [*THREE_HEADS, "--epochs", str(epochs)]
    summary = run("--method", "mhm", *argv)
    folder = folder_of(tmp_path, "mhm")
    network, splits = restored(folder, "last.pt", "mhm", *argv)
    val = [logits_of(network, splits.val, head) for head in range(3)]
    scores = [percent_right(*found) for found in val]
    deployed = 1 if epochs == 5 else max(range(3), key=lambda head: (scores[head], head))
    assert summary["deployed"] == [deployed]
    assert summary["val"]["accuracy"] == pytest.approx(scores[deployed])

    def right(split):
        return percent_right(*logits_of(network, split, deployed))

    seen = right(splits.train.head(len(splits.val)))
    assert len(splits.val) == len(splits.val_iid) < len(splits.train)
    assert summary["gap"]["val_iid"] == pytest.approx(seen - right(splits.val_iid))
    assert summary["gap"]["test"] == pytest.approx(right(splits.train) - right(splits.test))
    logits = np.stack([output.double().numpy() for output, _ in val])
    for kind in ("pairwise", "mean"):
        assert summary["gs_harness"][kind] == pytest.approx(slow_divergence(logits, kind), rel=1e-4)
    end = history_of(folder)[-1]
    assert end["gap"] == summary["gap"]["val_iid"] and end["gs_harness"] == summary["gs_harness"]


def test_last_and_best_are_tested_by_the_head_that_was_deployed_then(run, tmp_path, monkeypatch):
    """Validation accuracy only falls: best is epoch 0 with head 0, last is epoch 1 with head 1."""
    measure, scores = mhm.measure, iter([90.0, 80.0])

    def ever_worse(*args):
        measured, output = measure(*args)
        measured["val"]["accuracy"] = next(scores)
        return measured, output

    monkeypatch.setattr(mhm, "measure", ever_worse)
    monkeypatch.setattr(mhm, "macro_f1", macro_f1)
    argv = ["--train-samples", "120", "--heads", "3", "--epochs", "2", "--lr", "0.05"]
    summary = run("--method", "mhm", *argv)
    folder = folder_of(tmp_path, "mhm")
    assert summary["best"]["epoch"] == 0 and summary["deployed"] == [1]
    assert summary["val"]["accuracy"] == 80 and summary["best"]["val"]["accuracy"] == 90
    tested = [("best.pt", 0, summary["best"]["test"]), ("last.pt", 1, summary["test"])]
    for name, head, metrics in tested:
        network, splits = restored(folder, name, "mhm", *argv)
        logits, labels = logits_of(network, splits.test, head)
        assert metrics["accuracy"] == pytest.approx(percent_right(logits, labels))
        assert metrics["loss"] == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
        assert metrics["macro_f1"] == pytest.approx(macro_f1(logits, labels))
    saved = np.load(folder / "predictions.npz")
    np.testing.assert_allclose(saved["logits"], logits, rtol=1e-4, atol=1e-5)
    assert saved["index"].tolist() == list(range(len(labels)))
    assert saved["label"].tolist() == labels.tolist()
    assert summary["test"] != summary["best"]["test"] and read(folder / "summary.json") == summary


@pytest.mark.parametrize("method", AVERAGED)
def test_the_average_of_all_members_is_tested(run, tmp_path, method):
    run("--method", method, "--heads", "3")
    network, splits = restored(folder_of(tmp_path, method), "last.pt", method, "--heads", "3")
    inputs, _, _ = next(splits.test.batches(10**6))
    with torch.no_grad():
        z = [phi(theta(inputs)) for theta, phi in zip(network.theta, network.phi, strict=True)]
        members = zip(z if method == "ensemble" else z * 3, network.psi, strict=True)
        p = sum(psi(z).softmax(dim=1) for z, psi in members) / 3
    saved = np.load(folder_of(tmp_path, method) / "predictions.npz")["logits"]
    np.testing.assert_allclose(np.exp(saved), p, rtol=1e-4, atol=1e-6)


def test_trace_is_what_the_deployed_network_predicts_on_validation(run, tmp_path):
    argv = [*THREE_HEADS, "--epochs", "4"]
    run("--method", "mhm", *argv)
    folder = folder_of(tmp_path, "mhm")
    network, splits = restored(folder, "last.pt", "mhm", *argv)
    trace = torch.from_numpy(np.load(folder / "predictions.npz")["val_trace"])
    assert trace.shape == (4, len(splits.val), 10)
    expected = logits_of(network, splits.val, head=0)[0].log_softmax(dim=1)  # epoch 3: head 0
    torch.testing.assert_close(trace[-1], expected, rtol=1e-4, atol=1e-5)
    right = [percent_right(log_p, splits.val.labels.tolist()) for log_p in trace]
    assert right == pytest.approx([entry["val"]["accuracy"] for entry in history_of(folder)])


def test_curves_show_every_epoch(run, tmp_path):
    run("--method", "mhm", "joint", "--epochs", "3")
    for method in ("mhm", "joint"):
        history = history_of(folder_of(tmp_path, method))
        panels = read(folder_of(tmp_path, method) / "curves.png")
        assert panels["generalization gap (points)"]["val_iid - train"] == [
            entry["gap"] for entry in history
        ]
        accuracies = [entry["train"]["accuracy"] for entry in history]
        assert panels["accuracy (%)"]["train"] == accuracies and len(accuracies) == 3
        assert ("GS-harness (nats)" in panels) == (method == "mhm")


def test_gs_of_the_table_is_of_the_predictions_of_the_seeds(run, tmp_path):
    argv = ["--train-samples", "120", "--seeds", "0", "1", "2", "--heads", "2"]
    for kind in ("pairwise", "mean"):
        result = run(*argv, "--gs", kind, "--method", "joint", "ensemble", "mhm")
        for row in result["table"]:
            folders = [folder_of(tmp_path, row["method"], seed) for seed in range(3)]
            logits = [np.load(folder / "predictions.npz")["logits"] for folder in folders]
            expected = slow_divergence(np.stack(logits).astype(float), kind)
            assert row["GS"]["mean"] == pytest.approx(expected, rel=1e-4) and expected > 1e-4
            assert row["GS"]["n"] == 1
            harness = [read(folder / "summary.json").get("gs_harness") for folder in folders]
            if row["method"] == "joint":
                assert harness == [None] * 3 and row["GS-harness"] is None
            else:
                mean = sum(found[kind] for found in harness) / 3
                assert row["GS-harness"]["mean"] == pytest.approx(mean)


def test_gs_of_a_single_seed_is_none(run):
    assert [row["GS"] for row in run("--method", "joint", "mhm")["table"]] == [None, None]


def test_missing_and_hitting_of_the_table_are_of_the_predictions(run, tmp_path):
    argv = ["--train-samples", "200", "--seeds", "0", "1", "--heads", "2"]
    result = run(*argv, "--method", "unimodal-gray", "unimodal-color", "joint", "mhm")

    def right(method, seed):
        saved = np.load(folder_of(tmp_path, method, seed) / "predictions.npz")
        return [x.argmax() == y for x, y in zip(saved["logits"], saved["label"], strict=True)]

    for row in result["table"][2:]:
        missing, hitting = [], []
        for seed in (0, 1):
            gray, color, fused = (
                right(x, seed) for x in ("unimodal-gray", "unimodal-color", row["method"])
            )
            pairs = [(f, g or c) for f, g, c in zip(fused, gray, color, strict=True)]
            missing.append(pairs.count((False, True)) / len(pairs))
            hitting.append(pairs.count((True, False)) / len(pairs))
        assert max(missing) > 0
        assert row["missing"]["mean"] == pytest.approx(sum(missing) / 2)
        assert row["hitting"]["mean"] == pytest.approx(sum(hitting) / 2)
        assert row["missing"]["n"] == row["hitting"]["n"] == 2
    assert all(row["missing"] is row["hitting"] is None for row in result["table"][:2])


def test_missing_ratio_needs_every_modality_alone(run):
    (_, row) = run("--method", "unimodal-gray", "mhm")["table"]
    assert row["missing"] is None and row["hitting"] is None


def test_the_default_is_a_comparison_with_a_table(run, capsys):
    methods = ["unimodal-gray", "unimodal-color", "joint", "mhm-no-freeze", "mhm"]
    assert [row["method"] for row in run()["table"]] == methods
    out = capsys.readouterr().out
    assert all(re.search(rf"^{method} ", out, re.MULTILINE) for method in methods)
    assert re.search(r"^Runs: .*mhm/digits$", out, re.MULTILINE)


def test_eval_only_gives_the_same_numbers_and_writes_nothing(run, tmp_path, monkeypatch):
    argv = ["--method", "unimodal-gray", "ensemble", "mhm"]
    argv += ["--seeds", "0", "1", "--heads", "2", "--epochs", "2", "--lr", "0.05"]
    trained = run(*argv)
    before = snapshot(tmp_path)
    monkeypatch.setattr(mhm, "train", lambda *_: pytest.fail("trained again"))
    found = run(*argv, "--eval-only")
    assert [*map(without_seconds, found["runs"])] == [*map(without_seconds, trained["runs"])]
    assert found["table"] == trained["table"]
    assert snapshot(tmp_path) == before


def test_eval_only_computes_anew(run, tmp_path):
    right = run("--method", "mhm")
    path = folder_of(tmp_path, "mhm") / "summary.json"
    path.write_text(json.dumps({**right, "test": {}, "gap": {}, "deployed": []}))
    assert without_seconds(run("--method", "mhm", "--eval-only")) == without_seconds(right)


def test_finished_runs_are_reported_and_more_seeds_reuse_them(run, tmp_path, monkeypatch):
    first = run("--method", "mhm")
    before = snapshot(tmp_path)
    trained, original = [], mhm.train
    monkeypatch.setattr(mhm, "train", lambda *a: (trained.append(a[4].seed), original(*a))[1])
    assert run("--method", "mhm") == first
    assert snapshot(tmp_path) == before and not trained
    result = run("--method", "mhm", "mhm", "--seeds", "0", "1", "2", "1")
    assert trained == [1, 2]
    assert [summary["seed"] for summary in result["runs"]] == [0, 1, 2]
    assert result["table"][0]["test"]["n"] == 3
    assert run("--method", "mhm", "--seeds", "0", "1", "2")["table"] == result["table"]
    assert trained == [1, 2]


# ---- Tables 3 to 6 and Figure 2 ----

# Of each table the methods in the order of the paper, the columns, and the paper's numbers on AVE
# in that order; for Table 3 and 5 see `rows_of`.
TABLES = {
    "table3": (
        ["joint", "ensemble", "mhm-no-freeze", "mhm"],
        ["test", "gap (iid)", "gap (test)", "GS", "GS-harness"],
        {
            "accuracy": [75.6, 77.2, 77.2, 78.5],
            "GS": [0.17, 0.04, 0.19, 0.04],
            "GS-harness": [None, 0.27, 0.09, 0.08],
        },
    ),
    "table4": (
        ["unimodal-gray", "unimodal-color", "joint", "mhm"],
        ["test", "missing", "hitting"],
        {"missing": [None, None, 0.11, 0.06], "hitting": [None, None, 0.03, 0.08]},
    ),
    "table5": (
        ["joint", "mhm", "mhm", "mhm", "mhm"],
        ["test", "GS"],
        {"accuracy": [75.6, 76.0, 77.8, 78.5, 78.0], "GS": [0.17, 0.11, 0.05, 0.04, 0.04]},
    ),
    "table6": (
        [
            *("joint", "one-head-one-set", "one-head-k-sets", "k-heads-one-set"),
            *("mhm", "head-ensemble", "mmm"),
        ],
        ["test", "GS"],
        {"accuracy": [75.6, 75.5, 75.6, 76.0, 78.5, 78.4, 73.4]},
    ),
}
FIGURE2 = ["joint", "ensemble", "dropout", "shake-shake", "mhm-no-freeze", "mhm"]


def rows_of(name):
    """What stands in a table, row by row: (fields, method); two heads, one and two epochs."""
    methods = TABLES[name][0]
    if name == "table3":
        return [({"epochs": epochs}, method) for epochs in (1, 2) for method in methods]
    if name == "table5":
        return [({"heads": heads}, method) for heads, method in enumerate(methods, start=1)]
    return [({}, method) for method in methods]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory):
    """Function: argument list -> result, table.json, the figure, the folder. All share --out, so
    that one experiment reuses the runs of the others."""
    out = tmp_path_factory.mktemp("experiments")

    @functools.cache
    def call(*argv):
        drawn = []

        def keep(draw):
            return lambda *args, **kwargs: (drawn.append(draw(*args, **kwargs)), drawn[-1])[1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(experiments, "draw_bars", keep(figures.draw_bars))
            patch.setattr(experiments, "draw_curves", keep(figures.draw_curves))
            result = mhm.main([*TINY, "--heads", "2", "--out", str(out), *argv])
        (figure,) = drawn or [None]
        folders = out.glob("mhm/digits/*/table.json")
        path = max(folders, key=lambda path: path.stat().st_mtime_ns, default=None)
        return SimpleNamespace(
            result=result, figure=figure, record=path and read(path), folder=path and path.parent
        )

    return call


SEEDS = ["--seeds", "0", "1"]


@pytest.mark.parametrize("name", list(TABLES))
def test_rows_columns_and_the_papers_numbers_of_a_table(experiment, name):
    found = experiment("--experiment", name, *SEEDS)
    rows, (_, columns, paper) = found.record["rows"], TABLES[name]
    heads = "" if name == "table5" else "-heads=2"
    assert found.folder.name == f"{name}-train-samples=40-epochs=1{heads}"
    assert found.result["table"] == rows and found.result["runs"] == found.record["runs"]
    expected = rows_of(name)
    fields = list(expected[0][0])
    assert [({field: row[field] for field in fields}, row["method"]) for row in rows] == expected
    for i, row in enumerate(rows):
        printed = [f"{column} on AVE" for column in paper]
        assert list(row) == ["method", *fields, "fusion", *columns, *printed]
        for column, numbers in paper.items():
            number = row[f"{column} on AVE"]
            assert (None if number is None else float(number)) == numbers[i % len(numbers)]
        assert row["test"]["n"] == 2
    assert found.record["arguments"]["seeds"] == [0, 1]
    assert found.record["arguments"]["gs"] == "pairwise"


@pytest.mark.parametrize("name", list(TABLES))
def test_a_table_holds_what_its_methods_give_by_themselves(experiment, name):
    rows = experiment("--experiment", name, *SEEDS).record["rows"]
    methods = TABLES[name][0] if name == "table4" else []  # its ratios need the unimodal runs too
    for row, (fields, method) in zip(rows, rows_of(name), strict=True):
        flags = [word for field, value in fields.items() for word in (f"--{field}", str(value))]
        flags = [] if flags == ["--heads", "1"] else flags
        table = experiment(*flags, *SEEDS, "--method", method, method, *methods).result["table"]
        assert {column: row[column] for column in TABLES[name][1]} == {
            column: table[0][column] for column in TABLES[name][1]
        }


@pytest.mark.parametrize("name", list(TABLES))
def test_bars_of_the_figure_are_the_values_of_the_table(experiment, name):
    found = experiment("--experiment", name, *SEEDS)
    assert (found.folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    columns = TABLES[name][1]
    assert len(found.figure.axes) == len(columns)
    for axis, column in zip(found.figure.axes, columns, strict=True):
        values = [row[column]["mean"] for row in found.record["rows"] if row[column]]
        assert values and [bar.get_height() for bar in axis.patches] == values
        assert axis.get_ylabel().startswith(column)


@pytest.mark.parametrize("name", ["table3", "table4", "table6"])
def test_paired_differences_of_a_table(experiment, name):
    record = experiment("--experiment", name, *SEEDS).record
    tests = {(x["method"], x["epochs"], x["seed"]): x["test"]["accuracy"] for x in record["runs"]}

    def mean(method, epochs):
        return (tests[method, epochs, 0] + tests[method, epochs, 1]) / 2

    reference = "mhm" if name == "table6" else "joint"
    expected = {
        (method, reference, epochs): mean(method, epochs) - mean(reference, epochs)
        for method, epochs, _ in tests
        if method != reference and not method.startswith("unimodal-")
    }
    if name == "table3":
        expected |= {
            ("mhm", "mhm-no-freeze", n): mean("mhm", n) - mean("mhm-no-freeze", n) for n in (1, 2)
        }
    found = {(x["method"], x["reference"], x.get("epochs", 1)): x["mean"] for x in record["paired"]}
    assert found == pytest.approx(expected)


def test_table5_does_not_pair_runs_of_different_numbers_of_heads(experiment):
    assert experiment("--experiment", "table5", *SEEDS).record["paired"] == []


def test_curves_of_figure2_are_means_over_seeds_by_epoch(experiment):
    found = experiment("--experiment", "figure2", "--epochs", "2", *SEEDS)
    panels = found.record["panels"]
    assert found.result["panels"] == panels
    assert list(panels) == ["error (%)", "generalization gap (points)", "GS", "GS-harness"]
    assert [list(curves) for curves in panels.values()] == [
        *[FIGURE2] * 3,
        ["ensemble", "mhm-no-freeze", "mhm"],
    ]
    for method in FIGURE2:
        runs = [history_of(runs_folder(found, method, seed)) for seed in (0, 1)]
        for epoch, entries in enumerate(zip(*runs, strict=True)):
            first, second = entries
            error = 100 - (first["val"]["accuracy"] + second["val"]["accuracy"]) / 2
            assert panels["error (%)"][method][epoch] == pytest.approx(error)
            gap = (first["gap"] + second["gap"]) / 2
            assert panels["generalization gap (points)"][method][epoch] == pytest.approx(gap)
            if method in panels["GS-harness"]:
                harness = sum(entry["gs_harness"]["pairwise"] for entry in entries) / 2
                assert panels["GS-harness"][method][epoch] == pytest.approx(harness)
        traces = [
            np.load(runs_folder(found, method, s) / "predictions.npz")["val_trace"] for s in (0, 1)
        ]
        gs = [slow_divergence(pair.astype(float), "pairwise") for pair in np.stack(traces, axis=1)]
        assert panels["GS"][method] == pytest.approx(gs, rel=1e-4) and len(gs) == 2


def runs_folder(found, method, seed):
    """The folder of a run of two epochs beside that of the experiment."""
    (folder,) = found.folder.parent.glob(f"{method}-concat-train-samples=40-epochs=2*-seed{seed}")
    return folder


def test_lines_of_figure2_are_its_values(experiment):
    found = experiment("--experiment", "figure2", "--epochs", "2", *SEEDS)
    assert (found.folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    for axis, (name, curves) in zip(found.figure.axes, found.record["panels"].items(), strict=True):
        assert axis.get_ylabel() == name
        assert {line.get_label(): list(line.get_ydata()) for line in axis.lines} == curves
        assert all(list(line.get_xdata()) == [1, 2] for line in axis.lines)


@pytest.mark.parametrize("name", [*TABLES, "figure2"])
def test_an_experiment_of_a_single_seed(experiment, name):
    found = experiment("--experiment", name, "--seeds", "1")
    if name == "figure2":
        assert set(found.record["panels"]) == {
            *("error (%)", "generalization gap (points)", "GS-harness")
        }
    else:
        assert len(found.record["rows"]) == len(rows_of(name))
        assert all(row.get("GS") is None for row in found.record["rows"])
        assert all(row["standard_error"] is None for row in found.record["paired"])


@pytest.mark.parametrize("name", ["table3", "table4", "table6"])
def test_a_table_can_be_restricted(experiment, name):
    rows = experiment(f"--experiment={name}", "--method", "mhm", "joint", *SEEDS).record["rows"]
    assert [row["method"] for row in rows] == ["mhm", "joint"] * (2 if name == "table3" else 1)


def test_figure2_can_be_restricted(experiment):
    found = experiment("--experiment", "figure2", *SEEDS, "--method", "dropout", "joint")
    assert [list(curves) for curves in found.record["panels"].values()] == [
        ["dropout", "joint"]
    ] * 3


def test_an_experiment_by_the_other_divergence(experiment):
    found = experiment("--experiment", "table3", "--gs", "mean", *SEEDS).record
    other = experiment("--experiment", "table3", *SEEDS).record
    assert found["arguments"]["gs"] == "mean"
    for row, same in zip(found["rows"], other["rows"], strict=True):
        assert 0 < row["GS"]["mean"] <= same["GS"]["mean"] / 2  # (R - 1) / R of it at most


@pytest.mark.parametrize("choice", [["--fusion", "sum"], ["--heads", "3"], ["--branches", "3"]])
def test_figures_of_other_knobs_stand_in_other_folders(run, tmp_path, choice):
    for flags in ([], choice):
        run("--experiment", "figure2", "--method", "mhm", "shake-shake", *flags)
    records = [read(path) for path in tmp_path.glob("mhm/digits/figure2*/table.json")]
    knob = choice[0].removeprefix("--")
    assert {record["arguments"].get(knob) for record in records} > {
        choice[1] if knob == "fusion" else int(choice[1])
    }


# ---- Bad input ----


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--heads", "1"], "must be a whole number at least 2, not '1'"),
        (["--heads", "2.5"], "must be a whole number at least 2, not '2.5'"),
        (["--branches", "1"], "must be a whole number at least 2, not '1'"),
        (["--gs", "nonsense"], "invalid choice: 'nonsense'"),
        (["--experiment", "table1"], "invalid choice: 'table1'"),
        (["--dataset", "cifar"], "invalid choice: 'cifar'"),
        (["--epochs", "0"], "must be a whole number at least 1, not '0'"),
        (["--resume", "--overwrite"], "not allowed with argument"),
        (["--head", "3"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_refused_by_name(run, capsys, argv, sentence):
    with pytest.raises(SystemExit) as exit_info:
        run(*argv)
    assert exit_info.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--method", "mmh"], "no method 'mmh' for digits; choose from joint, mhm, mhm-no-freeze"),
        (["--method", "unimodal-audio"], "unimodal-gray, unimodal-color"),
        (["--method", "pmr"], "no method 'pmr'"),
        (["--heads", "41"], "40 training samples do not make 41 folds; lower --heads"),
        (["--train-samples", "3", "--method", "mhm"], "3 training samples do not make 4 folds"),
        (["--train-samples", "3", "--experiment", "table5", "--heads", "2"], "lower --heads"),
        (["--audio-snr", "3"], "digits has no dial --audio-snr"),
        (["--dataset", "av-digits", "--data-root", "/nowhere"], "data/prepare.py fsdd"),
        (["--dataset", "av-digits", "--data-root", "/nowhere", "--experiment", "table4"], "fsdd"),
        (["--experiment", "table6", "--method", "nonsense"], "no method 'nonsense' for digits"),
        (["--method", "mhm", "--eval-only"], "holds no run; train it first"),
        (["--experiment", "figure2", "--eval-only"], "leave one of them out"),
    ],
)
def test_bad_requests_are_one_sentence(run, argv, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        run(*argv)


def test_as_many_heads_as_samples_is_not_too_many(run):
    assert run("--method", "mhm", "--train-samples", "5", "--heads", "5")["deployed"] == [0]


@pytest.mark.parametrize("kind", ["missing", "truncated", "empty", "garbage"])
@pytest.mark.parametrize("name", ["predictions.npz", "metrics.jsonl"])
def test_damaged_file_of_a_finished_run_is_named(run, tmp_path, name, kind):
    run("--method", "mhm", "--epochs", "2")
    damage(folder_of(tmp_path, "mhm") / name, kind)
    before = snapshot(tmp_path)
    for flags in ([], ["--experiment", "figure2"]):
        with pytest.raises(UserError, match=rf"{name} cannot be read.*--overwrite"):
            run("--method", "mhm", "--epochs", "2", *flags)
    assert snapshot(tmp_path) == before
    run("--method", "mhm", "--epochs", "2", "--overwrite")
    assert history_of(folder_of(tmp_path, "mhm"))


def test_metrics_that_lack_an_epoch_are_named(run, tmp_path):
    run("--method", "mhm", "--epochs", "2")
    path = folder_of(tmp_path, "mhm") / "metrics.jsonl"
    path.write_text(path.read_text().splitlines(keepends=True)[0])
    with pytest.raises(UserError, match=r"metrics.jsonl cannot be read.*--overwrite"):
        run("--method", "mhm", "--epochs", "2", "--experiment", "figure2")


@pytest.mark.parametrize("method", [*mhm.METHODS, "unimodal-gray"])
def test_huge_learning_rate_ends_with_a_sentence(run, tmp_path, method):
    with pytest.raises(UserError, match=r"became (nan|inf) in epoch 0; nothing was saved.*--lr"):
        run("--method", method, "--lr", "1e30")
    assert {path.name for path in folder_of(tmp_path, method).iterdir()} == {"config.json"}


def test_the_command_line_gives_one_line_and_no_traceback(tmp_path, monkeypatch):
    words = ["mhm.py", "--dataset", "av-digits", "--data-root", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(str(ROOT / "mhm.py"), run_name="__main__")
    assert re.fullmatch("error: .*", stopped.value.code)
