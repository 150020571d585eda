"""baselines.py: its rules against hand calculations and slow versions, and whole runs."""

import copy
import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import EVERY_DATASET, UNLISTED
from fake_clips import FROM_FILES
from test_pmr import MODALITIES, TINY, equal, folder_of, history_of, no_probes, quick, tensors  # noqa: F401

import baselines
import pmr
from baselines import RULES, blend_weights, ogm_coefficients
from common.datasets import DATASETS, TensorSplit
from common.errors import UserError
from common.networks.encoders import CNN, MLP
from common.networks.fusion import FUSIONS
from common.networks.multimodal import MultimodalNet
from common.run import Run

FUSED = [m for m in baselines.METHODS if m != "unimodal"]
SETTINGS = {"num_classes": 3, "ogm_alpha": 0.3, "drop_probability": 0.3, "seed": 0}


@pytest.fixture
def run(tmp_path, data_root):
    tiny = [*TINY, "--out", str(tmp_path), "--data-root", str(data_root)]
    return lambda *argv: baselines.main([*tiny, *argv])


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def vectors(dims=(5, 4), batch_norm=False, count=30, fusion="concat"):
    """A network for vectors m0, m1, ..., and a split of noise in which the labels show."""
    encoders = {f"m{i}": MLP(dim, dim=6, hidden=8) for i, dim in enumerate(dims)}
    if batch_norm:
        for encoder in encoders.values():
            encoder.stages[0].insert(1, nn.BatchNorm1d(8))
    model = MultimodalNet(encoders, FUSIONS[fusion](dict.fromkeys(encoders, 6), 3))
    rows = {m: torch.randn(count, dim) for m, dim in zip(encoders, dims, strict=True)}
    labels = sum(x[:, :3] for x in rows.values()).argmax(dim=1)
    return model, TensorSplit(rows, labels, dict)


def images(fusion="sum"):
    """A network of convolutions with BatchNorm, and a batch for it."""
    shapes = {"gray": 1, "color": 3}
    encoders = {m: CNN(c, dim=8, batch_norm=True, first_pool=False) for m, c in shapes.items()}
    model = MultimodalNet(encoders, FUSIONS[fusion](dict.fromkeys(encoders, 8), 3))
    return model, TensorSplit(
        {m: torch.rand(16, c, 8, 8) for m, c in shapes.items()}, torch.randint(3, (16,)), dict
    )


def rule_of(method, model, **settings):
    return RULES[method](model, SimpleNamespace(**SETTINGS | settings))


def whole(split):
    inputs, labels, _ = next(split.batches(len(split)))
    return inputs, labels


# ---- The losses of joint training, auxiliary cross-entropies and Gradient-Blending ----


@pytest.mark.parametrize(
    ("method", "weights"),
    [("joint", (0, 0, 1)), ("aux-ce", (1, 1, 1)), ("g-blending", (0.2, 0.5, 0.3))],
)
def test_the_loss_is_a_weighted_sum_of_cross_entropies(method, weights):
    model, data = vectors()
    rule = rule_of(method, model)
    inputs, labels = whole(data)
    logits, features = model(inputs)
    expected = weights[2] * F.cross_entropy(logits, labels)
    if method == "g-blending":
        rule.weights.copy_(torch.tensor(weights))
    if method != "joint":
        assert rule.state_dict().keys() > {"weights", "heads.m0.weight", "heads.m1.bias"}
        for weight, (m, head) in zip(weights, rule.heads.items(), strict=False):
            alone = features[m] @ head.weight.T + head.bias
            expected = expected + weight * F.cross_entropy(alone, labels)
    loss = rule.loss(logits, features, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    trained = dict(model.named_parameters()) | dict(rule.named_parameters())
    gradients = {name: p.grad.clone() for name, p in trained.items()}
    rule.change_gradients(model, features, labels)
    assert all(gradients[name].any() for name in trained)
    assert all(torch.equal(gradients[name], p.grad) for name, p in trained.items())


# ---- The weights of Gradient-Blending ----


@pytest.mark.parametrize(
    ("gains", "overfits", "weights"),
    [
        ((1, 2), (1, 2), (2 / 3, 1 / 3)),
        ((1, 2), (-1, 2), (2 / 3, 1 / 3)),
        ((1, 1, 2), (1, 1, 1), (0.25, 0.25, 0.5)),
        ((3, -5), (1, 1), (1, 0)),  # the held-out loss rose
        ((3, 0), (1, 1e-9), (1, 0)),
        ((-1, -2), (1, 1), (0.5, 0.5)),
        ((0, 0, 0), (0, 0, 0), (1 / 3, 1 / 3, 1 / 3)),
        ((1, 1), (0, 1e-7), (0.5, 0.5)),  # O counts as 1e-4 at least
    ],
)
def test_blend_weights_by_hand(gains, overfits, weights):
    assert blend_weights(gains, overfits) == pytest.approx(weights)


def slow_blend(model, heads, data, held_out, epochs):
    """w_i by three trainings with SGD by hand: one for each modality, one for the fused loss."""

    def loss_of(parts, i, index):
        network, own = parts
        z = {m: network.encoders[m](x[index]) for m, x in data.tensors.items()}
        out = own[f"m{i}"](z[f"m{i}"]) if i < 2 else network.fusion(z)
        losses = [-x.log_softmax(0)[y] for x, y in zip(out, data.all_labels[index], strict=True)]
        return sum(losses) / len(losses)

    kept = torch.tensor([i for i in range(len(data)) if i not in held_out.tolist()])
    scores = []
    for i in range(3):
        parts = nn.ModuleList(copy.deepcopy((model, heads)))
        parameters, seen = list(parts.parameters()), []
        velocity = [torch.zeros_like(p) for p in parameters]
        for epoch, batches in enumerate([*epochs, []]):
            if epoch in (0, len(epochs)):
                with torch.no_grad():
                    parts.eval()
                    seen.append([loss_of(parts, i, part).item() for part in (kept, held_out)])
            parts.train()
            for index in batches:
                gradients = torch.autograd.grad(
                    loss_of(parts, i, index), parameters, allow_unused=True
                )
                with torch.no_grad():
                    for p, g, v in zip(parameters, gradients, velocity, strict=True):
                        if g is not None:
                            p.sub_(0.1 / (1 + epoch) * v.mul_(0.9).add_(g))
        (train, val), (train_after, val_after) = seen
        overfit = (val_after - train_after) - (val - train)
        scores.append(max(val - val_after, 0) / overfit**2)
    return [score / sum(scores) for score in scores]


class FakeRun:
    """`shuffled` as a run gives it, with a learning rate that falls; keeps what was asked for."""

    def __init__(self):
        self.log = []

    def shuffled(self, split, phase, epoch, optimizers):
        optimizers[0].param_groups[0]["lr"] = 0.1 / (1 + epoch)
        self.log.append((phase, epoch))
        return split.batches(8, torch.Generator().manual_seed(epoch))


@pytest.mark.parametrize("batch_norm", [False, True])
def test_estimated_weights_equal_slow_ones_and_only_copies_are_trained(batch_norm):
    model, data = vectors(batch_norm=batch_norm, count=100)
    rule = rule_of("g-blending", model)
    config = SimpleNamespace(**SETTINGS, optimizer="sgd", lr=0.1, momentum=0.9, weight_decay=0)
    config.device, config.precision = torch.device("cpu"), "fp32"
    seen, held_out = baselines.hold_out(data, config)
    orders = [
        [index for _, _, index in seen.batches(8, torch.Generator().manual_seed(epoch))]
        for epoch in range(3)
    ]
    expected = slow_blend(model, rule.heads, data, held_out.index, orders)
    before, run = copy.deepcopy((model.state_dict(), rule.state_dict())), FakeRun()
    found = baselines.estimate(run, model, rule, seen, held_out, range(3), config)
    assert found == pytest.approx(expected, rel=1e-3)
    assert max(expected) < 0.99 and min(expected) > 0  # a case that tells something
    assert run.log == [("blend", epoch) for epoch in range(3)] * 3
    assert equal(before[0], model.state_dict()) and equal(before[1], rule.state_dict())


def test_a_tenth_is_held_out_and_another_for_each_seed():
    _, data = vectors(count=50)
    parts = [baselines.hold_out(data, SimpleNamespace(seed=seed)) for seed in (0, 1)]
    (seen, held_out), (_, other) = [[part.index.tolist() for part in pair] for pair in parts]
    assert len(held_out) == 5 and sorted(seen + held_out) == list(range(50))
    assert set(held_out) != set(other)


@pytest.mark.parametrize(
    ("flags", "spans"),
    [
        ("", {0: range(0, 5)}),
        ("--blend online --super-epoch 2", {0: range(0, 2), 2: range(2, 4), 4: range(4, 5)}),
    ],
)
def test_when_weights_are_estimated_and_that_nothing_is_trained_on_what_is_held_out(
    run, tmp_path, monkeypatch, flags, spans
):
    """Trial runs last as long as their weights, at the learning rates of those epochs."""
    estimates, trained, rates = {}, [], []
    estimate, batches, shuffled = baselines.estimate, Run.batches, Run.shuffled

    def spy_estimate(run, model, rule, data, held_out, epochs, config):
        rates.clear()
        estimates[epochs.start] = (epochs, set(data.index.tolist()), set(held_out.index.tolist()))
        found = estimate(run, model, rule, data, held_out, epochs, config)
        scheduled = [0.1 - 0.09 * (1 - math.cos(math.pi * e / 4)) / 2 for e in epochs]
        assert rates == pytest.approx(scheduled * 3)
        return found

    def spy_batches(self, split, optimizer):
        for batch in batches(self, split, optimizer):
            trained.append(set(batch[2].tolist()))
            yield batch

    def spy_shuffled(self, *args, optimizers):
        found = shuffled(self, *args, optimizers=optimizers)
        rates.append(optimizers[0].param_groups[0]["lr"])
        return found

    monkeypatch.setattr(baselines, "estimate", spy_estimate)
    monkeypatch.setattr(Run, "batches", spy_batches)
    monkeypatch.setattr(Run, "shuffled", spy_shuffled)
    argv = ["--dataset", "synthetic", "--batch-size", "20", "--lr", "0.1", "--schedule", "cosine"]
    summary = run("--method", "g-blending", "--epochs", "5", *argv, *flags.split())
    folder = folder_of(tmp_path, summary)
    assert {start: found[0] for start, found in estimates.items()} == spans
    weights = [entry["train"]["weights"] for entry in history_of(folder)]
    assert all(sum(w) == pytest.approx(1) and len(w) == 3 for w in weights)
    assert tensors(folder)[".rule.weights"].tolist() == weights[-1]
    assert {0} | {i for i in range(1, 5) if weights[i] != weights[i - 1]} == set(spans)
    for _, seen, held_out in estimates.values():
        assert len(held_out) == 4 and seen | held_out == set(range(40)) and not seen & held_out
        assert set.union(*trained) == seen


# ---- OGM-GE ----


def logits_with(*p):
    """(B, 3) logits that give the true class 0 probability p of each sample."""
    return torch.tensor([[math.log(x), *[math.log((1 - x) / 2)] * 2] for x in p])


@pytest.mark.parametrize(
    ("alpha", "p", "factors"),
    [
        (0.1, {"a": (0.8, 0.6), "b": (0.3, 0.4)}, {"a": 1 - math.tanh(0.2), "b": 1}),
        (0.1, {"a": (0.3, 0.4), "b": (0.8, 0.6)}, {"a": 1, "b": 1 - math.tanh(0.2)}),
        (9.0, {"a": (0.5, 0.6), "b": (0.5, 0.6)}, {"a": 1, "b": 1}),
        (0.0, {"a": (0.8, 0.6), "b": (0.3, 0.4)}, {"a": 1, "b": 1}),
        (
            0.1,  # each is compared with the slowest other one
            {"a": (0.8,), "b": (0.4,), "c": (0.2,)},
            {"a": 1 - math.tanh(0.4), "b": 1 - math.tanh(0.2), "c": 1},
        ),
    ],
)
def test_ogm_coefficients_by_hand(alpha, p, factors):
    logits = {m: logits_with(*values) for m, values in p.items()}
    labels = torch.zeros(len(p["a"]), dtype=torch.long)
    found = ogm_coefficients(logits, labels, alpha)
    assert {m: k.item() for m, k in found.items()} == pytest.approx(factors)


def gradients_of(model, data):
    """The gradients of joint training by name, and the arguments of `change_gradients`."""
    inputs, labels = whole(data)
    logits, features = model(inputs)
    model.zero_grad()
    F.cross_entropy(logits, labels).backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    return gradients, (model, features, labels)


@pytest.mark.parametrize(
    ("make", "fusion", "dim", "count"),
    [(images, "sum", 4, 8), (images, "concat", 4, 8), (vectors, "concat", 2, 4)],
)
def test_ogm_touches_kernels_or_the_weights_of_encoders_without_any(make, fusion, dim, count):
    model, data = make(fusion=fusion)
    before, arguments = gradients_of(model, data)
    rule_of("ogm-ge", model).change_gradients(*arguments)
    touched = {n for n, p in model.named_parameters() if not torch.equal(p.grad, before[n])}
    weights = {n for n, p in model.encoders.named_parameters("encoders") if p.dim() == dim}
    assert touched == weights and len(weights) == count


def test_ogm_scales_the_gradient_and_adds_noise_of_its_own_size():
    """Noise in both modalities; its size is that of the gradient before it was scaled."""
    model, data = images()
    with torch.no_grad():  # gray is ahead
        model.fusion.heads["color"].weight.mul_(0.01)
    before, arguments = gradients_of(model, data)
    _, features, labels = arguments
    scores = {
        m: sum(row.softmax(0)[y].item() for row, y in zip(part, labels, strict=True))
        for m, part in model.fusion.unimodal_logits(features).items()
    }
    ahead, behind = sorted(scores, key=scores.get, reverse=True)
    factors = {ahead: 1 - math.tanh(0.8 * scores[ahead] / scores[behind]), behind: 1}
    draws = {name: [] for name, p in model.named_parameters() if p.dim() == 4}
    for _ in range(30):
        for name, p in model.named_parameters():
            p.grad.copy_(before[name])
        rule_of("ogm-ge", model, ogm_alpha=0.8).change_gradients(*arguments)
        for name, found in draws.items():
            kept = factors[name.split(".")[1]] * before[name]
            found.append((model.get_parameter(name).grad - kept) / (before[name].std() + 1e-8))
    for found in draws.values():
        noise = torch.stack(found)
        error = 5 / math.sqrt(noise.numel())
        assert abs(noise.mean().item()) < error
        assert noise.std().item() == pytest.approx(1, abs=error)


# ---- Modality dropout ----


@pytest.mark.parametrize(("modalities", "share"), [(2, 0.3), (3, 0.6), (2, 0.0), (2, 1.0)])
def test_dropout_takes_one_modality_in_a_share_of_the_training_samples(modalities, share):
    count, got = 4000, []
    model, data = vectors(dims=(4,) * modalities, count=count)
    inputs, _ = whole(data)
    plain = model.eval()(inputs)[0]
    rule_of("modality-dropout", model, drop_probability=share)
    assert torch.equal(model(inputs)[0], plain)  # evaluation is left alone
    model.fusion.forward = lambda z: got.append(z) or z["m0"]
    _, features = model.train()(inputs)
    gone = torch.stack([(z == 0).all(dim=1) for z in got[0].values()], dim=1)
    for i, m in enumerate(features):
        assert torch.equal(got[0][m][~gone[:, i]], features[m][~gone[:, i]])
    assert gone.sum(dim=1).max() == (share > 0)
    error = 5 / math.sqrt(count)
    assert gone.any(dim=1).double().mean().item() == pytest.approx(share, abs=error)
    for which in gone.double().mean(dim=0):
        assert which.item() == pytest.approx(share / modalities, abs=error)


# ---- Whole runs ----


@pytest.mark.parametrize("dataset", EVERY_DATASET)
def test_every_method_and_dataset(run, tmp_path, require, root_of, dataset):
    """Each rule leaves other weights than joint training, and joint training those of pmr.py."""
    require(dataset)
    methods = [*FUSED, *(f"unimodal-{m}" for m in MODALITIES[dataset])]
    argv = ["--dataset", dataset, "--data-root", root_of(dataset), "--epochs", "2"]
    runs = run(*argv, "--method", *methods)["runs"]
    assert [summary["method"] for summary in runs] == methods
    states = [tensors(folder_of(tmp_path, summary)) for summary in runs]
    trained = [sum("momentum_buffer" in name for name in state) for state in states]
    extra = {"aux-ce": 4, "g-blending": 4}  # weights and biases of two heads
    assert trained[: len(FUSED)] == [trained[0] + extra.get(m, 0) for m in FUSED]
    networks = [network_of(tmp_path, summary) for summary in runs]
    for summary, found in zip(runs[: len(FUSED)], networks, strict=False):
        assert all(summary["test"][m].keys() == {"head", "probe"} for m in MODALITIES[dataset])
        assert (summary["method"] == "joint") == equal(found, networks[0])
    pmr.main([*TINY, *argv, "--method", "joint", "--out", str(tmp_path / "pmr")])
    assert equal(network_of(tmp_path / "pmr", {"method": "joint"}), networks[0])


@pytest.mark.parametrize(
    ("fusion", "precision"), list(zip(baselines.FUSIONS, 3 * ("fp32", "bf16"), strict=True))
)
def test_every_method_and_fusion_of_two_and_of_three_modalities(run, tmp_path, fusion, precision):
    """Heads that cannot be split refuse ogm-ge, and film and gated a third modality."""
    np.savez(tmp_path / "three.npz", **three_modalities())
    three = ["--dataset", "features", "--data-root", str(tmp_path / "three.npz")]
    methods, argv = list(FUSED), ["--fusion", fusion, "--precision", precision]
    if fusion not in ("sum", "concat"):
        methods.remove("ogm-ge")
        with pytest.raises(UserError, match=rf"--fusion {fusion} does not.*use --fusion concat\.$"):
            run(*argv, "--method", "joint", "ogm-ge")
    for data in (["--dataset", "synthetic"], three):
        if data == three and fusion in ("film", "gated"):
            with pytest.raises(UserError, match=r"joins two modalities .*use sum or concat\.$"):
                run(*argv, *data, "--method", "joint")
            return
        runs = run(*argv, *data, "--method", *methods)["runs"]
        assert [summary["method"] for summary in runs] == methods
        networks = [network_of(tmp_path, summary) for summary in runs]
        assert not any(equal(found, networks[0]) for found in networks[1:])


def three_modalities():
    """Arrays of the dataset `features`."""
    rng = np.random.default_rng(0)
    arrays = {f"{split}_labels": np.arange(100) % 4 for split in ("train", "test")}
    shown = np.eye(4)[np.arange(100) % 4]
    for split, m in itertools.product(("train", "test"), "abc"):
        arrays[f"{split}_{m}"] = shown + rng.standard_normal((100, 4))
    return arrays


def network_of(out, summary):
    """The weights of a run's network, without the state of its rule."""
    found = tensors(folder_of(out, summary))
    return {name: tensor for name, tensor in found.items() if name.startswith(".model")}


def test_recipes_are_those_of_pmr():
    assert {*MODALITIES, *FROM_FILES} == set(DATASETS) == {*baselines.RECIPES} | UNLISTED
    for dataset, recipe in baselines.RECIPES.items():
        assert recipe.items() <= pmr.RECIPES[dataset].items()


@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("g-blending", "--blend online --super-epoch 1"),
        ("ogm-ge", "--ogm-alpha 0.7"),
        ("modality-dropout", "--drop-probability 0.6"),
    ],
)
def test_knobs_act(run, tmp_path, method, words):
    argv = ["--dataset", "synthetic", "--epochs", "2", "--method", method]
    plain = network_of(tmp_path, run(*argv))
    assert not equal(network_of(tmp_path, run(*argv, *words.split())), plain)


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        ("--drop-probability 2", "must be a number at least 0 and at most 1, not '2'"),
        ("--super-epoch 0", "must be a whole number at least 1, not '0'"),
        ("--ogm-alpha nan", "must be a number at least 0, not 'nan'"),
        ("--blend never", "invalid choice: 'never'"),
        ("--train-samples 1 --method g-blending", "holds out a part of the training data"),
        ("--method g-blending --lr 1e30", "trial runs diverged; try a lower --lr."),
        ("--method ogm-ge --dataset features --data-root {one}", "there is only one; leave it out"),
    ],
)
def test_bad_input_is_one_sentence(run, tmp_path, capsys, words, sentence):
    one = {k: x for k, x in three_modalities().items() if k.endswith(("labels", "_a"))}
    np.savez(tmp_path / "one.npz", **one)
    with pytest.raises((SystemExit, UserError)) as error:
        run(*words.format(one=tmp_path / "one.npz").split())
    assert sentence in capsys.readouterr().err + str(error.value)
