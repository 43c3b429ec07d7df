"""What was loaded, in words: the base and its form, the adapter, and if both belong.

An adapter notes the fingerprint of the base it was trained on, as it was loaded for
that. Another fingerprint need not mean other weights: the same ones in another dtype or
quantization have another one too, and that is found out, since it is mended by an
option.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from convert import names
from convert.checkpoint import FLOATS, open_checkpoint
from convert.files import DTYPES, read_json
from convert.hf import cast
from qlora_jax import tree as trees
from qlora_jax.config import LlamaConfig
from qlora_jax.config_changes import FIELDS, restored
from qlora_jax.directories import (
    BEST_RECORD,
    CHECKPOINTS,
    REPORT,
    run_of,
    run_settings,
    saved_steps,
)
from qlora_jax.errors import UserError
from qlora_jax.fingerprint import fingerprint_tree
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import HEAD

# Dense bytes of a base that are read again to find the dtype of a training: embedding
# and head of the largest models, and not their projections.
_READ_AGAIN = 8 << 30


def base_form(base: Mapping[str, Any]) -> str:
    """How the linear layers of a base are held, in words."""
    held = {"nf4_dq": "NF4, double-quantized", "nf4": "NF4", "none": "dense"}
    head = dict(trees.walk(base)).get((*HEAD, "weight"))
    more = ", lm_head too" if isinstance(head, NF4Tensor) else ""
    return held[_quantization(base)] + more


def _quantization(base: Mapping[str, Any]) -> str:
    packed = (leaf for _, leaf in trees.walk(base) if isinstance(leaf, NF4Tensor))
    first = next(packed, None)
    if first is None:
        return "none"
    return "nf4_dq" if first.double_quant else "nf4"


def adapter_in_words(place: Path) -> str:
    """An adapter by its path; one of a run with the step it is of, where that is said.

    Args:
      place: PEFT directory.
    """
    step = _step(place)
    return f"adapter `{place}`" + ("" if step is None else f" (step {step:,})")


def _step(place: Path) -> int | None:
    """The step after which a run wrote an adapter."""
    run = run_of(place)
    if run is None:
        return None
    best = place / BEST_RECORD
    if best.is_file():
        return read_json(best).get("step")
    saved = saved_steps(run / CHECKPOINTS)
    if saved:
        return saved[0]
    report = run / REPORT
    return read_json(report).get("steps") if report.is_file() else None


def changes_in_words(config: LlamaConfig) -> str:
    """What an adapter changes in its base's configuration; "" for nothing."""
    own = restored(config)
    length, scaling = (getattr(config, name) for name in FIELDS)
    words = []
    if length != own.max_position_embeddings:
        words.append(
            f"context {length:,} tokens (the base's own: "
            f"{own.max_position_embeddings:,})"
        )
    if scaling != own.rope_scaling:
        words.append(
            "positions not scaled"
            if scaling is None
            else f"positions scaled by {scaling.factor:g} ({scaling.rope_type})"
        )
    return "; ".join(words)


def other_base(
    adapter: Path, path: Path, base: Mapping[str, Any], known: str | None
) -> str | None:
    """Says so if an adapter was trained on something else than this base, and why.

    Args:
      adapter: PEFT directory.
      path: directory of the base.
      base: its parameter tree, as it was loaded.
      known: `LoraConfig.base_fingerprint` of the adapter.

    Returns:
      A note; None where the base is the one, or the adapter names none.
    """
    if known is None or known == fingerprint_tree(base):
        return None
    quantization, dtype = _quantization(base), _dense_dtype(base)
    trained = run_settings(adapter)
    for one in FLOATS:
        if one != dtype and _fingerprint_in(one, path, base) == known:
            return (
                f"Note: `{adapter}` was trained in {one}, and is computed here in "
                f"{dtype}: --dtype {one} (`dtype`) computes it as it was trained."
            )
    if trained is not None and not open_checkpoint(path).quantized:
        there = (trained.model.quantization, trained.model.dtype)
        if there != (quantization, dtype):
            return (
                f"Note: `{adapter}` was trained with quantization {there[0]} in "
                f"{there[1]}, and the base here has quantization {quantization} in "
                f"{dtype}: --quantization {there[0]} --dtype {there[1]} load it as it "
                "was trained."
            )
    return (
        f"Note: `{adapter}` was trained on a base with other weights (or another "
        f"quantization) than this one, whose quantization is {quantization}, in "
        f"{dtype}."
    )


def _dense_dtype(base: Mapping[str, Any]) -> str:
    dense = [x for _, x in trees.walk(base) if not isinstance(x, NF4Tensor)]
    return ", ".join(sorted({names.leaf_dtype(leaf) for leaf in dense}))


def _fingerprint_in(dtype: str, path: Path, base: Mapping[str, Any]) -> str | None:
    """The fingerprint of a base with its dense tensors in another dtype.

    None where they are too large to be read again, or cannot be.
    """
    leaves = dict(trees.walk(base))
    dense = {k: v for k, v in leaves.items() if not isinstance(v, NF4Tensor)}
    if sum(leaf.nbytes for leaf in dense.values()) > _READ_AGAIN:
        return None
    checkpoint = open_checkpoint(path)
    found: dict[Any, list[Any]] = {}
    try:
        for key, (place, _) in names.keys(checkpoint.config).items():
            if place in dense:
                one = checkpoint.files.read(key)
                array = cast(one, DTYPES[FLOATS[dtype]], key)
                found.setdefault(place, []).append(array)
    except (UserError, KeyError):  # beyond float16, or 4-bit weights made dense
        return None
    tree: dict[str, Any] = {}
    for place, leaf in leaves.items():
        if place in dense and place not in found:  # of modules of one's own
            return None
        if place in dense:
            stacked = names.is_stacked(place)
            leaf = np.stack(found[place]) if stacked else found[place][0]
        trees.put(tree, place, leaf)
    return fingerprint_tree(tree)
