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
from qlora_jax.models.llama import Block, Llama
from qlora_jax.models.rope import inverse_frequencies, rope_table
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.objectives import loss_sum
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.parameter_groups import schedule
from qlora_jax.training.step import eval_step, init_state, train_step

pytestmark = [pytest.mark.golden, pytest.mark.usefixtures("optimized")]

LOGITS, LOSS, ADAPTER = 3e-5, 1e-5, 2e-5

BASES = {
    "llama32/fp32": "fp32",
    "llama2/fp32_sharded": "fp32",
    "llamabias/fp32": "fp32",
    "llama32/nf4": "nf4",
    "llama32/nf4_dq": "nf4_dq",
    "llama2/nf4": "nf4",
}


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
    family, kind = name.split("/")[0], BASES[name]
    stored = dict(np.load(golden / family / "logits_fp32.npz"))
    if kind != "fp32":
        stored = {k: v for k, v in stored.items() if "logits" not in k}
        stored |= np.load(golden / family / f"logits_{kind}.npz")
    return {
        k: jnp.asarray(v, jnp.int32) if v.dtype.kind == "i" else v
        for k, v in stored.items()
    }


@functools.partial(jax.jit, static_argnames="model")
def logits(model, variables, tokens, **keywords):
    return model.apply(variables, tokens, **keywords)


def close(got, want, tolerance, where=None):
    difference = np.abs(np.asarray(got) - want)
    if where is not None:
        difference = difference * np.asarray(where)
    assert difference.max() <= tolerance


def test_the_files_cover_what_they_should(golden):
    for name in BASES:
        assert (golden / name / "config.json").is_file()
    configs = [
        LlamaConfig.from_hf(json.loads((golden / n / "config.json").read_text()))
        for n in BASES
    ]
    assert {c.tie_word_embeddings for c in configs} == {True, False}
    assert any(c.attention_bias and c.mlp_bias for c in configs)
    assert any(c.rope_scaling is not None for c in configs)
    assert any(c.intermediate_size % 64 for c in configs)


@pytest.mark.parametrize(
    "name, attention",
    [(name, "xla") for name in BASES] + [(n, "eager") for n in BASES if "fp32" in n],
)
def test_logits(golden, read, name, attention):
    config, base = read(name)
    stored = outputs(golden, name)
    model = Llama(config, Compute(dtype="float32", attention=attention))
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
@pytest.mark.parametrize("name", ["llama32/fp32", "llama2/fp32_sharded"])
def test_packed_rows_equal_the_documents_apart(golden, read, name, attention):
    config, base = read(name)
    stored = outputs(golden, name)
    model = Llama(config, Compute(dtype="float32", attention=attention))
    positions = stored["packed_pos"]
    segments = jnp.cumsum(positions == 0, axis=-1).astype(jnp.int32)
    assert segments.max() > 1
    got = logits(
        model,
        {"params": base},
        stored["packed_ids"],
        positions=positions,
        segment_ids=segments,
    )
    close(got[0], stored["packed_logits_separate"], LOGITS)


@pytest.mark.parametrize("name", ["llama32/fp32", "llama2/fp32_sharded"])
def test_rotary_frequencies(golden, read, name):
    # float32 powers of two libraries: an ulp or two.
    want = outputs(golden, name)["inv_freq"]
    got = inverse_frequencies(read(name)[0])
    np.testing.assert_allclose(got, want, rtol=3e-7)


@pytest.mark.parametrize("name", ["llama32/fp32", "llama2/fp32_sharded"])
def test_hidden_states(golden, read, name):
    config, base = read(name)
    stored = outputs(golden, name)
    compute = Compute(dtype="float32")
    tokens = stored["ids"]
    x = base["model"]["embed_tokens"]["weight"][tokens]
    rope = rope_table(jnp.arange(tokens.shape[1])[None], config)
    first = jax.tree.map(lambda a: a[0], base["model"]["layers"])
    block = jax.jit(Block(config, compute).apply)
    (x, _), _ = block({"params": first}, (x, None), rope, None, None, None)
    # Of the size of the logits, made by fewer operations.
    close(x, stored["hidden_after_layer0"], LOGITS)
    whole = functools.partial(Llama(config, compute).apply, method="hidden_states")
    hidden = jax.jit(whole)({"params": base}, tokens)
    close(hidden, stored["hidden_final_normed"], LOGITS)


@pytest.mark.parametrize("name", ["llama32/fp32", "llama2/fp32_sharded"])
def test_loss(golden, read, name):
    config, base = read(name)
    stored = outputs(golden, name)
    model = Llama(config, Compute(dtype="float32"))
    batch = {
        "tokens": stored["ids_right"],
        "labels": stored["labels_right"],
        "attention_mask": stored["mask_right"],
    }
    evaluate = jax.jit(functools.partial(eval_step, model=model))
    total, count = evaluate({}, base, batch)
    assert abs(float(total) / int(count) - stored["loss"]) <= LOSS
    assert abs(float(total) / 200 - stored["loss_num_items_200"]) <= LOSS


@pytest.mark.parametrize("name", ["llama32/fp32", "llama2/fp32_sharded"])
def test_transformers_4_configs_say_the_same(golden, name):
    folder = golden / name
    old = folder / "config_v4_style.json"
    if not old.is_file():
        old = golden / "llama32" / "fp32" / "config_v4_style.json"
        folder = old.parent
    new = LlamaConfig.from_hf(json.loads((folder / "config.json").read_text()))
    assert LlamaConfig.from_hf(json.loads(old.read_text())) == new


# --- Adapters ---


ADAPTED = {
    "llama32/plain": "llama32/fp32",
    "llama32/rslora": "llama32/fp32",
    "llama32/dora": "llama32/fp32",
    "llama32/rank_alpha_pattern": "llama32/fp32",
    "llama32/mts_embed_head": "llama32/fp32",
    "llama32/emb_lora": "llama32/fp32",
    "llama32/regex_targets": "llama32/fp32",
    "llama32/layers_to_transform": "llama32/fp32",
    "llama32/trainable_tokens": "llama32/fp32",
    "llama32/qlora_plain": "llama32/nf4_dq",
    "llamabias/bias_lora_only": "llamabias/fp32",
}


def test_every_stored_adapter_is_compared(golden):
    folders = (golden / "adapters").glob("*/*/adapter_config.json")
    assert {str(f.parent.relative_to(golden / "adapters")) for f in folders} == set(
        ADAPTED
    )


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
    lora, adapters = convert.load_adapter(
        golden / "adapters" / adapter, base, skipped=skipped
    )
    assert skipped == []
    stored = np.load(golden / "adapters" / adapter / "logits.npz")
    model = Llama(config, Compute(dtype="float32"))
    tokens = jnp.asarray(stored["ids"], jnp.int32)
    got = adapted_logits(model, base, bind(adapters, base, lora), tokens)
    close(got, stored["logits"], LOGITS)
    plain = logits(model, {"params": base}, tokens)
    close(plain[0, -1], stored["logits_base_row0_last"], LOGITS)
    assert np.abs(np.asarray(plain) - stored["logits"]).max() > 0.1  # it does something
    if lora.uniform:  # one scaling for all: what the settings of the model say
        model = Llama(config, Compute(dtype="float32", lora=lora))
        unbound = adapted_logits(model, base, adapters, tokens)
        np.testing.assert_array_equal(unbound, got)


def test_a_merged_adapter_gives_the_logits_of_peft(golden, read):
    config, base = read("llama32/fp32")
    folder = golden / "adapters" / "llama32" / "plain"
    lora, adapters = convert.load_adapter(folder, config)
    merged = jax.tree.map(lambda a: a, base)
    for block, modules in adapters["model"]["layers"].items():
        for module, part in modules.items():
            update = jnp.einsum(
                "lor,lri->loi", part["lora_B"], part["lora_A"], precision="highest"
            )
            target = merged["model"]["layers"][block][module]
            target["weight"] = target["weight"] + lora.scaling * update
    stored = np.load(folder / "logits.npz")
    rows = stored["logits_merged"].shape[0]
    tokens = jnp.asarray(stored["ids"][:rows], jnp.int32)
    model = Llama(config, Compute(dtype="float32"))
    got = logits(model, {"params": merged}, tokens)
    close(got, stored["logits_merged"], LOGITS)


# --- Training ---


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
    settings = TrainConfig(
        steps=30,
        learning_rate=1e-3,
        warmup_steps=3,
        batch_size=4,
        gradient_accumulation_steps=micro,
    )
    optimizer = make_optimizer(settings, 30)
    # Trained rows are padded on the right and carry no mask: causality keeps the
    # padding out of every supervised position.
    lora = LoraConfig(r=8, lora_alpha=16)
    model = Llama(config, Compute("float32", attention=attention, lora=lora))
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
        path = folder / f"adapter_{name}.safetensors"
        want = adapter(path)
        got = after[number]
        if name != "final":  # whether its name counts from 0 or from 1
            got = min((after[number], after[number + 1]), key=lambda t: apart(t, want))
        assert apart(got, want) <= ADAPTER
    batch = {"tokens": jnp.asarray(tokens[0, 0]), "labels": jnp.asarray(labels[0, 0])}
    evaluate = jax.jit(functools.partial(eval_step, model=model))
    total, count = evaluate(state.adapters, base, batch)
    assert abs(float(total) / int(count) - stored["final_eval_loss_batch0"]) <= LOSS


def apart(a, b):
    """Largest difference of two trees."""
    parts = jax.tree.map(lambda x, y: np.abs(np.asarray(x) - np.asarray(y)).max(), a, b)
    return max(jax.tree.leaves(parts))


def test_learning_rates(golden):
    stored = np.load(golden / "train" / "base" / "run.npz")
    rate = schedule(TrainConfig(steps=30, learning_rate=1e-3, warmup_steps=3), 30)
    got = [float(rate(jnp.asarray(i))) for i in range(30)]
    np.testing.assert_allclose(got, stored["lr"], rtol=1e-6, atol=1e-12)  # float32


def test_first_gradients(golden, read, adapter):
    folder = golden / "train" / "base"
    stored = np.load(folder / "run.npz")
    config, base = read("llama32/nf4_dq")
    lora = LoraConfig(r=8, lora_alpha=16)
    model = Llama(config, Compute("float32", lora=lora))
    batch = {
        "tokens": jnp.asarray(stored["input_ids"][0]),
        "labels": jnp.asarray(stored["labels"][0]),
    }
    count = stored["num_label_tokens"][0]
    start = adapter(folder / "adapter_init.safetensors")
    gradient = jax.jit(
        jax.grad(lambda a: loss_sum(a, base, batch, model=model) / float(count))
    )
    got = gradient(start)
    want = adapter(folder / "grads_step0_unclipped.safetensors")
    largest = max(float(jnp.abs(w).max()) for w in jax.tree.leaves(want))
    assert largest > 1e-3
    # The relative error of the logits, 3e-5 of values of order one.
    assert apart(got, want) <= 3e-5 * largest
