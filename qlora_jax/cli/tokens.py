"""The `tokens` command: untrained rows of the vocabulary, repaired; new tokens, added.

`qlora_jax.models.vocabulary` detects untrained rows. This module finds the tokens that
matter, those of a data file, the chat template and the tokenizer's special tokens, and
writes a new model directory in which all but the changed tables is the same byte for
byte.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from qlora_jax.cli.options import PublishOptions, parse, path_argument
from qlora_jax.cli.output import print_note, run_and_print
from qlora_jax.data import DataConfig, load_examples
from qlora_jax.errors import UserError, say

_NO_DATA = "none"  # special tokens and those of the chat template only


@dataclass(frozen=True)
class Tokens(PublishOptions):
    """Find untrained rows of the vocabulary; repair them; add tokens."""

    path: Annotated[tyro.conf.Positional[str], path_argument("PATH")]
    """Model directory, or a name of the hub."""
    data: DataConfig = field(default_factory=lambda: DataConfig(path=_NO_DATA))
    repair: Literal["none", "mean"] = "none"
    """Set the untrained rows that are used to the mean of the trained ones, and append
    such a row for each token of the tokenizer that has none; where there is nothing to
    repair, the model is written as it is, with a note."""
    add: tuple[str, ...] = ()
    """New tokens, added to the tokenizer and, as rows of that mean, to the tables."""
    output_dir: str | None = None
    """Directory to create with the changed model; goes with --repair and --add."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Reports untrained rows, and writes the changed model if there are changes."""
        from convert import check_new_directory, load_llama, load_tokenizer, local_path
        from qlora_jax.models import report_untrained
        from qlora_jax.runs import say_notes, say_unused

        if (self.repair != "none" or bool(self.add)) != (self.output_dir is not None):
            raise UserError(
                "--output-dir goes with --repair or --add, and they with it: the "
                "changed model is written there."
            )
        if self.push_to_hub is not None and self.output_dir is None:
            raise UserError("--push-to-hub goes with --output-dir.")
        if self.output_dir is not None:
            check_new_directory(Path(self.output_dir))
        source = local_path(self.path)
        say_notes(source)
        say_unused(source, None)
        tokenizer: Any = load_tokenizer(source)
        config, base = load_llama(source, quantization=None)
        if self.output_dir is not None:
            self.check_push(Path(self.output_dir))
        used = self._used(tokenizer, config.vocab_size)
        # A tokenizer may have tokens, such as one for padding, that never got a row.
        absent = [i for i in used if i >= config.vocab_size]
        untrained = report_untrained(base, used[: len(used) - len(absent)])
        report: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "tokenizer_size": None if tokenizer is None else len(tokenizer),
            "tokens_used": len(used),
            "used_without_a_row": [_token_label(i, tokenizer) for i in absent],
            "untrained_rows": dict(untrained.untrained),
            "untrained_and_used": {
                name: [_token_label(i, tokenizer) for i in ids]
                for name, ids in untrained.rows.items()
            },
        }
        if self.output_dir is None:
            return report
        config = self._write(source, config, base, untrained.rows, tokenizer, absent)
        first = 0 if tokenizer is None else len(tokenizer)
        return {
            **report,
            "new_tokens": list(range(first, first + len(self.add))),
            "new_vocab_size": config.vocab_size,
            "output": self.output_dir,
            **self.publish(Path(self.output_dir), base=source, relation="finetune"),
        }

    def _write(
        self,
        source: Path,
        config: Any,
        base: Any,
        rows: Any,
        tokenizer: Any,
        absent: list[int],
    ) -> Any:
        """Writes the changed model; returns its configuration."""
        import jax

        from convert import copy_with_added_tokens, save_llama, scratch_directory
        from qlora_jax.models import add_tokens, repair_rows

        assert self.output_dir is not None
        output = Path(self.output_dir)
        if self.repair != "none":
            if not any(rows.values()) and not absent:
                print_note(
                    "no token that is used has an untrained row, so --repair has "
                    f"nothing to do; `{output}` gets "
                    + ("the new tokens only" if self.add else "the model as it is")
                )
            base = repair_rows(base, rows, self.repair)
        if self.add:
            self._check_new(tokenizer)
        if self.add or absent:
            config, base = add_tokens(
                config, base, tokenizer_size=len(tokenizer), count=len(self.add)
            )
        with scratch_directory() as temporary:
            tokenizer_files = source
            if self.add:
                copy_with_added_tokens(tokenizer_files, temporary, list(self.add))
                tokenizer_files = temporary
            save_llama(
                output,
                config,
                jax.tree.map(np.asarray, base),
                tokenizer_from=tokenizer_files,
                progress=sys.stderr.isatty(),
            )
        return config

    def _check_new(self, tokenizer: Any) -> None:
        """Raises unless `add` names tokens that the tokenizer does not have."""
        if tokenizer is None:
            raise UserError(f"`{self.path}` has no tokenizer to add tokens to.")
        known = set(self.add) & set(tokenizer.get_vocab())
        if known or len(set(self.add)) != len(self.add):
            raise UserError(
                f"--add: {', '.join(map(repr, sorted(known) or self.add))} is in "
                "the tokenizer already, or given twice."
            )

    def _used(self, tokenizer: Any, vocab_size: int) -> list[int]:
        """Returns the ids of the tokens that `data` and the tokenizer use."""
        if self.data.path == _NO_DATA:
            special = [] if tokenizer is None else tokenizer.all_special_ids
            return used_tokens(np.asarray(special, np.int32), tokenizer)
        if tokenizer is None and self.data.needs_tokenizer:
            raise UserError("The model has no tokenizer, which the data needs.")
        examples = load_examples(self.data, tokenizer, vocab_size=vocab_size)
        say(examples.report.summary())
        return used_tokens(examples.used(), tokenizer)


def used_tokens(tokens: np.ndarray, tokenizer: Any) -> list[int]:
    """Returns the ids in an array, and those that the chat template may produce."""
    ids = set(np.unique(tokens).tolist())
    if tokenizer is not None:
        template = tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        ids |= {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            # Branches of the template that this data did not take count too.
            if any(str(token) in text for text in texts)
        }
    return sorted(ids)


def _token_label(index: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return str(index)
    return f"{index} {tokenizer.convert_ids_to_tokens(index)!r}"


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax tokens`; returns the exit status."""
    command = parse(Tokens, args, prog="qlora-jax tokens")
    return run_and_print(command.run, as_json=command.json)
