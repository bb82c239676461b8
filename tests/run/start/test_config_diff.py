"""Differences between two configurations of a run."""

from typing import Any

from lightning.pytorch import Callback

from ssmpretrain.run.start.config_diff import changes
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
