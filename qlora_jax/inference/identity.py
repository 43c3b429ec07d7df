"""Describes a loaded model and checks that an adapter belongs to its base.

An adapter records the fingerprint of its base as that was held in memory for training.
The same weights in another dtype or quantization have another fingerprint; the training
record in the adapter's directory (`convert.peft.training_record`) tells such a base
from one with other weights.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import convert
from convert import (
    DTYPES,
    FLOAT_DTYPES,
    cast,
    checkpoint_keys,
    dtype_name,
    open_checkpoint,
    open_config,
    training_record,
)
from qlora_jax import tree as trees
from qlora_jax.choices import Dtype
from qlora_jax.errors import CheckpointError
from qlora_jax.models import (
    CHANGEABLE_FIELDS,
    LlamaConfig,
    computed_fields,
    is_projection,
    undo_changes,
)
from qlora_jax.models import params as model_params
from qlora_jax.nf4 import NF4Tensor, fingerprint_tree
from qlora_jax.tree import HEAD


def describe_quantization(base: Mapping[str, Any]) -> str:
    """Returns the quantization of the linear layers of a base, in words."""
    forms = {"nf4_dq": "NF4, double-quantized", "nf4": "NF4", "none": "dense"}
    form = base_form(base)
    packed_head = ", lm_head too" if form["lm_head"] == "nf4" else ""
    return forms[form["quantization"]] + packed_head


def base_form(base: Mapping[str, Any]) -> dict[str, str]:
    """Returns quantization and dtype of a base, in the words of a training record.

    "quantization" is "nf4", "nf4_dq" or "none"; "lm_head" is "nf4" for a packed head,
    else "auto"; "dtype" lists the dtypes of the dense tensors.
    """
    leaves = [leaf for _, leaf in trees.walk(base)]
    packed = next((leaf for leaf in leaves if isinstance(leaf, NF4Tensor)), None)
    dense = {dtype_name(x) for x in leaves if not isinstance(x, NF4Tensor)}
    quantization = "none"
    if packed is not None:
        quantization = "nf4_dq" if packed.double_quant else "nf4"
    head = dict(trees.walk(base)).get((*HEAD, "weight"))
    return {
        "quantization": quantization,
        "lm_head": "nf4" if isinstance(head, NF4Tensor) else "auto",
        "dtype": ", ".join(sorted(dense)),
    }


def describe_adapter(path: Path) -> str:
    """Returns the path of an adapter, and the step at which it was saved if recorded.

    Args:
      path: PEFT directory.
    """
    step = training_record(path).get("step")
    return f"adapter `{path}`" + ("" if step is None else f" (step {step:,})")


def describe_context(config: LlamaConfig) -> str:
    """Describes how an adapter changes its base's context length; "" if it does not."""
    original = undo_changes(config)
    length, scaling = (getattr(config, name) for name in CHANGEABLE_FIELDS)
    changes = []
    if length != original.max_position_embeddings:
        changes.append(
            f"context {length:,} tokens (the base's own: "
            f"{original.max_position_embeddings:,})"
        )
    if scaling != original.rope_scaling:
        changes.append(
            "positions not scaled" if scaling is None else f"positions scaled {scaling}"
        )
    return "; ".join(changes)


def base_mismatch(
    adapter: Path,
    path: Path,
    base: Mapping[str, Any],
    trained_on: str | None,
    *,
    fingerprint: str | None = None,
    options: str = "--",
) -> str | None:
    """Returns a note if an adapter was not trained on this base.

    Args:
      adapter: PEFT directory.
      path: directory of the base.
      base: its parameter tree, as it was loaded.
      trained_on: `LoraConfig.base_fingerprint` of the adapter.
      fingerprint: of the base, where it is known.
      options: how the options begin that choose the form of the base.

    Returns:
      The note, with the options that load the base as in training if those are
      recorded; None if the base is the same, or the adapter has no fingerprint.
    """
    if trained_on is None:
        return None
    if trained_on == (fingerprint or fingerprint_tree(base)):
        return config_mismatch(adapter, path)
    form, record = base_form(base), training_record(adapter)
    quantization, dtype = record.get("quantization"), record.get("dtype")
    if quantization == form["quantization"] and dtype not in (None, form["dtype"]):
        return (
            f"Note: `{adapter}` was trained in {dtype}, and is computed here in "
            f"{form['dtype']}: {options}dtype {dtype} (`dtype`) computes it as it was "
            "trained."
        )
    if quantization not in (None, form["quantization"]) and not (
        open_checkpoint(path).quantized
    ):
        return (
            f"Note: `{adapter}` was trained with quantization {quantization} in "
            f"{dtype}, and the base here has quantization {form['quantization']} in "
            f"{form['dtype']}: {options}quantization {quantization} {options}dtype "
            f"{dtype} load it as it was trained."
        )
    name = convert.open_adapter(adapter, strict=False)[0].base_model_name_or_path
    return (
        f"Note: `{adapter}` was trained on a base with other weights (or another "
        f"quantization) than this one, `{path}`, whose quantization is "
        f"{form['quantization']}, in {form['dtype']}."
        + (f" It names {name!r:.200} as its base." if name else "")
    )


def config_mismatch(adapter: Path, path: Path) -> str | None:
    """Returns a note if an adapter was trained with another config.json of its base.

    The fingerprint is of the weights alone: with another `rope_theta` or `rms_norm_eps`
    the same weights compute something else.

    Args:
      adapter: PEFT directory.
      path: directory of the base.

    Returns:
      The note; None if they agree, or the adapter has no record of it.
    """
    recorded = training_record(adapter).get("config")
    if not isinstance(recorded, Mapping):
        return None
    present = computed_fields(open_config(path))
    differing = [
        f"`{name}` was {recorded[name]!r:.80} and is {present[name]!r:.80}"
        for name in sorted(recorded.keys() & present.keys())
        if recorded[name] != present[name]
    ]
    if not differing:
        return None
    return (
        f"Note: `{adapter}` was trained with another config.json than that of "
        f"`{path}`, whose weights are the same: {'; '.join(differing)}."
    )


def common_dtype(path: Path) -> str | None:
    """Returns the dtype to load a model in without rounding.

    Args:
      path: Hugging Face directory.

    Returns:
      "float32" if a tensor has different dtypes in different layers, which are stacked
      into one array; else None: tensors keep their dtypes.
    """
    checkpoint = open_checkpoint(path)
    dtypes: dict[Any, set[str]] = {}
    for key, (param_path, _) in checkpoint_keys(checkpoint.config).items():
        dtypes.setdefault(param_path, set()).add(checkpoint.dtype(key))
    return "float32" if any(len(seen) > 1 for seen in dtypes.values()) else None


def main_dtype(path: Path) -> Dtype:
    """Returns the dtype that most parameters of a model are stored in.

    Args:
      path: Hugging Face directory; 4-bit weights count in the dtype of their values.
    """
    checkpoint = open_checkpoint(path)
    shapes, counts = model_params.shapes(checkpoint.config), Counter[str]()
    for key, (param_path, _) in checkpoint_keys(checkpoint.config).items():
        counts[checkpoint.dtype(key)] += math.prod(shapes[param_path])
    return max(get_args(Dtype), key=lambda name: counts[name])


def dense_dtypes(path: Path) -> set[str]:
    """Returns the dtypes of the tensors that are not 4-bit projections.

    In a dense model all projections count as 4-bit ones.

    Args:
      path: Hugging Face directory.
    """
    common = common_dtype(path)
    if common is not None:
        return {common}
    checkpoint = open_checkpoint(path)
    table = checkpoint_keys(checkpoint.config)
    packed = {table[key][0] for key in checkpoint.packed} - set(checkpoint.mixed)
    if not checkpoint.quantized:
        packed = {path for path, _ in table.values() if is_projection(path)}
    return {
        checkpoint.dtype(key)
        for key, (param_path, _) in table.items()
        if param_path not in packed
    }


def trained_form(path: Path, fingerprint: str) -> str | None:
    """Returns the quantization and dtype in which a base has this fingerprint.

    A fingerprint is that of the arrays in memory, so the base is loaded with each
    quantization, of an output head of its own too, and in each dtype of the dense
    tensors.

    Args:
      path: Hugging Face directory.
      fingerprint: `LoraConfig.base_fingerprint`.

    Returns:
      E.g. "nf4_dq, bfloat16" or "nf4_dq (lm_head too), bfloat16"; None if it was
      another base.
    """
    checkpoint = open_checkpoint(path)
    forms: list[tuple[Any, bool]] = [(None, False)]
    if not checkpoint.quantized:
        heads = (False,) if checkpoint.config.tie_word_embeddings else (False, True)
        forms = [(q, head) for head in heads for q in ("nf4_dq", "nf4")] + forms
    for quantization, head in forms:
        _, base = convert.load_llama(
            path,
            quantization=quantization,
            quantize_lm_head=head,
            dtype=common_dtype(path),
        )
        for dtype, tree in _in_each_dtype(base, packed=checkpoint.quantized):
            if fingerprint_tree(tree) == fingerprint:
                name = "4-bit" if checkpoint.quantized else quantization
                return f"{form_name(name, head)}, {dtype}"
    return None


def form_name(quantization: str | None, quantize_lm_head: bool) -> str:
    """Returns the quantization of a base as `trained_form` spells it."""
    return (quantization or "none") + (" (lm_head too)" if quantize_lm_head else "")


def _in_each_dtype(
    base: Mapping[str, Any], *, packed: bool
) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the base in its stored dtypes, then cast to each other dtype.

    Args:
      base: parameter tree.
      packed: whether the 4-bit weights are packed in the file, and so keep their dtype.
    """
    leaves = dict(trees.walk(base))
    stored = {v.dtype.name for v in leaves.values() if not isinstance(v, NF4Tensor)}
    yield ", ".join(sorted(stored)), base
    values = {v.dtype for v in leaves.values() if isinstance(v, NF4Tensor)}
    for dtype in ("bfloat16", "float32", "float16"):
        if (stored if packed else stored | values) == {dtype}:
            continue
        tree: dict[str, Any] = {}
        try:
            for path, leaf in leaves.items():
                if not isinstance(leaf, NF4Tensor):
                    leaf = cast(leaf, DTYPES[FLOAT_DTYPES[dtype]], ".".join(path))
                elif not packed:
                    leaf = replace(leaf, dtype=dtype)
                trees.put(tree, path, leaf)
        except CheckpointError:  # out of float16's range: not trained in float16
            continue
        yield dtype, tree
