"""Batches of images with captions."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from typing_extensions import NotRequired

from ssmpretrain.base.seeds import stable_hash
from ssmpretrain.datamodules.decoding.batcher import Batcher, ImageBatch, PreparedSample
from ssmpretrain.datamodules.decoding.decode import DecodedSample
from ssmpretrain.datamodules.labels.captions import Captions
from ssmpretrain.datamodules.labels.classes import Labels

Tokenizer = Callable[[list[str]], tuple[Tensor, Tensor]]  # T texts -> tokens (T, L) int64, cut (T,) bool


class ImageTextBatch(ImageBatch):
    """A batch of B images and T captions. Image-text data modules yield batches of this form.

    text: The T captions. In training, one caption of each image, so T = B. In evaluation, all captions of each image,
        next to one another.
    owner: Number of the image in the batch to which each caption belongs, (T,), int64, ascending.
    tokens: Tokens of the captions, (T, L), int64; present if the data module has a tokenizer.
    cut: Whether a caption had more than L tokens and was cut, (T,), bool; present if the data module has a tokenizer.
    """

    text: list[str]
    owner: Tensor
    tokens: NotRequired[Tensor]
    cut: NotRequired[Tensor]


class CaptionBatcher(Batcher):
    """`Batcher` of images with captions.

    Args:
        captions: Reads the captions of a sample.
        **options: Arguments of `Batcher`. A transform for training also selects one caption of each image.

    Attributes:
        tokenizer: Turns captions into tokens; None for batches without tokens.
    """

    tokenizer: Tokenizer | None = None

    def __init__(self, captions: Captions, **options: Any) -> None:
        super().__init__(**options)
        self.captions = captions

    def decode(self, raw: dict[str, Any], labels: Labels) -> DecodedSample:
        """Decode one sample with its captions.

        Raises:
            BadSample: As `Batcher.decode`, and if the sample has no usable caption.
        """
        captions = self.captions.of(raw)  # before the image, which takes a thousand times as long
        return {**super().decode(raw, labels), "captions": captions}

    def transformed(self, decoded: DecodedSample, seed: int) -> PreparedSample:
        """Augment the image with this seed; in training, also choose one caption with it."""
        captions = decoded["captions"]
        if self.transform.augments:
            captions = [captions[stable_hash("caption", seed) % len(captions)]]
        return {**super().transformed(decoded, seed), "captions": captions}

    def collate(self, samples: Sequence[PreparedSample]) -> ImageTextBatch:
        """Stack prepared samples into a batch, and tokenise the captions if there is a tokenizer."""
        text = [caption for sample in samples for caption in sample["captions"]]
        counts = torch.tensor([len(sample["captions"]) for sample in samples])
        owner = torch.arange(len(samples)).repeat_interleave(counts)
        batch = cast("ImageTextBatch", super().collate(samples))
        batch["text"], batch["owner"] = text, owner
        if self.tokenizer is not None:
            batch["tokens"], batch["cut"] = self.tokenizer(text)
        return batch
