"""Describes a loaded model and checks that an adapter belongs to its base.

An adapter records the fingerprint of the base it was trained on, as that base was held
in memory. A different fingerprint need not mean different weights: the same weights in
another dtype or quantization have another fingerprint. What the run recorded beside the
adapter (`convert.peft.training_record`) tells the two apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert import names
from convert.checkpoint import open_checkpoint
from convert.peft import training_record
from qlora_jax import tree as trees
from qlora_jax.config import LlamaConfig
from qlora_jax.config_changes import FIELDS, restored
from qlora_jax.fingerprint import fingerprint_tree
from qlora_jax.nf4 import NF4Tensor
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
    original = restored(config)
    length, scaling = (getattr(config, name) for name in FIELDS)
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
