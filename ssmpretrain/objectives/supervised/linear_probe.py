"""Linear classification of frozen features: a sweep of poolings and learning rates from one pass of the encoder.

Legend: B images, C classes, N heads (kinds of features x learning rates).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, cast

import torch
import torch.nn.functional as F
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.run_folder import RunFolder, takes_results
from ssmpretrain.base.whole_files import replace_json
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.encoders.features.pooled import (
    Pooled,
    Pooling,
    check_kinds,
    last_blocks,
    pool,
    pooled_width,
)
from ssmpretrain.encoders.features.taps import TapRead
from ssmpretrain.evaluation.accuracy import right_ones
from ssmpretrain.objectives.supervised.probe_checks import check_options
from ssmpretrain.objectives.supervised.probe_heads import (
    Normalisation,
    Sweep,
    attentive_sweep,
    linear_sweeps,
)
from ssmpretrain.objectives.supervised.probe_report import (
    ATTENTIVE,
    NORMS,
    best_in_a_sentence,
    probe_table,
    training_images,
    validation_images,
)
from ssmpretrain.objectives.supervised.supervised import Supervised
from ssmpretrain.training.optim.global_batch import GlobalBatch
from ssmpretrain.training.optim.head_optimizer import HeadOptimizer
from ssmpretrain.training.optim.lars import LARS
from ssmpretrain.training.optim.schedules import Cosine, Schedule

_MUST_AGREE = (
    "num_classes", "poolings", "last_blocks", "read", "normalisation", "learning_rates", "attentive",
    "attentive_heads", "attentive_learning_rates",
)  # fmt: skip
_OF_OLDER_CHECKPOINTS = {"read": "stream", "normalisation": "batch"}


class LinearProbe(Supervised):
    """Linear probe: frozen features, a normalisation, and one linear layer. The defaults are MAE's protocol.

    Other options repeat the protocols of DINO, DINOv2, LeJEPA and Dino-Mamba; docs/evaluation.md lists them.

    The encoder is always in evaluation mode and gets no gradient. Each head has a kind of features, a number of last
    blocks and a learning rate. All heads train in float32 on the features of one pass, each as if it were alone.

    The best head is chosen on the validation images, as DINOv2 reports its probes. For a result without this choice,
    give one pooling and one learning rate. Results of probes differ by ten points with pooling, norm, learning rate,
    batch and crop. Therefore all of these are written beside the result, in `probe.json` of the run's folder and in the
    sentence at the end of the run.

    Args:
        init_from: Source of the encoder's weights, anything that `load_encoder` reads; None probes fresh weights.
        encoder: Name of the encoder; None takes the encoder of `init_from`.
        encoder_args: Further arguments of the encoder.
        num_classes: Number of classes. Labels are from 0 to num_classes - 1.
        poolings: Kinds of pooling, see `Pooled`. None takes mean, class and both for an encoder with a class token, and
            mean for one without.
        last_blocks: Numbers of last blocks (or stages) whose features are read. Each number makes its own heads.
        read: Place in the blocks that is read: "stream", or "mixer" for the outputs of their mixers, as in the code of
            Dino-Mamba (of Vim only, see `Taps`). The final norm of the encoder follows in both cases.
        normalisation: Normalisation of the features: "batch" without affine parameters (MAE), "layer" with weights that
            each head trains (LeJEPA), or "none" (DINO). Attentive heads always have "batch".
        learning_rates: Base learning rates for 256 images per step, above 0. The peak rate of a head is
            `lr_per_256 * global_batch / 256`. MAE uses 0.1, DINO 0.001.
        attentive: Whether to add attentive heads: one learned query attends to the patches of the last map. They train
            with AdamW.
        attentive_heads: Attention heads of an attentive head. The number divides the width of the map.
        attentive_learning_rates: Base learning rates of the attentive heads, by the same rule.
        optimizer: Optimizer of all other heads: `LARS`, `SGD` or `HeadAdamW`.
        schedule: Warm-up and decay of the learning rates.

    Logs:
        train/loss: Lowest cross-entropy of all heads.
        val/top1, val/top5: Accuracies in [0, 1] of the head with the highest val/top1, exact over all ranks.
        val/top1_KIND: Highest accuracy with one kind of features, such as val/top1_mean_1 for the mean of the last
            block.

    Raises:
        ValueError: If an argument is out of range, or the encoder lacks a requested class token or block.

    Source: He et al., "Masked Autoencoders Are Scalable Vision Learners" (arXiv:2111.06377), appendix A.1; many heads
        at once as in Oquab et al., "DINOv2" (arXiv:2304.07193), appendix B.3.
    """

    def __init__(
        self,
        init_from: str | None = None,
        encoder: str | None = None,
        encoder_args: dict[str, Any] | None = None,
        num_classes: int = 1000,
        poolings: list[Pooling] | None = None,
        last_blocks: Sequence[int] = (1,),
        learning_rates: Sequence[float] = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0),
        attentive: bool = False,
        attentive_heads: int = 8,
        attentive_learning_rates: Sequence[float] = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2),
        optimizer: HeadOptimizer = LARS(),  # noqa: B008  (read only)
        schedule: Schedule = Cosine(warmup_epochs=10),  # noqa: B008
        read: TapRead = "stream",
        normalisation: Normalisation = "batch",
    ) -> None:
        check_options(
            normalisation,
            optimizer,
            poolings=poolings,
            last_blocks=last_blocks,
            learning_rates=learning_rates,
            attentive_learning_rates=attentive_learning_rates,
        )
        super().__init__(
            encoder,
            encoder_args,
            init_from,
            num_classes,
            0,
            optimizer,
            schedule,
            poolings=None,  # set below
            last_blocks=list(last_blocks),
            learning_rates=list(learning_rates),
            attentive=attentive,
            attentive_heads=attentive_heads,
            attentive_learning_rates=list(attentive_learning_rates),
            read=read,
            normalisation=normalisation,
        )
        if poolings is None:
            poolings = ["mean", "class", "both"] if family_of(self.encoder).has_class_token(self.encoder) else ["mean"]
        self.hparams["poolings"] = list(poolings)
        self.kinds = [Pooled(pooling, blocks) for blocks in last_blocks for pooling in poolings]
        check_kinds(self.encoder, self.kinds, read)
        self.attentive, self.read = attentive, read
        widths = {str(kind): pooled_width(self.encoder, kind) for kind in self.kinds}
        self.sweeps = linear_sweeps(widths, learning_rates, num_classes, normalisation)
        if attentive:
            width = pooled_width(self.encoder, Pooled())
            self.sweeps[ATTENTIVE] = attentive_sweep(width, attentive_learning_rates, num_classes, attentive_heads)
        self._training: dict[str, Any] = {}  # description of the training of the heads
        self.table: dict[str, Any] | None = None  # results of the newest validation, as in probe.json
        self._hits, self._seen = torch.empty(0), 0

    def build_encoder(self) -> Any:
        return super().build_encoder().requires_grad_(False).eval()

    def train(self, mode: bool = True) -> LinearProbe:
        """Set the mode of the heads; the encoder stays in evaluation mode."""
        super().train(mode)
        self.encoder.eval()
        return self

    # The method

    @torch.no_grad()
    def features(self, images: Tensor) -> dict[str, Tensor]:
        """Compute the input of each sweep by name for images (B, 3, H, W), in one pass of the encoder."""
        blocks = last_blocks(self.encoder, images, self.kinds, self.read)
        vectors = pool(self.encoder, blocks, self.kinds)
        features = {str(kind): vector for kind, vector in vectors.items()}
        if self.attentive:
            features[ATTENTIVE] = blocks[-1].map.flatten(2)
        return features

    def forward(self, images: Tensor) -> Tensor:
        """Compute logits (N, B, C), float32, of images (B, 3, H, W), for all heads in the order of `heads`."""
        return torch.cat([self.sweeps[name](features) for name, features in self.features(images).items()])

    @property
    def heads(self) -> list[dict[str, Any]]:
        """Describe each head: its kind of features, its optimizer and its base learning rate."""
        heads = []
        for name, sweep in self.sweeps.items():
            pooling, _, blocks = name.rpartition("_")
            what = {"kind": name, "pooling": pooling, "last_blocks": int(blocks)}
            what["normalisation"] = cast(Sweep, sweep).normalisation
            what["optimizer"] = "AdamW" if name == ATTENTIVE else cast(HeadOptimizer, self.optimizer_settings).title
            heads += [{**what, "lr_per_256": rate} for rate in cast(Sweep, sweep).learning_rates]
        return heads

    # Hooks of Lightning

    def configure_model(self) -> None:
        super().configure_model()
        uses_batch = any(cast(Sweep, sweep).normalisation == "batch" for sweep in self.sweeps.values())
        if uses_batch and getattr(self._data, "batch_size", 2) < 2:
            raise UserError(
                "LinearProbe: batch normalisation needs 2 images or more on each device; got data.batch_size 1."
            )
        if self.trainer.gradient_clip_val:
            raise UserError(
                "LinearProbe: each head trains as if it were alone, and clipping would couple the heads; "
                f"got trainer.gradient_clip_val {self.trainer.gradient_clip_val}. Leave it out."
            )

    def on_train_start(self) -> None:
        self.train()  # Lightning keeps the mode, and the norms learn only in training mode
        batch, steps = GlobalBatch.of(self.trainer), int(self.trainer.estimated_stepping_batches)
        self._training = {
            "batch": batch.size,
            "batch_per_device": batch.per_device,
            "epochs": steps / math.ceil(self.trainer.num_training_batches / batch.accumulation),
            "steps": steps,
            "precision": str(self.trainer.precision),
            "training": training_images(self._data),
        }

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        logits, labels = self(batch["image"]), batch["label"]
        N, B, _ = logits.shape
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(N), reduction="none").view(N, B).mean(dim=1)
        self.log("train/loss", losses.detach().min(), prog_bar=True)
        return losses.sum()  # the heads share no parameter, so each gets its own gradient

    def on_after_backward(self) -> None:
        for sweep in self.sweeps.values():
            cast(Sweep, sweep).hold_diverged()

    def on_validation_epoch_start(self) -> None:
        ranks.take_first(self.sweeps.buffers())  # running statistics of rank 0, as in a checkpoint
        self._hits = torch.zeros(len(self.heads), 2, dtype=torch.int64, device=self.device)
        self._seen = 0

    def validation_step(self, batch: dict[str, Any], batch_idx: int) -> None:
        labels = batch["label"]
        self._hits += right_ones(self(batch["image"]), labels)
        self._seen += len(labels)

    def on_validation_epoch_end(self) -> None:
        counts = torch.cat([self._hits.flatten(), self._hits.new_tensor([self._seen])])
        counts = self.trainer.strategy.reduce(counts, reduce_op="sum")
        if self.trainer.sanity_checking or not counts[-1]:
            return
        if self.trainer.state.fn == TrainerFn.FITTING:
            self._training["steps_taken"] = self.trainer.global_step
        protocol = self.protocol() | {"validation": validation_images(self._data, int(counts[-1]))}
        diverged = torch.cat([cast(Sweep, sweep).diverged() for sweep in self.sweeps.values()]).tolist()
        heads = [{**head, "diverged": gone} for head, gone in zip(self.heads, diverged, strict=True)]
        self.table = table = probe_table(heads, counts[:-1].view(-1, 2).tolist(), protocol)
        self.log("val/top1", table["best"]["top1"], prog_bar=True)
        self.log("val/top5", table["best"]["top5"])
        for name in self.sweeps:
            self.log(f"val/top1_{name}", max(head["top1"] for head in table["heads"] if head["kind"] == name))
        if self.trainer.is_global_zero and takes_results(self.trainer):
            path = RunFolder(self.trainer.default_root_dir).probe
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_json(path, table)

    def protocol(self) -> dict[str, Any]:
        """Return everything that the accuracies depend on, except the validation images."""
        return {
            "encoder": self.encoder_name,
            "encoder_args": self.encoder_args,
            "init_from": self.init_from,
            "weights": self.encoder.load_report.origin.get("weights") if self.init_from else None,
            "load_report": str(self.encoder.load_report) if self.init_from else None,
            "encoder_mode": "frozen, in evaluation mode",
            "read": self.read,
            "normalisation": NORMS[self.hparams["normalisation"]],
            "optimizer": self.hparams["optimizer"],
            "schedule": {"name": type(self.schedule).__name__.lower(), **asdict(self.schedule)},
            "lr_rule": "peak_lr = lr_per_256 * batch / 256",
            "chosen_on": "the validation images" if len(self.heads) > 1 else "nothing, there is one head",
            **self._training,
        }

    def on_validation_end(self) -> None:
        if self.trainer.state.fn == TrainerFn.VALIDATING:
            self._say_best()

    def on_fit_end(self) -> None:
        self._say_best()

    def _say_best(self) -> None:
        if self.table is not None:
            rank_zero_only(print)(best_in_a_sentence(self.table))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        checkpoint["probe"] = {**self._training, "steps_taken": checkpoint["global_step"]}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        theirs, ours = {**_OF_OLDER_CHECKPOINTS, **checkpoint["hyper_parameters"]}, self.hparams
        for name in _MUST_AGREE:
            if theirs.get(name) != ours[name]:
                raise UserError(
                    f"LinearProbe: the checkpoint's heads were made with {name} {theirs.get(name)}; "
                    f"got {ours[name]}. Set model.{name} to the checkpoint's, or start a new run."
                )
        if not isinstance(checkpoint.get("probe"), dict):
            raise UserError("LinearProbe: a checkpoint describes how its heads trained; this one does not. Start anew.")
        self._training = checkpoint["probe"]
