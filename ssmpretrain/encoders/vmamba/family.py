"""Family of VMamba: its checkpoints, masked images, and the export for MzeroMiko/VMamba.

C channels, R rank of the step size
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from timm.layers.format import Format
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family import Adapted, Family
from ssmpretrain.encoders.family_registry import register_family
from ssmpretrain.encoders.vmamba.model import VMamba
from ssmpretrain.encoders.vmamba.vmamba import VARIANTS

# Names in the oldest published files, and the names in the newest ones.
_OLDEST_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^(layers\.\d+\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
    (r"^(layers\.\d+\.blocks\.\d+)\.self_attention\.", r"\1.op."),
    (r"^(norm|head)\.", r"classifier.\1."),
)
_MIXER = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(?:op|self_attention)\.")
_PROJECTION = re.compile(r"\.(?:in_proj|out_proj|fc1|fc2)\.weight$")
_DENSE_NORM = re.compile(r"^outnorm(\d+)\.(weight|bias)$")
_OFFICIAL_SCANS = ("cross", "unidirectional", "bidirectional")  # its scan "cascade" differs from ours, see `VMamba`


class VMambaFamily(Family):
    """Family of VMamba in all published versions, including the first version with a gate."""

    title: ClassVar[str] = "VMamba"
    names_like: ClassVar[tuple[str, ...]] = ("vmamba_*",)
    classes: ClassVar[tuple[type[nn.Module], ...]] = (VMamba,)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS
    depth: ClassVar[str] = "depths"
    hides_patches: ClassVar[bool] = True
    has_stem: ClassVar[bool] = True
    official_code: ClassVar[str] = "MzeroMiko/VMamba"
    official_flag: ClassVar[str] = "--pretrained"
    out_indices: ClassVar[int | tuple[int, ...]] = (0, 1, 2, 3)
    tap_norm: ClassVar[str] = "fresh"

    def stride(self, args: Mapping[str, Any]) -> int:
        return int(2 ** (1 + len(args["depths"])))

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        if options.get("img_size") is not None:
            raise UserError(f"{name}: images of any size are taken; got img_size={options['img_size']}. Leave it out.")

    # Reading a checkpoint

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        return any(_MIXER.match(key) for key in state)

    def current_names(self, state: Mapping[str, Tensor], path: Path, asked: Mapping[str, Any]) -> dict[str, Tensor]:
        """Return the tensors under the names of the newest published files.

        Weights of 1 x 1 convolutions, (out, in, 1, 1), become matrices, (out, in).
        """
        renamed = {}
        for key, tensor in state.items():
            for pattern, name in _OLDEST_NAMES:
                key = re.sub(pattern, name, key)
            pointwise = tensor.ndim == 4 and tensor.shape[2:] == (1, 1) and _PROJECTION.search(key)
            renamed[key] = tensor.flatten(1) if pointwise else tensor
        return renamed

    def recognise(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments of `VMamba` that follow from names and shapes; None if too few tensors are left.

        The order of the scan cannot be seen in the tensors.

        Args:
            state: Tensors by the names of `current_names`; some may be missing.

        Returns:
            All arguments that decide on names or shapes of tensors, except `num_classes` and `scan`.
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
        (x_at, x_proj), (dt_at, dt_proj), (_, decays), (in_at, in_proj), (_, conv) = (
            found for found in in_mixer if found
        )
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

    def describe(self, args: Mapping[str, Any]) -> str:
        name = self.variant_name(args) or "a VMamba of no registered size"
        depths = ", ".join(map(str, args["depths"]))
        return f"{name} ({args['embed_dim']} channels, blocks {depths}, ssm_ratio {args['ssm_ratio']})"

    def adapt(self, state: Mapping[str, Tensor], encoder: VMamba, built_with: Mapping[str, Any] | None) -> Adapted:
        """Separate the norms of a dense head from the encoder. A file that has them lacks the final norm.

        The published code for dense tasks normalises the map of each stage before the head: `outnorm0` to `outnorm3`.
        """
        norms: dict[int, dict[str, Tensor]] = {}
        kept = dict(state)
        for key in state:
            if match := _DENSE_NORM.match(key):
                norms.setdefault(int(match[1]), {})[match[2]] = kept.pop(key)
        for stage, norm in norms.items():
            width = dict(enumerate(encoder.embed_dim)).get(stage)
            found = {name: tuple(tensor.shape) for name, tensor in norm.items()}
            if found != {"weight": (width,), "bias": (width,)}:
                raise UserError(
                    f"load_encoder: outnorm{stage} has a weight and a bias for the channels of stage {stage}, "
                    f"{width or 'which does not exist'}; got {found}. The file is damaged. Download it again."
                )
        final = {"classifier.norm.weight", "classifier.norm.bias"}
        lacking = final if norms and not final & kept.keys() else ()
        return Adapted(kept, lacking=frozenset(lacking), tap_norms=norms)

    # Masked images

    def patch_side(self, encoder: VMamba) -> int:
        return encoder.patch_stride

    def forward_visible(self, encoder: VMamba, images: Tensor, keep: Tensor) -> Tensor:
        """Return the features of the visible patches after the final norm, as a map of one row, (B, 1, K, C)."""
        return encoder.forward_visible(images, keep).unsqueeze(1)

    def class_and_patches(self, encoder: VMamba, features: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, features.squeeze(1)

    def stem(self, encoder: VMamba) -> tuple[nn.Module, Format] | None:
        return encoder.patch_embed, Format.NHWC

    # Maps for dense tasks

    def view_sides(self, encoder: VMamba) -> tuple[int, int]:
        return encoder.patch_stride, encoder.patch_stride

    def tap_size(self, encoder: VMamba, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size unchanged if the stem and the layers between the stages round sides up.

        Convolutions without overlap would drop the last rows and columns instead.
        """
        return -(-size[0] // encoder.min_size) * encoder.min_size, -(-size[1] // encoder.min_size) * encoder.min_size

    # Export for MzeroMiko/VMamba

    def not_official(self, encoder: VMamba) -> str | None:
        mixer = encoder.mixer
        if mixer.scan not in _OFFICIAL_SCANS:
            return f"a VMamba with scan={mixer.scan!r}; its scans are {', '.join(_OFFICIAL_SCANS)}"
        if mixer.conv2d.kernel_size == (1, 1):
            return "a VMamba with d_conv=1, for which it makes no convolution"
        if encoder.num_classes and encoder.global_pool != "avg":
            return f"a VMamba whose head reads global_pool={encoder.global_pool!r}; it averages"
        return None


def _downsample(state: Mapping[str, Tensor]) -> str:
    if any(".downsample.reduction." in key for key in state):
        return "merge"
    conv = _first(state, r"layers\.(\d+)\.downsample\.1\.weight")
    return "conv2" if conv is not None and conv[1].shape[-1] == 2 else "conv3"


def _first(state: Mapping[str, Tensor], pattern: str) -> tuple[int, Tensor] | None:
    """Return the first tensor whose whole name matches a pattern, with its stage; None if no name matches.

    The stage is the number that the pattern captures, or 0 if it captures nothing.
    """
    for key, tensor in state.items():
        if match := re.fullmatch(pattern, key):
            return int(match[1]) if match.re.groups else 0, tensor
    return None


def _ratio(wide: int, narrow: int) -> float:
    return wide // narrow if wide % narrow == 0 else wide / narrow


FAMILY = register_family(VMambaFamily())
