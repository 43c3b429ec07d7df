"""Finds what a chat template marks with `{% generation %}` blocks.

The template is rendered with a private character at both ends of every block, and the
characters are removed again.
"""

import re
from collections.abc import Callable, Collection

from qlora_jax.errors import UserError

# `{% generation %}`, `{%- endgeneration -%}` and the other spellings.
_MARK = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")
# Unicode's private use area: real text rarely holds these characters.
_PRIVATE = range(0xE000, 0xF8FF)

Blocks = tuple[str, list[tuple[int, int]]]
"""The text of turns, and (start, end) of its generation blocks."""


def has_marks(source: str) -> bool:
    """Returns whether a template has generation blocks."""
    return _MARK.search(source) is not None


def find_blocks(
    text: str, source: str, render: Callable[[str], str], where: str
) -> list[tuple[int, int]]:
    """Returns (start, end) of the generation blocks of a text, ascending.

    Args:
      text: what the template writes.
      source: the template.
      render: renders the same turns with another template.
      where: location of the row, for messages.

    Raises:
      UserError: the blocks are nested, or their content is changed afterwards.
    """
    used = set(text)
    free = (chr(code) for code in _PRIVATE if chr(code) not in used)
    opening, closing = next(free), next(free)

    def mark(tag: re.Match[str]) -> str:
        # A block tag replaces the tag, so that Jinja trims the white space around
        # it as before.
        character = closing if tag[2] else opening
        return f'{{%{tag[1]} if true %}}{{{{ "{character}" }}}}{{% endif {tag[3]}%}}'

    marked = render(_MARK.sub(mark, source))
    pieces: list[str] = []
    blocks: list[tuple[int, int]] = []
    length, start = 0, None
    for piece in re.split(f"([{opening}{closing}])", marked):
        if piece == opening and start is None:
            start = length
        elif piece == closing and start is not None:
            blocks.append((start, length))
            start = None
        elif piece in (opening, closing):  # nested or unbalanced
            start = -1
            break
        else:
            pieces.append(piece)
            length += len(piece)
    # A filter of the template (`trim`, `length`) may have seen the marks and have
    # changed the rest.
    if start is not None or "".join(pieces) != text:
        raise UserError(
            f"{where}: the chat template's `{{% generation %}}` blocks do not mark "
            "its text plainly (they are nested, or their content is changed "
            "afterwards). Give `data.chat_template` a Jinja file whose blocks "
            "enclose what the assistant writes, or that has none."
        )
    return blocks


def choose_blocks(
    whole: Blocks,
    turns: list[int],
    answers: Collection[int],
    render: Callable[[int], Blocks],
    where: str,
) -> list[tuple[int, int]]:
    """Returns the blocks of some answers of a conversation.

    A turn has those blocks that it adds to the turns before it.

    Args:
      whole: of the whole conversation.
      turns: indices of the turns of the assistant.
      answers: those of `turns` whose blocks are wanted.
      render: returns the text and blocks of the first turns, given their number.
      where: location of the row, for messages.

    Raises:
      UserError: the template marks other blocks when later turns are missing.
    """
    text, blocks = whole
    chosen: list[tuple[int, int]] = []
    for turn in sorted(answers):
        try:
            first = len(render(turn)[1]) if turn else 0
            shown, added = render(turn + 1)
            added = [shown[start:end] for start, end in added[first:]]
        except UserError:  # the template needs the later turns
            first, added = 0, None
        own = blocks[first : first + len(added or ())]
        if added != [text[start:end] for start, end in own]:
            if len(blocks) != len(turns):
                raise UserError(
                    f"{where}: the chat template marks {len(blocks)} blocks for "
                    f"{len(turns)} turns of the assistant, and other ones when later "
                    "turns are missing, so those of the turns that are not to be "
                    "trained cannot be told. Leave out their flags and train on all of "
                    "them, or mark one block a turn."
                )
            own = [blocks[turns.index(turn)]]
        chosen += own
    return chosen
