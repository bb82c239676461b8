"""Checkpoints on disk: one file, or a folder of parts, and their checksum files.

A checkpoint in parts is a folder with one file per rank, for models that are too large for a single process. The
checksum of a file `NAME` is in `NAME.sha256` (its sidecar), which `sha256sum -c` can read. The first line of the
sidecar is a comment with the size of the file.
"""

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from ssmpretrain.base.errors import UserError
from ssmpretrain.base.whole_files import sha256_of

_WEIGHT_SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors", ".tar", ".bin")
# Weights in the folder of a run, and in the folders that timm and open_clip read.
_IN_FOLDERS = (
    "checkpoints/last.ckpt", "model.safetensors",
    "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin",
)  # fmt: skip
_MAX_LISTED = 5
_LONGEST_SIDECAR = 1000  # bytes
_SIDECAR = re.compile(r"(?:# (\d+) bytes\n)?([0-9a-f]{64}) [ *](.+)\n?")


def weights_in(path: str | Path) -> Path:
    """Return the path of the weights in a folder of a run, of timm or of open_clip. Other paths do not change."""
    path = Path(path).expanduser()
    found = (path / inside for inside in _IN_FOLDERS)
    return next((inside for inside in found if inside.is_file() or is_parts(inside)), path)


def files_of(path: str | Path) -> list[Path]:
    """Return the file of a checkpoint, or all of its parts.

    Raises:
        ValueError: If the file does not exist (the message lists similar names), or if a part is missing.
    """
    path = Path(path).expanduser()
    if is_parts(path):
        return parts_in(path)
    if path.is_dir():
        entries = sorted([*path.iterdir(), *path.glob("checkpoints/*")])
        found = [str(entry.relative_to(path)) for entry in entries if entry.suffix in _WEIGHT_SUFFIXES]
        holds = f"It holds {', '.join(found[:_MAX_LISTED])}." if found else "It holds no checkpoint."
        raise UserError(f"checkpoint: path names a file; got the folder {path}. {holds}")
    if path.is_file():
        return [path]
    if path.exists():
        raise UserError(f"checkpoint: path names a regular file; {path} is a device, a pipe or a socket. Pass a file.")
    if path.is_symlink():
        raise UserError(f"checkpoint: {path} is a link to {path.readlink()}, which does not exist. Pass a file.")
    hint = f"There is no folder {path.parent} either." if not path.parent.is_dir() else ""
    if not hint:
        beside = [entry.name for entry in path.parent.iterdir() if entry.suffix in _WEIGHT_SUFFIXES]
        near = difflib.get_close_matches(path.name, beside, n=3, cutoff=0.4) or sorted(beside)[:3]
        hint = f"Beside it: {', '.join(near)}." if near else f"No checkpoint is in the folder {path.parent.resolve()}."
    raise UserError(f"checkpoint: no such file: {path}. {hint}")


def part_path(folder: str | Path, rank: int, world: int) -> Path:
    """Return the path of the file of one rank in a checkpoint in parts; `world` is the number of ranks."""
    return Path(folder) / f"part-{rank:05d}-of-{world:05d}.ckpt"


def is_parts(path: str | Path) -> bool:
    """Return whether a path is the folder of a checkpoint in parts."""
    return any(Path(path).glob("part-00000-of-*.ckpt"))


def parts_in(folder: str | Path) -> list[Path]:
    """Return the files of a checkpoint in parts, in the order of the ranks.

    Raises:
        ValueError: If a part is missing.
    """
    first = min(Path(folder).glob("part-00000-of-*.ckpt"), default=None)
    if first is None:
        raise UserError(f"checkpoint: {folder} is a folder without part-00000 of a checkpoint.")
    paths = [part_path(folder, rank, world) for world in [int(first.stem.rsplit("-", 1)[1])] for rank in range(world)]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise UserError(f"checkpoint: {folder} lacks {len(missing)} of {len(paths)} parts, first {missing[0]}.")
    return paths


class Sidecar(NamedTuple):
    """Content of a `.sha256` file.

    Attributes:
        size: Size of the checkpoint in bytes; None if the file does not contain it.
        sha256: Checksum of the checkpoint, in hexadecimal.
        name: Name of the checkpoint when the `.sha256` file was written.
    """

    size: int | None
    sha256: str
    name: str


def sidecar(path: Path) -> Path:
    """Return the path of the `.sha256` file of a checkpoint file."""
    return path.with_name(path.name + ".sha256")


def sidecar_text(path: Path, size: int, sha256: str) -> str:
    """Return the text of the `.sha256` file of a checkpoint file.

    Args:
        path: Path of the checkpoint file.
        size: Size of the checkpoint file in bytes.
        sha256: Its checksum, in hexadecimal.
    """
    return f"# {size} bytes\n{sha256}  {path.name}\n"


def read_sidecar(path: Path) -> Sidecar | None:
    """Return the content of the `.sha256` file of a checkpoint file; None if there is no such file or it is invalid."""
    beside = sidecar(path.resolve())
    try:
        if not beside.is_file():  # opening a pipe would wait
            return None
        with beside.open("rb") as file:
            match = _SIDECAR.fullmatch(file.read(_LONGEST_SIDECAR).decode())
    except (OSError, UnicodeDecodeError):
        return None
    return Sidecar(int(match[1]) if match[1] else None, match[2], match[3]) if match else None


def contradiction(path: Path) -> str | None:
    """Return a text that says how a file differs from its `.sha256` file; None if it does not, or there is none."""
    path = path.resolve()  # a running training replaces the link last.ckpt
    noted = read_sidecar(path)
    if noted is None:
        return None
    state = path.stat()
    if noted.size is not None and state.st_size < noted.size:
        return f"short: {state.st_size:,} of {noted.size:,} bytes"
    if noted.size is not None and state.st_size > noted.size:
        return f"long: {state.st_size:,} bytes instead of {noted.size:,}"
    with path.open("rb") as file:
        sha256 = sha256_of(file.fileno())
    if sha256 != noted.sha256:
        return "its checksum differs from the one in its .sha256"
    return None


def check_whole(files: Iterable[Path]) -> None:
    """Raise a ValueError if a file differs from its `.sha256` file. Safetensors files have their checksum inside."""
    for path in files:
        try:
            difference = None if path.suffix == ".safetensors" else contradiction(path)
        except OSError:
            continue  # reading the file raises a clear error
        if difference is not None:
            raise UserError(f"checkpoint: {path} is damaged ({difference}). Take an earlier one, or fetch it again.")
