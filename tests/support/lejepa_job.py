"""Trains LeJEPA on one, two and four ranks and prints, as JSON, how they compare; test_lejepa_ranks.py."""

import json
import os
import sys
import warnings
from typing import Any

import torch
import torch.distributed as dist
from forked_ranks import in_ranks
from lightning.pytorch import LightningDataModule, seed_everything
from pairs import apart, fit
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from ssmpretrain.objectives import LeJEPA
from ssmpretrain.objectives.joint_embedding.lejepa import invariance
from ssmpretrain.objectives.joint_embedding.projector import Projector
from ssmpretrain.objectives.joint_embedding.sigreg import random_slices, sigreg
from ssmpretrain.training.optim.adamw import AdamW
from ssmpretrain.training.optim.schedules import Cosine
from ssmpretrain.training.ranks.fsdp import FSDP2

B, V, D, K = 8, 3, 6, 4  # images of all ranks, views, numbers in a view, width of projections
SLICES = random_slices(K, 5, step=0, device=torch.device("cpu"))


# The loss alone, behind a linear layer and the projector


class Small(nn.Module):
    """A linear encoder, the projector, and the sum of SIGReg and, for ranks of equally many images, invariance."""

    def __init__(self, agree: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.projector, self.agree = nn.Linear(D, 7), Projector(7, [9, 5], K), agree

    def forward(self, x: Tensor) -> Tensor:
        z = self.projector(self.encoder(x).flatten(0, 1)).unflatten(0, x.shape[:2]).transpose(0, 1)
        return sigreg(z, SLICES) + (invariance(z, 2) if self.agree else 0)


def by_hand(agree: bool) -> dict[str, Any]:
    """Loss and gradients of one process with all images, in float64, with torch's BatchNorm and trapezoid."""
    small = Small(agree).double()
    layers = [
        nn.BatchNorm1d(len(one.weight)).double() if hasattr(one, "eps") else one for one in small.projector.children()
    ]
    x = numbers().double()
    z = nn.Sequential(*layers)(small.encoder(x).flatten(0, 1)).unflatten(0, (B, V)).transpose(0, 1)
    t = torch.linspace(0, 3, 17, dtype=torch.float64)
    phi = torch.exp(-t.square() / 2)
    angles = (z @ SLICES.double()).unsqueeze(-1) * t
    error = (angles.cos().mean(1) - phi).square() + angles.sin().mean(1).square()
    loss = 2 * B * torch.trapezoid(error * phi, t, dim=-1).mean()
    if agree:
        loss = loss + torch.stack([(one - (z[0] + z[1]) / 2).square() for one in z]).mean()
    loss.backward()
    return {"loss": loss.item()} | {
        name: p.grad.numpy()
        for part, module in {"encoder": small.encoder, "projector": nn.Sequential(*layers)}.items()
        for name, p in module.named_parameters(prefix=part)
        if p.grad is not None
    }


def under_ddp(bounds: list[int], agree: bool) -> dict[str, Any]:
    """The same of this rank, which has the images between two of the `bounds`."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank, small = dist.get_rank(), Small(agree)
    replica = DistributedDataParallel(small)
    loss = replica(numbers()[bounds[rank] : bounds[rank + 1]])
    loss.backward()
    mean = loss.detach() / dist.get_world_size()
    dist.all_reduce(mean)
    return {"loss": mean.item()} | {
        name: p.grad.double().numpy() for name, p in small.named_parameters() if p.grad is not None
    }


def numbers() -> Tensor:
    return torch.randn(B, V, D, generator=torch.Generator().manual_seed(3))


def losses() -> dict[str, float]:
    """Largest distance, of the loss or a gradient, to the loss by hand in float64."""
    jobs = {
        "1": ([0, 8], True), "2": ([0, 4, 8], True), "4": ([0, 2, 4, 6, 8], True), "2 uneven": ([0, 5, 8], False),
    }  # fmt: skip
    truth = {agree: in_ranks(1, by_hand, agree)[0] for agree in (True, False)}
    return {
        name: max(apart(one, truth[agree]) for one in in_ranks(len(bounds) - 1, under_ddp, bounds, agree))
        for name, (bounds, agree) in jobs.items()
    }


# The objective


class Views(LightningDataModule):
    """Steps of eight images with two global views of 32 pixels and two local ones of 16, each rank a part of them."""

    mean, std, image_size, train = (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), 32, "made here"
    views = (type("Group", (), {"size": 32}), type("Group", (), {"size": 16}))

    def __init__(self, batch_size: int) -> None:
        super().__init__()
        self.batch_size = batch_size

    def num_samples(self, split: str) -> int:
        return 24

    def train_dataloader(self) -> DataLoader[Any]:
        rank, drawn = int(os.environ.get("RANK", 0)), torch.Generator().manual_seed(0)
        ours = slice(rank * self.batch_size, (rank + 1) * self.batch_size)
        steps = [[torch.randn(8, 2, 3, side, side, generator=drawn) for side in (32, 16)] for _ in range(3)]
        batches = [{"views": [one[ours] for one in step], "num_global": 2} for step in steps]
        return DataLoader(batches, batch_size=None)  # type: ignore[arg-type]


def train(strategy: Any = "auto") -> dict[str, Any]:
    """Train LeJEPA in this rank and return what it came to."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    seed_everything(0, verbose=False)
    world = int(os.environ["WORLD_SIZE"])
    model = LeJEPA(
        "test_vim", {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2}, projector_hidden=[32, 32],
        projector_dim=16, num_slices=32, optimizer=AdamW(lr_per_256=0.32, eps=1e-6), schedule=Cosine(warmup_epochs=0),
    )  # fmt: skip
    record = fit(
        model, Views(8 // world), devices=world, strategy=strategy, use_distributed_sampler=False, log_every_n_steps=1
    )
    rank = float(model.trainer.callback_metrics["train/effective_rank"])
    return {
        "steps": [{name: value.numpy() for name, value in step.items()} for step in record.steps],
        "losses": record.losses,
        "effective rank": rank,
    }


def objectives(*jobs: tuple[int, Any]) -> dict[str, Any]:
    """How gradients of the first step and losses of all steps of the jobs, ranks and strategy, differ from one rank."""
    (single,) = in_ranks(1, train)
    report = {}
    for world, strategy in jobs:
        ranks = in_ranks(world, train, strategy)
        name = strategy if isinstance(strategy, str) else "fsdp2"
        report[f"{name} on {world}"] = {
            "gradients": max(apart(one["steps"][0], single["steps"][0]) for one in ranks),
            "losses": max(apart(dict(enumerate(one["losses"])), dict(enumerate(single["losses"]))) for one in ranks),
        }
    return report


def main() -> None:
    few = sys.argv[1] == "few"
    report = {"losses": losses(), **objectives((2, "ddp"))} if few else objectives((4, "ddp"), (2, FSDP2()))
    print("REPORT", json.dumps(report))


if __name__ == "__main__":
    main()
