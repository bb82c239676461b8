"""CPU levels: the vector instructions that a library is built for, and the best level of this CPU."""

import platform
from pathlib import Path

LEVELS: dict[str, tuple[str, ...]] = {
    "avx512": (
        *("-mavx2", "-mfma", "-mavx512f", "-mavx512dq", "-mavx512bw", "-mavx512vl"),
        "-mprefer-vector-width=512",
    ),
    "avx2": ("-mavx2", "-mfma"),
    "portable": (),
}
"""Compiler flags of each x86-64 level, best first. Other architectures build "portable": NEON comes with arm64."""

_NEEDED = {
    "avx512": {"avx512f", "avx512dq", "avx512bw", "avx512vl", "avx2", "fma"},
    "avx2": {"avx2", "fma"},
    "portable": set[str](),
}


def cpu_level(cpuinfo: Path = Path("/proc/cpuinfo")) -> str:
    """Return the best level that this CPU and its operating system run.

    Args:
        cpuinfo: Linux's description of the CPU; where there is none, the level is "portable".
    """
    if platform.machine().lower() not in ("x86_64", "amd64"):
        return "portable"
    try:
        lines = cpuinfo.read_text().splitlines()
    except OSError:
        return "portable"
    flags = next((set(line.partition(":")[2].split()) for line in lines if line.startswith("flags")), set[str]())
    return next(level for level in LEVELS if flags >= _NEEDED[level])
