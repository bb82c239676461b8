"""The errors that the data room raises on purpose, and how they survive the way out of a DataLoader worker."""

import re

_NAME_IN_TRACEBACK = re.compile(r"^(?:[\w.]+\.)?(?:Data|Source)Error: ", re.MULTILINE)


class DataError(ValueError):
    """The user's data cannot be used; the message says where, what and what to do.

    torch re-raises a worker's error as `type(error)("Caught DataError in DataLoader worker 0. Original
    Traceback ...")`. Built from such a text, a DataError keeps only the message that ends it, so that the user reads
    one sentence.

    Args:
        message: The complete message, or torch's report of a DataError raised in a worker.
    """

    def __init__(self, message: str) -> None:
        if message.startswith(("Caught DataError in ", "Caught SourceError in ")):
            message = _NAME_IN_TRACEBACK.split(message)[-1].strip()
        super().__init__(message)


class SourceError(DataError):
    """A shard cannot be had from where it lies.

    Args:
        message: As in `DataError`.
        cause: A short phrase for all shards that fail alike, which is counted.
    """

    def __init__(self, message: str, cause: str = "unreachable shards") -> None:
        super().__init__(message)
        self.cause = cause

    def __reduce__(self) -> tuple[type["SourceError"], tuple[str, str]]:
        return SourceError, (str(self), self.cause)
