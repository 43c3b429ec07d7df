"""Names of tensors that differ from PEFT's only by wrappers or an adapter's name.

`torch.compile`, FSDP and activation checkpointing put their own names into a state
dict, PEFT's prefix may be there twice, and a state dict saved without PEFT has the name
of the adapter behind each of its tensors.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

from convert.files import TensorFiles, TensorInfo
from convert.names import PEFT_PREFIX
from qlora_jax.errors import CheckpointError

_WRAPPERS = ("_orig_mod.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.")
_TWICE = 2 * PEFT_PREFIX
_ADAPTER = re.compile(
    r"(?P<array>\.lora_[AB]|\.lora_embedding_[AB]|\.trainable_tokens_delta"
    r"|\.lora_magnitude_vector)\.(?P<name>(?!weight$|bias$)[^.]+)"
    r"(?P<rest>(?:\.weight|\.bias)?$)"
)


def plain_names(
    infos: Mapping[str, TensorInfo], path: Path, notes: list[str]
) -> TensorFiles:
    """Returns the tensors of a file under the names that PEFT writes.

    Args:
      infos: the tensors under the names in the file.
      path: directory of the adapter.
      notes: collects what was left out of the names.

    Raises:
      CheckpointError: several adapters in one file, or two tensors with one name.
    """
    counts: dict[str, int] = {}
    adapters: set[str] = set()
    names: dict[str, str] = {}
    for original in infos:
        name = original
        for part in (*_WRAPPERS, _TWICE):
            if part not in name:
                continue
            counts[part] = counts.get(part, 0) + 1
            name = name.replace(part, PEFT_PREFIX if part == _TWICE else "")
        match = _ADAPTER.search(name)
        if match is not None:
            adapters.add(match["name"])
            name = f"{name[: match.start()]}{match['array']}{match['rest']}"
        names[original] = name
    if len(adapters) > 1:
        raise CheckpointError(
            f"The file in `{path}` holds several adapters "
            f"({', '.join(map(repr, sorted(adapters)))}). Save one of them with PEFT's "
            "`save_pretrained(..., selected_adapters=[NAME])`."
        )
    for adapter in adapters:
        wrapper = f".modules_to_save.{adapter}."
        for original, name in names.items():
            names[original] = name.replace(wrapper, ".modules_to_save.")
        notes.append(f"the name {adapter!r:.80} of the adapter, in names of tensors")
    notes += [f"`{part}` in the names of {n:,} tensors" for part, n in counts.items()]
    plain: dict[str, TensorInfo] = {}
    for original, name in names.items():
        if name in plain:
            raise CheckpointError(
                f"The file in `{path}` has two tensors for `{name}`, one of them named "
                f"`{original}`. Save the adapter again with PEFT."
            )
        plain[name] = infos[original]
    return TensorFiles(path, plain)
