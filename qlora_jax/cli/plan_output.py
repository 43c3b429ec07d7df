"""What `qlora-jax plan` shows of a plan: tables, and memory against length as a PNG."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from convert import check_new_file, new_file
from qlora_jax.cli.plan_mesh import print_mesh
from qlora_jax.errors import UserError, readable_bytes, say, visible
from qlora_jax.planning import ALLOWANCE, Plan, Planner, Policy, Step

_LABELS = {
    "base": "frozen weights",
    "adapters": "adapters (float32)",
    "optimizer": "the optimizer's moments",
    "batch": "batch",
    "activations": "activations kept for the backward pass",
    "gradients": "gradients",
    "loss": "loss, beyond what it shares",
    "temporaries": "temporaries: a layer at work",
    "workspace": "workspace of cuDNN's backward pass",
    "allowance": "CUDA context and allocator",
}


def print_plan(report: Mapping[str, Any]) -> None:
    """Prints a report of `PlanCommand.run` as tables."""
    devices = math.prod(report["mesh"].values())
    card = visible(report["card"])  # a name from a file of the user
    gpus = card if devices == 1 else f"{devices} x {card}"
    if (per_node := report["gpus_per_node"]) < devices:
        gpus += f" in nodes of {per_node}"
    verdict = "fits" if report["fits"] else "does not fit"
    if report["uncertain"]:
        verdict = "estimated to fit, within the estimate's 10 %"
    how = "compiled" if report["method"] == "compiled" else "estimated"
    print(
        f"{report['batch_size']:,} x {report['max_length']:,} tokens on {gpus}: "
        f"{verdict} ({how}; policy '{report['policy']}', attention "
        f"{report['attention']}, {report['dtype']}, {report['quantization']})"
    )
    if devices > 1:
        sizes = ", ".join(f"{name} = {size}" for name, size in report["mesh"].items())
        print(f"mesh: {sizes}: {report['mesh_reason']}")
    _print_device_bytes(report, devices)
    _print_host_and_time(report)
    if report["counted"]:
        _print_counted(report["counted"])
    print_mesh(report)
    if report.get("policies"):
        _print_policies(report["policies"])
    print("\nin [model] of the run file")
    for name in ("remat", "scan_layers", "attention", "embed_tokens", "lm_head"):
        print(f"  {name} = {json.dumps(report[name])}")
    for name in ("kernels", "fusion"):
        if report[name] != "auto":
            print(f"  {name} = {json.dumps(report[name])}")
    if devices > 1:
        print("\nin [mesh] of the run file")
        for name in ("data", "fsdp", "context"):
            print(f"  {name} = {report['mesh'].get(name, 1)}")
    if report["settings"] and report["fits"]:
        print("\nset for the run")
        for name, value in report["settings"].items():
            print(f"  {name}={value}")
    if report.get("plot"):
        print(visible(f"\ndrawn: {report['plot']}"))
    for note in report["notes"]:
        print(visible(f"\nNote: {note}"))


def _print_device_bytes(report: Mapping[str, Any], devices: int) -> None:
    print("\ndevice bytes" + (" of each device" if devices > 1 else ""))
    for kind, size in report["device_bytes"].items():
        if kind != "total" and size >= 5000:  # less would print as nothing
            print(f"  {_LABELS[kind]:<40}{readable_bytes(size):>12}")
    total, limit = report["device_bytes"]["total"], report["card_bytes"]
    print(
        f"  {'total':<40}{readable_bytes(total):>12}  of {readable_bytes(limit)} "
        f"({total / limit:.0%})"
    )


def _print_host_and_time(report: Mapping[str, Any]) -> None:
    floor = report["step_seconds_floor"]
    rows = {
        "pinned host memory": readable_bytes(report["host_bytes"]),
        "host memory the machine needs": readable_bytes(report["host_bytes_needed"]),
        "adapter file": readable_bytes(report["adapter_bytes"]),
        "FLOPs a token": f"{report['flops_per_token'] / 1e9:,.1f} G "
        f"({report['necessary_flops_per_token'] / 1e9:,.1f} G without recomputation)",
        "a step takes at least": f"{max(floor.values()):.3g} s (by formula: compute "
        f"{floor['compute']:.3g}, device memory {floor['bandwidth']:.3g}, host link "
        f"{floor['host_link']:.3g})",
    }
    print("\nhost, file and time")
    for label, value in rows.items():
        print(f"  {label:<32}{value}")


def _print_counted(counted: Mapping[str, Any]) -> None:
    print("\ntime of a step, counted from its compiled kernels, not measured")
    tokens, floor = counted["tokens"], counted["floor_seconds"]
    rows = {"floor: FLOPs without recomputation": (floor, tokens / floor)}
    for name in ("ideal", "reachable"):
        each = counted[name]
        label = f"all kernels, {name} rates"
        rows[label] = (each["seconds"], each["tokens_per_second"])
    for label, (seconds, rate) in rows.items():
        print(f"  {label:<40}{seconds:>10.3g} s{rate:>14,.0f} tokens/s")
    print(f"  {'kernels launched':<40}{counted['launches']:>10,}")


def _print_policies(policies: Sequence[Mapping[str, Any]]) -> None:
    print("\npolicies")
    counted = any(row.get("counted_tokens_per_second") for row in policies)
    header = f"  {'':<24}{'tokens':>16}{'device':>12}{'host':>12}{'at least':>12}"
    print(header + (f"{'counted':>18}" if counted else ""))
    for row in policies:
        if "device_bytes" not in row:
            print(f"  {row['policy']:<24}{'does not fit':>16}")
            continue
        size = f"{row['batch_size']:,} x {row['max_length']:,}"
        device, host = map(readable_bytes, (row["device_bytes"], row["host_bytes"]))
        seconds = max(row["step_seconds_floor"].values())
        verdict = "" if row["fits"] else "  does not fit"
        rate = row["counted_tokens_per_second"]
        rate = f"{rate:>9,.0f} tokens/s" if rate else " " * 18 * counted
        print(
            f"  {row['policy']:<24}{size:>16}{device:>12}{host:>12}{seconds:>10.3g} s"
            f"{rate}{verdict}".rstrip()
        )


# --- The picture ---


def check_picture_path(path: Path) -> None:
    """Raises where no picture can be written, before anything is compiled."""
    if path.suffix.lower() != ".png":
        raise UserError(f"`plot` draws a PNG, and {str(path)!r} is named otherwise.")
    check_new_file(path)


def draw_memory(
    planner: Planner, plan: Plan, candidates: Sequence[Policy], path: Path
) -> Path | None:
    """Draws device memory against length for each policy, with the GPU's limit.

    Returns:
      The picture's path; None (with a line on stderr) without matplotlib.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        say(f"{path} is not drawn: pip install matplotlib.")
        return None
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    for policy in candidates:
        lengths, totals = zip(*_points(planner, plan.step, policy), strict=True)
        # Between the planned points memory is a straight line over tokens, which a
        # logarithmic axis bends.
        fine = np.geomspace(lengths[0], lengths[-1], 200)
        (line,) = axes.plot(fine, np.interp(fine, lengths, totals), label=policy.name)
        axes.plot(lengths, totals, "o", markersize=3.5, color=line.get_color())
    _label_axes(axes, planner, plan)
    with new_file(path) as temporary:
        figure.savefig(temporary, dpi=150, format="png")
    return path


def _label_axes(axes: Any, planner: Planner, plan: Plan) -> None:
    limit = planner.gpu.memory_bytes / 1e9
    axes.axhline(limit, color="black", linestyle="--", linewidth=1)
    axes.annotate(
        f"{planner.gpu.name}: {limit:,.0f} GB",
        (0, limit),
        xycoords=("axes fraction", "data"),
        xytext=(4, 4),
        textcoords="offset points",
    )
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(
        lambda value, _: f"{value / 1024:g}k" if value >= 1024 else f"{value:g}"
    )
    axes.set_ylim(0, 1.15 * limit)
    axes.set_xlabel("tokens of a row (k = 1,024)")
    axes.set_ylabel(f"device memory (GB, {ALLOWANCE / 1e9:.1f} of them for context)")
    rows = plan.step.train.batch_size
    axes.set_title(
        f"{rows} row{'s' if rows > 1 else ''} a step; dots: "
        + ("compiled" if planner.python else "estimated"),
        fontsize="medium",
    )
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", title="policy")


def _points(planner: Planner, step: Step, policy: Policy) -> list[tuple[int, float]]:
    """Returns lengths and GB under a policy, from short rows to beyond the GPU."""
    limit = planner.gpu.memory_bytes

    def estimate_bytes(length: int) -> int:
        return planner.estimate(dataclasses.replace(step, length=length), policy).total

    end = 256
    while (
        estimate_bytes(end) < 1.25 * limit and 4 * end * step.train.batch_size < 2**31
    ):
        end *= 2
    points = []
    # Memory is nearly linear in the length, so a few compiled points draw the line.
    for length in sorted({min(512, end), *(max(end >> n, 128) for n in (4, 2, 1, 0))}):
        plan = planner.plan(dataclasses.replace(step, length=length), policy)
        points.append((length, plan.total / 1e9))
        if plan.total > 1.25 * limit:
            break
    return points
