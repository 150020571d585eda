"""Exact resume: a run that was killed and resumed equals the uninterrupted one, bit for bit.

Quick tests raise an exception at chosen places of a run in process; slow ones send SIGKILL to real
processes at random moments.
"""

import errno
import io
import json
import random
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from test_training import (
    QuickFigure,
    assert_same,
    load,
    read,
    start,
    wait_until,
    without_seconds,
)

import mhm
import pmr
from common import training
from common.errors import UserError

SCRIPTS = {
    **dict.fromkeys(["pmr", "pmr-no-per", "joint", "unimodal-gray", "g-blending"], pmr),
    **dict.fromkeys(["mhm", "head-ensemble", "ensemble"], mhm),
}
METHODS = list(SCRIPTS)
KNOBS = {  # four steps in an H-phase and two in an E-phase; the ensemble: two for each member
    "mhm": ["--heads=3", "--batch-size=10"],
    "head-ensemble": ["--heads=3", "--batch-size=10"],
    "ensemble": ["--heads=3"],
    "g-blending": ["--blend=online", "--super-epoch=2"],
}
EPOCHS, STEPS = 3, {pmr: 3, mhm: 6}  # steps an epoch
TINY = ["--train-samples=60", "--batch-size=20", f"--epochs={EPOCHS}", "--lr=0.1", "--device=cpu"]


def train(out, method, *flags):
    words = [*TINY, *KNOBS.get(method, []), "--out", str(out), "--method", method, *flags]
    return SCRIPTS[method].main(words)


def folder_of(out):
    (folder,) = out.glob("*/digits/*")
    return folder


def assert_same_run(folder, reference):
    """Every file that two runs leave behind, but for the time that they took."""
    assert {path.name for path in folder.iterdir()} == set(training.Run.FILES)
    for name in ("last.pt", "best.pt"):
        assert_same(load(folder / name), load(reference / name), name)
    for name in ("metrics.jsonl", "curves.png"):
        assert (folder / name).read_bytes() == (reference / name).read_bytes(), name
    assert without_seconds(read(folder / "summary.json")) == without_seconds(
        read(reference / "summary.json")
    )
    found, expected = (np.load(path / "predictions.npz") for path in (folder, reference))
    assert set(found) == set(expected)
    for key in expected:
        np.testing.assert_array_equal(found[key], expected[key], key)


# ---- In process: an exception in place of the kill ----


class Killed(BaseException):
    """No handler of the code under test may catch this."""


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """method -> folder of its uninterrupted run."""
    folders = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_curves", QuickFigure)
        for method in METHODS:
            out = tmp_path_factory.mktemp(method)
            train(out, method)
            folders[method] = folder_of(out)
    return folders


def kill_at_step(patch, step):
    """Die in training step `step` of this sitting, from 0."""
    steps = iter(range(1000))

    def or_death(loss_of):
        def loss_or_death(*args):
            if next(steps) == step:
                raise Killed
            return loss_of(*args)

        return loss_or_death

    patch.setattr(pmr, "training_loss", or_death(pmr.training_loss))
    patch.setattr(mhm.Classification, "loss", staticmethod(or_death(mhm.Classification.loss)))


def kill_at_write(patch, name, saved, share):
    """Die when file `name` is written after `saved` epochs were saved in this sitting.

    share: how much of the file is written, beside its place; 1: it is renamed too.
    """
    write_whole = training.write_atomically
    epochs_saved = 0

    def write_or_die(path, write):
        nonlocal epochs_saved
        chosen = path.name == name and epochs_saved == saved
        if chosen and share < 1:
            write_whole(path, part_of(write, share))
        write_whole(path, write)
        if chosen:
            raise Killed
        epochs_saved += path.name == "last.pt"

    patch.setattr(training, "write_atomically", write_or_die)


def part_of(write, share):
    """A writer that dies after `share` of the bytes of `write`."""

    def write_part(file):
        whole = io.BytesIO()
        write(whole)
        file.write(whole.getvalue()[: int(share * len(whole.getvalue()))])
        raise Killed

    return write_part


def interrupt(out, method, kill, *how):
    """A run that dies where `kill(patch, *how)` says."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "draw_curves", QuickFigure)
        kill(patch, *how)
        with pytest.raises(Killed):
            train(out, method, "--resume")


@pytest.fixture
def finish_run(monkeypatch):
    """Function that lets a run go on to its end and returns its folder."""
    monkeypatch.setattr(training, "draw_curves", QuickFigure)

    def to_the_end(out, method, *flags):
        train(out, method, *flags)
        return folder_of(out)

    return to_the_end


PLACES = {
    "config.json half written": (kill_at_write, "config.json", 0, 0.5),
    "before the first step": (kill_at_step, 0),
    "in the middle of an epoch": (kill_at_step, STEPS[pmr] + 1),
    "best.pt half written": (kill_at_write, "best.pt", "best", 0.5),
    "between best.pt and last.pt": (kill_at_write, "best.pt", "best", 1),
    "last.pt half written": (kill_at_write, "last.pt", 1, 0.5),
    "first last.pt half written": (kill_at_write, "last.pt", 0, 0.5),
    "between the last last.pt and metrics.jsonl": (kill_at_write, "last.pt", EPOCHS - 1, 1),
    "metrics.jsonl half written": (kill_at_write, "metrics.jsonl", 2, 0.5),
    "after the last epoch": (kill_at_write, "metrics.jsonl", EPOCHS, 1),
    "between predictions.npz and curves.png": (kill_at_write, "predictions.npz", EPOCHS, 1),
    "summary.json half written": (kill_at_write, "summary.json", EPOCHS, 0.5),
    "in the middle of an H-phase": (kill_at_step, STEPS[mhm] + 1),
    "between the phases": (kill_at_step, STEPS[mhm] + 4),
    "in the middle of an E-phase": (kill_at_step, STEPS[mhm] + 5),
}
PHASES = ["in the middle of an H-phase", "between the phases", "in the middle of an E-phase"]


def places_of(method):
    if SCRIPTS[method] is pmr:
        return [place for place in PLACES if place not in PHASES]
    return list(PLACES) if method == "mhm" else PHASES


@pytest.mark.parametrize(
    ("place", "method"), [(place, method) for method in METHODS for place in places_of(method)]
)
def test_run_killed_once_and_resumed_is_the_same(tmp_path, references, finish_run, place, method):
    reference = references[method]
    kill, *how = PLACES[place]
    interrupt(tmp_path, method, kill, *(best_epoch(reference) if x == "best" else x for x in how))
    assert not list(tmp_path.glob("*/digits/*/summary.json"))
    for checkpoint in tmp_path.glob("*/digits/*/*.pt"):
        load(checkpoint)  # whole
    assert_same_run(finish_run(tmp_path, method, "--resume"), reference)


def best_epoch(folder):
    return load(folder / "best.pt")["epoch"]


@pytest.mark.parametrize("method", METHODS)
def test_run_killed_in_every_epoch_is_the_same(tmp_path, references, finish_run, method):
    steps = STEPS[SCRIPTS[method]]
    interrupt(tmp_path, method, kill_at_step, steps - 1)
    for _ in range(EPOCHS - 1):
        interrupt(tmp_path, method, kill_at_step, steps + 1)  # each sitting completes one epoch
    assert load(folder_of(tmp_path) / "last.pt")["epoch"] == EPOCHS - 2
    assert_same_run(finish_run(tmp_path, method, "--resume"), references[method])


def test_full_disk_ends_with_a_sentence_and_the_run_goes_on_when_there_is_room(
    tmp_path, references, finish_run, monkeypatch
):
    save, room = torch.save, [True, True, True, False]

    def save_while_there_is_room(checkpoint, file):
        if not room.pop(0):
            file.write(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        save(checkpoint, file)

    monkeypatch.setattr(torch, "save", save_while_there_is_room)
    with pytest.raises(UserError, match=r"No space left on device.*Make room"):
        train(tmp_path, "pmr")
    monkeypatch.setattr(torch, "save", save)
    assert_same_run(finish_run(tmp_path, "pmr", "--resume"), references["pmr"])


@pytest.mark.parametrize("flags", [[], ["--resume"]])
@pytest.mark.parametrize("removed", [1, 4])
def test_overwrite_killed_while_it_clears_does_not_bring_back_the_old_network(
    tmp_path, references, finish_run, removed, flags
):
    """The next command may refuse the rest of the old run, but not take it for the new one."""
    reference = references["pmr"]
    folder = shutil.copytree(reference, tmp_path / "pmr" / "digits" / reference.name)
    spoil_network(folder)
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill_after_removing(patch, removed)
        train(tmp_path, "pmr", "--overwrite")
    try:
        finish_run(tmp_path, "pmr", *flags)
    except UserError:
        return
    assert_same_run(folder, reference)


def spoil_network(folder):
    """What an older version of the code might have trained: a network of zeros."""
    for name in ("last.pt", "best.pt"):
        checkpoint = torch.load(folder / name, weights_only=True)
        for tensor in checkpoint["state"]["model"].values():
            tensor.zero_()
        torch.save(checkpoint, folder / name)


def kill_after_removing(patch, count):
    """Die as soon as `count` files are removed."""
    unlink, removals = training.Path.unlink, iter(range(1, 1000))

    def unlink_and_die(path, missing_ok=False):
        unlink(path, missing_ok)
        if next(removals) == count:
            raise Killed

    patch.setattr(training.Path, "unlink", unlink_and_die)


# ---- Real processes and SIGKILL ----

FLAGS = {
    "pmr": ["--fusion=film"],
    "pmr-no-per": ["--schedule=cosine"],
    "joint": ["--optimizer=adam"],
    "unimodal-gray": [],
    "g-blending": ["--epochs=15"],
    "mhm": ["--epochs=15", "--optimizer=adam"],
    "head-ensemble": ["--epochs=15", "--schedule=cosine"],
    "ensemble": ["--epochs=15"],
}
KILLS = 3


def words_of(method, out):
    flags = ["--epochs=40", "--lr=0.02", *FLAGS[method], *KNOBS.get(method, []), "--method", method]
    return [*TINY, *flags, "--out", str(out / method)]


def finish(process):
    _, errors = process.communicate(timeout=170)
    assert process.returncode == 0, errors


def kill(process):
    """SIGKILL; False if the process had already come to its end."""
    process.send_signal(signal.SIGKILL)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (0, -signal.SIGKILL), errors
    return process.returncode != 0


def files(out):
    """Path -> time of change, or None while a file is just being renamed."""
    try:
        return {path: path.stat().st_mtime_ns for path in out.glob("*/digits/*/*")}
    except FileNotFoundError:
        return None


UNINTERRUPTED = """
import importlib, json, sys
for script, words in json.loads(sys.argv[1]):
    importlib.import_module(script).main(words)
"""


def train_uninterrupted(out):
    """All methods in one process, since importing torch takes longer than training here."""
    calls = [(script.__name__, words_of(method, out)) for method, script in SCRIPTS.items()]
    finish(start("-c", UNINTERRUPTED, json.dumps(calls)))
    return {method: folder_of(out / method) for method in METHODS}


def kill_at_random_moments(out, method, uninterrupted):
    """Start, kill and resume, until killed KILLS times; then let the run finish."""
    reference = uninterrupted.result()[method]
    longest = torch.load(reference / "last.pt", weights_only=True)["seconds"] / KILLS
    moments = random.Random(f"kills of {method}")
    command = [f"{SCRIPTS[method].__name__}.py", *words_of(method, out), "--resume"]
    while count_kills(command, out / method, moments, longest) < KILLS:
        shutil.rmtree(out / method)  # faster than the reference: it was over before the last kill
        longest /= 3
    finish(start(*command))
    return folder_of(out / method)


def count_kills(command, out, moments, longest):
    """Kill KILLS sittings, or fewer if one finishes before.

    Each gets up to `longest` seconds from the first file that it changes: a fresh run writes
    config.json and a resumed one metrics.jsonl as soon as torch is imported.
    """
    for count in range(KILLS):
        before = files(out)
        process = start(*command)
        wait_until(lambda before=before: files(out) != before, process)
        time.sleep(moments.uniform(0, longest))
        if not kill(process):
            return count
    return KILLS


SLOW_SAVING = """
import io, sys, time, torch
save = torch.save
def save_in_two_halves(checkpoint, file):
    buffer = io.BytesIO()
    save(checkpoint, buffer)
    whole = buffer.getvalue()
    file.write(whole[: len(whole) // 2])
    file.flush()
    time.sleep(1)
    file.write(whole[len(whole) // 2 :])
torch.save = save_in_two_halves
import pmr
pmr.main(sys.argv[1:])
"""


def kill_while_saving(out):
    """Kill at half of the first best.pt, then at half of a last.pt that replaces a whole one."""
    words = words_of("pmr", out)
    for half, whole in (("best.pt.tmp", set()), ("last.pt.tmp", {"last.pt", "best.pt"})):
        process = start("-c", SLOW_SAVING, *words, "--resume")
        awaited = {half, *whole}
        wait_until(
            lambda awaited=awaited: awaited <= {path.name for path in files(out / "pmr") or ()},
            process,
        )
        assert kill(process)
        folder = folder_of(out / "pmr")
        assert (folder / half).exists()
        for name in whole:
            load(folder / name)
    finish(start("pmr.py", *words, "--resume"))
    return folder


@pytest.fixture(scope="module")
def processes(tmp_path_factory):
    """Name -> future of the run's folder, two processes at a time."""
    out = tmp_path_factory.mktemp("processes")
    with ThreadPoolExecutor(2) as pool:
        uninterrupted = pool.submit(train_uninterrupted, out / "uninterrupted")
        saving = pool.submit(kill_while_saving, out / "saving")
        random_moments = {
            method: pool.submit(kill_at_random_moments, out / "random", method, uninterrupted)
            for method in METHODS
        }
        yield {"uninterrupted": uninterrupted, "saving": saving, **random_moments}


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_process_killed_at_random_moments_and_resumed_leaves_the_same(processes, method):
    assert_same_run(processes[method].result(), processes["uninterrupted"].result()[method])


@pytest.mark.slow
def test_process_killed_while_it_saves_and_resumed_leaves_the_same(processes):
    assert_same_run(processes["saving"].result(), processes["uninterrupted"].result()["pmr"])
