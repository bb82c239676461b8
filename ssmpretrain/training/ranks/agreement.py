"""Agreement of ranks: before the first step all ranks compare options, code and data."""

from __future__ import annotations

import hashlib
import json
import logging
import platform
import re
import socket
import subprocess
from collections import Counter
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

import ssmpretrain
from ssmpretrain.base import ranks
from ssmpretrain.base.errors import UserError
from ssmpretrain.base.seeds import seed_of_run

_log = logging.getLogger(__name__)
_PACKAGES = ("torch", "lightning", "timm", "torchvision", "numpy")
_MAX_LISTED = 8
_UNSET = "not set"


class RanksDisagree(UserError):
    """Ranks were started with different commands, code or data. Rank 0 has logged the ranks and the differences."""

    is_told = True


class RankAgreement(Callback):
    """Compare options, code and data of all ranks, and stop all of them if one differs.

    The ranks compare the seed, every option of the run, the data module's `fingerprint()` if it has one, the versions
    of Python and of the packages that affect the numbers, the commit of the code, and the number of ranks. They
    exchange a digest of all this. If the digests differ, they also exchange the values, for the message.

    Args:
        options: The run's options as nested plain data.

    Raises:
        RanksDisagree: On every rank, after rank 0 has logged the ranks that differ, their hosts and the differences.
    """

    def __init__(self, options: Mapping[str, Any] | None = None) -> None:
        self.options = dict(options or {})

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            check(facts(trainer, self.options))


def facts(trainer: Trainer, options: Mapping[str, Any]) -> dict[str, str]:
    """Return the facts that decide the training of this rank, by name."""
    fingerprint = getattr(trainer.datamodule, "fingerprint", None)  # type: ignore[attr-defined]
    return {
        **{name: value for name, value in sorted(flat(options).items())},
        "seed": _UNSET if (seed := seed_of_run()) is None else str(seed),
        "data": str(fingerprint()) if callable(fingerprint) else _UNSET,
        "ranks": str(trainer.world_size),
        "ssmpretrain": ssmpretrain.__version__,
        "commit": _commit(),
        "Python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
    }


def check(mine: dict[str, str]) -> None:
    """Raise `RanksDisagree` on every rank unless all have the same facts."""
    digest = hashlib.sha256(json.dumps(mine, sort_keys=True).encode()).hexdigest()
    if len(set(ranks.gather(digest))) == 1:
        return
    everyone = ranks.gather((socket.gethostname(), mine))
    message = difference([host for host, _ in everyone], [theirs for _, theirs in everyone])
    if ranks.rank() == 0:
        _log.error("%s", message)
    ranks.gather(None)  # a launcher ends all ranks when one leaves: wait until rank 0 has logged the difference
    raise RanksDisagree(message)


def difference(hosts: list[str], everyone: list[dict[str, str]]) -> str:
    """Return a message that names the ranks that differ from the majority, and the differences.

    In a tie, the value of rank 0 counts as right.

    Args:
        hosts: Host of each rank.
        everyone: Facts of each rank.
    """
    lines = []
    for name in dict.fromkeys(name for facts in everyone for name in facts):
        values = [facts.get(name, _UNSET) for facts in everyone]
        common, count = max(Counter(values).items(), key=lambda pair: (pair[1], pair[0] == values[0]))
        for rank, value in enumerate(values):
            if value != common:
                others = f"the other {count} ranks" if count == len(values) - 1 > 1 else f"{count} ranks"
                others = f"rank {values.index(common)}" if count == 1 else others
                lines.append(f"rank {rank} ({hosts[rank]}): {name} is {value}, on {others} {common}")
    more = [f"and {len(lines) - _MAX_LISTED} more"] if len(lines) > _MAX_LISTED else []
    listed = "\n  ".join([*lines[:_MAX_LISTED], *more])
    return f"the ranks of this job differ:\n  {listed}\nStart all of them with the same command, code and data."


def flat(options: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Flatten nested options: map full names, such as "model.init_args.decay", to values as text."""
    found: dict[str, str] = {}
    for name, value in options.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{name}.")
        else:
            text = json.dumps(value, sort_keys=True, default=str)
            found[f"{prefix}{name}"] = re.sub(r" at 0x[0-9a-f]+", "", text)
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    """Return the commit of the checkout that the code runs from; "not set" for an installed package."""
    command = ["git", "-C", str(Path(ssmpretrain.__file__).parent), "rev-parse", "HEAD"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return _UNSET
    return done.stdout.strip() or _UNSET
