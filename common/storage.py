"""Files that are whole or not there: written beside and renamed, and read with a sentence."""

import json
import os
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
    """Call `write` with a binary file beside `path`, then rename it to `path`."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save raises RuntimeError on a full disk
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # half a file must not keep a full disk full
        hint = "Make room or choose another --out."
        if isinstance(error, FileNotFoundError):
            hint = "Is another process training the same run?"
        raise UserError(
            f"Cannot write {path} ({error}); what was saved before is whole. {hint}"
        ) from error


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def write_json(path, value):
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_figure(path, figure):
    write_atomically(path, lambda file: figure.savefig(file, format="png", dpi=120))


def read_json(path, key=None):
    """The object in a JSON file, or its part `key`; UserError if it is not there or damaged."""
    try:
        value = json.loads(Path(path).read_text())
        value = dict(value[key] if key else value)
        if not value:
            raise ValueError("it is empty")
        return value
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} cannot be read ({error}); start again by --overwrite.") from error
