"""The filters of sampling one by one and in order, and the repetition penalty."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.errors import UserError
from qlora_jax.inference.config import Sampling
from qlora_jax.inference.sampling import Rules, Values, penalize

PROBABILITIES = [0.3, 0.06, 0.4, 0.2, 0.04]


def kept(probabilities, **settings):
    """Returns the indices of the tokens that remain."""
    sampling = Sampling(temperature=1.0, **settings)
    logits = jnp.log(jnp.asarray([probabilities], jnp.float32))
    rules = Rules.of(sampling, len(probabilities))
    left = rules.filter(logits, Values.of(sampling))
    return np.flatnonzero(np.isfinite(left[0])).tolist()


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"top_k": 1}, [2]),
        ({"top_k": 3}, [0, 2, 3]),
        ({"top_k": 5}, [0, 1, 2, 3, 4]),
        ({"top_k": 50}, [0, 1, 2, 3, 4]),
        # The smallest set of the likeliest that holds top_p: 0.4, 0.7, 0.9, ...
        ({"top_p": 0.39}, [2]),
        ({"top_p": 0.41}, [0, 2]),
        ({"top_p": 0.69}, [0, 2]),
        ({"top_p": 0.71}, [0, 2, 3]),
        ({"top_p": 0.99}, [0, 1, 2, 3, 4]),
        # First top_k; the nucleus is that of what is left, 0.4 / 0.7 and 0.3 / 0.7.
        ({"top_p": 0.5, "top_k": 2}, [2]),
        ({"top_p": 0.6, "top_k": 2}, [0, 2]),
        # At least so much of the likeliest one's 0.4: 0.2 is half, 0.06 is 0.15 of it.
        ({"min_p": 0.1}, [0, 1, 2, 3, 4]),
        ({"min_p": 0.14}, [0, 1, 2, 3]),
        ({"min_p": 0.16}, [0, 2, 3]),
        ({"min_p": 0.51}, [0, 2]),
        ({"min_p": 0.76}, [2]),
        ({"min_p": 1.0}, [2]),
        ({"min_p": 0.14, "top_k": 3}, [0, 2, 3]),
        ({"min_p": 0.51, "top_p": 0.99}, [0, 2]),
    ],
    ids=str,
)
def test_filters_keep_the_expected_tokens(settings, expected):
    assert kept(PROBABILITIES, **settings) == expected


def test_the_penalty_lowers_seen_tokens():
    logits = jnp.asarray([[2.0, -2.0, 2.0, -2.0]])
    seen = jnp.asarray([[True, True, False, False]])
    out = penalize(logits, seen, jnp.float32(1.25))
    np.testing.assert_allclose(out, [[1.6, -2.5, 2.0, -2.0]], rtol=1e-6)  # one rounding


def test_values_of_settings_do_not_recompile():
    def rules(**settings):
        return Rules.of(Sampling(**settings), 8)

    assert rules(top_k=3, top_p=0.5, min_p=0.5) == rules()
    warm = rules(temperature=0.5, top_p=0.9)
    assert warm == rules(temperature=2.0, top_p=0.1, seed=4)
    assert rules(repetition_penalty=2.0) != rules()


def test_all_invalid_settings_are_listed_at_once():
    message = "2 problems with the sampling settings:"
    with pytest.raises(UserError, match=message) as raised:
        Sampling(top_p=3.0, min_p=2.0)
    starts = [problem[:18] for problem in raised.value.problems]
    assert starts == ["sampling: `top_p` ", "sampling: `min_p` "]
