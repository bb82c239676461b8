"""Fill an encoder with the tensors of a file. If they do not fit, no tensor of the encoder changes."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

from timm.models import adapt_input_conv
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family import FINER_GRID, Adapted
from ssmpretrain.encoders.family_registry import Match
from ssmpretrain.encoders.weights.build import BuiltEncoder
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.state_dict import CheckpointFile

_MAX_LISTED = 5


@dataclass(frozen=True)
class Filled:
    """Result of filling an encoder.

    Attributes:
        adapted: Tensors of the file, adapted to the shapes of the encoder.
        loaded: Number of the encoder's tensors that were filled.
        fresh: Names of the encoder's tensors that keep their initial values.
        unexpected: Names of tensors in the file that the encoder does not have.
    """

    adapted: Adapted
    loaded: int
    fresh: tuple[str, ...]
    unexpected: tuple[str, ...]


def fill(
    match: Match, built: BuiltEncoder, file: CheckpointFile, keep_dtypes: bool, asked: Mapping[str, Any]
) -> Filled:
    """Copy the tensors of a file into an encoder.

    Args:
        match: The tensors, and the family of the encoder.
        built: The encoder.
        file: The content of the file.
        keep_dtypes: As in `load_encoder`.
        asked: Arguments of the encoder that the caller passed.

    Raises:
        ValueError: If a tensor of the encoder is missing in the file (except `built.fresh` and the tensors that the
            family says such files lack), if a tensor has another shape, if the file has further tensors of the
            encoder's parts, or if a value is NaN or infinite.
    """
    model: Any = built.model
    own = model.state_dict()
    adapted = _with_channels(match.family.adapt(match.state, model, match.built_with), model, asked)
    usable = {key: tensor for key, tensor in adapted.state.items() if key in own and key not in built.fresh}

    may_lack = built.fresh | adapted.lacking
    missing = [key for key in own if key not in usable and key not in may_lack]
    misfits = [key for key, tensor in usable.items() if _kind(tensor) != _kind(own[key])]
    parts = {key.split(".")[0] for key in own}
    unexpected = [key for key in adapted.state if key not in usable]
    left_over = [key for key in unexpected if key.split(".")[0] in parts and key not in built.fresh]
    kinds = [f"{key} is {_kind(usable[key])} in the file and {_kind(own[key])} in the encoder" for key in misfits]
    problems = {"missing": missing, "of another kind": kinds, "left over": left_over}
    if any(problems.values()):
        counts = "; ".join(f"{len(keys)} {what}: {listed(keys)}" for what, keys in problems.items() if keys)
        raise UserError(
            f"load_encoder: {file.path} does not fill {match.name}; of {len(own)} tensors {counts}. "
            + _remedy(file, match.state, misfits, asked)
        )
    check_finite("load_encoder", usable, file.path)
    model.load_state_dict(usable, strict=False, assign=keep_dtypes)
    return Filled(adapted, len(usable), tuple(key for key in own if key not in usable), tuple(unexpected))


def _remedy(file: CheckpointFile, state: Mapping[str, Tensor], misfits: list[str], asked: Mapping[str, Any]) -> str:
    """Return a remedy, as text, for tensors that do not fill an encoder."""
    if "patch_embed.proj.weight" in misfits and (side := state["patch_embed.proj.weight"].shape[-1]):
        return f"Its patches have {side} x {side} pixels: pass patch_size={side} or leave it out, or {FINER_GRID}."
    other = [key for key, value in asked.items() if file.name is not None and value != file.args.get(key)]
    if other:
        built = ", ".join(f"{key}={file.args[key]!r}" if key in file.args else f"{key} unsaid" for key in other)
        return (
            f"The file says it was built with {built}: leave {', '.join(other)} out, or check that the file is whole."
        )
    return "Check that the file is whole and that `name` and the encoder's arguments are those it was trained with."


def _with_channels(fitted: Adapted, model: nn.Module, asked: Mapping[str, Any]) -> Adapted:
    """Adapt the first convolution to the `in_chans` that the caller passed, as timm does."""
    if "in_chans" not in asked:
        return fitted
    cfg, own = cast("dict[str, Any]", model.pretrained_cfg), model.state_dict()
    first = cfg.get("first_conv") or ()
    names = [f"{name}.weight" for name in ((first,) if isinstance(first, str) else first)]
    state, notes = dict(fitted.state), []
    for name in names:
        before, after = (weights[name].shape[1] if name in weights else None for weights in (state, own))
        if before is None or after is None or before == after or state[name].shape[2:] != own[name].shape[2:]:
            continue
        state[name] = adapt_input_conv(after, state[name], base_chans=before)
        notes.append(f"{name} adapted from {before} to {after} channels")
    return replace(fitted, state=state, notes=(*fitted.notes, *notes))


def _kind(tensor: Tensor) -> str:
    """Return the shape of a tensor as text, and its dtype if it is not a floating-point dtype."""
    shape = str(tuple(tensor.shape))
    return shape if tensor.is_floating_point() else f"{shape} of {str(tensor.dtype).removeprefix('torch.')}"


def listed(keys: Sequence[str]) -> str:
    """Return up to five names as text, and the number of the others; "none" if there are no names."""
    more = f" and {len(keys) - _MAX_LISTED} more" if len(keys) > _MAX_LISTED else ""
    return ", ".join(keys[:_MAX_LISTED]) + more if keys else "none"
