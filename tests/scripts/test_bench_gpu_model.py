import json
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import convert
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.functional import abstract_adapters
from qlora_jax.models.params import tree_bytes
from qlora_jax.planning.estimate import abstract_base
from qlora_jax.runs.config import ModelConfig
from scripts.bench_gpu import model as bench


@pytest.fixture(scope="module")
def base(small):
    return bench.random_base(small)


def test_a_random_base_has_the_shapes_of_a_loaded_one(small, base):
    want = abstract_base(small, quantization="nf4_dq")
    assert jax.tree.structure(base) == jax.tree.structure(want)
    got = jax.tree.map(lambda a: (a.shape, a.dtype), base)
    assert got == jax.tree.map(lambda a: (a.shape, a.dtype), want)
    codes = base["model"]["layers"]["mlp"]["gate_proj"]["weight"].codes
    assert len(np.unique(np.asarray(codes))) == 256


def test_decoding_is_timed(small, base):
    how = bench.Decoding(kernels="xla", batch=2, context=20, tokens=4, repeats=1)
    result = bench.decode(small, base, how)
    assert len(result["seconds"]) == 2 and len(result["seconds"][0]) == 2
    assert result["prefill_ms"] > 0 and result["floor_tokens_per_s"] is None
    assert json.loads(json.dumps(result)) == result


def test_training_is_timed_and_learns(small, base):
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, small.vocab_size, (1, 2, 16)).astype(np.int32)
    held = {"remat": "full", "embed_tokens": "host"}
    settings = ModelConfig(path="small", dtype="float32", **held)
    how = bench.Training(settings=settings, steps=8, learning_rate=1e-2)
    result = bench.train(small, base, tokens, how)
    assert result["finite"] and result["losses"][-1] < result["losses"][0]
    assert len(result["seconds"]) == 8 and result["tokens_per_s"] > 0
    assert result["base_bytes"] == tree_bytes(base) and result["mfu"] is None
    # A CPU does not say what it has used at most.
    assert result["planned_bytes"] > tree_bytes(base) and result["peak_bytes"] is None
    assert result["plan"]["embed_tokens"] == "host" and result["policy"] == "full"
    assert json.loads(json.dumps(result)) == result


def test_figures_of_the_8b_are_the_known_ones():
    config = bench.config_of("8b")
    reads = bench.read_bytes(config, 1, 1024, 16)
    floor = bench.COPY["NVIDIA H200"] / reads["weights"]
    assert floor == pytest.approx(925, rel=1e-3)
    base = abstract_base(config, quantization="nf4_dq")
    adapters = abstract_adapters(base, LoraConfig(r=16, target_modules="all-linear"))
    assert reads["adapters"] == tree_bytes(adapters)
    assert reads["cache"] == 2 * 2 * 32 * 8 * 128 * 1024
    # 4 x (6.98 + 0.53) G, 6 x 42 M, attention 3.5 x 2 x 2048 x 4096 x 32.
    flops = bench.step_flops(config, base, adapters, 2048)
    assert flops == pytest.approx(32.15e9, rel=1e-3)


@pytest.mark.real
def test_a_checkpoint_is_trained_on_text(shared_data):
    directory = shared_data / "stories260K"
    text = "Once upon a time there was a dog. " * 40
    tokens = bench.text_batches(directory, text, 3, 2, 24)
    assert tokens.shape == (3, 2, 24) and tokens.dtype == np.int32
    config, base = convert.load_llama(directory, quantization="nf4_dq")
    settings = ModelConfig(path=str(directory), remat="save_matmuls")
    how = bench.Training(settings=settings, steps=6, learning_rate=1e-3)
    result = bench.train(config, jax.tree.map(jnp.asarray, base), tokens, how)
    assert result["losses"][-1] < result["losses"][0] < 8


def test_refused_kernels_are_not_available(monkeypatch, capsys):
    def refuse(args):
        raise ValueError("`nf4_matmul`: not on this device")

    monkeypatch.setattr(bench, "run", refuse)
    fake = SimpleNamespace(platform="gpu", device_kind="Fake GPU 1")
    monkeypatch.setattr(jax, "devices", lambda: [fake])
    assert bench.main(["train", "--kernels", "pallas"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["unavailable"] == "`nf4_matmul`: not on this device"
    with pytest.raises(ValueError, match="not on this device"):
        bench.main(["train", "--kernels", "xla"])
