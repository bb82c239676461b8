"""Callbacks that only observe a run: adding, changing or removing them does not change the result of training."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback

from ssmpretrain import callbacks as ours

# Callbacks of Lightning, which have no attribute `observes_only`.
_OF_LIGHTNING = {
    "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint",
    "RichModelSummary", "RichProgressBar", "ThroughputMonitor", "Timer", "TQDMProgressBar",
}  # fmt: skip


def observers(callbacks: Iterable[Callback]) -> frozenset[str]:
    """Return the class names of all known callbacks that only observe.

    A class declares this by an attribute `observes_only = True`, as most of `ssmpretrain.callbacks` do. A user's class
    may declare it too. Every other callback counts as part of the training, such as `EMA`.

    Args:
        callbacks: Callbacks of the trainer.
    """
    known = [*(getattr(ours, name) for name in ours.__all__), *(type(one) for one in callbacks)]
    return frozenset(_OF_LIGHTNING | {kind.__name__ for kind in known if getattr(kind, "observes_only", False)})
