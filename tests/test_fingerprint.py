import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qlora_jax import nf4 as fingerprint
from qlora_jax.nf4 import fingerprint_tree, quantize


def tree() -> dict:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((8, 64), np.float32)
    return {
        "a": {"weight": weight.astype(ml_dtypes.bfloat16)},
        "b": quantize(weight, double_quant=True),
        "c": np.float32(1.5) * np.ones((), np.float32),
    }


def test_is_the_same_each_time_and_on_devices():
    one = fingerprint_tree(tree())
    assert len(one) == 64
    assert fingerprint_tree(tree()) == one
    assert fingerprint_tree(jax.tree.map(jnp.asarray, tree())) == one
    assert fingerprint_tree(dict(reversed(tree().items()))) == one


def change_value(t):
    t["a"]["weight"][3, 5] += 1


def test_last_byte_of_several_pieces_is_seen(monkeypatch):
    monkeypatch.setattr(fingerprint, "_PIECE", 1000)
    one = fingerprint_tree(tree())
    changed = tree()
    changed["a"]["weight"].view(np.uint8)[-1, -1] ^= 1
    assert fingerprint_tree(changed) != one
    assert fingerprint_tree(tree()) == one


def change_name(t):
    t["d"] = t.pop("a")


def change_shape(t):
    t["a"]["weight"] = t["a"]["weight"].reshape(16, 32)


def change_dtype(t):
    t["a"]["weight"] = t["a"]["weight"].view(np.uint16)


def change_codes(t):
    t["b"].codes[0, 0] ^= 1


def change_offset(t):
    t["b"] = dataclasses.replace(t["b"], nested_offset=np.float32(0.25) * np.ones(()))


def change_static(t):
    t["b"] = dataclasses.replace(t["b"], dtype="float16")


def change_scalar(t):
    t["c"] = t["c"].reshape(1)


@pytest.mark.parametrize(
    "change",
    [
        change_value,
        change_name,
        change_shape,
        change_dtype,
        change_codes,
        change_offset,
        change_static,
        change_scalar,
    ],
)
def test_any_change_is_seen(change):
    changed = tree()
    change(changed)
    assert fingerprint_tree(changed) != fingerprint_tree(tree())
