"""A process in which packages are missing: it finds neither their modules nor their metadata."""

import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import ssmpretrain

ROOT = Path(ssmpretrain.__file__).parents[1]

_WITHOUT = """
import runpy, sys
missing = {missing!r}
class Bare:
    def __init__(self, finder):
        self.finder = finder
    def find_spec(self, name, path=None, target=None):
        return None if name.split(".")[0] in missing else self.finder.find_spec(name, path, target)
    def find_distributions(self, context):
        found = getattr(self.finder, "find_distributions", lambda _: ())(context)
        return [one for one in found if one.metadata["Name"].lower().replace("-", "_") not in missing]
    def __getattr__(self, name):
        return getattr(self.finder, name)
sys.meta_path[:] = [Bare(finder) for finder in sys.meta_path]
sys.argv = sys.argv[1:]
"""


def bare_process(
    missing: Sequence[str], run: str, *words: object, cwd: Path = ROOT
) -> subprocess.CompletedProcess[str]:
    """Run a module (`-m NAME`) or a script in a process that lacks packages, and return what it printed.

    Args:
        missing: Names of the packages, as one imports them.
        run: Name of a module, or path of a script that ends in .py.
        words: Arguments of the program.
        cwd: Folder of the process.
    """
    start = f"runpy.run_path({run!r}, run_name='__main__')"
    if not run.endswith(".py"):
        start = f"runpy.run_module({run!r}, run_name='__main__', alter_sys=True)"
    return subprocess.run(
        [sys.executable, "-c", _WITHOUT.format(missing=tuple(missing)) + start, run, *map(str, words)],
        cwd=cwd, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
