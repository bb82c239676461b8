"""Pictures of predictions: class maps and objects over their image, beside the image itself, with a legend.

Legend: n objects, H x W pixels of the image.
"""

from __future__ import annotations

import colorsys
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.evaluation.dense.masks import Rle, decode_mask

_SMALLEST, _LARGEST = 320, 1024  # pixels of a panel: its shorter side at least, its longer side at most
_MARGIN, _TEXT = 12, 15  # pixels
_INK, _FAINT, _PAPER = (32, 32, 36), (120, 120, 126), (255, 255, 255)
_GOLDEN = 0.618034  # neighbouring classes differ most in hue
_LONGEST_NAME = 28  # characters


def class_colours(num_classes: int) -> list[tuple[int, ...]]:
    """Return a colour for each class, RGB from 0 to 255. The colour of a class does not depend on their number."""
    tones = ((0.72, 0.92), (0.85, 0.70), (0.45, 0.98), (0.60, 0.55))  # saturation and value
    rows = [colorsys.hsv_to_rgb((0.58 + k * _GOLDEN) % 1, *tones[k // 6 % len(tones)]) for k in range(num_classes)]
    return [tuple(int(255 * part) for part in row) for row in rows]


def draw_segmentation(image: Tensor, class_map: Tensor, names: Sequence[str], truth: Tensor | None = None) -> Tensor:
    """Draw an image beside its class map, with thin lines between classes and the share of each class.

    Args:
        image: The image, (3, H, W), uint8.
        class_map: Class of each pixel, (H, W), integers; other numbers than 0 to K - 1 are left blank.
        names: Names of the K classes.
        truth: Labels of the same form, for a further panel.

    Returns:
        The picture, (3, height, width), uint8.

    Raises:
        UserError: If the image is not uint8, or a class map has another size.
    """
    picture, _ = _panel(image)
    colours = class_colours(len(names))
    panels, shares = [_Panel("image", picture)], []
    for title, classes in (("labels", truth), ("prediction", class_map)):
        if classes is not None:
            _check_size(classes, image)
            panels.append(_Panel(title, _with_classes(picture, classes.cpu().numpy(), colours)))
            shares.append([float((classes == k).float().mean()) for k in range(len(names))])
    rows = [_Row(colours[k], f"{_short(names[k])}  {shares[-1][k]:.0%}") for k in _by_share(shares)]
    return _sheet(panels, rows)


def draw_detections(
    image: Tensor,
    boxes: Tensor,
    scores: Tensor,
    classes: Tensor,
    masks: Sequence[Rle] | None,
    names: Sequence[str],
    truth: Mapping[str, Any] | None = None,
) -> Tensor:
    """Draw an image beside its detected objects: boxes with class and score, and masks with thin outlines.

    Args:
        image: The image, (3, H, W), uint8.
        boxes: Corners x1, y1, x2, y2 in pixels of the image, (n, 4).
        scores: Scores (n,).
        classes: Classes (n,), integers from 0 to K - 1.
        masks: Run-length codes of n masks of the size of the image; None if there are no masks.
        names: Names of the K classes.
        truth: Annotation of the image, as `DetectionRecords.add` takes it, for a further panel.

    Returns:
        The picture, (3, height, width), uint8.

    Raises:
        UserError: If the image is not uint8.
    """
    picture, scale = _panel(image)
    colours = class_colours(len(names))
    panels, shown_classes = [_Panel("image", picture)], classes.tolist()
    if truth is not None:
        annotated = _annotated(truth, names)
        panels.append(_Panel("labels", _with_objects(picture, annotated, colours, scale)))
        shown_classes += [one.category for one in annotated]
    found = [
        _Object(box, k, f"{_short(names[k])} {score:.2f}", None if masks is None else masks[number])
        for number, (box, k, score) in enumerate(zip(boxes.tolist(), classes.tolist(), scores.tolist(), strict=True))
    ]
    surest_last = [found[number] for number in scores.argsort(stable=True).tolist()]
    panels.append(_Panel("prediction", _with_objects(picture, surest_last, colours, scale)))
    rows = [
        _Row(colours[k], f"{_short(names[k])} \u00d7 {classes.tolist().count(k)}") for k in sorted(set(shown_classes))
    ]
    return _sheet(panels, rows)


def _by_share(shares: Sequence[Sequence[float]]) -> list[int]:
    """Return the classes that occur, the largest in the last row of shares first."""
    occurring = [k for k in range(len(shares[-1])) if any(row[k] for row in shares)]
    return sorted(occurring, key=lambda k: -shares[-1][k])


class _Panel(NamedTuple):
    title: str
    picture: Image.Image


class _Row(NamedTuple):
    """An entry of the legend."""

    colour: tuple[int, ...]
    text: str


class _Object(NamedTuple):
    box: Sequence[float]  # corners in pixels of the image
    category: int
    label: str
    mask: Rle | None


def _panel(image: Tensor) -> tuple[Image.Image, float]:
    """Return an image at a size that suits a reader, and the factor by which it was resized."""
    if image.dtype != torch.uint8 or image.ndim != 3 or len(image) != 3:
        raise UserError(
            f"drawing: an image is (3, H, W), uint8; got {tuple(image.shape)}, {image.dtype}. Undo the normalisation."
        )
    height, width = image.shape[1:]
    scale = max(1.0, _SMALLEST / min(height, width))
    scale = min(scale, _LARGEST / max(height, width))
    size = (max(1, round(width * scale)), max(1, round(height * scale)))
    picture = Image.fromarray(image.permute(1, 2, 0).cpu().contiguous().numpy())
    return picture.resize(size, Image.Resampling.BICUBIC if scale > 1 else Image.Resampling.LANCZOS), scale


def _check_size(classes: Tensor, image: Tensor) -> None:
    if classes.shape != image.shape[1:]:
        raise UserError(
            f"drawing: a class map has the size of its image, {tuple(image.shape[1:])}; got {tuple(classes.shape)}. "
            "Predict at the size of the image."
        )


def _with_classes(picture: Image.Image, classes: NDArray[Any], colours: Sequence[tuple[int, ...]]) -> Image.Image:
    known = (classes >= 0) & (classes < len(colours))
    numbers = np.where(known, classes, -1).astype(np.int32)
    numbers = np.asarray(Image.fromarray(numbers).resize(picture.size, Image.Resampling.NEAREST))
    return _overlay(picture, np.array(colours)[np.maximum(numbers, 0)], numbers >= 0, _edges(numbers), 0.6)


def _with_objects(
    picture: Image.Image, objects: Sequence[_Object], colours: Sequence[tuple[int, ...]], scale: float
) -> Image.Image:
    """Draw objects in order, the last on top."""
    for one in objects:
        if one.mask is not None:
            mask = Image.fromarray(decode_mask(one.mask)).resize(picture.size, Image.Resampling.NEAREST)
            inside = np.asarray(mask)
            picture = _overlay(picture, np.array(colours[one.category]), inside, _edges(inside) & inside, 0.5)
    picture = picture.copy()
    pen = ImageDraw.Draw(picture)
    for one in objects:
        colour = colours[one.category]
        left, top, right, bottom = (round(number * scale) for number in one.box)
        corners = (left, top, max(left, right - 1), max(top, bottom - 1))
        pen.rectangle(corners, outline=colour, width=2)
        _tag(pen, picture.size, left, top, one.label, colour)
    return picture


def _overlay(
    picture: Image.Image, colour: NDArray[Any], where: NDArray[Any], edge: NDArray[Any], share: float
) -> Image.Image:
    """Blend colour into the pixels `where`, and draw the pixels of the edge in white."""
    pixels = np.asarray(picture).astype(np.float32)
    blended = np.where(where[..., None], pixels * (1 - share) + colour * share, pixels)
    blended[edge] = 255
    return Image.fromarray(blended.round().astype(np.uint8))


def _edges(numbers: NDArray[Any]) -> NDArray[np.bool_]:
    """Return the pixels whose right or lower neighbour is another number, and for masks also the left and upper one."""
    edge = np.zeros(numbers.shape, dtype=bool)
    edge[:, :-1] |= numbers[:, 1:] != numbers[:, :-1]
    edge[:-1] |= numbers[1:] != numbers[:-1]
    if numbers.dtype == bool:
        edge[:, 1:] |= numbers[:, 1:] != numbers[:, :-1]
        edge[1:] |= numbers[1:] != numbers[:-1]
    return edge


def _tag(
    pen: ImageDraw.ImageDraw, size: tuple[int, int], left: int, top: int, text: str, colour: tuple[int, ...]
) -> None:
    """Write a label on a coloured ground, above the corner of a box if there is room, and always inside the picture."""
    font = _font(_TEXT - 2)
    width, height = int(pen.textlength(text, font)) + 8, _TEXT + 4
    x = min(max(left, 0), max(size[0] - width, 0))
    y = top - height if top >= height else max(top, 0)
    y = min(y, max(size[1] - height, 0))
    pen.rectangle((x, y, x + width - 1, y + height - 1), fill=colour)
    pen.text((x + 4, y + height / 2), text, font=font, fill=_readable_on(colour), anchor="lm")


def _readable_on(colour: tuple[int, ...]) -> tuple[int, int, int]:
    luminance = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2]
    return _INK if luminance > 140 else _PAPER


def _annotated(annotation: Mapping[str, Any], names: Sequence[str]) -> list[_Object]:
    found = []
    for one in annotation["objects"]:
        x, y, width, height = one["bbox"]
        label = _short(names[one["category"]]) + (" (crowd)" if one.get("iscrowd") else "")
        found.append(_Object((x, y, x + width, y + height), one["category"], label, one.get("segmentation")))
    return found


def _sheet(panels: Sequence[_Panel], rows: Sequence[_Row]) -> Tensor:
    """Put panels of one size side by side under their titles, and the legend below them."""
    width, height = panels[0].picture.size
    total = _MARGIN + len(panels) * (width + _MARGIN)
    lines = _lines(rows, total - 2 * _MARGIN)
    line, head = _TEXT + 8, _TEXT + 10
    sheet = Image.new("RGB", (total, head + height + _MARGIN + len(lines) * line), _PAPER)
    pen, font = ImageDraw.Draw(sheet), _font(_TEXT)
    for number, panel in enumerate(panels):
        x = _MARGIN + number * (width + _MARGIN)
        pen.text((x, head / 2), panel.title, font=font, fill=_FAINT, anchor="lm")
        sheet.paste(panel.picture, (x, head))
    for number, entries in enumerate(lines):
        y = head + height + _MARGIN / 2 + (number + 0.5) * line
        for x, row in entries:
            pen.rounded_rectangle((_MARGIN + x, y - 6, _MARGIN + x + 18, y + 6), 3, fill=row.colour)
            pen.text((_MARGIN + x + 24, y), row.text, font=font, fill=_INK, anchor="lm")
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1).contiguous()


def _lines(rows: Sequence[_Row], width: int) -> list[list[tuple[int, _Row]]]:
    """Break the legend into lines; each entry has its distance from the left."""
    lines: list[list[tuple[int, _Row]]] = []
    x = width
    for row in rows:
        needed = 24 + int(_font(_TEXT).getlength(row.text)) + 18
        if x + needed > width:
            lines.append([])
            x = 0
        lines[-1].append((x, row))
        x += needed
    return lines


def _short(name: str) -> str:
    name = shown(str(name))
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Load the font that comes with matplotlib; Pillow's own lacks most letters outside English."""
    from matplotlib import get_data_path  # here: drawing is imported with the metrics, and matplotlib is slow

    return ImageFont.truetype(str(Path(get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"), size)
