"""GPU programs, each compiled once in a process of its own, and how to read one."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHILD = Path(__file__).with_name("step_for_gpu.py")

Shape = tuple[str, tuple[int, ...]]
"""A dtype by XLA's name, and dimensions."""

# `[ROOT] %name = TYPE operation(...)`, where a tuple type may hold comments.
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b(f32|bf16|f16|s32|u32|u8|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Kernel:
    """One instruction of a scheduled program."""

    operation: str
    results: tuple[Shape, ...]
    text: str
    """The whole line."""
    fused: str
    """The lines of the computation it fuses; empty for others."""


@dataclass(frozen=True)
class Program:
    """What the GPU compiler made of one program."""

    memory: dict[str, int]
    text: str
    computations: dict[str, list[str]]

    def loop(self, inside: str) -> list[Kernel]:
        """Kernels of the one loop whose `op_name` is `inside`."""
        bodies = {
            re.search(r"body=%?([\w.\-]+)", line)[1]
            for line in self.text.splitlines()
            if " while(" in line and f'op_name="{inside}"' in line
        }
        (body,) = bodies
        return [self._kernel(line) for line in self.computations[body]]

    def shapes(self) -> set[Shape]:
        """Every array that has memory of its own: results outside fusions."""
        fused = set(re.findall(r"\bcalls=%?([\w.\-]+)", self.text))
        return {
            shape
            for name, lines in self.computations.items()
            if name not in fused
            for line in lines
            for shape in self._kernel(line).results
        }

    def _kernel(self, line: str) -> Kernel:
        match = _INSTRUCTION.match(line)
        if match is None:
            return Kernel("", (), line, "")
        results = tuple(
            (dtype, tuple(int(d) for d in dims.split(",") if d))
            for dtype, dims in _ARRAY.findall(match[2])
        )
        called = re.search(r"\bcalls=%?([\w.\-]+)", line)
        fused = "\n".join(self.computations.get(called[1], ())) if called else ""
        return Kernel(match[3], results, line, fused)


def _read(folder: Path) -> Program:
    text = (folder / "program.txt").read_text()
    computations: dict[str, list[str]] = {}
    name = None
    for line in text.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            computations[name] = []
        elif line.startswith("}"):
            name = None
        elif name is not None:
            computations[name].append(line.strip())
    return Program(json.loads((folder / "memory.json").read_text()), text, computations)


@pytest.fixture(scope="session")
def compile_step(
    tmp_path_factory: pytest.TempPathFactory,
) -> Callable[..., Program]:
    """Compiles a training step, or generation, for an H200; equal requests once."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.fail("the GPU compiler is not installed: `make compile`", pytrace=False)
    made: dict[str, Program] = {}

    def compiled(config: dict[str, Any], **settings: Any) -> Program:
        wanted = {"config": config, "batch": 4, "length": 2048, "packed": False}
        wanted |= {"attention": "auto", "remat": "full", "kernels": "xla"}
        wanted |= {"lora": {}, "generate": 0} | settings
        request = json.dumps(wanted, sort_keys=True)
        if request not in made:
            folder = tmp_path_factory.mktemp("program")
            child = subprocess.run(
                [sys.executable, str(CHILD), request, str(folder)],
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                capture_output=True,
                text=True,
                timeout=600,
            )
            if child.returncode != 0:
                pytest.fail(f"compilation failed:\n{child.stderr[-4000:]}")
            made[request] = _read(folder)
        return made[request]

    return compiled
