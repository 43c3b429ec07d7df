"""Compares two models by their logits on the same tokens.

The effect of merging an adapter, of rounding or of quantizing is measured on the
model's outputs: the largest difference of a logit, and the divergence of the
distribution of the next token, KL(first || second) in nats. Logits are computed in
float32, with one model in memory at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int
from numpy.typing import NDArray

import convert
from convert import load_tokenizer
from qlora_jax.choices import Dtype
from qlora_jax.data import encode_prompt
from qlora_jax.errors import UserError
from qlora_jax.inference.identity import common_dtype
from qlora_jax.inference.model import Model
from qlora_jax.lora import LoraConfig
from qlora_jax.models import Compute, LlamaConfig, apply_changes

PROBE_TOKENS = 128
"""Number of tokens that models are compared on; a probe may have fewer."""
_ROWS = 2
# The range of the draws, which does not depend on the vocabulary.
_LARGEST_ID = 1 << 31


def compare_logits(
    first: Model | Callable[[], Model],
    second: Model | Callable[[], Model],
    tokens: Any,
) -> dict[str, Any]:
    """Compares the logits of two models on the same tokens.

    Args:
      first: a model, or a function that loads it, so that it is freed before the second
        is loaded.
      second: likewise.
      tokens: token ids [B, T], an array or nested lists; e.g. from `probe_tokens`.

    Returns:
      "probe_tokens" (their number), "max_abs_logit" (of the first model),
      "max_abs_difference", "mean_kl" and "max_kl" (over tokens, in nats) and
      "same_top_token" (share of the positions with the same most probable next token).

    Raises:
      UserError: vocabularies of different sizes.
    """
    tokens = np.asarray(tokens, np.int32)
    logits1 = _logits(first, tokens)
    logits2 = _logits(second, tokens)
    if logits1.shape != logits2.shape:
        raise UserError(
            f"The models have vocabularies of {logits1.shape[1]} and "
            f"{logits2.shape[1]} tokens; their logits cannot be compared."
        )
    divergence = np.array([_kl(a, b) for a, b in zip(logits1, logits2, strict=True)])
    return {
        "probe_tokens": logits1.shape[0],
        "max_abs_logit": float(np.abs(logits1).max()),
        "max_abs_difference": float(np.abs(logits1 - logits2).max()),
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "same_top_token": float((logits1.argmax(1) == logits2.argmax(1)).mean()),
    }


def _logits(
    model: Model | Callable[[], Model], tokens: NDArray[np.int32]
) -> Float32[np.ndarray, "N V"]:
    loaded = model if isinstance(model, Model) else model()
    rows = [np.asarray(loaded.logits(row[None])[0]) for row in tokens]
    return np.concatenate(rows)


def _kl(a: Float32[np.ndarray, " V"], b: Float32[np.ndarray, " V"]) -> float:
    """KL(p || q) = sum p (log p - log q) of the softmax of two rows of logits."""
    # In float64: the terms nearly cancel where the models are nearly equal.
    log_p, log_q = (x.astype(np.float64) for x in (a, b))
    log_p, log_q = (x - x.max() for x in (log_p, log_q))
    # log softmax(x) = x - max - log sum exp(x - max), without overflow.
    log_p, log_q = (x - math.log(np.exp(x).sum()) for x in (log_p, log_q))
    # Rounding may leave a tiny negative number where both are the same.
    return max(float((np.exp(log_p) * (log_p - log_q)).sum()), 0.0)


def probe_tokens(
    config: LlamaConfig, include: Iterable[int] = ()
) -> Int[np.ndarray, "B T"]:
    """Returns token ids to compare models on, the same ones in every run.

    Args:
      config: of the model.
      include: ids to include, such as those whose rows were trained, as many as half of
        the tokens hold.
    """
    length = min(PROBE_TOKENS // _ROWS, config.max_position_embeddings)
    # NumPy guarantees the stream of `RandomState`, unlike those of its new generators.
    drawn = np.random.RandomState(0).randint(0, _LARGEST_ID, (_ROWS, length))
    tokens = (drawn % config.vocab_size).astype(np.int32)
    included = np.array(sorted(set(include)), np.int32)[: tokens.size // 2]
    # Every second token, so that each has drawn neighbours.
    tokens.reshape(-1)[: 2 * included.size : 2] = included
    return tokens


def probe_text(path: Path, config: LlamaConfig, text: str) -> Int[np.ndarray, "1 T"]:
    """Returns the tokens of a string, at most `PROBE_TOKENS` of them.

    Raises:
      UserError: a model without a tokenizer, or a string without tokens.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise UserError(
            f"`{path}` has no tokenizer to read a probe text with. Put its tokenizer "
            "files there, or leave the text out to compare on fixed token ids."
        )
    ids = encode_prompt(tokenizer, text)
    ids = ids[: min(PROBE_TOKENS, config.max_position_embeddings)]
    if not ids:
        raise UserError("The probe text has no tokens; give one of at least a word.")
    return np.array([ids], np.int32)


def probe(
    path: Path, config: LlamaConfig, text: str | None, loras: Sequence[LoraConfig] = ()
) -> Int[np.ndarray, "B T"]:
    """Returns tokens to compare models on: a string's, or fixed ids with trained ones.

    Args:
      path: directory of the model, for its tokenizer.
      config: of the model.
      text: the string to use, if any.
      loras: adapters whose `trainable_token_indices` are included in fixed ids.

    Raises:
      UserError: see `probe_text`.
    """
    if text is not None:
        return probe_text(path, config, text)
    trained: set[int] = set()
    for lora in loras:
        rows = lora.trainable_token_indices or ()
        for indices in rows.values() if isinstance(rows, Mapping) else (rows,):
            trained.update(i for i in indices if i < config.vocab_size)
    return probe_tokens(config, trained)


def load_exact(
    path: Path,
    *,
    adapter: Path | None = None,
    quantization: Any = None,
    quantize_lm_head: bool = False,
    dtype: Dtype | None = None,
    resize_to_adapter: bool = False,
    strict: bool = True,
) -> Model:
    """Loads a model without rounding its weights, to be computed in float32.

    Weights keep their dtype and, in a bitsandbytes-4bit directory, their bytes; each is
    cast to float32 when it is used.

    Args:
      path: Hugging Face directory.
      adapter: PEFT directory.
      quantization: "nf4" or "nf4_dq" to quantize the projections of a dense model.
      quantize_lm_head: whether to quantize its output head too.
      dtype: to load it in, where that does not round; None keeps the file's.
      resize_to_adapter: let the vocabulary grow to that of the adapter.
      strict: raise for an adapter that does not fit exactly.

    Raises:
      CheckpointError: files that are missing, damaged, or of another model.
      UserError: the model has custom modules.
    """
    config, base = convert.load_llama(
        path,
        quantization=quantization,
        quantize_lm_head=quantize_lm_head,
        dtype=dtype or common_dtype(path),
    )
    check_plain(config, path)
    lora = adapters = None
    if adapter is not None:
        with_tables = convert.with_saved_tables(
            config, base, adapter, resize=resize_to_adapter
        )
        config, base = with_tables.config, with_tables.base
        lora, adapters = convert.load_adapter(adapter, base, strict=strict)
        config = apply_changes(config, lora.base_config_changes)
        adapters = jax.tree.map(jnp.asarray, adapters)
    return Model(
        config=config,
        base=jax.tree.map(jnp.asarray, base),
        adapters=adapters,
        lora_config=lora,
        tokenizer=None,
        compute=Compute(dtype="float32", remat="none"),
        path=path,
    )


def check_plain(config: LlamaConfig, path: Path) -> None:
    """Raises if a model has custom modules, whose code is not in its directory.

    Raises:
      UserError: it has.
    """
    if config.extra_tensors:
        examples = ", ".join(sorted(config.extra_tensors)[:3])
        raise UserError(
            f"`{path}` has custom modules ({examples}), whose code is not in the "
            "directory. Compare its logits in Python, with `qlora_jax.compare_logits`."
        )
