"""Packing: samples are written into tars of equal size, each complete or absent and with an index beside it."""

import io
import os
import re
import tarfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from webdataset.tariterators import base_plus_ext

from ssmpretrain.base.errors import DataError, PathTaken
from ssmpretrain.base.seeds import random_generator
from ssmpretrain.base.shown_names import shown
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.base.wording import few
from ssmpretrain.datamodules.faults.bad_samples import BadSample
from ssmpretrain.datamodules.files.image_files import LEAVING, ImageFiles, describe_left_out, read_file
from ssmpretrain.datamodules.labels.classes import CLASSES_FILE, Classes, read_classes
from ssmpretrain.datamodules.shards.folder_index import write_folder_indexes
from ssmpretrain.datamodules.tar.index import ShardIndex, write_index

CAPTION_EXTENSIONS = ("txt", "json")


class ShardWriter:
    """Context manager that writes samples to `prefix-000000.tar`, `prefix-000001.tar`, ...

    A shard is written under a hidden name, and renamed when it is complete; then its index is written. The bytes depend
    on the samples alone. After an error, the unfinished shard is removed, and earlier shards stay.

    Args:
        folder: Folder of the shards; it is created if necessary.
        prefix: Start of every file name.
        samples_per_shard: Largest number of samples in a shard, at least 1.
        bytes_per_shard: Largest size of a shard in bytes. Only a shard with a single sample may be larger.

    Raises:
        FileExistsError: If the folder already has a shard or index with this prefix.
        DataError: If the folder cannot be written.
    """

    def __init__(
        self, folder: Path, prefix: str, *, samples_per_shard: int = 10_000, bytes_per_shard: int = 1 << 30
    ) -> None:
        assert samples_per_shard > 0 and bytes_per_shard > 0
        self.folder = folder
        self.prefix = prefix
        self.samples_per_shard = samples_per_shard
        self.bytes_per_shard = bytes_per_shard
        self.shards: list[ShardIndex] = []
        self._tar: tarfile.TarFile | None = None
        self._in_shard = 0
        self._make_folder()

    def __enter__(self) -> "ShardWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if kind is None:
            self._finish()
            write_folder_indexes(self.shards)
        elif self._tar is not None:
            self._tar.close()
            self._partial.unlink(missing_ok=True)

    def write(self, key: str, fields: Mapping[str, bytes]) -> None:
        """Append one sample.

        Args:
            key: Unique name of the sample. The part after the last "/" has no dot.
            fields: Contents of the members, by extension; at least one.
        """
        assert fields and all(base_plus_ext(f"{key}.{name}") == (key, name) for name in fields), (key, list(fields))
        size = sum(tarfile.BLOCKSIZE + _blocks(content) for content in fields.values())
        if self._tar is not None and (
            self._in_shard == self.samples_per_shard
            or self._tar.offset + size > self.bytes_per_shard - tarfile.RECORDSIZE
        ):
            self._finish()
        if self._tar is None:
            self._tar = tarfile.TarFile(self._partial, "w", format=tarfile.PAX_FORMAT)
        for extension, content in fields.items():
            member = tarfile.TarInfo(f"{key}.{extension}")
            member.size = len(content)
            member.mode = 0o644
            self._tar.addfile(member, io.BytesIO(content))
        self._tar.members = []  # type: ignore[attr-defined]  # tarfile keeps every member otherwise
        self._in_shard += 1

    @property
    def _partial(self) -> Path:
        return self.folder / f".{self.prefix}-{len(self.shards):06d}.tar.partial"

    def _finish(self) -> None:
        if self._tar is None:
            return
        self._tar.close()
        self._tar = None
        self._in_shard = 0
        shard = self.folder / f"{self.prefix}-{len(self.shards):06d}.tar"
        os.replace(self._partial, shard)
        self.shards.append(write_index(shard))

    def _make_folder(self) -> None:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            existing = sorted(self.folder.glob(f"{self.prefix}-*.tar")) + sorted(
                self.folder.glob(f"{self.prefix}-*.index.json")
            )
        except OSError as error:
            raise DataError(f"{self.folder}: cannot be written ({error.strerror}). Choose another folder.") from error
        if existing:
            raise PathTaken(
                f"{self.folder}: already holds {existing[0].name}; shards are never overwritten. "
                "Choose an empty folder or another prefix, or remove the old shards."
            )
        if not os.access(self.folder, os.W_OK):
            raise DataError(f"{self.folder}: cannot be written (permission denied). Choose another folder.")


def pack_folder(
    files: ImageFiles,
    folder: Path,
    *,
    prefix: str,
    samples_per_shard: int,
    bytes_per_shard: int,
    seed: int,
    captions: bool = True,
    classes: Classes | None = None,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> tuple[list[ShardIndex], dict[str, list[str]]]:
    """Pack the images of a folder into shards, in an order that the seed decides. The bytes of images do not change.

    The key of a sample is the path of the image without its suffix. Class sub-folders become labels (`cls`), and their
    names are written to `classes.json` in the order of the labels.

    Args:
        files: The images.
        folder: Folder of the shards.
        prefix, samples_per_shard, bytes_per_shard: Arguments of `ShardWriter`.
        seed: Decides the order.
        captions: Whether to pack NAME.txt and NAME.json beside NAME.jpg, also unchanged. Links that leave the folder
            are skipped, unless the search for images followed such links.
        classes: List that numbers the class sub-folders, such as that of another set; None numbers them in sorted
            order.
        progress: Wraps the iteration over the numbers of the images, for example in a progress bar.

    Returns:
        The index of each shard, and the paths that were left out, by the reason. They include the paths that the search
        for images left out, and images that are empty or unreadable, or have an unreadable caption.

    Raises:
        FileExistsError: As `ShardWriter`, and if the folder has a `classes.json` with other classes.
        DataError: As `ShardWriter`, if no image could be read, or if `classes` lacks a sub-folder.
    """
    names = list(classes.names if classes else files.classes)
    _check_classes(files, names, classes)
    labels = {name: str(number).encode() for number, name in enumerate(names)}
    left_out = defaultdict(list, {reason: list(paths) for reason, paths in files.left_out.items()})

    def read(number: int) -> tuple[str, dict[str, bytes]]:
        path = files.paths[number]
        try:
            fields, outside = _read_fields(files, path, CAPTION_EXTENSIONS if captions else ())
        except OSError as error:
            raise BadSample(error.strerror or str(error), key=path) from error
        for caption in outside:
            left_out[LEAVING].append(caption)
        if (name := files.class_of(path)) is not None:
            fields["cls"] = labels[name]
        return path, fields

    writer = ShardWriter(folder, prefix, samples_per_shard=samples_per_shard, bytes_per_shard=bytes_per_shard)
    pack_samples(len(files.paths), read, writer, names, left_out, where=str(files.folder), seed=seed, progress=progress)
    return writer.shards, left_out


def pack_samples(
    count: int,
    read: Callable[[int], tuple[str, Mapping[str, bytes]]],
    writer: ShardWriter,
    names: Sequence[str],
    left_out: dict[str, list[str]],
    *,
    where: str,
    seed: int,
    progress: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> None:
    """Pack samples into shards in an order that the seed decides, with `classes.json` beside them.

    Args:
        count: Number of samples.
        read: Returns path and fields of a sample by its number; raises BadSample to leave it out. The key of the
            sample is the path without its suffix.
        writer: Writes the shards; it is not entered yet.
        names: Names of the classes; empty if they are not known.
        left_out: Paths that are left out, by the reason; those that cannot be read are added.
        where: Folder of the samples, used in messages.
        seed: Decides the order.
        progress: Wraps the iteration over the numbers of the samples.

    Raises:
        FileExistsError: If the folder has a `classes.json` with other classes.
        DataError: If no sample can be read, or the shards cannot be written.
    """
    there, keys = writer.folder / CLASSES_FILE, set[str]()
    _check_list(there, names)
    order = random_generator("pack", seed).permutation(count).tolist()
    with writer:
        if names and (alone := not there.exists()):
            replace_json(there, list(names))  # first, so that no shard exists without its classes
        for number in progress(order):
            try:
                path, fields = read(number)
            except BadSample as bad:
                left_out.setdefault(bad.cause, []).append(f"{bad.key}: {bad.detail}" if bad.detail else bad.key)
                continue
            writer.write(_unique_key(path, keys), fields)
        if not keys:
            if names and alone:
                there.unlink()
            reasons = "; ".join(describe_left_out(left_out))
            raise DataError(f"{where}: no image could be read: {reasons}. Give another folder.")


def _check_list(there: Path, names: Sequence[str]) -> None:
    """Raise if the folder of the shards has another list of classes."""
    if there.exists() and (not names or read_classes(there).names != tuple(names)):
        raise PathTaken(
            f"{there.parent}: already holds {there.name}, of other shards with other classes. Choose an empty folder, "
            f"or use the same list of classes: --classes {there}."
        )


def _check_classes(files: ImageFiles, names: list[str], classes: Classes | None) -> None:
    """Raise if the classes do not cover the sub-folders."""
    if classes and not files.classes:
        raise DataError(
            f"shards pack: --classes numbers class folders; got {files.folder}, whose images lie in no folder. Leave "
            "it out, or give the folder above."
        )
    if classes and len(set(names)) < len(names):
        raise DataError(f"shards pack: a class is named once; {classes.source} has a name twice. Correct the list.")
    if classes and (lacking := [name for name in files.classes if name not in names]):
        raise DataError(
            f"shards pack: every class folder is in the list of --classes; got {shown(few(lacking))} in "
            f"{files.folder}, which {classes.source} lacks. Rename or remove them, or correct the list."
        )


def _read_fields(files: ImageFiles, path: str, beside: Iterable[str]) -> tuple[dict[str, bytes], list[str]]:
    """Read an image, and the files beside it with the same name and one of these extensions.

    The extension of a JPEG is always jpg, which is the one that other readers know.

    Returns:
        The contents by extension, and the paths of files that were skipped because they are links out of the folder.

    Raises:
        OSError: If a file cannot be read or is empty.
    """
    image = files.folder / path
    extension, outside = image.suffix[1:].lower(), list[str]()
    fields = {"jpg" if extension == "jpeg" else extension: read_file(image)}
    if not all(fields.values()):
        raise OSError("0 bytes")
    for extension in beside:
        caption = image.with_suffix(f".{extension}")
        if files.is_outside(caption):
            outside.append(caption.relative_to(files.folder).as_posix())
        elif os.path.lexists(caption) and not caption.is_dir():
            fields[extension] = read_file(caption)
    return fields, outside


def _unique_key(path: str, taken: set[str]) -> str:
    """Return a unique key for a path: the path without its suffix, changed so that all webdataset readers accept it.

    These readers split a name at the first dot of its last part, and skip names that begin with `__name__/` or `__`.
    Their pattern stops at a line break.
    """
    parent, _, name = path.replace("\n", "_").rpartition("/")
    last = re.sub("^__+", "_", name.rpartition(".")[0].replace(".", "_"))
    stem = f"{parent.lstrip('_')}/{last}".lstrip("/")
    key, copies = stem, 1
    while key in taken:
        copies += 1
        key = f"{stem}-{copies}"
    taken.add(key)
    return key


def _blocks(content: bytes) -> int:
    return -(-len(content) // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
