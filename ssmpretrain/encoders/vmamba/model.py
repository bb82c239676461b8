"""VMamba: the encoder with stages of cross-scan blocks, with argument names of timm.

Source: Liu et al., "VMamba: Visual State Space Model" (arXiv:2401.10166).

B batch, H x W positions of a map, C channels, K routes of a scan, or K visible patches of an image
"""

from collections.abc import Sequence
from typing import Any, Literal, cast, get_args

import torch
import torch.fx
from timm.layers.weight_init import trunc_normal_
from timm.models import checkpoint
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.maps import take_indices
from ssmpretrain.encoders.layers.fx_tracing import NotScriptable
from ssmpretrain.encoders.layers.state_space import LayerNorm, check_widths, stream
from ssmpretrain.encoders.masking.visible_map import VisibleMap
from ssmpretrain.encoders.vmamba.arguments import (
    GlobalPool,
    check_fractions,
    check_sizes,
    checked_large_pixels,
    checked_pool,
)
from ssmpretrain.encoders.vmamba.blocks import (
    CrossScanMixer,
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
from ssmpretrain.kernels.cross_scan import Mode
from ssmpretrain.kernels.transforms import inside_transform


class Classifier(nn.Module):
    """Hold the final norm and the head under their published names; `VMamba.forward_head` pools between the two."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.head: nn.Module = nn.Identity()


class VMamba(NotScriptable, nn.Module):
    """Encode an image by Visual Mamba: blocks in stages scan a map along several routes.

    The first stage has one position per 4 x 4 pixels. Each further stage halves the height and the width of the map.
    Images of any height and width are accepted.

    Args:
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.
        global_pool: Pooling before the head. "avg": the mean of all positions. "max": the maximum of each channel. "":
            none; the head reads every position.
        embed_dim: C of each stage; or C of the first stage, which then doubles from stage to stage.
        depths: Number of blocks of each stage.
        ssm_ratio: Inner channels of the mixer per channel of the stage.
        d_state: States per inner channel and route.
        dt_rank: Rank of the step size's projection; "auto" is C / 16, rounded up.
        d_conv: Side of the mixer's depthwise convolution, odd.
        conv_bias: Whether the depthwise convolution has a bias.
        gate: Multiply the scanned map by SiLU of a second projection of the mixer's input, as the first version does.
        mlp_ratio: Hidden channels of the block's MLP per channel of the stage; 0 for blocks without an MLP.
        stem: "conv" for two convolutions with 3 x 3 taps and stride 2, "patch" for one with 4 x 4 taps and stride 4.
        downsample: Layers between two stages. "conv3": a convolution with 3 x 3 taps and stride 2. "conv2": one with
            2 x 2 taps and stride 2. "merge": Swin's patch merging.
        norm_layer: Function that takes a width and returns a norm of the last axis; None is a layer norm with eps 1e-5.
        scan: Order in which the mixer reads the map. "cross" (published): along rows and along columns, forward and
            backward. "unidirectional": along rows forward, four times. "bidirectional": along rows, twice forward and
            twice backward. "cascade": along every row, then along every column. (The "cascade" of the official code
            differs: it also normalises the map before the rows, and adds the outputs of backward scans without turning
            them round. No weights were published with it.) Or a sequence of K routes, such as
            ("h", "w7", "h_flip", "w7_flip"); see `ssmpretrain.kernels.cross_scan`.
        drop_rate: Dropout on the pooled features, in [0, 1).
        drop_path_rate: Stochastic depth rate of the last block, in [0, 1); it rises linearly from 0 at the first block.

    Raises:
        ValueError: If an argument is out of range or not one of the listed words.
    """

    output_fmt = "NHWC"

    def __init__(
        self,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool = "avg",
        embed_dim: int | Sequence[int] = 96,
        depths: Sequence[int] = (2, 2, 8, 2),
        ssm_ratio: float = 1,
        d_state: int = 1,
        dt_rank: int | Literal["auto"] = "auto",
        d_conv: int = 3,
        conv_bias: bool = False,
        gate: bool = False,
        mlp_ratio: float = 4,
        stem: Stem = "conv",
        downsample: Downsample = "conv3",
        norm_layer: NormLayer | None = None,
        scan: Mode = "cross",
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        dims = [embed_dim * 2**stage for stage in range(len(depths))] if isinstance(embed_dim, int) else [*embed_dim]
        check_sizes(dims, depths, ssm_ratio, in_chans=in_chans, d_state=d_state, dt_rank=dt_rank, d_conv=d_conv)
        check_fractions(mlp_ratio, drop_rate, drop_path_rate)
        check_widths("VMamba", **{"mlp_ratio * embed_dim": mlp_ratio * max(dims)})
        for name, value, choices in (("stem", stem, Stem), ("downsample", downsample, Downsample)):
            if value not in get_args(choices):
                raise UserError(f"VMamba: {name} is one of {', '.join(get_args(choices))}; got {value!r}.")
        norm_layer = norm_layer or LayerNorm
        self.in_chans = in_chans
        self.embed_dim = dims
        self.num_features = self.head_hidden_size = dims[-1]
        self.global_pool = checked_pool(global_pool)
        self.grad_checkpointing = False
        # A convolution without overlap has no output for an image smaller than one patch.
        self.min_size = 4 * 2 ** (len(dims) - 1) if downsample == "conv2" else 4 if stem == "patch" else 1

        rates = iter(drop_path_rate * i / max(sum(depths) - 1, 1) for i in range(sum(depths)))

        def block(dim: int) -> VMambaBlock:
            mixer = CrossScanMixer(dim, ssm_ratio, d_state, dt_rank, d_conv, conv_bias, gate, scan, norm_layer)
            return VMambaBlock(mixer, dim, mlp_ratio, next(rates), norm_layer)

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
    def mixer(self) -> CrossScanMixer:
        """Return the mixer of the first block; all blocks have the same settings."""
        return cast(VMambaStage, self.layers[0]).blocks[0].op  # type: ignore[return-value]

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
        images = checked_large_pixels(images, self.in_chans, self.min_size)
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
            raise UserError(f"VMamba: output_fmt is NCHW or NHWC; got {output_fmt!r}.")
        take, last = take_indices("VMamba", "stages", len(self.layers), indices)
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
        images = checked_large_pixels(images, self.in_chans, self.min_size)
        maps = visible_maps(images, keep, self.patch_stride, len(self.layers))
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
        take, last = take_indices("VMamba", "stages", len(self.layers), indices)
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
            raise UserError(f"VMamba: num_classes is at least 0; got {num_classes}.")
        if global_pool is not None:
            self.global_pool = checked_pool(global_pool)
        self.num_classes = num_classes
        self.classifier.head = nn.Identity()
        if num_classes:
            weight = next(self.parameters())
            self.classifier.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
            _init_linear(self.classifier.head)

    def no_weight_decay(self) -> set[str]:
        """Return the names of the parameters without weight decay: decays A, skips D, biases of the step size.

        The published training applies weight decay to A and these biases, because they are matrices.
        """
        endings = (".op.A_logs", ".op.Ds", ".op.dt_projs_bias")
        return {name for name, _ in self.named_parameters() if name.endswith(endings)}

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
