"""The one exception that a user's mistake raises."""


class UserError(Exception):
    """A mistake in one clear sentence: what is wrong, where, and what to do about it.

    `command_line.run_command` prints it and exits with status 1; library code may catch it.
    """
