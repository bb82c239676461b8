"""The encoder's state dict among the entries of a checkpoint: the entry, and the encoder's own names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

# Prefixes of the encoder's own names in wrappers: DataParallel, our objectives, dense-task code, modules that call it
# their model, transformers, open_clip.
_WRAPPERS = ("module.", "encoder.", "backbone.", "model.", "timm_model.", "visual.trunk.")
# Entries with weights, and those of them with an average: DeiT's, timm's.
_AVERAGES = ("model_ema", "state_dict_ema")
_ENTRIES = ("model", "state_dict", *_AVERAGES)
_MAX_LISTED = 5
_MOST_BLOCKS = 1000  # that a file may count though it lost some


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
        raise ValueError(f"checkpoint: {path} has no {kind} weights, only {', '.join(present)}. Leave `ema` out.")
    if ema and _is_state(content):
        raise ValueError(f"checkpoint: {path} has one set of weights and no average. Leave `ema` out.")
    keys = ", ".join(str(key) for key in list(content)[:_MAX_LISTED]) or "nothing"
    raise ValueError(f"checkpoint: {path} holds no weights under {', '.join(_ENTRIES)}; it holds {keys}.")


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
            raise ValueError(
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
        raise ValueError(
            f"checkpoint: {path} says the arguments of its encoder {metadata['name']} by name; got {args!r:.80}. "
            "Write the file anew, or fetch it again."
        )
    return metadata["name"], dict(args or {})
