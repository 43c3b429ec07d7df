"""Do two models compute the same, and is this the base that was trained on?

Whatever was done to a model's files (an adapter merged in, weights rounded or quantized
again), what it costs is seen in what the model says: the largest difference of a logit,
and how far the distribution of the next token moves, KL(first || second) in nats.
Everything is computed in float32, with one model in memory at a time.
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
from convert.tokenizer import load_tokenizer
from qlora_jax.errors import UserError
from qlora_jax.inference.identity import _common_dtype
from qlora_jax.inference.model import Model
from qlora_jax.lora.config import LoraConfig
from qlora_jax.models.config import LlamaConfig, apply_changes
from qlora_jax.models.layers import Compute

PROBE_TOKENS = 128
"""How many tokens are looked at, unless a text is given."""
_ROWS = 2
_LARGEST_ID = 1 << 31


def compare_logits(
    first: Model | Callable[[], Model],
    second: Model | Callable[[], Model],
    tokens: Any,
) -> dict[str, Any]:
    """Compares the logits of two models on the same tokens.

    Args:
      first: a model, or what loads it; then it is let go before the second is loaded.
      second: likewise.
      tokens: token ids [B, T], an array or nested lists; e.g. from `probe_tokens`.

    Returns:
      "probe_tokens" (how many), "max_abs_logit" (the largest of the first),
      "max_abs_difference", "mean_kl" and "max_kl" (of a token's distribution, nats) and
      "same_top_token" (share of the tokens after which both find the same one most
      probable).

    Raises:
      UserError: vocabularies of different sizes.
    """
    tokens = np.asarray(tokens, np.int32)
    one = _logits(first, tokens)
    two = _logits(second, tokens)
    if one.shape != two.shape:
        raise UserError(
            f"The models have vocabularies of {one.shape[1]} and {two.shape[1]} "
            "tokens; their logits cannot be compared."
        )
    divergence = np.array([_kl(a, b) for a, b in zip(one, two, strict=True)])
    return {
        "probe_tokens": one.shape[0],
        "max_abs_logit": float(np.abs(one).max()),
        "max_abs_difference": float(np.abs(one - two).max()),
        "mean_kl": float(divergence.mean()),
        "max_kl": float(divergence.max()),
        "same_top_token": float((one.argmax(1) == two.argmax(1)).mean()),
    }


def _logits(
    model: Model | Callable[[], Model], tokens: NDArray[np.int32]
) -> Float32[np.ndarray, "N V"]:
    loaded = model if isinstance(model, Model) else model()
    rows = [np.asarray(loaded.logits(row[None])[0]) for row in tokens]
    return np.concatenate(rows)


def _kl(a: Float32[np.ndarray, " V"], b: Float32[np.ndarray, " V"]) -> float:
    p, q = (x.astype(np.float64) for x in (a, b))
    p, q = (x - x.max() for x in (p, q))
    p, q = (x - math.log(np.exp(x).sum()) for x in (p, q))
    # Rounding may leave a tiny negative number where both are the same.
    return max(float((np.exp(p) * (p - q)).sum()), 0.0)


def probe_tokens(
    config: LlamaConfig, include: Iterable[int] = ()
) -> Int[np.ndarray, "B T"]:
    """Token ids to ask models about: the same ones in every run.

    Args:
      config: of the model.
      include: ids that shall be among them, such as those whose rows were trained; as
        many as there is room for.
    """
    length = min(PROBE_TOKENS // _ROWS, config.max_position_embeddings)
    # Frozen by numpy for good, unlike the streams of its newer generators.
    drawn = np.random.RandomState(0).randint(0, _LARGEST_ID, (_ROWS, length))
    tokens = (drawn % config.vocab_size).astype(np.int32)
    wanted = np.array(sorted(set(include)), np.int32)[: tokens.size // 2]
    tokens.reshape(-1)[: 2 * wanted.size : 2] = wanted
    return tokens


def probe_text(path: Path, config: LlamaConfig, text: str) -> Int[np.ndarray, "1 T"]:
    """The tokens of a text, at most `PROBE_TOKENS` of them.

    Raises:
      UserError: a model without a tokenizer, or a text without tokens.
    """
    tokenizer = load_tokenizer(path)
    if tokenizer is None:
        raise UserError(
            f"`{path}` has no tokenizer to read a probe text with. Put its tokenizer "
            "files there, or leave the text out: then fixed token ids are taken."
        )
    ids = tokenizer(text)["input_ids"]
    ids = ids[: min(PROBE_TOKENS, config.max_position_embeddings)]
    if not ids:
        raise UserError("The probe text has no tokens; give one of at least a word.")
    return np.array([ids], np.int32)


def probe(
    path: Path, config: LlamaConfig, text: str | None, loras: Sequence[LoraConfig] = ()
) -> Int[np.ndarray, "B T"]:
    """What models are asked: a text, or fixed ids with those that were trained.

    Args:
      path: directory of the model, for its tokenizer.
      config: of the model.
      text: to be asked, if any.
      loras: adapters whose trained rows of tokens shall be among the ids.

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
    path: Path, *, adapter: Path | None = None, quantization: Any = None
) -> Model:
    """Loads a model as its directory holds it, to be computed in float32.

    Weights keep their dtype and, in a bitsandbytes-4bit directory, their bytes; they
    are widened as they are used.

    Args:
      path: Hugging Face directory.
      adapter: PEFT directory.
      quantization: "nf4" or "nf4_dq" quantize the projections of a dense one first.

    Raises:
      CheckpointError: files that are missing, damaged, or of another model.
      UserError: modules of one's own, which no directory says how to compute.
    """
    config, base = convert.load_llama(
        path, quantization=quantization, dtype=_common_dtype(path)
    )
    check_plain(config, path)
    lora = adapters = None
    if adapter is not None:
        lora, adapters = convert.load_adapter(adapter, base)
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
    """Refuses a model whose modules are not all known here.

    Raises:
      UserError: as it says.
    """
    if config.extra_tensors:
        some = ", ".join(sorted(config.extra_tensors)[:3])
        raise UserError(
            f"`{path}` has modules of its own ({some}), and a directory does not say "
            "how they compute; its logits can be compared in Python alone, with "
            "`qlora_jax.compare_logits`."
        )
