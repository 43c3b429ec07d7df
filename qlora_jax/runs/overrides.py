"""Options of a command line that override the settings of a run file.

    keys = option_keys(args)                          {"train.steps", "lora.r"}
    options = a parser's result for `args`            with .train.steps and .lora.r
    read_config(file, values_of(options, keys))       the file's run with these values

A setting has one dotted key, as in TOML; its option is `--section.name`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import field
from functools import reduce
from pathlib import Path
from typing import Any, get_type_hints

from qlora_jax.errors import UsageError, did_you_mean
from qlora_jax.runs.config import RunConfig, config_sections, setting_keys
from qlora_jax.runs.other_names import hint, value_hint
from qlora_jax.runs.toml import read_table
from qlora_jax.tree import FrozenDict

# "--train.steps", "--data.no-packing", "--train.groups.0.match", each with or without
# "=value" behind it.
_OPTION = re.compile(r"--(?P<key>[a-z][\w.-]*)")
_TABLES = ("rank_pattern", "alpha_pattern")


def option_keys(args: Sequence[str]) -> set[str]:
    """Returns the keys of the settings that options of a command line give."""
    known = setting_keys()
    options = (_OPTION.match(arg) for arg in args)
    names = (match["key"].replace("-", "_") for match in options if match)
    keys = set()
    for name in names:
        section, *rest = name.split(".")
        # What is deeper ("train.groups.0.match") belongs to the setting "train.groups".
        key = ".".join([section, *rest[:1]])
        # A flag has a second spelling that switches it off.
        keys |= {key, re.sub(r"(^|\.)no_", r"\1", key)} & known
    return keys


def check_options(args: Sequence[str]) -> None:
    """Refuses options that are no setting of a run.

    Raises:
      UsageError: all of them, with the key here for a name or a value of another
        library, one of ours in another section, or a typing error.
    """
    wrong = []
    for number, arg in enumerate(args):
        option, is_assigned, value = arg.partition("=")
        if not option.startswith("--") or option == "--help":
            continue
        keys = option_keys([option])
        if not keys:
            key = option.removeprefix("--").replace("-", "_")
            ours = hint(key) or did_you_mean(key, setting_keys())
            wrong.append(f"There is no option `{option}`.{ours}")
        if not is_assigned:
            value = args[number + 1] if number + 1 < len(args) else ""
        for key in keys - {"log.report_to"}:  # which takes its values as they are
            ours = value_hint(key, value)
            if ours:
                wrong.append(f"`{option}` {value} is not known.{ours}")
    if wrong:
        raise UsageError(list_options(wrong, "qlora-jax train"))


def list_options(wrong: Sequence[str], program: str) -> str:
    """Returns one message about options that a program does not have."""
    rest = f"`{program} --help` lists all."
    if len(wrong) == 1:
        return f"{wrong[0]} {rest}"
    lines = "".join(f"\n- {text}" for text in wrong)
    return f"{len(wrong)} options that are not known:{lines}\n{rest}"


def values_of(options: Any, keys: Iterable[str]) -> dict[str, Any]:
    """Returns key -> value, where `options` has sections as attributes."""
    return {key: reduce(getattr, key.split("."), options) for key in keys}


def given_lora(file: Path | None, keys: Collection[str]) -> set[str]:
    """Returns the names of the `[lora]` settings that a file or options give.

    Args:
      file: a run file, if there is one.
      keys: those of the options.
    """
    table = {} if file is None else read_table(file).get("lora", {})
    return {*table, *(key.removeprefix("lora.") for key in keys if key[:5] == "lora.")}


def option_defaults(config: RunConfig) -> RunConfig:
    """Returns a file's settings as the defaults of a parser's options.

    tyro takes a table with entries for one option an entry, and would accept no other
    entries; so the tables are emptied. `read_config` takes them from the file again.
    """
    empty = dict.fromkeys(_TABLES, FrozenDict())
    return dataclasses.replace(config, lora=dataclasses.replace(config.lora, **empty))


def unchecked_config(config: RunConfig | None = None) -> tuple[type[RunConfig], Any]:
    """Makes a class like RunConfig whose sections accept any values, for a parser.

    A parser builds section by section and would stop at the first section that raises;
    `read_config` raises the problems of all sections at once.

    Args:
      config: settings that the instance gets; None = no instance.

    Returns:
      The class and its instance, or None.
    """
    sections: dict[str, Any] = {
        name: type(
            cls.__name__,
            (cls,),
            {"__post_init__": lambda self: None, "__doc__": cls.__doc__},
        )
        for name, cls in config_sections().items()
    }
    body: dict[str, Any] = {
        "__annotations__": {**get_type_hints(RunConfig), **sections},
        "__doc__": RunConfig.__doc__,
    }
    for f in dataclasses.fields(RunConfig):
        if f.default_factory is not dataclasses.MISSING:
            body[f.name] = field(default_factory=sections[f.name])
    like = dataclasses.dataclass(frozen=True)(type("RunConfig", (RunConfig,), body))
    if config is None:
        return like, None
    values = _fields(config)
    for name, cls in sections.items():
        values[name] = cls(**_fields(values[name]))
    return like, like(**values)


def _fields(instance: Any) -> dict[str, Any]:
    return {f.name: getattr(instance, f.name) for f in dataclasses.fields(instance)}
