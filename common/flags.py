"""Types of flags: what `argparse` checks a value by."""

import argparse
from typing import Any, NamedTuple

LARGEST = (2 - 2**-23) * 2.0**127  # of float32, in which all is computed


def number(kind, low, high=None, open_low=False, infinite=False):
    """An argparse type: a number of `kind` (int or float) from `low` to `high`.

    high:     None is a thousand million for int, the largest float32 for float.
    open_low: `low` itself is refused; infinite: inf is accepted.
    """
    largest = high or (10**9 if kind is int else LARGEST)

    def parse(text):
        try:
            value = kind(text)
        except ValueError:
            value = float("nan")
        accepted = low <= value <= largest or (infinite and value == float("inf"))
        if not accepted or (open_low and value == low):
            bounds = f"above {low}" if open_low else f"at least {low}"
            if high or value > largest:
                bounds += f" and at most {largest:g}"
            noun = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"must be {noun} {bounds}, not {text!r}")
        return value

    return parse


SIZE, SHARE = number(float, 0), number(float, 0, 1)


class Dial(NamedTuple):
    """A flag of a dataset's own: a keyword argument of its loader.

    kind:   turns the flag's text into its value, or raises argparse.ArgumentTypeError.
    listed: whether --help shows it.
    """

    default: Any
    kind: Any
    help: str
    listed: bool = True
