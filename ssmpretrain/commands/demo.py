"""`demo`: a comparison of the pretrained encoder with the untrained encoder and with raw pixels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ssmpretrain.base.run_folder import RunFolder
from ssmpretrain.evaluation.features import collect_features, evaluate

_MAX_BANK = 2000
_NEXT = """next: fine-tune it, probe it, take it into your own code, or pretrain on your own images:
  python -m ssmpretrain fit --config recipes/quickstart_finetune.yaml --model.init_from {run}
  python -m ssmpretrain fit --config recipes/quickstart_linear.yaml --model.init_from {run}
  python -c "import ssmpretrain; print(ssmpretrain.load_encoder('{checkpoint}').load_report)"
  python -m ssmpretrain shards pack FOLDER_OF_IMAGES my_shards
  python -m ssmpretrain fit --config recipes/mae_vim_ti.yaml --data.train 'my_shards/*.tar' --data.val null \\
      --trainer.accelerator auto --trainer.devices 1 --trainer.num_nodes 1"""


def compare(model: Any, data: Any) -> dict[str, dict[str, float]]:
    """Measure accuracies of pretrained features, untrained features and raw pixels on the labelled images of `data`.

    Args:
        model: A pretrained objective. Its `forward` returns the features.
        data: A data module with `bank_dataloader()` and `val_dataloader()`.
    """
    bank, queries = list(data.bank_dataloader(limit=_MAX_BANK)), list(data.val_dataloader())  # decoded once for all

    def judge(encode: Callable[[Tensor], Tensor]) -> dict[str, float]:
        return evaluate(*collect_features(encode, bank, model.device), *collect_features(encode, queries, model.device))

    found = {"raw pixels": judge(lambda images: F.adaptive_avg_pool2d(images, 32).flatten(1))}
    torch.manual_seed(0)
    trained, model.encoder = model.eval().encoder, model.build_encoder().eval()
    found["untrained encoder"] = judge(model)
    model.encoder = trained
    found["pretrained encoder"] = judge(model)
    return found


def report(model: Any, data: Any, folder: RunFolder) -> str:
    """Format the comparison as a table, and list commands to try next."""
    rows = [f"{'':<20}{'kNN':>8}{'linear probe':>15}"]
    for kind, result in compare(model, data).items():
        rows.append(f"{kind:<20}{result['knn']:>8.1%}{result['linear_probe']:>15.1%}")
    return "\n".join(
        [
            "",
            f"top-1 accuracy on unseen images, frozen features, {_MAX_BANK} labelled images:",
            *rows,
            "",
            _NEXT.format(checkpoint=folder.last_checkpoint, run=folder.path),
        ]
    )
