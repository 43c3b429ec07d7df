import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qlora_jax.runs.checksum import checksum

DTYPES = [np.float32, ml_dtypes.bfloat16, np.uint8, np.int32, np.bool_]


def array(dtype, shape=(5, 12)):
    drawn = np.random.default_rng(0).integers(0, 200, shape)
    return (drawn > 99 if dtype is np.bool_ else drawn).astype(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_bit_of_any_element_counts(dtype):
    original = array(dtype)
    seen = {checksum(original)}
    bits = 1 if dtype is np.bool_ else 8 * original.dtype.itemsize
    for element in (0, 7, 59):
        for bit in range(bits):
            changed = original.copy()
            changed.reshape(-1).view(np.uint8)[
                element * changed.itemsize + bit // 8
            ] ^= 1 << bit % 8
            seen.add(checksum(changed))
    assert len(seen) == 1 + 3 * bits


SIGNS = np.where(np.arange(60) < 2, -1, 1).reshape(5, 12).astype(np.float32)
CHANGES = {
    # Sums of bits with odd weights by position miss this one.
    "two signs": lambda a: a * SIGNS,
    "all signs": lambda a: -a,
    "two columns swapped": lambda a: a[:, [1, 0, *range(2, 12)]],
    "shape": lambda a: a.reshape(12, 5),
    "type": lambda a: a.view(np.int32),
    "order": lambda a: a[::-1],
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_several_elements_are_seen(change):
    original = array(np.float32) + np.float32(1)
    assert checksum(CHANGES[change](original)) != checksum(original)


def test_names_of_containers_do_not_count_and_the_order_of_leaves_does():
    a, b = array(np.float32), array(np.uint8)
    assert checksum({"x": a, "y": [b]}) == checksum((jnp.asarray(a), jnp.asarray(b)))
    assert checksum((b, a)) != checksum((a, b))


def test_leaves_without_elements_and_axes_are_hashed():
    empty, scalar = np.zeros((0, 3), np.float32), np.float32(2)
    assert checksum([empty]) != checksum([]) != checksum([scalar])
    assert checksum(jax.random.key_data(jax.random.key(1))) != checksum(
        jax.random.key_data(jax.random.key(2))
    )
