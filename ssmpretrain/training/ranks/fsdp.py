"""FSDP2: parameters, gradients and optimizer state are sharded over all ranks, and whole only while they are used."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import ModelParallelStrategy, StrategyRegistry
from torch import Tensor, nn
from torch.distributed.constants import default_pg_timeout
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.optim import Optimizer

from ssmpretrain.base import ranks
from ssmpretrain.base.lightning_private import shard_over_all_ranks
from ssmpretrain.base.whole_files import partial, sync_folder
from ssmpretrain.encoders.weights.content import part_of, read_parts
from ssmpretrain.encoders.weights.on_disk import is_parts, part_path
from ssmpretrain.training.checkpoints.files import CheckpointFiles
from ssmpretrain.training.checkpoints.folder import remove
from ssmpretrain.training.optim.optimizer_state import matched
from ssmpretrain.training.ranks.sharded_tensors import gathered, in_shards_like, rows_to_save


class FSDP2(ModelParallelStrategy):
    """Strategy of Lightning for FSDP2: shard the module, and write checkpoints that any number of ranks can read.

    A recipe selects it by `trainer.strategy: fsdp2`. Each block of the encoder and the decoder is gathered before its
    forward pass and again before its backward pass; all other parameters are gathered at the start of the step.
    Gradients are averaged as under DDP, and the arithmetic is the same: parameters are kept and gathered in float32,
    and `trainer.precision` decides which operations use bfloat16. During validation all parameters stay whole, so ranks
    may have different numbers of batches.

    Args:
        sharded_checkpoints: Whether to write a folder with one file per rank. Otherwise rank 0 gathers all tensors on
            the CPU and writes one file. Any number of ranks can continue from both forms, also under DDP.
        process_group_backend: "nccl", "gloo", or None for the backend that fits the device.
        timeout: Time that a rank waits for the others.
    """

    def __init__(
        self,
        sharded_checkpoints: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = default_pg_timeout,
    ) -> None:
        super().__init__(
            save_distributed_checkpoint=False, process_group_backend=process_group_backend, timeout=timeout
        )
        self.sharded_checkpoints = sharded_checkpoints

    def setup_environment(self) -> None:
        shard_over_all_ranks(self)
        super().setup_environment()

    def setup(self, trainer: Trainer) -> None:
        assert self.lightning_module is not None
        shard(self.lightning_module, self.device_mesh["data_parallel"])
        super().setup(trainer)

    # Validation

    def on_validation_start(self) -> None:
        *blocks, whole = self._units()
        whole._get_fsdp_state()._lazy_init()  # otherwise a block that runs first would become FSDP's root
        for unit in (*blocks, whole):
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()

    def on_validation_end(self) -> None:
        *blocks, _ = units = list(self._units())
        for unit in units:
            unit.reshard()
        for block in blocks:
            block.set_reshard_after_forward(True, recurse=False)

    def _units(self) -> list[FSDPModule]:
        """Return the units that FSDP2 gathers: the blocks, and last the module with all other parameters."""
        assert self.lightning_module is not None
        whole, *blocks = [module for module in self.lightning_module.modules() if isinstance(module, FSDPModule)]
        return [*blocks, whole]

    # Checkpoints: tensors are sharded in memory; files hold whole tensors, or the rows of each rank

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        assert self.lightning_module is not None
        return self.lightning_module.state_dict()

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        return optimizer.state_dict()

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: str | Path, storage_options: Any | None = None
    ) -> None:
        if self.sharded_checkpoints:
            self._save_parts(checkpoint, Path(self.broadcast(str(filepath))))
        else:
            super().save_checkpoint(gathered(checkpoint, keep=self.is_global_zero), filepath, storage_options)

    def _save_parts(self, checkpoint: dict[str, Any], folder: Path) -> None:
        """Write one part per rank into a folder beside the target, and rename the folder when all parts exist."""
        waiting, failure = partial(folder), None
        try:
            self.checkpoint_io.save_checkpoint(
                part_of(checkpoint, self.global_rank, rows_to_save),
                part_path(waiting, self.global_rank, self.world_size),
            )
            if isinstance(self.checkpoint_io, CheckpointFiles):
                self.checkpoint_io.join()  # the folder is complete when all ranks are
        except OSError as error:
            failure = error
        failures = [error for error in ranks.gather(failure) if error is not None]
        if self.is_global_zero:
            if failures:
                remove(waiting)
            else:
                remove(folder)
                waiting.replace(folder)
                sync_folder(folder.parent)
        self.barrier()
        if failures:
            raise failures[0]

    def load_checkpoint(self, checkpoint_path: str | Path, weights_only: bool | None = None) -> dict[str, Any]:
        assert self.lightning_module is not None
        targets = self.lightning_module.state_dict()

        def read(path: Path) -> Any:
            return self.checkpoint_io.load_checkpoint(path, weights_only=True)

        def take(name: str, tensor: Tensor) -> Tensor:
            whole: Tensor = in_shards_like(tensor, targets.get(name))
            return whole

        if is_parts(checkpoint_path):
            checkpoint = read_parts(checkpoint_path, read, take)
        else:
            checkpoint = read(Path(checkpoint_path))
        for state in ("state_dict", "current_model_state", "model_ema"):
            if state in checkpoint:
                checkpoint[state] = {name: take(name, tensor) for name, tensor in checkpoint[state].items()}
        return checkpoint

    def load_model_state_dict(self, checkpoint: Any, strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state_dict in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            saved = matched(optimizer, state_dict)
            parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
            state = {
                number: {name: in_shards_like(value, parameters[number]) for name, value in entries.items()}
                for number, entries in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def shard(module: LightningModule, mesh: DeviceMesh) -> None:
    """Shard `module` over `mesh` in place: its blocks one by one, then all other parameters."""
    if isinstance(module, FSDPModule):
        return  # a second call of the trainer
    for block in blocks_of(module):
        fully_shard(block, mesh=mesh)
    name = type(module).__name__
    fully_shard(module, mesh=mesh)
    type(module).__name__ = name  # checkpoints and messages contain the name of the objective
    register_fsdp_forward_method(module, "training_step")  # Lightning calls it instead of forward


def blocks_of(module: nn.Module) -> list[nn.Module]:
    """Return the blocks of a module: composite modules with parameters in a `ModuleList` that contain no such list.

    Blocks that work in pairs are left out, because they use each other's parts.
    """
    found: list[nn.Module] = []
    for child in module.children():
        inner = [] if getattr(child, "blocks_per_stage", 1) > 1 else blocks_of(child)
        listed = isinstance(module, nn.ModuleList | nn.Sequential) and any(True for _ in child.children())
        found += inner or ([child] if listed and any(True for _ in child.parameters()) else [])
    return found


StrategyRegistry.register("fsdp2", FSDP2, description="FSDP2: all states sharded over all ranks")
