"""Pages made from files outside of docs/ when the site is built (a hook of mkdocs).

`{{ status }}` in a page becomes the status section of the README, `{{ modules }}` the
map of the source: every module with the first sentence of its docstring. The notebooks
become pages with their outputs, and links to other files of the repository become page
links or plain file names.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# Folders of the map, in the order in which they import one another.
SOURCE_FOLDERS = (
    *("pallas_kernels", "qlora_jax", "convert"),
    *("scripts", "launch", "docs/tooling"),
)
NOTEBOOKS = ROOT / "notebooks"
# A Markdown link: its label, a path (no address), an anchor.
LINK = r"\[([^\]]+)\]\(([^)#:\s]+)(#[^)\s]*)?\)"


def on_files(files: Any, config: Any, **_: Any) -> Any:
    """Adds a page for each notebook, its figures, and the list of notebooks."""
    from mkdocs.structure.files import File

    def add(uri: str, content: str | bytes) -> None:
        files.append(File.generated(config, f"notebooks/{uri}", content=content))

    add("index.md", (NOTEBOOKS / "README.md").read_text("utf-8"))
    for path in sorted(NOTEBOOKS.glob("*.ipynb")):
        page, figures = notebook_page(path)
        # Without a table of contents, cells of 100 columns fit.
        add(f"{path.stem}.md", f"---\nhide: [toc]\n---\n{page}")
        for name, content in figures.items():
            add(name, content)
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Replaces the markers of a page and its links into the repository."""
    uri = page.file.src_uri
    source = uri if uri.startswith("notebooks/") else f"docs/{uri}"
    markdown = site_links(markdown, posixpath.dirname(source), uri)
    if "{{ modules }}" in markdown:
        markdown = markdown.replace("{{ modules }}", module_map())
    if "{{ status }}" in markdown:
        status = site_links(readme_status(), "", uri)
        markdown = markdown.replace("{{ status }}", status)
    return markdown


# --- Links ---


def site_links(markdown: str, folder: str, uri: str) -> str:
    """Rewrites links to files of the repository for a page of the site.

    Args:
      markdown: a text with links relative to `folder`.
      folder: of the file that holds the text, relative to the repository.
      uri: of the page that shows it, relative to docs/.
    """

    def rewrite(link: re.Match[str]) -> str:
        label, target, anchor = link[1], link[2], link[3] or ""
        path = posixpath.normpath(posixpath.join(folder, target))
        if not (ROOT / path).exists():
            return link[0]
        if path.startswith("docs/"):
            path = path.removeprefix("docs/")
        elif path == "notebooks/README.md":
            path = "notebooks/index.md"
        elif path.startswith("notebooks/"):
            path = str(PurePosixPath(path).with_suffix(".md"))
        else:  # a file that has no page
            return f"`{path}`" if label.strip("`") == path else f"{label} (`{path}`)"
        return f"[{label}]({posixpath.relpath(path, posixpath.dirname(uri))}{anchor})"

    parts = re.split(r"(^```.*?^```)", markdown, flags=re.S | re.M)
    for index in range(0, len(parts), 2):  # the others are code
        parts[index] = re.sub(LINK, rewrite, parts[index])
    return "".join(parts)


# --- The status ---


def readme_status() -> str:
    """Returns the text between the status markers of the README."""
    readme = (ROOT / "README.md").read_text("utf-8")
    status = re.search(r"<!-- status -->\n(.*?)<!-- /status -->", readme, re.S)
    assert status, "README.md has no text between its status markers"
    return status[1].strip()


# --- The map of modules ---


def module_map() -> str:
    """Returns a table for each folder of the source: its modules and what they hold."""
    parts = []
    for top in SOURCE_FOLDERS:
        for folder in sorted({path.parent for path in (ROOT / top).rglob("*.py")}):
            rows = list(_module_rows(folder))
            about = _summary(folder / "__init__.py")
            heading = f"### {folder.relative_to(ROOT).as_posix()}/"
            table = ["| module | |", "|---|---|", *rows] if rows else []
            parts.append("\n".join([heading, "", about, "", *table]))
    return "\n\n".join(parts)


def _module_rows(folder: Path) -> Iterator[str]:
    for path in sorted(folder.glob("*.py")):
        if path.name != "__init__.py":
            yield f"| `{path.stem}` | {_summary(path).replace('|', chr(92) + '|')} |"


def _summary(path: Path) -> str:
    """Returns the first sentence of a module's docstring, "" without a file."""
    if not path.is_file():
        return ""
    docstring = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
    paragraph = " ".join(docstring.partition("\n\n")[0].split())
    sentence = re.match(r".+?(?<! al)[.?!](?=\s|$)", paragraph)
    return sentence[0] if sentence else paragraph


# --- Notebooks ---


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Converts a notebook with its outputs.

    Returns:
      The page in Markdown, and the PNG of each figure by its file name.
    """
    parts: list[str] = []
    figures: dict[str, bytes] = {}
    for cell in json.loads(path.read_text("utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}_{len(figures) + 1}.png"
                figures[name] = base64.b64decode(data["image/png"])
                parts.append(f"![Figure {len(figures)}]({name})")
            else:
                lines = output.get("text") or data["text/plain"]
                parts.append(f"```text\n{''.join(lines).rstrip()}\n```")
    return "\n\n".join(parts) + "\n", figures
