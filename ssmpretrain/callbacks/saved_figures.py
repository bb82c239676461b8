"""Figures in the folder of a run."""

from __future__ import annotations

import logging
from pathlib import Path

from matplotlib.figure import Figure

from ssmpretrain.base.whole_files import replacing

_log = logging.getLogger(__name__)


def save_figure(figure: Figure, path: Path) -> None:
    """Write a figure as PNG, replacing an earlier one. If writing fails, e.g. on a full disk, training goes on."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with replacing(path) as file:
            figure.savefig(file, format="png")
    except OSError as error:
        _log.warning("%s: not drawn: %s", path, error.strerror)
