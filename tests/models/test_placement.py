"""Rematerialization, chunks and host memory change no number of a step."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.data.encoding import IGNORE
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.models import layers, llama
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.sharding import put_base
from qlora_jax.training.objectives import loss_sum

CONFIG = LlamaConfig(
    vocab_size=61,
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    initializer_range=0.1,
)
LORA = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear")
# The same sums in another order: float32 to a few units of rounding, of a whole leaf.
RTOL = 1e-6


def pack(path, leaf):
    if "_proj" not in str(path[-2]) or "weight" not in str(path[-1]):
        return leaf
    layers = [nf4.quantize(np.asarray(w), double_quant=True) for w in leaf]
    return jax.tree.map(lambda *parts: np.stack(parts), *layers)


@functools.cache
def base(config=CONFIG):
    init = jax.jit(Llama(config).init)
    tree = init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))["params"]
    return jax.tree_util.tree_map_with_path(pack, jax.tree.map(np.asarray, tree))


@functools.cache
def adapters(lora=LORA, config=CONFIG):
    tree = init_adapters(jax.random.key(1), base(config), lora)
    leaves, structure = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(2), len(leaves))
    moved = [
        a + 0.05 * jax.random.normal(k, a.shape)
        for a, k in zip(leaves, keys, strict=True)
    ]
    return jax.tree.unflatten(structure, moved)


def batch(count=2, length=24):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, 61, (count, length))
    labels = np.where(np.arange(length) < 5, IGNORE, tokens)
    return {"tokens": jnp.asarray(tokens), "labels": jnp.asarray(labels)}


def derive(tree, params, rows, *, key=None, lora=LORA, config=CONFIG, **compute):
    """Loss and gradients of one batch."""
    model = Llama(config, Compute(**{"dtype": "float32", **compute}, lora=lora))
    step = jax.value_and_grad(functools.partial(loss_sum, model=model, key=key))
    return jax.jit(step)(tree, params, rows)


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


@functools.cache
def plain(lora=LORA):
    return derive(adapters(lora), base(), batch(), lora=lora, remat="none")


@pytest.mark.parametrize("remat", ["full", "save_matmuls", "offload"])
def test_policies_agree_in_bfloat16(remat, monkeypatch):
    monkeypatch.setattr(layers, "_MLP_TOKENS", {"full": 16, "offload": 16})
    narrow = {"dtype": "bfloat16"}
    expected = derive(adapters(), base(), batch(), remat="none", **narrow)
    # Programs that fuse differently round to bf16 (2^-9) in different places, a few
    # dozen times on the way through the layers and back.
    got = derive(adapters(), base(), batch(), remat=remat, **narrow)
    same(got, expected, rtol=0.04, loss_rtol=5e-4)


@pytest.mark.parametrize("attention", ["eager", "xla"])
@pytest.mark.parametrize("remat", ["full", "save_matmuls", "offload"])
def test_every_policy_gives_the_same_loss_and_gradients(remat, attention):
    same(derive(adapters(), base(), batch(), remat=remat, attention=attention), plain())


def widest(remat, config, lora):
    """Returns the most tokens of any [tokens, intermediate_size] in the program."""
    model = Llama(config, Compute("float32", lora=lora, remat=remat))
    step = jax.grad(functools.partial(loss_sum, model=model))
    jaxpr = jax.make_jaxpr(step)(adapters(lora, config), base(config), batch())
    wide = config.intermediate_size
    return max(
        aval.size // wide
        for aval in results(jaxpr.jaxpr)
        # Weights are [64, 128] and [128, 64]; adapters of both layers [2, 4, 128].
        if aval.shape[-1:] == (wide,) and len(aval.shape) == 3
    )


def results(jaxpr):
    for equation in jaxpr.eqns:
        yield from (v.aval for v in equation.outvars if len(v.aval.shape) > 1)
        for value in jax.tree.leaves(dict(equation.params)):
            inner = getattr(value, "jaxpr", value)  # closed or not
            if hasattr(inner, "eqns"):
                yield from results(inner)


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
    tree, params = adapters(lora, config), base(config)
    expected = derive(tree, params, batch(), lora=lora, config=config, remat="none")
    monkeypatch.setattr(layers, "_MLP_TOKENS", {remat: tokens})
    if tokens == 7:
        monkeypatch.setattr(llama, "mlp_chunks", lambda *_: 7)
    got = derive(tree, params, batch(), lora=lora, config=config, remat=remat)
    same(got, expected)
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
    variables = {"params": base(), "lora": adapters(lora)}
    tokens = jnp.full((1, 16), 7)
    run = jax.jit(
        lambda variables, key: model.apply(
            variables,
            tokens,
            positions=jnp.zeros((1, 16), jnp.int32),
            segment_ids=jnp.arange(1, 17)[None],
            rngs={"dropout": key},
            method="hidden_states",
        )
    )
    hidden = run(variables, jax.random.key(0))[0]
    assert float(jnp.abs(hidden[:8] - hidden[8:]).max()) > 1e-3
    same_key = run(variables, jax.random.key(0))[0]
    np.testing.assert_array_equal(hidden, same_key)


TABLES = {"embed_tokens": "host", "lm_head": "host"}


@pytest.mark.parametrize("remat", ["none", "offload"])
def test_tables_in_host_memory_train_the_same(remat):
    moved = put_base(base(), **TABLES)
    kinds = {
        jax.tree_util.keystr(path): leaf.sharding.memory_kind
        for path, leaf in jax.tree_util.tree_leaves_with_path(moved)
    }
    on_host = {path for path, kind in kinds.items() if kind == "pinned_host"}
    assert on_host == {"['model']['embed_tokens']['weight']", "['lm_head']['weight']"}
    same(derive(adapters(), moved, batch(), remat=remat), plain())


def test_a_tied_table_in_host_memory_is_embedding_and_head():
    config = dataclasses.replace(CONFIG, tie_word_embeddings=True)
    tree = adapters(LORA, config)
    expected = derive(tree, base(config), batch(), config=config)
    moved = put_base(base(config), embed_tokens="host", lm_head="host")
    same(derive(tree, moved, batch(), config=config), expected)


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapted_tables_may_be_in_host_memory(target):
    lora = LoraConfig(r=4, target_modules=("q_proj", target))
    moved = put_base(base(), **TABLES)
    same(derive(adapters(lora), moved, batch(), lora=lora), plain(lora))


def test_a_packed_head_computes_as_its_dequantized_values():
    head = nf4.quantize(base()["lm_head"]["weight"], double_quant=True)
    packed = {**base(), "lm_head": {"weight": head}}
    dense = {**base(), "lm_head": {"weight": np.asarray(nf4.dequantize(head))}}
    expected = derive(adapters(), dense, batch())
    same(derive(adapters(), packed, batch()), expected)
    assert abs(float(expected[0]) - float(plain()[0])) > 1e-3  # it is another head


def test_unavailable_kernels_are_refused_in_chunks_too(monkeypatch):
    monkeypatch.setattr(layers, "_MLP_TOKENS", {"offload": 16})
    with pytest.raises(UserError, match="kernels='pallas' cannot be used here: "):
        derive(adapters(), base(), batch(), remat="offload", kernels="pallas")
