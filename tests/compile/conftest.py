"""Compiles GPU programs and kernels in processes of their own, and reads them."""

import functools
import json
import os
import re
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning import compile as compile_module
from qlora_jax.planning import hlo
from qlora_jax.planning.compile import compile_for, find_compiler
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.step import Step
from qlora_jax.training.config import TrainConfig
from tests.compile import forked
from tests.compile import ptx as interpreter

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = Path(__file__).with_name("compile_for_gpu.py")


# For the modules of this folder alone: others test how a compiler is started.
@pytest.fixture(scope="module", autouse=True)
def compile_each_step_once(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Compiles steps in forks of one process, and equal ones once; see forked.py."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # of all test processes of this run
    run = functools.partial(forked.run_compiler, shared=shared / "compiled_steps")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(compile_module, "_run_compiler", run)
        yield


@pytest.fixture(scope="session")
def gpu_compiler() -> str:
    """The Python with the GPU compiler."""
    python = find_compiler()
    if python is None:
        pytest.fail("the GPU compiler is not installed: `make compile`", pytrace=False)
    return python


@pytest.fixture(scope="session")
def compile_in_child(
    gpu_compiler: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., list[Path]]:
    """Compiles requests for a card, all of them by one process; their folders."""

    def compiled(requests: list[dict], card: str = "h200") -> list[Path]:
        out = tmp_path_factory.mktemp("compiled")
        command = [gpu_compiler, str(SCRIPT), json.dumps(requests), str(out), card]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        settings = {"capture_output": True, "text": True, "timeout": 600}
        child = subprocess.run(command, env=environment, **settings)
        if child.returncode != 0:
            pytest.fail(f"compilation failed:\n{child.stderr[-4000:]}", pytrace=False)
        return [out / str(i) for i in range(len(requests))]

    return compiled


# --- Kernels ---


@dataclass(frozen=True)
class CompiledKernel:
    """The files of one kernel, read when asked for."""

    directory: Path

    @functools.cached_property
    def ptx(self) -> str:
        return (self.directory / "kernel.ptx").read_text()

    @functools.cached_property
    def program(self) -> interpreter.Program:
        return interpreter.parse(self.ptx)

    @functools.cached_property
    def launch(self) -> interpreter.Launch:
        return interpreter.read_launch((self.directory / "kernel.ll").read_text())

    @functools.cached_property
    def report(self) -> str:
        """What ptxas reports."""
        return (self.directory / "kernel.ptxas").read_text()

    @property
    def registers(self) -> int:
        """Of a thread."""
        return int(re.search(r"Used (\d+) registers", self.report)[1])

    @property
    def temporaries(self) -> int:
        """Bytes of buffers besides arguments and results."""
        return json.loads((self.directory / "memory.json").read_text())["temporaries"]

    def assert_fits(self, threads: int, shared: int = 232448) -> None:
        """Nothing spills, and a multiprocessor holds a block of so many threads.

        Shared memory of a block on request: CUDA C++ Programming Guide, by default for
        Hopper.
        """
        assert " 0 bytes spill stores, 0 bytes spill loads" in self.report
        assert self.launch.threads == threads
        assert self.registers * threads <= 65536
        assert self.launch.shared <= shared


@pytest.fixture(scope="session")
def compile_kernels(compile_in_child: Callable) -> Callable[..., list[CompiledKernel]]:
    """Compiles kernels for a card."""
    return lambda *args: [CompiledKernel(path) for path in compile_in_child(*args)]


@pytest.fixture(scope="module")
def kernels(request, compile_kernels: Callable) -> Callable[[dict], CompiledKernel]:
    """The kernel of a request in `ALL` of the module, for an H200."""
    requests = request.module.ALL
    compiled = compile_kernels(requests)
    return lambda case: compiled[requests.index(case)]


@pytest.fixture
def kernel(case: dict, kernels: Callable) -> CompiledKernel:
    """The kernel of the test's request."""
    return kernels(case)


# --- Whole programs ---

Shape = tuple[str, tuple[int, ...]]
"""A dtype by XLA's name, and dimensions."""

# `[ROOT] %name = TYPE operation(...)`, where a tuple type may hold comments.
_INSTRUCTION = re.compile(r"(?:ROOT )?%?([\w.\-]+) = (\(.*?\)|\S+) ([\w\-]+)\(")
_ARRAY = re.compile(r"\b(f32|bf16|f16|s32|u32|u8|pred)\[([\d,]*)\]")
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")


@dataclass(frozen=True)
class Instruction:
    """One instruction of a scheduled program."""

    operation: str
    results: tuple[Shape, ...]
    text: str
    """Its line."""
    fused: str
    """The lines of the computation it fuses; empty for others."""

    def calls(self, target: str) -> bool:
        """Whether it calls a library, or a kernel of ours, by a name like this."""
        return f'custom_call_target="{target}' in self.text


@dataclass(frozen=True)
class Program:
    """A program as the GPU compiler schedules it."""

    memory: dict[str, int]
    text: str
    computations: dict[str, list[str]]

    def graphs(self, inside: str) -> set[int]:
        """Numbers of the command buffers with the library calls of a loop."""
        in_graph = hlo.parse(self.text).in_graph
        calls = [k.text for k in self.loop(inside) if "custom_call_target" in k.text]
        names = [re.match(r"(?:ROOT )?%?([\w.\-]+) =", text)[1] for text in calls]
        return {in_graph.get(name, -1) for name in names}

    def entry(self) -> list[Instruction]:
        """Kernels outside of all loops."""
        name = re.search(r"^ENTRY %?([\w.\-]+)", self.text, re.MULTILINE)[1]
        return [self._instruction(line) for line in self.computations[name]]

    def loop(self, inside: str) -> list[Instruction]:
        """Kernels of the one loop whose `op_name` is `inside`."""
        (body,) = {
            re.search(r"body=%?([\w.\-]+)", line)[1]
            for line in self.text.splitlines()
            if " while(" in line and f'op_name="{inside}"' in line
        }
        return [self._instruction(line) for line in self.computations[body]]

    def shapes(self) -> set[Shape]:
        """Every array in memory: the results of instructions outside fusions."""
        fused = set(re.findall(r"\bcalls=%?([\w.\-]+)", self.text))
        return {
            shape
            for name, lines in self.computations.items()
            if name not in fused
            for line in lines
            for shape in self._instruction(line).results
        }

    def _instruction(self, line: str) -> Instruction:
        match = _INSTRUCTION.match(line)
        if match is None:
            return Instruction("", (), line, "")
        results = tuple(
            (dtype, tuple(int(d) for d in dims.split(",") if d))
            for dtype, dims in _ARRAY.findall(match[2])
        )
        called = re.search(r"\bcalls=%?([\w.\-]+)", line)
        fused = "\n".join(self.computations.get(called[1], ())) if called else ""
        return Instruction(match[3], results, line, fused)


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
def compile_step(
    gpu_compiler: str, compile_in_child: Callable
) -> Callable[..., Program]:
    """Compiles a training step, or generation, for an H200; equal requests once."""
    programs: dict[str, Program] = {}

    def compiled(config: dict[str, Any], **settings: Any) -> Program:
        request = {"config": config, "batch": 4, "length": 2048, "packed": False}
        request |= {"attention": "auto", "remat": "full", "kernels": "xla"}
        request |= {"lora": {}, "generate": 0, "places": {}, "compute": {}} | settings
        key = json.dumps(request, sort_keys=True)
        if key not in programs:
            programs[key] = (generation if request["generate"] else step)(request)
        return programs[key]

    def generation(request: dict[str, Any]) -> Program:
        (folder,) = compile_in_child([request])
        memory = json.loads((folder / "memory.json").read_text())
        return _read((folder / "program.txt").read_text(), memory)

    def step(request: dict[str, Any]) -> Program:
        lora = {"target_modules": "all-linear", **request["lora"]}
        compute = {name: request[name] for name in ("attention", "remat", "kernels")}
        compute |= request["compute"]
        step = Step(
            LlamaConfig.from_hf(request["config"]),
            Compute(lora=LoraConfig(r=16, lora_alpha=32, **lora), **compute),
            length=request["length"],
            train=TrainConfig(steps=1000, batch_size=request["batch"]),
            packed=request["packed"],
            **request["places"],
        )
        compiled = compile_for(step, CARDS["h200"], python=gpu_compiler, program=True)
        return _read(compiled.program, dict(compiled.sizes))

    return compiled
