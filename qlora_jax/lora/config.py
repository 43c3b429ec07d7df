"""LoraConfig: what is adapted and how, in the words of PEFT.

Field names and meanings are those of PEFT's `LoraConfig`, whose adapter_config.json is
read (`from_peft`) and written (`to_peft`). Everything PEFT's LoRA computes for a Llama
is honoured; what is not is refused by name. Which modules of a model a configuration
selects is the affair of `qlora_jax.lora.targets`.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from qlora_jax.errors import Problems, UserError, did_you_mean
from qlora_jax.lora.patterns import match_patterns
from qlora_jax.tree import PROJECTIONS, FrozenDict

# Fields of adapter_config.json that change what an adapter computes and that this
# project does not compute. The value listed is the one that switches each off.
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
# Fields that say nothing about what is computed.
_INERT = (
    "peft_type",
    "task_type",
    "auto_mapping",
    "peft_version",
    "inference_mode",
    "megatron_core",
    "qalora_group_size",
    "loftq_config",
    "eva_config",
)
# Initializations of PEFT that leave the base weights as they are, so that a trained
# adapter is complete in itself.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva", "mica")

_INIT = re.compile(
    r"default|gaussian|orthogonal|pissa|pissa_niter_[1-9]\d?|olora|loftq"
)

# Kept elsewhere than in adapter_config.json.
_OUTSIDE = ("base_fingerprint", "base_config_changes")

# PEFT puts what a file says into these expressions. A name in `modules_to_save` is one
# of them as well, where it keeps a module from being adapted.
AT_END = r"(.*\.)?({})$"
WITHIN = r"(^|.*\.){}($|\..*)"
BEFORE_NUMBER = r"(?:^|.*?\.){}\.(\d+)\."


@dataclass(frozen=True)
class LoraConfig:
    """What is adapted and how; field names and meanings are PEFT's `LoraConfig`.

    The update of a linear layer is `scaling * B @ A` (Hu et al. 2021,
    https://arxiv.org/abs/2106.09685) with `scaling = lora_alpha / r`, or
    `lora_alpha / sqrt(r)` under `use_rslora` (https://arxiv.org/abs/2312.03732).

    Raises:
      UserError: a value that is out of range, of a wrong type, or that does not go with
        another.
    """

    # Frozen, of hashable values: a static argument of compiled functions.

    r: int = 16
    """Rank of the updates."""
    lora_alpha: int | float = 16
    """Numerator of the scaling."""
    target_modules: tuple[str, ...] | str = PROJECTIONS
    """Module names (matched as path suffixes), "all-linear", or a regular expression
    that has to match whole module paths."""
    exclude_modules: tuple[str, ...] | str | None = None
    """Modules never adapted: names (path suffixes), or a regular expression."""
    layers_to_transform: int | tuple[int, ...] | None = None
    """Numbers of the layers to adapt; goes with a list of target_modules."""
    layers_pattern: tuple[str, ...] | str | None = None
    """What the list of layers is called, "layers" in a Llama: regular expressions, of
    which the first that matches holds."""
    rank_pattern: Mapping[str, int] = FrozenDict()
    """Ranks by module: a regular expression that has to match the end of the module's
    path, starting at a dot -> rank. The first that matches holds."""
    alpha_pattern: Mapping[str, float] = FrozenDict()
    """lora_alpha by module, found in the same way."""
    lora_dropout: float = 0.0
    """Probability of dropping an input element of the adapter while training."""
    use_rslora: bool = False
    """Scale by lora_alpha / sqrt(r) instead of lora_alpha / r."""
    use_dora: bool = False
    """Train the norm of each output row as well (DoRA, arXiv:2402.09353)."""
    bias: Literal["none", "lora_only", "all"] = "none"
    """Train the base's biases: none, those of adapted modules, or all."""
    lora_bias: bool = False
    """Give each B a trained bias."""
    modules_to_save: tuple[str, ...] | None = None
    """Modules trained whole and saved with the adapter: embed_tokens, lm_head, norms,
    yours."""
    trainable_token_indices: tuple[int, ...] | Mapping[str, tuple[int, ...]] | None = (
        None
    )
    """Rows of embed_tokens to train (a tied head follows), or rows by module."""
    ensure_weight_tying: bool = False
    """With tied embeddings: what trains embed_tokens or lm_head trains both as one."""
    init_lora_weights: Literal[True] | str = "default"
    """How A and B start: default (A Kaiming-uniform, B zero; PEFT says true), gaussian,
    orthogonal, pissa, pissa_niter_N, olora, or loftq (NF4 base)."""
    task_type: str = "CAUSAL_LM"
    """PEFT's word for what the model does; there is one here."""
    base_model_name_or_path: str | None = None
    """Where the base is found; written into adapter_config.json."""
    revision: str | None = None
    """Revision of the base, where its name is one of a hub."""
    base_fingerprint: str | None = None
    """SHA-256 of the base it was trained on, kept in the adapter file's metadata."""
    base_config_changes: str | None = None
    """What it was trained with instead of what the base's config.json has, as JSON; see
    `qlora_jax.models.config`."""

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        problems = Problems("the LoRA settings")
        checked = problems.collecting
        with checked():
            _check_rank("r", self.r)
        with checked():
            _check_alpha("lora_alpha", self.lora_alpha)
        for name in ("rank_pattern", "alpha_pattern"):
            with checked():
                put(name, _table(name, getattr(self, name)))
        dropout = self.lora_dropout
        if not (_is_number(dropout) and 0.0 <= dropout < 1.0):
            problems.add(
                f"lora: `lora_dropout` must lie in [0, 1), got {dropout!r:.80}."
            )
        for name in ("use_rslora", "use_dora", "lora_bias", "ensure_weight_tying"):
            value = getattr(self, name)
            if not isinstance(value, bool):
                problems.add(
                    f"lora: `{name}` must be true or false, got {value!r:.80}."
                )
        with checked():
            targets = _modules("target_modules", self.target_modules)
            put("target_modules", targets)
            if len(targets) == 0:
                problems.add(
                    "lora: `target_modules` is empty. Name modules such as 'q_proj', "
                    "or give 'all-linear'."
                )
        with checked():
            excluded = self.exclude_modules
            excluded = _modules("exclude_modules", excluded) if excluded else None
            put("exclude_modules", excluded)
        for name, inside in (
            ("layers_pattern", BEFORE_NUMBER),
            ("modules_to_save", WITHIN),
        ):
            with checked():
                value = getattr(self, name)
                names = () if value is None else _names(name, value)
                match_patterns(names, field=f"lora: `{name}`", inside=inside)
                put(name, names or None)
        with checked():
            put("layers_to_transform", _layers(self.layers_to_transform))
        with checked():
            put("trainable_token_indices", _tokens(self.trainable_token_indices))
        if self.bias not in ("none", "lora_only", "all"):
            problems.add(
                "lora: `bias` must be 'none', 'lora_only' or 'all', got "
                f"{self.bias!r:.80}."
            )
        if self.task_type != "CAUSAL_LM":
            problems.add(
                f"lora: `task_type`={self.task_type!r:.80} is not supported; a Llama "
                "here is a language model, 'CAUSAL_LM'."
            )
        # A text, and no member of PEFT's enumeration.
        put("task_type", "CAUSAL_LM")
        if self.init_lora_weights is True:
            put("init_lora_weights", "default")
        init = self.init_lora_weights
        if not (isinstance(init, str) and _INIT.fullmatch(init)):
            problems.add(
                f"lora: `init_lora_weights`={init!r:.80} is not supported. Supported: "
                "'default' (or true), 'gaussian', 'orthogonal', 'pissa', "
                "'pissa_niter_N', 'olora', 'loftq'."
            )
        for name in (*_OUTSIDE, "base_model_name_or_path", "revision"):
            value = getattr(self, name)
            if value is not None and not isinstance(value, str):
                problems.add(f"lora: `{name}` must be a text, got {value!r:.80}.")
        problems.raise_if_any()
        for problem in self._combinations():
            problems.add(problem)
        problems.raise_if_any()

    def _combinations(self) -> Iterator[str]:
        """What PEFT refuses: settings that do not go together."""
        if self.layers_to_transform is not None and isinstance(
            self.target_modules, str
        ):
            yield (
                "lora: `layers_to_transform` goes with a list of `target_modules`; "
                "with a regular expression or 'all-linear', say the layers in the "
                "expression."
            )
        if self.layers_pattern is not None and self.layers_to_transform is None:
            yield "lora: `layers_pattern` goes with `layers_to_transform`."
        if self.lora_bias and self.use_dora:
            yield "lora: `lora_bias` does not go with `use_dora`."
        if self.lora_bias and self.init_lora_weights != "default":
            yield "lora: `lora_bias` goes with the default initialization."
        if self.use_dora and self.changes_base:
            yield (
                f"lora: `init_lora_weights`={self.init_lora_weights!r} does not go "
                "with `use_dora`: the magnitudes would be those of another base."
            )
        ranks = [self.r, *self.rank_pattern.values()]
        if self.init_lora_weights == "orthogonal" and any(r % 2 for r in ranks):
            yield f"lora: orthogonal initialization needs even ranks, got {ranks}."

    @property
    def scaling(self) -> float:
        """The factor of `B @ A` where no pattern says otherwise."""
        return self.lora_alpha / (math.sqrt(self.r) if self.use_rslora else self.r)

    @property
    def uniform(self) -> bool:
        """Whether `scaling` holds everywhere and nothing is trained in part."""
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
        """Whether the start of A and B is taken out of the base weights."""
        return str(self.init_lora_weights).startswith(("pissa", "olora"))

    @property
    def token_rows(self) -> dict[str, tuple[int, ...]]:
        """`trainable_token_indices` as rows by module, whichever way it was given."""
        rows = self.trainable_token_indices or {}
        rows = rows if isinstance(rows, Mapping) else {"embed_tokens": rows}
        return {name.rpartition(".")[2]: indices for name, indices in rows.items()}

    @property
    def absorbed(self) -> LoraConfig:
        """What states its adapters on the original base; see `lora_init.absorb`."""
        if not self.changes_base:
            return self
        # lora_alpha / r, or / sqrt(r), has to stay what it was.
        grown = math.sqrt(2.0) if self.use_rslora else 2
        ranks = {k: 2 * v for k, v in self.rank_pattern.items()}
        alphas = {k: v * grown for k, v in self.alpha_pattern.items()}
        return dataclasses.replace(
            self,
            r=2 * self.r,
            lora_alpha=self.lora_alpha * grown,
            rank_pattern=FrozenDict(ranks),
            alpha_pattern=FrozenDict(alphas),
            init_lora_weights="default",
        )

    def rank_and_scaling(self, module_path: str) -> tuple[int, float]:
        """The rank and the factor of `B @ A` of a module, by its dotted path."""
        return self.ranks_and_scalings((module_path,))[module_path]

    def ranks_and_scalings(
        self, module_paths: Iterable[str]
    ) -> dict[str, tuple[int, float]]:
        """Returns `rank_and_scaling` of every module."""
        paths = tuple(module_paths)
        ranks = _first_matches("rank_pattern", self.rank_pattern, paths)
        alphas = _first_matches("alpha_pattern", self.alpha_pattern, paths)
        out = {}
        for path in paths:
            r, alpha = ranks.get(path, self.r), alphas.get(path, self.lora_alpha)
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
        """Reads the content of PEFT's `adapter_config.json`.

        PEFT's own defaults apply to absent fields (r=8, lora_alpha=8, q_proj and
        v_proj as targets of a Llama).

        Args:
          raw: the file's content.
          strict: refuse unknown fields that are set; else they are skipped.
          skipped: where to note what was skipped.

        Raises:
          UserError: another method than LoRA, or a LoRA feature that is not computed
            here, named with its value.
        """
        if not isinstance(raw, Mapping):
            raise UserError(f"adapter_config.json holds no object but {raw!r:.80}.")
        if raw.get("peft_type") != "LORA":
            raise UserError(
                f"adapter_config.json: `peft_type` is {raw.get('peft_type')!r:.80}; "
                "only 'LORA' adapters are supported."
            )
        refused = refused_features(raw)
        init = raw.get("init_lora_weights", True)
        if not any(init is start or init == start for start in _PLAIN_STARTS):
            # The adapter alone, on the original base, would compute something else.
            refused.append(
                f"`init_lora_weights`={init!r:.80} (it was trained on a changed base; "
                "save it with PEFT's `path_initial_model_for_weight_conversion`, which "
                "makes a plain LoRA of it)"
            )
        if refused:
            raise UserError(
                "adapter_config.json uses LoRA features that are not supported: "
                f"{', '.join(refused)}."
            )
        known = {f.name for f in dataclasses.fields(cls)}
        known -= {*_OUTSIDE, *_INERT}
        unknown = [
            name
            for name, value in raw.items()
            if name not in known and name not in _INERT and not _off(value, None)
        ]
        unknown = [name for name in unknown if name not in _REFUSED]
        if unknown and strict:
            shown = ", ".join(f"{n!r:.80}" for n in unknown[:10])
            more = f" and {len(unknown) - 10} more" if len(unknown) > 10 else ""
            raise UserError(
                "adapter_config.json has fields that are not known here and may change "
                f"what the adapter computes: {shown}{more}."
                f"{did_you_mean(unknown[0], known)}"
            )
        if skipped is not None:
            skipped += [f"{name!r:.80} of adapter_config.json" for name in unknown]
        values = {name: raw[name] for name in known if raw.get(name) is not None}
        values.setdefault("r", 8)
        values.setdefault("lora_alpha", 8)
        targets = values.setdefault("target_modules", ("q_proj", "v_proj"))
        if isinstance(targets, (list, set)):
            # PEFT keeps a set, written in any order.
            values["target_modules"] = _sorted("target_modules", targets)
        values["init_lora_weights"] = (
            init if init in ("gaussian", "orthogonal") else "default"
        )
        # Values of any type come from a file: all of them meet `__post_init__`.
        out = cls()
        for name, value in values.items():
            object.__setattr__(out, name, value)
        out.__post_init__()
        return out

    def to_peft(self) -> dict[str, Any]:
        """Returns the content of an `adapter_config.json` that PEFT reads."""
        out: dict[str, Any] = dict(_REFUSED)
        del out["runtime_config"]
        for f in dataclasses.fields(self):
            if f.name in _OUTSIDE:  # no fields of PEFT's
                continue
            value = getattr(self, f.name)
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
            # Whatever they started from, what is saved is the whole of A and B.
            init_lora_weights=(
                self.init_lora_weights
                if self.init_lora_weights in ("gaussian", "orthogonal")
                else True
            ),
        )
        return out


def refused_features(raw: Mapping[str, Any]) -> list[str]:
    """Lists the fields of PEFT that are set here and not computed by this project."""
    return [
        f"`{name}`={raw[name]!r:.80}"
        for name, off in _REFUSED.items()
        if not _off(raw.get(name), off)
    ]


def off_features(raw: Mapping[str, Any]) -> list[str]:
    """Lists the fields of PEFT that are named here, not computed, and switched off."""
    return [
        name for name, off in _REFUSED.items() if name in raw and _off(raw[name], off)
    ]


def _table(name: str, table: Any) -> FrozenDict:
    """A `rank_pattern` or `alpha_pattern` whose patterns and values can be used."""
    if not isinstance(table, Mapping):
        raise UserError(
            f"lora: `{name}` must be a table of patterns, got {table!r:.80}."
        )
    if not all(isinstance(pattern, str) for pattern in table):
        raise UserError(
            f"lora: the patterns of `{name}` must be texts, got {list(table)!r:.80}."
        )
    match_patterns(tuple(table), field=f"lora: `{name}`", inside=AT_END)
    check = _check_rank if name == "rank_pattern" else _check_alpha
    for pattern, value in table.items():
        check(f"{name}[{pattern!r:.80}]", value)
    return FrozenDict(table)


def _first_matches(
    name: str, table: Mapping[str, Any], paths: tuple[str, ...]
) -> dict[str, Any]:
    """Values of a table of patterns by module path; the first that matches holds."""
    patterns = tuple(table)
    matched = match_patterns(patterns, paths, field=f"lora: `{name}`", inside=AT_END)
    values: dict[str, Any] = {}
    for pattern in reversed(patterns):
        values.update(dict.fromkeys(matched[pattern], table[pattern]))
    return values


def _off(value: Any, off: Any) -> bool:
    """Whether a field says "not used": its own off value, or an empty one."""
    return value is None or value is False or value == off or value in ([], {})


def _is_number(value: Any) -> bool:
    return (
        isinstance(value, (int, float))
        and not isinstance(value, bool)
        and abs(value) < 1e30  # false for NaN, and for integers that floats cannot hold
    )


def _check_rank(name: str, value: Any) -> None:
    # The bound keeps a damaged file from asking for a tensor that fills memory.
    if not _is_index(value) or not 0 < value < 1 << 20:
        raise UserError(
            f"lora: `{name}` must be a positive integer, got {value!r:.80}."
        )


def _check_alpha(name: str, value: Any) -> None:
    if not _is_number(value) or value <= 0:
        raise UserError(f"lora: `{name}` must be > 0, got {value!r:.80}.")


def _names(name: str, value: Any) -> tuple[str, ...]:
    if isinstance(value, str):
        value = (value,)
    if not isinstance(value, Iterable) or isinstance(value, Mapping):
        raise UserError(f"lora: `{name}` must be a list of names, got {value!r:.80}.")
    names = tuple(value)
    if not all(isinstance(n, str) and n for n in names):
        raise UserError(f"lora: `{name}` must be a list of names, got {names!r:.80}.")
    return names


def _modules(name: str, value: Any) -> tuple[str, ...] | str:
    """A tuple of names, or one regular expression."""
    if not isinstance(value, str):
        names = _names(name, value)
        # A command line gives a list of one; no module name looks like these two.
        alone = names[0] if len(names) == 1 else ""
        if alone != "all-linear" and not set(alone) & set("*+?[](){}|\\^$"):
            return names
        value = alone
    if value.lower() == "all-linear":
        return "all-linear"
    match_patterns((value,), field=f"lora: `{name}`")
    return value


def _sorted(name: str, values: Iterable[Any]) -> tuple[str, ...]:
    return tuple(sorted(_names(name, list(values))))


def _layers(value: Any) -> int | tuple[int, ...] | None:
    if value is None:
        return None
    alone = isinstance(value, int)
    numbers = (value,) if alone else value
    if not isinstance(numbers, (tuple, list)) or not all(map(_is_index, numbers)):
        raise UserError(
            "lora: `layers_to_transform` must be layer numbers (0, 1, ...), got "
            f"{value!r:.80}."
        )
    # An empty list means all, as in PEFT.
    return value if alone else tuple(numbers) or None


def _is_index(value: Any) -> bool:
    return (
        isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 31
    )


def _tokens(value: Any) -> tuple[int, ...] | FrozenDict[tuple[int, ...]] | None:
    if value is None or (isinstance(value, (Mapping, list, tuple)) and not value):
        return None
    table = value if isinstance(value, Mapping) else {"embed_tokens": value}
    out: dict[str, tuple[int, ...]] = {}
    for name, rows in table.items():
        if not isinstance(rows, (tuple, list)) or not all(map(_is_index, rows)):
            raise UserError(
                "lora: `trainable_token_indices` must be token ids, or module names "
                f"with token ids, got {value!r:.80}."
            )
        if len(set(rows)) != len(rows) or not rows:
            raise UserError(
                f"lora: `trainable_token_indices` of {name!r} must be distinct token "
                f"ids, got {list(rows)!r:.80}."
            )
        out[str(name)] = tuple(rows)
    return FrozenDict(out) if isinstance(value, Mapping) else out["embed_tokens"]
