"""Weights and images as pure functions of a name and a shape, so that a golden file needs to hold only the outputs.

The definition, fixed once and for all because the recorded outputs depend on it: with s = crc32(name) mod 1000, value
number i (counted from 1, C order, float64) is

    u_i = frac(43758.5453123 * sin(12.9898 i + 78.233 s))   in [0, 1),

and every kind of parameter stretches u to a range in which a network's activations stay near 1. The images are u of the
name "input", stretched to [-2, 2).
"""

import zlib
from collections.abc import Mapping

import numpy as np
import torch


def hashed(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """u of a name, float64."""
    count = np.arange(1.0, np.prod(shape, dtype=np.int64) + 1)
    waves = 43758.5453123 * np.sin(12.9898 * count + 78.233 * float(zlib.crc32(name.encode()) % 1000))
    return (waves - np.floor(waves)).reshape(shape)


def weight(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The value of a parameter of the published Vim or VMamba, float64."""
    u = hashed(name, shape)
    *_, owner, leaf = f".{name}".split(".")
    if leaf in ("A_log", "A_b_log", "A_logs"):
        return np.log(np.arange(1.0, shape[-1] + 1)) + 0.2 * (u - 0.5)
    if leaf in ("D", "D_b", "Ds") or (len(shape) == 1 and leaf == "weight"):
        return 1 + 0.2 * (u - 0.5)
    if leaf == "dt_projs_bias" or (leaf == "bias" and owner.startswith("dt_proj")):
        return 4.65 * u - 6.9  # softplus of it is log-uniform in about [0.001, 0.1]
    if leaf == "pos_embed" or leaf.startswith("cls_token"):
        return 0.4 * (u - 0.5)
    if len(shape) == 1:
        return 0.1 * (u - 0.5)
    fan_in = shape[-1] if leaf in ("x_proj_weight", "dt_projs_weight") else np.prod(shape[1:])
    return 2 * (u - 0.5) * np.sqrt(3.0 / fan_in)


def state_dict(like: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The formula's weights for the names and shapes of a state dict, float32."""
    return {name: torch.from_numpy(weight(name, tuple(tensor.shape))).float() for name, tensor in like.items()}


def images(shape: tuple[int, ...] = (2, 3, 224, 224)) -> torch.Tensor:
    """A normalised batch, float32."""
    return torch.from_numpy(4 * (hashed("input", shape) - 0.5)).float()
