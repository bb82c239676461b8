"""Precisions of Lightning that an objective trains in."""

from __future__ import annotations

from lightning.pytorch import Trainer

from ssmpretrain.base.errors import UserError

_WITH_EXACT_PARAMETERS = ("32-true", "16-mixed", "bf16-mixed", "64-true")


def check_precision(trainer: Trainer) -> None:
    """Raise if parameters are kept in less than float32: A would be rounded, and a small step of AdamW lost.

    Raises:
        ValueError: If the trainer's precision or a plugin of it does.
    """
    precision = str(trainer.precision)
    if precision not in _WITH_EXACT_PARAMETERS:
        raise UserError(
            "trainer: parameters are kept in float32, A of the scans among them, and precision says what is computed "
            f"in less; got {precision}, which keeps the parameters in less. Set trainer.precision to bf16-mixed."
        )
