"""A run says where the one-pass kernels it asks for have no effect."""

import re
from types import SimpleNamespace
from typing import get_args

import jax
import pytest

from pallas_kernels import device
from qlora_jax.choices import Remat
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.lora.init import factor_out
from qlora_jax.models.block import MLP
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.params import abstract_base
from qlora_jax.runs.fusion import fusion_note

CONFIG = {
    **{"model_type": "llama", "vocab_size": 256, "num_hidden_layers": 2},
    **{"hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4},
    **{"num_key_value_heads": 2, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
}
FUSED = {"norms": "fused", "activation": "fused"}


def note(
    *, rows=2, length=128, config=None, quantized=True, compute=None, mlp=None, **lora
):
    lora = LoraConfig(**({"r": 8, "target_modules": "all-linear"} | lora))
    config = LlamaConfig.from_hf(CONFIG | (config or {}))
    base = abstract_base(config, quantization="nf4_dq" if quantized else None)
    compute = Compute(lora=lora, **(FUSED | (compute or {})))
    model = Llama(config, compute, mlp_cls=mlp)
    adapters = abstract_adapters(base, lora)
    if lora.changes_base:
        base = jax.eval_shape(lambda *trees: factor_out(*trees, lora), base, adapters)
    return fusion_note(model, base, adapters, rows, length)


@pytest.fixture
def on_hopper(monkeypatch):
    gpu = SimpleNamespace(platform="gpu", compute_capability="9.0")
    monkeypatch.setattr(device, "this_device", lambda: gpu)


@pytest.fixture
def hopper(on_hopper, monkeypatch):
    monkeypatch.setattr(device, "kernel_refusals", lambda interpret: [])


@pytest.mark.usefixtures("hopper")
@pytest.mark.parametrize(
    "change, expected",
    [
        ({}, None),
        ({"compute": {"norms": "separate"}}, None),  # nobody asked
        ({"compute": {"remat": "offload"}}, "effect on remat = 'offload'"),
        ({"quantized": False}, "input_layernorm: not all of q_proj, .* are packed"),
        ({"config": {"model_type": "phi3"}}, "this model: it is for packed"),
        ({"compute": {"kernels": "pallas"}}, "that XLA dequantizes"),
        ({"length": 20}, "a multiple of 16 rows, not 40"),
        ({"length": 48}, "activation: they take a multiple of 64 tokens, not 96"),
        ({"compute": {"remat": "full"}, "length": 16384}, "full.* 2 x 16,384 .* in 2"),
        ({"compute": {"remat": "save_matmuls"}, "length": 16384}, None),
        (
            {"config": {"num_attention_heads": 2, "head_dim": 32}},
            "k_proj, v_proj are no",
        ),
        ({"config": {"intermediate_size": 192}}, "activation: it is narrower than"),
        ({"config": {"mlp_bias": True}}, "activation: .* have biases"),
        ({"config": {"attention_bias": True}, "bias": "all"}, None),
        ({"init_lora_weights": "pissa"}, "begin with is subtracted"),
        ({"mlp": MLP}, "effect on post_attention_layernorm: `mlp` is a class"),
        ({"r": 64}, "not 192; nor on the MLP's activation: .* up to 32, not 64"),
        ({"r": 33}, "input_layernorm: .* up to 128, not 112|up to 32, not 48"),
        ({"target_modules": ("q_proj", "v_proj")}, "not all of q_proj, k_proj, v_proj"),
        ({"use_dora": True}, "an adapter of plain LoRA"),
        ({"lora_dropout": 0.1}, "`lora_dropout` acts"),
        ({"compute": {"dtype": "float32"}}, "16 bits, not float32"),
        ({"config": {"model_type": "gemma", "hidden_act": "gelu"}}, "not silu"),
    ],
    ids=str,
)
def test_what_is_not_computed_in_one_pass_is_said(change, expected):
    said = note(**change)
    if expected is None:
        assert said is None
    else:
        assert re.search(expected, said) and said.startswith("Note: model.fusion")


def test_adapters_are_joined_on_a_gpu_unless_rows_are_the_longest(on_hopper):
    joined = {r: Compute(remat=r).joins_products for r in get_args(Remat)}
    assert joined == dict.fromkeys(joined, True) | {"offload": False}
    assert Compute(remat="offload", lora_products="joined").joins_products


def test_on_a_cpu_adapters_are_not_joined():
    assert not Compute().joins_products
    assert "effect on a CPU" in note()


def test_without_a_hopper_gpu_the_reason_is_the_device():
    expected = "they need an NVIDIA GPU|the kernels need jax 0.11"
    assert re.search(expected, note(compute={"lora_products": "joined"}))
