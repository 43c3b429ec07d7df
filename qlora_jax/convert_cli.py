"""`qlora-convert`: adapters and checkpoints between formats, on the command line.

Exit status: 0 done, 1 a failure the user can mend (one paragraph on stderr), 2 wrong
usage, 130 or 143 interrupted or terminated (nothing half-written is left). Of `verify`,
as of diff: 0 the same, 1 a difference found, 2 a failure.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import jax
import numpy as np
import tyro

from convert import names
from convert.checkpoint import lazy_base, open_checkpoint, open_config
from convert.files import (
    INDEX,
    SINGLE,
    carried,
    open_model,
)
from convert.hf import load_llama, save_llama
from convert.merging import add_to_report, merge, write_dense
from convert.peft import (
    in_short,
    load_adapter,
    open_adapter,
    peft_directory,
    save_adapter,
)
from convert.verify import Comparison
from qlora_jax.adapters import combine_adapters
from qlora_jax.bases import leads_nowhere, name_from
from qlora_jax.choices import Dtype, Quantization, Quantized
from qlora_jax.compare import compare_logits, dense_dtypes, load_exact, probe
from qlora_jax.config import LlamaConfig
from qlora_jax.errors import UserError
from qlora_jax.interruptions import STOPS, leave, stopped, termination_raises
from qlora_jax.lora_config import LoraConfig
from qlora_jax.options import explained, place
from qlora_jax.printed import print_report, said
from qlora_jax.verify_command import (
    Verify,
    elsewhere,
    form_of,
    own_modules,
    print_comparison,
)


def _say(note: str) -> None:
    print(f"Note: {note}.", file=sys.stderr)


@dataclass(frozen=True)
class Adapter:
    """Check an adapter against its base model and write a clean PEFT directory."""

    input: Annotated[tyro.conf.Positional[Path], place("IN")]
    """PEFT directory, or a run directory of qlora-jax (its adapter/ is taken)."""
    output: Annotated[tyro.conf.Positional[Path], place("OUT")]
    """Directory to create."""
    base: Path
    """The base model's directory; its config.json is read, and its embedding and head
    where IN has copies of them to compare."""
    base_name: str | None = None
    """What the new adapter_config.json names as its base. Default: as before, but a
    relative path that would not lead there from OUT becomes an absolute one."""
    strict: bool = True
    """Take what fits of an IN that does not fit to the letter, and name on stderr what
    is left out (default: such an IN is refused)."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report."""
        config = open_config(self.base)
        has_weights = any((self.base / name).is_file() for name in (SINGLE, INDEX))
        files = open_model(self.base) if has_weights else None
        source = peft_directory(self.input)
        skipped: list[str] = []
        lora, adapters = load_adapter(
            source, lazy_base(config, files), strict=self.strict, skipped=skipped
        )
        base_name = self.base_name
        if base_name is None:
            before = lora.base_model_name_or_path
            base_name = name_from(before, source, self.output, self.base)
            if leads_nowhere(before, source):
                _say(
                    f"`{before}`, the base of `{source}`, is no model directory; "
                    "--base-name names another"
                )
        save_adapter(
            self.output,
            lora,
            adapters,
            config,
            base_model_name_or_path=base_name,
            beside=carried(source),
        )
        for note in in_short(skipped):
            _say(f"not taken from `{source}`: {note}")
        return {
            "input": str(source),
            "output": str(self.output),
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "scaling": lora.scaling,
            "target_modules": lora.target_modules,
            "base_model_name_or_path": base_name,
            "base_fingerprint": lora.base_fingerprint,
            "skipped": skipped,
            "bytes": (self.output / "adapter_model.safetensors").stat().st_size,
        }


@dataclass(frozen=True)
class Merge:
    """Merge an adapter into its base: a checkpoint that needs no PEFT.

    The report is also written into OUT, as merge_report.json.
    """

    base: Annotated[tyro.conf.Positional[Path], place("BASE")]
    """The base model's directory."""
    adapter: Annotated[tyro.conf.Positional[Path], place("ADAPTER")]
    """PEFT directory, or a run directory of qlora-jax (its adapter/ is taken)."""
    output: Annotated[tyro.conf.Positional[Path], place("OUT")]
    """Directory to create."""
    onto: Literal["original", "dequantized"]
    """Which weights are added to: the 16 or 32-bit ones of BASE, or the 4-bit ones the
    adapter was trained on, dequantized."""
    quantization: Quantized | None = None
    """With --onto dequantized and a BASE that is not 4-bit: as in its training."""
    requantize: Quantized | None = None
    """Quantize the merged projections again, into a bitsandbytes-4bit directory. This
    loses precision; the report says how much."""
    dtype: Dtype | None = None
    """dtype of the result (default: each tensor's own)."""
    check: bool = True
    """Load nothing after merging (default: the model is loaded before and after, their
    logits are compared, and it is found out whether BASE, in the form that is merged
    onto, is what ADAPTER was trained on)."""
    probe: str | None = None
    """Text to compare logits on (default: 128 fixed token ids)."""
    max_shard_bytes: int = 5_000_000_000
    """Size above which the weights are split over several files."""
    json: bool = False
    """Print the report as JSON."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report."""
        source = peft_directory(self.adapter)
        config = open_config(self.base)
        lora = open_adapter(source)[0]
        tokens = probe(self.base, config, self.probe, [lora])
        report = merge(
            self.base,
            source,
            self.output,
            onto=self.onto,
            quantization=self.quantization,
            requantize=self.requantize,
            dtype=self.dtype,
            max_shard_bytes=self.max_shard_bytes,
            progress=sys.stderr.isatty(),
        )
        if not self.check:
            return report
        try:
            report.update(self._checked(config, source, lora, tokens))
        except (MemoryError, UserError, jax.errors.JaxRuntimeError) as error:
            raise UserError(
                f"`{self.output}` was written, and could not be checked: {error} "
                "With --no-check nothing is loaded after merging."
            ) from error
        add_to_report(self.output, report)
        return report

    def _checked(
        self, config: LlamaConfig, source: Path, lora: LoraConfig, tokens: np.ndarray
    ) -> dict[str, Any]:
        """What the report gets from loading the models."""
        form = form_of(self.base, lora)
        here: bool | None = None
        if form is False:
            here = False
            _say(elsewhere(source, self.base))
        elif form is not None:
            # The original weights were asked for by name, whatever was trained on.
            onto = form if self.onto == "original" else self._form()
            here = form == onto
            if not here:
                _say(
                    f"`{source}` was trained on `{self.base}` as {form}, and was "
                    f"merged onto {onto}"
                )
        out: dict[str, Any] = {
            "trained_on_this_base": here,
            "trained_form": form or None,
            "logits": None,
        }
        if config.extra_tensors:
            _say(own_modules(self.base))
            return out
        before = partial(
            load_exact, self.base, adapter=source, quantization=self.quantization
        )
        after = partial(load_exact, self.output)
        out["logits"] = compare_logits(before, after, tokens)
        return out

    def _form(self) -> str:
        """How the 4-bit weights merged onto are called, in words of `trained_form`."""
        # Tensors that stay dense are cast to the dtype of the result.
        dense = self.dtype or ", ".join(sorted(dense_dtypes(self.base)))
        return f"{self.quantization or '4-bit'}, {dense}"


@dataclass(frozen=True)
class Model:
    """Write a checkpoint in another dtype, quantized to NF4, or dequantized."""

    input: Annotated[tyro.conf.Positional[Path], place("IN")]
    """Hugging Face directory, dense or bitsandbytes-4bit."""
    output: Annotated[tyro.conf.Positional[Path], place("OUT")]
    """Directory to create."""
    quantization: Quantization = "none"
    """nf4 or nf4_dq (double quantization) write a bitsandbytes-4bit directory; none
    leaves every weight as it is, but for a projection that IN has in 4 bit in some
    layers only: it becomes dense in all."""
    dequantize: bool = False
    """Write the 4-bit weights of IN as dense ones, in the dtype they were quantized
    from."""
    dtype: Dtype | None = None
    """dtype of the dense tensors (default: each one's own)."""
    quant_storage: Literal["uint8", Dtype] | None = None
    """dtype that packed bytes are stored as (default: as in IN, else uint8)."""
    max_shard_bytes: int = 5_000_000_000
    """Size above which the weights are split over several files."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report."""
        checkpoint = open_checkpoint(self.input)
        quantized = checkpoint.quantized
        wanted = None if self.quantization == "none" else self.quantization
        show = sys.stderr.isatty()
        if self.dequantize and (wanted is not None or not quantized):
            reason = (
                "goes without --quantization"
                if wanted is not None
                else f"needs 4-bit weights, and `{self.input}` has none"
            )
            raise UserError(f"--dequantize {reason}.")
        if quantized and wanted is not None:
            raise UserError(
                f"`{self.input}` is quantized already; quantizing again would lose "
                "precision twice. Start from the original checkpoint, or leave out "
                "--quantization to keep the weights as they are."
            )
        made_dense = [] if self.dequantize else list(checkpoint.mixed)
        packed = {names.parse_key(key)[0] for key in checkpoint.packed}
        if self.quant_storage is not None and not (
            wanted is not None or not self.dequantize and packed - set(made_dense)
        ):
            raise UserError("--quant-storage goes with 4-bit output only.")
        if quantized and not self.dequantize or wanted is not None:
            config, base = load_llama(
                self.input, quantization=wanted, dtype=self.dtype, progress=show
            )
            save_llama(
                self.output,
                config,
                base,
                max_shard_bytes=self.max_shard_bytes,
                quant_storage=self.quant_storage,
                tokenizer_from=self.input,
                progress=show,
            )
        else:
            write_dense(
                self.input,
                self.output,
                dtype=self.dtype,
                max_shard_bytes=self.max_shard_bytes,
                progress=show,
            )
        written = list(self.output.glob("*.safetensors"))
        return {
            "input": str(self.input),
            "output": str(self.output),
            "quantization": wanted,
            "dequantized": self.dequantize,
            "made_dense": [".".join(path[:-1]) for path in made_dense],
            "files": len(written),
            "bytes": sum(f.stat().st_size for f in written),
        }


@dataclass(frozen=True)
class Combine:
    """Make one adapter of the weighted sum of several."""

    output: Annotated[tyro.conf.Positional[Path], place("OUT")]
    """Directory to create."""
    base: Path
    """The base model's directory; only its config.json is read."""
    adapters: tuple[Path, ...]
    """PEFT directories, or run directories of qlora-jax."""
    weights: tuple[float, ...] | None = None
    """One for each adapter (default: 1 each)."""
    method: Literal["cat", "svd"] = "cat"
    """cat: the sum itself, ranks add up. svd: the best approximation of rank --r."""
    r: int | None = None
    """With --method svd (default: the largest rank among the adapters)."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report."""
        config = open_config(self.base)
        weights = self.weights or (1.0,) * len(self.adapters)
        if len(weights) != len(self.adapters):
            raise UserError(
                f"--weights has {len(weights)} numbers for {len(self.adapters)} "
                "adapters."
            )
        base = lazy_base(config, None)
        sources = [peft_directory(path) for path in self.adapters]
        loaded = [load_adapter(path, base) for path in sources]
        errors: dict[str, float] = {}
        lora, adapters = combine_adapters(
            [(*one, w) for one, w in zip(loaded, weights, strict=True)],
            base,
            method=self.method,
            r=self.r,
            errors=errors,
            names=[str(path) for path in self.adapters],
        )
        names = {
            name_from(one.base_model_name_or_path, place, self.output, self.base)
            for place, (one, _) in zip(sources, loaded, strict=True)
        }
        save_adapter(
            self.output,
            lora,
            adapters,
            config,
            base_model_name_or_path=names.pop() if len(names) == 1 else None,
            beside=carried(*sources),
        )
        return {
            "output": str(self.output),
            "adapters": [str(path) for path in sources],
            "weights": list(weights),
            "method": self.method,
            "r": lora.r,
            "relative_error": errors,
        }


_Command = (
    Annotated[Adapter, tyro.conf.subcommand("adapter")]
    | Annotated[Combine, tyro.conf.subcommand("combine")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Model, tyro.conf.subcommand("model")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `qlora-convert`; returns the exit status (2 is raised as SystemExit)."""
    with explained():
        command = tyro.cli(
            _Command,  # pyright: ignore[reportArgumentType]
            prog="qlora-convert",
            description="Adapters and checkpoints between formats.",
            args=argv,
            config=(tyro.conf.FlagCreatePairsOff,),
        )
    try:
        with termination_raises():
            return _run(command)
    except UserError as error:
        print(f"qlora-convert: {error}", file=sys.stderr)
        return 2 if isinstance(command, Verify) else 1
    except STOPS as error:
        return stopped("qlora-convert", error, " Nothing half-written is left.")


def entry() -> NoReturn:
    """The console script: runs one command and leaves with its status."""
    leave(main())


def _run(command: Any) -> int:
    report = command.run()
    if isinstance(report, Comparison):
        if command.json:
            print(json.dumps(report.to_json(), indent=2))
        else:
            print_comparison(report)
        return 0 if report.equal else 1
    if command.json:
        print(json.dumps(report, indent=2))
    else:
        print_report(_for_people(report))
    return 0


def _for_people(report: Mapping[str, Any]) -> dict[str, Any]:
    """A report with what only JSON says otherwise in words."""
    shown = dict(report)
    if "skipped" in shown:  # they were named on stderr
        shown["skipped"] = len(shown["skipped"])
    if "made_dense" in shown and shown["quantization"] is None:
        shown["quantization"] = "none" if shown["dequantized"] else "unchanged"
    if "config_changes" in shown:
        shown["config_changes"] = {
            name: " -> ".join("none" if v is None else said(v) for v in pair)
            for name, pair in shown["config_changes"].items()
        }
    return shown


if __name__ == "__main__":
    entry()
