"""Differences between two configurations of a run."""

from typing import Any

import yaml
from lightning.pytorch import Callback, LightningModule

from ssmpretrain.run.options.recipe_parser import RecipeParser
from ssmpretrain.run.start.config_diff import changes, with_defaults
from ssmpretrain.run.start.observers import observers, package_and_class


def test_observers_may_change_and_what_takes_part_may_not() -> None:
    def config(*callbacks: Any) -> dict[str, Any]:
        return {"trainer": {"callbacks": [{"class_path": name, "init_args": args} for name, args in callbacks]}}

    ema, look = "ssmpretrain.callbacks.EMA", "ssmpretrain.callbacks.OnlineEvaluation"
    known = observers([])
    assert (
        changes(
            config((ema, {"decay": 0.9})), config((look, {}), (ema, {"decay": 0.9})), same_batch=True, observers=known
        )
        == []
    )
    assert changes(config((ema, {"decay": 0.9})), config((ema, {"decay": 0.8})), same_batch=True, observers=known) == [
        "trainer.callbacks.EMA.decay: 0.9 -> 0.8"
    ]
    assert changes(config((ema, {"decay": 0.9})), config(), same_batch=True, observers=known) == [
        "trainer.callbacks.EMA: {'decay': 0.9} -> (not there)"
    ]
    start = [{"model": {"init_args": {"text": {"init_from": path}}}} for path in ("a", "b")]
    assert changes(*start, same_batch=True, observers=known) == [
        "model.init_args.text.init_from: a -> b (no effect: only the start of a run reads it)"
    ]


def test_a_callback_says_itself_that_it_only_observes() -> None:
    class Looks(Callback):
        observes_only = True

    class Meddles(Callback):
        pass

    known = observers([Looks(), Meddles()])
    assert package_and_class(f"{__name__}.Looks") in known and package_and_class(f"{__name__}.Meddles") not in known
    ours = {f"ssmpretrain.{name}" for name in ("SampleLog", "ZeroShot", "Throughput")}
    assert {*ours, "lightning.ModelCheckpoint"} <= known and "ssmpretrain.EMA" not in known


def test_a_callback_of_the_user_is_not_taken_for_one_of_the_same_name() -> None:
    config = {"trainer": {"callbacks": [{"class_path": "mine.callbacks.Timer"}]}}
    changed = changes(config, {"trainer": {}}, same_batch=True, observers=observers([]))
    assert changed == ["trainer.callbacks.Timer: {} -> (not there)"]
    for path in ("lightning.pytorch.callbacks.Timer", "pytorch_lightning.callbacks.timer.Timer"):
        config = {"trainer": {"callbacks": [{"class_path": path}]}}
        assert changes(config, {"trainer": {}}, same_batch=True, observers=observers([])) == []


POLY = {"class_path": "ssmpretrain.training.optim.Poly", "init_args": {"power": 0.9}}


def parsed(schedule: dict[str, Any] | None) -> tuple[RecipeParser, dict[str, Any]]:
    parser = RecipeParser()
    parser.add_lightning_class_args(LightningModule, "model", subclass_mode=True)
    arguments = {"encoder": "test_vim"} | ({} if schedule is None else {"schedule": schedule})
    config = parser.parse_object({"model": {"class_path": "ssmpretrain.objectives.MAE", "init_args": arguments}})
    return parser, yaml.safe_load(parser.dump(config, skip_none=False))


def test_a_schedule_without_a_class_is_the_default_one_in_recipes_and_in_stored_configurations() -> None:
    parser, now = parsed({"warmup_epochs": 5})
    schedule = now["model"]["init_args"]["schedule"]
    assert schedule["class_path"].endswith(".Cosine") and schedule["init_args"]["warmup_epochs"] == 5
    old = {"model": {**now["model"], "init_args": {**now["model"]["init_args"], "schedule": {"warmup_epochs": 5.0}}}}
    assert changes(with_defaults(parser, now, old), now, same_batch=True, observers=()) == []
    other = parsed({"warmup_epochs": 6})[1]
    line = "model.init_args.schedule.init_args.warmup_epochs: 5.0 -> 6.0"
    assert changes(with_defaults(parser, other, old), other, same_batch=True, observers=()) == [line]
    poly = parsed(POLY)[1]
    (line,) = changes(with_defaults(parser, poly, old), poly, same_batch=True, observers=())
    assert line.startswith("model.init_args.schedule.class_path: ") and line.endswith("Cosine -> " + POLY["class_path"])


def test_settings_of_another_kind_begin_with_their_own_defaults() -> None:
    arguments = parsed(POLY)[1]["model"]["init_args"]["schedule"]["init_args"]
    assert arguments["warmup_epochs"] == 0  # not the 40 of MAE's cosine
    assert arguments["power"] == 0.9


def test_a_change_in_a_list_of_groups_is_named_by_its_place() -> None:
    def config(*views: dict[str, Any]) -> dict[str, Any]:
        return {"data": {"init_args": {"views": list(views)}}}

    whole, part = {"count": 2, "photometric": {"hue": 0.1}}, {"count": 8, "local": True}
    old, new = config(whole, part), config({"count": 2, "photometric": {"hue": 0.2}}, {**part, "count": 6}, part)
    assert changes(old, new, same_batch=False, observers=()) == [
        "data.init_args.views[0].photometric.hue: 0.1 -> 0.2",
        "data.init_args.views[1].count: 8 -> 6",
        "data.init_args.views[2]: (not there) -> {'count': 8, 'local': True}",
    ]
    assert changes(old, {"data": {"init_args": {"views": None}}}, same_batch=False, observers=())[0].endswith("-> null")
