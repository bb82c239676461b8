"""Stopping a run: signals, SLURM, a time limit, data that do not come, losses that are not finite.

It imports training.ranks, training.checkpoints and base.
"""
