"""A run measured on the way: held-out loss, the best adapter, early stopping, samples.

    held = held_out_data(config, examples, tokenizer, vocab_size)     before anything
    evaluation = Evaluation(...)                                      is compiled
    row = evaluation.measure(adapters, base, step)

Everything that decides is a function of the rows in metrics.jsonl (`Best`), so a run
that is killed and continued decides as one that was not: the rows up to its checkpoint
are on disk before the checkpoint is, and later ones are measured again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from convert.tokenizer import end_tokens
from qlora_jax.data.arrays import Examples
from qlora_jax.data.batches import eval_batches
from qlora_jax.data.config import DataConfig
from qlora_jax.errors import UserError
from qlora_jax.inference.decode import generate_tokens
from qlora_jax.inference.model import Model
from qlora_jax.lora.functional import bind
from qlora_jax.models.config import LlamaConfig
from qlora_jax.models.llama import Llama
from qlora_jax.runs.config import EvalConfig
from qlora_jax.runs.eval_data import HeldOut
from qlora_jax.training.step import jit_eval

_LARGEST_EXPONENT = 700.0  # of a double


def held_out_loss(
    step: Callable[..., Any], adapters: Any, base: Any, batches: Iterable[Any]
) -> tuple[float, int]:
    """Summed loss of the supervised tokens of batches, in nats, and their number.

    Args:
      step: from `jit_eval`.
      adapters: trained tree, or what is bound already.
      base: frozen tree.
      batches: of one shape [B, T], from `eval_batches`.
    """
    total, count, pending = 0.0, 0, None
    for batch in batches:
        ahead = step(adapters, base, batch)
        # The sums of the batch before are read while this one is computed.
        if pending is not None:
            total, count = total + float(pending[0]), count + int(pending[1])
        pending = ahead
    if pending is not None:
        total, count = total + float(pending[0]), count + int(pending[1])
    return total, count


def perplexity(loss: float) -> float:
    """exp(loss), the largest double where that is larger."""
    return math.exp(min(loss, _LARGEST_EXPONENT))


@dataclass(frozen=True)
class Loss:
    """A loss summed over supervised tokens."""

    total: float = 0.0
    """Nats."""
    tokens: int = 0
    """Supervised tokens."""
    rows: int = 0

    def __add__(self, other: Loss) -> Loss:
        """Returns the loss over both."""
        return Loss(
            self.total + other.total, self.tokens + other.tokens, self.rows + other.rows
        )

    def report(self) -> dict[str, Any]:
        """Returns the numbers to print; `loss` is in nats per supervised token."""
        loss = self.total / self.tokens
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "supervised_tokens": self.tokens,
            "rows": self.rows,
        }


def measure(
    model: Model, examples: Examples, data: DataConfig, batch_size: int
) -> Loss:
    """Sums the loss of all examples of one source.

    Args:
      model: the model.
      examples: loaded with `data`.
      data: how they are laid out in rows.
      batch_size: rows at a time.

    Raises:
      UserError: `batch_size` is not a positive integer.
    """
    batches = eval_batches(
        examples,
        data,
        batch_size=batch_size,
        pad_token_id=model.config.pad_token_id or 0,
    )
    adapters = model.variables.get("lora", {})
    total, tokens = held_out_loss(jit_eval(model.module), adapters, model.base, batches)
    return Loss(total, tokens, len(examples))


@dataclass(frozen=True)
class Best:
    """The best measurement so far, and how long ago it was."""

    step: int | None = None
    loss: float = math.inf
    waited: int = 0
    """Measurements in a row, up to the last, that were not better by more than the
    threshold."""

    def after(self, step: int, loss: float, threshold: float = 0.0) -> Best:
        """What it is after one more measurement.

        As `EarlyStoppingCallback` of transformers counts: any lower loss is the new
        best, and one lower by more than `threshold` ends the waiting. A loss that is
        not a number is never better.
        """
        if not loss < self.loss:
            return dataclasses.replace(self, waited=self.waited + 1)
        enough = self.loss - loss > threshold
        return Best(step, loss, 0 if enough else self.waited + 1)


@dataclass
class Evaluation:
    """What is done on the way of a run, beside its steps."""

    config: EvalConfig
    model: Llama
    """With the settings of the run."""
    held: HeldOut | None
    batch_size: int
    tokenizer: Any = None
    """Of the samples."""
    step: Callable[..., Any] | None = None
    """(adapters, base, batch) -> (summed loss, tokens); default `jit_eval`'s."""
    best: Best = Best()
    measured: int = 0
    """Measurements so far."""

    def __post_init__(self) -> None:
        self._step = self.step or jit_eval(self.model)
        # What a loss is comparable with: the same rows, read alike.
        self._data = ""
        if self.held is not None:
            self._data = self.held.examples.report.fingerprint[:16]
        prompts = self.config.sample_prompts
        check_prompts(self.config, self.tokenizer, self.model.config)
        self._prompts = [self.tokenizer(prompt)["input_ids"] for prompt in prompts]

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Takes up the measurements of a run that is continued.

        Args:
          rows: of metrics.jsonl, up to the step where it continues.

        Returns:
          How many of them do not count, because they are of other data.
        """
        others = 0
        for row in rows:
            if row.get("eval_data") == self._data:
                self._count(row["step"], row["eval_loss"])
            else:
                others += 1
        return others

    def measures_at(self, step: int, steps: int) -> bool:
        """Whether the loss is measured after `step` of `steps` steps."""
        return self.held is not None and self._is_due(step, steps, self.config.every)

    def samples_at(self, step: int, steps: int) -> bool:
        """Whether the model writes something after `step` of `steps` steps."""
        every = self.config.sample_every or self.config.every
        return bool(self._prompts) and self._is_due(step, steps, every)

    def _is_due(self, step: int, steps: int, every: int) -> bool:
        if step == 0:
            return self.config.at_start
        return step % every == 0 or step == steps

    def measure(self, adapters: Any, base: Any, step: int) -> dict[str, Any]:
        """Measures the held-out loss after `step` steps; the row for metrics.jsonl."""
        assert self.held is not None
        began = time.perf_counter()
        batches = eval_batches(
            self.held.examples,
            self.held.config,
            batch_size=self.batch_size,
            pad_token_id=self.model.config.pad_token_id or 0,
        )
        total, tokens = held_out_loss(self._step, adapters, base, batches)
        loss = total / tokens
        self._count(step, loss)
        return {
            "step": step,
            "eval_loss": loss,
            "eval_perplexity": perplexity(loss),
            "eval_tokens": tokens,
            "eval_seconds": time.perf_counter() - began,
            "eval_data": self._data,
        }

    def _count(self, step: int, loss: float) -> None:
        threshold = self.config.early_stopping_threshold
        self.best = self.best.after(step, loss, threshold)
        self.measured += 1

    @property
    def exhausted(self) -> bool:
        """Whether early stopping has waited long enough."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.best.waited >= patience

    @property
    def reason(self) -> str | None:
        """Why the run ends early; None if it does not."""
        if not self.exhausted:
            return None
        best = (
            "there was none"
            if self.best.step is None
            else f"the best is {self.best.loss:.4f}, after step {self.best.step}"
        )
        waited, least = self.best.waited, self.config.early_stopping_threshold
        if least:  # the best may be one of these, by less than counts
            return (
                f"none of {waited} measurements (`early_stopping_patience`) lowered "
                f"the best held-out loss by more than {least:g} "
                f"(`early_stopping_threshold`); {best}"
            )
        return (
            f"no better held-out loss in {waited} measurements "
            f"(`early_stopping_patience`); {best}"
        )

    def sample(self, adapters: Any, base: Any) -> dict[str, str]:
        """What the model writes after each prompt now."""
        lora = self.model.compute.lora
        assert lora is not None
        rows = generate_tokens(
            self.model,
            {"params": base, "lora": bind(adapters, base, lora)},
            self._prompts,
            max_new_tokens=self.config.sample_max_new_tokens,
            eos_token_ids=end_tokens(self.model.config, self.tokenizer),
        )
        texts = {}
        for prompt, tokens, row in zip(
            self.config.sample_prompts, self._prompts, rows, strict=True
        ):
            # A tokenizer may drop a space at the start of what it is given.
            before, whole = (
                self.tokenizer.decode(ids, skip_special_tokens=True)
                for ids in (tokens, row)
            )
            texts[prompt] = whole.removeprefix(before)
        return texts

    def report(self) -> dict[str, Any] | None:
        """What report.json holds of it; None where nothing is measured."""
        if self.held is None:
            return None
        return {
            "best_step": self.best.step,
            "best_loss": None if self.best.step is None else self.best.loss,
            "best_perplexity": (
                None if self.best.step is None else perplexity(self.best.loss)
            ),
            "measurements": self.measured,
        }


def check_prompts(config: EvalConfig, tokenizer: Any, model: LlamaConfig) -> None:
    """Refuses prompts that cannot be continued, before anything is compiled.

    Raises:
      UserError: all that is wrong with them.
    """
    if not config.sample_prompts:
        return
    if tokenizer is None:
        raise UserError(
            "eval: `sample_prompts` need a tokenizer, and the model's directory has "
            "none. Put the model's tokenizer files there, or leave them out."
        )
    wrong = []
    for prompt in config.sample_prompts:
        tokens = tokenizer(prompt)["input_ids"]
        room = model.max_position_embeddings - config.sample_max_new_tokens
        if not tokens:
            wrong.append(f"{prompt!r} has no tokens")
        elif max(tokens) >= model.vocab_size:
            wrong.append(
                f"{prompt!r} has token {max(tokens)}, and the model has "
                f"{model.vocab_size}"
            )
        elif len(tokens) > room:
            wrong.append(
                f"{prompt!r:.60} has {len(tokens)} tokens, and with "
                f"`sample_max_new_tokens`={config.sample_max_new_tokens} the model's "
                f"{model.max_position_embeddings} positions leave room for {room}"
            )
    twice = len(config.sample_prompts) - len(set(config.sample_prompts))
    if twice:
        wrong.append(f"{twice} of them are there twice")
    if wrong:
        raise UserError(f"eval: `sample_prompts`: {'; '.join(wrong)}.")
