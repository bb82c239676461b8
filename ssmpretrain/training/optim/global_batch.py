"""The global batch: images per optimizer step over the whole job."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any

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
        """Read the factors from the trainer and from `batch_size` of its data module.

        Args:
            trainer: The trainer.
            data: Data module, if the trainer has none yet.

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

    @classmethod
    def stored(cls, checkpoint: dict[str, Any], config: dict[str, Any]) -> GlobalBatch | None:
        """Return the global batch that a run trained with; None if neither checkpoint nor configuration stores it.

        Args:
            checkpoint: Content of a checkpoint of the run.
            config: Configuration of the run as nested dictionaries; used for a checkpoint of an older version.
        """
        if stored := checkpoint.get("global_batch"):
            factors = [stored.get(one.name) for one in fields(cls)]
        else:
            trainer, data = config.get("trainer") or {}, (config.get("data") or {}).get("init_args") or {}
            factors = [data.get("batch_size")]
            factors += [trainer.get(name) for name in ("devices", "num_nodes", "accumulate_grad_batches")]
        return cls(*factors) if all(isinstance(factor, int) and factor > 0 for factor in factors) else None

    def how_to_get(self, earlier: GlobalBatch) -> str:
        """Return a sentence that tells the user how to reach an `earlier` global batch on the present devices."""
        at_once = self.size // self.accumulation
        if earlier.size % at_once == 0:
            return f"Set trainer.accumulate_grad_batches to {earlier.size // at_once}."
        return f"Choose data.batch_size and trainer.accumulate_grad_batches so that it is {earlier.size} again."

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
