"""The equations of greedy_balance.py, one by one, against hand calculations and slow loops."""

import copy
import math
import re
from collections import Counter
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import greedy_balance as greedy
from common.datasets import TensorSplit
from common.networks.encoders import Encoder
from common.networks.mmtm import MMTM, SE
from common.networks.rubi import RUBi

PAIR, TRIPLE = ("gray", "color"), ("gray", "color", "depth")
# Channels and spatial size of the maps at a block.
MAPS = {
    "two": {"a": (3, (4, 4)), "b": (5, (2, 3))},
    "three": {"a": (2, (3,)), "b": (4, (2, 2)), "c": (3, (2, 1, 3))},
    "video": {"a": (3, (2, 2, 2)), "b": (3, (3, 2, 2))},
    "vectors": {"a": (3, ()), "b": (4, ())},
}
CONFIG = {
    **{"method": "guided", "modalities": PAIR, "num_classes": 3, "tolerance": 0.1, "window": 5},
    **{"gate_mean": "after", "biased": None, "l1": 0.0, "until_fitted": False, "seed": 0},
    **{"optimizer": "sgd", "lr": 0.3, "momentum": 0.9, "weight_decay": 0.1},
    **{"device": torch.device("cpu"), "precision": "fp32"},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config_of(**knobs):
    return SimpleNamespace(**CONFIG | knobs)


def small_net(modalities=PAIR, factor=1.0):
    """A network in float64 with four narrow stages, unequal widths and BatchNorm; 3 classes."""
    encoders = {}
    for i, m in enumerate(modalities):
        widths = (1 + i, 2, 3 + i, 4, 5 + i)
        stages = [
            nn.Sequential(nn.Conv2d(before, after, 3, padding=1), nn.BatchNorm2d(after), nn.ReLU())
            for before, after in pairwise(widths)
        ]
        pool = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
        encoders[m] = Encoder(stages, pool, widths[-1], widths[1:])
    return greedy.GreedyNet(encoders, 3, factor).double()


def draw_inputs(count, modalities=PAIR):
    shapes = {m: (1 + i, 4 + i, 4) for i, m in enumerate(modalities)}
    return {m: torch.randn(count, *shape, dtype=torch.float64) for m, shape in shapes.items()}


def draw_batches(sizes, modalities=PAIR):
    """What a run's `batches` yields."""
    return [(draw_inputs(size, modalities), torch.randint(3, (size,)), None) for size in sizes]


def draw_split(count, modalities=PAIR):
    return TensorSplit(draw_inputs(count, modalities), torch.randint(3, (count,)), dict)


@torch.no_grad()
def settled(modalities=PAIR):
    """A network with running means, a wide range of gates, and predictions of every class."""
    model = small_net(modalities)
    for weight in (layer.weight for b in model.blocks for layer in (b.squeeze, *b.excite.values())):
        weight *= 4
    inputs = draw_inputs(50, modalities)
    model.train()(inputs)
    for m, logits in model.eval()(inputs)[0].items():
        model.heads[m].bias -= logits.mean(dim=0)
    return model


class FakeRun:
    """Epochs of given batches; keeps what training holds, and what it writes down."""

    def __init__(self, epochs):
        self.given, self.history = epochs, []

    def epochs(self, state):
        self.state = state
        yield from range(len(self.given))

    def batches(self, split, optimizer):
        return self.given[len(self.history)]

    def end_epoch(self, entry):
        self.history.append(entry)

    def steps(self, name):
        return [x for entry in self.history for x in entry["steps"][name]]


def train(model, epochs, **knobs):
    """`greedy.train` on lists of batches. Returns its run."""
    run, config = FakeRun(epochs), config_of(modalities=tuple(model.encoders), **knobs)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(greedy, "evaluate", lambda *_: ({}, None))
        greedy.train(run, model, SimpleNamespace(train=None, val=None), config)
    return run


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- Eq. (1), (2) and (7): MMTM, and a block whose branches are cut off ----


def slow_linear(layer, x):
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]


def slow_squeeze(x):
    """h of one map (B, C, *space): a list for each sample."""
    values = [[channel.flatten().tolist() for channel in sample] for sample in x]
    return [[sum(v) / len(v) for v in sample] for sample in values]


def slow_mmtm(block, maps, factor=1.0, gates=None, squeezed=None):
    """Gated maps; gates, squeezed: modality -> a list for each sample, instead of the computed."""
    h = {m: slow_squeeze(x) for m, x in maps.items()} | (squeezed or {})
    gated = {m: torch.empty_like(x) for m, x in maps.items()}
    for m, x in maps.items():
        for i, sample in enumerate(x):
            joined = [value for other in block.excite for value in h[other][i]]
            hidden = [max(0.0, value) for value in slow_linear(block.squeeze, joined)]
            gate = [factor * sigmoid(w) for w in slow_linear(block.excite[m], hidden)]
            gate = gates[m][i] if gates and m in gates else gate
            for c, channel in enumerate(sample):
                gated[m][i, c] = gate[c] * channel
    return gated


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("case", list(MAPS))
def test_mmtm_equals_loops(case, factor, by_sample):
    """As it is, with a given gate, with given squeezed features, and with branches cut off."""
    widths = {m: c for m, (c, _) in MAPS[case].items()}
    block = MMTM(widths, factor=factor)
    maps = {m: torch.randn(3, c, *space) for m, (c, space) in MAPS[case].items()}
    gated, h, w = block(maps)
    assert block.excite.keys() == w.keys() == maps.keys()
    again = block(dict(reversed(maps.items())))[0]
    for m, expected in slow_mmtm(block, maps, factor).items():
        torch.testing.assert_close(gated[m], expected)
        torch.testing.assert_close(h[m], torch.tensor(slow_squeeze(maps[m])))
        spread_out = block.gate(w[m]).reshape(*w[m].shape, *[1] * (maps[m].dim() - 2))
        torch.testing.assert_close(gated[m], spread_out * maps[m])
        assert torch.equal(again[m], gated[m])  # the order of the maps does not matter

    shape = (3,) if by_sample else ()
    gate, mean = torch.rand(*shape, widths["a"]), torch.randn(*shape, widths["b"])
    by_gate, _, w = block(maps, gates={"a": gate})
    assert w.keys() == maps.keys() - {"a"}
    by_mean, own, _ = block(maps, squeezed={"b": mean})
    slow_gate = slow_mmtm(block, maps, factor, gates={"a": gate.expand(3, -1).tolist()})
    slow_mean = slow_mmtm(block, maps, factor, squeezed={"b": mean.expand(3, -1).tolist()})
    means = {m: torch.randn(c) for m, c in widths.items()}
    cut = greedy.cut_off(block, maps, means)
    assert cut.keys() == maps.keys()
    for m in maps:
        torch.testing.assert_close(by_gate[m], slow_gate[m])
        torch.testing.assert_close(by_mean[m], slow_mean[m])
        assert torch.equal(own[m], h[m])
        others = {k: [mean.tolist()] * 3 for k, mean in means.items() if k != m}
        torch.testing.assert_close(cut[m], slow_mmtm(block, maps, factor, squeezed=others)[m])


def test_squeeze_width_and_no_reduction_in_se():
    block = MMTM({"a": 6, "b": 10}, ratio=4)
    assert (block.squeeze.in_features, block.squeeze.out_features) == (16, 8)
    assert [layer.out_features for layer in block.excite.values()] == [6, 10]
    assert MMTM({"a": 6, "b": 10}, ratio=8).squeeze.out_features == 4
    alone, maps = SE({"a": 6}), {"a": torch.randn(2, 6, 3, 3)}
    assert (alone.squeeze.in_features, alone.squeeze.out_features) == (6, 6)
    torch.testing.assert_close(alone(maps)[0]["a"], slow_mmtm(alone, maps)["a"])


# ---- Eq. (3) and (4) ----


def test_prediction_is_the_mean_and_loss_the_sum_over_branches():
    """With the L1 norm of all parameters, where it has a weight."""
    logits = {m: torch.randn(4, 3) for m in TRIPLE}
    mean = [[sum(logits[m][i, k].item() for m in TRIPLE) / 3 for k in range(3)] for i in range(4)]
    torch.testing.assert_close(greedy.fuse(logits), torch.tensor(mean))
    model, batches = small_net(), draw_batches([8])
    ((inputs, labels, _),) = batches
    by_hand = 0
    for x in copy.deepcopy(model).train()(inputs)[0].values():
        rows = zip(x.tolist(), labels.tolist(), strict=True)
        by_hand += sum(math.log(sum(map(math.exp, row))) - row[y] for row, y in rows) / 8
    norm = sum(abs(x) for p in model.parameters() for x in p.flatten().tolist())
    for weight in (0.0, 0.3):
        (entry,) = train(copy.deepcopy(model), [batches], method="joint", l1=weight).history
        assert entry["train"]["loss"] == pytest.approx(by_hand + weight * norm, rel=1e-6)


def test_uni_modal_network_is_one_branch_with_squeeze_and_excitation():
    model, inputs = small_net(["gray"]).eval(), draw_inputs(3)
    assert all(isinstance(block, SE) for block in model.blocks)
    expected = slow_cut_branch(model, "gray", inputs["gray"], [{}] * 3)
    torch.testing.assert_close(model(inputs)[0]["gray"], expected)


# ---- Eq. (6) to (10), Def. 4.1: branches cut off from each other, and their utilization ----


def test_training_means_are_over_all_samples():
    model, split = settled(), draw_split(300)  # more than one batch, the last one short
    means = greedy.squeezed_means(model.train(), split, config_of())
    assert not model.training and len(means) == 3
    for mean, h in zip(means, model(split.tensors)[2], strict=True):
        assert mean.keys() == h.keys() == set(PAIR)
        for m in PAIR:
            torch.testing.assert_close(mean[m].double(), h[m].mean(dim=0), rtol=1e-6, atol=1e-7)


def draw_means(model):
    """Made-up training means for every block."""
    return [{m: torch.rand(c).double() for m, c in block.items()} for block in model.channels]


def slow_cut_branch(model, k, x, means):
    """Logits of f_k': a pass of branch k alone, the others replaced by their means in every g."""
    for i, stage in enumerate(model.encoders[k].stages):
        x = stage(x)
        if i > 0:
            block, mean = model.blocks[i - 1], means[i - 1]
            own = x.mean(dim=(2, 3))
            h = [own if m == k else mean[m].expand(len(x), -1) for m in model.encoders]
            gate = block.gate(block.excite[k](block.squeeze(torch.cat(h, dim=1)).relu()))
            x = x * gate[:, :, None, None]
    return model.heads[k](x.mean(dim=(2, 3)))


@pytest.mark.parametrize("modalities", [PAIR, TRIPLE])
def test_cut_off_branches_equal_separate_passes_and_see_their_own_modality_alone(modalities):
    model, inputs = settled(modalities), draw_inputs(6, modalities)
    means = draw_means(model)
    cut, plain = model(inputs, means=means)[0], model(inputs)[0]
    for m in modalities:
        torch.testing.assert_close(cut[m], slow_cut_branch(model, m, inputs[m], means))
        others = {k: x if k == m else 9 * torch.randn_like(x) for k, x in inputs.items()}
        assert torch.equal(model(others, means=means)[0][m], cut[m])
        assert not torch.allclose(model(others)[0][m], plain[m])


def test_utilization_and_difference_by_hand():
    assert greedy.utilization(80.0, 60.0) == 0.25
    assert greedy.utilization(50.0, 60.0) == pytest.approx(-0.2)
    assert greedy.utilization(20.0, 70.0) == -2.5  # no bound of -1
    assert greedy.utilization(40.0, 40.0) == 0
    assert greedy.utilization(0.0, 10.0) == 0  # nothing to divide by
    assert greedy.difference([0.25, 0.75]) == -greedy.difference([0.75, 0.25]) == -0.5
    assert greedy.difference([0.5, -0.25, 1.0]) == greedy.difference([1.0, 0.5, -0.25]) == 1.25
    for place in range(3):  # max and min would pass over it
        values = [0.5, -0.25, 1.0]
        values[place] = math.nan
        assert math.isnan(greedy.difference(values))


def percent_right(logits, labels):
    hits = [row.argmax() == y for row, y in zip(logits, labels, strict=True)]
    return 100 * sum(map(bool, hits)) / len(hits)


# ---- Def. 5.1, Eq. (11) to (14), Algorithm 1 ----


def slow_forward(model, inputs, curated, seen, config):
    """Logits with Eq. (1) and (2), or (13) for the `curated` branch, and the activations w.

    seen: for each block, modality -> activations (B, C) of the regular steps so far.
    """
    maps = {m: model.encoders[m].stages[0](x) for m, x in inputs.items()}
    activations = []
    for i, block in enumerate(model.blocks):
        maps = {m: model.encoders[m].stages[i + 1](x) for m, x in maps.items()}
        hidden = block.squeeze(torch.cat([x.mean(dim=(2, 3)) for x in maps.values()], 1)).relu()
        w = {m: block.excite[m](hidden) for m in maps}
        gates = {m: block.factor / (1 + torch.exp(-x)) for m, x in w.items()}
        if curated:
            past = torch.cat(seen[i][curated])
            before = config.gate_mean == "before"
            mean = past.mean(dim=0).sigmoid() if before else past.sigmoid().mean(dim=0)
            gates[curated] = (block.factor * mean).expand_as(w[curated])
        maps = {m: x * gates[m][:, :, None, None] for m, x in maps.items()}
        activations.append({m: x.detach() for m, x in w.items()})
    return {m: model.heads[m](x.mean(dim=(2, 3))) for m, x in maps.items()}, activations


def slow_mu(pattern, parameters, grads):
    """||gradient||^2 / ||theta||^2 with every number of every parameter in one vector."""
    names = [name for name in parameters if re.match(pattern, name)]
    gradient, theta = (
        sum(v * v for name in names for v in x[name].flatten().tolist())
        for x in (grads, parameters)
    )
    return gradient / theta


def slow_algorithm_1(model, epochs, config, plan=None):
    """Algorithm 1 with SGD by hand, or with re-balancing steps as in `plan`.

    Returns the modality that each step curated, and d after each step.
    """
    parameters, modalities = dict(model.named_parameters()), list(model.encoders)
    velocity = {name: torch.zeros_like(p) for name, p in parameters.items()}
    own, cross = (dict.fromkeys(modalities, 0.0) for _ in range(2))
    seen = [{m: [] for m in modalities} for _ in model.blocks]
    favoured, left, curated, differences = None, 0, [], []
    for epoch, batches in enumerate(epochs):
        for inputs, labels, _ in batches:
            curated.append(plan[len(curated)] if plan else favoured if left else None)
            logits, activations = slow_forward(model.train(), inputs, curated[-1], seen, config)
            pairs = [zip(x.log_softmax(dim=1), labels, strict=True) for x in logits.values()]
            loss = -sum(row[y] for rows in pairs for row, y in rows) / len(labels)
            grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
            grads = dict(zip(parameters, grads, strict=True))
            for m in modalities if curated[-1] is None else ():
                for block, w in zip(seen, activations, strict=True):
                    block[m].append(w[m])
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
                        p.sub_(config.lr * v.mul_(0.9).add_(g + config.weight_decay * p))
    return curated, differences


def draw_epochs(modalities=PAIR, count=4):
    """Of three steps each, the last batch short; windows span epochs."""
    return [draw_batches([8, 8, 3], modalities) for _ in range(count)]


def assert_same_weights(model, expected):
    for found, weight in zip(model.parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("gate_mean", ["after", "before"])
@pytest.mark.parametrize(
    ("method", "modalities", "factor", "tolerance"),
    [
        *(("guided", PAIR, 1.0, 0.0), ("random", PAIR, 1.0, 0.0)),
        pytest.param("guided", TRIPLE, 2.0, 0.0, marks=pytest.mark.slow),
        pytest.param("guided", PAIR, 1.0, "mean", marks=pytest.mark.slow),
    ],
)
def test_training_equals_a_slow_algorithm_1(method, modalities, factor, tolerance, gate_mean):
    """Curated steps, d after every step, and weights. Mean gates are of all samples of regular
    steps; mu of a step is with the weights before it; curated excite layers stand still.

    The mean of |d| under joint training is a tolerance that is left in some steps.
    """
    model = small_net(modalities, factor)
    epochs = [draw_batches([8, 8, 3], modalities) for _ in range(4)]  # windows span epochs
    late = train(copy.deepcopy(model), epochs, method="joint").steps("d_speed")[3:]
    if tolerance == "mean":
        tolerance = sum(map(abs, late)) / len(late)
        first = next(i for i, d in enumerate(late) if abs(d) > tolerance)
    knobs = {"method": method, "gate_mean": gate_mean, "window": 2, "tolerance": tolerance}
    twin, run = copy.deepcopy(model), train(model, epochs, **knobs)
    plan = run.steps("curated") if method == "random" else None
    curated, differences = slow_algorithm_1(twin, epochs, config_of(**knobs), plan)
    assert run.steps("curated") == curated and len(set(curated)) > 1
    assert not any(curated[:4]) and (not tolerance or not any(curated[: 4 + first]))
    assert run.steps("d_speed") == pytest.approx(differences, rel=1e-5)
    s = run.state["balance"]["speed"].speeds().tolist()
    assert run.history[-1]["speed"] == dict(zip(modalities, s, strict=True))
    assert [entry["d_speed"] for entry in run.history] == run.steps("d_speed")[2::3]
    for found, weight in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(found, weight, rtol=1e-4, atol=1e-6)


def swapped(model):
    """The same network with its modalities in the other order."""
    reverse = dict(reversed(copy.deepcopy(model.encoders).items()))
    twin = greedy.GreedyNet(reverse, 3).double()
    twin.heads.load_state_dict(model.heads.state_dict())
    for mine, theirs in zip(twin.blocks, model.blocks, strict=True):
        state = theirs.state_dict()
        widths = [layer.out_features for layer in theirs.excite.values()]
        state["squeeze.weight"] = torch.cat(state["squeeze.weight"].split(widths, 1)[::-1], 1)
        mine.load_state_dict(state)
    return twin


def test_swapping_the_modalities_swaps_u_and_s_and_turns_both_differences():
    model, split, epochs = settled(), draw_split(60), [draw_batches([8, 8, 3])] * 3
    twin, means = swapped(model).eval(), draw_means(model)
    mine, theirs = (greedy.evaluate(x, split, config_of(), means)[0] for x in (model, twin))
    assert all(mine[m] == theirs[m] for m in PAIR) and mine["d_util"] == -theirs["d_util"] != 0
    mine, theirs = (train(x, epochs, tolerance=0.0) for x in (model, twin))
    assert theirs.history[-1]["speed"] == pytest.approx(mine.history[-1]["speed"], rel=1e-6)
    turned = [-d for d in theirs.steps("d_speed")]
    assert mine.steps("d_speed") == pytest.approx(turned, rel=1e-6)
    assert min(map(abs, turned)) > 1e-3 and mine.steps("curated") == theirs.steps("curated")


@pytest.mark.parametrize("after", [True, False])
def test_gate_means_under_bf16_lose_nothing(after):
    """Activations come in bfloat16; a mean rounded to it after every step would drift."""
    block = MMTM({"a": 2})
    means = greedy.GateMeans([{"a": 2}], after=after)
    with pytest.raises(ValueError, match="mean gates need a regular step first"):
        means.gates([block], "a")
    activations = [torch.randn(100, 2).add(2).bfloat16() for _ in range(3)]
    for w in activations:
        means.update([block], [{"a": w}])
    w = torch.cat(activations).double()
    expected = w.sigmoid().mean(dim=0) if after else w.mean(dim=0).sigmoid()
    (gates,) = means.gates([block], "a")
    torch.testing.assert_close(gates["a"], expected.float(), rtol=1e-6, atol=0)


class Waits(TorchDispatchMode):
    """Counts the reads of a single number off the device: `.item()`, `float(x)`, `if x`."""

    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_regular_step_waits_for_the_device_once_and_others_never(monkeypatch):
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x.shape) or tolist(x))
    with Waits() as waits:
        run = train(
            small_net(), [draw_batches([8] * 2), draw_batches([8] * 7)], tolerance=0.0, window=2
        )
    regular = [m is None for m in run.steps("curated")]
    assert regular == [True] * 2 + [True, False, False] * 2 + [True]
    assert waits.count == 0
    assert len(reads) == 3 + 2 * 2  # the decisions of three steps, and two reads in every epoch


# ---- Algorithm 1: when to re-balance ----


@pytest.mark.parametrize(
    ("modalities", "s", "curated"),
    [
        (PAIR, (0.5, 0.25), None),  # |d| equals the tolerance
        (PAIR, (0.25, 0.5), None),
        (PAIR, (0.5, 0.125), "gray"),
        (PAIR, (0.125, 0.5), "color"),
        (PAIR, (math.nan, 0.5), None),
        (PAIR, (0.5, math.nan), None),
        (TRIPLE, (0.125, 0.375, 0.25), None),  # the two most different
        (TRIPLE, (0.0, 0.5, 0.25), "color"),
        (TRIPLE, (0.5, 0.25, 0.0), "gray"),
        (TRIPLE, (0.25, 0.0, 0.5), "depth"),
        (TRIPLE, (0.0, 0.5, math.nan), None),
        (TRIPLE, (math.nan, 0.0, 0.5), None),
    ],
)
def test_tolerance_and_nan(modalities, s, curated):
    """And a window of three steps that nothing cuts short; none in the warm-up."""
    speed, opposite = (SimpleNamespace(speeds=lambda x=x: torch.tensor(x)) for x in (s, s[::-1]))
    policy = greedy.Guided(modalities, tolerance=0.25, window=3)
    policy.after_step(speed, warm_up=True)
    assert policy.curated is None
    policy.after_step(speed, warm_up=False)
    for _ in range(3):
        assert policy.curated == curated
        policy.after_step(opposite if curated else speed, warm_up=False)
    assert policy.curated is None  # a regular step


@pytest.mark.parametrize("modalities", [PAIR, TRIPLE])
def test_random_draws_all_modes_alike_and_each_step_anew(modalities):
    """On the global generator, and without asking for speeds."""

    def play(steps, warm_up=False):
        for _ in range(steps):
            policy.after_step(None, warm_up)
            yield policy.curated

    policy = greedy.Random(modalities, tolerance=0.1, window=5)
    assert list(play(20, warm_up=True)) == [None] * 20
    curated, modes = list(play(6000)), (None, *modalities)
    pairs, share = Counter(pairwise(curated)), 1 / len(modes)
    for a in modes:
        sigma = math.sqrt(share * (1 - share) / 6000)
        assert curated.count(a) / 6000 == pytest.approx(share, abs=4 * sigma)
        for b in modes:
            assert pairs[a, b] / 6000 == pytest.approx(share**2, abs=4 * share / math.sqrt(6000))
    plans = [torch.manual_seed(seed) and list(play(30)) for seed in (7, 7, 8)]
    assert plans[0] == plans[1] != plans[2]


# ---- RUBi ----


def test_rubi_by_hand():
    rubi = RUBi(dim=3, num_classes=4, hidden=5)
    z, labels = torch.randn(6, 3), torch.tensor([0, 1, 2, 3, 1, 1])
    predictions, by_hand = [torch.randn(6, 4) for _ in range(2)], 0.0
    for i, y in enumerate(labels.tolist()):
        q = z[i].tolist()
        for layer in rubi.mlp:
            is_linear = isinstance(layer, nn.Linear)
            q = slow_linear(layer, q) if is_linear else [max(0.0, v) for v in q]
        biased = slow_linear(rubi.classifier, q)
        masked = [[p[i, k].item() * sigmoid(q[k]) for k in range(4)] for p in predictions]
        for weight, logits in zip((0.5, 1, 1), (biased, *masked), strict=True):
            by_hand += weight * (math.log(sum(map(math.exp, logits))) - logits[y]) / 6
    assert rubi(z, predictions, labels, weight=0.5).item() == pytest.approx(by_hand, rel=1e-5)


def test_the_mask_trains_itself_and_not_the_biased_encoder():
    """Gradients of the network are those of a loss with a constant mask."""
    model, batches = small_net(), draw_batches([8])
    ((inputs, labels, _),) = batches
    twin = copy.deepcopy(model).train()
    run = train(model, [batches], method="rubi", biased="color", lr=1e-30)
    rubi, (group,) = run.state["rubi"], run.state["optimizer"].param_groups
    assert len(group["params"]) == len([*model.parameters(), *rubi.parameters()])
    assert all(p.grad.any() for p in rubi.parameters())
    logits, features, _, _ = greedy.forward(twin, inputs, config_of())
    mask = rubi.mlp(features["color"]).sigmoid().detach()
    sum(F.cross_entropy(x * mask, labels) for x in logits.values()).backward()
    for mine, theirs in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)
