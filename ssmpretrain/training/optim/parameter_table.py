"""A table of parameter groups: names, learning rate, weight decay."""

from __future__ import annotations

from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.base.whole_files import replace_text


class ParameterGroups(Callback):
    """Write the optimizer's groups to `parameter_groups.txt` in the run's folder when training starts."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.is_global_zero:
            groups = [group for optimizer in trainer.optimizers for group in optimizer.param_groups]
            replace_text(RunFolder(trainer.default_root_dir).parameter_groups, group_table(groups))


def group_table(groups: list[dict[str, Any]]) -> str:
    """Format one line per group, followed by the names of the parameters in each group.

    Args:
        groups: Groups of the optimizer. A group without the key "layer" belongs to no layer. A weight decay that moves
            is shown as "0.04 to 0.4".
    """
    lines = [f"{'group':>5}{'layer':>7}{'lr scale':>11}{'weight decay':>14}{'tensors':>9}{'parameters':>13}"]
    for number, group in enumerate(groups):
        layer, scale = group.get("layer", "-"), group.get("lr_scale", 1.0)
        decays = [group[name] for name in ("initial_weight_decay", "final_weight_decay") if name in group]
        decay = " to ".join(f"{value:.4g}" for value in decays or [group["weight_decay"]])
        size = sum(parameter.numel() for parameter in group["params"])
        lines.append(f"{number:>5}{layer:>7}{scale:>11.4g}{decay:>14}{len(group['params']):>9}{size:>13,}")
    for number, group in enumerate(groups):
        lines += ["", f"group {number}", *(f"  {name}" for name in group.get("param_names", ()))]
    return "\n".join(lines) + "\n"
