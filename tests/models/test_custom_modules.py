"""Custom modules are adapted, trained, saved, reloaded and merged by name."""

import dataclasses
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.data.config import DataConfig
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import bind
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.block import MLP, Attention
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute, Linear, RMSNorm
from qlora_jax.models.llama import Llama, add_parameters
from qlora_jax.planning.estimate import parameter_report
from qlora_jax.runs.config import CheckpointConfig, LogConfig, ModelConfig, RunConfig
from qlora_jax.runs.loading import load
from qlora_jax.runs.runner import run
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import init_state, train_step

TOKENS = jnp.asarray([[3, 5, 7, 9, 11, 2, 4, 6]], jnp.int32)
GATE = "model.layers.self_attn.gate_attn.weight"


class GatedAttention(Attention):
    """An extra linear layer, as a user would add it."""

    @nn.compact
    def __call__(self, x, rope, segments, kv=None, cached=None):
        out, kv = super().__call__(x, rope, segments, kv, cached)
        gate = Linear(x.shape[-1], self.compute, name="gate_attn")(x)
        return out * (1 + jnp.tanh(gate)), kv


class NormedMLP(nn.Module):
    """A custom block that is no subclass: another norm and another projection."""

    config: LlamaConfig
    compute: Compute

    @nn.compact
    def __call__(self, x):
        """Adds a bypass to the usual MLP."""
        mlp = MLP(self.config, self.compute, name="inner")(x)
        h = RMSNorm(1e-5, name="bypass_norm")(x)
        return mlp + Linear(x.shape[-1], self.compute, name="bypass")(h)


LORA = LoraConfig(
    r=4,
    lora_alpha=8,
    target_modules=("q_proj", "gate_attn"),
    rank_pattern={"gate_attn": 2},
    alpha_pattern={"gate_attn": 6},
)
IN_ADAPTER = {"target_modules": ("q_proj",), "modules_to_save": ("gate_attn",)}
reload = partial(load, dtype="float32", attention_cls=GatedAttention)


def with_parameters(directory, lora, seed=7, **classes):
    """(model, base) of a directory with the weights of custom modules drawn."""
    config, base = convert.load_llama(directory, quantization="nf4")
    model = Llama(config, Compute(dtype="float32", lora=lora), **classes)
    return add_parameters(model, jax.tree.map(jnp.asarray, base), jax.random.key(seed))


@pytest.fixture(scope="module")
def gated(llama_dir):
    return with_parameters(llama_dir, LORA, attention_cls=GatedAttention)


def adapted(base, lora=LORA):
    """Adapters with every value random."""
    adapters = init_adapters(jax.random.key(0), base, lora)
    rng = np.random.default_rng(1)
    return jax.tree.map(
        lambda a: a + 0.1 * rng.standard_normal(a.shape, np.float32), adapters
    )


@pytest.fixture(scope="module")
def moved(gated):
    """Random adapters of the gated model, and their logits."""
    model, base = gated
    adapters = adapted(base)
    return adapters, logits(model, base, adapters)


@pytest.fixture
def save(gated, tmp_path):
    """A function that writes the gated base and an adapter of it."""

    def save(adapters, lora=LORA):
        model, base = gated
        folder = tmp_path / "adapter"
        convert.save_llama(tmp_path / "base", model.config, jax.device_get(base))
        convert.save_adapter(folder, lora, jax.device_get(adapters), model.config)
        return folder

    return save


def trained(model, base, lora=LORA, *, steps):
    """Adapters after some steps, and the metrics of the last."""
    adapters = init_adapters(jax.random.key(0), base, lora)
    optimizer = make_optimizer(TrainConfig(steps=steps, learning_rate=1e-2), steps)
    state = init_state(adapters, optimizer, jax.random.key(2))
    step = jax.jit(partial(train_step, model=model, optimizer=optimizer))
    batch = {"tokens": TOKENS[None], "labels": TOKENS[None]}
    for _ in range(steps):
        state, metrics = step(state, base, batch)
    return state.adapters, metrics


@partial(jax.jit, static_argnames="model")
def apply(model, base, bound, **keywords):
    return model.apply({"params": base, "lora": bound}, TOKENS, **keywords)


def logits(model, base, adapters, lora=LORA):
    return apply(model, base, bind(adapters, base, lora))


def test_parameters_are_drawn_once_and_declared(llama_dir, gated):
    model, base = gated
    weight = base["model"]["layers"]["self_attn"]["gate_attn"]["weight"]
    assert weight.shape == (2, 64, 64) and weight.dtype == jnp.float32
    # Two layers, two draws.
    assert float(jnp.abs(weight[0] - weight[1]).max()) > 0.01
    assert model.config.extra_tensors == {GATE: (64, 64)}
    again, same = add_parameters(model, base, jax.random.key(99))
    assert again.config == model.config
    assert same["model"]["layers"]["self_attn"]["gate_attn"]["weight"] is weight
    # A plain Llama gets nothing.
    config, loaded = convert.load_llama(llama_dir, quantization=None)
    plain, same = add_parameters(Llama(config), loaded, jax.random.key(0))
    assert plain.config.extra_tensors == {}
    assert jax.tree.structure(same) == jax.tree.structure(loaded)


def test_its_update_follows_the_formula(gated, moved):
    model, base = gated
    adapters, got = moved
    node = adapters["model"]["layers"]["self_attn"]["gate_attn"]
    folded = jax.tree.map(lambda a: a, base)
    gate = folded["model"]["layers"]["self_attn"]["gate_attn"]
    gate["weight"] = gate["weight"] + 3.0 * jnp.einsum(
        "lor,lri->loi", node["lora_B"], node["lora_A"]
    )
    rest = jax.tree.map(lambda a: a, adapters)
    zeros = jax.tree.map(jnp.zeros_like, node)
    rest["model"]["layers"]["self_attn"]["gate_attn"] = zeros
    expected = logits(model, folded, rest)
    np.testing.assert_allclose(got, expected, atol=1e-5)


def test_trained_weights_survive_saving_and_reloading(gated, save):
    model, base = gated
    adapters, metrics = trained(model, base, steps=3)
    assert bool(metrics["finite"])
    moved = adapters["model"]["layers"]["self_attn"]["gate_attn"]["lora_B"]
    assert float(jnp.abs(moved).max()) > 0
    folder = save(
        adapters, dataclasses.replace(LORA, base_model_name_or_path="../base")
    )
    names = set(convert.peft.open_adapter(folder)[1])
    module = "base_model.model.model.layers.1.self_attn.gate_attn"
    assert {f"{module}.lora_A.weight", f"{module}.lora_B.weight"} <= names

    again = reload(folder)
    assert again.config.extra_tensors == {GATE: (64, 64)}
    expected = logits(model, base, adapters)
    np.testing.assert_allclose(again.logits(TOKENS), expected, atol=1e-6)
    # Generation goes through the same module, cache and all.
    held, mask = again.variables, jnp.ones_like(TOKENS)
    rows = apply(again.module, held["params"], held["lora"], attention_mask=mask)
    np.testing.assert_allclose(rows, expected, atol=1e-6)
    # Without the class there is an error, not another model.
    with pytest.raises(UserError, match=r"gate_attn.*attention_cls"):
        load(folder, dtype="float32")


def test_merged_weights_compute_the_same(moved, save, tmp_path):
    adapters, expected = moved
    folder = save(adapters)
    convert.merge(tmp_path / "base", folder, tmp_path / "out", onto="dequantized")
    merged = reload(tmp_path / "out", quantization=None)
    np.testing.assert_allclose(merged.logits(TOKENS), expected, atol=3e-5)


def test_weights_may_be_in_the_adapter_only(llama_dir, tmp_path):
    lora = dataclasses.replace(
        LORA, base_model_name_or_path=str(llama_dir), **IN_ADAPTER
    )
    model, base = with_parameters(llama_dir, lora, attention_cls=GatedAttention)
    adapters = adapted(base, lora)
    folder = tmp_path / "adapter"
    convert.save_adapter(folder, lora, jax.device_get(adapters), model.config)
    got = reload(folder, quantization="nf4").logits(TOKENS)
    np.testing.assert_allclose(got, logits(model, base, adapters, lora), atol=1e-6)


def test_weights_that_are_stored_nowhere_are_refused(llama_dir):
    with pytest.raises(UserError, match=r"has no .*gate_attn.*modules_to_save"):
        reload(llama_dir)


class Float32MLP(MLP):
    @nn.compact
    def __call__(self, x):
        return super().__call__(x).astype(jnp.float32)


class Float32Attention(Attention):
    @nn.compact
    def __call__(self, x, rope, segments, kv=None, cached=None):
        out, kv = super().__call__(x, rope, segments, kv, cached)
        return out.astype(jnp.float32), kv


@pytest.mark.parametrize(
    "classes", [{"mlp_cls": Float32MLP}, {"attention_cls": Float32Attention}]
)
def test_an_output_of_another_dtype_is_refused_by_the_name_of_its_class(
    llama_dir, classes
):
    name = next(iter(classes.values())).__name__
    with pytest.raises(UserError, match=rf"`{name}` returns float32\[1, 1, 64\] for"):
        load(llama_dir, dtype="bfloat16", **classes)


def test_a_custom_block_may_nest_the_usual_mlp(llama_dir):
    config, base = convert.load_llama(llama_dir, quantization=None)
    base = jax.tree.map(jnp.asarray, base)
    # The usual MLP under another path: its weights go where the block looks for them.
    layers = base["model"]["layers"]
    layers["mlp"] = {**layers["mlp"], "inner": dict(layers["mlp"])}
    lora = LoraConfig(r=2, target_modules=("bypass",), modules_to_save=("bypass_norm",))
    model = Llama(config, Compute(dtype="float32", lora=lora), mlp_cls=NormedMLP)
    model, base = add_parameters(model, base, jax.random.key(0))
    added = set(model.config.extra_tensors)
    names = ("bypass", "bypass_norm")
    assert added >= {f"model.layers.mlp.{name}.weight" for name in names}
    adapters, metrics = trained(model, base, lora, steps=2)
    assert bool(metrics["finite"])
    mlp = adapters["model"]["layers"]["mlp"]
    for layer in mlp["bypass"]["lora_B"]:
        assert float(jnp.abs(layer).max()) > 0
    norm = mlp["bypass_norm"]["weight"]
    assert float(jnp.abs(norm - 1.0).max()) > 0  # norms have a gradient


def test_a_target_that_matches_nothing_lists_near_matches(gated):
    _, base = gated
    with pytest.raises(UserError, match=r"gate_atn.*Did you mean `gate_attn"):
        init_adapters(jax.random.key(0), base, LoraConfig(target_modules=("gate_atn",)))


def test_the_report_counts_custom_modules(gated):
    model, _ = gated
    report = parameter_report(model.config, LORA)
    plain = dataclasses.replace(model.config, extra_tensors={})
    plain = parameter_report(plain, LORA)
    assert report.groups["gate_attn"] == 2 * 2 * (64 + 64)
    assert report.base_parameters == plain.base_parameters + 2 * 64 * 64


@pytest.fixture
def run_config(llama_dir, rows_file, tmp_path):
    """A function: the settings of adapters -> those of a run of two steps."""
    return lambda lora: RunConfig(
        model=ModelConfig(path=str(llama_dir), dtype="float32"),
        data=DataConfig(path=str(rows_file), format="tokens", max_length=32),
        train=TrainConfig(steps=2, batch_size=2),
        lora=lora,
        checkpoint=CheckpointConfig(every=2),
        log=LogConfig(plot=False),
        output_dir=str(tmp_path / "run"),
    )


def test_a_run_trains_and_reloads_custom_modules(run_config):
    config = run_config(LoraConfig(r=2, **IN_ADAPTER))
    report = run(config, attention_cls=GatedAttention)
    assert report["groups"]["gate_attn"] == 2 * 64 * 64
    model = load(config.output_dir, attention_cls=GatedAttention)
    assert np.isfinite(model.logits(TOKENS)).all()
    with pytest.raises(UserError, match="gate_attn"):
        load(config.output_dir)


def test_a_run_that_would_lose_weights_is_refused(run_config, tmp_path):
    with pytest.raises(UserError, match=r"has no .*gate_attn.*save_llama"):
        run(run_config(LORA), attention_cls=GatedAttention)
    assert not (tmp_path / "run").exists()
