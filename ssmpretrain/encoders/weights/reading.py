"""Read the weights in a checkpoint file, whoever wrote it, without ever running code that the file brings along."""

import argparse
import difflib
import json
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.weights.parts import is_parts, read_parts
from ssmpretrain.encoders.weights.preprocessing import checked_images
from ssmpretrain.encoders.weights.provenance import DESCRIPTION, check_sha256, origin_in
from ssmpretrain.encoders.weights.sidecar import contradiction

# What wrappers put in front of the encoder's own names: DataParallel, our objectives, dense-task code, modules that
# call it their model, transformers, open_clip.
_WRAPPERS = ("module.", "encoder.", "backbone.", "model.", "timm_model.", "visual.trunk.")
# Entries with weights, and those of them with an average: DeiT's, timm's.
_AVERAGES = ("model_ema", "state_dict_ema")
_ENTRIES = ("model", "state_dict", *_AVERAGES)
_WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".tar", ".bin")
# Where the weights lie in the folder of a run, and in those that timm and open_clip read.
_IN_FOLDERS = (
    "checkpoints/last.ckpt", "model.safetensors",
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
_MAX_LISTED = 5
_MOST_BLOCKS = 1000  # that a file may count though it lost some


@dataclass(frozen=True)
class CheckpointFile:
    """The encoder's weights as a file holds them.

    Attributes:
        path: Where it was read.
        state: The tensors by the encoder's own names, wrappers' prefixes removed.
        source: Which entry of the file they come from, such as "model" or "model_ema".
        name: The encoder's registered name, when the file says so.
        args: The arguments it was built with, when the file says so.
        images: How images are prepared for it, when the file says so; see `images_of`.
        origin: Where the weights come from; see `describe_weights`.
        verified: Whether the file said the sha256 of its tensors, which then is theirs.
    """

    path: Path
    state: dict[str, Tensor]
    source: str
    name: str | None
    args: dict[str, Any]
    images: dict[str, Any] = field(default_factory=dict)
    origin: dict[str, Any] = field(default_factory=dict)
    verified: bool = False


def read_checkpoint(path: str | Path, ema: bool | None = None) -> CheckpointFile:
    """Read the encoder's weights from a file.

    Args:
        path: A `.pth` of the published code ({"model": ...}, {"model_ema": ...} or the bare state dict), a checkpoint
            of ours or of timm's trainer, or a safetensors file; or the folder of a run or of timm's that holds one.
        ema: True for the exponential moving average, False for the weights that were trained; None for what the file
            calls its model.

    Raises:
        ValueError: If there is no such file, it is damaged, holds something else than weights, or lacks the weights
            asked for.
    """
    path = _existing_file(weights_in(path))
    if path.suffix == ".safetensors":
        content, about = _read_safetensors(path)
    else:
        content = read_content(path)
        about = _description_in(content)
    if not isinstance(content, dict):
        raise UserError(
            f"checkpoint: a checkpoint is a dictionary of tensors; {path} holds a {type(content).__name__}."
        )
    state, source = choose_state(content, path, ema)
    verified = check_sha256(state, about.get("sha256"), path)
    name, args = _encoder_metadata(about.get("encoder"), path)
    images = checked_images(about.get("images"), path) if name is not None else {}
    origin = dict(about["origin"]) if isinstance(about.get("origin"), dict) else {}
    if "sha256" not in about:
        origin = origin_in(content, source, path)
    own = _own_names(state)
    _check_numbers(own, path)
    return CheckpointFile(path, own, source, name, args, images, origin, verified)


def read_content(path: str | Path) -> Any:
    """Everything in a file of weights, tensors and plain data; no code is run; errors as `read_checkpoint`."""
    path = _existing_file(path)
    if is_parts(path):
        return read_parts(path, _read_pickle)
    return _read_safetensors(path)[0] if path.suffix == ".safetensors" else _read_pickle(path)


def weights_in(path: str | Path) -> Path:
    """The weights in the folder of a run, or in one that timm or open_clip reads; any other path as it stands."""
    path = Path(path).expanduser()
    found = (path / inside for inside in _IN_FOLDERS)
    return next((inside for inside in found if inside.is_file() or is_parts(inside)), path)


def _existing_file(path: str | Path) -> Path:
    path = Path(path).expanduser()
    if is_parts(path):
        return path
    if path.is_dir():
        entries = sorted([*path.iterdir(), *path.glob("checkpoints/*")])
        found = [str(entry.relative_to(path)) for entry in entries if entry.suffix in _WEIGHT_SUFFIXES]
        holds = f"It holds {', '.join(found[:_MAX_LISTED])}." if found else "It holds no checkpoint."
        raise UserError(f"checkpoint: path names a file; got the folder {path}. {holds}")
    if path.is_file():
        return path
    if path.exists():
        raise UserError(f"checkpoint: path names a regular file; {path} is a device, a pipe or a socket. Give a file.")
    if path.is_symlink():
        raise UserError(f"checkpoint: {path} is a link to {path.readlink()}, where nothing is. Give a file.")
    hint = f"There is no folder {path.parent} either." if not path.parent.is_dir() else ""
    if not hint:
        beside = [entry.name for entry in path.parent.iterdir() if entry.suffix in _WEIGHT_SUFFIXES]
        near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.4) or sorted(beside)[:3]
        hint = f"Beside it: {', '.join(near)}." if near else f"No checkpoint is in the folder {path.parent.resolve()}."
    raise UserError(f"checkpoint: no such file: {path}. {hint}")


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors, and what the header says about them."""
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        about = json.loads(metadata.get(DESCRIPTION, "{}"))
        if "encoder" in metadata and not about:
            about = {"encoder": json.loads(metadata["encoder"])}  # as files were written before they said more
        if not isinstance(about, dict):
            raise ValueError(f"its description is no dictionary but {about!r:.80}")
        return safetensors.torch.load_file(path), about
    except (safetensors.SafetensorError, ValueError, RecursionError, OSError) as error:
        raise UserError(f"checkpoint: {path} is damaged or no safetensors file ({error}). Fetch it again.") from error


def _description_in(content: Any) -> dict[str, Any]:
    """What a pickled file says about itself: an export for the official code in one entry, a run in several."""
    if not isinstance(content, dict):
        return {}
    about = content.get(DESCRIPTION, content)
    return about if isinstance(about, dict) else {}


def _check_whole(path: Path) -> None:
    """Refuse a file that is not what its sidecar says."""
    try:
        what = contradiction(path)
    except OSError:
        return  # reading it says so
    if what is not None:
        raise UserError(f"checkpoint: {path} is damaged ({what}). Take an earlier one, or fetch it again.")


def _read_pickle(path: Path) -> Any:
    _check_whole(path)
    # Published files carry their command line (a Namespace, perhaps with paths) and numpy numbers: data, nothing that
    # runs.
    scalar = np._core.multiarray.scalar  # type: ignore[attr-defined]
    plain_data = [argparse.Namespace, np.dtype, scalar, (scalar, "numpy.core.multiarray.scalar")]
    plain_data += [(PurePosixPath, "pathlib.PosixPath"), PurePosixPath]
    plain_data += [type(np.dtype(kind)) for kind in (np.float64, np.float32, np.int64, np.int32, np.bool_)]
    try:
        with torch.serialization.safe_globals(plain_data):
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        foreign = re.search(r"GLOBAL (\S+) (?:was not allowed|was not an allowed|whose module)", str(error))
        if foreign is None:
            raise _damaged(path) from error
        raise UserError(
            f"checkpoint: {path} pickles {foreign[1]}; unpickling that could run any code, so the file is refused. "
            "Where you trust its source, save its tensors alone."
        ) from error
    except PermissionError as error:
        raise UserError(f"checkpoint: {path} may not be read by this user. Change its permissions.") from error
    except Exception as error:  # damage surfaces as RuntimeError, EOFError, OSError, KeyError, ... by where it strikes
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


def choose_state(content: dict[str, Any], path: Path, ema: bool | None) -> tuple[dict[str, Any], str]:
    """The state dict asked for, and the name of its entry.

    Args:
        content: What the file holds.
        path: The file, for messages.
        ema: As in `read_checkpoint`.

    Raises:
        ValueError: If it lacks the weights asked for.

    Lightning's averaging callback saves the average as "state_dict" and the weights in training as
    "current_model_state".
    """
    averaged_run = _is_state(content.get("current_model_state"))
    trained = ["current_model_state"] if averaged_run else ["model", "state_dict"]
    averaged = [*_AVERAGES, "state_dict"] if averaged_run else [*_AVERAGES]
    wanted = {True: averaged, False: trained, None: _ENTRIES}[ema]
    for entry in wanted:
        if _is_state(content.get(entry)):
            return content[entry], entry
    if _is_state(content) and not ema:
        return content, "the file itself"
    present = [entry for entry in (*_ENTRIES, "current_model_state") if _is_state(content.get(entry))]
    if present:
        kind = "averaged" if ema else "unaveraged"
        raise UserError(f"checkpoint: {path} has no {kind} weights, only {', '.join(present)}. Leave `ema` out.")
    if ema and _is_state(content):
        raise UserError(f"checkpoint: {path} has one set of weights and no average. Leave `ema` out.")
    keys = ", ".join(str(key) for key in list(content)[:_MAX_LISTED]) or "nothing"
    raise UserError(f"checkpoint: {path} holds no weights under {', '.join(_ENTRIES)}; it holds {keys}.")


def _is_state(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(tensor, Tensor) for tensor in value.values())


def _encoder_metadata(metadata: Any, path: Path) -> tuple[str | None, dict[str, Any]]:
    """Name and arguments of the encoder, where a file says them; another file's entry of that name is none of ours."""
    if not (isinstance(metadata, dict) and isinstance(metadata.get("name"), str)):
        return None, {}
    args = metadata.get("args")
    if args is not None and not (isinstance(args, dict) and all(isinstance(key, str) for key in args)):
        raise UserError(
            f"checkpoint: {path} says the arguments of its encoder {metadata['name']} by name; got {args!r:.80}. "
            "Write the file anew, or fetch it again."
        )
    return metadata["name"], dict(args or {})


def _check_numbers(state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse a file whose names count blocks that it does not hold: an encoder of so many would be built."""
    most = max(len(state), _MOST_BLOCKS)
    for name in state:
        if any(part.isdecimal() and (len(part) > 9 or int(part) >= most) for part in name.split(".")):
            raise UserError(
                f"checkpoint: blocks are numbered from 0 on; {path} names {name[:100]!r} among {len(state):,} tensors. "
                "The file is damaged, or meant to do harm. Fetch it again from a source that you trust."
            )


def _own_names(state: dict[str, Any]) -> dict[str, Tensor]:
    """Strip the wrappers' prefixes; where some tensors belong to an encoder, leave the others (decoder, probe) out."""
    tensors = {str(key).replace("_orig_mod.", ""): value for key, value in state.items() if isinstance(value, Tensor)}
    while True:
        prefix = next((p for p in _WRAPPERS if any(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            return tensors
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
