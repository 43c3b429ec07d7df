"""The settings of a run: the sections of a run file as typed dataclasses.

Each section raises at construction if no run could use its values; the message lists
every problem. `qlora_jax.runs.toml` reads and writes the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from qlora_jax.choices import (
    Attention,
    Dtype,
    EmbeddingMemory,
    HeadMemory,
    Kernels,
    Quantization,
    RematOrAuto,
)
from qlora_jax.config_changes import FIELDS as CHANGEABLE_FIELDS
from qlora_jax.config_changes import check_changes
from qlora_jax.data import DataConfig, Source
from qlora_jax.data.settings import Format, TooLong, TrainOn
from qlora_jax.errors import Problems, UserError
from qlora_jax.lora_config import LoraConfig
from qlora_jax.train_config import TrainConfig
from qlora_jax.tree import FrozenDict


@dataclass(frozen=True)
class ModelConfig:
    """The `[model]` section: the base and how it is computed."""

    path: str
    """Hugging Face directory, or a bitsandbytes-4bit one (kept as it is packed)."""
    quantization: Quantization = "nf4_dq"
    """Of the linear layers: NF4, NF4 with double quantization, or none."""
    dtype: Dtype = "bfloat16"
    """Of activations, matrix products and the tensors that stay dense."""
    attention: Attention = "auto"
    """Attention implementation."""
    remat: RematOrAuto = "full"
    """What the backward pass recomputes, or fetches from the host's memory; auto = the
    fastest that fits the device."""
    embed_tokens: Literal["auto", EmbeddingMemory] = "auto"
    """Where the frozen embedding table lies: on the device, or in the host's memory,
    copied to the device for a moment with every step. auto = on the device, unless
    remat = "auto" finds that it does not fit."""
    lm_head: Literal["auto", HeadMemory] = "auto"
    """Where the frozen output head lies, likewise; nf4 = on the device and quantized,
    of a model whose head is not tied to the embeddings."""
    kernels: Kernels = "auto"
    """Of products with packed weights: XLA's, our own for GPUs, or the best known."""
    max_position_embeddings: int | None = None
    """Context length of the tuned model, in place of the one in the base's config.json.
    """
    rope_scaling: Mapping[str, int | float | str] | None = None
    """How rotary positions are stretched, in place of what config.json has: a table of
    its fields, `rope_type` ("linear", "llama3", or "default" for not at all), `factor`
    and, for llama3, `low_freq_factor`, `high_freq_factor` and
    `original_max_position_embeddings`."""

    def __post_init__(self) -> None:
        if self.rope_scaling is not None:
            ordered = FrozenDict(sorted(self.rope_scaling.items()))
            object.__setattr__(self, "rope_scaling", ordered)
        check_changes(self.config_changes, "model")

    @property
    def config_changes(self) -> dict[str, Any]:
        """What is changed in the base's config.json."""
        given = {name: getattr(self, name) for name in CHANGEABLE_FIELDS}
        if self.rope_scaling is not None:
            given["rope_scaling"] = dict(self.rope_scaling)
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True)
class CheckpointConfig:
    """The `[checkpoint]` section of a run file."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""

    def __post_init__(self) -> None:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                raise UserError(
                    f"checkpoint: `{name}` must be at least 1, got "
                    f"{getattr(self, name)}."
                )


@dataclass(frozen=True)
class LogConfig:
    """The `[log]` section."""

    every: int = 10
    """Steps between lines of progress where stderr is no terminal."""
    plot: bool = True
    """Draw loss.png (needs matplotlib), at the end and now and then on the way."""
    report_to: tuple[str, ...] = ()
    """Where the numbers go as well: "tensorboard" (event files in the run directory),
    "wandb" (Weights & Biases; WANDB_MODE=offline is theirs)."""
    run_name: str | None = None
    """Name of the run there; default the name of its directory."""
    project: str = "qlora-jax"
    """Project of Weights & Biases."""

    def __post_init__(self) -> None:
        problems = Problems("[log]")
        if self.every < 1:
            problems.add(f"log: `every` must be at least 1, got {self.every}.")
        unknown = [name for name in self.report_to if name not in REPORT_TO]
        if unknown:
            problems.add(
                f"log: `report_to` knows {', '.join(map(repr, REPORT_TO))}, got "
                f"{', '.join(map(repr, unknown))}. An empty list reports to no one "
                "else."
            )
        if len(set(self.report_to)) < len(self.report_to):
            problems.add(f"log: `report_to` = {list(self.report_to)} repeats a name.")
        problems.raise_if_any()


# What `report_to` may name.
REPORT_TO = ("tensorboard", "wandb")


@dataclass(frozen=True)
class EvalConfig:
    """The `[eval]` section: what is measured on the way, on what, and how often.

    With `path`, `fraction` or `examples` the loss on data that is not trained on is
    measured, and the adapter with the best one kept in RUN/best_adapter/.
    """

    path: str | tuple[str, ...] = ""
    """Data of its own, as `data.path`."""
    split: str | None = None
    """As `data.split`; it is not taken from there."""
    format: Format | None = None
    """As `data.format`; this and the next are as `[data]` has them, if left out."""
    train_on: TrainOn | None = None
    """As `data.train_on`: the tokens whose loss counts."""
    prompt: str | None = None
    """As `data.prompt`."""
    completion: str | None = None
    """As `data.completion`."""
    text: str | None = None
    """As `data.text`."""
    chat_template: str | None = None
    """As `data.chat_template`."""
    too_long: TooLong | None = None
    """As `data.too_long`."""
    append_eos: bool | None = None
    """As `data.append_eos`."""
    fraction: float | None = None
    """Share of the training examples to hold out instead, chosen by `data.seed` and
    never trained on; of a mixture each source gives its part."""
    examples: int | None = None
    """How many training examples to hold out instead."""
    every: int = 100
    """Steps between measurements; the last step is always followed by one."""
    at_start: bool = False
    """Measure before the first step too."""
    batch_size: int | None = None
    """Rows at a time; default `train.batch_size`."""
    early_stopping_patience: int | None = None
    """End the run after this many measurements in a row without a better loss."""
    early_stopping_threshold: float = 0.0
    """A loss is better for `early_stopping_patience` if it is lower by more than this.
    """
    sample_prompts: tuple[str, ...] = ()
    """Texts that the model continues now and then, likeliest tokens first, to
    samples.jsonl and stderr."""
    sample_every: int | None = None
    """Steps between these; default `every`. The last step is always followed by one."""
    sample_max_new_tokens: int = 64
    """Tokens to add to a prompt at most."""

    def __post_init__(self) -> None:
        problems = Problems("[eval]")
        for problem in self._problems():
            problems.add(f"eval: {problem}")
        problems.raise_if_any()

    def _problems(self) -> Iterator[str]:
        given = [n for n in ("path", "fraction", "examples") if getattr(self, n)]
        if len(given) > 1:
            yield f"give one of {', '.join(f'`{name}`' for name in given)}."
        reading = [n for n in READING[1:] if getattr(self, n) is not None]
        if reading and not self.path:
            named = ", ".join(f"`{name}`" for name in reading)
            yield f"{named} say how `path` is read, and there is none."
        if self.fraction is not None and not 0 < self.fraction < 1:
            yield f"`fraction` must lie between 0 and 1, got {self.fraction}."
        least = (
            *("examples", "every", "batch_size", "early_stopping_patience"),
            *("sample_every", "sample_max_new_tokens"),
        )
        for name in least:
            value = getattr(self, name)
            if value is not None and value < 1:
                yield f"`{name}` must be at least 1, got {value}."
        if not (
            math.isfinite(self.early_stopping_threshold)
            and self.early_stopping_threshold >= 0
        ):
            yield (
                "`early_stopping_threshold` must be >= 0, got "
                f"{self.early_stopping_threshold}."
            )
        if self.early_stopping_patience is None and self.early_stopping_threshold:
            yield "`early_stopping_threshold` needs `early_stopping_patience`."
        if self.early_stopping_patience is not None and not self.measures:
            yield (
                "`early_stopping_patience` needs data to measure: give `path`, "
                "`fraction` or `examples`."
            )
        if self.sample_every is not None and not self.sample_prompts:
            yield "`sample_every` needs `sample_prompts`."

    @property
    def measures(self) -> bool:
        """Whether there is data to measure the loss on."""
        return bool(self.path or self.fraction or self.examples)

    @property
    def idle(self) -> tuple[str, ...]:
        """Settings that were given and have nothing to act on."""
        names = ("every", "at_start", "batch_size")
        used = self.measures or (self.sample_prompts and self.sample_every is None)
        plain = {one.name: one.default for one in dataclasses.fields(EvalConfig)}
        return tuple(n for n in names if not used and getattr(self, n) != plain[n])

    def data_config(self, data: DataConfig) -> DataConfig:
        """How `path` is read: with the settings here, and for the rest with `[data]`.

        Raises:
          UserError: they contradict each other.
        """
        own = {name: getattr(self, name) for name in READING}
        try:
            plain = dataclasses.replace(data, split=None)
            return plain.read_as(Source(**own))
        except UserError as error:
            raise UserError(f"`[eval]` with what `[data]` says: {error}") from error


READING = (
    *("path", "split", "format", "train_on", "prompt", "completion", "text"),
    *("chat_template", "too_long", "append_eos"),
)
"""Of `[eval]`, which data are read and how; the same names as in `[data]`."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run; what a TOML run file holds."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    output_dir: str = "run"
    """The run directory; given again, the run continues."""

    @property
    def eval_batch_size(self) -> int:
        """Held-out rows at a time."""
        return self.eval.batch_size or self.train.batch_size
