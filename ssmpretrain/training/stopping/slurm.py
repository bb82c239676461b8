"""Requeueing of SLURM jobs."""

from __future__ import annotations

import os
import re
import signal
import subprocess

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer

from ssmpretrain.base.lightning_private import cluster_environment_of

_PATIENCE = 60  # seconds for an answer of SLURM's controller


def job_of(trainer: Trainer) -> SLURMEnvironment | None:
    """Return Lightning's description of the job if SLURM started this process, else None."""
    environment = cluster_environment_of(trainer)
    return environment if isinstance(environment, SLURMEnvironment) else None


def requeue(trainer: Trainer, signum: int) -> str:
    """Ask SLURM to queue this job again if the signal calls for it, and return a phrase that reports the result.

    The requeue signal calls for it, and so does SIGTERM while the job is running. A job that is cancelled, requeued or
    out of time gets SIGTERM too, but SLURM has then decided already. Call this on one rank.

    Args:
        trainer: Trainer of the run.
        signum: Signal that stopped the run.
    """
    slurm = job_of(trainer)
    if slurm is None or not slurm.auto_requeue or signum not in (slurm.requeue_signal, signal.SIGTERM):
        return ""
    job = _job()
    if signum != slurm.requeue_signal and (state := _state(job)) not in ("", "RUNNING"):
        return f"job {job} is {state} and not queued again: start it again to continue"
    failure = _scontrol("requeue", job)[1]
    if failure is not None:
        return f"job {job} could not be queued again ({failure}): start it again to continue"
    return f"job {job} is queued again and will continue"


def _job() -> str:
    """Return the number of the job; for a job array, ARRAY_TASK."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _state(job: str) -> str:
    """Return the state of a job, such as RUNNING or COMPLETING; an empty text if SLURM does not tell."""
    match = re.search(r"\bJobState=(\w+)", _scontrol("show", "job", job)[0])
    return match[1] if match else ""


def _scontrol(*words: str) -> tuple[str, str | None]:
    """Run scontrol; return its output, and the reason if it failed."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return done.stdout, None if done.returncode == 0 else done.stderr.strip() or f"scontrol left with {done.returncode}"
