"""The dataset `synthetic`: every dial is read back from the samples through the codes."""

import itertools
import math

import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import umt_ume
from common.datasets import load_dataset, synthetic
from common.metrics import linear_probe

MODALITIES = ("first", "second")
BARE = {"easy_size": 0.0, "hard_size_1": 0.0, "hard_size_2": 0.0, "pair_size": 0.0}
# Spec of each named setting: training samples, easy shares, share and sizes of hard features, pair
# size, nuisance, share of pair-only samples, augmentation.
NAMED = {
    "O": (1500, (0.8, 0.6), 0.95, (0.9, 0.9), 0.5, 0.7, 0.0, 0.2),
    "N": (2000, (0.9, 0.5), 0.9, (0.9, 1.1), 0.8, 1.0, 0.0, 0.3),
    "T": (2000, (0.7, 0.4), 0.95, (0.9, 1.0), 6.0, 0.5, 0.05, 0.3),
    "Q": (2500, (0.8, 0.6), 0.95, (0.9, 0.9), 5.0, 0.7, 0.2, 0.3),
}


def load(**dials):
    return load_dataset("synthetic", **dials)


def coefficients(split):
    """modality -> (3, N, C): how much of the easy, hard and paired codes its samples hold."""
    codes = dict(zip(MODALITIES, synthetic.draw_codes(0), strict=True))
    return {m: torch.einsum("ncw,bw->nbc", codes[m], split.tensors[m]) for m in MODALITIES}


def near(share, count):
    return pytest.approx(share, abs=5 * math.sqrt(0.25 / count))


def assert_exact(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


# ---- Codes and dials ----


def test_codes_are_orthonormal_and_of_each_modality_its_own():
    first, second = synthetic.draw_codes(0)
    for codes in (first, second):
        assert codes.shape == (3, 10, 120)
        assert_exact(codes.flatten(0, 1) @ codes.flatten(0, 1).T, torch.eye(30))
    assert not torch.equal(first, second)
    assert torch.equal(synthetic.draw_codes(0)[0], first)
    assert not torch.equal(synthetic.draw_codes(1)[0], first)


@pytest.mark.parametrize("name", list(NAMED))
def test_named_settings_read_back_from_the_samples(name):
    samples, easy, hard, sizes, pair_size, nuisance, pair_only, augment = NAMED[name]
    splits = load(configuration=name, noise=0.0)
    assert tuple(splits.sizes.values()) == (samples, 1000, 1000, 4000)
    test, own = splits.test, F.one_hot(splits.test.labels, 10)
    found, pure, present = coefficients(test), test.slices["pair-only"], {}
    assert pure.double().mean().item() == near(pair_only, 4000) and pure.any() == (pair_only > 0)
    for i, m in enumerate(MODALITIES):
        for part, size, share in ((0, 6.0, easy[i]), (1, sizes[i], hard)):
            there = present[m, part] = (found[m][part] * own).sum(dim=1) > size / 2
            assert_exact(found[m][part], size * own * there[:, None])
            assert not (there & pure).any()
            assert there[~pure].double().mean().item() == near(share, (~pure).sum())
    no_easy = ~(present["first", 0] | present["second", 0]) & ~pure
    assert torch.equal(test.slices["no-easy"], no_easy) and no_easy.any()
    paired = pure if pair_only else torch.ones_like(pure)  # without such samples all have pairs
    noise = found["second"][2]  # the nuisance is the same in both
    assert_exact(found["first"][2] - noise, pair_size * own * paired[:, None])
    assert noise[paired].std().item() == pytest.approx(pair_size * nuisance, rel=0.05)
    assert not noise[~paired].abs().gt(1e-4).any()
    rows = {"x": torch.zeros(3000, 120)}
    fresh = splits.train.augment(rows, torch.Generator().manual_seed(0))["x"]
    assert fresh.std().item() == pytest.approx(augment, rel=0.02)


def test_n_is_the_default_and_every_dial_wins_over_it():
    assert load().sizes == load(configuration="N").sizes
    dials = {"easy_1": 1.0, "easy_2": 0.0, "hard": 1.0, "hard_size_1": 2.0, "hard_size_2": 3.0}
    dials |= {"easy_size": 4.0, "pair_size": 5.0, "nuisance": 0.0, "noise": 0.0, "samples": 70}
    train = load(**dials, augment=0.0).train
    own, found = F.one_hot(train.labels, 10).float(), coefficients(train)
    for m, sizes in (("first", (4, 2, 5)), ("second", (0, 3, 0))):
        for x, size in zip(found[m], sizes, strict=True):
            assert_exact(x, size * own)
    assert len(train) == 70 and train.augment is None
    assert load(pair_only=1.0, samples=70).train.slices["pair-only"].all()


def test_noise_is_noise():
    for noise, dials in ((0.4, {}), (2.0, {"noise": 2.0})):
        first, second = (load(**BARE, **dials).test.tensors[m] for m in MODALITIES)
        for x in (first, second):
            assert x.std().item() == pytest.approx(noise, rel=0.01) and abs(x.mean()) < 0.01
        assert abs((first * second).mean().item()) < 0.01 * noise**2
    assert not load(**BARE, noise=0.0).test.tensors["first"].any()


def test_features_of_the_two_modalities_come_and_go_by_themselves():
    found = coefficients(load(noise=0.0, easy_1=0.5, easy_2=0.5, hard=0.5).test)
    present = [found[m][part].abs().amax(dim=1) > 0.1 for m in MODALITIES for part in (0, 1)]
    for a, b in itertools.combinations(present, 2):
        assert (a & b).double().mean().item() == near(0.25, 4000)


def test_labels_are_uniform_splits_differ_and_the_data_seed_draws_anew():
    splits, again, other = load(), load(), load(data_seed=1)
    for split in (splits.train, splits.val, splits.test):
        share = torch.bincount(split.labels, minlength=10) / len(split)
        assert share.min() > 0.06 and share.max() < 0.14
    first = [tuple(s.labels[:50].tolist()) for s in (splits.train, splits.val, splits.test)]
    assert len(set(first)) == 3
    assert torch.equal(splits.val.labels, splits.val_iid.labels)
    assert torch.equal(splits.test.tensors["second"], again.test.tensors["second"])
    assert not torch.equal(splits.test.labels, other.test.labels)
    capped, whole = load(configuration="Q", train_samples=250), load(configuration="Q")
    for name, mask in capped.test.slices.items():
        assert torch.equal(mask, whole.test.slices[name][:400])


def test_augmentation_is_fresh_noise_in_training_batches_only():
    split = load(augment=0.5, samples=400).train

    def batch(epoch=None, augment=False):
        generator = None if epoch is None else torch.Generator().manual_seed(epoch)
        inputs, _, index = next(split.batches(400, generator, augment=augment))
        return {m: x[index.argsort()] for m, x in inputs.items()}

    first, again, other = (batch(epoch, augment=True) for epoch in (0, 0, 1))
    for m, stored in split.tensors.items():
        assert torch.equal(first[m], again[m]) and not torch.equal(first[m], other[m])
        assert (first[m] - stored).std().item() == pytest.approx(0.5, rel=0.02)
        assert torch.equal(batch()[m], stored) and torch.equal(batch(0)[m], stored)
    noise = [first[m] - split.tensors[m] for m in MODALITIES]
    assert abs((noise[0] * noise[1]).mean().item()) < 0.01


# ---- What can be learned from pairs ----

PURE = {"easy_1": 0.0, "easy_2": 0.0, "hard": 0.0, "noise": 0.1, "pair_size": 3.0}


def pairs(*modalities, **dials):
    """Samples with nothing but pairs: x, y of training, x, y of test."""
    splits = load(**PURE, samples=3000, **dials)
    parts = [
        (torch.cat([s.tensors[m] for m in modalities], dim=1), s.labels)
        for s in (splits.train, splits.test)
    ]
    return *parts[0], *parts[1]


def percent_right(classify, x, y):
    return 100 * (classify(x).argmax(dim=1) == y).double().mean().item()


def probe(*modalities, **dials):
    """Test accuracy of a linear classifier on the inputs themselves."""
    x, y, x_test, y_test = pairs(*modalities, **dials)
    return percent_right(linear_probe(x, y, 10), x_test, y_test)


def test_suppressor_pairs_need_both_modalities_and_a_linear_head():
    assert probe("second", nuisance=1.0) < 13 and probe(*MODALITIES, nuisance=1.0) > 97
    # The second modality only says what to subtract: alone, the first is the harder the more of it.
    alone = [probe("first", nuisance=nuisance) for nuisance in (0.2, 1.0, 5.0)]
    assert alone[0] > 97 > 60 > alone[1] > alone[2] and alone[2] < 20


@pytest.mark.slow
def test_sum_mod_pairs_need_a_head_that_is_not_linear():
    for modalities in (MODALITIES[:1], MODALITIES[1:], MODALITIES):
        assert probe(*modalities, pair_type="sum-mod") < 13
    x, y, x_test, y_test = pairs(*MODALITIES, pair_type="sum-mod")
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(240, 256), nn.ReLU(), nn.Linear(256, 10))
    optimizer = torch.optim.Adam(mlp.parameters(), 3e-3)
    for batch in itertools.chain(*(torch.randperm(len(y)).split(100) for _ in range(15))):
        optimizer.zero_grad()
        F.cross_entropy(mlp(x[batch]), y[batch]).backward()
        optimizer.step()
    assert percent_right(mlp, x_test, y_test) > 95


def test_sum_mod_pairs_sum_to_the_label():
    split = load(**{**PURE, "noise": 0.0}, pair_type="sum-mod").test
    codes = [x[2] for x in coefficients(split).values()]
    for x in codes:
        assert_exact(x, 3.0 * F.one_hot(x.argmax(dim=1), 10))
        share = torch.bincount(x.argmax(dim=1)) / 4000
        assert share.min() > 0.07 and share.max() < 0.13
    assert torch.equal(sum(x.argmax(dim=1) for x in codes) % 10, split.labels)


# ---- What the papers' methods make of it ----


def run_umt(tmp_path, configuration, *methods):
    """What `main` returns, and method -> its metrics on the test split."""
    flags = ["--configuration", configuration, "--out", str(tmp_path), "--device", "cpu"]
    result = umt_ume.main([*flags, "--method", *methods])
    return result, {run["method"]: run["test"] for run in result["runs"]}


@pytest.mark.slow
def test_modality_laziness_shows_and_distillation_undoes_it(tmp_path):
    """Configuration N: joint training leaves the weak modality's hard features unlearnt, UMT does
    not; where no easy feature is present, UME > UMT > joint."""
    _, test = run_umt(tmp_path, "N", "unimodal-second", "ume", "joint", "umt")
    probe = {m: test[m]["second"]["probe"] for m in ("unimodal-second", "joint", "umt")}
    assert probe["joint"] < probe["unimodal-second"] - 5
    assert abs(probe["umt"] - probe["unimodal-second"]) < 1.5
    slices = {m: test[m]["slices"]["no-easy"] for m in ("ume", "umt", "joint")}
    assert slices["ume"] > slices["umt"] > slices["joint"] + 5


@pytest.mark.slow
def test_paired_features_need_joint_training(tmp_path):
    """Configuration Q: joint > UMT > UME, and the linear classifier beats UME, so UMT is chosen."""
    result, test = run_umt(tmp_path, "Q", "auto", "ume", "linear", "joint", "umt")
    accuracy = {m: test[m]["accuracy"] for m in test}
    assert accuracy["joint"] > accuracy["umt"] > accuracy["ume"]
    assert test["joint"]["slices"]["pair-only"] > test["ume"]["slices"]["pair-only"] + 20
    assert accuracy["linear"] > accuracy["ume"]
    assert result["decision"]["choice"] == "umt" and result["decision"]["joint_is_better"]
