"""From a recipe to a running trainer: command line, options, start, `fit` and `validate`, messages.

It may import objectives, callbacks and everything below them, but neither commands nor datamodules.
"""
