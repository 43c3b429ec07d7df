"""Compares two adapters, or two checkpoints, tensor by tensor and byte by byte.

Files are compared as they are stored: a sharded checkpoint equals a single file with
the same tensors, a packed weight equals only the same packed bytes. The configuration
counts as far as it changes the computation: the same `lora_A` and `lora_B` with another
`lora_alpha` are another adapter, while two spellings that give the same modules the
same ranks and scalings are equal.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.checkpoint import open_config, open_model
from convert.files import DTYPES, TensorFiles
from convert.names import PEFT_PREFIX
from convert.peft import ADAPTER_CONFIG, open_adapter, peft_directory
from qlora_jax.errors import UserError
from qlora_jax.lora import (
    AdaptedModule,
    FullTensor,
    LoraConfig,
    Selection,
    TokenRows,
    select,
)
from qlora_jax.models import LlamaConfig, RopeScaling
from qlora_jax.models import params as model_params

# Fields that do not change what an adapter computes.
_NOT_COMPUTED = (
    "raw",
    "base_model_name_or_path",
    "revision",
    "base_fingerprint",
    "lora_dropout",
    "init_lora_weights",
)
# Fields that together select what is trained, and with which factor.
_SELECTING = (
    "r",
    "lora_alpha",
    "target_modules",
    "exclude_modules",
    "layers_to_transform",
    "layers_pattern",
    "rank_pattern",
    "alpha_pattern",
    "use_rslora",
    "bias",
    "modules_to_save",
    "trainable_token_indices",
    "ensure_weight_tying",
)
# Copies that PEFT may add to an adapter: tables of the base, and biases of fully
# trained modules under its internal names.
_COPY = re.compile(
    r"\.base_layer\.weight$|\.(original_module|modules_to_save\.default)\."
)


@dataclass(frozen=True)
class Difference:
    """A tensor that both have and that differs."""

    name: str
    a: str
    """dtype and shape in the first, as in "BF16 [64, 8]"."""
    b: str
    max_abs_difference: float | None
    """None where shapes differ, or one of them is NaN."""


@dataclass(frozen=True)
class Comparison:
    """The result of `compare_adapters`."""

    a: str
    """The first directory."""
    b: str
    kind: Literal["adapter", "model"]
    tensors: int
    """Number of names that both have."""
    missing: list[str]
    """In the first, not in the second."""
    extra: list[str]
    """In the second, not in the first."""
    different: list[Difference]
    config: dict[str, list[Any]]
    """Configuration fields that differ: [first, second]. For two adapters and a base,
    also the modules that they train differently."""
    notes: list[str] = field(default_factory=list)
    """Differences that do not count."""
    logits: dict[str, Any] | None = None
    """How their logits differ, if they were compared."""

    @property
    def equal(self) -> bool:
        """Whether the two are the same."""
        return not (self.missing or self.extra or self.different or self.config)

    def to_json(self) -> dict[str, Any]:
        """Returns the comparison as plain data."""
        return {"equal": self.equal, **dataclasses.asdict(self)}


def compare_adapters(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    base: LlamaConfig | None = None,
) -> Comparison:
    """Compares two PEFT directories or two Hugging Face directories.

    Args:
      a: the first.
      b: the second.
      base: configuration of two adapters' base; what they select in it is compared.
        Without it, the selection is inferred from the tensors that they have.

    Raises:
      CheckpointError: a directory that cannot be read.
      UserError: an adapter against a model, or targets that are not in `base`.
    """
    kind_a, config_a, files_a = _open(Path(a))
    kind_b, config_b, files_b = _open(Path(b))
    if kind_a != kind_b:
        raise UserError(
            f"`{a}` is {_ARTICLE[kind_a]} and `{b}` is {_ARTICLE[kind_b]}; give two "
            "adapters or two models."
        )
    if base is not None and kind_a == "model":
        raise UserError(
            f"A base goes with two adapters, and `{a}` and `{b}` are models."
        )
    keys_a, keys_b = _keys(files_a), _keys(files_b)
    missing = sorted(key for key in keys_a if key not in keys_b)
    extra = sorted(key for key in keys_b if key not in keys_a)
    common = [key for key in keys_a if key in keys_b]
    notes: list[str] = []
    config = _config_differences(config_a, config_b)
    if isinstance(config_a, LoraConfig) and isinstance(config_b, LoraConfig):
        missing = _without_copies(missing, a, notes)
        extra = _without_copies(extra, b, notes)
        if base is not None:
            config = _selected_differences(config, config_a, config_b, base)
        elif not (missing or extra) and _same_factors(common, config_a, config_b):
            config = {k: v for k, v in config.items() if k not in _SELECTING}
        notes += _base_notes(config_a.base_fingerprint, config_b.base_fingerprint)
    name_of = {keys_a[key]: key for key in common}
    differences = [
        _difference(files_a, files_b, name, keys_b[name_of[name]])
        for name in files_a.in_file_order(list(name_of))
    ]
    return Comparison(
        a=str(a),
        b=str(b),
        kind=kind_a,
        tensors=len(common),
        missing=missing,
        extra=extra,
        different=[d for d in differences if d is not None],
        config=config,
        notes=notes,
    )


_ARTICLE = {"adapter": "an adapter", "model": "a model"}


def _open(
    path: Path,
) -> tuple[Literal["adapter", "model"], LlamaConfig | LoraConfig, TensorFiles]:
    path = peft_directory(path)
    if (path / ADAPTER_CONFIG).is_file():
        lora, files = open_adapter(path)
        return "adapter", lora, files
    return "model", open_config(path), open_model(path)


def _base_notes(a: str | None, b: str | None) -> list[str]:
    if a is None or b is None or a == b:
        return []
    return [
        "they were trained on different bases (or on different quantizations or dtypes "
        f"of the same base), with fingerprints {a[:12]} and {b[:12]}"
    ]


def _without_copies(
    keys: list[str], directory: str | os.PathLike[str], notes: list[str]
) -> list[str]:
    """Removes copies of the base's tensors from the keys of one adapter only."""
    copies = [key for key in keys if _COPY.search(key)]
    if copies:
        notes.append(
            f"`{directory}` also holds copies of the base's tensors: "
            f"{', '.join(copies)}"
        )
    return [key for key in keys if key not in copies]


def _keys(files: TensorFiles) -> dict[str, str]:
    """Returns names of tensors -> their spellings in this file."""
    return {
        re.sub(r"(?<=\.lora_magnitude_vector)\.weight$", "", key): key for key in files
    }


def _difference(
    a: TensorFiles, b: TensorFiles, name: str, name_in_b: str
) -> Difference | None:
    info_a, info_b = a[name], b[name_in_b]
    form_a, form_b = (f"{info.dtype} {list(info.shape)}" for info in (info_a, info_b))
    if info_a.shape != info_b.shape:
        return Difference(name, form_a, form_b, None)
    if info_a.dtype not in DTYPES or info_b.dtype not in DTYPES:
        raise UserError(f"`{name}`: {form_a} and {form_b} cannot be compared.")
    x, y = a.read(name), b.read(name_in_b)
    # As bytes: 0.0 differs from -0.0, and NaN equals itself.
    if info_a.dtype == info_b.dtype and x.tobytes() == y.tobytes():
        return None
    largest = 0.0
    x, y = x.reshape(-1), y.reshape(-1)
    step = 1 << 20  # bounds the float64 scratch
    for i in range(0, x.size, step):
        # float64 holds the difference of any two values here, codes (uint8) included,
        # without overflow.
        chunk = np.abs(
            x[i : i + step].astype(np.float64) - y[i : i + step].astype(np.float64)
        )
        if np.isnan(chunk).any():
            return Difference(name, form_a, form_b, None)
        largest = max(largest, float(chunk.max()))
    return Difference(name, form_a, form_b, largest)


def _config_differences(
    a: LlamaConfig | LoraConfig, b: LlamaConfig | LoraConfig
) -> dict[str, list[Any]]:
    out = {}
    for f in dataclasses.fields(a):
        if f.name in _NOT_COMPUTED:
            continue
        values = [getattr(a, f.name), getattr(b, f.name)]
        if f.name in ("target_modules", "exclude_modules", "modules_to_save"):
            # Their order has no meaning.
            values = [sorted(v) if isinstance(v, tuple) else v for v in values]
        if values[0] != values[1]:
            out[f.name] = [
                dataclasses.asdict(v) if isinstance(v, RopeScaling) else v
                for v in values
            ]
    return out


def _same_factors(keys: list[str], a: LoraConfig, b: LoraConfig) -> bool:
    """Whether two configurations scale each module in the files alike.

    The names of tensors give the modules, their shapes the ranks.
    """
    if a.token_rows != b.token_rows:
        return False
    modules = {
        key.removeprefix(PEFT_PREFIX).partition(".lora_")[0]
        for key in keys
        if ".lora_" in key
    }
    values_a, values_b = (lora.ranks_and_scalings(modules) for lora in (a, b))
    return all(values_a[module][1] == values_b[module][1] for module in modules)


def _selected_differences(
    config: dict[str, list[Any]], a: LoraConfig, b: LoraConfig, base: LlamaConfig
) -> dict[str, list[Any]]:
    """Returns the differences of two configurations that matter on this base."""
    tree = model_params.abstract_base(base)
    trained_a, trained_b = (_describe(select(tree, lora)) for lora in (a, b))
    modules = {
        name: [trained_a.get(name), trained_b.get(name)]
        for name in dict.fromkeys([*trained_a, *trained_b])
        if trained_a.get(name) != trained_b.get(name)
    }
    if not modules:
        config = {k: v for k, v in config.items() if k not in _SELECTING}
    return config | modules


def _describe(selection: Selection) -> dict[str, str]:
    """Describes what is trained: path -> how."""
    descriptions: dict[str, list[str]] = {}
    for item in (*selection.adapted, *selection.full_tensors, *selection.rows):
        descriptions.setdefault(".".join(item.path), []).append(_describe_item(item))
    return {name: "; ".join(parts) for name, parts in descriptions.items()}


def _describe_item(item: AdaptedModule | FullTensor | TokenRows) -> str:
    if isinstance(item, FullTensor):
        if all(item.trained):
            return "fully trained"
        layers = [i for i, is_trained in enumerate(item.trained) if is_trained]
        return f"fully trained in layers {layers}"
    if isinstance(item, TokenRows):
        return f"rows {list(item.indices)}"
    parts = [
        f"{name} {values[0] if len(set(values)) == 1 else list(values)}"
        for name, values in (("r", item.ranks), ("scaling", item.scalings))
    ]
    parts += ["DoRA"] if item.dora else []
    parts += ["lora_bias"] if item.lora_bias else []
    return ", ".join(parts)
