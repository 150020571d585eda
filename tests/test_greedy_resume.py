"""Exact resume of greedy_balance.py: what it keeps beside the network goes on where it stood."""

import random
import shutil

import pytest
from test_run import assert_same_run, interrupt, load, quick, train  # noqa: F401

import greedy_balance as greedy

TINY = {"dataset": "synthetic", "train_samples": 60, "batch_size": 20, "epochs": 4}
KNOBS = {  # guided: C for a re-balancing step, the epochs are RRR RCC CRC CCR
    "guided": {"tolerance": 0.0, "window": 3},
    "random": {"gate_mean": "before", "optimizer": "adam"},
    "rubi": {},  # trains joint first, to find its biased modality
}


def assert_same_runs(out, reference):
    """In all the folders of runs."""
    found, expected = (sorted(x.glob("greedy_balance/synthetic/*")) for x in (out, reference))
    assert [folder.name for folder in found] == [folder.name for folder in expected]
    for folder, whole in zip(found, expected, strict=True):
        assert_same_run(folder, whole)


@pytest.mark.slow
def test_guided_killed_in_every_epoch_goes_on_in_its_window(tmp_path):
    """In a step, while a file is written, and between files."""
    settings, whole, out = TINY | KNOBS["guided"], tmp_path / "whole", tmp_path / "killed"
    train(whole, greedy, "guided", **settings)
    (last,) = whole.glob("*/*/*/last.pt")
    curated = [entry["steps"]["curated"] for entry in load(last)["history"]]
    pattern = ["".join("RC"[bool(m)] for m in steps) for steps in curated]
    assert pattern == ["RRR", "RCC", "CRC", "CCR"]
    for moment in range(1, 40, 3):
        assert interrupt(moment, out, greedy, "guided", **settings)
        for checkpoint in map(load, out.glob("*/*/*/last.pt")):
            left = (0, 1, 2, 3)[checkpoint["epoch"]]  # of a window, after each epoch
            assert checkpoint["state"]["policy"]["left"] == left
        train(out, greedy, "guided", **settings, resume=True)
        assert_same_runs(out, whole)
        shutil.rmtree(out)


@pytest.mark.slow
@pytest.mark.parametrize("method", KNOBS)
def test_killed_again_and_again_is_the_same(tmp_path, method):
    settings, whole, out = TINY | KNOBS[method], tmp_path / "whole", tmp_path / "killed"
    train(whole, greedy, method, **settings)
    draw, kills = random.Random(method), 0
    while interrupt(draw.randrange(7, 13), out, greedy, method, **settings, resume=True):
        kills += 1
    assert kills >= 3
    assert_same_runs(out, whole)
