"""The `inspect` command: parameters and bytes of a run, from configurations only."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from qlora_jax.choices import Auto, Dtype, Quantization
from qlora_jax.cli.options import parse, path_argument
from qlora_jax.cli.output import run_and_print
from qlora_jax.lora import LoraConfig
from qlora_jax.runs import given_lora, option_keys, read_config, values_of
from qlora_jax.training import Optimizer, TrainConfig
from qlora_jax.tree import QUANTIZED

if TYPE_CHECKING:
    from qlora_jax.runs import Resolved


# Paths of a run file that are read here -> the option that gives another.
_PATHS = {"model.path": "--base", "train.adapter_init": ""}


@dataclass(frozen=True)
class Inspect:
    """Count what a run trains and stores; reads configurations only."""

    path: Annotated[tyro.conf.Positional[str], path_argument("PATH")]
    """Model directory, its config.json, or a name of the hub; a run file (.toml), where
    options win; or an adapter or run directory, whose own LoRA configuration is then
    the one counted."""
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
        from convert import adapter_bytes
        from qlora_jax.planning import estimate_warnings, parameter_report
        from qlora_jax.runs import base_options, continued_settings, read_architecture

        resolved = self._resolve(explicit)
        run = resolved.settings
        config, lora, tables = continued_settings(
            resolved,
            read_architecture(resolved.base),
            *self._lora(resolved, explicit),
        )
        model = None if run is None else run.model
        held = base_options(model, self.quantization, self.dtype)
        train = TrainConfig(steps=1) if run is None else run.train
        if self.optimizer is not None:
            train = dataclasses.replace(train, optimizer=self.optimizer)
        report = parameter_report(config, lora, **held, train=train)
        saved = lora.absorbed
        if saved.base_fingerprint is None and (
            self._is_run_file or resolved.lora is None
        ):
            # A run writes one; its digits do not matter, their number does.
            saved = dataclasses.replace(saved, base_fingerprint="0" * 64)
        return {
            "trainable_parameters": report.trainable_parameters,
            "groups": dict(report.groups),
            "adapter_bytes": adapter_bytes(
                config, saved, base_tables=tables, table_dtype=held["dtype"]
            ),
            "optimizer_bytes": report.optimizer_bytes,
            "base_parameters": report.base_parameters,
            "base_bytes": report.base_bytes,
            "quantization": held["quantization"] or "none",
            **({"lm_head": "nf4"} if held["quantize_lm_head"] else {}),
            "dtype": held["dtype"],
            "r": lora.r,
            "lora_alpha": lora.lora_alpha,
            "scaling": lora.scaling,
            "target_modules": _targets(lora, report.groups),
            "warnings": estimate_warnings(config, lora),
        }

    @property
    def _is_run_file(self) -> bool:
        return Path(self.path).suffix == ".toml"

    def _resolve(self, explicit: Collection[str]) -> Resolved:
        """Returns the run, the adapter and the base that `path` refers to."""
        from convert import open_config
        from qlora_jax.runs import beside_run, relative_paths, resolve

        if not self._is_run_file:
            return resolve(self.path, self.base, needed="configuration")
        file = Path(self.path)
        options = values_of(self, (f"lora.{name}" for name in explicit))
        given = {*options, *(["model.path"] if self.base else [])}
        run = beside_run(read_config(file, options), file, given)
        with relative_paths(run, file, given, _PATHS):
            resolved = resolve(
                self.base or run.model.path,
                adapter=run.train.adapter_init,
                strict=run.train.adapter_init_strict,
                needed="configuration",
            )
            # Whether there is a model; `resolve` asks it of an adapter's base alone.
            if not resolved.base.is_file():
                open_config(resolved.base)
        return dataclasses.replace(resolved, settings=run)

    def _lora(
        self, resolved: Resolved, explicit: Collection[str]
    ) -> tuple[LoraConfig, Collection[str], Collection[str]]:
        """Returns the settings of run file and options, and which of them are given.

        And last, which of them an adapter's may differ from: none but a run's.
        """
        from qlora_jax.lora import CHANGEABLE_SETTINGS

        if resolved.settings is None or not self._is_run_file:
            return self.lora, explicit, ()
        given = {*explicit, *given_lora(Path(self.path), ())}
        return resolved.settings.lora, given, CHANGEABLE_SETTINGS


def _targets(lora: LoraConfig, groups: Collection[str]) -> str | tuple[str, ...]:
    """Returns the targets, of the default (all families' names) those of the model."""
    if set(lora.target_modules) != set(QUANTIZED):
        return lora.target_modules
    return tuple(name for name in lora.target_modules if name in groups)


def main(args: Sequence[str]) -> int:
    """Runs `qlora-jax inspect`; returns the exit status."""
    command = parse(Inspect, args, prog="qlora-jax inspect")
    explicit = given_lora(None, option_keys(args))
    return run_and_print(lambda: command.run(explicit), as_json=command.json)
