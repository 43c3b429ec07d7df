"""The `inspect` command: parameters and bytes of a run, from configurations only."""

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
from qlora_jax.models.config import LlamaConfig
from qlora_jax.runs.config import RunConfig
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

    def run(self, explicit: Collection[str] = ()) -> dict[str, Any]:
        """Counts; returns the report.

        Args:
          explicit: names of the fields of `lora` that were given as options; they
            override a run file's, and those of an adapter cannot be changed.
        """
        from convert.files import read_json
        from convert.peft_writing import adapter_bytes
        from qlora_jax.planning.estimate import parameter_report, warnings
        from qlora_jax.runs.loading import quantizes_lm_head, resolve_auto

        run, adapter, base = self._resolve(explicit)
        if base.is_dir():
            base = base / "config.json"
        config = LlamaConfig.from_hf(read_json(base))
        lora = self._lora(run, adapter, explicit, config)
        quantization, dtype = resolve_auto(run, self.quantization, self.dtype)
        quantize_lm_head = quantizes_lm_head(run, self.quantization)
        train = TrainConfig(steps=1) if run is None else run.train
        if self.optimizer is not None:
            train = dataclasses.replace(train, optimizer=self.optimizer)
        report = parameter_report(
            config,
            lora,
            quantization=quantization,
            quantize_lm_head=quantize_lm_head,
            dtype=dtype,
            train=train,
        )
        saved = lora.absorbed
        if saved.base_fingerprint is None and (self._is_run_file or adapter is None):
            # A run writes one; its digits do not matter, their number does.
            saved = dataclasses.replace(saved, base_fingerprint="0" * 64)
        return {
            "trainable_parameters": report.trainable_parameters,
            "groups": dict(report.groups),
            "adapter_bytes": adapter_bytes(config, saved),
            "optimizer_bytes": report.optimizer_bytes,
            "base_parameters": report.base_parameters,
            "base_bytes": report.base_bytes,
            "quantization": quantization or "none",
            **({"lm_head": "nf4"} if quantize_lm_head else {}),
            "dtype": dtype,
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "scaling": lora.scaling,
            "target_modules": lora.target_modules,
            "warnings": warnings(config, lora),
        }

    @property
    def _is_run_file(self) -> bool:
        return Path(self.path).suffix == ".toml"

    def _resolve(
        self, explicit: Collection[str]
    ) -> tuple[RunConfig | None, Path | None, Path]:
        """Returns the run, the adapter and the base that `path` refers to."""
        from convert.peft import peft_directory
        from qlora_jax.runs.directory import adapter_directory, run_settings
        from qlora_jax.runs.loading import find_base

        path = Path(self.path)
        if self._is_run_file:
            options = values_of(self, (f"lora.{name}" for name in explicit))
            run = read_config(path, options)
            initial = run.train.adapter_init
            adapter = None if initial is None else peft_directory(Path(initial))
            return run, adapter, Path(self.base or run.model.path)
        adapter = adapter_directory(path)
        base = path if adapter is None else find_base(adapter, self.base)
        return run_settings(path), adapter, base

    def _lora(
        self,
        run: RunConfig | None,
        adapter: Path | None,
        explicit: Collection[str],
        config: LlamaConfig,
    ) -> LoraConfig:
        """Returns the adapter's settings, or those of run file and options."""
        lora = self.lora
        if run is not None and self._is_run_file:
            lora = run.lora
            explicit = {*explicit, *given_lora(Path(self.path), ())}
        if adapter is None:
            return lora
        from convert.peft import open_adapter
        from qlora_jax.lora.init import CHANGEABLE, continued
        from qlora_jax.models.params import abstract_base

        return continued(
            open_adapter(adapter)[0],
            lora,
            explicit,
            abstract_base(config),
            name=str(adapter),
            changeable=CHANGEABLE if self._is_run_file else (),
        )[0]


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax inspect`; returns the exit status."""
    command = parse(Inspect, args, prog="qlora-jax inspect")
    explicit = given_lora(None, option_keys(args))
    return run_and_print(lambda: command.run(explicit), as_json=command.json)
