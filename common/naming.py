"""Names of folders: of a run's, and of a table's."""

import hashlib
import re

LONGEST_NAME = 150  # bytes of a folder's name; file systems take 255


def changed_knobs(arguments, defaults):
    """["<knob>=<value>", ...] of the arguments that have another value than their default."""
    named = {"script", "dataset", "method", "fusion", "seed"}
    return [
        f"{knob.replace('_', '-')}={value}"
        for knob, value in arguments.items()
        if knob not in named and value != defaults.get(knob)
    ]


def join_name(*parts):
    """Words joined by dashes; what is too long for a folder's name ends in a digest of it all.

    Whatever the words are, of which some come from files, it is one folder: no separators in it.
    """
    name = re.sub(r"[^\w.,=+-]", "_", "-".join(parts))
    encoded = name.encode()
    if len(encoded) <= LONGEST_NAME:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:8]
    return f"{encoded[: LONGEST_NAME - 9].decode(errors='ignore')}-{digest}"


def run_name(arguments, defaults):
    """<method>[-<fusion>][-<knob>=<value> where not default]-seed<k>."""
    fusion = [arguments["fusion"]] if arguments.get("fusion") else []
    knobs = join_name(arguments["method"], *fusion, *changed_knobs(arguments, defaults))
    return f"{knobs}-seed{arguments['seed']}"
