"""Content of checkpoint files: tensors and plain data. Code in a file is never run.

A checkpoint in parts has one file per rank. Each part holds its rows of the sharded tensors. Part 0 also holds all
other values, with a key in the place of each sharded tensor.
"""

import argparse
import json
import pickle
import re
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.weights.on_disk import check_whole, files_of, parts_in
from ssmpretrain.encoders.weights.provenance import DESCRIPTION

# Objects in the logs of mmengine's checkpoints, and the functions that rebuild them. None of them is called: each name
# stands for `_LeftOut`.
_LEFT_OUT = (
    "mmengine.logging.history_buffer.HistoryBuffer",
    "builtins.getattr",
    "builtins.bytes",
    "numpy.ndarray",
    "numpy.core.multiarray._reconstruct",
    "numpy._core.multiarray._reconstruct",
)
_SHARDS = "rows in the parts"  # the only key of a dictionary that stands for a sharded tensor


def read_content(path: str | Path) -> Any:
    """Read the whole content of a file of weights: tensors and plain data. Code in the file is never run.

    Args:
        path: Path of the file, or of the folder of a checkpoint in parts.

    Raises:
        ValueError: If the file does not exist, is damaged, or contains code.
    """
    path = Path(path).expanduser()
    files = files_of(path)
    check_whole(files)
    return contents_of(path, files)[0]


def contents_of(path: Path, files: Sequence[Path]) -> tuple[Any, dict[str, Any]]:
    """Read the content of a checkpoint, and the description of its weights.

    Args:
        path: Path of the file, or of the folder of the parts.
        files: The file, or all parts in the order of the ranks.

    Returns:
        The content, and the description. An export has one entry with its description, see `describe_weights`. A
        checkpoint of a run has several such entries, so its whole content is the description.

    Raises:
        ValueError: If a file is damaged or contains code.
    """
    if files[0].suffix == ".safetensors":
        return _read_safetensors(files[0])
    contents = [_read_pickle(path) for path in files]
    content = contents[0] if files[0] == path else join_parts(contents)
    about = content.get(DESCRIPTION, content) if isinstance(content, dict) else {}
    return content, about if isinstance(about, dict) else {}


def read_without_sidecar(path: Path) -> tuple[Any, str | None]:
    """Read a run's checkpoint file that has no sidecar, and compare it with the checksums inside.

    Returns:
        The content, None if the file cannot be read; and the damage in a few words, None if the file is whole.
    """
    if path.stat().st_size == 0:
        return None, "empty"
    try:
        content = contents_of(path, [path])[0]
        if zipfile.is_zipfile(path) and (entry := zipfile.ZipFile(path).testzip()):
            return content, f"{entry} in it is damaged, and there is no good .sha256"
    except (ValueError, zipfile.BadZipFile):
        return None, "no checkpoint, or a part of one"
    is_checkpoint = isinstance(content, dict) and content.keys() & {"state_dict", "shards"}
    return content, None if is_checkpoint else "no checkpoint"


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors in a safetensors file, and the description in its header."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        about = json.loads(metadata.get(DESCRIPTION, "{}"))
        if "encoder" in metadata and not about:
            about = {"encoder": json.loads(metadata["encoder"])}  # older files have only this entry
        if not isinstance(about, dict):
            raise UserError(f"its description is a dictionary; got {about!r:.80}")
        return safetensors.torch.load_file(path), about
    except (safetensors.SafetensorError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"checkpoint: {path} is damaged or no safetensors file ({error}). Fetch it again.") from error


class _LeftOut:
    """Stand for an object that is not read from a file. It ignores its arguments and keeps nothing."""

    def __init__(self, *args: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass


def _read_pickle(path: Path) -> Any:
    # Published files contain their command line (a Namespace, perhaps with paths) and numpy numbers. These are data and
    # run no code.
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    plain_data = [argparse.Namespace, np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]
    plain_data += [(PurePosixPath, "pathlib.PosixPath"), PurePosixPath]
    plain_data += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    plain_data += [(_LeftOut, name) for name in _LEFT_OUT]
    try:
        with torch.serialization.safe_globals(plain_data):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+) (?:was not allowed|was not an allowed|whose module)", str(error))
        if foreign is None:
            raise _damaged(path) from error
        raise UserError(
            f"checkpoint: {path} pickles {foreign[1]}; unpickling it could run any code, so the file is refused. "
            "If you trust its source, save only its tensors to a new file."
        ) from error
    except PermissionError as error:
        raise UserError(f"checkpoint: {path} may not be read by this user. Change its permissions.") from error
    except Exception as error:  # a damaged file raises RuntimeError, EOFError, OSError, KeyError and others
        raise _damaged(path) from error


def _damaged(path: Path) -> UserError:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(64).lstrip().lower()
    if start.startswith((b"<!doctype", b"<html")):
        what = "is a web page, not a checkpoint"
    elif start.startswith(b"version https://git-lfs"):
        what = "is a Git LFS pointer, not the checkpoint itself"
    else:
        what = "is no checkpoint, or a truncated or damaged one"
    return UserError(
        f"checkpoint: {path} ({size:,} bytes) {what}. Fetch it again and compare its size with the source's."
    )


def rest_of(folder: str | Path, read: Callable[[Path], Any]) -> Any:
    """Return a checkpoint in parts without its sharded tensors: it has a key in the place of each of them.

    Args:
        folder: Folder of the parts.
        read: Function that reads one file.
    """
    return read(parts_in(folder)[0])["rest"]


def part_of(checkpoint: dict[str, Any], rank: int, rows_of: Callable[[Any], Tensor | None]) -> dict[str, Any]:
    """Return the content of the file that one rank writes.

    Args:
        checkpoint: The whole checkpoint. It has the same keys on every rank.
        rank: This rank.
        rows_of: Function that returns this rank's rows of a sharded tensor, and None for any other value. Tensors are
            sharded along dimension 0, in the order of the ranks.
    """
    shards: dict[str, Tensor] = {}

    def without_shards(value: Any, key: str) -> Any:
        if isinstance(value, dict):
            return {name: without_shards(inner, f"{key}/{name}") for name, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([without_shards(inner, f"{key}/{i}") for i, inner in enumerate(value)])
        rows = rows_of(value)
        if rows is None:
            return value
        shards[key] = rows
        return {_SHARDS: key}

    rest = without_shards(checkpoint, "")
    return {"shards": shards, "rest": rest if rank == 0 else None}


def read_parts(
    folder: str | Path, read: Callable[[Path], Any], take: Callable[[str, Tensor], Tensor] | None = None
) -> dict[str, Any]:
    """Read a checkpoint in parts and return it as one checkpoint.

    Args:
        folder: Folder of the parts.
        read: Function that reads one file.
        take: As in `join_parts`.

    Raises:
        ValueError: If a part is missing.
    """
    return join_parts([read(path) for path in parts_in(folder)], take)


def join_parts(parts: Sequence[Any], take: Callable[[str, Tensor], Tensor] | None = None) -> dict[str, Any]:
    """Return one checkpoint from the contents of its parts.

    Args:
        parts: Contents of the parts of all ranks, in the order of the ranks.
        take: Function that is called with the name and the whole value of each sharded tensor. Its result replaces the
            tensor in the checkpoint. So only one whole tensor is in memory at a time.
    """

    def whole(value: Any, name: str) -> Any:
        if isinstance(value, dict):
            if value.keys() == {_SHARDS}:
                tensor = torch.cat([part["shards"][value[_SHARDS]] for part in parts])
                return tensor if take is None else take(name, tensor)
            return {key: whole(inner, key) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return type(value)([whole(inner, name) for inner in value])
        return value

    result: dict[str, Any] = whole(parts[0]["rest"], "")
    return result
