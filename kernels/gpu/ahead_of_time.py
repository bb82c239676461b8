"""Compile recorded launches for GPUs that this machine does not have, and report what the kernels use.

Triton ships ptxas, cuobjdump and nvdisasm, so registers, spills, shared memory and instructions are known without a
driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import create_function_from_signature

from ssmpretrain.kernels.gpu.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx950": GPUTarget("hip", "gfx950", 64),
}

_NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one GPU.

    registers: 32-bit registers of a thread (vector registers on AMD).
    spilled_bytes: Memory of a thread for values that did not fit into registers.
    shared_bytes: Shared memory of a program.
    assembly: SASS or AMD assembly.
    """

    registers: int
    spilled_bytes: int
    shared_bytes: int
    assembly: str

    @cached_property
    def loops(self) -> list[Counter[str]]:
        """Opcodes and their counts in each innermost loop of the SASS, longest loop first."""
        instructions: list[str] = []
        labels: dict[str, int] = {}
        spans: list[tuple[int, int]] = []
        for line in self.assembly.splitlines():
            if label := re.match(r"(\.L_\S+):", line):
                labels[label[1]] = len(instructions)
            elif instruction := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
                instructions.append(re.sub(r"^@!?U?P\w+\s+", "", instruction[1]))
                target = re.search(r"BRA.*`\((\.L_\S+)\)", instruction[1])
                if target and (start := labels.get(target[1])) is not None and start < len(instructions) - 1:
                    spans.append((start, len(instructions)))
        inner = [s for s in spans if not any(s != t and s[0] <= t[0] and t[1] <= s[1] for t in spans)]
        opcodes = [Counter(".".join(i.split()[0].split(".")[:2]) for i in instructions[a:b]) for a, b in inner]
        return sorted(opcodes, key=Counter.total, reverse=True)


def specialization_of(launch: Launch, target: str) -> Hashable:
    """Return what the just-in-time compiler looks at in a launch: equal values share one binary.

    Args:
        launch: From `record_launches`.
        target: A key of TARGETS.
    """
    _, specialization, options = _bind(launch, make_backend(TARGETS[target]))
    return launch.kernel.cache_key, tuple(specialization), tuple(options.items())


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile the kernel of a launch as the just-in-time compiler does, into the same place in Triton's cache.

    Args:
        launch: From `record_launches`.
        target: A key of TARGETS.
    """
    backend = make_backend(TARGETS[target])
    arguments, specialization, options = _bind(launch, backend)
    options, *what = launch.kernel._pack_args(backend, options, arguments, specialization, options)
    source = ASTSource(launch.kernel, *what)
    compiled = triton.compile(source, target=TARGETS[target], options=options.__dict__)
    shared = compiled.metadata.shared
    if target.startswith("sm"):
        return _inspect_cubin(compiled.asm["cubin"], shared)
    assembly = compiled.asm["amdgcn"]
    fields = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    return Compiled(fields["vgpr_count"], fields["private_segment_fixed_size"], shared, assembly)


def _bind(launch: Launch, backend: Any) -> tuple[dict[str, Any], list[tuple[str, Any]], dict[str, Any]]:
    """Return the arguments, their types and what is specialised on, and the options, as a launch on a GPU has them."""
    bind = create_function_from_signature(launch.kernel.signature, launch.kernel.params, backend)
    mode = triton.knobs.compilation.instrumentation_mode
    bound: tuple[dict[str, Any], list[tuple[str, Any]], dict[str, Any]] = bind(
        **launch.arguments, num_warps=launch.num_warps, debug=launch.kernel.debug, instrumentation_mode=mode
    )
    return bound


def _inspect_cubin(cubin: bytes, shared: int) -> Compiled:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "kernel.cubin"
        file.write_bytes(cubin)
        usage = _run("cuobjdump", "--dump-resource-usage", str(file))
        sass = _run("nvdisasm", "-c", str(file))
    fields = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", usage)}
    return Compiled(fields["REG"], fields["STACK"] + fields["LOCAL"], shared, sass)


def _run(tool: str, *arguments: str) -> str:
    return subprocess.run([_NVIDIA_TOOLS / tool, *arguments], capture_output=True, text=True, check=True).stdout
