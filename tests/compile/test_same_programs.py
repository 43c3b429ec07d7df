"""The step of Llama-3.1-8B stays the program that it was.

Switches of other families must cost a Llama nothing, so what its compiled step does is
recorded for a version of jax (figures.json) and compared to the last byte. A change
that is meant is recorded: a failure prints the new figures. For other versions, whose
compiler fuses otherwise, the products are compared with the count of them by formula.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import pytest

from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning.estimate import flops_per_token
from qlora_jax.planning.step import Step
from qlora_jax.training.config import TrainConfig
from scripts.bench.program import count_work

pytestmark = pytest.mark.compile

LLAMA_8B = MODELS["8b"].hf_config
FIGURES = json.loads(Path(__file__).with_name("figures.json").read_text())
CASES = {
    "whole rows": {},
    "packed rows": {"packed": True},
    "save_matmuls": {"remat": "save_matmuls"},
}


@pytest.mark.parametrize("case", CASES)
def test_the_step_of_a_llama_is_the_one_on_record(case, compile_step: Callable):
    program = compile_step(LLAMA_8B, **CASES[case])
    figures = dataclasses.asdict(count_work(program.text))
    figures |= {name: program.memory[name] for name in ("arguments", "temporaries")}
    recorded = FIGURES.get(jax.__version__)
    if recorded is None:
        known = ", ".join(FIGURES)
        pytest.skip(f"no figures of jax {jax.__version__} ({known}): {figures}")
    assert figures == recorded[case]


@pytest.mark.parametrize("remat", ["full", "save_matmuls"])
def test_its_products_are_those_of_the_formula(remat, compile_step: Callable):
    program = compile_step(LLAMA_8B, remat=remat)
    step = Step(
        LlamaConfig.from_hf(LLAMA_8B),
        Compute(lora=LoraConfig(r=16), remat=remat),
        length=2048,
        train=TrainConfig(steps=1, batch_size=4),
    )
    config = step.config
    # cuDNN computes attention: half of the keys on average, 2 products forward and 5
    # backward, and the forward pass again where it is recomputed.
    times = 3.5 + (remat == "full")
    wide = config.num_attention_heads * config.head_dim
    attention = 4 * 1024 * wide * times * config.num_hidden_layers
    expected = step.tokens * (flops_per_token(step) - attention)
    found = count_work(program.text).product_flops
    # The formula recomputes every adapter, and the last product of the block, with
    # down's lora_B, is not needed again: 2 x 16 x 4,096 operations a token and layer.
    spared = 2 * 16 * config.hidden_size * step.tokens * config.num_hidden_layers
    # In joined products the columns of an adapter meet the outputs of others: two of
    # three for q, k and v, one of two for gate and up. Forward, in the gradients of
    # inputs and of lora_B, and where the forward pass is repeated.
    pairs = config.num_key_value_heads * config.head_dim
    crossed = 2 * (config.hidden_size + 2 * pairs) + 2 * config.intermediate_size
    crossed *= 2 * 16 * step.tokens * config.num_hidden_layers
    repeated = remat == "full"
    assert found == expected - spared * repeated + crossed * (3 + repeated)
