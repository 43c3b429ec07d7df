"""The commands that ask a model for text: `generate`, and `chat` in the terminal.

Both take a model, an adapter or a run directory, and say on stderr what of it answers,
and in which form: a dense base is quantized on the way in unless told otherwise.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import tyro

from qlora_jax.cli.options import ModelOptions, parse
from qlora_jax.cli.output import run_and_print, signals_raise
from qlora_jax.errors import UserError
from qlora_jax.inference.model import Model
from qlora_jax.inference.sampling import Sampling
from qlora_jax.inference.text import ChatPrompts, TextStream

_COMMANDS = "/reset forgets the conversation, /exit (or Ctrl-D) leaves."


@dataclass(frozen=True, kw_only=True)
class Generate(ModelOptions):
    """Continue prompts; prompt and continuation go to stdout."""

    prompt: tuple[str, ...]
    """Texts to continue, as one batch."""
    max_new_tokens: int = 128
    """Tokens to add at most."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()  # noqa: RUF009
    stop: tuple[str, ...] = ()
    """Texts that end a continuation and are left out of it."""
    stream: bool = False
    """Print the text as it is generated. Takes one prompt."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report. With `stream` the text is printed by then.

        Raises:
          UserError: what `Model.generate` refuses, or options that contradict.
        """
        if self.stream and (self.json or len(self.prompt) != 1):
            raise UserError(
                "--stream prints one text as it comes: give one --prompt, and leave "
                "--json out."
            )
        model = self.load()
        _note_length(model, self.prompt, self.max_new_tokens)
        settings = dataclasses.asdict(self.sampling)
        settings |= {"max_new_tokens": self.max_new_tokens, "stop": self.stop}
        if not self.stream:
            return {"texts": model.generate(self.prompt, **settings)}
        answer = model.stream(self.prompt[0], **settings)
        print(self.prompt[0], end="", flush=True)
        _print_pieces(answer)
        return {"texts": [self.prompt[0] + answer.text]}


@dataclass(frozen=True, kw_only=True)
class Chat(ModelOptions):
    """Chat with a model in the terminal.

    Turns are written in the form of the chat template.
    """

    system: str | None = None
    """System prompt that every conversation begins with."""
    chat_template: str | None = None
    """Jinja file; default as a run or an adapter has it, else the tokenizer's own."""
    max_new_tokens: int = 512
    """Tokens of an answer at most; fewer where the model's positions end."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()  # noqa: RUF009
    stop: tuple[str, ...] = ()
    """Texts that end an answer, beside the template's own end of a turn."""

    def run(self) -> dict[str, Any]:
        """Talks until /exit or the end of the input; returns the conversation.

        Ctrl-C stops an answer, of which the conversation keeps what was said. At the
        prompt it clears the line.

        Raises:
          UserError: a model that cannot be talked to. Once the conversation is under
            way, what goes wrong with a turn is printed, and the turn taken back.
        """
        model = self.load()
        settings = dataclasses.asdict(self.sampling)
        settings |= {
            "max_new_tokens": self.max_new_tokens,
            "stop": self.stop,
            "chat_template": self.chat_template,
        }
        opening: list[Mapping[str, Any]] = []
        if self.system is not None:
            opening = [{"role": "system", "content": self.system}]
        # Whatever is wrong with tokenizer, template or settings is said now.
        model.stream_chat([*opening, {"role": "user", "content": "Hi"}], **settings)
        _note_joined(model, self.chat_template)
        print(_COMMANDS, file=sys.stderr)
        messages = [*opening]
        while (line := _read()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                messages = [*opening]
                print("The conversation starts anew.", file=sys.stderr)
            elif line.startswith("/") and " " not in line:
                print(f"There is no {line}: {_COMMANDS}", file=sys.stderr)
            elif line:
                messages.append({"role": "user", "content": line})
                try:
                    answer = model.stream_chat(messages, **settings)
                    stopped = _print_pieces(answer)
                except UserError as error:
                    print(f"{error}\nThis turn was taken back.", file=sys.stderr)
                    messages.pop()
                    continue
                messages.append({"role": "assistant", "content": answer.text})
                if stopped:
                    print("(stopped)", file=sys.stderr)
                elif answer.finish_reason == "length":
                    number = len(answer.tokens)
                    print(f"(cut off after {number:,} tokens)", file=sys.stderr)
        return {"messages": messages}


def _note_length(model: Model, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Says so where a text may become longer than the model is meant for."""
    if model.tokenizer is None:  # which is an error of its own
        return
    lengths = (len(model.tokenizer(prompt)["input_ids"]) for prompt in prompts)
    longest, limit = max(lengths, default=0), model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        print(
            f"Note: the longest prompt has {longest:,} tokens, which with "
            f"--max-new-tokens {max_new_tokens:,} is more than the {limit:,} positions "
            "that this model is meant for (`max_position_embeddings`). What it writes "
            "beyond them is seldom sense.",
            file=sys.stderr,
        )


def _note_joined(model: Model, chat_template: str | None) -> None:
    """Says so where an answer's first token is another one than it was in training."""
    template = model.chat_template if chat_template is None else chat_template
    end = ChatPrompts(model.tokenizer, template).joined_end()
    if end is not None:
        print(
            f"Note: the generation prompt of the chat template ends with {end!r}, of "
            "which this tokenizer makes one token with the beginning of an answer. So "
            "conversations are asked with other tokens than they are trained with. "
            "Let the generation prompt end with a line break, or without the space "
            "(answers then begin with it), and train with that template.",
            file=sys.stderr,
        )


def _print_pieces(answer: TextStream) -> bool:
    """Prints an answer as it comes; returns whether Ctrl-C stopped it."""
    stopped = False
    try:
        for piece in answer:
            print(piece, end="", flush=True)
    except KeyboardInterrupt:
        stopped = True
    print(flush=True)
    return stopped


def _read() -> str | None:
    """A line of input, asked for where a person types it; None at the end."""
    prompt = ""
    if sys.stdin.isatty():
        # Arrow keys, and earlier lines again.
        import readline  # noqa: F401

        prompt = "> "
    while True:
        try:
            return input(prompt).strip()
        except EOFError:
            return None
        except KeyboardInterrupt:
            print(f"\n{_COMMANDS}", file=sys.stderr)


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax generate`; returns the exit status."""
    command = parse(Generate, args, prog="qlora-jax generate")

    def show(report: Mapping[str, Any]) -> None:
        if not command.stream:  # else all is printed
            print("\n\n".join(report["texts"]))

    return run_and_print(command.run, as_json=command.json, show=show)


def chat(args: Sequence[str]) -> int:
    """Runs `qlora-jax chat`; returns the exit status."""
    command = parse(Chat, args, prog="qlora-jax chat")
    with signals_raise():
        command.run()
    return 0
