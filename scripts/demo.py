"""The whole way once, on a CPU, in minutes: a demo that is also a test.

    make demo                                  # on a base that it makes itself
    make demo MODEL=path/to/hf-llama DATA=file # on a model and data of yours

Without a model it writes one: a small Llama, trained on generated stories until it can
tell them, saved as a Hugging Face directory. From there everything goes through the
command lines that a user has: quantize to NF4, fine-tune with QLoRA (killed halfway
with SIGKILL and continued by the same command), generate, export, verify.

It ends with exit status 1 if the loss did not fall, the run did not continue, the
answers to questions it had not seen are wrong, or the exported adapter is not the one
that was trained.
"""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NoReturn

# This process and those it starts share the device: none may take all its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import rich.console
import rich.markup
import rich.table

from qlora_jax import UserError
from qlora_jax.data.rows import read_rows
from qlora_jax.runs.loading import load

MARK = ".made-by-qlora-jax-demo"
# How many of the held-out questions have to be answered right, word for word.
WANTED_RIGHT = 0.8

console = rich.console.Console(highlight=False)


# --- Data of the user's own ---


# Fields of a row -> prompt and completion, as format strings over them.
PAIRS = (
    ({"prompt", "completion"}, "{prompt}", "{completion}"),
    ({"question", "answer"}, "{question}\n", "{answer}"),
    ({"instruction", "input", "output"}, "{instruction}\n{input}\n", "{output}"),
)


def own_data(path: Path, directory: Path) -> tuple[str, str, list[str]]:
    """Splits a file into `train` and `held_out`, the last tenth.

    Rows are recognised by their fields. Returns the format, the ending of both files'
    names, and prompts.
    """
    rows, plain = read_rows(path, plain_text=True)
    fields = [row for _, row in rows]
    names = set(fields[0])
    if plain:
        text = fields[0]["text"]
        cut = text.rfind("\n", 0, len(text) * 9 // 10) + 1
        if not cut:
            fail(f"`{path}` is one line; a part is needed to train on and one to ask.")
        (directory / "train.txt").write_text(text[:cut])
        (directory / "held_out.txt").write_text(text[cut:])
        return "text", ".txt", [" ".join(text[cut:].split()[:8])]
    pair = next((pair for pair in PAIRS if pair[0] <= names), None)
    if "text" in names:
        kind = "text"
    elif names & {"messages", "conversations"}:
        kind = "messages"
    elif names >= {"input_ids", "labels"}:
        kind = "tokens"
    elif pair is not None:
        kind, (_, prompt, completion) = "prompt_completion", pair
        fields = [
            {"prompt": prompt.format(**row), "completion": completion.format(**row)}
            for row in fields
        ]
    else:
        fail(
            f"`{path}` has rows with the fields {', '.join(sorted(names))}. Expected "
            "`text`; `messages`; `input_ids` and `labels`; or "
            + "; or ".join(" and ".join(sorted(pair[0])) for pair in PAIRS)
            + "."
        )
    if len(fields) < 2:
        fail(f"`{path}` has one row; one is needed to train on and one to ask.")
    held = max(len(fields) // 10, 1)
    write_rows(directory / "train.jsonl", fields[:-held])
    write_rows(directory / "held_out.jsonl", fields[-held:])
    samples = [row.get("prompt", row.get("text")) for row in fields[-held:][:2]]
    if kind == "text":
        samples = [" ".join(str(text).split()[:8]) for text in samples]
    return kind, ".jsonl", [text for text in samples if text]


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    """Writes rows as JSONL."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- Commands, as a user gives them ---


def command(program: str, *arguments: str) -> list[str]:
    """The command line of a console script; of its module where it is not installed."""
    script = Path(sys.executable).with_name(program)
    module = {"qlora-jax": "cli", "qlora-convert": "cli.convert"}[program]
    start = [sys.executable, "-m", f"qlora_jax.{module}"]
    start = [str(script)] if script.exists() else start
    return [*start, *arguments]


def run(directory: Path, *words: str, show: bool = True) -> tuple[str, str]:
    """Runs a command in the demo's directory; returns its stdout and stderr."""
    if show:
        say_command(*words)
    done = subprocess.run(
        command(*words), cwd=directory, capture_output=True, text=True
    )
    if done.returncode:
        fail(f"`{' '.join(words[:2])}` failed:\n{done.stdout}{done.stderr}")
    return done.stdout, done.stderr


def say_command(*words: str) -> None:
    """Shows a command line."""
    console.print(f"  [bold]$ {rich.markup.escape(' '.join(words))}[/bold]")


def say(text: str) -> None:
    """Shows one finding."""
    console.print(f"  {rich.markup.escape(text)}")


def fail(text: str) -> NoReturn:
    """Ends the demo with exit status 1."""
    rich.console.Console(stderr=True, highlight=False).print(
        f"[bold red]demo failed:[/bold red] {rich.markup.escape(text)}", soft_wrap=True
    )
    sys.exit(1)


def generate(directory: Path, path: str, prompts: list[str], tokens: int) -> list[str]:
    """Continues prompts through `qlora-jax generate`; shows two, returns all."""
    if not prompts:
        say("no prompts to continue in these rows; give some with --prompt")
        return []
    output, _ = run(
        *(directory, "qlora-jax", "generate", path, "--prompt", *prompts),
        *("--max-new-tokens", str(tokens), "--dtype", compute_dtype(), "--json"),
        show=False,
    )
    texts = json.loads(output)["texts"]
    answers = [t.removeprefix(p) for t, p in zip(texts, prompts, strict=True)]
    for prompt, answer in zip(prompts[:2], answers[:2], strict=True):
        asked = prompt.rstrip().rpartition("\nQ: ")[2].replace("\n", " ")
        say(f"“{asked[-70:]}” → “{' '.join(answer.split())[:200]}”")
    return answers


def held_out_loss(directory: Path, path: str, options: dict[str, Any]) -> float:
    """Loss (nats per supervised token) through `qlora-jax eval`."""
    held_out = options["path"].replace("train", "held_out")
    output, _ = run(
        *(directory, "qlora-jax", "eval", path, "--data.path", held_out),
        *("--data.format", options["format"], "--dtype", compute_dtype(), "--json"),
        *("--data.max-length", str(options["max_length"])),
        show=False,
    )
    return json.loads(output)["loss"]


def compute_dtype() -> Literal["float32", "bfloat16"]:
    """bfloat16 where the device is fast in it."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_base(directory: Path) -> str:
    """Trains a small Llama on stories and writes questions; returns a summary."""
    say_command("python", "scripts/story_model.py", "--output", directory.name)
    script = Path(__file__).with_name("story_model.py")
    done = subprocess.run(
        [sys.executable, str(script), "--output", str(directory)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        fail(f"scripts/story_model.py failed:\n{done.stderr}")
    say(done.stdout.strip())
    return done.stdout.strip()


# --- The run: killed once, continued by the same command ---


def write_run_file(path: Path, base: str, options: dict[str, Any], args: Any) -> None:
    """Writes the TOML run file that `qlora-jax train` reads."""
    sections = {
        "model": {"path": base, "dtype": compute_dtype()},
        "data": options,
        "lora": {"r": 16, "lora_alpha": 32},
        "train": {
            "steps": args.steps,
            "batch_size": args.batch_size,
            "learning_rate": args.learning_rate,
            "warmup_steps": args.steps // 20,
        },
        "checkpoint": {"every": args.steps // 5},
    }
    text = 'output_dir = "run"\n'
    for name, values in sections.items():
        text += f"\n[{name}]\n"
        text += "".join(f"{key} = {json.dumps(v)}\n" for key, v in values.items())
    path.write_text(text)


def train_and_kill(directory: Path) -> int:
    """Starts the run and kills it after a checkpoint; returns the last step seen."""
    say_command("qlora-jax", "train", "run.toml")
    with open(directory / "killed.log", "w") as log:
        process = subprocess.Popen(
            command("qlora-jax", "train", "run.toml"),
            cwd=directory,
            stdout=log,
            stderr=log,
        )
        try:
            while process.poll() is None:
                saved, steps = newest_checkpoint(directory), metrics(directory)
                # A few steps past the checkpoint: those are lost, and taken again.
                if saved and len(steps) >= saved + 3:
                    break
                time.sleep(0.02)
        finally:
            process.kill()
            process.wait()
    if process.returncode != -signal.SIGKILL:
        log_text = (directory / "killed.log").read_text()
        if process.returncode:
            fail(f"`qlora-jax train` failed:\n{log_text}")
        fail("The run was over before it could be killed. Give more --steps.")
    return metrics(directory)[-1]["step"]


def newest_checkpoint(directory: Path) -> int:
    """The newest complete checkpoint's step; 0 = none."""
    # While one is being written its name has a suffix.
    found = (directory / "run" / "checkpoints").glob("step_*")
    return max(
        (int(m[1]) for p in found if (m := re.search(r"_(\d+)$", p.name))), default=0
    )


def metrics(directory: Path) -> list[dict[str, Any]]:
    """What metrics.jsonl holds; a line cut off by a kill is left out."""
    path = directory / "run" / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def continue_run(
    directory: Path, killed_at: int, steps: int
) -> tuple[int, float, float]:
    """Gives the same command again; returns where it went on, first and last loss."""
    say(f"killed (SIGKILL) after step {killed_at}; the same command again:")
    _, messages = run(directory, "qlora-jax", "train", "run.toml")
    found = re.search(r"Continuing from step (\d+)", messages)
    if found is None or not 0 < int(found[1]) <= killed_at:
        fail(f"The run did not continue from its checkpoint:\n{messages}")
    rows = metrics(directory)
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        fail("metrics.jsonl does not hold every step exactly once.")
    edge = max(min(10, steps // 4), 1)
    first = float(np.mean([row["loss"] for row in rows[:edge]]))
    last = float(np.mean([row["loss"] for row in rows[-edge:]]))
    say(
        f"continued from step {found[1]} to {steps}: loss {first:.3f} -> {last:.3f} "
        f"(means of {edge} steps), drawn in {directory.name}/run/loss.png"
    )
    if not last < first:
        fail(f"The loss did not fall: {first:.4f} at first, {last:.4f} at the end.")
    return int(found[1]), first, last


# --- The export ---


def export(directory: Path, base: str) -> str:
    """Exports the adapter and proves that it is the one that was trained."""
    name = ["--base-name", base] if base == "base-nf4" else []
    run(directory, "qlora-convert", "adapter", "run", "adapter", "--base", base, *name)
    found, _ = run(directory, "qlora-convert", "verify", "run", "adapter")
    tokens = [list(range(3, 35))]
    logits = []
    for part in ("run", "adapter"):
        model = load(directory / part, base=directory / base, dtype=compute_dtype())
        logits.append(np.asarray(model.logits(tokens)))
        del model  # one at a time: the base may be large
    if not np.array_equal(*logits):
        gap = np.abs(logits[0] - logits[1]).max()
        fail(f"The exported adapter gives other logits, by up to {gap:.3g}.")
    say(found.strip() + " Logits with either adapter: equal, bit for bit.")
    return found.strip()


# --- The directory, and the order of things ---


def make_directory(path: Path) -> None:
    """Makes the output directory anew; deletes only what this script made."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        fail(f"`{path}` is no directory; give another --output.")
    if path.is_dir() and any(path.iterdir()):
        if not (path / MARK).is_file():
            fail(
                f"`{path}` is not empty and was not made by this demo; give another "
                "--output."
            )
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / MARK).write_text("Made by scripts/demo.py, which may delete all of it.\n")


@contextmanager
def stage(title: str, times: dict[str, float]) -> Iterator[None]:
    """Announces a part of the demo and notes the seconds it took."""
    console.print(f"\n[bold cyan]{len(times) + 1}. {title}[/bold cyan]")
    began = time.perf_counter()
    yield
    times[title] = time.perf_counter() - began


def parse_arguments() -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(description="The whole way once, end to end.")
    add = parser.add_argument
    add("--model", type=Path, help="Hugging Face directory (default: makes its own)")
    add("--data", type=Path, help="data file: text, JSON or JSONL")
    add("--output", type=Path, default=Path("demo_run"), help="directory to (re)make")
    add("--steps", type=int, help="fine-tuning (steps)")
    add("--batch-size", type=int, help="sequences in a step")
    add("--learning-rate", type=float, help="peak rate of AdamW")
    add("--max-length", type=int, default=256, help="longest example (tokens)")
    add("--prompt", nargs="+", help="texts to continue (default: from the data)")
    args = parser.parse_args()
    if (args.model is None) != (args.data is None):
        parser.error("--model (MODEL=) and --data (DATA=) go together: give both")
    own = args.model is not None
    for name, its, users in (
        ("steps", 500, 60),
        ("batch_size", 16, 4),
        ("learning_rate", 5e-3, 2e-4),
    ):
        if getattr(args, name) is None:
            setattr(args, name, users if own else its)
    if args.steps < 20:
        parser.error(
            f"--steps must be at least 20 to kill and continue, got {args.steps}"
        )
    return args


def main(args: argparse.Namespace) -> None:
    """Goes the whole way."""
    began = time.perf_counter()
    times: dict[str, float] = {}
    found: dict[str, str] = {}
    make_directory(args.output)
    directory = args.output.resolve()
    own = args.model is not None
    console.print(
        f"qlora-jax demo on {jax.default_backend()} ({os.cpu_count()} cores), in "
        f"{rich.markup.escape(str(args.output))}"
    )

    if own:
        kind, ending, prompts = own_data(args.data, directory)
        prompts, completions = args.prompt or prompts, []
        source, train_file, length = str(args.model.resolve()), f"train{ending}", 32
    else:
        with stage("Make a base: a small Llama that tells stories", times):
            found["base"] = make_base(directory)
            generate(directory, "base", ["Sam walks to the mill."], 60)
        lines = (directory / "held_out.jsonl").read_text().splitlines()
        prompts = [json.loads(line)["prompt"] for line in lines]
        completions = [json.loads(line)["completion"] for line in lines]
        source, train_file, length = "base", "train.jsonl", 16
        kind = "prompt_completion"
    options = {"path": train_file, "format": kind, "max_length": args.max_length}

    with stage("Quantize it to NF4", times):
        description = json.loads((directory / source / "config.json").read_text())
        if "quantization_config" in description:
            base = source
            found["base"] = "4-bit already, used as it is"
        else:
            base = "base-nf4"
            report, _ = run(directory, "qlora-jax", "quantize", source, base, "--json")
            sizes = json.loads(report)
            found["quantized"] = (
                f"weights {sizes['bytes_before']:,} -> {sizes['bytes_after']:,} bytes"
            )
            say(found["quantized"])

    with stage("Before: the base on what it has not been taught", times):
        before = generate(directory, base, prompts, length)
        loss_before = held_out_loss(directory, base, options)

    with stage("Fine-tune with QLoRA, with a kill on the way", times):
        write_run_file(directory / "run.toml", base, options, args)
        killed_at = train_and_kill(directory)
        resumed, first, last = continue_run(directory, killed_at, args.steps)
        found["training loss"] = f"{first:.3f} -> {last:.3f}"
        found["killed, continued"] = f"after step {killed_at}, from step {resumed}"

    with stage("After: the same prompts, base and adapter", times):
        after = generate(directory, "run", prompts, length)
        loss_after = held_out_loss(directory, "run", options)
    found["held-out loss"] = f"{loss_before:.3f} -> {loss_after:.3f}"
    if not loss_after < loss_before:
        fail(f"The held-out loss did not fall: {found['held-out loss']}.")
    if completions:
        right = [
            sum(a == c for a, c in zip(answers, completions, strict=True))
            for answers in (before, after)
        ]
        found["held-out questions right"] = (
            f"{right[0]} -> {right[1]} of {len(completions)}, word for word"
        )
        say(f"held-out questions right: {found['held-out questions right']}")
        if right[1] < WANTED_RIGHT * len(completions):
            fail(f"Only {right[1]} of {len(completions)} held-out questions are right.")

    with stage("Export the adapter and verify it", times):
        found["export"] = export(directory, base)

    table = rich.table.Table(box=None, show_header=False, pad_edge=False)
    for name, text in found.items():
        table.add_row(f"[bold]{name}[/bold]", rich.markup.escape(text))
    spent = time.perf_counter() - began
    table.add_row(
        "[bold]time[/bold]",
        f"{spent:.0f} s: " + ", ".join(f"{s:.0f}" for s in times.values()),
    )
    for what, place in (
        ("base, quantized", directory / base),
        ("run, loss.png", directory / "run"),
        ("adapter for PEFT", directory / "adapter"),
    ):
        table.add_row(f"[bold]{what}[/bold]", rich.markup.escape(str(place)))
    console.print()
    console.print(table, soft_wrap=True)


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        fail(str(error))
