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
from conftest import ROOT
from torch.nn.utils import get_total_norm
from torch.utils._python_dispatch import TorchDispatchMode

import greedy_balance as greedy
from common.datasets import TensorSplit
from common.encoders import Encoder
from common.fusion import MMTM, SE
from common.rebalance import RUBi

CPU = torch.device("cpu")
PAIR, TRIPLE = ("gray", "color"), ("gray", "color", "depth")
# Channels and spatial size of the maps at a block.
MAPS = {
    "two": {"a": (3, (4, 4)), "b": (5, (2, 3))},
    "three": {"a": (2, (3,)), "b": (4, (2, 2)), "c": (3, (2, 1, 3))},
    "video": {"a": (3, (2, 2, 2)), "b": (3, (3, 2, 2))},
}


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


def config_of(**knobs):
    known = {"device": CPU, "precision": "fp32", "l1": 0.0, "gate_mean": "after", "biased": None}
    return SimpleNamespace(**{**known, **knobs})


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
    return {
        m: torch.randn(count, 1 + i, 4 + i, 4, dtype=torch.float64)
        for i, m in enumerate(modalities)
    }


def draw_batches(sizes, modalities=PAIR):
    """What a split's `batches` yields."""
    return [
        (draw_inputs(size, modalities), torch.randint(3, (size,)), torch.arange(size))
        for size in sizes
    ]


def draw_split(count, modalities=PAIR):
    return TensorSplit(draw_inputs(count, modalities), torch.randint(3, (count,)), dict)


@torch.no_grad()
def settle(model):
    """Give BatchNorm running means, the gates a wide range, and every class some predictions."""
    for weight in (layer.weight for b in model.blocks for layer in (b.squeeze, *b.excite.values())):
        weight *= 4
    inputs = draw_inputs(50, list(model.encoders))
    model.train()(inputs)
    for m, logits in model.eval()(inputs).logits.items():
        model.heads[m].bias -= logits.mean(dim=0)
    return model


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


# ---- Eq. (1) and (2): MMTM ----


def draw_maps(case, batch=3):
    return {m: torch.randn(batch, c, *space) for m, (c, space) in MAPS[case].items()}


def build_block(case, **options):
    return MMTM({m: c for m, (c, _) in MAPS[case].items()}, **options)


def slow_linear(layer, x):
    rows = zip(layer.weight.tolist(), layer.bias.tolist(), strict=True)
    return [sum(w * v for w, v in zip(row, x, strict=True)) + b for row, b in rows]


def slow_squeeze(x):
    """h of one map (B, C, *space): a list for each sample."""
    means = []
    for sample in x:
        values = [channel.flatten().tolist() for channel in sample]
        means.append([sum(v) / len(v) for v in values])
    return means


def slow_mmtm(block, maps, factor=1.0, gates=None, squeezed=None):
    """Gated maps; gates, squeezed: modality -> a list for each sample, instead of the computed."""
    h = {m: slow_squeeze(x) for m, x in maps.items()} | (squeezed or {})
    gated = {m: torch.empty_like(x) for m, x in maps.items()}
    for m, x in maps.items():
        for i, sample in enumerate(x):
            joined = [value for other in block.excite for value in h[other][i]]
            hidden = [max(0.0, value) for value in slow_linear(block.squeeze, joined)]
            gate = [factor * sigmoid(w) for w in slow_linear(block.excite[m], hidden)]
            if gates and m in gates:
                gate = gates[m][i]
            for c, channel in enumerate(sample):
                gated[m][i, c] = gate[c] * channel
    return gated


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("case", list(MAPS))
def test_mmtm_equals_loops(case, factor):
    block, maps = build_block(case, factor=factor), draw_maps(case)
    gated, h, w = block(maps)
    assert block.excite.keys() == w.keys() == maps.keys()
    for m, expected in slow_mmtm(block, maps, factor).items():
        torch.testing.assert_close(gated[m], expected)
        torch.testing.assert_close(h[m], torch.tensor(slow_squeeze(maps[m])))
        spread_out = (factor * w[m].sigmoid()).reshape(*w[m].shape, *[1] * (maps[m].dim() - 2))
        torch.testing.assert_close(gated[m], spread_out * maps[m])


def test_the_order_of_the_maps_does_not_matter():
    block, maps = build_block("three"), draw_maps("three")
    gated = block(maps)[0]
    again = block(dict(reversed(maps.items())))[0]
    assert all(torch.equal(gated[m], again[m]) for m in maps)


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("case", list(MAPS))
def test_given_gates_replace_the_computed_ones(case, by_sample):
    block, maps = build_block(case), draw_maps(case)
    gate = torch.rand(3, MAPS[case]["a"][0]) if by_sample else torch.rand(MAPS[case]["a"][0])
    gated, _, w = block(maps, gates={"a": gate})
    expected = slow_mmtm(block, maps, gates={"a": (gate if by_sample else [gate] * 3)})
    for m in maps:
        torch.testing.assert_close(gated[m], expected[m])
    assert w.keys() == maps.keys() - {"a"}


@pytest.mark.parametrize("by_sample", [False, True])
@pytest.mark.parametrize("case", list(MAPS))
def test_given_squeezed_features_replace_the_computed_ones(case, by_sample):
    block, maps = build_block(case), draw_maps(case)
    h = torch.randn(3, MAPS[case]["b"][0]) if by_sample else torch.randn(MAPS[case]["b"][0])
    gated, own, _ = block(maps, squeezed={"b": h})
    given = (h if by_sample else h.expand(3, -1)).tolist()
    for m, expected in slow_mmtm(block, maps, squeezed={"b": given}).items():
        torch.testing.assert_close(gated[m], expected)
        torch.testing.assert_close(own[m], torch.tensor(slow_squeeze(maps[m])))


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
    logits = {m: torch.randn(4, 3) for m in TRIPLE}
    labels = torch.tensor([0, 2, 1, 1])
    expected = [
        [sum(logits[m][i, k].item() for m in TRIPLE) / 3 for k in range(3)] for i in range(4)
    ]
    torch.testing.assert_close(greedy.fuse(logits), torch.tensor(expected))
    by_hand = 0
    for x in logits.values():
        rows = zip(x.tolist(), labels.tolist(), strict=True)
        by_hand += sum(math.log(sum(map(math.exp, row))) - row[y] for row, y in rows) / 4
    model = nn.Linear(2, 2)
    loss = greedy.training_loss(model, logits, {}, labels, None, config_of())
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    magnitudes = sum(abs(x) for row in model.weight.tolist() for x in row)
    magnitudes += sum(abs(x) for x in model.bias.tolist())
    loss = greedy.training_loss(model, logits, {}, labels, None, config_of(l1=0.3))
    assert loss.item() == pytest.approx(by_hand + 0.3 * magnitudes, rel=1e-6)


def test_uni_modal_network_is_one_branch_with_squeeze_and_excitation():
    model = small_net(["gray"]).eval()
    x = draw_inputs(3)["gray"]
    logits = model({"gray": x}).logits["gray"]
    for i, stage in enumerate(model.encoders["gray"].stages):
        x = stage(x)
        if i > 0:
            block = model.blocks[i - 1]
            gate = block.excite["gray"](block.squeeze(x.mean(dim=(2, 3))).relu()).sigmoid()
            x = x * gate[:, :, None, None]
    assert all(isinstance(block, SE) for block in model.blocks)
    torch.testing.assert_close(logits, model.heads["gray"](x.mean(dim=(2, 3))))


# ---- Eq. (6) to (8): the branches cut off from each other ----


def maps_at_blocks(model, inputs):
    """What each block is given in a plain forward pass."""
    seen = []
    hooks = [
        b.register_forward_pre_hook(lambda _, args: seen.append(args[0])) for b in model.blocks
    ]
    with torch.no_grad():
        model(inputs)
    for hook in hooks:
        hook.remove()
    return seen


def test_training_means_equal_a_loop_over_samples():
    model, split = settle(small_net()), draw_split(300)  # more than one batch, the last one short
    means = greedy.squeezed_means(model, split, config_of())
    assert not model.training and len(means) == 3
    sums = [dict.fromkeys(PAIR, 0.0) for _ in range(3)]
    for i in range(300):
        maps = maps_at_blocks(model, {m: x[i : i + 1] for m, x in split.tensors.items()})
        for total, at_block in zip(sums, maps, strict=True):
            for m, x in at_block.items():
                total[m] = total[m] + x[0].flatten(1).mean(dim=1)
    for mean, total in zip(means, sums, strict=True):
        assert mean.keys() == total.keys()
        for m in PAIR:
            torch.testing.assert_close(mean[m].double(), total[m] / 300, rtol=1e-6, atol=1e-7)


def draw_means(model):
    """Made-up training means for every block."""
    return [
        {m: torch.rand(layer.out_features).double() for m, layer in block.excite.items()}
        for block in model.blocks
    ]


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
def test_cut_off_branches_equal_separate_passes(modalities):
    model, inputs = settle(small_net(modalities)).eval(), draw_inputs(6, modalities)
    means = draw_means(model)
    logits = model(inputs, means=means).logits
    plain = model(inputs).logits
    for m in modalities:
        torch.testing.assert_close(logits[m], slow_cut_branch(model, m, inputs[m], means))
        assert not torch.allclose(logits[m], plain[m])


@pytest.mark.parametrize("modalities", [PAIR, TRIPLE])
def test_a_cut_off_branch_sees_its_own_modality_alone(modalities):
    model, inputs = settle(small_net(modalities)).eval(), draw_inputs(6, modalities)
    means = draw_means(model)
    logits, plain = model(inputs, means=means).logits, model(inputs).logits
    for m in modalities:
        others = {
            other: inputs[other] if other == m else 9 * torch.randn_like(inputs[other])
            for other in modalities
        }
        assert torch.equal(model(others, means=means).logits[m], logits[m])
        assert not torch.equal(model(others).logits[m], plain[m])


@pytest.mark.parametrize("case", list(MAPS))
def test_cut_off_is_one_pass_of_the_block_for_each_modality(case):
    block, maps = build_block(case), draw_maps(case)
    means = {m: torch.randn(c) for m, (c, _) in MAPS[case].items()}
    gated = greedy.cut_off(block, maps, means)
    assert gated.keys() == maps.keys()
    for m in maps:
        others = {other: [mean.tolist()] * 3 for other, mean in means.items() if other != m}
        torch.testing.assert_close(gated[m], slow_mmtm(block, maps, squeezed=others)[m])


# ---- Def. 4.1: utilization ----


def test_utilization_by_hand():
    assert greedy.utilization(80.0, 60.0) == 0.25
    assert greedy.utilization(50.0, 60.0) == pytest.approx(-0.2)
    assert greedy.utilization(20.0, 70.0) == -2.5  # no bound of -1
    assert greedy.utilization(40.0, 40.0) == 0
    assert greedy.utilization(0.0, 10.0) == 0  # nothing to divide by


def test_difference_by_hand():
    assert greedy.difference([0.25, 0.75]) == -0.5
    assert greedy.difference([0.75, 0.25]) == 0.5
    assert greedy.difference([0.5, -0.25, 1.0]) == greedy.difference([1.0, 0.5, -0.25]) == 1.25


def percent_right(logits, labels):
    hits = [row.argmax() == y for row, y in zip(logits, labels, strict=True)]
    return 100 * sum(map(bool, hits)) / len(hits)


@pytest.mark.parametrize("modalities", [PAIR, TRIPLE])
@torch.no_grad()
def test_evaluation_measures_the_branches_whole_and_cut_off(modalities):
    """The last branch is better cut off: most labels are what it then says."""
    model, split = settle(small_net(modalities)).eval(), draw_split(90, modalities)
    means, last = draw_means(model), modalities[-1]
    cut = slow_cut_branch(model, last, split.tensors[last], means)
    split.all_labels[:70] = cut.argmax(dim=1)[:70]
    metrics, predictions = greedy.evaluate(model, split, config_of(), means)
    plain, rates = model(split.tensors).logits, []
    for m in modalities:
        whole = percent_right(plain[m], split.labels)
        cut = percent_right(slow_cut_branch(model, m, split.tensors[m], means), split.labels)
        rates.append((whole - cut) / whole)
        assert metrics[m] == pytest.approx({"branch": whole, "cut": cut, "u": rates[-1]})
    assert len(set(rates)) == len(rates) and rates[-1] < 0
    d_util = rates[0] - rates[1] if len(rates) == 2 else max(rates) - min(rates)
    assert metrics["d_util"] == pytest.approx(d_util)
    fused = sum(plain.values()) / len(modalities)
    assert metrics["accuracy"] == pytest.approx(percent_right(fused, split.labels))
    torch.testing.assert_close(torch.from_numpy(predictions["logits"]), fused.float())


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


def test_swapping_the_modalities_swaps_u_and_turns_d_util():
    model, split = settle(small_net()), draw_split(60)
    means = draw_means(model)
    found = greedy.evaluate(model, split, config_of(), means)[0]
    twin = greedy.evaluate(swapped(model), split, config_of(), means)[0]
    assert all(twin[m] == found[m] for m in PAIR)
    assert twin["d_util"] == -found["d_util"] != 0


# ---- Def. 5.1: learning speed ----


def slow_mu(parameters):
    """||gradient||^2 / ||theta||^2 with every number of every parameter in one vector."""
    gradient = sum(g * g for p in parameters for g in p.grad.flatten().tolist())
    return gradient / sum(x * x for p in parameters for x in p.detach().flatten().tolist())


def slow_groups(model):
    """(theta_k, theta_k') of every modality, by the parameters' names."""
    patterns = [
        (rf"(encoders|heads)\.{m}\.", rf"blocks\.\d\.(squeeze|excite\.{m})\.")
        for m in model.encoders
    ]
    return [
        [[p for name, p in model.named_parameters() if re.match(pattern, name)] for pattern in pair]
        for pair in patterns
    ]


def test_effective_update_equals_a_loop():
    parameters = [nn.Parameter(torch.randn(3, 4).double()), nn.Parameter(torch.randn(5).double())]
    for p in parameters:
        p.grad = torch.randn_like(p)
    found = greedy.effective_update(parameters).item()
    assert found == pytest.approx(slow_mu(parameters), rel=1e-12)
    ratios = [slow_mu([p]) for p in parameters]
    assert found != pytest.approx(sum(ratios))  # one ratio of sums, no sum of ratios


@pytest.mark.parametrize("modalities", [PAIR, TRIPLE])
def test_groups(modalities):
    model = small_net(modalities)
    groups = model.parameter_groups()
    ids = [[{id(p) for p in group} for group in pair] for pair in groups]
    assert ids == [[{id(p) for p in group} for group in pair] for pair in slow_groups(model)]
    assert all(len(group) == len(set(map(id, group))) for pair in groups for group in pair)
    owns, crosses = zip(*ids, strict=True)
    assert set.union(*owns, *crosses) == {id(p) for p in model.parameters()}
    shared = {id(p) for block in model.blocks for p in block.squeeze.parameters()}
    assert set.intersection(*crosses) == shared and len(shared) == 6
    assert not set.union(*owns) & set.union(*crosses) and not set.intersection(*owns)


def train_steps(model, batches, lr=0.5):
    """Regular steps by plain SGD; after each, sums of mu by loops and the module's speeds."""
    speed = greedy.LearningSpeed(len(model.encoders))
    optimizer = torch.optim.SGD(model.parameters(), lr, momentum=0.9, weight_decay=0.1)
    own, cross = [[0.0] * len(model.encoders) for _ in range(2)]
    for inputs, labels, _ in batches:
        logits = model.train()(inputs).logits
        optimizer.zero_grad()
        sum(F.cross_entropy(x, labels) for x in logits.values()).backward()
        speed.update(model.parameter_groups())
        for k, (theta, cross_theta) in enumerate(slow_groups(model)):
            own[k] += slow_mu(theta)
            cross[k] += slow_mu(cross_theta)
        optimizer.step()
        yield speed.speeds().tolist(), [math.log10(b / a) for a, b in zip(own, cross, strict=True)]


@pytest.mark.parametrize("modalities", [PAIR, TRIPLE])
def test_speeds_equal_loops_over_several_steps(modalities):
    batches = draw_batches([8, 8, 8, 3], modalities)
    for found, expected in train_steps(small_net(modalities), batches):
        assert found == pytest.approx(expected, rel=1e-9)


def test_swapping_the_modalities_swaps_s_and_turns_d_speed():
    model, batches = small_net(), draw_batches([8] * 5)
    twin = swapped(model)
    pairs = zip(train_steps(model, batches), train_steps(twin, batches), strict=True)
    for (mine, _), (theirs, _) in pairs:
        assert theirs == pytest.approx(mine[::-1], rel=1e-6)
        assert greedy.difference(theirs) == pytest.approx(-greedy.difference(mine), rel=1e-6)
        assert abs(greedy.difference(mine)) > 1e-3


def test_identical_modalities_and_branches_give_d_speed_zero():
    config = SimpleNamespace(dataset="digits", method="joint", seed=0, device=CPU, gate_factor=1.0)
    config.pretrained = False
    shapes = {"gray": (1, 8, 8), "gray-2": (1, 8, 8)}
    splits = SimpleNamespace(modalities=tuple(shapes), shapes=shapes, num_classes=10)
    model = greedy.build_model(config, splits)
    model.encoders["gray-2"].load_state_dict(model.encoders["gray"].state_dict())
    model.heads["gray-2"].load_state_dict(model.heads["gray"].state_dict())
    for block in model.blocks:
        block.excite["gray-2"].load_state_dict(block.excite["gray"].state_dict())
        first, second = block.squeeze.weight.data.chunk(2, dim=1)
        second.copy_(first)
    x = torch.rand(4, 16, 1, 8, 8)
    batches = [(dict.fromkeys(shapes, part), torch.randint(10, (16,)), None) for part in x]
    for step, (s, _) in enumerate(train_steps(model, batches, lr=0.01)):
        assert greedy.difference(s) == 0, step
        assert s[0] < 0


# ---- Eq. (13) and (14): re-balancing steps ----


class Script:
    """A policy that curates as written."""

    def __init__(self, *curated):
        self.plan = list(curated)

    @property
    def curated(self):
        return self.plan[0]

    def after_step(self, speed, warm_up):
        self.plan.pop(0)


class Watch:
    """What the blocks were given and what they gave, step by step."""

    def __init__(self, model):
        self.calls = []
        for block in model.blocks:
            block.register_forward_hook(self.note, with_kwargs=True)

    def note(self, block, args, kwargs, result):
        gated, h, w = result
        detached = [{m: x.detach() for m, x in part.items()} for part in (gated, h, w)]
        self.calls.append((args[0], kwargs.get("gates"), *detached))

    def steps(self):
        """For each step and block: maps, given gates, gated maps, h, w."""
        return [self.calls[i : i + 3] for i in range(0, len(self.calls), 3)]


def train_by_script(
    plan, sizes, modalities=PAIR, gate_mean="after", factor=1.0, before_step=lambda model: None
):
    """One epoch of greedy_balance with a written plan, in float64."""
    model = small_net(modalities, factor)
    config = config_of(gate_mean=gate_mean)
    balance = greedy.Balance(model, config)
    optimizer = torch.optim.SGD(model.parameters(), 0.3, momentum=0.9)
    optimizer.register_step_pre_hook(lambda *_: before_step(model))
    watch = Watch(model)
    batches = draw_batches(sizes, modalities)
    entry = greedy.train_epoch(
        model, balance, Script(*plan, None), None, optimizer, batches, config, warm_up=False
    )
    assert entry["steps"]["curated"] == list(plan)
    return model, balance, watch


class Waits(TorchDispatchMode):
    """Counts the reads of a single number off the device: `.item()`, `float(x)`, `if x`."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count += function is torch.ops.aten._local_scalar_dense.default
        return function(*args, **(kwargs or {}))


def test_a_regular_step_waits_for_the_device_once_and_others_never(monkeypatch):
    model, config = small_net(PAIR), config_of(gate_mean="after")
    balance = greedy.Balance(model, config)
    policy = greedy.Guided(list(PAIR), tolerance=0.0, window=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    reads, tolist = [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: reads.append(x.shape) or tolist(x))
    batches = draw_batches([8] * 7, PAIR)
    with Waits() as waits:
        entry = greedy.train_epoch(
            model, balance, policy, None, optimizer, batches, config, warm_up=False
        )
    curated = entry["steps"]["curated"]
    assert [m is None for m in curated] == [True, False, False] * 2 + [True]
    assert waits.count == 0
    assert len(reads) == 3 + 2  # the decisions of three regular steps, and two reads at the end


@pytest.mark.parametrize("factor", [1.0, 2.0])
@pytest.mark.parametrize("gate_mean", ["after", "before"])
@pytest.mark.parametrize("modalities", [PAIR, TRIPLE])
def test_curated_gates_are_the_mean_over_samples_of_regular_steps(modalities, gate_mean, factor):
    plan = [None, None, "gray", "gray", None, "color", modalities[-1], "gray"]
    sizes = [5, 2, 4, 1, 3, 3, 2, 2]
    _, _, watch = train_by_script(plan, sizes, modalities, gate_mean, factor)
    regular = [[] for _ in range(3)]  # activations so far at each block, a dict for each sample
    for size, curated, step in zip(sizes, plan, watch.steps(), strict=True):
        for block, (maps, given, gated, _, w) in zip(regular, step, strict=True):
            if curated is None:
                assert not given and w.keys() == set(modalities)
                block += [{m: w[m][i].tolist() for m in modalities} for i in range(size)]
                continue
            assert w.keys() == set(modalities) - {curated}
            for c in range(maps[curated].shape[1]):
                seen = [sample[curated][c] for sample in block]
                if gate_mean == "after":
                    gate = factor * sum(sigmoid(x) for x in seen) / len(seen)
                else:
                    gate = factor * sigmoid(sum(seen) / len(seen))
                torch.testing.assert_close(
                    gated[curated][:, c], gate * maps[curated][:, c], rtol=1e-5, atol=1e-7
                )
            for m in w:  # computed as ever
                gate = factor * w[m].sigmoid()[:, :, None, None]
                torch.testing.assert_close(gated[m], gate * maps[m])


def test_speeds_are_of_regular_steps_with_the_weights_before_the_step():
    """mu is noted just before the optimizer's step, and again just after the last one."""
    plan, noted = [None, "gray", None, "color", None], []

    def note(model):
        if plan[len(noted)]:  # some gradients are None
            noted.append(None)
        else:
            noted.append([[slow_mu(theta) for theta in pair] for pair in slow_groups(model)])

    model, balance, _ = train_by_script(plan, [8] * 5, before_step=note)
    regular = [step for step in noted if step]
    for k, s in enumerate(balance.speed.speeds().tolist()):
        own, cross = (sum(step[k][part] for step in regular) for part in (0, 1))
        assert s == pytest.approx(math.log10(cross / own), rel=1e-9)
    assert slow_mu(slow_groups(model)[0][1]) != pytest.approx(regular[-1][0][1], rel=1e-6)


@pytest.mark.parametrize("curated", TRIPLE)
def test_only_the_excite_layers_of_the_curated_modality_get_no_gradient(curated):
    model, _, _ = train_by_script([None, curated], [8, 8], TRIPLE)
    without = {name for name, p in model.named_parameters() if p.grad is None}
    assert without == {
        f"blocks.{i}.excite.{curated}.{part}" for i in range(3) for part in ("weight", "bias")
    }
    for name, p in model.named_parameters():
        if p.grad is not None and name.endswith("squeeze.weight"):
            assert p.grad.any(), name


def test_the_curated_excite_layers_stand_still_and_all_else_moves():
    """Momentum of earlier steps does not move them either."""
    torch.manual_seed(1)
    before, _, _ = train_by_script([None, None], [8, 8])
    torch.manual_seed(1)
    after, _, _ = train_by_script([None, None, "color"], [8, 8, 8])
    names = {
        name for name, p in after.named_parameters() if not re.search(r"stages.\d.0.bias", name)
    }
    moved = {n for n in names if not torch.equal(after.get_parameter(n), before.get_parameter(n))}
    assert names - moved == {n for n in names if "excite.color" in n}  # BatchNorm takes out biases


def state_of(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def same_state(module, before):
    after = module.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[k], before[k]) for k in before)


def test_rebalancing_steps_add_to_no_sum():
    torch.manual_seed(2)
    _, before, _ = train_by_script([None, None], [5, 3])
    torch.manual_seed(2)
    _, after, _ = train_by_script([None, None, "gray", "color"], [5, 3, 4, 4])
    assert same_state(after, state_of(before))
    assert after.gate_means.samples == 8
    torch.manual_seed(2)
    _, longer, _ = train_by_script([None, None, "gray", None], [5, 3, 4, 4])
    assert not same_state(longer, state_of(before)) and longer.gate_means.samples == 12


def test_evaluation_changes_nothing_and_is_never_curated():
    model, balance, watch = train_by_script([None, "gray"], [8, 8])
    split, model_before, balance_before = draw_split(30), state_of(model), state_of(balance)
    watch.calls.clear()
    means = greedy.squeezed_means(model, split, config_of())
    greedy.evaluate(model, split, config_of(), means)
    assert same_state(model, model_before) and same_state(balance, balance_before)
    assert watch.calls and not any(given for _, given, *_ in watch.calls)


@pytest.mark.parametrize("after", [True, False])
def test_gate_means_under_bf16_lose_nothing(after):
    """Activations come in bfloat16; a mean rounded to it after every step would drift."""
    block = MMTM({"a": 2})
    means = greedy.GateMeans([{"a": 2}], after=after)
    activations = [torch.randn(100, 2).add(2).bfloat16() for _ in range(3)]
    for w in activations:
        means.update([block], [{"a": w}])
    w = torch.cat(activations).double()
    expected = w.sigmoid().mean(dim=0) if after else w.mean(dim=0).sigmoid()
    (gates,) = means.gates([block], "a")
    torch.testing.assert_close(gates["a"], expected.float(), rtol=1e-6, atol=0)


# ---- Algorithm 1: when to re-balance ----


class Speeds:
    """A LearningSpeed that reads from a list, and counts how often it is asked."""

    def __init__(self, *values):
        self.values, self.asked = values, 0

    def speeds(self):
        self.asked += 1
        return torch.tensor(self.values, dtype=torch.float64)


def play(policy, speeds, warm_up=False):
    """The modality that each step curates; speeds: one `Speeds` for each step."""
    curated = []
    for speed in speeds:
        curated.append(policy.curated)
        policy.after_step(speed, warm_up)
    return curated


@pytest.mark.parametrize("window", [1, 3, 5])
def test_schedule_under_lasting_imbalance(window):
    """Never in epoch 1; from step 2 of epoch 2, a regular step and Q re-balancing ones in turn."""
    policy = greedy.Guided(PAIR, tolerance=0.1, window=window)
    speed = Speeds(0.0, 1.0)
    assert play(policy, [speed] * 7, warm_up=True) == [None] * 7
    assert speed.asked == 0
    cycle = [None, *["color"] * window]
    assert play(policy, [speed] * 3 * len(cycle)) == cycle * 3
    assert speed.asked == 3  # once a regular step


def test_the_faster_cross_learner_is_curated_until_the_window_ends():
    policy = greedy.Guided(PAIR, tolerance=0.1, window=2)
    gray, color, even = Speeds(-1.0, -1.5), Speeds(-1.5, -1.0), Speeds(-1.0, -1.0)
    plan = [gray, color, color, color, even, even, even, color, even]
    assert play(policy, plan) == [
        *(None, "gray", "gray"),
        *(None, "color", "color"),
        *(None, None, "color"),
    ]
    assert policy.curated == "color"  # the second step of its window is still to come


@pytest.mark.parametrize(
    ("s", "curated"),
    [
        ((0.5, 0.25), None),  # |d| equals the tolerance
        ((0.25, 0.5), None),
        ((0.5, 0.125), "gray"),
        ((0.125, 0.5), "color"),
        ((math.nan, 0.5), None),
        ((0.5, math.nan), None),
    ],
)
def test_tolerance_and_nan(s, curated):
    policy = greedy.Guided(PAIR, tolerance=0.25, window=5)
    policy.after_step(Speeds(*s), warm_up=False)
    assert policy.curated == curated


@pytest.mark.parametrize("order", [(0, 1, 2), (1, 2, 0), (2, 0, 1)])
@pytest.mark.parametrize(("tolerance", "curates"), [(0.5, True), (0.75, False)])
def test_three_modalities_compare_the_two_most_different(order, tolerance, curates):
    s = dict(zip([TRIPLE[i] for i in order], (0.125, 0.75, 0.5), strict=True))
    policy = greedy.Guided(TRIPLE, tolerance, window=5)
    policy.after_step(Speeds(*(s[m] for m in TRIPLE)), warm_up=False)
    assert policy.curated == (max(s, key=s.get) if curates else None)


@pytest.mark.parametrize("steps", range(5))
def test_state_dict_goes_on_in_the_middle_of_a_window(steps):
    speed = Speeds(1.0, 0.0)
    policy, other = (greedy.Guided(PAIR, tolerance=0.1, window=3) for _ in range(2))
    play(policy, [speed] * steps)
    other.load_state_dict(copy.deepcopy(policy.state_dict()))
    opposite = Speeds(0.0, 1.0)
    assert play(other, [opposite] * 8) == play(policy, [opposite] * 8)


def test_regular_never_rebalances():
    speed = Speeds(0.0, 9.0)
    assert play(greedy.Regular(PAIR, 0.1, 5), [speed] * 9) == [None] * 9
    assert speed.asked == 0


@pytest.mark.parametrize("modalities", [PAIR, TRIPLE])
def test_random_draws_all_modes_alike_and_each_step_anew(modalities):
    policy, speed = greedy.Random(modalities, tolerance=0.1, window=5), Speeds()
    assert play(policy, [speed] * 20, warm_up=True) == [None] * 20
    curated = play(policy, [speed] * 6001)[1:]  # the first one was decided in the warm-up
    modes = (None, *modalities)
    share = 1 / len(modes)
    for mode in modes:
        sigma = math.sqrt(share * (1 - share) / 6000)
        assert curated.count(mode) / 6000 == pytest.approx(share, abs=4 * sigma)
    pairs = Counter(pairwise(curated))
    for a in modes:
        for b in modes:
            assert pairs[a, b] / 6000 == pytest.approx(share**2, abs=4 * share / math.sqrt(6000))
    assert speed.asked == 0


def test_random_draws_on_the_global_generator():
    policy = greedy.Random(PAIR, 0.1, 5)
    plans = []
    for seed in (7, 7, 8):
        torch.manual_seed(seed)
        plans.append(play(policy, [None] * 30)[1:])
    assert plans[0] == plans[1] != plans[2]


# ---- RUBi ----


def test_rubi_by_hand():
    rubi = RUBi(dim=3, num_classes=4, hidden=5)
    z = torch.randn(6, 3, requires_grad=True)
    predictions = [torch.randn(6, 4, requires_grad=True) for _ in range(2)]
    labels = torch.tensor([0, 1, 2, 3, 1, 1])
    loss = rubi(z, predictions, labels, weight=0.5)
    loss.backward()

    by_hand, gradients = 0.0, [torch.zeros(6, 4) for _ in range(2)]
    for i, y in enumerate(labels.tolist()):
        q = z[i].tolist()
        for layer in rubi.mlp:
            is_linear = isinstance(layer, nn.Linear)
            q = slow_linear(layer, q) if is_linear else [max(0.0, v) for v in q]
        mask = [sigmoid(v) for v in q]
        biased = slow_linear(rubi.classifier, q)
        by_hand += 0.5 * (math.log(sum(map(math.exp, biased))) - biased[y]) / 6
        for logits, gradient in zip(predictions, gradients, strict=True):
            masked = [x * s for x, s in zip(logits[i].tolist(), mask, strict=True)]
            total = sum(map(math.exp, masked))
            by_hand += (math.log(total) - masked[y]) / 6
            for k in range(4):
                p = math.exp(masked[k]) / total
                gradient[i, k] = mask[k] * (p - (k == y)) / 6
    assert loss.item() == pytest.approx(by_hand, rel=1e-5)
    assert z.grad is None
    for logits, gradient in zip(predictions, gradients, strict=True):
        torch.testing.assert_close(logits.grad, gradient)
    assert all(p.grad.any() for p in rubi.parameters())


def test_the_mask_trains_itself_and_not_the_biased_encoder():
    """Gradients of the network are those of a loss with a constant mask."""
    model, ((inputs, labels, _),) = small_net(), draw_batches([8])
    rubi = RUBi(model.encoders["color"].dim, 3)
    output = model(inputs)
    logits = {m: x.float() for m, x in output.logits.items()}
    config = config_of(biased="color")
    loss = greedy.training_loss(model, logits, output.features, labels, rubi, config)
    found = torch.autograd.grad(loss, list(model.parameters()), retain_graph=True)
    mask = rubi.mlp(output.features["color"].float()).sigmoid().detach()
    constant = sum(F.cross_entropy(x * mask, labels) for x in logits.values())
    expected = torch.autograd.grad(constant, list(model.parameters()), retain_graph=True)
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs)
    masked = rubi(output.features["color"].float(), list(logits.values()), labels, weight=0)
    assert all(g.any() for g in torch.autograd.grad(masked, list(rubi.mlp.parameters())))


# ---- The block by itself ----


def test_method_block_runs_when_cut_out():
    """It needs torch and nothing else of the script, so it can be lifted into other code."""
    text = (ROOT / "greedy_balance.py").read_text()
    block = re.search(r"# ---- Method ----\n(.*?)# ---- Model ----", text, re.DOTALL)[1]
    assert not re.search(r"^\s*(import|from)\b", block, re.MULTILINE)
    assert not {"config", "args", "device"} & set(re.findall(r"\w+", block.split('"""')[0]))
    names = {"torch": torch, "nn": nn, "F": F, "get_total_norm": get_total_norm}
    exec(block, names)

    model, ((inputs, labels, _),) = small_net(), draw_batches([8])
    output, training_means = model(inputs), draw_means(model)[0]
    maps = {m: torch.rand(2, len(mean), 2, 2).double() for m, mean in training_means.items()}
    sum(F.cross_entropy(x, labels) for x in output.logits.values()).backward()
    gates, speeds, cut = [], [], []
    for get in (names.__getitem__, greedy.__dict__.__getitem__):
        means = get("GateMeans")(
            [{m: x.shape[1] for m, x in w.items()} for w in output.activations]
        )
        means.update(model.blocks, output.activations)
        gates.append([x["color"] for x in means.gates(model.blocks, "color")])
        speed = get("LearningSpeed")(2)
        speed.update(model.parameter_groups())
        speeds.append(speed.speeds())
        cut.append(get("cut_off")(model.blocks[0], maps, training_means)["gray"])
        policy = get("Guided")(PAIR, 0.0, 2)
        policy.after_step(speed, warm_up=False)
        assert policy.curated in PAIR
        get("Random")(PAIR, 0.0, 2).after_step(speed, warm_up=False)
        assert get("utilization")(80.0, 60.0) == 0.25
    assert torch.equal(*speeds) and torch.equal(*cut)
    assert all(torch.equal(*pair) for pair in zip(*gates, strict=True))
