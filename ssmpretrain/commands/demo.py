"""`demo`: a comparison of the pretrained encoder with the untrained encoder and with raw pixels, and pictures of it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.commands.feature_pictures.before_and_after import draw_before_and_after
from ssmpretrain.encoders.features.pooled import pooled_features
from ssmpretrain.evaluation.features import collect_features, evaluate

_MAX_BANK = 2000
_NEXT = """next: fine-tune it, probe it, look at it, take it into your own code, or pretrain on your own images:
  python -m ssmpretrain fit --config recipes/quickstart_finetune.yaml --model.init_from {run}
  python -m ssmpretrain fit --config recipes/quickstart_linear.yaml --model.init_from {run}
  python -m ssmpretrain neighbours {run} FOLDER_OF_IMAGES
  python -c "import ssmpretrain; print(ssmpretrain.load_encoder('{checkpoint}').load_report)"
  python -m ssmpretrain shards pack FOLDER_OF_IMAGES my_shards
  python -m ssmpretrain fit --config recipes/lejepa_vmamba_t.yaml --data.train 'my_shards/*.tar' --data.val null \\
      --trainer.accelerator auto --trainer.devices 1 --trainer.num_nodes 1"""


def untrained_encoder(model: Any) -> nn.Module:
    """Build the encoder of an objective with fresh weights, the same ones in each call, on the objective's device."""
    torch.manual_seed(0)
    return model.build_encoder().eval().to(model.device)  # type: ignore[no-any-return]


def pretrained_encoder(model: Any) -> nn.Module:
    """Return the encoder of an objective whose features are evaluated, the teacher's if there is one."""
    return getattr(model, "evaluated_encoder", model.encoder).eval()  # type: ignore[no-any-return]


def compare(model: Any, untrained: nn.Module, data: Any) -> dict[str, dict[str, float]]:
    """Measure accuracies of pretrained features, untrained features and raw pixels on the labelled images of `data`.

    Args:
        model: A pretrained objective. Its features are those that `pooled` names.
        untrained: The same encoder with other weights.
        data: A data module with `bank_dataloader()` and `val_dataloader()`.
    """
    bank, queries = list(data.bank_dataloader(limit=_MAX_BANK)), list(data.val_dataloader())  # decoded once for all

    def judge(encode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        return evaluate(*collect_features(encode, bank, model.device), *collect_features(encode, queries, model.device))

    def features_of(encoder: nn.Module) -> Callable[[Tensor], Tensor]:
        return lambda images: pooled_features(encoder, images, [model.pooled])[model.pooled]

    return {
        "raw pixels": judge(lambda images: F.adaptive_avg_pool2d(images, 32).flatten(1)),
        "untrained encoder": judge(features_of(untrained)),
        "pretrained encoder": judge(features_of(pretrained_encoder(model))),
    }


def report(model: Any, data: Any, folder: RunFolder) -> str:
    """Format the comparison as a table, draw the pictures of the run, and list commands to try next."""
    untrained = untrained_encoder(model)
    rows = [f"{'':<20}{'kNN':>8}{'linear probe':>15}"]
    for kind, result in compare(model, untrained, data).items():
        rows.append(f"{kind:<20}{result['knn']:>8.1%}{result['linear_probe']:>15.1%}")
    names = {"before": "fresh weights", "after": "pretrained"}
    pictures = draw_before_and_after(
        untrained, pretrained_encoder(model), model.pooled, data, folder, names, bank=_MAX_BANK
    )
    return "\n".join(
        [
            "",
            f"top-1 accuracy on unseen images, frozen features, {_MAX_BANK} labelled images:",
            *rows,
            "",
            "look at:",
            *(f"  {path}" for path in (folder.loss_plot, *pictures)),
            "",
            _NEXT.format(checkpoint=folder.last_checkpoint, run=folder.path),
        ]
    )
