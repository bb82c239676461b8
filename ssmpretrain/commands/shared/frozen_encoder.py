"""The encoder in a run or a checkpoint, as the commands that evaluate its features use it."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssmpretrain import __version__
from ssmpretrain.base.errors import UserError
from ssmpretrain.commands.shared import devices, encoding
from ssmpretrain.commands.shared.encoder_images import set_size
from ssmpretrain.commands.shared.encoding import autocast
from ssmpretrain.encoders import LoadReport, load_encoder
from ssmpretrain.encoders.features.pooled import POOLINGS, Pooled, pooled_features
from ssmpretrain.encoders.weights.preprocessing import images_of


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the checkpoint, and what decides the features."""
    parser.add_argument("checkpoint", metavar="RUN_OR_CKPT", help="a run folder, or any file that load_encoder reads")
    features = parser.add_argument_group("features")
    features.add_argument(
        "--pooling",
        choices=POOLINGS,
        default="mean",
        help="mean over the patches, class token, patch in the middle, or both class token and mean "
        "(default: %(default)s)",
    )
    features.add_argument("--last-blocks", type=int, default=1, help="of this many last blocks (default: %(default)s)")
    encoding.add_arguments(features)


@dataclass(frozen=True)
class FrozenEncoder:
    """Images (B, 3, H, W), normalised, to features (B, F), float32.

    Attributes:
        model: In evaluation mode, on its device.
        report: How it was loaded.
        kind: Which features.
        images: How its images are made: size, mean, std, interpolation, crop_pct.
        precision: "32" or "bf16".
        device: Where it is.
        where: Opens every message.
    """

    model: nn.Module
    report: LoadReport
    kind: Pooled
    images: dict[str, Any]
    precision: str
    device: torch.device
    where: str

    def __call__(self, images: Tensor) -> Tensor:
        with autocast(self.precision, self.device):
            features = pooled_features(self.model, images, [self.kind])[self.kind]
        if not features.isfinite().all():
            raise UserError(
                f"{self.where}: features are finite numbers; those of {self.report.path} are not. "
                f"Try --precision 32, or another checkpoint."
            )
        return features.float()

    def protocol(self) -> dict[str, Any]:
        """What decides the features, as JSON holds it."""
        return {
            "encoder": self.report.encoder,
            "encoder_args": self.report.args,
            "checkpoint": str(self.report.path),
            "weights": self.report.source,
            "pooling": self.kind.pooling,
            "last_blocks": self.kind.last_blocks,
            "images": self.images,
            "precision": self.precision,
            "ssmpretrain": __version__,
            "torch": torch.__version__,
        }

    def __str__(self) -> str:
        height, width = self.images["size"]
        blocks = "last block" if self.kind.last_blocks == 1 else f"last {self.kind.last_blocks} blocks"
        return f"{self.kind.pooling} of the {blocks} of {self.report.encoder}, images of {height} x {width}"


def load_frozen(args: argparse.Namespace, *, where: str) -> FrozenEncoder:
    """Load the encoder that the arguments of `add_arguments` name, ready to encode."""
    from ssmpretrain.datamodules.decoding.samples import check_image_size  # torchvision takes seconds to import

    device = devices.choose_device(args.device, where=where)
    model = load_encoder(args.checkpoint, num_classes=0, ema=args.ema)
    report = cast(LoadReport, model.load_report)
    images = images_of(model)
    size = check_image_size(images["size"] if args.image_size is None else args.image_size, where)
    set_size(model, report.encoder, size, where=where)
    images["size"] = list(size)
    kind = Pooled(args.pooling, args.last_blocks)
    return FrozenEncoder(model.to(device).eval(), report, kind, images, args.precision, device, where)
