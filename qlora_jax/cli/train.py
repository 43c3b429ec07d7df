"""The `train` command: `train [CONFIG.toml] [--section.key value ...]`."""

from __future__ import annotations

import contextlib
import logging
import shlex
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro

from qlora_jax.cli.options import parse
from qlora_jax.cli.output import (
    Terminated,
    format_value,
    print_report,
    print_text,
    report_stop,
)
from qlora_jax.errors import UsageError, readable_bytes, say
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
    file = Path(args[0]) if args and not args[0].startswith("-") else None
    # What a run needs takes seconds to import, and `--help` does without it.
    from qlora_jax.runs import RunInterrupted, process_seconds, relative_paths, run

    # Orbax logs, thread by thread, the errors that it raises as well.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    try:
        # From the start of the process, so that imports count in the time to the first
        # step.
        began = time.perf_counter() - process_seconds()
        with contextlib.ExitStack() as stack:
            if file is not None:
                stack.enter_context(relative_paths(config, file, option_keys(args)))
            report = run(config, explicit_lora=explicit, began=began)
    except RunInterrupted as error:
        # Not 0, which schedulers and `train a && train b` take for a finished run.
        say(f"qlora-jax train: {error}")
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
    if file is None and args and args[-1][-5:] == ".toml" and Path(args[-1]).is_file():
        raise UsageError(
            f"The run file comes before the options: qlora-jax train {args[-1]} "
            f"{shlex.join(args[:-1])}"
        )
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
    config = read_config(file, values_of(options, keys))
    if file is not None and "output_dir" not in keys:
        from qlora_jax.runs import where_it_is  # takes jax, which `--help` does without

        config = where_it_is(config, file)
    return config, given_lora(file, keys)


def _print_run(config: RunConfig, report: dict[str, Any]) -> None:
    from qlora_jax.runs import ADAPTER, BEST, REPORT_PAGE

    directory, evaluation = Path(config.output_dir), report["eval"] or {}
    best_step, tuned = evaluation.get("best_step"), directory
    rows = {
        "run directory": str(directory),
        "report": str(directory / REPORT_PAGE),
        "steps": report["steps"],
        "final loss": report["final_loss"],
    }
    if best_step is not None:
        rows["best held-out loss"] = (
            f"{format_value(evaluation['best_loss'])} (after step {best_step:,})"
        )
        if best_step != report["steps"]:
            tuned = directory / BEST
            rows["best adapter"] = str(tuned)
    rows["adapter"] = (
        f"{directory / ADAPTER} ({readable_bytes(report['adapter_bytes'])})"
    )
    rows["trained parameters"] = report["trainable_parameters"]
    print_report({**rows, "by module": report["groups"]})
    path = shlex.quote(str(tuned))
    use = f"chat {path}"
    if all(source.format != "messages" for source in config.data.each):
        use = f'generate {path} --prompt "..."'
    print_text(
        f"\nTo use it:\n\n    qlora-jax {use}\n    qlora-jax merge {path} merged"
    )
