"""Weights in files: load encoders from checkpoints (`load_encoder`), and export them (`save_encoder`).

It imports encoders.family_registry, encoders.registry, encoders.{layers,sequence} and base.
Public names are imported at their first use, because encoders.registry imports `finite_check` from here.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ssmpretrain.encoders.weights.content import read_content
    from ssmpretrain.encoders.weights.finish import LoadReport
    from ssmpretrain.encoders.weights.finite_check import check_finite
    from ssmpretrain.encoders.weights.formats import FORMATS
    from ssmpretrain.encoders.weights.load import load_encoder
    from ssmpretrain.encoders.weights.on_disk import weights_in
    from ssmpretrain.encoders.weights.preprocessing import images_of
    from ssmpretrain.encoders.weights.provenance import describe_weights
    from ssmpretrain.encoders.weights.save import SaveReport, save_encoder

_MODULES = {
    "FORMATS": "formats",
    "LoadReport": "finish",
    "SaveReport": "save",
    "check_finite": "finite_check",
    "describe_weights": "provenance",
    "images_of": "preprocessing",
    "load_encoder": "load",
    "read_content": "content",
    "save_encoder": "save",
    "weights_in": "on_disk",
}
__all__ = [
    "FORMATS",
    "LoadReport",
    "SaveReport",
    "check_finite",
    "describe_weights",
    "images_of",
    "load_encoder",
    "read_content",
    "save_encoder",
    "weights_in",
]


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
