"""Check of the trainer's precision."""

from __future__ import annotations

from lightning.pytorch import Trainer

from ssmpretrain.base.errors import UserError

_WITH_EXACT_PARAMETERS = ("32-true", "16-mixed", "bf16-mixed", "64-true")


def check_precision(trainer: Trainer) -> None:
    """Check that parameters are kept in float32. In less, A would be rounded and small steps of AdamW would be lost.

    Raises:
        ValueError: If the trainer's precision, or a precision plugin, keeps parameters in less than float32.
    """
    precision = str(trainer.precision)
    if precision not in _WITH_EXACT_PARAMETERS:
        raise UserError(
            "trainer: parameters are kept in float32, also A of the scans, and only computations may use less; "
            f"got {precision}, which keeps the parameters in less. Set trainer.precision to bf16-mixed."
        )
