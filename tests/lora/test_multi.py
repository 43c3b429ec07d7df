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
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.runs.loading import load
from tests.lora.reference import LOGITS, LORAS, TOKENS, config, draw, logits

replace = dataclasses.replace
TABLES, HEADS = LORAS["tables"], LORAS["heads"]


def drawn(base, *loras):
    """(Configuration, tree) of each, with different numbers."""
    loras = [LORAS[lora] if isinstance(lora, str) else lora for lora in loras]
    return [(lora, draw(base, lora, seed)) for seed, lora in enumerate(loras)]


def alone(base, parts, row):
    """The "lora" collection of one row without a stack."""
    return None if row < 0 else bind(parts[row][1], base, parts[row][0])


def by_row(llama, base, parts, rows, dtype="float32"):
    """Logits of each row computed without a stack."""
    for i, row in enumerate(rows):
        bound = alone(base, parts, row)
        yield logits(llama, base, bound, TOKENS[i : i + 1], dtype)[0]


def assert_rows_are_those_alone(llama, base, parts, rows):
    got = logits(llama, base, with_rows(stack_adapters(parts, base), rows))
    want = by_row(llama, base, parts, rows)
    np.testing.assert_allclose(got, [*want], atol=LOGITS)
    plain = logits(llama, base)
    moved = np.abs(got - plain).max((1, 2)) > 1000 * LOGITS
    np.testing.assert_array_equal(moved, np.asarray(rows) >= 0)


# --- Stacks ---


@pytest.mark.parametrize(
    "loras, tied, rows",
    [
        (("plain", "rslora", "patterns", "one layer"), False, [1, -1, 0, 3]),
        (("tables", "one layer", "patterns"), True, [1, -1, 0, 2]),
        (("plain", "plain"), False, [1, -1, 0, 1]),
        (
            # A tied one, and biases of B.
            (
                config(
                    *("embed_tokens",),
                    **dict(r=2, alpha_pattern={"lm_head": 5}, ensure_weight_tying=True),
                ),
                config("lm_head", "q_proj", r=3, lora_alpha=2, lora_bias=True),
            ),
            True,
            [0, 1, -1, 1],
        ),
    ],
)
def test_every_row_is_computed_with_its_own_adapter(models, loras, tied, rows):
    llama, base = models[tied]
    assert_rows_are_those_alone(llama, base, drawn(base, *loras), rows)


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
def test_rows_differ_on_a_packed_base_too(llama_dir, quantization):
    llama, base = convert.load_llama(llama_dir, quantization=quantization)
    base = jax.tree.map(jnp.asarray, base)
    parts = drawn(base, "plain", "plain")
    assert_rows_are_those_alone(llama, base, parts, [1, 0, -1, 1])


def test_the_stack_has_an_axis_of_adapters(base):
    parts = drawn(base, "patterns", "one layer", "tables")
    stack = with_rows(stack_adapters(parts, base), [2, 0])
    o_proj = stack["model"]["layers"]["self_attn"]["o_proj"]
    assert o_proj["lora_A"].shape == (2, 3, 2, 64) and "lora_bias" not in o_proj
    assert o_proj["scaling"].tolist() == [[0, 0, 0], [0, 3.5, 0]]
    assert o_proj["rows"].tolist() == [[2, 0], [2, 0]]
    head, table = stack["lm_head"], stack["model"]["embed_tokens"]
    assert head["lora_B"].shape == (3, 32, 3) and head["rows"].tolist() == [2, 0]
    assert table["lora_embedding_A"].shape == (3, 3, 32)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_without_an_adapter_is_the_base_to_the_bit(models, dtype):
    llama, base = models[False]
    # Even of an adapter of infinities: 0 times infinity is NaN.
    tree = jax.tree.map(lambda leaf: np.full_like(leaf, np.inf), draw(base, TABLES))
    stack = with_rows(stack_adapters([(TABLES, tree)], base), [-1] * 4)
    got, want = (logits(llama, base, x, dtype=dtype) for x in (stack, None))
    np.testing.assert_array_equal(got, want)


def test_bf16_rows_are_as_near_as_bf16_allows(models):
    llama, base = models[False]
    parts, rows = drawn(base, "plain", "tables"), [0, 1, 1, 0]
    stack = with_rows(stack_adapters(parts, base), rows)
    got = logits(llama, base, stack, dtype="bfloat16")
    narrow = by_row(llama, base, parts, rows, dtype="bfloat16")
    exact = by_row(llama, base, parts, rows)
    for row, single, want in zip(got, narrow, exact, strict=True):
        # No further from the float32 result than twice what bf16 is without a stack.
        assert np.abs(row - want).max() <= 2 * np.abs(single - want).max()


def test_generation_is_that_of_each_row_alone(models):
    llama, base = models[True]
    parts = drawn(base, "tables", "plain")
    model = Llama(llama, Compute("float32"))
    prompts, rows = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 2, 3]], [1, 0, 1, -1]

    def generate(prompts, lora):
        variables = {"params": base} if lora is None else {"params": base, "lora": lora}
        return generate_tokens(model, variables, prompts, max_new_tokens=8)

    together = generate(prompts, with_rows(stack_adapters(parts, base), rows))
    for prompt, row, got in zip(prompts, rows, together, strict=True):
        assert got == generate([prompt], alone(base, parts, row))[0]
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
    llama, base = models[False]
    other = replace(TABLES, lora_alpha=11)
    first = stack_adapters(drawn(base, TABLES, TABLES), base)
    second = stack_adapters(drawn(base, other, other)[::-1], base)
    run = jax.jit(Llama(llama, Compute("float32")).apply)
    tokens = jnp.asarray(TOKENS)

    def ask(stack, rows):
        with compilations() as compiled:
            got = run({"params": base, "lora": with_rows(stack, rows)}, tokens)
        return np.asarray(got), len(compiled)

    one, compiled = ask(first, [0, 1, -1, 0])
    assert compiled  # it does count
    for stack, rows in ((first, [1, 1, 0, -1]), (second, [0, 1, -1, 0])):
        got, compiled = ask(stack, rows)
        assert not compiled and (one != got).any()
    assert run._cache_size() == 1


def test_rows_may_be_an_argument_of_what_is_compiled(models):
    llama, base = models[False]
    stack = stack_adapters(drawn(base, "plain", "plain"), base)
    run = jax.jit(lambda rows: logits(llama, base, with_rows(stack, rows)))
    for rows in ([0, 1, -1, 0], [1, 1, 1, -1]):
        want = logits(llama, base, with_rows(stack, rows))
        np.testing.assert_allclose(run(jnp.asarray(rows)), want, atol=LOGITS)
    assert run._cache_size() == 1


@pytest.mark.parametrize(
    "lora",
    [
        LoraConfig(r=2, target_modules="all-linear"),
        replace(TABLES, ensure_weight_tying=True, use_dora=True),
    ],
    ids=["plain", "everything"],
)
def test_a_model_changes_its_adapter_without_compiling_anything(shared_data, lora):
    model = load(shared_data / "stories260K", quantization=None, dtype="float32")
    tokens = jnp.asarray([[1, 403, 407, 261, 378]], jnp.int32)

    def ask(lora_alpha, seed):
        scaled = replace(lora, lora_alpha=lora_alpha)
        tree = jax.tree.map(jnp.asarray, draw(model.base, scaled, seed, spread=0.5))
        adapted = replace(model, adapters=tree, lora_config=scaled)
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


def test_parts_of_another_form_are_refused(base):
    ((lora, tree),) = drawn(base, "one layer")
    pairs, triples = r"\(configuration, trained tree\)", "trained tree, weight"
    for function, parts, message in (
        (stack_adapters, [(tree, lora)], rf"{pairs}.* got \(tree, configuration\)"),
        (stack_adapters, tree, rf"{pairs}, got tree"),
        (stack_adapters, [(lora, tree), lora], "adapter 1: .* got configuration"),
        (combine_adapters, [(lora, tree)], rf"{triples}.*\(configuration, tree\)"),
        (
            *(combine_adapters, [(0.5, lora, tree)]),
            rf"{triples}.*\(float, configuration, tree",
        ),
        (combine_adapters, lora, "must be a list of .*got configuration"),
        (stack_adapters, [], "at least one adapter, got none"),
    ):
        with pytest.raises(UserError, match=message):
            function(parts, base)


@pytest.mark.parametrize(
    "lora, message",
    [
        (replace(HEADS, use_dora=True), "adapter 1: `use_dora` rescales"),
        (HEADS, r"adapter 1: `lm_head.weight` replaces a tensor of the base"),
        ("rows", r"adapter 1: `model.embed_tokens.trainable_tokens_delta` replaces"),
        (LoraConfig(r=2, init_lora_weights="pissa"), "adapter 1: .*'pissa'.*absorb"),
    ],
)
def test_parts_that_cannot_differ_by_row_are_refused(base, lora, message):
    with pytest.raises(UserError, match=message):
        stack_adapters(drawn(base, "plain", lora), base)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([0, 2], r"`rows` has 2, and the stack has 2 adapters \(0 to 1; -1 for none\)"),
        ([0, -2], "`rows` has -2"),
        ([0.0, 1.0], "list of integers, .* got float32"),
        ([[0, 1]], r"one for each row of the batch, got int32 of shape \[1, 2\]"),
    ],
)
def test_unusable_rows_are_refused(base, rows, message):
    stack = stack_adapters(drawn(base, TABLES, TABLES), base)
    with pytest.raises(UserError, match=message):
        with_rows(stack, np.asarray(rows))


@pytest.mark.parametrize("name", ["plain", "tables"])
def test_a_tree_that_is_no_stack_or_lacks_rows_of_the_batch_is_refused(models, name):
    llama, base = models[False]
    parts = drawn(base, name)
    with pytest.raises(UserError, match="has one adapter, not a stack"):
        with_rows(alone(base, parts, 0), [0])
    stack = stack_adapters(parts, base)
    message = r"stack of 1 adapters without row indices.*`with_rows\(stack, rows\)`"
    with pytest.raises(UserError, match=message):
        logits(llama, base, stack)
    message = r"adapters of 3 rows, and the batch has the shape \[4, 9"
    with pytest.raises(UserError, match=message):
        logits(llama, base, with_rows(stack, [0, 0, 0]))


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
