"""Filters and penalty beside the logits processors of transformers."""

import jax.numpy as jnp
import numpy as np
import pytest

from qlora_jax.inference.config import Sampling
from qlora_jax.inference.sampling import Rules, Values, penalize

pytestmark = pytest.mark.peer

SETTINGS = [
    {"temperature": 0.7},
    {"temperature": 1.5, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.8},
    {"temperature": 1.3, "min_p": 0.05},
    {"temperature": 0.6, "top_k": 60, "top_p": 0.95, "min_p": 0.1},
    {"temperature": 2.0, "top_k": 500, "top_p": 0.5, "min_p": 0.3},
    {"temperature": 1.0, "top_p": 0.9, "repetition_penalty": 1.2},
    {"temperature": 1.0, "min_p": 0.2, "repetition_penalty": 0.8},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_processors_of_transformers_leave_the_same(torch, transformers, settings):
    rng = np.random.default_rng(0)
    logits = (3 * rng.standard_normal((8, 1000))).astype(np.float32)
    ids = rng.integers(0, 1000, (8, 30))

    # What `generate` itself makes of the settings, in its own order.
    sizes = dict(hidden_size=8, intermediate_size=8, num_attention_heads=2)
    config = transformers.LlamaConfig(vocab_size=1000, num_hidden_layers=1, **sizes)
    model = transformers.LlamaForCausalLM(config)
    wanted = transformers.GenerationConfig(
        do_sample=True, **{"top_k": 0, "top_p": 1.0} | settings
    )
    processors = model._get_logits_processor(
        generation_config=wanted,
        input_ids_seq_length=30,
        encoder_input_ids=None,
        prefix_allowed_tokens_fn=None,
        logits_processor=transformers.LogitsProcessorList(),
    )
    theirs = processors(torch.tensor(ids), torch.tensor(logits)).numpy()

    sampling = Sampling(**settings)
    values = Values.of(sampling)
    seen = np.zeros(logits.shape, bool)
    np.put_along_axis(seen, ids, True, axis=1)
    ours = penalize(jnp.asarray(logits), jnp.asarray(seen), values.repetition_penalty)
    ours = Rules.of(sampling, 1000).filter(ours / values.temperature, values)

    assert np.array_equal(np.isfinite(ours), np.isfinite(theirs))
    left = np.isfinite(theirs)
    assert left.any(axis=1).all() and (len(settings) == 1) == left.all()
    # A division and a multiplication, rounded once each.
    np.testing.assert_allclose(np.asarray(ours)[left], theirs[left], rtol=3e-7)
