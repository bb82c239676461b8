"""Trains two towers on one, two and four ranks and prints, as JSON, how they compare; test_contrastive_ranks.py."""

import json
import logging
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from forked_ranks import in_ranks
from lightning.pytorch import Callback, seed_everything
from open_clip.loss import ClipLoss, SigLipLoss
from pairs import Pairs, apart, fit, tiny
from ranks_job import same_masks
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ssmpretrain.callbacks import EMA
from ssmpretrain.objectives import CLIP, MAECLIP
from ssmpretrain.objectives.contrastive.head import MAX_LOGIT_SCALE
from ssmpretrain.objectives.contrastive.open_clip_adapter import contrastive_loss
from ssmpretrain.training.stopping.non_finite import NonFiniteGuard

B, D, E = 8, 6, 5  # pairs of all ranks, numbers in an image and in a caption, width of the space


# The loss alone, between two linear towers


class Towers(nn.Module):
    """Two linear towers, the factor and, with `biased`, the bias; `loss` is called as open_clip's losses are."""

    def __init__(self, loss: Any, biased: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.image, self.text = nn.Linear(D, E), nn.Linear(D, E)
        self.scale = nn.Parameter(torch.tensor([2.0]))
        self.bias = nn.Parameter(torch.tensor([-3.0])) if biased else None
        self.loss = loss

    def forward(self, images: Tensor, texts: Tensor) -> Tensor:
        image, text = F.normalize(self.image(images), dim=-1), F.normalize(self.text(texts), dim=-1)
        bias = () if self.bias is None else (self.bias,)
        return self.loss(image, text, self.scale.exp(), *bias)  # type: ignore[no-any-return]


def clip_by_hand(image: Tensor, text: Tensor, factor: Tensor) -> Tensor:
    """Mean over the pairs of -log of the share of the right one among exp(factor * cosine), both ways."""
    shares = (factor * image @ text.T).exp()
    right = shares.diagonal()
    return -((right / shares.sum(dim=1)).log() + (right / shares.sum(dim=0)).log()).mean() / 2


def siglip_by_hand(image: Tensor, text: Tensor, factor: Tensor, bias: Tensor) -> Tensor:
    """Sum over all combinations of -log of the probability of what is so, divided by the number of pairs."""
    sign = 2 * torch.eye(len(image), dtype=image.dtype) - 1
    probability = 1 / (1 + (-sign * (factor * image @ text.T + bias)).exp())
    return -probability.log().sum() / len(image)


BY_HAND: dict[str, Any] = {"clip": clip_by_hand, "siglip": siglip_by_hand}
OPEN_CLIP: dict[str, Any] = {"clip": ClipLoss, "siglip": SigLipLoss}


def alone(loss: Any, biased: bool, dtype: torch.dtype) -> dict[str, Any]:
    """Loss and gradients of one process with all pairs."""
    torch.set_num_threads(1)
    towers = Towers(loss, biased).to(dtype)
    value = towers(*(numbers.to(dtype) for numbers in numbers_of_pairs()))
    value.backward()
    return {"loss": value.item(), **gradients(towers)}


def under_ddp(kind: str) -> dict[str, Any]:
    """The same of this rank, which has a part of the pairs, with the loss of the objectives."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    towers = Towers(contrastive_loss(kind, rank, world), kind == "siglip")
    part = slice(rank * B // world, (rank + 1) * B // world)
    replica = DistributedDataParallel(towers)  # without a name it would be gone before the backward pass
    loss = replica(*(numbers[part] for numbers in numbers_of_pairs()))
    loss.backward()
    mean = loss.detach() / world
    dist.all_reduce(mean)
    return {"loss": mean.item(), **gradients(towers)}


def numbers_of_pairs() -> tuple[Tensor, Tensor]:
    drawn = torch.Generator().manual_seed(3)
    return torch.randn(B, D, generator=drawn), torch.randn(B, D, generator=drawn)


def gradients(towers: nn.Module) -> dict[str, Any]:
    return {name: p.grad.double().numpy() for name, p in towers.named_parameters() if p.grad is not None}


def losses() -> dict[str, float]:
    """Largest distance, of the loss or a gradient, to the loss by hand in float64."""
    report = {}
    for kind, by_hand in BY_HAND.items():
        (truth,) = in_ranks(1, alone, by_hand, kind == "siglip", torch.float64)
        runs = {f"{kind} on {world}": in_ranks(world, under_ddp, kind) for world in (1, 2, 4)}
        runs[f"{kind} of open_clip"] = in_ranks(1, alone, OPEN_CLIP[kind](), kind == "siglip", torch.float32)
        for name, ranks in runs.items():
            report[name] = max(apart(one, truth) for one in ranks)
    return report


# The objectives

MODELS: dict[str, Any] = {
    "clip": lambda: tiny(CLIP),
    "siglip": lambda: tiny(CLIP, loss="siglip"),
    "hottest": lambda: tiny(CLIP, init_logit_scale=MAX_LOGIT_SCALE),
    "flip": lambda: tiny(CLIP, mask_ratio=0.5),
    "locked": lambda: tiny(CLIP, lock_image=True),
    "mae_clip": lambda: tiny(MAECLIP, decoder_embed_dim=32, decoder_depth=1),
}


def train(name: str, strategy: str = "auto", accumulate: int = 1, uneven: int = 0) -> dict[str, Any]:
    """Train one model in this rank on steps of eight pairs, and return what it came to."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    same_masks()
    seed_everything(0, verbose=False)
    world, model = int(os.environ["WORLD_SIZE"]), MODELS[name]()
    data = Pairs(batch_size=8 // world // accumulate, uneven=uneven)
    callbacks: list[Callback] = [EMA(0.5), NonFiniteGuard()]
    try:
        record = fit(
            model, data, *callbacks, devices=world, strategy=strategy, accumulate_grad_batches=accumulate,
            use_distributed_sampler=False, limit_val_batches=1,
        )  # fmt: skip
    except ValueError as error:
        return {"error": str(error)}
    scale = model.logit_scale.detach()
    return {
        "steps": [{name: value.numpy() for name, value in step.items()} for step in record.steps],
        "losses": record.losses,
        "val": float(model.trainer.callback_metrics["val/loss"]),
        "factor": float((scale.full_tensor() if hasattr(scale, "full_tensor") else scale).exp()),
    }


def compared(ranks: list[dict[str, Any]], single: dict[str, Any]) -> dict[str, float]:
    """Largest distance of any rank to a single process: of the first step's gradients, and of all losses."""
    expected = dict(enumerate([*single["losses"], single["val"]]))
    return {
        "gradients": max(apart(one["steps"][0], single["steps"][0]) for one in ranks),
        "losses": max(apart(dict(enumerate([*one["losses"], one["val"]])), expected) for one in ranks),
        "factor": max(one["factor"] for one in ranks),
    }


def objectives(*jobs: tuple[str, int, str, int]) -> dict[str, Any]:
    """How the jobs, model, ranks, strategy and batches of a step, compare with one batch of a single process."""
    single = {name: in_ranks(1, train, name)[0] for name in dict.fromkeys(name for name, *_ in jobs)}
    return {
        f"{name} {strategy} on {world}, {accumulate} batches": compared(
            in_ranks(world, train, name, strategy, accumulate), single[name]
        )
        for name, world, strategy, accumulate in jobs
    }


def main() -> None:
    if sys.argv[1] == "few":
        report: dict[str, Any] = {"losses": losses()}
        report["uneven"] = [one["error"] for one in in_ranks(2, train, "clip", "ddp", 1, 1)]
        report |= objectives(("clip", 2, "ddp", 2), ("siglip", 4, "ddp", 1))
    else:
        report = objectives(
            ("clip", 4, "ddp", 2), ("siglip", 2, "ddp", 4), ("flip", 2, "ddp", 1), ("mae_clip", 2, "ddp", 1),
            ("locked", 2, "ddp", 2), ("clip", 2, "fsdp2", 1), ("clip", 2, "fsdp2", 4), ("siglip", 4, "fsdp2", 2),
            ("locked", 2, "fsdp2", 2), ("flip", 2, "fsdp2", 1), ("mae_clip", 2, "fsdp2", 1), ("hottest", 2, "fsdp2", 2),
        )  # fmt: skip
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
