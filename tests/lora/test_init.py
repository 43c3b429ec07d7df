"""How adapters start, and how those that start from the weight go back to it."""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.lora.functional import bind
from qlora_jax.lora.init import absorb, factor_out, init_adapters
from qlora_jax.lora.targets import select
from qlora_jax.tree import PROJECTIONS, at, dotted, parse_key, walk
from tests.lora.reference import CONFIG, D, F, K, L, V, config, draw, logits, updates
from tests.lora.reference import random_base as base

equal, close = np.testing.assert_array_equal, np.testing.assert_allclose


def start(lora, key=0, **kind):
    return init_adapters(jax.random.key(key), base(**kind), lora)


def projection(tree, name):
    block = "self_attn" if name in PROJECTIONS[:4] else "mlp"
    return tree["model"]["layers"][block][name]


def dense(weight):
    """In float64."""
    if isinstance(weight, nf4.NF4Tensor):
        weight = nf4.dequantize(weight, jnp.float32)
    return np.asarray(weight, np.float64)


def tail(weight, rank):
    """What the best approximation of this rank misses."""
    return np.sqrt((np.linalg.svd(weight, compute_uv=False)[rank:] ** 2).sum())


def check_normal(values, deviation):
    """Mean and deviation of normal numbers, within five standard errors."""
    error = 5 / np.sqrt(values.size)
    assert abs(values.mean()) < error * deviation
    assert abs(values.std() / deviation - 1) < 0.71 * error


# --- Default and gaussian ---


@pytest.mark.parametrize("packed", [False, True])
def test_fresh_adapters_have_the_shapes_of_their_modules_and_b_is_zero(packed):
    lora = config("q_proj", "down_proj", "lm_head", r=4, lora_bias=True)
    leaves = dict(walk(start(lora, packed=packed)))
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    assert shapes == select(base(packed=packed), lora).shapes()
    for path, leaf in leaves.items():
        assert leaf.dtype == jnp.float32
        assert bool(jnp.any(leaf)) == (path[-1] == "lora_A")


def test_a_is_uniform_up_to_one_over_the_root_of_its_inputs():
    a = np.asarray(projection(start(config("down_proj", r=64)), "down_proj")["lora_A"])
    bound = 1 / np.sqrt(F)
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.999 * bound
    # 18,432 draws: mean and deviation within five standard errors.
    assert abs(a.mean()) < 5 * bound / np.sqrt(3 * a.size)
    assert abs(a.std() / (bound / np.sqrt(3)) - 1) < 5 * 0.45 / np.sqrt(a.size)


def test_gaussian_is_normal_with_deviation_one_over_the_rank_of_the_layer():
    ranks = {"layers.1.mlp.down_proj": 16}
    lora = config("down_proj", r=64, rank_pattern=ranks, init_lora_weights="gaussian")
    down = jax.tree.map(np.asarray, projection(start(lora), "down_proj"))
    for a, rank in zip(down["lora_A"], (64, 16, 64), strict=True):
        check_normal(a[:rank], 1 / rank)
        assert np.abs(a[:rank]).max() > 3 / rank  # it has tails
        assert not a[rank:].any()
    assert not down["lora_B"].any()


INITS = pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa"])


@INITS
@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_starts_with_a_of_zero_and_b_normal(init, tied):
    fields = dict(init_lora_weights=init, ensure_weight_tying=tied)
    tree = start(config("embed_tokens", r=32, **fields), tied=tied)
    embed = tree["model"]["embed_tokens"]
    assert embed["lora_embedding_A"].shape == (32, V)
    assert not embed["lora_embedding_A"].any()
    b = np.asarray(embed["lora_embedding_B"])
    assert b.shape == (D, 32)
    check_normal(b, 1)
    assert set(tree) == {"model"}  # a tied head has no arrays


@INITS
def test_ranks_and_layers_that_are_not_used_are_zero(init):
    lora = config(
        *("q_proj", "up_proj"),
        **dict(r=4, layers_to_transform=(1, 2), init_lora_weights=init),
        rank_pattern={"layers.2.self_attn.q_proj": 2, "up_proj": 6},
    )
    tree = start(lora)
    for name, ranks in (("q_proj", (0, 4, 2)), ("up_proj", (0, 6, 6))):
        node = projection(tree, name)
        assert node["lora_A"].shape[1] == max(ranks)
        for layer, rank in enumerate(ranks):
            a, b = node["lora_A"][layer], node["lora_B"][layer]
            assert np.asarray(a[:rank]).any(1).all()  # all of the rows that are used
            assert not a[rank:].any() and not b[:, rank:].any()


def test_modules_and_layers_start_differently_and_by_their_name_only():
    def first(*names, key=3, **fields):
        tree = start(config(*names, r=4, **fields), key=key)
        return {name: np.asarray(projection(tree, name)["lora_A"]) for name in names}

    few = first("q_proj", "k_proj")
    many = first("q_proj", "k_proj", "v_proj", "o_proj")
    for again in (many, first("q_proj", "k_proj")):
        equal(again["q_proj"], few["q_proj"])
        equal(again["k_proj"], few["k_proj"])
    q = few["q_proj"]
    assert not np.array_equal(q, few["k_proj"]) and not np.array_equal(q[0], q[1])
    assert not np.array_equal(q, first("q_proj", key=4)["q_proj"])
    # The other parts of a module do not change its factors either.
    fields = dict(use_dora=True, bias="all", modules_to_save=("norm",))
    equal(first("q_proj", **fields)["q_proj"], q)


def test_shapes_are_enough_and_init_works_under_jit():
    like = lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)  # noqa: E731
    abstract, lora = jax.tree.map(like, base()), config("q_proj", "embed_tokens", r=4)
    make = partial(init_adapters, base=abstract, lora=lora)
    made = start(lora)
    assert jax.tree.map(like, made) == jax.eval_shape(make, jax.random.key(0))
    jax.tree.map(equal, jax.jit(make)(jax.random.key(0)), made)


# --- What is copied and measured ---


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("tied", [False, True])
def test_magnitudes_start_as_the_norms_of_the_weight(tied, packed):
    names = ("up_proj", "embed_tokens", "lm_head", "k_proj")
    lora = config(*names, use_dora=True, exclude_modules=("layers.1.self_attn.k_proj",))
    tree, frozen = (f(packed=packed, tied=tied) for f in (partial(start, lora), base))
    table, up = frozen["model"]["embed_tokens"], projection(frozen, "up_proj")
    for node, old, axis in (
        (projection(tree, "up_proj"), up, -1),
        (tree["model"]["embed_tokens"], table, 0),  # of the columns
        (tree["lm_head"], frozen.get("lm_head", table), 1),
    ):
        norms = np.linalg.norm(dense(old["weight"]), axis=axis)
        # A float32 sum of 64 squares.
        close(node["lora_magnitude_vector"], norms, rtol=1e-6)
    k = np.asarray(projection(tree, "k_proj")["lora_magnitude_vector"])
    assert k[0].all() and k[2].all() and not k[1].any()


def test_a_tied_head_shares_all_but_its_magnitudes():
    lora = config("lm_head", use_dora=True, ensure_weight_tying=True)
    head = start(lora, tied=True)["lm_head"]
    table = dense(base(tied=True)["model"]["embed_tokens"]["weight"])
    close(head.pop("lora_magnitude_vector"), np.linalg.norm(table, axis=1), rtol=1e-6)
    assert not head


def test_tensors_trained_in_full_start_as_the_base():
    whole = ("model.norm", "layers.1.mlp.up_proj", "lm_head")
    lora = config(modules_to_save=whole, bias="lora_only")
    tree, frozen = start(lora, biases=True), base(biases=True)
    equal(tree["model"]["norm"]["weight"], frozen["model"]["norm"]["weight"])
    equal(tree["lm_head"]["weight"], frozen["lm_head"]["weight"])
    equal(projection(tree, "q_proj")["bias"], projection(frozen, "q_proj")["bias"])
    for part in ("weight", "bias"):
        up, old = (projection(t, "up_proj")[part] for t in (tree, frozen))
        equal(up[1], old[1])
        assert not up[0].any() and not up[2].any()
    narrow = jax.tree.map(lambda a: a.astype(jnp.bfloat16), frozen)
    made = init_adapters(jax.random.key(0), narrow, lora)
    assert {a.dtype for a in jax.tree.leaves(made)} == {jnp.dtype("float32")}


@pytest.mark.parametrize("tied", [False, True])
def test_rows_start_as_the_rows_of_the_table(tied):
    rows = {"embed_tokens": (7, 3), "lm_head": (9, 0, 1)}
    tree = start(config(trainable_token_indices=rows), tied=tied)
    table = base(tied=tied)["model"]["embed_tokens"]["weight"]
    head = table if tied else base()["lm_head"]["weight"]
    embed = tree["model"]["embed_tokens"]["trainable_tokens_delta"]
    equal(embed, table[np.asarray([7, 3])])
    equal(tree["lm_head"]["trainable_tokens_delta"], head[np.asarray([9, 0, 1])])
    both = start(config(trainable_token_indices=(7, 3)), tied=True)
    assert set(both) == {"model"}


def test_a_packed_tensor_cannot_be_trained_in_full():
    lora = config("q_proj", modules_to_save=("layers.0.mlp.up_proj",))
    message = (
        "trains `model.layers.mlp.up_proj.weight` in full, and it is packed in 4 b"
    )
    with pytest.raises(UserError, match=f"{message}.*quantization='none'"):
        start(lora, packed=True)


# --- From the weight itself ---


def factors(tree, name, ranks):
    """(Layer, rank, A, B) of the layers of a module, in float64."""
    node = tree["lm_head"] if name == "lm_head" else projection(tree, name)
    for layer, rank in enumerate(ranks):
        a, b = (dense(node[part]) for part in ("lora_A", "lora_B"))
        a, b = (a, b) if name == "lm_head" else (a[layer], b[layer])
        yield layer, rank, a[:rank], b[:, :rank]


RANKS = {"down_proj": (8, 4, 8), "lm_head": (8,)}
RANK_PATTERN = {"layers.1.mlp.down_proj": 4}


def test_orthogonal_factors_have_no_product():
    fields = dict(rank_pattern=RANK_PATTERN, init_lora_weights="orthogonal")
    tree = start(config(*RANKS, r=8, **fields))
    for name, ranks in RANKS.items():
        for _, rank, a, b in factors(tree, name, ranks):
            # Sums of eight float32 products of order 0.1.
            assert np.abs(b @ a).max() < 1e-6
            assert np.linalg.matrix_rank(a, 1e-4) == rank // 2
            assert np.linalg.matrix_rank(b, 1e-4) == rank // 2
            assert np.abs(a).max() > 0.05 and np.abs(b).max() > 0.05


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_the_best_approximation_of_the_weight(packed, rslora):
    fields = dict(rank_pattern=RANK_PATTERN, init_lora_weights="pissa")
    lora = config(*RANKS, r=8, lora_alpha=3, use_rslora=rslora, **fields)
    tree, frozen = start(lora, packed=packed), base(packed=packed)
    weights = {"lm_head": dense(frozen["lm_head"]["weight"])[None]}
    weights["down_proj"] = dense(projection(frozen, "down_proj")["weight"])
    for name, ranks in RANKS.items():
        for layer, rank, a, b in factors(tree, name, ranks):
            scaling = 3 / (np.sqrt(rank) if rslora else rank)
            weight = weights[name][layer]
            left = np.linalg.norm(weight - scaling * b @ a)
            assert left == pytest.approx(tail(weight, rank), rel=1e-5)
            # Both factors get the same share of each singular value.
            close(a @ a.T, b.T @ b, atol=1e-5)


def original(name):
    """The weights of one projection, before any quantization."""
    return dense(projection(base(), name)["weight"])


def test_pissa_with_few_iterations_is_nearly_as_good():
    errors, trees = {}, {}
    for init in ("pissa_niter_1", "pissa_niter_4", "pissa"):
        lora = config("down_proj", r=8, lora_alpha=8, init_lora_weights=init)
        trees[init] = start(lora)
        _, _, a, b = next(factors(trees[init], "down_proj", (8,)))
        errors[init] = np.linalg.norm(original("down_proj")[0] - b @ a)
        jax.tree.map(equal, start(lora), trees[init])
    # Of a random matrix, whose singular values hardly fall.
    assert errors["pissa"] < errors["pissa_niter_4"] < 1.01 * errors["pissa"]
    assert errors["pissa_niter_4"] < errors["pissa_niter_1"] < 1.1 * errors["pissa"]


def test_olora_is_the_beginning_of_a_qr_decomposition():
    tree = start(config("down_proj", r=8, init_lora_weights="olora"))
    for layer, _, a, b in factors(tree, "down_proj", (8,) * L):
        close(b.T @ b, np.eye(8), atol=1e-6)  # orthonormal
        # The weight's own projection onto those columns, and exact in the first eight.
        weight = original("down_proj")[layer]
        close(b.T @ weight, a, atol=1e-6)
        close((b @ a)[:, :8], weight[:, :8], atol=1e-6)


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora", "loftq"])
def test_a_rank_beyond_that_of_the_weight_is_refused(init):
    lora = config("k_proj", r=K + 1, init_lora_weights=init)
    message = f"'{init}' needs a rank of at most {K} in `model.layers.0.self_attn.k_p"
    with pytest.raises(UserError, match=message):
        start(lora, packed=init == "loftq")


CHANGING = {
    "pissa": config("q_proj", "down_proj", "lm_head", r=8, init_lora_weights="pissa"),
    "niter": config(
        *("q_proj", "up_proj"),
        **dict(r=4, lora_alpha=2, use_rslora=True, init_lora_weights="pissa_niter_2"),
        rank_pattern={"layers.1.mlp.up_proj": 6, "q_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 5},
    ),
    "olora": config(
        *("down_proj", "model.embed_tokens", "model.layers.2.self_attn.v_proj"),
        **dict(r=4, lora_alpha=6, init_lora_weights="olora"),
        rank_pattern={"layers.0.mlp.down_proj": 2, "embed_tokens": 3},
        **dict(layers_to_transform=(0, 1), modules_to_save=("model.norm",)),
    ),
    "tied": config("lm_head", "q_proj", r=4, lora_alpha=3, init_lora_weights="pissa"),
    "shared": config(
        *("lm_head", "q_proj"),
        **dict(r=4, lora_alpha=3, ensure_weight_tying=True, init_lora_weights="olora"),
        alpha_pattern={"lm_head": 5},
    ),
}


def weights(lora, frozen, tree=None):
    """Each adapted weight of a base, with the adapter if given, in float64."""
    added = {} if tree is None else updates(frozen, lora, tree)
    out = {}
    for a in select(frozen, lora).adapted:
        node = reduce(lambda node, key: node.get(key, {}), a.path, frozen)
        table = dense(node.get("weight", frozen["model"]["embed_tokens"]["weight"]))
        if "residual_A" in node:
            table = table - dense(node["residual_B"]) @ dense(node["residual_A"])
        for i, name in enumerate(dotted(a.path, a.layers)):
            update = added.get(name, 0.0)
            if a.kind == "embedding":
                update = np.transpose(update)
            out[name] = (table if a.layers is None else table[i]) + update
    return out


def moved(tree, lora, frozen):
    """Adapters after training: every used number has changed."""
    change = draw(frozen, lora, spread=0.1)
    return jax.tree.map(lambda leaf, step: jnp.asarray(leaf + step), tree, change)


@pytest.mark.parametrize(
    "name, packed",
    [
        *(("pissa", True), ("niter", False), ("olora", True)),
        *(("tied", False), ("shared", False)),
    ],
)
def test_the_start_is_the_base_and_training_is_absorbed(name, packed):
    lora = CHANGING[name]
    old = base(packed=packed, tied=name in ("tied", "shared"))
    fresh = init_adapters(jax.random.key(1), old, lora)
    factored = factor_out(old, fresh, lora)
    assert "residual" not in str(jax.tree.structure(old))  # a copy
    # W - s B0 A0 + s B0 A0, in float32 products of order 0.1.
    plain = weights(lora, old)
    for module, weight in weights(lora, factored, fresh).items():
        close(weight, plain[module], atol=1e-6)

    trained = moved(fresh, lora, old)
    plain_lora, absorbed = absorb(lora, trained, factored)
    assert plain_lora.init_lora_weights == "default" and plain_lora.r == 2 * lora.r
    ranks = {}
    twice = select(old, plain_lora).adapted
    for a, b in zip(select(old, lora).adapted, twice, strict=True):
        assert b.ranks == tuple(2 * rank for rank in a.ranks)
        close(b.scalings, a.scalings, rtol=1e-15)
        ranks |= dict(zip(dotted(a.path, a.layers), a.ranks, strict=True))
    # `bind` inside checks that the arrays are those of the new configuration.
    want, got = weights(lora, factored, trained), weights(plain_lora, old, absorbed)
    assert set(got) == set(want)
    for module, weight in got.items():
        close(weight, want[module], atol=1e-6)
        assert (np.abs(weight - plain[module]).max() > 1e-2) == (ranks[module] > 0)
    if name == "olora":
        equal(absorbed["model"]["norm"]["weight"], trained["model"]["norm"]["weight"])


@pytest.mark.parametrize("packed", [False, True])
def test_a_factored_model_computes_the_base(packed):
    lora, old = CHANGING["pissa"], base(packed=packed)
    plain = logits(CONFIG, old)
    fresh = init_adapters(jax.random.key(1), old, lora)
    factored = factor_out(old, fresh, lora)
    # Float32 sums of 96 terms, in another order; logits of order one.
    near = partial(close, atol=2e-5)
    near(logits(CONFIG, factored, bind(fresh, factored, lora)), plain)
    trained = moved(fresh, lora, old)
    got = logits(CONFIG, factored, bind(trained, factored, lora))
    assert np.abs(got - plain).max() > 0.1
    plain_lora, absorbed = absorb(lora, trained, factored)
    near(logits(CONFIG, old, bind(absorbed, old, plain_lora)), got)


def test_absorb_keeps_plain_adapters_and_refuses_a_plain_base():
    lora = config("q_proj", r=4)
    tree = start(lora)
    same, again = absorb(lora, tree, base())
    assert same is lora
    jax.tree.map(equal, again, tree)
    lora = config("q_proj", r=4, init_lora_weights="pissa")
    with pytest.raises(UserError, match="has nothing factored out. Give the base that"):
        absorb(lora, start(lora), base())


# --- LoftQ ---


def unquantized(key):
    """Hugging Face key -> tensor."""
    path, layer = parse_key(key)
    return np.asarray(at(base(), path))[layer]


def test_loftq_is_the_best_approximation_of_the_quantization_error():
    ranks = {"layers.1.mlp.down_proj": 16}
    fields = dict(rank_pattern=ranks, init_lora_weights="loftq")
    lora = config("q_proj", "down_proj", r=8, lora_alpha=4, **fields)
    old = base(packed=True)
    tree = init_adapters(jax.random.key(0), old, lora, original=unquantized)
    got, packed = weights(lora, old, tree), weights(lora, old)
    assert len(got) == 2 * L
    for module, weight in got.items():
        want = dense(unquantized(f"{module}.weight"))
        lost = want - packed[module]
        left = np.linalg.norm(want - weight)
        rank = 16 if module.endswith("1.mlp.down_proj") else 8
        assert left == pytest.approx(tail(lost, rank), rel=1e-5)
        assert left < 0.9 * np.linalg.norm(lost)


@pytest.mark.parametrize(
    "names, packed, original, message",
    [
        (
            ("q_proj",),
            False,
            unquantized,
            "`model.layers.0.self_attn.q_proj.weight` is n",
        ),
        (("q_proj",), True, None, "'loftq' needs the unquantized weights as well"),
        (("q_proj", "lm_head"), True, unquantized, "`lm_head.weight` is not quantized"),
    ],
)
def test_loftq_needs_a_packed_base_and_the_original_weights(
    names, packed, original, message
):
    lora = config(*names, init_lora_weights="loftq", r=4)
    with pytest.raises(UserError, match=message):
        init_adapters(jax.random.key(0), base(packed=packed), lora, original=original)
