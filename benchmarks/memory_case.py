"""One benchmark in a process of its own, for `measure.peak_memory`. It prints its peak memory as JSON."""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import joint_embedding
from benchmarks.measure import peak_resident_mib, resident_mib
from benchmarks.networks import (
    images,
    inference,
    maps,
    maps_and_gradients,
    masked_model,
    network,
    pretraining_step,
    training_step,
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("case", choices=["train", "infer", "pretrain", "maps", "maps-train", "joint-embedding"])
    parser.add_argument("model", help="name; for joint-embedding METHOD:ENCODER")
    parser.add_argument("pixels", type=int)
    parser.add_argument("batch", type=int)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    batches = [images(args.batch, args.pixels)]
    run: Callable[[], Any]
    if args.case == "joint-embedding":
        method, encoder = args.model.split(":")
        run = joint_embedding.steps(method, encoder, args.batch, args.pixels, torch.device("cpu"))
    elif args.case.startswith("maps"):
        run = (maps if args.case == "maps" else maps_and_gradients)(args.model, batches[0])
    elif args.case == "pretrain":
        run = pretraining_step(masked_model(args.model), batches)
    else:
        build = training_step if args.case == "train" else inference
        run = build(network(args.model, args.pixels), batches)
    idle = resident_mib()
    once = args.case.startswith("maps") or args.case == "joint-embedding"  # no optimizer state; three steps
    for _ in range(1 if once else 3):
        run()
    peak = peak_resident_mib()
    print(json.dumps({"peak_mib": peak, "above_idle_mib": peak - idle}))


if __name__ == "__main__":
    main()
