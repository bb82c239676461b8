"""Encoders of one sequence: patch embedding, class tokens, position embeddings, a stack of blocks.

It imports encoders.layers, encoders.features and kernels.
"""
