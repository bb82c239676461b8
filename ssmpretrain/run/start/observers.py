"""Callbacks that only observe a run: adding, changing or removing them does not change the result of training."""

from __future__ import annotations

from collections.abc import Iterable

from lightning.pytorch import Callback

from ssmpretrain import callbacks as ours
from ssmpretrain.training.stopping.collapse import CollapseGuard

# Callbacks of Lightning, which have no attribute `observes_only`.
_OF_LIGHTNING = {
    f"lightning.{name}"
    for name in (
    "DeviceStatsMonitor", "LearningRateMonitor", "ModelCheckpoint", "ModelSummary", "OnExceptionCheckpoint",
    "RichModelSummary", "RichProgressBar", "ThroughputMonitor", "Timer", "TQDMProgressBar",
    )
}  # fmt: skip


def observers(callbacks: Iterable[Callback]) -> frozenset[str]:
    """Return all known callbacks that only observe, each as `package_and_class` names it.

    A class declares this by an attribute `observes_only = True`, as most of `ssmpretrain.callbacks` do. A user's class
    may declare it too. Every other callback counts as part of the training, such as `EMA`.

    Args:
        callbacks: Callbacks of the trainer.
    """
    known = [CollapseGuard, *(getattr(ours, name) for name in ours.__all__), *(type(one) for one in callbacks)]
    paths = (f"{kind.__module__}.{kind.__name__}" for kind in known if getattr(kind, "observes_only", False))
    return frozenset({*_OF_LIGHTNING, *map(package_and_class, paths)})


def package_and_class(class_path: str) -> str:
    """Return the top package and the class of a class path: `ssmpretrain.EMA` for `ssmpretrain.callbacks.ema.EMA`.

    A configuration may name a class by its module or by a folder that exports it.
    """
    package, name = class_path.partition(".")[0], class_path.rpartition(".")[2]
    return f"{'lightning' if package == 'pytorch_lightning' else package}.{name}"
