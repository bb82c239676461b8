"""The figure of `pca`: images, and beside or below each the colours of its patches by each encoder."""

from __future__ import annotations

import math
from collections.abc import Sequence

from matplotlib.figure import Figure

from ssmpretrain.commands.feature_pictures.coloured_maps import ColouredMaps
from ssmpretrain.commands.feature_pictures.images import Picture
from ssmpretrain.commands.feature_pictures.sheet import FAINT, SMALL, WIDTH, Sheet, line_height, title_height

_GAP, _BETWEEN = 0.05, 0.16  # inches: between pictures, and between blocks of rows
_WORD = 0.2  # inches of a word at the left
_ABREAST, _LARGEST = 8, 2.4  # images in a row, and the largest width of a picture in inches
_FEW = 3  # images that get a row each
_LEGEND = "red, green, blue: the first three principal components of the patch features of all images together"


def draw_components(
    pictures: Sequence[Picture], found: Sequence[ColouredMaps], title: str, *, smooth: bool = False
) -> Figure:
    """Draw each image and its coloured maps, one map for each encoder: a column for each of many images, else a row.

    Args:
        pictures: The images, at least one.
        found: Their coloured maps by each encoder.
        title: First line of the title.
        smooth: Whether to interpolate between the patches.
    """
    lines = [f"{one.heading}; {one.describe()}" for one in found]
    words = ["image", *(one.word or "features" for one in found)]
    height, width = pictures[0].pixels.shape[1:]
    grid = (_Rows if len(pictures) <= _FEW else _Columns)(len(pictures), len(words), height / width)
    top = title_height(lines)
    sheet = Sheet(top + grid.height + 0.05 + line_height(SMALL))
    sheet.title(title, lines)
    for number, picture in enumerate(pictures):
        versions = [(picture.pixels, True), *((one.colours[number], smooth) for one in found)]
        for version, (pixels, soft) in enumerate(versions):
            x, y = grid.place(number, version)
            sheet.picture(pixels, x, top + y, grid.cell, grid.cell_height, soft)
    for x, y, version in grid.words():
        sheet.text(x, top + y, words[version], SMALL, FAINT, align="center", rotation=grid.rotation)
    sheet.text(grid.left, top + grid.height + 0.05, _LEGEND, colour=FAINT)
    return sheet.figure


class _Rows:
    """Places in inches: a row for each image, a column for each version of it, with words above the columns."""

    left, rotation = 0.0, 0

    def __init__(self, images: int, versions: int, aspect: float) -> None:
        self._versions, self._above = versions, line_height(SMALL) + 0.03
        self.cell = min(_LARGEST, (WIDTH - (versions - 1) * _GAP) / versions)
        self.cell_height = self.cell * aspect
        self.height = self._above + images * (self.cell_height + _GAP) - _GAP

    def place(self, image: int, version: int) -> tuple[float, float]:
        return version * (self.cell + _GAP), self._above + image * (self.cell_height + _GAP)

    def words(self) -> list[tuple[float, float, int]]:
        return [(version * (self.cell + _GAP) + self.cell / 2, 0, version) for version in range(self._versions)]


class _Columns:
    """Places in inches: a column for each image, below each other its versions, with words at the left; in blocks."""

    left, rotation = _WORD, 90

    def __init__(self, images: int, versions: int, aspect: float) -> None:
        blocks = math.ceil(images / _ABREAST)
        self._versions, self._blocks = versions, blocks
        self._columns = math.ceil(images / blocks)  # blocks of almost equal length
        self.cell = min(_LARGEST, (WIDTH - _WORD - (self._columns - 1) * _GAP) / self._columns)
        self.cell_height = self.cell * aspect
        self._block = versions * (self.cell_height + _GAP) - _GAP + _BETWEEN
        self.height = blocks * self._block - _BETWEEN

    def place(self, image: int, version: int) -> tuple[float, float]:
        block, column = divmod(image, self._columns)
        return _WORD + column * (self.cell + _GAP), block * self._block + version * (self.cell_height + _GAP)

    def words(self) -> list[tuple[float, float, int]]:
        firsts = [(version, self.place(block * self._columns, version)[1]) for block in range(self._blocks)
                  for version in range(self._versions)]  # fmt: skip
        return [(_WORD / 2 - 0.02, y + self.cell_height / 2, version) for version, y in firsts]
