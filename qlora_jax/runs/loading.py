"""Where the base of an adapter lies: the places looked at, and how a copy names it.

An adapter_config.json names its base by a path or by a name on a hub. A path may be
relative, to the directory we are in (what PEFT takes it for) or to the adapter, so that
directories that belong together can be moved together.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp

import convert
from convert.peft import CONFIG, chat_template_file, open_adapter
from convert.tokenizer import end_tokens, load_tokenizer
from qlora_jax.choices import Attention, Auto, Dtype, Kernels, Quantization, Quantized
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.inference.model import Model, _attach
from qlora_jax.models.config import apply_changes
from qlora_jax.models.layers import Compute
from qlora_jax.models.llama import Llama, add_parameters
from qlora_jax.models.params import check_weights
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.directory import adapter_directory, run_settings


def base_places(adapter: Path, name: str) -> list[Path]:
    """Where the base of an adapter may be; the first place depends on where we are."""
    here = adapter.resolve()
    return [Path(name), here / name, here.parent / name, here.parent.parent / name]


def name_from(
    name: str | None, source: Path, output: Path, base: Path | None = None
) -> str | None:
    """Returns what leads from a copy of an adapter to the base that the adapter names.

    A relative path that does so from the copy too is kept. Another becomes absolute,
    which PEFT finds as well, wherever it is started. What leads to no directory, such
    as a name on a hub, is left alone.

    Args:
      name: `base_model_name_or_path` of the adapter.
      source: its directory.
      output: that of the copy, which need not exist.
      base: a model directory, by whose path the base is called if it is the same one.
    """
    if not name or Path(name).is_absolute():
        return name
    found = _first(base_places(source, name))
    if found is None:
        return name
    # Without "..", which leads nowhere from a directory that does not exist yet.
    places = [Path(os.path.normpath(p)) for p in base_places(output, name)[1:]]
    kept = _first(places)
    if kept is not None and kept.samefile(found):
        return name
    same = base is not None and base.samefile(found)
    return os.path.abspath(base if same and base is not None else found)


def leads_nowhere(name: str | None, source: Path) -> bool:
    """Whether an adapter names a path, and no name on a hub, where no model is."""
    if not name or not (Path(name).is_absolute() or name.startswith(".")):
        return False
    return _first(base_places(source, name)) is None


def _first(places: list[Path]) -> Path | None:
    return next((p for p in places if (p / "config.json").is_file()), None)


def resolve_auto(
    trained: RunConfig | None, quantization: Any, dtype: Any
) -> tuple[Any, Any]:
    """Settles "auto": as a run was trained, or is to be, else nf4_dq, bfloat16.

    Args:
      trained: settings of the run, if there is one.
      quantization: as given.
      dtype: as given.

    Returns:
      Quantization, with None for "none", and dtype.
    """
    if quantization == "auto":
        quantization = "nf4_dq" if trained is None else trained.model.quantization
    if dtype == "auto":
        dtype = "bfloat16" if trained is None else trained.model.dtype
    return None if quantization == "none" else quantization, dtype


def quantizes_lm_head(trained: RunConfig | None, quantization: Any) -> bool:
    """Whether the head is packed too: as a run was trained, or is to be.

    A run that is asked for in another quantization is another model; its head stays
    dense then.

    Args:
      trained: settings of the run, if there is one.
      quantization: as given, "auto" included.
    """
    return (
        trained is not None
        and trained.model.lm_head == "nf4"
        and quantization in ("auto", trained.model.quantization)
    )


def find_base(adapter: Path, base: str | os.PathLike[str] | None = None) -> Path:
    """Finds the base of a PEFT directory on this machine.

    Looks at `base`, then at `base_model_name_or_path` as a path: as it stands, beside
    the adapter directory, and beside its parent. The network is never asked.

    Raises:
      CheckpointError: no such directory.
    """
    if base is not None:
        if not Path(base).is_dir():
            raise CheckpointError(f"The base `{base}` is no directory.")
        return Path(base)
    name = open_adapter(adapter)[0].base_model_name_or_path
    if not name:
        raise CheckpointError(
            f"`{adapter}` does not say what its base is (`base_model_name_or_path` in "
            f"{CONFIG} is empty). Give it with `base=` (--base)."
        )
    tried = base_places(adapter, name)
    for place in tried:
        if (place / "config.json").is_file():
            return place
    raise CheckpointError(
        f"The base of `{adapter}` is {name!r}, which is no directory here (looked at "
        f"{', '.join(f'`{p}`' for p in tried)}). Give it with `base=` (--base)."
    )


def load(
    path: str | os.PathLike[str],
    *,
    adapter: str | os.PathLike[str] | None = None,
    base: str | os.PathLike[str] | None = None,
    quantization: Auto | Quantization | None = "auto",
    dtype: Auto | Dtype = "auto",
    attention: Attention = "auto",
    kernels: Kernels = "auto",
    attention_cls: Callable[..., nn.Module] | None = None,
    mlp_cls: Callable[..., nn.Module] | None = None,
    strict: bool = True,
    progress: bool = False,
) -> Model:
    """Loads a model, and an adapter if there is one, onto the default device.

    Args:
      path: Hugging Face directory, bitsandbytes-4bit directory (its packed weights are
        kept as they are, whatever `quantization` says), PEFT adapter directory, or a
        run directory of `qlora-jax train`.
      adapter: PEFT directory to attach.
      base: the base of an adapter directory, where adapter_config.json does not lead
        to it.
      quantization: of the linear layers: NF4, NF4 with double quantization, or none
        (None says the same). "auto" is what a run directory was trained with, the
        output head included, and "nf4_dq" elsewhere.
      dtype: of activations and of the tensors that stay dense. "auto" is what a run
        directory was trained with, and "bfloat16" elsewhere.
      attention: implementation.
      kernels: of products with packed weights, as `Compute` takes them.
      attention_cls: attention modules of yours, as `Llama` takes them. Their tensors
        come from the directory (`LlamaConfig.extra_tensors`) or from an adapter that
        holds them whole (`modules_to_save`).
      mlp_cls: MLP modules of yours.
      strict: refuse an adapter that does not fit to the letter; otherwise what was not
        used is said on stderr.
      progress: show a progress bar on stderr.

    Raises:
      CheckpointError: files that are missing, damaged, or of another model.
      UserError: an argument that cannot be used.
    """
    path = Path(path)
    trained = run_settings(path)
    quantize_lm_head = quantizes_lm_head(trained, quantization)
    quantize_as, prepared = resolve_auto(trained, quantization, dtype)
    own = adapter_directory(path)
    adapter = None if adapter is None else Path(adapter)
    if own is not None:
        if adapter is not None:
            raise UserError(
                f"`{path}` is an adapter itself; the adapter `{os.fspath(adapter)}` "
                "cannot be attached to it. Give the base as `path`."
            )
        adapter, path = own, find_base(own, base)
    elif base is not None:
        raise UserError(
            f"`base` names the base of an adapter directory, and `{path}` is none."
        )
    if quantize_as not in (*get_args(Quantized), None):
        raise UserError(
            "`quantization` must be 'nf4', 'nf4_dq', 'none' or 'auto', got "
            f"{quantization!r}."
        )
    compute = Compute(dtype=prepared, attention=attention, kernels=kernels)
    config, tree = convert.load_llama(
        path,
        quantization=quantize_as,
        quantize_lm_head=quantize_lm_head,
        dtype=prepared,
        progress=progress,
    )
    custom = Llama(config, compute, attention_cls, mlp_cls)
    complete, tree = add_parameters(custom, tree, jax.random.key(0))
    drawn = set(complete.config.extra_tensors) - set(config.extra_tensors)
    config = complete.config
    lora_config = adapters = None
    if adapter is not None:
        lora_config, adapters = _attach(adapter, path, tree, strict=strict)
        config = apply_changes(config, lora_config.base_config_changes)
    check_weights(drawn, tree, lora_config, path)
    tokenizer = load_tokenizer(path)
    return Model(
        config=config,
        base=jax.tree.map(jnp.asarray, tree),
        adapters=adapters,
        lora_config=lora_config,
        tokenizer=tokenizer,
        compute=compute,
        path=path,
        attention_cls=attention_cls,
        mlp_cls=mlp_cls,
        eos_token_ids=end_tokens(config, tokenizer, path),
        chat_template=chat_template_file(adapter),
        adapter_path=adapter,
    )
