"""The `report` command: an HTML page about a run, finished or under way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from qlora_jax.cli.options import parse, path_argument
from qlora_jax.cli.output import run_and_print


@dataclass(frozen=True)
class Report:
    """Write an HTML page about a run, finished or under way."""

    path: Annotated[tyro.conf.Positional[str], path_argument("RUN")]
    """Run directory."""
    output: str | None = None
    """File to write; default report.html in the run directory."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Writes the page; returns its path and the main numbers."""
        from convert import write_text
        from qlora_jax.runs import REPORT_PAGE, best_evaluation, read_run, render_run

        run = read_run(Path(self.path))
        output = Path(self.output) if self.output else run.directory / REPORT_PAGE
        write_text(output, render_run(run))
        last = run.metrics[-1] if run.metrics else {}
        best = best_evaluation(run.evaluations) or {}
        return {
            "page": str(output),
            "step": last.get("step", 0),
            "loss": last.get("loss"),
            "best_step": best.get("step"),
            "best_loss": best.get("eval_loss"),
        }


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax report`; returns the exit status."""
    command = parse(Report, args, prog="qlora-jax report")
    return run_and_print(command.run, as_json=command.json)
