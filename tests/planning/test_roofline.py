"""Categories of kernels, and their times at the rates of a GPU."""

import dataclasses
import json

import pytest

from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning import categories as c
from qlora_jax.planning import estimate
from qlora_jax.planning.gpus import CARDS, find_gpu
from qlora_jax.planning.hlo import parse
from qlora_jax.planning.roofline import (
    IDEAL,
    REACHABLE,
    Rates,
    count_step,
    time_kernels,
)
from qlora_jax.planning.step import Step
from qlora_jax.planning.work import Sizes, count_kernels
from qlora_jax.training.config import TrainConfig
from tests.models.reference import CONFIG
from tests.planning.programs import (
    BACKWARD,
    FORWARD,
    HIDDEN,
    LOSS,
    REMAT,
    SIZES,
    TOKEN,
    TOKEN_LAYER,
    TOKENS,
    TWO,
    UNROLLED,
    UNROLLED_BACKWARD,
    WIDE,
    custom,
    elementwise,
    product,
    program,
)


def kernel_of(body: str, op_name: str, *loops: str, sizes: Sizes = SIZES):
    (kernel,) = count_kernels(parse(program(body, op_name, *loops)), sizes)
    return kernel


@pytest.mark.parametrize(
    ("body", "op_name", "loops", "expected"),
    [
        (product(HIDDEN, WIDE), "down_proj/dot", [FORWARD], f"{c.BASE}, forward"),
        (product(128 + 128, HIDDEN), "k_proj/dot", [FORWARD], f"{c.BASE}, forward"),
        (product(16, HIDDEN), "q_proj/dot", [FORWARD], f"{c.LORA}, forward"),
        # The adapters of q, k and v side by side.
        (product(48, HIDDEN), "q_proj/dot", [FORWARD], f"{c.LORA}, forward"),
        (product(HIDDEN, WIDE), "up/dot", [BACKWARD], f"{c.BASE}, input gradient"),
        # A gradient of lora_B: the terms of its sums are tokens.
        (product(16, TOKENS, HIDDEN), "q/dot", [BACKWARD], f"{c.LORA}, backward"),
        (product(WIDE, HIDDEN), f"{REMAT}/dot", [BACKWARD], f"{c.BASE}, recomputed"),
        (product(5000, HIDDEN), "head/dot", [LOSS], c.HEAD),
        (product(64, HIDDEN), "dot", [], c.OTHER),
        (custom("__cudnn$fmhaSoftmax"), "a/b", [FORWARD], f"{c.ATTENTION}, forward"),
        (custom("__cudnn$fmhaSoftmax"), "a", [BACKWARD], f"{c.ATTENTION}, recomputed"),
        (
            custom("__cudnn$fmhaSoftmaxBackward"),
            *("a", [BACKWARD], f"{c.ATTENTION}, backward"),
        ),
        # A product of XLA's blockwise attention, in a loop of its own.
        (
            product(64, 128),
            "layers/self_attn/attention/cond/dot",
            [FORWARD, f"{FORWARD}/body/layers/self_attn/attention/while"],
            f"{c.ATTENTION}, forward",
        ),
        (
            elementwise(2, 128, HIDDEN),
            *("layers/input_layernorm/mul", [FORWARD], f"{c.NORM}, forward"),
        ),
        (
            elementwise(2, 128, WIDE),
            *("layers/mlp/down_proj/mul", [BACKWARD], f"{c.MLP}, backward"),
        ),
        (
            elementwise(2, 128, HIDDEN),
            *("layers/add", [FORWARD], f"{c.SUMS}, forward"),
        ),
        (
            elementwise(2, 128, HIDDEN),
            *("layers/self_attn/concatenate", [FORWARD], f"{c.ROPE}, forward"),
        ),
        (elementwise(16, HIDDEN), "q_proj/convert", [FORWARD], c.SMALL),
        (elementwise(2, 128, 5000), "exp", [LOSS], c.LOSS),
        (elementwise(5000, HIDDEN), "adam/mul", [], c.OPTIMIZER),
        (custom("mosaic_gpu_v2"), "q/nf4_dequantize/mpmd_map", [FORWARD], c.DEQUANTIZE),
        (custom("mosaic_gpu_v2"), "q/new_kernel/mpmd_map", [FORWARD], c.OTHER),
        (custom("unheard_of"), "layers/new", [FORWARD], c.OTHER),
        (
            product(HIDDEN, WIDE, 2),
            "layers/down_proj/dot",
            [TOKEN, TOKEN_LAYER],
            c.BASE,
        ),
        (elementwise(2, 5000), f"{TOKEN}/body/argmax", [TOKEN], c.SAMPLING),
        # Unrolled layers have their scope, and no loop.
        (product(HIDDEN, WIDE), f"{UNROLLED}/mlp/dot", [], f"{c.BASE}, forward"),
        (
            elementwise(2, 128, WIDE, 2),
            *(f"{UNROLLED_BACKWARD}/mlp/mul", [], f"{c.MLP}, backward"),
        ),
        # x and z = A x of three adapters, side by side.
        (
            elementwise(2, 128, HIDDEN + 48),
            *("q_proj_k_proj_v_proj/concatenate", [FORWARD], f"{c.JOINED}, forward"),
        ),
        # A micro-batch is a loop around all others.
        (
            product(HIDDEN, WIDE),
            *("dot", ["jit(train_step)/while", FORWARD], f"{c.BASE}, forward"),
        ),
    ],
)
def test_a_kernel_serves_a_part_of_the_model(body, op_name, loops, expected):
    assert c.category(kernel_of(body, op_name, *loops), SIZES) == expected


def test_a_rank_that_is_a_width_of_the_model_is_no_rank():
    # 64 = 4 x 16 adapters side by side, unless the model has layers that wide.
    sizes = dataclasses.replace(SIZES, widths=SIZES.widths | {64})
    kernel = kernel_of(product(64, HIDDEN), "k_proj/dot", FORWARD)
    assert c.category(kernel, SIZES) == f"{c.LORA}, forward"
    assert c.category(kernel, sizes) == f"{c.BASE}, forward"


def test_rows_of_generation_that_are_as_many_as_a_rank_are_no_rank():
    sizes = dataclasses.replace(SIZES, rows=16)
    loops = (TOKEN, TOKEN_LAYER)
    kernel = kernel_of(product(HIDDEN, WIDE, 16), "q/dot", *loops, sizes=sizes)
    assert c.category(kernel, sizes) == c.BASE
    kernel = kernel_of(product(16, HIDDEN, 16), "q/dot", *loops, sizes=sizes)
    assert c.category(kernel, sizes) == c.LORA


# --- Rates ---


def test_the_rates_of_an_h200():
    ideal, reachable = (Rates.of(CARDS["h200"], e) for e in (IDEAL, REACHABLE))
    assert ideal.products == pytest.approx(790e12, rel=2e-3)
    assert ideal.memory == pytest.approx(4.32e12)
    assert ideal.float32 == pytest.approx(53.5e12, rel=1e-3)
    assert reachable.products == pytest.approx(690e12, rel=2e-3)
    assert reachable.attention_forward == pytest.approx(600e12, rel=2e-3)
    assert reachable.attention_backward == pytest.approx(480e12, rel=2e-3)
    assert reachable.memory == pytest.approx(3.9e12)
    assert reachable.dequantization == pytest.approx(2.9e12)
    assert reachable.rank_wide == pytest.approx(2.4e12)


@pytest.mark.parametrize("card", CARDS)
def test_the_rates_of_every_gpu_follow_from_its_data_sheet(card):
    gpu = find_gpu(card)
    for efficiency in (IDEAL, REACHABLE):
        rates = Rates.of(gpu, efficiency)
        assert 0.5 * gpu.flops < rates.products < gpu.flops
        assert 0.5 * gpu.bandwidth < rates.memory < gpu.bandwidth
        # Without bfloat16 there is no TF32 either.
        assert (rates.tf32 == rates.float32) == (not gpu.bfloat16)
    fast, slow = (Rates.of(gpu, e) for e in (IDEAL, REACHABLE))
    for field in dataclasses.fields(Rates):
        if field.name not in ("name", "host_link", "launch_s", "graph_launch_s"):
            assert getattr(slow, field.name) < getattr(fast, field.name)
    # A bound: no step is faster at reachable rates than at ideal ones.
    assert fast.graph_launch_s < fast.launch_s <= slow.launch_s
    assert fast.graph_launch_s <= slow.graph_launch_s


def test_a_kernel_takes_the_longer_of_bytes_and_operations():
    rates = dataclasses.replace(
        Rates.of(CARDS["h200"], IDEAL),
        **{"products": 1e12, "memory": 1e9, "rank_wide": 5e8, "float32": 1e10},
        **{"tf32": 5e10},
    )
    kernel = kernel_of(product(HIDDEN, WIDE), "down_proj/dot", FORWARD)
    moved = 2 * (TOKENS * WIDE + WIDE * HIDDEN + TOKENS * HIDDEN)
    flops = 2 * TOKENS * HIDDEN * WIDE
    assert flops / 1e12 < moved / 1e9 < 2 * moved / 1e9 < flops / 5e10
    assert rates.seconds(kernel, c.BASE) == moved / 1e9
    assert rates.seconds(kernel, f"{c.LORA}, forward") == moved / 5e8
    assert rates.seconds(kernel, c.COLLECTIVES) == 0
    text = product(HIDDEN, WIDE).replace("bf16", "f32")
    tf32 = kernel_of(text, "dot", FORWARD)
    assert rates.seconds(tf32, c.BASE) == flops / 5e10
    exact = kernel_of(f"{text}, operand_precision={{highest,highest}}", "dot", FORWARD)
    assert rates.seconds(exact, c.BASE) == flops / 1e10


# --- Steps ---


def test_launches_cost_less_in_a_command_buffer():
    rates = Rates.of(CARDS["h200"], REACHABLE)

    def timing(text: str):
        return time_kernels(count_kernels(parse(text), SIZES), SIZES, rates)

    alone = timing(TWO)
    assert (alone.launches, alone.in_graphs) == (4, 0)
    assert alone.launch_seconds == pytest.approx(4 * rates.launch_s)
    # The body's kernel runs three times, so its buffer is launched three times.
    graphs = timing(f"{TWO}// command buffer: k\n")
    assert (graphs.launches, graphs.in_graphs, graphs.graph_launches) == (4, 3, 3)
    expected = (1 + 3) * rates.launch_s + 3 * rates.graph_launch_s
    assert graphs.launch_seconds == pytest.approx(expected)
    assert graphs.kernel_seconds == alone.kernel_seconds
    assert alone.seconds == alone.kernel_seconds + alone.launch_seconds


def test_transfers_to_the_host_run_beside_the_kernels():
    text = (
        "ENTRY %m (a: f32[]) -> f32[] {\n"
        "  %a = bf16[32000000]{0} parameter(0)\n"
        "  %s = (bf16[32000000]{0:S(5)}, bf16[32000000]{0}, u32[]) copy-start(%a)\n"
        "  ROOT %d = bf16[32000000]{0:S(5)} copy-done(%s)\n}\n"
    )
    kernels = count_kernels(parse(text), SIZES)
    timing = time_kernels(kernels, SIZES, Rates.of(CARDS["h200"], IDEAL))
    assert list(timing.rows) == [c.HOST]
    assert timing.host_seconds == pytest.approx(64e6 / 64e9)  # its PCI Express link
    assert timing.seconds == timing.host_seconds


@pytest.mark.parametrize("mesh", [None, {"data": 2}])
def test_a_step_is_counted_as_plain_data(mesh):
    devices = 1 if mesh is None else 2
    step = Step(
        CONFIG,
        Compute(lora=LoraConfig(r=4), remat="full"),
        length=64,
        train=TrainConfig(steps=1, batch_size=4, gradient_accumulation_steps=3),
    )
    necessary = estimate.necessary_flops(step, devices=devices)
    counted = count_step(TWO, step, CARDS["h200"], mesh=mesh, necessary_flops=necessary)
    assert json.loads(json.dumps(counted)) == counted
    assert counted["tokens"] == 4 * 3 * 64
    compute = dataclasses.replace(step.compute, remat="none")
    per_token = estimate.flops_per_token(dataclasses.replace(step, compute=compute))
    assert per_token < estimate.flops_per_token(step)
    assert necessary == pytest.approx(per_token * counted["tokens"] / devices)
    rates = Rates.of(CARDS["h200"], IDEAL)
    assert counted["floor_seconds"] == pytest.approx(necessary / rates.products)
    for name in ("ideal", "reachable"):
        parts = [row[f"{name}_seconds"] for row in counted["categories"].values()]
        total = counted[name]["seconds"]
        assert total == pytest.approx(sum(parts) + counted[name]["launch_seconds"])
        assert counted[name]["tokens_per_second"] == counted["tokens"] / total
    assert sum(r["launches"] for r in counted["categories"].values()) == 4
