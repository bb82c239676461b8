"""COCO's scores against numbers worked by hand and against faster-coco-eval."""

import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from faster_coco_eval import COCO, COCOeval_faster
from forked_ranks import in_ranks

from ssmpretrain.base.errors import DataError, UserError
from ssmpretrain.evaluation.dense import DetectionRecords, DetectionScores
from ssmpretrain.evaluation.dense.masks import decode_mask, encode_mask

NAMES = ["cat", "dog", "cow"]
Scene = dict[str, Any]  # key, annotation, boxes, scores, classes, masks: the arguments of `add`


def scene(key: str, objects: Sequence[Mapping[str, Any]], found: Sequence[tuple[Any, ...]], masks: Any = None) -> Scene:
    """An image of 160 x 200; found: (x, y, width, height), score and class of each detection."""
    rows = torch.tensor([box for box, _, _ in found], dtype=torch.float64).view(-1, 4)
    rows[:, 2:] += rows[:, :2]
    return {
        "key": key,
        "annotation": {"height": 160, "width": 200, "objects": [{"iscrowd": 0, **one} for one in objects]},
        "boxes": rows,
        "scores": torch.tensor([score for _, score, _ in found], dtype=torch.float64),
        "classes": torch.tensor([kind for _, _, kind in found], dtype=torch.int64),
        "masks": masks,
    }


def evaluated(scenes: Sequence[Scene], names: Sequence[str] = NAMES) -> DetectionScores:
    records = DetectionRecords()
    for one in scenes:
        records.add(**one)
    return records.evaluate(names)


def theirs(scenes: Sequence[Scene], kind: str) -> list[float]:
    """The twelve numbers of faster-coco-eval, from files as COCO writes them; -1 where there is none."""
    images = [{"id": number, "height": 160, "width": 200} for number, _ in enumerate(scenes, 1)]
    truth, found = [], []
    for number, one in enumerate(scenes, 1):
        for row in one["annotation"]["objects"]:
            truth.append({**row, "image_id": number, "category_id": row["category"] + 7, "id": len(truth) + 1})
        for place, (x, y, right, bottom) in enumerate(one["boxes"].tolist()):
            box = {"bbox": [x, y, right - x, bottom - y]}
            shape = box if kind == "bbox" else {"segmentation": one["masks"][place]}
            row = {
                "image_id": number,
                "category_id": int(one["classes"][place]) + 7,
                "score": float(one["scores"][place]),
            }
            found.append({**row, **shape})
    data = COCO(
        {"images": images, "annotations": truth, "categories": [{"id": 7 + k, "name": n} for k, n in enumerate(NAMES)]}
    )
    evaluation = COCOeval_faster(data, data.loadRes(found), kind)
    for step in ("evaluate", "accumulate", "summarize"):
        getattr(evaluation, step)()
    return [float(number) for number in evaluation.stats[:12]]


def twelve(scores: Any) -> list[float]:
    numbers = list(vars(scores).values())[:12]
    return [-1 if math.isnan(number) else number for number in numbers]


def box(x: float, y: float, width: float, height: float, kind: int = 0, **more: Any) -> dict[str, Any]:
    return {"category": kind, "bbox": [x, y, width, height], "area": width * height, **more}


def rectangle(x: float, y: float, width: float, height: float) -> Any:
    mask = np.zeros((160, 200), dtype=np.uint8)
    mask[int(y) : int(y + height), int(x) : int(x + width)] = 1
    return encode_mask(mask)


def ellipse(x: float, y: float, width: float, height: float) -> Any:
    rows, columns = np.mgrid[:160, :200]
    return encode_mask(((columns - x) / width - 0.5) ** 2 + ((rows - y) / height - 0.5) ** 2 < 0.25)


def drawn(seed: int) -> Scene:
    """A random image with objects, a crowd, detections near and far from the objects, and scores with many ties."""
    noise = np.random.default_rng(seed)
    objects, found = [], []
    for number in range(noise.integers(0, 7)):
        place = [*noise.integers(0, 50, 2), *noise.integers(4, 110, 2)]
        x, y, width, height = (int(part) for part in place)
        more = {"iscrowd": int(number == 3), "segmentation": ellipse(x, y, width, height)}
        objects.append(box(x, y, width, height, int(noise.integers(3)), **more))
        for _ in range(noise.integers(0, 3)):
            near = np.maximum(np.array(place) + noise.integers(-2, 3, 4), [0, 0, 1, 1])
            kind_found = objects[-1]["category"] if noise.random() < 0.8 else int(noise.integers(3))
            found.append((near.tolist(), round(float(noise.random()), 1), kind_found))
    for _ in range(noise.integers(0, 4)):
        found.append(
            ([*noise.integers(0, 60, 2).tolist(), 30, 30], round(float(noise.random()), 1), int(noise.integers(3)))
        )
    return scene(f"{seed:03d}", objects, found, [ellipse(*place) for place, _, _ in found])


def test_average_precision_worked_by_hand() -> None:
    # Sorted by score: right, wrong, right. Precision is 1 up to recall 1/2, and 2/3 up to recall 1. Of the 101 recalls
    # 0, 0.01, ..., 1, the first 51 are at most 1/2.
    expected = (51 * 1 + 50 * 2 / 3) / 101
    image = scene(
        "a",
        [box(0, 0, 20, 20), box(100, 0, 20, 20)],
        [((100, 0, 20, 20), 0.7, 0), ((0, 0, 20, 20), 0.9, 0), ((50, 50, 20, 20), 0.8, 0)],
    )
    scores = evaluated([image]).box
    assert [scores.ap, scores.ap50, scores.ap75, scores.ap_small] == pytest.approx([expected] * 4, abs=1e-12)
    assert [scores.ar1, scores.ar10, scores.ar100] == pytest.approx([0.5, 1, 1])
    assert math.isnan(scores.ap_medium) and math.isnan(scores.ap_large)
    assert scores.per_class["cat"] == pytest.approx(expected) and math.isnan(scores.per_class["dog"])


def test_box_counts_from_its_intersection_over_union_on() -> None:
    # 12 of 20 columns: the intersection is 12 * 20 and the union 20 * 20, a ratio of 0.6: right at 3 of 10 thresholds.
    scores = evaluated([scene("a", [box(0, 0, 20, 20)], [((0, 0, 12, 20), 0.9, 0)])]).box
    assert (scores.ap, scores.ap50, scores.ap75) == pytest.approx((0.3, 1, 0), abs=1e-12)


def test_first_object_of_the_data_can_be_found() -> None:  # its id 0 would mean "no match"
    assert evaluated([scene("a", [box(0, 0, 20, 20)], [((0, 0, 20, 20), 0.9, 0)])]).box.ap == pytest.approx(1)


def test_detections_in_a_crowd_count_neither_for_nor_against() -> None:
    objects = [box(0, 0, 20, 20), box(100, 0, 60, 60, iscrowd=1)]
    found = [((110, 10, 10, 10), 0.99, 0), ((120, 10, 10, 10), 0.98, 0), ((0, 0, 20, 20), 0.5, 0)]
    assert evaluated([scene("a", objects, found)]).box.ap == pytest.approx(1)
    objects[1]["iscrowd"] = 0
    assert evaluated([scene("a", objects, found)]).box.ap < 0.2  # two wrong ones first, and one object not found
    crowd_alone = evaluated([scene("a", [box(100, 0, 60, 60, iscrowd=1)], found[:2])]).box
    assert math.isnan(crowd_alone.ap)


def test_images_without_objects_count_their_false_detections() -> None:
    image = scene("a", [box(0, 0, 20, 20)], [((0, 0, 20, 20), 0.5, 0)])
    empty = scene("b", [], [((0, 0, 20, 20), 0.9, 0)])
    assert evaluated([image, scene("c", [], [])]).box.ap == pytest.approx(1)
    assert evaluated([image, empty]).box.ap == pytest.approx(0.5)


def test_class_that_is_only_predicted_is_left_out() -> None:
    image = scene("a", [box(0, 0, 20, 20)], [((0, 0, 20, 20), 0.5, 0), ((0, 0, 20, 20), 0.9, 2)])
    scores = evaluated([image]).box
    assert scores.ap == pytest.approx(1) and math.isnan(scores.per_class["cow"])


def test_size_of_an_object_is_the_area_of_its_mask_for_boxes_too() -> None:
    thin = box(0, 0, 90, 90, segmentation=rectangle(0, 0, 90, 2)) | {"area": None}
    scores = evaluated([scene("a", [thin], [((0, 0, 90, 90), 0.9, 0)])]).box
    assert scores.ap_small == pytest.approx(1) and math.isnan(scores.ap_medium)
    del thin["segmentation"]  # the area of the box, 90 * 90
    assert evaluated([scene("a", [thin], [((0, 0, 90, 90), 0.9, 0)])]).box.ap_medium == pytest.approx(1)


def test_unmatched_detection_has_the_area_of_its_mask_where_masks_are_compared() -> None:
    # The wrong detection is large as a box and small as a mask, so it counts against small objects in masks alone.
    objects = [box(0, 0, 10, 10, segmentation=rectangle(0, 0, 10, 10))]
    found = [((100, 0, 90, 90), 0.9, 0), ((0, 0, 10, 10), 0.5, 0)]
    scores = evaluated([scene("a", objects, found, [rectangle(100, 0, 90, 2), rectangle(0, 0, 10, 10)])])
    assert scores.mask is not None
    assert (scores.box.ap_small, scores.mask.ap_small) == pytest.approx((1, 0.5))


def test_at_most_100_detections_of_an_image_and_class_count() -> None:
    wrong = [((50, 50, 9, 9), 0.9, 0)] * 100
    assert evaluated([scene("a", [box(0, 0, 20, 20)], [*wrong, ((0, 0, 20, 20), 0.5, 0)])]).box.ap == 0
    other_class = [((50, 50, 9, 9), 0.9, 1)] * 100
    image = scene("a", [box(0, 0, 20, 20)], [*other_class, ((0, 0, 20, 20), 0.5, 0)])
    assert evaluated([image]).box.ap == pytest.approx(1)


def test_no_detection_at_all_is_zero_for_boxes_and_masks() -> None:
    image = scene("a", [box(0, 0, 20, 20, segmentation=rectangle(0, 0, 20, 20))], [], [])
    scores = evaluated([image])
    assert scores.mask is not None and (scores.box.ap, scores.mask.ap, scores.box.ar100) == (0, 0, 0)
    assert evaluated([{**image, "masks": None}]).mask is None


@pytest.mark.parametrize("scenes", [[], [scene("a", [], [])], [scene("a", [], [((0, 0, 9, 9), 0.9, 0)])]])
def test_without_an_object_there_is_no_score(scenes: list[Scene]) -> None:
    scores = evaluated(scenes)
    assert scores.named() == {} and scores.num_images == len(scenes)
    assert all(math.isnan(number) for number in scores.box.per_class.values())


def test_names_of_the_scores_are_those_that_are_logged() -> None:
    named = evaluated([scene("a", [box(0, 0, 20, 20)], [((0, 0, 20, 20), 0.9, 0)])]).named()
    assert list(named) == [
        "box_AP", "box_AP50", "box_AP75", "box_AP_small", "box_AR1", "box_AR10", "box_AR100", "box_AR_small",
    ]  # fmt: skip


def test_plain_scores_are_json_of_the_standard() -> None:
    scores = evaluated([drawn(4)])
    plain = json.loads(json.dumps(scores.plain(), allow_nan=False))
    assert scores.mask is not None and plain["mask"]["ap"] == scores.mask.ap and plain["num_images"] == 1
    assert evaluated([]).plain()["box"] == {**dict.fromkeys(plain["box"]), "per_class": dict.fromkeys(NAMES)}


@pytest.mark.parametrize("first", range(0, 200, 40))
def test_random_images_have_the_scores_of_faster_coco_eval(first: int) -> None:
    scenes = [drawn(seed) for seed in range(first, first + 40)]
    scores = evaluated(scenes)
    assert scores.mask is not None
    assert twelve(scores.box) == pytest.approx(theirs(scenes, "bbox"), abs=1e-9)
    assert twelve(scores.mask) == pytest.approx(theirs(scenes, "segm"), abs=1e-9)
    assert min(twelve(scores.box)) > 0.01 and scores.box.ap != scores.mask.ap
    one_class = [{**one, "annotation": keep(one["annotation"], 1)} for one in scenes]
    assert scores.box.per_class["dog"] == pytest.approx(theirs(one_class, "bbox")[0], abs=1e-9)


def keep(annotation: Mapping[str, Any], kind: int) -> dict[str, Any]:
    return {**annotation, "objects": [one for one in annotation["objects"] if one["category"] == kind]}


def part(shares: list[list[int]], only_boxes: bool = False) -> tuple[int, DetectionScores]:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    records = DetectionRecords()
    for seed in shares[dist.get_rank()]:
        records.add(**drawn(seed))
    records.gather().gather()  # the second has no effect
    return len(records), records.evaluate(NAMES)


@pytest.mark.parametrize(
    "shares",
    [[[0, 1, 2, 3], [4, 5, 6]], [[0, 2, 4, 6], [1, 3, 5, 0]], [[], [6, 5, 4, 3, 2, 1, 0, 0]]],
    ids=["4 and 3", "4 and 4 of which one twice", "0 and 7, one twice"],
)
def test_ranks_of_unequal_shares_get_the_scores_of_one_process(shares: list[list[int]]) -> None:
    expected = evaluated([drawn(seed) for seed in range(7)])
    for count, scores in in_ranks(2, part, shares):
        assert count == 7
        assert scores.named() == expected.named() and scores.mask is not None  # to the bit


def failing(act: Callable[[DetectionRecords], Any]) -> str:
    import torch.distributed as dist

    dist.init_process_group("gloo")
    records = DetectionRecords()
    records.add(**drawn(dist.get_rank()))
    with pytest.raises(UserError) as error:
        act(records)
    records.gather()  # ranks meet: a rank that ends too early takes the rendezvous with it
    return str(error.value)


def test_every_rank_gets_the_message_of_rank_0() -> None:
    messages = in_ranks(2, failing, lambda records: records.gather().evaluate(NAMES[:1]))
    assert messages[0] == messages[1] and "Correct the names of the classes" in messages[0]
    assert all("Call gather() on every rank" in text for text in in_ranks(2, failing, lambda one: one.evaluate(NAMES)))


def test_without_pycocotools_the_message_names_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pycocotools.mask", None)
    with pytest.raises(UserError, match=r"pip install ssmpretrain\[detection\]"):
        DetectionRecords()


def test_an_image_is_kept_when_its_arguments_change_later() -> None:
    one = drawn(4)
    records = DetectionRecords()
    records.add(**one)
    expected = records.evaluate(NAMES).named()
    one["boxes"].zero_()
    one["annotation"]["objects"].clear()
    assert records.evaluate(NAMES).named() == expected


GOOD = scene("a", [box(0, 0, 20, 20)], [((0, 0, 20, 20), 0.9, 0)])
ANNOTATION = GOOD["annotation"]


def with_object(**entries: Any) -> dict[str, Any]:
    return {"annotation": {**ANNOTATION, "objects": [{**box(0, 0, 20, 20), **entries}]}}


MISTAKES: dict[str, tuple[dict[str, Any], type[UserError], str]] = {
    "score is NaN": ({"scores": torch.tensor([math.nan])}, UserError, "scores are finite numbers; got NaN"),
    "box is infinite": ({"boxes": torch.tensor([[0, 0, math.inf, 9]])}, UserError, "finite"),
    "x, y, width, height": ({"boxes": torch.tensor([[50.0, 50, 20, 20]])}, UserError, "corners x1, y1, x2, y2"),
    "two scores": ({"scores": torch.ones(2)}, UserError, r"\(1, 4\), \(2,\), \(1,\) and no masks"),
    "too few masks": ({"masks": []}, UserError, "and 0"),
    "classes of floats": ({"classes": torch.zeros(1)}, UserError, "integers"),
    "mask of another size": ({"masks": [encode_mask(np.ones((9, 9)))]}, UserError, r"\[160, 200\]; got \[9, 9\]"),
    "mask that is no code": ({"masks": [np.ones((160, 200))]}, UserError, "compressed run-length code"),
    "class without a name": ({"classes": torch.tensor([3])}, UserError, "detection has one of 3 classes.* 3 in 'a'"),
    "no height": ({"annotation": {"width": 3, "objects": []}}, DataError, "'a' lacks 'height'"),
    "object without box": ({"annotation": {**ANNOTATION, "objects": [{"category": 0}]}}, DataError, "lacks 'bbox'"),
    "box of three numbers": (with_object(bbox=[5, 5, 3]), DataError, "x, y, width, height"),
    "object of an unknown class": (with_object(category=5), DataError, "object has one of 3 classes.* 5 in 'a'"),
    "polygons": (with_object(segmentation=[[0, 0, 1, 1, 2, 0]]), DataError, "compressed run-length code"),
    "object's mask of another size": (
        with_object(segmentation=encode_mask(np.ones((9, 9)))), DataError, r"\[160, 200\]; got \[9, 9\]",
    ),
    "masks of nothing": ({"masks": [rectangle(0, 0, 9, 9)]}, DataError, "'a' has objects without. Add masks"),
}  # fmt: skip


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_named(mistake: str) -> None:
    change, kind, message = MISTAKES[mistake]
    with pytest.raises(kind, match=message):
        evaluated([{**GOOD, **change}])


def test_two_images_of_one_name_are_told_apart() -> None:
    with pytest.raises(DataError, match="'a' names two images"):
        evaluated([GOOD, {**GOOD, "annotation": {**ANNOTATION, "width": 300}}])


def test_names_of_classes_differ() -> None:
    with pytest.raises(UserError, match="'cat'"):
        evaluated([GOOD], ["cat", "dog", "cat"])


def test_images_with_and_without_masks_are_not_mixed() -> None:
    with pytest.raises(UserError, match=r"none for 'a'\. Pass \[\] there"):
        evaluated([GOOD, {**drawn(5), "key": "b"}])


def test_a_mask_comes_back_from_its_code() -> None:
    mask = np.random.default_rng(0).random((7, 5)) > 0.5
    code = encode_mask(mask)
    assert code["size"] == [7, 5] and isinstance(code["counts"], str)
    np.testing.assert_array_equal(decode_mask(code), mask)
