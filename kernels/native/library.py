"""The native library: build it, load it, call its functions. If that is impossible, one warning names the remedy."""

import contextlib
import ctypes
import functools
import hashlib
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import warnings
from array import array
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from ssmpretrain.base.errors import OutOfMemory
from ssmpretrain.kernels.native.levels import LEVELS, cpu_level
from ssmpretrain.kernels.native.private_folder import is_kept, keep, private_folder

_HERE = Path(__file__).resolve().parent
_OPERATIONS = sorted(_HERE.parent.glob("*/cpu.h"))  # the functions of each operation, in its own folder
_SHARED = sorted(_HERE.glob("*.h"))
# never -ffast-math: reassociation would delete the rounding trick in exp2
_FLAGS = (
    *("-std=c++17", "-O3", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast"),
    *("-fno-exceptions", "-fno-rtti", "-fvisibility=hidden", "-Wno-unknown-pragmas"),
)

CHUNK = 64
"""Steps between two states that the forward pass keeps for the backward pass."""


class NativeLibrary:
    """The loaded functions. Each takes one sequence of integers, the fields of its struct in the C++ source."""

    def __init__(self, path: Path) -> None:
        handle = ctypes.CDLL(str(path), mode=os.RTLD_NOW)
        self.path = path
        self._functions = {}
        for name in _function_names():
            try:
                function = handle[f"ssm_{name}"]
            except AttributeError as error:
                raise OSError(f"{path} is no library of these kernels: {error}") from error
            function.argtypes, function.restype = [ctypes.c_void_p], ctypes.c_int
            self._functions[name] = function

    def call(self, name: str, arguments: Sequence[int]) -> None:
        """Run a function to its end, on as many threads as the first argument says."""
        packed = array("q", arguments)
        if self._functions[name](packed.buffer_info()[0]) != 0:
            raise OutOfMemory(f"{name}: no memory for its working buffers. Use a smaller batch or a shorter sequence.")


def call(name: str, arguments: Sequence[int]) -> None:
    """Run a function of the library on as many threads as PyTorch uses.

    Args:
        name: The function, without `ssm_`.
        arguments: The fields of its struct after the number of threads.

    Raises:
        MemoryError: If there is no memory for its working buffers.
    """
    library = load()
    assert library is not None, "the choice in api.py comes first"
    library.call(name, (torch.get_num_threads(), *arguments))


def _is_available() -> bool:
    """Return whether the native library can be used; build it first if needed."""
    return load() is not None


is_available: Callable[[], bool] = torch.compiler.assume_constant_result(_is_available)  # type: ignore[no-untyped-call]


@functools.cache
def load() -> NativeLibrary | None:
    """Return the library: the prebuilt one, else the one in the cache, else one built now.

    Returns:
        None if SSMPRETRAIN_NATIVE=0, or after a warning if there is no compiler or the build fails.
    """
    if os.environ.get("SSMPRETRAIN_NATIVE") == "0":
        _warn("the native CPU kernels are switched off by SSMPRETRAIN_NATIVE=0. Unset it to have them.")
        return None
    level = cpu_level()
    prebuilt = _HERE / "prebuilt" / f"libssm-{level}.so"
    if prebuilt.exists():
        try:
            return NativeLibrary(prebuilt)
        except OSError:
            pass  # made for another system, or without its OpenMP: build our own
    compiler = _find_compiler()
    if compiler is None:
        _warn("no C++ compiler was found. Install one (`apt-get install g++`, or set CXX to yours) and start again.")
        return None
    try:
        return _load_or_build(compiler, level)
    except (OSError, subprocess.SubprocessError) as error:
        output = getattr(error, "stderr", None) or str(error)
        _warn(
            f"the native CPU kernels did not build with {compiler}. Try another compiler through CXX. {output[-600:]}"
        )
        return None


def prebuild(directory: Path) -> list[Path]:
    """Build the library for every x86-64 CPU level into a folder, for a wheel; return the files.

    Raises:
        RuntimeError: If there is no C++ compiler.
        subprocess.CalledProcessError: If a build fails.
    """
    compiler = _find_compiler()
    if compiler is None:
        raise RuntimeError("prebuild: a C++ compiler is needed; found none. Install g++ or set CXX.")
    directory.mkdir(parents=True, exist_ok=True)
    built = []
    for level in LEVELS:
        path = directory / f"libssm-{level}.so"
        _build(compiler, level, path, link_openmp=False)
        built.append(path)
    return built


def _function_names() -> list[str]:
    """Return the names of the functions that the sources export, without `ssm_`."""
    return [
        name for header in _OPERATIONS for name in re.findall(r"^SSM_API int ssm_(\w+)\(", header.read_text(), re.M)
    ]


def _warn(reason: str) -> None:
    warnings.warn(f"ssmpretrain: {reason} Until then scans run in plain PyTorch, several times slower.", stacklevel=3)


def _find_compiler() -> str | None:
    candidates = (os.environ.get("CXX"), "g++", "c++", "clang++")
    return next((path for name in candidates if name and (path := shutil.which(name))), None)


def _load_or_build(compiler: str, level: str) -> NativeLibrary:
    name = f"libssm-{level}-{_fingerprint(compiler, level)}"
    folder = private_folder()
    if folder is None:  # for this process alone; a library that is loaded needs no file
        with tempfile.TemporaryDirectory(prefix="ssmpretrain-") as place:
            return _build_and_load(compiler, level, Path(place), name)
    for path in folder.glob(f"{name}-*.so"):
        try:
            if is_kept(path):
                return NativeLibrary(path)
        except OSError:
            pass  # of another system, or not ours
        with contextlib.suppress(OSError):
            path.unlink()
    return _build_and_load(compiler, level, folder, name)


def _build_and_load(compiler: str, level: str, folder: Path, name: str) -> NativeLibrary:
    # torch has loaded an OpenMP runtime and made its symbols global. Binding to that one keeps a single pool of
    # threads; a second pool would fight it for the cores.
    path = _build_and_keep(compiler, level, folder, name, link_openmp=False)
    try:
        return NativeLibrary(path)
    except OSError:
        path.unlink(missing_ok=True)
        return NativeLibrary(_build_and_keep(compiler, level, folder, name, link_openmp=True))


def _build_and_keep(compiler: str, level: str, folder: Path, name: str, *, link_openmp: bool) -> Path:
    with tempfile.TemporaryDirectory(prefix=".build-", dir=folder) as place:
        built = Path(place) / "libssm.so"
        _build(compiler, level, built, link_openmp=link_openmp)
        return keep(built, folder, name)


def _fingerprint(compiler: str, level: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True).stdout
    parts = [source.read_bytes() for source in (*_OPERATIONS, *_SHARED)]
    parts += [" ".join((*_FLAGS, *LEVELS.get(level, ()))).encode(), version.encode(), platform.machine().encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def _build(compiler: str, level: str, path: Path, *, link_openmp: bool) -> None:
    """Compile to a temporary file, then rename it. Another process sees either no library or a whole one."""
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        source, compiled, linked = (f"{folder}/{name}" for name in ("ssm.cpp", "ssm.o", "libssm.so"))
        Path(source).write_text("".join(f'#include "{header}"\n' for header in _OPERATIONS))
        flags = (*_FLAGS, *LEVELS.get(level, ()))
        openmp = _openmp_flags(compiler, folder)
        _run(compiler, *flags, *openmp, "-I", str(_HERE), "-c", source, "-o", compiled)
        undefined = ("-undefined", "dynamic_lookup") if sys.platform == "darwin" else ()
        _run(compiler, "-shared", *undefined, compiled, *(openmp if link_openmp else ()), "-o", linked)
        os.replace(linked, path)


def _openmp_flags(compiler: str, folder: str) -> tuple[str, ...]:
    """Return the OpenMP flag if the compiler has it. Apple's Clang does not: the library then runs on one thread."""
    probe = Path(folder) / "probe.cpp"
    probe.write_text("#include <omp.h>\n")
    result = subprocess.run([compiler, "-fopenmp", "-fsyntax-only", str(probe)], capture_output=True, check=False)
    return ("-fopenmp",) if result.returncode == 0 else ()


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True, timeout=300)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] != "--prebuild":
        sys.exit("usage: python -m ssmpretrain.kernels.native.library --prebuild FOLDER")
    for file in prebuild(Path(sys.argv[2])):
        print(file)
