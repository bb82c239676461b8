"""Contrastive language-image pretraining: CLIP, MAECLIP, text towers, open_clip's formats, zero-shot classifiers.

It imports encoders, training, evaluation, base and objectives.masked. Only open_clip_adapter.py imports open_clip.
"""

from ssmpretrain.objectives.contrastive.clip import CLIP
from ssmpretrain.objectives.contrastive.contrastive import Contrastive
from ssmpretrain.objectives.contrastive.head import MAX_LOGIT_SCALE, ContrastiveHead, Loss
from ssmpretrain.objectives.contrastive.mae_clip import MAECLIP
from ssmpretrain.objectives.contrastive.text_tower import TextTower

__all__ = ["CLIP", "MAECLIP", "MAX_LOGIT_SCALE", "Contrastive", "ContrastiveHead", "Loss", "TextTower"]
