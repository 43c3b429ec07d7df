import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.data.encoding import IGNORE
from qlora_jax.models.layers import ModuleAdapter, linear
from qlora_jax.training.loss import cross_entropy_sum, shift_labels, supervised_tokens

V, D = 37, 64


def sample(batch=2, length=13, *, vocab=V, seed=0, dtype="float32"):
    """Hidden states, a head, and labels of which about a third are not supervised."""
    rng = np.random.default_rng(seed)
    hidden = jnp.asarray(rng.standard_normal((batch, length, D)), dtype)
    weight = jnp.asarray(0.2 * rng.standard_normal((vocab, D)), jnp.float32)
    labels = rng.integers(0, vocab, (batch, length))
    labels[rng.random((batch, length)) < 0.3] = IGNORE
    return hidden, weight, jnp.asarray(labels, jnp.int32)


def head(weight, hidden):
    """Float32 logits of a dense or packed head."""
    return linear(hidden, weight, dtype=jnp.float32)


def dense_reference(weight, hidden, labels):
    """The loss from all logits at once, in the plainest words."""
    logits = jnp.einsum("btd,vd->btv", hidden, weight, precision="highest")
    logp = jax.nn.log_softmax(logits[:, :-1])
    targets = labels[:, 1:]
    picked = jnp.take_along_axis(logp, jnp.maximum(targets, 0)[..., None], -1)[..., 0]
    return -jnp.where(targets == IGNORE, 0.0, picked).sum()


def value_and_gradients(chunk, weight, hidden, labels, scale=1.0):
    def loss(w, h):
        vocab = w.shape[0]
        value = cross_entropy_sum(head, w, h, labels, vocab_size=vocab, chunk=chunk)
        return scale * value

    return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(weight, hidden)


reference = jax.value_and_grad(dense_reference, argnums=(0, 1))
# Sums of 64 float32 terms, an exponential and a logarithm: a few 1e-7 of logits of
# order two; the loss adds some twenty of them.
close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("chunk", [None, 1, 5, 13, 26, 1000])
def test_loss_and_gradients_are_those_of_all_logits_at_once(chunk):
    hidden, weight, labels = sample()
    value, grads = value_and_gradients(chunk, weight, hidden, labels)
    want, want_grads = reference(weight, hidden, labels)
    close(value, want)
    jax.tree.map(close, grads, want_grads)
    # Without a gradient, and with one from outside.
    loss = functools.partial(cross_entropy_sum, head, vocab_size=V, chunk=chunk)
    plain = jax.jit(loss)(weight, hidden, labels)
    close(plain, value, rtol=1e-6, atol=0)
    _, part = value_and_gradients(chunk, weight, hidden, labels, scale=0.25)
    for got, once in zip(part, grads, strict=True):
        np.testing.assert_array_equal(got, 0.25 * once)


def test_only_the_trained_part_of_a_packed_head_gets_a_gradient():
    hidden, weight, labels = sample()
    packed = nf4.quantize(np.asarray(weight), double_quant=True)
    packed = jax.tree.map(jnp.asarray, packed)
    rng = np.random.default_rng(3)
    adapter = {
        "lora_A": jnp.asarray(rng.standard_normal((2, D)), jnp.float32),
        "lora_B": jnp.asarray(rng.standard_normal((V, 2)), jnp.float32),
    }

    def adapted(parts, h):
        weight, adapter = parts
        return linear(h, weight, None, ModuleAdapter(adapter, 0.1), dtype=jnp.float32)

    def loss(adapter, h):
        parts = (packed, adapter)
        return cross_entropy_sum(adapted, parts, h, labels, vocab_size=V, chunk=7)

    def dense(adapter, h):
        a, b = adapter["lora_A"], adapter["lora_B"]
        update = 0.1 * jnp.dot(b, a, precision="highest")
        return dense_reference(nf4.dequantize(packed) + update, h, labels)

    got, want = (
        jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(adapter, hidden)
        for f in (loss, dense)
    )
    close(got[0], want[0])
    close(got[1][1], want[1][1])
    jax.tree.map(functools.partial(close, rtol=1e-5, atol=1e-5), got[1], want[1])


def test_bf16_hidden_states_get_bf16_gradients_of_a_float32_loss():
    hidden, weight, labels = sample(dtype="bfloat16")
    value, (dweight, dhidden) = value_and_gradients(5, weight, hidden, labels)
    assert (value.dtype, dweight.dtype) == (jnp.float32, jnp.float32)
    assert dhidden.dtype == jnp.bfloat16
    rounded = weight.astype(jnp.bfloat16).astype(jnp.float32)
    want, grads = reference(rounded, hidden.astype(jnp.float32), labels)
    # The logits are float32 sums of exact products: no bf16 rounding in the loss.
    close(value, want, rtol=1e-5)
    # Logit gradients (at most 1) and results are rounded to bf16, half an ulp 2^-8
    # each; 18 rows of hidden states of order one are summed in dweight.
    for got, wide in zip((dweight, dhidden), grads, strict=True):
        worst = np.abs(np.asarray(got, np.float32) - wide).max()
        assert worst <= 2 * 2**-8 * max(1, np.abs(wide).max())


@pytest.mark.parametrize("what", ["all", "all but the first"])
def test_nothing_supervised_is_a_loss_and_gradient_of_zero(what):
    hidden, weight, labels = sample()
    labels = jnp.full_like(labels, IGNORE)
    if what != "all":  # the label of position 0 is predicted by no position
        labels = labels.at[:, 0].set(3)
    value, grads = value_and_gradients(4, weight, hidden, labels)
    assert value == 0 and supervised_tokens(labels) == 0
    assert not any(np.asarray(g).any() for g in grads)


def test_labels_are_shifted_within_their_row():
    labels = jnp.asarray([[1, 2, 3], [4, IGNORE, 6]], jnp.int32)
    assert shift_labels(labels).tolist() == [[2, 3, IGNORE], [IGNORE, 6, IGNORE]]
    assert supervised_tokens(labels) == 3
    assert supervised_tokens(labels[None]) == 3


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (1, 2)])
def test_rows_of_one_or_two_tokens(shape):
    hidden, weight, _ = sample(*shape)
    labels = jnp.ones(shape, jnp.int32)
    value, _ = value_and_gradients(None, weight, hidden, labels)
    close(value, dense_reference(weight, hidden, labels))


def test_large_logits_stay_finite():
    hidden, weight, labels = sample()
    value, grads = value_and_gradients(5, 100 * weight, 100 * hidden, labels)
    want = dense_reference(100 * weight, 100 * hidden, labels)
    close(value, want, rtol=1e-5)
    assert all(np.isfinite(np.asarray(g)).all() for g in grads)


# --- Memory ---


def compiled_text_and_bytes(tokens, vocab, chunk, *, gradient):
    def loss(h, w, labels):
        return cross_entropy_sum(head, w, h, labels, vocab_size=vocab, chunk=chunk)

    shapes = (
        ((1, tokens, D), "float32"),
        ((vocab, D), "float32"),
        ((1, tokens), "int32"),
    )
    arguments = [jax.ShapeDtypeStruct(*shape) for shape in shapes]
    lowered = jax.jit(jax.grad(loss) if gradient else loss).lower(*arguments)
    compiled = lowered.compile()
    return compiled.as_text(), compiled.memory_analysis().temp_size_in_bytes


@pytest.mark.parametrize("gradient", [False, True])
def test_logits_of_all_tokens_never_exist(gradient):
    tokens, vocab, chunk = 4096, 1003, 128
    text, temporary = compiled_text_and_bytes(tokens, vocab, chunk, gradient=gradient)
    assert f"[{chunk},{vocab}]" in text  # the search can find
    for shape in (f"{tokens},{vocab}", f"1,{tokens},{vocab}", f"32,{chunk},{vocab}"):
        assert f"[{shape}]" not in text
    # Logits of a chunk and their gradient, twice over for the loop, and the gradient of
    # the hidden states.
    assert temporary < 4 * chunk * vocab * 4 + 3 * tokens * D * 4
    assert temporary < tokens * vocab * 4 / 4


def test_the_default_chunk_bounds_the_logits_at_a_real_vocabulary():
    # 4,096 tokens at 128,256 words: all logits would be 2.1 GB.
    _, temporary = compiled_text_and_bytes(4096, 128_256, None, gradient=True)
    assert temporary < 0.8e9
