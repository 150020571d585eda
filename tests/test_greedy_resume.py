"""Exact resume of greedy_balance.py: what it keeps beside the network goes on where it stood."""

import json

import pytest
from test_resume import Killed, assert_same_run, best_epoch, kill_at_write
from test_training import load

import greedy_balance as greedy
from common import training

EPOCHS, STEPS = 4, 3  # steps an epoch
TINY = ["--train-samples=60", "--batch-size=20", f"--epochs={EPOCHS}", "--lr=0.1", "--device=cpu"]
KNOBS = {  # guided: C for a re-balancing step, the epochs are RRR RCC CRC CCR
    "guided": ["--tolerance=0", "--window=3"],
    "random": ["--gate-mean=before", "--optimizer=adam"],
    "rubi": ["--biased=color"],
    "joint": [],
}
METHODS = ["guided", "random", "rubi"]


class QuickFigure:
    """In place of a drawing, which takes longer than the training here: curves.png is JSON."""

    def __init__(self, *arguments):
        self.arguments = arguments

    def savefig(self, file, **_):
        file.write(json.dumps(self.arguments).encode())


@pytest.fixture(scope="module", autouse=True)
def quick():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "macro_f1", lambda *_: 0.0)
        patch.setattr(training, "draw_curves", QuickFigure)
        yield


def train(out, method, *flags):
    return greedy.main([*TINY, *KNOBS[method], "--out", str(out), "--method", method, *flags])


def folder_of(out, method):
    (folder,) = out.glob(f"greedy_balance/digits/{method}-*")
    return folder


def curated_steps(folder):
    """The curated modality of every step, epoch by epoch, as far as last.pt has come."""
    return [entry["steps"]["curated"] for entry in load(folder / "last.pt")["history"]]


@pytest.fixture(scope="module")
def references(tmp_path_factory):
    """method -> folder of its uninterrupted run."""
    out = tmp_path_factory.mktemp("references")
    for method in METHODS:
        train(out, method)
    return {method: folder_of(out, method) for method in METHODS}


def kill_at_step(patch, step):
    """Die in training step `step` of this sitting, from 0."""
    loss_of, steps = greedy.training_loss, iter(range(1000))

    def loss_or_death(*args):
        if next(steps) == step:
            raise Killed
        return loss_of(*args)

    patch.setattr(greedy, "training_loss", loss_or_death)


def interrupt(out, method, kill, *how):
    """A run that dies where `kill(patch, *how)` says."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        kill(patch, *how)
        train(out, method, "--resume")


def test_the_references_have_windows_that_span_epochs(references):
    guided = curated_steps(references["guided"])
    pattern = ["".join("R" if m is None else "C" for m in steps) for steps in guided]
    assert pattern == ["RRR", "RCC", "CRC", "CCR"]
    drawn = curated_steps(references["random"])
    assert drawn[0] == [None] * STEPS
    assert {m for steps in drawn[1:] for m in steps} == {None, "gray", "color"}
    assert "rubi" in load(references["rubi"] / "last.pt")["state"]


PLACES = {
    "in the warm-up": (kill_at_step, 1),
    "in a window": (kill_at_step, STEPS + 2),
    "in a window that an epoch cuts": (kill_at_step, 2 * STEPS),
    "after a window": (kill_at_step, 2 * STEPS + 1),
    "in the last window": (kill_at_step, 3 * STEPS + 1),
    "best.pt half written": (kill_at_write, "best.pt", "best", 0.5),
    "between best.pt and last.pt": (kill_at_write, "best.pt", "best", 1),
    "last.pt half written in a window": (kill_at_write, "last.pt", 1, 0.5),
    "between epochs, two steps of a window left": (kill_at_write, "last.pt", 2, 1),
    "between epochs, one step of a window left": (kill_at_write, "last.pt", 1, 1),
    "after the last epoch": (kill_at_write, "metrics.jsonl", EPOCHS, 1),
}


SOME = list(PLACES)[1::3]


@pytest.mark.parametrize(
    ("method", "place"),
    [(method, place) for method in METHODS for place in (PLACES if method == "guided" else SOME)],
)
def test_run_killed_once_and_resumed_is_the_same(tmp_path, references, method, place):
    reference = references[method]
    kill, *how = PLACES[place]
    interrupt(tmp_path, method, kill, *(best_epoch(reference) if x == "best" else x for x in how))
    train(tmp_path, method, "--resume")
    assert_same_run(folder_of(tmp_path, method), reference)


@pytest.mark.parametrize(("epochs", "left"), [(2, 1), (3, 2)])
def test_last_pt_says_how_much_of_a_window_is_left(tmp_path, references, epochs, left):
    interrupt(tmp_path, "guided", kill_at_write, "last.pt", epochs - 1, 1)
    folder = folder_of(tmp_path, "guided")
    curated = curated_steps(folder)
    assert len(curated) == epochs
    state = load(folder / "last.pt")["state"]["policy"]
    assert state == {"chosen": curated[-1][-1], "left": left}
    assert curated_steps(references["guided"])[epochs][:left] == [state["chosen"]] * left


@pytest.mark.parametrize("method", METHODS)
def test_run_killed_in_every_epoch_is_the_same(tmp_path, references, method):
    interrupt(tmp_path, method, kill_at_step, STEPS - 1)
    for _ in range(EPOCHS - 1):
        interrupt(tmp_path, method, kill_at_step, STEPS + 1)  # each sitting completes one epoch
    assert load(folder_of(tmp_path, method) / "last.pt")["epoch"] == EPOCHS - 2
    train(tmp_path, method, "--resume")
    assert_same_run(folder_of(tmp_path, method), references[method])


@pytest.mark.parametrize("steps", [4, EPOCHS * STEPS + 4], ids=["under joint", "under rubi"])
def test_rubi_that_finds_its_biased_modality_itself_goes_on_too(tmp_path, monkeypatch, steps):
    """The joint run that it asks is killed, or it is killed itself after that one is done."""
    monkeypatch.setitem(KNOBS, "rubi", [])
    out, reference = tmp_path / "killed", tmp_path / "reference"
    train(reference, "rubi")
    interrupt(out, "rubi", kill_at_step, steps)
    assert (folder_of(out, "joint") / "summary.json").exists() == (steps > EPOCHS * STEPS)
    train(out, "rubi", "--resume")
    for method in ("joint", "rubi"):
        assert_same_run(folder_of(out, method), folder_of(reference, method))
