"""Are two adapters, or two checkpoints, the same? Tensor by tensor, byte by byte.

Files are compared as they are stored: a sharded checkpoint equals a single-file one
that holds the same tensors, a packed weight equals only the same packed bytes. What is
computed from the tensors counts too: the same `lora_A` and `lora_B` under another
`lora_alpha` are another adapter.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert.files import (
    DTYPES,
    TensorFiles,
    check_model_directory,
    open_model,
    read_json,
)
from convert.peft import CONFIG, open_adapter
from qlora_jax.config import LlamaConfig, RopeScaling
from qlora_jax.errors import UserError
from qlora_jax.lora_config import LoraConfig

# What two adapters may differ in and still compute the same.
_NOT_COMPUTED = ("raw", "base_model_name_or_path", "lora_dropout", "init_lora_weights")


@dataclass(frozen=True)
class Difference:
    """One tensor that both have and that is not the same."""

    name: str
    a: str
    """dtype and shape in the first, as in "BF16 [64, 8]"."""
    b: str
    max_abs_difference: float | None
    """None where shapes differ, or the dtypes are no numbers to subtract."""


@dataclass(frozen=True)
class Comparison:
    """What `compare` found."""

    a: str
    """The first directory."""
    b: str
    kind: Literal["adapter", "model"]
    tensors: int
    """How many names both have."""
    missing: list[str]
    """In the first, not in the second."""
    extra: list[str]
    """In the second, not in the first."""
    different: list[Difference]
    config: dict[str, list[Any]]
    """Configuration fields that differ: [first, second]."""

    @property
    def equal(self) -> bool:
        """Whether the two are the same."""
        return not (self.missing or self.extra or self.different or self.config)

    def to_json(self) -> dict[str, Any]:
        """Returns the findings as plain data."""
        return {"equal": self.equal, **dataclasses.asdict(self)}


def compare(a: str | os.PathLike[str], b: str | os.PathLike[str]) -> Comparison:
    """Compares two PEFT directories or two Hugging Face directories.

    Raises:
      CheckpointError: a directory that cannot be read.
      UserError: an adapter against a model.
    """
    kind_a, config_a, files_a = _open(Path(a))
    kind_b, config_b, files_b = _open(Path(b))
    if kind_a != kind_b:
        raise UserError(
            f"`{a}` is {_ARTICLE[kind_a]} and `{b}` is {_ARTICLE[kind_b]}; give two "
            "adapters or two models."
        )
    common = files_a.in_file_order([name for name in files_a if name in files_b])
    different = [
        found
        for name in common
        if (found := _difference(files_a, files_b, name)) is not None
    ]
    return Comparison(
        a=str(a),
        b=str(b),
        kind=kind_a,
        tensors=len(common),
        missing=sorted(name for name in files_a if name not in files_b),
        extra=sorted(name for name in files_b if name not in files_a),
        different=different,
        config=_config_differences(config_a, config_b),
    )


_ARTICLE = {"adapter": "an adapter", "model": "a model"}


def _open(
    path: Path,
) -> tuple[Literal["adapter", "model"], LlamaConfig | LoraConfig, TensorFiles]:
    path = adapter_directory(path)
    if (path / CONFIG).is_file():
        lora, files = open_adapter(path)
        return "adapter", lora, files
    check_model_directory(path)
    config = LlamaConfig.from_hf(read_json(path / "config.json"))
    return "model", config, open_model(path)


def adapter_directory(path: Path) -> Path:
    """The PEFT directory meant by `path`: itself, or `adapter/` in a run directory."""
    inside = path / "adapter"
    if not (path / CONFIG).is_file() and (inside / CONFIG).is_file():
        return inside
    return path


def _difference(a: TensorFiles, b: TensorFiles, name: str) -> Difference | None:
    one, two = a[name], b[name]
    a_is, b_is = (f"{info.dtype} {list(info.shape)}" for info in (one, two))
    if one.shape != two.shape:
        return Difference(name, a_is, b_is, None)
    if one.dtype not in DTYPES or two.dtype not in DTYPES:
        raise UserError(f"`{name}`: {a_is} and {b_is} cannot be compared.")
    x, y = a.read(name), b.read(name)
    if one.dtype == two.dtype and x.tobytes() == y.tobytes():
        return None
    largest = 0.0
    x, y = x.reshape(-1), y.reshape(-1)
    step = 1 << 20  # bounds the float64 scratch
    for i in range(0, x.size, step):
        chunk = np.abs(
            x[i : i + step].astype(np.float64) - y[i : i + step].astype(np.float64)
        )
        # A NaN on either side is a difference that no number states.
        if np.isnan(chunk).any():
            return Difference(name, a_is, b_is, None)
        largest = max(largest, float(chunk.max()))
    return Difference(name, a_is, b_is, largest)


def _config_differences(
    a: LlamaConfig | LoraConfig, b: LlamaConfig | LoraConfig
) -> dict[str, list[Any]]:
    out = {}
    for f in dataclasses.fields(a):
        if f.name in _NOT_COMPUTED:
            continue
        values = [getattr(a, f.name), getattr(b, f.name)]
        if f.name == "target_modules":
            # An order that carries no meaning.
            values = [v if isinstance(v, str) else sorted(v) for v in values]
        if values[0] != values[1]:
            out[f.name] = [
                dataclasses.asdict(v) if isinstance(v, RopeScaling) else v
                for v in values
            ]
    return out
