"""The `inspect` command: parameters and bytes of a run, from configurations alone."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro

from qlora_jax.choices import Auto, Dtype, Quantization
from qlora_jax.cli.options import parse, path_argument
from qlora_jax.cli.output import run_and_print
from qlora_jax.lora.config import LoraConfig
from qlora_jax.runs.overrides import given_lora, option_keys, values_of
from qlora_jax.runs.toml import read_config
from qlora_jax.training.config import Optimizer, TrainConfig


@dataclass(frozen=True)
class Inspect:
    """Count what a run trains and stores; reads configurations only."""

    path: Annotated[tyro.conf.Positional[str], path_argument("PATH")]
    """Model directory or its config.json; a run file (.toml), where options win; or an
    adapter or run directory, whose own LoRA configuration is then the one counted."""
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    base: str | None = None
    """Base of an adapter directory, where its configuration does not lead to it."""
    quantization: Auto | Quantization = "auto"
    """Of the base's linear layers; auto = that of a run file or run directory, else
    nf4_dq."""
    dtype: Auto | Dtype = "auto"
    """Of dense tensors; auto = that of a run file or run directory, else bfloat16."""
    optimizer: Optimizer | None = None
    """Whose state is counted; default that of a run file or run directory, else adamw.
    """
    json: bool = False
    """Print a JSON object."""

    def run(self, given: Collection[str] = ()) -> dict[str, Any]:
        """Counts; returns the report.

        Args:
          given: names of the fields of `lora` that were given; they win over a run
            file's, and those of an adapter cannot be changed.
        """
        from convert.files import read_json
        from convert.peft import adapter_bytes
        from qlora_jax.lora.init import CHANGEABLE, continued
        from qlora_jax.models.config import LlamaConfig
        from qlora_jax.planning.estimate import (
            abstract_base,
            parameter_report,
            warnings,
        )
        from qlora_jax.runs.loading import resolve

        path, lora = Path(self.path), self.lora
        planned = path.suffix == ".toml"
        if planned:
            keys = {f"lora.{name}" for name in given}
            settings = read_config(path, values_of(self, keys))
            lora, given = settings.lora, given_lora(path, keys)
            resolved = resolve(
                self.base or settings.model.path, adapter=settings.train.adapter_init
            )
            resolved = dataclasses.replace(resolved, settings=settings)
        else:
            resolved = resolve(path, self.base)
            settings = resolved.settings
        held = resolved.base_options(self.quantization, self.dtype)
        base = resolved.base
        config = LlamaConfig.from_hf(
            read_json(base / "config.json" if base.is_dir() else base)
        )
        if resolved.lora is not None:
            lora, _ = continued(
                resolved.lora,
                lora,
                given,
                abstract_base(config),
                name=str(resolved.adapter),
                changeable=CHANGEABLE if planned else (),
            )
        saved = lora.absorbed
        if saved.base_fingerprint is None and (planned or resolved.lora is None):
            # A run writes one; its digits do not matter, their number does.
            saved = dataclasses.replace(saved, base_fingerprint="0" * 64)
        train = TrainConfig(steps=1) if settings is None else settings.train
        if self.optimizer is not None:
            train = dataclasses.replace(train, optimizer=self.optimizer)
        report = parameter_report(config, lora, **held, train=train)
        return {
            "trainable_parameters": report.trainable_parameters,
            "groups": dict(report.groups),
            "adapter_bytes": adapter_bytes(config, saved),
            "optimizer_bytes": report.optimizer_bytes,
            "base_parameters": report.base_parameters,
            "base_bytes": report.base_bytes,
            "quantization": held["quantization"] or "none",
            **({"lm_head": "nf4"} if held["quantize_lm_head"] else {}),
            "dtype": held["dtype"],
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "scaling": lora.scaling,
            "target_modules": lora.target_modules,
            "warnings": warnings(config, lora),
        }


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax inspect`; returns the exit status."""
    command = parse(Inspect, args, prog="qlora-jax inspect")
    given = given_lora(None, option_keys(args))
    return run_and_print(lambda: command.run(given), as_json=command.json)
