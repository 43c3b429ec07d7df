"""Plans of steps as the GPU compiler makes them, and the formula beside.

Compiled without a GPU (`make compile`): sizes are exact, nothing is timed.
"""

import dataclasses

import pytest

from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning import estimate
from qlora_jax.planning.compile import compile_for
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.ladder import LADDER
from qlora_jax.planning.plan import Planner, granule
from qlora_jax.planning.step import Step
from qlora_jax.training.config import TrainConfig

pytestmark = pytest.mark.compile

LORA = LoraConfig(r=32)
RUNGS = {policy.name: policy for policy in LADDER}


def step_of(model: str, length: int, batch_size: int = 1) -> Step:
    return Step(
        LlamaConfig.from_hf(MODELS[model].hf_config),
        Compute(lora=LORA),
        length=length,
        train=TrainConfig(steps=1, batch_size=batch_size),
    )


# The oldest, the first with bfloat16 (8.0) and the newest: instructions follow from it.
BY_CAPABILITY = {card.compute_capability: name for name, card in CARDS.items()}
CAPABILITIES = min(BY_CAPABILITY), (8, 0), max(BY_CAPABILITY)


@pytest.mark.parametrize("card", [BY_CAPABILITY[key] for key in CAPABILITIES])
def test_a_step_compiles_for_the_oldest_and_the_newest_device(gpu_compiler, card):
    step = step_of("1b", 1024)
    if not CARDS[card].bfloat16:
        compute = dataclasses.replace(step.compute, dtype="float16", attention="xla")
        step = dataclasses.replace(step, compute=compute)
    made = compile_for(step, CARDS[card], python=gpu_compiler)
    assert 1.2e9 < made.memory.device_bytes < 2e9
    assert made.memory.activations == 2 * 16 * 1024 * 2048


# Every policy, model and way of taking an MLP (whole, in chunks) at least once. Without
# a loop over the layers, four of them: each is compiled.
GRID = [
    *(("1b", 4096, 1, policy) for policy in LADDER),
    ("3b", 8192, 1, RUNGS["full"]),
    *(("8b", 2048, 8, RUNGS[name]) for name in ("save_matmuls", "full")),
    *(("8b", 32768, 1, RUNGS[name]) for name in ("full", "offload")),
    *(("8b", 131072, 1, RUNGS[name]) for name in ("full", "offload, tables, xla")),
]


@pytest.mark.parametrize(
    ("model", "length", "batch_size", "policy"),
    GRID,
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_formula_is_within_10_percent_of_the_compiled_plan(
    gpu_compiler, model, length, batch_size, policy
):
    step = step_of(model, length, batch_size)
    if not policy.scan_layers:
        config = dataclasses.replace(step.config, num_hidden_layers=4)
        step = dataclasses.replace(step, config=config)
    step = policy.apply(step)
    made = compile_for(step, CARDS["h200"], python=gpu_compiler).memory
    formula = estimate.step_memory(step)
    # What is certain is exact.
    kinds = ("base", "adapters", "optimizer", "batch", "workspace")
    for kind in (*kinds, "host_base", "host_activations"):
        assert getattr(formula, kind) == getattr(made, kind)
    # Without arrays of all layers, gradients are told only where a shape is that of a
    # whole parameter.
    if policy.scan_layers:
        assert formula.gradients == made.gradients
    assert formula.activations == pytest.approx(made.activations, rel=1e-3)
    # 10 % of the whole: what a layer needs at work is the compiler's choice.
    assert formula.device_bytes == pytest.approx(made.device_bytes, rel=0.1)


# One of each kind of block: plain with q/k norms, biases, windows, fused projections,
# post-norms with soft caps and alternating windows, two rotary tables.
OTHER_FAMILIES = {
    "qwen3-8b": {
        "model_type": "qwen3",
        **{"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 151936},
    },
    "mistral-7b-v0.1": {
        "model_type": "mistral",
        **{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 32000},
        "sliding_window": 1024,
    },
    "phi-3-mini": {
        "model_type": "phi3",
        **{"hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32},
        **{"num_attention_heads": 32, "vocab_size": 32064, "sliding_window": 2047},
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        **{"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42},
        **{"num_attention_heads": 16, "num_key_value_heads": 8, "vocab_size": 256000},
    },
    "gemma-3-4b": {
        "model_type": "gemma3_text",
        **{"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34},
        **{"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 262208},
        "sliding_window": 1024,
    },
}


@pytest.mark.parametrize(
    ("model", "policy", "length"),
    [
        ("qwen3-8b", RUNGS["full"], 4096),
        ("mistral-7b-v0.1", RUNGS["save_matmuls"], 4096),
        ("phi-3-mini", RUNGS["full"], 4096),
        ("gemma-2-9b", RUNGS["save_matmuls"], 4096),
        ("gemma-3-4b", RUNGS["full"], 4096),
        # Long rows, whose MLP goes in chunks: attention takes more, and no copies.
        ("gemma-2-9b", RUNGS["offload, tables"], 65536),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_the_formula_holds_for_the_other_families(gpu_compiler, model, policy, length):
    config = LlamaConfig.from_hf(OTHER_FAMILIES[model])
    train = TrainConfig(steps=1, batch_size=1)
    step = policy.apply(Step(config, Compute(lora=LORA), length=length, train=train))
    made = compile_for(step, CARDS["h200"], python=gpu_compiler).memory
    formula = estimate.step_memory(step)
    for kind in ("base", "adapters", "optimizer", "workspace"):
        assert getattr(formula, kind) == getattr(made, kind)
    assert formula.activations == pytest.approx(made.activations, rel=1e-3)
    assert formula.device_bytes == pytest.approx(made.device_bytes, rel=0.1)


def test_a_card_s_longest_row_is_found_and_checked_on_both_sides(gpu_compiler):
    card = dataclasses.replace(CARDS["h200"], name="small", memory_bytes=4 * 10**9)
    messages = []
    planner = Planner(card, python=gpu_compiler, say=messages.append)
    plan = planner.longest(step_of("1b", 128), LADDER)
    assert plan.method == "compiled"
    assert plan.fits
    assert plan.report()["compiled_for"] == "NVIDIA H200"
    # A handful of compilations, not a bisection of the whole range.
    assert len(messages) <= 8
    length = plan.step.length + granule(plan.step.length)
    more = dataclasses.replace(plan.step, length=length)
    assert not planner.plan(more, plan.policy).fits


def test_two_to_the_31_elements_and_more_are_compiled(gpu_compiler):
    # [tokens, hidden_size] of 2^31 elements, of which every layer's is offloaded. (With
    # twice the tokens the table of attention's blocks has four times the constants.)
    step = RUNGS["offload, tables, xla"].apply(step_of("1b", 1 << 20))
    made = compile_for(step, CARDS["h200"], python=gpu_compiler).memory
    assert made.host_activations == 2 * 16 * 2048 << 20
    formula = estimate.step_memory(step)
    assert formula.device_bytes == pytest.approx(made.device_bytes, rel=0.1)


def test_over_several_devices_each_holds_its_share(gpu_compiler):
    step = step_of("1b", 2048, batch_size=8)
    single = compile_for(step, CARDS["h100"], python=gpu_compiler)
    assert single.collectives == {}
    shared = compile_for(step, CARDS["h100"], python=gpu_compiler, mesh={"fsdp": 8})
    assert shared.memory.base < single.memory.base / 7
    assert shared.memory.activations == single.memory.activations // 8
    # Weights come together for a layer, gradients of adapters are summed.
    assert shared.collectives["all-gather"]["count"] >= 2 * 16
    assert {"all-reduce", "reduce-scatter"} & set(shared.collectives)
    repeated = compile_for(step, CARDS["h100"], python=gpu_compiler, mesh={"data": 8})
    assert repeated.memory.base == single.memory.base
    assert repeated.memory.batch == single.memory.batch // 8
    # Nothing but the adapters' gradients has to be summed, and the loss; of joined
    # layers with the blocks between one's rank and another's outputs.
    c, layers = step.config, 16
    pairs = c.num_key_value_heads * c.head_dim
    crossed = 2 * (c.hidden_size + 2 * pairs) + 2 * c.intermediate_size
    sums = repeated.collectives["all-reduce"]["bytes"]
    most = repeated.memory.adapters + 4 * layers * LORA.r * crossed
    assert sums == pytest.approx(most, rel=0.05)


def test_kinds_of_bytes_come_from_the_plan(gpu_compiler):
    planner = Planner(CARDS["h200"], python=gpu_compiler)
    plan = planner.plan(step_of("1b", 1024, 8), RUNGS["save_matmuls"])
    c = plan.step.config
    # As test_train_step.py counts them: input, q, k, v, attention and its log-sum-exp,
    # o, gate, up, and the rank-wide product of each adapter.
    a_layer = 2 * (4 * 2048 + 2 * 512 + 2 * 8192 + 7 * 32) + 4 * c.num_attention_heads
    assert plan.memory.activations == 16 * 8192 * a_layer
    assert plan.memory.gradients == plan.memory.adapters
    assert plan.memory.temporaries > 0


# Llama-3.1-8B, r=32 on the seven linear layers, one row: the card's memory in GB, and a
# row that has to fit with what the process takes besides.
BUDGETS = {8: 8192, 24: 196608, 80: 917504}


@pytest.mark.parametrize(("gigabytes", "length"), BUDGETS.items())
def test_long_rows_fit_small_cards(gpu_compiler, gigabytes, length):
    card = dataclasses.replace(CARDS["h200"], memory_bytes=gigabytes * 10**9)
    planner = Planner(card, python=gpu_compiler)
    plan = planner.plan(step_of("8b", length), RUNGS["offload, tables, xla"])
    assert plan.fits
    # One line for all of them: 7 GB, and 72 KiB a token.
    assert plan.total <= 7e9 + 72 * 1024 * length
    # The input of each layer, and the two tables.
    tables = 2 * 2 * 128256 * 4096
    assert plan.memory.host_bytes == 2 * 32 * 4096 * length + tables
    assert plan.memory.workspace == 0


def test_without_offload_131072_tokens_fit_an_h200(gpu_compiler):
    planner = Planner(CARDS["h200"], python=gpu_compiler)
    plan = planner.plan(step_of("8b", 131072), RUNGS["full"])
    assert plan.fits and not plan.memory.host_bytes
