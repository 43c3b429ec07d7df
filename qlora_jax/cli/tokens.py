"""The `tokens` command: untrained rows of the vocabulary, repaired; new tokens, added.

Which rows were never trained is the affair of `qlora_jax.models.vocabulary`; here are the
files: the tokens that a data file, the chat template and the tokenizer's special tokens
use, and a new model directory with the tables changed and all else byte for byte as it
was.
"""

from __future__ import annotations

import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from qlora_jax.cli.options import parse, path_argument
from qlora_jax.cli.output import run_and_print
from qlora_jax.data.config import DataConfig
from qlora_jax.data.examples import load_examples
from qlora_jax.errors import UserError

_NO_DATA = "none"  # the special tokens and those of the chat template alone


@dataclass(frozen=True)
class Tokens:
    """Find untrained rows of the vocabulary; repair them; add tokens."""

    path: Annotated[tyro.conf.Positional[str], path_argument("PATH")]
    """Model directory."""
    data: DataConfig = field(default_factory=lambda: DataConfig(path=_NO_DATA))
    repair: Literal["none", "mean"] = "none"
    """Set the untrained rows that are used to the mean of the trained ones; where there
    are none, the model is written as it is, with a note."""
    add: tuple[str, ...] = ()
    """New tokens, added to the tokenizer and, as rows of that mean, to the tables."""
    output_dir: str | None = None
    """Directory to create with the changed model; goes with --repair and --add."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Reports untrained rows and writes the changed model, if one is asked for."""
        import jax

        from convert.hf import load_llama, save_llama
        from convert.output import check_new_directory
        from convert.tokenizer import load_tokenizer
        from qlora_jax.models.vocabulary import (
            add_tokens,
            repair_rows,
            report_untrained,
        )

        changes = self.repair != "none" or bool(self.add)
        if changes != (self.output_dir is not None):
            raise UserError(
                "--output-dir goes with --repair or --add, and they with it: the "
                "changed model is written there."
            )
        if self.output_dir is not None:
            check_new_directory(Path(self.output_dir))
        tokenizer: Any = load_tokenizer(self.path)
        config, base = load_llama(self.path, quantization=None)
        used = _used(self.data, tokenizer, config.vocab_size)
        untrained = report_untrained(base, used)
        report: dict[str, Any] = {
            "vocab_size": config.vocab_size,
            "tokenizer_size": None if tokenizer is None else len(tokenizer),
            "tokens_used": len(used),
            "untrained_rows": dict(untrained.untrained),
            "untrained_and_used": {
                name: [_named(i, tokenizer) for i in ids]
                for name, ids in untrained.rows.items()
            },
        }
        if self.output_dir is None:
            return report
        if self.repair != "none" and not any(untrained.rows.values()):
            print(
                "Note: no token that is used has an untrained row, so --repair has "
                f"nothing to do; `{self.output_dir}` gets "
                + ("the new tokens alone." if self.add else "the model as it is."),
                file=sys.stderr,
            )
        first = 0 if tokenizer is None else len(tokenizer)
        if self.repair != "none":
            base = repair_rows(base, untrained.rows, self.repair)
        if self.add:
            if tokenizer is None:
                raise UserError(f"`{self.path}` has no tokenizer to add tokens to.")
            known = set(self.add) & set(tokenizer.get_vocab())
            if known or len(set(self.add)) != len(self.add):
                raise UserError(
                    f"--add: {', '.join(map(repr, sorted(known) or self.add))} is in "
                    "the tokenizer already, or given twice."
                )
            config, base = add_tokens(
                config, base, tokenizer_size=len(tokenizer), count=len(self.add)
            )
        with tempfile.TemporaryDirectory() as grown:
            companions = Path(self.path)
            if self.add:
                assert tokenizer is not None
                tokenizer.add_tokens(list(self.add), special_tokens=True)
                tokenizer.save_pretrained(grown)
                generation = companions / "generation_config.json"
                if generation.is_file():
                    shutil.copy(generation, grown)
                companions = Path(grown)
            save_llama(
                self.output_dir,
                config,
                jax.tree.map(np.asarray, base),
                tokenizer_from=companions,
                progress=sys.stderr.isatty(),
            )
        return {
            **report,
            "new_tokens": list(range(first, first + len(self.add))),
            "new_vocab_size": config.vocab_size,
            "output": self.output_dir,
        }


def used_tokens(tokens: np.ndarray, tokenizer: Any) -> list[int]:
    """Ids in an array of tokens, and those that the chat template may produce."""
    found = set(np.unique(tokens).tolist())
    if tokenizer is not None:
        template = tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template or ""]
        found |= {
            index
            for index, token in tokenizer.added_tokens_decoder.items()
            if any(str(token) in text for text in texts)
        }
    return sorted(found)


def _used(data: DataConfig, tokenizer: Any, vocab_size: int) -> list[int]:
    if data.path == _NO_DATA:
        special = [] if tokenizer is None else tokenizer.all_special_ids
        return used_tokens(np.asarray(special, np.int32), tokenizer)
    if tokenizer is None and data.needs_tokenizer:
        raise UserError("The model has no tokenizer, which the data needs.")
    examples = load_examples(data, tokenizer, vocab_size=vocab_size)
    print(examples.report.summary(), file=sys.stderr)
    return used_tokens(examples.used(), tokenizer)


def _named(index: int, tokenizer: Any) -> str:
    if tokenizer is None:
        return str(index)
    return f"{index} {tokenizer.convert_ids_to_tokens(index)!r}"


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax tokens`; returns the exit status."""
    command = parse(Tokens, args, prog="qlora-jax tokens")
    return run_and_print(command.run, as_json=command.json)
