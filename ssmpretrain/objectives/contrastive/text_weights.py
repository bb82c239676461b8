"""Weights of a text tower, read from a run of this package, or from a folder or a checkpoint of open_clip."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.on_disk import weights_in

_log = logging.getLogger(__name__)

# Name of the file with the settings in a folder of open_clip.
OPEN_CLIP_CONFIG = "open_clip_config.json"
# Prefixes of the text tower's tensors in open_clip's older files. Names of the image tower begin with "visual.".
_AT_THE_ROOT = ("positional_embedding", "text_projection", "token_embedding.", "ln_final.", "transformer.")
# Settings of open_clip's text towers that change the computation, each with the only value that this package supports.
_ONLY = {
    "hf_model_name": None, "hf_tokenizer_name": None, "tokenizer_kwargs": None, "mlp_ratio": 4.0,
    "ls_init_value": None, "embed_cls": False, "no_causal_mask": False, "pool_type": "argmax", "proj_bias": False,
    "proj_type": "linear", "act_kwargs": None, "norm_kwargs": None, "qk_norm": False, "scaled_cosine_attn": False,
    "scale_heads": False, "scale_attn_inner": False, "scale_attn": False, "scale_fc": False,
}  # fmt: skip
_MAX_LISTED = 5


def read_open_clip_config(path: Path) -> tuple[dict[str, Any], dict[str, Any], dict[str, Any]]:
    """Read the settings of the model, of its text tower, and of its images from a configuration file of open_clip.

    Raises:
        ValueError: If the file is no configuration of open_clip.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        model, images = content["model_cfg"], content.get("preprocess_cfg") or {}
        for part in (model, model["text_cfg"], model.get("vision_cfg", {}), images):
            if not isinstance(part, dict):
                raise TypeError(f"settings by name are expected, got {part!r:.60}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(
            f"open_clip: {path} is no configuration of open_clip ({type(error).__name__}: {error}). "
            "Write the folder anew: export --format open_clip."
        ) from error
    return model, model["text_cfg"], images


def fill_text_tower(tower: nn.Module, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Fill a text tower from a file, completely or not at all, and log the result.

    Args:
        tower: The tower to fill.
        path: A run of CLIP or its checkpoint, a folder of open_clip, or a checkpoint of open_clip (`.safetensors`,
            `.pt`, `.bin`) with the text tower under "text." or at the root. No code in the file is run.
        settings: Settings of the tower: kind, width, layers, embed_dim; for a Transformer also heads, context_length
            and quick_gelu.

    Raises:
        ValueError: If the file cannot be read, if it holds no text tower or one with other settings, if tensors are
            missing, or if a value is NaN or infinite.
    """
    file = weights_in(path)
    content = read_content(file)
    state = _text_state(content)
    if not state:
        raise UserError(
            f"TextTower: init_from holds a text tower, under text. or at its root; {file} has none. "
            "Give a run of CLIP, or a folder or a checkpoint of open_clip."
        )
    try:
        found = {**_settings_in_tensors(state), **_settings_beside(content, file)}
    except (IndexError, AttributeError, TypeError) as error:  # the file has shapes or settings of another kind
        raise UserError(
            f"TextTower: init_from holds CLIP's Transformer or ours; {file} has something else under its names "
            f"({error}). Check that the file is whole, or leave init_from out."
        ) from error
    if differing := [name for name, value in settings.items() if found.get(name, value) != value]:
        listed = " and ".join(f"{name} {found[name]} for {settings[name]}" for name in differing)
        raise UserError(
            f"TextTower: the tower is as large as the one that it begins with; {file} has {listed}. "
            f"Set {' and '.join(f'{_option(name)}={found[name]}' for name in differing)}, or leave init_from out."
        )
    _check_complete(tower.state_dict(), state, file)
    check_finite("TextTower", state, file)
    tower.load_state_dict(state)
    _log.info("text tower from %s: %d of %d tensors loaded", file, len(state), len(state))


def _text_state(content: Any) -> dict[str, Tensor]:
    """Return the tensors of the text tower by the tower's own names; an empty dictionary if there are none."""
    state = content.get("state_dict", content) if isinstance(content, dict) else {}
    tensors = {key.removeprefix("module."): value for key, value in state.items() if isinstance(value, Tensor)}
    below = {key.removeprefix("text."): value for key, value in tensors.items() if key.startswith("text.")}
    if below:
        return below
    return {key: value for key, value in tensors.items() if key.startswith(_AT_THE_ROOT)}


def _settings_in_tensors(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Read the settings that follow from the shapes of the tensors."""
    projection, embedding = state.get("text_projection.weight"), state.get("token_embedding.weight")
    found: dict[str, Any] = {} if embedding is None else {"width": embedding.shape[1]}
    if "blocks.norm_f.weight" in state:
        found |= {"kind": "mamba", "layers": _count(state, "blocks.layers.")}
        return found if projection is None else {**found, "embed_dim": projection.shape[0]}
    found |= {"kind": "transformer", "layers": _count(state, "transformer.resblocks.")}
    if "positional_embedding" in state:
        found["context_length"] = state["positional_embedding"].shape[0]
    return {**found, "embed_dim": state["text_projection"].shape[1]} if "text_projection" in state else found


def _count(state: Mapping[str, Tensor], prefix: str) -> int:
    """Count the different numbers that follow a prefix in the names of the tensors."""
    return len({key[len(prefix) :].split(".")[0] for key in state if key.startswith(prefix)})


def _settings_beside(content: Any, file: Path) -> dict[str, Any]:
    """Read heads and activation from a run, or from the configuration beside open_clip's weights.

    They do not follow from the shapes of the tensors.

    Raises:
        ValueError: If open_clip's configuration describes a computation that this package does not support.
    """
    text = content.get("hyper_parameters", {}).get("text") if isinstance(content, dict) else None
    if text is None and (config := file.parent / OPEN_CLIP_CONFIG).is_file():
        model, text, _ = read_open_clip_config(config)
        text = {**text, "quick_gelu": model.get("quick_gelu", False)}
        other = [f"{key} {text[key]}" for key, only in _ONLY.items() if text.get(key, only) != only]
        if other:
            raise UserError(
                f"TextTower: init_from computes what CLIP's Transformer computes; {config} has {', '.join(other)}. "
                "Choose other weights."
            )
    if not isinstance(text, dict):
        return {}
    return {"heads": text.get("heads", 8), "quick_gelu": bool(text.get("quick_gelu", False))}


def _option(name: str) -> str:
    return f"model.{name}" if name == "embed_dim" else f"model.text.{name}"


def _check_complete(own: Mapping[str, Tensor], state: Mapping[str, Tensor], file: Path) -> None:
    """Raise a ValueError that names the tensors that are missing, left over or of another shape."""
    shapes = {key: (tuple(own[key].shape), tuple(state[key].shape)) for key in own.keys() & state.keys()}
    problems = {
        "missing": sorted(own.keys() - state.keys()),
        "left over": sorted(state.keys() - own.keys()),
        "of another shape": sorted(key for key, (ours, theirs) in shapes.items() if ours != theirs),
    }
    if any(problems.values()):
        listed = "; ".join(
            f"{len(keys)} {what}: {', '.join(keys[:_MAX_LISTED])}" for what, keys in problems.items() if keys
        )
        raise UserError(
            f"TextTower: init_from fills the whole tower; of {len(own)} tensors in {file} are {listed}. "
            "Check that the file is whole, and that its text tower is CLIP's Transformer or ours."
        )
