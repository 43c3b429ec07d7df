"""How options are explained by `--help`: whole sentences, nothing that only we set.

    with explained():
        tyro.cli(...)

tyro joins the lines of a field's docstring only where they are not indented, and then
wraps each line anew; here they are joined first, paragraph by paragraph.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import partial
from typing import Annotated, Any

import tyro
from tyro.constructors import (
    ConstructorRegistry,
    StructConstructorSpec,
    StructFieldSpec,
    StructTypeInfo,
)

from qlora_jax.lora.config import LoraConfig

# What a run notes in its adapter; an option still, and in no one's way.
_NOTES = ("base_fingerprint", "base_config_changes")


def place(name: str) -> Any:
    """Names a path that is given without an option, as `--help` shows it."""
    return tyro.conf.arg(metavar=name)


def explained() -> ConstructorRegistry:
    """Rules for tyro, to enter as a context: they change help texts alone."""
    registry = ConstructorRegistry()
    asking: list[Any] = []

    @registry.struct_rule
    def explain(info: StructTypeInfo) -> StructConstructorSpec | None:
        if asking or not dataclasses.is_dataclass(info.type):
            return None
        asking.append(info)  # so that the question below goes to tyro's own rules
        try:
            spec = registry.get_struct_spec(info)
        finally:
            asking.pop()
        if not isinstance(spec, StructConstructorSpec):
            return None
        is_lora = isinstance(info.type, type) and issubclass(info.type, LoraConfig)
        fields = [
            _hidden(one) if is_lora and one.name in _NOTES else _joined(one)
            for one in spec.fields
        ]
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def _hidden(field: StructFieldSpec) -> StructFieldSpec:
    kind: Any = Annotated[field.type, tyro.conf.Suppress]
    return dataclasses.replace(field, type=kind)


def _joined(field: StructFieldSpec) -> StructFieldSpec:
    return dataclasses.replace(field, helptext=partial(paragraphs, field.helptext))


def paragraphs(given: str | Callable[[], str | None] | None) -> str | None:
    """A help text whose lines are joined; paragraphs stay apart."""
    text = given() if callable(given) else given
    return text and re.sub(r"(?<!\n)\n[ \t]*(?!\s)", " ", text)
