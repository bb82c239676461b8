"""Work of encoders: inference, a training step with a head for 1000 classes, and a step of masked pretraining."""

from __future__ import annotations

from collections.abc import Callable
from itertools import cycle

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ssmpretrain
from ssmpretrain.encoders.features import TappedEncoder
from ssmpretrain.objectives import MAE, Pretraining, SimMIM


def network(name: str, pixels: int) -> nn.Module:
    """Build an encoder of this project, or a model of timm (attention through SDPA), by name, for square images."""
    takes_any_size = "vmamba" in name
    return ssmpretrain.create_encoder(name, img_size=None if takes_any_size else pixels)


def images(B: int, pixels: int, device: torch.device | str = "cpu") -> Tensor:
    return torch.randn(B, 3, pixels, pixels, device=device)


def inference(network: nn.Module, batches: list[Tensor], dtype: torch.dtype = torch.float32) -> Callable[[], Tensor]:
    """Return a function that computes the logits of the next batch without gradients; below float32 under autocast."""
    network.eval()
    turn = cycle(batches)

    @torch.inference_mode()
    def run() -> Tensor:
        batch = next(turn)
        with autocast(batch.device, dtype):
            return network(batch)  # type: ignore[no-any-return]

    return run


def flops_of(run: Callable[[], object]) -> int:
    """Count the floating-point operations of matrix products, convolutions and scans in a call of `run`."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def maps(name: str, image: Tensor) -> Callable[[], list[Tensor]]:
    """Return a function that computes the default taps of an encoder, in bfloat16 under autocast on a GPU."""
    tapped = TappedEncoder(ssmpretrain.create_encoder(name, num_classes=0)).to(image.device).eval()

    @torch.inference_mode()
    def run() -> list[Tensor]:
        with autocast(image.device, _dense_dtype(image)):
            return tapped(image)  # type: ignore[no-any-return]

    return run


def maps_and_gradients(name: str, image: Tensor) -> Callable[[], None]:
    """Return a function that computes the default taps of an encoder, and gradients of all its parameters."""
    tapped = TappedEncoder(ssmpretrain.create_encoder(name, num_classes=0)).to(image.device).train()

    def run() -> None:
        tapped.zero_grad()
        with autocast(image.device, _dense_dtype(image)):
            loss = torch.stack([one.float().square().mean() for one in tapped(image)]).sum()
        loss.backward()  # type: ignore[no-untyped-call]

    return run


def _dense_dtype(image: Tensor) -> torch.dtype:
    return torch.bfloat16 if image.device.type == "cuda" else torch.float32


def training_step(
    network: nn.Module, batches: list[Tensor], dtype: torch.dtype = torch.float32
) -> Callable[[], Tensor]:
    """Return a function that trains on the next batch (forward, backward, AdamW) and returns the loss."""
    return _step(
        network,
        lambda batch: nn.functional.cross_entropy(network(batch), torch.arange(len(batch), device=batch.device)),
        batches,
        dtype,
    )


def pretraining_step(
    objective: Pretraining, batches: list[Tensor], dtype: torch.dtype = torch.float32
) -> Callable[[], Tensor]:
    """Return a function that trains a pretraining objective on the next batch, with new masks in every step."""
    return _step(objective, lambda batch: objective.loss(batch, objective.reconstruct(batch)), batches, dtype)


def _step(
    module: nn.Module, loss_of: Callable[[Tensor], Tensor], batches: list[Tensor], dtype: torch.dtype
) -> Callable[[], Tensor]:
    module.train()
    optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=1e-4)
    turn = cycle(batches)

    def step() -> Tensor:
        batch = next(turn)
        with autocast(batch.device, dtype):
            loss = loss_of(batch)
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        return loss.detach()

    return step


def masked_model(method: str) -> Pretraining:
    """Build MAE or SimMIM of VMamba-T as in the recipes, with 60 % of the 32-pixel units hidden."""
    if method == "simmim":
        return SimMIM("vmamba_tiny_s1l8", mask_ratio=0.6)
    return MAE("vmamba_tiny_s1l8", mask_ratio=0.6, decoder="vit")


def autocast(device: torch.device, dtype: torch.dtype) -> torch.autocast:
    """Return autocast to dtype, which does nothing for float32."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)
