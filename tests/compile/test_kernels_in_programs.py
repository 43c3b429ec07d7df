"""Whole programs with our kernels in them, as an H200 would run them.

Compiled without a GPU (`make compile`).
"""

import math
from collections.abc import Callable

import jax
import pytest

from pallas_kernels.device import jax_has_kernels
from pallas_kernels.nf4.shapes import MODELS

pytestmark = [
    pytest.mark.compile,
    pytest.mark.skipif(not jax_has_kernels(), reason="the kernels need jax 0.11"),
]

LLAMA_8B = MODELS["8b"].hf_config
TOKEN = "jit(_generate)/while"


def test_training_dequantizes_each_weight_once_a_pass(compile_step: Callable):
    """Forward and backward; the same memory as XLA's own dequantization."""
    ours = compile_step(LLAMA_8B, kernels="pallas")
    # The XLA of jax 0.11 does not merge equal kernels: those that are recomputed (all
    # but down's, whose product is not) run twice in the backward pass.
    again = 6 * jax.__version__.startswith("0.11")
    assert ours.text.count('custom_call_target="mosaic_gpu') == 14 + again
    assert ours.memory["arguments"] == compile_step(LLAMA_8B).memory["arguments"]
    # A number of a layer for each kernel; a copied stack of codes would be 0.9 GB. And
    # the update of a wide layer in bf16: only XLA's dequantization joins adapters.
    more = ours.memory["temporaries"] - compile_step(LLAMA_8B).memory["temporaries"]
    assert more < 2**16 + 2 * 4 * 2048 * LLAMA_8B["intermediate_size"]


def test_fused_passes_touch_each_wide_array_once(compile_step: Callable):
    """Beside its products, an array as wide as the MLP has one kernel each way."""
    passes = {"scan_layers": False, "norms": "fused", "activation": "fused"}
    config = LLAMA_8B | {"num_hidden_layers": 2}
    program = compile_step(config, remat="none", compute=passes)
    # The gradient of the first layer's input is nobody's.
    numbers = {"norm_forward": 4, "norm_backward": 3}
    numbers |= {"gated_forward": 2, "gated_backward": 2}
    ours = [line for line in program.text.splitlines() if '="mosaic_gpu' in line]
    for name, number in numbers.items():
        assert sum(f"/{name}/" in text for text in ours) == number, name
    tokens, width = 4 * 2048, LLAMA_8B["intermediate_size"]
    made = [
        kernel.text
        for kernel in program.entry()
        if any(
            shape[:1] in ((tokens,), (4,)) and math.prod(shape) >= tokens * width
            for _, shape in kernel.results
        )
        and kernel.operation not in ("parameter", "get-tuple-element", "bitcast")
    ]
    # Of a layer: gate and up; h; its gradient; the gradients of gate and up.
    assert len(made) == 2 * 4, made


def test_a_token_multiplies_with_packed_weights(compile_step: Callable):
    program = compile_step(
        LLAMA_8B, batch=1, length=2048, generate=512, remat="none", kernels="pallas"
    )
    token = program.loop(TOKEN)
    ours = [k for k in token if k.calls("mosaic_gpu")]
    # Of a layer four groups of linear layers, and attention in two; and what goes
    # before the first layer.
    assert len(ours) == 6 * LLAMA_8B["num_hidden_layers"] + 1
    # The caches of all layers, [L, B, K, S, H], are updated in place.
    shapes = [shape for k in ours for _, shape in k.results if len(shape) < 5]
    largest = max(map(math.prod, shapes))
    # Sums of a few parts and 8 rows; a weight written out would be millions.
    assert largest <= 8 * 16 * LLAMA_8B["intermediate_size"]
    assert not [
        k.text
        for k in token
        if k.operation not in ("parameter", "get-tuple-element", "tuple", "bitcast")
        for dtype, shape in k.results
        if dtype == "u8" and math.prod(shape) > 2**16
    ]
