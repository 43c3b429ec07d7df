"""The `model` command of `qlora-convert`: a checkpoint in another form."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qlora_jax.choices import Dtype, Quantization
from qlora_jax.cli.options import FLAGS, PublishOptions, parse, path_argument
from qlora_jax.cli.output import print_report, run_and_print
from qlora_jax.errors import UserError


@dataclass(frozen=True)
class Model(PublishOptions):
    """Write a checkpoint in another dtype, in NF4, or dequantized."""

    input: Annotated[tyro.conf.Positional[Path], path_argument("IN")]
    """Model, dense or bitsandbytes-4bit: a directory or a name of the hub."""
    output: Annotated[tyro.conf.Positional[Path], path_argument("OUT")]
    """Directory to create."""
    quantization: Quantization = "none"
    """nf4 or nf4_dq (double quantization) write a bitsandbytes-4bit directory; none
    leaves every weight as it is, except a projection that IN has in 4 bits in some
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
        """Writes the directory; returns the report."""
        from convert import (
            load_llama,
            local_path,
            open_checkpoint,
            save_llama,
            write_dense,
        )
        from qlora_jax.runs import say_notes, say_unused
        from qlora_jax.tree import parse_key

        source = local_path(self.input)
        checkpoint = open_checkpoint(source)
        say_notes(source)
        say_unused(source, None)
        quantization = None if self.quantization == "none" else self.quantization
        self._check_dequantize(checkpoint.quantized, quantization)
        if checkpoint.quantized and quantization is not None:
            raise UserError(
                f"`{self.input}` is quantized already; quantizing again would lose "
                "precision twice. Start from the original checkpoint, or leave out "
                "--quantization to keep the weights as they are."
            )
        made_dense = [] if self.dequantize else list(checkpoint.mixed)
        packed = {parse_key(key)[0] for key in checkpoint.packed}
        stays_packed = not self.dequantize and bool(packed - set(made_dense))
        if self.quant_storage is not None and not (quantization or stays_packed):
            raise UserError("--quant-storage goes with 4-bit output only.")
        self.check_push(self.output)
        show = sys.stderr.isatty()
        if quantization is not None or (checkpoint.quantized and not self.dequantize):
            config, base = load_llama(
                source, quantization=quantization, dtype=self.dtype, progress=show
            )
            save_llama(
                self.output,
                config,
                base,
                max_shard_bytes=self.max_shard_bytes,
                quant_storage=self.quant_storage,
                tokenizer_from=source,
                progress=show,
            )
        else:
            write_dense(
                source,
                self.output,
                dtype=self.dtype,
                max_shard_bytes=self.max_shard_bytes,
                progress=show,
            )
        written = list(self.output.glob("*.safetensors"))
        return {
            "input": str(self.input),
            "output": str(self.output),
            "quantization": quantization,
            "dequantized": self.dequantize,
            "made_dense": [".".join(path[:-1]) for path in made_dense],
            "files": len(written),
            "bytes": sum(f.stat().st_size for f in written),
            **self.publish(
                self.output, base=source, relation=quantization and "quantized"
            ),
        }

    def _check_dequantize(self, quantized: bool, quantization: str | None) -> None:
        if not self.dequantize:
            return
        if quantization is not None:
            raise UserError("--dequantize goes without --quantization.")
        if not quantized:
            raise UserError(
                f"--dequantize needs 4-bit weights, and `{self.input}` has none."
            )


def _print(report: Mapping[str, Any]) -> None:
    quantization = report["quantization"]
    if quantization is None:
        quantization = "none" if report["dequantized"] else "unchanged"
    print_report({**report, "quantization": quantization})


def main(args: Sequence[str]) -> int:
    """Runs `qlora-convert model`; returns the exit status."""
    command = parse(Model, args, prog="qlora-convert model", config=FLAGS)
    return run_and_print(command.run, as_json=command.json, show=_print)
