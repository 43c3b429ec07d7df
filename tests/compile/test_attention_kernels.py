"""The attention kernels as an H200 would run them: registers, memory, instructions.

Compiled without a GPU (`make compile`). What they compute is tested in Pallas's
interpreter (tests/pallas_kernels/attention/test_gpu.py), which runs the same
programs. Times are absent.
"""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from pallas_kernels.device import jax_has_kernels
from pallas_kernels.nf4.shapes import MODELS

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not jax_has_kernels(), reason="the kernels need jax 0.11"),
]

HERE = Path(__file__).parent
THREADS = 256


def request(kernel, width, packed, **sizes) -> dict:
    """Sizes of Llama 3.2 1B (head_dim 64) or Llama 3.1 8B (128)."""
    wanted = {"kernel": kernel, "width": width, "packed": packed}
    return wanted | {"batch": 2, "length": 4096, "heads": 32, "groups": 8} | sizes


KERNELS = [
    request(kernel, width, packed)
    for kernel in ("forward", "queries", "keys")
    for width in (64, 128)
    for packed in (False, True)
]
GRADIENTS = [request("gradient", 128, packed) for packed in (False, True)]
ALL = KERNELS + GRADIENTS


def name(wanted: dict) -> str:
    packed = "packed" if wanted["packed"] else "whole"
    return f"{wanted['kernel']}-{wanted['width']}-{packed}"


@dataclass(frozen=True)
class Kernel:
    """A compiled kernel."""

    ptx: str
    registers: int
    """Of a thread."""
    spilled: int
    """Bytes stored for want of registers."""
    shared: int
    """Bytes of shared memory of a block of threads."""
    grid: tuple[int, int, int]
    threads: int


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the compiler wrote, for each request in a folder of its number."""
    if importlib.util.find_spec("jax_cuda13_plugin") is None:
        pytest.fail("the GPU compiler is not installed: `make compile`", pytrace=False)
    out = tmp_path_factory.mktemp("attention")
    script = HERE / "attention_for_gpu.py"
    child = subprocess.run(
        [sys.executable, str(script), json.dumps(ALL), str(out)],
        env={**os.environ, "PYTHONPATH": str(HERE.parents[1])},
        capture_output=True,
        text=True,
        timeout=600,
    )
    if child.returncode != 0:
        pytest.fail(f"compilation failed:\n{child.stderr[-4000:]}", pytrace=False)
    return out


def read(folder: Path, wanted: dict) -> Kernel:
    place = folder / str(ALL.index(wanted))
    report = (place / "kernel.ptxas").read_text()
    (call,) = re.findall(
        r"call .*@mosaic_gpu_(?:build_kernel_spec|launch_kernel)\((.*)\)",
        (place / "kernel.ll").read_text(),
    )
    # The grid, the cluster, the block, shared memory.
    numbers = [int(n) for n in re.findall(r"i32 (\d+)", call)[:10]]
    return Kernel(
        (place / "kernel.ptx").read_text(),
        int(re.search(r"Used (\d+) registers", report)[1]),
        int(re.search(r"(\d+) bytes spill stores", report)[1]),
        numbers[9],
        (numbers[0], numbers[1], numbers[2]),
        numbers[6] * numbers[7] * numbers[8],
    )


@pytest.mark.parametrize("wanted", KERNELS, ids=name)
def test_nothing_spills_and_a_multiprocessor_holds_a_block(wanted, folder):
    kernel = read(folder, wanted)
    assert kernel.spilled == 0
    assert kernel.threads == THREADS
    assert kernel.registers * kernel.threads <= 65536
    # Shared memory of a block on request, CUDA C++ Programming Guide.
    assert kernel.shared <= 232448
    heads = wanted["groups" if wanted["kernel"] == "keys" else "heads"]
    blocks = wanted["batch"] * heads * wanted["length"] // 128
    assert kernel.grid[0] * kernel.grid[1] * kernel.grid[2] == blocks


@pytest.mark.parametrize("wanted", KERNELS, ids=name)
def test_products_are_those_of_the_tensor_cores(wanted, folder):
    """As many as the algorithm has, each once: no loop is written out twice."""
    kernel = read(folder, wanted)
    shapes = re.findall(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16", kernel.ptx
    )
    from pallas_kernels.attention import gpu

    tiles = {
        "forward": gpu.FORWARD,
        "queries": gpu.QUERIES,
        "keys": gpu.KEYS,
    }[wanted["kernel"]]
    # Of every step: products for scores (summed over head_dim, as wide as the step),
    # and those that are added up (summed over the step, as wide as head_dim).
    scores, sums = {"forward": (1, 1), "queries": (2, 1), "keys": (2, 2)}[
        wanted["kernel"]
    ]
    step, width = tiles[wanted["width"]].width, wanted["width"]
    expected = [str(step)] * (scores * width // 16) + [str(width)] * (sums * step // 16)
    assert sorted(shapes) == sorted(expected)
    # A step's exponentials, two results for each of a thread's pairs of scores.
    exponentials = kernel.ptx.count("ex2.approx")
    once = {"forward": 2}.get(wanted["kernel"], 0)  # how much the sums shrink
    assert exponentials == 64 * step // 128 + once


@pytest.mark.parametrize("wanted", GRADIENTS, ids=name)
def test_the_derivative_takes_no_workspace_of_the_size_of_dq(wanted, folder):
    place = folder / str(ALL.index(wanted))
    temporaries = json.loads((place / "memory.json").read_text())["temporaries"]
    tokens = wanted["batch"] * wanted["length"]
    output = 2 * tokens * wanted["heads"] * wanted["width"]
    # The output (bfloat16); float32 numbers of each query and head: the log-sum-exp,
    # the sums `inner`, and both side by side; and 64 bytes a token for all else.
    numbers = 4 * 4 * tokens * wanted["heads"]
    assert temporaries <= output + numbers + 64 * tokens
    # cuDNN would want as much again as twice the output.
    assert temporaries < 1.5 * output


@pytest.mark.parametrize("remat, forwards", [("full", 2), ("save_matmuls", 1)])
def test_packed_training_runs_the_kernels(remat, forwards, compile_step: Callable):
    """In both passes over the layers; the forward again where it was not kept."""
    named = {"packed": True, "remat": remat}
    config = MODELS["1b"].hf_config
    ours = compile_step(config, attention="pallas", **named)
    assert ours.text.count('custom_call_target="mosaic_gpu') == forwards + 2
    xla = compile_step(config, attention="xla", **named)
    # The blocks of scores that XLA writes to memory are gone.
    assert ours.memory["temporaries"] < xla.memory["temporaries"]
