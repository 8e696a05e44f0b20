"""The error that a user's input causes, as against a defect of this package."""


class DeRaError(ValueError):
    """Bad input: the message names the argument, its value and the way out. A command prints it and exits with 2."""


def first_line(error: BaseException) -> str:
    """What a library's error says, without what follows."""
    return str(error).strip().split("\n")[0]
