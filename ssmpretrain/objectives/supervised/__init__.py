"""Training with labels: fine-tuning, and linear probes of frozen features.

It imports encoders, training, evaluation, base and objective.py.
"""
