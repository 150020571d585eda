"""The method block of umt_ume.py and the linear probe against hand calculations."""

import math

import pytest
import torch
import torch.nn as nn
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import umt_ume as umt
from common.metrics import linear_probe
from common.networks.encoders import CNN

SHAPES = {"gray": 1, "color": 3}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def images():
    """Convolutional encoders with BatchNorm, and inputs for them."""
    encoders = {m: CNN(c, dim=8, batch_norm=True, first_pool=False) for m, c in SHAPES.items()}
    return encoders, {m: torch.rand(16, c, 8, 8) for m, c in SHAPES.items()}


# ---- UMT ----


def test_distillation_is_a_mean_over_samples_and_dimensions_summed_over_modalities():
    z = {"a": torch.randn(4, 3), "b": torch.randn(4, 5)}
    t = {m: torch.randn_like(x) for m, x in z.items()}
    slow = 0
    for m in z:
        pairs = zip(z[m].flatten().tolist(), t[m].flatten().tolist(), strict=True)
        squares = [(x - y) ** 2 for x, y in pairs]
        slow += sum(squares) / len(squares)
    assert umt.distillation(z, t).item() == pytest.approx(slow, rel=1e-5)
    assert umt.distillation(z, z) == 0
    swapped = [dict(reversed(x.items())) for x in (z, t)]
    torch.testing.assert_close(umt.distillation(*swapped), umt.distillation(z, t))
    z = {m: x.requires_grad_() for m, x in z.items()}
    umt.distillation(z, t).backward()
    for m in z:  # each modality is pulled to its own teacher
        torch.testing.assert_close(z[m].grad, 2 * (z[m] - t[m]).detach() / z[m].numel())


def test_teachers_are_frozen_for_good():
    """Whatever they are part of is trained; a target does not depend on the rest of its batch."""
    encoders, inputs = images()
    teachers = umt.Teachers(encoders)
    before = {name: tensor.clone() for name, tensor in teachers.state_dict().items()}
    whole = nn.ModuleDict({"teachers": teachers, "student": nn.ModuleDict(images()[0])})
    for _ in range(2):
        whole.train()
        targets = teachers(inputs)
    assert not any(module.training for module in teachers.modules())
    assert not any(x.requires_grad for x in (*targets.values(), *teachers.parameters()))
    assert all(torch.equal(before[k], tensor) for k, tensor in teachers.state_dict().items())
    for m in inputs:
        alone = torch.cat([encoders[m](x[None]) for x in inputs[m]])
        torch.testing.assert_close(alone, targets[m], rtol=1e-4, atol=1e-5)


# ---- UME, and the choice ----


def test_means_of_logits_and_of_probabilities_by_hand():
    logits = [torch.tensor([[9.0, 0.0, 0.0]]), torch.tensor([[0.0, 2.0, 0.0]])]
    torch.testing.assert_close(umt.average_logits(logits), torch.tensor([[4.5, 1.0, 0.0]]))
    p = [[math.exp(x) / sum(map(math.exp, row)) for x in row] for row in ([9, 0, 0], [0, 2, 0])]
    expected = torch.tensor([[(a + b) / 2 for a, b in zip(*p, strict=True)]])
    torch.testing.assert_close(umt.average_probabilities(logits).exp(), expected)
    torch.testing.assert_close(umt.average_probabilities(logits[::-1]).exp(), expected)
    torch.testing.assert_close(umt.average_logits(logits[::-1]), umt.average_logits(logits))
    assert umt.average_probabilities(logits[:1]) is logits[0]


def test_the_paired_difference_by_hand():
    a = torch.tensor([[1, 1, 0, 1], [1, 0, 0, 1]]).bool()
    b = torch.tensor([[1, 0, 0, 0], [0, 0, 1, 0]]).bool()
    by_item = [50.0, 50.0, -50.0, 100.0]
    mean = sum(by_item) / 4
    deviation = math.sqrt(sum((x - mean) ** 2 for x in by_item) / 3)
    assert umt.paired_difference(a, b) == pytest.approx((mean, deviation / 2))
    assert umt.paired_difference(b, a) == pytest.approx((-mean, deviation / 2))
    assert umt.paired_difference(a[:, :1], b[:, :1]) == (50.0, 0.0)


def seen(wins, losses):
    """(linear right, ensemble right) on 100 items: alone on `wins`, or on `losses` of them."""
    linear, ensemble = torch.zeros(2, 1, 100, dtype=torch.bool)
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
    """Seeds that agree add no evidence."""
    right = seen(wins, losses)
    assert umt.choose(*right) == umt.choose(*(x.repeat(5, 1) for x in right)) == choice


# ---- The linear probe ----


@pytest.mark.parametrize("width", [3, 40])
def test_the_probe_is_a_converged_logistic_regression(width):
    """Also with features that repeat each other, do not vary, or have a scale of their own; and in
    the midst of `no_grad`, twice alike."""
    generator = torch.Generator().manual_seed(width)
    z = torch.randn(400, width, generator=generator)
    labels = (z[:, :3] + torch.randn(400, 3, generator=generator)).argmax(dim=1)
    z = torch.cat([5 + 1000 * z, z[:, :1], torch.ones(400, 1)], dim=1)
    reference = make_pipeline(StandardScaler(), LogisticRegression(max_iter=10**5, tol=1e-9))
    expected = reference.fit(z.double().numpy(), labels.numpy()).predict_log_proba(z.numpy())
    with torch.no_grad():
        first, again = (linear_probe(z, labels, 3)(z) for _ in range(2))
    assert torch.equal(first, again)
    torch.testing.assert_close(first.double(), torch.from_numpy(expected), rtol=0, atol=5e-3)


def test_the_probe_keeps_the_names_of_classes_that_training_lacks():
    z = torch.randn(200, 2)
    labels = torch.where(z[:, 0] > 0, 4, 1)
    log_p = linear_probe(z, labels, 6)(z)
    assert log_p.shape == (200, 6) and log_p.dtype == z.dtype
    assert (log_p.argmax(dim=1) == labels).double().mean() > 0.95
    assert log_p[:, [0, 2, 3, 5]].exp().max() < 1e-4
    assert linear_probe(z, labels, 6)(1e6 * z).isfinite().all()
    alone = linear_probe(z, torch.full((200,), 3), 6)(z)  # a single class in training
    assert (alone.argmax(dim=1) == 3).all()
