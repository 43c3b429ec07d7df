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

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax import tree as trees
from qlora_jax.data.encoding import IGNORE
from qlora_jax.errors import UserError
from qlora_jax.lora import functional as lora
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.training.objectives import loss_sum
from qlora_jax.tree import PROJECTIONS
from tests.lora.reference import L, V, config, config_of, draw, random_base

equal = np.testing.assert_array_equal

# --- delta ---


def adapter(r=4, out=24, inner=40):
    rng = np.random.default_rng(0)
    return {
        "lora_A": jnp.asarray(rng.standard_normal((r, inner)), jnp.float32),
        "lora_B": jnp.asarray(rng.standard_normal((out, r)), jnp.float32),
    }


@pytest.mark.parametrize("bias", [False, True])
def test_delta_is_scaling_times_b_a_x(bias):
    x = jnp.asarray(np.random.default_rng(1).standard_normal((2, 5, 40)), jnp.float32)
    parts = adapter() | ({"lora_bias": jnp.linspace(-1, 1, 24)} if bias else {})
    wide = {k: np.asarray(v, np.float64) for k, v in parts.items()}
    inner = np.asarray(x, np.float64) @ wide["lora_A"].T @ wide["lora_B"].T
    want = 0.37 * (inner + wide.get("lora_bias", 0.0))
    # Sums of 40 and 4 float32 terms of order one.
    np.testing.assert_allclose(lora.delta(x, parts, 0.37), want, atol=2e-5)


def test_delta_in_bf16_rounds_neither_scaling_nor_gradients_of_the_adapter():
    x = jnp.ones((3, 40), jnp.bfloat16)
    parts = {**adapter(), "lora_bias": jnp.ones(24)}
    total = lambda p: lora.delta(x, p, 2.0).astype(jnp.float32).sum()  # noqa: E731
    assert lora.delta(x, parts, 2.0).dtype == jnp.bfloat16
    assert {g.dtype for g in jax.grad(total)(parts).values()} == {jnp.dtype("float32")}
    # 1.003 rounds to 1 in bf16; the product has the nearest number to the true one.
    eye = {"lora_A": jnp.eye(8), "lora_B": jnp.eye(8)}
    got = lora.delta(jnp.full((1, 8), 255.0, jnp.bfloat16), eye, jnp.float32(1.003))
    equal(got, jnp.full((1, 8), 256, jnp.bfloat16))


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


def test_dropout_needs_a_key_and_a_probability_and_depends_on_the_key_only(getkey):
    run = functools.partial(lora.delta, jnp.ones((7, 40)), adapter(), 1.0)
    key = getkey()
    equal(run(dropout=0.5), run())
    equal(run(dropout=0.0, key=key), run())
    one = run(dropout=0.5, key=key)
    equal(one, run(dropout=0.5, key=key))
    assert (one != run(dropout=0.5, key=getkey())).any()


# --- Norms of rows ---


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("scaling", [0.5, -3.0, 0.0])
def test_row_norms_are_those_of_the_sum(packed, scaling):
    rng = np.random.default_rng(0)
    weight = jnp.asarray(rng.standard_normal((24, 64)), jnp.float32)
    if packed:
        weight = nf4.quantize(np.asarray(weight), double_quant=True)
    dense = np.asarray(nf4.dequantize(weight) if packed else weight, np.float64)
    a, b = adapter(inner=64).values()
    total = dense + scaling * (np.asarray(b, np.float64) @ np.asarray(a, np.float64))
    got = lora.row_norms(weight, a, b, scaling)
    # Float32 sums of 64 squares; the three parts are of the size of the result.
    np.testing.assert_allclose(got, np.linalg.norm(total, axis=1), rtol=1e-5)
    norms = np.linalg.norm(dense, axis=1)
    np.testing.assert_allclose(lora.row_norms(weight), norms, rtol=1e-6)


def test_norms_pass_no_gradient_and_zero_rows_make_no_nan():
    weight = jnp.zeros((3, 8)).at[0].set(1.0)
    parts = jnp.ones((2, 8)), jnp.zeros((3, 2))
    norms = lambda weight, parts: lora.row_norms(weight, *parts, 2.0).sum()  # noqa: E731
    for leaf in jax.tree.leaves(jax.grad(norms, argnums=(0, 1))(weight, parts)):
        assert not leaf.any()
    # An update that takes a row away: what is left is rounding, not a negative root.
    gone = jnp.full((1, 8), 1 / 3), jnp.full((3, 1), -3.0)
    left = lora.row_norms(jnp.ones((3, 8)), *gone)
    assert np.isfinite(np.asarray(left)).all() and (left < 1e-3).all()
    factor = lora.rescale(jnp.ones(3), jnp.asarray([2.0, 0.0, 4.0]), 1.0)
    equal(factor, [0.5, 1.0, 0.25])
    unused = lora.rescale(jnp.zeros(3), jnp.asarray([2.0, 0.0, 4.0]), jnp.float32(0))
    equal(unused, jnp.ones(3))


# --- The model with adapters, and with the effective weights ---

BLOCKS = {name: "self_attn" if i < 4 else "mlp" for i, name in enumerate(PROJECTIONS)}
EMBED, HEAD = "model.embed_tokens", "lm_head"


@dataclasses.dataclass(frozen=True)
class Case:
    """A configuration, and in plain words what it selects."""

    lora: LoraConfig
    updates: tuple[tuple[str, int, float], ...]
    """(Expression for whole names of modules, rank, scaling); the first counts."""
    in_full: str = ""
    """Expression for whole names of tensors."""
    rows: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    """Rows trained alone: of the embedding, of the head."""
    kind: tuple[str, ...] = ()
    """What the base is: tied, packed, with biases."""

    def update(self, name):
        rules = (x for pattern, *x in self.updates if re.fullmatch(pattern, name))
        return next(rules, None)

    def full(self, name):
        return re.fullmatch(self.in_full, name) is not None

    @functools.cached_property
    def base(self):
        return random_base(**dict.fromkeys(self.kind, True), spread=0.15)

    @functools.cached_property
    def tree(self):
        """A trained tree whose every used number is random; the rest is zero."""
        return jax.tree.map(jnp.asarray, draw(self.base, self.lora, 1, spread=0.15))

    @functools.cached_property
    def bound(self):
        return lora.bind(self.tree, self.base, self.lora)

    def model(self, dtype="float32", attention="eager", remat="none"):
        compute = Compute(dtype, lora=self.lora, attention=attention, remat=remat)
        return Llama(config_of("tied" in self.kind, "biases" in self.kind), compute)


TIED, BIASED = ("tied",), ("biases", "packed")
R4 = dict(r=4, lora_alpha=8)
R2 = dict(r=2, lora_alpha=4)
CASES = {
    "patterns": Case(
        config(
            *("q_proj", "up_proj", "model.layers.1.mlp.down_proj", HEAD),
            **dict(r=3, lora_alpha=6, use_rslora=True, lora_bias=True),
            **dict(bias="lora_only", layers_to_transform=(0, 2)),
            rank_pattern={
                **{"layers.2.self_attn.q_proj": 1, "q_proj": 2},
                r"layers\.[12].*up_proj": 5,
            },
            alpha_pattern={"up_proj": 1.5, "^model.layers.0.self_attn.q_proj": 7},
        ),
        (
            *((r".*0.*q_proj", 2, 7 / 2**0.5), (r".*2.*q_proj", 1, 6.0)),
            *((rf".*{i}.*up_proj", r, 1.5 / r**0.5) for i, r in ((0, 3), (2, 5))),
            (r".*1.*down_proj|lm_head", 3, 6 / 3**0.5),
        ),
        r".*[02].*(q|up)_proj.bias|.*1.*down_proj.bias",
        kind=BIASED,
    ),
    "dora_packed": Case(
        config(
            r".*\.[01]\..*(k|down|gate)_proj",
            rank_pattern={r"0\.mlp\..*": 2},
            **dict(r=4, lora_alpha=2, use_dora=True, bias="all"),
        ),
        (
            (r".*0\.mlp.*(down|gate)_proj", 2, 1.0),
            (r".*[01]\..*(k|down|gate)_proj", 4, 0.5),
        ),
        r".*_proj\.bias",
        kind=BIASED,
    ),
    "dora_everywhere": Case(
        config("q_proj", "embed_tokens", HEAD, **R4, use_dora=True),
        ((f".*q_proj|{HEAD}|{EMBED}", 4, 2.0),),
    ),
    "tied_apart": Case(
        config("embed_tokens", HEAD, **R4, rank_pattern={HEAD: 2}),
        ((HEAD, 2, 4.0), (EMBED, 4, 2.0)),
        kind=TIED,
    ),
    "tied_shared": Case(
        config(
            *(HEAD, "q_proj"),
            **dict(r=4, lora_alpha=6, ensure_weight_tying=True),
            rank_pattern={"embed_tokens": 2, HEAD: 3},
            alpha_pattern={HEAD: 10, "embed_tokens": 7},
        ),
        ((HEAD, 2, 10 / 3), (EMBED, 2, 3.5), (".*q_proj", 4, 1.5)),
        kind=TIED,
    ),
    "tied_shared_dora": Case(
        config("embed_tokens", **R2, use_dora=True, ensure_weight_tying=True),
        ((f"{HEAD}|{EMBED}", 2, 2.0),),
        kind=TIED,
    ),
    "rows_of_both_and_an_adapted_head": Case(
        config(HEAD, r=2, lora_alpha=1, trainable_token_indices=(30, 4, 11)),
        ((HEAD, 2, 0.5),),
        rows=((30, 4, 11), (30, 4, 11)),
        kind=TIED,
    ),
    "different_rows_and_a_layer_whole": Case(
        config(
            *("up_proj", "v_proj"),
            **dict(**R2, bias="all", modules_to_save=("layers.1.mlp", "model.norm")),
            trainable_token_indices={"embed_tokens": (3, 9), HEAD: (9, 20, 0)},
        ),
        ((r".*[02].*up_proj|.*v_proj", 2, 2.0),),
        r".*_proj\.bias|model\.norm\.weight|.*1\.mlp.*",
        rows=((3, 9), (9, 20, 0)),
        kind=("tied", "biases"),
    ),
    "whole_table_for_both": Case(
        config(
            "k_proj", **R2, modules_to_save=(HEAD, "norm"), ensure_weight_tying=True
        ),
        ((".*k_proj", 2, 2.0),),
        r".*norm\.weight|lm_head.weight|model.embed_tokens.weight",
        kind=("tied", "packed"),
    ),
    "whole_embedding_alone": Case(
        config(
            *("k_proj", HEAD),
            **dict(**R2, modules_to_save=("embed_tokens", "layers.2.input_layernorm")),
        ),
        ((".*k_proj|lm_head", 2, 2.0),),
        r"model.embed_tokens.weight|.*2.input_layernorm.weight",
        kind=TIED,
    ),
    "untied_rows_and_a_whole_head": Case(
        config(
            *("o_proj",),
            **dict(**R2, modules_to_save=(HEAD,), trainable_token_indices=(1, 2, 36)),
        ),
        ((".*o_proj", 2, 2.0),),
        "lm_head.weight",
        rows=((1, 2, 36), ()),
    ),
}
each_case = pytest.mark.parametrize("name", CASES)


def get(tree, dotted):
    for part in dotted.split("."):
        tree = tree.get(part, {})
    return tree


def wide(tree):
    """Dequantized, float32."""
    packed = lambda leaf: isinstance(leaf, nf4.NF4Tensor)  # noqa: E731
    widen = lambda leaf: nf4.dequantize(leaf, "float32") if packed(leaf) else leaf  # noqa: E731
    return jax.tree.map(widen, tree, is_leaf=packed)


def effective(tree, case):
    """The effective weights: an untied model with all biases.

    Every formula is written for one layer of one module.
    """
    frozen = wide(case.base)

    def rescaled(weight, magnitude, axis):
        norm = jax.lax.stop_gradient(jnp.sqrt((weight * weight).sum(axis)))
        return weight * jnp.expand_dims(magnitude / norm, axis)

    def weight_of(name, old, new):
        return (new if case.full(f"{name}.weight") else old)["weight"]

    def linear(name, old, new):
        """Weight and bias of one linear layer."""
        weight = weight_of(name, old, new)
        bias = new if case.full(f"{name}.bias") else old
        bias = bias.get("bias", jnp.zeros(len(weight)))
        if case.update(name) is not None:
            r, s = case.update(name)
            weight = weight + s * (new["lora_B"][:, :r] @ new["lora_A"][:r])
            if "lora_magnitude_vector" in new:
                weight = rescaled(weight, new["lora_magnitude_vector"], 1)
            if "lora_bias" in new:
                bias = bias + s * new["lora_bias"]
        return {"weight": weight, "bias": bias}

    def norm(name, old, new):
        return {"weight": weight_of(name, old, new)}

    def in_layers(make, path):
        """What `make` gives of a module in each layer, with an axis of layers."""
        nodes = [get(x, f"model.layers.{path}") for x in (frozen, tree)]
        made = []
        for i in range(L):
            one = ({name: array[i] for name, array in node.items()} for node in nodes)
            made.append(make(f"model.layers.{i}.{path}", *one))
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *made)

    def replaced(table, rows, delta):
        for row, index in enumerate(rows):
            one = (jnp.arange(V) == index)[:, None]
            table = jnp.where(one, delta[row][None, :], table)
        return table

    layers = {"self_attn": {}, "mlp": {}}
    for name, block in BLOCKS.items():
        layers[block][name] = in_layers(linear, f"{block}.{name}")
    for name in ("input_layernorm", "post_attention_layernorm"):
        layers[name] = in_layers(norm, name)

    # The head, before the embedding changes.
    node, embed, old = dict(get(tree, HEAD)), get(tree, EMBED), get(frozen, EMBED)
    weight = (old if "tied" in case.kind else frozen["lm_head"])["weight"]
    if case.lora.ensure_weight_tying and "tied" in case.kind:
        if "lora_embedding_A" in embed:
            node["lora_A"] = embed["lora_embedding_B"].T
            node["lora_B"] = embed["lora_embedding_A"].T
        node |= {"weight": embed["weight"]} if "weight" in embed else {}
    embed_rows, head_rows = case.rows
    if head_rows:
        shared = "trainable_tokens_delta" not in node
        delta = (embed if shared else node)["trainable_tokens_delta"]
        weight = replaced(weight, head_rows, delta)
    head = linear(HEAD, {"weight": weight}, node)

    table = weight_of(EMBED, old, embed)
    if embed_rows:
        table = replaced(table, embed_rows, embed["trainable_tokens_delta"])
    if case.update(EMBED) is not None:
        r, s = case.update(EMBED)
        a, b = embed["lora_embedding_A"][:r], embed["lora_embedding_B"][:, :r]
        table = table + s * (b @ a).T
        if "lora_magnitude_vector" in embed:
            table = rescaled(table, embed["lora_magnitude_vector"], 0)
    last = norm("model.norm", *(get(x, "model.norm") for x in (frozen, tree)))
    model = {"embed_tokens": {"weight": table}, "layers": layers, "norm": last}
    return {"model": model, "lm_head": head}


def make_batch():
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, V, (3, 14))
    tokens[0, :6] = [30, 4, 11, 3, 9, 36]  # rows that some cases train
    labels = np.where(np.arange(14) < rng.integers(0, 6, (3, 1)), IGNORE, tokens)
    made = {"tokens": tokens, "labels": labels}
    return {name: jnp.asarray(array, jnp.int32) for name, array in made.items()}


BATCH = make_batch()
PLAIN = Llama(
    config_of(biases=True), Compute("float32", attention="eager", remat="none")
)


def cross_entropy(logits):
    targets = BATCH["labels"][:, 1:]
    logp = jax.nn.log_softmax(logits[:, :-1])
    picked = jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], -1)
    return -jnp.where(targets == IGNORE, 0.0, picked[..., 0]).sum(), logits


@jax.jit
def plain_gradients(tree):
    """(Loss, logits) and gradients of a model without adapters."""

    def loss(tree):
        head = {"weight": tree["lm_head"]["weight"]}
        logits = PLAIN.apply({"params": {**tree, "lm_head": head}}, BATCH["tokens"])
        return cross_entropy(logits + tree["lm_head"]["bias"][None, None])

    return jax.value_and_grad(loss, has_aux=True)(tree)


@functools.partial(jax.jit, static_argnames="model")
def adapted_gradients(tree, frozen, *, model):
    """(Loss, logits) and gradients of a model with adapters."""

    def loss(tree):
        bound = lora.bind(tree, frozen, model.compute.lora)
        variables = {"params": frozen, "lora": bound}
        return cross_entropy(model.apply(variables, BATCH["tokens"]))

    return jax.value_and_grad(loss, has_aux=True)(tree)


@functools.cache
def results(name):
    """Of a case: itself, logits, loss, gradients."""
    case = CASES[name]
    model = case.model()
    (loss, logits), got = adapted_gradients(case.tree, case.base, model=model)
    return case, logits, loss, got


@each_case
def test_logits_and_gradients_equal_those_of_the_effective_weights(name):
    case, logits, loss, got = results(name)
    weights_of = jax.jit(functools.partial(effective, case=case))
    weights, back = jax.vjp(weights_of, case.tree)
    (want_loss, want_logits), gradients = plain_gradients(weights)
    # Float32 sums of at most 96 terms through three layers; logits of order one to ten.
    np.testing.assert_allclose(logits, want_logits, rtol=1e-5, atol=2e-5)

    np.testing.assert_allclose(loss, want_loss, rtol=1e-6)

    def compare(path, g, w):
        g, w = np.asarray(g, np.float64), np.asarray(w, np.float64)
        assert np.abs(w).max() > 1e-4, path  # every array has one
        # Float32 sums over 40 tokens and through three layers, in another order.
        assert np.abs(g - w).max() <= 2e-5 * np.abs(w).max(), path
        # Padding, layers that are not trained, rows of tokens that do not occur.
        assert not g[w == 0].any(), path

    jax.tree_util.tree_map_with_path(compare, got, *back(gradients))


def all_close(a, b):
    """Within 1e-5 of the largest element of each leaf: other sums of float32."""

    def leaf(x, y):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        assert np.abs(x - y).max() <= 1e-5 * max(np.abs(y).max(), 1e-3)

    jax.tree.map(leaf, a, b)


@pytest.mark.parametrize("name", ["tied_shared", "rows_of_both_and_an_adapted_head"])
def test_the_loss_of_training_has_the_same_gradients(name):
    # Its head works on chunks of tokens and sees only a part of the variables.
    case, _, loss, want = results(name)
    training = jax.value_and_grad(functools.partial(loss_sum, model=case.model()))
    got = jax.jit(training)(case.tree, case.base, BATCH)
    np.testing.assert_allclose(got[0], loss, rtol=1e-6)
    all_close(got[1], want)


@pytest.mark.parametrize("remat", ["full", "save_matmuls"])
def test_recomputation_gives_the_same_gradients(remat):
    case, logits, loss, want = results("dora_everywhere")
    model = case.model(remat=remat, attention=Compute("float32").attention)
    (other, others), got = adapted_gradients(case.tree, case.base, model=model)
    np.testing.assert_allclose(others, logits, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(other, loss, rtol=1e-6)
    all_close(got, want)


@pytest.mark.parametrize(
    "name", ["dora_everywhere", "different_rows_and_a_layer_whole"]
)
def test_bf16_stays_near_float32(name):
    case, logits, _, want = results(name)
    model = case.model("bfloat16")
    (loss, narrow), got = adapted_gradients(case.tree, case.base, model=model)
    assert narrow.dtype == loss.dtype == jnp.float32
    error = np.asarray(narrow - logits)
    # Each of some 30 operations rounds to 2^-8 of its values; errors add up at random.
    assert np.sqrt((error**2).mean()) < 0.03 * float(logits.std())
    for g, w in zip(*map(jax.tree.leaves, (got, want)), strict=True):
        assert g.dtype == jnp.float32
        error, size = (np.linalg.norm(np.asarray(d)) for d in (g - w, w))
        assert error <= 0.1 * size


def test_dropout_is_of_the_update_alone():
    case, logits, *_ = results("tied_shared")
    settings = dataclasses.replace(case.lora, lora_dropout=0.5)
    model = dataclasses.replace(case, lora=settings).model()

    @jax.jit
    def run(key, bound):
        variables = {"params": case.base, "lora": bound}
        return model.apply(variables, BATCH["tokens"], rngs={"dropout": key})

    one, again, two = (run(jax.random.key(i), case.bound) for i in (1, 1, 2))
    equal(one, again)
    assert np.abs(one - two).max() > 0.1 and np.abs(one - logits).max() > 0.1
    # Where the updates are zero, nothing is left to drop.
    off = trees.copy(case.bound)
    for module in (HEAD, "model.layers.self_attn.q_proj"):
        part = get(off, module)
        part["lora_B"] = jnp.zeros_like(part["lora_B"])
    equal(run(jax.random.key(1), off), run(jax.random.key(2), off))


# --- bind ---


def shapes(tree):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype.name), tree)


def test_bind_adds_constants_only_where_needed_and_copies_no_array():
    case = CASES["different_rows_and_a_layer_whole"]
    before = shapes(case.tree)
    bound = lora.bind(case.tree, case.base, case.lora)
    mlp = bound["model"]["layers"]["mlp"]
    assert "bias_trained" not in mlp["up_proj"]  # in all layers
    assert set(mlp["gate_proj"]) == {"weight", "weight_trained", "bias"}
    assert "weight_trained" not in bound["model"]["norm"]
    assert shapes(case.tree) == before
    for path, leaf in trees.walk(case.tree):
        assert trees.at(bound, path) is leaf


@each_case
def test_shapes_are_enough_for_bind_and_abstract_adapters(name):
    case = CASES[name]
    like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
    abstract = jax.tree.map(like, case.base)
    described = lora.abstract_adapters(abstract, case.lora)
    assert shapes(described) == shapes(case.tree)
    bind = functools.partial(lora.bind, base=abstract, lora=case.lora)
    assert shapes(jax.eval_shape(bind, case.tree)) == shapes(case.bound)


@pytest.mark.parametrize(
    "name", ["patterns", "tied_shared", "untied_rows_and_a_whole_head"]
)
def test_a_tree_of_another_configuration_is_refused(name):
    case = CASES[name]
    (path, value), *_ = trees.walk(case.tree)
    full = r"\.".join(path)
    size = ", ".join(str(n) for n in (*value.shape[:-1], 1))
    begin = "The adapter tree does not fit its LoRA configuration on this m"
    for change, message in (
        (lambda node: node.pop(path[-1]), f"{begin}odel: no {full}"),
        (lambda node: node.update(lora_C=value), r"unexpected .*\.lora_C"),
        (
            lambda node: node.update({path[-1]: value[..., :1]}),
            rf"{full} \[{size}\] instead of \[",
        ),
    ):
        tree = trees.copy(case.tree)
        change(trees.at(tree, path[:-1]))
        with pytest.raises(UserError, match=message):
            lora.bind(tree, case.base, case.lora)
    with pytest.raises(UserError, match=r"no .*; no .* and \d+ more\."):
        lora.bind({}, random_base(), LoraConfig(target_modules=".*_proj|lm_head"))


# --- Starts ---


@pytest.mark.parametrize(
    "name, dtype",
    [
        ("tied_shared", "bfloat16"),
        ("different_rows_and_a_layer_whole", "float32"),
        *(("dora_everywhere", dtype) for dtype in ("float32", "bfloat16")),
    ],
)
def test_a_fresh_adapter_is_the_base(name, dtype):
    case = CASES[name]
    tree = init_adapters(jax.random.key(3), case.base, case.lora)
    assert shapes(tree) == shapes(lora.abstract_adapters(case.base, case.lora))
    # XLA may leave out roundings to bf16 between operations, others in each program.
    exact = {"xla_allow_excess_precision": False}
    run = jax.jit(case.model(dtype).apply, compiler_options=exact)
    bound = lora.bind(tree, case.base, case.lora)
    got = run({"params": case.base, "lora": bound}, BATCH["tokens"])
    want = run({"params": case.base}, BATCH["tokens"])
    if not case.lora.use_dora:
        # Rows of the head that are trained alone are multiplied in a separate product,
        # which may sum in another order.
        rows = np.asarray(case.rows[1], int)
        np.testing.assert_allclose(got[..., rows], want[..., rows], atol=1e-6)
        others = np.setdiff1d(np.arange(V), rows)
        equal(got[..., others], want[..., others])
        return
    # DoRA multiplies by m / |W|, a quotient of two roundings of the same number: off
    # by an ulp. In bf16 |W| is that of the rounded weight, which is what is multiplied.
    error = np.abs(np.asarray(got - want)).max() / float(want.std())
    assert error < (1e-5 if dtype == "float32" else 0.1)
