"""One tar file: its headers, the places of its samples, its index file, and the bytes of one sample.

It imports datamodules.files, datamodules.faults and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.datamodules.tar.index import (
        Layout,
        ShardIndex,
        index_path,
        locate_samples,
        read_index,
        write_index,
    )
    from ssmpretrain.datamodules.tar.sample import RawSample, Span, parse_sample, read_sample
    from ssmpretrain.datamodules.tar.walk import Walked, walk_tar

__all__ = [
    "Layout",
    "RawSample",
    "ShardIndex",
    "Span",
    "Walked",
    "index_path",
    "locate_samples",
    "parse_sample",
    "read_index",
    "read_sample",
    "walk_tar",
    "write_index",
]
__getattr__, __dir__ = lazy_names(
    __name__,
    {
        "Layout": "index",
        "RawSample": "sample",
        "ShardIndex": "index",
        "Span": "sample",
        "Walked": "walk",
        "index_path": "index",
        "locate_samples": "index",
        "parse_sample": "sample",
        "read_index": "index",
        "read_sample": "sample",
        "walk_tar": "walk",
        "write_index": "index",
    },
)
