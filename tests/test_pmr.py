"""pmr.py from its command line: every option, Algorithm 1, what a run reports, and Table 1."""

import copy
import functools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import EVERY_DATASET, UNLISTED
from fake_clips import FROM_FILES
from test_pmr_equations import slow_loss, slow_terms

import pmr
from common import command_line, evaluation
from common import run as run_room
from common.command_line import Command
from common.datasets import DATASETS, TensorSplit
from common.errors import UserError
from common.metrics import accuracy
from common.networks.multimodal import build_model
from common.run import Run
from common.seeding import make_generator, seed_phase
from experiments import pmr as experiments
from experiments.grid import read_rows
from experiments.pmr import papers_numbers

MODALITIES = {
    "digits": ("gray", "color"),
    "cg-mnist": ("gray", "color"),
    "av-digits": ("audio", "visual"),
    "synthetic": ("first", "second"),
    "features": ("left", "right"),
    "mfeat": ("fou", "mor"),
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


@pytest.fixture(autouse=True)
def no_probes(monkeypatch):
    """So are probes; here they guess the first class."""
    monkeypatch.setattr(evaluation, "linear_probe", lambda *_: lambda z: torch.zeros(len(z), 10))


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
    assert {*MODALITIES, *FROM_FILES} == set(DATASETS) == {*pmr.RECIPES} | UNLISTED


CHOICE = ["--epochs", "4", "--batch-size", "20", "--method", "pmr"]


@pytest.fixture(scope="module")
def default_run(tmp_path_factory):
    """The folder of a run with the default knobs of PMR."""
    out = tmp_path_factory.mktemp("default")
    return folder_of(out, pmr.main([*TINY, "--out", str(out), *CHOICE]))


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
def test_every_other_choice_acts_and_names_the_folder(run, tmp_path, default_run, choice, changes):
    if choice == "--device auto" and torch.cuda.is_available():
        pytest.skip("auto is CUDA here, which is equal up to rounding only")
    folder = folder_of(tmp_path, run(*CHOICE, *choice.split()))
    assert equal(tensors(folder), tensors(default_run)) != changes
    assert (folder.name != default_run.name) == changes


# ---- What the algorithm promises over a whole run ----


@pytest.mark.parametrize(
    ("limit", "settings"), [("joint", "--alpha 0 --mu 0"), ("pmr-no-per", "--mu 0")]
)
def test_what_pmr_is_without_its_terms_bit_for_bit(run, tmp_path, limit, settings):
    argv = ["--train-samples", "100", "--epochs", "2", "--method"]
    found = []
    for words in ([limit], ["pmr", *settings.split()], ["pmr", "--mu", "5"]):
        summary = run(*argv, *words)
        found.append((tensors(folder_of(tmp_path, summary)), summary))
    assert len(found[0][0]) > 50 and equal(found[0][0], found[1][0])
    assert all(found[0][1][name] == found[1][1][name] for name in ("test", "val", "rho"))
    assert not equal(found[0][0], found[2][0])


def test_per_stops_after_its_epochs(run, monkeypatch):
    seen, original = [], pmr.pmr_loss

    def spy(*arguments):
        seen.append(arguments[6])
        return original(*arguments)

    monkeypatch.setattr(pmr, "pmr_loss", spy)
    run("--method", "pmr", "--epochs", "4", "--per-epochs", "3", "--mu", "0.5")
    assert seen == [0.5, 0.5, 0.5, 0.0]  # 40 samples: one step an epoch


def test_training_never_reads_the_test_split(run, monkeypatch):
    """Labels and inputs of the test split are read after the last epoch only."""
    reads, epochs = [], []
    batches, end_epoch = TensorSplit.batches, Run.end_epoch
    splits = prepare()[1]
    monkeypatch.setattr(command_line, "load_dataset", lambda *_, **__: splits)

    def spy(self, *args, **kwargs):
        if self.all_labels.data_ptr() == splits.test.all_labels.data_ptr():
            reads.append(len(epochs))
        return batches(self, *args, **kwargs)

    monkeypatch.setattr(TensorSplit, "batches", spy)
    monkeypatch.setattr(Run, "end_epoch", lambda *a: (epochs.append(1), end_epoch(*a)))
    run("--method", "pmr", "--epochs", "3")
    assert reads == [3, 3, 3]  # by the best network, by the last, and by the probes


def slow_statistics(encoder, x):
    """Features (N, D) with every BatchNorm by mean and unbiased variance of what comes to it in
    training, where the BatchNorms before it divide by the biased one."""
    maps = seen = x
    for layer in (layer for stage in encoder.stages for layer in stage):
        if isinstance(layer, torch.nn.BatchNorm2d):
            variance, mean = torch.var_mean(seen, dim=(0, 2, 3), keepdim=True)
            maps, biased = (
                (maps - mean) / (variance + 1e-5).sqrt(),
                seen.var((0, 2, 3), False, keepdim=True),
            )
            seen = (seen - mean) / (biased + 1e-5).sqrt()
        else:
            maps, seen = layer(maps), layer(seen)
    return encoder.pool(maps).detach()


def slow_algorithm_1(model, splits, config):
    """Algorithm 1 with the slow equations and SGD by hand; returns rho by epoch, and centers."""
    count = len(splits.train)
    inputs, labels, _ = next(splits.train.batches(count))
    size = max(1, round(config.subset_fraction * count))
    subset = torch.randperm(count, generator=make_generator(config.seed, "subset"))[:size]
    weights, epsilon = list(model.parameters()), config.momentum_epsilon
    velocity = [torch.zeros_like(w) for w in weights]
    statistics = {m: slow_statistics(model.encoders[m], inputs[m][subset]) for m in inputs}
    centers, ratios = {m: {} for m in splits.modalities}, []
    for epoch in range(config.epochs):
        generator = seed_phase(config.seed, "train", epoch)
        model.eval()
        with torch.no_grad():
            _, features = model({m: x[subset] for m, x in inputs.items()})
        features = features if epoch else statistics
        for m, old in centers.items():  # Eq. (6) and (12)
            for k in labels[subset].unique().tolist():
                new = features[m][labels[subset] == k].mean(dim=0)
                old[k] = epsilon * old[k] + (1 - epsilon) * new if k in old else new
        model.train()
        mu = config.mu if epoch < config.per_epochs else 0
        lr = config.lr / 10 if epoch >= 0.7 * config.epochs else config.lr
        total = 0.0
        for batch in torch.randperm(count, generator=generator).split(config.batch_size):
            logits, features = model({m: x[batch] for m, x in inputs.items()})
            truth = labels[batch]
            losses = [-row.log_softmax(0)[y] for row, y in zip(logits, truth, strict=True)]
            terms = [slow_terms(z, truth, centers[m]) for m, z in features.items()]
            loss, rho = slow_loss(sum(losses) / len(losses), *terms, config.alpha, mu)
            gradients = torch.autograd.grad(loss, weights)
            with torch.no_grad():
                for w, g, v in zip(weights, gradients, velocity, strict=True):
                    v.mul_(0.9).add_(g + config.weight_decay * w)
                    w.sub_(lr * v)
            total += rho * len(batch)
        ratios.append(total / count)
    return ratios, centers


@pytest.mark.slow
def test_a_whole_run_equals_a_slow_algorithm_1(run, tmp_path):
    """Gated fusion, PER in two of three epochs, classes missing from the subset, three steps an
    epoch, the step schedule: weights, prototypes and rho."""
    argv = "--train-samples 100 --epochs 3 --per-epochs 2 --mu 0.3 --alpha 2 --fusion gated"
    argv += " --subset-fraction 0.12 --momentum-epsilon 0.3 --batch-size 40 --schedule step"
    folder = folder_of(tmp_path, run("--method", "pmr", *argv.split()))
    model, splits, config = prepare(*argv.split())
    assert len(pmr.draw_subset(splits.train, config).labels.unique()) < 10
    ratios, centers = slow_algorithm_1(model, splits, config)
    history = history_of(folder)
    assert [epoch["train"]["rho"] for epoch in history] == pytest.approx(ratios, rel=1e-4)
    saved, expected = tensors(folder), {f".model.{k}": w for k, w in model.state_dict().items()}
    for m, known in centers.items():
        means = [known.get(k, torch.zeros(512)) for k in range(10)]
        expected[f".prototypes.{m}.centers"] = torch.stack(means)
    for name, weight in expected.items():
        torch.testing.assert_close(saved[name], weight, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("method", ["pmr", "joint"])
def test_the_subset_is_encoded_once_an_epoch(run, monkeypatch, method):
    """Once more before the first one, and by the two networks that are tested."""
    seen, predict = [], pmr.predict
    monkeypatch.setattr(pmr, "predict", lambda *a: seen.append(len(a[1])) or predict(*a))
    run("--method", method, "--train-samples", "200", "--epochs", "3", "--subset-fraction", "0.07")
    assert seen.count(14) == 1 + 3 + 2


def test_first_prototypes_lie_where_training_puts_the_features():
    """At the BatchNorms' starting statistics the gray ones lie within a thirtieth of that."""
    model, splits, config = prepare("--train-samples", "600")
    before = copy.deepcopy(model.state_dict())
    subset = pmr.draw_subset(splits.train, config)
    settled = pmr.subset_means(pmr.settled(model, subset, config), subset, config)
    assert equal(before, model.state_dict()) and model.training
    with torch.no_grad():
        _, features = model(next(subset.batches(100))[0])
    for m, (means, present) in settled.items():
        labels = next(subset.batches(100))[1]
        expected = pmr.class_means(features[m], labels, 10)[0][present]
        assert (means[present] - expected).norm() < 0.1 * expected.norm()
        raw = pmr.subset_means(model, subset, config)[m][0][present]
        assert (raw - expected).norm() > 0.3 * expected.norm()


# ---- What a run reports and leaves behind ----


def test_summary_is_of_the_last_epoch_and_best_of_the_best(run, tmp_path):
    """The two networks are read out as their checkpoints are, by the right modality."""
    argv = ["--train-samples", "200", "--epochs", "5", "--lr", "0.2"]
    summary = run(*argv, "--method", "pmr")
    folder = folder_of(tmp_path, summary)
    history = history_of(folder)
    scores = [epoch["val"]["accuracy"] for epoch in history]
    assert summary["val"] == history[-1]["val"] and summary["rho"] == history[-1]["train"]["rho"]
    assert summary["best"]["epoch"] == scores.index(max(scores)) < 4
    model, splits, config = prepare(*argv)
    subset = pmr.draw_subset(splits.train, config)
    inputs, labels, _ = next(splits.test.batches(10**6))
    for name, found in (("last.pt", summary["test"]), ("best.pt", summary["best"]["test"])):
        model.load_state_dict(torch.load(folder / name, weights_only=True)["state"]["model"])
        with torch.no_grad():
            logits, features = model.eval()(inputs)
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


def test_a_third_modality_is_refused(run, monkeypatch):
    splits = replace(prepare()[1], modalities=("gray", "color", "depth"))
    monkeypatch.setattr(command_line, "load_dataset", lambda *_, **__: splits)
    with pytest.raises(UserError, match="compare two modalities; digits has 3"):
        run("--method", "pmr")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--alpha -1", "must be a number at least 0, not '-1'"),
        ("--momentum-epsilon 2", "must be a number at least 0 and at most 1, not '2'"),
        ("--subset-fraction 0", "must be a number above 0 and at most 1, not '0'"),
        ("--per-epochs 0.5", "must be a whole number at least 0, not '0.5'"),
        ("--coefficients soft", "invalid choice: 'soft'"),
    ],
)
def test_bad_flags_are_refused(run, capsys, words, sentence):
    with pytest.raises(SystemExit):
        run(*words.split())
    assert sentence in capsys.readouterr().err


# ---- Table 1 ----


@pytest.mark.slow
def test_table1_writes_rows_table_and_figure(flags, tmp_path):
    record = experiments.main(["table1", *flags, "--train-samples", "20"])
    (folder,) = (tmp_path / "pmr" / "digits").glob("table1*")
    written = json.loads((folder / "table.json").read_text())
    assert written == {k: v for k, v in record.items() if k not in ("runs", "results")}
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    expected = [("unimodal-gray", None), ("unimodal-color", None)]
    fusions = ("sum", "concat", "film", "gated")  # as in the paper
    expected += [(m, f) for f in fusions for m in ("joint", "pmr-no-per", "pmr")]
    assert [(row["method"], row["fusion"]) for row in record["rows"]] == expected
    assert [(run["method"], run["fusion"]) for run in record["runs"]] == expected
    assert read_rows(folder / "rows.csv") == record["runs"]
    summary = json.loads(next(tmp_path.glob("pmr/digits/pmr-film*/summary.json")).read_text())
    (run,) = (run for run in record["runs"] if (run["method"], run["fusion"]) == ("pmr", "film"))
    assert run["color prototypes"] == summary["test"]["color"]["prototype"]
    paired = [(row["method"], row["reference"], row["fusion"]) for row in record["paired"]]
    assert paired == [(m, "joint", f) for m in ("pmr", "pmr-no-per") for f in fusions]


def test_restricted_tables_of_other_knobs_stand_in_other_folders(flags, tmp_path):
    for words in ("joint pmr", "joint --alpha 3 --resume", "unimodal-gray --resume"):
        argv = ["table1", *flags, "--fusion", "sum", "--method", *words.split()]
        rows = experiments.main(argv)["rows"]
        names = [m for m in words.split() if m in ("joint", "pmr", "unimodal-gray")]
        assert [row["method"] for row in rows] == names
    folders = sorted(path.name for path in (tmp_path / "pmr" / "digits").glob("table1*"))
    tiny = "train-samples=40-epochs=1"
    named = [f"joint,pmr-{tiny}", f"joint-{tiny}-alpha=3.0", f"unimodal-gray-{tiny}"]
    assert folders == [f"table1-sum-method={name}" for name in named]
    path = tmp_path / "pmr" / "digits" / folders[1] / "table.json"
    arguments = json.loads(path.read_text())["arguments"]
    assert (arguments["method"], arguments["fusion"]) == (["joint"], "sum")


def test_table1_has_the_papers_numbers_for_the_papers_data():
    data = SimpleNamespace(dataset="cg-mnist")
    extend = papers_numbers(SimpleNamespace(args=data, modalities=("gray", "color")))
    rows = [("unimodal-gray", None), ("unimodal-color", None)]
    rows += [(method, "film") for method in ("joint", "pmr-no-per", "pmr")]
    found = [extend({"method": m, "fusion": fusion}, [])["paper"] for m, fusion in rows]
    assert found == [99.3, 60.4, 60.0, None, 76.3]
    data.dataset = "digits"
    assert papers_numbers(SimpleNamespace(args=data, modalities=("gray", "color")))({}, []) == {}
