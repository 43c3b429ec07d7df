"""The `train` command: `train [CONFIG.toml] [--section.key value ...]`."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from qlora_jax.cli.options import parse
from qlora_jax.cli.output import Terminated, print_report, report_stop
from qlora_jax.runs import (
    AtOnce,
    RunConfig,
    check_options,
    given_lora,
    option_defaults,
    option_keys,
    read_config,
    unchecked_config,
    values_of,
)

_CONTINUES = " The same command continues from the newest checkpoint, if there is one."


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax train`; returns the exit status."""
    config, explicit = from_arguments(args)
    # What a run needs takes seconds to import, and `--help` does without it.
    from qlora_jax.runs import RunInterrupted, process_seconds, run

    # Orbax logs, thread by thread, the errors that it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        # From the start of the process, so that imports count in the time to the first
        # step.
        began = time.perf_counter() - process_seconds()
        report = run(config, explicit_lora=explicit, began=began)
    except RunInterrupted as error:
        # Not 0, which schedulers and `train a && train b` take for a finished run.
        print(f"qlora-jax train: {error}", file=sys.stderr)
        return error.status
    except (KeyboardInterrupt, Terminated) as error:
        idle = "" if isinstance(error, AtOnce) else " No step was under way."
        return report_stop("qlora-jax train", error, idle + _CONTINUES)
    _print_run(config, report)
    return 0


def from_arguments(args: Sequence[str]) -> tuple[RunConfig, set[str]]:
    """Reads the run file, if one is given, and the options, which win.

    Returns:
      The run's settings, and the names of those in its `lora` section that were given.
    """
    args = list(args)
    file = Path(args.pop(0)) if args and not args[0].startswith("-") else None
    check_options(args)
    keys = option_keys(args)
    defaults = None if file is None else option_defaults(read_config(file))
    like, start = unchecked_config(defaults)
    options = parse(
        like,
        args,
        # Without one, options that are not given keep the defaults of their fields.
        default=tyro.MISSING_NONPROP if start is None else start,
        prog="qlora-jax train [CONFIG.toml]",
        description="Fine-tune a model, or continue a run.\n\nThe same command on the "
        "same --output-dir goes on from the newest checkpoint. CONFIG.toml holds these "
        "options by section; options given here win.",
    )
    return read_config(file, values_of(options, keys)), given_lora(file, keys)


def _print_run(config: RunConfig, report: dict[str, Any]) -> None:
    from qlora_jax.runs import ADAPTER

    shown = ("steps", "final_loss", "trainable_parameters", "groups", "adapter_bytes")
    print_report(
        {
            "run directory": config.output_dir,
            "adapter": str(Path(config.output_dir) / ADAPTER),
            **{name: report[name] for name in shown},
        }
    )
