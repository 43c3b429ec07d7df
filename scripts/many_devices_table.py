"""Plans Llama-3.1 of 8B, 70B and 405B on 8, 64 and 512 H200 in nodes of eight.

    python scripts/many_devices_table.py --output benchmarks/many_devices.json

r=32 on the seven linear layers, a row of 8,192 tokens on every GPU, layers in a loop.
Each plan has the mesh that `plan --devices N` chooses and the fastest policy that fits
by the closed form with its error to spare; further rows divide the weights more than
they need to be. A row has the bytes of a GPU, what it sends in its node and to other
nodes, and the time of a step by the model of `qlora_jax.planning.traffic`: planned, not
measured. Rows that are named with --compile are compiled as well, which needs the GPU
compiler and a minute each. Started again it makes what is missing. `--markdown` writes
the table.

For comparison it counts what tensor parallelism would send: in each layer an all-reduce
of [tokens, hidden_size] after attention and after the MLP, the same in the backward
pass, and again where the forward pass is recomputed.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import jax

from convert.atomic import write_text
from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.errors import readable_bytes
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning.compile import find_compiler, how_to_get_the_compiler
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.ladder import policies
from qlora_jax.planning.mesh import choose_mesh
from qlora_jax.planning.plan import Plan, Planner
from qlora_jax.planning.step import Step
from qlora_jax.planning.traffic import Transfer
from qlora_jax.training.config import TrainConfig

GPU, NODE, LENGTH = CARDS["h200"], 8, 8192
# From the published config.json.
LLAMA_405B = {
    **MODELS["70b"].hf_config,
    "hidden_size": 16384,
    "intermediate_size": 53248,
    "num_hidden_layers": 126,
    "num_attention_heads": 128,
}
CONFIGS = {
    "8b": MODELS["8b"].hf_config,
    "70b": MODELS["70b"].hf_config,
    "405b": LLAMA_405B,
}
DEVICES = (8, 64, 512)
ROWS: dict[str, tuple[str, int, dict[str, int], str]] = {
    f"{model} on {devices}": (model, devices, {}, "auto")
    for model in CONFIGS
    for devices in DEVICES
}
for _model, _devices in (("8b", 8), ("8b", 64), ("405b", 8), ("405b", 64)):
    _name, _fixed = f"{_model} on {_devices}, fsdp {_devices}", {"fsdp": _devices}
    ROWS[_name] = (_model, _devices, _fixed, "full")
"""Name -> model, GPUs, fixed sizes of the mesh, `remat`."""


def step_of(model: str, devices: int) -> Step:
    """Returns the step of a row: one row of the batch on every GPU."""
    return Step(
        LlamaConfig.from_hf(CONFIGS[model]),
        Compute(lora=LoraConfig(r=32)),
        length=LENGTH,
        train=TrainConfig(steps=1, batch_size=devices),
    )


def make(model: str, devices: int, fixed: dict[str, int], remat: str) -> dict[str, Any]:
    """Plans a row in closed form."""
    step, among = step_of(model, devices), policies(remat=remat, scan_layers=True)
    nodes = devices // NODE
    fsdp: Any = fixed.get("fsdp", "auto")
    chosen = choose_mesh(step, GPU, among, nodes=nodes, per_node=NODE, fsdp=fsdp)
    planner = Planner(GPU, mesh=chosen.shape, per_node=NODE)
    plans = (planner.estimate(step, policy) for policy in among)
    plan = next(plan for plan in plans if plan.fits and not plan.uncertain)
    return {
        "model": model,
        "devices": devices,
        "mesh_reason": chosen.reason,
        "tensor_parallel_bytes": tensor_parallel_bytes(plan),
        "estimate": figures(plan),
    }


def compiled(row: dict[str, Any], python: str) -> dict[str, Any]:
    """Compiles the plan of a row."""
    planner = Planner(
        GPU,
        python=python,
        mesh=row["estimate"]["mesh"],
        per_node=NODE,
        say=lambda line: print(f"  {line}", flush=True),
    )
    (policy,) = (
        p for p in policies(scan_layers=True) if p.name == row["estimate"]["policy"]
    )
    return figures(planner.plan(step_of(row["model"], row["devices"]), policy))


def figures(plan: Plan) -> dict[str, Any]:
    """Returns what the table shows of a plan, and more of its report."""
    report = plan.report()
    names = ("method", "mesh", "gpus_per_node", "policy", "device_bytes", "collectives")
    return {name: report[name] for name in (*names, "modelled", "versions", "fits")}


def tensor_parallel_bytes(plan: Plan) -> float:
    """Returns what a GPU would send in a step with tensor parallelism in its node.

    The GPUs of a node compute the rows of all of them together.
    """
    repeats = plan.step.compute.remat in ("full", "save_attention", "offload")
    config = plan.step.config
    size = 2 * config.hidden_size * LENGTH * NODE
    runs = config.num_hidden_layers * (6 if repeats else 4)
    return Transfer("all-reduce", "forward", runs, runs * size, NODE).sent


def sent(plan: dict[str, Any], where: str) -> str:
    """Returns the bytes that a GPU sends in a step, as the table shows them."""
    total = sum(kind[where] for kind in plan["collectives"].values())
    return readable_bytes(total) if total else "0"


def markdown(rows: dict[str, dict[str, Any]]) -> str:
    """Renders the table."""
    lines = [
        "| model | GPUs | mesh | policy | bytes of a GPU | in its node | to others | "
        "step | tokens/s | not hidden |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows.values():
        best = row.get("compiled") or row["estimate"]
        mesh = ", ".join(f"{name} {size}" for name, size in best["mesh"].items())
        node, network = (sent(best, name) for name in ("node_bytes", "network_bytes"))
        total = readable_bytes(best["device_bytes"]["total"])
        modelled = best["modelled"]
        star = "" if best["method"] == "compiled" else " *"
        lines.append(
            f"| {row['model'].upper()} | {row['devices']} | {mesh} | "
            f"{best['policy']} | {total}{star} | {node} | "
            f"{network} | {modelled['seconds']:.2f} s | "
            f"{modelled['tokens_per_second']:,.0f} | {modelled['exposed_share']:.1%} |"
        )
    lines += ["", "\\* by the closed form; the others are compiled.", ""]
    lines += [
        "| model on 8 GPUs | sent by a GPU in a step | with tensor parallelism |",
        "|---|---|---|",
    ]
    for row in rows.values():
        best = row.get("compiled") or row["estimate"]
        if row["devices"] != NODE:
            continue
        mesh = ", ".join(f"{name} {size}" for name, size in best["mesh"].items())
        other = readable_bytes(row["tensor_parallel_bytes"])
        total = sent(best, "node_bytes")
        lines.append(f"| {row['model'].upper()}, {mesh} | {total} | {other} |")
    return "\n".join(lines) + "\n"


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--compiler-python", help="a Python with the GPU compiler")
    parser.add_argument(
        "--compile", nargs="*", default=[], choices=list(ROWS), help="rows to compile"
    )
    return parser.parse_args()


def main() -> None:
    """Makes the missing rows of the table, and prints it."""
    args = parse_arguments()
    jax.config.update("jax_platforms", "cpu")
    python = find_compiler(args.compiler_python) if args.compile else None
    if args.compile and python is None:
        sys.exit(f"no GPU compiler here: {how_to_get_the_compiler()}")
    rows: dict[str, dict[str, Any]] = {}
    if args.output.is_file():
        rows = json.loads(args.output.read_text())["rows"]
    for name, arguments in ROWS.items():
        rows.setdefault(name, {})
        if "estimate" not in rows[name]:
            rows[name] |= make(*arguments)
        if name in args.compile and "compiled" not in rows[name]:
            assert python is not None
            rows[name]["compiled"] = compiled(rows[name], python)
        done = {key: rows[key] for key in ROWS if rows.get(key)}
        write_text(args.output, json.dumps({"rows": done}, indent=1) + "\n")
        total = readable_bytes(rows[name]["estimate"]["device_bytes"]["total"])
        print(f"{name}: {rows[name]['estimate']['mesh']}, {total}", flush=True)
    text = markdown(rows)
    if args.markdown:
        write_text(args.markdown, text)
    print(text)


if __name__ == "__main__":
    main()
