"""The figure of `neighbours`: a row of pictures for each query and encoder."""

from __future__ import annotations

from collections.abc import Sequence

from matplotlib.figure import Figure

from ssmpretrain.commands.feature_pictures.images import Picture
from ssmpretrain.commands.feature_pictures.neighbour_search import Neighbourhood, QueryRow
from ssmpretrain.commands.feature_pictures.sheet import FAINT, SMALL, WIDTH, Sheet, fitted, line_height, title_height
from ssmpretrain.evaluation.nearest_so_far import Near

# Colours of Wong's palette, which people with the usual kinds of colour blindness tell apart; a sign says the same.
_SAME, _OTHER = "#009E73", "#D55E00"
_WORD, _GAP, _BETWEEN = 0.18, 0.09, 0.16  # inches: of the word beside rows, between neighbours, beside a query
_FRAME = 1.5  # points
_LARGER = 1.7  # size of a query beside several rows
_LABELS = 2 * line_height(SMALL) + 0.06


def draw_neighbours(found: Sequence[Neighbourhood], title: str) -> Figure:
    """Draw the queries at the left and their neighbours at the right, nearest first, a row for each encoder.

    Below each neighbour stands its cosine similarity, and its class if it is known. The frame and a sign say whether
    this is the class of the query.

    Args:
        found: The neighbours by each encoder, of the same queries; at least one query.
        title: First line of the title.
    """
    lines = [_line(one) for one in found]
    layout = _Layout(found)
    sheet = Sheet(title_height(lines) + layout.height * len(found[0].rows) + 0.04 + line_height(SMALL))
    sheet.title(title, lines)
    y = title_height(lines)
    for rows in zip(*(one.rows for one in found), strict=True):
        _query(sheet, layout, rows[0].query, y)
        for number, (one, row) in enumerate(zip(found, rows, strict=True)):
            top = y + number * layout.row_height
            sheet.text(layout.word_x, top + layout.cell_height / 2, one.word, SMALL, FAINT, align="center", rotation=90)
            _neighbours(sheet, layout, row, top)
        y += layout.height
    _legend(sheet, found, y + 0.04)
    return sheet.figure


def _line(found: Neighbourhood) -> str:
    same, total = found.matches()
    return f"{found.heading}: {same} of {total} of the same class ({same / total:.0%})" if total else found.heading


class _Layout:
    """Sizes and places in inches.

    The pictures of one query take `height`, each row of neighbours in it `row_height`. A query that stands beside
    several rows is larger.
    """

    def __init__(self, found: Sequence[Neighbourhood]) -> None:
        k = max(2, *(len(row.near) for one in found for row in one.rows))
        height, width = found[0].rows[0].query.pixels.shape[1:]
        larger, word = (_LARGER, _WORD) if len(found) > 1 else (1.0, 0.0)
        self.cell = min(1.2, (WIDTH - _BETWEEN - word - (k - 1) * _GAP) / (k + larger))
        self.cell_height = self.cell * height / width
        self.query, self.query_height = larger * self.cell, larger * self.cell_height
        self.row_height = self.cell_height + _LABELS
        self.height = self.row_height * len(found) + (0.08 if len(found) > 1 else 0.0)
        self.left = self.query + _BETWEEN + word
        self.word_x = self.left - word / 2 - 0.04


def _query(sheet: Sheet, layout: _Layout, query: Picture, y: float) -> None:
    sheet.picture(query.pixels, 0, y, layout.query, layout.query_height)
    name = query.label if query.label is not None else query.key.rpartition("/")[2]
    centre, below = layout.query / 2, y + layout.query_height + 0.04
    sheet.text(centre, below, fitted(name, layout.query), bold=True, align="center")
    sheet.text(centre, below + line_height(SMALL), "query", colour=FAINT, align="center")


def _neighbours(sheet: Sheet, layout: _Layout, row: QueryRow, y: float) -> None:
    for number, near in enumerate(row.near):
        x = layout.left + number * (layout.cell + _GAP)
        sheet.picture(near.item.pixels, x, y, layout.cell, layout.cell_height)
        matches = _matches(row.query, near)
        if matches is not None:
            sheet.frame(x, y, layout.cell, layout.cell_height, _SAME if matches else _OTHER, _FRAME)
        centre, below = x + layout.cell / 2, y + layout.cell_height + 0.04
        copy = " copy" if near.item.looks_like(row.query) else ""
        sheet.text(centre, below, f"{near.similarity:.3f}{copy}", colour=FAINT, align="center")
        name = "" if near.item.label is None else near.item.label
        sign, colour = {True: ("\u2713 ", _SAME), False: ("\u2717 ", _OTHER), None: ("", FAINT)}[matches]
        sheet.text(
            centre, below + line_height(SMALL), fitted(f"{sign}{name}", layout.cell), colour=colour, align="center"
        )


def _matches(query: Picture, near: Near[Picture]) -> bool | None:
    """Return whether a neighbour has the class of the query; None if one of the classes is not known."""
    return None if None in (query.label, near.item.label) else query.label == near.item.label


def _legend(sheet: Sheet, found: Sequence[Neighbourhood], y: float) -> None:
    words = ["below each neighbour: cosine similarity of its feature to the query's"]
    if any(total for one in found for _, total in [one.matches()]):
        words.append("\u2713 green: the class of the query, \u2717 orange: another class")
    if any(row.duplicates() for one in found for row in one.rows):
        words.append("copy: all pixels equal")
    sheet.text(0, y, "; ".join(words), colour=FAINT)
