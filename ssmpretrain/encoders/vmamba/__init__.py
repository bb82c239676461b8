"""VMamba: the encoder, its blocks, and the family `FAMILY`.

This folder imports encoders.family, encoders.building, encoders.layers, encoders.masking and kernels; no other family.
"""

from ssmpretrain.encoders.vmamba.family import FAMILY
from ssmpretrain.encoders.vmamba.model import VMamba

__all__ = ["FAMILY", "VMamba"]
