"""Measures a run on held-out data: its loss, the best adapter, early stopping, samples.

    evaluation = Evaluation(config, model, held_out, batch_size)
    row = evaluation.measure(adapters, base, step)

Every decision is a function of the rows in metrics.jsonl (`Best`), so a run that is
killed and continued decides like one that was not: rows up to a checkpoint are on disk
before the checkpoint is, and later ones are measured again.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from qlora_jax.data import (
    DataConfig,
    Examples,
    encode_prompt,
    eval_batches,
    unknown_text,
)
from qlora_jax.errors import UserError, say
from qlora_jax.inference import Model, generate_tokens
from qlora_jax.lora import bind
from qlora_jax.models import Llama, LlamaConfig, traced_on
from qlora_jax.runs.config import EvalConfig
from qlora_jax.runs.eval_data import HeldOut
from qlora_jax.training import jit_eval

# exp(710) overflows a double.
_LARGEST_EXPONENT = 700.0


def held_out_loss(
    step: Callable[..., Any], adapters: Any, base: Any, batches: Iterable[Any]
) -> tuple[float, int]:
    """Returns the summed loss of the supervised tokens, in nats, and their number.

    Args:
      step: from `jit_eval`.
      adapters: trained tree, or one that is bound to the base already.
      base: frozen tree.
      batches: of one shape [B, T], from `eval_batches`.
    """
    # Summed on the host in float64; each batch's sum is float32.
    total, count, pending = 0.0, 0, None
    for batch in batches:
        sums = step(adapters, base, batch)
        # Reading sums waits for them: those of the previous batch are read while the
        # device computes this one.
        if pending is not None:
            total, count = total + float(pending[0]), count + int(pending[1])
        pending = sums
    if pending is not None:
        total, count = total + float(pending[0]), count + int(pending[1])
    return total, count


def perplexity(loss: float) -> float:
    """Returns exp(loss), bounded so that it stays finite."""
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
        # Sums and counts add up over sources; means would not.
        loss = self.total / self.tokens
        return {
            "loss": loss,
            "perplexity": perplexity(loss),
            "supervised_tokens": self.tokens,
            "rows": self.rows,
        }


def measure_loss(
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
        pad_token_id=model.config.padding_id,
    )
    adapters = model.variables.get("lora", {})
    total, tokens = held_out_loss(jit_eval(model.module), adapters, model.base, batches)
    return Loss(total, tokens, len(examples))


@dataclass(frozen=True)
class Best:
    """The best measurement so far, and how many followed without a better one."""

    step: int | None = None
    loss: float = math.inf
    waited: int = 0
    """The latest measurements in a row that were not better by more than the threshold.
    """

    def after(self, step: int, loss: float, threshold: float = 0.0) -> Best:
        """Returns the state after another measurement.

        Counts like `EarlyStoppingCallback` of transformers: any lower loss is the new
        best, and a loss that is lower by more than `threshold` resets `waited`. NaN is
        never better.
        """
        # Not `loss >= self.loss`, which is false for NaN.
        if not loss < self.loss:
            return dataclasses.replace(self, waited=self.waited + 1)
        enough = self.loss - loss > threshold
        return Best(step, loss, 0 if enough else self.waited + 1)


@dataclass
class Evaluation:
    """Measurements and samples during a run, and its early stopping."""

    config: EvalConfig
    model: Llama
    """With the settings of the run."""
    held_out: HeldOut | None
    batch_size: int
    tokenizer: Any = None
    """Encodes prompts and decodes samples."""
    eos_token_ids: tuple[int, ...] = ()
    """Tokens that end a sample."""
    step: Callable[..., Any] | None = None
    """(adapters, base, batch) -> (summed loss, tokens); default `jit_eval`'s."""
    place_batch: Callable[[Mapping[str, Any]], Any] = lambda batch: batch
    """Moves a batch to the devices that compute on its rows."""
    mesh: Any = None
    """The devices that adapters and base are on; None = one device."""
    best: Best = Best()
    measured: int = 0
    """Measurements so far."""

    def __post_init__(self) -> None:
        self._step = self.step or jit_eval(self.model)
        # Losses are comparable only on the same rows, encoded alike.
        self._data = ""
        if self.held_out is not None:
            # 64 bits tell two sets of held-out data apart.
            self._data = self.held_out.examples.report.fingerprint[:16]
        prompts = self.config.sample_prompts
        check_prompts(self.config, self.tokenizer, self.model.config)
        self._prompts = [encode_prompt(self.tokenizer, prompt) for prompt in prompts]

    def resume(self, rows: Sequence[Mapping[str, Any]]) -> int:
        """Counts the measurements of a run that is continued.

        Args:
          rows: of metrics.jsonl, up to the step where it continues.

        Returns:
          The number of rows that were measured on other data, and are ignored.
        """
        others = 0
        for row in rows:
            if row.get("eval_data") == self._data:
                self._count(row["step"], row["eval_loss"])
            else:
                others += 1
        return others

    def measures_at(self, step: int, steps: int) -> bool:
        """Returns whether the loss is measured after `step` of `steps` steps."""
        return self.held_out is not None and self._is_due(
            step, steps, self.config.every
        )

    def samples_at(self, step: int, steps: int) -> bool:
        """Returns whether samples are generated after `step` of `steps` steps."""
        every = self.config.sample_every or self.config.every
        return bool(self._prompts) and self._is_due(step, steps, every)

    def _is_due(self, step: int, steps: int, every: int) -> bool:
        if step == 0:
            return self.config.at_start
        return step % every == 0 or step == steps

    def measure(self, adapters: Any, base: Any, step: int) -> dict[str, Any]:
        """Measures the held-out loss; returns the row for metrics.jsonl."""
        assert self.held_out is not None
        began = time.perf_counter()
        batches = eval_batches(
            self.held_out.examples,
            self.held_out.config,
            batch_size=self.batch_size,
            pad_token_id=self.model.config.padding_id,
        )
        placed = map(self.place_batch, batches)
        total, tokens = held_out_loss(self._step, adapters, base, placed)
        # The mean over all tokens. A mean of batch means would give the tokens of a
        # batch with few of them a larger weight.
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
        """Whether the patience of early stopping is exhausted."""
        patience = self.config.early_stopping_patience
        return patience is not None and self.best.waited >= patience

    @property
    def reason(self) -> str | None:
        """Why early stopping ends the run; None if it does not."""
        if not self.exhausted:
            return None
        best = (
            "there was none"
            if self.best.step is None
            else f"the best is {self.best.loss:.4f}, after step {self.best.step}"
        )
        waited, threshold = self.best.waited, self.config.early_stopping_threshold
        if threshold:  # then the best may be among these, by less than the threshold
            return (
                f"none of {waited} measurements (`early_stopping_patience`) lowered "
                f"the best held-out loss by more than {threshold:g} "
                f"(`early_stopping_threshold`); {best}"
            )
        return (
            f"no better held-out loss in {waited} measurements "
            f"(`early_stopping_patience`); {best}"
        )

    def sample(self, adapters: Any, base: Any) -> dict[str, str]:
        """Returns the greedy continuation of each prompt."""
        lora = self.model.compute.lora
        assert lora is not None
        with traced_on(self.mesh):
            rows = generate_tokens(
                self.model,
                {"params": base, "lora": bind(adapters, base, lora)},
                self._prompts,
                max_new_tokens=self.config.sample_max_new_tokens,
                eos_token_ids=self.eos_token_ids,
            )
        texts = {}
        for prompt, tokens, row in zip(
            self.config.sample_prompts, self._prompts, rows, strict=True
        ):
            # Decoding the new tokens by themselves may lose their leading space.
            start, text = (
                self.tokenizer.decode(ids, skip_special_tokens=True)
                for ids in (tokens, row)
            )
            texts[prompt] = text.removeprefix(start)
        return texts

    def report(self) -> dict[str, Any] | None:
        """Returns the entry of report.json; None if nothing is measured."""
        if self.held_out is None:
            return None
        unmeasured = self.best.step is None
        return {
            "best_step": self.best.step,
            "best_loss": None if unmeasured else self.best.loss,
            "best_perplexity": None if unmeasured else perplexity(self.best.loss),
            "measurements": self.measured,
        }


def check_prompts(config: EvalConfig, tokenizer: Any, model: LlamaConfig) -> None:
    """Checks that the model can continue the prompts, before anything is compiled.

    Raises:
      UserError: every problem of the prompts.
    """
    if not config.sample_prompts:
        return
    if tokenizer is None:
        raise UserError(
            "eval: `sample_prompts` need a tokenizer, and the model's directory has "
            "none. Put the model's tokenizer files there, or leave them out."
        )
    problems = []
    for prompt in config.sample_prompts:
        tokens = encode_prompt(tokenizer, prompt)
        room = model.max_position_embeddings - config.sample_max_new_tokens
        if not tokens:
            problems.append(f"{prompt!r} has no tokens")
        elif max(tokens) >= model.vocab_size:
            problems.append(
                f"{prompt!r} has token {max(tokens)}, and the model has "
                f"{model.vocab_size}"
            )
        elif len(tokens) > room:
            problems.append(
                f"{prompt!r:.60} has {len(tokens)} tokens, and with "
                f"`sample_max_new_tokens`={config.sample_max_new_tokens} the model's "
                f"{model.max_position_embeddings} positions leave room for {room}"
            )
        unknown = unknown_text(tokenizer, prompt)
        if unknown:
            names = ", ".join(map(repr, unknown))
            say(
                f"Note: eval: the tokenizer has no token for {names} in the sample "
                f"prompt {prompt!r:.60}."
            )
    repeats = len(config.sample_prompts) - len(set(config.sample_prompts))
    if repeats:
        problems.append(f"{repeats} of them are there twice")
    if problems:
        raise UserError(f"eval: `sample_prompts`: {'; '.join(problems)}.")
