"""The encoder's state dict among the entries of a checkpoint: names, checksum, origin."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError

# Prefixes of the encoder's own names in wrappers: DataParallel, our objectives, dense-task code, modules that call it
# their model, transformers, open_clip.
_WRAPPERS = ("module.", "encoder.", "backbone.", "model.", "timm_model.", "visual.trunk.")
# Entries with weights, and those of them with an average: DeiT's, timm's.
_AVERAGES = ("model_ema", "state_dict_ema")
_ENTRIES = ("model", "state_dict", *_AVERAGES)
# Kinds of weights by entry; "state_dict" is either, see `weights_kind`.
_KINDS = {"model": "raw", "current_model_state": "raw", "model_ema": "ema", "state_dict_ema": "ema"}
_MAX_LISTED = 5
_MOST_BLOCKS = 1000  # that a file may count though it lost some


@dataclass(frozen=True)
class CheckpointFile:
    """Weights of an encoder as a file holds them.

    Attributes:
        path: The file, or the folder of its parts.
        state: The tensors by the encoder's own names, wrappers' prefixes removed.
        source: The entry of the file that they come from, such as "model" or "model_ema".
        name: The encoder's registered name, when the file says so.
        args: The arguments it was built with, when the file says so.
        images: How images are prepared for it, when the file says so and unchecked; see `checked_images`.
        origin: The training that the weights come from; see `describe_weights`.
        verified: Whether the file gave the sha256 of its tensors, which then is theirs.
    """

    path: Path
    state: dict[str, Tensor]
    source: str
    name: str | None
    args: dict[str, Any]
    images: Any = None
    origin: dict[str, Any] = field(default_factory=dict)
    verified: bool = False


def choose_state(content: dict[str, Any], path: Path, ema: bool | None) -> tuple[dict[str, Any], str]:
    """Return the state dict asked for, and the name of its entry.

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


def own_names(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Return the encoder's tensors without the wrappers' prefixes, and without other parts (decoder, probe) beside it.

    Raises:
        ValueError: If names count blocks that the file does not hold: an encoder of so many would be built.
    """
    tensors = {str(key).replace("_orig_mod.", ""): value for key, value in state.items() if isinstance(value, Tensor)}
    while True:
        prefix = next((p for p in _WRAPPERS if any(key.startswith(p) for key in tensors)), None)
        if prefix is None:
            break
        tensors = {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    most = max(len(tensors), _MOST_BLOCKS)
    for name in tensors:
        if any(part.isdecimal() and (len(part) > 9 or int(part) >= most) for part in name.split(".")):
            raise UserError(
                f"checkpoint: blocks are numbered from 0 on; {path} names {name[:100]!r} among {len(tensors):,} "
                "tensors. The file is damaged, or meant to do harm. Fetch it again from a source that you trust."
            )
    return tensors


def encoder_metadata(metadata: Any, path: Path) -> tuple[str | None, dict[str, Any]]:
    """Return name and arguments of the encoder if a file says them; another file's entry of that name is not ours."""
    if not (isinstance(metadata, dict) and isinstance(metadata.get("name"), str)):
        return None, {}
    args = metadata.get("args")
    if args is not None and not (isinstance(args, dict) and all(isinstance(key, str) for key in args)):
        raise UserError(
            f"checkpoint: {path} says the arguments of its encoder {metadata['name']} by name; got {args!r:.80}. "
            "Write the file anew, or fetch it again."
        )
    return metadata["name"], dict(args or {})


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """Compute the sha256 of tensors, in hexadecimal.

    It is taken over, for one tensor after the other in the order of their names (by code point): the name, a zero byte,
    the dtype as PyTorch spells it ("float32"), a zero byte, the shape as decimals with commas between ("192,3,16,16";
    nothing for a scalar), a zero byte, and the values in row-major order, little-endian.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        shape = ",".join(map(str, tensor.shape))
        digest.update(f"{name}\0{str(tensor.dtype).removeprefix('torch.')}\0{shape}\0".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def check_sha256(state: Mapping[str, Any], said: Any, path: Path) -> bool:
    """Return whether a file says the sha256 of its tensors.

    Raises:
        ValueError: If it does, and they have another.
    """
    if not isinstance(said, str):
        return False
    found = tensors_sha256({name: tensor for name, tensor in state.items() if isinstance(tensor, Tensor)})
    if found != said:
        raise UserError(
            f"checkpoint: the tensors in {path} are not those that were written: their sha256 is {found[:12]}..., the "
            f"file says {said[:12]}.... Export it again, or fetch it again from its source."
        )
    return True


def origin_in(content: Mapping[str, Any], entry: str, path: Path) -> dict[str, Any]:
    """Gather the origin of weights from the entries of a run's checkpoint, or somebody else's.

    Args:
        content: What the file holds.
        entry: The entry of it that was taken.
        path: The file.
    """
    origin: dict[str, Any] = {"file": path.name, "entry": entry}
    if (kind := weights_kind(content, entry)) is not None:
        origin["weights"] = kind
    ours = {"objective": "objective", "epoch": "epoch", "global_step": "step", "data": "data", "classes": "classes"}
    kinds = {"objective": str, "epoch": int, "global_step": int, "data": dict, "classes": list}
    for key, meaning in ours.items():
        if isinstance(content.get(key), kinds[key]):
            origin[meaning] = _plain(content[key])
    return origin


def weights_kind(content: Mapping[str, Any], entry: str) -> str | None:
    """Return "ema" or "raw"; None where a file does not tell."""
    if entry == "state_dict":
        return "ema" if "current_model_state" in content else "raw"
    return _KINDS.get(entry)


def _plain(value: Any) -> Any:
    """Keep numbers, words, lists and dictionaries; turn anything else into the text that it prints as."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
