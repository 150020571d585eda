"""What a run finds in its folder, compared with what it expects before any of it is used."""

import math
import zipfile

import torch

from .storage import strict, to_json
from .tables import lookup


def read_checkpoint(path, device):
    """What torch.save wrote; torch.load alone does not look at the checksums in the file."""
    with zipfile.ZipFile(path) as file:
        if damaged := file.testzip():
            raise ValueError(f"the checksum of {damaged} is wrong")
    return torch.load(path, map_location=device, weights_only=True)


def check_checkpoint(checkpoint, arguments, epochs):
    """ValueError, or another error where parts are missing or strange, unless `checkpoint` is one
    that a run of these `arguments` may have saved within its `epochs`."""
    epoch, history = checkpoint["epoch"], checkpoint["history"]
    if strict(checkpoint.get("arguments", arguments)) != strict(arguments):  # older ones lack them
        raise ValueError("it is of a run of another configuration")
    if not 0 <= epoch < epochs or [x["epoch"] for x in history] != list(range(epoch + 1)):
        raise ValueError(f"its history does not lead to its epoch {epoch}")
    scores = [entry["val"]["accuracy"] for entry in history]
    first = scores.index(max(scores))
    if checkpoint["best"] != {"epoch": first, "accuracy": scores[first]}:
        raise ValueError("its best epoch is not that of its history")
    to_json(history)
    if not math.isfinite(checkpoint["seconds"] + checkpoint["cpu_seconds"]):
        raise ValueError("its times are no numbers")
    state = checkpoint["state"]
    if has(torch.isnan, state) or has(torch.isinf, state.get("model")):
        raise ValueError("it holds NaN or infinite weights")


def has(test, state):
    """Whether `test` is true of a number in the tensors of nested dicts and lists."""
    if isinstance(state, torch.Tensor):
        return bool(test(state).any())
    parts = state.values() if isinstance(state, dict) else state
    return isinstance(state, (dict, list, tuple)) and any(has(test, part) for part in parts)


def check_summary(summary, arguments):
    """ValueError unless `summary` is of these `arguments` and has the numbers others start from."""
    named = ("script", "dataset", "method", "fusion", "seed")
    wrong = [key for key in named if summary.get(key) != arguments[key]]
    numbers = ["epochs", "test.accuracy", "best.test.accuracy"]
    if lookup(summary, "best.epoch") is not None:  # else it was put together from other runs
        numbers += ["val.accuracy", "cpu_seconds", "parameters"]
    wrong += [key for key in numbers if not isinstance(lookup(summary, key), (int, float))]
    parts = {key: value for key, value in summary.items() if isinstance(value, dict)}
    wrong += [key for key, value in parts.items() if not numeric(value)]
    if wrong:
        raise ValueError(f"see {', '.join(wrong)}")


def numeric(value):
    """Whether nested dicts hold nothing but numbers and None."""
    if isinstance(value, dict):
        return all(map(numeric, value.values()))
    return value is None or isinstance(value, (int, float))
