"""Dense tasks: semantic segmentation, object detection and instance segmentation.

It imports encoders, training, evaluation, base and objective.py.
"""

from ssmpretrain.objectives.dense.dense import Dense
from ssmpretrain.objectives.dense.detection import Detection
from ssmpretrain.objectives.dense.segmentation import Segmentation

__all__ = ["Dense", "Detection", "Segmentation"]
