"""Encoders, heads, whole networks, against equations and released sizes; measures of outputs."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn as nn

from common.datasets import DATASETS, TensorSplit, load_dataset
from common.errors import UserError
from common.evaluation import Totals, collect, count_correct, measure, predict, score
from common.metrics import accuracy, count_parameters, macro_f1
from common.networks.encoders import CNN, build_encoder
from common.networks.fusion import FUSIONS
from common.networks.multimodal import build_model

DIMS = {"a": 6, "b": 6}
WIDE = {"a": 2, "b": 5, "c": 3}


def features(dims=DIMS, batch=3):
    generator = torch.Generator().manual_seed(0)
    return {m: torch.randn(batch, dim, generator=generator) for m, dim in dims.items()}


# ---- Fusion heads ----


def slow_attention(head, z):
    """One token a modality, four heads, residuals with a LayerNorm after each; for one sample."""
    layer, width = head.layer, head.linear.in_features
    x = torch.stack([head.tokens[m].weight @ z[m] + head.tokens[m].bias for m in z])
    qkv = x @ layer.self_attn.in_proj_weight.T + layer.self_attn.in_proj_bias
    heads = []
    for q, k, v in zip(*(part.split(width // 4, 1) for part in qkv.split(width, 1)), strict=True):
        heads.append((q @ k.T / (width // 4) ** 0.5).softmax(1) @ v)
    attended = torch.cat(heads, 1) @ layer.self_attn.out_proj.weight.T
    x = layer.norm1(x + attended + layer.self_attn.out_proj.bias)
    x = layer.norm2(x + layer.linear2(layer.linear1(x).clamp_min(0)))
    return head.linear.weight @ x.mean(0) + head.linear.bias


def linear(layer, x):
    return x @ layer.weight.T + layer.bias


def slow(name, head, z):
    """The logits of `head` written out. Of film and gated, a acts on b."""
    if name == "sum":  # PMR, Eq. (4)
        return linear(head.heads["a"], z["a"]) + linear(head.heads["b"], z["b"])
    joined = torch.cat(list(z.values()), dim=1)
    if name == "concat":  # PMR, Eq. (1)
        return linear(head.linear, joined)
    if name == "film":
        both = linear(head.condition, z["a"])
        return linear(head.head, both[:, :6] * z["b"] + both[:, 6:])
    if name == "gated":
        gate = 1 / (1 + torch.exp(-linear(head.gate, z["a"])))
        return linear(head.head, gate * linear(head.value, z["b"]))
    if name == "mlp":
        return linear(head.layers[2], linear(head.layers[0], joined).clamp_min(0))
    return torch.stack([slow_attention(head, {m: x[i] for m, x in z.items()}) for i in range(3)])


def random_head(name, dims=DIMS, **options):
    torch.manual_seed(0)
    head = FUSIONS[name](dims, 4, **options)
    for parameter in head.parameters():
        nn.init.normal_(parameter, std=0.5)
    return head


@pytest.mark.parametrize("name", list(FUSIONS))
def test_heads_are_their_equations(name):
    head, z = random_head(name), features()
    for training in (True, False):  # no dropout
        torch.testing.assert_close(head.train(training)(z), slow(name, head, z))
    turned = dict(reversed(z.items()))
    torch.testing.assert_close(head(turned), head(z))  # by name, not by position
    if name in ("sum", "concat"):
        return
    with pytest.raises(NotImplementedError, match="mixes the modalities"):
        head.unimodal_logits(z)


@pytest.mark.parametrize("dims", [DIMS, WIDE, {"a": 4}])
@pytest.mark.parametrize("name", ["sum", "concat"])
def test_unimodal_logits_sum_to_the_fused_ones(name, dims):
    head, z = random_head(name, dims), features(dims)
    parts = head.unimodal_logits(z)
    assert list(parts) == list(dims)
    torch.testing.assert_close(sum(parts.values()), head(z))
    z["a"] += 1
    changed = head.unimodal_logits(z)
    assert [m for m in dims if not torch.equal(parts[m], changed[m])] == ["a"]


def test_heads_of_several_modalities():
    mlp, attention = random_head("mlp", WIDE, hidden=7), random_head("attention", WIDE, width=8)
    assert mlp(features(WIDE)).shape == (3, 4) and mlp.layers[0].out_features == 7
    turned = FUSIONS["attention"](dict(reversed(WIDE.items())), 4, width=8)
    turned.load_state_dict(attention.state_dict())
    torch.testing.assert_close(turned(features(WIDE)), attention(features(WIDE)))  # none is first
    for name in ("film", "gated"):
        for dims in ({"a": 2}, {"a": 2, "b": 2, "c": 2}, {"a": 2, "b": 3}):
            with pytest.raises(UserError, match="joins two modalities of equal width"):
                FUSIONS[name](dims, 4)


# ---- Encoders ----


def test_parameter_counts_of_the_released_networks():
    assert (count_parameters(CNN(1)), count_parameters(CNN(3))) == (98_786, 100_390)
    heads = {name: FUSIONS[name]({"gray": 512, "color": 512}, 10) for name in FUSIONS}
    assert count_parameters(CNN(1), CNN(3), heads["concat"]) == 209_426
    assert count_parameters(heads["film"]) == count_parameters(heads["gated"]) == 530_442
    shared = nn.Linear(2, 3)
    assert count_parameters(shared, nn.Sequential(shared)) == 9  # once


@pytest.mark.parametrize(("size", "first_pool"), [(28, True), (32, True), (8, False)])
@pytest.mark.parametrize("batch_norm", [True, False])
def test_cnn_stages(size, first_pool, batch_norm):
    encoder = CNN(3, batch_norm=batch_norm, first_pool=first_pool)
    x = torch.rand(2, 3, size, size)
    sizes = []
    for stage in encoder.stages:
        x = stage(x)
        assert x.min() >= 0  # every stage ends in a ReLU
        sizes.append(tuple(x.shape[1:]))
    half, quarter = (size // 2, size // 4) if first_pool else (size, size // 2)
    assert sizes == [(32, half, half)] * 2 + [(64, quarter, quarter)] * 2
    assert encoder.channels == tuple(shape[0] for shape in sizes)
    assert encoder.pool(x).shape == (2, 512) == (2, encoder.dim)
    assert CNN(3, dim=None, first_pool=first_pool)(torch.rand(2, 3, size, size)).shape == (2, 64)


def test_initialisation_is_the_released_one():
    torch.manual_seed(0)
    for module in [*CNN(3).modules(), *FUSIONS["film"]({"a": 512, "b": 512}, 10).modules()]:
        if isinstance(module, nn.Linear):
            fans = module.in_features + module.out_features
            assert module.weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.1)
            assert not module.bias.any()
        if isinstance(module, nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_pooling_before_the_relu_is_the_same_with_less_work():
    norm, convolution, pool, relu = CNN(1).stages[0]
    x = torch.rand(4, 1, 28, 28)
    gradients = []
    for first, second in ((pool, relu), (relu, pool)):
        out = second(first(convolution(norm(x))))
        gradients.append((out, torch.autograd.grad(out.square().sum(), convolution.weight)[0]))
    (one, grad_one), (two, grad_two) = gradients
    assert torch.equal(one, two)
    torch.testing.assert_close(grad_one, grad_two)


SHAPES = {  # of the inputs; of clips and views where it is not named
    "digits": ((1, 8, 8), (3, 8, 8)),
    "cg-mnist": ((1, 28, 28), (3, 28, 28)),
    "av-digits": ((1, 32, 32), (1, 28, 28)),
    **dict.fromkeys(("synthetic", "features", "mfeat"), ((6,), (120,))),
}


@pytest.mark.parametrize("name", list(DATASETS))
def test_every_dataset_has_its_encoder(name):
    for shape in SHAPES.get(name, ((1, 64, 64), (3, 2, 64, 64))):
        encoder = build_encoder(name, shape)
        assert encoder.dim == (64 if len(shape) == 1 else 512)
        assert encoder(torch.rand(2, *shape)).shape == (2, encoder.dim)


# ---- Whole networks ----


def config_of(**changes):
    config = {"dataset": "digits", "modalities": ("gray", "color"), "fusion": "concat", "seed": 0}
    config |= {"device": torch.device("cpu"), "precision": "fp32", "pretrained": False}
    return SimpleNamespace(**config | changes)


@pytest.fixture(scope="module")
def digits():
    return load_dataset("digits", train_samples=60)


def test_networks_of_one_seed_start_equal_and_others_do_not(digits):
    first = build_model(config_of(), digits)
    torch.rand(3)  # whatever was drawn before
    again, other = build_model(config_of(), digits), build_model(config_of(seed=1), digits)
    film = build_model(config_of(fusion="film"), digits).encoders.state_dict()
    alone = build_model(config_of(modalities=("gray",), fusion=None), digits)
    for name, tensor in first.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    assert all(torch.equal(x, film[name]) for name, x in first.encoders.state_dict().items())
    swapped = build_model(config_of(modalities=("color", "gray")), digits)
    for m, stranger in (("gray", alone), ("gray", swapped), ("color", swapped)):
        weight = first.encoders[m].stages[1][0].weight  # never as in another network
        assert not torch.equal(weight, stranger.encoders[m].stages[1][0].weight)
    assert not torch.equal(weight, first.encoders["gray"].stages[1][0].weight)
    assert not torch.equal(other.fusion.linear.weight, first.fusion.linear.weight)
    assert type(alone.fusion) is FUSIONS["sum"] and alone.fusion.heads["gray"].out_features == 10


def test_network_gives_logits_of_the_head_on_its_encoders_features(digits):
    model, config = build_model(config_of(), digits).eval(), config_of()
    inputs, labels, index = next(digits.test.batches(100))
    z = {m: encoder(inputs[m]) for m, encoder in model.encoders.items()}
    model.train()
    outputs = predict(model, digits.test, config)  # in evaluation mode
    torch.testing.assert_close(outputs["logits"], model.fusion(z))
    torch.testing.assert_close(outputs["gray"], z["gray"])
    assert torch.equal(outputs["labels"], labels) and torch.equal(outputs["index"], index)
    found = measure(model, outputs, digits.test)
    columns = model.fusion.linear.weight[:, :512]
    assert found["gray"] == {"head": accuracy(z["gray"] @ columns.T, labels)}
    film = build_model(config_of(fusion="film"), digits)
    assert measure(film, predict(film, digits.test, config), digits.test)["color"] == {}
    alone = build_model(config_of(modalities=("gray",), fusion=None), digits)
    found = measure(alone, predict(alone, digits.test, config), digits.test)
    assert found["gray"] == {"alone": found["accuracy"]}
    half = predict(model, digits.test, config_of(precision="bf16"))["logits"]
    assert half.dtype == torch.float32 and not torch.equal(half, outputs["logits"])


# ---- What is measured ----


def test_metrics_by_hand():
    logits, labels = torch.eye(3)[[0, 0, 1, 2]], torch.tensor([0, 1, 1, 1])
    assert accuracy(logits, labels) == 50 and count_correct(logits, labels) == 2
    # class 0: precision 1/2, recall 1; class 1: precision 1, recall 1/3; class 2: never right
    assert macro_f1(logits, labels) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)
    slices = {"even": [True, False, True, False], "none": [False] * 4}
    masks = {name: torch.tensor(mask) for name, mask in slices.items()}
    found = score(logits, TensorSplit({}, labels, None, slices=masks))
    loss = -logits.log_softmax(1)[range(4), labels].mean().item()
    assert found["loss"] == pytest.approx(loss) and found["slices"] == {"even": 100.0}


def test_totals_are_means_over_samples_and_accuracies_percent():
    totals = Totals(("loss", "accuracy", "gray accuracy"), "cpu")
    for count, *values in ((3, 1.0, 3, 0), (1, 5.0, 0, 1)):
        totals.add(count, *map(torch.tensor, values))
    assert totals.means() == {"loss": 2.0, "accuracy": 75.0, "gray accuracy": 25.0}


def test_collect_keeps_order_and_puts_batches_together():
    split = TensorSplit({"m": torch.arange(10.0)}, torch.arange(10) % 3, lambda rows: rows)
    outputs = collect(lambda inputs: {"double": 2 * inputs["m"]}, split, batch_size=4)
    assert outputs["double"].tolist() == [2 * i for i in range(10)]
    assert outputs["index"].tolist() == list(range(10))
    assert outputs["labels"].tolist() == [i % 3 for i in range(10)]
