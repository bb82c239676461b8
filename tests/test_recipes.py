"""Every recipe parses and takes two shrunken steps, also with another encoder in its one line."""

import importlib.util
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml
from PIL import Image
from timm.scheduler import CosineLRScheduler

import ssmpretrain.objectives
from ssmpretrain import create_encoder
from ssmpretrain.cli import main
from ssmpretrain.encoders.features.encoded import check_view_size
from ssmpretrain.encoders.features.taps import Taps
from ssmpretrain.objectives.dense.detectors import Detector, Neck
from ssmpretrain.objectives.dense.heads import FCN, UPerNet
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine

ROOT = Path(__file__).parents[1]
RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SMALL = {"vim": "test_vim", "vim2": "test_vim2", "vmamba": "test_vmamba", "vmamba2": "test_vmamba2", "vit": "test_vit",
         "arm": "test_arm", "mambaout": "test_mambaout", "deit": "test_vit",
         "swin": "swin_tiny_patch4_window7_224"}  # fmt: skip
SMALL_SWIN = "{img_size: 64, window_size: 2, embed_dim: 16, depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1]}"
NARROW_DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 4}
# Heads, prototypes and slices of a joint embedding; the last layer trains and patches are masked from the first step.
NARROW_HEAD = {"DINO": {"num_prototypes": 32, "head_hidden_dim": 16, "head_bottleneck_dim": 8,
                        "freeze_last_layer_epochs": 0, "ibot_from_epoch": 0},
               "LeJEPA": {"projector_hidden": "[16]", "projector_dim": 8, "num_slices": 16}}  # fmt: skip
SMALL_VIEWS = "[{count: 2, crop_scale: [0.4, 1.0]}, {count: 2, size: 32, crop_scale: [0.05, 0.4], local: true}]"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, write_shard: Callable[..., Path]) -> Iterator[Path]:
    """A working folder with a shard; what one recipe trained is there for those that begin with it."""
    folder = tmp_path_factory.mktemp("recipes")
    write_shard(folder / "train.tar", captions=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("SSMPRETRAIN_CACHE", str(folder / "cache"))
        yield folder


@pytest.fixture(scope="module")
def shrunken(folder: Path, dense_data: Path) -> Callable[..., int]:
    """Run a recipe for two steps on two small images, with a small encoder of the same kind or another one."""
    shard = str(folder / "train.tar")

    @cache
    def run(recipe: Path, encoder: str | None = None) -> int:
        written = yaml.safe_load(recipe.read_text())
        model: dict[str, Any] = {}
        data: dict[str, Any] = {"train_images": 8, "val_images": 4, "batch_size": 2}
        init_args = written["model"]["init_args"]
        if "init_from" in init_args:
            place, source = Path(init_args["init_from"]).parts[:2]
            if place == "runs":  # runs/SOURCE/...: the run of another recipe
                assert run(recipe.with_stem(source)) == 0
            else:  # a published file
                model["init_from"] = "null"
        if not recipe.stem.startswith("quickstart"):
            if "encoder" in init_args:
                model["encoder"] = encoder or SMALL[init_args["encoder"].split("_")[0]]
            if "stride8" in init_args.get("encoder", ""):
                model["encoder_args"] = "{img_size: 64, stride: 8}"
            if init_args.get("encoder", "").startswith("swin"):
                model["encoder_args"] = SMALL_SWIN
            data = {"train": shard, "val": shard, "image_size": 64, "batch_size": 2, "num_workers": 0}
            if written["model"]["class_path"].endswith(("MAE", "ARM")):
                model |= NARROW_DECODER
            if written["model"]["class_path"].endswith("ARM"):
                model["cluster_size"] = 2  # 2 x 2 clusters
            model |= NARROW_HEAD.get(written["model"]["class_path"].rpartition(".")[2], {})
            if "views" in written["data"]["init_args"]:
                data["views"] = SMALL_VIEWS
            if "_reg" in init_args.get("encoder", ""):
                model["encoder_args"] = "{class_token: registers, num_registers: 3}"
            if max(init_args.get("last_blocks", [1])) > 2:
                model["last_blocks"] = "[2]"
            if written["model"]["class_path"].endswith("CLIP"):
                model["text"] = {**init_args.get("text", {}), "width": 32, "heads": 2, "layers": 1}
            if written["model"]["class_path"].endswith(("Segmentation", "Detection")):
                model |= narrow_heads(init_args)
                data = {"train": dense_data, "val": dense_data, "image_size": 64, "eval_size": "[64, 64]",
                        "batch_size": 2, "num_workers": 0}  # fmt: skip
            if written["model"]["class_path"].endswith("Detection"):
                data |= dict.fromkeys(("train", "val"), dense_data / "images" / "training")
                data |= dict.fromkeys(("train_annotations", "val_annotations"), dense_data / "objects.json")
                data |= small_augmentation(written["data"]["init_args"]["augmentation"], data)
        trainer = {"accelerator": "cpu", "devices": 1, "num_nodes": 1, "precision": 32, "max_epochs": 1,
                   "max_steps": -1, "val_check_interval": "null", "limit_train_batches": 2,
                   "limit_val_batches": 2, "check_val_every_n_epoch": 1, "accumulate_grad_batches": 1}  # fmt: skip
        if "classes: imagenet" in recipe.read_text():
            trainer["callbacks"] = "null"  # 80 templates of 1000 classes
        sections = {"model": model, "data": data, "trainer": trainer}
        words = [f"--{name}.{key}={value}" for name, settings in sections.items() for key, value in settings.items()]
        return main(["fit", "--config", str(recipe), "--run_dir", run_of(recipe.stem, encoder), *words])

    return run


def narrow_heads(init_args: dict[str, Any]) -> dict[str, Any]:
    """Settings of small dense heads on a small encoder."""
    model: dict[str, Any] = {}
    if init_args["encoder"].startswith(("vim", "deit")) and len(init_args.get("taps", {}).get("indices", [])) > 1:
        model["taps.indices"] = "[0, 1, 2, 3]"
    if "detector" in init_args:
        detector = {"samples": 8, "box_head.width": 16, "box_head.conv_width": 8, "mask_head.width": 8,
                    "mask_head.convs": 1, "proposals.samples": 16, "proposals.before_nms": "[50, 50]",
                    "proposals.after_nms": 20}  # fmt: skip
        model |= {"neck.width": 16, **{f"detector.{name}": value for name, value in detector.items()}}
    elif init_args["head"]["class_path"].endswith("UPerNet"):
        model |= {"head.init_args.channels": 16, "auxiliary.channels": 16}
    return model


def small_augmentation(augmentation: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    """Settings of an augmentation of images with objects for small images."""
    if augmentation["class_path"].endswith("LargeScaleJitter"):
        return {}
    del data["image_size"]  # batches have the size of their largest image
    settings = {"short_sides": "[40, 48]", "longest": 64, "crop_short_sides": "[40, 48]", "crop_sides": "[24, 40]"}
    return {f"augmentation.{name}": value for name, value in settings.items()}


@pytest.fixture(scope="module")
def dense_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four labelled images in ADE20K's layout, with objects in COCO's form."""
    root = tmp_path_factory.mktemp("dense")
    noise = torch.Generator().manual_seed(0)
    objects: dict[str, list[Any]] = {"images": [], "annotations": [], "categories": []}
    for split in ("training", "validation"):
        (root / "images" / split).mkdir(parents=True)
        (root / "annotations" / split).mkdir(parents=True)
        for number in range(4):
            pixels = torch.randint(256, (48, 64, 3), dtype=torch.uint8, generator=noise)
            Image.fromarray(pixels.numpy()).save(root / "images" / split / f"{number}.jpg")
            classes = torch.randint(151, (6, 8), dtype=torch.uint8, generator=noise).repeat_interleave(8, 0)
            Image.fromarray(classes.repeat_interleave(8, 1).numpy()).save(
                root / "annotations" / split / f"{number}.png"
            )
    objects["categories"] = [{"id": number + 1, "name": f"class {number}"} for number in range(80)]
    for number in range(4):
        objects["images"].append({"id": number, "file_name": f"{number}.jpg", "height": 48, "width": 64})
        x, y, side = 4 + number, 6, 30
        corners = [x, y, x + side, y, x + side, y + side, x, y + side]
        objects["annotations"].append(
            {"id": number + 1, "image_id": number, "category_id": number + 1, "bbox": [x, y, side, side], "iscrowd": 0,
             "area": side * side, "segmentation": [corners]}
        )  # fmt: skip
    (root / "objects.json").write_text(json.dumps(objects))
    return root


def run_of(stem: str, encoder: str | None = None) -> str:
    """Name the run of a recipe: as the recipe does, unless it has another encoder."""
    return f"runs/{stem}" if encoder is None else f"others/{stem}-{encoder}"


# Shrunken, these are their smaller siblings again.
SIBLINGS = {"vim_s", "vim_b", "vmamba_s", "vmamba_b", "longseq_vim_s", "finetune_mae_vim_l", "linear_mae_vim_l",
            "vmamba2_t", "vmamba2_s", "vmamba2_b", "vim2_s", "vim2_b", "mae_vim2_b", "finetune_mae_vim2_s",
            "finetune_mae_vim2_b", "dino_vim2_ti", "dino_vim2_b", "linear_dino_vim2_ti", "linear_dino_vim2_s",
            "linear_dino_vim2_b",
            "mae_vim_s", "mae_vim_l", "mae_vmamba_s", "mae_vmamba_b", "simmim_vmamba_s", "simmim_vmamba_b",
            "clip_vim_s", "clip_vmamba_s", "clip_vmamba_b", "clip_vim_b_cc12m", "clip_vmamba_t_cc12m",
            "deit_s", "deit_b", "mambaout_femto", "mambaout_kobe", "mambaout_small", "mambaout_base", "vmamba_t_s2l5",
            "vmamba_s_s1l20", "vmamba_b_s1l20", "vmamba_t_v0", "vmamba_s_v0", "vmamba_b_v0", "arm_l", "finetune_arm_l",
            "finetune_mae_vim_ti", "finetune_mae_vim_s", "finetune_mae_vmamba_s", "finetune_mae_vmamba_b",
            "finetune_simmim_vmamba_s", "finetune_simmim_vmamba_b", "seg_upernet_vmamba_s", "seg_upernet_vmamba_b",
            "seg_upernet_vim_s", "seg_upernet_mambaout_t", "seg_upernet_swin_t", "seg_upernet_deit_s",
            "det_maskrcnn_vmamba_s_1x", "det_maskrcnn_vmamba_b_1x", "det_maskrcnn_vmamba_t_3x",
            "det_maskrcnn_vmamba_s_3x", "det_maskrcnn_swin_t_1x", "det_maskrcnn_mambaout_t_1x",
            "det_cascade_deit_ti", "dino_vit_s", "dino_vim_ti", "dino_vim_b", "dino_vim_b_registers", "ibot_vit_s",
            "ibot_vim_s", "lejepa_vit_s", "lejepa_vmamba_t", "linear_dino_vit_s", "linear_dino_vim_ti",
            "linear_dino_vim_b", "linear_dino_vim_b_registers", "linear_lejepa_vit_s"}  # fmt: skip


@pytest.mark.parametrize(
    "recipe",
    [pytest.param(path, id=path.stem, marks=[pytest.mark.slow] if path.stem in SIBLINGS else []) for path in RECIPES],
)
def test_recipe_takes_two_shrunken_steps(recipe: Path, folder: Path, shrunken: Callable[..., int]) -> None:
    assert shrunken(recipe) == 0
    checkpoint = torch.load(folder / run_of(recipe.stem) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["global_step"] == 2
    assert every_parameter_got_a_gradient(checkpoint)


@pytest.mark.parametrize(
    ("recipe", "encoder"),
    [
        *(("simmim_vmamba_t", name) for name in ("test_mambaout", "test_vit", "test_convnext", "test_vim")),
        *(("mae_vmamba_t", name) for name in ("test_vit", "test_vim")),
        *((name, "test_vmamba") for name in ("mae_vim_b", "mae_vit_b", "simmim_mambaout_t")),
    ],
)
def test_another_encoder_takes_one_line(recipe: str, encoder: str, folder: Path, shrunken: Callable[..., int]) -> None:
    assert shrunken(next(path for path in RECIPES if path.stem == recipe), encoder) == 0
    checkpoint = torch.load(folder / run_of(recipe, encoder) / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["encoder"]["name"] == encoder
    assert every_parameter_got_a_gradient(checkpoint)


def every_parameter_got_a_gradient(checkpoint: dict[str, Any]) -> bool:
    """Whether the optimizer has moments of all it trains; DDP waits for the gradient of each."""
    (optimizer,) = checkpoint["optimizer_states"]
    return len(optimizer["state"]) == sum(len(group["params"]) for group in optimizer["param_groups"])


def test_an_encoder_that_cannot_serve_is_refused_with_those_that_can(
    shrunken: Callable[..., int], capsys: pytest.CaptureFixture[str]
) -> None:
    assert shrunken(next(path for path in RECIPES if path.stem == "mae_vmamba_t"), "test_mambaout") == 2
    message = capsys.readouterr().err
    assert "MAE: the encoder runs on the visible patches alone; 'test_mambaout' cannot." in message
    assert "vmamba_*" in message and "Traceback" not in message


def test_recipes_open_with_what_they_are_and_how_to_start_them() -> None:
    for recipe in RECIPES:
        header = [line for line in recipe.read_text().splitlines() if line.startswith("#")]
        not_run = any("Not run at this scale yet" in line for line in header)
        assert recipe.stem.startswith("quickstart") or not_run, recipe.stem
        assert any("python -m ssmpretrain" in line for line in header), recipe.stem
        assert len(header[0]) <= 120, recipe.stem


PUBLISHED = [  # recipes, global batch, peak learning rate, epochs, epochs of warm-up
    ("mae_vim_ti mae_vim_s mae_vim_b mae_vim_l mae_vit_b", 4096, 2.4e-3, 1600, 40),
    ("simmim_vmamba_t simmim_vmamba_s simmim_vmamba_b simmim_mambaout_t simmim_swin_b", 2048, 8e-4, 100, 10),
    ("arm_b", 2048, 1.2e-3, 1600, 40),
    ("arm_l", 1024, 6e-4, 1600, 40),
    ("clip_vit_b clip_vmamba_t clip_vmamba_s clip_vmamba_b clip_vim_s clip_vim_b siglip_vim_b", 4096, 5e-4, 25, 1),
    ("dino_vit_s", 512, 1e-3, 100, 10),
    ("dino_vim_ti dino_vim_s dino_vim_b", 192, 3.75e-4, 100, 10),
    ("dino_vim_b_registers", 384, 7.5e-4, 100, 10),
    ("ibot_vit_s ibot_vim_s", 1024, 2e-3, 800, 10),
    ("ibot_vmamba_t", 1024, 2e-3, 300, 10),
    ("lejepa_vit_s lejepa_vim_s lejepa_vmamba_t", 512, 5e-4, 100, 1),
]


def test_published_batch_peak_learning_rate_and_length() -> None:
    for stems, batch, peak_lr, epochs, warmup in PUBLISHED:
        for stem in stems.split():
            written = yaml.safe_load((ROOT / "recipes" / f"{stem}.yaml").read_text())
            trainer, model = written["trainer"], written["model"]["init_args"]
            assert written["data"]["init_args"]["batch_size"] * trainer["devices"] * trainer["num_nodes"] == batch, stem
            assert model["optimizer"]["lr_per_256"] * batch / 256 == pytest.approx(peak_lr), stem
            assert (trainer["max_epochs"], model["schedule"]["warmup_epochs"]) == (epochs, warmup), stem


@pytest.fixture(scope="module")
def recipe_tables() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipe_tables", ROOT / "docs" / "recipe_tables.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_in_the_docs_are_those_of_the_recipes(recipe_tables: ModuleType) -> None:
    assert recipe_tables.PAGE.read_text() == recipe_tables.page_with(recipe_tables.render()), (
        "run python docs/recipe_tables.py"
    )


def test_tables_hold_every_recipe_but_the_small_ones(recipe_tables: ModuleType) -> None:
    in_tables = [stem for group in recipe_tables.GROUPS.values() for stem in group.split()]
    assert sorted(in_tables) == [path.stem for path in RECIPES if not path.stem.startswith("quickstart")]


def test_a_recipe_without_brackets_differs_in_nothing_because_every_setting_is_compared(
    recipe_tables: ModuleType,
) -> None:
    published = yaml.safe_load(recipe_tables.PUBLISHED.read_text())["recipes"]
    stems = [stem for group in recipe_tables.GROUPS.values() for stem in group.split()]
    assert sorted(published) == sorted(stems)
    assert {stem: gaps for stem in stems if (gaps := recipe_tables.gaps(stem, published[stem]))} == {}
    assert recipe_tables.gaps("vim_s", {**published["vim_s"], "odd": 1}) == ["odd"]
    assert recipe_tables.differences("vim_s", {**published["vim_s"], "batch": None}).keys() == {"precision"}


def test_simmims_rates_are_its_schedulers() -> None:
    written = yaml.safe_load((ROOT / "recipes" / "simmim_swin_b.yaml").read_text())["model"]["init_args"]
    schedule, peak = Cosine(**written["schedule"]), written["optimizer"]["lr_per_256"] * 2048 / 256
    steps = 625  # an epoch of 1,281,167 images in batches of 2048, without the rest
    theirs = CosineLRScheduler(torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=8e-4), t_initial=100 * steps,
                               lr_min=4e-5, warmup_t=10 * steps, warmup_lr_init=4e-6, t_in_epochs=False)  # fmt: skip
    for step in (10 * steps, 30_000, 100 * steps - 1):
        assert peak * schedule.factor(step, 100 * steps, 10 * steps) == pytest.approx(theirs._get_lr(step)[0])
    # Ours has taken its first step up where theirs begins: one part in 6,250 of the peak.
    assert peak * schedule.factor(0, 100 * steps, 10 * steps) == pytest.approx(4e-6, abs=peak / (10 * steps))


def test_the_encoder_of_clip_vmamba_t_is_as_large_as_clip_mambas() -> None:
    written = yaml.safe_load((ROOT / "recipes" / "clip_vmamba_t.yaml").read_text())["model"]["init_args"]
    with torch.device("meta"):
        encoder = create_encoder(written["encoder"], num_classes=0, **written["encoder_args"])
    # The published class with vssm_tiny_224_0220.yaml has 32,484,904 with its classifier of 769,000.
    assert sum(parameter.numel() for parameter in encoder.parameters()) == 32_484_904 - 769_000


@pytest.mark.parametrize(
    ("recipe", "millions"),
    [
        ("seg_upernet_vmamba_t", 62),
        ("det_maskrcnn_vmamba_t_1x", 50),
        *(
            pytest.param(recipe, millions, marks=pytest.mark.slow)
            for recipe, millions in {
                "seg_upernet_vmamba_s": 82,
                "seg_upernet_vmamba_b": 122,
                "seg_upernet_mambaout_t": 54,
                "seg_upernet_swin_t": 60,
                "det_maskrcnn_vmamba_s_3x": 70,
                "det_maskrcnn_vmamba_b_1x": 108,
                "det_maskrcnn_swin_t_1x": 48,
            }.items()
        ),
    ],
)
def test_a_dense_model_has_the_published_number_of_parameters(recipe: str, millions: int) -> None:
    written = yaml.safe_load((ROOT / "recipes" / f"{recipe}.yaml").read_text())["model"]
    settings = {name: value for name, value in written["init_args"].items() if name not in ("init_from", "schedule")}
    kinds = {"taps": Taps, "neck": Neck, "auxiliary": FCN, "detector": Detector, "optimizer": AdamW}
    settings |= {name: kind(**settings[name]) for name, kind in kinds.items() if name in settings}
    if "head" in settings:
        settings["head"] = UPerNet(**settings["head"]["init_args"])
    with torch.device("meta"):
        model = getattr(ssmpretrain.objectives, written["class_path"].rpartition(".")[2])(**settings)
    assert round(sum(one.numel() for one in model.parameters() if one.requires_grad) / 1e6) == millions


def test_what_differs_from_the_published_run_is_found(recipe_tables: ModuleType) -> None:
    differing = recipe_tables.differences("vim_s", {"batch": 1024, "peak lr": 0.001, "eps": None})
    assert differing == {"batch": "1024"}


def test_header_names_the_published_target_of_its_size() -> None:
    targets = {"vim_ti": "76.1", "vim_s": "80.5", "vim_b": "81.9", "vmamba_t": "82.6", "vmamba_s": "83.6",
               "vmamba_b": "83.9", "vmamba_t_s2l5": "82.5", "vmamba_s_s1l20": "83.3", "vmamba_b_s1l20": "83.8",
               "vmamba_t_v0": "82.2", "vmamba_s_v0": "83.5", "vmamba_b_v0": "83.7", "mambaout_femto": "78.9",
               "mambaout_kobe": "80.0", "mambaout_small": "84.1", "mambaout_base": "84.2", "deit_s": "79.9",
               "deit_b": "81.8", "finetune_simmim_swin_b": "82.8", "mambaout_t": "82.7", "deit_ti": "72.2",
               "longseq_vim_ti": "78.3",
               "longseq_vim_s": "81.6", "finetune_mae_vim_b": "83.3", "finetune_mae_vim_l": "85.1",
               "finetune_arm_b": "83.2", "finetune_mae_vit_b": "83.66", "linear_mae_vit_b": "67.8"}  # fmt: skip
    for stem, target in targets.items():
        assert f"Target: {target} % top-1" in (ROOT / "recipes" / f"{stem}.yaml").read_text(), stem
    for stem, target in {
        "clip_vit_b": "37.6",
        "clip_vmamba_t": "38.7",
        "clip_vmamba_s": "40.0",
        "clip_vmamba_b": "38.3",
    }.items():
        assert f"Target: {target} % zero-shot top-1" in (ROOT / "recipes" / f"{stem}.yaml").read_text(), stem
    for stem, target in {
        "dino_vit_s": "74.0 % linear, 69.3 % kNN",
        "ibot_vit_s": "77.9 % linear, 75.2 % kNN",
        "dino_vim_ti": "73.7 % linear",
        "dino_vim_s": "77.4 % linear",
        "dino_vim_b": "78.1 % linear",
        "dino_vim_b_registers": "78.5 % linear",
        "lejepa_vit_s": "64.0 % linear, 47.1 % kNN, a reproduction",
        **dict.fromkeys(("ibot_vim_s", "ibot_vmamba_t", "lejepa_vim_s", "lejepa_vmamba_t"), "none is published"),
    }.items():
        assert f"Target: {target}" in (ROOT / "recipes" / f"{stem}.yaml").read_text(), stem


@pytest.mark.parametrize("stem", [path.stem for path in RECIPES if "views:" in path.read_text()])
def test_the_encoder_takes_views_of_the_sizes_of_its_recipe(stem: str) -> None:
    written = yaml.safe_load((ROOT / "recipes" / f"{stem}.yaml").read_text())
    settings, data = written["model"]["init_args"], written["data"]["init_args"]
    if settings.get("encoder"):
        with torch.device("meta"):
            encoder = create_encoder(settings["encoder"], num_classes=0, **settings.get("encoder_args", {}))
        for group in data["views"]:
            check_view_size(encoder, group.get("size", data["image_size"]))


def test_probes_of_dino_mamba_read_as_many_blocks_as_published() -> None:
    published = {"ti": (8, 0), "s": (4, 0.001), "b": (8, 0.01), "b_registers": (8, 0.01)}
    for size, (blocks, weight_decay) in published.items():
        written = yaml.safe_load((ROOT / "recipes" / f"linear_dino_vim_{size}.yaml").read_text())["model"]["init_args"]
        assert (written["poolings"], written["last_blocks"], written["read"]) == (["class"], [blocks], "mixer")
        assert written["optimizer"]["init_args"]["weight_decay"] == weight_decay
