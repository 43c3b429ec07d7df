"""The attention kernels as an H200 would run them: registers, memory, instructions.

Compiled without a GPU (`make compile`). What they compute is tested in Pallas's
interpreter (tests/pallas_kernels/attention), which runs the same programs. Times are
absent.
"""

import math
import re
from collections.abc import Callable

import pytest

from pallas_kernels.device import jax_has_kernels
from pallas_kernels.nf4.shapes import MODELS
from tests.compile.requests import each

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not jax_has_kernels(), reason="the kernels need jax 0.11"),
]


def request(kernel, width, packed) -> dict:
    """Sizes of Llama 3.2 1B (head_dim 64) or Llama 3.1 8B (128)."""
    sizes = {"batch": 2, "length": 4096, "heads": 32, "groups": 8}
    return {"kernel": kernel, "width": width, "packed": packed, **sizes}


KERNELS = [
    request(kernel, width, packed)
    for kernel in ("forward", "queries", "keys")
    for width in (64, 128)
    for packed in (False, True)
]
GRADIENTS = [request("gradient", 128, packed) for packed in (False, True)]
ALL = KERNELS + GRADIENTS


@each(KERNELS)
def test_nothing_spills_and_a_multiprocessor_holds_a_block(case, kernel):
    kernel.assert_fits(threads=3 * 128)
    heads = case["groups" if case["kernel"] == "keys" else "heads"]
    blocks = case["batch"] * heads * case["length"] // 128
    if case["kernel"] == "forward":
        blocks = 132  # as many as an H200 has multiprocessors; they stay
    assert math.prod(kernel.launch.grid) == blocks


@each(KERNELS)
def test_products_run_while_others_are_started(case, kernel):
    """The compiler serializes them for want of registers, or if it sees a hazard."""
    assert "serialized" not in kernel.report
    # Two warpgroups take the registers that the third, which copies, gives away.
    assert kernel.ptx.count("setmaxnreg.inc") == kernel.ptx.count("setmaxnreg.dec") == 1


# Of every step: products for scores (summed over head_dim, as wide as the step), and
# those that are added up (summed over the step, as wide as head_dim).
PRODUCTS = {"forward": (1, 1), "queries": (2, 1), "keys": (2, 2)}
# How often the program has a step: with a mask and without; the forward pass starts the
# scores of a step with the sums of the one before, so the first and the last are apart.
COPIES = {"forward": 3, "queries": 2, "keys": 2}


@each(KERNELS)
def test_products_are_those_of_the_tensor_cores(case, kernel):
    """As many as the algorithm has: no loop is written out twice."""
    from pallas_kernels.attention import backward, forward

    ptx, width = kernel.ptx, case["width"]
    shapes = re.findall(
        r"wgmma\.mma_async\.sync\.aligned\.m64n(\d+)k16\.f32\.bf16\.bf16", ptx
    )
    tiles = {"queries": backward.QUERIES, "keys": backward.KEYS}
    tiles["forward"] = forward.TILES
    step = tiles[case["kernel"]][width].width
    scores, sums = PRODUCTS[case["kernel"]]
    expected = [str(step)] * (scores * width // 16) + [str(width)] * (sums * step // 16)
    copies = COPIES[case["kernel"]]
    assert sorted(shapes) == sorted(expected * copies)
    # A step's exponentials, two results for each of a thread's pairs of scores; and
    # how much the sums shrink.
    shrink = 2 if case["kernel"] == "forward" else 0
    assert ptx.count("ex2.approx") == copies * (64 * step // 128 + shrink)


@each(GRADIENTS)
def test_the_derivative_takes_no_workspace_of_the_size_of_dq(case, kernel):
    tokens = case["batch"] * case["length"]
    output = 2 * tokens * case["heads"] * case["width"]
    # The output (bfloat16); float32 numbers of each query and head: the log-sum-exp,
    # the sums `inner`, and both stacked; and 64 bytes a token for all else.
    numbers = 4 * 4 * tokens * case["heads"]
    assert kernel.temporaries <= output + numbers + 64 * tokens
    # cuDNN would want as much again as twice the output.
    assert kernel.temporaries < 1.5 * output


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
