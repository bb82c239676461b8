"""FSDP2 computes the same as one process, and any number of ranks can continue its checkpoints, also under DDP."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import report_of
from torch import nn

import ssmpretrain
from ssmpretrain.encoders.weights.content import part_of, read_content
from ssmpretrain.encoders.weights.on_disk import part_path, parts_in
from ssmpretrain.objectives import MAE, SimMIM
from ssmpretrain.training.checkpoints.files import write_checkpoint
from ssmpretrain.training.checkpoints.folder import inspect, read_state
from ssmpretrain.training.ranks.fsdp import blocks_of

ROUNDING = 2e-6  # float32: a sum over eight images in another order


@pytest.fixture(scope="module")
def compared() -> dict[str, Any]:
    return report_of("ranks_job.py", "fsdp")


@pytest.fixture(scope="module")
def more() -> dict[str, Any]:
    return report_of("ranks_job.py", "fsdp_more")


def equal(result: dict[str, Any]) -> bool:
    return max(result["gradients"], result["losses"], result["weights"]) < ROUNDING and result["parameters equal"]


def test_gradients_clipping_layer_decay_and_average_are_those_of_a_single_process(compared: dict[str, Any]) -> None:
    assert equal(compared["uninterrupted"])


def test_a_nan_in_one_image_or_in_the_rows_of_one_rank_is_skipped_by_all(compared: dict[str, Any]) -> None:
    assert compared["NaNs"]["skipped"] == [2, 2] and equal(compared["NaNs"])


def test_ranks_with_different_numbers_of_validation_batches_give_the_numbers_of_one(compared: dict[str, Any]) -> None:
    *ranks, alone = compared["uninterrupted"]["metrics"]
    for one in ranks:
        for kind in ("", "_ema"):
            assert one[f"val/loss{kind}"] == pytest.approx(alone[f"val/loss{kind}"], rel=1e-6)
            assert one[f"val/top1{kind}"] == alone[f"val/top1{kind}"]
        assert one["val/loss"] != one["val/loss_ema"]


@pytest.mark.parametrize("ranks", ["the same on 2", "fsdp2 on 4", "ddp on 2", "auto on 1"])
def test_a_checkpoint_in_parts_goes_on_with_any_ranks(ranks: str, compared: dict[str, Any]) -> None:
    assert compared[ranks]["weights"] < (1e-12 if ranks == "the same on 2" else ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("ranks", ["fsdp2 on 2", "fsdp2 on 4", "ddp on 2", "auto on 1"])
def test_a_checkpoint_in_one_file_goes_on_with_any_ranks(ranks: str, more: dict[str, Any]) -> None:
    assert more[ranks]["weights"] < (1e-12 if ranks == "fsdp2 on 2" else ROUNDING)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["MAE of VMamba", "SimMIM", "Finetune", "ARM", "DINO", "iBOT"])
def test_every_objective_trains_as_a_single_process_does(name: str, more: dict[str, Any]) -> None:
    assert equal(more[name])


# What is sharded


def test_the_blocks_of_encoder_and_decoder_are_sharded_and_nothing_within_or_around_them() -> None:
    def kinds(module: nn.Module) -> list[str]:
        return [type(block).__name__ for block in blocks_of(module)]

    assert kinds(MAE("test_vim", decoder_embed_dim=32, decoder_depth=1)) == ["VimBlock"] * 5
    assert kinds(SimMIM("test_vmamba")) == ["VMambaBlock"] * 5
    assert kinds(MAE("test_vim", {"bidirectional": "layer"}, decoder_embed_dim=32, decoder_depth=1)) == ["VimBlock"]


# Parts


@pytest.fixture
def parts(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    """A checkpoint of three parts, and what it holds; one tensor has fewer rows than there are ranks."""
    encoder = {f"encoder.{name}": value for name, value in ssmpretrain.create_encoder("test_vim").state_dict().items()}
    about = {"encoder": {"name": "test_vim", "args": {}}, "loops": {}, "global_step": 3, "lists": [(1, 2), "a"]}
    whole = {"state_dict": {**encoder, "short": torch.arange(2.0)}, **about}
    sharded = {id(value) for value in whole["state_dict"].values() if value.ndim}
    for rank in range(3):

        def rows(value: Any, rank: int = rank) -> torch.Tensor | None:
            if id(value) not in sharded:
                return None
            chunks = value.chunk(3)
            return chunks[rank].clone() if rank < len(chunks) else value[:0].clone()

        write_checkpoint(part_of(whole, rank, rows), part_path(tmp_path / "step-000000003.ckpt", rank, 3))
    return tmp_path / "step-000000003.ckpt", whole


def test_parts_are_read_as_the_whole(parts: tuple[Path, dict[str, Any]]) -> None:
    folder, whole = parts
    read = read_content(folder)
    assert read.keys() == whole.keys() and read["lists"] == whole["lists"]
    assert all(torch.equal(read["state_dict"][name], value) for name, value in whole["state_dict"].items())
    assert read_state(folder)["global_step"] == 3 and inspect(folder).damage is None


def test_an_encoder_is_loaded_from_parts(parts: tuple[Path, dict[str, Any]]) -> None:
    folder, whole = parts
    loaded = ssmpretrain.load_encoder(folder).state_dict()
    assert all(torch.equal(whole["state_dict"][f"encoder.{name}"], value) for name, value in loaded.items())


def test_a_part_that_is_gone_or_damaged_is_named(parts: tuple[Path, dict[str, Any]]) -> None:
    folder, _ = parts
    second = parts_in(folder)[1]
    content = second.read_bytes()
    second.write_bytes(content[:-100])
    assert "part-00001-of-00003.ckpt: short" in str(inspect(folder).damage)
    second.unlink()
    assert "lacks 1 of 3 parts, first part-00001-of-00003.ckpt" in str(inspect(folder).damage)
    with pytest.raises(ValueError, match="lacks 1 of 3 parts"):
        read_content(folder)
