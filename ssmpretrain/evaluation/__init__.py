"""Evaluation in plain functions: features, nearest neighbours, probes, retrieval, accuracies.

It does not use Lightning, and imports only encoders, kernels and base.
"""
