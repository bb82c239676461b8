"""ARM: its encoder MambaMLP, and the family `FAMILY`.

This folder imports encoders.family, encoders.building, encoders.sequence, encoders.layers and Vim's mixer.
"""

from ssmpretrain.base.lazy_names import lazy_names
from ssmpretrain.encoders.arm.arm import ARMEncoder
from ssmpretrain.encoders.arm.family import FAMILY

__all__ = ["FAMILY", "ARMEncoder"]

__getattr__, __dir__ = lazy_names(__name__, {}, former=("ssmpretrain.encoders.arm.arm",))
