"""Reads and writes the settings of a run as TOML.

    read_config(path)     TOML -> RunConfig; unknown keys and wrong types are errors
    to_toml(config)       RunConfig -> TOML that reads back equal

TOML has no null. A setting whose default is None is left out; one that is None although
its default is not is written as "none".
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import re
import tomllib
import types
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from qlora_jax.errors import Problems, UserError
from qlora_jax.lora.config import LoraConfig, off_features, refused_features
from qlora_jax.runs.config import RunConfig

SETTINGS = "config.toml"
"""The settings of a run, in its directory."""
_NONE = "none"


def settings_file(path: Path) -> Path:
    """The run file that a path means: itself, or that of a run directory."""
    return path / SETTINGS if path.is_dir() else path


def read_config(path: Path) -> RunConfig:
    """Reads a TOML run file strictly: unknown keys and wrong types are errors.

    Raises:
      UserError: no such file, no TOML, keys that are unknown, of a wrong type, or
        missing, settings that cannot be; the message names all of them.
    """
    path = settings_file(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` is no valid TOML: {error}.") from error
    return _build(RunConfig, content, f"{path}: ")


def unchecked(config: RunConfig | None = None) -> tuple[type[RunConfig], Any]:
    """Makes RunConfig's like that takes any values, for a parser of options.

    A parser that builds section by section would stop at the first that refuses its
    values. `checked` refuses them all at once.

    Args:
      config: a run whose settings the like is to have; default none.

    Returns:
      The class, and its instance with the settings of `config`; None without.
    """
    sections: dict[str, Any] = {
        name: type(
            kind.__name__,
            (kind,),
            {"__post_init__": _no_check, "__doc__": kind.__doc__},
        )
        for name, kind in _sections().items()
    }
    body: dict[str, Any] = {
        "__annotations__": {**typing.get_type_hints(RunConfig), **sections},
        "__doc__": RunConfig.__doc__,
    }
    for one in dataclasses.fields(RunConfig):
        if one.default_factory is not dataclasses.MISSING:
            body[one.name] = field(default_factory=sections[one.name])
    like = dataclass(frozen=True)(type("RunConfig", (RunConfig,), body))
    if config is None:
        return like, None
    values = _fields(config)
    for name, kind in sections.items():
        values[name] = kind(**_fields(values[name]))
    return like, like(**values)


def checked(config: RunConfig) -> RunConfig:
    """Makes a RunConfig of its unchecked like.

    Raises:
      UserError: all that is wrong with its values.
    """
    problems = Problems()
    values = _fields(config)
    for name, kind in _sections().items():
        with problems.collected():
            values[name] = kind(**_fields(values[name]))
    problems.refuse()
    return RunConfig(**values)


def _sections() -> dict[str, Any]:
    """The classes of a run's sections."""
    hints = typing.get_type_hints(RunConfig)
    return {n: kind for n, kind in hints.items() if dataclasses.is_dataclass(kind)}


def _no_check(self: Any) -> None:
    """In place of a section's own check."""


def _fields(of: Any) -> dict[str, Any]:
    return {one.name: getattr(of, one.name) for one in dataclasses.fields(of)}


def given_lora(path: Path) -> set[str]:
    """The settings that the [lora] section of a readable TOML run file has."""
    text = settings_file(path).read_text(encoding="utf-8")
    return set(tomllib.loads(text).get("lora", {}))


def lora_options(args: Sequence[str]) -> set[str]:
    """Names of the LoRA settings among the options of a command line."""
    found = (re.match(r"--lora\.(?:no[-_])?([a-z_-]+)", arg) for arg in args)
    return {match[1].replace("-", "_") for match in found if match}


def _build(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    """Makes a dataclass of a TOML table."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    problems = Problems()
    if kind is LoraConfig:
        refused = refused_features(content)
        if refused:
            problems.add(
                f"{where}LoRA features that are not supported: {', '.join(refused)}."
            )
        # As in a file of PEFT's, which lists what it does not use.
        unused = off_features(content)
        content = {
            key: value
            for key, value in content.items()
            if key not in unused and not refused_features({key: value})
        }
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            problems.add(
                f"{where}`{key}` is no option here"
                + (f"; did you mean `{near[0]}`?" if near else ".")
                + f" Options: {', '.join(fields)}."
            )
            continue
        hint = hints[key]
        with problems.collected():
            if not dataclasses.is_dataclass(hint):
                values[key] = _coerce(hint, value, f"{where}`{key}`")
            elif isinstance(value, dict):
                values[key] = _build(hint, value, f"{where}[{key}] ")
            else:
                problems.add(f"{where}`{key}` must be a table, got {value!r}.")
    missing = [
        name
        for name, f in fields.items()
        if name not in content
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        tables = [m for m in missing if dataclasses.is_dataclass(hints[m])]
        problems.add(
            f"{where}missing {', '.join(f'`{m}`' for m in missing)}."
            + (f" Write a table [{tables[0]}]." if tables else "")
        )
    problems.refuse()
    return kind(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Checks a TOML value against a field's type."""
    kinds = _kinds(hint)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if any(
                value is a or (type(a) is str and value == a) for a in get_args(kind)
            ):
                return value
        elif get_origin(kind) is tuple:
            one = get_args(kind)[0]
            if isinstance(value, list) and dataclasses.is_dataclass(one):
                if all(isinstance(v, dict) for v in value):
                    numbered = enumerate(value, 1)
                    return tuple(_build(one, v, f"{where} {n}: ") for n, v in numbered)
            elif isinstance(value, list) and all(type(v) is one for v in value):
                return tuple(value)
        elif get_origin(kind) is Mapping:
            one = get_args(kind)[1]
            if isinstance(value, dict):
                return {k: _coerce(one, v, f"{where}.{k}") for k, v in value.items()}
        elif kind is type(None):
            if value == _NONE and str not in kinds:
                return None
        elif type(value) is kind:
            return value
        elif kind is float and type(value) is int:
            return float(value)
    expected = " or ".join(_expected(kind) for kind in kinds if kind is not type(None))
    raise UserError(f"{where} must be {expected}, got {value!r}.")


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(kind))
    if get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0]):
        return "a list of tables"
    if get_origin(kind) is tuple:
        return "a list of " + ("strings" if get_args(kind)[0] is str else "integers")
    if get_origin(kind) is Mapping:
        return "a table"
    return {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
    }[kind]


def to_toml(config: RunConfig) -> str:
    """Writes a run configuration as TOML, every setting that has a value."""
    top, sections = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            sections.append("\n".join([f"[{f.name}]", *_lines(value)]) + "\n")
            sections += _tables(f.name, value)
        else:
            top.append(f"{f.name} = {_toml_value(value)}\n")
    return "".join(top) + "\n" + "\n".join(sections)


def _tables(name: str, section: Any) -> list[str]:
    """The lists of tables that a section has."""
    return [
        "\n".join([f"[[{name}.{f.name}]]", *_lines(table)]) + "\n"
        for f in dataclasses.fields(section)
        if _holds_tables(getattr(section, f.name))
        for table in getattr(section, f.name)
    ]


def _holds_tables(value: Any) -> bool:
    return isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))


def _lines(section: Any) -> list[str]:
    lines = []
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if _holds_tables(value):
            continue
        if value is not None:
            lines.append(f"{f.name} = {_toml_value(value)}")
        elif f.default is not None:  # left out, it would get its default
            lines.append(f'{f.name} = "{_NONE}"')
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        rows = [f"{_toml_value(k)} = {_toml_value(v)}" for k, v in value.items()]
        return "{ " + ", ".join(rows) + " }" if rows else "{}"
    # JSON's strings, booleans and numbers are TOML's, but for one escape (DEL).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
