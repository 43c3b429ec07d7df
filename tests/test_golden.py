"""Our outputs against those of HF, PEFT and bitsandbytes on the same files.

Tolerances are the ones that came with the files; their reason is the spread of the
reference itself between float32 and float64 (a float64 model reproduces its logits to
7e-6): logits 3e-5, losses 1e-5, adapters after 30 steps 2e-5.
"""

import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.models.rope import inverse_frequencies
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import loss_sum
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.parameter_groups import schedule
from qlora_jax.training.step import eval_step, init_state, train_step

pytestmark = [pytest.mark.golden, pytest.mark.usefixtures("optimized")]

LOGITS, LOSS, ADAPTER = 3e-5, 1e-5, 2e-5

DENSE = ["llama32/fp32", "llama2/fp32_sharded", "llamabias/fp32"]
PACKED = ["llama32/nf4", "llama32/nf4_dq", "llama2/nf4"]
# Two of them come with more than their logits.
MORE = pytest.mark.parametrize("name", DENSE[:2])
LORA = LoraConfig(r=8, lora_alpha=16)


def float32(**settings):
    return Compute(dtype="float32", **settings)


@pytest.fixture(scope="module")
def read(golden):
    """A function: directory -> (config, base on the device); each is read once."""

    @functools.cache
    def read(name):
        config, base = convert.load_llama(golden / name, quantization=None)
        return config, jax.tree.map(jnp.asarray, base)

    return read


def outputs(golden, name):
    """Stored inputs of a base, and the outputs of this form of it."""
    family, kind = name.split("/")
    stored = dict(np.load(golden / family / "logits_fp32.npz"))
    if name in PACKED:
        stored = {k: v for k, v in stored.items() if "logits" not in k}
        stored |= np.load(golden / family / f"logits_{kind}.npz")
    return {
        k: jnp.asarray(v, jnp.int32) if v.dtype.kind == "i" else v
        for k, v in stored.items()
    }


def read_config(file):
    return LlamaConfig.from_hf(json.loads(file.read_text()))


@functools.partial(jax.jit, static_argnames="model")
def logits(model, variables, tokens, **keywords):
    return model.apply(variables, tokens, **keywords)


def evaluated(model, adapters, base, batch):
    """Sum of the losses, and number of tokens."""
    return jax.jit(functools.partial(eval_step, model=model))(adapters, base, batch)


def close(got, want, tolerance, where=None):
    difference = np.abs(np.asarray(got) - want)
    if where is not None:
        difference = difference * np.asarray(where)
    assert difference.max() <= tolerance


def test_the_files_cover_what_they_should(golden):
    configs = [read_config(golden / name / "config.json") for name in DENSE + PACKED]
    assert {c.tie_word_embeddings for c in configs} == {True, False}
    assert any(c.attention_bias and c.mlp_bias for c in configs)
    assert any(c.rope_scaling is not None for c in configs)
    assert any(c.intermediate_size % 64 for c in configs)


@pytest.mark.parametrize(
    "name, attention",
    [(name, "xla") for name in DENSE + PACKED] + [(name, "eager") for name in DENSE],
)
def test_logits(golden, read, name, attention):
    config, base = read(name)
    stored = outputs(golden, name)
    model = Llama(config, float32(attention=attention))
    call = functools.partial(logits, model, {"params": base})
    close(call(stored["ids"]), stored["logits"], LOGITS)
    if "ids_right" not in stored:
        return
    counted = jnp.broadcast_to(jnp.arange(48)[None], (3, 48))
    for case, ids, positions in (
        ("right", "right", counted),
        ("left_pos", "left", stored["pos_left"]),
        ("left_arange", "left", counted),
    ):
        mask = stored[f"mask_{ids}"]
        got = call(stored[f"ids_{ids}"], attention_mask=mask, positions=positions)
        close(got[..., ::8], stored[f"logits_{case}_v8"], LOGITS, mask[..., None])


@pytest.mark.parametrize("attention", ["eager", "xla"])
@MORE
def test_packed_rows_equal_the_documents_apart(golden, read, name, attention):
    config, base = read(name)
    stored = outputs(golden, name)
    model = Llama(config, float32(attention=attention))
    positions = stored["packed_pos"]
    segments = jnp.cumsum(positions == 0, axis=-1).astype(jnp.int32)
    assert segments.max() > 1
    where = {"positions": positions, "segment_ids": segments}
    got = logits(model, {"params": base}, stored["packed_ids"], **where)
    close(got[0], stored["packed_logits_separate"], LOGITS)


@MORE
def test_rotary_frequencies(golden, read, name):
    # float32 powers of two libraries: an ulp or two.
    want = outputs(golden, name)["inv_freq"]
    got = inverse_frequencies(read(name)[0])
    np.testing.assert_allclose(got, want, rtol=3e-7)


@MORE
def test_loss(golden, read, name):
    config, base = read(name)
    stored = outputs(golden, name)
    names = {"tokens": "ids", "labels": "labels", "attention_mask": "mask"}
    batch = {name: stored[f"{key}_right"] for name, key in names.items()}
    total, count = evaluated(Llama(config, float32()), {}, base, batch)
    assert abs(float(total) / int(count) - stored["loss"]) <= LOSS
    assert abs(float(total) / 200 - stored["loss_num_items_200"]) <= LOSS


def test_transformers_4_configs_say_the_same(golden):
    old = golden / "llama32" / "fp32" / "config_v4_style.json"
    assert read_config(old) == read_config(old.with_name("config.json"))


# --- Adapters ---


ADAPTED = {
    **{
        f"llama32/{name}": "llama32/fp32"
        for name in (
            *("plain", "rslora", "dora", "rank_alpha_pattern", "mts_embed_head"),
            *("emb_lora", "regex_targets", "layers_to_transform", "trainable_tokens"),
        )
    },
    "llama32/qlora_plain": "llama32/nf4_dq",
    "llamabias/bias_lora_only": "llamabias/fp32",
}


def test_every_stored_adapter_is_compared(golden):
    folders = (golden / "adapters").glob("*/*/adapter_config.json")
    found = {str(f.parent.relative_to(golden / "adapters")) for f in folders}
    assert found == set(ADAPTED)


# Optimizing takes most of the time of these, and changes no arithmetic.
@functools.partial(
    jax.jit,
    static_argnames="model",
    compiler_options={"xla_backend_optimization_level": 0},
)
def adapted_logits(model, base, bound, tokens):
    return model.apply({"params": base, "lora": bound}, tokens)


@pytest.mark.parametrize("adapter", ADAPTED)
def test_adapted_logits(golden, read, adapter):
    config, base = read(ADAPTED[adapter])
    # With the base at hand, PEFT's copies of its tables are compared with it.
    skipped = []
    folder = golden / "adapters" / adapter
    lora, adapters = convert.load_adapter(folder, base, skipped=skipped)
    # PEFT's merged weights are stored beside most of them, and are not read.
    assert all("merged_changed" in note for note in skipped)
    stored = np.load(folder / "logits.npz")
    model = Llama(config, float32())
    tokens = jnp.asarray(stored["ids"], jnp.int32)
    got = adapted_logits(model, base, bind(adapters, base, lora), tokens)
    close(got, stored["logits"], LOGITS)
    plain = logits(model, {"params": base}, tokens)
    close(plain[0, -1], stored["logits_base_row0_last"], LOGITS)
    assert np.abs(np.asarray(plain) - stored["logits"]).max() > 0.1  # it does something
    if lora.uniform:  # one scaling for all: what the settings of the model say
        model = Llama(config, float32(lora=lora))
        unbound = adapted_logits(model, base, adapters, tokens)
        np.testing.assert_array_equal(unbound, got)


def test_a_merged_adapter_gives_the_logits_of_peft(golden, read):
    config, base = read("llama32/fp32")
    folder = golden / "adapters" / "llama32" / "plain"
    lora, adapters = convert.load_adapter(folder, config)
    merged = jax.tree.map(lambda a: a, base)
    for block, modules in adapters["model"]["layers"].items():
        for module, part in modules.items():
            b, a = part["lora_B"], part["lora_A"]
            update = jnp.einsum("lor,lri->loi", b, a, precision="highest")
            target = merged["model"]["layers"][block][module]
            target["weight"] = target["weight"] + lora.scaling * update
    stored = np.load(folder / "logits.npz")
    rows = stored["logits_merged"].shape[0]
    tokens = jnp.asarray(stored["ids"][:rows], jnp.int32)
    got = logits(Llama(config, float32()), {"params": merged}, tokens)
    close(got, stored["logits_merged"], LOGITS)


# --- Training ---

SETTINGS = TrainConfig(steps=30, learning_rate=1e-3, warmup_steps=3)


@pytest.fixture
def adapter(golden, read, tmp_path):
    """A function: stored safetensors -> adapter tree, through the PEFT reader."""
    config, _ = read("llama32/nf4_dq")
    source = golden / "adapters" / "llama32" / "plain" / "adapter_config.json"
    shutil.copy(source, tmp_path / "adapter_config.json")

    def adapter(path):
        shutil.copy(path, tmp_path / "adapter_model.safetensors")
        lora, tree = convert.load_adapter(tmp_path, config)
        assert (lora.r, lora.lora_alpha) == (8, 16)
        return jax.tree.map(jnp.asarray, tree)

    return adapter


@pytest.mark.parametrize(
    "run, micro, attention", [("base", 1, "xla"), ("grad_accum2_tokens", 2, "eager")]
)
def test_thirty_training_steps(golden, read, adapter, run, micro, attention):
    folder = golden / "train" / run
    stored = np.load(folder / "run.npz")
    config, base = read("llama32/nf4_dq")
    optimizer = make_optimizer(SETTINGS, 30)
    # Trained rows are padded on the right and carry no mask: causality keeps the
    # padding out of every supervised position.
    model = Llama(config, float32(attention=attention, lora=LORA))
    step = jax.jit(
        functools.partial(train_step, model=model, optimizer=optimizer),
        donate_argnums=0,
    )
    start = adapter(folder / "adapter_init.safetensors")
    state = init_state(start, optimizer, jax.random.key(0))
    shape = (30, micro, *stored["input_ids"].shape[1:])
    tokens = stored["input_ids"].reshape(shape).astype(np.int32)
    labels = stored["labels"].reshape(shape).astype(np.int32)
    after = {}
    for i in range(30):
        batch = {"tokens": jnp.asarray(tokens[i]), "labels": jnp.asarray(labels[i])}
        state, metrics = step(state, base, batch)
        assert abs(metrics["loss"] - stored["loss"][i]) <= LOSS
        # The loss' relative error, times the few operations of a norm.
        assert abs(metrics["grad_norm"] / stored["grad_norm"][i] - 1) <= 1e-5
        assert metrics["supervised_tokens"] == stored["num_label_tokens"][i]
        after[i + 1] = jax.tree.map(np.asarray, state.adapters)
    assert step._cache_size() == 1
    for name, number in (("after_step2", 2), ("after_step5", 5), ("final", 30)):
        want = adapter(folder / f"adapter_{name}.safetensors")
        got = after[number]
        if name != "final":  # whether its name counts from 0 or from 1
            got = min((after[number], after[number + 1]), key=lambda t: apart(t, want))
        assert apart(got, want) <= ADAPTER
    batch = {"tokens": jnp.asarray(tokens[0, 0]), "labels": jnp.asarray(labels[0, 0])}
    total, count = evaluated(model, state.adapters, base, batch)
    assert abs(float(total) / int(count) - stored["final_eval_loss_batch0"]) <= LOSS


def apart(a, b):
    """Largest difference of two trees."""
    parts = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
    return max(jax.tree.leaves(parts))


def test_learning_rates(golden):
    stored = np.load(golden / "train" / "base" / "run.npz")
    rate = schedule(SETTINGS, 30)
    got = [float(rate(jnp.asarray(i))) for i in range(30)]
    np.testing.assert_allclose(got, stored["lr"], rtol=1e-6, atol=1e-12)  # float32


def test_first_gradients(golden, read, adapter):
    folder = golden / "train" / "base"
    stored = np.load(folder / "run.npz")
    config, base = read("llama32/nf4_dq")
    model = Llama(config, float32(lora=LORA))
    names = {"tokens": "input_ids", "labels": "labels"}
    batch = {name: jnp.asarray(stored[key][0]) for name, key in names.items()}
    count = float(stored["num_label_tokens"][0])
    gradient = jax.grad(lambda a: loss_sum(a, base, batch, model=model) / count)
    got = jax.jit(gradient)(adapter(folder / "adapter_init.safetensors"))
    want = adapter(folder / "grads_step0_unclipped.safetensors")
    largest = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(want))
    assert largest > 1e-3
    # The relative error of the logits, 3e-5 of values of order one.
    assert apart(got, want) <= 3e-5 * largest
