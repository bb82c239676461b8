"""Zero-shot accuracy and retrieval during a short real run of CLIP."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from captioned import COLOURS, TEMPLATES, Colours, captioned_shard, picture, tiny_clip
from forked_ranks import in_ranks
from lightning.pytorch import Trainer
from torchvision.io import write_png

from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.callbacks import EMA, ZeroShot
from ssmpretrain.callbacks.zero_shot import table
from ssmpretrain.datamodules import ImageShards, ImageTextShards
from ssmpretrain.evaluation.retrieval import recall
from ssmpretrain.objectives import CLIP, MAE, MAECLIP
from ssmpretrain.objectives.contrastive.named_classes import classifier
from ssmpretrain.objectives.restore import load_contrastive, load_objective
from ssmpretrain.run.metrics_logger import MetricsLogger
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine

TRAINING = {"optimizer": AdamW(lr_per_256=0.16, weight_decay=0.0), "schedule": Cosine(warmup_epochs=0)}


@pytest.fixture
def data(tmp_path: Path) -> Colours:
    train, val = captioned_shard(tmp_path / "train", 24), captioned_shard(tmp_path / "val", 20, start=100)
    return Colours(train, val, caption="json.captions", image_size=32, batch_size=8, num_workers=0)


def trainer(folder: Path, *callbacks: Any, epochs: int = 2, **settings: Any) -> Trainer:
    run = RunFolder(folder)
    run.prepare()
    return Trainer(
        accelerator="cpu", max_epochs=epochs, default_root_dir=folder, logger=MetricsLogger(run), log_every_n_steps=1,
        enable_model_summary=False, enable_progress_bar=False, callbacks=list(callbacks),
        **{"enable_checkpointing": False, "num_sanity_val_steps": 1, **settings},
    )  # fmt: skip


def logged(folder: Path, name: str) -> list[tuple[int, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(row["step"], row[name]) for row in rows if name in row]


def by_hand(model: CLIP, held_out: bool = False) -> float:
    """Accuracy of the 20 validation pictures, one by one."""
    model.eval()
    classes = classifier(model.encode_text, model.tokenizer, list(COLOURS), TEMPLATES)
    mean, std = (torch.tensor(numbers).view(3, 1, 1) for numbers in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    right = []
    for number in range(100, 120):
        if not held_out or number % 4 == 3:
            with torch.no_grad():
                image = model.encode_image(((picture(number) / 255 - mean) / std)[None])
            right.append(int((image @ classes).argmax()) == number % 4)
    model.train()
    return sum(right) / len(right)


def test_a_run_learns_colours_and_says_so_beside_chance_and_the_untrained_model(
    tmp_path: Path, data: Colours, capsys: pytest.CaptureFixture[str]
) -> None:
    model = tiny_clip(**TRAINING)
    untrained = by_hand(model)
    trainer(tmp_path / "run", ZeroShot(untrained=True), epochs=6).fit(model, data)
    found = logged(tmp_path / "run", "val/zeroshot_top1")
    assert [step for step, _ in found] == [0, *range(2, 18, 3)]
    assert found[0][1] == pytest.approx(untrained) and found[-1][1] == pytest.approx(by_hand(model))
    held_out = logged(tmp_path / "run", "val/zeroshot_held_out")
    assert held_out[-1][1] == pytest.approx(by_hand(model, held_out=True))
    assert logged(tmp_path / "run", "val/zeroshot_top5")[-1][1] == 1.0
    assert found[-1][1] > 0.5
    for name in ("i2t_r1", "i2t_r5", "i2t_r10", "t2i_r1", "t2i_r5", "t2i_r10"):
        assert len(logged(tmp_path / "run", f"val/{name}")) == 7
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["chance", "untrained", "trained"] in rows
    shown = [f"{100 * value:.1f}" for value in (untrained, found[-1][1])]
    assert ["zero-shot", "top-1,", "all", "classes", "25.0", "%", shown[0], "%", shown[1], "%"] in rows
    assert any(row[:5] == ["R@1,", "image", "to", "text", "5.0"] for row in rows)


def test_retrieval_in_validation_is_that_of_all_images_with_all_their_captions(tmp_path: Path, data: Colours) -> None:
    model = tiny_clip(**TRAINING)
    trainer(tmp_path / "run").fit(model, data)
    model.eval()
    with torch.no_grad():
        batches = list(data.val_dataloader())
        image = torch.cat([model.encode_image(batch["image"]) for batch in batches])
        text = torch.cat([model.encode_text(batch["tokens"]) for batch in batches])
    assert len(image) == 20 and len(text) == 40
    for name, value in recall(image, text, torch.arange(20).repeat_interleave(2)).items():
        assert logged(tmp_path / "run", f"val/{name}")[-1][1] == pytest.approx(value)


def test_other_images_are_prepared_as_those_of_the_run(tmp_path: Path, data: Colours) -> None:
    for number in range(100, 120):
        folder = tmp_path / "folder" / f"{number % 4}"
        folder.mkdir(parents=True, exist_ok=True)
        write_png(picture(number), str(folder / f"{number}.png"))
    model = tiny_clip(**TRAINING)
    others = ZeroShot(list(COLOURS), list(TEMPLATES), data=str(tmp_path / "folder"))
    trainer(tmp_path / "run", others).fit(model, data)
    assert logged(tmp_path / "run", "val/zeroshot_top1")[-1][1] == pytest.approx(by_hand(model))
    assert logged(tmp_path / "run", "val/zeroshot_held_out") == []


def test_the_weights_in_training_are_judged_also_where_a_run_has_an_average(tmp_path: Path, data: Colours) -> None:
    model = tiny_clip(**TRAINING)
    trainer(tmp_path / "run", ZeroShot(), EMA(0.9, "raw"), epochs=4).fit(model, data)  # leaves them in the model
    assert len(logged(tmp_path / "run", "val/i2t_r1_ema")) == 4
    assert logged(tmp_path / "run", "val/zeroshot_top1")[-1][1] == pytest.approx(by_hand(model))


def test_every_nth_validation_and_the_last_are_judged(tmp_path: Path, data: Colours) -> None:
    trainer(tmp_path / "run", ZeroShot(every_n_epochs=2), epochs=5).fit(tiny_clip(**TRAINING), data)
    assert [step for step, _ in logged(tmp_path / "run", "val/zeroshot_top1")] == [5, 11, 14]


def test_a_continued_run_remembers_what_the_untrained_model_got(
    tmp_path: Path, data: Colours, capsys: pytest.CaptureFixture[str]
) -> None:
    first = trainer(tmp_path / "run", ZeroShot(untrained=True), epochs=1)
    first.fit(tiny_clip(**TRAINING), data)
    first.save_checkpoint(tmp_path / "one.ckpt")
    before = capsys.readouterr().out
    again = trainer(tmp_path / "more", ZeroShot(untrained=True), epochs=2, num_sanity_val_steps=0)
    again.fit(tiny_clip(**TRAINING), data, ckpt_path=tmp_path / "one.ckpt", weights_only=True)
    assert len(logged(tmp_path / "more", "val/i2t_r5")) == 1  # nothing before the first step
    untrained_column = [line.split()[-4:-2] for line in before.splitlines() if "R@1" in line or "top-1" in line]
    after = capsys.readouterr().out
    assert untrained_column == [line.split()[-4:-2] for line in after.splitlines() if "R@1" in line or "top-1" in line]


def test_validation_before_the_first_step_changes_nothing_in_training(tmp_path: Path, data: Colours) -> None:
    weights = []
    for untrained in (False, True):
        model = tiny_clip(**TRAINING)
        trainer(tmp_path / f"run{untrained}", ZeroShot(untrained=untrained)).fit(model, data)
        weights.append(model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_images_without_labels_are_retrieved_and_not_classified(
    tmp_path: Path, data: Colours, caplog: pytest.LogCaptureFixture
) -> None:
    data.val = captioned_shard(tmp_path / "unlabelled", 12, labels=False)
    trainer(tmp_path / "run", ZeroShot()).fit(tiny_clip(**TRAINING), data)
    assert logged(tmp_path / "run", "val/zeroshot_top1") == [] and len(logged(tmp_path / "run", "val/t2i_r1")) == 2
    assert caplog.text.count("ZeroShot: no validation image has a label") == 1


def validated(data: Colours, world: int) -> dict[str, float]:
    """What one of several ranks logs of the validation of the same untrained model."""
    torch.set_num_threads(1)
    alone = Trainer(
        accelerator="cpu", devices=world, strategy="ddp" if world > 1 else "auto", logger=False,
        enable_progress_bar=False, enable_model_summary=False, callbacks=[ZeroShot()],
    )  # fmt: skip
    alone.validate(tiny_clip(), data, verbose=False)
    return {name: float(value) for name, value in alone.callback_metrics.items()}


def test_every_rank_logs_the_numbers_of_one_process_with_however_many_batches(data: Colours) -> None:
    data.batch_size = 6  # of 20 images: two batches, two and one on three ranks
    (alone,) = in_ranks(1, validated, data, 1)
    assert {"val/zeroshot_top1", "val/zeroshot_held_out", "val/i2t_r1", "val/t2i_r10"} < alone.keys()
    for world in (2, 3, 4):
        for one in in_ranks(world, validated, data, world):
            assert one.keys() == alone.keys()
            for name in alone.keys() - {"val/loss"}:  # which is of the pairs of a batch
                assert one[name] == alone[name], (world, name)


def test_mae_with_clip_is_judged_as_clip_is_and_comes_back_from_its_checkpoint(tmp_path: Path, data: Colours) -> None:
    model = tiny_clip(MAECLIP, decoder_embed_dim=32, decoder_num_heads=2, **TRAINING)
    run = trainer(tmp_path / "run", ZeroShot())
    run.fit(model, data)
    assert logged(tmp_path / "run", "val/zeroshot_top1")[-1][1] == pytest.approx(by_hand(model))
    losses = [logged(tmp_path / "run", f"val/{name}")[-1][1] for name in ("clip_loss", "mae_loss", "loss")]
    assert losses[0] + losses[1] == pytest.approx(losses[2]) and len(logged(tmp_path / "run", "val/i2t_r1")) == 2
    run.save_checkpoint(tmp_path / "last.ckpt")
    objective = load_objective(tmp_path / "last.ckpt").model  # which can reconstruct
    again = load_contrastive(tmp_path / "last.ckpt").model
    for name, value in model.state_dict().items():
        assert torch.equal(value, objective.state_dict()[name]) and torch.equal(value, again.state_dict()[name])


def test_an_objective_without_text_is_refused(tmp_path: Path, data: Colours) -> None:
    model = MAE("test_vim", {"img_size": 32}, decoder_embed_dim=32)
    with pytest.raises(ValueError, match=r"ZeroShot: classes are named to a text tower; MAE has none. Use CLIP"):
        trainer(tmp_path / "run", ZeroShot("a,b")).fit(model, data)


def test_data_that_names_no_classes_ask_for_names(tmp_path: Path, data: Colours) -> None:
    plain = ImageShards(data.train, data.val, image_size=32, batch_size=8, num_workers=0)
    with pytest.raises(ValueError, match=r"ImageShards names none. Set classes of the callback"):
        trainer(tmp_path / "run", ZeroShot()).fit(tiny_clip(), plain)


def test_the_list_beside_shards_names_their_classes(tmp_path: Path, data: Colours) -> None:
    (Path(str(data.val)).parent / "classes.json").write_text(json.dumps(list(COLOURS)))
    plain = ImageTextShards(data.train, data.val, image_size=32, batch_size=8, num_workers=0)
    callback = ZeroShot(templates="a {}")
    trainer(tmp_path / "run", callback).validate(tiny_clip(), plain)
    assert callback._classes.names == list(COLOURS)


def test_names_are_those_of_the_folders_in_any_order_or_refused_before_training(tmp_path: Path, data: Colours) -> None:
    for number, name in enumerate(COLOURS):
        (tmp_path / "folders" / name).mkdir(parents=True)
        write_png(picture(number), str(tmp_path / "folders" / name / "0.png"))
    callback = ZeroShot(classes="a,b", data=str(tmp_path / "folders"))
    with pytest.raises(ValueError, match=r"ZeroShot: .*got 2 names and 4 folders, such as blue, green, red\. Name all"):
        trainer(tmp_path / "run", callback).fit(tiny_clip(), data)
    callback = ZeroShot(classes="red,green,blue,white", data=str(tmp_path / "folders"))
    run = trainer(tmp_path / "run", callback)
    run.validate(tiny_clip(), data)
    assert callback._others.classes == ["red", "green", "blue", "white"]


def test_a_label_without_a_name_is_found_before_training(tmp_path: Path, data: Colours) -> None:
    model = tiny_clip()
    run = trainer(tmp_path / "run", ZeroShot(classes=["a", "b"]))
    with pytest.raises(ValueError, match="got 2 names and label 3"):
        run.fit(model, data)
    assert run.global_step == 0
    shard = captioned_shard(tmp_path / "others", 8)
    with pytest.raises(ValueError, match="got 2 names and label 3"):
        trainer(tmp_path / "run", ZeroShot(classes=["a", "b"], data=shard)).validate(model, data)


def test_a_label_without_a_name_is_an_error(tmp_path: Path, data: Colours) -> None:
    with pytest.raises(ValueError, match=r"ZeroShot: every label has a name; got 3 names and label 3. Name all"):
        trainer(tmp_path / "run", ZeroShot("red, green, blue", "a {}")).fit(tiny_clip(), data)


@pytest.mark.parametrize("settings", [{"every_n_epochs": 0}, {"data": "val"}])
def test_arguments_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"ZeroShot: (every_n_epochs is at least 1|images of its own need)"):
        ZeroShot(**settings)


def test_the_table_leaves_out_what_is_not_known() -> None:
    chance = {"val/i2t_r1": 0.05, "val/t2i_r1": 0.05}
    text = table({"chance": chance, "at the start": {}, "trained": {"val/i2t_r1": 0.5}})
    assert [line.split() for line in text.splitlines()[1:]] == [
        ["chance", "trained"], ["R@1,", "image", "to", "text", "5.0", "%", "50.0", "%"],
    ]  # fmt: skip
