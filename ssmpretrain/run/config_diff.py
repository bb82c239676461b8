"""What changed between two configurations of a run, as far as it changes the run's result."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

# Where a run writes, how it shows itself, how often it saves, and how it is spread over machines.
_EXEMPT = {
    "config", "run_dir", "fresh", "allow_changes", "ckpt_path", "weights_only", "checkpoints",
    "rank_timeout",
    "data.init_args.num_workers",
    *(
        f"trainer.{name}"
        for name in (
            "accelerator", "strategy", "devices", "num_nodes", "logger", "callbacks", "fast_dev_run", "max_time",
            "num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing", "enable_progress_bar",
            "enable_model_summary", "enable_autolog_hparams", "profiler", "detect_anomaly", "barebones",
            "default_root_dir", "model_registry", "limit_test_batches", "limit_predict_batches",
        )
    ),
}  # fmt: skip
# Of one product, the global batch, and judged by that.
BATCH_OPTIONS = ("data.init_args.batch_size", "trainer.accumulate_grad_batches")
# Callbacks that look on. Any other may take part in training, as EMA does.
_OBSERVERS = {
    "OnlineEvaluation", "Reconstructions", "LossPlot", "Throughput", "ModelCheckpoint", "OnExceptionCheckpoint",
    "LearningRateMonitor", "DeviceStatsMonitor", "ThroughputMonitor", "ModelSummary", "RichModelSummary", "Timer",
    "RichProgressBar", "SampleLog", "SimilarityMatrix", "TQDMProgressBar", "ZeroShot",
}  # fmt: skip
# Options that only the start of a run reads; it goes on with what it has. By their last word.
_OF_THE_START = {
    "seed_everything",
    "init_from",
    "init_both_towers",
    "head_init_std",
    "init_logit_scale",
    "init_logit_bias",
}
_ABSENT = object()


def changes(old: dict[str, Any], new: dict[str, Any], same_batch: bool) -> list[str]:
    """One line for each option that differs, `model.init_args.mask_ratio: 0.75 -> 0.6`.

    Args:
        old: The stored configuration, plain data.
        new: That of this command.
        same_batch: Whether both have one global batch, so that its factors may differ.
    """
    exempt = _EXEMPT | set(BATCH_OPTIONS if same_batch else ())
    found = [
        *_differences(old, new, "", exempt),
        *_differences(_taking_part(old), _taking_part(new), _CALLBACKS, set()),
    ]
    return [f"{option}: {_short(before)} -> {_short(after)}{_effect(option)}" for option, before, after in found]


_CALLBACKS = "trainer.callbacks"


def without_unknown(config: Any, other: Any) -> Any:
    """The options of `config` that `other` has too, whatever their values; those in lists by their class."""
    if isinstance(config, list) and isinstance(other, list):
        return [without_unknown(one, _namesake(one, other)) for one in config]
    if not (isinstance(config, dict) and isinstance(other, dict)):
        return config
    return {name: without_unknown(value, other[name]) for name, value in config.items() if name in other}


def together(one: Any, other: Any) -> Any:
    """The options of both; the values of `one` where both have them."""
    if isinstance(one, list) and isinstance(other, list):
        return [together(value, _namesake(value, other)) for value in one]
    if not (isinstance(one, dict) and isinstance(other, dict)):
        return one
    return {**other, **{name: together(value, other.get(name)) for name, value in one.items()}}


def _namesake(one: Any, others: list[Any]) -> Any:
    """What has the class of `one` in a list; else `one`."""
    if not isinstance(one, dict) or "class_path" not in one:
        return one
    same = (other for other in others if isinstance(other, dict) and other.get("class_path") == one["class_path"])
    return next(same, one)


def _effect(option: str) -> str:
    """What is to be said of a changed option that changes nothing."""
    return " (no effect: only the start of a run reads it)" if option.rsplit(".", 1)[-1] in _OF_THE_START else ""


def _differences(old: Any, new: Any, option: str, exempt: set[str]) -> Iterator[tuple[str, Any, Any]]:
    if option in exempt or old == new:
        return
    if not (isinstance(old, dict) and isinstance(new, dict)):
        yield option, old, new
    elif old.get("class_path") != new.get("class_path"):  # arguments of two classes are not compared
        yield f"{option}.class_path", old.get("class_path", _ABSENT), new.get("class_path", _ABSENT)
    else:
        for name in dict.fromkeys([*old, *new]):
            inner = f"{option}.{name}" if option else str(name)
            yield from _differences(old.get(name, _ABSENT), new.get(name, _ABSENT), inner, exempt)


def _taking_part(config: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the callbacks that are no mere observers, by name."""
    callbacks = (config.get("trainer") or {}).get("callbacks") or []
    callbacks = callbacks if isinstance(callbacks, list) else [callbacks]
    named = {str(one["class_path"]).rsplit(".", 1)[-1]: one.get("init_args") or {} for one in callbacks}
    return {name: arguments for name, arguments in named.items() if name not in _OBSERVERS}


def _short(value: Any) -> str:
    if value is _ABSENT:
        return "(not there)"
    text = "null" if value is None else str(value)
    return text if len(text) <= 80 else text[:77] + "..."
