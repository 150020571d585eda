"""The method block of mhm.py, its heads and its measures, against the paper's text and slow loops.

Numbers count from 0 here as in the code: the paper's head 1 is head 0.
"""

import copy
import math
import re
from itertools import permutations
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from conftest import ROOT

import mhm
from common.fusion import ShakeShake, average_probabilities
from common.metrics import (
    divergence_from_mean,
    hitting_ratio,
    missing_ratio,
    pairwise_divergence,
)
from common.training import build_optimizer


@pytest.fixture
def generator():
    return torch.Generator().manual_seed(0)


# ---- Folds (Sec. 4) ----


@pytest.mark.parametrize("count", [5, 12, 23])
@pytest.mark.parametrize("heads", [2, 3, 4, 5])
def test_folds_by_the_algebra_of_sets(generator, heads, count):
    order = torch.randperm(count, generator=generator)
    pairs = [(h.tolist(), e.tolist()) for h, e in mhm.split_folds(order, heads)]
    everything = set(range(count))
    assert len(pairs) == heads
    assert sorted(sample for _, e in pairs for sample in e) == sorted(everything)  # disjoint, all
    for h, e in pairs:
        assert sorted(h) == sorted(everything - set(e))
    sizes = [len(e) for _, e in pairs]
    assert max(sizes) - min(sizes) <= 1
    assert len({frozenset(h) for h, _ in pairs}) == heads
    if heads == 2:
        assert set(pairs[0][0]) == set(pairs[1][1]) and set(pairs[1][0]) == set(pairs[0][1])


def test_folds_follow_the_random_order(generator):
    order = torch.randperm(40, generator=generator)
    assert mhm.split_folds(order, 4)[0][1].tolist() == order[:10].tolist()


# ---- What an epoch trains ----

HEADS = 3
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
EVERY_FOLD = [method for method, plan in PLAN.items() if plan[0][0] == "Hk"]


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


@pytest.fixture
def folds(generator):
    return mhm.split_folds(torch.randperm(20, generator=generator), HEADS)


def test_every_method_is_planned_here():
    assert set(PLAN) - {"unimodal-gray"} == set(mhm.METHODS)


@pytest.mark.parametrize("method", list(PLAN))
def test_phases_of_two_cycles(folds, method):
    sets = {"X": set(range(20))}
    for k, (h, e) in enumerate(folds):
        sets |= {f"H{k}": set(h.tolist()), f"E{k}": set(e.tolist())}
    for epoch in range(2 * HEADS):
        found = mhm.phases(method, epoch, folds)
        assert all(len(phase.samples) == len(phase.samples.unique()) for phase in found)
        assert [(set(phase.samples.tolist()), phase.paths, phase.learners) for phase in found] == [
            (sets[samples], paths, names) for samples, paths, names in planned(method, epoch)
        ]


@pytest.mark.parametrize("method", EVERY_FOLD)
def test_in_a_cycle_a_sample_is_in_k_minus_1_h_phases_and_one_e_phase(folds, method):
    cycle = [mhm.phases(method, epoch, folds) for epoch in range(HEADS)]
    for part, times in enumerate((HEADS - 1, 1)):
        samples = torch.cat([phases[part].samples for phases in cycle])
        assert torch.bincount(samples, minlength=20).tolist() == [times] * 20


@pytest.mark.parametrize("method", sorted(set(PLAN) - {"ensemble"}))
def test_an_epoch_is_one_pass_over_the_data(folds, method):
    for epoch in range(HEADS):
        samples = torch.cat([phase.samples for phase in mhm.phases(method, epoch, folds)])
        assert sorted(samples.tolist()) == list(range(20))


@pytest.mark.parametrize("method", list(PLAN))
def test_members_are_all_the_networks_of_a_cycle_in_their_order(folds, method):
    paths = [
        path for epoch in range(HEADS) for _, paths, _ in planned(method, epoch) for path in paths
    ]
    assert mhm.members(method, HEADS) == sorted(set(paths))


# ---- Which member is deployed ----


@pytest.mark.parametrize(
    ("accuracies", "epoch", "deployed"),
    [
        ([90, 10, 20], 0, 0),  # in the middle of a cycle the last trained
        ([90, 10, 20], 1, 1),
        ([90, 10, 20], 2, 0),  # at its end the best
        ([10, 90, 20], 5, 1),
        ([10, 20, 90], 8, 2),
        ([90, 90, 20], 2, 1),  # of the equal ones the last
        ([50, 50, 50], 2, 2),
        ([90, 10, 20], 4, 1),
        ([None, None, None], 2, 2),  # no validation: the last trained
        ([None, None, None], 3, 0),
    ],
)
@pytest.mark.parametrize("method", ["mhm", "mhm-no-freeze", "k-heads-one-set", "mmm"])
def test_the_deployed_member(method, accuracies, epoch, deployed):
    assert mhm.deploy(method, accuracies, epoch) == [deployed]


@pytest.mark.parametrize("method", ["joint", "dropout", "one-head-k-sets", "unimodal-gray"])
def test_a_single_network_is_deployed_in_every_epoch(method):
    assert [mhm.deploy(method, [50], epoch) for epoch in range(4)] == [[0]] * 4


@pytest.mark.parametrize("method", ["ensemble", "head-ensemble"])
def test_averaged_methods_deploy_all(method):
    for epoch in range(4):
        assert mhm.deploy(method, [90, 10, 20], epoch) == [0, 1, 2]


# ---- Freezing, bit by bit ----

CONFIG = SimpleNamespace(device=torch.device("cpu"), precision="fp32")
TASK = SimpleNamespace(
    loss=F.cross_entropy,
    average=average_probabilities,
    count_correct=lambda output, labels: sum(output.argmax(dim=1) == labels),
)


class Bench:
    """Three thetas, phis and psis, each with BatchNorm and Dropout unless `plain`; optimizers."""

    def __init__(self, optimizer="sgd", plain=False):
        torch.manual_seed(0)

        def layers(before, after):
            regularised = [] if plain else [nn.BatchNorm1d(after), nn.Dropout(0.5)]
            return nn.Sequential(nn.Linear(before, after), *regularised, nn.Tanh())

        theta = [layers(4, 5) for _ in range(HEADS)]
        phi = [layers(5, 6) for _ in range(HEADS)]
        psi = [layers(6, 6).append(nn.Linear(6, 3)) for _ in range(HEADS)]
        self.network = mhm.ModularNet(theta, phi, psi)
        self.optimizers = {
            name: build_optimizer(optimizer, module.parameters(), lr=0.1, weight_decay=0.1)
            for name, module in self.network.parts().items()
        }

    def train(self, phase, batches):
        return mhm.train_phase(self.network, self.optimizers, TASK, phase, batches, CONFIG)

    def state(self):
        """(module, tensor) -> a copy of every weight, buffer and moment of an optimizer."""
        found = {}
        for name, module in self.network.parts().items():
            found |= {(name, key): x.clone() for key, x in module.state_dict().items()}
            for i, moments in self.optimizers[name].state_dict()["state"].items():
                found |= {(name, f"{i} {key}"): x.clone() for key, x in moments.items()}
        return found

    def moved(self, before):
        """The names in `state` of what is new or differs in any bit from `before`."""
        return {
            key
            for key, x in self.state().items()
            if key not in before or not torch.equal(before[key], x)
        }


def draw_batches(count=1):
    return [(torch.randn(16, 4), torch.arange(16) % 3, None) for _ in range(count)]


def make_phase(paths, learners):
    kinds = frozenset(name.split("-")[0] for name in learners)
    return mhm.Phase(torch.arange(16), paths, kinds)


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
@pytest.mark.parametrize("method", list(PLAN))
def test_everything_in_the_learners_moves_and_nothing_else(method, optimizer):
    """Over two cycles: weights, BatchNorm's statistics and the optimizers' moments."""
    bench = Bench(optimizer)
    for epoch in range(2 * HEADS):
        for _, paths, learners in planned(method, epoch):
            before = bench.state()
            bench.train(make_phase(paths, learners), draw_batches(2))
            assert bench.moved(before) == {key for key in bench.state() if key[0] in learners}


@pytest.mark.parametrize("optimizer", ["sgd", "adam"])
def test_zero_gradients_in_place_of_none_would_move_a_frozen_module(optimizer):
    """The test above can fail: momentum and weight decay move what has a gradient of zero."""
    bench = Bench(optimizer)
    h_phase, e_phase = (make_phase(*phase[1:]) for phase in planned("mhm", 0))
    bench.train(h_phase, draw_batches())
    for parameter in bench.network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    before = bench.state()
    bench.optimizers["psi-0"].step()
    assert {name for name, _ in bench.moved(before)} == {"psi-0"}

    before = bench.state()
    bench.train(e_phase, draw_batches())  # with those zeros still there
    assert {name for name, _ in bench.moved(before)} == {"theta-0", "phi-0"}


@pytest.mark.parametrize("part", [0, 1])
def test_frozen_parameters_get_no_gradient(part):
    bench = Bench()
    _, paths, learners = planned("mhm", 0)[part]
    bench.train(make_phase(paths, learners), draw_batches())
    for name, module in bench.network.parts().items():
        for parameter in module.parameters():
            assert (parameter.grad is not None) == (name in learners), name


@pytest.mark.parametrize("part", [0, 1])
def test_theta_learns_through_the_frozen_module(part):
    """Its first step is along the true gradient, with the dropout of the frozen module active."""
    bench, (batch,) = Bench(), draw_batches()
    _, paths, learners = planned("mhm", 0)[part]
    theta, phi, psi = copy.deepcopy([part[0] for part in bench.network.children()])
    frozen = phi if part == 0 else psi
    frozen[1].eval()  # BatchNorm
    torch.manual_seed(1)
    loss = F.cross_entropy(psi(phi(theta(batch[0]))), batch[1])
    gradient = torch.autograd.grad(loss, theta[0].weight)[0] + 0.1 * theta[0].weight
    torch.manual_seed(1)
    bench.train(make_phase(paths, learners), [batch])
    assert gradient.abs().max() > 0.01
    expected = theta[0].weight - 0.1 * gradient
    torch.testing.assert_close(bench.network.theta[0][0].weight, expected)


def test_frozen_and_trainable_module_by_itself():
    module = nn.Sequential(nn.BatchNorm1d(50), nn.Dropout(0.5), nn.Linear(50, 50))
    x = (5 + torch.randn(8, 50)).requires_grad_()
    seen = []
    module[1].register_forward_hook(lambda *call: seen.append(call[2]))

    mhm.set_trainable(module, False)
    module(x).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not module[0].running_mean.any()
    kept = (
        seen[0] != 0
    )  # BatchNorm by its running statistics, then half of it dropped, rest doubled
    assert 0.3 < kept.float().mean() < 0.7
    torch.testing.assert_close(seen[0][kept], 2 * x[kept] / math.sqrt(1 + 1e-5))

    mhm.set_trainable(module, True)
    module(x).sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    assert module[0].running_mean.abs().min() > 0.1


# ---- Averages of several outputs ----


def test_average_is_of_probabilities_and_not_of_logits():
    probabilities = torch.tensor([[[0.8, 0.2]], [[0.8, 0.2]], [[0.001, 0.999]]])
    average = average_probabilities(list(probabilities.log() + 7))
    torch.testing.assert_close(average.exp(), torch.tensor([[1.601 / 3, 1.399 / 3]]))
    assert average.argmax() == 0 and probabilities.log().mean(dim=0).argmax() == 1


def test_average_of_one_output_is_that_output():
    logits = torch.tensor([[3.0, -1.0]])
    assert average_probabilities([logits]) is logits


def test_e_phase_of_the_head_ensemble_learns_from_the_mean_probability():
    """Loss, number of correct ones, and the step of phi, in the second epoch."""
    bench, ((x, labels, _),) = Bench(plain=True), draw_batches()
    _, paths, learners = planned("head-ensemble", 1)[1]
    phi = copy.deepcopy(bench.network.phi[0])
    z = phi(bench.network.theta[0](x))
    p = sum(psi(z).softmax(dim=1) for psi in bench.network.psi) / HEADS
    loss = -sum(p[i, y].log() for i, y in enumerate(labels)) / len(labels)
    gradient = torch.autograd.grad(loss, phi[0].weight)[0] + 0.1 * phi[0].weight
    count, total, correct = bench.train(make_phase(paths, learners), [(x, labels, None)]).tolist()
    assert count == 16 and correct == sum(p.argmax(dim=1) == labels)
    assert total == pytest.approx(16 * loss.item(), rel=1e-5)
    expected = phi[0].weight - 0.1 * gradient
    torch.testing.assert_close(bench.network.phi[0][0].weight, expected)


# ---- Shake-shake ----


class Column(nn.Module):
    """A head whose output is z in its own column and zero elsewhere."""

    def __init__(self, number):
        super().__init__()
        self.number = number

    def forward(self, z):
        return F.one_hot(torch.tensor(self.number), z.shape[1]) * z


def weights_of(branches, count):
    """Forward and backward weights (count, branches), read from the outputs and the gradients."""
    torch.manual_seed(0)
    z = torch.ones(count, branches, requires_grad=True)
    output = ShakeShake([Column(n) for n in range(branches)])(z)
    output.sum().backward()
    return output.detach(), z.grad


@pytest.mark.parametrize("branches", [2, 3])
def test_shake_shake_weights_sum_to_one_and_differ_in_the_backward_pass(branches):
    forward, backward = weights_of(branches, 20)
    for weights in (forward, backward):
        assert (weights >= 0).all() and len(weights.unique(dim=0)) == 20
        torch.testing.assert_close(weights.sum(dim=1), torch.ones(20))
    assert (forward - backward).abs().max(dim=1).values.min() > 1e-3
    module, z = ShakeShake([Column(n) for n in range(branches)]), torch.ones(4, branches)
    assert not torch.isclose(module(z), module(z)).any()  # drawn anew each time


@pytest.mark.parametrize("branches", [2, 3])
def test_shake_shake_weights_are_uniform_on_the_simplex(branches):
    """Mean 1/N and variance (N-1)/N^2/(N+1); two weights are u and 1 - u, u uniform in [0, 1]."""
    for weights in weights_of(branches, 20_000):
        assert weights.mean(dim=0).tolist() == pytest.approx([1 / branches] * branches, abs=0.01)
        variance = (branches - 1) / branches**2 / (branches + 1)
        assert weights.var(dim=0).tolist() == pytest.approx([variance] * branches, abs=0.005)


def test_shake_shake_evaluates_the_mean(generator):
    torch.manual_seed(0)
    heads = [nn.Linear(4, 3) for _ in range(3)]
    z = torch.randn(6, 4, generator=generator)
    found = ShakeShake(heads).eval()(z)
    torch.testing.assert_close(found, sum(head(z) for head in heads) / 3)


# ---- Generalization sensitivity (Sec. 5.2) ----


def slow_divergence(p, q):
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def draw_runs(generator, runs=4, items=7, classes=5):
    logits = torch.randn(runs, items, classes, generator=generator, dtype=torch.float64)
    return (2 * logits).log_softmax(dim=2)


def test_pairwise_divergence_equals_a_loop(generator):
    log_p = draw_runs(generator)
    p = log_p.exp().tolist()
    values = [
        slow_divergence(p[i][n], p[j][n]) for i, j in permutations(range(4), 2) for n in range(7)
    ]
    assert len(values) == 4 * 3 * 7
    assert pairwise_divergence(log_p) == pytest.approx(sum(values) / len(values), rel=1e-9)


def test_divergence_from_mean_equals_a_loop(generator):
    log_p = draw_runs(generator)
    p = log_p.exp().tolist()
    values = []
    for n in range(7):
        mean = [sum(run[n][c] for run in p) / 4 for c in range(5)]
        values += [slow_divergence(run[n], mean) for run in p]
    assert divergence_from_mean(log_p) == pytest.approx(sum(values) / len(values), rel=1e-9)


@pytest.mark.parametrize("divergence", [pairwise_divergence, divergence_from_mean])
def test_divergence_is_zero_for_equal_runs_and_blind_to_their_order(generator, divergence):
    log_p = draw_runs(generator)
    assert divergence(log_p[:1].expand(4, -1, -1)) == pytest.approx(0, abs=1e-12)
    assert divergence(log_p) == pytest.approx(divergence(log_p[[2, 0, 3, 1]]), rel=1e-12)
    assert divergence(log_p) > 0.1


def test_bounds_of_the_two_divergences(generator):
    for runs in (2, 3, 6):
        log_p = draw_runs(generator, runs)
        pairwise, from_mean = pairwise_divergence(log_p), divergence_from_mean(log_p)
        assert from_mean <= (runs - 1) / runs * pairwise
        assert from_mean <= math.log(runs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_divergences_of_certain_and_opposite_runs_are_finite(dtype):
    """p counts as 1e-12 at least, where its logarithm is minus infinity."""
    log_p = torch.eye(3, dtype=dtype).log().unsqueeze(1)
    assert log_p.min() == -math.inf
    assert pairwise_divergence(log_p) == pytest.approx(12 * math.log(10), rel=1e-6)
    assert divergence_from_mean(log_p) == pytest.approx(math.log(3), rel=1e-6)


# ---- Missing and hitting ratio (Table 4) ----


def test_missing_and_hitting_ratio_by_hand():
    """All eight cases of (fused right, first right, second right), the last two of them twice."""
    fused = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1, 1, 1]).bool()
    alone = torch.tensor([[0, 0, 1, 1, 0, 0, 1, 1, 1, 1], [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]]).bool()
    assert missing_ratio(fused, alone) == pytest.approx(0.3)  # wrong, and any alone is right: 3
    assert hitting_ratio(fused, alone) == pytest.approx(0.1)  # right, and both alone are wrong: 1


# ---- The block by itself ----


def test_method_block_runs_when_cut_out(folds):
    """It needs torch and NamedTuple and nothing else of the script."""
    text = (ROOT / "mhm.py").read_text()
    block = re.search(r"# ---- Method ----\n(.*?)# ---- Model ----", text, re.DOTALL)[1]
    names = {"torch": torch, "nn": nn, "F": F, "NamedTuple": NamedTuple}
    exec(block, names)
    assert not re.search(r"^\s*(import|from)\b", block, re.MULTILINE)
    assert not {"config", "args", "device"} & set(re.findall(r"\w+", block))
    pairs = names["split_folds"](torch.arange(20), HEADS)
    for method in PLAN:
        names["members"](method, HEADS)
        found = names["phases"](method, 1, pairs)
        assert [phase.learners for phase in found] == [x[2] for x in planned(method, 1)]
        assert names["deploy"](method, [1, 2, 3], 2)
    module = nn.Sequential(nn.Linear(1, 1), nn.BatchNorm1d(1))
    names["set_trainable"](module, False)
    assert not module[0].weight.requires_grad and not module[1].training
