"""`qlora-convert`: adapters and checkpoints between formats, on the command line.

Exit status: 0 done, 1 a failure the user can mend (one paragraph on stderr), 2 wrong
usage, 130 or 143 interrupted or terminated (nothing half-written is left). Of `verify`,
as of diff: 0 the same, 1 a difference found, 2 a failure.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn

import jax
import numpy as np
import tyro

from convert import names
from convert.checkpoint import lazy_base, open_checkpoint
from convert.files import (
    INDEX,
    SINGLE,
    carried,
    check_model_directory,
    open_model,
    read_json,
)
from convert.hf import load_llama, save_llama
from convert.merging import add_to_report, merge, write_dense
from convert.peft import in_short, load_adapter, open_adapter, save_adapter
from convert.verify import Comparison, adapter_directory, compare
from qlora_jax.adapters import combine_adapters
from qlora_jax.bases import leads_nowhere, name_from
from qlora_jax.compare import (
    compare_logits,
    dense_dtypes,
    load_exact,
    probe_text,
    probe_tokens,
    trained_form,
)
from qlora_jax.config import LlamaConfig
from qlora_jax.config_changes import change
from qlora_jax.errors import UserError
from qlora_jax.interruptions import STOPS, leave, stopped, termination_raises
from qlora_jax.lora_config import LoraConfig
from qlora_jax.options import explained
from qlora_jax.printed import print_report, said

_Dtype = Literal["float32", "bfloat16", "float16"]


def _place(name: str) -> Any:
    return tyro.conf.arg(metavar=name)


def _say(note: str) -> None:
    print(f"Note: {note}.", file=sys.stderr)


def _config(path: Path) -> LlamaConfig:
    check_model_directory(path)
    return LlamaConfig.from_hf(read_json(path / "config.json"))


@dataclass(frozen=True)
class Adapter:
    """Check an adapter against its base model and write a clean PEFT directory."""

    input: Annotated[tyro.conf.Positional[Path], _place("IN")]
    """PEFT directory, or a run directory of qlora-jax (its adapter/ is taken)."""
    output: Annotated[tyro.conf.Positional[Path], _place("OUT")]
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
        config = _config(self.base)
        has_weights = any((self.base / name).is_file() for name in (SINGLE, INDEX))
        files = open_model(self.base) if has_weights else None
        source = adapter_directory(self.input)
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

    base: Annotated[tyro.conf.Positional[Path], _place("BASE")]
    """The base model's directory."""
    adapter: Annotated[tyro.conf.Positional[Path], _place("ADAPTER")]
    """PEFT directory, or a run directory of qlora-jax (its adapter/ is taken)."""
    output: Annotated[tyro.conf.Positional[Path], _place("OUT")]
    """Directory to create."""
    onto: Literal["original", "dequantized"]
    """Which weights are added to: the 16 or 32-bit ones of BASE, or the 4-bit ones the
    adapter was trained on, dequantized."""
    quantization: Literal["nf4", "nf4_dq"] | None = None
    """With --onto dequantized and a BASE that is not 4-bit: as in its training."""
    requantize: Literal["nf4", "nf4_dq"] | None = None
    """Quantize the merged projections again, into a bitsandbytes-4bit directory. This
    loses precision; the report says how much."""
    dtype: _Dtype | None = None
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
        source = adapter_directory(self.adapter)
        config = _config(self.base)
        lora = open_adapter(source)[0]
        tokens = _probe(self.base, config, self.probe, [lora])
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
        form = _trained_form(self.base, lora)
        here: bool | None = None
        if form is False:
            here = False
            _say(_elsewhere(source, self.base))
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
            _say(_own_modules(self.base))
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


def _probe(
    path: Path, config: LlamaConfig, text: str | None, loras: Sequence[LoraConfig] = ()
) -> np.ndarray:
    """What models are asked: a text, or fixed ids with those that were trained."""
    if text is not None:
        return probe_text(path, config, text)
    trained: set[int] = set()
    for lora in loras:
        rows = lora.trainable_token_indices or ()
        for indices in rows.values() if isinstance(rows, Mapping) else (rows,):
            trained.update(i for i in indices if i < config.vocab_size)
    return probe_tokens(config, trained)


def _trained_form(base: Path, lora: LoraConfig) -> str | Literal[False] | None:
    """In which form of this base an adapter was trained; None if it does not say."""
    if lora.base_fingerprint is None:
        return None
    return trained_form(base, lora.base_fingerprint) or False


def _own_modules(base: Path | None) -> str:
    return (
        f"logits were not compared: `{base}` has modules of its own, and a directory "
        "does not say how they compute"
    )


def _elsewhere(adapter: Path, base: Path) -> str:
    return f"`{adapter}` was trained on another base than `{base}`"


@dataclass(frozen=True)
class Model:
    """Write a checkpoint in another dtype, quantized to NF4, or dequantized."""

    input: Annotated[tyro.conf.Positional[Path], _place("IN")]
    """Hugging Face directory, dense or bitsandbytes-4bit."""
    output: Annotated[tyro.conf.Positional[Path], _place("OUT")]
    """Directory to create."""
    quantization: Literal["nf4", "nf4_dq", "none"] = "none"
    """nf4 or nf4_dq (double quantization) write a bitsandbytes-4bit directory; none
    leaves every weight as it is, but for a projection that IN has in 4 bit in some
    layers only: it becomes dense in all."""
    dequantize: bool = False
    """Write the 4-bit weights of IN as dense ones, in the dtype they were quantized
    from."""
    dtype: _Dtype | None = None
    """dtype of the dense tensors (default: each one's own)."""
    quant_storage: Literal["uint8", "bfloat16", "float16", "float32"] | None = None
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
class Verify:
    """Compare two adapters or two checkpoints tensor by tensor.

    Exit status, as of diff: 0 the same, 1 different, 2 a failure.
    """

    a: Annotated[tyro.conf.Positional[Path], _place("A")]
    """PEFT, Hugging Face or run directory."""
    b: Annotated[tyro.conf.Positional[Path], _place("B")]
    """Another of the same kind."""
    base: Path | None = None
    """The base of two adapters: compare what they select in it, and the logits that
    they give it, and find out whether it is what they were trained on."""
    logits: bool = False
    """Compare the logits of two checkpoints as well."""
    probe: str | None = None
    """Text to compare logits on (default: 128 fixed token ids)."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> Comparison:
        """Does it; returns what was found."""
        base = None if self.base is None else _config(self.base)
        found = compare(self.a, self.b, base=base)
        if base is not None and base.extra_tensors:
            found.notes.append(_own_modules(self.base))
            return found
        if self.base is not None and base is not None:
            a, b = adapter_directory(self.a), adapter_directory(self.b)
            loras = {path: open_adapter(path)[0] for path in (a, b)}
            tokens = _probe(self.base, base, self.probe, list(loras.values()))
            found.notes.extend(
                _elsewhere(path, self.base)
                for path, lora in loras.items()
                if _trained_form(self.base, lora) is False
            )
            one, two = _on_one_base(self.base, a, b)
        elif found.kind == "model" and (self.logits or self.probe is not None):
            tokens = _probe(self.a, _config(self.a), self.probe)
            one, two = partial(load_exact, self.a), partial(load_exact, self.b)
        elif self.logits or self.probe is not None:
            raise UserError(
                "The logits of two adapters are compared on their base; give it with "
                "--base."
            )
        else:
            return found
        return dataclasses.replace(found, logits=compare_logits(one, two, tokens))


def _on_one_base(base: Path, a: Path, b: Path) -> tuple[Callable[[], Any], ...]:
    """Loaders of two adapters that share one base in memory."""
    model = load_exact(base)

    def with_adapter(path: Path) -> Any:
        lora, adapters = load_adapter(path, model.base)
        config = change(model.config, lora.base_config_changes)
        return dataclasses.replace(
            model, config=config, lora_config=lora, adapters=adapters
        )

    return partial(with_adapter, a), partial(with_adapter, b)


@dataclass(frozen=True)
class Combine:
    """Make one adapter of the weighted sum of several."""

    output: Annotated[tyro.conf.Positional[Path], _place("OUT")]
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
        config = _config(self.base)
        weights = self.weights or (1.0,) * len(self.adapters)
        if len(weights) != len(self.adapters):
            raise UserError(
                f"--weights has {len(weights)} numbers for {len(self.adapters)} "
                "adapters."
            )
        base = lazy_base(config, None)
        sources = [adapter_directory(path) for path in self.adapters]
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
            _print_comparison(report)
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


# Differences shown; a dense and a 4-bit checkpoint differ in thousands of tensors.
_ROWS = 40
# Characters in a line that is not wrapped: no name of a tensor comes near it.
_UNBROKEN = 1000


def _print_comparison(report: Comparison) -> None:
    from rich.console import Console

    # Names of tensors are no markup: one that holds "[/b]" is printed as it is.
    console = Console(markup=False, emoji=False)
    if not console.is_terminal:  # who reads on wants whole names and whole lines
        console = Console(markup=False, emoji=False, width=_UNBROKEN)
    if report.equal:
        console.print(f"The same: {report.tensors} tensors, byte for byte.")
    else:
        _print_differences(report, console)
    for note in report.notes:
        console.print(f"Note: {note}.")
    if report.logits is not None:
        console.print(
            "Logits on {probe_tokens} tokens: max |a - b| {max_abs_difference:.3g} "
            "(largest logit {max_abs_logit:.3g}), KL(a || b) {mean_kl:.3g} on average "
            "and {max_kl:.3g} at most, same top token {same_top_token:.1%}.".format(
                **report.logits
            )
        )


def _print_differences(report: Comparison, console: Any) -> None:
    from rich.table import Column, Table

    table = Table(
        Column("what", overflow="fold"),
        "a",
        "b",
        "max |a - b|",
        title=f"a = {report.a}, b = {report.b}",
    )
    rows = [
        (name, *("-" if value is None else str(value) for value in values), "")
        for name, values in report.config.items()
    ]
    for d in report.different:
        largest = d.max_abs_difference
        rows.append((d.name, d.a, d.b, "" if largest is None else f"{largest:.3g}"))
    rows += [(name, "present", "missing", "") for name in report.missing]
    rows += [(name, "missing", "present", "") for name in report.extra]
    for row in rows[:_ROWS]:
        table.add_row(*row)
    console.print(table)
    if len(rows) > _ROWS:
        console.print(f"... and {len(rows) - _ROWS:,} more (--json lists all).")
    console.print(
        f"Different: {len(report.different)} of {report.tensors} tensors; "
        f"{len(report.missing)} missing, {len(report.extra)} extra, "
        f"{len(report.config)} configuration fields."
    )


if __name__ == "__main__":
    entry()
