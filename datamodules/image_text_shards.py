"""Images and their captions from webdataset tars, planned, resumed and counted as `ImageShards` are."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from typing_extensions import NotRequired

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.samples import Batcher, DecodedSample, ImageBatch, PreparedSample
from ssmpretrain.datamodules.image_shards import ImageShards, ShardBatches
from ssmpretrain.datamodules.labels.captions import Captions
from ssmpretrain.datamodules.labels.classes import Labels
from ssmpretrain.datamodules.order.plan import stable_hash
from ssmpretrain.datamodules.shards.shard_index import ShardIndex

Tokenizer = Callable[[list[str]], tuple[Tensor, Tensor]]  # T texts -> tokens (T, L) int64, cut (T,) bool


class ImageTextBatch(ImageBatch):
    """What image-text data modules yield: B images and T captions.

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
        """As `Batcher.decode`; raises also where a sample has no usable caption."""
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


class ImageTextShards(ImageShards):
    """Images with captions from webdataset tar files: one image (jpg, jpeg, png, webp) and a text (txt, json) each.

    Plan, resume, faults, servers and labels are those of `ImageShards`. Captions are UTF-8, in any language; white
    space at their ends and control characters are dropped, and nothing else. A sample without a usable caption is
    a bad sample, skipped and counted by cause. Training draws one of an image's captions by seed, epoch and sample;
    evaluation yields all, in order. Batches are `ImageTextBatch`.

    Args:
        train: As in `ImageShards`.
        val: As in `ImageShards`.
        caption: Which member of a sample is its caption: "txt", another extension such as "caption.txt", or
            "json.FIELD" for a string or a list of strings in a JSON object ("json.a.b" deeper); or a list of these,
            of which a sample has the captions of all that it holds.
        crop_scale: As in `ImageData`. A caption speaks of the whole picture, so the default is CLIP's crop, which
            keeps nearly all of it; MAE's could cut away what the caption names.
        horizontal_flip: As in `ImageData`; off by default, as a mirrored image contradicts "left", "right" and text.
        eval_crop_ratio: As in `ImageData`; the default keeps the whole shorter side, as CLIP's evaluation does.
        **kwargs: Further arguments of `ImageShards` and `ImageData`.

    Attributes:
        tokenizer: Texts to tokens (T, L) int64 and whether each was cut, (T,) bool; None leaves texts as they are.
            An objective sets it before a loader is made, so that the worker processes tokenise.

    Raises:
        DataError: If an argument is out of range; in `setup`, as `ImageShards`, and if shards hold no captions.
        FileNotFoundError: In `setup`, if shards are missing.

    Source: Radford et al., "Learning Transferable Visual Models From Natural Language Supervision"
        (arXiv:2103.00020), sec. 2.4; Ilharco et al., open_clip, for the scale of the crop.
    """

    def __init__(
        self,
        train: str | list[str],
        val: str | list[str] | None = None,
        *,
        caption: str | list[str] = "txt",
        crop_scale: tuple[float, float] = (0.9, 1.0),
        horizontal_flip: bool = False,
        eval_crop_ratio: float = 1.0,
        **kwargs: Any,
    ) -> None:
        self.caption = caption
        self._captions = Captions(caption, type(self).__name__)
        self.tokenizer: Tokenizer | None = None
        super().__init__(
            train,
            val,
            crop_scale=crop_scale,
            horizontal_flip=horizontal_flip,
            eval_crop_ratio=eval_crop_ratio,
            **kwargs,
        )

    def _batcher(self, **options: Any) -> CaptionBatcher:
        return CaptionBatcher(self._captions, **options)

    def _batches(self, split: str, *, train: bool, limit: int | None) -> ShardBatches:
        batches = super()._batches(split, train=train, limit=limit)
        assert isinstance(batches.batcher, CaptionBatcher)
        batches.batcher.tokenizer = self.tokenizer
        return batches

    def _check_members(self, shards: Sequence[ShardIndex], where: str) -> None:
        """Every shard holds captions too: one without any is a wrong file."""
        super()._check_members(shards, where)
        without = [shard for shard in shards if shard.extensions and not self._captions.members & set(shard.extensions)]
        if without:
            found = ", ".join(f".{extension}" for extension in sorted(without[0].extensions)[:8])
            raise DataError(
                f"{where}: no caption ({self._captions}) in {len(without):,} of {len(shards):,} shards; "
                f"{without[0].path} holds {found}. Name the member with the captions by `caption`, or leave out such "
                "shards."
            )
