"""Regular expressions from other people's files, checked before they are matched.

An adapter_config.json may select modules by regular expression. Python's `re` tries
every way in which an expression can fit, and "(a+)+$" fits n letters in 2^n ways: one
line of a file could hold the program for ever. What an expression is matched against
is known, however: the module paths of a Llama, up to the number of a layer. So the
steps can be counted without being taken. How often each part of the expression ends at
each place is computed once and multiplied, where `re` would go there that often.
"""

from __future__ import annotations

import importlib
import re
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from qlora_jax.errors import UserError

MAX_LENGTH = 100_000
"""Characters; an expression that lists all modules of a 405B model has 32,000."""

MAX_STEPS = 50_000
"""Steps for one module path, a millisecond; that longest list takes 10,000."""

MAX_STEPS_TOGETHER = 1_000_000
"""Of several; one with ".*" for each linear module of that model takes 600,000."""

MAX_PATTERNS = 1_500
"""Expressions at once; that model has 1,137 modules."""

# The module paths of a Llama; "#" stands for any digit and "?" for q, k, v or o.
_ANY = {"#": "0123456789", "?": "qkvo"}
_LAYER = (
    *("self_attn.?_proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"),
    *("input_layernorm", "post_attention_layernorm"),
)
_PATHS = (
    *("model.embed_tokens", "model.norm", "lm_head"),
    *(f"model.layers.{n}.{name}" for n in ("#", "##", "###") for name in _LAYER),
)
_ALPHABET = sorted({character for path in _PATHS for character in path})
# A character in an expression -> those of the paths that can be it.
_SAME = {
    one: frozenset(c for c in _ALPHABET if one in _ANY.get(c, c))
    for one in {one for c in _ALPHABET for one in _ANY.get(c, c)}
}


def check_pattern(pattern: str, inside: str = "{}") -> None:
    """Refuses a regular expression that cannot be matched, or not in bounded time.

    What passes may be matched against the module paths of a Llama: from their beginning
    or from behind a dot, or inside the larger expression from their beginning.

    Args:
      pattern: the expression.
      inside: the larger expression it will be put into, at "{}". It is valid on its own
        too: an unbalanced parenthesis would change the larger one.

    Raises:
      UserError: an invalid expression, one with back-references or characters beyond
        ASCII (no module path needs them), or one that would take too long.
    """
    check_patterns((pattern,), inside)


def check_patterns(patterns: Iterable[str], inside: str = "{}") -> None:
    """As `check_pattern`; all of them together must not take too long either."""
    patterns = tuple(patterns)
    if len(patterns) > MAX_PATTERNS:
        raise UserError(
            f"{len(patterns):,} names or regular expressions are more than a Llama has "
            f"modules; at most {MAX_PATTERNS:,} are matched. The first is "
            f"{_shown(patterns[0])}."
        )
    left = dict.fromkeys(_PATHS, MAX_STEPS_TOGETHER)
    for pattern in patterns:
        try:
            parts = _parse(pattern, pattern)
            if inside != "{}":
                parts = _parse(inside.replace("{}", pattern), pattern)
            if not set(pattern) & set("*+?{|"):
                continue  # one way at most: a name, as most of them are
            for path in _PATHS:
                left[path] -= _Counter(path, MAX_STEPS).total(parts, inside == "{}")
        except _TooManySteps:
            raise UserError(
                f"The regular expression {_shown(pattern)} takes too long to match "
                f"(more than {MAX_STEPS:,} steps for one module path). Repeats that "
                "can share the same text in many ways do that, as in '(.+)+' or "
                "'.*.*.*.*'. Say it more simply, or list the modules."
            ) from None
        except RecursionError:
            raise UserError(
                f"The regular expression {_shown(pattern)} is nested too deeply."
            ) from None
        if min(left.values()) < 0:
            raise UserError(
                f"{len(patterns):,} regular expressions, such as {_shown(pattern)}, "
                "together take too long to match (more than "
                f"{MAX_STEPS_TOGETHER:,} steps for one module path). Say them more "
                "simply, or use fewer."
            )


def _shown(pattern: str) -> str:
    text = repr(pattern[:100])
    return text if len(pattern) <= 100 else f"{text}... ({len(pattern):,} characters)"


# --- The expression as a tree ---

Parts = list[Any]
"""What has to fit one after the other: a set of characters of which one comes next, a
list (a group), or one of the three below."""


@dataclass(frozen=True)
class _Repeat:
    low: int
    high: int
    body: Parts


@dataclass(frozen=True)
class _Either:
    branches: list[Parts]


@dataclass(frozen=True)
class _Look:
    """Fits nothing by itself; `body` is looked at, from `behind` characters before."""

    body: Parts
    behind: int = 0
    at_start: bool = False
    at_end: bool = False


# The standard library's parser of expressions: what `re.compile` calls first.
_parser: Any = importlib.import_module("re._parser")

_CATEGORIES: dict[str, Callable[[str], bool]] = {
    "DIGIT": str.isdigit,
    "SPACE": str.isspace,
    "WORD": lambda c: c.isalnum() or c == "_",
}


def _parse(expression: str, pattern: str) -> Parts:
    """Parses and, to be sure, compiles; errors name `pattern`."""
    if len(pattern) > MAX_LENGTH:
        raise UserError(
            f"The regular expression {_shown(pattern)} is longer than {MAX_LENGTH:,} "
            "characters."
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as "possible nested set"
            tree = _parser.parse(expression)
            # Before it is compiled, which takes long for a wide range of characters.
            parts = _translate(tree, bool(tree.state.flags & re.IGNORECASE))
            re.compile(expression)
    except (re.error, OverflowError, Warning) as error:
        raise UserError(
            f"The regular expression {_shown(pattern)} is not valid: {error}."
        ) from error
    except _Unsupported as error:
        raise UserError(f"The regular expression {_shown(pattern)} {error}.") from None
    return parts


class _Unsupported(Exception):
    pass


def _translate(tree: Any, any_case: bool) -> Parts:
    parts: Parts = []
    for op, value in tree:
        name = str(op)
        if name == "SUBPATTERN":
            _, added, removed, body = value
            inner = (any_case or added & re.IGNORECASE) and not removed & re.IGNORECASE
            parts.append(_translate(body, bool(inner)))
        elif name == "ATOMIC_GROUP":
            parts.append(_translate(value, any_case))
        elif name.endswith("REPEAT"):
            low, high, body = value
            parts.append(_Repeat(int(low), int(high), _translate(body, any_case)))
        elif name == "BRANCH":
            parts.append(_Either([_translate(b, any_case) for b in value[1]]))
        elif name.startswith("ASSERT"):
            direction, body = value
            behind = body.getwidth()[0] if direction < 0 else 0
            parts.append(_Look(_translate(body, any_case), behind))
        elif name == "AT":
            start, end = "BEGINNING" in str(value), "END" in str(value)
            parts.append(_Look([], at_start=start, at_end=end))
        elif name.startswith("GROUPREF"):
            raise _Unsupported(
                "refers back to one of its groups, which is not supported. Write it "
                "without"
            )
        else:
            parts.append(_characters(op, value, any_case))
    return parts


def _characters(op: Any, value: Any, any_case: bool) -> frozenset[str]:
    """The characters of module paths that a node for one character can be."""
    if str(op) == "LITERAL" and value < 128:
        character = chr(value)
        return _SAME.get(character.lower() if any_case else character, frozenset())
    for item, codes in value if str(op) == "IN" else [(op, value)]:
        codes = (codes,) if isinstance(codes, int) else codes
        if "CATEGORY" not in str(item) and max(codes or (0,)) > 127:
            raise _Unsupported("has a character beyond ASCII; no module path has one")
    found = set()
    for character in _ALPHABET:
        choices = _ANY.get(character, character)
        if any_case:
            choices = choices.lower() + choices.upper()
        if any(_accepts(op, value, c) for c in choices):
            found.add(character)
    return frozenset(found)


def _accepts(op: Any, value: Any, c: str) -> bool:
    name = str(op)
    if name == "LITERAL":
        return ord(c) == value
    if name == "NOT_LITERAL":
        return ord(c) != value
    if name == "RANGE":
        return value[0] <= ord(c) <= value[1]
    if name == "CATEGORY":
        category = str(value).removeprefix("CATEGORY_")
        holds = _CATEGORIES[category.removeprefix("NOT_")](c)
        return holds != category.startswith("NOT_")
    if name == "IN":
        negated = str(value[0][0]) == "NEGATE"
        return any(_accepts(o, v, c) for o, v in value[negated:]) != negated
    return name == "ANY"  # FAILURE fits nothing


# --- The steps of matching it ---

Ends = dict[int, int]
"""Where a part of an expression can end: place in the path -> in how many ways."""


class _TooManySteps(Exception):
    pass


class _Counter:
    """Counts the steps of a backtracking matcher that tries everything, on one path.

    Where `re` would stop early (a look-ahead that holds, an atomic group, a match), it
    counts on: the result is a bound.
    """

    def __init__(self, path: str, limit: int):
        self.path = path
        self.limit = limit
        self.known: dict[tuple[int, int], tuple[Ends, int]] = {}

    def total(self, parts: Parts, behind_dots: bool) -> int:
        """Steps from the beginning of the path, and from behind every dot."""
        starts = [0]
        if behind_dots:
            starts += [i + 1 for i, c in enumerate(self.path) if c == "."]
        steps = sum(self.sequence(parts, start)[1] for start in starts)
        if steps > self.limit:
            raise _TooManySteps
        return steps

    def sequence(self, parts: Parts, start: int) -> tuple[Ends, int]:
        """Where `parts` can end if they begin at `start`, and the steps this takes."""
        key = (id(parts), start)
        if key in self.known:
            return self.known[key]
        ends, steps = {start: 1}, 1
        for part in parts:
            following: Ends = {}
            for place, ways in ends.items():
                if isinstance(part, frozenset):
                    steps += ways
                    if place < len(self.path) and self.path[place] in part:
                        following[place + 1] = ways
                    continue
                reached, cost = self.part(part, place)
                steps += ways * cost
                for p, n in reached.items():
                    following[p] = following.get(p, 0) + ways * n
            if steps > self.limit:
                raise _TooManySteps
            ends = following
        self.known[key] = ends, steps
        return ends, steps

    def part(self, part: Any, start: int) -> tuple[Ends, int]:
        """As `sequence`, of one part that is no set of characters."""
        if isinstance(part, list):
            return self.sequence(part, start)
        if isinstance(part, _Repeat):
            return self.repeat(part, start)
        if isinstance(part, _Either):
            ends: Ends = {}
            steps = 1
            for branch in part.branches:
                reached, cost = self.sequence(branch, start)
                steps += cost
                for p, n in reached.items():
                    ends[p] = ends.get(p, 0) + n
            return ends, steps
        if start < part.behind:
            return {start: 1}, 1
        fails = part.at_start and start > 0 or part.at_end and start < len(self.path)
        steps = self.sequence(part.body, start - part.behind)[1] + 1
        return ({} if fails else {start: 1}), steps

    def repeat(self, part: _Repeat, start: int) -> tuple[Ends, int]:
        current: Ends = {start: 1}
        ends: Ends = {}
        steps = 1
        count = 0
        while current:
            if count >= part.low:
                for p, n in current.items():
                    ends[p] = ends.get(p, 0) + n
            if count == part.high:
                break
            following: Ends = {}
            for place, ways in current.items():
                reached, cost = self.sequence(part.body, place)
                steps += ways * (cost + 1)
                for p, n in reached.items():
                    # Once there are enough turns, an empty one is the last.
                    goes_on = p > place or count < part.low
                    where = following if goes_on else ends
                    where[p] = where.get(p, 0) + ways * n
            if steps > self.limit:
                raise _TooManySteps
            current = following
            count += 1
        return ends, steps
