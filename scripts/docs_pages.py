"""The reference pages of the documentation, made from the code when the site is built.

A hook of mkdocs (mkdocs.yml): `{{ run_file }}` in a page becomes a table for each
section of a run file, with the default and the docstring of every key; `{{ contents }}`
the public names of a package, for mkdocstrings to fill in.
"""

from __future__ import annotations

import ast
import dataclasses
import inspect
import re
import sys
import types
import typing
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What mkdocs calls for every page."""
    if str(ROOT) not in sys.path:  # mkdocs undoes what a hook does when it is loaded
        sys.path.insert(0, str(ROOT))
    if "{{ run_file }}" in markdown:
        markdown = markdown.replace("{{ run_file }}", run_file())
    if "{{ contents }}" in markdown:
        markdown = markdown.replace("{{ contents }}", contents())
    # Files of the repository that are no pages.
    return re.sub(r"\[([^\]]+)\]\(\.\./([^)]+)\)", r"\1 (`\2`)", markdown)


def run_file() -> str:
    """One table a section."""
    from qlora_jax.runs.config import RunConfig

    sections = typing.get_type_hints(RunConfig)
    plain = [
        f for f in dataclasses.fields(RunConfig) if not _is_table(sections[f.name])
    ]
    parts = [_table("Outside of all sections", RunConfig, plain)]
    for field in dataclasses.fields(RunConfig):
        kind = sections[field.name]
        if _is_table(kind):
            parts += _section(f"[{field.name}]", kind)
    return "\n\n".join(parts)


def _section(name: str, kind: Any) -> list[str]:
    """The table of a section, and those of the tables within it."""
    hints = typing.get_type_hints(kind)
    own, inner = [], []
    for field in dataclasses.fields(kind):
        tables = [t for t in _mentioned(hints[field.name]) if _is_table(t)]
        own.append(field)
        for table in tables:
            repeated = typing.get_origin(hints[field.name]) is tuple
            inside = f"{name[1:-1]}.{field.name}"
            inner += _section(f"[[{inside}]]" if repeated else f"[{inside}]", table)
    return [_table(f"`{name}`", kind, own), *inner]


def _is_table(kind: Any) -> bool:
    return dataclasses.is_dataclass(kind)


def _mentioned(hint: Any) -> list[Any]:
    found = [hint]
    for inner in typing.get_args(hint):
        found += _mentioned(inner)
    return found


def _table(heading: str, kind: Any, fields: list[dataclasses.Field]) -> str:
    said = _docstrings(kind)
    hints = typing.get_type_hints(kind)
    about = (inspect.getdoc(kind) or "").partition("\n\nRaises:")[0]
    rows = [
        f"| `{field.name}` | {_values(hints[field.name])} | {_default(field)} | "
        f"{_flat(said.get(field.name, ''))} |"
        for field in fields
    ]
    table = "\n".join(["| key | values | default | |", "|---|---|---|---|", *rows])
    return f"## {heading}\n\n{about}\n\n{table}"


def _values(hint: Any) -> str:
    """What a key may hold, in the words of TOML."""
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return ", ".join(f"`{value}`" for value in inner)
    if origin in (typing.Union, types.UnionType):
        # None stands for a key that is left out.
        kinds = [_values(kind) for kind in inner if kind is not type(None)]
        return " or ".join(dict.fromkeys(kinds))
    if origin is tuple:
        return f"list of {_values(inner[0])}"
    if _is_table(hint):
        return "table"
    names = {int: "integer", float: "number", str: "text", bool: "true, false"}
    return names.get(hint, "table")


def _default(field: dataclasses.Field) -> str:
    if field.default is not dataclasses.MISSING:
        value = field.default
    elif field.default_factory is not dataclasses.MISSING:
        value = field.default_factory()
    else:
        return "needed"
    if value is None or value in ("", ()) or _is_table(value):
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{item}`" for item in value)
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def _docstrings(kind: Any) -> dict[str, str]:
    """The string under each field of a class."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
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
            found[name] = node.value.value
    return found


def _flat(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def contents() -> str:
    """The public names of qlora_jax by chapter, as mkdocstrings asks for them."""
    import convert
    import qlora_jax

    source = (ROOT / "qlora_jax" / "__init__.py").read_text()
    table = source[source.index("_CONTENTS = {") :]
    parts = []
    for chapter, names in re.findall(
        r"# --- (.+?) ---\n(.*?)(?=\n    # ---|\n\})", table, re.S
    ):
        parts.append(f"## {chapter}")
        for name in re.findall(r'"(\w+)":', names):
            parts.append(f"::: {qlora_jax._CONTENTS[name]}.{name}")
    parts.append("## Other people's files (`convert`)")
    public = [n for n, v in vars(convert).items() if inspect.isfunction(v)]
    parts += [f"::: {getattr(convert, n).__module__}.{n}" for n in public]
    return "\n\n".join(parts)
