"""Training speed and memory on a CPU: ours and the PyTorch peer in turn, as ratios.

    python scripts/bench_cpu.py compare --peer-python .venv-peer/bin/python
    python scripts/bench_cpu.py scaling
    python scripts/bench_cpu.py dora --peer-python .venv-peer/bin/python
    python scripts/bench_cpu.py table        # benchmarks/cpu.md from the results there

`compare` runs the same QLoRA step (same architecture, rank, batch, NF4 base with double
quantization, AdamW) in processes of their own, ours and transformers + PEFT +
bitsandbytes (scripts/peer_step.py) alternately, so that both see the same machine, and
prints tokens/s and the growth of resident memory as ratios. The peer runs with and
without gradient checkpointing; ours with the matching `remat` policy: "full"
recomputes each layer as gradient checkpointing does, "save_matmuls" keeps the results
of the matrix products. `dora` runs both with LoRA and with DoRA and shows what DoRA
costs either. `scaling` shows step time, compile time and planned memory as
layers and tokens grow.

Results are written as JSON (`--output`) with versions, machine and method. Times are
the best of the steps after the first, the peer's likewise; memory is peak resident
memory during the steps less that before the model was built.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
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
from qlora_jax.runs.resume import versions
from qlora_jax.training.step import TrainConfig, init_state, make_optimizer, train_step

# The peer's two ways to run, and ours that does the same amount of work.
PAIRS = {"1": "full", "0": "save_matmuls"}


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


def measure_ours(args: argparse.Namespace) -> dict[str, Any]:
    """Builds the model and takes `args.steps` steps; returns times and memory."""
    before = status_mib("VmRSS")
    dtype: Any = {"fp32": "float32", "bf16": "bfloat16"}[args.dtype]
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
        TrainConfig(steps=args.steps, learning_rate=1e-4, lr_scheduler="constant"),
        args.steps,
    )
    state = init_state(
        init_adapters(jax.random.key(0), base, lora), optimizer, jax.random.key(1)
    )
    tokens = rng.integers(0, args.vocab, (1, args.batch, args.seq)).astype(np.int32)
    batch = {"tokens": tokens, "labels": tokens}
    built = status_mib("VmRSS")
    jitted = jax.jit(
        partial(train_step, model=model, optimizer=optimizer), donate_argnums=0
    )
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


def child(command: list[str]) -> dict[str, Any]:
    """Runs a process that prints one JSON object last."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def ours(args: argparse.Namespace, **changes: Any) -> dict[str, Any]:
    """Runs `measure_ours` in a process of its own."""
    options = {**shape_options(args), **changes}
    command = [sys.executable, __file__, "ours"]
    for name, value in options.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    return child(command)


def peer(
    args: argparse.Namespace, dtype: str, checkpointing: str, **changes: Any
) -> dict[str, Any]:
    """Runs scripts/peer_step.py under the peer's Python."""
    command = [args.peer_python, str(Path(__file__).with_name("peer_step.py"))]
    for name, value in {**shape_options(args), **changes}.items():
        command += [f"--{name.replace('_', '-')}", str(value)]
    command += ["--dtype", dtype, "--gradient-checkpointing", checkpointing]
    return child(command)


def shape_options(args: argparse.Namespace) -> dict[str, Any]:
    """The options that both sides share."""
    names = ("hidden", "ffn", "layers", "heads", "kv_heads", "vocab", "rank")
    return {n: getattr(args, n) for n in (*names, "batch", "seq", "steps", "seed")}


def compare(args: argparse.Namespace) -> dict[str, Any]:
    """Runs both sides alternately and prints the ratios."""
    rows = []
    for dtype in ("fp32", "bf16"):
        for checkpointing, remat in PAIRS.items():
            us, them = [], []
            for _ in range(args.repeats):
                us.append(ours(args, dtype=dtype, remat=remat))
                them.append(peer(args, dtype, checkpointing))
            our, their = (
                min(runs, key=lambda run: run["step_min_s"]) for runs in (us, them)
            )
            our_growth = max(run["growth_mib"] for run in us)
            their_growth = max(run["growth_from_before_build_mib"] for run in them)
            rows.append(
                {
                    "dtype": dtype,
                    "peer_gradient_checkpointing": checkpointing == "1",
                    "remat": remat,
                    "tokens_per_s": our["tokens_per_s_best"],
                    "peer_tokens_per_s": their["tokens_per_s_best"],
                    "speed_ratio": our["tokens_per_s_best"]
                    / their["tokens_per_s_best"],
                    "growth_mib": our_growth,
                    "peer_growth_mib": their_growth,
                    "memory_ratio": our_growth / their_growth,
                    "compile_s": our["compile_s"],
                    "runs": us,
                    "peer_runs": them,
                }
            )
            print(f"{dtype} {remat}: done", file=sys.stderr, flush=True)
    shown = rich.table.Table(title="QLoRA step on a CPU, ours against the peer")
    for head in ("compute", "ours / peer", "tokens/s", "peer", "ratio", "MiB", "peer"):
        shown.add_column(head)
    shown.add_column("ratio")
    for row in rows:
        mode = "ckpt" if row["peer_gradient_checkpointing"] else "no ckpt"
        shown.add_row(
            row["dtype"],
            f"{row['remat']} / {mode}",
            f"{row['tokens_per_s']:,.0f}",
            f"{row['peer_tokens_per_s']:,.0f}",
            f"{row['speed_ratio']:.2f}",
            f"{row['growth_mib']:,.0f}",
            f"{row['peer_growth_mib']:,.0f}",
            f"{row['memory_ratio']:.2f}",
        )
    rich.console.Console().print(shown)
    return {"rows": rows}


def dora(args: argparse.Namespace) -> dict[str, Any]:
    """Shows the step of DoRA over that of LoRA, ours and the peer's."""
    rows = []
    for dtype in ("fp32", "bf16"):
        for checkpointing, remat in PAIRS.items():
            best: dict[str, list[float]] = {"ours": [], "peer": []}
            runs = []
            for kind in (0, 1):
                us, them = [], []
                for _ in range(args.repeats):
                    us.append(ours(args, dtype=dtype, remat=remat, dora=kind))
                    them.append(peer(args, dtype, checkpointing, dora=kind))
                best["ours"].append(min(run["step_min_s"] for run in us))
                best["peer"].append(min(run["step_min_s"] for run in them))
                runs.append({"dora": bool(kind), "runs": us, "peer_runs": them})
            row = {"dtype": dtype, "remat": remat, "runs": runs}
            for side, (lora_s, dora_s) in best.items():
                row[side] = {
                    "lora_s": lora_s,
                    "dora_s": dora_s,
                    "ratio": dora_s / lora_s,
                }
            rows.append(row)
            print(f"{dtype} {remat}: done", file=sys.stderr, flush=True)
    shown = rich.table.Table(title="Step of DoRA / step of LoRA, on a CPU")
    heads = ("compute", "remat", "LoRA s", "DoRA s", "ratio", "peer LoRA s", "DoRA s")
    for head in (*heads, "peer ratio"):
        shown.add_column(head)
    for row in rows:
        cells = [row["dtype"], row["remat"]]
        for side in ("ours", "peer"):
            cells += [f"{row[side][k]:.3f}" for k in ("lora_s", "dora_s")]
            cells.append(f"{row[side]['ratio']:.2f}")
        shown.add_row(*cells)
    rich.console.Console().print(shown)
    return {"rows": rows}


def scaling(args: argparse.Namespace) -> dict[str, Any]:
    """Shows how time and memory grow with layers and with tokens."""
    rows = []
    for layers, seq in ((4, 256), (16, 256), (64, 256), (8, 512), (8, 1024), (8, 2048)):
        run = ours(
            args, layers=layers, seq=seq, batch=1, dtype="fp32", remat="full", steps=3
        )
        rows.append({"layers": layers, "tokens": seq, **run})
        print(f"{layers} layers, {seq} tokens: done", file=sys.stderr, flush=True)
    shown = rich.table.Table(title="Growth with layers and tokens (fp32, batch 1)")
    for head in ("layers", "tokens", "step s", "compile s", "planned temporary MiB"):
        shown.add_column(head)
    for row in rows:
        shown.add_row(
            str(row["layers"]),
            str(row["tokens"]),
            f"{row['step_min_s']:.3f}",
            f"{row['compile_s']:.1f}",
            f"{row['planned_temp_mib']:,.0f}",
        )
    rich.console.Console().print(shown)
    return {"rows": rows}


def table(folder: Path) -> str:
    """Renders the committed results as Markdown."""
    compared = json.loads((folder / "cpu_compare.json").read_text())
    grown = json.loads((folder / "cpu_scaling.json").read_text())
    doras = json.loads((folder / "cpu_dora.json").read_text())
    where, shape = compared["machine"], compared["options"]
    peer_versions = compared["rows"][0]["peer_runs"][0]["versions"]
    lines = [
        "# Training step on a CPU",
        "",
        "Made by `scripts/bench_cpu.py`; do not edit. Machine: "
        f"{where['cpu']}, {where['cores']} cores, {', '.join(where['instructions'])}. "
        f"Ours: Python {where['python']}, jax {where['jax']}, flax {where['flax']}. "
        "Peer: "
        + ", ".join(f"{name} {version}" for name, version in peer_versions.items())
        + ".",
        "",
        f"Hidden {shape['hidden']}, {shape['layers']} layers, MLP {shape['ffn']}, "
        f"{shape['heads']}/{shape['kv_heads']} heads, vocabulary {shape['vocab']}, "
        f"r={shape['rank']} on 7 linears, batch {shape['batch']} x {shape['seq']} "
        "tokens, NF4 base with double quantization. Best step of two alternating runs "
        f"of {shape['steps']}; memory is peak resident memory during the steps less "
        "that before the model was built. Ratio of speed: ours / peer, higher is "
        "better; of memory: ours / peer, lower is better.",
        "",
        "| compute | ours (`remat`) | peer | tokens/s | peer | ratio | MiB | peer "
        "| ratio |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in compared["rows"]:
        mode = "checkpointing" if row["peer_gradient_checkpointing"] else "none"
        lines.append(
            f"| {row['dtype']} | {row['remat']} | {mode} "
            f"| {row['tokens_per_s']:,.0f} | {row['peer_tokens_per_s']:,.0f} "
            f"| {row['speed_ratio']:.2f} | {row['growth_mib']:,.0f} "
            f"| {row['peer_growth_mib']:,.0f} | {row['memory_ratio']:.2f} |"
        )
    lines += [
        "",
        "Growth with layers and tokens (fp32, batch 1, `remat` full, otherwise as "
        "above):",
        "",
        "| layers | tokens | step (s) | compile (s) | planned temporaries (MiB) |",
        "|---|---|---|---|---|",
    ]
    for row in grown["rows"]:
        lines.append(
            f"| {row['layers']} | {row['tokens']} | {row['step_min_s']:.3f} "
            f"| {row['compile_s']:.1f} | {row['planned_temp_mib']:,.0f} |"
        )
    lines += [
        "",
        "DoRA: its step over that of LoRA, same shape and setup, one run each in turn "
        f"(Python {doras['machine']['python']}, jax {doras['machine']['jax']}):",
        "",
        "| compute | `remat` | LoRA (s) | DoRA (s) | ratio | peer LoRA (s) "
        "| peer DoRA (s) | ratio |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in doras["rows"]:
        us, them = row["ours"], row["peer"]
        lines.append(
            f"| {row['dtype']} | {row['remat']} | {us['lora_s']:.2f} "
            f"| {us['dora_s']:.2f} | {us['ratio']:.2f} | {them['lora_s']:.2f} "
            f"| {them['dora_s']:.2f} | {them['ratio']:.2f} |"
        )
    return "\n".join(lines) + "\n"


def machine() -> dict[str, Any]:
    """What the numbers depend on."""
    cpu = platform.processor() or platform.machine()
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            cpu = line.partition(":")[2].strip()
            break
    flags: Iterator[str] = iter(Path("/proc/cpuinfo").read_text().split())
    wanted = {"avx512f", "avx512_bf16", "amx_bf16"}
    return {
        "cpu": cpu,
        "instructions": sorted(wanted & set(flags)),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        **versions(),
    }


def parser() -> argparse.ArgumentParser:
    """Builds the command line."""
    p = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
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
    p.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32")
    p.add_argument("--remat", choices=("none", "full", "save_matmuls"), default="full")
    p.add_argument("--peer-python", default=".venv-peer/bin/python")
    p.add_argument("--output", type=Path, help="JSON file to write")
    return p


def main() -> None:
    """Runs one command."""
    args = parser().parse_args()
    jax.config.update("jax_platforms", "cpu")
    if args.command == "ours":
        print(json.dumps(measure_ours(args)))
        return
    if args.command == "table":
        folder = Path(__file__).resolve().parents[1] / "benchmarks"
        (folder / "cpu.md").write_text(table(folder))
        return
    at_start = machine()
    result = {"compare": compare, "dora": dora, "scaling": scaling}[args.command](args)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(
            {"machine": at_start, "options": shape_options(args), **result}, indent=1
        )
        args.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
