"""Adapters in a model, against a model with the effective weights.

Most of it is one comparison: the weight, bias and table that PEFT's formulas give,
written out in `effective`, in a model without adapters: its logits, and by `jax.grad`
its gradients. (tests/models/test_llama.py compares that model with float64 numpy.) Rank
and scaling of each module are written by hand for each case, not taken from the code
under test.
"""

import dataclasses
import functools
import re
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.data.encoding import IGNORE
from qlora_jax.errors import UserError
from qlora_jax.lora import functional as lora
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.training.objectives import loss_sum
from qlora_jax.tree import PROJECTIONS
from tests.lora.reference import CONFIG, L, V, config_of, random_base

# --- delta ---


def adapter(r=4, out=24, inner=40, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "lora_A": jnp.asarray(rng.standard_normal((r, inner)), jnp.float32),
        "lora_B": jnp.asarray(rng.standard_normal((out, r)), jnp.float32),
    }


@pytest.mark.parametrize("bias", [False, True])
def test_delta_is_scaling_times_b_a_x(bias):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 40)), jnp.float32)
    parts = adapter()
    if bias:
        parts["lora_bias"] = jnp.linspace(-1, 1, 24)
    got = lora.delta(x, parts, 0.37)
    wide = {k: np.asarray(v, np.float64) for k, v in parts.items()}
    inner = np.asarray(x, np.float64) @ wide["lora_A"].T @ wide["lora_B"].T
    want = 0.37 * (inner + wide.get("lora_bias", 0.0))
    # Sums of 40 and 4 float32 terms of order one.
    np.testing.assert_allclose(got, want, atol=2e-5)


def test_delta_in_bf16_keeps_float32_gradients_of_the_adapter():
    x = jnp.ones((3, 40), jnp.bfloat16)
    parts = {**adapter(), "lora_bias": jnp.ones(24)}
    gradient = jax.grad(lambda p: lora.delta(x, p, 2.0).astype(jnp.float32).sum())(
        parts
    )
    assert lora.delta(x, parts, 2.0).dtype == jnp.bfloat16
    assert {g.dtype for g in gradient.values()} == {jnp.dtype("float32")}


def test_a_scaling_is_not_rounded_to_bf16():
    # 1.003 rounds to 1 in bf16; the product has the nearest number to the true one.
    parts = {"lora_A": jnp.eye(8), "lora_B": jnp.eye(8)}
    x = jnp.full((1, 8), 255.0, jnp.bfloat16)
    np.testing.assert_array_equal(
        lora.delta(x, parts, jnp.float32(1.003)), jnp.full((1, 8), 256, jnp.bfloat16)
    )


def test_no_key_or_no_probability_means_no_dropout():
    x = jnp.ones((7, 40))
    plain = lora.delta(x, adapter(), 1.0)
    np.testing.assert_array_equal(lora.delta(x, adapter(), 1.0, dropout=0.5), plain)
    with_key = lora.delta(x, adapter(), 1.0, dropout=0.0, key=jax.random.key(0))
    np.testing.assert_array_equal(with_key, plain)


def test_dropout_drops_inputs_and_keeps_their_mean(getkey):
    # The identity as adapter shows the dropped input itself.
    eye = {"lora_A": jnp.eye(40), "lora_B": jnp.eye(40)}
    x = jnp.ones((2000, 40))
    y = np.asarray(lora.delta(x, eye, 1.0, dropout=0.25, key=getkey()))
    np.testing.assert_allclose(np.unique(y), [0, 1 / 0.75], rtol=1e-6)
    # 80,000 draws of deviation sqrt(0.25 / 0.75): five standard errors.
    assert abs(y.mean() - 1) < 5 * np.sqrt(0.25 / 0.75 / y.size)
    columns = (y == 0).mean(0)
    assert abs(columns - 0.25).max() < 5 * np.sqrt(0.25 * 0.75 / 2000)


def test_dropout_depends_on_its_key_only(getkey):
    x, key = jnp.ones((4, 40)), getkey()
    one = lora.delta(x, adapter(), 1.0, dropout=0.5, key=key)
    np.testing.assert_array_equal(
        one, lora.delta(x, adapter(), 1.0, dropout=0.5, key=key)
    )
    assert (one != lora.delta(x, adapter(), 1.0, dropout=0.5, key=getkey())).any()


# --- Norms of rows ---


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scaling", [0.5, -3.0, 0.0])
def test_row_norms_are_those_of_the_sum(packed, scaling):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((24, 64)), jnp.float32)
    if packed:
        weight = nf4.quantize(np.asarray(weight), double_quant=True)
    dense = nf4.dequantize(weight) if packed else weight
    parts = adapter(inner=64)
    a, b = parts["lora_A"], parts["lora_B"]
    total = np.asarray(dense, np.float64) + scaling * (
        np.asarray(b, np.float64) @ np.asarray(a, np.float64)
    )
    got = lora.row_norms(weight, a, b, scaling)
    # Float32 sums of 64 squares; the three parts are of the size of the result.
    np.testing.assert_allclose(got, np.linalg.norm(total, axis=1), rtol=1e-5)
    norms = np.linalg.norm(np.asarray(dense, np.float64), axis=1)
    np.testing.assert_allclose(lora.row_norms(weight), norms, rtol=1e-6)


def test_norms_pass_no_gradient_and_zero_rows_make_no_nan():
    weight = jnp.zeros((3, 8)).at[0].set(1.0)
    parts = {"lora_A": jnp.ones((2, 8)), "lora_B": jnp.zeros((3, 2))}

    def norms(weight, parts):
        return lora.row_norms(weight, parts["lora_A"], parts["lora_B"], 2.0).sum()

    for leaf in jax.tree.leaves(jax.grad(norms, argnums=(0, 1))(weight, parts)):
        assert not leaf.any()
    # An update that takes a row away: what is left is rounding, not a negative root.
    gone = {"lora_A": jnp.full((1, 8), 1 / 3), "lora_B": jnp.full((3, 1), -3.0)}
    left = lora.row_norms(jnp.ones((3, 8)), gone["lora_A"], gone["lora_B"])
    assert np.isfinite(np.asarray(left)).all() and (left < 1e-3).all()
    factor = lora.rescale(jnp.ones(3), jnp.asarray([2.0, 0.0, 4.0]), 1.0)
    np.testing.assert_array_equal(factor, [0.5, 1.0, 0.25])
    unused = lora.rescale(jnp.zeros(3), jnp.asarray([2.0, 0.0, 4.0]), jnp.float32(0))
    np.testing.assert_array_equal(unused, jnp.ones(3))


# --- The model with adapters, and with the effective weights ---

BLOCKS = {
    name: "self_attn" if name in PROJECTIONS[:4] else "mlp" for name in PROJECTIONS
}
EMBED, HEAD = "model.embed_tokens", "lm_head"

Found = tuple[int, float] | None


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration, and in plain words what it selects."""

    lora: LoraConfig
    update: Callable[[str], Found] = lambda name: None
    """Dotted name of a module -> (rank, scaling)."""
    full: Callable[[str], bool] = lambda name: False
    """Dotted name of a tensor -> whether it is trained in full."""
    rows: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Rows trained alone: of the embedding, of the head."""
    tied: bool = False
    biases: bool = False
    packed: bool = False


def of(pattern, r, scaling):
    """An update in the modules whose whole name matches."""
    return lambda name: (r, scaling) if re.fullmatch(pattern, name) else None


def first(*rules):
    """The first rule that says something."""
    return lambda name: next((f for rule in rules if (f := rule(name))), None)


def tensors(pattern):
    return lambda name: re.fullmatch(pattern, name) is not None


ALL = r".*_proj"
CASES = {
    "patterns": Case(
        LoraConfig(
            r=3,
            lora_alpha=6,
            use_rslora=True,
            target_modules=("q_proj", "up_proj", "model.layers.1.mlp.down_proj", HEAD),
            layers_to_transform=(0, 2),
            rank_pattern={
                "layers.2.self_attn.q_proj": 1,
                "q_proj": 2,
                r"layers\.[12].*up_proj": 5,
            },
            alpha_pattern={"up_proj": 1.5, "^model.layers.0.self_attn.q_proj": 7},
            lora_bias=True,
            bias="lora_only",
        ),
        first(
            of(r".*0.*q_proj", 2, 7 / 2**0.5),
            of(r".*2.*q_proj", 1, 6.0),
            of(r".*0.*up_proj", 3, 1.5 / 3**0.5),
            of(r".*2.*up_proj", 5, 1.5 / 5**0.5),
            of(r".*1.*down_proj|lm_head", 3, 6 / 3**0.5),
        ),
        tensors(r".*[02].*(q|up)_proj.bias|.*1.*down_proj.bias"),
        biases=True,
        packed=True,
    ),
    "dora_packed": Case(
        LoraConfig(
            r=4,
            lora_alpha=2,
            target_modules=r".*\.[01]\..*(k|down|gate)_proj",
            rank_pattern={r"0\.mlp\..*": 2},
            use_dora=True,
            bias="all",
        ),
        first(
            of(r".*0\.mlp.*(down|gate)_proj", 2, 1.0),
            of(r".*[01]\..*(k|down|gate)_proj", 4, 0.5),
        ),
        tensors(r".*_proj\.bias"),
        biases=True,
        packed=True,
    ),
    "dora_everywhere": Case(
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=("q_proj", "embed_tokens", "lm_head"),
            use_dora=True,
        ),
        of(f".*q_proj|lm_head|{re.escape(EMBED)}", 4, 2.0),
    ),
    "tied_apart": Case(
        LoraConfig(
            r=4,
            lora_alpha=8,
            target_modules=("embed_tokens", "lm_head"),
            rank_pattern={"lm_head": 2},
        ),
        first(of("lm_head", 2, 4.0), of(re.escape(EMBED), 4, 2.0)),
        tied=True,
    ),
    "tied_shared": Case(
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=("lm_head", "q_proj"),
            rank_pattern={"embed_tokens": 2, "lm_head": 3},
            alpha_pattern={"lm_head": 10, "embed_tokens": 7},
            ensure_weight_tying=True,
        ),
        first(
            of("lm_head", 2, 10 / 3),
            of(re.escape(EMBED), 2, 3.5),
            of(".*q_proj", 4, 1.5),
        ),
        tied=True,
    ),
    "tied_shared_dora": Case(
        LoraConfig(
            r=2,
            lora_alpha=2,
            target_modules=("embed_tokens",),
            use_dora=True,
            ensure_weight_tying=True,
        ),
        of(f"lm_head|{re.escape(EMBED)}", 2, 1.0),
        tied=True,
    ),
    "rows_of_both_and_an_adapted_head": Case(
        LoraConfig(
            r=2,
            lora_alpha=1,
            target_modules=("lm_head",),
            trainable_token_indices=(30, 4, 11),
        ),
        of("lm_head", 2, 0.5),
        rows=((30, 4, 11), (30, 4, 11)),
        tied=True,
    ),
    "different_rows_and_a_layer_whole": Case(
        LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=("up_proj", "v_proj"),
            trainable_token_indices={"embed_tokens": (3, 9), "lm_head": (9, 20, 0)},
            modules_to_save=("layers.1.mlp", "model.norm"),
            bias="all",
        ),
        of(r".*[02].*up_proj|.*v_proj", 2, 2.0),
        tensors(r".*_proj\.bias|model\.norm\.weight|.*1\.mlp.*"),
        rows=((3, 9), (9, 20, 0)),
        tied=True,
        biases=True,
    ),
    "whole_table_for_both": Case(
        LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=("k_proj",),
            modules_to_save=("lm_head", "norm"),
            ensure_weight_tying=True,
        ),
        of(".*k_proj", 2, 2.0),
        tensors(r".*norm\.weight|lm_head.weight|model.embed_tokens.weight"),
        tied=True,
        packed=True,
    ),
    "whole_embedding_alone": Case(
        LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=("k_proj", "lm_head"),
            modules_to_save=("embed_tokens", "layers.2.input_layernorm"),
        ),
        of(".*k_proj|lm_head", 2, 2.0),
        tensors(r"model.embed_tokens.weight|.*2.input_layernorm.weight"),
        tied=True,
    ),
    "untied_rows_and_a_whole_head": Case(
        LoraConfig(
            r=2,
            lora_alpha=4,
            target_modules=("o_proj",),
            modules_to_save=("lm_head",),
            trainable_token_indices=(1, 2, 36),
        ),
        of(".*o_proj", 2, 2.0),
        tensors("lm_head.weight"),
        rows=((1, 2, 36), ()),
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


def base_of(case):
    return random_base(case.tied, case.biases, case.packed, spread=0.15)


def model_of(case, dtype="float32", **compute):
    return Llama(
        config_of(case.tied, case.biases), Compute(dtype, lora=case.lora, **compute)
    )


def trained(case, seed=1):
    """A trained tree whose every used number is random; the rest is zero."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        *module, name = [key.key for key in path]
        value = rng.standard_normal(leaf.shape).astype(np.float32)
        ones = name == "lora_magnitude_vector" or "norm" in module[-1]
        value = 1 + 0.1 * value if ones else 0.15 * value
        for i in range(L) if "layers" in module else ():
            one = ".".join(["model.layers", str(i), *module[2:]])
            rank, _ = case.update(one) or (0, 0)
            if name in ("weight", "bias"):
                value[i] *= case.full(f"{one}.{name}")
            elif name == "lora_A":
                value[i, rank:] = 0
            elif name == "lora_B":
                value[i, :, rank:] = 0
            else:
                value[i] *= rank > 0
        return jnp.asarray(value)

    tree = lora.abstract_adapters(base_of(case), case.lora)
    return jax.tree_util.tree_map_with_path(draw, tree)


def leaves(tree):
    """Pairs ((dotted module, name), leaf)."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [key.key for key in path]
        yield (".".join(names[:-1]), names[-1]), leaf


def get(tree, dotted):
    for part in dotted.split("."):
        tree = tree.get(part, {})
    return tree


def wide(tree):
    """Dequantized, float32."""
    return jax.tree.map(
        lambda leaf: (
            nf4.dequantize(leaf, jnp.float32)
            if isinstance(leaf, nf4.NF4Tensor)
            else leaf
        ),
        tree,
        is_leaf=lambda leaf: isinstance(leaf, nf4.NF4Tensor),
    )


def effective(xp, frozen, tree, case):
    """The effective weights: an untied model with all biases.

    `xp` is numpy or jax.numpy. Every formula is written for one layer of one module.
    """
    stop = jax.lax.stop_gradient if xp is jnp else lambda x: x

    def rescaled(weight, magnitude, axis):
        norm = stop(xp.sqrt((weight * weight).sum(axis)))
        factor = magnitude / norm
        return weight * (factor[:, None] if axis == 1 else factor[None, :])

    def at(node, name, i):
        return node[name] if i is None else node[name][i]

    def linear(name, node, i, weight, bias):
        """Weight and bias of one linear layer."""
        if case.full(f"{name}.weight"):
            weight = at(node, "weight", i)
        if case.full(f"{name}.bias"):
            bias = at(node, "bias", i)
        update = case.update(name)
        if update is None:
            return weight, bias
        r, s = update
        a, b = at(node, "lora_A", i)[:r], at(node, "lora_B", i)[:, :r]
        weight = weight + s * (b @ a)
        if "lora_magnitude_vector" in node:
            weight = rescaled(weight, at(node, "lora_magnitude_vector", i), 1)
        if "lora_bias" in node:
            bias = bias + s * at(node, "lora_bias", i)
        return weight, bias

    def replaced(table, rows, delta):
        for row, index in enumerate(rows):
            one = (xp.arange(V) == index)[:, None]
            table = xp.where(one, delta[row][None, :], table)
        return table

    layers = {"self_attn": {}, "mlp": {}}
    for name, block in BLOCKS.items():
        old = frozen["model"]["layers"][block][name]
        node = get(tree, f"model.layers.{block}.{name}")
        pairs = []
        for i in range(L):
            weight = old["weight"][i]
            bias = old["bias"][i] if "bias" in old else 0.0 * weight[:, 0]
            dotted = f"model.layers.{i}.{block}.{name}"
            pairs.append(linear(dotted, node, i, weight, bias))
        layers[block][name] = {
            "weight": xp.stack([w for w, _ in pairs]),
            "bias": xp.stack([b for _, b in pairs]),
        }
    for name in ("input_layernorm", "post_attention_layernorm"):
        node = get(tree, f"model.layers.{name}")
        old = frozen["model"]["layers"][name]["weight"]
        chosen = [case.full(f"model.layers.{i}.{name}.weight") for i in range(L)]
        rows = [node["weight"][i] if chosen[i] else old[i] for i in range(L)]
        layers[name] = {"weight": xp.stack(rows)}
    norm = frozen["model"]["norm"]["weight"]
    if case.full("model.norm.weight"):
        norm = tree["model"]["norm"]["weight"]

    # The head, before the embedding changes.
    table = frozen["model"]["embed_tokens"]["weight"]
    weight = table if case.tied else frozen["lm_head"]["weight"]
    node = dict(get(tree, HEAD))
    embed = get(tree, EMBED)
    if case.lora.ensure_weight_tying and case.tied:
        if "lora_embedding_A" in embed:
            node["lora_A"] = embed["lora_embedding_B"].T
            node["lora_B"] = embed["lora_embedding_A"].T
        node |= {"weight": embed["weight"]} if "weight" in embed else {}
    embed_rows, head_rows = case.rows
    if head_rows:
        shared = "trainable_tokens_delta" not in node
        delta = (embed if shared else node)["trainable_tokens_delta"]
        weight = replaced(weight, head_rows, delta)
    head = linear(HEAD, node, None, weight, 0.0 * weight[:, 0])

    if case.full(f"{EMBED}.weight"):
        table = embed["weight"]
    if embed_rows:
        table = replaced(table, embed_rows, embed["trainable_tokens_delta"])
    update = case.update(EMBED)
    if update is not None:
        r, s = update
        a, b = embed["lora_embedding_A"][:r], embed["lora_embedding_B"][:, :r]
        table = table + s * (b @ a).T
        if "lora_magnitude_vector" in embed:
            table = rescaled(table, embed["lora_magnitude_vector"], 0)
    return {
        "model": {
            "embed_tokens": {"weight": table},
            "layers": layers,
            "norm": {"weight": norm},
        },
        "lm_head": {"weight": head[0], "bias": head[1]},
    }


def batch(seed=0):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(0, V, (3, 14))
    tokens[0, :6] = [30, 4, 11, 3, 9, 36]  # rows that some cases train
    labels = np.where(np.arange(14) < rng.integers(0, 6, (3, 1)), IGNORE, tokens)
    return {
        "tokens": jnp.asarray(tokens, jnp.int32),
        "labels": jnp.asarray(labels, jnp.int32),
    }


PLAIN = Llama(
    dataclasses.replace(CONFIG, attention_bias=True, mlp_bias=True),
    Compute("float32", attention="eager", remat="none"),
)


def cross_entropy(logits, labels):
    logp = jax.nn.log_softmax(logits[:, :-1])
    targets = labels[:, 1:]
    picked = jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], -1)
    return -jnp.where(targets == IGNORE, 0.0, picked[..., 0]).sum()


@jax.jit
def plain_gradients(tree, batch):
    """(Loss, logits) and gradients of a model without adapters."""

    def loss(tree):
        head = {"weight": tree["lm_head"]["weight"]}
        logits = PLAIN.apply({"params": {**tree, "lm_head": head}}, batch["tokens"])
        logits = logits + tree["lm_head"]["bias"][None, None]
        return cross_entropy(logits, batch["labels"]), logits

    return jax.value_and_grad(loss, has_aux=True)(tree)


@functools.partial(jax.jit, static_argnames="model")
def adapted_gradients(tree, frozen, batch, key=None, *, model):
    """(Loss, logits) and gradients of a model with adapters."""

    def loss(tree):
        bound = lora.bind(tree, frozen, model.compute.lora)
        logits = model.apply(
            {"params": frozen, "lora": bound},
            batch["tokens"],
            rngs=None if key is None else {"dropout": key},
        )
        return cross_entropy(logits, batch["labels"]), logits

    return jax.value_and_grad(loss, has_aux=True)(tree)


@functools.cache
def results(name):
    """Of a case: trained tree, logits, loss, gradients."""
    case = CASES[name]
    tree = trained(case)
    model = model_of(case, attention="eager", remat="none")
    (loss, logits), gradients = adapted_gradients(
        tree, base_of(case), batch(), model=model
    )
    return tree, logits, loss, gradients


@each_case
def test_logits_and_gradients_equal_those_of_the_effective_weights(name):
    case = CASES[name]
    tree, logits, loss, got = results(name)
    frozen = wide(base_of(case))
    host = functools.partial(jax.tree.map, np.asarray)
    weights = effective(np, host(frozen), host(tree), case)
    (want_loss, want_logits), gradients = plain_gradients(weights, batch())
    # Float32 sums of at most 96 terms through three layers; logits of order one to ten.
    np.testing.assert_allclose(logits, want_logits, rtol=1e-5, atol=2e-5)

    @jax.jit
    def back(frozen, tree, gradients):
        through = functools.partial(effective, jnp, frozen, case=case)
        return jax.vjp(lambda tree: through(tree), tree)[1](gradients)[0]

    want = back(frozen, tree, gradients)
    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)

    def compare(path, g, w):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.abs(w).max() > 1e-4, path  # every array has one
        # Float32 sums over 40 tokens and through three layers, in another order.
        assert np.abs(g - w).max() <= 2e-5 * np.abs(w).max(), path
        # Padding, layers that are not trained, rows of tokens that do not occur.
        assert not g[w == 0].any(), path

    jax.tree_util.tree_map_with_path(compare, got, want)


def all_close(a, b, tolerance):
    """Within `tolerance` of the largest element of each leaf."""

    def leaf(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= tolerance * max(np.abs(y).max(), 1e-3)

    jax.tree.map(leaf, a, b)


@pytest.mark.parametrize("name", ["tied_shared", "rows_of_both_and_an_adapted_head"])
def test_the_loss_of_training_has_the_same_gradients(name):
    # Its head works on chunks of tokens and sees only a part of the variables.
    case = CASES[name]
    tree, _, loss, want = results(name)
    model = model_of(case, attention="eager", remat="none")
    training = jax.value_and_grad(functools.partial(loss_sum, model=model))
    got = jax.jit(training)(tree, base_of(case), batch())
    np.testing.assert_allclose(got[0], loss, rtol=1e-6)
    all_close(got[1], want, 1e-5)  # other sums of float32


def test_recomputation_gives_the_same_gradients(name="dora_everywhere"):
    case = CASES[name]
    tree, logits, loss, want = results(name)
    for remat in ("full", "save_matmuls"):
        model = model_of(case, remat=remat)
        (other, others), got = adapted_gradients(
            tree, base_of(case), batch(), model=model
        )
        np.testing.assert_allclose(others, logits, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(other, loss, rtol=1e-6)
        all_close(got, want, 1e-5)  # the same operations, fused differently


@pytest.mark.parametrize(
    "name",
    ["dora_everywhere", "different_rows_and_a_layer_whole"],
)
def test_bf16_stays_near_float32(name):
    case = CASES[name]
    tree, logits, _, want = results(name)
    model = model_of(case, "bfloat16", attention="eager", remat="none")
    (loss, narrow), got = adapted_gradients(tree, base_of(case), batch(), model=model)
    assert narrow.dtype == loss.dtype == jnp.float32
    error = np.asarray(narrow - logits)
    # Each of some 30 operations rounds to 2^-8 of its values; errors add up at random.
    assert np.sqrt((error**2).mean()) < 0.03 * float(logits.std())
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert g.dtype == jnp.float32
        error, size = (np.linalg.norm(np.asarray(d)) for d in (g - w, w))
        assert error <= 0.1 * size


def test_dropout_is_of_the_update_alone(name="tied_shared"):
    case = CASES[name]
    tree, logits, *_ = results(name)
    settings = dataclasses.replace(case.lora, lora_dropout=0.5)
    model = model_of(dataclasses.replace(case, lora=settings))
    variables = {
        "params": base_of(case),
        "lora": lora.bind(tree, base_of(case), case.lora),
    }

    @jax.jit
    def run(key, variables):
        return model.apply(variables, batch()["tokens"], rngs={"dropout": key})

    one, again, two = (run(jax.random.key(i), variables) for i in (1, 1, 2))
    np.testing.assert_array_equal(one, again)
    assert np.abs(one - two).max() > 0.1 and np.abs(one - logits).max() > 0.1
    # Where the updates are zero, nothing is left to drop.
    off = jax.tree.map(lambda leaf: leaf, variables)
    for module in ("lm_head", "model.layers.self_attn.q_proj"):
        part = get(off["lora"], module)
        part["lora_B"] = jnp.zeros_like(part["lora_B"])
    np.testing.assert_array_equal(
        run(jax.random.key(1), off), run(jax.random.key(2), off)
    )


# --- bind ---


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)


def test_bind_adds_constants_under_the_modules_they_belong_to():
    case = CASES["different_rows_and_a_layer_whole"]
    tree = trained(case)
    bound = lora.bind(tree, base_of(case), case.lora)
    up = bound["model"]["layers"]["mlp"]["up_proj"]
    np.testing.assert_array_equal(up["scaling"], np.asarray([2, 0, 2], np.float32))
    np.testing.assert_array_equal(up["weight_trained"], [False, True, False])
    assert "bias_trained" not in up  # in all layers
    gate = bound["model"]["layers"]["mlp"]["gate_proj"]
    assert set(gate) == {"weight", "weight_trained", "bias"}
    np.testing.assert_array_equal(
        bound["model"]["embed_tokens"]["token_indices"], [3, 9]
    )
    np.testing.assert_array_equal(bound["lm_head"]["token_indices"], [9, 20, 0])
    assert "weight_trained" not in bound["model"]["norm"]
    # The arguments are neither copied nor changed.
    assert shapes(tree) == shapes(trained(case))
    for (module, name), leaf in leaves(tree):
        assert get(bound, module)[name] is leaf


@pytest.mark.parametrize("name", ["tied_shared", "tied_shared_dora"])
def test_a_tied_head_gets_the_transposed_update(name):
    case = CASES[name]
    tree = trained(case)
    bound = lora.bind(tree, base_of(case), case.lora)
    embed = tree["model"]["embed_tokens"]
    np.testing.assert_array_equal(
        bound["lm_head"]["lora_A"], embed["lora_embedding_B"].T
    )
    np.testing.assert_array_equal(
        bound["lm_head"]["lora_B"], embed["lora_embedding_A"].T
    )
    assert bound["lm_head"]["scaling"].shape == ()


@each_case
def test_shapes_are_enough_for_bind_and_abstract_adapters(name):
    case = CASES[name]
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base_of(case)
    )
    tree = trained(case)
    described = lora.abstract_adapters(abstract, case.lora)
    assert shapes(described) == shapes(tree)
    one, two = (
        jax.eval_shape(functools.partial(lora.bind, base=b, lora=case.lora), tree)
        for b in (abstract, base_of(case))
    )
    assert shapes(one) == shapes(two)


@pytest.mark.parametrize(
    "name", ["patterns", "tied_shared", "untied_rows_and_a_whole_head"]
)
def test_a_tree_of_another_configuration_is_refused(name):
    case = CASES[name]

    def broken(change):
        tree = jax.tree.map(lambda leaf: leaf, trained(case))
        change(tree)
        return functools.partial(lora.bind, tree, base_of(case), case.lora)

    (module, leaf), value = next(iter(leaves(trained(case))))
    full = f"{module}.{leaf}".replace(".", r"\.")
    begin = "The adapter tree does not fit its LoRA configuration on this m"
    with pytest.raises(UserError, match=f"{begin}odel: no {full}"):
        broken(lambda t: get(t, module).pop(leaf))()
    with pytest.raises(UserError, match=rf"unexpected {module}\.lora_C"):
        broken(lambda t: get(t, module).update(lora_C=value))()
    size = ", ".join(str(n) for n in (*value.shape[:-1], 1))
    with pytest.raises(UserError, match=rf"{full} \[{size}\] instead of \["):
        broken(lambda t: get(t, module).update({leaf: value[..., :1]}))()
    with pytest.raises(UserError, match=r"no .*; no .* and \d+ more\."):
        lora.bind({}, random_base(), LoraConfig(target_modules=".*_proj|lm_head"))


# --- Starts ---


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("tied_shared", "bfloat16"),
        ("different_rows_and_a_layer_whole", "float32"),
        ("dora_everywhere", "float32"),
        ("dora_everywhere", "bfloat16"),
    ],
)
def test_a_fresh_adapter_is_the_base(name, dtype):
    case = CASES[name]
    tree = init_adapters(jax.random.key(3), base_of(case), case.lora)
    assert shapes(tree) == shapes(lora.abstract_adapters(base_of(case), case.lora))
    model = model_of(case, dtype, attention="eager", remat="none")
    # XLA may leave out roundings to bf16 between operations, others in each program.
    exact = {"xla_allow_excess_precision": False}
    run = jax.jit(model.apply, compiler_options=exact)
    tokens = batch()["tokens"]
    bound = lora.bind(tree, base_of(case), case.lora)
    got = run({"params": base_of(case), "lora": bound}, tokens)
    want = run({"params": base_of(case)}, tokens)
    if not case.lora.use_dora:
        # Rows of the head that are trained alone are multiplied in a separate product,
        # which may sum in another order.
        rows = np.asarray(case.rows[1], int)
        np.testing.assert_allclose(got[..., rows], want[..., rows], atol=1e-6)
        others = np.setdiff1d(np.arange(V), rows)
        np.testing.assert_array_equal(got[..., others], want[..., others])
        return
    # DoRA multiplies by m / |W|, a quotient of two roundings of the same number: off
    # by an ulp. In bf16 |W| is that of the rounded weight, which is what is multiplied.
    error = np.abs(np.asarray(got - want)).max() / float(want.std())
    assert error < (1e-5 if dtype == "float32" else 0.1)
