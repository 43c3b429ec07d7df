"""Finds the longest row for each size of card; compares with Unsloth's table.

    python scripts/memory_table.py --output benchmarks/memory_8b.json

Llama-3.1-8B, r=32 on the seven linear layers, one row a step, every position real; then
Llama-3.1-70B, 8B without offloading, and models of other families of about that size.
Each row is a search over steps compiled for an H200 with that much memory
(`qlora_jax.planning.plan`): planned by the compiler, not measured; the closed form's
bytes of the same step are stored beside. It needs the GPU compiler (`make compile`
installs it), no GPU, and some minutes a row; started again it continues after the last
finished row. `--markdown` writes the tables, also those of an existing file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
import time
from pathlib import Path
from typing import Any

import jax

from convert.atomic import write_text
from pallas_kernels.nf4.shapes import MODELS
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.layers import Compute
from qlora_jax.planning.compile import find_compiler, how_to_get_the_compiler
from qlora_jax.planning.gpus import CARDS
from qlora_jax.planning.ladder import LADDER, Policy, policies
from qlora_jax.planning.plan import DoesNotFit, Planner
from qlora_jax.planning.step import Step
from qlora_jax.training.config import TrainConfig

UNSLOTH = "https://unsloth.ai/blog/llama3-3 (10 December 2024)"
# GpuSpec memory in GB -> longest row that Unsloth publishes, r=32, seven linear layers,
# batch 1, rows padded to the length. Every column of its table is a straight line: the
# figures are extrapolated.
PUBLISHED = {
    "8b": {8: 2972, 12: 21848, 16: 40724, 24: 78475}
    | {40: 153977, 48: 191728, 80: 342733},
    "70b": {48: 12106, 80: 89389},
}
# Published config.json of models of other families, by their names on the Hub: what
# decides shapes and programs.
FAMILIES: dict[str, dict[str, Any]] = {
    "Qwen3-8B": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "max_position_embeddings": 40960,
        "rope_theta": 1e6,
    },
    "Qwen2.5-7B": {
        "model_type": "qwen2",
        "vocab_size": 152064,
        "hidden_size": 3584,
        "intermediate_size": 18944,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "max_position_embeddings": 131072,
        "rope_theta": 1e6,
    },
    "Mistral-7B-v0.3": {
        "model_type": "mistral",
        "vocab_size": 32768,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": None,
        "max_position_embeddings": 32768,
        "rope_theta": 1e6,
    },
    "gemma-2-9b": {
        "model_type": "gemma2",
        "vocab_size": 256000,
        "hidden_size": 3584,
        "intermediate_size": 14336,
        "num_hidden_layers": 42,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 256,
        "query_pre_attn_scalar": 256,
        "sliding_window": 4096,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "max_position_embeddings": 8192,
    },
}
LENGTHS = [
    *(("8b", gigabytes, "any") for gigabytes in PUBLISHED["8b"]),
    *(("70b", gigabytes, "any") for gigabytes in PUBLISHED["70b"]),
    ("8b", 141, "no offload"),
    *((model, gigabytes, "any") for model in FAMILIES for gigabytes in PUBLISHED["8b"]),
]
"""Model, memory of the card in GB, and which policies."""
SPEED = tuple(policy for policy in LADDER if policy.remat != "offload")
"""Policies without offloading: what they cost at 16 rows of 2,048 tokens."""


def step_of(model: str, length: int = 2048, batch_size: int = 1) -> Step:
    """Returns the step of the table."""
    return Step(
        LlamaConfig.from_hf(FAMILIES.get(model) or MODELS[model].hf_config),
        Compute(lora=LoraConfig(r=32)),
        length=length,
        train=TrainConfig(steps=1, batch_size=batch_size),
    )


def allowed(which: str) -> list[Policy]:
    """Returns the policies that a row may use."""
    if which == "any":
        return policies()
    return [*policies(remat="full"), *policies(remat="full", attention="xla")]


def longest(model: str, gigabytes: int, which: str, python: str | None) -> dict:
    """Finds the longest row that fits a card of so much memory.

    Where none does, that is the shortest one, with `fits` false.
    """
    card = dataclasses.replace(
        CARDS["h200"], name=f"{gigabytes} GB", memory_bytes=gigabytes * 10**9
    )
    planner = Planner(card, python=python, say=lambda line: print(f"  {line}"))
    try:
        plan = planner.longest(step_of(model), allowed(which))
    except DoesNotFit:
        plans = [planner.plan(step_of(model, 128), p) for p in allowed(which)[-3:]]
        plan = min(plans, key=lambda plan: plan.total)
    published = PUBLISHED.get(model, {}) if which == "any" else {}
    return {
        "model": model,
        "card_gb": gigabytes,
        "policies": which,
        "published": published.get(gigabytes),
        "estimated_bytes": planner.estimate(plan.step, plan.policy).total,
        **plan.report(),
    }


def at_speed(policy: Policy, python: str | None) -> dict:
    """Plans 16 rows of 2,048 tokens on an H200 under a policy."""
    planner = Planner(CARDS["h200"], python=python, say=lambda x: print(f"  {x}"))
    plan = planner.plan(step_of("8b", 2048, 16), policy)
    return {"model": "8b", "policies": policy.name, **plan.report()}


def markdown(content: dict[str, Any]) -> str:
    """Renders the tables, as the README has them."""
    rows = content["rows"].values()
    how = {"compiled": "compiled", "estimate": "estimated by formula"}
    methods = " and ".join(sorted({how[row["method"]] for row in rows}))
    lines = [
        f"Longest row of one step, r=32 on the seven linear layers, one row a step; "
        f"ours planned ({methods}; jax "
        f"{', '.join(sorted({row['versions']['jax'] for row in rows}))}), Unsloth's as "
        f"published: {UNSLOTH}.",
        "",
        "| model | card | Unsloth | here | ratio | device bytes | host memory |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if "card_gb" not in row or row["model"] in FAMILIES:
            continue
        theirs = row["published"]
        name = MODELS[row["model"]].name
        if row["policies"] != "any":
            name += f", {row['policies']}"
        lines.append(
            f"| {name} | {row['card_gb']} GB | "
            + (f"{theirs:,} | " if theirs else "| ")
            + f"{row['max_length']:,} | "
            + (f"{row['max_length'] / theirs:.1f} x | " if theirs else "| ")
            + f"{row['device_bytes']['total'] / 1e9:.2f} GB | "
            f"{row['host_bytes'] / 1e9:.1f} GB |"
        )
    lines += families(content["rows"])
    speed = [row for row in rows if "card_gb" not in row]
    if speed:
        lines += [
            "",
            "| 8B, 16 x 2,048 tokens | device bytes | GFLOP a token |",
            "|---|---|---|",
        ]
        lines += [
            f"| {row['policy']} | {row['device_bytes']['total'] / 1e9:.1f} GB | "
            f"{row['flops_per_token'] / 1e9:.1f} |"
            for row in speed
        ]
    return "\n".join(lines) + "\n"


def families(rows: dict[str, dict]) -> list[str]:
    """Renders the longest rows of models of other families, with Llama beside.

    Of the cards for which all of them are made.
    """
    models = ("8b", *FAMILIES)
    cards = [
        card
        for card in PUBLISHED["8b"]
        if all(f"{model} {card} GB any" in rows for model in models)
    ]
    if not cards:
        return []
    lines = [
        "",
        "| model | " + " | ".join(f"{card} GB" for card in cards) + " |",
        "|---" * (1 + len(cards)) + "|",
    ]
    for model in models:
        made = [rows[f"{model} {card} GB any"] for card in cards]
        name = MODELS[model].name if model in MODELS else model
        lengths = [f"{row['max_length']:,}" if row["fits"] else "none" for row in made]
        lines.append(f"| {name} | {' | '.join(lengths)} |")
    return lines


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--output", type=Path, required=True, help="JSON file")
    parser.add_argument("--markdown", type=Path, help="write the table here")
    parser.add_argument("--compiler-python", help="a Python with the GPU compiler")
    parser.add_argument("--only", help="rows whose name contains this")
    parser.add_argument("--estimate", action="store_true", help="by formula")
    return parser.parse_args()


def main() -> None:
    """Makes the missing rows of the table, and prints it."""
    args = parse_arguments()
    jax.config.update("jax_platforms", "cpu")
    python = None
    if not args.estimate:
        python = find_compiler(args.compiler_python)
        if python is None:
            sys.exit(f"no GPU compiler here: {how_to_get_the_compiler()}")
    content: dict[str, Any] = {"unsloth": UNSLOTH, "rows": {}}
    if args.output.is_file():
        content = json.loads(args.output.read_text())
    makers: dict[str, tuple[Any, ...]] = {
        f"{model} {gigabytes} GB {which}": (longest, model, gigabytes, which)
        for model, gigabytes, which in LENGTHS
    }
    makers |= {f"8b 16 x 2048 {policy.name}": (at_speed, policy) for policy in SPEED}
    for number, (name, (make, *arguments)) in enumerate(makers.items(), 1):
        if name in content["rows"] or (args.only and args.only not in name):
            continue
        print(f"[{number}/{len(makers)}] {name}", flush=True)
        began = time.perf_counter()
        row = content["rows"][name] = make(*arguments, python)
        # In the table's order, whichever were made first.
        content["rows"] = {
            k: content["rows"][k] for k in makers if k in content["rows"]
        }
        write_text(args.output, json.dumps(content, indent=1) + "\n")
        print(
            f"  {row['max_length']:,} tokens, "
            f"{row['device_bytes']['total'] / 1e9:.2f} GB, '{row['policy']}' "
            f"({time.perf_counter() - began:.0f} s)",
            flush=True,
        )
    text = markdown(content)
    if args.markdown:
        write_text(args.markdown, text)
    print(text)


if __name__ == "__main__":
    main()
