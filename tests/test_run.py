"""common/run.py: the folder of a run, what it refuses, what it leaves, and exact resume.

A run that was killed and resumed equals the uninterrupted one, bit for bit. Most kills are an
exception, in process; one test sends SIGKILL to real processes.
"""

import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from functools import cache, partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn

import baselines
import mhm
import pmr
from common import command_line, evaluation, lock, run, seeding, storage
from common.datasets import TensorSplit
from common.errors import UserError

TINY = {"train_samples": 60, "batch_size": 20, "epochs": 3, "lr": 0.1, "device": "cpu"}
NAME = "joint-concat-train-samples=60-epochs=3-batch-size=20-lr=0.1-seed0"
CHECKPOINTS = ("last.pt", "best.pt")
FILES = {*CHECKPOINTS, "config.json", "metrics.jsonl", "summary.json", "predictions.npz"}
FILES |= {"curves.png"}


def train(out, script=pmr, method="joint", **settings):
    return script.main({**TINY, "out": str(out), "method": [method], **settings})


def folder_of(out):
    (folder,) = Path(out).glob("*/digits/*")
    return folder


def read(path):
    return json.loads(path.read_text())


def load(path):
    """A checkpoint without its times, the only thing that no two runs share."""
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["seconds"], checkpoint["cpu_seconds"], checkpoint["arguments"]
    return checkpoint


def without_seconds(summary):
    return {key: value for key, value in summary.items() if "seconds" not in key}


def same(a, b):
    """Equal bit for bit, all the way down: dicts, lists, numbers and tensors."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def assert_same_run(folder, reference):
    """Every file that two runs leave behind, but for the time that they took."""
    assert {path.name for path in folder.iterdir()} == FILES
    for name in CHECKPOINTS:
        assert same(load(folder / name), load(reference / name)), name
    for name in ("metrics.jsonl", "curves.png"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    found, expected = (without_seconds(read(x / "summary.json")) for x in (folder, reference))
    assert found == expected
    found, expected = (dict(np.load(x / "predictions.npz")) for x in (folder, reference))
    np.testing.assert_equal(found, expected)


def snapshot(folder):
    """Bytes and time of change of everything under `folder`."""
    return {
        path: (path.read_bytes() if path.is_file() else None, path.stat().st_mtime_ns)
        for path in folder.rglob("*")
    }


@pytest.fixture(scope="module", autouse=True)
def quick():
    """curves.png is JSON, drawn in no time; no encoder is probed; the data are loaded once."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "draw_curves", lambda title, *panels: panels)
        patch.setattr(run, "write_figure", storage.write_json)
        patch.setattr(evaluation, "linear_probe", lambda z, labels, n: lambda x: x[:, :n])
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
    """A run killed after its last epoch, before the test."""
    for name in ("summary.json", "predictions.npz", "curves.png"):
        (folder_of(finished) / name).unlink()
    return finished


def assert_refused(out, sentence, *flags):
    """`train` with each of the flags raises the sentence, and changes nothing."""
    before = snapshot(out)
    for flag in flags:
        with pytest.raises(UserError, match=sentence):
            train(out, **{flag: True} if flag else {})
    assert snapshot(out) == before


# ---- The folder's name ----


def test_name_holds_every_knob_that_is_not_default_and_ends_in_a_digest_where_it_is_long(trained):
    assert folder_of(trained) == trained / "pmr" / "digits" / NAME
    defaults = {"epochs": 20, "lr": 0.01, "train_samples": None}
    arguments = {"script": "pmr", "dataset": "digits", "method": "pmr", "fusion": "film", "seed": 3}

    def name(**changes):
        return run.run_name({**arguments, **defaults, **changes}, defaults)

    assert name() == "pmr-film-seed3"
    assert name(lr=0.5, train_samples=60) == "pmr-film-lr=0.5-train-samples=60-seed3"
    assert name(data="mine") == "pmr-film-data=mine-seed3"  # a knob that has no default
    assert name(fusion=None, method="m" * 150) == "m" * 150 + "-seed3"
    long, other = (name(fusion=None, method="m" * 150 + end) for end in "ab")
    assert len(long) == 150 + len("-seed3") and long[:142] == other[:142] == "m" * 141 + "-"
    assert long[142:150] != other[142:150] and long.endswith("-seed3")
    thai, odd = name(data="ก" * 99), name(data="../../a\\b\0 \udce9")  # as files may have them
    assert len(thai.encode()) <= 150 + len("-seed3") and "ก" in thai
    assert odd == "pmr-film-data=.._.._a_b___-seed3"


# ---- Runs that are there already ----


def test_finished_run_is_reported_and_unfinished_one_refused_without_resume(finished, request):
    before = snapshot(finished)
    for flag in ({}, {"resume": True}):
        assert train(finished, **flag) == read(folder_of(finished) / "summary.json")
    assert snapshot(finished) == before
    out = request.getfixturevalue("unfinished")
    assert_refused(out, "unfinished run.*--resume.*--overwrite", None, "eval_only")


@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_another_configuration_is_refused_by_the_names_of_its_knobs(request, kind):
    out = request.getfixturevalue(kind)
    path = folder_of(out) / "config.json"
    config = read(path)
    config["arguments"]["lr"] = 0.5
    del config["arguments"]["schedule"]
    path.write_text(json.dumps(config))
    sentence = r"configuration \(lr 0.5 there, 0.1 here; schedule None there, 'none' here\)"
    assert_refused(out, sentence, None, "resume", "eval_only")


@pytest.mark.parametrize("kind", ["finished", "unfinished"])
def test_overwrite_trains_anew_and_removes_only_the_runs_own_files(request, trained, kind):
    out = request.getfixturevalue(kind)
    folder = folder_of(out)
    (folder / "config.json").write_text('{"arguments": {"lr": 0.5}}')
    (folder / "last.pt").write_bytes(b"damaged")
    (folder / "best.pt.123.tmp").write_bytes(b"left by a kill")
    (folder / "notes.txt").write_text("mine")
    before = snapshot(out)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(pytest.fail.Exception):
        patch.setattr(pmr, "draw_subset", lambda *_: pytest.fail("before the first epoch"))
        train(out, overwrite=True)
    assert snapshot(out) == before
    train(out, overwrite=True)
    assert (folder / "notes.txt").read_text() == "mine"
    (folder / "notes.txt").unlink()
    assert_same_run(folder, folder_of(trained))


def test_a_folder_of_a_files_name_loses_nothing(finished):
    path = folder_of(finished) / "predictions.npz"
    path.unlink()
    path.mkdir()
    assert_refused(finished, r"predictions\.npz is a folder.*move it away", "overwrite")
    (folder_of(finished) / "summary.json").unlink()
    assert_refused(finished, r"predictions\.npz is a folder.*move it away", "overwrite", "resume")


def hold_and_wait(folder, pipe):
    """A process in the middle of a run, and one that reads files for it and outlives it."""
    lock.hold(folder)
    if reader := os.fork():
        pipe.send(reader)
    signal.pause()


def test_a_run_folder_is_one_processs_until_it_is_killed(unfinished, trained):
    fork, (mine, theirs) = multiprocessing.get_context("fork"), multiprocessing.Pipe()
    process = fork.Process(target=hold_and_wait, args=(folder_of(unfinished), theirs))
    process.start()
    reader = mine.recv()
    try:
        sentence = r"Another process is training in .*joint.*; let it end, or choose another --out"
        assert_refused(unfinished, sentence, "resume", "overwrite")
    finally:
        process.kill()
        process.join()
    try:
        train(unfinished, resume=True)
    finally:
        os.kill(reader, signal.SIGKILL)
    assert_same_run(folder_of(unfinished), folder_of(trained))
    assert folder_of(unfinished) not in lock.HELD


@pytest.mark.parametrize(
    ("kind", "resume"), [("tmp_path", False), ("tmp_path", True), ("unfinished", True)]
)
def test_what_another_process_ended_since_the_start_is_kept(request, trained, kind, resume):
    out, make_folder = request.getfixturevalue(kind), run.make_folder

    def late(folder):
        shutil.copytree(trained, out, dirs_exist_ok=True)
        make_folder(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run, "make_folder", late)
        with pytest.raises(UserError, match=r"Another process has trained in .* meanwhile; run"):
            train(out, resume=resume)
    for name in FILES:
        assert (folder_of(out) / name).read_bytes() == (folder_of(trained) / name).read_bytes()


def test_overwrite_cut_short_is_not_taken_for_a_run(finished, trained, monkeypatch):
    unlink, removed = Path.unlink, []

    def unlink_one(path, missing_ok=False):
        if removed:
            raise PermissionError("read-only")
        removed.append(path.name)
        unlink(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink_one)
        with pytest.raises(UserError, match=r"Cannot clear the folder .*read-only.*--out"):
            train(finished, overwrite=True)
    assert removed == ["config.json"]
    assert_refused(finished, r"no config.json that says of which.*--overwrite", None, "resume")
    train(finished, overwrite=True)
    assert_same_run(folder_of(finished), folder_of(trained))


@pytest.mark.parametrize("flag", ["resume", "overwrite"])
def test_equal_arguments_give_equal_files_and_a_fresh_folder_any_flag(tmp_path, trained, flag):
    torch.rand(5)  # whatever was drawn before
    train(tmp_path, **{flag: True})
    assert_same_run(folder_of(tmp_path), folder_of(trained))


@pytest.mark.parametrize("method", ["pmr", "joint", "unimodal-gray"])
def test_eval_only_computes_the_summary_anew_and_writes_nothing(tmp_path, monkeypatch, method):
    with pytest.raises(UserError, match="holds no run; train it first, without --eval-only"):
        train(tmp_path / "runs", method=method, eval_only=True)
    assert not (tmp_path / "runs").exists()
    right = train(tmp_path, method=method)
    path = folder_of(tmp_path) / "summary.json"
    path.write_text(json.dumps({**right, "test": {"accuracy": -1.0}}))
    before = snapshot(tmp_path)
    monkeypatch.setattr(pmr, "train", lambda *_: pytest.fail("it was trained"))
    found = train(tmp_path, method=method, eval_only=True)
    assert without_seconds(found) == without_seconds(right)
    assert snapshot(tmp_path) == before


# ---- Damaged files ----

DAMAGES = {
    "cut off": lambda whole: whole[: len(whole) // 2],
    "empty": lambda whole: b"",
    "garbage": lambda whole: b"\x00\xff garbage" * 100,
    "nested": lambda whole: b"[" * 10**5,
}
ANOTHER = "{} is missing, damaged or of another version .*--method joint --overwrite"


@pytest.mark.parametrize("damage", [*DAMAGES.values(), None], ids=[*DAMAGES, "missing"])
@pytest.mark.parametrize("name", CHECKPOINTS)
def test_damaged_checkpoint_is_a_sentence(finished, name, damage):
    path = folder_of(finished) / name
    path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
    assert_refused(finished, ANOTHER.format(name), "eval_only")
    (folder_of(finished) / "summary.json").unlink()
    if damage or name == "best.pt":  # without last.pt, the run starts from the beginning
        with pytest.raises(UserError, match=ANOTHER.format(name)):
            train(finished, resume=True)
        assert not (folder_of(finished) / "summary.json").exists()


@pytest.mark.parametrize(
    "key", ["epoch", "history", "best", "seconds", "cpu_seconds", "state", "model"]
)
def test_checkpoint_of_another_version_is_a_sentence(unfinished, key):
    path = folder_of(unfinished) / "last.pt"
    checkpoint = torch.load(path, weights_only=True)
    if key == "model":
        checkpoint["state"]["model"] = {"weight": torch.zeros(2)}
    checkpoint.pop(key, None)
    torch.save(checkpoint, path)
    assert_refused(unfinished, ANOTHER.format("last.pt"), "resume")


def flip(path):
    """One bit in the middle of a file, where a checkpoint has its numbers."""
    whole = bytearray(path.read_bytes())
    whole[len(whole) // 2] ^= 1
    path.write_bytes(whole)


def spoil(change):
    def write(path):
        checkpoint = torch.load(path, weights_only=True)
        change(checkpoint)
        torch.save(checkpoint, path)

    return write


CRAFTED = {
    "checksum of .* is wrong": flip,
    "lead to its epoch -5": spoil(lambda x: x.update(epoch=-5, history=[])),
    "lead to its epoch 99": spoil(lambda x: x.update(epoch=99)),
    "lead to its epoch 3": spoil(
        lambda x: x.update(epoch=3, history=[*x["history"], {"epoch": 3}])
    ),
    "lead to its epoch 2": spoil(lambda x: x["history"].pop(0)),
    "KeyError": spoil(lambda x: x["history"][1].pop("val")),
    "TypeError": spoil(lambda x: x["history"][1].update(more=torch.ones(1))),
    "its times": spoil(lambda x: x.update(seconds=math.nan)),
    "its best epoch": spoil(lambda x: x["best"].update(accuracy=-1.0)),
    "another configuration": spoil(lambda x: x["arguments"].update(seed=1)),
    "of another conf": spoil(lambda x: x["arguments"].update(method="pmr")),
    "holds NaN": spoil(lambda x: next(iter(x["state"]["model"].values())).fill_(math.nan)),
    "or infinite": spoil(lambda x: next(iter(x["state"]["model"].values())).fill_(math.inf)),
}


@pytest.mark.parametrize("reason", CRAFTED)
def test_checkpoint_that_this_run_cannot_have_saved_is_a_sentence(unfinished, reason):
    CRAFTED[reason](folder_of(unfinished) / "last.pt")
    assert_refused(unfinished, rf"last\.pt is .*{reason}.*--method joint --overwrite", "resume")


def test_checkpoints_are_those_that_summary_and_history_speak_of(tmp_path):
    there = make_run(tmp_path, epochs=3)
    for epoch in there.epochs({"model": nn.Linear(1, 1)}):
        end_epoch(there, (10, 30, 20)[epoch])
    last, best = (there.folder / name for name in CHECKPOINTS)
    whole = {path: path.read_bytes() for path in (last, best)}
    best.write_bytes(whole[last])
    with pytest.raises(UserError, match=r"best\.pt .*it is of epoch 2"):
        there.restore({}, "best.pt")
    again = make_run(tmp_path, epochs=3, resume=True)
    again.summary = {"epochs": 3, "best": {"epoch": 1}}
    last.write_bytes(whole[best])
    with pytest.raises(UserError, match=r"last\.pt .*it is of epoch 1"):
        again.restore({}, "last.pt")
    again.best = {"epoch": 0, "accuracy": 10}
    best.write_bytes(whole[best])
    with pytest.raises(UserError, match=r"best\.pt .*its best epoch is another one"):
        again.restore({}, "best.pt")


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "pmr", "seed": 1}, "method, seed"),
        ({"test": {"accuracy": math.nan}}, "test.accuracy"),
        ({"best": {}}, "best.test.accuracy"),
        ({"test": {"accuracy": 10**400}}, "test.accuracy"),
        ({"val": {"accuracy": 1.0, "gray": {"head": [1]}}}, "val"),
        ({"cpu_seconds": None, "parameters": "many"}, "cpu_seconds, parameters"),
    ],
)
def test_summary_of_another_run_or_version_is_a_sentence(finished, changes, named):
    path = folder_of(finished) / "summary.json"
    path.write_text(json.dumps(read(path) | changes))
    sentence = rf"summary\.json is of another run or version \(see {named}\);.*joint --overwrite"
    assert_refused(finished, sentence, None, "resume")


@pytest.mark.parametrize("name", ["summary.json", "config.json"])
def test_damaged_json_is_a_sentence(finished, name):
    path = folder_of(finished) / name
    whole = path.read_bytes()
    for text in [*(damage(whole) for damage in DAMAGES.values()), b"[]", b"null", b"{}"]:
        path.write_bytes(text)
        assert_refused(finished, f"{name} cannot be read.*--overwrite", None, "resume")


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_damaged_history_and_predictions_of_a_finished_run_are_a_sentence(finished, damage):
    settings = {**TINY, "out": str(finished), "method": ["joint"]}
    there = run.Run(next(command_line.Command(pmr.SCRIPT, settings).configs()))
    assert [entry["epoch"] for entry in there.read_history()] == [0, 1, 2]
    assert there.read_predictions("label").shape == (17,)
    assert there.number("test.accuracy") == there.summary["test"]["accuracy"]
    with pytest.raises(
        UserError, match=r"summary\.json is of another version \(see val_iid\.a\.u\)"
    ):
        there.number("val_iid.a.u")
    logits = partial(there.read_predictions, "logits")
    with pytest.raises(
        UserError, match=r"predictions\.npz cannot be read .*val_logits.*--method j"
    ):
        there.read_predictions("val_logits")
    with pytest.raises(UserError, match=r"metrics\.jsonl cannot be read \(gap is missing\)"):
        there.read_history("val.accuracy", "gap")
    whole = dict(np.load(there.folder / "predictions.npz"))
    for other in (whole["logits"][:3], whole["logits"].astype(">f4"), whole["label"]):
        np.savez(there.folder / "predictions.npz", **whole | {"logits": other})
        with pytest.raises(UserError, match=r"read \(logits is \S+ of shape .*, not \(17, 10\)\)"):
            logits()
    readers = {"metrics.jsonl": there.read_history, "predictions.npz": logits}
    for name, reader in readers.items():
        path = there.folder / name
        path.write_bytes(damage(path.read_bytes()))
        for _ in range(2):  # then there is no such file
            with pytest.raises(UserError, match=f"{name} cannot be read.*--overwrite"):
                reader()
            path.unlink(missing_ok=True)


# ---- What a run leaves behind ----


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
    assert {path.name for path in folder.iterdir()} == FILES == set(run.Run.FILES)
    last, best = (load(folder / name) for name in CHECKPOINTS)
    for checkpoint in (last, best):
        assert checkpoint.keys() == {"epoch", "history", "best", "state"}
        assert {"model", "prototypes", "optimizer"} == checkpoint["state"].keys()
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert history == last["history"] and [entry["epoch"] for entry in history] == [0, 1, 2]
    scores = [entry["val"]["accuracy"] for entry in history]
    first = scores.index(max(scores))
    assert best["epoch"] == first and best["history"] == history[: first + 1]
    summary = read(folder / "summary.json")
    named = {"script": "pmr", "dataset": "digits", "method": "joint", "fusion": "concat"}
    assert summary | {**named, "seed": 0, "epochs": 3} == summary
    assert summary["best"].keys() == {"epoch", "val", "test"}
    assert (summary["best"]["epoch"], summary["best"]["val"]) == (first, history[first]["val"])
    saved = np.load(folder / "predictions.npz")
    assert saved["logits"].shape == (17, 10) and saved["index"].tolist() == list(range(17))
    accuracy = 100 * (saved["logits"].argmax(1) == saved["label"]).mean()
    assert summary["test"]["accuracy"] == pytest.approx(accuracy)


# ---- Run by itself: the best epoch, curves, time ----


def make_run(out, epochs, **flags):
    arguments = {"script": "s", "dataset": "digits", "method": "m", "seed": 0, "epochs": epochs}
    config = {"arguments": {**arguments, "fusion": None}, "defaults": {"epochs": epochs}}
    config |= {"dataset": "digits", "out": out, "seed": 0, "epochs": epochs, "batch_size": 1}
    config |= {"resume": False, "overwrite": False, "eval_only": False}
    config |= {"sizes": {"train": 1}, "device": torch.device("cpu")}
    return run.Run(SimpleNamespace(**config | flags))


def end_epoch(there, accuracy, loss=1.0, val_loss=1.0):
    there.end_epoch({"train": {"loss": loss}, "val": {"loss": val_loss, "accuracy": accuracy}})


@pytest.mark.parametrize(
    ("accuracies", "first_best"), [((10, 30, 30, 20), 1), ((5, 5), 0), ((0, 1, 2), 2), ((0,), 0)]
)
def test_best_is_the_first_of_equal_epochs_and_the_summary_shows_the_last(
    tmp_path, accuracies, first_best
):
    """The network's weight is the number of the epoch."""
    there, model = make_run(tmp_path, len(accuracies)), nn.Linear(1, 1)
    for epoch in there.epochs({"model": model}):
        nn.init.constant_(model.weight, epoch)
        end_epoch(there, accuracies[epoch])
    last, best = (load(there.folder / name) for name in CHECKPOINTS)
    assert best["epoch"] == best["state"]["model"]["weight"].item() == first_best
    assert last["epoch"] == last["state"]["model"]["weight"].item() == len(accuracies) - 1
    assert last["best"] == {"epoch": first_best, "accuracy": accuracies[first_best]}
    summary = there.summarize({"of": "last"}, {"of": "best"})
    assert summary["test"] == {"of": "last"} and summary["best"]["test"] == {"of": "best"}
    assert summary["best"]["epoch"] == first_best
    assert summary["best"]["val"]["accuracy"] == accuracies[first_best]
    assert summary["val"]["accuracy"] == accuracies[-1]
    curves = {"accuracy": {"val": "val.accuracy", "train": "train.accuracy"}, "rho": {"": "rho"}}
    assert there.panels(curves) == {"accuracy": {"val": list(accuracies)}}


def test_a_resumed_run_has_the_epochs_that_are_left_and_the_seconds_add_up(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    clock.process_time = lambda: clock.now / 2
    monkeypatch.setattr(run, "time", clock)
    there = make_run(tmp_path, epochs=3)
    assert not there.folder.exists()  # nothing is written before the first epoch
    epochs = there.epochs({"model": nn.Linear(1, 1)})
    assert next(epochs) == 0 and there.folder.exists()
    for losses in ((math.nan, 1.0), (1.0, math.inf)):
        with pytest.raises(UserError, match=r"became (nan|inf) in epoch 0; nothing was saved yet"):
            end_epoch(there, 1, *losses)
    clock.now = 7.0
    end_epoch(there, 1)
    clock.now = 1000.0  # the process was killed; hours pass
    there = make_run(tmp_path, epochs=3, resume=True)
    epochs = there.epochs({"model": nn.Linear(1, 1)})
    assert next(epochs) == 1
    clock.now = 1005.0
    assert there.seconds == 12.0
    end_epoch(there, 1)
    last = torch.load(there.folder / "last.pt", weights_only=True)
    assert (last["seconds"], last["cpu_seconds"]) == (12.0, 6.0)
    assert list(epochs) == [2]
    assert there.restore({}, "last.pt") == 1
    summary = there.summarize({}, {})
    assert (summary["seconds"], summary["cpu_seconds"]) == (12.0, 6.0)


def test_going_on_with_another_number_of_threads_is_said(unfinished, capsys):
    path = folder_of(unfinished) / "config.json"
    train(shutil.copytree(unfinished, unfinished.parent / "same"), resume=True)
    assert capsys.readouterr().err == ""
    path.write_text(json.dumps(read(path) | {"threads": 7}))
    train(unfinished, resume=True)
    said = (
        r"seed0 goes on where other things hold \(threads 7 then, 1 now\): it may not end bit for"
    )
    assert re.search(said, capsys.readouterr().err)


# ---- Writing ----


def test_json_is_strict_and_what_is_no_number_is_null(tmp_path):
    there = make_run(tmp_path, epochs=1)
    for _ in there.epochs({}):
        there.end_epoch({"train": {"loss": 1.0, "x": math.nan}, "val": {"loss": 1, "accuracy": 2}})
    there.finish({"x": [math.inf, (1.5, np.float64("nan"))], "y": {"z": -math.inf}}, {})
    lines = [(there.folder / name).read_text() for name in ("metrics.jsonl", "summary.json")]
    history, summary = (json.loads(line, parse_constant=pytest.fail) for line in lines)
    assert history["train"] == {"loss": 1.0, "x": None}
    assert summary == there.summary == {"x": [None, [1.5, None]], "y": {"z": None}}
    (there.folder / "summary.json").write_text('{"x": NaN, "y": 1e999}')  # by another program
    assert storage.read_json(there.folder / "summary.json") == {"x": None, "y": None}
    storage.write_text(there.folder / "config.json", "half a character: \ud800")
    assert (there.folder / "config.json").read_text() == "half a character: ?"


def test_errors_of_the_toy_study_under_words_of_another_kind_are_a_sentence(tmp_path):
    path, names = tmp_path / "errors.json", ("set", "seed")
    for word in (["A"], {}, None):
        record = {"arguments": {"heads": 4}, "runs": [{"set": word, "seed": 0, "test": 1.0}]}
        storage.write_json(path, record)
        with pytest.raises(UserError, match=r"errors\.json is of another version .*--overwrite"):
            storage.read_runs(path, {"heads": 4}, names, ["test"])


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (OSError(28, "No space left on device"), UserError),
        (RuntimeError("torch.save says it so"), UserError),
        (KeyboardInterrupt("Cannot write last.pt; Make room or --out"), KeyboardInterrupt),
    ],
)
def test_failed_write_leaves_the_old_file_whole(tmp_path, error, raised):
    def write_half(file):
        file.write(b"half of the n")
        file.flush()
        raise error

    path = tmp_path / "last.pt"
    path.write_bytes(b"old")
    with pytest.raises(raised, match=r"Cannot write .*last.pt.*Make room or .*--out"):
        storage.write_atomically(path, write_half)
    assert path.read_bytes() == b"old"
    if raised is UserError:  # half a file must not keep a full disk full
        assert list(tmp_path.iterdir()) == [path]
    storage.write_atomically(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new" and list(tmp_path.iterdir()) == [path]
    with pytest.raises(UserError, match=r"Cannot write .*Was the folder removed\?"):
        storage.write_json(tmp_path / "missing" / "summary.json", {})


@pytest.mark.parametrize("blocked", ["runs", "runs/pmr", f"runs/pmr/digits/{NAME}"])
def test_plain_file_in_the_way_of_the_folder_is_a_sentence(tmp_path, blocked):
    path = tmp_path / blocked
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    assert_refused(tmp_path / "runs", r"Cannot \w+ the folder .*--out", None, "resume", "overwrite")
    assert_refused(tmp_path / "runs", "holds no run", "eval_only")
    assert path.read_text() == "mine"


# ---- A loss that is no number ----


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_loss_that_is_not_finite_ends_the_run_with_the_checkpoint_before(
    tmp_path, monkeypatch, trained, value
):
    rebalance, steps = pmr.rebalance, itertools.count()

    def spoiled(loss, *args):  # in the second of the three steps of epoch 1
        return rebalance(loss * value if next(steps) == 4 else loss, *args)

    sentence = r"in epoch 1; last.pt of epoch 0 is kept\. Try a lower --lr, or a lower weight of "
    with monkeypatch.context() as patch, pytest.raises(UserError, match=sentence):
        patch.setattr(pmr, "rebalance", spoiled)
        train(tmp_path)
    folder = folder_of(tmp_path)
    assert load(folder / "last.pt")["epoch"] == 0 and not (folder / "summary.json").exists()
    train(tmp_path, resume=True)
    assert_same_run(folder, folder_of(trained))


@pytest.mark.parametrize("batch_size", [20, 60])  # 60: the loss of the only step is finite
@pytest.mark.parametrize("method", ["pmr", "joint", "unimodal-gray"])
def test_huge_learning_rate_ends_in_the_first_epoch_with_a_sentence(tmp_path, method, batch_size):
    with pytest.raises(UserError, match=r"became (nan|inf) in epoch 0; nothing was saved yet"):
        train(tmp_path, method=method, lr=1e30, batch_size=batch_size, epochs=1)
    assert {path.name for path in folder_of(tmp_path).iterdir()} == {"config.json"}


# ---- Seeds ----


def test_equal_keys_draw_equally_and_different_keys_differently():
    def phase(*key):  # what the global generator draws, and the phase's own
        generator = seeding.seed_phase(*key)
        return *torch.rand(4).tolist(), *torch.rand(4, generator=generator).tolist()

    keys = [
        (0, "train", 0),
        (0, "train", 1),
        (1, "train", 0),
        (0, "subset"),
        (0,),
        (0, "train", 10),
    ]
    first = [phase(*key) for key in keys]
    assert first == [phase(*key) for key in keys]  # whatever was drawn before
    assert len({x for values in first for x in values}) == 8 * len(keys)
    seeds = {seeding.derive_seed(n, "x") for n in range(200)}
    assert len(seeds) == 200 and all(0 <= seed < 2**63 for seed in seeds)


def test_batches_are_drawn_by_seed_phase_epoch_and_part(tmp_path):
    split = TensorSplit({"m": torch.arange(99)}, torch.arange(99), lambda rows: rows)
    keys = [(0, "train", 0), (1, "train", 0), (0, "blend", 0), (0, "train", 1), (0, "train", 0, 1)]

    def order(seed, *key):
        there = make_run(tmp_path, epochs=2, seed=seed, schedule="none", lr=1.0)
        return tuple(index.item() for _, _, index in there.shuffled(split, *key))

    assert len({order(*key) for key in keys + keys}) == len(keys)


# ---- Exact resume ----

METHODS = {  # their states differ: prototypes, weights of losses, several optimizers
    "pmr": (pmr, {}),
    "unimodal-gray": (pmr, {"optimizer": "adam", "schedule": "cosine"}),
    "g-blending": (baselines, {"blend": "online", "super_epoch": 2}),
    "mhm": (mhm, {"heads": 3, "batch_size": 10}),  # four steps in an H-phase, two in an E-phase
    "head-ensemble": (mhm, {"heads": 3, "batch_size": 10, "optimizer": "adam"}),
    "ensemble": (mhm, {"heads": 3}),  # two steps for each member
}


class Killed(BaseException):
    """No handler of the code under test may catch this."""


def interrupt(moment, *args, **settings):
    """`train`; whether it died at a moment of this sitting, from 0.

    The moments are each training step, each file half written, and each file in its place.
    """
    batches, write_whole, moments = run.Run.batches, storage.write_atomically, itertools.count()

    def live_or_die():
        if next(moments) == moment:
            raise Killed

    def batches_and_die(*args, **options):
        for batch in batches(*args, **options):
            live_or_die()
            yield batch

    def write_and_die(path, write):
        def write_half(file):
            whole = io.BytesIO()
            write(whole)
            half = len(whole.getvalue()) // 2
            file.write(whole.getvalue()[:half])
            live_or_die()
            file.write(whole.getvalue()[half:])

        write_whole(path, write_half)
        live_or_die()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run.Run, "batches", batches_and_die)
        for module in (storage, run):
            patch.setattr(module, "write_atomically", write_and_die)
        try:
            train(*args, **settings)
        except Killed:
            return True
    return False


@pytest.mark.slow
def test_run_killed_at_any_moment_and_resumed_is_the_same(tmp_path):
    settings = {"method": "pmr", "epochs": 2, "batch_size": 30}
    train(tmp_path / "whole", **settings)
    for moment in itertools.count():
        killed = interrupt(moment, tmp_path / "killed", **settings)
        for checkpoint in tmp_path.glob("killed/*/*/*/*.pt"):
            load(checkpoint)  # whole
        train(tmp_path / "killed", **settings, resume=True)
        assert_same_run(folder_of(tmp_path / "killed"), folder_of(tmp_path / "whole"))
        shutil.rmtree(tmp_path / "killed")
        if not killed:
            break
    assert moment >= 22  # 4 steps, and twice: config, 2 x (last, metrics), best, 3 at the end


@pytest.mark.parametrize("method", METHODS)
def test_run_killed_again_and_again_is_the_same(tmp_path, method):
    script, settings = METHODS[method]
    train(tmp_path / "whole", script, method, **settings)
    args, draw, kills = (tmp_path / "killed", script, method), random.Random(method), 0
    while interrupt(draw.randrange(8, 24), *args, **settings, resume=True):
        kills += 1
        assert kills < 20, "it does not get on"
    assert kills >= 1
    assert_same_run(folder_of(tmp_path / "killed"), folder_of(tmp_path / "whole"))


@pytest.mark.slow
def test_process_killed_at_random_moments_and_resumed_is_the_same(tmp_path):
    """SIGKILL three times, each within a third of the time that the training takes."""
    settings, draw = {"method": "pmr", "epochs": 30, "lr": 0.02}, random.Random(0)
    train(tmp_path / "whole", **settings)
    whole, killed = folder_of(tmp_path / "whole"), tmp_path / "killed"
    seconds = torch.load(whole / "last.pt", weights_only=True)["seconds"]
    settings["resume"] = True
    for _ in range(3):
        fork = multiprocessing.get_context("fork")
        process = fork.Process(target=train, args=(killed,), kwargs=settings)
        process.start()
        time.sleep(draw.uniform(0.1, 1) * seconds / 3)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
    assert 0 < load(folder_of(killed) / "last.pt")["epoch"] < 29
    train(killed, **settings)
    assert_same_run(folder_of(killed), whole)
