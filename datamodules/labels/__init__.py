"""Labels: lists of classes, captions, and numbers that mean the same in every source.

It imports datamodules.files and base.
"""
