"""Maps of features, which every encoder gives, ours and timm's."""

from typing import Any, cast

from torch import Tensor, nn

from ssmpretrain.base.errors import UserError


def last_map(encoder: nn.Module, images: Tensor) -> Tensor:
    """Compute the last map (B, D, h, w) of images (B, 3, H, W), after the final norm where that reads the map.

    Class tokens are left out. The encoder is one of timm's interface: it has `forward_intermediates`.
    """
    maps = cast(Any, encoder).forward_intermediates(
        images, indices=1, norm=True, output_fmt="NCHW", intermediates_only=True
    )
    return cast(Tensor, maps[-1])


def take_indices(
    where: str, what: str, count: int, indices: int | list[int] | tuple[int, ...] | None
) -> tuple[list[int], int]:
    """Return the indices asked of `forward_intermediates`, counted from the start, and the last of them.

    Args:
        where, what: The encoder's name and the word for its parts, for the message.
        count: Parts of the encoder.
        indices: Parts to take: a list, negative ones counted from the end; the last n for a number; all for None.

    Raises:
        ValueError: If there is no such part, or none is named.
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
    """Freeze what an encoder has after its last map, in timm's names: pooling, and the norm of what was pooled.

    A loss of the map gives these no gradient, and distributed training waits for the gradient of all that can have one.
    """
    for name in ("attn_pool", "fc_norm", "head"):
        if isinstance(part := getattr(encoder, name, None), nn.Module):
            part.requires_grad_(False)
