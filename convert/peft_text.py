"""An adapter of a model of images and text, as one of its text model.

PEFT names an adapter's tensors for the modules that it was trained in. Of a model of
images and text those of the language model have a prefix (`convert.text_model`), and
the others belong to parts that are not here:

    base_model.model.model.language_model.layers.0...      transformers 4.52 and newer
    base_model.model.language_model.model.layers.0...      older
    base_model.model.model.vision_tower...

A text alone passes through the language model only. So the adapter computes the same
without the other tensors; what they learned is lost, though, when it is written again.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from convert.files import TensorFiles
from convert.names import PEFT_PREFIX
from convert.text_model import TextPrefix
from qlora_jax import tree as trees
from qlora_jax.errors import CheckpointError, counted
from qlora_jax.lora import LoraConfig, linear_modules, rename
from qlora_jax.tree import EMBEDDING, HEAD, dotted, hf_key, is_stacked

# What a name of a tensor has behind its module.
_BEHIND = re.compile(
    r"\.(lora_|base_layer|token_adapter|modules_to_save|original_module).*$"
    r"|\.(weight|bias)$"
)
# The factor that starts at zero, and its bias; and the one that changes nothing alone.
_ZERO_AT_FIRST = re.compile(r"\.(lora_B\.(weight|bias)|lora_embedding_A)$")
_OTHER_FACTOR = re.compile(r"\.(lora_A\.weight|lora_embedding_B)$")


def text_part(
    files: TensorFiles, path: Path, *, strict: bool, notes: list[str]
) -> tuple[TensorFiles, TextPrefix | None]:
    """Returns the tensors of the text model under its own names, and their prefix.

    Args:
      files: tensors of an adapter, under PEFT's names.
      path: directory of the adapter.
      strict: refuse trained tensors of other parts, which are left out otherwise.
      notes: collects the prefix, and what is left out.

    Raises:
      CheckpointError: other parts of the model were trained, under `strict`.
    """
    names = {key: key.removeprefix(PEFT_PREFIX) for key in files}
    prefix = TextPrefix.of(names.values())
    if prefix is None:
        return files, None
    text, others = {}, {}
    for key, name in names.items():
        inner = prefix.inner(name) if key.startswith(PEFT_PREFIX) else None
        if inner is None:
            others[key] = files[key]
        else:
            text[PEFT_PREFIX + inner] = files[key]
    notes.append(
        f"`{prefix.outer}` in the names of "
        f"{counted(sum(n.startswith(prefix.outer) for n in names.values()), 'tensor')}"
        ": the adapter is one of a model of images and text, and is read, and written "
        f"again, as one of the text model alone (`{PEFT_PREFIX}{hf_key(EMBEDDING[:1])}"
        ".layers...`)"
    )
    if others:
        trained = [key for key in others if _is_trained(files, key)]
        parts = sorted({_part(names[key]) for key in others})
        of_parts = ", ".join(parts[:3]) + (", ..." if len(parts) > 3 else "")
        if trained and strict:
            raise CheckpointError(
                f"`{path}` is an adapter of a model of images and text: "
                f"{counted(len(trained), 'trained tensor')} of {of_parts} (such as "
                f"`{trained[0]}`) belong to parts that are not in its text model, and "
                "would be lost. `strict`=False (--no-strict) uses the text model's "
                "part, which is all that a text without images passes through."
            )
        notes.append(
            f"{counted(len(others), 'tensor')} of {of_parts}, which are no part of the "
            f"text model ({len(trained):,} of them trained)"
        )
    return TensorFiles(files.directory, text, {**files.left_out, **others}), prefix


def _part(name: str) -> str:
    """Returns the part of the model that a module is in."""
    first, _, rest = name.partition(".")
    return rest.partition(".")[0] if first == EMBEDDING[0] and rest else first


def _is_trained(files: TensorFiles, key: str) -> bool:
    """Whether a tensor changes what a model computes, with those beside it."""
    if _OTHER_FACTOR.search(key):
        return False
    # Texts alone leave the updates of a vision tower at zero.
    return not _ZERO_AT_FIRST.search(key) or bool(files.read(key).any())


def text_settings(
    lora: LoraConfig,
    prefix: TextPrefix,
    files: TensorFiles,
    base: Mapping[str, Any] | None,
    notes: list[str],
) -> LoraConfig:
    """Returns settings of the larger model for the names of its text model.

    Args:
      lora: as adapter_config.json has them.
      prefix: that of the tensors.
      files: the tensors under their own names.
      base: parameter tree of the text model, of arrays or shapes; without it, the
        modules are those of which the file has tensors.
      notes: collects the settings that are replaced.
    """
    if base is None:
        names = (key.removeprefix(PEFT_PREFIX) for key in files)
        linears = modules = sorted({_BEHIND.sub("", name) for name in names})
    else:
        linears = [hf_key(EMBEDDING), hf_key(HEAD)]
        for path, (_, _, layers) in linear_modules(base).items():
            linears += dotted(path, layers)
        modules = [*linears, *_modules(base)]
    out = rename(lora, set(linears), list(dict.fromkeys(modules)), prefix.outside)
    changed = [
        f"`{name}`"
        for name in (
            *("target_modules", "exclude_modules", "layers_to_transform"),
            *("layers_pattern", "modules_to_save", "rank_pattern", "alpha_pattern"),
        )
        if getattr(out, name) != getattr(lora, name)
    ]
    if changed:
        notes.append(
            f"{', '.join(changed)} as adapter_config.json has them: replaced by what "
            "selects the same modules of the text model alone"
        )
    return out


def _modules(base: Mapping[str, Any]) -> list[str]:
    """Lists the paths of all modules of a base, and of those around them."""
    out: dict[str, None] = {}
    for path, leaf in trees.walk(base):
        layers = None
        if is_stacked(path):
            arrays = getattr(leaf, "codes", leaf)
            layers = arrays.shape[0]
        for module in dotted(path[:-1], layers):
            parts = module.split(".")
            names = (".".join(parts[: i + 1]) for i in range(len(parts)))
            out.update(dict.fromkeys(names))
    return list(out)
