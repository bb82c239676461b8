"""Start a job of tests/support, or any command, in processes of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

_ROOT = Path(__file__).parents[2]


def start(*words: object, timeout: float = 300) -> subprocess.CompletedProcess[str]:
    """Run Python with `words`; the package and tests/support can be imported there."""
    paths = os.pathsep.join([str(_ROOT), str(_ROOT / "tests/support")])
    here = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, env=here)


def report_of(job: str, *words: object) -> dict[str, Any]:
    """What the job prints after REPORT, and under "stderr" what it says to people."""
    done = start(Path(__file__).with_name(job), *words)
    lines = [line for line in done.stdout.splitlines() if line.startswith("REPORT")]
    assert done.returncode == 0 and len(lines) == 1, done.stdout[-2000:] + done.stderr[-4000:]
    report: dict[str, Any] = json.loads(lines[0].removeprefix("REPORT"))
    return {**report, "stderr": done.stderr}
