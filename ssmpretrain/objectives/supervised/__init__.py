"""Training with labels: fine-tuning, and linear probes of frozen features.

It imports encoders, training, evaluation, base and objective.py.
"""

from ssmpretrain.objectives.supervised.finetune import Finetune
from ssmpretrain.objectives.supervised.linear_probe import LinearProbe
from ssmpretrain.objectives.supervised.supervised import Supervised, has_fresh_head

__all__ = ["Finetune", "LinearProbe", "Supervised", "has_fresh_head"]
