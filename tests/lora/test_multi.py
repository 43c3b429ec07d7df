"""Several adapters in one batch."""

import dataclasses
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.errors import UserError
from qlora_jax.inference.decode import generate_tokens
from qlora_jax.lora.combine import combine_adapters
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind, delta
from qlora_jax.lora.multi import stack_adapters, with_rows
from qlora_jax.lora.targets import select
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.runs.loading import load
from qlora_jax.tree import HEAD
from tests.lora.reference import HEADS, LOGITS, LORAS, ROWS, TOKENS, draw, logits


def drawn(base, *loras):
    """(configuration, tree) of each, with different numbers."""
    loras = [LORAS.get(lora, lora) if isinstance(lora, str) else lora for lora in loras]
    return [(lora, draw(base, lora, seed)) for seed, lora in enumerate(loras)]


def by_row(config, base, parts, rows, dtype="float32", tokens=TOKENS):
    """Logits of each row computed without a stack."""
    for i, row in enumerate(rows):
        bound = None if row < 0 else bind(parts[row][1], base, parts[row][0])
        yield logits(config, base, bound, tokens[i : i + 1], dtype)[0]


def test_parts_of_another_form_are_refused(models):
    base = models[False][1]
    lora = LORAS["one layer"]
    tree = draw(base, lora)
    pairs, triples = r"\(configuration, trained tree\)", "trained tree, weight"
    with pytest.raises(UserError, match=rf"{pairs}.* got \(tree, configuration\)"):
        stack_adapters([(tree, lora)], base)
    with pytest.raises(UserError, match=rf"{pairs}, got tree"):
        stack_adapters(tree, base)
    with pytest.raises(UserError, match="adapter 1: .* got configuration"):
        stack_adapters([(lora, tree), lora], base)
    with pytest.raises(UserError, match=rf"{triples}.*\(configuration, tree\)"):
        combine_adapters([(lora, tree)], base)
    with pytest.raises(UserError, match=rf"{triples}.*\(float, configuration, tree"):
        combine_adapters([(0.5, lora, tree)], base)
    with pytest.raises(UserError, match="must be a list of .*got configuration"):
        combine_adapters(lora, base)


# --- Stacks ---

STACKS = {
    "different": ("plain", "rslora", "patterns", "one layer"),
    "tables": ("tables", "one layer", "patterns"),
    "same": ("plain", "plain"),
}


@pytest.mark.parametrize(
    "names, tied",
    [(STACKS["different"], False), (STACKS["tables"], True), (STACKS["same"], False)],
    ids=STACKS,
)
def test_every_row_is_computed_with_its_own_adapter(models, names, tied):
    config, base = models[tied]
    parts = drawn(base, *names)
    rows = [1, -1, 0, len(parts) - 1]
    got = logits(config, base, with_rows(stack_adapters(parts, base), rows))
    want = by_row(config, base, parts, rows)
    np.testing.assert_allclose(got, [*want], atol=LOGITS)
    assert np.abs(got[0] - logits(config, base)[0]).max() > 1000 * LOGITS


def test_a_tied_adapter_and_biases_of_b_go_into_a_stack(models):
    config, base = models[True]
    loras = [
        LoraConfig(
            r=2,
            target_modules=("embed_tokens",),
            alpha_pattern={"lm_head": 5},
            ensure_weight_tying=True,
        ),
        LoraConfig(
            r=3, lora_alpha=2, lora_bias=True, target_modules=("lm_head", "q_proj")
        ),
    ]
    parts, rows = drawn(base, *loras), [0, 1, -1, 1]
    got = logits(config, base, with_rows(stack_adapters(parts, base), rows))
    want = by_row(config, base, parts, rows)
    np.testing.assert_allclose(got, [*want], atol=LOGITS)


def test_the_stack_has_an_axis_of_adapters(models):
    _, base = models[False]
    parts = drawn(base, "patterns", "one layer", "tables")
    stack = with_rows(stack_adapters(parts, base), [2, 0])
    attention = stack["model"]["layers"]["self_attn"]
    assert attention["o_proj"]["lora_A"].shape == (2, 3, 2, 64)
    assert attention["o_proj"]["scaling"].tolist() == [[0, 0, 0], [0, 3.5, 0]]
    assert attention["o_proj"]["rows"].tolist() == [[2, 0], [2, 0]]
    assert stack["lm_head"]["lora_B"].shape == (3, 32, 3)
    assert stack["lm_head"]["scaling"].tolist() == [0.75, 0, np.float32(2 / 3)]
    assert stack["lm_head"]["rows"].tolist() == [2, 0]
    table = stack["model"]["embed_tokens"]
    assert table["lora_embedding_A"].shape == (3, 3, 32)
    assert "lora_bias" not in attention["o_proj"]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_without_an_adapter_is_the_base_to_the_bit(models, dtype):
    config, base = models[False]
    lora = LORAS["tables"]
    # Even of an adapter of infinities: 0 times infinity is NaN.
    tree = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), draw(base, lora))
    stack = with_rows(stack_adapters([(lora, tree)], base), [-1] * 4)
    got, want = (logits(config, base, x, dtype=dtype) for x in (stack, None))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
def test_rows_differ_on_a_packed_base_too(llama_dir, quantization):
    config, base = convert.load_llama(llama_dir, quantization=quantization)
    base = jax.tree.map(jnp.asarray, base)
    parts, rows = drawn(base, "plain", "plain"), [1, 0, -1, 1]
    got = logits(config, base, with_rows(stack_adapters(parts, base), rows))
    want = by_row(config, base, parts, rows)
    np.testing.assert_allclose(got, [*want], atol=LOGITS)


def test_bf16_rows_are_as_near_as_bf16_allows(models):
    config, base = models[False]
    parts, rows = drawn(base, "plain", "tables"), [0, 1, 1, 0]
    stack = with_rows(stack_adapters(parts, base), rows)
    got = logits(config, base, stack, dtype="bfloat16")
    narrow = by_row(config, base, parts, rows, dtype="bfloat16")
    exact = by_row(config, base, parts, rows)
    for row, single, want in zip(got, narrow, exact, strict=True):
        # No further from the float32 result than twice what bf16 is without a stack.
        assert np.abs(row - want).max() <= 2 * np.abs(single - want).max()


def test_generation_is_that_of_each_row_alone(models):
    config, base = models[True]
    parts = drawn(base, "tables", "plain")
    stack = stack_adapters(parts, base)
    model = Llama(config, Compute("float32"))
    prompts, rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3]], [1, 0, 1, -1]

    def generate(prompts, lora, **settings):
        variables = {"params": base} if lora is None else {"params": base, "lora": lora}
        return generate_tokens(model, variables, prompts, max_new_tokens=8, **settings)

    together = generate(prompts, with_rows(stack, rows))
    for prompt, row, got in zip(prompts, rows, together, strict=True):
        bound = None if row < 0 else bind(parts[row][1], base, parts[row][0])
        assert got == generate([prompt], bound)[0]
    assert together[0] != together[3]  # one prompt, with and without an adapter


# --- What is compiled ---


@contextmanager
def compilations():
    """Records every compilation inside."""
    durations = []

    def listen(event, duration, **_):
        if event.endswith("backend_compile_duration"):
            durations.append(duration)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        yield durations
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_other_rows_and_other_adapters_of_equal_shapes_compile_nothing(models):
    config, base = models[False]
    lora = LORAS["tables"]
    first = stack_adapters([(lora, draw(base, lora, i)) for i in range(2)], base)
    other = dataclasses.replace(lora, lora_alpha=11)
    second = stack_adapters([(other, draw(base, lora, i)) for i in (5, 6)], base)
    run = jax.jit(Llama(config, Compute("float32")).apply)
    tokens = jnp.asarray(TOKENS)
    with compilations() as compiled:
        one = run({"params": base, "lora": with_rows(first, [0, 1, -1, 0])}, tokens)
    assert compiled  # it does count
    with compilations() as compiled:
        two = run({"params": base, "lora": with_rows(first, [1, 1, 0, -1])}, tokens)
        three = run({"params": base, "lora": with_rows(second, [0, 1, -1, 0])}, tokens)
    assert not compiled and run._cache_size() == 1
    assert (one != two).any() and (one != three).any()


def test_rows_may_be_an_argument_of_what_is_compiled(models):
    config, base = models[False]
    stack = stack_adapters(drawn(base, "plain", "plain"), base)
    model, tokens = Llama(config, Compute("float32")), jnp.asarray(TOKENS)

    @jax.jit
    def run(rows):
        return model.apply({"params": base, "lora": with_rows(stack, rows)}, tokens)

    for rows in ([0, 1, -1, 0], [1, 1, 1, -1]):
        got = run(jnp.asarray(rows))
        want = logits(config, base, with_rows(stack, rows))
        np.testing.assert_allclose(got, want, atol=LOGITS)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=2, target_modules="all-linear"),
        dataclasses.replace(LORAS["tables"], ensure_weight_tying=True, use_dora=True),
    ],
    ids=["plain", "everything"],
)
def test_a_model_changes_its_adapter_without_compiling_anything(shared_data, lora):
    model = load(shared_data / "stories260K", quantization=None, dtype="float32")
    tokens = jnp.asarray([[1, 403, 407, 261, 378]], jnp.int32)

    def ask(lora_alpha, seed):
        scaled = dataclasses.replace(lora, lora_alpha=lora_alpha)
        tree = jax.tree.map(jnp.asarray, draw(model.base, scaled, seed, spread=0.5))
        adapted = dataclasses.replace(model, adapters=tree, lora_config=scaled)
        with compilations() as compiled:
            logits = adapted.logits(tokens)
            texts = adapted.generate(["Once upon a"], max_new_tokens=12)
        return np.asarray(logits), texts, len(compiled)

    logits, texts, compiled = ask(3, 0)
    assert compiled
    again, other_texts, compiled = ask(7.5, 1)
    assert compiled == 0
    assert (logits != again).any() and texts != other_texts
    same, same_texts, _ = ask(3, 0)
    assert (logits == same).all() and texts == same_texts


# --- Errors of stacks ---


def test_parts_that_cannot_differ_by_row_are_refused(models):
    _, base = models[False]
    for lora, message in (
        (dataclasses.replace(HEADS, use_dora=True), "adapter 1: `use_dora` rescales"),
        (HEADS, r"adapter 1: `lm_head.weight` replaces a tensor of the base"),
        (ROWS, r"adapter 1: `model.embed_tokens.trainable_tokens_delta` replaces"),
        (LoraConfig(r=2, init_lora_weights="pissa"), "adapter 1: .*'pissa'.*absorb"),
    ):
        with pytest.raises(UserError, match=message):
            stack_adapters(drawn(base, "plain", lora), base)
    with pytest.raises(UserError, match="at least one adapter, got none"):
        stack_adapters([], base)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([0, 2], r"`rows` has 2, and the stack has 2 adapters \(0 to 1; -1 for none\)"),
        ([0, -2], "`rows` has -2"),
        ([0.0, 1.0], "list of integers, .* got float32"),
        ([[0, 1]], r"one for each row of the batch, got int32 of shape \[1, 2\]"),
    ],
)
def test_unusable_rows_are_refused(models, rows, message):
    _, base = models[False]
    lora = LORAS["tables"]
    stack = stack_adapters([(lora, draw(base, lora))] * 2, base)
    with pytest.raises(UserError, match=message):
        with_rows(stack, np.asarray(rows))


def test_a_tree_that_is_not_a_stack_is_refused(models):
    _, base = models[False]
    for name in ("plain", "tables"):
        bound = bind(draw(base, LORAS[name]), base, LORAS[name])
        with pytest.raises(UserError, match="has one adapter, not a stack"):
            with_rows(bound, [0])


def test_a_stack_without_rows_and_rows_of_another_batch_are_refused(models):
    config, base = models[False]
    for name in ("plain", "tables"):
        lora = LORAS[name]
        stack = stack_adapters([(lora, draw(base, lora))], base)
        message = r"stack of 1 adapters without row indices.*`with_rows\(stack, rows\)`"
        with pytest.raises(UserError, match=message):
            logits(config, base, stack)
        message = r"adapters of 3 rows, and the batch has the shape \[4, 9"
        with pytest.raises(UserError, match=message):
            logits(config, base, with_rows(stack, [0, 0, 0]))


def test_a_layer_of_another_shape_has_rows_too():
    rng = np.random.default_rng(0)
    draw = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    stack = {"lora_A": draw(2, 3, 8), "lora_B": draw(2, 5, 3)}
    x, scaling = draw(4, 2, 6, 8), jnp.asarray([0.5, 2.0])
    rows = jnp.asarray([1, 0, -1, 1])
    got = delta(x, {**stack, "rows": rows}, scaling)
    for i, row in enumerate(rows.tolist()):
        one = {name: array[row] for name, array in stack.items()}
        want = delta(x[i], one, scaling[row]) if row >= 0 else 0 * got[i]
        np.testing.assert_allclose(got[i], want, atol=1e-5)


# --- Real adapters ---


def test_a_trained_adapter_and_its_base_in_one_batch(shared_data):
    config, base = convert.load_llama(shared_data / "stories260K", quantization=None)
    path = shared_data / "adapters/stories260K-lora-r8-shakespeare"
    lora, tree = convert.load_adapter(path, base)
    half, tree_half = combine_adapters([(lora, tree, 0.5)], base)
    twice = combine_adapters([(half, tree_half, 1.0)] * 2, base)
    base = jax.tree.map(jnp.asarray, base)
    stack = stack_adapters([(lora, tree), twice, (half, tree_half)], base)
    tokens = np.tile(np.asarray([[1, 403, 407, 261, 378, 300]], np.int32), (4, 1))
    got = np.asarray(logits(config, base, with_rows(stack, [-1, 0, 1, 2]), tokens))
    plain = logits(config, base, None, tokens[:1])
    adapted = logits(config, base, bind(tree, base, lora), tokens[:1])
    # These logits reach 13; as close as stored outputs of other libraries are held to.
    close = 3e-5
    np.testing.assert_allclose(got[0], plain[0], atol=close)
    np.testing.assert_allclose(got[1], adapted[0], atol=close)
    np.testing.assert_allclose(got[2], adapted[0], atol=close)
    assert np.abs(got[3] - got[1]).max() > 100 * LOGITS
    assert HEAD not in select(base, lora).shapes()
