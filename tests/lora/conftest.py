"""The model that adapters are combined on."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

import convert


@pytest.fixture(scope="module")
def models(llama_dir):
    """(config, base) of a small model, by whether embedding and head are tied."""
    config, base = convert.load_llama(llama_dir, quantization=None)
    base = jax.tree.map(jnp.asarray, base)
    tied = dataclasses.replace(config, tie_word_embeddings=True)
    return {False: (config, base), True: (tied, {"model": base["model"]})}


@pytest.fixture(scope="module")
def base(models):
    """The base whose tables are untied."""
    return models[False][1]
