"""Compile recorded launches for GPUs that this machine does not have, and report what the kernels use.

Triton ships ptxas, cuobjdump and nvdisasm, so registers, spills, shared memory and instructions are known without a
driver.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from ssmpretrain.kernels.gpu.launch import Launch

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}

_TYPES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64"}
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


def compile_launch(launch: Launch, target: str) -> Compiled:
    """Compile the kernel of a launch as the just-in-time compiler would.

    Args:
        launch: From `record_launches`.
        target: A key of TARGETS.
    """
    types, constants, attributes = {}, {}, {}
    for index, parameter in enumerate(launch.kernel.params):
        value = launch.arguments[parameter.name]
        is_specialized = not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or (is_specialized and isinstance(value, int) and value == 1):
            types[parameter.name], constants[(index,)] = "constexpr", value
            continue
        types[parameter.name] = _type(value)
        if is_specialized and _is_aligned(value):
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=launch.kernel, signature=types, constexprs=constants, attrs=attributes)
    compiled = triton.compile(source, target=TARGETS[target], options={"num_warps": launch.num_warps})
    shared = compiled.metadata.shared
    if target.startswith("sm"):
        return _inspect_cubin(compiled.asm["cubin"], shared)
    assembly = compiled.asm["amdgcn"]
    fields = {
        name: int(value) for name, value in re.findall(r"\.(vgpr_count|private_segment_fixed_size):\s*(\d+)", assembly)
    }
    return Compiled(fields["vgpr_count"], fields["private_segment_fixed_size"], shared, assembly)


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    return "i32" if -(2**31) <= value < 2**31 else "i64"


def _is_aligned(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.storage_offset() * value.element_size() % 16 == 0
    return isinstance(value, int) and value % 16 == 0


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
