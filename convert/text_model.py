"""The text model within a checkpoint: its tensors, under the names it has alone.

A checkpoint of images and text holds a language model under a prefix, which differs
between versions of transformers:

    language_model.model.layers.0...    language_model.lm_head.weight    (4)
    model.language_model.layers.0...    lm_head.weight                   (5)

A headless model (`LlamaModel`) has its tensors without `model.`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

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
