"""What is compared with what.

B batch, E channels, N states, L tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import timm
import torch
from torch import Tensor, nn

import ssmpretrain
from ssmpretrain.kernels.selective_scan import selective_scan


def scan_inputs(B: int, E: int, N: int, L: int, requires_grad: bool) -> list[Tensor]:
    """u, delta, A, B, C, D, z and delta_bias as a Mamba block would give them; fixed seed."""
    random = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=random)

    decay = -torch.arange(1, N + 1, dtype=torch.float32).expand(E, N).contiguous()
    inputs = [normal(B, E, L), normal(B, E, L), decay, normal(B, N, L), normal(B, N, L), normal(E), normal(B, E, L)]
    inputs.append(normal(E) - 4)
    return [tensor.requires_grad_(requires_grad) for tensor in inputs]


def scan(impl: str, inputs: list[Tensor], backward: bool) -> Callable[[], Tensor]:
    """One selective scan with softplus, skip, bias and gate; `backward` adds all gradients."""
    u, delta, A, B, C, D, z, bias = inputs

    def run() -> Tensor:
        y = loop_scan(*inputs) if impl == "loop" else selective_scan(u, delta, A, B, C, D, z, bias, True)
        if backward:
            y.sum().backward()  # type: ignore[no-untyped-call]
        return y.detach()

    return run if backward else torch.no_grad()(run)


def loop_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor) -> Tensor:
    """The scan as one writes it first: a Python loop over time, whole-sequence decays, one einsum a step."""
    delta = nn.functional.softplus(delta + bias[:, None])
    decay = torch.exp(torch.einsum("bel,en->beln", delta, A))
    drive = torch.einsum("bel,bnl,bel->beln", delta, B, u)
    state = torch.zeros_like(decay[:, :, 0])
    outputs = []
    for t in range(u.shape[2]):
        state = decay[:, :, t] * state + drive[:, :, t]
        outputs.append(torch.einsum("ben,bn->be", state, C[:, :, t]))
    y = torch.stack(outputs, dim=2) + u * D[:, None]
    return y * nn.functional.silu(z)


def model(name: str, pixels: int) -> nn.Module:
    """An encoder with a head for 1000 classes: ours, or timm's DeiT-Ti (attention through SDPA)."""
    if name.startswith("vim"):
        return ssmpretrain.create_encoder(name, img_size=pixels)  # type: ignore[no-any-return]
    return timm.create_model(name, img_size=pixels)  # type: ignore[no-any-return]


def inference(network: nn.Module, pixels: int, B: int = 1) -> Callable[[], Any]:
    """Logits of a batch without gradients."""
    network.eval()
    images = torch.randn(B, 3, pixels, pixels)
    return torch.inference_mode()(lambda: network(images))


def training_step(network: nn.Module, pixels: int, B: int) -> Callable[[], Any]:
    """Forward, backward and AdamW on a fixed batch."""
    network.train()
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)
    images, labels = torch.randn(B, 3, pixels, pixels), torch.arange(B)

    def step() -> None:
        loss = nn.functional.cross_entropy(network(images), labels)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()

    return step
