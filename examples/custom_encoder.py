"""A custom encoder in one file: the model, its registered name, and its `Family`.

After you import this file, the name works everywhere: in `ssmpretrain.create_encoder`, `timm.create_model`, the
objectives, `load_encoder` and `save_encoder`. Run it to pretrain for one step, export and load:

    python examples/custom_encoder.py

    B images, H x W patches of an image, L tokens, D channels, N states
"""

import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from timm.layers.format import Format
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

import ssmpretrain
from ssmpretrain.encoders.building import build, image_cfg
from ssmpretrain.encoders.family import Family, take_visible
from ssmpretrain.encoders.family_registry import register_family
from ssmpretrain.encoders.features.maps import take_indices
from ssmpretrain.encoders.sequence.pos_embed import sincos_pos_embed
from ssmpretrain.kernels.selective_scan import selective_scan


class ScanBlock(nn.Module):
    """Compute x + out(scan(in(norm(x)))) with one selective scan from the first token to the last, (B, L, D)."""

    def __init__(self, dim: int, d_state: int) -> None:
        super().__init__()
        self.sizes = [dim, dim, d_state, d_state]
        self.norm = nn.LayerNorm(dim)
        self.in_proj = nn.Linear(dim, sum(self.sizes))
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(dim, 1))
        self.out_proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        u, delta, B, C = self.in_proj(self.norm(x)).mT.split(self.sizes, dim=1)  # (B, D or N, L) each
        y = selective_scan(u, delta, -self.A_log.exp(), B, C, delta_softplus=True)
        return x + self.out_proj(y.mT)


class TinyScan(nn.Module):
    """Encode patches with fixed positions by blocks that scan them in raster order; the head reads their mean.

    Args:
        patch_size: Pixels along a patch's side.
        in_chans: Channels of the images.
        num_classes: Outputs of the head; 0 for no head.
        embed_dim: D, a multiple of 4.
        depth: Number of blocks.
        d_state: N, states per channel.
    """

    def __init__(
        self,
        patch_size: int = 16,
        in_chans: int = 3,
        num_classes: int = 1000,
        embed_dim: int = 64,
        depth: int = 4,
        d_state: int = 4,
    ) -> None:
        super().__init__()
        self.patch_size, self.in_chans, self.num_features = patch_size, in_chans, embed_dim
        self.patch_embed = nn.Conv2d(in_chans, embed_dim, patch_size, patch_size)
        self.blocks = nn.ModuleList(ScanBlock(embed_dim, d_state) for _ in range(depth))
        self.norm = nn.LayerNorm(embed_dim)
        self.feature_info = [
            {"module": f"blocks.{block}", "num_chs": embed_dim, "reduction": patch_size} for block in range(depth)
        ]
        self.reset_classifier(num_classes)

    def embed(self, images: Tensor) -> Tensor:
        """Turn images (B, C, height, width) into patch tokens with positions, (B, H * W, D), in raster order."""
        patches = self.patch_embed(images)
        positions = sincos_pos_embed(self.num_features, patches.shape[2:]).to(patches)
        return patches.flatten(2).mT + positions

    def forward_tokens(self, tokens: Tensor) -> Tensor:
        """Run blocks and final norm on all tokens or on some of them, (B, L, D)."""
        for block in self.blocks:
            tokens = block(tokens)
        return self.norm(tokens)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the features of all patches of the images, (B, H * W, D)."""
        return self.forward_tokens(self.embed(images))

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Return logits (B, num_classes) of features (B, L, D), or their mean (B, D) if `pre_logits`."""
        pooled = features.mean(dim=1)
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(images))

    def forward_intermediates(
        self, x: Tensor, indices: Any = None, norm: bool = False, intermediates_only: bool = False, **unused: Any
    ) -> Any:
        """Return maps (B, D, H, W) after some blocks, as timm's encoders do."""
        take, _ = take_indices("TinyScan", "blocks", len(self.blocks), indices)
        grid = (x.shape[2] // self.patch_size, x.shape[3] // self.patch_size)
        tokens, maps = self.embed(x), []
        for number, block in enumerate(self.blocks):
            tokens = block(tokens)
            if number in take:
                maps.append((self.norm(tokens) if norm else tokens).mT.unflatten(2, grid))
        return maps if intermediates_only else (self.norm(tokens), maps)

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int) -> None:
        """Replace the head by a fresh one; remove it if `num_classes` is 0."""
        self.num_classes = num_classes
        self.head = nn.Linear(self.num_features, num_classes) if num_classes else nn.Identity()

    def no_weight_decay(self) -> set[str]:
        return {name for name, _ in self.named_parameters() if name.endswith(".A_log")}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Return the patterns of parameter names that define the layers for layer decay."""
        return {"stem": r"^patch_embed", "blocks": [(r"^blocks\.(\d+)", None)]}


VARIANTS: dict[str, dict[str, Any]] = {"tiny_scan_patch16_224": {"embed_dim": 64, "depth": 4}}
default_cfgs = generate_default_cfgs(dict.fromkeys(VARIANTS, image_cfg(first_conv="patch_embed")))


@register_model
def tiny_scan_patch16_224(pretrained: bool = False, **kwargs: Any) -> TinyScan:
    """Build TinyScan, 0.2 M parameters."""
    return build(TinyScan, "tiny_scan_patch16_224", pretrained, kwargs)


class TinyScanFamily(Family):
    """Describe TinyScan to the package: its checkpoints, masked images and export."""

    title: ClassVar[str] = "TinyScan"
    names_like: ClassVar[tuple[str, ...]] = ("tiny_scan_*",)
    classes: ClassVar[tuple[type[nn.Module], ...]] = (TinyScan,)
    variants: ClassVar[Mapping[str, Mapping[str, Any]]] = VARIANTS
    hides_patches: ClassVar[bool] = True  # masked autoencoders may leave patches out: see forward_visible
    has_stem: ClassVar[bool] = True  # mask tokens may replace patches: see stem
    official_code: ClassVar[str] = "its authors' code"  # it calls `patch_embed` `stem`

    # Reading a checkpoint

    def looks_like(self, state: Mapping[str, Tensor]) -> bool:
        return "blocks.0.A_log" in state

    def recognise(self, state: Mapping[str, Tensor]) -> dict[str, Any] | None:
        projection, decay = state.get("patch_embed.weight"), state.get("blocks.0.A_log")
        if projection is None or decay is None:
            return None
        embed_dim, in_chans, patch_size, _ = projection.shape
        depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        sizes = {"patch_size": patch_size, "in_chans": in_chans, "embed_dim": embed_dim}
        return {**sizes, "depth": depth, "d_state": decay.shape[1]}

    # Masked images

    def patch_side(self, encoder: TinyScan) -> int:
        return encoder.patch_size

    def forward_visible(self, encoder: TinyScan, images: Tensor, keep: Tensor) -> Tensor:
        return encoder.forward_tokens(take_visible(encoder.embed(images), keep))

    def class_and_patches(self, encoder: TinyScan, features: Tensor) -> tuple[Tensor | None, Tensor]:
        return None, features  # TinyScan has no class token

    def stem(self, encoder: TinyScan) -> tuple[nn.Module, Format]:
        return encoder.patch_embed, Format.NCHW

    # Export for the authors' code

    def official_state(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("patch_embed.", "stem."): tensor for key, tensor in state.items()}

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {key.replace("stem.", "patch_embed."): tensor for key, tensor in state.items()}


FAMILY = register_family(TinyScanFamily())


def main() -> None:
    """Pretrain for one step, export the encoder, and load the exported file."""
    from ssmpretrain.objectives import MAE

    objective = MAE("tiny_scan_patch16_224", decoder_embed_dim=64)
    images = torch.randn(2, 3, 64, 64)
    loss = objective.loss(images, objective.reconstruct(images))
    loss.backward()
    with tempfile.TemporaryDirectory() as folder:
        print(ssmpretrain.save_encoder(objective.encoder, Path(folder) / "tiny_scan.safetensors"), file=sys.stderr)
        encoder = ssmpretrain.load_encoder(Path(folder) / "tiny_scan.safetensors")
    print(f"loss {loss.item():.3f}; {encoder.load_report}")


if __name__ == "__main__":
    main()
