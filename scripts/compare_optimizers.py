"""Compares the optimizers: the same run with each, their losses and states.

    python scripts/compare_optimizers.py --model MODEL --data shakespeare.txt \
        --output benchmarks/optimizers.json

Each is a run as `qlora-jax train` makes it: LoRA of rank 16 on all seven projections,
embed_tokens and lm_head in full, 4 rows of 128 tokens a step, warm-up of 10 steps,
linear to 0. The losses are means over 20 steps: around a quarter and a half of the
steps, and over the last.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # if not installed

import jax

from convert.atomic import write_text
from qlora_jax.data.config import DataConfig
from qlora_jax.lora.config import LoraConfig
from qlora_jax.runs.config import CheckpointConfig, LogConfig, ModelConfig, RunConfig
from qlora_jax.runs.environment import versions
from qlora_jax.runs.rows import read_metrics
from qlora_jax.runs.runner import run
from qlora_jax.training.config import Optimizer, TrainConfig

# Optimizer, learning rate, seed.
RUNS: tuple[tuple[Optimizer, float, int], ...] = (
    ("adamw", 2e-3, 0),
    ("adamw_8bit", 2e-3, 0),
    ("adamw", 2e-3, 1),
    ("adamw_8bit", 2e-3, 1),
    ("adafactor", 2e-3, 0),
    ("lion", 3e-4, 0),
)
AVERAGED = 20


def train_with(
    optimizer: Optimizer,
    learning_rate: float,
    seed: int,
    *,
    model: str,
    data: str,
    steps: int,
) -> dict[str, Any]:
    """Trains with one optimizer; returns its row."""
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "run"
        config = RunConfig(
            model=ModelConfig(path=model, quantization="nf4_dq", dtype="float32"),
            data=DataConfig(path=data, format="text", max_length=128, packing=True),
            lora=LoraConfig(
                r=16,
                lora_alpha=32,
                target_modules=(
                    *("q_proj", "k_proj", "v_proj", "o_proj"),
                    *("gate_proj", "up_proj", "down_proj"),
                ),
                modules_to_save=("embed_tokens", "lm_head"),
            ),
            train=TrainConfig(
                steps=steps,
                batch_size=4,
                learning_rate=learning_rate,
                warmup_steps=10,
                optimizer=optimizer,
                seed=seed,
            ),
            checkpoint=CheckpointConfig(every=steps),
            log=LogConfig(every=steps, plot=False),
            output_dir=str(directory),
        )
        report = run(config)
        losses = [row["loss"] for row in read_metrics(directory)]

    def mean(end: int) -> float:
        part = losses[max(end - AVERAGED, 0) : end]
        return sum(part) / len(part)

    return {
        "optimizer": optimizer,
        "learning_rate": learning_rate,
        "seed": seed,
        "trained_parameters": report["trainable_parameters"],
        "state_bytes": report["optimizer_bytes"],
        "losses": {
            f"around {steps // 4}": mean(steps // 4 + AVERAGED // 2),
            f"around {steps // 2}": mean(steps // 2 + AVERAGED // 2),
            f"last {AVERAGED}": mean(steps),
        },
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Renders the rows as Markdown, as docs/training.md has them."""
    means = list(rows[0]["losses"])
    lines = [
        f"| optimizer | rate | seed | state | {' | '.join(means)} |",
        "|---|---|---|---|" + "---|" * len(means),
    ]
    for row in rows:
        rate = f"{row['learning_rate']:.0e}".replace("e-0", "e-")
        losses = " | ".join(f"{row['losses'][name]:.4f}" for name in means)
        lines.append(
            f"| `{row['optimizer']}` | {rate} | {row['seed']} | "
            f"{row['state_bytes']:,} bytes | {losses} |"
        )
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Trains with each optimizer; prints the table, and writes JSON if asked to."""
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument("--model", required=True, help="Hugging Face directory")
    p.add_argument("--data", required=True, help="text file")
    p.add_argument("--steps", type=int, default=200)
    p.add_argument("--output", type=Path, help="JSON file to write")
    args = p.parse_args(argv)
    common = {"model": args.model, "data": args.data, "steps": args.steps}
    rows = [train_with(*settings, **common) for settings in RUNS]
    print(table(rows))
    if args.output:
        result = {
            "method": "runs of qlora-jax, one after the other; see the script",
            "model": Path(args.model).name,
            "data": Path(args.data).name,
            "steps": args.steps,
            "runs": rows,
            "device": jax.devices()[0].device_kind,
            "machine": platform.machine(),
            "versions": versions(),
        }
        write_text(args.output, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
