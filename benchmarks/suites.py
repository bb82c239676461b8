"""One case of the op, block and model suites: checked, then timed beside its comparators."""

from __future__ import annotations

import gc
import math
import traceback
from collections.abc import Callable, Iterator
from functools import cache
from itertools import cycle
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import comparators
from benchmarks.case import BOTH, FORWARD, INFERENCE, Case, Function, ModelCase, OpCase
from benchmarks.checks import Check, OpCheck, as_tuple, check_model
from benchmarks.measure import allocated, first_line, peak_device_memory, side_by_side
from benchmarks.networks import flops_of, images, inference, network, training_step

OURS = "ssmpretrain"
_L2_BYTES = 60 * 2**20  # the largest L2 cache we know, an H200's
_MOST_SETS = 8

Row = dict[str, Any]


class Contender(NamedTuple):
    """An implementation that takes part in a comparison.

    build: Function of a mode that does all work before the timing, and returns the function to time.
    check: Result of the comparison with the truth, if there was one.
    absent: Reason why the implementation does not take part; empty if it does.
    flops: Function of a mode that counts the operations of a batch in matrix products; None if nobody counts them.
    """

    name: str
    build: Callable[[str], Callable[[], Any]]
    check: Check | None = None
    absent: str = ""
    flops: Callable[[str], int] | None = None


def rows(case: Case, device: torch.device, ceilings: dict[str, float], vs: set[str] | None) -> list[Row]:
    """Check a case and time it beside its comparators; return a row for each mode and implementation.

    Args:
        case: Case to measure.
        device: Device of the measurement.
        ceilings: Result of `ceilings.measure`; empty if they are unknown.
        vs: Beginnings of the names of comparators to run; None for all.
    """
    found: list[Row] = []
    try:
        contenders = _op_contenders(case, device) if isinstance(case, OpCase) else _model_contenders(case, device)
        wanted = [c for c in contenders if c.name == OURS or vs is None or c.name.startswith(tuple(vs))]
        for mode in case.modes:
            found += _mode_rows(case, mode, wanted, device, ceilings)
    except Exception as reason:  # a broken case must not stop the others
        traceback.print_exc()
        found.append(row(case, case.modes[0], OURS) | {"ok": False, "why": f"{type(reason).__name__}: {reason}"})
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return found


def _mode_rows(
    case: Case, mode: str, contenders: list[Contender], device: torch.device, ceilings: dict[str, float]
) -> Iterator[Row]:
    ours = contenders[0]
    assert ours.check is not None
    if not ours.check.ok:
        yield row(case, mode, OURS) | checked(ours.check)
        return
    runs: dict[str, Callable[[], Any]] = {}
    peaks: dict[str, int | None] = {}
    out: dict[str, str] = {}
    for name, build, check, absent, _ in contenders:
        if absent or (check is not None and not check.ok):
            out[name] = absent or f"not timed, because it is wrong: {check.worst}"  # type: ignore[union-attr]
            continue
        before = allocated(device)
        try:
            runs[name] = build(mode)
            first = runs[name]()  # compiles, and makes gradients and optimizer state
            if not all(tensor.isfinite().all() for tensor in as_tuple(first)):
                raise RuntimeError("what it computes at full size is not finite")
            del first
            peaks[name] = peak_device_memory(device, runs[name], before)
        except RuntimeError as reason:  # out of memory, or no attention kernel for this shape
            if name == OURS:
                raise
            runs.pop(name, None)
            out[name] = first_line(reason)
    times, failed = side_by_side(device, runs)
    out |= failed
    for name, _, check, _, flops in contenders:
        one = row(case, mode, name) | ({} if check is None else checked(check))
        if name in out:
            yield one | {"absent": out[name]}
            continue
        one |= {"ms": times[name], "peak_bytes": peaks[name]}
        seconds = times[name]["median"] * 1e-3
        if isinstance(case, ModelCase):
            yield one | _model_work(case, seconds, ceilings, 0 if flops is None else flops(mode))
        else:
            yield one | _work(case, mode, ours.check, seconds, ceilings)


def _op_contenders(case: OpCase, device: torch.device) -> list[Contender]:
    random = torch.Generator(device).manual_seed(int(torch.randint(2**31, ())))
    checker = OpCheck(case, random)
    contenders = [Contender(OURS, _op_builder(case, random, lambda inputs: inputs, case.run), checker.of(case.run))]
    for other in comparators.of_op(case):
        present, why = other.available()
        check = None
        try:
            if present:
                check = checker.of(lambda _o=other, **named: _o.run(**_o.arrange(named)), repeat=False)
        except Exception as reason:  # packages of others fail in many ways
            why = f"fails: {first_line(reason)}"
        contenders.append(Contender(other.name, _op_builder(case, random, other.arrange, other.run), check, why))
    return contenders


def _op_builder(
    case: OpCase,
    random: torch.Generator,
    arrange: Callable[[dict[str, Tensor]], dict[str, Tensor]],
    run: Function,
) -> Callable[[str], Callable[[], Any]]:
    def build(mode: str) -> Callable[[], Any]:
        first = arrange(case.make(random))
        sets = [first, *(arrange(case.make(random)) for _ in range(sets_of_inputs(_bytes(first)) - 1))]
        if mode == FORWARD:
            turn = cycle(sets)
            return torch.no_grad()(lambda: run(**next(turn)))
        leaves = [{name: value.detach().requires_grad_() for name, value in inputs.items()} for inputs in sets]
        with torch.no_grad():
            shapes = as_tuple(run(**leaves[0]))
        turns = cycle([(named, [torch.randn_like(y) for y in shapes]) for named in leaves])

        def both() -> Any:
            named, grads = next(turns)
            return torch.autograd.grad(as_tuple(run(**named)), list(named.values()), grads)

        return both

    return build


def _model_contenders(case: ModelCase, device: torch.device) -> list[Contender]:
    pixels, B = case.sizes["px"], case.sizes["B"]
    batch_bytes = images(1, pixels).nbytes * B

    def builder(name: str, rival: comparators.Rival) -> Callable[[str], Callable[[], Any]]:
        def build(mode: str) -> Callable[[], Any]:
            batches = [images(B, pixels, device) for _ in range(sets_of_inputs(batch_bytes))]
            start = inference if mode == INFERENCE else training_step
            encoder = network(name, pixels).to(device)
            run = start(torch.compile(encoder) if rival.compiled else encoder, batches, case.dtype)  # type: ignore[arg-type]

            def inside() -> Any:
                with rival.context():
                    return run()

            return inside

        return build

    @cache
    def flops(name: str, mode: str) -> int:
        start = inference if mode == INFERENCE else training_step
        return B * flops_of(start(network(name, pixels).to(device), [images(1, pixels, device)], case.dtype))

    def contender(name: str, encoder: str, rival: comparators.Rival, check: Check | None = None) -> Contender:
        return Contender(name, builder(encoder, rival), check, flops=lambda mode: flops(encoder, mode))

    ours = contender(OURS, case.encoder, comparators.Rival(), check_model(case, device))
    return [ours, *(contender(name, case.rival, rival) for name, rival in comparators.of_model(case).items())]


def sets_of_inputs(size: int) -> int:
    """Return the number of input sets that must take turns so that none is in the L2 cache at its next turn."""
    return min(_MOST_SETS, math.ceil(3 * _L2_BYTES / size))


def _bytes(tensors: dict[str, Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors.values())


def row(case: Case, mode: str, name: str) -> Row:
    """Return the entries of a row that name a case, a mode and an implementation."""
    return {
        "suite": case.suite, "op": case.op, "case": case.name, "mode": mode, "dtype": str(case.dtype).split(".")[1],
        "sizes": case.sizes, "impl": name,
    }  # fmt: skip


def checked(check: Check) -> Row:
    """Return the entries of a row that give the result of a check."""
    found: Row = {"ok": check.ok, "rel_err": check.errors, "tolerance": check.tolerance}
    if check.deterministic is not None:
        found["deterministic"] = check.deterministic
    return found if check.ok else found | {"why": check.worst}


def _model_work(case: ModelCase, seconds: float, ceilings: dict[str, float], flops: int) -> Row:
    """Compute the images per second, and the share of the matrix product's ceiling that is used (MFU)."""
    achieved = {"images_s": case.sizes["B"] / seconds}
    if flops and ceilings:
        achieved["mfu"] = flops / seconds / (ceilings["gemm_TFs"] * 1e12)
    return {"work": {"flops": flops}, "achieved": achieved}


def _work(case: OpCase, mode: str, ours: Check, seconds: float, ceilings: dict[str, float]) -> Row:
    """Compute the unavoidable state updates and bytes, and compare the time with the time they take at the ceilings.

    A backward pass computes every decay once more. Bytes are inputs, outputs and their gradients. Each moves once; with
    a backward pass the inputs move twice. Products of matrices are not counted.
    """
    updates = case.updates * (1 if mode == FORWARD else 2)
    size = ours.input_bytes + ours.output_bytes
    if mode == BOTH:
        size += 2 * ours.input_bytes + ours.output_bytes
    work = {"updates": updates, "bytes": size}
    rates = {"Gupdates_s": updates / seconds / 1e9, "TBs": size / seconds / 1e12}
    if not ceilings:
        return {"work": work, "achieved": rates}
    floors = {"exp2": updates / (ceilings["exp2_Ts"] * 1e12), "bytes": size / (ceilings["copy_TBs"] * 1e12)}
    kind = max(floors, key=lambda name: floors[name])
    floor = {"pct_floor": 100 * floors[kind] / seconds, "floor": kind, "floor_ms": floors[kind] * 1e3}
    return {"work": work, "achieved": rates | floor}
