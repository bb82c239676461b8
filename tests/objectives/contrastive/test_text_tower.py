"""Sources of the weights of a text tower, and refused sources."""

import json
import logging
from pathlib import Path
from typing import Any

import open_clip
import pytest
import safetensors.torch
import torch
from clip_run import fit_one_step, tiny_clip
from torch import Tensor

from ssmpretrain.objectives.contrastive.open_clip_adapter import Tokenizer
from ssmpretrain.objectives.contrastive.open_clip_export import save_open_clip
from ssmpretrain.objectives.contrastive.text_tower import TextTower
from ssmpretrain.objectives.restore import load_contrastive

SIZES: dict[str, Any] = {"width": 32, "heads": 4, "layers": 2, "context_length": 16}
EMBED_DIM = 24


def build(source: Path | str, **changes: Any) -> Any:
    embed_dim = changes.pop("embed_dim", EMBED_DIM)
    tower = TextTower(**{**SIZES, "init_from": str(source), **changes})
    return tower.build(embed_dim, Tokenizer(tower.context_length))


def text_of(run: Path) -> dict[str, Tensor]:
    state = torch.load(run / "checkpoints/last.ckpt", weights_only=True)["state_dict"]
    return {key.removeprefix("text."): value for key, value in state.items() if key.startswith("text.")}


def assert_filled(tower: Any, state: dict[str, Tensor]) -> None:
    own = tower.state_dict()
    assert own.keys() == state.keys()
    assert all(torch.equal(tensor, state[key]) for key, tensor in own.items())


def clip_of_open_clip(custom_text: bool, **text: Any) -> Any:
    vision = {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32}
    cls = open_clip.CustomTextCLIP if custom_text else open_clip.CLIP
    torch.manual_seed(1)
    return cls(EMBED_DIM, vision, {"vocab_size": 49408, **SIZES, **text})


def test_a_text_tower_begins_with_that_of_a_run_or_of_its_export(
    siglip_run: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save_open_clip(load_contrastive(siglip_run), tmp_path / "open_clip")
    with caplog.at_level(logging.INFO):
        for source in (siglip_run, siglip_run / "checkpoints/last.ckpt", tmp_path / "open_clip"):
            assert_filled(build(source), text_of(siglip_run))
    assert caplog.text.count("29 of 29 tensors loaded") == 3


@pytest.mark.parametrize("custom_text", [True, False])
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", "_training.pt"])
def test_a_text_tower_begins_with_that_of_a_checkpoint_of_open_clip(
    tmp_path: Path, custom_text: bool, suffix: str
) -> None:
    model = clip_of_open_clip(custom_text)
    path = tmp_path / f"epoch_1{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        distributed = {f"module.{key}": value for key, value in model.state_dict().items()}
        training = {"epoch": 1, "name": "run", "state_dict": distributed, "optimizer": {"state": {}}}
        torch.save(training if "training" in suffix else model.state_dict(), path)
    tokens, _ = Tokenizer(16)(["a cat", ""])
    with torch.no_grad():
        assert torch.equal(build(path).eval()(tokens), model.eval().encode_text(tokens))


def test_openais_activation_is_an_option_of_the_transformer() -> None:
    tower = TextTower(**SIZES, quick_gelu=True).build(EMBED_DIM, Tokenizer(16))
    assert {type(block.mlp.gelu).__name__ for block in tower.transformer.resblocks} == {"QuickGELU"}
    with pytest.raises(ValueError, match="quick_gelu is the activation of a transformer; got kind mamba"):
        TextTower(kind="mamba", quick_gelu=True)


def test_a_mamba_tower_begins_with_that_of_a_run_whatever_the_length_of_its_captions(tmp_path: Path) -> None:
    run = fit_one_step(tmp_path, tiny_clip(text={"kind": "mamba"}))
    assert_filled(build(run, kind="mamba", context_length=32), text_of(run))
    with pytest.raises(ValueError, match=r"has kind mamba for transformer\. Set model\.text\.kind=mamba"):
        build(run)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"width": 64}, "has width 32 for 64. Set model.text.width=32"),
        ({"layers": 3}, "has layers 2 for 3. Set model.text.layers=2"),
        ({"context_length": 77}, "has context_length 16 for 77. Set model.text.context_length=16"),
        ({"heads": 2}, "has heads 4 for 2. Set model.text.heads=4"),
        ({"embed_dim": 32}, "has embed_dim 24 for 32. Set model.embed_dim=24"),
        ({"kind": "mamba"}, "has kind transformer for mamba. Set model.text.kind=transformer"),
    ],
)
def test_another_tower_is_refused_by_what_differs(
    siglip_run: Path, tmp_path: Path, changes: dict[str, Any], words: str
) -> None:
    save_open_clip(load_contrastive(siglip_run), tmp_path / "open_clip")
    for source in (siglip_run, tmp_path / "open_clip"):
        with pytest.raises(ValueError) as refused:
            build(source, **changes)
        assert words in str(refused.value)


def test_a_tower_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    state = clip_of_open_clip(True).state_dict()
    del state["text.ln_final.bias"]
    state["text.odd"] = state["logit_scale"]
    state["text.ln_final.weight"] = torch.ones(31)
    torch.save(state, tmp_path / "part.pt")
    with pytest.raises(ValueError) as refused:
        build(tmp_path / "part.pt")
    assert "1 missing: ln_final.bias; 1 left over: odd; 1 of another shape: ln_final.weight" in str(refused.value)


def test_a_file_without_a_text_tower_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"encoder.x": torch.ones(1)}}, tmp_path / "mae.ckpt")
    with pytest.raises(ValueError, match=r"has none\. Give a run of CLIP"):
        build(tmp_path / "mae.ckpt")
    with pytest.raises(ValueError, match="no such file"):
        build(tmp_path / "none.ckpt")


def test_a_folder_that_says_that_its_tower_computes_something_else_is_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file(clip_of_open_clip(True).state_dict(), tmp_path / "open_clip_model.safetensors")
    for config, words in (
        ({"quick_gelu": True, "text_cfg": SIZES}, "has quick_gelu True for False. Set model.text.quick_gelu=True"),
        ({"text_cfg": {**SIZES, "no_causal_mask": True, "pool_type": "last"}}, "no_causal_mask True, pool_type last"),
    ):
        (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
        with pytest.raises(ValueError, match=words):
            build(tmp_path)


def test_a_file_that_would_run_code_is_refused(tmp_path: Path) -> None:
    torch.save({"state_dict": {"text.x": torch.ones(1)}, "args": Path}, tmp_path / "bad.pt")
    with pytest.raises(ValueError, match="refused"):
        build(tmp_path / "bad.pt")


def test_a_locked_tower_has_no_gradient_and_is_in_evaluation_mode(siglip_run: Path) -> None:
    tower = build(siglip_run, locked=True)
    assert not tower.training and not any(parameter.requires_grad for parameter in tower.parameters())
    tokens, _ = Tokenizer(16)(["a cat"])
    assert not tower(tokens).requires_grad
    model = tiny_clip(text={"locked": True, "init_from": str(siglip_run)})
    optimizer = model.build_optimizer(8)
    trained = {name for group in optimizer.param_groups for name in group["param_names"]}
    assert trained and not any(name.startswith("text.") for name in trained)


def test_a_run_that_lost_the_source_of_its_text_tower_is_restored_from_its_own_checkpoint(
    siglip_run: Path, tmp_path: Path
) -> None:
    source = tmp_path / "text.ckpt"
    source.write_bytes((siglip_run / "checkpoints/last.ckpt").read_bytes())
    run = fit_one_step(tmp_path / "run", tiny_clip(text={"init_from": str(source), "locked": True}))
    source.unlink()
    assert_filled(load_contrastive(run).model.text, text_of(siglip_run))
