"""Publishes adapters and models on the Hugging Face hub, with a model card.

    check_push("me/tuned")                            # before the work
    publish(Path("run/adapter"), "me/tuned", run=Path("run"))

The card says what the base is, what the run was trained on and how, its losses, and how
the result is loaded. It names files of this machine by their last part only.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

from convert import (
    ADAPTER_CONFIG,
    MERGE_REPORT,
    HubName,
    check_push,
    hub_name,
    open_adapter,
    push,
    read_json,
    training_record,
    write_text,
)
from qlora_jax.errors import CheckpointError, say, visible
from qlora_jax.lora import LoraConfig
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.directory import ADAPTER, BEST, REPORT, STARTED, read_settings
from qlora_jax.runs.loading import base_candidates
from qlora_jax.runs.report import best_evaluation
from qlora_jax.runs.rows import read_evaluations, read_facts
from qlora_jax.version import __version__

PUBLISHED = "published.json"
Relation = Literal["finetune", "quantized"]

_HUB_NAME = re.compile(r"\w[\w.-]*/\w[\w.-]*", re.A)
_REVISION = re.compile(r"[\w./-]+", re.A)


def publish(
    directory: Path,
    name: str,
    *,
    run: Path | None = None,
    base: Path | None = None,
    relation: Relation | None = None,
) -> str:
    """Publishes a PEFT or model directory; returns the address of the commit.

    Args:
      directory: what is published.
      name: `owner/name` on the hub, which `convert.check_push` has checked.
      run: directory of the run that trained it, if there is one.
      base: directory that it was made from, of which a name on the hub is named.
      relation: of a model to its base, as the hub sorts them; None = the same weights.

    Raises:
      CheckpointError: the hub refuses, or cannot be reached.
    """
    lora = _adapter_in(directory)
    if lora is not None and _parse(lora.base_model_name_or_path, directory) is None:
        say(
            f"Note: the adapter's base is {lora.base_model_name_or_path!r}, which "
            "nobody else finds. `--base-name owner/name`, or "
            "`lora.base_model_name_or_path` of a run, names it as it is on the hub."
        )
    card = model_card(directory, name, run=run, base=base, relation=relation)
    return push(directory, name, card)


def published(config: RunConfig) -> dict[str, Any]:
    """Returns what a run has published as its `hub.model_id`; {} for nothing."""
    file = Path(config.output_dir) / PUBLISHED
    try:
        record = read_json(file) if file.is_file() else {}
    except CheckpointError as error:
        say(f"Note: {error} The adapter is published again.")
        return {}
    is_this = record.get("model_id") == config.hub.model_id
    return record if is_this and isinstance(record.get("url"), str) else {}


def publish_run(config: RunConfig, steps: int) -> str:
    """Publishes the adapter of a complete run, once; returns the address.

    Args:
      config: has a `hub.model_id`.
      steps: that the run has taken.

    Raises:
      CheckpointError: the hub refuses, or cannot be reached.
    """
    directory, name = Path(config.output_dir), config.hub.model_id
    assert name is not None
    this = {"model_id": name, "adapter": config.hub.adapter, "steps": steps}
    before = published(config)
    if this.items() <= before.items():
        return before["url"]
    adapter = directory / (BEST if config.hub.adapter == "best" else ADAPTER)
    try:
        check_push(name, private=config.hub.private)
        url = publish(adapter, name, run=directory)
    except CheckpointError as error:
        raise CheckpointError(
            f"The run is complete and its adapter is `{adapter}`, but it was not "
            f"published: {error} The same command tries again."
        ) from error
    write_text(directory / PUBLISHED, json.dumps({**this, "url": url}, indent=2) + "\n")
    say(f"Published `{adapter}`: {url}")
    return url


def model_card(
    directory: Path,
    name: str,
    *,
    run: Path | None = None,
    base: Path | None = None,
    relation: Relation | None = None,
) -> str:
    """Returns the model card (README.md) of a PEFT or model directory.

    Args:
      directory: of the adapter or model.
      name: `owner/name` on the hub.
      run: as `publish` takes it, like the next two.
      base: what it was made from.
      relation: of a model to it.
    """
    lora = _adapter_in(directory)
    settings = None if run is None else read_settings(run)
    origin = _base_name(directory, lora, settings, base)
    parts = [
        _front_matter(lora, origin, relation),
        f"# {name.rpartition('/')[2]}",
        _summary(directory, lora, settings, origin, relation),
        "## Use",
        _loading_code(name, lora is not None),
    ]
    if run is not None and settings is not None:
        facts = {
            **(read_facts(run / STARTED, []) or {}),
            **(read_facts(run / REPORT, []) or {}),
        }
        trained = lora or _adapter_in(run / ADAPTER)
        # The file names the targets of the model; settings may have every family's.
        parts += _run_sections(run, settings, trained or settings.lora, facts)
        source = directory if lora is not None else run / ADAPTER
        if isinstance(step := training_record(source).get("step"), int):
            parts.append(f"The weights are those of step {step:,}.")
    elif lora is not None:
        parts += ["## Adapter", _table(_lora_rows(lora))]
    parts.append(f"Made with qlora-jax {__version__}.")
    return "\n\n".join(parts) + "\n"


def _adapter_in(directory: Path) -> LoraConfig | None:
    """Returns the configuration of a PEFT directory; None if it is none."""
    if not (directory / ADAPTER_CONFIG).is_file():
        return None
    return open_adapter(directory, strict=False)[0]


def _base_name(
    directory: Path,
    lora: LoraConfig | None,
    settings: RunConfig | None,
    base: Path | None,
) -> HubName | None:
    """Returns the name of the base on the hub, if one is known."""
    names = [None if base is None else hub_name(base)]
    if settings is not None:
        names.append(_parse(settings.model.path, directory))
    if lora is not None:
        named = _parse(lora.base_model_name_or_path, directory)
        if named is not None and _REVISION.fullmatch(lora.revision or ""):
            named = HubName(named.repo_id, lora.revision)
        names.insert(0, named)
    return next((name for name in names if name is not None), None)


def _parse(path: str | None, adapter: Path) -> HubName | None:
    """Returns the name on the hub that a base has; None for a path of this machine."""
    repo_id, _, revision = (path or "").partition("@")
    if not _HUB_NAME.fullmatch(repo_id):
        return None
    if any(place.exists() for place in base_candidates(adapter, repo_id)):
        return None
    # Text of a file ends in a card, where it must not start markup.
    return HubName(repo_id, revision if _REVISION.fullmatch(revision) else None)


def _front_matter(
    lora: LoraConfig | None, base: HubName | None, relation: Relation | None
) -> str:
    """Returns the metadata, https://huggingface.co/docs/hub/model-cards, as YAML."""
    tags = ["qlora-jax", *(["lora"] if lora is not None else [])]
    fields: dict[str, Any] = {
        "library_name": "transformers" if lora is None else "peft",
        "pipeline_tag": "text-generation",
        "tags": tags,
    }
    if base is not None:
        fields["base_model"] = base.repo_id
        fields["base_model_relation"] = "adapter" if lora is not None else relation
    fields = {key: value for key, value in fields.items() if value is not None}
    # JSON is YAML, and quotes what YAML would read as something else.
    lines = [f"{key}: {json.dumps(value)}" for key, value in fields.items()]
    return "\n".join(["---", *lines, "---"])


def _summary(
    directory: Path,
    lora: LoraConfig | None,
    settings: RunConfig | None,
    base: HubName | None,
    relation: Relation | None,
) -> str:
    on = "a local model"
    if base is not None:
        at = f" at revision `{base.revision}`" if base.revision else ""
        on = f"[{base.repo_id}](https://huggingface.co/{base.repo_id}){at}"
    if lora is None:
        config = read_json(directory / "config.json")
        packed = bool(config.get("quantization_config"))
        form = " in 4 bits (bitsandbytes NF4)" if packed else ""
        what = "fine-tuned" if relation == "finetune" else "written anew"
        report = directory / MERGE_REPORT
        if report.is_file() and read_json(report).get("onto") == "dequantized":
            what += ", the adapter merged onto the 4-bit weights it was trained on"
        return f"{on[0].upper()}{on[1:]}, {what}{form}."
    kind = "LoRA"
    if settings is not None and settings.model.quantization != "none":
        kind = f"QLoRA ({settings.model.quantization})"
    return f"A {kind} adapter for {on}."


def _loading_code(name: str, is_adapter: bool) -> str:
    cls, module = "AutoModelForCausalLM", "transformers"
    if is_adapter:
        cls, module = "AutoPeftModelForCausalLM", "peft"
    return f"""```python
from {module} import {cls}
from transformers import AutoTokenizer

model = {cls}.from_pretrained("{name}")
tokenizer = AutoTokenizer.from_pretrained("{name}")
```

or in JAX:

```python
import qlora_jax as qj

model = qj.load("{name}")
```"""


def _run_sections(
    run: Path, settings: RunConfig, lora: LoraConfig, facts: Mapping[str, Any]
) -> Iterator[str]:
    data, train = settings.data, settings.train
    report = facts.get("data") or {}
    paths = [p for source in data.each for p in _paths(source.path)]
    yield "## Data"
    yield _table(
        {
            "files": ", ".join(dict.fromkeys(map(_last_part, paths))),
            "format": ", ".join(dict.fromkeys(str(s.format) for s in data.each)),
            "examples": report.get("examples"),
            "tokens": report.get("tokens"),
            "supervised tokens": report.get("supervised_tokens"),
            "longest row": report.get("longest_row"),
        }.items()
    )
    yield "## Training"
    yield _table(
        [
            *_lora_rows(lora),
            ("trained parameters", facts.get("trainable_parameters")),
            ("base quantized to", settings.model.quantization),
            ("dtype", settings.model.dtype),
            ("steps", facts.get("steps")),
            ("rows per step", train.batch_size * train.gradient_accumulation_steps),
            ("max_length", data.max_length),
            ("optimizer", train.optimizer),
            ("learning rate", train.learning_rate),
            ("schedule", train.lr_scheduler),
            ("weight decay", train.weight_decay),
            ("seed", train.seed),
        ]
    )
    rows: dict[str, Any] = {"last training loss": _loss(facts.get("final_loss"))}
    best = best_evaluation(read_evaluations(run))
    if best is not None:
        rows["best held-out loss"] = f"{_loss(best['eval_loss'])} (step {best['step']})"
        rows["its perplexity"] = f"{best['eval_perplexity']:.4g}"
    yield "## Losses"
    yield _table(rows.items())
    versions = facts.get("versions") or {}
    yield "Trained with " + ", ".join(f"{k} {v}" for k, v in versions.items()) + "."


def _lora_rows(lora: LoraConfig) -> list[tuple[str, Any]]:
    targets = lora.target_modules
    text = targets if isinstance(targets, str) else ", ".join(sorted(targets or ()))
    return [
        ("r", lora.r),
        ("lora_alpha", lora.lora_alpha),
        ("lora_dropout", lora.lora_dropout),
        ("target_modules", text),
        ("modules_to_save", ", ".join(lora.modules_to_save or ())),
        (
            "variants",
            ", ".join(n for n in ("use_dora", "use_rslora") if getattr(lora, n)),
        ),
    ]


def _paths(path: str | Iterable[str]) -> list[str]:
    return [path] if isinstance(path, str) else list(path)


def _last_part(path: str) -> str:
    # A data set of the hub is named whole; a path of this machine is nobody's business.
    return path if path.startswith("hf:") else os.path.basename(path.rstrip("/"))


def _loss(value: Any) -> str | None:
    return f"{value:.4f}" if isinstance(value, float) else None


def _table(rows: Iterable[tuple[str, Any]]) -> str:
    """Returns a Markdown table of the rows that have a value."""
    lines = ["| | |", "|---|---|"]
    for key, value in rows:
        if value in (None, ""):
            continue
        text = f"{value:,}" if type(value) is int and value >= 10_000 else str(value)
        # Text of a file cannot end the table or start markup.
        text = re.sub(r"([\\|`*_<>\[\]])", r"\\\1", visible(text))
        lines.append(f"| {key} | {' '.join(text.split())} |")
    return "\n".join(lines)
