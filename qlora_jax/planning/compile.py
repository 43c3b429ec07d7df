"""The collectives of a scheduled program: which, how many, how many bytes.

Read from the text of a program compiled for several devices. A collective inside a loop
counts as often as the loop goes round, where the compiler knows how often.

A training step compiled for a card that is not there, in a process of its own.

    compiled = compile_for(step, find_gpu("rtx-4090"), python=find_compiler())

starts `python -m qlora_jax.planning.compile FOLDER`, which reads FOLDER/request.json
and writes FOLDER/answer.json, whole or not at all. A process for each compilation:
XLA's settings have to stand before jax starts, and a failed compilation may abort the
process. The Python may be another one, of an environment that has the GPU compiler
where this one has not.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qlora_jax.errors import UserError

_KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
# Asynchronous ones are written as a pair, of which the first counts; its result is a
# tuple of operand and result.
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(_KINDS)})(-start)?\((.*)$")
_WRAPPED = re.compile(r"= .* async-start\(.*calls=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Counts collectives by kind.

    Args:
      program: scheduled HLO as text.

    Returns:
      Kind -> {"count", "bytes"} of one step of one device; bytes are those of the
      results that a device ends up with.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            lines[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("}"):
            name = ""
        elif name:
            lines[name].append(line)
    found: dict[str, dict[str, int]] = {}

    def visit(computation: str, times: int) -> None:
        for line in lines.get(computation, ()):
            if match := _COLLECTIVE.search(line):
                kind = found.setdefault(match[2], {"count": 0, "bytes": 0})
                kind["count"] += times
                kind["bytes"] += times * _result_bytes(match[1], bool(match[3]))
            trips = 1
            if loop := _WHILE.search(line):
                known = _TRIPS.search(line)
                trips = int(known[1]) if known else 1
                visit(loop[1], times * trips)
                continue
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [b.strip().lstrip("%") for b in branches.split(",")]
            for one in called:
                visit(one, times)

    visit(entry, 1)
    return found


def _result_bytes(shape: str, started: bool) -> int:
    arrays = [_bytes(*array) for array in _ARRAY.findall(shape)]
    if started and len(arrays) > 1:
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def _bytes(dtype: str, sizes: str) -> int:
    bits = _BITS.get(dtype)
    if bits is None:
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 0
    count = math.prod(int(n) for n in sizes.split(",") if n)
    return count * bits // 8


if TYPE_CHECKING:  # they import jax
    from qlora_jax.planning.gpus import GpuSpec
    from qlora_jax.planning.step import Step, StepMemory

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # No driver is needed to compile, and the plugin's check of it would only be in the
    # way.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Without a device nothing can be timed, and unguided the compiler picks poor Triton
# tiles: cuBLAS then.
XLA_FLAGS = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")

REQUEST, ANSWER, PROGRAM = "request.json", "answer.json", "program.txt"


_PLUGIN = "jax_cuda13_plugin"
# The CUDA libraries that the compiler itself needs; `jax[cuda13]` brings 4 GB of them.
_LIBRARIES = (
    "nvidia-cudnn-cu13 nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime"
)


@dataclass(frozen=True)
class Compiled:
    """What is known of a step compiled for a card."""

    memory: StepMemory
    sizes: Mapping[str, int]
    """XLA's own account: arguments, temporaries, aliased, output, and on the host."""
    collectives: Mapping[str, Mapping[str, int]]
    """Kind -> {"count", "bytes"}, of one step of one device."""
    jax: str
    """Version that compiled."""
    seconds: float
    """That it took."""
    program: str | None = None
    """The scheduled program, if asked for."""


def how_to_get_the_compiler() -> str:
    """One line that installs the GPU compiler into the environment at hand."""
    version = importlib.metadata.version("jax")
    return (
        f'pip install --no-deps "jax-cuda13-plugin=={version}" '
        f'"jax-cuda13-pjrt=={version}" {_LIBRARIES}'
    )


def find_compiler(python: str | None = None) -> str | None:
    """Returns a Python that has the GPU compiler; None if this one has not.

    Args:
      python: another one, of an environment with a jax and its CUDA plugin.

    Raises:
      UserError: the given Python cannot be started, or has no plugin.
    """
    if python is None:
        return sys.executable if importlib.util.find_spec(_PLUGIN) else None
    try:
        found = subprocess.run(
            [python, "-c", f"import {_PLUGIN}, flax, optax"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`{python}` cannot be started: {error}.") from error
    if found.returncode:
        raise UserError(
            f"`{python}` cannot compile for a GPU: {_last_line(found.stderr)} It needs "
            "this project's dependencies and the CUDA plugin of its own JAX, as in: "
            f"{python} -m {how_to_get_the_compiler()}"
        )
    return python


def compile_for(
    step: Step,
    card: GpuSpec,
    *,
    python: str,
    mesh: Mapping[str, int] | None = None,
    program: bool = False,
    timeout: float = 1800,
) -> Compiled:
    """Compiles a step for a card, in a process of its own.

    Args:
      step: the step, of all devices together.
      card: which; nothing but its description is needed.
      python: from `find_compiler`.
      mesh: sizes of the axes "data" and "fsdp"; default one device.
      program: return the scheduled program as well (some MB).
      timeout: seconds after which the compiler is stopped.

    Raises:
      UserError: the step cannot be compiled for this card; the message has the
        compiler's own last words.
    """
    from qlora_jax.planning.step import StepMemory

    request = {
        "step": step.to_json(),
        "card": dataclasses.asdict(card),
        "mesh": None if mesh is None else dict(mesh),
        "program": program,
    }
    root = str(Path(__file__).resolve().parents[1])
    with tempfile.TemporaryDirectory(prefix="qlora-jax-") as name:
        folder = Path(name)
        (folder / REQUEST).write_text(json.dumps(request))
        start = (
            f"import sys; sys.path.insert(0, {root!r}); "
            "from qlora_jax.planning.compile import main; sys.exit(main())"
        )
        try:
            child = subprocess.run(
                [python, "-c", start, name],
                capture_output=True,
                text=True,
                timeout=timeout,
            )
        except subprocess.TimeoutExpired as error:
            raise UserError(
                f"compiling for {card.name} took longer than {timeout:.0f} s and was "
                "stopped. Compile a shorter step, or with attention='xla'."
            ) from error
        if child.returncode or not (folder / ANSWER).is_file():
            raise UserError(_failure(step, card, child))
        answer = json.loads((folder / ANSWER).read_text())
        text = (folder / PROGRAM).read_text() if program else None
    return Compiled(
        memory=StepMemory(**answer["memory"]),
        sizes=answer["sizes"],
        collectives=answer["collectives"],
        jax=answer["jax"],
        seconds=answer["seconds"],
        program=text,
    )


def _failure(step: Step, card: GpuSpec, child: subprocess.CompletedProcess[str]) -> str:
    said = _last_line(child.stderr)
    if "UserError: " in said:  # one of ours, which says what to do
        return said.partition("UserError: ")[2]
    how = f"stopped with status {child.returncode}"
    if child.returncode < 0:
        how = f"was aborted by signal {-child.returncode}"
    return (
        f"compiling the step for {card.name} {how}: {said} Try attention='xla' and "
        "kernels='xla' (now "
        f"attention={step.compute.attention!r}, kernels={step.compute.kernels!r}), or "
        "leave the compiler out for the estimate (--method estimate)."
    )


def _last_line(text: str) -> str:
    # What C++ libraries print of their stack when they abort stands last.
    text = re.sub(
        r"\*\*\* Begin stack trace.*?\*\*\* End stack trace[^\n]*", "", text, flags=re.S
    )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # Below the last line of an exception, JAX may explain how it shortened its trace.
    named = [x for x in lines if re.match(r"[\w.]*(Error|Exception)\b", x)]
    line = (named or lines or ["it said nothing"])[-1]
    return line[-2000:] if line.endswith((".", "!")) else line[-2000:] + "."


# --- The process ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles what the folder asks for; returns the exit status."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1:
        print("usage: python -m qlora_jax.planning.compile FOLDER", file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    with tempfile.TemporaryDirectory(dir=folder) as dumps:
        os.environ |= ENVIRONMENT
        os.environ["XLA_FLAGS"] = " ".join(
            [
                *XLA_FLAGS,
                f"--xla_dump_to={dumps}",
                "--xla_dump_hlo_as_text",
                "--xla_dump_hlo_module_re=.*train_step.*",
            ]
        )
        answer = _compile(json.loads((folder / REQUEST).read_text()), folder, dumps)
    text = json.dumps(answer, indent=1)
    (folder / f"{ANSWER}.part").write_text(text)
    (folder / f"{ANSWER}.part").replace(folder / ANSWER)
    return 0


def _compile(request: Any, folder: Path, dumps: str) -> dict[str, Any]:
    # Not before the environment stands.
    import jax

    from qlora_jax.planning.compile import collectives
    from qlora_jax.planning.gpus import GpuSpec
    from qlora_jax.planning.step import Step, StepMemory, gpu_mesh, lower

    step = Step.from_json(request["step"])
    card = GpuSpec(
        **request["card"]
        | {"compute_capability": tuple(request["card"]["compute_capability"])}
    )
    mesh = gpu_mesh(card, request["mesh"])
    began = time.perf_counter()
    compiled: Any = lower(step, mesh).compile()
    seconds = time.perf_counter() - began
    found = list(Path(dumps).glob("*train_step*-buffer-assignment.txt"))
    buffers = found[0].read_text() if len(found) == 1 else None
    memory = StepMemory.of(compiled, step, mesh, buffers)
    text = compiled.as_text()
    if request.get("program"):
        (folder / PROGRAM).write_text(text)
    stats = compiled.memory_analysis()
    return {
        "memory": dataclasses.asdict(memory),
        "sizes": {
            "arguments": stats.argument_size_in_bytes,
            "temporaries": stats.temp_size_in_bytes,
            "aliased": stats.alias_size_in_bytes,
            "output": stats.output_size_in_bytes,
            "host_arguments": stats.host_argument_size_in_bytes,
            "host_temporaries": stats.host_temp_size_in_bytes,
        },
        "collectives": collectives(text),
        "seconds": seconds,
        "jax": jax.__version__,
    }


if __name__ == "__main__":
    sys.exit(main())
