"""TensorBoard by its library, read back; Weights & Biases by a stand-in of its API."""

import importlib.util
import struct
import sys
import types

import pytest
from tensorboardX.proto import event_pb2

from qlora_jax.errors import UserError
from qlora_jax.runs.config import LogConfig
from qlora_jax.trackers import check_trackers, trackers
from qlora_jax.tree import FrozenDict

TRAIN = {"step": 3, "loss": 2.5, "learning_rate": 0.125, "seconds": 1.5}
EVAL = {"step": 4, "eval_loss": 2.25, "eval_tokens": 7, "eval_data": "abc"}


def events(directory):
    """(step, tag, value) of the event files, in the order they were written.

    A record is its length (8 bytes), a checksum (4), the event and a checksum (4).
    """
    found = []
    for path in sorted((directory / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            event = event_pb2.Event.FromString(data[at + 12 : at + 12 + size])
            at += 16 + size
            for value in event.summary.value:
                text = b"".join(value.tensor.string_val).decode()
                found.append((event.step, value.tag, text or value.simple_value))
            if event.session_log.status == event_pb2.SessionLog.START:
                found.append((event.step, "start", None))
    return found


def test_tensorboard_has_the_numbers_under_the_usual_names(tmp_path):
    log = LogConfig(report_to=("tensorboard",))
    with trackers(log, tmp_path, {}, 0) as (board,):
        board.note(TRAIN)
        board.note(EVAL)
        board.sample(4, "Once", "upon\na <time>")
    assert events(tmp_path) == [
        (3, "train/loss", 2.5),
        (3, "train/learning_rate", 0.125),
        (3, "train/seconds", 1.5),
        (4, "eval/loss", 2.25),
        (4, "eval/tokens", 7.0),
        (4, "samples/Once/text_summary", "    upon\n    a <time>\n"),
    ]
    # Continued from step 2, or from the start: what was written of later steps is
    # taken back.
    for start in (2, 0):
        with trackers(log, tmp_path, {}, start) as (board,):
            board.note(TRAIN)
        assert (start + 1, "start", None) in events(tmp_path)


class StandIn(types.ModuleType):
    """The part of wandb's API that is used."""

    def __init__(self):
        super().__init__("wandb")
        self.started, self.logged, self.metrics, self.finished = [], [], [], 0

    def init(self, **options):
        self.started.append(options)
        return types.SimpleNamespace(
            id=options["id"] or "k1",
            log=self.logged.append,
            define_metric=lambda name, **by: self.metrics.append((name, by)),
            finish=self.finish,
        )

    def finish(self):
        self.finished += 1

    class Table:
        def __init__(self, columns):
            self.columns, self.rows = columns, []

        def add_data(self, *row):
            self.rows.append(row)


def test_weights_and_biases_gets_one_run_however_often_it_stops(tmp_path, monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    log = LogConfig(report_to=("wandb",), project="stories")
    directory = tmp_path / "third"
    directory.mkdir()
    for start in (0, 2):
        with trackers(log, directory, {"lora": FrozenDict({"r": 4})}, start) as (run,):
            run.note(TRAIN)
    first, second = wandb.started
    assert (first["id"], second["id"]) == (None, "k1")
    assert first["name"] == "third" and first["project"] == "stories"
    assert first["config"] == {"lora": {"r": 4}} and first["resume"] == "allow"
    # Steps are taken again after a kill, so they are a number like the others.
    assert ("*", {"step_metric": "train/global_step"}) in wandb.metrics
    assert wandb.logged[0] == {
        **{"train/loss": 2.5, "train/learning_rate": 0.125, "train/seconds": 1.5},
        "train/global_step": 3,
    }
    assert wandb.finished == 2
    with pytest.raises(ValueError), trackers(log, directory, {}, 2) as (run,):
        run.sample(4, "Once", "upon")
        raise ValueError
    assert wandb.logged[-1]["samples"].rows == [(4, "Once", "upon")]
    assert wandb.finished == 3


def test_a_missing_library_is_said_before_anything_is_done(monkeypatch):
    check_trackers(LogConfig(report_to=("tensorboard",)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    check_trackers(LogConfig())
    for name, library in (("tensorboard", "tensorboardX"), ("wandb", "wandb")):
        message = rf'"{name}"\] needs .*pip install {library}\.'
        with pytest.raises(UserError, match=message):
            check_trackers(LogConfig(report_to=(name,)))


def test_other_names_are_refused():
    with pytest.raises(UserError, match="knows 'tensorboard', 'wandb', got 'comet'"):
        LogConfig(report_to=("comet",))
    with pytest.raises(UserError, match="repeats a name"):
        LogConfig(report_to=("wandb", "wandb"))
