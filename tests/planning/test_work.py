"""Bytes and operations of each kind of kernel, on programs of a few lines."""

import pytest

from qlora_jax.lora.config import LoraConfig
from qlora_jax.planning.hlo import parse
from qlora_jax.planning.work import Sizes, count_kernels, mean_keys
from tests.models.reference import CONFIG

LAYERS, ROWS, LENGTH = 4, 2, 128
SIZES = Sizes(
    layers=LAYERS,
    rows=ROWS,
    length=LENGTH,
    hidden=64,
    intermediate=96,
    vocabulary=1000,
    widths=frozenset((64, 96, 32)),
    ranks=frozenset((8,)),
    keys=LENGTH / 2,
)


def kernels(entry: str, fused: str = "", sizes: Sizes = SIZES) -> list:
    """The kernels of a program; `fused` is the body of the computation `f`."""
    text = (
        f"%f (p: f32[]) -> f32[] {{\n{fused}\n}}\n\nENTRY %m (a: f32[]) -> f32[] {{\n"
    )
    return count_kernels(parse(f"{text}{entry}\n}}\n"), sizes)


def fusion(fused: str, result: str, *parameters: str):
    """The kernel of a fusion of parameters of these types."""
    entry = "\n".join(
        f"  %a{i} = {type_} parameter({i})" for i, type_ in enumerate(parameters)
    )
    operands = ", ".join(f"%a{i}" for i in range(len(parameters)))
    entry += f"\n  ROOT %k = {result} fusion({operands}), kind=kLoop, calls=%f"
    inner = "\n".join(
        f"  %p{i} = {type_} parameter({i})" for i, type_ in enumerate(parameters)
    )
    (kernel,) = kernels(entry, f"{inner}\n{fused}")
    return kernel


# --- Fusions ---

STACK = "bf16[4,256,64]{2,1,0}"  # 128 KiB of each of 4 layers: 32 KiB
SLICE = "dynamic_slice_sizes={1,256,64}"


@pytest.mark.parametrize(
    ("fused", "result", "parameters", "bytes_"),
    [
        (  # elementwise: read both, write one
            "  ROOT %r = f32[256]{0} add(%p0, %p1)",
            "f32[256]{0}",
            ("f32[256]{0}", "f32[256]{0}"),
            3 * 1024,
        ),
        (  # what is used twice is read once
            "  ROOT %r = f32[256]{0} multiply(%p0, %p0)",
            "f32[256]{0}",
            ("f32[256]{0}",),
            2 * 1024,
        ),
        (  # a broadcast reads its operand once
            "  %b = f32[256,16]{1,0} broadcast(%p0), dimensions={0}\n"
            "  ROOT %r = f32[256,16]{1,0} negate(%b)",
            "f32[256,16]{1,0}",
            ("f32[256]{0}",),
            1024 + 16384,
        ),
        (  # a reduction reads all
            "  ROOT %r = f32[256]{0} reduce(%p0, %p1), dimensions={1}, to_apply=%add",
            "f32[256]{0}",
            ("f32[256,16]{1,0}", "f32[]"),
            16384 + 4 + 1024,
        ),
        (  # one layer's slice of a stack, at an index
            f"  %s = bf16[1,256,64]{{2,1,0}} dynamic-slice(%p0, %p1), {SLICE}\n"
            "  ROOT %r = bf16[256,64]{1,0} bitcast(%s)",
            "bf16[256,64]{1,0}",
            (STACK, "s32[]"),
            2 * 32768 + 4,
        ),
        (  # an update in place writes what is new, in the dtype of the stack
            "  %c = bf16[1,256,64]{2,1,0} convert(%p1)\n"
            f"  ROOT %r = {STACK} dynamic-update-slice(%p0, %c, %p2)",
            STACK,
            (STACK, "f32[1,256,64]{2,1,0}", "s32[]"),
            65536 + 32768 + 4,
        ),
        (  # a lookup of 16 rows of a table, by 16 indices
            "  ROOT %r = bf16[16,64]{1,0} gather(%p0, %p1), offset_dims={1}",
            "bf16[16,64]{1,0}",
            ("bf16[1000,64]{1,0}", "s32[16]{0}"),
            2 * 2048 + 64,
        ),
        (  # codes and a table of 16: the table once
            "  ROOT %r = bf16[1024]{0} gather(%p0, %p1), offset_dims={}",
            "bf16[1024]{0}",
            ("f32[16]{0}", "u8[1024]{0}"),
            64 + 1024 + 2048,
        ),
        (  # two results
            "  %n = f32[256]{0} negate(%p0)\n"
            "  ROOT %r = (f32[256]{0}, bf16[256]{0}) tuple(%n, %p1)",
            "(f32[256]{0}, bf16[256]{0})",
            ("f32[256]{0}", "bf16[256]{0}"),
            2 * 1024 + 2 * 512,
        ),
    ],
)
def test_a_fusion_moves_what_it_touches(fused, result, parameters, bytes_):
    kernel = fusion(fused, result, *parameters)
    assert kernel.kind == "fusion"
    assert (kernel.bytes, kernel.flops) == (bytes_, 0)


PRODUCT = (
    'custom_call_target="__cublas$lt$matmul", backend_config={"alpha_real":1,"beta":%s,'
    '"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"],'
    '"rhs_contracting_dimensions":["0"]}}'
)
MATRICES = (
    "  %x = bf16[256,64]{1,0} parameter(0)\n  %w = bf16[64,96]{1,0} parameter(1)\n"
)
MOVED = 2 * (256 * 64 + 64 * 96 + 256 * 96)


@pytest.mark.parametrize(("beta", "added"), [("0", 0), ("1", 2 * 256 * 96)])
def test_a_product_that_adds_reads_what_it_adds_to(beta, added):
    (kernel,) = kernels(
        f"{MATRICES}  %c = bf16[256,96]{{1,0}} parameter(2)\n"
        "  ROOT %k = (bf16[256,96]{1,0}, s8[4194304]{0}) custom-call(%x, %w, %c), "
        + PRODUCT
        % beta
    )
    # The workspace of cuBLAS is not the result.
    assert (kernel.kind, kernel.bytes) == ("product", MOVED + added)
    assert kernel.flops == 2 * 256 * 64 * 96
    assert kernel.product.features(tokens=256) == [96, 64]


def test_a_dot_is_a_product_and_its_precision_is_kept():
    (kernel,) = kernels(
        f"{MATRICES}  ROOT %k = f32[256,96]{{1,0}} dot(%x, %w), "
        "lhs_contracting_dims={1}, rhs_contracting_dims={0}, "
        "operand_precision={highest,highest}"
    )
    assert kernel.flops == 2 * 256 * 64 * 96
    assert kernel.high_precision


def test_a_product_of_a_slice_reads_the_slice():
    kernel = fusion(
        f"  %s = bf16[1,256,64]{{2,1,0}} dynamic-slice(%p0, %p2), {SLICE}\n"
        "  %x = bf16[256,64]{1,0} bitcast(%s)\n"
        "  %g = (bf16[256,96]{1,0}, s8[4194304]{0}) custom-call(%x, %p1), "
        + PRODUCT
        % "0"
        + "\n  %y = bf16[256,96]{1,0} get-tuple-element(%g), index=0\n"
        "  %z = s8[4194304]{0} get-tuple-element(%g), index=1\n"
        "  ROOT %r = (bf16[256,96]{1,0}, s8[4194304]{0}) tuple(%y, %z)",
        "(bf16[256,96]{1,0}, s8[4194304]{0})",
        *(STACK, "bf16[64,96]{1,0}", "s32[]"),
    )
    assert (kernel.kind, kernel.bytes) == ("product", MOVED + 4)
    assert kernel.flops == 2 * 256 * 64 * 96


# --- Attention ---

HEADS, WIDTH = 4, 16
QUERY = ROWS * LENGTH * HEADS * WIDTH
QKV = "".join(
    f"  %{name} = bf16[2,128,4,16]{{3,2,1,0}} parameter({i})\n"
    for i, name in enumerate(("q", "k", "v", "o", "g"))
)
OUT = "bf16[2,128,4,16]{3,2,1,0}"


def cudnn(backward: bool, mask: str = "CAUSAL", window: int = 0) -> str:
    target = "__cudnn$fmhaSoftmax" + "Backward" * backward
    return (
        f'custom_call_target="{target}", backend_config={{"intermediate_tensor_shape":'
        '{"dimensions":["2","4","128","128"]},'
        f'"mask_type":"{mask}","sliding_window_length":{window}}}'
    )


@pytest.mark.parametrize(
    ("mask", "window", "keys"),
    [("CAUSAL", 0, 64), ("CAUSAL", 32, 32 - 32 * 32 / 256), ("NO_MASK", 0, 128)],
)
def test_cudnn_attends_to_the_keys_that_its_mask_leaves(mask, window, keys):
    forward, backward = kernels(
        f"{QKV}  %s = f32[2,4,128]{{2,1,0}} parameter(5)\n"
        f"  %f = ({OUT}, f32[2,4,128]{{2,1,0}}, u8[999]{{0}}) custom-call(%q, %k, %v), "
        f"{cudnn(False, mask, window)}\n"
        f"  ROOT %b = ({OUT}, {OUT}, {OUT}, u8[0]{{0}}) "
        f"custom-call(%q, %k, %v, %s, %g, %o), {cudnn(True, mask, window)}"
    )
    assert forward.flops == 4 * QUERY * keys
    assert backward.flops == 10 * QUERY * keys  # 5 products for 2
    sums = 4 * ROWS * HEADS * LENGTH
    assert forward.bytes == 4 * 2 * QUERY + sums
    # dQ is summed in float32, beside the eight arrays.
    assert backward.bytes == 8 * 2 * QUERY + sums + 2 * 4 * QUERY


@pytest.mark.parametrize(
    ("name", "kind", "each"),
    [
        ("attention_forward", "attention forward", 4),
        ("attention_backward_queries", "attention backward", 6),
        ("attention_backward_keys", "attention backward", 8),
        ("another", "mosaic", 0),
    ],
)
@pytest.mark.parametrize("call", ["mpmd_map", "pallas_call"])
def test_a_mosaic_kernel_is_known_by_its_name(name, kind, each, call):
    (kernel,) = kernels(
        f"{QKV}  ROOT %m = {OUT} custom-call(%q, %k, %v), "
        'custom_call_target="mosaic_gpu_v2", '
        f'metadata={{op_name="jit(f)/attention/{name}/{call}"}}'
    )
    assert (kernel.kind, kernel.mosaic) == (kind, name)
    assert kernel.flops == each * QUERY * LENGTH / 2
    assert kernel.bytes == 4 * 2 * QUERY


@pytest.mark.parametrize("name", ["nf4_matmul", "nf4_products"])
def test_a_mosaic_kernel_reads_one_layer_of_a_stack(name):
    # Two weights that share x, each with the 8-bit scales of its blocks.
    (kernel,) = kernels(
        "  %x = bf16[8,64]{1,0} parameter(0)\n"
        "  %gate = u8[4,96,32]{2,1,0} parameter(1)\n"
        "  %gate_scales = u8[4,96]{1,0} parameter(2)\n"
        "  %up = u8[4,32,32]{2,1,0} parameter(3)\n"
        "  %up_scales = u8[4,32]{1,0} parameter(4)\n"
        "  ROOT %y = f32[8,96]{1,0} custom-call(%x, %gate, %gate_scales, %up, "
        '%up_scales), custom_call_target="mosaic_gpu_v2", '
        f'metadata={{op_name="jit(f)/mlp/{name}/mpmd_map"}}'
    )
    assert kernel.bytes == 2 * 8 * 64 + 33 * (96 + 32) + 4 * 8 * 96
    assert kernel.flops == 2 * 8 * 64 * (96 + 32)


@pytest.mark.parametrize("name", ["norm_forward", "norm_backward"])
def test_a_norm_with_low_rank_products_is_a_pass_over_memory(name):
    (kernel,) = kernels(
        "  %x = bf16[32,64]{1,0} parameter(0)\n"
        "  %z = bf16[32,16]{1,0} parameter(1)\n"
        "  %a = bf16[64,16]{1,0} parameter(2)\n"
        "  ROOT %y = bf16[32,64]{1,0} custom-call(%x, %z, %a), "
        'custom_call_target="mosaic_gpu_v2", '
        f'metadata={{op_name="jit(f)/mlp/{name}/mpmd_map"}}'
    )
    assert kernel.bytes == 2 * (2 * 32 * 64 + 32 * 16 + 64 * 16)
    assert kernel.flops == 2 * 32 * 64 * 16


@pytest.mark.parametrize(
    ("name", "operands"),
    [("gated_forward", "%y, %a"), ("gated_backward", "%y, %dh, %z")],
)
def test_an_activation_with_low_rank_products_is_a_pass_over_memory(name, operands):
    arrays = {"y": (32, 128), "dh": (32, 64), "a": (16, 64), "z": (16, 32)}
    entry = "".join(
        f"  %{key} = bf16[{n},{m}]{{1,0}} parameter({i})\n"
        for i, (key, (n, m)) in enumerate(arrays.items())
    )
    (kernel,) = kernels(
        f"{entry}  ROOT %h = bf16[32,64]{{1,0}} custom-call({operands}), "
        'custom_call_target="mosaic_gpu_v2", '
        f'metadata={{op_name="jit(f)/mlp/{name}/mpmd_map"}}'
    )
    assert kernel.flops == 2 * 32 * 64 * 16
    read = (arrays[key.strip("% ")] for key in operands.split(","))
    assert kernel.bytes == 2 * (32 * 64 + sum(n * m for n, m in read))


@pytest.mark.parametrize(("window", "keys"), [(None, 50), (100, 50), (10, 9.5)])
def test_a_token_sees_the_keys_of_its_window(window, keys):
    # 10 of 100: the first ten tokens see half of them on average.
    assert mean_keys(100, window) == keys


# --- Copies, hosts, branches ---


def test_copies_to_the_host_are_bytes_of_both_memories():
    (kernel,) = kernels(
        "  %a = bf16[256,64]{1,0} parameter(0)\n"
        "  %s = (bf16[256,64]{1,0:S(5)}, bf16[256,64]{1,0}, u32[]) copy-start(%a)\n"
        "  ROOT %d = bf16[256,64]{1,0:S(5)} copy-done(%s)"
    )
    assert (kernel.kind, kernel.bytes, kernel.host_bytes) == ("copy", 32768, 32768)


@pytest.mark.parametrize(
    ("line", "kind", "bytes_"),
    [
        ("f32[256]{0} copy(%a)", "copy", 2048),
        ("f32[16]{0} slice(%a), slice={[0:16]}", "slice", 128),
        ("f32[256]{0} dynamic-update-slice(%a, %u, %i)", "dynamic-update-slice", 128),
        ("f32[512]{0} all-gather(%a), dimensions={0}", "collective", 3072),
        ("f32[256]{0} custom-call(%a), custom_call_target=\"sort\"", "sort", 2048),
    ],
)  # fmt: skip
def test_an_instruction_that_fuses_nothing(line, kind, bytes_):
    parameters = ("f32[256]{0}", "f32[16]{0}", "s32[]")
    entry = "".join(
        f"  %{name} = {type_} parameter({i})\n"
        for i, (name, type_) in enumerate(zip("aui", parameters, strict=True))
    )
    (kernel,) = kernels(f"{entry}  ROOT %k = {line}")
    assert (kernel.kind, kernel.bytes) == (kind, bytes_)


def test_sizes_are_those_of_the_config():
    lora = LoraConfig(r=4, rank_pattern={"q_proj": 2})
    sizes = Sizes.of_model(CONFIG, lora, rows=3, length=10)
    assert sizes.tokens == 30
    assert sizes.ranks == {2, 4}
    assert (sizes.layers, sizes.vocabulary) == (
        CONFIG.num_hidden_layers,
        CONFIG.vocab_size,
    )
    assert sizes.keys == 5
