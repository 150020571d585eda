"""One process at a time trains in a folder."""

import os

from .errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such lock
    fcntl = None

HELD = {}  # folder -> the descriptor that holds its lock


def hold(folder):
    """Take `folder` until `release` or the end of this process, be it a kill; UserError if another
    one has it. A file system that cannot lock a folder is trusted."""
    if fcntl is None or folder in HELD:
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        raise UserError(
            f"Another process is training in {folder}; let it end, or choose another --out."
        ) from None
    except OSError:
        pass
    HELD[folder] = descriptor


def release(folder):
    descriptor = HELD.pop(folder, None)
    if descriptor is not None:
        os.close(descriptor)


def forget():
    """A process that reads files for this one must not hold its locks after it was killed."""
    while HELD:
        os.close(HELD.popitem()[1])


if fcntl:
    os.register_at_fork(after_in_child=forget)
