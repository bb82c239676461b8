"""Masked and autoregressive image modelling: MAE, SimMIM, ARM, and the patches that they hide.

It imports encoders, training, evaluation and base; no other folder of objectives but objective.py.
"""
