"""Family of VMamba: its checkpoints, masked images, and the export for MzeroMiko/VMamba.

C channels, R rank of the step size
"""

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from ssmpretrain.encoders.family_registry import register_family
from ssmpretrain.encoders.vmamba.model import VMamba
from ssmpretrain.encoders.vmamba.staged_family import MIXER, StagedFamily, first, ratio, widths_of
from ssmpretrain.encoders.vmamba.vmamba import VARIANTS

# Names in the oldest published files, and the names in the newest ones.
_OLDEST_NAMES = (
    (r"^patch_embed\.proj\.", "patch_embed.0."),
    (r"^patch_embed\.norm\.", "patch_embed.2."),
    (r"^(layers\.\d+\.blocks\.\d+)\.ln_1\.", r"\1.norm."),
    (r"^(layers\.\d+\.blocks\.\d+)\.self_attention\.", r"\1.op."),
    (r"^(norm|head)\.", r"classifier.\1."),
)
_PROJECTION = re.compile(r"\.(?:in_proj|out_proj|fc1|fc2)\.weight$")
_OFFICIAL_SCANS = ("cross", "unidirectional", "bidirectional")  # its scan "cascade" differs from ours, see `VMamba`


class VMambaFamily(StagedFamily):
    """Family of VMamba in all published versions, including the first version with a gate."""

    title: ClassVar[str] = "VMamba"
    names_like: ClassVar[tuple[str, ...]] = ("vmamba_*",)
    classes: ClassVar[tuple[type[nn.Module], ...]] = (VMamba,)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS
    strangers: ClassVar[Mapping[str, str]] = {r"\.op\.dt_bias$": "the scan of Mamba-2; load it as a vmamba2_*"}
    official_code: ClassVar[str] = "MzeroMiko/VMamba"
    official_flag: ClassVar[str] = "--pretrained"

    # Reading a checkpoint

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        return any(MIXER.match(key) for key in state) and not any(key.endswith(".op.dt_bias") for key in state)

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
        stages, dims = self.recognise_stages(state), widths_of(state)
        leaves = ("x_proj_weight", "dt_projs_weight", "A_logs", "in_proj.weight", "conv2d.weight")
        in_mixer = [first(state, rf"layers\.(\d+)\.blocks\.\d+\.op\.{re.escape(leaf)}") for leaf in leaves]
        if stages is None or None in in_mixer:
            return None
        (x_at, x_proj), (dt_at, dt_proj), (_, decays), (in_at, in_proj), (_, conv) = (
            found for found in in_mixer if found
        )
        if x_proj.ndim != 3 or dt_proj.ndim != 3 or decays.ndim != 2 or conv.ndim != 4:
            return None
        ssm_ratio, rank = ratio(x_proj.shape[2], dims[x_at]), dt_proj.shape[2]
        return {
            **stages,
            "ssm_ratio": ssm_ratio,
            "d_state": decays.shape[1],
            "dt_rank": "auto" if rank == math.ceil(dims[dt_at] / 16) else rank,
            "d_conv": conv.shape[-1],
            "conv_bias": any(key.endswith(".op.conv2d.bias") for key in state),
            "gate": in_proj.shape[0] == 2 * int(ssm_ratio * dims[in_at]),
        }

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


FAMILY = register_family(VMambaFamily())
