"""Groups of views: what each view shows, that it depends on its seed and number alone, and the rules of the groups."""

import itertools
import statistics
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.seeds import random_state_kept, seed_transforms, stable_hash
from ssmpretrain.datamodules import ImageFolder, ViewGroup
from ssmpretrain.datamodules.decoding.batcher import Batcher
from ssmpretrain.datamodules.decoding.photometric import Photometric
from ssmpretrain.datamodules.decoding.views import ViewsTransform

IMAGE = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
WHOLE: dict[str, Any] = {"crop_scale": (1.0, 1.0), "horizontal_flip": False}


def colours(**options: float) -> Photometric:
    return Photometric(0.4, 0.4, 0.2, 0.1, jitter_probability=0.8, grayscale_probability=0.2, **options)


DINO = [  # main_dino.py of facebookresearch/dino; iBOT has the same
    ViewGroup(crop_scale=(0.4, 1.0), photometric=colours(blur_probability=1)),
    ViewGroup(crop_scale=(0.4, 1.0), photometric=colours(blur_probability=0.1, solarize_probability=0.2)),
    ViewGroup(8, 16, (0.05, 0.4), local=True, photometric=colours(blur_probability=0.5)),
]


def batcher(groups: list[ViewGroup] | None, **options: Any) -> Batcher:
    return ImageFolder("images", views=groups, **{"image_size": 32, **options})._train_batcher


def views_of(groups: list[ViewGroup], image: Tensor = IMAGE, sample: str = "a", **options: Any) -> list[Tensor]:
    """Return the views of one image, the first dimension of the batch left out."""
    maker = batcher(groups, **options)
    with random_state_kept():
        prepared = maker.prepare({"image": image, "label": 0, "key": "a"}, 0, sample)
        return [of_size[0] for of_size in maker.collate([prepared])["views"]]


def test_a_batch_has_one_tensor_for_each_size_with_the_global_views_first() -> None:
    groups = [ViewGroup(2), ViewGroup(1, 16, local=True), ViewGroup(3, local=True), ViewGroup(2, (16, 16), local=True),
              ViewGroup(1, (8, 24), local=True)]  # fmt: skip
    maker = batcher(groups)
    samples = [maker.prepare({"image": IMAGE, "label": label, "key": f"{label}"}, 0, f"{label}") for label in (4, 7)]
    batch = maker.collate(samples)
    assert list(batch) == ["views", "num_global", "label", "key"]
    assert [tuple(views.shape) for views in batch["views"]] == [(2, 5, 3, 32, 32), (2, 3, 3, 16, 16), (2, 1, 3, 8, 24)]
    assert all(views.dtype == torch.float32 and views.is_contiguous() for views in batch["views"])
    assert (batch["num_global"], batch["label"].tolist(), batch["key"]) == (2, [4, 7], ["4", "7"])


def test_views_have_the_crop_flip_colours_and_normalisation_of_their_group() -> None:
    solarized, gray = Photometric(solarize_probability=1), Photometric(grayscale_probability=1)
    groups = [ViewGroup(1, 40, **WHOLE), ViewGroup(1, 40, photometric=solarized, **WHOLE, local=True),
              ViewGroup(1, 40, photometric=gray, **WHOLE, local=True)]  # fmt: skip
    mean, std = (torch.tensor(values).view(3, 1, 1) for values in ((0.1, 0.2, 0.3), (0.5, 0.6, 0.7)))
    (views,) = views_of(groups, mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    levels = ((views * std + mean) * 255).round()
    plain, weights = IMAGE.float(), torch.tensor([0.2989, 0.587, 0.114]).view(3, 1, 1)
    assert torch.equal(levels[0], plain)
    assert torch.equal(levels[1], torch.where(plain >= 128, 255 - plain, plain))
    assert torch.equal(levels[2], (plain * weights).sum(0).floor().expand(3, -1, -1))
    assert torch.allclose(views[0], (plain / 255 - mean) / std, atol=1e-5)


def test_dinos_views_are_torchvisions_classes_in_the_published_order_with_the_same_random_numbers() -> None:
    def published(size: int, scale: tuple[float, float], blur: float, solarize: float = 0.0) -> v2.Compose:
        steps = [
            v2.RandomResizedCrop(size, scale, interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(),
            v2.RandomApply([v2.ColorJitter(0.4, 0.4, 0.2, 0.1)], 0.8),
            v2.RandomApply([v2.Grayscale(3)], 0.2),
            v2.RandomApply([v2.GaussianBlur(17, (0.1, 2.0))], blur),
        ]
        return v2.Compose([*steps, *[v2.RandomApply([v2.RandomSolarize(128, 1)], solarize)] * (solarize > 0)])

    theirs = [published(32, (0.4, 1.0), 1.0), published(32, (0.4, 1.0), 0.1, 0.2)]
    theirs += [published(16, (0.05, 0.4), 0.5)] * 8
    transform = ViewsTransform(DINO, ImageFolder("images", image_size=32).augmentation, "test")
    smooth = F.gaussian_blur(IMAGE, [9, 9], [2.0])
    with random_state_kept():
        for seed in range(12):
            for number, ours in enumerate(itertools.chain(*transform(smooth, seed=seed))):
                seed_transforms(stable_hash("view", seed, number))
                off = (ours.int() - theirs[number](smooth).int()).abs()
                assert off.max() <= 1 and off.float().mean() < 1e-2  # rounding of hue and blur


@pytest.mark.parametrize(
    ("of_group", "of_data", "share"), [(None, True, 0.5), (None, False, 0), (True, False, 0.5), (False, True, 0)]
)
def test_a_group_takes_the_flip_of_the_data_unless_it_says_otherwise(
    of_group: bool | None, of_data: bool, share: float
) -> None:
    groups = [ViewGroup(200, 40, (1.0, 1.0), horizontal_flip=of_group)]
    (views,) = views_of(groups, mean=(0, 0, 0), std=(1, 1, 1), horizontal_flip=of_data)
    mirrored = sum(torch.equal((view * 255).round(), IMAGE.flip(-1).float()) for view in views)
    assert abs(mirrored - 200 * share) <= 21  # three deviations


def test_the_area_of_a_crop_is_in_the_range_of_its_group() -> None:
    ramp = (
        torch.arange(40).view(1, 1, 40).expand(3, 40, 40).mul(6).to(torch.uint8)
    )  # the spread of values tells the width
    for least, most in ((0.05, 0.25), (0.5, 0.6)):
        (views,) = views_of([ViewGroup(60, crop_scale=(least, most))], ramp, mean=(0, 0, 0), std=(1, 1, 1))
        widths = [(view.max() - view.min()).item() * 255 / 6 + 1 for view in views]
        assert least < statistics.mean((width / 40) ** 2 for width in widths) < most


def test_all_views_of_an_image_differ() -> None:
    seen = [view.numpy().tobytes() for of_size in views_of(DINO) for view in of_size]
    assert len(seen) == len(set(seen)) == 10
    one_group = views_of([ViewGroup(6)])[0]
    assert len({view.numpy().tobytes() for view in one_group}) == 6


def test_a_view_depends_on_its_number_and_not_on_the_other_groups() -> None:
    globals_, locals_ = views_of(DINO)
    other = [ViewGroup(crop_scale=(0.9, 1.0)), DINO[1], ViewGroup(5, 16, (0.05, 0.4), True, None, DINO[2].photometric)]
    others, fewer = views_of(other)
    assert not torch.equal(others[0], globals_[0]) and torch.equal(others[1], globals_[1])
    assert torch.equal(fewer, locals_[:5])
    more = views_of([*DINO, ViewGroup(2, 24, local=True)])
    assert torch.equal(more[0], globals_) and torch.equal(more[1], locals_)
    assert torch.equal(views_of(DINO[:2])[0], globals_)


def test_views_depend_on_seed_epoch_and_sample() -> None:
    maker, first = batcher(DINO), views_of(DINO)[0]
    with random_state_kept():
        decoded: Any = {"image": IMAGE, "label": 0, "key": "a"}
        later = maker.collate([maker.prepare(decoded, 1, "a")])["views"][0][0]
    for other in (later, views_of(DINO, sample="b")[0], views_of(DINO, seed=1)[0]):
        assert not any(torch.equal(mine, theirs) for mine, theirs in zip(first, other, strict=True))


def test_a_view_is_the_same_alone_and_in_a_batch() -> None:
    maker = batcher(DINO)
    with random_state_kept():
        decoded: list[Any] = [{"image": IMAGE.roll(n, -1), "label": 0, "key": str(n)} for n in range(3)]
        batch = maker.collate([maker.prepare(one, 0, one["key"]) for one in decoded])
    for number, one in enumerate(decoded):
        for together, alone in zip(batch["views"], views_of(DINO, one["image"], one["key"]), strict=True):
            assert torch.equal(together[number], alone)


@pytest.mark.parametrize(
    ("groups", "words"),
    [
        ([], "views has a group of global views; got none. Leave `local` out in one of them."),
        ([ViewGroup(2, local=True)], "views has a group of global views; got none."),
        ([ViewGroup(1, 8, local=True), ViewGroup()], "in views, groups of global views come first; got local ones "),
        ([ViewGroup(), ViewGroup(1, 16)], "global views share one size; got [(16, 16), (32, 32)]. Give them one size"),
        ([ViewGroup(2, 5000), ViewGroup(6, 3000, local=True)], "have at most 100,000,000 pixels together; got 104,"),
        ([{"count": 2}], "views is a list of ViewGroup; got {'count': 2}. Import ViewGroup from ssmpretrain."),
        (ViewGroup(), "views is a list of ViewGroup; got ViewGroup(count=1"),
    ],
)
def test_groups_that_make_no_batch_are_refused(groups: Any, words: str) -> None:
    with pytest.raises(ValueError) as error:
        batcher(groups)
    assert str(error.value).startswith("ImageFolder: ") and words in str(error.value)


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("auto_augment", "rand-m9"),
        ("color_jitter", 0.4),
        ("photometric", Photometric(hue=0.1)),
        ("random_erasing", 0.2),
    ],
)
def test_options_of_a_single_view_are_refused_beside_views(option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"ImageFolder: beside views, {option} has no effect; got .* Leave it out"):
        batcher(DINO, **{option: value})


def test_the_crop_of_a_single_view_is_refused_beside_views() -> None:
    with pytest.raises(
        ValueError, match=r"each group has its own crop_scale; got crop_scale \[0.5, 1.0\]\. Leave it out"
    ):
        batcher(DINO, crop_scale=(0.5, 1.0))
    batcher(DINO, crop_scale=[0.2, 1.0])  # a recipe that a run saved states the default


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 0}, "count is a whole number of at least 1; got 0."),
        ({"count": 1.5}, "count is a whole number of at least 1; got 1.5."),
        ({"crop_scale": (0.4, 0.2)}, "crop_scale is (least, most) with 0 < least <= most <= 1; got (0.4, 0.2)."),
        ({"crop_scale": (0.0, 0.2)}, "got (0.0, 0.2)."),
        ({"crop_scale": (0.4,)}, "got (0.4,)."),
        ({"crop_scale": 0.4}, "got 0.4."),
        ({"size": 0}, "size is a positive number of pixels, or height and width; got 0."),
        ({"size": (96, 96, 3)}, "got (96, 96, 3)."),
        ({"photometric": {"hue": 0.1}}, "photometric is a Photometric or None; got {'hue': 0.1}."),
    ],
)
def test_a_setting_of_a_group_out_of_range_is_named(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as error:
        ViewGroup(**options)
    message = str(error.value)
    assert message.startswith("ViewGroup: ") and words in message and message.endswith("Correct it in data.views.")
