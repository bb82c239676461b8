"""Objectives that compare features of several views of an image: DINO with iBOT, LeJEPA.

It imports encoders, training, evaluation and base, and of objectives only objective.py.
"""

from ssmpretrain.objectives.joint_embedding.joint_embedding import JointEmbedding
from ssmpretrain.objectives.joint_embedding.teacher import Taught, Teacher

__all__ = ["JointEmbedding", "Taught", "Teacher"]
