"""The one exception that a user's mistake raises, and the one way to warn."""

import sys


class UserError(Exception):
    """A mistake in one clear sentence: what is wrong, where, and what to do about it.

    `command_line.run_command` prints it and exits with status 1; library code may catch it.
    """


def warn(sentence):
    """Say on stderr what a user should know of a result that is right all the same."""
    print(f"warning: {sentence}", file=sys.stderr)
