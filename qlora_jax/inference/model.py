"""The loaded model: logits, generation, chat, and exchange of adapters.

    model = load("path/to/hf-llama")          # as it is stored
    model = load("path/to/peft-adapter")      # loads its base and attaches the adapter

`Model` holds plain data (configuration, two trees, tokenizer) and no other state.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float32

import convert
from convert import hub_name, load_tokenization, local_path, peft_directory, shorten
from qlora_jax.compiler import device_jit
from qlora_jax.data import encode_prompt
from qlora_jax.errors import UserError, say
from qlora_jax.inference.config import Sampling
from qlora_jax.inference.decode import Decoding, DecodingConfig, generate_tokens
from qlora_jax.inference.identity import (
    base_mismatch,
    describe_adapter,
    describe_context,
    describe_quantization,
)
from qlora_jax.inference.text import (
    ChatPrompts,
    Detokenizer,
    TextStream,
    check_text,
    check_turns,
    continue_texts,
    per_token_array,
    resolve_stop,
    token_array,
)
from qlora_jax.lora import LoraConfig, bind
from qlora_jax.models import Compute, Llama, LlamaConfig, apply_changes, undo_changes


@dataclass(frozen=True)
class Model:
    """A loaded model, as plain data."""

    config: LlamaConfig
    base: Mapping[str, Any]
    """Frozen parameters, on the device."""
    adapters: Mapping[str, Any] | None
    """LoRA tree (float32), or None."""
    lora_config: LoraConfig | None
    tokenizer: Any
    """The transformers tokenizer of the adapter, else of the base; None if neither has
    one."""
    compute: Compute
    path: Path
    """Directory of the base."""
    attention_cls: Callable[..., nn.Module] | None = None
    """A custom attention module, as `Llama` takes it."""
    mlp_cls: Callable[..., nn.Module] | None = None
    """A custom MLP module."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a row: the configuration's, the tokenizer's and those of
    generation_config.json, of the base and of the adapter."""
    adapter_path: Path | None = None
    """Directory of the adapter."""

    @property
    def module(self) -> Llama:
        """The Flax module that takes `variables`."""
        # Scalings come with the variables, not with the module, so adapters of equal
        # shapes are exchanged without recompilation.
        return Llama(self.config, self.compute, self.attention_cls, self.mlp_cls)

    @property
    def description(self) -> str:
        """Path, quantization and dtype of the base, and the adapter, in one line."""
        parts = [
            f"`{hub_name(self.path) or self.path}`: linear layers "
            f"{describe_quantization(self.base)}",
            f"computed in {self.compute.dtype}",
        ]
        if self.adapter_path is not None:
            parts.append(describe_adapter(self.adapter_path))
        changes = describe_context(self.config)
        return "; ".join([*parts, changes] if changes else parts) + "."

    @property
    def variables(self) -> dict[str, Any]:
        """The variables of `module.apply`."""
        if self.adapters is None or self.lora_config is None:
            return {"params": self.base}
        bound = bind(self.adapters, self.base, self.lora_config)
        return {"params": self.base, "lora": bound}

    def attach(
        self, adapter: str | os.PathLike[str] | None, *, strict: bool = True
    ) -> Model:
        """Returns this model with another adapter, or (None) without an adapter.

        The tokenizer becomes that of the new adapter, or the base's if it has none;
        without an adapter it stays, so that both models can be asked alike. The base is
        shared. Nothing is recompiled if the new adapter has the shapes of
        the old one.

        Args:
          adapter: PEFT directory, or a run directory.
          strict: as for `load`.

        Raises:
          CheckpointError: an adapter that cannot be read or does not fit.
          UserError: an adapter with features that are not supported.
        """
        if adapter is None:
            config = undo_changes(self.config)
            bare = {"adapters": None, "lora_config": None, "adapter_path": None}
            return dataclasses.replace(self, config=config, **bare)
        directory = peft_directory(local_path(adapter))
        lora_config, adapters = load_attached(
            directory, self.path, self.base, strict=strict
        )
        config = apply_changes(
            undo_changes(self.config), lora_config.base_config_changes
        )
        text = load_tokenization(config, self.path, directory)
        for note in text.notes:
            say(note)
        return dataclasses.replace(
            self,
            config=config,
            adapters=adapters,
            lora_config=lora_config,
            tokenizer=text.tokenizer,
            eos_token_ids=text.eos_token_ids,
            adapter_path=directory,
        )

    def with_adapters(
        self, adapters: Mapping[str, Any], lora_config: LoraConfig
    ) -> Model:
        """Returns this model with adapters in memory, e.g. of a run's train state.

        The base is shared, and nothing is recompiled for adapters of equal shapes.

        Args:
          adapters: LoRA tree. Of an initialization that changed the base (PiSSA, OLoRA)
            the result of `absorb`, which belongs to the base as it was loaded.
          lora_config: their configuration.

        Raises:
          UserError: arrays that are missing, or that `lora_config` does not have on
            this base.
        """
        bind(adapters, self.base, lora_config)
        changes = lora_config.base_config_changes
        return dataclasses.replace(
            self,
            config=apply_changes(undo_changes(self.config), changes),
            adapters=adapters,
            lora_config=lora_config,
            adapter_path=None,
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
          UserError: not token ids, rows of different lengths, or ids outside the
            vocabulary (unless they are traced).
        """
        optional = {
            "attention_mask": attention_mask,
            "positions": positions,
            "segment_ids": segment_ids,
        }
        tokens = token_array(tokens, self.config.vocab_size)
        arrays = {
            name: per_token_array(name, value, tokens.shape)
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
        """Continues prompts; returns prompt and continuation of each.

        Args:
          prompts: strings; the batch does not change the tokens of a row.
          max_new_tokens: tokens to add at most.
          temperature: 0 = greedy.
          top_p: probability mass of the tokens sampled from.
          top_k: number of tokens sampled from.
          min_p: least probability of a token sampled from, as a share of the largest
            probability.
          repetition_penalty: above 1, tokens of the text so far become less likely.
          seed: of the sampling.
          stop: strings that end a continuation and are left out of it.

        Raises:
          UserError: no tokenizer, or an invalid prompt or setting.
        """
        if isinstance(prompts, str):
            raise UserError(
                "`prompts` must be a list of strings, got a string. Put it in a list: "
                "`model.generate([text], ...)`."
            )
        sampling = Sampling(temperature, top_k, top_p, min_p, repetition_penalty, seed)
        rows = [self._encode(prompt) for prompt in prompts]
        decode = partial(self.tokenizer.decode, skip_special_tokens=True)
        stop, end_tokens = resolve_stop(stop, self.tokenizer, self.eos_token_ids)
        # Strings are searched for on the host, after each chunk; without them the whole
        # continuation is one program.
        if stop:
            config = DecodingConfig(max_new_tokens, sampling, end_tokens)
            decoding = Decoding(self.module, self.variables, rows, config)
            added = continue_texts(decoding, self.tokenizer, rows, stop)
            return [decode(row) + text for row, text in zip(rows, added, strict=True)]
        continued = generate_tokens(
            self.module,
            self.variables,
            rows,
            max_new_tokens=max_new_tokens,
            **dataclasses.asdict(sampling),
            eos_token_ids=end_tokens,
        )
        return [decode(row) for row in continued]

    def stream(
        self,
        prompt: str,
        *,
        max_new_tokens: int,
        stop: Sequence[str] = (),
        **sampling: Any,
    ) -> TextStream:
        """Continues a prompt and yields the continuation as it is generated.

            for piece in model.stream("Once upon a time", max_new_tokens=64):
                print(piece, end="", flush=True)

        Args:
          prompt: a string.
          max_new_tokens: tokens to add at most.
          stop: strings that end the continuation and are left out of it.
          **sampling: `temperature` and the others of `generate`.

        Returns:
          An iterable of pieces of text (complete characters), with `text`, `tokens`
          and `finish_reason`.

        Raises:
          UserError: as `generate`.
        """
        config = DecodingConfig(max_new_tokens, Sampling(**sampling))
        return self._stream(self._encode(prompt), config, stop)

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 512,
        stop: Sequence[str] = (),
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        **sampling: Any,
    ) -> str:
        """Answers the last turn of a conversation.

            model.chat([{"role": "user", "content": "Who are you?"}])

        Args:
          messages: turns, each with `role` and `content`.
          max_new_tokens: of the answer, at most; fewer if the model's positions end.
          stop: strings that end the answer, as the template's end of a turn does.
          chat_template: a Jinja file in place of the tokenizer's template.
          chat_template_kwargs: further variables of the template, such as
            `{"enable_thinking": False}`.
          tools: functions that the template describes to the model, as JSON schemas.
          **sampling: `temperature` and the others of `generate`.

        Returns:
          The answer, without white space at both ends.

        Raises:
          UserError: no tokenizer, no chat template, turns that it refuses, tools or
            variables that it does not read, or a conversation that is longer than the
            model's positions.
        """
        reply = self.stream_chat(
            messages,
            max_new_tokens=max_new_tokens,
            stop=stop,
            chat_template=chat_template,
            chat_template_kwargs=chat_template_kwargs,
            tools=tools,
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
        chat_template_kwargs: Mapping[str, Any] | None = None,
        tools: Sequence[Any] | None = None,
        **sampling: Any,
    ) -> TextStream:
        """Answers as `chat`, and yields the answer as it is generated, as `stream`.

        Every answer reads the conversation from the start, at a length rounded up to a
        power of two, so that a growing conversation rarely recompiles.
        """
        check_turns(messages)
        self._need_tokenizer()
        prompts = ChatPrompts(
            self.tokenizer, chat_template, variables=chat_template_kwargs, tools=tools
        )
        tokens = prompts.tokens(messages)
        # Positions beyond those the model was trained on make an answer meaningless.
        left = self.config.max_position_embeddings - len(tokens)
        if left < 1:
            raise UserError(
                f"This conversation takes {len(tokens):,} tokens, and the model has "
                f"{self.config.max_position_embeddings:,} positions "
                "(`max_position_embeddings`), which leaves none for an answer. Drop "
                "earlier turns or shorten them (/reset in `qlora-jax chat`)."
            )
        config = DecodingConfig(
            min(max_new_tokens, left), Sampling(**sampling), power_of_two_lengths=True
        )
        return self._stream(tokens, config, (*stop, *prompts.stop), strip=True)

    def _stream(
        self,
        tokens: Sequence[int],
        config: DecodingConfig,
        stop: Sequence[str],
        *,
        strip: bool = False,
    ) -> TextStream:
        stop, end_tokens = resolve_stop(stop, self.tokenizer, self.eos_token_ids)
        config = dataclasses.replace(config, eos_token_ids=end_tokens)
        return TextStream(
            Decoding(self.module, self.variables, [tokens], config),
            Detokenizer(self.tokenizer, tokens, stop=stop, strip=strip),
        )

    def _encode(self, prompt: str) -> list[int]:
        check_text(prompt)
        self._need_tokenizer()
        return encode_prompt(self.tokenizer, prompt)

    def _need_tokenizer(self) -> None:
        if self.tokenizer is None:
            raise UserError(
                f"`{self.path}` has no tokenizer. Put its tokenizer.json and "
                "tokenizer_config.json there, or use `generate_tokens` with token ids."
            )


@device_jit(static_argnums=0)
def _logits(
    module: Llama, variables: Any, tokens: Array, arrays: dict[str, Array]
) -> Array:
    apply: Any = module.apply  # typed for mutable collections; the model has none
    return apply(module.compute.arrange(variables), tokens, **arrays)


def load_attached(
    adapter: Path,
    path: Path,
    base: Mapping[str, Any],
    *,
    original: Mapping[str, Any] | None = None,
    strict: bool,
) -> tuple[LoraConfig, Any]:
    """Loads an adapter for a loaded base onto the device.

    Notes on stderr tell what was not used, and that it was trained on another base.

    Args:
      adapter: PEFT directory.
      path: directory of the base.
      base: its parameter tree.
      original: the tree without tables of the adapter's file, if `base` has them.
      strict: raise for an adapter that does not fit exactly.

    Raises:
      CheckpointError: an adapter that does not fit.
      UserError: a base that is the result of merging this adapter.
    """
    skipped: list[str] = []
    lora, adapters = convert.load_adapter(adapter, base, strict=strict, skipped=skipped)
    convert.check_not_merged(path, adapter)
    for note in shorten(skipped):
        say(f"Not used of `{adapter}`: {note}.")
    for note in convert.other_base_name(lora, adapter, path):
        say(f"Note: {note}.")
    original = base if original is None else original
    note = base_mismatch(adapter, path, original, lora.base_fingerprint)
    if note is not None:
        say(note)
    return lora, jax.tree.map(jnp.asarray, adapters)
