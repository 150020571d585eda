"""common/training.py: the run folder and its refusals, checkpoints, device, schedule, progress.

Runs go through `pmr.main` in process; what needs chosen numbers drives `Run` by itself.
"""

import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
from conftest import ROOT

import pmr
from common import progress, seeding, training
from common.command_line import run_command
from common.errors import UserError

TINY = ["--method=joint", "--train-samples=60", "--batch-size=20", "--epochs=3", "--lr=0.1"]
NAME = "joint-concat-train-samples=60-epochs=3-batch-size=20-lr=0.1-seed0"
CHECKPOINTS = {"last.pt", "best.pt"}


def train(out, *flags):
    """`pmr.main` on the smallest run; later flags win over those of TINY."""
    return pmr.main([*TINY, "--out", str(out), *flags])


def folder_of(out):
    (folder,) = out.glob("pmr/digits/*")
    return folder


def load(path):
    """A checkpoint without its time, the one thing that no two runs share."""
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


def snapshot(folder):
    """Bytes and time of change of everything under `folder`."""
    return {
        path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
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


class QuickFigure:
    """In place of a drawing, which takes longer than the training here: curves.png is JSON."""

    def __init__(self, title, panels):
        self.panels = panels

    def savefig(self, file, **_):
        file.write(json.dumps(self.panels).encode())


@pytest.fixture(autouse=True)
def quick_curves(monkeypatch):
    """Only `trained`, made before any test begins, has real curves."""
    monkeypatch.setattr(training, "draw_curves", QuickFigure)


@pytest.fixture
def no_training(monkeypatch):
    """Any step of training fails the test."""
    monkeypatch.setattr(pmr, "training_loss", lambda *_: pytest.fail("a step was trained"))


# ---- Name of the folder ----

DEFAULTS = {"epochs": 20, "lr": 0.01, "train_samples": None, "alpha": 1.0}


def name_of(**changes):
    arguments = {"script": "pmr", "dataset": "digits", "method": "pmr", "fusion": "film", "seed": 3}
    return training.run_name({**arguments, **DEFAULTS, **changes}, DEFAULTS)


def test_name_leaves_out_defaults():
    assert name_of() == "pmr-film-seed3"


def test_name_leaves_out_the_fusion_of_a_single_modality():
    assert name_of(method="unimodal-gray", fusion=None) == "unimodal-gray-seed3"


def test_name_holds_every_knob_that_is_not_default():
    assert name_of(lr=0.5, train_samples=60) == "pmr-film-lr=0.5-train-samples=60-seed3"


def test_folder_of_a_run_is_script_dataset_name(trained):
    assert folder_of(trained) == trained / "pmr" / "digits" / NAME


# ---- Existing runs ----


@pytest.mark.parametrize("flags", [[], ["--resume"]])
def test_finished_run_is_reported_and_not_trained_again(finished, no_training, flags):
    before = snapshot(finished)
    assert train(finished, *flags) == read(folder_of(finished) / "summary.json")
    assert snapshot(finished) == before


@pytest.mark.parametrize("flags", [[], ["--eval-only"]])
def test_unfinished_run_is_refused_without_resume(unfinished, no_training, flags):
    before = snapshot(unfinished)
    with pytest.raises(UserError, match=r"unfinished run.*--resume.*--overwrite"):
        train(unfinished, *flags)
    assert snapshot(unfinished) == before


@pytest.mark.parametrize("flags", [[], ["--resume"], ["--eval-only"]])
@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_another_configuration_is_refused_by_the_name_of_its_knob(request, kind, flags):
    out = request.getfixturevalue(kind)
    path = folder_of(out) / "config.json"
    config = read(path)
    config["arguments"]["lr"] = 0.5
    path.write_text(json.dumps(config))
    before = snapshot(out)
    with pytest.raises(UserError, match=r"another configuration \(lr 0.5 there, 0.1 here\)"):
        train(out, *flags)
    assert snapshot(out) == before


def test_a_knob_that_the_old_run_did_not_have_is_named(finished):
    path = folder_of(finished) / "config.json"
    config = read(path)
    del config["arguments"]["schedule"]
    path.write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"schedule None there, 'none' here"):
        train(finished)


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
    train(out, "--overwrite")
    names = {path.name for path in folder.iterdir()}
    assert names == {*training.Run.FILES, "notes.txt", "figures"}
    assert (folder / "notes.txt").read_text() == "mine"
    assert (folder / "figures" / "last.pt").read_text() == "mine too"
    for name in CHECKPOINTS:
        assert_same(load(folder / name), load(folder_of(trained) / name), name)


def test_overwrite_leaves_other_runs_alone(finished):
    before = snapshot(folder_of(finished))
    train(finished, "--overwrite", "--epochs", "1")
    assert snapshot(finished / "pmr" / "digits" / NAME) == before


@pytest.mark.parametrize("flag", ["--resume", "--overwrite"])
def test_resume_and_overwrite_on_a_fresh_folder_train_from_the_start(tmp_path, trained, flag):
    train(tmp_path, flag)
    for name in CHECKPOINTS:
        assert_same(load(folder_of(tmp_path) / name), load(folder_of(trained) / name), name)


@pytest.mark.parametrize("missing", ["--resume", "--overwrite", "--eval-only"])
def test_resume_overwrite_and_eval_only_exclude_each_other(tmp_path, capsys, missing):
    flags = {"--resume", "--overwrite", "--eval-only"} - {missing}
    with pytest.raises(SystemExit) as stopped:
        train(tmp_path / "runs", *flags)
    assert stopped.value.code == 2
    assert "not allowed with argument" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


# ---- --eval-only ----


@pytest.mark.parametrize("method", ["pmr", "joint", "unimodal-gray"])
def test_eval_only_gives_the_numbers_of_the_summary_and_writes_nothing(
    tmp_path, monkeypatch, method
):
    train(tmp_path, "--method", method)
    before = snapshot(tmp_path)
    monkeypatch.setattr(pmr, "training_loss", lambda *_: pytest.fail("a step was trained"))
    found = train(tmp_path, "--method", method, "--eval-only")
    assert without_seconds(found) == without_seconds(read(folder_of(tmp_path) / "summary.json"))
    assert snapshot(tmp_path) == before


def test_eval_only_computes_anew(finished):
    path = folder_of(finished) / "summary.json"
    right = read(path)
    path.write_text(json.dumps({**right, "test": {"accuracy": -1.0}}))
    assert train(finished, "--eval-only")["test"] == right["test"]


def test_eval_only_on_a_missing_run_is_refused_and_makes_no_folder(tmp_path):
    with pytest.raises(UserError, match="holds no run; train it first, without --eval-only"):
        train(tmp_path / "runs", "--eval-only")
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


@pytest.mark.parametrize("kind", DAMAGES)
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_damaged_checkpoint_ends_eval_only_with_a_sentence(finished, name, kind):
    damage(folder_of(finished) / name, kind)
    before = snapshot(finished)
    with pytest.raises(UserError, match=rf"{name} is missing, damaged.*--overwrite"):
        train(finished, "--eval-only")
    assert snapshot(finished) == before


@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage"])
@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
def test_damaged_checkpoint_ends_resume_with_a_sentence(unfinished, name, kind):
    damage(folder_of(unfinished) / name, kind)
    with pytest.raises(UserError, match=rf"{name} is missing, damaged.*--overwrite"):
        train(unfinished, "--resume")
    assert not (folder_of(unfinished) / "summary.json").exists()


@pytest.mark.parametrize("key", ["epoch", "history", "best", "seconds", "cpu_seconds", "state"])
def test_checkpoint_of_another_version_ends_resume_with_a_sentence(unfinished, key):
    path = folder_of(unfinished) / "last.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[key]
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"last.pt is .*of another version"):
        train(unfinished, "--resume")


def test_checkpoint_of_another_network_ends_resume_with_a_sentence(unfinished):
    path = folder_of(unfinished) / "last.pt"
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["state"]["model"] = {"weight": torch.zeros(2)}
    torch.save(checkpoint, path)
    with pytest.raises(UserError, match=r"last.pt is .*of another version"):
        train(unfinished, "--resume")


@pytest.mark.parametrize("kind", ["truncated", "empty", "garbage"])
@pytest.mark.parametrize("name", ["summary.json", "config.json"])
def test_damaged_json_is_named_and_overwrite_repairs_it(finished, name, kind):
    damage(folder_of(finished) / name, kind)
    before = snapshot(finished)
    for flags in ([], ["--resume"]):
        with pytest.raises(UserError, match=rf"{name} cannot be read.*--overwrite"):
            train(finished, *flags)
    assert snapshot(finished) == before
    train(finished, "--overwrite")
    read(folder_of(finished) / name)


@pytest.mark.parametrize("text", ["[]", "null", '{"arguments": null}'])
def test_config_of_another_form_is_refused_with_a_sentence(finished, text):
    (folder_of(finished) / "config.json").write_text(text)
    with pytest.raises(UserError):
        train(finished)


# ---- What a run leaves behind ----


def test_a_finished_run_leaves_exactly_its_files(trained):
    assert {path.name for path in folder_of(trained).iterdir()} == set(training.Run.FILES)


def test_two_runs_with_equal_arguments_are_equal_bit_for_bit(tmp_path, trained):
    train(tmp_path)
    for name in CHECKPOINTS:
        assert_same(load(folder_of(tmp_path) / name), load(folder_of(trained) / name), name)


def test_config_records_arguments_versions_device_sizes_and_commit(trained):
    config = read(folder_of(trained) / "config.json")
    assert config["arguments"] | {"lr": 0.1, "epochs": 3, "seed": 0} == config["arguments"]
    assert config["sizes"]["train"] == 60
    assert config["torch"] == torch.__version__ and config["device"] == "cpu"
    assert {"python", "git_commit"} <= config.keys()


def test_checkpoints_hold_all_that_resuming_needs(trained):
    for name in CHECKPOINTS:
        checkpoint = torch.load(folder_of(trained) / name, weights_only=True)
        clocks = {"seconds", "cpu_seconds"}
        assert checkpoint.keys() == {"epoch", "history", "best", "state"} | clocks
        assert {"model", "prototypes", "rival", "optimizer"} == checkpoint["state"].keys()
        assert len(checkpoint["history"]) == checkpoint["epoch"] + 1


def test_metrics_agree_with_the_history_of_the_last_checkpoint(trained):
    lines = (folder_of(trained) / "metrics.jsonl").read_text().splitlines()
    history = load(folder_of(trained) / "last.pt")["history"]
    assert [json.loads(line) for line in lines] == history
    assert [entry["epoch"] for entry in history] == [0, 1, 2]


def test_best_checkpoint_is_of_the_first_best_validation_epoch(trained):
    history = load(folder_of(trained) / "last.pt")["history"]
    scores = [entry["val"]["accuracy"] for entry in history]
    first = scores.index(max(scores))
    best = load(folder_of(trained) / "best.pt")
    assert best["epoch"] == first and best["history"] == history[: first + 1]
    assert best["best"] == {"epoch": first, "accuracy": scores[first]}


def test_summary_has_what_the_design_demands(trained):
    summary = read(folder_of(trained) / "summary.json")
    keys = {"script", "dataset", "method", "fusion", "seed", "epochs", "seconds", "cpu_seconds"}
    assert keys | {"val", "test", "best"} <= summary.keys()
    assert summary["epochs"] == 3 and summary["seconds"] >= 0
    assert {"epoch", "val", "test"} == summary["best"].keys()
    for measured in (summary["test"], summary["best"]["test"]):
        assert {"accuracy", "macro_f1", "gray", "color"} <= measured.keys()
        reads = {"head", "prototype"} | ({"probe"} if measured is summary["test"] else set())
        assert reads == measured["gray"].keys() == measured["color"].keys()
        assert 0 <= measured["accuracy"] <= 100


def test_test_accuracy_is_that_of_the_predictions(trained):
    saved = np.load(folder_of(trained) / "predictions.npz")
    assert set(saved) == {"index", "label", "logits"}
    summary, config = (read(folder_of(trained) / f"{n}.json") for n in ("summary", "config"))
    assert saved["logits"].shape == (config["sizes"]["test"], 10)
    accuracy = 100 * (saved["logits"].argmax(1) == saved["label"]).mean()
    assert summary["test"]["accuracy"] == pytest.approx(accuracy)


def test_curves_are_a_png(trained):
    assert (folder_of(trained) / "curves.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.fixture(scope="module")
def falling(tmp_path_factory):
    """Folder of a run whose validation accuracy only falls, by a clock that is never still."""
    out, evaluate = tmp_path_factory.mktemp("falling"), pmr.evaluate
    scores = iter(range(90, 0, -1))

    def ever_worse(*args):
        metrics, predictions = evaluate(*args)
        return {**metrics, "accuracy": float(next(scores))}, predictions

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pmr, "evaluate", ever_worse)
        patch.setattr(training, "draw_curves", QuickFigure)
        tick = itertools.count(step=10.0).__next__
        clock = SimpleNamespace(perf_counter=tick, process_time=tick)
        patch.setattr(training, "time", clock)
        train(out, "--method", "pmr")
    return folder_of(out)


def test_val_of_the_summary_is_of_the_last_epoch(falling):
    summary, history = read(falling / "summary.json"), load(falling / "last.pt")["history"]
    assert summary["best"]["epoch"] == 0
    assert summary["best"]["val"] == history[0]["val"]
    assert summary["val"] == history[2]["val"]


def test_rho_of_the_summary_is_of_the_last_epoch(falling):
    history = load(falling / "last.pt")["history"]
    assert read(falling / "summary.json")["rho"] == history[2]["train"]["rho"]


def test_curves_show_every_epoch(falling):
    panels = read(falling / "curves.png").values()
    lengths = {len(values) for curves in panels for values in curves.values()}
    assert lengths == {3}


# ---- Run by itself: best.pt, time ----


def make_run(out, **flags):
    arguments = {"script": "s", "dataset": "d", "method": "m", "seed": 0}
    chosen = {"resume": False, "overwrite": False, "eval_only": False, **flags}
    args = SimpleNamespace(out=out, **chosen)
    return training.Run(arguments, {}, {"train": 1}, torch.device("cpu"), args)


def end_epochs(run, accuracies):
    """One epoch for each accuracy; the network's weight is the number of the epoch."""
    model = nn.Linear(1, 1)
    for epoch, accuracy in enumerate(accuracies):
        nn.init.constant_(model.weight, epoch)
        run.end_epoch({"train": {}, "val": {"accuracy": accuracy}}, {"model": model})


@pytest.mark.parametrize(
    "accuracies, first_best", [((10, 30, 30, 20), 1), ((5, 5), 0), ((0, 1, 2), 2), ((0,), 0)]
)
def test_best_is_the_first_of_equal_epochs(tmp_path, accuracies, first_best):
    run = make_run(tmp_path)
    end_epochs(run, accuracies)
    best, last = load(run.folder / "best.pt"), load(run.folder / "last.pt")
    assert best["epoch"] == best["state"]["model"]["weight"].item() == first_best
    assert last["epoch"] == last["state"]["model"]["weight"].item() == len(accuracies) - 1
    assert last["best"] == {"epoch": first_best, "accuracy": accuracies[first_best]}


def test_start_is_zero_on_a_fresh_folder_and_after_the_last_epoch_on_resume(tmp_path):
    run = make_run(tmp_path)
    assert run.start({}) == 0
    end_epochs(run, (1, 2))
    model = nn.Linear(1, 1)
    assert make_run(tmp_path, resume=True).start({"model": model}) == 2
    assert model.weight.item() == 1


def test_seconds_add_up_over_sittings(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, process_time=lambda: 0.0)
    monkeypatch.setattr(training, "time", clock)
    run = make_run(tmp_path)
    clock.now = 7.0
    end_epochs(run, (1,))
    clock.now = 1000.0  # the process was killed; hours pass
    run = make_run(tmp_path, resume=True)
    run.start({})
    clock.now = 1005.0
    assert run.seconds == 12.0


def test_seconds_of_the_summary_count_all_epochs(falling):
    trained_for = torch.load(falling / "last.pt", weights_only=True)["seconds"]
    assert read(falling / "summary.json")["seconds"] >= trained_for


# ---- Writing ----


def write_half_then(error):
    def write(file):
        file.write(b"half of the n")
        file.flush()
        raise error

    return write


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), RuntimeError("disk")])
def test_failed_write_leaves_the_old_file_whole_and_is_a_sentence(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match=r"Cannot write .*last.pt .*--out"):
        training.write_atomically(path, write_half_then(error))
    assert path.read_bytes() == b"old"


@pytest.mark.parametrize("error", [KeyboardInterrupt(), ValueError("a mistake in the code")])
def test_interrupted_write_leaves_the_old_file_whole(tmp_path, error):
    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    with pytest.raises(type(error)):
        training.write_atomically(path, write_half_then(error))
    assert path.read_bytes() == b"old"
    training.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]


def test_write_into_a_missing_folder_is_a_sentence(tmp_path):
    with pytest.raises(UserError, match="Cannot write"):
        training.write_json(tmp_path / "missing" / "summary.json", {})


@pytest.mark.parametrize("blocked", ["runs", "runs/pmr", f"runs/pmr/digits/{NAME}"])
@pytest.mark.parametrize("flag", [None, "--resume", "--overwrite", "--eval-only"])
def test_plain_file_in_the_way_of_the_folder_is_a_sentence(tmp_path, blocked, flag):
    path = tmp_path / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match="holds no run" if flag == "--eval-only" else "--out"):
        train(tmp_path / "runs", *[flag] if flag else [])
    assert path.read_text() == "mine"


# ---- A loss that is no number ----


def spoil_epoch(monkeypatch, epoch, value):
    """The loss becomes `value` in the second of the three steps of `epoch`."""
    loss_of, steps = pmr.training_loss, iter(range(100))

    def spoiled(*args):
        loss, rho = loss_of(*args)
        return (loss * value if next(steps) == 3 * epoch + 1 else loss), rho

    monkeypatch.setattr(pmr, "training_loss", spoiled)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run_with_the_checkpoint_before(
    tmp_path, monkeypatch, trained, value
):
    spoil_epoch(monkeypatch, 1, value)
    with pytest.raises(UserError, match=r"in epoch 1; last.pt of epoch 0 is kept.*--lr"):
        train(tmp_path)
    folder = folder_of(tmp_path)
    assert load(folder / "last.pt")["epoch"] == 0 and not (folder / "summary.json").exists()
    monkeypatch.undo()
    train(tmp_path, "--resume")
    assert_same(load(folder / "last.pt"), load(folder_of(trained) / "last.pt"))


@pytest.mark.parametrize("method", ["pmr", "pmr-no-per", "joint", "unimodal-gray"])
def test_huge_learning_rate_ends_in_the_first_epoch_with_a_sentence(tmp_path, method):
    with pytest.raises(UserError, match=r"became (nan|inf) in epoch 0; nothing was saved yet"):
        train(tmp_path, "--method", method, "--lr", "1e30")
    assert {path.name for path in folder_of(tmp_path).iterdir()} == {"config.json"}


def test_checkpoint_kept_after_divergence_is_a_good_one(tmp_path, monkeypatch):
    """One step an epoch: the loss of epoch 0 is finite, but the step after it breaks the net."""
    evaluate, healthy = pmr.evaluate, []

    def watched(*args):
        metrics, predictions = evaluate(*args)
        healthy.append(np.isfinite(predictions["logits"]).all())
        return metrics, predictions

    monkeypatch.setattr(pmr, "evaluate", watched)
    with pytest.raises(UserError):
        train(tmp_path, "--lr", "1e30", "--batch-size", "60")
    kept = folder_of(tmp_path) / "last.pt"
    assert not kept.exists() or healthy[load(kept)["epoch"]]


def test_network_that_diverges_in_its_last_step_is_not_reported_as_finished(tmp_path):
    with pytest.raises(UserError):
        train(tmp_path, "--lr", "1e30", "--batch-size", "60", "--epochs", "1")
    assert not (folder_of(tmp_path) / "summary.json").exists()


# ---- Device and precision ----


def test_absent_device_is_a_sentence_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="finds no cuda device on this machine; use --device cpu"):
        train(tmp_path / "runs", "--device", "cuda")
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    "cuda, mps, chosen",
    [
        (False, False, "cpu"),
        (True, False, "cuda"),
        (False, True, "cpu"),  # mps has to be asked for
        (True, True, "cuda"),
    ],
)
def test_auto_is_cuda_where_there_is_one_else_the_cpu(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
    assert training.pick_device("auto") == torch.device(chosen)
    assert training.pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("precision, dtype", [("bf16", torch.bfloat16), ("fp32", torch.float32)])
def test_autocast_computes_in_the_precision_named(precision, dtype):
    with training.autocast(torch.device("cpu"), precision):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


# ---- Learning rate and optimizer ----


def rates(schedule, epochs, lr=1.0):
    return [training.scheduled_lr(schedule, lr, epoch, epochs) for epoch in range(epochs)]


def test_no_schedule_is_constant():
    assert rates("none", 4, 0.3) == [0.3] * 4


def test_step_is_a_tenth_in_the_last_three_of_ten_epochs():
    assert rates("step", 10) == pytest.approx([1.0] * 7 + [0.1] * 3)
    assert rates("step", 1) == [1.0]


def test_step_falls_at_seventy_percent_whatever_the_number_of_epochs():
    for epochs in range(1, 200):
        high = [rate == 1.0 for rate in rates("step", epochs)]
        assert high == [10 * epoch < 7 * epochs for epoch in range(epochs)]


def test_cosine_falls_from_lr_to_a_tenth():
    half = math.sqrt(0.5)  # cos(pi / 4)
    expected = [1, 0.1 + 0.45 * (1 + half), 0.55, 0.1 + 0.45 * (1 - half), 0.1]
    assert rates("cosine", 5) == pytest.approx(expected)
    assert rates("cosine", 1, 0.3) == pytest.approx([0.3])
    assert rates("cosine", 2, 0.3) == pytest.approx([0.3, 0.03])


def test_training_follows_the_schedule(tmp_path):
    train(tmp_path, "--schedule", "cosine", "--method", "unimodal-gray")
    (group,) = load(folder_of(tmp_path) / "last.pt")["state"]["optimizer"]["param_groups"]
    assert group["lr"] == pytest.approx(0.01)


def test_set_lr_reaches_every_group():
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": lr} for lr in (1.0, 2.0)]
    optimizer = torch.optim.SGD(groups)
    training.set_lr(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize(
    "name, kind, settings",
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.9, "dampening": 0, "nesterov": False}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}),
        ("adagrad", torch.optim.Adagrad, {"lr_decay": 0, "eps": 1e-10}),
    ],
)
def test_optimizer_settings(name, kind, settings):
    optimizer = training.build_optimizer(name, [nn.Parameter(torch.zeros(1))], 0.2, 0.03)
    assert type(optimizer) is kind
    expected = {"lr": 0.2, "weight_decay": 0.03, **settings}
    assert {key: optimizer.defaults[key] for key in expected} == expected


# ---- Seeds ----

KEYS = [(0, "train", 0), (0, "train", 1), (1, "train", 0), (0, "subset"), (0,), (0, "train", 10)]


def draws(generator):
    return torch.rand(4, generator=generator).tolist()


def test_equal_keys_draw_equally_and_different_keys_differently():
    first = [draws(seeding.make_generator(*key)) for key in KEYS]
    assert first == [draws(seeding.make_generator(*key)) for key in KEYS]
    assert len({tuple(values) for values in first}) == len(KEYS)


def test_seeds_fit_in_63_bits():
    seeds = [seeding.derive_seed(n, "x") for n in range(200)]
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)


def test_phase_sets_the_global_generator_whatever_was_drawn_before():
    def phase(epoch):
        generator = seeding.seed_phase(0, "train", epoch)
        return torch.rand(4).tolist(), draws(generator)

    first, other = phase(0), phase(1)
    torch.rand(17)
    assert phase(0) == first
    values = [tuple(v) for v in (*first, *other)]
    assert len(set(values)) == 4  # global and own generator differ too


# ---- Progress ----


def run_progress(monkeypatch, seconds_per_step, steps, first_epoch=0, epochs=10):
    """A run of `epochs` by a clock that each step moves on."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now, process_time=lambda: 0.0)
    monkeypatch.setattr(progress, "time", clock)

    def batches():
        for step in range(steps):
            clock.now += seconds_per_step
            yield step

    bar = progress.Progress("pmr-seed0", epochs, steps, first_epoch)
    for _ in range(first_epoch, epochs):
        assert list(bar(batches())) == list(range(steps))
    bar.close()


def test_long_run_says_once_how_long_it_takes(monkeypatch, capsys):
    run_progress(monkeypatch, seconds_per_step=3, steps=100)  # 1000 steps: 50 minutes
    captured = capsys.readouterr()
    assert captured.err.strip() == "pmr-seed0: about 50 min"
    assert captured.out == ""


def test_estimate_of_a_resumed_run_is_for_what_is_left(monkeypatch, capsys):
    run_progress(monkeypatch, seconds_per_step=3, steps=100, first_epoch=8)  # 10 minutes
    assert capsys.readouterr().err.strip() == "pmr-seed0: about 10 min"


@pytest.mark.parametrize("seconds_per_step, steps", [(0.05, 100), (100, 2)])
def test_short_run_prints_nothing_without_a_terminal(monkeypatch, capsys, seconds_per_step, steps):
    run_progress(monkeypatch, seconds_per_step, steps)
    assert capsys.readouterr() == ("", "")


def test_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress.Progress("pmr-seed0", 1, 5)
    list(bar(range(5)))
    bar.close()
    assert "pmr-seed0" in terminal.getvalue()


def test_training_writes_nothing_to_stderr_without_a_terminal(tmp_path, capsys):
    train(tmp_path, "--method", "unimodal-gray")
    assert capsys.readouterr().err == ""


# ---- The end of a command ----


@pytest.mark.parametrize("error", [UserError("No such thing; do that."), KeyboardInterrupt()])
def test_command_ends_with_a_sentence(error):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    sentence = {UserError: "No such thing; do that.", KeyboardInterrupt: "--resume"}
    assert sentence[type(error)] in stopped.value.code  # text as code: stderr and status 1


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


def assert_one_sentence(process, words):
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in errors and words in errors
    assert len(errors.strip().splitlines()) == 1


def test_process_ends_a_mistake_and_ctrl_c_with_a_sentence(tmp_path):
    """Side by side, since most of their time is importing torch."""
    missing = start("pmr.py", *TINY, "--out", str(tmp_path / "missing"), "--eval-only")
    interrupted = start(
        *("pmr.py", *TINY, "--out", str(tmp_path / "runs"), "--epochs", "2000"),
        # A shell's background jobs ignore Ctrl-C, and so would this one if pytest is in one.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_until(lambda: list(tmp_path.glob("runs/pmr/digits/*/last.pt")), interrupted)
    interrupted.send_signal(signal.SIGINT)
    assert_one_sentence(interrupted, "the same command with --resume (and without --overwrite)")
    assert_one_sentence(missing, "error: ")
    load(folder_of(tmp_path / "runs") / "last.pt")
    assert not (tmp_path / "missing").exists()
