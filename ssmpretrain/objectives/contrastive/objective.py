"""What contrastive objectives share: two towers, one space, a loss over the pairs of all ranks.

Legend: B images, T captions, E width of the common space, L tokens of a caption
"""

from __future__ import annotations

import logging
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, Literal

import torch
import torch.nn.functional as F
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from typing_extensions import Self

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.state_space import check_widths
from ssmpretrain.evaluation.retrieval import Retrieval
from ssmpretrain.objectives.contrastive.open_clip_adapter import Tokenizer, contrastive_loss
from ssmpretrain.objectives.contrastive.recomputed import recomputed
from ssmpretrain.objectives.contrastive.text_tower import TextTower
from ssmpretrain.objectives.contrastive.zero_shot import NamedClasses
from ssmpretrain.objectives.objective import Objective
from ssmpretrain.training.optim.global_batch import GlobalBatch
from ssmpretrain.training.ranks.flags import AnyRank

_log = logging.getLogger(__name__)
Loss = Literal["clip", "siglip"]
MAX_LOGIT_SCALE = math.log(100)
# Initial temperature (as the logarithm of a factor) and bias of the products.
_START = {"clip": (math.log(1 / 0.07), None), "siglip": (math.log(10), -10.0)}


class Contrastive(Objective):
    """Pull the embeddings of an image and of its caption together, and those of other pairs apart.

    A subclass calls `add_contrast` when it has its encoder. With `trainer.accumulate_grad_batches` the pairs of all
    batches of a step are contrasted with each other: the step has the loss and the gradient of the large batch. Of
    each batch the images, captions and embeddings are kept; what lies between is computed again, batch by batch, in the
    backward pass, with the same masks and drop paths. A locked tower runs once. Batch normalisation is of each batch.

    Logs:
        train/loss: Of the pairs of all ranks and accumulated batches.
        train/logit_scale: Factor of the cosine similarities, 1 over the temperature, in [1, 100].
        train/cut_captions: Fraction of the captions that had more tokens than the text tower takes.
        val/loss: Of the pairs of each batch of each rank, the first caption of each image; mean over the pairs.
        val/i2t_r1, val/i2t_r5, val/i2t_r10: Fraction of the validation images that find one of their captions among
            the 1, 5 and 10 nearest of all, in [0, 1]; exact over ranks. Images without a caption take no part.
        val/t2i_r1, val/t2i_r5, val/t2i_r10: Fraction of the captions that find their image so.

    Attributes:
        num_retrieved: Images that took part in the retrieval of the last validation.
    """

    text: nn.Module
    num_retrieved: int = 0
    _ranks: AnyRank

    def add_contrast(
        self,
        text: TextTower,
        embed_dim: int,
        loss: Loss,
        init_logit_scale: float | None,
        init_logit_bias: float | None,
    ) -> None:
        """Add the text tower, the projection of the encoder's features, and temperature and bias of the loss.

        Args:
            text: Settings of the text tower.
            embed_dim: E, at least 1.
            loss: "clip" or "siglip".
            init_logit_scale: Logarithm of the initial factor, in [0, ln 100]; None for the loss's own.
            init_logit_bias: Initial bias of a "siglip" loss; None for the paper's.
        """
        where = type(self).__name__
        if not isinstance(text, TextTower):
            raise UserError(f"{where}: text is a TextTower, its settings; got {text!r}. Leave it out for CLIP's own.")
        if loss not in _START:
            raise UserError(f"{where}: loss is clip or siglip; got {loss!r}.")
        if embed_dim < 1:
            raise UserError(f"{where}: embed_dim is at least 1; got {embed_dim}.")
        check_widths(where, embed_dim=embed_dim)
        if init_logit_bias is not None and loss == "clip":
            raise UserError(f"{where}: the clip loss has no bias; got init_logit_bias {init_logit_bias}. Leave it out.")
        scale, bias = _START[loss]
        scale = scale if init_logit_scale is None else init_logit_scale
        bias = bias if init_logit_bias is None else init_logit_bias
        if not 0 <= scale <= MAX_LOGIT_SCALE:
            raise UserError(f"{where}: init_logit_scale is in [0, ln 100 = {MAX_LOGIT_SCALE:.3f}]; got {scale}.")
        if bias is not None and not math.isfinite(bias):
            raise UserError(f"{where}: init_logit_bias is a finite number; got {bias}. SigLIP's is -10.")
        settings = {"text": asdict(text), "embed_dim": embed_dim, "loss": loss}
        settings |= {"init_logit_scale": scale, "init_logit_bias": bias}
        self.save_hyperparameters(settings)
        self.embed_dim, self.loss_kind = embed_dim, loss
        self.tokenizer = Tokenizer(text.context_length)
        self.text = text.build(embed_dim, self.tokenizer)
        width = getattr(self.encoder, "head_hidden_size", None) or self.encoder.num_features
        self.image_projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=width**-0.5)
        # One number in a list: FSDP2 cannot shard a scalar.
        self.logit_scale = nn.Parameter(torch.tensor([scale]))
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([bias]))
        self._waiting: list[dict[str, Any]] = []  # batches of the optimizer step under way
        if not (_trains(self.encoder) or _trains(self.text)):
            raise UserError(f"{where}: one of the towers trains; got both locked. Leave one of them unlocked.")

    # The method

    def encode_image(self, images: Tensor) -> Tensor:
        """Embeddings (B, E), float32, of length 1, of images (B, 3, H, W)."""
        with self.gradient_of(self.encoder):
            features = self.encoder(images)
        return self.project_image(features)

    def project_image(self, features: Tensor) -> Tensor:
        """Embeddings (B, E) of what the encoder's head reads of images, (B, D)."""
        return F.normalize(self.image_projection(features).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embeddings (T, E), float32, of length 1, of tokens (T, L), as `tokenizer` gives them."""
        with self.gradient_of(self.text):
            features = self.text(tokens)
        return F.normalize(features.float(), dim=-1)

    def gradient_of(self, tower: nn.Module) -> torch.set_grad_enabled:
        """A context in which nothing is kept for the backward pass if the tower is locked."""
        return torch.set_grad_enabled(torch.is_grad_enabled() and _trains(tower))

    def zero_shot(self, classes: str | Sequence[str], templates: str | Sequence[str], *, where: str) -> NamedClasses:
        """Classes by their names, for zero-shot classification; arguments and errors as `NamedClasses`."""
        return NamedClasses(self, classes, templates, where=where)

    def forward(self, images: Tensor) -> Tensor:
        """Embeddings (B, E) of images (B, 3, H, W)."""
        return self.encode_image(images)

    @abstractmethod
    def encode_for_training(self, images: Tensor) -> Tensor:
        """`encode_image` as the loss of a training step sees it."""

    def contrast(self, image: Tensor, text: Tensor, over_ranks: bool = True) -> Tensor:
        """The loss, a scalar in float32, of embeddings (n, E) of which row i of both are a pair.

        Args:
            image, text: Embeddings of this rank.
            over_ranks: Whether the pairs of all ranks, as many on each, are contrasted.
        """
        rank, world = (self.global_rank, self.trainer.world_size) if over_ranks and self._trainer else (0, 1)
        loss = contrastive_loss(self.loss_kind, rank, world)
        bias = () if self.logit_bias is None else (self.logit_bias,)
        with torch.autocast(image.device.type, enabled=False):
            return loss(image, text, self.logit_scale.exp(), *bias)  # type: ignore[no-any-return]

    def _embed(self, batches: list[dict[str, Any]]) -> tuple[Tensor, Tensor]:
        """Embeddings (n, E) of the images and captions of one or several batches."""
        images = [self._once_or_again(self.encode_for_training, batch["image"], self.encoder) for batch in batches]
        texts = [self._once_or_again(self.encode_text, batch["tokens"], self.text) for batch in batches]
        return torch.cat(images), torch.cat(texts)

    def _once_or_again(self, encode: Callable[[Tensor], Tensor], x: Tensor, tower: nn.Module) -> Tensor:
        """`encode(x)`; where batches accumulate nothing is kept of the tower's work, as there is memory for one."""
        if self.trainer.accumulate_grad_batches > 1 and _trains(tower):
            return recomputed(encode, x, tower)
        return encode(x)

    # What Lightning asks for

    def train(self, mode: bool = True) -> Self:
        """Set the mode; a locked tower stays in evaluation mode."""
        super().train(mode)
        for tower in (self.encoder, self.text):
            if not _trains(tower):
                tower.eval()
        return self

    def configure_model(self) -> None:
        super().configure_model()
        if self._data is not None:
            self._data.tokenizer = self.tokenizer  # its workers tokenise
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
        self._waiting = []  # of a run that was stopped
        self._captions = torch.zeros(2, device=self.device)  # of the epoch: cut ones, all
        self._ranks = AnyRank()
        if (batch := GlobalBatch.of(self.trainer)).size < 2:
            raise UserError(f"{type(self).__name__}: a pair is told from others; got a batch of {batch}. Enlarge it.")

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        loss = self.contrast_step(batch)
        if loss is None:
            return torch.zeros((), device=self.device)  # between several ranks Lightning does not take None
        self.log("train/loss", loss, prog_bar=True, sync_dist=True)
        return loss * self.trainer.accumulate_grad_batches  # Lightning divides by it

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        if loss.requires_grad:  # else the batches of the step are still waiting
            super().backward(loss, *args, **kwargs)

    def contrast_step(self, batch: dict[str, Any]) -> Tensor | None:
        """The loss of all batches of an optimizer step with the last of them, None before.

        Raises:
            ValueError: If the ranks have different numbers of pairs.
        """
        self._waiting.append(batch)
        if self.trainer.fit_loop._should_accumulate():
            return None
        batches, self._waiting = self._waiting, []
        self._check_pairs(batches)
        loss = self.contrast(*self._embed(batches))
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
        if not self._ranks.all_equal(images):  # else the ranks would wait for one another
            counts = ranks.gather(images)
            raise UserError(
                f"{type(self).__name__}: every rank has as many pairs in a step; got {max(counts)} on rank "
                f"{counts.index(max(counts))} and {min(counts)} on rank {counts.index(min(counts))}. "
                "Use a data module of ssmpretrain.datamodules, or a sampler that leaves the last samples out."
            )

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        with torch.no_grad():
            self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def on_validation_epoch_start(self) -> None:
        self._retrieval = Retrieval(self.embed_dim, self.device)
        self._validated = torch.zeros(2, device=self.device)  # sum of the loss over pairs, pairs

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Tensor]:
        """Embeddings of the images (B, E) and captions (T, E), for the callbacks."""
        image = self.encode_image(batch["image"])
        tokens = batch["tokens"]
        text = self.encode_text(tokens) if len(tokens) else image.new_empty(0, self.embed_dim)
        owner = batch.get("owner", torch.arange(len(text), device=text.device))
        self._retrieval.add(image, text, owner)
        captioned = torch.unique(owner)
        if len(captioned):
            first = torch.searchsorted(owner, captioned)
            loss = self.contrast(image[captioned], text[first], over_ranks=False)
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
        """Log what a validation came to, of which `loss` is the contrastive one, over all ranks."""
        self.log("val/loss", loss, prog_bar=True)


def _trains(tower: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in tower.parameters())
