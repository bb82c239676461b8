"""Data modules of dense tasks: segmentation from folders and shards, detection from COCO files and shards.

It imports splits, order, shards, targets and base, as the other data modules do.
"""
