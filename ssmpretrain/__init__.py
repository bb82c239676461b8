"""Self-supervised pretraining for vision state-space models.

Importing this package is cheap: torch, timm and the other dependencies are imported with the first name that needs
them. timm knows the names of the encoders as soon as both packages are imported, in either order.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from ._moved import keep_former_names
from ._timm_hook import register_with_timm

if TYPE_CHECKING:
    from .encoders import create_encoder, list_encoders, load_encoder, save_encoder

__version__ = "0.1.0"
__all__ = ["__version__", "create_encoder", "list_encoders", "load_encoder", "save_encoder"]

register_with_timm()
keep_former_names()


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("ssmpretrain.encoders"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
