"""VMamba: model, blocks, and its checkpoints.

It imports encoders.layers, encoders.masking, encoders.weights and kernels; no other family.
"""

from ssmpretrain.encoders.vmamba.vmamba import VMamba

__all__ = ["VMamba"]
