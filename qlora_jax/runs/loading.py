"""Resolves the path that a user gives, and loads the model it stands for.

    resolved = resolve("run/best_adapter")    # its base, its adapter, its run
    model = load(resolved)                    # or load("run/best_adapter")

A path is a model directory, a PEFT adapter directory, a run directory or an adapter in
one; or the name of a model or an adapter on the Hugging Face hub, `owner/name` or
`owner/name@revision`, which is then fetched. What a run was trained with is read from
its settings, so that it is loaded again as it was, and so is each of its adapters.

adapter_config.json names the base of an adapter by a path or by a name on a hub. A path
may be relative to the working directory (as PEFT reads it) or to the adapter, so that
directories that belong together can be moved together.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

import convert
from convert import (
    ADAPTER_CONFIG,
    WEIGHTS_FILE,
    WEIGHTS_INDEX,
    Needed,
    load_tokenization,
    local_path,
    open_adapter,
    parse_hub_name,
    peft_directory,
    training_record,
)
from qlora_jax.choices import Attention, Auto, Dtype, Kernels, Quantization, Quantized
from qlora_jax.errors import CheckpointError, UserError, say
from qlora_jax.inference import Model, common_dtype, load_attached, main_dtype
from qlora_jax.lora import CHANGEABLE_SETTINGS, LoraConfig, continued_config
from qlora_jax.models import (
    Compute,
    Llama,
    LlamaConfig,
    abstract_base,
    add_parameters,
    apply_changes,
    check_weights,
)
from qlora_jax.runs.config import ModelConfig, RunConfig
from qlora_jax.runs.directory import ADAPTER, find_run, read_settings
from qlora_jax.runs.toml import SETTINGS, settings_file
from qlora_jax.tree import Path as TreePath


@dataclass(frozen=True)
class Resolved:
    """The directories and settings that a path stands for."""

    base: Path
    """Directory of the base model."""
    adapter: Path | None = None
    """PEFT directory of the adapter."""
    run: Path | None = None
    """Run directory, if the path is one or an adapter in one."""
    settings: RunConfig | None = None
    """Settings of the run."""
    lora: LoraConfig | None = None
    """Configuration of the adapter."""

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the base that the adapter was trained on, if recorded."""
        return None if self.lora is None else self.lora.base_fingerprint

    @property
    def trained_form(self) -> Mapping[str, Any]:
        """How the base was held in training; {} if neither run nor adapter records it.

        "quantization" of the linear layers, "lm_head" ("nf4" if it was packed too), and
        "dtype" of the other tensors, a list where there were several.
        """
        if self.settings is not None:
            return dataclasses.asdict(self.settings.model)
        record = {} if self.adapter is None else training_record(self.adapter)
        is_known = record.get("quantization") in get_args(Quantization)
        return record if is_known else {}

    def load_options(
        self,
        quantization: Auto | Quantization | None = "auto",
        dtype: Auto | Dtype = "auto",
    ) -> tuple[dict[str, Any], Dtype]:
        """Returns the arguments of `convert.load_llama`, and the dtype to compute in.

        "auto" is as in training where the run or the adapter records it. Elsewhere the
        base stays as it is stored, to be computed in the dtype of most parameters.
        """
        form = self.trained_form
        trained = ModelConfig(
            path="",
            quantization=form.get("quantization", "none"),
            lm_head="nf4" if form.get("lm_head") == "nf4" else "auto",
        )
        options = base_options(trained, quantization, dtype)
        if dtype != "auto":
            return options, dtype
        if form.get("dtype") in get_args(Dtype):
            return {**options, "dtype": form["dtype"]}, form["dtype"]
        return {**options, "dtype": common_dtype(self.base)}, main_dtype(self.base)

    def resizes(self, resize_to_adapter: bool | Auto = "auto") -> bool:
        """Returns whether the base grows to the vocabulary of the adapter."""
        if resize_to_adapter != "auto":
            return resize_to_adapter
        return self.settings is not None and self.settings.model.resize_to_adapter


def base_options(
    trained: ModelConfig | None,
    quantization: Auto | Quantization | None = "auto",
    dtype: Auto | Dtype = "auto",
) -> dict[str, Any]:
    """Returns how a base is held, as arguments of `convert.load_llama`.

    Args:
      trained: `[model]` of a run. "auto" takes its values, or nf4_dq and bfloat16
        without a run. A run in another quantization than it was trained with is another
        model; its head stays dense then.
      quantization: of the linear layers.
      dtype: of the tensors that stay dense.

    Returns:
      "quantization" (None for "none"), "quantize_lm_head" and "dtype".

    Raises:
      UserError: an unknown quantization.
    """
    default = ModelConfig(path="") if trained is None else trained
    # The head is packed only where the layers are as in training.
    packed_head = default.lm_head == "nf4" and quantization in (
        "auto",
        default.quantization,
    )
    resolved = default.quantization if quantization == "auto" else quantization
    if resolved == "none":
        resolved = None
    if resolved not in (*get_args(Quantized), None):
        raise UserError(
            "`quantization` must be 'nf4', 'nf4_dq', 'none' or 'auto', got "
            f"{quantization!r}."
        )
    return {
        "quantization": resolved,
        "quantize_lm_head": packed_head,
        "dtype": default.dtype if dtype == "auto" else dtype,
    }


def resolve(
    path: str | os.PathLike[str],
    base: str | os.PathLike[str] | None = None,
    adapter: str | os.PathLike[str] | None = None,
    *,
    strict: bool = True,
    needed: Needed = "weights",
) -> Resolved:
    """Finds the base, adapter and run that a path stands for; loads no weights.

    What is named on the hub is fetched into the cache of `huggingface_hub`.

    A note on stderr names what a directory with a model and an adapter is not used for.

    Args:
      path: model directory, PEFT adapter directory, run directory, or adapter in one;
        like the next two, a path or a name of the hub.
      base: the base, if `path` is an adapter whose adapter_config.json does not lead to
        it.
      adapter: PEFT or run directory of an adapter to attach, if `path` is a model.
      strict: raise for an adapter configuration that uses what is not supported.
      needed: what is fetched of a base on the hub.

    Raises:
      CheckpointError: no base here or on the hub, or damaged adapter files.
      UserError: arguments that contradict each other, or an unsupported adapter.
    """
    path = local_path(path, needed=needed)
    run = find_run(path)
    settings = None if run is None else read_settings(run)
    inside = peft_directory(path)
    is_adapter = (inside / ADAPTER_CONFIG).is_file()
    if adapter is not None and inside == path and _has_weights(path):
        is_adapter = False  # the model in it is the base of the adapter that is given
    if is_adapter:
        if adapter is not None:
            raise UserError(
                f"`{path}` is an adapter itself; the adapter `{os.fspath(adapter)}` "
                "cannot be attached to it. Give the base as `path`."
            )
        lora = open_adapter(inside, strict=strict)[0]
        names = [_with_revision(lora)]
        if settings is not None:
            # The name in the adapter may be the one it is published with.
            names.insert(0, settings.model.path)
        directory = _base_of(inside, names, base, needed)
        say_unused(directory, inside)
        return Resolved(directory, inside, run, settings, lora)
    if base is not None:
        raise UserError(
            f"`base` names the base of an adapter directory, and `{path}` is none."
        )
    if adapter is None:
        return Resolved(path, run=run, settings=settings)
    inside = peft_directory(local_path(adapter))
    lora = open_adapter(inside, strict=strict)[0]
    say_unused(path, inside)
    return Resolved(path, inside, run, settings, lora)


def say_unused(base: Path, adapter: Path | None) -> None:
    """Notes a model beside the adapter that is used, and an adapter beside the base.

    A merge that was saved into its adapter's directory leaves such a directory. Here it
    stands for the adapter on the base that this names; in transformers for the weights
    beside the adapter, with the adapter.

    Args:
      base: directory of the model that is used.
      adapter: PEFT directory of the adapter that is used; None = no adapter.
    """
    if adapter is not None and adapter.resolve() == base.resolve():
        return  # both are used
    if adapter is not None and not (adapter / ADAPTER_CONFIG).is_file():
        return  # which is refused
    if adapter is not None and _has_weights(adapter):
        say(
            f"Note: `{adapter}` holds an adapter and the weights of a model. The "
            f"adapter is used, on `{base}`; the model is what the directory stands for "
            f"without {ADAPTER_CONFIG}."
        )
    if (base / ADAPTER_CONFIG).is_file() and _has_weights(base):
        say(
            f"Note: `{base}` holds a model and an adapter. The model is used, without "
            "this adapter."
        )


def _has_weights(path: Path) -> bool:
    return any((path / name).is_file() for name in (WEIGHTS_FILE, WEIGHTS_INDEX))


def read_architecture(path: Path) -> LlamaConfig:
    """Reads the config.json of a model; a note names what of it is not computed.

    Args:
      path: model directory, or its config.json.

    Raises:
      CheckpointError: the file cannot be read, or the directory is not a model's.
      UserError: another architecture.
    """
    file = path if path.is_file() else path / "config.json"
    if file == path:
        config = LlamaConfig.from_hf(convert.read_json(file))
    else:
        config = convert.open_config(path)
    for note in convert.config_notes(config, file):
        say(f"Note: {note}.")
    if "text_config" in convert.read_json(file):
        say(
            f"Note: `{file}` is of a model of images and text, of which the text model "
            "is used."
        )
    return config


def continued_settings(
    resolved: Resolved,
    config: LlamaConfig,
    lora: LoraConfig,
    explicit: Collection[str],
    changeable: Collection[str] = CHANGEABLE_SETTINGS,
) -> tuple[LlamaConfig, LoraConfig, Mapping[TreePath, Any]]:
    """Returns what training from an adapter has in the place of a run's own settings.

    Args:
      resolved: the adapter, if there is one.
      config: of the base.
      lora: settings of the run.
      explicit: names of those that were given.
      changeable: names of those that may differ from the adapter's.

    Returns:
      Configuration of the base, with the vocabulary and context of the adapter;
      settings of the adapter, with the changes; shapes of the base's tables that are
      saved with it.

    Raises:
      CheckpointError: an adapter of a larger vocabulary, to which the run does not let
        the base grow.
      UserError: given settings that contradict the adapter.
    """
    if resolved.adapter is None or resolved.lora is None:
        return config, lora, {}
    base = convert.with_saved_tables(
        config,
        abstract_base(config),
        resolved.adapter,
        # Without a run nobody has said whether, and the file is as it is.
        resize=resolved.settings is None or resolved.resizes(),
    )
    convert.check_vocabulary(resolved.adapter, base.base)
    lora, _ = continued_config(
        resolved.lora,
        lora,
        explicit,
        base.base,
        name=str(resolved.adapter),
        changeable=changeable,
    )
    changes = resolved.lora.base_config_changes
    return apply_changes(base.config, changes), lora, base.tables


def say_notes(base: Path) -> None:
    """Says what the directory of a model holds that the loaded model is not."""
    for note in convert.open_checkpoint(base).notes:
        say(f"Note: {note}.")


def _with_revision(lora: LoraConfig) -> str | None:
    """Returns the base that an adapter names, with its revision if that is on the hub.

    Of a directory of this machine there is no revision.
    """
    name = lora.base_model_name_or_path
    if not name or not lora.revision or parse_hub_name(name) is None:
        return name
    return f"{name}@{lora.revision}"


def _base_of(
    adapter: Path,
    names: Sequence[str | None],
    base: str | os.PathLike[str] | None,
    needed: Needed,
) -> Path:
    """Returns the base of an adapter: `base`, else where one of its names leads.

    A directory of this machine goes before a repository of the hub.
    """
    if base is not None:
        directory = local_path(base, needed=needed)
        if not directory.is_dir():
            raise CheckpointError(f"The base `{base}` is not a directory.")
        return directory
    known = list(dict.fromkeys(name for name in names if name))
    if not known:
        raise CheckpointError(
            f"`{adapter}` does not say what its base is (`base_model_name_or_path` in "
            f"{ADAPTER_CONFIG} is empty). Give it with `base=` (--base)."
        )
    candidates = [path for name in known for path in base_candidates(adapter, name)]
    directory = _first_model(candidates)
    below = next((p for p in candidates if (p / ADAPTER_CONFIG).is_file()), None)
    if directory is None and below is not None:
        raise CheckpointError(
            f"The base of `{adapter}` is `{below}`, an adapter itself. Merge that one "
            "into its base (`qlora-jax merge`), and give the result with `base=` "
            "(--base)."
        )
    if directory is not None:
        return directory
    hub, cause = "", None
    on_hub = next((name for name in known if parse_hub_name(name)), None)
    if on_hub is not None:
        try:
            return local_path(on_hub, needed=needed)
        except CheckpointError as error:
            hub, cause = f" {error}", error
    places = ", ".join(f"`{path}`" for path in dict.fromkeys(candidates))
    raise CheckpointError(
        f"The base of `{adapter}` is {' or '.join(map(repr, known))}, which is not a "
        f"directory here (looked at {places}).{hub} Give it with `base=` (--base)."
    ) from cause


def base_candidates(adapter: Path, name: str) -> list[Path]:
    """Returns where the base of an adapter may be.

    The first depends on the working directory; the others are next to the adapter.
    """
    here = adapter.resolve()
    return [Path(name), here / name, here.parent / name, here.parent.parent / name]


def beside_run(config: RunConfig, file: Path, given: Collection[str] = ()) -> RunConfig:
    """Returns a run's settings with the model and adapter that its directory leads to.

    Relative paths of a run depend on the working directory. Where they lead nowhere
    from here, they are looked for from the run directory, as those of its adapter are;
    a note says which were found.

    Args:
      config: what `file` holds, with the options that were given.
      file: a run file, or a run directory. Another run file than that of a run
        directory leads nowhere.
      given: keys of these options, whose paths are relative to where they are given.
    """
    settings = settings_file(file)
    if settings.name != SETTINGS:
        return config

    def found(key: str, path: str | None) -> str | None:
        if path is None or key in given or Path(path).exists():
            return path
        candidates = base_candidates(settings.parent / ADAPTER, path)
        place = next((p for p in candidates if p.exists()), None)
        if place is None:
            return path
        say(
            f"Note: `{key}` = {path!r} of `{settings}` leads nowhere from the current "
            f"directory, and is read as `{place}`."
        )
        return str(place)

    path = found("model.path", config.model.path) or config.model.path
    start = found("train.adapter_init", config.train.adapter_init)
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=path),
        train=dataclasses.replace(config.train, adapter_init=start),
    )


def _first_model(candidates: list[Path]) -> Path | None:
    return next((p for p in candidates if (p / "config.json").is_file()), None)


def base_name_for_copy(
    name: str | None, source: Path, output: Path, base: Path | None = None
) -> str | None:
    """Returns the name that leads from a copy of an adapter to the adapter's base.

    A relative path that does so from the copy too is kept. Another becomes absolute,
    which PEFT finds from any working directory. A name that leads to no directory, such
    as one on a hub, is kept.

    Args:
      name: `base_model_name_or_path` of the adapter.
      source: its directory.
      output: that of the copy, which need not exist.
      base: a model directory; its path is used if it is the same directory.
    """
    if not name or Path(name).is_absolute():
        return name
    directory = _first_model(base_candidates(source, name))
    if directory is None:
        return name
    # Normalized: ".." leads nowhere from a directory that does not exist yet.
    candidates = [Path(os.path.normpath(p)) for p in base_candidates(output, name)[1:]]
    from_copy = _first_model(candidates)
    if from_copy is not None and from_copy.samefile(directory):
        return name
    same = base is not None and base.samefile(directory)
    return os.path.abspath(base if same and base is not None else directory)


def is_broken_path(name: str | None, source: Path) -> bool:
    """Returns whether an adapter names a path, not a hub name, that has no model."""
    if not name or not (Path(name).is_absolute() or name.startswith(".")):
        return False
    return _first_model(base_candidates(source, name)) is None


def load(
    path: str | os.PathLike[str] | Resolved,
    *,
    adapter: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    quantization: Auto | Quantization | None = "auto",
    dtype: Auto | Dtype = "auto",
    attention: Attention = "auto",
    kernels: Kernels = "auto",
    attention_cls: Callable[..., nn.Module] | None = None,
    mlp_cls: Callable[..., nn.Module] | None = None,
    resize_to_adapter: bool | Auto = "auto",
    strict: bool = True,
    progress: bool = False,
) -> Model:
    """Loads a model, and an adapter if there is one, onto the default device.

    Args:
      path: Hugging Face directory, bitsandbytes-4bit directory (its packed weights are
        kept as they are, whatever `quantization` says), PEFT adapter directory, or a
        run directory of `qlora-jax train`; a name of the hub; or the result of
        `resolve`.
      adapter: PEFT directory or name of the hub, to attach.
      base: the base of an adapter directory, where adapter_config.json does not lead
        to it.
      quantization: of the linear layers: NF4, NF4 with double quantization, or none
        (None means the same). "auto" is what a run or an adapter was trained with, the
        output head included, where that is recorded; else the base stays as stored.
      dtype: of activations and of the tensors that stay dense; "auto" likewise.
      attention: implementation.
      kernels: of products with packed weights, as `Compute` takes them.
      attention_cls: custom attention modules, as `Llama` takes them. Their tensors
        come from the directory (`LlamaConfig.extra_tensors`) or from an adapter that
        saves the modules completely (`modules_to_save`).
      mlp_cls: custom MLP modules.
      resize_to_adapter: let the vocabulary of the base grow to that of an adapter that
        was trained with added tokens, as PEFT's AutoPeftModel does. "auto" is what a
        run directory was trained with, and False elsewhere.
      strict: raise for an adapter that does not fit exactly; otherwise what was not
        used is printed on stderr.
      progress: show a progress bar on stderr.

    Raises:
      CheckpointError: files that are missing, damaged, or of another model.
      UserError: an argument that cannot be used.
    """
    resolved = path
    if not isinstance(resolved, Resolved):
        resolved = resolve(resolved, base, adapter, strict=strict)
    directory = resolved.base
    options, compute_dtype = resolved.load_options(quantization, dtype)
    compute = Compute(dtype=compute_dtype, attention=attention, kernels=kernels)
    say_notes(directory)
    stored, tree = convert.load_llama(directory, **options, progress=progress)
    module = Llama(stored, compute, attention_cls, mlp_cls)
    # Random values of parameters that are in no file; `check_weights` demands that the
    # adapter replaces them.
    module, tree = add_parameters(module, tree, jax.random.key(0))
    config, original = module.config, tree
    drawn = set(config.extra_tensors) - set(stored.extra_tensors)
    lora = adapters = None
    if resolved.adapter is not None:
        with_tables = convert.with_saved_tables(
            config, tree, resolved.adapter, resize=resolved.resizes(resize_to_adapter)
        )
        config, tree = with_tables.config, with_tables.base
        for note in with_tables.notes:
            say(f"Note: {note}.")
        lora, adapters = load_attached(
            resolved.adapter, directory, tree, original=original, strict=strict
        )
        config = apply_changes(config, lora.base_config_changes)
    check_weights(drawn, tree, lora, directory)
    text = load_tokenization(config, directory, resolved.adapter)
    for note in text.notes:
        say(note)
    return Model(
        config=config,
        base=jax.tree.map(jnp.asarray, tree),
        adapters=adapters,
        lora_config=lora,
        tokenizer=text.tokenizer,
        compute=compute,
        path=directory,
        attention_cls=attention_cls,
        mlp_cls=mlp_cls,
        eos_token_ids=text.eos_token_ids,
        adapter_path=resolved.adapter,
    )
