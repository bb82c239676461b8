"""Logging of a run: lines of this package as plain text, without warnings of Lightning that a user cannot act on."""

from __future__ import annotations

import logging
import os
import warnings

# Warnings of Lightning about its own code, or about files that the run folder manages.
NOISE = (
    r"Found \d+ module\(s\) in eval mode at the start of training",  # a frozen encoder
    "LightningCLI's args parameter is intended",
    r"`isinstance\(treespec, LeafSpec\)` is deprecated",
    "Checkpoint directory .* exists and is not empty",
    r"The number of training batches \(\d+\) is smaller than the logging interval",
    "The '.*_dataloader' does not have many workers",
    "You're using the WeightAveraging callback with a model that overrides",
    "You have overridden `on_before_batch_transfer`",
    r"It is recommended to use `self.log\('(val|data)/",  # our metrics are summed over all ranks already
)


def set_up_logging() -> None:
    """Show log lines of this package from level INFO on, and hide warnings in `NOISE`, for the rest of the process."""
    os.environ.setdefault("JSONARGPARSE_DEPRECATION_WARNINGS", "off")
    for message in NOISE:
        warnings.filterwarnings("ignore", message=message)
    logging.getLogger("lightning.pytorch").setLevel(logging.WARNING)
    logging.basicConfig(format="%(message)s")
    logging.getLogger("ssmpretrain").setLevel(logging.INFO)
