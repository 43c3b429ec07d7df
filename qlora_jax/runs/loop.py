"""The steps of a run, with logs, checkpoints, evaluations and samples.

Every process of a run goes through the same loop: it decides by values that all of them
have, such as the metrics of a step. Process 0 alone logs and writes.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import numpy as np

from qlora_jax.data import Batches, prefetch
from qlora_jax.errors import UserError
from qlora_jax.runs.adapter_writer import AdapterWriter
from qlora_jax.runs.checkpoint import Checkpoints
from qlora_jax.runs.directory import ADAPTER, BEST
from qlora_jax.runs.evaluation import Evaluation
from qlora_jax.runs.interruption import Interruption
from qlora_jax.runs.metrics import Watch, open_trackers, work_of
from qlora_jax.runs.plots import BackgroundPlot
from qlora_jax.runs.prepare import PreparedRun
from qlora_jax.runs.processes import Peers, stop_flags
from qlora_jax.runs.watchdog import Watchdog
from qlora_jax.training import TrainState, schedule


@dataclass(frozen=True)
class PlacedBatches:
    """Batches by index, on the devices that compute on their rows."""

    batches: Batches
    place: Callable[[Mapping[str, np.ndarray]], Mapping[str, Any]]

    def __getitem__(self, index: int, /) -> Any:
        """Returns batch `index`."""
        return self.place(self.batches[index])


def log_step(watch: Watch, step: int, metrics: Mapping[str, Any], tokens: int) -> bool:
    """Logs the metrics of a step; returns False, without logging, if not finite.

    Args:
      watch: logs.
      step: number of the step, from 1.
      metrics: of `train_step`, on the device.
      tokens: tokens of its batch, padding excluded.
    """
    # One transfer for all metrics, which waits until the step is done.
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    finite = values.pop("finite")
    if finite:
        watch.step(step, values, tokens)
    return finite


@dataclass(kw_only=True)
class Loop:
    """The steps of a run, with logs, checkpoints, evaluations and samples."""

    prepared: PreparedRun
    base: Any
    checkpoints: Checkpoints
    record: Mapping[str, Any]
    """What must be unchanged for the run to continue."""
    evaluation: Evaluation
    writer: AdapterWriter
    peers: Peers
    stopped: str | None = None
    """The signal that ended the run; all processes stop after the same step."""
    watch: Watch = field(init=False)
    interruption: Interruption = field(init=False)
    watchdog: Watchdog | None = field(init=False)
    plot: BackgroundPlot | None = field(init=False)
    _stopping: bool = False
    """Whether a process had got a signal before the last step whose metrics are known.
    """

    def run(self, state: TrainState, start: int, began: float) -> TrainState:
        """Takes the steps after `start`, up to the end or an interruption.

        Args:
          state: before the first of them.
          start: steps already taken.
          began: `time.perf_counter()` when the command started.
        """
        prepared, config = self.prepared, self.prepared.config
        directory, steps = Path(config.output_dir), len(prepared.data.batches)
        is_first = self.peers.is_first
        self.plot = None
        if config.log.plot and is_first:
            self.plot = BackgroundPlot(directory)
        log, settings = config.log, dataclasses.asdict(config)
        if not is_first:
            log = dataclasses.replace(log, report_to=())
        with (
            open_trackers(log, directory, settings, start) as trackers,
            Watch(
                directory,
                start=start,
                steps=steps,
                schedule=schedule(config.train, steps),
                every=config.log.every,
                began=began,
                work=work_of(
                    prepared.compiled.plan.step,
                    prepared.data.examples.lengths,
                    devices=math.prod(prepared.compiled.plan.mesh.values()),
                ),
                trackers=trackers,
                writes=is_first,
            ) as self.watch,
            Interruption() as self.interruption,
            self._watchdog() as self.watchdog,
        ):
            if self.peers.count > 1:
                # Of the files, which process 0 has read.
                done = [self.watch.evaluations, sorted(self.watch.sampled_steps)]
                evaluations, sampled = self.peers.broadcast(done, "reading the logs")
                self.watch.evaluations, self.watch.sampled_steps = (
                    evaluations,
                    set(sampled),
                )
            return self._take_steps(state, start)

    def _watchdog(self) -> contextlib.AbstractContextManager[Watchdog | None]:
        if self.peers.count == 1:
            return contextlib.nullcontext()
        return Watchdog(self.peers.name(), leave=self.peers.leave)

    @contextlib.contextmanager
    def _paused(self, doing: str) -> Iterator[None]:
        """Does not count what is done as a part of the step."""
        pause = contextlib.nullcontext()
        if self.watchdog is not None:
            pause = self.watchdog.paused(doing)
        with pause:
            yield

    @contextlib.contextmanager
    def _blaming(self, step: int) -> Iterator[None]:
        """Leaves, naming it, where another process is to blame for a failure."""
        try:
            yield
        except UserError:
            raise
        except Exception as error:
            stop = self.peers.explain(error, step)
            if stop is None:
                raise
            self.peers.leave(stop.status, stop.text)

    def _take_steps(self, state: TrainState, start: int) -> TrainState:
        compiled, batches = self.prepared.compiled, self.prepared.data.batches
        every = self.prepared.config.checkpoint
        steps = len(batches)
        unlogged: tuple[int, Any] | None = None
        if start == 0:
            with self._paused("measuring"):
                self._evaluate(state, 0)
            self.watch.restart_timer()
        ahead = prefetch(PlacedBatches(batches, compiled.place_batch), start, steps)
        saved = start
        for index, batch in enumerate(ahead, start):
            # True at once where a run is continued that had ended early.
            if self.evaluation.exhausted:
                break
            done = index + 1
            with self._blaming(done):
                state, metrics = compiled.step(state, self.base, batch, *self._flags())
                # Reading metrics waits for them: those of the previous step are read
                # while the device computes this one.
                if unlogged is not None:
                    self._log(*unlogged)
                unlogged = (index, metrics)
                self._note_signal()
                due = self.stopped or done % every.every == 0 or done == steps
                evaluated = self._is_evaluated(done)
                if due or evaluated or not compiled.overlaps:
                    self._log(*unlogged)
                    unlogged = None
                if due or evaluated:
                    # Before the checkpoint, which stands for all rows up to its step.
                    with self._paused("measuring"):
                        self._evaluate(state, done)
                    if due or self.evaluation.exhausted:
                        with self._paused("saving"):
                            self._save(state, done)
                        saved = done
                    self.watch.restart_timer()
            if self.watchdog is not None:
                self.watchdog.reset(done)
            if self.stopped:
                break
        ahead.close()
        with self._paused("saving"):
            self.checkpoints.wait()
            if saved == start:  # the run was killed between checkpoint and report
                self.writer.write_all(state)
        if self.plot is not None:
            self.plot.wait()
        return state

    def _flags(self) -> tuple[Any, ...]:
        """Returns the argument of a step that tells all processes of a signal."""
        mesh = self.prepared.compiled.mesh
        if self.peers.count == 1 or mesh is None:
            return ()
        return (stop_flags(mesh, self.interruption.signal is not None),)

    def _note_signal(self) -> None:
        """Notes a signal to stop, after the same step in every process."""
        if self.peers.count == 1:
            # Read once: a signal may come at any moment.
            self.stopped = self.interruption.signal
        elif self._stopping:
            # Another process may have got it.
            self.stopped = self.interruption.signal or "SIGTERM"

    def _is_evaluated(self, done: int) -> bool:
        """Returns whether something is measured or sampled after `done` steps."""
        evaluation, steps = self.evaluation, len(self.prepared.data.batches)
        return evaluation.measures_at(done, steps) or evaluation.samples_at(done, steps)

    def _evaluate(self, state: TrainState, done: int) -> None:
        """Measures the held-out loss and samples, if due and not done before a kill."""
        evaluation, steps = self.evaluation, len(self.prepared.data.batches)
        measured = {row["step"] for row in self.watch.evaluations}
        if evaluation.measures_at(done, steps) and done not in measured:
            row = evaluation.measure(state.adapters, self.base, done)
            is_best = evaluation.best.step == done
            if is_best:  # before its row, which implies that the adapter is there
                losses = {name: row[name] for name in ("eval_loss", "eval_perplexity")}
                self.writer.write(state, BEST, losses)
            self.watch.evaluated(row, "  best so far" if is_best else "")
        if evaluation.samples_at(done, steps) and done not in self.watch.sampled_steps:
            self.watch.sampled(done, evaluation.sample(state.adapters, self.base))
        if self.plot is not None:
            self.plot.start_if_due()

    def _save(self, state: TrainState, done: int) -> None:
        """Saves a checkpoint after `done` steps, and its adapter."""
        # Rows first: a checkpoint stands for all rows up to its step, and a continued
        # run deletes only later ones.
        self.watch.sync()
        # Orbax writes in the background while the adapter is written here.
        first = self.checkpoints.latest() is None
        steps = len(self.prepared.data.batches)
        self.checkpoints.save(state, {**self.record, "batches": done, "steps": steps})
        if first:
            # An adapter without a checkpoint means that checkpoints were lost.
            self.checkpoints.wait()
        self.writer.write_all(state)

    def _log(self, index: int, metrics: Mapping[str, Any]) -> None:
        """Logs a step.

        Raises:
          UserError: its loss or gradient is not finite. The batch is saved.
        """
        tokens = self.prepared.data.batches.tokens(index)
        metrics = dict(metrics)
        if self.peers.count > 1:
            self._stopping = int(metrics.pop("stopping")) > 0
        if log_step(self.watch, index + 1, metrics, tokens):
            return
        directory = Path(self.prepared.config.output_dir)
        file = directory / f"nonfinite_step_{index + 1}.npz"
        if self.peers.is_first:
            batch = self.prepared.data.batches[index]
            np.savez(file, allow_pickle=False, **batch)
        self.checkpoints.wait()
        newest = self.checkpoints.latest()
        if newest is None:
            advice = "There is no checkpoint yet; the same command starts over."
        else:
            advice = (
                f"The last good checkpoint is `{self.checkpoints.path(newest)}`: the "
                "same command tries again from there, and a new run can start from "
                f"its adapter (`train.adapter_init` = {str(directory / ADAPTER)!r})."
            )
        loss, norm = (metrics[name].item() for name in ("loss", "grad_norm"))
        raise UserError(
            f"Step {index + 1} is not finite: loss {loss}, gradient norm {norm}. Its "
            f"batch (number {index}) is saved as `{file}`; the adapters were not "
            f"changed by it. {advice} A lower learning rate, a longer warm-up or dtype "
            "= 'bfloat16' or 'float32' usually helps."
        )
