"""From a recipe to a running trainer: the parser, the checks before a start, the run folder's logger and lock.

It may import objectives, callbacks and everything below them; commands and datamodules it does not know.
"""
