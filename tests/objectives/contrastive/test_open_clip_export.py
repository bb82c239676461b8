"""Exported runs in plain open_clip."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import safetensors.torch
import timm
import torch
from clip_run import tiny_clip
from PIL import Image

import ssmpretrain
from ssmpretrain.cli import main
from ssmpretrain.objectives import CLIP
from ssmpretrain.objectives.contrastive import open_clip_export as export
from ssmpretrain.objectives.contrastive import text_weights
from ssmpretrain.objectives.restore import Restored, load_contrastive

ROOT = Path(ssmpretrain.__file__).parents[1]
TEXTS = ["a photo of a cat", "", "两只狗 🐕", "more words than the context has places for " * 3]


def save(model: CLIP, folder: Path, size: tuple[int, int], **images: Any) -> Path:
    """A checkpoint of a model that was trained with images of a size."""
    images = {
        "size": list(size),
        "mean": [0.5] * 3,
        "std": [0.3] * 3,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
    } | images
    checkpoint = {"state_dict": model.state_dict(), "hyper_parameters": dict(model.hparams), "images": images}
    model.on_save_checkpoint(checkpoint)
    torch.save(checkpoint, folder / "last.ckpt")
    return folder / "last.ckpt"


@torch.no_grad()
def assert_equal_embeddings(run: Restored[Any], folder: Path) -> None:
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    model.eval()
    images = torch.randn(3, 3, *run.images["size"], generator=torch.Generator().manual_seed(5))
    tokens = open_clip.get_tokenizer(f"local-dir:{folder}")(TEXTS)
    assert torch.equal(tokens, run.model.tokenizer(TEXTS)[0])
    torch.testing.assert_close(model.encode_image(images, normalize=True), run.model.encode_image(images))
    torch.testing.assert_close(model.encode_text(tokens, normalize=True), run.model.encode_text(tokens))
    assert torch.equal(model.logit_scale.reshape(1), run.model.logit_scale)
    assert (model.logit_bias is None) == (run.model.logit_bias is None)


@pytest.mark.parametrize(
    ("encoder", "args", "size", "loss", "word"),
    [
        ("test_vim", {}, (224, 224), "clip", "test_vim"),
        (
            "test_vim",
            {
                "patch_size": 8,
                "img_size": [64, 48],
                "class_token": "head",
                "pos_embed": "sincos",
                "drop_path_rate": 0.1,
            },
            (64, 48),
            "siglip",
            "ssmpretrain_encoder.name=test_vim&img_size=[64,48]&patch_size=8&class_token=%22head%22&pos_embed=%22sincos%22",
        ),
        (
            "test_vim",
            {"bidirectional": "layer", "img_size": [32, 32]},
            (32, 32),
            "clip",
            "ssmpretrain_encoder.name=test_vim&img_size=[32,32]&bidirectional=%22layer%22",
        ),
        ("test_arm", {"img_size": [64, 64]}, (64, 64), "clip", "ssmpretrain_encoder.name=test_arm&img_size=[64,64]"),
        ("test_vmamba", {}, (64, 96), "siglip", "test_vmamba"),
        ("test_vit", {}, (160, 160), "clip", "test_vit"),
        (
            "test_vit",
            {"img_size": [96, 96], "global_pool": "avg"},
            (96, 96),
            "clip",
            "ssmpretrain_encoder.name=test_vit&img_size=[96,96]&global_pool=%22avg%22",
        ),
        ("test_mambaout", {}, (96, 96), "siglip", "test_mambaout"),  # its features are wider than what it pools
        ("test_convnext", {}, (96, 96), "clip", "test_convnext"),
        ("test_efficientnet", {}, (96, 96), "clip", "test_efficientnet"),
    ],
)
def test_open_clip_gives_the_embeddings_of_the_run(
    tmp_path: Path, encoder: str, args: dict[str, Any], size: tuple[int, int], loss: Any, word: str
) -> None:
    model = tiny_clip(encoder=encoder, encoder_args=args, loss=loss)
    with torch.no_grad():
        model.logit_scale.fill_(3.21)
    run = load_contrastive(save(model, tmp_path, size))
    report = export.save_open_clip(run, tmp_path / "out")
    assert report.difference is not None and report.difference < 1e-6
    config = json.loads((tmp_path / "out/open_clip_config.json").read_text())["model_cfg"]
    assert config["vision_cfg"]["timm_model_name"] == word
    assert_equal_embeddings(run, tmp_path / "out")


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:`torch.jit.*` is deprecated:DeprecationWarning")
def test_open_clips_model_around_an_encoder_can_be_traced(grad: bool) -> None:
    vision = {"timm_model_name": "test_vim", "timm_pool": "", "timm_proj": "linear", "image_size": 32}
    text = {"context_length": 8, "vocab_size": 20, "width": 16, "heads": 2, "layers": 1}
    model = open_clip.CustomTextCLIP(8, vision, text).eval()  # what a folder of save_open_clip is loaded as
    images, tokens = torch.randn(2, 3, 32, 32), torch.randint(0, 20, (2, 8))
    with torch.set_grad_enabled(grad):
        traced = torch.jit.trace(model, (images, tokens))
    torch.testing.assert_close(traced(2 * images, tokens.flip(1)), model(2 * images, tokens.flip(1)))


def test_the_activation_of_the_text_tower_goes_with_it(tmp_path: Path) -> None:
    run = load_contrastive(save(tiny_clip(text={"quick_gelu": True}), tmp_path, (224, 224)))
    export.save_open_clip(run, tmp_path / "open_clip")  # compares the embeddings of texts
    model, _, _ = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'open_clip'}")
    assert isinstance(model.text.transformer.resblocks[0].mlp.gelu, open_clip.transformer.QuickGELU)


def test_plain_open_clip_reads_what_the_command_writes(siglip_run: Path, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "out"
    assert main(["export", str(siglip_run), str(out), "--format", "open_clip"]) == 0
    loaded, wrote, read = capsys.readouterr().out.splitlines()
    assert loaded == f"loaded CLIP, epoch 1, step 1, unaveraged weights from {siglip_run / 'checkpoints/last.ckpt'}"
    assert wrote.startswith(f"wrote test_vim to {out} (open_clip): 105 tensors") and "middle 90.0% of a side" in read
    line = read.removeprefix("read it with  ").split("  (")[0]
    code = (
        f"import ssmpretrain, open_clip, torch\nmodel, _, preprocess = {line}\n"
        f"tokenizer = open_clip.get_tokenizer('local-dir:{out}')\nmodel.eval()\n"
        "images = torch.linspace(-1, 1, 2 * 3 * 32 * 48).reshape(2, 3, 32, 48)\n"
        "with torch.no_grad():\n"
        f"    tokens, found = tokenizer({TEXTS!r}), [model.encode_image(images, normalize=True)]\n"
        "    found.append(model.encode_text(tokens, normalize=True))\n"
        f"torch.save([*found, model.logit_scale.data, model.logit_bias.data], {str(tmp_path / 'found.pt')!r})\n"
        "print(preprocess.transforms[-1], preprocess.transforms[1].size)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "Normalize(mean=[0.4, 0.5, 0.6], std=[0.2, 0.25, 0.3]) (32, 48)"
    image, text, scale, bias = torch.load(tmp_path / "found.pt", weights_only=True)
    model = load_contrastive(siglip_run).model
    with torch.no_grad():
        images = torch.linspace(-1, 1, 2 * 3 * 32 * 48).reshape(2, 3, 32, 48)
        torch.testing.assert_close(image, model.encode_image(images))
        torch.testing.assert_close(text, model.encode_text(model.tokenizer(TEXTS)[0]))
    assert scale == model.logit_scale and bias == model.logit_bias


def test_open_clip_prepares_an_image_as_the_run_does(tmp_path: Path) -> None:
    from ssmpretrain.datamodules.decoding.transform import ImageTransform

    model = tiny_clip(encoder_args={"patch_size": 8, "img_size": [40, 40]})
    path = save(model, tmp_path, (40, 40), interpolation="bilinear")
    export.save_open_clip(load_contrastive(path), tmp_path / "out")
    _, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{tmp_path / 'out'}")
    pixels = np.random.default_rng(0).integers(0, 256, (90, 60, 3), dtype=np.uint8)
    ours = ImageTransform((40, 40), None, False, 1.0, "bilinear")(torch.from_numpy(pixels).permute(2, 0, 1), seed=0)
    theirs = preprocess(Image.fromarray(pixels)) * 0.3 + 0.5
    assert (theirs * 255 - ours).abs().max() <= 2  # two libraries that round


def test_the_image_tower_alone_is_exported_with_its_images(siglip_run: Path, tmp_path: Path, capsys: Any) -> None:
    run = load_contrastive(siglip_run)
    export.save_open_clip(run, tmp_path / "open_clip")
    written = run.model.encoder.state_dict()
    for source, out, flags in (
        (siglip_run, tmp_path / "clip.safetensors", []),
        (tmp_path / "open_clip", tmp_path / "again.safetensors", []),
        (siglip_run, tmp_path / "timm", ["--format", "timm"]),
    ):
        assert main(["export", str(source), str(out), *flags]) == 0
        encoder = ssmpretrain.load_encoder(out)
        assert "sha256 verified" in str(encoder.load_report)
        assert all(torch.equal(tensor, written[key]) for key, tensor in encoder.state_dict().items())
        assert encoder.load_report.origin["objective"] == "CLIP"
        config = timm.data.resolve_model_data_config(encoder)
        assert config["mean"] == (0.4, 0.5, 0.6) and config["input_size"] == (3, 32, 48)


def test_the_average_or_the_weights_in_training_are_written(siglip_run: Path, tmp_path: Path) -> None:
    content = torch.load(siglip_run / "checkpoints/last.ckpt", weights_only=True)
    content["current_model_state"] = {key: value + 1 for key, value in content["state_dict"].items()}
    torch.save(content, tmp_path / "last.ckpt")
    for ema, kind, offset in ((None, "ema", 0), (True, "ema", 0), (False, "raw", 1)):
        run = load_contrastive(tmp_path / "last.ckpt", ema)
        assert run.origin["weights"] == kind
        assert torch.equal(run.model.logit_scale.data, content["state_dict"]["logit_scale"] + offset)


@pytest.mark.parametrize("kind", ["mamba", "embed"])
def test_what_open_clip_cannot_hold_is_refused_and_nothing_is_left(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    model = tiny_clip(text={"kind": "mamba"} if kind == "mamba" else {})
    run = load_contrastive(save(model, tmp_path, (224, 224)))
    words = "open_clip's text tower is a Transformer; got text.kind mamba. Write the image tower alone"
    if kind == "embed":
        words = "open_clip cannot build this model"
        monkeypatch.setattr(export, "as_timm_name", lambda name, args: "test_vim.no_such_tag")
    with pytest.raises(ValueError, match=words):
        export.save_open_clip(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt"]


def test_a_folder_that_computes_something_else_is_not_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_clip(encoder_args={"patch_size": 8, "img_size": [32, 32], "class_token": "head"})
    run = load_contrastive(save(model, tmp_path, (32, 32)))
    state = export._state
    for part in ("visual.head.proj.weight", "text.token_embedding.weight", "logit_scale"):
        monkeypatch.setattr(export, "_state", lambda model, part=part: {**(old := state(model)), part: old[part].cos()})
        with pytest.raises(ValueError, match="computes other results than"):
            export.save_open_clip(run, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt"]


def test_what_is_there_stays_and_what_is_no_run_of_clip_is_refused(
    siglip_run: Path, tmp_path: Path, capsys: Any
) -> None:
    def refused(*words: str) -> str:
        assert main(["export", *words, "--format", "open_clip"]) == 2
        return str(capsys.readouterr().err)

    assert "nothing is overwritten" in refused(str(siglip_run), str(tmp_path))
    assert f"Call it {tmp_path / 'clip'}," in refused(str(siglip_run), str(tmp_path / "clip.safetensors"))
    assert "--image-size is for torch_export and onnx" in refused(
        str(siglip_run), str(tmp_path / "x"), "--image-size", "64"
    )
    torch.save({"objective": "MAE", "state_dict": {"encoder.x": torch.ones(1)}}, tmp_path / "mae.ckpt")
    assert "is one of MAE. Give the folder of a run of CLIP" in refused(str(tmp_path / "mae.ckpt"), str(tmp_path / "x"))
    assert main(["export", str(siglip_run), str(tmp_path / "vim.safetensors")]) == 0
    assert "is none of a run" in refused(str(tmp_path / "vim.safetensors"), str(tmp_path / "x"))


def test_weights_that_are_no_numbers_are_neither_written_nor_read(siglip_run: Path, tmp_path: Path) -> None:
    run = load_contrastive(siglip_run)
    export.save_open_clip(run, tmp_path / "good")
    torch.nn.init.constant_(run.model.text.text_projection, float("nan"))
    with pytest.raises(ValueError, match=r"values of text\.text_projection are NaN or infinite\. Nothing was written"):
        export.save_open_clip(run, tmp_path / "bad")
    assert not (tmp_path / "bad").exists()
    weights = tmp_path / "good" / export.WEIGHTS
    tensors = safetensors.torch.load_file(weights)
    tensors["text.text_projection"][0] = float("inf")
    safetensors.torch.save_file(tensors, weights)
    with pytest.raises(ValueError, match=r"values of text\.text_projection are NaN or infinite"):
        export.load_open_clip(tmp_path / "good")
    with pytest.raises(ValueError, match=r"TextTower: .* values of text_projection are NaN or infinite"):
        text_weights.fill_text_tower(run.model.text, tmp_path / "good", {})
    spoiled = torch.load(siglip_run / "checkpoints/last.ckpt", weights_only=True)
    spoiled["state_dict"]["logit_scale"].fill_(float("nan"))
    torch.save(spoiled, tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match="1 of 1 values of logit_scale are NaN or infinite"):
        load_contrastive(tmp_path / "last.ckpt")
    with pytest.raises(ValueError, match=r"CLIP: .* 1 of 1 values of logit_scale are NaN or infinite"):
        run.model.contrastive.fill_from_run(tmp_path / "last.ckpt")
