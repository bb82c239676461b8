"""Options of `fit` and `validate`: the parser of recipes, and the allowed values for run and trainer.

It imports training and base.
"""

from ssmpretrain.run.options.run_options import RunOptions

__all__ = ["RunOptions"]
