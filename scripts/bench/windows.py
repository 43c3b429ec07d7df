"""Measures what a window saves in attention, against attention to all keys before.

    python scripts/bench windows --output benchmarks/windows.json

On the CPU: seconds of attention to one row (`xla`, the implementation of a CPU) and of
a training step of a small Mistral, each with the window and without it, taking turns;
of every kind the median, also of the turns' ratios, which differ less than times where
other programs run. For a GPU: floating-point operations of the
matrix products in the program that the compiler schedules for an H200 (`xla`), and
those of the blocks that our kernels visit (`pallas`). That part needs the GPU compiler,
no GPU, and jax 0.11; `--compiler-python` names a Python that has them if this one has
not. `--markdown` prints the tables of docs/models.md, also of an existing file.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from qlora_jax.planning.compile import (
    ENVIRONMENT,
    XLA_FLAGS,
    find_compiler,
    how_to_get_the_compiler,
)
from scripts.bench.measuring import FOLDER, run_json

PASSES = ("forward", "backward")
"""The backward pass is that of the derivative: its program runs both."""
HEADS = {"cpu": (8, 2), "gpu": (32, 8)}
"""Heads of queries and of keys."""
WIDTH = 128

# --- Operations ---


def visible(length: int, window: int | None) -> int:
    """Counts the pairs of a query and a key that it sees."""
    seen = np.arange(1, length + 1)
    return int((seen if window is None else np.minimum(seen, window)).sum())


def xla_flops(length: int, window: int | None) -> dict[str, int]:
    """Counts the products of the program that XLA schedules for an H200.

    To be called in a process that `ENVIRONMENT` and `XLA_FLAGS` have set up.
    """
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding, PartitionSpec

    from qlora_jax.compiler import DeviceJit
    from qlora_jax.planning.gpus import CARDS
    from qlora_jax.planning.step import gpu_mesh
    from scripts.bench.program import count_work

    mesh = gpu_mesh(CARDS["h200"])
    device = NamedSharding(mesh, PartitionSpec())
    heads, groups = HEADS["gpu"]
    q, k, v = (
        jax.ShapeDtypeStruct((1, length, n, WIDTH), jnp.bfloat16, sharding=device)
        for n in (heads, groups, groups)
    )
    forward, gradient = functions(window)
    counts = []
    for function, arguments in ((forward, (q, k, v)), (gradient, (q, k, v, q))):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            compiled = DeviceJit(function).lower(*arguments).compile()
        counts.append(count_work(compiled.as_text() or "").product_flops)
    return {"forward": counts[0], "backward": counts[1] - counts[0]}


def pallas_flops(length: int, window: int | None) -> dict[str, int]:
    """Counts the products of the blocks that our kernels visit, as they compute it."""
    import jax.numpy as jnp

    from pallas_kernels.attention.backward import KEYS, QUERIES
    from pallas_kernels.attention.forward import TILES
    from pallas_kernels.attention.reach import BLOCK, causal_reach, reach

    heads = HEADS["gpu"][0]

    def flops(products: int, step: int, queries: bool) -> int:
        if window is None:
            limits = causal_reach(1, length, BLOCK, step, queries=queries)
        else:
            ids = jnp.ones((1, length), jnp.int32)
            limits = reach(ids, BLOCK, step, queries=queries, window=window)
        blocks = int((limits.last - limits.first + 1).sum())
        # A head of queries at a time, in the kernel that writes keys as well.
        return 2 * products * blocks * BLOCK * step * WIDTH * heads

    backward = flops(3, QUERIES[WIDTH].width, queries=True)
    backward += flops(4, KEYS[WIDTH].width, queries=False)
    return {
        "forward": flops(2, TILES[WIDTH].width, queries=True),
        "backward": backward,
    }


def count_operations(length: int, window: int) -> dict[str, Any]:
    """Counts for both implementations, in a process of its own."""
    import jax

    jax.config.update("jax_platforms", "cpu")
    counters = {"xla": xla_flops, "pallas": pallas_flops}
    rows = [
        {
            "implementation": name,
            "pass": kind,
            "full": without[kind],
            "window": within[kind],
            "ratio": within[kind] / without[kind],
        }
        for name, count in counters.items()
        for without, within in [(count(length, None), count(length, window))]
        for kind in PASSES
    ]
    return {"jax": jax.__version__, "rows": rows}


# --- Times ---


def functions(window: int | None) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Returns attention, and attention with its derivative."""
    import jax

    from pallas_kernels.attention.variant import Variant
    from pallas_kernels.attention.xla import blockwise_attention

    forward = functools.partial(blockwise_attention, variant=Variant(windows=(window,)))

    def gradient(q: Any, k: Any, v: Any, dout: Any) -> Any:
        out, derivative = jax.vjp(forward, q, k, v)
        return out, derivative(dout)

    return forward, gradient


def attention_calls(
    length: int, window: int | None, heads: tuple[int, int], width: int
) -> dict[str, Callable[[], Any]]:
    """Returns compiled calls of the passes on random numbers."""
    import jax

    rng = np.random.default_rng(0)
    q, k, v, dout = (
        rng.standard_normal((1, length, n, width), np.float32)
        for n in (heads[0], heads[1], heads[1], heads[0])
    )
    forward, gradient = (jax.jit(function) for function in functions(window))
    return {
        "attention, forward": lambda: forward(q, k, v),
        "attention, forward and backward": lambda: gradient(q, k, v, dout),
    }


def step_call(length: int, window: int | None) -> Callable[[], Any]:
    """Returns a compiled training step of a small Mistral, on random weights."""
    import jax

    from qlora_jax.lora.config import LoraConfig
    from qlora_jax.lora.init import init_adapters
    from qlora_jax.models.config import LlamaConfig
    from qlora_jax.models.layers import Compute
    from qlora_jax.models.llama import Llama
    from qlora_jax.planning.estimate import abstract_base
    from qlora_jax.training.config import TrainConfig
    from qlora_jax.training.optimizer import make_optimizer
    from qlora_jax.training.step import init_state, train_step
    from scripts.bench.cpu import random_base

    config = LlamaConfig.from_hf(
        {
            "model_type": "mistral",
            "vocab_size": 4096,
            "hidden_size": 512,
            "intermediate_size": 1536,
            "num_hidden_layers": 4,
            "num_attention_heads": 8,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "sliding_window": window,
        }
    )
    rng = np.random.default_rng(0)
    shapes = abstract_base(config, quantization="nf4_dq", dtype="float32")
    base = random_base(shapes, "float32", rng)
    lora = LoraConfig(r=16)
    model = Llama(config, Compute(dtype="float32", remat="full", lora=lora))
    optimizer = make_optimizer(TrainConfig(steps=1000), 1000)
    adapters = init_adapters(jax.random.key(0), base, lora)
    state = init_state(adapters, optimizer, jax.random.key(1))
    tokens = rng.integers(0, 4096, (1, 1, length)).astype(np.int32)
    batch = {"tokens": tokens, "labels": tokens}
    step = jax.jit(functools.partial(train_step, model=model, optimizer=optimizer))
    return lambda: step(state, base, batch)


def measure_times(length: int, window: int, repeats: int) -> list[dict[str, Any]]:
    """Measures each kind with and without the window, in turns."""
    import jax

    calls: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, size in (("full", None), ("window", window)):
        kinds = attention_calls(length, size, HEADS["cpu"], WIDTH)
        kinds["training step"] = step_call(length, size)
        for kind, call in kinds.items():
            jax.block_until_ready(call())  # compiled, and the pages are touched
            calls.setdefault(kind, {})[name] = call
    rows = []
    for kind, both in calls.items():
        seconds: dict[str, list[float]] = {name: [] for name in both}
        for _ in range(repeats):
            for name, call in both.items():
                started = time.perf_counter()
                jax.block_until_ready(call())
                seconds[name].append(time.perf_counter() - started)
        full, within = np.array(seconds["full"]), np.array(seconds["window"])
        rows.append(
            {
                "what": kind,
                "full_s": seconds["full"],
                "window_s": seconds["window"],
                "ratio": float(np.median(within / full)),
            }
        )
    return rows


# --- Tables ---


def markdown(result: dict[str, Any]) -> str:
    """Renders the tables of docs/models.md."""
    length, window = result["length"], result["window"]
    lines = [
        f"| row of {length:,} tokens, on a CPU | all keys | window {window} | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| {row['what']} | {np.median(row['full_s']):.2f} s | "
        f"{np.median(row['window_s']):.2f} s | {row['ratio']:.2f} |"
        for row in result["times"]
    ]
    lines += [
        "",
        f"| products for a GPU, {HEADS['gpu'][0]} heads of {WIDTH} | all keys | "
        f"window {window} | ratio |",
        "|---|---|---|---|",
    ]
    lines += [
        f"| attention `{row['implementation']}`, {row['pass']} | "
        f"{row['full'] / 1e9:.0f} GFLOP | {row['window'] / 1e9:.0f} GFLOP | "
        f"{row['ratio']:.2f} |"
        for row in result["operations"]["rows"]
    ]
    return "\n".join(lines) + "\n"


def parser() -> argparse.ArgumentParser:
    """Makes the parser of the command line."""
    p = argparse.ArgumentParser(
        prog="bench windows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("--length", type=int, default=4096, help="tokens of the row")
    p.add_argument("--window", type=int, default=512, help="keys that a query sees")
    p.add_argument("--repeats", type=int, default=7, help="turns of each kind")
    p.add_argument("--compiler-python", help="a Python with the GPU compiler")
    p.add_argument("--output", type=Path, help="JSON file to write")
    p.add_argument("--markdown", type=Path, help="print the tables of this JSON file")
    p.add_argument("--operations", action="store_true", help=argparse.SUPPRESS)
    return p


def main(argv: Sequence[str] | None = None) -> None:
    """Measures and counts, prints the tables, and writes JSON if asked to."""
    args = parser().parse_args(argv)
    if args.markdown:
        print(markdown(json.loads(args.markdown.read_text())), end="")
        return
    if args.operations:
        # Before jax is imported.
        os.environ |= {**ENVIRONMENT, "XLA_FLAGS": " ".join(XLA_FLAGS)}
        print(json.dumps(count_operations(args.length, args.window)))
        return
    python = find_compiler(args.compiler_python)
    if python is None:
        sys.exit(f"no GPU compiler here: {how_to_get_the_compiler()}")
    from qlora_jax.runs.environment import versions

    sizes = [f"--length={args.length}", f"--window={args.window}"]
    operations = run_json([python, str(FOLDER), "windows", "--operations", *sizes])
    seen = visible(args.length, args.window) / visible(args.length, None)
    result = {
        "length": args.length,
        "window": args.window,
        "visible_ratio": seen,
        "times": measure_times(args.length, args.window, args.repeats),
        "operations": operations,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "versions": versions(),
    }
    print(f"{seen:.3f} of all pairs of a query and a key are seen\n")
    print(markdown(result))
    if args.output:
        args.output.write_text(json.dumps(result, indent=1) + "\n")
