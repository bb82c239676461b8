"""State of an optimizer from a checkpoint: moments by the names of parameters, settings from the recipe."""

from __future__ import annotations

import logging
import math
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, nn
from torch.optim import Optimizer

from ssmpretrain.base.errors import UserError
from ssmpretrain.encoders.weights.finite_check import check_finite

_log = logging.getLogger(__name__)
_OTHER = "Give an earlier checkpoint, or start a new run from its weights, with model.init_from."
_CLASS = "class"  # key of the optimizer's class in its saved state


def keep_settings(optimizer: Optimizer, module: nn.Module) -> None:
    """Let `optimizer` keep its own settings when it loads a state, and match the state by names of parameters.

    torch restores the saved groups by position, with all of their settings. A changed learning rate, weight decay or
    split into groups would have no effect, or the moments of one parameter would go to another.

    Args:
        optimizer: Optimizer that the configuration asks for. A group may name its parameters under "param_names".
        module: Module that has the parameters, by name.
    """
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    for group in optimizer.param_groups:
        group.setdefault("param_names", [names[id(parameter)] for parameter in group["params"]])
    optimizer.register_state_dict_post_hook(_note_class)
    optimizer.register_load_state_dict_pre_hook(matched)


def matched(optimizer: Optimizer, saved: dict[str, Any]) -> dict[str, Any]:
    """Return the saved state in the numbering of `optimizer`, with the present settings of its groups.

    A parameter that the checkpoint lacks begins without a state. The state of a parameter that is no longer trained is
    dropped. Both cases are logged. An optimizer without names of parameters takes the saved state unchanged.

    Raises:
        ValueError: If the state belongs to an optimizer of another class, names no parameter of this one, or holds an
            invalid number such as NaN.
    """
    if any("param_names" not in group for group in optimizer.param_groups):
        return saved
    name = type(optimizer).__name__
    if (theirs := saved.get(_CLASS, name)) != name:
        raise UserError(
            f"optimizer: the state in the checkpoint is of {theirs}; {name}, which the configuration asks for, cannot "
            f"go on with it. Configure {theirs}, or start a new run from the weights, with model.init_from."
        )
    numbers = _numbers(saved["param_groups"], optimizer)
    names = [name for group in optimizer.param_groups for name in group["param_names"]]
    _compare(names, numbers)
    states = saved["state"]
    state = {i: states[numbers[name]] for i, name in enumerate(names) if numbers.get(name) in states}
    _check_numbers({names[i]: entries for i, entries in state.items()})
    return {**saved, "state": state, "param_groups": optimizer.state_dict()["param_groups"]}


def _numbers(groups: list[dict[str, Any]], optimizer: Optimizer) -> dict[str, int]:
    """Return the saved number of each parameter by its name, or by position if no names were saved."""
    if all("param_names" in group for group in groups):
        named = groups
    else:
        sizes, now = ([len(group["params"]) for group in one] for one in (groups, optimizer.param_groups))
        if sizes != now:
            raise UserError(
                f"optimizer: the checkpoint does not name its parameters, and their groups are others now: {sizes} "
                f"parameters in each, now {now}. Go on with the configuration of the run, or start a new run from its "
                "weights, with model.init_from."
            )
        named = optimizer.param_groups
    pairs = zip(named, groups, strict=True)
    return {
        name: number for ours, one in pairs for name, number in zip(ours["param_names"], one["params"], strict=True)
    }


def _compare(names: list[str], numbers: dict[str, int]) -> None:
    """Log the parameters that the checkpoint does not know, and those that are no longer trained."""
    new, gone = [name for name in names if name not in numbers], sorted(numbers.keys() - set(names))
    if len(new) == len(names):
        raise UserError(
            f"optimizer: the checkpoint has the state of parameters such as {next(iter(numbers), '(none)')}, and this "
            f"run trains others, such as {names[0]}. Give the checkpoint of this model, or start a new run from its "
            "weights, with model.init_from."
        )
    say = rank_zero_only(_log.warning)
    if new:
        say("optimizer: %d parameters were not trained before; they begin without moments: %s", *_few(new))
    if gone:
        say("optimizer: %d parameters are trained no more; their moments are dropped: %s", *_few(gone))


def _check_numbers(state: dict[str, dict[str, Any]]) -> None:
    """Raise if a moment is not finite or a step count is wrong, because one step would then spoil the weights."""
    check_finite(
        "optimizer",
        {f"{kind} of {name}": value for name, entries in state.items() for kind, value in entries.items()},
        "the checkpoint",
        _OTHER,
        what="moments",
    )
    for name, entries in state.items():
        if "step" in entries and not _is_count(entries["step"]):
            raise UserError(
                f"optimizer: steps are counted from 0; the checkpoint has {entries['step']!r:.60} of {name}. {_OTHER}"
            )


def _is_count(step: Any) -> bool:
    number = step.item() if isinstance(step, Tensor) and step.numel() == 1 and not step.is_complex() else step
    return isinstance(number, int | float) and 0 <= number < math.inf


def lost_all(state: dict[str, Any]) -> bool:
    """Return whether the saved state of an optimizer that keeps moments holds none for any parameter."""
    groups = [group for group in state["param_groups"] if isinstance(group, dict) and group.get("params")]
    return not state["state"] and any("betas" in group or group.get("momentum") for group in groups)


def _few(names: list[str]) -> tuple[int, str]:
    return len(names), ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def _note_class(optimizer: Optimizer, state: dict[str, Any]) -> None:
    state[_CLASS] = type(optimizer).__name__
