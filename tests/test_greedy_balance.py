"""greedy_balance.py and its experiments from the command line: every option, what they write and
refuse. What training does, step by step: test_greedy_equations.py."""

import functools
import json
import math
import random
import re
import statistics
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import UNLISTED
from fake_clips import FROM_FILES
from test_greedy_equations import percent_right, slow_cut_branch
from test_pmr import MODALITIES, equal, history_of, tensors
from test_run import read, snapshot, without_seconds

import greedy_balance as greedy
from common import command_line, storage, tasks
from common import run as run_room
from common.command_line import Command
from common.curves import draw_curves
from common.datasets import DATASETS, TensorSplit
from common.errors import UserError
from common.metrics import linear_probe, macro_f1
from common.naming import run_name
from common.run import Run
from common.seeding import make_generator, seed_phase
from common.tables import lookup, spread
from experiments import greedy_balance as experiments
from experiments import grid

PAIR = ("first", "second")
TINY = {"dataset": "synthetic", "train_samples": 40, "epochs": 2, "batch_size": 20, "device": "cpu"}
DIGITS = {"dataset": "digits", "train_samples": 100, "batch_size": 40, "epochs": 4}
FUSED = ["joint", "rubi", "random", "guided"]
PROBE, SLOW = greedy.probe_encoders, pytest.mark.slow


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Loading, drawing, probes and F1 are tested elsewhere; here they would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "load_dataset", functools.cache(command_line.load_dataset))
        patch.setattr(run_room, "draw_curves", lambda title, *content: content)
        patch.setattr(run_room, "write_figure", storage.write_json)  # curves.png is JSON
        patch.setattr(greedy, "probe_encoders", lambda encode, splits: {})
        patch.setattr(tasks, "macro_f1", lambda *_: 0.0)
        yield


@pytest.fixture
def run(tmp_path, data_root):
    """Run greedy_balance.main on a tiny part of the data, with runs in a temporary folder."""
    settings = {**TINY, "out": str(tmp_path), "data_root": str(data_root)}
    return lambda methods, **own: greedy.main({**settings, "method": methods.split(), **own})


def folder_of(out, method, seed=0):
    """The only folder under `out` of a method and seed."""
    (folder,) = out.glob(f"greedy_balance/*/{method}*-seed{seed}")
    return folder


def curated_in(folder):
    """The curated modality of every step of a run."""
    return [m for entry in history_of(folder) for m in entry["steps"]["curated"]]


def network_of(folder):
    """Name -> weight or buffer of the last network."""
    found = tensors(folder).items()
    return {key.removeprefix(".model."): x for key, x in found if key.startswith(".model.")}


def prepare(method, **settings):
    """The fresh network of a method, the splits and the configuration."""
    command = Command(greedy.SCRIPT, {**TINY, "method": [method], **settings})
    *_, config = command.configs()
    return greedy.build_model(config, command.splits), command.splits, config


def write_features(path, modalities, samples=100):
    """A .npz file of noisy vectors: the settings to train on it."""
    rng = np.random.default_rng(0)
    arrays = {f"{part}_labels": np.arange(samples) % 4 for part in ("train", "val", "test")}
    for name, labels in list(arrays.items()):
        for m in modalities:
            noisy = np.eye(4)[labels] + rng.standard_normal((samples, 4))
            arrays[name.replace("labels", m)] = noisy
    np.savez(path, **arrays)
    return {"dataset": "features", "data_root": str(path), "train_samples": samples}


# ---- Every method, dataset, optimizer, and every other choice ----


@pytest.mark.parametrize(
    "dataset", [m if m == "synthetic" else pytest.param(m, marks=SLOW) for m in MODALITIES]
)
def test_every_method_dataset_optimizer_and_precision(run, tmp_path, require, root_of, dataset):
    """Each pair of them comes up."""
    require(dataset)
    modalities, place = MODALITIES[dataset], list(MODALITIES).index(dataset)
    flags = {"dataset": dataset, "data_root": root_of(dataset), "tolerance": 0.0, "window": 2}
    for i, method in enumerate([*FUSED, *(f"unimodal-{m}" for m in modalities)]):
        optimizer = ("sgd", "adam", "adagrad")[(i + place) % 3]
        precision = ("bf16", "fp32")[(i + place) % 2]
        out = tmp_path / method
        summary = run(method, **flags, optimizer=optimizer, precision=precision, out=str(out))
        test = summary["test"]
        assert summary["method"] == method and math.isfinite(test["loss"])
        if method.startswith("unimodal-"):
            alone = {"alone": test["accuracy"]}
            assert test[method.removeprefix("unimodal-")] == alone and "d_util" not in test
            assert not {"d_speed", "biased"} & summary.keys() and summary["fusion"] is None
            continue
        for found in (test, summary["val_iid"], *(summary["best"][k] for k in ("test", "val_iid"))):
            assert all(found[m].keys() == {"branch", "cut", "u"} for m in modalities)
        assert math.isfinite(summary["d_speed"]) and math.isfinite(summary["best"]["d_speed"])
        assert (summary.get("biased") in modalities) == (method == "rubi")
        curated = set(curated_in(folder_of(out, method)))
        assert len(curated) == 2 if method == "guided" else curated <= {None, *modalities}
        assert method in ("guided", "random") or curated == {None}


def test_every_dataset_is_tested_here_or_in_test_clips():
    assert {*MODALITIES, *FROM_FILES} == set(DATASETS) == {*greedy.RECIPES} | UNLISTED
    recipe = greedy.RECIPES["cg-mnist"]  # the paper's
    assert [recipe[k] for k in ("batch_size", "lr", "momentum")] == [128, 0.01, 0.9]
    assert (recipe["tolerance"], recipe["window"], recipe["weight_decay"]) == (0.1, 5, 0)


# Re-balancing from the second epoch on: R C C, R C C, R C C.
GUIDED = {"train_samples": 60, "epochs": 4, "tolerance": 0.0, "window": 2}
GUIDED |= {"lr": 0.02, "weight_decay": 0.001}
DEFAULTS = {"gate_mean": "after", "gate_factor": 1.0, "l1": 0.0, "schedule": "none"}
DEFAULTS |= {"until_fitted": True, "biased": "first"}  # four epochs do not fit the data
CHOICES = [{"tolerance": 9.0}, {"window": 1}, {"gate_mean": "before"}, {"gate_factor": 2.0}]
CHOICES += [{"l1": 0.01}, {"optimizer": "adam"}, {"schedule": "step"}, {"schedule": "cosine"}]
CHOICES += [{"precision": "bf16"}, {"noise": 0.0}, {"batch_size": 1000}, {"weight_decay": 0.0}]
CHOICES += [{"momentum": 0.0}, {"lr": 0.05}, {"data_seed": 5}, {"seeds": [5]}]


@pytest.fixture(scope="module")
def guided_network(tmp_path_factory):
    out = tmp_path_factory.mktemp("guided")
    greedy.main({**TINY, **GUIDED, "method": ["guided"], "out": str(out)})
    return network_of(folder_of(out, "guided"))


@pytest.mark.parametrize("choice", [DEFAULTS, *CHOICES], ids="-".join)
def test_every_other_choice_acts(run, tmp_path, guided_network, choice):
    run("guided", **GUIDED | choice)
    folder = folder_of(tmp_path, "guided", *choice.get("seeds", [0]))
    assert equal(network_of(folder), guided_network) == (choice is DEFAULTS)


@pytest.mark.parametrize("method", [*FUSED, "unimodal-first"])
def test_only_the_knobs_of_a_method_count(method):
    """Not in the folder's name and not among the arguments: such a run is the same run."""
    every = {"tolerance": 0.7, "window": 7, "gate_mean": "before", "biased": "first"}
    shared = {"gate_factor": 2.0, "l1": 0.1, "until_fitted": True}
    own = {"guided": ["tolerance", "window", "gate_mean"], "random": ["gate_mean"]}
    own |= {"rubi": ["biased"]}
    _, _, config = prepare(method, **every, **shared)
    counted = {k: x for k, x in (shared | every).items() if k in (*shared, *own.get(method, ()))}
    fusion = "" if method == "unimodal-first" else "-mmtm"
    named = "".join(f"-{k.replace('_', '-')}={x}" for k, x in counted.items())
    name = f"{method}{fusion}-train-samples=40-epochs=2-batch-size=20{named}-seed0"
    assert run_name(config.arguments, config.defaults) == name
    assert {k: config.arguments[k] for k in every | shared if k in config.arguments} == counted


def test_the_default_is_a_comparison_with_a_table(tmp_path, capsys):
    result = greedy.main({**TINY, "epochs": 1, "out": str(tmp_path)})
    methods = ["unimodal-first", "unimodal-second", "joint", "random", "guided"]
    assert [row["method"] for row in result["table"]] == methods
    titles = ["test", "best", "first branch", "u(second|first)", "second branch", "u(first|second)"]
    titles += ["d_util", "d_util (iid)", "d_speed"]
    assert list(result["table"][2]) == ["method", "fusion", *titles]
    out = capsys.readouterr().out
    assert all(re.search(rf"^{method} ", out, re.MULTILINE) for method in methods)
    assert re.search(r"^joint .* -?\d\.\d{3}$", out, re.MULTILINE)  # rates have three decimals
    assert next(iter(greedy.METHODS)) == "guided"  # runs alone where data are large


# ---- What the algorithm promises over a whole run ----


@pytest.mark.slow
def test_joint_equals_a_plain_loop_bit_for_bit(run, tmp_path):
    settings = {**DIGITS, "schedule": "step", "weight_decay": 0.01}
    run("joint", **settings)
    model, splits, _ = prepare("joint", **settings)
    inputs, labels, _ = next(splits.train.batches(100))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.01)
    folder = folder_of(tmp_path, "joint")
    for epoch, entry in enumerate(history_of(folder)):
        optimizer.param_groups[0]["lr"] = 0.01 if epoch < 0.7 * 4 else 0.001
        model.train()
        losses, right = [], {"gray": 0, "color": 0, "fused": 0}
        for batch in torch.randperm(100, generator=seed_phase(0, "train", epoch)).split(40):
            logits = model({m: x[batch] for m, x in inputs.items()})[0]
            loss = sum(F.cross_entropy(x, labels[batch]) for x in logits.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses += [loss.item()] * len(batch)
            fused = {"fused": logits["gray"] + logits["color"]}
            for m, x in (logits | fused).items():
                right[m] += percent_right(x, labels[batch]) * len(batch) / 100
        train = entry["train"]
        assert train["loss"] == pytest.approx(statistics.fmean(losses), rel=1e-5)
        found = {m: train[m]["branch"] for m in logits} | {"fused": train["accuracy"]}
        assert found == pytest.approx(right)
    assert equal(network_of(folder), model.state_dict())


def test_a_tolerance_that_is_never_left_gives_joint_training(run, tmp_path):
    run("joint guided", tolerance=99.0)
    joint, guided = (folder_of(tmp_path, method) for method in ("joint", "guided"))
    assert equal(tensors(guided), tensors(joint)) and history_of(guided) == history_of(joint)


@pytest.mark.slow
def test_random_draws_other_steps_for_every_seed_and_epoch(run, tmp_path):
    run("random", seeds=[0, 1], train_samples=60, batch_size=5, epochs=3)
    plans = [history_of(folder_of(tmp_path, "random", seed)) for seed in (0, 1)]
    epochs = [entry["steps"]["curated"][1:] for plan in plans for entry in plan[1:]]
    assert len(set(map(tuple, epochs))) == 4


def test_training_never_reads_the_test_split(run, monkeypatch):
    """Test and val_iid are read after the last epoch only: by two networks, whole and cut off."""
    splits, reads, epochs = prepare("guided", dataset="digits")[1], [], []
    held_out = [splits.test.all_labels.data_ptr(), splits.val_iid.tensors["color"].data_ptr()]
    batches, end_epoch = TensorSplit.batches, Run.end_epoch
    monkeypatch.setattr(command_line, "load_dataset", lambda *_, **__: splits)

    def spy(self, *args, **kwargs):
        pointers = {self.all_labels.data_ptr(), self.tensors["color"].data_ptr()}
        if pointers & set(held_out):
            reads.append(len(epochs))
        return batches(self, *args, **kwargs)

    monkeypatch.setattr(TensorSplit, "batches", spy)
    monkeypatch.setattr(Run, "end_epoch", lambda *a: (epochs.append(1), end_epoch(*a)))
    run("guided", dataset="digits", tolerance=0.0)
    assert reads == [2] * 8


# ---- RUBi ----


@pytest.fixture
def trained(monkeypatch):
    """The methods that are trained, in order."""
    methods, original = [], greedy.train
    monkeypatch.setattr(greedy, "train", lambda *a: (methods.append(a[3].method), original(*a)))
    return methods


@pytest.mark.slow
@pytest.mark.parametrize("duplicate", [None, "first"])
def test_rubi_asks_the_joint_run_of_the_same_seed(run, tmp_path, trained, duplicate):
    """The modality that adds more to the other branch; the first one if they are equal."""
    first, second = ("first", "first-2") if duplicate else PAIR
    found = {"seeds": [0, 1, 2], "duplicate": duplicate}
    run("joint", **found)
    for seed, rates in enumerate([(0.5, 0.25), (-0.25, 0.5), (0.5, 0.5)]):  # u of 0 is u(m1 | m0)
        path = folder_of(tmp_path, "joint", seed) / "summary.json"
        summary = read(path)
        summary["val_iid"][first]["u"], summary["val_iid"][second]["u"] = rates
        path.write_text(json.dumps(summary))
    runs = run("rubi", **found)["runs"]
    assert [summary["biased"] for summary in runs] == [second, first, first]
    assert trained == ["joint"] * 3 + ["rubi"] * 3  # finished joint runs are not trained again


@pytest.mark.slow
def test_rubi_with_a_named_modality_is_the_same_run_and_asks_no_other(run, tmp_path, trained):
    found = run("rubi")["biased"]
    assert (folder_of(tmp_path, "joint") / "summary.json").exists()
    by_default = folder_of(tmp_path, "rubi")
    for m in PAIR:
        run("rubi", biased=m, out=str(tmp_path / m))
        folder = folder_of(tmp_path / m, "rubi")
        assert equal(network_of(folder), network_of(by_default)) == (m == found)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]
    assert trained == ["joint", "rubi", "rubi", "rubi"]
    for _ in range(2):
        run("joint rubi", overwrite=True)  # each of them once
    assert trained[4:] == 2 * ["joint", "rubi"]
    assert any(name.startswith(".rubi.mlp") for name in tensors(by_default))
    plain, _, _ = prepare("rubi")  # RUBi is left out at test time
    assert network_of(by_default).keys() == plain.state_dict().keys()


# ---- What a run reports and leaves behind ----


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A guided run that has learnt something: its folder and settings."""
    out = tmp_path_factory.mktemp("fitted")
    settings = {"dataset": "digits", "train_samples": 200, "epochs": 6, "lr": 0.05}
    settings |= {"batch_size": 10, "tolerance": 0.0}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tasks, "macro_f1", macro_f1)
        patch.setattr(greedy, "probe_encoders", PROBE)
        greedy.main({**TINY, **settings, "method": ["guided"], "out": str(out)})
    return folder_of(out, "guided"), settings


@pytest.mark.slow
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
@torch.no_grad()
def test_summary_recomputed_from_the_checkpoints(fitted, name):
    folder, settings = fitted
    summary, history = read(folder / "summary.json"), history_of(folder)
    model, splits, _ = prepare("guided", **settings)
    checkpoint = torch.load(folder / name, weights_only=True)["state"]
    model.load_state_dict(checkpoint["model"])
    scores = [entry["val"]["accuracy"] for entry in history]
    assert summary["best"]["epoch"] == scores.index(max(scores)) < 5
    epoch = 5 if name == "last.pt" else scores.index(max(scores))
    found = summary if name == "last.pt" else summary["best"]
    known, known_labels, _ = next(splits.train.batches(200))
    means = [{m: x.mean(dim=0) for m, x in h.items()} for h in model.eval()(known)[2]]
    for split, numbers in ((splits.val_iid, found["val_iid"]), (splits.test, found["test"])):
        inputs, labels, index = next(split.batches(10**6))
        logits, rates = model(inputs)[0], []
        for m, x in inputs.items():
            whole = percent_right(logits[m], labels)
            cut = percent_right(slow_cut_branch(model, m, x, means), labels)
            rates.append((whole - cut) / whole)
            expected = {"branch": whole, "cut": cut, "u": rates[-1]}
            assert {k: numbers[m][k] for k in expected} == pytest.approx(expected)
        assert numbers["d_util"] == pytest.approx(rates[0] - rates[1])
        fused = (logits["gray"] + logits["color"]) / 2
        assert numbers["accuracy"] == pytest.approx(percent_right(fused, labels))
        assert numbers["macro_f1"] == pytest.approx(macro_f1(fused, labels))
        loss = sum(F.cross_entropy(x, labels).item() for x in logits.values())
        assert numbers["loss"] == pytest.approx(loss, rel=1e-4)
    gray, color = (checkpoint["balance"][f"speed.{k}"].log10() for k in ("cross", "own"))
    gray, color = (gray - color).tolist()
    assert found["d_speed"] == history[epoch]["d_speed"] == pytest.approx(gray - color)
    if name == "best.pt":
        return
    assert rates[0] != rates[1] and summary["epochs"] == 6
    assert summary["speed"] == pytest.approx({"gray": gray, "color": color})
    weights = torch.cat([p.flatten() for p in model.parameters()]).tolist()
    assert summary["parameters"] == len(weights)
    assert summary["sparsity"] == sum(abs(x) < 1e-3 for x in weights) / len(weights) > 0
    z, unseen = (model(x, means=means)[1] for x in (known, inputs))
    for m in z:
        probe = percent_right(linear_probe(z[m], known_labels, 10)(unseen[m]), labels)
        assert numbers[m]["probe"] == pytest.approx(probe, abs=0.6)
    saved = np.load(folder / "predictions.npz")
    expected = {"index": index, "label": labels, "logits": fused}
    expected |= {f"logits_{m}": x for m, x in logits.items()}
    assert set(saved) == set(expected)
    for key, value in expected.items():
        np.testing.assert_allclose(saved[key], value, rtol=1e-4, atol=1e-5)
    (panels, steps), curated = read(folder / "curves.png"), curated_in(folder)
    assert steps["curated"] == curated and len(set(curated)) > 1
    assert steps["d_speed"] == [d for x in history for d in x["steps"]["d_speed"]]
    assert panels["accuracy (%)"] == {
        "train": [entry["train"]["accuracy"] for entry in history],
        "validation": scores,
        **{f"{m} branch": [entry["val"][m]["branch"] for entry in history] for m in logits},
    }


@pytest.mark.slow
def test_eval_only_reports_the_same_and_writes_nothing(run, tmp_path):
    methods = "guided random rubi unimodal-first"
    before = run(methods, tolerance=0.0)["runs"]
    files = snapshot(tmp_path)
    again = run(methods, tolerance=0.0, eval_only=True)["runs"]
    assert [without_seconds(x) for x in again] == [without_seconds(x) for x in before]
    assert snapshot(tmp_path) == files
    panels, steps = read(folder_of(tmp_path, "unimodal-first") / "curves.png")
    assert steps is None and list(panels["accuracy (%)"]) == ["train", "validation"]


@pytest.mark.slow
def test_until_fitted_stops_at_100_percent_of_the_training_data(run, tmp_path):
    """The last epoch is the first with 100 %; --resume after a kill at the end adds none."""
    settings = {"train_samples": 20, "optimizer": "adam", "epochs": 60}
    summary = run("joint", **settings, until_fitted=True)
    folder = folder_of(tmp_path, "joint")
    shares = [entry["train"]["accuracy"] for entry in history_of(folder)]
    assert shares.index(100) == len(shares) - 1 == summary["epochs"] - 1 < 59
    network_then = network_of(folder)
    for name in ("summary.json", "predictions.npz", "curves.png"):
        (folder / name).unlink()
    again = run("joint", **settings, until_fitted=True, resume=True)
    assert without_seconds(again) == without_seconds(summary)
    assert equal(network_of(folder), network_then)
    run("joint", **settings | {"epochs": len(shares), "out": str(tmp_path / "fixed")})
    assert equal(network_of(folder_of(tmp_path / "fixed", "joint")), network_then)


def test_duplicate_trains_on_one_modality_twice(run, tmp_path):
    result = run("joint guided unimodal-first-2", duplicate="first")
    assert result["runs"][0]["test"].keys() >= {"first", "first-2"}
    titles = [title for title in result["table"][0] if title.startswith("u(")]
    assert titles == ["u(first-2|first)", "u(first|first-2)"]
    assert "-duplicate=first-" in folder_of(tmp_path, "joint").name
    splits, whole = (prepare("joint", **x)[1] for x in ({"duplicate": "second"}, {}))
    for name in splits.NAMES:
        inputs, labels, index = next(getattr(splits, name).batches(7))
        original, *expected = next(getattr(whole, name).batches(7))
        assert list(inputs) == ["second", "second-2"] == list(splits.modalities)
        assert all(torch.equal(x, original["second"]) for x in inputs.values())
        assert all(map(torch.equal, (labels, index), expected))
    plain, _, _ = next(whole.train.batches(7))
    inputs, _, _ = next(splits.train.batches(7, make_generator(0), augment=True))
    assert torch.equal(inputs["second"], inputs["second-2"])  # augmented alike
    assert not torch.equal(inputs["second"].sort(dim=0)[0], plain["second"].sort(dim=0)[0])


@pytest.mark.slow
def test_one_and_three_modalities(run, tmp_path):
    settings = write_features(tmp_path / "three.npz", "abc", 41) | {"tolerance": 0.0}
    result = run("joint rubi random guided unimodal-c", **settings, biased="c")
    for summary, row in zip(result["runs"][:-1], result["table"][:-1], strict=True):
        rates = [summary["test"][m]["u"] for m in "abc"]
        assert summary["test"]["d_util"] == max(rates) - min(rates)
        speeds = summary["speed"].values()
        assert summary["d_speed"] == max(speeds) - min(speeds) > 0
        titles = [title for title in row if title.startswith("u(")]
        assert titles == ["u(b c|a)", "u(a c|b)", "u(a b|c)"]
    assert set(curated_in(folder_of(tmp_path, "guided"))) > {None}
    with pytest.raises(UserError, match="Of 3 modalities, name the biased one by --biased"):
        run("rubi", **settings)
    settings = write_features(tmp_path / "one.npz", "a")
    for method in FUSED:
        with pytest.raises(UserError, match=r"one modality, .*; use --method unimodal-a"):
            run(method, **settings)
    assert run("unimodal-a", **settings)["test"]["a"].keys() == {"alone"}
    settings = write_features(tmp_path / "two.npz", "ab", 41)  # the last batch is one vector
    assert math.isfinite(run("guided", **settings)["d_speed"])


def test_curves_shade_the_windows_and_plot_d_speed():
    curated = [None, "gray", "gray", None, "color", "gray", None]
    d_speed = [0.1, 0.2, 0.2, -0.3, -0.3, -0.3, 0.4]
    steps = {"d_speed": d_speed, "curated": curated}
    axis = draw_curves("a run", {"accuracy (%)": {"train": [10, 20]}}, steps).axes[-1]
    (line,) = axis.lines
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6, 7] and list(line.get_ydata()) == d_speed
    shaded = [
        (patch.get_x(), patch.get_width(), patch.get_facecolor()[:3]) for patch in axis.patches
    ]
    assert [(x, x + width) for x, width, _ in shaded] == [(1.5, 3.5), (4.5, 5.5), (5.5, 6.5)]
    gray, color, gray_again = (rgb for _, _, rgb in shaded)
    assert gray == gray_again != color
    labels = [text.get_text() for text in axis.get_legend().get_texts()]
    assert sorted(labels) == ["color curated", "d_speed", "gray curated"]


# ---- Bad input ----


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--window 0", "must be a whole number at least 1, not '0'"),
        ("--tolerance -1", "must be a number at least 0, not '-1'"),
        ("--tolerance nan", "must be a number at least 0, not 'nan'"),
        ("--gate-mean middle", "invalid choice: 'middle'"),
        ("--gate-factor 0", "must be a number above 0, not '0'"),
        ("--l1 -0.1", "must be a number at least 0, not '-0.1'"),
        ("--fusion concat", "invalid choice: 'concat'"),
        ("--dup gray", "unrecognized arguments"),
        ("--method guide", "no method 'guide' for digits; choose from guided, random, joint, rubi"),
        ("--method unimodal-color --duplicate gray", "unimodal-gray, unimodal-gray-2"),
        ("--biased depth", "no modality 'depth' in digits for --biased; choose from gray, color"),
        ("--duplicate depth", "no modality 'depth' in digits for --duplicate; choose from gray"),
        ("--duplicate gray --biased gray", "no modality is the biased one; leave out --biased"),
        ("--experiment l1", "python -m experiments.greedy_balance --help"),
        ("--method guided --eval-only", "holds no run; train it first"),
        ("--method rubi --eval-only", "holds no run; train it first"),
        ("table1 --rates 0", "must be a whole number at least 1, not '0'"),
        ("table9", "invalid choice: 'table9'"),
        ("sweep --lr 0.1", "sweep sets --lr itself; leave it out"),
        ("l1 --l1 0.1", "l1 sets --l1 itself; leave it out"),
        ("sweep --method guide", "no method 'guide'"),
        ("sweep --duplicate depth", "no modality 'depth' in digits for --duplicate"),
    ],
)
def test_bad_input_is_one_sentence(tmp_path, capsys, words, sentence):
    script = greedy if words.startswith("--") else experiments
    with pytest.raises((SystemExit, UserError)) as error:
        script.main([*words.split(), "--epochs", "1", "--out", str(tmp_path)])
    refused = error.type is SystemExit  # by the parser, which prints the flags, too
    text = capsys.readouterr().err if refused else str(error.value)
    assert sentence in text and (not refused or error.value.code == 2)
    assert refused or "\n" not in text


def test_a_huge_rate_ends_in_a_sentence(run):
    """NaN speeds and gates on the way change nothing about that."""
    for method in (*FUSED, "unimodal-first"):
        with pytest.raises(UserError, match=r"loss of .* became (nan|inf) in epoch \d; .*--lr"):
            run(method, lr=1e30, tolerance=0.0, biased="first")


# ---- Experiments ----

TABLE1 = ["unimodal-first", "unimodal-second", "joint", "rubi", "random", "guided"]
PAIRED = [("random", "joint"), ("guided", "joint"), ("guided", "random")]
KNOBS = ("method", "seed", "lr", "l1", "tolerance", "window")
PATHS = {  # of the numbers in a summary
    **{"test": "test.accuracy", "best": "best.test.accuracy"},
    **{"first branch": "best.test.first.branch", "u(second|first)": "best.test.first.u"},
    **{"second branch": "best.test.second.branch", "u(first|second)": "best.test.second.u"},
    **{"d_util": "best.test.d_util", "d_util (iid)": "best.val_iid.d_util"},
    **{"d_speed": "best.d_speed", "|d_util|": "|best.test.d_util|"},
    **{"|d_speed|": "|best.d_speed|", "sparsity": "sparsity"},
}
L1, SENSITIVITY = ["sparsity", "|d_util|", "|d_speed|", "test"], ["test", "d_util", "d_speed"]
POOLED = [*PATHS, "r(d_speed, d_util)", "r(d_speed, d_util iid)"]


def made_up(settings):
    """In place of greedy_balance.main: summaries with numbers of their own for every run."""
    runs, modalities = [], ("first", "first-2" if "duplicate" in settings else "second")
    for seed, method in product(settings["seeds"], settings["method"]):
        run = {**settings, "method": method, "seed": seed, "fusion": "mmtm"}
        draw = random.Random(str([run.get(knob) for knob in KNOBS])).random
        run["sparsity"] = draw()
        for epoch in (run, run.setdefault("best", {})):
            epoch |= {"d_speed": draw() - 0.5, "val_iid": {"d_util": draw()}}
            epoch["test"] = {m: {"branch": draw(), "u": draw()} for m in modalities}
            epoch["test"] |= {"accuracy": draw(), "d_util": draw() - 0.5}
            if method.startswith("unimodal-"):
                epoch |= {"test": {"accuracy": draw()}, "val_iid": {}, "d_speed": None}
                run["fusion"] = None
        runs.append(run)
    return {"runs": runs}


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Function: run an experiment on made-up runs; its record, summaries and figure."""
    monkeypatch.setattr(experiments, "WEIGHTS", (0.0, 0.01))
    monkeypatch.setattr(experiments, "TOLERANCES", (0.01, 1.0))
    monkeypatch.setattr(experiments, "WINDOWS", (1, 3))
    monkeypatch.setattr(greedy, "main", made_up)
    drawn = []
    monkeypatch.setattr(grid, "write_figure", lambda path, figure: drawn.append(figure))

    def call(words):
        flags = ["--dataset", "synthetic", "--seeds", "0", "1", "--out", str(tmp_path)]
        record = experiments.main([*words.split(), *flags])
        return record, [run for result in record["results"] for run in result["runs"]], drawn[-1]

    return call


@pytest.mark.parametrize(
    ("words", "methods", "titles"),
    [
        ("table1", TABLE1, [*PATHS]),
        ("table1 --until-fitted --method joint guided", ["joint", "guided"], [*PATHS]),
        ("sweep --rates 3", ["joint", "random", "guided"], POOLED),
        ("sweep --rates 2 --method unimodal-first joint", ["unimodal-first", "joint"], POOLED),
        ("l1", ["joint"], L1),
        ("l1 --method joint guided", ["joint", "guided"], L1),
        ("sensitivity", ["guided"], SENSITIVITY),
        ("sensitivity --method guided unimodal-first", ["guided", "unimodal-first"], SENSITIVITY),
    ],
)
def test_experiments_tabulate_their_runs(experiment, tmp_path, words, methods, titles):
    """Means and spreads over seeds, and of a sweep over its rates; differences are of runs that
    differ in the method alone. A modality alone has no d_util and no d_speed."""
    record, runs, _ = experiment(words)
    (folder,) = (tmp_path / "greedy_balance" / "synthetic").iterdir()
    written = read(folder / "table.json")
    assert written == {k: v for k, v in record.items() if k not in ("runs", "results")}
    assert grid.read_rows(folder / "rows.csv") == record["runs"]
    for title in {x.strip("|") for x in PATHS.keys() & record["rows"][0].keys()} - {"test", "best"}:
        path = PATHS[title].removeprefix("best.")  # of the last epoch, in rows.csv alone
        if path != PATHS[title]:
            found = [row[f"{title} (last)"] for row in record["runs"]]
            assert found == [lookup(run, path) for run in runs]
    assert len(record["runs"]) == len(runs) and written["arguments"]["method"] == methods
    assert list(dict.fromkeys(row["method"] for row in record["rows"])) == methods

    fields = {"l1": ["l1"], "sensitivity": ["tolerance", "window"]}.get(words.split()[0], [])

    def matching(row, method=None):
        wanted = {k: row[k] for k in KNOBS if k in row} | ({"method": method} if method else {})
        return [run for run in runs if wanted.items() <= run.items()]

    for row in record["rows"]:
        assert list(row) == ["method", *fields, "fusion", *titles]
        own = matching(row)
        for title in PATHS.keys() & row.keys():
            values = [lookup(run, PATHS[title]) for run in own]
            decimals = 1 if "branch" in title or title in ("test", "best") else 3
            found = None if None in values else spread(values, decimals if decimals > 1 else None)
            assert row[title] == found
        for title in POOLED[-2:] if titles is POOLED and row["fusion"] else ():
            other = "best.val_iid.d_util" if "iid" in title else "best.test.d_util"
            columns = ([lookup(run, path) for run in own] for path in ("best.d_speed", other))
            assert row[title] == pytest.approx(statistics.correlation(*columns), abs=0.005)
    compared = dict.fromkeys((row["method"], row["reference"]) for row in record["paired"])
    assert list(compared) == [pair for pair in PAIRED if set(pair) <= set(methods)]
    for row in record["paired"]:
        ours, theirs = (
            [run["test"]["accuracy"] for run in matching(row, row[k])]
            for k in ("method", "reference")
        )
        difference = statistics.fmean(ours) - statistics.fmean(theirs)
        assert (row["n"], row["mean"]) == (len(ours), pytest.approx(difference))


def test_figures_show_bars_of_table_1_every_run_of_a_sweep_and_trends(experiment):
    record, _, figure = experiment("table1")
    (axis,) = figure.axes
    assert [bar.get_height() for bar in axis.patches] == [r["test"]["mean"] for r in record["rows"]]
    _, runs, figure = experiment("sweep --rates 3 --method joint guided unimodal-first")
    assert [axis.get_ylabel() for axis in figure.axes] == ["d_util", "d_util (iid)", "d_speed"]
    for axis in figure.axes:
        assert [label.get_text() for label in axis.get_xticklabels()] == ["joint", "guided"]
        points = [c.get_offsets()[:, 1].tolist() for c in axis.collections]
        for method, drawn in zip(("joint", "guided"), points[::2], strict=True):
            own = [run for run in runs if run["method"] == method]
            assert drawn == pytest.approx([lookup(run, PATHS[axis.get_ylabel()]) for run in own])
    two = ("joint", "guided")
    for words, methods, knobs, columns in (
        ("l1 --method joint guided", two, ["l1"], L1),
        ("sensitivity", two[1:], ["tolerance", "window"], SENSITIVITY),
    ):
        record, _, figure = experiment(words)
        panels = list(product(knobs, columns))
        assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == panels
        for axis, (knob, column) in zip(figure.axes, panels, strict=True):
            for line, method in zip(axis.containers, methods, strict=True):
                rows = [row for row in record["rows"] if row["method"] == method]
                rows = rows[2:] if knob == "window" else rows[:2]
                drawn = line.lines[0].get_xydata().tolist()
                assert drawn == [[row[knob], row[column]["mean"]] for row in rows]


def test_grids_folders_and_the_papers_numbers(experiment, tmp_path, monkeypatch):
    rows = experiment("sensitivity --tolerance 0.5")[0]["rows"]
    found = [(row["tolerance"], row["window"]) for row in rows]
    assert found == [(0.01, 5), (1.0, 5), (0.5, 1), (0.5, 3)]
    record, _, _ = experiment("sweep --method joint --duplicate first")
    rates = [run["lr"] for run in record["runs"]]
    assert len(set(rates)) == 20 and all(1e-3 <= rate <= 1e-1 for rate in rates)
    assert record["title"] == "sweep on synthetic, first twice"
    assert {"u(first-2|first)", "u(first|first-2)"} < record["rows"][0].keys()
    experiment("sweep --rates 2")
    folders = {path.name for path in (tmp_path / "greedy_balance" / "synthetic").iterdir()}
    assert folders == {
        "sensitivity-tolerance=0.5",
        "sweep-method=joint-duplicate=first",
        "sweep-rates=2",
    }
    args = SimpleNamespace(dataset="cg-mnist", duplicate=None)
    methods = ["unimodal-gray", "unimodal-color", *FUSED]
    paper = SimpleNamespace(args=args, name="table1", modalities=("gray", "color"))
    paper.methods = lambda default: methods
    found = [experiments.table1(paper).extend({"method": m}, []) for m in methods]
    printed = ["99.14", None, "45.26", "44.79", "74.07", "91.01"]
    assert [row["accuracy (paper)"] for row in found] == printed


def test_the_grids_are_those_of_the_results():
    """Every value stands in results/, and no other does."""
    l1, sensitivity = (
        grid.read_rows(grid.RESULTS / f"greedy_{name}_digits.csv") for name in ("l1", "sensitivity")
    )
    assert {row["l1"] for row in l1} == set(experiments.WEIGHTS)
    assert {row["tolerance"] for row in sensitivity} == set(experiments.TOLERANCES)
    assert {row["window"] for row in sensitivity} == set(experiments.WINDOWS)
    sweep = grid.read_rows(grid.RESULTS / "greedy_sweep_digits.csv")
    assert {row["lr"] for row in sweep} == set(grid.log_uniform(20, *experiments.RATES))


@pytest.mark.slow
def test_an_experiment_end_to_end(tmp_path):
    words = "--dataset synthetic --train-samples 20 --epochs 1 --device cpu --rates 2 --out"
    record = experiments.main(["sweep", *words.split(), str(tmp_path)])
    (figure,) = tmp_path.glob("greedy_balance/synthetic/sweep*/figure.png")
    assert figure.read_bytes().startswith(b"\x89PNG")
    trained = list(tmp_path.glob("greedy_balance/synthetic/*/summary.json"))
    assert len(trained) == len(record["runs"]) == 6, "every run has its own folder"
