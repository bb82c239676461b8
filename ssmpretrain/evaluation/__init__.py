"""Evaluation in plain functions: features, nearest neighbours, probes, retrieval, accuracies.

It knows no Lightning and imports nothing but encoders, kernels and base.
"""
