"""Routes: the orders in which a scan visits the positions of an H x W map.

- "h": row by row.
- "v": column by column.
- "w2", "w7", any "w<size>": window by window, row-major over windows and inside each. At the right and bottom borders
  the windows are smaller; nothing is padded.
- Any of them with "_flip": the same order backwards.

A kernel needs no table. Step t of L = H W visits position row * W + col (of a flipped route, step t is step L - 1 - t):

    "h": row = t // W, col = t % W
    "v": row = t % H, col = t // H
    "w": band = t // (w W)         hb = min(w, H - band w)     t -= band w W         # rows of this band: hb
         j    = t // (hb w)        wb = min(w, W - j w)        t -= j hb w           # columns of this window: wb
         row  = band w + t // wb   col = j w + t % wb
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError

Mode = str | Sequence[str]

MODES: dict[str, tuple[str, ...]] = {
    "cross": ("h", "v", "h_flip", "v_flip"),
    "unidirectional": ("h", "h", "h", "h"),
    "bidirectional": ("h", "h", "h_flip", "h_flip"),
    "cascade": ("h", "h_flip", "v", "v_flip"),
}
"""The route of each set of weights, in VMamba's order. The routes of "cascade" run one after the other and restart in
every row and column (see `cross_selective_scan`), so that its name means more than its list."""


def routes_of(op: str, mode: Mode) -> tuple[str, ...]:
    """Return the routes of a mode, or a sequence of routes as a tuple.

    Args:
        op: The operation's name, which opens the messages.
        mode: A key of MODES or a sequence of route names.

    Raises:
        ValueError: If the mode or a route does not exist, or there is none.
    """
    if isinstance(mode, str):
        if mode not in MODES:
            raise UserError(
                f"{op}: mode is one of {', '.join(MODES)}, or a sequence of routes such as ('h', 'v_flip', 'w7'); "
                f"got {mode!r}. Give one of them."
            )
        return MODES[mode]
    if not isinstance(mode, Sequence):
        raise UserError(f"{op}: mode is a name or a sequence of routes; got {mode!r}. Give one of {', '.join(MODES)}.")
    routes = tuple(mode)
    if not routes:
        raise UserError(f"{op}: mode names at least one route; got an empty sequence. Name one.")
    for route in routes:
        if not _exists(route):
            raise UserError(
                f"{op}: a route is h, v, or w and the size of a window (w2, w7), each also with _flip; got {route!r}. "
                f"Correct it."
            )
    return routes


def split_flip(route: str) -> tuple[str, bool]:
    """Return a route without its "_flip", and whether it had one."""
    return route.removesuffix("_flip"), route.endswith("_flip")


def visiting_order(route: str, height: int, width: int, device: torch.device | None = None) -> Tensor:
    """Return the positions row * W + col in the order in which a route visits them, (H W,), int64."""
    base, flipped = split_flip(route)
    t = torch.arange(height * width, device=device)
    if flipped:
        t = t.flip(0)
    if base == "h":
        return t
    if base == "v":
        return t % height * width + t // height
    size = int(base[1:])
    band = t // (size * width)
    rows = (height - band * size).clamp(max=size)
    t = t - band * size * width
    window = t // (rows * size)
    columns = (width - window * size).clamp(max=size)
    t = t - window * rows * size
    return (band * size + t // columns) * width + window * size + t % columns


def _exists(route: str) -> bool:
    base, _ = split_flip(route)
    return base in ("h", "v") or (base[:1] == "w" and base[1:].isdecimal() and int(base[1:]) > 0)
