"""greedy_balance.py from its command line: every option, what it writes, and what it says to bad
input. A whole run is compared with slow versions of Algorithm 1 written from the paper."""

import functools
import json
import math
import re
import statistics
from itertools import groupby
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import EVERY_DATASET
from fake_clips import FROM_FILES
from test_greedy_equations import maps_at_blocks, percent_right, slow_cut_branch
from test_greedy_resume import QuickFigure
from test_pmr import MODALITIES, tensors
from test_training import snapshot, without_seconds

import greedy_balance as greedy
from common import command_line, experiments, figures, metrics, training
from common.datasets import DATASETS, TensorSplit
from common.errors import UserError
from common.seeding import make_generator, seed_phase

CPU = torch.device("cpu")
TINY = ["--train-samples", "40", "--epochs", "2", "--batch-size", "20", "--device", "cpu"]
PAIR = MODALITIES["digits"]
KNOBS = {
    "guided": {"tolerance", "window", "gate_mean"},
    "random": {"gate_mean"},
    "rubi": {"biased"},
}


@pytest.fixture(scope="module", autouse=True)
def quick():
    """Loading, curves and F1 are tested elsewhere; here they would only take time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(command_line, "load_dataset", functools.cache(command_line.load_dataset))
        patch.setattr(training, "draw_curves", QuickFigure)
        patch.setattr(greedy, "macro_f1", lambda *_: 0.0)
        yield


@pytest.fixture
def run(tmp_path, data_root):
    """Run greedy_balance.main on a tiny part of the data, with runs in a temporary folder."""

    def call(*argv):
        return greedy.main([*TINY, "--out", str(tmp_path), "--data-root", str(data_root), *argv])

    return call


def folder_of(out, method, seed=0):
    """The only folder under `out` of a method and seed."""
    (folder,) = out.glob(f"greedy_balance/*/{method}*-seed{seed}")
    return folder


def read(path):
    return json.loads(path.read_text())


def history_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def curated_in(folder):
    """The curated modality of every step of a run."""
    return [m for entry in history_of(folder) for m in entry["steps"]["curated"]]


def prepare(method, *argv):
    """The fresh network of a method, the splits and the configuration."""
    args, _ = greedy.parse_args([*TINY, *argv])
    splits = greedy.load_modalities(args, CPU)
    config = SimpleNamespace(**{**vars(args), "method": method, "seed": 0, "device": CPU})
    return greedy.build_model(config, splits), splits, config


def same(found, expected):
    return found.keys() == expected.keys() and all(
        torch.equal(found[name], expected[name]) for name in expected
    )


def network(folder, name="last.pt"):
    return {k: v for k, v in tensors(folder, name).items() if k.startswith(".model.")}


# ---- Every method, dataset, optimizer, and every other choice ----


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adagrad"])
@pytest.mark.parametrize("dataset", EVERY_DATASET)
def test_every_method_dataset_and_optimizer(run, tmp_path, require, root_of, dataset, optimizer):
    require(dataset)
    modalities = MODALITIES[dataset]
    methods = [*greedy.METHODS, *(f"unimodal-{m}" for m in modalities)]
    flags = ["--dataset", dataset, "--data-root", root_of(dataset), "--optimizer", optimizer]
    result = run(*flags, "--tolerance", "0", "--window", "2", "--method", *methods)
    assert [summary["method"] for summary in result["runs"]] == methods
    for summary in result["runs"]:
        test, method = summary["test"], summary["method"]
        if method.startswith("unimodal-"):
            alone = test[method.removeprefix("unimodal-")]
            assert alone.keys() == {"alone", "probe"} and alone["alone"] == test["accuracy"]
            assert not {"d_speed", "biased"} & summary.keys() and "d_util" not in test
            continue
        for metrics_of in (test, summary["val_iid"], summary["best"]["test"]):
            reads = {"branch", "cut", "u"} | ({"probe"} if metrics_of is test else set())
            assert all(metrics_of[m].keys() == reads for m in modalities)
        assert math.isfinite(summary["d_speed"]) and math.isfinite(summary["best"]["d_speed"])
        assert (summary.get("biased") in modalities) == (method == "rubi")
        curated = set(curated_in(folder_of(tmp_path, method)))
        assert len(curated) == 2 if method == "guided" else curated <= {None, *modalities}
        assert method in ("guided", "random") or curated == {None}


def test_every_dataset_is_tested_here_or_in_test_clips():
    assert {*MODALITIES, *FROM_FILES} == set(DATASETS) == set(greedy.RECIPES)


def test_every_method_in_bfloat16(run):
    methods = [*greedy.METHODS, "unimodal-gray"]
    result = run("--precision", "bf16", "--tolerance", "0", "--method", *methods)
    assert all(math.isfinite(summary["test"]["loss"]) for summary in result["runs"])


# Re-balancing from the second epoch on: R C C, R C C, R C C.
GUIDED = ["--method", "guided", "--train-samples", "60", "--epochs", "4", "--batch-size", "20"]
GUIDED += ["--tolerance", "0", "--window", "2", "--lr", "0.02", "--weight-decay", "0.001"]


DEFAULTS = ["--gate-mean", "after", "--gate-factor", "1", "--l1", "0", "--schedule", "none"]
DEFAULTS += [
    "--until-fitted",
    "--rates",
    "3",
    "--biased",
    "gray",
]  # four epochs do not fit the data


@pytest.fixture(scope="module")
def guided_network(tmp_path_factory):
    out = tmp_path_factory.mktemp("guided")
    greedy.main([*TINY, *GUIDED, "--out", str(out)])
    return network(folder_of(out, "guided"))


@pytest.mark.parametrize(
    ("choice", "changes"),
    [
        (DEFAULTS, False),
        (("--tolerance", "9"), True),
        (("--window", "1"), True),
        (("--gate-mean", "before"), True),
        (("--gate-factor", "2"), True),
        (("--l1", "0.01"), True),
        (("--optimizer", "adam"), True),
        (("--schedule", "step"), True),
        (("--schedule", "cosine"), True),
        (("--precision", "bf16"), True),
        (("--color-variance", "0"), True),
        (("--batch-size", "1000"), True),
        (("--weight-decay", "0"), True),
        (("--lr", "0.05"), True),
        (("--data-seed", "5"), True),
        (("--seeds", "5"), True),
    ],
    ids=lambda value: None if isinstance(value, bool) else " ".join(value),
)
def test_every_other_choice_acts(run, tmp_path, guided_network, choice, changes):
    run(*GUIDED, *choice)
    folder = folder_of(tmp_path, "guided", seed=5 if "--seeds" in choice else 0)
    assert same(network(folder), guided_network) != changes


@pytest.mark.parametrize("method", [*greedy.METHODS, "unimodal-gray"])
def test_knobs_of_other_methods_do_not_count(run, tmp_path, method):
    """Not in the folder's name and not in config.json: such a run is the same run."""
    mine = KNOBS.get(method, set())
    flags = {"tolerance": 0.7, "window": 7, "gate_mean": "before", "biased": "gray"}
    words = [w for knob, x in flags.items() for w in ("--" + knob.replace("_", "-"), str(x))]
    run("--method", method, *words)
    folder = folder_of(tmp_path, method)
    fusion = [] if method == "unimodal-gray" else ["mmtm"]
    named = [f"{k.replace('_', '-')}={x}" for k, x in flags.items() if k in mine]
    common = ["train-samples=40", "epochs=2", "batch-size=20"]
    assert folder.name == "-".join([method, *fusion, *common, *named, "seed0"])
    arguments = read(folder / "config.json")["arguments"]
    assert {k: arguments[k] for k in flags if k in arguments} == {k: flags[k] for k in mine}


def test_knobs_that_count_for_all(run, tmp_path):
    run("--method", "unimodal-gray", "--gate-factor", "2", "--l1", "0.1", "--until-fitted")
    name = folder_of(tmp_path, "unimodal-gray").name
    assert name.endswith("-gate-factor=2.0-l1=0.1-until-fitted=True-seed0")


def test_default_methods():
    chosen = {
        dataset: greedy.choose_methods(SimpleNamespace(method=None, dataset=dataset), modalities)
        for dataset, modalities in MODALITIES.items()
    }
    assert chosen == {
        "digits": ["unimodal-gray", "unimodal-color", "joint", "random", "guided"],
        "av-digits": ["unimodal-audio", "unimodal-visual", "joint", "random", "guided"],
        "cg-mnist": ["guided"],
        "synthetic": ["unimodal-first", "unimodal-second", "joint", "random", "guided"],
        "features": ["unimodal-left", "unimodal-right", "joint", "random", "guided"],
    }


def test_the_papers_hyperparameters():
    args, _ = greedy.parse_args(["--dataset", "cg-mnist"])
    found = (args.batch_size, args.lr, args.optimizer, args.tolerance, args.window)
    assert found == (128, 0.01, "sgd", 0.1, 5)


# ---- What the algorithms promise over a whole run ----

SLOW_RUN = ["--train-samples", "100", "--batch-size", "40", "--epochs", "4", "--schedule", "step"]


def test_joint_equals_a_plain_loop_bit_for_bit(run, tmp_path):
    run("--method", "joint", *SLOW_RUN, "--weight-decay", "0.01")
    model, splits, _ = prepare("joint", *SLOW_RUN)
    inputs, labels, _ = next(splits.train.batches(100))
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9, weight_decay=0.01)
    for epoch in range(4):
        optimizer.param_groups[0]["lr"] = 0.01 if epoch < 0.7 * 4 else 0.001
        generator = seed_phase(0, "train", epoch)
        model.train()
        for batch in torch.randperm(100, generator=generator).split(40):
            logits = model({m: x[batch] for m, x in inputs.items()}).logits
            loss = sum(F.cross_entropy(x, labels[batch]) for x in logits.values())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    saved = network(folder_of(tmp_path, "joint"))
    assert same(saved, {f".model.{name}": x for name, x in model.state_dict().items()})


def slow_forward(model, inputs, curated, seen, config):
    """Logits with Eq. (1) and (2), or (13) for the `curated` branch, and the activations w.

    seen: for each block, modality -> activations (B, C) of the regular steps so far.
    """
    maps, activations = dict(inputs), []
    for i in range(4):
        maps = {m: model.encoders[m].stages[i](x) for m, x in maps.items()}
        if i == 0:
            continue
        g = dict(model.blocks[i - 1].named_parameters())
        h = torch.cat([x.flatten(2).mean(dim=2) for x in maps.values()], dim=1)
        hidden = (h @ g["squeeze.weight"].T + g["squeeze.bias"]).clamp_min(0)
        w = {m: hidden @ g[f"excite.{m}.weight"].T + g[f"excite.{m}.bias"] for m in maps}
        gates = {m: config.gate_factor / (1 + torch.exp(-x)) for m, x in w.items()}
        if curated:
            past = torch.cat(seen[i - 1][curated])
            before = config.gate_mean == "before"
            mean = past.mean(dim=0).sigmoid() if before else past.sigmoid().mean(dim=0)
            gates[curated] = (config.gate_factor * mean).expand_as(w[curated])
        maps = {m: x * gates[m][:, :, None, None] for m, x in maps.items()}
        activations.append({m: x.detach() for m, x in w.items()})
    heads = model.heads
    return {m: heads[m](x.flatten(2).mean(dim=2)) for m, x in maps.items()}, activations


def slow_algorithm_1(model, splits, config, plan=None):
    """Algorithm 1 with SGD by hand, or with re-balancing steps as in `plan`.

    Returns the modality that each step curated, and d after each step.
    """
    count, modalities = len(splits.train), splits.modalities
    inputs, labels, _ = next(splits.train.batches(count))
    parameters = dict(model.named_parameters())
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    own, cross = (dict.fromkeys(modalities, 0.0) for _ in range(2))
    seen = [{m: [] for m in modalities} for _ in model.blocks]
    favoured, left, curated, differences = None, 0, [], []
    for epoch in range(config.epochs):
        generator = seed_phase(config.seed, "train", epoch)
        model.train()
        lr = (
            config.lr / 10
            if config.schedule == "step" and epoch >= 0.7 * config.epochs
            else config.lr
        )
        for batch in torch.randperm(count, generator=generator).split(config.batch_size):
            curated.append(plan[len(curated)] if plan else favoured if left else None)
            part = {m: x[batch] for m, x in inputs.items()}
            logits, activations = slow_forward(model, part, curated[-1], seen, config)
            truth = labels[batch].tolist()
            loss = 0
            for x in logits.values():
                rows = zip(x, truth, strict=True)
                loss = loss - sum(row.log_softmax(0)[y] for row, y in rows) / len(truth)
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            grads = dict(zip(parameters, grads, strict=True))
            if curated[-1] is None:
                for block, w in zip(seen, activations, strict=True):
                    for m in modalities:
                        block[m].append(w[m])
                for m in modalities:
                    own[m] += slow_mu(rf"(encoders|heads)\.{m}\.", parameters, grads)
                    cross[m] += slow_mu(rf"blocks\.\d\.(squeeze|excite\.{m})\.", parameters, grads)
            s = {m: math.log10(cross[m] / own[m]) for m in modalities}
            first, second, *more = s.values()
            d = max(s.values()) - min(s.values()) if more else first - second
            differences.append(d)
            if curated[-1]:
                left -= 1
            elif epoch > 0 and abs(d) > config.tolerance:
                favoured, left = max(s, key=s.get), config.window
            with torch.no_grad():
                for name, g in grads.items():
                    if g is not None:
                        p, v = parameters[name], velocity[name]
                        v.mul_(0.9).add_(g + config.weight_decay * p)
                        p.sub_(lr * v)
    return curated, differences


def smooth(monkeypatch):
    """Put SiLU in the encoders: at the kink of ReLU rounding may grow to a difference in a run."""

    def build_smooth(config, splits):
        model = build(config, splits)
        for stage in [stage for e in model.encoders.values() for stage in e.stages]:
            for name, layer in stage.named_children():
                if isinstance(layer, torch.nn.ReLU):
                    setattr(stage, name, torch.nn.SiLU())
        return model

    build = greedy.build_model
    monkeypatch.setattr(greedy, "build_model", build_smooth)


def slow_mu(pattern, parameters, grads):
    names = [name for name in parameters if re.match(pattern, name)]
    squares = [
        [x[name].double().square().sum().item() for name in names] for x in (grads, parameters)
    ]
    return sum(squares[0]) / sum(squares[1])


def add_depth(monkeypatch):
    """Give digits a third modality. Only with a --data-seed that no other test takes."""

    def load(*args, **dials):
        def deepen(split):
            def render(rows):
                seen = split.render(rows)
                return {**seen, "depth": torch.cat([seen["gray"], 1 - seen["gray"]], dim=1)}

            return TensorSplit(split.tensors, split.all_labels, render, split.index)

        splits = original.load(*args, **dials).map(deepen)
        splits.modalities = (*splits.modalities, "depth")
        return splits

    original = DATASETS["digits"]
    monkeypatch.setitem(DATASETS, "digits", original._replace(load=load))
    return ["--data-seed", "33"]


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize(
    "flags",
    [
        ["--tolerance", "0", "--window", "2"],
        ["--tolerance", "0", "--window", "4", "--gate-mean", "before", "--gate-factor", "2"],
    ],
    ids=["after", "before"],
)
def test_a_whole_guided_run_equals_a_slow_algorithm_1(
    run, tmp_path, monkeypatch, flags, modalities
):
    """Three steps an epoch, the last batch short; windows span epochs and the rate falls."""
    smooth(monkeypatch)
    flags = [*SLOW_RUN, *flags, *(add_depth(monkeypatch) if modalities == 3 else [])]
    run("--method", "guided", *flags)
    folder = folder_of(tmp_path, "guided")
    model, splits, config = prepare("guided", *flags)
    assert len(splits.modalities) == modalities
    curated, differences = slow_algorithm_1(model, splits, config)
    assert curated_in(folder) == curated and len(set(curated)) > 1
    found = [d for entry in history_of(folder) for d in entry["steps"]["d_speed"]]
    assert found == pytest.approx(differences, rel=1e-4)
    assert_close_networks(folder, model)


def assert_close_networks(folder, model):
    saved = network(folder)
    for name, weight in model.state_dict().items():
        torch.testing.assert_close(saved[f".model.{name}"], weight, rtol=1e-4, atol=1e-6)


def test_guided_stays_regular_within_the_tolerance(run, tmp_path, monkeypatch):
    """A tolerance between the largest and the smallest |d| of a run that is joint at first."""
    smooth(monkeypatch)
    run("--method", "joint", *SLOW_RUN)
    late = [d for e in history_of(folder_of(tmp_path, "joint"))[1:] for d in e["steps"]["d_speed"]]
    tolerance = statistics.fmean([abs(d) for d in late])
    flags = [*SLOW_RUN, "--tolerance", str(tolerance), "--window", "2"]
    run("--method", "guided", *flags)
    curated = curated_in(folder_of(tmp_path, "guided"))
    expected, _ = slow_algorithm_1(*prepare("guided", *flags))
    assert curated == expected
    first = next(i for i, d in enumerate(late) if abs(d) > tolerance)
    assert curated.index(next(filter(None, curated))) == 3 + first + 1


def test_a_tolerance_that_is_never_left_gives_joint_training(run, tmp_path):
    run("--method", "joint", "guided", "--tolerance", "99", *SLOW_RUN)
    joint, guided = (folder_of(tmp_path, method) for method in ("joint", "guided"))
    assert same(tensors(guided), tensors(joint))
    assert history_of(guided) == history_of(joint)


@pytest.mark.parametrize("gate_mean", ["after", "before"])
def test_a_whole_random_run_uses_mean_gates(run, tmp_path, monkeypatch, gate_mean):
    smooth(monkeypatch)
    flags = [*SLOW_RUN, "--epochs", "5", "--gate-mean", gate_mean]
    run("--method", "random", *flags)
    folder = folder_of(tmp_path, "random")
    plan = curated_in(folder)
    assert plan[:4] == [None] * 4 and set(plan) == {None, *PAIR}
    model, splits, config = prepare("random", *flags)
    slow_algorithm_1(model, splits, config, plan)
    assert_close_networks(folder, model)


def test_random_draws_other_steps_for_every_seed_and_epoch(run, tmp_path):
    flags = ["--train-samples", "60", "--batch-size", "5", "--epochs", "3"]
    run("--method", "random", "--seeds", "0", "1", *flags)
    plans = [history_of(folder_of(tmp_path, "random", seed)) for seed in (0, 1)]
    epochs = [entry["steps"]["curated"][1:] for plan in plans for entry in plan[1:]]
    assert len(set(map(tuple, epochs))) == 4


def test_history_of_speeds(run, tmp_path):
    """d = s_gray - s_color; what was true after an epoch's last step; still in a window."""
    run(*GUIDED)
    folder = folder_of(tmp_path, "guided")
    for entry in history_of(folder):
        steps = entry["steps"]
        assert len(steps["d_speed"]) == len(steps["curated"]) == 3
        assert entry["d_speed"] == entry["speed"]["gray"] - entry["speed"]["color"]
        assert entry["d_speed"] == steps["d_speed"][-1]
        for before, after, curated in zip(
            steps["d_speed"][:-1], steps["d_speed"][1:], steps["curated"][1:], strict=True
        ):
            assert (before == after) == bool(curated)
    state = torch.load(folder / "last.pt", weights_only=True)["state"]["balance"]
    s = (state["speed.cross"] / state["speed.own"]).log10()
    assert list(entry["speed"].values()) == pytest.approx(s.tolist())
    regular = curated_in(folder).count(None)
    assert state["gate_means.samples"] == 20 * regular < 180


def test_training_never_reads_the_test_split(run, monkeypatch):
    """Test and val_iid are read after the last epoch only: by two networks, whole and cut off."""
    args, _ = greedy.parse_args(TINY)
    splits = greedy.load_modalities(args, CPU)
    pointers = {getattr(splits, name).tensors["color"].data_ptr() for name in ("test", "val_iid")}
    reads, epochs = [], []
    batches, end_epoch = TensorSplit.batches, greedy.Run.end_epoch

    def spy(self, *args, **kwargs):
        if self.tensors["color"].data_ptr() in pointers:
            reads.append(len(epochs))
        return batches(self, *args, **kwargs)

    monkeypatch.setattr(TensorSplit, "batches", spy)
    monkeypatch.setattr(
        greedy.Run, "end_epoch", lambda self, *a: (epochs.append(1), end_epoch(self, *a))
    )
    run("--method", "guided", "--tolerance", "0", "--data-root", "data")
    assert reads == [2] * 9


# ---- RUBi ----


def test_more_used_is_what_adds_more_to_the_other_branch():
    gray_needs_color = {"gray": {"u": 0.4}, "color": {"u": 0.1}}  # u(color | gray) = 0.4
    assert greedy.more_used(gray_needs_color, PAIR) == "color"
    assert greedy.more_used({"gray": {"u": -0.2}, "color": {"u": 0.1}}, PAIR) == "gray"


@pytest.mark.parametrize("duplicate", [[], ["--duplicate", "gray"]])
def test_rubi_asks_the_joint_run_of_the_same_seed(run, tmp_path, monkeypatch, duplicate):
    """Rates are put into the joint runs: gray needs color under seed 0, color gray under 1."""
    first, second = ("gray", "gray-2") if duplicate else PAIR
    run("--method", "joint", "--seeds", "0", "1", *duplicate)
    for seed, rates in ((0, (0.5, 0.25)), (1, (0.25, 0.5))):
        path = folder_of(tmp_path, "joint", seed) / "summary.json"
        summary = read(path)
        summary["val_iid"][first]["u"], summary["val_iid"][second]["u"] = rates
        summary["test"][first]["u"], summary["test"][second]["u"] = rates[::-1]
        path.write_text(json.dumps(summary))
    trained = []
    original = greedy.train
    monkeypatch.setattr(greedy, "train", lambda *a: (trained.append(a[3].method), original(*a)))
    runs = run("--method", "rubi", "--seeds", "0", "1", *duplicate)["runs"]
    assert [summary["biased"] for summary in runs] == [second, first]
    assert trained == ["rubi", "rubi"]  # finished joint runs are not trained again


def test_rubi_with_a_named_modality_is_the_same_run_and_asks_no_other(run, tmp_path):
    found = run("--method", "rubi")["biased"]
    assert (folder_of(tmp_path, "joint") / "summary.json").exists()
    by_default = network(folder_of(tmp_path, "rubi"))
    for m in PAIR:
        run("--method", "rubi", "--biased", m, "--out", str(tmp_path / m))
        folder = folder_of(tmp_path / m, "rubi")
        assert same(network(folder), by_default) == (m == found)
        assert [path.name for path in folder.parent.iterdir()] == [folder.name]


@pytest.mark.slow
def test_rubi_takes_the_modality_with_the_higher_rate(run, tmp_path):
    """With rates that training gave."""
    flags = ["--train-samples", "200", "--epochs", "6", "--lr", "0.05", "--seeds", "0", "1"]
    flags += ["--batch-size", "10"]
    runs = run("--method", "joint", "rubi", *flags)["runs"]
    joint = {run["seed"]: run["val_iid"] for run in runs if run["method"] == "joint"}
    for summary in runs:
        if summary["method"] == "rubi":
            rates = [joint[summary["seed"]][m]["u"] for m in PAIR]  # of color, of gray
            assert rates[0] != rates[1]
            assert summary["biased"] == ("color" if rates[0] > rates[1] else "gray")


def test_rubi_trains_beside_the_network_and_is_left_out_at_test_time(run, tmp_path):
    run("--method", "rubi", "--biased", "color")
    saved = tensors(folder_of(tmp_path, "rubi"))
    assert any(name.startswith(".rubi.mlp") for name in saved)
    plain, _, _ = prepare("rubi")
    in_checkpoint = network(folder_of(tmp_path, "rubi")).keys()
    assert in_checkpoint == {f".model.{name}" for name in plain.state_dict()}


# ---- What a run reports and leaves behind ----


@pytest.fixture(scope="module")
def fitted(tmp_path_factory):
    """A guided run that has learnt something: its folder and flags."""
    out = tmp_path_factory.mktemp("fitted")
    flags = ["--train-samples", "200", "--epochs", "6", "--lr", "0.05", "--batch-size", "10"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "macro_f1", metrics.macro_f1)
        greedy.main([*TINY, *flags, "--method", "guided", "--out", str(out)])
    return folder_of(out, "guided"), flags


@pytest.mark.parametrize("name", ["last.pt", "best.pt"])
@torch.no_grad()
def test_summary_recomputed_from_the_checkpoints(fitted, name):
    folder, flags = fitted
    summary, history = read(folder / "summary.json"), history_of(folder)
    model, splits, _ = prepare("guided", *flags)
    checkpoint = torch.load(folder / name, weights_only=True)["state"]
    model.load_state_dict(checkpoint["model"])
    model.eval()
    scores = [entry["val"]["accuracy"] for entry in history]
    epoch = scores.index(max(scores)) if name == "best.pt" else len(history) - 1
    found = summary["best"] if name == "best.pt" else summary
    assert summary["best"]["epoch"] == scores.index(max(scores))

    inputs, _, _ = next(splits.train.batches(200))
    means = [
        {m: x.mean(dim=(0, 2, 3)) for m, x in maps.items()}
        for maps in maps_at_blocks(model, inputs)
    ]
    for split, numbers in ((splits.test, found["test"]), (splits.val_iid, found["val_iid"])):
        inputs, labels, _ = next(split.batches(10**6))
        logits, rates = model(inputs).logits, []
        for m in PAIR:
            whole = percent_right(logits[m], labels)
            cut = percent_right(slow_cut_branch(model, m, inputs[m], means), labels)
            rates.append((whole - cut) / whole)
            expected = {"branch": whole, "cut": cut, "u": rates[-1]}
            assert {k: numbers[m][k] for k in expected} == pytest.approx(expected)
        assert numbers["d_util"] == pytest.approx(rates[0] - rates[1])
        fused = (logits["gray"] + logits["color"]) / 2
        assert numbers["accuracy"] == pytest.approx(percent_right(fused, labels))
        assert numbers["macro_f1"] == pytest.approx(metrics.macro_f1(fused, labels))
        loss = sum(F.cross_entropy(x, labels).item() for x in logits.values())
        assert numbers["loss"] == pytest.approx(loss, rel=1e-4)
    assert found["d_speed"] == history[epoch]["d_speed"]
    sums = checkpoint["balance"]
    gray, color = (sums["speed.cross"] / sums["speed.own"]).log10().tolist()
    assert found["d_speed"] == pytest.approx(gray - color)
    if name == "last.pt":
        assert rates[0] != rates[1] and summary["epochs"] == 6
        assert summary["speed"] == pytest.approx({"gray": gray, "color": color})
        weights = [x for p in model.parameters() for x in p.flatten().tolist()]
        small = sum(abs(x) < 1e-3 for x in weights) / len(weights)
        assert summary["sparsity"] == pytest.approx(small) and small > 0


def test_predictions_belong_to_the_last_network(fitted):
    folder, flags = fitted
    saved = np.load(folder / "predictions.npz")
    model, splits, _ = prepare("guided", *flags)
    model.load_state_dict(torch.load(folder / "last.pt", weights_only=True)["state"]["model"])
    inputs, labels, index = next(splits.test.batches(10**6))
    with torch.no_grad():
        logits = model.eval()(inputs).logits
    assert set(saved) == {"index", "label", "logits", "logits_gray", "logits_color"}
    for m in PAIR:
        np.testing.assert_allclose(saved[f"logits_{m}"], logits[m], rtol=1e-4, atol=1e-5)
    mean = (saved["logits_gray"] + saved["logits_color"]) / 2
    np.testing.assert_allclose(saved["logits"], mean, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(saved["label"], labels)
    np.testing.assert_array_equal(saved["index"], index)


def test_eval_only_reports_the_same_and_writes_nothing(run, tmp_path):
    methods = ["guided", "random", "rubi", "unimodal-gray"]
    flags = ["--method", *methods, "--tolerance", "0"]
    before = run(*flags)["runs"]
    files = snapshot(tmp_path)
    again = run(*flags, "--eval-only")["runs"]
    assert [without_seconds(x) for x in again] == [without_seconds(x) for x in before]
    assert snapshot(tmp_path) == files


def test_finished_runs_are_reused(run, monkeypatch):
    first = run("--method", "guided")
    trained = []
    original = greedy.train
    monkeypatch.setattr(greedy, "train", lambda *a: (trained.append(a[3].seed), original(*a)))
    result = run("--method", "guided", "guided", "--seeds", "0", "1", "0")
    assert trained == [1] and result["runs"][0] == first
    (row,) = result["table"]
    assert row["test"]["n"] == 2


def test_overwrite_trains_every_run_once(run, monkeypatch):
    """Also the joint run that rubi asks."""
    trained = []
    original = greedy.train
    monkeypatch.setattr(greedy, "train", lambda *a: (trained.append(a[3].method), original(*a)))
    for _ in range(2):
        run("--method", "joint", "rubi", "--overwrite")
    assert trained == 2 * ["joint", "rubi"]


def test_until_fitted_stops_at_100_percent_of_the_training_data(run, tmp_path):
    """The last epoch is the first with 100 %; --resume after a kill at the end adds none."""
    words = ["--method", "joint", "--train-samples", "20", "--optimizer", "adam", "--epochs", "60"]
    summary = run(*words, "--until-fitted")
    folder = folder_of(tmp_path, "joint")
    shares = [entry["train"]["accuracy"] for entry in history_of(folder)]
    assert shares.index(100) == len(shares) - 1 == summary["epochs"] - 1 < 59
    network_then = network(folder)
    for name in ("summary.json", "predictions.npz", "curves.png"):
        (folder / name).unlink()
    again = run(*words, "--until-fitted", "--resume")
    assert without_seconds(again) == without_seconds(summary)
    assert same(network(folder), network_then)
    run(*words, "--epochs", str(len(shares)), "--out", str(tmp_path / "fixed"))
    assert same(network(folder_of(tmp_path / "fixed", "joint")), network_then)


def test_duplicate_trains_on_one_modality_twice(run, tmp_path):
    result = run("--method", "joint", "guided", "unimodal-gray-2", "--duplicate", "gray")
    assert result["runs"][0]["test"].keys() >= {"gray", "gray-2"}
    assert [title for title in result["table"][0] if title.startswith("u(")] == [
        "u(gray-2|gray)",
        "u(gray|gray-2)",
    ]
    assert "-duplicate=gray-" in folder_of(tmp_path, "joint").name
    args, _ = greedy.parse_args([*TINY, "--duplicate", "color"])
    splits = greedy.load_modalities(args, CPU)
    whole = greedy.load_modalities(greedy.parse_args(TINY)[0], CPU)
    for name in splits.NAMES:
        inputs, labels, index = next(getattr(splits, name).batches(7))
        original, *expected = next(getattr(whole, name).batches(7))
        assert list(inputs) == ["color", "color-2"] == list(splits.modalities)
        assert all(torch.equal(x, original["color"]) for x in inputs.values())
        assert all(map(torch.equal, (labels, index), expected))


def test_both_copies_see_the_same_augmentation():
    args, _ = greedy.parse_args([*TINY, "--dataset", "synthetic", "--duplicate", "second"])
    train = greedy.load_modalities(args, CPU).train
    assert train.augmented
    plain, _, _ = next(train.batches(7))
    inputs, _, _ = next(train.batches(7, make_generator(0), augment=True))
    assert list(inputs) == ["second", "second-2"]
    assert torch.equal(inputs["second"], inputs["second-2"])
    assert not torch.equal(inputs["second"].sort(dim=0)[0], plain["second"].sort(dim=0)[0])


def test_the_default_is_a_comparison_with_a_table(run, capsys):
    result = run()
    methods = ["unimodal-gray", "unimodal-color", "joint", "random", "guided"]
    assert [row["method"] for row in result["table"]] == methods
    out = capsys.readouterr().out
    assert all(re.search(rf"^{method} ", out, re.MULTILINE) for method in methods)
    assert re.search(r"^Runs: .*greedy_balance/digits$", out, re.MULTILINE)


# ---- Three modalities ----


def test_three_modalities(run, tmp_path, monkeypatch):
    flags = [*add_depth(monkeypatch), "--tolerance", "0", "--biased", "depth"]
    methods = [*greedy.METHODS, "unimodal-depth"]
    result = run(*flags, "--method", *methods)
    assert [summary["method"] for summary in result["runs"]] == methods
    for summary, row in zip(result["runs"][:-1], result["table"][:-1], strict=True):
        rates = [summary["test"][m]["u"] for m in ("gray", "color", "depth")]
        assert summary["test"]["d_util"] == max(rates) - min(rates)
        speeds = summary["speed"].values()
        assert summary["d_speed"] == max(speeds) - min(speeds) > 0
        titles = [title for title in row if title.startswith("u(")]
        assert titles == ["u(color depth|gray)", "u(gray depth|color)", "u(gray color|depth)"]
    assert set(curated_in(folder_of(tmp_path, "guided"))) > {None}
    with pytest.raises(UserError, match="Of 3 modalities, name the biased one by --biased"):
        run(*flags[:2], "--method", "rubi")


# ---- curves.png ----


def spans(axis):
    """(from, to, color) of the shaded parts of an axis."""
    found = []
    for patch in axis.patches:
        box = patch.get_patch_transform().transform_path(patch.get_path()).get_extents()
        found.append((box.x0, box.x1, patch.get_facecolor()[:3]))
    return found


def test_curves_shade_the_windows_and_plot_d_speed():
    curated = [None, "gray", "gray", None, "color", "gray", None]
    d_speed = [0.1, 0.2, 0.2, -0.3, -0.3, -0.3, 0.4]
    panels = {"accuracy (%)": {"train": [10, 20], "validation": [5, 6]}}
    figure = figures.draw_curves("a run", panels, {"d_speed": d_speed, "curated": curated})
    accuracies, steps = figure.axes
    assert [list(line.get_ydata()) for line in accuracies.lines] == [[10, 20], [5, 6]]
    (line,) = steps.lines
    assert list(line.get_xdata()) == [1, 2, 3, 4, 5, 6, 7]
    assert list(line.get_ydata()) == d_speed
    shaded = spans(steps)
    assert [(x0, x1) for x0, x1, _ in shaded] == [(1.5, 3.5), (4.5, 5.5), (5.5, 6.5)]
    gray, color, gray_again = (rgb for _, _, rgb in shaded)
    assert gray == gray_again != color
    labels = [text.get_text() for text in steps.get_legend().get_texts()]
    assert sorted(labels) == ["color curated", "d_speed", "gray curated"]


def test_a_run_draws_its_own_steps_and_accuracies(run, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(training, "draw_curves", lambda *a: (drawn.append(a), QuickFigure())[1])
    run(*GUIDED)
    run("--method", "unimodal-gray")
    (_, panels, steps), (_, alone, none) = drawn
    history = history_of(folder_of(tmp_path, "guided"))
    assert steps["curated"] == curated_in(folder_of(tmp_path, "guided"))
    assert [bool(m) for m, _ in groupby(steps["curated"])] == 3 * [False, True]
    assert steps["d_speed"] == [d for entry in history for d in entry["steps"]["d_speed"]]
    assert panels["accuracy (%)"] == {
        "train": [entry["train"]["accuracy"] for entry in history],
        "validation": [entry["val"]["accuracy"] for entry in history],
        **{f"{m} branch": [entry["val"][m]["branch"] for entry in history] for m in PAIR},
    }
    assert none is None and list(alone["accuracy (%)"]) == ["train", "validation"]


# ---- Experiments ----


def small_grids(monkeypatch):
    monkeypatch.setattr(greedy, "L1_GRID", [{"l1": 0.0}, {"l1": 0.01}])
    monkeypatch.setattr(greedy, "TOLERANCES", (0.01, 1.0))
    monkeypatch.setattr(greedy, "WINDOWS", (1, 3))


def record_of(tmp_path, experiment):
    (folder,) = tmp_path.glob(f"greedy_balance/*/{experiment}*")
    return read(folder / "table.json"), folder


TABLE1 = ["unimodal-gray", "unimodal-color", "joint", "rubi", "random", "guided"]
SWEPT = ["joint", "random", "guided"]
PAIRED = [("random", "joint"), ("guided", "joint"), ("guided", "random")]


@pytest.mark.parametrize(
    ("experiment", "methods", "parts"),
    [
        ("table1", TABLE1, 1),
        ("sweep", SWEPT, 2),
        ("l1", ["joint"], 2),
        ("sensitivity", ["guided"], 4),
    ],
)
def test_every_experiment_end_to_end(run, tmp_path, monkeypatch, experiment, methods, parts):
    small_grids(monkeypatch)
    flags = ["--epochs", "1", "--seeds", "0", "1", "--rates", "2", "--experiment", experiment]
    result = run(*flags)
    record, folder = record_of(tmp_path, experiment)
    assert (folder / "figure.png").read_bytes().startswith(b"\x89PNG")
    assert record["rows"] == result["table"] and record["runs"] == result["runs"]
    assert len(result["runs"]) == parts * len(methods) * 2
    rows = 1 if experiment == "sweep" else parts
    assert [row["method"] for row in record["rows"]] == rows * methods
    assert record["arguments"]["seeds"] == [0, 1] and record["arguments"]["method"] == methods
    trained = [path.parent.name for path in tmp_path.glob("greedy_balance/digits/*/summary.json")]
    assert len(trained) == len(result["runs"]), "every run has its own folder"


def test_sweep_of_a_duplicated_modality_for_one_method(run, tmp_path):
    flags = ["--epochs", "1", "--rates", "2", "--duplicate", "gray", "--method", "joint"]
    result = run("--experiment=sweep", *flags)
    record, folder = record_of(tmp_path, "sweep")
    assert "duplicate=gray" in folder.name and record["arguments"]["duplicate"] == "gray"
    (row,) = result["table"]
    assert row["method"] == "joint" and {"u(gray-2|gray)", "u(gray|gray-2)"} < row.keys()
    assert all("gray-2" in run["test"] for run in result["runs"]) and len(result["runs"]) == 2


def test_tables_of_other_knobs_stand_in_other_folders(run, tmp_path, monkeypatch):
    small_grids(monkeypatch)
    monkeypatch.setattr(greedy, "run_method", made_up)
    for flags in ([], ["--gate-factor", "2"]):
        run("--experiment", "l1", *flags)
    assert len(list(tmp_path.glob("greedy_balance/digits/l1*/table.json"))) == 2


def made_up(args, defaults, method, seed, splits, device):
    """In place of a run: a summary with numbers of its own for every part of a grid."""
    key = (method, seed, args.lr, args.l1, args.tolerance, args.window)
    draw = iter((2 * torch.rand(20, generator=make_generator(*key)) - 1).tolist())
    fusion = None if method.startswith("unimodal-") else "mmtm"
    rates = {m: {"branch": 50 + 50 * next(draw), "u": next(draw)} for m in splits.modalities}
    test = {"accuracy": 50 + 50 * next(draw), **rates, "d_util": next(draw)}
    named = {"dataset": args.dataset, "method": method, "seed": seed, "epochs": args.epochs}
    summary = {**named, "fusion": fusion, "test": test, "best": {"test": {"accuracy": 1.0}}}
    if not fusion:
        summary["test"] = {"accuracy": test["accuracy"]}
        return summary
    extra = {"d_speed": next(draw), "sparsity": next(draw), "val_iid": {"d_util": next(draw)}}
    return {**summary, **extra, "of": key}


@pytest.fixture
def made_up_runs(run, tmp_path, monkeypatch):
    """Function: run an experiment on made-up runs; returns its record and its figure."""
    small_grids(monkeypatch)
    drawn = []
    monkeypatch.setattr(greedy, "run_method", made_up)
    monkeypatch.setattr(experiments, "write_figure", lambda path, figure: drawn.append(figure))

    def call(experiment, *flags):
        run("--experiment", experiment, "--seeds", "0", "1", *flags)
        return record_of(tmp_path, experiment)[0], drawn[-1]

    return call


def runs_of(record, **wanted):
    """Made-up runs with these knobs."""
    names = ("method", "seed", "lr", "l1", "tolerance", "window")
    return [
        run
        for run in record["runs"]
        if "of" in run and wanted.items() <= dict(zip(names, run["of"], strict=True)).items()
    ]


def mean_std(values):
    return pytest.approx({"mean": statistics.fmean(values), "std": statistics.stdev(values)})


def pick(cell):
    return {key: cell[key] for key in ("mean", "std")}


def test_table1_draws_its_rows(made_up_runs):
    record, figure = made_up_runs("table1")
    for row in record["rows"]:
        accuracies = [r["test"]["accuracy"] for r in record["runs"] if r["method"] == row["method"]]
        assert pick(row["test"]) == mean_std(accuracies) and row["test"]["n"] == 2
        speeds = [run["d_speed"] for run in runs_of(record, method=row["method"])]
        assert row["fusion"] is None if not speeds else pick(row["d_speed"]) == mean_std(speeds)
        if speeds:
            sizes = [abs(run["test"]["d_util"]) for run in runs_of(record, method=row["method"])]
            assert pick(row["|d_util|"]) == mean_std(sizes)
    (axis,) = figure.axes
    assert [bar.get_height() for bar in axis.patches] == [
        row["test"]["mean"] for row in record["rows"]
    ]
    found = {(row["method"], row["reference"]): row["mean"] for row in record["paired"]}
    assert list(found) == PAIRED
    for (method, reference), mean in found.items():
        ours, theirs = (
            [run["test"]["accuracy"] for run in runs_of(record, method=m)]
            for m in (method, reference)
        )
        assert mean == pytest.approx(statistics.fmean(ours) - statistics.fmean(theirs))


def test_sweep_pools_and_draws_every_run(made_up_runs):
    record, figure = made_up_runs("sweep", "--rates", "3")
    rates = experiments.log_uniform(3, *greedy.RATES)
    assert len(set(rates)) == 3 and all(1e-3 <= rate <= 1e-1 for rate in rates)
    paths = {
        "test.d_util": lambda r: r["test"]["d_util"],
        "val_iid.d_util": lambda r: r["val_iid"]["d_util"],
        "d_speed": lambda r: r["d_speed"],
    }
    values = {
        path: {m: [get(run) for run in runs_of(record, method=m)] for m in SWEPT}
        for path, get in paths.items()
    }
    for row in record["rows"]:
        util, iid, speed = (values[path][row["method"]] for path in paths)
        assert len(set(util)) == 6  # three rates, two seeds
        assert pick(row["d_util"]) == mean_std(util) and pick(row["d_speed"]) == mean_std(speed)
        assert pick(row["d_util (iid)"]) == mean_std(iid)
        assert pick(row["|d_speed|"]) == mean_std([abs(x) for x in speed])
        for title, other in (("r(d_speed, d_util)", util), ("r(d_speed, d_util iid)", iid)):
            assert row[title] == pytest.approx(statistics.correlation(speed, other), abs=0.005)
    assert [axis.get_ylabel() for axis in figure.axes] == list(paths)
    for axis, by_method in zip(figure.axes, values.values(), strict=True):
        assert [label.get_text() for label in axis.get_xticklabels()] == SWEPT
        (*points,) = (c for c in axis.collections if len(c.get_offsets()) == 6)
        drawn = [c.get_offsets()[:, 1].tolist() for c in points]
        assert drawn == [pytest.approx(by_method[m]) for m in SWEPT]


def test_paired_differences_of_a_sweep_count_every_run(made_up_runs):
    """Runs that are compared differ in the method alone."""
    record, _ = made_up_runs("sweep", "--rates", "3")
    for row in record["paired"]:
        ours, theirs = (
            [run["test"]["accuracy"] for run in runs_of(record, method=row[key])]
            for key in ("method", "reference")
        )
        difference = statistics.fmean(ours) - statistics.fmean(theirs)
        assert (row["n"], row["mean"]) == (6, pytest.approx(difference))


def trend(axis):
    """x and y of an axis with one line and its error bars."""
    (container,) = axis.containers
    line = container.lines[0]
    return dict(zip(line.get_xdata(), line.get_ydata(), strict=True))


def test_l1_draws_its_rows_against_lambda(made_up_runs):
    record, figure = made_up_runs("l1")
    columns = ["sparsity", "|d_util|", "|d_speed|", "test"]
    assert [row["l1"] for row in record["rows"]] == [0, 0.01]
    for row in record["rows"]:
        assert list(row)[-4:] == columns
        runs = runs_of(record, l1=row["l1"])
        assert pick(row["sparsity"]) == mean_std([run["sparsity"] for run in runs])
        assert pick(row["|d_speed|"]) == mean_std([abs(run["d_speed"]) for run in runs])
    assert [axis.get_ylabel() for axis in figure.axes] == columns
    for axis in figure.axes:
        means = {row["l1"]: row[axis.get_ylabel()]["mean"] for row in record["rows"]}
        assert axis.get_xlabel() == "l1" and trend(axis) == means


def test_sensitivity_draws_its_rows_against_either_knob(made_up_runs):
    record, figure = made_up_runs("sensitivity")
    columns = ["test", "d_util", "d_speed"]
    parts = [(row["tolerance"], row["window"]) for row in record["rows"]]
    assert parts == [(0.01, 5), (1.0, 5), (0.1, 1), (0.1, 3)]
    for row in record["rows"]:
        runs = runs_of(record, tolerance=row["tolerance"], window=row["window"])
        assert pick(row["d_speed"]) == mean_std([run["d_speed"] for run in runs])
    panels = [(knob, column) for knob in ("tolerance", "window") for column in columns]
    assert [(axis.get_xlabel(), axis.get_ylabel()) for axis in figure.axes] == panels
    for axis, (knob, column) in zip(figure.axes, panels, strict=True):
        rows = record["rows"][:2] if knob == "tolerance" else record["rows"][2:]
        assert trend(axis) == {row[knob]: row[column]["mean"] for row in rows}


def test_grids():
    assert len(greedy.L1_GRID) == 10 and greedy.L1_GRID[0] == {"l1": 0.0}
    args, _ = greedy.parse_args([])
    assert args.tolerance in greedy.TOLERANCES and args.window in greedy.WINDOWS
    assert len(experiments.log_uniform(args.rates, *greedy.RATES)) == 20


def test_runs_that_stop_at_different_epochs_are_paired(made_up_runs, monkeypatch):
    """As they do under --until-fitted."""

    def stopped(args, defaults, method, seed, *rest):
        return {**made_up(args, defaults, method, seed, *rest), "epochs": 5 * seed + len(method)}

    monkeypatch.setattr(greedy, "run_method", stopped)
    record, _ = made_up_runs("table1", "--until-fitted")
    assert [(row["method"], row["reference"]) for row in record["paired"]] == PAIRED
    assert [row["n"] for row in record["paired"]] == [2, 2, 2]


@pytest.mark.parametrize("experiment", ["sweep", "l1", "sensitivity"])
def test_experiments_take_a_uni_modal_method_beside_another(made_up_runs, experiment):
    """It has no d_util and no d_speed, and no say in the figure."""
    record, _ = made_up_runs(experiment, "--method", "joint", "unimodal-gray")
    assert {row["method"] for row in record["rows"]} == {"joint", "unimodal-gray"}


def test_trends_of_two_methods_are_both_drawn(made_up_runs):
    record, figure = made_up_runs("l1", "--method", "joint", "guided")
    (axis,) = (axis for axis in figure.axes if axis.get_ylabel() == "test")
    drawn = [container.lines[0].get_ydata().tolist() for container in axis.containers]
    assert drawn == [
        [row["test"]["mean"] for row in record["rows"] if row["method"] == m]
        for m in ("joint", "guided")
    ]


def test_table1_shows_the_papers_numbers_on_the_papers_data(made_up_runs, require):
    require("cg-mnist")
    record, _ = made_up_runs("table1", "--dataset", "cg-mnist")
    found = {row["method"]: row["accuracy (paper)"] for row in record["rows"]}
    assert found == {
        "unimodal-gray": "99.14",
        "unimodal-color": None,
        "joint": "45.26",
        "rubi": "44.79",
        "random": "74.07",
        "guided": "91.01",
    }


# ---- Bad input ----


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--window", "0"], "must be a whole number at least 1, not '0'"),
        (["--window", "1.5"], "must be a whole number at least 1, not '1.5'"),
        (["--tolerance", "-1"], "must be a number at least 0, not '-1'"),
        (["--tolerance", "nan"], "must be a number at least 0, not 'nan'"),
        (["--gate-mean", "middle"], "invalid choice: 'middle'"),
        (["--gate-factor", "0"], "must be a number above 0, not '0'"),
        (["--l1", "-0.1"], "must be a number at least 0, not '-0.1'"),
        (["--rates", "0"], "must be a whole number at least 1, not '0'"),
        (["--fusion", "concat"], "invalid choice: 'concat'"),
        (["--experiment", "table9"], "invalid choice: 'table9'"),
        (["--dup", "gray"], "unrecognized arguments"),
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
        (
            ["--method", "guide"],
            "no method 'guide' for digits; choose from joint, rubi, random, guided",
        ),
        (["--method", "unimodal-audio"], "choose from"),
        (["--method", "unimodal-color", "--duplicate", "gray"], "unimodal-gray, unimodal-gray-2"),
        (
            ["--biased", "nonsense"],
            "no modality 'nonsense' in digits for --biased; choose from gray",
        ),
        (
            ["--duplicate", "depth"],
            "no modality 'depth' in digits for --duplicate; choose from gray",
        ),
        (["--duplicate", "gray", "--biased", "gray"], "leave out --biased"),
        (["--experiment", "sweep", "--lr", "0.1"], "leave out --lr"),
        (["--experiment", "l1", "--l1", "0.1"], "leave out --l1"),
        (["--audio-snr", "3"], "digits has no dial --audio-snr"),
        (["--method", "guided", "--eval-only"], "holds no run; train it first"),
        (["--method", "rubi", "--eval-only"], "holds no run; train it first"),
        (["--experiment", "sweep", "--method", "guide"], "no method 'guide'"),
        (["--experiment", "sweep", "--duplicate", "depth"], "no modality 'depth'"),
    ],
)
def test_bad_requests_are_one_sentence(run, argv, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)) as error:
        run(*argv)
    assert "\n" not in str(error.value)


def write_features(path, modalities, samples=41):
    """A .npz file of random vectors; one sample is left over after batches of 20."""
    arrays = {f"{part}_labels": np.arange(samples) % 3 for part in ("train", "val", "test")}
    for part in ("train", "val", "test"):
        arrays |= {f"{part}_{m}": np.random.rand(samples, 4) for m in modalities}
    np.savez(path, **arrays)
    return ["--dataset", "features", "--data-root", str(path), "--train-samples", str(samples)]


def test_one_modality_has_nothing_to_balance(run, tmp_path):
    flags = write_features(tmp_path / "one.npz", ["a"])
    for method in (*greedy.METHODS, None):
        with pytest.raises(UserError, match=r"one modality, .*; use --method unimodal-a"):
            run(*flags, *(["--method", method] if method else []))
    assert run(*flags, "--method", "unimodal-a")["test"]["a"].keys() == {"alone", "probe"}


def test_a_last_batch_of_one_vector(run, tmp_path):
    result = run(*write_features(tmp_path / "two.npz", ["a", "b"]), "--method", "guided")
    assert math.isfinite(result["d_speed"])


@pytest.mark.parametrize("method", ["joint", "random", "guided", "rubi", "unimodal-gray"])
def test_a_huge_rate_ends_in_a_sentence(run, method):
    """NaN speeds and gates on the way change nothing about that."""
    with pytest.raises(UserError, match=r"The loss of .* became (nan|inf) in epoch \d; .*--lr"):
        run("--method", method, "--lr", "1e30", "--tolerance", "0", "--biased", "gray")
