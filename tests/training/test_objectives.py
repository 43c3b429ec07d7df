import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from qlora_jax.data.encoding import IGNORE
from qlora_jax.models.llama import Llama
from qlora_jax.training.objectives import embedding_noise, head_variables, text_lengths
from tests.models.reference import CONFIG


def test_each_token_has_the_length_of_its_document():
    labels = jnp.full((2, 6), IGNORE)
    packed = jnp.asarray([[1, 1, 1, 2, 2, 0], [1, 2, 2, 2, 2, 2]], jnp.int32)
    lengths = text_lengths({"labels": labels, "segment_ids": packed})
    # Two documents of three and two tokens and a pad; one and five.
    assert lengths.tolist() == [[3, 3, 3, 2, 2, 1], [1, 5, 5, 5, 5, 5]]
    # Ids of a caller's own batch may be any.
    chosen = jnp.asarray([[90, 90, 90, -7, -7, 0], [8, 9, 9, 8, 8, 8]], jnp.int32)
    lengths = text_lengths({"labels": labels, "segment_ids": chosen})
    assert lengths.tolist() == [[3, 3, 3, 2, 2, 1], [4, 2, 2, 4, 4, 4]]
    masked = jnp.asarray([[1, 1, 1, 1, 0, 0], [0, 0, 0, 0, 0, 1]], jnp.int32)
    lengths = text_lengths({"labels": labels, "attention_mask": masked})
    assert lengths[:, 0].tolist() == [4, 1]
    # With neither: up to the last supervised token.
    supervised = labels.at[0, 2].set(7).at[0, 4].set(7)
    assert text_lengths({"labels": supervised})[:, 0].tolist() == [5, 1]


def test_noise_is_uniform_with_the_bound_of_the_paper():
    labels = jnp.zeros((2, 400), jnp.int32).at[0, 100:].set(IGNORE)
    noise = embedding_noise(
        {"labels": labels}, jax.random.key(0), alpha=5.0, features=64
    )
    for row, length in enumerate((100, 400)):
        bound = 5.0 / math.sqrt(length * 64)
        drawn = np.asarray(noise[row], np.float64) / bound
        # 25,600 draws of a uniform distribution on [-1, 1].
        assert 0.999 < np.abs(drawn).max() <= 1 + 1e-6
        assert abs(drawn.mean()) < 0.02 and abs(drawn.var() - 1 / 3) < 0.01


def test_the_head_reads_its_part_of_the_variables():
    table, head, norm = ({"weight": jnp.full((8, 4), i)} for i in range(3))
    body = {"embed_tokens": table, "norm": norm}
    params = {"model": body, "lm_head": head}
    adapters = {"model": {"embed_tokens": {"lora_embedding_A": jnp.ones((1, 8))}}}
    selected = head_variables({"params": params, "lora": adapters}, Llama(CONFIG))
    assert selected == {"params": {"lm_head": head}, "lora": {}}
    tied = Llama(dataclasses.replace(CONFIG, tie_word_embeddings=True))
    selected = head_variables({"params": {"model": body}, "lora": adapters}, tied)
    assert selected == {"params": {"model": {"embed_tokens": table}}, "lora": {}}
    # A residual and an adapter of a tied head go with it.
    residual, scaling = {"residual_A": jnp.ones((1, 4))}, {"scaling": jnp.ones(())}
    selected = head_variables(
        {"params": {"model": body, "lm_head": residual}, "lora": {"lm_head": scaling}},
        tied,
    )
    assert selected["params"]["lm_head"] is residual
    assert selected["lora"] == {"lm_head": scaling}
