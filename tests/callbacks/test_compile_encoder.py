"""Compiled blocks: the same training and checkpoints, and one message where they cannot be compiled."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

import ssmpretrain
from ssmpretrain.base.errors import UserError
from ssmpretrain.callbacks import CompileEncoder
from ssmpretrain.encoders.family_registry import family_of
from ssmpretrain.objectives import MAE
from ssmpretrain.training.optim.schedules import Cosine


class Losses(CompileEncoder):
    """The callback with a backend that only captures, and the losses of the steps."""

    def __init__(self) -> None:
        super().__init__("default", backend="eager")
        self.losses: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self.losses.append(float(outputs["loss"]))


class Uncompiled(Losses):
    def on_fit_start(self, *_: Any) -> None:
        pass


class Noise(LightningDataModule):
    """Batches of two images of noise."""

    image_size, batch_size, mean, std = 32, 2, (0.5,) * 3, (0.25,) * 3

    def train_dataloader(self) -> Any:
        noise = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(0))
        return DataLoader([{"image": one} for one in noise], batch_size=2)  # type: ignore[arg-type]


def mae(depth: int = 1) -> MAE:
    torch.manual_seed(0)
    sizes = {"decoder_embed_dim": 16, "decoder_depth": 1, "decoder_num_heads": 2}
    return MAE("test_vim", {"depth": depth, "img_size": 32}, schedule=Cosine(warmup_epochs=0), **sizes)  # type: ignore[arg-type]


def fit(callback: Losses, folder: Path, max_steps: int, ckpt_path: Path | None = None) -> dict[str, Tensor]:
    """Train an MAE on noise, and return its weights."""
    trainer = Trainer(
        accelerator="cpu", max_steps=max_steps, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, callbacks=[callback], default_root_dir=folder,
    )  # fmt: skip
    model = mae()
    torch.manual_seed(1 if ckpt_path is None else 2)
    trainer.fit(model, datamodule=Noise(), ckpt_path=ckpt_path, weights_only=True)
    trainer.save_checkpoint(folder / f"{type(callback).__name__}.ckpt")
    return model.state_dict()


@pytest.mark.slow
def test_training_and_checkpoints_are_those_of_a_run_without_it(tmp_path: Path) -> None:
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    compiled, plain = Losses(), Uncompiled()
    weights, others = fit(compiled, tmp_path, 2), fit(plain, tmp_path, 2)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > graphs
    assert compiled.losses == pytest.approx(plain.losses, rel=1e-6) and len(compiled.losses) == 2
    assert list(weights) == list(others)  # no name tells of the compiler
    for name, value in weights.items():
        assert torch.allclose(value, others[name], atol=1e-6), name
    ssmpretrain.load_encoder(tmp_path / "Losses.ckpt")
    # either continues the run of the other
    one, two = Losses(), Uncompiled()
    fit(one, tmp_path / "on", 3, tmp_path / "Uncompiled.ckpt")
    fit(two, tmp_path / "on", 3, tmp_path / "Losses.ckpt")
    assert one.losses == pytest.approx(two.losses, rel=1e-5) and len(one.losses) == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune"])
def test_cuda_graphs_need_a_gpu(mode: Any, tmp_path: Path) -> None:
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match=f"mode {mode} runs CUDA graphs and needs a CUDA GPU; got cpu"):
        CompileEncoder(mode).on_fit_start(trainer, mae())


def test_unknown_words_are_refused() -> None:
    with pytest.raises(UserError, match="mode is one of default, reduce-overhead"):
        CompileEncoder("fast")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"backend is one of .*inductor"):
        CompileEncoder("default", backend="nothing")
    with pytest.raises(UserError, match="mode reduce-overhead belongs to inductor; got backend 'eager'"):
        CompileEncoder(backend="eager")


@pytest.mark.parametrize(
    ("name", "args", "count"),
    [
        ("test_vim", {}, 4),
        ("test_arm", {}, None),
        ("test_vmamba", {}, None),
        ("test_vit", {}, None),
        ("test_vim", {"bidirectional": "layer"}, 0),
    ],
)
def test_the_blocks_are_those_that_a_forward_pass_calls(name: str, args: dict[str, Any], count: int | None) -> None:
    encoder = ssmpretrain.create_encoder(name, **args).eval()
    blocks = family_of(encoder).compilable_blocks(encoder)
    called: list[int] = []
    for number, block in enumerate(blocks):
        block.register_forward_hook(lambda *_, number=number: called.append(number))
    side = getattr(encoder.patch_embed, "img_size", (64, 64))
    encoder(torch.zeros(1, 3, *side))
    assert called == list(range(len(blocks))) and (count is None or len(blocks) == count)
    assert blocks or count == 0


def test_an_encoder_with_other_blocks_is_refused(tmp_path: Path) -> None:
    model = mae(depth=2)
    model.encoder = ssmpretrain.create_encoder("test_vim", bidirectional="layer")
    trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    with pytest.raises(UserError, match="got Vim, which has no such blocks"):
        CompileEncoder("default").on_fit_start(trainer, model)
