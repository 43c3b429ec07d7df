"""Texts that rows or their authors format: Alpaca's prompts, and markers in a text."""

import os
import re
from typing import Any

from qlora_jax.data.conversations import PAIRS, has_conversation
from qlora_jax.data.rows import Reading, fields_of, text_of
from qlora_jax.errors import UserError, did_you_mean

# What begins a turn: <|im_start|>, <start_of_turn>, [TURN].
_TAG = re.compile(r"<[^<>\s]+>|\[[^\[\]\s]+\]")
_REQUEST = "Write a response that appropriately completes the request."
# The texts that the models of Stanford's Alpaca are trained with; the answer follows
# directly.
_WITHOUT_INPUT = (
    f"Below is an instruction that describes a task. {_REQUEST}\n\n"
    "### Instruction:\n{instruction}\n\n### Response:"
)
_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides "
    f"further context. {_REQUEST}\n\n"
    "### Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:"
)


def alpaca_texts(row: dict[str, Any], where: str, reading: Reading) -> tuple[str, str]:
    """Returns the prompt and completion of a row of Alpaca.

    Args:
      row: `instruction`, `output` and optionally `input`, which may be empty or null.
      where: location of the row, for messages.
      reading: gets what was read and recognised.

    Raises:
      UserError: a field is missing or not a string.
    """
    instruction = field_text(row, where, "instruction", None, reading)
    output = field_text(row, where, "output", None, reading)
    reading.fields.add("input")
    if row.get("input") in (None, ""):
        reading.recognise("Alpaca's prompt without `input`")
        return _WITHOUT_INPUT.format(instruction=instruction), output
    given = text_of(row, where, "input", None, reading)
    reading.recognise("Alpaca's prompt with `input`")
    return _WITH_INPUT.format(instruction=instruction, input=given), output


def field_text(
    row: dict[str, Any], where: str, name: str, template: str | None, reading: Reading
) -> str:
    """Returns what `text_of` does; names the format of a row of another one.

    Raises:
      UserError: as `text_of`.
    """
    if template is None and name not in row:
        raise UserError(
            f"{where}: no field `{name}`; the row has {fields_of(row)}."
            f"{did_you_mean(name, row)}{_format_hint(row)}"
        )
    return text_of(row, where, name, template, reading)


def _format_hint(row: dict[str, Any]) -> str:
    """Says which settings read a row whose fields are known."""
    if has_conversation(row):
        return " format='messages' reads conversations."
    pair = next((pair for pair in PAIRS if row.keys() >= {*pair}), None)
    if pair is None:
        return ""
    question, answer = pair
    alpaca = " or format='alpaca' in Alpaca's text" * (
        pair == ("instruction", "output")
    )
    return (
        f" format='messages' writes `{question}` and `{answer}` with the chat template"
        f"{alpaca}; format='prompt_completion' as they are, with e.g. `data.prompt` = "
        f"'{{{question}}}\\n' and `data.completion` = '{{{answer}}}'."
    )


def response_spans(
    text: str, instruction_part: str, response_part: str
) -> tuple[list[tuple[int, int]], bool]:
    """Finds the responses in a text with markers.

    A response is what stands between a `response_part` and the next marker of either
    kind, or the end: the text and the end of the turn. Where both markers begin with
    the same tag (`<|im_start|>`), it begins every turn, and ends a response too: that
    of a tool or of the system may follow.

    Args:
      text: the text.
      instruction_part: stands before each instruction.
      response_part: stands before each response.

    Returns:
      (start, end) of the responses that are not empty, and whether `response_part`
      occurs.
    """
    # Where one marker begins with the other, the longer one is meant.
    markers = sorted((instruction_part, response_part), key=len, reverse=True)
    spans = []
    start: int | None = None
    found = False
    opening = _TAG.match(os.path.commonprefix(markers))
    if opening is not None:
        markers.append(opening[0])
    for match in re.finditer("|".join(map(re.escape, markers)), text):
        if start is not None and start < match.start():
            spans.append((start, match.start()))
        start = match.end() if match[0] == response_part else None
        found |= start is not None
    if start is not None and start < len(text):
        spans.append((start, len(text)))
    return spans, found
