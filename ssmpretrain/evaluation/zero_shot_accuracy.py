"""Accuracies of zero-shot classification over a validation set, exact over all processes.

Legend: B images, C classes, E width of the common space
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ssmpretrain.base.errors import UserError
from ssmpretrain.evaluation.accuracy import right_ones


class ZeroShotAccuracy:
    """Count zero-shot hits over the labelled images of a validation set. Each rank counts its own part.

    Args:
        classes: Embeddings of the classes, as columns (E, C).
        held_out: Labels of classes that do not occur in training.
        where: Start of error messages, such as the name of a command.
    """

    def __init__(self, classes: Tensor, held_out: Sequence[int] = (), *, where: str) -> None:
        self.classes, self.where = classes, where
        self._held_out = torch.tensor(list(held_out), dtype=torch.int64, device=classes.device)
        self._counts = torch.zeros(5, dtype=torch.int64, device=classes.device)

    def add(self, image: Tensor, label: Tensor) -> None:
        """Add a batch: embeddings (B, E) and labels (B,). Images with label -1 do not count.

        Raises:
            ValueError: If a label has no class, or an embedding is not finite.
        """
        image, label = image[label >= 0], label[label >= 0]
        check_labels(label, self.classes.shape[1], where=self.where)
        with torch.autocast(image.device.type, enabled=False):
            logits = image.float() @ self.classes
        if not logits.isfinite().all():
            raise UserError(
                f"{self.where}: embeddings are finite numbers; those of some images or classes are not. "
                "Look for the step at which the loss stopped being finite, or try precision 32."
            )
        unseen = torch.isin(label, self._held_out)
        first_unseen = right_ones(logits[unseen], label[unseen])[0]
        counts = [
            unseen.new_tensor(len(label), dtype=torch.int64),
            *right_ones(logits, label),
            unseen.sum(),
            first_unseen,
        ]
        self._counts += torch.stack(counts)

    def result(self, total: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return accuracies in [0, 1]: "top1", "top5", and "held_out" (top-1 on images of held-out classes).

        "images" is the number of labelled images. Without labelled images the dictionary is empty. With fewer than six
        classes "top5" is 1.

        Args:
            total: Function that sums a tensor over the ranks.
        """
        images, first, among_five, unseen, first_unseen = total(self._counts).tolist()
        if not images:
            return {}
        found = {"images": images, "top1": first / images, "top5": among_five / images}
        return {**found, "held_out": first_unseen / unseen} if unseen else found


def number_by_names(data: Any, names: Sequence[str], *, where: str) -> None:
    """Number the labels of a data module in the order of the given names of classes.

    Labels are matched by name if the names include all classes of the data. Otherwise the order of the data is kept.

    Raises:
        ValueError: If the names cannot belong to the classes of the data.
    """
    own = list(getattr(data, "classes", []))
    if list(names) == own and all(re.fullmatch(r"n\d{8}", name) for name in names):
        raise UserError(
            f"{where}: the folders are named by WordNet numbers ({names[0]}, ...), which no text tower knows. "
            "Name the classes in the order of the folders: classes imagenet, say."
        )
    if own and set(own) <= set(names) and hasattr(data, "label_by"):
        data.label_by(names, "the classes that are named")
        return
    if own and len(names) != len(own):
        lacking = ", ".join([name for name in own if name not in names][:3])
        raise UserError(
            f"{where}: each folder is a class; got {len(names)} names and {len(own)} folders, such as {lacking}. Name "
            "all of them, as they are called or in the order of the folders."
        )
    if moved := [(name, folder) for name, folder in zip(names, own, strict=False) if name != folder and name in own]:
        raise UserError(
            f"{where}: names are those of the folders, or in their order; got {moved[0][0]} for the folder "
            f"{moved[0][1]}, and not all folders among them. Leave out the classes to take the folders' names."
        )


def check_labels(label: Tensor, names: int, *, where: str) -> None:
    """Raise if one of the labels (B,) is not below the number of `names`."""
    if len(label) and int(label.max()) >= names:
        raise UserError(
            f"{where}: every label has a name; got {names} names and label {int(label.max())}. "
            "Name all classes, in the order of their labels from 0."
        )
