"""Notes on what a run was asked to do and may not be meant."""

from __future__ import annotations

import contextlib
import math

from qlora_jax.data import Batches
from qlora_jax.errors import UserError, say
from qlora_jax.models import LlamaConfig
from qlora_jax.runs.config import RunConfig
from qlora_jax.runs.directory import template_text

# Share of the data that a last step may repeat without a note.
_REPEATED = 0.05


def note_last_step(batches: Batches, epochs: float | None) -> None:
    """Notes a last step that repeats a noticeable part of the data."""
    if epochs is None:
        return
    rows, taken = batches.rows_per_epoch, len(batches) * batches.rows_per_step
    # Data of fewer rows than a step takes have a note of their own.
    if rows >= batches.rows_per_step and taken - epochs * rows > _REPEATED * rows:
        say(
            f"Note: the last step takes {taken - math.floor(epochs * rows):,} rows of "
            f"another pass, because a step takes {batches.rows_per_step:,} and there "
            f"are {rows:,}: {taken / rows:.2f} passes for `train.epochs` = {epochs:g}. "
            "A batch that divides the rows, or `train.steps`, avoids it."
        )


def note_other_template(config: RunConfig, trained: str | None) -> None:
    """Notes conversations in another form than the adapter that the run starts from.

    Args:
      config: of the run.
      trained: the adapter's chat template, if it has one of its own.
    """
    used = None
    with contextlib.suppress(UserError):  # raised when the data are read
        # Several templates of one run have a note of their own.
        used = template_text(config.data, lambda _: None)
    if None in (trained, used) or used == trained:
        return
    say(
        f"Note: `{config.train.adapter_init}` comes with another chat template than "
        "`data.chat_template` of this run, so that it continues on turns of another "
        "form. Without `data.chat_template` the adapter's own is used."
    )


def note_length(architecture: LlamaConfig, longest: int) -> None:
    """Notes rows that are longer than the model's context."""
    limit = architecture.max_position_embeddings
    if longest <= limit:
        return
    scaling = architecture.rope_scaling
    say(
        f"Note: the longest example has {longest:,} tokens, and this model is meant "
        f"for {limit:,} (`max_position_embeddings`)"
        + (
            " without scaled positions"
            if scaling is None
            else f" with positions scaled {scaling}"
        )
        + ". Training goes on, on positions that it has never seen. A longer context "
        "is a setting: `model.max_position_embeddings` and [model.rope_scaling]; "
        "`data.max_length` makes rows shorter."
    )
