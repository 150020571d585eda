"""Exact resume of umt_ume.py, whose commands train several networks in turn: killed inside one or
between two, a command goes on where it stood. What becomes of a single run: test_run.py."""

import random

import numpy as np
import pytest
from test_run import interrupt, load, quick, read, same, train, without_seconds  # noqa: F401

import umt_ume as umt

RUNS = ["unimodal-first", "unimodal-second", "ume", "linear", "joint", "umt"]  # of `auto`, in order


@pytest.fixture(autouse=True)
def chosen(monkeypatch):
    """`auto` chooses UMT, which is then its last run."""
    monkeypatch.setattr(umt, "choose", lambda *_: "umt")


@pytest.fixture(scope="module")
def references(quick, tmp_path_factory):  # noqa: F811
    """method -> --out of its uninterrupted command."""
    outs = {method: tmp_path_factory.mktemp(method) for method in ("auto", "umt", "ume")}
    for method, out in outs.items():
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(umt, "choose", lambda *_: "umt")
            train(out, umt, method)
    return outs


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
            assert same(load(mine), load(path)), name
        elif name.suffix == ".npz":
            np.testing.assert_equal(*(dict(np.load(x)) for x in (mine, path)))
        elif name.name == "summary.json":
            assert without_seconds(read(mine)) == without_seconds(read(path))
        elif name.name != "config.json":
            assert mine.read_bytes() == path.read_bytes(), name


def finished(out):
    """Methods whose run has its summary, in the order of `RUNS`."""
    names = {path.parent.name.split("-train")[0] for path in out.glob("*/*/*/summary.json")}
    return [m for m in RUNS if m in names or f"{m}-concat" in names]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["auto", "umt", "ume"])
@pytest.mark.parametrize("start", range(2))
def test_killed_again_and_again_is_the_same(tmp_path, references, method, start):
    """In steps and files of the networks that nobody named, of what needs them, and between them:
    see `interrupt`. A run begins only when all before it have their summary."""
    ordered = finished(references[method])
    draw, kills = random.Random(start), 0
    while interrupt(draw.randrange(9, 20), tmp_path, umt, method, resume=True):
        done, kills = finished(tmp_path), kills + 1
        assert done == ordered[: len(done)]
    assert kills >= 4
    assert_same_runs(tmp_path, references[method])
