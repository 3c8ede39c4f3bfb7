"""The one exception a user is meant to read."""


class InputError(ValueError):
    """Something the user gave cannot be used.

    The message is one line that names the thing, says what was found and what is allowed. A stage prints it
    and exits with status 1; a notebook sees the exception.
    """
