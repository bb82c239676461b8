"""Mamba-2's mixer for images: a state-space model with one decay per head, in one direction or in both.

Attributes have the names of mamba-ssm's `Mamba2`, and those of a second direction the names of Dino-Mamba's code, so
their weights load without renaming.

    B batch, L tokens, D channels, E = expand * D inner channels, H heads of P channels, G groups of heads, N state,
    W taps of the convolution
"""

from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.plain_modules import is_plain
from ssmpretrain.encoders.layers.projection import Projection
from ssmpretrain.encoders.layers.state_space import decay, init_head_decay, init_step_size
from ssmpretrain.kernels.causal_conv1d import causal_conv1d, centred_conv1d
from ssmpretrain.kernels.gated_norm import gated_rms_norm
from ssmpretrain.kernels.ssd import bidirectional_ssd, ssd

Directions = Literal["shared", "separate", "none"]
DIRECTIONS: tuple[str, ...] = get_args(Directions)


class GatedRMSNorm(nn.Module):
    """Compute norm(x silu(z)) weight of tokens, (B, L, E), over each group of channels, in float32."""

    def __init__(self, dim: int, groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.groups, self.eps = groups, eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor, z: Tensor) -> Tensor:
        return gated_rms_norm(x, z, self.weight, eps=self.eps, groups=self.groups)


class Vim2Mixer(nn.Module):
    """Mix the tokens of a sequence by an SSD, the scan of Mamba-2: (B, L, D) to (B, L, D).

    Args:
        dim: D.
        d_state: N.
        d_conv: W, taps of the depthwise convolution over x, B and C.
        expand: E / D; E is rounded down and must be a multiple of P.
        head_dim: P.
        num_groups: G, a divisor of H; the heads of a group share B and C.
        bidirectional: "shared": both directions read the same x, B and C, from one convolution whose taps lie on both
            sides of a token; they differ in their decays A and in the bias of their step sizes. "separate": as in
            Dino-Mamba, each direction has its own causal convolution, decay, skip and norm. "none": one forward
            direction, mamba-ssm's `Mamba2`.
        divide_output: Halve the sum of the two directions, as Dino-Mamba does.

    Source: Dao & Gu, "Transformers are SSMs" (arXiv:2405.21060), section 7; for "separate" Yang et al.
        (arXiv:2511.18380) and its code.
    """

    conv1d: nn.Conv1d
    norm: GatedRMSNorm
    norm_b: GatedRMSNorm
    A_log: Tensor
    D: Tensor
    dt_bias: Tensor

    def __init__(
        self,
        dim: int,
        d_state: int = 64,
        d_conv: int = 4,
        expand: float = 2,
        head_dim: int = 64,
        num_groups: int = 1,
        bidirectional: Directions = "shared",
        divide_output: bool = True,
    ) -> None:
        super().__init__()
        self.inner = inner = int(expand * dim)
        if inner % head_dim:
            raise UserError(
                f"Vim2: head_dim divides expand * embed_dim = {inner}; got {head_dim}. Choose a divisor of {inner}."
            )
        self.num_heads = heads = inner // head_dim
        if heads % num_groups:
            raise UserError(f"Vim2: num_groups divides the {heads} heads; got {num_groups}. Choose a divisor.")
        self.d_state, self.d_conv, self.head_dim, self.num_groups = d_state, d_conv, head_dim, num_groups
        self.bidirectional, self.divide_output = bidirectional, divide_output
        self.convolved = inner + 2 * num_groups * d_state  # channels of x, B and C

        self.in_proj = Projection(dim, inner + self.convolved + heads, bias=False)
        self._add_direction("", "dt_bias")
        if bidirectional == "separate":
            self._add_direction("_b", "dt_b_bias")
        elif bidirectional == "shared":
            self.A_log_b = nn.Parameter(torch.empty(heads))
            self.dt_b_bias = nn.Parameter(torch.empty(heads))
        self.out_proj = Projection(inner, dim, bias=False)
        self.init_state_space()

    def _add_direction(self, suffix: str, dt_bias: str) -> None:
        """Create the parameters of one direction, with a suffix in their names."""
        heads, channels = self.num_heads, self.convolved
        conv = nn.Conv1d(channels, channels, self.d_conv, groups=channels, padding=self.d_conv - 1)
        self.add_module(f"conv1d{suffix}", conv)
        self.register_parameter(dt_bias, nn.Parameter(torch.empty(heads)))
        self.register_parameter(f"A_log{suffix}", nn.Parameter(torch.empty(heads)))
        self.register_parameter(f"D{suffix}", nn.Parameter(torch.empty(heads)))
        self.add_module(f"norm{suffix}", GatedRMSNorm(self.inner, self.num_groups))

    @torch.no_grad()
    def init_state_space(self) -> None:
        """Set mamba-ssm's initial values in place: -A uniform in [1, 16]; D = 1; step sizes as in `init_step_size`."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.startswith("A_log"):
                init_head_decay(parameter)
            elif name.startswith("D"):
                parameter.fill_(1.0)
            else:  # dt_bias, dt_b_bias
                init_step_size(parameter)

    @property
    def in_proj_sizes(self) -> tuple[int, int]:
        """Numbers of columns of `in_proj`: of gate, x, B and C together, and of the step sizes."""
        return self.inner + self.convolved, self.num_heads

    def forward(self, x: Tensor) -> Tensor:
        rows, dt = torch.split(self.in_proj(x), list(self.in_proj_sizes), dim=-1)
        return self.mix(rows, dt)

    def mix(self, rows: Tensor, dt: Tensor) -> Tensor:
        """Scan the two parts of the output of `in_proj` and project the result.

        Args:
            rows: Gate z, x, B and C side by side, (B, L, 2E + 2GN).
            dt: Step sizes before their bias and softplus, (B, L, H).

        Returns:
            Mixed tokens, (B, L, D).
        """
        z, convolved = torch.split(rows, [self.inner, self.convolved], dim=-1)
        dt = dt.to(torch.promote_types(dt.dtype, torch.float32))
        if self.bidirectional == "shared":
            y = self.norm(self._shared(convolved, dt), z)
        else:
            y = self.norm(self._one(convolved, dt, "", "dt_bias", reverse=False), z)
            if self.bidirectional == "separate":
                back = self.norm_b(self._one(convolved, dt, "_b", "dt_b_bias", reverse=True), z)
                y = 0.5 * (y + back) if self.divide_output else y + back
        return self.out_proj(y)  # type: ignore[no-any-return]

    def _shared(self, convolved: Tensor, dt: Tensor) -> Tensor:
        """Scan in both directions from one convolution: (B, L, E)."""
        x, B, C = self._split(self._centred(convolved))
        y = bidirectional_ssd(
            x,
            _step_size(dt, self.dt_bias),
            decay(self.A_log),
            B,
            C,
            self.D.to(dt.dtype),
            dt_backward=_step_size(dt, self.dt_b_bias),
            A_backward=decay(self.A_log_b),
            divide_output=self.divide_output,
        )
        return y.flatten(2)

    def _one(self, convolved: Tensor, dt: Tensor, suffix: str, dt_bias: str, *, reverse: bool) -> Tensor:
        """Scan in one direction, with the parameters of that direction: (B, L, E)."""
        x, B, C = self._split(self._causal(getattr(self, f"conv1d{suffix}"), convolved, reverse))
        step = _step_size(dt, getattr(self, dt_bias))
        A, D = decay(getattr(self, f"A_log{suffix}")), getattr(self, f"D{suffix}").to(dt.dtype)
        return ssd(x, step, A, B, C, D, reverse=reverse).flatten(2)

    def _split(self, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Split convolved rows into x, (B, L, H, P), B and C, (B, L, G, N)."""
        state = self.num_groups * self.d_state
        x, B, C = torch.split(rows, [self.inner, state, state], dim=-1)
        heads, groups = (self.num_heads, self.head_dim), (self.num_groups, self.d_state)
        return torch.unflatten(x, -1, heads), torch.unflatten(B, -1, groups), torch.unflatten(C, -1, groups)

    def _centred(self, rows: Tensor) -> Tensor:
        """Convolve rows (B, L, channels) with taps on both sides of each token, then SiLU."""
        if is_plain(self.conv1d, nn.Conv1d, bias=True):
            weight, bias = self.conv1d.weight.squeeze(1), self.conv1d.bias
            return centred_conv1d(rows.mT, weight, bias, activation="silu").mT
        first = self.d_conv - 1 - self.d_conv // 2  # of the outputs of a convolution with padding on both sides
        return F.silu(self.conv1d(rows.mT)[..., first : first + rows.shape[1]]).mT

    def _causal(self, conv: nn.Conv1d, rows: Tensor, reverse: bool) -> Tensor:
        """Convolve rows (B, L, channels) with taps at and before each token in the direction, then SiLU."""
        if is_plain(conv, nn.Conv1d, bias=True):
            weight, bias = conv.weight.squeeze(1), conv.bias
            return causal_conv1d(rows.mT, weight, bias, activation="silu", reverse=reverse).mT
        ordered = rows.flip(1) if reverse else rows
        out = F.silu(conv(ordered.mT)[..., : rows.shape[1]]).mT
        return out.flip(1) if reverse else out


def _step_size(dt: Tensor, bias: Tensor) -> Tensor:
    """Return softplus(dt + bias), (B, L, H), in float32 or float64."""
    return F.softplus(dt + bias.to(dt.dtype))
