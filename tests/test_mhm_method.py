"""The method block of mhm.py and its heads against the paper's text, slow loops and hand cases.

Numbers count from 0 here as in the code: the paper's head 1 is head 0.
"""

import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import mhm
from common.datasets import split_folds
from common.networks.shake_shake import ShakeShake


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# ---- Folds (Sec. 4) ----


@pytest.mark.parametrize("count", [5, 12, 23])
@pytest.mark.parametrize("heads", [2, 3, 4, 5])
def test_folds_by_the_algebra_of_sets(generator, heads, count):
    order = torch.randperm(count, generator=generator)
    pairs = [(h.tolist(), e.tolist()) for h, e in split_folds(order, heads)]
    everything = set(range(count))
    assert len(pairs) == heads
    assert [sample for _, e in pairs for sample in e] == order.tolist()  # disjoint, all, in order
    for h, e in pairs:
        assert sorted(h) == sorted(everything - set(e))
    sizes = [len(e) for _, e in pairs]
    assert max(sizes) - min(sizes) <= 1
    if heads == 2:
        assert pairs[0] == pairs[1][::-1]


# ---- What an epoch trains ----

HEADS, SAMPLES = 3, 20
PLAIN = ["joint", "dropout", "shake-shake", "unimodal-gray"]
# The phases of an epoch, where k = epoch mod 3: which samples (Hk, Ek: of this head; H0, E0: of the
# first one; X: all), which networks (numbers of theta, phi and psi), and what learns.
PLAN = {
    "mhm": [("Hk", "00k", "theta-0 psi-k"), ("Ek", "00k", "theta-0 phi-0")],
    "mhm-no-freeze": [("Hk", "00k", "theta-0 phi-0 psi-k"), ("Ek", "00k", "theta-0 phi-0 psi-k")],
    "ensemble": [(f"H{n}", f"{n}{n}{n}", f"theta-{n} phi-{n} psi-{n}") for n in range(HEADS)],
    "one-head-one-set": [("H0", "000", "theta-0 psi-0"), ("E0", "000", "theta-0 phi-0")],
    "one-head-k-sets": [("Hk", "000", "theta-0 psi-0"), ("Ek", "000", "theta-0 phi-0")],
    "k-heads-one-set": [("H0", "00k", "theta-0 psi-k"), ("E0", "00k", "theta-0 phi-0")],
    "head-ensemble": [("Hk", "00k", "theta-0 psi-k"), ("Ek", "000 001 002", "theta-0 phi-0")],
    "mmm": [("Hk", "0k0", "theta-0 psi-0"), ("Ek", "0k0", "theta-0 phi-k")],
    **{method: [("X", "000", "theta-0 phi-0 psi-0")] for method in PLAIN},
}


def planned(method, epoch):
    """PLAN of an epoch: (name of the samples, paths, learners) of each phase."""
    k = str(epoch % HEADS)
    return [
        (
            samples.replace("k", k),
            [tuple(map(int, path)) for path in paths.replace("k", k).split()],
            {word[:-1] + word[-1].replace("k", k) for word in learners.split()},
        )
        for samples, paths, learners in PLAN[method]
    ]


def sample_sets(order):
    """Name -> samples, of the names in PLAN. order: (20,), split into folds of 7, 7 and 6."""
    folds = [order[:7], order[7:14], order[14:]]
    others = [torch.cat(folds[:k] + folds[k + 1 :]) for k in range(HEADS)]
    sets = {"X": torch.arange(SAMPLES)}
    sets |= {f"E{k}": fold for k, fold in enumerate(folds)}
    return sets | {f"H{k}": samples for k, samples in enumerate(others)}


def test_every_method_is_planned_here():
    assert {*PLAN} - {*PLAIN} == {*mhm.VARIANTS}
    for call in (lambda: mhm.phases("mmh", 0, [None]), lambda: mhm.deploy("mmh", [1, 2], 0)):
        with pytest.raises(ValueError, match="there is no method 'mmh'"):
            call()


def test_the_deployed_members():
    """In the middle of a cycle the last trained, at its end the best, of equal ones the last; the
    last trained without validation; and all where all predict."""
    falling, nothing = [90, 10, 20], [None, None, None]
    cases = [(falling, 0, 0), (falling, 1, 1), (falling, 4, 1), (falling, 2, 0)]
    cases += [([10, 90, 20], 5, 1), ([10, 20, 90], 8, 2), ([90, 90, 20], 2, 1)]
    cases += [([50, 50, 50], 2, 2), (nothing, 2, 2), (nothing, 3, 0)]
    for scores, epoch, deployed in cases:
        for method in ("mhm", "mhm-no-freeze", "k-heads-one-set", "mmm"):
            assert mhm.deploy(method, scores, epoch) == [deployed], (scores, epoch)
        for method in ("ensemble", "head-ensemble"):
            assert mhm.deploy(method, scores, epoch) == [0, 1, 2]
        for method in (*PLAIN, "one-head-one-set", "one-head-k-sets"):
            assert mhm.deploy(method, scores[:1], epoch) == [0]


# ---- Shake-shake ----


class Column(nn.Module):
    """A head whose output is z in its own column and zero elsewhere."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, z):
        return F.one_hot(torch.tensor(self.number), z.shape[1]) * z


@pytest.mark.parametrize("branches", [2, 3])
def test_shake_shake_weights_are_uniform_on_the_simplex_and_drawn_anew_for_the_backward_pass(
    branches,
):
    """Mean 1/N and variance (N-1)/N^2/(N+1); two weights are u and 1 - u, u uniform in [0, 1]."""
    torch.manual_seed(0)
    module = ShakeShake([Column(n) for n in range(branches)])
    z = torch.ones(20_000, branches, requires_grad=True)
    forward = module(z)
    forward.sum().backward()
    for weights in (forward.detach(), z.grad):
        assert (weights >= 0).all() and len(weights[:20].unique(dim=0)) == 20
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(20_000))
        assert weights.mean(dim=0).tolist() == pytest.approx([1 / branches] * branches, abs=0.01)
        variance = (branches - 1) / branches**2 / (branches + 1)
        assert weights.var(dim=0).tolist() == pytest.approx([variance] * branches, abs=0.005)
    assert (forward - z.grad).abs().max(dim=1).values[:20].min() > 1e-3
    assert not torch.isclose(module(z[:4]), module(z[:4])).any()  # drawn anew each time
    z = torch.rand(6, branches)
    torch.testing.assert_close(module.eval()(z), z / branches)  # the mean


# ---- Generalization sensitivity (Sec. 5.2) ----


def slow_divergence(logits, kind):
    """GS by loops over items, networks and classes. logits: (R, N, C)."""
    values = []
    for item in torch.as_tensor(logits).double().softmax(dim=2).transpose(0, 1).tolist():
        mean = [sum(p) / len(item) for p in zip(*item, strict=True)]
        pairs = itertools.permutations(item, 2) if kind == "pairwise" else [(p, mean) for p in item]
        values += [sum(a * math.log(a / b) for a, b in zip(p, q, strict=True)) for p, q in pairs]
    return sum(values) / len(values)


@pytest.mark.parametrize("kind", mhm.GS)
def test_divergence_equals_a_loop_is_zero_for_equal_runs_and_blind_to_their_order(generator, kind):
    logits = 2 * torch.randn(4, 7, 5, generator=generator, dtype=torch.float64)
    log_p, divergence = logits.log_softmax(dim=2), mhm.GS[kind]
    assert divergence(log_p) == pytest.approx(slow_divergence(logits, kind), rel=1e-9)
    assert divergence(log_p) == pytest.approx(divergence(log_p[[2, 0, 3, 1]]), rel=1e-12)
    assert divergence(log_p) > 0.1
    assert divergence(log_p[:1].expand(4, -1, -1)) == pytest.approx(0, abs=1e-12)


def test_divergences_by_hand_and_their_bounds(generator):
    """p = (1/2, 1/2) and q = (1/4, 3/4); certain and opposite networks stay finite."""
    log_p = torch.tensor([[[0.5, 0.5]], [[0.25, 0.75]]]).log()
    assert mhm.pairwise_divergence(log_p) == pytest.approx(math.log(3) / 8, rel=1e-6)
    for dtype in (torch.float32, torch.float64):  # p counts as 1e-12 at least
        log_p = torch.eye(3, dtype=dtype).log().unsqueeze(1)
        assert log_p.min() == -math.inf
        assert mhm.pairwise_divergence(log_p) == pytest.approx(12 * math.log(10), rel=1e-6)
        assert mhm.divergence_from_mean(log_p) == pytest.approx(math.log(3), rel=1e-6)
    for runs in (2, 3, 6):
        log_p = (2 * torch.randn(runs, 7, 5, generator=generator)).log_softmax(dim=2)
        from_mean = mhm.divergence_from_mean(log_p)
        assert from_mean <= math.log(runs)
        assert from_mean <= (runs - 1) / runs * mhm.pairwise_divergence(log_p)


# ---- Missing and hitting ratio (Table 4) ----


def test_missing_and_hitting_ratio_by_hand():
    """All eight cases of (fused right, first right, second right), the last two of them twice."""
    fused = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1]).bool()
    alone = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]]).bool()
    assert mhm.missing_ratio(fused, alone) == pytest.approx(0.3)  # wrong, any alone is right: 3
    assert mhm.hitting_ratio(fused, alone) == pytest.approx(0.1)  # right, both alone are wrong: 1
