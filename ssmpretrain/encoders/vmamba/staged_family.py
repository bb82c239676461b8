"""Base class of the families whose encoders are subclasses of `StagedEncoder`.

C channels
"""

import re
from collections.abc import Mapping
from typing import Any, ClassVar, cast

from timm.layers.format import Format
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family import Adapted, Family
from ssmpretrain.encoders.vmamba.encoder import StagedEncoder

MIXER = re.compile(r"^layers\.(\d+)\.blocks\.(\d+)\.(?:op|self_attention)\.")
_DENSE_NORM = re.compile(r"^outnorm(\d+)\.(weight|bias)$")


class StagedFamily(Family):
    """Base of the families whose encoders are subclasses of `StagedEncoder`.

    A subclass recognises its mixer; the stages are the same.
    """

    depth: ClassVar[str] = "depths"
    hides_patches: ClassVar[bool] = True
    has_stem: ClassVar[bool] = True
    out_indices: ClassVar[int | tuple[int, ...]] = (0, 1, 2, 3)
    tap_norm: ClassVar[str] = "fresh"

    def stride(self, args: Mapping[str, Any]) -> int:
        return int(2 ** (1 + len(args["depths"])))

    def check_options(self, name: str, options: Mapping[str, Any]) -> None:
        if options.get("img_size") is not None:
            raise UserError(f"{name}: images of any size are taken; got img_size={options['img_size']}. Leave it out.")

    # Reading a checkpoint

    def recognise_stages(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        """Return the arguments of the stages that follow from names and shapes; None if too few tensors are left.

        Args:
            state: Tensors by the names of `current_names`; some may be missing.

        Returns:
            embed_dim, depths, mlp_ratio, stem, downsample and in_chans.
        """
        blocks = [(int(match[1]), int(match[2])) for key in state if (match := MIXER.match(key))]
        num_stages = 1 + max((stage for stage, _ in blocks), default=-1)
        dims = widths_of(state)
        stem = state.get("patch_embed.0.weight")
        if not dims or len(dims) < num_stages or stem is None or stem.ndim != 4:
            return None
        hidden = first(state, r"layers\.(\d+)\.blocks\.\d+\.mlp\.fc1\.weight")
        return {
            "embed_dim": dims[0] if dims == [dims[0] * 2**stage for stage in range(num_stages)] else tuple(dims),
            "depths": tuple(1 + max(block for at, block in blocks if at == stage) for stage in range(num_stages)),
            "mlp_ratio": 0 if hidden is None else ratio(hidden[1].shape[0], dims[hidden[0]]),
            "stem": "conv" if any(key.startswith("patch_embed.5.") for key in state) else "patch",
            "downsample": _downsample(state),
            "in_chans": stem.shape[1],
        }

    def describe(self, args: Mapping[str, Any]) -> str:
        name = self.variant_name(args) or f"a {self.title} of no registered size"
        depths = ", ".join(map(str, args["depths"]))
        return f"{name} ({args['embed_dim']} channels, blocks {depths}, ssm_ratio {args['ssm_ratio']})"

    def adapt(
        self, state: Mapping[str, Tensor], encoder: StagedEncoder, built_with: Mapping[str, Any] | None
    ) -> Adapted:
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

    def compilable_blocks(self, encoder: StagedEncoder) -> list[nn.Module]:
        return [block for stage in encoder.layers for block in cast(Any, stage).blocks]

    # Masked images

    def patch_side(self, encoder: StagedEncoder) -> int:
        return encoder.patch_stride

    def forward_visible(self, encoder: StagedEncoder, images: Tensor, keep: Tensor) -> Tensor:
        """Return the features of the visible patches after the final norm, as a map of one row, (B, 1, K, C)."""
        return encoder.forward_visible(images, keep).unsqueeze(1)

    def class_and_patches(self, encoder: StagedEncoder, features: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, features.squeeze(1)

    def stem(self, encoder: StagedEncoder) -> tuple[nn.Module, Format] | None:
        return encoder.patch_embed, Format.NHWC

    # Maps for dense tasks

    def view_sides(self, encoder: StagedEncoder) -> tuple[int, int]:
        return encoder.patch_stride, encoder.patch_stride

    def tap_size(self, encoder: StagedEncoder, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size unchanged if the stem and the layers between the stages round sides up.

        Convolutions without overlap would drop the last rows and columns instead.
        """
        return -(-size[0] // encoder.min_size) * encoder.min_size, -(-size[1] // encoder.min_size) * encoder.min_size


def widths_of(state: Mapping[str, Tensor]) -> list[int]:
    """Return C of each stage, from the mixers' output projections; stages without one are left out."""
    found: dict[int, int] = {}
    for key, tensor in state.items():
        if match := re.fullmatch(r"layers\.(\d+)\.blocks\.\d+\.op\.out_proj\.weight", key):
            found.setdefault(int(match[1]), tensor.shape[0])
    return [found[stage] for stage in sorted(found)]


def _downsample(state: Mapping[str, Tensor]) -> str:
    if any(".downsample.reduction." in key for key in state):
        return "merge"
    conv = first(state, r"layers\.(\d+)\.downsample\.1\.weight")
    return "conv2" if conv is not None and conv[1].shape[-1] == 2 else "conv3"


def first(state: Mapping[str, Tensor], pattern: str) -> tuple[int, Tensor] | None:
    """Return the first tensor whose whole name matches a pattern, with its stage; None if no name matches.

    The stage is the number that the pattern captures, or 0 if it captures nothing.
    """
    for key, tensor in state.items():
        if match := re.fullmatch(pattern, key):
            return int(match[1]) if match.re.groups else 0, tensor
    return None


def ratio(wide: int, narrow: int) -> float:
    """Return wide / narrow, as an int if it is whole."""
    return wide // narrow if wide % narrow == 0 else wide / narrow
