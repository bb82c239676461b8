"""Metrics and inference of dense tasks: confusion matrix, COCO average precision, sliding windows.

It imports base alone of this package; no Lightning.
"""
