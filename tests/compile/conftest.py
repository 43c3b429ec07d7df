"""GPU programs, each compiled once in a process of its own, and how to read one."""

import json
import os
import re
import subprocess
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


def _read(text: str, memory: dict[str, int]) -> Program:
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
    return Program(memory, text, computations)


@pytest.fixture(scope="session")
def gpu_compiler() -> str:
    """The Python with the GPU compiler."""
    from qlora_jax.planning.compile import find_compiler

    python = find_compiler()
    if python is None:
        pytest.fail("the GPU compiler is not installed: `make compile`", pytrace=False)
    return python


@pytest.fixture(scope="session")
def compile_step(
    gpu_compiler: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Program]:
    """Compiles a training step, or generation, for an H200; equal requests once."""
    made: dict[str, Program] = {}

    def compiled(config: dict[str, Any], **settings: Any) -> Program:
        wanted = {"config": config, "batch": 4, "length": 2048, "packed": False}
        wanted |= {"attention": "auto", "remat": "full", "kernels": "xla"}
        wanted |= {"lora": {}, "generate": 0, "places": {}} | settings
        request = json.dumps(wanted, sort_keys=True)
        if request not in made:
            compile_one = _generation if wanted["generate"] else _training
            folder = tmp_path_factory.mktemp("program")
            made[request] = compile_one(gpu_compiler, wanted, folder)
        return made[request]

    return compiled


def _training(python: str, wanted: dict[str, Any], _: Path) -> Program:
    from qlora_jax.lora.config import LoraConfig
    from qlora_jax.models.config import LlamaConfig
    from qlora_jax.models.layers import Compute
    from qlora_jax.planning.compile import compile_for
    from qlora_jax.planning.gpus import CARDS
    from qlora_jax.planning.step import Step
    from qlora_jax.training.config import TrainConfig

    lora = {"target_modules": "all-linear", **wanted["lora"]}
    step = Step(
        LlamaConfig.from_hf(wanted["config"]),
        Compute(
            attention=wanted["attention"],
            remat=wanted["remat"],
            kernels=wanted["kernels"],
            lora=LoraConfig(r=16, lora_alpha=32, **lora),
        ),
        length=wanted["length"],
        train=TrainConfig(steps=1000, batch_size=wanted["batch"]),
        packed=wanted["packed"],
        **wanted["places"],
    )
    compiled = compile_for(step, CARDS["h200"], python=python, program=True)
    assert compiled.program is not None
    return _read(compiled.program, dict(compiled.sizes))


def _generation(python: str, wanted: dict[str, Any], folder: Path) -> Program:
    child = subprocess.run(
        [python, str(CHILD), json.dumps(wanted), str(folder)],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if child.returncode != 0:
        pytest.fail(f"compilation failed:\n{child.stderr[-4000:]}")
    memory = json.loads((folder / "memory.json").read_text())
    return _read((folder / "program.txt").read_text(), memory)
