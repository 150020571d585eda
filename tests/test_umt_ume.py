"""umt_ume.py and its experiments from their command lines: every option, what is written, and what
is said to bad input. Whole runs are compared with plain loops."""

import copy
import json
import math
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EVERY_DATASET, UNLISTED
from fake_clips import FROM_FILES
from matplotlib.container import ErrorbarContainer
from sklearn.linear_model import LogisticRegression
from test_pmr import MODALITIES, equal, history_of, quick, tensors  # noqa: F401
from test_run import snapshot, without_seconds

import umt_ume as umt
from common import evaluation
from common.command_line import Command
from common.datasets import DATASETS
from common.errors import UserError
from common.metrics import accuracy, linear_probe
from common.networks.multimodal import build_model
from common.seeding import seed_phase
from experiments import grid
from experiments import umt_ume as experiments

TINY = ["--train-samples", "60", "--epochs", "2", "--batch-size", "20", "--device", "cpu"]
LARGER = ["--train-samples", "200", "--configuration", "Q"]
MODALITIES = {**MODALITIES, "three": ("a", "b", "c")}
ALONE = ["unimodal-first", "unimodal-second"]
RIVALS = ["aux-ce", "g-blending", "ogm-ge", "modality-dropout"]


@pytest.fixture
def run(tmp_path, data_root):
    """Run umt_ume.main on a tiny part of the data, with runs in a temporary folder."""
    flags = [*TINY, "--out", str(tmp_path), "--data-root", str(data_root)]
    return lambda *argv: umt.main([*flags, *argv])


@pytest.fixture
def features(tmp_path):
    """The flags of a dataset of the modalities that are named."""

    def write(*modalities):
        rng, arrays = np.random.default_rng(0), {}
        for split in ("train", "test"):
            labels = arrays[f"{split}_labels"] = rng.integers(4, size=100)
            for shift, m in enumerate(modalities, start=1):
                code = 2 * np.eye(4)[(labels // shift) % 4]
                arrays[f"{split}_{m}"] = code + rng.standard_normal((100, 4))
        np.savez(tmp_path / "features.npz", **arrays)
        return ["--dataset", "features", "--data-root", str(tmp_path / "features.npz")]

    return write


def folder_of(out, method, seed=0):
    """The only folder under `out` of a method and seed."""
    after = ("data=", "train-samples=", *umt.FUSIONS)
    found = out.glob(f"umt_ume/*/{method}-*-seed{seed}")
    (folder,) = (x for x in found if x.name.removeprefix(f"{method}-").startswith(after))
    return folder


def read(path):
    return json.loads(path.read_text())


def prepare(method, *argv):
    """The fresh network of a method, and the splits."""
    command = Command(umt.SCRIPT, [*TINY, *argv])
    return build_model(command.config(method, 0), command.splits), command.splits


def restored(out, method, *argv, name="last.pt"):
    """The trained network of a run, in evaluation mode."""
    model, _ = prepare(method, *argv)
    model.load_state_dict(torch.load(folder_of(out, method) / name)["state"]["model"])
    return model.eval()


def whole(split):
    inputs, labels, _ = next(split.batches(10**6))
    return inputs, labels


# ---- Every method, fusion, dataset, and every other choice ----


@pytest.mark.slow
@pytest.mark.parametrize("dataset", [*EVERY_DATASET, "three"])
@pytest.mark.parametrize("fusion", umt.FUSIONS)
def test_every_method_fusion_dataset(run, require, root_of, features, tmp_path, fusion, dataset):
    """And with them every optimizer and precision."""
    require(dataset)
    modalities = MODALITIES[dataset]
    place = umt.FUSIONS.index(fusion) + list(MODALITIES).index(dataset)
    alone = [f"unimodal-{m}" for m in modalities]
    methods = [*alone, *umt.ASSEMBLED, "umt", "joint"]
    data = ["--dataset", dataset, "--data-root", root_of(dataset)]
    data = features(*modalities) if dataset == "three" else data
    argv = ["--fusion", fusion, "--epochs", "1", "--precision", ("fp32", "bf16")[place % 2]]
    argv += ["--optimizer", ("sgd", "adam", "adagrad")[place % 3], "--method", *methods, "auto"]
    result = run(*data, *argv)
    assert [row["method"] for row in result["table"]] == methods
    decision = result["decision"]  # on validation alone
    (path,) = tmp_path.glob(f"umt_ume/*/auto-{fusion}-*/decision.json")
    named = {"method": "auto", "fusion": fusion, "seeds": [0]}
    assert read(path).items() >= decision.items()
    assert read(path)["arguments"].items() >= named.items()
    val = {summary["method"]: summary["val"]["accuracy"] for summary in result["runs"]}
    assert decision["validation"] == {m: pytest.approx(val[m]) for m in decision["validation"]}
    for row in decision["evidence"]:
        assert row["points"] == pytest.approx(val[row["method"]] - val[row["reference"]])
    for summary in result["runs"]:
        method, test = summary["method"], summary["test"]
        assert read(folder_of(tmp_path, method) / "summary.json") == summary
        assert summary["fusion"] == (fusion if method in ("umt", "joint") else None)
        assert all(math.isfinite(x["loss"]) for x in (test, summary["val"], summary["best"]["val"]))
        if method in umt.ASSEMBLED:
            assert not test.keys() & set(modalities) and summary["best"]["epoch"] is None
            assert ("parameters" in summary) == (method != "linear")
            continue
        own = [method.removeprefix("unimodal-")] if method in alone else modalities
        reads = {"alone"} if method in alone else {"head"} if fusion == "concat" else set()
        assert all(test[m].keys() == {"probe", *reads} for m in own)


def test_the_default_compares_and_chooses(run, capsys):
    result = run()
    compared = [*ALONE, "ume", "ume-logits", "joint", "umt", "linear"]
    assert [row["method"] for row in result["table"]] == compared
    assert {"val", "first probe", "second probe", "no-easy"} < set(result["table"][0])
    out = capsys.readouterr().out
    assert re.search(r"^Choice, by validation accuracy: (umt|ume)\.", out, re.MULTILINE)
    assert re.search(r"^  linear - ume: [+-]\d+\.\d\d ± \d+\.\d\d points$", out, re.MULTILINE)
    better = "Plain joint training is better there than all that it was compared with."
    assert (better in out) == result["decision"]["joint_is_better"]
    assert next(iter(umt.METHODS)) == "auto"  # alone where data are large
    # Every dataset has its recipe; those that are not tested here are in test_clips.py.
    assert {*MODALITIES, *FROM_FILES} - {"three"} == set(DATASETS) == {*umt.RECIPES} | UNLISTED


def test_every_dial_acts_on_what_is_trained_on():
    def first_batch(words=""):
        split = Command(umt.SCRIPT, [*TINY, *words.split()]).splits.train
        return next(split.batches(20, torch.Generator().manual_seed(0), augment=True))[0]

    default = first_batch()
    assert equal(first_batch("--configuration N --pair-type suppressor"), default)
    changes = "configuration=T easy-size=3 easy-1=0.1 easy-2=0.1 hard=0.1 hard-size-1=3 noise=1"
    changes += " hard-size-2=3 pair-size=3 nuisance=0 pair-only=0.5 augment=0 samples=50"
    for dial in changes.split():
        assert not equal(first_batch(f"--{dial}"), default), dial
    assert not equal(first_batch("--pair-type sum-mod --fusion mlp"), default)


@pytest.mark.parametrize("dataset", ["synthetic", pytest.param("digits", marks=pytest.mark.slow)])
def test_weight_zero_is_joint_training_bit_for_bit_and_others_act(run, tmp_path, dataset):
    """With augmentation and with BatchNorm. Folders are named by what decides a method."""
    runs = {}
    for weight in (0.0, 3.0, umt.RECIPES[dataset]["distill_weight"]):
        argv = ["--dataset", dataset, "--distill-weight", str(weight), "--method", "umt", "joint"]
        runs[weight], joint = run(*argv)["runs"]
    (plain,) = tmp_path.glob("umt_ume/*/joint-*")
    folders = sorted(tmp_path.glob("umt_ume/*/umt-*"))
    weights = [read(x / "config.json")["arguments"]["distill_weight"] for x in folders]
    assert sorted(weights) == sorted(runs)
    for folder, weight in zip(folders, weights, strict=True):
        assert (f"-distill-weight={weight}-" in folder.name) == (weight in (0, 3))
        assert equal(tensors(folder), tensors(plain)) == (weight == 0)
        assert (history_of(folder) == history_of(plain)) == (weight == 0)
    assert runs[0]["test"] == joint["test"] and runs[0]["val"] == joint["val"]
    assert "distill_weight" not in read(plain / "config.json")["arguments"]


# ---- UMT over a whole run ----


@pytest.mark.parametrize(
    "data",
    ["--augment 0.3", "--augment 0", pytest.param("--dataset digits", marks=pytest.mark.slow)],
)
def test_umt_equals_a_plain_loop(run, tmp_path, monkeypatch, data):
    """Teachers, students and SGD by hand; the student starts as joint training does.

    Without augmentation the teachers look once, and always they are the frozen last networks.
    """
    seen, look = SimpleNamespace(looks=0), umt.Teachers.forward

    def spy(self, inputs):
        seen.teachers, seen.looks = self, seen.looks + 1
        return look(self, inputs)

    monkeypatch.setattr(umt.Teachers, "forward", spy)
    argv = f"{data} --train-samples 100 --batch-size 40 --epochs 3 --lr 0.02 --distill-weight 3"
    argv = f"{argv} --schedule step --weight-decay 0.01 --momentum 0.8".split()
    run(*argv, "--method", "umt")
    model, splits = prepare("umt", *argv)
    assert seen.looks == (9 if splits.train.augmented else 1)
    assert not any(module.training for module in seen.teachers.modules())
    assert all(p.grad is None and not p.requires_grad for p in seen.teachers.parameters())
    teachers = {m: restored(tmp_path, f"unimodal-{m}", *argv) for m in splits.modalities}
    for m, teacher in teachers.items():
        assert equal(seen.teachers[m].state_dict(), teacher.encoders[m].state_dict())
    assert equal(model.state_dict(), prepare("joint", *argv)[0].state_dict())
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(p) for p in parameters]
    for epoch in range(3):
        lr = 0.002 if epoch >= 0.7 * 3 else 0.02
        generator = seed_phase(0, "train", epoch)
        model.train()
        for batch in torch.randperm(100, generator=generator).split(40):
            inputs, labels = whole(splits.train.subset(batch))
            if splits.train.augmented:
                for m, x in inputs.items():
                    inputs[m] = x + 0.3 * torch.randn(x.shape, generator=generator)
            z = {m: model.encoders[m](inputs[m]) for m in splits.modalities}
            loss = -model.fusion(z).log_softmax(1)[torch.arange(len(labels)), labels].mean()
            for m in z:
                with torch.no_grad():
                    _, t = teachers[m](inputs)
                loss = loss + 3 * ((z[m] - t[m]) ** 2).sum() / z[m].numel()
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for w, g, v in zip(parameters, gradients, velocity, strict=True):
                    w.sub_(lr * v.mul_(0.8).add_(g + 0.01 * w))
    saved = tensors(folder_of(tmp_path, "umt"))
    assert not any("teacher" in name for name in saved)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(saved[f".model.{name}"], tensor, rtol=1e-3, atol=1e-4)


def test_a_student_starts_where_its_teacher_did_only_if_told(monkeypatch):
    """Even in the modalities named, and in no other module."""
    command = Command(umt.SCRIPT, [*TINY, "--method", "umt"])
    config = command.config("umt", 0)
    teachers = {x.modalities[0]: build_model(x, command.splits).encoders for x in config.needs}
    for name in ("none", *teachers, "all"):
        config.shared_start, model = name, build_model(config, command.splits)
        fresh = copy.deepcopy(model.state_dict())
        umt.share_starts(model, command.splits, config)
        for m, teacher in teachers.items():
            shared = equal(model.encoders[m].state_dict(), teacher[m].state_dict())
            assert shared == (name in (m, "all"))
            assert shared != equal(model.encoders[m].state_dict(), part(fresh, f"encoders.{m}."))
        assert equal(model.fusion.state_dict(), part(fresh, "fusion."))


def part(state, prefix):
    return {k.removeprefix(prefix): x for k, x in state.items() if k.startswith(prefix)}


@pytest.mark.slow
def test_teachers_are_trained_once_and_replaced_only_if_named(run, tmp_path, monkeypatch):
    """Each seed has its own."""
    trained, train = [], umt.train

    def spy(run, model, splits, config):
        if config.method not in umt.ASSEMBLED:
            trained.append((config.method, config.seed))
        train(run, model, splits, config)

    monkeypatch.setattr(umt, "train", spy)
    command = ["--method", "umt", "ume", "linear", "auto", "--seeds", "0", "1"]
    first = run(*command)
    decision = first["decision"]
    val = [x["val"]["accuracy"] for x in first["runs"] if x["method"] == "linear"]
    assert decision["validation"]["linear"] == pytest.approx(sum(val) / 2) and len(val) == 2
    run("--method", "ume-logits", "umt", "--seeds", "0", "1")
    both = sorted((method, seed) for method in (*ALONE, "umt", "joint") for seed in (0, 1))
    assert sorted(trained) == both
    first, second = (folder_of(tmp_path, ALONE[0], seed) for seed in (0, 1))
    assert not equal(tensors(first), tensors(second))
    before = snapshot(first)
    (second / "summary.json").unlink()  # unfinished: gone on with, after its last epoch
    run("--method", "umt", "--overwrite", "--seeds", "0", "1")
    assert snapshot(first) == before and (second / "summary.json").exists()
    assert trained[8:] == [("umt", 0), (ALONE[0], 1), ("umt", 1)]
    assert run(*command)["decision"] == decision and len(trained) == 11
    run("--method", "auto", "--overwrite")  # stands for all that it needs
    assert {(ALONE[0], 0), (ALONE[1], 0), ("joint", 0)} <= set(trained[11:])


# ---- UME, the linear classifier and the choice ----


def logistic_regression(train, labels, test):
    """Log-probabilities (N, C) on `test`; both are standardised as `train` is."""
    scale = train.std(axis=0)
    scale[scale == 0] = 1
    first, second = ((z - train.mean(axis=0)) / scale for z in (train, test))
    classifier = LogisticRegression(max_iter=10**5, tol=1e-8).fit(first, labels)
    return torch.from_numpy(classifier.predict_log_proba(second))


def test_what_is_assembled_from_the_networks_trained_alone(run, tmp_path):
    """Means of the last and of the best networks; a classifier on all frozen features together."""
    argv = [*LARGER, "--epochs", "4", "--lr", "0.02"]
    result = run(*argv, "--method", *umt.ASSEMBLED)
    splits = prepare("joint", *argv)[1]
    (seen, y), (inputs, labels) = (whole(split) for split in (splits.train, splits.test))
    expected = {}
    for name in ("last.pt", "best.pt"):
        models = {m: restored(tmp_path, f"unimodal-{m}", *argv, name=name) for m in inputs}
        with torch.no_grad():
            outputs = [model(inputs)[0] for model in models.values()]
            z = [np.hstack([models[m](x)[1][m] for m in models]) for x in (seen, inputs)]
        expected[name] = {
            "ume": (sum(x.softmax(1) for x in outputs) / 2).log(),
            "ume-logits": sum(outputs) / 2,
            "linear": logistic_regression(z[0], y, z[1]),
        }
    for summary in result["runs"]:
        last, best = (expected[name][summary["method"]] for name in ("last.pt", "best.pt"))
        for logits, found in ((last, summary["test"]), (best, summary["best"]["test"])):
            assert found["accuracy"] == pytest.approx(accuracy(logits, labels), abs=0.5)
        (path,) = tmp_path.glob(f"umt_ume/*/{summary['method']}-train*/predictions.npz")
        saved = torch.from_numpy(np.load(path)["logits"]).to(last.dtype)
        torch.testing.assert_close(saved.exp(), last.exp(), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("method", ["joint", "unimodal-second"])
def test_what_is_read_of_each_modality_and_slice(run, tmp_path, monkeypatch, method):
    """A probe of one encoder alone, on test samples after training samples; a share of the head."""
    monkeypatch.setattr(evaluation, "linear_probe", linear_probe)
    found = run(*LARGER, "--method", method)["test"]
    model, (_, splits) = restored(tmp_path, method, *LARGER), prepare(method, *LARGER)
    (inputs, y), (inputs_test, y_test) = (whole(split) for split in (splits.train, splits.test))
    with torch.no_grad():
        _, z = model(inputs)
        logits, z_test = model(inputs_test)
    for i, m in enumerate(model.encoders):
        guess = logistic_regression(z[m].numpy(), y, z_test[m].numpy())
        right = accuracy(guess, y_test)
        assert found[m]["probe"] == pytest.approx(right, abs=0.5)  # a sample of 400 may tip over
        if method == "joint":
            columns = model.fusion.linear.weight[:, 64 * i : 64 * (i + 1)]
            part = z_test[m] @ columns.T + model.fusion.linear.bias / 2
            assert found[m]["head"] == accuracy(part, y_test)
        else:
            assert found[m]["alone"] == found["accuracy"] == accuracy(logits, y_test)
    saved = np.load(folder_of(tmp_path, method) / "predictions.npz")
    torch.testing.assert_close(torch.from_numpy(saved["logits"]), logits)
    assert saved["label"].tolist() == y_test.tolist()
    for name, mask in splits.test.slices.items():
        assert found["slices"][name] == accuracy(logits[mask], y_test[mask])


@pytest.mark.parametrize(
    ("right", "choice", "joint_is_better"),
    [
        ({"linear": 60, "ume": 50, "joint": 90, "umt": 70}, "umt", True),
        ({"linear": 60, "ume": 50, "joint": 60, "umt": 70}, "umt", False),
        ({"linear": 60, "ume": 50, "joint": 71, "umt": 70}, "umt", False),  # by no more than 1 SE
        ({"linear": 50, "ume": 50, "joint": 60}, "ume", True),
    ],
)
def test_the_choice_on_constructed_predictions(monkeypatch, right, choice, joint_is_better):
    """How many of 100 validation samples each method gets right, the same ones first."""
    found = {m: (torch.arange(100) < count).repeat(2, 1) for m, count in right.items()}
    monkeypatch.setattr(umt, "validate", lambda _, method: found[method])
    decision = umt.decide(SimpleNamespace(methods=list(right)))
    assert (decision["choice"], decision["joint_is_better"]) == (choice, joint_is_better)
    assert decision["by_seed"] == f"2 {choice}"
    found["linear"] = torch.stack([torch.arange(100) < 90, torch.arange(100) < 10])
    assert umt.decide(SimpleNamespace(methods=list(right)))["by_seed"] == "1 ume, 1 umt"


@pytest.mark.slow
@pytest.mark.parametrize("chosen", [["umt"], []])
def test_auto_trains_umt_only_if_it_is_chosen(run, monkeypatch, chosen):
    monkeypatch.setattr(umt, "choose", lambda *_: "umt" if chosen else "ume")
    result = run("--method", "auto")
    expected = [*ALONE, "ume", "linear", "joint", *chosen]
    assert [row["method"] for row in result["table"]] == expected
    references = [row["reference"] for row in result["decision"]["evidence"]]
    assert references == ["ume", "ume", *chosen]


# ---- Reading runs again ----


@pytest.mark.slow
def test_eval_only_gives_the_same_numbers_and_writes_nothing(run, tmp_path):
    methods = ["--method", ALONE[0], "umt", *umt.ASSEMBLED, "auto"]
    first = run(*methods)
    before = snapshot(tmp_path)
    again = run(*methods, "--eval-only")
    assert snapshot(tmp_path) == before and again["decision"] == first["decision"]
    by_method = {summary["method"]: without_seconds(summary) for summary in again["runs"]}
    assert {x["method"]: without_seconds(x) for x in first["runs"]} == by_method


@pytest.mark.slow
def test_damaged_files_are_named_and_a_damaged_teacher_does_not_cost_the_student(run, tmp_path):
    run("--method", "umt", "auto")
    student = snapshot(folder_of(tmp_path, "umt"))
    (folder_of(tmp_path, ALONE[1]) / "last.pt").write_bytes(b"half")
    sentence = rf"{ALONE[1]}.*last\.pt is missing, damaged .* again by --method {ALONE[1]}"
    for method in ("umt", "ume"):
        with pytest.raises(UserError, match=sentence):
            run("--method", method, "--overwrite")
    assert snapshot(folder_of(tmp_path, "umt")) == student
    run("--method", ALONE[1], "--overwrite")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="unfinished run"):
        summary = folder_of(tmp_path, ALONE[1]) / "summary.json"  # it is trained anew meanwhile
        patch.setattr(umt, "train", lambda *_: summary.unlink())
        run("--method", "ume", "--overwrite")
    run("--method", ALONE[1], "--resume")
    run("--method", "umt", "ume", "--overwrite")
    (folder_of(tmp_path, "ume") / "predictions.npz").write_bytes(b"half")
    with pytest.raises(UserError, match=r"ume-.*predictions\.npz cannot be read .*--overwrite"):
        run("--method", "auto")


# ---- The experiments ----


def plan(name, *argv):
    """The grid of an experiment, without running it."""
    experiment = experiments.Experiment(umt, experiments.EXPERIMENTS, [name, *TINY, *argv])
    return experiments.EXPERIMENTS[name](experiment)


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Run an experiment: its record, its folder, and the lines of its figure by their labels."""

    def call(name, *argv):
        figures = []
        monkeypatch.setattr(grid, "write_figure", lambda path, figure: figures.append(figure))
        record = experiments.main([name, *TINY, "--epochs", "1", "--out", str(tmp_path), *argv])
        (folder,) = tmp_path.glob(f"umt_ume/*/{name}-train-samples=60-epochs=1-batch-size=20")
        assert read(folder / "table.json")["rows"] == record["rows"]
        assert grid.read_rows(folder / "rows.csv") == record["runs"]
        (axis,) = figures[0].axes
        found = [x for x in axis.containers if isinstance(x, ErrorbarContainer) and x.lines[0]]
        lines = {x.get_label(): x.lines[0] for x in found}
        return (
            record,
            folder,
            {m: (list(x.get_xdata()), list(x.get_ydata())) for m, x in lines.items()},
        )

    return call


def test_the_grids(features):
    names, rivals = [*ALONE, "ume", "ume-logits", "linear", "joint", "umt", "auto"], [*RIVALS]
    script = {"script": "baselines"}
    both = ({"method": names}, {**script, "method": rivals})
    expected = [{"configuration": c, **part} for c in "ONTQ" for part in both]
    assert plan("methods").parts == expected
    rivals.remove("ogm-ge")  # it compares the shares of the logits of several modalities
    assert plan("methods", "--fusion", "mlp").parts == expected
    assert plan("methods", *features("only")).parts[1] == both[1]
    digits = plan("methods", "--dataset", "digits", "--method", "joint", "auto")
    assert (digits.parts, digits.fields) == ([{"method": ["joint", "auto"]}], ())
    expected = []
    for share, size in ((0, 0), (0.05, 5), (0.1, 5), (0.2, 5), (0.4, 5)):
        dials = {"configuration": "Q", "pair_size": size, "pair_only": share}
        expected += [{**dials, "method": ["ume", "joint"]}]
        expected += [{**dials, **script, "method": ["aux-ce"]}, {**dials, "method": ["umt"]}]
    assert plan("dial").parts == expected
    weights = [
        {"distill_weight": x, "method": ["umt"]} for x in (0.3, 1, 3, 10, 30, 100, 300, 1000)
    ]
    assert plan("weights", "--dataset", "digits").parts == weights
    expected = [{"configuration": c, **part} for c in "ONTQ" for part in weights]
    assert plan("weights").parts == expected


@pytest.mark.slow
def test_methods_compares_all_and_judges_the_choice(experiment, tmp_path, monkeypatch):
    monkeypatch.setattr(experiments, "CONFIGURATIONS", ("N", "Q"))
    record, folder, _ = experiment("methods", "--seeds", "0", "1")
    methods, rows = [*ALONE, "ume", "ume-logits", "linear", "joint", "umt", *RIVALS], record["rows"]
    expected = [(c, m) for c in "NQ" for m in methods]
    assert [(row["configuration"], row["method"]) for row in rows] == expected
    titles = ["test", "macro-F1", "best", "val", "first probe", "second probe", "no-easy"]
    assert list(rows[0]) == ["method", "configuration", "fusion", *titles, "pair-only"]
    for row in rows:
        assert row["test"]["n"] == 2 and (row["pair-only"] is None) == (row["configuration"] == "N")
    expected = [(c, m) for m in ("umt", *RIVALS) for c in "NQ"]
    assert [(row["configuration"], row["method"]) for row in record["paired"]] == expected
    found = []  # what a rival shares with joint training: all but its name
    for pattern in ("umt_ume/*/joint-*", "baselines/*/aux-ce-*"):
        (path,) = tmp_path.glob(f"{pattern}configuration=Q*-seed0/config.json")
        arguments = read(path)["arguments"]
        del arguments["script"], arguments["method"]
        found.append(arguments)
    assert found[0] == found[1]
    judged = read(folder / "decisions.json")
    assert judged["title"] == "The choice, methods on synthetic"
    assert judged["rows"] == record["choices"] and judged["arguments"] == record["arguments"]
    assert [row["configuration"] for row in judged["rows"]] == ["N", "Q"]
    decisions = [x["decision"] for x in record["results"] if "decision" in x]
    assert judged["decisions"] == decisions


@pytest.mark.parametrize(
    ("choice", "umt_right", "ahead", "right"),
    [
        ("ume", (70, 76), "+8.00 ± 2.00", "yes"),
        ("umt", (78, 82), "-1.00 ± 1.00", "yes"),  # by no more than a standard error
        ("umt", (70, 76), "-8.00 ± 2.00", "no"),
        ("umt", (70,), "-10.00", None),
    ],
)
def test_a_decision_is_judged_on_test_data(choice, umt_right, ahead, right):
    tests = {"umt": umt_right, "ume": (80, 82), "joint": (85, 89)}
    runs = [
        {"method": m, "configuration": c, "seed": seed, "test": x if c == "Q" else 0}
        for c in "TQ"
        for m, found in tests.items()
        for seed, x in enumerate(found)
    ]
    evidence = [{"method": "linear", "reference": "ume", "points": 1.5, "standard_error": 0.25}]
    decision = {"choice": choice, "by_seed": "3 umt", "evidence": evidence}
    row = experiments.judge({"configuration": "Q"}, decision, runs)
    found = {"configuration": "Q", "choice": choice, "of single seeds": "3 umt"}
    assert row.items() >= (found | {"linear - ume (val)": "+1.50 ± 0.25"}).items()
    assert (row.get("choice - other (test)"), row.get("right")) == (ahead, right)
    assert choice == "umt" or row["joint - choice (test)"] == "+6.00 ± 1.00"


@pytest.mark.slow
def test_dial_grows_the_share_of_paired_samples(experiment, monkeypatch):
    monkeypatch.setattr(experiments, "DIAL", experiments.DIAL[::4])
    record, folder, lines = experiment("dial")
    assert not (folder / "decisions.json").exists()
    methods, rows = ["ume", "joint", "aux-ce", "umt"], record["rows"]
    expected = [(share, m) for share in (0, 0.4) for m in methods]
    assert [(row["pair_only"], row["method"]) for row in rows] == expected
    assert list(rows[0]) == ["method", "configuration", "pair_size", "pair_only", "fusion", "test"]
    pairs = [(row["method"], row["reference"]) for row in record["paired"]]
    assert pairs == [*2 * [("umt", "joint")], *2 * [("aux-ce", "joint")]]
    means = {m: [row["test"]["mean"] for row in rows if row["method"] == m] for m in methods}
    assert lines == {m: ([0, 0.4], values) for m, values in means.items()}


@pytest.mark.slow
def test_weights_are_compared_on_validation(experiment, monkeypatch):
    monkeypatch.setattr(experiments, "WEIGHTS", (0.0, 3.0))
    monkeypatch.setattr(experiments, "CONFIGURATIONS", ("O", "Q"))
    record, _, lines = experiment("weights")
    keys = ["method", "configuration", "distill_weight", "fusion"]
    assert [[row[k] for k in keys] for row in record["rows"]] == [
        ["umt", c, weight, "concat"] for c in "OQ" for weight in (0, 3)
    ]
    assert list(record["rows"][0]) == [*keys, "val"]
    found = [run["val"]["accuracy"] for run in record["results"]]
    assert [row["val"]["mean"] for row in record["rows"]] == found
    assert lines == {"O": ([0, 3], found[:2]), "Q": ([0, 3], found[2:])}


@pytest.mark.parametrize("dataset", ["synthetic", "digits", "av-digits"])
def test_choices_of_the_results_follow_from_their_runs(dataset):
    record = read(grid.RESULTS / f"umt_choice_{dataset}.json")
    runs = grid.read_rows(grid.RESULTS / f"umt_methods_{dataset}.csv")
    for row, decision in zip(record["rows"], record["decisions"], strict=True):
        fields = {k: row[k] for k in ("configuration",) if k in row}
        assert row.items() <= experiments.judge(fields, decision, runs).items()


# ---- Bad input ----


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        ("--distill-weight -1", "must be a number at least 0, not '-1'"),
        ("--fusion film", "invalid choice: 'film'"),
        (
            "--shared-start left",
            "no modality 'left' in synthetic for --shared-start; choose from none, all, first",
        ),
        ("starts --shared-start all", "starts sets --shared-start itself; leave it out."),
        ("--method utm", "no method 'utm' for synthetic; choose from auto, umt, ume, ume-logits"),
        ("--pair-type xor", "No pair type 'xor'; choose from suppressor, sum-mod."),
        ("--pair-type sum-mod", "no linear head can learn --pair-type sum-mod"),
        ("--method umt --distill-weight 1e30", "a lower weight of the method's own terms."),
        ("--experiment dial", "python -m experiments.umt_ume --help"),
        ("table1", "invalid choice: 'table1'"),
        ("dial --dataset digits", "dial turns dials of synthetic; leave out --dataset."),
        ("dial --configuration T", "dial sets --configuration itself; leave it out."),
        ("dial --pair-only 0.3", "dial sets --pair-only itself; leave it out."),
        ("weights --configuration N", "weights sets --configuration itself; leave it out."),
        ("weights --distill-weight 2", "weights sets --distill-weight itself; leave it out."),
    ],
)
def test_bad_requests_are_one_sentence(run, capsys, argv, sentence):
    words = argv.split()
    with pytest.raises((UserError, SystemExit)) as error_info:
        run(*words) if words[0].startswith("--") else plan(*words)
    told = str(error_info.value)
    assert sentence in (capsys.readouterr().err if told == "2" else told) and "\n" not in told
