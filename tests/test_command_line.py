"""From flags to configurations, in all scripts; device, optimizer, progress, end of a command."""

import io
import math
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from types import SimpleNamespace

import prepare
import pytest
import torch
import torch.nn as nn
from conftest import ROOT, UNLISTED

import baselines
import greedy_balance
import mhm
import pmr
import toy_projection
import umt_ume
from common import command_line, device, optimizer, parser, progress
from common.command_line import Command, Script, run_command
from common.datasets import DATASETS
from common.errors import UserError
from common.naming import run_name
from common.tables import describe
from common.terminal import INTERRUPTED

SCRIPTS = (pmr, greedy_balance, umt_ume, mhm, baselines)
NAMES = [script.__name__ for script in SCRIPTS]
CPU = torch.device("cpu")


@pytest.fixture
def no_data(monkeypatch):
    """Every dataset loads nothing: two modalities and sizes, which is all a command asks for."""
    made_up = {"modalities": ("first", "second"), "num_classes": 4, "sizes": {"train": 50}}
    splits = SimpleNamespace(**made_up, train=range(50), data="fake-data")
    splits.calls = []

    def load(*args, **dials):
        splits.calls.append((*args, dials))
        return splits

    monkeypatch.setattr(command_line, "load_dataset", load)
    return splits


# ---- --help ----


@pytest.mark.parametrize(
    ("script", "dataset"),
    [(script, dataset) for script in SCRIPTS for dataset in DATASETS]
    + [(toy_projection, "moons"), (toy_projection, "swiss-roll")],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_help_has_at_most_35_flags_in_groups_and_the_dials_of_its_dataset(capsys, script, dataset):
    with pytest.raises(SystemExit) as stopped:
        script.main(["--dataset", dataset, "--help"])
    page = capsys.readouterr().out
    flags = re.findall(r"^  (?:-h, )?--([\w-]+)", page, re.MULTILINE)
    assert stopped.value.code == 0 and len(flags) == len(set(flags)) <= 35
    assert script.__doc__.splitlines()[0] in page
    if script is toy_projection:
        return
    groups = ["data:", "method:", "training; defaults", "run:", f"{script.__name__}.py:"]
    dials = DATASETS[dataset].dials
    groups += [f"dials of {dataset}:"] if dials else []
    places = [page.index(f"\n{group}") for group in groups]
    assert places == sorted(places)
    every = {name.replace("_", "-") for x in DATASETS.values() for name in x.dials}
    listed = {name.replace("_", "-") for name, dial in dials.items() if dial.listed}
    own = {"color-variance"} if script is greedy_balance else set()
    assert set(flags) & every - own == listed - own


# ---- Recipes and configurations ----


@pytest.mark.parametrize("dataset", list(DATASETS))
@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_recipes_fill_in_what_nobody_named(no_data, script, dataset):
    """The dataset's recipe, or that of features; a flag wins, and the defaults stand in no name."""
    assert script.RECIPES.keys() | UNLISTED == DATASETS.keys()
    command = Command(script.SCRIPT, ["--dataset", dataset, "--epochs", "11"])
    for name, default in script.RECIPES.get(dataset, script.RECIPES["features"]).items():
        found, expected = getattr(command.args, name), default
        if callable(default):
            expected = default(command.args)
        assert found == (11 if name == "epochs" else expected), name
    for method in [*script.METHODS.keys() - {"unimodal"}, "unimodal-second"]:
        config = command.config(method, 3)
        unset = {knob for knob, value in config.arguments.items() if value is None}
        unset -= DATASETS[dataset].dials.keys()
        assert unset <= {"train_samples", "fusion", "biased", "duplicate"}
        assert {"momentum", "lr", "dataset", *DATASETS[dataset].dials} <= config.arguments.keys()
        assert ("fusion" in unset) == (config.fusion is None)
        assert config.modalities == (("second",) if "unimodal" in method else ("first", "second"))
        assert (config.seed, config.num_classes, config.sizes) == (3, 4, {"train": 50})


def test_a_dial_reaches_the_loader_and_a_default_may_depend_on_other_flags(no_data):
    words = "--dataset synthetic --pair-only 0.5 --data-seed 4 --data-root here --train-samples 9"
    words = f"{words} --num-workers 3 --device cpu --epochs 12".split()
    command = Command(pmr.SCRIPT, words)
    ((*shared, dials),) = no_data.calls
    assert shared == ["synthetic", "here", 4, 9, CPU, 3]
    assert dials.keys() == DATASETS["synthetic"].dials.keys() and dials["pair_only"] == 0.5
    assert command.args.per_epochs == 3  # the first fifth, rounded up
    assert Command(pmr.SCRIPT, []).args.per_epochs == 4  # of the recipe's 20
    assert Command(pmr.SCRIPT, [*words, "--per-epochs", "7"]).args.per_epochs == 7


def add_own_flags(add):
    add("--knob", type=float, default=1.0)


OWN = Script(
    *("own", "What it does.", {"a": ("knob",), "b": (), "c": (), "unimodal": ()}, ("b", "a")),
    *(("concat", "sum"), {"features": {"lr": 0.5, "momentum": 0.9, "epochs": 2}}, add_own_flags),
    needs={"a": ("unimodal",), "c": lambda args: ("b",) if args.knob > 1 else ()},
)


def test_words_and_a_dict_of_settings_give_the_same(no_data):
    words = "--dataset av-digits --lr 0.25 --method a b a --seeds 1 0 1 --knob 3 --overwrite"
    settings = {"dataset": "av-digits", "lr": 0.25, "method": ["a", "b", "a"], "seeds": [1, 0, 1]}
    settings |= {"knob": 3.0, "overwrite": True}
    assert parser.given_flags(OWN, words.split()) == settings
    first, second = Command(OWN, words.split()), Command(OWN, settings)
    assert vars(first.args) == vars(second.args)
    assert first.args.seeds == [1, 0] and first.methods == ["a", "b"]  # twice is still once
    with pytest.raises(UserError, match=r"^own.py has no --alpha, --size-of-b\.$"):
        Command(OWN, {"alpha": 1, "size_of_b": 2})
    for wrong in ({"lr": math.nan}, {"seeds": []}, {"fusion": "no"}, settings | {"resume": True}):
        with pytest.raises(SystemExit):
            Command(OWN, wrong)


def test_arguments_are_what_decides_the_result(no_data):
    """Of the script's own flags those of the method; nothing of where and how it is run."""
    shared = ["script", "seed", "dataset", "data_seed", "train_samples", "color_variance"]
    shared += ["method", "fusion", "epochs", "batch_size", "optimizer", "lr", "momentum"]
    shared += ["weight_decay", "schedule", "precision"]
    command = Command(OWN, [])
    assert list(command.config("a", 0).arguments) == [*shared, "knob"]
    assert list(command.config("unimodal-first", 0).arguments) == shared
    features = Command(OWN, ["--dataset", "features"]).config("b", 0).arguments
    assert features["data"] == "fake-data" and "color_variance" not in features
    clips = Command(OWN, ["--dataset", "ave", "--pretrained"]).config("b", 0).arguments
    assert clips["pretrained"] is True and clips["lr"] == 0.5  # the recipe of features, here


def test_a_protocol_is_the_flags_that_it_sets(no_data):
    """The same run as by those flags; its name shows what differs from the recipe."""
    words = ["--dataset", "crema-d", "--method", "joint", "--num-frames", "2"]
    preset = Command(pmr.SCRIPT, [*words, "--protocol", "pmr"])
    by_hand = Command(pmr.SCRIPT, [*words, "--epochs", "130", "--schedule", "step-70"])
    config, other = preset.config("joint", 0), by_hand.config("joint", 0)
    assert config.arguments == other.arguments
    assert config.arguments["spectrogram"] == "pmr-3s" and config.arguments["num_frames"] == 2
    name = "joint-concat-data=fake-data-num-frames=2-epochs=130-schedule=step-70-seed0"
    assert run_name(config.arguments, config.defaults) == name


def test_methods_by_default_and_the_runs_that_they_start_from(no_data):
    def order(*words):
        return [(x.method, x.seed) for x in Command(OWN, words).configs()]

    alone = [("unimodal-first", 0), ("unimodal-second", 0)]
    assert order() == [*alone, ("b", 0), ("a", 0)]  # a comparison
    assert order("--dataset", "ave") == [*alone, ("a", 0)]  # on large data the paper's
    assert order("--method", "a", "unimodal-second") == [*alone, ("a", 0)]
    assert order("--method", "a", "--eval-only") == [("a", 0)]
    assert order("--method", "c") == [("c", 0)]
    both = [("b", 0), ("c", 0), ("b", 1), ("c", 1)]
    assert order("--method", "c", "--knob", "2", "--seeds", "0", "1") == both
    needed, named, last = Command(OWN, ["--method", "a", "unimodal-first", "--overwrite"]).configs()
    assert (needed.method, needed.overwrite, needed.resume) == ("unimodal-second", False, True)
    assert (named.method, named.overwrite, named.resume) == ("unimodal-first", True, False)
    assert last.overwrite and not any(x.overwrite for x in last.needs)  # read, not replaced


def test_report_prints_a_row_for_each_method_named(no_data, capsys):
    command = Command(OWN, ["--method", "b", "--dataset", "features", "--out", "there"])
    runs = [{"method": "b", "fusion": "sum", "test": {"x": value}} for value in (1.0, 3.0)]
    runs = [{**run, "seed": seed} for seed, run in enumerate(runs)]
    needed = {"method": "unimodal-first", "fusion": None, "test": {"x": 9.0}}
    result = command.report([needed, *runs], {"test x": "test.x", "other": "y"}, {"test x": 2})
    assert result["runs"] == runs and len(result["table"]) == 1
    assert result["table"][0]["test x"]["mean"] == 2 and result["table"][0]["other"] is None
    page = capsys.readouterr().out
    assert "features, MADE-UP DATA: the numbers mean nothing, test split, percent" in page
    assert re.search(r"^b +sum +2\.00 ± 1\.41 +-$", page, re.MULTILINE)
    assert page.endswith("\n\nRuns: there/own/features\n")  # and no picture, as there is none
    assert command.report([needed, runs[0]], {"test x": "test.x"}) == runs[0]


def test_what_a_table_says_in_words():
    def runs(**accuracies):
        found = {m.replace("_", "-"): values for m, values in accuracies.items()}
        return [{"method": m, "test": {"accuracy": x}} for m, xs in found.items() for x in xs]

    methods = ("own", "joint", "other", "unimodal")
    alone = {"unimodal_gray": [90.0, 92.0], "unimodal_color": [30.0]}
    assert list(describe(runs(**alone, joint=[40.0, 41.0], other=[42.0], own=[50.0]), methods)) == [
        "Joint training is 50.5 points worse than gray alone, which it sees as well.",
        "own is 9.5 points better than joint training.",
    ]
    (only,) = describe(runs(joint=[40.0], other=[39.0]), methods)
    assert only == "other is 1.0 points worse than joint training."
    assert not list(describe(runs(**alone, own=[40.0]), methods))


@pytest.mark.parametrize(
    ("words", "threads"),
    [("", 1), ("--threads 2", 2), ("--dataset cg-mnist", 1), ("--dataset ave --threads 1", 1)],
)
def test_small_networks_get_one_thread_unless_told(no_data, monkeypatch, words, threads):
    given = []
    monkeypatch.setattr(torch, "set_num_threads", given.append)
    Command(OWN, words.split())
    assert given == [threads]
    Command(OWN, ["--dataset", "ave"])  # torch's own number
    assert given == [threads]


# ---- Refusals ----


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (f"--data-seed {'9' * 700}", "--data-seed: must be a whole number at least 0 and at most"),
        ("--threads 1000000", "--threads: must be a whole number at least 1 and at most 1024"),
        ("--dataset cifar", "invalid choice: 'cifar'"),
        ("--dataset", "expected one argument"),
        ("--epochs 0", "must be a whole number at least 1, not '0'"),
        ("--epochs 2.5", "must be a whole number at least 1, not '2.5'"),
        ("--epochs 1" + 20 * "0", "must be a whole number at least 1 and at most 1e+09"),
        ("--lr 0", "must be a number above 0, not '0'"),
        ("--lr 1e39", "must be a number above 0 and at most 3.40282e+38, not '1e39'"),
        ("--lr nan", "must be a number above 0, not 'nan'"),
        ("--momentum 1.5", "must be a number at least 0 and at most 1, not '1.5'"),
        ("--weight-decay -1", "must be a number at least 0, not '-1'"),
        ("--seeds -1", "must be a whole number at least 0, not '-1'"),
        ("--num-workers 257", "must be a whole number at least 0 and at most 256, not '257'"),
        ("--alpha inf", "must be a number at least 0 and at most"),
        ("--subset-fraction 0", "must be a number above 0 and at most 1, not '0'"),
        ("--fusion mlp", "invalid choice: 'mlp'"),
        ("--resume --overwrite", "not allowed with argument"),
        ("--resume --eval-only", "not allowed with argument"),
        ("--overwrite --eval-only", "not allowed with argument"),
        ("--epoch 3", "unrecognized arguments: --epoch 3"),
    ],
)
def test_bad_flags_are_refused_by_name(capsys, words, sentence):
    with pytest.raises(SystemExit) as stopped:
        pmr.main(words.split())
    assert stopped.value.code == 2 and sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--method aa", "There is no method 'aa' for digits; choose from a, b, c, unimodal-first,"),
        (
            "--method unimodal-audio",
            "no method 'unimodal-audio' .* unimodal-first, unimodal-second",
        ),
        ("--method unimodal", "There is no method 'unimodal' for digits"),
        ("--audio-snr 3", "The dataset digits has no dial --audio-snr; leave it out"),
        ("--dataset vggsound --protocol pmr", "The dataset vggsound has no dial --protocol; leave"),
        ("--dataset ave --color-variance=3", "The dataset ave has no dial --color-variance"),
        ("--pretrained", "There are no pretrained weights for digits; leave out --pretrained"),
        (
            "--dataset synthetic --pair-type sum-mod",
            "--fusion concat is linear .* another --fusion",
        ),
        ("--device cuda", "finds no cuda device on this machine; use --device cpu"),
        ("--device mps", "finds no mps device on this machine; use --device cpu"),
    ],
)
def test_bad_requests_are_one_sentence(no_data, monkeypatch, words, sentence):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    with pytest.raises(UserError, match=sentence):
        Command(OWN, words.split())


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_experiment_names_the_new_command(script):
    name = "compare" if script is baselines else script.__name__
    command = f"python -m experiments.{name} --help"
    for words in (["--experiment", "table1"], ["--experiment=table1"]):
        with pytest.raises(UserError, match=f"a command of their own: {command}"):
            script.main(words)


# ---- Device, optimizer and learning rate ----


@pytest.mark.parametrize(("cuda", "chosen"), [(True, "cuda"), (False, "cpu")])
@pytest.mark.parametrize("mps", [True, False])
def test_auto_is_cuda_where_there_is_one_else_the_cpu(monkeypatch, cuda, mps, chosen):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)  # has to be asked for
    assert device.pick_device("auto") == torch.device(chosen)
    assert device.pick_device("cpu") == CPU


@pytest.mark.parametrize(
    ("precision", "dtype"), [("bf16", torch.bfloat16), ("fp32", torch.float32)]
)
def test_autocast_computes_in_the_precision_named(precision, dtype):
    with device.autocast(SimpleNamespace(device=CPU, precision=precision)):
        assert nn.Linear(2, 2)(torch.ones(1, 2)).dtype == dtype


def rates(schedule, epochs, lr=1.0):
    return [optimizer.scheduled_lr(schedule, lr, epoch, epochs) for epoch in range(epochs)]


def test_schedules():
    assert rates("none", 4, 0.3) == [0.3] * 4
    assert rates("step", 10) == pytest.approx([1.0] * 7 + [0.1] * 3)
    for epochs in range(1, 200):  # falls at seventy percent
        high = [rate == 1.0 for rate in rates("step", epochs)]
        assert high == [10 * epoch < 7 * epochs for epoch in range(epochs)]
    drops = [1.0] * 70 + [0.1] * 70 + [0.01] * 10
    assert rates("step-70", 150) == pytest.approx(drops) and rates("step-70", 20) == [1.0] * 20
    half = 0.5**0.5  # cos(pi / 4)
    expected = [1, 0.1 + 0.45 * (1 + half), 0.55, 0.1 + 0.45 * (1 - half), 0.1]
    assert rates("cosine", 5) == pytest.approx(expected)
    assert rates("cosine", 1, 0.3) == pytest.approx([0.3])
    assert rates("cosine", 2, 0.3) == pytest.approx([0.3, 0.03])


@pytest.mark.parametrize(
    ("name", "kind", "settings"),
    [
        ("sgd", torch.optim.SGD, {"momentum": 0.7, "dampening": 0, "nesterov": False}),
        ("adam", torch.optim.Adam, {"betas": (0.9, 0.999), "eps": 1e-8, "amsgrad": False}),
        ("adagrad", torch.optim.Adagrad, {"lr_decay": 0, "eps": 1e-10}),
    ],
)
def test_optimizer_settings_and_its_learning_rate(name, kind, settings):
    config = SimpleNamespace(optimizer=name, lr=0.2, weight_decay=0.03, momentum=0.7)
    groups = [{"params": [nn.Parameter(torch.zeros(1))]} for _ in range(2)]
    found = optimizer.build_optimizer(groups, config)
    expected = {"lr": 0.2, "weight_decay": 0.03, **settings}
    assert type(found) is kind and {key: found.defaults[key] for key in expected} == expected
    optimizer.set_lr(found, 0.25)
    assert [group["lr"] for group in found.param_groups] == [0.25, 0.25]


@pytest.mark.parametrize("script", SCRIPTS, ids=NAMES)
def test_training_follows_schedule_and_momentum_quietly(tmp_path, capsys, script):
    words = "--train-samples 40 --dataset digits --method unimodal-gray --epochs 2 --lr 0.1"
    words += f" --schedule cosine --momentum 0.5 --device cpu --out {tmp_path}"
    script.main(words.split())
    assert "%" not in capsys.readouterr().err  # no terminal, no bar
    (folder,) = (tmp_path / script.__name__ / "digits").iterdir()
    assert "-momentum=0.5-" in folder.name
    state = torch.load(folder / "last.pt", weights_only=True)["state"]
    groups = [g for x in state.values() if "param_groups" in x for g in x["param_groups"]]
    assert groups and all(g["momentum"] == 0.5 for g in groups)
    assert [g["lr"] for g in groups] == pytest.approx([0.01] * len(groups))


# ---- Progress ----


@pytest.mark.parametrize(
    ("seconds", "steps", "first_epoch", "said"),
    [
        (3, 100, 0, ["own-seed0: about 48 min left", 250]),
        (3, 100, 8, ["own-seed0: about 8 min left", 50]),  # resumed: what is left
        (0.05, 100, 0, [4]),  # under a minute
        (100, 2, 0, [20]),  # too few steps to know
    ],
)
def test_a_long_run_says_once_how_long_it_takes(
    monkeypatch, capsys, seconds, steps, first_epoch, said
):
    """Ten epochs, by a clock that each step moves on; in a file a line says every ten seconds how
    far it is, and how long it takes from there. said: the first such line, the number of all."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress.Progress, "last_line", 0.0)

    def batches():
        for step in range(steps):
            clock.now += seconds
            yield step

    bar = progress.Progress("own-seed0", 10, steps, first_epoch)
    for _ in range(first_epoch, 10):
        assert list(bar(batches())) == list(range(steps))
    bar.close()
    captured = capsys.readouterr()
    lines = captured.err.splitlines()
    places = [line for line in lines if "step" in line]
    assert [x for x in lines if x not in places] + [len(places)] == said and captured.out == ""
    done = 10 * len(places) / seconds if seconds < 10 else len(places) - 1
    place = re.match(r"own-seed0: epoch (\d+) of 10, step (\d+)", places[-1])
    assert int(place[1]) == pytest.approx(first_epoch + 1 + done // steps, abs=1)


def test_time_left_follows_a_changing_load(monkeypatch, capsys):
    """Fifty steps of ten seconds, then 950 of one: after half of them about 500 s are left."""
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(progress, "time", clock)
    monkeypatch.setattr(progress.Progress, "last_line", 0.0)
    bar = progress.Progress("own-seed0", 10, 100)
    for epoch in range(10):
        for step in bar(range(100)):
            clock.now += 10 if epoch == 0 and step < 50 else 1
    lines = capsys.readouterr().err.splitlines()
    left = {line.split(", ")[0][11:]: int(line.split()[-3]) for line in lines if "min left" in line}
    assert left["epoch 1 of 10"] > 30 and left["epoch 6 of 10"] in (7, 8)  # 400 s are 6.7 min


def test_a_terminal_gets_a_bar(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stderr", terminal)
    bar = progress.Progress("own-seed0", 1, 5)
    list(bar(range(5)))
    bar.close()
    assert "own-seed0" in terminal.getvalue()


# ---- The end of a command ----


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (UserError("No such thing; do that."), "error: No such thing; do that."),
        (KeyboardInterrupt(), "--resume (and without --overwrite)"),
        (ValueError("Expected more than 1 value per channel when"), "choose another --batch-size"),
        (RuntimeError("cannot be converted to type float without overflow"), "a lower --lr"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2 GiB"), "a smaller --batch-size"),
        (MemoryError("Unable to allocate 2 GiB for an array"), "a smaller --batch-size"),
        (RuntimeError("DataLoader worker (pid 7) is killed"), "choose fewer --num-workers"),
    ],
)
def test_command_ends_with_a_sentence(error, sentence):
    def main():
        raise error

    with pytest.raises(SystemExit) as stopped:
        run_command(main)
    assert sentence in stopped.value.code  # text as code: stderr and status 1
    if isinstance(error, (ValueError, RuntimeError)):  # a fault of the code is not hidden
        error = type(error)("a fault")
        with pytest.raises(type(error), match="a fault"):
            run_command(main)


@pytest.mark.parametrize("encoding", ["ascii", "cp874", "utf-8"])
def test_a_character_that_a_terminal_lacks_is_replaced(monkeypatch, encoding):
    """Also half a character of a file's name, which no encoding has."""
    for main in (
        lambda: run_command(lambda: print("1 ± 2 \udce9")),
        lambda: prepare.main(["fsdd"]),
    ):
        monkeypatch.setattr(prepare, "prepare_archive", lambda *_: "1 ± 2 \udce9")
        page = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
        monkeypatch.setattr(sys, "stdout", page)
        assert not main()
        page.flush()
        right = "1 ± 2 ?\n" if encoding == "utf-8" else "1 ? 2 ?\n"
        assert page.buffer.getvalue() == right.encode(encoding)


def test_closed_output_takes_nothing_and_ends_nothing(monkeypatch, tmp_path):
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, None)
    words = ["--method", "joint", "--train-samples", "20", "--epochs", "1", "--out", str(tmp_path)]
    run_command(lambda: pmr.main(words))
    assert list(tmp_path.glob("*/*/*/summary.json"))
    for name in ("stdout", "stderr"):
        getattr(sys, name).close()


PROGRAMS = [[f"{name}.py"] for name in (*NAMES, "toy_projection")]
PROGRAMS += [["-m", f"experiments.{name}"] for name in ("compare", *NAMES[:4], "toy_projection")]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda words: words[-1])
def test_ctrl_c_while_torch_is_imported_is_a_sentence(tmp_path, program):
    for name in ("torch", "numpy", "sklearn"):
        (tmp_path / f"{name}.py").write_text("raise KeyboardInterrupt")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    command = [sys.executable, *program]
    found = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert found.returncode == -signal.SIGINT and found.stderr == f"{INTERRUPTED}\n"


def run_pmr(words, errors, stdout=os.devnull):
    """pmr.py as a process runs it, with stdout and stderr in files."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    progress.Progress.last_line = math.inf  # says nothing
    sys.stdout, sys.stderr = open(stdout, "w"), open(errors, "w")  # noqa: SIM115
    run_command(lambda: pmr.main([*words, "--method", "joint", "--train-samples", "20"]))


@pytest.mark.parametrize(
    ("words", "stdout", "sentence"),
    [
        ("--eval-only", os.devnull, "error: .* holds no run"),
        ("--epochs 1", "/dev/full", r"error: \[Errno 28\] No space left"),
        ("--epochs 1", "a closed pipe", r"error: \[Errno 32\] Broken pipe"),
        ("--epochs 5000", os.devnull, r"interrupted; .* --resume \(and without --overwrite\)"),
    ],
)
def test_a_process_ends_with_one_line_and_no_traceback(tmp_path, words, stdout, sentence):
    if stdout == "a closed pipe":
        read, stdout = os.pipe()
        os.close(read)
    args = ([*words.split(), "--out", str(tmp_path)], tmp_path / "errors.txt", stdout)
    process = multiprocessing.get_context("fork").Process(target=run_pmr, args=args)
    process.start()
    while words == "--epochs 5000" and not list(tmp_path.glob("*/*/*/last.pt")):
        time.sleep(0.01)
        assert process.is_alive()
    if words == "--epochs 5000":
        os.kill(process.pid, signal.SIGINT)
    process.join()
    errors = (tmp_path / "errors.txt").read_text()
    assert process.exitcode == 1 and re.fullmatch(f"(.*: epoch .*\n)*\n?{sentence}.*\n", errors)
