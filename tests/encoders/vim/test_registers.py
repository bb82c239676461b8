"""Vim with registers, as published by Mamba-Reg (wangf3014/Mamba-Reg, models_mamba.py and utils.py)."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain import create_encoder, load_encoder, save_encoder
from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders import family_of
from ssmpretrain.encoders.features.encoded import encode
from ssmpretrain.encoders.features.taps import TappedEncoder, Taps
from ssmpretrain.encoders.sequence.class_token import class_positions, insert_class_tokens, remove_class_tokens
from ssmpretrain.encoders.vim.family import FAMILY

REGISTERS: dict[str, Any] = {"class_token": "registers", "num_registers": 3}
# Width, blocks, registers and reduction of the published sizes, and millions of parameters in table 2 of the paper.
PUBLISHED = {
    "vim_small_patch16_reg12_224": (384, 24, 12, 2, 28),
    "vim_base_patch16_reg12_224": (768, 24, 12, 4, 99),
    "vim_large_patch16_reg16_224": (1024, 48, 16, 8, 341),
}


def built(**args: Any) -> Any:
    torch.manual_seed(0)
    return create_encoder("test_vim", **{"img_size": 64, "num_classes": 5, **REGISTERS, **args}).eval()


def published_order(num_patches: int, num_registers: int) -> list[int]:
    """Order in which the published code puts patches, 0 to M - 1, and registers, M to M + n - 1."""
    between = num_patches // (num_registers + 1)
    order: list[int] = []
    for register in range(num_registers):
        order += [*range(register * between, (register + 1) * between), num_patches + register]
    return [*order, *range(num_registers * between, num_patches)]


def published_state(width: int, depth: int, registers: int, reduction: int, classes: int) -> dict[str, Tensor]:
    """Tensors with the names and shapes of a published file, all views of one number."""
    inner, rank, state = 2 * width, -(-width // 16), 16
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, registers, width),
        "pos_embed_cls": (1, registers, width),
        "pos_embed": (1, 196, width),
        "patch_embed.proj.weight": (width, 3, 16, 16),
        "patch_embed.proj.bias": (width,),
        "neck.weight": (width // reduction, width),
        "norm_neck.weight": (registers * width // reduction,),
        "head.weight": (classes, registers * width // reduction),
        "head.bias": (classes,),
        "norm_f.weight": (width,),
    }
    for block in range(depth):
        at = f"layers.{block}."
        shapes |= {
            f"{at}norm.weight": (width,),
            f"{at}mixer.in_proj.weight": (2 * inner, width),
            f"{at}mixer.out_proj.weight": (width, inner),
        }
        for suffix in ("", "_b"):
            shapes |= {
                f"{at}mixer.A{suffix}_log": (inner, state),
                f"{at}mixer.D{suffix}": (inner,),
                f"{at}mixer.conv1d{suffix}.weight": (inner, 1, 4),
                f"{at}mixer.conv1d{suffix}.bias": (inner,),
                f"{at}mixer.x_proj{suffix}.weight": (rank + 2 * state, inner),
                f"{at}mixer.dt_proj{suffix}.weight": (inner, rank),
                f"{at}mixer.dt_proj{suffix}.bias": (inner,),
            }
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def test_positions_are_those_of_the_published_code() -> None:
    assert class_positions("registers", 196, 12) == tuple(range(15, 192, 16))
    assert class_positions("registers", 36, 12) == tuple(range(2, 36, 3))
    for num_registers in (1, 2, 12, 16):
        for num_patches in (num_registers + 1, 36, 49, 197, 784):
            order = published_order(num_patches, num_registers)
            places = tuple(order.index(num_patches + register) for register in range(num_registers))
            assert class_positions("registers", num_patches, num_registers) == places
            patches = torch.arange(num_patches).view(1, -1, 1)
            tokens = torch.arange(num_patches, num_patches + num_registers).view(1, -1, 1)
            sequence = insert_class_tokens(patches, tokens, "registers")
            assert sequence.flatten().tolist() == order
            assert all(
                torch.equal(part, own)
                for part, own in zip(
                    remove_class_tokens(sequence, "registers", num_registers), (patches, tokens), strict=True
                )
            )


def test_registers_come_first_when_there_are_too_few_patches() -> None:
    assert class_positions("registers", 2, 3) == (0, 1, 2)
    assert built()(torch.randn(1, 3, 16, 16)).shape == (1, 5)


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_file_is_recognised_and_has_the_published_number_of_parameters(name: str) -> None:
    width, depth, registers, reduction, millions = PUBLISHED[name]
    state = published_state(width, depth, registers, reduction, 1000)
    assert FAMILY.looks_like(state)
    found = FAMILY.recognise(state)
    assert found is not None
    assert FAMILY.variant_name(found) == name
    with torch.device("meta"):
        encoder = create_encoder(name, global_pool="concat")
    assert {key: tensor.shape for key, tensor in encoder.state_dict().items()} == {
        key: tensor.shape for key, tensor in state.items()
    }
    assert round(sum(tensor.numel() for tensor in state.values()) / 1e6) == millions


def test_a_file_with_the_published_names_gives_the_published_answer(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in published_state(48, 2, 12, 2, 5).items()}
    torch.save({"model": state}, tmp_path / "mambar.pth")
    encoder = load_encoder(tmp_path / "mambar.pth").eval()
    report = encoder.load_report
    assert (report.loaded, report.fresh, report.unexpected) == (len(state), (), ())
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        x = F.conv2d(images, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], stride=16)
        x = x.flatten(2).transpose(1, 2) + state["pos_embed"]
        registers = (state["cls_token"] + state["pos_embed_cls"]).expand(2, -1, -1)
        order = published_order(196, 12)
        x = torch.cat([x, registers], dim=1)[:, order]
        for block in encoder.layers:
            x = block(x)
        x = encoder.norm_f(x)[:, [order.index(196 + register) for register in range(12)]]
        x = (x @ state["neck.weight"].T).flatten(1)
        x = x * (x.square().mean(dim=1, keepdim=True) + 1e-5).rsqrt() * state["norm_neck.weight"]
        torch.testing.assert_close(encoder(images), x @ state["head.weight"].T + state["head.bias"])


def test_the_tiny_size_reads_its_registers_as_they_are() -> None:
    state = published_state(192, 24, 12, 1, 1000)
    state = {name: value for name, value in state.items() if not name.startswith(("neck.", "norm_neck."))}
    found = FAMILY.recognise(state)
    assert found is not None
    assert (found["global_pool"], found["register_reduction"]) == ("concat", 1)
    with torch.device("meta"):
        encoder = create_encoder("vim_tiny_patch16_reg12_224", global_pool="concat")
    assert {key: value.shape for key, value in encoder.state_dict().items()} == {
        key: value.shape for key, value in state.items()
    }


def test_a_published_file_becomes_an_encoder_that_reads_the_mean_of_the_registers(tmp_path: Path) -> None:
    torch.manual_seed(0)
    state = {name: 0.1 * torch.randn(tensor.shape) for name, tensor in published_state(48, 2, 12, 2, 5).items()}
    torch.save({"model": state}, tmp_path / "mambar.pth")
    encoder = load_encoder(tmp_path / "mambar.pth", num_classes=0, global_pool="token", img_size=96).eval()
    assert encoder.load_report.resized == ("pos_embed",)
    images = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        tokens = encoder.forward_features(images)[:, list(range(2, 36, 3))]
        torch.testing.assert_close(encoder(images), tokens.mean(dim=1))
        torch.testing.assert_close(encode(encoder, images).vector, tokens.mean(dim=1))


def test_dino_mambas_file_is_refused_by_name() -> None:
    state = {"layers.0.mixer.dt_bias": torch.zeros(8), "layers.0.mixer.A_log": torch.zeros(8)}
    with pytest.raises(UserError, match=r"x.pth is not a Vim of this package: layers.0.mixer.dt_bias means Mamba-2"):
        FAMILY.match(Path("x.pth"), state, None, {})


@pytest.mark.parametrize(("pool", "width"), [("token", 32), ("concat", 48), ("avg", 32)])
def test_every_pooling_trains_every_parameter_it_reads(pool: str, width: int) -> None:
    encoder = built(global_pool=pool, register_reduction=2).train()
    images = torch.randn(2, 3, 64, 64)
    assert encoder.head_hidden_size == width == encoder.head.in_features
    encoder(images).sum().backward()
    assert [name for name, value in encoder.named_parameters() if value.grad is None] == []
    with torch.no_grad():
        assert encoder.forward_head(encoder.forward_features(images), pre_logits=True).shape == (2, width)


def test_the_head_changes_with_its_pooling() -> None:
    encoder = built(register_reduction=2)
    plain = {*encoder.state_dict()}
    encoder.reset_classifier(7, "concat")
    assert {*encoder.state_dict()} - plain == {"neck.weight", "norm_neck.weight"}
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 7)
    encoder.reset_classifier(0)
    assert encoder(torch.randn(1, 3, 64, 64)).shape == (1, 48)
    encoder.reset_classifier(5, "token")
    assert {*encoder.state_dict()} == plain


def test_visible_patches_with_all_of_them_kept_are_the_whole() -> None:
    encoder, images = built(num_classes=0), torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        whole = FAMILY.forward_visible(encoder, images, torch.arange(16).expand(2, -1))
        torch.testing.assert_close(whole, encoder.forward_features(images))
        few = FAMILY.forward_visible(encoder, images, torch.tensor([[1, 5, 6, 7, 11, 12, 13, 15]] * 2))
        vector, patches = FAMILY.class_and_patches(encoder, few)
        assert patches.shape == (2, 8, 32)
        torch.testing.assert_close(vector, few[:, [2, 5, 8]].mean(dim=1))  # 8 // (3 + 1) = 2 patches before each


def test_intermediates_hold_the_patches_and_the_registers_of_the_last_block() -> None:
    encoder, images = built(num_classes=0), torch.randn(2, 3, 64, 96)
    with torch.no_grad():
        final, maps = encoder.forward_intermediates(images, indices=1, norm=True, return_prefix_tokens=True)
        patches, registers = remove_class_tokens(final, "registers", 3)
        assert torch.equal(maps[0][0].flatten(2).transpose(1, 2), patches)
        assert torch.equal(maps[0][1], registers)
        assert torch.equal(encode(encoder, images).vector, registers.mean(dim=1))


def test_dense_tasks_keep_the_registers_unless_told_otherwise() -> None:
    assert TappedEncoder(built(num_classes=0)).class_token
    assert not TappedEncoder(built(num_classes=0), Taps(class_token=False)).class_token
    assert not TappedEncoder(built(num_classes=0, class_token="middle", num_registers=0)).class_token


def test_another_image_size_resizes_the_patches_and_keeps_the_registers() -> None:
    encoder, images = built(num_classes=0), torch.randn(1, 3, 96, 32)
    with torch.no_grad():
        before, registers = encoder(images), encoder.pos_embed_cls.clone()
        encoder.set_input_size((96, 32))
        torch.testing.assert_close(encoder(images), before)
    assert encoder.pos_embed.shape == (1, 12, 32)
    assert torch.equal(encoder.pos_embed_cls, registers)


def test_fixed_positions_are_zero_at_the_registers() -> None:
    encoder = built(pos_embed="sincos")
    assert not encoder.pos_embed_cls.any()
    assert not encoder.pos_embed_cls.requires_grad
    assert encoder.pos_embed.shape == (1, 16, 32)
    learned = built()
    FAMILY.fix_positions(learned)
    assert torch.equal(learned.pos_embed, encoder.pos_embed)
    assert not learned.pos_embed_cls.any()


def test_saved_and_loaded_it_is_the_same(tmp_path: Path) -> None:
    encoder, images = built(global_pool="concat", register_reduction=2), torch.randn(1, 3, 64, 64)
    save_encoder(encoder, tmp_path / "encoder.safetensors")
    with torch.no_grad():
        assert torch.equal(load_encoder(tmp_path / "encoder.safetensors").eval()(images), encoder(images))
    finer = load_encoder(tmp_path / "encoder.safetensors", img_size=96)
    assert finer.pos_embed.shape == (1, 36, 32)
    assert torch.equal(finer.pos_embed_cls, encoder.pos_embed_cls)
    with pytest.raises(UserError, match=r"a Vim with registers, which is wangf3014/Mamba-Reg's"):
        save_encoder(encoder, tmp_path / "encoder.pth", "official")


def test_a_pretrained_encoder_gets_the_published_head_fresh(tmp_path: Path) -> None:
    save_encoder(built(num_classes=0), tmp_path / "encoder.safetensors")
    tuned = load_encoder(tmp_path / "encoder.safetensors", num_classes=7, global_pool="concat", register_reduction=2)
    assert {*tuned.load_report.fresh} == {"neck.weight", "norm_neck.weight", "head.weight", "head.bias"}
    assert tuned.head.in_features == 48


def test_registers_and_their_positions_get_no_weight_decay_and_the_first_learning_rate() -> None:
    encoder = built()
    assert {"cls_token", "pos_embed", "pos_embed_cls"} <= encoder.no_weight_decay()
    stem = encoder.group_matcher()["stem"]
    assert all(re.search(stem, name) for name in ("cls_token", "pos_embed", "pos_embed_cls"))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"num_registers": 0}, "num_registers is at least 1; got 0. Mamba-Reg uses 12."),
        (
            {"class_token": "middle"},
            "num_registers belongs to class_token='registers'; got 3",
        ),
        ({"register_reduction": 5}, "register_reduction divides embed_dim, 32; got 5."),
        (
            {"class_token": "middle", "num_registers": 0, "global_pool": "concat"},
            "'concat' reads registers",
        ),
        ({"num_registers": 20_000}, "num_registers is at most 16,384; got 20,000"),
    ],
)
def test_a_bad_argument_is_named(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        built(**args)


def test_a_name_without_registers_builds_the_file_that_has_them(tmp_path: Path) -> None:
    save_encoder(built(num_classes=0), tmp_path / "encoder.safetensors")
    assert family_of(load_encoder(tmp_path / "encoder.safetensors", name="test_vim")) is FAMILY
