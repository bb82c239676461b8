"""Features of an encoder: maps, pooled vectors, a pyramid, the effective receptive field.

It imports encoders.layers and kernels; it works with every timm encoder.
"""
