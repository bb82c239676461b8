"""Features of many images in one file: npz for NumPy, parquet for data frames."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ssmpretrain.base.errors import UserError
from ssmpretrain.evaluation.features import Encoded

Dtype = Literal["float32", "float16"]
DTYPES: tuple[str, ...] = get_args(Dtype)
SUFFIXES = (".npz", ".parquet")
_ROW_GROUP = 8192  # images


def check_format(path: Path, *, where: str) -> None:
    """Raise a ValueError if a package is missing that writing a file with the suffix of `path` needs."""
    if path.suffix != ".parquet":
        return
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"{where}: {path.name} needs pyarrow, which is not installed. `pip install pyarrow`, or write .npz."
        ) from error


def write_features(
    path: Path,
    suffix: str,
    parts: Iterator[Encoded],
    dtype: str,
    protocol: dict[str, Any],
    outcome: Callable[[], dict[str, Any]],
) -> tuple[int, int]:
    """Write features (N, F), labels (N,), int64, with -1 for none, and keys (N,), in the given order.

    An npz file has the arrays `features`, `labels`, `keys` and `metadata`, a JSON text of protocol and outcome. It has
    no pickled objects. All features are held in memory until the end: 3.9 GB for 1.28 million images with 768 numbers
    in float32.

    A parquet file has the columns `key` (bytes that are not UTF-8 appear as `\\xe9`), `label` and `features` (a list of
    fixed length). The protocol is JSON under `ssmpretrain` in the metadata of the schema. The outcome is JSON under
    `ssmpretrain.outcome` in the metadata of the file. One row group of 8192 images is held in memory.

    Args:
        path: The file; an existing file is replaced.
        suffix: ".npz" or ".parquet".
        parts: Batches of features, at least one.
        dtype: Type of the features in the file, e.g. "float32".
        protocol: Description of the computation of the features, plain data.
        outcome: Function that is called at the end and returns more facts, plain data.

    Returns:
        N, F.
    """
    write = _write_parquet if suffix == ".parquet" else _write_npz
    return write(path, parts, np.dtype(dtype), protocol, outcome)


def _write_npz(
    path: Path,
    parts: Iterator[Encoded],
    dtype: np.dtype[Any],
    protocol: dict[str, Any],
    outcome: Callable[[], dict[str, Any]],
) -> tuple[int, int]:
    features, labels, keys = [], [], list[str]()
    for part in parts:
        features.append(part.features.numpy().astype(dtype))
        labels.append(part.labels.numpy())
        keys += part.keys
    shape = (len(keys), features[0].shape[1])
    with zipfile.ZipFile(path, "w", allowZip64=True) as archive:
        _write_array(archive, "features", dtype, shape, features)
        for name, array in (
            ("labels", np.concatenate(labels)),
            ("keys", np.asarray(keys)),
            ("metadata", np.asarray(json.dumps({**protocol, **outcome()}))),
        ):
            _write_array(archive, name, array.dtype, array.shape, [array])
    return shape


def _write_array(
    archive: zipfile.ZipFile, name: str, dtype: np.dtype[Any], shape: tuple[int, ...], parts: list[NDArray[Any]]
) -> None:
    """Write an array as `np.savez` does, from parts, without joining them in memory."""
    npy: Any = np.lib.format
    header = {"descr": npy.dtype_to_descr(dtype), "fortran_order": False, "shape": shape}
    with archive.open(f"{name}.npy", "w", force_zip64=True) as file:
        npy.write_array_header_2_0(file, header)
        for part in parts:
            file.write(part.tobytes())


def _write_parquet(
    path: Path,
    parts: Iterator[Encoded],
    dtype: np.dtype[Any],
    protocol: dict[str, Any],
    outcome: Callable[[], dict[str, Any]],
) -> tuple[int, int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    count, width, writer = 0, 0, None
    for group in _grouped(parts):
        features = np.concatenate([part.features.numpy() for part in group]).astype(dtype)
        columns = {
            "key": pa.array([_in_utf8(key) for part in group for key in part.keys], pa.string()),
            "label": pa.array(np.concatenate([part.labels.numpy() for part in group])),
            "features": pa.FixedSizeListArray.from_arrays(pa.array(features.reshape(-1)), features.shape[1]),
        }
        table = pa.table(columns)
        if writer is None:
            schema = table.schema.with_metadata({"ssmpretrain": json.dumps(protocol)})
            width, writer = features.shape[1], pq.ParquetWriter(path, schema)
        writer.write_table(table)
        count += len(features)
    assert writer is not None
    writer.add_key_value_metadata({"ssmpretrain.outcome": json.dumps(outcome())})
    writer.close()
    return count, width


def _in_utf8(key: str) -> str:
    """Return a key as UTF-8 text. Bytes of a file name that are not UTF-8 (surrogates in Python) become `\\xe9`."""
    return key.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def _grouped(parts: Iterator[Encoded]) -> Iterator[list[Encoded]]:
    """Yield lists of parts, each with the images of one row group."""
    group: list[Encoded] = []
    for part in parts:
        group.append(part)
        if sum(len(one.labels) for one in group) >= _ROW_GROUP:
            yield group
            group = []
    if group:
        yield group
