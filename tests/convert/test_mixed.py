# Projections that a file has in 4 bit in some layers only.

import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy

import convert
from convert import bnb
from convert.checkpoint import open_checkpoint
from convert.merging import write_dense
from convert.names import checkpoint_keys
from convert.output import Entry, write_json, write_model_files
from convert.verify import compare_adapters
from qlora_jax import tree as trees
from qlora_jax.cli.convert import main
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.models import params as model_params
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.nf4 import NF4Tensor, quantize

BF16 = ml_dtypes.bfloat16
Q = ("model", "layers", "self_attn", "q_proj", "weight")
DOWN = ("model", "layers", "mlp", "down_proj", "weight")


def key(path: trees.Path, layer: int) -> str:
    return trees.hf_key(path, layer)


def replace(
    directory: Path, weights: Mapping[str, Any], skip: list[str] | None = None
) -> Path:
    """Puts dense arrays or NF4 tensors in the place of packed weights."""
    file = directory / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(file))
    for name, value in weights.items():
        for part in [n for n in tensors if n.startswith(name)]:
            del tensors[part]
        if isinstance(value, NF4Tensor):
            entries = bnb.entries(name, value, None, quant_storage="uint8")
            tensors |= {entry.name: entry.read() for entry in entries}
        else:
            tensors[name] = value
    safetensors.numpy.save_file(tensors, file, {"format": "pt"})
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"]["llm_int8_skip_modules"] = skip
    (directory / "config.json").write_text(json.dumps(config))
    return directory


SKIP = [
    "lm_head",
    "model.layers.0.self_attn",
    "model.layers.2.self_attn.q_proj",
    "model.layers.3.mlp.down_proj",
]
LEFT = [key(Q, 0), key(Q, 2), key(DOWN, 3)]


@pytest.fixture
def mixed(golden, tmp_path) -> Path:
    """The 4-bit checkpoint, with some modules of single layers left in 32 bit."""
    path = shutil.copytree(golden / "llama32/nf4_dq", tmp_path / "mixed")
    dense = safetensors.numpy.load_file(golden / "llama32/fp32/model.safetensors")
    left = {k: dense[k] for k in dense if any(s in k for s in SKIP[1:])}
    assert set(LEFT) < {k for k in left}
    return replace(path, {k: v for k, v in left.items() if "proj" in k}, SKIP)


@pytest.fixture
def by_layer(golden) -> Callable[[trees.Path, list[int]], np.ndarray]:
    """A function: what a stack is, with these layers left in 32 bit."""
    _, dense = convert.load_llama(golden / "llama32/fp32", quantization=None)
    _, packed = convert.load_llama(golden / "llama32/nf4_dq")
    dense, packed = dict(trees.walk(dense)), dict(trees.walk(packed))

    def stack(path, left):
        return np.stack(
            [
                dense[path][i] if i in left else bnb.dequantize(packed[path][i])
                for i in range(4)
            ]
        )

    return stack


@pytest.mark.golden
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_such_stacks_become_dense_with_the_same_values(
    golden, mixed, by_layer, quantization
):
    config, base = convert.load_llama(mixed, quantization=quantization)
    leaves = dict(trees.walk(base))
    left = {DOWN: [3]}
    left |= {(*Q[:3], n, "weight"): [0] for n in ("k_proj", "v_proj", "o_proj")}
    left[Q] = [0, 2]
    assert set(open_checkpoint(mixed).mixed) == set(left)
    _, packed = convert.load_llama(golden / "llama32/nf4_dq")
    for path, expected in trees.walk(packed):
        if path in left:
            want = by_layer(path, left[path])
            assert leaves[path].dtype == want.dtype == np.float32
            assert leaves[path].tobytes() == want.tobytes()
        else:
            assert jax.tree.structure(leaves[path]) == jax.tree.structure(expected)
            for a, b in zip(*map(jax.tree.leaves, (leaves[path], expected))):  # noqa: B905
                assert a.tobytes() == b.tobytes()

    # The model computes what a model of the layers' original weights computes.
    reference = jax.tree.map(lambda leaf: leaf, packed)
    for path, layers in left.items():
        trees.put(reference, path, by_layer(path, layers))
    tokens = jnp.asarray(np.load(golden / "llama32/logits_fp32.npz")["ids"], jnp.int32)
    run = jax.jit(Llama(config, Compute(dtype="float32")).apply)
    np.testing.assert_array_equal(
        run({"params": base}, tokens), run({"params": reference}, tokens)
    )


@pytest.mark.golden
def test_a_note_names_such_stacks_and_their_cost(mixed, capsys):
    convert.load_llama(mixed)
    assert capsys.readouterr().err == ""
    convert.load_llama(mixed, progress=True)
    note = capsys.readouterr().err.splitlines()[0]
    start = f"Dense in every layer, because not all layers are stored alike in `{mixed}"
    assert note.startswith(start)
    assert "q_proj, k_proj, v_proj, o_proj, down_proj (0.00 GB in memory, 0." in note


@pytest.mark.golden
def test_written_back_the_stacks_are_dense_and_named(mixed, tmp_path):
    config, base = convert.load_llama(mixed)
    convert.save_llama(tmp_path / "out", config, base)
    raw = json.loads((tmp_path / "out" / "config.json").read_text())
    skipped = raw["quantization_config"].pop("llm_int8_skip_modules")
    assert skipped == [*SKIP, "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
    old = json.loads((mixed / "config.json").read_text())
    del old["quantization_config"]["llm_int8_skip_modules"]
    assert raw == old
    assert open_checkpoint(tmp_path / "out").mixed == ()
    _, again = convert.load_llama(tmp_path / "out")
    assert jax.tree.structure(again) == jax.tree.structure(base)
    for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(base), strict=True):
        assert a.tobytes() == b.tobytes()
    convert.save_llama(tmp_path / "twice", *convert.load_llama(tmp_path / "out"))
    for name in ("config.json", "model.safetensors"):
        a, b = (tmp_path / d / name for d in ("out", "twice"))
        assert a.read_bytes() == b.read_bytes()
    comparison = compare_adapters(mixed, tmp_path / "out")
    assert {d.name for d in comparison.different} == {
        key(p, i) for p in open_checkpoint(mixed).mixed for i in range(4)
    } - {key(p, 0) for p in open_checkpoint(mixed).mixed if p != DOWN} - set(LEFT)


@pytest.mark.golden
def test_merged_and_dequantized_like_any_other(golden, mixed, by_layer, tmp_path):
    write_dense(mixed, tmp_path / "dense")
    dense = safetensors.numpy.load_file(tmp_path / "dense" / "model.safetensors")
    stack = by_layer(Q, [0, 2])
    for layer in range(4):
        assert dense[key(Q, layer)].tobytes() == stack[layer].tobytes()
    adapter = golden / "adapters/llama32/qlora_plain"
    convert.merge(mixed, adapter, tmp_path / "merged", onto="dequantized")
    convert.merge(tmp_path / "dense", adapter, tmp_path / "reference")
    a, b = (tmp_path / d / "model.safetensors" for d in ("merged", "reference"))
    assert a.read_bytes() == b.read_bytes()


@pytest.mark.golden
def test_on_the_command_line(golden, mixed, tmp_path, capsys):
    args = ["model", str(mixed), str(tmp_path / "out"), "--json"]
    assert main([*args, "--quant-storage", "bfloat16"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["made_dense"] == [
        *(f"model.layers.self_attn.{x}_proj" for x in "qkvo"),
        "model.layers.mlp.down_proj",
    ]
    # Nothing is left in 4 bit here, so there is nothing to store so.
    source = shutil.copytree(golden / "llama32/fp32", tmp_path / "source")
    file = source / "model.safetensors"
    tensors = dict(safetensors.numpy.load_file(file))
    packed = quantize(tensors.pop(key(Q, 1)), double_quant=False)
    entries = bnb.entries(key(Q, 1), packed, None, quant_storage="uint8")
    tensors |= {entry.name: entry.read() for entry in entries}
    safetensors.numpy.save_file(tensors, file)
    args = ["model", str(source), str(tmp_path / "all"), "--json"]
    assert main([*args, "--quant-storage", "bfloat16"]) == 1
    assert "--quant-storage goes with 4-bit output only" in capsys.readouterr().err
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["made_dense"] == [".".join(Q[:-1])]
    raw = json.loads((tmp_path / "all" / "config.json").read_text())
    assert "quantization_config" not in raw


# --- What else can differ among layers ---


@pytest.fixture
def packed(tiny, make_tensors, save_model, tmp_path) -> Path:
    out = tmp_path / "packed"
    source = save_model(tiny, make_tensors(tiny, BF16))
    convert.save_llama(out, *convert.load_llama(source, quantization="nf4_dq"))
    return out


def test_double_quantization_in_some_layers(packed, tiny, make_tensors):
    weight = make_tensors(tiny, BF16)[key(Q, 1)]
    single = quantize(weight, double_quant=False)
    _, before = convert.load_llama(packed)
    replace(packed, {key(Q, 1): single})
    _, base = convert.load_llama(packed)
    got = dict(trees.walk(base))[Q]
    first = bnb.dequantize(dict(trees.walk(before))[Q][0])
    assert got.dtype == BF16
    assert got.tobytes() == first.tobytes() + bnb.dequantize(single).tobytes()


@pytest.mark.parametrize("double_quant", [None, True])
def test_dtypes_that_differ_have_to_be_decided(
    packed, tiny, make_tensors, double_quant
):
    weight = make_tensors(tiny, BF16)[key(DOWN, 1)].astype(np.float32)
    value = (
        weight if double_quant is None else quantize(weight, double_quant=double_quant)
    )
    _, before = convert.load_llama(packed)
    replace(packed, {key(DOWN, 1): value})
    match = (
        r"mixes dtypes.*1 stacks of layers: model.layers.mlp.down_proj.weight "
        r"\(\['bfloat16', 'float32'\]\)[.] Choose one with `dtype`"
    )
    with pytest.raises(CheckpointError, match=match):
        convert.load_llama(packed)
    first = bnb.dequantize(dict(trees.walk(before))[DOWN][0])
    second = weight if double_quant is None else bnb.dequantize(value)
    for dtype in (np.float32, BF16, np.float16):
        name = np.dtype(dtype).name
        _, base = convert.load_llama(packed, dtype=name)
        got = dict(trees.walk(base))[DOWN]
        want = np.stack([first.astype(dtype), second.astype(dtype)])
        assert got.dtype == want.dtype
        assert got.tobytes() == want.tobytes()


def test_scales_that_are_not_finite_are_named(packed, tiny, make_tensors):
    weight = make_tensors(tiny, BF16)[key(Q, 1)]
    bad = quantize(weight, double_quant=False)
    bad.absmax[0] = np.nan
    replace(packed, {key(Q, 1): bad})
    with pytest.raises(CheckpointError, match=f"Tensor `{key(Q, 1)}` contains NaN"):
        convert.load_llama(packed)


@pytest.mark.parametrize(
    "original, dense, expected",
    [
        (None, [], None),
        ([], [], []),
        (["lm_head"], [], ["lm_head"]),
        (None, ["a.0.q_proj", "a.1.q_proj"], ["lm_head", "q_proj"]),
        (["lm_head", "a.0"], ["a.0.q_proj"], ["lm_head", "a.0"]),
        (["a.0"], ["a.0.q_proj", "a.1.q_proj"], ["a.0", "q_proj"]),
        (["a.1", "a.*.q"], ["a.10.q_proj"], ["a.1", "a.*.q", "q_proj"]),
        ([r"a\.\d+\.(q|k)_proj"], ["a.10.q_proj"], [r"a\.\d+\.(q|k)_proj"]),
        (["*", "q_proj"], ["a.0.q_proj"], ["*", "q_proj"]),
        # What it names is packed now.
        (["a.0", "v_proj", "a.3"], [], ["a.0", "a.3"]),
        (["b"], ["b.0.q_proj"], ["q_proj"]),
    ],
)
def test_the_list_of_skipped_modules(original, dense, expected):
    got = bnb.skip_modules(original, dense=dense, packed=["b.1.v_proj"])
    assert got == expected


def test_skipped_modules_that_take_too_long_to_match_are_refused(monkeypatch):
    monkeypatch.setattr("qlora_jax.lora.patterns.SECONDS", 0.05)
    match = "llm_int8_skip_modules`: the regular .* takes too long to match"
    packed = ["model.layers.12.self_attn.q_proj.weight"]
    with pytest.raises(UserError, match=match):
        bnb.skip_modules([r"(?:(?:.|..)+)+[A-Z]"], dense=[], packed=packed)


def test_host_memory_peaks_at_the_output_and_two_tensors(
    big_model, packed, tiny, make_tensors, tmp_path, measure
):
    replace(packed, {key(Q, 1): make_tensors(tiny, BF16)[key(Q, 1)]})
    checkpoint = open_checkpoint(big_model)
    once: dict[trees.Path, NF4Tensor] = {}  # all layers hold the same bytes
    entries = []
    for name, (path, layer) in checkpoint_keys(checkpoint.config).items():
        weight = checkpoint.files.read(name)
        if model_params.is_projection(path) and layer != 3:
            if path not in once:
                once[path] = quantize(weight, double_quant=True)
            entries += bnb.entries(name, once[path], None, quant_storage="uint8")
        else:
            entries.append(Entry.of(name, weight))
    (tmp_path / "big").mkdir()
    write_json(tmp_path / "big/config.json", checkpoint.config.to_hf())
    write_model_files(tmp_path / "big", entries, max_shard_bytes=5_000_000_000)
    program = """
warm(convert.load_llama, sys.argv[2])
_, base = peak(convert.load_llama, sys.argv[1])
print(sum(leaf.nbytes for leaf in jax.tree.leaves(base)))
"""
    growth, output = measure(program, tmp_path / "big", packed)
    assert output > 4e8  # all of it dense
    # Output plus two of the largest tensors in float32, as for every other file.
    assert growth <= output + 2 * 8192 * 2048 * 4 + 8e6
