"""The start of a run: which checkpoint, whether it fits, what changed, and the run folder brought to that state.

It imports run.options, callbacks, objectives, training, encoders.weights and base; `run.fit` and `run.validate` use it.
"""

from ssmpretrain.run.start.run_start import RunStart

__all__ = ["RunStart"]
