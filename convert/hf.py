"""Hugging Face Llama directories <-> our parameter tree, streamed tensor by tensor.

Everything about a directory is checked from headers before the first weight is read;
then each tensor goes from the file into its place in the stacked output. Host memory
peaks at the output plus the tensor in hand and the scratch of its quantization.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from numpy.typing import NDArray

from convert import bnb, names
from convert.files import (
    DTYPES,
    Problems,
    TensorFiles,
    check_finite,
    check_model_directory,
    open_model,
    read_json,
)
from qlora_jax.config import LlamaConfig
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.nf4 import NF4Tensor, quantize

FLOATS = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_FLOAT_NAMES = {v: k for k, v in FLOATS.items()}

# Computed from the configuration; files of old transformers versions carry it.
_DERIVED = ".self_attn.rotary_emb.inv_freq"


@dataclass(frozen=True)
class Checkpoint:
    """A model directory whose headers have been checked against its config.json."""

    path: Path
    config: LlamaConfig
    files: TensorFiles
    packed: Mapping[str, bnb.QuantState] = field(repr=False)
    """Key of each weight stored in 4 bits -> its state."""

    @property
    def quantized(self) -> bool:
        """Whether this is a bitsandbytes-4bit directory."""
        return bool(self.packed)


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """Opens a Llama directory and checks all names, shapes and dtypes.

    Raises:
      CheckpointError: anything missing, unknown, duplicate, mis-shaped or of another
        dtype, all in one message; or a directory that is something else.
      UserError: a config.json of another architecture.
    """
    path = Path(path)
    check_model_directory(path)
    config = LlamaConfig.from_hf(read_json(path / "config.json"))
    files = open_model(path)
    problems = Problems(f"`{path}` does not fit its config.json")
    packed: dict[str, bnb.QuantState] = {}
    known: set[str] = set()
    shapes = names.shapes(config)
    for key, (where, _) in names.keys(config).items():
        kind = bnb.packed_type(files, key)
        if kind == "fp4":
            problems.add("weights in FP4, which is not supported (only NF4 is)", key)
            known.update(n for n in files if n.startswith(f"{key}."))
            known.add(key)
        elif kind is not None and not names.is_projection(where):
            problems.add(
                "quantized tensors that have to stay 16-bit (keep them out with "
                "`llm_int8_skip_modules`)",
                key,
            )
            known.update(bnb.part_names(key, double_quant=True))
        elif kind is not None:
            state, parts = bnb.check(files, key, shapes[where], problems)
            known.update(parts)
            if state is not None:
                packed[key] = state
        else:
            known.add(key)
            _check_dense(files, key, shapes[where], problems)
    _check_head(config, files, known, problems)
    for key in files:
        if key not in known and not key.endswith(_DERIVED):
            problems.add("tensors that this model does not have", key)
    _check_stacks(config, packed, files, problems)
    problems.check()
    return Checkpoint(path, config, files, packed)


def _check_dense(
    files: TensorFiles, key: str, shape: tuple[int, ...], problems: Problems
) -> None:
    if key not in files:
        problems.add("missing tensors", key)
        return
    info = files[key]
    if info.dtype not in _FLOAT_NAMES:
        problems.add(
            "tensors of another dtype",
            f"{key} {info.dtype} instead of {', '.join(_FLOAT_NAMES)}",
        )
    if info.shape != shape:
        problems.add(
            "tensors of another shape",
            f"{key} {list(info.shape)} instead of {list(shape)}",
        )


def _check_head(
    config: LlamaConfig, files: TensorFiles, known: set[str], problems: Problems
) -> None:
    head, embedding = "lm_head.weight", "model.embed_tokens.weight"
    if not config.tie_word_embeddings or head not in files:
        return
    known.add(head)
    if embedding not in files:
        return
    same = (files[head].dtype, files[head].shape) == (
        files[embedding].dtype,
        files[embedding].shape,
    ) and np.array_equal(_raw(files, head), _raw(files, embedding))
    if not same:
        problems.add(
            "output heads that differ from the embeddings although config.json ties "
            "them (set `tie_word_embeddings` to false to use this head, or remove it "
            "from the file)",
            head,
        )


def _raw(files: TensorFiles, key: str) -> NDArray[np.uint8]:
    out = np.empty(files[key].nbytes, np.uint8)
    files.read_into(key, out)
    return out


def _check_stacks(
    config: LlamaConfig,
    packed: Mapping[str, bnb.QuantState],
    files: TensorFiles,
    problems: Problems,
) -> None:
    """All layers of a projection share one representation, as they share one array."""
    for path in names.shapes(config):
        if not names.is_projection(path) or not packed:
            continue
        spelled = [names.hf_key(path, i) for i in names.layers_of(path, config)]
        states = [packed[k] for k in spelled if k in packed]
        dense = [k for k in spelled if k in files and not bnb.packed_type(files, k)]
        if states and dense:
            for key in dense:
                problems.add(
                    "weights in 16 bit where other layers have 4 bit (all layers of a "
                    "projection must agree; quantize from the original checkpoint)",
                    key,
                )
        if len({(s.dtype, s.double_quant) for s in states}) > 1:
            problems.add(
                "projections whose layers differ in `dtype` or double quantization",
                ".".join(path),
            )


def load_llama(
    path: str | os.PathLike[str],
    *,
    quantization: Literal["nf4", "nf4_dq"] | None = "nf4",
    dtype: str | None = None,
    progress: bool = False,
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Loads a Hugging Face Llama directory as a tree of numpy arrays, layers stacked.

    In a bitsandbytes-4bit directory the weights that are packed stay as they are,
    whatever `quantization` says ("nf4" on a double-quantized file keeps the double
    quantization, None keeps the packed bytes), and those that are dense stay dense.

    Args:
      path: directory with config.json and safetensors (fp32, bf16 or fp16; sharded or
        not; or bitsandbytes NF4).
      quantization: how the seven projections of each layer are quantized: NF4, NF4
        with double quantization, or None for not at all. Embeddings, norms, biases and
        output head are never quantized.
      dtype: "float32", "bfloat16" or "float16" for the tensors that stay dense; None
        keeps each file's own. Weights are quantized from the file's precision.
      progress: show a progress bar on stderr.

    Returns:
      (config, base): `base` has Hugging Face's names and [out, in] orientation, each
      tensor of a layer with a leading layer axis; quantized ones are `NF4Tensor`s.

    Raises:
      CheckpointError: a directory, file or tensor that is not as it should be.
      UserError: an unsupported architecture or argument.
    """
    if quantization not in ("nf4", "nf4_dq", None):
        raise UserError(
            f"`quantization`={quantization!r} is not supported; expected 'nf4', "
            "'nf4_dq' or None."
        )
    check_dtype(dtype)
    checkpoint = open_checkpoint(path)
    config, files = checkpoint.config, checkpoint.files
    if checkpoint.quantized:
        quantization = None
    base: dict[str, Any] = {}
    fill: dict[str, Callable[[], None]] = {}
    problems = Problems(f"`{path}` mixes dtypes within a projection's layers")
    for where, shape in names.shapes(config).items():
        layers = names.layers_of(where, config)
        spelled = [names.hf_key(where, i) for i in layers]
        leading = (len(layers),) if names.is_stacked(where) else ()
        quantized = quantization is not None and names.is_projection(where)
        if spelled[0] in checkpoint.packed:
            state = checkpoint.packed[spelled[0]]
            leaf = bnb.empty(
                state.shape,
                double_quant=state.double_quant,
                dtype=state.dtype,
                leading=leading,
            )
        else:
            found = {_FLOAT_NAMES[files[k].dtype] for k in spelled}
            if len(found) > 1 and dtype is None:
                problems.add("projections", f"{'.'.join(where)} ({sorted(found)})")
            own = dtype or min(found)
            if quantized:
                leaf = bnb.empty(
                    (shape[0], shape[1]),
                    double_quant=quantization == "nf4_dq",
                    dtype=own if len(found) > 1 else min(found),
                    leading=leading,
                )
            else:
                leaf = np.empty((*leading, *shape), DTYPES[FLOATS[own]])
        names.put(base, where, leaf)
        for i, key in zip(layers, spelled, strict=True):
            place = (
                leaf if i is None else jax.tree.map(lambda a, i=i: a[i : i + 1], leaf)
            )
            fill[key] = _filler(checkpoint, key, place)
    problems.check(hint="Say with `dtype` which one is wanted.")
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


def _filler(
    checkpoint: Checkpoint, key: str, place: NDArray | NF4Tensor
) -> Callable[[], None]:
    """Returns what reads `key` into `place`, views of its slot in the output."""
    files = checkpoint.files

    def packed() -> None:
        bnb.read_into(files, key, checkpoint.packed[key], place)
        for scale in (place.absmax, place.nested_absmax):
            if scale is not None and scale.dtype == np.float32:
                check_finite(scale, key)

    def quantized() -> None:
        one = quantize_tensor(
            files.read(key), key, double_quant=place.nested_absmax is not None
        )

        def put(target: NDArray, value: NDArray) -> None:
            target[...] = np.asarray(value).reshape(target.shape)

        for name in ("codes", "absmax", *_NESTED):
            if getattr(place, name) is not None:
                put(getattr(place, name), getattr(one, name))

    def dense() -> None:
        if place.dtype == DTYPES[files[key].dtype]:
            files.read_into(key, place)
            check_finite(place, key)
        else:
            place[...] = cast(files.read(key), place.dtype, key).reshape(place.shape)

    if key in checkpoint.packed:
        return packed
    return quantized if isinstance(place, NF4Tensor) else dense


_NESTED = ("nested_absmax", "nested_offset", "nested_quant_map")


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


@contextlib.contextmanager
def progress_bar(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Gives a function to call with the bytes just done; draws a bar if `show`."""
    if not show:
        yield lambda count: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    with Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    ) as bar:
        task = bar.add_task(label, total=total)
        yield lambda count: bar.advance(task, count)
