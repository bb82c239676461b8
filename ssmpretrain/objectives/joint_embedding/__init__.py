"""Objectives that compare features of several views of an image: DINO with iBOT, LeJEPA.

It imports encoders, training, evaluation and base, and of objectives only objective.py and the patches of masked.
"""

from ssmpretrain.objectives.joint_embedding.dino import DINO
from ssmpretrain.objectives.joint_embedding.joint_embedding import JointEmbedding
from ssmpretrain.objectives.joint_embedding.lejepa import LeJEPA
from ssmpretrain.objectives.joint_embedding.teacher import Taught, Teacher

__all__ = ["DINO", "JointEmbedding", "LeJEPA", "Taught", "Teacher"]
