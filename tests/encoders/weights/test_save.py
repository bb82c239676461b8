import json
import os
import re
import resource
import stat
from pathlib import Path

import pytest
import safetensors
import timm
import torch

import ssmpretrain
from ssmpretrain.encoders.vmamba.blocks import LayerNorm
from ssmpretrain.encoders.vmamba.vmamba import VARIANTS as VMAMBA_VARIANTS
from ssmpretrain.encoders.weights.formats import FORMATS

SMALL = {"embed_dim": 8, "depths": (1, 2)}
SWIN = {"img_size": 64, "depths": (1, 1), "embed_dim": 16, "num_heads": (1, 2), "window_size": 4}
SUFFIXES = {"safetensors": ".safetensors", "timm": "", "official": ".pth", "torch_export": ".pt2", "onnx": ".onnx"}


def encoder(name: str, **options) -> torch.nn.Module:
    torch.manual_seed(0)
    model = ssmpretrain.create_encoder(name, **options)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.normal_()  # no two alike, so that none can be taken for another
    return model


def official_file(path: Path, model: torch.nn.Module, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    state = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    torch.save({"model": state, "epoch": 299}, path)
    return state


def assert_same_bytes(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert list(one) == list(other)
    for name, tensor in one.items():
        assert (tensor.dtype, tensor.shape) == (other[name].dtype, other[name].shape), name
        assert torch.equal(tensor.reshape(-1).view(torch.uint8), other[name].reshape(-1).view(torch.uint8)), name


def pass_on(source: Path, folder: Path, formats=("safetensors", "timm", "official"), **options) -> Path:
    """Export a file to one format after another, each from the last."""
    for step, format in enumerate(formats):
        model = ssmpretrain.load_encoder(source, keep_dtypes=True, **(options if step == 0 else {}))
        source = ssmpretrain.save_encoder(model, folder / f"{step}{SUFFIXES[format]}", format).path
    return source


# There and back


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("test_vim", {"num_classes": 5}),
        ("test_vim", {"num_classes": 0, "img_size": 64, "patch_size": 8, "class_token": "double", "in_chans": 1}),
        ("test_vim", {"bidirectional": "ssm", "stride": 8, "expand": 1.5, "d_conv": 3, "d_state": 3}),
        ("test_vim", {"bidirectional": "none", "class_token": "none", "embed_dim": 24, "depth": 3}),
        ("test_vmamba", {"num_classes": 5}),
        ("test_vmamba", VMAMBA_VARIANTS["vmamba_tiny_v0"] | SMALL),
        ("test_vmamba", VMAMBA_VARIANTS["vmamba_tiny_s2l5"] | SMALL | {"num_classes": 0}),
        ("test_vmamba", {"embed_dim": (8, 24), "depths": (1, 1), "dt_rank": 3, "mlp_ratio": 2.5, "in_chans": 1}),
        ("vim_tiny_patch16_224", {}),
    ],
)
def test_a_published_file_comes_back_from_every_format_bit_for_bit(tmp_path, name, options):
    state = official_file(tmp_path / "published.pth", encoder(name, **options))
    told = {"depths": options["depths"]} if "depths" in options else {}
    back = torch.load(pass_on(tmp_path / "published.pth", tmp_path, **told), weights_only=True)
    assert_same_bytes(state, back["model"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("name", ["test_vim", "test_vmamba"])
def test_a_file_in_another_dtype_keeps_it(tmp_path, name, dtype):
    state = official_file(tmp_path / "published.pth", encoder(name), dtype)
    assert {tensor.dtype for tensor in ssmpretrain.load_encoder(tmp_path / "published.pth").parameters()} == {
        torch.float32
    }
    back = torch.load(pass_on(tmp_path / "published.pth", tmp_path), weights_only=True)
    assert_same_bytes(state, back["model"])


def test_the_oldest_vmamba_names_and_shapes_come_out_as_the_newest(tmp_path):
    state = encoder("test_vmamba", **VMAMBA_VARIANTS["vmamba_tiny_v0"] | SMALL).state_dict()
    oldest = {}
    for name, tensor in state.items():
        old = name.replace("patch_embed.0.", "patch_embed.proj.").replace("patch_embed.2.", "patch_embed.norm.")
        old = re.sub(
            r"(blocks\.\d+)\.norm\.", r"\1.ln_1.", old.replace("classifier.", "").replace(".op.", ".self_attention.")
        )
        oldest[old] = tensor[:, :, None, None] if re.search(r"(in|out)_proj\.weight$", name) else tensor
    assert oldest.keys().isdisjoint(key for key in state if ".op." in key or "classifier" in key)
    torch.save({"model": oldest}, tmp_path / "oldest.pth")
    back = torch.load(pass_on(tmp_path / "oldest.pth", tmp_path, depths=SMALL["depths"]), weights_only=True)
    assert_same_bytes(state, back["model"])


@pytest.mark.parametrize("num_classes", [0, 7])
@pytest.mark.parametrize(
    ("name", "args"),
    [("test_mambaout", {}), ("test_vit", {}), ("test_convnext", {}), ("swin_tiny_patch4_window7_224", SWIN)],
)
def test_timms_encoders_come_back_from_safetensors_and_timm(tmp_path, name, args, num_classes):
    model = encoder(name, num_classes=num_classes, **args)
    saved = ssmpretrain.save_encoder(model, tmp_path / "one.safetensors")
    back = ssmpretrain.load_encoder(pass_on(saved.path, tmp_path, ["timm", "safetensors"]))
    assert back.num_classes == num_classes
    assert_same_bytes(model.state_dict(), back.state_dict())


# What comes back is the encoder, not only its tensors


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("test_vim", {"num_classes": 0, "img_size": (64, 32), "class_token": "head", "bidirectional": "layer"}),
        ("test_vim", {"num_classes": 5, "in_chans": 1, "global_pool": "avg", "divide_output": False}),
        ("test_vmamba", {"num_classes": 0, "scan": ("h", "w7_flip"), "global_pool": "max"}),
        ("test_mambaout", {"num_classes": 5}),
    ],
)
def test_arguments_that_leave_no_trace_in_the_tensors_survive(tmp_path, name, args):
    model = encoder(name, **args).eval()
    ssmpretrain.save_encoder(model, tmp_path / "folder", "timm")
    ssmpretrain.save_encoder(model, tmp_path / "file.safetensors")
    images = torch.randn(1, args.get("in_chans", 3), 64, 32)
    for back in (
        timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True),
        ssmpretrain.load_encoder(tmp_path / "folder"),
        ssmpretrain.load_encoder(tmp_path / "file.safetensors"),
    ):
        assert torch.equal(back.eval()(images), model(images))


def test_timm_makes_another_head_on_request(tmp_path):
    model = encoder("test_vmamba", num_classes=5)
    ssmpretrain.save_encoder(model, tmp_path / "folder", "timm")
    back = timm.create_model(f"local-dir:{tmp_path / 'folder'}", pretrained=True, num_classes=3)
    assert back.get_classifier().weight.shape == (3, 128)
    assert torch.equal(back.patch_embed[0].weight, model.patch_embed[0].weight)
    ssmpretrain.save_encoder(back, tmp_path / "again", "timm")
    assert ssmpretrain.load_encoder(tmp_path / "again").num_classes == 3


def test_the_image_size_is_that_of_the_encoder_now(tmp_path):
    model = encoder("test_vim", img_size=64)
    model.set_input_size((96, 32))
    ssmpretrain.save_encoder(model, tmp_path / "folder", "timm")
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["pretrained_cfg"]["input_size"] == [3, 96, 32]
    assert ssmpretrain.load_encoder(tmp_path / "folder").patch_embed.img_size == (96, 32)


def test_what_belongs_to_a_training_is_not_written(tmp_path):
    ssmpretrain.save_encoder(encoder("test_vim", drop_path_rate=0.5, drop_rate=0.5), tmp_path / "a.safetensors")
    with safetensors.safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        args = json.loads(file.metadata()["ssmpretrain"])["encoder"]["args"]
    assert "drop_path_rate" not in args
    assert "drop_rate" not in args


# What the official code is told


def test_a_file_without_a_head_says_how_the_official_code_reads_it(tmp_path):
    for name, flag in {"test_vim": "--finetune", "test_vmamba": "--pretrained"}.items():
        saved = ssmpretrain.save_encoder(encoder(name, num_classes=0), tmp_path / f"{name}.pth", "official")
        assert "strict=False" in saved.read_with
        assert (
            f"no head in it, so the official model keeps an untrained one; its main.py reads it with {flag}"
            in saved.note
        )
        with_head = ssmpretrain.save_encoder(encoder(name), tmp_path / f"{name}_head.pth", "official")
        assert "strict" not in with_head.read_with
        assert with_head.note == ""


@pytest.mark.parametrize(
    ("name", "args", "reason"),
    [
        ("test_mambaout", {}, "test_mambaout: it reads only Vim, VMamba"),
        ("test_vim", {"global_pool": "avg"}, "class tokens whose head reads global_pool='avg' instead"),
        ("test_vim", {"scan_norm": True}, "a Vim with a norm of the scan"),
        ("test_vmamba", {"scan": ("h", "v_flip")}, r"scan=\('h', 'v_flip'\); its scans are cross, "),
        ("test_vmamba", {"d_conv": 1}, "d_conv=1, for which it makes no convolution"),
        ("test_vmamba", {"global_pool": "max"}, "head reads global_pool='max'; it averages"),
    ],
)
def test_what_the_official_code_cannot_represent_is_refused(tmp_path, name, args, reason):
    with pytest.raises(ValueError, match=rf"the official code cannot read .*{reason}.*Write safetensors or timm\."):
        ssmpretrain.save_encoder(encoder(name, **args), tmp_path / "a.pth", "official")
    assert list(tmp_path.iterdir()) == []
    ssmpretrain.save_encoder(encoder(name, **args), tmp_path / "a.safetensors")  # as the message says


def test_pooling_is_of_no_concern_to_the_official_code_without_a_head(tmp_path):
    ssmpretrain.save_encoder(encoder("test_vim", num_classes=0, global_pool="avg"), tmp_path / "vim.pth", "official")
    ssmpretrain.save_encoder(encoder("test_vmamba", num_classes=0, global_pool=""), tmp_path / "v.pth", "official")


# Refusals


def test_an_encoder_that_a_file_cannot_describe_is_refused(tmp_path):
    for name, format in (("a.safetensors", "safetensors"), ("a", "timm"), ("a.pth", "official")):
        model = encoder("test_vmamba", norm_layer=LayerNorm)
        with pytest.raises(
            ValueError,
            match=r"JSON values, because the file stores them; got norm_layer=<class .*Build the encoder without",
        ):
            ssmpretrain.save_encoder(model, tmp_path / name, format)
        changed = encoder("test_vim")
        del changed.layers[3]
        with pytest.raises(
            ValueError, match=r"test_vim was changed after it was built with .*layers.3.mixer.A_b_log first"
        ):
            ssmpretrain.save_encoder(changed, tmp_path / name, format)
        with pytest.raises(ValueError, match=r"got a Linear without one\. Build it with create_encoder"):
            ssmpretrain.save_encoder(torch.nn.Linear(1, 1), tmp_path / name, format)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_nothing_is_overwritten(tmp_path, format):
    path = tmp_path / f"taken{SUFFIXES[format]}"
    for make in (path.touch, path.mkdir, lambda: path.symlink_to("nowhere")):
        make()
        with pytest.raises(ValueError, match=r"taken.* exists, and nothing is overwritten"):
            ssmpretrain.save_encoder(encoder("test_vim"), path, format)
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize(
    ("name", "format", "message"),
    [
        ("a.pth", "safetensors", r"ends in .safetensors; got .*a.pth. Call it .*/a.safetensors, or"),
        ("vim_v1.5", "official", r"ends in .pth; got .*vim_v1.5. Call it .*/vim_v1.5.pth, or"),
        ("a.safetensors", "timm", r"format timm is a folder; got .*Call it .*/a, or choose another format"),
        ("a.pt", "torch_export", r"ends in .pt2; got .*/a.pt. Call it .*/a.pt2, or"),
        ("a", "zip", "format is one of safetensors, timm, official, torch_export, onnx; got 'zip'"),
    ],
)
def test_a_name_of_another_format_is_refused_with_the_right_one(tmp_path, name, format, message):
    with pytest.raises(ValueError, match=message):
        ssmpretrain.save_encoder(encoder("test_vim"), tmp_path / name, format)


def test_a_missing_folder_is_made_and_what_is_in_it_may_be_shared(tmp_path):
    path = tmp_path / "not" / "yet" / "a.safetensors"
    before = os.umask(0o022)
    try:
        ssmpretrain.save_encoder(encoder("test_vim"), path)
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    with pytest.raises(OSError, match=r"File exists|Not a directory"):
        ssmpretrain.save_encoder(encoder("test_vim"), path / "below_a_file.safetensors")


TRACED = ("onnx", "torch_export")


@pytest.mark.parametrize(
    "format", [pytest.param(one, marks=[pytest.mark.slow] if one in TRACED else []) for one in FORMATS]
)
def test_a_write_that_fails_leaves_nothing_and_says_why(tmp_path, format):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))  # stands for a full disk
    try:
        with pytest.raises(
            ValueError,
            match=r"out.* could not be written: File too large\. Check the free space and the permissions of",
        ):
            ssmpretrain.save_encoder(encoder("test_vim", depth=1), tmp_path / f"out{SUFFIXES[format]}", format)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


def test_a_timm_folder_leaves_the_number_of_classes_to_transformers_wrapper(tmp_path):
    model = encoder("test_vim", num_classes=3, img_size=64)
    folder = ssmpretrain.save_encoder(model, tmp_path / "out", "timm").path
    config = json.loads((folder / "config.json").read_text())
    assert config["num_classes"] == config["pretrained_cfg"]["num_classes"] == 3
    assert "num_classes" not in config["model_args"]  # AutoModel passes it beside these
    rebuilt = timm.create_model(f"local-dir:{folder}", pretrained=True)
    assert_same_bytes(dict(rebuilt.state_dict()), dict(model.state_dict()))
