"""Draws the picture of the landing page: planned context lengths by GPU memory.

    python docs/tooling/context_lengths.py          # writes docs/context_lengths.png

The lengths come from benchmarks/memory_8b.json, which `scripts/memory_table.py` makes
by compiling training steps for GPUs of these sizes.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parents[2]
BLUE, ORANGE, GREY = "#2f6fab", "#d9772b", "#8a8f98"


@dataclass
class Args:
    """Draw planned context lengths of Llama 3.1 8B by GPU memory."""

    output: Path = ROOT / "docs" / "context_lengths.png"
    """PNG file to write."""


def main(args: Args) -> None:
    """Draws the picture."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    content = json.loads((ROOT / "benchmarks" / "memory_8b.json").read_text("utf-8"))
    rows = [
        row
        for row in content["rows"].values()
        if row["model"] == "8b" and row.get("published")
    ]
    memory = [row["card_gb"] for row in rows]
    planned = [row["max_length"] for row in rows]
    published = [row["published"] for row in rows]

    fig, ax = plt.subplots(figsize=(8.4, 4.4))
    ax.plot(
        memory,
        planned,
        "o-",
        color=BLUE,
        lw=2,
        label="qlora-jax: planned by compiling, not run yet",
    )
    ax.plot(memory, published, "s-", color=ORANGE, lw=2, label="Unsloth: published")
    ax.axhline(131_072, color=GREY, ls="--", lw=1)
    ax.annotate(
        "native context of Llama 3.1", (80, 131_072), (0, -12), ha="right", color=GREY,
        textcoords="offset points", fontsize=9,
    )  # fmt: skip
    for x, y in zip(memory, planned, strict=True):
        ax.annotate(
            f"{y / 1000:,.0f}k", (x, y), (-4, 7), ha="right", color=BLUE,
            textcoords="offset points", fontsize=9,
        )  # fmt: skip
    ax.set_xticks(memory, [f"{value}" for value in memory])
    ax.set_yticks(range(0, 1_200_001, 200_000))
    ax.yaxis.set_major_formatter(lambda value, _: f"{value / 1000:,.0f}k")
    ax.set(xlabel="GPU memory (GB)", ylabel="tokens in one row", ylim=(0, 1_290_000))
    ax.set_title(
        "Longest row of a QLoRA step: Llama 3.1 8B, r=32, batch of one row",
        loc="left", fontsize=11,
    )  # fmt: skip
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(alpha=0.25)
    ax.legend(frameon=False, loc="upper left")
    fig.savefig(args.output, dpi=110, bbox_inches="tight")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
