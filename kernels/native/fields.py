"""Fields of the structs that the native library reads as 64-bit integers."""

import struct

import torch
from torch import Tensor


def float_bits(value: float) -> int:
    """Return the bits of a float32 as an integer; `as_float` in vectors.h reads them."""
    return int(struct.unpack("<i", struct.pack("<f", value))[0])


def head_rows(rows: Tensor | None) -> tuple[int, int, int, int, int]:
    """Return the fields of `HeadRows` in tiles.h: address, whether bfloat16, strides of sequence, token and head.

    Args:
        rows: (B, L, H, width), (B, L, width) or (L, width) with a last stride of 1; None for an absent tensor.
    """
    if rows is None:
        return 0, 0, 0, 0, 0
    batch, token, head = {4: rows.stride()[:3], 3: (*rows.stride()[:2], 0), 2: (0, rows.stride(0), 0)}[rows.ndim]
    return rows.data_ptr(), int(rows.dtype == torch.bfloat16), batch, token, head
