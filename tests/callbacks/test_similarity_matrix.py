"""The picture of a contrastive run."""

import warnings
from pathlib import Path

import pytest
import torch
from captioned import Colours, captioned_shard, tiny_clip
from lightning.pytorch import Trainer
from PIL import Image

from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.callbacks import SimilarityMatrix
from ssmpretrain.callbacks.similarity_matrix import draw_similarities, first_pairs
from ssmpretrain.datamodules.decoding.augmentation import IMAGENET_MEAN, IMAGENET_STD
from ssmpretrain.objectives import CLIP, MAE


def validate(folder: Path, callback: SimilarityMatrix) -> CLIP:
    shard = captioned_shard(folder / "shards")
    data = Colours(shard, shard, caption="json.captions", batch_size=8, image_size=32, num_workers=0)
    trainer = Trainer(
        accelerator="cpu", default_root_dir=folder, logger=False, callbacks=[callback], enable_model_summary=False,
        enable_progress_bar=False, enable_checkpointing=False,
    )  # fmt: skip
    model = tiny_clip()
    trainer.validate(model, data, verbose=False)
    return model


def test_a_validation_draws_images_and_their_captions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = []

    def draw(pictures: torch.Tensor, captions: list[str], alike: torch.Tensor) -> object:
        drawn.append((pictures, captions, alike))
        return draw_similarities(pictures, captions, alike)

    monkeypatch.setattr("ssmpretrain.callbacks.similarity_matrix.draw_similarities", draw)
    model = validate(tmp_path, SimilarityMatrix(5))
    ((pictures, captions, alike),) = drawn
    names = ("red", "green", "blue", "white", "red")
    assert captions == [f"a {name} square number {number}" for number, name in enumerate(names)]
    assert pictures.shape == (5, 3, 32, 32) and pictures.min() >= 0 and pictures.max() <= 1
    assert pictures[2].mean(dim=(1, 2)).argmax() == 2  # "blue"
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in (IMAGENET_MEAN, IMAGENET_STD))
    with torch.no_grad():
        images = model.encode_image((pictures - mean) / std)
        texts = model.encode_text(model.tokenizer(captions)[0])
    torch.testing.assert_close(alike, texts @ images.T, atol=1e-4, rtol=0)  # row: caption
    assert not torch.allclose(alike, alike.T, atol=1e-2)
    width, height = Image.open(RunFolder(tmp_path).similarity).size
    assert width > 900 and height > 500


def test_pairs_are_the_first_captioned_images_and_their_first_captions() -> None:
    batch = {"image": torch.zeros(4, 3, 8, 8), "text": list("abcde"), "owner": torch.tensor([0, 0, 2, 2, 3])}
    images, captions = first_pairs(batch, 2)
    assert (images.tolist(), captions.tolist()) == ([0, 2], [0, 2])
    del batch["owner"]  # another data module's
    assert first_pairs(batch, 3)[1].tolist() == [0, 1, 2]


def test_rows_are_captions_and_columns_are_images() -> None:
    alike = torch.tensor([[0.9, 0.1], [-0.2, 0.3]])
    figure = draw_similarities(torch.rand(2, 3, 8, 8), ["first", "second"], alike)
    numbers = {text.get_position(): text.get_text() for text in figure.axes[-1].texts}
    assert numbers == {(0, 0): "0.90", (1, 0): "0.10", (0, 1): "-0.20", (1, 1): "0.30"}
    first, second = figure.texts
    assert (first.get_text(), second.get_text()) == ("first", "second")
    assert first.get_position()[1] > second.get_position()[1]


@pytest.mark.parametrize("caption", ["a $\\frac{$ b", "word " * 2000, "x" * 10_000, "一只红色的圆" * 30, "👍🏽 ok"])
def test_any_caption_is_drawn_in_two_lines_at_most(caption: str, tmp_path: Path) -> None:
    figure = draw_similarities(torch.rand(2, 3, 8, 8), [caption, "a circle"], torch.eye(2))
    assert figure.texts[0].get_text().count("\n") <= 1
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        figure.savefig(tmp_path / "drawn.png")
        figure.canvas.draw()
    left = figure.texts[0].get_window_extent().x0
    assert left >= 0


def test_a_model_without_text_is_refused() -> None:
    with pytest.raises(ValueError, match="MAE has no text tower"):
        SimilarityMatrix().setup(Trainer(logger=False, accelerator="cpu"), MAE("test_vim", {"img_size": 32}), "fit")
    with pytest.raises(ValueError, match="num_images is at least 2; got 1"):
        SimilarityMatrix(1)
