"""Order of samples: the plan of an epoch, its batches, and the loader that goes through them.

It imports datamodules.decoding, datamodules.shards and base.
"""
