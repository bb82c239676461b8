"""Checkpoints of a run: when they are saved, their files and folder, and exact resume.

It imports encoders.weights, training.optim and base.
"""
