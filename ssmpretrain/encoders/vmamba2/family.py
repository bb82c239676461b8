"""Family of VMamba2: its checkpoints; masked images and dense maps are those of all encoders in stages.

C channels, E inner channels, M heads, N state, K routes
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar

from torch import Tensor, nn

from ssmpretrain.encoders.family_registry import register_family
from ssmpretrain.encoders.vmamba.staged_family import MIXER, StagedFamily, first, ratio, widths_of
from ssmpretrain.encoders.vmamba2.vmamba2 import VARIANTS, VMamba2


class VMamba2Family(StagedFamily):
    """Family of VMamba2."""

    title: ClassVar[str] = "VMamba2"
    names_like: ClassVar[tuple[str, ...]] = ("vmamba2_*",)
    classes: ClassVar[tuple[type[nn.Module], ...]] = (VMamba2,)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS
    strangers: ClassVar[Mapping[str, str]] = {
        r"\.op\.x_proj_weight$": (
            "B, C and step sizes projected for each route, as MzeroMiko/VMamba does in its form m2 too, which has no "
            "published weights; VMamba2 projects them once. Train a vmamba2_*, or load a VMamba as vmamba_*"
        )
    }

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        """Return whether the mixers are ours, or of the published code's form m2, which `strangers` refuses."""
        mixers = {key: tensor for key, tensor in state.items() if MIXER.match(key)}
        return any(key.endswith(".op.dt_bias") or (key.endswith(".op.Ds") and mixers[key].ndim == 3) for key in mixers)

    def recognise(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments of `VMamba2` that follow from names and shapes; None if too few tensors are left.

        The order of the scan cannot be seen in the tensors.

        Args:
            state: Tensors by their names; some may be missing.

        Returns:
            All arguments that decide on names or shapes of tensors, except `num_classes` and `scan`.
        """
        stages, dims = self.recognise_stages(state), widths_of(state)
        leaves = ("out_proj.weight", "A_logs", "in_proj.weight", "conv2d.weight")
        in_mixer = [first(state, rf"layers\.(\d+)\.blocks\.\d+\.op\.{re.escape(leaf)}") for leaf in leaves]
        if stages is None or None in in_mixer:
            return None
        (at, out_proj), (decays_at, decays), (in_at, in_proj), (conv_at, conv) = (found for found in in_mixer if found)
        if out_proj.ndim != 2 or decays.ndim != 2 or conv.ndim != 4:
            return None
        ssm_ratio = ratio(out_proj.shape[1], dims[at])
        inner = [int(ssm_ratio * dim) for dim in dims]  # E of each stage
        if not 0 < decays.shape[1] <= inner[decays_at]:
            return None
        head_dim, states = inner[decays_at] // decays.shape[1], conv.shape[0] - inner[conv_at]
        return {
            **stages,
            "ssm_ratio": ssm_ratio,
            "d_state": states // 2,
            "head_dim": head_dim,
            "d_conv": conv.shape[-1],
            "conv_bias": any(key.endswith(".op.conv2d.bias") for key in state),
            "gate": in_proj.shape[0] == 2 * inner[in_at] + states,
        }


FAMILY = register_family(VMamba2Family())
