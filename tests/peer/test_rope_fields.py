"""Rope fields in every form: the frequencies are those of transformers."""

import numpy as np
import pytest

from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.rope import inverse_frequencies
from tests.models.test_config import ROPE_FIELDS, TINY

pytestmark = [pytest.mark.peer, pytest.mark.filterwarnings("ignore")]


@pytest.mark.parametrize("fields", [case[0] for case in ROPE_FIELDS])
def test_frequencies_are_those_of_transformers(fields, transformers):
    raw = {**TINY, **fields}
    # transformers writes into the objects that it is given.
    theirs = transformers.LlamaConfig.from_dict(
        {k: dict(v) if isinstance(v, dict) else v for k, v in raw.items()}
    )
    rotary = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    config = LlamaConfig.from_hf(raw)
    for read in (config, LlamaConfig.from_hf(config.to_hf())):
        ours = inverse_frequencies(read)
        np.testing.assert_allclose(ours, rotary.inv_freq.numpy(), rtol=1e-6)
