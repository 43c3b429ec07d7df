import json
import os
import subprocess
import sys
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh

from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.dropout import draw
from qlora_jax.models.context import divide_tokens, row_index
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama, empty_cache
from qlora_jax.models.sharding import traced_on
from qlora_jax.planning.hlo import parse
from qlora_jax.planning.traffic import bytes_by_kind, count_transfers
from tests.models import context_cases
from tests.models.context_cases import ATTENTION, CASES
from tests.models.reference import CONFIG, base, prompt

# The same float32 sums in another order: a few units of rounding of a loss, and some
# more of single arrays, of the distance that they have moved.
LOSS, TRAINED = 1e-6, 5e-5


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """What a process with eight virtual devices has compared."""
    out = tmp_path_factory.mktemp("context") / "results.json"
    flags = os.environ.get("XLA_FLAGS", "")
    flags += " --xla_force_host_platform_device_count=8"
    command = [sys.executable, "-m", context_cases.__name__, str(out)]
    done = subprocess.run(
        command,
        env={**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("name", CASES)
def test_devices_that_share_rows_repeat_one_device(name, results):
    found = results["steps"][name]
    assert found["losses"] <= LOSS and found["evaluated"] <= LOSS
    assert found["norms"] <= TRAINED and found["trained"] <= TRAINED


@pytest.mark.parametrize("name", ATTENTION)
def test_divided_attention_equals_attention_of_whole_rows(name, results):
    # Float32 sums in another order, of values of about 1.
    assert max(results["attention"][name]) < 5e-6


def test_only_keys_and_values_are_gathered(results):
    text, length = results["steps"]["packed"]["program"], CASES["packed"].length
    heads, layers = CONFIG.num_key_value_heads, CONFIG.num_hidden_layers
    keys = 4 * 4 * length * heads * CONFIG.head_dim  # bytes, of four rows
    found = bytes_by_kind(count_transfers(parse(text), devices=4, per_node=4))
    # Keys and values, in the forward pass and again in the backward pass; and at the
    # most as often the segment ids.
    least = layers * 4 * keys
    assert least < found["all-gather"]["bytes"] <= least + layers * 2 * 4 * 4 * length
    # Their gradients, of which a fourth arrives.
    scattered = found["reduce-scatter"]
    assert scattered["count"] == layers * 2
    assert scattered["bytes"] == layers * keys // 2
    assert found.keys() == {"all-gather", "reduce-scatter", "all-reduce"}
    assert f"{length},{length}]" not in text


def test_kernels_compute_the_rows_of_their_device(results):
    names = ["gated.gpu.backward", "gated.gpu.forward"]
    names += ["norm.gpu.backward", "norm.gpu.forward"]
    # Kernels of attention take whole rows.
    whole = ["attention.backward.backward", "attention.forward.forward", *names]
    for name, expected in (("kernels", whole), ("kernels of parts of rows", names)):
        called = results["steps"][name]["kernels"]
        assert called == [f"pallas_kernels.{each}" for each in expected]


def test_a_device_has_an_early_and_a_late_chunk():
    with traced_on(AbstractMesh((2, 2), ("data", "context"))):
        assert row_index(8).tolist() == [0, 1, 6, 7, 2, 3, 4, 5]
        # The second of two chunks of every device.
        assert row_index(8, 1, 2).tolist() == [6, 7, 4, 5]
        shape = jax.eval_shape(divide_tokens, jnp.zeros((2, 9))).shape
    assert shape == (2, 12)
    assert row_index(8, 1, 2).tolist() == [4, 5, 6, 7]


def test_a_token_draws_the_same_numbers_in_every_order_and_number():
    uniform, key = partial(jax.random.uniform, shape=(3,)), jax.random.key(1)
    whole = np.asarray(draw(uniform, key, (2, 6)))
    assert len(np.unique(whole)) == whole.size
    order = jnp.asarray([5, 0, 3])
    np.testing.assert_array_equal(draw(uniform, key, (2, 3), order), whole[:, order])
    np.testing.assert_array_equal(draw(uniform, key, (2,)), whole[:, 0])
    assert draw(uniform, key, (2, 2, 2)).shape == (2, 2, 2, 3)


class Custom(nn.Module):
    """Attention that nothing is known of."""

    config: object
    compute: object


@pytest.mark.parametrize(
    ("settings", "method", "message"),
    [
        ({"compute": Compute("float32", "eager")}, "__call__", "attention='eager'"),
        ({"compute": Compute("float32", "cudnn")}, "__call__", "attention='cudnn'"),
        ({"attention_cls": Custom}, "__call__", "`attention_cls`=Custom"),
        ({}, "decode", "Generation needs whole rows"),
    ],
)
def test_what_needs_whole_rows_is_refused(settings, method, message):
    model = Llama(CONFIG, **settings)
    tokens = prompt(length=8)
    more = {}
    if method == "decode":
        mask = jnp.ones_like(tokens)
        cache = empty_cache(CONFIG, *tokens.shape)
        more = dict(cache=cache, attention_mask=mask, positions=mask)
    apply = partial(model.apply, {"params": base()}, method=method)
    with traced_on(AbstractMesh((2,), ("context",))):
        with pytest.raises(UserError, match=message):
            jax.eval_shape(partial(apply, tokens, **more))


def test_logits_are_in_the_order_of_the_row():
    model = Llama(CONFIG, Compute("float32", lora=LoraConfig()))
    with traced_on(AbstractMesh((2,), ("context",))):
        apply = partial(model.apply, {"params": base()})
        assert jax.eval_shape(apply, prompt(length=9)).shape == (2, 9, 61)
