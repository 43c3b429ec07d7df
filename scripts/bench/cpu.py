"""Measures training speed and memory on a CPU: ours and the peer's, as ratios.

    python scripts/bench cpu compare --peer-python .venv-peer/bin/python
    python scripts/bench cpu scaling
    python scripts/bench cpu dora --peer-python .venv-peer/bin/python
    python scripts/bench cpu table        # benchmarks/cpu.md from the results there

`compare` runs the same QLoRA step (same architecture, rank, batch, NF4 base with double
quantization, AdamW) in separate processes, ours and transformers + PEFT + bitsandbytes
(`scripts/peer cpu`) alternately, so that both see the same machine, and prints tokens/s
and the growth of resident memory as ratios. The peer runs with and without gradient
checkpointing; ours with the matching `remat` policy: "full" recomputes each layer as
gradient checkpointing does, "save_matmuls" keeps the results of the matrix products.
`dora` runs both with LoRA and with DoRA and compares their steps. `scaling` shows step
time, compile time and planned memory as layers and tokens grow. `ours` measures our
step and prints one JSON object.

Results are written as JSON (`--output`) with versions, machine and method. Times are
the best of the steps after the first, the peer's likewise; memory is peak resident
memory during the steps less that before the model was built.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import rich.console
import rich.table

from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.init import init_adapters
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama
from qlora_jax.nf4 import NF4Tensor, quantize
from qlora_jax.planning.estimate import abstract_base
from qlora_jax.planning.gpus import give_back_freed_memory
from qlora_jax.runs.environment import versions
from qlora_jax.training.config import TrainConfig
from qlora_jax.training.optimizer import make_optimizer
from qlora_jax.training.step import init_state, train_step
from scripts.bench.measuring import run_bench, run_json

ROOT = Path(__file__).resolve().parents[2]
# Gradient checkpointing of the peer -> our `remat` that does the same amount of work.
PAIRS = {"1": "full", "0": "save_matmuls"}
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}

# --- Our step ---


def status_mib(field: str) -> float:
    """Reads a size of this process from the kernel (MiB)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) / 1024
    raise KeyError(field)


def random_base(shapes: Any, dtype: str, rng: np.random.Generator) -> Any:
    """Makes a base of random weights, its linear layers in NF4 with double quant."""

    def tree(node: dict[str, Any], name: str) -> dict[str, Any]:
        out: dict[str, Any] = {}
        for key, leaf in node.items():
            if isinstance(leaf, dict):
                out[key] = tree(leaf, key)
            elif isinstance(leaf, NF4Tensor):
                layers = [
                    quantize(
                        rng.standard_normal(leaf.shape, np.float32) * np.float32(0.02),
                        double_quant=True,
                    )
                    for _ in range(leaf.codes.shape[0])
                ]
                out[key] = jax.tree.map(lambda *a: jnp.asarray(np.stack(a)), *layers)
            elif "norm" in name:
                out[key] = jnp.ones(leaf.shape, dtype)
            else:
                values = rng.standard_normal(leaf.shape, np.float32)
                out[key] = jnp.asarray(values * np.float32(0.02)).astype(dtype)
        return out

    return tree(shapes, "")


def build(args: argparse.Namespace) -> tuple[Any, Any, Any, Any]:
    """Builds the model; returns the jitted step, its state, the base, and a batch."""
    dtype: Any = DTYPES[args.dtype]
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.hidden,
        intermediate_size=args.ffn,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        num_key_value_heads=args.kv_heads,
        head_dim=args.hidden // args.heads,
    )
    rng = np.random.default_rng(args.seed)
    shapes = abstract_base(config, quantization="nf4_dq", dtype=dtype)
    base = random_base(shapes, dtype, rng)
    lora = LoraConfig(r=args.rank, lora_alpha=args.rank, use_dora=bool(args.dora))
    model = Llama(config, Compute(dtype=dtype, remat=args.remat, lora=lora))
    optimizer = make_optimizer(
        TrainConfig(
            steps=args.steps,
            learning_rate=1e-4,
            lr_scheduler="constant",
            warmup_steps=0,
        ),
        args.steps,
    )
    state = init_state(
        init_adapters(jax.random.key(0), base, lora), optimizer, jax.random.key(1)
    )
    tokens = rng.integers(0, args.vocab, (1, args.batch, args.seq)).astype(np.int32)
    step = jax.jit(
        partial(train_step, model=model, optimizer=optimizer), donate_argnums=0
    )
    return step, state, base, {"tokens": tokens, "labels": tokens}


def measure_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the model and takes `args.steps` steps; returns times and memory."""
    before = status_mib("VmRSS")
    jitted, state, base, batch = build(args)
    built = status_mib("VmRSS")
    started = time.perf_counter()
    step = jitted.lower(state, base, batch).compile()
    compile_seconds = time.perf_counter() - started
    give_back_freed_memory()  # as a run does
    # The peak is that of the steps: the kernel's mark is set back after building.
    Path("/proc/self/clear_refs").write_text("5")
    seconds, losses = [], []
    cpu = time.process_time()
    for _ in range(args.steps + 1):
        started = time.perf_counter()
        state, metrics = step(state, base, batch)
        jax.block_until_ready(state)
        seconds.append(time.perf_counter() - started)
        losses.append(float(metrics["loss"]))
    cpu = (time.process_time() - cpu) / (args.steps + 1)
    plan: Any = step.memory_analysis()
    peak = status_mib("VmHWM")
    return {
        "step_s": [round(s, 4) for s in seconds[1:]],
        "step_min_s": round(min(seconds[1:]), 4),
        "tokens_per_s_best": args.batch * args.seq / min(seconds[1:]),
        "cpu_s_per_step": round(cpu, 3),
        "compile_s": round(compile_seconds, 2),
        "rss_before_build_mib": before,
        "rss_built_mib": built,
        "rss_peak_mib": peak,
        "growth_mib": peak - before,
        "planned_temp_mib": plan.temp_size_in_bytes / 2**20,
        "planned_argument_mib": plan.argument_size_in_bytes / 2**20,
        "losses": losses,
        "versions": versions(),
    }


# --- Both sides, in separate processes ---


def shape_options(args: argparse.Namespace) -> dict[str, Any]:
    """Returns the options that both sides share."""
    names = ("hidden", "ffn", "layers", "heads", "kv_heads", "vocab", "rank")
    return {n: getattr(args, n) for n in (*names, "batch", "seq", "steps", "seed")}


def as_options(values: dict[str, Any]) -> list[str]:
    """Spells values as options of a command line."""
    return [
        word
        for name, value in values.items()
        for word in (f"--{name.replace('_', '-')}", str(value))
    ]


def run_ours(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Runs `bench cpu ours` with the shape of `args`, some of it changed."""
    return run_bench("cpu", "ours", *as_options({**shape_options(args), **changes}))


def run_peer(
    args: argparse.Namespace, dtype: str, checkpointing: str, **changes: Any
) -> dict[str, Any]:
    """Runs `scripts/peer cpu` under the peer's Python."""
    options = {**shape_options(args), **changes, "dtype": dtype}
    options["gradient_checkpointing"] = checkpointing
    script = str(ROOT / "scripts" / "peer")
    return run_json([args.peer_python, script, "cpu", *as_options(options)])


def show(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table."""
    table = rich.table.Table(title=title)
    for head in heads:
        table.add_column(head)
    for row in rows:
        table.add_row(*row)
    rich.console.Console().print(table)


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs both sides alternately and prints the ratios."""
    rows, cells = [], []
    for dtype in DTYPES:
        for checkpointing, remat in PAIRS.items():
            ours, peers = [], []
            for _ in range(args.repeats):
                ours.append(run_ours(args, dtype=dtype, remat=remat))
                peers.append(run_peer(args, dtype, checkpointing))
            speed, peer_speed = (
                min(runs, key=lambda run: run["step_min_s"])["tokens_per_s_best"]
                for runs in (ours, peers)
            )
            best = min(ours, key=lambda run: run["step_min_s"])
            growth = max(run["growth_mib"] for run in ours)
            peer_growth = max(run["growth_from_before_build_mib"] for run in peers)
            row = {
                "dtype": dtype,
                "peer_gradient_checkpointing": checkpointing == "1",
                "remat": remat,
                "tokens_per_s": speed,
                "peer_tokens_per_s": peer_speed,
                "speed_ratio": speed / peer_speed,
                "growth_mib": growth,
                "peer_growth_mib": peer_growth,
                "memory_ratio": growth / peer_growth,
                "compile_s": best["compile_s"],
                "runs": ours,
                "peer_runs": peers,
            }
            rows.append(row)
            cells.append(
                [dtype, f"{remat} / {'ckpt' if checkpointing == '1' else 'no ckpt'}"]
                + [f"{speed:,.0f}", f"{peer_speed:,.0f}", f"{row['speed_ratio']:.2f}"]
                + [f"{growth:,.0f}", f"{peer_growth:,.0f}"]
                + [f"{row['memory_ratio']:.2f}"]
            )
            print(f"{dtype} {remat}: done", file=sys.stderr, flush=True)
    heads = ("compute", "ours / peer", "tokens/s", "peer", "ratio", "MiB", "peer")
    show("QLoRA step on a CPU, ours against the peer", (*heads, "ratio"), cells)
    return {"rows": rows}


def dora(args: argparse.Namespace) -> dict[str, Any]:
    """Compares the step of DoRA with that of LoRA, ours and the peer's."""
    rows, cells = [], []
    for dtype in DTYPES:
        for checkpointing, remat in PAIRS.items():
            best: dict[str, list[float]] = {"ours": [], "peer": []}
            runs = []
            for use_dora in (0, 1):
                ours, peers = [], []
                for _ in range(args.repeats):
                    ours.append(run_ours(args, dtype=dtype, remat=remat, dora=use_dora))
                    peers.append(run_peer(args, dtype, checkpointing, dora=use_dora))
                best["ours"].append(min(run["step_min_s"] for run in ours))
                best["peer"].append(min(run["step_min_s"] for run in peers))
                runs.append({"dora": bool(use_dora), "runs": ours, "peer_runs": peers})
            row = {"dtype": dtype, "remat": remat, "runs": runs}
            cells.append([dtype, remat])
            for side, (lora_s, dora_s) in best.items():
                ratio = dora_s / lora_s
                row[side] = {"lora_s": lora_s, "dora_s": dora_s, "ratio": ratio}
                cells[-1] += [f"{lora_s:.3f}", f"{dora_s:.3f}", f"{ratio:.2f}"]
            rows.append(row)
            print(f"{dtype} {remat}: done", file=sys.stderr, flush=True)
    heads = ("compute", "remat", "LoRA s", "DoRA s", "ratio", "peer LoRA s", "DoRA s")
    show("Step of DoRA / step of LoRA, on a CPU", (*heads, "peer ratio"), cells)
    return {"rows": rows}


def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Shows how time and memory grow with layers and with tokens."""
    rows, cells = [], []
    fixed = {"batch": 1, "dtype": "fp32", "remat": "full", "steps": 3}
    for layers, seq in ((4, 256), (16, 256), (64, 256), (8, 512), (8, 1024), (8, 2048)):
        run = run_ours(args, layers=layers, seq=seq, **fixed)
        rows.append({"layers": layers, "tokens": seq, **run})
        cells.append(
            [str(layers), str(seq), f"{run['step_min_s']:.3f}"]
            + [f"{run['compile_s']:.1f}", f"{run['planned_temp_mib']:,.0f}"]
        )
        print(f"{layers} layers, {seq} tokens: done", file=sys.stderr, flush=True)
    heads = ("layers", "tokens", "step s", "compile s", "planned temporary MiB")
    show("Growth with layers and tokens (fp32, batch 1)", heads, cells)
    return {"rows": rows}


# --- The page ---


def table(folder: Path) -> str:
    """Renders the committed results as Markdown."""
    compared, scaled, doras = (
        json.loads((folder / f"cpu_{name}.json").read_text())
        for name in ("compare", "scaling", "dora")
    )
    sections = (_comparison(compared), _growth(scaled), _dora_costs(doras))
    return "\n\n".join(sections) + "\n"


def _markdown(heads: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    lines = [f"| {' | '.join(heads)} |", "|---" * len(heads) + "|"]
    lines += [f"| {' | '.join(map(str, row))} |" for row in rows]
    return "\n".join(lines)


def _comparison(result: dict[str, Any]) -> str:
    machine, shape = result["machine"], result["options"]
    peer_versions = result["rows"][0]["peer_runs"][0]["versions"]
    text = (
        "# Training step on a CPU\n\n"
        "Made by `scripts/bench cpu`; do not edit. Machine: "
        f"{machine['cpu']}, {machine['cores']} cores, "
        f"{', '.join(machine['instructions'])}. Ours: Python {machine['python']}, jax "
        f"{machine['jax']}, flax {machine['flax']}. Peer: "
        + ", ".join(f"{name} {version}" for name, version in peer_versions.items())
        + ".\n\n"
        f"Hidden {shape['hidden']}, {shape['layers']} layers, MLP {shape['ffn']}, "
        f"{shape['heads']}/{shape['kv_heads']} heads, vocabulary {shape['vocab']}, "
        f"r={shape['rank']} on 7 linears, batch {shape['batch']} x {shape['seq']} "
        "tokens, NF4 base with double quantization. Best step of two alternating runs "
        f"of {shape['steps']}; memory is peak resident memory during the steps less "
        "that before the model was built. Ratio of speed: ours / peer, higher is "
        "better; of memory: ours / peer, lower is better.\n\n"
    )
    heads = ("compute", "ours (`remat`)", "peer", "tokens/s", "peer", "ratio", "MiB")
    rows = [
        [row["dtype"], row["remat"]]
        + ["checkpointing" if row["peer_gradient_checkpointing"] else "none"]
        + [f"{row[key]:,.0f}" for key in ("tokens_per_s", "peer_tokens_per_s")]
        + [f"{row['speed_ratio']:.2f}"]
        + [f"{row[key]:,.0f}" for key in ("growth_mib", "peer_growth_mib")]
        + [f"{row['memory_ratio']:.2f}"]
        for row in result["rows"]
    ]
    return text + _markdown((*heads, "peer", "ratio"), rows)


def _growth(result: dict[str, Any]) -> str:
    heads = ("layers", "tokens", "step (s)", "compile (s)")
    rows = [
        [row["layers"], row["tokens"], f"{row['step_min_s']:.3f}"]
        + [f"{row['compile_s']:.1f}", f"{row['planned_temp_mib']:,.0f}"]
        for row in result["rows"]
    ]
    return (
        "Growth with layers and tokens (fp32, batch 1, `remat` full, otherwise as "
        "above):\n\n" + _markdown((*heads, "planned temporaries (MiB)"), rows)
    )


def _dora_costs(result: dict[str, Any]) -> str:
    machine = result["machine"]
    heads = ("compute", "`remat`", "LoRA (s)", "DoRA (s)", "ratio", "peer LoRA (s)")
    rows = [
        [row["dtype"], row["remat"]]
        + [
            f"{row[side][key]:.2f}"
            for side in ("ours", "peer")
            for key in ("lora_s", "dora_s", "ratio")
        ]
        for row in result["rows"]
    ]
    return (
        "DoRA: its step over that of LoRA, same shape and setup, one run each in turn "
        f"(Python {machine['python']}, jax {machine['jax']}):\n\n"
        + _markdown((*heads, "peer DoRA (s)", "ratio"), rows)
    )


# --- The command line ---


def machine() -> dict[str, Any]:
    """Describes what the numbers depend on."""
    cpuinfo = Path("/proc/cpuinfo").read_text()
    cpu = platform.processor() or platform.machine()
    for line in cpuinfo.splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    extensions = {"avx512f", "avx512_bf16", "amx_bf16"}
    return {
        "cpu": cpu,
        "instructions": sorted(extensions & set(cpuinfo.split())),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        **versions(),
    }


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(
        prog="bench cpu",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("command", choices=("compare", "dora", "scaling", "table", "ours"))
    p.add_argument("--hidden", type=int, default=512, help="width")
    p.add_argument("--ffn", type=int, default=1408, help="MLP width")
    p.add_argument("--layers", type=int, default=8)
    p.add_argument("--heads", type=int, default=8)
    p.add_argument("--kv-heads", type=int, default=4)
    p.add_argument("--vocab", type=int, default=32000)
    p.add_argument("--rank", type=int, default=16, help="LoRA rank")
    p.add_argument("--dora", type=int, choices=(0, 1), default=0, help="0 or 1")
    p.add_argument("--batch", type=int, default=4, help="rows")
    p.add_argument("--seq", type=int, default=512, help="tokens a row")
    p.add_argument("--steps", type=int, default=5, help="timed steps")
    p.add_argument("--repeats", type=int, default=2, help="alternations")
    p.add_argument("--seed", type=int, default=0)
    p.add_argument("--dtype", choices=tuple(DTYPES), default="fp32")
    p.add_argument("--remat", choices=("none", "full", "save_matmuls"), default="full")
    p.add_argument("--peer-python", default=".venv-peer/bin/python")
    p.add_argument("--output", type=Path, help="JSON file to write")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Runs one command."""
    args = parser().parse_args(argv)
    jax.config.update("jax_platforms", "cpu")
    if args.command == "ours":
        print(json.dumps(measure_ours(args)))
        return
    if args.command == "table":
        folder = ROOT / "benchmarks"
        (folder / "cpu.md").write_text(table(folder))
        return
    at_start = machine()
    result = {"compare": compare, "dora": dora, "scaling": scaling}[args.command](args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": at_start, "options": shape_options(args), **result}
        args.output.write_text(json.dumps(record, indent=1) + "\n")
