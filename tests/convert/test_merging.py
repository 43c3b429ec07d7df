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
import qlora_jax
from convert import bnb
from convert.merging import MERGE_REPORT, add_to_report, fingerprint, write_dense
from convert.names import checkpoint_keys
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import quantize
from tests.convert.reference import (
    MODEL,
    WEIGHTS,
    adapter_of,
    all_tensors,
    edit_json,
    equal_arrays,
    ones,
    pack,
    read,
    same_file,
)

BF16 = ml_dtypes.bfloat16


def delta(adapter: Path, key: str) -> np.ndarray | None:
    """scaling * B @ A in float64, or None where `key` is not adapted."""
    raw = read(adapter, "adapter_config.json")
    tensors = safetensors.numpy.load_file(adapter / WEIGHTS)
    module = f"base_model.model.{key.removesuffix('.weight')}"
    if f"{module}.lora_A.weight" not in tensors:
        return None
    a, b = (tensors[f"{module}.lora_{x}.weight"].astype(np.float64) for x in "AB")
    scale = np.sqrt(raw["r"]) if raw.get("use_rslora") else raw["r"]
    return b @ a * (raw["lora_alpha"] / scale)


def dense_tensors(packed: Path) -> dict[str, np.ndarray]:
    """The tensors of a packed checkpoint, dequantized."""
    config, tree = convert.load_llama(packed)
    leaves, tensors = dict(trees.walk(tree)), {}
    for key, (path, layer) in checkpoint_keys(config).items():
        leaf = leaves[path] if layer is None else leaves[path][layer]
        dense = bnb.dequantize(leaf) if model_params.is_projection(path) else leaf
        tensors[key] = dense
    return tensors


@pytest.fixture
def adapter(tiny, make_adapter) -> Path:
    """Of `tiny_model`: rank 3, of q_proj and down_proj."""
    return make_adapter(tiny)


@pytest.fixture
def out(tmp_path) -> Path:
    return tmp_path / "out"


@pytest.mark.golden
@pytest.mark.parametrize("name", ["plain", "rslora"])
def test_merged_tensors_are_those_of_peft(golden, out, name):
    base, adapter = golden / "llama32/fp32", golden / "adapters/llama32" / name
    report = convert.merge(base, adapter, out)
    merged, original = all_tensors(out), all_tensors(base)
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
    assert read(out, MERGE_REPORT) == report
    assert read(out) == read(base)


@pytest.mark.parametrize("shards", [1, 2])
@pytest.mark.parametrize("stored", [np.float32, np.float16, BF16])
@pytest.mark.parametrize("dtype", [None, "float32", "bfloat16"])
def test_updates_are_rounded_once(make_model, adapter, out, stored, dtype, shards):
    base = make_model(dtype=stored, shards=shards)
    convert.merge(base, adapter, out, dtype=dtype, max_shard_bytes=9000)
    merged = all_tensors(out)
    target = np.dtype(stored if dtype is None else dtype)
    for key, value in all_tensors(base).items():
        update = delta(adapter, key)
        if update is None:
            assert equal_arrays(merged[key], value.astype(target))
        else:
            exact = value.astype(np.float64) + update
            # Half an ulp of the result's dtype, and the float32 sums before it.
            half = float(ml_dtypes.finfo(target).eps) / 2
            bound = half * np.abs(exact) + 4e-6
            assert merged[key].dtype == target
            assert (np.abs(merged[key].astype(np.float64) - exact) <= bound).all()
    assert read(out)["torch_dtype"] == target.name


def test_a_merge_that_changes_nothing_says_so(make_model, adapter, out, edit_tensors):
    """An update below the precision of the weights is lost, as one of zeros is."""

    def shrink(tensors):
        for key in tensors:
            tensors[key] *= 1e-4

    edit_tensors(adapter / WEIGHTS, shrink)
    report = convert.merge(make_model(dtype=BF16), adapter, out)
    assert report["tensors_changed"] == 0
    (note,) = report["notes"]
    assert note == "no tensor changed: the weights of the result are the base's"


@pytest.mark.parametrize(("scale", "changed"), [(1, 0), (64, 1)])
def test_a_table_of_the_file_that_replaces_the_bases_is_counted(
    tiny_model, adapter, out, edit_tensors, scale, changed
):
    """PEFT saves a table with the adapter after a vocabulary was resized."""
    head = safetensors.numpy.load_file(tiny_model / MODEL)["lm_head.weight"] * scale
    edit_tensors(
        adapter / WEIGHTS,
        lambda tensors: tensors.update({"base_model.model.lm_head.weight": head}),
    )
    report = convert.merge(tiny_model, adapter, out)
    assert report["tensors_changed"] == 4 + changed
    if changed:  # against the base's own table, a 64th of the file's
        assert report["max_abs_change"] == np.abs(head * 63 / 64).max()
    np.testing.assert_array_equal(all_tensors(out)["lm_head.weight"], head)


def test_an_adapter_is_not_merged_twice(tiny, tiny_model, adapter, make_adapter, out):
    convert.merge(tiny_model, adapter, out)
    with pytest.raises(UserError, match=f"would be added twice.*`{tiny_model}`"):
        convert.merge(out, adapter, out.with_name("again"))
    with pytest.raises(UserError, match="would be added twice"):
        qlora_jax.load(out, adapter=adapter)
    other = make_adapter(tiny, name="other", seed=2)
    assert convert.merge(out, other, out.with_name("both"))["tensors_changed"] > 0
    with pytest.raises(UserError, match="would be added twice"):
        convert.merge(out.with_name("both"), adapter, out.with_name("again"))


@pytest.mark.parametrize(
    "names", [("dtype",), ("torch_dtype",), ("torch_dtype", "dtype")]
)
def test_config_json_names_one_dtype(make_model, adapter, out, names):
    """transformers 4 reads `torch_dtype`, transformers 5 `dtype`; files have both."""
    base = make_model(dtype=BF16)
    raw = read(base)
    del raw["torch_dtype"]
    (base / "config.json").write_text(
        json.dumps(raw | dict.fromkeys(names, "bfloat16"))
    )
    convert.merge(base, adapter, out, dtype="float16")
    dtypes = {name: v for name, v in read(out).items() if "dtype" in name}
    assert dtypes == dict.fromkeys(names, "float16")


@pytest.mark.parametrize("quantization", ["nf4", "nf4_dq"])
def test_onto_what_quantization_makes(make_model, adapter, tmp_path, quantization):
    base, packed = make_model(dtype=BF16), tmp_path / "packed"
    a, b, onto = tmp_path / "a", tmp_path / "b", {"onto": "dequantized"}
    convert.merge(base, adapter, a, quantization=quantization, **onto)
    # The same as through a 4-bit directory on disk.
    report = convert.merge(pack(base, packed, quantization), adapter, b, **onto)
    assert report["onto"] == "dequantized"
    assert same_file(a, b) and same_file(a, b, "config.json")
    assert "quantization_config" not in read(b)
    key = "model.layers.0.self_attn.v_proj.weight"  # not adapted, yet quantized
    rounded = quantize(all_tensors(base)[key], double_quant=quantization == "nf4_dq")
    assert equal_arrays(all_tensors(a)[key], bnb.dequantize(rounded))


def test_onto_a_quantized_head(tiny_model, adapter, tmp_path, out):
    options = {"onto": "dequantized", "quantization": "nf4_dq"}
    report = convert.merge(tiny_model, adapter, out, quantize_lm_head=True, **options)
    assert report["quantize_lm_head"] is True
    head = convert.load_llama(tiny_model, quantization=None)[1]["lm_head"]["weight"]
    merged = convert.load_llama(out, quantization=None)[1]["lm_head"]["weight"]
    want = bnb.dequantize(quantize(head, double_quant=True))
    np.testing.assert_array_equal(merged, want)
    with pytest.raises(UserError, match="`quantize_lm_head` goes with"):
        convert.merge(tiny_model, adapter, tmp_path / "no", quantize_lm_head=True)


@pytest.mark.golden
def test_dense_copy_of_a_4bit_directory(golden, out):
    source = golden / "llama2/nf4"
    count = write_dense(source, out, dtype="bfloat16", max_shard_bytes=1)
    dense = {key: value.astype(BF16) for key, value in dense_tensors(source).items()}
    assert count == len(dense)
    assert equal_arrays(all_tensors(out), dense)


def test_what_nothing_changes_stays(tiny, make_model, make_adapter, out, edit_tensors):
    def start_with_minus_zero(tensors):  # which adding a zero would change
        for value in tensors.values():
            value.reshape(-1)[:8] = -0.0

    def silence(tensors):
        for key in list(tensors):
            if ".layers.0." in key:
                del tensors[key]
            elif "q_proj.lora_B" in key:
                tensors[key] = np.zeros_like(tensors[key])

    base = make_model(start_with_minus_zero)
    before, sha = all_tensors(base), fingerprint(base)
    adapter = make_adapter(tiny, layers_to_transform=[1])
    edit_tensors(adapter / WEIGHTS, silence)
    report, merged = convert.merge(base, adapter, out), all_tensors(out)
    changed = {k for k in merged if merged[k].tobytes() != before[k].tobytes()}
    assert changed == {"model.layers.1.mlp.down_proj.weight"}
    assert report["tensors_changed"] == 1
    assert fingerprint(base) == sha != fingerprint(out)


@pytest.mark.parametrize("stored", [np.float32, BF16])
@pytest.mark.parametrize("first", [None, "nf4"])
@pytest.mark.parametrize("again", ["nf4", "nf4_dq"])
def test_merged_then_requantized(make_model, adapter, tmp_path, stored, first, again):
    base = make_model(dtype=stored)
    options = {"onto": "dequantized" if first else "original", "quantization": first}
    dense, packed, expected = (tmp_path / name for name in ("d", "p", "e"))
    first_report = convert.merge(base, adapter, dense, **options)
    options |= {"requantize": again, "max_shard_bytes": 20_000}
    report = convert.merge(base, adapter, packed, **options)
    pack(dense, expected, again)
    assert equal_arrays(all_tensors(packed), all_tensors(expected))
    assert len(list(packed.glob("*.safetensors"))) > 1
    assert read(packed) == read(expected)
    counts = ("tensors", "tensors_changed", "max_abs_change")
    assert [first_report[n] for n in counts] == [report[n] for n in counts]
    assert first_report["requantization_error"] is None
    # What the report says was lost, from the two directories.
    old, new = all_tensors(dense), dense_tensors(packed)
    stacks: dict[str, list[np.ndarray]] = {}
    for key in old:
        name = key.split(".")[-2]
        if name.endswith("_proj"):
            pair = [tensors[key].astype(np.float64) for tensors in (old, new)]
            stacks.setdefault(name, []).append(np.stack(pair))
    assert set(report["requantization_error"]) == set(stacks)
    for name, error in report["requantization_error"].items():
        was, became = np.stack(stacks[name], axis=1)
        gap = became - was
        assert error["max_abs"] == pytest.approx(np.abs(gap).max(), rel=1e-6)
        relative = np.linalg.norm(gap) / np.linalg.norm(was)
        assert error["relative"] == pytest.approx(relative, rel=1e-5)
        assert relative < 0.2
        # What the adapter leaves alone is on NF4's values already.
        kept = first == again and name not in ("q_proj", "down_proj")
        assert (relative == 0) == kept


@pytest.mark.parametrize("double_quant", [False, True])
def test_requantized_keeps_what_was_packed_and_does_not_change(
    make_model, adapter, tmp_path, double_quant
):
    """Quantizing its values again would give double-quantized ones other scales."""
    base, merged = tmp_path / "packed", tmp_path / "merged"
    name = "nf4_dq" if double_quant else "nf4"
    pack(make_model(), base, name)
    options = {"onto": "dequantized", "requantize": name}
    report = convert.merge(base, adapter, merged, **options)
    before, after = all_tensors(base), all_tensors(merged)
    changed = {k for k in after if after[k].tobytes() != before[k].tobytes()}
    assert {key.split(".")[-2] for key in changed if key.endswith("_proj.weight")} == {
        "q_proj",
        "down_proj",
    }
    assert all("q_proj" in key or "down_proj" in key for key in changed)
    assert report["requantization_error"]["k_proj"] == {"max_abs": 0, "relative": 0}
    assert report["requantization_error"]["q_proj"]["relative"] > 0
    # Of another form they are quantized again.
    other = {**options, "requantize": "nf4" if double_quant else "nf4_dq"}
    report = convert.merge(base, adapter, tmp_path / "other", **other)
    assert report["requantization_error"]["k_proj"]["relative"] < 0.02


def test_requantized_keeps_the_compute_dtype_of_its_base(packed, adapter, out):
    quantization = read(packed)["quantization_config"]
    quantization["bnb_4bit_compute_dtype"] = "bfloat16"
    edit_json(packed / "config.json", quantization_config=quantization)
    convert.merge(packed, adapter, out, onto="dequantized", requantize="nf4")
    made = read(out)["quantization_config"]
    assert made["bnb_4bit_compute_dtype"] == "bfloat16"


def test_tensors_that_the_base_lacks_are_added(make_model, tmp_path):
    base = make_model(dtype=BF16, tie_word_embeddings=True)
    tensors, config = all_tensors(base), LlamaConfig.from_hf(read(base))

    def merged_ones(name, dtype=None, **fields):
        lora, adapter = LoraConfig(r=2, **fields), tmp_path / f"{name}-adapter"
        convert.save_adapter(adapter, lora, adapter_of(config, lora, ones), config)
        report = convert.merge(base, adapter, tmp_path / name, dtype=dtype)
        assert report["tensors"] == len(tensors) + report["tensors_added"]
        return report, all_tensors(tmp_path / name), read(tmp_path / name)

    report, merged, raw = merged_ones(
        "head",
        target_modules=("lm_head", "q_proj"),
        exclude_modules=("model.layers.0.self_attn.q_proj",),
    )
    key = "model.embed_tokens.weight"
    assert merged[key].tobytes() == tensors[key].tobytes()
    added = (tensors[key].astype(np.float32) + 16 / 2 * 2).astype(BF16)
    assert equal_arrays(merged["lm_head.weight"], added)
    assert report["tensors_added"] == 1
    assert report["config_changes"] == {"tie_word_embeddings": [True, False]}
    assert raw["tie_word_embeddings"] is False

    report, merged, raw = merged_ones(
        "biased", dtype="float16", target_modules=("q_proj",), lora_bias=True
    )
    for layer in range(2):
        for name in "qkvo":
            bias = merged[f"model.layers.{layer}.self_attn.{name}_proj.bias"]
            assert bias.dtype == np.float16
            assert (bias == (8.0 if name == "q" else 0.0)).all()
    assert report["tensors_added"] == 8
    assert report["config_changes"] == {"attention_bias": [False, True]}
    assert raw["attention_bias"]


def test_a_report_is_replaced_and_never_absent(config, tiny_model, adapter, tmp_path):
    out, noted = tmp_path / "out", tmp_path / "noted"
    lora, adapters = convert.load_adapter(adapter, config)
    lora = dataclasses.replace(lora, base_fingerprint="ab" * 32)
    convert.save_adapter(noted, lora, adapters, config)
    report = convert.merge(tiny_model, noted, out)
    assert report["adapter_base_fingerprint"] == "ab" * 32
    before = sorted(path.name for path in out.iterdir())
    add_to_report(out, {**report, "more": 1})
    assert sorted(path.name for path in out.iterdir()) == before
    assert read(out, MERGE_REPORT) == {**report, "more": 1}
    with pytest.raises(UserError, match="Cannot write .*merge_report.json`: there is"):
        add_to_report(tmp_path / "none", report)


# --- What is refused ---


@pytest.fixture
def packed(tiny_model, tmp_path) -> Path:
    return pack(tiny_model, tmp_path / "packed")


DEQUANTIZED = {"onto": "dequantized"}


@pytest.mark.parametrize(
    "base, options, match",
    [
        ("packed", {}, "no original to merge onto.*'dequantized'"),
        ("tiny_model", DEQUANTIZED, "is not quantized. Give the `quantization`"),
        ("tiny_model", {"quantization": "nf4"}, "'nf4' goes with 'dequantized'"),
        ("packed", {"quantization": "nf4", **DEQUANTIZED}, "is quantized already; lea"),
        ("tiny_model", {"dtype": "int8"}, "`dtype`='int8' is not supported"),
        ("tiny_model", {"requantize": "int8"}, "`requantize`='int8' is not known"),
        ("tiny_model", {"onto": "base"}, "`onto` 'base' is not known; expected"),
    ],
)
def test_the_weights_to_merge_onto_exist(request, adapter, out, base, options, match):
    unchecked = inspect.unwrap(convert.merge)
    with pytest.raises(UserError, match=match):
        unchecked(request.getfixturevalue(base), adapter, out, **options)
    assert not out.exists()


@pytest.mark.golden
def test_an_adapter_that_holds_tables_of_another_base(golden, tmp_path, edit_tensors):
    adapter = golden / "adapters/llama32/emb_lora"
    base = shutil.copytree(golden / "llama32/fp32", tmp_path / "b")
    key = "model.embed_tokens.weight"
    edit_tensors(base / MODEL, lambda t: t.update({key: t[key] * 1.5}))
    with pytest.raises(CheckpointError, match="is not the table of this base"):
        convert.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_output_with_content_is_kept(tiny_model, adapter):
    before = fingerprint(tiny_model)
    with pytest.raises(UserError, match="exists and is not empty"):
        convert.merge(tiny_model, adapter, tiny_model)
    assert fingerprint(tiny_model) == before


@pytest.mark.parametrize("when", ["open", "write"])
def test_a_full_disk_leaves_nothing(monkeypatch, tiny_model, adapter, tmp_path, when):
    def full(*args, **options):
        raise OSError(errno.ENOSPC, "No space left on device")

    class Full(io.BytesIO):
        write = full

    folder, spool = tmp_path / "folder", full
    if when == "write":
        spool = lambda **options: Full()  # noqa: E731
    monkeypatch.setattr(tempfile, "TemporaryFile", spool)
    with pytest.raises(UserError, match="Cannot write `.*out`: No space left"):
        convert.merge(tiny_model, adapter, folder / "out", requantize="nf4")
    assert not list(folder.iterdir())


def test_the_peak_of_host_memory(tiny_model, big_model, adapter, tmp_path, measure):
    program = """
base, adapter, dora, out, small, small_adapter = sys.argv[1:]
onto = dict(onto="dequantized", quantization="nf4")
warm(convert.merge, small, small_adapter, out + "/small", **onto)
peak(convert.merge, base, adapter, out + "/original")
peak(convert.merge, base, dora, out + "/dora")
peak(convert.merge, base, adapter, out + "/dequantized", **onto)
peak(convert.merge, base, adapter, out + "/requantized", requantize="nf4_dq")
"""
    config, paths = LlamaConfig.from_hf(read(big_model)), []
    for more in ((), ("embed_tokens",)):
        targets = ("q_proj", "down_proj", *more)
        lora = LoraConfig(r=8, target_modules=targets, use_dora=bool(more))
        paths.append(tmp_path / f"dora {bool(more)}")
        convert.save_adapter(paths[-1], lora, adapter_of(config, lora, ones), config)
    original, dora, dequantized, requantized = measure(
        program, big_model, *paths, tmp_path / "out", tiny_model, adapter
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
