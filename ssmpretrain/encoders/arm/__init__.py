"""ARM's encoder, the MambaMLP: model and its `FAMILY`.

It imports encoders.family, encoders.building, encoders.sequence, encoders.layers and Vim's mixer.
"""

from ssmpretrain.encoders.arm.arm import ARMEncoder
from ssmpretrain.encoders.arm.family import FAMILY

__all__ = ["FAMILY", "ARMEncoder"]
