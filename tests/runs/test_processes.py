"""Real processes start together, stop after the same step, and end together.

process_program.py is what they run, on two devices each.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from qlora_jax.errors import UsageError
from qlora_jax.runs.channel import PeerError
from qlora_jax.runs.place import Place, find_place
from qlora_jax.runs.processes import connect, stop_flags

PROGRAM = Path(__file__).with_name("process_program.py")
# A run takes some, on a busy machine; after these it hangs.
SECONDS = 60
HERE = "All processes are here; process 0 says what the run does."
LOST = r"{} \(\S+\) was lost: it ended without a word"


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


@pytest.fixture(scope="module")
def run():
    """A function: count, case -> exit statuses and outputs of the processes."""
    program = subprocess.Popen(
        [sys.executable, str(PROGRAM)],
        cwd=PROGRAM.parents[2],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )

    def run(count, case):
        timer = threading.Timer(SECONDS, os.killpg, (program.pid, signal.SIGKILL))
        timer.start()
        print(count, case, free_port(), file=program.stdin, flush=True)
        line = program.stdout.readline()
        timer.cancel()
        return zip(*json.loads(line), strict=True)

    yield run
    program.stdin.close()
    program.stdout.close()
    program.wait()


@pytest.mark.parametrize(
    ("case", "count", "statuses", "messages"),
    [
        # A signal to one stops all after the same step; SIGTERM is not taken by JAX.
        (
            *("signal", 2, [143, 143]),
            ["step 3: 1.0\ntold to leave: None\nstopped by SIGTERM after step 3"]
            + ["step 3: 1.0\nstopped by SIGTERM after step 3"],
        ),
        ("nothing", 2, [0, 0], ["step 8: 1.0"] * 2),
        (
            "differ",
            2,
            [2, 2],
            [r"data: a on process 0 \(.*; b on process 1"] * 2,
        ),
        (
            *("no_data", 2, [1, 1]),
            [
                r"Reading the data failed on process 1 \(\S+\): There is no file",
                "^There is no file `rows.jsonl`",
            ],
        ),
        (
            "kill",
            3,
            [75, -9, 75],
            [LOST.format("Process 1"), "", LOST.format("ocess 1")],
        ),
        ("defect_first", 2, [1, 1], ["LookupError: a defect", r"Process 0 \(.*Look"]),
        (
            *("stuck", 2, [75, 75]),
            [
                "step 3 is not done after 2 s",
                r"^Process 0 \(\S+\): step 3 is not done after 2 s",
            ],
        ),
    ],
)
def test_what_ends_one_process_ends_all_with_one_message(
    run, case, count, statuses, messages
):
    ended, errors = run(count, case)
    assert list(ended) == statuses, "\n".join(errors)
    for index, (message, error) in enumerate(zip(messages, errors, strict=True)):
        assert re.search(message, error, re.M), error
        # What gloo prints, and devices of all processes.
        lines = [line for line in error.splitlines() if "Gloo" not in line]
        assert lines.pop(0).startswith(f"Process {index} of {count} on ")
        if index:
            assert lines.pop(0) == HERE
        assert lines[0] == f"devices {2 * count}, 2 here"
        culprit = case.startswith("defect") and index == 0
        assert ("Traceback" in error) == culprit, error


def test_the_end_of_process_0_ends_the_others(run):
    # JAX's service ends with it. The others leave at once, before JAX aborts them, but
    # may lose that race: status 134, with JAX's message.
    ended, errors = run(2, "kill_first")
    assert ended[0] == -9
    assert ended[1] in (75, -6), errors[1]
    assert re.search(LOST.format("Process 0"), errors[1]) or ended[1] == -6


def test_one_process_starts_nothing():
    with connect() as peers:
        assert (peers.index, peers.count, peers.gather("x")) == (0, 1, ["x"])
    with connect("host:1", 1, 0) as peers:
        assert peers.is_first
    assert not jax.distributed.is_initialized()


def test_a_port_in_use_is_refused():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with (
            pytest.raises(PeerError, match=f"cannot listen on port {port}"),
            connect(f"127.0.0.1:{port}", 2, 0),
        ):
            pass


@pytest.mark.parametrize("process", [0, 1])
def test_a_process_that_never_comes_is_named_after_the_limit(process):
    began = time.monotonic()
    with (
        pytest.raises(
            PeerError, match="1 did not come|did not reach process 0"
        ) as info,
        connect(f"127.0.0.1:{free_port()}", 2, process, timeout=0.5),
    ):
        pass
    assert info.value.status == 75
    assert time.monotonic() - began < 5  # a second's work on a busy machine
    assert not jax.distributed.is_initialized()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            ("a:1", None, None),
            "`coordinator` given, and `process`, `processes` missing",
        ),
        ((None, 4, None), "`processes` given"),
        ((None, 4, 1), "`coordinator` missing"),
        (("a:1", 2, 2), "must be from 0 to `processes` - 1, got process = 2"),
        (("a:1", 0, 0), "got process = 0 with processes = 0"),
        (("a", 2, 0), "host and port of process 0"),
        (("a:99999", 2, 0), "host and port of process 0"),
        ((":99", 2, 0), "host and port of process 0"),
        (("http://n:99", 2, 0), "host and port of process 0"),
        ((" :99", 2, 0), "host and port of process 0"),
    ],
)
def test_settings_that_do_not_say_which_process_this_is(settings, message):
    with pytest.raises(UsageError, match=message):
        find_place(*settings)


def test_settings_say_which_process_this_is():
    assert find_place("[::1]:80", 3, 2) == Place("::1", 80, 3, 2)
    assert find_place(None, 1, None) is find_place("a:1", 1, 0) is None


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node7", "node7"),
        ("node7,other", "node7"),
        ("node[003-5,7],other", "node003"),
        ("node[3,5]-ib", "node3-ib"),
        ("rack[1-2]n[3-4]", "rack1n3"),
    ],
)
def test_slurm_says_which_process_this_is(monkeypatch, nodes, host):
    def say(**variables):
        for name, value in variables.items():
            monkeypatch.setenv(f"SLURM_{name}", value)

    # A batch script of a job with four tasks is not one of them.
    say(JOB_ID="4097", NTASKS="4", PROCID="0", JOB_NODELIST=nodes)
    assert find_place(None, None, None) is None
    say(STEP_NUM_TASKS="2", STEP_ID="1", PROCID="1")
    with pytest.raises(UsageError, match="lacks SLURM_STEP_NODELIST"):
        find_place(None, None, None)
    say(STEP_NODELIST=nodes)
    assert find_place(None, None, None) == Place(host, 61442, 2, 1)
    # Settings win.
    assert find_place("a:1", 3, 2) == Place("a", 1, 3, 2)


def test_flags_are_one_for_each_device():
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("data", "fsdp"))
    for stopping in (False, True):
        flags = stop_flags(mesh, stopping)
        assert flags.dtype == np.int32 and flags.tolist() == [stopping]
