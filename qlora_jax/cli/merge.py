"""The `merge` command of `qlora-convert`: an adapter added into its base."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import tyro

from qlora_jax.choices import Dtype, Quantized
from qlora_jax.cli.options import FLAGS, parse, path_argument
from qlora_jax.cli.output import format_value, print_note, print_report, run_and_print
from qlora_jax.cli.verify import custom_modules_note, other_base_note, trained_form_of
from qlora_jax.errors import UserError
from qlora_jax.lora import LoraConfig
from qlora_jax.models import LlamaConfig


@dataclass(frozen=True)
class Merge:
    """Merge an adapter into its base: a checkpoint that needs no PEFT.

    The report is also written into OUT, as merge_report.json.
    """

    base: Annotated[tyro.conf.Positional[Path], path_argument("BASE")]
    """The base model's directory."""
    adapter: Annotated[tyro.conf.Positional[Path], path_argument("ADAPTER")]
    """PEFT directory, or a run directory of qlora-jax (its adapter/ is taken)."""
    output: Annotated[tyro.conf.Positional[Path], path_argument("OUT")]
    """Directory to create."""
    onto: Literal["original", "dequantized"]
    """Which weights are added to: the 16 or 32-bit ones of BASE, or the 4-bit ones the
    adapter was trained on, dequantized."""
    quantization: Quantized | None = None
    """With --onto dequantized and a BASE that is not 4-bit: as in its training."""
    requantize: Quantized | None = None
    """Quantize the merged projections again, into a bitsandbytes-4bit directory. This
    loses precision; the report says how much."""
    resize_to_adapter: bool = False
    """Let the vocabulary of BASE grow to that of an ADAPTER trained with added tokens
    (default: such an ADAPTER is refused)."""
    strict: bool = True
    """Merge what fits of an ADAPTER that does not fit exactly, and list on stderr what
    is left out (default: such an ADAPTER is refused)."""
    dtype: Dtype | None = None
    """dtype of the result (default: each tensor's own)."""
    check: bool = True
    """Load nothing after merging (default: the model is loaded before and after, their
    logits are compared, and BASE, in the form that is merged onto, is compared with
    what ADAPTER was trained on)."""
    probe: str | None = None
    """Text to compare logits on (default: 128 fixed token ids)."""
    max_shard_bytes: int = 5_000_000_000
    """Size above which the weights are split over several files."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> dict[str, Any]:
        """Merges; returns the report."""
        import jax

        from convert import (
            add_to_report,
            merge,
            open_adapter,
            open_config,
            peft_directory,
        )
        from qlora_jax.inference import probe

        source = peft_directory(self.adapter)
        config = open_config(self.base)
        lora = open_adapter(source, strict=self.strict)[0]
        tokens = probe(self.base, config, self.probe, [lora])
        report = merge(
            self.base,
            source,
            self.output,
            onto=self.onto,
            quantization=self.quantization,
            requantize=self.requantize,
            dtype=self.dtype,
            resize_to_adapter=self.resize_to_adapter,
            strict=self.strict,
            max_shard_bytes=self.max_shard_bytes,
            progress=sys.stderr.isatty(),
        )
        for note in report["notes"]:
            print_note(note)
        if not self.check:
            return report
        try:
            report.update(self._check_result(config, source, lora, tokens))
        except (MemoryError, UserError, jax.errors.JaxRuntimeError) as error:
            raise UserError(
                f"`{self.output}` was written, and could not be checked: {error} "
                "With --no-check nothing is loaded after merging."
            ) from error
        add_to_report(self.output, report)
        return report

    def _check_result(
        self, config: LlamaConfig, source: Path, lora: LoraConfig, tokens: np.ndarray
    ) -> dict[str, Any]:
        """Loads the models before and after; returns what the report gets from that."""
        from qlora_jax.inference import compare_logits, load_exact

        form = trained_form_of(self.base, lora)
        report: dict[str, Any] = {
            "trained_on_this_base": self._is_trained_form(form, source),
            "trained_form": form or None,
            "logits": None,
        }
        if config.extra_tensors:
            print_note(custom_modules_note(self.base))
            return report
        before = partial(
            load_exact,
            self.base,
            adapter=source,
            quantization=self.quantization,
            resize_to_adapter=self.resize_to_adapter,
            strict=self.strict,
        )
        after = partial(load_exact, self.output)
        report["logits"] = compare_logits(before, after, tokens)
        return report

    def _is_trained_form(self, form: str | Literal[False] | None, source: Path) -> Any:
        """Whether the adapter was trained on what it was merged onto; None: unknown."""
        if form is None:
            return None
        if form is False:
            print_note(other_base_note(source, self.base))
            return False
        # With --onto original the user chose these weights, whatever was trained on.
        onto = form if self.onto == "original" else self._dequantized_form()
        if form != onto:
            print_note(
                f"`{source}` was trained on `{self.base}` as {form}, and was "
                f"merged onto {onto}"
            )
        return form == onto

    def _dequantized_form(self) -> str:
        """Names the dequantized weights as `trained_form` does."""
        from qlora_jax.inference import dense_dtypes

        # Tensors that stay dense are cast to the dtype of the result.
        dense = self.dtype or ", ".join(sorted(dense_dtypes(self.base)))
        return f"{self.quantization or '4-bit'}, {dense}"


def _print(report: Mapping[str, Any]) -> None:
    changes = {
        name: " -> ".join("none" if v is None else format_value(v) for v in pair)
        for name, pair in report["config_changes"].items()
    }
    print_report({**report, "config_changes": changes})


def main(args: Sequence[str]) -> int:
    """Runs `qlora-convert merge`; returns the exit status."""
    command = parse(Merge, args, prog="qlora-convert merge", config=FLAGS)
    return run_and_print(command.run, as_json=command.json, show=_print)
