"""Make our encoders known to timm without importing timm.

`import ssmpretrain` must be cheap, and `timm.create_model("vim_tiny_patch16_224")` must work after it. If timm is
imported already, the encoders are imported at once. Otherwise a finder waits until somebody imports timm, lets Python
find and run timm as usual, and imports the encoders right afterwards. The finder reacts to that one name, once.
"""

import importlib
import importlib.util
import sys
import warnings
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


def register_with_timm() -> None:
    """Import our encoders now if timm is imported, else right after it will be."""
    if "timm" in sys.modules:
        # While timm itself is being imported, it has no registry yet. A plugin of timm may import this package then.
        if not getattr(sys.modules["timm"].__spec__, "_initializing", False):
            _import_encoders()
    elif not any(isinstance(finder, _TimmFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _TimmFinder())


class _TimmFinder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname != "timm" or self not in sys.meta_path:
            return None
        sys.meta_path.remove(self)  # the other finders find timm; this one only needs to know when timm has run
        spec = importlib.util.find_spec(fullname)
        if spec is None:
            sys.meta_path.insert(0, self)  # not installed (yet)
        elif spec.loader is not None:
            _call_after(spec.loader)
        return spec


def _call_after(loader: Loader) -> None:
    run = loader.exec_module

    def run_then_register(module: ModuleType) -> None:
        loader.exec_module = run  # type: ignore[method-assign]
        run(module)
        _import_encoders()

    # Patch this instance alone: the loader keeps its type, which importlib.resources and inspect use.
    loader.exec_module = run_then_register  # type: ignore[method-assign]


def _import_encoders() -> None:
    try:
        importlib.import_module("ssmpretrain.encoders")
    except Exception as error:  # timm must stay usable for everybody else in the process
        warnings.warn(
            f"ssmpretrain: its encoders are not known to timm, because importing them failed: {error!r}", stacklevel=2
        )
