"""The `merge` command of both programs: an adapter added into its base."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np
import tyro

from qlora_jax.choices import Dtype, Quantized
from qlora_jax.cli.options import FLAGS, PublishOptions, parse, path_argument
from qlora_jax.cli.output import format_value, print_note, print_report, run_and_print
from qlora_jax.cli.verify import custom_modules_note, other_base_note, trained_form_of
from qlora_jax.errors import UserError
from qlora_jax.lora import LoraConfig
from qlora_jax.models import LlamaConfig

if TYPE_CHECKING:
    from qlora_jax.runs import Resolved


@dataclass(frozen=True)
class Merge(PublishOptions):
    """Merge an adapter into its base: a checkpoint that needs no PEFT.

    The report is also written into OUT, as merge_report.json.
    """

    adapter: Annotated[tyro.conf.Positional[Path], path_argument("ADAPTER")]
    """Run directory (its adapter/ is taken), an adapter in one, PEFT directory, or name
    of the hub."""
    output: Annotated[tyro.conf.Positional[Path], path_argument("OUT")]
    """Directory to create."""
    base: Path | None = None
    """The base model's directory, where the adapter's configuration does not lead to
    it."""
    onto: Literal["original", "dequantized"] | None = None
    """Which weights are added to: the 16 or 32-bit ones of the base, or the 4-bit ones
    the adapter was trained on, dequantized. Default: what it was trained on, where that
    is recorded."""
    quantization: Quantized | None = None
    """With --onto dequantized and a base that is not 4-bit. Default: as in training,
    where that is recorded."""
    requantize: Quantized | None = None
    """Quantize the merged projections again, into a bitsandbytes-4bit directory. This
    loses precision; the report says how much."""
    resize_to_adapter: bool = False
    """Let the vocabulary of the base grow to that of an ADAPTER that was trained with
    added tokens (default: such an ADAPTER is refused)."""
    strict: bool = True
    """Merge what fits of an ADAPTER that does not fit exactly, and list on stderr what
    is left out (default: such an ADAPTER is refused)."""
    dtype: Dtype | None = None
    """dtype of the result (default: each tensor's own)."""
    check: bool = True
    """Load nothing after merging (default: the model is loaded before and after, their
    logits are compared, and the base, in the form that is merged onto, is compared with
    what the adapter was trained on)."""
    probe: str | None = None
    """Text to compare logits on (default: 128 fixed token ids)."""
    max_shard_bytes: int = 5_000_000_000
    """Size above which the weights are split over several files."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> dict[str, Any]:
        """Merges; returns the report."""
        import jax

        from convert import add_to_report, has_tokenizer, merge, open_config
        from qlora_jax.inference import probe
        from qlora_jax.runs import resolve

        resolved = resolve(self.adapter, self.base, strict=self.strict)
        source, lora = resolved.adapter, resolved.lora
        if source is None or lora is None:
            is_kind = "is not an adapter or a run directory"
            problem = is_kind if self.adapter.exists() else "does not exist"
            raise UserError(
                f"`{self.adapter}` {problem}. The base is found by the adapter's "
                "configuration, or given with --base: merge ADAPTER OUT --base BASE."
            )
        config = open_config(resolved.base)
        onto, quantization = self._choose_weights(resolved)
        self.check_push(self.output)
        text = source if has_tokenizer(source) else resolved.base
        tokens = probe(text, config, self.probe, [lora])
        report = merge(
            resolved.base,
            source,
            self.output,
            onto=onto,
            quantization=quantization,
            # As in training, where its quantization is what is merged onto.
            quantize_lm_head=quantization is not None
            and resolved.trained_form.get("quantization") == quantization
            and resolved.trained_form.get("lm_head") == "nf4",
            requantize=self.requantize,
            dtype=self.dtype,
            resize_to_adapter=self.resize_to_adapter,
            strict=self.strict,
            max_shard_bytes=self.max_shard_bytes,
            progress=sys.stderr.isatty(),
        )
        for note in report["notes"]:
            print_note(note)
        published = partial(
            self.publish,
            self.output,
            run=resolved.run,
            base=resolved.base,
            relation="finetune",
        )
        if not self.check:
            return report | published()
        try:
            report.update(self._check_result(report, config, lora, tokens))
        except (MemoryError, UserError, jax.errors.JaxRuntimeError) as error:
            raise UserError(
                f"`{self.output}` was written, and could not be checked: {error} "
                "With --no-check nothing is loaded after merging."
            ) from error
        add_to_report(self.output, report)
        return report | published()

    def _choose_weights(
        self, resolved: Resolved
    ) -> tuple[Literal["original", "dequantized"], Quantized | None]:
        """Returns `onto` and `quantization`: as given, else those of the training.

        Raises:
          UserError: neither is known.
        """
        from convert import open_checkpoint

        if open_checkpoint(resolved.base).quantized:
            return self.onto or "dequantized", self.quantization
        trained = resolved.trained_form.get("quantization")
        if trained == "none":
            trained = None
        elif trained is None and self.onto is None and self.quantization is None:
            raise UserError(
                f"`{resolved.adapter}` does not record what it was trained on. Say "
                "what to merge it onto: --onto original (the weights of "
                f"`{resolved.base}`, as PEFT does), or --onto dequantized "
                "--quantization nf4_dq (what QLoRA training saw of them)."
            )
        quantization = self.quantization or trained
        onto = self.onto or ("original" if quantization is None else "dequantized")
        return onto, quantization if onto == "dequantized" else self.quantization

    def _check_result(
        self,
        merged: Mapping[str, Any],
        config: LlamaConfig,
        lora: LoraConfig,
        tokens: np.ndarray,
    ) -> dict[str, Any]:
        """Loads the models before and after; returns what the report gets from that.

        Args:
          merged: report of `merge`.
          config: of the base.
          lora: of the adapter.
          tokens: to compare logits on.
        """
        from qlora_jax.inference import compare_logits, load_exact

        base, source = Path(merged["base"]), Path(merged["adapter"])
        form = trained_form_of(base, lora)
        report: dict[str, Any] = {
            "trained_on_this_base": self._is_trained_form(form, merged),
            "trained_form": form or None,
            "logits": None,
        }
        if config.extra_tensors:
            print_note(custom_modules_note(base))
            return report
        before = partial(
            load_exact,
            base,
            adapter=source,
            quantization=merged["quantization"],
            quantize_lm_head=merged["quantize_lm_head"],
            dtype="float32" if merged["dtype"] == "float32" else None,
            resize_to_adapter=self.resize_to_adapter,
            strict=self.strict,
        )
        after = partial(load_exact, self.output)
        report["logits"] = compare_logits(before, after, tokens)
        return report

    def _is_trained_form(
        self, form: str | Literal[False] | None, merged: Mapping[str, Any]
    ) -> bool | None:
        """Whether the adapter was trained on what it was merged onto; None: unknown."""
        from qlora_jax.inference import config_mismatch, dense_dtypes, form_name

        base, source = Path(merged["base"]), Path(merged["adapter"])
        if form is None:
            return None
        if form is False:
            print_note(other_base_note(source, base))
            return False
        mismatch = config_mismatch(source, base)
        if mismatch is not None:
            print_note(mismatch.removeprefix("Note: ").removesuffix("."))
            return False
        onto = form
        # With --onto original the user chose these weights, whatever was trained on.
        if merged["onto"] == "dequantized":
            # Tensors that stay dense are cast to the dtype of the result.
            dense = self.dtype or ", ".join(sorted(dense_dtypes(base)))
            name = merged["quantization"] or "4-bit"
            onto = f"{form_name(name, merged['quantize_lm_head'])}, {dense}"
        if form != onto:
            print_note(
                f"`{source}` was trained on `{base}` as {form}, and was merged onto "
                f"{onto}; --dtype and --quantization choose these"
            )
        return form == onto


def _print(report: Mapping[str, Any]) -> None:
    changes = {
        name: " -> ".join("none" if v is None else format_value(v) for v in pair)
        for name, pair in report["config_changes"].items()
    }
    print_report({**report, "config_changes": changes})


def main(args: Sequence[str], prog: str = "qlora-convert merge") -> int:
    """Runs the command; returns the exit status."""
    command = parse(Merge, args, prog=prog, config=FLAGS)
    return run_and_print(command.run, as_json=command.json, show=_print)


main_of_qlora_jax = partial(main, prog="qlora-jax merge")
