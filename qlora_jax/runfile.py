"""The settings of a run, and the TOML file that holds them.

    read_config(path)     TOML -> RunConfig; unknown keys and wrong types are errors
    to_toml(config)       RunConfig -> TOML; read again it gives the same RunConfig

TOML has no null. A setting that may be absent is left out, or, where leaving it out
means something else, written as "none".
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
import tomllib
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin

from qlora_jax.config_changes import FIELDS as CHANGEABLE_FIELDS
from qlora_jax.config_changes import check_changes
from qlora_jax.data import DataConfig, Source
from qlora_jax.data.settings import Format, TooLong, TrainOn
from qlora_jax.errors import Problems, UserError
from qlora_jax.lora_config import LoraConfig, off_features, refused_features
from qlora_jax.train_config import TrainConfig
from qlora_jax.tree import FrozenDict

SETTINGS = "config.toml"
"""The settings of a run, in its directory."""
_NONE = "none"


@dataclass(frozen=True)
class ModelConfig:
    """The `[model]` section: the base and how it is computed."""

    path: str
    """Hugging Face directory, or a bitsandbytes-4bit one (kept as it is packed)."""
    quantization: Literal["nf4", "nf4_dq", "none"] = "nf4_dq"
    """Of the linear layers: NF4, NF4 with double quantization, or none."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of activations, matrix products and the tensors that stay dense."""
    attention: Literal["auto", "eager", "xla", "cudnn", "pallas"] = "auto"
    """Attention implementation."""
    remat: Literal["auto", "none", "full", "save_matmuls", "offload"] = "full"
    """What the backward pass recomputes, or fetches from the host's memory; auto = the
    fastest that fits the device."""
    embed_tokens: Literal["auto", "device", "host"] = "auto"
    """Where the frozen embedding table lies: on the device, or in the host's memory,
    copied to the device for a moment with every step. auto = on the device, unless
    remat = "auto" finds that it does not fit."""
    lm_head: Literal["auto", "device", "host", "nf4"] = "auto"
    """Where the frozen output head lies, likewise; nf4 = on the device and quantized,
    of a model whose head is not tied to the embeddings."""
    kernels: Literal["auto", "xla", "pallas"] = "auto"
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
        problems.refuse()


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
        problems.refuse()

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


def settings_file(path: Path) -> Path:
    """The run file that a path means: itself, or that of a run directory."""
    return path / SETTINGS if path.is_dir() else path


def read_config(path: Path) -> RunConfig:
    """Reads a TOML run file strictly: unknown keys and wrong types are errors.

    Raises:
      UserError: no such file, no TOML, keys that are unknown, of a wrong type, or
        missing, settings that cannot be; the message names all of them.
    """
    path = settings_file(path)
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"`{path}` cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"`{path}` is no valid TOML: {error}.") from error
    return _build(RunConfig, content, f"{path}: ")


def unchecked(config: RunConfig | None = None) -> tuple[type[RunConfig], Any]:
    """Makes RunConfig's like that takes any values, for a parser of options.

    A parser that builds section by section would stop at the first that refuses its
    values. `checked` refuses them all at once.

    Args:
      config: a run whose settings the like is to have; default none.

    Returns:
      The class, and its instance with the settings of `config`; None without.
    """
    sections: dict[str, Any] = {
        name: type(
            kind.__name__,
            (kind,),
            {"__post_init__": _no_check, "__doc__": kind.__doc__},
        )
        for name, kind in _sections().items()
    }
    body: dict[str, Any] = {
        "__annotations__": {**typing.get_type_hints(RunConfig), **sections},
        "__doc__": RunConfig.__doc__,
    }
    for one in dataclasses.fields(RunConfig):
        if one.default_factory is not dataclasses.MISSING:
            body[one.name] = field(default_factory=sections[one.name])
    like = dataclass(frozen=True)(type("RunConfig", (RunConfig,), body))
    if config is None:
        return like, None
    values = _fields(config)
    for name, kind in sections.items():
        values[name] = kind(**_fields(values[name]))
    return like, like(**values)


def checked(config: RunConfig) -> RunConfig:
    """Makes a RunConfig of its unchecked like.

    Raises:
      UserError: all that is wrong with its values.
    """
    problems = Problems()
    values = _fields(config)
    for name, kind in _sections().items():
        with problems.collected():
            values[name] = kind(**_fields(values[name]))
    problems.refuse()
    return RunConfig(**values)


def _sections() -> dict[str, Any]:
    """The classes of a run's sections."""
    hints = typing.get_type_hints(RunConfig)
    return {n: kind for n, kind in hints.items() if dataclasses.is_dataclass(kind)}


def _no_check(self: Any) -> None:
    """In place of a section's own check."""


def _fields(of: Any) -> dict[str, Any]:
    return {one.name: getattr(of, one.name) for one in dataclasses.fields(of)}


def given_lora(path: Path) -> set[str]:
    """The settings that the [lora] section of a readable TOML run file has."""
    text = settings_file(path).read_text(encoding="utf-8")
    return set(tomllib.loads(text).get("lora", {}))


def lora_options(args: Sequence[str]) -> set[str]:
    """Names of the LoRA settings among the options of a command line."""
    found = (re.match(r"--lora\.(?:no[-_])?([a-z_-]+)", arg) for arg in args)
    return {match[1].replace("-", "_") for match in found if match}


def _build(kind: Any, content: Mapping[str, Any], where: str) -> Any:
    """Makes a dataclass of a TOML table."""
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    values = {}
    problems = Problems()
    if kind is LoraConfig:
        refused = refused_features(content)
        if refused:
            problems.add(
                f"{where}LoRA features that are not supported: {', '.join(refused)}."
            )
        # As in a file of PEFT's, which lists what it does not use.
        unused = off_features(content)
        content = {
            key: value
            for key, value in content.items()
            if key not in unused and not refused_features({key: value})
        }
    for key, value in content.items():
        if key not in fields:
            near = difflib.get_close_matches(key, fields, n=1)
            problems.add(
                f"{where}`{key}` is no option here"
                + (f"; did you mean `{near[0]}`?" if near else ".")
                + f" Options: {', '.join(fields)}."
            )
            continue
        hint = hints[key]
        with problems.collected():
            if not dataclasses.is_dataclass(hint):
                values[key] = _coerce(hint, value, f"{where}`{key}`")
            elif isinstance(value, dict):
                values[key] = _build(hint, value, f"{where}[{key}] ")
            else:
                problems.add(f"{where}`{key}` must be a table, got {value!r}.")
    missing = [
        name
        for name, f in fields.items()
        if name not in content
        and f.default is dataclasses.MISSING
        and f.default_factory is dataclasses.MISSING
    ]
    if missing:
        tables = [m for m in missing if dataclasses.is_dataclass(hints[m])]
        problems.add(
            f"{where}missing {', '.join(f'`{m}`' for m in missing)}."
            + (f" Write a table [{tables[0]}]." if tables else "")
        )
    problems.refuse()
    return kind(**values)


def _coerce(hint: Any, value: Any, where: str) -> Any:
    """Checks a TOML value against a field's type."""
    kinds = _kinds(hint)
    for kind in kinds:
        if get_origin(kind) is Literal:
            if any(
                value is a or (type(a) is str and value == a) for a in get_args(kind)
            ):
                return value
        elif get_origin(kind) is tuple:
            one = get_args(kind)[0]
            if isinstance(value, list) and dataclasses.is_dataclass(one):
                if all(isinstance(v, dict) for v in value):
                    numbered = enumerate(value, 1)
                    return tuple(_build(one, v, f"{where} {n}: ") for n, v in numbered)
            elif isinstance(value, list) and all(type(v) is one for v in value):
                return tuple(value)
        elif get_origin(kind) is Mapping:
            one = get_args(kind)[1]
            if isinstance(value, dict):
                return {k: _coerce(one, v, f"{where}.{k}") for k, v in value.items()}
        elif kind is type(None):
            if value == _NONE and str not in kinds:
                return None
        elif type(value) is kind:
            return value
        elif kind is float and type(value) is int:
            return float(value)
    expected = " or ".join(_expected(kind) for kind in kinds if kind is not type(None))
    raise UserError(f"{where} must be {expected}, got {value!r}.")


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _expected(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return "one of " + ", ".join(repr(a) for a in get_args(kind))
    if get_origin(kind) is tuple and dataclasses.is_dataclass(get_args(kind)[0]):
        return "a list of tables"
    if get_origin(kind) is tuple:
        return "a list of " + ("strings" if get_args(kind)[0] is str else "integers")
    if get_origin(kind) is Mapping:
        return "a table"
    return {
        int: "an integer",
        float: "a number",
        str: "a string",
        bool: "true or false",
    }[kind]


def to_toml(config: RunConfig) -> str:
    """Writes a run configuration as TOML, every setting that has a value."""
    top, sections = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            sections.append("\n".join([f"[{f.name}]", *_lines(value)]) + "\n")
            sections += _tables(f.name, value)
        else:
            top.append(f"{f.name} = {_toml_value(value)}\n")
    return "".join(top) + "\n" + "\n".join(sections)


def _tables(name: str, section: Any) -> list[str]:
    """The lists of tables that a section has."""
    return [
        "\n".join([f"[[{name}.{f.name}]]", *_lines(table)]) + "\n"
        for f in dataclasses.fields(section)
        if _holds_tables(getattr(section, f.name))
        for table in getattr(section, f.name)
    ]


def _holds_tables(value: Any) -> bool:
    return isinstance(value, tuple) and any(map(dataclasses.is_dataclass, value))


def _lines(section: Any) -> list[str]:
    lines = []
    for f in dataclasses.fields(section):
        value = getattr(section, f.name)
        if _holds_tables(value):
            continue
        if value is not None:
            lines.append(f"{f.name} = {_toml_value(value)}")
        elif f.default is not None:  # left out, it would get its default
            lines.append(f'{f.name} = "{_NONE}"')
    return lines


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    if isinstance(value, Mapping):
        rows = [f"{_toml_value(k)} = {_toml_value(v)}" for k, v in value.items()]
        return "{ " + ", ".join(rows) + " }" if rows else "{}"
    # JSON's strings, booleans and numbers are TOML's, but for one escape (DEL).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
