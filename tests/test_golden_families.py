"""The families beside Llama, against transformers, PEFT and bitsandbytes on the same
files.

Tolerances are the ones that came with the files: logits 3e-5 of the largest logit or 1,
losses 2e-5, adapters after ten steps 5e-5.
"""

import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.inference.decode import generate_tokens
from qlora_jax.lora.functional import bind
from qlora_jax.models.families import FAMILIES
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import loss_sum
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import init_state, train_step

pytestmark = pytest.mark.golden

LOGITS, LOSS, ADAPTER = 3e-5, 2e-5, 5e-5

# Directory -> what it is there for.
NAMES = {
    "gemma": "offset norms, scaled embeddings, tanh gelu",
    "gemma2": "post-norms, soft caps, alternating windows",
    "gemma3_text": "q/k norms, windows with a theta of their own",
    "granite": "four multipliers",
    "mistral": "one window",
    "mistral_nemo": "a free head_dim",
    "phi3": "fused projections, one window",
    "phi4_mini": "partial rotation, LongRoPE",
    "qwen2": "biases on q, k, v",
    "qwen2_yarn": "YaRN, tied",
    "qwen3": "q/k norms",
    "smollm3": "layers without rotation",
}
# Families without a directory: each switch that they set has one.
COVERED = {"llama": "test_golden", "ministral": "gemma2", "seed_oss": "qwen2"}

# Directories that are of another `model_type` than they are named.
MODEL_TYPES = {"mistral_nemo": "mistral", "phi4_mini": "phi3", "qwen2_yarn": "qwen2"}

of_each_family = pytest.mark.parametrize("name", NAMES)


@pytest.fixture(scope="module")
def read(families):
    """A function: (name, form) -> (config, base on the device); each is read once."""

    @functools.cache
    def read(name, form="fp32"):
        config, base = convert.load_llama(families / name / form, quantization=None)
        return config, jax.tree.map(jnp.asarray, base)

    return read


@pytest.fixture(scope="module")
def families(golden):
    return golden / "families"


def stored_outputs(families, name):
    return dict(np.load(families / name / "logits.npz"))


def float32(**settings):
    return Compute(dtype="float32", **settings)


@functools.partial(jax.jit, static_argnames="model")
def logits(model, variables, tokens, **keywords):
    return model.apply(variables, tokens, **keywords)


def assert_close(got, want, where=None):
    where = np.ones(want.shape[:2], bool) if where is None else np.asarray(where, bool)
    got, want = np.asarray(got)[where], want[where]
    assert np.abs(got - want).max() <= LOGITS * max(1, np.abs(want).max())


def test_every_directory_is_compared(families):
    assert {path.parent.name for path in families.glob("*/logits.npz")} == set(NAMES)
    for name in NAMES:
        config = json.loads((families / name / "fp32" / "config.json").read_text())
        assert config["model_type"] == MODEL_TYPES.get(name, name)
    covered = {MODEL_TYPES.get(name, name) for name in NAMES} | set(COVERED)
    assert covered == set(FAMILIES)


@pytest.mark.parametrize("attention", ["eager", "xla"])
@of_each_family
def test_logits(families, read, name, attention):
    config, base = read(name)
    stored = stored_outputs(families, name)
    model = Llama(config, float32(attention=attention))
    call = functools.partial(logits, model, {"params": base})
    assert_close(call(stored["ids"]), stored["logits"])
    mask = stored["mask_left"]
    got = call(stored["ids_left"], attention_mask=mask, positions=stored["pos_left"])
    # transformers gives every row of a batch LongRoPE's frequencies of its longest row;
    # here each text has those of its own length.
    if name == "phi4_mini":
        native = config.rope_scaling.original_max_position_embeddings
        mask = mask * (mask.sum(axis=1, keepdims=True) > native)
        assert mask.any()
    assert_close(got, stored["logits_left"], mask)
    # Documents of a packed row are computed as they are apart.
    segments = stored["packed_segments"]
    positions = np.zeros_like(segments)
    for row, ids in enumerate(segments):
        for segment in set(ids):
            where = ids == segment
            positions[row, where] = np.arange(where.sum())
    got = call(stored["packed_ids"], segment_ids=segments, positions=positions)
    assert_close(got, stored["packed_logits"][None], segments > 0)


@of_each_family
def test_logits_of_nf4(families, read, name):
    config, base = read(name, "nf4_dq")
    stored = stored_outputs(families, name)
    got = logits(Llama(config, float32()), {"params": base}, stored["ids"])
    assert_close(got, stored["logits_nf4_dq"])


@of_each_family
def test_adapted_logits(families, read, name):
    config, base = read(name)
    stored = stored_outputs(families, name)
    skipped = []
    folder = families / name / "adapter"
    lora, adapters = convert.load_adapter(folder, base, skipped=skipped)
    assert skipped == []
    variables = {"params": base, "lora": bind(adapters, base, lora)}
    got = logits(Llama(config, float32()), variables, stored["ids"])
    assert_close(got, stored["logits_adapter"])
    assert np.abs(stored["logits_adapter"] - stored["logits"]).max() > 0.01


@pytest.mark.parametrize("name", sorted(set(NAMES) - {"phi4_mini"}))
def test_greedy_tokens(families, read, name):
    config, base = read(name)
    greedy = stored_outputs(families, name)["greedy"]
    (expected,) = greedy.tolist()
    model, variables = Llama(config, float32()), {"params": base}
    # With a shorter prompt beside it, so that rows are padded.
    prompts = [expected[:9], expected[:4]]
    got = generate_tokens(model, variables, prompts, max_new_tokens=24)
    assert got[0] == expected
    alone = generate_tokens(model, variables, prompts[1:], max_new_tokens=24)
    assert got[1] == alone[0]


@of_each_family
def test_files_are_written_as_they_were(families, tmp_path, name):
    for form in ("fp32", "nf4_dq"):
        source = families / name / form
        config, base = convert.load_llama(source, quantization=None)
        convert.save_llama(tmp_path / form, config, base)
        for file in ("config.json", "model.safetensors"):
            want = source / file
            got = tmp_path / form / file
            if file.endswith("json"):
                assert json.loads(got.read_text()) == json.loads(want.read_text())
            else:
                assert got.read_bytes()[8:] and same_tensors(got, want)


def same_tensors(a, b):
    from safetensors.numpy import load_file

    first, second = load_file(a), load_file(b)
    return first.keys() == second.keys() and all(
        first[key].tobytes() == second[key].tobytes() for key in first
    )


@of_each_family
def test_ten_training_steps(families, read, name):
    folder = families / name
    stored = np.load(folder / "train.npz")
    config, base = read(name)
    lora, start = convert.load_adapter(folder / "adapter", base)
    settings = TrainConfig(
        steps=10, learning_rate=1e-3, warmup_steps=0, lr_scheduler="constant"
    )
    optimizer = make_optimizer(settings, 10)
    model = Llama(config, float32(lora=lora))
    step = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer))
    start = jax.tree.map(jnp.asarray, start)
    first = jnp.asarray(stored["input_ids"][0], jnp.int32)
    batch = {"tokens": first, "labels": first}
    gradients = jax.jit(jax.grad(functools.partial(loss_sum, model=model)))(
        start, base, batch
    )
    state = init_state(start, optimizer, jax.random.key(0))
    for i in range(10):
        tokens = jnp.asarray(stored["input_ids"][i], jnp.int32)[None]
        state, metrics = step(state, base, {"tokens": tokens, "labels": tokens})
        assert abs(metrics["loss"] - stored["loss"][i]) <= LOSS
        assert abs(metrics["grad_norm"] / stored["grad_norm"][i] - 1) <= 5e-5
    _, want = convert.load_adapter(folder / "adapter_after_10_steps", base)

    def apart(got, want, gradient):
        # Adam divides by the gradient's size: where a sum of terms of order one cancels
        # to less than float32 resolves, the first step has the direction of a rounding
        # error. That is one number of phi4_mini's.
        noise = np.abs(gradient) < 1e-5 * np.abs(gradient).mean()
        assert noise.sum() <= 2
        return np.abs(np.where(noise, 0, np.asarray(got) - want)).max()

    parts = jax.tree.map(apart, state.adapters, want, gradients)
    assert max(jax.tree.leaves(parts)) <= ADAPTER


@of_each_family
def test_an_adapter_is_written_with_its_own_names(families, read, tmp_path, name):
    config, base = read(name)
    lora, adapters = convert.load_adapter(families / name / "adapter", base)
    convert.save_adapter(tmp_path / "adapter", lora, adapters, base)
    assert same_tensors(
        tmp_path / "adapter" / "adapter_model.safetensors",
        families / name / "adapter" / "adapter_model.safetensors",
    )


COMPARED = {
    "logits": (test_logits, test_logits_of_nf4),
    "adapters": (test_adapted_logits, test_an_adapter_is_written_with_its_own_names),
    "training": (test_ten_training_steps,),
    "generation": (test_greedy_tokens,),
}
"""What docs/models.md says is compared -> the tests that compare it."""


def directories(test):
    """The directories that a test is parametrized with."""
    (names,) = (
        mark.args[1]
        for mark in test.pytestmark
        if mark.name == "parametrize" and mark.args[0] == "name"
    )
    return set(names)


def compared(model_type):
    """What is compared of a family, and of it what is not of all its directories.

    Returns:
      What is compared of every directory of the family, and kind -> directories of
      which it is not.
    """
    names = {name for name in NAMES if MODEL_TYPES.get(name, name) == model_type}
    missing = {
        kind: names - set.intersection(*map(directories, tests))
        for kind, tests in COMPARED.items()
    }
    complete = [kind for kind, without in missing.items() if not without]
    parts = {
        k: without for k, without in missing.items() if without and without != names
    }
    return complete, parts
