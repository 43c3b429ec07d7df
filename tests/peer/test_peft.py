# Side by side with the installed transformers and PEFT, on files written on the spot.
#
# Tolerances are those of tests/test_golden.py: the spread of the reference between
# float32 and float64.

import functools
import json
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert.checkpoint import open_checkpoint, open_model
from convert.merging import write_dense
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import init_state, train_step
from qlora_jax.tree import PROJECTIONS

pytestmark = [
    pytest.mark.peer,
    pytest.mark.golden,
    # PEFT uses names that transformers will drop. Every other warning of theirs is an
    # error; PEFT's only word on tensors that an adapter lacks is one.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]

LOGITS, LOSS = 3e-5, 1e-5

LORAS = {
    "plain": dict(r=8, lora_alpha=16, target_modules="all-linear"),
    "rslora": dict(r=4, lora_alpha=3, use_rslora=True),
    "regex": dict(
        r=5, lora_alpha=10, target_modules=r".*\.(self_attn\.[qv]|mlp\.down)_proj"
    ),
    "gaussian": dict(
        r=3, lora_alpha=6, target_modules=("o_proj",), init_lora_weights="gaussian"
    ),
}


def close(got, want, tolerance=LOGITS):
    assert np.abs(got - want).max() <= tolerance


@pytest.fixture
def dense(golden):
    """A checkpoint with tied embeddings."""
    return golden / "llama32/fp32"


def trainer(config, lora, steps):
    """Returns (a jitted step, its optimizer)."""
    settings = TrainConfig(steps=steps, learning_rate=1e-2, warmup_steps=1)
    optimizer = make_optimizer(settings, steps)
    model = Llama(config, Compute(dtype="float32", lora=lora))
    step = functools.partial(train_step, model=model, optimizer=optimizer)
    return jax.jit(step, donate_argnums=0), optimizer


@pytest.fixture(scope="module")
def trained(golden, tokens, tmp_path_factory):
    """A function: entry of `LORAS` -> adapter directory, trained three steps."""
    config, base = convert.load_llama(golden / "llama32/fp32", quantization=None)
    batch = {name: jnp.asarray(tokens)[None] for name in ("tokens", "labels")}

    @functools.cache
    def train(kind):
        lora = LoraConfig(**LORAS[kind])
        step, optimizer = trainer(config, lora, 3)
        start = init_adapters(jax.random.key(0), base, lora)
        state = init_state(start, optimizer, jax.random.key(1))
        for _ in range(3):
            state, metrics = step(state, base, batch)
            assert metrics["finite"]
        for leaf in jax.tree.leaves(state.adapters):
            assert np.abs(leaf).max() > 1e-3
        out = tmp_path_factory.mktemp(kind) / "adapter"
        convert.save_adapter(out, lora, state.adapters, config)
        return out

    return train


# --- Adapters ---


@pytest.mark.parametrize("kind", LORAS)
def test_peft_loads_what_we_trained(
    dense, trained, peft, theirs, their_logits, our_logits, kind
):
    adapter, model = trained(kind), theirs(dense)
    plain = their_logits(model)
    # PEFT warns of missing keys, and a warning is an error here.
    model = peft.PeftModel.from_pretrained(model, adapter)
    report = model.load_adapter(adapter, "default")
    assert not report.unexpected_keys
    assert not [k for k in report.missing_keys if "lora" in k]
    stored = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    loaded = peft.get_peft_model_state_dict(model)
    assert stored.keys() == loaded.keys()
    for key, value in stored.items():
        np.testing.assert_array_equal(loaded[key].numpy(), value)
    got = their_logits(model)
    close(our_logits(dense, adapter), got)
    assert np.abs(got - plain).max() > 100 * LOGITS  # it does something


# --- Merging ---


@pytest.mark.parametrize("kind", ["plain", "rslora"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_merged_weights_are_those_of_peft(
    dense, trained, peft, theirs, tmp_path, dtype, kind
):
    base, lora, adapter = dense, LoraConfig(**LORAS[kind]), trained(kind)
    if dtype != "float32":
        write_dense(base, tmp_path / "base", dtype=dtype)
        base = tmp_path / "base"
    convert.merge(base, adapter, tmp_path / "out")
    model = peft.PeftModel.from_pretrained(theirs(base, dtype), adapter)
    merged = model.merge_and_unload().state_dict()
    merged.pop("lm_head.weight")  # tied
    ours, original = (open_model(path) for path in (tmp_path / "out", base))
    assert set(merged) == set(ours)
    factors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    eps = float(ml_dtypes.finfo(dtype).eps)
    adapted = 0
    for key, value in merged.items():
        got = ours.read(key)
        assert got.dtype == dtype
        want = value.float().numpy()
        module = f"base_model.model.{key.removesuffix('.weight')}"
        if f"{module}.lora_A.weight" not in factors:
            assert got.tobytes() == original.read(key).tobytes()
            np.testing.assert_array_equal(got.astype(np.float32), want)
            continue
        adapted += 1
        a, b = (np.abs(factors[f"{module}.lora_{x}.weight"]) for x in "AB")
        # One rounding of the result (one unit in the last place), and the float32 sums
        # of r + 1 terms before it, in another order.
        bound = eps * np.abs(want) + 2.0**-23 * (lora.r + 1) * (
            lora.scaling * (b @ a) + np.abs(want)
        )
        difference = np.abs(got.astype(np.float32) - want)
        assert (difference <= bound).all(), key
        if dtype == "bfloat16":  # where a float32 sum lies beside a midpoint
            assert (difference > 0).mean() < 1e-3
    assert adapted == len(factors) // 2 > 0


# --- Model directories ---


DENSE = ("llama32/fp32", "llama2/fp32_sharded", "llamabias/fp32")


@pytest.mark.parametrize("shard", [5_000_000_000, 300_000])
@pytest.mark.parametrize("name", DENSE)
def test_transformers_loads_dense_directories(
    golden, theirs, their_logits, our_logits, tmp_path, name, shard
):
    config, base = convert.load_llama(golden / name, quantization=None)
    out = tmp_path / "out"
    convert.save_llama(out, config, base, max_shard_bytes=shard)
    assert (len(list(out.glob("*.safetensors"))) > 1) == (shard < 1_000_000)
    close(our_logits(out), their_logits(theirs(out)))


@pytest.mark.parametrize(
    "packing", [(q, s) for q in ("nf4", "nf4_dq") for s in ("uint8", "bfloat16")]
)
# Not llama2: its rows of 352 are what bitsandbytes dequantizes wrongly with AVX-512.
@pytest.mark.parametrize("name", ["llama32/fp32", "llamabias/fp32"])
def test_transformers_loads_4bit_directories(
    golden, bitsandbytes, theirs, their_logits, our_logits, tmp_path, name, packing
):
    quantization, storage = packing
    config, base = convert.load_llama(golden / name, quantization=quantization)
    out = tmp_path / "out"
    shard = 100_000 if storage == "uint8" else 5_000_000_000
    convert.save_llama(out, config, base, quant_storage=storage, max_shard_bytes=shard)
    model = theirs(out)
    linear = model.model.layers[1].mlp.down_proj
    assert isinstance(linear, bitsandbytes.nn.Linear4bit)
    assert (linear.weight.quant_state.nested) == (quantization == "nf4_dq")
    close(our_logits(out), their_logits(model))


@pytest.fixture
def mixed(golden, dense, tmp_path):
    """A 4-bit directory with the q_proj of layers 0 and 2 left in 32 bit."""
    path = tmp_path / "mixed"
    shutil.copytree(golden / "llama32/nf4_dq", path)
    names = [f"model.layers.{i}.self_attn.q_proj" for i in (0, 2)]
    file = path / "model.safetensors"
    whole = safetensors.numpy.load_file(dense / "model.safetensors")
    tensors = safetensors.numpy.load_file(file)
    tensors = {k: v for k, v in tensors.items() if not k.startswith(tuple(names))}
    tensors |= {f"{name}.weight": whole[f"{name}.weight"] for name in names}
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    raw = json.loads((path / "config.json").read_text())
    raw["quantization_config"]["llm_int8_skip_modules"] = ["lm_head", *names]
    (path / "config.json").write_text(json.dumps(raw))
    return path


def test_single_layers_left_in_16_bit(
    mixed, bitsandbytes, theirs, their_logits, our_logits, tmp_path
):
    assert open_checkpoint(mixed).mixed

    def four_bit(model, name):
        layers = (getattr(layer.self_attn, name) for layer in model.model.layers)
        return [isinstance(linear, bitsandbytes.nn.Linear4bit) for linear in layers]

    model = theirs(mixed)
    assert four_bit(model, "q_proj") == [False, True, False, True]
    expected = their_logits(model)
    close(our_logits(mixed), expected)
    # Written back, the whole stack is dense, and transformers is told so.
    out = tmp_path / "out"
    convert.save_llama(out, *convert.load_llama(mixed))
    model = theirs(out)
    assert not any(four_bit(model, "q_proj")) and all(four_bit(model, "k_proj"))
    close(our_logits(out), expected)
    close(their_logits(model), expected)


def test_transformers_loads_what_we_merged(
    golden, trained, peft, theirs, their_logits, our_logits, tmp_path
):
    packed, adapter = golden / "llama32/nf4_dq", trained("plain")
    out = tmp_path / "out"
    convert.merge(packed, adapter, out, onto="dequantized", max_shard_bytes=500_000)
    merged = their_logits(theirs(out))
    close(our_logits(out), merged)
    model = peft.PeftModel.from_pretrained(theirs(packed), adapter)
    close(their_logits(model), merged)


# --- Training ---


def test_ten_qlora_steps_side_by_side(golden, torch, peft, theirs, tmp_path):
    path, steps = golden / "llama32/nf4_dq", 10
    lora = LoraConfig(r=8, lora_alpha=16)
    config, base = convert.load_llama(path)
    base = jax.tree.map(jnp.asarray, base)
    rng = np.random.default_rng(7)
    rows = rng.integers(1, config.vocab_size, (steps, 4, 24)).astype(np.int32)
    rows[:, :, 12:] = rows[:, :, :12]  # something to learn
    labels = np.where(rng.random(rows.shape) < 0.3, -100, rows).astype(np.int32)
    adapters = init_adapters(jax.random.key(3), base, lora)
    convert.save_adapter(tmp_path / "start", lora, adapters, config)

    model = peft.PeftModel.from_pretrained(
        theirs(path), tmp_path / "start", is_trainable=True
    ).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    optimizer = torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: i if i < 1 else (steps - i) / (steps - 1)
    )
    expected = []
    for i in range(steps):
        ids, target = (torch.from_numpy(a[i].astype(np.int64)) for a in (rows, labels))
        loss = model(input_ids=ids, labels=target, use_cache=False).loss
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        expected.append((loss.item(), norm.item()))

    step, optax_optimizer = trainer(config, lora, steps)
    state = init_state(adapters, optax_optimizer, jax.random.key(0))
    for i, (loss, norm) in enumerate(expected):
        pair = zip(("tokens", "labels"), (rows, labels), strict=True)
        batch = {name: jnp.asarray(a[i : i + 1]) for name, a in pair}
        state, metrics = step(state, base, batch)
        assert abs(float(metrics["loss"]) - loss) <= LOSS
        assert abs(float(metrics["grad_norm"]) / norm - 1) <= 1e-4
    assert expected[-1][0] < expected[0][0] - 100 * LOSS


@pytest.mark.parametrize("version", ["0.6.0", "0.10.0", "0.13.2"])
def test_older_versions_of_peft_read_our_configuration(version, dense, tmp_path):
    root = Path(sys.prefix) / f"peft-{version}"
    if not root.is_dir():
        pytest.skip(f"`make peer` installs PEFT {version} into `{root}`")
    lora, config = LoraConfig(r=3), convert.open_config(dense)
    base = convert.load_llama(dense, quantization=None)[1]
    adapters = init_adapters(jax.random.key(0), base, lora)
    convert.save_adapter(tmp_path / "adapter", lora, adapters, config)
    script = Path(__file__).with_name("old_peft.py")
    out = subprocess.run(
        [sys.executable, script, root, tmp_path / "adapter"],
        capture_output=True,
        text=True,
        check=True,
    )
    read = json.loads(out.stdout)
    # Of the default, which has the names of all families, those of this model.
    assert read == {"r": 3, "target_modules": sorted(PROJECTIONS)}


def test_generate_stops_at_a_trained_end_only_if_it_is_told(
    dense, trained, torch, peft, theirs, tmp_path
):
    """The two lines of docs/generation.md."""
    import transformers

    model = peft.PeftModel.from_pretrained(theirs(dense), trained("plain"))
    prompt = torch.tensor([[1, 2, 3]])
    free = model.generate(prompt, max_new_tokens=6, do_sample=False)[0].tolist()
    end = free[3]
    assert len(free) == 9 and end != model.config.eos_token_id
    # What a run writes beside its adapter, which `from_pretrained` does not read.
    adapter = shutil.copytree(trained("plain"), tmp_path / "adapter")
    (adapter / "generation_config.json").write_text(f'{{"eos_token_id": [2, {end}]}}')
    model = peft.PeftModel.from_pretrained(theirs(dense), adapter)
    assert model.generate(prompt, max_new_tokens=6, do_sample=False).shape == (1, 9)
    ends = transformers.GenerationConfig.from_pretrained(adapter).eos_token_id
    stopped = model.generate(
        prompt, max_new_tokens=6, do_sample=False, eos_token_id=ends
    )
    assert stopped[0].tolist() == free[:4]
