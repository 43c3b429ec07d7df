"""Projections that a file has in 4 bit in some layers only."""

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
from convert.atomic import write_json
from convert.checkpoint import open_checkpoint
from convert.merging import write_dense
from convert.names import checkpoint_keys
from convert.output import Entry, write_model_files
from convert.verify import compare_adapters as compare
from qlora_jax import tree as trees
from qlora_jax.cli.convert import main
from qlora_jax.errors import CheckpointError
from qlora_jax.models import params as model_params
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.nf4 import NF4Tensor, quantize
from tests.convert.reference import (
    MODEL,
    all_tensors,
    edit_json,
    equal_arrays,
    pack,
    read,
    same_file,
)

BF16 = ml_dtypes.bfloat16
Q = ("model", "layers", "self_attn", "q_proj", "weight")
DOWN = ("model", "layers", "mlp", "down_proj", "weight")
# Projection -> its layers that are left in 32 bit in `mixed`.
LEFT = {(*Q[:3], f"{x}_proj", "weight"): [0] for x in "qkvo"} | {DOWN: [3]}
LEFT[Q] = [0, 2]
SKIP = [
    *("lm_head", "model.layers.0.self_attn", "model.layers.2.self_attn.q_proj"),
    "model.layers.3.mlp.down_proj",
]
key = trees.hf_key


def replace(directory: Path, weights: Mapping[str, Any], skip=None) -> Path:
    """Puts dense arrays or NF4 tensors in the place of weights."""
    tensors = dict(safetensors.numpy.load_file(directory / MODEL))
    for name, value in weights.items():
        for part in [n for n in tensors if n.startswith(name)]:
            del tensors[part]
        if isinstance(value, NF4Tensor):
            entries = bnb.entries(name, value, None, quant_storage="uint8")
            tensors |= {entry.name: entry.read() for entry in entries}
        else:
            tensors[name] = value
    safetensors.numpy.save_file(tensors, directory / MODEL, {"format": "pt"})
    if "quantization_config" in (raw := read(directory)):
        quantization = {**raw["quantization_config"], "llm_int8_skip_modules": skip}
        edit_json(directory / "config.json", quantization_config=quantization)
    return directory


@pytest.fixture
def mixed(golden, tmp_path) -> Path:
    """The 4-bit checkpoint, with some modules of single layers left in 32 bit."""
    path = shutil.copytree(golden / "llama32/nf4_dq", tmp_path / "mixed")
    dense = safetensors.numpy.load_file(golden / "llama32/fp32" / MODEL)
    left = [key(path, layer) for path, layers in LEFT.items() for layer in layers]
    return replace(path, {name: dense[name] for name in left}, SKIP)


@pytest.fixture
def by_layer(golden) -> Callable[[trees.Path], np.ndarray]:
    """A function: what a stack is, with the layers of `LEFT` in 32 bit."""
    _, dense = convert.load_llama(golden / "llama32/fp32", quantization=None)
    _, packed = convert.load_llama(golden / "llama32/nf4_dq")

    def stack(path):
        a, b = (trees.at(tree, path) for tree in (dense, packed))
        rows = (a[i] if i in LEFT[path] else bnb.dequantize(b[i]) for i in range(4))
        return np.stack([*rows])

    return stack


@pytest.mark.golden
@pytest.mark.parametrize("quantization", ["nf4", None])
def test_such_stacks_become_dense(golden, mixed, by_layer, quantization):
    config, base = convert.load_llama(mixed, quantization=quantization)
    assert set(open_checkpoint(mixed).mixed) == set(LEFT)
    _, reference = convert.load_llama(golden / "llama32/nf4_dq")
    for path in LEFT:
        trees.put(reference, path, by_layer(path))
    assert equal_arrays(base, reference)
    # A model can be made of them.
    tokens = jnp.asarray(np.load(golden / "llama32/logits_fp32.npz")["ids"], jnp.int32)
    run = jax.jit(Llama(config, Compute(dtype="float32")).apply)
    assert np.isfinite(run({"params": base}, tokens)).all()


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
    out, twice = tmp_path / "out", tmp_path / "twice"
    convert.save_llama(out, config, base)
    raw, old = read(out), read(mixed)
    skipped = raw["quantization_config"].pop("llm_int8_skip_modules")
    assert skipped == [*SKIP, "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
    del old["quantization_config"]["llm_int8_skip_modules"]
    assert raw == old
    assert open_checkpoint(out).mixed == ()
    assert equal_arrays(convert.load_llama(out)[1], base)
    pack(out, twice)
    assert all(same_file(out, twice, name) for name in ("config.json", MODEL))
    assert {d.name for d in compare(mixed, out).different} == {
        key(path, i) for path in LEFT for i in range(4) if i not in LEFT[path]
    }


@pytest.mark.golden
def test_merged_and_dequantized_like_any_other(golden, mixed, by_layer, tmp_path):
    dense, merged, reference = (tmp_path / name for name in "dmr")
    write_dense(mixed, dense)
    tensors, stack = all_tensors(dense), by_layer(Q)
    for layer in range(4):
        assert tensors[key(Q, layer)].tobytes() == stack[layer].tobytes()
    adapter = golden / "adapters/llama32/qlora_plain"
    convert.merge(mixed, adapter, merged, onto="dequantized")
    convert.merge(dense, adapter, reference)
    assert same_file(merged, reference)


@pytest.mark.golden
def test_on_the_command_line(golden, mixed, tmp_path, capsys):
    args = ["model", str(mixed), str(tmp_path / "out"), "--json"]
    assert main([*args, "--quant-storage", "bfloat16"]) == 0
    made_dense = json.loads(capsys.readouterr().out)["made_dense"]
    attention = [f"model.layers.self_attn.{x}_proj" for x in "qkvo"]
    assert made_dense == [*attention, "model.layers.mlp.down_proj"]
    # Nothing is left in 4 bit here, so there is nothing to store so.
    source = shutil.copytree(golden / "llama32/fp32", tmp_path / "source")
    weight = all_tensors(source)[key(Q, 1)]
    replace(source, {key(Q, 1): quantize(weight, double_quant=False)})
    args = ["model", str(source), str(tmp_path / "all"), "--json"]
    assert main([*args, "--quant-storage", "bfloat16"]) == 1
    assert "--quant-storage goes with 4-bit output only" in capsys.readouterr().err
    assert main(args) == 0
    assert json.loads(capsys.readouterr().out)["made_dense"] == [".".join(Q[:-1])]
    assert "quantization_config" not in read(tmp_path / "all")


# --- What else can differ among layers ---


@pytest.fixture
def packed(make_model, tmp_path) -> Path:
    return pack(make_model(dtype=BF16), tmp_path / "packed", "nf4_dq")


@pytest.fixture
def weights(tiny, make_tensors) -> dict[str, np.ndarray]:
    """What was packed there."""
    return make_tensors(tiny, BF16)


def test_double_quantization_in_some_layers(packed, weights):
    single = quantize(weights[key(Q, 1)], double_quant=False)
    first = bnb.dequantize(trees.at(convert.load_llama(packed)[1], Q)[0])
    _, base = convert.load_llama(replace(packed, {key(Q, 1): single}))
    expected = np.stack([first, bnb.dequantize(single)])
    assert expected.dtype == BF16
    assert equal_arrays(trees.at(base, Q), expected)


@pytest.mark.parametrize("double_quant", [None, True])
def test_dtypes_that_differ_have_to_be_decided(packed, weights, double_quant):
    value = second = weights[key(DOWN, 1)].astype(np.float32)
    if double_quant is not None:
        value = quantize(value, double_quant=double_quant)
        second = bnb.dequantize(value)
    first = bnb.dequantize(trees.at(convert.load_llama(packed)[1], DOWN)[0])
    replace(packed, {key(DOWN, 1): value})
    match = (
        r"mixes dtypes.*1 stacks of layers: model.layers.mlp.down_proj.weight "
        r"\(\['bfloat16', 'float32'\]\)[.] Choose one with `dtype`"
    )
    with pytest.raises(CheckpointError, match=match):
        convert.load_llama(packed)
    for dtype in (np.float32, BF16, np.float16):
        _, base = convert.load_llama(packed, dtype=np.dtype(dtype).name)
        want = np.stack([first.astype(dtype), second.astype(dtype)])
        assert equal_arrays(trees.at(base, DOWN), want)


def test_scales_that_are_not_finite_are_named(packed, weights):
    bad = quantize(weights[key(Q, 1)], double_quant=False)
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
        # Versions 4.5x of transformers read "a.1" as the beginning of "a.10".
        (["a.1"], ["a.10.q_proj"], ["a.1", "q_proj"]),
        (["b.1.v"], [], []),
        # In another version "mlp" is not the name of a module within the path.
        (["mlp"], ["a.0.mlp.up_proj"], ["mlp", "up_proj"]),
        (["proj"], ["a.0.q_proj"], ["q_proj"]),
        # What is not a name means something else to each version.
        ([r"a\.\d+\.(q|k)_proj"], ["a.10.q_proj"], ["q_proj"]),
        (["(?:(?:.|..)+)+[A-Z]", 1, None, ["x"], "", "q_proj"], [], ["q_proj"]),
        ("lm_head", [], ["lm_head"]),
        (7, ["a.0.q_proj"], ["q_proj"]),
        # What it names is packed now.
        (["a.0", "v_proj", "a.3"], [], ["a.0", "a.3"]),
        (["b"], ["b.0.q_proj"], ["q_proj"]),
    ],
)
def test_the_list_of_skipped_modules(original, dense, expected):
    got = bnb.skip_modules(original, dense=dense, packed=["b.1.v_proj"])
    assert got == expected


def test_entries_that_are_not_names_are_counted(capsys):
    bnb.skip_modules(["lm_head", "q.*", None], dense=[], packed=["a.0.v_proj"])
    assert (
        "2 of 3 entries of `llm_int8_skip_modules` are not" in capsys.readouterr().err
    )
    bnb.skip_modules(["lm_head"], dense=[], packed=["a.0.v_proj"])
    assert capsys.readouterr().err == ""


def test_the_peak_of_host_memory(big_model, packed, weights, tmp_path, measure):
    replace(packed, {key(Q, 1): weights[key(Q, 1)]})
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
