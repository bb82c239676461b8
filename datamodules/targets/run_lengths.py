"""Run-length codes of masks: COCO's compressed form, encoded and decoded with NumPy alone.

A mask is read column by column, from the top left. Its code counts the pixels of each run; the first run is of zeros
and may be empty. The compressed form is a text: runs from the fourth on are stored as the difference to the run before
the previous one, in groups of five bits, lowest first. A group is one character, 48 plus the bits, plus 32 if more
groups of the number follow; the highest bit of the last group is the sign.

Source: the public format of the COCO data set, https://cocodataset.org/#format-data.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rle = dict[str, Any]  # size: [height, width] in pixels; counts: the compressed runs, a str
Runs = NDArray[np.int64]
_BITS = 5
_MOST_GROUPS = 7  # of a number: 34 bits and the sign, more than the pixels of any image


def encode_mask(mask: NDArray[Any]) -> Rle:
    """Encode a mask (h, w), bool or 0 and 1."""
    pixels = np.asarray(mask, dtype=bool).ravel(order="F")
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    edges = np.concatenate([[0], changes, [pixels.size]])
    runs = np.diff(edges)
    if pixels.size and pixels[0]:
        runs = np.concatenate([[0], runs])
    return encode_runs(runs, mask.shape[0], mask.shape[1])


def decode_mask(code: Rle) -> NDArray[np.bool_]:
    """Decode a code to a mask (h, w), bool.

    Raises:
        ValueError: As `decode_runs`.
    """
    h, w = code["size"]
    runs = decode_runs(code)
    values = (np.arange(len(runs)) & 1).astype(bool)
    return np.repeat(values, runs).reshape(w, h).T


def encode_runs(runs: Sequence[int] | Runs, h: int, w: int) -> Rle:
    """Return the compressed code of a mask of h x w pixels from the lengths of its runs."""
    numbers = np.asarray(runs, dtype=np.int64).copy()
    numbers[3:] -= np.asarray(runs, dtype=np.int64)[1:-2]
    groups = np.empty((len(numbers), _MOST_GROUPS), dtype=np.uint8)
    is_used = np.zeros(groups.shape, dtype=bool)
    is_open = np.ones(len(numbers), dtype=bool)  # whether more bits of the number follow
    for place in range(_MOST_GROUPS):
        bits = numbers & 31
        numbers >>= _BITS
        is_used[:, place] = is_open
        is_open = is_open & (numbers != np.where(bits & 16, -1, 0))
        groups[:, place] = 48 + bits + 32 * is_open
    return {"size": [int(h), int(w)], "counts": groups[is_used].tobytes().decode("ascii")}


def decode_runs(code: Rle) -> Runs:
    """Return the lengths of the runs of a compressed code, beginning with zeros, int64.

    Raises:
        ValueError: If the text is no code, or its runs do not add up to the pixels of the mask. The message says why,
            as the end of a sentence.
    """
    h, w = code["size"]
    text = np.frombuffer(code["counts"].encode("ascii", "replace"), dtype=np.uint8).astype(np.int64) - 48
    if text.size and (text.min() < 0 or text.max() > 63):
        raise ValueError("its counts have a character that no code has")
    runs = _undo_differences(_numbers(text))
    check_runs(runs, h, w)
    return runs


def count_pixels(code: Rle) -> int:
    """Return the number of pixels of a mask.

    Raises:
        ValueError: As `decode_runs`.
    """
    return int(decode_runs(code)[1::2].sum())


def check_runs(runs: Runs, h: int, w: int) -> None:
    """Raise a ValueError if the lengths of runs are not those of a mask of h x w pixels."""
    if runs.size and runs.min() < 0:
        raise ValueError("a run has a negative length")
    if (total := int(runs.sum())) != h * w:
        raise ValueError(f"its runs have {total:,} pixels instead of {h * w:,}")


def _numbers(text: Runs) -> Runs:
    """Join groups of five bits to signed numbers."""
    ends = np.flatnonzero(text & 32 == 0)
    if text.size and (not ends.size or ends[-1] != text.size - 1):
        raise ValueError("its counts are cut off")
    starts = np.concatenate([[0], ends[:-1] + 1]) if ends.size else ends
    lengths = ends - starts + 1
    if ends.size and lengths.max() > _MOST_GROUPS:
        raise ValueError("its counts have a number that no image can have")
    place = np.arange(text.size) - np.repeat(starts, lengths)
    numbers = np.add.reduceat((text & 31) << (_BITS * place), starts) if ends.size else ends
    signed: Runs = numbers - ((text[ends] & 16 != 0).astype(np.int64) << (_BITS * lengths))
    return signed


def _undo_differences(numbers: Runs) -> Runs:
    runs = numbers.copy()
    runs[1::2] = np.cumsum(numbers[1::2])
    runs[2::2] = np.cumsum(numbers[2::2])
    return runs
