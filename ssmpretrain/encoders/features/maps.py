"""Feature maps of encoders of this package and of timm."""

from collections.abc import Sequence
from typing import Any, cast

from timm.layers.format import Format
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.family_registry import family_of


def last_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """Return the last feature map, (B, D, h, w), of images, (B, 3, H, W), without class tokens.

    The map comes after the final norm, unless this norm of the encoder reads pooled features.

    Args:
        encoder: An encoder with timm's method `forward_intermediates`.
        images: Normalised images.
    """
    maps = cast(Any, encoder).forward_intermediates(
        images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return cast(Tensor, maps[-1])


def normed_map(encoder: nn.Module, features: Tensor) -> Tensor:
    """Apply the encoder's norm of pooled features, if it has one, to every position of a map (B, D, h, w).

    ConvNeXt, MambaOut and a ViT with `fc_norm` have such a norm. The maps of other encoders are normalised already and
    are returned unchanged, and so is the map of an earlier stage, which has another width.
    """
    known = family_of(encoder).pooled_norm_of(encoder)
    if known is None or features.shape[1] != cast(Any, encoder).num_features:
        return features
    norm, layout = known
    if layout is Format.NCHW:
        return cast(Tensor, norm(features))
    return cast(Tensor, norm(features.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))


def take_indices(
    where: str, what: str, count: int, indices: int | list[int] | tuple[int, ...] | None
) -> tuple[list[int], int]:
    """Return the indices that `forward_intermediates` takes, counted from the first part, and the largest of them.

    Args:
        where: Name of the encoder, used in the error message.
        what: Word for its parts, such as "blocks", used in the error message.
        count: Number of parts.
        indices: Parts to take. A list gives their indices; negative indices count from the end. A number n takes the
            last n parts, None all parts.

    Raises:
        ValueError: If an index is out of range, or if there is no index.
    """
    if indices is None:
        indices = count
    wanted = list(range(count - indices, count)) if isinstance(indices, int) else list(indices)
    if not 0 < len(wanted) <= count or any(not -count <= index < count for index in wanted):
        raise UserError(
            f"{where}: indices name some of {count} {what}, 0 to {count - 1}, or the last 1 to {count}; got {indices}."
        )
    take = [index % count for index in wanted]
    return take, max(take)


def freeze_after_map(encoder: nn.Module) -> None:
    """Freeze the modules that an encoder applies after its last map: pooling, norm of pooled features and head.

    A loss on the map gives these modules no gradient. Distributed training would wait for their gradients.
    """
    for name in ("attn_pool", "fc_norm", "head", "head_dist", "neck", "norm_neck"):
        if isinstance(part := getattr(encoder, name, None), nn.Module):
            part.requires_grad_(False)


def freeze_all_but(encoder: nn.Module, outputs: Sequence[Tensor]) -> None:
    """Freeze the parameters of an encoder that some outputs of it do not depend on, as autograd has recorded it."""
    read = _leaves(outputs)
    for parameter in encoder.parameters():
        if id(parameter) not in read:
            parameter.requires_grad_(False)


def _leaves(outputs: Sequence[Tensor]) -> set[int]:
    """Return the ids of the parameters that get gradients from some outputs."""
    nodes: list[Any] = [one.grad_fn for one in outputs]
    seen: set[Any] = {None}
    leaves = set()
    while nodes:
        if (node := nodes.pop()) in seen:
            continue
        seen.add(node)
        if hasattr(node, "variable"):
            leaves.add(id(node.variable))
        nodes += [following for following, _ in node.next_functions]
    return leaves
