"""The `quantize` command: a checkpoint in 4 bits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from qlora_jax.choices import Dtype, Quantized
from qlora_jax.cli.options import PublishOptions, parse, path_argument
from qlora_jax.cli.output import run_and_print
from qlora_jax.errors import UserError


@dataclass(frozen=True)
class Quantize(PublishOptions):
    """Quantize a checkpoint to a bitsandbytes-4bit directory (NF4)."""

    input: Annotated[tyro.conf.Positional[str], path_argument("IN")]
    """Model of 16- or 32-bit weights: a directory or a name of the hub."""
    output: Annotated[tyro.conf.Positional[str], path_argument("OUT")]
    """Directory to create."""
    quantization: Quantized = "nf4_dq"
    """NF4, or NF4 with double quantization."""
    dtype: Dtype | None = None
    """Of the tensors that stay dense; default as in the file."""
    json: bool = False
    """Print a JSON object."""

    def run(self) -> dict[str, Any]:
        """Writes the directory; returns the report."""
        from convert import (
            check_new_directory,
            load_llama,
            local_path,
            open_checkpoint,
            save_llama,
        )
        from qlora_jax.runs import say_notes, say_unused

        check_new_directory(Path(self.output))
        directory = local_path(self.input)
        source = open_checkpoint(directory)
        say_notes(directory)
        say_unused(directory, None)
        if source.quantized:
            raise UserError(
                f"`{self.input}` is quantized already; its packed weights would be "
                "written as they are. Give the original 16-bit checkpoint."
            )
        self.check_push(Path(self.output))
        before = sum(source.files[name].nbytes for name in source.files)
        config, base = load_llama(
            directory, quantization=self.quantization, dtype=self.dtype, progress=True
        )
        save_llama(self.output, config, base, tokenizer_from=directory, progress=True)
        after = sum(p.stat().st_size for p in Path(self.output).glob("*.safetensors"))
        return {
            "output": self.output,
            "bytes_before": before,
            "bytes_after": after,
            "ratio": after / before,
            **self.publish(Path(self.output), base=directory, relation="quantized"),
        }


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax quantize`; returns the exit status."""
    command = parse(Quantize, args, prog="qlora-jax quantize")
    return run_and_print(command.run, as_json=command.json)
