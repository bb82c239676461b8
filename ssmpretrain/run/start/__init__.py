"""The start of a run: its checkpoint, the checks of it, changed options, and the run folder at that moment.

It imports run.options, run.messages, callbacks, objectives, training, encoders.weights and base.
"""

from typing import TYPE_CHECKING

from ssmpretrain.base.lazy_names import lazy_names

if TYPE_CHECKING:
    from ssmpretrain.run.start.run_start import RunStart

__all__ = ["RunStart"]
__getattr__, __dir__ = lazy_names(__name__, {"RunStart": "run_start"})
