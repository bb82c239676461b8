"""Write docs/recipes.md: the settings of every recipe beside the published ones.  python docs/recipe_tables.py

The tables come from recipes/*.yaml and docs/published_settings.yaml; the text around them is kept.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from ssmpretrain.encoders.vim.vim import VARIANTS
from ssmpretrain.encoders.vim2.vim2 import VARIANTS as VARIANTS_2

DOCS = Path(__file__).parent
PAGE, PUBLISHED = DOCS / "recipes.md", DOCS / "published_settings.yaml"
RECIPES = DOCS.parent / "recipes"
BEGIN, END = "<!-- tables: python docs/recipe_tables.py -->", "<!-- end of tables -->"
GROUPS = {
    "Supervised, from scratch: Vim and DeiT": "vim_ti vim_s vim_b deit_ti deit_s deit_b",
    "Supervised, from scratch: Vim2": "vim2_ti vim2_s vim2_b",
    "Supervised, from scratch: VMamba": "vmamba_t vmamba_s vmamba_b vmamba_t_s2l5 vmamba_s_s1l20 vmamba_b_s1l20",
    "Supervised, from scratch: VMamba2": "vmamba2_t vmamba2_s vmamba2_b",
    "Supervised, from scratch: the first VMamba": "vmamba_t_v0 vmamba_s_v0 vmamba_b_v0",
    "Supervised, from scratch: MambaOut": "mambaout_femto mambaout_kobe mambaout_t mambaout_small mambaout_base",
    "Long sequences": "longseq_vim_ti longseq_vim_s",
    "Fine-tuning after MAE and ARM": "finetune_mae_vim_ti finetune_mae_vim_s finetune_mae_vim_b finetune_mae_vim_l "
    "finetune_mae_vit_b finetune_arm_b finetune_arm_l",
    "Fine-tuning after MAE of Vim2": "finetune_mae_vim2_s finetune_mae_vim2_b",
    "Fine-tuning after MAE of VMamba": "finetune_mae_vmamba_t finetune_mae_vmamba_s finetune_mae_vmamba_b",
    "Fine-tuning after SimMIM": "finetune_simmim_swin_b finetune_simmim_vmamba_t finetune_simmim_vmamba_s "
    "finetune_simmim_vmamba_b finetune_simmim_mambaout_t",
    "Linear probes": "linear_mae_vim_b linear_mae_vim_l linear_mae_vmamba_t linear_arm_b linear_mae_vit_b",
    "Linear probes after DINO and LeJEPA": "linear_dino_vit_s linear_dino_vim_ti linear_dino_vim_s linear_dino_vim_b "
    "linear_dino_vim_b_registers linear_lejepa_vit_s",
    "Linear probes after DINO of Vim2": "linear_dino_vim2_ti linear_dino_vim2_s linear_dino_vim2_b",
    "Pretraining: MAE of Vim": "mae_vim_ti mae_vim_s mae_vim_b mae_vim_l",
    "Pretraining: MAE of Vim2": "mae_vim2_s mae_vim2_b",
    "Pretraining: MAE of others, and ARM": "mae_vmamba_t mae_vmamba_s mae_vmamba_b mae_vmamba2_t mae_vit_b arm_b arm_l",
    "Pretraining: SimMIM": "simmim_swin_b simmim_vmamba_t simmim_vmamba_s simmim_vmamba_b simmim_mambaout_t",
    "Pretraining: DINO": "dino_vit_s dino_vim_ti dino_vim_s dino_vim_b dino_vim_b_registers",
    "Pretraining: DINO of Vim2": "dino_vim2_ti dino_vim2_s dino_vim2_b",
    "Pretraining: iBOT": "ibot_vit_s ibot_vim_s ibot_vmamba_t",
    "Pretraining: LeJEPA": "lejepa_vit_s lejepa_vim_s lejepa_vmamba_t",
    "Images and captions: YFCC-15M": "clip_vmamba_t clip_vmamba_s clip_vmamba_b clip_vim_s clip_vim_b clip_vit_b "
    "siglip_vim_b",
    "Images and captions: CC12M": "clip_vim_b_cc12m clip_vmamba_t_cc12m clip_vmamba_b_mamba_text_cc12m",
    "Ablations of Vim on ImageNet-1k": "ablation_imagenet_vim_ti",
    "Segmentation: VMamba": "seg_upernet_vmamba_t seg_upernet_vmamba_s seg_upernet_vmamba_b",
    "Segmentation: Vim": "seg_upernet_vim_ti seg_upernet_vim_s ablation_segmenter_vim_ti",
    "Segmentation: controls": "seg_upernet_mambaout_t seg_upernet_swin_t seg_upernet_deit_s",
    "Detection: VMamba": "det_maskrcnn_vmamba_t_1x det_maskrcnn_vmamba_s_1x det_maskrcnn_vmamba_b_1x "
    "det_maskrcnn_vmamba_t_3x det_maskrcnn_vmamba_s_3x",
    "Detection: controls": "det_maskrcnn_mambaout_t_1x det_maskrcnn_swin_t_1x",
    "Detection: encoders of one stride": "det_cascade_vim_ti det_cascade_deit_ti",
}


def settings(stem: str) -> dict[str, str]:
    """What a recipe sets, in words, in the order of the tables; defaults of the classes included."""
    recipe = yaml.safe_load((RECIPES / f"{stem}.yaml").read_text())
    model, data, trainer = recipe["model"]["init_args"], recipe["data"]["init_args"], recipe["trainer"]
    method = recipe["model"]["class_path"].rpartition(".")[2]
    batch = data["batch_size"] * trainer["devices"] * trainer["num_nodes"] * trainer.get("accumulate_grad_batches", 1)
    if method in ("Segmentation", "Detection"):
        rows = _dense(method, model, data, trainer, batch)
        return {name: value if isinstance(value, str) else _number(value) for name, value in rows.items()}
    common = {"epochs": trainer["max_epochs"], "batch": batch}
    prefix = model["schedule"].get("warmup_prefix", True)
    constant = model["schedule"].get("initial_fraction") == model["schedule"].get("final_fraction") == 1
    begins = "never" if constant else "after the warm-up" if prefix else "at step 0"
    schedule = {"warm-up epochs": model["schedule"]["warmup_epochs"], "cosine begins": begins}
    per_tensor = model.get("clip_per_tensor")
    rest = {
        "clipping": f"{per_tensor:g} per tensor" if per_tensor else trainer.get("gradient_clip_val", "none"),
        "precision": trainer["precision"],
        "image size": data["image_size"],
        **({} if "views" in data else {"crop scale": _pair(data["crop_scale"])}),
        "interpolation": data.get("interpolation", "bicubic"),
    }
    if method == "LinearProbe":
        probe = _probe(model)
        del rest["clipping"]
        if model["schedule"].get("by_epoch"):
            schedule["cosine begins"] += ", in steps of an epoch"
        rows = {**common, **probe, **schedule, **rest, "eval crop": data.get("eval_crop_ratio", 0.875)}
    else:
        own = _own(method, model, data, trainer)
        optimizer = _optimizer(model, batch)
        if "views" in data:
            optimizer["parameters decayed"] = optimizer.pop("decayed")
        rows = {**common, **optimizer, **schedule, **_initial_values(model), **own, **rest}
    return {name: value if isinstance(value, str) else _number(value) for name, value in rows.items()}


def _own(method: str, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    """The rows that a method has beside the common ones."""
    if method == "Finetune":
        return _supervised(model, data, trainer)
    if method in ("DINO", "LeJEPA"):
        return {**(_dino(model) if method == "DINO" else _lejepa(model)), **_views(model, data["views"])}
    return _contrastive(model, data, trainer) if method == "CLIP" else _pretraining(method, model)


def _probe(model: dict[str, Any]) -> dict[str, Any]:
    """The rows of a linear probe; those of MAE have LARS, batch normalisation and the last block."""
    kind = model["optimizer"].get("class_path", "LARS").rpartition(".")[2].removeprefix("Head")
    options = model["optimizer"].get("init_args", model["optimizer"])
    read = {"mixer": "the mixers' outputs", "stream": "the stream"}[model.get("read", "stream")]
    (blocks,) = model["last_blocks"]
    return {
        "poolings": ", ".join(model["poolings"]),
        **({"blocks": f"last {blocks}", "read": read} if "normalisation" in model else {}),
        **({"normalisation": model["normalisation"]} if "normalisation" in model else {}),
        "optimizer": kind,
        "lr for 256 images": ", ".join(f"{rate:g}" for rate in model["learning_rates"]),
        "weight decay": options["weight_decay"],
        **({"betas": _pair(options["betas"])} if kind == "AdamW" else {"momentum": options["momentum"]}),
    }


def _dino(model: dict[str, Any]) -> dict[str, Any]:
    """The rows of DINO, with those of iBOT if patches are masked."""
    temperature = model["teacher_temperature"]
    masks = model.get("masks", {})
    warm = f"{temperature['start']:g} to {temperature['end']:g} in {temperature.get('epochs')} epochs"
    of_patches = {
        "weight of iBOT": model.get("ibot", 0),
        "masked from epoch": model.get("ibot_from_epoch", 0),
        "masked views": masks.get("fraction"),
        "masked patches": masks and _pair(masks["ratio"]),
        "smallest block": masks.get("min_block"),
    }
    return {
        "encoder": _encoder(model["encoder"]),
        "prototypes": model["num_prototypes"],
        "last layer": {"unit": "normalised", "scaled": "with a scale"}[model["last_layer"]],
        "frozen": f"{model['freeze_last_layer_epochs']} epoch",
        "teacher temperature": warm if temperature["end"] > temperature["start"] else temperature["start"],
        "teacher momentum": "{start:g} to {end:g}".format(**model["momentum"]),
        **(of_patches if masks else {}),
        "stochastic depth": model["encoder_args"]["drop_path_rate"],
    }


def _lejepa(model: dict[str, Any]) -> dict[str, Any]:
    widths = [*model["projector_hidden"], model["projector_dim"]]
    return {
        "encoder": _encoder(model["encoder"]),
        "projector": "-".join(str(width) for width in widths),
        "weight of SIGReg": model["sigreg_weight"],
        "slices": model["num_slices"],
        "stochastic depth": model["encoder_args"]["drop_path_rate"],
    }


def _encoder(name: str) -> str:
    """An encoder in words, for comparison with the published one."""
    if name in VARIANTS_2:
        return f"{VARIANTS_2[name]['depth']} Mamba-2 blocks, {VARIANTS_2[name]['embed_dim']} wide"
    if name not in VARIANTS:
        return {"vit_small_patch16_224": "12 attention blocks, 384 wide", "vmamba_tiny_s1l8": "VMamba-T"}[name]
    sizes = VARIANTS[name]
    registers = f", {sizes['num_registers']} registers" if "num_registers" in sizes else ""
    return f"{sizes['depth']} Mamba blocks, {sizes['embed_dim']} wide{registers}"


def _views(model: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Global and local views in words, and the colours of each group."""
    count, scales = {True: 0, False: 0}, {}
    for group in groups:
        local = group.get("local", False)
        count[local] += group.get("count", 1)
        scales[local] = f"{group.get('size', 224)} pixels, {group['crop_scale'][0]:g} to {group['crop_scale'][1]:g}"
    return {
        "global views": f"{count[False]} of {scales[False]}",
        "local views": f"{count[True]} of {scales[True]}",
        "jitter": _jitter_of(groups),
        "blur by group": " / ".join(f"{group['photometric'].get('blur_probability', 0):g}" for group in groups),
        "solarize by group": " / ".join(f"{group['photometric'].get('solarize_probability', 0):g}" for group in groups),
    }


def _jitter_of(groups: list[dict[str, Any]]) -> str:
    """The jitter and the grayscale, which all groups share."""
    (words,) = {
        " ".join(f"{group['photometric'][name]:g}" for name in ("brightness", "contrast", "saturation", "hue"))
        + f" at {group['photometric']['jitter_probability']:g}, "
        + f"grayscale at {group['photometric']['grayscale_probability']:g}"
        for group in groups
    }
    return words


def _contrastive(model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    (zero_shot,) = [one["init_args"] for one in trainer["callbacks"] if one["class_path"].endswith("ZeroShot")]
    text = {"kind": "transformer", "width": 512, "layers": 12, "context_length": 77, **model.get("text", {})}
    return {
        "loss": model.get("loss", "clip"),
        "text tower": f"{text['layers']} {text['kind']} blocks, {text['width']} wide",
        "text activation": "QuickGELU" if text.get("quick_gelu") else "SiLU" if text["kind"] == "mamba" else "GELU",
        "tokens": text["context_length"],
        "common space": model["embed_dim"],
        "stochastic depth": model.get("encoder_args", {}).get("drop_path_rate", 0),
        "flip": str(data["horizontal_flip"]).lower(),
        "colours": _colours(data.get("photometric")),
        "templates": {"openai": "80 (openai)", "simple": "7 (simple)"}[zero_shot["templates"]],
        "eval crop": data["eval_crop_ratio"],
    }


def _colours(policy: dict[str, float] | None) -> str:
    """A photometric policy in one line: the strengths of the jitter, then what happens with which probability."""
    if policy is None:
        return "none"
    jitter = " ".join(f"{policy[name]:g}" for name in ("brightness", "contrast", "saturation", "hue"))
    steps = ("grayscale", "blur", "solarize")
    chances = [f"{name} at {policy[f'{name}_probability']:g}" for name in steps]
    return ", ".join([f"jitter {jitter} at {policy['jitter_probability']:g}", *chances])


def _optimizer(model: dict[str, Any], batch: int) -> dict[str, Any]:
    optimizer, schedule = model["optimizer"], model["schedule"]
    peak = optimizer["lr_per_256"] * batch / 256
    return {
        "peak lr": peak,
        "first lr": peak * schedule.get("initial_fraction", 0) if schedule["warmup_epochs"] else peak,
        "last lr": peak * schedule.get("final_fraction", 0),
        "weight decay": _decay(optimizer),
        "decayed": optimizer.get("decay", "matrices"),
        "betas": _pair(optimizer["betas"]),
        "eps": optimizer.get("eps", 1e-8),
    }


def _decay(optimizer: dict[str, Any]) -> Any:
    """The weight decay, a number or the two ends of a ramp."""
    last = optimizer.get("final_weight_decay")
    return optimizer["weight_decay"] if last is None else f"{optimizer['weight_decay']:g} to {last:g}"


def _initial_values(model: dict[str, Any]) -> dict[str, Any]:
    if "init_from" in model or not model["encoder"].startswith("vim_"):
        return {}
    encoder_args = VARIANTS[model["encoder"]] | model.get("encoder_args", {})
    return {
        "backward delta bias": encoder_args.get("backward_dt_bias_init", "mamba"),
        "norm of the scan": str(encoder_args.get("scan_norm", False)).lower(),
    }


def _supervised(model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any]) -> dict[str, Any]:
    encoder_args = model.get("encoder_args", {})
    ema = [one["init_args"] for one in trainer.get("callbacks", []) if one["class_path"].endswith("EMA")]
    pool = encoder_args.get("global_pool")
    fine_tuned = {
        "pooling": f"{pool}, then a fresh norm" if pool else "the encoder's",
        "head init": model.get("head_init_std", "the encoder's"),
    }
    return {
        "layer decay": model.get("layer_decay", 1),
        "stochastic depth": encoder_args.get("drop_path_rate", 0),
        "mixup, cutmix": _pair([model["mixup"], model["cutmix"]]),
        "label smoothing": model["label_smoothing"],
        "auto augment": data["auto_augment"],
        "random erasing": data["random_erasing"],
        "repeats": data.get("repeats", 1),
        "EMA": ema[0]["decay"] if ema else "none",
        "reported weights": ema[0].get("report", "ema") if ema else "raw",
        "eval crop": data.get("eval_crop_ratio", 0.875),
        **(fine_tuned if "layer_decay" in model else {}),
    }


def _pretraining(method: str, model: dict[str, Any]) -> dict[str, Any]:
    kind = "cross-attention" if method == "ARM" else model.get("decoder", "vim")
    decoder = f"{model.get('decoder_depth', 2)} {kind} blocks, {model.get('decoder_embed_dim', 512)} wide"
    ratio = {} if method == "ARM" else {"mask ratio": model.get("mask_ratio", 0.6)}
    return {
        **ratio,
        "decoder": "linear" if method == "SimMIM" else decoder,
        "normalised targets": str(model.get("normalize_targets", method != "SimMIM")).lower(),
    }


def _dense(
    method: str, model: dict[str, Any], data: dict[str, Any], trainer: dict[str, Any], batch: int
) -> dict[str, Any]:
    """The rows of segmentation and detection, whose schedules count in steps."""
    optimizer, schedule = model["optimizer"], model["schedule"]["init_args"]
    peak = optimizer["lr_per_256"] * batch / 256
    steps = schedule.get("milestone_steps")
    marks = steps or schedule.get("milestone_epochs")
    start = "after the warm-up" if schedule.get("warmup_prefix", True) else "from step 0"
    return {
        **({"length": _length(trainer)} if method == "Detection" else {"steps": trainer["max_steps"]}),
        "batch": batch,
        "peak lr": peak,
        "first lr": peak * schedule["initial_fraction"],
        "last lr": peak * schedule["gamma"] ** len(marks) if marks else 0,
        "warm-up": f"{schedule['warmup_steps']} steps",
        "decay": f"x 0.1 after {'steps' if steps else 'epochs'} {', '.join(map(str, marks))}"
        if marks
        else f"linear, {start}",
        "weight decay": optimizer["weight_decay"],
        "decayed": optimizer.get("decay", "matrices"),
        "betas": _pair(optimizer["betas"]),
        "eps": optimizer.get("eps", 1e-8),
        "layer decay": model.get("layer_decay", 1),
        "stochastic depth": model["encoder_args"]["drop_path_rate"],
        **_initial_values({name: value for name, value in model.items() if name != "init_from"}),
        "taps": _taps(model),
        **(_detector(model, data) if method == "Detection" else _segmentation(model, data)),
        "clipping": trainer.get("gradient_clip_val", "none"),
        "precision": trainer["precision"],
    }


def _length(trainer: dict[str, Any]) -> str:
    return f"{trainer['max_epochs']} epochs" if "max_epochs" in trainer else f"{trainer['max_steps']} steps"


def _taps(model: dict[str, Any]) -> str:
    """The maps that the heads read, in words."""
    encoder, taps = model["encoder"], model.get("taps", {})
    if encoder.startswith(("vmamba", "swin", "mambaout")):
        norms = taps.get("norm", "none" if encoder.startswith("mambaout") else "fresh")
        return f"the last blocks of 4 stages, {norms} norms"
    depth = 12 if encoder.startswith("deit") else 24
    one = "neck" in model or model["head"]["class_path"].endswith("Segmenter")
    spaced = [-1] if one else range(depth // 4 - 1, depth, depth // 4)
    indices = [index % depth for index in taps.get("indices", spaced)]
    blocks = f"block{'s' * (len(indices) > 1)} {', '.join(str(index + 1) for index in indices)}"
    place = "the mixer of" if taps.get("read") == "mixer" else "the stream after"
    return f"{place} {blocks}, no norm{'s' * (len(indices) > 1)}"


def _segmentation(model: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    head, auxiliary, inference = model["head"], model.get("auxiliary"), model.get("inference", {})
    weights = "none"
    if auxiliary:
        weights = "convolutions, {channels} wide, on tap {}, weight {weight}".format(auxiliary["map"] + 1, **auxiliary)
    short = f"short side {data['eval_size'][0]}"
    name, args = head["class_path"].rpartition(".")[2], head["init_args"]
    return {
        "head": f"UPerNet, {args['channels']} wide" if name == "UPerNet" else f"{name}, {args['depth']} layers",
        "auxiliary head": weights,
        "batch norm of the heads": "over all GPUs",
        "loss divided by": f"{model['loss_mean']} pixels",
        "image size": f"{data['image_size']}, {data['image_size']}",
        "scale": "0.5, 2",
        "crop again above": 0.75,
        "colours": "mmsegmentation's, each at 0.5",
        "flip": "true",
        "test": f"windows of {inference['window'][0]}, stride {inference['stride'][0]}, {short}"
        if inference.get("slide")
        else f"whole, {short}",
    }


def _detector(model: dict[str, Any], data: dict[str, Any]) -> dict[str, Any]:
    detector = model["detector"]
    train, jitter = _jitter(data)
    short, longest = data["eval_size"]
    stages = "Cascade Mask R-CNN" if detector["name"] == "cascade_mask_rcnn" else "Mask R-CNN"
    convs = detector.get("proposals", {}).get("convs", 1)
    head = detector.get("box_head", {"convs": 0})
    layers = f"{head['convs']} convolutions with LayerNorm and 1 layer" if head["convs"] else "2 layers"
    kind = "class-agnostic" if detector.get("class_agnostic") else "per class"
    neck = {"fpn": "FPN", "simple_pyramid": "simple pyramid"}[model["neck"]["name"]]
    attention = {"deit": "all positions in all blocks", "vim_": "none"}.get(model["encoder"][:4])
    return {
        "detector": stages,
        "rules": model["match"],
        "neck": f"{neck}, {model['neck'].get('width', 256)} wide",
        "RPN": f"{convs} convolution{'s' * (convs > 1)}",
        "box head": f"{layers}, 1024 wide, {kind}",
        "mask heads": detector.get("mask_head", {}).get("heads", 1),
        "train images": train,
        "jitter": jitter,
        "flip": "true",
        "images without objects": {"keep": "background", "drop": "left out"}[data.get("empty", "keep")],
        "test images": f"long side {longest}" if short == longest else f"{short} x {longest}",
        "test padding": _padding(model.get("eval_pad_to")),
        **({"attention": attention} if attention else {}),
    }


def _padding(size: list[int] | None) -> str:
    """Padding of the test images of detection."""
    return f"to {size[0]} x {size[1]}" if size else "to multiples of 32"


def _jitter(data: dict[str, Any]) -> tuple[str, str]:
    """Size of the training images of detection, and its random changes."""
    settings = data["augmentation"]["init_args"]
    if "scale" in settings:
        least, most = settings["scale"]
        return f"{data['image_size']} x {data['image_size']}", f"scale {least:g} to {most:g}"
    shorts = settings["short_sides"]
    train = f"{max(shorts)} x {settings['longest']}"
    if len(shorts) == 1:
        return train, "none"
    share = {0: "", 0.5: ", half of the images from a crop"}[settings.get("crop_probability", 0)]
    return train, f"short side {min(shorts)} to {max(shorts)}{share}"


def _number(value: float) -> str:
    return f"{value:g}"


def _pair(values: list[float]) -> str:
    return ", ".join(f"{value:g}" for value in values)


def differences(stem: str, published: dict[str, Any]) -> dict[str, str]:
    """Settings of a recipe that differ from the published ones, with the published value."""
    ours = settings(stem)
    return {name: value for name, value in _words(published).items() if value not in (ours[name], None)}


def gaps(stem: str, published: dict[str, Any]) -> list[str]:
    """Settings that only one of a recipe and published_settings.yaml names: both name all, or nothing is compared."""
    return sorted(settings(stem).keys() ^ published.keys())


def _words(published: dict[str, Any]) -> dict[str, str | None]:
    """Published values as the tables spell them; None where the source says nothing."""
    return {
        name: str(value).lower()
        if isinstance(value, bool)
        else value
        if isinstance(value, str | None)
        else _number(value)
        for name, value in published.items()
    }


def render() -> str:
    """All tables, in Markdown; published values in brackets where ours differ."""
    content = yaml.safe_load(PUBLISHED.read_text())
    parts = []
    for title, names in GROUPS.items():
        stems = names.split()
        ours = {stem: settings(stem) for stem in stems}
        published = {stem: content["recipes"][stem] for stem in stems}
        differing = {stem: differences(stem, published[stem]) for stem in stems}
        rows = [f"| | {' | '.join(f'`{stem}`' for stem in stems)} |", "| --- |" + " --- |" * len(stems)]
        for name in dict.fromkeys(name for one in ours.values() for name in one):
            cells = []
            for stem in stems:
                bracket = f" **({differing[stem][name]})**" if name in differing[stem] else ""
                if name in published[stem] and published[stem][name] is None:
                    bracket = " °"
                cells.append(ours[stem].get(name, "") + bracket)
            rows.append(f"| {name} | {' | '.join(cells)} |")
        explained = dict.fromkeys(name for one in differing.values() for name in one)
        reasons = [f"- **{name}**: {content['why'][name]}." for name in explained]
        parts.append("\n".join([f"### {title}", "", *rows, *(["", "Why:", *reasons] if reasons else [])]))
    return "\n\n".join(parts)


def page_with(tables: str) -> str:
    """The page with its tables replaced."""
    before, _, rest = PAGE.read_text().partition(BEGIN)
    return f"{before}{BEGIN}\n{tables}\n{END}{rest.partition(END)[2]}"


if __name__ == "__main__":
    PAGE.write_text(page_with(render()))
