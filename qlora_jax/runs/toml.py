"""Reads and writes the settings of a run as TOML.

    read_config(path)             TOML -> RunConfig, strictly
    read_config(path, overrides)  the same with values that win over the file's
    to_toml(config)               RunConfig -> TOML that reads back equal

TOML has no null. A setting whose default is None is left out; one that is None although
its default is not is written as "none".
"""

from __future__ import annotations

import dataclasses
import re
import tomllib
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from qlora_jax.errors import Problems, UserError, did_you_mean
from qlora_jax.lora import LoraConfig, off_features, refused_features
from qlora_jax.reading import read_text
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.other_names import hint, value_hint

SETTINGS = "config.toml"
"""The settings of a run, in its directory."""
_NONE = "none"


def settings_file(path: Path) -> Path:
    """Returns the run file that a path names: itself, or that of a run directory."""
    return path / SETTINGS if path.is_dir() else path


def read_table(path: Path) -> dict[str, Any]:
    """Reads a TOML file, or that of a run directory, without checking its keys.

    Raises:
      UserError: the file cannot be read, or is not valid TOML.
    """
    try:
        path = settings_file(path)
        return tomllib.loads(read_text(path))
    except OSError as error:
        on_hub = ""
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and path.suffix != ".toml":
            on_hub = (
                " A run file (TOML) is expected. If this names a model of the hub, "
                f"give it as `model.path`: --model.path {path}."
            )
        raise UserError(
            f"`{path}` cannot be read: {error.strerror}.{on_hub}"
        ) from error
    except RecursionError:
        raise UserError(f"`{path}` is nested too deeply.") from None
    except ValueError as error:  # TOML, UTF-8, or a number of too many digits
        raise UserError(f"`{path}` is not valid TOML: {error}.") from error


def read_config(
    path: Path | None = None, overrides: Mapping[str, Any] | None = None
) -> RunConfig:
    """Reads a run file and applies overrides to it.

    Args:
      path: a run file that is complete in itself, or a run directory; None = there are
        overrides alone.
      overrides: dotted key ("train.steps", "output_dir") -> value, in Python's types or
        in TOML's. One of `train.steps` and `train.epochs` replaces the other.

    Raises:
      UserError: the file cannot be read; keys that are unknown, of a wrong type, or
        missing; values that no run can use. The message lists all of them.
    """
    table: dict[str, Any] = {}
    if path is not None:
        table = read_table(path)
        config = _structure(RunConfig, table, f"{settings_file(path)}: ")
        if not overrides:
            return config
    overrides = overrides or {}
    lengths = {"train.steps", "train.epochs"}
    if len(lengths & overrides.keys()) == 1:
        (replaced,) = lengths - overrides.keys()
        table.get("train", {}).pop(replaced.removeprefix("train."), None)
    for key, value in overrides.items():
        section, _, name = key.rpartition(".")
        (table.setdefault(section, {}) if section else table)[name] = value
    return _structure(RunConfig, table, "")


def _structure(cls: Any, table: Mapping[str, Any], where: str, prefix: str = "") -> Any:
    """Builds a dataclass from a TOML table.

    Args:
      cls: the dataclass.
      table: its values.
      where: starts each message.
      prefix: the section of the table and a dot, if it is one.
    """
    hints = get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    values = {}
    problems = Problems()
    if cls is LoraConfig:
        table = _without_unused_features(table, where, problems)
    for key, value in table.items():
        if key not in fields:
            ours = hint(prefix + key) or did_you_mean(key, fields)
            problems.add(
                f"{where}`{key:.200}` is not an option here."
                + (ours or f" Options: {', '.join(fields)}.")
            )
        elif not dataclasses.is_dataclass(hints[key]):
            try:
                values[key] = _convert(hints[key], value, f"{where}`{key}`")
            except UserError as error:
                ours = value_hint(prefix + key, value)
                problems.add(f"{error}{ours}" if ours else error)
        elif isinstance(value, Mapping):
            with problems.collecting():
                values[key] = _structure(
                    hints[key], value, f"{where}[{key}] ", f"{key}."
                )
        else:
            problems.add(f"{where}`{key:.200}` must be a table, got {value!r:.200}.")
    missing = [
        name
        for name, field in fields.items()
        if name not in table
        and field.default is dataclasses.MISSING
        and field.default_factory is dataclasses.MISSING
    ]
    if missing:
        tables = [name for name in missing if dataclasses.is_dataclass(hints[name])]
        problems.add(
            f"{where}missing {', '.join(f'`{name}`' for name in missing)}."
            + (f" Write a table [{tables[0]}]." if tables and where else "")
            + (f" Give {_options_of(tables)}." if tables and not where else "")
        )
    problems.raise_if_any()
    return cls(**values)


def _options_of(tables: list[str]) -> str:
    """Returns the options that a run without a run file cannot do without."""
    needed = {
        "model": "--model.path",
        "data": "--data.path",
        "train": "--train.epochs or --train.steps",
    }
    return " and ".join(needed[name] for name in tables)


def _without_unused_features(
    table: Mapping[str, Any], where: str, problems: Problems
) -> dict[str, Any]:
    """Returns a `[lora]` table without the features of PEFT that are not computed here.

    Those that are switched off are skipped, as in PEFT's own adapter_config.json, which
    lists all features; those that are on are problems.
    """
    refused = refused_features(table)
    if refused:
        problems.add(
            f"{where}LoRA features that are not supported: {', '.join(refused)}."
        )
    unused = off_features(table)
    return {
        key: value
        for key, value in table.items()
        if key not in unused and not refused_features({key: value})
    }


def _convert(hint: Any, value: Any, where: str) -> Any:
    """Converts a value to a field's type.

    Raises:
      UserError: it has another type; `where` starts the message.
    """
    alternatives = (
        get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    )
    optional = type(None) in alternatives
    if optional and (value is None or (value == _NONE and str not in alternatives)):
        return None
    for kind in alternatives:
        origin, arguments = get_origin(kind), get_args(kind)
        if origin is Literal:
            # True == 1, so that only strings are compared by value.
            if any(value is a or (type(a) is str and value == a) for a in arguments):
                return value
        elif origin is tuple and isinstance(value, (list, tuple)):
            items = _convert_items(arguments[0], value, where)
            if items is not None:
                return items
        elif origin is Mapping and isinstance(value, Mapping):
            of = arguments[1]
            return {k: _convert(of, v, f"{where}.{k}") for k, v in value.items()}
        # Not `isinstance`: True is an int in Python, and no number in TOML.
        elif type(value) is kind:
            if kind is str and "\0" in value:
                raise UserError(
                    f"{where} must not have a NUL in it, got {value!r:.200}."
                )
            return value
        elif kind is float and type(value) is int:
            return float(value)
    expected = " or ".join(_expected(k) for k in alternatives if k is not type(None))
    raise UserError(f"{where} must be {expected}, got {value!r:.200}.")


def _convert_items(kind: Any, items: Any, where: str) -> tuple[Any, ...] | None:
    """Converts the items of a list; None if one has another type."""
    if all(type(item) is kind for item in items):
        return tuple(items)
    if kind is float and all(type(item) in (int, float) for item in items):
        return tuple(float(item) for item in items)
    if dataclasses.is_dataclass(kind) and all(isinstance(i, Mapping) for i in items):
        numbered = enumerate(items, 1)
        return tuple(_structure(kind, item, f"{where} {n}: ") for n, item in numbered)
    return None


def _expected(kind: Any) -> str:
    """Describes a type in a message."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Literal:
        return "one of " + ", ".join(repr(choice) for choice in arguments)
    if origin is tuple:
        names = {str: "strings", int: "integers", float: "numbers"}
        items = names.get(arguments[0], "tables")
        return f"a list of {items}"
    if origin is Mapping:
        return "a table"
    names = {int: "an integer", float: "a number", str: "a string"}
    return names.get(kind, "true or false")


def to_toml(config: RunConfig) -> str:
    """Writes every setting that has a value as TOML that reads back equal."""
    import tomlkit  # takes 25 ms, and only a run writes

    return tomlkit.dumps(_plain(config))


def _plain(value: Any) -> Any:
    """Returns a value in types that tomlkit writes."""
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        from tomlkit import inline_table  # on one line, as `rank_pattern = {}`

        table = inline_table()
        table.update({key: _plain(item) for key, item in value.items()})
        return table
    if not dataclasses.is_dataclass(value):
        return value
    table = {}
    for field in dataclasses.fields(value):
        item = getattr(value, field.name)
        if item is not None:
            table[field.name] = _plain(item)
        elif field.default is not None:  # left out, it would get its default
            table[field.name] = _NONE
    return table
