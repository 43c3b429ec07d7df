"""The settings of a run: the sections of a run file as typed dataclasses.

Each section raises at construction if no run could use its values; the message lists
every problem. `qlora_jax.runs.toml` reads and writes the file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, get_type_hints

from qlora_jax.choices import (
    Attention,
    Auto,
    Dtype,
    EmbeddingMemory,
    Fusion,
    HeadMemory,
    Kernels,
    Quantization,
    RematOrAuto,
)
from qlora_jax.data import (
    SOURCE_FIELDS,
    DataConfig,
    Format,
    OnBadRow,
    Source,
    TooLong,
    TrainOn,
)
from qlora_jax.errors import UserError, raise_problems
from qlora_jax.lora import LoraConfig
from qlora_jax.models import CHANGEABLE_FIELDS, read_changes, rope_value
from qlora_jax.reading import expand_fields
from qlora_jax.runs.place import place_problems
from qlora_jax.training import TrainConfig
from qlora_jax.tree import FrozenDict


@dataclass(frozen=True)
class ModelConfig:
    """The `[model]` section: the base and how it is computed."""

    path: str
    """Hugging Face directory, or name of the hub (`owner/name`, `owner/name@revision`);
    a bitsandbytes-4bit model keeps its packed weights."""
    quantization: Quantization = "nf4_dq"
    """Format of the linear layers: NF4, NF4 with double quantization, or none."""
    dtype: Dtype = "bfloat16"
    """Dtype of activations, matrix products and the tensors that stay dense."""
    attention: Attention = "auto"
    """Attention implementation."""
    remat: RematOrAuto = "auto"
    """What the backward pass recomputes, or fetches from the host's memory; auto = the
    fastest policy that fits the device, which a continued run keeps."""
    scan_layers: Literal["auto"] | bool = "auto"
    """Whether the layers are a loop over one program (compiled in seconds), or each has
    its own (compiled in a minute, faster steps on a GPU); auto = a loop on a CPU, and
    on a GPU what goes with the policy of `remat`."""
    embed_tokens: Literal["auto", EmbeddingMemory] = "auto"
    """Memory of the frozen embedding table: the device's, or the host's, from which
    each step copies it to the device. auto = the device's, unless remat = "auto" finds
    that it does not fit."""
    lm_head: Literal["auto", HeadMemory] = "auto"
    """Memory of the frozen output head, likewise; nf4 = on the device and quantized,
    for a model whose head is not tied to the embeddings."""
    kernels: Kernels = "auto"
    """Kernels of products with packed weights: XLA's, Pallas kernels for GPUs, or the
    faster ones, as measured."""
    fusion: Fusion = "auto"
    """Whether norms and the MLP's activation are computed in one pass with the narrow
    products of the adapters around them, by kernels for NVIDIA's Hopper GPUs, or on
    their own; auto = on their own, as long as those kernels are not measured."""
    max_position_embeddings: int | None = None
    """Context length of the tuned model, instead of that in the base's config.json."""
    rope_scaling: Mapping[str, int | float | str | bool | tuple[float, ...]] | None = (
        None
    )
    """How rotary positions are scaled, instead of as in the base's config.json: a table
    of its fields, `rope_type` ("linear", "llama3", "yarn", "longrope", or "default" for
    no scaling) and those of the type: `factor`; `original_max_position_embeddings` but
    for linear; `low_freq_factor` and `high_freq_factor` of llama3; if wanted,
    `attention_factor`, `beta_fast`, `beta_slow`, `mscale`, `mscale_all_dim` and
    `truncate` of yarn; the lists `short_factor` and `long_factor` of longrope. On a
    command line: `rope_type longrope short_factor 1.0,1.1 ...`."""
    resize_to_adapter: bool = False
    """Let the vocabulary of the base grow to that of `train.adapter_init`, which was
    trained with added tokens; its tables stay frozen and are saved with the adapter."""

    def __post_init__(self) -> None:
        if self.rope_scaling is not None:
            # The order of a table in TOML means nothing, and that of a `FrozenDict`
            # counts.
            fields = sorted(self.rope_scaling.items())
            ordered = FrozenDict((name, rope_value(name, v)) for name, v in fields)
            object.__setattr__(self, "rope_scaling", ordered)
        read_changes(self.config_changes, "model")
        expand_fields(self, "path")

    @property
    def config_changes(self) -> dict[str, Any]:
        """The fields of the base's config.json that the run changes."""
        changes = {name: getattr(self, name) for name in CHANGEABLE_FIELDS}
        if self.rope_scaling is not None:
            changes["rope_scaling"] = dict(self.rope_scaling)
        return {name: value for name, value in changes.items() if value is not None}


@dataclass(frozen=True)
class CheckpointConfig:
    """The `[checkpoint]` section: how often the state is saved."""

    every: int = 100
    """Steps between checkpoints; the last step is always saved."""
    keep: int = 2
    """How many of the newest checkpoints are kept."""

    def __post_init__(self) -> None:
        raise_problems("[checkpoint]", self._problems(), "checkpoint: ")

    def _problems(self) -> Iterator[str]:
        for name in ("every", "keep"):
            if getattr(self, name) < 1:
                yield f"`{name}` must be at least 1, got {getattr(self, name)}."


REPORT_TO = ("tensorboard", "wandb")
"""The trackers that `report_to` may name."""


@dataclass(frozen=True)
class LogConfig:
    """The `[log]` section: how the progress of a run is shown."""

    every: int = 10
    """Steps between lines of progress if stderr is not a terminal."""
    plot: bool = True
    """Draw loss.png (needs matplotlib), from time to time and at the end."""
    report_to: tuple[str, ...] = ()
    """Trackers that get the metrics too: "tensorboard" (event files in the run
    directory), "wandb" (Weights & Biases; it reads WANDB_MODE=offline)."""
    run_name: str | None = None
    """Name of the run in the trackers; default the name of its directory."""
    project: str = "qlora-jax"
    """Project of Weights & Biases."""

    def __post_init__(self) -> None:
        raise_problems("[log]", self._problems(), "log: ")

    def _problems(self) -> Iterator[str]:
        if self.every < 1:
            yield f"`every` must be at least 1, got {self.every}."
        unknown = [name for name in self.report_to if name not in REPORT_TO]
        if unknown:
            yield (
                f"`report_to` knows {', '.join(map(repr, REPORT_TO))}, got "
                f"{', '.join(map(repr, unknown))}. An empty list means no tracker."
            )
        if len(set(self.report_to)) < len(self.report_to):
            yield f"`report_to` = {list(self.report_to)} repeats a name."


READING = ("path", *SOURCE_FIELDS)
"""Settings of `[eval]` that choose its data and how they are read; as in `[data]`."""


@dataclass(frozen=True)
class EvalConfig:
    """The `[eval]` section: what is measured during a run, on which data, how often.

    With `path`, `fraction` or `examples` the run measures the loss on data that it is
    not trained on, and keeps the adapter with the best one in RUN/best_adapter/.
    """

    path: str | tuple[str, ...] = ""
    """Data to measure on, as `data.path`."""
    split: str | None = None
    """As `data.split`, whose value is not taken over."""
    format: Format | None = None
    """As `data.format`; this and the next default to the values of `[data]`."""
    train_on: TrainOn | None = None
    """As `data.train_on`: the tokens whose loss counts."""
    prompt: str | None = None
    """As `data.prompt`."""
    completion: str | None = None
    """As `data.completion`."""
    text: str | None = None
    """As `data.text`."""
    instruction_part: str | None = None
    """As `data.instruction_part`."""
    response_part: str | None = None
    """As `data.response_part`."""
    messages: str | None = None
    """As `data.messages`."""
    roles: Mapping[str, str] | None = None
    """As `data.roles`."""
    chat_template: str | None = None
    """As `data.chat_template`."""
    chat_template_kwargs: Mapping[str, bool | int | float | str] | None = None
    """As `data.chat_template_kwargs`."""
    answers: tuple[int, ...] | None = None
    """As `data.answers`."""
    on_bad_row: OnBadRow | None = None
    """As `data.on_bad_row`."""
    too_long: TooLong | None = None
    """As `data.too_long`."""
    append_eos: bool | None = None
    """As `data.append_eos`."""
    fraction: float | None = None
    """Share of the training examples to hold out instead, chosen by `data.seed` and
    never trained on; of a mixture, this share of each source."""
    examples: int | None = None
    """How many training examples to hold out instead."""
    every: int = 100
    """Steps between measurements; there is always one after the last step."""
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
    """Prompts that the model continues from time to time with its most likely tokens,
    on stderr and in samples.jsonl."""
    sample_every: int | None = None
    """Steps between samples; default `every`. There is always one after the last step.
    """
    sample_max_new_tokens: int = 64
    """Most tokens to add to a prompt."""

    def __post_init__(self) -> None:
        expand_fields(self, "path", "chat_template")
        raise_problems("[eval]", self._problems(), "eval: ")

    def _problems(self) -> Iterator[str]:
        choices = [n for n in ("path", "fraction", "examples") if getattr(self, n)]
        if len(choices) > 1:
            yield f"give one of {', '.join(f'`{name}`' for name in choices)}."
        unused = [n for n in SOURCE_FIELDS if getattr(self, n) is not None]
        if unused and not self.path:
            names = ", ".join(f"`{name}`" for name in unused)
            yield f"{names}: these apply to `path`, which is not set."
        if self.fraction is not None and not 0 < self.fraction < 1:
            yield f"`fraction` must be between 0 and 1, got {self.fraction}."
        for name in (
            *("examples", "every", "batch_size", "early_stopping_patience"),
            *("sample_every", "sample_max_new_tokens"),
        ):
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
        """Settings that differ from their defaults and have no effect."""
        if self.measures or (self.sample_prompts and self.sample_every is None):
            return ()
        names = ("every", "at_start", "batch_size")
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        return tuple(name for name in names if getattr(self, name) != defaults[name])

    def data_config(self, data: DataConfig) -> DataConfig:
        """Returns the settings that `path` is read with: those here over `[data]`'s.

        Raises:
          UserError: they contradict each other.
        """
        source = Source(**{name: getattr(self, name) for name in READING})
        try:
            return dataclasses.replace(data, split=None).read_as(source)
        except UserError as error:
            raise UserError(f"[eval] with the settings of [data]: {error}") from error


@dataclass(frozen=True)
class HubConfig:
    """The `[hub]` section: where the adapter of a complete run is published."""

    model_id: str | None = None
    """Repository on the Hugging Face hub, `owner/name`, that gets the adapter with a
    model card when the run is complete."""
    private: bool = True
    """Make a new repository private; one that exists stays as it is."""
    adapter: Literal["last", "best"] = "last"
    """Which adapter: that of the last step, or that with the best held-out loss."""


@dataclass(frozen=True)
class MeshConfig:
    """The `[mesh]` section: the devices of a run, and how they share the work.

    All of it may change when a run is continued.
    """

    data: int = -1
    """Groups of devices that divide the rows and have all weights each; -1 = all
    devices that `fsdp` and `context` leave."""
    fsdp: int | Auto = "auto"
    """Devices that divide rows and weights; auto = 1 if all weights fit on a device,
    else the smallest number that makes them fit."""
    context: int | Auto = "auto"
    """Devices that divide the tokens of each row, for rows too long for one device;
    auto = 1, or where rows are fewer than devices as many as come to a row."""
    coordinator: str | None = None
    """Address of process 0, "host:port", if several processes train together. Slurm
    and Ray need none of this and the next two."""
    processes: int | None = None
    """Number of processes: one on each machine, with all of its GPUs."""
    process: int | None = None
    """Index of this process, from 0."""

    def __post_init__(self) -> None:
        raise_problems("[mesh]", self._problems(), "mesh: ")

    @property
    def is_open(self) -> bool:
        """Whether no size is set."""
        return (self.data, self.fsdp, self.context) == (-1, "auto", "auto")

    def _problems(self) -> Iterator[str]:
        if self.data < 1 and self.data != -1:
            yield f"`data` must be at least 1, or -1 for the rest, got {self.data}."
        for name in ("fsdp", "context"):
            size = getattr(self, name)
            if size != "auto" and size < 1:
                yield f"`{name}` must be at least 1, or 'auto', got {size}."
        yield from place_problems(self.coordinator, self.processes, self.process)


@dataclass(frozen=True)
class RunConfig:
    """All settings of a run; the content of a TOML run file."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    hub: HubConfig = field(default_factory=HubConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    output_dir: str = "run"
    """The run directory. If it holds an unfinished run, that run continues."""

    def __post_init__(self) -> None:
        expand_fields(self, "output_dir")
        if self.hub.model_id and self.hub.adapter == "best" and not self.eval.measures:
            raise UserError(
                "hub: `adapter` = 'best' needs held-out data: give `eval.path`, "
                "`eval.fraction` or `eval.examples`."
            )

    @property
    def eval_batch_size(self) -> int:
        """Held-out rows at a time."""
        return self.eval.batch_size or self.train.batch_size


def config_sections() -> dict[str, Any]:
    """Returns the sections of a run and their classes."""
    hints = get_type_hints(RunConfig)
    return {name: cls for name, cls in hints.items() if dataclasses.is_dataclass(cls)}


def setting_keys() -> set[str]:
    """Returns the keys of all settings of a run: "train.steps", "output_dir"."""
    sections = config_sections()
    top = {f.name for f in dataclasses.fields(RunConfig)} - sections.keys()
    return top.union(
        f"{section}.{f.name}"
        for section, cls in sections.items()
        for f in dataclasses.fields(cls)
    )
