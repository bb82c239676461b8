"""Missing files of initial weights: a continued run uses its own checkpoint instead."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.start.find_checkpoint import find_checkpoint

_log = logging.getLogger(__name__)


def replace_missing_sources(config: Any, options: RunOptions) -> None:
    """Set `init_from` to the run's own checkpoint if the file that it names no longer exists.

    The checkpoint describes the encoder and the text tower as well as that file did. A continued run takes its weights
    from the checkpoint in any case.

    Args:
        config: Parsed configuration of the command, changed in place.
        options: Options of the run.
    """
    model = config.model.get("init_args") or {}
    for option, settings in (("model", model), ("model.text", model.get("text") or {})):
        source = settings.get("init_from")
        if source is None or Path(source).expanduser().exists():
            continue
        checkpoint = find_checkpoint(options).path
        if checkpoint is not None:
            _log.info("%s.init_from %s is gone; it comes from %s", option, source, checkpoint)
            settings["init_from"] = str(checkpoint)
