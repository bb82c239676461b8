"""Tell which VMamba a state dict belongs to, from the names and shapes of its tensors.

C channels, R rank of the step size
"""

import math
import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ssmpretrain.encoders.vmamba.vmamba import VARIANTS

# The names in the oldest published files, and what they became.
_OLDEST_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^(layers\.\d+\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
    (r"^(layers\.\d+\.blocks\.\d+)\.self_attention\.", r"\1.op."),
    (r"^(norm|head)\.", r"classifier.\1."),
)
_MIXER = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(?:op|self_attention)\.")
_PROJECTION = re.compile(r"\.(?:in_proj|out_proj|fc1|fc2)\.weight$")


def looks_like_vmamba(state: Mapping[str, Tensor]) -> bool:
    """Whether some tensor has a name that only VMamba's mixers give."""
    return any(_MIXER.match(key) for key in state)


def current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict under the names of the newest published files, 1 x 1 convolutions as the projections they are."""
    renamed = {}
    for key, tensor in state.items():
        for pattern, name in _OLDEST_NAMES:
            key = re.sub(pattern, name, key)
        pointwise = tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and _PROJECTION.search(key)
        renamed[key] = tensor.flatten(1) if pointwise else tensor
    return renamed


def recognise_vmamba(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """The arguments of `VMamba` that a state dict's names and shapes imply, or None if too little is there to tell.

    The order of the scan leaves no trace.

    Args:
        state: Tensors by the names of `current_names`; some may be missing.

    Returns:
        Every argument that shapes the encoder's tensors, but for `num_classes` and `scan`.
    """
    blocks = [(int(match[1]), int(match[2])) for key in state if (match := _MIXER.match(key))]
    num_stages = 1 + max((stage for stage, _ in blocks), default=-1)
    widths = [_first(state, rf"layers\.{stage}\.blocks\.\d+\.op\.out_proj\.weight") for stage in range(num_stages)]
    dims = [found[1].shape[0] for found in widths if found is not None]
    leaves = ("x_proj_weight", "dt_projs_weight", "A_logs", "in_proj.weight", "conv2d.weight")
    in_mixer = [_first(state, rf"layers\.(\d+)\.blocks\.\d+\.op\.{re.escape(leaf)}") for leaf in leaves]
    stem = state.get("patch_embed.0.weight")
    if not dims or len(dims) < num_stages or stem is None or stem.ndim != 4 or None in in_mixer:
        return None
    (x_at, x_proj), (dt_at, dt_proj), (_, decays), (in_at, in_proj), (_, conv) = (found for found in in_mixer if found)
    if x_proj.ndim != 3 or dt_proj.ndim != 3 or decays.ndim != 2 or conv.ndim != 4:
        return None
    ssm_ratio, rank = _ratio(x_proj.shape[2], dims[x_at]), dt_proj.shape[2]
    hidden = _first(state, r"layers\.(\d+)\.blocks\.\d+\.mlp\.fc1\.weight")
    return {
        "embed_dim": dims[0] if dims == [dims[0] * 2**stage for stage in range(num_stages)] else tuple(dims),
        "depths": tuple(1 + max(block for at, block in blocks if at == stage) for stage in range(num_stages)),
        "ssm_ratio": ssm_ratio,
        "d_state": decays.shape[1],
        "dt_rank": "auto" if rank == math.ceil(dims[dt_at] / 16) else rank,
        "d_conv": conv.shape[-1],
        "conv_bias": any(key.endswith(".op.conv2d.bias") for key in state),
        "gate": in_proj.shape[0] == 2 * int(ssm_ratio * dims[in_at]),
        "mlp_ratio": 0 if hidden is None else _ratio(hidden[1].shape[0], dims[hidden[0]]),
        "stem": "conv" if any(key.startswith("patch_embed.5.") for key in state) else "patch",
        "downsample": _downsample(state),
        "in_chans": stem.shape[1],
    }


def vmamba_variant_name(args: Mapping[str, Any]) -> str | None:
    """The registered name of the encoder with these arguments, or None."""
    for name, variant in VARIANTS.items():
        if all(args[key] == value for key, value in variant.items()):
            return name
    return None


def describe_vmamba(args: Mapping[str, Any]) -> str:
    """The registered name, if any, and the sizes, for messages."""
    name = vmamba_variant_name(args) or "a VMamba of no registered size"
    depths = ", ".join(map(str, args["depths"]))
    return f"{name} ({args['embed_dim']} channels, blocks {depths}, ssm_ratio {args['ssm_ratio']})"


def _downsample(state: Mapping[str, Tensor]) -> str:
    if any(".downsample.reduction." in key for key in state):
        return "merge"
    conv = _first(state, r"layers\.(\d+)\.downsample\.1\.weight")
    return "conv2" if conv is not None and conv[1].shape[-1] == 2 else "conv3"


def _first(state: Mapping[str, Tensor], pattern: str) -> tuple[int, Tensor] | None:
    """The first tensor whose whole name matches, after the stage that the pattern captures, if it does."""
    for key, tensor in state.items():
        if match := re.fullmatch(pattern, key):
            return int(match[1]) if match.re.groups else 0, tensor
    return None


def _ratio(wide: int, narrow: int) -> float:
    return wide // narrow if wide % narrow == 0 else wide / narrow
