"""Optimizers, schedules, parameter groups, and the state that an optimizer takes from a checkpoint.

It imports encoders and base alone.
"""
