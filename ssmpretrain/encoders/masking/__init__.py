"""Masked images: encode the visible patches alone, or put mask tokens behind the stem.

It imports encoders.layers and kernels.
"""
