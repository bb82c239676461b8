"""Runs of the command line on forked ranks: one is killed, all go on, also as another number of ranks.

Prints exit codes and what was trained as JSON; what test_ranks.py starts, with a folder of shards.
"""

import json
import os
import shutil
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
import yaml
from forked_ranks import in_ranks

import ssmpretrain.run.trainer_cli  # noqa: F401  so that the ranks need not import it
from ssmpretrain.base.json_lines import read_rows
from ssmpretrain.cli import main

GLOBAL = 8


def command(folder: Path, run: str, world: int, *more: str) -> list[str]:
    return [
        "fit", f"--config={folder / 'recipe.yaml'}", f"--run_dir={folder / run}", f"--trainer.devices={world}",
        f"--data.batch_size={GLOBAL // world}", *more,
    ]  # fmt: skip


def write_recipe(folder: Path) -> None:
    encoder = {"encoder": "test_vim", "encoder_args": {"img_size": 16, "patch_size": 4, "drop_path_rate": 0.5}}
    deaths = [{"class_path": "dying.Die", "init_args": {"rank": 1, "step": step}} for step in (5, 9)]
    log = [{"class_path": "ssmpretrain.callbacks.SampleLog"}]
    ema = [{"class_path": "ssmpretrain.callbacks.EMA", "init_args": {"decay": 0.5}}]
    recipe = {
        "seed_everything": 0,
        "model": {
            "class_path": "ssmpretrain.objectives.MAE",
            "init_args": {**encoder, "decoder_embed_dim": 16, "decoder_depth": 1, "optimizer": {"lr_per_256": 0.3}},
        },
        "data": {
            "class_path": "ssmpretrain.datamodules.ImageShards",
            "init_args": {"train": f"{folder}/train-*.tar", "image_size": 16, "num_workers": 0},
        },
        "trainer": {
            "accelerator": "cpu", "strategy": "ddp", "max_epochs": 3, "enable_progress_bar": False,
            "log_every_n_steps": 1, "callbacks": [*log, *ema, *deaths],
        },
        "checkpoints": {"every_n_steps": 2},
    }  # fmt: skip
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))


def trained(run: Path) -> dict[str, Any]:
    """What the logs of a run say: how often each sample of each epoch, and on how many ranks."""
    counts: dict[int, Counter[str]] = {}
    steps = set()
    for path in run.glob("samples-rank*.jsonl"):
        for row in map(json.loads, path.read_text().splitlines()):
            counts.setdefault(row["epoch"], Counter()).update(row["keys"])
            steps.add(row["step"])
    return {
        "samples": {epoch: sum(counter.values()) for epoch, counter in counts.items()},
        "most often": max(max(counter.values()) for counter in counts.values()),
        "steps": len(steps),
        "losses": [row["train/loss"] for row in read_rows(run / "metrics.jsonl") if "train/loss" in row],
    }


def difference(one: Path, other: Path) -> float:
    """Of all weights, averages and moments in the last checkpoints of two runs, the largest."""
    a, b = (torch.load(run / "checkpoints/last.ckpt", weights_only=True) for run in (one, other))
    states = [(a[name], b[name]) for name in ("state_dict", "current_model_state")]
    states += [
        (a["optimizer_states"][0]["state"][i], b["optimizer_states"][0]["state"][i])
        for i in a["optimizer_states"][0]["state"]
    ]
    return max(float((x[name].double() - y[name].double()).abs().max()) for x, y in states for name in x)


def disagreeing(folder: Path) -> int:
    """Rank 1 of two was started with another mask ratio."""
    ratio = [] if os.environ["RANK"] == "0" else ["--model.mask_ratio=0.5"]
    return main(command(folder, "disagreeing", 2, *ratio))


def killed(folder: Path) -> dict[str, Any]:
    (folder / "whole").mkdir()
    for step in (5, 9):
        (folder / "whole" / f"died-{step}").touch()  # nobody is to die there
    report = {
        "whole": in_ranks(2, main, command(folder, "whole", 2)),
        "killed": in_ranks(2, main, command(folder, "killed", 2)),
        "killed again": in_ranks(2, main, command(folder, "killed", 2, "--data.num_workers=1")),
    }
    shutil.copytree(folder / "killed", folder / "moved", symlinks=True)
    report |= {
        "continued": in_ranks(2, main, command(folder, "killed", 2)),
        "continued on 4": in_ranks(4, main, command(folder, "moved", 4)),
        "disagreeing": in_ranks(2, disagreeing, folder),
    }
    runs = {name: trained(folder / name) for name in ("whole", "killed", "moved")}
    return {**report, "runs": runs, "difference": difference(folder / "whole", folder / "killed")}


if __name__ == "__main__":
    write_recipe(Path(sys.argv[1]))
    print("REPORT", json.dumps(killed(Path(sys.argv[1]))))
