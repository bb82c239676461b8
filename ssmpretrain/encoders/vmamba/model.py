"""VMamba, the four-stage cross-scan encoder of Liu et al., "VMamba" (arXiv:2401.10166), in timm's vocabulary.

B batch, H x W positions of a map, C channels, K routes of the scan, or visible patches of an image
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
    """The final norm and the head, by their published names; `VMamba.forward_head` pools between them."""

    def __init__(self, norm: nn.Module) -> None:
        super().__init__()
        self.norm = norm
        self.head: nn.Module = nn.Identity()


class VMamba(NotScriptable, nn.Module):
    """Visual Mamba: stages of blocks that scan the map along several routes, each stage at half the resolution of the
    one before, from a quarter of the image's on. Images of any height and width are accepted.

    Args:
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.
        global_pool: Positions that the head reads. "avg": the mean of all. "max": the largest. "": every position.
        embed_dim: C of every stage, or of the first; it then doubles from stage to stage.
        depths: Number of blocks of every stage.
        ssm_ratio: Inner channels of the mixer per channel.
        d_state: States per inner channel and route.
        dt_rank: Rank of the step size's projection; "auto" is C / 16, rounded up.
        d_conv: Side of the mixer's depthwise convolution, odd.
        conv_bias: Give that convolution a bias.
        gate: Multiply the scanned map by SiLU of a second projection of the mixer's input, as the first version does.
        mlp_ratio: Hidden channels of the block's second branch per channel; 0 for no such branch.
        stem: "conv" is two overlapping 3 x 3 convolutions, "patch" one of adjoining 4 x 4 patches.
        downsample: Layers between two stages. "conv3" is an overlapping 3 x 3 convolution, "conv2" one of adjoining
            2 x 2 patches, "merge" Swin's patch merging.
        norm_layer: Makes a norm of the last axis from its width; None is a layer norm with eps 1e-5.
        scan: Order in which the mixer reads the map. "cross" (published): rows and columns, both ways.
            "unidirectional": rows, four times. "bidirectional": rows, twice each way. "cascade": along every row, then
            along every column (the official code also norms the map before the rows, and adds the scans that run
            backwards in the order in which they ran; no weights were published with it). Or a sequence of K routes
            such as ("h", "w7", "h_flip", "w7_flip"); see `ssmpretrain.kernels.cross_scan`.
        drop_rate: Dropout on the pooled features, in [0, 1).
        drop_path_rate: Stochastic depth, rising linearly from 0 at the first block to this at the last, in [0, 1).

    Raises:
        ValueError: If an argument is outside its range or none of the listed words.
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
        # Convolutions of adjoining patches have no output where less than a patch is left.
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
        """Encode images (B, in_chans, height, width) as the last stage's map after the final norm, (B, H, W, C)."""
        x = self.embed(images)
        for stage in range(len(self.layers)):
            x = self._downsample(stage, self._run_blocks(stage, x))
        return self.classifier.norm(x)  # type: ignore[no-any-return]

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the features (B, H, W, C) and, unless `pre_logits`, apply the head.

        Returns:
            Logits (B, num_classes), or the pooled features (B, C); (B, H, W, ...) for `global_pool=""`.
        """
        if self.global_pool == "avg":
            features = features.mean(dim=(1, 2))
        elif self.global_pool == "max":
            features = features.amax(dim=(1, 2))
        features = self.head_drop(features)
        return features if pre_logits else self.classifier.head(features)

    def forward(self, images: Tensor) -> Tensor:
        """Classify images (B, C, height, width): logits (B, num_classes), or pooled features (B, C) for no classes."""
        return self.forward_head(self.forward_features(images))

    def embed(self, images: Tensor) -> Tensor:
        """Embed images as the map that the first block reads, one position per 4 x 4 pixels.

        Args:
            images: (B, in_chans, height, width), floating, normalised.

        Returns:
            (B, H, W, C), float32 or wider.

        Raises:
            ValueError: If the shape or dtype is another or the image too small.
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
        """Return the map at the end of chosen stages, before it is halved for the next, for dense tasks.

        Args:
            x: Images (B, C, height, width).
            indices: Stages to take: a list, negative ones counted from the end; the last n for a number; all for None.
            norm: Apply the final norm to the last stage's map; the other stages have none of their own.
            stop_early: Skip the stages after the last one taken; its map then is the final features, normed if it is
                the last stage's.
            output_fmt: "NCHW" gives maps (B, C, H, W) in channels_last memory, "NHWC" (B, H, W, C).
            intermediates_only: Leave the final features out.

        Returns:
            The final features (B, H, W, C) and the list, or the list alone.

        Raises:
            ValueError: If `output_fmt` is another word or an index is out of range.
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

    # Visible patches alone, for masked autoencoders

    @property
    def patch_stride(self) -> int:
        """Return the pixels along a patch that can be hidden: those of one position of the last stage."""
        return int(4 * 2 ** (len(self.layers) - 1))

    def forward_visible(self, images: Tensor, keep: Tensor) -> Tensor:
        """Encode the visible patches from these patches alone.

        Hidden patches are not computed, and nothing depends on their pixels. To a convolution they are zeros in every
        map, as what lies beyond the image's border is; the scans step from one visible position to the next. With all
        patches visible the result is that of `forward_features`.

        Args:
            images: (B, in_chans, height, width), floating, normalised; both sides multiples of `patch_stride`. What the
                hidden patches hold does not matter, be it infinite or NaN.
            keep: Raster indices of the visible patches, ascending, as many for every image, (B, K), int64.

        Returns:
            Features of the last stage after the final norm, (B, K, C), in the order of `keep`.

        Raises:
            ValueError: If a shape or dtype is another, a side is no multiple, the indices are not ascending or beyond
                the last patch (their values are read on a CPU alone; on a GPU that would make it wait), or the scan is
                "cascade".
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
        """Drop the stages after the last of `indices`, and norm and head if asked; returns indices from the start."""
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

    # What timm's trainers ask an encoder

    def get_classifier(self) -> nn.Module:
        """Return the head, an `nn.Identity` when there is none."""
        return self.classifier.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the head by a fresh one of `num_classes` outputs (none for 0), and change the pooling unless None."""
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
        """Return names of parameters that must not decay: decays A, skips D, step-size biases.

        The published training decays A and the biases, since they are matrices there.
        """
        endings = (".op.A_logs", ".op.Ds", ".op.dt_projs_bias")
        return {name for name, _ in self.named_parameters() if name.endswith(endings)}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return patterns of parameter names, by which layer-wise learning rates group stem and blocks, or stages.

        The layers between two stages go with the last block before them; the final norm goes with the head.

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
        """Trade time for memory: keep only the stream between blocks and recompute the rest in the backward pass."""
        self.grad_checkpointing = enable


torch.fx.wrap("checked_large_pixels")
torch.fx.wrap("stream")


def _init_linear(module: nn.Module) -> None:
    """Draw published initial values: normal with deviation 0.02 for projections, none for their biases."""
    if isinstance(module, nn.Linear):
        trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
