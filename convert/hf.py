"""Hugging Face Llama directories <-> our parameter tree, streamed tensor by tensor.

Everything about a directory is checked before the first weight is read; then each
tensor goes from the file into its place in the stacked output. Host memory peaks at the
output plus the tensor in hand and the scratch of its quantization. Writing goes the
same way: one layer of one tensor at a time.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from numpy.typing import NDArray

from convert import bnb, names
from convert.checkpoint import FLOATS, Checkpoint, open_checkpoint
from convert.files import DTYPES, Mismatches, TensorFiles, check_finite
from convert.output import (
    Entry,
    copy_file,
    new_directory,
    progress_bar,
    write_json,
    write_model_files,
)
from qlora_jax.choices import Quantized
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import NF4Tensor, quantize

# What belongs to a model beside its weights and config.json; copied as it is.
_COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)


def load_llama(
    path: str | os.PathLike[str],
    *,
    quantization: Quantized | None = "nf4",
    quantize_lm_head: bool = False,
    dtype: str | None = None,
    progress: bool = False,
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Loads a Hugging Face Llama directory as a tree of numpy arrays, layers stacked.

    In a bitsandbytes-4bit directory the weights that are packed stay as they are,
    whatever `quantization` says ("nf4" on a double-quantized file keeps the double
    quantization, None keeps the packed bytes), and those that are dense stay dense.

    A projection is one array for all its layers. Where a file has some of them in 4 bit
    and others not (or differing in double quantization or dtype), all become dense: the
    packed ones are dequantized to the dtype they were quantized from, the values that
    bitsandbytes computes with. That costs memory, 2 bytes a 16-bit weight instead of
    about 0.5, in every layer of that projection. `open_checkpoint(path).mixed` of
    `convert.checkpoint` lists such projections; `progress` says it on stderr.

    Args:
      path: directory with config.json and safetensors (fp32, bf16 or fp16; sharded or
        not; or bitsandbytes NF4).
      quantization: how the seven projections of each layer are quantized: NF4, NF4
        with double quantization, or None for not at all. Embeddings, norms and biases
        are never quantized.
      quantize_lm_head: quantize the output head as well, of a model that has one of its
        own (`tie_word_embeddings` false).
      dtype: "float32", "bfloat16" or "float16" for the tensors that stay dense; None
        keeps each file's own. Weights are quantized from the file's precision.
      progress: show a progress bar on stderr, and what had to be made dense.

    Returns:
      (config, base): `base` has Hugging Face's names and [out, in] orientation, each
      tensor of a layer with a leading layer axis; quantized ones are `NF4Tensor`s.

    Raises:
      CheckpointError: a directory, file or tensor that is not as it should be.
      UserError: an unsupported architecture or argument.
    """
    config, base, fill, checkpoint = _allocate(
        path, quantization, quantize_lm_head, dtype
    )
    files = checkpoint.files
    if checkpoint.mixed and progress:
        print(_made_dense(checkpoint, base), file=sys.stderr)
    order = files.in_file_order(list(fill))
    with progress_bar(
        "Loading", sum(files[k].nbytes for k in order), progress
    ) as advance:
        for key, following in zip(order, [*order[1:], None], strict=True):
            if following is not None:
                files.read_ahead(following)
            fill.pop(key)()
            advance(files[key].nbytes)
    return config, base


def abstract_llama(
    path: str | os.PathLike[str],
    *,
    quantization: Quantized | None = "nf4",
    quantize_lm_head: bool = False,
    dtype: str | None = None,
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Returns the shapes of what `load_llama` would load, from the files' headers.

    Arguments and errors are those of `load_llama`; no tensor is read.
    """
    config, base, _, _ = _allocate(path, quantization, quantize_lm_head, dtype)
    return config, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base
    )


def _allocate(
    path: str | os.PathLike[str],
    quantization: str | None,
    quantize_lm_head: bool,
    dtype: str | None,
) -> tuple[LlamaConfig, dict[str, Any], dict[str, Callable[[], None]], Checkpoint]:
    """Makes the arrays of a base, and what fills them from the files.

    The arrays are memory that the system hands out once it is written to.
    """
    if quantization not in (*get_args(Quantized), None):
        raise UserError(
            f"`quantization`={quantization!r} is not supported; expected 'nf4', "
            "'nf4_dq' or None."
        )
    check_dtype(dtype)
    checkpoint = open_checkpoint(path)
    config = checkpoint.config
    if quantize_lm_head:
        _check_head_can_be_quantized(checkpoint, quantization)
    if checkpoint.quantized:
        quantization = None
    mixed = checkpoint.mixed
    base: dict[str, Any] = {}
    fill: dict[str, Callable[[], None]] = {}
    problems = Mismatches(f"`{path}` mixes dtypes among the layers of one tensor")
    for where, shape in model_params.shapes(config).items():
        layers = model_params.layers_of(where, config)
        spelled = [names.hf_key(where, i) for i in layers]
        leading = (len(layers),) if names.is_stacked(where) else ()
        quantized = quantization is not None and (
            model_params.is_projection(where)
            or (quantize_lm_head and where == ("lm_head", "weight"))
        )
        if spelled[0] in checkpoint.packed and where not in mixed:
            state = checkpoint.packed[spelled[0]]
            leaf = bnb.empty(
                state.shape,
                double_quant=state.double_quant,
                dtype=state.dtype,
                leading=leading,
            )
        else:
            found = sorted({checkpoint.dtype(k) for k in spelled})
            if len(found) > 1 and dtype is None:
                problems.add("stacks of layers", f"{'.'.join(where)} ({found})")
                continue
            own = found[0] if len(found) == 1 or dtype is None else dtype
            if quantized:
                leaf = bnb.empty(
                    (shape[0], shape[1]),
                    double_quant=quantization == "nf4_dq",
                    dtype=own,
                    leading=leading,
                )
            else:
                leaf = np.empty((*leading, *shape), DTYPES[FLOATS[dtype or own]])
        names.put(base, where, leaf)
        for i, key in zip(layers, spelled, strict=True):
            slot = ... if i is None else slice(i, i + 1)
            fill[key] = _filler(checkpoint, key, leaf[slot])
    problems.check(hint="Say with `dtype` which one is wanted.")
    return config, base, fill, checkpoint


def _check_head_can_be_quantized(
    checkpoint: Checkpoint, quantization: str | None
) -> None:
    reason = None
    if checkpoint.config.tie_word_embeddings:
        reason = "it has none of its own: embed_tokens is used, and a lookup needs it"
    elif checkpoint.quantized:
        reason = "the directory is quantized already, and is loaded as it is"
    elif quantization is None:
        reason = "`quantization` is None"
    if reason is not None:
        raise UserError(
            f"The lm_head of `{checkpoint.path}` cannot be quantized: {reason}."
        )


def _filler(checkpoint: Checkpoint, key: str, place: Any) -> Callable[[], None]:
    """Returns what reads `key` into `place`, views of its slot in the output."""
    if key in checkpoint.packed and isinstance(place, NF4Tensor):
        return lambda: _fill_packed(checkpoint, key, place)
    if key in checkpoint.packed:
        return lambda: _fill_dequantized(checkpoint, key, place)
    if isinstance(place, NF4Tensor):
        return lambda: _fill_quantized(checkpoint.files, key, place)
    return lambda: _fill_dense(checkpoint.files, key, place)


def _fill_packed(checkpoint: Checkpoint, key: str, place: NF4Tensor) -> None:
    bnb.read_into(checkpoint.files, key, checkpoint.packed[key], place)
    for scale in (place.absmax, place.nested_absmax):
        if scale is not None and scale.dtype == np.float32:
            check_finite(scale, key)


def _fill_dequantized(checkpoint: Checkpoint, key: str, place: NDArray) -> None:
    weight = bnb.dequantize(bnb.read(checkpoint.files, key, checkpoint.packed[key]))
    place[...] = cast(weight, place.dtype, key).reshape(place.shape)


def _made_dense(checkpoint: Checkpoint, base: Mapping[str, Any]) -> str:
    """Says which projections `load_llama` makes dense, and what that costs."""
    leaves, config = dict(names.walk(base)), checkpoint.config
    stored = 0
    for path in checkpoint.mixed:
        for layer in model_params.layers_of(path, config):
            key = names.hf_key(path, layer)
            state = checkpoint.packed.get(key)
            parts = bnb.part_names(key, state.double_quant) if state else [key]
            stored += sum(checkpoint.files[part].nbytes for part in parts)
    held = sum(leaves[path].nbytes for path in checkpoint.mixed)
    return (
        f"Dense in every layer, because not all layers are stored alike in "
        f"`{checkpoint.path}`: {', '.join(path[-2] for path in checkpoint.mixed)} "
        f"({held / 1e9:.2f} GB in memory, {stored / 1e9:.2f} GB in the file)."
    )


def _fill_quantized(files: TensorFiles, key: str, place: NF4Tensor) -> None:
    one = quantize_tensor(files.read(key), key, double_quant=place.double_quant)
    for target, value in zip(jax.tree.leaves(place), jax.tree.leaves(one), strict=True):
        target[...] = value.reshape(target.shape)


def _fill_dense(files: TensorFiles, key: str, place: NDArray) -> None:
    if place.dtype == DTYPES[files[key].dtype]:
        files.read_into(key, place)
        check_finite(place, key)
    else:
        place[...] = cast(files.read(key), place.dtype, key).reshape(place.shape)


def quantize_tensor(weight: NDArray, key: str, *, double_quant: bool) -> NF4Tensor:
    """Quantizes one weight; a NaN or infinity is reported with its name."""
    try:
        return quantize(weight, double_quant=double_quant)
    except UserError as error:
        raise CheckpointError(f"Tensor `{key}`: {error}") from error


def cast(array: NDArray, dtype: Any, key: str) -> NDArray:
    """Casts a float tensor, rounding to nearest; refuses NaN, infinity and overflow."""
    check_finite(array, key)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    if np.dtype(dtype) == np.float16:
        try:
            check_finite(out, key)
        except CheckpointError:
            raise CheckpointError(
                f"Tensor `{key}` has values beyond float16's range (65504); use "
                "dtype='bfloat16'."
            ) from None
    return out


def check_dtype(dtype: str | None) -> None:
    """Refuses what is no float dtype of a checkpoint."""
    if dtype is not None and dtype not in FLOATS:
        raise UserError(
            f"`dtype`={dtype!r} is not supported; expected one of {', '.join(FLOATS)}, "
            "or None to keep the file's."
        )


def save_llama(
    directory: str | os.PathLike[str],
    config: LlamaConfig,
    base: Mapping[str, Any],
    *,
    dtype: str | None = None,
    max_shard_bytes: int = 5_000_000_000,
    quant_storage: str | None = None,
    tokenizer_from: str | os.PathLike[str] | None = None,
    progress: bool = False,
) -> None:
    """Writes a Hugging Face directory; NF4 leaves become bitsandbytes-4bit tensors.

    The directory appears complete or not at all. What `load_llama` read is written
    with the same bytes for every tensor, but for projections that it had to make dense
    (see there), which are written dense.

    Args:
      directory: to be created; must not exist or be empty.
      config: written as config.json, with every field of the file it came from.
      base: parameter tree, as `load_llama` returns it (numpy or jax arrays).
      dtype: "float32", "bfloat16" or "float16" for the dense tensors; None keeps them.
      max_shard_bytes: size above which the weights are split over several files.
      quant_storage: dtype that the packed bytes are stored as; None is what the
        file had that `config` came from, else "uint8".
      tokenizer_from: directory whose tokenizer and generation_config.json are copied.
      progress: show a progress bar on stderr.

    Raises:
      UserError: a tree that does not fit `config`, an unusable argument, or a
        directory that cannot be written.
      CheckpointError: NaN or infinity in a tensor that is cast.
    """
    check_dtype(dtype)
    own = config.quantization_config or {}
    skip = own.get("llm_int8_skip_modules")
    storage = quant_storage or own.get("bnb_4bit_quant_storage") or "uint8"
    leaves = check_tree(config, base)
    packed = {p: v for p, v in leaves.items() if isinstance(v, NF4Tensor)}
    for path, tensor in packed.items():
        reason = bnb.storage_problem(tensor, storage)
        if reason is not None:
            raise UserError(f"`{'.'.join(path)}`: {reason}.")
    entries: list[Entry] = []
    for key, (path, layer) in names.keys(config).items():
        leaf = leaves[path]
        if path in packed:
            entries += bnb.entries(key, leaf, layer, quant_storage=storage)
        else:
            entries.append(_dense_entry(key, leaf, layer, dtype))
    written = names.leaf_dtype(leaves["model", "embed_tokens", "weight"])
    raw = config_json(config, dtype or written)
    raw.pop("quantization_config", None)
    if packed:
        fresh = bnb.new_quantization_config(
            compute_dtype=dtype or written,
            quant_storage=storage,
            double_quant=any(t.double_quant for t in packed.values()),
        )
        raw["quantization_config"] = {
            **fresh,
            **own,
            "bnb_4bit_quant_storage": storage,
            "bnb_4bit_use_double_quant": fresh["bnb_4bit_use_double_quant"],
            "llm_int8_skip_modules": bnb.skip_modules(
                skip if isinstance(skip, list) else None,
                dense=_modules(config, lambda path: path not in packed),
                packed=_modules(config, lambda path: path in packed),
            ),
        }
    write_directory(
        directory,
        raw,
        entries,
        max_shard_bytes=max_shard_bytes,
        tokenizer_from=tokenizer_from,
        progress=progress,
    )


def _modules(config: LlamaConfig, wanted: Callable[[names.Path], bool]) -> list[str]:
    """Hugging Face names of the projections, layer by layer, whose path is wanted."""
    return [
        key.removesuffix(".weight")
        for key, (path, _) in names.keys(config).items()
        if model_params.is_projection(path) and wanted(path)
    ]


def _dense_entry(key: str, leaf: Any, layer: int | None, dtype: str | None) -> Entry:
    target = DTYPES[FLOATS[dtype or names.leaf_dtype(leaf)]]

    def read() -> NDArray:
        array = np.asarray(leaf if layer is None else leaf[layer])
        return array if dtype is None else cast(array, target, key)

    shape = leaf.shape if layer is None else leaf.shape[1:]
    return Entry(key, target, tuple(shape), read)


def check_tree(config: LlamaConfig, base: Mapping[str, Any]) -> dict[names.Path, Any]:
    """Lists the leaves of a parameter tree, checked against the configuration."""
    leaves = dict(names.walk(base))
    shapes = model_params.shapes(config)
    problems = Mismatches("The parameter tree does not fit the configuration")
    for path, shape in shapes.items():
        name = ".".join(path)
        leading = (config.num_hidden_layers,) if names.is_stacked(path) else ()
        if path not in leaves:
            problems.add("missing arrays", name)
        elif isinstance(leaf := leaves[path], NF4Tensor):
            if not model_params.is_projection(path):
                problems.add("quantized arrays that have to stay 16-bit", name)
            elif (leaf.shape, leaf.codes.shape[:1]) != (shape, leading):
                problems.add("arrays of another shape", f"{name} {leaf.shape}")
        elif tuple(leaf.shape) != (*leading, *shape):
            problems.add(
                "arrays of another shape",
                f"{name} {list(leaf.shape)} instead of {[*leading, *shape]}",
            )
        elif names.leaf_dtype(leaf) not in FLOATS:
            problems.add("arrays of another dtype", f"{name} {names.leaf_dtype(leaf)}")
    for path in leaves:
        if path not in shapes:
            problems.add("unexpected arrays", ".".join(path))
    problems.check()
    return leaves


def config_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """The config.json of a checkpoint whose dense tensors are of `dtype`."""
    raw = config.to_hf()
    # transformers 5 calls it `dtype`, transformers 4 `torch_dtype`; both read the
    # older one.
    raw["dtype" if "dtype" in raw else "torch_dtype"] = dtype
    return raw


def write_directory(
    directory: str | os.PathLike[str],
    config: Mapping[str, Any],
    entries: Sequence[Entry],
    *,
    max_shard_bytes: int,
    tokenizer_from: str | os.PathLike[str] | None,
    progress: bool,
    finish: Callable[[Path], None] = lambda directory: None,
) -> None:
    """Writes config.json, weights and companions as one new directory.

    `finish` is called with it when all that is written, before it takes its name.
    """
    source = None if tokenizer_from is None else Path(tokenizer_from)
    if source is not None and not source.is_dir():
        raise UserError(f"`tokenizer_from`: `{source}` is no directory.")
    total = sum(e.nbytes for e in entries)
    with (
        new_directory(Path(directory)) as new,
        progress_bar("Writing", total, progress) as advance,
    ):
        write_json(new / "config.json", config)
        write_model_files(
            new, entries, max_shard_bytes=max_shard_bytes, on_bytes=advance
        )
        if source is not None:
            for name in _COMPANIONS:
                if (source / name).is_file():
                    copy_file(source / name, new / name)
        finish(new)
