"""The contrastive head: text tower, projection, temperature, and the loss over the pairs of all ranks.

Legend: B images, T captions, D encoder width, E width of the common space, L tokens of a caption
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.state_space import check_widths
from ssmpretrain.encoders.weights.content import read_content
from ssmpretrain.encoders.weights.finite_check import check_finite
from ssmpretrain.encoders.weights.on_disk import weights_in
from ssmpretrain.objectives.contrastive.named_classes import NamedClasses, classifier
from ssmpretrain.objectives.contrastive.open_clip_adapter import Tokenizer, contrastive_loss
from ssmpretrain.objectives.contrastive.text_tower import TextTower

_log = logging.getLogger(__name__)
Loss = Literal["clip", "siglip"]
MAX_LOGIT_SCALE = math.log(100)
# Initial logarithm of the factor, and initial bias, of the similarities.
_START = {"clip": (math.log(1 / 0.07), None), "siglip": (math.log(10), -10.0)}


class ContrastiveHead(nn.Module):
    """Map image features and captions into one space, and contrast the pairs there.

    The image encoder belongs to the objective, which passes it to `encode_image`, because the objective may rebuild it
    for the size of the data.

    Args:
        where: Start of error messages, such as the name of a command.
        encoder: The image encoder. The head reads only the width of its features.
        text: Settings of the text tower.
        embed_dim: E, at least 1.
        loss: "clip" or "siglip", see `CLIP`.
        init_logit_scale: Logarithm of the initial factor of the similarities, in [0, ln 100]; None for the default of
            the loss.
        init_logit_bias: Initial bias of the "siglip" loss; None for the value of the paper.

    Attributes:
        text: The text tower; maps tokens (T, L) to embeddings (T, E).
        image_projection: Linear layer from features (B, D) to embeddings (B, E).
        logit_scale: Logarithm of the factor of the cosine similarities, (1,).
        logit_bias: Bias of the similarities, (1,); None for "clip".
        tokenizer: Maps texts to tokens (T, L) and flags (T,) that mark cut texts.
        settings: The arguments as plain data, completed with the defaults.

    Raises:
        ValueError: If an argument is out of range, or both towers are locked.
    """

    logit_bias: nn.Parameter | None

    def __init__(
        self,
        where: str,
        encoder: nn.Module,
        text: TextTower,
        embed_dim: int,
        loss: Loss,
        init_logit_scale: float | None,
        init_logit_bias: float | None,
    ) -> None:
        super().__init__()
        scale, bias = _checked(where, text, embed_dim, loss, init_logit_scale, init_logit_bias)
        self.where, self.embed_dim, self.loss_kind = where, embed_dim, loss
        self.settings: dict[str, Any] = {
            "text": asdict(text),
            "embed_dim": embed_dim,
            "loss": loss,
            "init_logit_scale": scale,
            "init_logit_bias": bias,
        }
        self.tokenizer = Tokenizer(text.context_length)
        self.text = text.build(embed_dim, self.tokenizer)
        width: int = getattr(encoder, "head_hidden_size", None) or encoder.num_features  # type: ignore[assignment]
        self.image_projection = nn.Linear(width, embed_dim, bias=False)
        nn.init.normal_(self.image_projection.weight, std=width**-0.5)
        # One number in a list: FSDP2 cannot shard a scalar.
        self.logit_scale = nn.Parameter(torch.tensor([scale]))
        self.register_parameter("logit_bias", None if bias is None else nn.Parameter(torch.tensor([bias])))
        if not (trains(encoder) or trains(self.text)):
            raise UserError(f"{where}: at least one of the towers trains; got both locked. Unlock one of them.")

    def register_in(self, objective: nn.Module) -> None:
        """Register the tensors of the head in `objective`, under names without a prefix.

        Checkpoints and the state of the optimizer use the names `text.…`, `image_projection.weight`, `logit_scale` and
        `logit_bias`. The objective must not register the head itself as a module, because each tensor would then have a
        second name.
        """
        for name, module in self._modules.items():
            objective.add_module(name, module)
        for name, parameter in self._parameters.items():
            objective.register_parameter(name, parameter)
        self._parameters = objective._parameters  # FSDP2 and functional_call replace the tensors in this dictionary

    def encode_image(self, encoder: nn.Module, images: Tensor) -> Tensor:
        """Embed images (B, 3, H, W) as vectors (B, E) of length 1, float32."""
        with gradient_of(encoder):
            features = encoder(images)
        return self.project_image(features)

    def project_image(self, features: Tensor) -> Tensor:
        """Embed pooled features (B, D) of the encoder as vectors (B, E) of length 1, float32."""
        return F.normalize(self.image_projection(features).float(), dim=-1)

    def encode_text(self, tokens: Tensor) -> Tensor:
        """Embed tokens (T, L) of `tokenizer` as vectors (T, E) of length 1, float32."""
        with gradient_of(self.text):
            features = self.text(tokens)
        return F.normalize(features.float(), dim=-1)

    def loss(self, image: Tensor, text: Tensor, rank: int = 0, world: int = 1) -> Tensor:
        """Compute the contrastive loss of pairs; row i of `image` and row i of `text` form a pair.

        Args:
            image, text: Embeddings of this rank, (n, E) each, with the same n on every rank.
            rank: Number of this rank.
            world: Number of ranks whose pairs are contrasted.

        Returns:
            The loss, a scalar in float32.
        """
        loss = contrastive_loss(self.loss_kind, rank, world)
        bias = () if self.logit_bias is None else (self.logit_bias,)
        with torch.autocast(image.device.type, enabled=False):
            return loss(image, text, self.logit_scale.exp(), *bias)  # type: ignore[no-any-return]

    @torch.no_grad()
    def keep_scale_in_bounds(self) -> None:
        """Clamp the factor of the similarities to [1, 100]."""
        self.logit_scale.clamp_(0, MAX_LOGIT_SCALE)

    def zero_shot(self, classes: str | Sequence[str], templates: str | Sequence[str], *, where: str) -> NamedClasses:
        """Prepare a zero-shot classification by names of classes; arguments and errors as `NamedClasses`."""
        return NamedClasses(self.embed_classes, classes, templates, where=where)

    def embed_classes(self, names: Sequence[str], templates: Sequence[str]) -> Tensor:
        """Embed classes by their names in sentences, as columns (E, C); see `classifier`."""
        return classifier(self.encode_text, self.tokenizer, names, templates, self.logit_scale.device)

    @torch.no_grad()
    def fill_from_run(self, path: str | Path) -> None:
        """Copy the projection of a run of CLIP and, if the loss is the same, its temperature and bias.

        Args:
            path: Folder of a run of CLIP, or its checkpoint.

        Raises:
            ValueError: If `path` is no run of CLIP, if its common space has another width, or if a value is NaN or
                infinite.
        """
        file = weights_in(path)
        content = read_content(file)
        state: dict[str, Tensor] = content.get("state_dict", {}) if isinstance(content, dict) else {}
        if not {"image_projection.weight", "logit_scale"} <= state.keys():
            raise UserError(
                f"{self.where}: init_both_towers takes all of a run of CLIP; {file} is none. "
                "Leave it out to begin with the encoder alone."
            )
        theirs, ours = (tuple(one.shape) for one in (state["image_projection.weight"], self.image_projection.weight))
        if theirs != ours:
            raise UserError(
                f"{self.where}: the run that it begins with has embeddings of {theirs[0]} numbers; got "
                f"embed_dim {ours[0]}. Set model.embed_dim={theirs[0]}."
            )
        joint = ("image_projection.weight", "logit_scale", "logit_bias")
        check_finite(self.where, {name: state[name] for name in joint if name in state}, file)
        self.image_projection.weight.copy_(state["image_projection.weight"])
        same_loss = ("logit_bias" in state) == (self.logit_bias is not None)
        if same_loss:
            self.logit_scale.copy_(state["logit_scale"])
        if same_loss and self.logit_bias is not None:
            self.logit_bias.copy_(state["logit_bias"])
        what = "projection, temperature and bias" if same_loss else "projection (another loss has another temperature)"
        _log.info("%s from %s", what, file)


def trains(tower: nn.Module) -> bool:
    """Return whether any parameter of a tower trains; a locked tower has none."""
    return any(parameter.requires_grad for parameter in tower.parameters())


def gradient_of(tower: nn.Module) -> torch.set_grad_enabled:
    """Return a context manager that computes no gradient if the tower is locked."""
    return torch.set_grad_enabled(torch.is_grad_enabled() and trains(tower))


def _checked(
    where: str,
    text: TextTower,
    embed_dim: int,
    loss: Loss,
    init_logit_scale: float | None,
    init_logit_bias: float | None,
) -> tuple[float, float | None]:
    """Check the arguments; return the initial scale and bias."""
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
    return scale, bias
