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


def value_and_gradients(chunk, weight, hidden, labels):
    return jax.jit(
        jax.value_and_grad(
            lambda w, h: cross_entropy_sum(
                head, w, h, labels, vocab_size=w.shape[0], chunk=chunk
            ),
            argnums=(0, 1),
        )
    )(weight, hidden)


# Sums of 64 float32 terms, an exponential and a logarithm: a few 1e-7 of logits of
# order two; the loss adds some twenty of them.
close = functools.partial(np.testing.assert_allclose, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("chunk", [None, 1, 5, 13, 26, 1000])
def test_loss_and_gradients_are_those_of_all_logits_at_once(chunk):
    hidden, weight, labels = sample()
    value, grads = value_and_gradients(chunk, weight, hidden, labels)
    want, want_grads = jax.value_and_grad(dense_reference, argnums=(0, 1))(
        weight, hidden, labels
    )
    close(value, want)
    for got, reference in zip(grads, want_grads, strict=True):
        close(got, reference)


def test_the_value_is_the_same_with_and_without_a_gradient():
    hidden, weight, labels = sample()
    plain = jax.jit(
        lambda w, h: cross_entropy_sum(head, w, h, labels, vocab_size=V, chunk=5)
    )(weight, hidden)
    close(plain, value_and_gradients(5, weight, hidden, labels)[0], rtol=1e-6, atol=0)


def test_a_frozen_packed_head_gives_the_gradient_of_its_dense_weight():
    hidden, weight, labels = sample()
    packed = jax.tree.map(
        jnp.asarray, nf4.quantize(np.asarray(weight), double_quant=True)
    )
    loss = functools.partial(cross_entropy_sum, head, labels=labels, vocab_size=V)
    value, dhidden = jax.jit(jax.value_and_grad(lambda h: loss(packed, h, chunk=4)))(
        hidden
    )
    want, want_dhidden = jax.value_and_grad(dense_reference, argnums=1)(
        nf4.dequantize(packed), hidden, labels
    )
    close(value, want)
    close(dhidden, want_dhidden)


def test_a_tied_head_gets_its_gradient_from_both_uses():
    _, weight, labels = sample()
    tokens = jnp.maximum(labels, 0)

    def ours(w):
        return cross_entropy_sum(head, w, w[tokens], labels, vocab_size=V, chunk=6)

    def reference(w):
        return dense_reference(w, w[tokens], labels)

    close(jax.jit(jax.grad(ours))(weight), jax.grad(reference)(weight), atol=5e-6)


def test_only_the_trained_part_of_a_head_gets_a_gradient():
    hidden, weight, labels = sample()
    packed = jax.tree.map(
        jnp.asarray, nf4.quantize(np.asarray(weight), double_quant=False)
    )
    rng = np.random.default_rng(3)
    adapter = {
        "lora_A": jnp.asarray(rng.standard_normal((2, D)), jnp.float32),
        "lora_B": jnp.asarray(rng.standard_normal((V, 2)), jnp.float32),
    }

    def adapted(parts, h):
        weight, adapter = parts
        return linear(h, weight, None, ModuleAdapter(adapter, 0.1), dtype=jnp.float32)

    def loss(adapter):
        parts = (packed, adapter)
        return cross_entropy_sum(adapted, parts, hidden, labels, vocab_size=V, chunk=7)

    def reference(adapter):
        update = 0.1 * jnp.dot(
            adapter["lora_B"], adapter["lora_A"], precision="highest"
        )
        return dense_reference(nf4.dequantize(packed) + update, hidden, labels)

    got, want = jax.jit(jax.grad(loss))(adapter), jax.grad(reference)(adapter)
    jax.tree.map(functools.partial(close, rtol=1e-5, atol=1e-5), got, want)


def test_bf16_hidden_states_get_bf16_gradients_of_a_float32_loss():
    hidden, weight, labels = sample(dtype="bfloat16")
    value, (dweight, dhidden) = value_and_gradients(5, weight, hidden, labels)
    assert (value.dtype, dweight.dtype) == (jnp.float32, jnp.float32)
    assert dhidden.dtype == jnp.bfloat16
    rounded = weight.astype(jnp.bfloat16).astype(jnp.float32)
    want, grads = jax.value_and_grad(dense_reference, argnums=(0, 1))(
        rounded, hidden.astype(jnp.float32), labels
    )
    # The logits are float32 sums of exact products: no bf16 rounding in the loss.
    close(value, want, rtol=1e-5)
    # Logit gradients (at most 1) and results are rounded to bf16, half an ulp 2^-8
    # each; 18 rows of hidden states of order one are summed in dweight.
    for got, reference in zip((dweight, dhidden), grads, strict=True):
        reference = np.asarray(reference)
        worst = np.abs(np.asarray(got, np.float32) - reference).max()
        assert worst <= 2 * 2**-8 * max(1, np.abs(reference).max())


@pytest.mark.parametrize("what", ["all", "all but the first"])
def test_nothing_supervised_is_a_loss_and_gradient_of_zero(what):
    hidden, weight, labels = sample()
    labels = jnp.full_like(labels, IGNORE)
    if what != "all":  # the label of position 0 is predicted by no position
        labels = labels.at[:, 0].set(3)
    value, grads = value_and_gradients(4, weight, hidden, labels)
    assert value == 0 and supervised_tokens(labels) == 0
    assert not any(np.asarray(g).any() for g in grads)


def test_hidden_states_without_supervision_do_not_matter():
    hidden, weight, labels = sample()
    unsupervised = np.asarray(shift_labels(labels) == IGNORE)
    other = jnp.where(unsupervised[..., None], 7.0, hidden)
    value, grads = value_and_gradients(5, weight, hidden, labels)
    same, same_grads = value_and_gradients(5, weight, other, labels)
    assert value == same
    np.testing.assert_array_equal(grads[0], same_grads[0])
    np.testing.assert_array_equal(grads[1], same_grads[1])
    assert not np.asarray(grads[1])[unsupervised].any()


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


def test_the_gradient_of_a_scaled_loss_is_scaled():
    hidden, weight, labels = sample()

    def scaled(w):
        return 0.25 * cross_entropy_sum(head, w, hidden, labels, vocab_size=V)

    _, (once, _) = value_and_gradients(None, weight, hidden, labels)
    np.testing.assert_array_equal(jax.jit(jax.grad(scaled))(weight), 0.25 * once)


# --- Memory ---


def compiled_text_and_bytes(tokens, vocab, chunk, *, gradient):
    def loss(h, w, labels):
        return cross_entropy_sum(head, w, h, labels, vocab_size=vocab, chunk=chunk)

    function = jax.grad(loss) if gradient else loss
    compiled = (
        jax.jit(function)
        .lower(
            jax.ShapeDtypeStruct((1, tokens, D), jnp.float32),
            jax.ShapeDtypeStruct((vocab, D), jnp.float32),
            jax.ShapeDtypeStruct((1, tokens), jnp.int32),
        )
        .compile()
    )
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
