"""Vim's mixer: selective scans of a sequence in one direction or in both.

Attributes have the names of the official state dicts, so published weights load without renaming.

    B batch, L tokens, D channels, E = expand * D inner channels, N state, R rank of the step size, W width of the conv
"""

import math
from typing import Literal, cast, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.encoders.layers.plain_modules import is_plain
from ssmpretrain.encoders.layers.state_space import LayerNorm, decay, init_decay, init_step_size
from ssmpretrain.kernels.bidirectional_scan import ScanDirection, bidirectional_scan
from ssmpretrain.kernels.dispatch import without_autocast
from ssmpretrain.kernels.selective_scan import selective_scan

BackwardBias = Literal["mamba", "zero"]
BACKWARD_BIAS: tuple[str, ...] = get_args(BackwardBias)


class VimMixer(nn.Module):
    """Mix the tokens of a sequence by selective scans in both directions: (B, L, D) to (B, L, D).

    Args:
        dim: D.
        d_state: N, states per inner channel.
        d_conv: W, taps of the causal depthwise convolution.
        expand: E / D; E is rounded down.
        bidirectional: "ssm_conv": two directions, each with its own convolution, projections, decay A and skip D.
            "ssm": two directions with their own decay A and everything else in common; as published, their sum is never
            halved. Any other word: one forward direction.
        divide_output: Halve the sum of the two directions of "ssm_conv".
        backward_dt_bias_init, scan_norm: As in `VimBlocks`.

    Source: Zhu et al., "Vision Mamba" (arXiv:2401.09417), algorithm 1; the norm of Kapse et al. (arXiv:2502.00594).
    """

    conv1d: nn.Conv1d
    x_proj: nn.Linear
    dt_proj: nn.Linear
    A_log: Tensor
    D: Tensor

    def __init__(
        self,
        dim: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: float = 2,
        bidirectional: str = "ssm_conv",
        divide_output: bool = True,
        backward_dt_bias_init: str = "mamba",
        scan_norm: bool = False,
    ) -> None:
        super().__init__()
        self.d_state, self.d_conv = d_state, d_conv
        self.bidirectional, self.divide_output = bidirectional, divide_output
        self.backward_dt_bias_init = backward_dt_bias_init
        self.dt_rank = math.ceil(dim / 16)
        self.inner = inner = int(expand * dim)

        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.directions: list[str] = []
        self._add_direction("")
        if bidirectional == "ssm":
            self.A_b_log = nn.Parameter(torch.empty(inner, d_state))
        if bidirectional == "ssm_conv":
            self._add_direction("_b")
        self.layernorm = LayerNorm(inner) if scan_norm else None
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.init_state_space()

    def _add_direction(self, suffix: str) -> None:
        """Create the parameters of one scan, with a suffix in their names: "" for forward, "_b" for backward."""
        inner, projected = self.inner, self.dt_rank + 2 * self.d_state
        self.directions.append(suffix)
        self.add_module(f"conv1d{suffix}", nn.Conv1d(inner, inner, self.d_conv, groups=inner, padding=self.d_conv - 1))
        self.add_module(f"x_proj{suffix}", nn.Linear(inner, projected, bias=False))
        self.add_module(f"dt_proj{suffix}", nn.Linear(self.dt_rank, inner))
        self.register_parameter(f"A{suffix}_log", nn.Parameter(torch.empty(inner, self.d_state)))
        self.register_parameter(f"D{suffix}", nn.Parameter(torch.empty(inner)))

    @torch.no_grad()
    def init_state_space(self) -> None:
        """Set the initial values of Mamba in place: A = -1, ..., -N; D = 1; step sizes log-uniform in [0.001, 0.1]."""
        for name, parameter in self.named_parameters(recurse=False):
            if name.endswith("_log"):
                init_decay(parameter)
            else:  # D, D_b
                parameter.fill_(1.0)
        for suffix in self.directions:
            dt_proj = getattr(self, f"dt_proj{suffix}")
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            if suffix and self.backward_dt_bias_init == "zero":
                nn.init.zeros_(dt_proj.bias)
            else:
                init_step_size(dt_proj.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.mix(self.in_proj(x))

    def mix(self, xz: Tensor) -> Tensor:
        """Scan the output of `in_proj` and project the result.

        Args:
            xz: Content and gate side by side, (B, L, 2E).

        Returns:
            Mixed tokens, (B, L, D).
        """
        if self.layernorm is not None:
            return self.out_proj(self._normed_scan(xz, self.layernorm))  # type: ignore[no-any-return]
        if self.bidirectional == "ssm":
            x, z = xz.transpose(1, 2).chunk(2, dim=1)  # (B, E, L) each
            return self.out_proj(self._scan_shared(x, z).transpose(1, 2))  # type: ignore[no-any-return]
        return self.out_proj(self.scan(xz, *self.directions))  # type: ignore[no-any-return]

    def scan(self, xz: Tensor, ahead: str, back: str | None = None) -> Tensor:
        """Scan content and gate in one direction or in two.

        Args:
            xz: Content and gate side by side, (B, L, 2E).
            ahead: Suffix of the parameters that scan from the first token to the last.
            back: Suffix of the parameters that scan from the last token to the first; None for one direction.

        Returns:
            The gated sum of the directions, (B, L, E).
        """
        suffixes = (ahead,) if back is None else (ahead, back)
        modules = [self._modules_of(suffix) for suffix in suffixes]
        for conv, x_proj, dt_proj in modules:
            projections_are_plain = is_plain(x_proj, nn.Linear) and is_plain(dt_proj, nn.Linear, bias=True)
            if not (projections_are_plain and is_plain(conv, nn.Conv1d, bias=True)):
                return self._scan_by_modules(xz, ahead, back)
        directions = []
        for suffix, (conv, x_proj, dt_proj) in zip(suffixes, modules, strict=True):
            A, D = decay(getattr(self, f"A{suffix}_log")), getattr(self, f"D{suffix}")
            weight, bias = conv.weight.squeeze(1), cast(Tensor, conv.bias)
            directions.append(ScanDirection(weight, bias, x_proj.weight, dt_proj.weight, dt_proj.bias, A, D))
        return bidirectional_scan(xz, *directions, divide_output=self.divide_output)

    def _scan_by_modules(self, xz: Tensor, ahead: str, back: str | None) -> Tensor:
        """Compute `scan` by calls of all modules. This is slower, and more is saved for the backward pass."""
        x, z = xz.chunk(2, dim=-1)
        y = self._scan_ungated(x, ahead, back)
        return (y * F.silu(z.to(y.dtype))).to(xz.dtype)

    def _scan_ungated(self, x: Tensor, ahead: str, back: str | None = None) -> Tensor:
        """Sum the scans of content (B, L, E) in one direction or in two, in float32 or wider."""
        y = self._scan_direction(x, ahead)
        if back is not None:
            y = y + self._scan_direction(x.flip(1), back).flip(1)
            if self.divide_output:
                y = 0.5 * y
        return y

    def _scan_direction(self, x: Tensor, suffix: str) -> Tensor:
        """Scan content (B, L, E) from its first token on, before the gate, in float32 or wider."""
        conv, x_proj, dt_proj = self._modules_of(suffix)
        u = F.silu(conv(x.mT)[..., : x.shape[1]])  # (B, E, L)
        dt_raw, B, C = x_proj(u.mT).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        delta, bias = self._step_size(dt_proj, dt_raw)
        A = decay(getattr(self, f"A{suffix}_log"))
        skip = getattr(self, f"D{suffix}").to(A.dtype)
        return selective_scan(u.to(A.dtype), delta.mT, A, B.mT, C.mT, skip, None, bias, True).mT

    def _step_size(self, dt_proj: nn.Linear, dt_raw: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the step size before its softplus, (B, L, E), and the bias that the scan adds to it in float32.

        The bias is None if `dt_proj` has a hook or an adapter: the module is then called and has added its bias.
        """
        dt_raw = dt_raw.to(self.D.dtype)
        with without_autocast(dt_raw.device.type):
            if not is_plain(dt_proj, nn.Linear, bias=True):
                return dt_proj(dt_raw), None
            bias = dt_proj.bias.to(torch.promote_types(dt_proj.bias.dtype, torch.float32))
            return F.linear(dt_raw, dt_proj.weight), bias

    def _modules_of(self, suffix: str) -> tuple[nn.Conv1d, nn.Linear, nn.Linear]:
        return getattr(self, f"conv1d{suffix}"), getattr(self, f"x_proj{suffix}"), getattr(self, f"dt_proj{suffix}")

    def _scan_shared(self, x: Tensor, z: Tensor | None) -> Tensor:
        """Scan content x and gate z, (B, E, L) each, to (B, E, L), as the mixer of Vim v1 does.

        Both directions have the same convolution, step sizes, B, C and D; only their decays differ. If z is None, the
        result is not gated.
        """
        u = F.silu(self.conv1d(x)[..., : x.shape[-1]])
        dt_raw, input_gate, output_gate = self.x_proj(u.transpose(1, 2)).split(
            [self.dt_rank, self.d_state, self.d_state], dim=-1
        )
        delta, bias = self._step_size(self.dt_proj, dt_raw)
        delta, B, C = delta.transpose(1, 2), input_gate.transpose(1, 2), output_gate.transpose(1, 2)
        A = decay(self.A_log)
        skip = self.D.to(A.dtype)
        y = selective_scan(u, delta, A, B, C, skip, z, bias, True)
        y_reverse = selective_scan(u, delta, decay(self.A_b_log), B, C, skip, z, bias, True, reverse=True)
        return y + y_reverse

    def _normed_scan(self, xz: Tensor, norm: nn.Module) -> Tensor:
        """Compute silu(z) * norm(sum of the directions) from content and gate: (B, L, 2E) to (B, L, E).

        The norm comes before the gate, and `bidirectional_scan` applies the gate itself. So this calls the modules.
        """
        x, z = xz.chunk(2, dim=-1)
        shared = self.bidirectional == "ssm"
        y = self._scan_shared(x.mT, None).mT if shared else self._scan_ungated(x, *self.directions)
        return norm(y) * F.silu(z)  # type: ignore[no-any-return]
