"""Objectives that compare features of several views of an image: DINO with iBOT, LeJEPA.

It imports encoders, training, evaluation and base, and of objectives only objective.py.
"""

from ssmpretrain.objectives.joint_embedding.dino import DINO
from ssmpretrain.objectives.joint_embedding.gram import Gram
from ssmpretrain.objectives.joint_embedding.head import DINOHead
from ssmpretrain.objectives.joint_embedding.joint_embedding import JointEmbedding
from ssmpretrain.objectives.joint_embedding.lejepa import LeJEPA
from ssmpretrain.objectives.joint_embedding.masks import Masks
from ssmpretrain.objectives.joint_embedding.teacher import Taught, Teacher

__all__ = ["DINO", "DINOHead", "Gram", "JointEmbedding", "LeJEPA", "Masks", "Taught", "Teacher"]
