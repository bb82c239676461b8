"""Shards: tar files, their indexes and names; packing, verifying, and reading what is damaged.

It imports datamodules.files, datamodules.labels, datamodules.remote and base.
"""
