"""A training run as a directory: start it, watch it, stop it, continue it.

`run(config)` does what the training script under scripts/ does in the open, and adds
what a run needs around the step: data prepared in the background, checkpoints, metrics,
a progress line, a plot and a report. Given the same configuration and directory again
it continues from the newest checkpoint, bit for bit.

    RUN/config.toml     the resolved configuration
    RUN/metrics.jsonl   one object a step
    RUN/checkpoints/    Orbax
    RUN/adapter/        the adapter of the newest checkpoint, as a PEFT directory
    RUN/loss.png        drawn from metrics.jsonl
    RUN/report.json     what was trained, on what, with which versions
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import convert
from convert.checkpoint import open_checkpoint
from convert.peft import open_adapter
from qlora_jax.batches import Batches, prefetch
from qlora_jax.checkpoint import (
    CheckpointConfig,
    Checkpoints,
    compare_records,
    tree_fingerprint,
)
from qlora_jax.config import LlamaConfig, LoraConfig
from qlora_jax.data import DataConfig, Examples, load_examples
from qlora_jax.errors import UserError
from qlora_jax.linear import Compute
from qlora_jax.llama import Llama
from qlora_jax.model import load_tokenizer
from qlora_jax.lora import init_adapters, unmatched_targets
from qlora_jax.memory import trainable_groups, tree_bytes, tree_size
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.train import (
    TrainConfig,
    TrainState,
    init_state,
    make_optimizer,
    schedule,
    train_step,
)
from qlora_jax.watch import Watch, draw_loss


@dataclass(frozen=True)
class ModelConfig:
    """The `[model]` section: the base and how it is computed."""

    path: str
    """Hugging Face directory, or a bitsandbytes-4bit one (kept as it is packed)."""
    quantization: Literal["nf4", "nf4_dq", "none"] = "nf4_dq"
    """Of the linear layers: NF4, NF4 with double quantization, or none."""
    dtype: Literal["bfloat16", "float16", "float32"] = "bfloat16"
    """Of activations, matrix products and the tensors that stay dense."""
    attention: Literal["auto", "eager", "xla", "cudnn"] = "auto"
    """Attention implementation."""
    remat: Literal["none", "full", "save_matmuls"] = "full"
    """What the backward pass recomputes."""


@dataclass(frozen=True)
class LogConfig:
    """The `[log]` section."""

    every: int = 10
    """Steps between lines of progress where stderr is no terminal."""
    plot: bool = True
    """Draw loss.png (needs matplotlib)."""


@dataclass(frozen=True)
class RunConfig:
    """A whole run; what a TOML run file holds."""

    model: ModelConfig
    data: DataConfig
    train: TrainConfig
    lora: LoraConfig = field(default_factory=LoraConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    output_dir: str = "run"
    """The run directory; given again, the run continues."""


def run(config: RunConfig) -> dict[str, Any]:
    """Trains, or continues, a run; returns what report.json holds.

    Raises:
      UserError: input that cannot be used, a directory of something else, a run whose
        base, data or arithmetic has changed, or a loss that is not finite.
    """
    began = time.perf_counter()
    directory = Path(config.output_dir)
    _check_directory(directory)
    if config.train.adapter_init is not None:
        config = _with_initial_adapter(config)
    architecture = open_checkpoint(config.model.path).config
    tokenizer = load_tokenizer(config.model.path)
    if tokenizer is None and config.data.format != "tokens":
        raise UserError(
            f"`{config.model.path}` has no tokenizer, and data.format="
            f"{config.data.format!r} needs one. Put the model's tokenizer files there, "
            "or give token ids (data.format = 'tokens')."
        )
    examples = load_examples(
        config.data, tokenizer, vocab_size=architecture.vocab_size, progress=True
    )
    _say(examples.report.summary())
    batches = Batches(
        examples,
        config.data,
        batch_size=config.train.batch_size,
        accumulation_steps=config.train.gradient_accumulation_steps,
        pad_token_id=architecture.pad_token_id or 0,
        steps=config.train.steps,
        epochs=config.train.epochs,
    )
    steps = len(batches)
    if config.train.warmup_steps > steps:
        raise UserError(
            f"train: `warmup_steps`={config.train.warmup_steps} exceeds the "
            f"{steps} steps of this run."
        )
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.toml").write_text(to_toml(config))

    quantization = config.model.quantization
    architecture, base = convert.load_llama(
        config.model.path,
        quantization=None if quantization == "none" else quantization,
        dtype=config.model.dtype,
        progress=True,
    )
    fingerprint = tree_fingerprint(base)
    base = jax.tree.map(jnp.asarray, base)
    model = Llama(
        architecture,
        Compute(
            dtype=config.model.dtype,
            attention=config.model.attention,
            remat=config.model.remat,
            lora=config.lora,
        ),
    )
    optimizer = make_optimizer(config.train, steps)
    key = jax.random.key(config.train.seed)
    init_key, run_key = jax.random.split(key)
    if config.train.adapter_init is None:
        adapters = init_adapters(init_key, base, config.lora)
    else:
        adapters = convert.load_adapter(config.train.adapter_init, architecture)[1]
        adapters = jax.tree.map(jnp.asarray, adapters)
    groups = trainable_groups(adapters)
    _say(
        f"Training {sum(groups.values()):,} of {tree_parameters(base):,} parameters: "
        + ", ".join(f"{name} {count:,}" for name, count in groups.items())
        + "."
    )
    for name in unmatched_targets(base, config.lora):
        _say(f"Note: target module {name!r} selects nothing in this model.")
    state = init_state(adapters, optimizer, run_key)
    record = _record(config, fingerprint, examples)

    with Checkpoints(directory / "checkpoints", config.checkpoint) as checkpoints:
        start = 0
        newest = checkpoints.latest()
        if newest is not None:
            saved = checkpoints.record(newest)
            start = saved.pop("batches")
            compare_records(saved, record)
            state = checkpoints.restore(newest, state)
            _say(f"Continuing from step {newest} of {steps}.")
        step = jax.jit(
            partial(train_step, model=model, optimizer=optimizer), donate_argnums=0
        )
        with Watch(
            directory,
            start=start,
            steps=steps,
            schedule=schedule(config.train, steps),
            every=config.log.every,
            began=began,
        ) as watch:
            state = _loop(
                config,
                state,
                base,
                batches,
                start,
                step,
                watch,
                checkpoints,
                record,
                partial(_export, directory, config, architecture),
            )
    report = {
        "steps": steps,
        "final_loss": watch.last_loss,
        "trainable_parameters": sum(groups.values()),
        "groups": groups,
        "base_parameters": tree_parameters(base),
        "base_bytes": tree_bytes(base),
        "adapter_bytes": (directory / "adapter" / "adapter_model.safetensors")
        .stat()
        .st_size,
        "optimizer_bytes": tree_bytes(state.opt_state),
        "base_fingerprint": fingerprint,
        "data": dataclasses.asdict(examples.report),
        "versions": versions(),
        "device": jax.devices()[0].device_kind,
        "seconds_to_first_step": watch.seconds_to_first_step,
        "peak_memory_bytes": watch.peak_memory,
    }
    _write_text(directory / "report.json", json.dumps(report, indent=2) + "\n")
    if config.log.plot:
        draw_loss(directory)
    return report


def _loop(
    config: RunConfig,
    state: TrainState,
    base: Any,
    batches: Batches,
    start: int,
    step: Any,
    watch: Watch,
    checkpoints: Checkpoints,
    record: Mapping[str, Any],
    export: Any,
) -> TrainState:
    """Steps from batch `start` to the end; saves and exports on the way."""
    steps = len(batches)

    def save(index: int) -> None:
        checkpoints.save(state, {**record, "batches": index})
        export(state.adapters)

    pending: tuple[int, Any, Any] | None = None
    for index, batch in enumerate(prefetch(batches, start, steps), start):
        state, metrics = step(state, base, batch)
        # The numbers of the step before are read while this one computes.
        if pending is not None:
            _note(config, watch, checkpoints, *pending)
        pending = (index, metrics, batch)
        done = index + 1
        if done % config.checkpoint.every == 0 or done == steps:
            _note(config, watch, checkpoints, *pending)
            pending = None
            save(done)
    checkpoints.wait()
    if start == steps:
        export(state.adapters)
    return state


def _note(
    config: RunConfig,
    watch: Watch,
    checkpoints: Checkpoints,
    index: int,
    metrics: Mapping[str, Any],
    batch: Mapping[str, np.ndarray],
) -> None:
    """Writes a step's numbers down; stops the run if they are not finite."""
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    if not values.pop("finite"):
        place = Path(config.output_dir) / f"nonfinite_step_{index + 1}.npz"
        np.savez(place, **batch)
        newest = checkpoints.latest()
        good = (
            "There is no checkpoint yet"
            if newest is None
            else f"The last good checkpoint is `{checkpoints.path(newest)}`"
        )
        raise UserError(
            f"Step {index + 1} is not finite: loss {values['loss']}, gradient norm "
            f"{values['grad_norm']}. Its batch (number {index}) is saved as "
            f"`{place}`; the adapters were not changed by it. {good}. A lower "
            "learning rate, a longer warm-up or dtype = 'bfloat16' or 'float32' "
            "usually helps."
        )
    watch.step(index + 1, values, real_tokens(batch))


def real_tokens(batch: Mapping[str, np.ndarray]) -> int:
    """Counts the tokens of a batch that are not padding.

    In rows without segment ids these are the tokens up to the last supervised one.
    """
    if "segment_ids" in batch:
        return int((batch["segment_ids"] > 0).sum())
    supervised = batch["labels"] != -100
    last = supervised.shape[-1] - np.argmax(supervised[..., ::-1], axis=-1)
    return int(np.where(supervised.any(axis=-1), last, 0).sum())


def _export(
    directory: Path, config: RunConfig, architecture: LlamaConfig, adapters: Any
) -> None:
    convert.save_adapter(
        directory / "adapter",
        config.lora,
        jax.device_get(adapters),
        architecture,
        base_model_name_or_path=config.model.path,
        overwrite=True,
    )


def _check_directory(directory: Path) -> None:
    if not directory.exists():
        return
    if not directory.is_dir():
        raise UserError(f"The output directory `{directory}` is a file.")
    if any(directory.iterdir()) and not (directory / "config.toml").is_file():
        raise UserError(
            f"The output directory `{directory}` is not empty and holds no run "
            "(config.toml). Give an empty or new directory."
        )


def _with_initial_adapter(config: RunConfig) -> RunConfig:
    """Takes rank, scaling and targets from the adapter that the run starts from."""
    assert config.train.adapter_init is not None
    found = open_adapter(config.train.adapter_init)[0]
    lora = dataclasses.replace(
        config.lora,
        r=found.r,
        lora_alpha=found.lora_alpha,
        target_modules=found.target_modules,
        use_rslora=found.use_rslora,
    )
    _say(
        f"Starting from the adapter `{config.train.adapter_init}` (r={lora.r}, "
        f"lora_alpha={lora.lora_alpha}); it carries no optimizer state, so AdamW "
        "starts afresh."
    )
    return dataclasses.replace(config, lora=lora)


def _record(config: RunConfig, fingerprint: str, examples: Examples) -> dict[str, Any]:
    """What has to stay the same for a run to be continued."""
    train = dataclasses.asdict(config.train)
    lora = dataclasses.asdict(config.lora)
    del lora["base_model_name_or_path"], lora["revision"]
    if not isinstance(lora["target_modules"], str):
        lora["target_modules"] = sorted(lora["target_modules"])
    return {
        "base": fingerprint,
        "data": {
            "fingerprint": examples.report.fingerprint,
            "shuffle": config.data.shuffle,
            "seed": config.data.seed,
            "packing": config.data.packing,
        },
        "lora": lora,
        "train": train,
        "model": {"dtype": config.model.dtype},
    }


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    names = ("qlora-jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
    found = {"python": platform.python_version()}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def tree_parameters(base: Any) -> int:
    """Counts the parameters of a base tree, packed ones by their shape."""
    total = 0
    leaves = jax.tree.leaves(base, is_leaf=lambda x: isinstance(x, NF4Tensor))
    for leaf in leaves:
        if isinstance(leaf, NF4Tensor):
            total += leaf.codes.shape[0] * leaf.shape[0] * leaf.shape[1]
        else:
            total += tree_size(leaf)
    return total


def to_toml(config: Any) -> str:
    """Writes a run configuration as TOML; absent values are left out."""
    top, sections = [], []
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        if dataclasses.is_dataclass(value):
            lines = [f"[{f.name}]"]
            for inner in dataclasses.fields(value):
                item = getattr(value, inner.name)
                if item is not None:
                    lines.append(f"{inner.name} = {_toml_value(item)}")
            sections.append("\n".join(lines) + "\n")
        elif value is not None:
            top.append(f"{f.name} = {_toml_value(value)}\n")
    return "".join(top) + "\n" + "\n".join(sections)


def _toml_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_toml_value(v) for v in value) + "]"
    # JSON's strings, booleans and numbers are TOML's, but for one escape (DEL).
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")


def _write_text(path: Path, text: str) -> None:
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text)
    os.replace(temporary, path)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
