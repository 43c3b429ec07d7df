"""The front door: a directory in, a model that can be asked and trained out.

    model = load("path/to/hf-llama")          # quantized to NF4 on the way in
    model = load("path/to/peft-adapter")      # its base is found, its adapter attached

`Model` holds plain data (configuration, two trees, tokenizer) and keeps no other state:
two models in one process are two values.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

import convert
from convert.files import read_json
from convert.peft import in_short, peft_directory
from qlora_jax.choices import Attention, Auto, Dtype, Kernels, Quantization, Quantized
from qlora_jax.config import LlamaConfig
from qlora_jax.config_changes import change, restored
from qlora_jax.dialogue import (
    Answer,
    ChatPrompts,
    answer,
    continue_texts,
    resolve_stop,
)
from qlora_jax.directories import (
    adapter_directory,
    chat_template,
    find_base,
    quantizes_lm_head,
    resolve_auto,
    run_settings,
)
from qlora_jax.errors import CheckpointError, UserError
from qlora_jax.generate import Decoding, generate_tokens
from qlora_jax.inputs import beside_tokens, check_text, check_turns, token_array
from qlora_jax.linear import Compute
from qlora_jax.llama import Llama, add_parameters
from qlora_jax.lora import bind
from qlora_jax.lora_config import LoraConfig
from qlora_jax.provenance import (
    adapter_in_words,
    base_form,
    changes_in_words,
    other_base,
)
from qlora_jax.sampling import Sampling
from qlora_jax.targets import select


@dataclass(frozen=True)
class Model:
    """A loaded model: plain data, and two questions one can ask of it."""

    config: LlamaConfig
    base: Mapping[str, Any]
    """Frozen parameters, on the device."""
    adapters: Mapping[str, Any] | None
    """LoRA tree (float32), or None."""
    lora_config: LoraConfig | None
    tokenizer: Any
    """The directory's transformers tokenizer, or None where it has none."""
    compute: Compute
    path: Path
    """Directory of the base."""
    attention_cls: Callable[..., nn.Module] | None = None
    """Attention modules of yours, as `Llama` takes them."""
    mlp_cls: Callable[..., nn.Module] | None = None
    """MLP modules of yours."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a text: the configuration's, the tokenizer's and those of
    generation_config.json."""
    chat_template: str | None = None
    """Jinja file that the conversations of a run or an adapter were written with, where
    it had one."""
    adapter_path: Path | None = None
    """Directory of the adapter."""

    @property
    def module(self) -> Llama:
        """The Flax module that takes `variables`."""
        # Scalings come with the variables, not with the module: adapters of equal
        # shapes can be exchanged without compiling anything again.
        return Llama(self.config, self.compute, self.attention_cls, self.mlp_cls)

    @property
    def description(self) -> str:
        """One line: where the base is, how it is held and computed; the adapter."""
        parts = [
            f"`{self.path}`: linear layers {base_form(self.base)}",
            f"computed in {self.compute.dtype}",
        ]
        if self.adapter_path is not None:
            parts.append(adapter_in_words(self.adapter_path))
        changes = changes_in_words(self.config)
        return "; ".join([*parts, changes] if changes else parts) + "."

    @property
    def variables(self) -> dict[str, Any]:
        """What `module.apply` takes."""
        if self.adapters is None or self.lora_config is None:
            return {"params": self.base}
        bound = bind(self.adapters, self.base, self.lora_config)
        return {"params": self.base, "lora": bound}

    def attach(
        self, adapter: str | os.PathLike[str] | None, *, strict: bool = True
    ) -> Model:
        """Returns this model with another adapter, or (None) without one.

        The base is shared, and where the new adapter has the shapes of the old one,
        nothing is compiled again.

        Args:
          adapter: PEFT directory, or a run directory.
          strict: as for `load`.

        Raises:
          CheckpointError: an adapter that cannot be read or does not fit.
          UserError: one that uses what is not supported.
        """
        if adapter is None:
            config = restored(self.config)
            bare = {"adapters": None, "lora_config": None, "adapter_path": None}
            return dataclasses.replace(self, config=config, **bare)
        place = peft_directory(Path(adapter))
        lora_config, adapters = _attach(place, self.path, self.base, strict=strict)
        config = change(restored(self.config), lora_config.base_config_changes)
        return dataclasses.replace(
            self,
            config=config,
            adapters=adapters,
            lora_config=lora_config,
            chat_template=chat_template(run_settings(place), place),
            adapter_path=place,
        )

    def logits(
        self,
        tokens: Any,
        *,
        attention_mask: Any = None,
        positions: Any = None,
        segment_ids: Any = None,
    ) -> Float32[Array, "B T V"]:
        """Computes logits; arguments as `Llama.__call__`, arrays or nested lists.

        Raises:
          UserError: no token ids, rows of several lengths, or ids that the model does
            not have (unless they are traced).
        """
        optional = {
            "attention_mask": attention_mask,
            "positions": positions,
            "segment_ids": segment_ids,
        }
        tokens = token_array(tokens, self.config.vocab_size)
        arrays = {
            name: beside_tokens(name, value, tokens.shape)
            for name, value in optional.items()
            if value is not None
        }
        return _logits(self.module, self.variables, tokens, arrays)

    def generate(
        self,
        prompts: Sequence[str],
        *,
        max_new_tokens: int,
        temperature: float = 0.0,
        top_p: float = 1.0,
        top_k: int | None = None,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """Continues texts; returns prompt and continuation of each.

        Args:
          prompts: texts; each gets the tokens it would get alone.
          max_new_tokens: tokens to add at most.
          temperature: 0 = greedy.
          top_p: probability mass of the tokens sampled from.
          top_k: number of tokens sampled from.
          min_p: least probability of a token sampled from, as a share of the likeliest
            one's.
          repetition_penalty: above 1, tokens of the text so far become less likely.
          seed: of the sampling.
          stop: texts that end a continuation and are left out of it.

        Raises:
          UserError: no tokenizer, or an unusable prompt or setting.
        """
        if isinstance(prompts, str):
            raise UserError(
                "`prompts` must be a list of texts, got one text. Put it in a list: "
                "`model.generate([text], ...)`."
            )
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        rows = [self._encode(prompt) for prompt in prompts]
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        stop, ends = resolve_stop(stop, self.tokenizer, self.eos_token_ids)
        if stop:
            decoding = Decoding(
                self.module,
                self.variables,
                rows,
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                eos_token_ids=ends,
            )
            added = continue_texts(decoding, self.tokenizer, rows, stop)
            return [decode(row) + new for row, new in zip(rows, added, strict=True)]
        whole = generate_tokens(
            self.module,
            self.variables,
            rows,
            max_new_tokens=max_new_tokens,
            **dataclasses.asdict(sampling),
            eos_token_ids=ends,
        )
        return [decode(row) for row in whole]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> Answer:
        """Continues a text and gives the continuation out as it comes.

            for piece in model.stream("Once upon a time", max_new_tokens=64):
                print(piece, end="", flush=True)

        Args:
          prompt: the text.
          max_new_tokens: tokens to add at most.
          stop: texts that end the continuation and are left out of it.
          **sampling: `temperature` and the others of `generate`.

        Returns:
          An iterable of pieces of text, none of them half a character. Its `text`,
          `tokens` and `finish_reason` tell the rest.

        Raises:
          UserError: as `generate`.
        """
        return answer(
            self.module,
            self.variables,
            self.tokenizer,
            self._encode(prompt),
            max_new_tokens=max_new_tokens,
            sampling=Sampling(**sampling),
            eos_token_ids=self.eos_token_ids,
            stop=stop,
        )

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        chat_template: str | None = None,
        **sampling: Any,
    ) -> str:
        """Answers the last turn of a conversation.

            model.chat([{"role": "user", "content": "Who are you?"}])

        Args:
          messages: turns, each with `role` and `content`.
          max_new_tokens: of the answer, at most; fewer where the model's positions end.
          stop: texts that end the answer, beside the template's own end of a turn.
          chat_template: a Jinja file in place of the tokenizer's template.
          **sampling: `temperature` and the others of `generate`.

        Returns:
          The answer, without white space at both ends.

        Raises:
          UserError: no tokenizer, no chat template, turns that it refuses, or a
            conversation that is longer than the model's positions.
        """
        reply = self.stream_chat(
            messages,
            max_new_tokens=max_new_tokens,
            stop=stop,
            chat_template=chat_template,
            **sampling,
        )
        return "".join(reply)

    def stream_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        chat_template: str | None = None,
        **sampling: Any,
    ) -> Answer:
        """As `chat`, but gives the answer out as it comes, as `stream` does.

        The whole conversation is read again for every answer, at lengths rounded up to
        powers of two, so that a growing one seldom compiles anything.
        """
        check_turns(messages)
        self._need_tokenizer()
        template = self.chat_template if chat_template is None else chat_template
        prompts = ChatPrompts(self.tokenizer, template)
        tokens = prompts.tokens(messages)
        left = self.config.max_position_embeddings - len(tokens)
        if left < 1:
            raise UserError(
                f"This conversation takes {len(tokens):,} tokens, and the model has "
                f"{self.config.max_position_embeddings:,} positions "
                "(`max_position_embeddings`), which leaves none for an answer. Drop "
                "earlier turns or shorten them (/reset in `qlora-jax chat`)."
            )
        return answer(
            self.module,
            self.variables,
            self.tokenizer,
            tokens,
            max_new_tokens=min(max_new_tokens, left),
            sampling=Sampling(**sampling),
            eos_token_ids=self.eos_token_ids,
            stop=(*stop, *prompts.stop),
            conversation=True,
        )

    def _encode(self, prompt: str) -> list[int]:
        check_text(prompt)
        self._need_tokenizer()
        return self.tokenizer(prompt)["input_ids"]

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise UserError(
                f"`{self.path}` has no tokenizer. Put its tokenizer.json and "
                "tokenizer_config.json there, or use `generate_tokens` with token ids."
            )


@partial(jax.jit, static_argnums=0)
def _logits(
    module: Llama, variables: Any, tokens: Array, arrays: dict[str, Array]
) -> Array:
    apply: Any = module.apply  # typed for mutable collections, which this has none of
    return apply(module.compute.place(variables), tokens, **arrays)


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
    quantize_as, settled = resolve_auto(trained, quantization, dtype)
    own = adapter_directory(path)
    adapter = None if adapter is None else Path(adapter)
    if trained is None and adapter is not None:
        trained = run_settings(adapter)
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
    compute = Compute(dtype=settled, attention=attention, kernels=kernels)
    config, tree = convert.load_llama(
        path,
        quantization=quantize_as,
        quantize_lm_head=quantize_lm_head,
        dtype=settled,
        progress=progress,
    )
    custom = Llama(config, compute, attention_cls, mlp_cls)
    complete, tree = add_parameters(custom, tree, jax.random.key(0))
    drawn = set(complete.config.extra_tensors) - set(config.extra_tensors)
    config = complete.config
    lora_config = adapters = None
    if adapter is not None:
        lora_config, adapters = _attach(adapter, path, tree, strict=strict)
        config = change(config, lora_config.base_config_changes)
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
        chat_template=chat_template(trained, adapter),
        adapter_path=adapter,
    )


def _attach(
    adapter: Path, path: Path, base: Mapping[str, Any], *, strict: bool
) -> tuple[LoraConfig, Any]:
    """Loads an adapter for a base; says what was not used, and if it is another's."""
    skipped: list[str] = []
    lora, adapters = convert.load_adapter(adapter, base, strict=strict, skipped=skipped)
    for note in in_short(skipped):
        print(f"Not used of `{adapter}`: {note}.", file=sys.stderr)
    note = other_base(adapter, path, base, lora.base_fingerprint)
    if note is not None:
        print(note, file=sys.stderr)
    return lora, jax.tree.map(jnp.asarray, adapters)


def check_weights(
    drawn: Collection[str], base: Any, lora: LoraConfig | None, path: Path
) -> None:
    """Refuses modules of the user's whose weights are not anywhere.

    Args:
      drawn: names of the tensors that were drawn, not loaded.
      base: parameter tree.
      lora: configuration of the adapter; what it holds whole is not lost.
      path: directory of the base, for the message.

    Raises:
      UserError: tensors that neither the directory nor the adapter holds.
    """
    if not drawn:
        return
    whole = () if lora is None else select(base, lora).whole
    kept = {".".join(w.path) for w in whole if all(w.chosen)}
    lost = sorted(set(drawn) - kept)
    if lost:
        raise UserError(
            f"`{path}` has no {', '.join(lost)}, which your modules need. Train them "
            "whole, so that the adapter holds them (`modules_to_save`), or save a base "
            "that has them: `model, base = add_parameters(model, base, key)`, then "
            "`convert.save_llama(directory, model.config, base)`."
        )


def load_tokenizer(path: str | os.PathLike[str]) -> Any:
    """Loads a directory's tokenizer through transformers; None if it has none.

    Raises:
      CheckpointError: tokenizer files that cannot be read.
    """
    path = Path(path)
    files = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    if not any((path / name).is_file() for name in files):
        return None
    with _quiet():
        from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, local_files_only=True)
    except Exception as error:  # transformers raises whatever its parsers raise
        raise CheckpointError(
            f"The tokenizer in `{path}` cannot be read: {error}. Copy the tokenizer "
            "files of the original model there again."
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Mutes remarks while transformers is imported.

    It remarks that PyTorch is missing, which nothing here needs, and sets up its
    loggers itself, so that no level set before would last.
    """
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def end_tokens(
    config: LlamaConfig, tokenizer: Any, directory: Path | None = None
) -> tuple[int, ...]:
    """Token ids that end a text: the model's, the tokenizer's, the directory's.

    Chat models of the Llama 3 family name the end of a turn in generation_config.json
    alone.

    Args:
      config: its `eos_token_id`, one or several.
      tokenizer: its EOS; None = no tokenizer.
      directory: where generation_config.json may be.

    Raises:
      CheckpointError: a generation_config.json that cannot be read.
    """
    ids = set(config.eos_token_ids)
    if tokenizer is not None and tokenizer.eos_token_id is not None:
        ids.add(tokenizer.eos_token_id)
    file = None if directory is None else directory / "generation_config.json"
    if file is not None and file.is_file():
        given = read_json(file).get("eos_token_id")
        given = given if isinstance(given, list) else [given]
        if given != [None] and not all(type(i) is int and i >= 0 for i in given):
            raise CheckpointError(
                f"`{file}`: `eos_token_id` must be a token id or a list of them, got "
                f"{given}."
            )
        ids.update(i for i in given if i is not None)
    return tuple(sorted(ids))
