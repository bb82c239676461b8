"""Metrics and inference of dense tasks: confusion matrix, COCO average precision, sliding windows, drawings.

It imports base alone of this package; no Lightning. pycocotools is imported only when detections are evaluated.
"""

from ssmpretrain.evaluation.dense.coco_scores import CocoScores, DetectionScores
from ssmpretrain.evaluation.dense.confusion import ConfusionMatrix, SegmentationScores
from ssmpretrain.evaluation.dense.detection_records import DetectionRecords
from ssmpretrain.evaluation.dense.drawing import class_colours, draw_detections, draw_segmentation
from ssmpretrain.evaluation.dense.inference import Inference, predict, predict_classes
from ssmpretrain.evaluation.dense.masks import decode_mask, encode_mask, mask_area, paste_masks

__all__ = [
    "CocoScores",
    "ConfusionMatrix",
    "DetectionRecords",
    "DetectionScores",
    "Inference",
    "SegmentationScores",
    "class_colours",
    "decode_mask",
    "draw_detections",
    "draw_segmentation",
    "encode_mask",
    "mask_area",
    "paste_masks",
    "predict",
    "predict_classes",
]
