"""Figures of commands: options, output path, and writing."""

from __future__ import annotations

import argparse
import warnings
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import replacing
from ssmpretrain.commands.shared.encoding import add_device
from ssmpretrain.commands.shared.new_files import prepare_folder

_FORMATS = (".png", ".pdf")


def add_arguments(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Add `--out`, `--force` and `--device`."""
    add_out(parser, out)
    add_device(parser)


def add_out(parser: argparse.ArgumentParser, out: str) -> None:
    """Add `--out` with its default, and `--force`."""
    parser.add_argument("--out", default=out, help="the figure, .png or .pdf (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="replace the file if there is one")


def check_out(out: str, *, force: bool, where: str) -> Path:
    """Return the path of a figure to write. Make its folder, and check that it is writable.

    Args:
        out: Path that the user gave.
        force: Whether an existing file may be replaced.
        where: Start of error messages, such as the name of a command.

    Raises:
        ValueError: If the path ends neither in .png nor in .pdf, or if the file exists and `force` is not set.
        OSError: If the folder cannot be made or written to.
    """
    path = Path(out).expanduser()
    if path.suffix.lower() not in _FORMATS:
        raise UserError(f"{where}: --out ends in {' or '.join(_FORMATS)}; got {out}. Name it {path.stem}.png, say.")
    if path.is_dir():
        raise UserError(f"{where}: --out is a file; got the folder {out}. Name a file in it.")
    if path.exists() and not force:
        raise UserError(f"{where}: {out} exists. Give another --out, or --force to replace it.")
    prepare_folder(path)
    return path


def save(figure: Figure, path: Path) -> None:
    """Write a figure completely or not at all. Text in a PDF uses TrueType fonts, which publishers require."""
    with replacing(path) as file, matplotlib.rc_context({"pdf.fonttype": 42}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # of a class name; the figure shows a box
        figure.savefig(file, format=path.suffix[1:].lower(), bbox_inches="tight", pad_inches=0.02)
