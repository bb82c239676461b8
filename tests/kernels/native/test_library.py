import multiprocessing
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from ssmpretrain.kernels import dispatch
from ssmpretrain.kernels.bidirectional_scan import ScanDirection, bidirectional_scan
from ssmpretrain.kernels.cross_scan import cross_selective_scan
from ssmpretrain.kernels.dispatch import choose_implementation
from ssmpretrain.kernels.native import library
from ssmpretrain.kernels.native.levels import LEVELS, cpu_level
from ssmpretrain.kernels.native.private_folder import keep, private_folder
from ssmpretrain.kernels.selective_scan import selective_scan, selective_scan_reference

pytestmark = pytest.mark.skipif(library.load() is None, reason="needs a C++ compiler")

ROOT = Path(__file__).parents[3]

FALLBACK = """
import sys, warnings
import torch
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    from ssmpretrain.kernels.selective_scan import selective_scan, selective_scan_reference
    torch.manual_seed(0)
    inputs = [torch.randn(2, 6, 20), torch.rand(2, 6, 20), -torch.rand(6, 3)]
    inputs += [torch.randn(2, 3, 20), torch.randn(2, 3, 20)]
    ours, theirs = ([t.clone().requires_grad_() for t in inputs] for _ in range(2))
    selective_scan(*ours).sum().backward()
    selective_scan(*ours, impl="cpu")
    selective_scan_reference(*theirs).sum().backward()
for a, b in zip(ours, theirs):
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5)
messages = [str(w.message) for w in caught if "ssmpretrain" in str(w.message)]
assert len(messages) == 1, messages
print(messages[0])
"""


@pytest.fixture(scope="session")
def prebuilt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("prebuilt")
    assert [path.name for path in library.prebuild(folder)] == [f"libssm-{level}.so" for level in LEVELS]
    return folder


def small_results() -> list[torch.Tensor]:
    """Return outputs and gradients of every scan, ragged in every size."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    u, delta, A = normal(2, 21, 70), normal(2, 21, 70), -torch.rand(21, 20, generator=generator)
    scan_inputs = [t.requires_grad_() for t in (u, delta, A, normal(2, 20, 70), normal(2, 20, 70), normal(21))]
    out = selective_scan(*scan_inputs, delta_softplus=True)
    results = [out, *torch.autograd.grad(out.square().sum(), scan_inputs)]
    direction = ScanDirection(
        *(normal(21, 4), normal(21), 0.2 * normal(45, 21), normal(21, 5), normal(21)),
        *(-torch.rand(21, 20, generator=generator), normal(21)),
    )
    inputs = [normal(2, 70, 42).requires_grad_(), *(t.requires_grad_() for t in direction)]
    out = bidirectional_scan(inputs[0], ScanDirection(*inputs[1:]), ScanDirection(*inputs[1:]))
    results += [out, *torch.autograd.grad(out.square().sum(), inputs)]
    inputs = [normal(2, 21, 7, 10), 0.2 * normal(4, 11, 21), normal(4, 21, 5), normal(4, 21)]
    inputs += [-torch.rand(4, 21, 3, generator=generator), normal(4, 21)]
    out = cross_selective_scan(*(t.requires_grad_() for t in inputs))
    return [*results, out, *torch.autograd.grad(out.square().sum(), inputs)]


@pytest.mark.skipif(sys.platform != "linux", reason="levels are read from /proc/cpuinfo")
@pytest.mark.parametrize("level", LEVELS)
def test_every_cpu_level_computes_the_same(level: str, prebuilt: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if list(LEVELS).index(level) < list(LEVELS).index(cpu_level()):
        pytest.skip(f"this CPU does not run {level}")
    expected = small_results()
    native = library.NativeLibrary(prebuilt / f"libssm-{level}.so")
    monkeypatch.setattr(library, "load", lambda: native)
    for ours, theirs in zip(small_results(), expected, strict=True):
        # float32 sums of up to 140 terms in another order
        assert (ours - theirs).norm() < 5e-6 * theirs.norm()


def test_a_library_that_came_with_the_package_is_preferred(
    prebuilt: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "prebuilt").symlink_to(prebuilt)
    monkeypatch.setattr(library, "_HERE", tmp_path)
    native = library.load.__wrapped__()
    assert native is not None and native.path == tmp_path / "prebuilt" / f"libssm-{cpu_level()}.so"


@pytest.mark.parametrize("flags, level", [("sse2", "portable"), ("avx2 fma", "avx2"), ("avx2", "portable")])
def test_cpu_level_follows_the_flags(flags: str, level: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    (tmp_path / "cpuinfo").write_text(f"processor : 0\nflags\t\t: fpu {flags}\n")
    assert cpu_level(tmp_path / "cpuinfo") == level
    (tmp_path / "cpuinfo").write_text("flags : avx512f avx512dq avx512bw avx512vl avx2 fma")
    assert cpu_level(tmp_path / "cpuinfo") == "avx512"
    assert cpu_level(tmp_path / "absent") == "portable"
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert cpu_level(tmp_path / "cpuinfo") == "portable"


def run_fallback(**environment: str) -> str:
    kept = {name: value for name, value in os.environ.items() if name not in ("CXX", "SSMPRETRAIN_NATIVE")}
    command = [sys.executable, "-c", FALLBACK]
    result = subprocess.run(command, cwd=ROOT, env={**kept, **environment}, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_without_a_compiler_one_warning_names_the_remedy_and_answers_are_right(tmp_path: Path) -> None:
    message = run_fallback(PATH=str(tmp_path), SSMPRETRAIN_CACHE=str(tmp_path))
    assert "apt-get install g++" in message


def test_native_code_can_be_switched_off() -> None:
    assert "SSMPRETRAIN_NATIVE=0" in run_fallback(SSMPRETRAIN_NATIVE="0")


def test_a_failing_compiler_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "c++"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho no such target >&2\nexit 1\n')
    broken.chmod(0o755)
    monkeypatch.setenv("CXX", str(broken))
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path))
    with pytest.warns(UserWarning, match=r"did not build with .*Try another compiler.*no such target"):
        assert library.load.__wrapped__() is None


TOY = """
#include "vectors.h"

struct Sum { i64 threads, a, b, result; };
SSM_API int ssm_toy_sum(const int64_t* arguments) {
  const Sum& p = *(const Sum*)arguments;
  *at<i64>(p.result) = p.a + p.b;
  return 0;
}
"""


def test_an_operation_brings_its_functions_in_its_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cpu.h").write_text(TOY)
    monkeypatch.setattr(library, "_OPERATIONS", [tmp_path / "cpu.h"])
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path))
    native = library.load.__wrapped__()
    assert native is not None
    monkeypatch.setattr(library, "load", lambda: native)
    result = torch.zeros(1, dtype=torch.int64)
    library.call("toy_sum", (40, 2, result.data_ptr()))
    assert result.item() == 42


def test_every_operation_with_native_code_is_found() -> None:
    native = library.load()
    assert native is not None
    for name in ("selective_scan", "bidirectional_scan", "cross_selective_scan"):
        assert {name, f"{name}_backward"} <= native._functions.keys()


def _first_build(barrier: Any, results: Any) -> None:
    barrier.wait()
    native = library.load.__wrapped__()
    results.put(None if native is None else str(native.path))


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks")
def test_four_processes_may_build_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "new"))
    context = multiprocessing.get_context("fork")
    barrier, results = context.Barrier(4), context.Queue()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking with threads: the children only build
        processes = [context.Process(target=_first_build, args=(barrier, results)) for _ in range(4)]
        for process in processes:
            process.start()
    paths = {results.get(timeout=120) for _ in processes}
    for process in processes:
        process.join()
    assert len(paths) == 1 and None not in paths
    assert [str(file) for file in (tmp_path / "new").rglob("*.so")] == list(paths)
    assert not list((tmp_path / "new").rglob(".build-*"))


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Where libraries were built; each is a copy of the one that is loaded, as a compiler takes seconds."""
    native, paths = library.load(), []
    assert native is not None
    content = native.path.read_bytes()

    def build(compiler: str, level: str, path: Path, *, link_openmp: bool) -> None:
        paths.append(path)
        path.write_bytes(content)

    monkeypatch.setattr(library, "_build", build)
    return paths


@pytest.fixture
def kept(built: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The library in a cache of its own, as a first start with the loosest umask leaves it."""
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "cache"))
    before = os.umask(0)
    try:
        native = library.load.__wrapped__()
    finally:
        os.umask(before)
    assert native is not None and len(built) == 1
    built.clear()
    return native.path


def test_only_the_user_may_write_where_libraries_are_kept(kept: Path, tmp_path: Path) -> None:
    for path, mode in ((kept, 0o700), (kept.parent, 0o700), (tmp_path / "cache", 0o755)):
        assert path.stat().st_mode & 0o777 == mode and path.stat().st_uid == os.geteuid()


def test_a_library_is_loaded_only_as_it_was_built(kept: Path, built: list[Path]) -> None:
    """Built again: torn, with a flipped bit, writable by others, a link, of another user, without our functions."""
    assert library.load.__wrapped__().path == kept and not built
    content, compiler = kept.read_bytes(), library._find_compiler()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1

    def with_another(then: Callable[[Path], object]) -> None:
        """A good library that is none of ours, under a good name."""
        other = kept.with_name("other.so")
        subprocess.run([compiler, "-shared", "-x", "c", "/dev/null", "-o", other], check=True)
        then(keep(other, kept.parent, kept.stem.rpartition("-")[0]))

    spoil: list[Callable[[], object]] = [
        lambda: (kept.unlink(), kept.write_bytes(b"torn")),  # another file: what is loaded must stay
        lambda: (kept.unlink(), kept.write_bytes(flipped)),
        lambda: kept.chmod(0o777),
        lambda: (kept.rename(kept.with_name("moved")), kept.symlink_to("moved")),
        lambda: with_another(lambda path: path.rename(kept)),
        lambda: with_another(lambda path: kept.unlink()),
    ]
    if os.geteuid() == 0:
        spoil.append(lambda: os.chown(kept, 12345, -1))
    for number, damage in enumerate(spoil, 1):
        damage()
        native = library.load.__wrapped__()
        assert native is not None and native.path == kept and kept.read_bytes() == content and len(built) == number
        assert list(kept.parent.glob("libssm-*")) == [kept]


@pytest.mark.parametrize("spoil", ["writable", "of another user", "a link"])
def test_a_folder_that_others_may_write_to_is_not_used(kept: Path, spoil: str, tmp_path: Path) -> None:
    folder = kept.parent
    if spoil == "writable":
        folder.chmod(0o777)
    elif spoil == "a link":
        folder.rename(tmp_path / "moved")
        folder.symlink_to(tmp_path / "moved")
    elif os.geteuid() == 0:
        os.chown(folder, 12345, -1)
    else:
        pytest.skip("only root can give a folder away")
    with pytest.warns(UserWarning, match=r"native-\d+ .*not loaded from it, but built at each start. Remove it"):
        native = library.load.__wrapped__()
    assert native is not None and kept.parent not in native.path.parents and not native.path.exists()


def test_an_unusable_cache_folder_is_done_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path / "file"))
    assert private_folder() is None


def test_what_a_killed_build_left_is_removed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSMPRETRAIN_CACHE", str(tmp_path))
    folder = private_folder()
    assert folder is not None
    for name, age in ((".build-old", 7200), (".build-new", 10)):
        (folder / name).mkdir()
        os.utime(folder / name, (time.time() - age,) * 2)
    assert private_folder() == folder and [path.name for path in folder.iterdir()] == [".build-new"]


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="reads /proc")
def test_there_is_one_openmp_runtime() -> None:
    small_results()
    paths = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp.so" in line}
    assert len(paths) == 1, paths


def test_cuda_without_triton_runs_the_reference_with_one_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        u = torch.empty(1, 6, 10, device="cuda")
    assert choose_implementation("selective_scan", u, "auto") == "triton"
    monkeypatch.setattr(dispatch, "_HAS_TRITON", False)
    with pytest.warns(UserWarning, match="Triton is not installed; running the reference"):
        assert choose_implementation("selective_scan", u, "auto") == "reference"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert choose_implementation("selective_scan", u, "auto") == "reference"
    with pytest.raises(ValueError, match="impl='triton' needs the package triton"):
        choose_implementation("selective_scan", u, "triton")


def test_out_of_memory_is_said() -> None:
    native = library.load()
    assert native is not None
    huge = 1 << 55
    sizes = (1, huge, 16, 1, 1, 1, 0, 0, 64)
    with pytest.raises(MemoryError, match="selective_scan: no memory for its working buffers"):
        native.call("selective_scan", (*sizes, *[0] * 60))


def test_chosen_by_default_on_the_cpu() -> None:
    u = torch.randn(1, 6, 10)
    assert choose_implementation("selective_scan", u, "auto") == "native"
    assert choose_implementation("selective_scan", u.double(), "cpu") == "reference"
    inputs = (u, u.abs(), -torch.rand(6, 2), torch.randn(1, 2, 10), torch.randn(1, 2, 10))
    torch.testing.assert_close(selective_scan(*inputs), selective_scan_reference(*inputs))
