"""Is what is about to be timed right? Outputs and every gradient at full size, against the definition in float64.

The launch that is checked is the one that is timed, with the whole batch. The definition would take too long on all of
it, so it gets the last sequence of the batch alone, and so that gradients of parameters, which sum over the batch, can
be compared too, the gradient that comes in is zero for all other sequences.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.case import Function, ModelCase, OpCase
from benchmarks.networks import autocast, images, network

# Norm of the error over norm of the truth. float32: some 30 roundings of 6e-8 a step fed forward by a decaying state,
# and sums over up to 6085 tokens: up to 2.8e-6 with the CPU's kernels. bfloat16: the truth rounds nothing; we round
# what enters a product and what leaves it, 2^-9 each, and a gradient passes through several of those: up to 9e-3 with
# the CPU's kernels, also after the 24 blocks of a model.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 1.5e-2}
_CHECKED_PIXELS = 224


@dataclass(frozen=True)
class Check:
    """What a comparison with the truth found.

    errors: Relative error of each output ("y0", "y1") and gradient ("d" and the input's name), NaN for one that is NaN.
    tolerance: The largest error that passes.
    deterministic: A second run gave the same bits, and the forward pass alone the same outputs; None if not tried.
    input_bytes, output_bytes: Of the whole batch.
    """

    errors: dict[str, float]
    tolerance: float
    deterministic: bool | None = None
    input_bytes: int = 0
    output_bytes: int = 0

    @property
    def ok(self) -> bool:
        return all(error <= self.tolerance for error in self.errors.values())  # false for NaN

    @property
    def worst(self) -> str:
        name, error = max(self.errors.items(), key=lambda item: (item[1] != item[1], item[1]))
        return f"{name} is off by {error:.2g} of its norm, more than {self.tolerance:g}"


class OpCheck:
    """Inputs and truth of a case, with which any implementation of it can be checked."""

    def __init__(self, case: OpCase, random: torch.Generator) -> None:
        self.case = case
        self.inputs = case.make(random)
        sample = {name: value.double() for name, value in self._last(self.inputs).items()}
        with torch.no_grad():
            outputs = as_tuple(case.run(**self.inputs))
        self.grads = [torch.zeros_like(y, dtype=torch.float32) for y in outputs]
        for grad in self.grads:
            last = torch.randn(grad.shape[1:], generator=random, device=random.device)
            grad[-1] = last.to(case.dtype)  # numbers that every implementation can hold
        self.truth = gradients(case.reference, sample, [grad[-1:].double() for grad in self.grads])

    def of(self, run: Function, repeat: bool = True) -> Check:
        """Check an implementation that takes the case's named tensors; repeat to see whether it is deterministic."""
        with _poisoned():
            results = gradients(run, self.inputs, self.grads)
            same = self._repeats(run, results) if repeat else None
        last = self._last(results)
        errors = {
            # all of it is finite, also where no truth is known
            name: relative_error(last[name], truth) if results[name].isfinite().all() else float("nan")
            for name, truth in self.truth.items()
        }
        inputs = sum(value.nbytes for value in self.inputs.values())
        outputs = sum(value.nbytes for name, value in results.items() if name.startswith("y"))
        return Check(errors, TOLERANCES[self.case.dtype], same, inputs, outputs)

    def _repeats(self, run: Function, results: dict[str, Tensor]) -> bool:
        again = gradients(run, self.inputs, self.grads)
        with torch.no_grad():
            outputs = {f"y{i}": y for i, y in enumerate(as_tuple(run(**self.inputs)))}
        return all(torch.equal(results[name], value) for name, value in (*again.items(), *outputs.items()))

    def _last(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """The last sequence of what has a batch axis, all of the parameters and their gradients."""
        whole = self.case.parameters | {f"d{name}" for name in self.case.parameters}
        return {name: value if name in whole else value[-1:] for name, value in tensors.items()}


def gradients(run: Function, inputs: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """Outputs and the gradients of all inputs, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = as_tuple(run(**leaves))
    incoming = [grad.to(y.dtype) for grad, y in zip(grads, outputs, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}


def check_model(case: ModelCase, device: torch.device) -> Check:
    """Logits and the gradient of all parameters together, on one image of 224 pixels at most."""
    pixels = min(case.sizes["px"], _CHECKED_PIXELS)
    ours = network(case.encoder, pixels).to(device).eval()
    truth = copy.deepcopy(ours).double()
    image = images(1, pixels, device)
    with _poisoned(), autocast(device, case.dtype):
        logits = ours(image)
    expected = truth(image.double())
    grad = torch.randn_like(logits)
    errors = {
        "y0": relative_error(logits, expected),
        "dparameters": relative_error(_gradient(ours, logits, grad), _gradient(truth, expected, grad.double())),
    }
    return Check(errors, TOLERANCES[case.dtype])


def as_tuple(outputs: Tensor | tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return outputs if isinstance(outputs, tuple) else (outputs,)


def relative_error(ours: Tensor, truth: Tensor) -> float:
    return float((ours.detach().double() - truth.detach()).norm() / truth.detach().norm())


def _gradient(model: nn.Module, logits: Tensor, grad: Tensor) -> Tensor:
    """The gradient of every parameter in one vector."""
    found = torch.autograd.grad(logits, list(model.parameters()), grad.to(logits.dtype))
    return torch.cat([g.flatten() for g in found])


@contextmanager
def _poisoned() -> Iterator[None]:
    """Fill what torch.empty returns with NaN, so that an element nobody writes is found out."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deterministic mode warns of operations that it does not have
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
