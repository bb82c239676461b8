"""Cache folder: data that can be made or fetched again."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """Return `$SSMPRETRAIN_CACHE`, or `~/.cache/ssmpretrain` if it is not set. The folder need not exist."""
    return Path(os.environ.get("SSMPRETRAIN_CACHE") or "~/.cache/ssmpretrain").expanduser()
