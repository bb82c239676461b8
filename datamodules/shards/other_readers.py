"""Index files for other readers of shards: timm, open_clip and Hugging Face's datasets.

A file with one of these names that somebody else wrote is not changed.
"""

import fnmatch
import json
import re
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from ssmpretrain.base.whole_files import replace_json, replace_text

TIMM, OPEN_CLIP, CARD = "_info.json", "sizes.json", "README.md"
_MARK = {"written_by": "ssmpretrain shards"}
_OPENING = "---\n# written by ssmpretrain shards; remove this line to keep changes\n"
_NUMBERED = re.compile(r"(?P<set>.*?)[-_.]?[0-9]*\.tar")
# Names of the splits of Hugging Face and timm, and words in file names that mean them.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def write_for_others(folder: Path, samples: Mapping[str, int]) -> None:
    """Write the index files for timm, open_clip and Hugging Face's datasets into a folder of shards.

    Args:
        folder: Folder of the shards.
        samples: Number of samples of each shard, by its name.
    """
    parts = _parts(samples)
    if is_ours(_read(folder / TIMM)):
        splits = {name: _timm_split(name, shards, samples) for name, shards in _timm_names(parts).items()}
        replace_json(folder / TIMM, {"name": folder.absolute().name, **_MARK, "splits": splits}, indent=None)
    sizes = _read(folder / OPEN_CLIP)
    if sizes is not None:
        mark = _MARK if is_ours(sizes) else {}
        others = {name: count for name, count in sizes.items() if (folder / name).exists()}
        replace_json(folder / OPEN_CLIP, {**mark, **dict(sorted({**others, **samples}.items()))}, indent=None)
    if (_content(folder / CARD) or _OPENING.encode()).startswith(_OPENING.encode()):
        replace_text(folder / CARD, _card(parts, samples))


def _parts(samples: Mapping[str, int]) -> dict[str, list[str]]:
    """Group shards by the part of their names before the number, in order: `train-000000.tar` -> `train`."""
    parts: dict[str, list[str]] = {}
    for name in sorted(samples):
        match = _NUMBERED.fullmatch(name)
        parts.setdefault(match["set"] if match else name, []).append(name)
    return parts


def _split_of(part: str, alone: bool) -> str:
    """Return the usual name of a part, as `val` -> `validation`; a single part with an unknown name is `train`."""
    words = set(re.split(r"[^a-z]+", part.lower()))
    named = [split for split, known in _SPLITS.items() if words & set(known)]
    return named[0] if named else "train" if alone else part


def _timm_names(parts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the parts by their own names, and also by the usual name if only one part has it."""
    usual = [_split_of(part, len(parts) == 1) for part in parts]
    named = dict(zip(usual, parts.values(), strict=True))
    alone = {split: shards for split, shards in named.items() if usual.count(split) == 1}
    return alone | {part: shards for part, shards in parts.items() if part}


def _timm_split(name: str, shards: list[str], samples: Mapping[str, int]) -> dict[str, Any]:
    lengths = [samples[shard] for shard in shards]
    return {"name": name, "num_samples": sum(lengths), "filenames": shards, "shard_lengths": lengths}


def _card(parts: Mapping[str, list[str]], samples: Mapping[str, int]) -> str:
    """Return the README.md that names the data files for `datasets.load_dataset(folder)`, and lists them for people."""
    splits: dict[str, list[str]] = {}
    for part in parts:
        name = re.sub(r"\W+", "_", _split_of(part, len(parts) == 1)).strip("_") or "train"
        splits.setdefault(name, []).append(part)
    files, rows = [], []
    for name, members in splits.items():
        shards = [shard for part in members for shard in parts[part]]
        paths = [path for part in members for path in _named(part, parts[part], samples)]
        files.append({"split": name, "path": paths})
        rows.append(f"- {name}: {sum(samples[shard] for shard in shards):,} samples in {len(shards):,} shards\n")
    configs = json.dumps([{"config_name": "default", "data_files": files}])
    return f"{_OPENING}configs: {configs}\n---\n\nImages in webdataset shards.\n\n{''.join(rows)}"


def _named(part: str, shards: list[str], samples: Mapping[str, int]) -> list[str]:
    """Return a pattern for the shards of a part, or all their names if the pattern would match other shards too."""
    pattern = f"{part}-[0-9]*.tar"
    return [pattern] if fnmatch.filter(sorted(samples), pattern) == shards else shards


def is_ours(content: Any) -> bool:
    """Return whether this package wrote the content of a file, or the content is empty."""
    return content == {} or (isinstance(content, dict) and content.items() >= _MARK.items())


def _read(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file; an empty one if there is no file, None if the file holds something else."""
    with suppress(ValueError, RecursionError):
        content = json.loads(_content(path) or b"{}")
        return content if isinstance(content, dict) else None
    return None


def _content(path: Path) -> bytes:
    """Read a file. Return nothing if there is none, and `-` if it is not a regular file, so that it is not replaced."""
    if path.is_file():
        return path.read_bytes()
    return b"-" if path.exists() or path.is_symlink() else b""
