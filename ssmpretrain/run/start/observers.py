"""Callbacks that only observe a run: adding, changing or leaving them out does not change the result of training."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback

from ssmpretrain import callbacks as ours

# Lightning's own, which cannot say it themselves.
_OF_LIGHTNING = {
    "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint",
    "RichModelSummary", "RichProgressBar", "ThroughputMonitor", "Timer", "TQDMProgressBar",
}  # fmt: skip


def observers(callbacks: Iterable[Callback]) -> frozenset[str]:
    """Return the class names of all known callbacks that only observe.

    A class says so itself, by an attribute `observes_only = True`: each of `ssmpretrain.callbacks`, and a user's own.
    Any other callback takes part in training, as `EMA` does.

    Args:
        callbacks: Those of the trainer.
    """
    known = [*(getattr(ours, name) for name in ours.__all__), *(type(one) for one in callbacks)]
    return frozenset(_OF_LIGHTNING | {kind.__name__ for kind in known if getattr(kind, "observes_only", False)})
