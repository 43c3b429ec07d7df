"""Groups of parameters beside torch's AdamW, and 8-bit tables beside bitsandbytes."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from qlora_jax.training.config import ParameterGroup, TrainConfig
from qlora_jax.training.optimizer import SIGNED, UNSIGNED, make_optimizer

pytestmark = pytest.mark.peer

STEPS = 12
FACTORS = {"lora_A": (2, 4, 16), "lora_B": (2, 16, 4)}
FACTORS["lora_magnitude_vector"] = (2, 16)
SHAPES = {
    "model": {
        "layers": {"self_attn": {"q_proj": FACTORS}},
        "norm": {"weight": (16,)},
        "embed_tokens": {"weight": (24, 16)},
    },
    "lm_head": {"weight": (24, 16)},
}
CONFIG = TrainConfig(
    **dict(steps=STEPS, learning_rate=0.02, weight_decay=0.1, warmup_steps=3),
    **dict(embedding_learning_rate=0.005, loraplus_lr_ratio=8.0),
    groups=(ParameterGroup("lm_head", learning_rate=0.05, weight_decay=0.3),),
)
# Peak rate and decay of each parameter, as the settings say.
EXPECTED = {
    **{"lora_A": (0.02, 0.1), "lora_B": (0.16, 0.1), "norm": (0.02, 0.0)},
    **{"lora_magnitude_vector": (0.02, 0.0), "embed_tokens": (0.005, 0.1)},
    "lm_head": (0.05, 0.3),
}


def name_of(path):
    keys = [key.key for key in path]
    return next(name for name in reversed(keys) if name in EXPECTED)


def values(seed, scale=1.0):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: (scale * rng.standard_normal(shape)).astype(np.float32),
        SHAPES,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def test_groups_are_those_of_torch(torch):
    start = values(0)
    # Some of the gradients are clipped, and some are not.
    gradients = [values(1 + i, 0.2 if i % 2 else 0.01) for i in range(STEPS)]

    optimizer = make_optimizer(CONFIG, STEPS)
    ours = jax.tree.map(jnp.asarray, start)
    state = optimizer.init(ours)
    for g in gradients:
        with jax.numpy_dtype_promotion("standard"):
            updates, state = optimizer.update(jax.tree.map(jnp.asarray, g), state, ours)
        ours = optax.apply_updates(ours, updates)

    flat = jax.tree_util.tree_leaves_with_path(start)
    theirs = [torch.nn.Parameter(torch.tensor(leaf)) for _, leaf in flat]
    peaks = [EXPECTED[name_of(path)] for path, _ in flat]
    groups = [
        {"params": [p], "lr": rate, "weight_decay": decay}
        for p, (rate, decay) in zip(theirs, peaks, strict=True)
    ]
    adamw = torch.optim.AdamW(groups, betas=(0.9, 0.999), eps=1e-8)
    for i, g in enumerate(gradients):
        factor = i / 3 if i < 3 else (STEPS - i) / (STEPS - 3)
        for group, (rate, _) in zip(adamw.param_groups, peaks, strict=True):
            group["lr"] = rate * factor
        for p, leaf in zip(theirs, jax.tree.leaves(g), strict=True):
            p.grad = torch.tensor(leaf)
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        assert (norm > 1.0) == bool(i % 2)
        adamw.step()
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-5)
    for (path, _), got, want in zip(flat, jax.tree.leaves(ours), theirs, strict=True):
        # float32 in another order; torch adds 1e-6 to the norm that it divides by.
        close(got, want.detach().numpy(), err_msg=name_of(path))


@pytest.mark.parametrize("signed", [True, False])
def test_tables_are_those_of_bitsandbytes(bitsandbytes, signed):
    want = bitsandbytes.functional.create_dynamic_map(signed=signed).numpy()
    # Ours is computed in float64 and rounded, theirs in float32.
    np.testing.assert_allclose(SIGNED if signed else UNSIGNED, want, rtol=1e-6)
