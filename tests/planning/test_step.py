import dataclasses
import json
import math

import pytest

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.params import tree_bytes, tree_size
from qlora_jax.planning.estimate import parameter_report, step_memory
from qlora_jax.planning.step import (
    Step,
    StepMemory,
    abstract_arguments,
    lower,
    split_temporaries,
)
from qlora_jax.training.config import TrainConfig
from qlora_jax.tree import FrozenDict
from tests.models.reference import CONFIG as SMALL

SIZES = {"vocab_size": 256, "intermediate_size": 128, "num_hidden_layers": 3}
CONFIG = dataclasses.replace(SMALL, **SIZES)
STEP = Step(CONFIG, Compute(lora=LoraConfig(r=4)), length=32)


def test_a_step_round_trips_through_json():
    lora = LoraConfig(
        r=8,
        target_modules=("q_proj", "v_proj"),
        rank_pattern=FrozenDict({"q_proj": 4}),
        modules_to_save=("lm_head",),
        trainable_token_indices=(3, 5),
        use_dora=True,
    )
    step = Step(
        CONFIG,
        Compute(dtype="float16", remat="full", attention="xla", lora=lora),
        length=128,
        train=TrainConfig(steps=5, batch_size=3, max_grad_norm=None),
        quantization=None,
        packed=True,
        embed_tokens="host",
    )
    assert Step.from_json(json.loads(json.dumps(step.to_json()))) == step


def test_arguments_have_the_sizes_of_the_parameter_report():
    train = TrainConfig(steps=1, batch_size=2, gradient_accumulation_steps=5)
    step = dataclasses.replace(STEP, train=train, packed=True)
    state, base, batch = abstract_arguments(step)
    report = parameter_report(CONFIG, STEP.compute.lora)
    assert tree_bytes(base) == report.base_bytes
    assert tree_size(state.adapters) == report.trainable_parameters
    assert set(batch) == {"tokens", "labels", "positions", "segment_ids"}
    assert {leaf.shape for leaf in batch.values()} == {(5, 2, 32)}


def test_a_quantized_head_is_packed():
    _, base, _ = abstract_arguments(dataclasses.replace(STEP, lm_head="nf4"))
    assert base["lm_head"]["weight"].codes.shape == (256, 32)


def test_the_kinds_of_a_compiled_step_sum_to_its_bytes():
    compiled = lower(STEP).compile()
    memory, stats = StepMemory.of(compiled, STEP), compiled.memory_analysis()
    planned = stats.argument_size_in_bytes + stats.temp_size_in_bytes
    planned += stats.output_size_in_bytes - stats.alias_size_in_bytes
    assert memory.device_bytes == planned
    assert memory.host_bytes == 0
    assert memory.workspace == 0  # no cuDNN on a CPU
    report = parameter_report(CONFIG, STEP.compute.lora)
    assert memory.base == report.base_bytes
    assert memory.adapters == 4 * report.trainable_parameters
    # The step's number and the random key are state as well.
    assert memory.optimizer == report.optimizer_bytes + 4 + 8


def test_the_arguments_of_a_step_are_estimated_to_the_byte():
    train = TrainConfig(steps=1, batch_size=2, gradient_accumulation_steps=3)
    step = dataclasses.replace(STEP, train=train, packed=True)
    compiled, formula = StepMemory.of(lower(step).compile(), step), step_memory(step)
    for name in ("base", "adapters", "optimizer", "batch"):
        assert getattr(formula, name) == getattr(compiled, name), name


def test_a_longer_step_takes_more():
    sizes = []
    for length in (32, 64):
        step = dataclasses.replace(STEP, length=length)
        sizes.append(StepMemory.of(lower(step).compile(), step).device_bytes)
    assert sizes[0] < sizes[1]


def test_invalid_steps_are_refused():
    tied = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    rows = TrainConfig(steps=1, batch_size=2**11)
    micro = TrainConfig(steps=1, batch_size=1, gradient_accumulation_steps=2**12)
    for changes, message in (
        ({"length": 0}, "`max_length` must be at least 1 token, got 0"),
        ({"length": 2**20, "train": rows}, r"2,147,483,648 tokens.*counted in 32 bits"),
        ({"length": 2**19, "train": micro}, "counted in 32 bits"),
        ({"config": tied, "lm_head": "nf4"}, "lm_head='nf4': this model's head is its"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(STEP, **changes)
    with pytest.raises(UserError, match="needs a LoRA configuration"):
        abstract_arguments(dataclasses.replace(STEP, compute=Compute()))


def test_arrays_of_more_than_2_to_the_31_elements_are_traced():
    # Kept inputs [3, 1, T, 8192], and inside the MLP [T, 32768]: both beyond int32.
    config = dataclasses.replace(CONFIG, hidden_size=8192, intermediate_size=32768)
    compute = dataclasses.replace(STEP.compute, remat="save_matmuls")
    step = Step(config, compute, length=2**17)
    text = lower(step).as_text()
    for shape in ((3, 1, 2**17, 8192), (1, 2**17, 32768)):
        assert math.prod(shape) > 2**31
        assert "x".join(map(str, shape)) + "xbf16" in text


BUFFERS = """BufferAssignment:
allocation 0: size 99, parameter 0, shape |f32[3]| at ShapeIndex {}:
 value: <1 arg @0> (size=99,offset=0): f32[3]{0}

allocation 7: size 1000, page 0, preallocated-temp:
 value: <10 stack @0> (size=300,offset=0): bf16[3,1,32,64]{3,2,1,0}
 value: <11 grad{1} @0> (size=100,offset=300): f32[3,4,64]{2,1,0}
 value: <12 arg_tuple.2{2} (phi) @0> (size=100,offset=300): f32[3,4,64]{2,1,0}
 value: <13 layer @0> (size=200,offset=400): bf16[32,128]{1,0}
 value: <14 logits @0> (size=350,offset=450): f32[32,256]{1,0}

allocation 8: size 5000, color 5, page 0, preallocated-temp:
 value: <15 kept @5> (size=5000,offset=0): bf16[3,1,32,64]{3,2,1,0:S(5)}
"""
PROGRAM = """ENTRY %main {
  %layer = bf16[32,128]{1,0} fusion(%a), metadata={op_name="jit(train_step)/jvp(Llama.hidden_states)/model/dot"}
  ROOT %logits = f32[32,256]{1,0} fusion(%b), metadata={op_name="jit(train_step)/jvp()/while/body/exp"}
}
"""  # noqa: E501


def test_each_byte_of_the_temporaries_counts_once():
    state, _, _ = abstract_arguments(STEP)
    kinds = split_temporaries(BUFFERS, PROGRAM, STEP, state.adapters)
    assert kinds == {
        "gradients": 100,
        "activations": 300,
        "temporaries": 200,
        "loss": 200,  # without the bytes that it shares with the layer
    }
