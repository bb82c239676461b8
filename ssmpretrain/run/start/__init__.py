"""The start of a run: its checkpoint, the checks of it, changed options, and the run folder at that moment.

It imports run.options, run.messages, callbacks, objectives, training, encoders and base. `run.fit` and
`run.validate` use it.
"""

from ssmpretrain.run.start.run_start import RunStart

__all__ = ["RunStart"]
