"""umt_ume.py from its command line: every option, what it writes, and what it says to bad input.
Whole runs are compared with plain loops."""

import copy
import functools
import json
import math
import re
import statistics
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY_DATASET, ROOT
from fake_clips import FROM_FILES
from sklearn.linear_model import LogisticRegression
from test_pmr import MODALITIES, tensors
from test_training import QuickFigure, snapshot, without_seconds

import umt_ume as umt
from common import command_line, experiments, figures, training
from common.datasets import DATASETS
from common.errors import UserError
from common.fusion import LATE_FUSIONS
from common.metrics import accuracy
from common.rebalance import RIVALS
from common.seeding import seed_phase

CPU = torch.device("cpu")
TINY = ["--train-samples", "60", "--epochs", "2", "--batch-size", "20", "--device", "cpu"]
UME = ("ume", "ume-logits", "linear")
METHODS = (*umt.METHODS, *RIVALS)
KNOBS = {
    "umt": {"distill_weight"},
    "g-blending": {"blend", "super_epoch"},
    "ogm-ge": {"ogm_alpha"},
    "modality-dropout": {"drop_probability"},
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Loading, curves and F1 are tested elsewhere; here they would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "load_dataset", functools.cache(command_line.load_dataset))
        patch.setattr(training, "draw_curves", QuickFigure)
        patch.setattr(umt, "macro_f1", lambda *_: 0.0)
        yield


@pytest.fixture
def run(tmp_path, data_root):
    """Run umt_ume.main on a tiny part of the data, with runs in a temporary folder."""

    def call(*argv):
        return umt.main([*TINY, "--out", str(tmp_path), "--data-root", str(data_root), *argv])

    return call


@pytest.fixture
def three(tmp_path):
    """The flags of a dataset of three modalities."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split in ("train", "test"):
        labels = rng.integers(4, size=100)
        arrays |= {f"{split}_{m}": rng.standard_normal((100, 4)) for m in ("a", "b", "c")}
        for shift, m in enumerate(("a", "b", "c")):
            arrays[f"{split}_{m}"] += 2 * np.eye(4)[(labels // (1 + shift)) % 4]
        arrays[f"{split}_labels"] = labels
    np.savez(tmp_path / "three.npz", **arrays)
    return ["--dataset", "features", "--data-root", str(tmp_path / "three.npz")]


def folder_of(out, method, seed=0):
    """The only folder under `out` of a method and seed."""
    longer = [m for m in METHODS if m.startswith(f"{method}-")]
    (folder,) = (
        path
        for path in out.glob(f"umt_ume/*/{method}-*seed{seed}")
        if not path.name.startswith(tuple(longer))
    )
    return folder


def read(path):
    return json.loads(path.read_text())


def history_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def network(folder, name="last.pt"):
    return {k: v for k, v in tensors(folder, name).items() if k.startswith(".model.")}


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def prepare(method, *argv):
    """The fresh network of a method, the splits and the configuration."""
    args, _ = umt.parse_args([*TINY, *argv])
    splits = umt.load_splits(args, CPU)
    config = SimpleNamespace(**{**vars(args), "method": method, "seed": args.seeds[0]})
    config.device = CPU
    if method.startswith("unimodal-"):
        config.fusion = None
    return umt.build_model(config, splits), splits, config


def restored(folder, method, *argv, name="last.pt"):
    """The trained network of a run, in evaluation mode, and the splits."""
    model, splits, _ = prepare(method, *argv)
    model.load_state_dict(torch.load(folder / name, weights_only=True)["state"]["model"])
    return model.eval(), splits


def whole(split):
    inputs, labels, _ = next(split.batches(10**6))
    return inputs, labels


# ---- Every method, fusion, dataset, and every other choice ----


@pytest.mark.parametrize("dataset", EVERY_DATASET)
@pytest.mark.parametrize("fusion", list(LATE_FUSIONS))
def test_every_method_fusion_and_dataset(run, require, root_of, tmp_path, fusion, dataset):
    require(dataset)
    modalities = MODALITIES[dataset]
    unimodal = [f"unimodal-{m}" for m in modalities]
    methods = [*unimodal, *(m for m in METHODS if m != "ogm-ge" or fusion == "concat")]
    flags = ["--dataset", dataset, "--data-root", root_of(dataset), "--fusion", fusion]
    flags += ["--epochs", "1"]
    result = run(*flags, "--method", *methods, "auto")
    assert [row["method"] for row in result["table"]] == methods
    assert result["decision"]["choice"] in ("umt", "ume")
    (decision,) = tmp_path.glob(f"umt_ume/{dataset}/auto-{fusion}-*/decision.json")
    assert read(decision)["evidence"] == result["decision"]["evidence"]
    for summary in result["runs"]:
        method, test = summary["method"], summary["test"]
        assert read(folder_of(tmp_path, method) / "summary.json") == summary
        assert summary["fusion"] == (None if method in (*UME, *unimodal) else fusion)
        assert all(math.isfinite(x["loss"]) for x in (test, summary["val"], summary["best"]["val"]))
        if method in UME:
            assert not test.keys() & set(modalities) and summary["best"]["epoch"] is None
            continue
        own = [method.removeprefix("unimodal-")] if method in unimodal else modalities
        reads = {"probe"} | ({"alone"} if method in unimodal else set())
        reads |= {"head"} if fusion == "concat" and method not in unimodal else set()
        assert all(test[m].keys() == reads for m in own)


def test_every_dataset_is_tested_here():
    assert {*MODALITIES, *FROM_FILES} == set(DATASETS) == set(umt.RECIPES)
    assert set(METHODS) == {"joint", "umt", *RIVALS, *UME}


@pytest.mark.parametrize("fusion", list(LATE_FUSIONS))
def test_three_modalities(run, three, fusion):
    methods = [f"unimodal-{m}" for m in "abc"]
    methods += [m for m in METHODS if m != "ogm-ge" or fusion == "concat"]
    result = run(*three, "--fusion", fusion, "--method", *methods, "auto")
    assert [row["method"] for row in result["table"]] == methods
    assert all(run["test"].keys() > set("abc") for run in result["runs"] if run["fusion"])


def test_the_default_compares_and_chooses(run, capsys):
    result = run()
    compared = ["unimodal-first", "unimodal-second", "ume", "ume-logits", "joint", "aux-ce", "umt"]
    assert [row["method"] for row in result["table"]] == [*compared, "linear"]
    assert {"first probe", "second probe", "no-easy"} < set(result["table"][0])
    out = capsys.readouterr().out
    assert "\nsynthetic, test split" in out
    assert re.search(r"^Choice, by validation accuracy: (umt|ume)\.", out, re.MULTILINE)
    assert re.search(r"^  linear - ume: [+-]\d+\.\d\d ± \d+\.\d\d points$", out, re.MULTILINE)
    assert re.search(r"^Runs: .*umt_ume/synthetic$", out, re.MULTILINE)


def test_default_methods():
    chosen = {
        dataset: umt.choose_methods(
            SimpleNamespace(method=None, dataset=dataset, fusion="concat"), modalities
        )
        for dataset, modalities in MODALITIES.items()
    }
    assert chosen.pop("cg-mnist") == ["auto"]
    for dataset, methods in chosen.items():
        assert methods[:2] == [f"unimodal-{m}" for m in MODALITIES[dataset]]
        assert methods[2:] == ["ume", "ume-logits", "joint", "aux-ce", "umt", "auto"]


UMT = ["--method", "umt", "--epochs", "3"]


@pytest.fixture(scope="module")
def default_network(tmp_path_factory):
    out = tmp_path_factory.mktemp("default")
    umt.main([*TINY, *UMT, "--out", str(out)])
    return network(folder_of(out, "umt"))


@pytest.mark.parametrize(
    ("choice", "changes"),
    [
        (("--distill-weight", "10"), True),
        (("--distill-weight", "1"), False),
        (("--configuration", "N"), False),
        (("--configuration", "T"), True),
        (("--pair-type", "suppressor"), False),
        (("--easy-size", "3"), True),
        (("--easy-1", "0.1"), True),
        (("--easy-2", "0.1"), True),
        (("--hard", "0.1"), True),
        (("--hard-size-1", "3"), True),
        (("--hard-size-2", "3"), True),
        (("--pair-size", "3"), True),
        (("--nuisance", "0"), True),
        (("--pair-only", "0.5"), True),
        (("--noise", "1"), True),
        (("--augment", "0"), True),
        (("--samples", "100"), True),
        (("--ogm-alpha", "1"), False),
        (("--blend", "online"), False),
        (("--optimizer", "adam"), True),
        (("--optimizer", "adagrad"), True),
        (("--schedule", "none"), True),
        (("--schedule", "step"), True),
        (("--schedule", "cosine"), False),
        (("--precision", "bf16"), True),
        (("--batch-size", "8"), True),
        (("--weight-decay", "0"), True),
        (("--lr", "0.02"), True),
        (("--data-seed", "5"), True),
        (("--seeds", "5"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_every_other_choice_acts(run, tmp_path, default_network, choice, changes):
    run(*UMT, *choice)
    found = network(folder_of(tmp_path, "umt", seed=5 if "--seeds" in choice else 0))
    assert same(found, default_network) != changes


def test_every_method_in_bfloat16(run):
    result = run("--precision", "bf16", "--method", *METHODS, "auto")
    assert all(math.isfinite(summary["test"]["loss"]) for summary in result["runs"])


def test_folder_names_hold_the_knobs_of_the_method_alone(run, tmp_path):
    flags = {"distill_weight": 3.0, "blend": "online", "super_epoch": 1, "ogm_alpha": 0.7}
    flags |= {"drop_probability": 0.6}
    words = [x for k, v in flags.items() for x in ("--" + k.replace("_", "-"), str(v))]
    run("--method", *METHODS, *words)
    for method in METHODS:
        name = folder_of(tmp_path, method).name
        mine = {k for k in flags if f"-{k.replace('_', '-')}={flags[k]}-" in name}
        assert mine == KNOBS.get(method, set())
        arguments = read(folder_of(tmp_path, method) / "config.json")["arguments"]
        assert {k: arguments[k] for k in mine} == {k: flags[k] for k in mine}
        assert not arguments.keys() & (flags.keys() - mine)


# ---- What UMT promises over a whole run ----

SLOW = ["--train-samples", "100", "--batch-size", "40", "--epochs", "3"]


@pytest.mark.parametrize("dataset", ["synthetic", "digits"])
def test_weight_zero_is_joint_training_bit_for_bit(run, tmp_path, dataset):
    """With augmentation and with BatchNorm."""
    flags = ["--dataset", dataset, "--epochs", "3"]
    zero, joint = run(*flags, "--method", "umt", "joint", "--distill-weight", "0")["runs"]
    folders = [folder_of(tmp_path, method) for method in ("umt", "joint")]
    assert same(*(tensors(folder) for folder in folders))
    assert zero["test"] == joint["test"] and zero["val"] == joint["val"]
    assert history_of(folders[0]) == history_of(folders[1])


def test_a_large_weight_drives_features_to_the_teachers(run, tmp_path):
    flags = ["--epochs", "30", "--optimizer", "adam", "--lr", "0.003", "--augment", "0"]
    distance = {}
    for weight in ("0", "1000"):
        run(*flags, "--method", "umt", "--distill-weight", weight, "--overwrite")
        (folder,) = tmp_path.glob(f"umt_ume/*/umt-*weight={float(weight)}-seed0")
        student, splits = restored(folder, "umt", *flags)
        inputs, _ = whole(splits.train)
        for m in splits.modalities:
            name = f"unimodal-{m}"
            teacher, _ = restored(folder_of(tmp_path, name), name, *flags)
            with torch.no_grad():
                z, t = student(inputs)[1][m], teacher(inputs)[1][m]
            distance[weight, m] = F.mse_loss(z, t).item()
    for m in MODALITIES["synthetic"]:
        assert distance["1000", m] < 0.1 * distance["0", m]


@pytest.mark.parametrize("dataset", ["synthetic", "digits"])
def test_umt_equals_a_plain_loop(run, tmp_path, dataset):
    """Teachers, students and SGD by hand; the student starts as joint training does."""
    flags = [*SLOW, "--dataset", dataset, "--distill-weight", "3", "--schedule", "step"]
    flags += ["--lr", "0.02", "--weight-decay", "0.01"]
    run(*flags, "--method", "umt")
    teachers = {}
    for m in MODALITIES[dataset]:
        name = f"unimodal-{m}"
        teachers[m] = restored(folder_of(tmp_path, name), name, *flags)[0]
    model, splits, _ = prepare("umt", *flags)
    joint, _, _ = prepare("joint", *flags)
    assert same(model.state_dict(), joint.state_dict())
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(3):
        lr = 0.002 if epoch >= 0.7 * 3 else 0.02
        generator = seed_phase(0, "train", epoch)
        order = torch.randperm(100, generator=generator)
        model.train()
        for batch in order.split(40):
            inputs, labels = whole(splits.train.subset(batch))
            if splits.train.augment:
                inputs = {
                    m: x + 0.3 * torch.randn(x.shape, generator=generator)
                    for m, x in inputs.items()
                }
            z = {m: model.encoders[m](inputs[m]) for m in splits.modalities}
            loss = -model.fusion(z).log_softmax(1)[torch.arange(len(labels)), labels].mean()
            for m in z:
                with torch.no_grad():
                    _, t = teachers[m]({m: inputs[m]})
                loss = loss + 3 * ((z[m] - t[m]) ** 2).sum() / z[m].numel()
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for w, g, v in zip(parameters, gradients, velocity, strict=True):
                    w.sub_(lr * v.mul_(0.9).add_(g + 0.01 * w))
    saved = network(folder_of(tmp_path, "umt"))
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved[f".model.{name}"], tensor, rtol=1e-3, atol=1e-4)


@pytest.fixture
def spied(monkeypatch):
    """What the student and the teachers are given in training, and the teachers themselves."""
    seen = SimpleNamespace(student=[], teachers=[], frozen=[], states=[])
    init, look, forward = umt.Teachers.__init__, umt.Teachers.forward, umt.LateFusion.forward

    def spy_init(self, encoders):
        init(self, encoders)
        seen.frozen.append(self)
        seen.states.append({k: v.clone() for k, v in self.state_dict().items()})

    def spy_look(self, inputs):
        targets = look(self, inputs)
        seen.teachers.append((inputs, targets))
        return targets

    def spy_forward(self, inputs):
        if seen.frozen and self.training:
            seen.student.append(inputs)
        return forward(self, inputs)

    monkeypatch.setattr(umt.Teachers, "__init__", spy_init)
    monkeypatch.setattr(umt.Teachers, "forward", spy_look)
    monkeypatch.setattr(umt.LateFusion, "forward", spy_forward)
    return seen


@pytest.mark.parametrize("dataset", ["synthetic", "digits"])
def test_teachers_are_not_changed_by_the_student(run, tmp_path, spied, dataset):
    run("--dataset", dataset, "--method", "umt", "--distill-weight", "100", "--lr", "0.1")
    (teachers,) = spied.frozen
    assert same(teachers.state_dict(), spied.states[0])
    assert not any(module.training for module in teachers.modules())
    assert all(p.grad is None and not p.requires_grad for p in teachers.parameters())
    assert not any(t.requires_grad for _, targets in spied.teachers for t in targets.values())
    for m in MODALITIES[dataset]:  # they are the last networks trained on each modality alone
        saved = network(folder_of(tmp_path, f"unimodal-{m}"))
        prefix = f".model.encoders.{m}."
        own = {k.removeprefix(prefix): v for k, v in saved.items() if k.startswith(prefix)}
        assert same(teachers[m].state_dict(), own)
    names = " ".join(tensors(folder_of(tmp_path, "umt")))
    assert "teacher" not in names


def test_with_augmentation_teachers_see_what_the_student_sees(run, spied):
    run("--method", "umt")
    assert len(spied.student) == len(spied.teachers) == 2 * 3
    for student, (teacher, _) in zip(spied.student, spied.teachers, strict=True):
        assert all(torch.equal(student[m], teacher[m]) for m in MODALITIES["synthetic"])


@pytest.mark.parametrize("flags", [["--dataset", "digits"], ["--augment", "0"]])
def test_without_augmentation_teachers_look_once_and_the_table_is_right(
    run, tmp_path, spied, monkeypatch, flags
):
    used = []
    original = umt.distillation
    monkeypatch.setattr(umt, "distillation", lambda z, t: (used.append(t), original(z, t))[1])
    run(*flags, "--method", "umt")
    assert len(spied.teachers) == 1 and len(used) == 2 * 3
    (teachers,) = spied.frozen
    for student, targets in zip(spied.student, used, strict=True):
        assert set(targets) == set(student)
        for m, inputs in student.items():
            for x, t in zip(inputs, targets[m], strict=True):  # a plain loop over the samples
                with torch.no_grad():
                    torch.testing.assert_close(teachers[m](x[None])[0], t, rtol=1e-4, atol=1e-5)


def test_every_seed_has_its_own_teachers_and_each_is_trained_once(run, tmp_path, monkeypatch):
    trained = []
    train = umt.train

    def spy(run, model, teachers, splits, config):
        trained.append((config.method, config.seed))
        train(run, model, teachers, splits, config)

    monkeypatch.setattr(umt, "train", spy)
    monkeypatch.setattr(umt, "choose", lambda *_: "umt")
    run("--method", "umt", "ume", "linear", "auto", "--seeds", "0", "1")
    run("--method", "ume-logits", "umt", "--seeds", "0", "1")
    methods = ("unimodal-first", "unimodal-second", "umt", "joint")
    assert sorted(trained) == sorted((method, seed) for method in methods for seed in (0, 1))
    first, second = (network(folder_of(tmp_path, "unimodal-first", seed)) for seed in (0, 1))
    assert not same(first, second)


# ---- UME, the linear classifier and the choice ----


def test_ensembles_are_means_of_the_networks_trained_alone(run, tmp_path):
    flags = ["--epochs", "4", "--lr", "0.02"]
    result = run(*flags, "--method", "ume", "ume-logits")
    logits = {}
    for name in ("last.pt", "best.pt"):
        outputs = []
        for m in MODALITIES["synthetic"]:
            method = f"unimodal-{m}"
            model, splits = restored(folder_of(tmp_path, method), method, *flags, name=name)
            inputs, labels = whole(splits.test)
            with torch.no_grad():
                outputs.append(model(inputs)[0])
        logits[name] = {
            "ume": (sum(x.softmax(1) for x in outputs) / 2).log(),
            "ume-logits": sum(outputs) / 2,
        }
    for summary in result["runs"]:
        method = summary["method"]
        saved = np.load(folder_of(tmp_path, method) / "predictions.npz")
        expected = logits["last.pt"][method]
        torch.testing.assert_close(torch.from_numpy(saved["logits"]), expected)
        assert summary["test"]["accuracy"] == accuracy(expected, labels)
        assert summary["best"]["test"]["accuracy"] == accuracy(logits["best.pt"][method], labels)


def test_the_linear_classifier_is_trained_on_all_frozen_features_together(run, tmp_path):
    flags = ["--train-samples", "200", "--configuration", "Q"]
    run(*flags, "--method", "linear", "ume")
    features = {"train": [], "test": []}
    for m in MODALITIES["synthetic"]:
        method = f"unimodal-{m}"
        model, splits = restored(folder_of(tmp_path, method), method, *flags)
        for name, found in features.items():
            with torch.no_grad():
                found.append(model(whole(getattr(splits, name))[0])[1][m].numpy())
    train, test = (np.concatenate(found, axis=1) for found in features.values())
    scale = train.std(axis=0)
    scale[scale == 0] = 1
    classifier = LogisticRegression(max_iter=1000)
    classifier.fit((train - train.mean(axis=0)) / scale, splits.train.labels)
    guess = classifier.predict((test - train.mean(axis=0)) / scale)
    saved = np.load(folder_of(tmp_path, "linear") / "predictions.npz")
    assert (saved["logits"].argmax(axis=1) == guess).mean() > 0.99


@pytest.mark.parametrize("method", ["joint", "unimodal-second"])
def test_what_is_read_of_each_modality(run, tmp_path, method):
    """A probe of one encoder alone, on test samples after training samples; a share of the head."""
    flags = ["--train-samples", "200", "--configuration", "Q"]
    found = run(*flags, "--method", method)["test"]
    model, splits = restored(folder_of(tmp_path, method), method, *flags)
    (inputs, y), (inputs_test, y_test) = (whole(split) for split in (splits.train, splits.test))
    with torch.no_grad():
        _, z = model(inputs)
        logits, z_test = model(inputs_test)
    for i, m in enumerate(model.encoders):
        mean, scale = z[m].mean(0), z[m].std(0, correction=0)
        scale[scale == 0] = 1
        classifier = LogisticRegression(max_iter=1000).fit((z[m] - mean) / scale, y)
        guess = torch.from_numpy(classifier.predict((z_test[m] - mean) / scale))
        right = 100 * (guess == y_test).double().mean().item()
        assert found[m]["probe"] == pytest.approx(right, abs=0.5)  # a sample of 400 may tip over
        if method == "joint":
            columns = model.fusion.linear.weight[:, 64 * i : 64 * (i + 1)]
            part = z_test[m] @ columns.T + model.fusion.linear.bias / 2
            assert found[m]["head"] == accuracy(part, y_test)
        else:
            assert found[m]["alone"] == found["accuracy"] == accuracy(logits, y_test)


def test_the_decision_and_its_numbers(run, tmp_path):
    """Every number of decision.json from the saved predictions on validation."""
    flags = ["--train-samples", "400", "--epochs", "8", "--seeds", "0", "1", "2"]
    result = run(*flags, "--method", "auto", "umt")
    (path,) = tmp_path.glob("umt_ume/synthetic/auto-concat-*/decision.json")
    decision = read(path)
    assert {k: decision[k] for k in result["decision"]} == result["decision"]
    assert decision["arguments"]["seeds"] == [0, 1, 2] and decision["arguments"]["method"] == "auto"
    _, splits, _ = prepare("joint", *flags)
    labels = splits.val.labels.numpy()
    right = {}
    for method in ("linear", "ume", "joint", "umt"):
        folders = [folder_of(tmp_path, method, seed) for seed in range(3)]
        saved = [np.load(folder / "predictions.npz")["val_logits"] for folder in folders]
        right[method] = np.mean([x.argmax(axis=1) == labels for x in saved], axis=0)
        by_run = [read(folder / "summary.json")["val"]["accuracy"] for folder in folders]
        assert np.mean(by_run) == pytest.approx(100 * right[method].mean())
        assert decision["validation"][method] == pytest.approx(100 * right[method].mean())
    pairs = [("linear", "ume"), ("joint", "ume"), ("joint", "umt")]
    assert [(row["method"], row["reference"]) for row in decision["evidence"]] == pairs
    better = []
    for row in decision["evidence"]:
        difference = 100 * (right[row["method"]] - right[row["reference"]])
        error = difference.std(ddof=1) / math.sqrt(len(difference))
        assert (row["points"], row["standard_error"]) == pytest.approx((difference.mean(), error))
        better.append(difference.mean() > error)
    assert decision["choice"] == ("umt" if better[0] else "ume")
    assert decision["joint_is_better"] == (better[1] and better[2])


@pytest.mark.parametrize(
    ("right", "choice", "joint_is_better"),
    [
        ({"linear": 60, "ume": 50, "umt": 70, "joint": 90}, "umt", True),
        ({"linear": 60, "ume": 50, "umt": 70, "joint": 60}, "umt", False),
        ({"linear": 60, "ume": 50, "umt": 70, "joint": 71}, "umt", False),  # by no more than 1 SE
        ({"linear": 50, "ume": 50, "umt": 0, "joint": 60}, "ume", True),
        ({"linear": 40, "ume": 50, "umt": 0, "joint": 50}, "ume", False),
    ],
)
def test_the_choice_on_constructed_predictions(right, choice, joint_is_better):
    """How many of 100 validation samples each method gets right, the same ones first."""
    labels = torch.arange(100) % 10

    def finished(method, seed):
        wrong = torch.arange(100) >= right[method]
        logits = F.one_hot((labels + wrong) % 10, 10).double().numpy()
        return torch.from_numpy(logits)

    study = SimpleNamespace(splits=SimpleNamespace(val=SimpleNamespace(labels=labels)))
    study.read_val_logits, study.methods = finished, ["auto"]
    decision = umt.Study.decide(study, [0, 1])
    assert (decision["choice"], decision["joint_is_better"]) == (choice, joint_is_better)
    assert decision["evidence"][0]["points"] == right["linear"] - right["ume"]


@pytest.mark.parametrize("choice", ["umt", "ume"])
def test_auto_trains_umt_only_if_it_is_chosen(run, tmp_path, monkeypatch, choice):
    monkeypatch.setattr(umt, "choose", lambda *_: choice)
    result = run("--method", "auto")
    expected = ["ume", "linear", "joint"] + (["umt"] if choice == "umt" else [])
    assert [row["method"] for row in result["table"]] == expected
    assert any(tmp_path.glob("umt_ume/synthetic/umt-*")) == (choice == "umt")
    references = [row["reference"] for row in result["decision"]["evidence"]]
    assert references == ["ume", "ume"] + (["umt"] if choice == "umt" else [])


def test_nothing_is_decided_on_the_test_split(run, monkeypatch):
    """Other test labels, the same choice and validation."""
    load, found = umt.load_splits, []
    for shift in (0, 3):

        def shifted(args, device, shift=shift):
            splits = load(args, device)
            test = copy.copy(splits.test)
            test.all_labels = (test.all_labels + shift) % 10
            return replace(splits, test=test)

        monkeypatch.setattr(umt, "load_splits", shifted)
        result = run("--method", "auto", "--overwrite")
        val, test = ([r[name]["accuracy"] for r in result["runs"]] for name in ("val", "test"))
        found.append((result["decision"], val, test))
    assert found[0][:2] == found[1][:2] and found[0][2] != found[1][2]


# ---- Rivals in the loop ----


@pytest.mark.parametrize(
    ("flags", "starts"), [((), {0}), (("--blend", "online", "--super-epoch", "2"), {0, 2, 4})]
)
def test_blend_weights_are_logged_and_held_out_samples_never_trained_on(
    run, tmp_path, monkeypatch, flags, starts
):
    seen = []
    epoch = umt.train_epoch

    def spy(model, rival, targets, optimizer, batches, config):
        def note():
            for batch in batches:
                seen.append((set(batch[2].tolist()), set(rival.held_out.index.tolist())))
                yield batch

        return epoch(model, rival, targets, optimizer, note(), config)

    monkeypatch.setattr(umt, "train_epoch", spy)
    run("--method", "g-blending", "--epochs", "5", *flags)
    folder = folder_of(tmp_path, "g-blending")
    weights = [entry["train"]["weights"] for entry in history_of(folder)]
    assert all(sum(w) == pytest.approx(1) and len(w) == 3 for w in weights)
    assert tensors(folder)[".rival.weights"].tolist() == weights[-1]
    changed = {i for i in range(1, 5) if weights[i] != weights[i - 1]}
    assert changed == starts - {0}
    assert all(len(held_out) == 6 and not index & held_out for index, held_out in seen)
    assert set.union(*(index for index, _ in seen)) == set(range(60)) - seen[0][1]


# ---- Reading a run again ----


def test_eval_only_gives_the_same_numbers_and_writes_nothing(run, tmp_path):
    methods = ["--method", "unimodal-first", "umt", "g-blending", "modality-dropout", *UME, "auto"]
    first = run(*methods)
    before = snapshot(tmp_path)
    again = run(*methods, "--eval-only")
    assert snapshot(tmp_path) == before
    assert again["decision"] == first["decision"]
    for old, new in zip(first["runs"], again["runs"], strict=True):
        assert {**without_seconds(old)} == {**without_seconds(new)}


def test_a_finished_run_is_reported_and_not_trained_again(run, monkeypatch):
    first = run("--method", "umt", "ume", "auto")
    monkeypatch.setattr(umt, "train_epoch", lambda *_: pytest.fail("an epoch was trained"))
    assert run("--method", "umt", "ume", "auto") == first


def test_predictions_and_summary_agree(run, tmp_path):
    for summary in run("--method", "umt", "linear")["runs"]:
        saved = np.load(folder_of(tmp_path, summary["method"]) / "predictions.npz")
        logits, labels = (torch.from_numpy(saved[name]) for name in ("logits", "label"))
        assert saved["index"].tolist() == list(range(len(labels)))
        assert accuracy(logits, labels) == summary["test"]["accuracy"]
        splits = prepare("joint")[1]
        assert torch.equal(labels, splits.test.labels)
        for name, mask in splits.test.slices.items():
            if mask.any():
                found = summary["test"]["slices"][name]
                assert found == accuracy(logits[mask], labels[mask])
        assert ("pair-only" in summary["test"]["slices"]) == splits.test.slices["pair-only"].any()


# ---- The experiment ----


@pytest.mark.slow
def test_weights_are_compared_on_validation(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        experiments, "draw_trends", lambda *a: drawn.append(figures.draw_trends(*a)) or drawn[0]
    )
    monkeypatch.setattr(umt, "WEIGHTS", (0.0, 3.0))
    monkeypatch.setattr(umt, "CONFIGURATIONS", ("O", "Q"))
    result = run("--experiment", "weights", "--seeds", "0", "1")
    (path,) = tmp_path.glob("umt_ume/synthetic/weights-*/table.json")
    rows = json.loads(path.read_text())["rows"]
    keys = [(row["configuration"], row["distill_weight"]) for row in rows]
    assert keys == [("O", 0.0), ("O", 3.0), ("Q", 0.0), ("Q", 3.0)]
    for row, key in zip(rows, keys, strict=True):
        own = [r for r in result["runs"] if (r["configuration"], r["distill_weight"]) == key]
        found = [r["val"]["accuracy"] for r in own]
        assert len(found) == row["val"]["n"] == 2 and "test" not in row
        assert row["val"]["mean"] == pytest.approx(statistics.fmean(found))
    lines = {line.get_label(): line for line in drawn[0].axes[0].containers}
    for name, line in lines.items():
        means = [row["val"]["mean"] for row in rows if row["configuration"] == name]
        assert list(line.lines[0].get_ydata()) == means
    assert set(lines) == {"O", "Q"}
    with pytest.raises(UserError, match="sets --distill-weight itself"):
        run("--experiment", "weights", "--distill-weight", "2")


def test_dial_grows_the_share_of_paired_samples(run, tmp_path):
    result = run("--experiment", "dial", "--seeds", "0", "1")
    (folder,) = (tmp_path / "umt_ume" / "synthetic").glob("dial*")
    record = read(folder / "table.json")
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    methods, shares = ["ume", "joint", "aux-ce", "umt"], (0.0, 0.05, 0.1, 0.2, 0.4)
    expected = [(q, m) for q in shares for m in methods]
    assert [(row["pair_only"], row["method"]) for row in record["rows"]] == expected
    assert record["rows"] == result["table"]
    assert len(record["runs"]) == 2 * len(expected)
    assert record["arguments"]["method"] == methods
    assert {row["configuration"] for row in record["rows"]} == {"Q"}
    assert [row["pair_size"] for row in record["rows"]] == [0.0] * 4 + [5.0] * 16
    for row in record["rows"]:
        mine = [
            r["test"]["accuracy"]
            for r in record["runs"]
            if (r["method"], r["pair_only"]) == (row["method"], row["pair_only"])
        ]
        assert row["test"]["mean"] == pytest.approx(sum(mine) / 2) and row["test"]["n"] == 2
    trained = {path.name for path in (tmp_path / "umt_ume" / "synthetic").glob("joint*")}
    assert all("configuration=Q" in name for name in trained) and len(trained) == 10


def test_dial_draws_the_values_of_its_table(run, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        experiments, "draw_trends", lambda *a: drawn.append(figures.draw_trends(*a)) or drawn[0]
    )
    result = run("--experiment", "dial", "--method", "joint", "ume")
    (axis,) = drawn[0].axes
    for line, method in zip(axis.containers, ("joint", "ume"), strict=True):
        values = [row["test"]["mean"] for row in result["table"] if row["method"] == method]
        assert line.get_label() == method
        assert list(line.lines[0].get_xdata()) == [0.0, 0.05, 0.1, 0.2, 0.4]
        assert list(line.lines[0].get_ydata()) == values


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["dial", "--dataset", "digits"], "leave out --dataset"),
        (["dial", "--configuration", "T"], "sets --configuration itself; leave it out"),
        (["dial", "--pair-only", "0.3"], "sets --pair-only itself; leave it out"),
        (["methods", "--configuration", "T"], "sets --configuration itself; leave it out"),
    ],
)
def test_experiments_refuse_what_they_set_themselves(run, argv, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        run("--experiment", *argv)


@pytest.mark.slow
def test_methods_compares_all_in_every_configuration_and_judges_the_choice(run, tmp_path):
    seeds = ["--seeds", "0", "1"]
    result = run("--experiment", "methods", *seeds)
    (folder,) = (tmp_path / "umt_ume" / "synthetic").glob("methods*")
    methods = {*METHODS, "unimodal-first", "unimodal-second"}
    for name in "ONTQ":
        rows = [row for row in result["table"] if row["configuration"] == name]
        assert {row["method"] for row in rows} == methods and len(rows) == len(methods)
        assert any(row["pair-only"] for row in rows) == (name in "TQ")
    judged = read(folder / "decisions.json")
    assert [row["configuration"] for row in judged["rows"]] == list("ONTQ")
    for row, decision in zip(judged["rows"], judged["decisions"], strict=True):
        tests = {
            method: [
                run["test"]["accuracy"]
                for run in result["runs"]
                if (run["method"], run["configuration"]) == (method, row["configuration"])
            ]
            for method in ("ume", "umt", "joint")
        }
        other = {"ume": "umt", "umt": "ume"}[decision["choice"]]
        ahead = [a - b for a, b in zip(tests[row["choice"]], tests[other], strict=True)]
        mean, error = statistics.fmean(ahead), statistics.stdev(ahead) / math.sqrt(2)
        assert row["choice - other (test)"] == f"{mean:+.2f} ± {error:.2f}"
        assert row["right"] == ("yes" if mean >= -error else "no")


def test_methods_on_other_data_is_a_single_part(run, tmp_path):
    argv = ["--experiment", "methods", "--dataset", "digits", "--method", "ume", "joint", "auto"]
    result = run(*argv)
    assert {row["method"] for row in result["table"]} >= {"ume", "joint", "linear"}
    (folder,) = (tmp_path / "umt_ume" / "digits").glob("methods*")
    (row,) = read(folder / "decisions.json")["rows"]
    assert row["choice"] in ("ume", "umt") and "joint - choice (test)" in row


# ---- Bad input ----


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--distill-weight", "-1"], "must be a number at least 0, not '-1'"),
        (["--drop-probability", "2"], "must be a number at least 0 and at most 1, not '2'"),
        (["--super-epoch", "0"], "must be a whole number at least 1, not '0'"),
        (["--ogm-alpha", "nan"], "must be a number at least 0, not 'nan'"),
        (["--blend", "never"], "invalid choice: 'never'"),
        (["--fusion", "film"], "invalid choice: 'film'"),
        (["--fusion", "gated"], "invalid choice: 'gated'"),
        (["--pair-only", "1.5"], "must be a number at least 0 and at most 1, not '1.5'"),
        (["--samples", "0"], "must be a whole number at least 1"),
        (["--experiment", "table1"], "invalid choice: 'table1'"),
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
        (["--method", "utm"], "no method 'utm' for synthetic; choose from ume, ume-logits"),
        (["--method", "unimodal-audio"], "unimodal-first, unimodal-second"),
        (["--configuration", "Z"], "No configuration 'Z'; choose from O, N, T, Q."),
        (["--pair-type", "xor"], "No pair type 'xor'; choose from suppressor, sum-mod."),
        (["--pair-type", "sum-mod"], "no linear head can learn --pair-type sum-mod"),
        (["--dataset", "digits", "--noise", "1"], "digits has no dial --noise"),
        (["--dataset", "digits", "--configuration", "O"], "digits has no dial --configuration"),
        (["--method", "umt", "--eval-only"], "holds no run; train it first"),
        (["--experiment", "dial", "--eval-only"], "--eval-only writes nothing"),
        (["--fusion", "mlp", "--method", "ogm-ge"], "use --fusion concat."),
        (["--fusion", "attention", "--method", "ogm-ge"], "use --fusion concat."),
        (["--train-samples", "1", "--method", "g-blending"], "holds out a part"),
        (["--method", "umt", "--distill-weight", "1e30"], "a lower --lr or --distill-weight."),
        (["--method", "joint", "--lr", "1e9"], "Try a lower --lr."),
    ],
)
def test_bad_requests_are_one_sentence(run, argv, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as error_info:
        run(*argv)
    assert "\n" not in str(error_info.value)


def test_sum_mod_is_for_heads_that_are_not_linear(run):
    for fusion in ("mlp", "attention"):
        assert run("--pair-type", "sum-mod", "--fusion", fusion, "--method", "joint")["test"]


def test_an_unfinished_teacher_is_refused_without_resume(run, tmp_path):
    run("--method", "unimodal-first")
    (folder_of(tmp_path, "unimodal-first") / "summary.json").unlink()
    with pytest.raises(UserError, match=r"unimodal-first.* holds an unfinished run; go on with it"):
        run("--method", "umt")


def test_a_damaged_teacher_is_named(run, tmp_path):
    run("--method", "unimodal-first", "unimodal-second")
    (folder_of(tmp_path, "unimodal-second") / "last.pt").write_bytes(b"half")
    for method in ("umt", "ume"):
        with pytest.raises(UserError, match=r"unimodal-second.*last\.pt is missing, damaged"):
            run("--method", method, "--resume")


def test_trial_runs_of_g_blending_follow_the_schedule(run, monkeypatch):
    rates, set_lr = [], umt.set_lr
    monkeypatch.setattr(umt, "set_lr", lambda o, lr: rates.append(lr) or set_lr(o, lr))
    run("--method", "g-blending", "--epochs", "3", "--lr", "0.01", "--schedule", "cosine")
    assert rates == pytest.approx([0.01, 0.0055, 0.001] * 4)  # three trial runs, then training


def test_of_one_modality_the_head_is_a_linear_classifier():
    for fusion in LATE_FUSIONS:
        args, _ = umt.parse_args([*TINY, "--fusion", fusion])
        study = umt.Study(args, {})
        model = umt.build_model(study.config("unimodal-first", 0), study.splits)
        weight, bias = model.fusion.parameters()
        assert (weight.shape, bias.shape) == ((10, 64), (10,))
        z = torch.randn(5, 64)
        torch.testing.assert_close(model.fusion({"first": z}), z @ weight.T + bias)


def test_a_damaged_teacher_does_not_cost_the_student(run, tmp_path):
    run("--method", "umt")
    (folder_of(tmp_path, "unimodal-second") / "last.pt").write_bytes(b"half")
    student = snapshot(folder_of(tmp_path, "umt"))
    with pytest.raises(UserError, match="again by --method unimodal-second --overwrite"):
        run("--method", "umt", "--overwrite")
    assert snapshot(folder_of(tmp_path, "umt")) == student
    run("--method", "unimodal-second", "--overwrite")
    run("--method", "umt", "--overwrite")


def test_damaged_predictions_are_named(run, tmp_path):
    run("--method", "auto")
    (folder_of(tmp_path, "ume") / "predictions.npz").write_bytes(b"half")
    with pytest.raises(UserError, match=r"ume-.*predictions\.npz cannot be read .*--overwrite"):
        run("--method", "auto")


def test_the_command_line_gives_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "umt_ume.py", "--dataset", "features", "--data-root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
