"""A step that takes far too long ends the process; what is paused does not count."""

import threading
import time

import pytest

from qlora_jax.runs.watchdog import Watchdog


class Left(threading.Event):
    """Notes what the watchdog would end the process with."""

    def __call__(self, status, message):
        self.status, self.message = status, message
        self.set()


def test_a_step_that_hangs_ends_the_process():
    left = Left()
    with Watchdog("process 1 (node1)", minimum=0.2, leave=left) as watchdog:
        watchdog.reset(7)
        assert left.wait(5)
    assert left.status == 75
    assert left.message.startswith("Process 1 (node1): step 8 is not done after")


def test_steps_and_pauses_restart_the_time():
    left = Left()
    with Watchdog("p", minimum=0.4, leave=left) as watchdog:
        for step in range(6):
            time.sleep(0.1)
            watchdog.reset(step)
        with watchdog.paused("saving"):
            time.sleep(0.6)
        time.sleep(0.1)
        assert not left.is_set()
        with watchdog.paused("evaluating", limit=0.1):
            assert left.wait(5)
    assert "evaluating is not done" in left.message


def test_the_limit_grows_with_the_median_step(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    watchdog = Watchdog("p", minimum=300, factor=10)
    assert watchdog.limit == 300
    for step, seconds in enumerate([500, 40, 60, 50, 45]):
        now[0] += seconds
        watchdog.reset(step)
    assert watchdog.limit == pytest.approx(500)
