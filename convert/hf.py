"""Hugging Face Llama directories <-> our parameter tree, streamed tensor by tensor.

A directory is checked before the first weight is read; then each tensor is read from
the file into its slice of the stacked output. Host memory peaks at the output plus one
tensor and the scratch memory of its quantization. Writing streams in the same way, one
layer of one tensor at a time.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, get_args

import jax
import numpy as np
from numpy.typing import NDArray

from convert import bnb
from convert.atomic import new_directory, write_json
from convert.checkpoint import Checkpoint, open_checkpoint
from convert.companions import companion_files
from convert.files import DTYPES, FLOAT_DTYPES, Mismatches, TensorFiles, check_finite
from convert.names import checkpoint_keys
from convert.output import Entry, progress_bar, write_files, write_model_files
from qlora_jax import tree as trees
from qlora_jax.choices import Quantized
from qlora_jax.errors import CheckpointError, UserError, say
from qlora_jax.models import LlamaConfig
from qlora_jax.models import params as model_params
from qlora_jax.nf4 import NF4Tensor, quantize


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
    `convert.checkpoint` lists such projections; `progress` reports them on stderr.

    Args:
      path: directory with config.json and safetensors (fp32, bf16 or fp16; sharded or
        not; or bitsandbytes NF4).
      quantization: how the seven projections of each layer are quantized: NF4, NF4
        with double quantization, or None for not at all. Embeddings, norms and biases
        are never quantized.
      quantize_lm_head: quantize the output head as well, of a model whose head is not
        the embedding (`tie_word_embeddings` false).
      dtype: "float32", "bfloat16" or "float16" for the tensors that stay dense; None
        keeps each file's own. Weights are quantized from the file's precision, and
        dequantize to values of `dtype`, as in transformers, which casts them to it
        before. (Those of a 4-bit directory dequantize to their own.)
      progress: show a progress bar on stderr, and which projections became dense.

    Returns:
      (config, base): `base` has Hugging Face's names and [out, in] orientation, each
      tensor of a layer with a leading layer axis; quantized ones are `NF4Tensor`s.

    Raises:
      CheckpointError: a damaged or incomplete directory, file or tensor.
      UserError: an unsupported architecture or argument.
    """
    checkpoint, base = _allocate(path, quantization, quantize_lm_head, dtype)
    files, config = checkpoint.files, checkpoint.config
    if checkpoint.mixed and progress:
        say(_made_dense(checkpoint, base))
    leaves = dict(trees.walk(base))
    table = checkpoint_keys(config)
    # Sequential reads; while one tensor is quantized, the system reads the next.
    order = files.in_file_order(list(table))
    total = sum(files[key].nbytes for key in order)
    with progress_bar("Loading", total, progress) as advance:
        for key, following in zip(order, [*order[1:], None], strict=True):
            if following is not None:
                files.read_ahead(following)
            path_in_tree, layer = table[key]
            # A slice, not an index: of the nested offsets, [L], an index would give a
            # number and not a view to write to.
            layer_slice = ... if layer is None else slice(layer, layer + 1)
            _fill(checkpoint, key, leaves[path_in_tree][layer_slice])
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
    checkpoint, base = _allocate(path, quantization, quantize_lm_head, dtype)
    return checkpoint.config, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), base
    )


def _allocate(
    path: str | os.PathLike[str],
    quantization: str | None,
    quantize_lm_head: bool,
    dtype: str | None,
) -> tuple[Checkpoint, dict[str, Any]]:
    """Opens a directory and makes the uninitialized arrays of its base.

    The system commits their memory when it is written to.
    """
    if quantization not in (*get_args(Quantized), None):
        raise UserError(
            f"`quantization`={quantization!r} is not supported; expected 'nf4', "
            "'nf4_dq' or None."
        )
    check_dtype(dtype)
    checkpoint = open_checkpoint(path)
    # A head that is packed in the directory is what was asked for.
    if quantize_lm_head and f"{trees.HEAD[-1]}.weight" not in checkpoint.packed:
        _check_head_can_be_quantized(checkpoint, quantization)
    if checkpoint.quantized:
        quantization = None
    mixed = checkpoint.mixed
    base: dict[str, Any] = {}
    problems = Mismatches(f"`{path}` mixes dtypes among the layers of one tensor")
    for path_in_tree, shape in model_params.shapes(checkpoint.config).items():
        layers = model_params.layers_of(path_in_tree, checkpoint.config)
        keys = [trees.hf_key(path_in_tree, layer) for layer in layers]
        leading = (len(layers),) if trees.is_stacked(path_in_tree) else ()
        # Stands for all layers, unless the projection is `mixed`.
        state = checkpoint.packed.get(keys[0])
        stored = sorted({checkpoint.dtype(key) for key in keys})
        if state is not None and path_in_tree not in mixed:
            leaf = bnb.empty(
                state.shape,
                double_quant=state.double_quant,
                dtype=state.dtype,
                leading=leading,
                block_size=state.block_size,
            )
        # A stack is one array, and so of one dtype.
        elif len(stored) > 1 and dtype is None:
            problems.add("stacks of layers", f"{'.'.join(path_in_tree)} ({stored})")
            continue
        elif quantization is not None and (
            model_params.is_projection(path_in_tree)
            or (quantize_lm_head and path_in_tree == (*trees.HEAD, "weight"))
        ):
            leaf = bnb.empty(
                (shape[0], shape[1]),
                double_quant=quantization == "nf4_dq",
                dtype=dtype or stored[0],
                leading=leading,
            )
        else:
            leaf = np.empty(
                (*leading, *shape), DTYPES[FLOAT_DTYPES[dtype or stored[0]]]
            )
        trees.put(base, path_in_tree, leaf)
    problems.check(hint="Choose one with `dtype`.")
    return checkpoint, base


def _check_head_can_be_quantized(
    checkpoint: Checkpoint, quantization: str | None
) -> None:
    reason = None
    if checkpoint.config.tie_word_embeddings:
        reason = "it is tied to embed_tokens, whose rows are looked up"
    elif checkpoint.quantized:
        reason = "the directory is quantized already, and is loaded as it is"
    elif quantization is None:
        reason = "`quantization` is None"
    if reason is not None:
        raise UserError(
            f"The lm_head of `{checkpoint.path}` cannot be quantized: {reason}."
        )


def _fill(checkpoint: Checkpoint, key: str, destination: Any) -> None:
    """Reads one tensor into its slice of the output, in the form that has there."""
    files, state = checkpoint.files, checkpoint.packed.get(key)
    if isinstance(destination, NF4Tensor):
        if state is None:
            _fill_quantized(files, key, destination)
            return
        bnb.read_into(files, key, state, destination)
    elif state is None and destination.dtype == DTYPES[files[key].dtype]:
        files.read_into(key, destination)
        check_finite(destination, key)
    else:
        if state is None:
            weight = files.read(key)
        else:
            weight = bnb.dequantize(bnb.read(files, key, state))
        # A packed layer of a mixed stack, or another dtype than the file's.
        weight = cast(weight, destination.dtype, key)
        destination[...] = weight.reshape(destination.shape)


def _fill_quantized(files: TensorFiles, key: str, destination: NF4Tensor) -> None:
    packed = quantize_tensor(
        files.read(key), key, double_quant=destination.double_quant
    )
    for target, value in zip(
        jax.tree.leaves(destination), jax.tree.leaves(packed), strict=True
    ):
        target[...] = value.reshape(target.shape)


def _made_dense(checkpoint: Checkpoint, base: Mapping[str, Any]) -> str:
    """Describes which projections `load_llama` makes dense, and what that costs."""
    leaves, config = dict(trees.walk(base)), checkpoint.config
    stored = 0
    for path in checkpoint.mixed:
        for layer in model_params.layers_of(path, config):
            key = trees.hf_key(path, layer)
            state = checkpoint.packed.get(key)
            parts = bnb.part_names(key, state.double_quant) if state else [key]
            stored += sum(checkpoint.files[part].nbytes for part in parts)
    held = sum(leaves[path].nbytes for path in checkpoint.mixed)
    return (
        f"Dense in every layer, because not all layers are stored alike in "
        f"`{checkpoint.path}`: {', '.join(path[-2] for path in checkpoint.mixed)} "
        f"({held / 1e9:.2f} GB in memory, {stored / 1e9:.2f} GB in the file)."
    )


def quantize_tensor(weight: NDArray, key: str, *, double_quant: bool) -> NF4Tensor:
    """Quantizes one weight; an error names its key."""
    try:
        return quantize(weight, double_quant=double_quant)
    except UserError as error:
        raise CheckpointError(f"Tensor `{key}`: {error}") from error


def cast(array: NDArray, dtype: Any, key: str) -> NDArray:
    """Casts a float tensor, rounding to nearest.

    Raises:
      CheckpointError: NaN, infinity or overflow, naming `key`.
    """
    check_finite(array, key)
    if array.dtype == dtype:
        return array
    with np.errstate(over="ignore"):
        out = array.astype(dtype)
    # float16 ends at 65504. bfloat16 has the exponents of float32 and fewer digits: a
    # value above its largest, 3.39e38, rounds to infinity.
    if np.dtype(dtype).itemsize == 2:
        try:
            check_finite(out, key)
        except CheckpointError:
            name, limit, wider = np.dtype(dtype).name, "65504", "bfloat16"
            if name == "bfloat16":
                limit, wider = "3.39e38", "float32"
            raise CheckpointError(
                f"Tensor `{key}` has values beyond {name}'s range ({limit}); use "
                f"dtype='{wider}'."
            ) from None
    return out


def check_dtype(dtype: str | None) -> None:
    """Raises `UserError` if `dtype` is neither None nor a float dtype."""
    if dtype is not None and dtype not in FLOAT_DTYPES:
        raise UserError(
            f"`dtype`={dtype!r} is not supported; expected one of "
            f"{', '.join(FLOAT_DTYPES)}, or None to keep the file's."
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
    with the same bytes for every tensor, except for projections that it had to make
    dense, which are written dense.

    Args:
      directory: to be created; must not exist or be empty.
      config: written as config.json, with every field of the file it came from.
      base: parameter tree, as `load_llama` returns it (numpy or jax arrays).
      dtype: "float32", "bfloat16" or "float16" for the dense tensors; None keeps them.
      max_shard_bytes: size above which the weights are split over several files.
      quant_storage: dtype that the packed bytes are stored as; None is that of the
        file that `config` came from, else "uint8".
      tokenizer_from: directory whose tokenizer and generation_config.json are copied.
      progress: show a progress bar on stderr.

    Raises:
      UserError: a tree that does not fit `config`, an unusable argument, or a
        directory that cannot be written.
      CheckpointError: NaN or infinity in a tensor that is cast.
    """
    check_dtype(dtype)
    if tokenizer_from is not None and not Path(tokenizer_from).is_dir():
        raise UserError(f"`tokenizer_from`: `{tokenizer_from}` is not a directory.")
    original = config.quantization_config or {}
    storage = quant_storage or original.get("bnb_4bit_quant_storage") or "uint8"
    leaves = _checked_leaves(config, base)
    packed = {p: v for p, v in leaves.items() if isinstance(v, NF4Tensor)}
    _check_storage(packed, storage)
    # Nothing is read yet: a layer of a stack becomes a view, or one transfer from the
    # device, when its entry is written.
    entries: list[Entry] = []
    for key, (path, layer) in checkpoint_keys(config).items():
        leaf = leaves[path]
        if path in packed:
            entries += bnb.entries(key, leaf, layer, quant_storage=storage)
        else:
            entries.append(_dense_entry(key, leaf, layer, dtype))
    dense_dtype = dtype or dtype_name(leaves[*trees.EMBEDDING, "weight"])
    raw = config_json(config, dense_dtype)
    if packed:
        raw["quantization_config"] = _quantization_config(
            config, packed, compute_dtype=dense_dtype, quant_storage=storage
        )
    with new_directory(Path(directory)) as new:
        write_json(new / "config.json", raw)
        write_model_files(
            new, entries, max_shard_bytes=max_shard_bytes, progress=progress
        )
        if tokenizer_from is not None:
            write_files(new, companion_files(Path(tokenizer_from)))


def _check_storage(packed: Mapping[trees.Path, NF4Tensor], quant_storage: str) -> None:
    for path, tensor in packed.items():
        reason = bnb.storage_problem(tensor, quant_storage)
        if reason is not None:
            raise UserError(f"`{'.'.join(path)}`: {reason}.")


def _quantization_config(
    config: LlamaConfig,
    packed: Mapping[trees.Path, NF4Tensor],
    *,
    compute_dtype: str,
    quant_storage: str,
) -> dict[str, Any]:
    """Updates the configuration's `quantization_config` to what is packed."""
    original = config.quantization_config or {}
    skip = original.get("llm_int8_skip_modules")
    # What the file had keeps its place between our defaults and what must be true of
    # the weights that are written, so that fields of other versions survive.
    double_quant = any(tensor.double_quant for tensor in packed.values())
    return {
        **bnb.new_quantization_config(
            compute_dtype=compute_dtype,
            quant_storage=quant_storage,
            double_quant=double_quant,
        ),
        **original,
        "bnb_4bit_quant_storage": quant_storage,
        "bnb_4bit_use_double_quant": double_quant,
        "llm_int8_skip_modules": bnb.skip_modules(
            skip,
            dense=_modules(config, lambda path: path not in packed),
            packed=_modules(config, lambda path: path in packed),
            packed_head=(*trees.HEAD, "weight") in packed,
        ),
    }


def _modules(config: LlamaConfig, select: Callable[[trees.Path], bool]) -> list[str]:
    """Hugging Face names of the selected projections, layer by layer."""
    return [
        key.removesuffix(".weight")
        for key, (path, _) in checkpoint_keys(config).items()
        if model_params.is_projection(path) and select(path)
    ]


def _dense_entry(key: str, leaf: Any, layer: int | None, dtype: str | None) -> Entry:
    target = DTYPES[FLOAT_DTYPES[dtype or dtype_name(leaf)]]

    def read() -> NDArray:
        array = np.asarray(leaf if layer is None else leaf[layer])
        return array if dtype is None else cast(array, target, key)

    shape = leaf.shape if layer is None else leaf.shape[1:]
    return Entry(key, target, tuple(shape), read)


def dtype_name(leaf: Any) -> str:
    """Name of an array's dtype ("bfloat16"), numpy's or jax's."""
    return np.dtype(leaf.dtype).name


def _checked_leaves(
    config: LlamaConfig, base: Mapping[str, Any]
) -> dict[trees.Path, Any]:
    """Lists the leaves of a parameter tree, checked against the configuration."""
    leaves = dict(trees.walk(base))
    shapes = model_params.shapes(config)
    problems = Mismatches("The parameter tree does not fit the configuration")
    for path, shape in shapes.items():
        name = ".".join(path)
        leading = (config.num_hidden_layers,) if trees.is_stacked(path) else ()
        if path not in leaves:
            problems.add("missing arrays", name)
        elif isinstance(leaf := leaves[path], NF4Tensor):
            if not model_params.can_be_packed(path):
                problems.add("quantized arrays that must stay 16-bit", name)
            elif (leaf.shape, leaf.codes.shape[: len(leading)]) != (shape, leading):
                problems.add("arrays of another shape", f"{name} {leaf.shape}")
        elif tuple(leaf.shape) != (*leading, *shape):
            problems.add(
                "arrays of another shape",
                f"{name} {list(leaf.shape)} instead of {[*leading, *shape]}",
            )
        elif dtype_name(leaf) not in FLOAT_DTYPES:
            problems.add("arrays of another dtype", f"{name} {dtype_name(leaf)}")
    for path in leaves:
        if path not in shapes:
            problems.add("unexpected arrays", ".".join(path))
    problems.check()
    return leaves


def config_json(config: LlamaConfig, dtype: str) -> dict[str, Any]:
    """Returns the config.json of a dense checkpoint of this dtype."""
    raw = config.to_hf()
    raw.pop("quantization_config", None)
    # transformers 5 calls it `dtype`, transformers 4 `torch_dtype`; both read the older
    # one, and a file with both must not have two dtypes.
    names = [name for name in ("dtype", "torch_dtype") if name in raw]
    return raw | dict.fromkeys(names or ["torch_dtype"], dtype)
