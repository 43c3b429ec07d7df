"""Rematerialization, chunks and host memory change no number of a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models import block, layers
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.sharding import put_base
from qlora_jax.training.objectives import loss_sum
from tests.models.reference import CONFIG as SMALL
from tests.models.reference import adapters, base, equations, rows

CONFIG = dataclasses.replace(SMALL, intermediate_size=128)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
DROPOUT = dataclasses.replace(LORA, lora_dropout=0.3)
# The same sums in another order: float32 to a few units of rounding, of a whole leaf.
RTOL = 1e-6
BATCH = rows(2, 24)


def gradient_of(lora, config, key=None, **compute):
    """The function from adapters, base and rows to loss and gradients."""
    model = Llama(config, Compute(**{"dtype": "float32", **compute}, lora=lora))
    return jax.value_and_grad(functools.partial(loss_sum, model=model, key=key))


def derive(params=None, *, lora=LORA, config=CONFIG, **settings):
    """Loss and gradients of one batch."""
    params = base(config, packed=True) if params is None else params
    step = jax.jit(gradient_of(lora, config, **settings))
    return step(adapters(lora, config), params, BATCH)


@functools.cache
def plain(lora=LORA, config=CONFIG, key=None, dtype="float32"):
    key = key and jax.random.key(key)
    return derive(lora=lora, config=config, remat="none", key=key, dtype=dtype)


def same(results, expected, rtol=RTOL, loss_rtol=RTOL):
    np.testing.assert_allclose(results[0], expected[0], rtol=loss_rtol)
    got, want = (
        dict(jax.tree_util.tree_leaves_with_path(r[1])) for r in (results, expected)
    )
    assert got.keys() == want.keys()
    for path, value in want.items():
        size = float(jnp.linalg.norm(value.ravel()))
        distance = float(jnp.linalg.norm((got[path] - value).ravel()))
        assert size > 0 and distance <= rtol * size, (path, distance / size)


REMATS = ["full", "save_matmuls", "offload"]


@pytest.mark.parametrize("remat", REMATS)
def test_policies_agree_in_bfloat16(remat, monkeypatch):
    monkeypatch.setattr(layers, "_MLP_TOKENS", {"full": 16, "offload": 16})
    got = derive(remat=remat, dtype="bfloat16")
    # Programs that fuse differently round to bf16 (2^-9) in different places, a few
    # dozen times on the way through the layers and back.
    same(got, plain(dtype="bfloat16"), rtol=0.04, loss_rtol=5e-4)


@pytest.mark.parametrize("attention", ["eager", "xla"])
@pytest.mark.parametrize("remat", REMATS)
def test_every_policy_gives_the_same_loss_and_gradients(remat, attention):
    same(derive(remat=remat, attention=attention), plain())


@pytest.mark.parametrize("remat", REMATS)
def test_what_is_recomputed_draws_the_same_dropout(remat):
    got = derive(lora=DROPOUT, remat=remat, key=jax.random.key(5))
    same(got, plain(DROPOUT, key=5))


def widest(remat, config, lora):
    """Returns the most tokens of any [tokens, intermediate_size] in the program."""
    step, wide = gradient_of(lora, config, remat=remat), config.intermediate_size
    params = base(config, packed=True)
    jaxpr = jax.make_jaxpr(step)(adapters(lora, config), params, BATCH)
    return max(
        v.aval.size // wide
        for equation in equations(jaxpr.jaxpr)
        for v in equation.outvars
        # Weights are [64, 128] and [128, 64]; adapters of both layers [2, 4, 128].
        if v.aval.shape[-1:] == (wide,) and len(v.aval.shape) == 3
    )


@pytest.mark.parametrize(
    "remat, tokens, chunk, more",
    [
        ("full", 48, 48, {}),
        ("full", 16, 16, {}),
        ("offload", 47, 24, {}),
        ("offload", 11, 8, {}),  # five would not come out even, six do
        ("offload", 7, 8, {}),  # seven chunks of four of each row; the last is padded
        ("offload", 16, 16, {"use_dora": True}),
        ("full", 16, 16, {"bias": "lora_only"}),
    ],
)
def test_a_chunked_mlp_computes_the_same(remat, tokens, chunk, more, monkeypatch):
    config = dataclasses.replace(CONFIG, mlp_bias="bias" in more)
    lora = dataclasses.replace(LORA, **more)
    expected = plain(lora, config)
    monkeypatch.setattr(layers, "_MLP_TOKENS", {remat: tokens})
    if tokens == 7:
        monkeypatch.setattr(block, "mlp_chunks", lambda *_: 7)
    same(derive(lora=lora, config=config, remat=remat), expected)
    assert widest(remat, config, lora) == chunk


def test_the_number_of_chunks_divides_the_length_if_it_can():
    lengths = (4096, 8192, 78475, 917504)
    counts = {n: layers.mlp_chunks(1, n, 4096) for n in lengths}
    assert counts == {4096: 1, 8192: 2, 78475: 25, 917504: 224}
    assert 78475 % 25 == 0  # twenty would do, and leave five tokens over
    assert layers.mlp_chunks(1, 131071, 16384) == 8  # a prime: one token is padding
    # Of 16 rows each chunk takes a part, at the least a token.
    assert layers.mlp_chunks(16, 2048, 16384) == 2
    assert layers.mlp_chunks(65536, 2, 4096) == 2
    assert layers.mlp_chunks(1, 1 << 20, None) == 1


def test_a_wider_mlp_has_smaller_chunks():
    assert [layers.mlp_tokens(14336, r) for r in ("full", "offload")] == [16384, 4096]
    assert [layers.mlp_tokens(28672, r) for r in ("full", "offload")] == [8192, 2048]
    for keeps in ("none", "save_matmuls"):
        assert layers.mlp_tokens(14336, keeps) is None


def test_chunks_have_different_dropout_masks(monkeypatch):
    # Rows that are all alike: with one mask for all chunks their updates would be too.
    lora = dataclasses.replace(LORA, lora_dropout=0.5, target_modules=("down_proj",))
    monkeypatch.setattr(layers, "_MLP_TOKENS", {"full": 8})
    model = Llama(CONFIG, Compute("float32", lora=lora, remat="full"))
    call = functools.partial(
        model.apply,
        {"params": base(CONFIG, packed=True), "lora": adapters(lora, CONFIG)},
        jnp.full((1, 16), 7),
        positions=jnp.zeros((1, 16), jnp.int32),
        segment_ids=jnp.arange(1, 17)[None],
        method="hidden_states",
    )
    run = jax.jit(lambda key: call(rngs={"dropout": key}))
    hidden = run(jax.random.key(0))[0]
    assert float(jnp.abs(hidden[:8] - hidden[8:]).max()) > 1e-3
    np.testing.assert_array_equal(hidden, run(jax.random.key(0))[0])


def on_host(config=CONFIG):
    return put_base(base(config, packed=True), embed_tokens="host", lm_head="host")


@pytest.mark.parametrize("remat", ["none", "offload"])
def test_tables_in_host_memory_train_the_same(remat):
    moved = on_host()
    kinds = {
        jax.tree_util.keystr(path): leaf.sharding.memory_kind
        for path, leaf in jax.tree_util.tree_leaves_with_path(moved)
    }
    pinned = {path for path, kind in kinds.items() if kind == "pinned_host"}
    assert pinned == {"['model']['embed_tokens']['weight']", "['lm_head']['weight']"}
    same(derive(moved, remat=remat), plain())


def test_a_tied_table_in_host_memory_is_embedding_and_head():
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    same(derive(on_host(config), config=config), plain(config=config))


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapted_tables_may_be_in_host_memory(target):
    lora = LoraConfig(r=4, target_modules=("q_proj", target))
    same(derive(on_host(), lora=lora), plain(lora))


def test_a_packed_head_computes_as_its_dequantized_values():
    params = base(CONFIG, packed=True)
    weight = np.asarray(params["lm_head"]["weight"])
    head = nf4.quantize(weight, double_quant=True)
    dense = {**params, "lm_head": {"weight": np.asarray(nf4.dequantize(head))}}
    expected = derive(dense)
    same(derive({**params, "lm_head": {"weight": head}}), expected)
    assert abs(float(expected[0]) - float(plain()[0])) > 1e-3  # it is another head


def test_unavailable_kernels_are_refused_in_chunks_too(monkeypatch):
    monkeypatch.setattr(layers, "_MLP_TOKENS", {"offload": 16})
    with pytest.raises(UserError, match="kernels='pallas' cannot be used here: "):
        derive(remat="offload", kernels="pallas")
