"""Compiles a training step for a GPU that is not installed, in a separate process.

    compiled = compile_for(step, find_gpu("rtx-4090"), python=find_compiler())

starts a process that reads FOLDER/request.json and writes FOLDER/answer.json
atomically. Each compilation has its process, because XLA reads its settings when jax
starts and a failed compilation may abort. It may run another Python, whose environment
has the GPU compiler.

The answer counts what the compiled program does (`planning.roofline`).
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
from qlora_jax.planning import hlo, roofline
from qlora_jax.planning.traffic import Transfer, bytes_by_kind, count_transfers

if TYPE_CHECKING:  # these modules import jax
    from qlora_jax.planning.gpus import GpuSpec
    from qlora_jax.planning.step import Step, StepMemory

ENVIRONMENT = {
    "JAX_PLATFORMS": "cpu",
    # Compiling needs no driver, but the plugin checks for one.
    "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
    "TF_CPP_MIN_LOG_LEVEL": "2",
}
# Autotuning needs a device. All other options are those of a run (`compiler_options`).
XLA_FLAGS = ("--xla_gpu_autotune_level=0",)

REQUEST, ANSWER, PROGRAM = "request.json", "answer.json", "program.txt"

_PLUGIN = "jax_cuda13_plugin"
# The CUDA libraries that the compiler needs; `jax[cuda13]` installs 4 GB of others.
_LIBRARIES = (
    "nvidia-cudnn-cu13 nvidia-cuda-nvcc nvidia-nvvm nvidia-cuda-crt nvidia-cuda-runtime"
)


@dataclass(frozen=True)
class Compiled:
    """A step compiled for a GPU."""

    memory: StepMemory
    sizes: Mapping[str, int]
    """XLA's memory analysis: arguments, temporaries, aliased, output, host."""
    transfers: Sequence[Transfer]
    """Its collectives."""
    jax: str
    """Version of jax that compiled."""
    seconds: float
    """Compilation time."""
    counted: Mapping[str, Any]
    """What the step does and would take, as `planning.roofline.count_step` returns."""
    program: str | None = None
    """The scheduled program, if requested, with its command buffers as comments."""

    @property
    def collectives(self) -> dict[str, dict[str, float]]:
        """Kind -> {"count", "bytes", ...} of a step of one device."""
        return bytes_by_kind(self.transfers)


def how_to_get_the_compiler() -> str:
    """Returns the command that installs the GPU compiler into this environment."""
    version = importlib.metadata.version("jax")
    return (
        f'pip install --no-deps "jax-cuda13-plugin=={version}" '
        f'"jax-cuda13-pjrt=={version}" {_LIBRARIES}'
    )


def find_compiler(python: str | None = None) -> str | None:
    """Returns a Python that has the GPU compiler; None if this one does not.

    Args:
      python: the Python of an environment with jax and its CUDA plugin; default this.

    Raises:
      UserError: `python` cannot be started, or has no plugin.
    """
    if python is None:
        return sys.executable if importlib.util.find_spec(_PLUGIN) else None
    try:
        process = subprocess.run(
            [python, "-c", f"import {_PLUGIN}, flax, optax"],
            capture_output=True,
            text=True,
            timeout=120,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"`{python}` cannot be started: {error}.") from error
    if process.returncode:
        raise UserError(
            f"`{python}` cannot compile for a GPU: {_last_line(process.stderr)} It "
            "needs this project's dependencies and the CUDA plugin of its JAX version: "
            f"{python} -m {how_to_get_the_compiler()}"
        )
    return python


def compile_for(
    step: Step,
    gpu: GpuSpec,
    *,
    python: str,
    mesh: Mapping[str, int] | None = None,
    per_node: int | None = None,
    program: bool = False,
    timeout: float = 1800,
) -> Compiled:
    """Compiles a step for a GPU, in a separate process.

    Args:
      step: the step, of all devices together.
      gpu: its data sheet; the device is not needed.
      python: from `find_compiler`.
      mesh: sizes of its axes; default one device.
      per_node: GPUs of a machine; default all of the mesh.
      program: return the scheduled program as well (some MB).
      timeout: seconds after which the compiler is stopped.

    Raises:
      UserError: the step cannot be compiled for this GPU; the message has the
        compiler's last line.
    """
    from convert import scratch_directory
    from qlora_jax.planning.step import StepMemory

    check_fusion(step, gpu)
    request = {
        "step": step.to_json(),
        "gpu": dataclasses.asdict(gpu),
        "mesh": None if mesh is None else dict(mesh),
        "per_node": per_node,
        "program": program,
    }
    with scratch_directory() as folder:
        (folder / REQUEST).write_text(json.dumps(request))
        child = _run_compiler(python, folder, gpu, timeout)
        if child.returncode or not (folder / ANSWER).is_file():
            raise UserError(_failure(step, gpu, child))
        answer = json.loads((folder / ANSWER).read_text())
        text = (folder / PROGRAM).read_text() if program else None
    return Compiled(
        memory=StepMemory(**answer["memory"]),
        sizes=answer["sizes"],
        transfers=[Transfer(**transfer) for transfer in answer["transfers"]],
        jax=answer["jax"],
        seconds=answer["seconds"],
        counted=answer["counted"],
        program=text,
    )


def check_fusion(step: Step, gpu: GpuSpec) -> None:
    """Raises if a step is to be planned with one-pass kernels that a GPU has not.

    A described device has no compute capability by which the kernels would refuse
    themselves, as they do in a run.
    """
    compute = step.compute
    if "fused" in (compute.norms, compute.activation) and (
        gpu.compute_capability != (9, 0)
    ):
        raise UserError(
            "fusion='fused': those kernels are laid out for NVIDIA's Hopper (compute "
            f"capability 9.0: H100, H200), and {gpu.name} has "
            f"{'.'.join(map(str, gpu.compute_capability))}. Plan with 'auto'; a run "
            "there computes norms and activation without them."
        )


def _run_compiler(
    python: str, folder: Path, gpu: GpuSpec, timeout: float
) -> subprocess.CompletedProcess[str]:
    root = str(Path(__file__).resolve().parents[2])
    # The environment of `python` need not have this package installed.
    source = (
        f"import sys; sys.path.insert(0, {root!r}); "
        "from qlora_jax.planning.compile import main; sys.exit(main())"
    )
    try:
        return subprocess.run(
            [python, "-c", source, str(folder)],
            capture_output=True,
            text=True,
            timeout=timeout,
        )
    except subprocess.TimeoutExpired as error:
        raise UserError(
            f"compiling for {gpu.name} took longer than {timeout:.0f} s and was "
            "stopped. Compile a shorter step, or with attention='xla'."
        ) from error


def _failure(step: Step, gpu: GpuSpec, child: subprocess.CompletedProcess[str]) -> str:
    message = _last_line(child.stderr)
    if "UserError: " in message:  # of this project, which is complete as it is
        return message.partition("UserError: ")[2]
    how = f"stopped with status {child.returncode}"
    if child.returncode < 0:
        how = f"was aborted by signal {-child.returncode}"
    return (
        f"compiling the step for {gpu.name} {how}: {message} Try attention='xla' and "
        "kernels='xla' (now "
        f"attention={step.compute.attention!r}, kernels={step.compute.kernels!r}), or "
        "leave the compiler out for the estimate (--method estimate)."
    )


def _last_line(text: str) -> str:
    # Aborting C++ libraries print their stack after the message.
    text = re.sub(
        r"\*\*\* Begin stack trace.*?\*\*\* End stack trace[^\n]*", "", text, flags=re.S
    )
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    # After an exception, JAX may explain how it filtered the traceback.
    named = [x for x in lines if re.match(r"[\w.]*(Error|Exception)\b", x)]
    line = (named or lines or ["no message"])[-1]
    return line[-2000:] if line.endswith((".", "!")) else line[-2000:] + "."


# --- The process that compiles ---


def main(arguments: Sequence[str] | None = None) -> int:
    """Compiles the request in a folder; returns the exit status."""
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
                # The dump has the buffer assignment, by which the temporaries are split
                # into kinds, and the thunks.
                f"--xla_dump_to={dumps}",
                "--xla_dump_hlo_as_text",
                "--xla_dump_hlo_module_re=.*train_step.*",
            ]
        )
        answer = _compile(json.loads((folder / REQUEST).read_text()), folder, dumps)
    text = json.dumps(answer, indent=1)
    # Complete under its name: an abort leaves no half answer.
    (folder / f"{ANSWER}.part").write_text(text)
    (folder / f"{ANSWER}.part").replace(folder / ANSWER)
    return 0


def _compile(request: Any, folder: Path, dumps: str) -> dict[str, Any]:
    # jax reads the environment when it is imported.
    import jax

    from qlora_jax.planning.estimate import necessary_flops
    from qlora_jax.planning.gpus import GpuSpec
    from qlora_jax.planning.step import Step, StepMemory, gpu_mesh, lower

    step = Step.from_json(request["step"])
    capability = tuple(request["gpu"]["compute_capability"])
    gpu = GpuSpec(**request["gpu"] | {"compute_capability": capability})
    mesh = gpu_mesh(gpu, request["mesh"], request["per_node"])
    start = time.perf_counter()
    compiled: Any = lower(step, mesh).compile()
    seconds = time.perf_counter() - start
    buffers = _dumped(dumps, "-buffer-assignment.txt")
    memory = StepMemory.of(compiled, step, mesh, buffers)
    text = compiled.as_text()
    launches = _dumped(dumps, ".thunk_sequence_after_thunk_passes.txt")
    names = _dumped(dumps, ".thunk_metadata.txt")
    if launches and names:
        text += hlo.graph_comment(launches, names)
    devices = math.prod(mesh.shape.values())
    counted = roofline.count_step(
        text,
        step,
        gpu,
        mesh=request["mesh"],
        necessary_flops=necessary_flops(step, devices=devices),
    )
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
        "transfers": [
            dataclasses.asdict(transfer)
            for transfer in count_transfers(
                hlo.parse(text), devices, request["per_node"] or devices
            )
        ],
        "counted": counted,
        "seconds": seconds,
        "jax": jax.__version__,
    }


def _dumped(folder: str, ending: str) -> str | None:
    """Returns what the compiler dumped of the step; None if it is not one file."""
    files = list(Path(folder).glob(f"*train_step*{ending}"))
    return files[0].read_text() if len(files) == 1 else None


if __name__ == "__main__":
    sys.exit(main())
