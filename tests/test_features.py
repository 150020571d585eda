"""The dataset `features`: a user's own .npz, how it is read and what is said of a bad one."""

import numpy as np
import pytest
import torch

import umt_ume as umt
from common.datasets import DATASETS, load_dataset
from common.errors import UserError

NAMES = ("sound", "sight", "text")
WIDTHS = {"sound": 3, "sight": 5, "text": 2}


def arrays(splits=("train", "test"), modalities=NAMES, count=40, **changes):
    """What a good file holds, with `changes`; None leaves an array out."""
    rng = np.random.default_rng(0)
    found = {}
    for split in splits:
        labels = rng.integers(4, size=count)
        found |= {
            f"{split}_{m}": 5 + 3 * rng.standard_normal((count, WIDTHS[m])) + labels[:, None]
            for m in modalities
        }
        found[f"{split}_labels"] = labels
    return {name: x for name, x in (found | changes).items() if x is not None}


@pytest.fixture
def write(tmp_path):
    """Write arrays to a file: its path."""

    def to_file(name="mine.npz", **changes):
        np.savez(tmp_path / name, **arrays(**changes))
        return str(tmp_path / name)

    return to_file


def load(path, **options):
    return load_dataset("features", path, **options)


# ---- What is read ----


def test_samples_are_the_files_standardized_by_training_data(write):
    path, original = write(), arrays()
    splits = load(path)
    assert splits.modalities == NAMES and splits.num_classes == 4
    assert tuple(splits.sizes.values()) == (36, 4, 4, 40)
    for m in NAMES:
        kept = np.concatenate([splits.train.tensors[m], splits.val.tensors[m]])
        train = splits.train.tensors[m].double()
        assert train.mean(0).abs().max() < 1e-5
        torch.testing.assert_close(train.std(0, correction=0), torch.ones(WIDTHS[m]).double())
        raw, raw_test = original[f"train_{m}"], original[f"test_{m}"]
        # Test samples are scaled as training samples are, and stay in the file's order.
        slope, offset = np.polyfit(raw_test[:, 0], splits.test.tensors[m][:, 0].numpy(), 1)
        np.testing.assert_allclose(
            np.sort(kept[:, 0]), np.sort(slope * raw[:, 0] + offset), atol=1e-4
        )
        np.testing.assert_allclose(
            splits.test.tensors[m][:, 0], slope * raw_test[:, 0] + offset, atol=1e-4
        )
    assert splits.test.labels.tolist() == original["test_labels"].tolist()


def test_rows_of_all_modalities_and_labels_stay_together(write):
    number = np.arange(40.0)[:, None]
    path = write(train_sound=number.repeat(3, axis=1), train_sight=-number.repeat(5, axis=1))
    original = arrays()
    splits = load(path)
    for split in (splits.train, splits.val):
        sound, sight = (split.tensors[m][:, 0] for m in ("sound", "sight"))
        torch.testing.assert_close(sound, -sight)
    order = torch.cat([splits.train.tensors["sound"], splits.val.tensors["sound"]])[:, 0].argsort()
    labels = torch.cat([splits.train.labels, splits.val.labels])[order]
    assert labels.tolist() == original["train_labels"].tolist()


def test_given_validation_data_are_taken_as_they_are(write):
    path = write(splits=("train", "val", "test"))
    splits = load(path)
    assert tuple(splits.sizes.values()) == (40, 40, 40, 40)
    assert splits.val.labels.tolist() == arrays(("train", "val", "test"))["val_labels"].tolist()


def test_the_data_seed_draws_validation_and_a_cap_does_not_cut_off_classes(write):
    labels = np.sort(np.arange(400) % 4)  # sorted by class, as files often are
    path = write(count=400, train_labels=labels)
    assert load(path, train_samples=40).train.labels.unique().tolist() == [0, 1, 2, 3]
    held_out = [load(path, data_seed=seed).val.tensors["sound"] for seed in (0, 0, 1)]
    assert torch.equal(held_out[0], held_out[1]) and not torch.equal(held_out[0], held_out[2])


def test_a_feature_that_never_changes_becomes_zero(write):
    splits = load(write(train_text=np.full((40, 2), 7.0), test_text=np.full((40, 2), 7.0)))
    assert not splits.train.tensors["text"].any() and not splits.test.tensors["text"].any()


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "uint8"])
def test_numbers_of_any_kind(write, dtype):
    x = np.arange(120).reshape(40, 3).astype(dtype)
    tensors = load(write(train_sound=x, test_sound=x)).train.tensors
    assert tensors["sound"].dtype == torch.float32


def test_a_class_may_be_in_the_test_data_alone(write):
    labels = np.arange(40) % 7
    assert load(write(test_labels=labels)).num_classes == 7


# ---- Runs on them ----


def test_runs_name_the_file_and_its_content(write, tmp_path):
    flags = ["--dataset", "features", "--epochs", "1", "--device", "cpu", "--method", "joint"]
    flags += ["--out", str(tmp_path / "runs")]
    for changes in ({}, {"train_sound": np.ones((40, 3))}, {}):
        umt.main([*flags, "--data-root", write(**changes)])
    names = [path.name for path in (tmp_path / "runs" / "umt_ume" / "features").iterdir()]
    assert len(names) == 2
    assert all(name.startswith("joint-concat-data=mine-") for name in names)
    path = write()
    assert DATASETS["features"].identify(path) in " ".join(names)


# ---- Bad files ----


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_labels": None}, r"holds no array train_labels; it has train_sound, train_sight"),
        ({"test_labels": None}, "holds no array test_labels"),
        ({"test_sight": None}, "holds no array test_sight"),
        ({"val_labels": np.zeros(3, int)}, "holds no array val_sound"),
        ({"modalities": ()}, "holds no array train_<modality>"),
        ({"train_labels": np.zeros(40)}, "train_labels in .* must be whole numbers from 0"),
        ({"train_labels": np.zeros((40, 1), int)}, "must be whole numbers from 0"),
        ({"test_labels": np.array(3)}, "test_labels in .* must be whole numbers from 0"),
        ({"test_labels": np.full(40, -1)}, "must be whole numbers from 0"),
        ({"test_labels": np.zeros(0, int)}, "must be whole numbers from 0"),
        ({"train_labels": np.array(["cat"] * 40)}, "must be whole numbers from 0"),
        ({"train_labels": np.arange(40) * 10**9}, r"A label in .* is 39000000000; number the"),
        ({"train_sound": np.ones(40)}, r"train_sound in .* of shape \(40, D\)"),
        ({"train_sound": np.ones((40, 2, 2))}, r"it is float64 of shape \(40, 2, 2\)"),
        ({"train_sound": np.ones((39, 3))}, r"it is float64 of shape \(39, 3\)"),
        ({"test_sound": np.ones((40, 4))}, "as wide as train_sound"),
        ({"train_sound": np.array([["x"] * 3] * 40)}, "must be numbers of shape"),
        ({"train_sound": np.full((40, 3), np.nan)}, "train_sound in .* holds NaN"),
        ({"test_text": np.full((40, 2), np.inf)}, "test_text in .* holds NaN"),
        ({"test_text": np.full((40, 2), 1e300)}, "holds NaN, infinite or too large numbers"),
        ({"train_text": np.array([None] * 40)}, r"is not a \.npz file of plain arrays"),
        ({"train_logits": np.ones((40, 1))}, "'logits' in .* cannot be a modality's name"),
        ({"train__modules": np.ones((40, 1))}, "cannot be a modality's name"),
        ({"train_d_util": np.ones((40, 1))}, "'d_util' in .* cannot be a modality's name"),
        ({"train_accuracy": np.ones((40, 1))}, "'accuracy' in .* cannot be"),
        ({"train_training": np.ones((40, 1))}, "'training' in .* cannot be"),
        ({"train_keys": np.ones((40, 1))}, "'keys' in .* cannot be"),
        ({"train_a.b": np.ones((40, 1))}, r"'a\.b' in .* cannot be"),
        ({"train_../up": np.ones((40, 1))}, "cannot be a modality's name"),
        ({"train_": np.ones((40, 1))}, "'' in .* cannot be"),
        ({"count": 1}, "holds one training sample, and none for validation"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else None,
)
def test_bad_arrays_are_one_sentence(write, changes, sentence):
    path = write(**changes)
    with pytest.raises(UserError, match=sentence) as error_info:
        load(path)
    assert "\n" not in str(error_info.value) and path in str(error_info.value)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"PK\x03\x04 cut off", "npy"])
def test_files_of_another_kind_are_one_sentence(tmp_path, content):
    path = tmp_path / "mine.npz"
    if content == "npy":
        with open(path, "wb") as file:
            np.save(file, np.ones((4, 2)))
    else:
        path.write_bytes(content)
    with pytest.raises(UserError, match=r"mine\.npz is not a \.npz file of plain arrays") as info:
        load(path)
    assert "\n" not in str(info.value)


@pytest.mark.parametrize(
    ("path", "reason"), [("absent.npz", "No such file"), (".", "Is a directory")]
)
def test_a_path_that_is_no_file_is_one_sentence(tmp_path, path, reason):
    flags = ["--dataset", "features", "--data-root", str(tmp_path / path), "--out", str(tmp_path)]
    with pytest.raises(UserError, match=rf"cannot be read \({reason}.*give a \.npz file"):
        umt.main(flags)
