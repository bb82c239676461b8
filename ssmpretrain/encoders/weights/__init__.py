"""Weights in files: read, recognise, fill, check, save and export, with their provenance.

It imports encoders.features and base; a family describes its own checkpoints.
"""
