"""Checkpoint files: atomic writes, checksums, and reading without running code."""

from __future__ import annotations

import hashlib
import logging
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.plugins.io import CheckpointIO
from lightning_utilities.core.apply_func import apply_to_collection
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import replacing, sync, sync_folder
from ssmpretrain.encoders.weights.content import read_parts
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.on_disk import contradiction, is_parts, sidecar, sidecar_text
from ssmpretrain.training.checkpoints.folder import remove

_log = logging.getLogger(__name__)


class CheckpointFiles(CheckpointIO):
    """Checkpoint files for Lightning. A file is written beside its target, hashed, synced and renamed.

    Reading a file never runs code in it.

    Args:
        async_save: Whether to write in a thread while training goes on, from a copy of the tensors in host memory.
    """

    def __init__(self, async_save: bool = False) -> None:
        self.async_save = async_save
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="checkpoint")
        self._pending: list[Future[None]] = []

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        """Write `checkpoint` to `path`, or let the thread write it.

        Raises:
            OSError: If this write or an earlier one in the thread failed. An older file at `path` is then unchanged.
        """
        if storage_options is not None:
            raise UserError(f"CheckpointFiles: takes no storage_options; got {storage_options}.")
        self.join()
        if not self.async_save:
            write_checkpoint(checkpoint, Path(path))
            return
        copy = apply_to_collection(checkpoint, Tensor, lambda tensor: tensor.detach().to("cpu", copy=True))
        self._pending.append(self._thread.submit(write_checkpoint, copy, Path(path)))

    def after_writing(self, then: Callable[[], None]) -> None:
        """Call `then` once the last checkpoint is in its place, now or in the thread; never if writing failed."""
        if not self._pending:
            then()
            return
        written = self._pending[-1]
        self._pending.append(self._thread.submit(lambda: None if written.exception() else then()))

    def join(self) -> None:
        """Wait until the thread has written its checkpoint.

        Raises:
            OSError: If the write failed.
        """
        pending, self._pending = self._pending, []
        for future in pending:
            future.result()

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a checkpoint as plain data. No code in it is run, whatever the value of `weights_only`.

        Raises:
            ValueError: If the file does not match its checksum, or a weight is NaN or infinite.
        """
        self.join()
        if what := contradiction(Path(path)):
            raise UserError(f"checkpoint: {path} is damaged ({what}). Give an earlier one.")

        def read(file: str | Path) -> dict[str, Any]:
            loaded: dict[str, Any] = TorchCheckpointIO().load_checkpoint(file, map_location, weights_only=True)
            return loaded

        content = read_parts(path, read) if is_parts(path) else read(path)
        for entry in ("state_dict", "current_model_state", "shards"):  # the last in a file of a checkpoint in parts
            check_finite("checkpoint", content.get(entry, {}), path)
        return content

    def remove_checkpoint(self, path: str | Path) -> None:
        """Delete a checkpoint and its checksum."""
        self.join()
        remove(Path(path))

    def teardown(self) -> None:
        """Wait for the thread as `join` does. Log an error of the thread, so that it does not hide an earlier one."""
        gone_wrong = sys.exc_info()[0] is not None
        try:
            self.join()
        except OSError as error:
            if not gone_wrong:
                raise
            _log.warning("checkpoint not written: %s", error)


def write_checkpoint(checkpoint: dict[str, Any], path: Path) -> None:
    """Write `checkpoint` to `path`. At every moment the path holds the old file, the complete new file, or none.

    Raises:
        OSError: If the file cannot be written. An older file at `path` is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = sidecar(path)
    with replacing(beside) as said, replacing(path) as file:
        hashed = _Hashed(file)
        _save(checkpoint, hashed)
        said.write(sidecar_text(path, hashed.size, hashed.sha256.hexdigest()).encode())
        for written in (file, said):
            sync(written)
        beside.unlink(missing_ok=True)  # a file never lies beside the checksum of another
    sync_folder(path.parent)


def _save(checkpoint: dict[str, Any], file: _Hashed) -> None:
    try:
        torch.save(checkpoint, file)  # type: ignore[arg-type]
    except Exception as error:
        if file.error is not None:  # torch wraps the error in its own class, without errno
            raise file.error from error
        raise


class _Hashed:
    """File that computes its hash while it is written, and keeps the first error of writing."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.size = 0
        self.error: OSError | None = None

    def write(self, part: bytes) -> int:
        try:
            count = self._file.write(part)
        except OSError as error:
            self.error = self.error or error
            raise
        self.sha256.update(part)
        self.size += count
        return count

    def flush(self) -> None:
        self._file.flush()
