"""Reference pages made from the code when the site is built (a hook of mkdocs).

A marker in a page is replaced by what the code says today: `{{ run_file }}` by a table
for each section of a run file, `{{ python }}` by the public names of the packages for
mkdocstrings to fill in, `{{ command_line }}` by the `--help` of every command.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import os
import re
import sys
import tomllib
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[2]
# Columns of a code block of the site; tyro lays its help out for this many.
HELP_COLUMNS = 84
# Package of qlora_jax -> title of its public names, in the order of the page.
CHAPTERS = {
    "runs": "Load, run, settings",
    "models": "Models and layers",
    "nf4": "Quantized weights",
    "lora": "Adapters",
    "data": "Data",
    "training": "Training",
    "inference": "Generation and comparison",
    "planning": "Planning",
    "errors": "Errors",
}
# Functions of `convert` for users; it offers more to the other packages.
CONVERT = (
    *("load_llama", "abstract_llama", "save_llama"),
    *("load_adapter", "check_adapter", "save_adapter", "merge"),
)


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Replaces the markers of a page; mkdocs calls it for each one."""
    if str(ROOT) not in sys.path:  # mkdocs restores sys.path after loading a hook
        sys.path.insert(0, str(ROOT))
    for marker, make in GENERATED.items():
        if marker in markdown:
            markdown = markdown.replace(marker, make())
    return markdown


# --- The run file ---


def run_file() -> str:
    """Returns one table for each section of a run file."""
    from qlora_jax import RunConfig

    sections = typing.get_type_hints(RunConfig)
    top_level = [
        f for f in dataclasses.fields(RunConfig) if not _is_section(sections[f.name])
    ]
    parts = [_table("Outside of all sections", RunConfig, top_level)]
    for field in dataclasses.fields(RunConfig):
        kind = sections[field.name]
        if _is_section(kind):
            parts += _section(f"[{field.name}]", kind)
    return "\n\n".join(parts)


def _section(heading: str, kind: Any) -> list[str]:
    """Returns the table of a section, then those of the tables within it."""
    hints = typing.get_type_hints(kind)
    nested = []
    for field in dataclasses.fields(kind):
        for table in filter(_is_section, _nested_types(hints[field.name])):
            path = f"{heading[1:-1]}.{field.name}"
            repeated = typing.get_origin(hints[field.name]) is tuple
            nested += _section(f"[[{path}]]" if repeated else f"[{path}]", table)
    return [_table(f"`{heading}`", kind, list(dataclasses.fields(kind))), *nested]


def _is_section(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _nested_types(hint: Any) -> Iterator[Any]:
    yield hint
    for inner in typing.get_args(hint):
        yield from _nested_types(inner)


def _table(heading: str, kind: Any, fields: list[dataclasses.Field]) -> str:
    docstrings = _field_docstrings(kind)
    hints = typing.get_type_hints(kind)
    about = (inspect.getdoc(kind) or "").partition("\n\nRaises:")[0]
    rows = [
        f"| `{field.name}` | {_values(hints[field.name])} | {_default(field)} | "
        f"{_flat(docstrings.get(field.name, ''))} |"
        for field in fields
    ]
    table = "\n".join(["| key | values | default | |", "|---|---|---|---|", *rows])
    return f"## {heading}\n\n{about}\n\n{table}"


def _values(hint: Any) -> str:
    """Returns the values of a key in the words of TOML."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        # None stands for a key that is left out.
        kinds = [_values(kind) for kind in inner if kind is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if origin is tuple:
        return f"list of {_values(inner[0])}"
    names = {int: "integer", float: "number", str: "string", bool: "true, false"}
    return names.get(hint, "table")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "required"
    if value is None or value in ("", ()) or _is_section(value):
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _field_docstrings(kind: Any) -> dict[str, str]:
    """Returns the string under each field of a class."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    docstrings: dict[str, str] = {}
    name = None
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif (
            name
            and isinstance(node, ast.Expr)
            and isinstance(node.value, ast.Constant)
            and isinstance(node.value.value, str)
        ):
            docstrings[name] = node.value.value
    return docstrings


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


# --- Python ---


def python() -> str:
    """Returns the public names by package, functions first, for mkdocstrings."""
    import convert
    import qlora_jax

    chapters: dict[str, list[str]] = {package: [] for package in CHAPTERS}
    names = qlora_jax.__all__  # pyright: ignore[reportAttributeAccessIssue]
    for name in sorted(names, key=lambda name: (name[0].isupper(), name)):
        if name != "__version__":
            module = getattr(qlora_jax, name).__module__
            package = module.split(".")[1]
            chapters.setdefault(package, []).append(f"::: {module}.{name}")
    parts = []
    for package, directives in chapters.items():
        parts += [f"## {CHAPTERS.get(package, package)}", *directives]
    parts.append("## Hugging Face, bitsandbytes and PEFT files (`convert`)")
    functions = [getattr(convert, name) for name in CONVERT]
    parts += [f"::: {f.__module__}.{f.__name__}" for f in functions]
    return "\n\n".join(parts)


# --- The command line ---


def command_line() -> str:
    """Returns the help of both programs and of each of their commands."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    parts = []
    for program, target in project["scripts"].items():
        module, _, function = target.partition(":")
        entry = getattr(importlib.import_module(module), function)
        overview = _help(entry, program)
        parts.append(f"## {program}\n\n```text\n{overview}```")
        commands = re.findall(r"^ {2,4}(?:• )?([a-z]+) {2,}", overview, re.M)
        assert commands, f"`{program} --help` lists no commands"
        for command in commands:
            text = _help(entry, program, command)
            parts.append(f"### {program} {command}\n\n```text\n{text}```")
    return "\n\n".join(parts)


def _help(entry: Any, *words: str) -> str:
    """Runs a console script with `--help` in this process; returns what it prints."""
    printed = io.StringIO()
    with (
        mock.patch.object(sys, "argv", [*words, "--help"]),
        mock.patch.dict(os.environ, {"COLUMNS": str(HELP_COLUMNS), "NO_COLOR": "1"}),
        contextlib.redirect_stdout(printed),
    ):
        try:
            entry()
        except SystemExit as stopped:
            assert not stopped.code, f"{' '.join(words)} --help failed"
    lines = (line.rstrip() for line in printed.getvalue().rstrip().splitlines())
    return "\n".join(lines) + "\n"


GENERATED = {
    "{{ run_file }}": run_file,
    "{{ python }}": python,
    "{{ command_line }}": command_line,
}
