"""Generation: greedy as Hugging Face, rows independent of the batch, sampling."""

import dataclasses
import functools
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.errors import UserError
from qlora_jax.inference.config import Sampling
from qlora_jax.inference.decode import (
    Decoding,
    DecodingConfig,
    _generate,
    _Program,
    generate_tokens,
)
from qlora_jax.inference.sampling import Values
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.nf4 import lift_stacks


@pytest.fixture(scope="module")
def tiny(llama_dir):
    """The two-layer model in float32, and its variables."""
    config, base = convert.load_llama(llama_dir, quantization=None)
    base = jax.tree.map(jnp.asarray, base)
    return Llama(config, Compute(dtype="float32")), {"params": base}


@functools.partial(jax.jit, static_argnames="model")
def apply(model, variables, tokens):
    return model.apply(variables, tokens)


PROMPTS = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10, 11]]


@pytest.mark.real
@pytest.mark.parametrize("name", ["stories260K", "babyllama-char105"])
def test_greedy_tokens_are_those_of_hugging_face(shared_data, name):
    config, base = convert.load_llama(shared_data / name, quantization=None)
    variables = {"params": jax.tree.map(jnp.asarray, base)}
    model = Llama(config, Compute(dtype="float32"))
    stored = json.loads((shared_data / name / "greedy.json").read_text())
    prompts = [row["input_ids"] for row in stored]
    rows = generate_tokens(model, variables, prompts, max_new_tokens=60)
    assert rows == [row["output_ids"] for row in stored]


def test_a_row_does_not_depend_on_its_batch(tiny):
    together = generate_tokens(*tiny, PROMPTS, max_new_tokens=12)
    for prompt, row in zip(PROMPTS, together, strict=True):
        assert row[: len(prompt)] == prompt and len(row) == len(prompt) + 12
        assert generate_tokens(*tiny, [prompt], max_new_tokens=12) == [row]
    settings = {"max_new_tokens": 12, "temperature": 1.0, "min_p": 0.01, "seed": 5}
    _, row, _ = generate_tokens(*tiny, PROMPTS, **settings)
    _, alike = generate_tokens(*tiny, [[9, 9, 9], PROMPTS[1]], **settings)
    assert row == alike


def test_lengths_around_the_rounding_of_the_cache(tiny):
    """Prompts of 31, 32 and 33 tokens, whose caches are rounded up differently."""
    prompts = [[1 + i % 30 for i in range(length)] for length in (31, 32, 33)]
    long = generate_tokens(*tiny, prompts, max_new_tokens=33)
    for prompt, row in zip(prompts, long, strict=True):
        (short,) = generate_tokens(*tiny, [prompt], max_new_tokens=1)
        assert short == row[: len(prompt) + 1]


@pytest.fixture(scope="module")
def packed(llama_dir):
    """The two-layer model in NF4 with adapters that do something."""
    config, base = convert.load_llama(llama_dir, quantization="nf4_dq")
    base = jax.tree.map(jnp.asarray, base)
    lora = LoraConfig(r=2, target_modules="all-linear")
    adapters = init_adapters(jax.random.key(0), base, lora)
    adapters = jax.tree.map(lambda a: a + 0.05, adapters)
    variables = {"params": base, "lora": bind(adapters, base, lora)}
    return Llama(config, Compute(dtype="float32")), variables


def test_greedy_tokens_of_packed_weights_with_adapters_are_the_argmax(packed):
    model, variables = packed
    rows = generate_tokens(model, variables, PROMPTS, max_new_tokens=12)
    # Tokens see none after them, so those that make the rows equally long say nothing.
    width = max(map(len, rows))
    padded = jnp.asarray([row + [0] * (width - len(row)) for row in rows])
    best_tokens = jnp.argmax(apply(model, variables, padded), axis=-1)
    for prompt, row, best in zip(PROMPTS, rows, best_tokens, strict=True):
        assert row[len(prompt) :] == best[len(prompt) - 1 : len(row) - 1].tolist()


def test_lifted_stacks_generate_the_same(packed, monkeypatch):
    model, variables = packed
    rows = generate_tokens(model, variables, PROMPTS, max_new_tokens=12)

    def lift(self, variables):
        params, stacks = lift_stacks(variables["params"])
        return {**variables, "params": params, "stacks": stacks}

    # Another model to `jit`, as that of our own kernels is.
    model = model.clone(compute=Compute(dtype="float32", kernels="xla"))
    monkeypatch.setattr(Compute, "arrange", lift)
    assert generate_tokens(model, variables, PROMPTS, max_new_tokens=12) == rows


def test_the_cache_is_updated_in_place(packed):
    """By the compiled program: nothing of the size of a cache is copied in a loop."""
    model, variables = packed
    c = model.config
    greedy, ones = Sampling(), np.ones((3, 32), np.int32)
    program = _Program.of(model, greedy, (), cache_size=96)
    arguments = program, variables, ones, ones, Values.of(greedy)
    lowered = _generate.lower(*arguments, max_new_tokens=64)
    layer = f"3,{c.num_key_value_heads},96,{c.head_dim}]"
    text = lowered.compile().as_text()
    assert f"f32[2,{layer}" in text
    loops = re.split(r"\nENTRY ", text)[0]
    copies = re.findall(r"= (\S+) copy\(", loops)
    assert not [shape for shape in copies if layer in shape]


def test_sampling_is_a_function_of_the_seed(tiny):
    settings = {"max_new_tokens": 12, "temperature": 1.0}
    first = generate_tokens(*tiny, PROMPTS, seed=1, **settings)
    assert generate_tokens(*tiny, PROMPTS, seed=1, **settings) == first
    assert generate_tokens(*tiny, PROMPTS, seed=2, **settings) != first
    # Equal prompts in one batch draw from streams of their own.
    first, second, _ = generate_tokens(*tiny, [[1, 2], [1, 2], [3]], seed=1, **settings)
    assert first != second


def test_limits_that_leave_one_token_are_greedy(tiny):
    greedy = generate_tokens(*tiny, PROMPTS, max_new_tokens=12)
    for limit in ({"top_k": 1}, {"top_p": 1e-6}):
        limit |= {"max_new_tokens": 12, "temperature": 2.0}
        assert generate_tokens(*tiny, PROMPTS, **limit) == greedy


def test_sampling_follows_the_distribution(tiny):
    """The first token of 2,000 equal prompts, against the softmax of the logits."""
    settings = {"max_new_tokens": 1, "temperature": 0.7}
    rows = generate_tokens(*tiny, [[1, 2, 3]] * 2000, **settings)
    logits = apply(*tiny, jnp.asarray([[1, 2, 3]]))[0, -1]
    expected = np.asarray(jax.nn.softmax(logits / 0.7))
    shares = np.bincount([row[-1] for row in rows], minlength=32) / 2000
    # Five standard errors of a share.
    assert (np.abs(shares - expected) <= 5 * np.sqrt(expected / 2000) + 1e-3).all()


def test_a_row_ends_at_an_end_token_and_the_others_go_on(tiny):
    rows = generate_tokens(*tiny, PROMPTS, max_new_tokens=12)
    end = rows[0][len(PROMPTS[0]) + 4]
    ended = generate_tokens(*tiny, PROMPTS, max_new_tokens=12, eos_token_ids=(end, 99))
    for prompt, row, cut in zip(PROMPTS, rows, ended, strict=True):
        added = row[len(prompt) :]
        length = added.index(end) + 1 if end in added else len(added)
        assert cut == prompt + added[:length]
    assert ended[0][-1] == end and len(ended[0]) < len(rows[0])


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"temperature": 1.0, "top_p": 0.9, "min_p": 0.02, "seed": 3},
        {"repetition_penalty": 1.3},
    ],
    ids=["greedy", "sampled", "penalized"],
)
def test_a_decoding_gives_the_tokens_of_generate_tokens(tiny, settings):
    """First token, whole chunks, a part of one; a row that ends and one ended."""
    rows = generate_tokens(*tiny, PROMPTS, max_new_tokens=40, **settings)
    added = [row[len(prompt) :] for prompt, row in zip(PROMPTS, rows, strict=True)]
    config = DecodingConfig(40, Sampling(**settings))
    decoding = Decoding(*tiny, PROMPTS, config)
    streamed, visits = [[], [], []], []
    while not decoding.done:
        new = decoding.advance()
        visits.append(len(new[0]))
        for row, tokens in zip(streamed, new, strict=True):
            row += tokens
        if len(visits) == 2:
            decoding.end(1)
    assert streamed == [added[0], added[1][:17], added[2]]
    assert visits == [1, 16, 16, 7] and decoding.advance() == [[], [], []]
    end = added[0][20]
    changes = {"eos_token_ids": (end,), "power_of_two_lengths": True}
    stops = Decoding(*tiny, PROMPTS[:1], dataclasses.replace(config, **changes))
    out = []
    while not stops.done:
        out += stops.advance()[0]
    assert out == added[0][: added[0].index(end) + 1]


@pytest.mark.parametrize("padding_is_likely", [False, True])
def test_the_penalty_covers_prompt_and_continuation(tiny, padding_is_likely):
    """Against the formula, token by token; padding of a shorter row counts nothing."""
    model, variables = tiny
    if padding_is_likely:  # token 0 is what the shortest row continues with
        likely = generate_tokens(*tiny, PROMPTS[1:2], max_new_tokens=1)[0][-1]
        head = variables["params"]["lm_head"]["weight"]
        head = head.at[jnp.asarray([0, likely])].set(head[jnp.asarray([likely, 0])])
        params = {**variables["params"], "lm_head": {"weight": head}}
        variables = {"params": params}
    rows = generate_tokens(
        model, variables, PROMPTS, max_new_tokens=8, repetition_penalty=1.5
    )
    assert rows != generate_tokens(model, variables, PROMPTS, max_new_tokens=8)
    assert rows[1][1] == 0 or not padding_is_likely
    for prompt, row in zip(PROMPTS, rows, strict=True):
        logits = np.asarray(apply(model, variables, jnp.asarray([row]))[0])
        for at in range(len(prompt), len(row)):
            scores = logits[at - 1].copy()
            used = sorted(set(row[:at]))
            scores[used] *= np.where(scores[used] < 0, 1.5, 1 / 1.5)
            assert row[at] == scores.argmax()


def test_no_prompts_give_no_rows(tiny):
    assert generate_tokens(*tiny, [], max_new_tokens=3) == []


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ([[1], []], "prompt 1 is empty"),
        ([[1, 32]], "prompt 0 has token 32 outside the vocabulary of 32"),
        ([[-1, 3]], "prompt 0 has token -1 outside"),
    ],
)
def test_invalid_prompts_are_refused(tiny, prompts, message):
    with pytest.raises(UserError, match=message):
        generate_tokens(*tiny, prompts, max_new_tokens=3)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_new_tokens", 0, "must be at least 1, got 0"),
        ("temperature", -0.5, "must be >= 0, got -0.5"),
        ("temperature", float("nan"), "must be >= 0, got nan"),
        ("top_p", 0.0, r"must lie in \(0, 1\], got 0.0"),
        ("top_p", 1.5, r"must lie in \(0, 1\], got 1.5"),
        ("top_k", 0, "must be at least 1, got 0"),
        ("min_p", 1.5, r"must lie in \[0, 1\], got 1.5"),
        ("repetition_penalty", 0.0, "must be positive .*got 0.0"),
    ],
)
def test_invalid_settings_are_refused(tiny, name, value, message):
    with pytest.raises(UserError, match=f"`{name}` {message}"):
        generate_tokens(*tiny, [[1]], **{"max_new_tokens": 3, name: value})
