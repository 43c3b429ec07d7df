"""The collectives of a scheduled program: which, how many, how many bytes.

Read from the text of a program compiled for several devices. A collective inside a loop
counts as often as the loop goes round, where the compiler knows how often.
"""

from __future__ import annotations

import math
import re

_KINDS = (
    *("all-gather", "all-reduce", "reduce-scatter", "all-to-all"),
    *("collective-permute", "collective-broadcast", "ragged-all-to-all"),
)
_BITS = {"pred": 8, "bf16": 16, "c64": 64, "c128": 128}
_COMPUTATION = re.compile(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
# Asynchronous ones are written as a pair, of which the first counts; its result is a
# tuple of operand and result.
_COLLECTIVE = re.compile(rf"= (\(.*?\)|\S+) ({'|'.join(_KINDS)})(-start)?\((.*)$")
_WRAPPED = re.compile(r"= .* async-start\(.*calls=%?([\w.\-]+)")
_ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*body=%?([\w.\-]+)")
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")


def collectives(program: str) -> dict[str, dict[str, int]]:
    """Counts collectives by kind.

    Args:
      program: scheduled HLO as text.

    Returns:
      Kind -> {"count", "bytes"} of one step of one device; bytes are those of the
      results that a device ends up with.
    """
    lines: dict[str, list[str]] = {}
    entry = name = ""
    for line in program.splitlines():
        if match := _COMPUTATION.match(line):
            name = match[1]
            lines[name] = []
            if line.startswith("ENTRY"):
                entry = name
        elif line.startswith("}"):
            name = ""
        elif name:
            lines[name].append(line)
    found: dict[str, dict[str, int]] = {}

    def visit(computation: str, times: int) -> None:
        for line in lines.get(computation, ()):
            if match := _COLLECTIVE.search(line):
                kind = found.setdefault(match[2], {"count": 0, "bytes": 0})
                kind["count"] += times
                kind["bytes"] += times * _result_bytes(match[1], bool(match[3]))
            trips = 1
            if loop := _WHILE.search(line):
                known = _TRIPS.search(line)
                trips = int(known[1]) if known else 1
                visit(loop[1], times * trips)
                continue
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [b.strip().lstrip("%") for b in branches.split(",")]
            for one in called:
                visit(one, times)

    visit(entry, 1)
    return found


def _result_bytes(shape: str, started: bool) -> int:
    arrays = [_bytes(*array) for array in _ARRAY.findall(shape)]
    if started and len(arrays) > 1:
        arrays = arrays[len(arrays) // 2 :]
    return sum(arrays)


def _bytes(dtype: str, sizes: str) -> int:
    bits = _BITS.get(dtype)
    if bits is None:
        digits = re.search(r"\d+", dtype)
        bits = int(digits[0]) if digits else 0
    count = math.prod(int(n) for n in sizes.split(",") if n)
    return count * bits // 8
