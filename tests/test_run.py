"""common/run.py: the folder of a run, its refusals, what it leaves, and exact resume.

A run that was killed and resumed equals the uninterrupted one, bit for bit. Most kills are an
exception at a chosen place, in process; slow tests send SIGKILL to real processes.
"""

import errno
import io
import itertools
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import baselines
import mhm
import pmr
from common import command_line, run, seeding, storage
from common.errors import UserError

EPOCHS, STEPS = 3, 3  # three steps an epoch
TINY = {"train_samples": 60, "batch_size": 20, "epochs": EPOCHS, "lr": 0.1, "device": "cpu"}
NAME = "joint-concat-train-samples=60-epochs=3-batch-size=20-lr=0.1-seed0"
FILES = {"config.json", "metrics.jsonl", "summary.json", "predictions.npz", "curves.png"}
CHECKPOINTS = ("last.pt", "best.pt")
FILES |= {*CHECKPOINTS}


def train(out, script=pmr, method="joint", **settings):
    return script.main({**TINY, "out": str(out), "method": [method], **settings})


def folder_of(out):
    (folder,) = Path(out).glob("*/digits/*")
    return folder


def load(path):
    """A checkpoint without its times, the only thing that no two runs share."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["seconds"], checkpoint["cpu_seconds"]
    return checkpoint


def read(path):
    return json.loads(path.read_text())


def without_seconds(summary):
    return {key: value for key, value in summary.items() if "seconds" not in key}


def assert_same(a, b, where=""):
    """Equal bit for bit, all the way down: dicts, lists, numbers and tensors."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert list(a) == list(b), where
        for key in a:
            assert_same(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b), where
        for i, pair in enumerate(zip(a, b, strict=True)):
            assert_same(*pair, f"{where}/{i}")
    elif isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b), where
    else:
        assert a == b, where


def assert_same_run(folder, reference):
    """Every file that two runs leave behind, but for the time that they took."""
    assert {path.name for path in folder.iterdir()} == FILES
    for name in CHECKPOINTS:
        assert_same(load(folder / name), load(reference / name), name)
    for name in ("metrics.jsonl", "curves.png"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    found, expected = (without_seconds(read(x / "summary.json")) for x in (folder, reference))
    assert found == expected
    found, expected = (np.load(x / "predictions.npz") for x in (folder, reference))
    assert set(found) == set(expected)
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], key)


def snapshot(folder):
    """Bytes and time of change of everything under `folder`."""
    return {
        path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


class QuickFigure:
    """In place of a drawing, which takes longer than the training here: curves.png is JSON."""

    def __init__(self, title, panels, steps=None):
        self.content = {"panels": panels, "steps": steps}

    def savefig(self, file, **_):
        file.write(json.dumps(self.content).encode())


@pytest.fixture(scope="module", autouse=True)
def quick():
    """No drawing, and the data are loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_curves", QuickFigure)
        patch.setattr(command_line, "load_dataset", cache(command_line.load_dataset))
        yield


@pytest.fixture(scope="module")
def trained(quick, tmp_path_factory):
    """--out of a finished run; never changed."""
    out = tmp_path_factory.mktemp("trained")
    train(out)
    return out


@pytest.fixture
def finished(trained, tmp_path):
    """A copy of the finished run, to be changed: its --out."""
    return shutil.copytree(trained, tmp_path / "runs")


@pytest.fixture
def unfinished(finished):
    """A run killed after its last epoch: everything but the test results."""
    for name in ("summary.json", "predictions.npz", "curves.png"):
        (folder_of(finished) / name).unlink()
    return finished


@pytest.fixture
def no_training(monkeypatch):
    """Any step of training fails the test."""
    monkeypatch.setattr(pmr, "train", lambda *_: pytest.fail("a step was trained"))


# ---- Name of the folder ----

DEFAULTS = {"epochs": 20, "lr": 0.01, "train_samples": None, "alpha": 1.0}


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "pmr-film-seed3"),
        ({"method": "unimodal-gray", "fusion": None}, "unimodal-gray-seed3"),
        ({"lr": 0.5, "train_samples": 60}, "pmr-film-lr=0.5-train-samples=60-seed3"),
    ],
)
def test_name_holds_method_fusion_and_every_knob_that_is_not_default(changes, name):
    arguments = {"script": "pmr", "dataset": "digits", "method": "pmr", "fusion": "film", "seed": 3}
    assert run.run_name({**arguments, **DEFAULTS, **changes}, DEFAULTS) == name


def test_a_long_name_ends_in_a_digest_of_it_all():
    words = ["a" * 140, "b" * 9], ["a" * 140, "b" * 10], ["a" * 140, "b" * 9 + "c"]
    whole, first, second = (run.join_name(*parts) for parts in words)
    assert whole == "-".join(words[0]) and len(whole) == len(first) == len(second) == 150
    assert first[:141] == second[:141] == "a" * 140 + "-" and first[-9] == "-" and first != second
    arguments = {"script": "s", "dataset": "d", "method": "m" * 200, "seed": 12}
    assert run.run_name(arguments, {}).endswith("-seed12")  # seeds of a run stand side by side


def test_folder_of_a_run_is_script_dataset_name_and_holds_exactly_its_files(trained):
    assert folder_of(trained) == trained / "pmr" / "digits" / NAME
    assert {path.name for path in folder_of(trained).iterdir()} == FILES == set(run.Run.FILES)


# ---- Existing runs ----


@pytest.mark.parametrize("flag", [{}, {"resume": True}])
def test_finished_run_is_reported_and_not_trained_again(finished, no_training, flag):
    before = snapshot(finished)
    assert train(finished, **flag) == read(folder_of(finished) / "summary.json")
    assert snapshot(finished) == before


@pytest.mark.parametrize("flag", [{}, {"eval_only": True}])
def test_unfinished_run_is_refused_without_resume(unfinished, no_training, flag):
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=r"unfinished run.*--resume.*--overwrite"):
        train(unfinished, **flag)
    assert snapshot(unfinished) == before


def change_arguments(out, change):
    path = folder_of(out) / "config.json"
    config = read(path)
    change(config["arguments"])
    path.write_text(json.dumps(config))


@pytest.mark.parametrize("flag", [{}, {"resume": True}, {"eval_only": True}])
@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_another_configuration_is_refused_by_the_name_of_its_knob(
    request, no_training, kind, flag
):
    out = request.getfixturevalue(kind)
    change_arguments(out, lambda arguments: arguments.update(lr=0.5))
    before = snapshot(out)
    with pytest.raises(UserError, match=r"another configuration \(lr 0.5 there, 0.1 here\)"):
        train(out, **flag)
    change_arguments(out, lambda arguments: arguments.pop("schedule"))
    with pytest.raises(UserError, match=r"lr .* here; schedule None there, 'none' here"):
        train(out, **flag)
    assert snapshot(out).keys() == before.keys()


@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_overwrite_trains_anew_and_removes_only_the_runs_own_files(request, trained, kind):
    out = request.getfixturevalue(kind)
    folder = folder_of(out)
    (folder / "config.json").write_text('{"arguments": {"lr": 0.5}}')
    (folder / "last.pt").write_bytes(b"damaged")
    (folder / "best.pt.tmp").write_bytes(b"left by a kill")
    (folder / "notes.txt").write_text("mine")
    (folder / "figures").mkdir()
    (folder / "figures" / "last.pt").write_text("mine too")
    other = shutil.copytree(folder_of(trained), folder.with_name("joint-seed7"))
    before = snapshot(other)
    train(out, overwrite=True)
    assert snapshot(other) == before
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "figures" / "last.pt").read_text() == "mine too"
    (folder / "notes.txt").unlink()
    shutil.rmtree(folder / "figures")
    assert_same_run(folder, folder_of(trained))


def test_a_run_is_replaced_at_its_first_epoch_and_not_before(finished, monkeypatch):
    before = snapshot(finished)
    monkeypatch.setattr(pmr, "draw_subset", lambda *_: pytest.fail("before the first epoch"))
    with pytest.raises(pytest.fail.Exception):
        train(finished, overwrite=True)
    assert snapshot(finished) == before


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_on_a_fresh_folder_resume_and_overwrite_train_from_the_start(tmp_path, trained, flag):
    train(tmp_path, **{flag: True})
    assert_same_run(folder_of(tmp_path), folder_of(trained))


@pytest.mark.parametrize("settings", [{"method": "pmr"}, {"method": "unimodal-gray"}, {}])
def test_eval_only_computes_the_summary_anew_and_writes_nothing(
    tmp_path, trained, monkeypatch, settings
):
    out = shutil.copytree(trained, tmp_path / "runs") if not settings else tmp_path
    if settings:
        train(out, **settings)
    path = folder_of(out) / "summary.json"
    right = read(path)
    path.write_text(json.dumps({**right, "test": {"accuracy": -1.0}}))
    before = snapshot(out)
    monkeypatch.setattr(pmr, "train", lambda *_: pytest.fail("a step was trained"))
    found = train(out, **settings, eval_only=True)
    assert without_seconds(found) == without_seconds(right)
    assert snapshot(out) == before


def test_eval_only_on_a_missing_run_is_refused_and_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match="holds no run; train it first, without --eval-only"):
        train(tmp_path / "runs", eval_only=True)
    assert not (tmp_path / "runs").exists()


# ---- Damaged files ----

DAMAGES = {
    "missing": None,
    "truncated": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "garbage": lambda whole: b"\x00\xff garbage" * 100,
}


def damage(path, kind):
    if kind == "missing":
        path.unlink()
    else:
        path.write_bytes(DAMAGES[kind](path.read_bytes()))


SENTENCE = "{} is missing, damaged or of another version .*--method joint --overwrite"


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_checkpoint_is_a_sentence(trained, tmp_path, name):
    for kind in DAMAGES:
        out = shutil.copytree(trained, tmp_path / kind)
        folder = folder_of(out)
        damage(folder / name, kind)
        before = snapshot(out)
        with pytest.raises(UserError, match=SENTENCE.format(name)):
            train(out, eval_only=True)
        assert snapshot(out) == before
        (folder / "summary.json").unlink()
        if (name, kind) != ("last.pt", "missing"):  # without it, the run starts from the beginning
            with pytest.raises(UserError, match=SENTENCE.format(name)):
                train(out, resume=True)
            assert not (folder / "summary.json").exists()


CHANGES = {key: None for key in ("epoch", "history", "best", "seconds", "cpu_seconds", "state")}


@pytest.mark.parametrize("key", [*CHANGES, "model"])
def test_checkpoint_of_another_version_is_a_sentence(unfinished, key):
    path = folder_of(unfinished) / "last.pt"
    checkpoint = torch.load(path, weights_only=True)
    if key == "model":
        checkpoint["state"]["model"] = {"weight": torch.zeros(2)}
    else:
        del checkpoint[key]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=SENTENCE.format("last.pt")):
        train(unfinished, resume=True)


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
def test_damaged_json_is_named_and_overwrite_repairs_it(finished, no_training, name):
    path = folder_of(finished) / name
    whole = path.read_bytes()
    texts = [whole[: len(whole) // 2], b"", b"\x00\xff garbage", b"[]", b"null", b"{}"]
    for text in [*texts, b'{"arguments": null}'] if name == "config.json" else texts:
        path.write_bytes(text)
        for flag in ({}, {"resume": True}):
            with pytest.raises(UserError, match=rf"{name} cannot be read.*--overwrite"):
                train(finished, **flag)
        assert path.read_bytes() == text


def test_files_of_a_run_without_its_config_are_refused(finished, no_training):
    (folder_of(finished) / "config.json").unlink()
    before = snapshot(finished)
    for flag in ({}, {"resume": True}):
        with pytest.raises(UserError, match=r"no config.json that says of which.*--overwrite"):
            train(finished, **flag)
    assert snapshot(finished) == before


@pytest.mark.parametrize("kind", DAMAGES)
def test_damaged_history_and_predictions_of_a_finished_run_are_a_sentence(finished, kind):
    there = run.Run(config_of(finished))
    assert [entry["epoch"] for entry in there.read_history()] == [0, 1, 2]
    assert there.read_predictions().keys() == {"index", "label", "logits"}
    for name, reader in (
        ("metrics.jsonl", there.read_history),
        ("predictions.npz", there.read_predictions),
    ):
        damage(there.folder / name, kind)
        with pytest.raises(UserError, match=rf"{name} cannot be read.*--overwrite"):
            reader()


def config_of(out):
    """The configuration that `train(out)` has."""
    command = command_line.Command(pmr.SCRIPT, {**TINY, "out": str(out), "method": ["joint"]})
    return next(command.configs())


# ---- What a run leaves behind ----


def test_two_runs_with_equal_arguments_are_equal_bit_for_bit(tmp_path, trained):
    torch.rand(5)  # whatever was drawn before
    train(tmp_path)
    assert_same_run(folder_of(tmp_path), folder_of(trained))


def test_config_records_arguments_versions_device_sizes_and_commit(tmp_path, trained, monkeypatch):
    config = read(folder_of(trained) / "config.json")
    expected = {"lr": 0.1, "epochs": 3, "momentum": 0.9, "seed": 0, "script": "pmr"}
    assert config["arguments"] | expected == config["arguments"]
    assert config["sizes"] == {"train": 60, "val": 9, "val_iid": 9, "test": 17}
    assert config["torch"] == torch.__version__ and config["device"] == "cpu"
    assert {"python", "threads", "git_commit"} <= config.keys()
    monkeypatch.setenv("PATH", str(tmp_path))  # git is not installed
    train(tmp_path, epochs=1)
    assert read(folder_of(tmp_path) / "config.json")["git_commit"] is None


def test_checkpoints_metrics_summary_and_predictions_agree(trained):
    folder = folder_of(trained)
    last, best = (torch.load(folder / name, weights_only=True) for name in CHECKPOINTS)
    for checkpoint in (last, best):
        keys = {"epoch", "history", "best", "state", "seconds", "cpu_seconds"}
        assert checkpoint.keys() == keys
        assert {"model", "prototypes", "optimizer"} == checkpoint["state"].keys()
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert history == last["history"] and [entry["epoch"] for entry in history] == [0, 1, 2]
    scores = [entry["val"]["accuracy"] for entry in history]
    first = scores.index(max(scores))
    assert best["epoch"] == first and best["history"] == history[: first + 1]
    summary = read(folder / "summary.json")
    named = {"script": "pmr", "dataset": "digits", "method": "joint", "fusion": "concat"}
    assert summary | {**named, "seed": 0, "epochs": 3} == summary
    assert summary["val"] == history[-1]["val"] and summary["seconds"] >= last["seconds"] - 0.1
    assert summary["best"].keys() == {"epoch", "val", "test"}
    assert (summary["best"]["epoch"], summary["best"]["val"]) == (first, history[first]["val"])
    saved = np.load(folder / "predictions.npz")
    assert saved["logits"].shape == (17, 10) and saved["index"].tolist() == list(range(17))
    accuracy = 100 * (saved["logits"].argmax(1) == saved["label"]).mean()
    assert summary["test"]["accuracy"] == pytest.approx(accuracy)


def test_summary_curves_and_seconds_of_a_run_that_only_gets_worse(tmp_path, monkeypatch):
    """Validation accuracy falls from epoch to epoch, by a clock that each look moves on."""
    evaluate, scores = pmr.evaluate, itertools.count(90.0, -1.0)

    def ever_worse(*args):
        metrics, outputs = evaluate(*args)
        return {**metrics, "accuracy": next(scores)}, outputs

    tick = itertools.count(step=10.0).__next__
    monkeypatch.setattr(pmr, "evaluate", ever_worse)
    monkeypatch.setattr(run, "time", SimpleNamespace(perf_counter=tick, process_time=tick))
    summary = train(tmp_path, method="pmr")
    folder = folder_of(tmp_path)
    last = torch.load(folder / "last.pt", weights_only=True)
    assert summary["best"] | {"epoch": 0, "val": last["history"][0]["val"]} == summary["best"]
    assert summary["val"] == last["history"][2]["val"]
    assert summary["rho"] == last["history"][2]["train"]["rho"]
    assert summary["seconds"] >= last["seconds"] > 0
    assert summary["cpu_seconds"] == last["cpu_seconds"] > 0  # of training alone
    panels = read(folder / "curves.png")["panels"].values()
    assert {len(values) for curves in panels for values in curves.values()} == {3}


# ---- Run by itself: epochs, best.pt, seconds ----


def make_run(out, epochs=9, **flags):
    arguments = {"script": "s", "dataset": "d", "method": "m", "seed": 0}
    config = {"arguments": arguments, "defaults": {}, "dataset": "d", "out": out, "seed": 0}
    config |= {"resume": False, "overwrite": False, "eval_only": False, "epochs": epochs}
    config |= {"batch_size": 1, "sizes": {"train": 1}, "device": torch.device("cpu")}
    return run.Run(SimpleNamespace(**config | flags))


def end_epochs(there, accuracies):
    """One epoch for each accuracy; the network's weight is the number of the epoch."""
    model = nn.Linear(1, 1)
    for epoch, accuracy in zip(there.epochs({"model": model}), accuracies, strict=False):
        nn.init.constant_(model.weight, epoch)
        there.end_epoch({"train": {"loss": 1.0}, "val": {"loss": 1.0, "accuracy": accuracy}})


@pytest.mark.parametrize(
    ("accuracies", "first_best"), [((10, 30, 30, 20), 1), ((5, 5), 0), ((0, 1, 2), 2), ((0,), 0)]
)
def test_best_is_the_first_of_equal_epochs(tmp_path, accuracies, first_best):
    there = make_run(tmp_path, epochs=len(accuracies))
    end_epochs(there, accuracies)
    last, best = (load(there.folder / name) for name in CHECKPOINTS)
    assert best["epoch"] == best["state"]["model"]["weight"].item() == first_best
    assert last["epoch"] == last["state"]["model"]["weight"].item() == len(accuracies) - 1
    assert last["best"] == {"epoch": first_best, "accuracy": accuracies[first_best]}


def test_a_resumed_run_has_the_epochs_and_the_seconds_that_are_left(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    clock.process_time = lambda: clock.now / 2
    monkeypatch.setattr(run, "time", clock)
    there = make_run(tmp_path)
    assert not there.folder.exists()  # nothing is written before the first epoch
    epochs = there.epochs({"model": nn.Linear(1, 1)})
    assert next(epochs) == 0 and there.folder.exists()
    clock.now = 7.0
    there.end_epoch({"train": {"loss": 1.0}, "val": {"loss": 1.0, "accuracy": 1}})
    epochs.close()
    clock.now = 1000.0  # the process was killed; hours pass
    there, model = make_run(tmp_path, epochs=3, resume=True), nn.Linear(1, 1)
    epochs = there.epochs({"model": model})
    assert next(epochs) == 1
    clock.now = 1005.0
    assert there.seconds == 12.0
    there.end_epoch({"train": {"loss": 1.0}, "val": {"loss": 1.0, "accuracy": 1}})
    last = torch.load(there.folder / "last.pt", weights_only=True)
    assert (last["seconds"], last["cpu_seconds"]) == (12.0, 6.0)
    assert list(epochs) == [2]


# ---- Writing ----


def write_half_then(error):
    def write(file):
        file.write(b"half of the n")
        file.flush()
        raise error

    return write


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), UserError),
        (RuntimeError("disk"), UserError),
        (KeyboardInterrupt(), KeyboardInterrupt),
        (ValueError("a mistake in the code"), ValueError),
    ],
)
def test_failed_write_leaves_the_old_file_whole(tmp_path, error, raised):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    sentence = r"Cannot write .*last.pt .*Make room or choose another --out"
    with pytest.raises(raised, match=sentence if raised is UserError else ""):
        storage.write_atomically(path, write_half_then(error))
    assert path.read_bytes() == b"old"
    storage.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]


def test_write_into_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match=r"Cannot write .*another process training the same run\?"):
        storage.write_json(tmp_path / "missing" / "summary.json", {})


@pytest.mark.parametrize("blocked", ["runs", "runs/pmr", f"runs/pmr/digits/{NAME}"])
def test_plain_file_in_the_way_of_the_folder_is_a_sentence(tmp_path, blocked):
    path = tmp_path / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    for flag in ("resume", "overwrite", "eval_only"):
        sentence = "holds no run" if flag == "eval_only" else r"Cannot \w+ the folder .*--out"
        with pytest.raises(UserError, match=sentence):
            train(tmp_path / "runs", **{flag: True})
    assert path.read_text() == "mine"


# ---- A loss that is no number ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run_with_the_checkpoint_before(
    tmp_path, monkeypatch, trained, value
):
    rebalance, steps = pmr.rebalance, itertools.count()

    def spoiled(loss, *args):  # in the second of the three steps of epoch 1
        return rebalance(loss * value if next(steps) == STEPS + 1 else loss, *args)

    monkeypatch.setattr(pmr, "rebalance", spoiled)
    kept = r"in epoch 1; last.pt of epoch 0 is kept\. Try a lower --lr, or a lower weight of the"
    with pytest.raises(UserError, match=kept):
        train(tmp_path)
    folder = folder_of(tmp_path)
    assert load(folder / "last.pt")["epoch"] == 0 and not (folder / "summary.json").exists()
    monkeypatch.setattr(pmr, "rebalance", rebalance)
    train(tmp_path, resume=True)
    assert_same_run(folder, folder_of(trained))


@pytest.mark.parametrize("batch_size", [20, 60])  # at 60 the only step breaks the network
@pytest.mark.parametrize("method", ["pmr", "joint", "unimodal-gray"])
def test_huge_learning_rate_ends_in_the_first_epoch_with_a_sentence(tmp_path, method, batch_size):
    with pytest.raises(UserError, match=r"became (nan|inf) in epoch 0; nothing was saved yet"):
        train(tmp_path, method=method, lr=1e30, batch_size=batch_size, epochs=1)
    assert {path.name for path in folder_of(tmp_path).iterdir()} == {"config.json"}


# ---- Seeds ----


def draws(generator):
    return torch.rand(4, generator=generator).tolist()


def test_equal_keys_draw_equally_and_different_keys_differently():
    keys = [(0, "train", 0), (0, "train", 1), (1, "train", 0), (0, "subset"), (0,), (0, "train", 10)]
    first = [draws(seeding.make_generator(*key)) for key in keys]
    assert first == [draws(seeding.make_generator(*key)) for key in keys]
    assert len({tuple(values) for values in first}) == len(keys)
    seeds = {seeding.derive_seed(n, "x") for n in range(200)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)


def test_phase_sets_the_global_generator_whatever_was_drawn_before():
    def phase(epoch):
        generator = seeding.seed_phase(0, "train", epoch)
        return torch.rand(4).tolist(), draws(generator)

    first, other = phase(0), phase(1)
    torch.rand(17)
    assert phase(0) == first
    assert len({tuple(values) for values in (*first, *other)}) == 4  # own generator differs too


# ---- Exact resume: an exception in place of the kill ----

METHODS = {  # the states of a run differ: prototypes, weights of losses, optimizers of modules
    "pmr": (pmr, {}),
    "unimodal-gray": (pmr, {"optimizer": "adam", "schedule": "cosine"}),
    "g-blending": (baselines, {"blend": "online", "super_epoch": 2}),
    "mhm": (mhm, {"heads": 3, "batch_size": 10}),  # four steps in an H-phase, two in an E-phase
    "head-ensemble": (mhm, {"heads": 3, "batch_size": 10, "optimizer": "adam"}),
    "ensemble": (mhm, {"heads": 3}),  # two steps for each member
}


class Killed(BaseException):
    """No handler of the code under test may catch this."""


def train_method(out, method, **flags):
    script, settings = METHODS[method]
    return train(out, script, method, **settings, **flags)


@pytest.fixture(scope="module")
def references(quick, tmp_path_factory):
    """method -> folder of its uninterrupted run, trained when it is first asked for."""

    @cache
    def reference(method):
        out = tmp_path_factory.mktemp(method)
        train_method(out, method)
        return folder_of(out)

    return reference


def kill_at_step(patch, step):
    """Die before training step `step` of this sitting, from 0."""
    batches, steps = run.Run.batches, itertools.count()

    def batches_until_death(*args, **options):
        for batch in batches(*args, **options):
            if next(steps) == step:
                raise Killed
            yield batch

    patch.setattr(run.Run, "batches", batches_until_death)


def kill_at_write(patch, name, saved, share):
    """Die when file `name` is written after `saved` epochs were saved in this sitting.

    share: how much of the file is written, beside its place; 1: it is renamed too.
    """
    write_whole, epochs_saved = storage.write_atomically, 0

    def write_or_die(path, write):
        nonlocal epochs_saved
        chosen = path.name == name and epochs_saved == saved
        if chosen and share < 1:
            write_whole(path, part_of(write, share))
        write_whole(path, write)
        if chosen:
            raise Killed
        epochs_saved += path.name == "last.pt"

    for module in (storage, run):
        patch.setattr(module, "write_atomically", write_or_die)


def part_of(write, share):
    """A writer that dies after `share` of the bytes of `write`."""

    def write_part(file):
        whole = io.BytesIO()
        write(whole)
        file.write(whole.getvalue()[: int(share * len(whole.getvalue()))])
        raise Killed

    return write_part


def kill_after_removing(patch, count):
    """Die as soon as `count` files are removed."""
    unlink, removals = Path.unlink, itertools.count(1)

    def unlink_and_die(path, missing_ok=False):
        unlink(path, missing_ok)
        if next(removals) == count:
            raise Killed

    patch.setattr(Path, "unlink", unlink_and_die)


def interrupt(out, method, kill, *how, **flags):
    """A run that dies where `kill(patch, *how)` says."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill(patch, *how)
        train_method(out, method, **flags or {"resume": True})


def best_epoch(folder):
    return load(folder / "best.pt")["epoch"]


PLACES = {
    "config.json half written": (kill_at_write, "config.json", 0, 0.5),
    "before the first step": (kill_at_step, 0),
    "in the middle of an epoch": (kill_at_step, STEPS + 1),
    "best.pt half written": (kill_at_write, "best.pt", "best", 0.5),
    "between best.pt and last.pt": (kill_at_write, "best.pt", "best", 1),
    "last.pt half written": (kill_at_write, "last.pt", 1, 0.5),
    "first last.pt half written": (kill_at_write, "last.pt", 0, 0.5),
    "between the last last.pt and metrics.jsonl": (kill_at_write, "last.pt", EPOCHS - 1, 1),
    "metrics.jsonl half written": (kill_at_write, "metrics.jsonl", 2, 0.5),
    "after the last epoch": (kill_at_write, "metrics.jsonl", EPOCHS, 1),
    "between predictions.npz and curves.png": (kill_at_write, "predictions.npz", EPOCHS, 1),
    "summary.json half written": (kill_at_write, "summary.json", EPOCHS, 0.5),
}


@pytest.mark.parametrize("place", PLACES)
def test_run_killed_once_and_resumed_is_the_same(tmp_path, references, place):
    reference = references("pmr")
    kill, *how = PLACES[place]
    interrupt(tmp_path, "pmr", kill, *(best_epoch(reference) if x == "best" else x for x in how))
    assert not list(tmp_path.glob("*/digits/*/summary.json"))
    for checkpoint in tmp_path.glob("*/digits/*/*.pt"):
        load(checkpoint)  # whole
    train_method(tmp_path, "pmr", resume=True)
    assert_same_run(folder_of(tmp_path), reference)


@pytest.mark.parametrize("method", METHODS)
def test_run_killed_in_every_epoch_is_the_same(tmp_path, references, method):
    """Each sitting completes one epoch; MHM's die in an E-phase, after an H-phase."""
    steps = 6 if METHODS[method][0] is mhm else 2 + (method != "g-blending") + 1 - 1
    if method == "g-blending":
        steps = 3  # 54 of the 60 samples
    interrupt(tmp_path, method, kill_at_step, steps - 1)
    for extra in range(EPOCHS - 1):
        interrupt(tmp_path, method, kill_at_step, steps + 1 + extra)
    assert load(folder_of(tmp_path) / "last.pt")["epoch"] == EPOCHS - 2
    train_method(tmp_path, method, resume=True)
    assert_same_run(folder_of(tmp_path), references(method))


def test_full_disk_ends_with_a_sentence_and_the_run_goes_on_when_there_is_room(
    tmp_path, references, monkeypatch
):
    save, room = torch.save, [True, True, True, False]

    def save_while_there_is_room(checkpoint, file):
        if not room.pop(0):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", save_while_there_is_room)
    with pytest.raises(UserError, match=r"No space left on device.*Make room"):
        train_method(tmp_path, "pmr")
    assert not list(folder_of(tmp_path).glob("*.tmp"))  # half a file keeps no full disk full
    monkeypatch.setattr(torch, "save", save)
    train_method(tmp_path, "pmr", resume=True)
    assert_same_run(folder_of(tmp_path), references("pmr"))


@pytest.mark.parametrize("removed", [1, 4, 7])
def test_overwrite_killed_while_it_clears_does_not_bring_back_the_old_network(
    tmp_path, references, removed
):
    reference = references("pmr")
    folder = shutil.copytree(reference, tmp_path / "pmr" / "digits" / reference.name)
    (folder / "last.pt").write_bytes(b"of an older version of the code")
    interrupt(tmp_path, "pmr", kill_after_removing, removed, overwrite=True)
    if removed < len(FILES):
        for flag in ({}, {"resume": True}):
            with pytest.raises(UserError, match=r"no config.json that says of which"):
                train_method(tmp_path, "pmr", **flag)
    train_method(tmp_path, "pmr", overwrite=removed < len(FILES))
    assert_same_run(folder, reference)


# ---- Real processes and SIGKILL ----


def start(*words, **options):
    """A process on one thread, in the repository; its stderr is piped."""
    return subprocess.Popen(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


def wait_until(condition, process, seconds=120):
    """Poll until `condition()` holds or `process` has ended."""
    deadline = time.monotonic() + seconds
    while not condition() and process.poll() is None:
        assert time.monotonic() < deadline, "the process does not get on"
        time.sleep(0.005)


@pytest.mark.slow
@pytest.mark.parametrize("method", ["pmr", "mhm"])
def test_process_killed_at_random_moments_and_resumed_leaves_the_same(tmp_path, method):
    """Three kills, each at a random moment of one or two epochs after a random epoch."""
    script, settings = METHODS[method]
    settings = {**TINY, **settings, "epochs": 30, "lr": 0.02, "method": [method]}
    script.main({**settings, "out": str(tmp_path / "whole")})
    reference, moments = folder_of(tmp_path / "whole"), random.Random(method)
    seconds = torch.load(reference / "last.pt", weights_only=True)["seconds"] / 30
    code = f"""if True:
        from test_run import QuickFigure, run
        import {script.__name__}
        run.draw_curves = QuickFigure
        {script.__name__}.main({settings | {"out": str(tmp_path / "killed"), "resume": True}})
    """
    command = ("-c", "import sys; sys.path[:0] = ['tests']\n" + code)

    def lines():
        found = list(tmp_path.glob("killed/*/digits/*/metrics.jsonl"))
        return len(found[0].read_text().splitlines()) if found else 0

    for epoch in sorted(moments.sample(range(1, 26), 3)):
        process = start(*command)
        wait_until(lambda epoch=epoch: lines() >= epoch, process)
        time.sleep(moments.uniform(0, 2 * seconds))
        process.kill()
        _, errors = process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL, errors
    process = start(*command)
    _, errors = process.communicate(timeout=170)
    assert process.returncode == 0, errors
    assert_same_run(folder_of(tmp_path / "killed"), reference)
