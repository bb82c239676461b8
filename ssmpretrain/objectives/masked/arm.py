"""Autoregressive pretraining of a one-directional Mamba encoder on clusters of patches.

Legend: B images, L patches in n clusters of S = m x m, D encoder width, E decoder width, H x W pixels, h x w grid of
patches, p patch side.
"""

from __future__ import annotations

import logging
from typing import Any, NamedTuple, cast

import torch
from lightning.pytorch.utilities import rank_zero_only
from timm.layers.mlp import Mlp
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders import create_encoder
from ssmpretrain.encoders.arm.arm import VARIANTS
from ssmpretrain.encoders.layers.state_space import check_widths
from ssmpretrain.encoders.sequence.pos_embed import sincos_pos_embed
from ssmpretrain.encoders.weights.load import encoder_name_in
from ssmpretrain.objectives.masked.pretraining import Pretraining, Reconstruction
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine, Schedule

_log = logging.getLogger(__name__)


class ARM(Pretraining):
    """Autoregression over clusters of patches: predict the pixels of cluster k + 1 from clusters 0..k.

    Clusters are squares of patches. Clusters, and the patches in a cluster, are read row by row. The encoder scans all
    clusters except the last in this order, in one direction. In the decoder each patch of the next cluster is a query,
    given by its position. It attends to the encoder's features of the earlier clusters. Fine-tuning uses four
    directions: `load_encoder(checkpoint)` builds such an encoder, and fills each direction from the pretrained one.

    Args:
        encoder: Name of an ARM encoder (`ssmpretrain.list_encoders("*arm*")`). None takes the encoder of `init_from`,
            or arm_base_patch16_224 without `init_from`.
        encoder_args: Further arguments of the encoder, without `directions`, which is 1. The encoder is built for the
            images of the data unless `img_size` is given here.
        init_from: Source of the encoder's weights: a run of ARM, or a published or exported file of an ARM encoder with
            one direction. The decoder starts fresh. None starts from scratch.
        cluster_size: m, patches along the side of a cluster, at least 1. Two or more clusters must tile the image.
        decoder_embed_dim: E, width of the decoder; a multiple of 4 and of `decoder_num_heads`.
        decoder_depth: Blocks of the decoder, at least 1. Each reads one encoder layer (see `layers_read`).
        decoder_num_heads: Attention heads of a decoder block.
        normalize_targets: Whether to standardise the pixels of each patch before the loss.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.

    Logs:
        train/loss, val/loss: Mean squared error per pixel of all clusters but the first; in squared target deviations
        when normalize_targets.

    Raises:
        ValueError: If an argument is out of range, if the encoder is no ARM encoder, or if the file does not fill it.

    Source: Ren et al., "Autoregressive Pretraining with Mamba in Vision" (arXiv:2406.07537), sec. 3, and its code. One
        thing differs: the norm after the last layer belongs to the encoder and is fine-tuned with it, whereas the
        published code fine-tunes with a fresh norm.
    """

    column_titles = ("given", "prediction")

    def __init__(
        self,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        init_from: str | None = None,
        cluster_size: int = 4,
        decoder_embed_dim: int = 512,
        decoder_depth: int = 4,
        decoder_num_heads: int = 8,
        normalize_targets: bool = True,
        optimizer: AdamW = AdamW(),  # noqa: B008  (read only)
        schedule: Schedule = Cosine(),  # noqa: B008
    ) -> None:
        _check_arguments(encoder_args or {}, cluster_size, decoder_embed_dim, decoder_depth, decoder_num_heads)
        if encoder is None and not init_from:
            encoder = "arm_base_patch16_224"
            rank_zero_only(_log.info)("ARM: no encoder is named; it takes %s", encoder)
        super().__init__(
            encoder,
            encoder_args,
            normalize_targets,
            optimizer,
            schedule,
            init_from=init_from,
            cluster_size=cluster_size,
            decoder_embed_dim=decoder_embed_dim,
            decoder_depth=decoder_depth,
            decoder_num_heads=decoder_num_heads,
        )
        self.patch_size = self.encoder.patch_embed.patch_size
        self.unit = cluster_size
        self.layers_read = layers_read(self.encoder.num_stages, decoder_depth)
        width = self.encoder.num_features
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in self.layers_read[:-1])  # the last is the encoder's
        self.decoder_embed = nn.Linear(decoder_depth * width, decoder_depth * decoder_embed_dim)
        self.query_token = nn.Parameter(trunc_normal_(torch.zeros(1, 1, decoder_embed_dim), std=0.02))
        self.decoder = nn.ModuleList(DecoderBlock(decoder_embed_dim, decoder_num_heads) for _ in self.layers_read)
        self.decoder_norm = nn.LayerNorm(decoder_embed_dim)
        self.decoder_pred = nn.Linear(decoder_embed_dim, 3 * self.patch_size**2)
        self._layout = _Layout((0, 0), torch.empty(0), torch.empty(0))  # rebuilt when the grid changes
        for layer in (self.decoder_embed, self.decoder_pred):
            nn.init.zeros_(layer.bias)

    def build_encoder(self) -> Any:
        """Build the encoder with one direction, and fill it from `init_from`, if there is one."""
        _check_encoder(self.encoder_name or encoder_name_in(str(self.init_from)), self.init_from)
        if self.init_from is None:
            return create_encoder(self.encoder_name, num_classes=0, directions=1, **self.encoder_args)
        self.encoder_args["directions"] = 1
        encoder = super().build_encoder()
        del self.encoder_args["directions"]  # `load_encoder` builds four from the checkpoint
        return encoder

    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Predict each cluster of `images` (B, 3, H, W) except the first from the earlier ones; nothing is random."""
        grid = self.patch_grid((images.shape[2], images.shape[3]))
        S = self.unit**2
        tokens = to_clusters(self.encoder.embed(images), grid, self.unit)  # (B, L, D)
        predicted = self._decode(self._encode(tokens[:, :-S]), self._layout_of(grid)).float()  # (B, L - S, 3 * p * p)
        first = predicted.new_zeros(len(images), S, predicted.shape[-1])
        hidden = torch.arange(tokens.shape[1], device=images.device).view(1, -1, 1) >= S
        return Reconstruction(
            from_clusters(torch.cat([first, predicted], dim=1), grid, self.unit),
            from_clusters(hidden, grid, self.unit).squeeze(-1).expand(len(images), -1),
        )

    def _encode(self, tokens: Tensor) -> list[Tensor]:
        """Encode the visible tokens (B, L - S, D); return a memory (B, L - S, E) for each decoder block."""
        _, streams = self.encoder.run(tokens, self.layers_read)
        norms = [*self.norms, self.encoder.norm_f]
        features = torch.cat([norm(stream) for norm, stream in zip(norms, streams, strict=True)], dim=-1)
        return list(self.decoder_embed(features).chunk(len(norms), dim=-1))

    def _decode(self, memories: list[Tensor], layout: _Layout) -> Tensor:
        """Predict the pixels of all clusters except the first, (B, L - S, 3 * p * p), in the order of the clusters."""
        queries = (self.query_token + layout.positions).expand(len(memories[0]), -1, -1)
        for block, memory in zip(self.decoder, memories, strict=True):
            queries = block(queries, memory, layout.blocked)
        return self.decoder_pred(self.decoder_norm(queries))  # type: ignore[no-any-return]

    def _layout_of(self, grid: tuple[int, int]) -> _Layout:
        if grid != self._layout.grid or self._layout.positions.device != self.device:
            S = self.unit**2
            with torch.inference_mode(False):  # training uses the tensors that a first validation makes
                positions = to_clusters(sincos_pos_embed(self.query_token.shape[-1], grid), grid, self.unit)[:, S:]
                cluster = torch.arange(positions.shape[1]) // S  # query k predicts cluster k + 1 and may read 0..k
                blocked = cluster.unsqueeze(1) < cluster.unsqueeze(0)
                self._layout = _Layout(grid, positions.to(self.device), blocked.to(self.device))
        return self._layout


class _Layout(NamedTuple):
    """Tensors that depend only on the image size.

    Attributes:
        grid: h, w.
        positions: Position embedding of the patches to predict, (1, L - S, E).
        blocked: True if a query must not attend to a token, (L - S, L - S).
    """

    grid: tuple[int, int]
    positions: Tensor
    blocked: Tensor


class DecoderBlock(nn.Module):
    """Decoder block: queries (B, L, E) attend to a memory (B, L, E), then an MLP follows; residuals in float32.

    Queries do not attend to one another, so each prediction is independent of the others.
    """

    def __init__(self, dim: int, num_heads: int) -> None:
        super().__init__()
        self.norm_queries = nn.LayerNorm(dim)
        self.norm_memory = nn.LayerNorm(dim)
        self.attention = nn.MultiheadAttention(dim, num_heads, batch_first=True)
        self.norm_mlp = nn.LayerNorm(dim)
        self.mlp = Mlp(dim, 4 * dim)
        query, key_and_value = self.attention.in_proj_weight.detach().tensor_split([dim])
        for weight in (query, key_and_value, self.attention.out_proj.weight):  # two projections, as published
            nn.init.xavier_uniform_(weight)
        for layer in (self.mlp.fc1, self.mlp.fc2):
            nn.init.xavier_uniform_(layer.weight)
            nn.init.zeros_(cast(Tensor, layer.bias))

    def forward(self, queries: Tensor, memory: Tensor, blocked: Tensor) -> Tensor:
        """Update the queries (B, L, E) from the memory (B, L, E); they attend only where `blocked` (L, L) is False."""
        memory = self.norm_memory(memory)
        read, _ = self.attention(self.norm_queries(queries), memory, memory, attn_mask=blocked, need_weights=False)
        queries = queries + read
        return queries + self.mlp(self.norm_mlp(queries))  # type: ignore[no-any-return]


def to_clusters(tokens: Tensor, grid: tuple[int, int], cluster_size: int) -> Tensor:
    """Reorder tokens (B, L, D) from raster order to the order of clusters, each of cluster_size x cluster_size patches.

    Clusters, and the patches in a cluster, are in row-by-row order.
    """
    (h, w), m = grid, cluster_size
    return tokens.reshape(len(tokens), h // m, m, w // m, m, -1).transpose(2, 3).reshape(len(tokens), h * w, -1)


def from_clusters(tokens: Tensor, grid: tuple[int, int], cluster_size: int) -> Tensor:
    """Reorder tokens back to raster order; the inverse of `to_clusters`."""
    (h, w), m = grid, cluster_size
    return tokens.reshape(len(tokens), h // m, w // m, m, m, -1).transpose(2, 3).reshape(len(tokens), h * w, -1)


def layers_read(num_layers: int, count: int) -> list[int]:
    """Choose `count` of `num_layers` layers, evenly from the middle to the last; 4 of 12 gives 5, 7, 9 and 11.

    Raises:
        ValueError: If there are fewer than `count` layers from the middle to the last.
    """
    if count > num_layers // 2 + 1:
        raise UserError(
            f"ARM: each decoder block reads an encoder layer of its own, from the middle of {num_layers} to the last; "
            f"got decoder_depth {count}. Set it to {num_layers // 2 + 1} or less."
        )
    middle, last = num_layers // 2, num_layers
    return [last - 1 - round((last - middle) * i / max(count - 1, 1)) for i in reversed(range(count))]


def _check_encoder(name: str, init_from: str | None) -> None:
    if name not in VARIANTS:
        source = "" if init_from is None else f" or a source of such an encoder; got init_from {init_from}"
        raise UserError(
            f"ARM: the encoder scans in one direction here and in four afterwards; {name!r} does not. "
            f"Choose {', '.join(VARIANTS)}{source}."
        )


def _check_arguments(encoder_args: dict[str, Any], cluster_size: int, width: int, depth: int, num_heads: int) -> None:
    if "directions" in encoder_args:
        raise UserError(
            f"ARM: pretraining runs in one direction, and four come with load_encoder; "
            f"got encoder_args.directions {encoder_args['directions']}. Leave it out."
        )
    for name, value in {"cluster_size": cluster_size, "decoder_depth": depth, "decoder_num_heads": num_heads}.items():
        if value < 1:
            raise UserError(f"ARM: {name} is at least 1; got {value}.")
    check_widths("ARM", cluster_size=cluster_size, decoder_embed_dim=width)
    if width < 4 or width % 4 or width % num_heads:
        raise UserError(f"ARM: decoder_embed_dim is a multiple of 4 and of decoder_num_heads={num_heads}; got {width}.")
