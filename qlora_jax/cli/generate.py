"""The `generate` command, and `chat` in the terminal.

Both take a model, an adapter or a run directory, and print on stderr what was loaded: a
dense base is quantized while it is loaded, unless `--quantization none` is given.
"""

from __future__ import annotations

import dataclasses
import json
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qlora_jax.cli.options import ModelOptions, parse
from qlora_jax.cli.output import print_note, print_text, run_and_print
from qlora_jax.data import encode_prompt, unknown_text
from qlora_jax.errors import UsageError, UserError, say
from qlora_jax.inference import Sampling
from qlora_jax.reading import read_text, reason

if TYPE_CHECKING:
    from qlora_jax.inference import Model, TextStream
    from qlora_jax.runs import RunConfig

# Conversations to answer are read whole, and answered one by one.
_MAX_BYTES = 100_000_000
_CHAT_COMMANDS = "/reset forgets the conversation, /exit (or Ctrl-D) leaves."


@dataclass(frozen=True, kw_only=True)
class TemplateOptions(ModelOptions):
    """How conversations become text."""

    chat_template: str | None = None
    """Jinja file; default that of the run or adapter, else the tokenizer's own."""
    chat_template_kwargs: str | None = None
    """Further variables of the chat template, as a JSON object:
    '{"enable_thinking": false}'. They add to those that a run was trained with."""
    tools: Path | None = None
    """JSON file with a list of functions, which the chat template describes to the
    model."""

    def template_settings(self, run: RunConfig | None) -> dict[str, Any]:
        """Returns these options as arguments of `Model.chat`.

        Args:
          run: settings of the run, if it is one: its variables are the defaults.

        Raises:
          UserError: they cannot be read.
        """
        variables, tools = self.chat_template_kwargs, None
        if variables is not None:
            variables = _parse_json(variables, "--chat-template-kwargs")
            if not isinstance(variables, dict):
                raise UserError(
                    "--chat-template-kwargs must be a JSON object, such as "
                    f"'{{\"enable_thinking\": false}}', got {variables!r:.80}."
                )
        if self.tools is not None:
            tools = _parse_json(_read_text(self.tools), f"`{self.tools}`")
            if not isinstance(tools, list) or not tools:
                raise UserError(
                    f"`{self.tools}` must be a list of functions, as JSON schemas, got "
                    f"{tools!r:.80}."
                )
        sources = () if run is None else run.data.each
        trained = next(
            (s.chat_template_kwargs for s in sources if s.format == "messages"), None
        )
        if trained:
            say(f"Variables of the chat template, from the run: {json.dumps(trained)}.")
        return {
            "chat_template": self.chat_template,
            "chat_template_kwargs": {**(trained or {}), **(variables or {})} or None,
            "tools": tools,
        }


@dataclass(frozen=True, kw_only=True)
class Generate(TemplateOptions):
    """Continue prompts; prompt and continuation go to stdout."""

    prompt: tuple[str, ...] = ()
    """Prompts to continue, as one batch, as they are: without the chat template, which
    --messages are answered through."""
    messages: Path | None = None
    """File of conversations to answer instead, one after the other: JSONL or a JSON
    list of rows with `messages` and, for one row, `tools` and `chat_template_kwargs`.
    """
    max_new_tokens: int = 128
    """Tokens to add at most."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()  # noqa: RUF009
    stop: tuple[str, ...] = ()
    """Strings that end a continuation; they are left out of it."""
    stream: bool = False
    """Print the text as it is generated. Takes one prompt."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Generates; returns the report. With `stream` the text is printed by then.

        Raises:
          UserError: what `Model.generate` refuses, or options that contradict.
        """
        if bool(self.prompt) == (self.messages is not None):
            raise UserError(
                "Give either --prompt, which is continued as it is, or --messages, "
                "which are answered by the chat template (`qlora-jax chat` asks for "
                "them in the terminal)."
            )
        if self.stream and (self.json or len(self.prompt) != 1):
            raise UserError(
                "--stream prints one text while it is generated: give one --prompt, "
                "and no --json."
            )
        given = (self.chat_template, self.chat_template_kwargs, self.tools)
        if self.prompt and any(value is not None for value in given):
            raise UserError(
                "--chat-template, --chat-template-kwargs and --tools go with "
                "--messages; a --prompt is continued as it is."
            )
        rows = [] if self.messages is None else _read_conversations(self.messages)
        resolved = self.resolve()
        templates = self.template_settings(resolved.settings) if rows else {}
        model = self.load(resolved)
        _note_unused_sampling(model, self.sampling)
        settings = dataclasses.asdict(self.sampling)
        settings |= {"max_new_tokens": self.max_new_tokens, "stop": self.stop}
        _warn_of_unknown(model, [*self.prompt, *_contents(rows)])
        if rows:
            return {"texts": [model.chat(**templates | r, **settings) for r in rows]}
        _note_no_template(model, resolved.settings, self.prompt)
        _warn_of_length(model, self.prompt, self.max_new_tokens)
        if not self.stream:
            return {"texts": model.generate(self.prompt, **settings)}
        answer = model.stream(self.prompt[0], **settings)
        print_text(self.prompt[0], end="")
        _print_stream(answer)
        return {"texts": [self.prompt[0] + answer.text]}


@dataclass(frozen=True, kw_only=True)
class Chat(TemplateOptions):
    """Chat with a model in the terminal.

    Turns are written in the form of the chat template.
    """

    system: str | None = None
    """System prompt that every conversation begins with."""
    max_new_tokens: int = 512
    """Tokens of an answer at most; fewer where the model's positions end."""
    sampling: Annotated[Sampling, tyro.conf.arg(name="")] = Sampling()  # noqa: RUF009
    stop: tuple[str, ...] = ()
    """Strings that end an answer, as the template's own end of a turn does."""

    def run(self) -> dict[str, Any]:
        """Chats until /exit or the end of the input; returns the conversation.

        Ctrl-C stops an answer, of which the conversation keeps the part generated so
        far. At the prompt it clears the line.

        Raises:
          UserError: a model that cannot chat. Once the conversation is under way, an
            error in a turn is printed, and the turn taken back.
        """
        resolved = self.resolve()
        templates = self.template_settings(resolved.settings)
        model = self.load(resolved)
        _note_unused_sampling(model, self.sampling)
        opening: list[Mapping[str, Any]] = []
        if self.system is not None:
            opening = [{"role": "system", "content": self.system}]
        # So a problem of tokenizer, template or settings comes before the first turn.
        self._answer(model, [*opening, {"role": "user", "content": "Hi"}], templates)
        _warn_of_joined_tokens(model, templates)
        say(_CHAT_COMMANDS)
        messages = [*opening]
        while (line := _read_line()) is not None:
            if line == "/exit":
                break
            if line == "/reset":
                messages = [*opening]
                say("The conversation starts anew.")
            elif line.startswith("/") and " " not in line:
                say(f"There is no {line}: {_CHAT_COMMANDS}")
            elif line:
                self._take_turn(model, messages, line, templates)
        return {"messages": messages}

    def _answer(
        self,
        model: Model,
        messages: Sequence[Mapping[str, Any]],
        templates: Mapping[str, Any],
    ) -> TextStream:
        return model.stream_chat(
            messages,
            max_new_tokens=self.max_new_tokens,
            stop=self.stop,
            **templates,
            **dataclasses.asdict(self.sampling),
        )

    def _take_turn(
        self,
        model: Model,
        messages: list[Mapping[str, Any]],
        line: str,
        templates: Mapping[str, Any],
    ) -> None:
        """Prints the answer to a line; adds both to the conversation."""
        messages.append({"role": "user", "content": line})
        _warn_of_unknown(model, [line])
        try:
            answer = self._answer(model, messages, templates)
            interrupted = _print_stream(answer)
        except UserError as error:
            say(f"{error}\nThis turn was taken back.")
            messages.pop()
            return
        # Also of an answer that was stopped: the next turn refers to what was shown.
        messages.append({"role": "assistant", "content": answer.text})
        if interrupted:
            say("(stopped)")
        elif answer.finish_reason == "length":
            say(f"(cut off after {len(answer.tokens):,} tokens)")


def _note_unused_sampling(model: Model, sampling: Sampling) -> None:
    """Prints which settings of generation_config.json the options do not have."""
    from convert import sampling_settings, text_files

    files = text_files(model.path, model.adapter_path)
    ours, default = dataclasses.asdict(sampling), dataclasses.asdict(Sampling())
    unused, options = [], []
    for name, value in sampling_settings(files, f"`{model.path}`: ").items():
        # What an option sets is the user's choice.
        if name not in ours:
            unused.append(f"{name}={value!r:.80}")
        elif value != ours[name] == default[name]:
            unused.append(f"{name}={value!r:.80}")
            options.append(f"--{name.replace('_', '-')} {value!s:.80}")
    if unused:
        print_note(
            "generation_config.json is read for the ends of generation only, and not "
            f"for {', '.join(unused)}, with which transformers generates"
            + (f"; {' '.join(options)} set these" if options else "")
        )


def _note_no_template(
    model: Model, run: RunConfig | None, prompts: Sequence[str]
) -> None:
    """Prints a note if prompts lack the form of what the model was trained on.

    Args:
      model: the model.
      run: settings of the run, if it is one; of other models only the tokenizer tells.
      prompts: texts to continue.
    """
    template = getattr(model.tokenizer, "chat_template", None)
    if run is None:
        chats, why = bool(template), "its tokenizer has a chat template"
    else:
        chats = any(source.writes_conversations for source in run.data.each)
        why = "it was trained on conversations"
    # Prompts that someone has rendered hold the tokens that begin and end turns.
    added = getattr(model.tokenizer, "added_tokens_decoder", {}).values()
    marks = [str(token) for token in added if token.special]
    if chats and not all(any(mark in text for mark in marks) for text in prompts):
        print_note(
            f"a --prompt is continued as it is, and this model expects turns ({why}): "
            "--messages FILE, or `qlora-jax chat`, answers through the chat template"
        )


def _warn_of_length(model: Model, prompts: Sequence[str], max_new_tokens: int) -> None:
    """Prints a note if a prompt and what is added may exceed the model's context."""
    if model.tokenizer is None:  # which is an error of its own
        return
    lengths = (len(encode_prompt(model.tokenizer, prompt)) for prompt in prompts)
    longest, limit = max(lengths, default=0), model.config.max_position_embeddings
    if longest + max_new_tokens > limit:
        print_note(
            f"the longest prompt has {longest:,} tokens, which with --max-new-tokens "
            f"{max_new_tokens:,} is more than the {limit:,} positions of this model "
            "(`max_position_embeddings`). Text beyond them seldom makes sense"
        )


def _contents(rows: Sequence[Mapping[str, Any]]) -> Iterator[Any]:
    """Yields the contents of turns, which have not been checked yet."""
    for row in rows:
        turns = row["messages"] if isinstance(row["messages"], list) else []
        yield from (turn.get("content") for turn in turns if isinstance(turn, dict))


def _warn_of_unknown(model: Model, texts: Sequence[Any]) -> None:
    """Prints a note about characters of prompts that the tokenizer does not know."""
    if model.tokenizer is None:
        return
    texts = [text for text in texts if isinstance(text, str)]
    unknown = dict.fromkeys(
        characters
        for text in texts
        for characters in unknown_text(model.tokenizer, text)
    )
    if unknown:
        print_note(
            f"the tokenizer has no token for {', '.join(map(repr, unknown))}, so that "
            "the model does not see it in what it is asked"
        )


def _read_text(path: Path) -> str:
    try:
        return read_text(path, _MAX_BYTES)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` cannot be read: {reason(error)}.") from error


def _parse_json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{where} is not valid JSON: {error}.") from error


def _read_conversations(path: Path) -> list[dict[str, Any]]:
    """Reads rows of conversations as arguments of `Model.chat`.

    Raises:
      UserError: a row without `messages`, or with other fields.
    """
    text = _read_text(path)
    if path.suffix == ".json":
        rows = _parse_json(text, f"`{path}`")
    else:
        rows = [
            _parse_json(line, f"{path}:{number}")
            # Not `splitlines`: JSON strings may hold other ends of lines, as U+2028.
            for number, line in enumerate(text.split("\n"), 1)
            if line.strip()
        ]
    if not isinstance(rows, list) or not rows:
        raise UserError(f"`{path}` must hold a list of rows, got {rows!r:.80}.")
    known = {"messages", "tools", "chat_template_kwargs"}
    for number, row in enumerate(rows, 1):
        if not isinstance(row, dict) or "messages" not in row or row.keys() - known:
            raise UserError(
                f"{path}: row {number} must be an object with `messages` and, at most, "
                f"`tools` and `chat_template_kwargs`, got {row!r:.80}."
            )
    # null means that a row leaves the choice to the options.
    return [{k: v for k, v in row.items() if v is not None} for row in rows]


def _warn_of_joined_tokens(model: Model, templates: Mapping[str, Any]) -> None:
    """Prints a note if an answer's first token differs from training."""
    from qlora_jax.inference import ChatPrompts

    prompts = ChatPrompts(
        model.tokenizer,
        templates["chat_template"],
        variables=templates["chat_template_kwargs"],
    )
    end = prompts.joined_end()
    if end is not None:
        print_note(
            f"the generation prompt of the chat template ends with {end!r}, which this "
            "tokenizer joins with the beginning of an answer into one token. So the "
            "model gets other tokens than in training. Let the generation prompt end "
            "with a line break, or without the space (answers then begin with it), and "
            "train with that template"
        )


def _print_stream(answer: TextStream) -> bool:
    """Prints an answer while it is generated; returns whether Ctrl-C stopped it."""
    interrupted = False
    try:
        for piece in answer:
            print_text(piece, end="")
    except KeyboardInterrupt:
        interrupted = True
    print_text("")
    return interrupted


def _read_line() -> str | None:
    """Reads a line of input, with a prompt in a terminal; None at the end."""
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
            say(f"\n{_CHAT_COMMANDS}")


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax generate`; returns the exit status."""
    if len(args) > 1 and not any(arg.startswith("-") for arg in args[:2]):
        raise UsageError(
            "A prompt is given by an option: "
            f"qlora-jax generate {shlex.quote(args[0])} --prompt {shlex.quote(args[1])}"
        )
    command = parse(Generate, args, prog="qlora-jax generate")

    def show(report: Mapping[str, Any]) -> None:
        if not command.stream:  # else all is printed
            print_text("\n\n".join(report["texts"]))

    return run_and_print(command.run, as_json=command.json, show=show)


def chat(args: Sequence[str]) -> int:
    """Runs `qlora-jax chat`; returns the exit status."""
    command = parse(Chat, args, prog="qlora-jax chat")
    command.run()
    return 0
