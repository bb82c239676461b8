"""The figure of `pca`: images, and below each the colours of its patches by each encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from ssmpretrain.commands.feature_pictures.coloured_maps import ColouredMaps
from ssmpretrain.commands.feature_pictures.images import Picture
from ssmpretrain.commands.feature_pictures.sheet import FAINT, SMALL, WIDTH, Sheet, line_height, title_height

_WORD, _GAP, _BETWEEN = 0.2, 0.05, 0.16  # inches: of the word beside rows, between pictures, between blocks of rows
_MOST_COLUMNS = 8


def draw_components(
    pictures: Sequence[Picture], found: Sequence[ColouredMaps], title: str, *, smooth: bool = False
) -> Figure:
    """Draw columns of an image and its coloured maps, one map for each encoder.

    Args:
        pictures: The images, at least one.
        found: Their coloured maps by each encoder.
        title: First line of the title.
        smooth: Whether to interpolate between the patches.
    """
    lines = [f"{one.heading}; {one.describe()}" for one in found]
    count = len(pictures)
    columns = math.ceil(count / math.ceil(count / _MOST_COLUMNS))  # blocks of equal length
    height, width = pictures[0].pixels.shape[1:]
    cell = min(2.4, (WIDTH - _WORD - (columns - 1) * _GAP) / columns)
    cell_height = cell * height / width
    block = (1 + len(found)) * (cell_height + _GAP) + _BETWEEN
    blocks = math.ceil(count / columns)
    sheet = Sheet(title_height(lines) + blocks * block - _BETWEEN + line_height(SMALL) + 0.05)
    sheet.title(title, lines)
    for number, picture in enumerate(pictures):
        x = _WORD + number % columns * (cell + _GAP)
        y = title_height(lines) + number // columns * block
        rows = [("image", picture.pixels, True)]
        rows += [(one.word or "features", one.colours[number], smooth) for one in found]
        for row, (word, pixels, soft) in enumerate(rows):
            top = y + row * (cell_height + _GAP)
            sheet.picture(pixels, x, top, cell, cell_height, soft)
            if number % columns == 0:
                sheet.text(_WORD / 2 - 0.02, top + cell_height / 2, word, SMALL, FAINT, align="center", rotation=90)
    legend = "red, green, blue: the first three principal components of the patch features of all images together"
    sheet.text(_WORD, title_height(lines) + blocks * block - _BETWEEN + 0.03, legend, colour=FAINT)
    return sheet.figure
