"""Exact resume of umt_ume.py: killed inside a phase or between two, it goes on where it stood.

A command trains several networks in turn: the teachers and the student, or all that `auto` needs.
"""

import numpy as np
import pytest
import torch
from test_greedy_resume import QuickFigure
from test_resume import Killed, best_epoch, kill_at_write
from test_training import assert_same, load, read, without_seconds

import umt_ume as umt
from common import rebalance, training

EPOCHS, STEPS = 3, 3  # steps an epoch; g-blending has as many in each of its three trainings
TINY = ["--train-samples=60", "--batch-size=20", f"--epochs={EPOCHS}", "--lr=0.1", "--device=cpu"]
KNOBS = {"g-blending": ["--blend=online", "--super-epoch=2"]}
METHODS = ["umt", "ume", "linear", "auto", "aux-ce", "g-blending", "ogm-ge", "modality-dropout"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(umt, "macro_f1", lambda *_: 0.0)
        patch.setattr(training, "draw_curves", QuickFigure)
        yield


def train(out, method, *flags):
    return umt.main([*TINY, *KNOBS.get(method, []), "--out", str(out), "--method", method, *flags])


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """method -> --out of its uninterrupted command, and what it returned."""
    outs = {method: tmp_path_factory.mktemp(method) for method in METHODS}
    return {method: (out, train(out, method)) for method, out in outs.items()}


def assert_same_runs(out, reference):
    """Every file of every run under two --out folders, but for the time that they took."""
    found, expected = (
        {path.relative_to(x): path for path in x.rglob("*") if path.is_file()}
        for x in (out, reference)
    )
    assert found.keys() == expected.keys()
    for name, path in expected.items():
        mine = found[name]
        if name.suffix == ".pt":
            assert_same(load(mine), load(path), str(name))
        elif name.suffix == ".npz":
            first, second = np.load(mine), np.load(path)
            assert set(first) == set(second)
            for key in second:
                np.testing.assert_array_equal(first[key], second[key], f"{name} {key}")
        elif name.name == "summary.json":
            assert without_seconds(read(mine)) == without_seconds(read(path))
        else:
            assert mine.read_bytes() == path.read_bytes(), name


def runs_in(out, part="*"):
    return sorted(path.parent.name.split("-train")[0] for path in out.glob(f"*/*/*/{part}"))


def kill_at_step(patch, step):
    """Die in training step `step` of this sitting, from 0, those of G-Blending's trials too."""
    steps, step_of = iter(range(1000)), torch.optim.SGD.step

    def step_or_death(*args, **kwargs):
        if next(steps) == step:
            raise Killed
        return step_of(*args, **kwargs)

    patch.setattr(torch.optim.SGD, "step", step_or_death)


def kill_at_run(patch, number, name, share):
    """Die at file `name` of run `number` of this sitting, from 0; share: see `kill_at_write`."""
    runs, write = [], training.write_atomically

    def write_or_die(path, content):
        if path.parent not in runs and path.name != "config.json":
            runs.append(path.parent)
        if len(runs) == number + 1 and path.name == name and path.parent == runs[number]:
            if share < 1:
                raise Killed
            write(path, content)
            raise Killed
        write(path, content)

    patch.setattr(training, "write_atomically", write_or_die)


def interrupt(out, method, kill, *how):
    """A command that dies where `kill(patch, *how)` says."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill(patch, *how)
        train(out, method, "--resume")


# ---- UMT: teachers, then the student ----

A_RUN = EPOCHS * STEPS
PLACES = {
    "before the first teacher": (kill_at_step, 0),
    "in the first teacher": (kill_at_step, STEPS + 1),
    "after the first teacher's last epoch": (kill_at_run, 0, "predictions.npz", 0),
    "before the first teacher's summary": (kill_at_run, 0, "summary.json", 0),
    "between the teachers": (kill_at_run, 0, "summary.json", 1),
    "in the second teacher": (kill_at_step, A_RUN + STEPS + 1),
    "between the teachers and the student": (kill_at_run, 1, "summary.json", 1),
    "before the student's first step": (kill_at_step, 2 * A_RUN),
    "in the student's first epoch": (kill_at_step, 2 * A_RUN + 1),
    "in the student's last epoch": (kill_at_step, 3 * A_RUN - 1),
    "after the student's first epoch": (kill_at_run, 2, "last.pt", 1),
    "between the student's best.pt and last.pt": (kill_at_run, 2, "best.pt", 1),
    "before the student's summary": (kill_at_run, 2, "summary.json", 0),
}


@pytest.mark.parametrize("place", list(PLACES))
def test_umt_killed_once_and_resumed_is_the_same(tmp_path, references, place):
    reference, result = references["umt"]
    kill, *how = PLACES[place]
    interrupt(tmp_path, "umt", kill, *how)
    assert without_seconds(train(tmp_path, "umt", "--resume")) == without_seconds(result)
    assert_same_runs(tmp_path, reference)


def test_the_places_are_where_their_names_say(tmp_path):
    interrupt(tmp_path, "umt", *PLACES["between the teachers and the student"])
    assert runs_in(tmp_path, "summary.json") == ["unimodal-first", "unimodal-second"]
    assert "umt-concat" not in runs_in(tmp_path, "config.json")
    interrupt(tmp_path, "umt", kill_at_step, STEPS + 1)  # the teachers are not trained again
    assert "umt-concat" in runs_in(tmp_path, "last.pt")
    assert "umt-concat" not in runs_in(tmp_path, "summary.json")


def test_umt_killed_in_every_epoch_of_every_phase_is_the_same(tmp_path, references):
    interrupt(tmp_path, "umt", kill_at_step, STEPS - 1)
    for _ in range(3 * EPOCHS - 1):
        interrupt(tmp_path, "umt", kill_at_step, STEPS + 1)  # each sitting completes one epoch
    assert len(runs_in(tmp_path, "summary.json")) == 2
    train(tmp_path, "umt", "--resume")
    assert_same_runs(tmp_path, references["umt"][0])


# ---- What is assembled from the networks trained alone ----


@pytest.mark.parametrize("method", ["ume", "linear"])
@pytest.mark.parametrize(
    ("kill", "how"),
    [
        (kill_at_step, (A_RUN + 1,)),
        (kill_at_run, (1, "summary.json", 1)),
        (kill_at_run, (2, "predictions.npz", 1)),
        (kill_at_run, (2, "summary.json", 0)),
    ],
    ids=["in a network", "between networks and ensemble", "half way", "before its summary"],
)
def test_an_ensemble_killed_and_resumed_is_the_same(tmp_path, references, method, kill, how):
    interrupt(tmp_path, method, kill, *how)
    train(tmp_path, method, "--resume")
    assert_same_runs(tmp_path, references[method][0])


@pytest.mark.parametrize("run", range(5))
def test_auto_killed_after_any_of_its_runs_is_the_same(tmp_path, references, run):
    reference, result = references["auto"]
    assert len(runs_in(reference, "summary.json")) >= 5
    interrupt(tmp_path, "auto", kill_at_run, run, "summary.json", 1)
    assert len(runs_in(tmp_path, "summary.json")) == run + 1
    again = train(tmp_path, "auto", "--resume")
    assert again["decision"] == result["decision"]
    assert_same_runs(tmp_path, reference)


# ---- Rivals ----


@pytest.mark.parametrize("method", list(rebalance.RIVALS))
@pytest.mark.parametrize(
    ("kill", "how"),
    [
        (kill_at_step, (STEPS + 1,)),
        (kill_at_write, ("last.pt", 1, 1)),
        (kill_at_write, ("best.pt", "best", 1)),
        (kill_at_write, ("summary.json", EPOCHS, 0.5)),
    ],
    ids=["in an epoch", "between epochs", "between best.pt and last.pt", "in summary.json"],
)
def test_a_rival_killed_and_resumed_is_the_same(tmp_path, references, method, kill, how):
    reference, _ = references[method]
    (folder,) = reference.glob("*/*/*")
    interrupt(tmp_path, method, kill, *(best_epoch(folder) if x == "best" else x for x in how))
    train(tmp_path, method, "--resume")
    assert_same_runs(tmp_path, reference)


@pytest.mark.parametrize("step", range(0, 3 * 2 * STEPS + 2 * STEPS + 3 * STEPS + 1, 2))
def test_g_blending_killed_in_its_estimates_is_the_same(tmp_path, references, step):
    """Two epochs for each of three losses, two of training, one for each loss, one of training."""
    interrupt(tmp_path, "g-blending", kill_at_step, step)
    train(tmp_path, "g-blending", "--resume")
    assert_same_runs(tmp_path, references["g-blending"][0])
