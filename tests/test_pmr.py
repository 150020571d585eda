"""pmr.py from its command line: every option, what it writes, and what it says to bad input."""

import functools
import json
import math
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import EVERY_DATASET, ROOT
from fake_clips import FROM_FILES

import pmr
from common import command_line
from common.datasets import DATASETS, TensorSplit
from common.datasets.base import Splits
from common.errors import UserError
from common.fusion import FUSIONS
from common.metrics import accuracy
from common.rebalance import RIVALS
from common.seeding import make_generator, seed_phase

MODALITIES = {
    "digits": ("gray", "color"),
    "cg-mnist": ("gray", "color"),
    "av-digits": ("audio", "visual"),
    "synthetic": ("first", "second"),
    "features": ("left", "right"),
}
TINY = ["--train-samples", "40", "--epochs", "1", "--device", "cpu"]


@pytest.fixture(scope="module", autouse=True)
def load_each_dataset_once():
    """Loading is tested in test_datasets.py; here it would only take time."""
    original = command_line.load_dataset
    command_line.load_dataset = functools.cache(original)
    yield
    command_line.load_dataset = original


@pytest.fixture
def run(tmp_path, data_root):
    """Run pmr.main on a tiny part of the data, with runs in a temporary folder."""

    def call(*argv):
        tiny = [] if "--train-samples" in argv else TINY
        return pmr.main([*tiny, "--out", str(tmp_path), "--data-root", str(data_root), *argv])

    return call


def folder_of(tmp_path, summary):
    """The folder of the run that ended last with `summary`'s method."""
    folders = tmp_path.glob(f"pmr/*/{summary['method']}-*")
    return max(folders, key=lambda folder: (folder / "summary.json").stat().st_mtime_ns)


# ---- Every method, fusion, dataset, optimizer, and every other choice ----


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adagrad"])
@pytest.mark.parametrize("dataset", EVERY_DATASET)
@pytest.mark.parametrize("fusion", list(FUSIONS))
def test_every_method_fusion_dataset_and_optimizer(
    run, require, root_of, fusion, dataset, optimizer
):
    require(dataset)
    methods = list(pmr.METHODS)
    if fusion == "concat":
        methods += [f"unimodal-{m}" for m in MODALITIES[dataset]]
    arguments = ["--dataset", dataset, "--data-root", root_of(dataset)]
    arguments += ["--fusion", fusion, "--optimizer", optimizer]
    result = run(*arguments, "--method", *methods)
    assert [summary["method"] for summary in result["runs"]] == methods
    for summary in result["runs"]:
        test = summary["test"]
        if summary["method"].startswith("unimodal-"):
            alone = test[summary["method"].removeprefix("unimodal-")]
            assert alone.keys() == {"alone", "probe"} and alone["alone"] == test["accuracy"]
            continue
        assert summary["rho"] > 0
        reads = {"prototype", "probe"} | ({"head"} if fusion in ("sum", "concat") else set())
        assert all(test[m].keys() == reads for m in MODALITIES[dataset])


@pytest.mark.parametrize("fusion", list(FUSIONS))
@pytest.mark.parametrize("rival", list(RIVALS))
def test_every_rival_and_fusion(run, tmp_path, fusion, rival):
    if rival == "ogm-ge" and fusion in ("film", "gated"):
        with pytest.raises(UserError, match=r"share of the logits.* use --fusion concat\.$"):
            run("--method", rival, "--fusion", fusion)
        return
    rival_run, joint = run("--method", rival, "joint", "--fusion", fusion)["runs"]
    assert rival_run["rho"] > 0 and rival_run["test"]["gray"]["prototype"] >= 0
    mine, plain = (tensors(folder_of(tmp_path, summary)) for summary in (rival_run, joint))
    assert not all(torch.equal(mine[name], plain[name]) for name in plain)


def test_every_dataset_is_tested_here_or_in_test_clips():
    assert {*MODALITIES, *FROM_FILES} == set(DATASETS) == set(pmr.RECIPES)


@pytest.fixture(scope="module")
def default_network(tmp_path_factory):
    """The weights that the default knobs of PMR give on 120 samples in 4 epochs."""
    out = tmp_path_factory.mktemp("default")
    flags = ["--train-samples", "120", "--epochs", "4", "--device", "cpu", "--out", str(out)]
    return tensors(folder_of(out, pmr.main([*flags, "--method", "pmr"])))


@pytest.mark.parametrize(
    ("choice", "changes"),
    [
        (("--coefficients", "binary"), True),
        (("--coefficients", "clip"), False),
        (("--schedule", "none"), False),
        (("--schedule", "step"), True),
        (("--schedule", "cosine"), True),
        (("--precision", "bf16"), True),
        (("--precision", "fp32"), False),
        (("--device", "auto"), False),
        (("--alpha", "2"), True),
        (("--mu", "1"), True),
        (("--momentum-epsilon", "1"), True),
        (("--subset-fraction", "1"), True),
        (("--per-epochs", "0"), True),
        (("--color-variance", "0"), True),
        (("--batch-size", "1000"), True),
        (("--weight-decay", "0"), True),
        (("--lr", "0.02"), True),
        (("--data-seed", "5"), True),
        (("--seeds", "5"), True),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_every_other_choice_acts(run, tmp_path, default_network, choice, changes):
    if choice == ("--device", "auto") and torch.cuda.is_available():
        pytest.skip("auto is CUDA here, which is equal up to rounding only")
    flags = ["--train-samples", "120", "--epochs", "4", "--device", "cpu", "--method", "pmr"]
    found = tensors(folder_of(tmp_path, run(*flags, *choice)))
    same = all(torch.equal(found[name], default_network[name]) for name in found)
    assert same != changes


@pytest.mark.parametrize("device", ["cuda", "mps"])
def test_a_device_that_is_there_or_a_sentence(run, device):
    available = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if available[device]:
        assert run("--method", "pmr", "--device", device)["test"]["accuracy"] >= 0
    else:
        with pytest.raises(UserError, match=f"finds no {device} device"):
            run("--method", "pmr", "--device", device)


@pytest.mark.parametrize("mu", ["0", "0.01"])
def test_a_class_missing_from_the_subset_trains_on(run, mu):
    """Three samples cannot hold ten classes."""
    summary = run("--method", "pmr", "--subset-fraction", "0.08", "--mu", mu, "--epochs", "2")
    assert np.isfinite(summary["rho"])


# ---- What the algorithm promises over a whole run ----


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


def test_alpha_and_mu_zero_equal_joint_training_bit_for_bit(run, tmp_path):
    flags = ["--train-samples", "200", "--epochs", "3"]
    joint = run("--method", "joint", *flags)
    pmr_off = run("--method", "pmr", "--alpha", "0", "--mu", "0", *flags)
    first, second = (tensors(folder_of(tmp_path, summary)) for summary in (joint, pmr_off))
    assert first.keys() == second.keys() and len(first) > 50
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert joint["test"] == pmr_off["test"] and joint["rho"] == pmr_off["rho"]


def test_pmr_without_per_is_pmr_with_mu_zero(run, tmp_path):
    first = tensors(folder_of(tmp_path, run("--method", "pmr-no-per")))
    second = tensors(folder_of(tmp_path, run("--method", "pmr", "--mu", "0")))
    third = tensors(folder_of(tmp_path, run("--method", "pmr", "--seeds", "0", "--mu", "5")))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not all(torch.equal(first[name], third[name]) for name in first)


def test_per_stops_after_its_epochs(run, monkeypatch):
    seen = []
    original = pmr.pmr_loss

    def spy(cross_entropy, logits0, logits1, labels, known, alpha, mu, rule):
        seen.append(mu)
        return original(cross_entropy, logits0, logits1, labels, known, alpha, mu, rule)

    monkeypatch.setattr(pmr, "pmr_loss", spy)
    run("--method", "pmr", "--epochs", "4", "--per-epochs", "3", "--mu", "0.5", "--seeds", "3")
    assert seen == [0.5, 0.5, 0.5, 0.0]  # 40 samples: one step an epoch
    _, defaults = pmr.parse_args(["--epochs", "12"])
    assert defaults["per_epochs"] == 3  # the first fifth, rounded up


def test_the_subset_is_a_fixed_tenth_of_the_training_data(run, monkeypatch):
    seen = []
    original = pmr.subset_means

    def spy(model, subset, config):
        seen.append(subset.index.tolist())
        return original(model, subset, config)

    monkeypatch.setattr(pmr, "subset_means", spy)
    run("--method", "pmr", "--epochs", "2", "--train-samples", "200", "--seeds", "0", "1")
    first, other = seen[0], seen[-1]
    assert len(first) == len(set(first)) == 20 and max(first) < 200
    half = len(seen) // 2
    assert seen == [first] * half + [other] * half and first != other


def test_prototypes_follow_eq_6_and_12_over_the_epochs(run, monkeypatch, tmp_path):
    means = []
    original = pmr.Prototypes.update

    def spy(self, new, present, epsilon):
        means.append(new.clone())
        original(self, new, present, epsilon)

    monkeypatch.setattr(pmr.Prototypes, "update", spy)
    flags = ["--epochs", "3", "--subset-fraction", "1", "--momentum-epsilon", "0.3"]
    summary = run("--method", "pmr", *flags)
    gray = means[::2]
    expected = 0.3 * (0.3 * gray[0] + 0.7 * gray[1]) + 0.7 * gray[2]
    saved = tensors(folder_of(tmp_path, summary))[".prototypes.gray.centers"]
    torch.testing.assert_close(saved, expected)


def test_evaluation_and_prototypes_leave_the_network_as_it_is():
    args, _ = pmr.parse_args(["--train-samples", "60"])
    splits = pmr.load_splits(args, torch.device("cpu"))
    chosen = {"method": "pmr", "seed": 0, "device": torch.device("cpu"), "num_classes": 10}
    config = pmr.SimpleNamespace(**{**vars(args), **chosen})
    model = pmr.build_model(config, splits)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    pmr.evaluate(model, splits.val, splits.train, config)
    pmr.subset_means(model, splits.train, config)
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_training_never_reads_the_test_split(run, monkeypatch):
    """Labels and inputs of the test split are read after the last epoch only."""
    reads = []
    original = TensorSplit.batches
    test_split = pmr.load_splits(pmr.parse_args(TINY)[0], torch.device("cpu")).test

    def spy(self, *args, **kwargs):
        if self.all_labels.data_ptr() == test_split.all_labels.data_ptr():
            reads.append(len(epochs))
        return original(self, *args, **kwargs)

    epochs = []
    original_end = pmr.Run.end_epoch
    monkeypatch.setattr(TensorSplit, "batches", spy)
    monkeypatch.setattr(
        pmr.Run, "end_epoch", lambda self, *a: (epochs.append(1), original_end(self, *a))
    )
    run("--method", "pmr", "--epochs", "3", "--device", "cpu", "--data-root", "data")
    assert len(epochs) == 3
    assert reads == [3, 3, 3]  # by the last network, by the best, and by the probes


def slow_algorithm_1(model, splits, config):
    """Algorithm 1 with loops over samples and classes and SGD by hand; returns rho by epoch."""
    count = len(splits.train)
    inputs, labels, _ = next(splits.train.batches(count))
    size = max(1, round(config.subset_fraction * count))
    subset = torch.randperm(count, generator=make_generator(config.seed, "subset"))[:size]
    parameters = list(model.parameters())
    velocity = [torch.zeros_like(parameter) for parameter in parameters]
    prototypes, ratios = {m: {} for m in splits.modalities}, []
    for epoch in range(config.epochs):
        generator = seed_phase(config.seed, "train", epoch)
        model.eval()
        with torch.no_grad():
            _, features = model({m: x[subset] for m, x in inputs.items()})
        for m, old in prototypes.items():  # Eq. (6) and (12)
            for k in range(10):
                members = [z for z, y in zip(features[m], labels[subset], strict=True) if y == k]
                if members:
                    new = sum(members) / len(members)
                    epsilon = config.momentum_epsilon
                    old[k] = epsilon * old[k] + (1 - epsilon) * new if k in old else new
        model.train()
        total = 0.0
        for batch in torch.randperm(count, generator=generator).split(config.batch_size):
            logits, features = model({m: x[batch] for m, x in inputs.items()})
            truth = labels[batch].tolist()
            losses = [-row.log_softmax(0)[y] for row, y in zip(logits, truth, strict=True)]
            loss = sum(losses) / len(losses)
            s, pce, entropy = {}, {}, {}
            for m, centers in prototypes.items():  # Eq. (7) to (9)
                classes, right, h = list(centers), [], []
                for z, y in zip(features[m], truth, strict=True):
                    distance = torch.stack(
                        [(z - centers[k]).square().sum().sqrt() for k in classes]
                    )
                    p = (-distance).exp() / (-distance).exp().sum()
                    h.append(-(p * p.log()).sum())
                    if y in centers:
                        right.append(p[classes.index(y)])
                s[m] = sum(right).item()
                pce[m] = -sum(p.log() for p in right) / len(right)
                entropy[m] = sum(h) / len(h)
            first, second = splits.modalities
            rho = s[first] / s[second]
            beta = min(max(0, 1 / rho - 1), 1) if rho < 1 else 0  # Eq. (11)
            gamma = min(max(0, rho - 1), 1) if rho >= 1 else 0
            loss = loss + config.alpha * (beta * pce[first] + gamma * pce[second])  # Eq. (10)
            if epoch < config.per_epochs:  # Eq. (13)
                loss = loss - config.mu * (gamma * entropy[first] + beta * entropy[second])
            gradients = torch.autograd.grad(loss, parameters)
            with torch.no_grad():
                for w, g, v in zip(parameters, gradients, velocity, strict=True):
                    v.mul_(0.9).add_(g + config.weight_decay * w)
                    w.sub_(scheduled_by_hand(config, epoch) * v)
            total += rho * len(batch)
        ratios.append(total / count)
    return ratios


def scheduled_by_hand(config, epoch):
    return config.lr / 10 if epoch >= 0.7 * config.epochs else config.lr


def test_a_whole_run_equals_a_slow_algorithm_1(run, tmp_path):
    """Gated fusion, PER in two of three epochs, two classes missing from the subset, three steps
    an epoch, the step schedule: weights and rho."""
    argv = ["--method", "pmr", "--train-samples", "100", "--epochs", "3", "--per-epochs", "2"]
    argv += ["--mu", "0.3", "--alpha", "2", "--subset-fraction", "0.12", "--fusion", "gated"]
    argv += ["--batch-size", "40", "--schedule", "step"]
    folder = folder_of(tmp_path, run(*argv))
    args, _ = pmr.parse_args(argv)
    splits = pmr.load_splits(args, torch.device("cpu"))
    chosen = {"method": "pmr", "seed": 0, "device": torch.device("cpu"), "num_classes": 10}
    config = pmr.SimpleNamespace(**{**vars(args), **chosen})
    model = pmr.build_model(config, splits)
    assert len(pmr.draw_subset(splits, config).labels.unique()) < 10
    ratios = slow_algorithm_1(model, splits, config)
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [epoch["train"]["rho"] for epoch in history] == pytest.approx(ratios, rel=1e-4)
    saved = tensors(folder)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[f".model.{name}"], weight, rtol=1e-3, atol=1e-5)


# ---- What a run reports and leaves behind ----


def test_summary_is_of_the_last_epoch_and_best_of_the_best(run, tmp_path):
    """The two networks are read out as their checkpoints are, by the right modality."""
    flags = ["--train-samples", "200", "--epochs", "6", "--lr", "0.05", "--method", "pmr"]
    summary = run(*flags)
    folder = folder_of(tmp_path, summary)
    history = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    scores = [epoch["val"]["accuracy"] for epoch in history]
    assert summary["val"] == history[-1]["val"] and summary["rho"] == history[-1]["train"]["rho"]
    assert summary["best"]["epoch"] == scores.index(max(scores))
    args, _ = pmr.parse_args(flags)
    splits = pmr.load_splits(args, torch.device("cpu"))
    chosen = {"method": "pmr", "seed": 0, "device": torch.device("cpu"), "num_classes": 10}
    config = pmr.SimpleNamespace(**{**vars(args), **chosen})
    subset = pmr.draw_subset(splits, config)
    for name, found in (("last.pt", summary["test"]), ("best.pt", summary["best"]["test"])):
        model = pmr.build_model(config, splits).eval()
        model.load_state_dict(torch.load(folder / name, weights_only=True)["state"]["model"])
        inputs, labels, _ = next(splits.test.batches(10**6))
        with torch.no_grad():
            logits, features = model(inputs)
            _, known = model(next(subset.batches(10**6))[0])
        assert found["accuracy"] == accuracy(logits, labels)
        for m, z in features.items():
            means, present = pmr.class_means(known[m], subset.labels, 10)
            near = [
                min((math.dist(a, c), k) for k, c in enumerate(means.tolist()) if present[k])[1]
                for a in z.tolist()
            ]
            right = sum(k == y for k, y in zip(near, labels.tolist(), strict=True))
            assert found[m]["prototype"] == pytest.approx(100 * right / len(labels))


def test_predictions_and_summary_agree(run, tmp_path):
    summary = run("--method", "joint", "--train-samples", "200", "--epochs", "2")
    folder = folder_of(tmp_path, summary)
    saved = np.load(folder / "predictions.npz")
    logits, labels = torch.from_numpy(saved["logits"]), torch.from_numpy(saved["label"])
    assert saved["index"].tolist() == list(range(len(labels)))
    assert accuracy(logits, labels) == summary["test"]["accuracy"]
    assert json.loads((folder / "summary.json").read_text()) == summary


def test_the_default_is_a_comparison_with_a_table(run, capsys):
    result = run()
    methods = ["unimodal-gray", "unimodal-color", "joint", "pmr"]
    assert [row["method"] for row in result["table"]] == methods
    out = capsys.readouterr().out
    assert all(re.search(rf"^{method} ", out, re.MULTILINE) for method in methods)
    assert re.search(r"^Runs: .*pmr/digits$", out, re.MULTILINE)


def test_more_seeds_reuse_the_finished_run(run, tmp_path, monkeypatch):
    run("--method", "joint")
    trained = []
    original = pmr.train
    monkeypatch.setattr(pmr, "train", lambda *a: (trained.append(a[3].seed), original(*a)))
    result = run("--method", "joint", "joint", "--seeds", "0", "1", "2", "1")
    assert trained == [1, 2]
    assert [summary["seed"] for summary in result["runs"]] == [0, 1, 2]
    assert result["table"][0]["test"]["n"] == 3


# ---- Bad input ----


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--dataset", "cifar"], "invalid choice: 'cifar'"),
        (["--epochs", "0"], "must be a whole number at least 1, not '0'"),
        (["--epochs", "2.5"], "must be a whole number at least 1, not '2.5'"),
        (["--lr", "0"], "must be a number above 0, not '0'"),
        (["--lr", "nan"], "must be a number above 0, not 'nan'"),
        (["--alpha", "-1"], "must be a number at least 0, not '-1'"),
        (["--momentum-epsilon", "2"], "must be a number at least 0 and at most 1, not '2'"),
        (["--subset-fraction", "0"], "must be a number above 0 and at most 1, not '0'"),
        (["--fusion", "mlp"], "invalid choice: 'mlp'"),
        (["--alpha", "inf"], "must be a number at least 0 and at most"),
        (["--epochs", "1" + 20 * "0"], "must be a whole number at least 1 and at most 1e+09"),
        (["--resume", "--overwrite"], "not allowed with argument"),
        (["--epoch", "3"], "unrecognized arguments"),
    ],
)
def test_bad_flags_are_refused_by_name(run, capsys, argv, sentence):
    with pytest.raises(SystemExit) as exit_info:
        run(*argv)
    assert exit_info.value.code == 2
    assert sentence in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--method", "ppmr"], "no method 'ppmr' for digits; choose from pmr, pmr-no-per, joint"),
        (["--method", "unimodal-audio"], "unimodal-gray, unimodal-color"),
        (["--audio-snr", "3"], "digits has no dial --audio-snr"),
        (["--dataset", "av-digits", "--data-root", "/nowhere"], "data/prepare.py fsdd"),
        (["--method", "joint", "--eval-only"], "holds no run; train it first"),
    ],
)
def test_bad_requests_are_one_sentence(run, argv, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        run(*argv)


def test_an_unwritable_folder_is_one_sentence(run, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(UserError, match=r"Cannot make the folder .*choose another --out"):
        run("--method", "joint", "--out", str(tmp_path / "file"))


def test_a_third_modality_is_refused(run, monkeypatch):
    def load(root, data_seed, color_variance):
        splits = DATASETS_DIGITS.load(root, data_seed, color_variance)
        return Splits(**{**vars(splits), "modalities": ("gray", "color", "depth")})

    DATASETS_DIGITS = DATASETS["digits"]
    monkeypatch.setitem(DATASETS, "digits", DATASETS_DIGITS._replace(load=load))
    with pytest.raises(UserError, match="compare two modalities; digits has 3"):
        run("--method", "pmr", "--data-seed", "9")


@pytest.mark.parametrize("command", ["{} >/dev/full", "{} | true"])
def test_a_full_or_closed_stdout_is_no_traceback(command, tmp_path):
    python = f"{sys.executable} pmr.py --method joint --train-samples 20 --epochs 1"
    command = command.format(f"{python} --out {tmp_path}")
    done = subprocess.run(
        command, shell=True, cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert "Traceback" not in done.stderr and "Exception" not in done.stderr


def test_it_runs_where_git_is_not_installed(run, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    folder = folder_of(tmp_path, run("--method", "joint"))
    assert json.loads((folder / "config.json").read_text())["git_commit"] is None


def test_the_command_line_gives_one_line_and_no_traceback(tmp_path):
    command = [sys.executable, "pmr.py", "--dataset", "av-digits", "--data-root", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1


# ---- Table 1 ----


def test_table1_writes_table_and_figure(run, tmp_path):
    result = run("--experiment", "table1", "--seeds", "0", "1")
    (folder,) = (tmp_path / "pmr" / "digits").glob("table1*")
    record = json.loads((folder / "table.json").read_text())
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    expected = [("unimodal-gray", None), ("unimodal-color", None)]
    expected += [(m, f) for f in FUSIONS for m in ("joint", "pmr-no-per", "pmr")]
    assert [(row["method"], row["fusion"]) for row in record["rows"]] == expected
    assert len(record["runs"]) == len(result["runs"]) == 2 * 14
    assert {(row["method"], row["fusion"]) for row in record["paired"]} == {
        (m, f) for m in ("pmr", "pmr-no-per") for f in FUSIONS
    }


def test_tables_of_other_knobs_stand_in_other_folders(run, tmp_path):
    for flags in ([], ["--alpha", "3"]):
        run("--experiment", "table1", "--fusion", "sum", "--method", "joint", *flags)
    folders = sorted(path.name for path in (tmp_path / "pmr" / "digits").glob("table1*"))
    assert folders == [
        "table1-sum-train-samples=40-epochs=1",
        "table1-sum-train-samples=40-epochs=1-alpha=3.0",
    ]
    record = json.loads((tmp_path / "pmr" / "digits" / folders[1] / "table.json").read_text())
    assert record["arguments"]["alpha"] == 3 and record["arguments"]["method"] == ["joint"]


def test_table1_can_be_restricted(run):
    table = run("--experiment=table1", "--fusion", "sum", "--method", "joint", "pmr")["table"]
    assert [(row["method"], row["fusion"]) for row in table] == [("joint", "sum"), ("pmr", "sum")]
    only = run("--experiment", "table1", "--method", "unimodal-gray")["table"]
    assert [row["method"] for row in only] == ["unimodal-gray"]


def test_table1_shows_the_papers_numbers_on_the_papers_data(run, require):
    require("cg-mnist")
    result = run("--experiment", "table1", "--dataset", "cg-mnist", "--fusion", "film")
    paper = {row["method"]: row["paper"] for row in result["table"]}
    assert paper == {
        "unimodal-gray": 99.3,
        "unimodal-color": 60.4,
        "joint": 60.0,
        "pmr-no-per": None,
        "pmr": 76.3,
    }
