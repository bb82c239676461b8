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
    """Return Lightning's view of the job, if SLURM started this process."""
    environment = cluster_environment_of(trainer)
    return environment if isinstance(environment, SLURMEnvironment) else None


def requeue(trainer: Trainer, signum: int) -> str:
    """Ask SLURM to queue this job again if the signal calls for that; return what was done, as a phrase.

    The requeue signal does, and so does SIGTERM while the job is running: a job that is cancelled, requeued or out of
    time gets SIGTERM too, but SLURM has then decided already.

    Args:
        trainer: Of the run; call on one rank.
        signum: What stopped the run.
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
    """Return the job's number; of an array, with that of the task."""
    if array := os.environ.get("SLURM_ARRAY_JOB_ID"):
        return f"{array}_{os.environ['SLURM_ARRAY_TASK_ID']}"
    return os.environ["SLURM_JOB_ID"]


def _state(job: str) -> str:
    """Return the state of a job: RUNNING, COMPLETING, ...; empty if SLURM does not say."""
    match = re.search(r"\bJobState=(\w+)", _scontrol("show", "job", job)[0])
    return match[1] if match else ""


def _scontrol(*words: str) -> tuple[str, str | None]:
    """Return what scontrol printed, and the reason if it failed."""
    try:
        done = subprocess.run(["scontrol", *words], capture_output=True, text=True, timeout=_PATIENCE)
    except (OSError, subprocess.TimeoutExpired) as error:
        return "", str(error)
    return done.stdout, None if done.returncode == 0 else done.stderr.strip() or f"scontrol left with {done.returncode}"
