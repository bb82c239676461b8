"""Checks of implementations before they are timed: outputs and every gradient, against the definition in float64.

The check uses the same launch as the timing, with the whole batch. The definition would take too long on the whole
batch, so it gets only the last sequence. The incoming gradient is zero for all other sequences; so the gradients of
parameters, which are sums over the batch, can be compared too.
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

# Largest allowed norm of the error, divided by the norm of the truth. float32: some 30 roundings of 6e-8 per step,
# which a decaying state carries on, and sums over up to 6085 tokens; measured up to 2.8e-6 with the CPU kernels.
# bfloat16: the implementation rounds inputs and outputs of products to 2^-9, and a gradient passes several of them;
# measured up to 9e-3 with the CPU kernels, also after the 24 blocks of a model.
TOLERANCES = {torch.float32: 4e-6, torch.bfloat16: 1.5e-2}
_CHECKED_PIXELS = 224


@dataclass(frozen=True)
class Check:
    """Result of a comparison with the truth.

    errors: Relative error of each output ("y0", "y1") and gradient ("d" and the name of the input); NaN if one is NaN.
    tolerance: The largest error that passes.
    cancelling: Names of gradients that may have ten times that error, see `OpCase`.
    deterministic: Whether a second run gave the same bits, and the forward pass alone the same outputs; None if this
        was not tested.
    input_bytes, output_bytes: Bytes of the inputs and outputs of the whole batch.
    """

    errors: dict[str, float]
    tolerance: float
    cancelling: frozenset[str] = frozenset()
    deterministic: bool | None = None
    input_bytes: int = 0
    output_bytes: int = 0

    @property
    def ok(self) -> bool:
        return all(error <= self._limit(name) for name, error in self.errors.items())  # False for NaN

    @property
    def worst(self) -> str:
        name, error = max(self.errors.items(), key=lambda item: (item[1] != item[1], item[1] / self._limit(item[0])))
        return f"{name} is off by {error:.2g} of its norm, more than {self._limit(name):g}"

    def _limit(self, name: str) -> float:
        return self.tolerance * (10 if name in self.cancelling else 1)


class OpCheck:
    """Inputs and true results of a case, to check any implementation of it."""

    def __init__(self, case: OpCase, random: torch.Generator) -> None:
        self.case = case
        self.inputs = case.make(random)
        sample = {name: value.double() for name, value in self._last(self.inputs).items()}
        with torch.no_grad():
            outputs = as_tuple(case.run(**self.inputs))
        self.grads = [torch.zeros_like(y, dtype=torch.float32) for y in outputs]
        for grad in self.grads:
            last = torch.randn(grad.shape[1:], generator=random, device=random.device)
            grad[-1] = last.to(case.dtype)  # numbers that every dtype can hold
        self.truth = gradients(case.reference, sample, [grad[-1:].double() for grad in self.grads])

    def of(self, run: Function, repeat: bool = True) -> Check:
        """Check an implementation that takes the case's named tensors. With `repeat`, also test whether it repeats."""
        with _poisoned():
            results = gradients(run, self.inputs, self.grads)
            same = self._repeats(run, results) if repeat else None
        last = self._last(results)
        errors = {
            # everything must be finite, also where the truth is unknown
            name: relative_error(last[name], truth) if results[name].isfinite().all() else float("nan")
            for name, truth in self.truth.items()
        }
        inputs = sum(value.nbytes for value in self.inputs.values())
        outputs = sum(value.nbytes for name, value in results.items() if name.startswith("y"))
        cancelling = frozenset(f"d{name}" for name in self.case.cancelling)
        return Check(errors, TOLERANCES[self.case.dtype], cancelling, same, inputs, outputs)

    def _repeats(self, run: Function, results: dict[str, Tensor]) -> bool:
        again = gradients(run, self.inputs, self.grads)
        with torch.no_grad():
            outputs = {f"y{i}": y for i, y in enumerate(as_tuple(run(**self.inputs)))}
        return all(torch.equal(results[name], value) for name, value in (*again.items(), *outputs.items()))

    def _last(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the last sequence of tensors with a batch axis; return parameters and their gradients unchanged."""
        whole = self.case.parameters | {f"d{name}" for name in self.case.parameters}
        return {name: value if name in whole else value[-1:] for name, value in tensors.items()}


def gradients(run: Function, inputs: dict[str, Tensor], grads: list[Tensor]) -> dict[str, Tensor]:
    """Compute the outputs and the gradients of all inputs, by name."""
    leaves = {name: value.detach().requires_grad_() for name, value in inputs.items()}
    outputs = as_tuple(run(**leaves))
    incoming = [grad.to(y.dtype) for grad, y in zip(grads, outputs, strict=True)]
    found = torch.autograd.grad(outputs, list(leaves.values()), incoming)
    named = {f"y{i}": y.detach() for i, y in enumerate(outputs)}
    return named | {f"d{name}": grad for name, grad in zip(leaves, found, strict=True)}


def check_model(case: ModelCase, device: torch.device) -> Check:
    """Check the logits, and the gradient of all parameters as one vector, on one image of 224 pixels at most."""
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
    """Compute the gradients of all parameters as one vector."""
    found = torch.autograd.grad(logits, list(model.parameters()), grad.to(logits.dtype))
    return torch.cat([g.flatten() for g in found])


@contextmanager
def _poisoned() -> Iterator[None]:
    """Let torch.empty return NaN, so that the check finds elements that no code writes."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deterministic mode warns about operations without a deterministic version
        before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])
