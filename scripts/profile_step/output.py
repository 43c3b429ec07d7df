"""What a profile prints and draws: tables, kernels, comparisons, a picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from convert.atomic import write_text
from qlora_jax.errors import UserError
from qlora_jax.planning import categories
from qlora_jax.planning.gpus import GpuSpec
from qlora_jax.planning.roofline import EFFICIENCIES, Rates
from qlora_jax.planning.trace import Measured
from qlora_jax.planning.work import Kernel, Sizes

_CHOICES = {
    **{"lora_products": "products of adapters", "norms": "norms"},
    "activation": "activation",
}
"""Settings that a title has where somebody has decided."""


def title(chosen: Mapping[str, Any]) -> str:
    """Returns a line that says what was counted."""
    what = f"{chosen['batch']} x {chosen['length']:,} tokens"
    if chosen["decode"]:
        rows = f"{chosen['batch']} rows after {chosen['length']:,}"
        what = f"a token of generation, {rows}"
    words = [f"{chosen['model']} on {chosen['gpu']}", what, f"r={chosen['rank']}"]
    if not chosen["decode"]:
        words.append(chosen["remat"] + ", unrolled" * (not chosen["scan_layers"]))
    words += ["packed"] * chosen["packed"]
    words += [f"attention {chosen['attention']}", f"kernels {chosen['kernels']}"]
    for name, label in _CHOICES.items():
        words += [f"{label} {chosen[name]}"] * (chosen[name] != "auto")
    words += [f"{name} {size}" for name, size in chosen["mesh"].items()]
    if chosen["accumulate"] > 1:
        words.append(f"{chosen['accumulate']} micro-batches")
    words += [f"jax {chosen['jax']}"] if "jax" in chosen else []
    return ", ".join(words)


def table_rows(report: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Returns the cells of the table: categories, launches, total."""
    total = {name: report[name]["seconds"] for name in ("ideal", "reachable")}
    rows = [
        (
            name,
            f"{1e3 * row['ideal_seconds']:,.2f}",
            f"{1e3 * row['reachable_seconds']:,.2f}",
            f"{row['reachable_seconds'] / total['reachable']:.1%}",
            f"{row['bytes'] / 1e9:,.2f}",
            f"{row['flops'] / 1e12:,.2f}",
            f"{row['launches']:,}",
        )
        for name, row in report["categories"].items()
    ]
    launch = {name: report[name]["launch_seconds"] for name in total}
    share = f"{launch['reachable'] / total['reachable']:.1%}"
    ideal, reachable = (f"{1e3 * s:,.2f}" for s in launch.values())
    rows.append(
        ("launches", ideal, reachable, share, "", "", f"{report['launches']:,}")
    )
    ideal, reachable = (f"{1e3 * s:,.2f}" for s in total.values())
    moved = sum(row["bytes"] for row in report["categories"].values())
    flops = sum(row["flops"] for row in report["categories"].values())
    rows.append(
        (
            "total",
            ideal,
            reachable,
            "",
            f"{moved / 1e9:,.2f}",
            f"{flops / 1e12:,.2f}",
            "",
        )
    )
    return rows


_COLUMNS = ("", "ideal ms", "reachable ms", "share", "GB", "TFLOP", "launches")


def print_report(report: Mapping[str, Any], gpu: GpuSpec) -> None:
    """Prints the table and the floor."""
    print(title(report["settings"]))
    print("counted from the compiled program, not measured\n")
    print_columns([_COLUMNS, *table_rows(report)])
    print()
    for line in summary_lines(report, gpu):
        print(line)


def print_columns(rows: Sequence[Sequence[str]]) -> None:
    """Prints rows with the first column left-aligned and the others right-aligned."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [f"{cell:>{width}}" for cell, width in zip(row, widths, strict=True)]
        print("  ".join([f"{row[0]:<{widths[0]}}", *cells[1:]]).rstrip())


def summary_lines(report: Mapping[str, Any], gpu: GpuSpec) -> list[str]:
    """Returns tokens/s at both rates, the floor, and what is not timed."""
    floor = report["floor_seconds"]
    lines = []
    for efficiency in EFFICIENCIES:
        rates, row = Rates.of(gpu, efficiency), report[efficiency.name]
        lines.append(
            f"{efficiency.name:<10}{1e3 * row['seconds']:>10,.2f} ms "
            f"{row['tokens_per_second']:>10,.0f} tokens/s, "
            f"{row['seconds'] / floor:.2f} x the floor ({rates.products / 1e12:,.0f} "
            f"TFLOP/s of products, {rates.memory / 1e12:.2f} TB/s, "
            f"{1e6 * rates.launch_s:.1f} us a launch)"
        )
    why = f"{report['necessary_bytes'] / 1e9:,.2f} GB read at the ideal rate of memory"
    if not report["necessary_bytes"]:
        per_token = report["necessary_flops"] / report["tokens"]
        why = f"{per_token / 1e9:,.1f} GFLOP a token at the ideal rate of products"
    lines.append(
        f"{'floor':<10}{1e3 * floor:>10,.2f} ms {report['tokens'] / floor:>10,.0f} "
        f"tokens/s: {why}"
    )
    if report["in_graphs"]:
        lines.append(
            f"{report['in_graphs']:,} launches are in {report['graph_launches']:,} "
            "launches of command buffers"
        )
    if report["ideal"]["host_seconds"]:
        lines.append(
            f"transfers to and from the host take "
            f"{1e3 * report['ideal']['host_seconds']:,.2f} ms beside the kernels"
        )
    if categories.COLLECTIVES in report["categories"]:
        lines.append("collectives are counted, not timed: their rate is not known")
    return lines


def markdown(report: Mapping[str, Any]) -> str:
    """Renders the table as Markdown."""
    lines = [f"| {' | '.join(_COLUMNS)} |", "|---|" + "---:|" * (len(_COLUMNS) - 1)]
    lines += [f"| {' | '.join(row)} |" for row in table_rows(report)]
    return "\n".join(lines)


def update_page(path: Path, name: str, report: Mapping[str, Any]) -> None:
    """Puts the table of a report in a page, between its markers.

    Args:
      path: the page.
      name: in the markers, <!-- NAME --> and <!-- /NAME -->.
      report: the report.

    Raises:
      UserError: a page that has no such markers.
    """
    page = path.read_text()
    start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
    before, found, rest = page.partition(start)
    _, closed, after = rest.partition(end)
    if not (found and closed):
        raise UserError(f"`{path}` has no lines `{start.strip()}` and `{end}`.")
    write_text(path, f"{before}{start}\n{markdown(report)}\n\n{end}{after}")


def compare_rows(
    before: Mapping[str, Any], after: Mapping[str, Any]
) -> list[tuple[str, ...]]:
    """Returns a row per category: milliseconds at reachable rates before and after."""
    old, new = before["categories"], after["categories"]

    def row(name: str, was: float, is_: float) -> tuple[str, ...]:
        return (name, *(f"{1e3 * s:,.2f}" for s in (was, is_, is_ - was)))

    seconds = {
        name: tuple(
            each.get(name, {}).get("reachable_seconds", 0.0) for each in (old, new)
        )
        for name in dict.fromkeys([*old, *new])
    }
    changed = sorted(seconds.items(), key=lambda item: item[1][1] - item[1][0])
    rows = [row(name, *both) for name, both in changed]
    for name, key in (("launches", "launch_seconds"), ("total", "seconds")):
        rows.append(row(name, before["reachable"][key], after["reachable"][key]))
    return rows


def print_kernels(kernels: Sequence[Kernel], sizes: Sizes, rates: Rates) -> None:
    """Prints a line for each kernel, in the order given."""
    rows = []
    for kernel in kernels:
        category = categories.category(kernel, sizes)
        seconds = rates.seconds(kernel, category)
        rows.append(
            (
                f"{1e6 * seconds:,.1f}",
                f"{kernel.times:,}",
                f"{1e3 * seconds * kernel.times:,.2f}",
                f"{kernel.bytes / 1e6:,.1f}",
                f"{kernel.flops / 1e9:,.1f}",
                category,
                kernel.shape[:70],
                kernel.op_name[-70:] or kernel.instruction.name,
            )
        )
    header = ("us each", "times", "ms", "MB", "GFLOP", "category", "shape", "scope")
    print_columns([header, *rows])


def print_measured(report: Mapping[str, Any], measured: Measured) -> None:
    """Prints measured against counted milliseconds by category."""
    print(f"\nmeasured, mean of {measured.steps} steps\n")
    counted = report["categories"]
    rows = [("", "measured ms", "reachable ms", "measured / reachable", "launches")]
    for name in dict.fromkeys([*measured.rows, *counted]):
        row, expected = measured.rows.get(name), counted.get(name)
        seconds = row.seconds if row else 0.0
        reachable = expected["reachable_seconds"] if expected else 0.0
        rows.append(
            (
                name,
                f"{1e3 * seconds:,.2f}",
                f"{1e3 * reachable:,.2f}" if expected else "",
                f"{seconds / reachable:.2f}" if reachable else "",
                f"{row.launches:,}" if row else "0",
            )
        )
    total = f"{1e3 * measured.seconds:,.2f}"
    rows.append(("total of kernels", total, "", "", ""))
    print_columns(rows)
    for name, seconds in list(measured.unknown.items())[:10]:
        print(f"not in the program: {1e3 * seconds:.3f} ms {name}")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Draws a bar of each category, ideal and reachable, as a PNG."""
    from matplotlib.figure import Figure

    total = report["reachable"]["seconds"]
    bars = {
        name: (row["ideal_seconds"], row["reachable_seconds"])
        for name, row in report["categories"].items()
    }
    bars["launches"] = (
        report["ideal"]["launch_seconds"],
        report["reachable"]["launch_seconds"],
    )
    # What is too small to see is one bar.
    small = [name for name, (_, seconds) in bars.items() if seconds < 0.002 * total]
    if len(small) > 1:
        rest = [sum(bars[name][i] for name in small) for i in (0, 1)]
        bars = {name: both for name, both in bars.items() if name not in small}
        bars[f"{len(small)} smaller ones"] = (rest[0], rest[1])
    names = sorted(bars, key=lambda name: bars[name][1])
    figure = Figure(figsize=(9, 0.38 * len(names) + 1.6), layout="constrained")
    axes = figure.subplots()
    for i, (label, color) in enumerate(
        (("ideal", "#9ecae1"), ("reachable", "#2171b5"))
    ):
        axes.barh(
            [y + 0.2 - 0.4 * i for y in range(len(names))],
            [1e3 * bars[name][i] for name in names],
            height=0.4,
            label=f"{label}: {1e3 * report[label]['seconds']:,.0f} ms, "
            f"{report[label]['tokens_per_second']:,.0f} tokens/s",
            color=color,
        )
    for y, name in enumerate(names):
        seconds = bars[name][1]
        axes.annotate(
            f"{1e3 * seconds:,.1f} ({seconds / total:.1%})",
            (1e3 * seconds, y - 0.2),
            xytext=(3, 0),
            textcoords="offset points",
            va="center",
            fontsize="x-small",
        )
    axes.set_yticks(range(len(names)), names, fontsize="small")
    axes.set_xlabel("milliseconds, counted from the compiled program")
    axes.margins(x=0.16, y=0.01)
    floor = f"floor: {1e3 * report['floor_seconds']:,.0f} ms"
    axes.set_title(f"{title(report['settings'])}\n{floor}", fontsize="small")
    axes.grid(axis="x", alpha=0.3)
    axes.legend(loc="lower right", fontsize="small")
    figure.savefig(path, dpi=150, format="png")
