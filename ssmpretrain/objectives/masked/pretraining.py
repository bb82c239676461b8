"""The base class of objectives that predict patches of pixels: loss, training steps, pictures."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ssmpretrain.encoders.features.maps import freeze_after_map
from ssmpretrain.objectives.masked.patches import on_pixels, patch_grid, patch_statistics, patchify, unpatchify
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Schedule


class Reconstruction(NamedTuple):
    """Prediction of an objective for a batch of images.

    Attributes:
        predicted: Predicted pixels of every patch, (B, L, 3 * p * p), float32, in the units of the target.
        hidden: True for patches that the prediction did not see, (B, L), bool. The loss covers these patches.
    """

    predicted: Tensor
    hidden: Tensor


class Pretraining(Objective):
    """Base class of objectives that predict the pixels of hidden patches. Subclasses define `reconstruct`.

    Args:
        encoder: Name of the encoder; None takes the encoder of `init_from`, if the subclass has this argument.
        encoder_args: Further arguments of the encoder.
        normalize_targets: Whether to standardise the pixels of each patch before the loss.
        optimizer: Settings of AdamW; the learning rate scales with the global batch.
        schedule: Warm-up and decay of the learning rate.
        **settings: Other arguments of the subclass, plain data. They are saved as hyper-parameters too.

    Attributes:
        patch_size: p, side in pixels of the squares that are predicted as a whole; set by the subclass.
        unit: Patches along the side of the squares that are hidden as a whole.
        reads_map_alone: Whether the losses read only the encoder's last map. The layers after the map are then frozen.
        column_titles: Titles in figures for the visible part and for the predicted part.
    """

    patch_size: int
    unit: int = 1
    reads_map_alone: bool = True
    column_titles: tuple[str, str] = ("visible", "prediction")

    def __init__(
        self,
        encoder: str | None,
        encoder_args: dict[str, Any] | None,
        normalize_targets: bool,
        optimizer: AdamW,
        schedule: Schedule,
        **settings: Any,
    ) -> None:
        super().__init__(encoder, encoder_args, optimizer, schedule, normalize_targets=normalize_targets, **settings)
        self.normalize_targets = normalize_targets

    def build_encoder(self) -> Any:
        encoder = super().build_encoder()
        if self.reads_map_alone:
            freeze_after_map(encoder)
        return encoder

    # The method

    @abstractmethod
    def reconstruct(self, images: Tensor, generator: torch.Generator | None = None) -> Reconstruction:
        """Hide patches of `images` (B, 3, H, W) and predict them. `generator` fixes the choice of hidden patches."""

    def loss(self, images: Tensor, reconstruction: Reconstruction) -> Tensor:
        """Compute the mean of `pixel_error` over the pixels of the hidden patches, a scalar in float32."""
        targets = patchify(images.float(), self.patch_size)
        if self.normalize_targets:
            mean, std = patch_statistics(targets)
            targets = (targets - mean) / std
        error = self.pixel_error(reconstruction.predicted, targets).mean(dim=-1)  # (B, L)
        return (error * reconstruction.hidden).sum() / reconstruction.hidden.sum()

    def pixel_error(self, predicted: Tensor, targets: Tensor) -> Tensor:
        """Compute the error of each pixel: the squared difference, elementwise."""
        return (predicted - targets).square()

    def predicted_images(self, images: Tensor, reconstruction: Reconstruction) -> Tensor:
        """Join the predicted patches to images (B, 3, H, W), in the units of `images`.

        With normalised targets each patch gets the mean and deviation of the true patch, as in MAE's figures.
        """
        predicted = reconstruction.predicted
        if self.normalize_targets:
            mean, std = patch_statistics(patchify(images.float(), self.patch_size))
            predicted = predicted * std + mean
        return unpatchify(predicted, self.patch_size, (images.shape[2], images.shape[3]))

    def pictures(
        self, images: Tensor, reconstruction: Reconstruction, mean: Sequence[float], std: Sequence[float]
    ) -> dict[str, Tensor]:
        """Return the columns of a figure by title: images, visible parts, predicted parts, both together.

        Args:
            images: Normalised images, (B, 3, H, W).
            reconstruction: Prediction for these images.
            mean, std: Mean and standard deviation of the normalisation, three numbers each.

        Returns:
            Pictures (B, 3, H, W) in [0, 1], on the CPU. Patches that a column does not show are light grey.
        """
        predicted = self.predicted_images(images, reconstruction)
        shift, scale = (torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (mean, std))
        image, guess = ((pixels.float().cpu() * scale + shift).clamp(0, 1) for pixels in (images, predicted))
        grid = (images.shape[2] // self.patch_size, images.shape[3] // self.patch_size)
        hidden = on_pixels(reconstruction.hidden, grid, self.patch_size).cpu()  # (B, 1, H, W)
        grey = torch.tensor(0.85)
        seen_title, guess_title = self.column_titles
        return {
            "image": image,
            f"{seen_title} ({1 - float(hidden.float().mean()):.0%})": torch.where(hidden, grey, image),
            guess_title: torch.where(hidden, guess, grey),  # no loss trains its prediction of the visible part
            f"{seen_title} + {guess_title}": torch.where(hidden, guess, image),
        }

    def patch_grid(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the grid h, w of images of H x W pixels; raise if the sides do not fit the mask unit."""
        return patch_grid(type(self).__name__, size, self.patch_size, self.unit)

    def check_image_size(self, size: tuple[int, int]) -> None:
        self.patch_grid(size)

    # Hooks of Lightning

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        images = batch["image"]
        loss = self.loss(images, self.reconstruct(images))
        self.log("train/loss", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        images = batch["image"]
        masks = torch.Generator(images.device).manual_seed(batch_idx)
        loss = self.loss(images, self.reconstruct(images, masks))
        self.log("val/loss", loss, prog_bar=True, batch_size=len(images), sync_dist=True)
