"""Confusion matrix of semantic segmentation, and the scores that are read from it.

Legend: K classes.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ssmpretrain.base import ranks
from ssmpretrain.base.errors import DataError, UserError


class SegmentationScores(NamedTuple):
    """Scores of a segmentation over a data set, each in [0, 1]; NaN where nothing was counted.

    Attributes:
        miou: Mean of `iou` over the classes that occur in the labels or in the predictions.
        macc: Mean of `acc` over the classes that occur in the labels.
        aacc: Correct pixels divided by all labelled pixels.
        iou: Intersection over union of each class, (K,), float64. A class that occurs in neither labels nor predictions
            is NaN; a class that is only predicted is 0.
        acc: Correct pixels of each class divided by its labelled pixels, (K,), float64. A class that does not occur in
            the labels is NaN.
    """

    miou: float
    macc: float
    aacc: float
    iou: Tensor
    acc: Tensor


class ConfusionMatrix:
    """Count the pixels of every pair of labelled and predicted class, over images and ranks.

    The pixels of all images are summed before any division, as published: a score of the data set is no mean of scores
    of images. The counts are whole numbers, so the scores are the same on any number of ranks, whatever their shares.

    Args:
        num_classes: Number K of classes, at least 2.
        ignore: Label of pixels that do not count; not one of 0 to K - 1.
        reduce_zero: Whether labels are those in ADE20K's files, with 0 for pixels to ignore and k + 1 for class k. The
            data modules of this package give labels from 0 already.

    Attributes:
        counts: Number of pixels with the label of the row and the prediction of the column, (K, K), int64, on the CPU.

    Source: `IoUMetric` of mmsegmentation 1.2.2 defines the scores.
    """

    def __init__(self, num_classes: int, ignore: int = 255, reduce_zero: bool = False) -> None:
        if num_classes < 2:
            raise UserError(f"ConfusionMatrix: num_classes is at least 2; got {num_classes}.")
        if 0 <= ignore < num_classes:
            raise UserError(
                f"ConfusionMatrix: ignore is the number of no class; got {ignore} for classes 0 to {num_classes - 1}, "
                "one of which would never count. Choose another number for pixels to ignore."
            )
        self.num_classes, self.ignore, self.reduce_zero = num_classes, ignore, reduce_zero
        self.counts = torch.zeros(num_classes, num_classes, dtype=torch.int64)
        self._is_reduced = False

    def update(self, predicted: Tensor, label: Tensor) -> None:
        """Count the pixels of an image or a batch.

        Args:
            predicted: Predicted class of each pixel, integers of any shape.
            label: True class of each pixel, or `ignore`; integers of the same shape, on the same device.

        Raises:
            UserError: If the shapes differ, the numbers are no integers, a predicted class is out of range, or the
                matrix is reduced already.
            DataError: If a label is out of range.
        """
        if self._is_reduced:
            raise UserError("ConfusionMatrix: a reduced matrix holds the pixels of all ranks. Count in a new one.")
        _check_pair(predicted, label)
        label, predicted = label.flatten().long(), predicted.flatten().long()
        counted = label != self.ignore
        if self.reduce_zero:
            counted &= label != 0
            label = label - 1
        label, predicted = label[counted], predicted[counted]
        if wrong := self._out_of_range(label):
            raise DataError(
                f"ConfusionMatrix: labels are 0 to {self.num_classes - 1}, or {self.ignore} for pixels to ignore; got "
                f"{wrong}{' after 1 was subtracted' if self.reduce_zero else ''}. "
                "Correct num_classes, or the class map of the data."
            )
        if wrong := self._out_of_range(predicted):
            raise UserError(
                f"ConfusionMatrix: predicted classes are 0 to {self.num_classes - 1}; got {wrong}. Correct num_classes."
            )
        pairs = torch.bincount(label * self.num_classes + predicted, minlength=self.num_classes**2)
        self.counts += pairs.view_as(self.counts).cpu()

    def reduce(self) -> ConfusionMatrix:
        """Add up the counts of all ranks in place, and return the matrix. Every rank must call it, once or more."""
        if not self._is_reduced:
            self.counts = ranks.total(self.counts)
            self._is_reduced = True
        return self

    def scores(self) -> SegmentationScores:
        """Compute the scores of the counted pixels.

        Raises:
            UserError: If there are several ranks and `reduce` was not called: each would report its own part.
        """
        if not self._is_reduced and ranks.world() > 1:
            raise UserError(
                "ConfusionMatrix: the scores are of all ranks. Call reduce() on every rank before scores()."
            )
        counts = self.counts.double()
        correct, labelled, predicted = counts.diagonal(), counts.sum(1), counts.sum(0)
        iou, acc = correct / (labelled + predicted - correct), correct / labelled  # 0 / 0 is NaN
        return SegmentationScores(
            float(iou.nanmean()), float(acc.nanmean()), float(correct.sum() / labelled.sum()), iou, acc
        )

    def _out_of_range(self, classes: Tensor) -> str:
        """Describe the classes that are none of 0 to K - 1; empty if there are none."""
        if not len(classes) or (int(classes.min()) >= 0 and int(classes.max()) < self.num_classes):
            return ""
        wrong = classes[(classes < 0) | (classes >= self.num_classes)]
        few = wrong.unique()[:5].tolist()  # type: ignore[no-untyped-call]
        return f"{', '.join(map(str, few))} at {len(wrong):,} pixels"


def _check_pair(predicted: Tensor, label: Tensor) -> None:
    if predicted.shape != label.shape:
        raise UserError(
            f"ConfusionMatrix: prediction and label have the same size; got {tuple(predicted.shape)} and "
            f"{tuple(label.shape)}. Resize the logits to the label before argmax."
        )
    for name, classes in (("predicted", predicted), ("label", label)):
        if classes.is_floating_point() or classes.is_complex():
            raise UserError(
                f"ConfusionMatrix: {name} holds the numbers of classes, integers; got {classes.dtype}. "
                "Take the argmax of logits over the classes."
            )
