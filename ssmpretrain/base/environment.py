"""Numbers that launchers and Lightning leave in the environment, such as WORLD_SIZE and LOCAL_RANK."""

import os

from ssmpretrain.base.errors import UserError


def environment_number(name: str, default: int) -> int:
    """Return the whole number in an environment variable, or `default` if it is not set.

    Raises:
        UserError: If the variable holds something else.
    """
    text = os.environ.get(name, "").strip()
    if not text:
        return default
    if not text.isdecimal() or len(text) > 18:
        raise UserError(
            f"environment: {name} is a whole number that a launcher sets; got {text[:40]!r}. "
            "Unset it, or start through torchrun or srun."
        )
    return int(text)
