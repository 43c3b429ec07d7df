"""Finds where the turns of a rendered conversation end, in one pass of its template.

What a chat template writes for the first turns of a conversation equals what it writes
when they are all there is, if it has not looked at a later turn before. So the template
runs on turns that note what is looked at, and on a copy of itself that writes a mark
after every turn. A turn ends at its mark if the next one is looked at there and not
before; one that is followed otherwise has no known end. What follows the turns (the
generation prompt) must not depend on them; the syntax tree of the template tells.

A template of which this cannot be shown is not followed, and has to be rendered once
for every turn.
"""

import itertools
from collections.abc import Callable, Iterator
from typing import Any

# Written after every turn; between characters of Unicode's private use area.
_MARK = "\ue000end of turn\ue001"
# What differs between rows: the end of a template must not depend on it.
_OF_ROWS = frozenset({"messages", "tools", "documents", "loop"})
_PROMPT = "add_generation_prompt"


class _LooksAheadError(Exception):
    """The template looks at a turn before it has written those before."""


class _Turns:
    """The turns of a conversation; reports each that is looked at.

    Not a list, whose content could be read unnoticed. Operations that it does not have
    raise, and the template is not followed.

    Args:
      turns: the turns.
      look: is called with the index of a turn before it is returned, and with the
        number of turns before their end is.
      start: of the turns that are left, as in `messages[1:]`.
    """

    def __init__(
        self, turns: list[dict[str, Any]], look: Callable[[int], None], start: int = 0
    ):
        self._turns, self._look, self._start = turns, look, start

    def __iter__(self) -> Iterator[dict[str, Any]]:
        for index in itertools.count(self._start):
            self._look(index)
            if index >= len(self._turns):
                return
            yield self._turns[index]

    def __bool__(self) -> bool:
        self._look(self._start)
        return self._start < len(self._turns)

    def __len__(self) -> int:
        self._look(len(self._turns))
        return len(self._turns[self._start :])

    def __getitem__(self, key: Any) -> Any:
        if isinstance(key, slice):
            if key.stop is None and key.step is None and (key.start or 0) >= 0:
                return _Turns(self._turns, self._look, self._start + (key.start or 0))
        elif key >= 0:
            self._look(self._start + key)
            return self._turns[self._start + key]
        self._look(len(self._turns))
        return self._turns[self._start :][key]


class TurnEnds:
    """Finds the ends of the turns that a chat template writes.

    Args:
      source: the template.
    """

    def __init__(self, source: str):
        self._template: Any = None
        try:
            from transformers.utils.chat_template_utils import _compile_jinja_template
        except ImportError:  # a version without it: every turn is rendered
            return
        environment = _compile_jinja_template(source).environment
        tree = environment.parse(source)
        if _add_marks(tree):
            self._template = environment.from_string(tree)

    def find(
        self, text: str, messages: list[dict[str, Any]], context: dict[str, Any]
    ) -> list[int | None] | None:
        """Returns where each turn ends in a text, without what follows the last one.

        Args:
          text: what the template writes without a generation prompt.
          messages: the turns.
          context: the other variables of the template.

        Returns:
          For each turn the length of the text up to its end, or None where it is not
          known; None if the template cannot be followed.
        """
        if self._template is None or _MARK in text:
            return None
        ends: list[int | None] = []
        pieces: list[str] = []
        length, highest = 0, -1

        def look(index: int) -> None:
            nonlocal highest
            if index <= highest:
                return
            if index > highest + 1:
                raise _LooksAheadError
            if index > 0:
                # A mark that was the last to be written is that of the turn before.
                ends.append(length if pieces[-1:] == [_MARK] else None)
            highest = index

        # As `apply_chat_template` passes them.
        turns = [{k: v for k, v in m.items() if v is not None} for m in messages]
        try:
            for piece in self._template.generate(
                **context, messages=_Turns(turns, look), add_generation_prompt=False
            ):
                pieces.append(piece)
                length += len(piece) if piece != _MARK else 0
        except Exception:
            # Whatever the template does that these turns do not allow. It has written
            # the text before, so that this is no fault of the row.
            return None
        if len(ends) != len(messages):
            return None
        return ends if "".join(p for p in pieces if p != _MARK) == text else None


def _add_marks(tree: Any) -> bool:
    """Lets the last loop of a template write marks.

    Returns:
      Whether the template ends in a way that does not depend on the turns.
    """
    from jinja2 import nodes

    loops = [n for n, node in enumerate(tree.body) if isinstance(node, nodes.For)]
    if not loops:
        return False
    loop, end = tree.body[loops[-1]], tree.body[loops[-1] + 1 :]
    assigned = {name.name for name in tree.find_all(nodes.Name) if name.ctx != "load"}
    assigned |= {macro.name for macro in tree.find_all(nodes.Macro)}
    prompts = [
        assignment.node
        for assignment in tree.find_all(nodes.Assign)
        if getattr(assignment.target, "name", None) == _PROMPT
    ]
    if all(isinstance(value, nodes.Const) for value in prompts):  # a default
        assigned.discard(_PROMPT)
    if _names(end) & (assigned | _OF_ROWS):
        return False
    # Before the end, only whether there is a choice of a generation prompt may be read.
    start = tree.body[: loops[-1] + 1]
    tests = [
        test.node
        for node in start
        for test in node.find_all(nodes.Test)
        if test.name == "defined"
    ]
    reads = [n for node in start for n in node.find_all(nodes.Name) if n.ctx == "load"]
    if any(n.name == _PROMPT and not any(n is t for t in tests) for n in reads):
        return False
    mark = nodes.Output([nodes.TemplateData(_MARK)])
    loop.body.append(mark.set_lineno(loop.lineno).set_environment(tree.environment))
    return True


def _names(body: list[Any]) -> set[str]:
    from jinja2 import nodes

    return {name.name for node in body for name in node.find_all(nodes.Name)}
