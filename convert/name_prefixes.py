"""Names of tensors that fit a model but for a prefix, and which one.

A wrapper around a model puts its own name before those of the tensors, or within them:
`module.` of DistributedDataParallel, `model.` of a class that holds the language model.
Where one such part is there too often, or missing, all names are wrong and the tensors
are right. The original release of Meta has other names altogether.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable

from qlora_jax.tree import LAYERS

_LAYER = re.compile(rf"(?:^|\.){LAYERS[-1]}\.\d+\.")
# Whose name a part of a path is.
_WRAPPERS = {
    "module.": "DistributedDataParallel or DeepSpeed",
    "_orig_mod.": "torch.compile",
    "_fsdp_wrapped_module.": "FSDP",
}
_META = re.compile(
    r"(?:tok_embeddings|output|norm|layers\.\d+\.(?:attention\.w[qkvo]"
    r"|feed_forward\.w[123]|attention_norm|ffn_norm))\.weight"
)

META_FORMAT = (
    "the original format of Meta's and Mistral's releases, which is not read. Download "
    "the Hugging Face form of the model (of the same repository everything but "
    "`original/` and `consolidated*`, or a repository whose name ends in -hf), or "
    "convert it: transformers 4 has convert_llama_weights_to_hf.py for it"
)
"""What such files are, and what to do; without a full stop."""


def is_meta_format(names: Collection[str]) -> bool:
    """Whether tensors have the names of Meta's original release."""
    return bool(names) and all(_META.fullmatch(n) for n in names if "rope" not in n)


def prefix_cause(found: Collection[str], expected: Collection[str]) -> str:
    """Returns what to say where names differ by a prefix alone; "" where they do not.

    Args:
      found: names of the tensors in the file.
      expected: names that the model, or the adapter, has.
    """
    for wrapper, whose in _WRAPPERS.items():
        inside = re.compile(rf"(^|\.){re.escape(wrapper)}")
        wrapped = [name for name in found if inside.search(name)]
        plain = {inside.sub(r"\1", name) for name in wrapped}
        if rest := _fitting({*found, *plain}, expected, wrapped):
            return (
                f"{len(wrapped):,} names, such as `{wrapped[0]}`, have a `{wrapper}` "
                f"that is extra, which {whose} puts around a model; without it {rest}."
            )
    head, wanted = _head(found), _head(expected)
    if head is None or wanted is None or head == wanted:
        return ""
    outer, extra, missing = _difference(head, wanted)
    begin, replaced = outer + extra, outer + missing
    renamed = [name for name in found if name.startswith(begin)]
    names = {replaced + name.removeprefix(begin) for name in renamed}
    rest = _fitting({*found, *names}, expected, renamed)
    if not rest:
        return ""
    shown = f"Their names begin with `{head}layers.`, where `{wanted}layers.` is read: "
    if extra and missing:
        return f"{shown}with `{missing}` in place of `{extra}` {rest}."
    if missing:
        return f"{shown}`{missing}` is missing, and with it {rest}."
    return f"{shown}one `{extra}` is extra, and without it {rest}."


def _fitting(
    names: Collection[str], expected: Collection[str], renamed: Collection[str]
) -> str:
    """Says how many of the expected names are there; "" if none was renamed to fit."""
    fitting = sum(name in names for name in expected)
    if not renamed or not fitting:
        return ""
    if fitting == len(expected):
        return f"all {fitting:,} names fit"
    return f"{fitting:,} of {len(expected):,} names fit"


def _head(names: Iterable[str]) -> str | None:
    """Returns what most names have before `layers.`."""
    matches = ((name, _LAYER.search(name)) for name in names)
    heads = Counter(
        name[: match.end()].rpartition(f"{LAYERS[-1]}.")[0]
        for name, match in matches
        if match is not None
    )
    return max(heads, key=heads.__getitem__) if heads else None


def _difference(head: str, wanted: str) -> tuple[str, str, str]:
    """Returns the common beginning, what only `head` has then, and only `wanted`.

    Of a part that is repeated the first is the one in question: the names of a head,
    which has fewer parts, differ in the same place.
    """
    a, b = head.split(".")[:-1], wanted.split(".")[:-1]
    least = min(len(a), len(b))
    inner = 0
    while inner < least and a[-1 - inner] == b[-1 - inner]:
        inner += 1
    a, b = a[: len(a) - inner], b[: len(b) - inner]
    outer = 0
    while outer < min(len(a), len(b)) and a[outer] == b[outer]:
        outer += 1
    return _joined(a[:outer]), _joined(a[outer:]), _joined(b[outer:])


def _joined(parts: list[str]) -> str:
    return "".join(f"{part}." for part in parts)
