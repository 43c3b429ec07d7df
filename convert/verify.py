"""Are two adapters, or two checkpoints, the same? Tensor by tensor, byte by byte.

Files are compared as they are stored: a sharded checkpoint equals a single-file one
that holds the same tensors, a packed weight equals only the same packed bytes. What is
computed from the tensors counts too: the same `lora_A` and `lora_B` under another
`lora_alpha` are another adapter. How a configuration is spelled does not count: two
that give the same modules the same ranks and scalings are one.
"""

from __future__ import annotations

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from convert import names
from convert.checkpoint import open_config
from convert.files import DTYPES, TensorFiles, open_model
from convert.peft import CONFIG, open_adapter, peft_directory
from qlora_jax.errors import UserError
from qlora_jax.lora.config import LoraConfig
from qlora_jax.lora.targets import (
    AdaptedModule,
    FullTensor,
    Selection,
    TokenRows,
    select,
)
from qlora_jax.models import params as model_params
from qlora_jax.models.config import LlamaConfig, RopeScaling

# What two adapters may differ in and still compute the same.
_NOT_COMPUTED = (
    "raw",
    "base_model_name_or_path",
    "revision",
    "base_fingerprint",
    "lora_dropout",
    "init_lora_weights",
)
# Fields that say together what is trained, and with which factor.
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
# What PEFT may write beside an adapter: tables of the base, and biases of modules that
# are trained whole, again, under its internal names.
_COPY = re.compile(
    r"\.base_layer\.weight$|\.(original_module|modules_to_save\.default)\."
)


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
    """Configuration fields that differ: [first, second]. Of two adapters on a given
    base also the modules that they train differently."""
    notes: list[str] = field(default_factory=list)
    """What may be worth knowing though it makes no difference."""
    logits: dict[str, Any] | None = None
    """How their logits differ, where that was asked."""

    @property
    def equal(self) -> bool:
        """Whether the two are the same."""
        return not (self.missing or self.extra or self.different or self.config)

    def to_json(self) -> dict[str, Any]:
        """Returns the findings as plain data."""
        return {"equal": self.equal, **dataclasses.asdict(self)}


def compare(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    *,
    base: LlamaConfig | None = None,
) -> Comparison:
    """Compares two PEFT directories or two Hugging Face directories.

    Args:
      a: the first.
      b: the second.
      base: of two adapters, the configuration of their base: what they select there is
        compared. Without it, it is concluded from the tensors that they have.

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
    notes = []
    if kind_a == "adapter":
        for directory, names_there in ((a, missing), (b, extra)):
            copies = [key for key in names_there if _COPY.search(key)]
            if copies:
                names_there[:] = [key for key in names_there if key not in copies]
                notes.append(
                    f"`{directory}` also holds copies of the base's tensors: "
                    f"{', '.join(copies)}"
                )
    common = [key for key in keys_a if key in keys_b]
    place = {keys_a[key]: key for key in common}
    different = [
        found
        for name in files_a.in_file_order(list(place))
        if (found := _difference(files_a, files_b, name, keys_b[place[name]]))
    ]
    config = _config_differences(config_a, config_b)
    if isinstance(config_a, LoraConfig) and isinstance(config_b, LoraConfig):
        same_names = not missing and not extra
        if base is not None:
            config = _selected_differences(config, config_a, config_b, base)
        elif same_names and _same_factors(common, config_a, config_b):
            config = {k: v for k, v in config.items() if k not in _SELECTING}
        one, two = config_a.base_fingerprint, config_b.base_fingerprint
        if one is not None and two is not None and one != two:
            notes.append(
                "they were trained on different bases (or on different quantizations "
                f"or dtypes of one), with fingerprints {one[:12]} and {two[:12]}"
            )
    return Comparison(
        a=str(a),
        b=str(b),
        kind=kind_a,
        tensors=len(common),
        missing=missing,
        extra=extra,
        different=different,
        config=config,
        notes=notes,
    )


_ARTICLE = {"adapter": "an adapter", "model": "a model"}


def _open(
    path: Path,
) -> tuple[Literal["adapter", "model"], LlamaConfig | LoraConfig, TensorFiles]:
    path = peft_directory(path)
    if (path / CONFIG).is_file():
        lora, files = open_adapter(path)
        return "adapter", lora, files
    return "model", open_config(path), open_model(path)


def _keys(files: TensorFiles) -> dict[str, str]:
    """Names of tensors -> how this file spells them."""
    return {
        re.sub(r"(?<=\.lora_magnitude_vector)\.weight$", "", key): key for key in files
    }


def _difference(
    a: TensorFiles, b: TensorFiles, name: str, other: str
) -> Difference | None:
    one, two = a[name], b[other]
    a_is, b_is = (f"{info.dtype} {list(info.shape)}" for info in (one, two))
    if one.shape != two.shape:
        return Difference(name, a_is, b_is, None)
    if one.dtype not in DTYPES or two.dtype not in DTYPES:
        raise UserError(f"`{name}`: {a_is} and {b_is} cannot be compared.")
    x, y = a.read(name), b.read(other)
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
        if f.name in ("target_modules", "exclude_modules", "modules_to_save"):
            # An order that carries no meaning.
            values = [sorted(v) if isinstance(v, tuple) else v for v in values]
        if values[0] != values[1]:
            out[f.name] = [
                dataclasses.asdict(v) if isinstance(v, RopeScaling) else v
                for v in values
            ]
    return out


def _same_factors(keys: list[str], a: LoraConfig, b: LoraConfig) -> bool:
    """Whether each module that has tensors in a file gets the same from both.

    Ranks are in the shapes; which modules, in the names.
    """
    if a.token_rows != b.token_rows:
        return False
    modules = {
        key.removeprefix(names.PEFT_PREFIX).partition(".lora_")[0]
        for key in keys
        if ".lora_" in key
    }
    one, two = a.ranks_and_scalings(modules), b.ranks_and_scalings(modules)
    return all(one[m][1] == two[m][1] for m in modules)


def _selected_differences(
    config: dict[str, list[Any]], a: LoraConfig, b: LoraConfig, base: LlamaConfig
) -> dict[str, list[Any]]:
    """The differences of two configurations that are some on this base."""
    tree = model_params.abstract_base(base)
    one, two = (_described(select(tree, lora)) for lora in (a, b))
    modules = {
        name: [one.get(name), two.get(name)]
        for name in dict.fromkeys([*one, *two])
        if one.get(name) != two.get(name)
    }
    if not modules:
        config = {k: v for k, v in config.items() if k not in _SELECTING}
    return config | modules


def _described(selection: Selection) -> dict[str, str]:
    """What is trained, in words: path -> how."""
    out: dict[str, str] = {}
    for item in (*selection.adapted, *selection.full_tensors, *selection.rows):
        name = ".".join(item.path)
        out[name] = f"{out[name]}; {_words(item)}" if name in out else _words(item)
    return out


def _words(item: AdaptedModule | FullTensor | TokenRows) -> str:
    if isinstance(item, FullTensor):
        if all(item.trained):
            return "trained whole"
        layers = [i for i, chosen in enumerate(item.trained) if chosen]
        return f"trained whole in layers {layers}"
    if isinstance(item, TokenRows):
        return f"rows {list(item.indices)}"
    parts = [
        f"{name} {values[0] if len(set(values)) == 1 else list(values)}"
        for name, values in (("r", item.ranks), ("scaling", item.scalings))
    ]
    parts += ["DoRA"] if item.dora else []
    parts += ["lora_bias"] if item.lora_bias else []
    return ", ".join(parts)
