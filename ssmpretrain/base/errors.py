"""Errors that a person can repair; each class has the exit code of the command that it ends.

Raise `UserError` or a class derived from it for a mistake in a recipe, an option, a file or an argument, and for a
failure of the machine that a person can repair. The command line shows such an error as its message alone. Any other
exception counts as a fault of the code, and keeps its traceback; `assert` states what the code itself guarantees.
"""

import re


class UserError(ValueError):
    """An error that the person at the command line can repair; the message says where, what holds and what to do.

    It is a `ValueError`, so code that calls the package can catch `ValueError`. Objectives, data modules and commands
    of other packages may raise it too.

    torch repeats an error of a DataLoader worker as `type(error)("Caught UserError in DataLoader worker process 0.
    Original Traceback ...")`. Of such a text, only the message at the end is kept.

    Args:
        message: The complete message, or torch's report of an error in a worker.

    Attributes:
        exit_code: Exit code of the command: 2 if the user's input is wrong, 1 if the run failed.
        is_told: Whether the person has read the message already, so that the command line does not repeat it.
    """

    exit_code = 2
    is_told = False

    def __init__(self, message: str) -> None:
        name = type(self).__name__
        if message.startswith(f"Caught {name} in "):
            message = re.split(rf"^(?:[\w.]+\.)?{name}: ", message, flags=re.MULTILINE)[-1].strip()
        super().__init__(message)


class DataError(UserError):
    """The user's data cannot be used."""


class SourceError(DataError):
    """A shard cannot be read from the place where it lies.

    Args:
        message: The complete message, as in `UserError`.
        cause: A short phrase, equal for all shards with the same fault; failures are counted by it.
    """

    def __init__(self, message: str, cause: str = "unreachable shards") -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type["SourceError"], tuple[str, str]]:
        return SourceError, (str(self), self.cause)


class PathMissing(UserError, FileNotFoundError):
    """A file or folder that was named does not exist."""


class PathTaken(UserError, FileExistsError):
    """A file that would be written exists, and nothing is overwritten."""


class NotAFolder(UserError, NotADirectoryError):
    """A file was named where a folder is needed."""


class OutOfMemory(UserError, MemoryError):
    """The machine has too little memory for sizes that the user chose."""
