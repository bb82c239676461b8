"""Training steps of contrastive objectives: accumulated batches, captions as tokens, retrieval in validation.

Legend: B images, T captions, E width of the common space, L tokens of a caption
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from typing_extensions import Self

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.lightning_private import is_accumulating
from ssmpretrain.encoders.features.encoded import global_kind
from ssmpretrain.encoders.features.pooled import Pooled
from ssmpretrain.evaluation.retrieval import Retrieval
from ssmpretrain.objectives.contrastive.head import ContrastiveHead, trains
from ssmpretrain.objectives.contrastive.named_classes import NamedClasses
from ssmpretrain.objectives.contrastive.open_clip_adapter import Tokenizer
from ssmpretrain.objectives.contrastive.recompute import recomputed
from ssmpretrain.training.optim.global_batch import GlobalBatch
from ssmpretrain.training.ranks.reductions import RankReductions

# `Contrastive` is a mixin: the second base of a class is `Objective` or a subclass, and `super()` calls that one. Type
# checkers need the name here. At run time the mixin has no base, so no class inherits `Objective` twice.
if TYPE_CHECKING:
    from ssmpretrain.objectives.objective import Objective
else:
    Objective = object

_log = logging.getLogger(__name__)


class Contrastive(Objective):
    """Mixin with the training of objectives that own a `ContrastiveHead`, as in `class CLIP(Contrastive, Objective)`.

    A subclass builds its encoder, and then passes a head to `own`. With `trainer.accumulate_grad_batches` the pairs of
    all batches of a step are contrasted with each other, so the step has the loss and the gradient of the large batch.
    Only images, captions and embeddings of each batch are kept. The backward pass computes the activations again, batch
    by batch, with the same masks and drop paths. A locked tower runs once. Batch normalisation sees one batch at a
    time.

    Logs:
        train/loss: Loss over the pairs of all ranks and accumulated batches.
        train/logit_scale: Factor of the cosine similarities, 1 over the temperature, in [1, 100].
        train/cut_captions: Fraction of the captions with more tokens than the text tower takes.
        val/loss: Mean loss per pair, with the first caption of each image. Pairs are contrasted within one batch of one
            rank.
        val/i2t_r1, val/i2t_r5, val/i2t_r10: Fraction of the validation images with one of their captions among the 1, 5
            and 10 nearest captions, in [0, 1], exact over ranks. Images without a caption are left out.
        val/t2i_r1, val/t2i_r5, val/t2i_r10: Fraction of the captions with their image among the 1, 5 and 10 nearest.

    Attributes:
        contrastive: The head.
        num_retrieved: Number of images in the retrieval of the last validation.
    """

    contrastive: ContrastiveHead
    text: nn.Module
    image_projection: nn.Linear
    logit_scale: nn.Parameter
    logit_bias: nn.Parameter | None
    num_retrieved: int = 0
    _ranks: RankReductions

    def own(self, head: ContrastiveHead) -> None:
        """Store a head in the objective: register its tensors, and save its settings."""
        head.register_in(self)
        vars(self)["contrastive"] = head  # not in the list of modules, see `register_in`
        self.save_hyperparameters(head.settings)

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the text tower."""
        return self.contrastive.tokenizer

    # The method

    def encode_image(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as vectors (B, E) of length 1, float32."""
        return self.contrastive.encode_image(self.encoder, images)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed tokens (T, L) of `tokenizer` as vectors (T, E) of length 1, float32."""
        return self.contrastive.encode_text(tokens)

    def zero_shot(self, classes: str | Sequence[str], templates: str | Sequence[str], *, where: str) -> NamedClasses:
        """Prepare a zero-shot classification by names of classes; arguments and errors as `NamedClasses`."""
        return self.contrastive.zero_shot(classes, templates, where=where)

    def forward(self, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as vectors (B, E); see `encode_image`."""
        return self.encode_image(images)

    @property
    def pooled(self) -> Pooled:
        """The global feature of the encoder, see `global_kind`: the one that the projection reads."""
        return global_kind(self.encoder)

    def evaluated_features(self, images: Tensor) -> Tensor:
        """Compute the pooled features (B, F) of images (B, 3, H, W), before the projection, as `knn` does."""
        return self.pooled_vector(images)

    def encode_for_training(self, images: Tensor) -> Tensor:
        """Embed images for the loss of a training step. A subclass may mask patches here."""
        return self.encode_image(images)

    def _embed(self, batches: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Embed the images and the captions of one or several batches, (n, E) each."""
        images = [self._once_or_again(self.encode_for_training, batch["image"], self.encoder) for batch in batches]
        texts = [self._once_or_again(self.encode_text, batch["tokens"], self.text) for batch in batches]
        return torch.cat(images), torch.cat(texts)

    def _once_or_again(self, encode: Callable[[Tensor], Tensor], x: Tensor, tower: nn.Module) -> Tensor:
        """Return `encode(x)`. If batches accumulate, keep no activations, because memory holds those of one batch."""
        if self.trainer.accumulate_grad_batches > 1 and trains(tower):
            return recomputed(encode, x, tower)
        return encode(x)

    # Hooks of Lightning

    def train(self, mode: bool = True) -> Self:
        """Set training or evaluation mode. A locked tower stays in evaluation mode."""
        super().train(mode)
        for tower in (self.encoder, self.text):
            if not trains(tower):
                tower.eval()
        return self

    def configure_model(self) -> None:
        super().configure_model()
        if self._data is not None:
            self._data.tokenizer = self.tokenizer  # workers of the loader tokenise
        text = self.hparams["text"]
        if text["locked"] and text["init_from"] is None:
            rank_zero_only(_log.warning)(
                "%s: text.locked keeps the text tower as it comes, and it comes with fresh weights. Set "
                "model.text.init_from to a run or a file of weights.",
                type(self).__name__,
            )

    def on_before_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if not isinstance(batch, Mapping) or not {"image", "text"} <= batch.keys():
            data = "the loader" if self._data is None else type(self._data).__name__
            got = f"have {', '.join(batch)}" if isinstance(batch, Mapping) else f"are of type {type(batch).__name__}"
            raise UserError(
                f"{type(self).__name__}: a batch is a dictionary of images (image) and their captions (text); those of "
                f"{data} {got}. Use ssmpretrain.datamodules.ImageTextShards."
            )
        if "tokens" not in batch:
            tokens, cut = self.tokenizer(batch["text"])
            batch = {**batch, "tokens": tokens, "cut": cut}
        return batch

    def on_train_start(self) -> None:
        self._waiting: list[dict[str, Any]] = []  # batches of the current optimizer step
        self._captions = torch.zeros(2, device=self.device)  # captions of the epoch: cut ones, all
        self._ranks = RankReductions()
        if (batch := GlobalBatch.of(self.trainer)).size < 2:
            raise UserError(
                f"{type(self).__name__}: a batch has two pairs or more, to contrast them; got a batch of {batch}. "
                "Enlarge it."
            )

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.contrast_step(batch)
        if loss is None:
            return torch.zeros((), device=self.device)  # with several ranks Lightning does not accept None
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss * self.trainer.accumulate_grad_batches  # Lightning divides by it

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:  # otherwise the step waits for more batches
            super().backward(loss, *args, **kwargs)

    def contrast_step(self, batch: dict[str, Any]) -> Tensor | None:
        """Collect the batches of an optimizer step. Return their loss at the last one, and None before.

        Raises:
            ValueError: If the ranks have different numbers of pairs.
        """
        self._waiting.append(batch)
        if is_accumulating(self.trainer):
            return None
        batches, self._waiting = self._waiting, []
        self._check_pairs(batches)
        image, text = self._embed(batches)
        loss = self.contrastive.loss(image, text, self.global_rank, self.trainer.world_size)
        cut = torch.cat([batch["cut"] for batch in batches]).float()
        self._captions += torch.stack([cut.sum(), cut.new_tensor(len(cut))])
        self.log("train/logit_scale", self.logit_scale.detach().exp())
        self.log("train/cut_captions", cut.mean(), sync_dist=True)
        return loss

    def on_train_epoch_end(self) -> None:
        cut, captions = self.trainer.strategy.reduce(self._captions, reduce_op="sum").tolist()
        self._captions.zero_()
        if cut and self.trainer.is_global_zero:
            _log.warning(
                "epoch %d: %s of %s captions had more than %d tokens and were cut",
                self.current_epoch + 1, f"{cut:,.0f}", f"{captions:,.0f}", self.tokenizer.context_length,
            )  # fmt: skip

    def _check_pairs(self, batches: list[dict[str, Any]]) -> None:
        images, texts = (sum(len(batch[name]) for batch in batches) for name in ("image", "tokens"))
        if images != texts:
            raise UserError(
                f"{type(self).__name__}: in training every image has one caption; got {images} images and {texts} "
                "captions in a step."
            )
        if not self._ranks.all_equal(images):  # with unequal numbers the ranks would wait for one another for ever
            counts = ranks.gather(images)
            raise UserError(
                f"{type(self).__name__}: every rank has as many pairs in a step; got {max(counts)} on rank "
                f"{counts.index(max(counts))} and {min(counts)} on rank {counts.index(min(counts))}. "
                "Use a data module of ssmpretrain.datamodules, or a sampler that leaves the last samples out."
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        self.contrastive.keep_scale_in_bounds()

    def on_validation_epoch_start(self) -> None:
        self._retrieval = Retrieval(self.contrastive.embed_dim, self.device)
        self._validated = torch.zeros(2, device=self.device)  # sum of the loss over pairs, number of pairs

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Return embeddings of the images (B, E) and captions (T, E), for the callbacks."""
        image = self.encode_image(batch["image"])
        tokens = batch["tokens"]
        text = self.encode_text(tokens) if len(tokens) else image.new_empty(0, image.shape[1])
        owner = batch.get("owner", torch.arange(len(text), device=text.device))
        self._retrieval.add(image, text, owner)
        captioned = torch.unique(owner)
        if len(captioned):
            first = torch.searchsorted(owner, captioned)
            loss = self.contrastive.loss(image[captioned], text[first])
            self._validated += torch.stack([loss * len(captioned), loss.new_tensor(len(captioned))])
        return {"image": image, "text": text}

    def on_validation_epoch_end(self) -> None:
        loss, pairs = self.trainer.strategy.reduce(self._validated, reduce_op="sum")
        if pairs:
            self.log_validation(loss / pairs)
        if not self.trainer.sanity_checking:
            self.num_retrieved = self._retrieval.num_images()
            for name, value in self._retrieval.result().items():
                self.log(f"val/{name}", value, prog_bar=name == "i2t_r1")

    def log_validation(self, loss: Tensor) -> None:
        """Log the contrastive `loss` of a validation over all ranks. A subclass may log more."""
        self.log("val/loss", loss, prog_bar=True)
