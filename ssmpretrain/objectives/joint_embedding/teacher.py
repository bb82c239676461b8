"""The teacher of an objective: a moving average of encoder and head, which gives the targets of the loss."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import Self

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.features.encoded import Encoded, encode
from ssmpretrain.objectives.joint_embedding.joint_embedding import JointEmbedding
from ssmpretrain.training.optim.ramps import Ramp
from ssmpretrain.training.ranks.sharded_tensors import local


class Teacher(nn.Module):
    """Copies of a student's encoder and head whose weights are an exponential moving average of the student's.

    `update` moves them: `teacher <- momentum * teacher + (1 - momentum) * student`. Student and teacher are paired by
    the names in their state dicts, and each kind of tensor has a rule:

    - Parameters and floating-point buffers, such as the running statistics of BatchNorm, are averaged with the same
      momentum. So the statistics lag behind the student's as far as the weights do, and belong to them. Left alone
      they would stay those of the first step; copied they would be those of other weights.
    - Other buffers, such as counters, are copied.
    - Where ranks have other statistics, those of rank 0 count, as in a checkpoint. So all ranks have one teacher.
    - Buffers outside of the state dict, such as masks of attention, follow from the architecture, and stay.

    The teacher is always in evaluation mode, without dropout, stochastic depth and statistics of the batch, also if
    `train()` is called on it or on a module that contains it. It has no gradient, and no optimizer changes it. Its
    weights have the dtype of the student's, float32.

    Args:
        encoder: Encoder of the student; it is copied.
        head: Head of the student, any module; it is copied.

    Attributes:
        encoder, head: The copies. A state dict holds them under the same names.

    Source: Caron et al., "Emerging Properties in Self-Supervised Vision Transformers" (arXiv:2104.14294), section 3.1.
    """

    encoder: Any
    head: Any

    def __init__(self, encoder: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.encoder, self.head = copy.deepcopy(encoder), copy.deepcopy(head)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> Self:
        """Keep evaluation mode, whatever `mode` is, because Lightning switches all modules of an objective."""
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Encoded:
        """Return the features of images (B, 3, H, W) without a gradient, see `encode`."""
        return encode(self.encoder, images)

    @torch.no_grad()
    def update(self, momentum: float, encoder: nn.Module, head: nn.Module) -> None:
        """Move the teacher towards the student.

        Args:
            momentum: Weight of the old teacher, in [0, 1]. With 0 the teacher is the student, with 1 it stays.
            encoder, head: The student, on every rank. Each rank moves its own weights, under FSDP2 its rows; only
                buffers are sent.

        Raises:
            UserError: If the momentum is out of range, or a tensor of student or teacher has no partner.
        """
        if not 0 <= momentum <= 1:
            raise UserError(f"Teacher: momentum is in [0, 1]; got {momentum}. 0.996 is usual.")
        averages, values = [], []
        for own, theirs in self._pairs({"encoder": encoder, "head": head}):
            if own.is_floating_point():
                averages.append(local(own))
                values.append(local(theirs))
            else:
                own.copy_(theirs)
        torch._foreach_lerp_(averages, values, 1 - momentum)
        _take_those_of_first_rank([*_saved_buffers(self.encoder), *_saved_buffers(self.head)])

    def _pairs(self, student: dict[str, nn.Module]) -> list[tuple[Tensor, Tensor]]:
        """Return each tensor of the teacher's state dict, once, with the student's of the same name."""
        pairs: dict[int, tuple[Tensor, Tensor]] = {}  # a tensor that two modules share has two names
        for part, module in student.items():
            own, theirs = getattr(self, part).state_dict(keep_vars=True), module.state_dict(keep_vars=True)
            for name in [*own, *(name for name in theirs if name not in own)]:
                if name not in own or name not in theirs or own[name].shape != theirs[name].shape:
                    raise UserError(_unpaired(f"{part}.{name}", own.get(name), theirs.get(name)))
                pairs[id(own[name])] = own[name], theirs[name]
        return list(pairs.values())


def _saved_buffers(module: nn.Module) -> list[Tensor]:
    """Return the buffers in a module's state dict."""
    saved = module.state_dict()
    return [buffer for name, buffer in module.named_buffers() if name in saved]


def _take_those_of_first_rank(buffers: list[Tensor]) -> None:
    """Copy the values of rank 0 into the buffers of all ranks, in one message."""
    if buffers and ranks.world() > 1:
        values = torch.cat([buffer.flatten().double() for buffer in buffers])  # holds float32 and counts exactly
        ranks.take_first([values])
        for buffer, part in zip(buffers, values.split([buffer.numel() for buffer in buffers]), strict=True):
            buffer.copy_(part.view_as(buffer))


def _unpaired(name: str, own: Tensor | None, theirs: Tensor | None) -> str:
    teacher, student = ("none" if one is None else f"shape {tuple(one.shape)}" for one in (own, theirs))
    return (
        f"Teacher: teacher and student have tensors of the same names and shapes; got {name} with {teacher} in the "
        f"teacher and {student} in the student. Build the teacher after the last change of the student."
    )


class Taught(JointEmbedding):
    """Base class of objectives with a teacher, whose weights are a moving average of the student's over the steps.

    A subclass sets `head` and `momentum`, and then calls `build_teacher`. After each optimizer step, not each batch of
    an accumulation, the teacher moves by the momentum of that step. Checkpoints, callbacks and validations therefore
    see the teacher after the step. A step that is skipped, because its gradient is not finite or its loss is None,
    leaves the teacher unchanged, as it does weights and moments.

    Attributes:
        head: The student's head.
        momentum: Momentum of the teacher over the steps of the run.
        teacher: The teacher.
    """

    reported: ClassVar[str | None] = (
        "the teacher, an average of the student's weights; load_encoder, init_from and export take it, with "
        "--no-teacher the student"
    )
    head: Any
    momentum: Ramp
    teacher: Teacher

    def build_teacher(self) -> None:
        """Make the teacher a copy of the student."""
        self.teacher = Teacher(self.encoder, self.head)

    # Hooks of Lightning

    def _fit_encoder_to(self, size: tuple[int, int]) -> None:
        super()._fit_encoder_to(size)
        self.build_teacher()  # the encoder may be a new one

    def optimizer_step(
        self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Callable[[], Any] | None = None
    ) -> None:
        momentum = self.value_of(self.momentum)
        super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        if _has_stepped(optimizer):
            self.teacher.update(momentum, self.encoder, self.head)


def _has_stepped(optimizer: Optimizer) -> bool:
    """Return whether the last step changed a parameter; `NonFiniteGuard` takes the gradients away to skip a step."""
    return any(parameter.grad is not None for group in optimizer.param_groups for parameter in group["params"])
