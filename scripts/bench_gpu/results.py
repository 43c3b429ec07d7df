"""Measured rows, failures and refusals, recorded in a JSON file and a table."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from convert.atomic import write_text
from pallas_kernels.device import device_slug
from scripts.bench_gpu.worker import Budget

# An implementation is faster than another if by more than this: less is noise.
MARGIN = 1.02


class Task(Protocol):
    """One thing to time."""

    @property
    def name(self) -> str:
        """What it is, in a few words."""
        ...

    @property
    def group(self) -> str:
        """Tasks of one group take about as long to compile, compare and time."""
        ...

    def request(self, traces: int) -> dict[str, Any]:
        """Returns what a worker is asked for."""
        ...

    def row(self, timing: dict[str, Any], result: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the row of a timing, with speeds."""
        ...

    def summary(self, row: dict[str, Any]) -> str:
        """Returns a row in a few words."""
        ...


def one_of_each(todo: Sequence[Any]) -> list[Any]:
    """Returns the first task of each group, for a dry run."""
    return list({task.group: task for task in reversed(todo)}.values())[::-1]


@dataclass
class Recorder:
    """Asks for timings and records the answers."""

    result: dict[str, Any]
    """With rows, failures, unavailable, left_out."""
    budget: Budget
    save: Callable[[], None] = lambda: None
    """Called after each answer."""
    say: Callable[[str], None] = lambda text: None
    by_reason: bool = False
    """Whether `unavailable` is reason -> names; else it is name -> reason."""

    def run(
        self,
        todo: Sequence[Task],
        ask: Callable[[dict[str, Any]], dict[str, Any]],
        *,
        traces: int = 3,
    ) -> None:
        """Has the tasks checked and timed, as far as the budget goes."""
        for task in todo:
            request = partial(ask, task.request(traces))
            answer = self.budget.take(task.name, task.group, request)
            self.result["left_out"] = list(self.budget.left_out)
            if answer is not None:
                self.say(f"{task.name}: {self.record(task, answer)}")
                self.save()

    def record(self, task: Task, answer: dict[str, Any]) -> str:
        """Records an answer; returns it in a few words."""
        if "timing" in answer:
            row = task.row(answer["timing"], self.result)
            self.result["rows"].append(row)
            return task.summary(row)
        if "unavailable" in answer:
            reason = answer["unavailable"]
            if self.by_reason:
                self.result["unavailable"].setdefault(reason, []).append(task.name)
            else:
                self.result["unavailable"][task.name] = reason
            return f"not available: {reason.splitlines()[0][:100]}"
        self.result["failures"][task.name] = answer["failed"]
        return f"FAILED: {answer['failed'].splitlines()[0][:200]}"


def write_result(
    folder: Path,
    name: str,
    result: dict[str, Any],
    table: Callable[[dict[str, Any]], str],
) -> None:
    """Writes a result as JSON and as Markdown."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / f"{name}.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / f"{name}.md", table(result))


def write_choices(folder: Path, ending: str, choices: dict[str, Any]) -> None:
    """Writes what is to be chosen on a device, as pallas_kernels/tuned holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{device_slug(choices['device'])}{ending}.json"
    write_text(path, json.dumps(choices, indent=1) + "\n")


def markdown_table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Returns the lines of a table."""
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def problem_sections(problems: Mapping[str, Sequence[str]]) -> list[str]:
    """Returns the lines of title -> problems, without what is empty."""
    lines = []
    for title, items in problems.items():
        if items:
            lines += ["", f"## {title}", ""]
            lines += [f"- {item}".replace("\n", " ") for item in items]
    return lines
