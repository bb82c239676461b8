"""Options of `fit` and `validate`: how recipes are parsed, and which values of the run and the trainer are allowed.

It imports training and base.
"""

from ssmpretrain.run.options.run_options import RunOptions

__all__ = ["RunOptions"]
