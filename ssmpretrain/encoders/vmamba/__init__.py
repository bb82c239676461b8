"""VMamba: the encoder, its blocks, and the family `FAMILY`.

This folder imports encoders.family, family_registry, building, features, layers, masking and sequence; kernels and
base; no other family.
"""

from ssmpretrain.base.lazy_names import lazy_names
from ssmpretrain.encoders.vmamba.family import FAMILY
from ssmpretrain.encoders.vmamba.model import VMamba

__all__ = ["FAMILY", "VMamba"]

_FORMER = tuple(f"ssmpretrain.encoders.vmamba.{module}" for module in ("vmamba", "model", "arguments"))
_FORMER = tuple(f"ssmpretrain.encoders.vmamba.{module}" for module in ("vmamba", "model", "arguments"))
__getattr__, __dir__ = lazy_names(__name__, {}, _FORMER)
