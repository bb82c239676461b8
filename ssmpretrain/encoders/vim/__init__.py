"""Vim: model, blocks, and its checkpoints.

It imports encoders.sequence, encoders.layers, encoders.masking, encoders.weights and kernels; no other family.
"""
