"""Image and text tower of a run or an export: options, loading, embeddings, and the protocol of the results."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.commands.shared import encoding
from ssmpretrain.encoders.weights.on_disk import weights_in
from ssmpretrain.encoders.weights.preprocessing import checked_images
from ssmpretrain.objectives.contrastive.open_clip_adapter import Tokenizer, load_open_clip
from ssmpretrain.objectives.contrastive.text_weights import OPEN_CLIP_CONFIG, read_open_clip_config
from ssmpretrain.objectives.restore import load_contrastive


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments that name the checkpoint and decide the embeddings."""
    parser.add_argument(
        "checkpoint", metavar="RUN_OR_CKPT", help="a run of CLIP, a checkpoint of it, or a folder of open_clip's"
    )
    model = parser.add_argument_group("model")
    encoding.add_arguments(model)


@dataclass(frozen=True)
class TwoTowers:
    """Model that maps normalised images (B, 3, H, W) and tokens (T, L) to embeddings (B, E) and (T, E) of length 1.

    Attributes:
        model: The model, in evaluation mode, on `device`.
        image, text: The two towers of the model.
        tokenizer: Maps texts to tokens (T, L) and flags (T,) that mark cut texts.
        name: Name of the model, for the user.
        path: File or folder that the model was read from.
        images: Preparation of the images: size, mean, std, interpolation, crop_pct.
        precision: "32" or "bf16".
        device: Device of the model.
        where: Start of error messages, such as the name of a command.
    """

    model: Any
    image: Callable[[Tensor], Tensor]
    text: Callable[[Tensor], Tensor]
    tokenizer: Tokenizer
    name: str
    path: Path
    images: dict[str, Any]
    precision: str
    device: torch.device
    where: str

    def encode_image(self, images: Tensor) -> Tensor:
        return self._encode(self.image, images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self._encode(self.text, tokens)

    def scale_and_bias(self) -> tuple[float, float]:
        """Return the factor of the cosine similarities, and the bias that is added to them (0 for CLIP's loss)."""
        bias = self.model.logit_bias
        return self.model.logit_scale.exp().item(), 0.0 if bias is None else bias.item()

    def protocol(self) -> dict[str, Any]:
        """Return all settings that decide the embeddings, as plain data."""
        return {
            "model": self.name,
            "checkpoint": str(self.path),
            "context_length": self.tokenizer.context_length,
            **encoding.protocol_of(self),
        }

    def _encode(self, tower: Callable[[Tensor], Tensor], batch: Tensor) -> Tensor:
        with torch.inference_mode():
            batch = batch.to(self.device)
            return encoding.encode(tower, batch, self.precision, what="embeddings", path=self.path, where=self.where)

    def __str__(self) -> str:
        height, width = self.images["size"]
        return f"{self.name}, images of {height} x {width}"


def load_towers(args: argparse.Namespace, *, where: str) -> TwoTowers:
    """Load the model that the arguments of `add_arguments` name, ready to encode.

    Raises:
        ValueError: If the model cannot be read, or has no text tower.
    """
    device = encoding.choose_device(args.device, where=where)
    folder = Path(args.checkpoint).expanduser()
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _of_open_clip(args, device, where)
    if folder.is_dir() and weights_in(folder).name.startswith("open_clip"):
        raise UserError(
            f"{where}: open_clip's weights need {OPEN_CLIP_CONFIG} beside them, to be read; {folder} has "
            "none. Fetch it too, or write the folder anew: export --format open_clip."
        )
    return _of_run(args, device, where)


def _of_run(args: argparse.Namespace, device: torch.device, where: str) -> TwoTowers:
    run = load_contrastive(args.checkpoint, args.ema)
    model, images = run.model, run.images
    size = encoding.set_size(model.encoder, model.encoder_name, args.image_size, images["size"], where=where)
    images["size"] = list(size)
    name = f"{type(model).__name__} of {model.encoder_name}"
    model = model.to(device)
    return TwoTowers(
        model, model.encode_image, model.encode_text, model.tokenizer, name, run.path, images, args.precision, device,
        where,
    )  # fmt: skip


def _of_open_clip(args: argparse.Namespace, device: torch.device, where: str) -> TwoTowers:
    folder = Path(args.checkpoint).expanduser()
    _, text, images = read_open_clip_config(folder / OPEN_CLIP_CONFIG)
    given = [f"--{option}" for option in ("image-size", "ema") if getattr(args, option.replace("-", "_")) is not None]
    other = [key for key in ("hf_model_name", "hf_tokenizer_name", "tokenizer_kwargs") if text.get(key)]
    if given or other or not {"size", "mean", "std"} <= images.keys():
        what = f"{' and '.join(given)} is for runs" if given else "another tokenizer, or images that it says nothing of"
        raise UserError(
            f"{where}: a folder of open_clip's has CLIP's tokenizer and says how its images are made; got {what}: "
            f"{folder}. Evaluate it with open_clip."
        )
    size = images["size"] if isinstance(images["size"], list) else [images["size"]] * 2
    made = {key: images[key] for key in ("mean", "std")} | {"size": size, "crop_pct": 1.0}
    made["interpolation"] = images.get("interpolation", "bicubic")
    made = checked_images(made, folder / OPEN_CLIP_CONFIG)
    length = text.get("context_length", 77)
    if type(length) is not int or length < 3:
        raise UserError(f"{where}: context_length is at least 3 tokens; {folder} says {length!r:.40}. Write it anew.")
    model = load_open_clip(folder).to(device).eval()
    return TwoTowers(
        model, lambda batch: model.encode_image(batch, normalize=True),
        lambda tokens: model.encode_text(tokens, normalize=True), Tokenizer(length),
        "open_clip's model", folder, made, args.precision, device, where,
    )  # fmt: skip
