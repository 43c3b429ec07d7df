"""Splits a user's data file into rows to train on and rows to ask."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qlora_jax import UserError
from qlora_jax.data.rows import read_rows

# Fields of a row -> prompt and completion, as format strings over them.
PAIRS = (
    ({"prompt", "completion"}, "{prompt}", "{completion}"),
    ({"question", "answer"}, "{question}\n", "{answer}"),
    ({"instruction", "input", "output"}, "{instruction}\n{input}\n", "{output}"),
)


@dataclass(frozen=True)
class Split:
    """What `split` wrote."""

    format: str
    """`data.format` of both files."""
    suffix: str
    """Of `train` and `held_out`."""
    prompts: list[str]
    """From the held-out rows."""


def split(path: Path, directory: Path) -> Split:
    """Writes `train` and `held_out`, the last tenth of a file, into a directory.

    Rows are recognised by their fields.

    Raises:
      UserError: rows that are not recognised, or too few.
    """
    numbered_rows, plain_text = read_rows(path, plain_text=True)
    rows = [row for _, row in numbered_rows]
    if plain_text:
        return _split_text(path, rows[0]["text"], directory)
    data_format, rows = _recognise(path, rows)
    if len(rows) < 2:
        raise UserError(f"`{path}` has one row; one is needed to train on, one to ask.")
    count = max(len(rows) // 10, 1)
    for name, part in (("train", rows[:-count]), ("held_out", rows[-count:])):
        lines = [json.dumps(row) + "\n" for row in part]
        (directory / f"{name}.jsonl").write_text("".join(lines))
    samples = [row.get("prompt", row.get("text")) for row in rows[-count:][:2]]
    if data_format == "text":
        samples = [_first_words(str(text)) for text in samples]
    return Split(data_format, ".jsonl", [text for text in samples if text])


def _first_words(text: str) -> str:
    return " ".join(text.split()[:8])


def _split_text(path: Path, text: str, directory: Path) -> Split:
    cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1
    if not cut:
        raise UserError(
            f"`{path}` is one line; a part is needed to train on, one to ask."
        )
    (directory / "train.txt").write_text(text[:cut])
    (directory / "held_out.txt").write_text(text[cut:])
    return Split("text", ".txt", [_first_words(text[cut:])])


def _recognise(
    path: Path, rows: list[dict[str, Any]]
) -> tuple[str, list[dict[str, Any]]]:
    """Returns `data.format` of rows, and the rows with that format's fields."""
    names = set(rows[0])
    if "text" in names:
        return "text", rows
    if names & {"messages", "conversations"}:
        return "messages", rows
    if names >= {"input_ids", "labels"}:
        return "tokens", rows
    for fields, prompt, completion in PAIRS:
        if fields <= names:
            return "prompt_completion", [
                {"prompt": prompt.format(**row), "completion": completion.format(**row)}
                for row in rows
            ]
    raise UserError(
        f"`{path}` has rows with the fields {', '.join(sorted(names))}. Expected "
        "`text`; `messages`; `input_ids` and `labels`; or "
        + "; or ".join(" and ".join(sorted(fields)) for fields, _, _ in PAIRS)
        + "."
    )
