"""Images that a command reads one by one, and the pictures that it writes for each, in a folder of its own."""

from __future__ import annotations

import argparse
import glob
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from torch import Tensor

from ssmpretrain.base.errors import DataError, PathTaken, UserError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.whole_files import replacing
from ssmpretrain.base.wording import few
from ssmpretrain.commands.shared.new_files import prepare_folder
from ssmpretrain.datamodules.decoding.decode import MAX_PIXELS, check_pixels, decode_rgb
from ssmpretrain.datamodules.decoding.named_images import find_named_images
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.image_files import read_file

_log = logging.getLogger(__name__)
_ALL = 2**62


def add_arguments(parser: argparse.ArgumentParser, *, out: str) -> None:
    """Add the images, `--out`, `--limit` and `--force`."""
    parser.add_argument(
        "images",
        nargs="+",
        help='image files, folders of images, or quoted globs: "day/*.jpg"; an orientation in EXIF is not applied',
    )
    parser.add_argument("--out", default=out, metavar="FOLDER", help="folder of the results (default: %(default)s)")
    parser.add_argument("--limit", type=int, help="take only this many images, the first (default: all)")
    parser.add_argument("--force", action="store_true", help="replace files of earlier results")


@dataclass
class Pictures:
    """The images of a command, by the name of their results.

    Attributes:
        paths: File of each image by the name of its results: a relative path without suffix.
        out: Folder of the results.
        where: Start of messages, such as the name of a command.
        bad: Images that could not be used, counted by cause.
    """

    paths: dict[str, Path]
    out: Path
    where: str
    bad: Counter[str] = field(default_factory=Counter)

    def decoded(self) -> Iterator[tuple[str, Tensor]]:
        """Yield name and pixels (3, H, W), uint8, of each image. Name and count those that cannot be used.

        Raises:
            DataError: After the last image, if none could be used.
        """
        for name, path in self.paths.items():
            try:
                content = read_file(path)
                check_pixels(content, MAX_PIXELS)
                image = decode_rgb(content)
            except (BadSample, OSError) as error:
                self._count(path, error)
            else:
                yield name, image
        if sum(self.bad.values()) == len(self.paths):
            raise DataError(f"{self.where}: no image could be used: {self._causes()}. Name other images.")

    def lines(self) -> list[str]:
        """Return a line that counts the images left out, if there are any."""
        return [f"  left out {sum(self.bad.values()):,} of {len(self.paths):,}: {self._causes()}"] if self.bad else []

    def _count(self, path: Path, error: BadSample | OSError) -> None:
        cause, what = (
            (error.cause, error.describe())
            if isinstance(error, BadSample)
            else ("unreadable files", error.strerror or str(error))
        )
        self.bad[cause] += 1
        _log.warning("%s: left out %s: %s", self.where, shown(str(path)), shown(what))

    def _causes(self) -> str:
        return ", ".join(f"{cause} ({count:,})" for cause, count in self.bad.most_common())


def find_pictures(args: argparse.Namespace, results: Sequence[str], *, where: str) -> Pictures:
    """Find the images that the arguments of `add_arguments` name, and check that their results are new.

    Args:
        args: The arguments.
        results: Files of the results in the folder, with {} for the name of an image.
        where: Start of error messages, such as the name of a command.

    Raises:
        UserError: If an image does not exist, two images would have results of one name, or a result exists and
            `--force` is not set.
        OSError: If the folder cannot be made or written to.
    """
    if args.limit is not None and args.limit < 1:
        raise UserError(f"{where}: --limit is at least 1; got {args.limit}. Leave it out for all images.")
    paths = _named(args.images, args.limit or _ALL, where)
    out = Path(args.out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f"{where}: --out is a folder; got the file {args.out}. Name a folder.")
    files = [out / result.format(name) for name in paths for result in results]
    if (taken := [str(file) for file in dict.fromkeys(files) if file.exists()]) and not args.force:
        raise PathTaken(
            f"{where}: results are new files; {shown(few(taken, 1))} of {len(files):,} exist. Give another --out, or "
            "--force to replace them."
        )
    prepare_folder(out / "any")
    return Pictures(paths, out, where)


def save_picture(picture: Tensor, path: Path) -> None:
    """Write a picture (3, H, W), uint8, as PNG, completely or not at all."""
    _save(Image.fromarray(picture.permute(1, 2, 0).cpu().numpy()), path)


def save_class_map(classes: Tensor, colours: Sequence[tuple[int, ...]], path: Path) -> None:
    """Write a class map (H, W) as PNG whose palette indices are the numbers of the classes, at most 256."""
    image = Image.fromarray(classes.cpu().numpy().astype(np.uint8))
    image.putpalette([part for colour in colours for part in colour])
    _save(image, path)


def _save(image: Image.Image, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        image.save(file, "PNG")


def _named(words: Sequence[str], limit: int, where: str) -> dict[str, Path]:
    """Return the image files that files, folders and globs name, at most `limit`, by the names of their results."""
    found: list[tuple[Path, Path]] = []  # file, and its path below the folder that was named
    for word in words:
        path = Path(word).expanduser()
        several = sorted(glob.glob(str(path), recursive=True)) if not path.exists() and glob.has_magic(word) else [word]
        if not several:
            raise DataError(f"{where}: no file matches {word}. Correct the pattern.")
        for one in several:
            base = Path(one).expanduser()
            files = find_named_images([base], limit, where=where)
            found += [(file, file.relative_to(base) if base.is_dir() else Path(file.name)) for file in files]
    found = list(dict.fromkeys(found))[:limit]
    short = Counter(str(relative.with_suffix("")) for _, relative in found)
    names: dict[str, Path] = {}
    for file, relative in found:
        name = str(relative.with_suffix(""))
        name = name if short[name] == 1 else str(relative)  # a.jpg and a.png in one folder
        if name in names:
            raise UserError(
                f"{where}: each image has results of its own name; got {shown(str(names[name]))} and "
                f"{shown(str(file))}. Give one of them to another --out."
            )
        names[name] = file
    return names
