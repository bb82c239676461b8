"""Frozen encoders: options, loading, features, and the protocol of the results."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from ssmpretrain.commands.shared import encoding
from ssmpretrain.encoders import LoadReport, create_encoder, load_encoder
from ssmpretrain.encoders.features.encoded import encode
from ssmpretrain.encoders.features.pooled import POOLINGS, Pooled, pooled_features, pooled_in
from ssmpretrain.encoders.weights.preprocessing import images_of
from ssmpretrain.encoders.weights.provenance import summary

_FRESH_SEED = 0


def add_arguments(parser: argparse.ArgumentParser, *, pooled: bool = True) -> None:
    """Add the arguments that name the checkpoint and decide the features; without `pooled`, those of maps alone."""
    parser.add_argument("checkpoint", metavar="RUN_OR_CKPT", help="a run folder, or any file that load_encoder reads")
    features = parser.add_argument_group("features")
    if pooled:
        _add_pooling(features)
    else:
        parser.set_defaults(pooling=None, last_blocks=None)
    encoding.add_arguments(features)
    encoding.add_teacher(features)


def _add_pooling(features: argparse._ActionsContainer) -> None:
    features.add_argument(
        "--pooling",
        choices=POOLINGS,
        help="mean over the patches, class token, patch in the middle, both class token and mean, class tokens with "
        "the mean of the last block (class_mean), or the mean with the norm before the encoder's own head (default: "
        "the feature that the run reports, or mean)",
    )
    features.add_argument(
        "--last-blocks", type=int, help="of this many last blocks (default: as the run reports, or 1)"
    )


@dataclass(frozen=True)
class FrozenEncoder:
    """Encoder that maps normalised images (B, 3, H, W) to features (B, F), float32.

    Attributes:
        model: The encoder, in evaluation mode, on `device`.
        report: Report of loading the weights.
        kind: Kind of features: pooling and number of last blocks.
        reason: Reason for the kind, a clause for the user.
        images: Preparation of the images: size, mean, std, interpolation, crop_pct.
        precision: "32" or "bf16".
        device: Device of the model.
        where: Start of error messages, such as the name of a command.
        is_fresh: Whether the weights are fresh, see `untrained`.
    """

    model: nn.Module
    report: LoadReport
    kind: Pooled
    reason: str
    images: dict[str, Any]
    precision: str
    device: torch.device
    where: str
    is_fresh: bool = False

    def __call__(self, images: Tensor) -> Tensor:
        return self._encode(lambda images: pooled_features(self.model, images, [self.kind])[self.kind], images)

    def map(self, images: Tensor) -> Tensor:
        """Return the last map (B, D, h, w), float32, of normalised images (B, 3, H, W), see `Encoded`."""
        return self._encode(lambda images: encode(self.model, images).map, images)

    def untrained(self) -> FrozenEncoder:
        """Return the same architecture with fresh weights of seed 0, for the same images and features."""
        with torch.random.fork_rng():
            torch.manual_seed(_FRESH_SEED)
            model = create_encoder(self.report.encoder, **self.report.args)
        encoding.set_size(model, self.report.encoder, None, self.images["size"], where=self.where)
        report = replace(self.report, source="fresh weights", origin={})
        return replace(self, model=model.to(self.device).eval(), report=report, is_fresh=True)

    @property
    def title(self) -> str:
        """The encoder and the training of its weights, for the title of a picture."""
        if self.is_fresh:
            return f"{self.report.encoder}, untrained (seed {_FRESH_SEED})"
        path, origin = self.report.path, self.report.origin
        name = path.parent.parent.name if path.parent.name == "checkpoints" else path.name
        return f"{self.report.encoder}, {name}" + (f" ({summary(origin)})" if "objective" in origin else "")

    def _encode(self, features: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
        with torch.inference_mode():
            images = images.to(self.device)
            path = self.report.path
            return encoding.encode(features, images, self.precision, what="features", path=path, where=self.where)

    def protocol(self) -> dict[str, Any]:
        """Return all settings that decide the features, as plain data."""
        return {
            "encoder": self.report.encoder,
            "encoder_args": self.report.args,
            "checkpoint": str(self.report.path),
            "weights": self.report.source,
            "pooling": self.kind.pooling,
            "last_blocks": self.kind.last_blocks,
            **encoding.protocol_of(self),
        }

    @property
    def feature(self) -> str:
        """The kind of features in a few words."""
        blocks = "last block" if self.kind.last_blocks == 1 else f"last {self.kind.last_blocks} blocks"
        return f"{self.kind.pooling} of the {blocks}"

    def __str__(self) -> str:
        height, width = self.images["size"]
        what = f"{self.feature} of {self.report.encoder}, images of {height} x {width}"
        return f"{what}; {self.kind.pooling}: {self.reason}"


def load_frozen(args: argparse.Namespace, *, where: str) -> FrozenEncoder:
    """Load the encoder that the arguments of `add_arguments` name, ready to encode."""
    device = encoding.choose_device(args.device, where=where)
    model = load_encoder(args.checkpoint, num_classes=0, ema=args.ema, teacher=args.teacher)
    report = cast(LoadReport, model.load_report)
    images = images_of(model)
    images["size"] = list(encoding.set_size(model, report.encoder, args.image_size, images["size"], where=where))
    kind, reason = _kind(args, report)
    return FrozenEncoder(model.to(device).eval(), report, kind, reason, images, args.precision, device, where)


def _kind(args: argparse.Namespace, report: LoadReport) -> tuple[Pooled, str]:
    """Return the kind of features that the command or the training of the weights chooses, and the reason."""
    said = None if args.pooling is not None else pooled_in(report.origin, report.path)
    if said is not None:
        kind, reason = said, "the feature that the run reports"
    else:
        kind = Pooled(args.pooling or "mean")
        reason = "by --pooling" if args.pooling is not None else "by default, as the file names no feature"
    if args.last_blocks is not None:
        kind, reason = kind._replace(last_blocks=args.last_blocks), f"{reason}; blocks by --last-blocks"
    return kind, reason
