"""Vim, the bidirectional state-space encoder of Zhu et al., "Vision Mamba" (arXiv:2401.09417), in timm's vocabulary.

B batch, M = H x W patches, K patches given (all or the visible ones), n class tokens, L = K + n tokens, D channels
"""

from typing import Any, Literal, cast, get_args

import torch
from timm.layers.weight_init import lecun_normal_, trunc_normal_
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from .class_token import ClassToken, class_positions, insert_class_tokens, remove_class_tokens
from .pos_embed import merge_pos_embed, resize_grid, resize_pos_embed, sincos_pos_embed, split_pos_embed
from .vim_blocks import BackwardBias, Bidirectional, VimBlocks

GlobalPool = Literal["token", "avg", "max", ""]
GLOBAL_POOLS: tuple[str, ...] = get_args(GlobalPool)
PosEmbed = Literal["learned", "sincos"]


class PatchEmbed(nn.Module):
    """Project square patches of images (B, C, height, width), one every `stride` pixels: (B, H * W, D), row by row."""

    def __init__(
        self, img_size: int | tuple[int, int], patch_size: int, stride: int, in_chans: int, embed_dim: int
    ) -> None:
        super().__init__()
        for name, value in {"patch_size": patch_size, "stride": stride, "in_chans": in_chans}.items():
            if value < 1:
                raise ValueError(f"Vim: {name} is at least 1; got {value}.")
        self.patch_size = patch_size
        self.stride = stride
        self.in_chans = in_chans
        self.img_size = to_height_width(img_size)
        self.grid_size = self.dynamic_feat_size(self.img_size)
        self.proj = nn.Conv2d(in_chans, embed_dim, patch_size, stride)
        lecun_normal_(self.proj.weight)  # type: ignore[no-untyped-call]
        nn.init.zeros_(cast(Tensor, self.proj.bias))

    @property
    def num_patches(self) -> int:
        return self.grid_size[0] * self.grid_size[1]

    def dynamic_feat_size(self, img_size: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of patches in an image of (height, width) pixels.

        Raises:
            ValueError: If a side is smaller than a patch or the patches do not end at the image's edge.
        """
        for side, pixels in zip(("height", "width"), img_size, strict=True):
            if pixels < self.patch_size or (pixels - self.patch_size) % self.stride:
                below = self.patch_size + max((pixels - self.patch_size) // self.stride, 0) * self.stride
                nearest = f"{below} or {below + self.stride}" if below < pixels else f"{below}"
                step = "" if self.stride == self.patch_size else f" every {self.stride} pixels"
                raise ValueError(
                    f"Vim: patches of {self.patch_size} x {self.patch_size} pixels{step} must fill the image exactly; "
                    f"got an image of {img_size[0]} x {img_size[1]} (height x width). "
                    f"Resize or crop its {side} from {pixels} to {nearest} pixels."
                )
        height, width = ((pixels - self.patch_size) // self.stride + 1 for pixels in img_size)
        return height, width

    def forward(self, images: Tensor) -> Tensor:
        return self.proj(images).flatten(2).transpose(1, 2)  # type: ignore[no-any-return]


class Vim(VimBlocks):
    """Vision Mamba: patches and a class token in one sequence, scanned in both directions by every block.

    Args:
        img_size: Pixels, one number or (height, width), that the position embedding is laid out for. Images of other
            sizes are accepted and get a resized embedding.
        patch_size: Pixels along a patch's side.
        stride: Pixels from one patch to the next; None means `patch_size`.
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.
        global_pool: What the head reads. "token": the class token (the mean of both for "double"). "avg": the mean of
            the patch tokens. "max": every patch token, the largest logit of each class being kept. "": every token of
            the sequence. None means "token" with a class token and "avg" without.
        class_token: "middle" (published), "head", "double" (one at either end) or "none".
        embed_dim: D.
        depth: Number of blocks.
        d_state, expand, d_conv, drop_path_rate, bidirectional, divide_output, flip_probability, backward_dt_bias_init:
            As in `VimBlocks`.
        drop_rate: Dropout on the embedded tokens, in [0, 1).
        pos_embed: "learned" (published), or "sincos", fixed, as in masked autoencoders.
        layer_decay_pairs: Give two neighbouring blocks one learning rate under layer decay (`group_matcher`), as
            published for masked Vim, which is twice as deep as a ViT of its size.

    The paper's five classification strategies are `class_token="none"` with `global_pool="avg"` or `"max"`, and the
    class tokens "head", "double" and "middle" with `global_pool="token"`.

    Raises:
        ValueError: If an argument is outside its range, none of the listed words, or two of them contradict each other.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int = 16,
        stride: int | None = None,
        in_chans: int = 3,
        num_classes: int = 1000,
        global_pool: GlobalPool | None = None,
        class_token: ClassToken = "middle",
        embed_dim: int = 192,
        depth: int = 24,
        d_state: int = 16,
        expand: float = 2,
        d_conv: int = 4,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        pos_embed: PosEmbed = "learned",
        bidirectional: Bidirectional = "ssm_conv",
        divide_output: bool = True,
        flip_probability: float = 0.5,
        backward_dt_bias_init: BackwardBias = "mamba",
        layer_decay_pairs: bool = False,
    ) -> None:
        super().__init__(
            depth,
            embed_dim,
            d_state=d_state,
            expand=expand,
            d_conv=d_conv,
            drop_path_rate=drop_path_rate,
            bidirectional=bidirectional,
            divide_output=divide_output,
            flip_probability=flip_probability,
            backward_dt_bias_init=backward_dt_bias_init,
        )
        if pos_embed not in get_args(PosEmbed):
            raise ValueError(f"Vim: pos_embed is one of {', '.join(get_args(PosEmbed))}; got {pos_embed!r}.")
        if not 0 <= drop_rate < 1:
            raise ValueError(f"Vim: drop_rate is in [0, 1); got {drop_rate}.")
        self.num_class_tokens = len(class_positions(class_token, 0))
        self.class_token = class_token
        self.global_pool = self._checked_pool(global_pool)
        self.num_features = self.head_hidden_size = embed_dim
        self.layer_decay_pairs = layer_decay_pairs

        self.patch_embed = PatchEmbed(
            img_size, patch_size, patch_size if stride is None else stride, in_chans, embed_dim
        )
        for name in self._class_token_names():
            self.register_parameter(name, nn.Parameter(trunc_normal_(torch.zeros(1, 1, embed_dim), std=0.02)))
        self.pos_embed = self._initial_pos_embed(pos_embed)
        self.pos_drop = nn.Dropout(drop_rate)
        self.head: nn.Module
        self.reset_classifier(num_classes)

        reduction = self.patch_embed.stride
        self.feature_info = [
            {
                "module": f"layers.{(stage + 1) * self.blocks_per_stage - 1}",
                "num_chs": embed_dim,
                "reduction": reduction,
            }
            for stage in range(self.num_stages)
        ]

    # Tokens

    def embed(self, images: Tensor) -> Tensor:
        """Patch tokens with their position embedding, in raster order, without class tokens.

        Args:
            images: (B, in_chans, height, width), floating, normalised. Patches fill both sides exactly.

        Returns:
            (B, M, D).

        Raises:
            ValueError: If the shape or dtype is another.
        """
        if images.ndim != 4 or images.shape[1] != self.patch_embed.in_chans or not images.is_floating_point():
            raise ValueError(
                f"Vim: images are floating-point (batch, {self.patch_embed.in_chans}, height, width); "
                f"got {images.dtype} {tuple(images.shape)}. Convert to float and normalise, or set in_chans."
            )
        grid_size = self.patch_embed.dynamic_feat_size((images.shape[2], images.shape[3]))
        rows, _ = split_pos_embed(self.pos_embed, self.class_token)
        return self.patch_embed(images) + resize_grid(rows, self.patch_embed.grid_size, grid_size)  # type: ignore[no-any-return]

    def forward_tokens(self, patches: Tensor) -> Tensor:
        """Insert the class tokens among the patches given, run all blocks and the final norm.

        Args:
            patches: Some or all patches of `embed`, (B, K, D), in raster order. The middle class token goes before
                patch K // 2 of these.

        Returns:
            The features of the whole sequence, (B, K + n, D); `split_tokens` takes it apart.
        """
        return super().forward(self._with_class_tokens(patches))

    def split_tokens(self, features: Tensor) -> tuple[Tensor | None, Tensor]:
        """The class feature (B, D), None without class tokens, the mean of "double"; and the patches (B, K, D)."""
        patches, tokens = remove_class_tokens(features, self.class_token)
        return (tokens.mean(dim=1) if self.num_class_tokens else None), patches

    def _with_class_tokens(self, patches: Tensor) -> Tensor:
        if self.num_class_tokens:
            _, rows = split_pos_embed(self.pos_embed, self.class_token)
            tokens = torch.cat([getattr(self, name) for name in self._class_token_names()], dim=1) + rows
            tokens = tokens.to(patches.dtype).expand(patches.shape[0], -1, -1)
            patches = insert_class_tokens(patches, tokens, self.class_token)
        return self.pos_drop(patches)  # type: ignore[no-any-return]

    def _class_token_names(self) -> list[str]:
        if self.class_token == "double":
            return ["cls_token_head", "cls_token_tail"]
        return [] if self.class_token == "none" else ["cls_token"]

    def _initial_pos_embed(self, kind: str) -> nn.Parameter:
        if kind == "sincos":
            grid = sincos_pos_embed(self.embed_dim, self.patch_embed.grid_size)
            class_rows = torch.zeros(1, self.num_class_tokens, self.embed_dim)
            return nn.Parameter(merge_pos_embed(grid, class_rows, self.class_token), requires_grad=False)
        table = torch.zeros(1, self.patch_embed.num_patches + self.num_class_tokens, self.embed_dim)
        return nn.Parameter(trunc_normal_(table, std=0.02))

    def set_input_size(self, img_size: int | tuple[int, int]) -> None:
        """Resize the position embedding for another image size, in place; such images need no resizing later."""
        old_grid = self.patch_embed.grid_size
        self.patch_embed.grid_size = self.patch_embed.dynamic_feat_size(to_height_width(img_size))
        self.patch_embed.img_size = to_height_width(img_size)
        resized = resize_pos_embed(self.pos_embed.detach(), old_grid, self.patch_embed.grid_size, self.class_token)
        self.pos_embed = nn.Parameter(resized, requires_grad=self.pos_embed.requires_grad)

    # Features and logits

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, C, height, width) to the features of every token after the final norm, (B, M + n, D)."""
        return self.forward_tokens(self.embed(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the features (B, L, D) and, unless `pre_logits`, apply the head.

        Returns:
            Logits (B, num_classes), or what the head reads, (B, D); (B, L, ...) for `global_pool=""`. For "max",
            features are pooled by maximum, whereas logits keep each class's largest over all patches, as published.
        """
        if self.global_pool == "max":
            patches = self.split_tokens(features)[1]
            return (patches if pre_logits else self.head(patches)).amax(dim=1)
        pooled = self._pool(features)
        return pooled if pre_logits else self.head(pooled)

    def _pool(self, features: Tensor) -> Tensor:
        if self.global_pool == "token":
            positions = class_positions(self.class_token, features.shape[1] - self.num_class_tokens)
            return torch.stack([features[:, position] for position in positions]).mean(dim=0)
        if self.global_pool == "avg":
            return self.split_tokens(features)[1].mean(dim=1)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, C, height, width) to logits (B, num_classes); to pooled features (B, D) if `num_classes` is 0."""
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | tuple[int, ...] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> list[Any] | tuple[Tensor, list[Any]]:
        """The residual stream after chosen blocks: what the next block reads, for dense tasks.

        The published segmentation code takes a block's mixer output alone, the published detection code the sum with
        the residual; this is the sum.

        Args:
            x: Images (B, C, height, width).
            indices: Blocks (pairs of blocks for `bidirectional="layer"`) to take: a list, negative ones counted from
                the end; the last n for a number; all for None.
            return_prefix_tokens: Pair each map with its class tokens, (B, n, D). They are no prefix of the sequence
                unless it is "head"; the name is timm's.
            norm: Apply the final norm to each.
            stop_early: Skip the blocks after the last one taken; its features, normed, then are the final ones.
            output_fmt: "NCHW" gives maps (B, D, H, W), "NLC" patch tokens (B, M, D).
            intermediates_only: Leave the final features out.

        Returns:
            The final features (B, M + n, D) and the list, or the list alone.

        Raises:
            ValueError: If `output_fmt` is another word or an index is out of range.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"Vim: output_fmt is NCHW or NLC; got {output_fmt!r}.")
        take, last = self._take_indices(indices)
        tokens = self._with_class_tokens(self.embed(x))
        grid_size = self.patch_embed.dynamic_feat_size((x.shape[2], x.shape[3]))
        stream, flipped = self.maybe_flip(tokens.to(torch.promote_types(tokens.dtype, torch.float32)))
        taken: list[Any] = []
        for stage in range(last + 1 if stop_early else self.num_stages):
            stream = self.run_stage(stage, stream)
            if stage in take:
                here = self.norm_f(stream) if norm else stream
                patches, class_tokens = remove_class_tokens(here.flip(1) if flipped else here, self.class_token)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).reshape(len(patches), -1, *grid_size)
                taken.append((patches, class_tokens) if return_prefix_tokens else patches)
        if intermediates_only:
            return taken
        features = self.norm_f(stream)
        return (features.flip(1) if flipped else features), taken

    def prune_intermediate_layers(
        self, indices: int | list[int] | tuple[int, ...] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop the blocks after the last of `indices`, and norm and head if asked; returns indices from the start."""
        take, last = self._take_indices(indices)
        self.layers = self.layers[: (last + 1) * self.blocks_per_stage]
        if prune_norm:
            self.norm_f = nn.Identity()
        if prune_head:
            self.reset_classifier(0)
        return take

    def _take_indices(self, indices: int | list[int] | tuple[int, ...] | None) -> tuple[list[int], int]:
        count = self.num_stages
        if indices is None:
            indices = count
        wanted = list(range(count - indices, count)) if isinstance(indices, int) else list(indices)
        if not 0 < len(wanted) <= count or any(not -count <= index < count for index in wanted):
            raise ValueError(
                f"Vim: indices name some of {count} blocks, 0 to {count - 1}, or the last 1 to {count}; got {indices}."
            )
        take = [index % count for index in wanted]
        return take, max(take)

    # What timm's trainers ask an encoder

    def get_classifier(self) -> nn.Module:
        """The head, an `nn.Identity` when there is none."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the head by a fresh one of `num_classes` outputs (none for 0), and change the pooling unless None."""
        if num_classes < 0:
            raise ValueError(f"Vim: num_classes is at least 0; got {num_classes}.")
        if global_pool is not None:
            self.global_pool = self._checked_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            weight = self.patch_embed.proj.weight
            self.head = nn.Linear(self.embed_dim, num_classes, device=weight.device, dtype=weight.dtype)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _checked_pool(self, global_pool: str | None) -> str:
        if global_pool is None:
            return "token" if self.num_class_tokens else "avg"
        if global_pool not in GLOBAL_POOLS:
            raise ValueError(f"Vim: global_pool is one of token, avg, max or empty; got {global_pool!r}.")
        if global_pool == "token" and not self.num_class_tokens:
            raise ValueError(
                "Vim: global_pool='token' reads the class token, and class_token is 'none'. Use 'avg' or 'max'."
            )
        return global_pool

    def no_weight_decay(self) -> set[str]:
        """Names that weight decay would pull away from their meaning: those of the blocks, positions, class tokens."""
        return {"pos_embed", *self._class_token_names(), *super().no_weight_decay()}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Patterns that put the embeddings, every block (or pair of blocks, `layer_decay_pairs`), and the head into
        ordered groups.

        The final norm goes with the last block, as in timm's ViT. `coarse` changes nothing: Vim has no stages.
        """
        step = 2 if self.layer_decay_pairs else 1
        # One numbered pattern per block (or pair) rather than a captured number, so that two blocks can share a group.
        depth = len(self.layers)
        groups = [
            (r"^layers\.(?:" + "|".join(map(str, range(first, min(first + step, depth)))) + r")\.", (first // step,))
            for first in range(0, depth, step)
        ]
        last_group = (depth - 1) // step
        return {"stem": r"^cls_token|^pos_embed|^patch_embed", "blocks": [*groups, (r"^norm_f", (last_group,))]}


def to_height_width(img_size: int | tuple[int, int]) -> tuple[int, int]:
    """One number or a pair as (height, width).

    Raises:
        ValueError: If it is neither.
    """
    pair = (img_size, img_size) if isinstance(img_size, int) else tuple(img_size)
    if len(pair) != 2 or not all(isinstance(side, int) and side > 0 for side in pair):
        raise ValueError(f"Vim: img_size is one number of pixels or (height, width); got {img_size!r}.")
    return pair[0], pair[1]


def _cfg(**kwargs: Any) -> dict[str, Any]:
    return {
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": None,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2401.09417",
        "origin_url": "https://github.com/hustvl/Vim",
        **kwargs,
    }


# What tells the registered sizes apart; everything else is the default of `Vim`.
VARIANTS: dict[str, dict[str, int]] = {
    "vim_tiny_patch16_224": {"embed_dim": 192, "depth": 24},
    "vim_tiny_patch16_stride8_224": {"embed_dim": 192, "depth": 24, "stride": 8},
    "vim_small_patch16_224": {"embed_dim": 384, "depth": 24},
    "vim_small_patch16_stride8_224": {"embed_dim": 384, "depth": 24, "stride": 8},
    "vim_base_patch16_224": {"embed_dim": 768, "depth": 24},
    "vim_large_patch16_224": {"embed_dim": 1024, "depth": 48},
    "test_vim": {"embed_dim": 32, "depth": 4},
}
default_cfgs = generate_default_cfgs({name: _cfg() for name in VARIANTS})


def _create_vim(variant: str, pretrained: bool, **kwargs: Any) -> Vim:
    feature_cfg = {"out_indices": kwargs.pop("out_indices", 3), "feature_cls": "getter"}
    kwargs = {**VARIANTS[variant], **kwargs}
    return build_model_with_cfg(Vim, variant, pretrained, feature_cfg=feature_cfg, **kwargs)


@register_model
def vim_tiny_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti: 7.1 M parameters, 197 tokens, published top-1 76.1 %."""
    return _create_vim("vim_tiny_patch16_224", pretrained, **kwargs)


@register_model
def vim_tiny_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-Ti+: overlapping patches, 730 tokens, published top-1 78.3 %."""
    return _create_vim("vim_tiny_patch16_stride8_224", pretrained, **kwargs)


@register_model
def vim_small_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S: 25.8 M parameters, 197 tokens, published top-1 80.5 %."""
    return _create_vim("vim_small_patch16_224", pretrained, **kwargs)


@register_model
def vim_small_patch16_stride8_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-S+: overlapping patches, 730 tokens, published top-1 81.6 %."""
    return _create_vim("vim_small_patch16_stride8_224", pretrained, **kwargs)


@register_model
def vim_base_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-B: 97.6 M parameters, 197 tokens, published top-1 81.9 %."""
    return _create_vim("vim_base_patch16_224", pretrained, **kwargs)


@register_model
def vim_large_patch16_224(pretrained: bool = False, **kwargs: Any) -> Vim:
    """Vim-L, 1024 wide and 48 deep, the larger size published for masked pretraining; it has no supervised weights."""
    return _create_vim("vim_large_patch16_224", pretrained, **kwargs)


@register_model
def test_vim(pretrained: bool = False, **kwargs: Any) -> Vim:
    """A Vim small enough for tests: 4 blocks, 32 channels, 0.09 M parameters without the head."""
    return _create_vim("test_vim", pretrained, **kwargs)
