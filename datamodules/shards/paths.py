"""Paths of shards: a path, a folder, a brace pattern, a glob or a list is resolved to files."""

import glob
import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ssmpretrain.base.errors import DataError, PathMissing
from ssmpretrain.base.wording import few
from ssmpretrain.datamodules.files.folders import look_around
from ssmpretrain.datamodules.remote.cache import ShardCache, make_cache
from ssmpretrain.datamodules.remote.server import is_remote
from ssmpretrain.datamodules.shards.location import Location
from ssmpretrain.datamodules.shards.remote_paths import find_remote

_MAX_PATTERN = 1_000_000  # files that one brace pattern may name; a larger number is a typing error


def find_shards(pattern: str | Sequence[str], *, where: str, cache: ShardCache | None = None) -> list[Location]:
    """Resolve patterns to shards, in the given order; the files of a folder or glob are sorted.

    Args:
        pattern: A tar file, a folder (its *.tar files), a brace pattern "train-{000000..001023}.tar", a glob
            "train-*.tar", or a list of these. Each is a path or a URL (http, https, s3, gs, hf).
        where: Name of the class and argument, which opens every message, as "ImageShards: train".
        cache: Cache for copies of shards on servers; None for the default one.

    Returns:
        At least one shard, and none twice. Local files exist. `load_indexes` checks later whether a server has the
        files that a URL names, because it needs fewer requests.

    Raises:
        FileNotFoundError: If a path, or a number of a brace pattern, does not exist. The message says what is there.
        DataError: If the pattern is empty or malformed, has an unknown scheme, or names a file twice.
    """
    patterns = [pattern] if isinstance(pattern, str) else list(pattern)
    if not patterns or not all(isinstance(text, str) and text.strip() for text in patterns):
        raise DataError(
            f"{where}: is a path, a pattern or a list of them; got {pattern!r}. Give the tar files to read."
        )
    if cache is None and any(map(is_remote, patterns)):
        cache = make_cache(where)
    shards = [shard for text in patterns for shard in _expand(text, where, cache)]
    repeated = [str(path) for path, count in Counter(shards).items() if count > 1]
    if repeated:
        raise DataError(
            f"{where}: every shard is named once; got {few(repeated)} more than once. Remove the repetition."
        )
    return shards


def _expand(text: str, where: str, cache: ShardCache | None) -> Sequence[Location]:
    if text.startswith("pipe:"):
        raise DataError(f"{where}: no command is started to read shards; got {text!r}. Give a path or a URL.")
    if is_remote(text):
        assert cache is not None
        return [shard for url in _expand_braces(text, where) for shard in find_remote(url, cache, where=where)]
    return _expand_local(text.removeprefix("file://"), where)


def _expand_local(text: str, where: str) -> list[Path]:
    text = os.path.expanduser(text)
    if os.path.isdir(text):
        found = sorted(Path(text).glob("*.tar"))
        if not found:
            around = look_around(Path(text) / "x")
            raise PathMissing(f"{where}: no .tar file in {text}; {around}. Pack images with `ssmpretrain shards pack`.")
        return found
    if os.path.exists(text):
        return [Path(text)]
    if os.path.islink(text):
        raise PathMissing(f"{where}: {text} is a link to nothing ({os.readlink(text)}). Correct the link.")
    names = _expand_braces(text, where)
    if len(names) > 1:
        return _check_gaps(text, [Path(name) for name in names], where)
    if glob.has_magic(text):
        found = [Path(name) for name in sorted(glob.glob(text))]
        if not found:
            raise PathMissing(f"{where}: 0 files match {text}; {look_around(Path(text))}. Correct the pattern.")
        return found
    raise PathMissing(f"{where}: no file {text}; {look_around(Path(text))}. Correct the path.")


def _expand_braces(text: str, where: str) -> list[str]:
    if "{" not in text:
        return [text]
    from braceexpand import braceexpand

    # The names are counted before they are built, because a zero too many would fill the memory.
    if math.prod(map(_count_names, re.findall(r"\{([^{}]*)\}", text))) > _MAX_PATTERN:
        raise DataError(f"{where}: {text} names more than {_MAX_PATTERN:,} files. Correct the range in braces.")
    try:
        return list(braceexpand(text))
    except ValueError as error:
        raise DataError(f"{where}: braces come in pairs; got {text!r}. Write a range as {{000000..001023}}.") from error


def _count_names(inner: str) -> int:
    """Return the number of names that the text inside a pair of braces stands for."""
    if match := re.match(r"(-?\d{1,20})\.\.(-?\d{1,20})(\.\.|$)", inner):
        return abs(int(match[2]) - int(match[1])) + 1
    return inner.count(",") + 1


def _check_gaps(text: str, paths: list[Path], where: str) -> list[Path]:
    # One listing per folder replaces one stat per file; 100,000 stats over a network take minutes.
    present: dict[Path, set[str]] = {}
    for folder in {path.parent for path in paths}:
        present[folder] = set(os.listdir(folder)) if folder.is_dir() else set()
    missing = [path for path in paths if path.name not in present[path.parent]]
    if len(missing) == len(paths):
        raise PathMissing(
            f"{where}: none of the {len(paths):,} files of {text} exists; {look_around(paths[0])}. Correct the pattern."
        )
    if missing:
        raise PathMissing(
            f"{where}: {len(missing):,} of the {len(paths):,} files of {text} are missing: "
            f"{few([path.name for path in missing])}. Fetch them, or name the shards that you have by a glob."
        )
    return paths
