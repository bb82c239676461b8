"""Data module for images with captions in webdataset tars."""

from typing import Any

from ssmpretrain.base.errors import DataError
from ssmpretrain.datamodules.decoding.captioned import CaptionBatcher, Tokenizer
from ssmpretrain.datamodules.image_shards import ImageShards
from ssmpretrain.datamodules.labels.captions import Captions
from ssmpretrain.datamodules.order.batches import PlannedBatches
from ssmpretrain.datamodules.splits.shard_split import ShardSplit


class ImageTextShards(ImageShards):
    """Images with captions from webdataset tar files; a sample has one image (jpg, jpeg, png, webp) and a txt or json.

    Plan, resume, bad samples, servers and labels work as in `ImageShards`. Captions are UTF-8, in any language. White
    space at both ends and control characters are removed, and everything else is kept. A sample without a usable
    caption is a bad sample: it is skipped and counted. Training chooses one caption of each image by seed, epoch and
    sample; evaluation yields all captions in order. Batches are `ImageTextBatch`.

    Args:
        train: Tar files, as in `ImageShards`.
        val: Tar files for validation, as in `ImageShards`.
        caption: Member of a sample that holds its caption: "txt", another extension such as "caption.txt", or
            "json.FIELD" for a string or a list of strings in a JSON object ("json.a.b" for a nested object). A list of
            these takes the captions of all listed members that a sample has.
        crop_scale: As in `ImageData`. A caption describes the whole picture, so the default is CLIP's crop, which
            keeps nearly all of the picture. MAE's crop could remove an object that the caption names.
        horizontal_flip: As in `ImageData`; off by default, because a mirrored image contradicts "left" and "right".
        eval_crop_ratio: As in `ImageData`; the default keeps the whole shorter side, as CLIP's evaluation does.
        **kwargs: Further arguments of `ImageShards` and `ImageData`.

    Attributes:
        tokenizer: Function from T texts to their tokens, (T, L) int64, and whether each text was cut, (T,) bool. None
            yields batches without tokens. An objective sets it before a loader is made, so that workers tokenise.

    Raises:
        DataError: If an argument is out of range; in `setup`, as in `ImageShards`, and if shards hold no captions.
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

    def _batches(self, split: str, *, train: bool, limit: int | None) -> PlannedBatches:
        batches = super()._batches(split, train=train, limit=limit)
        assert isinstance(batches.batcher, CaptionBatcher)
        batches.batcher.tokenizer = self.tokenizer
        return batches

    def _open(self, split: str) -> ShardSplit:
        """Find the shards, and raise if a shard holds no captions, because then it is a wrong file."""
        images = super()._open(split)
        shards, members = images.indexes, self._captions.members
        without = [shard for shard in shards if shard.extensions and not members & set(shard.extensions)]
        if without:
            found = ", ".join(f".{extension}" for extension in sorted(without[0].extensions)[:8])
            raise DataError(
                f"{type(self).__name__}: {split}: no caption ({self._captions}) in {len(without):,} of "
                f"{len(shards):,} shards; {without[0].path} holds {found}. Name the member with the captions by "
                "`caption`, or leave out such shards."
            )
        return images
