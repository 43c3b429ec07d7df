"""Untrained and new rows of the vocabulary tables.

The embedding and the output head of a base model have rows for tokens that it was never
trained on: reserved tokens, chat-template tokens that only the instruct model has seen,
padding up to a round size. Fine-tuning with such tokens starts from rows that are zero
or equal.

    report = report_untrained(base, used_token_ids)     # which rows does my data use?
    base = repair_rows(base, report.rows)               # an explicit change of the base
    config, base = add_tokens(config, base, tokenizer_size=len(tokenizer), count=2)

These functions change the base, which no adapter file contains. Save it with
`convert.save_llama`, or train the rows (`trainable_token_indices`, `modules_to_save`),
which puts them into the adapter file.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float
from numpy.typing import NDArray

from qlora_jax.errors import UserError
from qlora_jax.models.config import LlamaConfig
from qlora_jax.nf4 import NF4Tensor
from qlora_jax.tree import EMBEDDING, HEAD

TokenIds = Iterable[int] | NDArray[np.integer] | jax.Array

# Rows read at a time: a table in float32 may not fit in memory twice.
_CHUNK = 1024


def untrained_rows(
    table: Float[Any, "V D"],
    *,
    eps: float = 1e-16,
    tiny: float = 0.01,
    alike: int = 4,
    near: float = 0.01,
) -> Bool[np.ndarray, " V"]:
    """Finds the rows of an embedding or output head that were never trained.

    A token that never occurs keeps its initial embedding (but for weight decay), and
    its row of the head gets the same gradient as those of all other tokens that never
    occur. So a row counts as untrained if

    - its largest magnitude is at most `eps`: zero (Unsloth's rule and threshold,
      https://unsloth.ai/blog/llama3, which found 287 such rows in Llama 3), or not
      finite;
    - its largest magnitude is at most `tiny` times the median over the rows that are
      not zero. In the models we measured no trained row is below 0.4 of it;
    - it equals at least `alike` - 1 other rows, bit by bit or to within `near` times
      that median: rows that only ever got the common gradient stay together, but for
      the rounding of each. Trained rows never become equal; two or three may have been
      copied on purpose.

    Rows that were drawn at random and never trained look like trained ones and are not
    detected (Land and Bartolo 2024, https://arxiv.org/abs/2405.05417, detect some of
    them with more work). Rows that were all set to one mean still count as untrained.

    Args:
      table: any float dtype, numpy or jax; read in chunks, never copied at once.
      eps: largest magnitude of a row that is zero.
      tiny: largest magnitude, relative to the median, of a row that is too small.
      alike: smallest number of equal rows that count as untrained.
      near: largest difference of rows that count as equal, relative to the median.
    """
    rows = table.shape[0]
    size = np.zeros(rows, np.float32)
    digests = []
    for start, chunk in _chunks(table):
        stop = start + len(chunk)
        size[start:stop] = np.abs(chunk.astype(np.float32)).max(axis=1)
        # Hashes find equal rows in one pass, with 16 bytes a row; as bytes, rows with
        # NaN can be equal too.
        for row in chunk.view(np.uint8):
            digests.append(hashlib.blake2b(row, digest_size=16).digest())
    # Without zero rows, of which a padded vocabulary may have many.
    nonzero = size[np.isfinite(size) & (size > eps)]
    median = float(np.median(nonzero)) if nonzero.size else 0.0
    count = Counter(digests)
    equal = np.array([count[digest] >= alike for digest in digests])
    equal |= _nearly_equal(table, near * median, alike)
    # Not `size <= ...`, which is false of NaN.
    return ~(size > max(eps, tiny * median)) | ~np.isfinite(size) | equal


def _nearly_equal(table: Any, limit: float, alike: int) -> Bool[np.ndarray, " V"]:
    """Finds rows from which at least `alike` - 1 others differ by `limit` at most.

    Rows are put into cells of a grid by six random projections: near rows fall into one
    cell, others hardly ever. What is in a cell is then compared itself.
    """
    rows, width = table.shape
    if not limit > 0:
        return np.zeros(rows, bool)
    directions = np.random.default_rng(0).standard_normal((width, 6), np.float32)
    points = np.empty((rows, 6))
    for start, chunk in _chunks(table):
        values = np.nan_to_num(chunk.astype(np.float32), posinf=0.0, neginf=0.0)
        points[start : start + len(chunk)] = values @ directions
    # A difference of `limit` everywhere moves a point by about limit * sqrt(width).
    cell = 8 * limit * width**0.5
    near = np.zeros(rows, bool)
    # Two grids, so that near rows on two sides of a border meet in the other.
    for shift in (0.0, 0.5):
        cells = np.floor(points / cell + shift).astype(np.int64)
        # One number for each cell (other cells share it hardly ever), which sorts fast.
        keys = cells @ np.array([3**40, 5**27, 7**22, 11**18, 13**17, 17**15])
        _, number, counts = np.unique(keys, return_inverse=True, return_counts=True)
        order = np.argsort(number, kind="stable")
        ends = np.cumsum(counts)
        for group in np.flatnonzero(counts >= alike):
            members = order[ends[group] - counts[group] : ends[group]]
            values = np.asarray(table[members], np.float32)
            distance = np.abs(values - np.median(values, axis=0)).max(axis=1)
            if (distance <= limit).sum() >= alike:
                near[members[distance <= limit]] = True
    return near


@dataclass(frozen=True)
class UntrainedReport:
    """Untrained rows of tokens that the data uses."""

    rows: Mapping[str, tuple[int, ...]]
    """Token ids by table: "embed_tokens", and "lm_head" unless it is tied."""
    untrained: Mapping[str, int]
    """Untrained rows of each table, used or not."""

    @property
    def token_ids(self) -> tuple[int, ...]:
        """Returns the token ids of all tables."""
        return tuple(sorted({i for ids in self.rows.values() for i in ids}))

    @property
    def trainable_token_indices(self) -> dict[str, tuple[int, ...]] | None:
        """Returns the value of `LoraConfig.trainable_token_indices` for these rows.

        A tied head follows the embedding. None if there are no such rows.
        """
        return {name: ids for name, ids in self.rows.items() if ids} or None

    def __str__(self) -> str:
        if not self.token_ids:
            return "Every token that is used has trained rows."
        lines = [
            f"{name}: {len(ids)} of {self.untrained[name]} untrained rows belong to "
            f"tokens that are used: {_format_ids(ids)}"
            for name, ids in self.rows.items()
            if ids
        ]
        lines.append(
            "Training would start from meaningless rows. `repair_rows` sets them to a "
            "better start; that changes the base, so write it with "
            "`convert.save_llama` and train on that, or train the rows as well: "
            "`trainable_token_indices` (only these rows) or `modules_to_save` (full "
            "tables) put them into the adapter file."
        )
        return "\n".join(lines)


def report_untrained(
    base: Mapping[str, Any], used_token_ids: TokenIds, **rule: Any
) -> UntrainedReport:
    """Reports the untrained rows that the data or the chat template use.

    Args:
      base: parameter tree; a quantized output head is skipped, since rounding hides
        what an untrained row looks like.
      used_token_ids: every token that occurs, in any order, repeated or not.
      rule: thresholds of `untrained_rows`.

    Raises:
      UserError: a token that the model has no row for.
    """
    used = _ids(used_token_ids)
    rows, untrained = {}, {}
    for name, table in _tables(base).items():
        if isinstance(table, NF4Tensor):
            continue
        _check_ids(used, table, name)
        mask = untrained_rows(table, **rule)
        rows[name] = tuple(used[mask[used]].tolist())
        untrained[name] = int(mask.sum())
    return UntrainedReport(rows, untrained)


def repair_rows(
    base: Mapping[str, Any],
    ids: TokenIds | Mapping[str, TokenIds],
    how: Literal["mean"] | int = "mean",
) -> dict[str, Any]:
    """Sets rows of the tables to a value that training can start from.

    The base changes, so save it or train the rows; see the module docstring.

    Args:
      base: parameter tree; not changed.
      ids: token ids, for both the embedding and an untied head; or by table, as in
        `UntrainedReport.rows`.
      how: "mean" = the mean of the table's trained rows; a token id = that token's row
        (say, the end-of-text token's for a new end-of-turn token).

    Returns:
      A tree with new tables, which shares all other arrays with `base`.

    Raises:
      UserError: a token or table that the model does not have, or no trained row.
    """
    _check_how(how, ("mean",))
    tables = _tables(base)
    by_table = ids if isinstance(ids, Mapping) else dict.fromkeys(tables, _ids(ids))
    repaired = base
    for name, table_ids in by_table.items():
        if name not in tables:
            raise UserError(
                f"`ids` names the table {name!r}; this model has {', '.join(tables)}."
            )
        rows = _ids(table_ids)
        _check_ids(rows, tables[name], name)
        if rows.size:
            value = _new_row(tables[name], how, name, excluded=rows)
            repaired = _replace(repaired, name, _set_rows(tables[name], rows, value))
    return dict(repaired)


def add_tokens(
    config: LlamaConfig,
    base: Mapping[str, Any],
    *,
    tokenizer_size: int,
    count: int,
    how: Literal["mean", "zero"] | int = "mean",
    pad_to_multiple_of: int | None = None,
) -> tuple[LlamaConfig, dict[str, Any]]:
    """Adds rows for `count` new tokens: ids `tokenizer_size` to `+ count - 1`.

    Rows that a padded vocabulary already has for these ids are reused; the rest is
    appended. Other rows do not change, and no table ever shrinks. If the tokenizer is
    already larger than the table, its tokens get rows first, means.

    Adapters with a part for every token (of an adapted embedding or head, or full
    tables) only fit the vocabulary they were trained with: add tokens before training.

    Args:
      config: of the model.
      base: parameter tree, packed or not (tables are always dense); not changed.
      tokenizer_size: tokens before the new ones, `len(tokenizer)`. Not
        `tokenizer.vocab_size`, which leaves out tokens that were added earlier.
      count: number of new tokens; 0 = only those that the tokenizer has already.
      how: value of the new rows: "mean" of the table's trained rows, "zero", or a token
        id to copy. A zero row of the head gives the logit 0, possibly the largest.
      pad_to_multiple_of: a larger table gets a multiple of this many rows. Padding rows
        are means, which are never the likeliest token.

    Returns:
      (config, base) of the larger vocabulary, or of the same one if it had room.

    Raises:
      UserError: invalid sizes or special tokens left out; or as `repair_rows`.
    """
    step = pad_to_multiple_of or 1
    _check_sizes(config, tokenizer_size, count, step)
    _check_how(how, ("mean", "zero"))
    old_size, used_size = config.vocab_size, tokenizer_size + count
    new_size = max(old_size, used_size)
    if new_size > old_size:
        # Only a table that grows is rounded up: files keep the size they came with.
        new_size = -(-new_size // step) * step
    extended = base
    for name, table in _tables(base).items():
        if table.shape[0] != old_size:
            raise UserError(
                f"`{name}` has {table.shape[0]} rows, and `vocab_size` is {old_size}. "
                "Give the configuration that belongs to this base."
            )
        # The mean leaves out padding that becomes used now, not only appended rows.
        fresh = np.arange(min(tokenizer_size, old_size), new_size)
        mean = _new_row(table, "mean", name, excluded=fresh)
        value = mean if how == "mean" else _new_row(table, how, name, excluded=fresh)
        # Every appended row starts as the mean; those of new tokens get `value` below.
        padding = np.broadcast_to(mean, (new_size - old_size, table.shape[1]))
        xp: Any = jnp if isinstance(table, jax.Array) else np
        padded = xp.concatenate([table, xp.asarray(padding, table.dtype)])
        new_ids = np.arange(tokenizer_size, used_size)
        extended = _replace(extended, name, _set_rows(padded, new_ids, value))
    raw = {**config.raw, "vocab_size": new_size} if config.raw else config.raw
    return dataclasses.replace(config, vocab_size=new_size, raw=raw), dict(extended)


def _check_sizes(
    config: LlamaConfig, tokenizer_size: int, count: int, pad_to_multiple_of: int
) -> None:
    for name, value, minimum in (
        ("tokenizer_size", tokenizer_size, 1),
        ("count", count, 0),
        ("pad_to_multiple_of", pad_to_multiple_of, 1),
    ):
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise UserError(
                f"`{name}` must be an integer of at least {minimum}, got {value!r}."
            )
    special = [("bos_token_id", config.bos_token_id)]
    special += [("eos_token_id", token) for token in config.eos_token_ids]
    special += [("pad_token_id", config.pad_token_id)]
    for name, token in special:
        if token is not None and tokenizer_size <= token < config.vocab_size:
            raise UserError(
                f"`tokenizer_size`={tokenizer_size} leaves out the model's `{name}`="
                f"{token}, whose row would become a new token's. Give "
                "`len(tokenizer)`; `tokenizer.vocab_size` does not count added tokens."
            )


def _tables(base: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tables with a row for each token, by module name."""
    out = {}
    for path in (EMBEDDING, HEAD):
        node: Any = base
        for part in path:
            node = node.get(part, {})
        if "weight" in node:
            out[path[-1]] = node["weight"]
    return out


def _chunks(table: Any) -> Iterator[tuple[int, NDArray]]:
    for start in range(0, table.shape[0], _CHUNK):
        yield start, np.ascontiguousarray(table[start : start + _CHUNK])


def _new_row(
    table: Any, how: Any, name: str, *, excluded: NDArray[np.int64]
) -> NDArray[np.float32]:
    """Returns the row [D] for `how`; "mean" is over trained rows not in `excluded`."""
    if how == "zero":
        return np.zeros(table.shape[1], np.float32)
    if how != "mean":
        ids: Any = np.asarray([how])
        _check_ids(ids, table, name)
        return np.asarray(table[how], np.float32)
    trained = ~untrained_rows(table)
    trained[excluded[excluded < len(trained)]] = False
    if not trained.any():
        raise UserError(
            f"`{name}` has no trained row to take the mean of. Is it a trained model?"
        )
    # A float32 sum over 100,000 rows would lose digits of the mean.
    total = np.zeros(table.shape[1], np.float64)
    for start, chunk in _chunks(table):
        rows = chunk[trained[start : start + len(chunk)]]
        total += rows.astype(np.float32).sum(axis=0, dtype=np.float64)
    return (total / trained.sum()).astype(np.float32)


def _set_rows(table: Any, rows: NDArray[np.int64], value: NDArray[np.float32]) -> Any:
    """Returns a copy of a table, numpy or jax like it, with `rows` set to `value`."""
    if isinstance(table, jax.Array):
        return table.at[rows].set(jnp.asarray(value, table.dtype))
    out = np.array(table)
    out[rows] = value.astype(out.dtype)
    return out


def _replace(base: Mapping[str, Any], name: str, table: Any) -> dict[str, Any]:
    """Returns a tree with another table that shares everything else."""
    if name == HEAD[-1]:
        return {**base, name: {**base[name], "weight": table}}
    model = base["model"]
    return {**base, "model": {**model, name: {**model[name], "weight": table}}}


def _ids(ids: TokenIds) -> NDArray[np.int64]:
    """Returns the sorted distinct token ids of a list or an array of any shape."""
    array = np.asarray(ids if isinstance(ids, (np.ndarray, jax.Array)) else list(ids))
    if array.size and not np.issubdtype(array.dtype, np.integer):
        raise UserError(f"Token ids must be integers, got {array.dtype}.")
    return np.unique(array.astype(np.int64))


def _check_how(how: Any, words: tuple[str, ...]) -> None:
    if how in words or (isinstance(how, int) and not isinstance(how, bool)):
        return
    choices = ", ".join(map(repr, words))
    raise UserError(f"`how` must be {choices} or a token id, got {how!r}.")


def _check_ids(ids: NDArray[np.int64], table: Any, name: str) -> None:
    outside = ids[(ids < 0) | (ids >= table.shape[0])]
    if outside.size:
        raise UserError(
            f"Token {outside[0]} has no row in `{name}`, which has {table.shape[0]} "
            f"(0 to {table.shape[0] - 1}). New tokens get rows with `add_tokens`."
        )


def _format_ids(ids: tuple[int, ...]) -> str:
    more = f" and {len(ids) - 10} more" if len(ids) > 10 else ""
    return ", ".join(map(str, ids[:10])) + more + "."
