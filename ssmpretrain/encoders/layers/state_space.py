"""State-space parts that Vim, VMamba and ARM share: initial values, decay, residual sum, LayerNorm."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import Proxy

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.fx_tracing import one_node

# Initial step sizes (arXiv:2312.00752, section 3.6): log-uniform between the first two, never below the third.
DT_MIN, DT_MAX, DT_FLOOR = 1e-3, 1e-1, 1e-4
MOST_BLOCKS = 1000  # of an encoder or a decoder; a larger number is a mistake and could fill the memory
MOST_WIDTH = 16_384  # of channels, states and the like, for the same reason


def check_widths(where: str, **widths: float) -> None:
    """Raise a ValueError if a size of a weight is above 16,384.

    Args:
        where: Name of the encoder, used in the error message.
        widths: Sizes by the name of their argument.
    """
    for name, width in widths.items():
        if width > MOST_WIDTH:
            raise UserError(f"{where}: {name} is at most {MOST_WIDTH:,}; got {width:,}.")


@torch.no_grad()
def init_decay(log_decay: Tensor) -> None:
    """Fill the parameter log(-A), (..., N), in place so that A = -1, -2, ..., -N in every channel."""
    states = torch.arange(1, log_decay.shape[-1] + 1, dtype=torch.float32, device=log_decay.device)
    log_decay.copy_(states.log().expand_as(log_decay))


@torch.no_grad()
def init_head_decay(log_decay: Tensor) -> None:
    """Fill the parameter log(-A) of Mamba-2, any shape, in place so that -A is uniform in [1, 16], as in mamba-ssm."""
    log_decay.uniform_(1.0, 16.0).log_()


@torch.no_grad()
def init_step_size(bias: Tensor) -> None:
    """Fill the bias of the step size in place so that softplus(bias) is log-uniform in [0.001, 0.1]."""
    log_dt = torch.empty_like(bias).uniform_(math.log(DT_MIN), math.log(DT_MAX))
    dt = log_dt.exp().clamp(min=DT_FLOOR)
    bias.copy_(dt + torch.log(-torch.expm1(-dt)))  # the inverse of softplus


def decay(log_decay: Tensor) -> Tensor:
    """Return the state matrix A = -exp(log_decay), with the shape of the parameter, in float32 or float64."""
    return -torch.exp(log_decay.to(torch.promote_types(log_decay.dtype, torch.float32)))


def compute_dtype(x: Tensor, weight: Tensor) -> torch.dtype:
    """Return the dtype of a product of x and a weight: autocast's dtype if autocast is on, else the weight's."""
    device = x.device.type
    if device != "meta" and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        return torch.get_autocast_dtype(device)
    return weight.dtype


def stream(x: Tensor) -> Tensor:
    """Return x, of any shape, in float32, or in float64 if x is float64: the dtype of the residual stream."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def add_branch(branch: Tensor, stream: Tensor) -> Tensor:
    """Return branch + stream, both of one shape.

    If both have one dtype, the sum overwrites the branch, which nothing reads afterwards.
    """
    return branch.add_(stream) if branch.dtype == stream.dtype else stream + branch


class LayerNorm(nn.LayerNorm):
    """Normalise the last axis of x in float32 or float64 and return the dtype of the weight."""

    def forward(self, x: Tensor) -> Tensor:
        if isinstance(x, Proxy):
            return one_node(self, x)  # type: ignore[no-any-return]
        if x.dtype == self.weight.dtype:
            return super().forward(x)
        dtype = torch.promote_types(x.dtype, torch.float32)
        weight, bias = self.weight.to(dtype), self.bias.to(dtype)
        return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(self.weight.dtype)
