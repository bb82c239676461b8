"""How many images one optimizer step sees, over the whole job."""

from __future__ import annotations

from dataclasses import dataclass

from lightning.pytorch import Trainer

from ssmpretrain.base.errors import UserError


@dataclass(frozen=True)
class GlobalBatch:
    """Images per optimizer step and its factors; `str()` gives the arithmetic."""

    per_device: int
    devices: int
    nodes: int
    accumulation: int

    @classmethod
    def of(cls, trainer: Trainer, data: object = None) -> GlobalBatch:
        """Read the factors from the trainer and the `batch_size` of its data module, or of `data` before it has one.

        Raises:
            ValueError: If the run has no data module with a `batch_size` (images per device).
        """
        per_device = getattr(data or getattr(trainer, "datamodule", None), "batch_size", None)
        if not isinstance(per_device, int):
            raise UserError(
                "learning rate: the rule lr_per_256 x global batch / 256 needs a data module with `batch_size` "
                "(images per device); got none. Use a class of ssmpretrain.datamodules or set that attribute."
            )
        devices = trainer.world_size // trainer.num_nodes
        return cls(per_device, devices, trainer.num_nodes, int(trainer.accumulate_grad_batches))

    @property
    def size(self) -> int:
        """Images per optimizer step."""
        return self.per_device * self.devices * self.nodes * self.accumulation

    @property
    def product(self) -> str:
        """The arithmetic as an equation: "1024 = 128 per device x 8 devices x 1 node x 1 accumulated"."""
        devices, nodes = (f"{count} {word}{'s' * (count != 1)}" for count, word in
                          ((self.devices, "device"), (self.nodes, "node")))  # fmt: skip
        return f"{self.size} = {self.per_device} per device x {devices} x {nodes} x {self.accumulation} accumulated"

    def __str__(self) -> str:
        return (
            f"{self.size} ({self.per_device} per device x {self.devices} devices x {self.nodes} nodes "
            f"x {self.accumulation} accumulated)"
        )
