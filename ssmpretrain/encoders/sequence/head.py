"""Head of an encoder that keeps an image as one sequence: pooling of its tokens, and the classifier.

B batch, L tokens, n registers, D channels
"""

from typing import Literal, get_args

import torch.fx
from timm.layers.weight_init import trunc_normal_
from torch import Tensor, nn

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.layers.rms_norm import RMSNorm
from ssmpretrain.encoders.sequence.class_token import pool_tokens
from ssmpretrain.encoders.sequence.tokens import SequenceTokens

torch.fx.wrap("pool_tokens")  # it reads shapes, which torch.fx does not know while it traces

GlobalPool = Literal["token", "avg", "max", "concat", ""]
GLOBAL_POOLS: tuple[str, ...] = get_args(GlobalPool)


class SequenceHead(SequenceTokens):
    """Part of `SequenceEncoder` that pools tokens and classifies them.

    Attributes:
        global_pool: Pooling, see `SequenceEncoder`.
        neck, norm_neck: Projection of each register and norm of their concatenation, for `global_pool="concat"` with a
            `register_reduction` above 1. Otherwise they are None.
        head: The classifier; the identity if there is none.
        head_hidden_size: Number of pooled channels.
    """

    neck: nn.Module | None
    norm_neck: nn.Module | None
    head: nn.Module

    def _init_head(self, global_pool: str | None, register_reduction: int, num_classes: int) -> None:
        """Set the attributes and draw the initial values; see `SequenceEncoder` for the arguments."""
        if register_reduction < 1 or self.embed_dim % register_reduction:
            raise UserError(
                f"{self._where}: register_reduction divides embed_dim, {self.embed_dim}; got {register_reduction}. "
                "Mamba-Reg uses 2, 4 and 8."
            )
        self.register_reduction = register_reduction
        self._set_pool(self._checked_pool(global_pool))
        self.reset_classifier(num_classes)

    def forward_head(self, features: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool the features (B, L, D) and, unless `pre_logits`, apply the head.

        Returns:
            Logits (B, num_classes), or pooled features (B, D) for `pre_logits`. With `global_pool=""`, one row for
            each token, (B, L, ...). With `global_pool="max"`, the maximum over all patches of each logit, or of each
            feature, as published. With `global_pool="concat"`, the pooled features have n D / `register_reduction`
            channels.
        """
        pooled = pool_tokens(features, self.class_token, self.global_pool, self.num_registers)
        if self.global_pool == "concat":
            pooled = pooled.flatten(1) if self.neck is None else self._projected(pooled)
        logits = pooled if pre_logits else self.head(pooled)
        return logits.amax(dim=1) if self.global_pool == "max" else logits

    def get_classifier(self) -> nn.Module:
        """Return the head, or an `nn.Identity` if the encoder has no head."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: GlobalPool | None = None) -> None:
        """Replace the head by a new head with random weights.

        Args:
            num_classes: Outputs of the new head; 0 for no head.
            global_pool: Tokens that the head reads, see the class; None keeps the present choice.
        """
        if num_classes < 0:
            raise UserError(f"{self._where}: num_classes is at least 0; got {num_classes}.")
        if global_pool is not None and self._checked_pool(global_pool) != self.global_pool:
            self._set_pool(global_pool)
        self.num_classes = num_classes
        self.head = nn.Identity()
        if num_classes:
            weight = self.patch_embed.proj.weight
            self.head = nn.Linear(self.head_hidden_size, num_classes, device=weight.device, dtype=weight.dtype)
            trunc_normal_(self.head.weight, std=0.02)
            nn.init.zeros_(self.head.bias)

    def _projected(self, registers: Tensor) -> Tensor:
        """Project each of the registers (B, n, D), and norm their concatenation."""
        assert self.neck is not None and self.norm_neck is not None
        return self.norm_neck(self.neck(registers).flatten(1))  # type: ignore[no-any-return]

    def _set_pool(self, global_pool: str) -> None:
        """Set the pooling, and build its modules: the projection and the norm of concatenated registers."""
        self.global_pool = global_pool
        self.neck = self.norm_neck = None
        self.head_hidden_size = self.embed_dim
        if global_pool == "concat":
            width = self.embed_dim // self.register_reduction
            self.head_hidden_size = self.num_registers * width
            if self.register_reduction > 1:  # as published; the smallest size has neither module
                weight = self.patch_embed.proj.weight
                self.neck = nn.Linear(self.embed_dim, width, bias=False, device=weight.device, dtype=weight.dtype)
                self.norm_neck = RMSNorm(self.head_hidden_size).to(weight.device, weight.dtype)
                trunc_normal_(self.neck.weight, std=0.02)

    def _checked_pool(self, global_pool: str | None) -> str:
        if global_pool is None:
            return "token" if self.num_class_tokens else "avg"
        if global_pool not in GLOBAL_POOLS:
            raise UserError(
                f"{self._where}: global_pool is one of token, avg, max, concat or empty; got {global_pool!r}."
            )
        if global_pool == "concat" and self.class_token != "registers":
            raise UserError(
                f"{self._where}: global_pool='concat' reads registers, and class_token is {self.class_token!r}. Set "
                "class_token='registers', or use another pooling."
            )
        if global_pool == "token" and not self.num_class_tokens:
            raise UserError(
                f"{self._where}: global_pool='token' reads the class token, and class_token is 'none'. "
                "Use 'avg' or 'max'."
            )
        return global_pool
