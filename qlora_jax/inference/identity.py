"""Describes a loaded model and checks that an adapter belongs to its base.

An adapter records the fingerprint of the base it was trained on, as that base was held
in memory. A different fingerprint need not mean different weights: the same weights in
another dtype or quantization have another fingerprint. What the run recorded beside the
adapter (`convert.peft.training_record`) tells the two apart.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import convert
from convert import names
from convert.checkpoint import FLOATS, open_checkpoint
from convert.files import DTYPES
from convert.hf import cast
from convert.peft import training_record
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError
from qlora_jax.models.config import CHANGEABLE_FIELDS, LlamaConfig, undo_changes
from qlora_jax.models.params import is_projection
from qlora_jax.nf4 import NF4Tensor, fingerprint_tree
from qlora_jax.tree import HEAD


def describe_quantization(base: Mapping[str, Any]) -> str:
    """Returns how the linear layers of a base are held, for a person."""
    forms = {"nf4_dq": "NF4, double-quantized", "nf4": "NF4", "none": "dense"}
    head = dict(trees.walk(base)).get((*HEAD, "weight"))
    packed_head = ", lm_head too" if isinstance(head, NF4Tensor) else ""
    return forms[base_form(base)["quantization"]] + packed_head


def base_form(base: Mapping[str, Any]) -> dict[str, str]:
    """Returns the form in which a base is held, as a training record has it.

    "quantization" is "nf4", "nf4_dq" or "none"; "dtype" names the dtype of the dense
    tensors, or the dtypes where they differ.
    """
    leaves = [leaf for _, leaf in trees.walk(base)]
    packed = next((leaf for leaf in leaves if isinstance(leaf, NF4Tensor)), None)
    dense = {names.leaf_dtype(x) for x in leaves if not isinstance(x, NF4Tensor)}
    quantization = "none"
    if packed is not None:
        quantization = "nf4_dq" if packed.double_quant else "nf4"
    return {"quantization": quantization, "dtype": ", ".join(sorted(dense))}


def describe_adapter(path: Path) -> str:
    """Returns the path of an adapter, with the step it was saved at if recorded.

    Args:
      path: PEFT directory.
    """
    step = training_record(path).get("step")
    return f"adapter `{path}`" + ("" if step is None else f" (step {step:,})")


def describe_context(config: LlamaConfig) -> str:
    """Returns what an adapter changes in its base's context length; "" for nothing."""
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
            "positions not scaled"
            if scaling is None
            else f"positions scaled by {scaling.factor:g} ({scaling.rope_type})"
        )
    return "; ".join(changes)


def base_mismatch(
    adapter: Path, path: Path, base: Mapping[str, Any], trained_on: str | None
) -> str | None:
    """Returns a note if an adapter was trained on something else than this base.

    Args:
      adapter: PEFT directory.
      path: directory of the base.
      base: its parameter tree, as it was loaded.
      trained_on: `LoraConfig.base_fingerprint` of the adapter.

    Returns:
      The note, with the options that load the base as it was trained where those are
      recorded; None where the base is the same, or the adapter names none.
    """
    if trained_on is None or trained_on == fingerprint_tree(base):
        return None
    form, record = base_form(base), training_record(adapter)
    quantization, dtype = record.get("quantization"), record.get("dtype")
    if quantization == form["quantization"] and dtype not in (None, form["dtype"]):
        return (
            f"Note: `{adapter}` was trained in {dtype}, and is computed here in "
            f"{form['dtype']}: --dtype {dtype} (`dtype`) computes it as it was trained."
        )
    if quantization not in (None, form["quantization"]) and not (
        open_checkpoint(path).quantized
    ):
        return (
            f"Note: `{adapter}` was trained with quantization {quantization} in "
            f"{dtype}, and the base here has quantization {form['quantization']} in "
            f"{form['dtype']}: --quantization {quantization} --dtype {dtype} load it "
            "as it was trained."
        )
    return (
        f"Note: `{adapter}` was trained on a base with other weights (or another "
        f"quantization) than this one, whose quantization is {form['quantization']}, "
        f"in {form['dtype']}."
    )


def _common_dtype(path: Path) -> str | None:
    """float32 where the layers of one tensor differ in dtype, else each its own."""
    checkpoint = open_checkpoint(path)
    found: dict[Any, set[str]] = {}
    for key, (where, _) in names.keys(checkpoint.config).items():
        found.setdefault(where, set()).add(checkpoint.dtype(key))
    return "float32" if any(len(dtypes) > 1 for dtypes in found.values()) else None


def dense_dtypes(path: Path) -> set[str]:
    """Names of the dtypes of a model's tensors beside its 4-bit projections.

    Those of a dense model are the ones beside all its projections.

    Args:
      path: Hugging Face directory.
    """
    common = _common_dtype(path)
    if common is not None:
        return {common}
    checkpoint = open_checkpoint(path)
    table = names.keys(checkpoint.config)
    packed = {table[key][0] for key in checkpoint.packed} - set(checkpoint.mixed)
    if not checkpoint.quantized:
        packed = {where for where, _ in table.values() if is_projection(where)}
    return {
        checkpoint.dtype(key)
        for key, (where, _) in table.items()
        if where not in packed
    }


def trained_form(path: Path, fingerprint: str) -> str | None:
    """Says how a base was loaded for the training that noted this fingerprint.

    A fingerprint is that of the arrays that were trained on, so all forms are tried in
    which a base is loaded: each quantization, each dtype of what stays dense.

    Args:
      path: Hugging Face directory.
      fingerprint: `LoraConfig.base_fingerprint`.

    Returns:
      E.g. "nf4_dq, bfloat16"; None if it was another base.
    """
    packed = open_checkpoint(path).quantized
    for quantization in (None,) if packed else ("nf4_dq", "nf4", None):
        _, base = convert.load_llama(
            path, quantization=quantization, dtype=_common_dtype(path)
        )
        for dtype, tree in _dtypes(base):
            if fingerprint_tree(tree) == fingerprint:
                return f"{'4-bit' if packed else quantization or 'none'}, {dtype}"
    return None


def _dtypes(base: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """The base as it is and, where that is another tree, in each dtype."""
    leaves = dict(names.walk(base))
    own = {v.dtype.name for v in leaves.values() if not isinstance(v, NF4Tensor)}
    yield ", ".join(sorted(own)), base
    for dtype in ("bfloat16", "float32", "float16"):
        if own == {dtype}:
            continue
        tree: dict[str, Any] = {}
        try:
            for place, leaf in leaves.items():
                if not isinstance(leaf, NF4Tensor):
                    leaf = cast(leaf, DTYPES[FLOATS[dtype]], ".".join(place))
                names.put(tree, place, leaf)
        except CheckpointError:  # beyond float16: nothing was trained in that
            continue
        yield dtype, tree
