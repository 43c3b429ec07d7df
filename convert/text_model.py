"""The text model within a checkpoint: its tensors, under the names it has alone.

A checkpoint of images and text holds a language model under a prefix, which differs
between versions of transformers:

    language_model.model.layers.0...    language_model.lm_head.weight    (4)
    model.language_model.layers.0...    lm_head.weight                   (5)

A headless model (`LlamaModel`) has its tensors without `model.`. PEFT's names of an
adapter are those of the modules in memory, with the prefix of the version.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeVar

from qlora_jax.tree import EMBEDDING, HEAD, hf_key

_T = TypeVar("_T")

# Prefix in the file -> prefix of the text model alone.
_PREFIXES = {"language_model.": "", "model.language_model.": f"{EMBEDDING[0]}."}


def text_tensors(infos: Mapping[str, _T]) -> tuple[dict[str, _T], dict[str, _T]]:
    """Returns the tensors of the text model under its own names, and the others.

    Args:
      infos: the tensors of all files, by their names.
    """
    table = hf_key((*EMBEDDING, "weight"))
    for prefix, own in _PREFIXES.items():
        if prefix + table.removeprefix(own) not in infos:
            continue
        text, others = {}, {}
        for key, info in infos.items():
            if key.startswith(prefix):
                text[own + key.removeprefix(prefix)] = info
            elif key.startswith(HEAD):
                text[key] = info
            else:
                others[key.removeprefix(f"{EMBEDDING[0]}.")] = info
        return text, others
    if hf_key((*EMBEDDING[1:], "weight")) not in infos:
        return dict(infos), {}
    text = {
        key if key.startswith((*HEAD, EMBEDDING[0])) else f"{EMBEDDING[0]}.{key}": info
        for key, info in infos.items()
    }
    return text, {}


class TextPrefix(NamedTuple):
    """How the modules of a text model are named within a model of images and text."""

    outer: str
    """Beginning of their names there."""
    own: str
    """What the text model alone has in its place."""

    @classmethod
    def of(cls, names: Iterable[str]) -> TextPrefix | None:
        """Finds the prefix in names of modules or tensors; None if none has one."""
        names = tuple(names)
        for outer, own in _PREFIXES.items():
            if any(name.startswith(outer) for name in names):
                return cls(outer, own)
        return None

    def inner(self, name: str) -> str | None:
        """Returns the text model's own name; None of what is no part of it."""
        if name.startswith(self.outer):
            return self.own + name.removeprefix(self.outer)
        return name if name.split(".")[0] == HEAD[0] else None

    def outside(self, name: str) -> str:
        """Returns the name within the larger model of a module of the text model."""
        if not f"{name}.".startswith(self.own):
            return name  # the head, which newer versions have beside it
        return (self.outer + f"{name}.".removeprefix(self.own)).rstrip(".")
