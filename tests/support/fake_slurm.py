"""A scheduler for tests, as much of SLURM as our example needs: sbatch, srun and scontrol for one node.

Commands lie in `folder/bin`; `folder/calls.txt` lists what scontrol was asked, `folder/tasks.txt` the process ids of
the last srun, `folder/state` what the job's state is said to be.
"""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

JOB = "4242"
_SRUN = """
import os, signal, subprocess

signal.signal(signal.SIGTERM, signal.SIG_IGN)
tasks = []
for number in range(int(os.environ["SLURM_NTASKS"])):
    place = {"SLURM_PROCID": str(number), "SLURM_LOCALID": str(number), "SLURM_NODEID": "0"}
    tasks.append(subprocess.Popen(sys.argv[1:], env={**os.environ, **place}))
(folder / "tasks.txt").write_text(" ".join(str(task.pid) for task in tasks))
sys.exit(max(task.wait() for task in tasks))
"""
_SCONTROL = """
with (folder / "calls.txt").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if sys.argv[1] == "requeue":
    (folder / "requeue").touch()
else:
    print("JobId=1 JobState=" + (folder / "state").read_text() + " Restarts=0")
"""


class FakeSlurm:
    """One node.

    Attributes:
        calls: What scontrol was asked.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        (folder / "bin").mkdir(parents=True)
        self.set_state("RUNNING")
        head = f"#!{sys.executable}\nimport pathlib, sys\nfolder = pathlib.Path({str(folder)!r})\n"
        commands = {"srun": head + _SRUN, "scontrol": head + _SCONTROL}
        commands["python"] = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        for name, text in commands.items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)

    def set_state(self, state: str) -> None:
        """Let `scontrol show job` say that the job is in this state."""
        (self.folder / "state").write_text(state)

    @property
    def calls(self) -> list[str]:
        path = self.folder / "calls.txt"
        return path.read_text().splitlines() if path.exists() else []

    def environment(self, script: Path) -> dict[str, str]:
        """What sbatch gives a job, by the options in the script."""
        options = dict(re.findall(r"^#SBATCH --([\w-]+)=(\S+)", script.read_text(), flags=re.MULTILINE))
        tasks = options["ntasks-per-node"]
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "MASTER_"))}
        return {
            **ours,
            "PATH": f"{self.folder / 'bin'}{os.pathsep}{os.environ['PATH']}",
            "SLURM_JOB_ID": JOB,
            "SLURM_JOB_NAME": options["job-name"],
            "SLURM_NNODES": options["nodes"],
            "SLURM_NODELIST": "localhost",
            "SLURM_NTASKS": str(int(options["nodes"]) * int(tasks)),
            "SLURM_NTASKS_PER_NODE": tasks,
        }

    def start(self, script: Path, *words: str, **options: object) -> "subprocess.Popen[str]":
        """Run the job once."""
        (self.folder / "tasks.txt").unlink(missing_ok=True)
        command = ["bash", str(script), *words]
        return subprocess.Popen(command, env=self.environment(script), text=True, start_new_session=True, **options)

    def signal_tasks(self, signum: signal.Signals, *numbers: int) -> None:
        """Signal tasks of the job that runs."""
        pids = (self.folder / "tasks.txt").read_text().split()
        for number in numbers:
            os.kill(int(pids[number]), signum)

    def asked_to_requeue(self) -> bool:
        """Whether the job that has ended is to run again; asked once."""
        asked = (self.folder / "requeue").exists()
        (self.folder / "requeue").unlink(missing_ok=True)
        return asked


def wait_until(happened, seconds: float = 120) -> None:  # type: ignore[no-untyped-def]
    """Return as soon as `happened()`."""
    until = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.1)
