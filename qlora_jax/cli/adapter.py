"""The `adapter` command of `qlora-convert`: a PEFT directory, checked and rewritten."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from qlora_jax.cli.options import FLAGS, PublishOptions, parse, path_argument
from qlora_jax.cli.output import print_note, print_report, run_and_print
from qlora_jax.errors import UserError


@dataclass(frozen=True)
class Adapter(PublishOptions):
    """Check an adapter against its base and write a clean PEFT directory."""

    input: Annotated[tyro.conf.Positional[Path], path_argument("IN")]
    """PEFT directory, run directory of qlora-jax (its adapter/ is taken), or name of
    the hub."""
    output: Annotated[tyro.conf.Positional[Path], path_argument("OUT")]
    """Directory to create."""
    base: Path | None = None
    """The base model's directory, where IN's configuration does not lead to it. Its
    config.json is read, and its embedding and head where IN has copies of them."""
    base_name: str | None = None
    """Base to name in the new adapter_config.json. Default: as before, but a relative
    path that would not lead there from OUT becomes an absolute one."""
    resize_to_adapter: bool = False
    """Take an IN that was trained with more tokens than BASE has."""
    strict: bool = True
    """Take what fits of an IN that does not fit exactly, and list on stderr what is
    left out (default: such an IN is refused)."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> dict[str, Any]:
        """Writes the directory; returns the report."""
        from convert import (
            WEIGHTS_FILE,
            WEIGHTS_INDEX,
            common_record,
            common_text_files,
            lazy_base,
            load_adapter,
            open_config,
            open_model,
            save_adapter,
            shorten,
            with_saved_tables,
        )
        from qlora_jax.runs import base_name_for_copy, is_broken_path, resolve

        resolved = resolve(self.input, self.base, strict=self.strict)
        base, source = resolved.base, resolved.adapter
        if source is None:
            raise UserError(
                f"`{self.input}` is not an adapter or a run directory: it has no "
                "adapter_config.json."
            )
        self.check_push(self.output)
        config = open_config(base)
        has_weights = any(
            (base / name).is_file() for name in (WEIGHTS_FILE, WEIGHTS_INDEX)
        )
        files = open_model(base) if has_weights else None
        skipped: list[str] = []
        grown = with_saved_tables(
            config, lazy_base(config, files), source, resize=self.resize_to_adapter
        )
        if grown.taken and files is None:
            raise UserError(
                f"`{source}` holds tables of its base, and `{base}` has no "
                "weights to compare them with. Give the complete base."
            )
        lora, adapters = load_adapter(
            source, grown.base, strict=self.strict, skipped=skipped
        )
        base_name = self.base_name
        if base_name is None:
            before = lora.base_model_name_or_path
            base_name = base_name_for_copy(before, source, self.output, base)
            if is_broken_path(before, source):
                print_note(
                    f"`{before}`, the base of `{source}`, is not a model directory; "
                    "--base-name names another"
                )
        save_adapter(
            self.output,
            lora,
            adapters,
            grown.config,
            base_tables=grown.tables,
            base_model_name_or_path=base_name,
            extra_files={**common_text_files(source), **common_record(source)},
        )
        for skip in shorten(skipped):
            print_note(f"not taken from `{source}`: {skip}")
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
            **self.publish(self.output, run=resolved.run, base=base),
        }


def _print(report: Mapping[str, Any]) -> None:
    # What was left out was named on stderr.
    print_report({**report, "skipped": len(report["skipped"])})


def main(args: Sequence[str]) -> int:
    """Runs `qlora-convert adapter`; returns the exit status."""
    command = parse(Adapter, args, prog="qlora-convert adapter", config=FLAGS)
    return run_and_print(command.run, as_json=command.json, show=_print)
