"""Fusion heads and encoders against the equations and the sizes of the released networks."""

import pytest
import torch
import torch.nn.functional as F
from test_datasets import SHAPES, tiny_split

from common.encoders import CNN, ENCODERS, build_encoder
from common.errors import UserError
from common.fusion import FUSIONS, LATE_FUSIONS
from common.metrics import accuracy, collect, macro_f1

DIMS = {"a": 6, "b": 6}
WIDE = {"a": 2, "b": 5, "c": 3}


def features(dims=DIMS, batch=3):
    generator = torch.Generator().manual_seed(0)
    return {m: torch.randn(batch, dim, generator=generator) for m, dim in dims.items()}


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_sum_is_eq_4():
    head, z = FUSIONS["sum"](DIMS, 4), features()
    expected = sum(F.linear(z[m], head.heads[m].weight, head.heads[m].bias) for m in DIMS)
    torch.testing.assert_close(head(z), expected)


def test_concat_is_eq_1():
    head, z = FUSIONS["concat"](DIMS, 4), features()
    expected = torch.cat([z["a"], z["b"]], 1) @ head.linear.weight.T + head.linear.bias
    torch.testing.assert_close(head(z), expected)


def test_film_scales_and_shifts_the_second_by_the_first():
    head, z = FUSIONS["film"](DIMS, 4), features()
    both = z["a"] @ head.condition.weight.T + head.condition.bias
    scale, shift = both[:, :6], both[:, 6:]
    torch.testing.assert_close(head(z), head.head(scale * z["b"] + shift))


def test_gated_opens_the_second_by_the_first():
    head, z = FUSIONS["gated"](DIMS, 4), features()
    gate = 1 / (1 + torch.exp(-head.gate(z["a"])))
    torch.testing.assert_close(head(z), head.head(gate * head.value(z["b"])))


@pytest.mark.parametrize("dims", [DIMS, {"a": 2, "b": 5, "c": 3}, {"a": 4}])
@pytest.mark.parametrize("name", ["sum", "concat"])
def test_unimodal_logits_sum_to_the_fused_ones(name, dims):
    head = FUSIONS[name](dims, 4)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter)
    z = features(dims)
    parts = head.unimodal_logits(z)
    assert list(parts) == list(dims)
    torch.testing.assert_close(sum(parts.values()), head(z))
    z[next(iter(dims))] += 1
    changed = head.unimodal_logits(z)
    assert [m for m in dims if not torch.equal(parts[m], changed[m])] == [next(iter(dims))]


def test_mlp_is_two_layers_on_the_concatenated_features():
    head, z = LATE_FUSIONS["mlp"](WIDE, 4, hidden=7), features(WIDE)
    first, _, last = head.layers
    hidden = (torch.cat([z["a"], z["b"], z["c"]], 1) @ first.weight.T + first.bias).clamp_min(0)
    torch.testing.assert_close(head(z), hidden @ last.weight.T + last.bias)
    assert first.out_features == 7


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


def test_attention_is_a_transformer_layer_over_the_modalities():
    torch.manual_seed(0)
    head, z = LATE_FUSIONS["attention"](WIDE, 4, width=8), features(WIDE)
    for parameter in head.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    slow = [slow_attention(head, {m: x[i] for m, x in z.items()}) for i in range(3)]
    for training in (True, False):  # it has no dropout
        torch.testing.assert_close(head.train(training)(z), torch.stack(slow))
    turned = LATE_FUSIONS["attention"](dict(reversed(WIDE.items())), 4, width=8)
    turned.load_state_dict(head.state_dict())
    torch.testing.assert_close(turned(z), head(z))  # no modality is first


@pytest.mark.parametrize("name", ["film", "gated", "mlp", "attention"])
def test_inseparable_heads_say_so(name):
    with pytest.raises(NotImplementedError, match="mixes the modalities"):
        {**FUSIONS, **LATE_FUSIONS}[name](DIMS, 4).unimodal_logits(features())


@pytest.mark.parametrize("name", ["film", "gated"])
def test_some_heads_need_two_modalities_of_equal_width(name):
    for dims in ({"a": 2}, {"a": 2, "b": 2, "c": 2}, {"a": 2, "b": 3}):
        with pytest.raises(UserError, match="two modalities of equal width"):
            FUSIONS[name](dims, 4)


def test_parameter_counts_of_the_released_networks():
    assert (count(CNN(1)), count(CNN(3))) == (98_786, 100_390)
    dims = {"gray": 512, "color": 512}
    assert count(CNN(1)) + count(CNN(3)) + count(FUSIONS["concat"](dims, 10)) == 209_426
    assert count(FUSIONS["film"](dims, 10)) == count(FUSIONS["gated"](dims, 10)) == 530_442


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
    assert encoder.pool(x).shape == (2, 512) == (2, encoder.dim)
    assert CNN(3, dim=None, first_pool=first_pool)(torch.rand(2, 3, size, size)).shape == (2, 64)


def test_initialisation_is_the_released_one():
    torch.manual_seed(0)
    for module in [*CNN(3).modules(), *FUSIONS["film"]({"a": 512, "b": 512}, 10).modules()]:
        if isinstance(module, torch.nn.Linear):
            fans = module.in_features + module.out_features
            assert module.weight.std().item() == pytest.approx((2 / fans) ** 0.5, rel=0.1)
            assert not module.bias.any()
        if isinstance(module, torch.nn.Conv2d):
            fan_out = module.out_channels * module.kernel_size[0] ** 2
            assert module.weight.std().item() == pytest.approx((2 / fan_out) ** 0.5, rel=0.1)


def test_pooling_before_the_relu_is_the_same_with_less_work():
    encoder = CNN(1)
    norm, convolution, pool, relu = encoder.stages[0]
    x = torch.rand(4, 1, 28, 28)
    gradients = []
    for order in ((pool, relu), (relu, pool)):
        out = order[1](order[0](convolution(norm(x))))
        gradients.append((out, torch.autograd.grad(out.square().sum(), convolution.weight)[0]))
    (one, grad_one), (two, grad_two) = gradients
    assert torch.equal(one, two)
    torch.testing.assert_close(grad_one, grad_two)


@pytest.mark.parametrize("name", list(ENCODERS))
def test_every_dataset_has_its_encoder(name):
    views = {"audio": (1, 64, 64), "visual": (3, 2, 64, 64)}
    for shape in SHAPES.get(name, views).values():
        encoder = build_encoder(name, shape)
        assert encoder.dim == (64 if len(shape) == 1 else 512)
        assert encoder(torch.rand(2, *shape)).shape == (2, encoder.dim)


# ---- Metrics ----


def test_accuracy_and_macro_f1_by_hand():
    logits = torch.eye(3)[[0, 0, 1, 2]]
    labels = torch.tensor([0, 1, 1, 1])
    assert accuracy(logits, labels) == 50
    # class 0: precision 1/2, recall 1; class 1: precision 1, recall 1/3; class 2: never right
    assert macro_f1(logits, labels) == pytest.approx(100 * (2 / 3 + 1 / 2 + 0) / 3)


def test_collect_keeps_order_and_puts_batches_together():
    outputs = collect(lambda inputs: {"double": 2 * inputs["m"]}, tiny_split(), batch_size=4)
    assert outputs["double"].flatten().tolist() == [2 * i for i in range(10)]
    assert outputs["index"].tolist() == list(range(10))
    assert outputs["labels"].tolist() == [i % 3 for i in range(10)]
