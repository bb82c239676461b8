"""Files of weights that a run began with and that are gone: its own checkpoint stands in for them."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from ssmpretrain.run.options.run_options import RunOptions
from ssmpretrain.run.start.find_checkpoint import find_checkpoint

_log = logging.getLogger(__name__)


def replace_missing_sources(config: Any, options: RunOptions) -> None:
    """Let `init_from` name the checkpoint of a run where its own file is gone, as the checkpoint describes the towers.

    The weights come from the checkpoint anyway when the run continues.

    Args:
        config: The parsed configuration of the command; changed in place.
        options: Of the command.
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
