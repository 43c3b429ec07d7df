"""Runs QLoRA from a base model to a verified adapter: a demo that is also a test.

    make demo                                  # on a base that it makes itself
    make demo ARGS="--family qwen3"            # the same with a small Qwen3
    make demo MODEL=path/to/hf-llama DATA=file # on your model and data

It takes minutes on a CPU. Without a model it makes one: a small Llama or Qwen3, trained
on generated stories until it can tell them, saved as a Hugging Face directory. From
there everything goes through the command lines that a user has: quantize to NF4,
fine-tune with QLoRA (killed halfway with SIGKILL and continued by the same command),
generate, export, verify.

It ends with exit status 1 if the loss did not fall, the run did not continue, the
answers to held-out questions are wrong, or the exported adapter is not the one that was
trained.
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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NoReturn

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # for `user_data`

# This process and those it starts share the device: none may take all its memory.
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import numpy as np
import rich.console
import rich.markup
import rich.table

from qlora_jax import UserError
from qlora_jax.runs.loading import load
from scripts.demo.user_data import split

STORY_MODEL = "scripts/demo/story_model.py"
# `model_type` of the base that it makes -> its name.
NAMES = {"llama": "Llama", "qwen3": "Qwen3"}
MARK = ".made-by-qlora-jax-demo"
# Share of the held-out questions that must be answered right, word for word.
LEAST_RIGHT = 0.8

console = rich.console.Console(highlight=False)


# --- Commands, as a user runs them ---


def command(program: str, *arguments: str) -> list[str]:
    """Returns the command line of a console script, or of its module."""
    script = Path(sys.executable).with_name(program)
    module = {"qlora-jax": "cli", "qlora-convert": "convert_cli"}[program]
    if script.exists():
        return [str(script), *arguments]
    return [sys.executable, "-m", f"qlora_jax.{module}", *arguments]


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
    """Shows one result."""
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
        question = prompt.rstrip().rpartition("\nQ: ")[2].replace("\n", " ")
        say(f"“{question[-70:]}” → “{' '.join(answer.split())[:200]}”")
    return answers


def held_out_loss(directory: Path, path: str, options: dict[str, Any]) -> float:
    """Returns the loss (nats per supervised token) through `qlora-jax eval`."""
    held_out = options["path"].replace("train", "held_out")
    output, _ = run(
        *(directory, "qlora-jax", "eval", path, "--data.path", held_out),
        *("--data.format", options["format"], "--dtype", compute_dtype(), "--json"),
        *("--data.max-length", str(options["max_length"])),
        show=False,
    )
    return json.loads(output)["loss"]


def compute_dtype() -> Literal["float32", "bfloat16"]:
    """Returns bfloat16 where the device is fast in it."""
    return "float32" if jax.default_backend() == "cpu" else "bfloat16"


def make_base(directory: Path, family: str) -> str:
    """Trains a small model on stories and writes questions; returns a summary."""
    option = [] if family == "llama" else ["--family", family]
    say_command("python", STORY_MODEL, "--output", directory.name, *option)
    script = Path(__file__).with_name("story_model.py")
    done = subprocess.run(
        [sys.executable, str(script), "--output", str(directory), *option],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        fail(f"{STORY_MODEL} failed:\n{done.stderr}")
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
        fail("The run ended before it could be killed. Give more --steps.")
    return metrics(directory)[-1]["step"]


def newest_checkpoint(directory: Path) -> int:
    """Returns the step of the newest complete checkpoint; 0 = none."""
    paths = (directory / "run" / "checkpoints").glob("step_*")
    # While one is being written its name has a suffix.
    matches = (re.search(r"_(\d+)$", path.name) for path in paths)
    return max((int(match[1]) for match in matches if match), default=0)


def metrics(directory: Path) -> list[dict[str, Any]]:
    """Returns the rows of metrics.jsonl, without a line cut off by a kill."""
    path = directory / "run" / "metrics.jsonl"
    lines = path.read_text().split("\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def continue_run(
    directory: Path, killed_at: int, steps: int
) -> tuple[int, float, float]:
    """Runs the same command again; returns its first step, first and last loss."""
    say(f"killed (SIGKILL) after step {killed_at}; the same command again:")
    _, messages = run(directory, "qlora-jax", "train", "run.toml")
    match = re.search(r"Continuing from step (\d+)", messages)
    if match is None or not 0 < int(match[1]) <= killed_at:
        fail(f"The run did not continue from its checkpoint:\n{messages}")
    rows = metrics(directory)
    if [row["step"] for row in rows] != list(range(1, steps + 1)):
        fail("metrics.jsonl does not hold every step exactly once.")
    edge = max(min(10, steps // 4), 1)
    first = float(np.mean([row["loss"] for row in rows[:edge]]))
    last = float(np.mean([row["loss"] for row in rows[-edge:]]))
    say(
        f"continued from step {match[1]} to {steps}: loss {first:.3f} -> {last:.3f} "
        f"(means of {edge} steps), drawn in {directory.name}/run/loss.png"
    )
    if not last < first:
        fail(f"The loss did not fall: {first:.4f} at first, {last:.4f} at the end.")
    return int(match[1]), first, last


# --- The export ---


def export(directory: Path, base: str) -> str:
    """Exports the adapter and checks that it is the one that was trained."""
    name = ["--base-name", base] if base == "base-nf4" else []
    run(directory, "qlora-convert", "adapter", "run", "adapter", "--base", base, *name)
    verified, _ = run(directory, "qlora-convert", "verify", "run", "adapter")
    tokens = [list(range(3, 35))]
    logits = []
    for part in ("run", "adapter"):
        model = load(directory / part, base=directory / base, dtype=compute_dtype())
        logits.append(np.asarray(model.logits(tokens)))
        del model  # one at a time: the base may be large
    if not np.array_equal(*logits):
        gap = np.abs(logits[0] - logits[1]).max()
        fail(f"The exported adapter gives other logits, by up to {gap:.3g}.")
    say(verified.strip() + " Logits with either adapter: equal, bit for bit.")
    return verified.strip()


# --- The stages, in order ---


@dataclass
class Subject:
    """What is fine-tuned, and on what."""

    base: str
    """Directory of the base, relative to the demo's."""
    data: dict[str, Any]
    """The section [data] of the run file."""
    prompts: list[str]
    completions: list[str]
    """Of the prompts, where they are known."""
    new_tokens: int
    """To generate for a prompt."""


@dataclass
class Log:
    """Times of the stages, and what they showed."""

    began: float = field(default_factory=time.perf_counter)
    times: list[float] = field(default_factory=list)
    results: dict[str, str] = field(default_factory=dict)

    @contextmanager
    def stage(self, title: str) -> Iterator[None]:
        """Announces a stage and records the seconds it took."""
        console.print(f"\n[bold cyan]{len(self.times) + 1}. {title}[/bold cyan]")
        began = time.perf_counter()
        yield
        self.times.append(time.perf_counter() - began)

    def show(self, paths: dict[str, Path]) -> None:
        """Prints the results, the times, and where to look."""
        table = rich.table.Table(box=None, show_header=False, pad_edge=False)
        spent = time.perf_counter() - self.began
        times = f"{spent:.0f} s: " + ", ".join(f"{s:.0f}" for s in self.times)
        rows = self.results | {"time": times}
        rows |= {name: str(path) for name, path in paths.items()}
        for name, text in rows.items():
            table.add_row(f"[bold]{name}[/bold]", rich.markup.escape(text))
        console.print()
        console.print(table, soft_wrap=True)


def make_directory(path: Path) -> None:
    """Makes the output directory afresh; deletes only what this script made."""
    if path.is_symlink() or (path.exists() and not path.is_dir()):
        fail(f"`{path}` is not a directory; give another --output.")
    if path.is_dir() and any(path.iterdir()):
        if not (path / MARK).is_file():
            fail(
                f"`{path}` is not empty and was not made by this demo; give another "
                "--output."
            )
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / MARK).write_text("Made by scripts/demo, which may delete all of it.\n")


def choose_subject(args: argparse.Namespace, directory: Path, log: Log) -> Subject:
    """Takes the user's model and data, or makes a base and questions."""
    if args.model is not None:
        parts = split(args.data, directory)
        data = {"path": f"train{parts.suffix}", "format": parts.format}
        data["max_length"] = args.max_length
        prompts = args.prompt or parts.prompts
        return Subject(str(args.model.resolve()), data, prompts, [], 32)
    name = NAMES[args.family]
    with log.stage(f"Make a base: a small {name} that tells stories"):
        log.results["base"] = make_base(directory, args.family)
        generate(directory, "base", ["Sam walks to the mill."], 60)
    lines = (directory / "held_out.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    data = {"path": "train.jsonl", "format": "prompt_completion"}
    data["max_length"] = args.max_length
    prompts = [row["prompt"] for row in rows]
    return Subject("base", data, prompts, [row["completion"] for row in rows], 16)


def quantize(directory: Path, subject: Subject, log: Log) -> None:
    """Quantizes the base of the subject, unless it is in 4 bits already."""
    description = json.loads((directory / subject.base / "config.json").read_text())
    if "quantization_config" in description:
        log.results["base"] = "4-bit already, used as it is"
        return
    report, _ = run(
        *(directory, "qlora-jax", "quantize", subject.base, "base-nf4", "--json")
    )
    sizes = json.loads(report)
    log.results["quantized"] = (
        f"weights {sizes['bytes_before']:,} -> {sizes['bytes_after']:,} bytes"
    )
    say(log.results["quantized"])
    subject.base = "base-nf4"


def measure(directory: Path, path: str, subject: Subject) -> tuple[list[str], float]:
    """Returns the answers of a model, and its held-out loss."""
    answers = generate(directory, path, subject.prompts, subject.new_tokens)
    return answers, held_out_loss(directory, path, subject.data)


def fine_tune(
    args: argparse.Namespace, directory: Path, subject: Subject, log: Log
) -> None:
    """Trains, with a kill on the way."""
    write_run_file(directory / "run.toml", subject.base, subject.data, args)
    killed_at = train_and_kill(directory)
    resumed, first, last = continue_run(directory, killed_at, args.steps)
    log.results["training loss"] = f"{first:.3f} -> {last:.3f}"
    log.results["killed, continued"] = f"after step {killed_at}, from step {resumed}"


def check_learning(
    before: tuple[list[str], float],
    after: tuple[list[str], float],
    completions: list[str],
    log: Log,
) -> None:
    """Fails if the held-out loss did not fall, or too few answers are right."""
    losses = f"{before[1]:.3f} -> {after[1]:.3f}"
    log.results["held-out loss"] = losses
    if not after[1] < before[1]:
        fail(f"The held-out loss did not fall: {losses}.")
    if not completions:
        return
    right = [
        sum(a == c for a, c in zip(answers, completions, strict=True))
        for answers, _ in (before, after)
    ]
    count = f"{right[0]} -> {right[1]} of {len(completions)}, word for word"
    log.results["held-out questions right"] = count
    say(f"held-out questions right: {count}")
    if right[1] < LEAST_RIGHT * len(completions):
        fail(f"Only {right[1]} of {len(completions)} held-out questions are right.")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="demo", description="Runs every command.")
    add = parser.add_argument
    add("--model", type=Path, help="Hugging Face directory (default: made here)")
    add("--data", type=Path, help="data file: text, JSON or JSONL")
    add("--family", choices=NAMES, help="of the base that is made (default: llama)")
    add("--output", type=Path, default=Path("demo_run"), help="directory to (re)make")
    add("--steps", type=int, help="fine-tuning (steps)")
    add("--batch-size", type=int, default=4, help="sequences in a step")
    add("--learning-rate", type=float, help="peak rate of AdamW")
    add("--max-length", type=int, default=256, help="longest example (tokens)")
    add("--prompt", nargs="+", help="prompts to continue (default: from the data)")
    args = parser.parse_args(argv)
    if (args.model is None) != (args.data is None):
        parser.error("--model (MODEL=) and --data (DATA=) go together: give both")
    if args.model is not None and args.family is not None:
        parser.error("--family is of the base that is made; leave it out with --model")
    args.family = args.family or "llama"
    for name, small, users in (("steps", 300, 60), ("learning_rate", 5e-3, 2e-4)):
        if getattr(args, name) is None:
            setattr(args, name, small if args.model is None else users)
    if args.steps < 20:
        parser.error(
            f"--steps must be at least 20 to kill and continue, got {args.steps}"
        )
    return args


def main(args: argparse.Namespace) -> None:
    """Runs all stages."""
    log = Log()
    make_directory(args.output)
    directory = args.output.resolve()
    console.print(
        f"qlora-jax demo on {jax.default_backend()} ({os.cpu_count()} cores), in "
        f"{rich.markup.escape(str(args.output))}"
    )
    subject = choose_subject(args, directory, log)
    with log.stage("Quantize it to NF4"):
        quantize(directory, subject, log)
    with log.stage("Before: the base on what it has not been taught"):
        before = measure(directory, subject.base, subject)
    with log.stage("Fine-tune with QLoRA, with a kill on the way"):
        fine_tune(args, directory, subject, log)
    with log.stage("After: the same prompts, base and adapter"):
        after = measure(directory, "run", subject)
    check_learning(before, after, subject.completions, log)
    with log.stage("Export the adapter and verify it"):
        log.results["export"] = export(directory, subject.base)
    log.show(
        {
            "base, quantized": directory / subject.base,
            "run, loss.png": directory / "run",
            "adapter for PEFT": directory / "adapter",
        }
    )


if __name__ == "__main__":
    try:
        main(parse_arguments())
    except UserError as error:
        fail(str(error))
