"""`compare`: read the folders of runs, find the settings in which they differ, and print a table of their metrics.

It imports training, base and the command's own modules. Every kind of run has the files that it reads.
"""

from ssmpretrain.commands.compare.command import add_arguments, run

__all__ = ["add_arguments", "run"]
