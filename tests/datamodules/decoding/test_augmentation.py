import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from ssmpretrain.base.seeds import random_state_kept, seed_transforms, stable_hash
from ssmpretrain.datamodules import ImageFolder, ImageShards
from ssmpretrain.datamodules.decoding.policy import PolicyAugment, check_policy
from ssmpretrain.datamodules.decoding.transform import ImageTransform

SMALL: dict[str, Any] = {"batch_size": 4, "num_workers": 0, "image_size": 24, "shuffle_buffer": 10}
FULL = {"auto_augment": "rand-m9-mstd0.5-inc1", "random_erasing": 0.5, "color_jitter": 0.3}
POLICIES = ["rand-m9-mstd0.5-inc1", "rand-m5-n3-p0.7-mmax20-tweights", "rand-t3a", "original-mstd0.5", "v0r", "3a"]


@pytest.fixture
def folder(make_shards) -> Path:
    return make_shards([11, 4, 20, 7])


def shards(folder: Path, **options: Any) -> ImageShards:
    return ImageShards(f"{folder}/train-*.tar", **{**SMALL, **options})


def images(folder: Path, epoch: int = 0, **options: Any) -> dict[str, torch.Tensor]:
    loader = shards(folder, **options).train_dataloader()
    loader.sampler.set_epoch(epoch)
    return {key: image for batch in loader for key, image in zip(batch["key"], batch["image"], strict=True)}


def photograph(side: int = 64) -> torch.Tensor:
    from sklearn.datasets import load_sample_images

    return F.resize(torch.from_numpy(load_sample_images().images[0].copy()).permute(2, 0, 1), [side, side])


@pytest.mark.parametrize("policy", [*POLICIES, "augmix-m5-w4-d2"])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_a_policy_does_what_timms_own_transform_does(policy: str, interpolation: str) -> None:
    mean = (0.2, 0.5, 0.9)
    theirs = create_transform(
        (64, 80), is_training=True, auto_augment=policy, interpolation=interpolation, mean=mean, separate=True
    )[1].transforms[0]
    ours = PolicyAugment(policy, (64, 80), mean, interpolation)
    image = photograph()
    with random_state_kept():
        for number in range(12):
            seed_transforms(stable_hash("test", number))
            expected = theirs(F.to_pil_image(image))
            seed_transforms(stable_hash("test", number))
            assert torch.equal(ours(image), F.pil_to_tensor(expected))


@pytest.mark.parametrize(
    ("policy", "reason"),
    [
        ("rand-m9-inc", "rand takes no section 'inc'"),  # timm would leave it out without a word
        ("rand-m9-x3", "rand takes no section 'x3'"),
        ("rand-m-9", "rand takes no section 'm'"),
        ("rand-m9-twrong", "rand takes no section 'twrong'"),
        ("rand-p1.5", "rand takes no section 'p1.5'"),
        ("rand-m9-", "rand takes no section ''"),
        ("original-m9", "original takes no section 'm9'"),
        ("random-m9", "there is no policy 'random'"),
        ("", "there is no policy ''"),
    ],
)
def test_a_policy_that_timm_would_not_understand_is_refused_by_its_wrong_part(policy: str, reason: str) -> None:
    with pytest.raises(ValueError) as error:
        ImageShards("a.tar", auto_augment=policy)
    assert str(error.value).startswith("ImageShards: auto_augment is a policy of timm, one of rand, augmix, original")
    assert f"got {policy!r}: {reason}." in str(error.value)


@pytest.mark.parametrize("policy", [None, *POLICIES, "rand-m15-n2-mstd0.5", "augmix-m5-w4-d2-b1-a0.5-mstd1"])
def test_policies_of_published_recipes_are_accepted(policy: str | None) -> None:
    check_policy(policy, "here")


def test_jitter_gives_way_to_a_policy_unless_it_is_3_augment() -> None:
    def steps(policy: str | None, jitter: float) -> list[str]:
        settings = ImageFolder("x", auto_augment=policy, color_jitter=jitter).augmentation
        return [type(step).__name__ for step in settings.colours()]

    assert steps(None, 0.0) == []
    assert steps(None, 0.3) == ["ColorJitter"]
    assert steps("rand-m9", 0.3) == ["PolicyAugment"]
    assert steps("3a", 0.3) == steps("rand-t3a", 0.3) == ["PolicyAugment", "ColorJitter"]


def test_jitter_varies_brightness_contrast_and_saturation_and_not_the_hue(folder: Path) -> None:
    (jitter,) = shards(folder, color_jitter=0.4).augmentation.colours()
    for name in ("brightness", "contrast", "saturation"):
        assert list(getattr(jitter, name)) == pytest.approx([0.6, 1.4])
    assert jitter.hue is None
    plain, varied = images(folder), images(folder, color_jitter=0.4)
    assert not any(torch.equal(plain[key], varied[key]) for key in plain)


@pytest.mark.parametrize("policy", ["rand-m9-mstd0.5-inc1", "augmix-m5-w4-d2"])
def test_augmentation_is_the_same_for_any_number_of_workers_and_anew_each_epoch(folder: Path, policy: str) -> None:
    options = {**FULL, "auto_augment": policy}
    alone, three = images(folder, **options), images(folder, num_workers=3, **options)
    assert set(alone) == set(three)
    assert all(torch.equal(alone[key], three[key]) for key in alone)
    later = images(folder, epoch=1, **options)
    assert not any(torch.equal(alone[key], later[key]) for key in set(alone) & set(later))


def test_augmentation_leaves_all_three_global_generators_alone(folder: Path) -> None:
    def draws() -> list[float]:
        return [random.random(), float(np.random.rand()), float(torch.rand(()))]

    def seed() -> None:
        random.seed(0), np.random.seed(0), torch.manual_seed(0)

    seed()
    expected = draws()
    seed()
    loader = iter(shards(folder, **FULL).train_dataloader())
    next(loader)
    assert draws() == expected  # also while an epoch is under way
    assert len(list(loader)) == 9


def test_the_three_generators_draw_different_numbers() -> None:
    with random_state_kept():
        for number in range(4):
            seed_transforms(stable_hash("test", number))
            draws = [random.getrandbits(24) for _ in range(64)]
            draws += (np.random.randint(0, 2**32, 64, dtype=np.uint32) % 2**24).tolist()
            draws += (torch.rand(64) * 2**24).long().tolist()  # a float32 keeps 24 bits of a draw
            assert len(set(draws)) > 180  # 192 draws of 24 bits


def test_random_erasing_puts_noise_into_one_rectangle_of_a_normalised_image(folder: Path) -> None:
    plain, erased = images(folder), images(folder, random_erasing=1.0)
    noise = []
    for key, image in plain.items():
        changed = (image != erased[key]).all(0).nonzero()
        (top, left), (bottom, right) = changed.min(0).values.tolist(), changed.max(0).values.tolist()
        area = (bottom - top + 1) * (right - left + 1)
        assert len(changed) == area and (image != erased[key]).any(0).sum() == area
        assert 0.01 < area / 24**2 < 0.36  # a fiftieth to a third, of whole pixels
        noise.append(erased[key][:, top : bottom + 1, left : right + 1].flatten())
    values = torch.cat(noise)
    assert abs(values.mean()) < 0.05 and abs(values.std() - 1) < 0.05  # 10,000 numbers and more


def test_random_erasing_takes_the_fraction_of_images_that_was_asked_for(make_shards) -> None:
    folder = make_shards([400])
    plain, erased = images(folder), images(folder, random_erasing=0.25)
    count = sum(not torch.equal(plain[key], erased[key]) for key in plain)
    assert 70 <= count <= 130  # 100, and the binomial's deviation is 8.7


def test_evaluation_and_bank_see_no_augmentation(folder: Path) -> None:
    def evaluated(**options: Any) -> list[torch.Tensor]:
        data = shards(folder, val=f"{folder}/train-*.tar", **options)
        return [batch["image"] for loader in (data.val_dataloader(), data.bank_dataloader()) for batch in loader]

    for one, other in zip(evaluated(), evaluated(**FULL, repeats=3), strict=True):
        assert torch.equal(one, other)


def test_interpolation_is_used_by_both_crops(folder: Path) -> None:
    def first(loader: Any) -> torch.Tensor:
        return next(iter(loader))["image"]

    bicubic, bilinear = shards(folder), shards(folder, interpolation="bilinear")
    assert not torch.equal(first(bicubic.train_dataloader()), first(bilinear.train_dataloader()))
    assert not torch.equal(first(bicubic.bank_dataloader()), first(bilinear.bank_dataloader()))
    transform = bilinear._eval_batcher.transform
    expected = F.center_crop(F.resize(photograph(), [27, 27], F.InterpolationMode.BILINEAR, antialias=True), [24, 24])
    assert torch.equal(transform(photograph(), seed=0), expected)


@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize(("side", "ratio"), [(224, 1.0), (224, 0.875), (96, 0.9), (60, 0.95)])
def test_evaluation_sees_the_pixels_that_torchvision_and_timm_see(side: int, ratio: float, interpolation: str) -> None:
    resized = {(224, 0.875): 256, (224, 1.0): 224, (96, 0.9): 106, (60, 0.95): 63}[side, ratio]
    mode = F.InterpolationMode(interpolation)
    theirs = v2.Compose([v2.Resize(resized, mode, antialias=True), v2.CenterCrop(side)])
    timms = create_transform((side, side), crop_pct=ratio, interpolation=interpolation)
    assert timms.transforms[0].size == resized
    ours = ImageTransform((side, side), None, False, ratio, interpolation)
    for h, w in [(427, 640), (640, 427), (500, 333), (99, 101), (40, 41), (side, side + 1), (resized, 300)]:
        image = torch.randint(0, 256, (3, h, w), dtype=torch.uint8, generator=torch.Generator().manual_seed(h))
        assert torch.equal(ours(image, seed=0), theirs(image))


@pytest.mark.parametrize("ratio", [1.0, 0.9])
def test_an_image_that_is_no_square_is_resized_as_timm_does(ratio: float) -> None:
    timms = create_transform((96, 160), crop_pct=ratio)
    ours = ImageTransform((96, 160), None, False, ratio)
    for h, w in [(427, 640), (640, 427), (99, 101), (96, 160), (32, 300)]:
        expected = timms.transforms[0].get_params(torch.empty(3, h, w), timms.transforms[0].size, 0.0)
        assert list(ours._resized(h, w)) == expected
        assert ours(torch.zeros(3, h, w, dtype=torch.uint8), seed=0).shape == (3, 96, 160)


def test_preprocessing_can_be_read_from_the_data_module() -> None:
    data = ImageShards("a.tar", image_size=(32, 48), interpolation="bilinear", eval_crop_ratio=0.9, mean=(0.5,) * 3)
    assert (data.image_size, data.interpolation, data.eval_crop_ratio) == ((32, 48), "bilinear", 0.9)
    assert (data.mean, data.std) == ((0.5, 0.5, 0.5), (0.229, 0.224, 0.225))


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("interpolation", "nearest", "interpolation is bicubic or bilinear; got nearest"),
        ("color_jitter", -0.1, "color_jitter is finite and at least 0; got -0.1"),
        ("random_erasing", 1.5, r"random_erasing is a probability in \[0, 1\]; got 1.5"),
        ("repeats", 0, "repeats is at least 1; got 0"),
    ],
)
def test_an_argument_out_of_range_is_named(argument: str, value: object, message: str) -> None:
    with pytest.raises(ValueError, match=f"ImageShards: {message}"):
        ImageShards("a.tar", **{argument: value})


def test_grey_images_and_one_pixel_images_are_augmented_too(tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    Image.new("L", (40, 30)).save(tmp_path / "images" / "grey.png")
    Image.new("RGB", (1, 1)).save(tmp_path / "images" / "pixel.png")
    from ssmpretrain.datamodules import ImageFolder

    data = ImageFolder(str(tmp_path / "images"), batch_size=2, num_workers=0, image_size=16, repeats=2, **FULL)
    for _ in range(4):
        for batch in data.train_dataloader():
            assert batch["image"].isfinite().all()


@pytest.mark.parametrize("policy", ["rand-m10-inc1", "rand-m9-n1-inc1", "augmix-m10", "original", "v0"])
def test_posterizing_takes_every_number_of_bits_that_timm_draws(policy: str) -> None:
    operations = PolicyAugment(policy, (8, 8), (0.5, 0.5, 0.5), "bicubic").operations
    steps = operations.ops if hasattr(operations, "ops") else [one for step in operations.policy for one in step]
    posterize = [step for step in steps if step.name.startswith("Posterize")]
    assert posterize
    image = Image.fromarray(np.arange(192, dtype=np.uint8).reshape(8, 8, 3))
    values = np.arange(192, dtype=np.uint8).reshape(8, 8, 3)
    for bits in range(9):
        kept = np.asarray(posterize[0].aug_fn(image, bits))
        assert (kept == (values & np.uint8(256 - 2 ** (8 - bits) if bits else 0))).all()
