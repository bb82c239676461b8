"""Base class of encoders whose blocks are in stages and scan a map along routes, with method names of timm.

Source: Liu et al., "VMamba: Visual State Space Model" (arXiv:2401.10166).

B batch, H x W positions of a map, C channels, K routes of a scan, or K visible patches of an image
"""

from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast, get_args

import torch
import torch.fx
from timm.layers.weight_init import trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.maps import take_indices
from ssmpretrain.encoders.layers.fx_tracing import NotScriptable
from ssmpretrain.encoders.layers.state_space import check_widths, stream
from ssmpretrain.encoders.masking.visible_map import VisibleMap
from ssmpretrain.encoders.vmamba.arguments import (
    GlobalPool,
    check_fractions,
    checked_large_pixels,
    checked_pool,
    dims_of,
)
from ssmpretrain.encoders.vmamba.blocks import (
    Downsample,
    NormLayer,
    Stem,
    VMambaBlock,
    VMambaStage,
    channels_last,
    make_downsample,
    make_stem,
)
from ssmpretrain.encoders.vmamba.visible import embed_visible, run_visible, visible_maps
from ssmpretrain.kernels.transforms import inside_transform


class Classifier(nn.Module):
    """Hold the final norm and the head under their published names; `forward_head` pools between the two."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.head: nn.Module = nn.Identity()


class StagedEncoder(NotScriptable, nn.Module):
    """Encode an image by blocks in stages, each of which mixes the positions of a map along several routes.

    The first stage has one position per 4 x 4 pixels. Each further stage halves the height and the width of the map.
    Images of any height and width are accepted. `VMamba` and `VMamba2` differ in their mixers alone.

    Args:
        mixer: Function that takes the channels of a stage and returns the mixer of one block. A mixer maps
            (B, H, W, C) to the same shape, and takes a `VisibleMap` as its second argument.
        in_chans, num_classes, global_pool, embed_dim, depths, mlp_ratio, stem, downsample, norm_layer, drop_rate,
            drop_path_rate: As in `VMamba`.

    Attributes:
        undecayed: Endings of the names of the parameters without weight decay.

    Raises:
        ValueError: If an argument is out of range or not one of the listed words.
    """

    output_fmt = "NHWC"
    undecayed: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        mixer: Callable[[int], nn.Module],
        *,
        in_chans: int,
        num_classes: int,
        global_pool: GlobalPool,
        embed_dim: int | Sequence[int],
        depths: Sequence[int],
        mlp_ratio: float,
        stem: Stem,
        downsample: Downsample,
        norm_layer: NormLayer,
        drop_rate: float,
        drop_path_rate: float,
    ) -> None:
        super().__init__()
        name = type(self).__name__
        dims = dims_of(embed_dim, depths)
        check_fractions(name, mlp_ratio, drop_rate, drop_path_rate)
        check_widths(name, **{"mlp_ratio * embed_dim": mlp_ratio * max(dims)})
        for argument, value, choices in (("stem", stem, Stem), ("downsample", downsample, Downsample)):
            if value not in get_args(choices):
                raise UserError(f"{name}: {argument} is one of {', '.join(get_args(choices))}; got {value!r}.")
        self.in_chans = in_chans
        self.embed_dim = dims
        self.num_features = self.head_hidden_size = dims[-1]
        self.global_pool = checked_pool(name, global_pool)
        self.grad_checkpointing = False
        # A convolution without overlap has no output for an image smaller than one patch.
        self.min_size = 4 * 2 ** (len(dims) - 1) if downsample == "conv2" else 4 if stem == "patch" else 1

        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))

        def block(dim: int) -> VMambaBlock:
            return VMambaBlock(mixer(dim), dim, mlp_ratio, next(rates), norm_layer)

        self.patch_embed = make_stem(stem, in_chans, dims[0], norm_layer)
        stages = []
        for dim, next_dim, depth in zip(dims, [*dims[1:], None], depths, strict=True):
            joint = nn.Identity() if next_dim is None else make_downsample(downsample, dim, next_dim, norm_layer)
            stages.append(VMambaStage([block(dim) for _ in range(depth)], joint))
        self.layers = nn.ModuleList(stages)
        self.classifier = Classifier(norm_layer(dims[-1]))
        self.head_drop = nn.Dropout(drop_rate)
        self.apply(_init_linear)
        self.reset_classifier(num_classes)

        self.feature_info = [
            {"module": f"layers.{stage}.blocks.{depth - 1}", "num_chs": dim, "reduction": 4 * 2**stage}
            for stage, (dim, depth) in enumerate(zip(dims, depths, strict=True))
        ]

    @property
    def mixer(self) -> Any:
        """Return the mixer of the first block; all blocks have the same settings."""
        return cast(VMambaStage, self.layers[0]).blocks[0].op

    # Features and logits

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the last stage's map after the final norm, (B, H, W, C), of images (B, in_chans, height, width)."""
        x = self.embed(images)
        for stage in range(len(self.layers)):
            x = self._downsample(stage, self._run_blocks(stage, x))
        return self.classifier.norm(x)  # type: ignore[no-any-return]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the features (B, H, W, C) and, unless `pre_logits`, apply the head.

        Returns:
            Logits (B, num_classes), or pooled features (B, C) for `pre_logits`. With `global_pool=""`, one row for each
            position, (B, H, W, ...).
        """
        if self.global_pool == "avg":
            features = features.mean(dim=(1, 2))
        elif self.global_pool == "max":
            features = features.amax(dim=(1, 2))
        features = self.head_drop(features)
        return features if pre_logits else self.classifier.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, num_classes) of images (B, in_chans, height, width).

        An encoder without a head (num_classes=0) returns the pooled features (B, C).
        """
        return self.forward_head(self.forward_features(images))

    def embed(self, images: Tensor) -> Tensor:
        """Embed images as the map that the first block reads, one position per 4 x 4 pixels.

        Args:
            images: Normalised images, (B, in_chans, height, width), floating-point.

        Returns:
            The map, (B, H, W, C), float32, or float64 if the encoder is float64.

        Raises:
            ValueError: If the images have another shape, are not floating-point, or are too small.
        """
        images = checked_large_pixels(type(self).__name__, images, self.in_chans, self.min_size)
        return stream(self.patch_embed(channels_last(images)))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Tensor] | tuple[Tensor, list[Tensor]]:
        """Return the maps at the end of some stages, before the layers that halve them, for dense tasks.

        Args:
            x: Images (B, in_chans, height, width).
            indices: Stages to take. A list gives their indices; negative indices count from the end. A number n takes
                the last n stages, None all stages.
            norm: Apply the final norm to the map of the last stage. The other stages have no norm.
            stop_early: Skip the stages after the last stage taken. The final features are then the map of this stage,
                after the final norm if it is the last stage of the encoder.
            output_fmt: "NCHW" gives maps (B, C, H, W) with channels last in memory, "NHWC" maps (B, H, W, C).
            intermediates_only: Return the list without the final features.

        Returns:
            The final features (B, H, W, C) and the list of maps, or only the list.

        Raises:
            ValueError: If `output_fmt` is not one of the two words or an index is out of range.
        """
        if output_fmt not in ("NCHW", "NHWC"):
            raise UserError(f"{type(self).__name__}: output_fmt is NCHW or NHWC; got {output_fmt!r}.")
        take, last = take_indices(type(self).__name__, "stages", len(self.layers), indices)
        x = self.embed(x)
        taken = []
        final = len(self.layers) - 1
        for stage in range(last + 1 if stop_early else final + 1):
            if stage:
                x = self._downsample(stage - 1, x)
            x = self._run_blocks(stage, x)
            if stage in take:
                here = self.classifier.norm(x) if norm and stage == final else x
                taken.append(here.permute(0, 3, 1, 2) if output_fmt == "NCHW" else here)
        if intermediates_only:
            return taken
        return (self.classifier.norm(x) if stage == final else x), taken

    # Masked autoencoders: features of the visible patches

    @property
    def patch_stride(self) -> int:
        """Return the side in pixels of a patch that can be hidden: one position of the last stage's map."""
        return int(4 * 2 ** (len(self.layers) - 1))

    def forward_visible(self, images: Tensor, keep: Tensor) -> Tensor:
        """Encode the visible patches of images without reading the hidden patches.

        Hidden patches are not computed, and the result does not depend on their pixels. Convolutions take hidden
        positions as zeros, like positions beyond the border. Scans go from one visible position to the next. If all
        patches are visible, the result is that of `forward_features`.

        Args:
            images: Normalised images, (B, in_chans, height, width), floating-point. Both sides are multiples of
                `patch_stride`. Hidden patches may hold any values, even NaN.
            keep: Raster indices of the visible patches, (B, K), int64, ascending; the same number K for each image.

        Returns:
            Features of the last stage after the final norm, (B, K, C), in the order of `keep`.

        Raises:
            ValueError: If a shape or dtype does not fit, if a side is no multiple of `patch_stride`, if the indices are
                not ascending or out of range (checked on the CPU only, because a GPU would have to wait for the check),
                or if the scan is "cascade".
        """
        images = checked_large_pixels(type(self).__name__, images, self.in_chans, self.min_size)
        maps = visible_maps(type(self).__name__, images, keep, self.patch_stride, len(self.layers))
        x = embed_visible(self.patch_embed, images, keep, maps[0], self.patch_stride)
        for stage, here in enumerate(maps):
            if stage:
                x = stream(run_visible(cast(VMambaStage, self.layers[stage - 1]).downsample, x, maps[stage - 1], here))
            x = self._run_blocks(stage, x, here)
        return self.classifier.norm(x).squeeze(1)  # type: ignore[no-any-return]

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Remove the stages after the last stage of `indices`, in place.

        Args:
            indices: Stages to keep features of, as for `forward_intermediates`.
            prune_norm: Replace the final norm by the identity.
            prune_head: Remove the head.

        Returns:
            The indices, counted from the first stage.
        """
        take, last = take_indices(type(self).__name__, "stages", len(self.layers), indices)
        self.layers = self.layers[: last + 1]
        cast(VMambaStage, self.layers[last]).downsample = nn.Identity()
        if prune_norm:
            self.classifier.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take

    def _run_blocks(self, stage: int, x: Tensor, visible: VisibleMap | None = None) -> Tensor:
        for block in cast(VMambaStage, self.layers[stage]).blocks:
            if self.grad_checkpointing and torch.is_grad_enabled() and not inside_transform():
                x = checkpoint(block, x, visible)
            else:
                x = block(x, visible)
        return x

    def _downsample(self, stage: int, x: Tensor) -> Tensor:
        return stream(cast(VMambaStage, self.layers[stage]).downsample(x))

    # Methods that timm's trainers call

    def get_classifier(self) -> nn.Module:
        """Return the head, or an `nn.Identity` if the encoder has no head."""
        return self.classifier.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the head by a new head with random weights.

        Args:
            num_classes: Outputs of the new head; 0 for no head.
            global_pool: Pooling before the head, see the class; None keeps the present choice.
        """
        if num_classes < 0:
            raise UserError(f"{type(self).__name__}: num_classes is at least 0; got {num_classes}.")
        if global_pool is not None:
            self.global_pool = checked_pool(type(self).__name__, global_pool)
        self.num_classes = num_classes
        self.classifier.head = nn.Identity()
        if num_classes:
            weight = next(self.parameters())
            self.classifier.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            _init_linear(self.classifier.head)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: decays A, skips D, biases of the step size."""
        return {name for name, _ in self.named_parameters() if name.endswith(self.undecayed)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names for layer-wise learning rates: one group of the stem, then the blocks.

        The layers between two stages belong to the last block before them. The final norm belongs to the head. With
        `coarse`, each stage is one group.

        Source: microsoft/SimMIM, optimizer.py, get_swin_layer.
        """
        blocks: list[tuple[str, tuple[int, ...]]] = []
        for stage, layer in enumerate(self.layers):
            depth = len(cast(VMambaStage, layer).blocks)
            for index in range(depth):
                blocks.append((rf"^layers\.{stage}\.blocks\.{index}\.", (stage, 0 if coarse else index)))
            blocks.append((rf"^layers\.{stage}\.downsample\.", (stage, 0 if coarse else depth - 1)))
        return {"stem": r"^patch_embed", "blocks": blocks}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Turn gradient checkpointing on or off.

        If it is on, the forward pass keeps only the residual stream between blocks, and the backward pass computes all
        other activations again. This saves memory and takes more time.
        """
        self.grad_checkpointing = enable


torch.fx.wrap("checked_large_pixels")
torch.fx.wrap("stream")


def _init_linear(module: nn.Module) -> None:
    """Set the published initial values of a linear layer: weights normal with deviation 0.02, biases zero."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
