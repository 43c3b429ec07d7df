"""Regular expressions from other people's files, matched within a time limit.

PEFT and transformers match module paths with `re`, which tries every way in which an
expression can match: "(.|..)+x" has 2^n of them for n characters, so one line of an
adapter_config.json could hold the program forever. `regex` matches the same
expressions and takes a timeout, which it measures in CPU time.
"""

from __future__ import annotations

import functools
import math
import re
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import regex

from qlora_jax.errors import UserError

SECONDS = 1.0
"""CPU time for the expressions of one field."""
# Added for each expression and name, since a file may have an expression for every
# module: an ordinary match takes 1 to 3 us, and several times that on a slow machine.
_SECONDS_A_PAIR = 2e-5

# `regex` in its mode V0 agrees with `re` on what `re` compiles without a warning,
# except for non-ASCII characters in classes and for references to groups (refused: no
# module path needs them), ...
_REFUSED = re.compile(r"[^\0-\x7f]|\\[uUN1-9]|\(\?P=|\(\?\(")
# ... for "a{e}" (fuzzy) and "[a[:alpha:]]" (POSIX), literal in `re` (escaped), ...
_LITERAL = re.compile(r"(\\.)|(?<=(\[)):|(?=\{(?!\d+(?:,\d*)?\}|,\d*\}))", re.DOTALL)
# ... and for memory: "(?:a{999}){999}" has a million nodes, of 600 bytes each.
_REPEAT = re.compile(r"([)\s]?)(?:\+|\{(\d{1,9}))")
_MAX_NODES = 250_000


@functools.lru_cache(maxsize=64)
def match_patterns(
    patterns: tuple[str, ...],
    names: tuple[str, ...] = (),
    *,
    field: str,
    inside: str | None = None,
) -> Mapping[str, Mapping[str, str | None]]:
    """Matches every expression with every name, as `re` would.

    Args:
      patterns: expressions.
      names: ASCII strings, such as module paths. Without any, the expressions are only
        validated.
      field: where the expressions come from; error messages begin with it.
      inside: the larger expression that each is put into, at "{}", and that matches
        from the beginning of a name. Without it an expression matches whole names.

    Returns:
      expression -> name that it matches -> what its last group matched.

    Raises:
      UserError: an expression that is invalid, alone or inside the larger one, that has
        a back-reference or non-ASCII characters, that is too large, or too slow.
    """
    if len(patterns) > 1_500:  # a 405B Llama has 1,137 modules
        raise UserError(f"{field} has {len(patterns):,} entries; at most 1,500 match.")
    nodes = 0
    out: dict[str, dict[str, str | None]] = {}
    # CPU time of this thread: a busy machine refuses what an idle one refuses.
    deadline = time.thread_time() + SECONDS
    deadline += _SECONDS_A_PAIR * len(patterns) * len(names)
    for pattern in patterns:
        nodes += _count_nodes(pattern)
        if nodes > _MAX_NODES:
            raise _error(field, pattern, "is too long, or repeats groups too often")
        match = _compile(pattern, field, inside)
        try:
            hits = ((name, match(name, deadline)) for name in names)
            out[pattern] = {name: hit[hit.re.groups] for name, hit in hits if hit}
        except TimeoutError:
            reason = (
                "takes too long to match. Repeats that can share the same text in many "
                "ways do that, as in '(.+)+' or '.*.*.*.*'. Simplify it, or list the "
                "modules"
            )
            raise _error(field, pattern, reason) from None
    return out


def first_matches(
    patterns: tuple[str, ...], names: tuple[str, ...], *, field: str, inside: str
) -> dict[str, str]:
    """Returns each name that matches -> the first expression that matches it.

    Arguments and errors are those of `match_patterns`.
    """
    matched = match_patterns(patterns, names, field=field, inside=inside)
    out: dict[str, str] = {}
    # The first that matches is written last, and so wins.
    for pattern in reversed(patterns):
        out.update(dict.fromkeys(matched[pattern], pattern))
    return out


def _count_nodes(pattern: str) -> int:
    """Bounds the compiled size; a group has a copy for each required repeat."""
    repeats = [(group, int(least or 1)) for group, least in _REPEAT.findall(pattern)]
    copies = math.prod(least + 1 for group, least in repeats if group)
    return copies * (len(pattern) + sum(least for _, least in repeats))


def _compile(
    pattern: str, field: str, inside: str | None
) -> Callable[[str, float], Any]:
    """Compiles an expression to a function of a name and a deadline."""
    if _REFUSED.search(pattern):
        raise _error(field, pattern, "has a back-reference or a character beyond ASCII")
    larger = inside or "{}"
    how = "match" if inside else "fullmatch"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # such as "possible nested set"
            re.compile(pattern)  # "a)|(b" would change the larger expression
            attempt = getattr(re.compile(larger.replace("{}", pattern)), how)
        if not set(pattern) & set("*+?{|"):
            # It can match in one way at most: `re` is safe, and ten times as fast.
            return lambda name, deadline: attempt(name)
        literal = _LITERAL.sub(lambda m: m[1] or "\\" + (":" if m[2] else ""), pattern)
        expression = larger.replace("{}", literal)
        timed = getattr(regex.compile(expression, regex.V0, cache_pattern=False), how)
    except RecursionError:
        raise _error(field, pattern, "is nested too deeply") from None
    except (re.error, regex.error, OverflowError, Warning) as error:
        raise _error(field, pattern, f"is not valid: {error}") from error

    def match(name: str, deadline: float) -> Any:
        left = deadline - time.thread_time()
        if left <= 0:
            raise TimeoutError
        return timed(name, timeout=left)

    return match


def _error(field: str, pattern: str, reason: str) -> UserError:
    return UserError(f"{field}: the regular expression {pattern!r:.100} {reason}.")
