"""Parameter trees by path: nested mappings whose leaves are arrays.

A path is the Hugging Face name split at its dots. The layer number is left out, because
the layers of a model are stacked; `hf_key` puts it back and `parse_key` takes it out:

    model.layers.3.self_attn.q_proj.weight
        <->  ("model", "layers", "self_attn", "q_proj", "weight"), layer 3
    lm_head.weight
        <->  ("lm_head", "weight"), no layer
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

Path = tuple[str, ...]
Shape = tuple[int, ...]

# The scanned stack of layers: every leaf below it has a leading layer axis.
LAYERS: Path = ("model", "layers")
EMBEDDING: Path = ("model", "embed_tokens")
HEAD: Path = ("lm_head",)
PROJECTIONS = (
    *("q_proj", "k_proj", "v_proj", "o_proj"),
    *("gate_proj", "up_proj", "down_proj"),
)
"""The linear layers of a Llama's decoder layer."""
FUSED_PROJECTIONS = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "gate_up_proj": ("gate_proj", "up_proj"),
}
"""Projections of some families -> those that they stand for, as rows of one weight."""
QUANTIZED = (*PROJECTIONS, *FUSED_PROJECTIONS)
"""The linear layers that are quantized."""

# A layer has one spelling, so that no two keys mean the same tensor: `03` is not 3.
_LAYER_KEY = re.compile(r"model\.layers\.(0|[1-9][0-9]*)\.(.+)")

_V = TypeVar("_V")


class FrozenDict(dict[str, _V]):
    """An immutable, hashable dict whose order counts in comparisons."""

    def __hash__(self) -> int:  # type: ignore[override]
        # Configurations with such fields are static arguments of jit and must be
        # hashable. The order counts because the first pattern that matches decides
        # (`rank_pattern`).
        return hash(tuple(self.items()))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, dict) and list(self.items()) == list(other.items())

    def __ne__(self, other: object) -> bool:
        return not self == other

    def __reduce__(self) -> Any:
        # By default pickle and copy rebuild a dict by setting its items one by one.
        return FrozenDict, (dict(self),)

    def _raise(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("a FrozenDict cannot be changed")

    __setitem__ = __delitem__ = clear = pop = popitem = _raise
    setdefault = update = __ior__ = _raise  # pyright: ignore[reportAssignmentType]


def walk(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields (path, leaf) of each leaf; an NF4 tensor is one leaf."""
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from walk(child, (*path, name))
        else:
            yield (*path, name), child


def copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    """Copies the mappings of a tree and shares its leaves."""
    return {k: copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def node(tree: Any, path: Path) -> Any:
    """Returns the mapping at `path`; creates the mappings that are missing."""
    for part in path:
        tree = tree.setdefault(part, {})
    return tree


def put(tree: dict[str, Any], path: Path, leaf: Any) -> None:
    """Sets the leaf at `path`."""
    node(tree, path[:-1])[path[-1]] = leaf


def at(tree: Any, path: Path) -> Any:
    """Returns the leaf or mapping at `path`."""
    for part in path:
        tree = tree[part]
    return tree


def is_stacked(path: Path) -> bool:
    """Whether the tensor at `path` has a leading layer axis."""
    return path[: len(LAYERS)] == LAYERS


def hf_key(path: Path, layer: int | None = None) -> str:
    """Spells `path` (of one layer, where stacked) as Hugging Face does."""
    if layer is None:
        return ".".join(path)
    depth = len(LAYERS)
    return ".".join((*path[:depth], str(layer), *path[depth:]))


def dotted(path: Path, layers: int | None) -> list[str]:
    """Spells `path` as Hugging Face does, once for each of its layers."""
    if layers is None:
        return [hf_key(path)]
    return [hf_key(path, layer) for layer in range(layers)]


def parse_key(key: str) -> tuple[Path, int | None]:
    """Splits a Hugging Face key into its path and layer; inverts `hf_key`."""
    match = _LAYER_KEY.fullmatch(key)
    if match is None:
        return tuple(key.split(".")), None
    return (*LAYERS, *match[2].split(".")), int(match[1])
