"""Detectors: networks that find objects on the maps of an encoder, with their losses; no Lightning.

It imports torchvision's parts, encoders.features and base.
"""

from ssmpretrain.objectives.dense.detectors.building import build_detector
from ssmpretrain.objectives.dense.detectors.match import MATCHES, Match
from ssmpretrain.objectives.dense.detectors.neck import FINEST_OF_ONE_STAGE, build_neck
from ssmpretrain.objectives.dense.detectors.settings import BoxHead, Detector, MaskHead, Neck, Proposals
from ssmpretrain.objectives.dense.detectors.targets import Target

__all__ = [
    "FINEST_OF_ONE_STAGE",
    "MATCHES",
    "BoxHead",
    "Detector",
    "MaskHead",
    "Match",
    "Neck",
    "Proposals",
    "Target",
    "build_detector",
    "build_neck",
]
