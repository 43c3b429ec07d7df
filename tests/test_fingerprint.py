import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from qlora_jax import nf4
from qlora_jax.nf4 import fingerprint_tree, quantize


def tree() -> dict:
    weight = np.random.default_rng(0).standard_normal((8, 64), np.float32)
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


def flipped(array):
    """With one bit changed."""
    array = array.copy()
    array.view(np.uint8)[-2, -1] ^= 1
    return array


def test_last_byte_of_several_pieces_is_seen(monkeypatch):
    monkeypatch.setattr(nf4, "_PIECE", 1000)
    one, changed = fingerprint_tree(tree()), tree()
    changed["a"]["weight"].view(np.uint8)[-1, -1] ^= 1
    assert fingerprint_tree(changed) != one
    assert fingerprint_tree(tree()) == one


QUARTER = np.float32(0.25) * np.ones(())


@pytest.mark.parametrize(
    "name, change",
    [
        ("a", lambda a: {"weight": flipped(a["weight"])}),
        ("a", lambda a: {"other": a["weight"]}),
        ("a", lambda a: {"weight": a["weight"].reshape(16, 32)}),
        ("a", lambda a: {"weight": a["weight"].view(np.uint16)}),
        ("b", lambda b: dataclasses.replace(b, codes=flipped(b.codes))),
        ("b", lambda b: dataclasses.replace(b, nested_offset=QUARTER)),
        ("b", lambda b: dataclasses.replace(b, dtype="float16")),
        ("c", lambda c: c.reshape(1)),
    ],
)
def test_any_change_is_seen(name, change):
    changed = tree()
    changed[name] = change(changed[name])
    assert fingerprint_tree(changed) != fingerprint_tree(tree())
