"""`qlora-convert`: adapters and checkpoints between formats, on the command line.

Exit status: 0 done (and, for `verify`, the same), 1 a failure the user can mend (one
paragraph on stderr) or a difference found, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from convert import names
from convert.checkpoint import open_checkpoint
from convert.hf import load_llama, save_llama
from convert.merging import merge, write_dense
from convert.peft import load_adapter, save_adapter
from convert.verify import Comparison, adapter_directory, compare
from qlora_jax.errors import UserError

_Dtype = Literal["float32", "bfloat16", "float16"]


def _place(name: str) -> Any:
    return tyro.conf.arg(metavar=name)


@dataclass(frozen=True)
class Adapter:
    """Check a LoRA adapter against its base model and write a clean PEFT directory."""

    input: Annotated[tyro.conf.Positional[Path], _place("IN")]
    """PEFT directory, or a run directory of qlora-jax (its adapter/ is taken)."""
    output: Annotated[tyro.conf.Positional[Path], _place("OUT")]
    """Directory to create."""
    base: Path
    """The base model's directory; only its config.json is read."""
    base_name: str | None = None
    """What the new adapter_config.json names as its base (default: as before)."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report."""
        from convert.files import check_model_directory, read_json
        from qlora_jax.config import LlamaConfig

        check_model_directory(self.base)
        config = LlamaConfig.from_hf(read_json(self.base / "config.json"))
        source = adapter_directory(self.input)
        lora, adapters = load_adapter(source, config)
        save_adapter(
            self.output,
            lora,
            adapters,
            config,
            base_model_name_or_path=self.base_name,
        )
        return {
            "input": str(source),
            "output": str(self.output),
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "scaling": lora.scaling,
            "target_modules": lora.target_modules,
            "bytes": (self.output / "adapter_model.safetensors").stat().st_size,
        }


@dataclass(frozen=True)
class Merge:
    """Merge a LoRA adapter into its base: a dense checkpoint that needs no PEFT."""

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
    dtype: _Dtype | None = None
    """dtype of the result (default: each tensor's own)."""
    max_shard_bytes: int = 5_000_000_000
    """Size above which the weights are split over several files."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> dict[str, Any]:
        """Does it; returns the report."""
        return merge(
            self.base,
            adapter_directory(self.adapter),
            self.output,
            onto=self.onto,
            quantization=self.quantization,
            dtype=self.dtype,
            max_shard_bytes=self.max_shard_bytes,
            progress=sys.stderr.isatty(),
        )


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
    """Compare two adapters or two checkpoints tensor by tensor."""

    a: Annotated[tyro.conf.Positional[Path], _place("A")]
    """PEFT, Hugging Face or run directory."""
    b: Annotated[tyro.conf.Positional[Path], _place("B")]
    """Another of the same kind."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> Comparison:
        """Does it; returns what was found."""
        return compare(self.a, self.b)


_Command = (
    Annotated[Adapter, tyro.conf.subcommand("adapter")]
    | Annotated[Merge, tyro.conf.subcommand("merge")]
    | Annotated[Model, tyro.conf.subcommand("model")]
    | Annotated[Verify, tyro.conf.subcommand("verify")]
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `qlora-convert`; returns the exit status (2 is raised as SystemExit)."""
    command = tyro.cli(
        _Command,  # pyright: ignore[reportArgumentType]
        prog="qlora-convert",
        description="Adapters and checkpoints between formats.",
        args=argv,
        config=(tyro.conf.FlagCreatePairsOff,),
    )
    try:
        report = command.run()
    except UserError as error:
        print(f"qlora-convert: {error}", file=sys.stderr)
        return 1
    if isinstance(report, Comparison):
        if command.json:
            print(json.dumps(report.to_json(), indent=2))
        else:
            _print_comparison(report)
        return 0 if report.equal else 1
    if command.json:
        print(json.dumps(report, indent=2))
    else:
        for name, value in report.items():
            print(f"{name}: {value}")
    return 0


# Differences shown; a dense and a 4-bit checkpoint differ in thousands of tensors.
_ROWS = 40


def _print_comparison(report: Comparison) -> None:
    from rich.console import Console
    from rich.table import Column, Table

    # Names of tensors are no markup: one that holds "[/b]" is printed as it is.
    console = Console(markup=False, emoji=False)
    if report.equal:
        console.print(f"The same: {report.tensors} tensors, byte for byte.")
        return
    table = Table(
        Column("what", overflow="fold"),
        "a",
        "b",
        "max |a - b|",
        title=f"a = {report.a}, b = {report.b}",
    )
    rows = [(name, *map(str, values), "") for name, values in report.config.items()]
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
    sys.exit(main())
