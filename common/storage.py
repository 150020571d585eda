"""Files that are whole or not there: written beside and renamed, and read with a sentence."""

import json
import os
import sys
from contextlib import suppress
from pathlib import Path

from .errors import UserError


def make_folder(folder):
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot make the folder {folder} ({error}); choose another --out."
        ) from error


def write_atomically(path, write):
    """Call `write` with a binary file beside `path`, then rename it to `path`.

    The file beside has a name of this process's own: two of them never write into one.
    """
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        gone = isinstance(error, FileNotFoundError)
        hint = "Was the folder removed?" if gone else "Make room or choose another --out."
        raise UserError(
            f"Cannot write {path} ({error}); what was saved before is whole. {hint}"
        ) from error
    finally:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a file must not keep a full disk full


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode(errors="replace")))


def write_json(path, value):
    write_text(path, to_json(value, indent=2) + "\n")


def write_figure(path, figure):
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def to_json(value, **options):
    return json.dumps(strict(value), allow_nan=False, **options)


def strict(value):
    """`value` with None where a number is NaN or infinite, which JSON does not have, or an int that
    is too large for a float."""
    if isinstance(value, dict):
        return {key: strict(x) for key, x in value.items()}
    if isinstance(value, (list, tuple)):
        return [strict(x) for x in value]
    finite = not isinstance(value, (int, float)) or abs(value) <= sys.float_info.max
    return value if finite else None


def parse_json(text):
    """What `to_json` wrote; ValueError for anything else."""
    try:
        return strict(json.loads(text))
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def read_json(path, key=None, remedy="start again by --overwrite"):
    """The object in a JSON file, or its part `key`; UserError if it is not there or damaged."""
    try:
        value = parse_json(Path(path).read_text(encoding="utf-8"))
        value = dict(value[key] if key else value)
        if not value:
            raise ValueError("it is empty")
        return value
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); {remedy}.") from error


def refuse_another(place, found, arguments):
    """UserError if the arguments `found` at `place` are not the present ones."""
    here = strict(arguments)
    differing = [
        f"{key} {found.get(key)!r} there, {here.get(key)!r} here"
        for key in sorted(found.keys() | here.keys())
        if found.get(key) != here.get(key)
    ]
    if differing:
        raise UserError(
            f"{place} holds a run of another configuration ({'; '.join(differing)}); replace it by "
            "--overwrite or choose another --out."
        )


def read_runs(path, arguments, names, numbers):
    """The dicts under `runs` in a JSON file that was made with the present `arguments`; each has
    all the `names`, and a number for all the `numbers`."""
    record = read_json(path)
    try:
        refuse_another(path, record["arguments"], arguments)
        whole = [
            all(isinstance(run.get(x), (int, str)) for x in names)
            and all(isinstance(run.get(x), (int, float)) for x in numbers)
            for run in record["runs"]
        ]
        if not whole or not all(whole):
            raise ValueError("runs or their numbers are missing")
        return record["runs"]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{path} is of another version ({error}); start again by --overwrite."
        ) from error
