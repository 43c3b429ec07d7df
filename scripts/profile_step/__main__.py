"""Counts where a training step spends its time on a GPU that need not be there.

    python scripts/profile_step --model 8b --remat save_matmuls
    python scripts/profile_step --model path/to/config.json --gpu rtx-4090 \
        --batch 2 --length 4096 --packed --attention xla
    python scripts/profile_step --model 8b --decode 128 --batch 1 --length 1024
    python scripts/profile_step --model 8b --json before.json   # and, after a change
    python scripts/profile_step --model 8b --compare before.json
    python scripts/profile_step --program step.txt --trace profile/

The step is compiled for the GPU (`qlora_jax.planning.compile`; `--compiler-python`
names a Python that has the GPU compiler if this one has not), or read from a program
that `--save` wrote. Each of its kernels takes the time of the bytes it has to move or
of the products it has to compute at the GPU's rates, "ideal" and "reachable"
(`qlora_jax.planning.roofline`): everything printed is counted, nothing is measured. The
floor is the time of the operations that the model needs, without recomputation, at the
ideal rate of products.

`--decode N` counts a token of generation after prompts of `--length` tokens, with a
cache for N new tokens. `--trace` puts the times that `jax.profiler.trace` measured, of
the same program on a GPU, next to the counted ones.
"""

import argparse
import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # if not installed

from convert.atomic import check_new_file, write_text
from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.choices import Attention, Fusion, Kernels, LoraProducts, Remat
from qlora_jax.errors import UserError
from qlora_jax.planning import categories, hlo
from qlora_jax.planning.compile import find_compiler, how_to_get_the_compiler
from qlora_jax.planning.gpus import find_gpu
from qlora_jax.planning.roofline import EFFICIENCIES, Rates
from qlora_jax.planning.trace import attribute, read_trace
from qlora_jax.planning.work import Kernel, Sizes
from scripts.profile_step.output import (
    compare_rows,
    draw,
    markdown,
    print_columns,
    print_kernels,
    print_measured,
    print_report,
    title,
    update_page,
)
from scripts.profile_step.program import (
    compile_program,
    count,
    read_program,
    save_program,
    settings,
)

_PHASES = ("forward", "backward", "loss", "prefill", "token", "step")


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="profile_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ", ".join(MODELS)
    p.add_argument("--model", default="8b", help=f"{names}; or a config.json")
    p.add_argument(
        "--gpu", default="h200", help="as `qlora-jax plan --gpu` (%(default)s)"
    )
    p.add_argument("--batch", type=int, default=4, help="rows (%(default)s)")
    p.add_argument(
        "--length", type=int, default=2048, help="tokens of a row (%(default)s)"
    )
    p.add_argument("--accumulate", type=int, default=1, help="micro-batches of a step")
    p.add_argument("--rank", type=int, default=16, help="of the adapters (16)")
    p.add_argument("--alpha", type=float, help="LoRA's; default twice the rank")
    p.add_argument("--packed", action="store_true", help="rows of several documents")
    p.add_argument(
        "--remat",
        default="full",
        choices=get_args(Remat),
        help="what the backward pass recomputes (%(default)s)",
    )
    p.add_argument("--unrolled", action="store_true", help="layers without a loop")
    p.add_argument(
        "--lora-products",
        default="auto",
        choices=get_args(LoraProducts),
        help="part of the products with the weights, or products of their own",
    )
    for name, choices, meaning in (
        ("--attention", Attention, "implementation"),
        ("--kernels", Kernels, "of packed weights"),
        ("--norms", Fusion, "in one pass with products of adapters, or on their own"),
        ("--activation", Fusion, "of the MLP, as --norms"),
    ):
        p.add_argument(name, default="auto", choices=get_args(choices), help=meaning)
    p.add_argument("--data", type=int, default=1, help="devices that divide the rows")
    p.add_argument("--fsdp", type=int, default=1, help="that divide weights as well")
    p.add_argument("--decode", type=int, default=0, help="new tokens of generation")
    p.add_argument("--compiler-python", help="a Python with the GPU compiler")
    p.add_argument("--program", type=Path, help="a program that --save wrote")
    p.add_argument("--save", type=Path, help="text file for the program")
    p.add_argument("--top", type=int, default=0, help="print so many largest kernels")
    p.add_argument(
        "--by-layer",
        nargs="+",
        choices=_PHASES,
        default=[],
        help="print the kernels of these parts in the order they run",
    )
    p.add_argument("--json", type=Path, help="JSON file to write")
    p.add_argument("--plot", type=Path, help="PNG to draw")
    p.add_argument("--markdown", action="store_true", help="print a Markdown table")
    p.add_argument(
        "--page",
        type=Path,
        help="page whose table of the file of --json or --report is to be replaced",
    )
    p.add_argument("--report", type=Path, help="a JSON that --json wrote, to print")
    p.add_argument("--compare", type=Path, help="JSON of another count, the one before")
    p.add_argument("--trace", type=Path, help="directory of jax.profiler.trace")
    p.add_argument("--trace-steps", type=int, help="steps that the trace has")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Counts a step and prints what is asked for."""
    args = parser().parse_args(argv)
    try:
        run(args)
    except UserError as error:
        sys.exit(f"error: {error}")


def run(args: argparse.Namespace) -> None:
    """Does what the options ask for.

    Raises:
      UserError: no compiler, or a file or setting that cannot be used.
    """
    record = args.json or args.report
    if args.page and record is None:
        raise UserError("--page needs --json or --report, whose name marks the table.")
    # Before a program is compiled, which takes minutes.
    for path in filter(None, (args.json, args.save, args.plot)):
        check_new_file(path)
    before = _read_report(args.compare) if args.compare else None
    if args.report:
        report = _read_report(args.report)
        if args.top or args.by_layer or args.trace:
            raise UserError(
                "--report has no kernels: --top, --by-layer and --trace need a program "
                "(--program, or one that is compiled)."
            )
        _print_summary(args, report)
    else:
        chosen, program = _program(args)
        gpu = find_gpu(chosen["gpu"])
        report, kernels, sizes = count(chosen, program, gpu)
        _print_summary(args, report)
        _print_kernels(args, kernels, sizes, Rates.of(gpu, EFFICIENCIES[-1]))
        if args.trace:
            measured = attribute(
                read_trace(args.trace),
                *(kernels, sizes),
                module=hlo.parse(program).module,
                steps=args.trace_steps,
            )
            print_measured(report, measured)
            report["measured"] = dataclasses.asdict(measured)
    if args.json:
        write_text(args.json, json.dumps(report, indent=1) + "\n")
    if before:
        print(f"\nbefore: {title(before['settings'])}\n")
        header = ("reachable ms", "before", "after", "difference")
        print_columns([header, *compare_rows(before, report)])
    if args.page:
        update_page(args.page, record.stem, report)
    if args.plot:
        draw(report, args.plot)


def _program(args: argparse.Namespace) -> tuple[dict[str, Any], str]:
    """Reads or compiles the program; returns its settings and text."""
    if args.program:
        return read_program(args.program)
    python = find_compiler(args.compiler_python)
    if python is None:
        raise UserError(
            f"the GPU compiler is not installed here: {how_to_get_the_compiler()}; "
            "or name a Python that has it (--compiler-python)."
        )
    chosen, program = compile_program(settings(args), python)
    if args.save:
        save_program(args.save, chosen, program)
    return chosen, program


def _read_report(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
        _ = report["settings"], report["categories"], report["reachable"]
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}.") from error
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"`{path}` was not written by --json: {error!r}.") from error
    return report


def _print_summary(args: argparse.Namespace, report: Mapping[str, Any]) -> None:
    if args.markdown:
        print(markdown(report))
    else:
        print_report(report, find_gpu(report["settings"]["gpu"]))


def _print_kernels(
    args: argparse.Namespace, kernels: Sequence[Kernel], sizes: Sizes, rates: Rates
) -> None:
    if args.top:
        print(f"\nthe {args.top} kernels that take longest, at reachable rates\n")
        longest = sorted(
            kernels,
            key=lambda k: -k.times * rates.seconds(k, categories.category(k, sizes)),
        )
        print_kernels(longest[: args.top], sizes, rates)
    for part in args.by_layer:
        print(f"\nkernels of `{part}` in order, at reachable rates\n")
        of_part = [k for k in kernels if categories.phase(k) == part]
        print_kernels(of_part, sizes, rates)


if __name__ == "__main__":
    main()
