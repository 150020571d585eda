"""The method block of pmr.py, equation by equation, against hand calculations and slow loops."""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import pmr
from common.rebalance import Rival


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


def random_case(generator, batch=12, classes=4, dim=5):
    """Features, prototypes and labels of two modalities in float64."""
    z = [torch.randn(batch, dim, generator=generator, dtype=torch.float64) for _ in range(2)]
    c = [torch.randn(classes, dim, generator=generator, dtype=torch.float64) for _ in range(2)]
    labels = torch.randint(0, classes, (batch,), generator=generator)
    return z, c, labels, torch.ones(classes, dtype=torch.bool)


def slow_posterior(z, c):
    """Eq. (7) with Python loops: (B, K) probabilities."""
    rows = []
    for z_i in z.tolist():
        scores = [math.exp(-math.dist(z_i, c_k)) for c_k in c.tolist()]
        rows.append([score / sum(scores) for score in scores])
    return rows


# ---- Eq. (6) and (12): prototypes ----


def test_class_means_by_hand():
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 0.0]])
    means, present = pmr.class_means(z, torch.tensor([0, 0, 2]), num_classes=3)
    assert means.tolist() == [[2.0, 3.0], [0.0, 0.0], [10.0, 0.0]]
    assert present.tolist() == [True, False, True]


def test_class_means_equal_a_loop(generator):
    z, _, labels, _ = random_case(generator, batch=40)
    means, present = pmr.class_means(z[0], labels, num_classes=4)
    for k in range(4):
        members = [z_i for z_i, y in zip(z[0], labels, strict=True) if y == k]
        assert present[k] == bool(members)
        torch.testing.assert_close(means[k], sum(members) / len(members))


def test_momentum_mixes_old_and_new():
    prototypes = pmr.Prototypes(num_classes=1, dim=1)
    present = torch.tensor([True])
    prototypes.update(torch.tensor([[5.0]]), present, epsilon=0.2)
    assert prototypes.centers.item() == 5.0  # first epoch: no old prototype to mix with
    prototypes.update(torch.tensor([[10.0]]), present, epsilon=0.2)
    assert prototypes.centers.item() == pytest.approx(0.2 * 5 + 0.8 * 10)


def test_a_class_that_the_subset_misses_keeps_its_prototype():
    prototypes = pmr.Prototypes(num_classes=2, dim=1)
    prototypes.update(torch.tensor([[1.0], [2.0]]), torch.tensor([True, True]), epsilon=0.5)
    prototypes.update(torch.tensor([[3.0], [0.0]]), torch.tensor([True, False]), epsilon=0.5)
    assert prototypes.centers.flatten().tolist() == [2.0, 2.0]
    assert prototypes.known.tolist() == [True, True]


# ---- Eq. (7): posterior ----


def test_posterior_equals_a_loop(generator):
    z, c, _, known = random_case(generator)
    probabilities = pmr.prototype_logits(z[0], c[0], known).softmax(dim=1)
    torch.testing.assert_close(
        probabilities, torch.tensor(slow_posterior(z[0], c[0]), dtype=torch.float64)
    )


def test_distance_is_euclidean_and_not_squared():
    logits = pmr.prototype_logits(
        torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), torch.tensor([True])
    )
    assert logits.item() == -5.0


def test_distance_is_exact_for_near_points_far_from_the_origin():
    z = torch.full((40, 512), 100.0)  # more than 25 rows: cdist's default would go by products
    c = z.clone()
    c[:, 0] += 0.01
    logits = pmr.prototype_logits(z, c, torch.ones(40, dtype=torch.bool))
    torch.testing.assert_close(logits, torch.full((40, 40), -0.01), rtol=1e-2, atol=0)


def test_no_nan_where_features_and_prototypes_coincide():
    z = torch.zeros(3, 2, requires_grad=True)
    known = torch.ones(2, dtype=torch.bool)
    logits = pmr.prototype_logits(z, torch.zeros(2, 2), known)
    (pmr.pce(logits, torch.tensor([0, 1, 0]), known) - pmr.entropy(logits)).backward()
    assert torch.isfinite(z.grad).all()


def test_distances_stay_in_fp32_under_bf16():
    z, c = torch.randn(30, 8).bfloat16(), torch.randn(4, 8)
    known = torch.ones(4, dtype=torch.bool)
    with torch.autocast("cpu", torch.bfloat16):
        logits = pmr.prototype_logits(z, c, known)
        probabilities = logits.softmax(dim=1)
    assert logits.dtype == probabilities.dtype == torch.float32
    assert torch.equal(logits, pmr.prototype_logits(z.float(), c, known))


# ---- Eq. (8) and (11): imbalance ratio and coefficients ----


def test_imbalance_ratio_equals_a_loop(generator):
    z, c, labels, known = random_case(generator)
    logits = [pmr.prototype_logits(z[m], c[m], known) for m in (0, 1)]
    sums = [
        sum(row[y] for row, y in zip(slow_posterior(z[m], c[m]), labels.tolist(), strict=True))
        for m in (0, 1)
    ]
    rho = pmr.imbalance_ratio(*logits, labels, known)
    assert rho.item() == pytest.approx(sums[0] / sums[1], rel=1e-12)
    swapped = pmr.imbalance_ratio(*reversed(logits), labels, known)
    assert (rho * swapped).item() == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize(
    ("rho", "beta", "gamma"),
    [
        (0.5, 1.0, 0.0),  # 1/rho - 1 = 1
        (0.8, 0.25, 0.0),
        (0.1, 1.0, 0.0),  # 9, cut to 1
        (1.0, 0.0, 0.0),
        (1.25, 0.0, 0.25),
        (7.0, 0.0, 1.0),
    ],
)
def test_coefficients_of_eq_11(rho, beta, gamma):
    found = pmr.coefficients(torch.tensor(rho, dtype=torch.float64))
    assert [x.item() for x in found] == pytest.approx([beta, gamma])


@pytest.mark.parametrize(("rho", "expected"), [(0.9, [1, 0]), (1.0, [0, 0]), (1.1, [0, 1])])
def test_binary_coefficients_of_the_released_code(rho, expected):
    assert [x.item() for x in pmr.coefficients(torch.tensor(rho), "binary")] == expected


def test_ratio_and_coefficients_survive_vanishing_probabilities():
    far = torch.tensor([[-500.0, 0.0]] * 64)  # probability of class 0 is zero in float32
    near = torch.tensor([[0.0, -500.0]] * 64)
    labels, known = torch.zeros(64, dtype=torch.long), torch.ones(2, dtype=torch.bool)
    for pair, expected in (
        ((far, near), [1, 0]),
        ((near, far), [0, 1]),
        ((far, far), [0, 0]),
    ):
        rho = pmr.imbalance_ratio(*pair, labels, known)
        assert torch.isfinite(rho)
        assert [x.item() for x in pmr.coefficients(rho)] == expected


# ---- Eq. (9), (10), (13): losses ----


def test_pce_equals_a_loop(generator):
    z, c, labels, known = random_case(generator)
    loss = pmr.pce(pmr.prototype_logits(z[0], c[0], known), labels, known)
    rows = slow_posterior(z[0], c[0])
    slow = [-math.log(row[y]) for row, y in zip(rows, labels.tolist(), strict=True)]
    assert loss.item() == pytest.approx(sum(slow) / len(slow), rel=1e-12)


def test_entropy_by_hand():
    assert pmr.entropy(torch.zeros(3, 8)).item() == pytest.approx(math.log(8))
    assert pmr.entropy(torch.tensor([[100.0, 0.0]])).item() == pytest.approx(0, abs=1e-6)
    two_thirds = torch.tensor([[math.log(2), 0.0]])
    by_hand = -(2 / 3 * math.log(2 / 3) + 1 / 3 * math.log(1 / 3))
    assert pmr.entropy(two_thirds).item() == pytest.approx(by_hand)


@pytest.mark.parametrize("slow", [0, 1])
@pytest.mark.parametrize("mu", [0.0, 0.3])
def test_loss_is_eq_10_and_eq_13(generator, slow, mu):
    z, c, labels, known = random_case(generator)
    ahead = 1 - slow
    z[ahead] = c[ahead][labels] + 0.1 * z[ahead]  # near the right prototypes
    fused, alpha = torch.tensor(0.7, dtype=torch.float64), 1.5
    logits = [pmr.prototype_logits(z[m], c[m], known) for m in (0, 1)]
    loss, rho = pmr.pmr_loss(fused, *logits, labels, known, alpha, mu)

    rows = [slow_posterior(z[m], c[m]) for m in (0, 1)]
    truth = labels.tolist()
    s = [sum(row[y] for row, y in zip(rows[m], truth, strict=True)) for m in (0, 1)]
    ratio = s[0] / s[1]
    beta = min(max(1 / ratio - 1, 0), 1) if ratio < 1 else 0
    gamma = min(max(ratio - 1, 0), 1) if ratio >= 1 else 0
    assert (beta > 0, gamma > 0) == (slow == 0, slow == 1)
    pce = [
        sum(-math.log(row[y]) for row, y in zip(rows[m], truth, strict=True)) / len(truth)
        for m in (0, 1)
    ]
    entropy = [-sum(p * math.log(p) for row in rows[m] for p in row) / len(truth) for m in (0, 1)]
    expected = 0.7 + alpha * beta * pce[0] + alpha * gamma * pce[1]
    expected -= mu * gamma * entropy[0] + mu * beta * entropy[1]
    assert rho.item() == pytest.approx(ratio, rel=1e-9)
    assert loss.item() == pytest.approx(expected, rel=1e-9)


def test_swapping_the_modalities_swaps_the_result(generator):
    z, c, labels, known = random_case(generator)
    logits = [pmr.prototype_logits(z[m], c[m], known) for m in (0, 1)]
    fused = torch.tensor(1.0, dtype=torch.float64)
    for rule in ("clip", "binary"):
        loss, rho = pmr.pmr_loss(fused, *logits, labels, known, 2.0, 0.1, rule)
        swapped, inverse = pmr.pmr_loss(fused, *reversed(logits), labels, known, 2.0, 0.1, rule)
        assert swapped.item() == pytest.approx(loss.item(), rel=1e-12)
        assert inverse.item() == pytest.approx(1 / rho.item(), rel=1e-12)


def test_a_class_without_prototype_is_left_out(generator):
    """As if its samples and its prototype were not there; nothing becomes NaN."""
    z, c, labels, known = random_case(generator)
    known[3] = False
    labels[0] = 3
    keep = labels != 3
    z = [x.requires_grad_() for x in z]
    fused = torch.tensor(1.0, dtype=torch.float64)
    logits = [pmr.prototype_logits(z[m], c[m], known) for m in (0, 1)]
    loss, rho = pmr.pmr_loss(fused, *logits, labels, known, alpha=1.0)
    fewer = [pmr.prototype_logits(z[m][keep], c[m][:3], known[:3]) for m in (0, 1)]
    expected, ratio = pmr.pmr_loss(fused, *fewer, labels[keep], known[:3], alpha=1.0)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert rho.item() == pytest.approx(ratio.item(), rel=1e-12)

    loss, _ = pmr.pmr_loss(fused, *logits, labels, known, alpha=1.0, mu=0.1)
    loss.backward()
    assert all(torch.isfinite(x.grad).all() for x in z)


def test_a_batch_of_unknown_classes_only_changes_nothing(generator):
    z, c, labels, known = random_case(generator)
    logits = [pmr.prototype_logits(z[m], c[m], known & False) for m in (0, 1)]
    fused = torch.tensor(0.9, dtype=torch.float64)
    loss, rho = pmr.pmr_loss(fused, *logits, labels, known & False, 1.0, 0.1)
    assert (loss.item(), rho.item()) == (0.9, 1.0)


# ---- Where gradients go ----


def small_network(fusion="concat"):
    """A network of pmr.py on 8x8 images with one batch, and prototypes of both modalities."""
    config = SimpleNamespace(
        method="pmr",
        fusion=fusion,
        dataset="digits",
        seed=0,
        device=torch.device("cpu"),
        num_classes=10,
        alpha=1.0,
        coefficients="clip",
        pretrained=False,
    )
    shapes = {"gray": (1, 8, 8), "color": (3, 8, 8)}
    splits = SimpleNamespace(modalities=("gray", "color"), shapes=shapes)
    model = pmr.build_model(config, splits)
    prototypes = pmr.build_prototypes(model, config)
    inputs = {m: torch.rand(20, *shape) for m, shape in shapes.items()}
    labels = torch.arange(20) % 10
    with torch.no_grad():
        _, features = model(inputs)
    for m in shapes:
        prototypes[m].update(*pmr.class_means(features[m], labels, 10), epsilon=0.2)
    return model, prototypes, inputs, labels, config


@pytest.mark.parametrize("slow", ["gray", "color"])
@pytest.mark.parametrize("fusion", ["sum", "concat", "film", "gated"])
def test_pce_pulls_the_slow_encoder_alone(slow, fusion):
    model, prototypes, inputs, labels, config = small_network(fusion)
    prototypes[slow].centers.copy_(prototypes[slow].centers.roll(1, dims=0))  # wrong classes
    rival = Rival(model, None, 10, config)  # none: plain cross-entropy
    logits, features = model(inputs)
    gradients = []
    for alpha in (0.0, 1.0):
        config.alpha = alpha
        loss, _ = pmr.training_loss(logits, features, labels, prototypes, rival, config, mu=0.0)
        grads = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
        gradients.append(dict(zip(dict(model.named_parameters()), grads, strict=True)))
    plain, pulled = gradients
    moved = {name for name in plain if not torch.equal(plain[name], pulled[name])}
    weights = {name for name in plain if plain[name].ndim > 1 and f"encoders.{slow}." in name}
    assert weights <= moved
    assert all(name.startswith(f"encoders.{slow}.") for name in moved)


def test_per_raises_the_entropy_of_the_modality_ahead():
    model, prototypes, inputs, labels, _ = small_network()
    prototypes["color"].centers.copy_(prototypes["color"].centers.roll(1, dims=0))
    logits, features = model(inputs)
    features = {m: z.detach().requires_grad_() for m, z in features.items()}
    known = prototypes["gray"].known
    losses = []
    for mu in (0.0, 0.5):
        parts = [prototypes[m](z) for m, z in features.items()]
        losses.append(pmr.pmr_loss(logits.sum() * 0, *parts, labels, known, 0.0, mu)[0])
    difference = losses[1] - losses[0]
    gray, color = torch.autograd.grad(difference, list(features.values()))
    assert color.abs().sum() == 0
    stepped = features["gray"].detach() - 0.1 * gray / gray.norm()
    before = pmr.entropy(prototypes["gray"](features["gray"].detach()))
    assert pmr.entropy(prototypes["gray"](stepped)) > before


def test_no_gradient_through_prototypes_ratio_and_coefficients(generator):
    """The gradient is that of Eq. (10) with rho, beta and gamma held constant."""
    z, c, labels, known = random_case(generator)
    z = [x.requires_grad_() for x in z]
    prototypes = [pmr.Prototypes(4, 5).double() for _ in range(2)]
    for module, centers in zip(prototypes, c, strict=True):
        module.update(centers.requires_grad_(), known, epsilon=0.2)
        assert not module.centers.requires_grad and not list(module.parameters())
    logits = [module(x) for module, x in zip(prototypes, z, strict=True)]
    loss, rho = pmr.pmr_loss(torch.zeros((), dtype=torch.float64), *logits, labels, known, 1.0)
    assert torch.autograd.grad(loss, c, retain_graph=True, allow_unused=True) == (None, None)
    assert not rho.requires_grad
    beta, gamma = (x.item() for x in pmr.coefficients(rho))
    constant = beta * F.cross_entropy(logits[0], labels) + gamma * F.cross_entropy(
        logits[1], labels
    )
    for mine, theirs in zip(
        torch.autograd.grad(loss, z, retain_graph=True),
        torch.autograd.grad(constant, z),
        strict=True,
    ):
        torch.testing.assert_close(mine, theirs)


# ---- The block by itself ----


def test_method_block_runs_when_cut_out():
    """It needs torch and nothing else of the script, so it can be lifted into other code."""
    text = (ROOT / "pmr.py").read_text()
    block = re.search(r"# ---- Method ----\n(.*?)# ---- Model ----", text, re.DOTALL)[1]
    names = {"torch": torch, "nn": nn, "F": F}
    exec(block, names)
    assert not re.search(r"^\s*(import|from)\b", block, re.MULTILINE)
    assert not {"config", "args", "device"} & set(re.findall(r"\w+", block))
    prototypes = names["Prototypes"](num_classes=3, dim=4)
    z, labels = torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), torch.arange(9) % 3
    prototypes.update(*names["class_means"](z, labels, 3), epsilon=0.2)
    pair = prototypes(z), prototypes(-z)
    known = prototypes.known
    found = names["pmr_loss"](torch.tensor(1.0), *pair, labels, known, alpha=1.0, mu=0.01)
    expected = pmr.pmr_loss(torch.tensor(1.0), *pair, labels, known, alpha=1.0, mu=0.01)
    assert found == expected and found[0] != 1
