import dataclasses
import errno
import inspect
import io
import json
import shutil
import tempfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert import bnb
from convert.checkpoint import open_model
from convert.merging import REPORT, add_to_report, fingerprint, write_dense
from convert.names import checkpoint_keys
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import select
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import quantize

BF16 = ml_dtypes.bfloat16


def read_all(path: Path) -> dict[str, np.ndarray]:
    files = open_model(path)
    return {k: files.read(k) for k in files}


def delta(adapter: Path, key: str) -> np.ndarray | None:
    """scaling * B @ A in float64, or None where `key` is not adapted."""
    raw = json.loads((adapter / "adapter_config.json").read_text())
    tensors = safetensors.numpy.load_file(adapter / "adapter_model.safetensors")
    module = f"base_model.model.{key.removesuffix('.weight')}"
    if f"{module}.lora_A.weight" not in tensors:
        return None
    a, b = (tensors[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    scale = np.sqrt(raw["r"]) if raw.get("use_rslora") else raw["r"]
    return b @ a * (raw["lora_alpha"] / scale)


@pytest.mark.golden
@pytest.mark.parametrize("name", ["plain", "rslora"])
def test_merged_tensors_are_those_of_peft(golden, tmp_path, name):
    base, adapter = golden / "llama32/fp32", golden / "adapters/llama32" / name
    report = convert.merge(base, adapter, tmp_path / "out")
    merged, original = read_all(tmp_path / "out"), read_all(base)
    expected = safetensors.numpy.load_file(adapter / "merged_changed.safetensors")
    for key, value in expected.items():
        # float32 sums of a different order: a few ulp of the largest weight.
        np.testing.assert_allclose(
            merged[key], value, rtol=1e-6, atol=1e-6 * np.abs(value).max()
        )
    assert merged.keys() == original.keys()
    changed = {k for k in merged if merged[k].tobytes() != original[k].tobytes()}
    assert changed == {k for k in original if delta(adapter, k) is not None}
    assert report["tensors_changed"] == len(changed)
    assert report["tensors"] == len(original)
    assert report["max_abs_change"] == pytest.approx(
        max(np.abs(merged[k] - original[k]).max() for k in changed)
    )
    assert report["base_sha256"] == fingerprint(base)
    assert report["onto"] == "original"
    assert json.loads((tmp_path / "out" / REPORT).read_text()) == report
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(
        (base / "config.json").read_text()
    )


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stored_dtype", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_update_is_added_in_float32_and_rounded_once(
    tiny, make_tensors, save_model, make_adapter, tmp_path, stored_dtype, dtype, shards
):
    tensors = make_tensors(tiny, stored_dtype)
    base, adapter = save_model(tiny, tensors, shards=shards), make_adapter(tiny)
    out = tmp_path / "out"
    convert.merge(base, adapter, out, dtype=dtype, max_shard_bytes=9000)
    merged = read_all(out)
    target = np.dtype(stored_dtype if dtype is None else dtype)
    for key, value in tensors.items():
        update = delta(adapter, key)
        assert merged[key].dtype == target
        if update is None:
            assert merged[key].tobytes() == value.astype(target).tobytes()
        else:
            exact = value.astype(np.float64) + update
            # Half an ulp of the result's dtype, and the float32 sums before it.
            half = float(ml_dtypes.finfo(target).eps) / 2
            bound = half * np.abs(exact) + 4e-6
            assert (np.abs(merged[key].astype(np.float64) - exact) <= bound).all()
    raw = json.loads((out / "config.json").read_text())
    assert raw["torch_dtype"] == target.name


@pytest.mark.golden
def test_onto_the_dequantized_weights_of_a_4bit_directory(golden, tmp_path):
    base = golden / "llama32/nf4_dq"
    adapter = golden / "adapters/llama32/qlora_plain"
    out = tmp_path / "out"
    report = convert.merge(base, adapter, out, onto="dequantized")
    config, tree = convert.load_llama(base)
    leaves, merged = dict(trees.walk(tree)), read_all(out)
    assert set(merged) == set(checkpoint_keys(config))
    for key, (path, layer) in checkpoint_keys(config).items():
        leaf = leaves[path] if layer is None else leaves[path][layer]
        dense = bnb.dequantize(leaf) if model_params.is_projection(path) else leaf
        update = delta(adapter, key)
        if update is None:
            assert merged[key].tobytes() == np.asarray(dense).tobytes()
        else:
            np.testing.assert_allclose(merged[key], dense + update, rtol=0, atol=1e-6)
    raw = json.loads((out / "config.json").read_text())
    assert "quantization_config" not in raw
    assert LlamaConfig.from_hf(raw) == config
    assert report["onto"] == "dequantized"
    assert 0 < report["tensors_changed"] < report["tensors"]


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
def test_onto_what_quantization_makes_of_a_dense_base(
    tiny, make_tensors, save_model, make_adapter, tmp_path, quantization
):
    tensors = make_tensors(tiny, BF16)
    base, adapter = save_model(tiny, tensors), make_adapter(tiny)
    convert.merge(
        base, adapter, tmp_path / "a", onto="dequantized", quantization=quantization
    )
    # The same as through a 4-bit directory on disk.
    packed = tmp_path / "packed"
    convert.save_llama(packed, *convert.load_llama(base, quantization=quantization))
    convert.merge(packed, adapter, tmp_path / "b", onto="dequantized")
    a, b = (tmp_path / d / "model.safetensors" for d in "ab")
    assert a.read_bytes() == b.read_bytes()
    key = "model.layers.0.self_attn.v_proj.weight"  # not adapted, yet quantized
    expected = bnb.dequantize(
        quantize(tensors[key], double_quant=quantization == "nf4_dq")
    )
    assert read_all(tmp_path / "a")[key].tobytes() == expected.tobytes()


def test_run_directories_are_not_changed(tiny_model, tiny, make_adapter, tmp_path):
    adapter = make_adapter(tiny)
    before = fingerprint(tiny_model)
    convert.merge(tiny_model, adapter, tmp_path / "out")
    assert fingerprint(tiny_model) == before
    assert fingerprint(tmp_path / "out") != before


@pytest.mark.golden
def test_dense_copy_of_a_4bit_directory(golden, tmp_path):
    source = golden / "llama2/nf4"
    count = write_dense(source, tmp_path / "out", dtype="bfloat16", max_shard_bytes=1)
    config, tree = convert.load_llama(source)
    _, copy = convert.load_llama(tmp_path / "out", quantization=None)
    assert count == len(checkpoint_keys(config))
    for path, leaf in trees.walk(tree):
        got = dict(trees.walk(copy))[path]
        dense = bnb.dequantize(leaf) if model_params.is_projection(path) else leaf
        assert got.tobytes() == dense.astype(BF16).tobytes()


def test_tensors_that_nothing_changes_keep_their_bytes(
    tiny, make_tensors, save_model, make_adapter, tmp_path, edit_tensors
):
    tensors = make_tensors(tiny)
    for value in tensors.values():
        value.reshape(-1)[:8] = -0.0  # which adding a zero would change
    base = save_model(tiny, tensors)
    adapter = make_adapter(tiny, layers_to_transform=[1])
    edit_tensors(
        adapter / "adapter_model.safetensors",
        lambda tensors: [
            tensors.pop(key) for key in list(tensors) if ".layers.0." in key
        ],
    )

    def silence(tensors):
        for key in tensors:
            if "q_proj.lora_B" in key:
                tensors[key] = np.zeros_like(tensors[key])

    edit_tensors(adapter / "adapter_model.safetensors", silence)
    report = convert.merge(base, adapter, tmp_path / "out")
    merged = read_all(tmp_path / "out")
    changed = {k for k in merged if merged[k].tobytes() != tensors[k].tobytes()}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}
    assert report["tensors_changed"] == 1


@pytest.mark.parametrize("stored_dtype", [np.float32, BF16])
@pytest.mark.parametrize("first", [None, "nf4"])
@pytest.mark.parametrize("again", ["nf4", "nf4_dq"])
def test_requantized_is_the_merged_checkpoint_quantized(
    tiny, make_tensors, save_model, make_adapter, tmp_path, stored_dtype, first, again
):
    base, adapter = (
        save_model(tiny, make_tensors(tiny, stored_dtype)),
        make_adapter(tiny),
    )
    onto = {"onto": "original" if first is None else "dequantized"}
    dense, packed, expected = (tmp_path / name for name in ("d", "p", "e"))
    first_report = convert.merge(base, adapter, dense, quantization=first, **onto)
    report = convert.merge(
        base,
        adapter,
        packed,
        quantization=first,
        requantize=again,
        max_shard_bytes=20_000,
        **onto,
    )
    convert.save_llama(expected, *convert.load_llama(dense, quantization=again))
    got, want = read_all(packed), read_all(expected)
    assert got.keys() == want.keys()
    assert all(got[key].tobytes() == want[key].tobytes() for key in want)
    assert len(list(packed.glob("*.safetensors"))) > 1
    ours, theirs = (
        json.loads((d / "config.json").read_text()) for d in (packed, expected)
    )
    assert ours == theirs
    counts = ("tensors", "tensors_changed", "max_abs_change")
    assert [first_report[n] for n in counts] == [report[n] for n in counts]
    assert first_report["requantization_error"] is None
    # What the report says was lost, from the two directories.
    merged, leaves = read_all(dense), dict(trees.walk(convert.load_llama(packed)[1]))
    errors = report["requantization_error"]
    assert set(errors) == {
        path[-2] for path in leaves if model_params.is_projection(path)
    }
    for name, error in errors.items():
        old, new = [], []
        for key, (path, layer) in checkpoint_keys(LlamaConfig.from_hf(tiny)).items():
            if path[-2] == name:
                old.append(merged[key].astype(np.float64))
                tensor = leaves[path][layer]
                new.append(bnb.dequantize(tensor).astype(np.float64))
        gap = np.stack(new) - np.stack(old)
        assert error["max_abs"] == pytest.approx(np.abs(gap).max(), rel=1e-6)
        relative = np.linalg.norm(gap) / np.linalg.norm(np.stack(old))
        assert error["relative"] == pytest.approx(relative, rel=1e-5)
        assert relative < 0.2
        # What the adapter leaves alone is on NF4's values already.
        kept = first == again and name not in ("q_proj", "down_proj")
        assert (relative == 0) == kept


def test_requantized_keeps_the_compute_dtype_of_its_base(
    packed, tiny, make_adapter, tmp_path
):
    raw = json.loads((packed / "config.json").read_text())
    raw["quantization_config"]["bnb_4bit_compute_dtype"] = "bfloat16"
    (packed / "config.json").write_text(json.dumps(raw))
    convert.merge(
        packed, make_adapter(tiny), tmp_path / "o", onto="dequantized", requantize="nf4"
    )
    made = json.loads((tmp_path / "o" / "config.json").read_text())
    assert made["quantization_config"]["bnb_4bit_compute_dtype"] == "bfloat16"


def test_tensors_that_the_base_lacks_are_added(
    tiny, make_tensors, save_model, tmp_path, edit_tensors
):
    tied = {**tiny, "tie_word_embeddings": True}
    tensors = make_tensors(tied, BF16)
    base, config = save_model(tied, tensors), LlamaConfig.from_hf(tied)
    lora = LoraConfig(
        r=2,
        target_modules=("lm_head", "q_proj"),
        exclude_modules=("model.layers.0.self_attn.q_proj",),
    )
    tree = abstract_ones(config, lora)
    convert.save_adapter(tmp_path / "adapter", lora, tree, config)
    report = convert.merge(base, tmp_path / "adapter", tmp_path / "out")
    merged = read_all(tmp_path / "out")
    key = "model.embed_tokens.weight"
    assert merged[key].tobytes() == tensors[key].tobytes()
    added = (tensors[key].astype(np.float32) + 16 / 2 * 2).astype(BF16)
    assert merged["lm_head.weight"].tobytes() == added.tobytes()
    assert report["tensors_added"] == 1
    assert report["tensors"] == len(tensors) + 1
    assert report["config_changes"] == {"tie_word_embeddings": [True, False]}
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    assert raw["tie_word_embeddings"] is False

    lora = LoraConfig(r=2, target_modules=("q_proj",), lora_bias=True)
    tree = abstract_ones(config, lora)
    convert.save_adapter(tmp_path / "biased", lora, tree, config)
    out = tmp_path / "with"
    report = convert.merge(base, tmp_path / "biased", out, dtype="float16")
    merged = read_all(out)
    for layer in range(2):
        for name in "qkvo":
            bias = merged[f"model.layers.{layer}.self_attn.{name}_proj.bias"]
            assert bias.dtype == np.float16
            assert (bias == (8.0 if name == "q" else 0.0)).all()
    assert report["tensors_added"] == 8
    assert report["config_changes"] == {"attention_bias": [False, True]}
    assert json.loads((out / "config.json").read_text())["attention_bias"]


def abstract_ones(config, lora):
    tree: dict = {}
    for path, shape in (
        select(model_params.abstract_base(config), lora).shapes().items()
    ):
        trees.put(tree, path, np.ones(shape, np.float32))
    return tree


def test_a_report_is_replaced_and_never_absent(
    tiny, tiny_model, make_adapter, tmp_path
):
    out = tmp_path / "out"
    report = convert.merge(tiny_model, make_adapter(tiny), out)
    before = sorted(path.name for path in out.iterdir())
    add_to_report(out, {**report, "more": 1})
    assert sorted(path.name for path in out.iterdir()) == before
    assert json.loads((out / REPORT).read_text()) == {**report, "more": 1}
    with pytest.raises(UserError, match="Cannot write .*merge_report.json`: No such"):
        add_to_report(tmp_path / "none", report)


@pytest.mark.golden
def test_an_adapter_that_holds_tables_of_another_base(golden, tmp_path, edit_tensors):
    adapter = shutil.copytree(golden / "adapters/llama32/emb_lora", tmp_path / "a")
    base = shutil.copytree(golden / "llama32/fp32", tmp_path / "b")
    key = "model.embed_tokens.weight"

    def change(tensors):
        tensors[key] = tensors[key] * 1.5

    edit_tensors(base / "model.safetensors", change)
    with pytest.raises(CheckpointError, match="is not the table of this base"):
        convert.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_fingerprint_of_the_base_trained_on_is_reported(
    tiny, tiny_model, make_adapter, tmp_path
):
    config = LlamaConfig.from_hf(tiny)
    lora, adapters = convert.load_adapter(make_adapter(tiny), config)
    lora = dataclasses.replace(lora, base_fingerprint="ab" * 32)
    convert.save_adapter(tmp_path / "noted", lora, adapters, config)
    report = convert.merge(tiny_model, tmp_path / "noted", tmp_path / "out")
    assert report["adapter_base_fingerprint"] == "ab" * 32


# --- What is refused ---


@pytest.fixture
def packed(tiny_model, tmp_path) -> Path:
    out = tmp_path / "packed"
    convert.save_llama(out, *convert.load_llama(tiny_model))
    return out


def test_the_weights_to_merge_onto_must_exist_and_be_unambiguous(
    tiny, tiny_model, packed, make_adapter, tmp_path
):
    adapter, out = make_adapter(tiny), tmp_path / "out"
    with pytest.raises(UserError, match="no original to merge onto.*'dequantized'"):
        convert.merge(packed, adapter, out)
    with pytest.raises(UserError, match="is not quantized. Give the `quantization`"):
        convert.merge(tiny_model, adapter, out, onto="dequantized")
    with pytest.raises(UserError, match="`quantization` 'nf4' goes with 'dequantized'"):
        convert.merge(tiny_model, adapter, out, quantization="nf4")
    with pytest.raises(UserError, match="is quantized already; leave `quantization`"):
        convert.merge(packed, adapter, out, onto="dequantized", quantization="nf4")
    with pytest.raises(UserError, match="`dtype`='int8' is not supported"):
        convert.merge(tiny_model, adapter, out, dtype="int8")
    with pytest.raises(UserError, match="`requantize`='int8' is not known"):
        inspect.unwrap(convert.merge)(tiny_model, adapter, out, requantize="int8")
    assert not out.exists()


def test_unknown_onto(tiny, tiny_model, make_adapter, tmp_path):
    unchecked = inspect.unwrap(convert.merge)
    with pytest.raises(UserError, match="`onto` 'base' is not known; expected"):
        unchecked(tiny_model, make_adapter(tiny), tmp_path / "out", onto="base")


def test_adapter_of_another_model(tiny, tiny_model, make_adapter, tmp_path):
    adapter = make_adapter({**tiny, "hidden_size": 32})
    with pytest.raises(CheckpointError, match=r"\[3, 32\] instead of \[3, 64\]"):
        convert.merge(tiny_model, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_with_content_is_kept(tiny, tiny_model, make_adapter):
    before = fingerprint(tiny_model)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.merge(tiny_model, make_adapter(tiny), tiny_model)
    assert fingerprint(tiny_model) == before


@pytest.mark.parametrize("when", ["open", "write"])
def test_a_full_disk_leaves_nothing_behind(
    monkeypatch, tiny, tiny_model, make_adapter, tmp_path, when
):
    adapter, folder = make_adapter(tiny), tmp_path / "folder"

    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(io.BytesIO):
        write = full

    spool = full if when == "open" else lambda **options: Full()
    monkeypatch.setattr(tempfile, "TemporaryFile", spool)
    with pytest.raises(UserError, match="Cannot write `.*out`: No space left"):
        convert.merge(tiny_model, adapter, folder / "out", requantize="nf4")
    assert not list(folder.iterdir())


def test_overflow_in_the_sum_is_named(
    tiny, make_tensors, save_model, make_adapter, tmp_path, edit_tensors
):
    base = save_model(tiny, make_tensors(tiny, np.float16))
    adapter = make_adapter(tiny)

    def change(tensors):
        for key in tensors:
            tensors[key] = np.full_like(tensors[key], 300)

    edit_tensors(adapter / "adapter_model.safetensors", change)
    with pytest.raises(
        CheckpointError, match="_proj.weight` has values beyond float16"
    ):
        convert.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_merging_holds_the_adapter_and_a_tensor_in_memory(
    tiny, tiny_model, big_model, make_adapter, tmp_path, measure
):
    program = """
base, adapter, dora, out, small, small_adapter = sys.argv[1:]
onto = dict(onto="dequantized", quantization="nf4")
warm(convert.merge, small, small_adapter, out + "/small", **onto)
peak(convert.merge, base, adapter, out + "/original")
peak(convert.merge, base, dora, out + "/dora")
peak(convert.merge, base, adapter, out + "/dequantized", **onto)
peak(convert.merge, base, adapter, out + "/requantized", requantize="nf4_dq")
"""
    config = LlamaConfig.from_hf(json.loads((big_model / "config.json").read_text()))
    adapters = {}
    for name, targets in (
        ("lora", ("q_proj", "down_proj")),
        ("dora", ("q_proj", "down_proj", "embed_tokens")),
    ):
        lora = LoraConfig(r=8, target_modules=targets, use_dora=name == "dora")
        adapters[name] = tmp_path / name
        convert.save_adapter(adapters[name], lora, abstract_ones(config, lora), config)
    original, dora, dequantized, requantized = measure(
        *(program, big_model, *adapters.values(), tmp_path / "out", tiny_model),
        make_adapter(tiny, name="small"),
    )
    size = sum(f.stat().st_size for f in big_model.glob("*.safetensors"))
    largest = 8192 * 2048 * 4
    # In units of the largest tensor in float32. Original: the tensor in bfloat16 (1/2),
    # blocks of it in float32 and the adapter. Dequantized and requantized: besides,
    # codes, what the compiler needs to unpack them, and a second tensor.
    assert original <= 1.25 * largest < size / 2
    assert dora <= 1.25 * largest
    assert dequantized <= 3 * largest
    assert requantized <= 5 * largest
