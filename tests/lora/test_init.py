"""How adapters start, and how those that start from the weight go back to it."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.init import absorb, factor_out, init_adapters
from qlora_jax.lora.targets import select
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.tree import PROJECTIONS, at, dotted, parse_key
from tests.lora.reference import CONFIG, D, F, K, L, V, draw, random_base

base = random_base


def original(name):
    """The weights of one projection, before any quantization."""
    return np.asarray(projection(base(), name)["weight"])


def config(*targets, **fields):
    return LoraConfig(target_modules=targets or ("q_proj",), **fields)


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


# --- Default and gaussian ---


@pytest.mark.parametrize("packed", [False, True])
def test_fresh_adapters_have_the_shapes_of_their_modules_and_b_is_zero(packed):
    lora = config("q_proj", "down_proj", "lm_head", r=4, lora_bias=True)
    tree = start(lora, packed=packed)
    down = projection(tree, "down_proj")
    assert down["lora_A"].shape == (L, 4, F) and down["lora_B"].shape == (L, D, 4)
    assert down["lora_bias"].shape == (L, D)
    assert tree["lm_head"]["lora_A"].shape == (4, D)
    assert tree["lm_head"]["lora_B"].shape == (V, 4)
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        assert leaf.dtype == jnp.float32
        assert bool(jnp.any(leaf)) == ("lora_A" in str(path[-1]))
    assert len(jax.tree.leaves(tree)) == 3 * 3


def test_a_is_uniform_up_to_one_over_the_root_of_its_inputs():
    a = np.asarray(projection(start(config("down_proj", r=64)), "down_proj")["lora_A"])
    bound = 1 / np.sqrt(F)
    assert np.abs(a).max() <= bound and np.abs(a).max() > 0.999 * bound
    # 18,432 draws: mean and deviation within five standard errors.
    assert abs(a.mean()) < 5 * bound / np.sqrt(3 * a.size)
    assert abs(a.std() / (bound / np.sqrt(3)) - 1) < 5 * 0.45 / np.sqrt(a.size)


def test_gaussian_is_normal_with_deviation_one_over_the_rank_of_the_layer():
    lora = config(
        "down_proj",
        r=64,
        rank_pattern={"layers.1.mlp.down_proj": 16},
        init_lora_weights="gaussian",
    )
    a = np.asarray(projection(start(lora), "down_proj")["lora_A"])
    for layer, rank in enumerate((64, 16, 64)):
        one = a[layer, :rank]
        assert abs(one.mean()) < 5 / rank / np.sqrt(one.size)
        assert abs(one.std() * rank - 1) < 5 * 0.71 / np.sqrt(one.size)
        assert np.abs(one).max() > 3 / rank  # it has tails
        assert not a[layer, rank:].any()
    assert not np.asarray(projection(start(lora), "down_proj")["lora_B"]).any()


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa"])
@pytest.mark.parametrize("tied", [False, True])
def test_an_embedding_starts_with_a_of_zero_and_b_normal(init, tied):
    lora = config(
        "embed_tokens", r=32, init_lora_weights=init, ensure_weight_tying=tied
    )
    tree = start(lora, tied=tied)
    embed = tree["model"]["embed_tokens"]
    assert embed["lora_embedding_A"].shape == (32, V)
    assert not embed["lora_embedding_A"].any()
    b = np.asarray(embed["lora_embedding_B"])
    assert b.shape == (D, 32)
    # 2,048 draws: five standard errors.
    assert abs(b.mean()) < 5 / np.sqrt(b.size)
    assert abs(b.std() - 1) < 5 * 0.71 / np.sqrt(b.size)
    assert set(tree) == {"model"}  # a tied head has no arrays


@pytest.mark.parametrize("init", ["default", "gaussian", "orthogonal", "pissa"])
def test_ranks_and_layers_that_are_not_used_are_zero(init):
    lora = config(
        *("q_proj", "up_proj"),
        r=4,
        rank_pattern={"layers.2.self_attn.q_proj": 2, "up_proj": 6},
        layers_to_transform=(1, 2),
        init_lora_weights=init,
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
    few = config("q_proj", "k_proj", r=4)
    many = config("q_proj", "k_proj", "v_proj", "o_proj", r=4)
    one = start(few, key=3)["model"]["layers"]["self_attn"]
    other = start(many, key=3)["model"]["layers"]
    a = {name: np.asarray(node["lora_A"]) for name, node in one.items()}
    np.testing.assert_array_equal(a["q_proj"], other["self_attn"]["q_proj"]["lora_A"])
    np.testing.assert_array_equal(a["k_proj"], other["self_attn"]["k_proj"]["lora_A"])
    assert not np.array_equal(a["q_proj"], a["k_proj"])
    assert not np.array_equal(a["q_proj"][0], a["q_proj"][1])
    again = start(few, key=3)["model"]["layers"]["self_attn"]
    jax.tree.map(np.testing.assert_array_equal, one, again)
    elsewhere = projection(start(few, key=4), "q_proj")["lora_A"]
    assert not np.array_equal(a["q_proj"], elsewhere)
    # The other parts of a module do not change its factors either.
    dora = config("q_proj", r=4, use_dora=True, bias="all", modules_to_save=("norm",))
    np.testing.assert_array_equal(
        projection(start(dora, key=3), "q_proj")["lora_A"], a["q_proj"]
    )


def test_shapes_are_enough_and_init_works_under_jit():
    abstract = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base()
    )
    lora = config("q_proj", "embed_tokens", r=4)
    make = functools.partial(init_adapters, base=abstract, lora=lora)
    traced = jax.eval_shape(make, jax.random.key(0))
    made = start(lora)
    assert jax.tree.map(lambda a: a.shape, traced) == jax.tree.map(
        lambda a: a.shape, made
    )
    jitted = jax.jit(functools.partial(make, lora=config("q_proj", r=4)))
    jax.tree.map(
        np.testing.assert_array_equal,
        jitted(jax.random.key(0)),
        start(config("q_proj", r=4)),
    )


def test_targets_that_match_nothing_are_refused():
    with pytest.raises(UserError, match=re.escape("`target_modules`=('wq',) matches")):
        start(config("wq"))


# --- What is copied and measured ---


@pytest.mark.parametrize("packed", [False, True])
def test_magnitudes_start_as_the_norms_of_the_weight(packed):
    lora = config(
        *("up_proj", "embed_tokens", "lm_head", "k_proj"),
        use_dora=True,
        exclude_modules=("layers.1.self_attn.k_proj",),
    )
    tree = start(lora, packed=packed)
    frozen = base(packed=packed)
    up = np.linalg.norm(dense(projection(frozen, "up_proj")["weight"]), axis=-1)
    # A float32 sum of 64 squares.
    close = functools.partial(np.testing.assert_allclose, rtol=1e-6)
    close(projection(tree, "up_proj")["lora_magnitude_vector"], up)
    table = dense(frozen["model"]["embed_tokens"]["weight"])
    embed = tree["model"]["embed_tokens"]["lora_magnitude_vector"]
    close(embed, np.linalg.norm(table, axis=0))  # of the columns
    head = np.linalg.norm(dense(frozen["lm_head"]["weight"]), axis=1)
    close(tree["lm_head"]["lora_magnitude_vector"], head)
    k = np.asarray(projection(tree, "k_proj")["lora_magnitude_vector"])
    assert k[0].all() and k[2].all() and not k[1].any()


@pytest.mark.parametrize("ensure", [False, True])
def test_a_tied_head_has_magnitudes_of_its_own(ensure):
    lora = config("lm_head", use_dora=True, ensure_weight_tying=ensure)
    tree = start(lora, tied=True)
    table = dense(base(tied=True)["model"]["embed_tokens"]["weight"])
    norms = np.linalg.norm(table, axis=1)
    np.testing.assert_allclose(
        tree["lm_head"]["lora_magnitude_vector"], norms, rtol=1e-6
    )
    assert set(tree["lm_head"]) - {"lora_magnitude_vector"} == (
        set() if ensure else {"lora_A", "lora_B"}
    )


def test_tensors_trained_in_full_start_as_the_base():
    lora = config(
        "q_proj",
        modules_to_save=("model.norm", "layers.1.mlp.up_proj", "lm_head"),
        bias="lora_only",
    )
    tree, frozen = start(lora, biases=True), base(biases=True)
    equal = np.testing.assert_array_equal
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
    np.testing.assert_array_equal(embed, table[np.asarray([7, 3])])
    np.testing.assert_array_equal(
        tree["lm_head"]["trainable_tokens_delta"], head[np.asarray([9, 0, 1])]
    )
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


def test_orthogonal_factors_have_no_product():
    lora = config(
        *("down_proj", "lm_head"),
        r=8,
        rank_pattern={"layers.1.mlp.down_proj": 4},
        init_lora_weights="orthogonal",
    )
    tree = start(lora)
    head = tree["lm_head"]
    down = projection(tree, "down_proj")
    pairs = [(head["lora_A"], head["lora_B"], 8)]
    pairs += [(down["lora_A"][i], down["lora_B"][i], (8, 4, 8)[i]) for i in range(L)]
    for a, b, rank in pairs:
        a, b = dense(a), dense(b)
        # Sums of eight float32 products of order 0.1.
        assert np.abs(b @ a).max() < 1e-6
        assert np.linalg.matrix_rank(a, 1e-4) == np.linalg.matrix_rank(b, 1e-4)
        assert np.linalg.matrix_rank(a, 1e-4) == rank // 2
        assert np.abs(a).max() > 0.05 and np.abs(b).max() > 0.05


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rslora", [False, True])
def test_pissa_is_the_best_approximation_of_the_weight(packed, rslora):
    lora = config(
        *("down_proj", "lm_head"),
        r=8,
        lora_alpha=3,
        use_rslora=rslora,
        rank_pattern={"layers.1.mlp.down_proj": 4},
        init_lora_weights="pissa",
    )
    tree, frozen = start(lora, packed=packed), base(packed=packed)
    down, weights = projection(tree, "down_proj"), projection(frozen, "down_proj")
    triples = [(tree["lm_head"], dense(frozen["lm_head"]["weight"]), 8)]
    for i, rank in enumerate((8, 4, 8)):
        layer = {name: leaf[i] for name, leaf in down.items()}
        triples.append((layer, dense(weights["weight"])[i], rank))
    for node, weight, rank in triples:
        scaling = 3 / (np.sqrt(rank) if rslora else rank)
        a, b = dense(node["lora_A"])[:rank], dense(node["lora_B"])[:, :rank]
        left = np.linalg.norm(weight - scaling * b @ a)
        assert left == pytest.approx(tail(weight, rank), rel=1e-5)
        # Both factors get the same share of each singular value.
        np.testing.assert_allclose(a @ a.T, b.T @ b, atol=1e-5)


def test_pissa_with_few_iterations_is_nearly_as_good():
    weight = original("down_proj")[0].astype(np.float64)
    errors = {}
    for init in ("pissa_niter_1", "pissa_niter_4", "pissa"):
        lora = config("down_proj", r=8, lora_alpha=8, init_lora_weights=init)
        node = projection(start(lora), "down_proj")
        product = dense(node["lora_B"][0]) @ dense(node["lora_A"][0])
        errors[init] = np.linalg.norm(weight - product)
    # Of a random matrix, whose singular values hardly fall.
    assert errors["pissa"] < errors["pissa_niter_4"] < 1.01 * errors["pissa"]
    assert errors["pissa_niter_4"] < errors["pissa_niter_1"] < 1.1 * errors["pissa"]
    same = config("down_proj", r=8, lora_alpha=8, init_lora_weights="pissa_niter_4")
    jax.tree.map(np.testing.assert_array_equal, start(same), start(same))


def test_olora_is_the_beginning_of_a_qr_decomposition():
    lora = config("down_proj", r=8, init_lora_weights="olora")
    node = projection(start(lora), "down_proj")
    for i in range(L):
        a, b = dense(node["lora_A"][i]), dense(node["lora_B"][i])
        np.testing.assert_allclose(b.T @ b, np.eye(8), atol=1e-6)  # orthonormal
        # The weight's own projection onto those columns, and exact in the first eight.
        weight = dense(original("down_proj")[i])
        np.testing.assert_allclose(b.T @ weight, a, atol=1e-6)
        np.testing.assert_allclose((b @ a)[:, :8], weight[:, :8], atol=1e-6)


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
        r=4,
        lora_alpha=2,
        rank_pattern={"layers.1.mlp.up_proj": 6, "q_proj": 2},
        alpha_pattern={"layers.0.self_attn.q_proj": 5},
        use_rslora=True,
        init_lora_weights="pissa_niter_2",
    ),
    "olora": config(
        *("down_proj", "model.embed_tokens", "model.layers.2.self_attn.v_proj"),
        r=4,
        lora_alpha=6,
        rank_pattern={"layers.0.mlp.down_proj": 2, "embed_tokens": 3},
        layers_to_transform=(0, 1),
        modules_to_save=("model.norm",),
        init_lora_weights="olora",
    ),
    "tied": config(
        *("lm_head", "q_proj"), r=4, lora_alpha=3, init_lora_weights="pissa"
    ),
    "shared": config(
        *("lm_head", "q_proj"),
        r=4,
        lora_alpha=3,
        ensure_weight_tying=True,
        alpha_pattern={"lm_head": 5},
        init_lora_weights="olora",
    ),
}


def weights(lora, tree, frozen):
    """What each adapted weight is in the end, layer by layer, in float64."""
    out = {}
    for a in select(frozen, lora).adapted:
        node, old = bind(tree, frozen, lora), frozen
        for part in a.path:
            node, old = node[part], old.get(part, {})
        table = old.get("weight", frozen["model"]["embed_tokens"]["weight"])
        names = ("A", "B") if a.kind == "linear" else ("embedding_A", "embedding_B")
        for i, name in enumerate(dotted(a.path, a.layers)):
            at = () if a.layers is None else i
            one, two = (dense(node[f"lora_{n}"])[at] for n in names)
            update = a.scalings[i] * (two @ one)
            weight = dense(table)[at]
            weight = weight + (update if a.kind == "linear" else update.T)
            if "residual_A" in old:
                out_of = dense(old["residual_B"])[at] @ dense(old["residual_A"])[at]
                weight = weight - out_of
            out[name] = weight
    return out


def moved(tree, lora, frozen):
    """Adapters after training: every used number has changed."""
    change = draw(frozen, lora, spread=0.1)
    return jax.tree.map(lambda leaf, step: jnp.asarray(leaf + step), tree, change)


@pytest.mark.parametrize(
    "name, packed",
    [
        ("pissa", True),
        ("niter", False),
        ("olora", True),
        ("tied", False),
        ("shared", False),
    ],
)
def test_the_start_is_the_base_and_training_is_absorbed(name, packed):
    lora = CHANGING[name]
    old = base(packed=packed, tied=name in ("tied", "shared"))
    fresh = init_adapters(jax.random.key(1), old, lora)
    factored = factor_out(old, fresh, lora)
    assert "residual" not in str(jax.tree.structure(old))  # a copy
    # W - s B0 A0 + s B0 A0, in float32 products of order 0.1.
    plain = {}
    for a in select(old, lora).adapted:
        node = old
        for part in a.path:
            node = node.get(part, {})
        weight = dense(node.get("weight", old["model"]["embed_tokens"]["weight"]))
        for i, module in enumerate(dotted(a.path, a.layers)):
            plain[module] = weight if a.layers is None else weight[i]
    for module, weight in weights(lora, fresh, factored).items():
        np.testing.assert_allclose(weight, plain[module], atol=1e-6)

    trained = moved(fresh, lora, old)
    plain_lora, absorbed = absorb(lora, trained, factored)
    assert plain_lora.init_lora_weights == "default" and plain_lora.r == 2 * lora.r
    twice = select(old, plain_lora).adapted
    for a, b in zip(select(old, lora).adapted, twice, strict=True):
        assert b.ranks == tuple(2 * rank for rank in a.ranks)
        np.testing.assert_allclose(b.scalings, a.scalings, rtol=1e-15)
    # `bind` inside checks that the arrays are those of the new configuration.
    want, got = weights(lora, trained, factored), weights(plain_lora, absorbed, old)
    assert set(got) == set(want)
    ranks = {
        module: rank
        for a in twice
        for module, rank in zip(dotted(a.path, a.layers), a.ranks, strict=True)
    }
    for module, weight in got.items():
        np.testing.assert_allclose(weight, want[module], atol=1e-6)
        assert (np.abs(weight - plain[module]).max() > 1e-2) == (ranks[module] > 0)
    if name == "olora":
        norm = absorbed["model"]["norm"]["weight"]
        np.testing.assert_array_equal(norm, trained["model"]["norm"]["weight"])


@functools.partial(jax.jit, static_argnames="model")
def logits(model, variables, tokens):
    return model.apply(variables, tokens)


@pytest.mark.parametrize("packed", [False, True])
def test_a_factored_model_computes_the_base(packed):
    lora, old = CHANGING["pissa"], base(packed=packed)
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    model = Llama(CONFIG, Compute("float32"))
    plain = logits(model, {"params": old}, tokens)
    fresh = init_adapters(jax.random.key(1), old, lora)
    factored = factor_out(old, fresh, lora)
    run = functools.partial(logits, model, tokens=tokens)
    # Float32 sums of 96 terms, in another order; logits of order one.
    close = functools.partial(np.testing.assert_allclose, atol=2e-5)
    close(run({"params": factored, "lora": bind(fresh, factored, lora)}), plain)
    trained = moved(fresh, lora, old)
    got = run({"params": factored, "lora": bind(trained, factored, lora)})
    assert np.abs(got - plain).max() > 0.1
    plain_lora, absorbed = absorb(lora, trained, factored)
    close(run({"params": old, "lora": bind(absorbed, old, plain_lora)}), got)


def test_absorb_keeps_plain_adapters_and_refuses_a_plain_base():
    lora = config("q_proj", r=4)
    tree = start(lora)
    same, again = absorb(lora, tree, base())
    assert same is lora
    jax.tree.map(np.testing.assert_array_equal, again, tree)
    lora = config("q_proj", r=4, init_lora_weights="pissa")
    with pytest.raises(
        UserError, match=r"has nothing factored out. Give the base that"
    ):
        absorb(lora, start(lora), base())


# --- LoftQ ---


def unquantized(key):
    """Hugging Face key -> tensor."""
    path, layer = parse_key(key)
    return np.asarray(at(base(), path))[layer]


def test_loftq_is_the_best_approximation_of_the_quantization_error():
    lora = config(
        *("q_proj", "down_proj"),
        r=8,
        lora_alpha=4,
        rank_pattern={"layers.1.mlp.down_proj": 16},
        init_lora_weights="loftq",
    )
    old = base(packed=True)
    tree = init_adapters(jax.random.key(0), old, lora, original=unquantized)
    got = weights(lora, tree, old)
    for name in ("q_proj", "down_proj"):
        packed = dense(projection(old, name)["weight"])
        for i in range(L):
            rank = 16 if (name, i) == ("down_proj", 1) else 8
            module = next(m for m in got if f".{i}." in m and m.endswith(name))
            want = dense(original(name)[i])
            lost = want - packed[i]
            left = np.linalg.norm(want - got[module])
            assert left == pytest.approx(tail(lost, rank), rel=1e-5)
            assert left < 0.9 * np.linalg.norm(lost)


def test_loftq_needs_a_packed_base_and_the_original_weights():
    lora = config("q_proj", init_lora_weights="loftq", r=4)
    with pytest.raises(
        UserError, match="`model.layers.0.self_attn.q_proj.weight` is n"
    ):
        init_adapters(jax.random.key(0), base(), lora, original=unquantized)
    with pytest.raises(
        UserError, match="'loftq' needs the unquantized weights as well"
    ):
        init_adapters(jax.random.key(0), base(packed=True), lora)
    head = config("q_proj", "lm_head", init_lora_weights="loftq", r=4)
    with pytest.raises(UserError, match="`lm_head.weight` is not quantized"):
        init_adapters(jax.random.key(0), base(packed=True), head, original=unquantized)
