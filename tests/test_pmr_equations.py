"""The method block of pmr.py, equation by equation, against hand calculations and slow loops."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import pmr
from common.networks.multimodal import build_model

FUSED = torch.tensor(0.7, dtype=torch.float64)  # a cross-entropy of the fused prediction


def random_case(ahead=None):
    """Features z, centers c of two modalities and labels, float64; `ahead` is near its centers."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(4, (12,), generator=generator)
    z, c = torch.randn(2, 12, 5, generator=generator), torch.randn(2, 4, 5, generator=generator)
    z, c = list(z.double()), list(c.double())
    if ahead is not None:
        z[ahead] = c[ahead][labels] + 0.1 * z[ahead]
    return z, c, labels, torch.ones(4, dtype=torch.bool)


def logits_of(z, c, known):
    return [pmr.prototype_logits(*pair, known) for pair in zip(z, c, strict=True)]


# ---- The equations by loops over samples and classes; test_pmr.py trains by them, too ----


def slow_terms(z, labels, centers):
    """Eq. (7) to (9) of one modality: s (see Eq. 8), PCE, mean entropy. centers: class -> (D,)."""
    right, entropies = [], []
    for z_i, y in zip(z, labels.tolist(), strict=True):
        near = {k: (-(z_i - c_k).square().sum().sqrt()).exp() for k, c_k in centers.items()}
        p = {k: value / sum(near.values()) for k, value in near.items()}
        entropies.append(-sum(p_k * p_k.log() for p_k in p.values()))
        right += [p[y]] if y in p else []
    pce = -sum(p.log() for p in right) / len(right)
    return sum(right), pce, sum(entropies) / len(entropies)


def slow_loss(cross_entropy, terms0, terms1, alpha, mu):
    """Eq. (8), (10), (11), (13): the loss and rho."""
    (s0, pce0, entropy0), (s1, pce1, entropy1) = terms0, terms1
    rho = s0.item() / s1.item()
    beta = min(max(0, 1 / rho - 1), 1) if rho < 1 else 0
    gamma = min(max(0, rho - 1), 1) if rho >= 1 else 0
    loss = cross_entropy + alpha * (beta * pce0 + gamma * pce1)
    return loss - mu * (gamma * entropy0 + beta * entropy1), rho


@pytest.mark.parametrize("missing", [None, 3])
@pytest.mark.parametrize("mu", [0.0, 0.3])
@pytest.mark.parametrize("ahead", [0, 1])
def test_the_loss_equals_the_slow_one_and_swapped_modalities_swap_it(ahead, mu, missing):
    """A class without prototypes: as if they were not there, and nothing becomes NaN."""
    z, c, labels, known = random_case(ahead)
    if missing is not None:
        labels[0], known[missing] = missing, False
    z = [x.requires_grad_() for x in z]
    logits = logits_of(z, c, known)
    loss, rho = pmr.pmr_loss(FUSED, *logits, labels, known, 1.5, mu)
    centers = [{k: c_m[k] for k in range(4) if known[k]} for c_m in c]
    terms = [slow_terms(z[m], labels, centers[m]) for m in (0, 1)]
    expected, ratio = slow_loss(FUSED, *terms, 1.5, mu)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-9) and loss != FUSED
    assert rho.item() == pytest.approx(ratio, rel=1e-9) and (rho > 1) == (ahead == 0)
    mine, theirs = (torch.autograd.grad(x, z, retain_graph=True) for x in (loss, expected))
    torch.testing.assert_close(mine, theirs)
    for rule in ("clip", "binary"):
        loss, rho = pmr.pmr_loss(FUSED, *logits, labels, known, 2.0, mu, rule)
        swapped, inverse = pmr.pmr_loss(FUSED, *reversed(logits), labels, known, 2.0, mu, rule)
        assert swapped.item() == pytest.approx(loss.item(), rel=1e-12)
        assert inverse.item() == pytest.approx(1 / rho.item(), rel=1e-12)


# ---- By hand ----


def test_class_means_by_hand():
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0], [10.0, 0.0]])
    means, present = pmr.class_means(z, torch.tensor([0, 0, 2]), num_classes=3)
    assert means.tolist() == [[2.0, 3.0], [0.0, 0.0], [10.0, 0.0]]
    assert present.tolist() == [True, False, True]


def test_momentum_mixes_old_and_new():
    """Class 0 is always seen, class 1 first and never again, class 2 late."""
    prototypes, found = pmr.Prototypes(num_classes=3, dim=1), []
    for means, present in (
        ([5.0, 2.0, 0.0], [True, True, False]),
        ([10.0, 0.0, 0.0], [True, False, False]),
        ([9.0, 0.0, 7.0], [True, False, True]),
    ):
        present = torch.tensor(present)
        prototypes.update(torch.tensor(means).unsqueeze(1), present, epsilon=0.2)
        found.append((prototypes.centers.flatten().tolist(), prototypes.known.tolist()))
    assert found == [
        ([5.0, 2.0, 0.0], [True, True, False]),
        ([pytest.approx(0.2 * 5 + 0.8 * 10), 2.0, 0.0], [True, True, False]),
        ([pytest.approx(0.2 * 9 + 0.8 * 9), 2.0, 7.0], [True, True, True]),
    ]


def test_distance_is_euclidean_not_squared_and_exact_far_from_the_origin():
    assert pmr.prototype_logits(torch.tensor([[3.0, 4.0]]), torch.zeros(1, 2), ONE).item() == -5
    z = torch.full((40, 512), 100.0)  # more than 25 rows: cdist's default would go by products
    c = z.clone()
    c[:, 0] += 0.01
    logits = pmr.prototype_logits(z, c, ONE.expand(40))
    torch.testing.assert_close(logits, torch.full((40, 40), -0.01), rtol=1e-2, atol=0)


ONE = torch.tensor([True])


def test_no_nan_where_features_and_prototypes_coincide():
    z, known = torch.zeros(3, 2, requires_grad=True), ONE.expand(2)
    logits = pmr.prototype_logits(z, torch.zeros(2, 2), known)
    (pmr.pce(logits, torch.tensor([0, 1, 0]), known) - pmr.entropy(logits)).backward()
    assert torch.isfinite(z.grad).all()


def test_distances_stay_in_fp32_under_bf16():
    z, c, known = torch.randn(30, 8).bfloat16(), torch.randn(4, 8), ONE.expand(4)
    with torch.autocast("cpu", torch.bfloat16):
        logits = pmr.prototype_logits(z, c, known)
        assert logits.dtype == logits.softmax(dim=1).dtype == torch.float32
    assert torch.equal(logits, pmr.prototype_logits(z.float(), c, known))


@pytest.mark.parametrize(
    ("rho", "clip", "binary"),
    [
        (0.5, (1.0, 0.0), (1, 0)),  # 1/rho - 1 = 1
        (0.8, (0.25, 0.0), (1, 0)),
        (0.1, (1.0, 0.0), (1, 0)),  # 9, cut to 1
        (1.0, (0.0, 0.0), (0, 0)),
        (1.25, (0.0, 0.25), (0, 1)),
        (7.0, (0.0, 1.0), (0, 1)),
    ],
)
def test_coefficients_of_eq_11_and_of_the_released_code(rho, clip, binary):
    rho = torch.tensor(rho, dtype=torch.float64)
    assert [x.item() for x in pmr.coefficients(rho)] == pytest.approx(clip)
    assert tuple(x.item() for x in pmr.coefficients(rho, "binary")) == binary


def test_ratio_and_coefficients_survive_vanishing_probabilities():
    far = torch.tensor([[-500.0, 0.0]] * 64)  # probability of class 0 is zero in float32
    near, labels = far.flip(1), torch.zeros(64, dtype=torch.long)
    for pair, expected in (((far, near), [1, 0]), ((near, far), [0, 1]), ((far, far), [0, 0])):
        rho = pmr.imbalance_ratio(*pair, labels, ONE.expand(2))
        assert torch.isfinite(rho)
        assert [x.item() for x in pmr.coefficients(rho)] == expected


def test_a_batch_of_unknown_classes_only_changes_nothing():
    z, c, labels, known = random_case()
    none = known & False
    loss, rho = pmr.pmr_loss(FUSED, *logits_of(z, c, none), labels, none, 1.0, 0.1)
    assert (loss, rho.item()) == (FUSED, 1.0)


# ---- Where gradients go ----


@pytest.mark.parametrize("slow", ["gray", "color"])
@pytest.mark.parametrize("fusion", pmr.FUSIONS)
def test_pce_pulls_the_slow_encoder_alone_and_per_the_other(fusion, slow):
    """The slow modality is the one whose prototypes belong to the wrong classes."""
    shapes = {"gray": (1, 8, 8), "color": (3, 8, 8)}
    splits = SimpleNamespace(shapes=shapes, num_classes=10)
    config = SimpleNamespace(method="pmr", fusion=fusion, dataset="digits", seed=0, mu=0.5)
    config.modalities, config.pretrained, config.coefficients = tuple(shapes), False, "clip"
    config.device, config.alpha = torch.device("cpu"), 0.0
    model = build_model(config, splits)
    inputs = {m: torch.rand(20, *shape) for m, shape in shapes.items()}
    labels = torch.arange(20) % 10
    logits, features = model(inputs)
    prototypes = {m: pmr.Prototypes(10, z.shape[1]) for m, z in features.items()}
    for m, z in features.items():
        prototypes[m].update(*pmr.class_means(z.detach(), labels, 10), epsilon=0.2)
    prototypes[slow].centers.copy_(prototypes[slow].centers.roll(1, dims=0))
    names, weights = zip(*model.named_parameters(), strict=True)

    def gradients(alpha, per=False):
        config.alpha = alpha
        cross_entropy = F.cross_entropy(logits, labels)
        loss, _ = pmr.rebalance(cross_entropy, features, labels, prototypes, config, per)
        return torch.autograd.grad(loss, weights, retain_graph=True)

    def changed(found):
        pairs = zip(names, found, gradients(0.0), strict=True)
        return {name for name, g, plain in pairs if not torch.equal(g, plain)}

    (ahead,) = set(shapes) - {slow}
    for m, moved in ((slow, changed(gradients(1.0))), (ahead, changed(gradients(0.0, per=True)))):
        assert all(name.startswith(f"encoders.{m}.") for name in moved)
        assert moved >= {n for n, w in zip(names, weights, strict=True) if m in n and w.dim() == 4}
    z = features[ahead].detach().requires_grad_()
    entropy = pmr.entropy(prototypes[ahead](z))
    parts = {**features, ahead: z}
    loss, _ = pmr.rebalance(torch.zeros(()), parts, labels, prototypes, config, per=True)
    (gradient,) = torch.autograd.grad(loss, z, retain_graph=True)
    stepped = z - 0.1 * gradient / gradient.norm()
    assert pmr.entropy(prototypes[ahead](stepped)) > entropy  # a step of training raises it


def test_no_gradient_through_prototypes_and_ratio():
    z, c, labels, known = random_case()
    prototypes = [pmr.Prototypes(4, 5).double() for _ in range(2)]
    for module, centers in zip(prototypes, c, strict=True):
        module.update(centers.requires_grad_(), known, epsilon=0.2)
        assert not list(module.parameters())
    logits = [module(x.requires_grad_()) for module, x in zip(prototypes, z, strict=True)]
    loss, rho = pmr.pmr_loss(FUSED, *logits, labels, known, 1.0)
    assert torch.autograd.grad(loss, c, allow_unused=True) == (None, None)
    assert loss.requires_grad and not rho.requires_grad
