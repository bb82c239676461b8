"""Images in a folder, and the classes that its sub-folders name."""

import os
import stat
from collections import Counter, defaultdict, deque
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from ssmpretrain.base.errors import DataError
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.wording import few
from ssmpretrain.datamodules.files.folders import find_folder
from ssmpretrain.datamodules.files.local_files import read_within

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp")
MET = "folders that are read already, or hold this one"
LEAVING = "links that leave the folder, which --follow-links would follow"
_SPECIAL = "pipes, sockets and devices"
_CLOSED = "folders that cannot be read"
_MOST_BYTES = 1 << 30  # bytes of one file; no image is so large


@dataclass(frozen=True)
class ImageFiles:
    """Images below a folder, in sorted order.

    Args:
        folder: The folder that was searched.
        paths: Paths of the images, relative to the folder, with "/".
        classes: Names of the first-level sub-folders that hold images, sorted; empty if all images lie in the folder
            itself.
        left_out: Relative paths that were skipped, by the reason.
        follow_links: Whether links out of the folder were followed.
    """

    folder: Path
    paths: list[str]
    classes: list[str]
    left_out: Mapping[str, Sequence[str]]
    follow_links: bool

    def class_of(self, path: str) -> str | None:
        """Return the class of a relative path, its first sub-folder; None for an image in the folder itself."""
        first, separator, _ = path.partition("/")
        return first if separator else None

    def is_outside(self, path: Path) -> bool:
        """Return whether a path is a link that leaves the folder and must not be followed."""
        return not self.follow_links and path.is_symlink() and _leaves(path, self.folder)


def find_images(folder: str | Path, *, where: str, follow_links: bool = True) -> ImageFiles:
    """Find the images (jpg, jpeg, png, webp) in a folder and all folders below it; skip hidden files and folders.

    Each folder is read once: under its real name if it lies below `folder`, otherwise under the name of the first link
    to it. Parents of `folder` are not entered. Pipes and devices are not images, whatever their names are.

    Args:
        folder: The folder to search.
        where: Name of the class or command, which opens every message.
        follow_links: Whether links that leave the folder are followed. Links within the folder are always followed.

    Raises:
        FileNotFoundError: If the folder does not exist.
        DataError: If it holds no image. The message says what it holds.
    """
    root = find_folder(str(folder), where=where)
    walk = _Walk(root, follow_links)
    if not walk.images:
        holds = ", ".join(f"{count:,} {shown(suffix)}" for suffix, count in walk.others.most_common(3)) or "no files"
        holds += "".join(f"; {line}" for line in describe_left_out(walk.left_out))
        raise DataError(
            f"{where}: no image ({', '.join(IMAGE_EXTENSIONS)}) in {root}, which holds {holds}. Give another folder."
        )
    paths = sorted(walk.images)
    classes = sorted({path.partition("/")[0] for path in paths if "/" in path})
    return ImageFiles(root, paths, classes, walk.left_out, follow_links)


def describe_left_out(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """Return one line for each reason, with the number of paths left out and examples."""
    return [f"left out {len(paths):,}: {reason}: {shown(few(paths, 3))}" for reason, paths in left_out.items()]


def read_file(path: str | Path) -> bytes:
    """Read a whole regular file. Pipes are refused because they may block, and devices because they may never end.

    Raises:
        OSError: If the file cannot be read, is not a regular file, or is larger than 1 GiB.
    """
    return read_within(Path(path), _MOST_BYTES)


def _leaves(path: str | Path, folder: Path) -> bool:
    """Return whether links in a path lead out of a folder."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(folder))


class _Walk:
    """Walk over everything below a folder.

    Real folders come before links to folders, so that each folder gets its real name if it has one below the root.
    """

    def __init__(self, root: Path, follow_links: bool) -> None:
        self.images: list[str] = []
        self.others: Counter[str] = Counter()  # files by suffix
        self.left_out: defaultdict[str, list[str]] = defaultdict(list)
        self._root, self._follow_links = root, follow_links
        self._met: set[tuple[int, int]] = set()  # (device, inode) of folders not to enter again, with all parents
        for above in Path(os.path.realpath(root)).parents:
            with suppress(OSError):
                self._meet(above)
        self._folders, self._links = deque([""]), deque[str]()
        while self._folders or self._links:
            if self._folders:
                self._enter(self._folders.popleft())
            else:
                self._enter_link(self._links.popleft())

    def _meet(self, folder: Path) -> bool:
        """Note a folder; return whether it is met for the first time."""
        status, known = folder.stat(), len(self._met)
        self._met.add((status.st_dev, status.st_ino))
        return len(self._met) > known

    def _enter_link(self, relative: str) -> None:
        path = self._root / relative
        if Path(os.path.realpath(path.parent)).is_relative_to(os.path.realpath(path)):
            self.left_out[MET].append(relative)
        elif not self._follow_links and _leaves(path, self._root):
            self.left_out[LEAVING].append(relative)
        else:
            self._enter(relative)

    def _enter(self, relative: str) -> None:
        path = self._root / relative
        try:
            if not self._meet(path):
                self.left_out[MET].append(relative)
                return
            with os.scandir(path) as entries:
                for entry in sorted(entries, key=lambda entry: entry.name):
                    if not entry.name.startswith("."):
                        self._note(entry, f"{relative}/{entry.name}" if relative else entry.name)
        except OSError:
            self.left_out[_CLOSED].append(relative or ".")

    def _note(self, entry: "os.DirEntry[str]", relative: str) -> None:
        suffix = os.path.splitext(entry.name)[1].lower()
        link = entry.is_symlink()
        try:
            mode = entry.stat().st_mode if link else 0
        except OSError:  # a broken link: reading it later gives the error
            mode = stat.S_IFREG
        if stat.S_ISDIR(mode) or entry.is_dir(follow_symlinks=False):
            (self._links if link else self._folders).append(relative)
        elif suffix[1:] not in IMAGE_EXTENSIONS:
            self.others[suffix or "no suffix"] += 1
        elif not (stat.S_ISREG(mode) or entry.is_file(follow_symlinks=False)):
            self.left_out[_SPECIAL].append(relative)
        elif link and not self._follow_links and _leaves(entry.path, self._root):
            self.left_out[LEAVING].append(relative)
        else:
            self.images.append(relative)
