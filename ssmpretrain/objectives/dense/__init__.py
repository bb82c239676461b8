"""Dense tasks: semantic segmentation, object detection and instance segmentation.

It imports encoders, training, evaluation, base and objective.py.
"""
