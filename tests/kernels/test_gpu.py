"""Every operation at the sizes of real encoders on a GPU, against the definition in float64: `pytest -m gpu`.

The tests in `triton/` run there too, on small odd shapes; these are about what only real sizes show. The cases and the
comparison are those of the benchmarks: the last sequence of a batch is compared, output and every gradient.
"""

import math
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks.case import OpCase
from benchmarks.cases import all_cases
from benchmarks.checks import Check, OpCheck, as_tuple
from benchmarks.operations.add_norm import add_norm_case
from benchmarks.operations.bidirectional_scan import bidirectional_scan_case
from benchmarks.operations.causal_conv1d import causal_conv1d_case
from benchmarks.operations.cross_selective_scan import cross_selective_scan_case
from benchmarks.operations.selective_scan import selective_scan_case
from benchmarks.operations.ssd import ssd_case
from benchmarks.operations.vim_block import vim_block_case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU here"),
]

DTYPES = [torch.bfloat16, torch.float32]
WIDTHS = {"Ti": 192, "S": 384}  # D of Vim
BATCHES = {197: 64, 1025: 8, 6085: 1}  # tokens: sequences; one launch over all channels, and chunks in parallel
STAGES = {96: 56, 192: 28, 384: 14, 768: 7}  # VMamba-T: channels and side of the map
FAR = 2**31  # the first offset that int32 does not hold


def vim_cases(dtype: torch.dtype, size: str, L: int) -> list[OpCase]:
    D, B = WIDTHS[size], BATCHES[L]
    return [
        selective_scan_case(size, dtype, E=2 * D, L=L, B=B),
        bidirectional_scan_case(size, dtype, E=2 * D, R=D // 16, L=L, B=B),
        causal_conv1d_case(size, dtype, E=2 * D, L=L, B=B),
        add_norm_case(size, dtype, D=D, L=L, B=B),
        vim_block_case(size, dtype, D=D, L=L, B=B),
        ssd_case(size, dtype, H=2 * D // 64, L=L, B=B),
    ]


def vmamba_cases(dtype: torch.dtype) -> list[OpCase]:
    tiny = [cross_selective_scan_case(f"E={E}", dtype, E=E, H=H, R=E // 16, N=1, B=4) for E, H in STAGES.items()]
    first = cross_selective_scan_case("v0 stage 1", dtype, E=192, H=56, R=6, N=16, B=1)
    return [*tiny, first, cross_selective_scan_case("v0 stage 3", dtype, E=768, H=14, R=24, N=16, B=4)]


def small_cases(dtype: torch.dtype) -> list[OpCase]:
    return [case for case in all_cases({"op"}, [dtype], tiny=True) if isinstance(case, OpCase)]


def by_name(value: object) -> str | None:
    return f"{value.name} {value.dtype}".replace("torch.", "") if isinstance(value, OpCase) else None


def check(case: OpCase, run: Callable[..., object] | None = None, *, repeat: bool = True) -> Check:
    random = torch.Generator("cuda").manual_seed(0)
    return OpCheck(case, random).of(run or case.run, repeat)


REAL = [
    case
    for dtype in DTYPES
    for case in [*(c for size in WIDTHS for L in BATCHES for c in vim_cases(dtype, size, L)), *vmamba_cases(dtype)]
]


@pytest.mark.parametrize("case", REAL, ids=by_name)
def test_real_sizes_agree_with_the_reference_and_repeat_to_the_bit(case: OpCase) -> None:
    result = check(case)
    assert result.ok, result.errors
    assert result.deterministic


@pytest.mark.parametrize("L", BATCHES)
def test_a_full_gpu_agrees_with_the_reference(L: int) -> None:
    """Batches for which every launch runs a sequence from end to end, as the benchmarks have them."""
    case = selective_scan_case("Ti", torch.bfloat16, E=384, L=L)
    result = check(case)
    assert result.ok, result.errors
    assert result.deterministic


def far(tensor: Tensor, axis: int) -> Tensor:
    """The same numbers with a stride along one axis that puts its last index at an offset of 2^31 or more."""
    step = FAR // (tensor.shape[axis] - 1) + 1
    strides = [*tensor.stride()]
    strides[axis] = step
    storage = tensor.new_empty(sum((n - 1) * s for n, s in zip(tensor.shape, strides, strict=True)) + 1)
    return storage.as_strided(tensor.shape, strides).copy_(tensor)


def spread(case: OpCase, axis: int) -> OpCase:
    """The case with every input but the parameters spread out in memory along an axis."""

    def make(random: torch.Generator) -> dict[str, Tensor]:
        inputs = case.make(random)
        return {name: t if name in case.parameters else far(t, axis) for name, t in inputs.items()}

    return replace(case, make=make)


def test_far_spreads_a_tensor_without_changing_it() -> None:
    tensor = torch.randn(3, 5, 7, device="cuda", dtype=torch.bfloat16).mT
    spread_out = far(tensor, 0)
    assert 2 * spread_out.stride(0) >= FAR
    assert torch.equal(spread_out, tensor)


@pytest.mark.parametrize("along", ["batch", "tokens"])
@pytest.mark.parametrize("case", small_cases(torch.bfloat16), ids=by_name)
def test_strides_reach_beyond_2_to_the_31_elements(case: OpCase, along: str) -> None:
    need_memory(60)
    result = check(spread(case, 0 if along == "batch" else case.token_axis))
    assert result.ok, result.errors


LONG = 2**20 + 1  # sequences of 2^11 elements: the last one begins at 2^31
LARGE = [
    selective_scan_case("large", torch.bfloat16, E=128, L=16, N=1, B=LONG),
    causal_conv1d_case("large", torch.bfloat16, E=128, L=16, B=LONG),
    add_norm_case("large", torch.bfloat16, D=128, L=16, B=LONG),
    bidirectional_scan_case("large", torch.bfloat16, E=128, R=4, L=16, N=1, B=LONG // 2 + 1),
    ssd_case("large", torch.bfloat16, H=2, P=64, N=16, L=16, B=LONG),
    cross_selective_scan_case("large", torch.bfloat16, E=128, H=4, R=4, N=1, B=LONG),
]


@pytest.mark.parametrize("case", LARGE, ids=by_name)
def test_tensors_of_more_than_2_to_the_31_elements(case: OpCase) -> None:
    need_memory(120)
    result = check(case, repeat=False)
    assert result.ok, result.errors


def need_memory(gib: int) -> None:
    torch.cuda.empty_cache()
    free = torch.cuda.mem_get_info()[0] / 2**30
    if free < gib:
        pytest.skip(f"needs {gib} GiB of GPU memory, {free:.0f} are free")


def kept_at_most(case: OpCase) -> int:
    """Bytes that the forward pass may leave behind, besides inputs and outputs."""
    B, N, R = (case.sizes.get(name, 0) for name in "BNR")
    L = case.sizes.get("L") or case.sizes["H"] * case.sizes["W"]
    E = case.sizes.get("E", 0)
    routes = {"bidirectional_scan": 2, "cross_selective_scan": 4}.get(case.op, 1)
    if case.op == "causal_conv1d":
        return 0
    if case.op == "ssd":
        chunks = math.ceil(L / 256)
        return 2 * B * chunks * E * N * 4 if chunks > 1 else 0
    if case.op == "add_norm":
        return B * L * 4  # a reciprocal root mean square per token
    chunk = 16 if N == 1 else 64  # steps from one kept state to the next
    states = B * routes * math.ceil(L / chunk) * E * N * 4
    projected = 0 if case.op == "selective_scan" else B * L * routes * (R + 2 * N + 4) * 4  # dt, B and C, aligned
    return states + projected


@pytest.mark.parametrize("case", [c for c in REAL if c.suite == "op" and c.dtype == torch.bfloat16], ids=by_name)
def test_the_forward_pass_keeps_no_more_than_documented(case: OpCase) -> None:
    inputs = case.make(torch.Generator("cuda").manual_seed(0))
    leaves = {name: t.detach().requires_grad_() for name, t in inputs.items()}
    case.run(**leaves)  # compiles
    for run, limit in ((case.run, kept_at_most(case)), (torch.no_grad()(case.run), 0)):
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        outputs = as_tuple(run(**leaves))
        kept = torch.cuda.memory_allocated() - before - sum(y.nbytes for y in outputs)
        assert kept <= limit + 2**16  # each allocation is rounded up to 512 bytes
        del outputs


@pytest.mark.parametrize("case", small_cases(torch.bfloat16), ids=by_name)
def test_compiles_in_one_graph(case: OpCase) -> None:
    torch.compiler.reset()
    compiled = torch.compile(lambda **named: case.run(**named), fullgraph=True)
    result = check(case, compiled, repeat=False)
    assert result.ok, result.errors


SANITIZED = """
import torch
from benchmarks import cases, checks
for case in cases.all_cases({"op"}, [torch.bfloat16, torch.float32], tiny=True):
    result = checks.OpCheck(case, torch.Generator("cuda").manual_seed(0)).of(case.run, repeat=False)
    assert result.ok, (case.name, result.errors)
"""


def test_the_memory_checker_finds_nothing() -> None:
    tool = shutil.which("compute-sanitizer", path=f"{os.environ['PATH']}:/usr/local/cuda/bin")
    if tool is None:
        pytest.skip("compute-sanitizer is not installed")
    command = [tool, "--tool", "memcheck", "--target-processes", "application-only", "--error-exitcode", "99"]
    # without PyTorch's cache every tensor is an allocation of its own, with bounds that the tool can see
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    done = subprocess.run(
        [*command, sys.executable, "-c", SANITIZED],
        capture_output=True, text=True, env=environment, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    if "Device not supported" in done.stdout:
        pytest.skip("compute-sanitizer does not support this machine")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
