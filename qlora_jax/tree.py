"""A parameter tree, nested mappings with arrays at their ends, by paths."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

Path = tuple[str, ...]


def walk(tree: Mapping[str, Any], path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yields (path, leaf) of each leaf; an NF4 tensor is one leaf."""
    for name, child in tree.items():
        if isinstance(child, Mapping):
            yield from walk(child, (*path, name))
        else:
            yield (*path, name), child


def copy(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A tree of its own, with the same leaves."""
    return {k: copy(v) if isinstance(v, Mapping) else v for k, v in tree.items()}


def node(tree: Any, path: Path) -> Any:
    """The mapping at `path`, made where it is missing."""
    for part in path:
        tree = tree.setdefault(part, {})
    return tree


def put(tree: dict[str, Any], path: Path, leaf: Any) -> None:
    """Sets `leaf` at `path`."""
    node(tree, path[:-1])[path[-1]] = leaf


def at(tree: Any, path: Path) -> Any:
    """What is at `path`."""
    for part in path:
        tree = tree[part]
    return tree
