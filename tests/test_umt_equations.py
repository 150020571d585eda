"""The method block of umt_ume.py, the rivals of common/rebalance.py and the linear probe, against
hand calculations and slow versions written from the papers."""

import copy
import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import umt_ume as umt
from common.datasets import TensorSplit
from common.encoders import CNN, MLP
from common.errors import UserError
from common.fusion import FUSIONS, LATE_FUSIONS, average_probabilities
from common.metrics import linear_probe
from common.rebalance import (
    RIVALS,
    Rival,
    blend_weights,
    build_rival,
    check_rivals,
    ogm_coefficients,
)

CPU = torch.device("cpu")
KNOBS = {"ogm_alpha": 0.3, "drop_probability": 0.3, "blend": "offline", "super_epoch": 2}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def vectors(count=30, dims=(5, 4), classes=3):
    """A split of noise, and labels of which every modality shows a part."""
    tensors = {f"m{i}": torch.randn(count, dim) for i, dim in enumerate(dims)}
    labels = sum(x[:, :classes] for x in tensors.values()).argmax(dim=1)
    return TensorSplit(tensors, labels, dict)


def network(dims=(5, 4), classes=3, fusion="concat", batch_norm=False):
    encoders = {f"m{i}": MLP(dim, dim=6, hidden=8) for i, dim in enumerate(dims)}
    if batch_norm:
        for encoder in encoders.values():
            encoder.stages[0].insert(1, nn.BatchNorm1d(8))
    heads = {**FUSIONS, **LATE_FUSIONS}
    return umt.LateFusion(encoders, heads[fusion](dict.fromkeys(encoders, 6), classes))


def images(count=16, fusion="sum"):
    """Convolutional encoders with BatchNorm, and a batch: network, inputs, labels."""
    encoders = {m: CNN(c, dim=8, batch_norm=True, first_pool=False) for m, c in SHAPES.items()}
    model = umt.LateFusion(encoders, FUSIONS[fusion](dict.fromkeys(encoders, 8), 3))
    inputs = {m: torch.rand(count, c, 8, 8) for m, c in SHAPES.items()}
    return model, inputs, torch.randint(3, (count,))


SHAPES = {"gray": 1, "color": 3}


def rival_of(method, model, data=None, classes=3, **knobs):
    config = SimpleNamespace(method=method, seed=0, device=CPU, **{**KNOBS, **knobs})
    return build_rival(model, data or vectors(), classes, config)


def states_equal(first, second):
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


def copy_of(module):
    return copy.deepcopy(module.state_dict())


# ---- UMT ----


def test_distillation_is_a_mean_over_samples_and_dimensions_summed_over_modalities():
    z = {"a": torch.randn(4, 3), "b": torch.randn(4, 5)}
    t = {m: torch.randn_like(x) for m, x in z.items()}
    slow = 0
    for m in z:
        squares = [
            (x - y) ** 2
            for row, target in zip(z[m].tolist(), t[m].tolist(), strict=True)
            for x, y in zip(row, target, strict=True)
        ]
        slow += sum(squares) / len(squares)
    assert umt.distillation(z, t).item() == pytest.approx(slow, rel=1e-5)
    assert umt.distillation(z, z) == 0
    swapped = [dict(reversed(x.items())) for x in (z, t)]
    torch.testing.assert_close(umt.distillation(*swapped), umt.distillation(z, t))


def test_each_modality_is_pulled_to_its_own_teacher_and_the_teacher_to_nothing():
    z = {m: torch.randn(4, 3, requires_grad=True) for m in "ab"}
    t = {m: torch.randn(4, 3) for m in "ab"}
    umt.distillation(z, t).backward()
    for m in z:
        torch.testing.assert_close(z[m].grad, 2 * (z[m] - t[m]).detach() / 12)


def test_teachers_are_frozen_for_good():
    model, inputs, _ = images()
    original = copy_of(model.encoders)
    teachers = umt.Teachers(dict(model.encoders.items()))
    whole = nn.ModuleDict({"teachers": teachers, "student": images()[0]})
    for _ in range(3):
        whole.train()
        targets = teachers(inputs)
    assert not any(module.training for module in teachers.modules())
    assert not any(t.requires_grad for t in targets.values())
    assert not any(p.requires_grad for p in teachers.parameters())
    assert states_equal(original, teachers.state_dict())
    alone = {m: torch.cat([teachers[m](x[None]) for x in inputs[m]]) for m in inputs}
    for m in inputs:  # a sample's target does not depend on the others of its batch
        torch.testing.assert_close(alone[m], targets[m], rtol=1e-4, atol=1e-5)


# ---- UME, and the choice ----


def test_means_of_logits_and_of_probabilities_by_hand():
    """A certain network outvotes a doubtful one, more so by logits than by probabilities."""
    certain, doubtful = torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])
    torch.testing.assert_close(
        umt.average_logits([certain, doubtful]), torch.tensor([[4.5, 1.0, 0.0]])
    )
    p = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in ([9, 0, 0], [0, 2, 0])]
    expected = torch.tensor([[(a + b) / 2 for a, b in zip(*p, strict=True)]])
    torch.testing.assert_close(average_probabilities([certain, doubtful]).exp(), expected)
    torch.testing.assert_close(
        umt.average_logits([certain, doubtful]), umt.average_logits([doubtful, certain])
    )


def test_the_two_means_may_disagree():
    """One that is very certain against two that are less so."""
    outputs = [torch.tensor([x]) for x in ([5.0, 0.0], [0.0, 2.0], [0.0, 2.0])]
    assert umt.average_logits(outputs).argmax() == 0
    assert average_probabilities(outputs).argmax() == 1


def test_the_paired_difference_by_hand():
    a = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]).bool()
    b = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]]).bool()
    by_item = [50.0, 50.0, -50.0, 100.0]
    mean = sum(by_item) / 4
    deviation = math.sqrt(sum((x - mean) ** 2 for x in by_item) / 3)
    assert umt.paired_difference(a, b) == pytest.approx((mean, deviation / 2))
    assert umt.paired_difference(b, a) == pytest.approx((-mean, deviation / 2))
    assert umt.paired_difference(a[:, :1], b[:, :1]) == (50.0, 0.0)


def seen(wins, losses, count=100, seeds=1):
    """(linear right, ensemble right): the former alone on `wins` items, the latter on `losses`."""
    linear, ensemble = torch.zeros(2, seeds, count, dtype=torch.bool)
    linear[:, :wins] = True
    ensemble[:, wins : wins + losses] = True
    linear[:, 90:] = ensemble[:, 90:] = True
    return linear, ensemble


@pytest.mark.parametrize(
    ("wins", "losses", "choice"),
    [
        (20, 5, "umt"),
        (0, 0, "ume"),  # a tie
        (5, 20, "ume"),
        (10, 9, "ume"),  # better by 1 point, with a standard error of 4.4
        (2, 0, "umt"),  # 2 points with a standard error of 1.4
        (1, 0, "ume"),  # 1 point with a standard error of 1
    ],
)
def test_the_choice_needs_more_than_a_standard_error(wins, losses, choice):
    assert umt.choose(*seen(wins, losses)) == choice


def test_seeds_that_agree_add_no_evidence_but_many_items_do():
    assert umt.choose(*seen(10, 7)) == umt.choose(*seen(10, 7, seeds=5)) == "ume"
    linear, ensemble = seen(10, 7)
    assert umt.choose(linear.repeat(1, 20), ensemble.repeat(1, 20)) == "umt"


# ---- The linear probe ----


def test_the_probe_learns_what_is_linear_and_ignores_scale():
    z = torch.randn(400, 6)
    labels = z[:, :3].argmax(dim=1)
    probe = linear_probe(z[:300], labels[:300], 3)
    assert (probe(z[300:]).argmax(dim=1) == labels[300:]).double().mean() > 0.9
    torch.testing.assert_close(probe(z[300:]).exp().sum(dim=1), torch.ones(100))
    scale = torch.tensor([1e-3, 1.0, 1e3, 5.0, 1.0, 1.0])
    scaled = linear_probe(scale * z[:300] + 7, labels[:300], 3)(scale * z[300:] + 7)
    torch.testing.assert_close(scaled, probe(z[300:]), rtol=1e-2, atol=1e-2)
    wheel = (z[:, 0] * z[:, 1] > 0).long()  # not linear
    guess = linear_probe(z[:300], wheel[:300], 2)(z[300:]).argmax(dim=1)
    assert 0.3 < (guess == wheel[300:]).double().mean() < 0.7


def test_the_probe_keeps_the_names_of_classes_that_training_lacks():
    z = torch.randn(200, 2)
    labels = torch.where(z[:, 0] > 0, 4, 1)
    log_p = linear_probe(z, labels, 6)(z)
    assert log_p.shape == (200, 6) and log_p.dtype == z.dtype
    assert (log_p.argmax(dim=1) == labels).double().mean() > 0.95
    torch.testing.assert_close(log_p[:, [0, 2, 3, 5]].exp(), torch.full((200, 4), 1e-12))
    certain = linear_probe(z, labels, 6)(1e6 * z)
    assert certain.isfinite().all() and certain.amin() >= math.log(1e-12) - 1e-5
    alone = linear_probe(z, torch.full((200,), 3), 6)(z)  # a single class in training
    assert (alone.argmax(dim=1) == 3).all()


# ---- Auxiliary cross-entropies ----


def test_auxiliary_ce_adds_a_loss_for_each_modality():
    model, data = network(), vectors()
    rival = rival_of("aux-ce", model, data)
    inputs, labels, _ = next(data.batches(30))
    logits, features = model(inputs)
    expected = F.cross_entropy(logits, labels)
    for m, head in rival.heads.items():
        expected = expected + F.cross_entropy(features[m] @ head.weight.T + head.bias, labels)
    loss = rival.loss(logits, features, labels)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert all(p.grad.any() for p in [*model.parameters(), *rival.parameters()])
    assert set(rival.state_dict()) > {"heads.m0.weight", "heads.m1.bias"}


def test_joint_training_has_no_hooks():
    model, data = network(), vectors()
    rival = rival_of("joint", model, data)
    inputs, labels, _ = next(data.batches(30))
    logits, features = model(inputs)
    assert type(rival) is Rival and rival.data is data and not rival.state_dict()
    assert torch.equal(rival.loss(logits, features, labels), F.cross_entropy(logits, labels))


# ---- Gradient-Blending ----


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
    found = blend_weights(gains, overfits)
    assert found == pytest.approx(weights)
    assert sum(found) == pytest.approx(1) and min(found) >= 0


def sgd(parameters):
    return torch.optim.SGD(parameters, 0.1, momentum=0.9)


def batches_of(rival, log, rate=lambda epoch: 0.1):
    """`batches` as a training loop gives it to a rival; `log` gets (phase, epoch, index)."""

    def batches(phase, epoch, optimizer):
        optimizer.param_groups[0]["lr"] = rate(epoch)
        generator = torch.Generator().manual_seed(epoch)
        for inputs, labels, index in rival.data.batches(8, generator):
            log.append((phase, epoch, index.tolist()))
            yield inputs, labels, index

    return batches


def test_a_tenth_is_held_out_and_never_trained_on():
    model, data = network(), vectors(50)
    rival = rival_of("g-blending", model, data)
    log = []
    rival.start_epoch(0, 3, model, nn.Module.__call__, sgd, batches_of(rival, log))
    trained_on = {i for _, _, index in log for i in index}
    held_out = set(rival.held_out.index.tolist())
    assert len(held_out) == 5 and not trained_on & held_out
    assert trained_on | held_out == set(range(50))
    assert {phase for phase, _, _ in log} == {"blend"} != {"train"}
    other = SimpleNamespace(method="g-blending", seed=1, device=CPU, **KNOBS)
    assert set(build_rival(model, data, 3, other).held_out.index.tolist()) != held_out


@pytest.mark.parametrize(
    ("blend", "estimates"),
    [("offline", {0: range(0, 5)}), ("online", {0: range(0, 2), 2: range(2, 4), 4: range(4, 5)})],
)
def test_when_weights_are_estimated_and_for_how_many_epochs(blend, estimates):
    model = network()
    rival = rival_of("g-blending", model, blend=blend)
    before = copy_of(model), copy_of(rival.heads)
    for epoch in range(5):
        log, weights = [], rival.weights.clone()
        rival.start_epoch(epoch, 5, model, nn.Module.__call__, sgd, batches_of(rival, log))
        seen = [seen_epoch for _, seen_epoch, _ in log]
        assert sorted(set(seen)) == list(estimates.get(epoch, []))
        assert seen.count(epoch) == (3 * math.ceil(27 / 8) if epoch in estimates else 0)
        assert torch.equal(rival.weights, weights) == (epoch not in estimates)
        assert rival.weights.sum().item() == pytest.approx(1)
    assert states_equal(before[0], model.state_dict())  # only copies are trained
    assert states_equal(before[1], rival.heads.state_dict())
    assert torch.equal(rival.state_dict()["weights"], rival.weights)


def slow_blend(model, heads, data, held_out, epochs):
    """w_i by three trainings with SGD by hand: one for each modality, one for the fused loss."""

    def loss_of(parts, i, index):
        network, own = parts
        rows = {m: data.tensors[m][index] for m in data.tensors}
        z = {m: network.encoders[m](x) for m, x in rows.items()}
        name = f"m{i}"
        out = own[name](z[name]) if i < 2 else network.fusion(z)
        losses = [-x.log_softmax(0)[y] for x, y in zip(out, data.all_labels[index], strict=True)]
        return sum(losses) / len(losses)

    kept = torch.tensor([i for i in range(len(data)) if i not in held_out.tolist()])
    scores = []
    for i in range(3):
        parts = copy.deepcopy((model, heads))
        parameters = [p for part in parts for p in part.parameters()]
        velocity = [torch.zeros_like(p) for p in parameters]
        parts[0].eval()
        with torch.no_grad():
            start = [loss_of(parts, i, part).item() for part in (kept, held_out)]
        parts[0].train()
        for epoch, batches in enumerate(epochs):
            for index in batches:
                gradients = torch.autograd.grad(
                    loss_of(parts, i, index), parameters, allow_unused=True
                )
                with torch.no_grad():
                    for p, g, v in zip(parameters, gradients, velocity, strict=True):
                        if g is not None:
                            p.sub_(0.1 / (1 + epoch) * v.mul_(0.9).add_(g))
        parts[0].eval()
        with torch.no_grad():
            end = [loss_of(parts, i, part).item() for part in (kept, held_out)]
        gain = start[1] - end[1]
        overfit = (end[1] - end[0]) - (start[1] - start[0])
        scores.append(max(gain, 0) / overfit**2)
    return [score / sum(scores) for score in scores]


@pytest.mark.parametrize("batch_norm", [False, True])
def test_blend_weights_equal_a_slow_estimate(batch_norm):
    model, data = network(batch_norm=batch_norm), vectors(100)
    rival = rival_of("g-blending", model, data)
    epochs = [
        [index for _, _, index in rival.data.batches(8, torch.Generator().manual_seed(epoch))]
        for epoch in range(3)
    ]
    expected = slow_blend(model, rival.heads, data, rival.held_out.index, epochs)
    batches = batches_of(rival, [], rate=lambda epoch: 0.1 / (1 + epoch))
    rival.start_epoch(0, 3, model, nn.Module.__call__, sgd, batches)
    assert rival.weights.tolist() == pytest.approx(expected, rel=1e-3)
    assert max(expected) < 0.99 and min(expected) > 0  # a case that tells something


def test_the_blended_loss_is_weighted():
    model, data = network(), vectors()
    rival = rival_of("g-blending", model, data)
    inputs, labels, _ = next(data.batches(30))
    logits, features = model(inputs)
    rival.weights.copy_(torch.tensor([0.2, 0.5, 0.3]))
    alone = [F.cross_entropy(rival.heads[m](features[m]), labels) for m in ("m0", "m1")]
    expected = 0.2 * alone[0] + 0.5 * alone[1] + 0.3 * F.cross_entropy(logits, labels)
    torch.testing.assert_close(rival.loss(logits, features, labels), expected)


def test_one_sample_is_too_few_to_hold_out():
    with pytest.raises(UserError, match="holds out a part of the training data"):
        rival_of("g-blending", network(), vectors(1))


# ---- OGM-GE ----


def logits_with(p, classes=3):
    """(B, C) logits that give the true class 0 probability p of each sample."""
    rest = [math.log((1 - x) / (classes - 1)) for x in p]
    return torch.tensor([[math.log(x), *[r] * (classes - 1)] for x, r in zip(p, rest, strict=True)])


def test_ogm_coefficient_by_hand():
    labels = torch.zeros(2, dtype=torch.long)
    logits = {"a": logits_with([0.8, 0.6]), "b": logits_with([0.3, 0.4])}  # 1.4 / 0.7
    factors = ogm_coefficients(logits, labels, 0.1)
    assert factors["a"].item() == pytest.approx(1 - math.tanh(0.2)) == pytest.approx(0.8026, 1e-4)
    assert factors["b"] == 1
    swapped = ogm_coefficients({"a": logits["b"], "b": logits["a"]}, labels, 0.1)
    assert swapped["b"] == factors["a"] and swapped["a"] == 1
    equal = ogm_coefficients({"a": logits["a"], "b": logits["a"]}, labels, 9.0)
    assert equal["a"] == equal["b"] == 1
    assert ogm_coefficients(logits, labels, 0.0)["a"] == 1


def test_ogm_compares_a_third_modality_with_the_slowest():
    labels = torch.zeros(1, dtype=torch.long)
    logits = {m: logits_with([p]) for m, p in {"a": 0.8, "b": 0.4, "c": 0.2}.items()}
    factors = ogm_coefficients(logits, labels, 0.1)
    expected = {"a": 1 - math.tanh(0.4), "b": 1 - math.tanh(0.2), "c": 1}
    assert {m: k.item() for m, k in factors.items()} == pytest.approx(expected)


def gradients(model, inputs, labels):
    logits, features = model(inputs)
    model.zero_grad()
    F.cross_entropy(logits, labels).backward()
    return {name: p.grad.clone() for name, p in model.named_parameters()}, features


@pytest.mark.parametrize("fusion", ["sum", "concat"])
def test_ogm_touches_convolution_kernels_and_nothing_else(fusion):
    model, inputs, labels = images(fusion=fusion)
    before, features = gradients(model, inputs, labels)
    rival_of("ogm-ge", model).modulate(model, features, labels)
    touched = {n for n, p in model.named_parameters() if not torch.equal(p.grad, before[n])}
    kernels = {n for n, p in model.named_parameters() if p.dim() == 4}
    assert touched == kernels and len(kernels) == 8
    assert all(name.startswith("encoders.") for name in kernels)


def test_ogm_without_convolutions_touches_the_weights_of_the_encoders():
    data = vectors()
    encoders = {f"m{i}": MLP(dim, 6, 8) for i, dim in enumerate((5, 4))}
    model = umt.LateFusion(encoders, FUSIONS["concat"](dict.fromkeys(encoders, 6), 3))
    inputs, labels, _ = next(data.batches(30))
    before, features = gradients(model, inputs, labels)
    rival_of("ogm-ge", model).modulate(model, features, labels)
    touched = {n for n, p in model.named_parameters() if not torch.equal(p.grad, before[n])}
    weights = {n for n, p in model.named_parameters() if n.startswith("enc") and p.dim() == 2}
    assert touched == weights and len(weights) == 4


def test_ogm_scales_the_gradient_and_adds_noise_of_its_own_size():
    """Noise in both modalities; its size is that of the gradient before it was scaled."""
    model, inputs, labels = images()
    with torch.no_grad():  # gray is ahead
        model.fusion.heads["color"].weight.mul_(0.01)
    before, features = gradients(model, inputs, labels)
    parts = model.fusion.unimodal_logits(features)
    scores = {
        m: sum(row.softmax(0)[y].item() for row, y in zip(part, labels, strict=True))
        for m, part in parts.items()
    }
    ahead, behind = sorted(scores, key=scores.get, reverse=True)
    factors = {ahead: 1 - math.tanh(0.8 * scores[ahead] / scores[behind]), behind: 1}
    rival = rival_of("ogm-ge", model, ogm_alpha=0.8)
    draws = {name: [] for name, p in model.named_parameters() if p.dim() == 4}
    for _ in range(30):
        for name, p in model.named_parameters():
            p.grad.copy_(before[name])
        rival.modulate(model, features, labels)
        for name, found in draws.items():
            gradient = before[name]
            k = factors[name.split(".")[1]]
            grad = model.get_parameter(name).grad
            found.append((grad - k * gradient) / (gradient.std() + 1e-8))
    for found in draws.values():
        noise = torch.stack(found)
        assert abs(noise.mean().item()) < 5 / math.sqrt(noise.numel())
        assert noise.std().item() == pytest.approx(1, abs=5 / math.sqrt(noise.numel()))


@pytest.mark.parametrize("fusion", ["film", "gated", "mlp", "attention"])
def test_ogm_refuses_heads_that_cannot_be_split(fusion):
    with pytest.raises(UserError, match=rf"--fusion {fusion} does not.*use --fusion concat\.$"):
        check_rivals(["joint", "ogm-ge"], fusion, ("first", "second"))
    check_rivals(["joint"], fusion, ("first", "second"))


def test_ogm_refuses_a_single_modality():
    with pytest.raises(UserError, match="there is only one; leave it out"):
        check_rivals(["ogm-ge"], "concat", ("first",))
    check_rivals(["ogm-ge"], "sum", ("first", "second"))


# ---- Modality dropout ----


@pytest.mark.parametrize(("modalities", "share"), [(2, 0.3), (3, 0.6), (2, 0.0), (2, 1.0)])
def test_dropout_takes_one_modality_in_a_share_of_the_training_samples(modalities, share):
    count = 4000
    model, data = network(dims=(4,) * modalities), vectors(count, dims=(4,) * modalities)
    rival_of("modality-dropout", model, drop_probability=share)
    got = []
    model.fusion.forward = lambda z: got.append(z) or z["m0"]
    inputs, _, _ = next(data.batches(count))
    _, features = model.train()(inputs)
    gone = torch.stack([(z == 0).all(dim=1) for z in got[0].values()], dim=1)
    kept = {m: z[~gone[:, i]] for i, (m, z) in enumerate(got[0].items())}
    assert all(torch.equal(kept[m], features[m][~gone[:, i]]) for i, m in enumerate(features))
    assert gone.sum(dim=1).max() == (share > 0)
    error = 5 / math.sqrt(count)
    assert gone.any(dim=1).double().mean().item() == pytest.approx(share, abs=error)
    for which in gone.double().mean(dim=0):
        assert which.item() == pytest.approx(share / modalities, abs=error)


def test_dropout_leaves_evaluation_alone():
    model, data = network(), vectors()
    inputs, _, _ = next(data.batches(30))
    plain = model.eval()(inputs)[0]
    rival_of("modality-dropout", model, drop_probability=1.0)
    assert torch.equal(model(inputs)[0], plain)
    assert not torch.equal(model.train()(inputs)[0], plain)


def test_every_rival_is_tested_here():
    assert set(RIVALS) == {"aux-ce", "g-blending", "ogm-ge", "modality-dropout"}


# ---- The block by itself ----


def test_method_block_runs_when_cut_out():
    """It needs torch and nothing else of the script, so it can be lifted into other code."""
    text = (ROOT / "umt_ume.py").read_text()
    block = re.search(r"# ---- Method ----\n(.*?)# ---- Model ----", text, re.DOTALL)[1]
    assert not re.search(r"^\s*(import|from)\b", block, re.MULTILINE)
    assert not {"config", "args", "device"} & set(re.findall(r"\w+", block))
    names = {"math": math, "torch": torch, "nn": nn, "F": F}
    exec(block, names)
    model, inputs, _ = images()
    z = {m: torch.randn(16, 8) for m in inputs}
    found = []
    for get in (names.__getitem__, umt.__dict__.__getitem__):
        targets = get("Teachers")(dict(model.encoders.items()))(inputs)
        distance = get("distillation")(z, targets)
        ensemble = get("average_logits")(list(z.values()))
        found.append((distance, ensemble, get("choose")(*seen(20, 5))))
    assert all(torch.equal(*pair) for pair in zip(found[0][:2], found[1][:2], strict=True))
    assert found[0][2] == found[1][2] == "umt"
