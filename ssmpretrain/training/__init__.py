"""Training: optimizers and schedules, checkpoints and exact resume, ranks, stopping.

It may import encoders, kernels and base. Objectives, callbacks and runs build on it.
"""
