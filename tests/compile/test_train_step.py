"""The training step as an H200 would run it: its buffers and its kernels.

Compiled without a GPU (`make compile`), so sizes and structure are exact and times are
absent. All figures are of 4 rows of 2,048 tokens, rank 16 on every linear layer.
"""

import math
import re
from collections.abc import Callable

import pytest

from pallas_kernels.nf4.shapes import MODELS

pytestmark = pytest.mark.compile

LLAMA_8B = MODELS["8b"].hf_config
LLAMA_1B = MODELS["1b"].hf_config
TOKENS = 4 * 2048
RANK = 16

FORWARD = "jit(train_step)/jvp(Llama.hidden_states)/model/while"
BACKWARD = "jit(train_step)/transpose(jvp(Llama.hidden_states))/model/while"


def linears(config: dict) -> list[tuple[int, int]]:
    """(out, in) of the seven linear layers of a block."""
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    return [(d, d), (kv, d), (kv, d), (d, d), (f, d), (f, d), (d, f)]


def weights(config: dict) -> int:
    """Quantized weights of a layer."""
    return sum(o * i for o, i in linears(config))


def budget(config: dict, kept: int) -> int:
    """Bytes of temporaries a step may take, with `kept` bytes a token and layer.

    What the backward pass keeps, the gradients of the adapters, one layer of
    dequantized weights, and eight bf16 [tokens, intermediate] at work in its MLP: gate,
    up and their product, the gradients of the three, and two results of products.
    """
    layers, wide = config["num_hidden_layers"], config["intermediate_size"]
    gradients = layers * sum(4 * RANK * (o + i) for o, i in linears(config))
    return kept * layers * TOKENS + gradients + 2 * weights(config) + 16 * TOKENS * wide


def size(shape: tuple) -> int:
    return math.prod(shape[1])


def dequantized(kernels: list) -> int:
    """Weights that the kernels of a loop turn from codes into bf16."""
    return sum(
        size(shape)
        for k in kernels
        if k.operation == "fusion" and " gather(" in k.fused
        for shape in k.results
        if shape[0] == "bf16"
    )


def joined(config: dict, *, repeated: bool) -> tuple[int, int]:
    """Numbers of adapters next to the weights, forward and backward.

    Columns for each rank of q, k and v, of gate and up; backward also rows of down, and
    of o, whose weight is written without them where the forward pass is repeated.
    """
    d, f = config["hidden_size"], config["intermediate_size"]
    kv = d // config["num_attention_heads"] * config["num_key_value_heads"]
    columns = 3 * RANK * (d + 2 * kv) + 2 * RANK * 2 * f
    return columns, columns + RANK * (f + d * (not repeated))


def dequantizes_once(program, beside: tuple[int, int]) -> bool:
    """Each weight once forward, and once backward."""
    loops = (program.loop(FORWARD), program.loop(BACKWARD))
    written = [dequantized(loop) - weights(LLAMA_8B) for loop in loops]
    return tuple(written) == beside


def no_logits_of_all_tokens(program) -> bool:
    shapes = [s for s in program.shapes() if s[0] in ("f32", "bf16", "f16")]
    logits = [s for s in shapes if 128256 in s[1] and 4096 not in s[1]]
    return max(map(size, logits)) <= 512 * 128256


def calls(kernels: list, target: str) -> int:
    return sum(k.calls(f'{target}"') for k in kernels)


def products(kernels: list) -> list:
    """Products of matrices, alone or in a fusion that writes them elsewhere."""
    return [k for k in kernels if "__cublas" in k.text + k.fused]


@pytest.fixture(scope="module")
def full(compile_step: Callable):
    return compile_step(LLAMA_8B)


@pytest.fixture(scope="module")
def save_matmuls(compile_step: Callable):
    return compile_step(LLAMA_8B, remat="save_matmuls")


def test_the_state_is_updated_in_place_and_the_base_is_packed(full):
    adapters = 32 * sum(4 * RANK * (o + i) for o, i in linears(LLAMA_8B))
    state = 3 * adapters
    assert state <= full.memory["aliased"] <= state + 1024
    # Codes, 8-bit block scales and their float32 scales; tables; bf16 vectors; head.
    packed = 32 * (weights(LLAMA_8B) * (1 / 2 + 1 / 64 + 4 / (64 * 256)) + 7 * 1028)
    dense = 2 * (2 * 128256 * 4096 + 65 * 4096)
    batch = 2 * 4 * TOKENS
    total = state + packed + dense + batch
    assert full.memory["arguments"] == pytest.approx(total, rel=1e-5)


def test_full_remat_keeps_the_input_of_each_layer(full):
    assert full.memory["temporaries"] <= budget(LLAMA_8B, kept=2 * 4096)


def test_save_matmuls_keeps_the_results_of_products_and_attention(save_matmuls):
    # Input, q, k, v, attention and its log-sum-exp, o, gate, up, and the rank-wide
    # product of each adapter. The result of down is never needed again.
    kept = 2 * (4 * 4096 + 2 * 1024 + 2 * 14336 + 7 * RANK) + 4 * 32
    assert save_matmuls.memory["temporaries"] <= budget(LLAMA_8B, kept=kept)


def test_no_logits_of_all_tokens_and_no_weights_of_all_layers(full, save_matmuls):
    stacked = {32 * o * i for o, i in linears(LLAMA_8B)}
    for program in (full, save_matmuls):
        assert no_logits_of_all_tokens(program)
        floats = [s for s in program.shapes() if s[0] in ("f32", "bf16", "f16")]
        assert not [s for s in floats if size(s) in stacked]


def test_a_weight_is_dequantized_once_forward_and_once_backward(full, save_matmuls):
    # Recomputation and the input gradient share one.
    assert dequantizes_once(full, beside=joined(LLAMA_8B, repeated=True))
    assert dequantizes_once(save_matmuls, beside=joined(LLAMA_8B, repeated=False))


def test_products_are_written_in_bf16_and_added_to_in_place(full):
    for loop, adapted in ((FORWARD, 2), (BACKWARD, 1)):
        products = [k for k in full.loop(loop) if "__cublas" in k.text]
        results = [s for k in products for s in k.results]
        assert not [s for s in results if s[0] == "f32" and TOKENS in s[1]]
        # An update is a part of the product with the weight, or added by its product
        # (beta = 1): those of o and down forward, and that of o once more.
        assert sum('"beta":1' in k.text for k in products) == adapted


def test_products_that_are_saved_are_multiplied_once(full, save_matmuls):
    # XLA may write a product into the stack of all layers from within a fusion, and
    # multiply again for those that read it.
    plain, ours = (products(p.loop(FORWARD)) for p in (full, save_matmuls))
    assert len(ours) == len(plain)


def test_the_host_launches_each_layer_at_once(full, save_matmuls):
    for program in (full, save_matmuls):
        # An iteration forward is one command buffer (CUDA graph), and one backward.
        forward, backward = program.graphs(FORWARD), program.graphs(BACKWARD)
        assert len(forward) == len(backward) == 1
        assert -1 not in forward | backward and forward != backward


def test_auto_runs_cudnn(full):
    assert calls(full.loop(FORWARD), "__cudnn$fmhaSoftmax") == 1
    backward = full.loop(BACKWARD)
    assert calls(backward, "__cudnn$fmhaSoftmax") == 1
    assert calls(backward, "__cudnn$fmhaSoftmaxBackward") == 1


def test_save_matmuls_runs_attention_once(save_matmuls):
    backward = save_matmuls.loop(BACKWARD)
    assert calls(backward, "__cudnn$fmhaSoftmaxBackward") == 1
    assert calls(backward, "__cudnn$fmhaSoftmax") == 0


def test_packed_rows_run_blockwise_attention(compile_step):
    program = compile_step(LLAMA_8B, packed=True)
    assert "__cudnn$fmha" not in program.text
    # Scores of a whole row would be [..., 2048, 2048].
    assert not [s for s in program.shapes() if s[1][-2:] == (2048, 2048)]


def test_a_tied_head_is_never_copied_to_float32(compile_step):
    program = compile_step(LLAMA_1B)
    assert ("f32", (128256, 2048)) not in program.shapes()
    assert program.memory["temporaries"] <= budget(LLAMA_1B, kept=2 * 2048)


def test_dora_dequantizes_and_multiplies_nothing_twice(compile_step, full):
    program = compile_step(LLAMA_8B, lora={"use_dora": True})
    # The rows' norms come from the same dequantized weight, once: they are kept.
    assert dequantizes_once(program, beside=(0, 0))
    # Those are W A^T, A A^T, B (A A^T) of each layer. DoRA is not joined: B for each
    # layer; the compiler joins A of one input, and q, k and v.
    assert len(products(program.loop(FORWARD))) == 3 * 7 + 7 + 4 + 5
    # B A is never formed: no float32 [out, in].
    shapes = program.shapes()
    assert not [s for s in shapes if s[0] == "f32" and s[1] in linears(LLAMA_8B)]
    # What is rescaled is kept while its layer's derivatives are taken: two more bf16
    # [tokens, intermediate]; and the update, of which a joined product makes no array.
    more = 6 * TOKENS * LLAMA_8B["intermediate_size"]
    assert program.memory["temporaries"] <= full.memory["temporaries"] + more


def test_tables_trained_whole_cost_their_gradients(compile_step, full):
    tables = {"modules_to_save": ("embed_tokens", "lm_head")}
    program = compile_step(LLAMA_8B, lora=tables)
    vocab, d = LLAMA_8B["vocab_size"], LLAMA_8B["hidden_size"]
    both = 2 * 4 * vocab * d
    # Weights, moments: updated in place.
    grown = program.memory["aliased"] - full.memory["aliased"]
    assert grown == pytest.approx(3 * both, rel=1e-6)
    # A layer at work, or the loss: of jax 0.11 a chunk's gradient of the head is
    # written before it is added, beside the layers' inputs, the chunk's logits in
    # float32 and their gradient in bf16.
    chunk, inputs = 512, 2 * 32 * 8192 * d
    written = ("f32", (d, vocab)) in program.shapes()
    loss = inputs + written * (4 * d + (4 + 2) * chunk) * vocab
    most = max(full.memory["temporaries"], loss)
    assert program.memory["temporaries"] <= most + both


def test_offload_keeps_nothing_of_the_layers_on_the_device(compile_step):
    length = 32768
    places = {"embed_tokens": "host", "lm_head": "host"}
    sizes = {"batch": 1, "length": length, "places": places}
    program = compile_step(LLAMA_8B, remat="offload", **sizes)
    d, wide = LLAMA_8B["hidden_size"], LLAMA_8B["intermediate_size"]
    stacked = [s for s in program.shapes() if s[1] == (32, 1, length, d)]
    assert stacked == [("bf16", (32, 1, length, d))]
    # With its layout an array names its memory: S(5) is the host's memory.
    layouts = re.findall(rf"bf16\[32,1,{length},{d}\]\{{(.*?)\}}", program.text)
    assert layouts and set(layouts) == {"3,2,1,0:S(5)"}
    # The MLP at work on 4,096 tokens, never on the whole row.
    widths = {s[1] for s in program.shapes() if s[1][-1:] == (wide,)}
    assert (4096, wide) in widths
    assert not [s for s in widths if math.prod(s) >= length * wide]
    # Queries, keys and values are projected once more from the layer's input.
    again = sum(o * i for o, i in linears(LLAMA_8B)[:3])
    # Nothing is next to the weights: adapters are products of their own.
    assert dequantized(program.loop(FORWARD)) == weights(LLAMA_8B)
    assert dequantized(program.loop(BACKWARD)) <= weights(LLAMA_8B) + again
    assert no_logits_of_all_tokens(program)
