"""Samples of images with captions, and their batches."""

from collections.abc import Callable, Sequence
from typing import Any

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
    """A batch of B images and T captions, as image-text data modules yield it.

    text: T captions: in training one of each image's, T = B; in evaluation all, those of an image side by side.
    owner: (T,), int64, ascending: the image in the batch that each caption belongs to.
    tokens: (T, L), int64; where the data module has a tokenizer.
    cut: (T,), bool: the caption had more tokens than L and lost them; likewise.
    """

    text: list[str]
    owner: Tensor
    tokens: NotRequired[Tensor]
    cut: NotRequired[Tensor]


class CaptionBatcher(Batcher):
    """A `Batcher` of images with their captions.

    Args:
        captions: Reads the captions of a sample.
        **options: As in `Batcher`; the transform says whether this is training.
    """

    tokenizer: Tokenizer | None = None

    def __init__(self, captions: Captions, **options: Any) -> None:
        super().__init__(**options)
        self.captions = captions

    def decode(self, raw: dict[str, Any], labels: Labels) -> DecodedSample:
        """Decode one sample as `Batcher.decode` does; raise also if it has no usable caption."""
        captions = self.captions.of(raw)  # first: an image takes a thousand times as long
        return {**super().decode(raw, labels), "captions": captions}

    def transformed(self, decoded: DecodedSample, seed: int) -> PreparedSample:
        """Augment the image and, in training, choose a caption, as the seed decides."""
        captions = decoded["captions"]
        if self.transform.train is not None:
            captions = [captions[stable_hash("caption", seed) % len(captions)]]
        return {**super().transformed(decoded, seed), "captions": captions}

    def collate(self, samples: Sequence[PreparedSample]) -> ImageTextBatch:
        """Stack prepared samples; tokenise where there is a tokenizer."""
        text = [caption for sample in samples for caption in sample["captions"]]
        counts = torch.tensor([len(sample["captions"]) for sample in samples])
        owner = torch.arange(len(samples)).repeat_interleave(counts)
        images = super().collate(samples)
        batch: ImageTextBatch = {
            "image": images["image"],
            "label": images["label"],
            "key": images["key"],
            "text": text,
            "owner": owner,
        }
        if self.tokenizer is not None:
            batch["tokens"], batch["cut"] = self.tokenizer(text)
        return batch
