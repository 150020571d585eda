"""pmr.py from its command line: every option, what it writes, and what it says to bad input."""

import functools
import json
import math
import re
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import EVERY_DATASET, ROOT
from fake_clips import FROM_FILES
from test_pmr_equations import slow_loss, slow_terms

import pmr
from common import command_line
from common import run as run_room
from common.command_line import Command
from common.datasets import DATASETS, TensorSplit
from common.errors import UserError
from common.metrics import accuracy
from common.networks.multimodal import build_model
from common.run import Run
from common.seeding import make_generator, seed_phase
from experiments import pmr as experiments_pmr
from experiments.grid import read_rows

MODALITIES = {
    "digits": ("gray", "color"),
    "cg-mnist": ("gray", "color"),
    "av-digits": ("audio", "visual"),
    "synthetic": ("first", "second"),
    "features": ("left", "right"),
}
TINY = ["--train-samples", "40", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Loading and curves are tested elsewhere; here they would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "load_dataset", functools.cache(command_line.load_dataset))
        no_figure = SimpleNamespace(savefig=lambda file, **_: None)
        patch.setattr(run_room, "draw_curves", lambda *_: no_figure)
        yield


@pytest.fixture
def flags(tmp_path, data_root):
    """A tiny part of the data, and runs in a temporary folder; later flags win."""
    return [*TINY, "--out", str(tmp_path), "--data-root", str(data_root)]


@pytest.fixture
def run(flags):
    return lambda *argv: pmr.main([*flags, *argv])


def folder_of(tmp_path, summary):
    """The folder of the run that ended last with `summary`'s method."""
    folders = tmp_path.glob(f"*/*/{summary['method']}-*")
    return max(folders, key=lambda folder: (folder / "summary.json").stat().st_mtime_ns)


def history_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def tensors(folder, name="last.pt"):
    """Every tensor of a checkpoint by a dotted name."""
    found = {}

    def walk(prefix, value):
        if isinstance(value, torch.Tensor):
            found[prefix] = value
        elif isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix}.{key}", inner)

    walk("", torch.load(folder / name, weights_only=True)["state"])
    return found


def equal(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in found
    )


def prepare(*argv):
    """Fresh network, splits and configuration of the first run of a command line."""
    command = Command(pmr.SCRIPT, [*TINY, "--method", "pmr", *argv])
    config = next(command.configs())
    return build_model(config, command.splits), command.splits, config


# ---- Every method, fusion, dataset, optimizer, and every other choice ----


@pytest.mark.parametrize("fusion", pmr.FUSIONS)
@pytest.mark.parametrize("dataset", EVERY_DATASET)
def test_every_method_fusion_dataset_and_optimizer(run, require, root_of, fusion, dataset):
    """Each pair of fusion, dataset and optimizer comes up."""
    require(dataset)
    methods = [m for m in pmr.METHODS if m != "unimodal"]
    if fusion == "concat":
        methods += [f"unimodal-{m}" for m in MODALITIES[dataset]]
    place = list(pmr.FUSIONS).index(fusion) + list(MODALITIES).index(dataset)
    argv = ["--dataset", dataset, "--data-root", root_of(dataset), "--fusion", fusion]
    argv += ["--optimizer", ("sgd", "adam", "adagrad")[place % 3]]
    result = run(*argv, "--method", *methods)
    assert [summary["method"] for summary in result["runs"]] == methods
    for summary in result["runs"]:
        test = summary["test"]
        if summary["method"].startswith("unimodal-"):
            alone = test[summary["method"].removeprefix("unimodal-")]
            assert alone.keys() == {"alone", "probe"} and alone["alone"] == test["accuracy"]
            assert "rho" not in summary
            continue
        assert summary["rho"] > 0
        reads = {"prototype", "probe"} | ({"head"} if fusion in ("sum", "concat") else set())
        assert all(test[m].keys() == reads for m in MODALITIES[dataset])


def test_every_dataset_is_tested_here_or_in_test_clips():
    assert {*MODALITIES, *FROM_FILES} == set(DATASETS) == set(pmr.RECIPES)


CHOICE = ["--epochs", "4", "--batch-size", "20", "--method", "pmr"]


@pytest.fixture(scope="module")
def default_network(tmp_path_factory):
    """The weights that the default knobs of PMR give."""
    out = tmp_path_factory.mktemp("default")
    return tensors(folder_of(out, pmr.main([*TINY, "--out", str(out), *CHOICE])))


@pytest.mark.parametrize(
    ("choice", "changes"),
    [
        ("--coefficients binary", True),
        ("--coefficients clip", False),
        ("--schedule none", False),
        ("--schedule step", True),
        ("--schedule cosine", True),
        ("--precision bf16", True),
        ("--precision fp32", False),
        ("--device auto", False),
        ("--alpha 2", True),
        ("--mu 1", True),
        ("--momentum-epsilon 1", True),
        ("--subset-fraction 1", True),
        ("--per-epochs 0", True),
        ("--color-variance 0", True),
        ("--batch-size 1000", True),
        ("--weight-decay 0", True),
        ("--momentum 0", True),
        ("--lr 0.02", True),
        ("--data-seed 5", True),
        ("--seeds 5", True),
    ],
)
def test_every_other_choice_acts(run, tmp_path, default_network, choice, changes):
    if choice == "--device auto" and torch.cuda.is_available():
        pytest.skip("auto is CUDA here, which is equal up to rounding only")
    found = tensors(folder_of(tmp_path, run(*CHOICE, *choice.split())))
    assert equal(found, default_network) != changes


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_there_or_a_sentence(run, device):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if available[device]:
        assert run("--method", "pmr", "--device", device)["test"]["accuracy"] >= 0
    else:
        with pytest.raises(UserError, match=f"finds no {device} device"):
            run("--method", "pmr", "--device", device)


# ---- What the algorithm promises over a whole run ----


@pytest.mark.parametrize(
    ("limit", "settings"), [("joint", "--alpha 0 --mu 0"), ("pmr-no-per", "--mu 0")]
)
def test_what_pmr_is_without_its_terms_bit_for_bit(run, tmp_path, limit, settings):
    argv = ["--train-samples", "100", "--epochs", "2", "--mu", "1"]
    runs = [run(*argv, "--method", limit), run(*argv, "--method", "pmr", *settings.split())]
    other = run(*argv, "--method", "pmr")
    first, second, third = (tensors(folder_of(tmp_path, r)) for r in (runs[0], runs[1], other))
    with_terms = folder_of(tmp_path, other)
    assert "mu=1" in with_terms.name and "alpha" not in with_terms.name
    assert len(first) > 50
    assert runs[0]["test"] == runs[1]["test"] and runs[0]["rho"] == runs[1]["rho"]
    assert equal(first, tensors(FOLDERS(tmp_path, limit)))
