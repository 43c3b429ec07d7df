"""The `combine` command of `qlora-convert`: the weighted sum of several adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from qlora_jax.cli.options import FLAGS, PublishOptions, parse, path_argument
from qlora_jax.cli.output import print_note, run_and_print
from qlora_jax.errors import UserError
from qlora_jax.lora import LoraConfig


@dataclass(frozen=True)
class Combine(PublishOptions):
    """Make one adapter of the weighted sum of several."""

    output: Annotated[tyro.conf.Positional[Path], path_argument("OUT")]
    """Directory to create."""
    adapters: tuple[Path, ...]
    """PEFT directories, run directories of qlora-jax, or names of the hub."""
    base: Path | None = None
    """The base model's directory, where the first adapter's configuration does not lead
    to it; only its config.json is read."""
    weights: tuple[float, ...] | None = None
    """One for each adapter (default: 1 each)."""
    method: Literal["cat", "svd"] = "cat"
    """cat: the sum itself, ranks add up. svd: the best approximation of rank --r."""
    r: int | None = None
    """With --method svd (default: the largest rank among the adapters)."""
    base_name: str | None = None
    """Base to name in the new adapter_config.json. Default: the one that all adapters
    name, if they do."""
    json: bool = False
    """Print a report as JSON."""

    def run(self) -> dict[str, Any]:
        """Writes the directory; returns the report."""
        from convert import (
            common_record,
            lazy_base,
            local_path,
            open_config,
            peft_directory,
            save_adapter,
            with_saved_tables,
        )
        from qlora_jax.lora import combine_adapters
        from qlora_jax.runs import base_name_for_copy, resolve

        weights = self.weights or (1.0,) * len(self.adapters)
        if len(weights) != len(self.adapters):
            raise UserError(
                f"--weights has {len(weights)} numbers for {len(self.adapters)} "
                "adapters."
            )
        adapters = [local_path(path) for path in self.adapters]
        directory = None if self.base is None else local_path(self.base)
        if directory is None:
            directory = resolve(adapters[0], needed="configuration").base
        config = open_config(directory)
        self.check_push(self.output)
        base = lazy_base(config, None)
        sources = [peft_directory(path) for path in adapters]
        for path in sources:
            if with_saved_tables(config, base, path).taken:
                raise UserError(
                    f"`{path}` holds tables of its base, of which there is no sum. "
                    "Merge it into its base, and train or combine on the result."
                )
        loaded = [self._load(path, base) for path in sources]
        if len({lora.base_fingerprint for lora, _ in loaded}) > 1:
            print_note(
                "the adapters do not record the same base (its weights, quantization "
                "and dtype), and the sum records none"
            )
        errors: dict[str, float] = {}
        lora, adapters = combine_adapters(
            [(*pair, weight) for pair, weight in zip(loaded, weights, strict=True)],
            base,
            method=self.method,
            r=self.r,
            errors=errors,
            names=[str(path) for path in self.adapters],
        )
        total = math.fsum(weights)
        if replaced := _replaced(lora) if abs(total - 1) > 1e-6 else []:
            print_note(
                f"the weights, {total:g} in all, do not apply to what the adapters "
                f"replace in the base ({', '.join(replaced)}); the sum has it as it is"
            )
        base_names = {
            base_name_for_copy(
                source_lora.base_model_name_or_path, source, self.output, directory
            )
            for source, (source_lora, _) in zip(sources, loaded, strict=True)
        }
        if self.base_name is not None:
            base_names = {self.base_name}
        elif len(base_names) > 1:
            print_note(
                f"the adapters name different bases ({', '.join(map(str, base_names))})"
                ", and the sum names none; --base-name does"
            )
        save_adapter(
            self.output,
            lora,
            adapters,
            config,
            base_model_name_or_path=base_names.pop() if len(base_names) == 1 else None,
            extra_files={**self._text_files(sources), **common_record(*sources)},
        )
        return {
            "output": str(self.output),
            "adapters": [str(path) for path in sources],
            "weights": list(weights),
            "method": self.method,
            "r": lora.r,
            "relative_error": errors,
            **self.publish(self.output, base=directory),
        }

    def _load(self, path: Path, base: Any) -> tuple[LoraConfig, Any]:
        """Loads an adapter; notes say what of it is not used."""
        from convert import load_adapter, shorten

        skipped: list[str] = []
        lora, adapters = load_adapter(path, base, skipped=skipped)
        for skip in shorten(skipped):
            print_note(f"not taken from `{path}`: {skip}")
        return lora, adapters

    def _text_files(self, sources: Sequence[Path]) -> dict[str, bytes]:
        """Returns the tokenizer files that the adapters have alike."""
        from convert import common_text_files

        files = common_text_files(*sources)
        if not files and any(map(common_text_files, sources)):
            print_note(
                "the adapters have different tokenizers, chat templates or end tokens, "
                f"and none are written into `{self.output}`: the base's will be used. "
                "Copy the files of one of them there for another choice"
            )
        return files


def _replaced(lora: LoraConfig) -> list[str]:
    """Returns what an adapter has in the place of values of the base, in words."""
    rows = ["rows of tokens"] if lora.trainable_token_indices else []
    biases = ["biases"] if lora.bias != "none" else []
    return [*(lora.modules_to_save or ()), *rows, *biases]


def main(args: Sequence[str]) -> int:
    """Runs `qlora-convert combine`; returns the exit status."""
    command = parse(Combine, args, prog="qlora-convert combine", config=FLAGS)
    return run_and_print(command.run, as_json=command.json)
