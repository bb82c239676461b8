"""Where data that can be made or fetched again is kept."""

import os
from pathlib import Path


def cache_folder() -> Path:
    """`$SSMPRETRAIN_CACHE`, or `~/.cache/ssmpretrain`."""
    return Path(os.environ.get("SSMPRETRAIN_CACHE") or "~/.cache/ssmpretrain").expanduser()
