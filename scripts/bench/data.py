"""Measures how fast rows become batches, and how full the rows are.

    python scripts/bench data DATA.jsonl --tokenizer DIR --completion '{answer}'
    python scripts/bench data DATA.jsonl --tokenizer DIR --turns 20 --prompt ...

Each figure is the best of some repetitions: reading, tokenizing and labelling the rows
(`load_examples`), laying them out in rows (`pack`), and assembling batches by index
(`Batches`), in memory and from the mapped cache. The figures are printed as one line of
JSON; the rates are in tokens of the examples, padding not counted.

With `--turns`, prompts and completions become the turns of conversations of that
length, and rendering them with a chat template is measured: with the answers' spans
(`ChatRenderer.examples`), and as text alone, which is one pass of the template.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from convert.tokenizer import load_tokenizer
from qlora_jax.data.batches import Batches
from qlora_jax.data.chat import ChatRenderer
from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples
from qlora_jax.data.packing import pack
from qlora_jax.data.rows import read_rows, text_of


def best(repeat: int, work: Callable[[], Any]) -> tuple[float, Any]:
    """Returns the shortest time of some repetitions (s), and the last result."""
    seconds, result = float("inf"), None
    for _ in range(repeat):
        start = time.perf_counter()
        result = work()
        seconds = min(seconds, time.perf_counter() - start)
    return seconds, result


def batch_rate(examples: Any, config: DataConfig, batch_size: int) -> float:
    """Returns the tokens a second of an epoch of batches."""
    options: Any = dict(batch_size=batch_size, pad_token_id=0)
    batches = Batches(examples, config, epochs=1, **options)
    start = time.perf_counter()
    tokens = 0
    for index in range(len(batches)):
        batches[index]
        tokens += batches.tokens(index)
    return tokens / (time.perf_counter() - start)


def measure(
    config: DataConfig, tokenizer: Any, *, batch_size: int, repeat: int
) -> dict[str, Any]:
    """Measures each stage of the data; returns the figures."""

    def load(config: DataConfig) -> Any:
        return load_examples(config, tokenizer, vocab_size=len(tokenizer))

    seconds, examples = best(repeat, lambda: load(config))
    packing, _ = best(repeat, lambda: pack(examples.lengths, config.max_length))
    with tempfile.TemporaryDirectory() as directory:
        mapped = dataclasses.replace(config, cache=directory)
        writing, _ = best(1, lambda: load(mapped))
        opening, stored = best(repeat, lambda: load(mapped))
        from_map = max(batch_rate(stored, mapped, batch_size) for _ in range(repeat))
    in_memory = max(batch_rate(examples, config, batch_size) for _ in range(repeat))
    report = examples.report
    return {
        "rows": report.rows_read,
        "tokens": report.tokens,
        "supervised_tokens": report.supervised_tokens,
        "packed_rows": report.packed_rows,
        "packing_efficiency": report.packing_efficiency,
        "load_tokens_per_second": report.tokens / seconds,
        "load_into_cache_tokens_per_second": report.tokens / writing,
        "open_cache_seconds": opening,
        "pack_examples_per_second": report.examples / packing,
        "batches_tokens_per_second": in_memory,
        "batches_from_cache_tokens_per_second": from_map,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0],
        "python": platform.python_version(),
    }


def measure_rendering(
    pairs: Sequence[tuple[str, str]],
    tokenizer: Any,
    chat_template: str,
    *,
    turns: int,
    repeat: int,
) -> dict[str, Any]:
    """Measures rendering conversations; returns the figures.

    Args:
      pairs: what a user asks, and what the assistant answers.
      tokenizer: has the special tokens.
      chat_template: as `data.chat_template`.
      turns: of each conversation; an even number.
      repeat: times to measure.
    """
    messages = [
        {"role": role, "content": text}
        for pair in pairs
        for role, text in zip(("user", "assistant"), pair, strict=True)
    ]
    starts = range(0, len(messages) - turns + 1, turns)
    conversations = [messages[start : start + turns] for start in starts]
    if not conversations:
        raise SystemExit(f"there are only {len(messages)} turns in the data")
    renderer = ChatRenderer(tokenizer, chat_template)

    def time_all(render: Callable[[Any], Any]) -> float:
        return best(repeat, lambda: [render(turns) for turns in conversations])[0]

    seconds, text_seconds = time_all(renderer.examples), time_all(renderer.text)
    return {
        "conversations": len(conversations),
        "turns": turns,
        "characters": sum(len(renderer.text(turns)) for turns in conversations),
        "seconds": seconds,
        "text_seconds": text_seconds,
        "milliseconds_per_conversation": 1e3 * seconds / len(conversations),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measures, and prints one line of JSON."""
    parser = argparse.ArgumentParser(
        prog="bench data",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("data", help="data file")
    parser.add_argument("--tokenizer", required=True, help="directory that has one")
    parser.add_argument("--prompt", help="as data.prompt; \\n is a line break")
    parser.add_argument("--completion", help="as data.completion")
    parser.add_argument("--max-length", type=int, default=1024, help="tokens")
    parser.add_argument("--batch-size", type=int, default=4, help="rows")
    parser.add_argument("--turns", type=int, help="measure conversations of so many")
    parser.add_argument(
        "--chat-template", default="chatml", help="as data.chat_template"
    )
    parser.add_argument("--repeat", type=int, default=3, help="times to measure")
    args = parser.parse_args(argv)
    tokenizer = load_tokenizer(args.tokenizer)
    if tokenizer is None:
        parser.error(f"there is no tokenizer in {args.tokenizer}")
    templates = {
        name: value.replace("\\n", "\n")
        for name in ("prompt", "completion")
        if (value := getattr(args, name)) is not None
    }
    if args.turns is not None:
        if len(templates) < 2 or args.turns < 2 or args.turns % 2:
            parser.error("--turns is an even number, with --prompt and --completion")
        rows, _ = read_rows(Path(args.data), plain_text=False)
        pairs = [
            (
                text_of(row, where, "prompt", templates["prompt"]),
                text_of(row, where, "completion", templates["completion"]),
            )
            for where, row in rows
        ]
        options = {"turns": args.turns, "repeat": args.repeat}
        print(
            json.dumps(
                measure_rendering(pairs, tokenizer, args.chat_template, **options)
            )
        )
        return
    config = DataConfig(
        path=args.data,
        format="prompt_completion" if templates else "text",
        max_length=args.max_length,
        packing=True,
        **templates,
    )
    figures = measure(config, tokenizer, batch_size=args.batch_size, repeat=args.repeat)
    print(json.dumps(figures))
