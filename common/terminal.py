"""What a terminal or Ctrl-C may do to a command: it ends without a traceback, its work is kept."""

import os
import sys

INTERRUPTED = (
    "\ninterrupted; the same command with --resume (and without --overwrite) goes on from the last "
    "whole epoch"
)


def say_interrupted(kind, error, trace):
    """In place of `sys.excepthook`: Ctrl-C, e.g. while torch is imported, is a sentence."""
    if issubclass(kind, KeyboardInterrupt):
        print(INTERRUPTED, file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


def open_output():
    """Let stdout and stderr take all that is printed: a character that they lack becomes a question
    mark, and one that is closed (`>&-`) takes nothing."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):  # a notebook's has no such thing, and needs none
            stream.reconfigure(errors="replace")
