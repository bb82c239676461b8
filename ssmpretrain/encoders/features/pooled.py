"""Pooled features: one vector per image from the last blocks of an encoder, for probes and nearest neighbours."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, NamedTuple, cast, get_args

import torch
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.maps import normed_map

Pooling = Literal["class", "mean", "middle", "both", "normed"]
POOLINGS: tuple[str, ...] = get_args(Pooling)


class Pooled(NamedTuple):
    """Kind of pooled features: the pooling and the blocks.

    Attributes:
        pooling: "mean": the mean of the patches. "class": the class token, or the mean of several class tokens.
            "middle": the patch in the middle of the map. "both": class token and mean, concatenated. "normed": the
            mean, then the norm that the encoder applies to pooled features (ConvNeXt, MambaOut, a ViT with `fc_norm`).
        last_blocks: Number of last blocks, or of last stages if the encoder has stages. Their vectors are concatenated.
            The final norm is applied to each of them if it has their width.
    """

    pooling: Pooling = "mean"
    last_blocks: int = 1

    def __str__(self) -> str:
        return f"{self.pooling}_{self.last_blocks}"


class BlockFeatures(NamedTuple):
    """Features of one block.

    Attributes:
        map: Features of the patches, (B, D, h, w).
        tokens: Features of all other tokens, (B, n, D); None if no pooling needs a class token.
    """

    map: Tensor
    tokens: Tensor | None


def pooled_in(origin: Mapping[str, Any], path: object) -> Pooled | None:
    """Return the kind of pooled features that a training has written beside its weights; None if it has not.

    Args:
        origin: Origin of the weights, see `describe_weights`.
        path: File of the weights, for messages.

    Raises:
        UserError: If the entry is malformed.
    """
    if (said := origin.get("pooled")) is None:
        return None
    pooling, blocks = (said.get(name) for name in Pooled._fields) if isinstance(said, Mapping) else (None, None)
    if pooling not in POOLINGS or type(blocks) is not int:
        raise UserError(
            f"checkpoint: the entry pooled of {path} has a pooling, one of {', '.join(POOLINGS)}, and a number of "
            f"last_blocks; got {said!r:.80}. Choose them with --pooling and --last-blocks."
        )
    return Pooled(cast(Pooling, pooling), blocks)


def pooled_features(encoder: nn.Module, images: Tensor, kinds: Collection[Pooled]) -> dict[Pooled, Tensor]:
    """Return pooled features, one vector (B, F) per kind, of images in one forward pass.

    Args:
        encoder: An encoder with timm's method `forward_intermediates`.
        images: Normalised images, (B, 3, H, W).
        kinds: Kinds of pooled features, at least one. `Pooled()` is the mean of `last_map`.

    Raises:
        ValueError: If a kind needs a class token, a norm or a block that the encoder lacks.
    """
    check_kinds(encoder, kinds)
    return pool(encoder, last_blocks(encoder, images, kinds), kinds)


def check_kinds(encoder: nn.Module, kinds: Collection[Pooled]) -> None:
    """Raise a ValueError if a kind of pooled features needs a token, a norm or a block that the encoder lacks."""
    if _need_class_token(kinds) and not family_of(encoder).has_class_token(encoder):
        raise UserError(
            f"pooled features: {type(encoder).__name__} has no class token to read. Use the poolings mean and middle."
        )
    if any(kind.pooling == "normed" for kind in kinds) and family_of(encoder).pooled_norm_of(encoder) is None:
        raise UserError(
            f"pooled features: {type(encoder).__name__} has no norm of pooled features, because its last map is "
            "normalised. Use the pooling mean."
        )
    there = len(cast(Any, encoder).feature_info)
    for kind in kinds:
        if not 1 <= kind.last_blocks <= there:
            raise UserError(
                f"pooled features: last_blocks is between 1 and the {there} of {type(encoder).__name__}; "
                f"got {kind.last_blocks}."
            )


def last_blocks(encoder: nn.Module, images: Tensor, kinds: Collection[Pooled]) -> list[BlockFeatures]:
    """Return the features of the last blocks that `pool` needs for `kinds`, in the order of the blocks.

    Args:
        encoder: An encoder with timm's method `forward_intermediates`.
        images: Normalised images, (B, 3, H, W).
        kinds: Kinds of pooled features.
    """
    needs_class = _need_class_token(kinds)
    wanted = {"return_prefix_tokens": True} if needs_class else {}
    taken = cast(Any, encoder).forward_intermediates(
        images,
        indices=max(kind.last_blocks for kind in kinds),
        norm=True,
        output_fmt="NCHW",
        intermediates_only=True,
        **wanted,
    )
    return [BlockFeatures(*one) if needs_class else BlockFeatures(one, None) for one in taken]


def pool(encoder: nn.Module, blocks: Sequence[BlockFeatures], kinds: Collection[Pooled]) -> dict[Pooled, Tensor]:
    """Pool the features of the last blocks, see `last_blocks`, into one vector (B, F) per kind."""
    poolings = {kind.pooling for kind in kinds}
    vectors = [_vectors(encoder, *block, "normed" in poolings) for block in blocks]
    return {
        kind: torch.cat([part for block in vectors[-kind.last_blocks :] for part in _parts(block, kind.pooling)], dim=1)
        for kind in kinds
    }


def pooled_width(encoder: nn.Module, kind: Pooled) -> int:
    """Return F, the length of the pooled features of a kind."""
    widths: list[int] = [info["num_chs"] for info in list(cast(Any, encoder).feature_info)[-kind.last_blocks :]]
    return sum(widths) * (2 if kind.pooling == "both" else 1)


def _need_class_token(kinds: Collection[Pooled]) -> bool:
    return any(kind.pooling in ("class", "both") for kind in kinds)


def _vectors(encoder: nn.Module, features: Tensor, tokens: Tensor | None, normed: bool) -> dict[str, Tensor]:
    """Return the vectors (B, D) of all poolings of one block's map (B, D, h, w) and its other tokens (B, n, D)."""
    h, w = features.shape[2:]
    vectors = {"mean": features.mean(dim=(2, 3)), "middle": features[:, :, h // 2, w // 2]}
    if normed:
        vectors["normed"] = normed_map(encoder, features.mean(dim=(2, 3), keepdim=True)).flatten(1)
    if tokens is not None:
        vectors["class"] = family_of(encoder).class_vector(tokens)
    return vectors


def _parts(vectors: dict[str, Tensor], pooling: str) -> list[Tensor]:
    return [vectors["class"], vectors["mean"]] if pooling == "both" else [vectors[pooling]]
