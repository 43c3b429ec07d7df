"""One token of generation as an H200 would run it: what it reads, and copies nothing.

Compiled without a GPU (`make compile`). The cache holds 4 rows of 2,560 tokens, the
weights are packed, and every linear layer has an adapter.
"""

import math
from collections.abc import Callable

import pytest

from pallas_kernels.nf4.shapes import MODELS

pytestmark = pytest.mark.compile

LLAMA_8B = MODELS["8b"].hf_config
CONFIGS = {
    "8b": LLAMA_8B,
    "1b": MODELS["1b"].hf_config,
    # A key/value head for each query head, as in Llama 2.
    "7b": LLAMA_8B | {"num_key_value_heads": 32, "vocab_size": 32000},
}
TOKEN = "jit(_generate)/while"
LAYER = "jit(_generate)/while/body/Llama.decode/model/while"
# What hands arrays on, or reads them inside another kernel, and writes nothing.
FREE = ("", "parameter", "get-tuple-element", "tuple", "bitcast", "while")


@pytest.fixture(scope="module", params=[("8b", 4), ("8b", 1), ("1b", 4), ("7b", 1)])
def case(request, compile_step: Callable):
    name, rows = request.param
    config = CONFIGS[name]
    program = compile_step(config, batch=rows, length=2048, generate=512, remat="none")
    return config, rows, program


def cache_of_a_layer(config: dict, rows: int) -> int:
    """Elements of a layer's keys, or of its values."""
    width = config["hidden_size"] // config["num_attention_heads"]
    return rows * 2560 * config["num_key_value_heads"] * width


def written(kernels: list) -> list:
    """(kernel, dtype, elements) of everything that kernels write."""
    return [
        (k, dtype, math.prod(shape))
        for k in kernels
        if k.operation not in FREE
        for dtype, shape in k.results
    ]


def test_a_token_is_written_into_the_cache_in_place(case):
    config, rows, program = case
    layer_size = cache_of_a_layer(config, rows)
    cache_size = config["num_hidden_layers"] * layer_size
    layer, token = program.loop(LAYER), program.loop(TOKEN)
    updates = [k for k, _, size in written(layer) if size == cache_size]
    assert len(updates) == 2  # keys, values
    for k in updates:
        assert k.operation == "fusion" and "dynamic-update-slice(" in k.fused
    # Nor is the cache, or a layer of it, written between layers or between tokens.
    assert not [
        k.text for k, _, size in written(token) if size in (layer_size, cache_size)
    ]
    copies = [k for k in token + layer if "copy" in k.operation]
    assert not [k.text for k, _, size in written(copies) if size >= layer_size]


def test_keys_and_values_of_a_layer_are_read_in_place(case):
    config, rows, program = case
    # No slice, conversion or product of the size of a layer's cache is written.
    heads = config["num_attention_heads"] // config["num_key_value_heads"]
    layer_size = cache_of_a_layer(config, rows)
    assert not [
        k.text
        for k, dtype, size in written(program.loop(LAYER))
        if size in (layer_size, heads * layer_size) and dtype in ("bf16", "f32")
    ]


def test_packed_weights_are_read_in_place(case):
    # Codes and 8-bit scales: a copy of them would be an array of bytes.
    _, _, program = case
    kernels = program.loop(TOKEN) + program.loop(LAYER)
    assert not [k.text for k, dtype, size in written(kernels) if dtype == "u8"]


def test_the_head_is_read_in_its_own_dtype(case):
    # Float32 logits of bfloat16 operands: no copy of the head, in any dtype.
    config, rows, program = case
    head = config["vocab_size"] * config["hidden_size"]
    kernels = program.loop(TOKEN)
    assert not [k.text for k, _, size in written(kernels) if size == head]
    logits = (f"f32[{n},{config['vocab_size']}]" for n in (rows, 8))
    assert any(text in k.text for text in logits for k in kernels if k.calls("__cubl"))


def test_no_weights_of_all_layers_are_ever_dequantized(case):
    config, _, program = case
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    layers = config["num_hidden_layers"]
    stacked = {layers * size for size in (d * d, d * kv, d * f)}
    stacks = [s for s in program.shapes() if s[1][:1] == (layers,)]
    assert stacks  # the packed stacks
    assert not [s for s in stacks if s[0] != "u8" and math.prod(s[1]) in stacked]


# With "pallas", a layer is: q, k, v; attention, and the sum of its parts; o; gate and
# up; down. Before the first layer, the norm and A of q, k, v are one more; with 8 rows
# they are in every layer, where attention has no parts as rows and heads are many; with
# 16 rows those of gate and up, and of down too.
@pytest.mark.parametrize(
    ("name", "rows", "of_a_layer", "once"),
    [("8b", 1, 6, 1), ("1b", 4, 6, 1), ("7b", 8, 6, 0), ("8b", 16, 9, 0)],
)
def test_a_layer_on_the_kernels_of_decoding_is_few_kernels(
    name, rows, of_a_layer, once, compile_step
):
    config, settings = CONFIGS[name], {"length": 2048, "generate": 512, "remat": "none"}
    program = compile_step(config, batch=rows, kernels="pallas", **settings)
    token, layers = program.loop(TOKEN), config["num_hidden_layers"]
    started = [k for k in token if k.operation not in (*FREE, "constant")]
    ours = [k for k in started if k.calls("mosaic")]
    # No loop, whose counter would be one more; a token has few others.
    assert len(ours) == of_a_layer * layers + once
    assert len(started) <= len(ours) + 15 and not [
        k for k in token if "while" in k.operation
    ]
    # No weight, adapter or norm is copied out of its stack, and the cache is written in
    # place.
    others = [k for k in started if not k.calls("mosaic")]
    cache = layers * cache_of_a_layer(config, rows)
    assert not [k.text for k, dtype, size in written(others) if dtype == "u8"]
    assert not [k.text for k, _, size in written(others) if size == cache]
    in_layers = [k for k in started if "/model/layers/" in k.text]
    assert set(map(id, ours)) == set(map(id, in_layers))
    assert all(size <= 2**20 for _, _, size in written(ours) if size != cache)
