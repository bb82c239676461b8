"""Files that other readers of shards ask for: timm, open_clip and Hugging Face's datasets.

A file of these names that somebody else wrote is left as it is.
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
# The words by which Hugging Face and timm call a part of the data, and how its files may be called.
_SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}


def write_for_others(folder: Path, samples: Mapping[str, int]) -> None:
    """Write them.

    Args:
        folder: Of the shards.
        samples: How many each shard there has, by its name.
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
    """Group shards by what their names begin with, in order: `train-000000.tar` -> `train`."""
    parts: dict[str, list[str]] = {}
    for name in sorted(samples):
        match = _NUMBERED.fullmatch(name)
        parts.setdefault(match["set"] if match else name, []).append(name)
    return parts


def _split_of(part: str, alone: bool) -> str:
    """Return the usual name of a part, `val` -> `validation`; a part alone is `train` if its name says nothing else."""
    words = set(re.split(r"[^a-z]+", part.lower()))
    named = [split for split, known in _SPLITS.items() if words & set(known)]
    return named[0] if named else "train" if alone else part


def _timm_names(parts: Mapping[str, list[str]]) -> dict[str, list[str]]:
    """Return the parts by their own names and by the usual one, where one part alone has it."""
    usual = [_split_of(part, len(parts) == 1) for part in parts]
    named = dict(zip(usual, parts.values(), strict=True))
    alone = {split: shards for split, shards in named.items() if usual.count(split) == 1}
    return alone | {part: shards for part, shards in parts.items() if part}


def _timm_split(name: str, shards: list[str], samples: Mapping[str, int]) -> dict[str, Any]:
    lengths = [samples[shard] for shard in shards]
    return {"name": name, "num_samples": sum(lengths), "filenames": shards, "shard_lengths": lengths}


def _card(parts: Mapping[str, list[str]], samples: Mapping[str, int]) -> str:
    """Return the card that tells `datasets.load_dataset(folder)` which files are data, and people what is there."""
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
    """Return a pattern for the shards of a part, or each of them where a pattern would name others."""
    pattern = f"{part}-[0-9]*.tar"
    return [pattern] if fnmatch.filter(sorted(samples), pattern) == shards else shards


def is_ours(content: Any) -> bool:
    """Return whether the content of a file was written here, or there is none. It repeats what `index.json` says."""
    return content == {} or (isinstance(content, dict) and content.items() >= _MARK.items())


def _read(path: Path) -> dict[str, Any] | None:
    """Return the JSON object in a file, an empty one where there is no file, None where it holds something else."""
    with suppress(ValueError, RecursionError):
        content = json.loads(_content(path) or b"{}")
        return content if isinstance(content, dict) else None
    return None


def _content(path: Path) -> bytes:
    """Read a file; nothing where there is none, and something that is not ours where it is no plain file."""
    if path.is_file():
        return path.read_bytes()
    return b"-" if path.exists() or path.is_symlink() else b""
