"""Decoding: from the bytes of a sample to a tensor, transforms and augmentation, and batches.

It imports datamodules.labels and base.
"""
