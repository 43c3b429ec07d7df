"""LoraConfig: the settings of an adapter, in the words of PEFT.

Field names and meanings are those of PEFT's `LoraConfig`, whose adapter_config.json is
read (`from_peft`) and written (`to_peft`). Everything that PEFT's LoRA computes for a
Llama is computed here too; the rest is refused by name. `qlora_jax.lora.targets` finds
the modules of a model that a configuration selects.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from qlora_jax.errors import Problems, UserError, did_you_mean
from qlora_jax.lora.patterns import first_matches, match_patterns
from qlora_jax.lora.peft_fields import other_method, passed_over, start_reason
from qlora_jax.tree import QUANTIZED, FrozenDict

# Fields of adapter_config.json for features that are not computed here -> the value
# that switches each off.
_REFUSED: Mapping[str, Any] = MappingProxyType(
    {
        "fan_in_fan_out": False,
        "layer_replication": None,
        "target_parameters": None,
        "alora_invocation_tokens": None,
        "use_qalora": False,
        "use_bdlora": None,
        "arrow_config": None,
        "kasa_config": None,
        "velora_config": None,
        "monteclora_config": None,
        "corda_config": None,
        "lora_ga_config": None,
        "megatron_config": None,
        "runtime_config": None,
    }
)
# Fields that change nothing of what is computed.
_INERT = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "inference_mode"),
    *("megatron_core", "qalora_group_size", "loftq_config", "eva_config"),
)
# Where a file lacks them; those of PEFT's other fields are ours too.
_PEFT_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"r": 8, "lora_alpha": 8, "target_modules": ("q_proj", "v_proj")}
)
# Fields that PEFT has had only since a later version than 0.6. Up to 0.13 it takes no
# file with a field that it does not know, so that these are written where they are set.
_LATER_FIELDS = (
    *("use_rslora", "use_dora", "exclude_modules", "lora_bias"),
    *("trainable_token_indices", "ensure_weight_tying"),
)
# PEFT's initializations that leave the base weights as they are: a trained adapter is
# complete without knowing its start.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

_INIT = re.compile(
    r"default|gaussian|orthogonal|pissa|pissa_niter_[1-9]\d?|olora|loftq"
)

# Not in adapter_config.json, but in the adapter's metadata or base_config.json.
_OUTSIDE = ("base_fingerprint", "base_config_changes")

# The larger expressions into which PEFT puts the patterns of a file: those of
# `rank_pattern` and `alpha_pattern`, the names in `modules_to_save` (which keep modules
# from being adapted), and `layers_pattern`.
AT_END = r"(.*\.)?({})$"
WITHIN = r"(^|.*\.){}($|\..*)"
BEFORE_NUMBER = r"(?:^|.*?\.){}\.(\d+)\."


@dataclass(frozen=True)
class LoraConfig:
    """Settings of an adapter; field names and meanings are PEFT's `LoraConfig`.

    The update of a linear layer is `scaling * B @ A` (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685) with `scaling = lora_alpha / r`, or
    `lora_alpha / sqrt(r)` under `use_rslora` (https://arxiv.org/abs/2312.03732).

    Raises:
      UserError: values out of range, of a wrong type, or that contradict each other;
        all of them.
    """

    # Frozen, with hashable values, so that it can be a static argument under jit.

    r: int = 16
    """Rank of the updates."""
    lora_alpha: int | float = 16
    """Numerator of the scaling."""
    target_modules: tuple[str, ...] | str = QUANTIZED
    """Module names (matched as path suffixes), "all-linear", or a regular expression
    that has to match the full module path. By default every linear layer of a decoder
    layer, by the names that all families have for them."""
    exclude_modules: tuple[str, ...] | str | None = None
    """Modules never adapted: names (path suffixes), or a regular expression."""
    layers_to_transform: int | tuple[int, ...] | None = None
    """Indices of the layers to adapt; needs a list of target_modules."""
    layers_pattern: tuple[str, ...] | str | None = None
    """Regular expressions for the name of the list of layers, "layers" in a Llama; the
    first that matches counts."""
    rank_pattern: Mapping[str, int] = FrozenDict()
    """Rank by module: a regular expression that has to match the end of the module's
    path, from a dot on -> rank. The first that matches counts."""
    alpha_pattern: Mapping[str, float] = FrozenDict()
    """lora_alpha by module, matched in the same way."""
    lora_dropout: float = 0.0
    """Probability of dropping an input element of the adapter while training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."""
    use_dora: bool = False
    """Train the norm of each output row as well (DoRA, arXiv:2402.09353)."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Which biases of the base to train: none, those of adapted modules, or all."""
    lora_bias: bool = False
    """Give each B a trained bias."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules trained in full and saved with the adapter: embed_tokens, lm_head, norms,
    custom ones."""
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = (
        None
    )
    """Rows of embed_tokens to train (and of a tied head), or rows by module."""
    ensure_weight_tying: bool = False
    """With tied embeddings: train embed_tokens and lm_head as one."""
    init_lora_weights: Literal[True] | str = "default"
    """How A and B start: default (A Kaiming-uniform, B zero; PEFT says true), gaussian,
    orthogonal, pissa, pissa_niter_N, olora, or loftq (NF4 base)."""
    task_type: str = "CAUSAL_LM"
    """PEFT's word for what the model does; a Llama here is a language model."""
    base_model_name_or_path: str | None = None
    """Path or hub name of the base in adapter_config.json; default `model.path` of a
    run. The run itself is loaded with `model.path`."""
    revision: str | None = None
    """Revision of the base on the hub."""
    base_fingerprint: str | None = None
    """SHA-256 of the base that was trained on; in the adapter file's metadata."""
    base_config_changes: str | None = None
    """The changes to the base's config.json that were trained with, as JSON; see
    `qlora_jax.models.config`."""

    def __post_init__(self) -> None:
        problems = Problems("the LoRA settings")
        for name, check in _CHECKS.items():
            with problems.collecting():
                object.__setattr__(self, name, check(name, getattr(self, name)))
        problems.raise_if_any()
        for problem in self._contradictions():
            problems.add(f"lora: {problem}")
        problems.raise_if_any()

    def _contradictions(self) -> Iterator[str]:
        """Yields the combinations of settings that PEFT refuses."""
        if self.layers_to_transform is not None and isinstance(
            self.target_modules, str
        ):
            yield (
                "`layers_to_transform` needs a list of `target_modules`; with "
                "'all-linear' or an expression, put the layers into the expression."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            yield "`layers_pattern` needs `layers_to_transform`."
        if self.lora_bias and self.use_dora:
            yield "`lora_bias` cannot be combined with `use_dora`."
        if self.lora_bias and self.init_lora_weights != "default":
            yield "`lora_bias` needs the default initialization."
        if self.use_dora and self.changes_base:
            yield (
                f"`init_lora_weights`={self.init_lora_weights!r} cannot be combined "
                "with `use_dora`: the magnitudes would be those of another base."
            )
        ranks = [self.r, *self.rank_pattern.values()]
        # A takes one half of a rotation's rows, B the other.
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in ranks):
            yield f"orthogonal initialization needs even ranks, got {ranks}."

    @property
    def scaling(self) -> float:
        """The factor of `B @ A` where no pattern gives another."""
        # alpha / r lets the update shrink as r grows; with alpha / sqrt(r) its size
        # does not depend on r (rsLoRA, arXiv:2312.03732).
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def uniform(self) -> bool:
        """Whether the trained tree needs no constants beyond one rank and `scaling`."""
        return not (
            self.rank_pattern
            or self.alpha_pattern
            or self.trainable_token_indices
            or self.ensure_weight_tying
            or self.use_dora
            or self.modules_to_save
            or self.bias != "none"
        )

    @property
    def changes_base(self) -> bool:
        """Whether A and B start from the weights and are subtracted from them."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    @property
    def token_rows(self) -> dict[str, tuple[int, ...]]:
        """`trainable_token_indices` as rows by module name."""
        rows = self.trainable_token_indices or {}
        rows = rows if isinstance(rows, Mapping) else {"embed_tokens": rows}
        return {name.rpartition(".")[2]: indices for name, indices in rows.items()}

    @property
    def absorbed(self) -> LoraConfig:
        """The configuration after `lora.init.absorb`: twice the rank, same scaling."""
        if not self.changes_base:
            return self
        # Keeps lora_alpha / r, or lora_alpha / sqrt(r), as r doubles.
        factor = math.sqrt(2.0) if self.use_rslora else 2
        ranks = {k: 2 * v for k, v in self.rank_pattern.items()}
        alphas = {k: v * factor for k, v in self.alpha_pattern.items()}
        return dataclasses.replace(
            self,
            r=2 * self.r,
            lora_alpha=self.lora_alpha * factor,
            rank_pattern=FrozenDict(ranks),
            alpha_pattern=FrozenDict(alphas),
            init_lora_weights="default",
        )

    def ranks_and_scalings(
        self, module_paths: Iterable[str]
    ) -> dict[str, tuple[int, float]]:
        """Returns dotted module path -> (rank, factor of `B @ A`)."""
        paths = tuple(module_paths)
        ranks, alphas = (
            first_matches(tuple(table), paths, field=f"lora: `{name}`", inside=AT_END)
            for name, table in (
                ("rank_pattern", self.rank_pattern),
                ("alpha_pattern", self.alpha_pattern),
            )
        )
        out = {}
        for path in paths:
            # Separately: a module may match a pattern of one table only. alpha is
            # divided by the module's own rank.
            r = self.rank_pattern[ranks[path]] if path in ranks else self.r
            alpha = self.lora_alpha
            if path in alphas:
                alpha = self.alpha_pattern[alphas[path]]
            out[path] = (r, alpha / (math.sqrt(r) if self.use_rslora else r))
        return out

    @classmethod
    def from_peft(
        cls,
        raw: Mapping[str, Any],
        *,
        strict: bool = True,
        skipped: list[str] | None = None,
    ) -> LoraConfig:
        """Reads the contents of PEFT's `adapter_config.json`.

        PEFT's defaults apply to absent fields.

        Args:
          raw: the file's content.
          strict: refuse unknown fields that are set; otherwise they are skipped.
          skipped: list to which the skipped fields are added.

        Raises:
          UserError: a method other than LoRA, LoRA features that are not computed here,
            or unusable values; named with their values.
        """
        if not isinstance(raw, Mapping):
            raise UserError(
                f"adapter_config.json must contain a JSON object, got {raw!r:.80}."
            )
        if "peft_type" not in raw and "lora_parameters" in raw:
            raise UserError(
                "adapter_config.json is that of an MLX adapter (`lora_parameters`), "
                "whose tensors have other names and shapes than PEFT's. Fuse it into "
                "its base with MLX (`mlx_lm.fuse`) and use the fused model."
            )
        if raw.get("peft_type") != "LORA":
            raise UserError(
                f"adapter_config.json: `peft_type` is {raw.get('peft_type')!r:.80}; "
                f"only 'LORA' adapters are supported.{other_method(raw)}"
            )
        raw, notes = passed_over(raw)
        init = raw.get("init_lora_weights", True)
        _refuse_features(raw, init)
        known = {f.name for f in dataclasses.fields(cls)} - {*_OUTSIDE, *_INERT}
        ignored = {*known, *_INERT, *_REFUSED}
        unknown = [n for n, v in raw.items() if n not in ignored and not _off(v, None)]
        if unknown and strict:
            shown = ", ".join(f"{n!r:.80}" for n in unknown[:10])
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise UserError(
                "adapter_config.json has unknown fields, which may change what the "
                f"adapter computes: {shown}{more}."
                f"{did_you_mean(unknown[0], known)} `strict`=False (--no-strict) reads "
                "the file without them."
            )
        if skipped is not None:
            skipped += [f"{name!r:.80} of adapter_config.json" for name in unknown]
            skipped += notes
        values = dict(_PEFT_DEFAULTS)
        # null in a file means the default, ...
        values |= {name: raw[name] for name in known if raw.get(name) is not None}
        # ... except of the numbers that PEFT cannot compute without.
        values |= {
            name: None for name in ("r", "lora_alpha") if raw.get(name, 0) is None
        }
        targets = values["target_modules"]
        if isinstance(targets, (list, set)):
            # PEFT has a set here, and writes it in any order.
            values["target_modules"] = sorted(_names("target_modules", targets))
        plain = init in ("gaussian", "orthogonal")
        values["init_lora_weights"] = init if plain else "default"
        # A file has values of any type: `__post_init__` reports them, where type checks
        # of the constructor would raise.
        out = cls()
        for name, value in values.items():
            object.__setattr__(out, name, value)
        out.__post_init__()
        return out

    def to_peft(self) -> dict[str, Any]:
        """Returns the content of an `adapter_config.json`.

        Every PEFT since 0.6 that computes such an adapter reads it. (`peft_version` is
        left out: it is a field of 0.18.)
        """
        out: dict[str, Any] = {"fan_in_fan_out": False}
        for f in dataclasses.fields(self):
            value = getattr(self, f.name)
            if f.name in _OUTSIDE or (f.name in _LATER_FIELDS and value == f.default):
                continue
            if isinstance(value, tuple):
                value = list(value)
            elif isinstance(value, Mapping):
                value = {
                    k: list(v) if isinstance(v, tuple) else v for k, v in value.items()
                }
            out[f.name] = value
        if isinstance(self.target_modules, tuple):
            out["target_modules"] = sorted(self.target_modules)
        out.update(
            peft_type="LORA",
            inference_mode=True,
            # On loading, PEFT would change the base for "pissa", "olora" and "loftq".
            init_lora_weights=(
                self.init_lora_weights
                if self.init_lora_weights in ("gaussian", "orthogonal")
                else True
            ),
        )
        return out


def _refuse_features(raw: Mapping[str, Any], init: Any) -> None:
    refused = refused_features(raw)
    if not any(init is start or init == start for start in _PLAIN_STARTS):
        refused.append(f"`init_lora_weights`={init!r:.80} ({start_reason(init)})")
    if refused:
        raise UserError(
            "adapter_config.json uses LoRA features that are not supported: "
            f"{', '.join(refused)}."
        )


def refused_features(raw: Mapping[str, Any]) -> list[str]:
    """Lists the fields of PEFT that are set and not computed by this project."""
    return [
        f"`{name}`={raw[name]!r:.80}"
        for name, off in _REFUSED.items()
        if not _off(raw.get(name), off)
    ]


def off_features(raw: Mapping[str, Any]) -> list[str]:
    """Lists the fields of PEFT that are present, switched off, and not computed."""
    return [
        name for name, off in _REFUSED.items() if name in raw and _off(raw[name], off)
    ]


def _off(value: Any, off: Any) -> bool:
    """Whether a value means "not used": the field's own off value, or an empty one."""
    return value is None or value is False or value == off or value in ([], {})


# --- Checks: (name of the field, value) -> the value as it is stored ---


def _error(name: str, expected: str, value: Any) -> UserError:
    return UserError(f"lora: `{name}` must be {expected}, got {value!r:.80}.")


def _rank(name: str, value: Any) -> int:
    # The bound keeps a damaged file from asking for a tensor that fills memory.
    if not _is_index(value) or not 0 < value < 1 << 20:
        raise _error(name, "a positive integer", value)
    return value


def _alpha(name: str, value: Any) -> float:
    if not _is_number(value) or value <= 0:
        raise _error(name, "> 0", value)
    return value


def _dropout(name: str, value: Any) -> float:
    # Not 1: what is kept is divided by 1 - p.
    if not (_is_number(value) and 0.0 <= value < 1.0):
        raise _error(name, "in [0, 1)", value)
    return value


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < 1e30  # false for NaN, and for integers that floats cannot hold
    )


def _is_index(value: Any) -> bool:
    return (
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
    )


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise _error(name, "true or false", value)
    return value


def _string(name: str, value: Any) -> str | None:
    if value is not None and not isinstance(value, str):
        raise _error(name, "a string", value)
    return value


def _bias(name: str, value: Any) -> str:
    if value not in ("none", "lora_only", "all"):
        raise _error(name, "'none', 'lora_only' or 'all'", value)
    return value


def _task_type(name: str, value: Any) -> str:
    if value != "CAUSAL_LM":
        raise _error(name, "'CAUSAL_LM', as a Llama here is a language model", value)
    return "CAUSAL_LM"  # a string, not a member of PEFT's enumeration


def _init(name: str, value: Any) -> str:
    value = "default" if value is True else value
    if not (isinstance(value, str) and _INIT.fullmatch(value)):
        raise UserError(
            f"lora: `{name}`={value!r:.80} is not supported. Supported: 'default' (or "
            "true), 'gaussian', 'orthogonal', 'pissa', 'pissa_niter_N', 'olora', "
            "'loftq'."
        )
    return value


def _table(
    check: Callable[[str, Any], Any], name: str, table: Any
) -> FrozenDict[int | float]:
    if not isinstance(table, Mapping):
        raise _error(name, "a table of patterns", table)
    if not all(isinstance(pattern, str) for pattern in table):
        raise _error(name, "a table whose patterns are strings", list(table))
    match_patterns(tuple(table), field=f"lora: `{name}`", inside=AT_END)
    for pattern, value in table.items():
        check(f"{name}[{pattern!r:.80}]", value)
    return FrozenDict(table)


def _names(name: str, value: Any) -> tuple[str, ...]:
    value = (value,) if isinstance(value, str) else value
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise _error(name, "a list of names", value)
    names = tuple(value)
    if not all(isinstance(n, str) and n for n in names):
        raise _error(name, "a list of names", names)
    return names


def _patterns(inside: str, name: str, value: Any) -> tuple[str, ...] | None:
    names = _names(name, value) if value else ()  # as in PEFT, "" means none
    match_patterns(names, field=f"lora: `{name}`", inside=inside)
    return names or None


def _targets(name: str, value: Any) -> tuple[str, ...] | str:
    """A tuple of names, or one regular expression."""
    if not isinstance(value, str):
        names = _names(name, value)
        # A command line gives a list of one; no module name looks like these two.
        single = names[0] if len(names) == 1 else ""
        if single != "all-linear" and not set(single) & set("*+?[](){}|\\^$"):
            value = names
        else:
            value = single
    if len(value) == 0:
        raise UserError(
            f"lora: `{name}` is empty. Name modules such as 'q_proj', or give "
            "'all-linear'."
        )
    if isinstance(value, str):
        if value.lower() == "all-linear":
            return "all-linear"
        match_patterns((value,), field=f"lora: `{name}`")
    return value


def _excluded(name: str, value: Any) -> tuple[str, ...] | str | None:
    return _targets(name, value) if value else None


def _layers(name: str, value: Any) -> int | tuple[int, ...] | None:
    if value is None or _is_index(value):
        return value
    if not isinstance(value, (tuple, list)) or not all(map(_is_index, value)):
        raise _error(name, "layer numbers (0, 1, ...)", value)
    return tuple(value) or None  # as in PEFT, an empty list means all


def _tokens(
    name: str, value: Any
) -> tuple[int, ...] | FrozenDict[tuple[int, ...]] | None:
    if value is None or (isinstance(value, (Mapping, list, tuple)) and not value):
        return None
    table = value if isinstance(value, Mapping) else {"embed_tokens": value}
    out: dict[str, tuple[int, ...]] = {}
    for module, rows in table.items():
        if not isinstance(rows, (tuple, list)) or not all(map(_is_index, rows)):
            raise _error(name, "token ids, or module names with token ids", value)
        if len(set(rows)) != len(rows) or not rows:
            raise UserError(
                f"lora: `{name}` of {module!r} must be distinct token ids, got "
                f"{list(rows)!r:.80}."
            )
        out[str(module)] = tuple(rows)
    return FrozenDict(out) if isinstance(value, Mapping) else out["embed_tokens"]


_CHECKS: Mapping[str, Callable[[str, Any], Any]] = MappingProxyType(
    {
        "r": _rank,
        "lora_alpha": _alpha,
        "target_modules": _targets,
        "exclude_modules": _excluded,
        "layers_to_transform": _layers,
        "layers_pattern": functools.partial(_patterns, BEFORE_NUMBER),
        "rank_pattern": functools.partial(_table, _rank),
        "alpha_pattern": functools.partial(_table, _alpha),
        "lora_dropout": _dropout,
        "use_rslora": _flag,
        "use_dora": _flag,
        "bias": _bias,
        "lora_bias": _flag,
        "modules_to_save": functools.partial(_patterns, WITHIN),
        "trainable_token_indices": _tokens,
        "ensure_weight_tying": _flag,
        "init_lora_weights": _init,
        "task_type": _task_type,
        "base_model_name_or_path": _string,
        "revision": _string,
        "base_fingerprint": _string,
        "base_config_changes": _string,
    }
)
