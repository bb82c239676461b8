"""A figure on which pictures and words are placed in inches, from the top left."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Rectangle
from matplotlib.textpath import text_to_path
from torch import Tensor

from ssmpretrain.base.shown_names import shown

WIDTH = 7.4  # inches; a README shows 1480 pixels as about 900
INK, FAINT = "#202024", "#6A6A70"
TITLE, SMALL = 9.0, 6.5  # points
_DPI = 200
_MARGIN = 0.08  # inches
_LINE = 1.45  # height of a line of text in its size
_LINE_OF_TITLE = SMALL + 1  # points


class Sheet:
    """A figure with one canvas.

    Args:
        height: Height in inches; the width is `WIDTH`. Both are without a thin margin.

    Attributes:
        figure: The figure.
    """

    def __init__(self, height: float) -> None:
        size = (WIDTH + 2 * _MARGIN, height + 2 * _MARGIN)
        self.figure = Figure(figsize=size, dpi=_DPI)  # not pyplot: its backend is the user's choice
        self._axes = self.figure.add_axes((0, 0, 1, 1))
        self._axes.set(xlim=(-_MARGIN, WIDTH + _MARGIN), ylim=(height + _MARGIN, -_MARGIN), autoscale_on=False)
        self._axes.axis("off")

    def picture(self, pixels: Tensor, x: float, y: float, width: float, height: float, smooth: bool = True) -> None:
        """Place a picture (3, H, W), uint8 or in [0, 1]; `smooth` interpolates between pixels that are enlarged."""
        enlarged = pixels.shape[2] < width * _DPI
        interpolation = "nearest" if not smooth else "bilinear" if enlarged else "antialiased"
        self._axes.imshow(
            pixels.permute(1, 2, 0).numpy(),
            extent=(x, x + width, y + height, y),
            interpolation=interpolation,
            aspect="auto",
        )

    def frame(self, x: float, y: float, width: float, height: float, colour: str, points: float) -> None:
        """Draw a frame around a place, outside of it."""
        out = points / 72 / 2
        self._axes.add_patch(
            Rectangle(
                (x - out, y - out), width + 2 * out, height + 2 * out,
                fill=False, edgecolor=colour, linewidth=points, joinstyle="miter",
            )
        )  # fmt: skip

    def text(
        self, x: float, y: float, words: str, size: float = SMALL, colour: str = INK, bold: bool = False,
        align: str = "left", rotation: float = 0,
    ) -> None:  # fmt: skip
        """Write a line whose top is at y, and whose left, centre or right is at x."""
        self._axes.text(
            x, y, shown(words), size=size, color=colour, weight="bold" if bold else "normal", ha=align,
            va="center" if rotation else "top", rotation=rotation, parse_math=False,
        )  # fmt: skip

    def title(self, title: str, lines: Sequence[str]) -> None:
        """Write the title and the lines below it at the top; they take `title_height` of the lines."""
        self.text(0, 0, title, TITLE, bold=True)
        for number, line in enumerate(lines):
            line = fitted(line, WIDTH, _LINE_OF_TITLE)
            self.text(0, line_height(TITLE) + number * line_height(_LINE_OF_TITLE), line, _LINE_OF_TITLE, FAINT)


def line_height(size: float) -> float:
    """Return the height in inches of a line of text with a size in points."""
    return _LINE * size / 72


def title_height(lines: Sequence[str]) -> float:
    """Return the height in inches of a title with lines below it, and of the space below."""
    return line_height(TITLE) + len(lines) * line_height(_LINE_OF_TITLE) + 0.1


def fitted(words: str, width: float, size: float = SMALL) -> str:
    """Return a text that is cut so that it fits into a width in inches; printable, see `shown`."""
    words = cut = shown(words)
    while len(cut) > 2 and _width(cut, size) > width:
        words = words[:-1]
        cut = f"{words}\u2026"
    return cut


@lru_cache(maxsize=4096)
def _width(words: str, size: float) -> float:
    width, _, _ = text_to_path.get_text_width_height_descent(words, FontProperties(size=size), ismath=False)
    return float(width) / 72
