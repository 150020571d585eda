"""The dataset `features`: a user's own .npz, how it is read and what is said of a bad one."""

import re
import struct
import zipfile

import numpy as np
import pytest
import torch

import pmr
from common.datasets import features, load_dataset
from common.errors import UserError

WIDTHS = {"sound": 3, "sight": 5, "text": 2}


def arrays(splits=("train", "test"), modalities=tuple(WIDTHS), count=40, **changes):
    """What a good file holds, with `changes`; None leaves an array out."""
    rng, found = np.random.default_rng(0), {}
    for split in splits:
        labels = rng.integers(4, size=count)
        for m in modalities:
            noise = rng.standard_normal((count, WIDTHS[m]))
            found[f"{split}_{m}"] = 5 + 3 * noise + labels[:, None]
        found[f"{split}_labels"] = labels
    return {name: x for name, x in (found | changes).items() if x is not None}


@pytest.fixture
def write(tmp_path):
    """Write arrays to a file: its path."""

    def to_file(**changes):
        np.savez(tmp_path / "mine.npz", **arrays(**changes))
        return str(tmp_path / "mine.npz")

    return to_file


def load(path, **options):
    return load_dataset("features", path, **options)


# ---- What is read ----


def test_samples_are_the_files_standardized_by_training_data(write):
    number = np.arange(40.0)[:, None].repeat(3, axis=1)  # tells in which row a sample stood
    splits, original = load(write(train_sound=number)), arrays(train_sound=number)
    assert splits.modalities == tuple(WIDTHS) and splits.num_classes == 4
    assert tuple(splits.sizes.values()) == (36, 4, 4, 40)
    sound = torch.cat([split.tensors["sound"][:, 0] for split in (splits.train, splits.val)])
    rows = sound.argsort().argsort().numpy()
    parts = {"train": ("train", rows[:36]), "val": ("train", rows[36:])}
    parts["test"] = ("test", np.arange(40))  # in the file's order
    for name, (stem, chosen) in parts.items():
        split = getattr(splits, name)
        assert split.labels.tolist() == original[f"{stem}_labels"][chosen].tolist()
        for m in WIDTHS:
            train = original[f"train_{m}"][rows[:36]]
            expected = (original[f"{stem}_{m}"][chosen] - train.mean(0)) / train.std(0)
            np.testing.assert_allclose(split.tensors[m], expected, atol=1e-4)


def test_given_validation_data_are_taken_as_they_are(write):
    splits = load(write(splits=("train", "val", "test")))
    assert tuple(splits.sizes.values()) == (40, 40, 40, 40)
    assert splits.val.labels.tolist() == arrays(("train", "val", "test"))["val_labels"].tolist()


def test_the_data_seed_draws_validation_and_a_cap_does_not_cut_off_classes(write):
    path = write(count=400, train_labels=np.sort(np.arange(400) % 4))  # sorted, as files often are
    assert load(path, train_samples=40).train.labels.unique().tolist() == [0, 1, 2, 3]
    held_out = [load(path, data_seed=seed).val.tensors["sound"] for seed in (0, 0, 1)]
    assert torch.equal(held_out[0], held_out[1]) and not torch.equal(held_out[0], held_out[2])


def test_constant_features_become_zero_and_a_class_may_be_in_the_test_alone(write):
    constant = np.full((40, 2), 7.0)
    changes = {"train_text": constant, "test_text": constant, "test_labels": np.arange(40) % 7}
    splits = load(write(**changes))
    assert not splits.train.tensors["text"].any() and not splits.test.tensors["text"].any()
    assert splits.num_classes == 7


def test_no_group_is_in_training_and_in_validation(write, capsys):
    """Groups by the number in `sound`: 3 samples of each of 20, then 40 of one more."""
    group = np.r_[np.arange(60) % 20, np.full(40, 20)]
    number = np.repeat(group[:, None], 3, axis=1)
    words = np.array([f"speaker {i}" for i in group])
    found = []
    for groups, test in ((words, None), (group, 2 * group)):
        path = write(count=100, train_sound=number, train_groups=groups, test_groups=test)
        for seed in range(10):
            splits = load(path, data_seed=seed)
            train, val = ({*s.tensors["sound"][:, 0].tolist()} for s in (splits.train, splits.val))
            assert len(train) + len(val) == 21 and not train & val
            assert len(splits.val) == 9 and len(splits.train) == 91  # a tenth would be 10
            found.append(frozenset(val))
    assert found[:10] == found[10:] and len({*found}) == 10
    warned = "warning: 11 of the groups of .* are in train and in test, such as 0; what is measured"
    assert re.fullmatch(f"({warned}.*\n){{10}}", capsys.readouterr().err)  # 0, 2, ..., 20
    large = write(train_groups=np.arange(40) // 15)  # 15, 15 and 10: none is as small as a tenth
    assert {len(load(large, data_seed=seed).val) for seed in range(5)} == {10}


@pytest.mark.parametrize("dtype", ["float16", "float64", "int32", "uint8"])
def test_numbers_of_any_kind(write, dtype):
    x = np.arange(120).reshape(40, 3).astype(dtype)
    assert load(write(train_sound=x, test_sound=x)).train.tensors["sound"].dtype == torch.float32


def test_runs_name_the_file_and_its_content(write, tmp_path):
    flags = ["--dataset", "features", "--epochs", "1", "--device", "cpu", "--method", "joint"]
    for changes in ({}, {"train_sound": np.ones((40, 3))}, {}):
        pmr.main([*flags, "--out", str(tmp_path / "runs"), "--data-root", write(**changes)])
    names = [path.name for path in (tmp_path / "runs" / "pmr" / "features").iterdir()]
    assert len(names) == 2 and all(name.startswith("joint-concat-data=mine-") for name in names)
    assert load(write()).data in " ".join(names)


# ---- Bad files ----

LABELS = "must be whole numbers from 0"
NAME = "cannot be a modality's name"
HUGE = np.full((40, 3), 3e38)  # finite in float32, unlike its square
LATE = {"train_labels": np.arange(40) % 4 + 1, "test_labels": np.arange(40) % 4 + 1}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"train_labels": None}, r"holds no array train_labels; it has train_sound, train_sight"),
        ({"test_labels": None}, "holds no array test_labels"),
        ({"test_sight": None}, "holds no array test_sight"),
        ({"val_labels": np.zeros(3, int)}, "holds no array val_sound"),
        ({"val_sound": np.ones((40, 3))}, "an array val_sound that belongs to no modality and"),
        ({"test_smell": np.ones((40, 3))}, "an array test_smell that belongs to no modality and"),
        ({"modalities": ()}, "holds no array train_<modality>"),
        ({"train_labels": np.zeros(40)}, f"train_labels in .* {LABELS}"),
        ({"train_labels": np.zeros((40, 1), int)}, LABELS),
        ({"test_labels": np.array(3)}, f"test_labels in .* {LABELS}"),
        ({"test_labels": np.full(40, -1)}, LABELS),
        ({"test_labels": np.zeros(0, int)}, LABELS),
        ({"train_labels": np.array(["cat"] * 40)}, LABELS),
        ({"train_labels": np.arange(40) * 10**9}, r"\.\.\.; number these 43 classes from 0 to 42"),
        (
            LATE,
            r"labels in \S+ are 1, 2, 3, 4; number these 4 classes from 0 to 3, as .* np.unique",
        ),
        ({"test_labels": np.arange(40) % 2 * 5}, r"are 0, 1, 2, 3, 5; number these 5 classes"),
        ({"train_groups": np.arange(39)}, "train_groups in .* must be whole numbers or words, one"),
        (
            {"test_groups": np.zeros(40)},
            "test_groups in .* must be whole numbers or words, one for",
        ),
        ({"val_groups": np.arange(40)}, "an array val_groups that belongs to no modality and"),
        ({"train_groups": np.zeros(40, int)}, "holds one training group, and none for validation"),
        (
            {"train_sound": np.ones((40, 3)), "test_sound": HUGE},
            r"test_sound in .* more than 1e\+09 standard dev",
        ),
        ({"train_sound": np.ones(40)}, r"train_sound in .* of shape \(40, D\)"),
        ({"train_sound": np.ones((40, 2, 2))}, r"it is float64 of shape \(40, 2, 2\)"),
        ({"train_sound": np.ones((40, 0))}, r"it is float64 of shape \(40, 0\)"),
        ({"train_sound": np.ones((39, 3))}, r"it is float64 of shape \(39, 3\)"),
        ({"test_sound": np.ones((40, 4))}, "as wide as train_sound"),
        ({"train_sound": np.array([["x"] * 3] * 40)}, "must be numbers of shape"),
        ({"train_sound": np.full((40, 3), np.nan)}, "train_sound in .* holds NaN"),
        ({"test_text": np.full((40, 2), np.inf)}, "test_text in .* holds NaN"),
        ({"test_text": np.full((40, 2), 1e300)}, "holds NaN, infinite or too large numbers"),
        ({"train_text": np.array([None] * 40)}, r"is not a \.npz file of plain arrays"),
        ({"train_logits": np.ones((40, 1))}, f"'logits' in .* {NAME}"),
        ({"train__modules": np.ones((40, 1))}, NAME),
        ({"train_d_util": np.ones((40, 1))}, f"'d_util' in .* {NAME}"),
        ({"train_accuracy": np.ones((40, 1))}, "'accuracy' in .* cannot be"),
        ({"train_training": np.ones((40, 1))}, "'training' in .* cannot be"),
        ({"train_keys": np.ones((40, 1))}, "'keys' in .* cannot be"),
        ({"train_a.b": np.ones((40, 1))}, r"'a\.b' in .* cannot be"),
        ({"train_../up": np.ones((40, 1))}, NAME),
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


def test_a_file_in_the_archive_that_is_no_array_is_one_sentence(write):
    path = write(train_labels=None)
    with zipfile.ZipFile(path, "a") as file:
        file.writestr("train_labels.npy", b"0,1,2")
    with pytest.raises(UserError, match=r"plain arrays \(train_labels in it is none\)\.$"):
        load(path)


@pytest.mark.parametrize("content", [b"", b"a,b\n1,2\n", b"PK\x03\x04 cut off", np.ones((4, 2))])
def test_files_of_another_kind_are_one_sentence(tmp_path, content):
    with open(tmp_path / "mine.npz", "wb") as file:
        file.write(content) if isinstance(content, bytes) else np.save(file, content)
    with pytest.raises(UserError, match=r"mine\.npz is not a \.npz file of plain arrays") as info:
        load(tmp_path / "mine.npz")
    assert "\n" not in str(info.value)


def test_what_would_unpack_to_much_more_than_its_file_is_not_read(tmp_path, monkeypatch):
    sizes = []
    monkeypatch.setattr(features.np.lib.format, "read_array", lambda *_, **__: sizes.append(1))
    path, name = tmp_path / "bomb.npz", "train_sound.npy"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, bytes(10**6))
    path.write_bytes(
        path.read_bytes().replace(struct.pack("<I", 10**6), struct.pack("<I", 3 * 10**9))
    )
    with pytest.raises(
        UserError, match=r"bomb.npz .* unpacks to 3,000,000,000 bytes; if that is r"
    ):
        load(path)
    assert not sizes


@pytest.mark.parametrize(
    ("path", "reason"), [("absent.npz", "No such file"), (".", "Is a directory")]
)
def test_a_path_that_is_no_file_is_one_sentence(tmp_path, path, reason):
    flags = ["--dataset", "features", "--data-root", str(tmp_path / path), "--out", str(tmp_path)]
    with pytest.raises(UserError, match=rf"cannot be read \({reason}.*give a \.npz file"):
        pmr.main(flags)
