"""What a file of weights says about itself: which encoder, trained how, from which file, the sha256 of its tensors."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import ssmpretrain
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.weights.preprocessing import images_of

# Where an export keeps its description, whatever its format calls such a place.
DESCRIPTION = "ssmpretrain"
# Entries of a checkpoint and what they hold; "state_dict" is either, see `weights_kind`.
_KINDS = {"model": "raw", "current_model_state": "raw", "model_ema": "ema", "state_dict_ema": "ema"}


def describe_weights(
    model: nn.Module, name: str, args: dict[str, Any], tensors: Mapping[str, Tensor]
) -> dict[str, Any]:
    """What an export says about itself, as JSON holds it.

    Args:
        model: The encoder; where `load_encoder` made it, its report knows the origin.
        name, args: What `create_encoder` builds it again with.
        tensors: What is written, by name.

    Returns:
        encoder: {"name", "args"}.
        images: How images are prepared, see `images_of`.
        origin: Where the weights come from, as far as is known. "file": the name of the checkpoint. "entry": which of
            its entries. "weights": "ema" or "raw". "objective", "epoch" (counted from 0) and "step" of the training
            and "data", a summary of what it saw; "classes", the names of those that its head tells, by label.
        sha256: See `tensors_sha256`.
        versions: Those of ssmpretrain and torch that wrote it.
    """
    report = getattr(model, "load_report", None)
    return {
        "encoder": {"name": name, "args": args},
        "images": images_of(model),
        "origin": {} if report is None else dict(report.origin),
        "sha256": tensors_sha256(tensors),
        "versions": {"ssmpretrain": ssmpretrain.__version__, "torch": str(torch.__version__)},
    }


def tensors_sha256(tensors: Mapping[str, Tensor]) -> str:
    """The sha256 of tensors, in hexadecimal.

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
    """Whether a file said the sha256 of its tensors.

    Raises:
        ValueError: If it did, and they have another.
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
    """The origin of weights in the content of a checkpoint that does not say it: a run's, or somebody else's.

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
    """ "ema" or "raw"; None where a file does not tell."""
    if entry == "state_dict":
        return "ema" if "current_model_state" in content else "raw"
    return _KINDS.get(entry)


def summary(origin: Mapping[str, Any]) -> str:
    """The objective, epoch, step and kind of weights of an origin, as far as it says; "" if it says none."""
    parts = [str(origin["objective"])] if "objective" in origin else []
    parts += [f"{key} {origin[key]}" for key in ("epoch", "step") if key in origin]
    if "weights" in origin:
        parts.append("averaged weights" if origin["weights"] == "ema" else "unaveraged weights")
    return ", ".join(parts)


def _plain(value: Any) -> Any:
    """Numbers, words, lists and dictionaries as they are; anything else as the words that it prints as."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value if value is None or isinstance(value, (str, int, float, bool)) else str(value)
